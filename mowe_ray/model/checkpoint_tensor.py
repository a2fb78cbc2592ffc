"""Read one tensor out of a transformers checkpoint without building its model."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)


def read_tensor(source: str, name: str) -> Tensor:
    """The tensor called `name` in a folder's or hub id's weights, in float32.

    Looks where `from_pretrained` looks: safetensors before pickled weights, single files before sharded ones.
    Pickles are read with `weights_only`, which runs no code.

    Raises:
        KeyError: no weights file holds such a tensor.
    """
    for file_name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        index_name = SAFE_WEIGHTS_INDEX_NAME if file_name == SAFE_WEIGHTS_NAME else WEIGHTS_INDEX_NAME
        path = _find(source, file_name)
        index = None if path else _find(source, index_name)
        if index:
            shard = json.loads(index.read_text())["weight_map"].get(name)
            path = _find(source, shard) if shard else None
        if path and path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                return torch.as_tensor(tensors.get_tensor(name)).float()
        if path:
            return torch.as_tensor(torch.load(path, map_location="cpu", weights_only=True)[name]).float()
    raise KeyError(f"no weights file of {source!r} holds {name!r}")


def _find(source: str, file_name: str) -> Path | None:
    found = cached_file(source, file_name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
