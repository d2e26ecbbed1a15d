"""Private names that other projects use: indices of data, batches that come again, holders of groups."""

import numpy as np
import pytest
import torch

from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index
from megatron.core.errors import NotBuiltYetError
from megatron.core.num_microbatches_calculator import NumMicroBatchesCalculator
from megatron.core.process_groups_config import GradCommProcessGroups, ModelCommProcessGroups
from megatron.core.rerun_state_machine import (
    Call,
    Caller,
    RerunDataIterator,
    RerunErrorInjector,
    RerunMode,
    RerunState,
    get_rerun_state_machine,
)
from tests.distributed.pool import run_ranks


def shuffled(blocks: list[np.ndarray]) -> np.ndarray:
    random = np.random.RandomState(5)
    for block in blocks:
        random.shuffle(block)
    return np.concatenate(blocks)


@pytest.mark.parametrize("epochs", [1, 3])
def test_document_index(epochs: int) -> None:
    documents = np.array([4, 7, 9], dtype=np.int32)
    together = _build_document_index(documents, epochs, np.random.RandomState(5), False)
    assert together.tolist() == shuffled([np.tile(documents, epochs)]).tolist()
    apart = _build_document_index(
        documents=documents,
        num_epochs=epochs,
        numpy_random_state=np.random.RandomState(5),
        separate_final_epoch=True,
    )
    blocks = [documents.copy()] if epochs == 1 else [np.tile(documents, epochs - 1), documents.copy()]
    assert apart.tolist() == shuffled(blocks).tolist()


@pytest.mark.parametrize("first", [10, 6])
def test_shuffle_index(first: int) -> None:
    got = _build_shuffle_index(num_samples=first, total_size=10, numpy_random_state=np.random.RandomState(5))
    assert got.dtype == np.uint32
    assert (
        got.tolist() == shuffled([np.arange(first), np.arange(first, 10)][: 1 if first == 10 else 2]).tolist()
    )


def test_log_single_rank_and_s3_config_are_where_they_are_imported_from() -> None:
    from megatron.core import utils
    from megatron.core.datasets import indexed_dataset, utils_s3
    from megatron.core.datasets import utils as data_utils

    assert data_utils.log_single_rank is utils.log_single_rank
    assert indexed_dataset.S3Config is utils_s3.S3Config


def test_a_calculator_of_ones_own() -> None:
    class Always(NumMicroBatchesCalculator):
        def __init__(self):
            super().__init__()
            self.num_micro_batches = 3

        def update(self, consumed_samples, consistency_check, verbose=False): ...

    assert (Always().get(), Always().get_current_global_batch_size()) == (3, 0)


def test_unset_process_group_raises_attribute_error() -> None:
    groups = ModelCommProcessGroups()
    with pytest.raises(AttributeError):
        _ = groups.tp
    groups.tp = "group"
    assert groups.tp == "group"
    with pytest.raises(TypeError):
        GradCommProcessGroups(dp="group")


def scratch_memory() -> None:
    parallel_state.initialize_model_parallel(1, create_gloo_process_groups=False)
    with pytest.raises(AssertionError, match="already initialized"):
        parallel_state._set_global_memory_buffer()
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    assert parallel_state.get_global_memory_buffer().get_tensor([2, 3], torch.float32, "name").shape == (2, 3)


def test_scratch_memory_can_be_made_again() -> None:
    run_ranks(1, scratch_memory)


# ---- repeated iterations -------------------------------------------------------------------------------


def test_batches_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_rerun_state_machine(), "get_mode", lambda: RerunMode.VALIDATE_RESULTS)
    batches = RerunDataIterator(iter(range(9)))
    assert [next(batches), next(batches)] == [0, 1]
    batches.rewind()
    assert [next(batches), next(batches), next(batches)] == [0, 1, 2]
    state = batches.state_dict()
    batches.advance()
    batches.rewind()
    assert next(batches) == 3
    again = RerunDataIterator(iter([7]))
    again.load_state_dict(state)
    again.rewind()
    assert [next(again) for _ in range(4)] == [0, 1, 2, 7]


def test_batches_are_not_kept_while_nothing_is_repeated() -> None:
    batches = RerunDataIterator(iter(range(9)))
    next(batches)
    assert batches.saved_microbatches == []
    batches.rewind()
    assert next(batches) == 1


def test_faults_are_never_injected_at_rate_zero() -> None:
    injector = RerunErrorInjector()
    assert not injector.maybe_inject()
    assert injector.maybe_miscompare(lambda a, b: abs(a - b), 3, 5, RerunState.INITIAL_RUN) == 2
    other = RerunErrorInjector()
    other.load_state_dict(injector.state_dict())
    assert other.state_dict() == {"error_injection_rate": 0, "error_injection_type": "transient_error"}
    with pytest.raises(NotBuiltYetError, match="error_injection_rate 5"):
        RerunErrorInjector(error_injection_rate=5)
    assert Call(caller=Caller("f.py", 3, 0), sequence=2).caller.lineno == 3
