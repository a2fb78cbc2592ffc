"""The `data` section: sources, limits and batches."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mowe_ray.config.fields import Location, Name, Probability, Section, refuse, repeated_names

BUILTIN_SOURCES = ("builtin:train", "builtin:validation")


def _known_path(path: str) -> str:
    if not path or (path.startswith("builtin:") and path not in BUILTIN_SOURCES):
        allowed = " or ".join(BUILTIN_SOURCES)
        raise ValueError(f"must be a path, a URL, {allowed}, got {path!r}")
    return path


SourcePath = Annotated[Location, AfterValidator(_known_path)]


def _place(place: str) -> str:
    if not place.startswith("/") and "://" not in place and not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*", place):
        raise ValueError(f"must be a folder (/data), a URL (s3://bucket/clips) or a host (example.org), got {place!r}")
    return place


Place = Annotated[Location, AfterValidator(_place)]


class TrainingSource(Section):
    """One source of training samples."""

    path: SourcePath
    """Folder of shards, single shard, manifest or URL; builtin:train is the built-in corpus."""
    weight: PositiveFloat = 1.0
    """Passes over the source per epoch; 0.5 takes half of it, 2 takes it twice."""
    task: str | None = None
    """Task of samples that name none (asr, er, ac, aqa, sqa or your own)."""
    text_only: bool = False
    """Accept a source in which no sample has audio."""


class ValidationSource(Section):
    """One source of validation samples."""

    path: SourcePath
    """Folder of shards, single shard, manifest or URL; builtin:validation is built in."""
    name: Name = "validation"
    """Name in metrics, unique among validation sources."""
    task: str | None = None
    """Task of samples that name none."""
    text_only: bool = False
    """Accept a source in which no sample has audio."""
    metrics: list[str] | None = None
    """Names of its metrics, the main one first; null takes those of each sample's task."""
    labels: list[str] | None = None
    """Closed list of answers, for metrics that need one; null takes the answers of its samples."""
    language: str | None = None
    """Language of transcripts (en, de, hi, ...), for WER and CER; null takes it from their letters."""


class EvaluatedData(Section):
    """Validation sources, limits of clips, and micro-batches."""

    validation: list[ValidationSource] = []
    """Sources that are scored, each under its own name."""
    min_duration_s: PositiveFloat = 0.1
    """Shorter clips are skipped and counted, in seconds."""
    max_duration_s: PositiveFloat = 30.0
    """Longer clips are skipped and counted, in seconds."""
    batch_seconds: PositiveFloat = 120.0
    """Audio per micro-batch and worker, padding included, in seconds."""
    max_batch_size: PositiveInt = 32
    """Largest number of samples in a micro-batch."""
    allow_paths: list[Place] = []
    """What rows may name outside of their shard's folder: folders, URLs, hosts; a local manifest any local file."""
    max_text_tokens: PositiveInt | None = None
    """Samples with longer text are skipped and counted, in tokens; null: what audio leaves of the model's positions."""
    max_bad_fraction: Probability = 0.05
    """Largest share of unusable samples; above it the run stops."""
    decode_cpus: PositiveInt = 1
    """CPUs that read and decode audio, per worker."""
    storage_timeout_s: NonNegativeFloat = 300.0
    """How long a read from object storage that fails is tried again before it fails the run, in seconds."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        repeated = repeated_names([source.name for source in self.validation])
        refuse(
            f"data.validation: names must be unique, repeated: {', '.join(repeated)}" if repeated else None,
            f"data.min_duration_s: {self.min_duration_s:g} must be below data.max_duration_s ({self.max_duration_s:g})"
            if self.min_duration_s >= self.max_duration_s
            else None,
        )
        return self


class DataSection(EvaluatedData):
    """Training and validation data, limits of clips, and micro-batches."""

    train: list[TrainingSource] = []
    """Sources that are mixed for training."""
    shuffle_buffer: PositiveInt = 10_000
    """Samples mixed at a time: larger mixes tasks better, smaller reads shards in order."""
    feature_cache: Location | None = None
    """Folder on all nodes with decoded audio and features of frozen encoders, reused by later runs."""

    @model_validator(mode="after")
    def _trains(self) -> Self:
        refuse(
            f"data.batch_seconds: {self.batch_seconds:g} cannot hold one clip of "
            f"data.max_duration_s ({self.max_duration_s:g})"
            if self.batch_seconds < self.max_duration_s
            else None,
            f"data.feature_cache: {self.feature_cache!r} must be a folder that is mounted on all nodes: "
            "its files are mapped into memory, which no URL can be"
            if self.feature_cache and "://" in self.feature_cache
            else None,
        )
        return self
