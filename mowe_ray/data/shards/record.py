"""One sample's fields, whatever a corpus calls them, and the row that the index keeps of it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from mowe_ray.data.audio_headers import suffix_of
from mowe_ray.data.sample import BadAudio, BadSample, Sample, StorageError, Turn, is_about_storage, valid_text
from mowe_ray.data.shards.audio_field import find_audio
from mowe_ray.data.shards.choices import answer_among, find_choices, find_groups, with_choices
from mowe_ray.data.shards.conversation import check_answers, find_conversation, place_clips
from mowe_ray.data.shards.cut import from_cut, is_cut
from mowe_ray.data.shards.fields import (
    ANSWER_KEYS,
    DURATION_KEYS,
    ID_KEYS,
    INSTRUCTION_KEYS,
    OFFSET_KEYS,
    REFERENCES_KEYS,
    SPOKEN_KEYS,
    TASK_KEYS,
    Reading,
    as_text,
    check_texts,
    first_text,
    text_under,
    why_no_answer,
)
from mowe_ray.data.shards.mix import Clip, pieces
from mowe_ray.data.shards.storage import is_remote

# Asked when a corpus has no instructions, as speech recognition manifests do not.
DEFAULT_INSTRUCTIONS = {
    "asr": "Transcribe the speech.",
    "er": "Which emotion does the speaker express?",
    "ac": "Describe the audio.",
}
UNKNOWN_TASK = "other"
_LONGEST_NAME = 4096  # characters, as of a path
_LONGEST_TEXT = 100_000  # characters, an hour of speech; a tokeniser takes minutes for a file put here by mistake
_ANY = Reading()


@dataclass(frozen=True, slots=True)
class Record:
    """The understood fields of one JSON line or table row.

    Attributes:
        audio: the first clip; `more_audio` are those after it.
        duration_s: declared length, of all clips together.
        history: turns before the instruction.
        choices: of a multiple-choice question; `groups` are what it is scored apart by.
        unread: what looks like audio but is not read, where `audio` is None.
        no_answer: why there is no answer, where it is empty.
        others: fields that mean nothing here.
    """

    id: str | None
    audio: Clip | None
    instruction: str
    answer: str
    task: str | None
    duration_s: float | None
    offset_s: float | None
    references: tuple[str, ...] = ()
    unread: str | None = None
    no_answer: str = ""
    more_audio: tuple[Clip, ...] = ()
    history: tuple[Turn, ...] = ()
    choices: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clips(self) -> tuple[Clip, ...]:
        """All clips."""
        return () if self.audio is None else (self.audio, *self.more_audio)

    @property
    def asks(self) -> bool:
        """Whether there is an instruction, or a turn of the user before."""
        return bool(self.instruction) or any(turn.role == "user" and turn.text for turn in self.history)


def parse_record(fields: Mapping[str, Any], reading: Reading = _ANY, clips: int | None = None) -> Record:
    """Pick the understood fields out of a JSON object or table row.

    Args:
        fields: values by name.
        reading: what its source says about its rows.
        clips: how many clips there are where they lie beside the row; None takes those that it names.

    Raises:
        BadAudio: its turns or clips are not such that can be trained on.
    """
    if is_cut(fields):
        fields = from_cut(fields)
    fields = reading.renamed(fields)
    references = _references(fields)
    talk = find_conversation(fields)
    named = {"audio": list(talk.audio)} if talk is not None and talk.audio else fields
    audio, unread = find_audio(named, SPOKEN_KEYS if named is fields else ())
    if talk is None and unread is None:
        check_texts(fields)
    # The answer is what is learned; references are only for scoring, unless there is nothing else.
    answer = (
        (talk.answer if talk else None) or first_text(_answer_field(fields)) or (references[0] if references else "")
    )
    history, instruction = (talk.history, talk.instruction) if talk else ((), text_under(fields, INSTRUCTION_KEYS))
    number = len(audio) if clips is None else clips
    placed = talk is not None and talk.placed
    strict = fields.get("audios") is not None or (talk is not None and number > 0)
    history, instruction = place_clips(history, instruction, number, placed=placed, strict=strict)
    if strict and not placed:
        check_answers((*history, Turn("user", instruction)), answer, number)
    if reading.last_turn_only:
        history = tuple(turn._replace(learned=False) for turn in history)
    return Record(
        id=text_under(fields, ID_KEYS) or None,
        audio=audio[0] if audio else None,
        instruction=instruction,
        answer=reading.named(answer),
        task=text_under(fields, TASK_KEYS) or None,
        duration_s=_seconds(fields, DURATION_KEYS) or None,
        offset_s=_offset(fields),
        references=tuple(map(reading.named, references)),
        unread=unread,
        no_answer="" if answer else why_no_answer(fields, has_turns=talk is not None),
        more_audio=audio[1:],
        history=history,
        choices=find_choices(fields),
        groups=find_groups(fields),
        others=reading.others(fields),
    )


def _references(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return all right answers where there are several: a list under `references`, or instead of the answer."""
    for value in (*(fields.get(key) for key in REFERENCES_KEYS), _answer_field(fields)):
        if isinstance(value, list):
            return tuple(dict.fromkeys(text for text in map(as_text, value) if text))
    return ()


