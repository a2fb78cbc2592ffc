"""Every tracked file is well formed: what the hooks of other projects check, without fetching any."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BINARY = {".png"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.decode().split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def test_no_file_is_large() -> None:
    assert [str(path) for path in tracked() if path.stat().st_size > 512 * 1024] == []


def test_text_files_are_utf8_with_unix_lines_and_one_newline_at_the_end() -> None:
    bad = []
    for path in tracked():
        content = path.read_bytes()
        if path.suffix in BINARY or not content:
            continue
        content.decode("utf-8")
        if b"\r" in content or not content.endswith(b"\n") or content.endswith(b"\n\n"):
            bad.append(str(path))
    assert bad == []


def test_yaml_toml_and_json_parse() -> None:
    for path in tracked():
        text = "" if path.suffix in BINARY else path.read_text(encoding="utf-8")
        try:
            if path.suffix in {".yaml", ".yml", ".cff"}:
                list(yaml.safe_load_all(text))
            elif path.suffix == ".toml":
                tomllib.loads(text)
            elif path.suffix == ".json":
                json.loads(text)
        except (ValueError, yaml.YAMLError) as error:
            pytest.fail(f"{path}: {error}")


def test_the_citation_has_the_version_of_the_package() -> None:
    import mowe_ray

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mowe_ray.__version__
    assert f"## [{mowe_ray.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
