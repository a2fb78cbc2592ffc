"""Checkpoints, written and read by ranks that are threads: any number reads what any number wrote."""

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mowe_ray.output.run_folder import RunFolder
from mowe_ray.training.checkpoint.layout import (
    commit_file,
    committed_steps,
    copy_checkpoint_from,
    load_json,
    saved_steps,
    store_json,
)
from mowe_ray.training.checkpoint.reader import Checkpoint, TensorSlice, newest_checkpoint
from mowe_ray.training.checkpoint.writer import CheckpointWriter
from tests.thread_ranks import on_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


class Group:
    """Writers of one life of a run, and what they and the readers said."""

    def __init__(self, folder: RunFolder, world_size: int, *, keep: int = 10, timeout_s: float = 30.0):
        self.said: list[str] = []
        self.world_size = world_size
        self.writers = on_ranks(
            world_size,
            lambda ranks: CheckpointWriter(folder, ranks, keep=keep, timeout_s=timeout_s),
            self.said.append,
        )

    def start(self, step: int, tensors: dict[str, torch.Tensor], *, ranks: range | None = None, **state: Any) -> None:
        for rank in ranks or range(self.world_size):
            self.writers[rank].save(
                step, cut(tensors, rank, self.world_size), lambda: {"position": step * 100, **state}
            )

    def save(self, step: int, tensors: dict[str, torch.Tensor], **state: Any) -> bool:
        self.start(step, tensors, **state)
        return all(writer.wait(30) for writer in self.writers)


