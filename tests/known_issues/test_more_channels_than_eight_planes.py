"""PyAV keeps eight planes of a planar frame and reads beyond them: 7.1 AAC and Opus ended the process.

https://github.com/meta-pytorch/torchcodec/pull/1166 mends the same in TorchCodec.
"""

import subprocess
import sys

import numpy as np
import pytest

from tests.audio_files import by_ffmpeg, by_sndfile

_PLANAR_AND_PACKED = [
    ("mp4", "aac"), ("adts", "aac"), ("mpegts", "aac"), ("matroska", "aac"), ("mp4", "alac"), ("ogg", "libopus"),
    ("webm", "libopus"), ("ac3", "ac3"), ("eac3", "eac3"), ("wv", "wavpack"), ("tta", "tta"),
    ("matroska", "pcm_s16le"), ("matroska", "pcm_f32le"), ("nut", "pcm_s16le_planar"), ("mov", "pcm_s24le"),
]  # fmt: skip
_DECODE = """
import sys
from mowe_ray.data.decode import decode_audio, header_duration_s
for file in sys.argv[1:]:
    data = open(file, "rb").read()
    wave = decode_audio(data, None, 0.1, 30.0)
    print(header_duration_s(data), len(wave) / 16_000, abs(wave[1600:-1600]).max(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("container", "codec"), _PLANAR_AND_PACKED, ids="-".join)
def test_every_number_of_channels_that_a_codec_can_hold(tmp_path, container, codec):
    files = []
    for channels in range(1, 17):
        try:
            data = by_ffmpeg(container, codec, 48_000, channels=channels, seconds=0.5)
        except ValueError:
            continue
        files.append(tmp_path / str(channels))
        files[-1].write_bytes(data)
    assert len(files) >= 2
    # In a process of its own: what is tested here ended it.
    run = subprocess.run([sys.executable, "-c", _DECODE, *map(str, files)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = np.loadtxt(run.stdout.splitlines())
    np.testing.assert_allclose(lines[:, :2], 0.5, atol=0.1)
    np.testing.assert_allclose(lines[:, 2], 0.3, atol=0.13)


@pytest.mark.parametrize("channels", [1, 2, 8, 9, 16, 33, 64])
def test_a_wav_of_many_channels_is_mixed_by_their_mean(channels):
    from mowe_ray.data.decode import decode_audio

    wave = decode_audio(by_sndfile("WAV", "PCM_16", channels=channels, seconds=0.5), None, 0.1, 30.0)
    one = decode_audio(by_sndfile("WAV", "PCM_16", seconds=0.5), None, 0.1, 30.0)
    np.testing.assert_allclose(wave, one, atol=1e-6)
