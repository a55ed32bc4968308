"""Bases whose weights are codes of bitsandbytes or torchao: trained as the plain model with the same weights is, and merged."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_rows
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer import config, make_trainer
from transformers import BitsAndBytesConfig, TorchAoConfig, ViTForImageClassification

from hf_uib import UIBTrainer, audit_model, retrain, undo
from hf_uib.audit.deep import compress, scaled
from hf_uib.cli.export import plain_checkpoint
from hf_uib.lora import weight_matrix
from hf_uib.models import base_is_named, fingerprint, load_classifier
from hf_uib.provenance import next_base
from hf_uib.quantised import dense_weight, dequantised, is_quantised, keep_codes, quantisation_of


def four_bits(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)


def eight_bits(**settings):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, **settings)


def torchao_int8(skipped=None):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


KINDS = {"nf4": four_bits, "int8": eight_bits, "torchao": torchao_int8}
WORDS = {"nf4": "bitsandbytes, 4-bit nf4", "int8": "bitsandbytes, 8-bit", "torchao": "torchao, Int8Tensor"}
# bitsandbytes' 8-bit products round their inputs too, in eval mode; the other two compute with the de-quantised weights
ROUNDING = {"nf4": 1e-5, "int8": 0.05, "torchao": 1e-5}
FAST = [
    "nf4",
    pytest.param("int8", marks=[pytest.mark.slow, pytest.mark.nightly]),
    pytest.param("torchao", marks=[pytest.mark.slow, pytest.mark.nightly]),
]  # a third of a minute
every_kind = pytest.mark.parametrize("kind", FAST)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ViT in a folder; bitsandbytes has blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(hidden_size=64, intermediate_size=96).save_pretrained(folder)
    return str(folder)


def quantised(checkpoint, kind, **settings):
    model = ViTForImageClassification.from_pretrained(checkpoint, quantization_config=KINDS[kind](**settings)).eval()
    keep_codes(model)
    return model


@pytest.fixture(scope="module")
def pictures():
    return {"pixel_values": torch.stack([row["pixel_values"] for row in make_rows(seed=9)])}


@torch.no_grad()
def logits(model, pictures):
    return model.eval()(**pictures).logits


@pytest.fixture(scope="module", params=FAST)
def run(request, checkpoint, tmp_path_factory):
    """A trained run on a quantised base, saved."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = make_trainer(folder, quantised(checkpoint, request.param), save_strategy="steps", save_steps=3)
    before = trainer.base_fingerprint
    trainer.train()
    trainer.save_model()
    return SimpleNamespace(kind=request.param, trainer=trainer, folder=str(folder), before=before)


# ---- What is read off the codes ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_is_what_the_layer_multiplies_with(checkpoint, kind):
    layer = quantised(checkpoint, kind).vit.layers[0].mlp.fc1.train()  # in training nothing else is rounded
    for _ in range(2):  # bitsandbytes moves its scales in the first forward
        weight = dense_weight(layer)
        with torch.no_grad():
            product = layer(torch.eye(64)) - layer.bias
        torch.testing.assert_close(product, weight.T, atol=1e-5, rtol=1e-4)
    plain = ViTForImageClassification.from_pretrained(checkpoint).vit.layers[0].mlp.fc1.weight
    assert weight.shape == plain.shape and 1e-4 < (weight - plain).abs().max() / plain.abs().max() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_copy_computes_the_same(checkpoint, kind, pictures):
    model = quantised(checkpoint, kind)
    plain = dequantised(model)
    assert is_quantised(model) and not is_quantised(plain) and dequantised(plain) is plain
    assert quantisation_of(model) == WORDS[kind] and quantisation_of(plain) is None
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain, pictures), logits(model, pictures), atol=ROUNDING[kind], rtol=0)


@pytest.mark.parametrize("kind", [FAST[0], FAST[2]])
def test_the_statistics_are_those_of_the_plain_model_with_the_same_weights(tmp_path, checkpoint, kind):
    model = quantised(checkpoint, kind)
    plain, mine = make_trainer(tmp_path, dequantised(model)), make_trainer(tmp_path, model)
    full = make_trainer(tmp_path, ViTForImageClassification.from_pretrained(checkpoint))
    for trainer in (mine, plain, full):
        trainer.run_statistics_pass()

    def distance(one, other):
        read = [
            {name: weight_matrix(layer) @ t.posterior.subspaces[name].T for name, layer in t.layers.items()}
            for t in (one, other)
        ]
        return max((read[0][name] - read[1][name]).abs().max().item() for name in read[0])

    assert distance(mine, plain) < 1e-5 < 1e-3 < distance(mine, full)
    assert mine.statistics["pattern_z"] == pytest.approx(plain.statistics["pattern_z"], abs=1e-4)
    for name, scale in mine.posterior.output_scales.items():
        torch.testing.assert_close(scale, plain.posterior.output_scales[name])


