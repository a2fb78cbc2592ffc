"""The Ray Data stream gives exactly what decoding the planned rows one after the other gives."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
import ray

from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import MicroBatch, load_micro_batch
from mowe_ray.distributed.ray_data.parallel_map import parallel_map
from mowe_ray.distributed.ray_data.pipeline import decode_stream, prefetch
from mowe_ray.training.datasets import index_sources
from tests.tiny_runs import Corpus, tiny_config

pytestmark = pytest.mark.usefixtures("ray_cluster")
SHORTEST_S, LONGEST_S = 0.1, 12.0


@pytest.fixture(scope="module")
def index(ray_cluster: None, tiny_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Index of the training clips, scanned in Ray tasks."""
    config = tiny_config(tiny_corpus, tmp_path_factory.mktemp("unused"), "unused", "training.max_steps=1")
    return index_sources(config.data, parallel_map).train


@pytest.fixture(scope="module")
def rows(index: Index) -> list[np.ndarray]:
    """Fifty micro-batches in no order a scheduler would come to by itself; some are empty."""
    random = np.random.default_rng(0)
    return [random.integers(0, len(index), size) for size in random.integers(0, 4, 50)]


def _stream(
    index: Index, rows: Iterable[np.ndarray], *, cpus: int = 1, per_execution: int = 20
) -> Iterator[MicroBatch]:
    return decode_stream(
        ray.put(index),
        rows,
        min_duration_s=SHORTEST_S,
        max_duration_s=LONGEST_S,
        decode_cpus=cpus,
        per_execution=per_execution,
    )


def _assert_equal(found: Sequence[MicroBatch], index: Index, rows: Sequence[np.ndarray]) -> None:
    assert len(found) == len(rows)
    for batch, wanted in zip(found, rows, strict=True):
        expected = vars(load_micro_batch(index.table.take(wanted), SHORTEST_S, LONGEST_S))
        np.testing.assert_array_equal(batch.audio, expected["audio"])
        assert {k: v for k, v in vars(batch).items() if k != "audio"} == {
            k: v for k, v in expected.items() if k != "audio"
        }


def test_stream_keeps_the_planned_order_over_tasks_and_executions(index: Index, rows: list[np.ndarray]) -> None:
    # 20 + 20 + 10 micro-batches, of which a task decodes up to 16; two CPUs, so tasks may overtake each other.
    _assert_equal(list(_stream(index, rows, cpus=2)), index, rows)


def test_stream_takes_no_more_of_the_plan_than_it_runs(index: Index) -> None:
    def plan() -> Iterator[np.ndarray]:
        for number in range(1000):
            taken.append(number)
            yield np.array([number % len(index)])

    taken: list[int] = []
    stream = _stream(index, plan(), per_execution=5)
    first = [next(stream) for _ in range(6)]
    assert [batch.ids for batch in first] == [[index.table["id"][n].as_py()] for n in range(6)]
    assert len(taken) == 15  # one execution read, the second being read, the third started


def test_two_streams_share_the_cluster(index: Index, rows: list[np.ndarray]) -> None:
    one, other = prefetch(_stream(index, rows), 2), prefetch(_stream(index, rows[::-1]), 2)
    pairs = list(zip(one, other, strict=True))
    _assert_equal([pair[0] for pair in pairs], index, rows)
    _assert_equal([pair[1] for pair in pairs], index, rows[::-1])


def test_an_error_while_decoding_reaches_the_consumer(index: Index, rows: list[np.ndarray]) -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="IndexError"):
        list(prefetch(_stream(index, [*rows[:3], np.array([len(index)])]), 2))


def test_an_item_that_ends_its_process_is_tried_again_and_then_carefully() -> None:
    def scan(number: int, *, in_child: bool = False) -> tuple[int, bool]:
        if number == 3 and not in_child:
            os.kill(os.getpid(), signal.SIGSEGV)
        return number, in_child

    assert list(parallel_map(scan, range(6))) == [(n, n == 3) for n in range(6)]


def test_parallel_map_keeps_the_order() -> None:
    assert list(parallel_map(lambda number: number**2, range(40), in_flight=7)) == [n**2 for n in range(40)]
