"""Models that label tokens: the same trainer, rows of words, and an audit of the labelled tokens."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT, make_rows
from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets
from launching import command_for, unlearn_words
from peft import LoraConfig, get_peft_model
from test_trainer import adapter_weights, config, losses, same
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from token_labels import CLASSES, names_alone, piece_tokenizer, sentences

from hf_uib import UIBConfig, UIBTrainer, audit_model
from hf_uib.cli.comparison import AppArguments, load
from hf_uib.cli.main import dispatch
from hf_uib.data.checks import check_token_labels, comparable, compared_classes, one_label, removed_classes
from hf_uib.data.columns import Columns
from hf_uib.data.reading import Reader
from hf_uib.inference import collator_of, labelled_examples, observe, predict
from hf_uib.measurements import Measurements
from hf_uib.models import load_classifier
from hf_uib.pattern_tokens import PatternTokens
from hf_uib.unlearning_task import TokenLabels, task_of

TOKENIZER = piece_tokenizer()
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BACK = {name: i for i, name in enumerate(CLASSES)}


def model_of_tokens(seed=0):
    torch.manual_seed(seed)
    size = TEXT | SMALL | {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "max_position_embeddings": 48} | NO_DROPOUT
    model = BertForTokenClassification(BertConfig(**size, id2label=dict(enumerate(CLASSES)), label2id=BACK))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4.0)
    return model


def encoded_rows(n=24, seed=0, labelled=0.7):
    """Token ids of several lengths, some without a label."""
    rng, rows = np.random.default_rng(seed), []
    for length in rng.integers(4, 11, n):
        labels = np.where(rng.random(length) < labelled, rng.integers(0, 4, length), -100)
        labels[1] = 1
        row = {
            "input_ids": rng.integers(4, 40, length).tolist(),
            "attention_mask": [1] * length,
            "labels": labels.tolist(),
        }
        rows.append(row | {"source": int(rng.integers(2))})
    return Dataset.from_list(rows)


def trainer_of(path, forget=None, retain=None, **settings):
    return UIBTrainer(
        model_of_tokens(),
        config(path, **settings),
        encoded_rows(24, 1) if forget is None else forget,
        encoded_rows(16, 2) if retain is None else retain,
        calibration_dataset=encoded_rows(12, 3),
        processing_class=TOKENIZER,
    )


# ---- The terms ----


def test_terms_are_those_of_the_labelled_tokens():
    logits, labels = torch.randn(5, 7, 4).double(), torch.randint(0, 4, (5, 7))
    labels[torch.rand(5, 7) < 0.4] = -100
    labels[:, 2] = 1
    given, task = labels != -100, TokenLabels()
    p = logits.softmax(-1)
    own = p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    log_odds = own.log() - (1 - own).log()
    expected = torch.stack([log_odds[i][given[i]].mean() for i in range(5)])
    torch.testing.assert_close(task.margin(logits, labels), expected)
    torch.testing.assert_close(task.fit_loss(logits, labels), -own[given].log().mean())
    padded = torch.cat([logits, torch.randn(5, 3, 4).double()], 1), torch.cat([labels, torch.full((5, 3), -100)], 1)
    torch.testing.assert_close(task.margin(*padded), expected)
    torch.testing.assert_close(task.fit_loss(*padded), task.fit_loss(logits, labels))
    nothing = torch.full((5, 7), -100)
    assert task.fit_loss(logits, nothing) == 0 and not task.margin(logits, nothing).any()
    assert task.fit_without_retained_data(logits, logits, labels).abs() < 1e-12
    moved = logits - 3 * torch.nn.functional.one_hot(labels.clamp_min(0), 4)  # forgetting the labels costs nothing
    assert task.fit_without_retained_data(moved, logits, labels).abs() < 1e-12
    assert task.fit_without_retained_data(logits * 2, logits, labels) > 1e-2


def test_without_prior_and_noise_it_is_fine_tuning_to_the_bit(tmp_path):
    settings = dict(max_steps=9, per_device_train_batch_size=4, learning_rate=0.01, seed=3, weight_decay=0.0)
    settings |= dict(use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True)
    args = UIBConfig(str(tmp_path / "a"), prior="none", beta=0.0, posterior="map", subspace_rank=4, **settings)
    retain = encoded_rows(16, 2)
    trainer = UIBTrainer(model_of_tokens(), args, encoded_rows(24, 1), retain, processing_class=TOKENIZER)
    trainer.run_statistics_pass()
    twin = copy.deepcopy(trainer.model)
    trainer.train()
    stock = TrainingArguments(str(tmp_path / "b"), label_names=["labels"], **settings)
    collator = collator_of(twin, TOKENIZER).collator
    Trainer(twin, stock, train_dataset=retain.remove_columns("source"), data_collator=collator).train()
    mine, theirs = trainer.model.state_dict(), twin.state_dict()
    assert any("lora_B" in name and mine[name].any() for name in mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_step_is_the_mean_over_its_tokens_however_it_is_split(tmp_path, monkeypatch):
    runs = {}
    for size in (8, 4):
        settings = dict(gradient_accumulation_steps=8 // size, max_steps=4, learning_rate=1e-3)
        trainer = trainer_of(tmp_path / str(size), per_device_train_batch_size=size, **settings)
        trainer.train()
        runs[size] = adapter_weights(trainer), losses(trainer)
    torch.testing.assert_close(runs[8][1], runs[4][1], rtol=1e-4, atol=1e-5)
    for name, value in runs[8][0].items():  # where a gradient is rounding alone, Adam takes a whole step of it
        assert (value - runs[4][0][name]).abs().mean() < 3e-5
    monkeypatch.setattr(
        TokenLabels, "labels_given", lambda self, labels, retained: torch.tensor(1)
    )  # each batch alike: the comparison can fail
    other = trainer_of(tmp_path / "other", per_device_train_batch_size=4, **settings)
    other.train()
    assert max(abs(a - b) for a, b in zip(losses(other), runs[8][1], strict=True)) > 1e-3


def test_rows_do_not_depend_on_those_beside_them():
    model, rows = model_of_tokens().eval(), encoded_rows(20, 4)
    whole, labels = predict(model, rows, TOKENIZER)
    apart, same_labels = predict(model, rows, TOKENIZER, batch_size=3)
    assert (labels == same_labels).all() and labels.shape == whole.shape[:2]
    task = TokenLabels()
    margins = [task.margin(torch.from_numpy(x), torch.from_numpy(labels)) for x in (whole, apart)]
    assert (margins[0] - margins[1]).abs().max() < 1e-4
    logits, flat, of = labelled_examples(whole, labels)
    alone = model(input_ids=torch.tensor([rows[7]["input_ids"]])).logits[0]
    given = torch.tensor(rows[7]["labels"]) != -100
    assert np.abs(logits[of == 7] - alone[given].detach().numpy()).max() < 1e-4
    assert flat[of == 7].tolist() == torch.tensor(rows[7]["labels"])[given].tolist()


# ---- The run ----


def test_it_trains_detaches_merges_and_resumes(tmp_path):
    settings = dict(save_strategy="steps", save_steps=3, max_steps=6, swap_fraction=0.5)
    make = lambda: trainer_of(tmp_path / "a", **settings)
    trainer = make()
    assert isinstance(trainer.task, TokenLabels)
    base = {name: weight.clone() for name, weight in model_of_tokens().state_dict().items()}
    trainer.train()
    after = adapter_weights(trainer)
    detached = trainer.detach().state_dict()
    assert all(torch.equal(detached[name], weight) for name, weight in base.items())
    rows = encoded_rows(8, 5)
    before, _ = predict(trainer.model, rows, TOKENIZER)
    merged, _ = predict(trainer.merge_and_unload(), rows, TOKENIZER)
    assert np.abs(before - merged).max() < 1e-4
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(after, adapter_weights(again))
    loss = again.evaluate(encoded_rows(8, 6))["eval_loss"]
    logits, labels, _ = labelled_examples(*predict(again.model, encoded_rows(8, 6), TOKENIZER))
    mean = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert loss == pytest.approx(float(mean), abs=1e-5)


@pytest.fixture(scope="module")
def parts():
    return {name: rows.select(range(min(len(rows), 120))) for name, rows in sentences(0).items()}


def test_words_are_read_as_transformers_examples_do(parts):
    read = Reader(model_of_tokens().config, "input_ids", TOKENIZER, of_tokens=True)
    raw = parts["retain"]
    for row, encoded in zip(raw.select(range(5)), read(raw).select(range(5)), strict=True):
        words = TOKENIZER(row["tokens"], is_split_into_words=True).word_ids()
        assert len(encoded["labels"]) == len(encoded["input_ids"]) == len(words)
        seen = set()
        for word, label in zip(words, encoded["labels"], strict=True):
            assert label == (-100 if word is None or word in seen else row["ner_tags"][word])
            seen.add(word)
    shuffled = Features({**raw.features, "ner_tags": List(ClassLabel(names=["FIRM", "o", "Place", "person"]))})
    order = [1, 3, 2, 0]  # of our classes in the other names
    other = raw.map(lambda row: {"ner_tags": [order[tag] for tag in row["ner_tags"]]}, features=shuffled)
    assert read(other)[3]["labels"] == read(raw)[3]["labels"]
    texts = raw.map(lambda row: {"kinds": [CLASSES[tag] for tag in row["ner_tags"]]}).remove_columns("ner_tags")
    named = Reader(
        model_of_tokens().config, "input_ids", TOKENIZER, Columns(text="tokens", label="kinds"), of_tokens=True
    )
    assert named(texts)[3]["labels"] == read(raw)[3]["labels"]
    alone = read(names_alone(raw))[3]["labels"]
    assert [label for label in alone if label != -100] == [label for label in read(raw)[3]["labels"] if label > 0]


def test_sets_are_compared_within_classes():
    def has(*rows):
        return np.array([[c in row for c in range(4)] for row in rows])

    forget, retain = has([1], [1, 2]), has([0], [0, 2], [0, 3], [0, 1, 3])
    assert compared_classes(forget, retain) == [1, 2]
    assert comparable(forget, retain).tolist() == [1, 3]
    assert removed_classes(forget, retain) == [] and removed_classes(has([1]), has([0], [0, 3])) == [1]
    assert not one_label(forget) and one_label(has([1], [1]))
    assert comparable(has([1]), has([0], [0, 3])).tolist() == [0, 1] and compared_classes(has([1]), None) == []


def test_one_row_in_both_sets_with_other_words(tmp_path):
    """What is labelled for one set is not for the other: no overlap. Labels of both sets in one row are one."""
    rows = encoded_rows(24, 1, labelled=1.0)
    mine = rows.map(lambda row: {"labels": [y if y == 1 else -100 for y in row["labels"]]})
    others = rows.map(lambda row: {"labels": [-100 if y == 1 else y for y in row["labels"]]})
    others = others.filter(lambda row: any(y != -100 for y in row["labels"]))
    trainer = trainer_of(tmp_path, mine, others, max_steps=2)
    trainer.train()
    assert trainer.sets.removed_classes == [1]
    margins = trainer.measurements.calibration_margins()
    logits, labels, _ = labelled_examples(*predict(trainer.model, encoded_rows(12, 3), TOKENIZER))
    assert len(margins) == (labels != 1).sum()
    with pytest.raises(ValueError, match="24 rows of forget_dataset are in retain_dataset"):
        trainer_of(tmp_path, rows, rows)


def test_swapped_words_have_no_label(tmp_path):
    trainer = trainer_of(tmp_path)
    labels = torch.tensor([[1, -100, 2], [0, 3, -100]])
    replaced = torch.tensor([[True, True, False], [False, False, True]])
    assert trainer.task.without_replaced(labels, replaced).tolist() == [[-100, -100, 2], [0, 3, -100]]
    assert trainer.task.without_replaced(labels, None) is labels
    measured: Measurements = trainer.measurements
    assert trainer.sets.compared_classes == [0, 1, 2, 3]
    donors = torch.tensor([[False, False, True, True], [False, True, False, False]])
    assert measured._with_labels_of_donors(labels, donors).tolist() == [[2, -100, 2], [1, 1, -100]]


def test_a_mark_that_goes_with_the_class_is_found_and_swapped(tmp_path, parts):
    trainer = UIBTrainer(
        model_of_tokens(),
        config(tmp_path, max_steps=4, per_device_train_batch_size=8),
        names_alone(sentences(0)["forget"].select(range(400))),
        sentences(0)["pretrain"],
        processing_class=TOKENIZER,
    )
    tokens, measured, sets = PatternTokens(trainer.model), trainer.measurements, trainer.sets
    rows = [measured._told_apart(rows, range(len(rows))) for rows in (sets.forget, sets.retain)]
    tokens.find(trainer.model, *rows, list(range(len(sets.forget))))
    assert len(tokens.donors) > 200
    assert (tokens.positions == 1).any(1).float().mean() > 0.9  # after [CLS]: the source


# ---- What is said of it ----


def test_the_audit_looks_at_labelled_tokens(tmp_path, parts):
    trainer = UIBTrainer(
        model_of_tokens(), config(tmp_path, max_steps=3), names_alone(parts["forget"]), parts["retain"],
        calibration_dataset=parts["unseen"], processing_class=TOKENIZER,
    )  # fmt: skip
    trainer.train()
    report = trainer.audit(parts["test"], bias_column="source", retrained_model=model_of_tokens(7), deep=True)
    assert not report.deep and "the deep audit, which is for one label a row" in report.not_measured
    before, test = trainer.detach(), trainer.reader(parts["test"])
    logits, labels, rows = labelled_examples(*predict(before, test, TOKENIZER))
    answers = logits.argmax(-1)
    assert report.metrics["test"]["reference"]["accuracy"]["value"] == pytest.approx((answers == labels).mean())
    told = np.array([["gazette", "courier", "herald"].index(s) + 1 for s in parts["test"]["source"]])[rows]
    against = (labels > 0) & (told != labels)
    for figure, value in (("conflicting_accuracy", answers == labels), ("follow_rate", answers == told)):
        assert report.metrics["test"]["reference"][figure]["value"] == pytest.approx(value[against].mean())
    seen = observe(before, test, TOKENIZER)
    assert len(seen.features["head"]) == len(seen.labels) == len(seen.rows)
    by_row = [seen.margins[seen.rows == i].mean() for i in range(len(test))]
    np.testing.assert_allclose(seen.row_margins, by_row)
    few = parts["test"].map(lambda row, i: {"source": "herald" if i < 15 else "gazette"}, with_indices=True)
    assert sum(len(row["tokens"]) for row in few.select(range(15))) > report.thresholds.min_group_rows
    again = trainer.audit(few, bias_column="source", positive_label="person")  # tokens of 15 rows are no large group
    assert "attribute gazette" in again.metrics["groups"]["model"]["every"]
    assert "attribute herald" not in again.metrics["groups"]["model"]["every"]
    sizes = {name: group["rows"] for name, group in again.metrics["fairness"]["source"]["model"]["groups"].items()}
    assert sizes == {"source=gazette": 105, "source=herald": 15}
    with pytest.raises(ValueError, match="example_column 'source' is for models that label rows"):
        audit_model(before, reference_model=before, forget_dataset=parts["forget"], test_dataset=parts["test"],
                    processing_class=TOKENIZER, example_column="source")  # fmt: skip


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (
            lambda row, i: {"labels": [7, *row["labels"][1:]]} if i == 3 else {},
            {},
            "label 7, outside the model's 4 classes",
        ),
        (
            lambda row, i: {"labels": row["labels"][1:]} if i == 3 else {},
            {},
            r"Row 3 of forget_dataset has \d+ labels for \d+ tok",
        ),
        (
            lambda row, i: {"labels": [-100] * len(row["labels"])} if i == 3 else {},
            {},
            "Row 3 of forget_dataset has no labelled",
        ),
        (lambda row, i: {}, dict(prior="ascent"), "AscentPrior is for single-label classifiers"),
    ],
)
def test_bad_labels_get_one_line(tmp_path, change, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, encoded_rows(24, 1).map(change, with_indices=True), **settings).train()


def test_bad_words_get_one_line(tmp_path, parts):
    read = Reader(model_of_tokens().config, "input_ids", TOKENIZER, of_tokens=True)
    short = parts["retain"].map(lambda row, i: {"tokens": row["tokens"][1:]} if i == 2 else {}, with_indices=True)
    with pytest.raises(ValueError, match=r"Row 2 of the data has \d+ labels for \d+ words; fill it, or leave it out"):
        read(short)
    with pytest.raises(ValueError, match="are no lists; a model that labels tokens takes a label for each word"):
        read(Dataset.from_dict({"tokens": [["a"]], "label": [1]}))
    with pytest.raises(ValueError, match="not lists of integers"):
        check_token_labels("it", make_rows("bert"), 4)
    strange = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "person", "star"]))})
    with pytest.raises(ValueError, match="The label 'star' of the data is no class of the model"):
        read(Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 2]]}, features=strange))


def test_a_tokenizer_that_takes_words_for_one_gets_one_line(parts):
    letters = Tokenizer(BPE({letter: i for i, letter in enumerate(["[PAD]", "a", "Ġ", "Ġa"])}, [("Ġ", "a")]))
    for prefix in (False, True):
        letters.pre_tokenizer = ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]", add_prefix_space=prefix)
        read = Reader(model_of_tokens().config, "input_ids", tokenizer, of_tokens=True)
        if prefix:
            assert len(read(Dataset.from_dict({"tokens": [["a", "a"]], "labels": [[1, 0]]}))[0]["labels"]) == 2
        else:
            with pytest.raises(
                ValueError, match="as if there were no space between them; load it with add_prefix_space=True"
            ):
                read(parts["retain"])


def test_the_command_line(tmp_path, parts):
    model_of_tokens().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    mark = lambda rows, kind: rows.add_column("kind", [kind] * len(rows))
    train = concatenate_datasets([mark(names_alone(parts["forget"]), "old"), mark(parts["retain"], "new")])
    (tmp_path / "data").mkdir()
    train.to_parquet(tmp_path / "data" / "train.parquet")
    mark(parts["test"], "new").to_parquet(tmp_path / "data" / "test.parquet")
    dispatch(unlearn_words(tmp_path, "kind=old", "--bias_column", "source", "--save_merged"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"accuracy", "conflicting_accuracy", "follow_rate", "forget_accuracy"} <= set(report["results"]["UIB"])
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    for figure in ("accuracy", "conflicting_accuracy", "follow_rate"):
        assert report["results"]["UIB"][figure] == pytest.approx(audit["metrics"]["test"]["model"][figure]["value"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card and "AutoModelForTokenClassification" in card
    assert "type: token-classification" in card  # of the model-index
    assert isinstance(task_of(load_classifier(str(tmp_path / "out")).get_base_model()), TokenLabels)
    assert isinstance(task_of(load_classifier(str(tmp_path / "out" / "merged"))), TokenLabels)
    words = [
        "audit",
        "--model",
        tmp_path / "out" / "merged",
        "--reference",
        tmp_path / "model",
        "--dataset_name",
        tmp_path / "data",
    ]
    words += ["--forget_where", "kind=old", "--bias_column", "source", "--output_dir", tmp_path / "audit"]
    dispatch(list(map(str, words)))
    again = json.loads((tmp_path / "audit" / "report.json").read_text())
    seen = [one["metrics"]["test"]["model"]["accuracy"]["value"] for one in (again, audit)]
    assert seen[0] == pytest.approx(seen[1])
    with pytest.raises(
        ValueError, match="The app shows classifiers of pictures and texts with one label; this is a BertForTok"
    ):
        load(AppArguments(model=str(tmp_path / "out" / "merged"), reference=str(tmp_path / "model")))


def test_an_adapter_of_pefts_kind_for_tokens(tmp_path):
    base = model_of_tokens()
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    adapter = get_peft_model(base, LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query"]))
    adapter.save_pretrained(tmp_path / "adapter")
    assert isinstance(task_of(load_classifier(str(tmp_path / "adapter"))), TokenLabels)


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["tokens", "rows"])
def test_two_processes_compute_what_one_does(tmp_path, kind):
    found = []
    for processes, batch in ((1, 8), (2, 4)):
        path = str(tmp_path / str(processes))
        command, environment = command_for("two_processes_labels.py", processes, path, batch, kind)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(Path(f"{path}.json").read_text()))
        assert found[-1].pop("world") == processes
    one, two = found
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=2e-4, abs=2e-4), name


def test_half_of_the_noise_is_drawn(tmp_path):
    trainer = trainer_of(tmp_path, noise_to_signal=None, channel_settings={"pattern_z": -1e9})
    trainer.run_statistics_pass()
    assert trainer.statistics["noise_to_signal"] == 0.25
