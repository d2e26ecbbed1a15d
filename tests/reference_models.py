"""The transformers library, whose models are the oracle of ours."""

from types import ModuleType
from typing import Any

import pytest


def load_transformers() -> ModuleType:
    """The library; skips the test without it.

    Its models import torch_npu wherever that is installed, which fails on a machine without CANN. They are
    references on a CPU, so they are told that there is none.
    """
    transformers = pytest.importorskip("transformers")
    from transformers.utils import import_utils

    look_up = import_utils._is_package_available

    def is_package_available(name: str, *args: Any, **kwargs: Any) -> Any:
        return (False, None) if name == "torch_npu" else look_up(name, *args, **kwargs)

    import_utils._is_package_available = is_package_available
    return transformers
