"""What a training run prints, writes and does, seen from outside."""

import re

import pytest
import torch

from launcher import pretrain_gpt, tiny_gpt

LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +\d+/ +\d+ \| consumed samples: +\d+ \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \| "
    r"learning rate: \d\.\d{6}E[+-]\d\d \| global batch size: +\d+ \| lm loss: \d\.\d{6}E[+-]\d\d \| "
    r"loss scale: [\d.]+ \| grad norm: [\d.]+ \| num zeros: [\d.]+ \| params norm: [\d.]+ \| "
    r"number of skipped iterations: +\d+ \| number of nan iterations: +\d+ \|$",
    re.MULTILINE,
)


def test_iteration_line_and_order_of_a_run(golden, tmp_path):
    run = pretrain_gpt(
        tiny_gpt(
            golden,
            tmp_path,
            log_throughput=True,
            log_num_zeros_in_grad=True,
            log_params_norm=True,
            eval_iters=1,
            eval_interval=4,
            save=tmp_path / "ckpt",
            save_interval=4,
        ),
        tmp_path,
    ).check()
    assert len(LINE.findall(run.output)) == 8, run.output
    landmarks = [
        "using world size: 1, data-parallel size: 1",
        "------------------------ arguments ------------------------",
        "-------------------- end of arguments ---------------------",
        "> building NullTokenizer tokenizer ...",
        " > padded vocab (size: 501) with 11 dummy tokens (new size: 512)",
        "> initializing torch distributed ...",
        "> initialized tensor model parallel with size 1",
        "> initialized pipeline model parallel with size 1",
        "> setting random seeds to 1234 ...",
        "time to initialize megatron (seconds):",
        "[after megatron is initialized] datetime:",
        "building GPT model ...",
        " > number of parameters on (tensor, pipeline) model parallel rank (0, 0):",
        "> learning rate decay style: linear",
        "[after model, optimizer, and learning rate scheduler are built] datetime:",
        "> building train, validation, and test datasets ...",
        " > datasets target sizes (minimum size):",
        "    train:      32",
        "    validation: 12",
        "    test:       4",
        "> building train, validation, and test datasets for GPT ...",
        "> finished creating GPT datasets ...",
        "[after dataloaders are built] datetime:",
        "done with setup ...",
        "training ...",
        "[before the start of training step] datetime:",
        "iteration        1/       8",
        "Theoretical memory footprints: weight and optimizer=",
        "(after 1 iterations) memory (MB) | allocated:",
        "validation loss at iteration 4 |",
        "saving checkpoint at iteration       4 to",
        "iteration        8/       8",
        "validation loss at iteration 8 on validation set |",
        "saving checkpoint at iteration       8 to",
        "[after training is done] datetime:",
        "Evaluating on 4 samples",
        "test loss at iteration 8 on test set |",
    ]
    position = 0
    for text in landmarks:
        found = run.output.find(text, position)
        assert found >= 0, f"{text!r} does not follow in:\n{run.output}"
        position = found


