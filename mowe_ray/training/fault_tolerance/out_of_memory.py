"""Micro-batches that did not fit into memory: recorded, then tried in halves, then left out.

A rank cannot simply retry: under ZeRO-2 and 3 the others wait in the middle of a collective. So it records the
micro-batch and fails; all ranks restart from the last checkpoint, read the records, and change the plan alike.
"""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from mowe_ray.data.epoch_plan import Rows
from mowe_ray.data.index import Index
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.collate import Batch

FOLDER = "out_of_memory"
# Messages of allocators that raise a plain RuntimeError: torch's for the CPU, C++'s own, CUDA's, cuBLAS's.
_MESSAGES = ("can't allocate memory", "bad_alloc", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# The whole message of oneDNN when there is no room for a kernel or its scratch pad; a kernel it does not have fails
# earlier, with "could not create a primitive descriptor".
_ONEDNN_MESSAGES = ("could not create a primitive", "could not create a memory object")


class MicroBatchOutOfMemory(RuntimeError):  # noqa: N818 - it names what ran out of memory
    """A micro-batch did not fit; carries what `record` needs."""

    def __init__(self, step: int, slot: int, batch: Batch):
        """Name the optimizer step (counted from 1) and the micro-batch's number in the global batch."""
        super().__init__(f"out of memory at step {step} on {_size(len(batch.ids), batch.audio_s)}")
        self.step, self.slot, self.ids, self.audio_s = step, slot, batch.ids, batch.audio_s


@contextmanager
def annotate_out_of_memory(step: int, slot: int, batch: Batch) -> Iterator[None]:
    """Turn running out of memory in the body into `MicroBatchOutOfMemory`; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MicroBatchOutOfMemory(step, slot, batch) from error


def release(error: MicroBatchOutOfMemory) -> None:
    """Free what the failed micro-batch still holds: the frames of its traceback keep all activations alive."""
    for exception in (error, error.__cause__):
        if exception is not None:
            traceback.clear_frames(exception.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of host or device memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    known = message in _ONEDNN_MESSAGES or any(part in message for part in _MESSAGES)
    return isinstance(error, RuntimeError) and known


@dataclass(frozen=True)
class Event:
    """Record of a micro-batch that did not fit; its fields are the keys of the file.

    Attributes:
        step: Optimizer step, counted from 1.
        lane: Number of the micro-batch in the global batch; rank: the rank that failed.
        rows: Its rows of the training index, which identify it.
        ids: Its samples; `audio_s` their seconds of audio.
    """

    step: int
    lane: int
    rank: int
    rows: list[int]
    ids: list[str]
    audio_s: float

    def is_about(self, index: Index) -> bool:
        """Whether its rows are these samples in `index`."""
        if max(self.rows, default=-1) >= len(index):
            return False
        # Unusable samples are among the rows alone.
        return set(self.ids) <= set(index.take(self.rows)["id"].to_pylist())


def record(folder: RunFolder, error: MicroBatchOutOfMemory, *, rank: int, rows: Rows) -> Event:
    """Record that the micro-batch `rows` did not fit, in a file of its own; returns the record.

    No two ranks share a micro-batch, so none overwrites what another writes.
    """
    event = Event(error.step, error.slot, rank, rows.tolist(), error.ids, error.audio_s)
    stem, number = f"{FOLDER}/step-{event.step}-lane-{event.lane}", 1
    # The same micro-batch may fail again after a restart; both records count.
    while folder.exists(file := f"{stem}{'' if number == 1 else f'-{number}'}.json"):
        number += 1
    folder.write_json(file, asdict(event))
    return event


class OutOfMemoryRecords:
    """All micro-batches of a run that did not fit, and the changes of the plan that follow.

    One that is recorded once is tried in two halves. One that is recorded twice, itself or one of its halves, is left
    out, and so is a single sample.
    """

    def __init__(self, events: Sequence[Event]):
        self.events = list(events)
        self._times = Counter(tuple(event.rows) for event in events if event.rows)

    @classmethod
    def load(cls, folder: RunFolder, index: Index | None = None) -> OutOfMemoryRecords:
        """Read the records of all ranks of this run.

        Args:
            index: Training samples; records whose rows are others now, since shards have changed, are passed over.
        """
        found = [folder.read_json(f"{FOLDER}/{name}") for name in folder.names(FOLDER) if name.endswith(".json")]
        events = [Event(**fields) for fields in found]
        kept = [event for event in events if index is None or event.is_about(index)]
        return cls(sorted(kept, key=lambda event: (event.step, event.lane)))

    def apply(self, micro_batches: Sequence[Rows]) -> Sequence[Rows]:
        """Return the micro-batches of a step as they are to be tried now.

        Micro-batches keep their places, what is left out becomes an empty one, second halves come after the last.

        Args:
            micro_batches: The planned ones of the global batch.
        """
        if not self._times:
            return micro_batches  # without looking at those of other ranks
        tried, second_halves = [], []
        for rows in micro_batches:
            first, second = _halves(rows)
            if self._left_out(rows):
                # Empty rather than removed: ranks and seeds of the others depend on their places.
                first = rows[:0]
            elif self._times[tuple(rows.tolist())]:
                second_halves.append(second)
            else:
                first = rows
            tried.append(first)
        return tried + second_halves

    def line(self, event: Event) -> str:
        """Return the line for the user about `event`, which comes after these records."""
        what = f"out of memory at step {event.step} on {_size(len(event.rows), event.audio_s)} (rank {event.rank})"
        after = OutOfMemoryRecords([*self.events, event])
        complete = after._complete_micro_batch(event)
        if not after._left_out(complete):
            return (
                f"{what}: trying it in two halves after a restart; "
                "if this repeats, lower data.batch_seconds or run --find-batch"
            )
        other_half = " with its other half" if len(complete) > len(event.rows) else ""
        return (
            f"{what}: it is left out{other_half} after a restart, data_report.json will name its samples; "
            "lower data.batch_seconds or run --find-batch"
        )

    def warning(self) -> str | None:
        """Return the line for the user about what these records change in a run that starts now."""
        split, left_out = (len(ids) for ids in self.report().values())
        if not self.events:
            return None
        return (
            f"memory did not suffice before: {split} samples are tried in smaller micro-batches, {left_out} left out "
            "(data_report.json names them); lower data.batch_seconds or run --find-batch"
        )

    def report(self) -> dict[str, list[str]]:
        """Return the ids of the samples that are tried in halves (`split`), and of those that are left out."""
        split: dict[str, None] = {}
        left_out: dict[str, None] = {}
        for event in self.events:
            ids = dict.fromkeys(event.ids)
            if self._left_out(self._complete_micro_batch(event)):
                left_out |= ids
            else:
                split |= ids
        return {"split": list(split), "left_out": list(left_out)}

    def _left_out(self, rows: Rows) -> bool:
        pieces = (rows, *_halves(rows)) if len(rows) > 1 else (rows,)
        times = [self._times[tuple(piece.tolist())] for piece in pieces]
        return bool(times[0]) and (len(rows) == 1 or sum(times) > 1)

    def _complete_micro_batch(self, event: Event) -> Rows:
        """Return the micro-batch that `event` is a half of, or its own rows."""
        for other in self.events:
            if len(other.rows) > 1 and any(
                half.tolist() == event.rows for half in _halves(np.asarray(other.rows, np.int64))
            ):
                return np.asarray(other.rows, np.int64)
        return np.asarray(event.rows, np.int64)


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    middle = (len(rows) + 1) // 2
    return rows[:middle], rows[middle:]


def _size(samples: int, audio_s: float) -> str:
    return f"{samples} clip{'' if samples == 1 else 's'}, {audio_s:.0f} s"
