"""Manifests as people write them: they are read as they are meant, or the row says what is wrong and what to do."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import BadAudio
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.record import parse_record
from tests.read_source import CLIP, read_source, write_lines

USER, BOT = {"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "a tone"}
ROW = json.dumps({"audio": "clip a.wav", "text": "one"})
WIDE = json.dumps({"audio": "clip a.wav", "text": "one", "more": {"\u00e4": [1]}}, indent=2, ensure_ascii=False)

MEANT = {
    "capital letters": ("t.csv", "Audio,TEXT\nclip a.wav,one\n", "one"),
    "blanks around cells": ("t.csv", "audio , text\n clip a.wav , one \n", "one"),
    "blank before a quote": ("t.csv", 'audio, text\nclip a.wav, "one, two"\n', "one, two"),
    "Windows": ("t.csv", "\ufeffaudio;text\r\nsub\\b.wav;one\r\n", "one"),
    "quotes and lines": ("t.csv", 'audio,text\nclip a.wav,"he said ""no"",\nand left"\n', 'he said "no",\nand left'),
    "inches": ("t.csv", 'audio,text\nclip a.wav,5" pipe\nclip a.wav,two\n', '5" pipe'),
    "empty last column": ("t.csv", "audio,text\nclip a.wav,one,\n", "one"),
    "pandas": ("t.tsv", 'AUDIO\tText\nclip a.wav\t"said ""no"" twice"\n', 'said "no" twice'),
    "quotes of Common Voice": ("t.tsv", 'audio\ttext\nclip a.wav\t"No," he said.\n', '"No," he said.'),
    "commas after lines": ("t.jsonl", f"{ROW},\n{ROW},\n", "one"),
    "indented objects": ("t.jsonl", f"\ufeff{WIDE}\n{WIDE}\n", "one"),
    "rows within": ("t.json", f'{{"info": {{"x": "[{{"}}, "data": [{ROW}, {ROW}]}}', "one"),
    "rows within, indented": ("t.json", f'\n{{\n"v": "\u00fc",\n"a": {{"b" : [\n{WIDE},\n{WIDE}\n]}}}}\n', "one"),
    "one row alone": ("t.json", json.dumps({"messages": [USER, BOT], "audios": ["clip a.wav"]}), "a tone"),
    "one row alone, indented": (
        "t.json",
        json.dumps({"messages": [USER, BOT], "audio": "clip a.wav"}, indent=1),
        "a tone",
    ),
    "ndjson": ("t.ndjson", f"{ROW}\n", "one"),
    "Qwen-Audio": (
        "t.json",
        json.dumps([{"conversations": [USER | {"content": "Audio 1: <audio>clip a.wav</audio>\nWhat?"}, BOT]}]),
        "a tone",
    ),
    "ms-swift before audios": (
        "t.jsonl",
        json.dumps({"query": "<audio>clip a.wav</audio>What?", "response": "one"}),
        "one",
    ),
    "blanks around a name": ("t.jsonl", json.dumps({"audio": " ./clip a.wav ", "text": "one"}), "one"),
    "composed letters": ("t.jsonl", json.dumps({"audio": "\u00e4.wav", "text": "one"}), "one"),
    "letters and marks": ("t.jsonl", json.dumps({"audio": "o\u0308.wav", "text": "one"}), "one"),
    "base64": ("t.jsonl", json.dumps({"audio": base64.b64encode(CLIP).decode(), "text": "one"}), "one"),
    "roles": (
        "t.json",
        json.dumps([{"messages": [USER | {"role": "User"}, BOT | {"role": "Assistant"}], "audios": ["clip a.wav"]}]),
        "a tone",
    ),
}


def test_what_is_meant_is_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("clip a.wav", "sub/b.wav", "a\u0308.wav", "\u00f6.wav"):
        (tmp_path / name).write_bytes(CLIP)
    found = {}
    for case, (name, text, _) in MEANT.items():
        (tmp_path / name).write_text(text)
        read = read_source(tmp_path / name, tmp_path / "cache" / case, "asr")
        found[case] = read.bad or read.answers[0]
    assert found == {case: answer for case, (_, _, answer) in MEANT.items()}


REFUSED = {
    "commas": ("t.csv", "audio,text\na.wav,well, yes\n", "3 cells for 2 columns; there must be quotes around a text"),
    "tabs": ("t.tsv", "audio\ttext\na.wav\tone\ttwo\n", "3 cells for 2 columns; there must be no tab in a text"),
    "open quote": ("t.csv", 'audio,text\na.wav,"one\nb.wav,two\n', "that is not closed"),
    "Latin 1": ("t.csv", "audio,text\na.wav,\xe9\n", "not UTF-8 at byte 6: convert the file, as by `iconv"),
    "two splits within": (
        "t.json",
        '{"train": [{"audio": "a.wav", "text": "one"}], "test": [{"audio": "a.wav", "text": "two"}]}',
        "rows seem to be under 'train'",
    ),
    "rows by name": ("t.json", '{"a": {"audio": "a.wav", "text": "one"}}', "rows seem to be under 'a'"),
    "onset": (
        "t.csv",
        "audio,text,onset,offset\na.wav,one,0.1,0.5\n",
        "say so by columns={offset: onset, end: offset}",
    ),
    "a turn without text": (
        "t.jsonl",
        json.dumps({"messages": [USER, BOT | {"content": ""}, USER | {"content": "And?"}, BOT], "audio": "a.wav"}),
        "a turn of the assistant is empty: give it text, or loss: false",
    ),
    "answer within": (
        "t.jsonl",
        '{"audio": "a.wav", "answer": {"text": "one"}}\n',
        "'answer' holds text: name one, as columns={answer: answer.text}",
    ),
}


def test_what_is_not_clear_says_what_to_do(tmp_path: Path) -> None:
    for case, (name, text, why) in REFUSED.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        (bad,) = read_source(tmp_path / name, tmp_path / "cache" / case, "asr").bad
        assert why in bad.detail, case


ODD_TURNS: dict[str, tuple[dict[str, Any], str]] = {
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, BOT]},
        "a part of type 'image'; only text and audio are read",
    ),
    "images": ({"messages": [USER, BOT], "audios": ["a"], "images": ["b.png"]}, "'images' is not empty"),
    "image of LLaVA": ({"messages": [USER, BOT], "audio": "a", "image": "b.png"}, "'image' is not empty"),
    "too many places": (
        {"messages": [USER | {"content": "<audio><audio>?"}, BOT], "audios": ["a"]},
        "2 places .* 1 clip",
    ),
    "too few places": ({"messages": [USER, BOT], "audios": ["a", "b"]}, "1 place <audio> for 2 clips"),
    "no clip": ({"messages": [USER, BOT], "audios": []}, "1 place <audio> for 0 clips"),
    "nothing to learn": (
        {"messages": [USER, BOT | {"loss": False}], "audios": ["a"]},
        "the last turn is not to be learned",
    ),
    "spoken by the assistant": (
        {"messages": [USER | {"content": "Say it"}, BOT | {"content": "<audio>"}], "audios": ["a"]},
        "in a turn of the assistant",
    ),
}


@pytest.mark.parametrize(("fields", "why"), ODD_TURNS.values(), ids=ODD_TURNS)
def test_turns_that_hold_more_than_is_heard(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(BadAudio, match=why):
        parse_record(fields)


@pytest.mark.parametrize("place", ["<speech>", "<sound>", "<|AUDIO|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"])
def test_places_by_the_names_of_other_tools(place: str) -> None:
    record = parse_record({"messages": [USER | {"content": f"{place}\nWhat?"}, BOT], "audios": ["a"]})
    assert (record.instruction, record.clips) == ("What?", ("a",))


def test_parts_without_a_type() -> None:
    """As DashScope and Qwen-Audio write them: {"audio": PATH}, {"text": TEXT}."""
    parts = [{"audio": "a.wav"}, {"text": "What?"}]
    record = parse_record({"messages": [{"role": "user", "content": parts}, BOT]})
    assert (record.instruction, record.clips) == ("What?", ("a.wav",))


def test_answers_are_labels_where_labels_are_given() -> None:
    reading = Reading(labels=("rock", "jazz"))
    answers = [parse_record({"audio": "a", "answer": answer}, reading).answer for answer in ("jazz", 0, "1")]
    assert answers == ["jazz", "rock", "jazz"]
    for other in (2, "folk"):
        with pytest.raises(BadAudio, match=rf"'{other}' is none of the 2 labels of its source \(rock, jazz\)"):
            parse_record({"audio": "a", "answer": other}, reading)


PIECES = {
    "start and end": ({"begin": 0.25, "stop": "0.75"}, {"offset": "begin", "end": "stop"}, 0.5),
    "end alone": ({"stop": 0.75}, {"end": "stop"}, 0.75),
    "onset and offset": ({"onset": 0.25, "offset": 1.0}, {"offset": "onset", "end": "offset"}, 0.75),
    "neither in this row": ({"begin": None, "stop": ""}, {"offset": "begin", "end": "stop"}, 1.0),
    "no number": ({"begin": 0.25, "stop": "0:01"}, {"offset": "begin", "end": "stop"}, "unreadable"),
    "end before start": ({"begin": 0.75, "stop": 0.25}, {"offset": "begin", "end": "stop"}, "unreadable"),
    "a folder before names": ({}, {"audio": "sub/{meta.file}.wav"}, 1.0),
    "a folder before no name": ({}, {"audio": "sub/{none}.wav"}, "no_audio"),
}


@pytest.mark.parametrize("case", PIECES)
def test_a_source_says_where_pieces_end_and_files_lie(tmp_path: Path, case: str) -> None:
    fields, columns, wanted = PIECES[case]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.wav").write_bytes(CLIP)
    path = write_lines(tmp_path / "t.jsonl", [{"audio": "sub/b.wav", "meta": {"file": "b"}, "text": "one", **fields}])
    spec = SourceSpec("s", str(path), "asr", reading=Reading(tuple(columns.items())))
    index = build_index([spec], tmp_path / "index", min_s=0.1, max_s=30.0)
    batch = load_micro_batch(index.table, 0.1, 30.0)
    assert [length / 16_000 for length in batch.lengths] or [bad.cause for bad in index.bad] == [wanted]
    assert index.durations.tolist() == [length / 16_000 for length in batch.lengths]
