import threading
from dataclasses import replace

import numpy as np
import pytest

from mowe_ray.data.corpora.prepare import (
    check_sample,
    is_held_out,
    map_in_threads,
    with_unique_ids,
)
from mowe_ray.data.decode import decode_audio
from mowe_ray.data.sample import BadSample


@pytest.fixture
def sample(make_audio, asr, tmp_path):
    return asr.sample({"audio": make_audio(1.0), "text": "x"}, "s", tmp_path)


def test_repeated_ids_are_numbered(sample):
    others = [BadSample("t", "corpus", "silent"), BadSample("s", "corpus", "silent")]
    assert [s.id for s in with_unique_ids([sample, *others, sample])] == ["s", "t", "s-2", "s-3"]


@pytest.mark.slow
def test_held_out_share_does_not_depend_on_order_and_keeps_recordings_together(sample):
    clips = [replace(sample, id=str(n), audio=b"clip %d" % n) for n in range(4000)]
    held = [clip for clip in clips if is_held_out(clip, 0.2, seed=0)]
    assert len(held) == pytest.approx(800, abs=4 * np.sqrt(4000 * 0.2 * 0.8))
    for clip in held[:50]:
        assert is_held_out(replace(clip, id="another question"), 0.2, seed=0)
    assert [is_held_out(clip, 0.2, seed=1) for clip in clips] != [clip in held for clip in clips]
    assert {clip.id for clip in held} <= {c.id for c in clips if is_held_out(c, 0.3, seed=0)}


def test_a_good_sample_keeps_its_bytes_and_learns_its_length(sample):
    checked = check_sample(sample, 0, 10)
    assert checked == replace(sample, duration_s=1.0)


def test_limits_and_damage_give_a_cause(sample, make_audio):
    assert check_sample(sample, 2, 10).cause == "too_short"
    assert check_sample(sample, 0, 0.5).cause == "too_long"
    assert check_sample(replace(sample, audio=b"plain text" * 9), 0, 10).cause == "wrong_type"
    cut = make_audio(1.0)[:9000]
    assert check_sample(replace(sample, audio=cut), 0, 10).cause == "truncated"


def test_a_segment_is_cut_out_of_its_recording(sample):
    segment = check_sample(replace(sample, offset_s=0.25, duration_s=0.5), 0, 10)
    assert (segment.duration_s, segment.offset_s, segment.suffix) == (0.5, None, "flac")
    whole = decode_audio(sample.audio, None, 0, 10)
    cut = decode_audio(segment.audio, None, 0, 10)
    np.testing.assert_allclose(cut, whole[4000:12000], atol=2 / 32768)


@pytest.mark.slow
def test_threads_keep_the_order_and_hold_few_items():
    released, drawn = threading.Event(), []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    def work(number):
        if number == 0:
            released.wait(10)
        return number * 2

    results = map_in_threads(work, items(), threads=2)
    threading.Timer(0.2, released.set).start()
    assert next(results) == 0
    assert len(drawn) <= 6
    assert list(results) == [2 * number for number in range(1, 100)]
