"""Multipliers of two processes (gloo) that share the samples, against one process that has them all."""

import datetime
import json
import subprocess
import sys

import pytest
import torch

from medconstraints.formulations import AugmentedLagrangian, Lagrangian, ReLULagrangian

MAKERS = {
    "Lagrangian": lambda: Lagrangian(5, learning_rate=0.1),
    "ReLULagrangian": lambda: ReLULagrangian(learning_rate=0.1),
    "AugmentedLagrangian": lambda: AugmentedLagrangian(5, penalty=0.1),
}
RESIDUALS = torch.tensor([[2.0, -1.0], [0.5, 3.0], [-2.0, 1.0], [1.0, 1.0], [4.0, -0.5]])
# Of each process, the samples of each epoch. A sampler repeats sample 0 so that both have three.
PADDED = [[[0, 2, 4], [4, 0, 2]], [[1, 3, 0], [0, 3, 1]]]
ONE_IDLE = [[[0, 1, 2, 3, 4], [0, 1, 2]], [[], [3, 4]]]  # without a batch in the first epoch
PLANS = {"padded": PADDED, "one without a batch": ONE_IDLE}


def multipliers(make, epochs):
    """After training on these samples, two epochs in batches of two."""
    formulation = make()
    for samples in epochs:
        for start in range(0, len(samples), 2):
            index = torch.tensor(samples[start : start + 2])
            formulation(RESIDUALS[index], index)
        formulation.step()
    return formulation.multipliers


def run_process(rank, file):
    """All formulations and plans in one of the two processes."""
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{file}", limit, world_size=2, rank=rank)
    found = {
        f"{name}, {plan}": multipliers(make, shares[rank]).tolist()
        for name, make in MAKERS.items()
        for plan, shares in PLANS.items()
    }
    sys.stdout.write(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process ended with."""
    file = tmp_path_factory.mktemp("gloo") / "store"
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(file)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(output) for output in outputs]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MAKERS)
def test_two_processes_are_as_one(name, plan, found):
    shares = PLANS[plan]
    joint = [sorted({*first, *second}) for first, second in zip(*shares, strict=True)]
    expected = multipliers(MAKERS[name], joint)
    for own in found:
        torch.testing.assert_close(torch.tensor(own[f"{name}, {plan}"]), expected, rtol=1e-5, atol=1e-5)
    assert expected.any()


if __name__ == "__main__":
    run_process(int(sys.argv[1]), sys.argv[2])
