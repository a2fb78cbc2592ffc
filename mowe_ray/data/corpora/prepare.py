"""Writes a stream of samples to a folder of shards, with a report of those left out."""

import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from queue import LifoQueue
from typing import Any, Literal, TypeVar

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.data_report import DataReport
from mowe_ray.data.decode import SAMPLE_RATE, decode_audio
from mowe_ray.data.sample import BadSample, Sample, bad_audio, valid_text
from mowe_ray.data.shards import scan_shard
from mowe_ray.data.shards.completion import NOTE, Note, WrittenShard, hash_ids, read_note, write_note
from mowe_ray.data.shards.fields import as_text
from mowe_ray.data.shards.kept_scans import FOLDER, ScanWriter, options_key
from mowe_ray.data.shards.storage import file_system, fingerprint, first_contact, whole_file
from mowe_ray.data.shards.write import Written, write_parquet, write_webdataset
from mowe_ray.data.synthetic_corpus.sounds import encode_flac
from mowe_ray.output.lease import OWNER_FILE, held
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import track

Format = Literal["webdataset", "parquet"]

REPORT = "data_report.json"
_WRITERS = {"webdataset": (write_webdataset, "tar"), "parquet": (write_parquet, "parquet")}
# A pass for each side: reading twice needs no queue between two writers.
_HELD_OUT = {"": None, "validation": True, "train": False}
_OURS = re.compile(
    rf"(?:^|/)(?:\d{{5}}\.(?:tar|parquet)|{re.escape(REPORT)}|{re.escape(NOTE)}|{FOLDER}/[^/]+\.pq)(?:\.[0-9a-f]{{32}}\.part)?$"
)


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
    request: dict[str, Any],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Check samples and write them to `out`, with a report of those left out.

    Until all is written, `out` cannot be trained on. A run that was interrupted is continued: its whole shards stay.

    Args:
        read: starts reading from the beginning; called once for each side of the split.
        out: folder or fsspec URL.
        packing: how.
        source: name of the corpus in the report.
        total: samples to expect, for the time left; None = unknown.
        overwrite: replace shards that an earlier run left in `out`.
        request: all that the samples and shards follow from, as JSON values; only the same one is continued.
        log: shows a line to the user.

    Returns:
        `samples`, `shards`, `hours`, `bad`, `out`, and the first three again by side in `splits`.

    Raises:
        ValueError: `out` is not empty, another process prepares it, or the reader says that its source cannot be read
            as asked.
    """
    next(iter(read()), None)  # a source that cannot be read should fail before anything is replaced
    file_system(out)  # raises if there is no such kind of URL
    storage, _, name = out.rstrip("/").rpartition("/")
    bad: list[BadSample] = []
    with held(RunFolder(storage, name), log, leaves_file=False):
        folders = _begin(out, packing, request, log, overwrite=overwrite)
        sides = {
            side: _write_side(read, folder, packing, _HELD_OUT[side], total, bad) for side, folder in folders.items()
        }
        report = DataReport({source: sum(written.samples for written, _ in sides.values())})
        report.add_unindexed(bad)
        with whole_file(f"{out.rstrip('/')}/{REPORT}") as file:
            file.write(json.dumps(report.to_json(), indent=2).encode())
        if bad:
            example = f"{bad[0].id}: {bad[0].cause}: {bad[0].detail}"
            log(f"left out {len(bad)}, such as {example}; all are listed in {out.rstrip('/')}/{REPORT}")
        for side, (written, kept) in sides.items():
            _finish(folders[side], request, written, kept)
    result = {**_summary(*(written for written, _ in sides.values())), "bad": report.bad_count, "out": out}
    if len(sides) > 1:
        result["splits"] = {side: _summary(sides[side][0]) for side in ("train", "validation")}
    return result


def _write_side(
    read: Callable[[], Iterable[Sample | BadSample]],
    folder: str,
    packing: Packing,
    held_out: bool | None,
    total: int | None,
    bad: list[BadSample],
) -> tuple[Written, list[str]]:
    """Write the samples of one side of the split, and append those left out to `bad`.

    Returns:
        What was written, and the names of its index files.
    """
    write, suffix = _WRITERS[packing.format]
    scans = ScanWriter([f"{folder}/{FOLDER}"], folder, options_key((), ()))
    before, ids = _whole_shards(folder, suffix, scans)
    items = _side(with_unique_ids(track(read(), f"preparing {folder}", total)), packing, held_out)
    samples = _good(_after(items, ids, folder), packing, bad)
    written = write(samples, folder, packing.shard_bytes, before, partial(_keep_scan, scans))
    scans.flush()
    return written, scans.names


def _begin(
    out: str, packing: Packing, request: dict[str, Any], log: Callable[[str], None], *, overwrite: bool
) -> dict[str, str]:
    """Return the folder of each side, marked as unfinished, with nothing that would mix with new shards."""
    base = out.rstrip("/")
    sides = [""] if packing.validation_fraction == 0 else ["validation", "train"]
    folders = {side: f"{base}/{side}".rstrip("/") for side in sides}
    with first_contact(out):
        if _mark_unfinished(base, list(folders.values()), request, overwrite=overwrite):
            log(f"continuing what was begun in {out}")
    return folders


def _mark_unfinished(out: str, folders: list[str], request: dict[str, Any], *, overwrite: bool) -> bool:
    """Mark the folders as unfinished, and make sure that they hold nothing that would mix with new shards.

    Returns:
        Whether they are so already, and hold what an interrupted run has written.
    """
    fs, inner = file_system(out)
    fs.invalidate_cache()
    files = [name for name in fs.find(inner) if not name.endswith(f"/{OWNER_FILE}")]
    notes = {folder: read_note(folder) for folder in folders} if files and not overwrite else {}
    unfinished = [note for note in notes.values() if note is not None and not note.complete]
    changed = [name for note in unfinished for name, value in request.items() if note.request.get(name) != value]
    if changed:
        raise ValueError(
            f"--out {out} is not complete, and was begun with another {', '.join(dict.fromkeys(changed))}: "
            "give the same again to continue, choose another folder, or pass --overwrite"
        )
    if files and not overwrite and not unfinished:
        raise ValueError(f"--out {out} is not empty; choose another folder, or pass --overwrite")
    for folder in folders:
        if notes.get(folder) is None:  # before anything is removed; it also says now that nothing can be written
            write_note(folder, Note(complete=False, request=request))
    if not unfinished:
        own = {f"{file_system(folder)[1]}/{NOTE}" for folder in folders}
        for name in files:
            if _OURS.search(name) and name not in own:  # whatever else lies there is not ours to delete
                fs.rm(name)
    return bool(unfinished)


def _keep_scan(scans: ScanWriter, shard: str, local: str) -> None:
    """Scan a shard, so that nobody has to scan it again."""
    scans.add(shard, fingerprint(shard), scan_shard(local))


def _whole_shards(folder: str, suffix: str, scans: ScanWriter) -> tuple[Written, deque[str]]:
    """Return what an interrupted run has written to a folder, and the ids of its samples."""
    fs, inner = file_system(folder)
    contents: dict[str, WrittenShard] = {}
    seconds, ids = 0.0, deque[str]()
    while fs.exists(f"{inner}/{(name := f'{len(contents):05d}.{suffix}')}"):
        rows = scan_shard(f"{folder}/{name}")
        if rows["cause"].null_count < len(rows):
            break  # damaged since: it and those after it are written again
        found = rows["id"].to_pylist()
        scans.add(f"{folder}/{name}", fingerprint(f"{folder}/{name}"), rows)
        contents[f"{folder}/{name}"] = WrittenShard(len(rows), fs.size(f"{inner}/{name}"), hash_ids(rows["id"]))
        seconds += float(rows["duration_s"].to_numpy().sum(dtype=float))
        ids.extend(found)
    return Written(contents, seconds), ids


def _after(items: Iterable[Sample | BadSample], ids: deque[str], folder: str) -> Iterator[Sample | BadSample]:
    """Leave out samples that are in shards already; what was bad among them is looked at again, for the report."""
    for item in items:
        if ids and isinstance(item, Sample) and as_text(item.id) == ids[0]:
            ids.popleft()
        else:
            yield item
    if ids:
        raise ValueError(
            f"{folder} holds the sample {ids[0]}, which the source has no longer, or in another place: "
            "pass --overwrite to prepare all of it anew"
        )


def _finish(folder: str, request: dict[str, Any], written: Written, kept: list[str]) -> None:
    """Remove what an interrupted run has left besides, and mark the folder as complete."""
    fs, inner = file_system(folder)
    shards = {path.rpartition("/")[2]: content for path, content in written.contents.items()}
    for path in [*fs.find(inner, maxdepth=1), *fs.find(f"{inner}/{FOLDER}")]:
        name = path.rpartition("/")[2]
        if _OURS.search(path) and name not in (*shards, *kept, REPORT, NOTE):
            fs.rm(path)
    write_note(folder, Note(complete=True, request=request, shards=shards))


def _side(items: Iterable[Sample | BadSample], packing: Packing, held_out: bool | None) -> Iterator[Sample | BadSample]:
    for item in items:
        fraction, seed = packing.validation_fraction, packing.seed
        if held_out is None or is_held_out(item, fraction, seed) == held_out:
            yield item


def _good(items: Iterable[Sample | BadSample], packing: Packing, bad: list[BadSample]) -> Iterator[Sample]:
    """Pass on what can be used, and append the rest to `bad`; each thread decodes in a child process."""
    idle: LifoQueue[ChildProcess] = LifoQueue()  # the last in first: few samples start few processes

    def check(item: Sample | BadSample) -> Sample | BadSample:
        if isinstance(item, BadSample) or item.audio is None:
            return item
        child = idle.get()
        try:
            return child.call(check_sample, item, packing.min_s, packing.max_s)
        except ChildDied as death:
            return BadSample(item.id, item.source, "crashed", str(death))
        finally:
            idle.put(child)

    with ExitStack() as stack:
        for _ in range(packing.threads):
            idle.put(stack.enter_context(ChildProcess()))
        for item in stack.enter_context(closing(map_in_threads(check, items, packing.threads))):
            if isinstance(item, BadSample):
                bad.append(item)
            else:
                yield item


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
        waves = [decode_audio(clip, sample.duration_s, min_s, max_s, sample.offset_s) for clip in sample.clips]
    except Exception as error:  # noqa: BLE001 - whatever one sample raises costs this sample only
        cause = bad_audio(error)
        return BadSample(sample.id, sample.source, cause.cause, cause.detail)
    seconds = sum(map(len, waves)) / SAMPLE_RATE
    if sample.more_audio:
        return sample
    if sample.offset_s is None:
        return replace(sample, duration_s=seconds)
    audio = encode_flac(waves[0])
    return replace(sample, audio=audio, suffix="flac", duration_s=seconds, offset_s=None)


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """Map in order with some threads (decoders release the lock) and few items in memory."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
