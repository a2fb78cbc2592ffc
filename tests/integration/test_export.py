"""What a run exports loads with transformers alone, and is the model that was trained."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.end_to_end import ROOT, Finished, tone, trained_model, untrained_model

pytestmark = pytest.mark.slow

# As if the named packages were not installed.
_BLOCKED = """
import sys
from importlib.machinery import PathFinder
finders = list(sys.meta_path)
class Others:
    find_distributions = PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] not in {names!r}:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
sys.meta_path[:] = [Others]
"""

_USE_EXPORT = """
import sys
import numpy, torch
{imports}
from transformers import AutoModel, AutoProcessor
folder, clips, out = sys.argv[1:]
clips = numpy.load(clips)
trust = {trust}
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
model = AutoModel.from_pretrained(folder, trust_remote_code=trust).eval()
questions = ["What emotion does the speaker have?", "Transcribe the speech."]
inputs = processor(instructions=questions, audio=[[clips["one"]], [clips["two"]]])
with torch.no_grad():
    logits = model(**inputs).logits
answers = model.generate(**inputs, max_new_tokens=6, do_sample=False)
numpy.savez(out, logits=logits.numpy(), answers=answers.numpy(), module=type(model).__module__)
print(processor.batch_decode(answers, skip_special_tokens=True))
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & {{"ray", "deepspeed"}}, loaded
"""


@pytest.fixture(scope="module")
def run(quickstart: Finished):
    return Path(quickstart.result["run"])


@pytest.fixture(scope="module")
def clips():
    return {"one": tone(300, 1.2), "two": tone(700, 0.7)}


def _used(export, clips, tmp_path, *, trust, imports="", blocked, environment):
    """Logits, generated tokens and the model class's module, from a process that loads the export."""
    np.savez(tmp_path / "clips.npz", **clips)
    script = _BLOCKED.format(names=sorted(blocked)) + _USE_EXPORT.format(trust=trust, imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", script, export, tmp_path / "clips.npz", tmp_path / "out.npz"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    return out["logits"], out["answers"], str(out["module"])


def _logits(built, clips):
    model, processor = built
    questions = ["What emotion does the speaker have?", "Transcribe the speech."]
    inputs = processor(instructions=questions, audio=[[clips["one"]], [clips["two"]]])
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def test_transformers_alone_gives_the_logits_of_the_trained_model(run, clips, tmp_path):
    """No package of ours can be imported: the code comes from the export itself."""
    logits, answers, module = _used(
        run / "export",
        clips,
        tmp_path,
        trust=True,
        blocked={"mowe_ray", "ray", "deepspeed"},
        environment={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HOME": str(tmp_path)},
    )

    assert module.startswith("transformers_modules.")
    assert answers.shape[0] == 2
    np.testing.assert_allclose(logits, _logits(trained_model(run), clips), atol=1e-5)


def test_with_mowe_ray_imported_no_remote_code_is_needed(run, clips, tmp_path):
    logits, answers, module = _used(
        run / "export",
        clips,
        tmp_path,
        trust=False,
        imports="import mowe_ray.model",
        blocked={"ray", "deepspeed"},
        environment={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )

    assert module == "mowe_ray.model.modeling_mowe"
    assert answers.shape[0] == 2
    np.testing.assert_allclose(logits, _logits(trained_model(run), clips), atol=1e-5)


def test_the_trained_model_is_not_the_untrained_one(run, clips):
    """Otherwise equal logits would prove nothing."""
    difference = np.abs(_logits(trained_model(run), clips) - _logits(untrained_model(run), clips))
    assert difference.max() > 0.1


def test_the_export_holds_safetensors_code_json_and_a_model_card(run):
    suffixes = {path.suffix for path in (run / "export").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".py", ".jinja", ".txt", ".md"}
    assert ".safetensors" in suffixes
    card = (run / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| builtin | transcription | validation score" in card
