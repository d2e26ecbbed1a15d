"""The real loop on several ranks: what is printed where, evaluation, and going on from checkpoints."""

import contextlib
import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from megatron.core.errors import MegatronError
from tests.distributed.gpt_run import NO_DROPOUT, command_line
from tests.distributed.layouts import Layout
from tests.distributed.pool import run_ranks

DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1"
LOSS = re.compile(r" iteration +(\d+)/.*? lm loss: (\S+) \|.* grad norm: (\S+) \|.* params norm: (\S+) \|")


def train(argv: list[str], signalled_rank: int | None = None) -> tuple[str, str]:
    """Run ``pretrain_gpt.py``; the output of this rank, and how it ended.

    Args:
        argv: words of the command line.
        signalled_rank: rank that receives SIGTERM when the second step begins.
    """
    import pretrain_gpt

    output, ended = io.StringIO(), "well"
    sys.argv = ["pretrain_gpt.py", *argv]
    original = pretrain_gpt.forward_step

    def interrupted(*args):
        from megatron.training import get_args

        if get_args().curr_iteration == 1 and get_args().rank == signalled_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with contextlib.redirect_stdout(output):
        try:
            pretrain_gpt.forward_step = interrupted
            pretrain_gpt.main()
        except MegatronError as error:
            ended = str(error)
        except SystemExit as stop:
            ended = f"exit {stop.code}"
        finally:
            pretrain_gpt.forward_step = original
            handler = _signal_handler()
            if handler is not None:
                handler.release()
    return output.getvalue(), ended


def _signal_handler():
    from megatron.training import global_vars

    with contextlib.suppress(AssertionError):
        return global_vars.get_signal_handler()


def run(layout: Layout, tmp_path: Path, extra: str, **options) -> list[tuple[str, str]]:
    argv = command_line(layout, tmp_path / "cache", f"--log-params-norm {extra}")
    return run_ranks(layout.world_size, train, argv, **options)


def lines(results: list[tuple[str, str]]) -> dict[int, tuple[str, ...]]:
    """Loss, gradient norm and parameter norm by iteration, as the last rank printed them."""
    for output, ended in results:
        assert ended == "well", (ended, output[-2000:])
    for output, _ in results[:-1]:
        assert " lm loss: " not in output
    return {int(number): rest for number, *rest in LOSS.findall(results[-1][0])}


