"""Samples keep their counts when a run goes on with shards that were moved, renamed, reordered or cut anew."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mowe_ray.config.data_section import DataSection
from mowe_ray.data.index import Index
from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.ledger import keep_ids, load_ids
from mowe_ray.training.sampler import EpochSampler

Shards = dict[str, list[str]]
IDS = [f"clip-{n:02d}" for n in range(48)]
SHARDS: Shards = {"/d/0.tar": IDS[:16], "/d/1.tar": IDS[16:32], "/d/2.tar": IDS[32:]}


def index_of(*sources: Shards, paths: tuple[str, ...] = ("/d", "/e")) -> Index:
    """An index of shards with these ids; a clip has the same length wherever it is."""
    rows = [(s, shard, i) for s, shards in enumerate(sources) for shard, ids in shards.items() for i in ids]
    places = [(s, shard) for s, shards in enumerate(sources) for shard in shards]
    names = [f"train{s}:{paths[s]}" for s in range(len(sources))]
    lengths = [np.random.default_rng([*i.partition("#")[0].encode()]).uniform(0.5, 5) for _, _, i in rows]

    def labelled(codes: list[int], values: list[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(values, pa.string()))

    columns = {
        "id": pa.array([i for _, _, i in rows], pa.string()),
        "duration_s": pa.array(lengths, pa.float32()),
        "source": labelled([s for s, _, _ in rows], names),
        "shard": labelled([places.index((s, shard)) for s, shard, _ in rows], [shard for _, shard in places]),
    }
    return Index(pa.table(columns), names, [])


class Run:
    """A run of one epoch that is stopped and goes on, with a folder of its own."""

    def __init__(self, folder: Path, weights: tuple[float, ...] = (1.0,)):
        self.folder = RunFolder(str(folder), "run")
        limits = {"max_duration_s": 5, "batch_seconds": 12, "max_batch_size": 4, "shuffle_buffer": 32}
        self.data = DataSection(train=[{"path": "x", "weight": w} for w in weights], **limits)
        self.state: dict | None = None
        self.times: Counter[tuple[int, str]] = Counter()

    def go_on(self, index: Index, steps: int | None = None) -> EpochSampler:
        keep_ids(self.folder, index)
        load = partial(load_ids, self.folder)
        order = EpochSampler(
            index, self.data, seed=1, micro_batches_per_step=2, epochs=1, state=self.state, load_ids=load
        )
        ids, sources = index.table["id"].to_pylist(), index.sources
        for planned in islice(order, steps):
            for row in np.concatenate(planned.micro_batches).tolist():
                self.times[int(sources[row]), ids[row]] += 1
            order.advance(planned)
        self.state = json.loads(json.dumps(order.snapshot()()))
        return order


def reshuffled(seed: int = 0) -> Shards:
    ids = np.random.default_rng(seed).permutation(IDS).tolist()
    return {"/d/0.tar": ids[:16], "/d/1.tar": ids[16:32], "/d/2.tar": ids[32:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"/new/0.tar": IDS[:16], "/new/1.tar": IDS[16:32], "/new/2.tar": IDS[32:]}, "48 samples moved, 0 new, 0 gone"),
        ({"/d/0.tar": IDS[:16], "/d/2.tar": IDS[32:], "/d/x.tar": IDS[16:32]}, "16 samples moved, 0 new, 0 gone"),
        ({"/d/0.tar": IDS[16:32], "/d/1.tar": IDS[:16], "/d/2.tar": IDS[32:]}, "32 samples moved, 0 new, 0 gone"),
        ({**SHARDS, "/d/1.tar": IDS[16:32][::-1]}, "16 samples moved, 0 new, 0 gone"),
        (reshuffled(), "48 samples moved, 0 new, 0 gone"),
        ({f"/d/{n}.tar": IDS[8 * n : 8 * n + 8] for n in range(6)}, "48 samples moved, 0 new, 0 gone"),
        ({"/d/all.parquet": IDS}, "48 samples moved, 0 new, 0 gone"),
        ({**SHARDS, "/d/3.tar": ["a", "b"]}, "0 samples moved, 2 new, 0 gone; in /d/3.tar"),
        ({**SHARDS, "/d/0.tar": IDS[1:16]}, "15 samples moved, 0 new, 1 gone"),
        ({**SHARDS, "/d/1.tar": [f"{i}-new" for i in IDS[16:32]]}, "0 samples moved, 16 new, 16 gone"),
        ({"/d/0.tar": IDS[:16], "/d/2.tar": IDS[32:]}, "0 samples moved, 0 new, 16 gone"),
    ],
)
def test_every_sample_is_trained_once_whatever_became_of_its_shard(tmp_path: Path, after: Shards, told: str) -> None:
    for stop in (0, 3, 5):
        run = Run(tmp_path / str(stop))
        run.go_on(index_of(SHARDS), stop)
        trained = {i for _, i in run.times}
        order = run.go_on(index_of(after))
        there = {i for ids in after.values() for i in ids}
        assert {i for _, i in run.times} == trained | there
        assert set(run.times.values()) == {1}
        assert told in str(order.changes)
        assert f"({len(trained - there)} trained in this epoch)" in str(order.changes) or "0 gone" in told
        assert run.go_on(index_of(after)).changes is None


def test_whole_passes_and_parts_of_two_sources_are_kept(tmp_path: Path) -> None:
    other = {"/e/0.tar": [f"e{n}" for n in range(20)]}
    run = Run(tmp_path, (2.0, 0.5))
    run.go_on(index_of(SHARDS, other), 6)
    cut = {f"/e/{n}.tar": [f"e{2 * m + n}" for m in range(10)] for n in range(2)}
    run.go_on(index_of(reshuffled(), cut), 4)
    run.go_on(index_of(reshuffled(3), other))
    assert {run.times[0, i] for i in IDS} == {2}
    assert sum(run.times[1, i] for i in other["/e/0.tar"]) == 10
    assert max(run.times[1, i] for i in other["/e/0.tar"]) == 1


def test_equal_ids_of_two_sources_are_two_samples(tmp_path: Path) -> None:
    run = Run(tmp_path, (1.0, 1.0))
    run.go_on(index_of(SHARDS, {"/e/0.tar": IDS}), 5)
    run.go_on(index_of(reshuffled(), {"/e/0.tar": IDS[::-1]}))
    assert run.times == Counter({(source, i): 1 for source in range(2) for i in IDS})


def test_shards_that_are_away_for_a_while_are_not_trained_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go_on(index_of(SHARDS), 4)
    run.go_on(index_of({"/d/0.tar": IDS[:16]}), 1)
    run.go_on(index_of({"/d/0.tar": IDS[1:16]}), 0)
    order = run.go_on(index_of({"/d/0.tar": IDS[:16], "/d/1.tar": IDS[16:32], "/d/4.tar": IDS[32:][::-1]}))
    assert run.times == Counter({(0, i): 1 for i in IDS})
    assert "/d/1.tar" in str(order.changes)


def test_the_next_epoch_forgets_what_is_gone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go_on(index_of(SHARDS), 4)
    run.go_on(index_of({"/d/0.tar": IDS[:16]}))
    assert run.state is not None
    assert run.state["absent"]
    order = EpochSampler(
        index_of({"/d/0.tar": IDS[:16]}), run.data, seed=1, micro_batches_per_step=2, epochs=2, state=run.state
    )
    order.advance(next(iter(order)))
    assert order.snapshot()()["absent"] == []


@pytest.mark.slow
def test_the_lists_of_ids_are_written_once_and_short(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ids = [f"speaker-{n // 100:05d}-{n:08d}" for n in range(40_000)]
    index = index_of({f"/d/{n}.tar": ids[1000 * n : 1000 * n + 1000] for n in range(40)})
    for _ in range(2):
        run.go_on(index, 2)
    (file,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert file.stat().st_size < 4 * len(ids)
    assert len(json.dumps(run.state)) < 40 * 100 + 60 * sum(map(len, run.state["trained"].values())) + 2000


def renamed_parquet() -> tuple[Shards, Shards]:
    before = {f"/d/{name}.parquet": [f"{name}:0:{n}" for n in range(24)] for name in "ab"}
    return before, {"/d/a.parquet": before["/d/a.parquet"], "/d/c.parquet": [f"c:0:{n}" for n in range(24)]}


def cut_manifest() -> tuple[Shards, Shards]:
    return {"/d/m.jsonl": [f"m.jsonl:{n}" for n in range(48)]}, {"/d/m.jsonl": [f"m.jsonl:{n}" for n in range(47)]}


def moved_audio() -> tuple[Shards, Shards]:
    return tuple({"/d/m.jsonl": [f"/{folder}/{i}.wav" for i in IDS]} for folder in ("old", "new"))  # type: ignore[return-value]


def ids_twice() -> tuple[Shards, Shards]:
    before = {"/d/0.tar": IDS[:24], "/d/1.tar": [f"{i}#2" for i in IDS[:24]]}
    return before, {"/d/0.tar": [*IDS[:23], f"{IDS[0]}#2"], "/d/1.tar": [IDS[23], *(f"{i}#2" for i in IDS[1:24])]}


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (renamed_parquet, "/d/b.parquet is not what the checkpoint counted.*no ids, only places such as b:0:"),
        (cut_manifest, r"/d/m.jsonl is not what .*only places such as m.jsonl:"),
        (moved_audio, r"/d/m.jsonl is not .*/old/clip-\d\d.wav may be /new/clip-\d\d.wav"),
        (ids_twice, r"/d/0.tar is not what .*several of its samples have the id clip-\d\d"),
    ],
)
def test_where_ids_do_not_suffice_the_shard_is_named(tmp_path: Path, made: Callable, why: str) -> None:
    before, after = made()
    run = Run(tmp_path)
    run.go_on(index_of(before), 4)
    with pytest.raises(ValueError, match=why + ".*Put it back as it was, or choose another name"):
        run.go_on(index_of(after))
    run.go_on(index_of(before))
    assert set(run.times.values()) == {1}
    assert len(run.times) == 48


def test_shards_without_ids_may_move_as_they_are_and_go(tmp_path: Path) -> None:
    before, _ = renamed_parquet()
    run = Run(tmp_path)
    run.go_on(index_of(before), 3)
    run.go_on(index_of({path.replace("/d/", "/moved/"): ids for path, ids in before.items()}), 1)
    run.go_on(index_of({"/moved/a.parquet": before["/d/a.parquet"]}))
    assert set(run.times.values()) == {1}
    assert {i for _, i in run.times} >= set(before["/d/a.parquet"])


def test_ids_that_were_numbered_by_their_owner_are_ids(tmp_path: Path) -> None:
    ids = [f"talk{n // 4}#{n % 4}" for n in range(48)]
    run = Run(tmp_path)
    run.go_on(index_of({"/d/0.tar": ids}), 4)
    run.go_on(index_of({"/d/0.tar": ids[::-1]}))
    assert run.times == Counter({(0, i): 1 for i in ids})


def test_another_corpus_is_refused_and_its_key_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go_on(index_of(SHARDS), 4)
    other = {"/e/0.tar": [f"other-{n}" for n in range(9)]}
    with pytest.raises(ValueError, match=r"data.train.0.path: none of the 48 samples of /d is in /e: choose another"):
        run.go_on(index_of(other, paths=("/e",)))


def test_without_the_list_of_ids_only_shards_as_they_were_are_found(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go_on(index_of(SHARDS), 4)
    run.folder.remove("checkpoints")
    with pytest.raises(ValueError, match=r"/d/0.tar is not .*checkpoints/samples-.*, which lists its samples, is gone"):
        run.go_on(index_of(reshuffled()))
    run.folder.remove("checkpoints")
    run.go_on(index_of({path.replace("/d/", "/e/"): ids for path, ids in SHARDS.items()}))
    assert run.times == Counter({(0, i): 1 for i in IDS})


def test_a_checkpoint_of_an_earlier_version_goes_on_by_place(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go_on(index_of(SHARDS), 4)
    for key in ("plan", "shards", "sources", "ids", "absent"):
        del run.state[key]
    old = json.loads(json.dumps(run.state))
    assert run.go_on(index_of(SHARDS)).changes is None
    assert run.times == Counter({(0, i): 1 for i in IDS})
    for changed, why in (
        ({path: ids[:3] for path, ids in SHARDS.items()}, "it has fewer samples now"),
        ({"/e/0.tar": IDS}, "it is gone, like all others"),
    ):
        run.state = old
        with pytest.raises(ValueError, match=why):
            run.go_on(index_of(changed))
