"""The search space of a study: its dimensions, its points, the constraints on them, and each point's configuration.

A point maps every entry of the space to a value: a number, a text, the name of settings, or a pool as the list of
its encoders' names.
"""

from __future__ import annotations

import ast
import json
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Any, Literal

from mowe_ray.config import ConfigError, RunConfig, load_config
from mowe_ray.config.keys import is_known
from mowe_ray.sweeping.schema import (
    POOL_KEY,
    SUPERNET_KEY,
    Choice,
    Entry,
    Grid,
    IntRange,
    LibraryEncoder,
    LogUniform,
    Pools,
    Settings,
    SweepConfig,
    Uniform,
)

PointValues = dict[str, Any]
Library = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Dimension:
    """One entry of the space.

    Attributes:
        name: Its key in the sweep file's `space`.
        values: All values of a finite dimension.
        bounds: Least and greatest value of a continuous one.
        log: Whether draws between the bounds are uniform in the logarithm.
        always: Whether every value is combined with every draw of the other dimensions.
    """

    name: str
    values: tuple[Any, ...] = ()
    bounds: tuple[float, float] | None = None
    log: bool = False
    always: bool = False


class SearchSpace:
    """The dimensions of a study, and the configuration of each of their points."""

    def __init__(self, sweep: SweepConfig):
        """Read the base configuration and the dimensions.

        Raises:
            ConfigError: The base, an encoder or a constraint cannot be used.
        """
        self.sweep = sweep
        self._common = {**sweep.set, **sweep.set_for.get(sweep.base, {})}
        if sweep.plugins:
            self._common["plugins"] = list(dict.fromkeys([*self.config({}).plugins, *sweep.plugins]))
        self.base = self.config({})
        self.library = _library(self.base, sweep.encoders)
        self.dimensions = [_dimension(name, entry, self.library) for name, entry in sweep.space.items()]
        self._constraints = [_constraint(text, sweep) for text in sweep.constraints]
        # For constraints on keys that no entry of the space varies.
        self._base_values = self.base.model_dump(mode="json")

    @property
    def finite(self) -> bool:
        """Whether the space has finitely many points."""
        return all(dimension.bounds is None for dimension in self.dimensions)

    def points(self) -> Iterator[PointValues]:
        """Yield every allowed point of a finite space, each once."""
        assert self.finite
        for values in product(*(dimension.values for dimension in self.dimensions)):
            point = dict(zip((dimension.name for dimension in self.dimensions), values, strict=True))
            if self.rejection(point) is None:
                yield point

    @cached_property
    def expected_points(self) -> int | None:
        """Number of points that a study will have; None if only the search can determine it."""
        search, points = self.sweep.search, self.sweep.budget.points
        if search.kind not in ("grid", "oneshot"):
            return points
        total = sum(1 for _ in self.points())
        if search.kind == "oneshot":
            return 1 + min(search.calibrate, total)
        return total if points is None else min(points, total)

    def supernet(self) -> PointValues:
        """Return the point whose one training serves all pools of a one-shot search.

        Raises:
            ConfigError: The pool of all encoders cannot be trained.
        """
        entry = self.sweep.space[POOL_KEY]
        assert isinstance(entry, Pools)
        assert entry.subsets is not None
        point = {POOL_KEY: _named(entry.subsets.of, self.library), SUPERNET_KEY: True}
        self.config(point)
        return point

    def rejection(self, point: PointValues) -> str | None:
        """Return the reason why a point is not trained; None if it is."""
        for constraint in self._constraints:
            if not constraint.holds(lambda name: self._value(name, point)):
                return f"against {constraint.text}"
        try:
            self.config(point)
        except ConfigError as error:
            return str(error)
        return None

    def config(self, point: PointValues, **given: Any) -> RunConfig:
        """Return the configuration of a point; `given` are keys of the run, such as its name.

        Raises:
            ConfigError: The values do not go together.
        """
        chosen = {**self._common, **self.overrides(point), **given}
        return load_config(self.sweep.base, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])

    def overrides(self, point: PointValues) -> dict[str, Any]:
        """Return the keys of the configuration that a point sets."""
        keys: dict[str, Any] = {}
        for name, value in point.items():
            entry = self.sweep.space.get(name)  # None for what a search adds by itself
            if isinstance(entry, Settings):
                keys |= entry.settings[value]
            else:
                keys[name] = pool_members(value, self.library) if isinstance(entry, Pools) else value
        return keys

    def _value(self, name: str, point: PointValues) -> Any:
        """Return the value of a name in a constraint."""
        chosen = self.overrides(point)
        if name == "pool_size":
            return len(chosen.get(POOL_KEY, self._base_values["model"]["weak_encoders"]))
        if name in point:
            return point[name]
        if name in chosen:
            return chosen[name]
        value: Any = self._base_values
        for part in name.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        return value


