"""Every key of an evaluation: `EvaluationConfig` and its sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr, model_validator

from mowe_ray.config.data_section import EvaluatedData
from mowe_ray.config.fields import Section, refuse
from mowe_ray.config.plugins import PluginNames, Plugins, import_plugins
from mowe_ray.config.schema import WorkersSection


class EvaluationData(EvaluatedData):
    """Validation sources, limits of clips, and micro-batches."""

    max_duration_s: PositiveFloat = 3600.0
    """Longer clips are skipped and counted, in seconds."""


class GenerationSection(Section):
    """Generation of answers."""

    max_new_tokens: PositiveInt = 200
    """Longest answer, in tokens."""
    num_beams: PositiveInt = 1
    """Beams of the search; 1 is greedy."""
    max_audio_s: PositiveFloat = 30.0
    """Longer clips of chunked tasks are answered in pieces of this length and joined, others are cut, in seconds."""
    chunked_tasks: list[str] = ["asr"]
    """Tasks whose long clips are answered in pieces."""
    instruction: Literal["sample", "task"] = "sample"
    """Use the instruction of each sample, or draw one of the task's usual phrasings, by the seed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the model, by default the run's model.dtype; auto is bfloat16 on a GPU and float32 on a CPU."""


class ServerSection(Section):
    """Requests to models that are served elsewhere, behind an OpenAI-compatible endpoint."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never part of a configuration."""
    concurrency: PositiveInt = 8
    """Largest number of concurrent requests; of each worker."""
    timeout_s: PositiveFloat = 60.0
    """Time limit of a reply, in seconds."""
    max_retries: NonNegativeInt = 5
    """Retries of a failed request, with growing pauses."""


class JudgeSection(ServerSection):
    """A language model that scores answers, behind any OpenAI-compatible endpoint."""

    base_url: str | None = None
    """Address of the endpoint, such as http://localhost:8000/v1; null uses no judge."""
    model: str | None = None
    """Name of the model there."""

    @model_validator(mode="after")
    def _is_complete(self) -> JudgeSection:
        refuse("judge.model: is needed with judge.base_url" if self.base_url and not self.model else None)
        return self


class EvaluationConfig(Section):
    """Configuration of an evaluation."""

    plugins: PluginNames = []
    """Python files and packages of yours that the models need, or that add metrics."""
    seed: NonNegativeInt = 0
    """Seed of drawn instructions and of the bootstrap."""
    out: str | None = None
    """Folder or URL for all results; null writes each model's into MODEL/evaluation, the report into the first's."""
    baseline: str | None = None
    """Name of the model that the others are compared with; null takes the one without a pool, else the first."""
    ablation_samples: NonNegativeInt = 300
    """Samples of each dataset that are answered again without each pool member in turn; 0 skips the ablation."""
    sentence_model: str | None = None
    """Folder of a sentence encoder for the metric sentence_similarity of captions; null leaves it out."""
    timeout_s: PositiveFloat = 1800.0
    """Longest wait for the next answers, loading the model included, in seconds; then the evaluation ends."""
    data: EvaluationData = EvaluationData()
    generation: GenerationSection = GenerationSection()
    server: ServerSection = ServerSection()
    judge: JudgeSection = JudgeSection()
    compute: WorkersSection = WorkersSection()
    _plugins: Plugins = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Keep the source of the plugins, as a run does."""
        self._plugins = import_plugins(self.plugins)
