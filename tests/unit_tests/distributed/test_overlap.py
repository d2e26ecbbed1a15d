"""Reducing behind backward and gathering behind forward: when, in which order, how often, how much."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallel
from megatron.core.errors import TrainingError, UsageError
from megatron.core.optimizer import get_megatron_optimizer
from tests.distributed.pool import run_ranks
from tests.unit_tests.distributed.small_training import LAYERS, WIDTH, Net, Training

OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 1}  # every parameter in a bucket of its own
SHARDED = {**OVERLAP, "use_distributed_optimizer": True}
# Function of torch.distributed, whose name depends on the version -> what it does.
OPERATIONS = {
    "all_reduce": "reduce",
    "reduce_scatter_tensor": "scatter",
    "reduce_scatter_single": "scatter",
    "all_gather_into_tensor": "gather",
    "all_gather_single": "gather",
    "broadcast": "broadcast",
}


class Traffic:
    """Collectives in the order of their calls: (operation, elements of the larger side)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._originals = {name: getattr(dist, name) for name in OPERATIONS if hasattr(dist, name)}

    def __enter__(self) -> "Traffic":
        for name, function in self._originals.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def __exit__(self, *unused: Any) -> None:
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.calls.append((OPERATIONS[name], max(tensor.numel() for tensor in tensors)))
            return function(*args, **kwargs)

        return count

    def take(self) -> list[tuple[str, int]]:
        taken, self.calls = self.calls, []
        return taken


def check_behind_backward(bad: float | None) -> tuple[int, list[str]]:
    """How often a backward pass asks the device for a value, and what the checks say after it."""
    training = Training({**OVERLAP, "check_for_nan_in_grad": True})
    reads: list[Any] = []
    if bad is not None and dist.get_rank() == 1:
        training.module.layers[1].weight.register_hook(lambda grad: grad * bad)
    names = ("cpu", "item", "tolist", "__bool__", "__float__", "__int__")

    def counting(read: Any) -> Any:
        def count(self: torch.Tensor, *args: Any) -> Any:
            reads.append(read)
            return read(self, *args)

        return count

    loss = training.module(torch.ones(2, WIDTH)).sum()
    with mock.patch.multiple(torch.Tensor, **{name: counting(getattr(torch.Tensor, name)) for name in names}):
        loss.backward()
        in_backward = len(reads)
    said = []
    try:
        training.model.finish_grad_sync()
    except TrainingError as error:
        said.append(str(error))
    return in_backward, said


@pytest.mark.parametrize(("bad", "problem"), [(None, None), (float("nan"), "NaN"), (float("inf"), "Inf")])
def test_gradients_are_checked_without_stopping_backward(bad: float | None, problem: str | None) -> None:
    """A check waits for the device, which backward would do in every bucket."""
    (first, said_first), (second, said_second) = run_ranks(2, check_behind_backward, bad)
    assert first == second == 0
    # Only of the rank that made it: what arrives from the others is not looked at.
    assert said_first == []
    assert len(said_second) == (0 if problem is None else 1)
    assert all(f"found {problem} in the local norm" in text for text in said_second)


def record_a_step(ddp: dict[str, Any]) -> dict[str, Any]:
    """Traffic of the parts of a step, and the numels of the buckets."""
    training = Training(ddp)
    events: list[str] = []
    for name, param in training.module.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    with Traffic() as traffic:
        parts = {}
        with training.model.no_sync():
            training._backward_one(torch.ones(2, WIDTH), 2)
        parts["held back"] = traffic.take()
        training._backward_one(torch.ones(2, WIDTH), 2)
        parts["backward"] = traffic.take()
        training.model.finish_grad_sync()
        parts["finish"] = traffic.take()
        training.optimizer.step_with_ready_grads()
        parts["step"] = traffic.take()
        training.model(torch.ones(2, WIDTH))
        parts["forward"] = traffic.take()
        training.model(torch.ones(2, WIDTH))
        parts["second forward"] = traffic.take()
    sizes = [bucket.grad_data.numel() for bucket in training.model.buffers[0].buckets]
    return {**parts, "sizes": sizes, "numel": training.model.buffers[0].numel}


def test_without_overlap_one_message_at_the_end() -> None:
    for parts in run_ranks(2, record_a_step, {}):
        assert parts["finish"] == [("reduce", parts["numel"])]
        assert not any(parts[name] for name in ("held back", "backward", "step", "forward"))


