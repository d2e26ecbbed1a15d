"""``--profile`` on a virtual NPU: Ascend's own profiler writes what it knows of the host, torch's as well."""

import json
from pathlib import Path

import pytest

from tests.npu.ground import on_virtual_npus

TRAIN = """
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 5000 --train-iters 5
    --log-interval 1 --eval-iters 0 --lr 1e-3 --num-workers 0 --profile
    --profile-step-start 1 --profile-step-end 4
""".split()  # noqa: SIM905


@pytest.mark.parametrize("whose", ["the npu's", "torch's"])
def test_three_steps_are_traced(tmp_path: Path, whose: str) -> None:
    words = ["--save", str(tmp_path), "--save-interval", "100", "--no-save-optim"]
    if whose == "torch's":
        words.append("--use-pytorch-profiler")
    done = on_virtual_npus("--devices", "1", "--", "python", "pretrain_gpt.py", *TRAIN, *words)
    assert done.returncode == 0, done.stdout
    directory = tmp_path / "profile"
    assert f"profiling iterations 1 to 4 into {directory}, by {whose} profiler" in done.stdout
    pattern = (
        "*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json" if whose == "the npu's" else "*.pt.trace.json"
    )
    (trace,) = directory.glob(pattern)
    events = json.loads(trace.read_text(encoding="utf-8"))
    names = [event.get("name") for event in (events if isinstance(events, list) else events["traceEvents"])]
    assert names.count("npu::npu_fusion_attention") == 3  # one layer, three steps
