"""One sample's fields, whatever a corpus calls them, and the row that the index keeps of it."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from mowe_ray.data.audio_headers import suffix_of
from mowe_ray.data.sample import BadAudio, BadSample, Sample, StorageError, valid_text
from mowe_ray.data.shards.audio_field import find_audio

# Names understood for each field, the first present one wins. NeMo: text, offset; Hugging Face speech corpora:
# sentence, transcription. Names of the audio: `audio_field.AUDIO_KEYS`.
ID_KEYS = ("id", "utt_id", "uid")
INSTRUCTION_KEYS = ("instruction", "question", "prompt")
ANSWER_KEYS = ("answer", "text", "sentence", "transcription", "transcript", "caption")
REFERENCES_KEYS = ("references",)
TASK_KEYS = ("task",)
DURATION_KEYS = ("duration", "duration_s")
OFFSET_KEYS = ("offset",)
TEXT_KEYS = (*ID_KEYS, *INSTRUCTION_KEYS, *ANSWER_KEYS, *REFERENCES_KEYS, *TASK_KEYS, *DURATION_KEYS, *OFFSET_KEYS)

# Asked when a corpus has no instructions, as speech recognition manifests do not.
DEFAULT_INSTRUCTIONS = {
    "asr": "Transcribe the speech.",
    "er": "Which emotion does the speaker express?",
    "ac": "Describe the audio.",
}
UNKNOWN_TASK = "other"
_LONGEST_NAME = 4096  # characters, as of a path
_LONGEST_TEXT = 100_000  # characters, an hour of speech; a tokeniser takes minutes for a file put here by mistake


@dataclass(frozen=True, slots=True)
class Record:
    """The understood fields of one JSON line or table row.

    Attributes:
        audio: a path or an encoded file.
        unread: what looks like audio but is not read, where `audio` is None.
        no_answer: why there is no answer, where it is empty.
    """

    id: str | None
    audio: str | bytes | None
    instruction: str
    answer: str
    task: str | None
    duration_s: float | None
    offset_s: float | None
    references: tuple[str, ...] = ()
    unread: str | None = None
    no_answer: str = ""


def parse_record(fields: Mapping[str, Any]) -> Record:
    """Pick the understood fields out of a JSON object or table row."""
    references = _references(fields)
    audio, unread = find_audio(fields, _TEXTS)
    # The answer is what is learned; references are only for scoring, unless there is nothing else.
    answer = _first_text(_answer_field(fields)) or (references[0] if references else "")
    return Record(
        id=_text(fields, ID_KEYS) or None,
        audio=audio,
        instruction=_text(fields, INSTRUCTION_KEYS),
        answer=answer,
        task=_text(fields, TASK_KEYS) or None,
        duration_s=_seconds(fields, DURATION_KEYS) or None,
        offset_s=_offset(fields),
        references=references,
        unread=unread,
        no_answer="" if answer else _no_answer(fields),
    )


_TEXTS = (*INSTRUCTION_KEYS, *ANSWER_KEYS, *REFERENCES_KEYS, *TASK_KEYS)


def _references(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return all right answers where there are several: a list under `references`, or instead of the answer."""
    for value in (*(fields.get(key) for key in REFERENCES_KEYS), _answer_field(fields)):
        if isinstance(value, list):
            return tuple(dict.fromkeys(text for text in map(as_text, value) if text))
    return ()


def _answer_field(fields: Mapping[str, Any]) -> Any:
    """Return what is under the first name that is there, even if it is empty: the next would be another text."""
    return next((fields[key] for key in ANSWER_KEYS if key in fields), None)


def _no_answer(fields: Mapping[str, Any]) -> str:
    key = next((key for key in ANSWER_KEYS if key in fields), None)
    if key is None or fields[key] in ("", None):
        return f"none of {', '.join(ANSWER_KEYS)} has text" if key is None else f"{key!r} is empty"
    return f"{key!r} is {str(fields[key])[:60]!r}, which is no text"


def _text(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next((text for text in (_first_text(fields.get(key)) for key in keys) if text), "")


def _first_text(value: Any) -> str:
    """Return a value as text; of several references the first is the one to learn."""
    values = value if isinstance(value, list) else [value]
    return next((text for text in map(as_text, values) if text), "")


def as_text(value: Any) -> str:
    """Return a string, or a number as it is written; "" for all else, NaN and infinity among it.

    Whole numbers have no decimals: a column of integers with gaps is one of floats.
    """
    if isinstance(value, float):
        return (str(int(value)) if value.is_integer() else str(value)) if math.isfinite(value) else ""
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _seconds(fields: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    text = _text(fields, keys)
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
    """

    id: str
    duration_s: float
    task: str
    audio_at: int = 0
    audio_size: int = 0
    meta_at: int = 0
    meta_size: int = 0
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


def check_record(record: Record, has_audio: bool) -> None:
    """Raise BadAudio unless there is an answer, and audio or an instruction with nothing that looks like audio.

    All text must be Unicode that can be written, and no longer than text is.
    """
    for name, text in _texts(record):
        _check_text(name, text)
    if record.offset_s is not None and math.isnan(record.offset_s):
        raise BadAudio("unreadable", "offset is not a number of seconds from 0 on")
    if not record.answer:
        raise BadAudio("no_answer", record.no_answer)
    if has_audio:
        return
    if record.unread:
        raise BadAudio("unknown_audio", record.unread)
    if record.audio is not None:
        name = record.audio if isinstance(record.audio, str) else "audio inside of its JSON"
        raise BadAudio("no_audio", f"names {name}, which is not in the shard")
    if record.duration_s or not record.instruction:
        raise BadAudio("no_audio", "no audio, and not a text-only sample")


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    yield from (("id", record.id or ""), ("task", record.task or ""))
    yield from (("instruction", record.instruction), ("answer", record.answer))
    yield from (("references", text) for text in record.references)
    if isinstance(record.audio, str):
        yield "audio", record.audio


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
    allow_paths: tuple[str, ...] = ()


def make_sample(place: Place, record: Record, audio: bytes | None) -> Sample:
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
    check_record(record, audio is not None)
    return Sample(
        id=place.id,
        audio=audio,
        instruction=record.instruction or DEFAULT_INSTRUCTIONS.get(place.task, ""),
        answer=record.answer,
        task=place.task,
        source=place.source,
        suffix=(suffix_of(audio) or "") if audio else "",
        duration_s=record.duration_s,
        offset_s=record.offset_s,
        references=record.references,
    )


def bad_sample(place: Place, error: BadAudio) -> BadSample:
    """Return the sample of a place as a bad one."""
    return BadSample(place.id, place.source, error.cause, error.detail)
