"""Runs with a cache of decoded audio and frozen features: the same training, computed once."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mowe_ray.config import RunConfig
from mowe_ray.data.cached_shards import open_cached
from mowe_ray.data.feature_cache import FeatureCache
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.distributed.ray_data.feature_extraction import fill_cache
from mowe_ray.distributed.ray_train.driver import train
from mowe_ray.model.hidden_states import chosen_layers
from mowe_ray.training.collate import padded
from mowe_ray.training.datasets import index_sources
from mowe_ray.training.frozen_features import frozen_encoders, load_frozen
from tests.tiny_models import save_encoder_checkpoint, tiny_whisper_config
from tests.tiny_runs import Corpus, assert_same_run, records, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS = 5
# Always 30 s: a clip then has the same padding in every batch and in the cache. A pool member that reads all layers is
# frozen like the base, the other one is trained.
SETTINGS = (
    *("model.train_base=frozen", "model.pad_audio=full30", "model.router.top_k=2"),
    *("model.weak_encoders.0.train=frozen", "model.weak_encoders.0.features=weighted_sum"),
    *("data.shuffle_buffer=16", f"training.max_steps={STEPS}", "training.log_samples=true"),
    *("training.save_every=1", f"training.keep_checkpoints={STEPS}"),
)
TWO_WORKERS = ("compute.num_workers=2", "compute.zero_stage=2")
NUMBERS = ("loss", "lm_loss", "routing_loss", "grad_norm")

# bfloat16 keeps 8 bits: a feature moves by at most 2^-9 of itself, up or down at random. If the rest of the network
# passes that on in proportion, no loss moves by more than 2^-9 of itself; as the errors average out, it is far less.
BF16_TOLERANCE = 2**-9
# The gradients of what reads the features are linear in them, and so are AdamW's first moments after one step. The
# update is not: where a gradient nearly vanishes, AdamW moves a weight as far as any other, in a direction that
# rounding decides (two of 2,304 weights of the adapter had 0.89 of the squared difference of all), and later gradients
# follow. A data-dependent router's is a product of three that have been rounded: its input, the members' features that
# it weighs, and the gradient that comes back to their sum. To first order relative errors of a product add up.


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def _train(corpus: Corpus, storage: Path, name: str, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return train(tiny_config(corpus, storage, name, *SETTINGS, *overrides), said.append), said


def _first_moments(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """AdamW's first moments after a run's first step, each in the slices of the ranks one after the other."""
    slices: dict[str, list[torch.Tensor]] = {}
    for file in sorted(Path(result["run"]).glob("checkpoints/*1/*.safetensors")):
        for name, values in load_file(file).items():
            if name.startswith("exp_avg/"):
                slices.setdefault(name, []).append(values.flatten())
    return {name: torch.cat(parts) for name, parts in slices.items()}


def _cache(storage: Path) -> str:
    return f"data.feature_cache={storage / 'cache'}"


def _files(storage: Path) -> dict[Path, int]:
    """Every file of the cache and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (storage / "cache").rglob("*") if path.is_file()}


def _about(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith(("feature_cache", "features of", "decoded audio"))]


def _curve(result: dict[str, Any]) -> dict[str, list[float]]:
    return {name: [record[name] for record in records(result["run"], "train")] for name in NUMBERS}


@pytest.fixture(scope="module")
def plain(ray_cluster: None, tiny_corpus: Corpus, storage: Path) -> dict[str, Any]:
    """A run on two workers without a cache."""
    return _train(tiny_corpus, storage, "plain", *TWO_WORKERS)[0]


@pytest.fixture(scope="module")
def first(ray_cluster: None, tiny_corpus: Corpus, storage: Path) -> tuple[dict[str, Any], list[str], dict[Path, int]]:
    """The first run with a cache, what it said, and the files it left."""
    result, said = _train(tiny_corpus, storage, "first", *TWO_WORKERS, _cache(storage))
    return result, said, _files(storage)


def indexes_of(config: RunConfig) -> list[Index]:
    sources = index_sources(config.data)
    return [sources.train, *sources.validation.values()]


