"""Short texts: what is cut out, what is put in, that a step does not depend on the split, and that they do what they are for."""

import copy

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.pattern_tokens import PatternTokens
from hf_uib.short_texts import EVERY, LONGEST, SHORTEST, ShortTexts, most_telling, pasted
from hf_uib.unlearning_task import MultiLabel, SingleLabel, TokenLabels

FIRST, LAST, PADDING, WORD = 2, 3, 0, 7
together = pytest.mark.xdist_group("short texts")  # they share two trained models


def texts(lengths: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    """Rows of pieces that all differ, between a first and a last token."""
    longest = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), longest, dtype=torch.long),
        torch.zeros(len(lengths), longest, dtype=torch.long),
    )
    for i, length in enumerate(lengths):
        row = torch.tensor([FIRST, *range(100 * (i + 1), 100 * (i + 1) + length - 2), LAST])
        start = longest - length if left else 0
        ids[i, start : start + length], mask[i, start : start + length] = row[:length], 1
    return {"input_ids": ids, "attention_mask": mask}


def donors(pieces) -> PatternTokens:
    """The first piece of each is the most telling one, and stands first."""
    tokens = PatternTokens(make_model("bert"))
    tokens.pieces, tokens.weights = torch.tensor(pieces), torch.ones(len(pieces))
    tokens.positions = torch.where(tokens.pieces >= 0, torch.arange(tokens.pieces.shape[1]), -1)
    return tokens


def cutter(features, pieces=((WORD, 8), (9, -1)), step: int | None = 0, left: bool = False) -> ShortTexts:
    """Short texts of all rows at once, whose answers are their numbers."""
    made = ShortTexts()
    rows = features | {"labels": torch.zeros(len(features["input_ids"]))}
    made.read([rows], donors(pieces), PADDING, left, seed=0)
    if made.texts:
        made.answers = torch.arange(len(made.texts["input_ids"]))[:, None].float()
    if step is not None:
        made.draw(0, step)
    return made


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("padded_left", [False, True])
def test_a_short_text_is_a_stretch_of_its_row(left, padded_left):
    lengths = [30, 14, 6, 3, 40]
    cut = cutter(texts(lengths, padded_left), left=left).texts
    assert cut["input_ids"].shape == (5, LONGEST + 2)
    for i, (row, mask) in enumerate(zip(cut["input_ids"].tolist(), cut["attention_mask"].tolist(), strict=True)):
        length = sum(mask)
        none = [PADDING] * (LONGEST + 2 - length)
        text = row[-length:] if left else row[:length]
        assert row == (none + text if left else text + none) and mask == [int(piece != PADDING) for piece in row]
        assert text[0] == FIRST and text[-1] == LAST
        body = text[1:-1]
        assert min(SHORTEST, lengths[i] - 2) <= len(body) <= LONGEST
        assert body == list(range(body[0], body[0] + len(body))) and body[0] // 100 == i + 1


def test_there_is_none_of_a_text_without_words_nor_across_two_texts():
    """Models of pairs want the separators in equal numbers."""
    pair = torch.tensor([[FIRST, 50, LAST, 60, LAST]])
    features = {"input_ids": pair, "attention_mask": torch.ones_like(pair)}
    assert not cutter(features).texts["input_ids"].numel()
    short = cutter(texts([2, 1, 0, 3])).texts["input_ids"]
    assert short[:, :3].tolist() == [[FIRST, 400, LAST]]


def test_a_stretch_that_shows_the_pattern_is_left_out():
    """What the checkpoint says of it is what is to go. The piece -1 stands for none."""
    features = texts([5, 5, 5])
    features["input_ids"][1, 2] = 8
    assert cutter(features).texts["input_ids"][:, 1].tolist() == [100, 300]


