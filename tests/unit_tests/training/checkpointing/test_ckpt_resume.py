"""A run that stops and starts again takes the same steps, bit for bit."""

import copy
import random

import numpy as np
import pytest
import torch
from checkpointed_gpt import GPTRun

from tests.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_process")

STEPS = 6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_run_gives_equal_bits(run_args, precision: str, stop: int):
    whole = GPTRun(run_args, precision, dropout=0.2)
    results = []
    for step in range(STEPS):
        if step == stop:
            whole.save(stop)
        results.append(whole.step())
    end = copy.deepcopy(whole.state())
    if precision == "fp16":  # the loss scale is searched for: some steps are skipped
        assert {success for _, success, _ in results} == {True, False}

    run_args.consumed_train_samples = 0
    torch.rand(7), random.random(), np.random.rand()
    resumed = GPTRun(run_args, precision, dropout=0.2, seed=99)
    assert resumed.load()[0] == stop
    assert [resumed.step() for _ in range(stop, STEPS)] == results[stop:]
    assert_same_bits(resumed.state(), end)


def test_resume_restores_dropout_streams(run_args):
    """Without the random states the same resume gives other losses, so the test above sees them."""
    whole = GPTRun(run_args, dropout=0.2)
    whole.step()
    whole.save(1)
    expected = whole.step()
    run_args.consumed_train_samples = 0
    run_args.no_load_rng = True
    resumed = GPTRun(run_args, dropout=0.2, seed=99)
    resumed.load()
    assert resumed.step() != expected


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    ("saved", "loaded"), [("local", "transformer_engine"), ("transformer_engine", "local")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_and_fused_layers_resume_from_each_other(
    run_args, precision: str, saved: str, loaded: str, biases: bool
):
    """Parameters have other names and other numbers in the two; weights and moments follow the weight."""
    first = GPTRun(run_args, precision, layer=saved, biases=biases)
    first.step()
    first.step()
    first.save(2)
    expected = [first.step() for _ in range(2)]
    run_args.consumed_train_samples = 0
    second = GPTRun(run_args, precision, layer=loaded, biases=biases, seed=99)
    second.load()
    assert first.names_by_number() != second.names_by_number()
    found = [second.step() for _ in range(2)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_loading_weights_alone_updates_the_fp32_copies(run_args, precision: str):
    first = GPTRun(run_args, precision)
    first.save(1)
    run_args.finetune = True
    second = GPTRun(run_args, precision, seed=99)
    second.load()
    for copy_ in second.optimizer.chained_optimizers[0].get_parameters():
        assert copy_.dtype == torch.float32
    assert_same_bits(second.gpt.state_dict(), first.gpt.state_dict())
    copies = second.optimizer.state_dict()["fp32_from_fp16_params"]
    flat = [main for group in copies for main in group]
    by_name = dict(second.gpt.named_parameters())
    for main, name in zip(flat, second.names_by_number(), strict=True):
        assert torch.equal(main, by_name[name].float()), name
