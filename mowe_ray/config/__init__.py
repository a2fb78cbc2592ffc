"""A run's configuration: schema, presets, layering, help. Needs pydantic and yaml, no torch."""

from mowe_ray.config.evaluation import EvaluationConfig
from mowe_ray.config.fields import ConfigError
from mowe_ray.config.keys import render_help
from mowe_ray.config.load import load_config, load_evaluation, preset_names
from mowe_ray.config.schema import RunConfig

__all__ = [
    "ConfigError",
    "EvaluationConfig",
    "RunConfig",
    "load_config",
    "load_evaluation",
    "preset_names",
    "render_help",
]
