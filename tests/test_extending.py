"""The code of docs/extending.md runs, and each extension of it works."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BLOCKS = {
    title: re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    for title, text in (section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
}


@pytest.fixture
def extended():
    """Runs a section's code; afterwards the tables are what they were."""
    from benchmarks.registry import METHODS, TASKS
    from hf_uib.audit.checks import CHECKS
    from hf_uib.metrics import METRICS
    from hf_uib.priors import PRIORS
    from hf_uib.unlearning_task import TASK_TYPES

    tables = [METHODS, TASKS, CHECKS, METRICS, PRIORS]
    before, types = [dict(table) for table in tables], list(TASK_TYPES)

    def run(title: str) -> dict:
        names: dict = {"__name__": title}
        exec(compile(BLOCKS[title], f"docs/extending.md, {title}", "exec"), names)
        return names

    yield run
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    TASK_TYPES[:] = types


def test_every_section_has_a_test():
    assert list(BLOCKS) == ["A prior", "A check", "A metric", "A baseline", "A benchmark task", "A task type"]


def train(tmp_path, model, rows_of=make_rows, **settings):
    from hf_uib import UIBConfig, UIBTrainer

    args = UIBConfig(
        str(tmp_path),
        max_steps=4,
        prior_update_steps=2,
        prior_fraction=1.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **settings,
    )
    trainer = UIBTrainer(
        model,
        args,
        forget_dataset=rows_of(n=24, seed=1),
        retain_dataset=rows_of(n=16, seed=2),
        calibration_dataset=rows_of(n=20, seed=3),
    )
    trainer.train()
    return trainer


def test_a_prior(extended, tmp_path):
    names = extended("A prior")
    assert names["args"].prior == "entropy"
    trainer = train(tmp_path, make_model(), prior="entropy")
    assert type(trainer.prior) is names["EntropyPrior"]
    assert trainer.statistics["prior_strength"] in (0.03, 0.1)
    flat, sharp = torch.zeros(2, 3), torch.tensor([[50.0, 0.0, 0.0]] * 2)
    labels = torch.zeros(2, dtype=torch.long)
    assert trainer.prior.forget_loss(flat, labels) == pytest.approx(0.0, abs=1e-6)
    assert trainer.prior.forget_loss(sharp, labels) == pytest.approx(np.log(3), rel=1e-5)


def test_a_check(extended):
    from hf_uib import audit_model

    extended("A check")
    reference = make_model(seed=0)

    def audited(model):
        report = audit_model(
            model,
            reference_model=reference,
            forget_dataset=make_rows(n=40, seed=1),
            retain_dataset=make_rows(n=40, seed=2),
            test_dataset=make_rows(n=40, seed=3),
        )
        return {check.name: check for check in report.checks}["too_sure"]

    same = audited(make_model(seed=0))
    assert same.fired is False and same.value == same.limit
    assert audited(make_model(seed=5)).fired in (True, False)


def test_a_metric(extended):
    from hf_uib.metrics import bias_row, text_table

    extended("A metric")
    labels = np.array([0, 1, 2, 0])
    right = bias_row(100.0 * np.eye(3)[labels], labels, labels)
    unsure = bias_row(np.zeros((4, 3)), labels, labels)
    assert right["brier_score"] == pytest.approx(0.0)
    assert unsure["brier_score"] == pytest.approx(2 / 3)
    assert "Brier score" in text_table({"model": right})


def test_a_baseline(extended):
    from benchmarks.registry import METHODS, Budget
    from hf_uib.cli.digits import digits_colour

    extended("A baseline")
    task = digits_colour(0)
    torch.manual_seed(0)
    model = task.new_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    spec = METHODS["ascent-only"]
    assert len(spec.grid) == 2
    trained = spec.train(model, task, Budget(steps=2, batch_size=8, learning_rate=1e-3))
    assert any(not torch.equal(p, before[name]) for name, p in trained.named_parameters())


def test_a_benchmark_task(extended):
    from benchmarks.registry import TASKS

    extended("A benchmark task")
    task = TASKS["digits-corner"].make(seed=0)
    forget = task.sets["forget"].with_format(None)
    assert forget["corner"] == forget["label"]
    retain = task.sets["retain"].with_format(None)
    assert np.mean(np.array(retain["corner"]) == np.array(retain["label"])) < 0.5
    first = np.asarray(forget[0]["image"])
    assert (first[0, 0] == 25 * forget[0]["label"]).all()


def test_a_task_type(extended, tmp_path):
    names = extended("A task type")

    def rows(n, seed):
        return make_rows(n=n, num_labels=2, seed=seed)

    trainer = train(tmp_path, make_model(num_labels=1), rows)
    assert type(trainer.task) is names["OneLogit"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite(losses).all()
    with pytest.raises(ValueError, match="other than 0 and 1"):
        train(tmp_path, make_model(num_labels=1), make_rows)
    logits, labels = torch.tensor([[2.0], [2.0]]), torch.tensor([1, 0])
    assert trainer.task.margin(logits, labels).tolist() == [2.0, -2.0]
    with pytest.raises(
        ValueError,
        match="The audit reads classifiers of one label a row, several, or one a token; the task of this model is OneLogit",
    ):
        trainer.audit(rows(40, 5))
