"""Layers that predict further tokens: their targets, gradients, figures, and what is refused."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.context_parallel.zigzag import shift_left, take_chunks
from megatron.core.errors import ConfigError
from megatron.core.models.family import BatchShape
from megatron.core.models.gpt.family import operations
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.parameter_count import gpt_parameter_count
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper, roll_tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.model_family import model_shape
from tests.distributed.pool import run_ranks
from tests.unit_tests.models.golden_gpt import GoldenCase

VOCABULARY, LENGTH, DEPTHS, FACTOR = 23, 10, 2, 0.3


@pytest.fixture(autouse=True)
def empty_tracker():
    MTPLossLoggingHelper.clean_loss_in_tracker()
    yield
    MTPLossLoggingHelper.clean_loss_in_tracker()


def config(**changes: Any) -> TransformerConfig:
    fields = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
        "mtp_num_layers": DEPTHS,
        "mtp_loss_scaling_factor": FACTOR,
        "params_dtype": torch.float64,
    }
    return TransformerConfig(**(fields | changes))


def make_model(settings: TransformerConfig, **changes: Any) -> GPTModel:
    model_parallel_cuda_manual_seed(3)
    spec = get_gpt_layer_local_spec()
    arguments = {
        "position_embedding_type": "none",
        "mtp_block_spec": get_gpt_mtp_block_spec(settings, spec, False),
    }
    return GPTModel(settings, spec, VOCABULARY, LENGTH, **(arguments | changes)).double()


def test_a_rolled_tensor_has_zeros_in_what_became_free() -> None:
    numbers = torch.arange(1, 7).view(2, 3)
    left, total = roll_tensor(numbers)
    assert left.tolist() == [[2, 3, 0], [5, 6, 0]] and int(total) == 16
    right, total = roll_tensor(numbers, shifts=1, dims=0)
    assert right.tolist() == [[0, 0, 0], [1, 2, 3]] and int(total) == 6
    assert numbers[0].tolist() == [1, 2, 3]


def _shifted_parts(size: int) -> None:
    parallel_state.initialize_model_parallel(context_parallel_size=size, create_gloo_process_groups=False)
    whole = torch.arange(1, 4 * 2 * size + 1).view(2, -1)
    rank = parallel_state.get_context_parallel_rank()
    found = take_chunks(whole, 1, rank, size)
    for places in range(1, 4):
        found = shift_left(found)
        expected = torch.cat((whole[:, places:], torch.zeros(2, places, dtype=torch.int64)), dim=1)
        assert torch.equal(found, take_chunks(expected, 1, rank, size)), (rank, places)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_sequence_shift_it_as_a_whole(size: int) -> None:
    run_ranks(size, _shifted_parts, size)


def reference_losses(model: GPTModel, tokens: Tensor, labels: Tensor, mask: Tensor) -> list[Tensor]:
    """Main loss and that of each depth, over sequences cut to the positions that have a target.

    Causal layers give the same for these positions; nothing is shifted and nothing is filled.
    """
    after = model.config.mtp_after_norm
    norm = model.decoder.final_layernorm
    hidden = model.embedding(tokens, None)
    for layer in model.decoder.layers:
        hidden, _ = layer(hidden)
    losses, passed_on = [], norm(hidden) if after else hidden
    outputs = [norm(hidden)]
    for depth, layer in enumerate(model.mtp.layers, 1):
        length = LENGTH - depth
        ahead = model.embedding(tokens[:, depth:], None)
        joined = torch.cat((layer.enorm(ahead), layer.hnorm(passed_on[:length])), -1)
        made, _ = layer.transformer_layer(F.linear(joined, layer.eh_proj.weight))
        outputs.append(layer.final_layernorm(made))
        passed_on = outputs[-1] if after else made
    for depth, output in enumerate(outputs):
        logits = F.linear(output, model.output_layer.weight)
        counted = mask[:, depth:].t()
        each = F.cross_entropy(logits.flatten(0, 1), labels[:, depth:].t().reshape(-1), reduction="none")
        losses.append((each.view_as(counted) * counted).sum() / counted.sum())
    return losses


@pytest.mark.parametrize("after", [True, False])
def test_every_depth_predicts_the_token_after_those_it_sees(after: bool) -> None:
    model = make_model(config(mtp_after_norm=after))
    text = torch.randint(VOCABULARY, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens, labels = text[:, :-1], text[:, 1:]
    mask = (torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.3).double()
    main, *further = reference_losses(model, tokens, labels, mask)
    expected = torch.autograd.grad(main + FACTOR / DEPTHS * sum(further), list(model.parameters()))

    per_token = model(tokens, None, None, labels=labels, loss_mask=mask)
    loss = (per_token * mask).sum() / mask.sum()
    assert loss.item() == pytest.approx(main.item(), rel=1e-6)
    found = MTPLossLoggingHelper.tracker["values"].tolist()
    assert found == pytest.approx([each.item() for each in further], rel=1e-6)
    loss.backward()
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m
        )


def test_an_evaluation_computes_the_main_loss_alone() -> None:
    model = make_model(config())
    tokens = torch.arange(LENGTH).view(1, -1)
    with torch.no_grad():
        without = model(tokens, None, None, labels=tokens)
    assert not MTPLossLoggingHelper.tracker
    torch.testing.assert_close(model(tokens, None, None, labels=tokens).detach(), without)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_schedule_scales_further_losses_as_the_main_one(golden: Path, per_token: bool) -> None:
    """Two equal micro-batches at loss scale 8 against the measured gradients of one."""
    case = GoldenCase(golden / "model" / "mtp1")
    model = case.model(calculate_per_token_loss=per_token)
    model.config.grad_scale_func = lambda loss: loss * 8
    mask = case.io["loss_mask"].float()

    def step(data_iterator: Any, model: GPTModel) -> Any:
        tokens, positions, labels = (case.io[name] for name in ("tokens", "position_ids", "labels"))
        losses = model(tokens, positions, None, labels=labels, loss_mask=mask)
        return losses, lambda each: ((each * mask).sum(), mask.sum().long(), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(()),
        model=model,
        num_microbatches=2,
        seq_length=16,
        micro_batch_size=2,
    )
    counted = float(roll_tensor(mask)[1])
    for name, parameter in model.named_parameters():
        # Where every gradient comes from the further loss, a sum over tokens is a multiple of the mean.
        if name.startswith("mtp.") or not per_token:
            factor = 8 * (2 * counted if per_token else 1)
            norm = case.info["grad_norm"][name] * factor
            assert float(parameter.grad.double().norm()) == pytest.approx(norm, rel=1e-5), name


class Writer:
    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, value, step))


def test_losses_of_a_step_are_means_over_micro_batches_and_add_up_to_the_line() -> None:
    writer, totals = Writer(), {"lm loss": 1.0}
    for iteration, losses in enumerate(([2.0, 4.0], [6.0, 10.0]), 1):
        for loss in losses:
            for depth in range(2):
                MTPLossLoggingHelper.save_loss_to_tracker(torch.tensor(loss + depth), depth, 2)
        MTPLossLoggingHelper.track_mtp_metrics(0.5, iteration, writer, None, totals)
    assert writer.points == [
        ("mtp_1 loss", 3.0, 1),
        ("mtp_2 loss", 4.0, 1),
        ("mtp_1 loss", 8.0, 2),
        ("mtp_2 loss", 9.0, 2),
    ]
    assert totals == {"lm loss": 1.0, "mtp_1 loss": 11.0, "mtp_2 loss": 13.0}
    MTPLossLoggingHelper.track_mtp_metrics(0.5, 3, writer, None, totals)
    assert len(writer.points) == 4


def test_a_model_without_the_layers_of_its_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mtp_block_spec has 0 layers .* should have 2"):
        make_model(config(), mtp_block_spec=None)
    spec = get_gpt_mtp_block_spec(config(mtp_num_layers=1), get_gpt_layer_local_spec(), False)
    with pytest.raises(ConfigError, match=r"mtp_block_spec has 1 layers .* should have 0"):
        make_model(config(mtp_num_layers=None), mtp_block_spec=spec)
    with pytest.raises(ConfigError, match="positions of further tokens are not learned"):
        make_model(config(), position_embedding_type="learned_absolute")
    with pytest.raises(ConfigError, match="mtp_loss_scaling_factor"):
        config(mtp_loss_scaling_factor=None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("te_names", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_parameter_count_of_a_last_stage(tied: bool, te_names: bool, first: bool) -> None:
    settings = config(init_model_with_meta_device=True, perform_initialization=False)
    spec = get_gpt_layer_local_spec()
    model = GPTModel(
        settings,
        spec,
        VOCABULARY,
        LENGTH,
        pre_process=first,
        position_embedding_type="none",
        share_embeddings_and_output_weights=tied,
        mtp_block_spec=get_gpt_mtp_block_spec(settings, spec, te_names),
    )
    built = sum(parameter.numel() for parameter in model.parameters())
    expected = gpt_parameter_count(settings, VOCABULARY, LENGTH, "none", tied, has_embedding=first)
    assert built == expected


def test_operations_of_further_tokens() -> None:
    arguments = {
        "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 32, "num_attention_heads": 2, "kv_channels": 4,
        "group_query_attention": False, "num_query_groups": 1, "swiglu": False, "padded_vocab_size": 50,
    }  # fmt: skip
    batch = BatchShape(3, 16)
    plain = operations(model_shape(Namespace(**arguments)), batch)
    further = operations(model_shape(Namespace(**arguments, mtp_num_layers=2)), batch)
    layer = 12 * 8 * 32 + 12 * 8 * 8 * (2 + 16 / 16)
    assert further - plain == 3 * 16 * 2 * (layer + 6 * (3 * 8 + 2 * 8 * 8) + 6 * 8 * 50)