# ---- A run, and what becomes of it ----


def test_training_leaves_the_base_alone_and_comes_off_to_the_bit(run, checkpoint, pictures):
    trainer = run.trainer
    assert fingerprint(trainer.model) == run.before
    base, before = trainer.detach(), quantised(checkpoint, run.kind)
    assert quantisation_of(base) == WORDS[run.kind]
    assert torch.equal(logits(base, pictures), logits(before, pictures))
    assert (logits(trainer.adapted_model, pictures) - logits(base, pictures)).abs().max() > 0.01
    assert all(layer.lora_A["default"].weight.dtype == torch.float32 for layer in trainer.layers.values())


def test_the_adapter_goes_into_the_checkpoint_in_full_precision(run, checkpoint, tmp_path, pictures):
    trainer, plain = run.trainer, ViTForImageClassification.from_pretrained(checkpoint)
    merged = trainer.merge_and_unload()
    own = dict(merged.named_modules())
    for name, layer in trainer.layers.items():
        a, b = trainer.posterior.factors(name)
        change = layer.scaling["default"] * b @ a
        before = weight_matrix(plain.get_submodule(name))
        torch.testing.assert_close(weight_matrix(own[name]), before + change.view_as(before))
    assert not is_quantised(merged) and all(p.requires_grad for p in merged.parameters())
    trainer.save_merged(str(tmp_path))
    again = quantised(tmp_path, run.kind)
    report = audit_model(
        again, reference_model=quantised(checkpoint, run.kind),
        forget_dataset=make_rows(seed=1), test_dataset=make_rows(seed=7),
    )  # fmt: skip
    assert "accuracy" in report.metrics["test"]["model"]
    assert quantisation_of(again) == WORDS[run.kind]
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, pictures), logits(merged, pictures))
    card = (tmp_path / "README.md").read_text()
    assert f"quantised ({WORDS[run.kind]})" in card and "merged into the checkpoint in full precision" in card


def test_what_is_saved_leads_back(run, checkpoint, pictures):
    with open(os.path.join(run.folder, "adapter_config.json")) as file:
        assert json.load(file)["base_model_name_or_path"] == checkpoint
    assert not os.path.isdir(os.path.join(run.folder, "base"))
    loaded = PeftModel.from_pretrained(quantised(checkpoint, run.kind), run.folder)
    assert torch.equal(logits(loaded, pictures), logits(run.trainer.adapted_model, pictures))
    with open(os.path.join(run.folder, "README.md")) as file:
        card = file.read()
    assert f"quantization_config=...)  # {WORDS[run.kind]}\n" in card
    following = next_base(run.folder)  # the next request's: the merged model
    torch.testing.assert_close(
        logits(following, pictures), logits(run.trainer.merge_and_unload(), pictures), atol=1e-5, rtol=0
    )


def test_a_resumed_run_is_the_same(run, checkpoint):
    trainer = make_trainer(run.folder, quantised(checkpoint, run.kind))
    trainer.train(resume_from_checkpoint=os.path.join(run.folder, "checkpoint-3"))
    for name, layer in trainer.layers.items():
        assert torch.equal(layer.lora_B["default"].weight, run.trainer.layers[name].lora_B["default"].weight)


def test_the_audit_reads_the_adapted_model(run):
    report = run.trainer.audit(make_rows(seed=7))
    assert {"model", "reference"} <= set(report.metrics["test"])


