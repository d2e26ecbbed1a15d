"""What the sinks of a run hold, read back: every figure once, under its split and its iteration."""

import re
from collections import Counter

import pytest

from launcher import pretrain_gpt, tiny_gpt

BATCH = 4


def points(directory):
    """Tag -> [(x, value), ...] in the order of reading; no tag may have two points at one x."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={SCALARS: 0, TENSORS: 0}).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: [(e.step, None) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    for tag, curve in (found | texts).items():
        assert max(Counter(x for x, _ in curve).values()) == 1, (tag, curve)
    return found


def saved(output):
    return [int(iteration) for iteration in re.findall(r"saving checkpoint at iteration +(\d+) to", output)]


def evaluations(output):
    """(split, iteration) -> loss."""
    lines = re.findall(r"(\w+) loss at iteration (\d+).*? \| lm loss value: (\S+) \|", output)
    assert max(Counter(line[:2] for line in lines).values()) == 1, lines
    return {(split, int(iteration)): float(loss) for split, iteration, loss in lines}


def test_validation_and_test_have_separate_tags_without_duplicates(golden, tmp_path):
    words = tiny_gpt(
        golden,
        tmp_path,
        tensorboard_dir=tmp_path / "tb",
        eval_iters=2,
        eval_interval=4,
        log_validation_ppl_to_tensorboard=True,
        log_timers_to_tensorboard=True,
        log_throughput=True,
        log_params_norm=True,
        log_num_zeros_in_grad=True,
        log_memory_to_tensorboard=True,
        log_world_size_to_tensorboard=True,
        timing_log_level=2,
    )
    run = pretrain_gpt(words, tmp_path).check()
    curves = points(tmp_path / "tb")
    steps = list(range(1, 9))
    for tag in (
        "lm loss", "learning-rate", "grad-norm", "num-zeros", "params-norm", "world-size", "batch-size",
        "loss-scale", "iteration-time", "throughput", "forward-backward-time",
    ):  # fmt: skip
        assert [x for x, _ in curves[tag]] == steps, tag
    for tag in ("lm loss", "learning-rate", "batch-size", "loss-scale", "grad-norm"):
        # The same values over the samples they took.
        assert curves[f"{tag} vs samples"] == [(BATCH * x, value) for x, value in curves[tag]]
    assert dict(curves["lm loss"]) == pytest.approx(run.losses, rel=1e-6)
    found = evaluations(run.output)
    assert list(found) == [("validation", 4), ("validation", 8), ("test", 8)]
    for split, steps in (("validation", [4, 8]), ("test", [8])):
        expected = {step: found[split, step] for step in steps}
        assert dict(curves[f"lm loss {split}"]) == pytest.approx(expected, rel=1e-6)
        assert [x for x, _ in curves[f"lm loss {split} vs samples"]] == [BATCH * step for step in steps]
        assert [x for x, _ in curves[f"lm loss {split} ppl"]] == steps
    assert found["test", 8] != found["validation", 8]


def test_an_evaluation_prints_one_line(golden, tmp_path):
    words = tiny_gpt(golden, tmp_path, train_iters=4, eval_iters=3, eval_interval=2)
    lines = pretrain_gpt(words, tmp_path).check().output.splitlines()
    second = next(i for i, line in enumerate(lines) if "iteration        2/" in line)
    assert lines[second + 1].startswith(" validation loss at iteration 2 | lm loss value: ")
    assert "iteration        3/" in lines[second + 2]
    assert not [line for line in lines if line and not line.strip("-")]


def test_no_iteration_is_saved_twice_while_the_batch_grows(golden, tmp_path):
    def words(**changes):
        return tiny_gpt(
            golden,
            tmp_path,
            rampup_batch_size=(4, 4, 24),
            global_batch_size=12,
            train_iters=None,
            train_samples=40,
            lr_warmup_iters=None,
            save=tmp_path / "ckpt",
            load=tmp_path / "ckpt",
            **changes,
        )

    # Batches of 4, 4, 4, 8, 8 and 12: growth after iterations 3 and 5.
    first = pretrain_gpt(words(save_interval=3, exit_interval=3), tmp_path).check()
    assert saved(first.output) == [3]
    second = pretrain_gpt(words(save_interval=2), tmp_path).check()
    assert "ramping up batch size from 4 to 8" in second.output
    assert re.findall(r"global batch size: +(\d+)", second.output) == ["8", "8", "12"]
    assert saved(second.output) == [4, 5, 6]
    # The run is finished: what it would save is there.
    third = pretrain_gpt(words(save_interval=5), tmp_path).check()
    assert saved(third.output) == []


def test_the_last_iteration_is_saved_when_the_interval_skips_it(golden, tmp_path):
    words = tiny_gpt(golden, tmp_path, save=tmp_path / "ckpt", save_interval=4, iterations_to_skip=7)
    run = pretrain_gpt(words, tmp_path).check()
    assert saved(run.output) == [4, 8]


def going_on(golden, tmp_path, **changes):
    save = tmp_path / "ckpt"
    return tiny_gpt(
        golden,
        tmp_path,
        save=save,
        load=save,
        tensorboard_dir=tmp_path / "tb",
        eval_iters=1,
        eval_interval=2,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        **{"override-opt_param-scheduler": True},
        **changes,
    )


def test_steps_repeated_after_a_restart_replace_their_points(golden, tmp_path):
    first = pretrain_gpt(going_on(golden, tmp_path, save_interval=4), tmp_path).check()
    before = points(tmp_path / "tb")
    (events,) = (tmp_path / "tb").iterdir()
    with events.open("ab") as file:  # killed while it wrote
        file.write(events.read_bytes()[:20])
    second = pretrain_gpt(going_on(golden, tmp_path, save_interval=8, ckpt_step=4, lr=2e-3), tmp_path).check()
    assert sorted(second.losses) == [5, 6, 7, 8]
    after = points(tmp_path / "tb")
    assert after.keys() == before.keys()
    for tag in ("lm loss", "lm loss vs samples", "lm loss validation", "grad-norm vs samples"):
        half = len(before[tag]) // 2
        assert [x for x, _ in after[tag]] == [x for x, _ in before[tag]], tag
        assert after[tag][:half] == before[tag][:half], tag
        assert after[tag][half + 1 :] != before[tag][half + 1 :], tag  # the other learning rate
    assert dict(after["lm loss"]) == pytest.approx(
        {i: (first if i <= 4 else second).losses[i] for i in range(1, 9)}, rel=1e-6
    )
    # What the first run wrote is kept out of sight.
    assert any(path.name.startswith("superseded-1-") for path in (tmp_path / "tb").iterdir())
    assert "held points after iteration 4" in second.output


def test_starting_a_finished_run_again_adds_no_point(golden, tmp_path):
    pretrain_gpt(going_on(golden, tmp_path, save_interval=4), tmp_path).check()
    before = points(tmp_path / "tb")
    again = pretrain_gpt(going_on(golden, tmp_path, save_interval=4), tmp_path).check()
    assert list(evaluations(again.output)) == [("validation", 8), ("test", 8)]
    assert points(tmp_path / "tb") == before
    # It goes on from there with nothing lost, and starts anew with nothing left.
    pretrain_gpt(going_on(golden, tmp_path, save_interval=4, train_iters=10), tmp_path).check()
    longer = points(tmp_path / "tb")
    assert longer["lm loss"][:8] == before["lm loss"]
    assert [x for x, _ in longer["lm loss vs samples"]] == [BATCH * i for i in range(1, 11)]
    assert [x for x, _ in longer["lm loss test"]] == [8, 10]
    pretrain_gpt(tiny_gpt(golden, tmp_path, tensorboard_dir=tmp_path / "tb"), tmp_path).check()
    assert [x for x, _ in points(tmp_path / "tb")["lm loss"]] == list(range(1, 9))


def test_an_extended_run_evaluates_what_an_uninterrupted_one_does(golden, tmp_path):
    """The last validation of the first part is one of the whole run's."""
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 0}
    whole = pretrain_gpt(going_on(golden, tmp_path, **constant, save_interval=20), tmp_path).check()
    expected = evaluations(whole.output)
    assert list(expected) == [*(("validation", step) for step in (2, 4, 6, 8)), ("test", 8)]
    rest = {"save": tmp_path / "parts", "load": tmp_path / "parts", "tensorboard_dir": tmp_path / "tb2"}
    parts = {}
    for train_iters in (4, 8):
        words = going_on(golden, tmp_path, **constant, save_interval=20, train_iters=train_iters)
        words += [word for name, value in rest.items() for word in (f"--{name.replace('_', '-')}", value)]
        parts |= evaluations(pretrain_gpt(words, tmp_path).check().output)
    assert {key: loss for key, loss in parts.items() if key[0] == "validation"} == {
        key: loss for key, loss in expected.items() if key[0] == "validation"
    }
    assert points(tmp_path / "tb2")["lm loss validation"] == points(tmp_path / "tb")["lm loss validation"]


