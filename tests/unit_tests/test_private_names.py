"""Helpers with private names that other projects call: what they do, not only that they import."""

import importlib
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron.core import parallel_state
from megatron.core.errors import ConfigError, DataError, NotBuiltYetError, UsageError
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions import fused_bias_geglu, fused_bias_swiglu
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.models.common.embeddings import rotary_pos_embedding as rotary
from megatron.core.models.gpt.gpt_layer_specs import _get_mlp_module_spec, get_mlp_module_spec
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups_and_buffers,
    _update_min_and_max_lr_in_param_groups,
)
from megatron.core.pipeline_parallel import p2p_communication as p2p
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.data import _MAX_DATA_DIM, _check_data_types
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.tensor_parallel.random import (
    _get_cuda_rng_state,
    _set_cuda_rng_state,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    drain_embedding_wgrad_compute,
    get_data_parallel_group_if_dtensor,
    get_full_tensor_if_necessary,
)
from tests.distributed.pool import run_ranks

SHAPE = (4, 3, 6)
# The package has a function of the same name.
finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")


def held(rank: int, shape=SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- tensor parallelism --------------------------------------------------------------------------------


def check_mappings() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(ranks, create_gloo_process_groups=False)
    mine, everyone = held(rank), [held(r) for r in range(ranks)]
    total = sum(everyone)
    whole = [torch.cat(everyone, dim) for dim in (0, 2)]
    close = torch.testing.assert_close
    close(mappings._reduce(mine.clone()), total)
    in_place = mine.clone()
    mappings._reduce(in_place)
    close(in_place, total)
    close(mappings._split_along_first_dim(mine), mine.chunk(ranks, 0)[rank])
    close(mappings._split_along_last_dim(mine), mine.chunk(ranks, 2)[rank])
    close(mappings._gather_along_first_dim(mine), whole[0])
    close(mappings._gather_along_last_dim(mine), whole[1])
    close(mappings._reduce_scatter_along_first_dim(mine), total.chunk(ranks, 0)[rank])
    close(mappings._reduce_scatter_along_last_dim(mine), total.chunk(ranks, 2)[rank])
    group = parallel_state.get_tensor_model_parallel_group()
    rows = [r + 1 for r in range(ranks)]
    uneven = torch.cat([held(r)[: rows[r]] for r in range(ranks)])
    close(mappings._gather_along_first_dim(mine[: rows[rank]], group=group, output_split_sizes=rows), uneven)
    close(mappings._gather_along_first_dim(mine, use_global_buffer=True), whole[0])


def test_steps_of_mappings() -> None:
    run_ranks(2, check_mappings)


def test_data_types_are_checked() -> None:
    assert _MAX_DATA_DIM == 5
    data = {"tokens": torch.zeros(2, dtype=torch.int64)}
    _check_data_types(["tokens"], data, torch.int64)
    for error in (DataError, AssertionError):
        with pytest.raises(error, match=r"expected torch\.float32"):
            _check_data_types(keys=["tokens"], data=data, target_dtype=torch.float32)


def test_the_random_state_can_be_put_back() -> None:
    state = _get_cuda_rng_state(device="cuda", clone=True)
    first = torch.rand(3)
    _set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


# ---- rotary positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_is_cosine_times_x_plus_sine_times_its_partner(interleaved: bool) -> None:
    t, freqs = held(0, (5, 2, 3, 8)), held(1, (5, 1, 1, 8))
    half = freqs[..., :4]
    freqs = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    expected = t * freqs.cos() + rotary._rotate_half(t, interleaved) * freqs.sin()
    torch.testing.assert_close(rotary._apply_rotary_pos_emb_bshd(t, freqs, interleaved), expected)
    scaled = rotary._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved, mscale=1.5)
    torch.testing.assert_close(scaled, 1.5 * expected)


def test_partners() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rotary._rotate_half(x, False).tolist() == [-3.0, -4.0, 1.0, 2.0]
    assert rotary._rotate_half(x, True).tolist() == [-2.0, 1.0, -4.0, 3.0]


