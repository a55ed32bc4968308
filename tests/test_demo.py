"""The demo meets its bars on real digits, twice; an untouched model does not."""

import json
import os

import pytest
from peft import PeftModel
from transformers import AutoModelForImageClassification

from hf_uib import UIBConfig, cli


def meets_the_bars(row: dict, results: dict) -> bool:
    """Less bias than plain LoRA fine-tuning leaves above the retrained model, at no loss of accuracy."""
    lora, retrained = results["fine-tuned LoRA"], results["retrained"]
    return (
        row["conflicting_accuracy"] >= retrained["conflicting_accuracy"] - 0.01
        and row["accuracy"] >= lora["accuracy"] - 0.01
        and row["follow_rate"] <= max(lora["follow_rate"], retrained["follow_rate"]) + 0.002
        and row["cramers_v"] <= max(lora["cramers_v"], retrained["cramers_v"]) + 0.005
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_demo(seed, tmp_path):
    out = str(tmp_path / "demo")
    args = UIBConfig(out, seed=seed, save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=50)
    results = cli.demo(args)
    assert meets_the_bars(results["UIB"], results)
    assert not meets_the_bars(results["original"], results)
    written = set(os.listdir(out))
    assert {"report.json", "bias.png", "layers.png", "README.md", "merged", "adapter_model.safetensors"} <= written
    with open(os.path.join(out, "report.json")) as file:
        assert json.load(file)["results"] == results
    merged = AutoModelForImageClassification.from_pretrained(os.path.join(out, "merged"))
    assert not isinstance(merged, PeftModel)
