"""Caches took another model for the one they knew: equal sizes and times, other decoders, another tokenizer.

Report: lisa-lab/pylearn2#870 (an older copy of a dataset of the same name).
"""

import os
from pathlib import Path

import numpy as np
import pytest

from mowe_ray.config.model_section import ModelSection
from mowe_ray.data.feature_cache import shard_rows
from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.evaluation.targets import export_version, folder_at
from mowe_ray.training.frozen_features import FrozenEncoder, origin_key
from tests.read_source import CLIP, note, write_tar
from tests.tiny_models import save_encoder_checkpoint, tiny_language_model_config, tiny_whisper_config


def key_of(folder: Path) -> str:
    section = ModelSection(
        base_encoder={"config": tiny_whisper_config()},
        language_model={"config": tiny_language_model_config("llama")},
    )
    return origin_key(section, FrozenEncoder("weak", 1, str(folder), "last"), seed=0, gpu=False)


def replace_byte(file: Path, at: int) -> None:
    """Change one byte, and put the time of the last change back."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_weights_of_equal_size_and_time_are_other_weights(tmp_path: Path, place: str) -> None:
    save_encoder_checkpoint(tmp_path, tiny_whisper_config(), shard_size="1GB")
    weights = tmp_path / "model.safetensors"
    before = key_of(tmp_path)
    assert key_of(tmp_path) == before
    size = weights.stat().st_size
    replace_byte(weights, {"first": size // 4, "middle": size // 2, "last": size - 1}[place])
    assert key_of(tmp_path) != before


def test_large_files_are_known_by_blocks_all_over_them(tmp_path: Path) -> None:
    save_encoder_checkpoint(tmp_path, tiny_whisper_config(), shard_size="1GB")
    large = tmp_path / "other.bin"
    np.random.default_rng(0).integers(0, 256, 40 << 20, np.uint8).tofile(large)
    before = key_of(tmp_path)
    replace_byte(large, (40 << 20) // 256 * 100)
    assert key_of(tmp_path) != before


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_answers_of_another_file_of_an_export_are_other_answers(tmp_path: Path, file: str) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    export = folder_at(str(tmp_path))
    before = export_version(export)
    assert export_version(export) == before
    replace_byte(tmp_path / file, 30)
    assert {name for name, version in export_version(export).items() if version != before[name]} == {file}


def test_decoded_audio_of_other_decoders_is_other_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tar(tmp_path / "a.tar", ("a.wav", CLIP), ("a.json", note()))
    index = build_index([SourceSpec("s", str(source))], tmp_path, min_s=0.1, max_s=30.0)

    def key() -> str:
        [(found, _)] = shard_rows(index, 0.1, 30.0).values()
        return found

    before = key()
    assert key() == before
    for module in ("av", "soxr"):
        with monkeypatch.context() as patched:
            patched.setattr(f"{module}.__version__", "0.0.1")
            assert key() != before
    assert key() == before
