"""Devices without float64 (MPS): no tensor of that kind is made on them. Played on the CPU, where every tensor that did not come
from `.cpu()` (or from NumPy, or was made there) counts as one of the device."""

import ast
import os
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from test_trainer import crude, make_trainer

import hf_uib
from hf_uib import objective
from hf_uib.state import UIBState

WIDE = (torch.float64, torch.double, torch.complex128)


class OnHost(torch.Tensor):
    """A tensor that was brought to the CPU; what is computed from it is there too."""


@pytest.fixture
def no_wide_dtype_on_the_device(monkeypatch):
    """Conversions of a device's tensor to float64 raise, as on MPS; and `wide_dtype` says what it says there."""
    cpu, double, to = torch.Tensor.cpu, torch.Tensor.double, torch.Tensor.to
    converted = []

    def convert(function):
        def wrapped(self, *args, **kwargs):
            dtypes = [value.dtype if isinstance(value, torch.Tensor) else value for value in (*args, *kwargs.values())]
            if function is double or any(value in WIDE for value in dtypes if isinstance(value, torch.dtype)):
                if not isinstance(self, OnHost) and self.dtype not in WIDE:
                    raise TypeError(
                        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
                    )
                converted.append(self.shape)
            return function(self, *args, **kwargs)

        return wrapped

    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *a, **k: cpu(self, *a, **k).as_subclass(OnHost))
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).as_subclass(OnHost))
    monkeypatch.setattr(torch.Tensor, "double", convert(double))
    monkeypatch.setattr(torch.Tensor, "to", convert(to))
    for module in ("objective", "contrast"):
        monkeypatch.setattr(f"hf_uib.{module}.wide_dtype", lambda device: torch.float32)
    return converted


@pytest.mark.filterwarnings("ignore")
def test_a_run_makes_no_float64_on_the_device(tmp_path, no_wide_dtype_on_the_device):
    settings = dict(save_strategy="steps", save_steps=3)
    trainer = make_trainer(tmp_path / "a", **settings)
    trainer.train()
    assert no_wide_dtype_on_the_device  # the search is awake: on the CPU some are made
    trainer.layer_report()
    trainer.run_warnings  # noqa: B018
    resumed = make_trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    trainer.audit(make_rows(n=12, seed=6), "source")
    trainer.save_model()


@pytest.mark.filterwarnings("ignore")
def test_over_unlearning_makes_no_float64_on_the_device(tmp_path, no_wide_dtype_on_the_device):
    trainer = crude(tmp_path, channel_settings={"over_unlearning_z": 100.0})
    trainer.train()
    assert trainer.statistics["kept_fraction"] < 1


def test_a_state_is_read_without_float64_on_the_device(tmp_path):
    """Its tensors go to the device, but for those that are wide, which stay on the CPU (where the prior counts on)."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    state = UIBState.load(str(tmp_path), "meta")
    tensors = {**state.posterior, **state.prior}
    wide = {name for name, value in tensors.items() if value.dtype == torch.float64}
    assert {"noise_to_signal", "cumulative_kl", "level", "ranks"} <= wide
    assert all((value.device.type == "cpu") == (name in wide) for name, value in tensors.items())
    assert state.statistics == trainer.statistics


def test_the_search_finds_one(no_wide_dtype_on_the_device):
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()
    assert torch.zeros(2).cpu().double().dtype == torch.float64


def test_every_conversion_is_one_of_the_known():
    """A new `.double()` or `float64` needs a look: it is on the CPU (after `.cpu()`, from NumPy), or `wide_dtype` decides."""
    found = {}
    for path in Path(os.path.dirname(hf_uib.__file__)).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("double", "float64"):
                owner = ast.unparse(node.value)
                safe = ".cpu()" in owner or "from_numpy" in owner or owner == "np"
                if not safe:
                    found.setdefault(path.name, []).append(ast.unparse(node))
    assert {name: sorted(uses) for name, uses in found.items()} == {
        "contrast.py": ["moments.double", "torch.float64", "torch.float64", "torch.float64"],  # in_double; counts on the CPU
        "lora.py": ["torch.float64"],  # kinds of weights that are numbers
        "objective.py": ["(first[:, None] == second).double", "(first[:, None] > second).double", "torch.float64"],
        "posterior.py": ["torch.float64", "torch.float64"],  # counts on the CPU
        "mean_tokens.py": ["torch.float64", "torch.float64"],  # all on the CPU
        "state.py": ["torch.float64", "torch.float64"],  # files, and what stays on the CPU when they are read
    }  # fmt: skip


def test_wide_dtype():
    assert objective.wide_dtype(torch.device("mps")) == torch.float32
    assert objective.wide_dtype(torch.device("cpu")) == objective.wide_dtype(torch.device("cuda")) == torch.float64
