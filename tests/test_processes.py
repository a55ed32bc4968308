"""One process and two compute the same: started through accelerate, sets that two does not divide.

``python -m benchmarks scale`` writes down what is seen.
"""

import json
import os
import subprocess
import tempfile
from unittest.mock import patch

import datasets
import pytest
import torch
import two_processes
from conftest import make_model, make_rows
from launching import command_for
from peft import PeftModel

from hf_uib import load_classifier

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]  # they share one run


def launched(folder, processes, config="cpu_two_processes", **runs):
    """What tests/two_processes.py wrote of each run, by its name: one start for all of them, or this process."""
    wanted = [{"path": os.path.join(folder, f"{name}.pt"), **run} for name, run in runs.items()]
    if processes == 1:
        with patch.object(datasets.config, "HF_DATASETS_CACHE"):
            for run in wanted:
                two_processes.main(**run)
    else:
        command, environment = command_for("two_processes.py", processes, json.dumps(wanted), config=config)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    found = {name: torch.load(run["path"], weights_only=True) for name, run in zip(runs, wanted, strict=True)}
    for seen in found.values():
        assert seen.pop("world") == processes
        # Of the base's weights that the first process holds: blocks of odd sizes are not halved
        share = seen.pop("share")
        assert 0.5 <= share < 0.6 if config == "fsdp2" else share == 1
    return found


def differences(first, second):
    """Largest difference of each entry, relative where the values are larger than 1."""

    def flat(value):
        return torch.cat([t.double().flatten() for t in value.values()]) if isinstance(value, dict) else value.double()

    given = [k for k, value in first.items() if value is not None and not (isinstance(value, dict) and not value)]
    pairs = {k: (flat(first[k]), flat(second[k])) for k in given}
    return {k: ((a - b).abs() / (1 + b.abs())).max().item() for k, (a, b) in pairs.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("one"), 1, one={"batch": 8})["one"]


def test_two_processes_compute_what_one_does(one, tmp_path):
    runs = {
        "two": {"batch": 4},
        "split": {"batch": 2, "accumulation": 2, "streams": True},  # one process writes, and both read
        "other": {"batch": 4, "seed": 1},  # the control
    }
    seen = {name: differences(one, found) for name, found in launched(tmp_path, 2, **runs).items()}
    assert max(seen["two"].values()) < 2e-4, seen["two"]
    assert max(seen["split"].values()) < 2e-4, seen["split"]
    assert not list((tmp_path / "split.pt.cache").glob("hf_uib_*"))
    assert seen["other"]["adapter"] > 1e-2 and seen["other"]["losses"] > 1e-2


@pytest.mark.nightly
def test_two_processes_compute_what_one_does_under_influence(tmp_path):
    """`compared` has saliency too."""
    one = launched(tmp_path, 1, one={"batch": 8, "prior": "influence"})["one"]
    two = launched(tmp_path, 2, two={"batch": 4, "prior": "influence"})["two"]
    # Conjugate gradients and Adam's first steps carry rounding further here
    assert max(differences(one, two).values()) < 5e-4


def test_a_sharded_base_computes_what_a_whole_one_does(one, tmp_path):
    sharded = launched(tmp_path, 2, config="fsdp2", sharded={"batch": 2, "accumulation": 2})["sharded"]
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
    whole = {prior: {"batch": 8, "prior": prior} for prior in ("calibrated", "saliency", "influence")}
    halves = {prior: run | {"batch": 4} for prior, run in whole.items()}
    more = {
        "calibrated, accumulation 2": {"batch": 2, "accumulation": 2},
        "control: another seed": {"batch": 4, "seed": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        one = launched(folder, 1, **whole)
        found = launched(folder, 2, **halves, **more)
        found |= launched(folder, 2, config="fsdp2", **{"calibrated, FSDP2": {"batch": 4}})
        return {name: differences(one[name if name in one else "calibrated"], seen) for name, seen in found.items()}
