"""Turns the NPU of this process into a virtual one."""

import torch


def load() -> None:
    """Called by torch at the end of its import, in every process that finds the directory ``autoload``."""
    import torch_npu  # noqa: F401

    from tests.npu.virtual import collectives, copies, derivatives, operators, random_numbers

    library = torch.library.Library("aten", "IMPL")
    operators.route_aten(library)
    copies.install(library)
    derivatives.install(library)
    random_numbers.install(library)
    operators.route_npu()
    collectives.carry_hccl()
    operators.keep(library)
