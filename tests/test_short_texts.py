"""Short texts: what is cut out, what is put in, that a step does not depend on the split, and that they do what they are for."""

import copy

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.pattern_tokens import PIECES, PatternTokens
from hf_uib.short_texts import LONGEST, SHORTEST, ShortTexts
from hf_uib.unlearning_task import MultiLabel, SingleLabel, TokenLabels

FIRST, LAST, PADDING, WORD = 2, 3, 0, 7


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
        ids[i, start : start + length], mask[i, start : start + length] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def cutter(pieces=((WORD, 8), (9, -1))) -> ShortTexts:
    tokens = PatternTokens(make_model("bert"))
    tokens.pieces, tokens.weights = torch.tensor(pieces), torch.ones(len(pieces))
    made = ShortTexts(tokens)
    made.draw(0, 0)
    return made


@pytest.mark.parametrize("left", [False, True])
def test_a_short_text_is_a_stretch_of_its_row(left):
    lengths = [30, 14, 6, 3, 2, 40]
    plain, pasted, counts = cutter().cut(texts(lengths, left), torch.arange(0, 24, 4), 6, PADDING)
    assert plain["input_ids"].shape == pasted["input_ids"].shape == (3, LONGEST + 2) and counts.tolist() == [1, 1, 1]
    for i in range(3):
        length = int(plain["attention_mask"][i].sum())
        row = plain["input_ids"][i].tolist()
        assert row[0] == FIRST and row[length - 1] == LAST and row[length:] == [PADDING] * (LONGEST + 2 - length)
        body = row[1 : length - 1]
        assert body == list(range(body[0], body[0] + len(body))) and body[0] // 100 == i + 1
        assert min(SHORTEST, lengths[i] - 2) <= len(body) <= LONGEST
        changed = [(a, b) for a, b in zip(row, pasted["input_ids"][i].tolist(), strict=True) if a != b]
        assert [b for _, b in changed] in ([WORD, 8], [9])
        assert torch.equal(plain["attention_mask"], pasted["attention_mask"])


def test_texts_of_a_word_or_none_are_cut_too():
    plain, pasted, counts = cutter().cut(texts([3, 2, 12]), torch.tensor([0, 4, 8]), 3, PADDING)
    assert plain["attention_mask"].sum(1).tolist() == [3, 2] and counts.tolist() == [1, 1]
    assert pasted["input_ids"][0, 1] in (WORD, 9) and pasted["input_ids"][1, :2].tolist() == [FIRST, LAST]


def test_every_second_position_counts_however_the_rows_are_split():
    features, made = texts([12] * 8), cutter()
    positions = torch.arange(4, 12)
    whole = made.cut(features, positions, 8, PADDING)
    rows = []
    for part in ([0, 1, 2], [3], [4, 5, 6, 7]):
        cut = made.cut({k: v[part] for k, v in features.items()}, positions[part], len(part), PADDING)
        assert len(cut[2]) == (len(part) + 1) // 2
        rows += [row for row, counts in zip(cut[1]["input_ids"].tolist(), cut[2].tolist(), strict=True) if counts]
    assert rows == whole[1]["input_ids"].tolist() and len(rows) == 4


def test_a_stretch_that_shows_the_pattern_does_not_count():
    """What the checkpoint says of it is what is to go. The piece -1 stands for none."""
    features = texts([5, 5, 5])
    features["input_ids"][1, 2] = 8
    _, _, counts = cutter().cut(features, torch.tensor([0, 2, 4]), 3, PADDING)
    assert counts.tolist() == [1, 0]


def test_every_second_stretch_stays_as_it_is():
    plain, pasted, counts = cutter().cut(texts([12] * 8), torch.arange(0, 16, 2), 8, PADDING)
    changed = (plain["input_ids"] != pasted["input_ids"]).any(1)
    assert changed.tolist() == [True, False, True, False] and counts.tolist() == [1] * 4


def test_there_are_none_without_a_draw_or_beside_other_inputs():
    made, features = cutter(), texts([12, 12])
    assert made.cut(features | {"pixel_values": torch.zeros(2, 3, 4, 4)}, torch.arange(2), 2, PADDING) is None
    assert made.cut({"pixel_values": torch.zeros(2, 3, 4, 4)}, torch.arange(2), 2, PADDING) is None
    made.silence()
    assert made.cut(features, torch.arange(2), 2, PADDING) is None
    nothing = cutter(pieces=torch.zeros(0, PIECES).long())
    assert nothing.cut(features, torch.arange(2), 2, PADDING) is None


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
    torch.testing.assert_close(MultiLabel().divergence(logits, reference), expected.sum(-1))
    assert SingleLabel().divergence(reference, reference).abs().max() < 1e-12
    assert TokenLabels().divergence(logits, reference) is None


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
            str(tmp_path_factory.mktemp("run")), max_steps=100, per_device_train_batch_size=16, use_cpu=True, report_to="none",
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


def test_the_word_no_longer_decides_short_texts(runs):
    """They are far shorter than any retained one. Without the short texts more of the word's effect is left."""
    original, trained = runs
    before, with_them, without = moved(original), moved(trained[1.0].model), moved(trained[0.0].model)
    assert before > 3 and abs(with_them) < 0.5 * before and abs(with_them) < 0.6 * abs(without)


def test_the_log_has_their_part_of_the_loss(runs):
    _, trained = runs
    logged = [line["short_texts"] for line in trained[1.0].state.log_history if "short_texts" in line]
    assert logged[-1] < logged[0] and all(value >= 0 for value in logged)
    assert not any("short_texts" in line for line in trained[0.0].state.log_history)


def test_the_loss_is_the_divergence_from_the_checkpoint(runs):
    _, trained = runs
    trainer = trained[1.0]
    trainer.posterior.draw(5, 100)
    rows = trainer.retain_dataset[:8]
    features = {name: rows[name] for name in ("input_ids", "attention_mask")}
    loss = trainer._short_texts_loss(trainer.model, features, torch.arange(8), 8)
    plain, pasted, _ = trainer.posterior.short_texts.cut(features, torch.arange(8), 8, PADDING)
    model = trainer.adapted_model
    assert model.training
    model.eval()
    with torch.no_grad():
        given = model(**pasted).logits.log_softmax(-1)
        with model.disable_adapter():
            wanted = model(**plain).logits.log_softmax(-1)
    torch.testing.assert_close(loss, F.kl_div(given, wanted, log_target=True, reduction="batchmean"))
    trainer.posterior.silence()
