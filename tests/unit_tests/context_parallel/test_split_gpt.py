"""A GPT over a split sequence gives the losses and gradients of the whole one."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from tests.distributed.pool import run_ranks
from tests.unit_tests.context_parallel.split_world import document_mask, part
from tests.unit_tests.tensor_parallel.split_models import BATCH, SEQUENCE, batch, build, cut_like


@dataclass(frozen=True)
class Layout:
    """How two layers are split; ``fields`` are further settings, of the whole model as well."""

    context: int
    kind: str | list[str] = "p2p"
    tensor: int = 1
    sequence_parallel: bool = False
    hierarchy: tuple[int, int] | None = None
    fields: tuple[tuple[str, Any], ...] = ()
    documents: bool = False

    def start(self) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tensor,
            context_parallel_size=self.context,
            hierarchical_context_parallel_sizes=list(self.hierarchy) if self.hierarchy else None,
            create_gloo_process_groups=False,
        )

    def build(self, name: str, **extra: Any) -> torch.nn.Module:
        return build(
            name,
            tensor_model_parallel_size=self.tensor,
            sequence_parallel=self.sequence_parallel,
            context_parallel_size=self.context,
            cp_comm_type=list(self.kind) if isinstance(self.kind, tuple) else self.kind,
            hierarchical_context_parallel_sizes=list(self.hierarchy) if self.hierarchy else None,
            **dict(self.fields) | extra,
        )


def losses(model, layout: Layout) -> torch.Tensor:
    """Loss of every token of this rank, [b, s/cp]; the mean over the whole batch is differentiated."""
    tokens, positions, labels = batch()
    mask = document_mask(SEQUENCE) if layout.documents else None
    names = ("tokens", "position_ids", "labels", "attention_mask")
    mine = get_batch_on_this_cp_rank(dict(zip(names, (tokens, positions, labels, mask), strict=True)))
    loss = model(mine["tokens"], mine["position_ids"], mine["attention_mask"], labels=mine["labels"])
    (loss.sum() / (BATCH * SEQUENCE)).backward()
    return loss.detach()


def gradient(parameter) -> torch.Tensor:
    """Summed over all ranks that hold a copy and have seen other tokens."""
    grad = parameter.grad.clone()
    dist.all_reduce(grad, group=parallel_state.get_context_parallel_group())
    if getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
    return grad


def compare(name: str, layouts: list[Layout]) -> list[tuple[float, float]]:
    """On a rank: largest error of the losses, and of any gradient as a share of its largest value."""
    found = []
    for layout in layouts:
        parallel_state.destroy_model_parallel()
        whole = build(name, **dict(layout.fields))
        wanted = losses(whole, Layout(1, documents=layout.documents))
        layout.start()
        split = layout.build(name)
        got = losses(split, layout)
        rank = parallel_state.get_context_parallel_rank()
        loss_error = float((got - part(wanted, rank, layout.context, 1)).abs().max())
        worst = 0.0
        for (key, ours), (same, reference) in zip(
            split.named_parameters(), whole.named_parameters(), strict=True
        ):
            assert key == same
            target = cut_like(reference.grad, ours)
            worst = max(worst, float((gradient(ours) - target).abs().max() / reference.grad.abs().max()))
        found.append((loss_error, worst))
    return found


WINDOW = (("window_size", (3, 0)),)
BSH = (("attention_layout", "BSH"),)
UNFUSED = (("apply_query_key_layer_scaling", True), ("attention_softmax_in_fp32", True))
OF_TWO = [
    *(Layout(2, kind) for kind in ("p2p", "all_gather", "a2a")),
    Layout(2, ("a2a", "p2p")),
    *(Layout(2, kind, fields=WINDOW + BSH) for kind in ("p2p", "a2a")),
    *(Layout(2, kind, documents=True) for kind in ("p2p", "all_gather", "a2a")),
    Layout(2, "p2p", fields=UNFUSED),
]
OF_FOUR = [
    *(Layout(4, kind) for kind in ("p2p", "all_gather", "a2a")),
    Layout(4, "a2a+p2p", hierarchy=(2, 2)),
    *(Layout(2, kind, tensor=2) for kind in ("p2p", "a2a")),
    Layout(2, "p2p", tensor=2, sequence_parallel=True),
    Layout(2, "all_gather", tensor=2, sequence_parallel=True, fields=WINDOW),
]


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize(("world", "layouts"), [(2, OF_TWO), (4, OF_FOUR)], ids=["two", "four"])
def test_gradients(name, world, layouts):
    for by_layout in run_ranks(world, compare, name, layouts):
        for layout, (loss_error, worst) in zip(layouts, by_layout, strict=True):
            # The query-key scaling computes its softmax in fp32.
            bound = 1e-5 if layout.fields == UNFUSED else 1e-11
            assert loss_error < bound, layout
            assert worst < bound, layout


def recomputed(kind: str, sequence_parallel: bool) -> tuple[bool, bool, bool]:
    """On a rank: whether recomputing attention gives the same bits, what dropout changes, and eval undoes."""
    layout = Layout(2, kind, tensor=2, sequence_parallel=sequence_parallel)
    layout.start()
    runs = []
    for extra in ({}, {"recompute_granularity": "selective"}, {"attention_dropout": 0.0}):
        model = layout.build("llama", **{"attention_dropout": 0.25} | extra)
        loss = losses(model, layout)
        runs.append((loss, [p.grad for p in model.parameters()]))
    dropping = layout.build("llama", attention_dropout=0.25).eval()
    with torch.no_grad():
        quiet = losses_without_gradients(dropping)
    (plain, grads), (again, same), (without, _) = runs
    equal = torch.equal(plain, again) and all(map(torch.equal, grads, same))
    return equal, not torch.equal(plain, without), torch.equal(quiet, without)


def losses_without_gradients(model) -> torch.Tensor:
    tokens, positions, labels = batch()
    mine = get_batch_on_this_cp_rank({"tokens": tokens, "position_ids": positions, "labels": labels})
    return model(mine["tokens"], mine["position_ids"], None, labels=mine["labels"])


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
def test_recomputation_replays_dropout(kind, sequence_parallel):
    assert run_ranks(4, recomputed, kind, sequence_parallel) == [(True, True, True)] * 4
