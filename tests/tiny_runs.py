"""Whole runs of the real trainer that take seconds: a small corpus and a configuration for it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mowe_ray.config import RunConfig, load_config
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus import builtin_samples

TINY = [
    "model.base_encoder.config={model_type: whisper, d_model: 16, encoder_layers: 1, encoder_attention_heads: 2, "
    "encoder_ffn_dim: 32, num_mel_bins: 20}",
    "model.weak_encoders=[{name: whisper, train: full, checkpoint: {config: {model_type: whisper, d_model: 16, "
    "encoder_layers: 1, encoder_attention_heads: 2, encoder_ffn_dim: 32, num_mel_bins: 20}}}, "
    "{name: hubert, train: full, checkpoint: {config: {model_type: hubert, hidden_size: 16, num_hidden_layers: 1, "
    "num_attention_heads: 2, intermediate_size: 32, conv_dim: [8, 8, 8, 8, 8, 8, 8], num_conv_pos_embeddings: 16, "
    "num_conv_pos_embedding_groups: 2}}}]",
    "model.language_model.config={model_type: llama, vocab_size: 300, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 512}",
    "data.max_batch_size=4",
    "training.epochs=null",
    "training.schedule=constant",
    "training.warmup_steps=0",
    "training.log_every=1",
]

# Of the run that others are compared with (the fixture `reference`). Its weights are sharded (ZeRO stage 3), so a lost
# worker takes a part of them along; five steps are an epoch.
REFERENCE = [
    "compute.num_workers=2",
    "compute.zero_stage=3",
    "training.max_steps=16",
    "training.save_every=4",
    "training.eval_every=6",
    "training.clip_norm=0.5",
    "training.log_samples=true",
]


@dataclass(frozen=True)
class Corpus:
    """Folders with the shards of a small corpus."""

    train: Path
    validation: Path


def write_corpus(folder: Path) -> Corpus:
    """Write a small built-in corpus below `folder`, the training part in several shards."""
    corpus = Corpus(folder / "train", folder / "validation")
    write_webdataset(builtin_samples("train", 40), str(corpus.train), shard_bytes=400_000)
    write_webdataset(builtin_samples("validation", 10), str(corpus.validation))
    return corpus


def tiny_arguments(corpus: Corpus, storage: Path, name: str) -> list[str]:
    """Overrides that make the quickstart a run with a smaller model on `corpus`."""
    data = [
        f"data.train=[{{path: {corpus.train}}}]",
        f"data.validation=[{{path: {corpus.validation}, name: held_out}}]",
    ]
    return [*TINY, *data, f"storage={storage}", f"name={name}"]


def tiny_config(corpus: Corpus, storage: Path, name: str, *overrides: str) -> RunConfig:
    """Configure a run of the quickstart with a smaller model on `corpus`."""
    return load_config("quickstart", [*tiny_arguments(corpus, storage, name), *overrides])


def records(run: str, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind in the metrics of the run folder `run`."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def exported_weights(run: str) -> dict[str, torch.Tensor]:
    """Return the weights a finished run exported."""
    return {n: w for file in sorted((Path(run) / "export").glob("*.safetensors")) for n, w in load_file(file).items()}


def assert_same_run(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """No sample is lost or repeated, every step is in the metrics once with the same numbers, all weights are equal."""
    assert result["steps"] == expected["steps"]
    assert result["tasks"] == expected["tasks"]
    assert result["samples"] == {"lost": 0, "repeated": 0} == expected["samples"]
    samples, expected_samples = ((Path(run["run"]) / "samples.jsonl").read_text() for run in (result, expected))
    assert samples == expected_samples
    for name in ("step", "loss", "lm_loss", "routing_loss", "grad_norm"):
        numbers, expected_numbers = ([r[name] for r in records(run["run"], "train")] for run in (result, expected))
        assert numbers == expected_numbers, name
    weights, expected_weights = exported_weights(result["run"]), exported_weights(expected["run"])
    assert weights.keys() == expected_weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []
