"""Pretrained language models straight into shards: under ZeRO-3 no process ever holds a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config


def sharded_loading(config: dict[str, Any]) -> AbstractContextManager[None] | None:
    """Return a context in which transformers' `from_pretrained` makes shards of all ranks; None below ZeRO-3.

    Rank 0 alone reads the checkpoint, and hands out one tensor after the other: every rank must load the same. Nothing
    else belongs inside: random weights would be drawn by rank 0 alone, and unused weights are not reported.

    Args:
        config: DeepSpeed's configuration, which the engine gets too.
    """
    return _sharded(config) if config["zero_optimization"]["stage"] == 3 else None


@contextmanager
def _sharded(config: dict[str, Any]) -> Iterator[None]:
    kept_alive = HfDeepSpeedConfig(config)  # transformers has only a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept_alive
