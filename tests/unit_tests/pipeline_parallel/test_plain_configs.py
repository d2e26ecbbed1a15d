"""Schedules under scripts of one's own: a ModelParallelConfig, any model, torch's optimizer, no wrappers."""

import contextlib

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import UsageError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from tests.distributed.pool import run_ranks

HIDDEN, LENGTH, BATCH, COUNT = 3, 4, 2, 4


class Layer(torch.nn.Module):
    """tanh(x W), with a weight drawn from its number."""

    def __init__(self, number, config):
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.weight = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator).double())
        self.config, self.received = config, None

    def set_input_tensor(self, tensors):
        self.received = tensors[0]

    def forward(self, x):
        return torch.tanh((x if self.received is None else self.received) @ self.weight)


def inputs(lengths=None):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(length, BATCH, HIDDEN, generator=generator).double()
        for length in lengths or [LENGTH] * COUNT
    ]


LOSSES = {
    "pair": lambda output: (output.square().mean(), {"loss": float(output.detach().square().mean())}),
    "triple": lambda output: (
        output.square().sum(),
        torch.tensor(output.numel()),
        {"loss": float(output.detach().square().mean())},
    ),
    "triple_of_numbers": lambda output: (
        output.square().sum(),
        output.numel(),
        {"loss": float(output.detach().square().mean())},
    ),
}


def expected(layers, lengths=None):
    """Losses and weights after two steps of SGD, by torch alone."""
    weights = [Layer(number, None).weight for number in range(layers)]
    optimizer, losses = torch.optim.SGD(weights, lr=0.1), []
    for _ in range(2):
        optimizer.zero_grad()
        for x in inputs(lengths):
            for weight in weights:
                x = torch.tanh(x @ weight)
            loss = x.square().mean()
            losses.append(float(loss.detach()))
            (loss / COUNT).backward()
        optimizer.step()
    return losses, [weight.detach() for weight in weights]


def train(stages, chunks, loss, lengths=None, as_list=True, **fields):
    """This rank's losses and weights after two steps."""
    if stages > 1:
        parallel_state.initialize_model_parallel(
            1, stages, chunks if chunks > 1 else None, create_gloo_process_groups=False
        )
        fields = {"pipeline_model_parallel_size": stages, "pipeline_dtype": torch.float64} | fields
    rank = dist.get_rank() if stages > 1 else 0
    config = ModelParallelConfig(params_dtype=torch.float64, **fields)
    if not fields.get("variable_seq_lengths"):
        config.hidden_size = HIDDEN
    models = [Layer(chunk * stages + rank, config) for chunk in range(chunks)]
    optimizer = torch.optim.SGD([model.weight for model in models], lr=0.1)

    def step(iterator, model):
        return model(None if iterator is None else next(iterator)), LOSSES[loss]

    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        iterators = [iter(inputs(lengths)) if chunk == rank == 0 else None for chunk in range(chunks)]
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if as_list else iterators[0],
            model=models if as_list else models[0],
            num_microbatches=COUNT,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
        )
        losses += [report["loss"] for report in reports]
        optimizer.step()
    return losses, [model.weight.detach() for model in models]


def compare(ranks, stages, chunks, lengths=None):
    losses, weights = expected(stages * chunks, lengths)
    assert ranks[-1][0] == pytest.approx(losses, rel=1e-12)
    assert all(not found for found, _ in ranks[:-1])
    for rank, (_, found) in enumerate(ranks):
        for chunk, weight in enumerate(found):
            torch.testing.assert_close(weight, weights[chunk * stages + rank])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("as_list", [True, False])
def test_one_stage_without_process_groups(loss, as_list):
    parallel_state.destroy_model_parallel()
    compare([train(1, 1, loss, as_list=as_list)], 1, 1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"deallocate_pipeline_outputs": True},
        {"batch_p2p_comm": False},
        {"overlap_p2p_comm": True, "batch_p2p_comm": False},
        {"variable_seq_lengths": True},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
@pytest.mark.parametrize("chunks", [1, 2])
def test_two_stages(fields, chunks):
    lengths = [3, 5, 4, 1] if "variable_seq_lengths" in fields else None
    ranks = run_ranks(2, train, 2, chunks, "triple", lengths, **fields)
    compare(ranks, 2, chunks, lengths)