def test_two_passes_at_once_fill_it_with_each_clips_own_features(tiny_corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_corpus, tmp_path, "unused", *SETTINGS, "model.pad_audio=bucket", f"data.feature_cache={tmp_path / 'cache'}"
    )
    indexes = indexes_of(config)

    def fill(_: int) -> FeatureCache | None:
        return fill_cache(config, indexes, lambda _: None)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(fill, range(2))
    assert one == other is not None
    assert not list(tmp_path.rglob("*.part"))
    note = next((tmp_path / "cache/encoders").glob("*.json"))
    whole = note.read_text()
    note.write_bytes(b"")  # as a power failure may leave it
    assert fill(0) == one
    assert note.read_text() == whole
    frozen = {encoder.encoder_index: encoder for encoder in frozen_encoders(config.model)[0]}
    loaded = load_frozen(config.model, list(frozen.values()), seed=config.seed, gpu=False)
    limits = config.data.min_duration_s, config.data.max_duration_s
    for index in indexes:
        order = torch.randperm(len(index)).numpy()
        found, expected = one.load(index.table.take(order)), load_micro_batch(index.table.take(order), *limits)
        assert (found.ids, found.audio.tolist()) == (expected.ids, expected.audio.tolist())
        clips = [torch.from_numpy(clip) for row in expected.clips() for clip in row]
        for features in found.features:
            encoder, states = loaded[features.encoder_index], padded(features)
            for wave, known in zip(clips, states, strict=True):
                length = torch.tensor([len(wave)])
                inputs = encoder.front_end(wave[None], length, encoder.pad_samples(len(wave), "bucket"))
                layers = chosen_layers(encoder, frozen[features.encoder_index].features, inputs, length)
                exact = torch.stack(layers, 1)[0, :, : encoder.num_frames(len(wave))]
                # Half a step of bfloat16 is 2^-9; near zero, float32 sums over a batch in another order count too.
                error = (known[:, : exact.shape[1]].float() - exact).abs()
                assert (error <= 2**-8 * exact.abs() + 1e-5).all()


def test_a_full_disk_is_told_and_leaves_no_halves(tiny_corpus: Corpus, tmp_path: Path, small_disk: Path) -> None:
    cache = f"data.feature_cache={small_disk / 'cache'}"
    config = tiny_config(tiny_corpus, tmp_path, "unused", *SETTINGS, cache)
    with pytest.raises(ValueError, match=r"data\.feature_cache: .*No space left on device"):
        fill_cache(config, indexes_of(config), lambda _: None)
    assert not list(small_disk.rglob("*.part"))
    with pytest.raises(ValueError, match="cannot read a checkpoint from '/no/such/folder'"):
        fill_cache(
            tiny_config(tiny_corpus, tmp_path, "unused", *SETTINGS, cache, "model.base_encoder=/no/such/folder"),
            indexes_of(config),
            lambda _: None,
        )


def test_a_cached_run_has_the_losses_of_one_that_computes(plain: dict[str, Any], first: Any, storage: Path) -> None:
    result, said, files = first
    expected, found = _curve(plain), _curve(result)
    for name, values in expected.items():
        differences = [abs(a - b) / abs(a) for a, b in zip(values, found[name], strict=True)]
        print(f"{name}: cached and not, largest relative difference {max(differences):.1e}")
        assert max(differences) <= BF16_TOLERANCE, name
        assert max(differences) > 0, "features are rounded: equal numbers would mean that the cache is not read"
    moments, expected_moments = _first_moments(result), _first_moments(plain)
    assert moments.keys() == expected_moments.keys()
    errors = {
        name: float((moments[name] - moment).norm() / moment.norm())
        for name, moment in expected_moments.items()
        if not name.endswith("k_proj.bias")  # zero but for rounding: softmax ignores it
    }
    print(f"first moments, cached and not, largest relative difference {max(errors.values()):.1e}")
    bounds = {name: (3 if "dependent_router" in name else 1) * BF16_TOLERANCE for name in errors}
    assert {name: error for name, error in errors.items() if not error <= bounds[name]} == {}
    losses = [records(run["run"], "validation")[-1]["loss"] for run in (plain, result)]
    assert losses[1] == pytest.approx(losses[0], rel=BF16_TOLERANCE)
    samples = [(Path(run["run"]) / "samples.jsonl").read_text() for run in (plain, result)]
    assert samples[0] == samples[1]
    shards = len({path.name for path in files if path.suffix == ".arrow"})
    assert shards > 3
    assert len([path for path in files if path.suffix == ".arrow"]) == 3 * shards  # audio, base, the frozen member
    assert _about(said)[:2] == [
        "feature_cache: hubert is trained (full), so its features are computed every time",
        "feature_cache: decoded audio, features of base_encoder, features of whisper: "
        f"0 of {shards} shards found in {storage / 'cache'}",
    ]
    clips = sum(len(open_cached(str(path)).lengths) for path in files if path.parent.name.startswith("audio"))
    assert _about(said)[-1].startswith(f"features of base_encoder, whisper: {2 * clips:,} features, ")


