import pytest

from mowe_ray.output.text import duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7810, "2h10m")]
)
def test_durations_are_told_in_two_units_at_most(seconds, text):
    assert duration(seconds) == text