def test_buckets_go_in_order_while_backward_runs() -> None:
    for parts in run_ranks(2, record_a_step, OVERLAP):
        assert parts["held back"] == []
        reductions = [("reduce", size) for size in parts["sizes"]]
        assert (parts["backward"], parts["finish"]) == (reductions, [])
        assert len(parts["sizes"]) == 2 + 4 * LAYERS


def test_a_bucket_that_is_complete_starts_at_once() -> None:
    parts = run_ranks(2, record_a_step, {"overlap_grad_reduce": True, "bucket_size": 10**6})[0]
    assert (parts["backward"], parts["finish"]) == ([("reduce", parts["numel"])], [])
    order = run_ranks(2, order_of_readiness)
    assert order[0] == order[1] == [(2, []), (1, []), (0, [0, 1, 2]), (3, [0, 1, 2, 3])]


def order_of_readiness() -> list[tuple[int, list[int]]]:
    """Gradients of four groups arrive out of order; after each, which reductions have started."""
    training = Training(OVERLAP)
    groups, seen = training.model.bucket_groups[:4], []
    for number in (2, 1, 0, 3):
        next(iter(groups[number].params)).gradient_ready()
        seen.append((number, [i for i, group in enumerate(groups) if group._reductions is not None]))
    training.model.zero_grad_buffer()  # waits for them
    return seen


def test_shards_scatter_behind_backward_and_gather_in_the_step() -> None:
    for parts in run_ranks(2, record_a_step, SHARDED):
        sizes = parts["sizes"]
        assert parts["backward"] + parts["finish"] == [("scatter", size) for size in sizes]
        assert sorted(parts["step"]) == sorted(("gather", size) for size in sizes)
        assert parts["forward"] == []
        assert all(size % 128 == 0 for size in sizes)


def test_parameters_are_gathered_once_in_the_order_of_forward() -> None:
    for parts in run_ranks(2, record_a_step, {**SHARDED, "overlap_param_gather": True}):
        gathers = [("gather", size) for size in parts["sizes"]]
        assert parts["step"] == gathers[-1:]
        assert sorted(parts["forward"] + parts["step"]) == sorted(gathers)
        assert parts["second forward"] == []
        aligned = run_ranks(
            2, record_a_step, {**SHARDED, "overlap_param_gather": True, "align_param_gather": True}
        )
        assert aligned[0]["step"] == []


def gather_ahead(first: str) -> tuple[int, int]:
    """Buckets whose gathering was started before, and within, the call of the first module."""
    training = Training({**SHARDED, "overlap_param_gather": True})
    training.step(0)
    groups = training.model.bucket_groups
    assert all(group.awaits_params for group in groups)
    if first == "schedule":
        training.model.start_param_sync()
    before = sum(group._gathers is not None for group in groups)
    training.module.norms[0](torch.ones(1, WIDTH))
    waiting = sum(group.awaits_params for group in groups)
    return before, len(groups) - waiting


def test_a_module_waits_for_its_own_parameters_only() -> None:
    assert run_ranks(2, gather_ahead, "optimizer") == [(1, 2)] * 2
    assert run_ranks(2, gather_ahead, "schedule") == [(2 + 4 * LAYERS, 2)] * 2


def waited_for_at_the_first_layer() -> int:
    training = Training({**SHARDED, "overlap_param_gather": True})
    training.step(0)
    groups, seen = training.model.bucket_groups, []
    training.module.norms[0].register_forward_hook(
        lambda *_: seen.append(sum(not group.awaits_params for group in groups))
    )
    training.model(torch.ones(1, WIDTH))
    return seen[0]


def test_a_model_does_not_wait_for_its_last_layers_at_its_first() -> None:
    # One parameter of the model itself, and two of its first norm.
    assert run_ranks(2, waited_for_at_the_first_layer) == [3, 3]


def forward_without_hooks() -> bool:
    """Parameters of a forward whose hooks are off are those after the step."""
    outputs = []
    for switch in ({}, {"overlap_param_gather": True}):
        training = Training({**SHARDED, **switch})
        training.step(0)
        if switch:
            training.model.disable_forward_pre_hook(param_sync=False)
        outputs.append(training.model(torch.ones(1, WIDTH)))
        training.step(1)
        if switch:
            training.model.disable_forward_pre_hook()
        outputs.append(training.module(torch.ones(1, WIDTH)))
    return bool(torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3]))


def test_no_forward_sees_old_parameters() -> None:
    assert run_ranks(2, forward_without_hooks) == [True, True]


