"""Decoded micro-batches and the flat form in which they travel."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.decode import SAMPLE_RATE, decode_audio, to_int16
from mowe_ray.data.sample import BadAudio, BadSample, Sample, Turn, bad_audio
from mowe_ray.data.shards import read_samples


@dataclass(frozen=True)
class Features:
    """Features of the clips of a micro-batch that one encoder has computed before.

    Attributes:
        encoder_index: index of the encoder in the model: 0 is the base encoder, then comes the pool.
        layers: L, how many of the encoder's layers there are.
        width: E.
        frames: of each clip, in row order; text-only rows have no entry.
        values: bfloat16 as uint16, the clips one after the other, each (L, its frames, E).
    """

    encoder_index: int
    layers: int
    width: int
    frames: list[int]
    values: npt.NDArray[np.uint16]

    def of(self, clips: Sequence[int]) -> "Features":
        """Return the features of these clips only."""
        ends = np.cumsum([0, *(self.layers * self.width * frames for frames in self.frames)])
        values = [self.values[:0], *(self.values[ends[clip] : ends[clip + 1]] for clip in clips)]
        return replace(self, frames=[self.frames[clip] for clip in clips], values=np.concatenate(values))


_ROW_FIELDS = ("ids", "instructions", "answers", "references", "tasks", "sources", "choices", "groups")


@dataclass(frozen=True)
class MicroBatch:
    """Decoded samples that go through the model together.

    R rows; C clips; S samples of audio of all clips together, at 16 kHz.

    Attributes:
        audio: (S,) int16, the clips one after the other.
        lengths: numbers of samples of each clip, row after row, summing to S; a row of text alone has one 0.
        scales: factors from int16 to float in -1..1, one for each length.
        ids: R strings, like `instructions`, `answers`, `tasks` and `sources`.
        references: R lists of the answers that count as right.
        choices: R lists of the choices of multiple-choice questions, or none at all.
        groups: R mappings of what samples are scored apart by, or none at all.
        bad: samples of the plan that could not be read or decoded; they are in no other field.
        features: of the encoders that need not run.
        counts: how many lengths each row has; empty where it is one each.
        histories: the turns before the instruction of each row; empty where no row has any.
        paths: what each row calls the file of its first clip; empty where no row has any.
    """

    audio: npt.NDArray[np.int16]
    lengths: list[int]
    scales: list[float]
    ids: list[str]
    instructions: list[str]
    answers: list[str]
    references: list[list[str]]
    tasks: list[str]
    sources: list[str]
    bad: list[BadSample]
    features: list[Features] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    histories: list[list[Turn]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    choices: list[list[str]] = field(default_factory=list)
    groups: list[dict[str, str]] = field(default_factory=list)

    def add_texts(self, sample: Sample) -> None:
        """Add the texts of a row, which are those of a sample."""
        self.ids.append(sample.id)
        self.instructions.append(sample.instruction)
        self.answers.append(sample.answer)
        self.tasks.append(sample.task)
        self.sources.append(sample.source)
        self.references.append(list(sample.references) or [sample.answer])
        self.choices.append(list(sample.choices))
        self.groups.append(dict(sample.groups))

    def scored_by(self, row: int) -> dict[str, Any]:
        """Return what the answer to a row is scored by: `references`, `choices` and `groups`."""
        names = ("references", "choices", "groups")
        return {name: getattr(self, name)[row] for name in names if getattr(self, name)}

    @property
    def row_lengths(self) -> list[list[int]]:
        """Numbers of samples of each row's clips; none for a row of text alone."""
        lengths = iter(self.lengths)
        return [[n for n in (next(lengths) for _ in range(count)) if n] for count in self._counts]

    @property
    def turns_before(self) -> list[list[Turn]]:
        """The turns before the instruction of each row."""
        return self.histories or [[] for _ in self.ids]

    @property
    def _counts(self) -> list[int]:
        return self.counts or [1] * len(self.ids)

    def clips(self) -> list[list[npt.NDArray[np.float32]]]:
        """Return each row's clips in -1..1; none for a row of text alone."""
        waves, start = [], 0
        for length, scale in zip(self.lengths, self.scales, strict=True):
            waves.append(self.audio[start : start + length].astype(np.float32) * np.float32(scale))
            start += length
        left = iter(waves)
        return [[wave for wave in (next(left) for _ in range(count)) if len(wave)] for count in self._counts]

    def without(self, causes: Mapping[int, BadAudio]) -> "MicroBatch":
        """Return the micro-batch without these rows, which are in `bad` with their causes."""
        rows = [row for row in range(len(self.ids)) if row not in causes]
        starts = np.cumsum([0, *self._counts])
        kept = [place for row in rows for place in range(starts[row], starts[row + 1])]
        ends = np.cumsum([0, *self.lengths])
        with_audio = [place for place, length in enumerate(self.lengths) if length]
        bad = [BadSample(self.ids[row], self.sources[row], error.cause, error.detail) for row, error in causes.items()]
        of_rows = [name for name in (*_ROW_FIELDS, "counts", "histories", "paths") if getattr(self, name)]
        return replace(
            self,
            audio=np.concatenate([self.audio[:0], *(self.audio[ends[place] : ends[place + 1]] for place in kept)]),
            bad=[*self.bad, *bad],
            features=[
                features.of([clip for clip, place in enumerate(with_audio) if place in set(kept)])
                for features in self.features
            ],
            **{name: [getattr(self, name)[place] for place in kept] for name in ("lengths", "scales")},
            **{name: [getattr(self, name)[row] for row in rows] for name in of_rows},
        )

    @classmethod
    def joined(cls, parts: Sequence["MicroBatch"]) -> "MicroBatch":
        """Return the rows of several micro-batches, none of which has features, as one."""
        names = (*_ROW_FIELDS, "lengths", "scales", "bad")
        lists = {name: [value for part in parts for value in getattr(part, name)] for name in names}
        if any(part.counts for part in parts):
            lists["counts"] = [count for part in parts for count in part._counts]
        if any(part.histories for part in parts):
            lists["histories"] = [history for part in parts for history in part.turns_before]
        if any(part.paths for part in parts):
            lists["paths"] = [path for part in parts for path in part.paths or [""] * len(part.ids)]
        return cls(audio=np.concatenate([np.zeros(0, np.int16), *(part.audio for part in parts)]), **lists)

    def usable_by(self, use: Callable[["MicroBatch"], object]) -> "MicroBatch":
        """Return the micro-batch without the rows for which `use` raises when it is given one alone.

        For the rare micro-batch for which it raised as a whole.
        """
        causes: dict[int, BadAudio] = {}
        for row in range(len(self.ids)):
            others = {other: BadAudio("crashed", "") for other in range(len(self.ids)) if other != row}
            try:
                use(self.without(others))
            except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
                causes[row] = bad_audio(error)
        return self.without(causes)

    def to_row(self) -> pa.Table:
        """Return a table of one row that shares the memory of `audio` and `features`."""
        fields = {name: value for name, value in vars(self).items() if name != "audio"}
        fields["bad"] = [asdict(bad) for bad in self.bad]
        fields["features"] = [
            {name: value for name, value in vars(features).items() if name != "values"} for features in self.features
        ]
        arrays = {"audio": self.audio} | {
            _column(features.encoder_index): features.values for features in self.features
        }
        cells = {name: _cell(array) for name, array in arrays.items()}
        return pa.table({**cells, "fields": [json.dumps(fields)]})

    @classmethod
    def from_row(cls, table: pa.Table, row: int = 0) -> "MicroBatch":
        """Rebuild the micro-batch of a row; its audio and features are read-only views of the table."""
        fields = json.loads(table["fields"][row].as_py())
        fields["bad"] = [BadSample(**bad) for bad in fields["bad"]]
        fields["histories"] = [[Turn(*turn) for turn in history] for history in fields["histories"]]
        fields["features"] = [
            Features(**values, values=read_cell(table[_column(values["encoder_index"])], row).view(np.uint16))
            for values in fields["features"]
        ]
        return cls(audio=read_cell(table["audio"], row).view(np.int16), **fields)


