"""Split layers against plain torch on the whole weights, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel import deferred_gradients
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

S, B, IN, OUT = 8, 2, 12, 24


def random(number, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


X, W, BIAS, G = random(1, S, B, IN), random(2, OUT, IN), random(3, OUT), random(4, S, B, OUT)


def whole_layer():
    """Output and gradients of input, weight and bias of the layer in one piece."""
    x, w, b = (t.clone().requires_grad_() for t in (X, W, BIAS))
    out = F.linear(x, w, b)
    out.backward(G)
    return out.detach(), x.grad, w.grad, b.grad


class World:
    """This rank's view of the tensor-parallel group, and the config of its layers."""

    def __init__(self, ranks, sequence_parallel=False, **fields):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(ranks)
            model_parallel_cuda_manual_seed(1)
        self.ranks, self.rank = ranks, parallel_state.get_tensor_model_parallel_rank()
        self.sp = sequence_parallel
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=IN,
            num_attention_heads=4,
            params_dtype=torch.float64,
            tensor_model_parallel_size=ranks,
            sequence_parallel=sequence_parallel,
            **fields,
        )

    def part(self, t, dim):
        return t.chunk(self.ranks, dim)[self.rank]

    def sequence(self, t):
        """What a rank holds of an activation outside the layers."""
        return self.part(t, 0) if self.sp else t

    def summed(self, t):
        total = t.clone()
        torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total


def fill(t):
    return t.copy_(W if t.shape == W.shape else random(7, *t.shape))


def with_bias(layer, values):
    with torch.no_grad():
        layer.bias.copy_(values)
    return layer


def weight_grad(layer, fused):
    return layer.weight.main_grad if fused else layer.weight.grad


def check_column(world, make, fused, gather, skip):
    out, dx, dw, db = whole_layer()
    options = {"config": world.config, "init_method": fill, "skip_bias_add": skip, **make[1]}
    if make[0] is ColumnParallelLinear:
        options["gather_output"] = gather
    layer = with_bias(make[0](IN, OUT, bias=True, **options), world.part(BIAS, 0))
    assert torch.equal(layer.weight, world.part(W, 0))
    layer.weight.main_grad = torch.zeros_like(layer.weight) if fused else None
    x = world.sequence(X).clone().requires_grad_()
    found, left_over = layer(x)
    if skip:
        found = found + left_over
    torch.testing.assert_close(found, out if gather else world.part(out, -1))
    found.backward(G if gather else world.part(G, -1))
    torch.testing.assert_close(x.grad, world.sequence(dx))
    torch.testing.assert_close(weight_grad(layer, fused), world.part(dw, 0))
    torch.testing.assert_close(layer.bias.grad, world.part(db, 0))


def check_row(world, make, fused, parallel_input, skip):
    out, dx, dw, db = whole_layer()
    options = {"config": world.config, "init_method": fill, "skip_bias_add": skip, **make[1]}
    if make[0] is not TELinear:
        options["input_is_parallel"] = parallel_input
    layer = with_bias(make[0](IN, OUT, bias=True, **options), BIAS)
    assert torch.equal(layer.weight, world.part(W, 1))
    assert layer.bias.sequence_parallel == world.sp
    layer.weight.main_grad = torch.zeros_like(layer.weight) if fused else None
    x = (world.part(X, -1) if parallel_input else X).clone().requires_grad_()
    found, left_over = layer(x)
    if skip:
        found = found + left_over
    torch.testing.assert_close(found, world.sequence(out))
    found.backward(world.sequence(G))
    torch.testing.assert_close(x.grad, world.part(dx, -1) if parallel_input else dx)
    torch.testing.assert_close(weight_grad(layer, fused), world.part(dw, 1))
    torch.testing.assert_close(world.summed(layer.bias.grad) if world.sp else layer.bias.grad, db)


TE = {"parallel_mode": "column", "skip_weight_param_allocation": False}
COLUMNS = [
    (ColumnParallelLinear, {}),
    (TEColumnParallelLinear, {"gather_output": False, "is_expert": False}),
    (TELinear, TE),
]
ROWS = [
    (RowParallelLinear, {}),
    (TERowParallelLinear, {"is_expert": False}),
    (TELinear, TE | {"parallel_mode": "row"}),
]


def check_linear_layers(ranks):
    for sp, fused, skip in itertools.product((False, True), repeat=3):
        world = World(ranks, sp, gradient_accumulation_fusion=fused)
        for make in COLUMNS:
            check_column(world, make, fused, False, skip)
        for make in ROWS:
            check_row(world, make, fused, True, skip)
        if not skip:
            check_column(world, COLUMNS[0], fused, True, skip)
        if not sp:
            check_row(world, ROWS[0], fused, False, skip)


@pytest.mark.parametrize("ranks", [2, 4])
def test_linear_layers(ranks):
    run_ranks(ranks, check_linear_layers, ranks)


