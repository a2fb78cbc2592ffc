"""What cluster/README.md tells to type can be typed."""

import re
import shlex
from pathlib import Path

import pytest
from ray.scripts.scripts import cli

from mowe_ray.config import load_config

ROOT = Path(__file__).parents[3]
README = (ROOT / "cluster" / "README.md").read_text()


def commands():
    """Lines of the shell blocks, continued ones joined, as words without comments."""
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            code = re.sub(r"\s#.*", "", line)
            yield from (shlex.split(part) for part in re.split(r"&&|&\s*$", code) if part.strip())


RAY = [words for words in commands() if words[0] == "ray"]
TRAIN = [words[words.index("mowe_ray.train") + 1 :] for words in commands() if "mowe_ray.train" in words]


@pytest.mark.parametrize("words", RAY, ids=" ".join)
def test_ray_has_the_command_and_its_options(words):
    command, rest = cli, words[1:]
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(words[-1], rest)


def test_runs_are_told_what_they_understand_and_to_write_where_all_nodes_see_it():
    told = [words for words in TRAIN if words != ["..."]]
    assert len(told) == 3
    for flag, preset, *overrides in told:
        assert flag == "--config"
        assert load_config(preset, overrides).storage.startswith(("s3://", "/shared/", "/tmp/"))


def test_every_file_that_is_named_exists_and_every_file_is_named():
    folder = ROOT / "cluster"
    named = set(re.findall(r"(?:cluster/|`)([\w.-]+\.(?:yaml|json|sh|txt|md|py))", README)) | {"Dockerfile"}
    assert {name for name in named if not (folder / name).exists() and not (ROOT / name).exists()} == set()
    assert {path.name for path in folder.iterdir()} - named == {"README.md", "Dockerfile.dockerignore"}
