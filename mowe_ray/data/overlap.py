"""Samples for validation that are trained on, by their ids or by their audio."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.index import Index
from mowe_ray.data.profile import sample_rows
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards import read_samples

_HELD, _TRAINED = 200, 500  # samples of a validation source, and equally long ones to train on, whose audio is compared
_PATIENCE_S = 20.0  # for the samples of a source


def overlap_warnings(child: ChildProcess, train: Index, validation: Mapping[str, Index]) -> list[str]:
    """Return a line on each validation source with samples that are trained on.

    Args:
        child: Opens the files, which cannot take this process along.
        train: What is trained on.
        validation: The other sources by name.
    """
    named = _common_samples(train, validation)
    same_audio = _common_audio(child, train, {name: index for name, index in validation.items() if name not in named})
    lines = [f"{name}: {count} samples have the id and length of a sample to train on" for name, count in named.items()]
    return lines + [
        f"{name}: {count} of the {tried} samples that were tried have the audio of a sample to train on"
        for name, (tried, count) in same_audio.items()
    ]


def _common_samples(train: Index, validation: Mapping[str, Index]) -> dict[str, int]:
    """Return how many samples of each validation source have the id and the length of one to train on."""
    known = _keys(train.table)
    counts = {
        name: int(pc.sum(pc.is_in(_keys(index.table), value_set=known)).as_py() or 0) if len(index) else 0
        for name, index in validation.items()
    }
    return {name: count for name, count in counts.items() if count}


def _keys(rows: pa.Table) -> pa.ChunkedArray:
    length = pc.cast(pc.round(rows["duration_s"], 3), pa.string())
    return pc.binary_join_element_wise(rows["id"], length, " ")


def _common_audio(child: ChildProcess, train: Index, validation: Mapping[str, Index]) -> dict[str, tuple[int, int]]:
    """Return how many samples of each validation source were compared, and how many have the audio of one to train on.

    Compared are clips of this machine that are equally long, whatever their ids; see `_TRAINED`.
    """
    lengths = np.round(train.durations, 2)
    counts = {}
    for name, index in validation.items():
        held = index.table.take(sample_rows(len(index), _HELD))
        held = held.filter(pa.array(held["duration_s"].to_numpy() > 0))
        alike = np.flatnonzero(np.isin(lengths, np.round(held["duration_s"].to_numpy(), 2)))
        if len(alike):
            trained = train.table.take(pa.array(alike[sample_rows(len(alike), _TRAINED)]))
            with suppress(ChildDied):
                counts[name] = len(held), child.call(_count_common, held, trained, timeout_s=_PATIENCE_S)
    return {name: (tried, count) for name, (tried, count) in counts.items() if count}


def _count_common(held: pa.Table, trained: pa.Table) -> int:
    known = set(_contents(trained))
    return sum(content in known for content in _contents(held))


def _contents(rows: pa.Table) -> list[tuple[Any, ...]]:
    """Return what tells the audio of each row from others: hashes of its clips, and where in them it is."""
    local = rows.filter(pc.invert(pc.match_substring(pc.cast(rows["shard"], pa.string()), "://")))
    return [
        (
            sample.offset_s,
            sample.offset_s and sample.duration_s,
            *(hashlib.blake2b(clip).digest() for clip in sample.clips),
        )
        for sample in (read_samples(local) if len(local) else ())
        if not isinstance(sample, BadSample) and sample.clips
    ]
