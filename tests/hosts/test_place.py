"""Where a host stands in its job, by what orchestrators say, and the port where it meets the others."""

import pytest

from naign.cluster.place import PORT, Place, find_place, find_port
from naign.errors import InputError

KUBERNETES = {"NAIGN_HOSTS": "4", "JOB_COMPLETION_INDEX": "3", "NAIGN_HEAD": "a-0.a", "NAIGN_START": "uid"}
SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_RESTART_COUNT": "3",
    "SLURM_STEP_ID": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "NAIGN_HEAD": "node3",
}
ALONE = Place(orchestrator="none")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ALONE),
        (
            KUBERNETES,
            Place(
                orchestrator="Kubernetes",
                index=3,
                hosts=4,
                least=4,
                head="a-0.a",
                start="uid",
            ),
        ),
        (
            KUBERNETES | {"NAIGN_HOSTS": "2:5"},
            Place(
                orchestrator="Kubernetes",
                index=3,
                hosts=5,
                least=2,
                head="a-0.a",
                start="uid",
            ),
        ),
        (
            SLURM,
            Place(
                orchestrator="Slurm",
                index=1,
                hosts=2,
                head="node3",
                start="7.3.1",
                processes=8,
            ),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}, ALONE),  # no srun
    ],
)
def test_the_place_is_what_the_orchestrator_says(environ, expected):
    assert find_place(environ) == expected


@pytest.mark.parametrize(
    ("environ", "changed", "said"),
    [
        (KUBERNETES, {"NAIGN_HEAD": ""}, "NAIGN_HEAD is not set"),
        (KUBERNETES, {"NAIGN_HOSTS": "3"}, "host 3 of 3, counted from 0"),
        (KUBERNETES, {"NAIGN_HOSTS": "4:2"}, "NAIGN_HOSTS is 4:2: give a number of hosts, or the least, 2 or more"),
        (KUBERNETES, {"NAIGN_HOSTS": "1:4"}, "NAIGN_HOSTS is 1:4: give a number"),
        (KUBERNETES, {"NAIGN_HOSTS": ":4"}, "NAIGN_HOSTS is '': it must be a number"),
        (KUBERNETES, {"NAIGN_HOSTS": "9" * 5000}, "from 0 to 99999"),
        (KUBERNETES, {"NAIGN_HEAD": "a..b"}, "'a..b' is not a name of a host"),
        ({"JOB_COMPLETION_INDEX": "1"}, {}, "NAIGN_HOSTS is not set"),
        (SLURM, {"SLURM_NTASKS": "16"}, "one a node is wanted"),
        ({"SLURM_PROCID": "0", "SLURM_NNODES": "2"}, {}, "this job has 2 nodes: start training with srun"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(environ, changed, said):
    with pytest.raises(InputError, match=said):
        find_place(environ | changed)


def test_jobs_that_share_a_node_have_ports_of_their_own():
    assert find_port({}) == PORT
    assert find_port({"SLURM_JOB_ID": "7" * 5000}) != PORT
    ports = {find_port({"SLURM_JOB_ID": str(job)}) for job in range(123_456, 123_456 + 12_000)}
    assert len(ports) == 12_000 and min(ports) >= 1024 and max(ports) < 32_768
