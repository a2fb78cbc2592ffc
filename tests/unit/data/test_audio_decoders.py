"""Any container and codec that soundfile or PyAV reads is told by its content and becomes 16 kHz mono."""

import io

import numpy as np
import pytest
import soundfile

from mowe_ray.data.audio_headers import read_header, suffix_of
from mowe_ray.data.decode import decode_audio, header_duration_s
from mowe_ray.data.sample import AUDIO_SUFFIXES, BadAudio
from tests.audio_files import FFMPEG, SNDFILE, by_ffmpeg, by_sndfile, tone

FILES = [pytest.param(by_sndfile, kind, id="-".join(kind)) for kind in SNDFILE] + [
    pytest.param(by_ffmpeg, kind, id="-".join(map(str, kind))) for kind in FFMPEG
]


@pytest.mark.parametrize(("encode", "kind"), FILES)
def test_every_container_and_codec(encode, kind):
    data = encode(*kind)
    wave = decode_audio(data, None, 0.1, 30.0)
    assert header_duration_s(data) == pytest.approx(2.0, abs=0.15)
    assert len(wave) / 16_000 == pytest.approx(2.0, abs=0.15)
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert np.argmax(spectrum) * 16_000 / len(wave) == pytest.approx(440, abs=2)
    assert np.abs(wave[2000:-2000]).max() == pytest.approx(0.3, abs=0.13)


@pytest.mark.parametrize(("encode", "kind"), FILES)
def test_a_shard_names_every_container_by_a_suffix_that_its_reader_knows(encode, kind):
    suffix = suffix_of(encode(*kind, seconds=0.5))
    assert suffix in AUDIO_SUFFIXES or kind[0] == "HTK"  # which has no first bytes of its own


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9,
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"Free words, mild words, and a wide margin. " * 40,
        np.random.default_rng(0).bytes(9000),
        b"PK\x03\x04" + bytes(999),
    ],
    ids=["png", "playlist", "concat", "text", "noise", "zip"],
)
def test_what_is_no_audio_is_left_to_no_decoder(content):
    with pytest.raises(BadAudio, match="wrong_type"):
        decode_audio(content, None, 0.1, 30.0)
    with pytest.raises(BadAudio, match="wrong_type"):
        header_duration_s(content)


def test_a_header_that_declares_gigabytes_a_second_is_refused():
    out = io.BytesIO()
    soundfile.write(out, tone(192_000, 256, 0.2), 192_000, format="WAV")
    with pytest.raises(BadAudio, match="256 channels"):
        decode_audio(out.getvalue(), None, 0.1, 30.0)
    assert read_header(out).seconds == pytest.approx(0.2)
