"""The figures of a log line cover exactly the iterations since the last one."""

import re
from argparse import Namespace

import pytest
import torch

from megatron.training.logging import step_log

SEQUENCE, HIDDEN, LAYERS, VOCABULARY = 16, 8, 2, 32


@pytest.fixture
def log(monkeypatch):
    """Calls ``training_log`` with an iteration, its samples and its loss; returns the line, or None."""
    args = Namespace(
        seq_length=SEQUENCE, hidden_size=HIDDEN, num_layers=LAYERS, num_attention_heads=2, kv_channels=4,
        group_query_attention=False, num_query_groups=2, swiglu=False, glu_gate_last=False,
        ffn_hidden_size=4 * HIDDEN, padded_vocab_size=VOCABULARY, world_size=1, data_parallel_size=1,
        micro_batch_size=1, train_iters=100, consumed_train_samples=0, skipped_train_samples=0,
        tensorboard_log_interval=1, log_interval=10, log_timers_to_tensorboard=False, tensorboard_dir=None,
        log_throughput=True, decoupled_lr=None,
    )  # fmt: skip
    timers, printed, batch = FakeTimers(), [], [0]
    monkeypatch.setattr(step_log, "get_args", lambda: args)
    monkeypatch.setattr(step_log, "get_timers", lambda: timers)
    monkeypatch.setattr(step_log, "get_num_microbatches", lambda: batch[0])
    monkeypatch.setattr(step_log, "print_rank_last", printed.append)
    totals = {}

    def call(iteration, samples, loss=1.0, skipped=0):
        batch[0] = samples
        args.consumed_train_samples += samples
        losses = {"lm loss": torch.tensor(loss)}
        before = len(printed)
        step_log.training_log(losses, totals, 1e-3, None, iteration, 1.0, False, skipped, 0.5, None, None)
        return printed[-1] if len(printed) > before else None

    call.args, call.timers = args, timers
    return call


class FakeTimers:
    """Every interval took six seconds; notes what reports are divided by."""

    def __init__(self):
        self.normalizers = []

    def __call__(self, name):
        return self

    def elapsed(self, barrier=False):
        return 6.0

    def log(self, names, normalizer):
        self.normalizers.append(normalizer)


def field(line, name):
    return re.search(rf"\| {re.escape(name)}: +(\S+) \|", line)[1]


def test_time_of_a_checkpoint_does_not_count_in_its_interval(log):
    # Resumed at 7, with a line every ten iterations: three are counted.
    assert log(8, 4, loss=3.0) is None
    assert log(9, 4, loss=4.0) is None
    line = log(10, 4, loss=8.0)
    assert field(line, "elapsed time per iteration (ms)") == "2000.0"
    assert float(field(line, "lm loss")) == 5.0
    assert log.timers.normalizers == [3]
    for iteration in range(11, 20):
        assert log(iteration, 4) is None
    assert field(log(20, 4), "elapsed time per iteration (ms)") == "600.0"
    assert log.timers.normalizers == [3, 10]


def test_skipped_steps_count_in_time_and_not_in_losses(log):
    log(9, 4, loss=1e9, skipped=1)
    line = log(10, 4, loss=2.0)
    assert float(field(line, "lm loss")) == 2.0
    assert field(line, "elapsed time per iteration (ms)") == "3000.0"
    assert field(line, "number of skipped iterations") == "1"


def test_throughput_counts_the_samples_of_a_growing_batch(log):
    log.args.log_interval = 3
    for iteration, samples in ((1, 4), (2, 4)):
        log(iteration, samples)
    line = log(3, 16)
    # 72 b s L h^2 (1 + s/(6h) + V/(12hL)): Narayanan et al. 2021, section 5.1, with causal attention halved.
    b, s, h = 4 + 4 + 16, SEQUENCE, HIDDEN
    operations = 72 * b * s * LAYERS * h * h * (1 + s / (12 * h) + VOCABULARY / (12 * h * LAYERS))
    printed = float(field(line, "throughput per GPU (TFLOP/s/GPU)"))
    assert printed == pytest.approx(operations / 6.0 / 1e12, rel=0.05)  # two digits
    assert field(line, "global batch size") == "16"


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(123.456, 1, "123.5"), (0.25, 1, "0.25"), (0.0, 1, "0.0"), (3.2e-7, 2, "0.00000032"),
     (-0.04, 1, "-0.040"), (float("inf"), 1, "inf"), (float("nan"), 2, "nan"), (1.0, 2, "1.00")],
)  # fmt: skip
def test_small_figures_keep_two_digits(value, decimals, text):
    assert step_log.rounded(value, decimals) == text
