"""A log of the samples each step trained on, and an exactly-once audit of it that is independent of the epoch plan."""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mowe_ray.data.index import Index, source_key
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.protocols import Ranks

if TYPE_CHECKING:  # drivers only check the log, and need no torch for it
    from mowe_ray.training.collate import Batch

SAMPLES_FILE = "samples.jsonl"
_BUFFER_CHARACTERS = 1 << 20
_NAMED = 8  # samples that a finding names before it says how many more


class SampleAuditLog:
    """Gathers the samples of every step from all ranks; rank 0 appends them to `samples.jsonl`.

    A line is `{"step": ..., "epoch": ..., "samples": [[source, id], ...]}`, unusable samples included. A resumed run
    drops the lines after the step it resumes from; where the data have changed until then, it adds one with `new`
    instead of `samples`, those that the run begins to train in this epoch.
    """

    def __init__(self, ranks: Ranks, folder: RunFolder, *, resume_step: int):
        """Go on after `resume_step` finished steps."""
        self._ranks, self._folder = ranks, folder
        self._lines: list[str] = []
        self._writing = threading.Lock()
        if ranks.is_rank_zero:
            folder.keep_lines_up_to(SAMPLES_FILE, resume_step, ranks.log)

    def add(self, step: int, epoch: int, batches: list[Batch]) -> None:
        """Take in this rank's micro-batches of a step. Collective."""
        mine = [[source, id_] for batch in batches for source, id_ in zip(batch.sources, batch.ids, strict=True)]
        mine += [[bad.source, bad.id] for batch in batches for bad in batch.bad]
        samples = [sample for rank in self._ranks.gather(mine) for sample in rank]
        if self._ranks.is_rank_zero:
            self._lines.append(json.dumps({"step": step, "epoch": epoch, "samples": samples}) + "\n")
            if sum(map(len, self._lines)) > _BUFFER_CHARACTERS:
                self.flush()

    def data_changed(self, step: int, epoch: int, index: Index, new: Sequence[int] | np.ndarray) -> None:
        """Note that the data have changed before `step + 1`; `new` are the rows that were added."""
        rows = index.take(new).select(["source", "id"]).to_pylist()
        line = {"step": step, "epoch": epoch, "samples": [], "new": [[row["source"], row["id"]] for row in rows]}
        self._lines.append(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Write what is buffered, from any thread; before a checkpoint, so that no restored run misses a line.

        Raises:
            OSError: It could not be written, and stays in the buffer.
        """
        with self._writing:
            # A copy: the training thread may append while the checkpoint's thread writes.
            if lines := self._lines[:]:
                self._folder.append_text(SAMPLES_FILE, "".join(lines))
                del self._lines[: len(lines)]


@dataclass(frozen=True)
class SampleAuditResult:
    """Outcome of an audit.

    Attributes:
        epochs: Finished epochs that were checked; an unfinished one is checked for repeats only.
        lost: Times that samples were missing in finished epochs.
        repeated: Times that samples came more often than their weight allows.
        findings: What was lost or repeated, in words.
    """

    epochs: int
    lost: int
    repeated: int
    findings: list[str]

    def __str__(self) -> str:
        """Return a line for people, and one for each finding."""
        epochs = f"{self.epochs} epoch{'' if self.epochs == 1 else 's'}"
        return "\n  ".join([f"samples: {epochs}, {self.lost} lost, {self.repeated} repeated", *self.findings])


def audit_samples(index: Index, weights: Sequence[float], lines: Iterable[str], epochs: int) -> SampleAuditResult:
    """Count how often each sample of `index` was trained on in each epoch, against its weight.

    A weight of 2.3 asks for every sample twice, and for 3 of 10 once more. Samples that the index no longer has
    are passed over, and so are those that it did not have yet, and extra turns until the data were as they are.

    Args:
        weights: By source number.
        lines: Of `samples.jsonl`.
        epochs: How many are finished.
    """
    # By the part of a source's name that stays, for a corpus may have moved.
    counts: dict[int, Counter[tuple[str, str]]] = defaultdict(Counter)
    since: dict[tuple[str, str], int] = {}
    changed = -1
    for line in lines:
        record = json.loads(line)
        counts[record["epoch"]].update((source_key(source), id_) for source, id_ in record["samples"])
        if "new" in record:
            changed = record["epoch"]
            since |= {(source_key(source), id_): changed for source, id_ in record["new"]}
    samples: dict[str, list[str]] = {name: [] for name in index.source_names}
    for source, id_ in zip(index.table["source"].to_pylist(), index.table["id"].to_pylist(), strict=True):
        samples[source].append(id_)
    lost = repeated = 0
    findings: list[str] = []
    for epoch in sorted({*counts, *range(epochs)}):
        for (source, ids), weight in zip(samples.items(), weights, strict=True):
            key = source_key(source)
            times = {id_: counts[epoch][key, id_] for id_ in ids if since.get((key, id_), 0) <= epoch}
            missing, surplus, details = _compare(times, weight, finished=epoch < epochs, turns=epoch > changed)
            lost, repeated = lost + missing, repeated + surplus
            findings += [f"epoch {epoch}, {source}: {finding}" for finding in details]
    return SampleAuditResult(epochs, lost, repeated, findings)


def _compare(times: dict[str, int], weight: float, *, finished: bool, turns: bool) -> tuple[int, int, list[str]]:
    """Return how much is missing and how much too much in one epoch of one source, and what it is.

    Args:
        turns: Whether to count the extra turns, as long as the source has the samples it had then.
    """
    passes, extra_turns = int(weight), round(weight % 1 * len(times)) if turns else 0
    most = passes + (extra_turns > 0 if turns else weight % 1 > 0)
    missing = {id_: passes - n for id_, n in times.items() if finished and n < passes}
    surplus = {id_: n - most for id_, n in times.items() if n > most}
    extra = sum(n > passes for n in times.values()) if extra_turns else 0
    too_few, too_many = max(0, extra_turns - extra) if finished else 0, max(0, extra - extra_turns)
    findings = [f"lost {_named(missing)}"] if missing else []
    findings += [f"{too_few} of {extra_turns} extra turns lost"] if too_few else []
    findings += [f"repeated {_named(surplus)}"] if surplus else []
    findings += [f"{too_many} extra turns more than {extra_turns}"] if too_many else []
    return sum(missing.values()) + too_few, sum(surplus.values()) + too_many, findings


def _named(ids: dict[str, int]) -> str:
    some = ", ".join(list(ids)[:_NAMED])
    return some if len(ids) <= _NAMED else f"{some} and {len(ids) - _NAMED} more"
