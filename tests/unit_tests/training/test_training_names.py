"""Names of the training layer that scripts for the original call: what they do."""

import argparse
import itertools
import types

import pytest
import torch

from megatron.core.errors import CheckpointError
from megatron.training import (
    arguments,
    async_utils,
    ft_integration,
    global_vars,
    one_logger_utils,
    utils,
    wandb_utils,
)
from megatron.training.checkpointing import _get_checkpoint_format, cleanup_old_non_persistent_checkpoint
from megatron.training.training import cyclic_iter, destroy_global_state, preprocess_common_state_dict


def test_cyclic_iter_starts_again() -> None:
    assert list(itertools.islice(cyclic_iter(iter=[1, 2, 3]), 7)) == [1, 2, 3, 1, 2, 3, 1]


def test_print_datetime_prints_on_rank_0(capsys: pytest.CaptureFixture) -> None:
    utils.print_datetime(string="after the tea")
    assert capsys.readouterr().out.startswith("[after the tea] datetime: ")


def test_only_known_wrappers_are_taken_off() -> None:
    wrapper = torch.nn.Module()
    wrapper.module = torch.nn.Linear(1, 1)
    assert utils.unwrap_model(wrapper) is wrapper
    assert utils.unwrap_model(wrapper, module_instances=(torch.nn.Module,)) is wrapper.module


def test_parameter_norms_are_printed_as_a_table(capsys: pytest.CaptureFixture) -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    parameter.tensor_model_parallel = True
    utils.print_params_min_max_norm(torch.optim.SGD([parameter], lr=1.0), iteration=7)
    header, line = capsys.readouterr().out.splitlines()
    assert header == "iteration, rank, index, tensor-model-parallel, min, max, norm"
    assert [float(word) for word in line.split(",")] == [7, 0, 1, 1, -4.0, 3.0, 5.0]


def test_arguments_are_printed_and_checked(capsys: pytest.CaptureFixture) -> None:
    args = argparse.Namespace(rank=0, lr=None, seed=3)
    arguments._print_args("my arguments", args)
    out = capsys.readouterr().out
    assert out.startswith("my arguments:\n") and "seed" in out
    arguments._check_arg_is_not_none(args, "seed")
    with pytest.raises(AssertionError, match="--lr"):
        arguments._check_arg_is_not_none(args, "lr")
    args.rank = 1
    arguments._print_args("my arguments", args)
    assert capsys.readouterr().out == ""


def test_global_variables_under_their_older_names() -> None:
    global_vars.destroy_global_vars()
    assert global_vars._GLOBAL_ARGS is None
    global_vars.set_args(argparse.Namespace(seed=3))
    try:
        assert global_vars._GLOBAL_ARGS.seed == 3
        with pytest.raises(AssertionError, match="args is already initialized"):
            global_vars._ensure_var_is_not_initialized(global_vars._GLOBAL_ARGS, "args")
        global_vars._ensure_var_is_not_initialized(var=global_vars._GLOBAL_TIMERS, name="timers")
        global_vars._set_timers(argparse.Namespace(timing_log_level=0, timing_log_option="max"))
        assert global_vars.get_timers() is global_vars._GLOBAL_TIMERS
        with pytest.raises(AttributeError):
            _ = global_vars.nonsense
    finally:
        destroy_global_state()
    assert global_vars._GLOBAL_ARGS is None


def test_checkpoint_format_is_recognised_on_disk(tmp_path) -> None:
    file = tmp_path / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert _get_checkpoint_format(str(file)) == _get_checkpoint_format(str(file.parents[1])) == "torch"
    sharded = tmp_path / "iter_0000005"
    sharded.mkdir()
    (sharded / "metadata.json").write_text("{}")
    assert _get_checkpoint_format(checkpoint_name=str(sharded)) == "torch_dist"
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        _get_checkpoint_format(str(tmp_path))


@pytest.mark.parametrize("left", [1, 2])
def test_old_checkpoints_are_deleted(tmp_path, left: int) -> None:
    for iteration in (2, 10, 30):
        (tmp_path / f"iter_{iteration:07d}" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    cleanup_old_non_persistent_checkpoint(str(tmp_path), leave_ckpt_num=left, do_async=False)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [*["iter_0000002", "iter_0000010", "iter_0000030"][-left:], "notes"]


def test_common_state_leaves_out_rank_numbers() -> None:
    args = argparse.Namespace(rank=3, local_rank=1, lr=0.1)
    state = {"args": args, "iteration": 4}
    assert preprocess_common_state_dict(state) == {"args": {"lr": 0.1}, "iteration": 4}
    assert state["args"].rank == 3


def test_hooks_of_absent_services_do_nothing() -> None:
    async_utils.maybe_finalize_async_save(blocking=True)
    assert async_utils.is_empty_async_queue()
    one_logger_utils.on_save_checkpoint_start(True)
    one_logger_utils.on_save_checkpoint_success({}, False)
    ft_integration.on_training_step_start()
    with pytest.raises(NotImplementedError, match="asynchronous saves"):
        async_utils.schedule_async_save(async_request=None)


class FakeRun:
    """The calls of wandb that concern artifacts."""

    def __init__(self):
        self.calls = []
        self.run = self

    def Artifact(self, name, type, metadata):
        self.calls.append(("artifact", name, type, metadata))
        return types.SimpleNamespace(
            add_reference=lambda uri, checksum: self.calls.append(("reference", uri, checksum)),
            add_file=lambda path: self.calls.append(("file", path)),
        )

    def log_artifact(self, artifact, aliases):
        self.calls.append(("log", aliases))

    def use_artifact(self, name):
        self.calls.append(("use", name))


def test_checkpoints_become_artifacts_of_a_wandb_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_utils.on_save_checkpoint_success("/c/run/iter_0000004", "/c/run/latest", "/c/run", 4)
    run = FakeRun()
    monkeypatch.setattr(wandb_utils, "get_wandb_writer", lambda: run)
    wandb_utils.on_save_checkpoint_success("/c/run/iter_0000004", "/c/run/latest", "/c/run", 4)
    wandb_utils.on_load_checkpoint_success("/c/run/iter_0000004/", "/c/run/")
    assert run.calls == [
        ("artifact", "c-run", "model", {"iteration": 4}),
        ("reference", "file:///c/run/iter_0000004", False),
        ("file", "/c/run/latest"),
        ("log", ["iter_0000004"]),
        ("use", "c-run:iter_0000004"),
    ]
