"""The audio side of the model: from waveforms to audio tokens as wide as the language model.

Legend: C clips, S samples, T base frames, D base width, M pool members, K fusion blocks, W width
of the language model; L layers, N frames and E width of an encoder that does not have to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .adapter import build_adapter, shrunk
from .configuration_mowe import EncoderSpec, MoweConfig
from .encoders import AudioEncoder, PadAudio, encoder_class
from .frontends import LogMel, spec_augment
from .hidden_states import LayerSum, chosen_layers
from .pool import Clips, PoolMember, WeakEncoderPool, hop_samples
from .routing import DataDependentRouter, DataIndependentRouter, Routing, RoutingRecord, route
from .routing_loss import RoutingTotals

SAMPLE_RATE = 16_000


class RngState(NamedTuple):
    """State of the random generators of the CPU and of one accelerator."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        """Read the present state."""
        return cls(
            torch.get_rng_state(),
            device,
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Draw the same numbers again inside, and go on as before afterwards."""
        with torch.random.fork_rng(devices=[] if self.accelerator is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                torch.cuda.set_rng_state(self.accelerator, self.device)
            yield


@dataclass(frozen=True)
class PreparedAudio:
    """A first pass over a micro-batch, without a graph, for the totals of the routing loss.

    Attributes:
        clips: The waveforms, and the states that are known; one silent clip if the batch has none.
        is_dummy: Whether `clips` is that silent clip.
        features: (C, T, D) base features; None if the base is trained, and so has to run again.
        rng: Random state in which the base ran.
        noise: Routing noise, (M,) and (C, M).
        record: Decisions of the routers, without graph.
        totals: This micro-batch's sums; added up over the global batch they are the
            `routing_totals` of forward.
    """

    clips: Clips
    is_dummy: bool
    features: Tensor | None
    rng: RngState
    noise: tuple[Tensor | None, Tensor | None]
    record: RoutingRecord
    totals: RoutingTotals


class AudioTokens(NamedTuple):
    """Audio tokens (C, N, W), how many of each clip's count, C numbers, and the routers' decisions."""

    tokens: Tensor
    valid: list[int]
    record: RoutingRecord


class AudioTower(nn.Module):
    """Base encoder, routers, pool of weak encoders, adapter.

    Args:
        config: The model's configuration.
        base: The base encoder with its weights; None builds it with random ones.
        weak: The pool's encoders likewise.

    Attributes:
        enter_idle_encoders: See `MoweForConditionalGeneration`.
        excluded_members: Indexes of pool members that are treated as absent (ablation).
    """

    def __init__(
        self,
        config: MoweConfig,
        base: AudioEncoder | None = None,
        weak: Sequence[AudioEncoder] | None = None,
    ):
        super().__init__()
        specs: list[EncoderSpec] = config.weak_encoders or []
        self.config = config
        self.enter_idle_encoders = False
        self.excluded_members: tuple[int, ...] = ()
        self.base_encoder = base or new_encoder(cast(EncoderSpec, config.base_encoder))
        self.base_layers = LayerSum(cast(EncoderSpec, config.base_encoder).features, self.base_encoder.num_layers)
        width, members = self.base_encoder.width, len(specs)
        self.independent_router: DataIndependentRouter | None = None
        self.dependent_router: DataDependentRouter | None = None
        if config.routed and config.router_data_independent:
            self.independent_router = DataIndependentRouter(members)
        if config.routed and config.router_data_dependent:
            self.dependent_router = DataDependentRouter(width, members)
        self.pool: WeakEncoderPool | None = None
        if members:
            encoders = weak or [new_encoder(spec) for spec in specs]
            self.pool = WeakEncoderPool(
                [PoolMember(encoder, width, spec.features) for encoder, spec in zip(encoders, specs, strict=True)],
                config.router_execution,
            )
        hidden = cast(int, config.get_text_config().hidden_size)
        self.adapter = build_adapter(config.adapter, width * config.num_blocks, width, hidden, config.downsample)

    def prepare(
        self, wave: Tensor | None, lengths: Tensor | None, states: Mapping[int, Tensor] | None = None
    ) -> PreparedAudio:
        """Run base encoder and routers without a graph; None or no clips: a batch without audio."""
        with torch.no_grad():
            clips, is_dummy = self._clips(wave, lengths, states or {})
            # Before the base encoder draws its dropout, which the pass with a graph has to repeat.
            rng = RngState.capture(clips.wave.device)
            features, valid = self.encode_base(clips)
            noise = self._draw_noise(clips)
            record = self._route(features, valid, noise, None)
            if is_dummy:
                record = _without_clips(record)
            totals = self._totals(record, clips)
        # A trained base encoder has to run again, for its gradient.
        kept = features if self.base_encoder.frozen else None
        return PreparedAudio(clips, is_dummy, kept, rng, noise, record, totals)

    def forward(
        self,
        wave: Tensor | None,
        lengths: Tensor | None,
        prepared: PreparedAudio | None = None,
        states: Mapping[int, Tensor] | None = None,
    ) -> AudioTokens:
        """Turn waves (C, S) of `lengths` (C,) samples, or what `prepare` made of them, into tokens.

        A batch without audio runs on one silent clip: its tokens do not count, its record has no
        clips. Encoders whose `states` (C, L, N, E) are given, by index in `encoders`, do not run.
        """
        if prepared is None:
            clips, is_dummy = self._clips(wave, lengths, states or {})
            features, valid = self.encode_base(clips)
            record = self._route(features, valid, self._draw_noise(clips), None)
        else:
            clips, is_dummy = prepared.clips, prepared.is_dummy
            if prepared.features is None:
                with prepared.rng.replay():
                    features, valid = self.encode_base(clips)
            else:
                features = prepared.features
                valid = self.base_encoder.num_frames(clips.lengths)
            # With the choices of the first pass, which the totals of the loss have counted: in the second, a rounding
            # error of nondeterministic kernels might change one.
            record = self._route(features, valid, prepared.noise, None if is_dummy else prepared.record)
        fused = torch.cat([features, *self._mix(clips, record, features)], dim=-1)
        tokens = self.adapter(fused, valid)
        if is_dummy:
            return AudioTokens(tokens, [0], _without_clips(record))
        counts = [int(shrunk(self.base_encoder.num_frames(size), self.config.downsample)) for size in clips.sizes]
        return AudioTokens(tokens, counts, record)

    def encode_base(self, clips: Clips) -> tuple[Tensor, Tensor]:
        """Return base features (C, T, D), cropped to the longest clip, and their counts (C,)."""
        base = self.base_encoder
        if 0 in clips.states:
            assert not (self.config.spec_augment and self.training), "what is masked has to run"
            valid = base.num_frames(clips.lengths)
            return self.base_layers(clips.states[0].unbind(1))[:, : self._frames(clips)], valid
        key = clips.key(base)
        everyone = list(range(len(clips.sizes)))
        clips.compute([(key, everyone)])
        features = clips.take(key, everyone)
        augment = self.config.spec_augment
        if augment and self.training and isinstance(base.front_end, LogMel):
            features = spec_augment(
                features,
                augment["mask_prob"],
                augment["mask_length"],
                clips.lengths // base.front_end.hop_length,
            )
        valid = base.num_frames(clips.lengths)
        lengths = clips.lengths if clips.is_padded(key, everyone) else None
        states = self.base_layers(chosen_layers(base, self.base_layers.choice, features, lengths))
        return states[:, : self._frames(clips)], valid

    def _frames(self, clips: Clips) -> int:
        """Return T, the base frames of the longest clip."""
        return max(map(self.base_encoder.num_frames, clips.sizes))

    def _clips(self, wave: Tensor | None, lengths: Tensor | None, states: Mapping[int, Tensor]) -> tuple[Clips, bool]:
        """Return the batch, or one silent clip all encoders can take, and whether it is that.

        With zeros for its states: encoders that need not run on clips do not run on silence either, on any rank.
        """
        pad_audio, encoders = cast(PadAudio, self.config.pad_audio), self.encoders()
        states = {index: known.to(encoders[index].dtype) for index, known in states.items()}
        if wave is not None and lengths is not None and len(lengths):
            return Clips(wave, lengths, pad_audio, states=states), False
        device = next(self.parameters()).device
        shortest = max(encoder.min_samples for encoder in encoders)
        silent = {
            index: known.new_zeros(1, known.shape[1], encoders[index].num_frames(shortest), known.shape[3])
            for index, known in states.items()
        }
        return Clips(
            torch.zeros(1, shortest, device=device),
            torch.tensor([shortest]),
            pad_audio,
            states=silent,
        ), True

    def encoders(self) -> list[AudioEncoder]:
        """Return the base encoder, then the pool's."""
        return [self.base_encoder, *(member.encoder for member in self.pool or ())]

    def _draw_noise(self, clips: Clips) -> tuple[Tensor | None, Tensor | None]:
        if not self.training or self.config.router_noise == 0 or self.pool is None:
            return None, None
        draw = torch.randn(len(clips.lengths) + 1, len(self.pool.members), device=clips.wave.device)
        return draw[0] * self.config.router_noise, draw[1:] * self.config.router_noise

    def _route(
        self,
        features: Tensor,
        valid: Tensor,
        noise: tuple[Tensor | None, Tensor | None],
        decided: RoutingRecord | None,
    ) -> RoutingRecord:
        """Run the routers; `decided` fixes which members are chosen."""
        k, temperature = self.config.router_top_k, self.config.router_temperature
        independent = dependent = None
        if self.independent_router is not None:
            chosen = decided.independent.chosen if decided and decided.independent else None
            independent = route(
                self.independent_router(),
                k=k,
                temperature=temperature,
                noise=noise[0],
                chosen=chosen,
                excluded_members=self.excluded_members,
            )
        if self.dependent_router is not None:
            chosen = decided.dependent.chosen if decided and decided.dependent else None
            logits = self.dependent_router(features, valid)
            dependent = route(
                logits,
                k=k,
                temperature=temperature,
                noise=noise[1],
                chosen=chosen,
                excluded_members=self.excluded_members,
            )
        return RoutingRecord(independent, dependent, len(valid))

    def _mix(self, clips: Clips, record: RoutingRecord, features: Tensor) -> list[Tensor]:
        """Return the fusion's blocks beside the base features, (C, T, D) each."""
        if self.pool is None:
            return []
        weights, chosen = self._mixing(record, len(clips.lengths), features.device)
        return cast(
            "list[Tensor]",
            self.pool(
                clips,
                weights,
                chosen,
                hop_samples(self.base_encoder),
                features.shape[1],
                first_centre=self.base_encoder.first_centre,
                enter_idle=self.enter_idle_encoders,
            ),
        )

    def _mixing(self, record: RoutingRecord, clips: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mixing weights and choices (K, C, M) of the configured fusion."""
        assert self.pool is not None
        members = len(self.pool.members)
        if self.config.fusion == "routed":
            routings = [routing for routing in (record.independent, record.dependent) if routing is not None]
            weights = torch.stack([routing.weights.expand(clips, -1) for routing in routings])
            return weights, torch.stack([routing.chosen.expand(clips, -1) for routing in routings])
        if self.config.fusion == "concat":
            weights = torch.eye(members, device=device)[:, None].repeat(1, clips, 1)
        else:
            weights = torch.full((1, clips, members), 1 / max(members - len(self.excluded_members), 1), device=device)
        weights[..., list(self.excluded_members)] = 0
        return weights, weights > 0

    def _totals(self, record: RoutingRecord, clips: Clips) -> RoutingTotals:
        if record.dependent is not None:
            return RoutingTotals.of(record.dependent)
        members = 0 if self.pool is None else len(self.pool.members)
        zeros = torch.zeros(members, device=clips.wave.device)
        return RoutingTotals(zeros, zeros, zeros.new_full((), record.clips))


def new_encoder(spec: EncoderSpec) -> AudioEncoder:
    """Build an encoder with random weights."""
    # transformers loads an export's configuration and model code as two copies: of this one's classes.
    own = EncoderSpec.from_dict(spec.to_dict())
    return encoder_class(own.config)(own.config, own.front_end)


def _without_clips(record: RoutingRecord) -> RoutingRecord:
    """Drop the silent clip's decision, so that it has no part in losses and reports."""
    dependent = record.dependent
    if dependent is not None:
        dependent = Routing(dependent.logits[:0], dependent.probabilities[:0], dependent.chosen[:0])
    return replace(record, dependent=dependent, clips=0)
