"""Conversations in rows: their turns, and where their clips go."""

import base64
import json
from pathlib import Path

import pytest

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.data.sample import CLIP, BadAudio, Sample, Turn
from mowe_ray.data.shards import read_samples
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.record import parse_record
from mowe_ray.data.shards.write import write_parquet, write_webdataset
from tests.read_source import CLIP as SOUND
from tests.read_source import write_lines, write_tar

USER, BOT = "user", "assistant"


def talk(*turns: tuple[str, str], **fields: object) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **fields}


def test_turns_before_the_last_question_are_its_history() -> None:
    record = parse_record(
        talk(
            ("system", "Be short."),
            (USER, "<audio>What?"),
            (BOT, "a dog"),
            (USER, "Then?"),
            (BOT, "rain"),
            audios=["a"],
        )
    )
    assert record.history == (Turn("system", "Be short."), Turn(USER, f"{CLIP}\nWhat?"), Turn(BOT, "a dog"))
    assert (record.instruction, record.answer, record.clips) == ("Then?", "rain", ("a",))


@pytest.mark.parametrize(
    "fields",
    [
        talk((USER, "<audio>What?"), (BOT, "a dog"), audios=["a"]),
        talk((USER, "<audio>\nWhat?"), (BOT, "a dog"), audios=["a"]),
        talk((USER, "What?"), (BOT, "a dog"), audio="a"),
        {
            "conversations": [{"from": "human", "value": "<audio>What?"}, {"from": "gpt", "value": "a dog"}],
            "audio": "a",
        },
        {
            "conversations": json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a dog"}]),
            "audio": "a",
        },
        {"query": "<audio>What?", "response": "a dog", "audios": ["a"]},
        {"instruction": "What?", "input": "", "output": "a dog", "audios": ["a"]},
        {"instruction": "What?", "answer": "a dog", "audio": "a"},
    ],
    ids=["tag", "line", "bare", "sharegpt", "text", "query", "alpaca", "plain"],
)
def test_one_question_about_one_clip_is_the_simple_case(fields: dict) -> None:
    record = parse_record(fields)
    assert (record.history, record.instruction, record.answer, record.clips) == ((), "What?", "a dog", ("a",))


def test_clips_between_words_stay_there() -> None:
    record = parse_record(talk((USER, "Is <audio> louder than <audio>?"), (BOT, "yes"), audios=["a", "b"]))
    assert record.instruction == f"Is {CLIP} louder than {CLIP}?"
    assert record.clips == ("a", "b")
    both = parse_record(talk((USER, "<audio><audio>Which is louder?"), (BOT, "a"), audios=["a", "b"]))
    assert both.instruction == "Which is louder?"
    later = parse_record(talk((USER, "<audio>What?"), (BOT, "x"), (USER, "<audio>And?"), (BOT, "y"), audios=["a", "b"]))
    assert [turn.text for turn in later.history] == [f"{CLIP}What?", "x"]
    assert later.instruction == f"{CLIP}And?"


def test_parts_of_openai_hold_or_name_their_clips() -> None:
    data = base64.b64encode(SOUND).decode()
    parts = [
        {"type": "text", "text": "Hear"},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "audio", "audio": "b.wav", "text": None},
    ]
    record = parse_record({"messages": [{"role": USER, "content": parts}, {"role": BOT, "content": "ok"}]})
    assert record.clips == (SOUND, "b.wav")
    assert record.instruction == f"Hear{CLIP}{CLIP}"


def test_alpaca_history_and_system() -> None:
    fields = {"instruction": "Sum up", "input": "this", "output": "short", "history": [["a?", "b"]], "system": "S"}
    record = parse_record(fields)
    assert record.history == (Turn("system", "S"), Turn(USER, "a?"), Turn(BOT, "b"))
    assert (record.instruction, record.answer) == ("Sum up\nthis", "short")


def test_which_turns_are_learned() -> None:
    rows = talk((USER, "a"), (BOT, "b"), (USER, "c"), (BOT, "d"))
    rows["messages"][1]["loss"] = False
    assert [turn.learned for turn in parse_record(rows).history] == [True, False]
    del rows["messages"][1]["loss"]
    assert [turn.learned for turn in parse_record(rows).history] == [True, True]
    assert [turn.learned for turn in parse_record(rows, Reading(last_turn_only=True)).history] == [False, False]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            talk((USER, "<audio><audio>"), (BOT, "b"), (USER, "c"), (BOT, "d"), audios=["a"]),
            "2 places <audio> for 1 clip",
        ),
        (talk((USER, "a"), ("tool", "b")), "a turn has a role"),
        (talk((USER, "a"), ("system", "b"), (USER, "c"), (BOT, "d")), "not the first one"),
        ({"messages": "[broken"}, "not JSON"),
        ({"messages": {"role": USER}}, "a list of messages"),
    ],
)
def test_turns_that_cannot_be_trained_on_say_why(fields: dict, why: str) -> None:
    with pytest.raises(BadAudio, match=why):
        parse_record(fields)


