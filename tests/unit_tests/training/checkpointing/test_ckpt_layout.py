"""Names of files and directories, the tracker, and what is recognised on disk."""

from pathlib import Path

import pytest
import torch

from megatron.core.errors import CheckpointError
from megatron.training import checkpointing
from megatron.training.checkpointing import layout


@pytest.mark.parametrize(
    ("stages", "experts", "expected"),
    [
        (False, False, "iter_0000012/mp_rank_03/model_optim_rng.pt"),
        (True, False, "iter_0000012/mp_rank_03_005/model_optim_rng.pt"),
        (False, True, "iter_0000012/mp_rank_03_007/model_optim_rng.pt"),
        (True, True, "iter_0000012/mp_rank_03_005_007/model_optim_rng.pt"),
    ],
)
def test_file_name_follows_from_model_parallel_ranks(stages: bool, experts: bool, expected: str):
    name = checkpointing.get_checkpoint_name(
        "dir", 12, False, stages, tensor_rank=3, pipeline_rank=5, expert_parallel=experts, expert_rank=7
    )
    assert name == f"dir/{expected}"
    beside = checkpointing.get_distributed_optimizer_checkpoint_name(name)
    assert beside == f"dir/{expected}".replace("model_optim_rng", "distrib_optim")


def test_file_names_of_a_single_process_and_of_a_release():
    assert checkpointing.get_checkpoint_name("d", 4) == "d/iter_0000004/mp_rank_00/model_optim_rng.pt"
    assert checkpointing.get_checkpoint_name("d", 0, release=True, return_base_dir=True) == "d/release"
    assert checkpointing.get_checkpoint_name("d", 12345678, return_base_dir=True) == "d/iter_12345678"
    assert checkpointing.get_checkpoint_tracker_filename("d") == "d/latest_checkpointed_iteration.txt"


@pytest.mark.parametrize("entry", ["mp_rank_00", "mp_rank_00_000", "mp_rank_00_000_000"])
def test_file_of_rank_0_is_found_under_every_layout(tmp_path: Path, entry: str):
    file = tmp_path / "iter_0000003" / entry / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    assert checkpointing.find_checkpoint_rank_0(str(tmp_path), 3) == str(file)
    assert checkpointing.find_checkpoint_rank_0(str(tmp_path), 4) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["metadata.json", "mp_rank_00/x"], "torch_dist"),
        (["mp_rank_00_001/x", ".metadata"], "torch"),
        ([".metadata"], "torch_dcp"),
        (["notes.txt"], None),
        ([], None),
    ],
)
def test_disk_format_follows_from_directory_entries(tmp_path: Path, files: list[str], expected: str | None):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert layout.disk_format(str(tmp_path)) == expected


def test_only_complete_checkpoints_are_recommended(tmp_path: Path):
    for iteration in (2, 4, 6):
        file = tmp_path / f"iter_{iteration:07d}" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"model": {}}, file)
    file.write_bytes(file.read_bytes()[:200])
    (tmp_path / "iter_0000008").mkdir()
    assert layout.complete_iterations(str(tmp_path)) == [2, 4]
    assert layout.saved_iterations(str(tmp_path)) == [2, 4, 6, 8]
    assert "--ckpt-step 2" in layout.advice_on_other_iterations(str(tmp_path), unusable=4)


@pytest.mark.parametrize(
    ("text", "expected"), [("4", (4, False)), (" 120\n", (120, False)), ("release", (0, True))]
)
def test_tracker_gives_iteration_and_release_flag(tmp_path: Path, text: str, expected: tuple[int, bool]):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert not checkpointing.checkpoint_exists(str(tmp_path))
    tracker.write_text(text)
    assert checkpointing.checkpoint_exists(str(tmp_path))
    assert checkpointing.read_metadata(str(tracker)) == expected


@pytest.mark.parametrize("content", [b"", b"0", b"-3", b"four", b"4.0", b"\xff\xfe", "²".encode()])
def test_invalid_tracker_is_an_error(tmp_path: Path, content: bytes):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(content)
    with pytest.raises(CheckpointError, match="positive iteration number or the word release"):
        checkpointing.read_metadata(str(tracker))
