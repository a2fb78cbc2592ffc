"""One folder, written and read by all."""

from pathlib import Path

from mowe_ray.distributed.preflight.reachability import judge_folder, read_probes, remove_probes, write_probe


def look(folders: dict[str, Path]):
    """Let each machine write and read its own idea of the folder."""
    for machine, folder in folders.items():
        write_probe(str(folder), "probe", machine)
    seen = {machine: read_probes(str(folder), "probe") for machine, folder in folders.items()}
    for folder in folders.values():
        remove_probes(str(folder), "probe")
    return judge_folder("storage", "/runs", dict.fromkeys(folders), seen, {})


def test_all_see_the_same_folder(tmp_path: Path) -> None:
    assert look({"a": tmp_path, "b": tmp_path, "node 1/x": tmp_path}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_looks_elsewhere_is_named(tmp_path: Path) -> None:
    (finding,) = look({"a": tmp_path / "shared", "b": tmp_path / "own", "c": tmp_path / "shared"})
    assert finding.status == "failed"
    assert finding.detail == "storage: /runs is not one folder, these do not see each other's files: a, c | b"
    assert finding.fix.startswith("storage: ")


def test_a_machine_that_cannot_write_but_sees_the_rest(tmp_path: Path) -> None:
    write_probe(str(tmp_path), "probe", "a")
    seen = {machine: read_probes(str(tmp_path), "probe") for machine in ("a", "b")}
    (finding,) = judge_folder("storage", "/runs", {"a": None, "b": "Read-only file system"}, seen, {})
    assert finding.detail == "storage: b cannot write to /runs: Read-only file system"


def test_a_machine_that_cannot_read(tmp_path: Path) -> None:
    (finding,) = judge_folder("storage", "/runs", {"a": None}, {"a": ["a"]}, {"b": "no answer within 5 s"})
    assert finding.detail == "storage: b cannot read /runs: no answer within 5 s"
