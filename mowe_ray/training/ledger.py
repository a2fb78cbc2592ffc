"""The ledger of a run: how often each sample was trained in this epoch, as ranges of places in each shard.

Beside it, a checkpoint holds the number of samples of each shard and a hash of them. Where shards are not what they
were, their samples are found again by id: a file beside the checkpoints lists those of the index, once a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.index import Index, source_key
from mowe_ray.data.shards.audio_field import has_audio_suffix
from mowe_ray.data.shards.fields import ID_KEYS
from mowe_ray.data.shards.record import PLACE_ID, REPEATED_ID, is_made_of_place
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import counted
from mowe_ray.training.checkpoint.layout import CHECKPOINTS, store

Ledger = dict[str, list[list[int]]]
Counts = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
_LEDGERS = ("before", "trained")


def write_ledger(counts: Counts, index: Index) -> Ledger:
    """Return (N,) counts of the samples of `index` as ranges."""
    order, shard_starts, names = _by_shard(index)
    times = counts[order]
    first_of_range = np.ones(len(times), bool)
    first_of_range[1:] = times[1:] != times[:-1]
    # A range also ends with its shard: it is stored as places within the shard. Empty shards begin no range.
    first_of_range[shard_starts[:-1][np.diff(shard_starts) > 0]] = True
    starts = np.flatnonzero(first_of_range)
    ends = np.append(starts[1:], len(times))
    trained = times[starts] > 0
    starts, ends = starts[trained], ends[trained]
    shard = np.searchsorted(shard_starts, starts, side="right") - 1
    ranges = np.stack([starts - shard_starts[shard], ends - shard_starts[shard], times[starts]], axis=1)
    ledger: Ledger = {}
    for number, entry in zip(shard.tolist(), ranges.tolist(), strict=True):
        ledger.setdefault(names[number], []).append(entry)
    return ledger


def read_ledger(ledger: Ledger, index: Index) -> Counts:
    """Return (N,) counts of the samples of `index`; shards it does not have are passed over."""
    order, shard_starts, names = _by_shard(index)
    steps = np.zeros(len(order) + 1, np.int64)  # up at the first of a range, down after its last
    for number, name in enumerate(names):
        if name in ledger:
            first, last, times = np.asarray(ledger[name], np.int64).reshape(-1, 3).T
            low, high = shard_starts[number : number + 2]
            # Cut at the end of the shard, which may have fewer samples now. `add.at` also counts places that repeat.
            np.add.at(steps, np.minimum(low + first, high), times)
            np.subtract.at(steps, np.minimum(low + last, high), times)
    counts = np.zeros(len(order), np.int32)
    counts[order] = np.cumsum(steps)[:-1]
    return counts


def _by_shard(index: Index) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[str]]:
    """Return the samples shard after shard, where the S shards start (S + 1 places), and their paths.

    A shard of two sources is one here, the samples of the second source after those of the first.
    """
    names, number = np.unique(np.asarray(index.shard_names, np.str_), return_inverse=True)
    shard = number[index.shards]
    sizes = np.bincount(shard, minlength=len(names))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return np.argsort(shard, kind="stable"), starts, names.tolist()


def describe(index: Index) -> dict[str, Any]:
    """Return, as JSON, what a checkpoint says about the samples that its ledgers count."""
    return {"sources": index.samples_per_source, "shards": index.shard_digests, "ids": _ids_file(index)}


def same_shards(state: Mapping[str, Any], index: Index) -> bool:
    """Whether the shards of `index` are, and lie, as the checkpoint says."""
    return {path: tuple(digest) for path, digest in state["shards"].items()} == index.shard_digests


def keep_ids(folder: RunFolder, index: Index) -> None:
    """Write the file by which the samples of `index` are found again, unless the run has it already."""
    if not folder.exists(file := _ids_file(index)):
        store(folder, file, lambda local: _write_ids(local, index))


def load_ids(folder: RunFolder, file: str) -> Index | None:
    """Return the samples that `keep_ids` listed, without their places in the shards; None if the file is gone."""
    try:
        with pa.ipc.open_file(pa.py_buffer(folder.read_bytes(file))) as reader:
            table = reader.read_all()
    except FileNotFoundError:
        return None
    return Index(table, table.schema.metadata[b"sources"].decode().split("\0"), [])


def _ids_file(index: Index) -> str:
    content = repr((index.source_names, list(index.shard_digests.items())))
    return f"{CHECKPOINTS}/samples-{blake2b(content.encode(), digest_size=8).hexdigest()}.arrow"


def _write_ids(local: Path, index: Index) -> None:
    table = index.table.select(["id", "source", "shard"])
    table = table.replace_schema_metadata({"sources": "\0".join(index.source_names)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(local), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)


@dataclass(frozen=True)
class Changes:
    """How the samples differ from those that a checkpoint counted.

    Attributes:
        shards: The shards that are not what and where they were, old and new ones.
        moved: Samples that were found again elsewhere.
        gone: Samples that are not there any more; `gone_trained` of them were trained in the epoch.
        new: Rows of the index that the checkpoint did not count.
    """

    shards: list[str]
    moved: int
    gone: int
    gone_trained: int
    new: Rows

    def __str__(self) -> str:
        """Return a line for people."""
        some = ", ".join(self.shards[:3]) + (f" and {len(self.shards) - 3} more" if len(self.shards) > 3 else "")
        gone = f"{self.gone} gone ({self.gone_trained} trained in this epoch)" if self.gone else "0 gone"
        return (
            f"the training data have changed since the checkpoint: {counted(self.moved, 'sample')} moved, "
            f"{len(self.new)} new, {gone}; in {some}"
        )


@dataclass(frozen=True)
class CarriedOver:
    """The counts of a checkpoint, for the samples of an index.

    Attributes:
        before: (N,) times trained in the epoch when its present plan began.
        trained: (N,) times trained in the epoch.
        absent: What was counted of samples that are not there now, as JSON: they may come back within the epoch.
        changes: None if every shard is as it was.
    """

    before: Counts
    trained: Counts
    absent: list[dict[str, Any]]
    changes: Changes | None = None


def carry_over(state: Mapping[str, Any], index: Index, load: Callable[[str], Index | None]) -> CarriedOver:
    """Return the counts of a checkpoint for the samples of `index`, wherever these lie now.

    Args:
        state: Of the checkpoint.
        load: Returns the samples of an earlier index by the name of their file, None if that is gone.

    Raises:
        ValueError: Shards have changed, and ids do not tell which of their samples were trained.
    """
    if "shards" not in state:
        return CarriedOver(_by_place(state["before"], index), _by_place(state["trained"], index), absent=[])
    search, earlier = _SampleSearch(index, load), state["absent"]
    # All by shard first, which is certain, and only then by id.
    home, *homes = [search.by_shard(layer) for layer in (state, *earlier)]
    rest = search.by_id(state, home)
    found = search.found
    absent = [rest, *(search.by_id(layer, known) for layer, known in zip(earlier, homes, strict=True))]
    _check_sources(state["sources"], index, search.new)
    sizes = {path: size for path, (size, _) in state["shards"].items()}
    changed = [path for path in sizes if home.get(path) != path]
    back = [path for known in homes for path in known.values()]
    changes = Changes(
        shards=list(dict.fromkeys([*changed, *back, *search.unknown.values()])),
        moved=sum(sizes[path] for path in changed if path in home) + found,
        gone=sum(sizes[path] for path in changed if path not in home) - found,
        gone_trained=sum(last - first for ranges in rest["trained"].values() for first, last, _ in ranges),
        new=search.new,
    )
    kept = [layer for layer in absent if layer["trained"]]
    return CarriedOver(search.counts[0], search.counts[1], kept, changes if changes.shards else None)


class _SampleSearch:
    """Looks for the samples that checkpoints counted.

    Attributes:
        counts: (2, N) of the samples of the index that were found: `before` and `trained`.
        unknown: Shards of the index that were not found as a whole, by digest.
        found: Samples that were found by id.
    """

    def __init__(self, index: Index, load: Callable[[str], Index | None]):
        self._index, self._load = index, load
        self.counts = np.zeros((2, len(index)), np.int32)
        self.unknown = {digest: path for path, digest in index.shard_digests.items()}
        self.found = 0
        self._by_id = np.zeros(len(index), bool)

    @property
    def new(self) -> Rows:
        """Rows of the index that were not found so far."""
        rows = _rows_of(self._index, self.unknown.values())
        return rows[~self._by_id[rows]]

    def by_shard(self, layer: Mapping[str, Any]) -> dict[str, str]:
        """Take over the counts of shards that are as they were; returns their paths now by those of then."""
        shards = {path: tuple(digest) for path, digest in layer["shards"].items()}
        home = {path: self.unknown.pop(digest) for path, digest in shards.items() if digest in self.unknown}
        for counts, name in zip(self.counts, _LEDGERS, strict=True):
            counts += read_ledger(
                {home[path]: ranges for path, ranges in layer[name].items() if path in home}, self._index
            )
        return home

    def by_id(self, layer: Mapping[str, Any], home: Mapping[str, str]) -> dict[str, Any]:
        """Take over the counts of samples in other shards by their ids; returns those of samples that are gone."""
        ledgers = {name: {path: r for path, r in layer[name].items() if path not in home} for name in _LEDGERS}
        left = {path: digest for path, digest in layer["shards"].items() if path not in home}
        if left and len(self.new):
            old = self._load(layer["ids"])
            if old is None:
                raise _refusal(
                    next(iter(left)), f"{layer['ids']} in the run's folder, which lists its samples, is gone"
                )
            rows, counts = _rows_of(old, left), np.stack([read_ledger(ledgers[name], old) for name in _LEDGERS])
            names = old.shard_names
            for name in self._index.source_names:
                found = self._find(_Samples.of(old, rows, name), counts, _Samples.of(self._index, self.new, name))
                # A shard of which only a part is gone is not to be found as a whole any more.
                left |= dict.fromkeys((names[n] for n in np.unique(old.shards[found]).tolist()), (0, ""))
            ledgers = {name: write_ledger(count, old) for name, count in zip(_LEDGERS, counts, strict=True)}
        left = {path: digest for path, digest in left.items() if path in ledgers["trained"]}
        return {"ids": layer["ids"], "shards": left, **ledgers}

    def _find(self, old: _Samples, old_counts: Counts, new: _Samples) -> Rows:
        """Move the counts of a source's samples from `old_counts` to those of the index; returns their old rows."""
        old.check_distinct(old_counts)
        place = pc.index_in(new.ids, value_set=old.ids).to_numpy(zero_copy_only=False)
        same = np.flatnonzero(~np.isnan(place) & ~new.made_of_place)
        rows, places = new.rows[same], np.asarray(old.rows[place[same].astype(np.int64)])
        self.counts[:, rows] = old_counts[:, places]
        old_counts[:, places] = 0
        self._by_id[rows] = True
        self.found += len(rows)
        trained = old.at(np.flatnonzero(old_counts[1, old.rows]))
        rest = new.at(np.flatnonzero(~self._by_id[new.rows]))
        trained.check_not_among(rest)
        return places


