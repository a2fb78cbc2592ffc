import math

import pytest

from mowe_ray.distributed.batch_size.find_batch import BisectionSearch, clip_lengths, recommended_batch_seconds


@pytest.mark.parametrize("most", [1, 2, 3, 8, 31, 32, 33])
def test_the_search_finds_every_limit_from_every_guess_in_few_trials(most):
    for limit in range(most + 3):
        for guess in range(most + 2):
            search, tried = BisectionSearch(most, guess), []
            while not search.done:
                tried.append(search.candidate)
                search.update(fits=search.candidate <= limit)
            assert search.best == min(limit, most)
            assert len(set(tried)) == len(tried)
            assert all(1 <= number <= most for number in tried)
            assert len(tried) <= 2 * math.log2(most) + 2


def test_from_one_it_doubles_and_then_bisects():
    search, tried = BisectionSearch(32), []
    while not search.done:
        tried.append(search.candidate)
        search.update(fits=search.candidate <= 11)
    assert tried == [1, 2, 4, 8, 16, 12, 10, 11]


def test_clip_lengths_end_with_the_longest_allowed():
    assert clip_lengths(30.0) == [2.5, 5.0, 10.0, 20.0, 30.0]
    assert clip_lengths(12.0) == [2.5, 5.0, 10.0, 12.0]
    assert clip_lengths(2.0) == [2.0]
    assert clip_lengths(45.0)[-2:] == [30.0, 45.0]


def test_what_is_recommended_fits_every_length():
    assert recommended_batch_seconds({2.5: 32, 5.0: 20, 10.0: 9}, max_batch_size=32) == 81.0
    assert recommended_batch_seconds({2.5: 30, 10.0: 20}, max_batch_size=32) == 67.5
    # Nothing was limited by memory: as much as was tried.
    assert recommended_batch_seconds({2.5: 8, 10.0: 8}, max_batch_size=8) == 72.0
    # data.batch_seconds has to hold the longest clip.
    assert recommended_batch_seconds({2.5: 8, 30.0: 1}, max_batch_size=8) == 30.0