@every_kind
def test_without_a_name_the_adapter_goes_into_the_dequantised_weights(tmp_path, checkpoint, kind, pictures):
    model = quantised(checkpoint, kind)
    model.name_or_path = model.config._name_or_path = ""
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    trainer.save_model()
    with pytest.warns(UserWarning, match="merged into de-quantised weights"):
        merged = trainer.merge_and_unload()
    adapted = logits(trainer.adapted_model, pictures)
    torch.testing.assert_close(logits(merged, pictures), adapted, atol=ROUNDING[kind], rtol=0)
    loaded = load_classifier(tmp_path)  # with base/, which holds the codes
    keep_codes(loaded)
    assert quantisation_of(loaded) == WORDS[kind] and torch.equal(logits(loaded, pictures), adapted)
    torch.testing.assert_close(logits(next_base(tmp_path), pictures), logits(merged, pictures))


@every_kind
def test_a_checkpoint_of_codes_is_known_by_its_name_and_is_no_full_precision(tmp_path, checkpoint, kind):
    quantised(checkpoint, kind).save_pretrained(tmp_path / "codes")
    model = ViTForImageClassification.from_pretrained(tmp_path / "codes")
    trainer = make_trainer(tmp_path, model)
    assert base_is_named(trainer.model, str(tmp_path / "codes"))
    with pytest.warns(UserWarning, match="de-quantised"):
        assert not is_quantised(trainer.merge_and_unload())


@every_kind
def test_a_base_that_is_not_its_name_any_more_is_not_merged_into_it(tmp_path, checkpoint, kind):
    model = quantised(checkpoint, kind)
    model.vit.layernorm.weight.data.mul_(1.5)
    with pytest.warns(UserWarning, match="de-quantised"):
        merged = make_trainer(tmp_path, model).merge_and_unload()
    assert torch.equal(merged.vit.layernorm.weight, model.vit.layernorm.weight)


@every_kind
def test_an_adapter_that_came_with_the_model_and_a_head_of_its_own(tmp_path, checkpoint, kind, pictures):
    skipped = {"skipped" if kind == "torchao" else "llm_int8_skip_modules": ["classifier"]}
    lora = LoraConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(quantised(checkpoint, kind, **skipped), lora)
    before = logits(model, pictures)
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    torch.testing.assert_close(logits(trainer.detach(), pictures), before, atol=ROUNDING[kind], rtol=0)
    merged = trainer.merge_and_unload()
    assert torch.equal(merged.classifier.weight, model.classifier.modules_to_save["default"].weight)


def test_the_deep_audit_trains_and_rounds_plain_copies(checkpoint, pictures):
    model = quantised(checkpoint, "nf4")
    plain = dequantised(model)
    assert not torch.equal(logits(compress(plain, "int8"), pictures), logits(plain, pictures))
    assert torch.equal(logits(scaled(plain, dequantised(model), 0.5), pictures), logits(plain, pictures))


def test_retraining_and_exporting_take_the_dequantised_weights(tmp_path, checkpoint, pictures):
    model = quantised(checkpoint, "nf4")
    again = retrain(model, make_rows(n=8), config(tmp_path / "again", max_steps=1, learning_rate=0.0))
    torch.testing.assert_close(logits(again, pictures), logits(model, pictures), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "codes")
    plain, _ = plain_checkpoint(tmp_path / "codes")
    torch.testing.assert_close(logits(plain, pictures), logits(model, pictures), atol=1e-5, rtol=0)


# ---- What is refused, in one line ----


def refused(model, tmp_path, message, **settings):
    with pytest.raises(ValueError, match=message) as caught:
        UIBTrainer(model, config(tmp_path), make_rows(seed=1), make_rows(n=16, seed=2), **settings)
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


def test_torchao_int4_cannot_be_trained(tmp_path, checkpoint):
    quantization = pytest.importorskip("torchao.quantization")
    four = TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    model = ViTForImageClassification.from_pretrained(checkpoint, quantization_config=four)
    refused(model, tmp_path, "under which Transformers trains no adapter")


@every_kind
def test_modules_of_codes_are_not_trained_whole(tmp_path, checkpoint, kind):
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    refused(quantised(checkpoint, kind), tmp_path, "modules_to_save names classifier", peft_config=lora)


def test_codes_that_were_repacked(tmp_path, checkpoint):
    model = quantised(checkpoint, "nf4")
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
    model.classifier.weight.quant_state.packing_format_for_cpu = True  # as after an evaluation, on CPUs that have it
    refused(model, tmp_path, "bitsandbytes has repacked")


def test_undo_wants_numbers(run, checkpoint):
    with pytest.raises(ValueError, match="load it unquantised"):
        undo(quantised(checkpoint, run.kind), run.folder)
