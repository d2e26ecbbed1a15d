"""Models without a wrapper: schedules, the sums over other ranks, and torch's optimizers."""

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.distributed.finalize_model_grads import (
    _allreduce_layernorm_grads,
    _allreduce_position_embedding_grads,
    _allreduce_word_embedding_grads,
)
from megatron.core.errors import UsageError
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import SGD, Adam, ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.initial_weights import own_slice
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

VOCABULARY, SEQUENCE, BATCH, COUNT = 16, 8, 2, 3


def build(tensor_ranks, stages):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        qk_layernorm=True,
        init_method_std=0.3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float64,
        pipeline_dtype=torch.float64,
        tensor_model_parallel_size=tensor_ranks,
        sequence_parallel=tensor_ranks > 1,
        pipeline_model_parallel_size=stages,
    )
    model_parallel_cuda_manual_seed(5)
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, False),
        VOCABULARY,
        SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    )


def gradients(model):
    """Of one step over a few micro-batches, by the functions that a wrapper's owner would call too."""
    generator = torch.Generator().manual_seed(2)
    batches = torch.randint(VOCABULARY, (COUNT, 2, BATCH, SEQUENCE), generator=generator)

    def step(iterator, model):
        tokens, labels = next(iterator)
        losses = model(tokens, torch.arange(SEQUENCE).expand(BATCH, -1), None, labels=labels)
        return losses, lambda losses: (losses.mean(), {"loss": float(losses.detach().mean())})

    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=COUNT,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
    )
    for finish in (
        _allreduce_layernorm_grads,
        _allreduce_word_embedding_grads,
        _allreduce_position_embedding_grads,
    ):
        finish([model], model.config)
    return reports, {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(tensor_ranks, stages):
    parallel_state.initialize_model_parallel()
    whole_reports, whole = gradients(build(1, 1))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_ranks, stages)
    model = build(tensor_ranks, stages)
    reports, found = gradients(model)
    stage, place = dist.get_rank() // tensor_ranks, parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers.0") and stage == 1:
            expected = whole[name.replace("layers.0", "layers.1")]
        else:
            expected = whole[name.replace("output_layer.weight", "embedding.word_embeddings.weight")]
        if getattr(parameter, "tensor_model_parallel", False):
            cut = (parameter.partition_dim, parameter.partition_stride, place, tensor_ranks)
            expected = own_slice(expected, *cut)
        torch.testing.assert_close(found[name], expected, msg=lambda text, name=name: f"{name}: {text}")
    if parallel_state.is_pipeline_last_stage():
        assert [r["loss"] for r in reports] == pytest.approx([r["loss"] for r in whole_reports])
    return True


@pytest.mark.parametrize(("tensor_ranks", "stages"), [(2, 1), (1, 2), (2, 2)])
def test_a_bare_gpt_on_several_ranks_learns_what_one_learns(tensor_ranks, stages):
    ranks = tensor_ranks * stages
    assert run_ranks(ranks, compare, tensor_ranks, stages) == [True] * ranks


def frozen_and_unused():
    parallel_state.initialize_model_parallel(2)
    model = build(2, 1)
    model.decoder.layers[0].requires_grad_(False)
    for parameter in model.decoder.layers[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    _allreduce_layernorm_grads([model], model.config)
    assert model.decoder.layers[0].input_layernorm.weight.grad is None
    assert model.decoder.final_layernorm.weight.grad is None
    layer = model.decoder.layers[1]
    summed = (
        layer.input_layernorm.weight,
        layer.self_attention.q_layernorm.weight,
        layer.mlp.linear_fc2.bias,
    )
    return [parameter.grad.flatten()[0].item() for parameter in (*summed, layer.mlp.linear_fc1.weight)]


def test_frozen_and_unused_parameters_have_nothing_to_sum():
    assert run_ranks(2, frozen_and_unused) == [[2.0, 2.0, 2.0, 1.0]] * 2


def test_finalizing_a_bare_model_says_what_is_missing():
    model = torch.nn.Linear(1, 1)
    model.config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
    with pytest.raises(UsageError, match="chunk 0, a Linear, cannot reduce"):
        finalize_model_grads([model])


def test_a_chain_of_torchs_optimizers():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    first, second = list(net[0].parameters()), list(net[1].parameters())
    members = [Adam(first, lr=0.01), SGD(second, lr=0.1, momentum=0.9)]
    chain = ChainedOptimizer(members)
    chain.param_groups[0]["lr"] = 0.02
    assert members[0].param_groups[0]["lr"] == 0.02
    assert len(chain.state) == 0
    net(torch.ones(1, 3)).sum().backward()
    for member in members:
        member.step()
    assert len(chain.state) == 4
    for key, entry in chain.state.items():
        chain.state[key] = {name: value.double() for name, value in entry.items()}
    assert members[0].state[first[0]]["exp_avg"].dtype == torch.float64
    assert members[1].state[second[0]]["momentum_buffer"].dtype == torch.float64
    chain.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert ChainedOptimizer([]).param_groups == []
