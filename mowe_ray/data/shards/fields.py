"""Names of a row's fields, whatever a corpus calls them, and what a source says about its rows."""

import math
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from mowe_ray.data.sample import BadAudio

Field = Literal[
    "id",
    "audio",
    "instruction",
    "answer",
    "references",
    "choices",
    "task",
    "duration",
    "offset",
    "end",
    "messages",
    "system",
    "history",
]
FIELDS: tuple[Field, ...] = get_args(Field)

# The first present name wins. NeMo: text, offset; Hugging Face speech corpora: sentence, transcription; alpaca: output;
# ms-swift: query, response; XARES-LLM: label, labels, captions. Audio: NeMo: audio_filepath; AudioBench: context;
# ms-swift: audios; audiofolder: file_name.
AUDIO_KEYS = (
    *("audio", "audio_filepath", "audio_path", "context", "audio_file", "audios", "wav", "wav_path", "speech", "sound"),
    *("file_name", "filename", "path", "file"),
)
ID_KEYS = ("id", "utt_id", "uid", "utterance_id", "key")
INSTRUCTION_KEYS = ("instruction", "question", "prompt", "query")
ANSWER_KEYS = (
    *("answer", "text", "sentence", "transcription", "transcript", "caption", "output", "response", "completion"),
    *("target", "captions", "label", "labels", "emotion"),
)
REFERENCES_KEYS = ("references",)
CHOICES_KEYS = ("choices",)
GROUPS_KEYS = ("groups",)  # what samples are scored apart by
TASK_KEYS = ("task",)
DURATION_KEYS = ("duration", "duration_s")
OFFSET_KEYS = ("offset",)
TURNS_KEYS = ("messages", "conversations", "conversation")
SYSTEM_KEYS = ("system",)
HISTORY_KEYS = ("history",)
INPUT_KEYS = ("input",)  # alpaca: what its instruction is about
CUT_KEYS = ("supervisions", "recording", "tracks", "start", "channel", "custom", "type")  # of a cut of lhotse
RATE_KEYS = ("sampling_rate", "sample_rate", "sr")
SPOKEN_KEYS = (
    *(*INSTRUCTION_KEYS, *ANSWER_KEYS, *REFERENCES_KEYS, *CHOICES_KEYS, *GROUPS_KEYS, *TASK_KEYS),
    *(*TURNS_KEYS, *SYSTEM_KEYS, *HISTORY_KEYS, *INPUT_KEYS),
)
TEXT_KEYS = (*ID_KEYS, *SPOKEN_KEYS, *DURATION_KEYS, *OFFSET_KEYS)
_USUAL_KEYS = frozenset((*AUDIO_KEYS, *TEXT_KEYS))


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of a source are read.

    Attributes:
        columns: the name of a field in the rows, by its name here; `a.b` is b within a, `clips/{a}.wav` a text with a.
        task: of rows that name none.
        instructions: asked where a row asks nothing; of several, one is drawn for each sample.
        labels: names of classes: an answer that is a whole number is a position among them.
        last_turn_only: learn the last turn of the assistant alone.
        seed: of what is drawn.
    """

    columns: tuple[tuple[Field, str], ...] = ()
    task: str | None = None
    instructions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    last_turn_only: bool = False
    seed: int = 0

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the columns of a table that are read in any case."""
        return tuple(name for _, column in self.columns for name in names_in(column))

    def renamed(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row with the fields of `columns` under their usual names, and `Text`, `TEXT` under `text`."""
        moved: dict[str, Any] = {field: look_up(fields, column) for field, column in self.columns}
        if "end" in moved:
            moved |= _until(moved.pop("end"), moved.get("offset", fields.get("offset")))
        elif "onset" in fields and "offset" in fields and "offset" not in moved:
            fix = "say so by columns={offset: onset, end: offset}"
            raise BadAudio("unreadable", f"with 'onset', 'offset' is the end of an event, not its start: {fix}")
        given = {column for _, column in self.columns}
        left = {name: value for name, value in fields.items() if name not in given} if moved else fields
        small = {name.lower(): value for name, value in left.items() if isinstance(name, str) and name != name.lower()}
        small = {name: value for name, value in small.items() if name in _USUAL_KEYS and name not in left}
        return {**left, **small, **moved} if small or moved else fields

    def others(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a renamed row that mean nothing here, as far as JSON has values like theirs."""
        taken = {column for _, column in self.columns}
        return {
            name: value
            for name, value in fields.items()
            if name.lower() not in _USUAL_KEYS and name not in taken and _is_json(value)
        }

    def instruction_for(self, sample_id: str) -> str:
        """Return the instruction of a sample that has none; "" if the source has none either."""
        if len(self.instructions) < 2:
            return self.instructions[0] if self.instructions else ""
        # By id, not by position: it stays when a corpus grows or is read in another order.
        return random.Random(f"{self.seed} {sample_id}").choice(self.instructions)

    def named(self, answer: str) -> str:
        """Return an answer, a position among `labels` by name.

        Raises:
            BadAudio: it is none of the labels.
        """
        if not self.labels or not answer or answer in self.labels:
            return answer
        if answer.isdecimal() and int(answer) < len(self.labels):
            return self.labels[int(answer)]
        some = ", ".join(self.labels[:5]) + ("..." if len(self.labels) > 5 else "")
        raise BadAudio("no_answer", f"{answer[:60]!r} is none of the {len(self.labels)} labels of its source ({some})")

    def to_json(self) -> dict[str, Any]:
        """Return what `of` takes, as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Reading":
        """Make it of what `to_json` returned."""
        columns = tuple((field, column) for field, column in values["columns"])
        lists = {name: tuple(values[name]) for name in ("instructions", "labels")}
        return cls(**{**values, "columns": columns, **lists})


def _is_json(value: Any) -> bool:
    """Whether JSON has a value, which is not null."""
    if isinstance(value, Mapping | list):
        parts = value.values() if isinstance(value, Mapping) else value
        return all(part is None or _is_json(part) for part in parts)
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _until(end: Any, start: Any) -> dict[str, Any]:
    """Return the fields of a piece up to `end`; a wrong offset, which is refused, where there is none such."""
    if end in (None, ""):
        return {}
    try:
        seconds = float(as_text(end)) - float(as_text(start) or 0)
    except ValueError:
        seconds = 0.0
    return {"duration": seconds, **({} if start else {"offset": 0.0})} if seconds > 0 else {"offset": "end"}


_NAMED = re.compile(r"\{([^{}]+)\}")


def names_in(column: str) -> list[str]:
    """Return the names of the fields of a row that a column is made of, without what is within them."""
    return [name.partition(".")[0] for name in _NAMED.findall(column) or [column]]


def look_up(fields: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column; of `a.b` that of b in a, of `clips/{a}.wav` a text. None where there is none."""
    if column in fields:
        return fields[column]
    if names := _NAMED.findall(column):
        texts = {name: as_text(look_up(fields, name)) for name in names}
        return _NAMED.sub(lambda match: texts[match[1]], column) if all(texts.values()) else None
    value: Any = fields
    for part in column.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping):
            value = value.get(part)
        else:
            return None
    return value


