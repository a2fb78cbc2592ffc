"""Base class and field types of the configuration's sections, and the error of an invalid configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

from mowe_ray.config.plugins import registered

Probability = Annotated[float, Field(ge=0, le=1)]
TrainMode = Literal["frozen", "full", "lora"]


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"must be letters, digits, _ and -, starting with a letter or digit, got {name!r}")
    return name


def _expand_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - Path takes the slashes out of a URL


Name = Annotated[str, AfterValidator(_plain_name)]
# A path or URL, with `~` for the home folder: a shell expands it at the start of a word only.
Location = Annotated[str, AfterValidator(_expand_home)]


class Section(BaseModel):
    """A group of keys: immutable, refuses unknown keys, documents fields by their docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class InlineConfig(Section):
    """A network given by its transformers configuration, to be initialised at random."""

    config: dict[str, Any]
    """Keys of the transformers configuration, among them `model_type`."""

    @model_validator(mode="after")
    def _names_its_family(self) -> InlineConfig:
        if "model_type" not in self.config:
            raise ValueError("config needs a model_type, such as whisper or llama")
        check = getattr(self._family, "check_config", None)
        if check is not None:  # a family whose keys are not transformers' own
            check(self.config)
        return self

    @property
    def _family(self) -> Any:
        return registered("model.weak_encoders.N.checkpoint.config.model_type").get(self.config["model_type"])

    @property
    def is_random(self) -> bool:
        """Whether nothing has trained the weights; an encoder of a plugin may load those of a library."""
        return self._family is None or not self._family.brings_weights()


def _text_or_mapping(value: object) -> str:
    return "<inline>" if isinstance(value, dict | InlineConfig) else "<text>"


def text_or_list(value: object) -> str:
    """Return the tag of a text or a list of texts."""
    return "<list>" if isinstance(value, list | tuple) else "<text>"


def _number_or_list(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<number>"


# Tags are in angle brackets so that error messages can leave them out of the dotted key.
CheckpointSource = Annotated[
    Annotated[Location, Tag("<text>")] | Annotated[InlineConfig, Tag("<inline>")],
    Discriminator(_text_or_mapping),
]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


_Text = Annotated[str, AfterValidator(_not_blank)]
Texts = Annotated[
    Annotated[_Text, Tag("<text>")] | Annotated[list[_Text], Tag("<list>"), Field(min_length=1)],
    Discriminator(text_or_list),
]
WorkerCount = Annotated[
    Annotated[PositiveInt, Tag("<number>")] | Annotated[tuple[PositiveInt, PositiveInt], Tag("<list>")],
    Discriminator(_number_or_list),
]


class ConfigError(ValueError):
    """Raised for an invalid configuration; `problems` has one `key: what is wrong` line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems, "a ConfigError names at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def refuse(*problems: str | None) -> None:
    """Raise ValueError with a line for each problem that is not None."""
    lines = [problem for problem in problems if problem]
    if lines:
        raise ValueError("\n".join(lines))


def repeated_names(names: list[str]) -> list[str]:
    """Names that occur more than once, sorted."""
    return sorted({name for name in names if names.count(name) > 1})
