"""The benchmark's own machinery: every method through the smoke suite; the tables on runs made by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import make_model, make_rows

from benchmarks import report, results, tables
from benchmarks.__main__ import build_parser
from benchmarks.markdown import between_marks
from benchmarks.methods import METHODS, grid, register_method
from benchmarks.suites import audits, cost, lifecycle, memory, research, runs, shape, truth
from benchmarks.tasks import TASKS, register_task
from hf_uib.cli.digits import Task

ROOT = Path(__file__).parent.parent


@pytest.fixture
def registered():
    """What a test registers goes again."""
    before = dict(TASKS), dict(METHODS)
    yield
    for table, entries in zip((TASKS, METHODS), before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.nightly
@pytest.mark.slow
def test_smoke_suite_runs_every_method(tmp_path):
    """From another folder, under the flag of earlier versions."""
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--suite", "smoke"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"| {method.title} |" in done.stdout for method in METHODS.values())


def test_a_task_and_a_method_of_ones_own_run_and_appear_in_the_report(registered, tmp_path):
    @register_task("stripes", data={"stripes_path": "nowhere"})
    def stripes(stripes_path, seed):
        """Rows of noise, made in memory."""
        assert stripes_path == "somewhere"
        sets = {part: make_rows(n=40, seed=seed + i) for i, part in enumerate(("forget", "retain", "test"))}
        settings = {"steps": 5, "unlearn_steps": 300, "retrain_steps": 5, "batch": 8}
        return Task("stripes", sets, make_model, None, "source", train_settings=settings)

    @register_method("shrink", "shrunk weights", grid=grid(factor=[0.5, 0.9]), needs_attribute=False)
    def shrink(model, task, budget, factor):
        assert (budget.steps, budget.batch_size, budget.seed) == (10, 8, 1)
        for weight in model.parameters():
            weight.data.mul_(factor)
        return model, {"factor": factor}

    options = build_parser().parse_args(
        ["run", "--tasks", "stripes", "--methods", "shrink", "neggrad", "retrained", "--seeds", "1"]
        + ["--stripes_path", "somewhere", "--cache", str(tmp_path)]
    )
    path = tmp_path / "results.jsonl"
    runs.run(options, lambda task, method: METHODS[method].grid[-1], path, steps=10)
    mine, neggrad, retrained = results.read(path)
    assert (mine["method"], mine["setting"], mine["factor"]) == ("shrink", {"factor": 0.9}, 0.9)
    assert neggrad["steps"] == retrained["steps"] == 10
    assert 0 <= mine["accuracy"] <= 1 and mine["data"]["forget"] != mine["data"]["retain"]
    runs.run(options, lambda task, method: METHODS[method].grid[-1], path, steps=10)  # nothing is missing
    assert len(results.read(path)) == 3
    made = report.pages(results.read(path))
    assert made["stripes.md"].startswith("# stripes\n\nRows of noise, made in memory.\n")
    assert "| shrunk weights |" in made["stripes.md"] and "not run" not in made["stripes.md"]
    assert "SCRUB" not in made["stripes.md"]
    assert "[stripes](stripes.md)" in made["index.md"]
    with pytest.raises(ValueError, match="registered twice"):
        register_method("shrink", "again")(shrink)


@pytest.fixture
def task():
    """Its attribute is the label on the forget set."""
    sets = {part: make_rows(n=40, seed=i) for i, part in enumerate(("forget", "retain", "calibration"))}
    labels = sets["forget"].with_format(None)["labels"][:]
    sets["forget"] = sets["forget"].remove_columns("source").add_column("source", labels)
    settings = {"steps": 5, "unlearn_steps": 6, "retrain_steps": 5, "batch": 8}
    return Task("made", sets | {"test": make_rows(n=60, seed=9)}, make_model, None, "source", train_settings=settings)


@pytest.mark.parametrize("name", research.VARIANTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_research_varies_a_setting(task, tmp_path, name):
    model, info = runs.trained(task, {"original": make_model()}, "uib", research.VARIANTS[name], 0, str(tmp_path))
    assert {"pattern_z", "noise_to_signal", "swap_fraction"} <= set(info["statistics"])
    assert set(runs.measure(model, task)) >= {"accuracy", "conflicting_accuracy"}


@pytest.mark.nightly
@pytest.mark.slow
def test_probes_audits_and_requests_run(task, tmp_path, monkeypatch):
    line = truth.probe(make_model(), task, 0)
    assert set(truth.COLUMNS) == set(truth.truth_row(line))
    models = {"start": make_model(), "original": make_model()}
    oracles = audits.retrained_models(task, models["start"], 2, str(tmp_path))
    subjects = dict(audits.subjects_of(task, models, oracles, 0, str(tmp_path)))
    assert {"retrained 1", "detached adapter", "UIB"} <= set(subjects)
    found = audits.audited(subjects["UIB"], models["original"], oracles[0], task, False)
    assert len(found["checks"]) > 8 and isinstance(found["flags"], list)
    monkeypatch.setattr(lifecycle, "SETTINGS", dict.fromkeys(lifecycle.SETTINGS, 3) | {"batch": 16})
    requests = lifecycle.three_requests(0)
    merged = lifecycle.answer(requests.new_model(), requests, "hue", 0, str(tmp_path / "request"))
    assert set(lifecycle.left_over(merged, requests)) == set(lifecycle.COLUMNS)
    assert isinstance(lifecycle.flags_of(merged, requests.new_model(), merged, requests, "hue"), list)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.distributed
def test_a_step_is_timed_under_one_process_and_two(tmp_path):
    options = build_parser().parse_args(["cost", "--cache", str(tmp_path)])
    for processes in (1, 2):
        line = cost.apart(options, "uib", "ViT 192x6", 4, 4, processes)
        assert line["processes"] == processes and line["step_seconds"] > 0 and line["peak_mb"] > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read off /proc")
@pytest.mark.parametrize("kind", memory.KINDS)
def test_memory_is_measured(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    line = memory.measure_rows(kind, 1000, str(tmp_path))
    assert line["rows"] == 1000 and line["highest"] >= line["trained"] > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is read off /proc")
def test_memory_by_shape_on_paper_and_measured(tmp_path):
    whole = shape.predicted(shape.LAYERS, 4, 128, True)
    assert whole["weights"] == pytest.approx(
        2 * 1_235_818_496 / 2**20
    )  # Llama 3.2 1B has 1,235,814,400, without a head
    more = [shape.predicted(n, 4, 128, False)["step"] - shape.predicted(n, 4, 128, True)["step"] for n in (1, 2, 3)]
    assert more[0] == 0 and more[2] == pytest.approx(2 * more[1])  # what is kept inside a block, for each but one
    small = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000)
    code = (
        "import json; from benchmarks.suites import shape; "
        f"shape.CONFIG = {small | {'pad_token_id': 0}}; print(json.dumps(shape.measure(1, True, {str(tmp_path)!r})))"
    )  # a process of its own: in this one, memory that other tests gave back would be taken again
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    line = json.loads(printed.splitlines()[-1])
    assert line["statistics"] > 0 and line["step"] > 0


def test_every_task_says_what_it_is_and_methods_are_ordered():
    for name, spec in TASKS.items():
        assert len(spec.text.split("\n\n")[0]) > 60, name
        assert spec.tuning_task in TASKS
    titles = list(METHODS)
    assert titles[0] == "original" and titles[-1] == "retrained"
    assert all(spec.hosts is None or spec.hosts in METHODS for spec in METHODS.values())


def test_names_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text('{"task": "fashion-colour, 90% telling"}\n{"variant": "no evidence (prior none)"}\n')
    assert [list(line.values()) for line in results.read(path)] == [
        ["fashion-colour, 90% bias-aligned"],
        ["no forget loss (prior none)"],
    ]
    known = {line["task"] for line in results.read(results.RUNS)}
    assert known <= set(TASKS) and {line["method"] for line in results.read(results.RUNS)} <= set(METHODS)


def bias_run(method, seed, conflicting, shortcut, task="fashion-colour", steps=300):
    return {
        "task": task, "method": method, "seed": seed, "conflicting_accuracy": conflicting, "follow_rate": shortcut,
        "accuracy": conflicting, "cramers_v": 0.1, "worst_group_accuracy": 0.5, "steps": steps, "seconds": 1.0,
    }  # fmt: skip


def removal_run(method, seed, forget, steps=300):
    figures = {"forget_accuracy": forget, "retain_accuracy": 0.9, "test_accuracy": 0.8, "attack_auc": 0.5}
    figures |= {"mia_efficacy": 0.2, "steps": steps, "seconds": 1.0}
    return {"task": "fashion-random", "method": method, "seed": seed} | figures


@pytest.fixture
def made():
    return [
        *(bias_run("uib", s, 0.82, 0.010) for s in range(3)),
        *(bias_run("lora", s, 0.80, 0.030) for s in range(3)),
        *(bias_run("full", s, 0.81, 0.020) for s in range(3)),
        *(bias_run("neggrad", s, 0.70, 0.040) for s in range(3)),
        *(bias_run("uib_ascent", s, 0.75, 0.030) for s in range(3)),
        *(bias_run("retrained", s, 0.81, 0.020, steps=1500) for s in range(3)),
        *(removal_run(m, s, f) for s in range(3) for m, f in (("uib", 0.82), ("lora", 0.90), ("retrained", 0.80))),
    ]


def test_targets(made):
    assert "0.820 / 0.810 | 0.010 / 0.030 / 0.020 / 0.020" in "\n".join(tables.target_table(made))
    assert tables.target_table(made)[-2].endswith("| all |")
    worse = [run | {"follow_rate": 0.016} if run["method"] == "uib" else run for run in made]
    assert tables.target_table(worse)[-2].endswith("| all but half of LoRA |")
    assert "| 0 of 1 | 0 of 0 |" in tables.missed_table(made)[3]
    assert "| 1 of 1: fashion-colour | 0 of 0 |" in tables.missed_table(worse)[3]
    fifth = [*made, *(bias_run("uib_fifth", s, 0.83, 0.015) for s in range(3))]
    assert "| — a fifth of the steps | 0.830 / 0.810 | 0.015" in tables.target_table(fifth)[-2]


def test_ranks(made):
    others = [m for m, spec in METHODS.items() if spec.ranked and m not in ("uib", "lora", "full", "neggrad")]
    filled = made + [bias_run(m, s, 0.1, 0.5) for m in others for s in range(3)]
    filled += [removal_run(m, s, 0.2) for m in (*others, "full", "neggrad") for s in range(3)]
    few = [run for run in filled if run["seed"] == 0]
    assert not [line for line in tables.rank_table(few) if "UIB" in line]  # one seed is no figure
    missing = "Not ranked, as not every method was run from 3 seeds: digits-colour, fashion-colour"
    assert missing in "\n".join(tables.rank_table(made))
    ranked = [line for line in tables.rank_table(filled) if line.startswith("| ") and "**" in line][1:]
    assert ranked[0] == "| **UIB** | 1.0 | **1.00** | 1 |" and ranked[3].startswith("| NegGrad+ | 4.0")


def test_hosting(made):
    hosting = "\n".join(tables.hosting_table(made))
    assert "**0.700, 0.040, 0.700 (8.0) → 0.750, 0.030, 0.750 (4.3)**" in hosting
    summary = "Of 1 pairs UIB + X is better in both on 1, and falls less short of the retrained model"
    assert f"{summary} (by more than 0.05 points) on 1." in hosting


def test_a_task_s_table_has_no_row_for_what_was_not_run(made):
    table = "\n".join(tables.task_table("fashion-random", made))
    assert "| 0.50 | 0.980 |" in table and "| 2.50 | 0.900 |" in table  # average gap, tug-of-war
    assert "not run" not in table and "SCRUB" not in table
    small = tables.task_table("fashion-colour", made, ("uib", "retrained"), ["accuracy", "seconds"])
    assert small[0] == "|  | accuracy | seconds |" and len(small) == 5
    assert small[2] == "| **UIB** | 0.820 ± 0.000 | 1 |"


def test_a_page_without_a_place_for_the_results_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- results -->\nold\n<!-- /results -->\nbelow\n")
    between_marks(page, ["new", ""])
    assert page.read_text() == "above\n<!-- results -->\nnew\n<!-- /results -->\nbelow\n"
    page.write_text("no place")
    with pytest.raises(ValueError, match="has no place"):
        between_marks(page, ["new"])


def test_tuning_takes_the_best_setting_and_refuses_an_unfinished_grid(monkeypatch):
    settings = METHODS["lora"].grid
    tried = [
        {"task": "fashion-colour", "method": "lora", "setting": s, "score": -i % 3} for i, s in enumerate(settings)
    ]
    monkeypatch.setattr(results, "read", lambda path: tried)
    assert runs.tuned_setting("fashion-patch", "lora") == settings[1]  # tuned on fashion-colour
    assert runs.tuned_setting("fashion-patch", "uib") == {}
    monkeypatch.setattr(results, "read", lambda path: tried[:2])
    with pytest.raises(ValueError, match="is not tuned"):
        runs.tuned_setting("fashion-colour", "lora")


def test_a_fold_counts_once_all_of_the_grid_was_tried_on_it():
    settings = METHODS["lora"].grid
    lines = [
        {"task": "dino-shade", "method": "lora", "seed": seed, "setting": s, "score": score}
        for seed, scores in {100: (3, 2, 1, 0), 101: (0, 5, 1, 0)}.items()
        for s, score in zip(settings, scores, strict=True)
    ]
    assert runs.best_of(lines[:-1], "dino-shade", "lora") == settings[0]
    assert list(runs.scores_of(lines[:-1], "dino-shade", "lora")) == [100]
    assert runs.best_of(lines, "dino-shade", "lora") == settings[1]
    assert list(runs.scores_of(lines, "dino-shade", "lora")) == [100, 101]


def test_the_written_pages_are_those_of_the_results():
    """docs/benchmark is what `python -m benchmarks report` writes now."""
    for name, page in report.pages(results.read(results.RUNS)).items():
        assert (ROOT / "docs" / "benchmark" / name).read_text(encoding="utf-8") == page, name