def test_latent_attention_orders_channels_even_then_odd_first() -> None:
    t, angles = held(0, (5, 2, 3, 8)), held(1, (5, 1, 1, 2))
    freqs = torch.cat((angles, angles), -1)  # rotates 4 of 8 channels
    ordered = torch.cat((t[..., [0, 2, 1, 3]], t[..., 4:]), -1)
    expected = rotary._apply_rotary_pos_emb_bshd(ordered, freqs)
    torch.testing.assert_close(
        rotary._apply_rotary_pos_emb_bshd(t, freqs, multi_latent_attention=True), expected
    )


def test_packed_sequences_begin_anew() -> None:
    t, angles = held(0, (7, 3, 4)), held(1, (5, 1, 1, 2))
    freqs, ends = torch.cat((angles, angles), -1), torch.tensor([0, 3, 7])
    parts = [rotary._apply_rotary_pos_emb_bshd(p[:, None], freqs[: len(p)])[:, 0] for p in t.split([3, 4])]
    for packed in (
        rotary._apply_rotary_pos_emb_thd(t, ends, freqs),
        te.fused_apply_rotary_pos_emb_thd(t, ends, freqs),
    ):
        torch.testing.assert_close(packed, torch.cat(parts))
    with pytest.raises(ConfigError, match="rank 1 of 2"):
        te.fused_apply_rotary_pos_emb_thd(t, ends, freqs, cp_size=2, cp_rank=1)


# ---- pipelines -----------------------------------------------------------------------------------------


def begin_pipeline():
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(1, ranks, create_gloo_process_groups=False)
    return dist.get_rank(), ranks


def exchange(batched: bool, wait: bool):
    """Everyone sends 10 + rank onwards and 20 + rank back, round the ring."""
    begin_pipeline()
    rank = dist.get_rank()
    config = TransformerConfig(
        num_layers=8,
        hidden_size=2,
        num_attention_heads=1,
        pipeline_dtype=torch.float64,
        batch_p2p_comm=batched,
    )
    onwards, back = (torch.full((1, 1, 2), base + rank, dtype=torch.float64) for base in (10.0, 20.0))
    before, after, handles = p2p._communicate(
        tensor_send_next=onwards,
        tensor_send_prev=back,
        recv_prev=True,
        recv_next=True,
        tensor_shape=(1, 1, 2),
        config=config,
        wait_on_reqs=wait,
    )
    for handle in handles or ():
        handle.wait()
    return before.flatten()[0].item(), after.flatten()[0].item(), handles is None


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("wait", [True, False])
def test_communicating_round_a_ring(batched: bool, wait: bool) -> None:
    assert run_ranks(3, exchange, batched, wait) == [
        (12.0, 21.0, wait),
        (10.0, 22.0, wait),
        (11.0, 20.0, wait),
    ]


def announce():
    rank, ranks = begin_pipeline()
    config = TransformerConfig(
        num_layers=8, hidden_size=2, num_attention_heads=1, pipeline_dtype=torch.float32
    )
    last = rank == ranks - 1
    onwards = None if last else torch.zeros(rank + 1, 5, 2)
    back = None if rank == 0 else torch.zeros(rank + 7, 5, 2)
    return p2p._communicate_shapes(onwards, back, recv_prev=rank > 0, recv_next=not last, config=config)


def test_shapes_are_announced_to_both_sides() -> None:
    assert run_ranks(3, announce) == [
        ([0, 0, 0], [8, 5, 2]),
        ([1, 5, 2], [9, 5, 2]),
        ([2, 5, 2], [0, 0, 0]),
    ]


def transfer(name: str):
    rank, ranks = begin_pipeline()
    onwards, back = torch.full((2,), 10.0 + rank), torch.full((2,), 20.0 + rank)
    from_previous, from_next = torch.empty(2), torch.empty(2)
    handles = getattr(p2p, name)(
        tensor_send_prev=back,
        tensor_recv_prev=from_previous,
        tensor_send_next=onwards,
        tensor_recv_next=from_next,
        group=parallel_state.get_pipeline_model_parallel_group(),
        prev_pipeline_rank=(rank - 1) % ranks,
        next_pipeline_rank=(rank + 1) % ranks,
    )
    names = sorted(handles) if isinstance(handles, dict) else []
    for handle in handles.values() if names else handles:
        handle.wait()
    return from_previous[0].item(), from_next[0].item(), names


