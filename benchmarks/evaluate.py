"""Answering recordings with batch inference, as `mowe_ray.evaluate` does, against a plain loop around `generate`.

The same export, WAV files of 1 to 20 s in the same number a batch, questions and cores; greedy. The plain loop is what
users of transformers write: AutoModel, AutoProcessor, batches in the order of files, read as they are needed; beside it
the same loop over files sorted by length, which shows the share of the order in the gain. Batch inference has a model
of one thread on every core (`compute.num_workers`), or one model with all threads (`compute.cpus_per_worker`). All are
timed from the end of a first batch on: no loading, no starting. The weights are random and never end an answer, so that
all answers have the same length. Wall time: nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mowe_ray.distributed  # noqa: F401  # isort: skip  (first: it sets what Ray reads while it is imported)
import numpy as np
import ray
import soundfile
import torch
from measuring import Check, conclude, interleave, ratio
from transformers import AutoModel, AutoProcessor

from mowe_ray.config import load_config, load_evaluation
from mowe_ray.data.sample import BadSample
from mowe_ray.distributed import cluster
from mowe_ray.distributed.ray_data.batch_inference import AnswerJob, answer_all
from mowe_ray.evaluation.predictions import Answer, Predictions
from mowe_ray.evaluation.targets import folder_at
from mowe_ray.model.export import export
from mowe_ray.model.tokenizing import train_tokenizer
from mowe_ray.training.build import assemble
from mowe_ray.training.datasets import scan_validation, validation_plan

QUESTION = "Write down what is said."
SAMPLE_RATE = 16_000


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=96, help="recordings (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the longest (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="recordings answered together (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=20, help="length of an answer, in tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    parser.add_argument("--cores", type=int, default=min(2, os.cpu_count() or 1), help="of each side (%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="width of base encoder and language model (%(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers of each (%(default)s)")
    arguments = parser.parse_args()
    cores = arguments.cores
    texts: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="mowe_ray_benchmark_") as temporary:
        folder = Path(temporary)
        write_model(folder / "export", arguments.width, arguments.layers)
        write_recordings(folder, arguments.clips, arguments.seconds)

        def measure(name: str, answer: Callable[[], tuple[float, dict[str, str]]]) -> float:
            seconds, texts[name] = answer()
            return arguments.clips / seconds

        contenders = {
            "plain loop": partial(plain_loop, folder, arguments, by_length=False),
            "plain loop, sorted": partial(plain_loop, folder, arguments, by_length=True),
            f"{cores} workers": partial(batch_inference, folder, arguments, workers=cores, threads=1),
            f"1 worker of {cores} threads": partial(batch_inference, folder, arguments, workers=1, threads=cores),
        }
        calls = {name: partial(measure, name, answer) for name, answer in contenders.items()}
        speeds = interleave(calls, arguments.rounds)
    plain, _, *ours = speeds
    checks = [
        Check(f"answers/s, {name} / plain loop", ratio(speeds[name], speeds[plain]), 1.0, at_most=False)
        for name in ours
    ]
    table = {name: f"{np.median(values):7.2f} answers/s" for name, values in speeds.items()}
    same = {name: np.mean([texts[name][key] == text for key, text in texts[plain].items()]) for name in ours}
    return conclude("evaluate", table, checks, cores=cores, clips=arguments.clips, rounds=speeds, same_answers=same)


def write_model(folder: Path, width: int, layers: int) -> None:
    """Export a model of random weights: the quickstart's pool, below a base encoder and language model of this size."""
    config = load_config(
        "quickstart",
        [
            f"model.base_encoder.config.d_model={width}",
            f"model.base_encoder.config.encoder_layers={layers}",
            f"model.base_encoder.config.encoder_attention_heads={max(2, width // 64)}",
            f"model.base_encoder.config.encoder_ffn_dim={4 * width}",
            f"model.language_model.config.hidden_size={width}",
            f"model.language_model.config.intermediate_size={4 * width}",
            f"model.language_model.config.num_hidden_layers={layers}",
        ],
    )
    tokenizer = train_tokenizer([QUESTION], 1024)
    model, processor = assemble(
        config.model, config.training.mowe_loss, seed=config.seed, tokenizer=tokenizer, gpu=False
    )
    model.generation_config.eos_token_id = None
    export(model, processor, folder)


