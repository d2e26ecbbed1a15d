"""A run small enough to save in milliseconds: two matrices, their norm, and a torch optimizer."""

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training import checkpointing


class ToyModel(torch.nn.Module):
    """Names of the first layer of a GPT without position embeddings."""

    def __init__(
        self, hidden: int = 4, vocabulary: int = 8, norm: str = "decoder.layers.0.input_layernorm.weight"
    ):
        super().__init__()
        self.tensors = OrderedDict(
            {
                "embedding.word_embeddings.weight": torch.randn(vocabulary, hidden),
                norm: torch.ones(hidden),
                "decoder.layers.0.self_attention.linear_proj.bias": torch.zeros(hidden),
                "decoder.layers.0.self_attention.linear_qkv.weight": torch.randn(3 * hidden, hidden),
            }
        )
        for index, tensor in enumerate(self.tensors.values()):
            self.register_parameter(f"p{index}", torch.nn.Parameter(tensor))
        self._names = dict(zip(self._parameters, self.tensors, strict=True))

    def named_parameters(self, *args: Any, **kwargs: Any):
        return ((self._names[short], param) for short, param in self._parameters.items())

    def state_dict(self, *args: Any, **kwargs: Any) -> OrderedDict:
        return OrderedDict((name, param.detach()) for name, param in self.named_parameters())

    state_dict_for_save_checkpoint = state_dict

    def load_state_dict(self, state: dict, strict: bool = True) -> None:
        for name, param in self.named_parameters():
            param.data.copy_(state[name])


class ToyOptimizer:
    """The optimizer interface of checkpoints over a plain AdamW, grouped as real ones are."""

    def __init__(self, model: ToyModel):
        named = list(model.named_parameters())
        groups = [
            {"params": [p for _, p in named if (p.dim() == 1) == flat], "wd_mult": 0.0 if flat else 1.0}
            for flat in (False, True)
        ]
        self.inner = torch.optim.AdamW(groups, lr=1e-2)
        self.reloaded = 0

    def state_dict(self) -> dict:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.inner.load_state_dict(state)

    def reload_model_params(self) -> None:
        self.reloaded += 1


class ToyScheduler:
    def __init__(self) -> None:
        self.num_steps = 0

    def state_dict(self) -> dict:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict) -> None:
        self.num_steps = state["num_steps"]


@pytest.fixture
def told() -> list:
    """What the micro-batch calculator was told."""
    return []


@pytest.fixture
def run_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list) -> Iterator[argparse.Namespace]:
    """Arguments of the run, which the checkpoint code gets instead of global ones."""
    args = argparse.Namespace(
        save=str(tmp_path / "ckpt"),
        load=str(tmp_path / "ckpt"),
        ckpt_format="torch",
        ckpt_step=None,
        finetune=False,
        pretrained_checkpoint=None,
        exit_on_missing_checkpoint=False,
        no_save_optim=None,
        no_save_rng=None,
        no_load_optim=None,
        no_load_rng=None,
        fp16=False,
        bf16=False,
        data_parallel_random_init=False,
        num_layers=1,
        hidden_size=4,
        num_attention_heads=2,
        add_position_embedding=False,
        vocab_file=None,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )
    monkeypatch.setattr(checkpointing, "get_args", lambda: args)
    monkeypatch.setattr(checkpointing, "update_num_microbatches", lambda **given: told.append(given))
    checkpointing.set_checkpoint_version(None)
    yield args
    checkpointing.set_checkpoint_version(None)


@pytest.fixture
def run(run_args: argparse.Namespace, told: list) -> Iterator[SimpleNamespace]:
    """A run of the toy model; ``run.save(n)`` and ``run.load()`` use its own directory."""
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 77)
    torch.manual_seed(0)
    yield new_run(run_args, told)
    tracker.reset()


@pytest.fixture
def one_process() -> Iterator[None]:
    """Process groups of one rank, as real models need them."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    get_cuda_rng_tracker().reset()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def new_run(args: argparse.Namespace, told: list | None = None, **model_settings: Any) -> SimpleNamespace:
    """A fresh model, optimizer and schedule under given arguments."""
    model = ToyModel(**model_settings)
    optimizer, scheduler = ToyOptimizer(model), ToyScheduler()

    def step() -> None:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.inner.step()
        scheduler.num_steps += 8
        args.consumed_train_samples += 8

    def save(iteration: int) -> None:
        checkpointing.save_checkpoint(iteration, [model], optimizer, scheduler, 1e9 * iteration)

    def load() -> tuple[int, float]:
        return checkpointing.load_checkpoint([model], optimizer, scheduler)

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    run = SimpleNamespace(**locals(), again=lambda **settings: new_run(args, told, **settings))
    run.file = lambda iteration: Path(args.save, f"iter_{iteration:07d}", "mp_rank_00", "model_optim_rng.pt")
    return run
