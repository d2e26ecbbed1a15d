"""Starting up without torch's compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.core.optimizer import SGD, Adam

SCRIPT = """
import sys
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

model = torch.nn.Linear(3, 3)
for name in ("adam", "sgd"):
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer=name, lr=1e-3), [model])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def test_training_does_not_import_the_compiler(repo_root: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize(("ours", "theirs"), [(SGD, torch.optim.SGD), (Adam, torch.optim.AdamW)])
def test_optimizers_are_subclasses_of_those_of_torch(
    ours: type[torch.optim.Optimizer], theirs: type[torch.optim.Optimizer]
) -> None:
    assert issubclass(ours, theirs)
    with pytest.raises(ValueError, match="empty parameter list"):
        ours([], lr=1e-3)
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = ours([param], lr=1e-3)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]
    # Hooks and schedules of torch work on them.
    seen = []
    optimizer.register_step_post_hook(lambda *unused: seen.append(param.item() if param.numel() == 1 else 0))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    assert seen == [0]
    assert (param < 1.0).all()
