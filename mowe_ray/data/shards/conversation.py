"""Conversations in a row, as ms-swift, sharegpt, OpenAI and alpaca write them, and where their clips go."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mowe_ray.data.sample import CLIP, BadAudio, Turn
from mowe_ray.data.shards.audio_field import is_audio_name
from mowe_ray.data.shards.fields import (
    HISTORY_KEYS,
    INPUT_KEYS,
    INSTRUCTION_KEYS,
    SYSTEM_KEYS,
    TURNS_KEYS,
    as_text,
    text_under,
)

_ROLES = {"system": "system"}
_ROLES |= dict.fromkeys(("user", "human", "instruction"), "user")
_ROLES |= dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot"), "assistant")
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
_AUDIO_PART_KEYS = ("audio", "audio_url", "input_audio", "url", "path", "data")
_AUDIO_PARTS = ("audio", "audio_url", "input_audio")
_SEEN = ("images", "videos")
# LLaMA-Factory, ms-swift and ours; Qwen2-Audio's; those of models of speech.
_PLACE = re.compile(r"<audio>|<\|audio\|>|(?:<\|audio_bos\|>)?<\|AUDIO\|>(?:<\|audio_eos\|>)?|<speech>|<sound>")
_WRITTEN = re.compile(r"<audio>([^<>\n]{1,4096})</audio>")  # Qwen-Audio's, and of ms-swift before `audios`


def is_turn(value: object) -> bool:
    """Whether an object has the fields of a turn."""
    return isinstance(value, dict) and all(not value.keys().isdisjoint(keys) for keys in (_ROLE_KEYS, _CONTENT_KEYS))


class Conversation(NamedTuple):
    """A row's turns, and the clips within them.

    Attributes:
        history: before the last question.
        instruction: the last question; "" if there is none.
        answer: None if the last turn is not the assistant's.
        audio: what the parts of the turns name as audio, in order.
        placed: whether contents are lists of parts, in which `<audio>` is text.
    """

    history: tuple[Turn, ...]
    instruction: str
    answer: str | None
    audio: tuple[Any, ...] = ()
    placed: bool = False


def find_conversation(fields: Mapping[str, Any]) -> Conversation | None:
    """Return the conversation of a row; None for one that asks a single question, or none.

    Raises:
        BadAudio: it has turns, but not such that can be trained on.
    """
    audio: list[Any] = []
    given = next((fields[key] for key in TURNS_KEYS if fields.get(key) not in (None, "", [])), None)
    seen = _SEEN if given is None else (*_SEEN, "image", "video")
    if some := next((key for key in seen if fields.get(key)), None):
        raise BadAudio("unreadable", f"{some!r} is not empty, and only text and audio are read: take it out")
    placed = False
    if given is not None:
        entries = _entries(given)
        turns = [_turn(entry, audio) for entry in entries]
        placed = any(isinstance(entry.get(key), list) for entry in entries for key in _CONTENT_KEYS)
    else:
        turns = _from_pairs(fields)
        if not turns:
            return None
    if not placed:
        turns = [_with_names(turn, audio) for turn in turns]
    if (system := text_under(fields, SYSTEM_KEYS)) and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    turns = _merged(turns)
    if turns and not turns[-1].learned:
        raise BadAudio("no_answer", "the last turn is not to be learned (loss: false): take it out")
    answer = turns.pop().text if turns and turns[-1].role == "assistant" else None
    instruction = turns.pop().text if turns and turns[-1].role == "user" else ""
    return Conversation(tuple(turns), instruction, answer, tuple(audio), placed)


def _entries(given: Any) -> list[Any]:
    try:
        entries = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise BadAudio("unreadable", f"turns: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise BadAudio("unreadable", f"turns are a list of messages, not {str(entries)[:60]!r}")
    return entries


def _turn(entry: Any, audio: list[Any]) -> Turn:
    """Return a message as a turn, and append the clips that its parts name to `audio`."""
    name = next((entry[key] for key in _ROLE_KEYS if key in entry), None) if isinstance(entry, Mapping) else None
    role = _ROLES.get(str(name).lower())
    if role is None:
        raise BadAudio("unreadable", f"a turn has a role, {', '.join(_ROLES)}, and not {str(name or entry)[:60]!r}")
    content = next((entry[key] for key in _CONTENT_KEYS if entry.get(key) is not None), "")
    parts = content if isinstance(content, list) else [content]
    text = "".join(_part(part, audio) if isinstance(part, Mapping) else as_text(part) for part in parts)
    return Turn(role, text.strip(), entry.get("loss") not in (False, 0))


def _with_names(turn: Turn, audio: list[Any]) -> Turn:
    """Return a turn of the user with `<audio>` for each `<audio>NAME</audio>`, the names of which go to `audio`."""

    def place(match: re.Match[str]) -> str:
        audio.append(match[1].strip())
        return "<audio>"

    names = _WRITTEN.findall(turn.text) if turn.role == "user" else []
    return turn._replace(text=_WRITTEN.sub(place, turn.text)) if names and all(map(is_audio_name, names)) else turn


def _part(part: Mapping[str, Any], audio: list[Any]) -> str:
    """Return the text of a part of a message, or `CLIP` for a clip, which is appended to `audio`."""
    part = {key: value for key, value in part.items() if value is not None}  # those of Arrow have all keys
    kind = part.get("type", next(iter(part), ""))
    if kind in _AUDIO_PARTS:
        clip = _clip(part)
        audio += [] if clip is None else [clip]
        return CLIP
    if part and "text" not in part:
        raise BadAudio("unreadable", f"a turn has a part of type {str(kind)[:40]!r}; only text and audio are read")
    return str(part.get("text", ""))


def _clip(part: Mapping[str, Any]) -> Any:
    """Return what the part of a message names as audio: a path, URL, mapping or encoded file."""
    value = next((part[key] for key in _AUDIO_PART_KEYS if key in part), None)
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        value = value["url"]
    elif isinstance(value, Mapping) and isinstance(value.get("data"), str):
        value = value["data"]
    return value


def _from_pairs(fields: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a row with a history of (question, answer) pairs, a system text, or alpaca's input."""
    pairs: list[Any] = next((fields[key] for key in HISTORY_KEYS if isinstance(fields.get(key), list)), [])
    if some := next((pair for pair in pairs if not isinstance(pair, list) or len(pair) != 2), None):
        raise BadAudio("unreadable", f"history is a list of [question, answer], and not of {str(some)[:60]!r}")
    turns = [
        Turn(role, as_text(text)) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    about = text_under(fields, INPUT_KEYS)
    question = "\n".join(filter(None, (text_under(fields, INSTRUCTION_KEYS), about)))
    if not (turns or about or text_under(fields, SYSTEM_KEYS) or _WRITTEN.search(question)):
        return []
    return [*turns, Turn("user", question)]


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Join neighbours of one role: chat templates take turns in alternation.

    Raises:
        BadAudio: a system text is not the first turn, which few templates have a place for.
    """
    merged: list[Turn] = []
    for turn in turns:
        if merged and turn.role == merged[-1].role:
            before = merged.pop()
            turn = Turn(turn.role, "\n".join(filter(None, (before.text, turn.text))), before.learned and turn.learned)
        merged.append(turn)
    if any(turn.role == "system" for turn in merged[1:]):
        raise BadAudio("unreadable", "a turn of the system is not the first one")
    return merged


def place_clips(
    history: tuple[Turn, ...], instruction: str, clips: int, *, placed: bool, strict: bool = False
) -> tuple[tuple[Turn, ...], str]:
    """Return the turns of the user with `CLIP` where each clip goes; without any, a single question has them first.

    Args:
        history: turns before.
        instruction: the last question.
        clips: how many there are.
        placed: whether the places have `CLIP` already, and `<audio>` is text.
        strict: whether a name of a place in a single question is one for certain.

    Raises:
        BadAudio: they name another number of places than there are clips.
    """
    asked = [turn.text for turn in history if turn.role == "user"] + [instruction]
    marked = asked if placed else [_PLACE.sub(CLIP, text) for text in asked]
    places = sum(text.count(CLIP) for text in marked)
    if not history and places != clips and not (strict and places):
        # A question alone may have the name of a place in its text, and the processor finds what names a clip.
        return history, instruction
    if places not in (0, clips):
        raise BadAudio("unreadable", f"{_counted(places, 'place')} <audio> for {_counted(clips, 'clip')}")
    first = marked[0].replace(CLIP, "").strip() if _clips_come_first(marked) else None
    if places == 0 or first is not None:
        # As a single question has its clips: first, each in a line of its own.
        marked = [asked[0] if first is None else first, *asked[1:]]
        if history and clips:
            marked[0] = "\n".join([*[CLIP] * clips, marked[0]])
    texts = iter(marked)
    turns = tuple(turn._replace(text=next(texts)) if turn.role == "user" else turn for turn in history)
    return turns, next(texts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def check_answers(turns: Sequence[Turn], answer: str, clips: int) -> None:
    """Raise BadAudio where a clip has its place in a turn of the assistant, and none of the user's has one."""
    user = any(CLIP in turn.text for turn in turns)
    spoken = [turn.text for turn in turns if turn.role == "assistant"] + [answer]
    if clips and not user and any(_PLACE.search(text) for text in spoken):
        raise BadAudio("unreadable", "a place <audio> is in a turn of the assistant: only the user's have clips")


def _clips_come_first(marked: Sequence[str]) -> bool:
    """Whether all places are at the beginning of the first text, with nothing between them."""
    begins = re.match(rf"(?:\s*{CLIP})*", marked[0])
    assert begins is not None, "an empty match is one"
    return begins[0].count(CLIP) == sum(text.count(CLIP) for text in marked) > 0