def pool_members(names: Sequence[str], library: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a pool's members for `model.weak_encoders`; a repeated one is named `NAME_1`, `NAME_2`."""
    repeated, seen = Counter(names), Counter[str]()
    members = []
    for name in names:
        seen[name] += 1
        members.append({"name": name if repeated[name] == 1 else f"{name}_{seen[name]}", **library[name]})
    return members


def _library(base: RunConfig, encoders: Mapping[str, LibraryEncoder]) -> Library:
    """Return the encoders that pools may contain, by name: the base's own, and the sweep's."""
    # The sweep's encoders replace the base's of the same name.
    own = {member.name: member.model_dump(mode="json", exclude={"name"}) for member in base.model.weak_encoders}
    return own | {name: encoder.model_dump(mode="json") for name, encoder in encoders.items()}


def _dimension(name: str, entry: Entry, library: Library) -> Dimension:
    match entry:
        case Choice(choice=values):
            return Dimension(name, tuple(values))
        case Grid(grid=values):
            return Dimension(name, tuple(values), always=True)
        case IntRange(between=(low, high)):
            return Dimension(name, tuple(range(low, high + 1)))
        case Uniform(uniform=bounds):
            return Dimension(name, bounds=_ascending(name, bounds))
        case LogUniform(loguniform=bounds):
            return Dimension(name, bounds=_ascending(name, bounds), log=True)
        case Settings(settings=settings):
            return Dimension(name, tuple(settings))
        case Pools():
            if name != POOL_KEY:
                raise ConfigError([f"space.{name}: subsets, repeats and pools are for {POOL_KEY}"])
            return Dimension(name, tuple(_pools(entry, library)))
    raise AssertionError(entry)


def _ascending(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ConfigError([f"space.{name}: the least ({bounds[0]:g}) must be below the most ({bounds[1]:g})"])
    return bounds


def _pools(entry: Pools, library: Library) -> list[list[str]]:
    """Return the distinct pools of an entry: of those with the same encoders under other names, the first."""
    pools: list[list[str]] = []
    if entry.subsets:
        for size in entry.subsets.sizes:
            pools += [list(pool) for pool in combinations(_named(entry.subsets.of, library), size)]
    if entry.repeats:
        for times in entry.repeats.times:
            pools += [[name] * times for name in _named(entry.repeats.of, library)]
    pools += [list(_named(pool, library)) for pool in entry.pools or []]
    distinct: dict[tuple[str, ...], list[str]] = {}
    for pool in pools:
        # By content, not by name, and without the order: a trial of an equal pool would only repeat one.
        distinct.setdefault(tuple(sorted(json.dumps(library[name], sort_keys=True) for name in pool)), pool)
    if not distinct:
        raise ConfigError(
            [f"space.{POOL_KEY}: no pool has that size; the library has {', '.join(library) or 'nothing'}"]
        )
    return list(distinct.values())


def _named(names: Literal["all"] | Sequence[str], library: Library) -> list[str]:
    if names == "all":
        return list(library)
    unknown = [name for name in names if name not in library]
    if unknown:
        raise ConfigError([f"space.{POOL_KEY}: no encoder {unknown[0]!r}; there are {', '.join(library) or 'none'}"])
    return list(names)


def _constraint(text: str, sweep: SweepConfig) -> Constraint:
    try:
        constraint = Constraint(text)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    unknown = [
        name for name in constraint.names if name != "pool_size" and name not in sweep.space and not is_known(name)
    ]
    if unknown:
        raise ConfigError([f"constraints: {unknown[0]} in {text!r} is no key, no entry of the space and not pool_size"])
    return constraint


# The whole language of constraints. They are evaluated by these operators, never by `eval`: a sweep file is data.
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


class Constraint:
    """A condition; its names are keys of the configuration, entries of the space, or `pool_size`."""

    def __init__(self, text: str):
        """Parse `text`.

        Raises:
            ValueError: It is not a condition.
        """
        self.text = text
        try:
            self._tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"constraints: {text!r} is not an expression: {error.msg}") from error
        self.names = sorted(self._check(self._tree))

    def holds(self, value_of: Callable[[str], Any]) -> bool:
        """Whether it is true where names have the values that `value_of` returns."""
        return bool(_evaluate(self._tree, value_of))

    def _check(self, node: ast.expr) -> set[str]:
        """Return the names in it, and reject any other syntax."""
        match node:
            case ast.Name() | ast.Attribute():
                return {_dotted(node)}
            case ast.Constant():
                return set()
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.BoolOp(values=parts):
                pass
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=part):
                parts = [part]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                parts = [left, right]
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
                parts = [left, *rest]
            case _:
                raise ValueError(f"constraints: {self.text!r} may hold names, numbers, text, comparisons, + - * / only")
        return {name for part in parts for name in self._check(part)}


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_dotted(value)}.{name}"
    raise ValueError("constraints: a dotted key begins with a name")


def _evaluate(node: ast.expr, value_of: Callable[[str], Any]) -> Any:
    match node:
        case ast.Name() | ast.Attribute():
            return value_of(_dotted(node))
        case ast.Constant(value=value):
            return value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_evaluate(part, value_of) for part in parts]
        case ast.BoolOp(op=op, values=parts):
            found = (bool(_evaluate(part, value_of)) for part in parts)
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.UnaryOp(op=op, operand=part):
            value = _evaluate(part, value_of)
            return not value if isinstance(op, ast.Not) else -value
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_evaluate(left, value_of), _evaluate(right, value_of))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            values = [_evaluate(part, value_of) for part in (left, *rest)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
    raise AssertionError(node)
