"""The text behind `--help`: every key with its default, type and meaning."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args, get_origin

from mowe_ray.config.fields import InlineConfig, Section
from mowe_ray.config.keys import Key, known_keys, members
from mowe_ray.config.schema import RunConfig

WIDTH = 96
_TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true | false",
    InlineConfig: "{config: {...}}",
    type(None): "null",
}


def render_help(root: type[Section] = RunConfig) -> str:
    """List every key of a schema under its section; no line is wider than 96 columns."""
    keys = known_keys(root).values()
    headings = {"": "at the top level:"} | {key.path: _heading(key) for key in keys if key.section is not None}
    lines = []
    for path, heading in headings.items():
        lines += ["", *textwrap.wrap(heading, WIDTH, subsequent_indent="    ")]
        for key in keys:
            if key.section is None and key.parent == path:
                lines += _entry(key)
    return "\n".join(lines[1:]) + "\n"


def _heading(key: Key) -> str:
    assert key.section is not None, key.path
    note = " A list: N counts from 0." if key.is_list else ""
    if type(None) in members(key.field.annotation):
        note = " Null by default." if key.field.default is None else " May be null."
    return f"{_numbered(key.path)}: {key.section.__doc__}{note}"


def _entry(key: Key) -> list[str]:
    head = f"{_numbered(key.path)} = {_default_text(key)}  ({_type_text(key)})"
    return [
        *textwrap.wrap(head, WIDTH, initial_indent="  ", subsequent_indent=" " * 6),
        *textwrap.wrap(key.field.description or "", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def _numbered(path: str) -> str:
    return path.replace("*", "N")


def _default_text(key: Key) -> str:
    if key.field.is_required():
        return "REQUIRED"
    default = key.field.default
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


def _type_text(key: Key) -> str:
    names = []
    for member in members(key.field.annotation):
        if get_origin(member) is Literal:
            names += [str(choice) for choice in get_args(member)]
        elif get_origin(member) is list:
            names.append("[text, ...]")
        elif get_origin(member) is tuple:
            names.append(f"[{', '.join(_TYPE_NAMES[get_args(part)[0]] for part in get_args(member))}]")
        else:
            assert isinstance(member, type), member
            names.append(_TYPE_NAMES[member])
    limits = [
        f"{sign} {getattr(limit, name):g}"
        for limit in key.field.metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(limit, name)
    ]
    return " | ".join(names) + "".join(f", {limit}" for limit in limits)
