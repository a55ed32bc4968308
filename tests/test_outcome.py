"""What a run says of itself: warnings of one that cannot have unlearned, what `evaluate` returned, and JSON that is JSON."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from huggingface_hub import ModelCard
from safetensors import safe_open
from test_trainer import config, make_trainer

from hf_uib import UIBTrainer
from hf_uib.priors import Prior
from hf_uib.serialization import dumps, is_marked, plain


def trained(path, **settings):
    trainer = make_trainer(path, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        trainer.train()
    return trainer


def card_of(trainer):
    trainer.save_model()
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


# ---- A run that cannot have unlearned -------------------------------------------------------------------------------


def test_a_run_that_reached_its_level_is_not_warned_of(tmp_path):
    """The control: the level lies above every margin."""
    trainer = trained(tmp_path, forget_target=50.0)
    assert trainer.run_warnings == []
    card = card_of(trainer)
    assert "may not have unlearned" not in card.text and "warnings" not in card.data.to_dict()["unlearning"]


def test_level_not_reached(tmp_path):
    with pytest.warns(UserWarning, match="level to forget to was not reached"):
        trainer = make_trainer(tmp_path, forget_target=-5.0, noise_to_signal=0.0)
        trainer.train()
    margins = trainer.measurements.forget_margins()
    excess = (margins + 5.0).clamp_min(0).mean().item()
    assert excess > 1
    (text,) = trainer.run_warnings
    assert f"margins still lie {excess:.1f} nats above it" in text
    card = card_of(trainer)
    assert card.data.to_dict()["unlearning"]["warnings"] == [text]
    top = card.text.split("## ")[0]
    assert "This may not have unlearned" in top and text in top


def test_a_measured_level_is_met_rank_by_rank(tmp_path):
    """The forget set as it is now against the level: the least margin with the level's least, the median with its median."""
    trainer = trained(tmp_path, noise_to_signal=0.0, max_steps=2, learning_rate=1e-6)
    margins = trainer.measurements.forget_margins().double().sort().values
    u = torch.linspace(0, 1, len(margins), dtype=torch.float64)
    level = torch.quantile(trainer.prior.level, u)
    if trainer.prior.pattern_detected:
        level = level.maximum(trainer.prior.level[128])
    expected = (margins - level).clamp_min(0).mean().item()
    assert trainer._level_excess() == pytest.approx(expected, abs=0.05)


def test_a_run_that_went_astray_is_not_told_to_learn_faster(tmp_path):
    rates = {rate: trained(tmp_path, learning_rate=rate, max_steps=8, logging_steps=2) for rate in (1e-3, 3.0)}
    assert not any("guessing" in text for text in rates[1e-3].run_warnings)
    (text,) = rates[3.0].run_warnings
    assert "fitted worse than by guessing" in text and "Lower learning_rate" in text


def test_fewer_steps_than_a_refresh(tmp_path):
    (text,) = trained(tmp_path, max_steps=3, prior_update_steps=4, forget_target=50.0).run_warnings
    assert text.startswith("3 steps are fewer than one refresh of the prior (4)")
    assert not trained(tmp_path, max_steps=4, prior_update_steps=4, forget_target=50.0).run_warnings


def test_an_adapter_at_zero_is_never_published_as_an_unlearned_model(tmp_path):
    trainer = trained(tmp_path, learning_rate=0.0, forget_target=50.0)
    assert trainer.unlearned_nothing
    (text,) = trainer.run_warnings
    assert text.startswith("Nothing was unlearned")
    assert text in card_of(trainer).text.split("## ")[0]
    for publish in (trainer.push_to_hub, lambda: trainer.save_merged(str(tmp_path / "merged"))):
        with pytest.raises(ValueError, match="Nothing was unlearned"):
            publish()
    assert not (tmp_path / "merged").exists()
    assert not trained(tmp_path, forget_target=50.0).unlearned_nothing


def test_a_trained_adapter_that_did_not_move(tmp_path):
    """It is not zero, but what it was before."""
    first = trained(tmp_path, forget_target=50.0).model
    for rate in (0.0, 0.01):
        trainer = trained(tmp_path, model=first, learning_rate=rate, forget_target=50.0)
        assert trainer.adapter_before is not None and trainer.unlearned_nothing == (rate == 0.0)


def test_what_was_not_trained_says_so(tmp_path):
    trainer = make_trainer(tmp_path)
    assert "was not trained" in card_of(trainer).text.split("## ")[0]


def test_a_checkpoint_on_the_way_says_so(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, forget_target=50.0)
    top = ModelCard.load(tmp_path / "checkpoint-2" / "README.md").text.split("## ")[0]
    assert "Training had not ended when this was written: step 2 of 4." in top


class OwnPrior(Prior):
    def forget_loss(self, logits, labels):
        return logits.square().mean()


@pytest.mark.parametrize(
    "settings", [dict(prior="none"), dict(prior="influence"), dict(prior="ascent", forget_target=-math.inf)]
)
def test_priors_without_a_level(tmp_path, settings):
    assert trained(tmp_path, **settings)._level_excess() is None


def test_a_prior_of_one_s_own_without_a_level(tmp_path):
    trainer = UIBTrainer(
        make_model(), config(tmp_path), make_rows(n=24, seed=1), make_rows(n=16, seed=2), prior=OwnPrior()
    )
    trainer.train()
    assert trainer.run_warnings == []


def test_the_outcome_costs_nothing_that_is_counted(tmp_path):
    """`measured_examples` counts the statistics and the refreshes; and nothing is computed otherwise than without it."""
    trainer = trained(tmp_path)
    before, weights = trainer.measured_examples, trainer.model.state_dict()
    trainer._level_excess()
    assert trainer.measured_examples == before
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in weights.items())