@pytest.mark.soak  # one more run
def test_the_next_run_computes_nothing_and_repeats_the_first(first: Any, tiny_corpus: Corpus, storage: Path) -> None:
    expected, _, files = first
    result, said = _train(tiny_corpus, storage, "second", *TWO_WORKERS, _cache(storage))
    assert_same_run(result, expected)
    assert _files(storage) == files
    (line,) = _about(said)[1:]
    shards = len([path for path in files if path.parent.name.startswith("audio")])
    assert f": {shards} of {shards} shards found in " in line


@pytest.mark.soak
def test_one_worker_recomputes_what_is_missing_and_equals_two(first: Any, tiny_corpus: Corpus, storage: Path) -> None:
    """A killed pass leaves some files out, and half a file under another name."""
    expected, _, files = first
    lost = sorted(path for path in files if path.suffix == ".arrow" and not path.parent.name.startswith("audio"))[0]
    content = lost.read_bytes()
    lost.unlink()
    half = lost.with_name(f"{lost.name}.0.part")
    half.write_bytes(content[: len(content) // 2])
    overrides = ("training.gradient_accumulation=2", "compute.zero_stage=0", _cache(storage))
    result, said = _train(tiny_corpus, storage, "one_worker", *overrides)
    half.unlink()
    now = _files(storage)
    assert {path for path in files if now[path] != files[path]} == {lost}
    assert lost.read_bytes() == content
    assert now.keys() == files.keys()
    assert ": 1 shards, " in _about(said)[-1]
    for name, values in _curve(expected).items():  # sums in another order: see test_resume
        assert _curve(result)[name] == pytest.approx(values, rel=1e-4), name
    assert result["tasks"] == expected["tasks"]


@pytest.mark.soak  # one more run, of another ZeRO stage
def test_shards_of_weights_read_the_same_features(first: Any, tiny_corpus: Corpus, storage: Path) -> None:
    """No rank gathers a frozen encoder that the others do not: else this run would hang."""
    expected, *_ = first
    result, said = _train(
        tiny_corpus, storage, "sharded", "compute.num_workers=2", "compute.zero_stage=3", _cache(storage)
    )
    assert "features of base_encoder, " not in " ".join(_about(said)[2:])
    for name, values in _curve(expected).items():
        found = _curve(result)[name]
        differences = [abs(a - b) / abs(a) for a, b in zip(values, found, strict=True)]
        print(f"{name}: ZeRO 3 and 2, largest relative difference {max(differences):.1e}")
        assert max(differences) <= 1e-5, name
    assert result["tasks"] == expected["tasks"]


@pytest.mark.soak
def test_weights_that_changed_in_secret_stop_the_run(tiny_corpus: Corpus, tmp_path: Path) -> None:
    """Size and time of the checkpoint's files stay, as where a file is copied over and its old time is set again."""
    folder = tmp_path / "whisper"
    save_encoder_checkpoint(folder, tiny_whisper_config(), seed=0)
    cache = f"data.feature_cache={tmp_path / 'cache'}"
    config = tiny_config(
        *(tiny_corpus, tmp_path, "changed", *SETTINGS, cache),
        *(f"model.base_encoder={folder}", "model.weak_encoders=[]", "model.router.top_k=1"),
    )
    assert fill_cache(config, indexes_of(config), lambda _: None) is not None
    times = {file: file.stat() for file in folder.iterdir()}
    save_encoder_checkpoint(folder, tiny_whisper_config(), seed=1)
    for file, before in times.items():
        assert file.stat().st_size == before.st_size
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="features of other weights than those loaded now for base_encoder"):
        train(config, lambda _: None)
