"""Trials per hour of a study whose base encoder is frozen: with the shared cache of its features, against without.

The same study twice, on one Ray, each in a folder of its own, so the cached one also pays for filling its cache. The
trials vary the weight of the routing loss over a pool of miniature encoders; the base has, by default, the shape of
Whisper-base's encoder, with random weights. Wall time, for that is what a study takes: nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from measuring import Check, conclude, interleave, ratio, wall_seconds

from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus import builtin_samples
from mowe_ray.distributed.ray_tune.tuner import run_study
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.study import Study


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4, help="trials of the study (%(default)s)")
    parser.add_argument("--clips", type=int, default=120, help="training clips (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a trial (%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="width of the base encoder (%(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="its layers (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="interleaved rounds (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as folder:
        scratch = Path(folder)
        for part, clips in (("train", arguments.clips), ("validation", 20)):
            write_webdataset(builtin_samples(part, clips), str(scratch / part))
        contenders = {
            name: partial(hours, arguments, scratch, share) for name, share in (("without", False), ("with", True))
        }
        measured = interleave(contenders, arguments.rounds)
    rates = {name: [arguments.trials / value for value in values] for name, values in measured.items()}
    table = {f"{name} the cache": f"{values[0]:7.1f} trials an hour" for name, values in rates.items()}
    check = Check("trials an hour, with / without", ratio(rates["with"], rates["without"]), 2.0, at_most=False)
    return conclude("sweep", table, [check], trials_per_hour=rates)


def hours(arguments: argparse.Namespace, scratch: Path, share: bool) -> float:
    """Run the study and return the hours it took."""
    name = f"study-{len(list(scratch.iterdir()))}"
    file = scratch / f"{name}.yaml"
    # A storage of its own: features are shared by all studies of one.
    file.write_text(yaml.safe_dump(sweep(arguments, scratch) | {"name": name, "storage": str(scratch / f"of-{name}")}))
    study = Study(load_sweep(file, [f"resources.share_features={json.dumps(share)}"]), cost=lambda config: None)
    seconds = wall_seconds(lambda: run_study(study, partial(print, file=sys.stderr), show=lambda study: None))
    assert all(trial.status == "finished" for trial in study.trials.values())
    return seconds / 3600


def sweep(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the study, as its file would hold it."""
    encoder = {"model_type": "whisper", "d_model": arguments.width, "encoder_layers": arguments.layers}
    encoder |= {"encoder_attention_heads": 8, "encoder_ffn_dim": 4 * arguments.width, "num_mel_bins": 80}
    return {
        "question": "Is a cache of frozen features worth it?",
        "base": "quickstart",
        "set": {
            "model.base_encoder": {"config": encoder},
            "model.train_base": "frozen",
            "data.train": [{"path": str(scratch / "train")}],
            "data.validation": [{"path": str(scratch / "validation"), "name": "held_out"}],
            "training.epochs": arguments.epochs,
            "training.warmup_steps": 0,
        },
        "space": {"training.mowe_loss.weight": {"choice": [0.1 / 2**n for n in range(arguments.trials)]}},
    }


if __name__ == "__main__":
    sys.exit(main())
