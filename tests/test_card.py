"""The unlearning card: everything it has to say, and all of its YAML there and back."""

import json

import pytest
from conftest import make_model, make_rows
from huggingface_hub import ModelCard
from test_trainer import config

import hf_uib
from hf_uib import UIBTrainer
from hf_uib.hub.card import hub_id
from hf_uib.hub.tables import groups_table, results_table


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    path = tmp_path_factory.mktemp("card")
    model = make_model()
    model.config._name_or_path, model.config._commit_hash = "tester/vit-biased", "0123abc"
    trainer = UIBTrainer(
        model, config(path / "out", max_steps=4, hub_model_id="tester/vit-unlearned", learning_rate=3e-3, beta=0.02),
        make_rows(n=40, seed=1), make_rows(n=16, seed=2),
        calibration_dataset=make_rows(n=12, seed=3), eval_dataset=make_rows(n=60, seed=4),
    )  # fmt: skip
    trainer.request = "the pictures of clinic A"
    trainer.dataset_name = "tester/scans"
    trainer.train()
    trainer.results = {
        "original": {"accuracy": 0.5},
        "UIB": {"accuracy": 0.625, "forget_accuracy": 0.25, "seconds": 3.0},
    }
    trainer.audit(trainer.eval_dataset, "source")
    trainer.card_settings = {"license": "apache-2.0", "language": "en", "tags": ["medical"]}
    trainer.save_model()
    trainer.save_merged(str(path / "out" / "merged"))
    return trainer, path / "out"


def test_yaml_there_and_back(audited):
    trainer, path = audited
    data = ModelCard.load(path / "README.md", ignore_metadata_errors=False).data
    fields = data.to_dict()
    assert data.base_model == "tester/vit-biased" and fields["base_model_relation"] == "adapter"
    assert data.library_name == "peft" and data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0" and data.language == "en" and data.datasets == "tester/scans"
    assert data.tags == ["unlearning", "uib", "hf_uib", "peft", "lora", "medical"]
    block = fields["unlearning"]
    assert block["method"] == "uib" and block["prior"] == "CalibratedPrior" and block["base_revision"] == "0123abc"
    assert block["requests"] == trainer.provenance and block["requests"][0]["forget_examples"] == 40
    assert [(s["name"], s["rows"]) for s in block["data"]] == [
        ("forget", 40),
        ("retain", 16),
        ("calibration", 12),
        ("eval", 60),
    ]
    assert block["data"][0]["fingerprint"] == trainer.forget_fingerprint
    assert block["audit"] == {"passed": trainer.audit_report.passed, "flags": trainer.audit_report.flags}
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    seen = trainer.audit_report.metrics
    assert found["test", "accuracy"] == 0.625
    assert found["forget", "accuracy, forget set"] == round(seen["forget"]["model"]["accuracy"]["value"], 4)
    assert found["retain", "accuracy, retained set"] == round(seen["retain"]["model"]["accuracy"]["value"], 4)
    assert found["forget", "membership attack, AUC"] == round(seen["membership"]["model"]["auc"]["value"], 4)
    assert {r.dataset_type for r in data.eval_results} == {"tester/scans"}
    assert ModelCard(str(ModelCard.load(path / "README.md"))).data.to_dict() == fields


def test_text_says_what_it_has_to(audited):
    trainer, path = audited
    text = (path / "README.md").read_text()
    for said in (
        "`tester/vit-biased`, revision `0123abc`", "The pictures of clinic A", f"| forget | 40 | `{trainer.forget_fingerprint}` |",
        "| original | 0.500 | not measured |", "**not measured**", "the base weights still hold what was to be forgotten",
        'PeftModel.from_pretrained(base, "tester/vit-unlearned")', "disable_adapter", "merge_and_unload", "Accuracy by group",
        "| learning_rate | 0.003 |", "| beta | 0.02 |", "not a proof of deletion", "Attacks tried", "Not tried", "apache-2.0",
        "with a derivation of our own", "@misc", "from counts of tokens, z = ",
        trainer.audit_report.verdict, f"hf_uib {hf_uib.__version__}", "transformers",
    ):  # fmt: skip
        assert said in text, said
    assert "| prior_fraction |" not in text  # a default
    for never in ("certified", "guarantee", "reproduces", str(path), "widget", "pypi.org", "scripts/"):
        assert never not in text, never


