"""Audio that is put together when it is read: pieces of recordings at times and levels of their own."""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from mowe_ray.data.audio_decoders import SLACK_S, decode_segment
from mowe_ray.data.audio_headers import read_header
from mowe_ray.data.sample import BadAudio

_LONGEST_S = 4 * 3600.0  # more would be taken in memory because a manifest says so

Wave = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Track:
    """A piece of a recording, or silence.

    Attributes:
        sources: names of files, and which channels of each; none for silence.
        rate: of the recording.
        start: of the piece in the recording, in seconds; `seconds` is its length.
        gain: a factor.
        offset: of the piece in the mix, in seconds.
        snr: how many dB the reference is above it; None leaves its level.
        reference: whether it is what `snr` of others refers to.
        mute: whether it is a reference only.
    """

    sources: tuple[tuple[str, tuple[int, ...]], ...]
    rate: int
    start: float
    seconds: float
    gain: float = 1.0
    offset: float = 0.0
    snr: float | None = None
    reference: bool = False
    mute: bool = False


@dataclass(frozen=True, slots=True)
class Mix:
    """Tracks that are added up, as lhotse's `MixedCut.load_audio` does: `seconds` at `rate`, times `gain`."""

    tracks: tuple[Track, ...]
    rate: int
    seconds: float
    gain: float = 1.0

    @property
    def files(self) -> list[str]:
        """Names of the files it is made of."""
        return list(dict.fromkeys(name for track in self.tracks for name, _ in track.sources))

    def encoded(self, read: Callable[[str], bytes]) -> bytes:
        """Return it as a WAV file of floats.

        Args:
            read: returns the content of a file.

        Raises:
            BadAudio: a piece cannot be decoded, or is shorter than it should be.
        """
        if not 0 < self.seconds <= _LONGEST_S:
            raise BadAudio("too_long", f"a mix of {self.seconds:g} s, at most {_LONGEST_S:g} s")
        contents = {name: read(name) for name in self.files}
        waves = [self._wave(track, contents) for track in self.tracks]
        reference = self._reference()
        energy = _energy(waves[reference])
        audible = [number for number, track in enumerate(self.tracks) if not track.mute] or range(len(self.tracks))
        mix = np.zeros((max(len(waves[number]) for number in audible), _samples(self.seconds, self.rate)), np.float32)
        for number in audible:
            track, wave = self.tracks[number], waves[number]
            at = _samples(track.offset, self.rate)
            level = 1.0
            if track.snr is not None and energy > 0 and (own := _energy(wave)) > 0:
                level = math.sqrt(energy * 10 ** (-track.snr / 10) / own)
            part = mix[:, at : at + wave.shape[1]]
            part += np.float32(level) * wave[:, : part.shape[1]]  # a single channel goes to all
        file = io.BytesIO()
        soundfile.write(file, np.float32(self.gain) * mix.T, self.rate, format="WAV", subtype="FLOAT")
        return file.getvalue()

    def _reference(self) -> int:
        """Return the number of the track that levels refer to: the one marked so, else the first without a level."""
        marked = [number for number, track in enumerate(self.tracks) if track.reference]
        free = [number for number, track in enumerate(self.tracks) if track.sources and track.snr is None]
        if not (marked or free) and any(track.snr is not None for track in self.tracks):
            raise BadAudio("unreadable", "every track of the mix has an snr: one must be without, as the reference")
        return (marked or free or [0])[0]

    def _wave(self, track: Track, contents: dict[str, bytes]) -> Wave:
        """Return (channels, S) of a track at the rate of the mix."""
        wanted = _samples(track.seconds, self.rate)
        if not 0 <= track.seconds <= _LONGEST_S:
            raise BadAudio("too_long", f"a track of {track.seconds:g} s, at most {_LONGEST_S:g} s")
        if not track.sources:
            return np.zeros((1, wanted), np.float32)
        channels: list[Wave] = []
        for name, kept in track.sources:
            data = contents[name]
            start, seconds = (_samples(value, track.rate) / track.rate for value in (track.start, track.seconds))
            audio, rate = decode_segment(data, read_header(io.BytesIO(data)), start, seconds)
            if len(audio) < (track.seconds - SLACK_S) * rate:
                raise BadAudio("truncated", f"{name} has {len(audio) / rate:.2f} s of {track.seconds:.2f} s")
            audio = audio.reshape(len(audio), -1)
            if max(kept) >= audio.shape[1]:
                raise BadAudio("unreadable", f"{name} has {audio.shape[1]} channels, and channel {max(kept)} is wanted")
            audio = np.ascontiguousarray(audio[:, list(kept)])
            if rate != self.rate:
                audio = soxr.resample(audio, rate, self.rate, quality="HQ")
            channels += [_fitted(channel, wanted) for channel in audio.T]
        return np.float32(track.gain) * np.stack(channels)


def _fitted(wave: Wave, wanted: int) -> Wave:
    """Cut off, or mirror at the end, the few samples that rounding makes too many or too few."""
    missing = wanted - len(wave)
    return wave[:wanted] if missing <= 0 else np.pad(wave, (0, missing), mode="reflect" if len(wave) > 1 else "edge")


def _samples(seconds: float, rate: int) -> int:
    """Return a number of samples, rounded as lhotse does: halves up."""
    return math.floor(round(seconds * rate, 8) + 0.5)


def _energy(wave: Wave) -> float:
    return float(np.average(wave**2)) if wave.size else 0.0


Clip = str | bytes | Mix  # a path, an encoded file, or what is to be made of such


def pieces(clips: Iterable[Clip]) -> list[str | bytes]:
    """Return the paths and encoded files that clips are, or are made of."""
    return [piece for clip in clips for piece in (clip.files if isinstance(clip, Mix) else [clip])]
