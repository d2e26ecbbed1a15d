"""A model with experts starts from a dense checkpoint with the dense model's loss, however it is spread."""

import pytest
import torch

from tests.distributed.gpt_run import NO_DROPOUT, command_line
from tests.distributed.layouts import Layout
from tests.distributed.pool import run_ranks
from tests.distributed.real_loop import train

EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
LAYOUTS = {
    "one rank": (Layout(model="llama"), EXPERTS),
    "sharded experts": (
        Layout(dp=2, model="llama", reduction="sharded"),
        f"{EXPERTS} --expert-model-parallel-size 2 --moe-grouped-gemm",
    ),
    "experts of all names": (
        Layout(dp=2, model="llama"),
        f"{EXPERTS} --expert-model-parallel-size 2 --moe-grouped-gemm --transformer-impl transformer_engine",
    ),
    "stages": (Layout(pp=2, dp=2, model="llama"), f"{EXPERTS} --expert-model-parallel-size 2"),
}


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def losses(layout, words, data_cache):
    argv = [*command_line(layout, data_cache, NO_DROPOUT), "--save-interval", "100", *words.split()]
    records = run_ranks(layout.world_size, train, argv, False, timeout=300)
    return [record.losses for record in records if None not in record.losses]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_first_loss_is_that_of_the_dense_model(name, precision, data_cache, tmp_path):
    layout, experts = LAYOUTS[name]
    dense, save = tmp_path / "dense", tmp_path / "experts"
    names = "--transformer-impl transformer_engine" if "transformer_engine" in experts else ""
    losses(layout, f"--save {dense} --exit-interval 2 {names} {precision}", data_cache)
    ((expected, *_), *_) = losses(layout, f"--load {dense} --finetune {names} {precision}", data_cache)
    found = losses(
        layout, f"--load {dense} --save {save} --moe-use-upcycling {experts} {precision}", data_cache
    )
    for ranks_losses in found:
        assert ranks_losses[0] == pytest.approx(expected, rel=2e-3 if precision else 1e-5)
    saved = torch.load(next((save / "iter_0000001").glob("*/model_optim_rng.pt")), weights_only=False)
    assert saved["iteration"] == 1
    assert any("mlp.router.weight" in key for key in saved["model"])
    assert "optimizer" not in saved


def test_a_destination_with_a_checkpoint_is_refused(data_cache, tmp_path):
    layout = Layout(model="llama")
    losses(layout, f"--save {tmp_path} --exit-interval 2", data_cache)
    with pytest.raises(AssertionError, match="holds a checkpoint already"):
        losses(layout, f"--load {tmp_path} --save {tmp_path} --moe-use-upcycling {EXPERTS}", data_cache)


def test_a_source_without_a_checkpoint_is_refused(data_cache, tmp_path):
    with pytest.raises(AssertionError, match="there is no checkpoint in"):
        losses(
            Layout(model="llama"),
            f"--load {tmp_path / 'none'} --save {tmp_path / 'new'} --moe-use-upcycling {EXPERTS}",
            data_cache,
        )
