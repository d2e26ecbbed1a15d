"""The launch scripts of examples/launch train as written; only sizes and paths come from the environment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reserved_port import ReservedPort

SIZES = {
    "NUM_LAYERS": "4",
    "HIDDEN_SIZE": "32",
    "NUM_HEADS": "4",
    "SEQ_LENGTH": "32",
    "MICRO_BATCH": "2",
    "GLOBAL_BATCH": "8",
    "TRAIN_ITERS": "3",
    "EVAL_ITERS": "0",
    "LOG_INTERVAL": "1",
    "SAVE_INTERVAL": "2",
    "VOCAB_SIZE": "500",
}
LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)")
# For what hangs; a loaded machine needs several times what an idle one does.
TIMEOUT_S = 900


@pytest.fixture
def start(repo_root: Path, golden: Path, tmp_path: Path):
    """``start("name.sh", words, VARIABLE=...)``: a started script, in the test's directory."""
    running = []

    def run(script: str, *words: str, **env: str) -> subprocess.Popen:
        base = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        paths = {
            "DATA_PATH": str(golden / "data" / "u16_text_document"),
            "CACHE_PATH": str(tmp_path / "cache"),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "MEGATRON_DEVICE": "cpu",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }
        process = subprocess.Popen(
            ["bash", str(repo_root / "examples" / "launch" / script), "--num-workers", "0", *words],
            cwd=tmp_path,
            env={**base, **paths, **SIZES, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            process.wait()


def losses_of(process: subprocess.Popen) -> dict[int, float]:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return {int(step): float(loss) for step, loss in LOSS.findall(output)}


def test_data_parallel_on_one_node(start, tmp_path: Path):
    saving = {"CKPT_PATH": str(tmp_path / "ckpt"), "NPROC_PER_NODE": "2"}
    losses = losses_of(start("data_parallel_one_node.sh", **saving))
    assert sorted(losses) == [1, 2, 3] and losses[1] == pytest.approx(6.2, abs=0.3)
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.slow
def test_tensor_and_pipeline_parallel_with_one_layer_a_virtual_stage_in_fp16(start):
    # From the default of 2^32 the first steps would only lower the loss scale; they have no loss to print.
    scale = ("--initial-loss-scale", "4096")
    losses = losses_of(start("tensor_pipeline_one_node.sh", *scale, NPROC_PER_NODE="4", TRAIN_ITERS="6"))
    assert len(losses) == 6 and all(5.8 < loss < 6.6 for loss in losses.values())


@pytest.mark.slow
def test_two_nodes(start, tmp_path: Path):
    port = ReservedPort()
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = (start("torchrun_many_nodes.sh", NODE_RANK=str(rank), TP="2", **nodes) for rank in (0, 1))
    losses = {**losses_of(first), **losses_of(second)}
    assert sorted(losses) == [1, 2, 3]


@pytest.mark.slow
def test_slurm(repo_root: Path, golden: Path, tmp_path: Path):
    """A stand-in for srun starts the tasks with the variables that srun gives them."""
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/usr/bin/env bash\nshift\nfor task in 0 1; do\n"
        "    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 \\\n"
        '        SLURM_STEP_NODELIST=localhost "$@" &\n    tasks+=($!)\ndone\n'
        'for task in "${tasks[@]}"; do wait "$task" || exit; done\n'
    )
    srun.chmod(0o755)
    environment = {
        **os.environ,
        **SIZES,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(repo_root),
        "SLURM_JOB_ID": str(os.getpid()),
        "DATA_PATH": str(golden / "data" / "u16_text_document"),
        "CACHE_PATH": str(tmp_path / "cache"),
        "PYTHON": sys.executable,
        "MEGATRON_DEVICE": "cpu",
        "TP": "2",
    }
    process = subprocess.run(
        ["bash", str(repo_root / "examples" / "launch" / "slurm.sbatch")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(LOSS.findall(process.stdout)) == 3


def test_the_kubernetes_manifest_starts_what_is_there(repo_root: Path):
    import yaml

    text = (repo_root / "examples" / "launch" / "kubernetes_pytorchjob.yaml").read_text()
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        script = re.search(r"bash (\S+\.sh)", container["args"][0]).group(1)
        assert (repo_root / script).is_file()
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}


def test_no_launch_script_is_forgotten(repo_root: Path):
    tested = Path(__file__).read_text()
    for path in (repo_root / "examples" / "launch").iterdir():
        assert path.name in tested or path.name == "model.sh", f"give {path.name} a test here"
    for path in (repo_root / "examples" / "launch").glob("*.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_data_is_asked_for(start):
    process = start("data_parallel_one_node.sh", DATA_PATH="")
    assert process.communicate()[0].startswith("DATA_PATH is not set") and process.returncode == 2
