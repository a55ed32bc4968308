"""The benchmark's own machinery: every method through the smoke suite; the tables on cells made by hand."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.join(os.path.dirname(__file__), "..")
sys.path.insert(0, os.path.join(ROOT, "scripts"))

from bench import cells, report  # noqa: E402


def test_smoke_suite_runs_every_method():
    command = [sys.executable, os.path.join(ROOT, "scripts", "benchmark.py"), "--suite", "smoke"]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout.split("### digits-colour")[1]
    assert all(f"| {method.title} |" in table for method in cells.METHODS.values())
    assert "not run" not in table


def bias_cell(method, seed, conflicting, follow, task="fashion-colour", steps=300):
    return {
        "task": task, "method": method, "seed": seed, "conflicting_accuracy": conflicting, "follow_rate": follow,
        "accuracy": conflicting, "cramers_v": 0.1, "worst_group_accuracy": 0.5, "steps": steps, "seconds": 1.0,
    }  # fmt: skip


def removal_cell(method, seed, forget, steps=300):
    figures = {"forget_accuracy": forget, "retain_accuracy": 0.9, "test_accuracy": 0.8, "attack_auc": 0.5}
    figures |= {"mia_efficacy": 0.2, "steps": steps, "seconds": 1.0}
    return {"task": "fashion-random", "method": method, "seed": seed} | figures


def test_targets_and_ranks_and_hosting():
    made = [
        *(bias_cell("uib", s, 0.82, 0.010) for s in range(3)),
        *(bias_cell("lora", s, 0.80, 0.030) for s in range(3)),
        *(bias_cell("full", s, 0.81, 0.020) for s in range(3)),
        *(bias_cell("neggrad", s, 0.70, 0.040) for s in range(3)),
        *(bias_cell("uib_ascent", s, 0.75, 0.030) for s in range(3)),
        *(bias_cell("retrained", s, 0.81, 0.020, steps=1500) for s in range(3)),
        *(removal_cell(m, s, f) for s in range(3) for m, f in (("uib", 0.82), ("lora", 0.90), ("retrained", 0.80))),
    ]
    others = [m for m in report.main_methods() if m not in ("uib", "lora", "full", "neggrad")]
    filled = made + [bias_cell(m, s, 0.1, 0.5) for m in others for s in range(3)]
    filled += [removal_cell(m, s, 0.2) for m in (*others, "full", "neggrad") for s in range(3)]
    few = [c for c in filled if c["seed"] == 0]
    assert not [
        line for line in report.rank_table(few) if line.startswith("| ") and "UIB" in line
    ]  # one seed is no figure
    assert "0.820 / 0.810 | 0.010 / 0.030 / 0.020 / 0.020" in "\n".join(report.target_table(made))
    assert report.target_table(made)[-2].endswith("| all |")
    worse = [c | {"follow_rate": 0.016} if c["method"] == "uib" else c for c in made]
    assert report.target_table(worse)[-2].endswith("| all but half of LoRA |")
    assert "Not ranked, as not every method was run from 3 seeds: digits-colour, fashion-colour" in "\n".join(
        report.rank_table(made)
    )
    ranked = [line for line in report.rank_table(filled) if line.startswith("| ") and "**" in line][1:]
    assert ranked[0] == "| **UIB** | 1.0 | **1.00** | 1 |" and ranked[3].startswith("| NegGrad+ | 4.0")
    hosting = "\n".join(report.hosting_table(made))
    assert "**0.700, 0.040, 0.700 (8.0) → 0.750, 0.030, 0.750 (4.3)**" in hosting
    assert (
        "Of 1 pairs UIB + X is better in both on 1, and falls less short of the retrained model (by more than 0.05 points) on 1."
        in hosting
    )
    fifth = [*made, *(bias_cell("uib_fifth", s, 0.83, 0.015) for s in range(3))]
    assert "| — a fifth of the steps | 0.830 / 0.810 | 0.015" in report.target_table(fifth)[-2]
    table = "\n".join(report.task_table("fashion-random", made))
    assert "| 0.50 | 0.980 |" in table and "| 2.50 | 0.900 |" in table  # average gap, tug-of-war
    assert "| SCRUB | not run |" in table


def test_tuning_takes_the_best_setting_and_refuses_an_unfinished_grid(monkeypatch):
    grid = cells.METHODS["lora"].grid
    tried = [{"task": "fashion-colour", "method": "lora", "setting": s, "score": -i % 3} for i, s in enumerate(grid)]
    monkeypatch.setattr(cells, "read", lambda path: tried)
    assert cells.chosen("fashion-patch", "lora") == grid[1]  # tuned on fashion-colour
    assert cells.chosen("fashion-patch", "uib") == {}
    monkeypatch.setattr(cells, "read", lambda path: tried[:2])
    with pytest.raises(ValueError, match="is not tuned"):
        cells.chosen("fashion-colour", "lora")