# ---- What `evaluate` returned ---------------------------------------------------------------------------------------


def evaluating(path, evaluation, **settings):
    def compute_metrics(predictions):
        right = (predictions.predictions.argmax(-1) == predictions.label_ids).mean()
        return {"accuracy": float(right), "broken": float("nan"), "f1": np.float32(0.5)}

    trainer = UIBTrainer(
        make_model(), config(path, forget_target=50.0, **settings), make_rows(n=24, seed=1), make_rows(n=16, seed=2),
        calibration_dataset=make_rows(n=12, seed=3), eval_dataset=evaluation, compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.dataset_name = "tester/scans"
    trainer.train()
    return trainer


def figures(trainer):
    found = [((r.dataset_split, r.metric_type), r.metric_value) for r in card_of(trainer).data.eval_results or []]
    assert len(dict(found)) == len(found)  # nothing twice
    return dict(found)


def test_evaluate_fills_the_model_index(tmp_path):
    trainer = evaluating(tmp_path, make_rows(n=20, seed=4), eval_strategy="steps", eval_steps=2)
    assert figures(trainer) == {}  # what was measured while training is of another model
    for _ in range(2):
        metrics = trainer.evaluate()
    assert figures(trainer) == {
        ("eval", "loss"): round(metrics["eval_loss"], 4),
        ("eval", "accuracy"): round(metrics["eval_accuracy"], 4),
        ("eval", "f1"): 0.5,
    }
    card = card_of(trainer)
    assert {r.dataset_type for r in card.data.eval_results} == {"tester/scans"}
    assert (
        f"| eval | accuracy | {metrics['eval_accuracy']:.4g} |" in card.text
        and "Nothing was measured" not in card.text
    )
    other = trainer.evaluate(make_rows(n=8, seed=7), metric_key_prefix="shifted")
    assert figures(trainer)["shifted", "loss"] == round(other["shifted_loss"], 4)
    trainer.train()
    assert figures(trainer) == {}  # of the model before


def test_evaluate_of_several_sets_beside_an_audit(tmp_path):
    trainer = evaluating(tmp_path, {"day": make_rows(n=20, seed=4), "night": make_rows(n=20, seed=5)})
    metrics = trainer.evaluate()
    audit = trainer.audit(make_rows(n=40, seed=6))
    found = figures(trainer)
    for name in ("day", "night"):
        assert found[name, "accuracy"] == round(metrics[f"eval_{name}_accuracy"], 4)
        assert found[name, "loss"] == round(metrics[f"eval_{name}_loss"], 4)
    seen = audit.metrics
    assert found["test", "accuracy"] == round(seen["test"]["model"]["accuracy"]["value"], 4)
    assert found["forget", "attack_auc"] == round(seen["membership"]["model"]["auc"]["value"], 4)
    assert found["retain", "accuracy"] == round(seen["retain"]["model"]["accuracy"]["value"], 4)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def strictly(text: str):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_plain_values():
    given = {
        "nan": float("nan"), "inf": [np.float32("inf"), -math.inf], "array": np.array([1.5, np.nan]),
        "tensor": torch.tensor([1, 2]), "count": np.int64(3), "flag": np.bool_(True), 7: {np.int64(2): None},
        "set": {1}, "pair": (1, "a"), "object": ValueError("x"),
    }  # fmt: skip
    assert strictly(dumps(given)) == {
        "nan": None, "inf": [None, None], "array": [1.5, None], "tensor": [1, 2], "count": 3, "flag": True, "7": {"2": None},
        "set": [1], "pair": [1, "a"], "object": "x",
    }  # fmt: skip
    assert plain({"level": -math.inf}, not_finite=str) == {"level": "-inf"}


def test_every_json_of_a_run_is_json(tmp_path):
    """A metric that is NaN, a level that is -inf, and a loss that is logged as infinite."""
    trainer = evaluating(
        tmp_path,
        make_rows(n=20, seed=4),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
    )
    trainer.state.log_history.append({"loss": float("inf"), "odd": np.float32("nan"), "step": 4})
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.audit(make_rows(n=12, seed=6)).to_json(str(tmp_path / "audit.json"))
    trainer.save_model()
    read = {str(path.relative_to(tmp_path)): strictly(path.read_text()) for path in tmp_path.rglob("*.json")}
    assert {
        "trainer_state.json",
        "checkpoint-2/trainer_state.json",
        "eval_results.json",
        "all_results.json",
        "audit.json",
    } <= set(read)
    assert read["trainer_state.json"]["log_history"][-1] == {"loss": None, "odd": None, "step": 4}
    logged = [entry for entry in read["checkpoint-4/trainer_state.json"]["log_history"] if "eval_loss" in entry]
    assert len(logged) == 2 and all(entry["eval_broken"] is None and entry["eval_f1"] == 0.5 for entry in logged)
    assert read["eval_results.json"]["eval_broken"] is None
    assert is_marked(str(tmp_path / "audit.json")) and not is_marked(str(tmp_path / "trainer_state.json"))
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert strictly((file.metadata() or {}).get("uib", "{}")) is not None


def test_a_level_of_minus_infinity_is_resumed_and_told_from_none(tmp_path):
    settings = dict(prior="ascent", save_strategy="steps", save_steps=3)
    whole = trained(tmp_path / "a", forget_target=-math.inf, **settings)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed = make_trainer(tmp_path / "b", forget_target=-math.inf, **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="was made with forget_target -inf, not None"):
        make_trainer(tmp_path / "c", **settings).train(resume_from_checkpoint=checkpoint)
