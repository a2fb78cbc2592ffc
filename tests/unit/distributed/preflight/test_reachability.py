"""Checkpoints and audio, as far as this machine can read them, and one folder that all write and read."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mowe_ray.config import load_config
from mowe_ray.data.shards.fields import Reading
from mowe_ray.distributed.preflight.reachability import (
    Reach,
    check_folder,
    check_place,
    checkpoint_places,
    reach_audio,
    reach_checkpoint,
    read_probes,
    remove_probes,
    write_probe,
)
from mowe_ray.training.datasets import source_specs
from tests.end_to_end import tone_samples, write_tones
from tests.tiny_runs import TINY


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small language model in several files."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="8KB")
    return tmp_path / "model"


def test_a_whole_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    found = reach_checkpoint(str(checkpoint))
    assert found.problem is None
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert reach_checkpoint(str(tmp_path / "copy")) == found, "a copy is the same checkpoint"
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert reach_checkpoint(str(tmp_path / "copy")).content != found.content


@pytest.mark.parametrize("lost", ["config.json", "model-00001*", "*"])
def test_a_checkpoint_that_lacks_a_file(checkpoint: Path, lost: str) -> None:
    for file in checkpoint.glob(lost):
        file.unlink()
    found = reach_checkpoint(str(checkpoint))
    assert found.content is None
    assert found.fatal
    assert "No such file" in (found.problem or "")


@pytest.mark.slow
def test_a_checkpoint_without_weights(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()
    assert "no weights" in (reach_checkpoint(str(checkpoint)).problem or "")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert reach_checkpoint(str(tmp_path / "absent")) == Reach(problem="there is no such folder")


def test_a_hub_id_is_looked_up_in_the_cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = reach_checkpoint("mowe-ray-tests/not-there")
    assert offline.fatal
    assert "HF_HUB_OFFLINE" in (offline.problem or "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online = reach_checkpoint("mowe-ray-tests/not-there")
    assert not online.fatal
    assert "downloaded" in (online.problem or "")
    snapshot = tmp_path / "hub" / "models--mowe-ray-tests--there"
    shutil.copytree(checkpoint, snapshot / "snapshots" / "abc")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert reach_checkpoint("mowe-ray-tests/there") == reach_checkpoint(str(checkpoint))


@pytest.mark.slow
def test_audio_of_shards_and_of_a_manifest(tmp_path: Path) -> None:
    shards = write_tones(tmp_path / "shards", 24)
    assert (reach_audio(str(shards)).content or "").startswith("3 shards (")
    sample = tone_samples(1)[0]
    (tmp_path / "a.flac").write_bytes(sample.audio or b"")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps({"audio_filepath": "a.flac", "duration": 1.0, "text": "high"}) + "\n")
    assert reach_audio(str(manifest), Reading(task="asr")).problem is None
    (tmp_path / "a.flac").unlink()
    assert "no usable sample" in (reach_audio(str(manifest), Reading(task="asr")).problem or ""), (
        "the list alone is not the audio"
    )


@pytest.mark.slow
def test_a_shard_that_differs_is_another_source(tmp_path: Path) -> None:
    one, two = write_tones(tmp_path / "one", 24), write_tones(tmp_path / "two", 24)
    assert reach_audio(str(one)) == reach_audio(str(two))
    sorted(two.glob("*.tar"))[-1].unlink()
    assert reach_audio(str(one)) != reach_audio(str(two))


def test_audio_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in (reach_audio(str(tmp_path / "absent")).problem or "")
    (tmp_path / "empty").mkdir()
    assert "0 files" in (reach_audio(str(tmp_path / "empty")).problem or "")


def test_machines_are_compared() -> None:
    good, other = Reach("1 shard (aa)"), Reach("1 shard (bb)")
    assert check_place("data.train.0.path", {"a": good, "b": good}, {}, "share it") == []
    (finding,) = check_place("data.train.0.path", {"a": good, "b": other, "c": good}, {}, "share it")
    assert finding.status == "failed"
    assert finding.detail == "data.train.0.path: not the same everywhere: 1 shard (bb) on b; 1 shard (aa) on a, c"
    (finding,) = check_place("model.init_from", {"a": good}, {"b": "no answer within 5 s"}, "share it")
    assert (finding.status, finding.fix) == ("failed", "model.init_from: share it")
    (finding,) = check_place("model.init_from", {"a": Reach(problem="later", fatal=False), "b": good}, {}, "share it")
    assert finding.status == "warning"


def test_every_place_that_a_run_reads_is_named_by_its_key() -> None:
    config = load_config("paper", ["data.train.0.path=x", "data.train.0.task=asr", "data.validation.0.path=y"])
    assert checkpoint_places(config.model) == {
        "model.base_encoder": "openai/whisper-large-v3",
        "model.language_model": "microsoft/Phi-3-mini-4k-instruct",
        "model.weak_encoders.0.checkpoint": "openai/whisper-tiny",
        "model.weak_encoders.1.checkpoint": "openai/whisper-tiny",
        "model.weak_encoders.2.checkpoint": "facebook/hubert-base-ls960",
        "model.weak_encoders.3.checkpoint": "superb/hubert-base-superb-er",
    }
    found = {key: (source.paths, source.task) for key, source in source_specs(config.data).items()}
    assert found == {"data.train.0.path": (("x",), "asr"), "data.validation.0.path": (("y",), None)}
    inline = load_config("quickstart", [*TINY, "training.max_steps=1"])
    assert checkpoint_places(inline.model) == {}
    exported = load_config("paper", ["model.init_from=export"])
    assert checkpoint_places(exported.model) == {"model.init_from": "export"}, "the parts are in the export"


def look(folders: dict[str, Path]):
    """Let each machine write and read its own idea of the folder."""
    for machine, folder in folders.items():
        write_probe(str(folder), "probe", machine)
    seen = {machine: read_probes(str(folder), "probe") for machine, folder in folders.items()}
    for folder in folders.values():
        remove_probes(str(folder), "probe")
    return check_folder("storage", "/runs", dict.fromkeys(folders), seen, {})


def test_all_see_the_same_folder(tmp_path: Path) -> None:
    assert look({"a": tmp_path, "b": tmp_path, "node 1/x": tmp_path}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_looks_elsewhere_is_named(tmp_path: Path) -> None:
    (finding,) = look({"a": tmp_path / "shared", "b": tmp_path / "own", "c": tmp_path / "shared"})
    assert finding.status == "failed"
    assert finding.detail == "storage: /runs is not one folder, these do not see each other's files: a, c | b"
    assert finding.fix.startswith("storage: ")


def test_a_machine_that_cannot_write_but_sees_the_rest(tmp_path: Path) -> None:
    write_probe(str(tmp_path), "probe", "a")
    seen = {machine: read_probes(str(tmp_path), "probe") for machine in ("a", "b")}
    (finding,) = check_folder("storage", "/runs", {"a": None, "b": "Read-only file system"}, seen, {})
    assert finding.detail == "storage: b cannot write to /runs: Read-only file system"


def test_a_machine_that_cannot_read(tmp_path: Path) -> None:
    (finding,) = check_folder("storage", "/runs", {"a": None}, {"a": ["a"]}, {"b": "no answer within 5 s"})
    assert finding.detail == "storage: b cannot read /runs: no answer within 5 s"
