"""The dotted keys of the configuration: listing them, finding one, guessing what was meant.

List positions are written `*` in a known key: `data.train.*.path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from types import UnionType
from typing import Annotated, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mowe_ray.config.fields import InlineConfig, Section
from mowe_ray.config.schema import RunConfig


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
    if likeness(best)[0] < 0.7:
        return None
    positions = iter(part for part in dotted.split(".") if part.isdigit())
    return ".".join(next(positions, "0") if part == "*" else part for part in best.split("."))


def _with_stars(dotted: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in dotted.split("."))
