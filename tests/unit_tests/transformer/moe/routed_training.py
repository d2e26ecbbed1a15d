"""Two routers trained by the library's schedule on several ranks, and by float64 formulas on one."""

from typing import Any, cast

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import tracked_losses
from megatron.core.transformer.moe.tracker import track_moe_metrics
from tests.unit_tests.transformer.moe.routers import (
    HIDDEN,
    balance_loss,
    drawn,
    forget_what_was_tracked,
    normalised_scores,
    router_of,
    sequence_balance_loss,
)

EXPERTS, TOPK, LAYERS = 8, 2, 2
LENGTH, BATCH, MICROBATCHES = 8, 3, 4  # of the whole step: ranks with other data share the micro-batches
KINDS: dict[str, dict[str, Any]] = {
    "aux_loss": dict(moe_aux_loss_coeff=0.5),
    "seq_aux_loss": dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.5),
    "z_loss": dict(moe_router_load_balancing_type="none", moe_z_loss_coeff=0.1),
    "group_limited_greedy": dict(
        moe_router_load_balancing_type="group_limited_greedy",
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        seq_aux=True,
        moe_aux_loss_coeff=0.5,
        moe_device_level_aux_loss_coeff=0.3,
        moe_comm_aux_loss_coeff=0.2,
    ),
}


def microbatch(number: int) -> Tensor:
    """[s, b, h] hidden states."""
    return drawn(LENGTH, BATCH, HIDDEN, seed=50 + number).float()


def table(layer: int) -> Tensor:
    """[E, h] what experts add."""
    return drawn(EXPERTS, HIDDEN, seed=90 + layer).float()


class Routed(MegatronModule):
    """Adds what the chosen experts say, layer by layer: the outcome depends on all weights."""

    def __init__(self, fields: dict[str, Any]) -> None:
        routers = [router_of(EXPERTS, TOPK, num_layers=LAYERS, **fields) for _ in range(LAYERS)]
        super().__init__(routers[0].config)
        self.routers = torch.nn.ModuleList(routers)
        for layer, router in enumerate(routers):
            router.set_layer_number(layer + 1)
            with torch.no_grad():
                router.weight.mul_(1.0 + layer)

    def set_input_tensor(self, tensors: Any) -> None:
        """There is one stage."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[s, b, h] -> [s, b]"""
        for layer, router in enumerate(self.routers):
            probs, _ = router(hidden)
            hidden = hidden + (probs @ table(layer)).view(hidden.shape)
        return hidden.square().mean(-1)


def train(
    sizes: dict[str, int], kind: str, per_token: bool, loss_scale: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One step on this rank: gradients of all weights, and the losses of the log line.

    Args:
        sizes: of tensor ("tp") and context parallelism ("cp").
        kind: key of ``KINDS``.
        per_token: divide by the tokens of the step at its end.
        loss_scale: of fp16; gradients are returned without it.
    """
    forget_what_was_tracked()
    tp, cp = sizes.get("tp", 1), sizes.get("cp", 1)
    parallel = dict(tensor_model_parallel_size=tp, sequence_parallel=tp > 1, context_parallel_size=cp)
    net = Routed({**KINDS[kind], **parallel, "calculate_per_token_loss": per_token})
    config = net.config
    config.grad_scale_func = lambda loss: loss * loss_scale
    config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), net)
    data, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = iter(range(data, MICROBATCHES, ranks))

    def forward_step(numbers: Any, chunk: Any) -> Any:
        part = (
            parallel_state.get_context_parallel_rank() * tp + parallel_state.get_tensor_model_parallel_rank()
        )
        losses = chunk(microbatch(next(numbers)).chunk(tp * cp)[part])
        tokens = torch.tensor(LENGTH * BATCH)  # of all ranks that share the sequences
        return losses, lambda output: (output.sum(), tokens, {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=own,
        model=[model],
        num_microbatches=MICROBATCHES // ranks,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    logged: dict[str, Any] = {}
    track_moe_metrics(
        ranks / MICROBATCHES, 1, None, None, logged, track_names=tracked_losses(config), num_layers=LAYERS
    )
    parameters: dict[str, Any] = dict(net.named_parameters())
    gradients = {name: param.main_grad / loss_scale for name, param in parameters.items()}
    return gradients, {name: float(loss) for name, loss in logged.items()}


def train_all(sizes: dict[str, int], cases: list[tuple]) -> list[tuple]:
    """Every case, in one world."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.get("tp", 1), context_parallel_size=sizes.get("cp", 1)
    )
    return [train(sizes, *case) for case in cases]


