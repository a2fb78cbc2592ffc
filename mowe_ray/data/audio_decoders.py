"""The two libraries that read audio, soundfile and PyAV: which one gets a file, and what may go wrong in it.

soundfile decodes WAV, FLAC, MP3 and Vorbis (fastest) and what is nearly uncompressed; PyAV decodes all else, and has
a second try where soundfile fails.
"""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt
import soundfile

from mowe_ray.data.audio_headers import OTHER, Header
from mowe_ray.data.sample import BadAudio, Cause

SLACK_S = 0.1  # encoders pad by up to two frames, manifests are rounded
_RATES = (4_000, 192_000)  # a header outside this range is damaged
_MOST_VALUES_PER_S = 64 * 48_000  # channels times rate; a header that declares more is damaged, and costs gigabytes
_SHORTEST_FRAME_S = 0.0005  # on average; Opus has 0.0025. Damaged headers make frames of one sample, which take minutes
_MOST_SHORT_FRAMES = 2_000
_SNDFILE = frozenset({"wav", "flac", "mp3", "ogg", "pcm", OTHER})  # not Opus: PyAV is 2.7 times faster
_SEEKABLE = frozenset({"wav", "flac", "pcm"})  # the others begin with what the decoder remembers of before
_TIMED = frozenset({"mp4", "webm", "wavpack", "ape", "tta"})  # containers that store their length, which PyAV reads
_UNKNOWN_FRAMES = 1 << 40  # libsndfile says 0 for a piped WAV, the largest count for such a FLAC
# Demuxers by FFmpeg's names. Others open further files and addresses that the "audio" names (hls, concat), or take any
# text or picture for their own.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,ircam,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,"
    "mj2,mp3,mpc,mpc8,mpeg,mpegts,nut,nistsphere,ogg,pvf,qoa,rm,shn,sox,tak,tta,voc,w64,wav,wv,xwma"
)

Wave = npt.NDArray[np.float32]


def decode_samples(data: bytes, header: Header, max_s: float) -> tuple[Wave, int]:
    """Decode a file as far as it goes.

    Args:
        data: the whole file.
        header: of it.
        max_s: longer ones are refused before all of them is decoded.

    Returns:
        (S,) or (S, channels) float32 as stored, and the sampling rate.

    Raises:
        BadAudio: with the cause.
    """
    if header.container in _SNDFILE and not _length_is_guessed(header):
        try:
            with _quiet(header), soundfile.SoundFile(io.BytesIO(data)) as sound:
                _check_layout(sound.samplerate, sound.channels)
                if 0 < sound.frames < _UNKNOWN_FRAMES:
                    if sound.frames > (max_s + SLACK_S) * sound.samplerate:
                        seconds = sound.frames / sound.samplerate
                        raise BadAudio("too_long", f"{seconds:.1f} s, at most {max_s:g} s")
                    return sound.read(sound.frames, dtype="float32"), sound.samplerate
        except soundfile.LibsndfileError:
            _refuse_unknown(io.BytesIO(data), header)  # PyAV has a second try
    return _decode_av(io.BytesIO(data), header, max_s)


def decode_segment(data: bytes, header: Header, start: float, seconds: float | None) -> tuple[Wave, int]:
    """Decode a part of a file: only that part where libsndfile can go to it, all of the file elsewhere.

    Args:
        data: the whole file.
        header: of it.
        start: of the part, in seconds.
        seconds: its length; None = up to the end.

    Returns:
        As `decode_samples`; fewer samples where the file ends earlier.
    """
    if header.container in _SEEKABLE:
        with suppress(soundfile.LibsndfileError), _quiet(header), soundfile.SoundFile(io.BytesIO(data)) as sound:
            _check_layout(sound.samplerate, sound.channels)
            if sound.seekable() and 0 < sound.frames < _UNKNOWN_FRAMES:
                first = min(round(start * sound.samplerate), sound.frames)
                sound.seek(first)
                wanted = sound.frames - first if seconds is None else round(seconds * sound.samplerate)
                return sound.read(wanted, dtype="float32"), sound.samplerate
    audio, rate = decode_samples(data, header, float("inf"))
    first = round(start * rate)
    return audio[first : first + round(seconds * rate) if seconds is not None else None], rate


def duration_s(file: BinaryIO, header: Header) -> float:
    """Length in seconds of a file whose header does not give it: without decoding, where the container lists packets.

    Raises:
        BadAudio: it cannot be opened, or has no audio.
    """
    if header.container in _SNDFILE and not _length_is_guessed(header):
        file.seek(0)
        try:
            with soundfile.SoundFile(file) as sound:
                _check_layout(sound.samplerate, sound.channels)
                if 0 < sound.frames < _UNKNOWN_FRAMES:
                    return float(sound.frames / sound.samplerate)
        except soundfile.LibsndfileError:
            _refuse_unknown(file, header)  # PyAV has a second try
    with _av_container(file, header) as container:
        if header.container in _TIMED and container.duration is not None:
            return float(container.duration / av.time_base)
        stream = container.streams.audio[0]
        listed = float(sum((packet.duration or 0) * packet.time_base for packet in container.demux(stream)))
        if listed > 0:
            return listed
    audio, rate = _decode_av(file, header, float("inf"))
    return len(audio) / rate if rate else 0.0


def start_s(file: BinaryIO, header: Header) -> float:
    """Time of the first sample, which is not 0 in what was cut out of a longer stream, in seconds."""
    with _av_container(file, header) as container:
        stream = container.streams.audio[0]
        return float((stream.start_time or 0) * (stream.time_base or 0))


