"""Read a sweep file and `key=value` overrides: keys of the sweep, or of the configuration of every trial."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mowe_ray.config import ConfigError, preset_names
from mowe_ray.config.fields import Section
from mowe_ray.config.keys import WIDTH, is_known, members, nearest_key, set_key
from mowe_ray.config.load import parse_yaml
from mowe_ray.shipped import shipped
from mowe_ray.sweeping.schema import Entry, LibraryEncoder, SweepConfig

# Their keys are names of the user's own, dots included.
_MAPPINGS = ("space", "set", "encoders")
# Keys of a run that the sweep decides for every trial.
_OURS = {"name": "name", "storage": "storage", "seed": "seeds"}


def load_sweep(file: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Build a study.

    Args:
        file: YAML file with the keys of `SweepConfig`, or the name of a study that is shipped, such as pool_size.
        overrides: `key=value`, the value in YAML. `search.kind=random` is a key of the sweep,
            `training.epochs=2` one of the configuration, which all trials then have.

    Raises:
        ConfigError: Names every bad key and the nearest known one.
    """
    path = _path(file)
    tree = parse_yaml(path.read_text(encoding="utf-8"), str(file))
    problems: list[str] = []
    for_trials: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"{override}: expected key=value")
            continue
        value = parse_yaml(f"value: {text}", key)["value"]
        if key.partition(".")[0] in SweepConfig.model_fields:
            set_key(tree, _parts(key), value)
        elif is_known(key):
            for_trials[key] = value
        else:
            problems.append(_unknown(key))
    base = _located(str(tree.get("base", "quickstart")), path.parent)
    tree["base"] = base
    if for_trials and isinstance(tree.setdefault("set_for", {}), dict):
        tree["set_for"][base] = {**(tree["set_for"].get(base) or {}), **for_trials}
    try:
        sweep = SweepConfig.model_validate(tree)
    except ValidationError as error:
        problems += [line for details in error.errors() for line in _explain(details)]
        raise ConfigError(list(dict.fromkeys(problems))) from error
    problems += _unknown_keys(sweep)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return sweep


def _located(base: str, folder: Path) -> str:
    """Return a preset's name, or the path of a file: as given, else beside the sweep file."""
    if base in preset_names() or Path(base).is_file() or not (folder / base).is_file():
        return base
    return str(folder / base)


def _path(file: str | Path) -> Path:
    """Return the path of a file, or of a study that is shipped under this name."""
    folder = shipped("sweeps")
    if Path(file).is_file():
        return Path(file)
    if folder is not None and (named := folder / f"{file}.yaml").is_file() and named.parent == folder:
        return named
    names = ", ".join(sorted(found.stem for found in folder.glob("*.yaml"))) if folder is not None else "none"
    raise ConfigError([f"sweep: {file} is neither a file nor a study that is shipped: {names}"])


def _parts(key: str) -> list[str]:
    head, _, rest = key.partition(".")
    return [head, rest] if head in _MAPPINGS and rest else key.split(".")


def _unknown_keys(sweep: SweepConfig) -> list[str]:
    """Check the dotted keys of the configuration that the sweep file names."""
    named = [(f"set.{key}", key) for key in sweep.set]
    named += [(f"set_for.{base}.{key}", key) for base, keys in sweep.set_for.items() for key in keys]
    for name, entry in sweep.space.items():
        settings = getattr(entry, "settings", None)
        if settings is None:
            named.append((f"space.{name}", name))
        else:
            named += [(f"space.{name}.{label}.{key}", key) for label, keys in settings.items() for key in keys]
    problems = [f"{where}: {_unknown(key)}" for where, key in named if not is_known(key)]
    return problems + [f"{where}: is decided by {_OURS[key]}" for where, key in named if key in _OURS]


def _unknown(key: str) -> str:
    head, dot, rest = key.partition(".")
    ours = next(iter(get_close_matches(head, SweepConfig.model_fields, 1, cutoff=0.75)), None)
    guess = f"{ours}{dot}{rest}" if ours else nearest_key(key)
    return f"{key}: unknown key" + (f" (did you mean {guess}?)" if guess else "")


def _explain(details: ErrorDetails) -> list[str]:
    location = [str(part) for part in details["loc"] if not str(part).startswith("<")]
    dotted = ".".join(location)
    if details["type"] == "extra_forbidden":
        guess = next(iter(get_close_matches(location[-1], _sibling_keys(location), 1)), None)
        return [f"{dotted}: unknown key" + (f" (did you mean {guess}?)" if guess else "")]
    if details["type"] == "missing":
        return [f"{dotted}: is required"]
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return [line if ": " in line and not dotted else f"{dotted}: {line}" for line in message.splitlines()]
    return [f"{dotted}: {message.replace('Input should be', 'must be')}, got {details['input']!r}"]


def _sibling_keys(location: list[str]) -> list[str]:
    """Return the known keys of the section a location is in."""
    section: type[Section] = SweepConfig
    for part in location[:-1]:
        field = section.model_fields.get(part)
        held = members(field.annotation) if field else []
        opened = [m for m in held if isinstance(m, type) and get_origin(m) is not Literal and issubclass(m, Section)]
        if not opened:
            return ["choice", "grid", "uniform", "loguniform", "int", "subsets", "repeats", "pools", "settings"]
        section = opened[0]
    return list(section.model_fields)


def render_sweep_help() -> str:
    """List every key under its section; no line is wider than 96 columns."""
    opened = [(name, section) for name, field in SweepConfig.model_fields.items() if (section := _section(field))]
    lines = ["at the top level:", *_entries(SweepConfig)]
    for name, section in opened:
        lines += ["", f"{name}: {section.__doc__}", *_entries(section)]
    lines += ["", f"encoders.NAME: {LibraryEncoder.__doc__}", *_entries(LibraryEncoder)]
    lines += ["", "space.KEY, one of:"]
    for kind in members(Entry):
        assert isinstance(kind, type)
        assert issubclass(kind, Section)
        lines += [f"  {kind.__doc__}", *_entries(kind)]
    return "\n".join(lines) + "\n"


def _section(field: FieldInfo) -> type[Section] | None:
    held = [kind for kind in members(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
    return held[0] if held else None


def _entries(section: type[Section]) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        inner = _section(field)
        if inner is not None and section is SweepConfig:
            continue
        lines.append(f"  {field.alias or name}{_default(field)}")
        lines += textwrap.wrap(field.description or "", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        if inner is not None:  # subsets and repeats have keys of their own
            lines += [f"    {line}" for line in _entries(inner)]
    return lines


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    default = "" if field.is_required() or isinstance(value, Section) else f" = {json.dumps(value)}"
    literals = [kind for kind in members(field.annotation) if get_origin(kind) is Literal]
    choices = [str(choice) for kind in literals for choice in get_args(kind)]
    return default + (f"  ({' | '.join(choices)})" if len(choices) > 1 else "")
