"""Equality of nested state down to the last bit."""

from typing import Any

from torch import Tensor, equal


def assert_same_bits(left: Any, right: Any, where: str = "state") -> None:
    """Holds two structures of tensors, arrays and plain values to each other; a failure names the place."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype and equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same_bits(left[key], right[key], f"{where}: {key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same_bits(*pair, f"{where}[{index}]")
    elif hasattr(left, "tobytes"):
        assert left.tobytes() == right.tobytes(), where
    else:
        assert left == right, where