def check_functions(ranks):
    """The functional forms: with and without overlap, and with a weight that learns nothing."""
    out, dx, dw, db = whole_layer()
    for sp, overlap, frozen in itertools.product((False, True), repeat=3):
        world = World(ranks, sp)
        function = linear_with_frozen_weight if frozen else linear_with_grad_accumulation_and_async_allreduce
        x = world.sequence(X).clone().requires_grad_()
        w, b = (world.part(t, 0).clone().requires_grad_() for t in (W, BIAS))
        reduced = x if sp or overlap else copy_to_tensor_model_parallel_region(x)
        found = function(reduced, w, b, False, overlap and not sp, sp)
        torch.testing.assert_close(found, world.part(out, -1))
        found.backward(world.part(G, -1))
        torch.testing.assert_close(x.grad, world.sequence(dx))
        torch.testing.assert_close(b.grad, world.part(db, 0))
        if frozen:
            assert w.grad is None
        else:
            torch.testing.assert_close(w.grad, world.part(dw, 0))
    unreduced = X.clone().requires_grad_()
    layer = ColumnParallelLinear(
        IN, OUT, config=World(ranks).config, init_method=fill, disable_grad_reduce=True, bias=False
    )
    layer(unreduced)[0].backward(world.part(G, -1))
    torch.testing.assert_close(world.summed(unreduced.grad), dx)
    assert not torch.allclose(unreduced.grad, dx)


@pytest.mark.parametrize("ranks", [2, 4])
def test_functions(ranks):
    run_ranks(ranks, check_functions, ranks)


def check_deferral(ranks):
    _, dx, dw, _ = whole_layer()
    for sp, buffered in itertools.product((False, True), repeat=2):
        world = World(ranks, sp)
        layer = ColumnParallelLinear(IN, OUT, config=world.config, init_method=fill, bias=False)
        ready = []
        layer.weight.gradient_ready = lambda ready=ready: ready.append(True)
        if buffered:
            layer.weight.main_grad = torch.zeros_like(layer.weight)
        inputs = [world.sequence(X).clone().requires_grad_() for _ in range(2)]
        for x in inputs:
            with deferred_gradients.deferring():
                layer(x)[0].backward(world.part(G, -1))
            torch.testing.assert_close(x.grad, world.sequence(dx))
        assert layer.weight.grad is None
        assert not buffered or not layer.weight.main_grad.any()
        assert deferred_gradients.pending() == 2
        deferred_gradients.run(1)
        grad = layer.weight.main_grad if buffered else layer.weight.grad
        torch.testing.assert_close(grad, world.part(dw, 0))
        deferred_gradients.run()
        grad = layer.weight.main_grad if buffered else layer.weight.grad
        torch.testing.assert_close(grad, 2 * world.part(dw, 0))
        assert ready == [True, True]
    # A tied weight waits for its other use: its gradient comes at once.
    layer.weight.zero_out_wgrad = True
    with deferred_gradients.deferring():
        layer(world.sequence(X))[0].backward(world.part(G, -1))
    assert deferred_gradients.pending() == 0


def test_deferred_weight_gradients():
    run_ranks(2, check_deferral, 2)


def check_output_layer_buffers(ranks, chunks):
    """Inputs and output gradients in the caller's lists give the weight's gradient; none is computed."""
    _, dx, dw, _ = whole_layer()
    for limit, expected in ((0, 3), (2, 2)):
        world = World(ranks, tp_comm_chunks=chunks)
        world.config.defer_embedding_wgrad_compute, world.config.wgrad_deferral_limit = True, limit
        inputs, gradients = [], []
        layer = ColumnParallelLinear(
            IN,
            OUT,
            config=world.config,
            init_method=fill,
            bias=False,
            embedding_activation_buffer=inputs,
            grad_output_buffer=gradients,
        )
        for _ in range(3):
            x = X.clone().requires_grad_()
            layer(x)[0].backward(world.part(G, -1))
            torch.testing.assert_close(x.grad, dx)
        assert len(inputs) == len(gradients) == expected
        late = sum(g.flatten(0, 1).t() @ x.flatten(0, 1) for g, x in zip(gradients, inputs, strict=True))
        early = 0 if layer.weight.grad is None else layer.weight.grad
        torch.testing.assert_close((late + early).detach(), 3 * world.part(dw, 0))


@pytest.mark.parametrize("chunks", [1, 4])
def test_output_layer_gradients_left_to_the_flush(chunks):
    run_ranks(2, check_output_layer_buffers, 2, chunks)


