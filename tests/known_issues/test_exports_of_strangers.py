"""Exports that somebody else made or that were damaged: code that was offered to be run, files that no error named.

Reports: huggingface/transformers#46483, huggingface/sentence-transformers#3801 (code of a local folder).
"""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mowe_ray.model import MoweProcessor
from mowe_ray.model.building import load_model
from mowe_ray.model.encoders import stored_weights
from mowe_ray.model.export import export, open_exported
from tests.ranks import make_model
from tests.tiny_models import tiny_tokenizer

_EVIL = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path(__file__).parent.joinpath("ran").touch()
Path({marker!r}).touch()
class Evil(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    MoweProcessor(tiny_tokenizer(chat_template=True)).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.slow
def test_nobody_is_asked_to_run_the_code_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """On a terminal, transformers asks, and a "y" typed for something else was an answer."""
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(_EVIL.format(marker=str(marker)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    script = f"from mowe_ray.model import MoweProcessor; MoweProcessor.from_pretrained({str(folder)!r})"
    ours, theirs = pty.openpty()
    try:
        child = subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
        os.write(ours, b"y\n" * 3)
        _, said = child.communicate(timeout=120)
        os.set_blocking(ours, False)
        shown = os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert not marker.exists()
    assert "Do you wish to run" not in shown
    assert child.returncode == 0 or "trust_remote_code" in said.decode()


def test_the_answer_to_the_question_is_not_saved(folder: Path, tmp_path: Path) -> None:
    MoweProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert all("trust_remote_code" not in file.read_text() for file in (tmp_path / "again").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "export"
    export(*make_model(), folder)
    return folder


@pytest.mark.parametrize("left", [0, 4, 60, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_truncated_file_is_named(whole: Path, tmp_path: Path, name: str, left: int) -> None:
    damaged = tmp_path / "export"
    shutil.copytree(whole, damaged)
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[:left].removesuffix(b"}"))
    for read in (open_exported, load_model):
        with pytest.raises(ValueError, match="is cut or damaged") as error:
            read(str(damaged))
        assert f"{damaged / name} is" in str(error.value)


@pytest.mark.slow
def test_files_that_nobody_reads_may_be_anything(whole: Path, tmp_path: Path) -> None:
    """An unrelated JSON that was damaged had the folder refused, and a large one was parsed at each opening."""
    shutil.copytree(whole, tmp_path / "export")
    (tmp_path / "export" / "trainer_state.json").write_text('{"log_history": [')
    (tmp_path / "export" / "optimizer.safetensors").write_bytes(b"no tensors")
    assert stored_weights(str(tmp_path / "export")) == stored_weights(str(whole)) != set()
    assert load_model(str(tmp_path / "export"))