def test_a_conversation_that_ends_with_a_question_has_no_answer(tmp_path: Path) -> None:
    shard = write_lines(tmp_path / "m.jsonl", [talk((USER, "a"), (BOT, "b"), (USER, "c"))])
    (bad,) = build_index([SourceSpec("s", str(shard))], tmp_path / "cache", min_s=0.1, max_s=30).bad
    assert (bad.cause, bad.detail) == ("no_answer", "the last turn is not the assistant's, or is empty")


def conversations() -> list[Sample]:
    history = (Turn(USER, f"{CLIP} or {CLIP}?"), Turn(BOT, "the first", False))
    return [
        Sample(
            "two",
            SOUND,
            f"And {CLIP}?",
            "a <audio> tag",
            "chat",
            "made",
            "wav",
            more_audio=(SOUND, SOUND),
            history=history,
        ),
        Sample("one", SOUND, "What?", "a tone", "aqa", "made", "wav", 1.0),
        Sample("none", None, "And?", "nothing", "chat", "made", history=(Turn(USER, "Hear?"), Turn(BOT, "no"))),
    ]


@pytest.mark.parametrize("write", [write_webdataset, write_parquet])
def test_conversations_come_back_as_they_were_written(tmp_path: Path, write) -> None:
    (shard,) = write(conversations(), str(tmp_path)).shards
    index = build_index([SourceSpec("made", shard)], tmp_path / "cache", min_s=0.1, max_s=30)
    assert index.table["clips"].to_pylist() == [3, 1, 0]
    assert index.table["turns"].to_pylist() == [2, 1, 2]
    assert index.durations.tolist() == [3.0, 1.0, 0.0]
    for found, sample in zip(read_samples(index.table), conversations(), strict=True):
        assert isinstance(found, Sample)
        assert (found.id, found.clips, found.history) == (sample.id, sample.clips, sample.history)
        assert (found.instruction, found.answer) == (sample.instruction, sample.answer)


def test_a_micro_batch_keeps_clips_and_turns_of_each_row(tmp_path: Path) -> None:
    (shard,) = write_webdataset(conversations(), str(tmp_path)).shards
    index = build_index([SourceSpec("made", shard)], tmp_path / "cache", min_s=0.1, max_s=30)
    batch = load_micro_batch(index.table, 0.1, 30)
    assert [[len(clip) for clip in clips] for clips in batch.clips()] == [[16_000] * 3, [16_000], []]
    assert batch.turns_before[0] == list(conversations()[0].history)
    restored = MicroBatch.from_row(batch.to_row())
    assert (restored.turns_before, restored.row_lengths) == (batch.turns_before, batch.row_lengths)
    left = restored.without({1: BadAudio("crashed", "")})
    assert (left.ids, left.row_lengths) == (["two", "none"], [[16_000] * 3, []])
    parts = [restored.without({n: BadAudio("crashed", "") for n in range(3) if n != row}) for row in range(3)]
    joined = MicroBatch.joined(parts)
    assert (joined.ids, joined.row_lengths, joined.turns_before) == (batch.ids, batch.row_lengths, batch.turns_before)


def test_members_of_webdataset_in_any_order(tmp_path: Path) -> None:
    note = json.dumps(
        talk((USER, "Is <audio> like <audio>?"), (BOT, "yes"), audios=["a.two.wav", "a.one.wav"])
    ).encode()
    names = [("a.json", note), ("a.one.wav", SOUND), ("a.two.wav", SOUND + b"\0\0"), ("b.wav", SOUND), ("b.txt", b"b")]
    shard = write_tar(tmp_path / "a.tar", *names)
    index = build_index([SourceSpec("s", str(shard))], tmp_path / "cache", min_s=0.1, max_s=30)
    first, second = read_samples(index.table)
    assert isinstance(first, Sample)
    assert first.clips == (SOUND + b"\0\0", SOUND)
    assert isinstance(second, Sample)
    assert second.answer == "b"
