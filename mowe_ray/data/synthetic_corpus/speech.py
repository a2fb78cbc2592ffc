"""Synthetic speech, offline: espeak-ng, through the shared library of a wheel (espeakng-loader)."""

import contextlib
import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np
import numpy.typing as npt
import soxr

from mowe_ray.data.synthetic_corpus.sounds import SAMPLE_RATE, Wave

# Values of espeak-ng's public header, speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2  # the callback gets all samples before espeak_Synth returns: no thread
_INITIALIZE_DONT_EXIT = 0x8000  # report an error instead of ending the process
_TEXT_IS_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Prosody:
    """How a phrase is spoken.

    Attributes:
        rate: words per minute, 80 to 450.
        pitch: mean pitch, 0 to 99, 50 is the voice's own.
        span: how far the pitch moves, 0 (monotone) to 99.
        volume: 0 to 200, 100 is normal.
    """

    rate: int = 170
    pitch: int = 50
    span: int = 50
    volume: int = 100


class Speaker:
    """One private instance of the synthesiser; made by `speaker()`.

    Not for several threads at once. Several speakers, in one process or many, do not disturb each
    other.
    """

    def __init__(self, library: Path, data_parent: Path) -> None:
        """Load `library` and the voice data found in `data_parent/espeak-ng-data`."""
        self._engine = ctypes.CDLL(str(library))
        self._pieces: list[npt.NDArray[np.int16]] = []
        rate = self._engine.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, str(data_parent).encode(), _INITIALIZE_DONT_EXIT)
        if rate <= 0:
            raise RuntimeError(f"espeak-ng could not start with its voice data in {data_parent}")
        self._engine.espeak_ng_SetRandSeed(ctypes.c_long(1))  # otherwise the clock is the seed
        self._rate = int(rate)
        self._callback = _Callback(self._collect)  # kept alive: C holds only a bare pointer to it
        self._engine.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, voice: str, prosody: Prosody) -> Wave:
        """Speak `text` in a voice such as `en-us+f3`: (S,) float32, 16 kHz, silence trimmed."""
        if self._engine.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        settings = {
            _RATE: prosody.rate,
            _PITCH: prosody.pitch,
            _RANGE: prosody.span,
            _VOLUME: prosody.volume,
        }
        for parameter, value in settings.items():
            self._engine.espeak_SetParameter(parameter, value, 0)
        self._pieces.clear()
        data = text.encode() + b"\0"
        size = ctypes.c_size_t(len(data))
        error = self._engine.espeak_Synth(data, size, 0, 0, 0, _TEXT_IS_UTF8, None, None)
        if error != 0 or not self._pieces:
            raise RuntimeError(f"espeak-ng could not speak {text!r} (error {error})")
        wave = np.concatenate(self._pieces).astype(np.float32) / 32768
        return _trim(soxr.resample(wave, self._rate, SAMPLE_RATE, quality="HQ"))

    def close(self) -> None:
        """Free what the synthesiser holds; the speaker cannot be used afterwards."""
        self._engine.espeak_Terminate()

    def _collect(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


@contextlib.contextmanager
def speaker() -> Iterator[Speaker]:
    """A fresh synthesiser, the same in every process.

    espeak-ng keeps oscillator and flutter phases in static variables that even its
    re-initialisation leaves as they were, so what it spoke earlier would leak into a seeded
    corpus. A private copy of the library starts from nothing. Its voice data is reached through a
    link next to that copy, because espeak-ng cuts long paths off, and a cluster's environments
    easily lie deeper than it allows.
    """
    with tempfile.TemporaryDirectory(prefix="mowe-speech-") as folder:
        home = Path(folder)
        library = home / Path(espeakng_loader.get_library_path()).name
        shutil.copyfile(espeakng_loader.get_library_path(), library)
        (home / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
        voice = Speaker(library, home)
        try:
            yield voice
        finally:
            voice.close()


def _trim(wave: Wave, threshold: float = 0.01) -> Wave:
    """Cut the near-silence that espeak-ng puts around a phrase."""
    loud = np.flatnonzero(np.abs(wave) > threshold)
    if loud.size == 0:
        return wave
    return wave[loud[0] : loud[-1] + 1]
