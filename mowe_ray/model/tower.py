"""The audio side of the model: from waveforms to audio tokens as wide as the language model.

Legend: C clips, S samples, T base frames, D base width, M pool members, A audio tokens of the longest
clip, W width of the language model; L layers, N frames and E width of an encoder that does not have to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .adapter import build_adapter, shrunk, valid_mask
from .configuration_mowe import EncoderSpec, MoweConfig
from .encoders import AudioEncoder, PadAudio, encoder_class
from .frontends import LogMel, spec_augment
from .fusion import FUSIONS, Fusion, FusionSizes
from .hidden_states import LayerSum, chosen_layers
from .pool import BaseFrames, Clips, PoolMember, WeakEncoderPool
from .routing import ROUTERS, DataIndependentRouter, RoutingRecord, route, router_inputs
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
        prompts: (C, W) mean token embedding of the instruction of each clip, if routers read it.
        present: (C, M) bool, the members that each clip may use; None for all.
        record: Decisions of the routers, without graph.
        totals: This micro-batch's sums; added up over the global batch they are the
            `routing_totals` of forward.
    """

    clips: Clips
    is_dummy: bool
    features: Tensor | None
    rng: RngState
    noise: tuple[Tensor | None, Tensor | None]
    prompts: Tensor | None
    present: Tensor | None
    record: RoutingRecord
    totals: RoutingTotals


