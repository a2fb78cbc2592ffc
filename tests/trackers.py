"""What trackers have of a run, read as their own programs do."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2


def tensorboard_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard itself reads them."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_history(run: Path) -> list[dict[str, Any]]:
    """The rows of the only wandb folder of a run, from its log of transactions."""
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    rows = []
    for data in _records(file.read_bytes()):
        found = wandb_internal_pb2.Record.FromString(data)
        if found.HasField("history"):
            items = found.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _records(log: bytes) -> Iterator[bytes]:
    """The records of a log in the format of LevelDB, after wandb's own seven bytes."""
    block, header, place, record = 32768, 7, 7, b""
    while place + header <= len(log):
        if block - place % block < header:  # a trailer
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        record += log[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
