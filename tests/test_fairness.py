"""False alarms, misses and their differences between groups: by hand, against fairlearn, and through the audit."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model, make_rows
from launching import unlearn_words

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bert_brand_bias import word_tokenizer

from benchmarks.suites.fairness import digits_halves, hate_rows
from hf_uib import UIBConfig, audit_model
from hf_uib.audit import fairness
from hf_uib.audit.context import AuditContext, BiasAttribute
from hf_uib.audit.gather import _crossing
from hf_uib.audit.statistics import Resampler
from hf_uib.audit.thresholds import AuditThresholds
from hf_uib.cli.main import dispatch
from hf_uib.cli.parser import one_line_errors
from hf_uib.cli.unlearn import UnlearnArguments, audit_command, columns_of, next_audit
from hf_uib.inference import ModelOutputs


def attribute(column, values):
    groups = np.asarray(["" if value is None else f"{column}={value}" for value in values])
    return BiasAttribute(groups, np.unique(groups, return_inverse=True)[1], False, groups)


def context(labels, predictions, columns, examples=None, positive=(1, "toxic"), resamples=200, **limits):
    """What the audit looks at, of a model that predicts just that."""
    outputs = {"test": ModelOutputs(np.eye(3)[np.asarray(predictions)], np.asarray(labels))}
    attributes = {name: attribute(name, values) for name, values in columns.items()}
    if len(attributes) > 1:
        attributes[" x ".join(attributes)] = _crossing(list(attributes.values()))
    return AuditContext(
        {}, [], {}, {"model": outputs, "reference": outputs}, {}, {"test": Resampler(examples, len(labels), resamples)},
        attributes, thresholds=AuditThresholds(**limits), positive=positive,
    )  # fmt: skip


def figures(column="sex", **settings):
    return fairness.fairness_of(context(**settings))[column]["model"]


HAND = dict(
    # f: 1 of 2 called though it is not, 0 of 2 missed; m: 0 of 3 called, 1 of 2 missed; one row has no sex
    labels=[0, 0, 1, 1, 0, 0, 0, 1, 1, 1],
    predictions=[1, 0, 1, 1, 0, 2, 0, 1, 0, 0],
    columns={"sex": [*"ffffmmmmm", None]},
    min_group_rows=2,
)


def test_rates_and_differences_by_hand():
    seen = figures(**HAND)
    f, m = seen["groups"]["sex=f"], seen["groups"]["sex=m"]
    assert (f["rows"], m["rows"]) == (4, 5) and set(seen["groups"]) == {"sex=f", "sex=m"}
    assert [f[rate]["value"] for rate in fairness.RATES] == [3 / 4, 1 / 2, 0]
    assert [m[rate]["value"] for rate in fairness.RATES] == [1 / 5, 0, 1 / 2]
    assert [seen[name]["value"] for name in fairness.DIFFERENCES] == pytest.approx([0.55, 0.5, 0.5, 0.5])
    assert "cramers_v" not in seen  # it stands among the test set's figures


def test_rates_over_nothing_are_said_in_words():
    looked_at = context(
        labels=[1] * 30 + [0, 1] * 15 + [0, 1, 1], predictions=[1] * 63,
        columns={"sex": ["f"] * 30 + ["m"] * 30 + ["x"] * 3}, min_group_rows=20,
    )  # fmt: skip
    seen = fairness.fairness_of(looked_at)["sex"]["model"]
    assert np.isnan(seen["groups"]["sex=f"]["false_positive_rate"]["value"])
    assert np.isnan(seen["false_positive_rate_difference"]["value"])  # one group alone has the rate
    assert np.isnan(seen["equalized_odds_difference"]["value"])
    assert seen["false_negative_rate_difference"]["value"] == 0
    words = fairness.not_estimable(looked_at)
    assert words == [
        "differences to small groups (1 by sex, of fewer than 20 test rows)",
        "false alarms of groups without a test row of another class than 'toxic': 'sex=f'",
    ]


def test_few_rows_have_wide_intervals():
    """0 of 3 is no proof, though no resample of three right rows has a wrong one."""
    few = figures(labels=[0] * 3 + [0] * 200, predictions=[0] * 203, columns={"sex": ["x"] * 3 + ["f"] * 200})
    x, f = (few["groups"][f"sex={name}"]["false_positive_rate"] for name in "xf")
    assert x["value"] == f["value"] == 0 == x["low"]
    assert x["high"] == pytest.approx(0.5615, abs=1e-4)  # Wilson: z² / (3 + z²)
    assert f["high"] == pytest.approx(1.96**2 / (200 + 1.96**2), rel=1e-3)
    # Five copies of each example are no more examples
    copied = figures(
        labels=[0] * 15, predictions=[0] * 15, columns={"sex": ["x"] * 15}, examples=np.repeat(np.arange(3), 5)
    )
    assert copied["groups"]["sex=x"]["false_positive_rate"]["high"] == pytest.approx(x["high"])


def test_a_crossing_is_a_column_of_its_own():
    rng = np.random.default_rng(0)
    sex, age = rng.choice(["f", "m"], 400), rng.choice(["old", "young", None], 400)
    labels, predictions = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    looked_at = context(labels, predictions, {"sex": sex, "age": age})
    found = fairness.fairness_of(looked_at)
    assert list(found) == ["sex", "age", "sex x age"]
    crossing = found["sex x age"]["model"]
    assert set(crossing["groups"]) == {f"sex={s}, age={a}" for s in "fm" for a in ("old", "young")}
    rows = (sex == "f") & (age == "old")
    assert crossing["groups"]["sex=f, age=old"]["rows"] == rows.sum()
    assert crossing["groups"]["sex=f, age=old"]["selection_rate"]["value"] == pytest.approx(predictions[rows].mean())
    assert 0 <= crossing["cramers_v"]["value"] <= 1
    members = looked_at.members
    assert {"class 0", "sex=f", "age=old", "sex=f, age=old", "class 1, sex=f, age=old"} <= set(members)
    assert (members["class 1, sex=f, age=old"] == rows & (labels == 1)).all()


def test_ids_are_no_groups():
    looked_at = context([0, 1] * 60, [0, 1] * 60, {"id": range(120)})
    assert fairness.fairness_of(looked_at) == {}
    assert fairness.not_estimable(looked_at) == ["false alarms and misses by id (120 groups; at most 50 are measured)"]


def test_one_group_alone_has_no_difference():
    looked_at = context([0, 1] * 20, [0, 1] * 20, {"sex": ["f"] * 30 + [None] * 10})
    assert np.isnan(fairness.fairness_of(looked_at)["sex"]["model"]["equalized_odds_difference"]["value"])
    assert fairness.not_estimable(looked_at) == ["differences by sex (fewer than two groups of 20 test rows)"]
    assert fairness.fairness_of(context([0, 1], [0, 1], {"sex": [None, None]}))["sex"]["model"]["groups"] == {}


def test_without_a_positive_class():
    one = context([0, 1, 2], [0, 1, 1], {"sex": "ffm"}, positive=None)
    assert fairness.fairness_of(one) == {} and "give positive_label" in fairness.not_estimable(one)[0]
    two = context([0, 1, 2] * 20, [0, 1, 1] * 20, {"sex": "ffm" * 20, "age": "oyo" * 20}, positive=None)
    assert list(fairness.fairness_of(two)["sex x age"]["model"]) == ["cramers_v"]


@pytest.mark.parametrize(("rates", "zero"), [([0.3, 0.1], (0.0, 0.3)), ([0.2] * 4, (0.85, 1.0))])
def test_intervals_cover(rates, zero):
    """Groups with these false alarms, in clusters of two: intervals have the true difference, and 0 only where it is that."""
    rng, covered, with_zero = np.random.default_rng(0), [], []
    sex, examples = np.repeat(np.arange(len(rates)), 200), np.repeat(np.arange(100 * len(rates)), 2)
    for _ in range(60):
        wrong = np.repeat(rng.random(len(sex) // 2) < np.repeat(rates, 100), 2).astype(int)
        columns = {"sex": sex}
        seen = figures(labels=[0] * len(sex), predictions=wrong, columns=columns, examples=examples, resamples=100)
        cell = seen["false_positive_rate_difference"]
        covered.append(cell["low"] <= max(rates) - min(rates) + 1e-9 <= cell["high"])
        with_zero.append(cell["low"] == 0)
    assert np.mean(covered) > 0.85 and zero[0] <= np.mean(with_zero) <= zero[1]


def test_groups_without_one_error_may_differ_all_the_same():
    seen = figures(labels=[0] * 60, predictions=[0] * 60, columns={"sex": ["f", "m"] * 30})
    difference, group = seen["false_positive_rate_difference"], seen["groups"]["sex=f"]["false_positive_rate"]
    assert difference == {"value": 0.0, "low": 0.0, "high": group["high"]} and group["high"] > 0.1


# ---- Against fairlearn ----


def rows_with(columns, seed, n=200, num_labels=2):
    rows = make_rows(n=n, num_labels=num_labels, seed=seed).with_format(None)
    rng = np.random.default_rng(seed + 50)
    for name, values in columns.items():
        rows = rows.add_column(name, rng.choice(values, n).tolist())
    return rows.with_format("torch")


def audited(bias_column=("sex", "age"), num_labels=2, test=None, **settings):
    columns = {"sex": ["f", "m", "x"], "age": ["old", "young"]}
    models = {
        name: make_model(num_labels=num_labels, seed=seed)
        for seed, name in enumerate(("reference", "model", "retrained"))
    }
    return audit_model(
        models["model"], reference_model=models["reference"], retrained_model=models["retrained"],
        forget_dataset=rows_with(columns, 1, 40, num_labels),
        test_dataset=rows_with(columns, 3, 300, num_labels) if test is None else test, bias_column=bias_column, **settings,
    )  # fmt: skip


def test_the_audits_figures_are_fairlearns():
    metrics = pytest.importorskip("fairlearn.metrics")
    report = audited(("sex", "age"))
    for model in ("model", "reference", "retrained"):
        for column in ("sex", "age", "sex x age"):
            mine = report.metrics["fairness"][column][model]
            frame = report.metric_frame(column.split(" x "), model)
            by_group = frame.by_group
            for group in mine["groups"]:
                values = [part.partition("=")[2] for part in group.split(", ")]
                theirs = by_group.loc[tuple(values) if len(values) > 1 else values[0]]
                assert mine["groups"][group]["rows"] == theirs["count"]
                for rate in fairness.RATES:
                    assert mine["groups"][group][rate]["value"] == pytest.approx(theirs[rate], abs=1e-12)
            labels = (report.rows.labels == 1).astype(int)
            predictions = (report.rows.predictions[model] == 1).astype(int)
            sensitive = {name: report.rows.attributes[name].astype(str) for name in column.split(" x ")}
            for name in ("demographic_parity_difference", "equalized_odds_difference"):
                theirs = getattr(metrics, name)(labels, predictions, sensitive_features=sensitive)
                assert mine[name]["value"] == pytest.approx(theirs, abs=1e-12)
            theirs = frame.difference()
            for rate in ("false_positive_rate", "false_negative_rate"):
                assert mine[f"{rate}_difference"]["value"] == pytest.approx(theirs[rate], abs=1e-12)
            assert frame.overall["accuracy"] == pytest.approx(report.metrics["test"][model]["accuracy"]["value"])


def test_one_of_several_classes_against_the_rest():
    metrics = pytest.importorskip("fairlearn.metrics")
    report = audited("sex", num_labels=3, positive_label="LABEL_2")
    assert report.positive_label == "LABEL_2" and list(report.metrics["fairness"]) == ["sex"]
    rows = report.rows
    theirs = metrics.equalized_odds_difference(
        (rows.labels == 2).astype(int), (rows.predictions["model"] == 2).astype(int),
        sensitive_features=rows.attributes["sex"].astype(str),
    )  # fmt: skip
    assert report.metrics["fairness"]["sex"]["model"]["equalized_odds_difference"]["value"] == pytest.approx(theirs)
    for same in (2, "label_2"):
        assert audited("sex", num_labels=3, positive_label=same).metrics["fairness"] == report.metrics["fairness"]
    plain = audited("sex", num_labels=3)
    assert plain.metrics["fairness"] == {} and list(plain.metric_frame().by_group) == ["count", "accuracy"]


def test_rows_without_a_value_and_without_a_class():
    pytest.importorskip("fairlearn")
    rows = make_rows(n=120, num_labels=2, seed=3).with_format(None)
    labels = np.asarray(rows["labels"])
    sex = np.where(np.arange(120) < 10, None, np.where(labels == 1, "f", "m"))
    report = audited("sex", test=rows.add_column("sex", sex.tolist()).with_format("torch"))
    with pytest.warns(UserWarning, match="false positive rate of 'sex=f' is over no row"):
        frame = report.metric_frame()
    assert frame.by_group["count"].sum() == 110
    assert "false alarms of groups without a test row" in report.verdict and "'sex=f'" in report.verdict


def test_what_a_frame_needs(tmp_path, monkeypatch):
    report = audited("sex")
    with pytest.raises(ValueError, match="bias_column 'hue' is not in this audit; it has sex"):
        report.metric_frame("hue")
    with pytest.raises(ValueError, match="model 'other' is not in this audit; it has model, reference, retrained"):
        report.metric_frame(model="other")
    with pytest.raises(ValueError, match="no bias_column"):
        audited(None).metric_frame()
    monkeypatch.setitem(sys.modules, "fairlearn", None)
    with pytest.raises(ImportError, match='pip install "fairlearn>=0.15"'):
        report.metric_frame()
    report.rows = None
    with pytest.raises(ValueError, match="kept in memory alone"):
        report.metric_frame()


# ---- Where it is shown ----


def test_table_file_and_picture(tmp_path):
    report = audited(["sex", "age"])
    text = str(report)
    for line in ("sex: equalised odds difference", "sex x age: Cramér's V", "sex=f, age=old (", "): misses"):
        assert line in text, line
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1
    report.to_json(str(tmp_path / "report.json"))
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["positive_label"] == "LABEL_1" and "rows" not in content
    cell = content["metrics"]["fairness"]["sex"]["retrained"]["groups"]["sex=f"]["false_positive_rate"]
    assert set(cell) == {"value", "low", "high"} and cell["low"] <= cell["value"] <= cell["high"]
    longest = max(len(json.dumps(v)) for v in content["metrics"]["fairness"]["sex"]["model"].values())
    assert longest < 2000  # no row of the test set is in it
    small = audited(["sex", "age"], thresholds=AuditThresholds(min_group_rows=60))
    group = min(small.metrics["fairness"]["sex x age"]["model"]["groups"].items(), key=lambda pair: pair[1]["rows"])[0]
    assert f"{group} (" in str(small) and group not in json.dumps(small.to_dict()) and group not in small.verdict
    assert [os.path.basename(path) for path in report.plot(str(tmp_path))] == ["audit.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(positive_label="rude"), "has no label 'rude'; it has LABEL_0, LABEL_1"),
        (dict(positive_label=2), "has no label '2'"),
        (dict(bias_column=["sex", "hue"]), "bias_column 'hue' is not among"),
    ],
)
def test_bad_input_gets_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        audited(**change)


def test_the_command_line(tmp_path):
    make_model("bert", num_labels=2).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    for split, seed in (("train", 1), ("test", 2)):
        rows = make_rows("bert", n=80, num_labels=2, seed=seed).with_format(None)
        rows = rows.add_column("age", ["old", "young"] * 40)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    job = unlearn_words(tmp_path, "source=1", "--bias_column", "source", "age")
    with pytest.raises(SystemExit, match="has no label 'rude'"):
        one_line_errors(lambda: dispatch([*job, "--positive_label", "rude"]))
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")
    dispatch([*job, "--positive_label", "LABEL_0"])
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audit["positive_label"] == "LABEL_0"
    assert list(audit["metrics"]["fairness"]) == ["source", "age", "source x age"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "False alarms and misses by group (positive: LABEL\\_0)" in card
    assert "| source x age: equalised odds difference |" in card and "| age=old (40 rows): misses |" in card


def test_commands_name_every_column():
    job = UnlearnArguments("m", "d", forget_where=["source=1"], bias_column=["sex", "age"], positive_label="too rude")
    assert "--bias_column sex age --positive_label 'too rude'" in audit_command(job)
    listed = UnlearnArguments("m", "d", forget_scores="/home/me/scores.csv", forget_top=5, text_column=["a", "b"])
    assert " --forget_scores SCORES --forget_top 5 " in audit_command(listed) + " "
    assert "--text_column a b" in audit_command(listed) and "--forget_where" not in audit_command(listed)
    assert "--forget_rows ROWS" in audit_command(UnlearnArguments("m", "d", forget_rows="/home/me/rows.parquet"))
    test = make_rows(n=2).with_format(None).add_column("age", [1, 2])
    again = next_audit(UIBConfig("out", use_cpu=True), job, test)
    assert "--bias_column age --positive_label 'too rude'" in again
    columns = columns_of(job)
    assert columns.bias == "sex" and set(columns.other) == {"source", "age"}


# ---- The page of the benchmark ----


def test_the_text_models_figures_follow_from_its_runs():
    line = {"false_alarms": 0.9, "false_alarms_others": 0.2, "found": 1.0, "found_others": 0.5, "tweets_accuracy": 0.9}
    other = line | {"false_alarms": 0.4, "false_alarms_others": 0.3, "found": 0.9, "found_others": 0.5}
    header, rows = hate_rows({"uib": [line, other]})
    assert header[1:3] == ["false alarms, the group", "false alarms, others"]
    # The larger of 0.7 and 0.5, and of 0.1 and 0.4
    assert rows == [
        [
            "**UIB**",
            "0.650 ± 0.354",
            "0.250 ± 0.071",
            "0.050 ± 0.071",
            "0.500 ± 0.000",
            "0.550 ± 0.212",
            "0.900 ± 0.000",
        ]
    ]


def test_the_picture_models_task():
    task = digits_halves(0)
    forget, test = (task.sets[part].with_format(None) for part in ("forget", "test"))
    assert (np.asarray(forget["colour"]) == np.asarray(forget["label"])).all()
    labels, colours = np.asarray(test["label"]).reshape(-1, 2), np.asarray(test["colour"]).reshape(-1, 2)
    assert (labels[:, 0] == labels[:, 1]).all() and (colours == [0, 1]).all()
