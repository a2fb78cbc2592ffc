"""What an audio file says about itself: its container (by magic bytes) and its length.

Decoders return half of a cut WAV, MP3 or Opus file without an error, so the declared length is the
only way to notice. Layouts: RIFF/WAVE, RFC 9639 (FLAC), RFC 3533 and 7845 (Ogg, Opus), Xing/LAME
tag (MP3).
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from mowe_ray.data.sample import BadAudio

_HEAD_BYTES = 512
_OGG_TAIL_BYTES = 1 << 17  # two pages of the largest legal size
_STREAMED_WAV_BYTES = 0x7FFF0000  # writers to a pipe put a placeholder of at least this size
_SUFFIXES = {"mp4": "m4a", "pcm": "aiff"}  # the other containers are called like their files


@dataclass(frozen=True, slots=True)
class Header:
    """Container name, declared seconds (None: unknown) and whether the end marker is there."""

    container: str
    seconds: float | None
    complete: bool = True


def sniff(head: bytes) -> str | None:
    """Name the container from the first bytes of a file, or None when they are not audio."""
    tag, form = head[:4], head[8:12]
    if tag in (b"RIFF", b"RIFX") and form == b"WAVE":
        return "wav"
    if tag == b"fLaC":
        return "flac"
    if tag == b"OggS":
        return "opus" if b"OpusHead" in head[:256] else "ogg"
    if head[4:8] == b"ftyp":
        return "mp4"
    if tag == b"\x1a\x45\xdf\xa3":
        return "webm"
    if tag in (b"RF64", b".snd", b"riff", b"caff") or form in (b"AIFF", b"AIFC"):
        return "pcm"
    if head[:3] == b"ID3":
        return "mp3"
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    return "mp3" if _mp3_frame(head) else None


def suffix_of(content: bytes) -> str | None:
    """File suffix that suits the bytes of an audio file, None when they are not audio."""
    container = sniff(content[:_HEAD_BYTES])
    return None if container is None else _SUFFIXES.get(container, container)


def read_header(file: BinaryIO) -> Header:
    """Read container and declared length of a seekable file.

    Raises:
        BadAudio: `zero_length` for an empty file, `wrong_type` when the bytes are not audio.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise BadAudio("zero_length", "empty file")
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    container = sniff(head)
    if container is None:
        raise BadAudio("wrong_type", f"not an audio file, starts with {head[:12]!r}")
    try:
        return _READERS.get(container, _unknown)(container, head, file)
    except (struct.error, IndexError, ZeroDivisionError):
        return Header(container, None)


def _unknown(container: str, head: bytes, file: BinaryIO) -> Header:
    return Header(container, None)


def _wav(container: str, head: bytes, file: BinaryIO) -> Header:
    order = ">" if head[:4] == b"RIFX" else "<"
    at, byte_rate = 12, 0
    while True:
        file.seek(at)
        tag, size = struct.unpack(order + "4sI", file.read(8))
        if tag == b"fmt ":
            byte_rate = struct.unpack(order + "8xI", file.read(12))[0]
        elif tag == b"data":
            known = 0 < size < _STREAMED_WAV_BYTES
            return Header(container, size / byte_rate if known else None)
        at += 8 + size + size % 2


def _flac(container: str, head: bytes, file: BinaryIO) -> Header:
    packed = struct.unpack(">Q", head[18:26])[0]  # rate 20 bits, channels 3, sample size 5, total 36
    rate, total = packed >> 44, packed & (1 << 36) - 1
    return Header(container, total / rate if total else None)


def _ogg(container: str, head: bytes, file: BinaryIO) -> Header:
    if container == "opus":
        at = head.index(b"OpusHead")
        rate, skip = 48_000, struct.unpack_from("<H", head, at + 10)[0]
    elif (at := head.find(b"\x01vorbis")) >= 0:
        rate, skip = struct.unpack_from("<I", head, at + 12)[0], 0
    else:
        return Header(container, None)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _OGG_TAIL_BYTES))
    tail = file.read()
    page = tail.rfind(b"OggS")
    ended = page >= 0 and tail[page + 5] & 4 != 0
    granule = -1
    while page >= 0 and granule < 0:  # -1: no packet ends on this page, ask the one before
        granule = struct.unpack_from("<q", tail, page + 6)[0]
        page = tail.rfind(b"OggS", 0, page)
    return Header(container, (granule - skip) / rate if granule >= skip else None, ended)


def _mp3_frame(head: bytes) -> tuple[int, int, int] | None:
    """Rate, samples per frame and offset of the Xing tag of the MPEG frame at `head`."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bit_rate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 0 or bit_rate in (0, 15) or rate == 3:
        return None
    hertz = (44_100, 48_000, 32_000)[rate] >> (0 if version == 3 else 1 if version == 2 else 2)
    mono = head[3] >> 6 == 3
    side_info = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    return hertz, 1152 if version == 3 else 576, 4 + side_info


def _mp3(container: str, head: bytes, file: BinaryIO) -> Header:
    start = 0
    if head[:3] == b"ID3":
        sizes = head[6:10]  # "syncsafe": seven bits a byte
        start = 10 + (sizes[0] << 21 | sizes[1] << 14 | sizes[2] << 7 | sizes[3])
    file.seek(start)
    head = file.read(_HEAD_BYTES)
    frame = _mp3_frame(head)
    if frame is None:
        return Header(container, None)
    hertz, frame_samples, at = frame
    flags = struct.unpack_from(">I", head, at + 4)[0]
    if head[at : at + 4] not in (b"Xing", b"Info") or not flags & 1:
        return Header(container, None)
    frames = struct.unpack_from(">I", head, at + 8)[0]
    lame = at + 8 + 4 * sum((flags & 1, flags >> 1 & 1, flags >> 3 & 1)) + 100 * (flags >> 2 & 1)
    padding = int.from_bytes(head[lame + 21 : lame + 24], "big")
    trimmed = (padding >> 12) + (padding & 0xFFF) if head[lame : lame + 4].isalnum() else 0
    return Header(container, max(0, frames * frame_samples - trimmed) / hertz)


_READERS: dict[str, Callable[[str, bytes, BinaryIO], Header]] = {
    "wav": _wav,
    "flac": _flac,
    "opus": _ogg,
    "ogg": _ogg,
    "mp3": _mp3,
}