def check_length(seconds: float, declared_s: float | None, header: Header | None) -> None:
    """Compare with the promised length, from which 0.1 s or 2 % may differ."""
    promised = declared_s or (header.seconds if header else None)
    if promised is not None and seconds < promised - max(SLACK_S, 0.02 * promised):
        raise BadAudio("truncated", f"{seconds:.2f} s of {promised:.2f} s")
    if declared_s and seconds > declared_s + max(SLACK_S, 0.02 * declared_s):
        raise BadAudio("unreadable", f"{seconds:.2f} s, but the manifest says {declared_s:.2f} s")
    if header and not header.complete:
        raise BadAudio("truncated", "the last Ogg page is missing")


def _length_is_guessed(header: Header) -> bool:
    return header.container == "mp3" and header.seconds is None  # by soundfile, of an MP3 without a count


def _refuse_unknown(file: BinaryIO, header: Header) -> None:
    """Raise BadAudio for what has no known first bytes: FFmpeg takes pictures and noise for MP3."""
    if header.container == OTHER:
        file.seek(0)
        raise BadAudio("wrong_type", f"not an audio file, but {_kind_of(file.read(512))}")


def _kind_of(head: bytes) -> str:
    """Describe a file without quoting it: untrusted rows may name files that are secret."""
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: run `git lfs pull`"
    try:
        head[:-4].decode()  # the last character may be cut
    except UnicodeDecodeError:
        return "other binary data"
    return "a page of HTML or XML" if head.lstrip().startswith(b"<") else "text"


def _decode_av(file: BinaryIO, header: Header, max_s: float) -> tuple[Wave, int]:
    """Decode with PyAV as far as it goes; the length check then judges an early end."""
    with _av_container(file, header) as container:
        stream = container.streams.audio[0]
        parts: list[Wave] = []
        samples = rate = 0
        try:
            for part, rate in _frames(container, stream):
                parts.append(part)
                samples += len(part)
                # A length that headers do not give is only found here; decoding a day of audio would take its memory.
                if samples > (max_s + 1) * rate:
                    raise BadAudio("too_long", f"over {max_s:g} s")
                if len(parts) > _MOST_SHORT_FRAMES and samples < len(parts) * _SHORTEST_FRAME_S * rate:
                    raise BadAudio("unreadable", f"{len(parts)} frames in {samples / rate:.3f} s")
        except av.FFmpegError as error:
            if not parts:
                raise
            if header.seconds is None:  # nothing else would notice that the rest is missing
                raise BadAudio("truncated", f"stops at {samples / rate:.2f} s: {_reason(error)}") from error
        if parts and header.container in _TIMED and container.duration:
            check_length(samples / rate, None, Header(header.container, container.duration / av.time_base))
    if len({part.shape[1] for part in parts}) > 1:  # a broadcast that changes between mono and stereo
        parts = [part.mean(axis=1, keepdims=True, dtype=np.float32) for part in parts]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32), rate


def _frames(
    container: "av.container.InputContainer", stream: "av.audio.stream.AudioStream"
) -> Iterator[tuple[Wave, int]]:
    """Yield (samples, channels) float32 and the sampling rate, which is that of the first frame."""
    resampler, setup, rate = None, None, 0
    for frame in container.decode(stream):
        if setup != (frame.format.name, frame.layout.name, frame.layout.nb_channels, frame.sample_rate):
            setup = (frame.format.name, frame.layout.name, frame.layout.nb_channels, frame.sample_rate)
            rate = rate or frame.sample_rate
            _check_layout(frame.sample_rate, frame.layout.nb_channels)
            # Packed: PyAV finds only eight planes of a planar frame, and reads beyond them.
            resampler = av.AudioResampler(format="flt", rate=rate)
        assert resampler is not None
        for converted in resampler.resample(frame):
            packed: Wave = converted.to_ndarray().astype(np.float32, copy=False)
            yield packed.reshape(-1, converted.layout.nb_channels), rate


@contextmanager
def _av_container(file: BinaryIO, header: Header) -> Iterator["av.container.InputContainer"]:
    """Open a file from its start; FFmpeg's errors, then and later, become BadAudio."""
    file.seek(0)
    opened = False
    try:
        # Tags may be in Latin-1.
        with av.open(
            file, mode="r", metadata_errors="replace", container_options={"format_whitelist": _DEMUXERS}
        ) as container:
            opened = True
            if not container.streams.audio:
                raise BadAudio("wrong_type", f"{header.container} without an audio stream")
            if container.streams.audio[0].codec_context is None:
                raise BadAudio("unreadable", f"{header.container} with an unknown codec")
            yield container
    except IndexError as error:  # PyAV does not find the stream of a damaged table of streams
        raise BadAudio("unreadable", f"{header.container}: {error}") from error
    except av.FFmpegError as error:
        # An MP4 keeps its table of contents at the end unless written for streaming.
        cause: Cause = "truncated" if header.container == "mp4" and not opened else "unreadable"
        raise BadAudio(cause, f"{header.container}: {_reason(error)}") from error


def _reason(error: av.FFmpegError) -> str:
    return str(error.strerror or error)


def _check_layout(rate: int, channels: int) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise BadAudio("unreadable", f"sampling rate {rate} Hz")
    if channels * rate > _MOST_VALUES_PER_S:
        raise BadAudio("unreadable", f"{channels} channels at {rate} Hz")


class _Stderr:
    """Points file descriptor 2, where libmpg123 complains, at /dev/null while anyone is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = -1

    @contextmanager
    def silenced(self) -> Iterator[None]:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._saved = os.dup(2)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                os.close(null)
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    os.dup2(self._saved, 2)
                    os.close(self._saved)


_STDERR = _Stderr()


@contextmanager
def _quiet(header: Header) -> Iterator[None]:
    with _STDERR.silenced() if header.container == "mp3" else nullcontext():
        yield