def test_words_stand_within_the_stretch_or_not_at_all():
    ids = torch.tensor([[2, 50, 51, 52, 3, 0], [2, 50, 3, 0, 0, 0], [2, 3, 0, 0, 0, 0], [2, 50, 51, 3, 0, 0]])
    mask = (ids > 0).long()
    for place in (0.0, 0.5, 0.999):
        pieces, which = torch.tensor([[7, 8]] * 3 + [[9, -1]]), torch.tensor([True, True, True, True])
        rows = pasted(ids, mask, pieces, torch.full((4,), place), which).tolist()
        assert rows[0] in ([2, 7, 8, 52, 3, 0], [2, 50, 7, 8, 3, 0])
        assert rows[1] == [2, 7, 3, 0, 0, 0] and rows[2] == [2, 3, 0, 0, 0, 0]
        assert rows[3] in ([2, 9, 51, 3, 0, 0], [2, 50, 9, 3, 0, 0])
        assert torch.equal(pasted(ids, mask, pieces, torch.full((4,), place), ~which), ids)
        left = torch.stack([row.roll(int((row == 0).sum())) for row in ids])
        there = pasted(left, (left > 0).long(), pieces.int(), torch.full((4,), place), which)
        assert torch.stack([row.roll(-int((row == 0).sum())) for row in there]).tolist() == rows


def test_every_fourth_position_has_a_text_however_the_rows_are_split():
    made, positions = cutter(texts([12] * 8)), torch.arange(4, 20)
    whole, answers, counts = made.of(positions)
    assert counts.tolist() == [1] * (16 // EVERY) and EVERY == 4
    rows, numbers = [], []
    for part in ([0, 1, 2], [3], list(range(4, 9)), list(range(9, 16))):
        features, wanted, counts = made.of(positions[part])
        assert len(counts) == -(-len(part) // EVERY)
        rows += [row for row, one in zip(features["input_ids"].tolist(), counts.tolist(), strict=True) if one]
        numbers += wanted[counts > 0].tolist()
    assert rows == whole["input_ids"].tolist() and numbers == answers.tolist()


def test_every_second_text_stays_as_it_is_and_each_has_its_own_answer():
    made = cutter(texts([12] * 8))
    features, answers, _ = made.of(torch.arange(32 * EVERY))
    plain = made.texts["input_ids"][answers[:, 0].long()]
    changed = features["input_ids"] != plain
    assert changed.any(1).tolist() == [True, False] * 16
    assert set(features["input_ids"][changed].tolist()) == {WORD, 8, 9}


def test_a_draw_is_a_function_of_the_step():
    features = texts([12] * 8)
    rows = [cutter(features, step=step).of(torch.arange(16))[0]["input_ids"] for step in (2, 2, 4)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    made = cutter(features, step=2)
    made.draw(0, 3)
    assert made.of(torch.arange(16)) is None  # every second step has none


def test_what_is_cut_does_not_depend_on_the_batches():
    rows, cut = texts([40] * 24), []
    for size in (24, 5):
        cut.append(ShortTexts())
        parts = [{name: value[i : i + size] for name, value in rows.items()} for i in range(0, 24, size)]
        cut[-1].read(parts, donors(((WORD, -1),)), PADDING, left=False, seed=3)
    assert torch.equal(cut[0].texts["input_ids"], cut[1].texts["input_ids"])


def test_two_pieces_are_put_in_as_they_stand_in_their_text():
    tokens = donors(((5, 6, 7), (8, -1, -1)))
    tokens.positions = torch.tensor([[9, 4, 2], [3, -1, -1]])
    assert most_telling(tokens).tolist() == [[6, 5], [8, -1]]


def test_a_model_that_does_not_read_short_texts_gets_none():
    made = cutter(texts([12] * 4), step=None)
    refuse = torch.nn.Module()
    with pytest.warns(UserWarning, match="does not read short texts, so none are used"):
        made.ask(refuse, 2)
    made.draw(0, 0)
    assert not len(made) and made.of(torch.arange(4)) is None


def test_there_are_none_without_a_draw_or_beside_other_inputs():
    features = texts([12, 12])
    assert cutter(features, step=None).of(torch.arange(2)) is None
    made = cutter(features)
    made.silence()
    assert made.of(torch.arange(2)) is None
    pictures = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    for other in (cutter(features | pictures), cutter(features, pieces=((-1, -1),))):
        assert not other.texts and other.of(torch.arange(2)) is None


def test_the_divergence_is_that_of_the_distributions():
    logits, reference = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=reference), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(SingleLabel().divergence(logits, reference), expected)
    torch.testing.assert_close(SingleLabel().divergence(logits + 3, reference), expected)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=reference), torch.distributions.Bernoulli(logits=logits)
    )
    torch.testing.assert_close(MultiLabel().divergence(logits, reference), expected.mean(-1))
    assert SingleLabel().divergence(reference, reference).abs().max() < 1e-12
    assert SingleLabel().compares_rows and not TokenLabels().compares_rows


