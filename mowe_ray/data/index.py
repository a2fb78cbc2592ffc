"""One table of every usable sample: where it lies, how long it is, what it belongs to.

The rows come from scans of the shards (`scan.py`). Waveforms and text stay in the shards.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.runs import RUN_BYTES, Runs, runs_of
from mowe_ray.data.sample import BadSample
from mowe_ray.data.scan import ParallelMap, ScanRequest, scan_source
from mowe_ray.data.shards import list_shards, shard_versions, with_options
from mowe_ray.data.shards.completion import WrittenShard, check_size, hash_ids, written_shards
from mowe_ray.data.shards.fields import Reading
from mowe_ray.data.shards.kept_runs import Extent
from mowe_ray.data.shards.kept_scans import SHARD_FIELD
from mowe_ray.data.shards.members import parts_in_shard
from mowe_ray.data.shards.record import DEFAULT_INSTRUCTIONS
from mowe_ray.data.shards.storage import first_contact, is_remote

_TABLE_COLUMNS = ["id", "duration_s", "task", "audio_at", "audio_size", "meta_at", "meta_size"]
_TABLE_COLUMNS += ["clips", "turns", "asks", "parts"]


_MARKS = b"marks"  # in the metadata of the table, by source


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A corpus.

    Attributes:
        name: In reports.
        path: Where its shards are; `paths` where they are in several places.
        task: Of samples that name none.
        key: What errors name.
        reading: How its rows are read.
        limit: How many samples to take: the first ones, or below 1 a share of all that the seed draws.
        max_s: Longer clips are bad; None takes the limit of all sources.
    """

    name: str
    path: str
    task: str | None = None
    key: str | None = None
    reading: Reading = Reading()  # noqa: RUF009 - frozen
    limit: float | None = None
    max_s: float | None = None
    paths: tuple[str, ...] = ()

    @property
    def options(self) -> Reading:
        """How its rows are read, with their task."""
        return replace(self.reading, task=self.task)