def test_a_line_averages_the_iterations_since_the_last_one(golden, tmp_path):
    each = pretrain_gpt(tiny_gpt(golden, tmp_path), tmp_path).check().losses
    words = tiny_gpt(golden, tmp_path, log_interval=3, save=tmp_path / "ckpt", save_interval=4)
    lines = pretrain_gpt(words, tmp_path).check().losses
    means = {last: sum(each[i] for i in (last - 2, last - 1, last)) / 3 for last in (3, 6)}
    assert lines == pytest.approx(means, rel=1e-6)
    resumed = pretrain_gpt([*words, "--load", tmp_path / "ckpt", "--ckpt-step", "4"], tmp_path).check().losses
    assert resumed == pytest.approx({6: (each[5] + each[6]) / 2}, rel=1e-6)


def test_a_skipped_fp16_step_is_explained_once(golden, tmp_path):
    run = pretrain_gpt(tiny_gpt(golden, tmp_path, fp16=True, train_iters=3), tmp_path).check()
    assert run.output.count("skipped: gradients overflowed") == 1
    assert "WARNING: all 3 steps of this run were skipped" in run.output
    assert (
        " step 1 skipped: gradients overflowed at loss scale 4294967296.0; the scale starts at "
        "--initial-loss-scale 4294967296.0 and is halved until gradients fit" in run.output
    )
    fixed = pretrain_gpt(
        tiny_gpt(
            golden,
            tmp_path,
            fp16=True,
            train_iters=3,
            loss_scale=2.0**32,
            no_check_for_nan_in_loss_and_grad=True,
        ),
        tmp_path,
    )
    assert "stays as it is: give a smaller one" in fixed.check().output
    fits = pretrain_gpt(tiny_gpt(golden, tmp_path, fp16=True, initial_loss_scale=1024), tmp_path).check()
    assert "skipped: gradients" not in fits.output and "were skipped" not in fits.output
    assert len(fits.losses) == 8
