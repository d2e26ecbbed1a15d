"""--hccl-group-buffer, and the buffer that stages need."""

from argparse import Namespace

import pytest
import torch

from megatron.training.buffer_sizes import buffer_size_problem, communicator_buffers

RUN = Namespace(
    hccl_group_buffer=None,
    pipeline_model_parallel_size=2,
    context_parallel_size=2,
    tensor_model_parallel_size=4,
    sequence_parallel=True,
    seq_length=8192,
    micro_batch_size=2,
    hidden_size=5120,
    params_dtype=torch.bfloat16,
    fp32_residual_connection=False,
)


def run(**changes) -> Namespace:
    return Namespace(**vars(RUN) | changes)


def test_pipeline_buffers_hold_one_stage_output() -> None:
    # [8192 / 2 / 4, 2, 5120] in bf16 is 20 MiB.
    assert communicator_buffers(run()) == {"pp": 20}
    assert communicator_buffers(run(hidden_size=5121)) == {"pp": 21}
    assert communicator_buffers(run(sequence_parallel=False)) == {"pp": 80}
    assert communicator_buffers(run(fp32_residual_connection=True)) == {"pp": 40}
    assert communicator_buffers(run(pipeline_model_parallel_size=1)) == {}


def test_sizes_given_by_the_user_are_used() -> None:
    text = " dp:400; tp-cp : 300;pp:7;"
    assert buffer_size_problem(text) is None
    assert communicator_buffers(run(hccl_group_buffer=text)) == {"dp": 400, "tp_cp": 300, "pp": 7}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data:400", "no group with 'data'"),
        ("dp", "gives dp no"),
        ("dp:0", "gives dp no"),
        ("dp:1.5", "gives dp no"),
    ],
)
def test_invalid_sizes_are_named(text: str, said: str) -> None:
    assert said in buffer_size_problem(text)
