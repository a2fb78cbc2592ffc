"""The unit that readers yield and writers take: a conversation about clips, mostly one question about one clip."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

Cause = Literal[
    "unreadable",  # the bytes, the JSON or the file system said no
    "truncated",  # fewer seconds than the manifest or the header declares
    "silent",  # peak below SILENCE_PEAK
    "nan",  # NaN or infinite samples
    "zero_length",  # no bytes, or a valid file without samples
    "too_short",
    "too_long",
    "too_many_tokens",  # audio and text together have no room in the language model's positions
    "no_answer",
    "no_audio",  # the file that the manifest names is missing
    "not_allowed",  # the row names a file that `data.allow_paths` does not cover
    "unknown_audio",  # something looks like audio, but is not where or how audio is read
    "wrong_type",  # not audio, whatever its suffix says
    "broken_shard",  # the shard ends early or cannot be opened; counted once per shard
    "refused",  # by the server that was to answer it; the detail has its words
    "crashed",  # an exception that no check foresees, or the end of the process; the detail says which
]
CAUSES: tuple[Cause, ...] = get_args(Cause)

# fmt: off
AUDIO_SUFFIXES = frozenset((
    "flac", "wav", "mp3", "ogg", "oga", "opus", "m4a", "mp4", "aac", "webm", "mka",
    "aif", "aiff", "aifc", "au", "snd", "w64", "rf64", "caf", "sph", "nist", "voc", "wma", "asf",
    "amr", "awb", "3gp", "3g2", "m4b", "mov", "mkv", "avi", "flv", "ts", "m2ts", "mts", "mpg", "mpeg", "mp2", "mpga",
    "ac3", "eac3", "dts", "wv", "ape", "tta", "tak", "mpc", "shn", "dsf", "dff", "qoa", "rm", "ra", "sox", "nut",
))
# fmt: on


_LONGEST_DETAIL = 200
_ABOUT_A_FILE = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM),
        *(errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EILSEQ),
    )
)


class BadAudio(ValueError):  # noqa: N818 - it is the audio that is bad
    """A clip that cannot be used, with one cause out of the closed list and a detail for messages."""

    def __init__(self, cause: Cause, detail: str) -> None:
        self.cause: Cause = cause
        self.detail = valid_text(detail[:_LONGEST_DETAIL])
        super().__init__(f"{cause}: {self.detail}")

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[Cause, str]]:
        return BadAudio, (self.cause, self.detail)


class StorageError(OSError):
    """A file system that cannot be reached or refuses: not the fault of a sample, and worth another try."""


def bad_audio(error: Exception) -> BadAudio:
    """Return the cause that makes one sample unusable, from whatever was raised while it was read or decoded.

    Raises:
        MemoryError, OSError: `error` itself, where it is about the machine or the storage and not about the sample.
    """
    if isinstance(error, BadAudio):
        return error
    if is_about_storage(error):
        raise error
    if isinstance(error, FileNotFoundError):
        return BadAudio("no_audio", f"{error.filename or error} is missing")
    if isinstance(error, OSError):
        return BadAudio("unreadable", str(error))
    return BadAudio("crashed", f"{type(error).__name__}: {error}")


def is_about_storage(error: BaseException) -> bool:
    """Whether an error is about the machine or the storage as a whole, and not about one file or what is in it."""
    if isinstance(error, MemoryError | StorageError):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _ABOUT_A_FILE


def valid_text(text: str) -> str:
    """Return a text with a question mark for each half of a surrogate pair, which no file or terminal takes."""
    return text.encode(errors="replace").decode()


# Where a clip goes in a text; Unicode keeps this code point out of all text.
CLIP = "\ufdd1"


class Turn(NamedTuple):
    """One turn of a conversation: `role` is user, assistant or system; `learned` is for turns of the assistant."""

    role: str
    text: str
    learned: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample with its audio still encoded.

    Attributes:
        id: unique within its source.
        audio: the encoded file, or None for a text-only sample.
        instruction: the instruction or question about the audio.
        answer: the target text.
        task: `asr`, `er`, `ac`, `aqa`, `sqa` or free text.
        source: name of the corpus it came from.
        suffix: file suffix without the dot, for writers; decoding trusts the bytes only.
        duration_s: declared length; when set, the decoded length must agree with it.
        offset_s: start of the clip within `audio`; None means that `audio` is the clip.
        references: all answers that count as right, where there are several; the first is `answer`.
        choices: of a multiple-choice question; the instruction lists them.
        groups: what it is scored apart by, such as {category: Reasoning, difficulty: hard}.
        more_audio: the encoded files of the clips after the first; `duration_s` and `offset_s` are then None.
        history: turns before the instruction; those of the user, and the instruction, have `CLIP` where a clip goes,
            or none, and the clips go before the first question.
        path: what its row calls the file of its first clip; empty where the audio lies in the row.
        others: what else its row says, as JSON values; for writers.
    """

    id: str
    audio: bytes | None
    instruction: str
    answer: str
    task: str
    source: str
    suffix: str = ""
    duration_s: float | None = None
    offset_s: float | None = None
    references: tuple[str, ...] = ()
    more_audio: tuple[bytes, ...] = ()
    history: tuple[Turn, ...] = ()
    path: str = field(default="", compare=False)
    choices: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clips(self) -> tuple[bytes, ...]:
        """The encoded files of all clips."""
        return () if self.audio is None else (self.audio, *self.more_audio)


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that was skipped, and why.

    Attributes:
        file: its shard, if to read or decode it has ended the process that did: it is not tried again.
    """

    id: str
    source: str
    cause: Cause
    detail: str = ""
    file: str = ""
