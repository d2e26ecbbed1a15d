"""Matmuls that overlap with their traffic: in chunks, and by the default of the fused kernels.

Against plain torch on whole weights in float64, and bit by bit against the layers without overlap.
"""

import contextlib
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megatron.core import collectives, parallel_state
from megatron.core.errors import ConfigError
from megatron.core.tensor_parallel import deferred_gradients, linear, overlap
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.overlap import ChunkedMatmuls, FusedMatmuls, overlap_of
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks
from tests.distributed.traffic import Kind, metered

# Rows that 2 and 4 ranks share; a rank's part (10 and 5) does not divide into 4 or 8 chunks.
S, B, IN, OUT = 20, 2, 12, 24


def random(number, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


X, COLUMN, ROW, BIAS = random(1, S, B, IN), random(2, OUT, IN), random(3, IN, OUT), random(4, OUT)
G = random(5, S, B, IN)
PARAMETERS = (COLUMN, BIAS, ROW)


def whole_run():
    """Output, and gradients of input and parameters, of a column-parallel and a row-parallel layer."""
    x, *parameters = (t.clone().requires_grad_() for t in (X, *PARAMETERS))
    column, bias, row = parameters
    hidden = F.linear(x, column, bias)
    out = F.linear(torch.tanh(hidden), row)
    out.backward(G)
    return [hidden.detach(), out.detach(), x.grad, *(p.grad for p in parameters)]


class Layers:
    """The two layers on this rank."""

    def __init__(self, ranks, sp, overlap=None, chunks=1, dtype=torch.float64, fused=False):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(ranks)
            model_parallel_cuda_manual_seed(1)
        self.ranks, self.rank, self.sp = ranks, parallel_state.get_tensor_model_parallel_rank(), sp
        self.group, self.dtype = parallel_state.get_tensor_model_parallel_group(), dtype
        config = TransformerConfig(
            num_layers=1, hidden_size=IN, num_attention_heads=4, params_dtype=dtype, sequence_parallel=sp,
            tensor_model_parallel_size=ranks, tp_comm_chunks=chunks, gradient_accumulation_fusion=fused,
        )  # fmt: skip
        values = {tuple(t.shape): t.to(dtype) for t in PARAMETERS}
        options = {"config": config, "init_method": lambda t: t.copy_(values[tuple(t.shape)])}
        self.column = ColumnParallelLinear(IN, OUT, bias=True, **options)
        self.row = RowParallelLinear(
            OUT, IN, bias=False, input_is_parallel=True, skip_bias_add=False, **options
        )
        with torch.no_grad():
            self.column.bias.copy_(self.part(BIAS, 0))
        if overlap is not None:
            self.column.overlap = self.row.overlap = overlap
        self.parameters = [self.column.weight, self.column.bias, self.row.weight]

    def part(self, t, dim):
        return t.chunk(self.ranks, dim)[self.rank]

    def sequence(self, t):
        return (self.part(t, 0) if self.sp else t).to(self.dtype)

    def mine(self, results):
        """What a rank should see of the results of the whole run."""
        hidden, out, dx, *gradients = results
        parts = [self.part(t, dim) for t, dim in zip(gradients, (0, 0, 1), strict=True)]
        return [self.part(hidden, -1), self.sequence(out), self.sequence(dx), *parts]

    def forward(self):
        x = self.sequence(X).clone().requires_grad_()
        hidden, _ = self.column(x)
        out, _ = self.row(torch.tanh(hidden))
        return x, hidden.detach(), out

    def run(self):
        x, hidden, out = self.forward()
        out.backward(self.sequence(G))
        gradients = [
            p.grad if getattr(p, "main_grad", None) is None else p.main_grad for p in self.parameters
        ]
        return [hidden, out.detach(), x.grad, *gradients]

    def with_main_grads(self):
        for weight in (self.column.weight, self.row.weight):
            weight.main_grad = torch.zeros_like(weight)
        return self


def check_close(found, wanted):
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


OVERLAPS = {f"{n} chunks": ChunkedMatmuls(n) for n in (2, 4, 8)} | {"fused": FusedMatmuls()}


def check_overlap(ranks, name):
    wanted, overlap = whole_run(), OVERLAPS[name]
    for sp, fused in itertools.product((True,) if name == "fused" else (False, True), (False, True)):
        layers = Layers(ranks, sp, overlap, fused=fused)
        check_close((layers.with_main_grads() if fused else layers).run(), layers.mine(wanted))


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_layers_give_what_one_rank_gives(ranks, name):
    run_ranks(ranks, check_overlap, ranks, name)


def differing_bits(ranks, chunks):
    """By sequence parallelism, which of the results in fp32 are not those without overlap, to the bit."""
    found = {}
    names = ("hidden", "out", "input", "column weight", "bias", "row weight")
    for sp in (False, True):
        results = Layers(ranks, sp, dtype=torch.float32).run()
        chunked = Layers(ranks, sp, chunks=chunks, dtype=torch.float32).run()
        found[sp] = {n for n, a, b in zip(names, chunked, results, strict=True) if not torch.equal(a, b)}
    return found


def test_two_ranks_get_the_same_bits():
    """Matmuls of rows are the same matmuls, and two numbers have one sum."""
    for chunks in (2, 4, 8):
        for found in run_ranks(2, differing_bits, 2, chunks):
            assert found == {False: set(), True: set()}, chunks


def test_gathered_matmuls_have_the_same_bits_on_four_ranks():
    """Where four numbers are summed, their order depends on the place in the message."""
    for found in run_ranks(4, differing_bits, 4, 2):
        assert "hidden" not in found[True] | found[False]


def check_late_gradients(ranks):
    wanted = whole_run()
    for name, sp in itertools.product(OVERLAPS, (True, False)):
        if name == "fused" and not sp:
            continue
        for buffered in (False, True):
            layers = Layers(ranks, sp, OVERLAPS[name], fused=buffered)
            layers = layers.with_main_grads() if buffered else layers
            x, _, out = layers.forward()
            with deferred_gradients.deferring():
                out.backward(layers.sequence(G))
            weights = (layers.column.weight, layers.row.weight)
            _, _, dx, column, _, row = layers.mine(wanted)
            torch.testing.assert_close(x.grad, dx)
            assert all(w.grad is None for w in weights) and deferred_gradients.pending() == 2
            deferred_gradients.run()
            check_close([w.main_grad if buffered else w.grad for w in weights], (column, row))


def test_weight_gradients_may_come_later():
    run_ranks(2, check_late_gradients, 2)


def check_frozen(ranks):
    wanted = whole_run()
    for name, sp in itertools.product(OVERLAPS, (True, False)):
        if name == "fused" and not sp:
            continue
        layers = Layers(ranks, sp, OVERLAPS[name])
        for parameter in layers.parameters:
            parameter.requires_grad_(False)
        *found, column, bias, row = layers.run()
        check_close(found, layers.mine(wanted)[:3])
        assert column is bias is row is None


def test_frozen_weights():
    run_ranks(2, check_frozen, 2)


def traffic(ranks, sp, chunks):
    """Calls and bytes of a forward and of a backward pass."""
    layers = Layers(ranks, sp, chunks=chunks, dtype=torch.float32)
    with metered() as meter:
        _, _, out = layers.forward()
        forward = meter.take()
        out.backward(layers.sequence(G))
        backward = meter.take()
    return [
        {kind.operation: (amount.calls, amount.total_bytes) for kind, amount in passed.items()}
        for passed in (forward, backward)
        if all(kind == Kind(kind.operation, tuple(range(ranks))) for kind in passed)
    ]


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_chunks_send_the_same_bytes_in_more_messages(chunks):
    """A sum of [S, B, IN] is sent by the row-parallel layer in forward and by the other in backward; under
    sequence parallelism a part of it is gathered by the other as well, and once more, whole, for the weight.
    """
    whole = S * B * IN * 4
    for passes in run_ranks(2, traffic, 2, False, chunks):
        assert passes == [{"all_reduce": (chunks, whole)}] * 2
    for forward, backward in run_ranks(2, traffic, 2, True, chunks):
        assert forward == {"all_gather": (chunks, whole), "reduce_scatter": (chunks, whole)}
        assert backward == {"all_gather": (chunks + 1, 2 * whole), "reduce_scatter": (chunks, whole)}


def order_of_work(ranks, sp):
    """What a rank does one after the other in the row-parallel layer's forward and the other's backward, and
    in those of the column-parallel layer.
    """
    layers, done = Layers(ranks, sp, ChunkedMatmuls(2)), []

    def noted(name, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            done.append(name)
            if hasattr(result, "wait"):
                return SimpleNamespace(wait=noted("wait", result.wait))
            return result

        return call

    def taken():
        words = " ".join(done)
        done.clear()
        return words

    with contextlib.ExitStack() as stack:
        for module, name in (
            (collectives, "all_gather"),
            (collectives, "reduce_scatter"),
            (collectives, "all_reduce"),
            (overlap, "linear_forward"),
            (linear, "_weight_gradient"),
        ):
            stack.enter_context(mock.patch.object(module, name, noted(name, getattr(module, name))))
        x = layers.sequence(X).clone().requires_grad_()
        hidden, _ = layers.column(x)
        first = taken()
        leaf = hidden.detach().requires_grad_()
        out, _ = layers.row(leaf)
        second = taken()
        out.backward(layers.sequence(G))
        third = taken()
        hidden.backward(leaf.grad)
        return first, second, third, taken()


def test_one_chunk_travels_while_the_next_is_multiplied():
    for first, second, third, fourth in run_ranks(2, order_of_work, 2, True):
        assert first == "all_gather all_gather wait linear_forward wait linear_forward"
        assert second == "linear_forward reduce_scatter linear_forward reduce_scatter wait wait"
        assert third == "all_gather all_gather wait linear_forward wait linear_forward _weight_gradient"
        # What the weight needs comes first, and its gradient is computed while sums are under way.
        sums = "linear_forward reduce_scatter linear_forward reduce_scatter"
        assert fourth == f"all_gather {sums} wait _weight_gradient wait wait"
    for first, second, third, fourth in run_ranks(2, order_of_work, 2, False):
        assert (first, third) == ("", "_weight_gradient")
        assert second == "linear_forward all_reduce linear_forward all_reduce wait wait"
        assert fourth == "linear_forward all_reduce linear_forward all_reduce _weight_gradient wait wait"


def check_few_rows(ranks):
    """Fewer rows than chunks, one dimension less, and none at all."""
    layers = Layers(ranks, False, ChunkedMatmuls(8))
    for rows in (0, 1, 3):
        x = random(6, rows, IN).requires_grad_()
        out, _ = layers.row(layers.column(x)[0])
        wanted = F.linear(F.linear(x, COLUMN, BIAS), ROW)
        torch.testing.assert_close(out, wanted)
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), x)[0])


