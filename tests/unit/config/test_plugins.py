"""Plugins of a configuration: what they add is known, their errors have a place, and they travel with it."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mowe_ray.config import ConfigError, load_config, load_evaluation, render_help
from mowe_ray.sweeping.load import load_sweep
from mowe_ray.sweeping.search_space import SearchSpace

ADAPTER = """
from mowe_ray.model.adapter import ADAPTERS, StackMlp


@ADAPTERS.register("{name}")
class MyAdapter(StackMlp):
    pass
"""


def plugin(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(text)
    return file


def test_names_that_a_plugin_adds_are_values_and_help_lists_them(tmp_path: Path) -> None:
    file = plugin(tmp_path, "adds_an_adapter", ADAPTER.format(name="from_a_plugin"))
    config = load_config("quickstart", [f"plugins=[{file}]", "model.adapter.kind=from_a_plugin"])
    assert config.model.adapter.kind == "from_a_plugin"
    assert config.plugins == [str(file)]
    assert "| from_a_plugin" in render_help()
    with pytest.raises(
        ConfigError, match=r"model\.adapter\.kind: must be one of seqcnn, .*from_a_plugin.*did you mean"
    ):
        load_config("quickstart", ["model.adapter.kind=from_a_plugi"])


def test_a_package_is_imported_with_its_modules_and_so_is_a_module_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "plugin_package"
    package.mkdir()
    plugin(package, "__init__", "from plugin_package.inner import VALUE\nSEEN = VALUE\n")
    plugin(package, "inner", "VALUE = 42\n")
    load_evaluation(None, [f"plugins=[{package}]"])
    assert sys.modules["plugin_package"].SEEN == 42
    plugin(tmp_path, "by_its_name", "SEEN = 43")
    monkeypatch.syspath_prepend(tmp_path)
    load_config("quickstart", ["plugins=[by_its_name]"])
    assert sys.modules["by_its_name"].SEEN == 43


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = unknown_name\n", r"plugins: .*broken_\d+\.py:2: NameError: name 'unknown_name'"),
        ("def f():\n    return missing_comma 1\n", r"plugins: .*broken_\d+\.py:2: SyntaxError"),
        ("import a_module_that_nobody_has\n", r"plugins: .*broken_\d+\.py:1: ModuleNotFoundError"),
        (
            ADAPTER.format(name="seqcnn"),
            r"plugins: .*broken_\d+\.py:5: ValueError: model\.adapter\.kind: 'seqcnn' is registered twice, "
            r"in .*model/adapter\.py:\d+ and .*broken_\d+\.py",
        ),
    ],
)
def test_an_error_of_a_plugin_names_its_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    file = plugin(tmp_path, f"broken_{len(text)}", text)
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", [f"plugins=[{file}]"])
    file.write_text("MENDED = True\n")
    load_config("quickstart", [f"plugins=[{file}]"])
    assert sys.modules[file.stem].MENDED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py", "nowhere.py is no file"),
        ("no_such_module", "neither a file, nor a folder, nor a module"),
        ("json.py", "json is the name of an installed module as well"),
        ("two-words.py", "is no name of a Python module"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_refused(tmp_path: Path, name: str, message: str) -> None:
    if name in ("json.py", "two-words.py"):
        (tmp_path / name).write_text("")
        name = str(tmp_path / name)
    with pytest.raises(ConfigError, match=f"plugins: .*{message}"):
        load_config("quickstart", [f"plugins=[{name}]"])


@pytest.mark.slow
def test_a_configuration_brings_its_plugins_to_a_process_that_has_no_file_of_them(tmp_path: Path) -> None:
    """As Ray sends it to workers: what unpickles it has the plugin, and reads the same names from a file."""
    file = plugin(tmp_path, "travels", ADAPTER.format(name="travelled"))
    config = load_config("quickstart", [f"plugins=[{file}]", "model.adapter.kind=travelled"])
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    file.unlink()
    script = (
        "import pickle, sys, pathlib\n"
        "config = pickle.loads(pathlib.Path('config.pickle').read_bytes())\n"
        "from mowe_ray.model.adapter import ADAPTERS, build_adapter\n"
        "adapter = build_adapter(config.model.adapter.kind, 8, 8, 8, 2)\n"
        "print(type(adapter).__name__, sys.modules['travels'].__file__)\n"
        "assert type(config).model_validate(config.model_dump(mode='json')) == config\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MyAdapter", str(file)], done.stderr


@pytest.mark.slow
def test_a_configuration_without_plugins_does_not_import_the_model() -> None:
    script = (
        "import sys; from mowe_ray.config import load_config; load_config('quickstart'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_known_without_the_model_are_those_of_its_registries() -> None:
    from mowe_ray.config.keys import known_keys
    from mowe_ray.config.plugins import NameIn
    from mowe_ray.model.registry import Registry

    named = [part for key in known_keys().values() for part in key.field.metadata if isinstance(part, NameIn)]
    assert named
    for part in named:
        ours = {name for name, entry in Registry.by_key[part.key].items() if entry.__module__.startswith("mowe_ray.")}
        assert set(part.built_in) == ours


def test_a_sweep_adds_its_plugins_to_those_of_the_base(tmp_path: Path) -> None:
    of_base = plugin(tmp_path, "of_the_base", ADAPTER.format(name="adapter_of_base"))
    of_sweep = plugin(tmp_path, "of_the_sweep", ADAPTER.format(name="adapter_of_sweep"))
    base, sweep = tmp_path / "base.yaml", tmp_path / "sweep.yaml"
    base.write_text(f"preset: quickstart\nplugins: [{of_base}]\n")
    sweep.write_text(
        f"name: adapters\nquestion: Which?\nbase: {base}\nplugins: [{of_sweep}]\n"
        "space: {model.adapter.kind: {grid: [adapter_of_base, adapter_of_sweep]}}\n"
    )
    space = SearchSpace(load_sweep(sweep))
    configs = [space.config(point) for point in space.points()]
    assert [config.model.adapter.kind for config in configs] == ["adapter_of_base", "adapter_of_sweep"]
    assert {tuple(config.plugins) for config in configs} == {(str(of_base), str(of_sweep))}