def evaluate(chunks):
    """A script whose steps ignore the model: constant outputs, losses that are plain numbers."""
    parallel_state.initialize_model_parallel(1, 2, chunks if chunks > 1 else None)
    config = ModelParallelConfig(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    config.hidden_size = HIDDEN
    model = torch.nn.Linear(HIDDEN, 1)
    model.config, model.model_type = config, ModelType.encoder_or_decoder
    model.set_input_tensor = lambda tensors: None
    rank = dist.get_rank()

    def step(iterator, model):
        return torch.rand(LENGTH, BATCH, HIDDEN), lambda output: (rank, {"loss_reduced": rank})

    batches = [range(100)] * chunks
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches if chunks > 1 else batches[0],
        model=[model] * chunks,
        num_microbatches=COUNT,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=True,
    )


@pytest.mark.parametrize("chunks", [1, 2])
def test_evaluation_with_losses_that_are_plain_numbers(chunks):
    assert run_ranks(2, evaluate, chunks) == [[], [{"loss_reduced": 1}] * COUNT]


def one_stage(**arguments):
    config = ModelParallelConfig()
    model = Layer(0, config)
    given = {
        "forward_step_func": lambda iterator, model: (model(next(iterator)), LOSSES["pair"]),
        "data_iterator": iter(inputs()),
        "model": model,
        "num_microbatches": COUNT,
        "seq_length": None,
        "micro_batch_size": None,
    }
    return model, get_forward_backward_func()(**given | arguments)


def test_losses_and_other_data_of_an_evaluation():
    parallel_state.destroy_model_parallel()
    losses = expected(1)[0][:COUNT]
    with torch.no_grad():
        model, reports = one_stage(forward_only=True, first_val_step=True)
        assert model.weight.grad is None
        assert [r["loss"] for r in reports] == pytest.approx(losses)
        _, collected = one_stage(
            forward_only=True,
            collect_non_loss_data=True,
            forward_step_func=lambda iterator, model: (
                model(next(iterator)),
                lambda output, non_loss_data: (non_loss_data, output.shape),
            ),
        )
    assert collected == [(True, (LENGTH, BATCH, HIDDEN))] * COUNT


def test_one_context_or_none_around_all_but_the_last_microbatch():
    parallel_state.destroy_model_parallel()
    config, events = ModelParallelConfig(), []

    @contextlib.contextmanager
    def no_sync():
        events.append("held")
        yield
        events.append("free")

    config.no_sync_func = no_sync
    model = Layer(0, config)
    one_stage(model=model)
    # Around the forward and the backward pass of each
    assert events == ["held", "free"] * (2 * (COUNT - 1))
    config.no_sync_func, before = None, model.weight.grad.clone()
    one_stage(model=model)
    torch.testing.assert_close(model.weight.grad, 2 * before)


def test_a_replaced_backward_is_the_one_that_runs(monkeypatch):
    parallel_state.destroy_model_parallel()
    calls = []
    monkeypatch.setattr(schedules, "custom_backward", lambda output, grad: calls.append(grad))
    model = Layer(0, ModelParallelConfig(deallocate_pipeline_outputs=True))
    one_stage(model=model)
    assert calls == [None] * COUNT
    assert model.weight.grad is None


@pytest.mark.parametrize("result", [3.0, (1.0,), (1.0, 2, 3, 4), None])
def test_a_loss_function_that_returns_something_else_is_told_so(result):
    parallel_state.destroy_model_parallel()
    with pytest.raises(UsageError, match="loss function returns"):
        one_stage(forward_step_func=lambda iterator, model: (model(next(iterator)), lambda output: result))


def without_a_width(interleaved):
    parallel_state.initialize_model_parallel(1, 2, 2 if interleaved else None)
    config = ModelParallelConfig(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    models = [Layer(0, config) for _ in range(1 + interleaved)]
    try:
        get_forward_backward_func()(
            forward_step_func=None,
            data_iterator=[None] * len(models),
            model=models,
            num_microbatches=2,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
        )
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize("interleaved", [False, True])
def test_stages_need_a_width(interleaved):
    for message in run_ranks(2, without_a_width, interleaved):
        assert "ModelParallelConfig has no hidden_size" in message
