"""Damaged corpora: a run goes on without what it cannot use and counts it, or stops and says which key decides."""

import io
import json
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mowe_ray.data.shards.write import write_parquet
from mowe_ray.train import main
from tests import deadly_decoder
from tests.deadly_decoder.sitecustomize import ENDS, HANGS
from tests.end_to_end import RATE, ROOT, encoded, run_command, tone, tone_samples, write_tones
from tests.faults import RunningCommand, ended
from tests.tiny_runs import TINY, Corpus, records, tiny_arguments

pytestmark = pytest.mark.slow

_NAN = np.full(RATE, np.nan, np.float32)
_WORD = {"instruction": "Say it.", "answer": "word", "task": "asr"}

# What the header or the first bytes give away, and what only decoding finds.
_SEEN_BY_SCAN = {"no_answer": 1, "too_long": 1, "wrong_type": 1, "zero_length": 2, "unreadable": 4}
_SEEN_BY_DECODER = {"truncated": 3, "nan": 12, "silent": 1}


def _cut(audio: bytes) -> bytes:
    return audio[: len(audio) // 2]


def _damaged() -> dict[str, tuple[bytes, bytes]]:
    """Bytes of audio and JSON by file name."""
    wave, said = tone(440, 4.0), json.dumps(_WORD).encode()
    noise = np.random.default_rng(0).normal(0, 0.1, len(wave)).astype(np.float32)  # does not compress: a cut costs
    quiet = encoded(np.zeros(RATE, np.float32), "WAV")
    hour = encoded(np.zeros(3600 * 8000, np.float32), "FLAC", 8000)
    audio = {
        "cut-flac.flac": _cut(encoded(noise)),
        "cut-mp3.mp3": _cut(encoded(noise, "MP3")),
        "cut-opus.opus": _cut(encoded(noise, "OGG", subtype="OPUS")),
        "no-bytes.wav": b"",
        "no-samples.wav": encoded(wave[:0], "WAV"),
        "text.wav": b"This is no audio, whatever it is called.\n" * 20,
        "hour.flac": hour,
        "silent.wav": quiet,
        **{f"nan-{n:02d}.wav": encoded(_NAN, "WAV", subtype="FLOAT") for n in range(12)},
    }
    members = {name: (content, said) for name, content in audio.items()}
    members["no-answer.flac"] = (encoded(wave), json.dumps({"instruction": "Say it."}).encode())
    members["half-emoji.flac"] = (encoded(wave), json.dumps({**_WORD, "answer": "wo\ud83d"}).encode())
    members["nested.flac"] = (encoded(wave), b'{"answer": "word", "more": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    aiff = encoded(wave, "AIFF")
    members["wrong-byte.aiff"] = (aiff[:20] + b"\xff" + aiff[21:], said)
    members["no-json.flac"] = (encoded(wave), b'{"answer": "wo')
    return members


def _write_tar(path: Path, members: dict[str, tuple[bytes, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, (audio, fields) in members.items():
            for file, content in ((name, audio), (f"{name.rpartition('.')[0]}.json", fields)):
                info = tarfile.TarInfo(file)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _good(first: int, count: int) -> dict[str, tuple[bytes, bytes]]:
    return {
        f"{s.id}.flac": (
            s.audio or b"",
            json.dumps({"instruction": s.instruction, "answer": s.answer, "task": s.task}).encode(),
        )
        for s in tone_samples(count, first=first)
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources with 8, 2 and 4 good samples among the damage, and validation tones."""
    root = tmp_path_factory.mktemp("damaged")
    (root / "tars").mkdir()
    _write_tar(root / "tars" / "damaged.tar", _damaged())
    _write_tar(root / "tars" / "good.tar", _good(0, 6))
    _write_tar(root / "tars" / "cut.tar", _good(6, 4))
    whole = (root / "tars" / "cut.tar").read_bytes()
    (root / "tars" / "cut.tar").write_bytes(whole[: whole.index(b"tone-008.flac") + 700])

    rows = [{"audio": "missing.flac", **_WORD}]
    for sample in tone_samples(2, first=20):
        (root / f"{sample.id}.flac").write_bytes(sample.audio or b"")
        rows.append({"audio": f"{sample.id}.flac", "text": sample.answer, "task": sample.task, "instruction": "What?"})
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (root / "parquet").mkdir()
    write_parquet(tone_samples(4, first=30), str(root / "parquet"), 1 << 20)
    (good,) = (root / "parquet").glob("*.parquet")
    (root / "parquet" / "broken.parquet").write_bytes(_cut(good.read_bytes()))

    write_tones(root / "validation", 8, first=40)
    return root


def _arguments(corpus, storage, *more):
    return [
        *TINY,
        f"data.train=[{', '.join(f'{{path: {corpus / name}}}' for name in ('tars', 'manifest.jsonl', 'parquet'))}]",
        f"data.validation=[{{path: {corpus / 'validation'}, name: validation}}]",
        f"storage={storage}",
        "data.max_batch_size=2",
        "training.epochs=2",
        "training.log_every=1",
        *more,
    ]


def test_a_run_over_every_kind_of_damage_completes_and_counts_each_cause(corpus, ray_cluster, tmp_path, capsys):
    """With two workers and two samples in a micro-batch, some ranks lose all of theirs, and some steps everything."""
    arguments = _arguments(corpus, tmp_path, "data.max_bad_fraction=0.9", "compute.num_workers=2", "name=damaged")
    assert main(arguments) == 0, capsys.readouterr().err

    printed = capsys.readouterr()
    assert "workers failed" not in printed.err  # no damage is worth a restart
    result = json.loads(printed.out.splitlines()[-1])
    report = json.loads(Path(result["run"], "data_report.json").read_text())
    tars, manifest, parquet, validation = report["sources"].values()
    assert Counter(tars["causes"]) == Counter(_SEEN_BY_SCAN) + Counter(_SEEN_BY_DECODER) + Counter(broken_shard=1)
    assert manifest["causes"] == {"no_audio": 1}
    assert parquet["causes"] == {"broken_shard": 1}
    assert validation["causes"] == {}
    assert [source["good"] for source in (tars, manifest, parquet, validation)] == [8, 2, 4, 8]
    assert report["samples"] == report["good"] + report["bad"]
    named = {(bad["id"], bad["cause"]) for bad in report["bad_samples"]}
    assert {
        ("cut-mp3", "truncated"),
        ("text", "wrong_type"),
        ("hour", "too_long"),
        ("cut.tar", "broken_shard"),
    } <= named

    steps = records(result["run"], "train")
    assert [record["step"] for record in steps] == list(range(1, result["steps"] + 1))
    assert sum(record["clips"] for record in steps) == 2 * (8 + 2 + 4)
    assert all(np.isfinite(record["loss"]) for record in steps)
    assert any(record["clips"] == 0 for record in steps), "no step lost everything: the test has lost its point"


def test_too_much_damage_stops_before_training_and_names_the_key(corpus, ray_cluster, tmp_path, capsys):
    code = main(_arguments(corpus, tmp_path, "data.max_bad_fraction=0.1", "name=strict"))

    printed = capsys.readouterr()
    assert code == 1
    assert "data.max_bad_fraction is 0.1" in printed.err
    assert "Traceback" not in printed.err
    assert "data.max_bad_fraction" in json.loads(printed.out)["error"]
    assert not (tmp_path / "strict" / "metrics.jsonl").exists()


@pytest.mark.parametrize("found_by", ["scan", "decoder"])
def test_data_that_is_all_bad_stops_the_run_whatever_is_allowed(found_by, corpus, ray_cluster, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    content = b"no audio at all, only text" if found_by == "scan" else encoded(_NAN, "WAV", subtype="FLOAT")
    _write_tar(tmp_path / "bad" / "0.tar", {f"{n}.wav": (content, json.dumps(_WORD).encode()) for n in range(8)})
    code = main(
        [
            *_arguments(corpus, tmp_path, "data.max_bad_fraction=1", "name=all-bad", "training.epochs=1000"),
            f"data.train=[{{path: {tmp_path / 'bad'}}}]",
            "data.validation=[]",
        ]
    )

    printed = capsys.readouterr()
    assert code == 1
    if found_by == "scan":
        assert f"data.train.0.path: no sample of {tmp_path / 'bad'} can be used: 8 wrong_type" in printed.err
    else:
        assert "8 of 8 samples (100%) are unusable" in printed.err
        assert "data.max_bad_fraction" in printed.err
        assert "nan" in printed.err
    assert "Traceback" not in printed.err
    assert "error" in json.loads(printed.out)


def _deadly(log: Path) -> dict[str, str]:
    """Environment of a command whose decoders have a bug; `log` gets a line each time they meet it."""
    return {"PYTHONPATH": f"{next(iter(deadly_decoder.__path__))}:{ROOT}", "DECODER_LOG": str(log)}


@pytest.fixture(scope="module")
def killers(tmp_path_factory):
    """Tars with clips that end the process that decodes them, or that reads their header."""
    root = tmp_path_factory.mktemp("killers")
    said = json.dumps(_WORD).encode()
    for name, first in (("train", 0), ("validation", 20)):
        (root / name).mkdir()
        clips = _good(first, 6) | {f"killer-{name}.flac": (encoded(tone(300, 1.0)) + ENDS, said)}
        if name == "train":
            clips["killer-header.au"] = (encoded(tone(300, 1.0), "AU") + ENDS, said)
        _write_tar(root / name / "0.tar", clips)
    return Corpus(root / "train", root / "validation")


@pytest.fixture(scope="module")
def survivor(killers, tmp_path_factory):
    """A run over `killers`, and where their decoders leave a line each time."""
    storage = tmp_path_factory.mktemp("survivor")
    log = storage / "deaths"
    arguments = [*tiny_arguments(killers, storage, "run"), "data.max_batch_size=2", "training.eval_every=2"]
    arguments += ["data.max_bad_fraction=0.5", "compute.max_failures=0"]
    return arguments, log, run_command(*arguments, "training.max_steps=4", environment=_deadly(log))


@pytest.mark.soak  # two runs; tasks and children alone: test_files_that_end_their_decoder.py
def test_clips_that_end_their_decoder_are_left_out_and_not_tried_again(survivor):
    arguments, log, first = survivor
    assert first.code == 0, first.err
    assert "workers failed" not in first.err
    report = json.loads(Path(first.result["run"], "data_report.json").read_text())
    crashed = {bad["id"]: bad for bad in report["bad_samples"]}
    assert {name: bad["cause"] for name, bad in crashed.items()} == dict.fromkeys(
        ("killer-train", "killer-header", "killer-validation"), "crashed"
    )
    assert all("0.tar" in bad["detail"] and "SIGSEGV" in bad["detail"] for bad in crashed.values())
    assert "warning: killer-train is left out from now on (data_report.json)" in first.err
    deaths = log.read_text()
    assert deaths.count("ends") >= 12, "each ended two tasks and two children"

    again = run_command(*arguments, "training.max_steps=8", environment=_deadly(log))
    assert again.code == 0, again.err
    assert log.read_text() == deaths, "a clip that is known was tried again"
    later = json.loads(Path(first.result["run"], "data_report.json").read_text())
    for source in (*report["sources"].values(), *later["sources"].values()):
        del source["profile"]  # of fewer samples, now that some are known
    assert later == report


@pytest.mark.soak  # the same decoding tasks as the run's
def test_an_evaluation_survives_a_clip_that_ends_its_decoder(survivor, tmp_path):
    _, _, trained = survivor
    arguments = [trained.result["run"], f"out={tmp_path}", "ablation_samples=0", "data.max_bad_fraction=0.5"]
    scored = run_command(*arguments, module="mowe_ray.evaluate", environment=_deadly(tmp_path / "deaths"))
    assert scored.code == 0, scored.err
    steps = "".join(file.read_text() for file in tmp_path.rglob("held_out.steps.jsonl"))
    assert steps.count("crashed") == 1
    assert "killer-validation" in steps


def test_a_dry_run_survives_a_clip_that_ends_the_scan(killers, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = [*tiny_arguments(killers, tmp_path, "dry"), "training.max_steps=1", "data.max_bad_fraction=0.5"]
    dry = run_command(*arguments, "--dry-run", environment=_deadly(tmp_path / "deaths"))
    assert dry.code == 0, dry.err
    assert "crashed" in dry.err + dry.out


@pytest.fixture(scope="module")
def hanging(tmp_path_factory):
    """Like `killers`, with a clip in the validation part whose decoder never comes back."""
    root = tmp_path_factory.mktemp("hanging")
    for name, clips in (
        ("good", _good(0, 6)),
        ("stuck", {"stuck.flac": (encoded(tone(300, 1.0)) + HANGS, json.dumps(_WORD).encode())}),
    ):
        (root / name).mkdir()
        _write_tar(root / name / "0.tar", clips)
    return root


@pytest.mark.soak  # the clip hangs the first look at the data as well, for 20 s
@pytest.mark.parametrize(("train", "validation", "step"), [("good", "stuck", 2), ("stuck", "good", 0)])
def test_a_run_that_is_stuck_in_its_data_stops_within_30_s(train, validation, step, hanging, tmp_path):
    corpus, log = Corpus(hanging / train, hanging / validation), tmp_path / "hangs"
    settings = ("training.max_steps=8", "training.eval_every=2", "data.max_batch_size=2")
    with ended(RunningCommand(corpus, tmp_path, "stuck", *settings, **_deadly(log))) as command:
        command.until(lambda: " samples to train on" in command.said, "first look at the data")
        known = log.read_text()
        command.until(lambda: log.read_text() != known, "hang")
        time.sleep(3)  # the step before it is trained
        began = time.monotonic()
        command.process.send_signal(signal.SIGTERM)
        stopped = command.wait(60)
        assert time.monotonic() - began < 30, stopped.err
        checkpoints = command.checkpoints()
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert "s for data: stopping without them" in stopped.err
    assert stopped.result["stopped_at_step"] == step
    assert checkpoints[-1:] == [step], "the last finished step is saved"


@pytest.mark.soak  # the watchdog's: test_faults.py hangs a step
def test_a_validation_that_hangs_ends(hanging, tmp_path):
    corpus = Corpus(hanging / "good", hanging / "stuck")
    settings = ("training.max_steps=2", "training.step_timeout_s=8", "compute.max_failures=0", "data.max_batch_size=2")
    arguments = [*tiny_arguments(corpus, tmp_path, "late"), *settings]
    late = run_command(*arguments, environment=_deadly(tmp_path / "hangs"), timeout_s=120)
    assert late.code == 1, late.err
    assert "a micro-batch of held_out, validated after step 2, has taken 8 s (training.step_timeout_s)" in late.err
    assert "is at: waiting for data" in late.err


@pytest.mark.soak  # the same wait for answers as the validation's
def test_an_evaluation_that_hangs_ends(survivor, hanging, tmp_path):
    _, _, trained = survivor
    arguments = [trained.result["run"], f"out={tmp_path}", "ablation_samples=0", "timeout_s=30"]
    arguments += [f"data.validation=[{{path: {hanging / 'stuck'}, name: stuck}}]"]
    environment = _deadly(tmp_path / "hangs")
    late = run_command(*arguments, module="mowe_ray.evaluate", environment=environment, timeout_s=120)
    assert late.code == 1, late.err
    assert "no answer has come for 30 s (timeout_s)" in late.err
    assert (tmp_path / "hangs").exists()
