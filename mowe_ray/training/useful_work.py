"""The share of the floating-point operations of training that clips and texts need, and what takes the rest.

A clip's work depends on its length alone, and the length of a micro-batch is that of its longest clip. So two tables of
work by length, and a polynomial in tokens, are enough to tell what any plan of micro-batches executes.

Legend: C clips and R rows of a micro-batch, G lengths of 0, 20, 40 ... ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import nn

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.data.epoch_plan import Rows
from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.encoders import AudioEncoder, PadAudio
from mowe_ray.training.flops import CLIP_S, audio_tokens, expected_share, part_gflops

_STEP = round(0.02 * SAMPLE_RATE)  # samples between two lengths of the tables: a frame of the speech encoders

Numbers = npt.NDArray[np.floating] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class Work:
    """GFLOPs of training, by what they are spent on.

    Attributes:
        clips: What each clip needs by itself, computed at its own length.
        encoder_padding: Silence that an encoder gets behind a clip even if it is alone (`model.pad_audio`).
        batch_padding: From there to the longest clip of the micro-batch.
        tokens: The language model, at each row's own length.
        row_padding: From there to the longest row of the micro-batch.
        idle: Entries that lost all their samples, and the silent clip that text alone is trained with.
    """

    clips: float = 0.0
    encoder_padding: float = 0.0
    batch_padding: float = 0.0
    tokens: float = 0.0
    row_padding: float = 0.0
    idle: float = 0.0

    @property
    def executed(self) -> float:
        """All of it."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def useful_share(self) -> float:
        """Share that is left if every clip and every row were alone in its micro-batch; 1 if there is no work."""
        lost = self.batch_padding + self.row_padding + self.idle
        return 1.0 - lost / self.executed if self.executed else 1.0

    def __add__(self, other: Work) -> Work:
        """Add cause by cause."""
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class TrainingWork:
    """What a model's training step executes for micro-batches of given lengths.

    A forward pass counts once, the gradients of activations and of weights once each (arXiv 2001.08361, section 2.1),
    recomputed activations once more. Pool members count with the share of clips that undecided routers send them.
    """

    def __init__(self, model: MoweForConditionalGeneration, *, max_s: float, recomputed: Sequence[str] = ()):
        """Count `model`, which is on the meta device, for clips of up to `max_s` seconds.

        Args:
            recomputed: Parts whose activations are recomputed in the backward pass, of `model.gradient_checkpointing`.

        Raises:
            ValueError: An encoder takes no clips of `max_s`.
        """
        lengths = np.arange(round(max_s * SAMPLE_RATE) // _STEP + 2) * _STEP
        lengths[-1] = round(max_s * SAMPLE_RATE)  # the last is between two, and may be a limit of an encoder
        counted = [part_gflops(model, s, round(s * _TOKENS_PER_S)) for s in (CLIP_S / 2, CLIP_S)]
        self._alone, self._bare = np.zeros(len(lengths)), np.zeros(len(lengths))
        share, pad_audio = expected_share(model.config), cast(PadAudio, model.config.pad_audio)
        for name, passes, encoder in _parts(model, recomputed):
            if name not in counted[0]:
                continue
            half, whole = (passes * part[name].expected(share) for part in counted)
            curve = _through_zero(half, whole)
            bare = curve(lengths / SAMPLE_RATE)
            self._bare += bare
            padded = [encoder.pad_samples(n, pad_audio) for n in lengths.tolist()] if encoder else lengths
            self._alone += curve(np.asarray(padded) / SAMPLE_RATE)
        decoder = _passes(model.language_model, reached=True, recomputed="language_model" in recomputed)
        half, whole = (decoder * part["language_model"].always for part in counted)
        self._row = _through_zero(half, whole, at=_TOKENS_PER_S)
        self._tokens = np.asarray([audio_tokens(model, n / SAMPLE_RATE) for n in lengths.tolist()])

    def micro_batch(self, seconds: Numbers, tokens: Numbers) -> Work:
        """Return the work of one micro-batch.

        Args:
            seconds: (C,) length of each clip.
            tokens: (R,) length of each row of the language model; none for an entry that lost its samples.
        """
        rows = self._row(np.asarray(tokens, np.float64))
        longest = float(rows.max()) * len(rows) if len(rows) else 0.0
        row = Work(tokens=float(rows.sum()), row_padding=longest - float(rows.sum()))
        if not len(seconds):
            return row + Work(idle=float(self._alone[1]))
        at = self._at(seconds)
        bare, alone = float(self._bare[at].sum()), float(self._alone[at].sum())
        executed = float(self._alone[at.max()]) * len(at)
        return row + Work(clips=bare, encoder_padding=alone - bare, batch_padding=executed - alone)

    def planned(
        self, steps: Iterable[Sequence[Rows]], durations: npt.NDArray[np.floating], world_size: int
    ) -> tuple[Work, float]:
        """Return the work of planned steps, and how evenly it lies on the ranks.

        Of the language model's rows only the audio is known before texts are read, so text is left out.

        Args:
            steps: Rows of each micro-batch, by step.
            durations: (N,) seconds of every sample; 0 for text.
            world_size: Ranks; rank r takes the micro-batches r, r + world_size, ...

        Returns:
            The work, and the mean over ranks divided by the largest of a step, averaged over steps by their work: all
            ranks wait for the last one.
        """
        total, longest = Work(), 0.0
        for step in steps:
            ranks = [0.0] * world_size
            for lane, rows in enumerate(step):
                seconds = durations[rows]
                seconds = seconds[seconds > 0]
                work = self.micro_batch(seconds, self._tokens[self._at(seconds)])
                ranks[lane % world_size] += work.executed
                total += work
            longest += max(ranks) * world_size
        return total, total.executed / longest if longest else 1.0

    def _at(self, seconds: Numbers) -> npt.NDArray[np.int64]:
        """Return the places (C,) of lengths in the tables, rounded up."""
        places = np.ceil(np.round(np.asarray(seconds, np.float64) * SAMPLE_RATE) / _STEP).astype(np.int64)
        return np.minimum(places, len(self._alone) - 1)


_TOKENS_PER_S = 6.4  # only gives the two lengths, 96 and 192, at which the language model is counted


@dataclass(frozen=True)
class _Quadratic:
    """A quadratic function without constant: attention grows with the square of a length, all else with the length."""

    linear: float
    quadratic: float

    def __call__(self, length: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        return self.linear * length + self.quadratic * length**2


def _through_zero(half: float, whole: float, at: float = 1.0) -> _Quadratic:
    """Return the curve with these values at `CLIP_S` / 2 and at `CLIP_S`, each times `at`."""
    length = CLIP_S * at
    return _Quadratic((4 * half - whole) / length, (2 * whole - 4 * half) / length**2)


def _parts(
    model: MoweForConditionalGeneration, recomputed: Sequence[str]
) -> list[tuple[str, float, AudioEncoder | None]]:
    """Return name, passes in a training step, and encoder of all parts that see audio."""
    tower, specs = model.audio_tower, model.config.weak_encoders or []
    base, *pool = tower.encoders()
    named = [("base_encoder", "base_encoder", base)]
    named += [(f"weak_encoders.{spec.name}", "weak_encoders", member) for spec, member in zip(specs, pool, strict=True)]
    encoders = [
        (name, _passes(encoder, reached=not encoder.frozen, recomputed=part in recomputed), encoder)
        for name, part, encoder in named
    ]
    return [*encoders, *((name, 3.0, None) for name in ("routers", "projections", "adapter"))]


def _passes(module: nn.Module, *, reached: bool, recomputed: bool) -> float:
    """Return the work of a training step in forward passes of a module; no gradient has to reach a frozen encoder."""
    if not reached:
        return 1.0
    tables = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    weights = [p for p in module.parameters() if id(p) not in tables]  # to look up a row is no work
    trained = sum(p.numel() for p in weights if p.requires_grad) / sum(p.numel() for p in weights)
    return 2.0 + trained + recomputed
