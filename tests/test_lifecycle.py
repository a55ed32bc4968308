"""Detached, merged, asked again and undone: what becomes of an unlearned model."""

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from peft import LoraConfig, get_peft_model
from test_trainer import config
from transformers import ViTForImageClassification

from hf_uib import UIBTrainer, undo
from hf_uib.provenance import requests_of


def unlearned(path, model, seed, request, **settings):
    """A trainer that has unlearned 24 rows drawn with ``seed``."""
    trainer = UIBTrainer(
        model, config(path, max_steps=6, **settings), make_rows(n=24, seed=seed), make_rows(n=16, seed=2),
        calibration_dataset=make_rows(n=12, seed=3), eval_dataset=make_rows(n=20, seed=4),
    )  # fmt: skip
    trainer.request = request
    trainer.train()
    trainer.save_model()
    return trainer


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=make_rows(n=20, seed=4)["pixel_values"][:]).logits


def test_detach_is_the_original_to_the_bit(tmp_path):
    before = weights(make_model())
    trainer = unlearned(tmp_path, make_model(), 1, "one")
    after = weights(trainer.detach())
    assert before.keys() == after.keys() and distance(before, after) == 0.0
    assert (logits(trainer.model) - logits(trainer.detach())).abs().max() > 1e-3  # the trainer's still has the adapter
    assert torch.equal(logits(make_model()), logits(trainer.detach()))


def test_detach_brings_the_original_head_back(tmp_path):
    settings = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    trainer = UIBTrainer(
        get_peft_model(make_model(), settings), config(tmp_path, max_steps=4), make_rows(n=24, seed=1), make_rows(n=16, seed=2)
    )  # fmt: skip
    trainer.train()
    assert torch.equal(logits(make_model()), logits(trainer.detach()))
    assert not torch.equal(logits(make_model()), logits(trainer.merge_and_unload()))
    trainer.save_model()
    with pytest.raises(ValueError, match="replaced whole modules"):
        undo(trainer.merge_and_unload(), str(tmp_path))


def test_merged_says_what_the_adapted_model_says(tmp_path, recwarn):
    trainer = unlearned(tmp_path, make_model(), 1, "one")
    merged = trainer.merge_and_unload()
    assert torch.allclose(logits(merged), logits(trainer.model), atol=1e-4)
    assert not [w for w in recwarn if "too coarse" in str(w.message)]
    trainer.save_merged(str(tmp_path / "merged"))
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded), logits(merged), atol=1e-6)
    assert [one["request"] for one in requests_of(loaded)] == ["one"]


def test_a_merge_that_loses_the_adapter_is_told(tmp_path, monkeypatch):
    trainer = unlearned(tmp_path, make_model(), 1, "one")
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", lambda self, *args, **kwargs: None)
    with pytest.warns(UserWarning, match="too coarse"):
        trainer.merge_and_unload()


def test_three_requests_and_each_of_them_undone(tmp_path):
    """Weights add up: taking a request back leaves the base and what the others changed."""
    model, stages, changes = make_model(), [weights(make_model())], []
    for i, name in enumerate(("one", "two", "three")):
        trainer = unlearned(tmp_path / name, model, 10 + i, name)
        model = trainer.merge_and_unload()
        stages.append(weights(model))
        changes.append({n: stages[-1][n] - stages[-2][n] for n in stages[0]})
    assert [one["request"] for one in requests_of(model)] == ["one", "two", "three"]
    card = (tmp_path / "three" / "README.md").read_text()
    assert "Earlier requests" in card and "| 1 | one | 24 |" in card and "| 2 | two | 24 |" in card
    for i, name in enumerate(("one", "two", "three")):
        back = undo(model, str(tmp_path / name))
        expected = {n: stages[-1][n] - changes[i][n] for n in stages[0]}
        assert distance(weights(back), expected) < 1e-5
        assert distance(weights(back), stages[-1]) > 1e-3
        assert [one["request"] for one in requests_of(back)] == [n for n in ("one", "two", "three") if n != name]
        with pytest.raises(ValueError, match="none of the 2"):
            undo(back, str(tmp_path / name))
    assert distance(weights(model), stages[-1]) == 0.0  # undo works on a copy
    stage_two = undo(model, str(tmp_path / "three"))
    assert distance(weights(stage_two), stages[2]) < 1e-5


