"""Importing the library pulls in nothing heavy, on any path a training run takes before it needs it."""

import subprocess
import sys

import pytest

HEAVY = [
    "transformers",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "safetensors",
    "pandas",
    "pyarrow",
    "matplotlib",
    "tensorboard",
    "wandb",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.tensorboard",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch_npu",
    "apex",
    "transformer_engine",
    "flash_attn",
]

PROBE = """
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
{statement}
cost_s = time.process_time() - start
new = set(sys.modules) - before
print(cost_s)
print(" ".join(name for name in {heavy} if name in new))
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron.core",
        "from megatron.core import parallel_state, tensor_parallel, utils, mpu, ModelParallelConfig",
        "import megatron.core.models.gpt.gpt_layer_specs; from megatron.core.models.gpt import GPTModel",
    ],
)
def test_import(statement, repo_root):
    code = PROBE.format(statement=statement, heavy=HEAVY)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    cost_s, heavy = result.stdout.split("\n")[:2]
    assert heavy == ""
    # 0.3 s is the promise for a quiet machine; CPU seconds, so that a busy one passes too.
    assert float(cost_s) < 0.6
