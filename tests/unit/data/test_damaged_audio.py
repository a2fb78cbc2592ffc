"""Wrong bytes in files of every format end no run, hang nowhere and take little memory."""

import pytest

from mowe_ray.data.decode import decode_audio
from mowe_ray.data.sample import BadAudio
from tests.audio_files import by_sndfile
from tests.damaged_audio import run

_MOST_BYTES = 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seed"), [(500, 0), pytest.param(20_000, 1, marks=pytest.mark.soak)])
def test_scan_and_decoding_of_damaged_files(count, seed):
    outcomes = run(count, seed=seed, timeout_s=5)
    assert not outcomes.ended, outcomes
    assert not outcomes.crashed, outcomes
    assert outcomes.counts.total() == count
    assert outcomes.counts["good"] < 0.8 * count
    assert outcomes.peak_bytes < _MOST_BYTES


def test_frames_of_one_sample_are_refused_before_they_take_minutes():
    caf = bytearray(by_sndfile("CAF", "PCM_16", seconds=20.0))
    caf[43] = 128  # frames in each packet of two bytes
    del caf[-13_000:]  # so that libsndfile leaves it to PyAV
    with pytest.raises(BadAudio, match="frames in"):
        decode_audio(bytes(caf), None, 0.1, 30.0)
