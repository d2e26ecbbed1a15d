"""The launch scripts of tests_gpt, with a stand-in for Python that writes down what it is asked to run."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import pretrain_gpt

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["pretrain_gpt_distributed", "pretrain_gpt_distributed_fp16", "pretrain_gpt_distributed_bf16"]
CLEARED = ("MEGATRON_", "ASCEND_", "NPROC", "GPUS_", "NNODES", "NODE_RANK", "MASTER_", "HCCL_", "CKPT_PATH")

# Answers the launcher's questions from $FAKE_*, and records every call, one word a line, calls apart by "--".
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" -- >>"$FAKE_LOG"
case "$1 $2" in
    "- "*) cat >/dev/null ;;
    "-c "*) echo "$FAKE_DEVICE" ;;
    "-m megatron_npu.versions") exit "${FAKE_NPU_STATUS:-0}" ;;
    "-m megatron.training.default_data")
        echo "DATA_PATH='/data with blank/corpus'"; echo VOCAB_FILE=/v.json; echo MERGE_FILE=/m.txt ;;
    *pretrain_gpt.py*)
        echo "CANN_MARK=$CANN_MARK HCCL=$HCCL_CONNECT_TIMEOUT"; exit "${FAKE_STATUS:-0}" ;;
    *generate.py*) echo "SAMPLED" ;;
esac
"""


@dataclass
class Outcome:
    status: int
    output: str
    calls: list[list[str]]

    @property
    def trainer(self) -> list[str]:
        """Words of the call that trains."""
        (call,) = [call for call in self.calls if any(word.endswith("pretrain_gpt.py") for word in call)]
        return call

    def value(self, flag: str) -> str:
        """The value that argparse takes: the last one."""
        words = self.trainer
        return words[len(words) - 1 - words[::-1].index(flag) + 1]


