"""Plugins: files and packages of the user's own, imported before the rest of a configuration is read.

The key `plugins` names them. Their text is read where the command starts and travels with the
configuration: unpickling it imports them, so workers need no shared folder. What they enter into a registry (encoders,
adapters, ...) is a value of the key that names such entries.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from dataclasses import dataclass
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True)
class SourceModule:
    """A module of a plugin.

    Attributes:
        name: What it is imported as.
        file: Where it was read.
        text: Its source.
        is_package: Whether it is the `__init__.py` of a package.
    """

    name: str
    file: str
    text: str
    is_package: bool


@dataclass(frozen=True)
class Plugins:
    """What the key `plugins` names, with its source.

    Attributes:
        modules: All modules of each plugin, by the name it has in the configuration.
    """

    modules: dict[str, tuple[SourceModule, ...]]

    def __reduce__(self) -> tuple[Any, ...]:
        """Import the plugins where this is unpickled."""
        return _arrive, (self.modules,)


class _PluginFinder(MetaPathFinder, ExecutionLoader):
    """Finds and loads modules by their text, before any that lie on a disk."""

    def __init__(self) -> None:
        self.modules: dict[str, SourceModule] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.modules:
            return None
        return spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def get_source(self, fullname: str) -> str:
        return self.modules[fullname].text

    def get_filename(self, fullname: str) -> str:
        return self.modules[fullname].file

    def is_package(self, fullname: str) -> bool:
        return self.modules[fullname].is_package


_SOURCES = _PluginFinder()
# Plugins that came with a configuration: files of their names, which may lie here too, are not read.
_ARRIVED: dict[str, tuple[SourceModule, ...]] = {}


def import_plugins(names: list[str]) -> Plugins:
    """Import Python files, folders with a package, and modules by their names.

    Raises:
        ValueError: There is no such plugin, or it raises; says in which file and line.
    """
    plugins = Plugins({name: _ARRIVED.get(name) or _read(name) for name in names})
    for name, modules in plugins.modules.items():
        _import(name, modules)
    return plugins


def _imported(names: list[str]) -> list[str]:
    import_plugins(names)
    return names


PluginNames = Annotated[list[str], AfterValidator(_imported)]


def _arrive(modules: dict[str, tuple[SourceModule, ...]]) -> Plugins:
    _ARRIVED.update(modules)
    return import_plugins(list(modules))


def _read(name: str) -> tuple[SourceModule, ...]:
    """Return the modules of a plugin: the one that is imported first, then what it may import of itself."""
    path = Path(name).expanduser()
    if path.suffix != ".py" and not path.is_dir():
        found = PathFinder.find_spec(name) if name.isidentifier() else None
        if found is None or found.origin is None:
            raise ValueError(f"{name} is neither a file, nor a folder, nor a module that can be imported here")
        path = Path(found.origin)
        path = path.parent if path.name == "__init__.py" else path
    path = path.absolute()
    root = path.stem
    files = {root: path}
    if path.is_dir():
        files = {".".join((root, *_below(path, file))): file for file in sorted(path.rglob("*.py"))}
    if root not in files or not files[root].is_file():
        raise ValueError(f"{name} is no file" if path.suffix == ".py" else f"{name} has no __init__.py")
    _check_name(name, root, files[root])
    return tuple(
        SourceModule(module, str(file), file.read_text(encoding="utf-8"), file.name == "__init__.py")
        for module, file in files.items()
    )


def _below(folder: Path, file: Path) -> tuple[str, ...]:
    parts = file.relative_to(folder).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _check_name(name: str, root: str, file: Path) -> None:
    """Refuse a name under which Python, or another plugin, knows something else."""
    if not root.isidentifier():
        raise ValueError(f"{name}: {root} is no name of a Python module; rename it, with letters, digits and _ alone")
    installed = PathFinder.find_spec(root)
    if root in sys.stdlib_module_names or (installed and installed.origin and Path(installed.origin) != file):
        raise ValueError(f"{name}: {root} is the name of an installed module as well; rename the plugin")
    other = _SOURCES.modules.get(root)
    if other is not None and Path(other.file) != file:
        raise ValueError(f"{name} and {other.file} would be imported under one name; rename one of them")


def _import(name: str, modules: tuple[SourceModule, ...]) -> None:
    if _SOURCES not in sys.meta_path:
        sys.meta_path.insert(0, _SOURCES)
    if any(_SOURCES.modules.get(module.name) != module for module in modules):  # new, or changed since
        for module in modules:
            _SOURCES.modules[module.name] = module
            sys.modules.pop(module.name, None)
    try:
        importlib.import_module(modules[0].name)
    except Exception as error:
        for module in modules:  # so that it is tried again once it is mended
            _SOURCES.modules.pop(module.name, None)
        raise ValueError(f"{_place(error, modules) or name}: {type(error).__name__}: {error}") from error


def _place(error: Exception, modules: tuple[SourceModule, ...]) -> str | None:
    """Return `file:line` of the plugin that an error comes from."""
    files = {module.file for module in modules}
    if isinstance(error, SyntaxError) and error.filename in files:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def plugin_frame(error: BaseException) -> traceback.FrameSummary:
    """Return where an error was raised: the innermost line of a plugin if it passed through one."""
    frames = traceback.extract_tb(error.__traceback__)
    files = {module.file for module in _SOURCES.modules.values()}
    return next((frame for frame in reversed(frames) if frame.filename in files), frames[-1])


def registered(key: str) -> dict[str, Any]:
    """Return the entries of a registry of the model by name; none before something has imported the model.

    A configuration itself never does, because that takes seconds; plugins do.
    """
    registries = sys.modules.get("mowe_ray.model.registry")
    return {} if registries is None else dict(registries.Registry.by_key.get(key, {}))


@dataclass(frozen=True)
class NameIn:
    """The type of a key that names an entry of a registry: `Annotated[str, NameIn(key, built_in)]`.

    Attributes:
        key: Key of the registry.
        built_in: Names that are there without plugins.
    """

    key: str
    built_in: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All names that are known now."""
        return [*self.built_in, *sorted(registered(self.key).keys() - set(self.built_in))]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the name after the type of the value."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, 1)
            guess = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"must be one of {', '.join(self.names)}, got {name!r}{guess}; plugins may add more")
        return name
