"""Runs that are fetched once, kept on disk, and read instead of single samples."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from mowe_ray.data.index import Index, SourceSpec, build_index
from mowe_ray.data.sample import Sample, StorageError
from mowe_ray.data.shards import read_samples
from mowe_ray.data.shards.byte_ranges import read_ranges
from mowe_ray.data.shards.kept_runs import Extent, KeptRuns, folder_of, forget_runs, with_runs
from mowe_ray.data.shards.storage import storage_timeout
from mowe_ray.data.shards.write import write_webdataset
from mowe_ray.data.synthetic_corpus import builtin_samples

ROOM = 1 << 20


class CountedStore(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory, and what was read of them."""

    protocol = "counted"
    reads: list[tuple[str, int, int]] = []  # noqa: RUF012 - of all instances
    store: dict[str, Any] = {}  # noqa: RUF012 - of all instances
    broken = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("counted://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self.broken:
            raise OSError("on purpose")
        self.reads.append((path, start or 0, end or 0))
        return bytes(super().cat_file(path, start, end, **options))


register_implementation("counted", CountedStore, clobber=True)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    CountedStore.reads.clear()
    CountedStore.store.clear()
    yield
    CountedStore.broken = False


@pytest.fixture
def data() -> bytes:
    content = np.random.default_rng(0).bytes(1000)
    MemoryFileSystem().store = CountedStore.store
    CountedStore().pipe_file("/shard.tar", content)
    return content


def read(runs: KeptRuns, *ranges: tuple[int, int]) -> list[bytes | OSError]:
    wanted = [("counted://shard.tar", at, size) for at, size in ranges]
    return with_runs(runs, lambda: list(read_ranges(wanted)))


def extent(start: int, stop: int, version: str = "1") -> Extent:
    return Extent("counted://shard.tar", start, stop, version)


def test_a_run_is_fetched_once_for_all_who_share_it(data: bytes) -> None:
    for _ in range(2):  # two tasks
        with KeptRuns("rank 0", ROOM, [extent(100, 600)]) as runs:
            assert read(runs, (100, 50), (590, 10)) == [data[100:150], data[590:600]]
            assert read(runs, (300, 1)) == [data[300:301]]
    assert CountedStore.reads == [("/shard.tar", 100, 600)]
    forget_runs("rank 0")
    assert not folder_of("rank 0").exists()


def test_what_is_in_no_run_is_read_as_ever(data: bytes) -> None:
    with KeptRuns("rank 0", ROOM, [extent(100, 600)]) as runs:
        assert read(runs, (550, 100), (100, 10), (0, 5)) == [data[550:650], data[100:110], data[:5]]


def test_a_shard_that_is_another_or_shorter_now_is_not_taken_for_the_old_one(data: bytes) -> None:
    with KeptRuns("rank 0", ROOM, [extent(100, 600)]) as runs:
        read(runs, (100, 10))
    CountedStore().pipe_file("/shard.tar", data[::-1])
    with KeptRuns("rank 0", ROOM, [extent(100, 600, version="2")]) as runs:
        assert read(runs, (100, 10)) == [data[::-1][100:110]]
    CountedStore().pipe_file("/shard.tar", data[:500])
    with KeptRuns("rank 0", ROOM, [extent(100, 600, version="3")]) as runs:
        assert read(runs, (100, 10), (495, 10)) == [data[100:110], data[495:500]]


def test_the_disk_holds_no_more_than_its_room(data: bytes) -> None:
    extents = [extent(start, start + 100) for start in range(0, 1000, 100)]
    with KeptRuns("rank 0", 350, extents) as runs:
        # Also those whose file had to go again.
        assert read(runs, *((start, 100) for start in range(0, 1000, 100))) == [
            data[start : start + 100] for start in range(0, 1000, 100)
        ]
    assert sum(file.stat().st_size for file in folder_of("rank 0").glob("*.run")) <= 350


def test_what_a_killed_run_left_is_removed_by_a_later_one(data: bytes) -> None:
    left, used = folder_of("killed"), folder_of("under way")
    for folder in (left, used):
        folder.mkdir(parents=True)
    os.utime(left, (0, 0))
    with KeptRuns("new", ROOM, [extent(0, 500)]) as runs:
        assert read(runs, (0, 10)) == [data[:10]]
    assert (left.exists(), used.exists()) == (False, True)
    assert used.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_a_stranger_has_put_there_is_not_used(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "strangers").mkdir()
    folder_of("new").parent.symlink_to(tmp_path / "strangers")
    with KeptRuns("new", ROOM, [extent(0, 500)]) as runs:
        assert read(runs, (0, 10)) == [data[:10]]
    assert list((tmp_path / "strangers").iterdir()) == []


def test_a_storage_that_fails_is_no_bad_sample(data: bytes) -> None:
    CountedStore.broken = True
    with storage_timeout(0.0), KeptRuns("rank 0", ROOM, [extent(100, 600)]) as runs, pytest.raises(StorageError):
        read(runs, (100, 10))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    url = f"counted://{uuid4().hex}"
    write_webdataset(builtin_samples("train", 24), url, shard_bytes=1 << 19)
    return build_index([SourceSpec("made", url)], tmp_path / "cache", min_s=0.1, max_s=30.0)


def test_extents_of_an_index_hold_their_samples_and_no_others(index: Index) -> None:
    shards = index.shards
    starts = [*np.flatnonzero(np.diff(shards, prepend=-1)).tolist(), len(index)]
    assert len(starts) > 2
    extents = index.extents(np.asarray(starts), [np.arange(len(index))])
    assert len(extents) == len(starts) - 1
    assert index.extent(0, len(index)) is None  # of several shards
    plain = list(read_samples(index.table))
    CountedStore.reads.clear()
    rows = index.take(np.random.default_rng(0).permutation(len(index)))
    with KeptRuns("rank 0", 1 << 30, extents) as runs:
        samples = with_runs(runs, lambda: list(read_samples(rows)))
    assert all(isinstance(sample, Sample) for sample in samples)
    assert sorted(samples, key=lambda s: s.id) == sorted(plain, key=lambda s: s.id)
    assert len(CountedStore.reads) == len(extents)
