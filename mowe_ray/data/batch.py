"""Decoded micro-batches and the flat form in which they travel."""

import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.decode import SAMPLE_RATE, decode_audio, to_int16
from mowe_ray.data.sample import BadAudio, BadSample
from mowe_ray.data.shards import read_samples


@dataclass(frozen=True)
class MicroBatch:
    """Decoded samples that go through the model together.

    R rows; S samples of audio of all rows together, at 16 kHz.

    Attributes:
        audio: (S,) int16, the clips one after the other.
        lengths: R numbers of samples, summing to S; 0 for a text-only row.
        scales: R factors from int16 to float in -1..1.
        ids: R strings, like `instructions`, `answers`, `tasks` and `sources`.
        bad: samples of the plan that could not be read or decoded; they are in no other field.
    """

    audio: npt.NDArray[np.int16]
    lengths: list[int]
    scales: list[float]
    ids: list[str]
    instructions: list[str]
    answers: list[str]
    tasks: list[str]
    sources: list[str]
    bad: list[BadSample]

    def to_row(self) -> pa.Table:
        """Return a table of one row that shares the memory of `audio`."""
        offsets = pa.array([0, self.audio.nbytes], pa.int64()).buffers()[1]
        audio = pa.Array.from_buffers(
            pa.large_binary(), 1, [None, offsets, pa.py_buffer(np.ascontiguousarray(self.audio))]
        )
        fields = {name: value for name, value in vars(self).items() if name not in ("audio", "bad")}
        fields["bad"] = [asdict(bad) for bad in self.bad]
        return pa.table({"audio": audio, "fields": [json.dumps(fields)]})

    @classmethod
    def from_row(cls, table: pa.Table, row: int = 0) -> "MicroBatch":
        """Rebuild the micro-batch of a row; its audio is a read-only view of the table."""
        fields = json.loads(table["fields"][row].as_py())
        fields["bad"] = [BadSample(**bad) for bad in fields["bad"]]
        column = table["audio"].slice(row, 1).chunk(0)  # a scalar of it would be a copy
        _, offsets, content = column.buffers()
        start, end = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2].tolist()
        audio = np.frombuffer(content, np.int16)[start // 2 : end // 2] if end else np.zeros(0, np.int16)
        return cls(audio=audio, **fields)


def load_micro_batch(rows: pa.Table, min_s: float, max_s: float) -> MicroBatch:
    """Read, decode and pack the samples of index rows; unusable ones end up in `bad`.

    Args:
        rows: rows of `Index.table`.
        min_s: shorter clips are bad.
        max_s: longer clips are bad.
    """
    batch = MicroBatch(_room(rows), [], [], [], [], [], [], [], [])
    audio, end = batch.audio, 0
    for sample in read_samples(rows):
        if isinstance(sample, BadSample):
            batch.bad.append(sample)
            continue
        wave, scale = np.zeros(0, np.float32), 1.0
        if sample.audio is not None:
            try:
                wave = decode_audio(sample.audio, sample.duration_s, min_s, max_s, sample.offset_s)
            except BadAudio as error:
                bad = BadSample(sample.id, sample.source, error.cause, error.detail)
                batch.bad.append(bad)
                continue
            start, end = end, end + len(wave)
            if end > len(audio):  # longer than its header said
                audio = np.concatenate([audio[:start], np.empty(end, np.int16)])
            _, scale = to_int16(wave, out=audio[start:end])
        batch.lengths.append(len(wave))
        batch.scales.append(scale)
        batch.ids.append(sample.id)
        batch.instructions.append(sample.instruction)
        batch.answers.append(sample.answer)
        batch.tasks.append(sample.task)
        batch.sources.append(sample.source)
    return replace(batch, audio=audio[:end])


def _room(rows: pa.Table) -> npt.NDArray[np.int16]:
    """Space for all clips, out of Arrow's pool: it reuses memory that is mapped already."""
    seconds = float(pc.sum(rows["duration_s"]).as_py() or 0.0)
    samples = int(SAMPLE_RATE * (1.02 * seconds + 0.1 * len(rows)))
    return np.frombuffer(pa.allocate_buffer(2 * samples), np.int16)
