"""Checkpoints and adapters as people bring them: loaded right, or refused in one line before the first step."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SMALL, make_model, make_rows
from hub_server import HubServer
from launching import HERE, command_for
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_trainer import adapter_weights, config, losses, same
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from hf_uib import UIBTrainer, audit_model, undo
from hf_uib.audit.gather import loaded
from hf_uib.audit.oracle import retrain
from hf_uib.lora import (
    ADDITIVE_FIELDS,
    attach_adapter,
    is_linear,
    lora_layers,
    require_additive,
    require_known_weights,
    weight_matrix,
)
from hf_uib.metrics import worst_group_accuracy
from hf_uib.models import BASE, load_classifier, num_labels_of
from hf_uib.provenance import detached, requests_of

# A saved adapter, by the class of its headless base: name, architecture, task type, targets, modules_to_save
HEADLESS = {
    "ViTModel": ("vit", None, ["q_proj", "v_proj"], ["classifier"]),
    "Dinov2Model": ("dinov2", None, ["q_proj", "v_proj"], ["classifier"]),
    "Swinv2Model": ("swinv2", None, "all-linear", ["classifier"]),
    "BertForMaskedLM": ("bert", "SEQ_CLS", ["query", "value"], None),
    "BertModel": ("bert", "SEQ_CLS", ["query", "value"], ["pooler"]),
    "RobertaForMaskedLM": ("roberta", "SEQ_CLS", ["query", "value"], None),
    "DistilBertForMaskedLM": ("distilbert", "SEQ_CLS", ["q_lin"], ["pre_classifier"]),
    "ElectraForPreTraining": ("electra", None, ["query"], ["classifier"]),
    "AlbertForMaskedLM": ("albert", "SEQ_CLS", ["query"], None),
    "GPT2LMHeadModel": ("gpt2", "SEQ_CLS", ["c_attn"], None),
}
GPT2 = dict(
    vocab_size=60,
    n_positions=40,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_inner=24,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
)
QUIET = "ignore:.*(fan_in_fan_out|not initialized|Could not find a config).*"


def gpt2(seed=0):
    torch.manual_seed(seed)
    model = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(2.0)
    return model


def siglip():
    torch.manual_seed(0)
    vision = dict(SMALL, image_size=8, patch_size=4, num_channels=1)
    text = dict(SMALL, vocab_size=60, max_position_embeddings=16)
    config = AutoConfig.for_model("siglip", vision_config=vision, text_config=text, num_labels=3)
    return transformers.SiglipForImageClassification(config)


def rows_for(architecture, n=24, seed=0):
    return make_rows("bert" if architecture == "gpt2" else architecture, n=n, seed=seed)


def inputs_for(architecture, n=6, seed=7):
    rows = rows_for(architecture, n, seed)
    return {name: torch.as_tensor(v) for name, v in rows[:].items() if name not in ("labels", "source")}


@torch.no_grad()
def logits_of(model, inputs=None):
    return model.eval()(**(inputs or inputs_for("vit"))).logits


def trainer_on(model, path, architecture="vit", **settings):
    return UIBTrainer(
        model, config(path, **settings), rows_for(architecture, 24, 1), rows_for(architecture, 16, 2),
        calibration_dataset=rows_for(architecture, 12, 3),
    )  # fmt: skip


def saved_peft_classifier(path, kind, classes=4, bare=False, **more):
    """A headless base in ``path/base-model`` and, in ``path/adapter``, the classifier a PEFT tutorial trains on it."""
    architecture, task, targets, modules = HEADLESS[kind]
    torch.manual_seed(0)
    settings = GPT2 if architecture == "gpt2" else ARCHITECTURES[architecture]
    pooled = architecture in ("bert", "albert") and kind.endswith("ForMaskedLM")
    # The public checkpoints of BertForMaskedLM hold the pooler too
    kind = kind.replace("ForMaskedLM", "ForPreTraining") if pooled and not bare else kind
    base = getattr(transformers, kind)(AutoConfig.for_model(architecture, **settings))
    base.save_pretrained(path / "base-model")
    if pooled:
        saved = json.loads((path / "base-model" / "config.json").read_text())
        saved["architectures"] = [saved["architectures"][0].replace("ForPreTraining", "ForMaskedLM")]
        (path / "base-model" / "config.json").write_text(json.dumps(saved))
    auto = AutoModelForSequenceClassification if task else AutoModelForImageClassification
    if kind == "ElectraForPreTraining":
        auto = AutoModelForSequenceClassification
    names = {i: f"kind {i}" for i in range(classes)}
    model = auto.from_pretrained(
        path / "base-model", num_labels=classes, id2label=names, label2id={v: k for k, v in names.items()},
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    settings = LoraConfig(r=2, target_modules=targets, modules_to_save=modules, task_type=task, **more)
    model = get_peft_model(model, settings)
    for weight in model.parameters():  # as if trained
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn(weight.shape)
    model.save_pretrained(path / "adapter")
    model.eval()
    return path / "adapter", model, architecture


# ---- 1. Classifiers as PEFT saves them ----


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("kind", HEADLESS)
def test_a_peft_classifier_on_a_headless_base(kind, tmp_path):
    adapter, original, architecture = saved_peft_classifier(tmp_path, kind)
    inputs = inputs_for(architecture)
    model = load_classifier(adapter)
    assert model.config.num_labels == 4
    assert torch.equal(logits_of(model, inputs), logits_of(original, inputs))
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ViTModel", "BertForMaskedLM", "GPT2LMHeadModel"])
def test_a_peft_classifier_unlearns(kind, tmp_path):
    """By folder: trains, saves, reloads, merges, detaches."""
    adapter, original, architecture = saved_peft_classifier(tmp_path, kind)
    inputs = inputs_for(architecture)
    before = logits_of(original, inputs)
    trainer = trainer_on(str(adapter), tmp_path / "out", architecture)
    trainer.train()
    trainer.save_model()
    after = logits_of(trainer.model, inputs)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(trainer.detach(), inputs), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(trainer.merge_and_unload(), inputs), after, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out" / BASE).exists()  # its name can be loaded
    assert torch.equal(logits_of(load_classifier(tmp_path / "out"), inputs), after)
    # another process goes on with it: the drawn head below the adapter is no part of what is compared
    resumed = trainer_on(adapter, tmp_path / "out2", architecture, save_strategy="steps", save_steps=3)
    resumed.train()
    again = trainer_on(adapter, tmp_path / "out3", architecture)
    again.train(resume_from_checkpoint=tmp_path / "out2" / "checkpoint-3")
    assert same(adapter_weights(resumed), adapter_weights(again))


@pytest.mark.filterwarnings(QUIET)
def test_an_adapter_from_before_transformers_renamed_its_layers(tmp_path):
    """PEFT's tutorial on image classification, as it was published: ``target_modules=["query", "value"]``."""
    adapter, original, _ = saved_peft_classifier(tmp_path, "ViTModel")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["query", "value"]}))
    old = {
        key.replace(".layers.", ".encoder.layer.").replace("q_proj", "attention.query").replace("v_proj", "attention.value"): value
        for key, value in load_file(adapter / "adapter_model.safetensors").items()
    }  # fmt: skip
    assert "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight" in old
    save_file(old, adapter / "adapter_model.safetensors")
    model = load_classifier(adapter)
    assert torch.equal(logits_of(model), logits_of(original))
    trainer = trainer_on(model, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits_of(load_classifier(tmp_path / "out")), logits_of(trainer.model))


