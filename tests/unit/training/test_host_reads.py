"""How often a micro-batch makes the host wait for the device: every read of a tensor's value does."""

import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mowe_ray.model.building import WeakEncoder, parameter_parts
from mowe_ray.training.collate import collate
from mowe_ray.training.loop import training_steps
from mowe_ray.training.optimizer import parameter_groups
from tests.plain_engine import PlainEngine
from tests.tiny_models import (
    tiny_ast_config,
    tiny_data2vec_audio_config,
    tiny_hubert_config,
    tiny_wavlm_config,
    tiny_whisper_config,
)

# Operators whose result the host has to know before it can go on, on an accelerator.
WAITING = {
    *("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"),
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class HostReads(TorchDispatchMode):
    """Counts, by line of code, operators that would make the host wait; on the CPU nothing waits, but all are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        waits = name in WAITING
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            # Where a mask selects, the host has to know how many; one value for all is filled in without.
            waits = name == "aten::index" or args[2].numel() != 1
        if name == "aten::_to_copy" and kwargs.get("device") is not None:
            waits = torch.device(kwargs["device"]).type == "cpu"
        if waits:
            ours = [frame for frame in traceback.extract_stack() if "mowe_ray" in frame.filename]
            self.sites[f"{name} {ours[-1].filename}:{ours[-1].lineno}" if ours else name] += 1
        return func(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_micro_batch_makes_the_host_wait_three_times(
    micro_batches: int, make_model, make_micro_batch, processor
) -> None:
    """For the choices of encoders, for where audio tokens and answers are, and in transformers, for packed rows."""
    weak = [
        WeakEncoder("whisper", tiny_whisper_config(d_model=16), train="full"),
        WeakEncoder("hubert", tiny_hubert_config(), train="full", features="weighted_sum"),
        WeakEncoder("frozen", tiny_hubert_config(), train="frozen"),
        WeakEncoder("data2vec", tiny_data2vec_audio_config(), train="full"),
        WeakEncoder("ast", tiny_ast_config(), train="full"),
        WeakEncoder("wavlm", tiny_wavlm_config(), train="full"),
    ]
    model = make_model(weak_encoders=weak)
    engine = PlainEngine(model, parameter_groups(model, parameter_parts(model), 1e-3, {}, 0.01), clip_norm=1.0)
    batches = [collate(make_micro_batch([0.5, 0, 0.3, 0.8]), processor) for _ in range(micro_batches)]
    counted = HostReads()
    forward = engine.forward

    def forward_counted(**inputs: Any) -> Any:
        with counted:
            return forward(**inputs)

    engine.forward = forward_counted  # type: ignore[method-assign]
    for _ in training_steps(engine, [(1, 1.0, batches)], seed=0):
        pass
    assert sum(counted.sites.values()) <= 3 * micro_batches, counted.sites
