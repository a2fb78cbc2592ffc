"""Data that cannot have been meant as they are stop a run before it starts, with the key and the fix."""

import csv
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.sample import Sample
from mowe_ray.data.shards import read_samples
from mowe_ray.training.datasets import Sources, index_sources
from tests.layouts import ANSWERS, CLIPS, QUESTION, RATE, wave, write_clips
from tests.read_source import write_lines


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def index(*sources: dict[str, Any], **fields: Any) -> Sources:
    return index_sources(DataSection.model_validate({"train": list(sources), **fields}))


def manifest(folder: Path, **fields: Any) -> str:
    rows = [{"audio": name, "answer": a} | fields for name, a in zip(write_clips(folder), ANSWERS, strict=True)]
    return str(write_lines(folder / "tones.jsonl", rows))


@pytest.mark.slow
def test_nothing_is_asked(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    with pytest.raises(ValueError, match=r"data\.train\.0: nothing is asked about 20 of the 20 .*data\.train\.0\.inst"):
        index({"path": path})
    with pytest.raises(ValueError, match=r"Set data\.train\.0\.instruction='\.\.\.' or data\.train\.0\.task=asr"):
        index({"path": path, "task": "aqa"})
    for said in ({"task": "asr"}, {"instruction": QUESTION}):
        index({"path": path} | said)


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    with pytest.raises(ValueError, match=r"data\.train\.0\.columns: .* has no words; its fields are audio, answer"):
        index({"path": path, "task": "asr", "columns": {"answer": "words"}})


@pytest.mark.slow
def test_columns_that_are_not_known(tmp_path: Path) -> None:
    with (tmp_path / "tones.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Datei", "Antwort"], *zip(write_clips(tmp_path), ANSWERS, strict=True)])
    with pytest.raises(
        ValueError,
        match=r"data\.train\.0\.path: no sample .* 20 no_answer, such as .* fields of .* are "
        r"Datei, Antwort \(first: Datei: clips/00\.wav, Antwort: low\), as its first line names them; "
        r"read are audio, .*columns",
    ):
        index({"path": str(tmp_path / "tones.csv"), "task": "asr"})
    columns = {"audio": "Datei", "answer": "Antwort"}
    assert len(index({"path": str(tmp_path / "tones.csv"), "task": "asr", "columns": columns}).train) == CLIPS


@pytest.mark.slow
def test_files_that_are_not_there_are_found_though_their_lengths_are_declared(tmp_path: Path) -> None:
    path = manifest(tmp_path, duration=0.5)
    for number in range(CLIPS):
        (tmp_path / f"clips/{number:02d}.wav").unlink()
    with pytest.raises(
        ValueError,
        match=r"data\.train\.0\.path: 20 of 20 samples that were tried cannot be read, such as "
        r"clips/00\.wav: no_audio: .*clips/00\.wav is missing",
    ):
        index({"path": path, "task": "asr"})


def test_empty_answers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sample of .* can be used: 20 no_answer, .*'answer' is empty"):
        index({"path": manifest(tmp_path, answer=""), "task": "asr"})


def test_a_source_without_samples(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"data\.train\.1\.path: .*none\.jsonl holds no samples"):
        index({"path": manifest(tmp_path), "task": "asr"}, {"path": str(tmp_path / "none.jsonl")})