def _answer_field(fields: Mapping[str, Any]) -> Any:
    """Return what is under the first name that is there, even if it is empty: the next would be another text."""
    return next((fields[key] for key in ANSWER_KEYS if key in fields), None)


def _seconds(fields: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    text = text_under(fields, keys)
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _offset(fields: Mapping[str, Any]) -> float | None:
    """Return the start in seconds; NaN for one that is no such number, since taking the whole file would be wrong."""
    given = any(fields.get(key) not in (None, "") for key in OFFSET_KEYS)
    seconds = _seconds(fields, OFFSET_KEYS)
    return math.nan if given and seconds is None else seconds


@dataclass(frozen=True, slots=True)
class Row:
    """Index row of a sample; bad samples are rows too, with a cause.

    Attributes:
        duration_s: 0 for a text-only sample.
        audio_at: byte offset of the audio in a tar; row group in a Parquet or Arrow file.
        audio_size: bytes of audio in a tar, 0 elsewhere.
        meta_at: byte offset of the JSON or manifest line; row within the group in a table.
        meta_size: bytes of it, 0 in a table.
        clips: how many clips there are; `turns` of the assistant, one but in conversations.
        asks: whether the row itself has an instruction.
        parts: where more of it lies, as JSON: [suffix, byte offset, bytes] or, in another file, its path behind them.
    """

    id: str
    duration_s: float
    task: str
    audio_at: int = 0
    audio_size: int = 0
    meta_at: int = 0
    meta_size: int = 0
    clips: int = 0
    turns: int = 1
    asks: bool = False
    parts: str | None = None
    cause: str | None = None
    detail: str | None = None


# Ids of rows whose records have none, as a shard's stem or name and the place in it, and of rows whose id came before.
PLACE_ID = r":\d+(?::\d+)?(?:#\d+)?$"
REPEATED_ID = r"#(?:[2-9]|[1-9]\d+)$"


def is_made_of_place(row_id: str, shard: str) -> bool:
    """Whether the id of a row of the index was made of its place in the shard, because its record has none."""
    name = shard.rpartition("/")[2]
    made = re.search(PLACE_ID, row_id)
    return made is not None and row_id[: made.start()] in (name, name.rpartition(".")[0])


def repeated_id(record_id: str, number: int) -> str:
    """Return the id of the row whose record has the same id as `number - 1` rows before it."""
    return f"{record_id}#{number}"


ROW_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("duration_s", pa.float32()),
        ("task", pa.string()),
        ("audio_at", pa.int64()),
        ("audio_size", pa.int64()),
        ("meta_at", pa.int64()),
        ("meta_size", pa.int32()),
        ("clips", pa.int16()),
        ("turns", pa.int16()),
        ("asks", pa.bool_()),
        ("parts", pa.string()),
        ("cause", pa.string()),
        ("detail", pa.string()),
    ]
)


def rows_table(rows: list[Row]) -> pa.Table:
    """Return rows as a table of ROW_SCHEMA."""
    return pa.Table.from_pylist([asdict(row) | {"id": valid_text(row.id)} for row in rows], schema=ROW_SCHEMA)


def broken_shard(shard: str, detail: str) -> Row:
    """The one row that counts a shard which ends early or cannot be opened."""
    name = shard.rsplit("/", 1)[-1]
    return bad_row(name, BadAudio("broken_shard", detail))


def bad_row(sample_id: str, error: BadAudio) -> Row:
    """Return the index row of a sample that the scan found unusable."""
    return Row(sample_id, 0.0, UNKNOWN_TASK, cause=error.cause, detail=error.detail)


def row_of(record: Record, name: str, duration_s: float, reading: Reading, **places: Any) -> Row:
    """Return the index row of a usable record.

    Args:
        name: its id, if it has none of its own.
        **places: fields of `Row` that say where it lies.
    """
    return Row(
        id=record.id or name,
        duration_s=duration_s,
        task=record.task or reading.task or UNKNOWN_TASK,
        turns=1 + sum(turn.role == "assistant" for turn in record.history),
        asks=record.asks,
        **{"clips": len(record.clips), **places},
    )