@pytest.mark.parametrize("name", ["_p2p_ops", "_batched_p2p_ops"])
def test_single_and_batched_transfers(name: str) -> None:
    got = run_ranks(4, transfer, name)
    assert [each[:2] for each in got] == [(13.0, 21.0), (10.0, 22.0), (11.0, 23.0), (12.0, 20.0)]
    wanted = ["recv_next", "recv_prev", "send_next", "send_prev"] if name == "_p2p_ops" else []
    assert all(each[2] == wanted for each in got)


def late_gradients(tied: bool, main_grad: bool):
    """The output layer's weight gradient of two micro-batches, computed at the end of the step."""
    parallel_state.initialize_model_parallel(1, create_gloo_process_groups=False)
    config = types.SimpleNamespace(defer_embedding_wgrad_compute=True, sequence_parallel=False)
    weight = torch.nn.Parameter(held(9, (5, 6)))
    if main_grad:
        weight.main_grad = torch.zeros_like(weight)
    model = torch.nn.Module()
    model.post_process, model.share_embeddings_and_output_weights = True, tied
    model.output_layer = types.SimpleNamespace(weight=None if tied else weight)
    model.shared_embedding_or_output_weight = lambda: weight
    model.embedding_activation_buffer, model.grad_output_buffer = [torch.zeros(1)], []
    wrapped = torch.nn.Module()
    wrapped.module = model
    found = schedules.clear_embedding_activation_buffer(config, [wrapped])
    assert found is model and model.embedding_activation_buffer == []
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for number in range(2):
        x, grad_output = held(number), held(10 + number, (4, 3, 5))
        model.embedding_activation_buffer.append(x)
        model.grad_output_buffer.append(grad_output)
        expected += torch.einsum("sbv,sbh->vh", grad_output, x)
    schedules.finish_embedding_wgrad_compute(config, model)
    torch.testing.assert_close(weight.main_grad if main_grad else weight.grad, expected)
    assert model.embedding_activation_buffer == model.grad_output_buffer == []
    off = types.SimpleNamespace(defer_embedding_wgrad_compute=False)
    model.embedding_activation_buffer.append(x)
    assert schedules.clear_embedding_activation_buffer(off, [wrapped]) is None
    assert model.embedding_activation_buffer.pop() is x
    schedules.finish_embedding_wgrad_compute(off, model)


@pytest.mark.parametrize("tied", [False, True])
def test_late_gradients_of_the_output_layer(tied: bool) -> None:
    run_ranks(1, late_gradients, tied, True)
    run_ranks(1, late_gradients, tied, False)


def test_buffers_of_different_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="1 activations of the output layer but 0 gradients"):
        drain_embedding_wgrad_compute(types.SimpleNamespace(sequence_parallel=False), [held(0)], [], held(1))


# ---- gradients and optimizers --------------------------------------------------------------------------


class Embedder(torch.nn.Module):
    def __init__(self, value: float):
        super().__init__()
        for name, is_shared in (("shared", True), ("own", False)):
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.pipeline_parallel = is_shared
            parameter.main_grad = torch.full((2,), value)
            setattr(self, name, parameter)


def conditional(has_embedder: bool):
    rank, _ = begin_pipeline()
    config = types.SimpleNamespace(has_cond_embedder=has_embedder)
    chunks = [Embedder(1.0 + rank), Embedder(10.0 + rank)]
    finalize._allreduce_conditional_embedding_grads(chunks, config)
    return [(chunk.shared.main_grad[0].item(), chunk.own.main_grad[0].item()) for chunk in chunks]


def test_gradients_of_conditional_embedders_are_summed_over_stages_and_chunks() -> None:
    # 1 + 2 of the first chunks, 10 + 11 of the second
    assert run_ranks(2, conditional, True) == [[(24.0, 1.0), (24.0, 10.0)], [(24.0, 2.0), (24.0, 11.0)]]
    assert run_ranks(2, conditional, False) == [[(1.0, 1.0), (10.0, 10.0)], [(2.0, 2.0), (11.0, 11.0)]]


