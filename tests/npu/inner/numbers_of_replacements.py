"""Level 2: every case in numbers, forward and backward, with CPU kernels under torch_npu's schemas.

The derivative formulas are torch_npu's own. The judge is the default in fp64 on the same rounded operands.
"""

import pytest
import torch

from megatron_npu import activation
from megatron_npu.checking.case import Case
from megatron_npu.checking.cases import CASES
from megatron_npu.checking.compare import judge
from megatron_npu.registry import replacements
from tests.npu.kernels.registration import install_on_cpu

install_on_cpu()
activation.declare_all()
TRIED = [(case, dtype) for case in CASES for dtype in case.dtypes or replacements()[case.path].dtypes]


@pytest.mark.parametrize(
    ("case", "dtype"), TRIED, ids=[f"{c.path.split('.')[-1]}-{c.name}-{str(d)[6:]}" for c, d in TRIED]
)
def test_numbers(case: Case, dtype: torch.dtype) -> None:
    finding = judge(replacements()[case.path], case, dtype, torch.device("cpu"))
    assert finding.good, finding
