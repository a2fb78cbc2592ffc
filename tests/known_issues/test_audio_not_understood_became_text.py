"""Audio under another name, of another form or beside its text was passed over, and the rest trained as text alone.

Reports: modelscope/ms-swift#4310, huggingface/datasets#7682 and #7684 (decoded arrays), webdataset/webdataset#140 and
#258, ray-project/ray#44068 and #65044 (members that are not neighbours).
"""

import base64
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.read_source import CLIP, QUESTION, note, read_source, write_lines, write_tar

WAVE = [0.1, -0.1] * 8000


@pytest.mark.parametrize("key", ["wav", "audio_file", "file_name", "path", "speech"])
def test_usual_names_of_audio_in_a_manifest_are_read(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.wav").write_bytes(CLIP)
    found = read_source(write_lines(tmp_path / "m.jsonl", [QUESTION | {key: "a.wav"}]), tmp_path)
    assert [seconds for _, seconds, _ in found.good] == [1.0]


def test_a_list_of_one_clip_and_a_decoded_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(CLIP)
    rows = [{"audios": ["a.wav"]}, {"audio": {"array": WAVE, "sampling_rate": 16_000, "path": "gone.wav"}}]
    found = read_source(write_lines(tmp_path / "m.jsonl", [QUESTION | row for row in rows]), tmp_path)
    assert [seconds for _, seconds, _ in found.good] == [1.0, 1.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"AudioPath": "clips/a.flac"},
        {"source_audio": "utterance-17"},
        {"audio_url": "https://example.org/clip?id=3"},
        {"recording": {"sources": [{"type": "file", "source": "a.wav"}]}},
        {"prompt": [{"type": "audio", "audio": "a.mp3"}]},
        {"audios": ["a.wav", 3]},
        {"audio": WAVE},
        {"audio": {"array": [0, 1, -1] * 500, "sampling_rate": 16_000}},
        {"audio": {"array": WAVE}},
        {"input_values": WAVE},
        {"data": base64.b64encode(CLIP).decode()},
        {"id": "clip-7.wav"},
        {"sampling_rate": 16_000},
        {"path": "speech.sph"},
        {"speech_path": "speakers/7/19"},
        {"soundFile": "rain-17"},
        {"sr": 16_000},
        {"media": [{"type": "audio_url", "url": "https://example.org/7"}]},
        {"media": {"mime": "audio/flac", "location": "bucket/7"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_looks_like_audio_makes_no_text_sample(tmp_path: Path, fields: dict) -> None:
    for name, path in (("lines", tmp_path / "m.jsonl"), ("tar", tmp_path / "m.tar")):
        source = (
            write_lines(path, [QUESTION | fields]) if name == "lines" else write_tar(path, ("a.json", note(**fields)))
        )
        found = read_source(source, tmp_path / name)
        assert not found.good
        assert found.causes[0] in ("unknown_audio", "no_audio")
        key = next(iter(fields))
        assert key in found.bad[0].detail or str(fields[key]) in found.bad[0].detail


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"audio": None},
        {"audio": ""},
        {"audios": []},
        {"audio": {"bytes": None, "path": None}},
        {"has_audio": False, "num_audio": 0},
        {"source": "alpaca", "file": "alpaca.json", "tokens": 812},
        {"context": "The recording was saved, as it says. Then nobody spoke."},
        {"instruction": "How is song.mp3 played?", "answer": "open song.mp3"},
        {"audio_caption": "a dog barks twice"},
        {"speech_act": "request", "voice": "passive", "type": "question", "format": "short"},
    ],
    ids=str,
)
def test_text_alone_stays_text_alone(tmp_path: Path, fields: dict) -> None:
    found = read_source(write_tar(tmp_path / "a.tar", ("a.json", note(**fields))), tmp_path)
    assert [seconds for _, seconds, _ in found.good] == [0.0]
    assert not found.bad


