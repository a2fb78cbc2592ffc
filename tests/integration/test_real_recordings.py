"""Human speech from a corpus's own files to a trained model: prepared in both formats, trained from both."""

import json

import pytest

from mowe_ray.prepare import main as prepare
from mowe_ray.train import main as train
from tests.real_recordings import takes, write_recordings
from tests.tiny_runs import records

pytestmark = pytest.mark.slow

# Enough to see it learn; docs/results.md has the run that goes on until the held-out accuracy stops rising.
_STEPS = 130
_VARIANTS = 9


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Folder with train/ and held-out/, each holding the recordings and a manifest of them."""
    root = tmp_path_factory.mktemp("recordings")
    write_recordings(root / "train", held_out=False, variants=_VARIANTS)
    write_recordings(root / "held-out", held_out=True)
    return root


def _prepare(recordings, side, shards, capsys):
    """Pack one side: WebDataset from the manifest, Parquet from the folder whose file names give the words."""
    out = recordings / f"{side}-{shards}"
    source = [recordings / side / "manifest.jsonl"]
    if shards == "parquet":
        source = [recordings / side, "--kind", "folders", "--label-from", "stem"]
    arguments = [*source, "--task", "asr", "--format", shards, "--shard-size-mb", 2, "--out", out]
    assert prepare([str(argument) for argument in arguments]) == 0
    return out, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_two_sides_share_prompts_but_no_recording():
    training, held_out = takes(held_out=False), takes(held_out=True)
    assert {text for text, _ in held_out} == {text for text, _ in training}
    files = [path.read_bytes() for _, path in (*training, *held_out)]
    assert len(set(files)) == len(files)


@pytest.mark.soak
@pytest.mark.parametrize("shards", ["webdataset", "parquet"])
def test_training_on_real_speech_generalises_to_held_out_recordings(shards, recordings, ray_cluster, tmp_path, capsys):
    train_path, train_packed = _prepare(recordings, "train", shards, capsys)
    held_out_path, held_out_packed = _prepare(recordings, "held-out", shards, capsys)
    assert (train_packed["samples"], held_out_packed["samples"]) == (40 * (1 + _VARIANTS), 36)
    assert (train_packed["bad"], held_out_packed["bad"]) == (0, 0)

    code = train(
        [
            *("name=speech", f"storage={tmp_path}", f"training.max_steps={_STEPS}", "training.epochs=null"),
            f"data.train=[{{path: {train_path}}}]",
            f"data.validation=[{{path: {held_out_path}, name: held-out}}]",
            *("training.learning_rate=2e-3", "training.save_every=0", "training.log_every=10"),
        ]
    )

    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(printed.out.splitlines()[-1])
    scores = result["tasks"]["asr"]
    losses = [record["lm_loss"] for record in records(result["run"], "train")]
    assert losses[-1] < losses[0] / 3
    assert scores["score"] > scores["majority"] + 0.05
    report = json.loads((tmp_path / "speech" / "data_report.json").read_text())
    assert (report["samples"], report["bad"]) == (40 * (1 + _VARIANTS) + 36, 0)
