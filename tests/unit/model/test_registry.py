import pytest

from mowe_ray.model.registry import Registry


def made(key: str) -> Registry[type]:
    return Registry(key)


@pytest.fixture(autouse=True)
def only_here() -> object:
    yield
    Registry.by_key.pop("test.key", None)


def test_a_decorator_enters_a_class_and_leaves_it_as_it_was() -> None:
    registry = made("test.key")

    @registry.register("one")
    class One:
        pass

    assert registry == {"one": One}
    assert registry.find("one") is One
    assert Registry.by_key["test.key"] is registry


def test_a_second_entry_of_a_name_is_refused_with_both_places() -> None:
    registry = made("test.key")

    @registry.register("one")
    class First:
        pass

    with pytest.raises(ValueError, match=r"test.key: 'one' is registered twice.*test_registry.py:\d+ and .*:\d+"):

        @registry.register("one")
        class Second:
            pass

    assert registry["one"] is First


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    registry = made("test.key")
    registry.register("b")(int)
    registry.register("a")(float)
    with pytest.raises(ValueError, match=r"test.key: 'c' is unknown; known are a, b"):
        registry.find("c")