# What tests/distributed/test_resume_ranks.py does not have.
RESUMED = {
    "loss-scale": (Layout(pp=2, vpp=2), "--fp16 --initial-loss-scale 1024"),
    "per-token": (Layout(cp=2, model="llama"), "--calculate-per-token-loss"),
    "random-init": (Layout(dp=2), "--data-parallel-random-init"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one(name: str, tmp_path: Path):
    layout, flags = RESUMED[name]
    keep = f"{DROPOUT} {flags} --save {tmp_path / 'ckpt'}"
    whole = lines(run(layout, tmp_path, f"{keep} --save-interval 2"))
    assert sorted(whole) == [1, 2, 3, 4]
    load = f"--save-interval 100 --load {tmp_path / 'ckpt'} --ckpt-step 2"
    rest = lines(run(layout, tmp_path, f"{keep} {load}"))
    assert rest == {number: whole[number] for number in (3, 4)}


def test_each_rank_prints_its_part(tmp_path: Path):
    layout = Layout(tp=2, pp=2)
    results = run(layout, tmp_path, f"{NO_DROPOUT} --timing-log-level 1 --log-throughput")
    first, last = results[0][0], results[-1][0]
    lines(results)
    counts = [re.findall(r"parallel rank (\(\d, \d\)): \d+", output) for output, _ in results]
    assert counts == [["(0, 0)"], ["(1, 0)"], ["(0, 1)"], ["(1, 1)"]]
    assert "> initialized pipeline model parallel with size 2" in first
    assert "Theoretical memory footprints" in first and "Theoretical memory footprints" not in last
    timers = r"\(min, max\) time across ranks \(ms\):\n    forward-backward \.+: \(\d+\.\d\d, \d"
    assert re.search(timers, last)
    assert "throughput per GPU (TFLOP/s/GPU): " in last
    for rank, (output, _) in enumerate(results):
        assert f"[Rank {rank}] (after 1 iterations) memory (MB)" in output


@pytest.mark.parametrize("pipeline", [{"vpp": 2}, {"pipeline": "zb-h1"}], ids=["interleaved", "zb-h1"])
def test_collectives_may_start_as_soon_as_a_stage_is_ready(pipeline: dict, tmp_path: Path):
    layout = Layout(pp=2, dp=2, reduction="sharded-overlap-both", **pipeline)

    def losses(flags: str) -> list[str]:
        # No norms of parameters: they would gather all of them before the next step.
        argv = command_line(layout, tmp_path / "cache", f"{NO_DROPOUT} {flags}")
        results = run_ranks(4, train, argv)
        assert {ended for _, ended in results} == {"well"}
        return re.findall(r"lm loss: (\S+) \|.* grad norm: (\S+)", results[-1][0])

    together = losses("")
    assert len(together) == 4
    assert losses("--no-align-grad-reduce --no-align-param-gather") == together


def test_timers_of_all_ranks_reach_tensorboard(tmp_path: Path):
    curves = tmp_path / "curves"
    flags = f"--tensorboard-dir {curves} --log-timers-to-tensorboard --timing-log-level 1"
    assert len(lines(run(Layout(dp=2), tmp_path, f"{NO_DROPOUT} {flags}"))) == 4
    (events,) = curves.iterdir()
    assert b"forward-backward-time" in events.read_bytes()


def test_the_sharded_optimizer_makes_no_gloo_groups(tmp_path: Path):
    layout = Layout(dp=2, reduction="sharded")
    with_twins = lines(run(layout, tmp_path, NO_DROPOUT))
    assert lines(run(layout, tmp_path, f"{NO_DROPOUT} --disable-gloo-process-groups")) == with_twins


# Untied: the gradient of an embedding row is exactly zero where its word does not occur.
LAYOUTS = [
    Layout(model="llama"),
    Layout(model="llama", tp=2),
    Layout(model="llama", pp=2, vpp=2),
    Layout(model="llama", dp=2, cp=2, reduction="sharded-overlap-both"),
]


def test_evaluations_and_norms_equal_those_of_one_rank(tmp_path: Path):
    extra = f"{NO_DROPOUT} --eval-iters 2 --eval-interval 2 --log-num-zeros-in-grad"
    found = []
    for layout in LAYOUTS:
        results = run(layout, tmp_path, extra)
        output = results[-1][0]
        values = [tuple(map(float, values)) for values in lines(results).values()]
        losses = re.findall(r"\w+ loss at (.*?) \| lm loss value: (\S+)", output)
        assert [label for label, _ in losses] == [
            "iteration 2",
            "iteration 4 on validation set",
            "iteration 4 on test set",
        ]
        zeros = [float(count) for count in re.findall(r"num zeros: (\S+)", output)]
        assert min(zeros) > 1000
        found.append((values, [float(loss) for _, loss in losses], zeros))
    for (values, evaluated, zeros), layout in zip(found[1:], LAYOUTS[1:], strict=True):
        for mine, theirs in zip(values, found[0][0], strict=True):
            assert mine == pytest.approx(theirs, rel=2e-3), layout  # norms are printed with 3 digits
            assert mine[0] == pytest.approx(theirs[0], rel=1e-5), layout
        assert evaluated == pytest.approx(found[0][1], rel=1e-5), layout
        assert zeros == pytest.approx(found[0][2], abs=8), layout  # a few round to zero by chance


def test_optimizer_shards_load_on_another_number_of_ranks(tmp_path: Path):
    keep = f"{NO_DROPOUT} --save {tmp_path / 'ckpt'} --save-interval 2"
    whole = lines(run(Layout(dp=2, reduction="sharded"), tmp_path, keep))
    load = f"{NO_DROPOUT} --load {tmp_path / 'ckpt'} --ckpt-step 2"
    for layout in (Layout(dp=4, reduction="sharded-overlap-both"), Layout(cp=2, reduction="sharded")):
        rest = lines(run(layout, tmp_path, load))
        assert sorted(rest) == [3, 4]
        for number, (loss, *_) in rest.items():
            assert float(loss) == pytest.approx(float(whole[number][0]), rel=1e-5)


def train_on_own_disk(argv: list[str], directory: str, flags: list[str]) -> tuple[str, str]:
    """Every rank is a host with a disk of its own."""
    own = os.path.join(directory, f"host{os.environ['RANK']}")
    os.environ["LOCAL_RANK"] = "0"
    return train([*argv, *(word.format(disk=own) for word in flags)])


def test_hosts_without_shared_storage_resume_from_their_own_disks(tmp_path: Path):
    layout = Layout(dp=2, reduction="sharded")
    argv = command_line(layout, tmp_path / "cache", f"--log-params-norm {DROPOUT} --save-interval 2")
    save = ["--save", "{disk}"]
    whole = lines(run_ranks(2, train_on_own_disk, argv, str(tmp_path), save))
    for host in (0, 1):
        names = [path.name for path in (tmp_path / f"host{host}" / "iter_0000002" / "mp_rank_00").iterdir()]
        # The shards of the optimizer are gathered, and handed out again, by the first host's rank.
        assert sorted(names) == ["distrib_optim.pt", "model_optim_rng.pt"][host:]
    load = ["--load", "{disk}", "--ckpt-step", "2"]
    rest = lines(run_ranks(2, train_on_own_disk, argv, str(tmp_path), load))
    assert rest == {number: whole[number] for number in (3, 4)}


MISFITS = {
    "other tensor size": (
        Layout(tp=2),
        Layout(dp=2),
        "--tensor-model-parallel-size: 2 in the checkpoint, 1 in this run",
    ),
    "other stages": (
        Layout(tp=2),
        Layout(pp=2),
        "--tensor-model-parallel-size 2 in the checkpoint, 1 in this run; "
        "--pipeline-model-parallel-size 1 in the checkpoint, 2 in this run",
    ),
    "other virtual stages": (
        Layout(pp=2, vpp=2),
        Layout(pp=2),
        "virtual pipeline model parallel size: 2 in the checkpoint, 1 in this run",
    ),
    "whole state into shards": (
        Layout(dp=2),
        Layout(dp=2, reduction="sharded"),
        "saved without --use-distributed-optimizer",
    ),
    "shards into whole state": (
        Layout(dp=2, reduction="sharded"),
        Layout(dp=2),
        "saved with --use-distributed-optimizer",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_all_ranks_refuse_another_layout_with_one_message(name: str, tmp_path: Path):
    saved, loaded, message = MISFITS[name]
    lines(run(saved, tmp_path, f"{NO_DROPOUT} --save {tmp_path / 'ckpt'} --save-interval 4"))
    for _, ended in run(loaded, tmp_path, f"{NO_DROPOUT} --load {tmp_path / 'ckpt'}"):
        assert message in ended


def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path: Path):
    layout, save = Layout(pp=2), f"--save {tmp_path / 'ckpt'} --save-interval 100"
    results = run(layout, tmp_path, f"{DROPOUT} {save} --exit-signal-handler", signalled_rank=1)
    assert [ended for _, ended in results] == ["exit 0", "exit 0"]
    assert "[exiting program after receiving SIGTERM.] datetime:" in results[0][0]
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "2"
    whole = lines(run(layout, tmp_path, DROPOUT))
    rest = lines(run(layout, tmp_path, f"{DROPOUT} --load {tmp_path / 'ckpt'}"))
    assert rest == {number: whole[number] for number in (3, 4)}


def test_masks_between_documents_reach_every_stage(tmp_path: Path):
    # Layouts differ in the size of their microbatches; only the mean per token does not depend on it.
    per_token = "--eod-mask-loss --calculate-per-token-loss"
    extra = f"{NO_DROPOUT} --reset-attention-mask --reset-position-ids {per_token}"
    alone = lines(run(Layout(), tmp_path, extra))
    for layout in (Layout(pp=4), Layout(tp=2, pp=2)):
        split = lines(run(layout, tmp_path, extra))
        for number, values in alone.items():
            assert float(split[number][0]) == pytest.approx(float(values[0]), rel=1e-5)
    plain = lines(run(Layout(), tmp_path, f"{NO_DROPOUT} --eod-mask-loss"))
    assert plain[1] != alone[1]