@pytest.mark.parametrize(
    "cells",
    [
        {"audio": [WAVE]},
        {"signal": [WAVE]},
        {"speech_audio": [{"bytes": CLIP, "path": None}]},
        {"content": [CLIP]},
        {"audio": pa.array([[WAVE, WAVE]])},
        {"clip": pa.array([{"array": WAVE, "sampling_rate": 16_000}])},
    ],
    ids=lambda cells: next(iter(cells)),
)
def test_columns_of_a_table_that_look_like_audio_are_named(tmp_path: Path, cells: dict) -> None:
    pq.write_table(pa.table({name: [value] for name, value in QUESTION.items()} | cells), tmp_path / "a.parquet")
    found = read_source(tmp_path / "a.parquet", tmp_path)
    assert not found.good
    assert found.causes == ["unknown_audio"]
    assert next(iter(cells)) in found.bad[0].detail


@pytest.mark.parametrize("channels", [1, 2])
def test_decoded_arrays_in_a_table_are_read(tmp_path: Path, channels: int) -> None:
    array = WAVE if channels == 1 else [WAVE] * channels
    cell = pa.array([{"array": array, "path": None, "sampling_rate": 16_000}])
    pq.write_table(
        pa.table({name: [value] for name, value in QUESTION.items()} | {"audio": cell}), tmp_path / "a.parquet"
    )
    found = read_source(tmp_path / "a.parquet", tmp_path)
    assert [seconds for _, seconds, _ in found.good] == [1.0]


@pytest.mark.parametrize(
    "names",
    [
        ["a.wav", "b.wav", "a.json", "b.json"],
        ["a.json", "b.json", "b.wav", "a.wav"],
        ["b.wav", "a.json", "a.wav", "b.json"],
        ["./d/a.wav", "d/._a.wav", "./d/a.txt", "__MACOSX/d/a.json", "d/b.wav", "./d/a.json", "d/b.json"],
        ["a.wav", "a.wav.json", "b.wav", "b.wav.json"],
    ],
    ids=" ".join,
)
def test_members_of_a_sample_are_joined_wherever_they_lie(tmp_path: Path, names: list[str]) -> None:
    members = [(name, CLIP if name.endswith("wav") else note()) for name in names]
    found = read_source(write_tar(tmp_path / "a.tar", *members), tmp_path)
    assert [seconds for _, seconds, _ in found.good] == [1.0, 1.0]
    assert not found.bad


def test_a_later_sample_of_the_same_key_stays_a_sample(tmp_path: Path) -> None:
    twice = [("a.wav", CLIP), ("a.json", note(answer="one")), ("a.wav", CLIP), ("a.json", note(answer="two"))]
    found = read_source(write_tar(tmp_path / "a.tar", *twice), tmp_path)
    assert [(name, answer) for name, _, answer in found.good] == [("a", "one"), ("a#2", "two")]


@pytest.mark.parametrize(
    "members",
    [
        [("a.unknown", b"\x00\x01" * 300), ("a.json", note())],
        [("a.pcm", b"\x00\x01" * 300), ("a.json", note())],
        [("a.wav", CLIP), ("a.flac", CLIP), ("a.json", note())],
        [("wavs/a.wav", CLIP), ("json/a.json", note())],
        [("A.wav", CLIP), ("a.json", note())],
        [("a.json", note(audio_filepath="a.wav"))],
        [("a.json", note(audio="https://example.org/a"))],
    ],
    ids=lambda members: " ".join(name for name, _ in members),
)
def test_a_json_whose_audio_is_not_found_is_counted(tmp_path: Path, members: list) -> None:
    found = read_source(write_tar(tmp_path / "a.tar", *members), tmp_path)
    assert not found.good
    assert {"unknown_audio", "no_audio"} & set(found.causes)


def test_audio_of_any_suffix_is_known_by_its_bytes(tmp_path: Path) -> None:
    members = [("v1.0/a", CLIP), ("v1.0/a.json", note()), ("b.txt", b"a tone"), ("b.wav", CLIP), ("b.json", note())]
    found = read_source(write_tar(tmp_path / "a.tar", *members), tmp_path)
    assert [seconds for _, seconds, _ in found.good] == [1.0, 1.0]