@pytest.mark.filterwarnings(QUIET)
def test_an_adapter_of_another_architecture(tmp_path):
    adapter, _, _ = saved_peft_classifier(tmp_path, "ViTModel")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "layers.1" not in key}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="does not fit its base") as caught:
        load_classifier(adapter)
    assert "\n" not in str(caught.value)
    make_model(hidden_size=32).save_pretrained(tmp_path / "base-model")
    with pytest.raises(ValueError, match="cannot be loaded as a classifier") as caught:
        load_classifier(adapter)
    assert "\n" not in str(caught.value)


def test_class_names_come_from_beside_the_adapter(tmp_path):
    adapter, original, _ = saved_peft_classifier(tmp_path, "ViTModel")
    assert load_classifier(adapter).config.id2label == {i: f"LABEL_{i}" for i in range(4)}
    original.get_base_model().config.save_pretrained(adapter)
    model = load_classifier(adapter)
    assert model.config.id2label == {i: f"kind {i}" for i in range(4)}
    assert model.config.label2id["kind 3"] == 3


def test_a_base_with_another_head(tmp_path):
    """Fine-tuned from a classifier of other classes (``ignore_mismatched_sizes``), as PEFT's image tutorial does."""
    make_model(num_labels=7).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(load_classifier(tmp_path / "adapter")), logits_of(model))