def check_record(record: Record, has_audio: bool) -> None:
    """Raise BadAudio unless all text can be written, and there are an answer and audio, or an answer and a question."""
    for name, text in _texts(record):
        _check_text(name, text)
    if record.offset_s is not None and record.more_audio:
        raise BadAudio("unreadable", "an offset is for one clip, not for several")
    if record.offset_s is not None and math.isnan(record.offset_s):
        raise BadAudio("unreadable", "offset is not a number of seconds from 0 on, or not before the end")
    if any(turn.role == "assistant" and turn.learned and not turn.text for turn in record.history):
        raise BadAudio("no_answer", "a turn of the assistant is empty: give it text, or loss: false")
    if not record.answer:
        raise BadAudio("no_answer", record.no_answer)
    if has_audio:
        return
    if record.unread:
        raise BadAudio("unknown_audio", record.unread)
    if record.audio is not None:
        name = record.audio if isinstance(record.audio, str) else "audio inside of its JSON"
        raise BadAudio("no_audio", f"names {name}, which is not in the shard")
    if record.duration_s or not record.asks:
        raise BadAudio("no_audio", "no audio, and not a text-only sample")


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    yield from (("id", record.id or ""), ("task", record.task or ""))
    yield from (("instruction", record.instruction), ("answer", record.answer))
    yield from (("references", text) for text in (*record.references, *record.choices, *record.groups.values()))
    yield from (("turns", turn.text) for turn in record.history)
    yield from (("audio", clip) for clip in pieces(record.clips) if isinstance(clip, str))


def _check_text(name: str, text: str) -> None:
    longest = _LONGEST_NAME if name in ("id", "task", "audio") else _LONGEST_TEXT
    if len(text) > longest:
        raise BadAudio("unreadable", f"{name} has {len(text)} characters, at most {longest}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 10) : error.start + 10]
        raise BadAudio("unreadable", f"{name} is not valid Unicode at character {error.start}: {around!r}") from error
    if name == "audio" and "\0" in text:
        raise BadAudio("unreadable", f"{name} has a NUL in its path: {text!r}")


def raise_if_storage(shard: str, error: Exception) -> None:
    """Raise an error of reading an indexed shard that is the storage's.

    So is one of a remote shard that is gone: it was there when it was indexed.
    """
    if is_about_storage(error):
        raise error
    if is_remote(shard) and isinstance(error, FileNotFoundError):
        raise StorageError(f"{shard} was there when it was indexed, and is gone") from error


@dataclass(frozen=True, slots=True)
class Place:
    """An index row as the readers see it: which sample, where it lies, and what it may open beside its folder."""

    id: str
    source: str
    shard: str
    task: str
    audio_at: int
    audio_size: int
    meta_at: int
    meta_size: int
    parts: str | None = None
    allow_paths: tuple[str, ...] = ()
    reading: Reading = _ANY


def make_sample(place: Place, record: Record, clips: Sequence[bytes]) -> Sample:
    """Join text and audio of one place.

    Raises:
        BadAudio: when the record is not usable (the index did not look, or the file changed).
        StorageError: it is another's: the shard was written anew after it was indexed.
    """
    if record.id is not None and valid_text(record.id) not in (place.id, re.sub(REPEATED_ID, "", place.id)):
        raise StorageError(
            f"{place.shard} was written anew while it was in use: where {place.id} was, there is {record.id} now. "
            "Run the same command again, which indexes it again"
        )
    check_record(record, bool(clips))
    audio = clips[0] if clips else None
    asked = record.instruction or ("" if record.asks else place.reading.instruction_for(place.id))
    return Sample(
        id=place.id,
        audio=audio,
        instruction=asked if record.asks and not asked else _question(asked, record.choices, place.task),
        answer=answer_among(record.answer, record.choices, place.task),
        task=place.task,
        source=place.source,
        suffix=(suffix_of(audio) or "") if audio else "",
        duration_s=record.duration_s if len(clips) < 2 else None,
        offset_s=record.offset_s if len(clips) < 2 else None,
        references=record.references,
        more_audio=tuple(clips[1:]),
        history=record.history,
        path=record.audio if isinstance(record.audio, str) else "",
        choices=record.choices,
        groups=record.groups,
        others=record.others,
    )


def sample_of_texts(texts: Mapping[str, Any], sample_id: str, task: str, source: str) -> Sample:
    """Return the sample of texts that were kept of it, by `make_sample` for another task, as it is for this one."""
    choices = tuple(texts.get("choices") or ())
    return Sample(
        id=sample_id,
        audio=None,
        instruction=_question(texts["instruction"], choices, task),
        answer=answer_among(texts["answer"], choices, task),
        task=task,
        source=source,
        references=tuple(texts["references"]),
        choices=choices,
        groups=dict(texts.get("groups") or ()),
    )


def _question(instruction: str, choices: Sequence[str], task: str) -> str:
    return with_choices(instruction or DEFAULT_INSTRUCTIONS.get(task, ""), choices, task)


def bad_sample(place: Place, error: BadAudio) -> BadSample:
    """Return the sample of a place as a bad one."""
    return BadSample(place.id, place.source, error.cause, error.detail)