def expected(kind: str, with_losses: bool = True) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same step in float64, by formulas: every micro-batch whole, and their mean.

    Without losses the gradients are those of the main loss alone.
    """
    net = Routed(KINDS[kind]).double()
    logged = dict.fromkeys(tracked_losses(net.config), 0.0)
    for number in range(MICROBATCHES):
        hidden = microbatch(number).double()
        total = torch.zeros((), dtype=torch.float64)
        for layer, router in enumerate(net.routers):
            logits = hidden.view(-1, HIDDEN) @ cast(Tensor, router.weight).t()
            probs, chosen = _choice(kind, logits)
            for name, (coefficient, loss) in _losses(kind, logits, chosen).items():
                total = total + coefficient * loss * with_losses
                logged[name] += loss.item() / MICROBATCHES / LAYERS
            hidden = hidden + (probs @ table(layer).double()).view(hidden.shape)
        ((total + hidden.square().mean()) / MICROBATCHES).backward()
    return {name: cast(Tensor, param.grad) for name, param in net.named_parameters()}, logged


def _choice(kind: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """[T, E] weights and bool map."""
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if kind == "group_limited_greedy":
        groups = logits.unflatten(1, (4, -1))
        best = groups.amax(-1).topk(2).indices
        kept = torch.zeros(len(logits), 4, dtype=torch.bool).scatter_(1, best, True)
        allowed = kept.repeat_interleave(EXPERTS // 4, dim=1)
    experts = logits.masked_fill(~allowed, -torch.inf).topk(TOPK).indices
    chosen = torch.zeros_like(allowed).scatter_(1, experts, True)
    if kind == "group_limited_greedy":
        return logits.softmax(-1) * chosen, chosen
    return logits.masked_fill(~chosen, -torch.inf).softmax(-1), chosen


def _losses(kind: str, logits: Tensor, chosen: Tensor) -> dict[str, tuple[float, Tensor]]:
    """Name -> coefficient and value."""
    scores = normalised_scores(logits)
    if kind == "aux_loss":
        return {"load_balancing_loss": (0.5, balance_loss(scores, chosen, TOPK))}
    if kind == "seq_aux_loss":
        return {"load_balancing_loss": (0.5, sequence_balance_loss(scores, chosen, TOPK, BATCH))}
    if kind == "z_loss":
        return {"z_loss": (0.1, logits.logsumexp(-1).square().mean())}
    device, traffic = [], []
    for number in range(BATCH):
        of_groups = chosen[number::BATCH].unflatten(1, (4, -1))
        means = scores[number::BATCH].unflatten(1, (4, -1)).sum(-1).mean(0)
        loads = of_groups.double().sum(0).mean(-1) * EXPERTS / (TOPK * LENGTH)
        device.append((loads * means).sum())
        traffic.append((of_groups.any(-1).double().sum(0) * 4 / (2 * LENGTH) * means).sum())
    return {
        "load_balancing_expert_level_loss": (0.5, sequence_balance_loss(scores, chosen, TOPK, BATCH)),
        "load_balancing_device_level_loss": (0.3, torch.stack(device).mean()),
        "load_balancing_comm_level_loss": (0.2, torch.stack(traffic).mean()),
    }
