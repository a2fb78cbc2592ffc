"""The image holds what the tests ran with, and a container of it finds what `ray up` gives it."""

import re
import shlex
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
INSTRUCTIONS = [
    re.sub(r"\s*\\\n\s*", " ", text)
    for text in re.findall(r"^[A-Z]+ (?:.*\\\n)*.*$", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M), flags=re.M)
]


def instructions(name):
    return [text.removeprefix(f"{name} ") for text in INSTRUCTIONS if text.startswith(f"{name} ")]


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_everything_it_copies_exists_and_is_let_through():
    sources = [source for text in instructions("COPY") for source in text.split()[:-1]]
    assert len(sources) == 8
    allowed = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in allowed
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed, source


def test_it_installs_the_dependencies_of_the_project_as_pinned():
    (install,) = [text for text in instructions("RUN") if "requirements.txt" in text]
    (script,) = re.findall(r"python -c '(.*?)' >", install)
    assert 'open("pyproject.toml", "rb")' in script
    assert '["project"]["dependencies"]' in script
    compile(script, "Dockerfile", "exec")
    assert "--constraint constraints.txt --requirement requirements.txt" in install
    assert "--no-deps --requirement cloud-requirements.txt" in install  # or they would change what is pinned
    assert install.endswith("pip check")
    (python,) = instructions("FROM")
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{required}").specifier.contains(re.search(r"python:(\d+\.\d+)-slim", python)[1])
    assert "(Python 3.11," in (ROOT / "constraints.txt").read_text()


def test_what_clouds_need_on_top_changes_no_pin():
    tested, added = pins(ROOT / "constraints.txt"), pins(ROOT / "cluster" / "cloud-requirements.txt")
    assert {name: pin for name, pin in added.items() if tested.get(name, pin) != pin} == {}
    assert int(tested["python-dateutil"].split(".")[0]) < 3  # botocore's bound
    assert {"s3fs", "gcsfs", "boto3", "google-api-python-client"} <= set(added)
    assert added["boto3"] == added["botocore"]
    assert added["s3fs"].rsplit(".", 1)[0] == tested["fsspec"].rsplit(".", 1)[0]  # s3fs takes its own fsspec only


def test_it_does_not_run_as_root_and_the_user_is_that_of_cloud_machines():
    assert instructions("USER") == ["mowe"]
    assert INSTRUCTIONS.index("USER mowe") > max(INSTRUCTIONS.index(f"RUN {text}") for text in instructions("RUN"))
    (uid,) = instructions("ARG")
    assert uid == "UID=1000"
    for cloud in ("aws", "gcp"):
        commands = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text())["initialization_commands"]
        assert any(command.startswith('[ "$(id -u)" = 1000 ]') for command in commands)


def test_the_token_lands_where_ray_looks_for_it():
    home = dict(text.split("=", 1) for text in instructions("ENV"))["HOME"]
    config = prepare_config(yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text()))
    command = docker_start_cmds(
        config["auth"]["ssh_user"],
        config["docker"]["image"],
        config["file_mounts"],
        config["docker"]["container_name"],
        config["docker"]["run_options"],
        config["cluster_name"],
        home,
        "docker",
    )
    words = shlex.split(command)
    mounts = [words[i + 1] for i, word in enumerate(words) if word == "-v"]
    assert [mount.partition(":")[2] for mount in mounts] == [f"{home}/.ray/auth_token"]
    assert f"--mode=0700 {home}/.ray" in DOCKERFILE  # else Docker would make the folder, as root
    assert words[words.index("RAY_AUTH_MODE=token") - 1 :][:2] == ["--env", "RAY_AUTH_MODE=token"]


def test_it_has_the_programs_that_ray_up_calls_in_a_container():
    (packages,) = [text for text in instructions("RUN") if "apt-get" in text]
    assert {"openssh-client", "rsync"} <= set(packages.split())