def _column(encoder_index: int) -> str:
    return f"features{encoder_index}"


def _cell(values: npt.NDArray[np.generic]) -> pa.Array:
    """Return a binary array of one cell, which shares the memory of `values`."""
    offsets = pa.array([0, values.nbytes], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(np.ascontiguousarray(values))])


def read_cell(column: pa.ChunkedArray, row: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of a row of a large binary column as a view, where a scalar of it would be a copy."""
    cell = column.slice(row, 1).chunk(0)
    _, offsets, content = cell.buffers()
    start, end = np.frombuffer(offsets, np.int64)[cell.offset : cell.offset + 2].tolist()
    return np.frombuffer(content, np.uint8)[start:end] if end > start else np.zeros(0, np.uint8)


def load_micro_batch(rows: pa.Table, min_s: float, max_s: float) -> MicroBatch:
    """Read, decode and pack the samples of index rows; unusable ones end up in `bad`.

    Args:
        rows: rows of `Index.table`.
        min_s: shorter clips are bad.
        max_s: longer clips are bad.
    """
    batch = MicroBatch(_room(rows), [], [], [], [], [], [], [], [], [])
    audio, end = batch.audio, 0
    counts: list[int] = []
    histories: list[list[Turn]] = []
    paths: list[str] = []
    for sample in read_samples(rows):
        if isinstance(sample, BadSample):
            batch.bad.append(sample)
            continue
        try:
            waves = [decode_audio(clip, sample.duration_s, min_s, max_s, sample.offset_s) for clip in sample.clips]
        except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
            cause = bad_audio(error)
            batch.bad.append(BadSample(sample.id, sample.source, cause.cause, cause.detail))
            continue
        for wave in waves or [np.zeros(0, np.float32)]:
            start, end = end, end + len(wave)
            if end > len(audio):  # longer than its header said
                audio = np.concatenate([audio[:start], np.empty(end, np.int16)])
            _, scale = to_int16(wave, out=audio[start:end])
            batch.lengths.append(len(wave))
            batch.scales.append(scale)
        counts.append(max(1, len(waves)))
        histories.append(list(sample.history))
        paths.append(sample.path)
        batch.add_texts(sample)
    return replace(
        batch,
        audio=audio[:end],
        counts=counts if any(count > 1 for count in counts) else [],
        histories=histories if any(histories) else [],
        paths=paths if any(paths) else [],
    )


def load_in_child(rows: pa.Table, min_s: float, max_s: float) -> MicroBatch:
    """As `load_micro_batch`, each sample in a child process: one that ends it is bad, with the cause `crashed`.

    For rows that have ended a process; it takes seconds.
    """
    parts = []
    with ChildProcess() as child:
        for number in range(len(rows)):
            row = rows.take([number])
            try:
                parts.append(child.call(load_micro_batch, row, min_s, max_s))
            except ChildDied as death:
                sample_id, source, shard = (row[name][0].as_py() for name in ("id", "source", "shard"))
                bad = BadSample(sample_id, source, "crashed", f"{shard}: {death}", file=shard)
                parts.append(replace(MicroBatch.joined([]), bad=[bad]))
    return MicroBatch.joined(parts)


def without_known(rows: pa.Table, known: Sequence[BadSample]) -> tuple[pa.Table, list[BadSample]]:
    """Return the rows that are not among the samples that are known to be bad, and those that are."""
    if not known:
        return rows, []
    by_name = {(bad.source, bad.id): bad for bad in known}
    found = [by_name.get(name) for name in zip(rows["source"].to_pylist(), rows["id"].to_pylist(), strict=True)]
    return rows.filter(pa.array([bad is None for bad in found], pa.bool_())), [bad for bad in found if bad]


def _room(rows: pa.Table) -> npt.NDArray[np.int16]:
    """Space for all clips, out of Arrow's pool: it reuses memory that is mapped already."""
    seconds = float(pc.sum(rows["duration_s"]).as_py() or 0.0)
    samples = int(SAMPLE_RATE * (1.02 * seconds + 0.1 * len(rows)))
    return np.frombuffer(pa.allocate_buffer(2 * samples), np.int16)