def test_loss_falls_on_repeated_data(golden, tmp_path):
    # A few random sequences seen over and over: a model that learns must memorise them.
    words = tiny_gpt(
        golden,
        tmp_path,
        dataloader_type="cyclic",
        split="4,80,16",
        hidden_size=64,
        train_iters=100,
        lr=1e-2,
        global_batch_size=8,
        micro_batch_size=8,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    losses = pretrain_gpt(words, tmp_path).check().losses
    assert losses[100] < losses[1] - 2.0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_layouts_and_window_attention_train(golden, tmp_path, precision):
    def losses(**changes):
        flags = {} if precision == "fp32" else {precision: True}
        if precision == "fp16":
            flags["loss_scale"] = 128.0
        words = tiny_gpt(golden, tmp_path, **flags, use_flash_attn=True, next_tockens=0, **changes)
        found = pretrain_gpt(words, tmp_path).check().losses
        assert len(found) == 8
        return torch.tensor(list(found.values()), dtype=torch.float64)

    wide = losses(pre_tockens=65536, shape_order="SBH")
    torch.testing.assert_close(losses(pre_tockens=65536, shape_order="BSH"), wide, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses(pre_tockens=32, shape_order="SBH"), wide, rtol=1e-5, atol=0)
    narrow = losses(pre_tockens=3, shape_order="SBH")
    assert (narrow - wide).abs().max() > 1e-3
    torch.testing.assert_close(losses(pre_tockens=3, shape_order="BSH"), narrow, rtol=1e-5, atol=0)


def test_skipped_iterations_consume_their_data(golden, tmp_path):
    words = [*tiny_gpt(golden, tmp_path), "--iterations-to-skip", "2"]
    run = pretrain_gpt(words, tmp_path).check()
    assert sorted(run.losses) == [1, 2, 4, 5, 6, 7, 8]
    assert "skipped samples:            4" in run.output
    assert "consumed samples:           32" in run.output


def test_exit_interval_ends_without_a_final_evaluation(golden, tmp_path):
    words = tiny_gpt(
        golden, tmp_path, exit_interval=5, eval_iters=1, save=tmp_path / "ckpt", save_interval=100
    )
    run = pretrain_gpt(words, tmp_path).check()
    assert max(run.losses) == 5
    assert "[exiting program at iteration 5] datetime:" in run.output
    assert run.evaluations == {}
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "5"


def test_fp16_searches_its_scale(golden, tmp_path):
    run = pretrain_gpt(tiny_gpt(golden, tmp_path, fp16=True, train_iters=4, hysteresis=2), tmp_path).check()
    scales = [float(scale) for scale in re.findall(r"loss scale: ([\d.]+)", run.output)]
    assert scales == [2.0**32, 2.0**31, 2.0**30, 2.0**29]
    assert run.losses == {}, "an overflowed step has no loss to show"
    assert "number of skipped iterations:   1" in run.output


def test_sample_based_training_with_a_ramp(golden, tmp_path):
    words = tiny_gpt(
        golden,
        tmp_path,
        train_iters=None,
        lr_warmup_iters=None,
        train_samples=48,
        rampup_batch_size=(4, 2, 16),
        global_batch_size=8,
    )
    run = pretrain_gpt(words, tmp_path).check()
    assert "setting training iterations to 7" in run.output
    assert "consumed samples:           44" in run.output


def test_tensorboard_points(golden, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = tmp_path / "tb"
    words = tiny_gpt(
        golden, tmp_path, tensorboard_dir=directory, eval_iters=1, log_validation_ppl_to_tensorboard=True
    )
    losses = pretrain_gpt(words, tmp_path).check().losses
    events = EventAccumulator(str(directory)).Reload()
    points = {event.step: event.value for event in events.Scalars("lm loss")}
    assert points == pytest.approx(losses, rel=1e-5)
    assert [event.step for event in events.Scalars("lm loss vs samples")] == [4 * i for i in range(1, 9)]
    tags = set(events.Tags()["scalars"])
    assert {"learning-rate", "batch-size", "loss-scale", "grad-norm", "lm loss validation ppl"} <= tags


def test_finetune_starts_from_iteration_zero(golden, tmp_path):
    save = tmp_path / "ckpt"
    first = pretrain_gpt(tiny_gpt(golden, tmp_path, save=save, save_interval=8), tmp_path).check()
    words = tiny_gpt(golden, tmp_path, load=save, finetune=True, train_iters=2, lr_warmup_iters=0)
    second = pretrain_gpt(words, tmp_path).check()
    assert sorted(second.losses) == [1, 2]
    assert second.losses[1] < first.losses[1], "the loaded weights have learned"


def test_skip_train_only_evaluates(golden, tmp_path):
    words = tiny_gpt(golden, tmp_path, skip_train=True, eval_iters=2)
    run = pretrain_gpt(words, tmp_path).check()
    assert "skipping training (--skip-train is on) ..." in run.output
    assert list(run.evaluations) == ["iteration 0 on validation set", "iteration 0 on test set"]
    assert run.losses == {}


def test_per_token_loss_equals_mean_loss_when_every_token_counts(golden, tmp_path):
    plain = pretrain_gpt(tiny_gpt(golden, tmp_path), tmp_path).check().losses
    per_token = (
        pretrain_gpt(tiny_gpt(golden, tmp_path, calculate_per_token_loss=True), tmp_path).check().losses
    )
    assert per_token == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("recompute", [("selective",), ("full", "uniform"), ("full", "block")])
def test_recompute_changes_no_loss(golden, tmp_path, recompute):
    flags = {"recompute_granularity": recompute[0]}
    if len(recompute) > 1:
        flags |= {"recompute_method": recompute[1], "recompute_num_layers": 1}
    plain = pretrain_gpt(tiny_gpt(golden, tmp_path), tmp_path).check()
    again = pretrain_gpt(tiny_gpt(golden, tmp_path, **flags), tmp_path).check()
    assert again.losses == plain.losses


def test_process_groups_can_be_made_after_initialization(golden, tmp_path):
    words = tiny_gpt(golden, tmp_path, train_iters=3, lazy_mpu_init="yes")
    assert list(pretrain_gpt(words, tmp_path).check().losses) == [1, 2, 3]
