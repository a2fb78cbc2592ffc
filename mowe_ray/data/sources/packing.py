"""From a stream of samples to a folder of shards with a report beside them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec

from mowe_ray.data.progress import with_progress
from mowe_ray.data.report import DataReport
from mowe_ray.data.sample import BadSample, Sample
from mowe_ray.data.sources.checking import (
    check_sample,
    is_held_out,
    map_in_threads,
    with_unique_ids,
)
from mowe_ray.data.write import Written, write_parquet, write_webdataset

Format = Literal["webdataset", "parquet"]

REPORT = "data_report.json"
_WRITERS = {"webdataset": write_webdataset, "parquet": write_parquet}
_OURS = re.compile(rf"(?:^|/)(?:\d{{5}}\.(?:tar|parquet)|{re.escape(REPORT)})$")


@dataclass(frozen=True, slots=True)
class Packing:
    """How samples become shards.

    Attributes:
        format: WebDataset tars or Parquet files.
        shard_bytes: about how much audio goes into a shard.
        validation_fraction: part that is held out; above 0 there are two folders, train/ and
            validation/.
        seed: another seed holds out other samples.
        min_s: shorter clips are left out, seconds.
        max_s: longer clips are left out, seconds.
        threads: how many clips are checked at a time.
    """

    format: Format
    shard_bytes: int
    validation_fraction: float
    seed: int
    min_s: float
    max_s: float
    threads: int


def pack(
    read: Callable[[], Iterable[Sample | BadSample]],
    out: str,
    packing: Packing,
    *,
    source: str,
    total: int | None,
    overwrite: bool,
) -> dict[str, Any]:
    """Check samples and write them to `out`, with a report of those left out.

    Args:
        read: starts reading from the beginning; called once for each side of the split.
        out: folder or fsspec URL.
        packing: how.
        source: name of the corpus in the report.
        total: samples to expect, for the time left; None = unknown.
        overwrite: replace shards that an earlier run left in `out`.

    Returns:
        `samples`, `shards`, `hours`, `bad`, `out`, and the first three again by side in `splits`.

    Raises:
        ValueError: `out` is not empty, or the reader says that its source cannot be read as asked.
    """
    next(iter(read()), None)  # a source that cannot be read should fail before anything is replaced
    _clear(out, overwrite)
    bad: list[BadSample] = []

    def write(folder: str, held_out: bool | None) -> Written:
        items = with_unique_ids(with_progress(read(), f"preparing {folder}", total))
        samples = _good(_side(items, packing, held_out), packing, bad)
        return _WRITERS[packing.format](samples, folder, packing.shard_bytes)

    if packing.validation_fraction == 0:
        written = {"": write(out, None)}
    else:
        base = out.rstrip("/")
        # A pass for each side: reading twice needs no queue between two writers.
        validation = write(f"{base}/validation", True)
        written = {"train": write(f"{base}/train", False), "validation": validation}

    report = DataReport({source: sum(part.samples for part in written.values())})
    report.add_unindexed(bad)
    _write_report(report.to_json(), out)
    result = {**_summary(*written.values()), "bad": report.bad_count, "out": out}
    if len(written) > 1:
        result["splits"] = {name: _summary(part) for name, part in written.items()}
    return result


def _side(items: Iterable[Sample | BadSample], packing: Packing, held_out: bool | None) -> Iterator[Sample | BadSample]:
    for item in items:
        fraction, seed = packing.validation_fraction, packing.seed
        if held_out is None or is_held_out(item, fraction, seed) == held_out:
            yield item


def _good(items: Iterable[Sample | BadSample], packing: Packing, bad: list[BadSample]) -> Iterator[Sample]:
    """Pass on what can be used, and append the rest to `bad`."""

    def check(item: Sample | BadSample) -> Sample | BadSample:
        if isinstance(item, BadSample):
            return item
        return check_sample(item, packing.min_s, packing.max_s)

    for item in map_in_threads(check, items, packing.threads):
        if isinstance(item, BadSample):
            bad.append(item)
        else:
            yield item


def _clear(out: str, overwrite: bool) -> None:
    """Make sure that `out` holds nothing that would mix with new shards."""
    fs, folder = fsspec.core.url_to_fs(out)
    found = fs.find(folder)
    if found and not overwrite:
        raise ValueError(f"--out {out} is not empty; choose another folder, or pass --overwrite")
    for name in found:
        if _OURS.search(name):  # whatever else lies there is not ours to delete
            fs.rm(name)


def _write_report(report: dict[str, Any], out: str) -> None:
    fs, folder = fsspec.core.url_to_fs(out)
    fs.makedirs(folder, exist_ok=True)
    with fs.open(f"{folder}/{REPORT}", "w") as file:
        json.dump(report, file, indent=2)


def _summary(*written: Written) -> dict[str, Any]:
    return {
        "samples": sum(part.samples for part in written),
        "shards": sum(len(part.shards) for part in written),
        "hours": round(sum(part.seconds for part in written) / 3600, 4),
    }
