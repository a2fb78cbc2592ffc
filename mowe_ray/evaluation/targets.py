"""Resolves RUN_OR_EXPORT to a model, and the folders that its evaluation is written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mowe_ray.data.shards.storage import content_fingerprint
from mowe_ray.output.run_folder import RunFolder

FOLDER = "evaluation"


@dataclass(frozen=True)
class Target:
    """A model to evaluate.

    Attributes:
        name: Of the run, or of the export's folder; unique among those of one evaluation.
        home: Folder or URL of the run, or of an export that is in none.
        export: Folder or URL of the export.
        config: The run's configuration; None without a run.
        history: Its training records with `step` and `routing`, oldest first.
        served_as: Name of the model at a server, whose address is `export`; its results go to the `home` of another.
    """

    name: str
    home: str
    export: str
    config: dict[str, Any] | None
    history: list[dict[str, Any]]
    served_as: str | None = None


def find_models(paths: Sequence[str], first_model: Callable[[str], str] | None = None) -> list[Target]:
    """Find the models, and give those of equal name a number.

    Args:
        paths: Runs, exports, and servers as URL or URL#MODEL.
        first_model: Returns the name of the first model of a server; None where there cannot be servers.

    Raises:
        ValueError: A path is neither a run with an export, nor an export.
    """
    targets: list[Target] = []
    for path in paths:
        if is_server(path) and first_model is not None:
            url, _, model = path.partition("#")
            model = model or first_model(url)
            home = targets[0].home if targets else ""
            target = Target(model.rpartition("/")[2], home, url.rstrip("/"), None, [], served_as=model)
        else:
            target = _find(path.rstrip("/"))
        same = sum(other.name.split("#")[0] == target.name for other in targets)
        targets.append(replace(target, name=f"{target.name}#{same + 1}") if same else target)
    return targets


def is_server(path: str) -> bool:
    """Whether an argument names a server, not a folder."""
    return path.startswith(("http://", "https://"))


def evaluation_folder(target: Target, out: str | None) -> RunFolder:
    """Return where a model's results go: below `out` if that is given, else beside the model."""
    default = f"{target.home}/{FOLDER}" + (f"/{target.name}" if target.served_as is not None else "")
    return folder_at(default if out is None else f"{out.rstrip('/')}/{target.name}")


def report_folder(targets: Sequence[Target], out: str | None) -> RunFolder:
    """Return where the report over all models goes."""
    return evaluation_folder(targets[0], None) if out is None else folder_at(out)


def check_baseline(targets: Sequence[Target], baseline: str | None) -> None:
    """Refuse a baseline that is none of the models.

    Raises:
        ValueError: Names the models.
    """
    names = [target.name for target in targets]
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline: there is no model {baseline!r}, only {', '.join(names)}")


def folder_at(path: str) -> RunFolder:
    """Return a folder by its full path or URL."""
    path = path.rstrip("/") or path[:1]
    if "://" not in path:
        path = str(Path(path).expanduser().absolute())
    storage, _, name = path.rpartition("/")
    return RunFolder(storage or "/", name)


# Weights, configurations, tokenizers and chat templates; the code in an export is not run.
_DECIDING = (".safetensors", ".json", ".jinja", ".model")


def export_version(export: RunFolder) -> dict[str, str]:
    """Return what identifies each file of an export that decides on its answers, by name."""
    names = (name for name in sorted(export.names("")) if name.endswith(_DECIDING))
    return {name: content_fingerprint(export.path(name)) for name in names}


def _find(path: str) -> Target:
    folder = folder_at(path)
    if folder.url.endswith("/export") and folder_at(folder.storage).exists("metrics.jsonl"):
        folder = folder_at(folder.storage)
    name = folder.url.rpartition("/")[2]
    if folder.exists("export/config.json"):
        config = folder.read_json("config.json") if folder.exists("config.json") else None
        return Target(name, folder.url, folder.path("export"), config, _history(folder))
    if folder.exists("config.json") and folder.read_json("config.json").get("model_type") == "mowe":
        return Target(name, folder.url, folder.url, None, [])
    if folder.exists("config.json"):
        raise ValueError(f"{path} holds a run without an export: it has not finished; run its command again")
    raise ValueError(f"{path} is neither a run nor an export: it has no config.json")


def _history(folder: RunFolder) -> list[dict[str, Any]]:
    records = folder.read_records("metrics.jsonl", "kind", "step")
    return [{"step": r["step"], "routing": r["routing"]} for r in records if r["kind"] == "train" and "routing" in r]
