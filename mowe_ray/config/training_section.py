"""The `training` section: length, learning rates, routing loss, and when to save and validate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mowe_ray.config.fields import Section, refuse
from mowe_ray.config.plugins import NameIn

LOSSES = ("entropy_diversity", "load_balance", "importance_cv2", "none")


class MoweLossSection(Section):
    """Routing loss (L_MoWE)."""

    kind: Annotated[str, NameIn("training.mowe_loss.kind", LOSSES)] = "entropy_diversity"
    """Formula of the routing loss, computed over the global batch."""
    weight: NonNegativeFloat = 0.1
    """Factor of the routing loss in the total loss."""
    confidence: NonNegativeFloat = 1.0
    """Factor of entropy_diversity's mean entropy per clip: be sure for each clip."""
    diversity: NonNegativeFloat = 1.0
    """Factor of its negative entropy of the mean over clips: use the whole pool."""
    commitment: NonNegativeFloat = 1.0
    """Factor of its entropy of the data-independent router: commit to one choice for all clips."""
    z_weight: NonNegativeFloat = 0.0
    """Factor of the router z-loss, which keeps router logits small."""


class LearningRatesSection(Section):
    """Learning rates of single parts; null means training.learning_rate."""

    base_encoder: NonNegativeFloat | None = None
    """Peak learning rate of the base encoder."""
    weak_encoders: NonNegativeFloat | None = None
    """Peak learning rate of the weak encoders."""
    routers: NonNegativeFloat | None = None
    """Peak learning rate of both routers."""
    scalars: NonNegativeFloat | None = None
    """That of the data-independent router's logits, weights of layers and gates; null: that of routers and adapter."""
    adapter: NonNegativeFloat | None = None
    """Peak learning rate of the adapter and of the projections of the pool."""
    language_model: NonNegativeFloat | None = None
    """Peak learning rate of the language model or its low-rank updates."""


class TrainingSection(Section):
    """Optimization, validation and checkpoints."""

    max_steps: PositiveInt | None = None
    """Length of training in optimizer steps; give this or epochs."""
    epochs: PositiveInt | None = None
    """Length of training in passes over the weighted mixture; give this or max_steps."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    lr_per_part: LearningRatesSection = LearningRatesSection()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps in which the learning rate rises linearly from 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of AdamW; biases and norms are exempt."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches per worker that make one optimizer step."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the global gradient; 0 turns clipping off."""
    max_skipped_steps: PositiveInt = 10
    """Steps in a row with a loss or gradient that is not finite, all skipped, after which the run stops."""
    mowe_loss: MoweLossSection = MoweLossSection()
    pool_dropout: bool = False
    """Train each clip with a random subset of the pool, from none to all of it: the model then serves any pool size."""
    eval_every: NonNegativeInt = 500
    """Optimizer steps between validations; 0 validates only at the end."""
    async_validation: bool = False
    """Validate on free resources while training goes on, where there are any; else the workers stop for it."""
    save_every: NonNegativeInt = 500
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    log_every: PositiveInt = 10
    """Optimizer steps between lines of progress and metrics."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    step_timeout_s: PositiveFloat = 600.0
    """Time limit of a step or a validation's micro-batch, in seconds; then the run saves if possible, and restarts."""
    log_samples: bool = False
    """Write the ids of the samples of every step to samples.jsonl, and check them at the end."""

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainingSection:
        both = self.max_steps is not None and self.epochs is not None
        neither = self.max_steps is None and self.epochs is None
        refuse(
            "training.max_steps: give max_steps or epochs, not both" if both else None,
            "training.max_steps: give max_steps or epochs" if neither else None,
        )
        return self

    def warnings(self) -> list[str]:
        """Return warnings about valid but probably unintended values, one `key: what` line each."""
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            return [
                f"training.warmup_steps: warm-up ({self.warmup_steps} steps) takes all of the "
                f"{self.max_steps} steps of training"
            ]
        return []
