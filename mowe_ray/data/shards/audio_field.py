"""Which field of a row holds its audio.

Audio is read under the names of `AUDIO_KEYS`. A row in which anything else looks like audio is not a text-only
sample: it is refused, and the field is named.
"""

import base64
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import soundfile

from mowe_ray.data.audio_headers import suffix_of
from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio
from mowe_ray.data.shards.fields import AUDIO_KEYS, RATE_KEYS
from mowe_ray.data.shards.mix import Clip, Mix

# Under these names text is as common as audio, so that a string must end like an audio file.
_AMBIGUOUS_KEYS = frozenset({"context", "speech", "sound", "file_name", "filename", "path", "file"})

# Suffixes of audio that is not read, so that a name with one of them is not mistaken for text.
_OTHER_SUFFIXES = frozenset(
    (
        *("sph", "nist", "amr", "awb", "wv", "ac3", "eac3", "dts", "ape", "tta", "shn", "alac", "spx", "gsm", "vox"),
        *("raw", "pcm", "ulaw", "alaw", "mp2", "mpga", "m4b", "m4r", "3gp", "mov", "mkv", "avi", "flv", "aifc", "snd"),
        *("voc", "wave", "ra", "adts", "weba", "mid", "midi"),
    )
)
_ENDING = re.compile(rf"\.(?:{'|'.join(sorted(AUDIO_SUFFIXES | _OTHER_SUFFIXES))})(?:[?#:][^\n]*)?\s*$", re.IGNORECASE)
# RIFF, OggS, fLaC, ID3 and an MPEG frame in base64, perhaps in a data URL.
_INLINE = re.compile(r"data:audio/[^,]{0,80};base64,|(?=data:audio/|UklGR|T2dnU|ZkxhQ|SUQz|//[suv])")
_AUDIO_WORD = re.compile(r"audio|wav|sampl(?:e|ing)_?rate|^(?:sr|mp3|flac|ogg|opus|m4a)$", re.IGNORECASE)
# Names of files under a key such as `speech_path` need no suffix; under `speech_act` there is text.
_LOCATION_KEY = re.compile(
    r"(?:speech|sound|clip|recording|utterance|voice|song|music)s?_?(?:file_?)?(?:path|file|name|ur[li]|id|key)s?",
    re.IGNORECASE,
)
# {"type": "audio", "url": ...} of chat messages, {"format": "wav"}, {"mime": "audio/flac"}.
_KIND_KEY = re.compile(r"mime|(?:mime|media|file)?_?(?:type|format|kind|codec|modality)", re.IGNORECASE)
_KIND = re.compile(r"audio(?:/.*|_url)?|input_audio|wav|mp3|flac|ogg|opus|m4a", re.IGNORECASE)
# Fewer numbers than this are not a clip: 25 ms at 16 kHz.
_FEWEST_SAMPLES = 400
_DEEPEST = 6


def find_audio(fields: Mapping[str, Any], texts: tuple[str, ...] = ()) -> tuple[tuple[Clip, ...], str | None]:
    """Return a row's clips, or what in the row looks like audio but is not read.

    Args:
        fields: Values by name.
        texts: Names of fields that hold text, in which a string never is audio.
    """
    for key in AUDIO_KEYS:
        value = fields.get(key)
        if _is_empty(value) or (key in _AMBIGUOUS_KEYS and isinstance(value, str) and not is_audio_name(value)):
            continue
        clips = _clips(value, next((fields[name] for name in RATE_KEYS if fields.get(name)), None))
        return clips, None if clips else f"{key!r} holds {_description(value)}, which is not read"
    for key, value in fields.items():
        mapping_only = key in texts
        if _looks_like_audio(str(key), value, mapping_only):
            usual = ", ".join(AUDIO_KEYS[:3])
            return (), f"{key!r} looks like audio ({_description(value)}), which is read under {usual}"
    return (), None


def _clips(value: Any, rate: Any) -> tuple[Clip, ...]:
    """Return the clips that a value or a list of values holds; none where any of them is something else."""
    if isinstance(value, list) and isinstance(_first_number(value), float):
        wave = _wav(value, rate)
        return () if wave is None else (wave,)
    found = [_encoded(clip) for clip in (value if isinstance(value, list) else [value])]
    clips = tuple(clip for clip in found if clip is not None)
    return clips if len(clips) == len(found) else ()


