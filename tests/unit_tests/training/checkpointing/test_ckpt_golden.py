"""Checkpoints of the original in our model, and ours in the form of the original's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed_gpt import GPTRun
from safetensors.torch import load_file

from megatron.training import checkpointing

FILE = "ckpt/torch_tp1pp1/iter_0000004/mp_rank_00/model_optim_rng.pt"
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def golden_run(run_args, golden: Path) -> GPTRun:
    run_args.load = str(golden / "ckpt" / "torch_tp1pp1")
    run_args.num_layers, run_args.hidden_size, run_args.num_attention_heads = 2, 16, 4
    run_args.add_position_embedding = True
    return GPTRun(run_args)


@pytest.fixture
def golden_file(golden: Path) -> dict[str, Any]:
    return checkpointing.safe_load.load_file(str(golden / FILE))


def test_original_checkpoint_gives_the_original_logits(golden_run: GPTRun, golden: Path):
    spec = json.loads((golden / "ckpt" / "torch_tp1pp1.spec.json").read_text())
    assert spec["kind"] == "llama"
    assert golden_run.load() == (4, 9437184.0)
    expected = load_file(golden / "ckpt" / "torch_tp1pp1.expected.safetensors")
    golden_run.gpt.eval()
    tokens, positions = expected["tokens"], expected["position_ids"]
    with torch.no_grad():
        logits = golden_run.gpt(tokens, positions, None)
        losses = golden_run.gpt(tokens, positions, None, labels=expected["labels"])
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses, expected["loss_per_token"], rtol=0, atol=1e-5)


def test_original_optimizer_state_is_loaded_by_parameter(golden_run: GPTRun, golden_file: dict):
    golden_run.load()
    names = golden_run.names_by_number()
    by_name = dict(golden_run.gpt.named_parameters())
    stored = golden_file["optimizer"]["state"]
    assert len(stored) == len(names) == 15
    for number, name in enumerate(names):
        state = golden_run.optimizer.chained_optimizers[0].state[by_name[name]]
        assert torch.equal(state["exp_avg"], stored[number]["exp_avg"]), name
        assert torch.equal(state["exp_avg_sq"], stored[number]["exp_avg_sq"]), name
        assert float(state["step"]) == 4
    assert golden_run.scheduler.num_steps == 16
    assert golden_run.args.consumed_train_samples == 16


def test_original_random_states_are_restored(golden_run: GPTRun, golden_file: dict):
    golden_run.load()
    stored, now = golden_file["rng_state"][0], checkpointing.get_rng_state("torch")[0]
    assert now["random_rng_state"] == stored["random_rng_state"]
    assert (now["np_rng_state"][1] == stored["np_rng_state"][1]).all()
    assert torch.equal(now["torch_rng_state"], stored["torch_rng_state"])
    assert now["rng_tracker_states"].keys() == stored["rng_tracker_states"].keys()
    assert all(torch.equal(now["rng_tracker_states"][k], v) for k, v in stored["rng_tracker_states"].items())


def listing(value: Any, name: str = "", path: tuple = ()) -> set[tuple]:
    """(path, description) of every entry, in the words of the golden listings; integer keys by the first."""
    if isinstance(value, torch.Tensor):
        return {(*path, f"{name}tensor {list(value.shape)} {str(value.dtype)[6:]}")}
    kind = type(value).__name__
    if isinstance(value, dict) and value:
        here = (*path, f"{name}{kind}({len(value)})" if name.startswith("'") else f"{name}{kind}")
        if all(isinstance(key, int) for key in value):
            entries = {here, (*here, f"ints 0..{len(value) - 1}, e.g. 0:")}
            return entries | {
                entry for k, v in value[0].items() for entry in listing(v, f"{k!r}: ", (*here, "ints"))
            }
        return {here} | {entry for k, v in value.items() for entry in listing(v, f"{k!r}: ", here)}
    if isinstance(value, list):
        here = (*path, f"{name}{kind}({len(value)})" if name.startswith("'") else f"{name}{kind}")
        entries = {here}
        if not all(isinstance(item, int) for item in value):
            entries |= {entry for i, v in enumerate(value) for entry in listing(v, f"[{i}] ", here)}
        return entries
    if isinstance(value, tuple):
        return {(*path, f"{name}tuple({len(value)})")}
    return {(*path, f"{name}{kind} {value}")}


def golden_listing(file: Path) -> set[tuple]:
    """The same from a golden listing, whose levels are indented by two blanks."""
    entries, stack = set(), []
    lines = file.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    for line in lines[start + 1 :]:
        depth = (len(line) - len(line.lstrip())) // 2
        text = line.strip()
        stack = [*stack[:depth], "ints" if text.startswith("ints ") else text]
        entries.add((*stack[:-1], text))
    return entries


def test_saved_file_has_the_structure_of_the_original(run_args, golden: Path):
    """The same model, steps and settings in bf16: every key, type, shape and scalar, read by plain torch."""
    run = GPTRun(run_args, "bf16")
    for _ in range(4):
        run.step()
    run.save(4)
    file = Path(run_args.save, "iter_0000004", "mp_rank_00", "model_optim_rng.pt")
    content = torch.load(file, weights_only=False)
    expected = golden_listing(golden / "ckpt" / "structures" / "torch_bf16.txt")
    found = {entry for key, value in content.items() for entry in listing(value, f"{key!r}: ")}

    def others(entries: set[tuple]) -> set[tuple]:
        # The arguments of this run are a few, and the fault detection keeps less.
        return {entry for entry in entries if not re.match(r"'(args|rerun_state_machine)'", entry[0])}

    assert others(found) == others(expected)
    assert len(others(found)) > 100
    order = [k for k in content if k != "rerun_state_machine"]
    assert order == [
        "args", "checkpoint_version", "iteration", "model", "optimizer", "opt_param_scheduler", "rng_state",
        "num_floating_point_operations_so_far",
    ]  # fmt: skip
