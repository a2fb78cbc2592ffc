"""Which colour stands for what: one factor of a study is told by colour in all charts of its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mowe_ray.output.colours import MOST_COLOURS, PLAIN, chips, colour, shade
from mowe_ray.sweeping.effects import Effect, Factor
from mowe_ray.sweeping.labels import entry_label


@dataclass(frozen=True)
class Colouring:
    """Colours by the value of a factor.

    Attributes:
        labels: What each colour is called, the best value first; numbers by size.
    """

    factor: Factor | None = None
    by_value: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    low: float = 0.0
    high: float = 0.0

    @property
    def title(self) -> str:
        """Name of the factor."""
        return self.factor.name if self.factor else ""

    def of(self, values: Mapping[str, Any]) -> str:
        """Return the colour of a point."""
        if self.factor is None or self.factor.entry not in values:
            return PLAIN
        value = self.factor.of(values)
        if self.factor.kind == "range":
            low, high, at = (math.log(x) if self.factor.log else x for x in (self.low, self.high, value))
            return shade((at - low) / (high - low))
        return self.by_value.get(json.dumps(value, sort_keys=True, default=str), PLAIN)

    def legend(self, narrow: bool = False) -> str:
        """Say which colour is what; with `narrow` only where the page is too narrow for labels at curves."""
        return chips(self.labels.items(), "chips narrow" if narrow and self.by_value else "chips")


def colouring(effects: Sequence[Effect], better_is_more: bool) -> Colouring:
    """Choose the factor that matters most, of those with few enough values to tell apart."""
    chosen = next((e for e in effects if e.trend or len(e.levels) <= MOST_COLOURS), None)
    if chosen is None:
        return Colouring()
    if chosen.trend:
        numbers = [chosen.factor.of(point.values) for level in chosen.levels for point in level.points]
        low, high = min(numbers), max(numbers)
        name = chosen.factor.name
        ends = {shade(0): f"{name} {entry_label(low)}", shade(1): entry_label(high)}
        return Colouring(chosen.factor, {}, ends, low, high)
    numeric = all(isinstance(level.value, int | float) and not isinstance(level.value, bool) for level in chosen.levels)
    levels = list(chosen.levels)
    if not numeric:
        levels.sort(key=lambda level: level.mean, reverse=better_is_more)
    shades = [shade(i / (len(levels) - 1)) if numeric else colour(i) for i in range(len(levels))]
    keys = [json.dumps(level.value, sort_keys=True, default=str) for level in levels]
    prefix = "" if chosen.factor.kind == "encoder" else f"{chosen.factor.name} "
    labels = {c: prefix + level.label for c, level in zip(shades, levels, strict=True)}
    return Colouring(chosen.factor, dict(zip(keys, shades, strict=True)), labels)
