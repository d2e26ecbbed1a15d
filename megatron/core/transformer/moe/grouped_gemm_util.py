"""The interface of the ``grouped_gemm`` library, for scripts that call it: served by this package itself."""

from types import SimpleNamespace

from torch import Tensor

from megatron.core.fusions.matmul import grouped_matmul

# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def grouped_gemm_is_available() -> bool:
    """True: grouped matmuls are part of this package, on every device."""
    return True


def assert_grouped_gemm_is_available() -> None:
    """Grouped matmuls are always there."""


def _gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """``a_e b_e`` for the rows of every group.

    a: [m, k]; b: [groups, k, n], or [groups, n, k] with ``trans_b``; batch_sizes: [groups], adding up to m.
    -> [m, n]
    """
    weights = b.transpose(1, 2) if trans_b else b
    return grouped_matmul(a, weights.contiguous(), batch_sizes, False)


ops = SimpleNamespace(gmm=_gmm)
