"""TensorBoard: files of events in the run folder."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mowe_ray.data.decode import SAMPLE_RATE
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.output.run_folder import RunFolder, sync
from mowe_ray.training.trackers.base import COLUMNS, Record, Records, Waves, numbers_of, row_of

_PART_BYTES = 1 << 20  # a file of events on an object store; while it grows it is copied as a whole


class TensorBoard:
    """Event files in `tensorboard/` of the run folder, complete after every record.

    A start begins a new file, and marks in it from which step on the earlier files no longer count (`purge_step`), so
    that TensorBoard shows each step once. On an object store, which cannot append, files are written here and copied,
    and a new one is begun before one becomes large.
    """

    def __init__(self, folder: RunFolder, resume_step: int, records: Records):
        """Continue after `resume_step`, or from the records if there are no events yet."""
        self._folder, self._records = folder, records
        local = folder.local_path("tensorboard")
        self._copies = local is None
        self._path = local or Path(tempfile.mkdtemp(prefix="mowe_ray_tensorboard_"))
        self._copied: dict[str, int] = {}
        self._logged_waves: set[tuple[str, str]] = set()  # source and id
        self._lock = threading.RLock()  # of the training thread and the one that copies
        earlier = any("tfevents" in name for name in folder.names("tensorboard"))
        self._missing_from = resume_step + 1 if earlier else 0
        self._failed, self._tried_s = False, int(time.time())
        self._writer: Any = None
        self._reopen()

    def _reopen(self) -> None:
        """Begin a new file if the last one failed, with all records from the first one on that is missing."""
        from torch.utils.tensorboard import SummaryWriter  # optional: slow to import

        first = self._missing_from
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = SummaryWriter(str(self._path), purge_step=first)
        for record in self._records():
            if record["step"] >= first:
                self._add(record)
        self._writer.flush()
        self._failed = False

    def _add(self, record: Record) -> None:
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def log(self, record: Record) -> None:
        with self._lock:
            if self._failed:
                self._try_again()  # the record is among those that it adds
                return
            try:
                self._add(record)
                self._writer.flush()
            except OSError:  # a full disk: a part of the record may be written
                self._failed, self._missing_from = True, record["step"]
                raise

    def _try_again(self) -> None:
        # TensorBoard reads files in the order of their names, which begin with the second.
        if int(time.time()) == self._tried_s:
            return
        self._tried_s = int(time.time())
        try:
            self._reopen()
        except OSError:
            for file in self._path.glob("*tfevents*"):
                if not file.stat().st_size:  # there is no room for a first event
                    file.unlink()
            raise

    def log_picture(self, name: str, step: int, png: bytes) -> None:
        from matplotlib.image import imread

        with self._lock:
            self._writer.add_image(name, imread(io.BytesIO(png)), step, dataformats="HWC")
            self._writer.flush()

    def log_samples(self, source: str, step: int, answers: Sequence[Answer], waves: Waves) -> None:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *map(row_of, answers)]
        table = "\n".join("|".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) for line in lines)
        with self._lock:
            self._writer.add_text(f"validation/{source}/samples", table, step)
            for name in [name for name in waves if (source, name) not in self._logged_waves]:  # clips never change
                self._logged_waves.add((source, name))
                self._writer.add_audio(f"validation/{source}/{name}", waves[name][None], step, SAMPLE_RATE)
            self._writer.flush()

    def flush(self) -> None:
        with self._lock:
            if self._failed:
                self._try_again()
            self._writer.flush()
            sizes = {file: file.stat().st_size for file in self._path.glob("*tfevents*")}
            grown = [file for file, size in sizes.items() if self._copied.get(file.name) != size]
            for file in grown:
                self._copied[file.name] = sizes[file]
                if self._copies:
                    self._folder.put(file, f"tensorboard/{file.name}")
                else:
                    sync(file)
            if self._copies and any(sizes[file] > _PART_BYTES for file in grown):
                self._writer.close()  # what comes next begins another file

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._copies:
            shutil.rmtree(self._path, ignore_errors=True)
