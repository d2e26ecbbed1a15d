"""Two hosts that share no file train together, save, and go on from what each finds on its own disk."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--fork", "--kill-child"]
LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)")
TIMEOUT_S = 900

# What runs on each host: train up to iteration 4, then again from the checkpoint up to iteration 6.
COMMAND = """
set -e
export DATA_PATH=$DISK/data/u16_text_document CACHE_PATH=$DISK/cache CKPT_PATH=$DISK/ckpt
bash $LAUNCH --exit-interval 4 {flags}
echo == resume
bash $LAUNCH {flags}
"""
SIZES = {
    "NUM_LAYERS": "2",
    "HIDDEN_SIZE": "32",
    "NUM_HEADS": "4",
    "SEQ_LENGTH": "32",
    "MICRO_BATCH": "2",
    "GLOBAL_BATCH": "8",
    "TRAIN_ITERS": "6",
    "EVAL_ITERS": "0",
    "LOG_INTERVAL": "1",
    "SAVE_INTERVAL": "4",
    "VOCAB_SIZE": "500",
    "NNODES": "2",
    "NPROC_PER_NODE": "1",
    "MASTER_PORT": "6000",
}


def why_not() -> str | None:
    """Why two hosts cannot be made here, or None."""
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    attempt = (
        "ip link add veth0 type veth peer name veth1 && mount -t tmpfs tmpfs /mnt && unshare -n -m -u true"
    )
    outcome = subprocess.run([*NAMESPACES, "bash", "-c", attempt], capture_output=True, text=True)
    return f"namespaces are not permitted: {outcome.stderr.strip()}" if outcome.returncode else None


@pytest.fixture
def hosts(repo_root: Path, golden: Path, tmp_path: Path):
    """``hosts(flags, script)``: exit status, output of both hosts, and the files on their disks."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    for name in ("logs", "disk", "source"):
        (tmp_path / name).mkdir()
    for suffix in ("bin", "idx"):
        shutil.copy(golden / "data" / f"u16_text_document.{suffix}", tmp_path / "source")
    environment = {
        **os.environ,
        **SIZES,
        "DISK": str(tmp_path / "disk"),
        "LAUNCH": str(repo_root / "examples" / "launch" / "torchrun_many_nodes.sh"),
        "PYTHON": sys.executable,
        "MEGATRON_DEVICE": "cpu",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
    }

    def run(script: str) -> tuple[int, list[str], list[list[str]]]:
        words = [tmp_path / "logs", tmp_path / "disk", tmp_path / "source", "bash", "-c", script]
        process = subprocess.Popen(
            [*NAMESPACES, str(HERE / "two_hosts.sh"), *map(str, words)], env=environment, cwd=tmp_path
        )
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            process.kill()
        logs = [(tmp_path / "logs" / f"host{host}.log").read_text() for host in (0, 1)]
        files = [(tmp_path / "logs" / f"host{host}.files").read_text().splitlines() for host in (0, 1)]
        return status, logs, files

    return run


def losses_of(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in LOSS.findall(output)}


@pytest.mark.parametrize(
    ("tensor_parallel", "readers", "ranks"),
    [
        pytest.param(1, (0, 1), ("00", "00"), id="data parallel"),
        pytest.param(2, (0,), ("00", "01"), id="tensor parallel", marks=pytest.mark.slow),
    ],
)
def test_two_hosts_train_save_and_resume(
    tensor_parallel: int, readers, ranks, hosts, repo_root: Path, tmp_path: Path
):
    """``readers`` are the hosts that read data; ``ranks`` the model-parallel ranks in file names, by host."""
    layout = f"--tensor-model-parallel-size {tensor_parallel}"
    status, logs, files = hosts(COMMAND.format(flags=f"{layout} --num-workers 0"))
    assert status == 0, "\n".join(logs)
    assert not any((tmp_path / "disk").iterdir()), "the disks are not shared, not even with this test"
    parts = [losses for part in "".join(logs).split("== resume") if (losses := losses_of(part))]
    assert [sorted(losses) for losses in parts] == [[1, 2, 3, 4], [5, 6]], "\n".join(logs)
    for host, (rank, found) in enumerate(zip(ranks, files, strict=True)):
        has_index = any(path.startswith("./cache/") and path.endswith("description.txt") for path in found)
        assert has_index == (host in readers)
        assert "./ckpt/latest_checkpointed_iteration.txt" in found
        assert f"./ckpt/iter_0000006/mp_rank_{rank}/model_optim_rng.pt" in found

    whole = subprocess.run(
        [sys.executable, str(repo_root / "pretrain_gpt.py"), *alone(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "MEGATRON_DEVICE": "cpu", "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert whole.returncode == 0, whole.stderr
    expected = losses_of(whole.stdout)
    assert {**parts[0], **parts[1]} == pytest.approx(expected, rel=5e-3)  # bf16


def alone(tmp_path: Path) -> list[str]:
    """The same run in one process, without stopping."""
    words = f"""
        --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
        --micro-batch-size 2 --global-batch-size 8 --train-iters 6 --lr 1.5e-4 --min-lr 1.0e-5
        --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.01 --clip-grad 1.0
        --adam-beta2 0.95 --init-method-std 0.006 --split 949,50,1 --log-interval 1 --eval-iters 0
        --data-path {tmp_path}/source/u16_text_document --data-cache-path {tmp_path}/cache_alone
        --tokenizer-type NullTokenizer --vocab-size 500 --bf16 --num-workers 0
    """
    return words.split()


def test_unequal_copies_of_the_data_stop_both_hosts(hosts):
    script = """
        export DATA_PATH=$DISK/data/u16_text_document CACHE_PATH=$DISK/cache
        if [[ $NODE_RANK == 1 ]]; then truncate -s -8 $DATA_PATH.bin; fi
        bash $LAUNCH --num-workers 0
    """
    status, logs, _ = hosts(script)
    assert status != 0
    told = [line for line in "".join(logs).splitlines() if "copies of a data set differ" in line]
    # By the rank, and at the end of what torchrun prints on its host.
    assert [line.startswith("[rank ") for line in told] == [True, False], "\n".join(logs)
    assert re.search(
        r"host0:\S+u16_text_document \(rank 0\): .* host1:\S+u16_text_document \(rank 1\)", told[0]
    )