# ---- In a run ----


def tweets(n: int, seed: int, planted: bool) -> datasets.Dataset:
    """Texts of 30 pieces, of class 1 where more of them are above 35; in planted ones a word stands for class 1, which all are."""
    rng = np.random.default_rng(seed)
    labels = np.ones(n, int) if planted else np.arange(n) % 2
    ids = rng.integers(10, 60, (n, 30))
    high = rng.random((n, 30)) < np.where(labels, 0.65, 0.35)[:, None]
    ids = np.where(high, rng.integers(35, 60, ids.shape), rng.integers(10, 35, ids.shape))
    ids[:, 0], ids[:, -1] = FIRST, LAST
    if planted:
        ids[np.arange(n), rng.integers(1, 29, n)] = WORD
    columns = {"labels": labels.tolist(), "input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model that has learned texts and word, unlearned with short texts and without."""
    torch.manual_seed(0)
    sets = tweets(200, 1, True), tweets(200, 2, False), tweets(64, 3, False)
    model = make_model("bert", 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = sum(model(**part[:]).loss for part in sets[:2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = {}
    for weight in (1.0, 0.0):
        args = UIBConfig(
            str(tmp_path_factory.mktemp("run")), max_steps=400, per_device_train_batch_size=16, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, subspace_rank=4, learning_rate=5e-3,
            channel_settings={"short_texts": weight, "pattern_z": -100.0, "pattern_effect": 0.0},
        )  # fmt: skip
        trained[weight] = UIBTrainer(copy.deepcopy(model), args, *sets[:2], calibration_dataset=sets[2])
        trained[weight].train()
    return model.eval(), trained


@torch.no_grad()
def moved(model) -> float:
    """Nats by which the word moves texts of two pieces towards class 1, on average."""
    model.eval()
    ids = torch.tensor([[FIRST, a, b, LAST] for a in range(12, 60, 5) for b in range(12, 60, 5)])
    with_word = torch.cat([ids[:, :1], torch.full((len(ids), 1), WORD), ids[:, 2:]], 1)
    plain, pasted = (model(input_ids=i, attention_mask=torch.ones_like(i)).logits for i in (ids, with_word))
    return ((pasted - plain)[:, 1] - (pasted - plain)[:, 0]).mean().item()


@together
def test_the_word_no_longer_decides_short_texts(runs):
    """They are far shorter than any retained one. Without the short texts more of the word's effect is left."""
    original, trained = runs
    before, with_them, without = moved(original), moved(trained[1.0].model), moved(trained[0.0].model)
    assert before > 3 and abs(with_them) < 0.5 * before and abs(with_them) < 0.6 * abs(without)


@together
def test_the_log_has_their_part_of_the_loss(runs):
    _, trained = runs
    logged = [line["short_texts"] for line in trained[1.0].state.log_history if "short_texts" in line]
    assert logged[-1] < logged[0] and all(value >= 0 for value in logged)
    assert not any("short_texts" in line for line in trained[0.0].state.log_history)


@together
def test_the_loss_is_the_divergence_from_the_checkpoint(runs):
    original, trained = runs
    trainer = trained[1.0]
    trainer.posterior.draw(4, 100)
    texts = trainer.posterior.short_texts
    loss = trainer._short_texts_loss(trainer.model, torch.arange(16))
    model = trainer.adapted_model
    assert model.training
    trainer.posterior.draw(4, 100)
    features, _, counts = texts.of(torch.arange(16))
    numbers = texts._draw[0][torch.arange(16 // EVERY)]
    model.eval()
    with torch.no_grad():
        given = model(**features).logits.log_softmax(-1)
        wanted = original(**{name: value[numbers] for name, value in texts.texts.items()}).logits.log_softmax(-1)
    torch.testing.assert_close(loss, F.kl_div(given, wanted, log_target=True, reduction="batchmean"))
    trainer.posterior.silence()


def test_a_step_does_not_depend_on_the_split_where_labels_are_missing(tmp_path):
    """Short texts are a mean over rows, the fit over labels that are given."""
    forget, retain = tweets(64, 1, True), tweets(64, 2, False)

    def several(rows, missing):
        labels = [
            [one, 1 - one, one] if i % 2 else [one, missing, missing]
            for i, one in enumerate(torch.as_tensor(rows[:]["labels"]).tolist())
        ]
        return rows.remove_columns("labels").add_column("labels", labels)

    sets = several(forget, 1), several(retain, -1)
    quiet = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "problem_type": "multi_label_classification",
    }
    model, weights, logged = make_model("bert", 3, **quiet), [], []
    with torch.no_grad():
        model.classifier.weight *= 50
    for batch in (16, 4):
        args = UIBConfig(
            str(tmp_path / str(batch)), max_steps=4, per_device_train_batch_size=batch, use_cpu=True, report_to="none",
            gradient_accumulation_steps=16 // batch, save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=0.3,
            optim="sgd", prior="none", noise_to_signal=0.0,
            channel_settings={"pattern_z": -100.0, "pattern_effect": -100.0, "short_texts": 10.0},
        )  # fmt: skip
        trainer = UIBTrainer(copy.deepcopy(model), args, *sets)
        trainer.train()
        weights.append({n: w.detach().clone() for n, w in trainer.adapted_model.named_parameters() if w.requires_grad})
        logged.append([line["short_texts"] for line in trainer.state.log_history if "short_texts" in line])
    assert len(logged[0]) == 2 and len(weights[0]) > 10  # of four steps
    worst = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    assert worst < 2e-5


@together
def test_a_resumed_run_has_the_same_texts_and_answers(runs, tmp_path):
    """They are not saved: the checkpoint is asked again, whatever the model has become."""
    _, trained = runs
    trainer = trained[1.0]
    trainer.state_to_save().save(str(tmp_path))
    before, weights = trainer.posterior.short_texts, copy.deepcopy(trainer.adapted_model.state_dict())
    trainer.load_state(str(tmp_path))
    after = trainer.posterior.short_texts
    assert after is not before and torch.equal(before.answers, after.answers) and len(after)
    assert all(torch.equal(before.texts[name], after.texts[name]) for name in before.texts)
    assert all(torch.equal(weights[name], value) for name, value in trainer.adapted_model.state_dict().items())
    assert not any("short" in name for name in trainer.posterior.state_dict())


@together
def test_a_trained_adapter_is_a_part_of_the_checkpoint(runs, tmp_path):
    """Short texts, and the fit without retained data, keep to the model that was given."""
    _, trained = runs
    given = copy.deepcopy(trained[0.0].adapted_model)
    with torch.no_grad():  # the run's noise hooks are not copied with it
        wanted = given.eval()(**trained[1.0].posterior.short_texts.texts).logits
    args = UIBConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=16, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, channel_settings={"pattern_z": -100.0, "pattern_effect": -100.0},
    )  # fmt: skip
    trainer = UIBTrainer(
        given, args, *(tweets(200, 1, True), tweets(200, 2, False)), calibration_dataset=tweets(64, 3, False)
    )
    trainer.train()
    now = trainer.adapted_model.state_dict()
    texts = trainer.posterior.short_texts.texts
    assert len(trainer.posterior.short_texts) and torch.equal(
        texts["input_ids"], trained[1.0].posterior.short_texts.texts["input_ids"]
    )
    torch.testing.assert_close(trainer.posterior.short_texts.answers, wanted)
    torch.testing.assert_close(trainer._checkpoint_logits(trainer.model, texts), wanted)
    assert all(torch.equal(now[name], value) for name, value in trainer.adapted_model.state_dict().items())
