"""Every test of routers begins as in a fresh process."""

from collections.abc import Iterator

import pytest

from tests.unit_tests.transformer.moe.routers import forget_what_was_tracked


@pytest.fixture(autouse=True)
def _nothing_tracked() -> Iterator[None]:
    forget_what_was_tracked()
    yield
    forget_what_was_tracked()
