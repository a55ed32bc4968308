"""Killed (SIGKILL) at random moments, saving or computing, and started again: the same to the bit."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time

import pytest
import torch
from launching import command_for
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

pytestmark = pytest.mark.slow


def started(folder, processes):
    """tests/killed.py, running in a process group of its own."""
    command, environment = command_for("killed.py", processes, folder)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def killed(folder, processes, step, delay):
    """Start, or go on, and kill ``delay`` seconds after ``step`` was reached; where that came too late the run has ended."""
    run, workers = started(folder, processes), []
    for line in run.stdout:
        if line.startswith("process "):
            workers.append(int(line.split()[1]))
        found = re.match(r"step (\d+)", line)
        if found and int(found[1]) >= step:
            time.sleep(delay)
            break
    os.killpg(run.pid, signal.SIGKILL)
    for worker in workers:  # the launcher's are in sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    run.stdout.close()
    run.wait()


def finished(folder, processes):
    """Run to the end: adapter, state of prior and posterior, logs."""
    output = started(folder, processes).communicate()[0]
    assert os.path.isfile(os.path.join(folder, "logs.json")), output[-3000:]
    with open(os.path.join(folder, "logs.json")) as file:
        told = json.load(file)
    assert told["world"] == processes
    files = ("adapter_model.safetensors", "uib_state.safetensors")
    return {name: load_file(os.path.join(folder, name)) for name in files}, told["logs"]


def assert_same(first, second):
    for name, tensors in first[0].items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[0][name][key]), (name, key)
    assert first[1] == second[1]


@pytest.mark.parametrize(
    "processes, kills",
    [
        (1, 1),
        pytest.param(1, 3, marks=pytest.mark.nightly),
        pytest.param(2, 2, marks=[pytest.mark.distributed, pytest.mark.nightly]),
    ],
)
def test_killed_and_started_again_is_bit_equal(tmp_path, processes, kills):
    random.seed(processes)
    whole = finished(tmp_path / "whole", processes)
    folder = tmp_path / "killed"
    for k in range(kills):
        killed(folder, processes, 2 + 3 * k, random.uniform(0, 0.05))
        last = get_last_checkpoint(folder)
        if last is not None:  # whole
            written = set(os.listdir(last))
            states = {"rng_state.pth"} if processes == 1 else {"rng_state_0.pth", "rng_state_1.pth"}
            expected = {"adapter_model.safetensors", "uib_state.safetensors", "optimizer.pt", "trainer_state.json"}
            assert expected | states <= written
            with open(os.path.join(last, "trainer_state.json")) as file:
                assert json.load(file)["global_step"] == int(last.rsplit("-", 1)[1])
    assert_same(whole, finished(folder, processes))
    assert not os.path.exists(folder / "_unfinished")
