"""Training scripts of others, written against Megatron-LM, run unchanged with this project on the path."""

import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "outside_scripts"
VOCABULARY = 8192  # padded already, for one rank and for two
WORDS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --eval-iters 1 --log-interval 1 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 8191 --transformer-impl local "
    "--attention-dropout 0 --hidden-dropout 0 --no-save-optim"
)
LOSS = re.compile(r"iteration +\d+/ +2 .*?lm loss: ([0-9.E+-]+)")


def run(script: Path, words: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_"))}
    # Torchrun leaves a directory of logs in TMPDIR.
    env |= {"PYTHONPATH": str(ROOT), "MEGATRON_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd)}
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    return subprocess.run(
        [*command, str(script), *WORDS.split(), *words.split()],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


def losses(done: subprocess.CompletedProcess) -> list[float]:
    assert done.returncode == 0, done.stdout
    return [float(word) for word in LOSS.findall(done.stdout)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two steps on one rank."""
    return losses(run(SCRIPTS / "gpt_of_core_0_12.py", "", tmp_path_factory.mktemp("plain")))


def test_a_gpt_script_trains(plain: list[float]) -> None:
    assert len(plain) == 2
    # Small initial weights give nearly equal probabilities to all words.
    assert plain[0] == pytest.approx(math.log(VOCABULARY), abs=0.05)


def test_the_same_script_trains_on_two_ranks(plain: list[float], tmp_path: Path) -> None:
    words = "--tensor-model-parallel-size 2 --sequence-parallel --transformer-impl transformer_engine"
    split = losses(run(SCRIPTS / "gpt_of_core_0_12.py", words, tmp_path, ranks=2))
    assert split == pytest.approx(plain, rel=3e-5)


def test_a_script_with_mindspeeds_line_trains(plain: list[float], tmp_path: Path) -> None:
    text = (SCRIPTS / "gpt_of_core_0_12.py").read_text()
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(text.replace("import torch\n", "import torch\nimport mindspeed.megatron_adaptor\n", 1))
    done = run(script, "", tmp_path)
    assert losses(done) == plain
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("mindspeed.megatron_adaptor:")]
    assert line.endswith("nothing is replaced, MEGATRON_DEVICE=cpu")


def test_a_bert_script_imports_and_names_what_is_missing(tmp_path: Path) -> None:
    done = run(SCRIPTS / "bert_of_core_0_12.py", "", tmp_path)
    assert done.returncode != 0
    assert "all names are there" in done.stdout
    last = done.stdout.rstrip().splitlines()[-1]
    assert "megatron.core.models.bert.bert_model.BertModel (the BERT model) is not built yet." in last
