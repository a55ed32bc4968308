"""What is served says what was audited: adapters as servers of adapters read them, a Transformers pipeline, and the page."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from PIL import Image
from safetensors.torch import load_file
from test_cli import FAST, call
from test_demo_app import WORDS
from test_trainer import config
from transformers import BertTokenizerFast, LlamaConfig, LlamaForSequenceClassification, ViTImageProcessorPil, pipeline

from hf_uib import UIBTrainer, undo
from hf_uib.cli import app
from hf_uib.cli.comparison import AppArguments, load
from hf_uib.cli.unlearn import UnlearnArguments, check_job
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.lora import attach_adapter, serving_peft_config
from hf_uib.models import load_classifier

LONG = " ".join(WORDS[5:] * 20)  # more tokens than there are positions


def llama():
    torch.manual_seed(0)
    settings = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return LlamaForSequenceClassification(
        LlamaConfig(**settings, num_labels=3, pad_token_id=1, max_position_embeddings=40)
    )


MODELS = {"bert": lambda: make_model("bert"), "llama": llama}


def served_weights(adapter, base) -> dict[str, torch.Tensor]:
    """The weights that a server of adapters computes with: W + s B A from the names in the two files, and the head of the adapter.

    It asks for what vLLM's loader of PEFT adapters does: LoRA alone, one rank, no bias, no pattern; every tensor is a factor,
    ``base_model.model.<module>.lora_A.weight`` or ``lora_B``, or a weight of the head, of the shape that the base's has.
    """
    with open(os.path.join(adapter, "adapter_config.json")) as file:
        settings = json.load(file)
    assert settings["peft_type"] == "LORA" and settings["bias"] == "none"
    assert not any(settings[name] for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"))
    assert settings["modules_to_save"] in (["classifier"], ["score"])
    weights = load_file(os.path.join(base, "model.safetensors"))
    tensors = load_file(os.path.join(adapter, "adapter_model.safetensors"))
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        assert key.startswith("base_model.model."), key
        name = key.removeprefix("base_model.model.")
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("lora_A", "lora_B"):
            factors.setdefault(module, {})[kind] = tensor
        else:
            assert name.partition(".")[0] in settings["modules_to_save"] and weights[name].shape == tensor.shape, key
            weights[name] = tensor
    for module, pair in factors.items():
        wide, tall = pair["lora_A"], pair["lora_B"]
        assert wide.shape[0] == tall.shape[1] == settings["r"] <= 16  # vLLM's --max-lora-rank is 16 unless told
        weights[f"{module}.weight"] = (
            weights[f"{module}.weight"] + settings["lora_alpha"] / settings["r"] * tall @ wide
        )
    assert len(factors) > 4
    return weights


def text_rows(n, seed):
    return make_rows("bert", n=n, seed=seed)


def serving_trainer(model, folder, **settings):
    return UIBTrainer(
        model, config(folder, max_steps=4, **settings), text_rows(24, 1), text_rows(16, 2), peft_config="serving"
    )


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_read_as_servers_read_it(name, tmp_path):
    MODELS[name]().save_pretrained(tmp_path / "base")
    trainer = serving_trainer(load_classifier(tmp_path / "base"), tmp_path / "out")
    trainer.train()
    trainer.save_model()
    served = type(trainer.model.get_base_model()).from_pretrained(tmp_path / "base")
    served.load_state_dict(served_weights(tmp_path / "out", tmp_path / "base"), strict=True)
    test = text_rows(20, 3)
    (got, _), (wanted, _), (before, _) = (
        predict(m, test) for m in (served, trainer.model, load_classifier(tmp_path / "base"))
    )
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(wanted - before).max() > 1e-3
    head = (
        load_file(tmp_path / "base" / "model.safetensors"),
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
    )
    weight = {"bert": "classifier.weight", "llama": "score.weight"}[name]
    assert not torch.equal(head[0][weight], head[1][f"base_model.model.{weight}"])  # it was trained


def test_the_default_adapter_is_not_for_servers(tmp_path):
    """The control: its head has factors, which the loader above does not take for a head."""
    make_model("bert").save_pretrained(tmp_path / "base")
    attach_adapter(load_classifier(tmp_path / "base"), None, 4).save_pretrained(tmp_path / "out")
    with pytest.raises(AssertionError):
        served_weights(tmp_path / "out", tmp_path / "base")


def test_what_holds_of_a_head_outside_the_bound(tmp_path):
    model = make_model("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = serving_trainer(model, tmp_path)
    trainer.train()
    assert not [name for name in trainer.layers if "classifier" in name] and all(
        "encoder" in name for name in trainer.layers
    )
    detached = trainer.detach().state_dict()
    assert detached.keys() == before.keys() and all(torch.equal(detached[name], before[name]) for name in before)
    merged = trainer.merge_and_unload()
    assert not torch.equal(merged.classifier.weight, before["classifier.weight"])
    trainer.save_model()
    with pytest.raises(ValueError, match="replaced whole modules"):
        undo(merged, str(tmp_path))


@pytest.mark.slow
def test_an_adapter_of_a_server_resumes(tmp_path):
    trainer = serving_trainer(make_model("bert"), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    again = serving_trainer(make_model("bert"), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), (_, other) in zip(
        trainer.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("architecture", ["distilbert", "albert"])
def test_a_model_that_servers_cannot_take_is_one_line(architecture):
    with pytest.raises(ValueError, match="leave peft_config out, and serve the merged model") as caught:
        serving_peft_config(make_model(architecture), 4)
    assert "\n" not in str(caught.value)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="give 'serving', a LoraConfig or nothing"):
        attach_adapter(make_model("bert"), "speedy", 4)
    job = UnlearnArguments("model", "data", forget_where=["a=b"], peft_config="speedy")
    with pytest.raises(ValueError, match="--peft_config is 'speedy'"):
        check_job(job)


# ---- A pipeline and the page against the audited model ----


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """What `hf-uib unlearn --peft_config serving --save_merged` leaves of a small BERT, and the texts of its test set."""
    folder = tmp_path_factory.mktemp("texts")
    model = make_model("bert", num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    model.save_pretrained(folder / "base")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    random, written = np.random.default_rng(0), []
    (folder / "data").mkdir()
    for split, count in (("train", 40), ("test", 12)):
        with open(folder / "data" / f"{split}.csv", "w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["text", "label", "source"])
            for i in range(count):
                written.append(" ".join(random.choice(WORDS[5:], 2 + i % 7)))
                lines.writerow([written[-1], "abc"[i % 3], ["ours", "theirs"][i % 2]])
    call(
        "unlearn", "--model_name_or_path", folder / "base", "--dataset_name", folder / "data", "--forget_where", "source=ours",
        "--peft_config", "serving", "--save_merged", "--output_dir", folder / "out", *FAST,
    )  # fmt: skip
    return folder, written[-12:]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """What a run leaves of a small ViT, and pictures of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    model = make_model("vit", num_channels=3, id2label={0: "a", 1: "b", 2: "c"})
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    random = np.random.default_rng(0)
    given = [Image.fromarray(random.integers(0, 256, (8 + i, 9, 3), dtype=np.uint8)) for i in range(12)]
    import datasets

    rows = datasets.Dataset.from_dict({"image": given, "label": [0, 1, 2] * 4})
    rows = rows.cast_column("image", datasets.Image())
    model.save_pretrained(folder / "base")
    trainer = UIBTrainer(
        load_classifier(folder / "base"), config(folder / "out", max_steps=4), rows.select(range(6)), rows.select(range(6, 12)),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_merged(str(folder / "out" / "merged"))
    processor.save_pretrained(folder / "base")
    return folder, given


def audited(folder, column: str, values: list) -> tuple[list[str], np.ndarray]:
    """Labels and probabilities ``[n, classes]`` of the merged model, read as the audit reads: rows, batches and all."""
    import datasets
    from transformers import AutoImageProcessor, AutoTokenizer

    model = load_classifier(folder)
    kind = AutoTokenizer if column == "text" else AutoImageProcessor
    processor = kind.from_pretrained(folder, **({} if column == "text" else {"backend": "pil"}))
    rows = datasets.Dataset.from_dict({column: values, "label": [0] * len(values)})
    rows = rows if column == "text" else rows.cast_column(column, datasets.Image())
    longest = model.config.max_position_embeddings if column == "text" else None
    logits, _ = predict(model, encode(rows, processor, model.main_input_name, longest), processor)
    chances = torch.from_numpy(logits).softmax(-1).numpy()
    return [model.config.id2label[i] for i in chances.argmax(-1)], chances


def shown(pair, given) -> tuple[dict, dict, str]:
    return app._compare(pair)(given)


@pytest.mark.slow
def test_a_text_pipeline_and_the_page_say_what_was_audited(texts):
    pytest.importorskip("gradio")
    folder, sentences = texts
    sentences = [*sentences, LONG]
    labels, chances = audited(folder / "out" / "merged", "text", sentences)
    answers = pipeline(
        "text-classification", model=str(folder / "out" / "merged"), top_k=None, truncation=True, max_length=40
    )
    pair = load(AppArguments(model=str(folder / "out" / "merged"), reference=str(folder / "base")))
    adapted = load(AppArguments(adapter=str(folder / "out"), base=str(folder / "base")))
    for i, sentence in enumerate(sentences):
        (told,) = answers([sentence])
        assert told[0]["label"] == labels[i]
        wanted = dict(zip("abc", map(float, chances[i]), strict=True))
        assert {one["label"]: one["score"] for one in told} == pytest.approx(wanted, abs=1e-6)
        assert shown(pair, sentence)[1] == pytest.approx(wanted, abs=1e-6)
        assert shown(adapted, sentence)[1] == pytest.approx(wanted, abs=1e-5)  # merging rounds
    assert max(np.abs(chances - chances[0]).max(-1)) > 1e-3


def test_a_picture_pipeline_and_the_page_say_what_was_audited(pictures):
    pytest.importorskip("gradio")
    folder, given = pictures
    labels, chances = audited(folder / "out" / "merged", "image", given)
    answers = pipeline("image-classification", model=str(folder / "out" / "merged"), top_k=3)
    pair = load(AppArguments(model=str(folder / "out" / "merged"), reference=str(folder / "base")))
    for i, picture in enumerate(given):
        told = answers(picture)
        assert told[0]["label"] == labels[i]
        wanted = dict(zip("abc", map(float, chances[i]), strict=True))
        assert {one["label"]: one["score"] for one in told} == pytest.approx(wanted, abs=1e-6)
        assert shown(pair, picture)[1] == pytest.approx(wanted, abs=1e-6)


def test_the_page_cuts_long_texts_as_the_audit_does(tmp_path):
    """RoBERTa counts positions from the padding token's id on: two fewer than its config says."""
    from transformers import RobertaTokenizerFast

    from hf_uib.cli.comparison import _processor

    vocab = {
        token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *map(chr, range(97, 123))])
    }
    model = make_model("roberta")
    RobertaTokenizerFast(vocab=vocab, merges=[]).save_pretrained(tmp_path)
    processor = _processor(model, str(tmp_path))
    assert processor.model_max_length == 40 - 2
    inputs = processor(["abc" * 50], return_tensors="pt", truncation=True)
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 3)
