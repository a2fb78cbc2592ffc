import io
import json
from pathlib import Path

import numpy as np
import pytest

from mowe_ray.data.cached_shards import write_features
from mowe_ray.prune import main


def test_what_is_over_a_limit_goes(tmp_path: Path) -> None:
    for name in "ab":
        write_features(str(tmp_path / "key" / f"{name}.arrow"), [([0], [np.zeros((1, 50, 10), np.uint16)])])
    out = io.StringIO()
    assert main([str(tmp_path), "--max-gb", "0"], out) == 0
    assert json.loads(out.getvalue())["removed"] == 2
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("arguments", [[], ["--max-gb", "-1"], ["--max-days", "nan"], ["--max-gb", "1"]])
def test_a_request_that_means_nothing_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    assert main([str(tmp_path), *arguments]) == 2
