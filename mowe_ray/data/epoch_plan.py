"""Which samples make up each micro-batch of an epoch: computed, not stored, from a seed.

The plan depends on the samples, the seed and the epoch, never on the number of workers: rank r of W
trains lanes r, r + W, ... of each step. A resumed run skips the steps it has done; when lanes, limits
or samples have changed, it plans what is left by passing `done`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

_BUCKET_S = 2.5  # clips of a micro-batch differ by less than this, so little is padded
_RUNS_PER_WINDOW = 64  # a shuffle window draws from this many places, so sorted corpora get mixed


def plan_epoch(
    durations: npt.NDArray[np.floating],
    shard_of_sample: npt.NDArray[np.integer],
    source_of_sample: npt.NDArray[np.integer],
    weights: Sequence[float],
    *,
    seed: int,
    epoch: int,
    lanes: int,
    batch_seconds: float,
    max_batch_size: int,
    shuffle_buffer: int,
    done: npt.NDArray[np.integer] | None = None,
) -> Iterator[list[Rows]]:
    """Yield the steps of an epoch; each is a list of `lanes` micro-batches of sample numbers.

    Every sample comes exactly as often as its source's weight says. A micro-batch holds at most
    `max_batch_size` clips and `batch_seconds` seconds including padding (one longer clip stays
    alone). The last two steps are filled by
    splitting; an entry is empty only when the whole epoch has too few samples.

    Args:
        durations: (N,) seconds; 0 for text-only samples.
        shard_of_sample: (N,) shard numbers, equal ones adjacent; neighbours are read together where
            possible.
        source_of_sample: (N,) indices into `weights`.
        weights: passes over each source per epoch; 2.5 is two passes and a half that moves on every
            epoch.
        seed: same seed, same plan.
        epoch: every epoch has its own order.
        lanes: micro-batches per optimiser step, over all workers.
        batch_seconds: limit of a micro-batch, number of clips times the longest.
        max_batch_size: limit of a micro-batch in clips.
        shuffle_buffer: samples mixed at a time.
        done: (N,) how often each sample was trained on in this epoch; the plan is what is left.
    """
    # One generator for the whole epoch: the order of the draws below is part of the plan, and so of a run's position.
    rng = np.random.default_rng([seed, epoch])
    done = np.zeros(len(durations), np.int32) if done is None else done
    run_length = max(1, shuffle_buffer // _RUNS_PER_WINDOW)
    streams = []
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(source_of_sample == source)
        passes = [
            _shuffle_runs(part, shard_of_sample, run_length, rng)
            for part in _passes(rows, weight, [seed, source], epoch, done)
        ]
        streams.append(np.concatenate(passes) if passes else rows[:0])
    order = _interleave(streams)
    batches = _batches(order, durations, batch_seconds, max_batch_size, shuffle_buffer, rng)
    return _steps(batches, lanes)


def count_samples(
    source_of_sample: npt.NDArray[np.integer],
    weights: Sequence[float],
    done: npt.NDArray[np.integer] | None = None,
) -> int:
    """Return how many samples `plan_epoch` with the same arguments plans, repeats counted."""
    done = np.zeros(len(source_of_sample), np.int32) if done is None else done
    total = 0
    for source, weight in enumerate(weights):
        times = done[source_of_sample == source]
        whole, part = _whole_and_part(weight, len(times))
        total += int(np.maximum(whole - times, 0).sum()) + max(0, part - int((times > whole).sum()))
    return total


def _whole_and_part(weight: float, size: int) -> tuple[int, int]:
    """Return the full passes over a source, and how many of its samples come once more."""
    return int(weight), round((weight - int(weight)) * size)


def _passes(rows: Rows, weight: float, seed: list[int], epoch: int, done: npt.NDArray[np.integer]) -> Iterator[Rows]:
    """Yield what is left of each pass; the last, a part of one, walks on through the source every epoch."""
    whole, part = _whole_and_part(weight, len(rows))
    times = done[rows]
    for number in range(whole):
        yield rows[times <= number]
    if part:
        order = np.random.default_rng(seed).permutation(len(rows))
        # The same permutation in all epochs, entered where the previous one ended: over 1 / fraction epochs every
        # sample comes equally often.
        window = order[(epoch * part + np.arange(part)) % len(rows)]
        # Who has had its extra turn keeps its place, even if the source has grown or shrunk since.
        left = window[times[window] <= whole][: max(0, part - int((times > whole).sum()))]
        yield rows[np.sort(left)]


def _shuffle_runs(rows: Rows, shards: npt.NDArray[np.integer], run_length: int, rng: np.random.Generator) -> Rows:
    """Cut each shard into runs of neighbours and permute the runs."""
    if not len(rows):
        return rows
    shard = shards[rows]
    starts = np.flatnonzero(np.concatenate([[True], shard[1:] != shard[:-1]]))
    lengths = np.diff(np.append(starts, len(rows)))
    # Position of each sample in its shard; a run begins at every multiple of `run_length`.
    within = np.arange(len(rows)) - np.repeat(starts, lengths)
    run = np.cumsum(within % run_length == 0) - 1
    place = rng.permutation(run[-1] + 1)
    return rows[np.argsort(place[run], kind="stable")]


def _interleave(streams: list[Rows]) -> Rows:
    """Merge streams in proportion to their lengths, so that all of them end together."""
    # Centred in its share of the epoch, so that a short stream is not drawn to either end.
    progress = [(np.arange(len(stream)) + 0.5) / len(stream) for stream in streams if len(stream)]
    if not progress:
        return np.zeros(0, np.int64)
    return np.concatenate(streams)[np.argsort(np.concatenate(progress), kind="stable")]


def _batches(
    order: Rows,
    durations: npt.NDArray[np.floating],
    batch_seconds: float,
    max_batch_size: int,
    shuffle_buffer: int,
    rng: np.random.Generator,
) -> Iterator[list[int]]:
    """Yield micro-batches as their length bucket fills up, and last what is left over."""
    pending: dict[int, list[int]] = {}
    longest: dict[int, float] = {}
    for start in range(0, len(order), shuffle_buffer):
        window = rng.permutation(order[start : start + shuffle_buffer])
        seconds = durations[window]
        # Clips of similar length share a micro-batch, which keeps padding small.
        buckets = (seconds / _BUCKET_S).astype(np.int64)
        for row, length, bucket in zip(window.tolist(), seconds.tolist(), buckets.tolist(), strict=True):
            batch = pending.setdefault(bucket, [])
            top = max(length, longest.get(bucket, 0.0))
            if batch and (len(batch) == max_batch_size or (len(batch) + 1) * top > batch_seconds):
                yield batch
                batch = pending[bucket] = []
                top = length
            batch.append(row)
            longest[bucket] = top
    rest = [row for bucket in sorted(pending) for row in pending[bucket]]
    rest.sort(key=lambda row: float(durations[row]))
    packed = _pack_sorted(rest, durations, batch_seconds, max_batch_size)
    # Shuffled, or the end of every epoch would go from short to long clips.
    for number in rng.permutation(len(packed)).tolist():
        yield packed[number]


def _pack_sorted(
    rows: list[int],
    durations: npt.NDArray[np.floating],
    batch_seconds: float,
    max_batch_size: int,
) -> list[list[int]]:
    """Cut rows of growing length into micro-batches within the limits."""
    packed: list[list[int]] = []
    for row in rows:
        full = not packed or len(packed[-1]) == max_batch_size
        if full or (len(packed[-1]) + 1) * float(durations[row]) > batch_seconds:
            packed.append([])
        packed[-1].append(row)
    return packed


def _steps(batches: Iterator[list[int]], lanes: int) -> Iterator[list[Rows]]:
    """Group micro-batches into full steps; the last two share what does not fill a step."""
    held: list[list[int]] = []  # one full step and the start of the next
    for batch in batches:
        if len(held) == 2 * lanes:
            yield _arrays(held[:lanes])
            held = held[lanes:]
        held.append(batch)
    while held and len(held) % lanes:
        largest = max(held, key=len)
        # Every second sample of the largest micro-batch: the number of micro-batches becomes a multiple of the lanes
        # without repeating or dropping samples.
        held.append(largest[1::2])
        del largest[1::2]
    for start in range(0, len(held), lanes):
        yield _arrays(held[start : start + lanes])


def _arrays(step: list[list[int]]) -> list[Rows]:
    return [np.asarray(rows, np.int64) for rows in step]