def two_backwards() -> str:
    training = Training(OVERLAP)
    training._backward_one(torch.ones(2, WIDTH), 1)
    with pytest.raises(UsageError, match=r"arrived twice .* no_sync") as caught:
        training._backward_one(torch.ones(2, WIDTH), 1)
    training.model.zero_grad_buffer()
    training._backward_one(torch.ones(2, WIDTH), 1)  # a new step is a new start
    training.model.finish_grad_sync()
    return str(caught.value)


def test_a_gradient_that_comes_after_its_reduction_is_an_error() -> None:
    assert len(set(run_ranks(2, two_backwards))) == 1


def late_weight_gradient() -> bool:
    """A weight whose gradient a schedule computes after backward, against one that autograd delivers."""
    results = []
    for deferred in (False, True):
        training = Training({"overlap_grad_reduce": True, "bucket_size": 1})
        weight = training.module.head.weight
        x = torch.full((1, WIDTH), dist.get_rank() + 1.0)
        if deferred:
            weight.main_grad.add_(x)
            weight.gradient_ready()
        else:
            (weight * x).sum().backward()
        group = training.model.bucket_groups[0]
        started = group._reductions is not None
        group.finish_grad_sync()
        results.append((started, weight.main_grad.tolist()))
    return results[0] == results[1] == (True, [[1.5] * WIDTH])


def test_layers_that_add_their_gradient_late_start_the_reduction_too() -> None:
    assert run_ranks(2, late_weight_gradient) == [True, True]


def broadcast(sharded: bool) -> tuple[list[tuple[str, int]], bool]:
    training = Training({"use_distributed_optimizer": sharded})
    original = {name: param.detach().clone() for name, param in training.module.named_parameters()}
    if dist.get_rank() == 1:
        for param in training.module.parameters():
            param.data.add_(1.0)
    with Traffic() as traffic:
        training.model.broadcast_params()
    same = all(torch.equal(param, original[name]) for name, param in training.module.named_parameters())
    return traffic.calls, same


def test_broadcast_gives_all_ranks_the_first_ones_parameters() -> None:
    for calls, same in run_ranks(2, broadcast, False):
        assert same
        assert len(calls) == 2 + 4 * LAYERS
    for calls, same in run_ranks(2, broadcast, True):
        assert same
        assert len(calls) == 1


def two_chunks() -> list[int]:
    """Groups whose gathering has started, of the second of two chunks, after each module of the first."""
    training = Training({**SHARDED, "overlap_param_gather": True})
    config, ddp_config = training.model.config, training.model.ddp_config
    second = DistributedDataParallel(config, ddp_config, Net(config), disable_bucketing=True)
    optimizer = get_megatron_optimizer(training.config, [training.model, second])
    for chunk in (training.model, second):
        chunk.start_grad_sync()
        chunk.finish_grad_sync()
    optimizer.step()
    seen = []
    for module in (*training.module.norms, *training.module.layers, training.module.head):
        module(torch.ones(1, WIDTH))
        seen.append(sum(group._gathers is not None for group in second.bucket_groups))
    return seen


def test_the_last_modules_of_a_chunk_start_the_gathering_for_the_next() -> None:
    # The head's bucket is the last that forward needs; the second chunk is one bucket.
    assert run_ranks(2, two_chunks) == [[0] * (2 * LAYERS) + [1]] * 2


def skipped_step() -> tuple[bool, list[Any]]:
    training = Training({**SHARDED, "overlap_param_gather": True}, precision="fp16")
    training.module.head.weight.main_grad.fill_(float("nan"))
    training.model.start_grad_sync()
    training.model.finish_grad_sync()
    with Traffic() as traffic:
        success, _, _ = training.optimizer.step()
        training.model(torch.ones(1, WIDTH, dtype=torch.float16))
    return success, [call for call in traffic.calls if call[0] == "gather"]


def test_a_skipped_step_gathers_nothing() -> None:
    assert run_ranks(2, skipped_step) == [(False, [])] * 2


def load_while_gathering() -> bool:
    """Weights loaded while the old ones are still being gathered are those that stay."""
    training = Training({**SHARDED, "overlap_param_gather": True})
    training.step(0)
    training.model.load_state_dict(
        {name: torch.ones_like(p) for name, p in training.model.state_dict().items()}
    )
    training.model.disable_forward_pre_hook()
    return all(bool(param.eq(1.0).all()) for param in training.module.parameters())


def test_loaded_weights_stay() -> None:
    assert run_ranks(2, load_while_gathering) == [True, True]
