"""A few CPU processes that train one tiny model together, and a plain torch loop to compare them with.

The processes talk gloo and use the real engine, loop and validation, but no Ray: so a test can hand each
of them the micro-batches it wants, and read all weights afterwards.
"""

import copy
import os
from collections.abc import Callable, Container, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from mowe_ray.data.micro_batch import MicroBatch
from mowe_ray.distributed.engine import deepspeed
from mowe_ray.distributed.engine.deepspeed_engine import DeepSpeedEngine, deepspeed_config
from mowe_ray.model import MoweForConditionalGeneration, MoweOutput, MoweProcessor
from mowe_ray.model.building import Lora, WeakEncoder, build_model, build_processor, parameter_parts
from mowe_ray.training.collate import Batch, collate
from mowe_ray.training.loop import StepResult, training_steps
from mowe_ray.training.optimizer import learning_rate_factor, parameter_groups
from tests.plain_engine import PlainEngine
from tests.tiny_models import (
    tiny_hubert_config,
    tiny_language_model_config,
    tiny_tokenizer,
    tiny_wav2vec2_config,
    tiny_whisper_config,
)

CLIP_NORM = 0.4  # about half of the steps of these tests exceed it
WARMUP_STEPS = 3
KINDS = 5
Row = int | None
"""A clip of a kind, or None for a row of text alone."""

# ---- data -------------------------------------------------------------------------------------


def micro_batch(rows: Sequence[Row], *, seed: int = 0) -> MicroBatch:
    """Make one row per entry; [] is a micro-batch that lost all its samples.

    Its first clip lasts one second and the others less: encoders see padding, and all micro-batches with
    audio are equally long, so that clips do not change when micro-batches are merged into one.
    """
    clips = [_clip(kind, seed + i, 1.0 if i == 0 else 0.7) for i, kind in enumerate(rows) if kind is not None]
    audio_lengths = iter([len(clip) for clip in clips])
    names = ["text" if kind is None else f"sound {kind}" for kind in rows]
    return MicroBatch(
        audio=np.concatenate([*clips, np.zeros(0, np.int16)]),
        lengths=[0 if kind is None else next(audio_lengths) for kind in rows],
        scales=[1.0 if kind is None else 2.0**-15 for kind in rows],
        ids=[f"{seed}-{i}" for i in range(len(rows))],
        instructions=[f"Describe {'the sound' if kind is not None else 'nothing'} {i}." for i, kind in enumerate(rows)],
        answers=[f"{name}, number {seed % 7}" for name in names],
        references=[[f"{name}, number {seed % 7}"] for name in names],
        tasks=["text" if kind is None else "sound" for kind in rows],
        sources=["test"] * len(rows),
        bad=[],
    )


def _clip(kind: int, seed: int, seconds: float) -> np.ndarray:
    random = np.random.default_rng([seed, kind])
    time = np.arange(round(seconds * 16_000)) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * 150 * 2.5**kind * time) + 0.02 * random.normal(size=len(time))
    return np.round(wave * 2**15).clip(-(2**15), 2**15 - 1).astype(np.int16)


