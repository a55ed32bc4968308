"""One process and two compute the same: started through accelerate, sets that two does not divide.

``python -m benchmarks scale`` writes down what is seen.
"""

import os
import subprocess
import tempfile

import pytest
import torch
from conftest import make_model, make_rows
from launching import command_for
from peft import PeftModel

from hf_uib import load_classifier

pytestmark = pytest.mark.distributed


def launched(path, processes, batch, accumulation=1, seed=0, prior="calibrated", *more, config="cpu_two_processes"):
    """What tests/two_processes.py wrote."""
    settings = (path, batch, accumulation, seed, prior, *more)
    command, environment = command_for("two_processes.py", processes, *settings, config=config)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(path, weights_only=True)
    assert found.pop("world") == processes
    share = found.pop(
        "share"
    )  # of the base's weights that the first process holds: blocks of odd sizes are not halved
    assert 0.5 <= share < 0.6 if config == "fsdp2" else share == 1
    return found


def differences(first, second):
    """Largest difference of each entry, relative where the values are larger than 1."""

    def flat(value):
        return torch.cat([t.double().flatten() for t in value.values()]) if isinstance(value, dict) else value.double()

    given = [k for k, value in first.items() if value is not None and not (isinstance(value, dict) and not value)]
    pairs = {k: (flat(first[k]), flat(second[k])) for k in given}
    return {k: ((a - b).abs() / (1 + b.abs())).max().item() for k, (a, b) in pairs.items()}


@pytest.mark.parametrize(
    "prior", ["calibrated", pytest.param("influence", marks=pytest.mark.nightly)]
)  # `compared` has saliency too
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


def test_a_sharded_base_computes_what_a_whole_one_does(tmp_path):
    one = launched(tmp_path / "one.pt", 1, 8)
    sharded = launched(tmp_path / "two.pt", 2, 2, accumulation=2, config="fsdp2")
    assert max(differences(one, sharded).values()) < 2e-4


@pytest.mark.nightly
def test_a_sharded_run_is_saved_resumed_detached_and_merged(tmp_path):
    folder = str(tmp_path / "run")
    command, environment = command_for("sharded.py", 2, folder, config="fsdp2")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(f"{folder}.pt", weights_only=True)
    assert found["world"] == 2 and found["sharded"]
    assert found["resumed"] == 0 < found["moved"]
    assert found["merged"] < 1e-5
    assert found["bf16 adapter"] == "torch.float32" and 0 < found["bf16"] < 0.2  # nats
    assert "equally many" in found["refused"] and "\n" not in found["refused"]
    before = make_model()
    assert all(torch.equal(found["detached"][name], weight) for name, weight in before.state_dict().items())
    # Saved whole: a process of its own reads the adapter, its base and the merged model
    rows = make_rows(n=21, seed=4)[:]["pixel_values"]
    for saved in (
        PeftModel.from_pretrained(before, folder),
        load_classifier(folder),
        load_classifier(f"{folder}/merged"),
    ):
        with torch.no_grad():
            assert (saved.eval()(pixel_values=rows).logits - found["logits"]).abs().max() < 1e-5
    assert os.path.isfile(os.path.join(folder, "adapter_model.safetensors"))


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
                sharded = launched(os.path.join(folder, "sharded.pt"), 2, 4, prior=prior, config="fsdp2")
                seen["calibrated, FSDP2"] = differences(one, sharded)
                other = launched(os.path.join(folder, "other.pt"), 2, 4, seed=1, prior=prior)
                seen["control: another seed"] = differences(one, other)
    return seen
