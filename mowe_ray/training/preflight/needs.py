"""How much a run will write, from the sizes of its model."""

from __future__ import annotations

from dataclasses import dataclass

from mowe_ray.config import RunConfig
from mowe_ray.training.assemble import model_dtype
from mowe_ray.training.estimate import estimate

# fp32 weight and AdamW's two moments.
_CHECKPOINT_BYTES = 12


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs.

    Attributes:
        storage: Of its run folder: the checkpoints it keeps, the one being written, and the export.
        scratch: Of the folder for temporary files: the export before it is copied, and a checkpoint on its way.
        gradients: That a step reduces over all workers.
        unknown: Parts of the model that the numbers leave out.
    """

    storage: int
    scratch: int
    gradients: int
    unknown: tuple[str, ...]


def needs_of(config: RunConfig) -> Needs:
    """Estimate what a run needs, without its weights.

    Raises:
        ValueError: A checkpoint cannot be used.
    """
    costs = estimate(config.model)
    total = costs.total
    assert total.weights is not None
    assert total.trainable is not None
    item = model_dtype(config.model, config.compute.gpus_per_worker > 0).itemsize
    export, checkpoint = int(total.weights.total) * item, _CHECKPOINT_BYTES * total.trainable
    return Needs(
        storage=(config.training.keep_checkpoints + 1) * checkpoint + export,
        # On object storage, checkpoints are written here first.
        scratch=export + (checkpoint if "://" in config.storage else 0),
        gradients=total.trainable * item,
        unknown=tuple(costs.unknown),
    )