def write_recordings(folder: Path, clips: int, longest_s: float) -> None:
    """Write noise of 1 s to `longest_s`, every length as likely, and a manifest."""
    rng = np.random.default_rng(0)
    with (folder / "manifest.jsonl").open("w") as manifest:
        for number, seconds in enumerate(rng.uniform(min(1.0, longest_s), longest_s, clips)):
            name = f"{number:05d}.wav"
            soundfile.write(folder / name, 0.1 * rng.standard_normal(round(seconds * SAMPLE_RATE)), SAMPLE_RATE)
            entry = {"id": name, "audio": name, "instruction": QUESTION, "answer": "?", "task": "asr"}
            manifest.write(json.dumps(entry) + "\n")


def plain_loop(folder: Path, arguments: argparse.Namespace, *, by_length: bool) -> tuple[float, dict[str, str]]:
    """Answer with nothing but transformers; returns seconds, and the answer to each recording."""
    torch.set_num_threads(arguments.cores)
    model = AutoModel.from_pretrained(folder / "export").eval()
    processor = AutoProcessor.from_pretrained(folder / "export")

    def answer(files: Sequence[Path]) -> list[str]:
        waves = [soundfile.read(file, dtype="float32")[0] for file in files]
        inputs = processor(instructions=[QUESTION] * len(files), audio=[[wave] for wave in waves])
        tokens = model.generate(**inputs, max_new_tokens=arguments.new_tokens, do_sample=False)
        return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    files = sorted(folder.glob("*.wav"), key=lambda file: (file.stat().st_size if by_length else 0, file.name))
    answer(files[: arguments.batch_size])
    began, texts = time.perf_counter(), []
    for start in range(0, len(files), arguments.batch_size):
        texts += answer(files[start : start + arguments.batch_size])
    return time.perf_counter() - began, {file.name: text.strip() for file, text in zip(files, texts, strict=True)}


def batch_inference(
    folder: Path, arguments: argparse.Namespace, *, workers: int, threads: int
) -> tuple[float, dict[str, str]]:
    """Answer as `mowe_ray.evaluate` does; returns as `plain_loop`."""
    settings = [
        f"data.validation.0.path={folder / 'manifest.jsonl'}",
        f"data.max_batch_size={arguments.batch_size}",
        f"data.batch_seconds={(arguments.batch_size + 1) * arguments.seconds}",  # only their number limits a batch
        f"generation.max_new_tokens={arguments.new_tokens}",
        f"compute.num_workers={workers}",
        f"compute.cpus_per_worker={threads}",
    ]
    config = load_evaluation(None, settings)
    (index,) = scan_validation(config.data).values()
    plan = [step[0] for step in validation_plan(index, config.data)]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        # One batch for every worker, all alike: the clock starts when the last of them is answered.
        first = AnswerJob("first", index, [np.arange(arguments.batch_size)] * workers, (), _Timed(out, "first"))
        whole = AnswerJob("all", index, plan, (), _Timed(out, "all"))
        cluster.join(workers * (threads + config.data.decode_cpus))
        answer_all(str(folder / "export"), [first, whole], config, lambda line: None)
        ray.shutdown()
    texts = {answer.id: answer.answer for answer in whole.predictions.answers()}
    return whole.predictions.last_s - first.predictions.last_s, texts


class _Timed(Predictions):
    """Predictions with the time at which the last answers were added."""

    last_s = 0.0

    def __init__(self, folder: str, name: str):
        super().__init__(folder_at(folder), name, {})

    def add(self, answers: Sequence[Answer], bad: Sequence[BadSample], *, audio_s: float, seconds: float) -> None:
        super().add(answers, bad, audio_s=audio_s, seconds=seconds)
        self.last_s = time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
