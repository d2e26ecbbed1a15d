"""Saving from all ranks: what a failure on one rank leaves behind, and which rank writes which file."""

import argparse
import errno
import os
import random
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError
from megatron.training import checkpointing
from megatron.training.checkpointing import durable, layout, model_args, publishing
from megatron.training.shared_storage import lowest_rank_that_shares
from tests.distributed.pool import run_ranks


def write(directory: str, iteration: int, value: int, failing: str = "", **sizes: int) -> str:
    """Save a number per rank; ``failing`` is the step that fails on the last rank. Returns the error."""
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(**sizes)
    name = layout.get_checkpoint_name(directory, iteration)
    state = {"model": value, "rank": torch.distributed.get_rank()}
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    broken = mock.patch.object(torch, "save", refuse) if failing and last else mock.MagicMock()
    with broken:
        try:
            publishing.write_together(state, None, directory, iteration, name)
        except CheckpointError as error:
            return str(error)
    return ""


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def fill_disk_of_one_rank(directory: str) -> list[str]:
    return [write(directory, 1, 10, tensor_model_parallel_size=2), write(directory, 2, 20, failing="disk")]


def test_a_full_disk_on_one_rank_stops_all_and_keeps_the_old_checkpoint(tmp_path: Path):
    results = run_ranks(4, fill_disk_of_one_rank, str(tmp_path))
    # Ranks 0 and 1 write, 2 and 3 are their replicas: the failing rank 3 has nothing to write.
    assert results == [["", ""]] * 4
    for path in tmp_path.iterdir():
        durable.shutil.rmtree(path) if path.is_dir() else path.unlink()

    first, second = run_ranks(2, fill_disk_of_one_rank, str(tmp_path))
    assert first[0] == second[0] == ""
    assert "No space left on device" in second[1] and "mp_rank_01" in second[1]
    assert first[1].startswith("[rank 1 on ") and first[1].endswith(second[1])
    assert files(tmp_path) == [
        "iter_0000001/mp_rank_00/model_optim_rng.pt",
        "iter_0000001/mp_rank_01/model_optim_rng.pt",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / layout.TRACKER_FILE).read_text() == "1"
    for rank in (0, 1):
        saved = torch.load(tmp_path / f"iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt")
        assert saved == {"model": 10, "rank": rank}


def save_with_a_late_failure(directory: str) -> str:
    """The first rank cannot rename: the others have written, and the tracker must stay."""
    write(directory, 1, 10, pipeline_model_parallel_size=2)
    refused = CheckpointError("cannot rename")
    with mock.patch.object(durable, "publish", side_effect=refused):
        return write(directory, 2, 20)


def test_tracker_is_updated_last(tmp_path: Path):
    first, second = run_ranks(2, save_with_a_late_failure, str(tmp_path))
    assert first == "cannot rename"
    assert second.endswith("] cannot rename")
    assert files(tmp_path) == [
        "iter_0000001/mp_rank_00_000/model_optim_rng.pt",
        "iter_0000001/mp_rank_00_001/model_optim_rng.pt",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / layout.TRACKER_FILE).read_text() == "1"


def save_on_own_disks(directory: str, hosts: int) -> list[int]:
    """Ranks of one host see a directory of their own; returns who shares it with this rank."""
    per_host = torch.distributed.get_world_size() // hosts
    host, local = divmod(torch.distributed.get_rank(), per_host)
    os.environ["LOCAL_RANK"] = str(local)
    own = os.path.join(directory, f"host{host}")
    assert write(own, 3, 30, tensor_model_parallel_size=2) == ""
    return [lowest_rank_that_shares(own), lowest_rank_that_shares(directory)]


def test_every_disk_gets_the_files_of_its_ranks_and_a_tracker(tmp_path: Path):
    # TP 2 x DP 2, a host per data-parallel rank: the second host's ranks are replicas of the first's.
    assert run_ranks(4, save_on_own_disks, str(tmp_path), 2) == [[0, 0], [0, 0], [2, 0], [2, 0]]
    for host in (0, 1):
        assert files(tmp_path / f"host{host}") == [
            "iter_0000003/mp_rank_00/model_optim_rng.pt",
            "iter_0000003/mp_rank_01/model_optim_rng.pt",
            "latest_checkpointed_iteration.txt",
        ]


def read_own_tracker(directory: str) -> tuple[int, bool] | None:
    """Ranks 0 and 1 are up to date, rank 2 is behind, rank 3 has nothing yet."""
    rank = torch.distributed.get_rank()
    own = os.path.join(directory, str(rank))
    os.makedirs(own)
    if rank < 3:
        layout.write_tracker(own, 7 if rank < 2 else 5)
    return layout.read_together(layout.get_checkpoint_tracker_filename(own))


def test_the_highest_tracker_of_all_ranks_is_used(tmp_path: Path):
    assert run_ranks(4, read_own_tracker, str(tmp_path)) == [(7, False)] * 4


def read_broken_tracker(directory: str) -> str:
    own = os.path.join(directory, str(torch.distributed.get_rank()))
    os.makedirs(own)
    text = "7" if torch.distributed.get_rank() == 0 else "seven"
    Path(own, layout.TRACKER_FILE).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        layout.read_together(os.path.join(own, layout.TRACKER_FILE))
    return str(caught.value)


def test_an_invalid_tracker_on_one_rank_stops_all(tmp_path: Path):
    first, second = run_ranks(2, read_broken_tracker, str(tmp_path))
    assert "'seven'" in first and "'seven'" in second


def take_args(directory: str) -> tuple[int, int]:
    """Only rank 0 sees the checkpoint."""
    own = os.path.join(directory, "there" if torch.distributed.get_rank() == 0 else "nowhere")
    args = argparse.Namespace(load=own, num_layers=None, ckpt_step=None)
    model_args.load_args_from_checkpoint(args)
    return args.num_layers, args.glu_gate_last


def test_all_ranks_take_the_arguments_that_rank_0_finds(tmp_path: Path):
    file = Path(layout.get_checkpoint_name(str(tmp_path / "there"), 4))
    file.parent.mkdir(parents=True)
    stored = argparse.Namespace(num_layers=6, is_x_model=True, glu_gate_last=True)
    torch.save({"args": stored, "checkpoint_version": 3.0, "iteration": 4, "model": {}}, file)
    layout.write_tracker(str(tmp_path / "there"), 4)
    assert run_ranks(2, take_args, str(tmp_path)) == [(6, True)] * 2


def random_states(per_rank: bool) -> list[float]:
    """The first number of each stored state's generator, and the one that this rank goes on with."""
    parallel_state.initialize_model_parallel()
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.checkpointing import state

    rank = torch.distributed.get_rank()
    random.seed(100 + rank)
    model_parallel_cuda_manual_seed(1)
    args = argparse.Namespace(data_parallel_random_init=per_rank)
    with mock.patch.object(checkpointing, "get_args", lambda: args):
        entries = checkpointing.get_rng_state("torch")
    random.seed(0)
    state.set_rng_state({"rng_state": entries}, per_rank)
    return [len(entries), random.random()]


def test_random_states_are_saved_per_data_parallel_rank_where_ranks_differ():
    own = [random.Random(100 + rank).random() for rank in range(2)]
    assert run_ranks(2, random_states, True) == [[2, own[0]], [2, own[1]]]
    assert run_ranks(2, random_states, False) == [[1, own[0]], [1, own[1]]]