@dataclass(frozen=True)
class Index:
    """All usable samples of a mixture, in an order that depends on the shards only.

    Attributes:
        table: one row per sample: id, duration_s (0: text only), task, source, shard, the place
            within the shard, and the row among the usable samples of the shard. Any
            `table.take(rows)` can be read by `read_samples` on any machine that sees the shards.
        source_names: by source number.
        bad: samples that the scan found unusable, or whose length is outside the limits.
        fingerprints: size and time of each shard, by shard number, when it was scanned.
    """

    table: pa.Table
    source_names: list[str]
    bad: list[BadSample]
    fingerprints: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def durations(self) -> npt.NDArray[np.float32]:
        """(N,) seconds."""
        return self.table["duration_s"].to_numpy()  # type: ignore[no-any-return]

    @property
    def shards(self) -> npt.NDArray[np.int32]:
        """(N,) shard number of each sample; the samples of a shard are neighbours."""
        return _codes(self.table["shard"])

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> pa.Table:
        """Return rows of the table, in the given order.

        Looks only at the chunks they lie in: Arrow's own `take` joins all chunks of a text column first, which takes
        100 ms at ten million samples, and cannot join more than 2 GiB.
        """
        wanted = np.asarray(rows, np.int64)
        batches, ends = self._batches
        chunk = np.searchsorted(ends, wanted, side="right")
        parts = []
        for number in np.unique(chunk).tolist():
            first = int(ends[number - 1]) if number else 0
            part = batches[number].take(pa.array(wanted[chunk == number] - first))
            # As text: joining the chunks of a dictionary compares all of its entries.
            texts = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in part.columns]
            parts.append(pa.table(texts, names=part.schema.names))
        if not parts:
            return self.table.slice(0, 0)
        place = np.argsort(np.argsort(chunk, kind="stable"), kind="stable")
        return pa.concat_tables(parts).take(pa.array(place)).replace_schema_metadata(self.table.schema.metadata)

    @cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], npt.NDArray[np.int64]]:
        """The chunks of the table, and the number of rows up to the end of each."""
        batches = self.table.to_batches()
        return batches, np.cumsum([len(batch) for batch in batches])

    @cached_property
    def runs(self) -> Runs:
        """Neighbouring samples that are read together."""
        known = {"audio_size", "meta_size"} <= set(self.table.column_names)
        sizes = pc.add(self.table["audio_size"], self.table["meta_size"]).to_numpy() if known else None
        return runs_of(self.shards, self.sources, sizes, self.durations)

    def extents(self, starts: npt.NDArray[np.integer], wanted: Iterable[npt.NDArray[np.integer]]) -> list[Extent]:
        """Return the bytes of the runs of these rows, in their order, as far as runs lie in remote tars.

        Args:
            starts: (R + 1,) rows at which runs begin, and the end of all.
        """
        runs = dict.fromkeys(run for rows in wanted for run in np.searchsorted(starts, rows, side="right").tolist())
        found = (self.extent(int(starts[run - 1]), int(starts[run])) for run in runs)
        return [extent for extent in found if extent is not None]

    def extent(self, start: int, stop: int) -> Extent | None:
        """Return the bytes of a remote tar in which neighbouring rows lie; None if there are no such, or others too."""
        batches, ends = self._batches
        number = int(np.searchsorted(ends, start, side="right"))
        if stop > ends[number]:
            return None
        first = int(ends[number - 1]) if number else 0
        rows = batches[number].slice(start - first, stop - start)
        shard, last = (rows["shard"].indices[row].as_py() for row in (0, len(rows) - 1))
        if shard != last:
            return None
        path = rows["shard"].dictionary[shard].as_py()
        spans = _spans(rows) if is_remote(path) and path.lower().endswith(".tar") else []
        begin, end = min((at for at, _ in spans), default=0), max((at + size for at, size in spans), default=0)
        if 2 * sum(size for _, size in spans) <= end - begin or end - begin > 2 * RUN_BYTES:
            return None
        return Extent(path, begin, end, self.fingerprints[shard] if self.fingerprints else "")

    @property
    def shard_names(self) -> list[str]:
        """Path of each shard, by shard number; a shard of two sources has two numbers."""
        chunks = self.table["shard"].chunks
        return chunks[0].dictionary.to_pylist() if chunks else []

    @cached_property
    def shard_digests(self) -> dict[str, tuple[int, str]]:
        """How many samples each shard has, and a hash of their ids and lengths, by path; none for shards without any.

        Neither depends on where the shard and its source lie.
        """
        rows, shards, sources = self.table.select(["id", "duration_s"]), self.shards, self.sources
        starts = np.searchsorted(shards, np.arange(len(self.shard_names) + 1))
        found: dict[str, tuple[int, str]] = {}
        for path, start, end in zip(self.shard_names, starts[:-1], starts[1:], strict=True):
            if start == end:
                continue
            part, (before, digest) = rows.slice(start, end - start), found.get(path, (0, ""))
            content = (digest, source_key(self.source_names[sources[start]]), hash_ids(part["id"]))
            hashed = hashlib.blake2b(repr(content).encode(), digest_size=16)
            hashed.update(part["duration_s"].to_numpy().astype("<f4").tobytes())
            found[path] = int(before + end - start), hashed.hexdigest()
        return found

    @property
    def sources(self) -> npt.NDArray[np.int32]:
        """(N,) source number of each sample."""
        return _codes(self.table["source"])

    @property
    def asked_nothing(self) -> dict[str, int]:
        """Usable samples without an instruction, of a task without a usual one, by source name."""
        usual = pc.is_in(self.table["task"], pa.array(list(DEFAULT_INSTRUCTIONS)))
        nothing = pc.and_(pc.invert(self.table["asks"]), pc.invert(usual))
        counts = np.bincount(self.sources[nothing.to_numpy()], minlength=len(self.source_names))
        return dict(zip(self.source_names, counts.tolist(), strict=True))

    @property
    def text_only_per_source(self) -> dict[str, int]:
        """Usable samples without audio by source name."""
        counts = np.bincount(self.sources[self.durations == 0], minlength=len(self.source_names))
        return dict(zip(self.source_names, counts.tolist(), strict=True))

    @property
    def samples_per_source(self) -> dict[str, int]:
        """Usable samples by source name."""
        counts = np.bincount(self.sources, minlength=len(self.source_names))
        return dict(zip(self.source_names, counts.tolist(), strict=True))