@dataclass(frozen=True)
class _Samples:
    """Samples of one source of an index: their rows, and what is asked about them."""

    index: Index
    rows: Rows

    @classmethod
    def of(cls, index: Index, rows: Rows, source: str) -> _Samples:
        """Return those of `rows` that belong to a source."""
        keys = [source_key(name) == source_key(source) for name in index.source_names]
        return cls(index, rows[np.asarray(keys, bool)[index.sources[rows]]])

    def at(self, places: Rows) -> _Samples:
        """Return some of them."""
        return _Samples(self.index, self.rows[places])

    @cached_property
    def ids(self) -> pa.Array:
        """(n,) ids."""
        return pc.take(self.index.table["id"].cast(pa.large_string()), pa.array(self.rows)).combine_chunks()

    def shard(self, place: int) -> str:
        """Return the path of a sample's shard."""
        return self.index.shard_names[int(self.index.shards[self.rows[place]])]

    @cached_property
    def made_of_place(self) -> npt.NDArray[np.bool_]:
        """(n,) whether an id says only where the sample lay."""
        found = np.array(pc.match_substring_regex(self.ids, PLACE_ID).to_numpy(zero_copy_only=False), bool)
        names, shards = self.index.shard_names, self.index.shards[self.rows[found]]
        ids = self.ids.filter(pa.array(found)).to_pylist()
        found[found] = [is_made_of_place(id_, names[n]) for id_, n in zip(ids, shards.tolist(), strict=True)]
        return found

    def check_distinct(self, counts: Counts) -> None:
        """Raise ValueError where samples of one id were not trained equally often."""
        bases = pc.replace_substring_regex(self.ids, REPEATED_ID, "").dictionary_encode()
        code, value = bases.indices.to_numpy(), counts[0, self.rows].astype(np.int64) << 32 | counts[1, self.rows]
        low, high = np.full(len(bases.dictionary), 2**62), np.full(len(bases.dictionary), -1)
        np.minimum.at(low, code, value)
        np.maximum.at(high, code, value)
        # Whoever numbers samples himself begins with 0 or 1.
        first = self.ids.filter(pc.match_substring_regex(self.ids, "#[01]$"))
        own = pc.is_in(bases.dictionary, pc.utf8_slice_codeunits(first, 0, -2)).to_numpy(zero_copy_only=False)
        for uneven in np.flatnonzero((low < high) & ~own)[:1].tolist():
            place = int(np.argmax(code == uneven))
            raise _refusal(self.shard(place), f"several of its samples have the id {bases.dictionary[uneven]}")

    def check_not_among(self, others: _Samples) -> None:
        """Raise ValueError where these may be some of `others`, though their ids differ."""
        if not len(self.rows) or not len(others.rows):
            return
        for samples in (self, others):
            if samples.made_of_place.any():
                place = int(np.argmax(samples.made_of_place))
                raise _refusal(
                    samples.shard(place), f"its samples have no ids, only places such as {samples.ids[place]}"
                )
        names = {_file_name(name): place for place, name in enumerate(self.ids.to_pylist()) if _is_file(name)}
        for name in others.ids.to_pylist():
            if _is_file(name) and _file_name(name) in names:
                place = names[_file_name(name)]
                raise _refusal(
                    self.shard(place), f"{self.ids[place]} may be {name}: records without an id are told apart by path"
                )


