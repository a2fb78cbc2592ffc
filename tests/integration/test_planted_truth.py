"""A study of which the answer is known beforehand: only pools with an encoder of the wave can learn the task."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.end_to_end import run_command
from tests.planted_corpus import TASK, write_planted_corpus

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(2400)]


def test_pool_composition_finds_the_encoder_that_the_task_needs(tmp_path: Path) -> None:
    corpus = write_planted_corpus(tmp_path / "corpus")
    done = run_command(
        "sweeps/pool_composition.yaml",
        f"storage={tmp_path}",
        f"data.train=[{{path: {corpus.train}}}]",
        f"data.validation=[{{path: {corpus.validation}, name: held_out}}]",
        *_SMALL,
        module="mowe_ray.sweep",
        timeout_s=1800,
    )
    assert done.code == 0, done.err
    scores = _mean_scores(tmp_path / "pool_composition")
    assert len(scores) == 6
    best = max(scores, key=lambda pool: scores[pool])
    assert "hubert" in best
    assert scores[best] > 0.9
    assert scores["hubert", "hubert"] > 0.9
    # What hears the power only is left with guessing one of two answers.
    deaf = {pool: score for pool, score in scores.items() if "hubert" not in pool}
    assert set(deaf) == {("ast", "ast"), ("ast", "whisper"), ("whisper", "whisper")}
    assert max(deaf.values()) < 0.65
    assert "hubert matters most in a pool" in done.result["answer"]
    assert "hubert" in done.result["best"]["values"]["model.weak_encoders"]


def test_one_shot_search_ranks_the_pools_that_hear_first(tmp_path: Path) -> None:
    corpus = write_planted_corpus(tmp_path / "corpus")
    done = run_command(
        "sweeps/oneshot.yaml",
        f"storage={tmp_path}",
        f"data.train=[{{path: {corpus.train}}}]",
        f"data.validation=[{{path: {corpus.validation}, name: held_out}}]",
        *_SMALL,
        "space={model.weak_encoders: {subsets: {of: all, sizes: [1, 2, 3]}}}",
        "training.max_steps=300",  # a clip has hubert half of the time
        "training.mowe_loss.weight=0.01",  # at 0.1 the router is sure of another member before hubert is of any use
        "search.calibrate=5",
        "seeds=[0]",
        module="mowe_ray.sweep",
        timeout_s=1800,
    )
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "oneshot" / "pools" / "trial-0000" / "scores.json").read_text())["pools"]
    scores = {tuple(sorted(row["members"])): row["score"] for row in rows}
    assert len(scores) == 8
    assert min(scores[pool] for pool in scores if "hubert" in pool) > 0.8
    assert max(scores[pool] for pool in scores if "hubert" not in pool) < 0.65
    calibration = done.result["one_shot"]
    assert [("hubert" in row["pool"]) for row in calibration["pools"]] == [True] * 4 + [False] * 3
    assert sum(row["alone"] is not None for row in calibration["pools"]) == 5
    assert calibration["tau"]["value"] > 0
    assert set(calibration["baselines"]) >= {"a random order", "LogME of the untrained encoders"}
    assert "hubert" in done.result["best"]["values"]["model.weak_encoders"]


def _mean_scores(study: Path) -> dict[tuple[str, ...], float]:
    """Return the mean over seeds of the last validation's score, by the names in the pool."""
    scores: dict[tuple[str, ...], list[float]] = {}
    for file in study.glob("trial-*/trial.json"):
        trial: dict[str, Any] = json.loads(file.read_text())
        assert trial["status"] == "finished"
        pool = tuple(sorted(trial["values"]["model.weak_encoders"]))
        scores.setdefault(pool, []).append(trial["tasks"][TASK]["score"])
    assert {len(found) for found in scores.values()} == {2}
    return {pool: fmean(found) for pool, found in scores.items()}


# Everything that makes the shipped study a matter of minutes; its space keeps its form.
_SMALL = (
    "model.weak_encoders=[]",  # so that the study's own encoders are the whole library
    "encoders.whisper={train: full, checkpoint: {config: {model_type: whisper, d_model: 16, encoder_layers: 1, "
    "encoder_attention_heads: 2, encoder_ffn_dim: 32, num_mel_bins: 20}}}",
    "encoders.ast={train: full, checkpoint: {config: {model_type: audio-spectrogram-transformer, hidden_size: 16, "
    "num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, num_mel_bins: 32, max_length: 128, "
    "patch_size: 16, time_stride: 16, frequency_stride: 16}}}",
    "encoders.hubert={train: full, checkpoint: {config: {model_type: hubert, hidden_size: 16, num_hidden_layers: 1, "
    "num_attention_heads: 2, intermediate_size: 32, conv_dim: [8, 8, 8, 8, 8, 8, 8], num_conv_pos_embeddings: 16, "
    "num_conv_pos_embedding_groups: 2}}}",
    "model.base_encoder.config={model_type: whisper, d_model: 16, encoder_layers: 1, encoder_attention_heads: 2, "
    "encoder_ffn_dim: 32, num_mel_bins: 20}",
    "model.language_model.config={model_type: llama, vocab_size: 300, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 512}",
    "space={model.weak_encoders: {subsets: {of: all, sizes: [2]}, repeats: {of: all, times: [2]}}}",
    "training.epochs=null",
    "training.max_steps=150",
    "training.eval_every=0",
    "training.learning_rate=3e-3",
    "training.warmup_steps=20",
    "data.max_batch_size=16",
)
