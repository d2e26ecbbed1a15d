"""Calls of products that send while they multiply, made by all ranks of a group."""

from megatron_npu.checking.case import Call, Case, Draw

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


def _what_is_there(result, call: Call):
    return [t for t in result if t is not None]


COLLECTIVE_CASES = [
    Case(
        _POINTS + "all_gather_matmul", "a weight transposed", _gathered(True, False), _what_is_there,
        among_ranks=True,
    ),
    Case(
        _POINTS + "all_gather_matmul", "a weight, what was gathered kept", _gathered(False, True),
        _what_is_there, among_ranks=True,
    ),
    Case(_POINTS + "matmul_reduce_scatter", "a weight transposed", _scattered(True), among_ranks=True),
    Case(_POINTS + "matmul_reduce_scatter", "a weight", _scattered(False), among_ranks=True),
]  # fmt: skip
