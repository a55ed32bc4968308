"""The demo meets its bars on real digits; an untouched model does not."""

import json
import os

import pytest
from peft import PeftModel
from transformers import AutoModelForImageClassification

from hf_uib import UIBConfig
from hf_uib.cli.demo import demo

ROUNDING = 0.01  # what another processor's rounding moves one seed by
ERROR = 0.004  # standard error of a shortcut rate on the 2,700 conflicting rows


def meets_the_bars(row: dict, results: dict) -> bool:
    """As accurate where label and hue disagree as retraining, most of the bias that fine-tuning leaves gone, ahead of fine-tuning.

    One seed may fall short of a bar that the mean over seeds meets: docs/benchmark has six.
    """
    lora, full, oracle = (results[name] for name in ("fine-tuned LoRA", "fine-tuned, all weights", "retrained"))
    return (
        row["conflicting_accuracy"] >= oracle["conflicting_accuracy"] - ROUNDING
        and row["accuracy"] >= lora["accuracy"]
        and row["follow_rate"] - oracle["follow_rate"] <= 0.6 * (lora["follow_rate"] - oracle["follow_rate"]) + ERROR
        and row["cramers_v"] <= lora["cramers_v"]
        and row["worst_group_accuracy"] >= lora["worst_group_accuracy"]
        and row["conflicting_accuracy"] > full["conflicting_accuracy"]
        and row["follow_rate"] < full["follow_rate"] + ERROR
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])  # the README's block runs seed 0
def test_demo(seed, tmp_path):
    out = str(tmp_path / "demo")
    args = UIBConfig(out, seed=seed, save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=50)
    results = demo(args)
    assert meets_the_bars(results["UIB"], results)
    assert not meets_the_bars(results["original"], results)
    assert not meets_the_bars(results["fine-tuned LoRA"], results)
    written = set(os.listdir(out))
    assert {
        "report.json",
        "audit.json",
        "audit.png",
        "bias.png",
        "layers.png",
        "README.md",
        "merged",
        "adapter_model.safetensors",
    } <= written
    with open(os.path.join(out, "report.json")) as file:
        assert json.load(file)["results"] == results
    merged = AutoModelForImageClassification.from_pretrained(os.path.join(out, "merged"))
    assert not isinstance(merged, PeftModel)
