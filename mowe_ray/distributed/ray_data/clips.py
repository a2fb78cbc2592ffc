"""Clips for the page of an evaluation: read again and made small, on any CPUs of the cluster."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from mowe_ray.config.evaluation import EvaluationData
from mowe_ray.data.index import Index
from mowe_ray.data.micro_batch import load_in_child, load_micro_batch
from mowe_ray.data.shards.storage import with_storage_timeout
from mowe_ray.distributed.ray_data.parallel_map import parallel_map
from mowe_ray.evaluation.results import Clip, Evaluation, ShownSample
from mowe_ray.evaluation.samples import BITS_PER_S, encoded_clip
from mowe_ray.output.run_folder import RunFolder

_EMBEDDED = 50
_PAGE_BYTES = 3_700_000  # of MP3, which are 5 MB as text of the page
_LONGEST_S = (60.0, 30.0, 14.0)  # the first for which all fit is taken


def with_clips(
    evaluation: Evaluation, indexes: Mapping[str, Index], data: EvaluationData, folder: RunFolder, *, every: bool
) -> Evaluation:
    """Returns an evaluation with the clips of its most telling samples in it.

    Args:
        folder: Of the report.
        every: Write the others to files beside it, whole.
    """
    spoken = [sample for sample in evaluation.samples if sample.duration_s]
    embedded = spoken[:_EMBEDDED]
    seconds = 8 * _PAGE_BYTES / BITS_PER_S
    longest = next(s for s in _LONGEST_S if sum(min(sample.duration_s, s) for sample in embedded) <= seconds)
    parts = [(embedded[i : i + 8], longest) for i in range(0, len(embedded), 8)]
    if every:
        parts += [(spoken[i : i + 8], math.inf) for i in range(_EMBEDDED, len(spoken), 8)]
    tables = ((_rows_of(samples, indexes), most_s) for samples, most_s in parts)
    with_clips: dict[tuple[str, str], ShownSample] = {}
    for (samples, most_s), clips in zip(parts, parallel_map(partial(_clips, data), tables), strict=True):
        for sample in samples:
            clip = clips.get((sample.dataset, sample.id))
            if clip is not None and most_s == math.inf:
                # Numbered, for two ids may differ only in what no file name should have.
                name = f"{len(with_clips):05d}_{re.sub(r'[^A-Za-z0-9_.-]+', '_', sample.id)[:80]}.mp3"
                file = f"samples/{sample.dataset}/{name}"
                folder.write_bytes(file, clip.mp3)
                with_clips[sample.dataset, sample.id] = replace(sample, clip=replace(clip, mp3=b""), file=quote(file))
            elif clip is not None:
                with_clips[sample.dataset, sample.id] = replace(sample, clip=clip)
    return replace(evaluation, samples=[with_clips.get((s.dataset, s.id), s) for s in evaluation.samples])


def _rows_of(samples: Sequence[ShownSample], indexes: Mapping[str, Index]) -> list[tuple[str, pa.Table]]:
    by_dataset: dict[str, list[str]] = {}
    for sample in samples:
        by_dataset.setdefault(sample.dataset, []).append(sample.id)
    return [
        (name, indexes[name].table.filter(pc.is_in(indexes[name].table["id"], pa.array(ids, pa.string()))))
        for name, ids in by_dataset.items()
    ]


def _clips(
    data: EvaluationData, part: tuple[list[tuple[str, pa.Table]], float], *, in_child: bool = False
) -> dict[tuple[str, str], Clip]:
    """Returns the clips of rows of indexes, by dataset and id; those that cannot be read are missing."""
    tables, most_s = part
    load, limits = load_in_child if in_child else load_micro_batch, (data.min_duration_s, data.max_duration_s)
    batches = [(name, with_storage_timeout(data.storage_timeout_s, load, rows, *limits)) for name, rows in tables]
    return {
        (name, sample_id): encoded_clip(waves, most_s)
        for name, batch in batches
        for sample_id, waves in zip(batch.ids, batch.clips(), strict=True)
        if waves
    }
