import pytest

from mowe_ray.output.text import amount, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7810, "2h10m")]
)
def test_durations_are_told_in_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (12, "12"), (1.25e3, "1.25 k"), (1.234e6, "1.23 M"), (2e9, "2 B"), (3e12, "3 T")]
)
def test_amounts_have_three_digits(value, text):
    assert amount(value) == text