def cut(tensors: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, TensorSlice]:
    """The slices of `rank`; unequal, and none of small tensors for some ranks."""
    slices = {}
    for name, tensor in tensors.items():
        bounds = [(tensor.numel() * i * i) // world_size**2 for i in range(world_size + 1)]
        start, stop = bounds[rank], bounds[rank + 1]
        if stop > start or (tensor.numel() == 0 and rank == 0):
            data = tensor.reshape(-1)[start:stop].clone()
            slices[name] = TensorSlice(data, start, tuple(tensor.shape))
    return slices


def load(folder: RunFolder, world_size: int = 2) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint together; returns what rank 0 got, and what was said."""
    said: list[str] = []
    found = on_ranks(
        world_size,
        lambda ranks: newest_checkpoint(folder, ranks),
        said.append,
    )
    assert len({None if c is None else c.step for c in found}) == 1
    return found[0], said


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "matrix": torch.randn(37, 11),
        "vector": torch.randn(5),
        "scalar": torch.randn(()),
        "half": torch.randn(9, 3).bfloat16(),
        "count": torch.arange(7) + seed,
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
    }


def assert_holds(checkpoint: Checkpoint | None, step: int, tensors: dict[str, torch.Tensor]) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state["position"] == step * 100
    for name, tensor in tensors.items():
        assert checkpoint.shapes[name] == tuple(tensor.shape)
        whole = checkpoint.read(name, 0, tensor.numel()).view(tensor.shape)
        assert torch.equal(whole, tensor), name
        assert whole.dtype == tensor.dtype or not tensor.numel()


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """A run folder on the disk, and one in an object store."""
    return RunFolder(str(tmp_path) if request.param == "disk" else f"memory://{uuid.uuid4().hex}", "run")


@pytest.fixture
def disk(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path), "run")


def step_path(folder: RunFolder, step: int) -> Path:
    return Path(folder.path(f"checkpoints/step-{step:08d}"))


# ---- whole ------------------------------------------------------------------------------------


def test_a_new_run_has_no_checkpoint(folder: RunFolder) -> None:
    assert load(folder) == (None, [])


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_number_wrote(folder: RunFolder, writers: int) -> None:
    tensors = make_tensors()
    group = Group(folder, writers)
    assert group.save(40, tensors, nested={"a": [1, 2.5, None]})
    assert group.said == []
    for readers in (1, 2, 4):
        checkpoint, said = load(folder, readers)
        assert said == []
        assert_holds(checkpoint, 40, tensors)
        assert checkpoint is not None
        assert checkpoint.state["nested"] == {"a": [1, 2.5, None]}


@pytest.mark.slow
def test_every_stretch_equals_plain_slicing(disk: RunFolder) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for step in range(1, 9):
        tensors = {
            f"tensor{i}": torch.randint(-9, 9, (draw(1, 40), draw(1, 9)), generator=generator).to(DTYPES[draw(0, 4)])
            for i in range(4)
        }
        assert Group(disk, draw(1, 7)).save(step, tensors)
        checkpoint, _ = load(disk, 1)
        assert checkpoint is not None
        for name, tensor in tensors.items():
            for _ in range(30):
                start = draw(0, tensor.numel() + 1)
                stop = draw(start, tensor.numel() + 1)
                assert torch.equal(checkpoint.read(name, start, stop), tensor.reshape(-1)[start:stop])


def test_what_a_checkpoint_does_not_have_is_an_error(disk: RunFolder) -> None:
    Group(disk, 2).save(1, make_tensors())
    checkpoint, _ = load(disk)
    assert checkpoint is not None
    with pytest.raises(ValueError, match=r"has no element 5 of vector.*name"):
        checkpoint.read("vector", 3, 6)
    with pytest.raises(ValueError, match="has no element 0 of unknown"):
        checkpoint.read("unknown", 0, 1)


def test_nothing_is_pickled(disk: RunFolder) -> None:
    assert Group(disk, 2).save(40, make_tensors())
    files = sorted(path.name for path in step_path(disk, 40).iterdir())
    expected = [f"rank-0000{rank}-of-00002.{suffix}" for rank in (0, 1) for suffix in ("json", "safetensors")]
    assert files == ["checkpoint.json", *expected, "slices.parquet"]
    commit = json.loads((step_path(disk, 40) / "checkpoint.json").read_text())
    assert {key: commit[key] for key in ("format", "step", "world_size", "state")} == {
        "format": 1,
        "step": 40,
        "world_size": 2,
        "state": {"position": 4000},
    }
    for file in commit["files"]:
        assert file["bytes"] == (step_path(disk, 40) / file["name"]).stat().st_size


@pytest.mark.slow
def test_saving_returns_before_the_checkpoint_is_there(disk: RunFolder) -> None:
    group = Group(disk, 2)
    large = {"large": torch.randn(20_000_000)}
    slices = [cut(large, rank, 2) for rank in (0, 1)]
    for rank in (0, 1):
        group.writers[rank].save(1, slices[rank], lambda: {"position": 100})
    assert committed_steps(disk) == []
    assert all(writer.wait(60) for writer in group.writers)
    assert_holds(load(disk)[0], 1, large)


@pytest.mark.slow
def test_the_next_save_waits_for_the_one_before(folder: RunFolder) -> None:
    group = Group(folder, 3)
    many = {step: make_tensors(step) for step in range(1, 6)}
    with ThreadPoolExecutor(3) as ranks:  # each rank goes on as soon as its own `save` returns

        def save_all(rank: int) -> None:
            for step, tensors in many.items():
                group.writers[rank].save(step, cut(tensors, rank, 3), lambda step=step: {"position": step * 100})

        list(ranks.map(save_all, range(3)))
    assert all(writer.wait(30) for writer in group.writers)
    assert committed_steps(folder) == [1, 2, 3, 4, 5]
    assert_holds(load(folder)[0], 5, many[5])


@pytest.mark.slow
def test_a_checkpoint_needs_all_ranks(folder: RunFolder) -> None:
    group = Group(folder, 3, timeout_s=20)
    group.start(10, make_tensors(), ranks=range(2))
    assert not group.writers[0].wait(1.0)
    assert not group.writers[1].wait(0.2)
    assert committed_steps(folder) == []
    group.start(10, make_tensors(), ranks=range(2, 3))
    assert all(writer.wait(30) for writer in group.writers)
    assert_holds(load(folder)[0], 10, make_tensors())


@pytest.mark.slow
def test_rank_zero_does_not_wait_for_ever(folder: RunFolder) -> None:
    group = Group(folder, 2, timeout_s=0.5)
    group.save(10, make_tensors())
    group.start(20, make_tensors(), ranks=range(1))
    assert not group.writers[0].wait(30)
    (said,) = group.said
    assert said == (
        "warning: checkpoint at step 20 failed: rank 1 has not written its part within 0.5 s; the newest is step 10"
    )
    with pytest.raises(ValueError, match=r"step 20 .* rank 1 has not written .*another storage"):
        group.writers[0].wait(0, insist=True)
    group.start(20, make_tensors(), ranks=range(1, 2))  # too late
    with pytest.raises(ValueError, match=r"step 20 .* rank 1 has not written"):
        group.writers[1].wait(30, insist=True)
    assert [name for name in folder.names("checkpoints/step-00000020") if not name.endswith(".json")] == []
    assert len(group.said) == 1
    assert_holds(load(folder)[0], 10, make_tensors())


def test_only_the_newest_are_kept(folder: RunFolder) -> None:
    group = Group(folder, 2, keep=2)
    for step in (10, 20, 30, 40):
        assert group.save(step, make_tensors(step))
    group.writers[0].wait(10)
    assert saved_steps(folder) == [30, 40]
    assert_holds(load(folder)[0], 40, make_tensors(40))


def test_a_step_that_is_saved_again_is_left_alone(folder: RunFolder) -> None:
    assert Group(folder, 2).save(10, make_tensors(1))
    group = Group(folder, 3)
    assert group.save(10, make_tensors(2))
    assert group.said == []
    assert_holds(load(folder)[0], 10, make_tensors(1))


class Opened(RunFolder):
    """A run folder that notes which files are read."""

    def __init__(self, storage: str, name: str):
        super().__init__(storage, name)
        self.files: set[str] = set()

    def read_bytes(self, file: str) -> bytes:
        self.files.add(file)
        return super().read_bytes(file)

    def fetch(self, file: str, local: Path) -> None:
        self.files.add(file)
        super().fetch(file, local)


@pytest.mark.slow
def test_a_rank_opens_three_files_besides_its_own_data() -> None:
    """It read the report of every rank: at 1,000 of them, 1,001 files each."""
    storage, tensors = f"memory://{uuid.uuid4().hex}", {"weight": torch.randn(12, 100)}
    assert Group(RunFolder(storage, "run"), 12).save(40, tensors)
    folders = [Opened(storage, "run") for _ in range(12)]

    def restore(ranks: Any) -> None:
        checkpoint = newest_checkpoint(folders[ranks.rank], ranks)
        assert checkpoint is not None
        mine = cut(tensors, ranks.rank, 12).get("weight")
        if mine is not None:
            stop = mine.start + mine.data.numel()
            assert torch.equal(checkpoint.read("weight", mine.start, stop), mine.data)

    on_ranks(12, restore, print)
    for folder in folders:
        assert len({file for file in folder.files if not file.endswith(".safetensors")}) == 3
        assert sum(file.endswith(".safetensors") for file in folder.files) == 1


@pytest.mark.slow
def test_checkpoints_without_a_table_are_read_from_the_reports(folder: RunFolder) -> None:
    assert Group(folder, 3).save(40, make_tensors())
    commit = load_json(folder, commit_file(40))
    del commit["slices"]  # as before 0.2
    store_json(folder, commit_file(40), commit)
    folder.remove("checkpoints/step-00000040/slices.parquet")
    checkpoint, said = load(folder, 2)
    assert said == []
    assert_holds(checkpoint, 40, make_tensors())


# ---- what other lives left --------------------------------------------------------------------


@pytest.mark.slow
def test_files_of_another_life_are_not_taken_for_ours(folder: RunFolder) -> None:
    old = Group(folder, 2, timeout_s=20)
    old.start(10, make_tensors(1), ranks=range(1, 2))  # rank 1 wrote its part, and then the run died
    old.writers[1].wait(0.5)
    group = Group(folder, 2, timeout_s=20)
    group.start(10, make_tensors(2), ranks=range(1))
    assert not group.writers[0].wait(1.0)
    group.start(10, make_tensors(2), ranks=range(1, 2))
    assert all(writer.wait(30) for writer in group.writers)
    assert_holds(load(folder)[0], 10, make_tensors(2))


@pytest.mark.slow
def test_a_part_of_another_number_of_ranks_does_no_harm(folder: RunFolder) -> None:
    old = Group(folder, 3, timeout_s=20)
    old.start(10, make_tensors(1), ranks=range(1, 3))
    old.writers[2].wait(0.5)
    assert Group(folder, 2).save(10, make_tensors(2))
    assert_holds(load(folder)[0], 10, make_tensors(2))


@pytest.mark.slow
def test_resuming_removes_what_was_never_finished(folder: RunFolder) -> None:
    group = Group(folder, 2, timeout_s=20)
    assert group.save(10, make_tensors())
    group.start(20, make_tensors(), ranks=range(1, 2))
    group.writers[1].wait(0.5)
    checkpoint, said = load(folder)
    assert_holds(checkpoint, 10, make_tensors())
    assert said == [f"warning: {folder.path('checkpoints/step-00000020')} is not used: it was never finished"]
    assert saved_steps(folder) == [10]


@pytest.mark.slow
def test_a_run_that_died_in_its_first_save_starts_again(folder: RunFolder) -> None:
    group = Group(folder, 2, timeout_s=20)
    group.start(20, make_tensors(), ranks=range(1, 2))
    group.writers[1].wait(0.5)
    checkpoint, said = load(folder)
    assert checkpoint is None
    assert len(said) == 1
    assert saved_steps(folder) == []


# ---- damage -----------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00 no")


DAMAGES = [
    pytest.param(file, damage, id=f"{file.split('.')[0].split('-')[0]}-{file.rsplit('.')[-1]}-{damage.__name__}")
    for file in ("checkpoint.json", "rank-00001-of-00002.json", "rank-00001-of-00002.safetensors", "slices.parquet")
    for damage in (flip_a_byte, halve, fill_with_garbage, Path.unlink)
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "damage"), DAMAGES)
@pytest.mark.parametrize("readers", [1, 3])
def test_a_damaged_checkpoint_is_passed_over(disk: RunFolder, file: str, damage: Any, readers: int) -> None:
    group = Group(disk, 2)
    for step in (10, 20, 30):
        assert group.save(step, make_tensors(step))
    damage(step_path(disk, 30) / file)
    checkpoint, said = load(disk, readers)
    assert_holds(checkpoint, 20, make_tensors(20))
    (warning,) = said
    assert warning.startswith(f"warning: {step_path(disk, 30)} is not used: ")
    assert saved_steps(disk) == [10, 20]
    # The steps are trained and saved again.
    assert Group(disk, 3).save(30, make_tensors(31))
    assert_holds(load(disk)[0], 30, make_tensors(31))


@pytest.mark.slow
def test_a_damaged_byte_anywhere_is_noticed(disk: RunFolder) -> None:
    assert Group(disk, 1).save(10, {"small": torch.arange(6)})
    for path in step_path(disk, 10).iterdir():
        content = path.read_bytes()
        for i in range(len(content)):
            path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            with pytest.raises(ValueError, match="none of the checkpoints"):
                load(disk, 1)
        path.write_bytes(content)
    assert_holds(load(disk)[0], 10, {"small": torch.arange(6)})


@pytest.mark.slow
def test_a_half_copied_folder_is_passed_over(disk: RunFolder) -> None:
    group = Group(disk, 2)
    for step in (10, 20):
        assert group.save(step, make_tensors(step))
    other = step_path(disk, 10) / "rank-00000-of-00002.json"
    (step_path(disk, 20) / "rank-00000-of-00002.json").write_bytes(other.read_bytes())
    checkpoint, said = load(disk)
    assert_holds(checkpoint, 10, make_tensors(10))
    assert "rank-00000 is of another save" in said[0]


def test_if_all_are_damaged_the_run_does_not_start_over(disk: RunFolder) -> None:
    group = Group(disk, 2)
    for step in (10, 20):
        assert group.save(step, make_tensors(step))
        flip_a_byte(step_path(disk, step) / "rank-00000-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* is whole: .* name"):
        load(disk)
    assert saved_steps(disk) == [10, 20]


def test_another_format_is_refused_and_kept(disk: RunFolder) -> None:
    assert Group(disk, 1).save(10, make_tensors())
    store_json(disk, commit_file(10), load_json(disk, commit_file(10)) | {"format": 2})
    with pytest.raises(ValueError, match="another version"):
        load(disk)
    assert committed_steps(disk) == [10]


# ---- a full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(small_disk: Path, full_rank: int) -> None:
    folder = RunFolder(str(small_disk), "run")
    group = Group(folder, 2)
    small, large = {"small": torch.randn(1000)}, {"large": torch.randn(150_000)}
    assert group.save(20, small)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_800_000))

    began = time.monotonic()
    for rank in (0, 1):  # only one rank's part does not fit
        group.writers[rank].save(40, cut(large if rank == full_rank else small, 0, 1), lambda: {"position": 4000})
    assert [writer.wait(30) for writer in group.writers] == [False, False]
    assert time.monotonic() - began < 10  # rank 0 was told, and did not wait for its timeout
    (said,) = group.said
    assert said.startswith("warning: checkpoint at step 40 failed: ")
    assert "No space left on device" in said
    assert said.endswith("; the newest is step 20")
    for writer in group.writers:
        with pytest.raises(ValueError, match=r"step 40 .*No space left on device.*another storage"):
            writer.wait(0, insist=True)
    assert not [path for path in step_path(folder, 40).iterdir() if path.suffix != ".json"]

    ballast.unlink()
    assert group.save(40, large)  # the same step again
    assert group.save(60, small)
    assert all(writer.wait(0, insist=True) for writer in group.writers)
    assert len(group.said) == 1
    assert saved_steps(folder) == [20, 40, 60]
    assert_holds(load(folder)[0], 60, small)


def test_after_a_full_disk_the_checkpoint_before_loads(small_disk: Path) -> None:
    folder = RunFolder(str(small_disk), "run")
    group = Group(folder, 2)
    assert group.save(20, make_tensors())
    assert not group.save(40, {"large": torch.randn(800_000)})
    checkpoint, said = load(folder, 3)
    assert_holds(checkpoint, 20, make_tensors())
    assert len(said) == 1
    assert saved_steps(folder) == [20]


def test_a_storage_that_is_gone_does_not_end_training(disk: RunFolder) -> None:
    group = Group(disk, 1)
    assert group.save(10, make_tensors())
    checkpoints = Path(disk.path("checkpoints"))
    checkpoints.rename(checkpoints.with_name("moved"))
    checkpoints.write_text("a file where the folder was")
    assert not group.save(20, make_tensors())
    assert len(group.said) == 1
    checkpoints.unlink()
    checkpoints.with_name("moved").rename(checkpoints)
    assert group.save(30, make_tensors())
    assert_holds(load(disk)[0], 30, make_tensors())


# ---- copies -----------------------------------------------------------------------------------


def test_a_run_adopts_the_checkpoint_of_another_in_place_of_its_own(tmp_path: Path):
    donor, own = RunFolder(str(tmp_path), "donor"), RunFolder(str(tmp_path), "own")
    tensors, others = make_tensors(1), make_tensors(2)
    for step in (4, 8):
        assert Group(donor, 3).save(step, tensors)
    for step in (4, 12):
        assert Group(own, 2).save(step, others)
    own.write_text("validating/step-00000004/pending.json", "{}")
    copy_checkpoint_from(own, donor, 8)
    assert not own.exists("validating"), "its weights are no part of the run any more"
    assert committed_steps(own) == [8]
    assert committed_steps(donor) == [4, 8]
    checkpoint, said = load(own)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state["position"]) == (8, 800)
    assert not [line for line in said if "damaged" in line]
