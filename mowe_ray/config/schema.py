"""Every key of a run: `RunConfig` and its sections.

The string under a field is its documentation: `--help` prints it. A check that involves several
keys raises `ValueError` whose lines each start with the dotted key to change.
"""

from __future__ import annotations

import netrc
import os
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr, model_validator

from mowe_ray.config.data_section import DataSection
from mowe_ray.config.fields import ConfigError, Location, Name, Section, WorkerCount, refuse
from mowe_ray.config.model_section import ModelSection
from mowe_ray.config.plugins import PluginNames, Plugins, import_plugins
from mowe_ray.config.training_section import TrainingSection


class WorkersSection(Section):
    """Workers and their resources."""

    num_workers: WorkerCount = 1
    """Processes that hold the model, one per GPU if GPUs are used; [least, most] shrinks and grows with the cluster."""
    cpus_per_worker: PositiveInt = 1
    """CPUs reserved for each of them."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of each of them: 0 runs on the CPU."""
    accelerator_type: str | None = None
    """Ray's name of the GPU type to run on, such as H100; null takes any."""

    @property
    def min_workers(self) -> int:
        """Smallest number of workers to start with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Largest number of workers; in training it sets the global batch, however many are alive."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class ComputeSection(WorkersSection):
    """Workers, their resources, ZeRO, and restarts."""

    resize_interval_s: PositiveFloat = 60.0
    """Interval between attempts to grow an elastic group, in seconds; a resize is a restart."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO: 0 shards nothing, 1 optimizer states, 2 also gradients, 3 also weights."""
    offload: Literal["none", "cpu"] = "none"
    """Device of the optimizer states; cpu saves GPU memory and costs time, needs zero_stage 1-3."""
    max_failures: NonNegativeInt = 3
    """Failures without a new checkpoint in between after which the run gives up instead of resuming."""

    @model_validator(mode="after")
    def _fits_together(self) -> ComputeSection:
        refuse(
            "compute.offload: cpu needs compute.zero_stage 1, 2 or 3"
            if self.offload == "cpu" and self.zero_stage == 0
            else None,
            f"compute.num_workers: the least ({self.min_workers}) is more than the most ({self.max_workers})"
            if self.min_workers > self.max_workers
            else None,
            "compute.max_failures: 0 does not go with an elastic compute.num_workers, whose group restarts to shrink"
            if self.elastic and self.max_failures == 0
            else None,
        )
        return self

    @property
    def elastic(self) -> bool:
        """Whether the group may shrink and grow."""
        return not isinstance(self.num_workers, int)

    @property
    def reserves_decoding(self) -> bool:
        """Whether workers reserve the CPUs of their decoding: on GPU nodes, GPUs run out before CPUs do."""
        return self.gpus_per_worker == 0


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["off", "offline", "online"] = "off"
    """Send nothing, write files to sync later, or send live."""
    project: str = "mowe_ray"
    """Project the run is listed under."""
    group: str | None = None
    """Group within the project; null sets none."""


class TrackingSection(Section):
    """Metrics besides metrics.jsonl, which is always written."""

    wandb: WandbSection = WandbSection()
    mlflow: Location | None = None
    """Also log to MLflow, an address or a folder as it takes them (http://..., file:///...); null does not."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder, while it trains."""

    def missing(self) -> list[str]:
        """Return what this process lacks to track a run, one `key: what` line each."""
        lacks = []
        if self.wandb.mode == "online" and not _has_wandb_key():
            lacks.append(
                "tracking.wandb.mode: online needs a key and there is none here: set WANDB_API_KEY "
                "(cluster/README.md, Secrets), or take tracking.wandb.mode=offline"
            )
        if self.mlflow is not None and find_spec("mlflow") is None:
            lacks.append("tracking.mlflow: needs a package that is not installed: pip install 'mowe-ray[mlflow]'")
        return lacks

    def require(self) -> None:
        """Raise ConfigError if this process lacks something to track a run."""
        if lacks := self.missing():
            raise ConfigError(lacks)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    try:  # where `wandb login` keeps it
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class RunConfig(Section):
    """Configuration of a training run."""

    # Before the sections that may name what plugins add.
    plugins: PluginNames = []
    """Python files and packages of yours that add encoders, adapters, ...: imported first, on every worker too."""
    name: Name = "run"
    """Name of the run; its results go to STORAGE/NAME."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, data order, dropout and noise."""
    storage: Location = "runs"
    """Folder or URL (s3, gs, ...) that holds run folders."""
    resume: bool = True
    """Continue a run folder of the same name; false refuses an existing one."""
    model: ModelSection
    data: DataSection = DataSection()
    training: TrainingSection
    compute: ComputeSection = ComputeSection()
    tracking: TrackingSection = TrackingSection()
    # Goes where the configuration goes, and is imported there.
    _plugins: Plugins = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Keep the source of the plugins."""
        self._plugins = import_plugins(self.plugins)

    @property
    def plugin_sources(self) -> Plugins:
        """The plugins with their source, for processes that read this configuration from a file."""
        return self._plugins

    def require_data(self) -> None:
        """Raise ConfigError unless there is something to train on (presets of papers ship none)."""
        if not self.data.train:
            raise ConfigError(["data.train: no training data; add data.train.0.path=FOLDER (or builtin:train)"])

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of an optimizer step, over all workers of the complete group."""
        return self.compute.max_workers * self.training.gradient_accumulation

    def to_yaml(self) -> str:
        """Return the whole configuration as a file that `load_config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def warnings(self) -> list[str]:
        """Return warnings about valid but probably unintended values, one `key: what` line each."""
        return [*self.model.warnings(), *self.training.warnings()]
