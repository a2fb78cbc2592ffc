"""Small audio files in every container, codec and number of channels that soundfile and PyAV can write."""

import io
import struct

import av
import numpy as np
import soundfile

SNDFILE = [
    ("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "GSM610"),
    ("WAV", "MS_ADPCM"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
    ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("NIST", "PCM_16"), ("VOC", "PCM_16"),
    ("SVX", "PCM_16"), ("AVR", "PCM_16"), ("PAF", "PCM_16"), ("PVF", "PCM_16"), ("IRCAM", "PCM_16"), ("HTK", "PCM_16"),
    ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
]  # fmt: skip
FFMPEG = [
    ("mp2", "mp2", 16_000), ("adts", "aac", 16_000), ("latm", "aac", 16_000), ("mp4", "aac", 16_000),
    ("mp4", "alac", 16_000), ("mov", "pcm_s16le", 16_000), ("3gp", "libopencore_amrnb", 8_000),
    ("amr", "libopencore_amrnb", 8_000), ("ogg", "libopus", 48_000), ("webm", "libopus", 48_000),
    ("matroska", "pcm_s16le", 16_000), ("matroska", "aac", 16_000), ("mpegts", "aac", 16_000),
    ("mpegts", "mp2", 16_000), ("mpegts", "ac3", 48_000), ("mpeg", "mp2", 48_000), ("ac3", "ac3", 48_000),
    ("eac3", "eac3", 48_000),
    ("asf", "wmav2", 16_000), ("avi", "pcm_s16le", 16_000), ("flv", "aac", 44_100), ("wv", "wavpack", 16_000),
    ("tta", "tta", 16_000), ("rm", "ac3", 44_100), ("sox", "pcm_s32le", 16_000), ("nut", "pcm_s16le", 16_000),
]  # fmt: skip
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1", 16: "hexadecagonal"}


def tone(rate: int = 16_000, channels: int = 1, seconds: float = 2.0, hertz: float = 440.0) -> np.ndarray:
    """(S, channels) float32 with a peak of 0.3, the same in every channel."""
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def by_sndfile(container: str, subtype: str, *, channels: int = 1, seconds: float = 2.0) -> bytes:
    """Encode a tone with libsndfile."""
    out = io.BytesIO()
    rate = 8_000 if subtype == "GSM610" else 16_000
    soundfile.write(out, tone(rate, channels, seconds), rate, format=container, subtype=subtype)
    return out.getvalue()


def by_ffmpeg(container: str, codec: str, rate: int = 16_000, *, channels: int = 1, seconds: float = 2.0) -> bytes:
    """Encode a tone with FFmpeg.

    Raises:
        ValueError: The codec or container cannot hold so many channels.
    """
    out = io.BytesIO()
    layout = _LAYOUTS.get(channels, f"{channels} channels")
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.layout = layout
        if codec == "wmav2":
            stream.bit_rate = 96_000
        packed = tone(rate, channels, seconds).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        frame.sample_rate = rate
        try:
            resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or None)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                file.mux(stream.encode(piece))
            file.mux(stream.encode(None))
        except av.FFmpegError as error:
            raise ValueError(f"{codec} in {container} with {channels} channels: {error}") from error
    return out.getvalue()


def ogg_pages(ogg: bytes) -> list[bytearray]:
    """Split an Ogg file into its pages."""
    pages, at = [], 0
    while at < len(ogg):
        lacing = ogg[at + 27 : at + 27 + ogg[at + 26]]
        end = at + 27 + len(lacing) + sum(lacing)
        pages.append(bytearray(ogg[at:end]))
        at = end
    return pages


def shifted_ogg(ogg: bytes, samples: int) -> bytes:
    """Let the granule positions of all pages of audio start `samples` later, as in a part of a longer stream."""
    out = b""
    for page in ogg_pages(ogg):
        (granule,) = struct.unpack_from("<q", page, 6)
        if granule > 0:
            struct.pack_into("<q", page, 6, granule + samples)
        page[22:26] = bytes(4)
        struct.pack_into("<I", page, 22, _ogg_crc(page))
        out += page
    return out


def _ogg_crc(page: bytes | bytearray) -> int:
    """CRC-32 of RFC 3533: polynomial 0x04C11DB7, neither reflected nor inverted."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value
