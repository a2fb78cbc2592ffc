"""Container (by magic bytes) and declared length of audio files, from their headers.

Decoders return half of a cut WAV, MP3 or Opus file without an error, so the declared length is the
only way to notice. Layouts: RIFF/WAVE, RFC 9639 (FLAC), RFC 3533 and 7845 (Ogg, Opus), Vorbis I,
Xing/LAME tag (MP3).
"""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mowe_ray.data.sample import BadAudio

OTHER = "other"
_HEAD_BYTES = 1024
_OGG_TAIL_BYTES = 1 << 17  # two pages of the largest legal size
_STREAMED_WAV_BYTES = 0x7FFF0000  # writers to a pipe put a placeholder of at least this size
_MOST_CHUNKS = 1000  # of a WAV before its samples; damage makes millions of them
_WAV_BYTES_A_SAMPLE = frozenset({1, 3, 6, 7})  # PCM, float, A-law, mu-law: the same number of bytes for each sample
_WAV_BLOCKS = frozenset({2, 0x11, 0x31})  # MS and IMA ADPCM, GSM 6.10: blocks of a declared number of samples
_SUFFIXES = {"mp4": "m4a", "pcm": "aiff", "asf": "wma", "wavpack": "wv"}  # the others are called like their files

# First bytes of the formats that need no second look. "pcm": uncompressed or nearly so, which libsndfile reads.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"fLaC", "flac"),
    (b"ID3", "mp3"),
    (b"\x1a\x45\xdf\xa3", "webm"),
    (b"RF64", "pcm"),
    (b"riff", "pcm"),  # Wave64
    (b"caff", "pcm"),
    (b".snd", "pcm"),
    (b"dns.", "pcm"),
    (b"NIST_1A", "pcm"),  # SPHERE, of TIMIT and of other corpora of the LDC
    (b"Creative Voice File", "pcm"),
    (b"PVF1", "pcm"),
    (b"2BIT", "pcm"),
    (b" paf", "pcm"),
    (b"fap ", "pcm"),
    (b"\x64\xa3", "pcm"),  # IRCAM, followed by a byte for the machine
    (b"#!AMR", "amr"),
    (b"wvpk", "wavpack"),
    (b"MAC ", "ape"),
    (b"TTA1", "tta"),
    (b"TTA2", "tta"),
    (b"tBaK", "tak"),
    (b"MP+", "mpc"),
    (b"MPCK", "mpc"),
    (b"ajkg", "shn"),
    (b"DSD ", "dsf"),
    (b"FRM8", "dsf"),
    (b"qoaf", "qoa"),
    (b".RMF", "rm"),
    (b".ra\xfd", "rm"),
    (b".SoX", "sox"),
    (b"XoS.", "sox"),
    (b"FLV\x01", "flv"),
    (b"nut/multimedia container", "nut"),
    (b"\x0b\x77", "ac3"),
    (b"\x7f\xfe\x80\x01", "dts"),
    (b"\xfe\x7f\x01\x80", "dts"),
    (b"DTSHDHDR", "dts"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
)
_FORMS = {
    b"WAVE": "wav",
    b"AVI ": "avi",
    b"AIFF": "pcm",
    b"AIFC": "pcm",
    b"8SVX": "pcm",
    b"16SV": "pcm",
    b"XWMA": "asf",
}
_ATOMS = frozenset({b"moov", b"mdat", b"wide", b"skip", b"free", b"pnot"})  # of QuickTime files without "ftyp"


@dataclass(frozen=True, slots=True)
class Header:
    """Container name, declared seconds (None: unknown) and whether the end marker is there."""

    container: str
    seconds: float | None
    complete: bool = True


def sniff(head: bytes) -> str | None:
    """Name the container from the first bytes of a file, or None when they are not audio."""
    if head[:4] in (b"RIFF", b"RIFX", b"FORM"):
        return _FORMS.get(head[8:12])
    if head[:4] == b"OggS":
        return "opus" if b"OpusHead" in head[:256] else "ogg"
    if head[4:8] == b"ftyp" or (head[4:8] in _ATOMS and head[0] < 32):  # a size, not a word of a text
        return "mp4"
    for magic, container in _MAGIC:
        if head.startswith(magic):
            return container
    if len(head) >= 4 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    if len(head) >= 3 and head[0] == 0x56 and head[1] & 0xE0 == 0xE0:
        return "aac"  # LOAS
    for start, packet in ((0, 188), (4, 192), (0, 204)):
        if len(head) > start + 3 * packet and head[start : start + 3 * packet + 1 : packet] == b"GGGG":
            return "ts"
    return "mp3" if _mp3_frame(head) else None


