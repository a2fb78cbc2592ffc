"""Draw the course of a run, or of several over each other, on a page that needs nothing else; or a study's results.

python -m mowe_ray.report RUN [MORE ...] [--out FILE]
python -m mowe_ray.report STUDY

A run that goes on may be drawn too; its own page, RUN/report.html, is also written while it trains. That of several
runs goes to comparison.html in the first one's folder. The results of a study (report.html, results.csv, scores.csv,
best.yaml) are written again from what its folder holds. The last line on stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from mowe_ray.command_line import SUCCESS, log, make_parser, reject, run_and_print
from mowe_ray.evaluation.targets import folder_at
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.output.terminal import outlive_terminal
from mowe_ray.sweeping.report.results import ResultsWriter
from mowe_ray.sweeping.study import SWEEP_FILE, KeptStudy
from mowe_ray.training.run_records import read_run
from mowe_ray.training.run_report import PAGE, run_page


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 on success, 1 when the page cannot be written, 2 when a run is none.
    """
    arguments = _parser().parse_args(argv)
    try:
        folders = [folder_at(path) for path in arguments.runs]
        if len(folders) == 1 and folders[0].exists(SWEEP_FILE):
            results = ResultsWriter(KeptStudy.load(folders[0], log))
            return run_and_print(lambda: (results.write(), SUCCESS), {"study": arguments.runs[0]}, out)
        runs = [read_run(folder) for folder in folders]
        file = arguments.out or folders[0].path(PAGE if len(runs) == 1 else "comparison.html")
        name = file.rpartition("/")[2]
        if not name:
            raise ValueError(f"--out: {file} is a folder; name a file in it")
        target = folder_at(file.removesuffix(name) or ".")
    except ValueError as error:
        return reject(error)
    return run_and_print(lambda: (_write(target, name, run_page(runs)), SUCCESS), {"runs": arguments.runs}, out)


def _write(folder: RunFolder, name: str, html: str) -> dict[str, Any]:
    try:
        folder.write_text(name, html)
    except OSError as error:
        raise ValueError(f"--out: {folder.path(name)} cannot be written: {error}") from error
    return {"report": folder.path(name)}


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("report", __doc__, "")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or URL of a run, or of one study")
    parser.add_argument("--out", metavar="FILE", help="path or URL of the page")
    return parser


if __name__ == "__main__":
    outlive_terminal()
    sys.exit(main())
