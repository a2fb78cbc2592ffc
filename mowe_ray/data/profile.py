"""What the samples of a source are like: lengths of all; rates, channels and answers of a few that are read."""

import io
import re
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
    segments = Counter(pair for sample in good if sample.offset_s is None and (pair := _segment(sample.others)))
    words = sorted(len(sample.answer.split()) for sample in good)
    facts = {
        "tried": len(found),
        "unreadable": len(bad),
        "sample_rates": _counts(rate for rate, _ in formats),
        "channels": _counts(channels for _, channels in formats),
        **({"segment": segments.most_common(1)[0][0]} if 2 * segments.total() > len(good) else {}),
        "answer_words": [words[0], words[len(words) // 2], words[-1]] if words else [],
    }
    return facts, bad


# Names of where a piece of a recording begins and ends, which are not read unless a source says so: of many corpora
# the clips are cut already.
_START = re.compile(r"(?:start|begin|onset)_?(?:time|s|secs?|seconds)?", re.IGNORECASE)
_END = re.compile(r"(?:end|stop)_?(?:time|s|secs?|seconds)?", re.IGNORECASE)


def _segment(others: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of the fields of a row that seem to be the start and end of a piece."""
    start, end = (next(filter(name.fullmatch, others), None) for name in (_START, _END))
    return (start, end) if start and end else None


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


def warnings_on(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what in these facts, by source name, may not be meant."""
    lines = []
    for name, known in facts.items():
        if segment := known.get("segment"):
            start, end = segment
            lines.append(
                f"{name}: its clips are taken whole; if they are the pieces from {start!r} to {end!r}, set its columns "
                f"to {{offset: {start}, end: {end}}}"
            )
        if len(known.get("sample_rates", ())) > 1:
            rates = ", ".join(f"{count} at {rate} Hz" for rate, count in known["sample_rates"].items())
            lines.append(f"{name}: mixed sampling rates ({rates} of {known['tried']} tried); all become 16 kHz")
    return lines
