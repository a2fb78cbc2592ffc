"""Writes checkpoints in the background: each rank its own file, then rank 0 the commit."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save_file

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.layout import (
    FORMAT,
    commit_file,
    committed_steps,
    data_file,
    load_json,
    remove_step,
    report_file,
    saved_steps,
    slices_file,
    step_folder,
    store,
    store_json,
)
from mowe_ray.training.checkpoint.reader import TensorSlice
from mowe_ray.training.checkpoint.slice_table import SliceTable
from mowe_ray.training.protocols import Ranks

_POLL_S = 0.1


@dataclass(frozen=True)
class _Save:
    # `token` is the same on all ranks and unique to this save: a process that was taken for dead may still write, and
    # its files must not be mixed with these.
    step: int
    token: str


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread, without collectives.

    The ranks communicate through files alone: each writes its slices and then a report of success or failure; rank 0
    waits for the reports and commits, or logs why it cannot. A failure does not interrupt training.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        *,
        keep: int,
        timeout_s: float = 600.0,
    ):
        """Agree with the other ranks on an id of this writer. Collective; no other method is.

        Args:
            keep: Newest checkpoints that rank 0 keeps.
            timeout_s: How long rank 0 waits for the files of the other ranks, in seconds.
        """
        self._folder, self._ranks, self._keep, self._timeout_s = folder, ranks, keep, timeout_s
        # Marks the files of this group of ranks: what an earlier, killed group left under the same names is never
        # committed.
        self._id: str = ranks.gather(uuid.uuid4().hex)[0]
        self._lock = threading.Lock()
        self._thread = threading.Thread()
        self._save: _Save | None = None
        self._attempt = 0
        self._error: str | None = None

    def save(
        self,
        step: int,
        slices: Mapping[str, TensorSlice],
        state: Callable[[], Mapping[str, Any]],
        before: Callable[[], None] | None = None,
    ) -> None:
        """Start to write a checkpoint once the previous save has ended; all ranks call it for the same steps.

        A step that already has a checkpoint is left unchanged.

        Args:
            step: Optimizer steps finished.
            slices: Tensor slices of this rank, on the CPU; they must not be changed afterwards.
            state: Returns the JSON state to resume from; called on rank 0, in the thread.
            before: Called first, in the thread: what it writes exists whenever the checkpoint does.
        """
        with self._lock:
            if self._save is not None:
                self._thread.join()
            repeated = self._save is not None and self._save.step == step
            self._attempt = self._attempt + 1 if repeated else 0
            self._error = None
            self._save = _Save(step, f"{self._id}-{step}-{self._attempt}")
            self._thread = threading.Thread(target=self._write, args=(self._save, slices, state, before), daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float, *, insist: bool = False) -> bool:
        """Wait until the latest save is committed; returns whether it is.

        Args:
            timeout_s: Longest wait in seconds; a save that has failed returns at once.
            insist: Raise instead of returning False.

        Raises:
            ValueError: It is not committed, and `insist` is true.
        """
        save, deadline = self._save, time.monotonic() + timeout_s
        if save is None:
            return True
        # The own part first; the commit, which only rank 0 writes, is then looked for on storage.
        self._thread.join(timeout_s)
        while (
            not (committed := self._is_committed(save.step))
            and self._failure(save) is None
            and time.monotonic() < deadline
        ):
            time.sleep(_POLL_S)
        if insist and not committed:
            raise ValueError(
                f"the checkpoint of step {save.step} could not be written to {self._folder.url}: "
                f"{self._failure(save) or f'it is not finished after {timeout_s:g} s'}; "
                "make room there, or choose another storage"
            )
        return committed

    def _write(
        self,
        save: _Save,
        slices: Mapping[str, TensorSlice],
        state: Callable[[], Mapping[str, Any]],
        before: Callable[[], None] | None,
    ) -> None:
        try:
            if self._is_committed(save.step):
                return
            if before is not None:
                before()
            self._write_part(save, slices)
            if self._ranks.is_rank_zero:
                self._commit(save, state)
            elif "error" in (report := self._report(save, 0) or {}):
                raise OSError(report["error"])  # rank 0 has given up: this file is of no use
        except Exception as error:  # noqa: BLE001 - each storage raises its own; logged by `_give_up`, raised by `wait`
            self._give_up(save, error)
        else:
            if self._ranks.is_rank_zero:
                self._prune(save.step)

    def _write_part(self, save: _Save, slices: Mapping[str, TensorSlice]) -> None:
        tensors = {name: s.data for name, s in slices.items()}
        data = data_file(save.step, self._ranks.rank, self._ranks.world_size)
        # Data before its report: a report is a promise that the file is complete.
        written = store(self._folder, data, lambda local: save_file(tensors, local))
        bounds = {name: [f.start, f.start + f.data.numel(), *f.shape] for name, f in slices.items()}
        # `stretches` is the format's key for slices: checkpoints of earlier versions stay readable.
        report = {"token": save.token, **written, "stretches": bounds}
        store_json(self._folder, report_file(save.step, self._ranks.rank, self._ranks.world_size), report)

    def _commit(self, save: _Save, make_state: Callable[[], Mapping[str, Any]]) -> None:
        state = make_state()
        deadline = time.monotonic() + self._timeout_s
        reports = [self._await_report(save, rank, deadline) for rank in range(self._ranks.world_size)]
        files = []
        for rank, report in enumerate(reports):
            name = data_file(save.step, rank, self._ranks.world_size).rsplit("/", 1)[-1]
            files.append({"name": name, "bytes": report["bytes"], "crc32": report["crc32"]})
        commit = {
            "format": FORMAT,
            "step": save.step,
            "world_size": self._ranks.world_size,
            "token": save.token,
            "files": files,
            "slices": store(self._folder, slices_file(save.step), SliceTable.from_reports(reports).write),
            "state": dict(state),
        }
        store_json(self._folder, commit_file(save.step), commit)

    def _await_report(self, save: _Save, rank: int, deadline: float) -> dict[str, Any]:
        while (report := self._report(save, rank)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} has not written its part within {self._timeout_s:g} s")
            time.sleep(_POLL_S)
        if "error" in report:
            raise OSError(f"rank {rank}: {report['error']}")
        return report

    def _report(self, save: _Save, rank: int) -> dict[str, Any] | None:
        """Return the report of `rank` about this save, None if there is none yet."""
        report = self._load(report_file(save.step, rank, self._ranks.world_size))
        return report if report is not None and report["token"] == save.token else None

    def _give_up(self, save: _Save, error: Exception) -> None:
        """Remove what was written, report the failure to the other ranks, and log it on rank 0."""
        self._error = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        own = report_file(save.step, self._ranks.rank, self._ranks.world_size)
        data = data_file(save.step, self._ranks.rank, self._ranks.world_size)
        try:
            for file in (*([commit_file(save.step)] if self._ranks.is_rank_zero else []), data, f"{data}.part"):
                self._folder.remove(file)
            store_json(self._folder, own, {"token": save.token, "error": self._error})
            if (
                self._ranks.is_rank_zero
            ):  # a rank that is still writing reads the report when it is done, and cleans up itself
                for name in self._folder.names(step_folder(save.step)):
                    file = f"{step_folder(save.step)}/{name}"
                    if file != own and not name.endswith(".part"):
                        self._folder.remove(file)
        except Exception as second:  # noqa: BLE001 - the storage is broken; without a report, rank 0 times out
            self._error += f" (and then: {second})"
        if self._ranks.is_rank_zero:
            self._ranks.log(f"warning: checkpoint at step {save.step} failed: {self._error}; {self._newest()}")

    def _newest(self) -> str:
        try:
            steps = committed_steps(self._folder)
        except Exception as error:  # noqa: BLE001 - as above
            return f"which others there are cannot be seen: {error}"
        return f"the newest is step {steps[-1]}" if steps else "there is none yet"

    def _failure(self, save: _Save) -> str | None:
        if self._error is not None:
            return self._error
        report = self._report(save, 0)
        return None if report is None else report.get("error")

    def _is_committed(self, step: int) -> bool:
        return self._load(commit_file(step)) is not None

    def _load(self, file: str) -> dict[str, Any] | None:
        try:
            return load_json(self._folder, file)
        except Exception:  # noqa: BLE001 - every storage has errors of its own, and this thread must answer its rank:
            return None  # what cannot be read now is not there yet; who waits asks again, until its timeout

    def _prune(self, step: int) -> None:
        """Remove what the checkpoint of `step` makes superfluous: old checkpoints, and older attempts that failed."""
        try:
            # The present step in any case, even if later ones are there.
            keep = {*committed_steps(self._folder)[-self._keep :], step}
            for old in saved_steps(self._folder):
                if old < step and old not in keep:
                    remove_step(self._folder, old)
        except Exception as error:  # noqa: BLE001 - the new checkpoint is complete nevertheless
            self._ranks.log(f"warning: old checkpoints in {self._folder.url} could not be removed: {error}")
