"""Manifests and labelled folders."""

import json

import pytest

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.manifest_and_folders import read_labelled_folders, read_manifest
from mowe_ray.data.sample import BadSample, Sample


@pytest.fixture
def folder(tmp_path, make_audio):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "a.wav").write_bytes(make_audio())
    return tmp_path


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_nemo_rows(folder, make_audio, asr):
    row = {"audio_filepath": "wavs/a.wav", "text": "hello", "duration": 0.2, "offset": 0.1}
    manifest = _write(folder / "m.jsonl", row, {**row, "audio_filepath": str(folder / "wavs/a.wav")})
    relative, absolute = read_manifest(manifest, asr)
    assert relative == Sample(
        id="wavs/a.wav",
        audio=make_audio(),
        instruction="Transcribe the speech.",
        answer="hello",
        task="asr",
        source="corpus",
        suffix="wav",
        duration_s=0.2,
        offset_s=0.1,
    )
    assert absolute.audio == relative.audio


def test_what_a_row_says_goes_before_the_defaults(folder):
    row = {"path": "wavs/a.wav", "question": "Who?", "answer": "me", "task": "sqa", "id": "x"}
    manifest = _write(folder / "m.jsonl", row)
    (sample,) = read_manifest(manifest, Defaults("corpus", task="asr", instruction="Write."))
    assert (sample.id, sample.instruction, sample.task) == ("x", "Who?", "sqa")


def test_tsv_with_header_and_quotes_that_mean_themselves(folder, asr):
    manifest = folder / "m.tsv"
    manifest.write_text('path\tsentence\textra\nwavs/a.wav\t"quoted" words\t1\n\nwavs/a.wav\tb\t2\n')
    assert [sample.answer for sample in read_manifest(manifest, asr)] == ['"quoted" words', "b"]


def test_a_json_list(folder, asr):
    manifest = folder / "m.json"
    manifest.write_text(json.dumps([{"audio": "wavs/a.wav", "text": "one"}, 5]))
    sample, bad = read_manifest(manifest, asr)
    assert sample.answer == "one"
    assert bad.cause == "unreadable"


def test_bad_rows_have_a_cause_each_and_do_not_stop_the_rest(folder, asr):
    manifest = _write(
        folder / "m.jsonl",
        {"audio": "wavs/a.wav"},
        {"audio": "wavs/missing.wav", "text": "x"},
        {"text": "x"},
        ["list"],
        {"audio": "wavs/a.wav", "text": "good"},
    )
    manifest.write_text(manifest.read_text() + '{"cut')
    items = list(read_manifest(manifest, asr))
    causes = [item.cause if isinstance(item, BadSample) else "good" for item in items]
    assert causes == ["no_answer", "no_audio", "no_audio", "unreadable", "good", "unreadable"]
    assert "missing.wav" in items[1].detail


def test_a_task_or_an_instruction_that_nothing_says_is_an_error(folder):
    manifest = _write(folder / "m.jsonl", {"audio": "wavs/a.wav", "text": "x"})
    with pytest.raises(ValueError, match="--task"):
        list(read_manifest(manifest, Defaults("corpus")))
    with pytest.raises(ValueError, match="--instruction"):
        list(read_manifest(manifest, Defaults("corpus", task="my_task")))


def test_the_answer_is_the_folder_or_the_file(tmp_path, make_audio):
    for name in ("angry/2.wav", "angry/1.WAV", "very_sad/1.wav", "very_sad/notes.txt", "loose.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_audio())
    er = Defaults("corpus", "er")
    by_folder = list(read_labelled_folders(tmp_path, er))
    found = {item.id: getattr(item, "answer", None) for item in by_folder}
    assert found == {"angry/1": "angry", "angry/2": "angry", "loose": None, "very_sad/1": "very sad"}
    assert next(item for item in by_folder if item.id == "loose").cause == "no_answer"
    by_stem = [sample.answer for sample in read_labelled_folders(tmp_path, er, "stem")]
    assert by_stem == ["1", "2", "loose", "1"]
