"""Level 3: the virtual NPU as a device, its collectives, a launch script, and the check of replacements."""

import json
import re
from pathlib import Path

import pytest

from megatron_npu.virtual.environment import CHIPS
from tests.npu.ground import on_virtual_npus
from tests.reserved_port import ReservedPort

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.parametrize("file", ["virtual_device.py", "virtual_ranks.py"])
def test_torch_works_on_it(file: str, capsys: pytest.CaptureFixture) -> None:
    done = on_virtual_npus("--", "python", *PYTEST, "-o", f"python_files={file}", "tests/npu/inner")
    assert done.returncode == 0, done.stdout
    with capsys.disabled():
        print(f"\nNPU level 3, {file}: {done.stdout.strip().splitlines()[-1]}")


def test_a_command_gets_the_devices_that_were_asked_for() -> None:
    code = "import torch; print(torch.npu.device_count(), torch.npu.get_device_name(1))"
    memory = "print(torch.npu.mem_get_info(2)[1] >> 30)"
    options = ("--devices", "3", "--soc", "Ascend910_9382", "--memory", "32")
    done = on_virtual_npus(*options, "--", "python", "-c", f"{code}; {memory}")
    assert done.stdout.split()[-3:] == ["3", "Ascend910_9382", "32"], done.stdout


def test_a_launch_script_trains(golden: Path, tmp_path: Path) -> None:
    """Two ranks under torchrun that share each layer, in fp16."""
    tiny = """
        --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
        --train-iters 3 --lr-decay-iters 3 --eval-iters 1 --log-interval 1 --num-workers 0 --split 90,8,2
        --tokenizer-type NullTokenizer --vocab-size 500 --initial-loss-scale 1024
        --tensor-model-parallel-size 2 --sequence-parallel
    """
    script = ("bash", "tests_gpt/pretrain_gpt_distributed_fp16.sh", "--shape_order=SBH")
    words = [*script, *tiny.split(), "--data-cache-path", str(tmp_path / "cache")]
    port = ReservedPort()
    variables = {
        "DATA_PATH": str(golden / "data" / "u16_text_document"),
        "CKPT_PATH": str(tmp_path / "checkpoint"),
        "VIRTUAL_NPU_CALLS": str(tmp_path),
        "MASTER_PORT": str(port),
    }
    done = on_virtual_npus("--", *words, **variables)
    assert done.returncode == 0, done.stdout
    assert "launch: device npu, 2 process(es), recipe fp16, window --pre 65536 --next 0 SBH" in done.stdout
    assert len(re.findall(r"iteration +[123]/ +3 .* lm loss: 6\.", done.stdout)) == 3, done.stdout
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "3"
    for rank in range(2):
        called = json.loads((tmp_path / f"calls_{rank}.json").read_text())
        assert {"npu_fusion_attention_grad", "npu_gelu_backward", "npu_apply_adam_w.out"} <= called.keys()


def test_ranks_check_what_takes_several() -> None:
    launcher = ("python", "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
    point = ("-m", "megatron_npu", "check", "--point", "matmul_reduce_scatter", "--dtype", "bfloat16")
    done = on_virtual_npus("--", *launcher, "--nproc-per-node", "2", *point)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^matmul_reduce_scatter .* bfloat16 .* ok$", done.stdout, re.MULTILINE)) == 2
    assert done.stdout.count("2 of 2 comparisons within their bounds") == 1, done.stdout
    alone = on_virtual_npus("--", "python", *point)
    assert alone.returncode == 2
    assert "compared by several ranks only (torchrun --nproc-per-node 2" in alone.stdout, alone.stdout


TINY = """
    --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 4095 --train-iters 1
    --lr 1e-3 --eval-iters 0 --num-workers 0
"""


def test_a_chip_without_bf16_says_so() -> None:
    words = ("--devices", "1", "--soc", "Ascend910A", "--", "python", "pretrain_gpt.py", *TINY.split())
    done = on_virtual_npus(*words, "--bf16")
    assert done.returncode == 1, done.stdout
    assert "error: --bf16: Ascend910A does not compute in bf16; use --fp16" in done.stdout


def test_a_run_says_what_is_replaced() -> None:
    words = ("--devices", "1", "--", "python", "pretrain_gpt.py", *TINY.split())
    done = on_virtual_npus(*words, "--disable-override", "rotary")
    assert done.returncode == 0, done.stdout
    assert "> device npu:0 (Ascend910B2), collectives by hccl" in done.stdout
    assert re.search(r"> replaced for this device: .*\bswiglu\b", done.stdout)
    assert "> replaceable, but switched off: rotary\n" in done.stdout


def test_replacements_are_checked() -> None:
    points = ("--point", "fused_attention", "--point", "swiglu", "--dtype", "float32")
    done = on_virtual_npus("--devices", "1", "--", "python", "-m", "megatron_npu", "check", *points)
    assert done.returncode == 0, done.stdout
    for point in ("fused_attention", "swiglu"):
        assert re.search(rf"^{point} .* ok$", done.stdout, re.MULTILINE), done.stdout
    count = len(re.findall(r" float32 .* ok$", done.stdout, re.MULTILINE))
    assert f"{count} of {count} comparisons within their bounds" in done.stdout


def test_a_950_checks_a_softmax() -> None:
    point = ("--point", "scaled_masked_softmax", "--dtype", "float16")
    chip = ("--devices", "1", "--soc", "Ascend950DT_9591")
    done = on_virtual_npus(*chip, "--", "python", "-m", "megatron_npu", "check", *point)
    assert done.returncode == 0 and "comparisons within their bounds" in done.stdout, done.stdout


def test_a_chip_without_a_type_has_nothing_to_check_in_it() -> None:
    check = ("python", "-m", "megatron_npu", "check", "--dtype", "bfloat16")
    done = on_virtual_npus("--devices", "1", "--soc", "Ascend910A", "--", *check)
    assert done.returncode == 2 and "nothing to compare, this chip has no bfloat16" in done.stdout, (
        done.stdout
    )


def test_torchrun_starts_without_a_warning() -> None:
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    done = on_virtual_npus("--", *launcher, "--no-python", "true")
    assert done.returncode == 0 and "RuntimeWarning" not in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_starts(chip: str) -> None:
    code = "import torch; print(torch.ones(3, device='npu').sum().item(), torch.npu.get_device_name())"
    done = on_virtual_npus("--soc", chip, "--", "python", "-c", code)
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["3.0", chip], done.stdout
