"""What a configuration calls by name: encoders, routers, losses, fusions, adapters.

@ENCODERS.register("crepe")
class CrepeEncoder(AudioEncoder): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

Entry = TypeVar("Entry")
Same = TypeVar("Same")


class Registry(dict[str, Entry], Generic[Entry]):
    """Entries by the name that they have in a configuration.

    Args:
        key: The dotted key whose value is a name, such as `model.adapter.kind`.

    Attributes:
        by_key: All registries, for help texts and checks of a configuration.
    """

    by_key: ClassVar[dict[str, Registry[Any]]] = {}

    def __init__(self, key: str):
        super().__init__()
        self.key = key
        self.by_key[key] = self

    def register(self, name: str) -> Callable[[Same], Same]:
        """Return a decorator that enters a class or function under `name`.

        Raises:
            ValueError: There is another of this name already; says where both are.
        """

        def enter(entry: Same) -> Same:
            # A module that is loaded again, as transformers does with changed code, replaces its own entries.
            if name in self and _definition(self[name]) != _definition(entry):
                raise ValueError(f"{self.key}: {name!r} is registered twice, in {place(self[name])} and {place(entry)}")
            self[name] = entry  # type: ignore[assignment]  # what decorates a subclass keeps its type
            return entry

        return enter

    def find(self, name: str) -> Entry:
        """Return the entry of `name`.

        Raises:
            ValueError: There is none; lists the names that there are.
        """
        if name not in self:
            raise ValueError(f"{self.key}: {name!r} is unknown; known are {', '.join(sorted(self))}")
        return self[name]


def _definition(entry: Any) -> tuple[Any, Any]:
    return getattr(entry, "__module__", None), getattr(entry, "__qualname__", entry)


def place(entry: Any) -> str:
    """Return `file:line` of a class or function."""
    try:
        return f"{inspect.getsourcefile(entry)}:{inspect.getsourcelines(entry)[1]}"
    except (OSError, TypeError):  # made at run time
        return repr(entry)
