"""MP3 and AAC of broadcasts change their channels or rate in the middle, which ended the run with PyAV's ValueError.

https://github.com/SYSTRAN/faster-whisper/issues/1451, and "Frame does not match AudioResampler setup".
"""

import numpy as np
import pytest

from mowe_ray.data.decode import decode_audio, header_duration_s
from tests.audio_files import by_ffmpeg


def _bare(mp3: bytes) -> bytes:
    """Take away the ID3 tag and the count of frames, which a broadcast does not have."""
    start = 10 + mp3[9] + 128 * mp3[8] if mp3.startswith(b"ID3") else 0
    return mp3[start:].replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [((16_000, 1), (16_000, 2)), ((16_000, 2), (16_000, 1)), ((16_000, 1), (44_100, 1)), ((48_000, 2), (24_000, 1))],
)
@pytest.mark.parametrize(("container", "codec"), [("mp3", "libmp3lame"), ("adts", "aac"), ("mp2", "mp2")])
def test_all_of_it_is_decoded_at_the_first_rate(container, codec, first, second):
    parts = [_bare(by_ffmpeg(container, codec, rate, channels=channels)) for rate, channels in (first, second)]
    wave = decode_audio(b"".join(parts), None, 0.1, 30.0)
    assert len(wave) / 16_000 == pytest.approx(4.0, abs=0.4)
    for half in (wave[:32_000], wave[-32_000:]):
        spectrum = np.abs(np.fft.rfft(half * np.hanning(len(half))))
        assert np.argmax(spectrum) * 16_000 / len(half) == pytest.approx(440, abs=2)
    assert header_duration_s(b"".join(parts)) > 0
