"""CPU seconds of a study's results after one more of 1,000 trials has ended, and the size of its report.

The trials are made up: their files are those of real ones, with a record a step. The results of all but one are
written, then that one ends.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import Check, conclude, cpu_seconds

from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.report.results import ResultsWriter
from mowe_ray.sweeping.study import Study
from mowe_ray.sweeping.trials import ModelCost, Trial, run_folder

TASKS, MEMBERS = ("asr", "er", "ac", "aqa", "sqa"), ("hubert", "whisper", "wavlm", "ast")


def main() -> int:
    """Measure and print; returns 0 if the targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="trials of the study (%(default)s)")
    parser.add_argument("--records", type=int, default=1000, help="training records of each (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as folder:
        file = Path(folder, "sweep.yaml")
        file.write_text(yaml.safe_dump(sweep(folder)))
        study = Study(load_sweep(file, []), cost=lambda config: None)
        trials = [trial(number) for number in range(arguments.trials)]
        for one in trials:
            write_run(study, one, arguments.records)
        study.trials = {one.number: one for one in trials[:-1]}
        writer = ResultsWriter(study)
        first_s = cpu_seconds(writer.write)
        study.trials = {one.number: one for one in trials}
        again_s = cpu_seconds(writer.write)
        size_mb = Path(folder, "study", "report.html").stat().st_size / 1e6
    table = {"the first results, CPU s": f"{first_s:.1f}", "trials": str(len(trials))}
    checks = [
        Check("CPU s of the results after one more trial", again_s, 1.0),
        Check("MB of the report", size_mb, 5.0),
    ]
    return conclude("scale/sweep_results", table, checks)


def sweep(storage: str) -> dict[str, object]:
    """Return the study, as its file would hold it."""
    space = {
        "training.mowe_loss.weight": {"loguniform": [0.001, 1.0]},
        "model.router.top_k": {"choice": [1, 2]},
        "training.learning_rate": {"loguniform": [1e-5, 1e-2]},
    }
    return {"question": "Which?", "base": "quickstart", "name": "study", "storage": storage, "space": space,
            "search": {"kind": "random"}, "budget": {"points": 10_000}}  # fmt: skip


def trial(number: int) -> Trial:
    """Return a finished trial with a score that follows its values."""
    drawn = random.Random(number)
    values = {
        "training.mowe_loss.weight": 10 ** drawn.uniform(-3, 0),
        "model.router.top_k": drawn.choice([1, 2]),
        "training.learning_rate": 10 ** drawn.uniform(-5, -2),
    }
    score = 0.6 - 0.1 * abs(math.log10(values["training.learning_rate"]) + 3.5) + drawn.gauss(0, 0.02)
    tasks = {task: {"score": score, "majority": 0.2, "samples": 100.0} for task in TASKS}
    return Trial(number, number, 0, values, "finished", attempts=1, step=1000, percent=100.0, loss=2.0 - score,
                 tasks=tasks, cost=ModelCost(1e6, 5e5, 3.0), wall_s=600.0, device_s=600.0)  # fmt: skip


def write_run(study: Study, one: Trial, records: int) -> None:
    """Write the files of a trial's run that the results are made of."""
    drawn, folder = random.Random(one.number), run_folder(study.folder, one)
    lines = [
        {"kind": "train", "step": step, "lm_loss": 4 * math.exp(-step / 300) + drawn.gauss(1, 0.1)}
        for step in range(1, records + 1)
    ]
    lines += [
        {"kind": "validation", "source": "held_out", "step": step, "loss": one.loss, "tasks": one.tasks}
        for step in range(records // 20, records + 1, max(1, records // 20))
    ]
    folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    load = {"load": {member: drawn.random() for member in MEMBERS}}
    tasks = {task: {"dependent": load, "independent": load, "clips": 100} for task in TASKS}
    folder.write_json("router_report.json", {"members": MEMBERS, "datasets": {"held_out": tasks}, "training": []})


if __name__ == "__main__":
    sys.exit(main())
