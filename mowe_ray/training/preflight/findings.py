"""What a check found: a line for the person, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed"]
_WORSE: tuple[Status, ...] = ("ok", "warning", "failed")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be, and its remedy."""

    status: Status
    detail: str
    fix: str


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `fix` says what to do, None where nothing is."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def conclude(name: str, fine: str, findings: Iterable[Finding]) -> Check:
    """Return the check that made these findings; `fine` is its line if there are none."""
    found = sorted(findings, key=lambda finding: -_WORSE.index(finding.status))
    if not found:
        return Check(name, "ok", fine)
    return Check(
        name,
        found[0].status,
        "; ".join(dict.fromkeys(finding.detail for finding in found)),
        "; ".join(dict.fromkeys(finding.fix for finding in found)),
    )


def by_value(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the nodes of each value, the value of most nodes first."""
    nodes: dict[str, list[str]] = {}
    for node, value in values.items():
        nodes.setdefault(value, []).append(node)
    return dict(sorted(nodes.items(), key=lambda entry: -len(entry[1])))


def told_apart(values: Mapping[str, str]) -> str:
    """Say which nodes have which value, the odd ones first: `2.0 on c; 1.0 on a, b`."""
    groups = reversed(by_value(values).items())
    return "; ".join(f"{value} on {name_nodes(nodes)}" for value, nodes in groups)


def name_nodes(nodes: Iterable[str], at_most: int = 4) -> str:
    """Name a few nodes, and say how many more there are."""
    names = sorted(nodes)
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")