def test_a_head_of_the_base_stays_below_the_adapter(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    model = get_peft_model(load_classifier(tmp_path / "base"), settings)
    model.base_model.model.classifier.modules_to_save["default"].weight.data += 1.0
    model.save_pretrained(tmp_path / "adapter")
    again = load_classifier(tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(logits_of(detached(again)), logits_of(make_model()))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path, settings: settings.update(task_type="CAUSAL_LM"), "is an adapter for CAUSAL_LM"),
        (lambda path, settings: settings.update(base_model_name_or_path="no/such-base"), "No checkpoint no/such-base"),
        (lambda path, settings: settings.update(base_model_name_or_path=None), "names no base model"),
        (lambda path, settings: os.rename(path / "adapter_model.safetensors", path / "adapter_model.bin"), "pickled weights"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_loaded(change, message, tmp_path):
    adapter, _, _ = saved_peft_classifier(tmp_path, "ViTModel")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    change(adapter, settings)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_a_head_on_a_base_without_one(tmp_path):
    adapter, _, _ = saved_peft_classifier(tmp_path, "ViTModel")
    settings = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(transformers.ViTModel.from_pretrained(tmp_path / "base-model"), settings).save_pretrained(adapter)
    with pytest.raises(ValueError, match="has no classification head, and the adapter brings none"):
        load_classifier(adapter)


@pytest.mark.filterwarnings(QUIET)
def test_weights_that_would_be_drawn_at_random(tmp_path):
    """A pooler that neither base nor adapter has: another model at every load."""
    adapter, _, _ = saved_peft_classifier(tmp_path, "BertForMaskedLM", bare=True)
    with pytest.raises(ValueError, match="lacks 2 weights of BertForSequenceClassification .bert.pooler"):
        load_classifier(adapter)
    model = make_model("bert")
    weights = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    with pytest.raises(ValueError, match="lacks 2 weights .* .classifier.bias"):
        load_classifier(tmp_path / "model")
    assert load_classifier(tmp_path / "model", num_labels=7).config.num_labels == 7  # a new head was asked for


# ---- 2. The base beside the adapter ----


def test_adapter_of_a_model_given_as_an_object(tmp_path):
    trainer = trainer_on(make_model(), tmp_path / "out", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    after = logits_of(trainer.model)
    out = tmp_path / "out"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert sorted(p.name for p in (out / BASE).iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(logits_of(load_classifier(out / BASE)), logits_of(make_model()))
    assert torch.equal(logits_of(load_classifier(out)), after)
    assert not (out / "checkpoint-3" / BASE).exists()  # once, beside them all
    assert isinstance(load_classifier(out / "checkpoint-3"), PeftModel)
    written = os.stat(out / BASE / "model.safetensors").st_mtime_ns
    trainer.save_model()
    assert os.stat(out / BASE / "model.safetensors").st_mtime_ns == written
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert torch.equal(logits_of(load_classifier(tmp_path / "elsewhere")), after)
    assert not [name for name in os.listdir(out) if name.startswith("_")]


def test_adapter_of_a_second_request(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    first = trainer_on(str(tmp_path / "model"), tmp_path / "one")
    first.train()
    first.save_model()
    assert not (tmp_path / "one" / BASE).exists()
    second = UIBTrainer(tmp_path / "one", config(tmp_path / "two"), make_rows(n=24, seed=11), make_rows(n=16, seed=2))
    second.train()
    second.save_model()
    model = load_classifier(tmp_path / "two")
    assert torch.equal(logits_of(model), logits_of(second.model))
    torch.testing.assert_close(logits_of(detached(model)), logits_of(first.merge_and_unload()))
    third = UIBTrainer(tmp_path / "two", config(tmp_path / "three"), make_rows(n=24, seed=21), make_rows(n=16, seed=2))
    assert len(requests_of(third.model)) == 2
    report = audit_model(tmp_path / "two", forget_dataset=make_rows(n=24, seed=11), test_dataset=make_rows(seed=4))
    told = logits_of(first.merge_and_unload(), {"pixel_values": make_rows(seed=4)["pixel_values"][:]}).argmax(-1)
    right = (told == make_rows(seed=4)["labels"][:]).float().mean().item()
    assert report.metrics["test"]["reference"]["accuracy"]["value"] == pytest.approx(right)


def test_a_model_that_was_trained_on_after_it_was_loaded(tmp_path):
    """Its name is that of other weights: the adapter on those would be another model, without a word."""
    make_model().save_pretrained(tmp_path / "model")
    model = load_classifier(tmp_path / "model")
    with torch.no_grad():
        model.classifier.bias += 1.0
    trainer = trainer_on(model, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits_of(load_classifier(tmp_path / "out")), logits_of(trainer.model))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    # and one that was not has nothing written
    same = trainer_on(load_classifier(tmp_path / "model"), tmp_path / "same")
    same.save_model()
    assert not (tmp_path / "same" / BASE).exists()
    assert torch.equal(logits_of(load_classifier(tmp_path / "same")), logits_of(same.model))


def test_a_name_that_leads_nowhere_stays_with_the_base_beside(tmp_path):
    model = make_model()
    model.name_or_path = model.config._name_or_path = "tester/not-here"
    trainer = trainer_on(model, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    assert "tester/not-here" in (tmp_path / "out" / "adapter_config.json").read_text()
    assert torch.equal(logits_of(load_classifier(tmp_path / "out")), logits_of(trainer.model))


def test_a_base_of_another_run_is_told(tmp_path):
    trainer = trainer_on(make_model(), tmp_path / "out", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    make_model(seed=5).save_pretrained(tmp_path / "out" / BASE)
    with pytest.warns(UserWarning, match="is not the base that the adapter"):
        load_classifier(tmp_path / "out")


def test_an_adapter_of_another_name(tmp_path):
    """PEFT keeps it in a folder of that name."""
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    trainer = trainer_on(model, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits_of(load_classifier(tmp_path / "out")), logits_of(trainer.model))
    audit_model(tmp_path / "out", forget_dataset=make_rows(n=24, seed=1), test_dataset=make_rows(seed=4))
    trainer_on(tmp_path / "out", tmp_path / "next")


def test_an_interrupted_base_is_not_half_there(tmp_path, monkeypatch):
    trainer = trainer_on(make_model(), tmp_path / "out")

    def full(self, folder, **settings):
        os.makedirs(folder)
        Path(folder, "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model()
    assert not os.listdir(tmp_path / "out")


# ---- 3. Paths, and configs that name classes alone ----


def test_paths_everywhere(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    trainer = trainer_on(tmp_path / "model", tmp_path / "out", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    resumed = trainer_on(tmp_path / "model", tmp_path / "again")
    resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-3")
    assert same(adapter_weights(trainer), adapter_weights(resumed))
    trainer.save_merged(tmp_path / "merged")
    before = undo(tmp_path / "merged", tmp_path / "out")
    torch.testing.assert_close(logits_of(before), logits_of(make_model()), rtol=1e-4, atol=1e-4)
    sets = dict(forget_dataset=make_rows(n=24, seed=1), test_dataset=make_rows(n=30, seed=4))
    for_paths, for_strings = (
        audit_model(
            kind(tmp_path / "merged"), reference_model=kind(tmp_path / "model"), retrained_model=[kind(tmp_path / "model")], **sets
        )
        for kind in (Path, str)
    )  # fmt: skip
    assert str(for_paths) == str(for_strings)
    assert torch.equal(logits_of(loaded(tmp_path / "model")), logits_of(make_model()))
    args = transformers.TrainingArguments(str(tmp_path / "t"), max_steps=1, use_cpu=True, report_to="none")
    retrain(tmp_path / "model", make_rows(n=16, seed=2), args, cache_dir=tmp_path / "cache")


def test_a_config_that_names_its_classes_alone(tmp_path):
    assert num_labels_of(SimpleNamespace(config=SimpleNamespace(id2label={0: "a", 1: "b", 2: "c"}))) == 3
    assert num_labels_of(SimpleNamespace(config=SimpleNamespace(num_labels=None, id2label={0: "a", 1: "b"}))) == 2
    make_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("num_labels", None), settings.pop("label2id", None)
    path.write_text(json.dumps(settings | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    model = load_classifier(tmp_path / "model")
    assert num_labels_of(model) == 3 and model.config.id2label[2] == "c"

    class Bare(nn.Module):  # no Transformers config at all
        main_input_name = "pixel_values"

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(64, 8), nn.Linear(8, 8)])
            self.head = nn.Linear(8, 3)
            self.config = SimpleNamespace(id2label={0: "a", 1: "b", 2: "c"})

        def forward(self, pixel_values=None):
            x = pixel_values.flatten(1)
            for block in self.blocks:
                x = block(x).relu()
            return SimpleNamespace(logits=self.head(x))

    with pytest.raises(ValueError, match="has label 5, outside the model's 3 classes"):
        UIBTrainer(Bare(), config(tmp_path / "out"), make_rows(num_labels=6), make_rows(seed=2))


# ---- 4. Optimizers of other weights, and runs that changed nothing ----


def test_an_optimizer_made_before_the_trainer(tmp_path):
    model = make_model()
    made_before = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="holds none of the weights that are trained"):
        UIBTrainer(model, config(tmp_path), make_rows(seed=1), make_rows(seed=2), optimizers=(made_before, None))
    other = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(make_model().parameters()), lambda step: 1.0)
    with pytest.raises(ValueError, match="scheduler is of another optimizer"):
        UIBTrainer(make_model(), config(tmp_path), make_rows(seed=1), make_rows(seed=2), optimizers=(None, other))
    assert not os.listdir(tmp_path)


def test_an_optimizer_of_the_adapter(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = UIBTrainer(
        model, config(tmp_path), make_rows(seed=1), make_rows(n=16, seed=2), optimizers=(optimizer, scheduler)
    )
    trainer.train()
    assert not trainer.unlearned_nothing


def test_a_run_that_changed_nothing(tmp_path):
    trainer = trainer_on(make_model(), tmp_path, learning_rate=0.0)
    with pytest.warns(UserWarning, match="Nothing was unlearned: training left the adapter as it was"):
        trainer.train()
    assert trainer.unlearned_nothing
    assert requests_of(trainer.merge_and_unload()) == []  # it never becomes a model that unlearned
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        good = trainer_on(make_model(), tmp_path)
        good.train()
    assert not good.unlearned_nothing and not [w for w in seen if "Nothing was unlearned" in str(w.message)]
    assert len(requests_of(good.merge_and_unload())) == 1


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_trained_adapter_that_stayed_as_it_was(tmp_path, name):
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(make_model(), settings, adapter_name=name)
    trainer = trainer_on(model, tmp_path, learning_rate=0.0)
    with pytest.warns(UserWarning, match="Nothing was unlearned"):
        trainer.train()
    good = trainer_on(get_peft_model(make_model(), settings, adapter_name=name), tmp_path)
    good.train()
    assert trainer.unlearned_nothing and not good.unlearned_nothing


# ---- 5. What is more than a product ----


def another_value(field, value):
    """Some value that is not the default."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return {"a": 1} if isinstance(value, dict) else "something"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LoraConfig)])
def test_every_field_of_lora_config(name):
    """Allowed by name, or refused by name: whatever a later PEFT adds is refused."""
    settings = LoraConfig(r=4, target_modules=["q_proj"])
    require_additive(settings)
    other = "loftq" if name == "init_lora_weights" else another_value(name, getattr(settings, name))
    object.__setattr__(settings, name, other)
    if name in ADDITIVE_FIELDS - {"peft_type"}:
        require_additive(settings)
    else:
        with pytest.raises(ValueError, match=name if name != "peft_type" else "not LoRA"):
            require_additive(settings)


def test_a_field_of_a_later_version_is_refused():
    @dataclasses.dataclass
    class Later(LoraConfig):
        use_something_new: bool = False
        something: dict = dataclasses.field(default_factory=dict)

    require_additive(Later(r=4))
    for new in ({"use_something_new": True}, {"something": {"a": 1}}):
        with pytest.raises(ValueError, match="has (use_)?something"):
            require_additive(Later(r=4, **new))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "more",
    [
        {"trainable_token_indices": [3, 4]}, {"lora_bias": True}, {"bias": "lora_only"}, {"use_dora": True},
        {"layer_replication": [(0, 2), (1, 2)]}, {"alora_invocation_tokens": [5]}, {"target_parameters": ["x.weight"]},
        {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "eva"},
    ],
    ids=str,
)  # fmt: skip
def test_more_than_a_product(more, tmp_path):
    with pytest.raises(ValueError, match=f"has {next(iter(more))}="):
        settings = LoraConfig(r=4, target_modules=["query"], **more)
        UIBTrainer(
            make_model("bert"), config(tmp_path), make_rows("bert"), make_rows("bert", seed=2), peft_config=settings
        )
    assert not os.listdir(tmp_path)


def test_models_that_come_with_more_than_a_product(tmp_path):
    def refused(model, message):
        with pytest.raises(ValueError, match=message):
            attach_adapter(model, None, 4)

    tokens = LoraConfig(r=4, target_modules=["query"], trainable_token_indices=[3, 4])
    refused(get_peft_model(make_model("bert"), tokens), "trainable_token_indices")
    refused(get_peft_model(make_model(), AdaLoraConfig(target_modules=["q_proj"], total_step=9)), "not LoRA")
    two = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    two.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
    two.base_model.set_adapter(["default", "second"])
    refused(two, "2 adapters are active")
    merged = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    merged.merge_adapter()
    refused(merged, "merged in place")
    with pytest.raises(ValueError, match="merged in place"):
        audit_model(merged, forget_dataset=make_rows(), test_dataset=make_rows(seed=3))
    other = get_peft_model(make_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    audit_model(other, forget_dataset=make_rows(), test_dataset=make_rows(seed=3))  # comes off whole
    # An audit would take what lies below it for the model before
    biased = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    with pytest.raises(ValueError, match="has bias='all'"):
        audit_model(biased, forget_dataset=make_rows(), test_dataset=make_rows(seed=3))


# ---- 6. Quantised bases ----


class Linear8bit(nn.Linear):
    """As bitsandbytes': a linear layer that holds codes."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 100, self.bias)


class Codes(torch.Tensor):
    """As torchao's: a tensor that says it is float32, and holds something else."""


def quantised(change):
    model = make_model()
    change(model)
    return model


def with_int8(model):
    layer = model.vit.layers[0].mlp
    layer.fc1 = Linear8bit(layer.fc1)


def with_codes(model):
    layer = model.vit.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Codes), requires_grad=False)


def with_float8(model):
    layer = model.vit.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


QUANTISED = {
    "bitsandbytes": (with_int8, "Parameter of torch.int8"),
    "torchao": (with_codes, "Codes of torch.float32"),
    "fp8": (with_float8, "torch.float8_e4m3fn"),
    "by config": (lambda model: setattr(model.config, "quantization_config", {"quant_method": "gptq"}), "are gptq"),
    "by quantizer": (lambda model: setattr(model, "is_quantized", True), "are quantised"),
    "computed": (lambda model: nn.utils.parametrizations.weight_norm(model.vit.layers[0].mlp.fc1), "are computed"),
    "offloaded": (lambda model: model.vit.layers[0].mlp.fc1.to("meta"), "on `meta`"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_weights_that_are_no_numbers(kind, tmp_path):
    change, message = QUANTISED[kind]
    model = quantised(change)
    with pytest.raises(ValueError, match=message) as caught:
        UIBTrainer(model, config(tmp_path), make_rows(seed=1), make_rows(n=16, seed=2))
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


def test_undo_on_a_quantised_model(tmp_path):
    trainer = trainer_on(make_model(), tmp_path)
    trainer.train()
    trainer.save_model()
    merged = trainer.merge_and_unload()
    with_int8(merged)
    with pytest.raises(ValueError, match="torch.int8"):
        undo(merged, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_floating_point_weights_are_taken(dtype):
    require_known_weights(make_model().to(dtype))


# ---- 7. GPT-2's Conv1D ----


def test_the_weight_as_a_matrix():
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    for layer in (nn.Linear(8, 3, bias=False), Conv1D(3, 8)):
        assert is_linear(layer) and weight_matrix(layer).shape == (3, 8)
        torch.testing.assert_close(x @ weight_matrix(layer).T, layer(x))


@pytest.mark.filterwarnings("ignore")
def test_gpt2_is_the_same_model_with_linear_layers(tmp_path):
    """Conv1D replaced by nn.Linear of the same weights: the whole trajectory is that of the original."""
    plain = gpt2()
    for module in plain.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data.clone()
                setattr(module, name, linear)
    runs = []
    for model in (gpt2(), plain):
        trainer = trainer_on(model, tmp_path, "gpt2")
        trainer.train()
        runs.append(trainer)
    assert "transformer.h.0.attn.c_attn" in lora_layers(runs[0].model)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)
    ours, theirs = (t.layer_report() for t in runs)
    for one, other in zip(ours, theirs, strict=True):
        assert one["contrast"] == pytest.approx(other["contrast"], rel=1e-4)
        assert one["nats"] == pytest.approx(other["nats"], rel=1e-2, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_gpt2_merges_saves_resumes_and_is_undone(tmp_path):
    inputs = inputs_for("gpt2")
    gpt2().save_pretrained(tmp_path / "model")
    trainer = trainer_on(tmp_path / "model", tmp_path / "out", "gpt2", save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    after = logits_of(trainer.model, inputs)
    assert (after - logits_of(gpt2(), inputs)).abs().max() > 1e-3
    merged = trainer.merge_and_unload()
    assert isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(logits_of(merged, inputs), after, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(trainer.detach(), inputs), logits_of(gpt2(), inputs))
    assert torch.equal(logits_of(load_classifier(tmp_path / "out"), inputs), after)
    back = undo(merged, tmp_path / "out")
    torch.testing.assert_close(logits_of(back, inputs), logits_of(gpt2(), inputs), rtol=1e-4, atol=1e-4)
    resumed = trainer_on(tmp_path / "model", tmp_path / "again", "gpt2")
    resumed.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-3")
    assert same(adapter_weights(trainer), adapter_weights(resumed))


def test_adapters_on_the_head_alone(tmp_path):
    settings = LoraConfig(r=2, target_modules=["classifier"])
    with pytest.raises(ValueError, match="2 blocks has an adapter, only classifier; .* name those"):
        trainer_on(get_peft_model(make_model(), settings), tmp_path)
    with pytest.raises(ValueError, match="only classifier"):
        attach_adapter(make_model("bert"), settings, 4)
    # blocks of nothing but convolutions
    small = dict(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    resnet = transformers.ResNetForImageClassification(transformers.ResNetConfig(**small))
    with pytest.raises(ValueError, match=r"they hold no linear layer \(BatchNorm2d, Conv2d"):
        attach_adapter(resnet, None, 4)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_asks_its_layers(tmp_path):
    torch.manual_seed(0)
    small = transformers.MobileNetV2Config(num_channels=1, image_size=8, depth_multiplier=0.25, num_labels=3)
    trainer = trainer_on(transformers.MobileNetV2ForImageClassification(small), tmp_path)
    trainer.train()
    after = logits_of(trainer.model)
    torch.testing.assert_close(logits_of(trainer.merge_and_unload()), after, rtol=1e-4, atol=1e-4)


def test_a_weight_that_two_layers_share():
    model = make_model("bert")
    model.bert.encoder.layer[1].intermediate.dense.weight = model.bert.encoder.layer[0].intermediate.dense.weight
    with pytest.raises(ValueError, match="shares its weight with another layer"):
        attach_adapter(model, None, 4)


# ---- 8. Gradient checkpointing ----

HIERA = dict(
    image_size=[8, 8], num_channels=1, embed_dim=8, patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], depths=[1, 1],
    num_heads=[1, 2], embed_dim_multiplier=2.0, num_query_pool=1, query_stride=[2, 2], masked_unit_size=[2, 2],
    masked_unit_attention=[True, False], mlp_ratio=2.0, num_labels=3,
)  # fmt: skip


def with_seed(make):
    torch.manual_seed(0)
    return make()


CHECKPOINTED = {
    "vit": make_model,
    "swinv2": lambda: make_model("swinv2"),
    "dinov2": lambda: make_model("dinov2"),
    "hiera": lambda: with_seed(lambda: transformers.HieraForImageClassification(transformers.HieraConfig(**HIERA))),
    "siglip": siglip,
    "bert": lambda: make_model("bert"),
    "gpt2": gpt2,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing(architecture, reentrant, tmp_path):
    rows = architecture if architecture in ARCHITECTURES or architecture == "gpt2" else "vit"
    settings = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    runs = []
    for more in ({}, settings):
        trainer = trainer_on(CHECKPOINTED[architecture](), tmp_path, rows, **more)
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    first, second = map(adapter_weights, runs)
    assert max((first[n] - second[n]).abs().max().item() for n in first) < 1e-4
    assert any(weight.any() for name, weight in second.items() if "lora_B" in name and "classifier" not in name)


def resnet(seed=0):
    torch.manual_seed(seed)
    small = dict(num_channels=1, embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=3)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**small))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
    return model


def test_models_without_gradient_checkpointing(tmp_path):
    for model in (resnet(), make_model("convnext")):
        with pytest.raises(ValueError, match="has no gradient checkpointing; leave"):
            trainer_on(model, tmp_path, gradient_checkpointing=True)


# ---- 9. Layers that no gradient reaches ----


def unreached(trainer):
    weights = dict(trainer.model.named_parameters())
    return {n.removeprefix("base_model.model.") for n in weights if "lora_B" in n and not weights[n].requires_grad}


def test_layers_without_gradient_are_left_untrained(tmp_path):
    model = make_model()
    model.never_called = nn.Linear(5, 5)
    trainer = trainer_on(model, tmp_path, save_strategy="steps", save_steps=3, beta=0.0)
    trainer.train()
    only = {"never_called.lora_B.default.weight"}
    assert unreached(trainer) == only
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3)
    model = make_model()
    model.never_called = nn.Linear(5, 5)
    resumed = UIBTrainer(
        model, config(tmp_path, beta=0.0, **best), make_rows(n=24, seed=1), make_rows(n=16, seed=2),
        calibration_dataset=make_rows(n=12, seed=3), eval_dataset=make_rows(seed=4),
    )  # fmt: skip
    assert unreached(resumed) == set()
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert unreached(resumed) == only
    resumed._load_best_model()
    assert unreached(resumed) == only
    factors = [(n, p) for n, p in resumed.model.named_parameters() if ".lora_" in n and "never_called" not in n]
    assert all(p.requires_grad for _, p in factors)


def test_the_checkpoint_with_the_best_worst_class_is_kept(tmp_path):
    rows = make_rows(n=40, seed=4)

    def compute_metrics(prediction):  # as in docs/discover.md
        classes, labels = prediction.predictions.argmax(-1), prediction.label_ids
        return {"worst_class": worst_group_accuracy(classes, labels, labels)["worst_group_accuracy"]}

    every = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    best = dict(load_best_model_at_end=True, metric_for_best_model="worst_class", max_steps=8, learning_rate=0.3)
    trainer = UIBTrainer(
        make_model(), config(tmp_path, **every, **best), make_rows(n=24, seed=1), make_rows(n=16, seed=2),
        calibration_dataset=make_rows(n=12, seed=3), eval_dataset=rows, compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.train()
    logged = [line["eval_worst_class"] for line in trainer.state.log_history if "eval_worst_class" in line]
    assert len(logged) == 4 and len(set(logged)) > 1
    assert trainer.evaluate()["eval_worst_class"] == max(logged)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("beta", ["0.0", "0.01"])
def test_siglip_in_two_processes(beta, tmp_path):
    command, environment = command_for("two_processes_siglip.py", 2, tmp_path / "out", beta)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["world"] == 2 and found["moved"] > 1e-4
    assert found["untrained"] and all(".head." in name for name in found["untrained"])
    assert found["after resuming"] == found["untrained"]
    assert found["difference"] == 0.0  # between a run and its resumed half


# ---- 10. Other people's code ----


CODE = """
import torch
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput

class OurConfig(PretrainedConfig):
    model_type = "our-own"

class OurForImageClassification(PreTrainedModel):
    config_class = OurConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([nn.Linear(64, 16), nn.Linear(16, 16)])
        self.classifier = nn.Linear(16, config.num_labels)
        self.post_init()

    def forward(self, pixel_values=None, labels=None, **kwargs):
        x = pixel_values.flatten(1)
        for block in self.blocks:
            x = torch.relu(block(x))
        return ImageClassifierOutput(logits=self.classifier(x))
"""


def own_code(path):
    """A checkpoint with code, and an input() that must not be called."""
    import importlib.util

    path.mkdir()
    (path / "ours.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("ours", path / "ours.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.OurForImageClassification(module.OurConfig(num_labels=3))
    model.save_pretrained(path)
    settings = json.loads((path / "config.json").read_text())
    settings["auto_map"] = {
        "AutoConfig": "ours.OurConfig", "AutoModelForImageClassification": "ours.OurForImageClassification",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(settings))
    return model


def test_code_of_a_checkpoint_is_run_only_where_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    original = own_code(tmp_path / "model")
    for call in (
        lambda: load_classifier(tmp_path / "model"),
        lambda: UIBTrainer(str(tmp_path / "model"), config(tmp_path / "out"), make_rows(), make_rows(seed=2)),
        lambda: audit_model(tmp_path / "model", forget_dataset=make_rows(), test_dataset=make_rows()),
    ):
        with pytest.raises(ValueError, match="code of its own, which is not run.*trust_remote_code=True") as caught:
            call()
        assert "\n" not in str(caught.value)
    model = load_classifier(tmp_path / "model", trust_remote_code=True)
    assert torch.equal(logits_of(model), logits_of(original))
    trainer = trainer_on(model, tmp_path / "out")
    trainer.train()
    assert not trainer.unlearned_nothing


def test_a_package_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {}})
    )
    with pytest.raises(ValueError, match="timm") as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("class_name", ["DeiTForImageClassificationWithTeacher"])
def test_a_head_with_a_teacher(class_name, tmp_path):
    torch.manual_seed(0)
    deit = AutoConfig.for_model("deit", **ARCHITECTURES["deit"], num_labels=3)
    original = getattr(transformers, class_name)(deit)
    original.save_pretrained(tmp_path / "model")
    model = load_classifier(tmp_path / "model")
    assert type(model).__name__ == class_name and torch.equal(logits_of(model), logits_of(original))
    trainer = UIBTrainer(
        tmp_path / "model", config(tmp_path / "out"), make_rows(n=24, seed=1), make_rows(n=16, seed=2),
        calibration_dataset=make_rows(n=12, seed=3), eval_dataset=make_rows(n=20, seed=4),
    )  # fmt: skip
    trainer.train()
    rows = make_rows(n=20, seed=4)
    expected = nn.functional.cross_entropy(
        logits_of(trainer.model, {"pixel_values": rows["pixel_values"][:]}), rows["labels"][:]
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.audit(rows)


# ---- 11. No pickle from outside ----


def test_pickled_weights_are_refused(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights alone.*save_pretrained") as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pickled_adapter_is_not_resumed_nor_undone(tmp_path):
    trainer = trainer_on(make_model(), tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    for folder, call in (
        (
            tmp_path / "checkpoint-3",
            lambda path: trainer_on(make_model(), tmp_path / "b").train(resume_from_checkpoint=path),
        ),
        (tmp_path / "checkpoint-6", lambda path: undo(trainer.merge_and_unload(), path)),
    ):
        os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
        with pytest.raises(ValueError, match="pickled weights run code"):
            call(folder)


def test_weights_of_another_shape(tmp_path):
    make_model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_size": 32}))
    with pytest.raises(ValueError, match="cannot be loaded as a classifier") as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.nightly
@pytest.mark.slow
def test_by_hub_id(tmp_path):
    """With nothing on stdin, as in a job."""
    with HubServer({"hf_tester": "tester"}) as hub:
        environment = os.environ | {
            "PYTHONPATH": f"{HERE}{os.pathsep}{os.path.join(HERE, '..')}", "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_tester", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        command = [sys.executable, os.path.join(HERE, "checkpoints_on_the_hub.py"), str(tmp_path)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert "failed" not in seen, (seen, done.stderr[-2000:])
    assert seen["names"] == ["kind 0", "kind 1", "kind 2", "kind 3"] and seen["same"] and seen["reloaded"]
    assert not seen["base beside"] and 0 <= seen["audited"] <= 1
    assert "tester/pickled has pickled weights alone" in seen["pickled"]
    assert "tester/pickled-adapter has no adapter_model.safetensors" in seen["pickled adapter"]
    assert "tester/own-code comes with code of its own" in seen["own code"]
    assert seen["trusted"] == "OurForImageClassification"
    assert seen["here"] and seen["there"] == []
    assert "names no base model" in seen["nameless"]
    assert not any("\n" in value for value in seen.values() if isinstance(value, str))


# ---- 12. Hooks leave with the adapter ----


def hooks_of(model):
    return [
        hook for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks.values()
    ]


def test_a_merged_resnet_trains_its_running_statistics_again(tmp_path):
    trainer = trainer_on(resnet(), tmp_path)
    before = {n: b.clone() for n, b in trainer.model.named_buffers() if "running" in n}
    trainer.train()
    assert all(
        torch.equal(b, before[n]) for n, b in trainer.model.named_buffers() if n in before
    )  # not while it unlearns
    direct = copy.deepcopy(trainer.model).merge_and_unload()  # PEFT's own
    for plain in (trainer.merge_and_unload(), trainer.detach(), direct):
        assert hooks_of(plain) == []
        plain.requires_grad_(True).train()
        layers = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
        old = [m.running_mean.clone() for m in layers]
        plain(**inputs_for("vit")).logits.sum().backward()
        assert all(m.training and not torch.equal(m.running_mean, was) for m, was in zip(layers, old, strict=True))


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"trainable_factors": "both"}])
def test_what_is_merged_can_be_trained_copied_and_pickled(settings, tmp_path):
    model = make_model()
    model.vit.embeddings.position_embeddings.requires_grad_(False)  # the user's choice stays
    trainer = trainer_on(model, tmp_path / "out", **settings)
    trainer.train()
    for plain in (trainer.merge_and_unload(), trainer.detach()):
        assert hooks_of(plain) == [] and not any(getattr(m, "gradient_checkpointing", False) for m in plain.modules())
        frozen = [n for n, p in plain.named_parameters() if not p.requires_grad]
        assert frozen == ["vit.embeddings.position_embeddings"]
        torch.save(plain, tmp_path / "model.pt")
        args = transformers.TrainingArguments(
            str(tmp_path / "further"),
            max_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        columns = make_rows(n=16, seed=2).remove_columns("source")
        was = plain.classifier.weight.detach().clone()
        transformers.Trainer(plain, args, train_dataset=columns).train()
        assert not torch.equal(was, plain.classifier.weight)
    assert hooks_of(trainer.model)  # the trainer's own has them still
