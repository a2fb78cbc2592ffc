"""`python -m mowe_ray.prepare` on the paper's corpora in miniature."""

import json
import tarfile

import pyarrow.parquet as pq
import pytest

from mowe_ray.data.corpora.registry import KINDS
from mowe_ray.data.shards import list_shards, scan_shard
from mowe_ray.prepare import main
from tests.tiny_corpora import CORPORA, meld

# Good and bad samples of each miniature's split, and the references of the first.
EXPECTED = {
    "common-voice": (1, 1, None),
    "audiocaps": (1, 1, [f"Water, in words {n}" for n in range(5)]),
    "wavcaps": (1, 1, None),
    "clotho-aqa": (2, 2, ["yes"]),
    "iemocap": (2, 1, None),
    "meld": (2, 1, None),
    "slue-sqa5": (1, 1, ["she", "she of course"]),
    "spoken-squad": (2, 1, ["broncos", "denver broncos"]),
}


def _stop(arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_becomes_shards_without_being_told_what_it_is(tmp_path, capsys, name):
    make, split = CORPORA[name]
    make(tmp_path / "source")
    out = tmp_path / "out"
    assert main([str(tmp_path / "source"), "--split", split, "--out", str(out)]) == 0
    samples, bad, references = EXPECTED[name]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["samples"], result["bad"]) == (samples, bad)
    rows = [row for shard in list_shards(str(out)) for row in scan_shard(shard).to_pylist()]
    assert len({row["id"] for row in rows}) == samples
    assert {row["task"] for row in rows} == {KINDS[name].task}
    assert all(row["cause"] is None and row["duration_s"] > 0.3 for row in rows)
    with tarfile.open(out / "00000.tar") as shard:
        assert all(member.name.endswith((".json", ".wav", ".flac", ".mp3", ".ogg")) for member in shard)
        first = json.load(shard.extractfile("000000000.json"))
    assert first.get("references") == references
    report = json.loads((out / "data_report.json").read_text())
    assert "no_audio" in report["sources"]["source"]["causes"]


def test_the_answer_of_meld_may_be_the_sentiment(tmp_path):
    meld(tmp_path / "meld")
    arguments = [tmp_path / "meld", "--split", "test", "--label-from", "sentiment", "--format", "parquet"]
    assert main([str(argument) for argument in [*arguments, "--out", tmp_path / "out"]]) == 0
    written = pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()
    assert [(row["id"], row["answer"]) for row in written] == [("dia0_utt0", "negative"), ("dia0_utt1", "negative")]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("meld", [], "--split is needed, for meld has a part for testing: train, dev, test"),
        ("meld", ["--split", "validation"], "--split validation: meld has train, dev, test"),
        ("meld", ["--split", "dev"], "no dev_sent_emo.csv in it"),
        ("meld", ["--split", "test", "--label-from", "stem"], "with kind meld it is emotion or sentiment"),
        ("meld", ["--split", "test", "--kind", "audiocaps"], "no test.csv in it, so this is not AudioCaps's layout"),
        ("iemocap", ["--split", "Session5"], "no Session5/dialog/EmoEvaluation in it"),
        ("iemocap", ["--split", "test"], "iemocap has Session1, Session2"),
        ("iemocap", ["--label-from", "emotion"], "with kind iemocap it is not for it"),
        ("wavcaps", ["--kind", "folders", "--split", "train"], "has no splits"),
        ("wavcaps", ["--kind", "manifest"], "not of kind 'manifest'"),
    ],
)
def test_what_cannot_be_read_so_is_told_and_writes_nothing(tmp_path, capsys, name, arguments, message):
    CORPORA[name][0](tmp_path / "source")
    assert _stop([tmp_path / "source", *arguments, "--out", tmp_path / "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_that_does_not_exist_is_told_whatever_its_kind(tmp_path, capsys):
    for kind in KINDS:
        assert _stop([tmp_path / "nowhere", "--kind", kind, "--out", tmp_path / "out"]) == 2
        assert "nowhere does not exist" in capsys.readouterr().err


def test_help_lists_every_kind(capsys):
    assert _stop(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {kind} " in printed for kind in KINDS)
