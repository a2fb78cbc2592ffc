"""Build the model, its processor and its optimizer groups from sections of the configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mowe_ray.config.evaluation import GenerationSection
from mowe_ray.config.fields import InlineConfig
from mowe_ray.config.model_section import CheckpointedPart, ModelSection
from mowe_ray.config.training_section import MoweLossSection, TrainingSection
from mowe_ray.data.index import Index
from mowe_ray.data.profile import sample_rows
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards import read_samples
from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
from mowe_ray.model.building import (
    Lora,
    Source,
    WeakEncoder,
    build_model,
    build_processor,
    load_model,
    parameter_parts,
)
from mowe_ray.model.encoders import stored_weights
from mowe_ray.model.export import export
from mowe_ray.model.tokenizing import tokenizer_from_json, train_tokenizer
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.optimizer import parameter_groups, scalar_parameters

# Texts a tokenizer is trained on: enough for the word list of any corpus of instructions.
_TOKENIZER_SAMPLES = 2000
DEFAULT_VOCABULARY = 1024


def assemble(
    model: ModelSection,
    mowe_loss: MoweLossSection,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    gpu: bool,
    loading: AbstractContextManager[None] | None = None,
) -> tuple[MoweForConditionalGeneration, MoweProcessor]:
    """Build the model with its weights, in training mode, and the processor that makes its inputs.

    Args:
        loading: Entered while the language model's checkpoint loads.

    Raises:
        ValueError: A checkpoint cannot be used; the message names the key.
    """
    free = _free_options(model, mowe_loss)
    dtype = model_dtype(model, gpu)
    lora = lora_of(model)
    if model.init_from is not None:
        built = load_model(
            model.init_from,
            train_base=model.train_base,
            train_weak={weak.name: weak.train for weak in model.weak_encoders},
            lora=lora,
            dtype=dtype,
            seed=seed,
            loading=loading,
            **free,
        )
    else:
        built = build_model(
            base_encoder=_source(model.base_encoder),
            weak_encoders=[
                WeakEncoder(weak.name, _source(weak.checkpoint), weak.train, weak.features)
                for weak in model.weak_encoders
            ],
            language_model=_source(model.language_model),
            tokenizer=tokenizer,
            lora=lora,
            train_base=model.train_base,
            base_features=model.base_encoder_features,
            dtype=dtype,
            seed=seed,
            loading=loading,
            **architecture_options(model),
            **free,
        )
    _recompute_activations(built, model.gradient_checkpointing)
    built.train()  # what transformers loads comes in eval mode
    return built, build_processor(built, tokenizer)


def lora_of(model: ModelSection) -> Lora | None:
    """Return the sizes of the low-rank adapters."""
    return None if model.lora is None else Lora(**model.lora.model_dump(exclude={"merge"}))


def optimizer_groups(model: MoweForConditionalGeneration, training: TrainingSection) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups with the learning rate of each part."""
    part_of = parameter_parts(model)
    if training.lr_per_part.scalars is not None:
        part_of |= dict.fromkeys(scalar_parameters(model), "scalars")
    return parameter_groups(
        model,
        part_of,
        training.learning_rate,
        training.lr_per_part.model_dump(),
        training.weight_decay,
    )


def own_tokenizer(model: ModelSection, train: Index, folder: RunFolder) -> str | None:
    """Return tokenizer.json for a language model with random weights, trained on the training texts; else None.

    The run folder keeps it, so that a resumed run has the same one.
    """
    if not isinstance(model.language_model, InlineConfig) or model.init_from is not None:
        return None
    if not folder.exists("tokenizer.json"):
        rows = train.take(sample_rows(len(train), _TOKENIZER_SAMPLES))
        samples = [sample for sample in read_samples(rows) if isinstance(sample, Sample)]
        texts = [text for sample in samples for text in (sample.instruction, sample.answer)]
        texts += [turn.text for sample in samples for turn in sample.history]
        vocabulary = int(model.language_model.config.get("vocab_size", DEFAULT_VOCABULARY))
        trained = train_tokenizer(texts, vocabulary)
        folder.write_text("tokenizer.json", trained.backend_tokenizer.to_str())
    folder.read_json("tokenizer.json")  # names a damaged file; the library that parses the text does not
    return folder.read_text("tokenizer.json")


def tokenizer_of(model: ModelSection, own: str | None) -> PreTrainedTokenizerBase:
    """Return the language model's tokenizer; `own` is the content of tokenizer.json where it has none."""
    if own is not None:
        return tokenizer_from_json(own)
    source = model.init_from or model.language_model
    assert isinstance(source, str)
    stored_weights(source)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return loaded


def architecture_options(model: ModelSection) -> dict[str, Any]:
    """Return the options that shape weights."""
    return {
        "fusion": model.fusion,
        "latents": model.latents,
        "router_data_independent": model.router.data_independent,
        "router_data_dependent": model.router.data_dependent,
        "router_kind": model.router.kind,
        "router_input": model.router.input,
        "router_hidden": model.router.hidden,
        "router_granularity": model.router.granularity,
        "adapter": model.adapter.kind,
        "downsample": model.adapter.downsample,
    }


def _free_options(model: ModelSection, mowe_loss: MoweLossSection) -> dict[str, Any]:
    """Return the options that shape no weights."""
    return {
        "router_top_k": min(model.router.top_k, max(1, len(model.weak_encoders))),
        "router_temperature": model.router.temperature,
        "router_noise": model.router.noise,
        "router_execution": model.router.execution,
        "pad_audio": model.pad_audio,
        "spec_augment": None if model.spec_augment is None else model.spec_augment.model_dump(),
        "mowe_loss": mowe_loss.kind,
        "mowe_loss_weight": mowe_loss.weight,
        "mowe_loss_parts": mowe_loss.model_dump(include={"confidence", "diversity", "commitment"}),
        "mowe_z_weight": mowe_loss.z_weight,
    }


def _recompute_activations(model: MoweForConditionalGeneration, parts: Sequence[CheckpointedPart]) -> None:
    base, *pool = model.audio_tower.encoders()
    chosen = [base] if "base_encoder" in parts else []
    if "weak_encoders" in parts:
        chosen += pool
    for encoder in chosen:
        encoder.enable_gradient_checkpointing()
    if "language_model" in parts:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})


def _source(checkpoint: str | InlineConfig) -> Source:
    return checkpoint if isinstance(checkpoint, str) else checkpoint.config


def model_dtype(section: ModelSection | GenerationSection, gpu: bool) -> torch.dtype:
    """Return the number format of all weights, on a GPU or on the CPU."""
    if section.dtype == "auto":
        return torch.bfloat16 if gpu else torch.float32
    return torch.float32 if section.dtype == "float32" else torch.bfloat16


def write_export(
    model: MoweForConditionalGeneration,
    processor: MoweProcessor,
    weights: Mapping[str, torch.Tensor],
    folder: RunFolder,
    name: str,
    *,
    merge: bool,
) -> None:
    """Write `model` with all its `weights` to the folder `name` of the run, in place of what was there.

    Args:
        merge: Add LoRA adapters to the weights.
    """
    with tempfile.TemporaryDirectory(prefix="mowe_ray_export_") as local:
        export(model, processor, local, state_dict=weights, merge=merge)
        folder.upload(Path(local), name)