class AudioTokens(NamedTuple):
    """Audio tokens (C, A, W), how many of each clip's count, C numbers, and the routers' decisions."""

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
        hidden = cast(int, config.get_text_config().hidden_size)
        self.independent_router: DataIndependentRouter | None = None
        self.dependent_router: nn.Module | None = None
        if config.routed and config.router_data_independent:
            self.independent_router = DataIndependentRouter(members)
        if config.routed and config.router_data_dependent:
            read = ("audio" in config.router_input) * width + ("prompt" in config.router_input) * hidden
            self.dependent_router = ROUTERS.find(config.router_kind)(read, members, config.router_hidden)
        self.pool: WeakEncoderPool | None = None
        self.fusion: Fusion | None = None
        if members:
            sizes = FusionSizes(width, members, config.num_routers, config.router_top_k, config.latents, hidden)
            fusion = self.fusion = FUSIONS.find(config.fusion)(sizes)
            encoders = weak or [new_encoder(spec) for spec in specs]
            self.pool = WeakEncoderPool(
                [
                    PoolMember(encoder, width, spec.features, fusion.new_member())
                    for encoder, spec in zip(encoders, specs, strict=True)
                ],
                config.router_execution,
            )
        fused = width if self.fusion is None else self.fusion.out_width
        self.adapter = build_adapter(config.adapter, fused, width, hidden, config.downsample)

    def prepare(
        self,
        wave: Tensor | None,
        lengths: Tensor | None,
        states: Mapping[int, Tensor] | None = None,
        prompts: Tensor | None = None,
        present: Tensor | None = None,
    ) -> PreparedAudio:
        """Run base encoder and routers without a graph; None or no clips: a batch without audio."""
        with torch.no_grad():
            clips, is_dummy = self._clips(wave, lengths, states or {})
            # Before the base encoder draws its dropout, which the pass with a graph has to repeat.
            rng = RngState.capture(clips.wave.device)
            features, valid = self.encode_base(clips)
            noise = self._draw_noise(clips)
            prompts, present = (None, None) if is_dummy else (prompts, present)
            present = None if present is None else present.to(clips.wave.device, non_blocking=True)
            record = self._route(features, valid, noise, prompts, self._absent(present))
            if is_dummy:
                record = _without_clips(record)
            totals = self._totals(record, clips)
        # A trained base encoder has to run again, for its gradient.
        kept = features if self.base_encoder.frozen else None
        return PreparedAudio(clips, is_dummy, kept, rng, noise, prompts, present, record, totals)

    def forward(
        self,
        wave: Tensor | None,
        lengths: Tensor | None,
        prepared: PreparedAudio | None = None,
        states: Mapping[int, Tensor] | None = None,
        prompts: Tensor | None = None,
        present: Tensor | None = None,
    ) -> AudioTokens:
        """Turn waves (C, S) of `lengths` (C,) samples, or what `prepare` made of them, into tokens.

        A batch without audio runs on one silent clip: its tokens do not count, its record has no
        clips. Encoders whose `states` (C, L, N, E) are given, by index in `encoders`, do not run.
        `prompts` (C, W) and `present` (C, M) are as in `PreparedAudio`.
        """
        decided: RoutingRecord | None = None
        if prepared is None:
            clips, is_dummy = self._clips(wave, lengths, states or {})
            features, valid = self.encode_base(clips)
            noise = self._draw_noise(clips)
            prompts, present = (None, None) if is_dummy else (prompts, present)
            present = None if present is None else present.to(clips.wave.device, non_blocking=True)
        else:
            clips, is_dummy, noise = prepared.clips, prepared.is_dummy, prepared.noise
            prompts, present = prepared.prompts, prepared.present
            if prepared.features is None:
                with prepared.rng.replay():
                    features, valid = self.encode_base(clips)
            else:
                features = prepared.features
                valid = self.base_encoder.num_frames(clips.lengths)
            # With the choices of the first pass, which the totals of the loss have counted: in the second, a rounding
            # error of nondeterministic kernels might change one.
            decided = None if is_dummy else prepared.record
        absent = self._absent(present)
        record = self._route(features, valid, noise, prompts, absent, decided)
        fused, latents = self._fuse(clips, record, features, valid, absent)
        tokens = self.adapter(fused, valid)
        if latents is not None:
            tokens = _behind(tokens, [self._frame_tokens(size) for size in clips.sizes], latents)
        if is_dummy:
            return AudioTokens(tokens, [0], _without_clips(record))
        return AudioTokens(tokens, self.token_counts(clips.sizes), record)

    def token_counts(self, sizes: Sequence[int]) -> list[int]:
        """Return the audio tokens of clips of so many samples."""
        extra = 0 if self.fusion is None else self.fusion.tokens
        return [self._frame_tokens(size) + extra for size in sizes]

    def _frame_tokens(self, samples: int) -> int:
        return int(shrunk(self.base_encoder.num_frames(samples), self.config.downsample))

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

    def _absent(self, present: Tensor | None) -> Tensor | None:
        """Return the members to do without, (M,) or (C, M) bool; None for none."""
        absent = None if present is None else ~present
        if self.excluded_members and self.pool is not None:
            excluded = torch.zeros(len(self.pool.members), dtype=torch.bool, device=next(self.parameters()).device)
            excluded[list(self.excluded_members)] = True
            absent = excluded if absent is None else absent | excluded
        return absent

    def _route(
        self,
        features: Tensor,
        valid: Tensor,
        noise: tuple[Tensor | None, Tensor | None],
        prompts: Tensor | None,
        absent: Tensor | None,
        decided: RoutingRecord | None = None,
    ) -> RoutingRecord:
        """Run the routers; `decided` fixes which members are chosen."""
        config = self.config
        k, temperature = config.router_top_k, config.router_temperature
        independent = dependent = None
        if self.independent_router is not None:
            chosen = decided.independent.chosen if decided and decided.independent else None
            independent = route(
                self.independent_router(), k=k, temperature=temperature, noise=noise[0], chosen=chosen, absent=absent
            )
        if self.dependent_router is not None:
            chosen = decided.dependent.chosen if decided and decided.dependent else None
            per_frame, counted, scattered = config.routes_frames, None, noise[1]
            if config.reads_prompt and prompts is None:  # of the silent clip
                prompts = features.new_zeros(1, config.get_text_config().hidden_size)
            inputs = router_inputs(config.router_input, features, valid, prompts, per_frame=per_frame)
            if per_frame:
                counted = valid_mask(valid, features.shape[1])
                # All frames of a clip explore alike, and do without the same members.
                scattered = None if scattered is None else scattered[:, None]
                absent = absent[:, None] if absent is not None and absent.dim() == 2 else absent
            dependent = route(
                self.dependent_router(inputs),
                k=k,
                temperature=temperature,
                noise=scattered,
                chosen=chosen,
                absent=absent,
                valid=counted,
            )
        return RoutingRecord(independent, dependent, len(valid))

    def _fuse(
        self, clips: Clips, record: RoutingRecord, features: Tensor, valid: Tensor, absent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Join base features and pool: what the adapter gets, and audio tokens besides."""
        if self.pool is None or self.fusion is None:
            return features, None
        present = torch.ones(len(valid), len(self.pool.members), dtype=torch.bool, device=features.device)
        if absent is not None:
            present = present & ~absent
        mixed = self.pool(
            clips,
            self.fusion.mixtures(record.routings, present),
            BaseFrames(features, valid, self.base_encoder.hop_samples, self.base_encoder.first_centre),
            self.fusion.places(features.shape[1]),
            enter_idle=self.enter_idle_encoders,
        )
        fused: tuple[Tensor, Tensor | None] = self.fusion(features, mixed)
        return fused

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


def _behind(tokens: Tensor, counts: list[int], latents: Tensor) -> Tensor:
    """Put latents (C, X, W) right behind the first `counts` of tokens (C, A, W): (C, A + X, W)."""
    frames, extra = tokens.shape[1], latents.shape[1]
    order = [[*range(n), *range(frames, frames + extra), *range(n, frames)] for n in counts]
    index = torch.tensor(order).to(tokens.device, non_blocking=True)
    return torch.cat([tokens, latents], 1).gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def _without_clips(record: RoutingRecord) -> RoutingRecord:
    """Drop the silent clip's decision, so that it has no part in losses and reports."""
    return replace(record, dependent=record.dependent and record.dependent.select(slice(0)), clips=0)
