"""A run that is stopped and started again is the same run, bit for bit."""

import os
import signal

import pytest
import torch

from launcher import pretrain_gpt, start_pretrain_gpt, tiny_gpt
from tests.same_bits import assert_same_bits

STEPS = 8
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "initial_loss_scale": 2**20, "loss_scale_window": 3},
}


def arguments(golden, tmp_path, save, precision, **changes):
    return tiny_gpt(
        golden,
        tmp_path,
        save=save,
        load=save,
        save_interval=1000,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        num_workers=2,
        eval_iters=1,
        eval_interval=3,
        **PRECISIONS[precision],
        **changes,
    )


def state(directory, iteration=STEPS):
    path = directory / f"iter_{iteration:07d}" / "mp_rank_00" / "model_optim_rng.pt"
    return torch.load(path, weights_only=False)


def comparable(checkpoint):
    """The state that decides the next step; paths and times of the run are left out."""
    counts = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    checkpoint = dict(checkpoint)
    args = checkpoint.pop("args")
    return checkpoint | {name: getattr(args, name) for name in counts}


@pytest.fixture(scope="module", params=PRECISIONS)
def uninterrupted(request, golden, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("whole")
    trace = tmp_path / "trace"
    run = pretrain_gpt(arguments(golden, tmp_path, tmp_path / "ckpt", request.param), tmp_path, trace=trace)
    run.check()
    return request.param, trace.read_text(), state(tmp_path / "ckpt")


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_resumed_run_equals_the_uninterrupted_one(uninterrupted, golden, tmp_path, stop):
    precision, whole_trace, whole = uninterrupted
    save, trace = tmp_path / "ckpt", tmp_path / "trace"
    words = arguments(golden, tmp_path, save, precision)
    pretrain_gpt([*words, "--exit-interval", stop], tmp_path, trace=trace).check()
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(stop)
    second = pretrain_gpt(words, tmp_path, trace=trace).check()
    assert f"at iteration {stop}" in second.output
    assert trace.read_text() == whole_trace
    assert_same_bits(comparable(state(save)), comparable(whole))


def test_a_signal_saves_and_stops(golden, tmp_path):
    save = tmp_path / "ckpt"
    words = arguments(golden, tmp_path, save, "fp32", train_iters=100000, exit_signal_handler=True)
    started = start_pretrain_gpt(words, tmp_path)
    started.wait_for_text("iteration        3/")
    os.kill(started.process.pid, signal.SIGTERM)
    run = started.wait().check()
    assert "[exiting program after receiving SIGTERM.]" in run.output
    stopped = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert state(save, stopped)["iteration"] == stopped >= 3
