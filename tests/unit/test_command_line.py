"""What a command prints where, and with which exit code it ends."""

import io
import json
import os
import shlex
import subprocess
import sys

import pytest

from mowe_ray.command_line import FAILURE, USAGE_ERROR, run_and_print
from mowe_ray.config import ConfigError


def failing(error):
    def run():
        raise error

    return run


def test_the_result_is_one_line_of_json_and_the_code_is_handed_on(capsys):
    out = io.StringIO()
    assert run_and_print(lambda: ({"run": "a", "steps": 3}, 143), {}, out) == 143
    assert json.loads(out.getvalue()) == {"run": "a", "steps": 3}
    assert capsys.readouterr() == ("", "")


def test_a_failure_is_the_result_and_an_error_line(capsys):
    out = io.StringIO()
    assert run_and_print(failing(ValueError("data.train: no")), {"run": "a"}, out) == FAILURE
    assert json.loads(out.getvalue()) == {"run": "a", "error": "data.train: no"}
    assert capsys.readouterr().err == "error: data.train: no\n"


def test_a_wrong_request_has_no_result_line(capsys):
    out = io.StringIO()
    code = run_and_print(failing(ConfigError(["seed: no"])), {}, out, (ConfigError,))
    assert (code, out.getvalue()) == (USAGE_ERROR, "")
    assert capsys.readouterr().err == "seed: no\n"


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 3])
def test_a_result_that_nobody_can_read_is_a_failure_but_no_crash(code):
    """A supervisor takes a crash for a driver that died, and starts the finished run again."""
    script = f"""
import sys
from mowe_ray.command_line import log, print_result
from mowe_ray.output.terminal import outlive_terminal
outlive_terminal()
for line in range(20_000):
    log("somebody reads this no longer")
sys.exit(print_result({{"run": "a"}}, {code}))
"""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=write, stderr=write)
    os.close(write)
    os.close(read)
    assert process.wait(30) == (code or FAILURE)


@pytest.mark.slow
def test_lines_go_nowhere_when_standard_error_is_closed():
    script = "from mowe_ray.command_line import log, outlive_terminal; outlive_terminal(); log('a'); print('result')"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)} 2>&-"
    assert subprocess.run(command, shell=True, capture_output=True, check=True).stdout == b"result\n"


def test_errors_of_ours_are_not_hidden():
    with pytest.raises(KeyError):
        run_and_print(failing(KeyError("bug")), {}, io.StringIO())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sweep", "evaluate", "prepare", "preflight"])
def test_help_needs_neither_torch_nor_ray(command):
    code = f"import sys, mowe_ray.{command}; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