def check_parts_and_masters(ranks):
    """A gated layer is cut part by part; on the CPU the whole fp32 weight can be kept."""
    world = World(ranks, use_cpu_initialization=True)
    layer = ColumnParallelLinear(
        IN, OUT, config=world.config, init_method=fill, stride=2, keep_master_weight_for_test=True
    )
    gate, up = W.chunk(2)
    cut = torch.cat([world.part(gate, 0), world.part(up, 0)])
    torch.testing.assert_close(layer.weight, cut.float().double())
    assert (layer.weight.partition_stride, layer.bias.partition_stride) == (2, 2)
    assert torch.equal(layer.master_weight, W.float())
    assert layer.bias.shape == (OUT // ranks,)


def test_strides_and_masters():
    run_ranks(4, check_parts_and_masters, 4)


def check_norm_and_linear(ranks):
    for sp in (False, True):
        world = World(ranks, sp)
        layer = TELayerNormColumnParallelLinear(
            IN,
            OUT,
            config=world.config,
            init_method=fill,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        scale = torch.ones(IN, dtype=torch.float64, requires_grad=True)
        F.linear(F.layer_norm(x, (IN,), scale, None, 1e-5), w).backward(G)
        mine = world.sequence(X).clone().requires_grad_()
        out = layer(mine)[0]
        whole, _ = layer(mine.detach(), runtime_gather_output=True)
        torch.testing.assert_close(world.part(whole, -1), out)
        out.backward(world.part(G, -1))
        torch.testing.assert_close(mine.grad, world.sequence(x.grad))
        torch.testing.assert_close(layer.weight.grad, world.part(w.grad, 0))
        grad = layer.layer_norm_weight.grad
        assert layer.layer_norm_weight.sequence_parallel == sp
        torch.testing.assert_close(world.summed(grad) if sp else grad, scale.grad)


def test_norm_and_linear_in_one():
    run_ranks(2, check_norm_and_linear, 2)


def check_whole_weight(ranks):
    out, dx, dw, db = whole_layer()
    for sp in (False, True):
        world = World(ranks, sp)
        options = {"skip_bias_add": False, "skip_weight_param_allocation": False, "parallel_mode": None}
        layer = with_bias(
            TELinear(IN, OUT, config=world.config, init_method=fill, bias=True, **options), BIAS
        )
        x = world.sequence(X).clone().requires_grad_()
        found, _ = layer(x)
        torch.testing.assert_close(found, world.sequence(out))
        found.backward(world.sequence(G))
        torch.testing.assert_close(x.grad, world.sequence(dx))
        for parameter, grad in ((layer.weight, dw), (layer.bias, db)):
            assert parameter.sequence_parallel == sp
            assert not getattr(parameter, "tensor_model_parallel", False)
            torch.testing.assert_close(world.summed(parameter.grad) if sp else parameter.grad, grad)


def test_whole_weight_on_every_rank():
    run_ranks(2, check_whole_weight, 2)


def check_embedding(ranks):
    table = random(11, 40, IN)
    ids = torch.randint(40, (B, S), generator=torch.Generator().manual_seed(5))
    gradient = random(12, B, S, IN)
    for scattered in (False, True):
        world = World(ranks, scattered)
        layer = VocabParallelEmbedding(
            40,
            IN,
            init_method=lambda t: t.copy_(table),
            reduce_scatter_embeddings=scattered,
            config=world.config,
        )
        leaf = table.clone().requires_grad_()
        out = F.embedding(ids, leaf)
        out.backward(gradient)
        found = layer(ids)
        if scattered:
            assert torch.equal(found, world.part(out.transpose(0, 1), 0))
            found.backward(world.part(gradient.transpose(0, 1), 0))
        else:
            assert torch.equal(found, out)
            found.backward(gradient)
        torch.testing.assert_close(layer.weight.grad, world.part(leaf.grad, 0))
    try:
        layer(torch.tensor([[0, 40]]))
    except Exception as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("ranks", [2, 4])
def test_embedding(ranks):
    for message in run_ranks(ranks, check_embedding, ranks):
        assert "token ids run from 0 to 40, but the embedding table has 40 rows" in message


def sizes_that_do_not_divide(ranks):
    world, messages = World(ranks), []
    other = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=4, tensor_model_parallel_size=2
    )
    for build in (
        lambda: ColumnParallelLinear(IN, 10, config=world.config, init_method=fill),
        lambda: RowParallelLinear(
            10,
            IN,
            config=world.config,
            init_method=fill,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        ),
        lambda: VocabParallelEmbedding(10, IN, config=world.config, init_method=fill),
        lambda: ColumnParallelLinear(IN, OUT, config=other, init_method=fill),
    ):
        try:
            build()
            messages.append("accepted")
        except Exception as error:
            messages.append(str(error))
    return messages


def test_sizes_that_do_not_divide():
    for messages in run_ranks(4, sizes_that_do_not_divide, 4):
        for message, name in zip(messages, ("output_size", "input_size", "num_embeddings"), strict=False):
            assert message == f"{name} 10 does not divide by tensor-parallel size 4: use a multiple of it"
        assert "the config says 2, but the group has 4 ranks" in messages[3]
