"""An apex, Ascend's or any other, is neither needed nor looked at: present or broken, it changes nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_npu.virtual.cann import why_not
from tests.npu.ground import ROOT

TRAIN = """
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 5000 --train-iters 2
    --lr 1e-3 --log-interval 1 --eval-iters 0 --num-workers 0 --fp16 --initial-loss-scale 256
""".split()  # noqa: SIM905
SAYS_SO = "import sys\nprint('apex was imported', file=sys.stderr)\n"
# As far as Megatron's users know it: kernels, optimizers, norms and mixed precision of these names.
PRESENT = {
    "apex/__init__.py": SAYS_SO,
    "apex/amp.py": SAYS_SO,
    "apex/optimizers.py": SAYS_SO + "class FusedAdam:\n    def __init__(self, *a, **k): raise SystemError\n",
    "apex/normalization.py": SAYS_SO
    + "class FusedLayerNorm:\n    def __init__(self, *a): raise SystemError\n",
    "amp_C.py": SAYS_SO,
}
BROKEN = dict.fromkeys(PRESENT, f"{SAYS_SO}raise RuntimeError('built for another torch')\n")


def run(path: Path, on_npu: bool) -> subprocess.CompletedProcess:
    launcher = ["-m", "megatron_npu.virtual", "--devices", "1", "--", sys.executable] if on_npu else []
    return subprocess.run(
        [sys.executable, *launcher, "pretrain_gpt.py", *TRAIN],
        env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )


def losses(done: subprocess.CompletedProcess) -> list[tuple[str, str]]:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "apex was imported" not in done.stderr
    return re.findall(r"lm loss: (\S+) .* grad norm: (\S+)", done.stdout)


@pytest.mark.parametrize("on_npu", [False, True], ids=["cpu", "npu"])
def test_installed_apex_does_not_change_a_run(tmp_path: Path, on_npu: bool) -> None:
    if on_npu and why_not() is not None:
        pytest.skip(f"no virtual NPU: {why_not()}")
    seen = []
    for name, files in {"none": {}, "present": PRESENT, "broken": BROKEN}.items():
        (tmp_path / name / "apex").mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        if not files:
            (tmp_path / name / "apex").rmdir()
        seen.append(losses(run(tmp_path / name, on_npu)))
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2]