def suffix_of(content: bytes) -> str | None:
    """File suffix that suits the bytes of an audio file, None when they are not audio."""
    container = sniff(content[:_HEAD_BYTES])
    return None if container is None else _SUFFIXES.get(container, container)


def read_header(file: BinaryIO) -> Header:
    """Read container and declared length of a seekable file.

    Returns:
        The container is `OTHER` if the first bytes match no known one; libsndfile may still support it.

    Raises:
        BadAudio: `zero_length` for an empty file.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise BadAudio("zero_length", "empty file")
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    container = sniff(head) or OTHER
    try:
        return _READERS.get(container, _unknown)(container, head, file)
    except (struct.error, IndexError, ZeroDivisionError):
        return Header(container, None)


def _unknown(container: str, head: bytes, file: BinaryIO) -> Header:
    return Header(container, None)


def _wav(container: str, head: bytes, file: BinaryIO) -> Header:
    order = ">" if head[:4] == b"RIFX" else "<"
    at, form = 12, b""
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        tag, size = struct.unpack(order + "4sI", file.read(8))
        if tag == b"fmt ":
            form = file.read(min(size, 40))
        elif tag == b"data":
            known = 0 < size < _STREAMED_WAV_BYTES
            return Header(container, _wav_seconds(order, form, size) if known else None)
        at += 8 + size + size % 2
    return Header(container, None)


def _wav_seconds(order: str, form: bytes, size: int) -> float | None:
    """Seconds in `size` bytes of samples; the bytes per second that `form` declares are often wrong."""
    tag, channels, rate, _, block_bytes, bits = struct.unpack_from(order + "HHIIHH", form)
    if tag == 0xFFFE:  # the format proper is in the extension
        (tag,) = struct.unpack_from(order + "H", form, 24)
    if tag in _WAV_BYTES_A_SAMPLE:
        return float(size / (channels * -(-bits // 8)) / rate)
    if tag in _WAV_BLOCKS:
        (block_samples,) = struct.unpack_from(order + "H", form, 18)
        return float(size / block_bytes * block_samples / rate) if block_samples else None
    return None


def _flac(container: str, head: bytes, file: BinaryIO) -> Header:
    packed = struct.unpack(">Q", head[18:26])[0]  # rate 20 bits, channels 3, sample size 5, total 36
    rate, total = packed >> 44, packed & (1 << 36) - 1
    return Header(container, total / rate if total else None)


def _ogg(container: str, head: bytes, file: BinaryIO) -> Header:
    if container == "opus":
        at = head.index(b"OpusHead")
        rate, skip, longest = 48_000, struct.unpack_from("<H", head, at + 10)[0], 0
    elif (at := head.find(b"\x01vorbis")) >= 0:
        rate, skip, longest = struct.unpack_from("<I", head, at + 12)[0], 0, 1 << (head[at + 28] >> 4)
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
    start = _ogg_start(file, longest)
    if longest and start:
        return Header(container, None)
    samples = granule - start - skip
    # A part of a longer stream ends wherever it was cut, without the mark.
    return Header(container, samples / rate if samples >= 0 else None, ended or start > 0)


def _ogg_start(file: BinaryIO, longest: int) -> int:
    """Granule position before the first sample: above 0 in what was cut out of a longer stream (RFC 7845, 4.5).

    Args:
        longest: L, samples of a long Vorbis block; 0 for Opus, whose packets declare their length. Vorbis packets do
            not: the first gives nothing, the others at most L / 2, so that a start below some 20 ms is not detected.
    """
    at = 0
    for _ in range(_MOST_CHUNKS):
        file.seek(at)
        page = file.read(27)
        granule, count = int(struct.unpack_from("<q", page, 6)[0]), page[26]
        lacing = file.read(count)
        content = file.read(sum(lacing))
        at += 27 + count + len(content)
        if granule > 0:  # the pages of headers have 0
            packets, samples = _packets(lacing, content), 0
            for number, packet in enumerate(packets):
                samples += (longest // 2 if number else 0) if longest else _opus_samples(packet)
            return max(0, granule - samples)
    return 0


def _packets(lacing: bytes, content: bytes) -> Iterator[bytes]:
    """Split the content of an Ogg page into the packets that end on it."""
    start = end = 0
    for size in lacing:
        end += size
        if size < 255:
            yield content[start:end]
            start = end


def _opus_samples(packet: bytes) -> int:
    """Samples of an Opus packet at 48 kHz, from its first bytes (RFC 6716, 3.1)."""
    config, code = packet[0] >> 3, packet[0] & 3
    if config < 12:
        frame = (480, 960, 1920, 2880)[config % 4]
    elif config < 16:
        frame = (480, 960)[config % 2]
    else:
        frame = (120, 240, 480, 960)[config % 4]
    return frame * ((1, 2, 2)[code] if code < 3 else packet[1] & 63)


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
