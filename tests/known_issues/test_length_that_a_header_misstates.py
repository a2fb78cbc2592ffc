"""Good audio whose header starts late, gives a wrong byte rate or leaves its sizes open was called truncated.

Opus cut out of a stream: https://github.com/zeroclaw-labs/zeroclaw/issues/10627,
https://github.com/libsndfile/libsndfile/issues/556.
"""

import struct

import pytest

from mowe_ray.data.decode import decode_audio, header_duration_s
from mowe_ray.data.sample import BadAudio
from tests.audio_files import by_ffmpeg, by_sndfile, ogg_pages, shifted_ogg


def lengths(data: bytes) -> tuple[float, float]:
    return header_duration_s(data), len(decode_audio(data, None, 0.1, 30.0)) / 16_000


@pytest.mark.parametrize("start_s", [0.004, 0.05, 0.3, 5.0, 3600.0])
@pytest.mark.parametrize(
    ("data", "rate"),
    [
        (by_sndfile("OGG", "OPUS", seconds=3.0), 48_000),
        (by_ffmpeg("ogg", "libopus", 48_000, seconds=3.0), 48_000),
        (by_sndfile("OGG", "VORBIS", seconds=3.0), 16_000),
        (by_sndfile("OGG", "VORBIS", channels=2, seconds=3.0), 16_000),
    ],
    ids=["opus", "opus by FFmpeg", "vorbis", "vorbis stereo"],
)
def test_ogg_that_begins_later_than_at_zero(data, rate, start_s):
    assert lengths(shifted_ogg(data, round(start_s * rate))) == pytest.approx((3.0, 3.0), abs=0.06)


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_a_part_of_a_stream_has_no_last_page(subtype):
    rate = 48_000 if subtype == "OPUS" else 16_000
    pages = ogg_pages(shifted_ogg(by_sndfile("OGG", subtype, seconds=8.0), 60 * rate))
    part = b"".join(pages[:-1])
    assert len(pages) > 3
    assert min(lengths(part)) > 3.0
    whole = b"".join(ogg_pages(by_sndfile("OGG", subtype, seconds=8.0))[:-1])
    with pytest.raises(BadAudio, match="truncated"):  # from the start of a stream on, the end is missed
        lengths(whole)


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_a_hole_in_a_part_of_a_stream_is_still_found(subtype):
    rate = 48_000 if subtype == "OPUS" else 16_000
    pages = ogg_pages(by_sndfile("OGG", subtype, seconds=25.0))
    assert len(pages) > 5
    data = b"".join([*pages[:3], *pages[-1:]])
    with pytest.raises(BadAudio, match="truncated"):
        decode_audio(data, None, 0.1, 30.0)
    if subtype == "OPUS":  # Vorbis packets do not tell how long they are
        with pytest.raises(BadAudio, match="truncated"):
            decode_audio(shifted_ogg(data, 60 * rate), None, 0.1, 30.0)


def _put(data: bytes, *values: tuple[int, int], order: str = "<") -> bytes:
    changed = bytearray(data)
    for at, value in values:
        struct.pack_into(f"{order}I", changed, at, value)
    return bytes(changed)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "PCM_24", "FLOAT", "ULAW"])
@pytest.mark.parametrize("rate", [0, 1, 8_000, 0xFFFFFFFF])
def test_wav_with_a_wrong_byte_rate(subtype, rate):
    assert lengths(_put(by_sndfile("WAV", subtype), (28, rate))) == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize("which", [(4,), (40,), (4, 40)], ids=["riff", "data", "both"])
def test_wav_written_to_a_pipe(size, which):
    """FFmpeg and SoX cannot go back to fill in what they learn at the end."""
    assert lengths(_put(by_sndfile("WAV", "PCM_16"), *((at, size) for at in which))) == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
def test_aiff_written_to_a_pipe(size):
    data = by_sndfile("AIFF", "PCM_16")
    sizes = (4, size), (data.index(b"SSND") + 4, size), (data.index(b"COMM") + 10, 0)
    assert lengths(_put(data, *sizes, order=">")) == pytest.approx((2.0, 2.0))


def test_au_written_to_a_pipe():
    assert lengths(_put(by_sndfile("AU", "PCM_16"), (8, 0xFFFFFFFF), order=">")) == pytest.approx((2.0, 2.0))


def test_half_a_wav_with_a_wrong_byte_rate_is_truncated():
    data = _put(by_sndfile("WAV", "PCM_16"), (28, 1))
    with pytest.raises(BadAudio, match=r"truncated: 1.00 s of 2.00 s"):
        decode_audio(data[: len(data) // 2], None, 0.1, 30.0)
