"""What imports what: `python -m tests.structure [FOLDER]` prints the import levels of every folder.

A level is one more than the highest level of what a file imports, counting only what lies in the same folder; the files
of a circle share one. Imports for type checking alone do not count.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grimp

PACKAGE = "mowe_ray"
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Structure:
    """Imports between the rooms of a folder: its files, and its sub-folders as one room each."""

    rooms: int
    levels: int
    arrows: int
    circles: list[list[str]]


@cache
def module_graph(package: str = PACKAGE) -> Graph:
    """Every module with the modules of the package that it imports; packages' own files count as modules."""
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    return {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}


def rooms_of(folder: str, graph: Graph) -> Graph:
    """The rooms of a folder (dotted) with the rooms they import."""
    depth = folder.count(".") + 2

    def room(module: str) -> str | None:
        return ".".join(module.split(".")[:depth]) if module.startswith(f"{folder}.") else None

    rooms: Graph = {}
    for module, imported in graph.items():
        if (here := room(module)) is not None:
            there = {found for name in imported if (found := room(name)) is not None}
            rooms.setdefault(here, set()).update(there - {here})
    return rooms


def circles_of(graph: Graph) -> list[list[str]]:
    """Groups of two modules or more that import each other, directly or not (Tarjan's strong components)."""
    reached = {node: _reachable(node, graph) for node in graph}
    groups = {frozenset([node, *(other for other in reached[node] if node in reached[other])]) for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(start: str, graph: Graph) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for other in graph[ahead.pop()]:
            if other not in found:
                found.add(other)
                ahead.append(other)
    return found


def structure_of(folder: str, graph: Graph) -> Structure:
    """Count the rooms, levels, arrows and circles of a folder (dotted)."""
    rooms = rooms_of(folder, graph)
    circles = circles_of(rooms)
    group = {room: tuple(circle) for circle in circles for room in circle}
    merged: dict[object, set[object]] = {}
    for room, imported in rooms.items():
        own = group.get(room, room)
        merged.setdefault(own, set()).update(group.get(other, other) for other in imported)
    levels: dict[object, int] = {}

    def level(node: object) -> int:
        if node not in levels:
            levels[node] = 1 + max((level(other) for other in merged[node] if other != node), default=0)
        return levels[node]

    return Structure(len(rooms), max(map(level, merged), default=0), sum(map(len, rooms.values())), circles)


def sizes_of(folder: Path) -> tuple[int, int]:
    """Count the Python files below a folder, and their lines."""
    files = sorted(folder.rglob("*.py"))
    return len(files), sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def modules_with_one_importer(graph: Graph) -> list[str]:
    """The modules that a single other module imports, which might as well be a part of it."""
    importers = Counter(name for imported in graph.values() for name in imported)
    return sorted(module for module in graph if importers[module] == 1)


def main(folder: Path) -> None:
    """Print the table for the package in `folder`."""
    sys.path.insert(0, str(folder))
    graph = module_graph()
    files, lines = sizes_of(folder / PACKAGE)
    single = modules_with_one_importer(graph)
    print(f"{files} files, {lines} lines: {1000 * files / lines:.2f} files per 1,000 lines")
    print(f"{len(single)} modules with one importer, {len(circles_of(graph))} circles of modules")
    print(f"{'folder':<24}{'rooms':>6}{'levels':>8}{'arrows':>8}{'circles':>9}")
    packages = sorted(name for name in graph if any(other.startswith(f"{name}.") for other in graph))
    for package in packages:
        found = structure_of(package, graph)
        print(f"{package:<32}{found.rooms:>4}{found.levels:>8}{found.arrows:>8}{len(found.circles):>9}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