def source_key(name: str) -> str:
    """Return the part of a source's name that stays when its path changes."""
    return name.partition(":")[0]


def build_index(
    sources: Sequence[SourceSpec],
    cache_dir: str | Path,
    *,
    min_s: float,
    max_s: float,
    allow_paths: Sequence[str] = (),
    run_map: ParallelMap = map,
    index_folder: str | None = None,
) -> Index:
    """Scan the shards of all sources, or take the cached scan, and keep what is within the limits.

    Args:
        sources: with distinct names.
        cache_dir: folder for the scans, shared by runs.
        min_s: shorter clips go to `Index.bad`.
        max_s: longer clips go to `Index.bad`.
        allow_paths: what rows may open beside the folder of their shard: folders, URLs, and hosts.
        run_map: applies the scan to shards, in order; Ray passes its own.
        index_folder: for scans of remote shards that cannot be kept beside them.

    Raises:
        ValueError: when a path has no shards or two sources share a name.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"sources need distinct names, got {', '.join(names)}")
    tables: list[pa.Table] = []
    bad: list[BadSample] = []
    shard_names: list[str] = []
    fingerprints: list[str] = []
    for source_number, source in enumerate(sources):
        shards, prints, written = _fingerprints(source)
        request = ScanRequest((source.path, source.paths), shards, prints, written, source.options, allow_paths)
        rows = scan_source(request, Path(cache_dir), index_folder, run_map)
        usable, unusable = _split(rows, min_s, max_s if source.max_s is None else min(max_s, source.max_s))
        usable = _limited(usable, source)
        bad += [BadSample(source=source.name, **fields) for fields in unusable.to_pylist()]
        shard = usable[SHARD_FIELD.name]
        rows_within = _rows_within(shard.to_numpy())
        if shard_names:  # else they stay in the file
            shard = pc.add(shard, pa.scalar(len(shard_names), SHARD_FIELD.type))
        shard_names += shards
        fingerprints += [print_ + _mark(source) for print_ in prints]
        tables.append(
            usable.select(_TABLE_COLUMNS)
            .append_column("source_number", _repeated(source_number, len(usable)))
            .append_column(SHARD_FIELD, shard)
            .append_column("row", pa.array(rows_within))
        )
    readings = {source.name: source.options for source in sources}
    table = with_options(pa.concat_tables(tables), allow_paths, readings)
    marks = {source.name: _mark(source, source.limit, source.max_s) for source in sources}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _MARKS: json.dumps(marks)})
    for column, values in (("source", names), ("shard", shard_names)):
        table = table.append_column(column, _labelled(table[f"{column}_number"], values))
    return Index(table.drop_columns(["source_number", "shard_number"]), names, bad, fingerprints)


def _fingerprints(source: SourceSpec) -> tuple[list[str], list[str], dict[str, WrittenShard]]:
    """List the shards of a source, their sizes and times, and what was written to those that `prepare` made."""
    try:
        shards = list_shards(source.paths or source.path)
        with first_contact(source.path):
            prints = shard_versions(shards)
            written = written_shards(shards)
        for shard, found in zip(shards, prints, strict=True):
            if shard in written:
                check_size(shard, written[shard], found.partition("-")[0])
        return shards, prints, written
    except ValueError as error:
        raise ValueError(f"{source.key}: {error}" if source.key else str(error)) from error


def marked_shards(rows: pa.Table) -> list[str]:
    """Return the shard of each row of `Index.table`, with what tells its samples from those that others take of it."""
    marks = json.loads((rows.schema.metadata or {}).get(_MARKS, "{}"))
    shards, sources = rows["shard"].to_pylist(), rows["source"].to_pylist()
    return [f"{shard}{marks.get(source, '')}" for shard, source in zip(shards, sources, strict=True)]


def _mark(source: SourceSpec, *more: float | None) -> str:
    """Return what tells the samples of a source from those that other options make of the same shards."""
    options = [source.reading, *more]
    digest = hashlib.blake2b(repr(options if any(more) else source.reading).encode(), digest_size=8).hexdigest()
    return f"-{digest}" if any(more) or source.reading != Reading() else ""


def _limited(rows: pa.Table, source: SourceSpec) -> pa.Table:
    """Return the first of the rows of a source, or a share of them that its seed draws, as its limit says."""
    if source.limit is None or source.limit >= 1:
        return rows if source.limit is None else rows.slice(0, int(source.limit))
    drawn = np.random.default_rng(source.reading.seed).permutation(len(rows))[: round(source.limit * len(rows))]
    return rows.take(pa.array(np.sort(drawn)))


def _rows_within(shards: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """Number the samples of each shard, which are neighbours, from 0."""
    starts = np.flatnonzero(np.concatenate([[True], shards[1:] != shards[:-1]])) if len(shards) else shards[:0]
    sizes = np.diff(np.append(starts, len(shards)))
    return (np.arange(len(shards)) - np.repeat(starts, sizes)).astype(np.int32)


def _spans(rows: pa.RecordBatch) -> list[tuple[int, int]]:
    """Return offset and size of whatever belongs to rows of a tar, and lies in it."""
    columns = [rows[name].to_pylist() for name in ("audio_at", "audio_size", "meta_at", "meta_size", "parts")]
    spans = [span for *own, _ in zip(*columns, strict=True) for span in (own[:2], own[2:])]
    packed = [parts_in_shard(parts) for parts in columns[-1] if parts is not None]
    return [(at, size) for at, size in chain(spans, *packed) if size]


def _repeated(number: int, times: int) -> pa.Array:
    """Return a number so often; zeros take no memory until they are copied."""
    values = np.zeros(times, np.int32)
    if number:
        values += number
    return pa.array(values)


def _labelled(codes: pa.ChunkedArray, values: list[str]) -> pa.ChunkedArray:
    """Dictionary-encode: four bytes a row, and the table still carries the names itself."""
    names = pa.array(values, pa.string())
    chunks = [pa.DictionaryArray.from_arrays(chunk, names) for chunk in codes.chunks]
    return pa.chunked_array(chunks, pa.dictionary(pa.int32(), pa.string()))


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    parts = [chunk.indices.to_numpy() for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _split(rows: pa.Table, min_s: float, max_s: float) -> tuple[pa.Table, pa.Table]:
    """Usable rows, and (id, cause, detail) of the others; text (0 s) has no length limits.

    Of several clips the sum is known here, and each is measured when it is decoded.
    """
    seconds = pc.if_else(pc.greater(rows["clips"], 1), pa.scalar(0, pa.float32()), rows["duration_s"])
    cause = pc.if_else(
        pc.greater(seconds, pa.scalar(max_s, pa.float32())),
        "too_long",
        pc.if_else(
            pc.and_(pc.greater(seconds, 0), pc.less(seconds, pa.scalar(min_s, pa.float32()))),
            "too_short",
            None,
        ),
    )
    cause = pc.coalesce(rows["cause"], cause)
    good = pc.is_null(cause)
    if pc.all(good).as_py() is not False:
        return rows, rows.slice(0, 0).select(["id", "cause", "detail"])
    length = pc.binary_join_element_wise(pc.cast(pc.round(seconds, 3), pa.string()), "s", " ")
    unusable = pa.table({"id": rows["id"], "cause": cause, "detail": pc.coalesce(rows["detail"], length)})
    return rows.filter(good), unusable.filter(pc.invert(good))
