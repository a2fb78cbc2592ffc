"""Write a trained model in the form that other servers take.

python -m mowe_ray.export RUN_OR_EXPORT --split OUT

writes OUT/llm, a plain causal language model that vLLM, SGLang, TGI and llama.cpp load as any other, and OUT/front,
which makes prompt embeddings of waveforms and questions for it. docs/serving.md has examples. The last line on stdout
is the result as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from mowe_ray.command_line import SUCCESS, log, make_parser, reject, run_and_print
from mowe_ray.evaluation.model_card import CARD, card_of_part
from mowe_ray.evaluation.targets import Target, find_models
from mowe_ray.output.terminal import outlive_terminal


def main(argv: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments, by default the process's.
        out: Where the result goes, by default stdout.

    Returns:
        0 on success, 1 when the model cannot be read or written, 2 when the request was wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        (target,) = find_models([arguments.model])
        folder = Path(arguments.split)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--split: {folder} is not empty; name a new folder")
    except (OSError, ValueError) as error:
        return reject(ValueError(str(error)))
    return run_and_print(lambda: (_split(target, folder), SUCCESS), {"model": target.home}, out)


def _split(target: Target, folder: Path) -> dict[str, Any]:
    from mowe_ray.distributed.ray_data.batch_inference import local_copy  # imports torch and ray
    from mowe_ray.model import MoweForConditionalGeneration, MoweProcessor
    from mowe_ray.model.encoders import quiet_transformers
    from mowe_ray.model.export import export_split, open_exported

    export = local_copy(target.export)
    open_exported(export)  # all weights are there
    log(f"reading {target.export}")
    with quiet_transformers():
        model = MoweForConditionalGeneration.from_pretrained(export, dtype="auto").eval()
        export_split(model, MoweProcessor.from_pretrained(export), folder)
    card = Path(export) / CARD
    for part in ("llm", "front") if card.exists() else ():  # exports of old have none
        (folder / part / CARD).write_text(card_of_part(card.read_text(encoding="utf-8"), part), encoding="utf-8")
    return {"model": target.home, "llm": str(folder / "llm"), "front": str(folder / "front")}


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("export", __doc__, "")
    parser.add_argument("model", metavar="RUN_OR_EXPORT", help="a run with an export, or an export")
    parser.add_argument("--split", required=True, metavar="OUT", help="new folder for llm/ and front/")
    return parser


if __name__ == "__main__":
    outlive_terminal()
    sys.exit(main())
