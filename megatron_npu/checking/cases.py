"""The calls by which every replacement is compared with its default: one table."""

from typing import Any

from torch import Tensor

from megatron_npu.checking.attention_cases import ATTENTION_CASES
from megatron_npu.checking.case import Call, Case, Draw
from megatron_npu.checking.expert_cases import EXPERT_CASES

_POINTS = "megatron.core.fusions.matmul."
# Rows of a rank, for up to 16 ranks; inner size; columns.
_ROWS, _INNER, _COLUMNS = 32, 256, 48


def _gathered(transposed: bool, keep: bool):
    def make(draw: Draw) -> Call:
        x, shape = draw.normal(_ROWS, _INNER), (_INNER, _COLUMNS)
        # Weights are [out, in]: transposed in forward, as they are in backward.
        matrix = draw.normal(*reversed(shape)).t() if transposed else draw.normal(*shape)
        return Call((x, matrix), {"keep": keep})

    return make


def _scattered(transposed: bool):
    return lambda draw: Call(_gathered(transposed, False)(draw).args)


def _existing_tensors(result, call: Call):
    return [t for t in result if t is not None]


COLLECTIVE_CASES = [
    Case(
        _POINTS + "all_gather_matmul", "a weight transposed", _gathered(True, False), _existing_tensors,
        among_ranks=True,
    ),
    Case(
        _POINTS + "all_gather_matmul", "a weight, what was gathered kept", _gathered(False, True),
        _existing_tensors, among_ranks=True,
    ),
    Case(_POINTS + "matmul_reduce_scatter", "a weight transposed", _scattered(True), among_ranks=True),
    Case(_POINTS + "matmul_reduce_scatter", "a weight", _scattered(False), among_ranks=True),
]  # fmt: skip


_FUSIONS = "megatron.core.fusions."
_OPTIMIZER = "megatron.core.optimizer."


def _rms_norm(draw: Draw) -> Call:
    return Call((3.0 * draw.normal(6, 2, 96), 1.0 + 0.2 * draw.normal(96), 1e-5), wanted=(0, 1))


def _swiglu(draw: Draw) -> Call:
    return Call((2.0 * draw.normal(5, 2, 64),), wanted=(0,))


def _gated_gelu(approximate: str, gate_last: bool) -> Any:
    return lambda draw: Call((2.0 * draw.normal(5, 2, 64), approximate, gate_last), wanted=(0,))


def _bias_gelu(draw: Draw) -> Call:
    return Call((2.0 * draw.normal(5, 2, 64), draw.normal(64)), wanted=(0, 1))


def _gelu(approximate: str) -> Any:
    return lambda draw: Call((2.0 * draw.normal(5, 2, 64), approximate), wanted=(0,))


def _rotary(interleaved: bool, width: int, shared_by_batch: bool = True) -> Any:
    def make(draw: Draw) -> Call:
        angles = 6.0 * draw.positive(7, 1, 1, width // 2)
        pairs = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 1, 2)
        return Call((draw.normal(7, 2, 3, width), pairs.cos(), pairs.sin(), interleaved), wanted=(0,))

    return make


def _softmax(masks: int, in_fp32: bool) -> Any:
    def make(draw: Draw) -> Call:
        mask = draw.masked(masks, 1, 32, 64)
        mask[..., 0] = False  # a fully masked row has another gradient, see the table's note
        return Call((2.0 * draw.normal(2, 3, 32, 64), mask, 0.5, in_fp32), wanted=(0,))

    return make


def _cross_entropy(draw: Draw) -> Call:
    return Call((3.0 * draw.normal(6, 2, 50), draw.ids(6, 2, below=50, ignored=0.2), 0.0), wanted=(0,))


def _adamw(step: int) -> Any:
    def make(draw: Draw) -> Call:
        shapes = ((17,), (4, 5), (3, 2, 4))
        params, grads, exp_avgs = ([draw.normal(*shape) for shape in shapes] for _ in range(3))
        exp_avg_sqs = [draw.positive(*shape) for shape in shapes]
        if step == 1:
            exp_avgs, exp_avg_sqs = ([t * 0 for t in moments] for moments in (exp_avgs, exp_avg_sqs))
        hyper = dict(step=step, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        return Call((params, grads, exp_avgs, exp_avg_sqs), hyper)

    return make


def _updated(result: None, call: Call) -> list[Tensor]:
    params, _, exp_avgs, exp_avg_sqs = call.args
    return [*params, *exp_avgs, *exp_avg_sqs]


def _scaled(draw: Draw) -> Call:
    grads = [100.0 * draw.normal(40), draw.normal(3, 5)]
    return Call((grads, (draw.positive(1) + 0.5).float()))


def _unscaled(result: Tensor, call: Call) -> list[Tensor]:
    return [result, *call.args[0]]


CASES: list[Case] = [
    *ATTENTION_CASES,
    *COLLECTIVE_CASES,
    *EXPERT_CASES,
    Case(_FUSIONS + "fused_layer_norm.rms_norm", "[s, b, h]", _rms_norm),
    Case(_FUSIONS + "fused_bias_swiglu.swiglu", "[s, b, 2f]", _swiglu),
    *(
        Case(
            _FUSIONS + "fused_bias_geglu.gated_gelu",
            f"{approximate}, gate {'last' if last else 'first'}",
            _gated_gelu(approximate, last),
        )
        for approximate in ("none", "tanh")
        for last in (False, True)
    ),
    Case(_FUSIONS + "fused_bias_gelu.bias_gelu_impl", "[s, b, f]", _bias_gelu),
    Case(_FUSIONS + "fused_bias_gelu.gelu", "erf", _gelu("none")),
    Case(_FUSIONS + "fused_bias_gelu.gelu", "tanh", _gelu("tanh")),
    Case(_FUSIONS + "embeddings.rotary", "halves, 128 channels", _rotary(False, 128)),
    Case(_FUSIONS + "embeddings.rotary", "halves, 24 channels", _rotary(False, 24)),
    Case(_FUSIONS + "embeddings.rotary", "pairs", _rotary(True, 16)),
    Case(_FUSIONS + "fused_softmax.scaled_masked_softmax", "one mask", _softmax(1, False)),
    Case(_FUSIONS + "fused_softmax.scaled_masked_softmax", "a mask each, in fp32", _softmax(2, True)),
    Case(_FUSIONS + "fused_cross_entropy.cross_entropy", "some tokens without loss", _cross_entropy),
    Case(_OPTIMIZER + "adamw.adamw_step", "first step", _adamw(1), _updated),
    Case(_OPTIMIZER + "adamw.adamw_step", "step 1000", _adamw(1000), _updated),
    Case(_FUSIONS + "multi_tensor.unscale_and_check", "no overflow", _scaled, _unscaled, pinned=True),
    Case(
        _FUSIONS + "multi_tensor.watch_overflow",
        "nothing changes",
        lambda draw: Call((draw.positive(1).float(),)),
        lambda result, call: [call.args[0]],
    ),
]
