"""The package as a graph of imports, and tests where what they test is."""

from pathlib import Path

from tests.structure import PACKAGE, circles_of, module_graph, modules_with_one_importer, rooms_of, sizes_of

ROOT = Path(__file__).parents[2]
# Of the files that are shipped beside the package.
BESIDE_THE_PACKAGE = {"cluster"}


def test_no_modules_import_each_other() -> None:
    assert circles_of(module_graph()) == []


def test_no_folders_beside_each_other_import_each_other() -> None:
    graph = module_graph()
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    circles = {package: circles_of(rooms_of(package, graph)) for package in packages}
    assert {package: found for package, found in circles.items() if found} == {}


def test_files_are_worth_opening() -> None:
    files, lines = sizes_of(ROOT / PACKAGE)
    assert 1000 * files / lines <= 6.5
    assert len(modules_with_one_importer(module_graph())) <= 1.5 * lines / 1000  # 45 of 30,700 lines


def test_a_circle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles_of(graph) == [["b", "c"]]


def test_unit_tests_lie_in_the_folder_of_what_they_test() -> None:
    folders = {
        file.parent.relative_to(ROOT / "tests" / "unit") for file in (ROOT / "tests" / "unit").rglob("test_*.py")
    }
    strange = {str(folder) for folder in folders if not (ROOT / PACKAGE / folder).is_dir()}
    assert strange == BESIDE_THE_PACKAGE
