"""Sizes and names that keep the code readable; a change that breaks one splits something."""

import ast
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mowe_ray.config.keys import known_keys

PACKAGE = Path(__file__).parents[2] / "mowe_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_no_file_over_400_lines() -> None:
    assert {str(file): num_lines(file) for file in FILES if num_lines(file) > 400} == {}


def test_median_file_under_170_lines() -> None:
    assert statistics.median(map(num_lines, FILES)) < 170


@pytest.mark.slow
def test_no_function_over_60_lines() -> None:
    lengths = {
        f"{file}:{function.lineno} {function.name}": function.end_lineno - function.lineno + 1
        for file in FILES
        for function in functions(file)
        if function.end_lineno is not None
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_file_is_a_drawer() -> None:
    parts = {part for file in FILES for part in file.relative_to(PACKAGE).with_suffix("").parts}
    assert parts & FORBIDDEN_NAMES == set()


@pytest.mark.slow
def test_no_class_name_has_two_meanings() -> None:
    trees = [ast.walk(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES]
    names = Counter(node.name.lstrip("_") for nodes in trees for node in nodes if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.slow
def test_every_module_says_what_it_is_for() -> None:
    assert [str(file) for file in FILES if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))] == []


def test_config_stays_small() -> None:
    assert sum(key.section is None for key in known_keys().values()) <= 114
