"""No modules import each other in a circle, and no folders of one folder either."""

from tests.structure import circles_of, module_graph, rooms_of


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles_of(module_graph()) == []


def test_no_folders_beside_each_other_import_each_other_in_a_circle() -> None:
    graph = module_graph()
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    circles = {package: circles_of(rooms_of(package, graph)) for package in packages}
    assert {package: found for package, found in circles.items() if found} == {}


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles_of(graph) == [["b", "c"]]
