"""Wrong bytes in files of every format end no run, hang nowhere and take little memory."""

import pytest

from tests.damaged_audio import run

_MOST_BYTES = 1 << 30


@pytest.mark.parametrize(("count", "seed"), [(500, 0), pytest.param(20_000, 1, marks=pytest.mark.soak)])
def test_scan_and_decoding_of_damaged_files(count, seed):
    outcomes = run(count, seed=seed, timeout_s=5)
    assert not outcomes.ended, outcomes
    assert not outcomes.crashed, outcomes
    assert outcomes.counts.total() == count
    assert outcomes.counts["good"] < 0.8 * count
    assert outcomes.peak_bytes < _MOST_BYTES
