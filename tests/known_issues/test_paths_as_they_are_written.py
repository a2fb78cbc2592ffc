"""Folders with brackets were taken for patterns, and `~` in keys and manifests for a folder of that name.

https://github.com/huggingface/datasets/issues/7468 is about brackets.
"""

import json
import os
from pathlib import Path

import pytest

from mowe_ray.config import load_config
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards import list_shards
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.prepare import main
from tests.audio_files import by_sndfile
from tests.read_source import CLIP, note, read_source, write_tar

WAV = by_sndfile("WAV", "PCM_16", seconds=1.0)
NAMES = [
    "run [v1]",
    "[x]",
    "a*b",
    "what?",
    "with space",
    "[!a-z]",
    "größe",
    "x{1,2}",
    "100%",
    "a#b",
    "a::b",
    "-dash",
    "[",
    "][",
]


def ids(path: str, cache: Path) -> list[str]:
    index = build_index([SourceSpec("made", path, "asr")], cache, min_s=0.1, max_s=30.0)
    return load_micro_batch(index.table, 0.1, 30.0).ids


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name
    samples = [Sample(f"s{n}", WAV, "Write.", "hello", "asr", "made") for n in range(3)]
    write_webdataset(iter(samples), str(folder), shard_bytes=2 * len(WAV))
    for path in (str(folder), f"{folder}/", f"{folder}/*.tar", f"file://{folder}", f"{folder}/0000[01].tar"):
        assert ids(path, tmp_path / "cache") == ["s0", "s1", "s2"]
    assert ids(f"{folder}/00001.tar", tmp_path / "cache") == ["s2"]
    assert len(list_shards(f"{tmp_path}/*/00001.tar")) == 1
    (folder / "m.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "hello"}))
    (folder / "a.wav").write_bytes(WAV)
    assert ids(str(folder / "m.jsonl"), tmp_path / "cache") == ["a.wav"]
    assert main([str(folder / "m.jsonl"), "--out", str(tmp_path / f"out {name}"), "--task", "asr"]) == 0
    assert ids(str(tmp_path / f"out {name}"), tmp_path / "cache") == ["a.wav"]


@pytest.mark.parametrize("storage", NAMES)
def test_a_run_folder_of_any_name(tmp_path, storage):
    folder = RunFolder(str(tmp_path / storage), "run")
    folder.write_text("a/b.json", "1")
    folder.write_text("a/b.json", "2")
    folder.append_text("a/lines", "x\n")
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "f").write_text("3")
    folder.upload(tmp_path / "up", "u")
    folder.upload(tmp_path / "up", "u")
    assert folder.names("") == ["a", "u"]
    assert (folder.read_text("a/b.json"), folder.read_text("u/f"), folder.read_lines("a/lines")) == ("2", "3", ["x\n"])
    folder.fetch("u/f", tmp_path / "down")
    assert (tmp_path / "down").read_text() == "3"
    folder.remove("a")
    assert folder.names("") == ["u"]
    folder.remove("")
    assert not folder.exists()


@pytest.fixture
def home(tmp_path):
    """A home folder with a corpus in it."""
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.wav").write_bytes(WAV)
    (tmp_path / "corpus" / "m.jsonl").write_text(json.dumps({"audio": "~/corpus/a.wav", "text": "hello", "id": "s"}))
    yield tmp_path
    os.environ["HOME"] = before or ""


@pytest.mark.parametrize("path", ["~/corpus/m.jsonl", "~/corpus", "~/corpus/*.jsonl", "file://~/corpus/m.jsonl"])
def test_home_in_a_data_path_and_in_a_manifest(home, path):
    assert ids(path, home / "cache") == ["s"]


@pytest.mark.slow
def test_home_in_the_arguments_of_prepare(home):
    assert main(["~/corpus/m.jsonl", "--out", "~/shards", "--task", "asr"]) == 0
    assert (home / "shards" / "00000.tar").exists()
    assert ids("~/shards", home / "cache") == ["s"]


def test_home_in_every_key_that_is_a_path(home):
    keys = ("storage", "data.train.0.path", "data.feature_cache", "model.init_from", "model.base_encoder")
    config = load_config("quickstart", [f"{key}=~/x" for key in (*keys, "model.language_model")])
    values = (config.storage, config.data.train[0].path, config.data.feature_cache, config.model.init_from)
    assert {*values, config.model.base_encoder, config.model.language_model} == {str(home / "x")}
    assert RunFolder("~/x", "run").url == str(home / "x" / "run")
    for kept in ("s3://bucket/~/x", "openai/whisper-tiny"):
        assert load_config("quickstart", [f"model.base_encoder={kept}"]).model.base_encoder == kept
    (home / "mine.yaml").write_text("preset: quickstart\nname: mine\n")
    assert load_config("~/mine.yaml").name == "mine"


def test_links_to_shards_are_shards(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, where every file of a snapshot is a link."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shard = write_tar(tmp_path / "blobs/0123", ("a.flac", CLIP), ("a.json", note()))
    (tmp_path / "snapshot/a.tar").symlink_to(shard)
    (tmp_path / "snapshot/b.tar").symlink_to(tmp_path / "nowhere")
    assert list_shards(str(tmp_path / "snapshot")) == [str(tmp_path / "snapshot/a.tar")]
    assert read_source(tmp_path / "snapshot", tmp_path / "cache").answers == ["a tone"]


def test_links_to_folders_of_clips_are_followed_once(tmp_path: Path) -> None:
    """Half of the classes were passed over without a word where their folders are links."""
    for label in ("high", "low"):
        (tmp_path / "elsewhere" / label).mkdir(parents=True)
        (tmp_path / "elsewhere" / label / "a.wav").write_bytes(CLIP)
    (tmp_path / "data/high").mkdir(parents=True)
    (tmp_path / "data/high/a.wav").write_bytes(CLIP)
    (tmp_path / "data/low").symlink_to(tmp_path / "elsewhere/low")
    (tmp_path / "data/high/again").symlink_to(tmp_path / "data")
    found = read_source(tmp_path / "data", tmp_path / "cache", "asr")
    assert sorted(found.answers) == ["high", "low"]
