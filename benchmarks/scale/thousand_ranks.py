"""What 1,000 ranks on 125 nodes ask of Ray, of the object storage and of each node: a table.

Simulated: ranks that train a micro-batch of 120 s in a second, on ten million made-up clips of 15.5 s; planned as for a
real run are those of one node, for some hundred steps. Requests follow from the runs that a rank meets in a round for
the first time, executions from the default of `data.lookahead_gb`. Not simulated: how long Ray and the storage take.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
from index_rows import made_index
from measuring import Check, conclude

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.epoch_plan import RUNS_PER_LANE
from mowe_ray.data.runs import RUN_BYTES
from mowe_ray.distributed.ray_data.pipeline import AUDIO_BYTES_PER_S, per_execution
from mowe_ray.training.sampler import EpochSampler, rows_of_rank

RANKS_PER_NODE = 8


def main() -> int:
    """Simulate and print; returns 0 if the targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=10_000_000, help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="that are planned (%(default)s)")
    arguments = parser.parse_args()
    index, ranks = made_index(arguments.clips), arguments.ranks
    data = DataSection(train=[{"path": "made"}])
    sampler = EpochSampler(index, data, seed=0, micro_batches_per_step=ranks, epochs=1)
    steps = list(islice(sampler, arguments.steps))
    mine = [[rows_of_rank(step.micro_batches, rank, ranks)[0] for step in steps] for rank in range(RANKS_PER_NODE)]
    runs = [len(np.unique(np.searchsorted(sampler.runs.starts, np.concatenate(r), side="right"))) for r in mine]
    clips = sum(len(rows) for r in mine for rows in r)
    executions, gets = per_execution(data.lookahead_gb, data.batch_seconds), sum(runs) / clips
    per_second = clips / len(steps) / RANKS_PER_NODE * ranks
    ahead = 2 * executions * data.batch_seconds * AUDIO_BYTES_PER_S
    node = {
        "index, shared": index.table.nbytes,
        "audio ahead": RANKS_PER_NODE * ahead,
        "runs on disk": RANKS_PER_NODE * 3 * RUNS_PER_LANE * RUN_BYTES // 2,
    }
    table = {
        "ranks, nodes": f"{ranks:,}, {-(-ranks // RANKS_PER_NODE):,}",
        "clips a second": f"{per_second:,.0f}",
        "executions that register with Ray Data": f"{ranks / executions:.1f} a second, each rank one in {executions} s",
        "requests to the storage": f"{per_second * gets:,.0f} a second; clip by clip {per_second:,.0f}",
        **{f"GB a node at most, {name}": f"{size / 1e9:.1f}" for name, size in node.items()},
    }
    return conclude("scale/thousand_ranks", table, [Check("GETs a clip", gets, 0.1)])


if __name__ == "__main__":
    sys.exit(main())
