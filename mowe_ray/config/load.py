"""Layer a run's configuration: defaults < preset < file < `section.key=value`, then validate it.

Every problem of every layer is collected into one `ConfigError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mowe_ray.config.data_section import EvaluatedData
from mowe_ray.config.evaluation import EvaluationConfig
from mowe_ray.config.fields import ConfigError, Section
from mowe_ray.config.keys import find_key, is_known, members, nearest_key, set_key
from mowe_ray.config.schema import RunConfig, WorkersSection

Tree = dict[str, Any]


class _Yaml12Loader(yaml.SafeLoader):
    """Safe YAML loader with the scalar types of YAML 1.2, and its rule that a mapping has a key once.

    YAML 1.1, which PyYAML implements, reads `off` as False, 1e-4 as text and 12:30 as 750. Of two sections of one name
    PyYAML takes the last, so that the first would be lost without a word.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is given twice, before keys of merged mappings (`<<`) are added."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+", list("-+0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    folder = resources.files("mowe_ray.config") / "presets"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Build the configuration of a run.

    Args:
        source: name of a preset, path of a YAML or JSON file (which may start with
            `preset: NAME`), or None for the defaults alone.
        overrides: `section.key=value`, the value in YAML; list elements by position, as in
            `data.train.0.path=shards` (the position after the last appends).

    Raises:
        ConfigError: naming every bad key, what is wrong, and the nearest known key.
    """
    # Present in any case, so that what is missing is reported by its own key, not by its section.
    tree: Tree = {"model": {}, "training": {}}
    for layer in _layers(source):
        tree = _merged(tree, layer)
        _let_new_length_win(tree, layer.get("training"))
    return _validated(RunConfig, tree, overrides)


def load_evaluation(run: Mapping[str, Any] | None, overrides: Sequence[str] = ()) -> EvaluationConfig:
    """Build the configuration of an evaluation.

    Args:
        run: Configuration of the run that is evaluated, whose data, resources and number format are the defaults.
        overrides: As for `load_config`.

    Raises:
        ConfigError: As `load_config`.
    """
    tree: Tree = {"data": {}, "compute": {}}
    for section, names in _SHARED.items():
        given = (run or {}).get(section, {})
        tree[section] = {name: given[name] for name in names if name in given}
    if dtype := (run or {}).get("model", {}).get("dtype"):
        tree["generation"] = {"dtype": dtype}
    return _validated(EvaluationConfig, tree, overrides)


# What an evaluation takes from its run: not max_duration_s, since it answers long clips in pieces.
_SHARED = {
    "data": EvaluatedData.model_fields.keys() - {"max_duration_s"},
    "compute": WorkersSection.model_fields.keys(),
}
_Config = TypeVar("_Config", RunConfig, EvaluationConfig)


def _validated(root: type[_Config], tree: Tree, overrides: Sequence[str]) -> _Config:
    """Lay the overrides over `tree`, and check it."""
    problems = _apply_overrides(tree, overrides, root)
    try:
        config = root.model_validate(tree)
    except ValidationError as error:
        problems += [line for details in error.errors() for line in _explain(details, root)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _layers(source: str | Path | None) -> list[Tree]:
    """Read the files behind a source, lowest precedence first."""
    if source is None:
        return []
    if isinstance(source, str) and source in preset_names():
        layer = deepcopy(_preset(source))
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            presets = ", ".join(preset_names())
            raise ConfigError([f"config: {source} is neither a file nor a preset ({presets})"])
        layer = parse_yaml(path.read_text(encoding="utf-8"), str(source))
    preset = layer.pop("preset", None)
    if preset is None:
        return [layer]
    if preset not in preset_names():
        raise ConfigError([f"preset: unknown preset {preset!r}, use {', '.join(preset_names())}"])
    return [*_layers(preset), layer]


@cache  # a study loads its base for every point it considers, and parsing is nearly all of that
def _preset(name: str) -> Tree:
    file = resources.files("mowe_ray.config") / "presets" / f"{name}.yaml"
    return parse_yaml(file.read_text(encoding="utf-8"), name)


def parse_yaml(text: str, where: str) -> Tree:
    """Read a mapping from YAML 1.2 text; `where` names it in errors."""
    try:
        layer = yaml.load(text, _Yaml12Loader)
    except yaml.YAMLError as error:
        raise ConfigError([f"config: {where} is not valid YAML: {error}"]) from error
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        raise ConfigError([f"config: {where} must be a mapping of sections"])
    return layer


def _merged(low: Tree, high: Mapping[str, Any], prefix: str = "") -> Tree:
    """Lay one tree over another: sections are merged, values (lists, inline configs) replaced."""
    result = dict(low)
    for name, value in high.items():
        below = result.get(name)
        key = find_key(f"{prefix}{name}")
        if key and key.section and isinstance(below, dict) and isinstance(value, dict):
            value = _merged(below, value, f"{prefix}{name}.")
        result[name] = value
    return result


def _let_new_length_win(tree: Tree, given: object) -> None:
    """Drop a lower layer's max_steps (epochs) when a layer gives only epochs (max_steps)."""
    if not isinstance(given, dict) or not isinstance(tree["training"], dict):
        return
    lengths = {name for name in ("max_steps", "epochs") if given.get(name) is not None}
    if len(lengths) == 1:
        for rival in {"max_steps", "epochs"} - lengths:
            tree["training"].pop(rival, None)


def _apply_overrides(tree: Tree, overrides: Sequence[str], root: type[Section]) -> list[str]:
    """Write each `key=value` into the tree; return the problems found."""
    problems: list[str] = []
    training: Tree = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            problems.append(f"{override}: expected section.key=value")
        elif not is_known(dotted, root):
            problems.append(_unknown(dotted, root))
        else:
            try:
                value = _parse_value(dotted, text, root)
                set_key(tree, dotted.split("."), value)
            except ConfigError as error:
                problems += error.problems
            else:
                section, _, name = dotted.partition(".")
                training |= {name: value} if section == "training" else {}
    if training:
        _let_new_length_win(tree, training)
    return problems


def _parse_value(dotted: str, text: str, root: type[Section]) -> Any:
    try:
        value = yaml.load(text, _Yaml12Loader)
    except yaml.YAMLError as error:
        raise ConfigError([f"{dotted}: {text!r} is not valid YAML"]) from error
    key = find_key(dotted, root)
    if key and str in members(key.field.annotation) and isinstance(value, bool | int | float):
        return text  # a name such as 42 or 12e5 stays as it was typed
    return value


def _unknown(dotted: str, root: type[Section]) -> str:
    guess = nearest_key(dotted, root)
    return f"{dotted}: unknown key" + (f" (did you mean {guess}?)" if guess else "")


def _explain(details: ErrorDetails, root: type[Section]) -> list[str]:
    """Turn one pydantic error into `key: what is wrong` lines."""
    # Tags of unions are in angle brackets: they are not part of the user's key.
    dotted = ".".join(str(part) for part in details["loc"] if not str(part).startswith("<"))
    if details["type"] == "extra_forbidden":
        return [_unknown(dotted, root)]
    if details["type"] == "missing":
        return [f"{dotted}: is required, there is no default (start from a preset or a file)"]
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        # A check over several keys names them itself, one line each.
        return [
            line if is_known(line.partition(": ")[0], root) else f"{dotted}: {line}" for line in message.splitlines()
        ]
    if details["type"] in ("model_type", "model_attributes_type"):
        message = "must be a mapping of keys"
    message = message.replace("Input should be", "must be")
    return [f"{dotted}: {message}, got {details['input']!r}"]
