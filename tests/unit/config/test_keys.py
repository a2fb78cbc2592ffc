"""`--help` names every key with its type, default and meaning."""

import re

from mowe_ray.config import render_help
from mowe_ray.config.keys import known_keys


def test_every_key_has_an_entry() -> None:
    text = render_help()
    entries = set(re.findall(r"^  ([\w.]+) = ", text, re.MULTILINE))
    headings = set(re.findall(r"^([\w.]+): ", text, re.MULTILINE))
    for key in known_keys().values():
        assert key.path.replace("*", "N") in (headings if key.section else entries)
        if key.section is None:
            assert key.field.description is not None
            assert key.field.description in re.sub(r"\s+", " ", text)


def test_lines_fit() -> None:
    assert max(map(len, render_help().splitlines())) < 100


def test_entries_show_type_default_and_limits() -> None:
    lines = render_help().splitlines()
    for line in [
        "  model.router.top_k = 1  (integer, > 0)",
        "  model.base_encoder = REQUIRED  (text | {config: {...}})",
        "  model.train_base = frozen  (frozen | full | lora)",
        "  resume = true  (true | false)",
        "  training.max_steps = null  (integer | null)",
        "  data.train.N.weight = 1.0  (number, > 0)",
        "  compute.zero_stage = 2  (integer, >= 0, <= 3)",
    ]:
        assert line in lines