def _is_file(name: str) -> bool:
    return has_audio_suffix(name.rpartition(".")[2])


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]


def _refusal(shard: str, why: str) -> ValueError:
    return ValueError(
        f"{shard} is not what the checkpoint counted, and which of its samples were trained in this epoch cannot be "
        f"told: {why}. Put it back as it was, or choose another name to start anew; only records with an id of their "
        f"own ({', '.join(ID_KEYS)}) can be found in other places"
    )


def _rows_of(index: Index, paths: Iterable[str]) -> Rows:
    """Return the rows of the samples in these shards."""
    wanted = set(paths)
    return np.flatnonzero(np.asarray([name in wanted for name in index.shard_names], bool)[index.shards])


def _by_place(ledger: Ledger, index: Index) -> Counts:
    """Return the counts of a checkpoint that does not say what its shards held, as version 0.1 wrote them."""
    sizes = {path: size for path, (size, _) in index.shard_digests.items()}
    for path, ranges in ledger.items():
        if path in sizes and ranges and max(last for _, last, _ in ranges) > sizes[path]:
            raise _refusal(path, "it has fewer samples now")
    if ledger and not ledger.keys() & sizes.keys():
        raise _refusal(next(iter(ledger)), "it is gone, like all others that the checkpoint counted")
    return read_ledger(ledger, index)


def _check_sources(before: Mapping[str, int], index: Index, new: Rows) -> None:
    """Raise ValueError where a source was exchanged for another."""
    paths = {source_key(name): (name, size) for name, size in before.items()}
    unknown = np.bincount(index.sources[new], minlength=len(index.source_names)).tolist()
    for number, (name, size) in enumerate(index.samples_per_source.items()):
        was, had = paths.get(source_key(name), (name, 0))
        if was != name and had and size and unknown[number] == size:
            raise ValueError(
                f"data.train.{number}.path: none of the {had} samples of {was.partition(':')[2]} is in "
                f"{name.partition(':')[2]}: choose another name to train on other data"
            )
