"""Ranks of srun and mpirun are understood; torchrun's words win."""

import pytest

from megatron.core.errors import ConfigError
from megatron.training.processes.launcher import check_network, set_rank_variables

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "1234567",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def variables_set(**environment: str) -> dict[str, str]:
    before = dict(environment)
    set_rank_variables(environment)
    return {key: value for key, value in environment.items() if key not in before}


def test_variables_follow_from_srun():
    assert variables_set(**SRUN) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "24567",
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1,a2", "a1"), ("gpu[3,9-12],b", "gpu3"), ("rack1-n[01-02]-ib,x", "rack1-n01-ib"), ("solo", "solo")],
)
def test_master_address_is_the_first_node_of_the_list(nodes, first):
    assert variables_set(**(SRUN | {"SLURM_STEP_NODELIST": nodes}))["MASTER_ADDR"] == first


def test_variables_follow_from_mpirun_on_one_machine():
    found = variables_set(**MPIRUN)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    assert found["MASTER_ADDR"] == "localhost"


def test_mpirun_on_several_machines_needs_an_address():
    several = MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"}
    assert "MASTER_ADDR" not in variables_set(**several)
    assert variables_set(MASTER_ADDR="head", **several)["RANK"] == "1"


def test_variables_of_torchrun_and_single_tasks_are_not_changed():
    assert variables_set(RANK="0", WORLD_SIZE="2", **SRUN) == {}
    assert variables_set(**(SRUN | {"SLURM_STEP_NUM_TASKS": "1"})) == {}
    # The script of a batch job has a task number, but is no step.
    assert variables_set(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_JOB_ID="1") == {}


@pytest.mark.parametrize(
    ("name", "word", "said"),
    [
        (
            "MASTER_ADDR",
            "no-such-host.invalid",
            "MASTER_ADDR=no-such-host.invalid: .* no machine of that name",
        ),
        (
            "GLOO_SOCKET_IFNAME",
            "lo,eth77",
            "GLOO_SOCKET_IFNAME=lo,eth77: .* no network interface eth77; use one",
        ),
    ],
)
def test_hosts_and_interfaces_that_do_not_exist_are_named(monkeypatch, name, word, said) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    check_network()
    monkeypatch.setenv(name, word)
    with pytest.raises(ConfigError, match=said):
        check_network()
