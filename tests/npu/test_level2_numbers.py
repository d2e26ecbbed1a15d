"""Level 2: CPU kernels under torch_npu's schemas, on a 910B and on a 910A, each in a process of its own."""

import pytest

from tests.npu import ground


@pytest.mark.parametrize(
    ("files", "soc"),
    [("numbers_*.py", "Ascend910B2"), ("chip_*.py", "Ascend910A")],
)
def test_every_replacement_computes_what_the_default_does(
    files: str, soc: str, capsys: pytest.CaptureFixture
) -> None:
    summary = ground.run_inner(files, soc=soc, MEGATRON_DEVICE="cpu")
    with capsys.disabled():
        print(f"\nNPU level 2, {files} on {soc}: {summary}")