def check_dtensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(6.0).view(3, 2)
    spread = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(finalize._unshard_if_dtensor(spread), whole)
    again = finalize._reshard_if_dtensor(whole * 2, spread)
    assert isinstance(again, DTensor) and torch.equal(again.full_tensor(), whole * 2)
    assert get_data_parallel_group_if_dtensor(spread).size() == 2
    # Three rows on two ranks leave nobody without; one row does.
    assert get_full_tensor_if_necessary(spread) is spread
    single = distribute_tensor(torch.ones(1, 2), mesh, [Shard(0)])
    assert torch.equal(get_full_tensor_if_necessary(single), torch.ones(1, 2))


def test_tensors_spread_over_ranks() -> None:
    run_ranks(2, check_dtensors)
    plain = torch.ones(2)
    assert finalize._unshard_if_dtensor(plain) is plain
    assert finalize._reshard_if_dtensor(plain, torch.zeros(2)) is plain
    assert get_data_parallel_group_if_dtensor(plain) is None
    assert get_full_tensor_if_necessary(plain) is plain


def test_where_the_gradient_is() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert finalize._get_main_grad_attr(parameter) == "grad"
    parameter.main_grad = torch.zeros(1)
    assert finalize._get_main_grad_attr(parameter, use_custom_fsdp=False) == "main_grad"
    with pytest.raises(NotBuiltYetError):
        finalize._get_main_grad_attr(parameter, use_custom_fsdp=True)


def test_groups_buffers_and_an_optimizer_from_them() -> None:
    model = torch.nn.Linear(3, 2)
    model.grads = ["a buffer"]
    config = OptimizerConfig(optimizer="adam", lr=0.1, min_lr=0.01, weight_decay=0.0, clip_grad=0.0)
    groups, buffers = _get_param_groups_and_buffers(
        [model],
        model_chunk_offset=4,
        config=config,
        no_weight_decay_cond=None,
        scale_lr_cond=None,
        lr_mult=1.0,
        filter_fn=lambda group: not group["is_expert_parallel"] and group["wd_mult"] == 1.0,
        buffer_name="grads",
    )
    assert buffers == {4: ["a buffer"]}
    ((parameter,),) = [group["params"] for group in groups]
    assert parameter is model.weight
    start, gradient = model.weight.detach().clone(), held(0, (2, 3)).float()
    model.weight.main_grad = gradient.clone()
    optimizer = _get_megatron_optimizer_based_on_param_groups(config, [model], groups, {})
    assert optimizer.step()[0]
    # Adam's first step has the size of the rate and the sign of the gradient.
    torch.testing.assert_close(model.weight.detach(), start - 0.1 * gradient.sign(), atol=1e-6, rtol=0)
    with pytest.raises(NotBuiltYetError, match="more than one instance"):
        _get_megatron_optimizer_based_on_param_groups(
            config, [model], groups, {}, distributed_optimizer_instance_id=1
        )


def test_limits_of_the_rate_are_written_into_groups() -> None:
    groups = [{"is_decoupled_lr": False}, {"is_decoupled_lr": True}]
    assert _update_min_and_max_lr_in_param_groups(groups, 1.0, 0.1, 2.0, None) is groups
    assert [(group["max_lr"], group["min_lr"]) for group in groups] == [(1.0, 0.1), (2.0, 0.1)]
    _update_min_and_max_lr_in_param_groups(groups, lr=1.0, min_lr=0.1, decoupled_lr=2.0, decoupled_min_lr=0.3)
    assert groups[1]["min_lr"] == 0.3


# ---- attention, activations, specs ---------------------------------------------------------------------