def test_chunks_of_few_rows_equal_one_rank():
    run_ranks(2, check_few_rows, 2)


def choices(ranks):
    """Kinds of overlap of a layer, by what the config asks for; no device here has fused kernels."""
    parallel_state.initialize_model_parallel(ranks)
    model_parallel_cuda_manual_seed(1)
    found = []
    for fields in ({}, {"tp_comm_fused_matmul": True}, {"tp_comm_chunks": 2}, {"tp_comm_chunks": 1}):
        config = TransformerConfig(
            num_layers=1, hidden_size=IN, num_attention_heads=4, tensor_model_parallel_size=ranks, **fields
        )
        layer = ColumnParallelLinear(IN, OUT, config=config, init_method=torch.nn.init.zeros_)
        found.append(type(layer.overlap).__name__)
    return found


def test_what_a_layer_chooses():
    assert run_ranks(2, choices, 2)[0] == ["NoneType", "NoneType", "ChunkedMatmuls", "NoneType"]
    assert run_ranks(1, choices, 1) == [["NoneType"] * 4]


def test_fused_kernels_come_first_where_the_device_has_them(monkeypatch):
    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=4, tensor_model_parallel_size=2,
        sequence_parallel=True, tp_comm_fused_matmul=True, tp_comm_chunks=4,
    )  # fmt: skip
    chunked = overlap_of(config)
    assert isinstance(chunked, ChunkedMatmuls) and chunked.chunks == 4
    monkeypatch.setattr("megatron.core.overrides.is_replaced", lambda point: True)
    assert isinstance(overlap_of(config), FusedMatmuls)
    config.sequence_parallel = False
    assert isinstance(overlap_of(config), ChunkedMatmuls)


def test_a_number_of_chunks_that_makes_no_sense():
    with pytest.raises(ConfigError, match="tp_comm_chunks: 0 is not positive; 1 leaves matmuls whole"):
        TransformerConfig(num_layers=1, hidden_size=IN, num_attention_heads=4, tp_comm_chunks=0)
