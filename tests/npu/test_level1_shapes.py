"""Level 1: torch_npu's schemas, shape functions and derivative formulas, in a process of its own."""

import pytest

from tests.npu import ground


def test_every_replacement_fits_the_operators(capsys: pytest.CaptureFixture) -> None:
    summary = ground.run_inner("shapes_*.py")
    with capsys.disabled():
        print(f"\nNPU level 1: {summary}")
