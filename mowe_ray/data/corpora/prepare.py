"""Writes a stream of samples to a folder of shards, with a report of those left out."""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from mowe_ray.data.data_report import DataReport
from mowe_ray.data.decode import SAMPLE_RATE, decode_audio
from mowe_ray.data.sample import BadSample, Sample, bad_audio, valid_text
from mowe_ray.data.shards.storage import file_system, first_contact
from mowe_ray.data.shards.write import Written, write_parquet, write_webdataset
from mowe_ray.data.synthetic_corpus.sounds import encode_flac
from mowe_ray.output.terminal import track

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
    with first_contact(out):
        _clear(out, overwrite)
    bad: list[BadSample] = []

    def write(folder: str, held_out: bool | None) -> Written:
        items = with_unique_ids(track(read(), f"preparing {folder}", total))
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
    fs, folder = file_system(out)
    files = fs.find(folder)
    if files and not overwrite:
        raise ValueError(f"--out {out} is not empty; choose another folder, or pass --overwrite")
    for name in files:
        if _OURS.search(name):  # whatever else lies there is not ours to delete
            fs.rm(name)
    fs.makedirs(folder, exist_ok=True)  # says now, and not after hours, that it cannot be written


def _write_report(report: dict[str, Any], out: str) -> None:
    fs, folder = file_system(out)
    fs.makedirs(folder, exist_ok=True)
    with fs.open(f"{folder}/{REPORT}", "w") as file:
        json.dump(report, file, indent=2)


def _summary(*written: Written) -> dict[str, Any]:
    return {
        "samples": sum(part.samples for part in written),
        "shards": sum(len(part.shards) for part in written),
        "hours": round(sum(part.seconds for part in written) / 3600, 4),
    }


Item = TypeVar("Item")
Result = TypeVar("Result")


def with_unique_ids(samples: Iterable[Sample | BadSample]) -> Iterator[Sample | BadSample]:
    """Append -2, -3, ... to ids seen before, as when one recording has several questions."""
    seen: Counter[str] = Counter()
    for sample in samples:
        seen[sample.id] += 1
        number = seen[sample.id]
        yield replace(sample, id=f"{sample.id}-{number}") if number > 1 else sample


def is_held_out(sample: Sample | BadSample, fraction: float, seed: int) -> bool:
    """Decide by a hash whether a sample belongs to the held-out split.

    The hash is over the audio, so two questions about one recording are never on both sides, and a
    corpus that grows or is read in another order keeps its split.
    """
    # Samples without audio are identified by their ids.
    content = (sample.audio if isinstance(sample, Sample) else None) or valid_text(sample.id).encode()
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def check_sample(sample: Sample, min_s: float, max_s: float) -> Sample | BadSample:
    """Decode a sample once, to find damage that headers do not show.

    Returns:
        The sample with its length, its bytes untouched, except that a segment of a longer
        recording is cut out and becomes 16 kHz FLAC; or why it cannot be used.
    """
    if sample.audio is None:
        return sample
    try:
        wave = decode_audio(sample.audio, sample.duration_s, min_s, max_s, sample.offset_s)
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        cause = bad_audio(error)
        return BadSample(sample.id, sample.source, cause.cause, cause.detail)
    seconds = len(wave) / SAMPLE_RATE
    if sample.offset_s is None:
        return replace(sample, duration_s=seconds)
    audio = encode_flac(wave)
    return replace(sample, audio=audio, suffix="flac", duration_s=seconds, offset_s=None)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Map in order with some threads (decoders release the lock) and few items in memory."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