@pytest.mark.slow
def test_mixed_rates_and_own_data_with_built_in_validation_are_warned_of(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    soundfile.write(tmp_path / "clips/03.wav", wave(3), 2 * RATE, subtype="PCM_16")
    found = index({"path": path, "task": "asr"}, validation=[{"path": "builtin:validation"}]).report
    mixed, builtin = found.warnings
    assert "mixed sampling rates (19 at 16000 Hz, 1 at 32000 Hz of 20 tried)" in mixed
    assert "data.validation is builtin:validation, which says nothing on" in builtin
    assert found.to_json()["warnings"] == found.warnings


def test_samples_of_training_and_validation_that_are_the_same(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    held = {"path": path, "task": "asr", "limit": 5}
    found = index({"path": path, "task": "asr"}, validation=[held]).report
    assert found.warnings == ["tones: 5 samples have the id and length of a sample to train on"]


def test_names_of_validation_sources_come_from_their_paths() -> None:
    paths = ["/data/calls/val", "s3://bucket/music/shard-{000..012}.tar", "builtin:validation", "/x/calls/test.jsonl"]
    data = DataSection.model_validate({"validation": [{"path": path} for path in paths]})
    assert data.validation_names == ["calls", "music", "builtin", "calls-2"]


@pytest.mark.slow
def test_a_source_is_limited_and_its_questions_are_drawn(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    first = index({"path": path, "task": "asr", "limit": 3}).train
    assert first.table["id"].to_pylist() == [f"clips/{n:02d}.wav" for n in range(3)]
    shares = [
        index_sources(DataSection.model_validate({"train": [{"path": path, "task": "asr", "limit": 0.5}]}), seed=seed)
        .train.table["id"]
        .to_pylist()
        for seed in (1, 1, 2)
    ]
    assert shares[0] == shares[1] != shares[2]
    assert [len(ids) for ids in shares] == [CLIPS // 2] * 3
    with pytest.raises(ValueError, match=r"20 of 20 samples .* 20 too_long in train0"):
        index({"path": path, "task": "asr", "max_duration_s": 0.4})


@pytest.mark.slow
def test_one_of_several_questions_is_asked_by_seed_and_id(tmp_path: Path) -> None:
    asked = []
    for seed in (1, 1, 2):
        data = DataSection.model_validate(
            {"train": [{"path": manifest(tmp_path / f"{len(asked)}"), "instruction": ["a?", "b?"]}]}
        )
        rows = index_sources(data, seed=seed).train.table
        asked.append([sample.instruction for sample in read_samples(rows) if isinstance(sample, Sample)])
    assert asked[0] == asked[1] != asked[2]
    assert set(asked[0]) == {"a?", "b?"}


def _as(text: str, name: str = "t.jsonl") -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / name).write_text(text)
        return {"path": str(folder / name)}

    return write


def _clip_alone(folder: Path) -> dict[str, Any]:
    return {"path": f"{folder}/{write_clips(folder)[0]}"}


def _clips_by_pattern(folder: Path) -> dict[str, Any]:
    write_clips(folder)
    return {"path": f"{folder}/clips/*.wav"}


def _list_of_a_lost_shard(folder: Path) -> dict[str, Any]:
    (folder / "shards.txt").write_text("a.tar\n")
    return {"path": f"{folder}/shards.txt"}


def _from_another_folder(folder: Path) -> dict[str, Any]:
    names = write_clips(folder)
    (folder / "lists").mkdir()
    return {"path": str(write_lines(folder / "lists/t.jsonl", [{"audio": names[0], "text": "a"}]))}


def _no_numbers(folder: Path) -> dict[str, Any]:
    return {"path": f"{folder}/{{3..0}}.tar"}


def _table_of_other_columns(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"snd": [b""], "words": ["a"]}), folder / "t.parquet")
    return {"path": f"{folder}/t.parquet"}


def _packed_in_spite_of_its_name(folder: Path) -> dict[str, Any]:
    (folder / "t.jsonl").write_bytes(gzip.compress(b"{}"))
    return {"path": f"{folder}/t.jsonl"}


def _too_long(folder: Path) -> dict[str, Any]:
    return {"path": manifest(folder, duration=500)}


REFUSED = {
    "a clip": (_clip_alone, r"00\.wav' is audio alone: name the folder of the files, or a manifest"),
    "clips": (_clips_by_pattern, r"\*\.wav' is audio alone: name the folder of the files, or a manifest"),
    "a zip": (_as("PK", "t.zip"), r"is none of \.tar, .*t\.zip has to be unpacked first"),
    "a spreadsheet": (_as("PK", "t.xlsx"), r"data\.train\.0\.path: .*t\.xlsx' is none of \.tar"),
    "a lost shard": (_list_of_a_lost_shard, r"shards\.txt' lists a path a line, and there is no '.*/a\.tar'"),
    "no header": (
        _as("a.wav,one\nb.wav,two\n", "t.csv"),
        r"are a\.wav, one \(first: .*\), as its first line names them",
    ),
    "a relative path": (_from_another_folder, r"The names of clips start at the folder of their manifest"),
    "milliseconds": (_too_long, r"20 too_long in train0.*500 s \(.*data\.max_duration_s sets a limit\)"),
    "no numbers": (_no_numbers, r"\{3\.\.0\}\.tar' stands for no file at all"),
    "other columns": (_table_of_other_columns, r"has the columns snd, words, but none of .*: name yours under columns"),
    "a packed manifest": (_packed_in_spite_of_its_name, r"is compressed by gzip: let its name end with \.gz"),
    "files of no bytes": (_as("", "t.tar"), r"broken_shard in train0.*no header of a tar"),
}


@pytest.mark.parametrize(("write", "why"), REFUSED.values(), ids=REFUSED)
def test_a_source_of_another_kind_says_what_to_do(
    tmp_path: Path, write: Callable[[Path], dict[str, Any]], why: str
) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        index({"task": "asr"} | write(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_what_no_header_says_is_found_by_decoding_a_few(tmp_path: Path) -> None:
    path = manifest(tmp_path, duration=0.5)
    for number in range(CLIPS):
        soundfile.write(tmp_path / f"clips/{number:02d}.wav", 0 * wave(number), RATE)
    with pytest.raises(ValueError, match=r"data\.train\.0\.path: 16 of 16 .* cannot be decoded, such as .*: silent"):
        index({"path": path, "task": "asr"})


@pytest.mark.slow
def test_samples_of_validation_whose_audio_is_trained_on(tmp_path: Path) -> None:
    path = manifest(tmp_path / "one")
    rows = [{"audio": f"../one/clips/{n:02d}.wav", "answer": a, "id": f"new {n}"} for n, a in enumerate(ANSWERS[:3])]
    (tmp_path / "two").mkdir()
    soundfile.write(tmp_path / "two/other.wav", -wave(0), RATE, subtype="PCM_16")
    held = write_lines(tmp_path / "two/held.jsonl", [*rows, {"audio": "other.wav", "answer": "low"}])
    found = index({"path": path, "task": "asr"}, validation=[{"path": str(held), "task": "asr"}]).report
    assert found.warnings == ["held: 3 of the 4 samples that were tried have the audio of a sample to train on"]


def test_an_empty_question_is_no_question() -> None:
    for instruction in ("", " ", [], ["Which?", ""]):
        with pytest.raises(ValueError, match="instruction"):
            DataSection.model_validate({"train": [{"path": "a.jsonl", "instruction": instruction}]})


def test_pieces_that_are_taken_whole_are_told(tmp_path: Path) -> None:
    said = index({"path": manifest(tmp_path, start_time=0.1, end_time=0.3), "task": "asr"}).report.warnings
    assert any("set its columns to {offset: start_time, end: end_time}" in line for line in said)
    columns = {"offset": "start_time", "end": "end_time"}
    found = index({"path": str(tmp_path / "tones.jsonl"), "task": "asr", "columns": columns})
    assert not any("start_time" in line for line in found.report.warnings)
    assert found.train.durations.tolist() == pytest.approx([0.2] * CLIPS)


def test_a_folder_of_clips_with_several_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("high", "low"):
            (tmp_path / split / label).mkdir(parents=True)
            soundfile.write(tmp_path / split / label / "a.wav", wave(0), RATE)
    with pytest.raises(ValueError, match=rf"holds several splits: name one, as {tmp_path}/test"):
        index({"path": str(tmp_path), "task": "asr"})
    assert len(index({"path": f"{tmp_path}/train", "instruction": QUESTION}).train) == 2
