"""What the samples of a source are like: lengths of all; rates, channels and answers of a few that are read."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import BadSample
from mowe_ray.data.shards import read_samples

_READ = 200  # samples of a source that are opened, spread over it
_DECODED = 16  # of these that are decoded, for what no header says
_COMPARED = 500  # samples to train on whose audio is compared with those that are opened for validation
_HEAD_BYTES = 4096  # of a file hold its rate and channels, unless pictures come first; the rest is for decoding
_PATIENCE_S, _DECODING_PATIENCE_S = 60.0, 20.0  # for the samples of a source
_EDGES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, np.inf)
_EXTREMES = 3


def sample_rows(size: int, at_most: int) -> np.ndarray:
    """Return row numbers spread evenly over `size` rows."""
    return np.unique(np.linspace(0, size - 1, min(size, at_most)).astype(np.int64))


def profiles(
    child: ChildProcess,
    indexes: Iterable[Index],
    known: Sequence[BadSample] = (),
    *,
    min_s: float,
    max_s: float,
) -> dict[str, tuple[dict[str, Any], list[BadSample]]]:
    """Return facts about each source as JSON values, and those of the samples tried that cannot be read, by its name.

    Args:
        child: Opens the files, which cannot take this process along.
        indexes: Of the sources.
        known: Samples that ended a process earlier; they are not tried.
        min_s: Shorter clips are bad.
        max_s: Longer clips are bad.
    """
    left_out = pa.array(sorted({sample.id for sample in known}), pa.string())
    found: dict[str, tuple[dict[str, Any], list[BadSample]]] = {}
    for index in indexes:
        for number, name in enumerate(index.source_names):
            rows = index.table.filter(pa.array(index.sources == number))
            safe = rows.filter(pc.invert(pc.is_in(rows["id"], value_set=left_out))) if known else rows
            facts: dict[str, Any] = {}
            bad: list[BadSample] = []
            # Of those that end the child, or take too long, training finds which one it was.
            with suppress(ChildDied):
                some = safe.take(sample_rows(len(safe), _READ))
                facts, bad = child.call(_read_facts, some, timeout_s=_PATIENCE_S)
                few = safe.take(sample_rows(len(safe), _DECODED))
                undecodable = child.call(_undecodable, few, min_s, max_s, timeout_s=_DECODING_PATIENCE_S)
                facts |= {"decoded": len(few), "undecodable": len(undecodable)}
                bad = list({sample.id: sample for sample in (*undecodable, *bad)}.values())
            found[name] = {**facts, **_lengths(rows)}, bad
    return found


def _undecodable(rows: pa.Table, min_s: float, max_s: float) -> list[BadSample]:
    return load_micro_batch(rows, min_s, max_s).bad if len(rows) else []


def _read_facts(rows: pa.Table) -> tuple[dict[str, Any], list[BadSample]]:
    found = list(read_samples(rows)) if len(rows) else []
    bad = [sample for sample in found if isinstance(sample, BadSample)]
    good = [sample for sample in found if not isinstance(sample, BadSample)]
    formats = [known for sample in good for clip in sample.clips if (known := _rate_and_channels(clip)) is not None]
    words = sorted(len(sample.answer.split()) for sample in good)
    facts = {
        "tried": len(found),
        "unreadable": len(bad),
        "sample_rates": _counts(rate for rate, _ in formats),
        "channels": _counts(channels for _, channels in formats),
        "answer_words": [words[0], words[len(words) // 2], words[-1]] if words else [],
    }
    return facts, bad


def _counts(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _lengths(rows: pa.Table) -> dict[str, Any]:
    """Return a histogram of the rows' seconds, and the ids and seconds of the shortest and longest."""
    seconds = rows["duration_s"].to_numpy()
    audio = np.flatnonzero(seconds > 0)
    counts = np.histogram(seconds[audio], _EDGES_S)[0].tolist()
    names = [f"{low:g} to {high:g} s" for low, high in pairwise(_EDGES_S)]
    order = audio[np.argsort(seconds[audio], kind="stable")]
    return {
        "duration_histogram": {name: n for name, n in zip(names, counts, strict=True) if n},
        "shortest": _named(rows, order[:_EXTREMES]),
        "longest": _named(rows, order[::-1][:_EXTREMES]),
    }


def _named(rows: pa.Table, places: np.ndarray) -> list[list[Any]]:
    some = rows.select(["id", "duration_s"]).take(pa.array(places, pa.int64())).to_pylist()
    return [[row["id"], round(row["duration_s"], 3)] for row in some]


def _rate_and_channels(clip: bytes) -> tuple[int, int] | None:
    try:
        info = soundfile.info(io.BytesIO(clip[:_HEAD_BYTES]))
        return int(info.samplerate), int(info.channels)
    except (soundfile.LibsndfileError, RuntimeError):
        return None  # of a format that libsndfile does not read, or damaged: decoding tells


def common_samples(train: Index, validation: Mapping[str, Index]) -> dict[str, int]:
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


def common_audio(child: ChildProcess, train: Index, validation: Mapping[str, Index]) -> dict[str, tuple[int, int]]:
    """Return how many samples of each validation source were compared, and how many have the audio of one to train on.

    Compared are clips of this machine that are equally long, whatever their ids; see `_COMPARED`.
    """
    lengths = np.round(train.durations, 2)
    counts = {}
    for name, index in validation.items():
        held = index.table.take(sample_rows(len(index), _READ))
        held = held.filter(pa.array(held["duration_s"].to_numpy() > 0))
        alike = np.flatnonzero(np.isin(lengths, np.round(held["duration_s"].to_numpy(), 2)))
        if len(alike):
            trained = train.table.take(pa.array(alike[sample_rows(len(alike), _COMPARED)]))
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


def warnings_on(
    facts: Mapping[str, Mapping[str, Any]], common: Mapping[str, int], same_audio: Mapping[str, tuple[int, int]]
) -> Sequence[str]:
    """Return what in these facts, by source name, may not be meant."""
    lines = [
        f"{name}: {count} samples have the id and length of a sample to train on" for name, count in common.items()
    ]
    lines += [
        f"{name}: {count} of the {tried} samples that were tried have the audio of a sample to train on"
        for name, (tried, count) in same_audio.items()
        if name not in common
    ]
    for name, known in facts.items():
        if len(known.get("sample_rates", ())) > 1:
            rates = ", ".join(f"{count} at {rate} Hz" for rate, count in known["sample_rates"].items())
            lines.append(f"{name}: mixed sampling rates ({rates} of {known['tried']} tried); all become 16 kHz")
    return lines
