"""Whether a folder can be written from every machine, and is one folder: all see what each of them wrote."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.preflight.findings import Finding, by_value, name_nodes


def write_probe(storage: str, probe: str, machine: str) -> None:
    """Leave a file named after this machine in the folder `probe` of `storage`."""
    RunFolder(storage, probe).write_text(f"{quote(machine, safe='')}.txt", machine)


def read_probes(storage: str, probe: str) -> list[str]:
    """Return whose files this machine can read."""
    folder = RunFolder(storage, probe)
    return [folder.read_text(name) for name in folder.names("") if name.endswith(".txt")]


def remove_probes(storage: str, probe: str) -> None:
    """Remove what the machines wrote."""
    RunFolder(storage, probe).remove("")


def judge_folder(
    key: str,
    storage: str,
    written: Mapping[str, str | None],
    seen: Mapping[str, list[str]],
    silent: Mapping[str, str],
) -> list[Finding]:
    """Compare what the machines wrote with what each of them sees.

    Args:
        key: Names the folder in the configuration.
        storage: The folder.
        written: Why a machine could not write, None where it could.
        seen: Whose files each machine has read.
        silent: Why others could not read.
    """
    findings = [
        Finding(
            "failed",
            f"{key}: {name_nodes(machines)} cannot write to {storage}: {reason}",
            f"{key}: choose a folder or URL that every node may write, or mount it there with write access",
        )
        for reason, machines in by_value({name: why for name, why in written.items() if why}).items()
    ] + [
        Finding(
            "failed",
            f"{key}: {name_nodes(machines)} cannot read {storage}: {reason}",
            f"{key}: choose a folder or URL that every node can read",
        )
        for reason, machines in by_value(silent).items()
    ]
    authors = {name for name, why in written.items() if why is None}
    # Machines that see the same authors look into the same folder, those that could not write among them.
    views = by_value({reader: "\n".join(sorted(authors & set(names))) for reader, names in seen.items()})
    if len(views) > 1:
        groups = " | ".join(name_nodes(readers) for readers in views.values())
        findings.append(
            Finding(
                "failed",
                f"{key}: {storage} is not one folder, these do not see each other's files: {groups}",
                f"{key}: a folder on shared storage, mounted at the same path on every node, or a URL (s3, gs, ...)",
            )
        )
    return findings
