"""Names of the DeepEP kernels, which this package does not use: ``flex`` sends tokens by collectives."""

from torch import Tensor

from megatron import unbuilt

__getattr__ = unbuilt.names_of(__name__)

HAVE_DEEP_EP = False


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def get_hidden_bytes(x: Tensor) -> int:
    """Bytes of one row of ``x`` [t, h] as it travels, with two bytes an element at the least."""
    return x.size(1) * max(x.element_size(), 2)
