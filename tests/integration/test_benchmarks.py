"""The benchmarks run and print what scripts can read; how fast anything is depends on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "data": "--clips 48 --rounds 1 --cores 1 --memory-clips 24",
    "evaluate": "--clips 8 --seconds 1.5 --batch-size 4 --new-tokens 4 --rounds 1 --width 32 --layers 1",
    "gpu": "--device cpu --tiny --steps 2 --seconds 2",
    "memory": "--minutes 1 training.save_every=10",
    "padding": "--clips 1 --seconds 1 --rounds 1 --width 64 --layers 1",
    "safety": "--clips 2 --seconds 0.5 --steps 2 --rounds 1 --width 32 --layers 1 --skip-recovery",
    "serving": "--clients 4 --seconds 2 --clips 4 --longest 1 --new-tokens 4 --malformed 8 --width 16",
    "sparse": "--clips 8 --seconds 0.5 --rounds 1 --width 64 --layers 1",
    "sweep": "--trials 1 --clips 8 --epochs 1 --width 32 --layers 1",
    "step": "--clips 2 --seconds 0.5 --steps 2 --width 32 --layers 1",
}
# Of `benchmarks/scale`: what does not depend on the machine's speed, at sizes of a cluster.
TINY_SCALE = {
    "scale/checkpoint_files": "--ranks 6 --tensors 2",
    "scale/driver_memory": "--clips 10000",
    "scale/fingerprints": "--shards 3 9",
    "scale/first_index": "--shards 4 --clips 3",
    "scale/gets_per_clip": "--clips 60",
    "scale/index_rows": "--clips 20000",
    "scale/lookahead": "--starts 2 --clips 4",
    "scale/lost_clips": "--clips 4 --rate 0.05",
    "scale/record_bytes": "--records 10 20",
    "scale/s3_speed": "--clips 60 --rounds 1",
    "scale/sweep_results": "--trials 4 --records 20",
    "scale/thousand_ranks": "--clips 20000 --ranks 16 --steps 20",
}


def test_every_benchmark_is_run_here():
    paths = [path for path in BENCHMARKS.rglob("*.py") if "__main__" in path.read_text()]
    assert {path.relative_to(BENCHMARKS).with_suffix("").as_posix() for path in paths} == {*TINY, *TINY_SCALE}


def test_every_benchmark_finds_what_it_imports():
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.soak  # of no use but as a smoke test: at these sizes the ratios say nothing
@pytest.mark.parametrize("name", [*TINY, *TINY_SCALE])
def test_prints_its_ratios_as_json_and_returns_whether_they_pass(name, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *(TINY | TINY_SCALE)[name].split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name
    assert all(check["ratio"] >= 0 for check in result["checks"])
    assert all({"name", "ratio", "target", "pass"} <= check.keys() for check in result["checks"])
    assert result["pass"] == all(check["pass"] for check in result["checks"])
    assert done.returncode == (0 if result["pass"] else 1)


def test_the_gpu_benchmark_says_in_one_line_that_there_is_none():
    command, environment = [sys.executable, str(BENCHMARKS / "gpu.py")], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "needs a CUDA device" in done.stderr
