"""Tests of this directory run in processes of their own, made by ``tests/npu/ground.py``.

An ordinary pytest reads this file while it looks for tests, and finds none here.
"""

import os

if "STUB_NPU_COUNT" in os.environ:
    import torch  # noqa: F401  (first: it is torch that loads a virtual NPU)
    import torch_npu  # noqa: F401