def as_text(value: Any) -> str:
    """Return a string, or a number as it is written; "" for all else, NaN and infinity among it.

    Whole numbers have no decimals: a column of integers with gaps is one of floats.
    """
    if isinstance(value, float):
        return (str(int(value)) if value.is_integer() else str(value)) if math.isfinite(value) else ""
    return str(value).strip() if isinstance(value, str | int | Decimal) and not isinstance(value, bool) else ""


def first_text(value: Any) -> str:
    """Return a value as text; of several references the first is the one to learn."""
    values = value if isinstance(value, list) else [value]
    return next((text for text in map(as_text, values) if text), "")


def text_under(fields: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """Return the first text under any of these names; "" if there is none."""
    return next((text for text in (first_text(fields.get(key)) for key in keys) if text), "")


def check_texts(fields: Mapping[str, Any]) -> None:
    """Raise BadAudio where a text is given as something else: the usual one would take its place without a word."""
    for keys in (INSTRUCTION_KEYS, SYSTEM_KEYS, INPUT_KEYS, TASK_KEYS):
        if text_under(fields, keys):
            continue
        for key in keys:
            value = fields.get(key)
            inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            if any(item not in (None, "") for item in inner):
                raise BadAudio("unreadable", f"{key!r} is {str(value)[:60]!r}, which is no text")


def why_no_answer(fields: Mapping[str, Any], *, has_turns: bool) -> str:
    """Return why a row without an answer has none, for messages."""
    if has_turns:
        return "the last turn is not the assistant's, or is empty"
    key = next((key for key in ANSWER_KEYS if key in fields), None)
    if key is None:
        rows = next((name for name, value in fields.items() if _holds_rows(value)), None)
        within = (
            "" if rows is None else f"rows seem to be under {str(rows)!r}: write a list of them, or a line for each; "
        )
        return f"{within}none of {', '.join(ANSWER_KEYS)} has text"
    value = fields[key]
    if isinstance(value, Mapping) and value:
        return f"{key!r} holds {', '.join(map(str, value))}: name one, as columns={{answer: {key}.{next(iter(value))}}}"
    return f"{key!r} is empty" if value in ("", None) else f"{key!r} is {str(value)[:60]!r}, which is no text"


def is_no_row(fields: Mapping[str, Any]) -> bool:
    """Whether an object has no field of a usual name."""
    return all(name.lower() not in _USUAL_KEYS and name not in CUT_KEYS for name in fields)


def _holds_rows(value: Any) -> bool:
    first = next(iter(value), None) if isinstance(value, list) else value
    return isinstance(first, Mapping) and any(key in first for key in (*ANSWER_KEYS, *TURNS_KEYS))
