"""Setting a key in a tree of mappings and lists."""

import pytest

from mowe_ray.config import ConfigError
from mowe_ray.config.keys import set_key


def test_sections_are_made_and_values_replaced():
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    set_key(tree, ["a", "b"], 9)
    set_key(tree, ["d", "e", "f"], 4)
    assert tree == {"a": {"b": 9, "c": 2}, "d": {"e": {"f": 4}}}


def test_a_list_is_addressed_by_position_and_grows_at_its_end():
    tree: dict = {"sources": [{"path": "x"}]}
    set_key(tree, ["sources", "0", "path"], "y")
    set_key(tree, ["sources", "1", "path"], "z")
    set_key(tree, ["new", "0", "path"], "w")
    assert tree == {"sources": [{"path": "y"}, {"path": "z"}], "new": [{"path": "w"}]}
    with pytest.raises(ConfigError, match=r"sources\.3: no position 3, the next free one is 2"):
        set_key(tree, ["sources", "3"], {})


def test_parts_may_hold_dots():
    tree: dict = {}
    set_key(tree, ["space", "model.router.top_k"], {"grid": [1]})
    assert tree == {"space": {"model.router.top_k": {"grid": [1]}}}


def test_trees_that_share_a_section_stay_as_they_are():
    shared = {"path": "x"}
    tree, other = {"sources": [shared]}, {"sources": [shared]}
    set_key(tree, ["sources", "0", "path"], "y")
    assert other == {"sources": [{"path": "x"}]}
