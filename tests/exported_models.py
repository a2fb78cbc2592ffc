"""Exports to evaluate that nobody trained, and a corpus in which each task has a sound of its own."""

from pathlib import Path

import numpy as np
import torch

from mowe_ray.data.sample import Sample
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.export import export
from tests.end_to_end import encoded
from tests.ranks import make_model, micro_batch

TASKS = ("asr", "er", "ac", "aqa", "sqa")
MEMBERS = ("whisper", "hubert_one", "hubert_two", "wav2vec2", "frozen")
_ANSWERS = ("go on", "happy", "a low hum", "yes", "in the morning")


def task_sound(kind: int, number: int, per_task: int) -> np.ndarray:
    """Return clip `number` of task `kind`, of 0.6 to 1 s."""
    wave = micro_batch([kind], seed=1000 + 10 * kind + number).audio / 2.0**15
    return wave[: round((0.6 + 0.4 * number / per_task) * len(wave))].astype(np.float32)


def write_task_sounds(folder: Path, per_task: int) -> Path:
    """Write `per_task` samples of each task; the sound tells the task."""
    samples = [
        Sample(
            f"{task}-{number}",
            encoded(task_sound(kind, number, per_task)),
            f"The {task} of it?",
            answer,
            task,
            "sounds",
            "flac",
        )
        for kind, (task, answer) in enumerate(zip(TASKS, _ANSWERS, strict=True))
        for number in range(per_task)
    ]
    write_webdataset(samples, str(folder))
    return folder


def steered_model(per_task: int) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Return a model whose router sends task k of `TASKS` to member k, and every clip to member 3 besides."""
    model, processor = make_model()
    tower = model.eval().audio_tower
    assert tower.independent_router is not None
    assert tower.dependent_router is not None
    clips = [torch.from_numpy(task_sound(k, n, per_task)) for k in range(len(TASKS)) for n in range(per_task)]
    with torch.no_grad():
        heard = [model.prepare_audio(clip[None], torch.tensor([len(clip)])).features for clip in clips]
        mean = torch.stack([features[0].mean(0) for features in heard if features is not None]).double()
        # Least squares for logits of 20 where the clip's task is, 0 elsewhere.
        wanted = 20 * torch.eye(len(TASKS), dtype=torch.float64).repeat_interleave(per_task, 0)
        solved = torch.linalg.lstsq(torch.cat([mean, torch.ones(len(mean), 1).double()], 1), wanted, driver="gelsd")
        tower.dependent_router.weight.copy_(solved.solution[:-1].T)
        tower.dependent_router.bias.copy_(solved.solution[-1])
        tower.independent_router.logits.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0]))
    return model, processor


def collapsed_model() -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Return a model whose router sends everything to its second member."""
    model, processor = make_model()
    router = model.audio_tower.dependent_router
    assert router is not None
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0, 0.0]))
    return model.eval(), processor


def export_to(folder: Path, made: tuple[MoweForConditionalGeneration, MoweProcessor]) -> Path:
    """Write a model as an export."""
    export(*made, folder)
    return folder
