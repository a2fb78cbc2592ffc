"""Runs: neighbouring samples of a shard that are read at once, and what a plan has to know of them.

A plan of an epoch handles runs, of which there are few, and looks at single samples only where it forms micro-batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

# Long enough that a request to object storage (30 ms) takes less time than its bytes, and serves dozens of clips.
RUN_BYTES = 8_000_000
# Of samples whose bytes are not known: FLAC of speech at 16 kHz.
_BYTES_PER_S = 24_000
# Upper bounds of length classes: clips of a micro-batch differ by less than one, so little is padded.
_EDGES_MS = np.array([*range(2500, 40_001, 2500), *(round(40_000 * 1.125**n) for n in range(1, 80))], np.int64)
_BLOCK = 1 << 20  # rows that are looked at at once


@dataclass(frozen=True)
class Runs:
    """Runs of neighbouring samples, in the order of the samples.

    R runs.

    Attributes:
        starts: (R + 1,) number of the first sample of each, and at the end of all samples.
        sources: (R,) source number of each, growing.
    """

    starts: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int32]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(R,) samples of each run."""
        return np.diff(self.starts)

    def sizes(self, num_sources: int) -> list[int]:
        """Return how many samples each source has."""
        counts = np.zeros(num_sources, np.int64)
        np.add.at(counts, self.sources, self.lengths)
        return counts.tolist()

    def cut(self, length: int) -> "Runs":
        """Return runs of at most so many samples each, the parts of a run of like size."""
        parts = -(-self.lengths // length)
        run = np.repeat(np.arange(len(parts)), parts)
        part = np.arange(len(run)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = self.starts[:-1][run] + self.lengths[run] * part // parts[run]
        return Runs(np.append(starts, self.starts[-1:]), self.sources[run])


def runs_of(
    shard_of_sample: npt.NDArray[np.integer],
    source_of_sample: npt.NDArray[np.integer],
    bytes_of_sample: npt.NDArray[np.integer] | None = None,
    durations: npt.NDArray[np.floating] | None = None,
) -> Runs:
    """Cut shards into runs of about `RUN_BYTES`.

    Args:
        shard_of_sample: (N,) shard numbers; the samples of a shard are neighbours, and so are the shards of a source.
        source_of_sample: (N,) source numbers.
        bytes_of_sample: (N,) bytes in the shard, 0 if unknown; None leaves shards whole.
        durations: (N,) seconds, for samples of unknown bytes.
    """
    if not len(shard_of_sample):
        return Runs(np.zeros(1, np.int64), np.zeros(0, np.int32))
    first = np.ones(len(shard_of_sample), bool)
    first[1:] = (shard_of_sample[1:] != shard_of_sample[:-1]) | (source_of_sample[1:] != source_of_sample[:-1])
    shards = np.append(np.flatnonzero(first), len(first))
    if bytes_of_sample is not None and durations is not None:
        # Blocks of whole shards: sums of all samples at once would take as much memory as the index.
        for low, high in _blocks(shards):
            rows = slice(shards[low], shards[high])
            size = np.where(bytes_of_sample[rows] > 0, bytes_of_sample[rows], durations[rows] * _BYTES_PER_S)
            # Where each begins within its shard.
            at = np.cumsum(size.astype(np.int64)) - size.astype(np.int64)
            starts = shards[low : high + 1] - shards[low]
            at = (at - np.repeat(at[starts[:-1]], np.diff(starts))) // RUN_BYTES
            first[rows][1:] |= at[1:] != at[:-1]
    starts = np.flatnonzero(first)
    return Runs(np.append(starts, len(first)), source_of_sample[starts].astype(np.int32))


@dataclass(frozen=True)
class LengthClasses:
    """Classes of like length, of which micro-batches are formed.

    Attributes:
        classes: the classes that occur, from short to long: B of them.
        most: (B,) how many samples of a class a micro-batch may hold.
        edges_ms: lengths where one class ends and the next begins; none where all lengths are one class.
    """

    classes: npt.NDArray[np.uint8]
    most: list[int]
    edges_ms: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, durations: npt.NDArray[np.floating], batch_seconds: float, max_batch_size: int, *, grouped: bool = True
    ) -> "LengthClasses":
        """Find the classes of (N,) durations, and how many of each fit into a micro-batch with all padding."""
        edges = _EDGES_MS if grouped else _EDGES_MS[:0]
        longest = np.full(len(edges) + 1, -1, np.int64)
        for start in range(0, len(durations), _BLOCK):
            lengths = _milliseconds(durations[start : start + _BLOCK])
            np.maximum.at(longest, np.searchsorted(edges, lengths), lengths)
        classes = np.flatnonzero(longest >= 0)
        most = [
            max(1, min(max_batch_size, int(1000 * batch_seconds) // max(1, top))) for top in longest[classes].tolist()
        ]
        return cls(classes.astype(np.uint8), most, edges)

    def numbers(self, durations: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        """Return the number of the class of each sample, 0 to B - 1."""
        found = np.searchsorted(self.edges_ms, _milliseconds(durations))
        return np.searchsorted(self.classes, found).astype(np.uint8)

    def histograms(
        self,
        durations: npt.NDArray[np.floating],
        starts: npt.NDArray[np.int64],
        member: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Return (R, B) how many samples of each class the R runs between (R + 1,) `starts` have.

        Args:
            member: (starts[-1] - starts[0],) which samples count; None counts all.
        """
        found = np.zeros((len(starts) - 1, len(self.most)), np.int32)
        for low, high in _blocks(starts):
            rows = slice(starts[low], starts[high])
            run = np.repeat(np.arange(high - low), np.diff(starts[low : high + 1]))
            cell = run * len(self.most) + self.numbers(durations[rows])
            if member is not None:
                cell = cell[member[rows.start - starts[0] : rows.stop - starts[0]]]
            counts = np.bincount(cell, minlength=(high - low) * len(self.most))
            found[low:high] = counts.reshape(high - low, -1)
        return found

    def micro_batches(self, histogram: Sequence[int], at_least: int = 0) -> list[int]:
        """Return the sizes of the micro-batches of samples that are sorted by length.

        Each is full; what is left of a class goes to the next, and only the last may stay small.

        Args:
            histogram: B samples of each class.
            at_least: split the largest ones until there are so many; they may become empty.
        """
        sizes: list[int] = []
        left = 0
        for count, most in zip(histogram, self.most, strict=True):
            if count:
                full, left = divmod(left + count, most)
                sizes += [most] * full
        if left:
            sizes.append(left)
        while len(sizes) < at_least:
            largest = max(range(len(sizes)), key=sizes.__getitem__, default=-1)
            if largest < 0 or sizes[largest] < 2:
                return sizes + [0] * (at_least - len(sizes))
            half = sizes[largest] // 2
            sizes[largest : largest + 1] = [sizes[largest] - half, half]
        return sizes


def _blocks(starts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield which runs to look at together: sums over all samples at once would take more memory than the index."""
    places = np.searchsorted(starts, np.arange(starts[0], starts[-1] + _BLOCK, _BLOCK)).clip(max=len(starts) - 1)
    return pairwise(np.unique(places).tolist())


def _milliseconds(durations: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Return lengths as whole numbers, so that all machines find the same sums; rounded up from 10 us on."""
    # Less is the rounding of 32-bit seconds.
    return np.ceil(durations.astype(np.float64) * 1000 - 0.01).clip(min=0).astype(np.int64)
