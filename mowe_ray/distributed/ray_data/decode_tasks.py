"""The task that decodes: a block of work becomes micro-batches, on any CPU of the cluster.

Processes that decode import this module, and pay for what it imports: no torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial

import pyarrow as pa
import ray

from mowe_ray.data.epoch_plan import RUNS_PER_LANE
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import load_in_child, load_micro_batch, without_known
from mowe_ray.data.runs import RUN_BYTES, Runs
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards.kept_runs import KeptRuns, with_runs
from mowe_ray.data.shards.storage import storage_timeout, with_storage_timeout
from mowe_ray.distributed.ray_data.parallel_map import has_died_twice


def decode_micro_batches(
    work: pa.Table,
    indexes: Sequence[ray.ObjectRef],
    plans: ray.ObjectRef,
    cache: ray.ObjectRef | None,
    min_duration_s: float,
    max_duration_s: float,
    storage_timeout_s: float,
    runs: RunsToKeep | None = None,
    known: Sequence[BadSample] = (),
) -> Iterator[pa.Table]:
    """Yields the decoded micro-batches of a block of work, a table of one row each with the column `dataset`.

    Args:
        work: Columns `dataset` and `number`, of the plan and of the micro-batch in it.
        indexes: The `Index` of each dataset in the object store; tasks read it in place.
        plans: For each dataset the rows of its micro-batches.
        cache: The `FeatureCache` in the object store, to read from it instead of decoding.
        runs: How remote samples of the only dataset are read with their neighbours; None reads each alone.
        known: Samples that are bad, and not to be tried.
    """
    rows, features = ray.get(plans), None if cache is None else ray.get(cache)
    load = load_in_child if has_died_twice() else load_micro_batch
    items = work.to_pylist()
    with ExitStack() as stack:
        if runs is not None and features is None and ray.get_runtime_context().get_node_id() == runs.home:
            (index,), numbers = indexes, [item["number"] for item in items]
            # Also those of the next task: with a new round, it would wait for nearly all of its runs.
            wanted = [*(rows[0][n] for n in numbers), *rows[0][numbers[-1] + 1 : numbers[-1] + 1 + len(numbers)]]
            with storage_timeout(storage_timeout_s):
                kept = KeptRuns(runs.key, runs.room, _index(index).extents(ray.get(runs.starts), wanted))
                stack.enter_context(kept)
            load = partial(with_runs, kept, load)
        for item in items:
            dataset, number = item["dataset"], item["number"]
            samples, bad = without_known(_index(indexes[dataset]).take(rows[dataset][number]), known)
            if features is None:
                batch = with_storage_timeout(storage_timeout_s, load, samples, min_duration_s, max_duration_s)
            else:
                batch = features.load(samples)
            batch.bad.extend(bad)
            yield batch.to_row().append_column("dataset", pa.array([dataset]))


@lru_cache(maxsize=4)  # each holds its object in the store: of a run, and of studies and evaluations in one process
def _index(reference: ray.ObjectRef) -> Index:
    """Return an index in the object store; unpacked once a process, since it has an array for each chunk and column."""
    index: Index = ray.get(reference)
    return index


@dataclass(frozen=True)
class RunsToKeep:
    """Neighbouring samples that the tasks of a stream read at once, and keep on their node's disk meanwhile.

    Attributes:
        starts: (R + 1,) rows at which runs begin, in the object store.
        home: The node that keeps them; tasks on others, which are few, read sample by sample.
        key: Of those who share them: a rank of a run.
        room: Bytes that a node keeps of them.
    """

    starts: ray.ObjectRef
    home: str
    key: str
    room: int

    @classmethod
    def of(cls, runs: Runs, home: str, key: str, lanes: int) -> RunsToKeep:
        """Keep the runs of so many lanes: of a round, and as much as is begun of the next before its last are read."""
        return cls(ray.put(runs.starts), home, key, 3 * lanes * RUNS_PER_LANE * RUN_BYTES // 2)
