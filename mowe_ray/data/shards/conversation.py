"""Conversations in a row, as ms-swift, sharegpt, OpenAI and alpaca write them, and where their clips go."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mowe_ray.data.sample import CLIP, BadAudio, Turn
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
# A data URL, or RIFF, OggS, fLaC and ID3 in base64.
_INLINE = re.compile(r"data:audio/[^,]{0,80};base64,|(?=UklGR|T2dnU|ZkxhQ|SUQz)")
_PLACE = re.compile(r"<audio>|<\|audio\|>")


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
    placed = False
    if given is not None:
        entries = _entries(given)
        turns = [_turn(entry, audio) for entry in entries]
        placed = any(isinstance(entry.get(key), list) for entry in entries for key in _CONTENT_KEYS)
    else:
        turns = _from_pairs(fields)
        if not turns:
            return None
    if (system := text_under(fields, SYSTEM_KEYS)) and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    turns = _merged(turns)
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
    if name not in _ROLES:
        raise BadAudio("unreadable", f"a turn has a role, {', '.join(_ROLES)}, and not {str(name or entry)[:60]!r}")
    content = next((entry[key] for key in _CONTENT_KEYS if entry.get(key) is not None), "")
    parts = content if isinstance(content, list) else [content]
    text = ""
    for part in parts:
        # Parts of Arrow tables have all keys, most of them null.
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and (part.get("type") in ("audio", "audio_url", "input_audio")):
            clip = _clip(part)
            audio += [] if clip is None else [clip]
            text += CLIP
        else:
            text += str(part.get("text", "")) if isinstance(part, Mapping) else as_text(part)
    return Turn(_ROLES[name], text.strip(), entry.get("loss") not in (False, 0))


def _clip(part: Mapping[str, Any]) -> Any:
    """Return what the part of a message names as audio: a path, URL, mapping or encoded file."""
    value = next((part[key] for key in _AUDIO_PART_KEYS if key in part), None)
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        value = value["url"]
    elif isinstance(value, Mapping) and isinstance(value.get("data"), str):
        value = value["data"]
    if isinstance(value, str) and (inline := _INLINE.match(value)):
        try:
            return base64.b64decode(value[inline.end() :], validate=True)
        except ValueError as error:
            raise BadAudio("unreadable", f"audio in base64: {error}") from error
    return value


def _from_pairs(fields: Mapping[str, Any]) -> list[Turn]:
    """Return the turns of a row with a history of (question, answer) pairs, a system text, or alpaca's input."""
    pairs: list[Any] = next((fields[key] for key in HISTORY_KEYS if isinstance(fields.get(key), list)), [])
    turns = [
        Turn(role, as_text(text))
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    about = text_under(fields, INPUT_KEYS)
    if not (turns or about or text_under(fields, SYSTEM_KEYS)):
        return []
    question = "\n".join(filter(None, (text_under(fields, INSTRUCTION_KEYS), about)))
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
    history: tuple[Turn, ...], instruction: str, clips: int, *, placed: bool
) -> tuple[tuple[Turn, ...], str]:
    """Return the turns of the user with `CLIP` where each clip goes; without any, a single question has them first.

    Args:
        history: turns before.
        instruction: the last question.
        clips: how many there are.
        placed: whether the places have `CLIP` already, and `<audio>` is text.

    Raises:
        BadAudio: they name another number of places than there are clips.
    """
    asked = [turn.text for turn in history if turn.role == "user"] + [instruction]
    marked = asked if placed else [_PLACE.sub(CLIP, text) for text in asked]
    places = sum(text.count(CLIP) for text in marked)
    if not history and places != clips:
        # A question alone may have the name of a place in its text, and the processor finds what names a clip.
        return history, instruction
    if places not in (0, clips):
        raise BadAudio("unreadable", f"{places} places <audio> for {clips} clips")
    first = marked[0].replace(CLIP, "").strip() if _leads(marked) else None
    if places == 0 or first is not None:
        # As a single question has its clips: first, each in a line of its own.
        marked = [asked[0] if first is None else first, *asked[1:]]
        if history and clips:
            marked[0] = "\n".join([*[CLIP] * clips, marked[0]])
    texts = iter(marked)
    turns = tuple(turn._replace(text=next(texts)) if turn.role == "user" else turn for turn in history)
    return turns, next(texts)


def _leads(marked: Sequence[str]) -> bool:
    """Whether all places are at the beginning of the first text, with nothing between them."""
    begins = re.match(rf"(?:\s*{CLIP})*", marked[0])
    assert begins is not None, "an empty match is one"
    return begins[0].count(CLIP) == sum(text.count(CLIP) for text in marked) > 0