def cross_attention(tensor_parallel: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    parallel_state.initialize_model_parallel(tensor_parallel, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=4,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel,
        init_method_std=0.5,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
    )
    attention = CrossAttention(
        config,
        CrossAttentionSubmodules(
            linear_q=ColumnParallelLinear,
            linear_kv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.no_mask,
    )
    query, memory = held(0, (3, 2, 8)), held(1, (5, 2, 8))
    out, _ = attention(query, None, key_value_states=memory)
    if tensor_parallel > 1:
        return out.detach(), None
    n, d = 4, 2
    q = (query @ attention.linear_q.weight.T).view(3, 2, n, d).permute(1, 2, 0, 3)
    k, v = (memory @ attention.linear_kv.weight.T).view(5, 2, n, 2, d).permute(3, 1, 2, 0, 4)
    context = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).flatten(2)
    return out.detach(), (context @ attention.linear_proj.weight.T).detach()


def test_cross_attention_on_one_and_two_ranks() -> None:
    ((out, expected),) = run_ranks(1, cross_attention, 1)
    torch.testing.assert_close(out, expected)
    for split, _ in run_ranks(2, cross_attention, 2):
        torch.testing.assert_close(split, out)


def test_cross_attention_refuses_grouped_queries() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=4, num_query_groups=2)
    for error in (ConfigError, ValueError):
        with pytest.raises(error, match="num_query_groups 2: cross attention takes no grouped queries"):
            CrossAttention(config, CrossAttentionSubmodules(), 1)


@pytest.mark.parametrize(
    ("function", "shapes", "options"),
    [
        (fused_bias_swiglu.BiasSwiGLUFunction, [(3, 8), (8,)], (False,)),
        (fused_bias_swiglu.WeightedSwiGLUFunction, [(3, 8), (3, 1)], (False,)),
        (fused_bias_swiglu.SwiGLUFunction, [(3, 8)], (False,)),
        (fused_bias_geglu.GeGLUFunction, [(3, 8)], ()),
        (fused_bias_geglu.BiasGeGLUFunction, [(3, 8), (8,)], ()),
    ],
)
def test_gated_activations_have_the_right_gradients(function, shapes, options) -> None:
    inputs = [held(number, shape).requires_grad_() for number, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *given: function.apply(*given, *options), inputs)


def test_gated_activations_have_the_right_values() -> None:
    y, bias, weights = held(0, (3, 8)), held(1, (8,)), held(2, (3, 1))
    gate, up = (y + bias).chunk(2, -1)
    apply = torch.testing.assert_close
    apply(fused_bias_swiglu.BiasSwiGLUFunction.apply(y, bias, False), F.silu(gate) * up)
    apply(fused_bias_geglu.BiasGeGLUFunction.apply(y, bias), F.gelu(gate, approximate="tanh") * up)
    gate, up = y.chunk(2, -1)
    apply(fused_bias_swiglu.WeightedSwiGLUFunction.apply(y, weights, False), F.silu(gate) * up * weights)
    with pytest.raises(ConfigError, match="fp8"):
        fused_bias_swiglu.SwiGLUFunction.apply(y, True)


@pytest.mark.parametrize(("keys", "rows"), [(16, 16), (64, 8), (128, 8), (129, 4), (2048, 4)])
def test_rows_of_a_block_of_threads(keys: int, rows: int) -> None:
    assert FusedScaleMaskSoftmax.get_batch_per_block(sq=keys, sk=keys, b=1, np=1) == rows


def test_the_older_name_of_the_mlp_spec_warns() -> None:
    with pytest.warns(DeprecationWarning, match="is now get_mlp_module_spec"):
        assert _get_mlp_module_spec(use_te=False) == get_mlp_module_spec(use_te=False)


def test_initial_weights_are_left_alone_without_initialization() -> None:
    weight = torch.ones(2)
    on, off = (types.SimpleNamespace(perform_initialization=each) for each in (True, False))
    te.condition_init_method(off, torch.nn.init.zeros_)(weight)
    assert weight.tolist() == [1.0, 1.0]
    assert te.condition_init_method(on, torch.nn.init.zeros_) is torch.nn.init.zeros_


def test_modules_say_that_distributed_checkpoints_are_not_built() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=4)
    with pytest.raises(NotBuiltYetError, match=r"MegatronModule\.sharded_state_dict .*--ckpt-format torch"):
        MegatronModule(config).sharded_state_dict(prefix="a.", sharded_offsets=(), metadata=None)
    for kind in (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding):
        assert kind.sharded_state_dict is MegatronModule.sharded_state_dict
