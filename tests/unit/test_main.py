"""The console script, and what is shipped beside the package."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mowe_ray import __version__
from mowe_ray.__main__ import COMMANDS, main
from mowe_ray.shipped import shipped

ROOT = Path(__file__).parents[2]


def test_every_command_can_be_named():
    modules = {
        file.stem for file in (ROOT / "mowe_ray").glob("*.py") if 'if __name__ == "__main__":' in file.read_text()
    }
    assert set(COMMANDS) == modules - {"__main__"}
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mowe-ray": "mowe_ray.__main__:main"}


def test_version_help_and_what_is_no_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mowe-ray {__version__}\n"
    assert main(["--help"]) == 0
    assert f"sweeps: {ROOT / 'sweeps'}\ncluster: {ROOT / 'cluster'}\n" in capsys.readouterr().out
    for arguments in ([], ["trian"]):
        assert main(arguments) == 2
        assert "train, sweep, evaluate" in capsys.readouterr().err
    assert shipped("nowhere") is None


@pytest.mark.slow
def test_it_becomes_the_command_and_ends_as_it_does():
    run = [sys.executable, "-m", "mowe_ray", "serve", "nowhere"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "neither a run nor an export" in done.stderr