def test_undo_refuses_what_was_not_merged(tmp_path):
    trainer = unlearned(tmp_path / "one", make_model(), 1, "one")
    with pytest.raises(ValueError, match="none of the 0"):
        undo(make_model(), str(tmp_path / "one"))
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no uib_state.safetensors"):
        undo(trainer.merge_and_unload(), str(tmp_path / "plain"))


def test_fingerprints_are_those_of_the_rows(tmp_path):
    trainer = unlearned(tmp_path, make_model(), 1, "one")
    from hf_uib.data.fingerprints import fingerprint

    assert trainer.forget_fingerprint == fingerprint(make_rows(n=24, seed=1))
    assert trainer.fingerprints["retain_dataset"] == fingerprint(make_rows(n=16, seed=2)) != trainer.forget_fingerprint
    rows = make_rows(n=24, seed=1).with_format(None)
    shuffled = datasets.Dataset.from_list([rows[int(i)] for i in np.random.default_rng(0).permutation(24)])
    assert fingerprint(shuffled) == trainer.forget_fingerprint


def test_the_merged_model_names_no_base_that_lacks_its_requests(tmp_path):
    model = make_model()
    model.name_or_path = model.config._name_or_path = "tester/vit-biased"
    first = unlearned(tmp_path / "one", model, 1, "one")
    second = unlearned(tmp_path / "two", first.merge_and_unload(), 11, "two")
    assert "tester/vit-biased" in (tmp_path / "one" / "README.md").read_text()
    card = (tmp_path / "two" / "README.md").read_text()
    assert "tester/vit-biased" not in card and "the merged model of the request before" in card
    assert "vit-biased" not in (tmp_path / "two" / "adapter_config.json").read_text()
    assert [one["request"] for one in second.provenance] == ["one", "two"]


def test_an_earlier_adapter_is_merged_before_the_next_request(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    first = unlearned(tmp_path / "one", str(tmp_path / "base"), 1, "one")
    second = unlearned(tmp_path / "two", str(tmp_path / "one"), 11, "two")
    assert [one["request"] for one in requests_of(second.merge_and_unload())] == ["one", "two"]
    assert torch.allclose(logits(second.detach()), logits(first.merge_and_unload()), atol=1e-5)
    back = undo(second.merge_and_unload(), str(tmp_path / "two"))
    assert torch.allclose(logits(back), logits(first.merge_and_unload()), atol=1e-4)


def test_undo_takes_the_adapter_of_that_run_alone(tmp_path):
    trainer = unlearned(tmp_path / "one", make_model(), 1, "one", save_strategy="steps", save_steps=3)
    merged = trainer.merge_and_unload()
    unlearned(tmp_path / "other", make_model(), 1, "one", learning_rate=0.003)
    for other in (tmp_path / "one" / "checkpoint-3", tmp_path / "other"):
        with pytest.raises(ValueError, match="none of the 1"):
            undo(merged, str(other))
    assert distance(weights(undo(merged, str(tmp_path / "one"))), weights(make_model())) < 1e-5


def test_undo_of_a_named_adapter(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    trainer = unlearned(tmp_path / "one", model, 1, "one")
    assert 'subfolder="mine"' in (tmp_path / "one" / "README.md").read_text()
    assert distance(weights(undo(trainer.merge_and_unload(), str(tmp_path / "one"))), weights(make_model())) < 1e-5


@pytest.mark.parametrize("more", [{"bias": "all"}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_are_more_than_a_product_are_refused(tmp_path, more):
    with pytest.raises(ValueError, match="changes more than W"):
        settings = LoraConfig(r=4, target_modules=["q_proj"], **more)
        UIBTrainer(make_model(), config(tmp_path), make_rows(seed=1), make_rows(n=16, seed=2), peft_config=settings)


def test_a_checkpoint_with_a_trained_adapter(tmp_path):
    """What it had learned in its adapter is part of it: of `detach`, of the audit's reference, and nothing to undo."""
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    before = logits(model)
    assert not torch.allclose(before, logits(make_model()), atol=0.05)
    trainer = unlearned(tmp_path, model, 1, "one")
    assert torch.allclose(logits(trainer.detach()), before, atol=1e-5)
    seen = trainer.audit(make_rows(n=60, seed=4)).metrics["forget"]["reference"]["accuracy"]["value"]
    rows = make_rows(n=24, seed=1)
    with torch.no_grad():
        told = trainer.detach()(pixel_values=rows["pixel_values"][:]).logits.argmax(-1)
    assert seen == pytest.approx((told == rows["labels"][:]).float().mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="go back to the checkpoint"):
        undo(trainer.merge_and_unload(), str(tmp_path))
