"""What cannot run on several ranks ends all and is told once; a world too small shrinks sizes on request."""

from launcher import pretrain_gpt_ranks, tiny_gpt


def test_a_layout_that_does_not_divide_the_world_is_refused(golden, tmp_path):
    words = tiny_gpt(golden, tmp_path, tensor_model_parallel_size=4, num_query_groups=3)
    runs = pretrain_gpt_ranks(2, [*words, "--group-query-attention"], tmp_path)
    assert [run.status for run in runs] == [1, 1]
    outputs = "".join(run.output for run in runs)
    rule = "WORLD_SIZE 2: the world does not divide into tensor x pipeline x context = 4 x 1 x 1 = 4 ranks"
    assert outputs.count(rule) == 1
    assert "start 4 ranks, or use --tensor-model-parallel-size 2; MEGATRON_CLAMP_PARALLEL=1" in outputs
    assert outputs.count("--num-query-groups 3: does not divide") == 1
    assert "initializing torch distributed" not in outputs and "Traceback" not in outputs


def test_a_missing_data_set_is_reported_once(golden, tmp_path):
    """Found on the rank that reads, after the process groups exist."""
    words = tiny_gpt(golden, tmp_path, tensor_model_parallel_size=2, data_path=tmp_path / "nothing_here")
    runs = pretrain_gpt_ranks(2, words, tmp_path)
    assert [run.status for run in runs] == [1, 1]
    outputs = "".join(run.output for run in runs)
    assert outputs.count("error: ") == 1 and "nothing_here" in outputs and "Traceback" not in outputs


def test_a_layout_of_2023_shrinks_to_the_world(golden, tmp_path):
    words = tiny_gpt(
        golden, tmp_path, tensor_model_parallel_size=8, pipeline_model_parallel_size=8, train_iters=3
    )
    runs = pretrain_gpt_ranks(2, words, tmp_path, env={"MEGATRON_CLAMP_PARALLEL": "1"})
    for run in runs:
        run.check()
    outputs = "".join(run.output for run in runs)
    assert outputs.count("--tensor-model-parallel-size 8 is reduced to 2") == 1
    assert outputs.count("--pipeline-model-parallel-size 8 is reduced to 1") == 1
    assert len(runs[-1].losses) == 3