@pytest.fixture
def launch(tmp_path: Path):
    """Run ``tests_gpt/NAME.sh`` with the stand-in for Python, from a directory that is not the checkout."""
    fake = tmp_path / "bin with blank" / "fake python"
    fake.parent.mkdir()
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def run(script: str, *words: str, cwd: Path | None = None, **env: str) -> Outcome:
        log = tmp_path / "calls"
        log.unlink(missing_ok=True)
        base = {k: v for k, v in os.environ.items() if not k.startswith(CLEARED)}
        for name in ("DATA_PATH", "VOCAB_FILE", "MERGE_FILE", "PYTHONPATH"):
            base.pop(name, None)
        base |= {"PYTHON": str(fake), "FAKE_LOG": str(log), "MEGATRON_DEVICE": "cpu", "HOME": str(tmp_path)}
        result = subprocess.run(
            ["bash", str(ROOT / "tests_gpt" / f"{script}.sh"), *words],
            env=base | env,
            cwd=cwd or tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        calls = log.read_text().split("--\n")[:-1] if log.exists() else []
        return Outcome(result.returncode, result.stdout, [call.splitlines() for call in calls])

    return run


FP16 = SCRIPTS[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults(launch, script: str) -> None:
    run = launch(script)
    assert run.status == 0, run.output
    window = [run.value(flag) for flag in ("--pre-tockens", "--next-tockens", "--shape-order")]
    assert window == ["65536", "0", "SBH"]
    assert ("--bf16" in run.trainer) == script.endswith("bf16")
    assert ("--fp16" in run.trainer) != script.endswith("bf16")
    assert run.trainer[0] == str(ROOT / "pretrain_gpt.py")


@pytest.mark.parametrize(
    "words",
    [
        "--pre=2048 --next=7 --shape_order=BSH",
        "--pre 2048 --next 7 --shape_order BSH",
        "--pre-tockens=2048 --next-tockens=7 --shape-order=BSH",
        "--pre-tockens 2048 --next-tockens 7 --shape-order BSH",
        "--pre_tockens=2048 --next_tockens 7 --shape BSH",
        "--shape=BSH --next=9 --pre 2048 --next=7",
    ],
)
def test_every_spelling_of_the_three_options(launch, words: str) -> None:
    run = launch(FP16, *words.split())
    assert run.status == 0, run.output
    window = [run.value(flag) for flag in ("--pre-tockens", "--next-tockens", "--shape-order")]
    assert window == ["2048", "7", "BSH"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--pre", "--pre needs a value"),
        ("--next=", "--next needs a value"),
        ("--pre --next 0", "--pre needs a value"),
        ("--pre=many", "a number of tokens is needed"),
        ("--shape_order=BNSD2", "SBH or BSH is needed"),
    ],
)
def test_a_bad_option_stops_before_anything_is_run(launch, words: str, said: str) -> None:
    run = launch(FP16, *words.split())
    assert run.status == 2
    assert said in run.output
    assert run.calls == []


def test_other_flags_are_passed_on_and_win(launch) -> None:
    run = launch(FP16, "--train-iters", "7", "--pretrained=x", "--next=3", "--note", "two  words", "*")
    assert run.value("--train-iters") == "7"
    assert run.trainer[-5:] == ["7", "--pretrained=x", "--note", "two  words", "*"]
    assert run.value("--next-tockens") == "3"


def test_any_directory_and_a_link_to_the_script(launch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    link = elsewhere / "train.sh"
    link.symlink_to(ROOT / "tests_gpt" / f"{FP16}.sh")
    run = launch(os.path.relpath(link.with_suffix(""), ROOT / "tests_gpt"), cwd=elsewhere)
    assert run.status == 0, run.output
    assert run.trainer[0] == str(ROOT / "pretrain_gpt.py")


@pytest.mark.parametrize("data", [{}, {"DATA_PATH": "d", "VOCAB_FILE": "v"}])
def test_the_exit_status_is_the_trainers(launch, data: dict) -> None:
    run = launch(FP16, FAKE_STATUS="37", **data)
    assert run.status == 37
    assert "SAMPLED" not in run.output


def test_default_data_ends_with_a_sample_and_starts_afresh(launch, tmp_path: Path) -> None:
    (tmp_path / "ck pt").mkdir()
    (tmp_path / "ck pt" / "latest_checkpointed_iteration.txt").write_text("12")
    run = launch(FP16, "--save", "never", f"--save={tmp_path / 'ck pt'}")
    assert run.value("--data-path") == "/data with blank/corpus"
    assert run.value("--vocab-file") == "/v.json"
    assert "--load" not in run.trainer
    sampler = run.calls[-1]
    assert sampler[1:] == ["--prompt", "def ", "--load", str(tmp_path / "ck pt")]
    assert "SAMPLED" in run.output
    # What is shown can be pasted into a shell in any directory.
    (shown,) = re.findall(r"launch: sample: (.*)", run.output)
    interpreter, *words = shlex.split(shown)
    assert words == sampler
    assert Path(interpreter).is_absolute() and Path(sampler[0]).is_absolute()
    assert "iteration 12" in run.output


def test_own_data_is_used_as_given_and_resumes(launch) -> None:
    run = launch(FP16, DATA_PATH="0.3 /a 0.7 /b", VOCAB_FILE="v", MERGE_FILE="m", CKPT_PATH="/c k")
    assert "--data-path 0.3 /a 0.7 /b --vocab-file v --merge-file m" in " ".join(run.trainer)
    assert run.value("--save") == run.value("--load") == "/c k"
    assert not any("default_data" in word for call in run.calls for word in call)


@pytest.mark.parametrize("flag", ["--data-path", "--mock-data", "--train-data-path=x"])
def test_a_data_flag_is_enough_to_leave_the_default_data_alone(launch, flag: str) -> None:
    run = launch(FP16, flag, "/own")
    assert run.status == 0, run.output
    assert not any("default_data" in word for call in run.calls for word in call)
    assert "/data with blank/corpus" not in run.trainer


def test_several_processes_go_through_torchrun(launch) -> None:
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "7001"}
    run = launch(FP16, GPUS_PER_NODE="4", **env)
    assert run.trainer[:2] == ["-m", "torch.distributed.run"]
    expected = "--nproc-per-node 4 --nnodes 2 --node-rank 1 --master-addr host --master-port 7001"
    assert expected in " ".join(run.trainer)
    assert launch(FP16, NPROC_PER_NODE="two").status == 2


def test_every_device_gets_a_process_and_a_part_of_each_layer(launch) -> None:
    run = launch(FP16, MEGATRON_DEVICE="cuda", FAKE_DEVICE="cuda 8", DATA_PATH="d")
    assert "--nproc-per-node 8 --nnodes 1" in " ".join(run.trainer)
    assert run.value("--tensor-model-parallel-size") == "8" and "--global-batch-size" not in run.trainer
    assert "set CUDA_DEVICE_MAX_CONNECTIONS=1" in run.output
    six = launch(FP16, MEGATRON_DEVICE="cuda", FAKE_DEVICE="cuda 6", DATA_PATH="d")
    assert six.value("--tensor-model-parallel-size") == "2"
    fewer = launch(FP16, MEGATRON_DEVICE="cuda", FAKE_DEVICE="cuda 8", DATA_PATH="d", NPROC_PER_NODE="1")
    assert fewer.trainer[0] == str(ROOT / "pretrain_gpt.py")


def test_an_accelerator_gets_the_published_model(launch) -> None:
    run = launch(FP16, MEGATRON_DEVICE="cuda", FAKE_DEVICE="cuda 1", DATA_PATH="d")
    shape = {
        "--num-layers": "8",
        "--hidden-size": "5120",
        "--num-attention-heads": "40",
        "--seq-length": "8192",
        "--lr": "0.375e-5",
        "--train-iters": "500000",
    }
    assert {flag: run.value(flag) for flag in shape} == shape
    first_try = launch(FP16, MEGATRON_DEVICE="cuda", FAKE_DEVICE="cuda 1")
    assert first_try.value("--hidden-size") == "5120"
    assert first_try.value("--train-iters") == "200"
    assert run.trainer[0] == str(ROOT / "pretrain_gpt.py")


def test_the_size_of_the_model_can_be_asked_for(launch) -> None:
    accelerator = {"MEGATRON_DEVICE": "npu", "FAKE_DEVICE": "npu 2", "DATA_PATH": "d"}
    assert launch(FP16, MEGATRON_RECIPE_SIZE="small", **accelerator).value("--hidden-size") == "256"
    assert launch(FP16, MEGATRON_RECIPE_SIZE="published").value("--hidden-size") == "5120"
    wrong = launch(FP16, MEGATRON_RECIPE_SIZE="tiny")
    assert wrong.status == 2 and "MEGATRON_RECIPE_SIZE=tiny: small or published" in wrong.output


# A sequence of 32, so that a window of 8 is smaller than it and 2048 is not.
TINY = shlex.split("""
    --num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 2 --train-iters 3 --lr-decay-iters 3 --lr-warmup-fraction 0
    --log-interval 1 --eval-iters 0 --tokenizer-type NullTokenizer --vocab-size 500 --num-workers 0
    --split 1,0,0 --data-cache-path index --initial-loss-scale 65536
""")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_windows_and_layouts_train(launch, golden: Path, tmp_path: Path, precision: str) -> None:
    """What the script would start is started, with a tiny model.

    All windows that span the sequence give the losses of one another, whatever the layout; a smaller one
    does not.
    """
    data = {"DATA_PATH": str(golden / "data" / "u16_text_document"), "CKPT_PATH": str(tmp_path / "ck")}
    losses = {}
    for window in ("--pre 65536 --next 65536", "--pre=2048 --next=0", "--pre 8 --next 0"):
        for layout in ("SBH", "BSH"):
            words = [*window.split(), "--shape_order", layout, *TINY]
            script = launch(f"pretrain_gpt_distributed_{precision}", *words, **data)
            argv = script.trainer[1:]
            for flag in ("--save", "--load"):
                del argv[argv.index(flag) : argv.index(flag) + 2]
            run = pretrain_gpt(argv, tmp_path).check()
            losses[window, layout] = run.losses
    reference = losses.pop(("--pre 65536 --next 65536", "SBH"))
    assert sorted(reference) == [1, 2, 3]
    for (window, layout), found in losses.items():
        same = found == pytest.approx(reference, abs=1e-5)
        assert same == ("--pre 8 " not in window), (window, layout, found, reference)
    assert losses["--pre 8 --next 0", "SBH"] == pytest.approx(losses["--pre 8 --next 0", "BSH"], abs=1e-5)


def test_the_plain_script_trains_with_full_recomputation(launch, golden: Path, tmp_path: Path) -> None:
    data = {"DATA_PATH": str(golden / "data" / "u16_text_document"), "CKPT_PATH": str(tmp_path / "ck")}
    script = launch(SCRIPTS[0], *TINY, **data)
    run = pretrain_gpt(script.trainer[1:], tmp_path).check()
    assert len(run.losses) == 3
    assert (tmp_path / "ck" / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.fixture
def cann(tmp_path: Path) -> Path:
    """A tree like CANN's, whose set_env.sh ends with a failing test and uses an unset variable."""
    root = tmp_path / "As cend" / "ascend-toolkit"
    (root / "latest").mkdir(parents=True)
    (root / "set_env.sh").write_text('export CANN_MARK="found$UNSET"\n[ -n "$UNSET" ]\n')
    return root


@pytest.mark.parametrize("how", ["home", "toolkit", "info", "root", "explicit"])
def test_cann_is_found(launch, cann: Path, tmp_path: Path, how: str) -> None:
    info = tmp_path / "info"
    info.write_text(f"Version=1\nInstall_Path={cann.parent}\n")
    env = {
        "home": {"ASCEND_HOME_PATH": str(cann / "latest")},
        "toolkit": {"ASCEND_TOOLKIT_HOME": str(cann / "latest")},
        "info": {"ASCEND_INSTALL_INFO": str(info)},
        "root": {"ASCEND_ROOT": str(cann.parent)},
        "explicit": {"CANN_SET_ENV": str(cann / "set_env.sh"), "HCCL_CONNECT_TIMEOUT": "99"},
    }[how]
    base = {"ASCEND_INSTALL_INFO": str(tmp_path / "none"), "ASCEND_ROOT": str(tmp_path / "none")}
    run = launch(FP16, MEGATRON_DEVICE="npu", FAKE_DEVICE="npu 1", **(base | env))
    assert run.status == 0, run.output
    timeout = env.get("HCCL_CONNECT_TIMEOUT", "1200")
    assert f"CANN_MARK=found HCCL={timeout}" in run.output
    assert f"CANN: {cann}" in run.output


def test_an_npu_whose_software_does_not_work_ends_the_launch_before_torch(launch) -> None:
    run = launch(FP16, MEGATRON_DEVICE="npu", FAKE_NPU_STATUS="1", ASCEND_ROOT="none")
    assert run.status == 2
    assert "error: MEGATRON_DEVICE=cpu trains without the NPU" in run.output
    assert run.calls[-1] == ["-m", "megatron_npu.versions"]


def test_cann_is_not_read_twice_and_not_read_on_a_cpu(launch, cann: Path) -> None:
    ready = {"ASCEND_HOME_PATH": str(cann), "LD_LIBRARY_PATH": f"{cann}/lib64"}
    run = launch(FP16, MEGATRON_DEVICE="npu", FAKE_DEVICE="npu 1", **ready)
    assert "already in the environment" in run.output
    assert "CANN_MARK= " in run.output
    assert "CANN_MARK= HCCL=\n" in launch(FP16, ASCEND_HOME_PATH=str(cann)).output


@pytest.mark.parametrize(
    ("device_file", "device"),
    [(None, "cpu"), ("davinci0", "npu"), ("nvidia0", "cuda")],
)
def test_the_device_is_found(launch, tmp_path: Path, device_file: str | None, device: str) -> None:
    """Torch is asked only when there is a device file."""
    dev = tmp_path / "dev"
    dev.mkdir()
    if device_file:
        (dev / device_file).touch()
    no_cann = dict.fromkeys(("ASCEND_INSTALL_INFO", "ASCEND_ROOT"), str(tmp_path / "none"))
    run = launch(FP16, MEGATRON_DEVICE="", DEV_DIR=str(dev), FAKE_DEVICE=f"{device} 1", **no_cann)
    assert f"device {device}" in run.output
    assert any(call[0] == "-c" for call in run.calls) == bool(device_file)
    assert ("no set_env.sh found" in run.output) == (device_file == "davinci0")


def test_help_and_missing_packages(launch, tmp_path: Path) -> None:
    shown = launch(FP16, "--help")
    assert shown.status == 0
    assert "NPROC_PER_NODE" in shown.output
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S "$@"\n')
    bare.chmod(0o755)
    run = launch(FP16, PYTHON=str(bare))
    assert run.status == 2
    assert "has no torch, numpy, tokenizers" in run.output
    assert "pip install -e ." in run.output


def test_every_script_parses() -> None:
    scripts = [
        *ROOT.glob("*/*.sh"),
        *ROOT.glob("examples/**/*.sh"),
        ROOT / ".ci" / "run",
        ROOT / ".ci" / "interpreters",
    ]
    assert len(scripts) >= 6
    for script in scripts:
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
