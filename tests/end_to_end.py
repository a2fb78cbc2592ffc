"""Runs of the real commands, and small corpora for them, shared by the integration tests."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

from mowe_ray.config import RunConfig
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.training.build import assemble, tokenizer_of

ROOT = Path(__file__).resolve().parents[1]
RATE = 16_000


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code, both streams."""

    code: int
    out: str
    err: str

    @cached_property
    def result(self) -> dict[str, Any]:
        """The JSON of the last line on stdout."""
        return dict(json.loads(self.out.splitlines()[-1]))


def run_command(
    *arguments: str | Path,
    module: str = "mowe_ray.train",
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> Finished:
    """Run `python -m MODULE ARGUMENTS` from the repository, as a person would, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def tone(pitch: float, seconds: float, rate: int = RATE) -> np.ndarray:
    """A tone with two overtones, at half of full scale."""
    time = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in (1, 2, 3))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def encoded(wave: np.ndarray, container: str = "FLAC", rate: int = RATE, subtype: str | None = None) -> bytes:
    """Encode a wave with libsndfile."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=container, subtype=subtype)
    return file.getvalue()


def tone_samples(count: int, *, first: int = 0, seconds: float = 1.0) -> list[Sample]:
    """Low and high tones of two tasks; the answer says which."""
    samples = []
    for number in range(first, first + count):
        high = number % 2 == 0
        audio = encoded(tone(900 + 7 * number if high else 200 + 3 * number, seconds))
        task, question = ("aqa", "Is the tone high or low?") if number % 4 < 2 else ("ac", "Describe the sound.")
        answer = f"a {'high' if high else 'low'} tone" if task == "ac" else ("high" if high else "low")
        samples.append(Sample(f"tone-{number:03d}", audio, question, answer, task, "tones", "flac"))
    return samples


def write_tones(folder: Path, count: int, *, first: int = 0) -> Path:
    """Write `tone_samples` as WebDataset shards of eight or so samples."""
    samples = tone_samples(count, first=first)
    folder.mkdir(parents=True)
    write_webdataset(samples, str(folder), 8 * len(samples[0].audio or b""))
    return folder


def quickstart_arguments(folder: Path) -> list[str]:
    """Arguments of the fixture `quickstart`: the preset for 12 steps, into `folder`/quick."""
    length = ["training.max_steps=12", "training.epochs=null"]
    return ["--config", "quickstart", "name=quick", f"storage={folder}", *length]


def untrained_model(run: Path) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Build a run's model as it was before the first step."""
    config = RunConfig.model_validate_json((run / "config.json").read_text())
    own = run / "tokenizer.json"
    tokenizer = tokenizer_of(config.model, own.read_text() if own.exists() else None)
    model, processor = assemble(
        config.model, config.training.mowe_loss, seed=config.seed, tokenizer=tokenizer, gpu=False
    )
    return model.eval(), processor


def trained_model(run: Path) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Build a one-worker run's model with the weights of its last checkpoint, without looking at the export."""
    model, processor = untrained_model(run)
    (file,) = run.glob("checkpoints/step-*/rank-00000-of-00001.safetensors")
    written = load_file(file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(written[f"weight/{name}"].view(parameter.shape))
    return model, processor
