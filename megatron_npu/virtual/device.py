"""Turns the NPU of this process into a virtual one."""

import sys

from torch import library


def load() -> None:
    """Called by torch at the end of its import, in every process that finds the directory ``autoload``."""
    import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]

    from megatron_npu.virtual import collectives, derivatives, host_memory, operators, random_numbers

    aten = library.Library("aten", "IMPL")
    operators.route_aten(aten)
    host_memory.install(aten)
    derivatives.install(aten)
    random_numbers.install(aten)
    operators.route_npu()
    collectives.carry_hccl()
    operators.keep(aten)
    _leave_errors_to_python()


def _leave_errors_to_python() -> None:
    """Takes back torch_npu's hook, which lets every process that fails print an error code of the device."""
    from torch_npu.utils._error_code import _except_handler  # pyright: ignore[reportMissingImports]

    if sys.excepthook == _except_handler._excepthook:
        sys.excepthook = _except_handler._origin_excepthook