def is_audio_name(text: str) -> bool:
    """Whether a text is the name of an audio file, by its suffix."""
    return "\n" not in text.strip() and _ENDING.search(text) is not None


def has_audio_suffix(suffix: str) -> bool:
    """Whether files with this suffix (without the dot) hold audio, even if it is not read."""
    return suffix.lower() in AUDIO_SUFFIXES | _OTHER_SUFFIXES


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_empty(part) for part in value.values() if not isinstance(part, int | float)) and (
            value.get("bytes") is None
        )
    return value is None or value is False or value == "" or value == [] or value != value  # NaN: a gap in pandas


def _encoded(value: Any) -> Clip | None:
    """Return a path, the bytes of an audio file, or what is mixed; None where the value is none of them."""
    if isinstance(value, Mix):
        return value
    if isinstance(value, str):
        return _unpacked(value)
    if not isinstance(value, Mapping):
        return value if isinstance(value, bytes) else None
    content = value.get("bytes")
    if isinstance(content, bytes) and (content or not value.get("path")):
        return content
    if value.get("array") is not None:  # `datasets` after decoding; its path may not lead anywhere any more
        return _wav(value["array"], value.get("sampling_rate"))
    if content is None and isinstance(value.get("path"), str):
        return str(value["path"])
    return None if "path" in value else next(iter(find_audio(value)[0]), None)


def _unpacked(text: str) -> str | bytes:
    """Return the bytes of an audio file in base64; any other text as it is, a path."""
    inline = _INLINE.match(text)
    if inline is None or is_audio_name(text):
        return text
    try:
        return base64.b64decode(re.sub(r"\s+", "", text[inline.end() :]), validate=True)
    except ValueError as error:
        raise BadAudio("unreadable", f"audio in base64: {error}") from error


def _wav(array: Any, rate: Any) -> bytes | None:
    """Return (S,) or (channels, S) numbers in -1..1 as a WAV file; None where they are something else."""
    try:
        wave = np.asarray(array, np.float32)
        whole = not isinstance(_first_number(array), float)
    except (TypeError, ValueError):
        return None
    if not isinstance(rate, int | float) or not rate > 0 or whole or wave.ndim > 2 or not wave.size:
        return None
    file = io.BytesIO()
    # Of two axes the short one is the channels, whichever comes first.
    channels_last = wave.T if wave.ndim == 2 and wave.shape[0] < wave.shape[1] else wave
    soundfile.write(file, channels_last, int(rate), format="WAV", subtype="FLOAT")
    return file.getvalue()


def _first_number(value: Any) -> Any:
    while isinstance(value, list) and value:
        value = value[0]
    return value


def _looks_like_audio(key: str, value: Any, mapping_only: bool, depth: int = 0) -> bool:
    """Whether a field, or anything within it, is an audio file, its name, or a waveform."""
    if _is_empty(value) or depth > _DEEPEST:
        return False
    if isinstance(value, Mapping):
        known = not mapping_only and not {"bytes", "array", "sampling_rate"}.isdisjoint(value)
        return known or any(_looks_like_audio(str(name), part, False, depth + 1) for name, part in value.items())
    if isinstance(value, list):
        first = _first_number(value)
        if isinstance(first, int | float) and not isinstance(first, bool):
            # Of (channels, samples) or (samples, channels), either axis may be the long one.
            nested = value[0] if isinstance(value[0], list) else value
            return _AUDIO_WORD.search(key) is not None or max(len(nested), len(value)) >= _FEWEST_SAMPLES
        return any(_looks_like_audio(key, part, mapping_only, depth + 1) for part in value)
    if mapping_only:
        return False
    named = _AUDIO_WORD.search(key) is not None
    if isinstance(value, bytes):
        return named or suffix_of(value) is not None
    if isinstance(value, str):
        named = named or _LOCATION_KEY.fullmatch(key) is not None
        kind = _KIND_KEY.fullmatch(key) is not None and _KIND.fullmatch(value) is not None
        one_word = " " not in value.strip()
        return kind or is_audio_name(value) or _INLINE.match(value) is not None or (named and one_word)
    return named and value != 0  # a sampling rate, a count of clips


def _description(value: Any) -> str:
    if isinstance(value, Mapping):
        whole = isinstance(_first_number(value.get("array")), int)
        kind = " (whole numbers, and floats from -1 to 1 are read)" if whole else ""
        return f"a mapping of {', '.join(sorted(map(str, value)))}{kind}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)[:60]
