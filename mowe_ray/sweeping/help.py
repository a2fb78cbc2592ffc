"""The text behind `--help` of the sweep command: every key of a sweep file with its default and meaning."""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from mowe_ray.config.fields import Section
from mowe_ray.config.help import WIDTH
from mowe_ray.config.keys import members
from mowe_ray.sweeping.schema import Entry, LibraryEncoder, SweepConfig


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