def merged(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """Put the rows of several micro-batches into one."""
    lists = {
        field: [item for batch in micro_batches for item in getattr(batch, field)]
        for field in ("lengths", "scales", "ids", "instructions", "answers", "references", "tasks", "sources", "bad")
    }
    return MicroBatch(audio=np.concatenate([batch.audio for batch in micro_batches]), **lists)


# ---- the model --------------------------------------------------------------------------------


def make_model(
    *, seed: int = 0, whole: bool = False, dropout: float = 0.0, **changes: Any
) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Build a pool of five: trained whole, by LoRA and frozen; members 1 and 2 have equal shapes.

    Args:
        seed: Seed of the weights.
        whole: Train base encoder and language model too, which is otherwise frozen and adapted by LoRA.
        dropout: Of the encoders.
        **changes: Other fields of `MoweConfig`.
    """
    tokenizer = tiny_tokenizer(chat_template=False)
    quiet = {
        f"{name}_dropout": dropout for name in ("hidden", "attention", "activation", "feat_proj", "final", "layer")
    }
    model = build_model(
        base_encoder=tiny_whisper_config(dropout=dropout, attention_dropout=dropout),
        weak_encoders=[
            WeakEncoder(
                "whisper", tiny_whisper_config(d_model=16, dropout=dropout), train="full", features="weighted_sum"
            ),
            WeakEncoder("hubert_one", tiny_hubert_config(**quiet), train="full"),
            WeakEncoder("hubert_two", tiny_hubert_config(**quiet), train="full"),
            WeakEncoder("wav2vec2", tiny_wav2vec2_config(hidden_size=16, **quiet), train="lora", features="layer:1"),
            WeakEncoder("frozen", tiny_hubert_config(**quiet), train="frozen"),
        ],
        language_model=tiny_language_model_config("llama", tie_word_embeddings=whole),
        tokenizer=tokenizer,
        lora=None if whole else Lora(r=4, alpha=8),
        train_base="full" if whole else "frozen",
        seed=seed,
        **changes,
    )
    return model, build_processor(model, tokenizer)


def steer_routers(model: MoweForConditionalGeneration, processor: MoweProcessor) -> None:
    """Set the routers so that a clip of kind k chooses member k, and all clips member 3 besides."""
    tower = model.audio_tower
    assert tower.independent_router is not None
    assert tower.dependent_router is not None
    samples = [micro_batch([kind] * 3, seed=1000 + kind) for kind in range(KINDS)]
    batch = collate(merged(samples), processor)
    with torch.no_grad():
        prepared = model.prepare_audio(batch.inputs["input_values"], batch.inputs["input_lengths"])
        assert prepared.features is not None
        valid = tower.base_encoder.num_frames(prepared.clips.lengths)
        mean = torch.stack([f[:n].mean(0) for f, n in zip(prepared.features, valid.tolist(), strict=True)]).double()
        # Least squares for logits of 3 (one-hot of the kind - 1/5): sure, but not beyond any gradient.
        centre = mean.mean(0)
        wanted = 3 * (torch.eye(KINDS, dtype=torch.float64) - 1 / KINDS).repeat_interleave(3, 0)
        weight = torch.linalg.pinv(mean - centre, rtol=1e-3) @ wanted
        tower.dependent_router.weight.copy_(weight.T)
        tower.dependent_router.bias.copy_(-(weight.T @ centre))
        tower.independent_router.logits.copy_(torch.tensor([0.0, 0.1, -0.1, 0.8, 0.0]))


def optimizer_groups(model: MoweForConditionalGeneration) -> list[dict[str, Any]]:
    """Return AdamW's groups.

    eps is large: AdamW divides a gradient by its own size + eps, so at the usual 1e-8 the rounding error
    of a gradient that should be zero would move its weight as far as a real gradient does. With 1e-3, a
    difference d between gradients moves weights apart by at most 1e-2 * d / 1e-3 a step.
    """
    groups = parameter_groups(model, parameter_parts(model), 1e-2, {"language_model": 2e-3}, 0.01)
    return [group | {"eps": 1e-3} for group in groups]


def plain_engine(model: MoweForConditionalGeneration, clip_norm: float = CLIP_NORM) -> PlainEngine:
    """Return the reference: one process, plain torch, the same optimizer."""
    return PlainEngine(model, optimizer_groups(model), clip_norm=clip_norm or float("inf"))


# ---- several processes ------------------------------------------------------------------------


class RecordingEngine(DeepSpeedEngine):
    """The engine under test, which keeps more.

    Attributes:
        chosen: Pool members that each training micro-batch chose by its audio.
        gradients: Of every step of `recorded_steps`, over all ranks and before clipping, by parameter name.
        recorded_steps: Counted from 0.
    """

    def __init__(self, *args: Any):
        self.chosen: list[list[int]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.recorded_steps: Container[int] = ()
        super().__init__(*args)

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        if isinstance(output, MoweOutput) and self.model.training:
            assert output.routing is not None
            if (dependent := output.routing.dependent) is not None:
                self.chosen.append(dependent.chosen.flatten(0, -2).any(0).nonzero().flatten().tolist())
        return output

    def step(self, learning_rate_factor: float) -> float:
        if self.updates in self.recorded_steps:
            self.gradients.append(self._global_gradients())
        return super().step(learning_rate_factor)

    def _global_gradients(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {name: deepspeed.utils.safe_get_full_grad(p).clone() for name, p in named if p.requires_grad}


def make_engine(
    model: MoweForConditionalGeneration,
    zero_stage: int,
    *,
    clip_norm: float = CLIP_NORM,
    bf16: bool = False,
    offload: Literal["none", "cpu"] = "none",
    **zero: Any,
) -> RecordingEngine:
    """Put `model` under DeepSpeed, with other keys of its `zero_optimization`; collective."""
    settings = deepspeed_config(zero_stage=zero_stage, clip_norm=clip_norm, bf16=bf16, offload=offload)
    settings["zero_optimization"] |= zero
    return RecordingEngine(model.train(), optimizer_groups(model), settings)


def dealt(lanes: Sequence[Any], rank: int, world_size: int, empty: Any) -> list[Any]:
    """Return lanes r, r + W, ... of rank r of W, as many as every other rank has: `empty` stands for a missing one."""
    mine = list(lanes[rank::world_size])
    return mine + [empty] * (-(-len(lanes) // world_size) - len(mine))


def train(
    engine: Any,
    processor: MoweProcessor,
    plan: Sequence[Sequence[MicroBatch]],
    *,
    start_step: int = 0,
    dropped_pool: int = 0,
) -> list[StepResult]:
    """Run the loop over `plan`, steps of micro-batches of which each rank takes those `dealt` to it."""

    def steps() -> Iterator[tuple[int, float, list[Batch]]]:
        for number, step in enumerate(plan[start_step:], start_step):
            mine = dealt(step, engine.rank, engine.world_size, micro_batch([]))
            batches = [collate(batch, processor) for batch in mine]
            yield number + 1, learning_rate_factor(number, WARMUP_STEPS, 0.0, "constant"), batches

    return list(training_steps(engine, steps(), seed=5, dropped_pool=dropped_pool))


def curve(results: Sequence[StepResult]) -> dict[str, list[float]]:
    """Return the numbers of a run that must not depend on who computed it."""
    return {name: [getattr(r, name) for r in results] for name in ("loss", "lm_loss", "routing_loss", "grad_norm")}


def weights_of(model: MoweForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return a copy of all weights."""
    return copy.deepcopy(model.state_dict())


def run_ranks(
    work: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    ranks: int = 2,
    device: str = "cpu",
    method: Literal["forkserver", "spawn"] = "forkserver",
) -> list[Any]:
    """Call `work(*arguments)` in `ranks` processes that form a process group; returns what each returned.

    Args:
        device: "cuda" gives each process a GPU, and the group NCCL; its processes always `spawn`.
        method: Forks of a process that has imported everything save ten seconds, and have the environment that it had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as environment:
        if device == "cpu":  # DeepSpeed would take a GPU that is there, which gloo cannot serve
            environment.setenv("DS_ACCELERATOR", "cpu")
            environment.setenv("CUDA_VISIBLE_DEVICES", "")
        if device == "cuda":
            method = "spawn"
        multiprocessing.set_forkserver_preload(["tests.ranks"])
        multiprocessing.start_processes(
            _rank_main, (ranks, str(folder), device, work, arguments), nprocs=ranks, start_method=method
        )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank_main(
    rank: int, ranks: int, folder: str, device: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    # Short, so that ranks that wait for different collectives fail the test instead of stopping it.
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    torch.save(work(*arguments), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
