"""The `data` section: sources, limits and batches."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from mowe_ray.config.fields import Location, Name, Probability, Section, Texts, refuse, repeated_names, text_or_list

BUILTIN_SOURCES = ("builtin:train", "builtin:validation")


def _known_path(path: str) -> str:
    if not path or (path.startswith("builtin:") and path not in BUILTIN_SOURCES):
        allowed = " or ".join(BUILTIN_SOURCES)
        raise ValueError(f"must be a path, a URL, {allowed}, got {path!r}")
    return path


def _all_known(paths: list[str]) -> list[str]:
    if not paths:
        raise ValueError("must not be an empty list")
    return [_known_path(path) for path in paths]


# Tags are in angle brackets so that error messages can leave them out of the dotted key.
SourcePath = Annotated[
    Annotated[Location, AfterValidator(_known_path), Tag("<text>")]
    | Annotated[list[Location], AfterValidator(_all_known), Tag("<list>")],
    Discriminator(text_or_list),
]


def _whole_or_share(limit: float) -> float:
    if limit >= 1 and not float(limit).is_integer():
        raise ValueError(f"must be a whole number of samples, or a share below 1, got {limit:g}")
    return limit


Limit = Annotated[float, Field(gt=0), AfterValidator(_whole_or_share)]
Columns = dict[
    Literal[
        "id", "audio", "instruction", "answer", "references", "choices", "task", "duration", "offset", "end",
        "messages", "system", "history",
    ],
    str,
]  # fmt: skip


def _place(place: str) -> str:
    if not place.startswith("/") and "://" not in place and not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*", place):
        raise ValueError(f"must be a folder (/data), a URL (s3://bucket/clips) or a host (example.org), got {place!r}")
    return place


Place = Annotated[Location, AfterValidator(_place)]


class SourceSection(Section):
    """One source of samples."""

    path: SourcePath
    """Folder, file, URL, pattern ({000..127}.tar, *.parquet), or list of these; builtin:NAME is the built-in corpus."""
    task: str | None = None
    """Task of samples that name none (asr, er, ac, aqa, sqa or your own)."""
    instruction: Texts | None = None
    """Asked about samples that ask nothing; of a list, one is drawn for each sample, by the seed."""
    columns: Columns = {}
    """Unusual names of fields in the rows: {audio: file, answer: words}; a.b is b within a, clips/{a}.wav a text."""
    labels: list[str] | None = None
    """Closed list of answers; answers that are whole numbers are positions in it."""
    limit: Limit | None = None
    """The first so many samples or, below 1, a share of all that is drawn by the seed."""
    max_duration_s: PositiveFloat | None = None
    """Longer clips are skipped and counted, in seconds; null takes the limit of all sources."""
    text_only: bool = False
    """Accept a source in which no sample has audio."""

    @property
    def paths(self) -> list[str]:
        """All paths, in order."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def place(self) -> str:
        """The path, or the first of several, for messages."""
        first, *more = self.paths
        return f"{first} and {len(more)} more" if more else first

    @property
    def instructions(self) -> tuple[str, ...]:
        """All instructions that may be drawn."""
        given = self.instruction
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)


class TrainingSource(SourceSection):
    """One source of training samples."""

    weight: PositiveFloat = 1.0
    """Passes over the source per epoch; 0.5 takes half of it, 2 takes it twice."""
    train_on: Literal["all", "last"] = "all"
    """Turns of the assistant that are learned."""


class ValidationSource(SourceSection):
    """One source of validation samples."""

    name: Name | None = None
    """Name in metrics, unique among validation sources; null makes it of the path."""
    metrics: list[str] | None = None
    """Names of its metrics, the main one first; null takes those of each sample's task."""
    language: str | None = None
    """Language of transcripts (en, de, hi, ...), for WER and CER; null takes it from their letters."""


# Names of folders and files that do not tell a corpus from another.
_PLAIN = re.compile(
    r"(?:validation|valid|val|dev|test|eval|train|data|shards|metadata|manifest|cuts|shards?[-_].*|\d+|\W+|\*.*|\{.*)"
)


def _name_of(path: str) -> str:
    """Return a name for a source: the last part of its path that says something, such as `calls` of `calls/val`."""
    parts = [part.partition(".")[0] for part in path.replace(":", "/").split("/") if part]
    telling = [part for part in parts if not _PLAIN.fullmatch(part)]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", (telling or parts or ["validation"])[-1]).strip("-_")
    return name or "validation"


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

    @property
    def validation_names(self) -> list[str]:
        """Name of each validation source in metrics: its own, or one made of its path."""
        names: list[str] = []
        for source in self.validation:
            name = source.name or _name_of(source.paths[0])
            same = sum(re.sub(r"-\d+$", "", other) == name for other in names) if source.name is None else 0
            names.append(f"{name}-{same + 1}" if same else name)
        return names

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        repeated = repeated_names(self.validation_names)
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
    """Samples that a lane (a micro-batch of each step) mixes at a time: fewer are read more in order."""
    group_by_length: bool = True
    """Form micro-batches of clips of like length, so of like tasks; false mixes them, for more padding."""
    lookahead_gb: PositiveFloat = 1.0
    """Decoded audio and features that are held ahead of training, at most, in GB per worker."""
    feature_cache: Location | None = None
    """Folder on all nodes, or URL, with decoded audio and features of frozen encoders, reused by later runs."""

    @model_validator(mode="after")
    def _trains(self) -> Self:
        refuse(
            f"data.batch_seconds: {self.batch_seconds:g} cannot hold one clip of "
            f"data.max_duration_s ({self.max_duration_s:g})"
            if self.batch_seconds < self.max_duration_s
            else None,
        )
        return self