def test_card_of_the_merged_model(audited):
    trainer, path = audited
    card = ModelCard.load(path / "merged" / "README.md")
    fields = card.data.to_dict()
    assert fields["library_name"] == "transformers" and fields["base_model_relation"] == "finetune"
    assert "lora" not in fields["tags"] and "unlearning" in fields["tags"]
    assert "there is no adapter to take off" in card.text and "withdraw it (`tester/vit-biased`)" in card.text
    assert "PeftModel" not in card.text
    assert json.loads((path / "merged" / "config.json").read_text())["unlearning"] == trainer.provenance


def test_bare_card(tmp_path):
    """Nothing measured, nothing on the Hub: the card says so, and leaves the fields out that the Hub would refuse empty."""
    trainer = UIBTrainer(make_model(), config(tmp_path / "out", max_steps=1), make_rows(n=24, seed=1))
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    fields = card.data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "model-index", "datasets"} & fields.keys()
    for said in (
        "Nothing was measured",
        "Not audited",
        "No retained examples were given",
        "not on the Hub",
        "BASE_MODEL",
    ):
        assert said in card.text, said


def test_energy_is_told_where_it_was_measured(audited):
    from types import SimpleNamespace

    trainer, path = audited
    data = SimpleNamespace(emissions=0.00012, energy_consumed=0.0005, gpu_model=None, cpu_model="a CPU")
    callback = SimpleNamespace(tracker=SimpleNamespace(final_emissions_data=data))
    trainer.callback_handler.callbacks.append(callback)
    try:
        trainer.create_model_card(folder=str(path / "merged"))
    finally:
        trainer.callback_handler.callbacks.remove(callback)
    card = ModelCard.load(path / "merged" / "README.md")
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == 0.12 and "0.0005 kWh" in card.text


def test_tables():
    assert results_table({}) == ""
    groups = {f"class {i}": {"value": i / 100, "low": 0.0, "high": 1.0} for i in range(50)}
    table, count = groups_table({"model": {"every": groups}, "reference": {"every": {}}})
    assert count == 50 and "class 29" in table and "class 30" not in table
    assert groups_table({}) == ("", 0)
    assert hub_id("org/name") == "org/name" and hub_id("/abs/path") is None and hub_id(None) is None


def test_what_the_card_says_of_an_audited_run_without_results(tmp_path):
    """The audit's figures make the table; nothing is called measured that was not."""
    trainer = UIBTrainer(
        make_model(), config(tmp_path, max_steps=2, weight_decay=0.3, prior_strength=0.2), make_rows(n=40, seed=1),
        make_rows(n=16, seed=2), calibration_dataset=make_rows(n=12, seed=3),
    )  # fmt: skip
    trainer.train()
    trainer.audit(make_rows(n=60, seed=4), retrained_model=make_model(seed=5))
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    for said in (
        "| original |", "| UIB |", "| retrained |", "the row of the model retrained", "| eval | 60 |", "| weight_decay | 0.3 |",
        "| prior_strength in force | 0.2 |", "| noise_to_signal in force | 0.5 |", "| LoRA | r 4",
        "retained data with noise along the subspace in which forget and retained data differ, a KL divergence",
    ):  # fmt: skip
        assert said in card.text, said
    assert "Nothing was measured" not in card.text and "No model retrained" not in card.text
    assert {r.dataset_split for r in card.data.eval_results} == {"forget", "retain", "test"}
    trainer.statistics.update(noise_to_signal=0.0, swap_fraction=0.5)
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "README.md").text
    assert "retained data with the pattern's tokens drawn from forget rows whatever the label, a KL" in text


def test_outside_text_stays_text(tmp_path):
    trainer = UIBTrainer(make_model(), config(tmp_path, max_steps=1), make_rows(n=24, seed=1), make_rows(n=16, seed=2))
    trainer.request = "x | y\n\n# Certified\n<img src='http://evil'> {{ 7 * 7 }}\n---\nlicense: mit"
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert "\n# Certified" not in card.text and "<img" not in card.text and "49" not in card.text.split("## How")[0]
    assert (
        "license" not in card.data.to_dict()
        and card.data.to_dict()["unlearning"]["requests"][0]["request"] == trainer.request
    )
    trainer.request = ""
    trainer.create_model_card()
    assert "unlearn the examples of the forget set" in (tmp_path / "README.md").read_text()
