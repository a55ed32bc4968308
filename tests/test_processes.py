"""One process and two compute the same: started through accelerate, sets that two does not divide.

``python -m benchmarks scale`` writes down what is seen.
"""

import os
import subprocess
import tempfile

import pytest
import torch
from launching import command_for

pytestmark = pytest.mark.distributed


def launched(path, processes, batch, accumulation=1, seed=0, prior="calibrated", *more):
    """What tests/two_processes.py wrote."""
    command, environment = command_for("two_processes.py", processes, path, batch, accumulation, seed, prior, *more)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(path, weights_only=True)
    assert found.pop("world") == processes
    return found


def differences(first, second):
    """Largest difference of each entry, relative where the values are larger than 1."""

    def flat(value):
        return torch.cat([t.double().flatten() for t in value.values()]) if isinstance(value, dict) else value.double()

    given = [k for k, value in first.items() if value is not None and not (isinstance(value, dict) and not value)]
    pairs = {k: (flat(first[k]), flat(second[k])) for k in given}
    return {k: ((a - b).abs() / (1 + b.abs())).max().item() for k, (a, b) in pairs.items()}


@pytest.mark.parametrize("prior", ["calibrated", "influence"])  # `compared` has saliency too
def test_two_processes_compute_what_one_does(tmp_path, prior):
    one = launched(tmp_path / "one.pt", 1, 8, prior=prior)
    two = launched(tmp_path / "two.pt", 2, 4, prior=prior)
    seen = differences(one, two)
    # Conjugate gradients and Adam's first steps carry rounding further under `influence`
    assert max(seen.values()) < (5e-4 if prior == "influence" else 2e-4), seen
    if prior == "calibrated":
        split = launched(tmp_path / "split.pt", 2, 2, 2, 0, prior, "streams")  # one process writes, and both read
        assert max(differences(one, split).values()) < 2e-4
        assert not list((tmp_path / "split.pt.cache").glob("hf_uib_*"))
        other = differences(one, launched(tmp_path / "other.pt", 2, 4, seed=1, prior=prior))  # the control
        assert other["adapter"] > 1e-2 and other["losses"] > 1e-2


def compared():
    """Largest difference of each quantity between one process and two, by prior, and of two controls."""
    with tempfile.TemporaryDirectory() as folder:
        seen = {}
        for prior in ("calibrated", "saliency", "influence"):
            one = launched(os.path.join(folder, "one.pt"), 1, 8, prior=prior)
            seen[prior] = differences(one, launched(os.path.join(folder, "two.pt"), 2, 4, prior=prior))
            if prior == "calibrated":
                accumulated = launched(os.path.join(folder, "split.pt"), 2, 2, accumulation=2, prior=prior)
                seen["calibrated, accumulation 2"] = differences(one, accumulated)
                other = launched(os.path.join(folder, "other.pt"), 2, 4, seed=1, prior=prior)
                seen["control: another seed"] = differences(one, other)
    return seen
