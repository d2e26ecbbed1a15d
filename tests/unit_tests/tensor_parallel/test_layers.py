"""Linear layers, embedding and their helpers on one rank."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core import accelerator, tensor_parallel
from megatron.core.errors import ConfigError, DataError
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel.cross_entropy import (
    VocabParallelCrossEntropy,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.random import (
    RngStreamError,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.tensor_parallel.utils import VocabUtility, split_tensor_along_last_dim
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from tests.unit_tests.test_public_names import problems_in

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INIT = init_method_normal(0.5)


@pytest.fixture(autouse=True)
def seed():
    model_parallel_cuda_manual_seed(17)


def make_config(**fields):
    return TransformerConfig(**{"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, **fields})


def row(config, **arguments):
    defaults = {"bias": True, "input_is_parallel": True, "skip_bias_add": False}
    return RowParallelLinear(8, 12, config=config, init_method=INIT, **defaults | arguments)


def column(config, **arguments):
    return ColumnParallelLinear(8, 12, config=config, init_method=INIT, **arguments)


@pytest.mark.parametrize("make", [column, row])
def test_attributes_and_values(make):
    layer = make(make_config())
    dim = 0 if make is column else 1
    weight, bias = layer.weight, layer.bias
    assert (weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride) == (True, dim, 1)
    assert getattr(bias, "tensor_model_parallel", False) == (make is column)
    assert weight.allreduce and bias.allreduce
    with torch.no_grad():
        bias.normal_()
    x = torch.randn(3, 2, 8)
    out, left_over = layer(x)
    assert left_over is None
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    apart = make(make_config(), skip_bias_add=True)
    out, left_over = apart(x)
    assert left_over is apart.bias
    torch.testing.assert_close(out, F.linear(x, apart.weight))
    assert list(layer.state_dict()) == ["weight", "bias", "_extra_state"]
    assert "bias=True" in repr(layer)


def test_weight_can_be_lent():
    layer = column(make_config(), skip_weight_param_allocation=True, bias=False)
    assert list(layer.state_dict()) == ["_extra_state"]
    weight, x = torch.randn(12, 8), torch.randn(3, 8)
    torch.testing.assert_close(layer(x, weight)[0], F.linear(x, weight))
    with pytest.raises(AssertionError, match="without a weight"):
        layer(x)
    with pytest.raises(AssertionError, match=r"\(8, 12\)"):
        layer(x, weight.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_gradients(dtype, with_bias):
    torch.manual_seed(2)
    narrow = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((5, 3, 8), (12, 8), (12,))]
    wide = [t.detach().double().requires_grad_() for t in narrow]
    count = 3 if with_bias else 2
    bias, wide_bias = (narrow[2], wide[2]) if with_bias else (None, None)
    out = linear_with_grad_accumulation_and_async_allreduce(*narrow[:2], bias, False, False, False)
    expected = F.linear(*wide[:2], wide_bias)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, narrow[:count], gradient)
    wanted = torch.autograd.grad(expected, wide[:count], gradient.double())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for f, w in zip((out, *found), (expected, *wanted), strict=True):
        assert f.dtype == dtype
        assert float((f.detach().double() - w.detach()).abs().max()) <= tolerance * float(
            w.detach().abs().max()
        )


def test_slow_half_precision_is_computed_wide(monkeypatch):
    """Sums of fp16 products that fp16 accumulation would get wrong."""
    monkeypatch.setattr(accelerator, "_cpu_matmul_dtypes", lambda: {torch.float16: torch.float32})
    x = torch.full((1, 4096), 1.0, dtype=torch.float16)
    weight = torch.full((1, 4096), 1.0, dtype=torch.float16)
    out = linear_with_grad_accumulation_and_async_allreduce(x, weight, None, False, False, False)
    assert out.dtype == torch.float16
    assert out.item() == 4096


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulating_in_backward_gives_the_same_bits(dtype):
    weight = torch.randn(12, 8).to(dtype).requires_grad_()
    batches = [torch.randn(5, 3, 8).to(dtype) for _ in range(3)]

    def run(fused):
        weight.main_grad = torch.zeros(12, 8)
        for x in batches:
            weight.grad, weight.grad_added_to_main_grad = None, False
            out = linear_with_grad_accumulation_and_async_allreduce(x, weight, None, fused, False, False)
            out.float().square().sum().backward()
            assert weight.grad_added_to_main_grad == fused
            assert weight.grad.dtype == dtype
            if not fused:
                weight.main_grad.add_(weight.grad)
        return weight.main_grad

    assert torch.equal(run(True), run(False))


def test_accumulating_leaves_zeros_for_a_weight_used_twice():
    weight = torch.randn(4, 4, requires_grad=True)
    weight.main_grad, weight.zero_out_wgrad = torch.zeros(4, 4), True
    x = torch.randn(3, 4)
    linear_with_grad_accumulation_and_async_allreduce(x, weight, None, True, False, False).sum().backward()
    assert not weight.grad.any()
    torch.testing.assert_close(weight.main_grad, torch.ones(3, 4).t() @ x)


def test_fusion_without_main_grad_is_plain():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)
    linear_with_grad_accumulation_and_async_allreduce(x, weight, None, True, False, False).sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(3, 4).t() @ x)


def test_frozen_weight():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    linear_with_frozen_weight(x, weight, None, False, False, False).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, torch.ones(3, 4) @ weight)
    layer = column(make_config())
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 8))[0].sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_weights_follow_seed_and_place_and_leave_all_streams_alone():
    tracker = get_cuda_rng_tracker()
    streams, default = tracker.get_states(), torch.get_rng_state()

    def weights(*place, number=2):
        with tensor_parallel.weight_scope(*place):
            return [column(make_config()).weight for _ in range(number)]

    first, second = weights("decoder", 1)
    assert all(torch.equal(*pair) for pair in zip(weights("decoder", 1), (first, second), strict=True))
    others = [second, *weights("decoder", 2), *weights("encoder", 1), column(make_config()).weight]
    assert not any(torch.equal(first, other) for other in others)
    with tensor_parallel.weight_scope("outer"):
        assert not torch.equal(weights("decoder", 1)[0], first)
    assert torch.equal(torch.get_rng_state(), default)
    assert tracker.get_states() == streams
    model_parallel_cuda_manual_seed(17 + 100, weight_seed=17)  # as on another pipeline stage
    assert torch.equal(weights("decoder", 1)[0], first)
    model_parallel_cuda_manual_seed(18)
    assert not torch.equal(weights("decoder", 1)[0], first)
    assert abs(float(torch.cat(weights("decoder", 1, number=50)).detach().std()) / 0.5 - 1) < 0.05


def test_weights_need_a_seed():
    get_cuda_rng_tracker().reset()
    with pytest.raises(RngStreamError, match="call model_parallel_cuda_manual_seed"):
        column(make_config())


def test_without_a_seed_cpu_initialisation_draws_fp32_from_the_cpu_generator():
    config = make_config(use_cpu_initialization=True, params_dtype=torch.bfloat16)
    get_cuda_rng_tracker().reset()
    torch.manual_seed(4)
    layer = column(config, keep_master_weight_for_test=True)
    torch.manual_seed(4)
    expected = torch.empty(12, 8).normal_(0.0, 0.5)
    assert torch.equal(layer.master_weight, expected)
    assert torch.equal(layer.weight, expected.bfloat16())


def test_no_initialisation_draws_nothing():
    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()["model-parallel-rng"]
    layer = column(make_config(perform_initialization=False))
    assert torch.equal(tracker.get_states()["model-parallel-rng"], before)
    assert layer.weight.tensor_model_parallel
    assert column(make_config(init_model_with_meta_device=True)).weight.is_meta


def test_embedding():
    table = VocabParallelEmbedding(10, 4, init_method=INIT, config=make_config())
    ids = torch.tensor([[1, 2, 9], [0, 2, 2]])
    torch.testing.assert_close(table(ids), table.weight[ids])
    scattered = VocabParallelEmbedding(
        10, 4, init_method=INIT, reduce_scatter_embeddings=True, config=make_config()
    )
    assert scattered(ids).shape == (3, 2, 4)
    with pytest.raises(DataError, match=r"run from 0 to 10, but .* 10 rows"):
        table(torch.tensor([[0, 10]]))


def test_one_rank_is_the_whole():
    x = torch.randn(4, 6, requires_grad=True)
    functions = [
        function
        for name, function in vars(mappings).items()
        if name.endswith("_region") or name.startswith("all_to_all_")
    ]
    assert len(functions) == 11
    for function in functions:
        assert function(x) is x
    assert mappings.all_to_all(None, x) is x


def test_splitting():
    parts = split_tensor_along_last_dim(torch.arange(12).view(2, 6), 3, contiguous_split_chunks=True)
    assert [part.tolist() for part in parts] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    assert all(part.is_contiguous() for part in parts)
    assert VocabUtility.vocab_range_from_global_vocab_size(12, 2, 4) == (6, 9)
    assert VocabUtility.vocab_range_from_per_partition_vocab_size(5, 1, 4) == (5, 10)


def test_split_loss_step_by_step():
    """Two halves of a vocabulary, reduced by hand, against the whole."""
    logits, target = torch.randn(3, 2, 10), torch.randint(10, (3, 2))
    expected = F.cross_entropy(logits.view(-1, 10), target.view(-1), reduction="none").view(3, 2)
    torch.testing.assert_close(vocab_parallel_cross_entropy(logits, target), expected)
    steps = VocabParallelCrossEntropy
    shards = [steps.calculate_logits_max(part) for part in logits.chunk(2, -1)]
    top = torch.maximum(shards[0][1], shards[1][1])
    known = [
        steps.calculate_predicted_logits(wide, target, top, 5 * rank, 5 * rank + 5)
        for rank, (wide, _) in enumerate(shards)
    ]
    predicted, total = (known[0][i] + known[1][i] for i in (2, 3))
    gradient = []
    for elsewhere, local, _, _, exponentials in known:
        softmax, loss = steps.calculate_cross_entropy_loss(exponentials, predicted, total)
        torch.testing.assert_close(loss, expected)
        grad, grad_2d, rows, update = steps.prepare_gradient_calculation_operands(softmax, elsewhere)
        gradient.append(steps.calculate_gradients(grad_2d, rows, local, update, grad, torch.ones(3, 2)))
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf.view(-1, 10), target.view(-1), reduction="sum").backward()
    torch.testing.assert_close(torch.cat(gradient, -1), leaf.grad)


def test_broadcast_checks_its_batch():
    batch = {"text": torch.arange(4), "mask": torch.ones(2)}
    out = tensor_parallel.broadcast_data(["text"], batch, torch.int64)
    assert list(out) == ["text"]
    assert torch.equal(out["text"], batch["text"])
    with pytest.raises(DataError, match=r"'mask' is torch\.float32"):
        tensor_parallel.broadcast_data(["mask"], batch, torch.int64)
    with pytest.raises(DataError, match="no 'labels'; it has mask, text"):
        tensor_parallel.broadcast_data(["labels"], batch, torch.int64)
    with pytest.raises(DataError, match="6 dimensions"):
        tensor_parallel.broadcast_data(["x"], {"x": torch.zeros(1, 1, 1, 1, 1, 1)}, torch.float32)


def test_more_ranks_than_there_are_groups_for():
    with pytest.raises(ConfigError, match=r"says 2, but no process groups exist; call .*initialize"):
        column(make_config(tensor_model_parallel_size=2))


def test_attribute_helpers():
    tensor, other = torch.zeros(2), torch.zeros(2)
    layers.set_defaults_if_not_set_tensor_model_parallel_attributes(tensor)
    assert (tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride) == (False, -1, 1)
    layers.set_tensor_model_parallel_attributes(other, True, 1, 2)
    with pytest.raises(AssertionError, match="already"):
        layers.set_tensor_model_parallel_attributes(other, True, 1, 2)
    third = torch.zeros(2)
    layers.copy_tensor_model_parallel_attributes(third, other)
    assert (third.tensor_model_parallel, third.partition_dim, third.partition_stride) == (True, 1, 2)


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.tensor_parallel") == []
