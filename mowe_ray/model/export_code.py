"""The code that an export carries, for transformers alone: our model files, and the plugins of the model."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_mowe import MoweConfig
from .registry import Registry

AUTO_CLASSES = {
    "AutoConfig": "configuration_mowe.MoweConfig",
    "AutoModel": "modeling_mowe.MoweForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_mowe.MoweForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mowe.MoweForConditionalGeneration",
    "AutoProcessor": "processing_mowe.MoweProcessor",
}
# Every load of an export begins with it, so it imports the plugins.
_ENTRY = "configuration_mowe"


def copy_code(folder: Path, config: MoweConfig) -> None:
    """Copy the files that a model needs into `folder`, side by side: `pack.enc` becomes `pack_enc`.

    Raises:
        ValueError: A plugin imports what cannot be copied; names the file and the line.
    """
    for module in {reference.split(".")[0] for reference in AUTO_CLASSES.values()}:
        _copy_ours(module, folder)
    plugins = {entry.__module__ for entry in _entries_of_plugins(config)}
    written: set[str] = set()
    todo = set(plugins)
    while todo:
        name = todo.pop()
        written.add(name)
        text, ours, own = _rewritten(sys.modules[name])
        for module in ours:
            _copy_ours(module, folder)
        (folder / f"{_flat(name)}.py").write_text(text, encoding="utf-8")
        todo |= own - written
    with (folder / f"{_ENTRY}.py").open("a", encoding="utf-8") as entry:
        entry.writelines(f"from .{_flat(name)} import __name__ as _{_flat(name)}\n" for name in sorted(plugins))


def _copy_ours(module: str, folder: Path) -> None:
    file = Path(__file__).with_name(f"{module}.py")
    # As transformers itself finds the code that it downloads.
    for needed in (file, *map(Path, get_relative_import_files(file))):
        if not (folder / needed.name).exists() or module == _ENTRY:
            shutil.copyfile(needed, folder / needed.name)


def _entries_of_plugins(config: MoweConfig) -> Iterator[Any]:
    """Yield the registered classes and functions from elsewhere that a configuration names."""
    names = set(_strings(config.to_dict()))
    for registry in Registry.by_key.values():
        for name, entry in registry.items():
            if name in names and entry.__module__.rpartition(".")[0] != __package__:
                yield entry


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _rewritten(module: ModuleType) -> tuple[str, set[str], set[str]]:
    """Return a module's text with imports of its new neighbours, and which of ours and of its own they are."""
    get_source = getattr(module.__loader__, "get_source", None)
    text: str | None = get_source(module.__name__) if get_source else None
    if text is None:
        raise ValueError(f"{module.__name__} is no file, and an export needs its code: define the classes in a file")
    lines, ours, own = text.splitlines(keepends=True), set(), set()
    for node in reversed(list(_imports(ast.parse(text)))):
        place = f"{module.__file__}:{node.lineno}"
        if isinstance(node, ast.Import):
            _refuse(place, (alias.name for alias in node.names if _is_near(alias.name, module)))
            continue
        name = resolve_name("." * node.level + (node.module or ""), module.__package__ or "__main__")
        if not _is_near(name, module):
            continue
        parent, _, last = name.rpartition(".")
        if parent == __package__:
            ours.add(last)
        elif name.partition(".")[0] == str(__package__).partition(".")[0]:
            raise ValueError(f"{place}: an export has no {name}, only the modules of {__package__}")
        else:
            _refuse(place, (alias.name for alias in node.names if f"{name}.{alias.name}" in sys.modules))
            own.add(name)
        near = ast.ImportFrom(last if parent == __package__ else _flat(name), node.names, level=1)
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + ast.unparse(near) + "\n"]
    return "".join(lines), ours, own


def _imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    yield from sorted(found, key=lambda node: node.lineno)


def _is_near(name: str, module: ModuleType) -> bool:
    """Whether `name` is a module of this package, or one that came the way `module` did."""
    roots = {str(__package__).partition(".")[0], module.__name__.partition(".")[0]}
    loader = getattr(sys.modules.get(name), "__loader__", None)
    return name.partition(".")[0] in roots or loader is module.__loader__


def _refuse(place: str, modules: Iterable[str]) -> None:
    for name in modules:
        raise ValueError(
            f"{place}: write `from MODULE import NAME` instead of importing {name}: exports have flat files"
        )
