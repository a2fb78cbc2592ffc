"""Shards of any content, and what an index and a micro-batch make of them."""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mowe_ray.data.index import SourceSpec, build_index
from mowe_ray.data.micro_batch import load_micro_batch
from mowe_ray.data.sample import BadSample
from tests.tiny_corpora import tone

QUESTION = {"instruction": "What is heard?", "answer": "a tone", "task": "aqa"}
CLIP = tone(seconds=1.0)


def note(**fields: Any) -> bytes:
    """JSON of a sample that asks `QUESTION`."""
    return json.dumps(QUESTION | fields).encode()


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Read:
    """Usable samples as (id, seconds, answer), and the others."""

    good: list[tuple[str, float, str]]
    bad: list[BadSample]

    @property
    def answers(self) -> list[str]:
        return [answer for _, _, answer in self.good]

    @property
    def causes(self) -> list[str]:
        return [sample.cause for sample in self.bad]


def read_source(path: Path | str, cache: Path, task: str | None = None) -> Read:
    """Scan, read and decode all of a source."""
    index = build_index([SourceSpec("s", str(path), task)], cache, min_s=0.1, max_s=30.0)
    batch = load_micro_batch(index.table, 0.1, 30.0)
    good = zip(batch.ids, [n / 16_000 for n in batch.lengths], batch.answers, strict=True)
    return Read(list(good), [*index.bad, *batch.bad])
