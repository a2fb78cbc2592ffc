"""The dotted keys of the configuration: lookup, suggestions for unknown ones, and the text of `--help`.

List positions are written `*` in a known key: `data.train.*.path`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mowe_ray.config.fields import ConfigError, InlineConfig, Section
from mowe_ray.config.plugins import NameIn
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


@dataclass(frozen=True)
class Key:
    """One known key."""

    path: str
    field: FieldInfo
    section: type[Section] | None
    """The section the key opens (for a list: each of its elements), None if it holds a value."""
    is_list: bool

    @property
    def parent(self) -> str:
        """Path of the section the key stands in, empty at the top level."""
        return self.path.rpartition(".")[0].removesuffix(".*")


def members(annotation: object) -> list[object]:
    """Take a union apart into the types it is made of; any other type is its own only member."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def _walk(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        is_list = get_origin(field.annotation) is list
        held = get_args(field.annotation) if is_list else members(field.annotation)
        opened = next(filter(_is_section, held), None)
        key = Key(prefix + name, field, opened, is_list)
        yield key
        if opened is not None:
            yield from _walk(opened, f"{key.path}.*." if is_list else f"{key.path}.")


def _is_section(part: object) -> TypeGuard[type[Section]]:
    # An inline config is a value: its keys belong to transformers.
    return isinstance(part, type) and issubclass(part, Section) and part is not InlineConfig


@cache
def known_keys(root: type[Section] = RunConfig) -> dict[str, Key]:
    """Every key and section of a schema by its dotted path, in the order of the schema."""
    return {key.path: key for key in _walk(root, "")}


def find_key(dotted: str, root: type[Section] = RunConfig) -> Key | None:
    """Find a key; `data.train.0.path` is `data.train.*.path`."""
    return known_keys(root).get(_with_stars(dotted))


def is_known(dotted: str, root: type[Section] = RunConfig) -> bool:
    """Whether a value may be given here: a key, a list element, or inside an inline config."""
    element_of = find_key(dotted.rpartition(".")[0], root)
    if find_key(dotted, root) or (element_of and element_of.is_list and dotted[-1].isdigit()):
        return True
    if element_of and any(get_origin(member) is dict for member in members(element_of.field.annotation)):
        return True  # which names it takes, its own type says
    opener, _, rest = dotted.partition(".config")
    key = find_key(opener, root)
    return key is not None and InlineConfig in members(key.field.annotation) and (not rest or rest.startswith("."))


def nearest_key(dotted: str, root: type[Section] = RunConfig) -> str | None:
    """The known key most like an unknown one, also when only its section is wrong or missing."""
    path = _with_stars(dotted)

    def likeness(known: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, path, known).ratio()
        last = SequenceMatcher(None, path.split(".")[-1], known.split(".")[-1]).ratio()
        # Of keys with the same last part, the one in the section most like the user's wins.
        return max(whole, 0.95 * last), whole

    best = max(known_keys(root), key=likeness)
    # Below this, a suggestion would mislead more than it helps [ours].
    if likeness(best)[0] < 0.7:
        return None
    positions = iter(part for part in dotted.split(".") if part.isdigit())
    return ".".join(next(positions, "0") if part == "*" else part for part in best.split("."))


def _with_stars(dotted: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in dotted.split("."))


def set_key(tree: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    """Set one value in a tree of mappings and lists.

    Sections that are missing are made, those on the way are copied, so that trees which share them do not change.

    Args:
        tree: The root, which is changed.
        parts: The key's parts; `["data", "train", "0", "path"]` addresses a list by position, and the position after
            the last one appends.
        value: The value.

    Raises:
        ConfigError: A list has no such position.
    """
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        below = _child(node, part, parts)
        if isinstance(below, dict | list):
            below = below.copy()
        else:
            below = [] if parts[depth + 1].isdigit() else {}
        _put(node, part, below)
        node = below
    _child(node, parts[-1], parts)
    _put(node, parts[-1], value)


def _child(node: Any, part: str, parts: Sequence[str]) -> Any:
    if not isinstance(node, list):
        return node.get(part)
    if not part.isdigit() or int(part) > len(node):
        raise ConfigError([f"{'.'.join(parts)}: no position {part}, the next free one is {len(node)}"])
    return node[int(part)] if int(part) < len(node) else None


def _put(node: Any, part: str, value: Any) -> None:
    if isinstance(node, dict):
        node[part] = value
    elif int(part) < len(node):
        node[int(part)] = value
    else:
        node.append(value)


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
    if registry := next((part for part in key.field.metadata if isinstance(part, NameIn)), None):
        return " | ".join(registry.names)
    names = []
    for member in members(key.field.annotation):
        if get_origin(member) is Literal:
            names += [str(choice) for choice in get_args(member)]
        elif get_origin(member) is list:
            names.append("[text, ...]")
        elif get_origin(member) is dict:
            names.append("{name: text, ...}")
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
