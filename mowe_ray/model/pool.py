"""The pool of weak encoders: run chosen members on the clips that chose them, and mix their frames.

Legend: C clips, S samples, T base frames, M members, K mixtures of a fusion, X their places (T frames,
or latents), R clips of one member, D common width (the base encoder's), L layers that a choice of
features needs, N frames and E width of one encoder.

The clips that a member runs on determine shapes, which the host needs. Each read of a tensor makes the host wait for
the device; here there is one in a forward, of all choices together, and everything that follows from them and from the
clips' lengths is worked out on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from .encoder_base import AudioEncoder, PadAudio
from .frontends import FrontEnd
from .fusion import Mixture
from .hidden_states import chosen_layers, is_sum, layers_of, learned_sum

FeatureKey = tuple[FrontEnd, int]


@dataclass(frozen=True)
class BaseFrames:
    """What the base encoder made of a batch.

    Attributes:
        features: (C, T, D).
        valid: (C,) frames of each clip.
        hop: Samples per frame.
        first_centre: Sample in the middle of the first frame.
    """

    features: Tensor
    valid: Tensor
    hop: float
    first_centre: float = 0.0

    def of(self, clips: Clips, rows: list[int]) -> BaseFrames:
        """Return those of some of the clips."""
        return replace(self, features=clips.pick(self.features, rows), valid=clips.pick(self.valid, rows))

    def silent(self) -> BaseFrames:
        """Return those of a clip of one frame that is zero."""
        one = self.features.new_zeros(1, 1, self.features.shape[2])
        return replace(self, features=one, valid=self.valid.new_ones(1))


@dataclass
class Clips:
    """A batch of waveforms, and the features computed from them so far.

    Attributes:
        wave: (C, S) mono 16 kHz.
        lengths: (C,) valid samples; best on the host, which needs their values. They are moved to the wave's device.
        sizes: The same as plain numbers.
        pad_audio: How far encoders with a choice pad: `bucket` or `full30`.
        features: By front-end and padded length, which rows (R,) it was computed for, and (R, ...).
        states: (C, L, N, E) of encoders that do not have to run, by index: 0 the base encoder, 1, 2... the pool.
    """

    wave: Tensor
    lengths: Tensor
    pad_audio: PadAudio = "bucket"
    features: dict[FeatureKey, tuple[list[int], Tensor]] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = self.lengths.tolist()
        self.lengths = self.lengths.to(self.wave.device, non_blocking=True)

    def key(self, encoder: AudioEncoder) -> FeatureKey:
        """Return the key of the features that `encoder` takes of this batch."""
        return encoder.front_end, encoder.pad_samples(max(self.sizes), self.pad_audio)

    def compute(self, requests: Iterable[tuple[FeatureKey, list[int]]]) -> None:
        """Compute each distinct front-end once, for all the rows that any request needs of it."""
        wanted: dict[FeatureKey, set[int]] = {}
        for key, rows in requests:
            wanted.setdefault(key, set()).update(rows)
        for key, needed in wanted.items():
            if key not in self.features and needed:
                rows = sorted(needed)
                self.features[key] = rows, key[0](self.pick(self.wave, rows), self.pick(self.lengths, rows), key[1])

    def is_padded(self, key: FeatureKey, rows: list[int]) -> bool:
        """Whether any of `rows` is shorter than the features are computed for, as the host knows without a read."""
        return any(self.sizes[row] < key[1] for row in rows)

    def take(self, key: FeatureKey, rows: list[int]) -> Tensor:
        """Return the computed features of `rows` (R,), in their order."""
        computed, features = self.features[key]
        if computed == rows:
            return features
        return features[self.index([computed.index(row) for row in rows])]

    def pick(self, values: Tensor, rows: list[int]) -> Tensor:
        """Return `rows` (R,) of values (C, ...): themselves if that is all of them."""
        return values if rows == list(range(len(values))) else values[self.index(rows)]

    def index(self, rows: list[int]) -> Tensor:
        """Return row numbers as a tensor on the device of the waves."""
        return torch.tensor(rows).to(self.wave.device, non_blocking=True)


def align_frames(states: Tensor, valid: Tensor, ratio: float, frames: int, offset: float = 0.0) -> Tensor:
    """Resample frames in time by linear interpolation.

    Frame t of the result is at t * ratio + offset of the input, never before a clip's first frame or past its last
    valid one: so a missing last frame repeats, a surplus one is dropped, and padding has no part in the result. [ours]

    Args:
        states: (R, N, D).
        valid: (R,) input frames that belong to each clip.
        ratio: Input frames per output frame.
        frames: T, output frames.
        offset: Input frames from the first one to the place of the first output frame.

    Returns:
        (R, T, D).
    """
    position = (torch.arange(frames, device=states.device) * ratio + offset).clamp(min=0)
    last = (valid.clamp(max=states.shape[1]) - 1)[:, None]
    position = torch.minimum(position, last.to(position.dtype))
    lower = position.long()
    below = _pick(states, lower)
    # Frames coincide: no second gather, and bit-identical frames.
    if ratio == 1 and offset == 0:
        return below
    weight = (position - lower)[..., None].to(states.dtype)
    return torch.lerp(below, _pick(states, torch.minimum(lower + 1, last)), weight)


def _pick(states: Tensor, index: Tensor) -> Tensor:
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


class PoolMember(nn.Module):
    """One weak encoder, its choice of features, and its own projection to the common width.

    Args:
        encoder: The encoder with its weights; frozen ones build no graph.
        width: D.
        features: `last`, `layer:N`, `layers:[N, M]` or `weighted_sum`.
        fuse: What the fusion does with each member's frames (`Fusion.new_member`); None for nothing.

    Raises:
        ValueError: if `features` is none of these, or N is beyond the encoder's layers.
    """

    def __init__(self, encoder: AudioEncoder, width: int, features: str, fuse: nn.Module | None = None):
        super().__init__()
        self.encoder = encoder
        self.choice = features
        needed = len(layers_of(features, encoder.num_layers))
        self.layer_weights = nn.Parameter(torch.zeros(needed)) if is_sum(features) else None
        self.projection = nn.Sequential(nn.Linear(encoder.width, width), nn.LayerNorm(width))
        self.fuse = fuse

    def reset_parameters(self) -> None:
        """Weight all layers alike; the other tensors belong to submodules."""
        if self.layer_weights is not None:
            nn.init.zeros_(self.layer_weights)

    def forward(
        self,
        features: Tensor | None,
        lengths: Tensor,
        base: BaseFrames,
        states: Tensor | None = None,
        padded: bool = True,
    ) -> Tensor:
        """Encode clips.

        Args:
            features: (R, ...) from the encoder's front-end.
            lengths: (R,) valid samples.
            base: The base encoder's frames, with which the result is aligned; of the same clips if there is `fuse`.
            states: (R, L, N, E), what the encoder would make of the clips: it then does not run.
            padded: Whether any clip is shorter than its features; if none is, the encoder needs no mask.

        Returns:
            (R, X, D).
        """
        if states is None:
            assert features is not None
            layers = chosen_layers(self.encoder, self.choice, features, lengths if padded else None)
        else:
            layers = list(states.unbind(1))
        mixed = learned_sum(layers, self.layer_weights)
        valid = self.encoder.num_frames(lengths)
        own_hop = self.encoder.hop_samples
        # By their centres; but frames of one rate are paired by number: between them, interpolation would only blur.
        offset = 0.0 if base.hop == own_hop else (base.first_centre - self.encoder.first_centre) / own_hop
        frames = base.features.shape[1]
        aligned = align_frames(self.projection(mixed), valid, base.hop / own_hop, frames, offset)
        return aligned if self.fuse is None else self.fuse(aligned, base.features, base.valid)


class WeakEncoderPool(nn.Module):
    """M members and the dispatch of clips to them.

    In training, every member is entered in every forward, in the same order: an idle one with one
    minimal silent clip whose result is multiplied by zero. Sharded and data-parallel training need
    the same sequence of gathers and gradients on every rank, whatever the routers chose there.
    """

    def __init__(self, members: Sequence[PoolMember], execution: str):
        super().__init__()
        if execution not in ("sparse", "dense"):
            raise ValueError(f"model.router.execution must be sparse or dense, not {execution!r}")
        self.members = nn.ModuleList(members)
        self.execution = execution

    def __iter__(self) -> Iterator[PoolMember]:
        """Yield the members in their fixed order."""
        for member in self.members:
            assert isinstance(member, PoolMember)
            yield member

    def forward(
        self,
        clips: Clips,
        mixtures: Sequence[Mixture],
        base: BaseFrames,
        places: int,
        *,
        enter_idle: bool,
    ) -> list[Tensor]:
        """Mix the members' frames.

        Args:
            clips: The batch; gains the features computed here.
            mixtures: K weighted sums to make.
            base: The base encoder's frames of the batch.
            places: X.
            enter_idle: Run idle members on a silent clip, outside training too.

        Returns:
            K mixtures (C, X, D).
        """
        used = on_host(torch.stack([mixture.used for mixture in mixtures]))
        # A member that several mixtures chose for a clip runs once on it.
        needed = np.logical_or.reduce(used, axis=0) | (self.execution == "dense")
        rows = [np.flatnonzero(needed[:, member]).tolist() for member in range(len(self.members))]
        keys = {i: clips.key(member.encoder) for i, member in enumerate(self) if i + 1 not in clips.states}
        # Before any member runs: members with equal front-ends share one computation over the union of their rows.
        clips.compute((key, rows[index]) for index, key in keys.items())
        mixed: list[Tensor | None] = [None] * len(mixtures)
        idle: list[Tensor] = []
        for index, member in enumerate(self):
            if not len(rows[index]):
                if enter_idle or self.training:
                    idle.append(self._enter(member, clips, base, clips.states.get(index + 1)).sum() * 0)
                continue
            known = clips.states.get(index + 1)
            states = member(
                clips.take(keys[index], rows[index]) if known is None else None,
                clips.pick(clips.lengths, rows[index]),
                base if member.fuse is None else base.of(clips, rows[index]),
                None if known is None else clips.pick(known, rows[index]),
                padded=known is not None or clips.is_padded(keys[index], rows[index]),
            )
            where = None if len(rows[index]) == len(clips.sizes) else clips.index(rows[index])
            for number, mixture in enumerate(mixtures):
                # Dense multiplies by weights of zero instead of skipping, so that it is a reference for the sparse
                # execution.
                if self.execution == "dense" or used[number, :, index].any():
                    scaled = states * clips.pick(mixture.weights[:, :, index, None], rows[index]).to(states.dtype)
                    mixed[number] = _scatter(mixed[number], scaled, where, len(clips.sizes))
        # Made from frames, not from a weight: under ZeRO-3, reading one would gather it on this rank alone.
        nothing = base.features.new_zeros(len(clips.sizes), places, base.features.shape[2])
        made = [nothing if mixture is None else mixture for mixture in mixed]
        for silent in idle:
            made[0] = made[0] + silent
        return made

    def _enter(self, member: PoolMember, clips: Clips, base: BaseFrames, known: Tensor | None) -> Tensor:
        encoder = member.encoder
        # The shortest clip the encoder takes, not a bucket of it: its result is thrown away.
        lengths = clips.lengths.new_full((1,), encoder.min_samples)
        if known is not None:
            nothing = known.new_zeros(1, known.shape[1], 1, known.shape[3])
            silent: Tensor = member(None, lengths, base.silent(), nothing)
            return silent
        features = encoder.front_end(clips.wave.new_zeros(1, encoder.min_samples), lengths, encoder.min_samples)
        states: Tensor = member(features, lengths, base.silent(), padded=False)
        return states


def on_host(mask: Tensor) -> np.ndarray:
    """Copy a mask to the host, which waits for the device meanwhile."""
    return mask.to("cpu", copy=True).numpy()


def _scatter(total: Tensor | None, states: Tensor, rows: Tensor | None, clips: int) -> Tensor:
    """Add states (R, X, D) into their `rows` (R,) of `total` (C, X, D), by default all of them; no total is zero."""
    if rows is None:
        return states if total is None else total + states
    if total is None:
        total = states.new_zeros(clips, *states.shape[1:])
    return total.index_add(0, rows, states)
