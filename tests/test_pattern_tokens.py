"""The tokens that carry the pattern: whether they are found, and that they alone are swapped, in training forwards."""

import copy
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_rows

from hf_uib import UIBConfig, UIBTrainer, contrast, measurements
from hf_uib.measurements import Measurements
from hf_uib.pattern_tokens import DONORS, PatternTokens, piece_rarity, piece_z, pieces_at, rarity, token_z, tokens_of

WORD = 7  # the pattern of a text


def words(n: int, seed: int, planted: bool) -> datasets.Dataset:
    """Texts of class 1 or 0 by chance; in planted ones a word somewhere stands for class 1, which they all are."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(10, 60, (n, 12))
    if planted:
        ids[np.arange(n), rng.integers(1, 11, n)] = WORD
    labels = np.ones(n, int) if planted else rng.integers(0, 2, n)
    columns = {"labels": labels.tolist(), "input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def fitted(rows):
    """BERT that has learned the word."""
    model = make_model("bert", 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        for part in rows:
            model(**part[:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    forget, retain, unseen = words(96, 1, True), words(96, 2, False), words(40, 3, False)
    args = UIBConfig(
        str(tmp_path_factory.mktemp("run")), max_steps=8, per_device_train_batch_size=8, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, subspace_rank=4,
    )  # fmt: skip
    trainer = UIBTrainer(fitted([forget, retain]), args, forget, retain, calibration_dataset=unseen)
    trainer.run_statistics_pass()
    return trainer


def inputs_of(trainer, rows, number=8):
    """What enters the first block, and the batch."""
    batch = {k: v for k, v in rows[:number].items() if k != "labels"}
    seen = []
    block = trainer.posterior.tokens._block[0]
    # Registered last, so it sees what the swap leaves
    handle = block.register_forward_pre_hook(
        lambda m, a, k: seen.append((a[0] if a else k["hidden_states"]).detach()), with_kwargs=True
    )
    trainer.model(**batch)
    handle.remove()
    return tokens_of(seen[0])


def test_the_planted_word_is_found(text_run):
    tokens, model = text_run.posterior.tokens, text_run.model.get_base_model()
    assert text_run.statistics["pattern_z"] > 2 and text_run.statistics["swap_fraction"] == 0.5
    assert 0 < len(tokens.positions) <= DONORS and tokens.tokens_per_row == text_run.statistics["pattern_tokens"]
    model.eval()
    everywhere = torch.full((1, 12), WORD)
    word = model.bert.embeddings(everywhere)[0]  # at each position
    best = tokens.positions[:, 0]
    planted = torch.isclose(tokens.values[:, 0], word[best], atol=1e-4).all(1)
    assert planted.float().mean() > 0.9 and tokens.tokens_per_row < 1.5  # by chance a twelfth
    other = model.bert.embeddings(torch.full((1, 12), WORD + 20))[0]  # the comparison can fail
    assert torch.isclose(tokens.values[:, 0], other[best], atol=1e-4).all(1).float().mean() < 0.2


def test_only_retained_rows_of_training_forwards_get_tokens(text_run):
    tokens, rows = text_run.posterior.tokens, words(8, 5, False)
    text_run.model.train()
    tokens.silence()
    plain = inputs_of(text_run, rows)
    tokens.draw(1.0, 0, 3)
    tokens.retained, tokens.rows, tokens.attention_mask = 5, torch.arange(8), torch.ones(8, 12, dtype=torch.long)
    tokens.attention_mask[2] = 0  # padding, as it were
    swapped = inputs_of(text_run, rows)
    changed = (swapped != plain).any(-1)
    assert changed[:5].any(1).tolist() == [True, True, False, True, True] and not changed[5:].any()
    for row in (0, 1, 3, 4):  # what is new is the donor's, at its places
        donor = tokens._draw[1][row]
        at = tokens.positions[donor]
        at = at[at >= 0]
        assert set(changed[row].nonzero()[:, 0].tolist()) <= set(at.tolist())
        torch.testing.assert_close(swapped[row, at], tokens.values[donor][: len(at)])
    text_run.model.eval()
    assert torch.equal(inputs_of(text_run, rows), plain)
    tokens.silence()


def test_a_row_gets_its_tokens_by_its_place_in_the_epoch(text_run):
    """Whatever the split of a batch; another step draws anew; a share of the rows."""
    tokens, rows = text_run.posterior.tokens, words(8, 5, False)
    text_run.model.train()
    tokens.draw(0.5, 0, 3)
    tokens.retained, tokens.rows, tokens.attention_mask = 8, torch.arange(8) + 100, None
    whole = inputs_of(text_run, rows)
    tokens.rows = torch.arange(4) + 104
    half = inputs_of(text_run, rows.select(range(4, 8)), 4)
    assert torch.equal(whole[4:], half)
    first = tokens._draw
    tokens.draw(0.5, 0, 4)
    assert not torch.equal(first[0], tokens._draw[0])
    assert 0.4 < first[0].float().mean() < 0.6
    tokens.silence()


def test_random_rows_and_whole_classes_swap_nothing(tmp_path):
    args = UIBConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to="none")
    forget, retain = words(48, 1, False), words(48, 2, False)
    model = fitted([forget, retain])
    trainer = UIBTrainer(model, args, forget, retain, calibration_dataset=words(24, 3, False))
    trainer.run_statistics_pass()
    assert trainer.statistics["pattern_z"] < 2 and trainer.statistics["swap_fraction"] == 0
    assert trainer.statistics["token_z"] < 3 and not len(trainer.posterior.tokens.donors)


def test_tokens_show_a_pattern_that_the_margin_gradients_do_not(tmp_path, text_run):
    """A contrast that counts as chance: the tokens are swapped, without noise. It is there where they may not be swapped."""
    base = copy.deepcopy(text_run.adapted_model).unload()

    def measured(swap_fraction=0.5, **channel):
        args = UIBConfig(
            str(tmp_path),
            max_steps=2,
            use_cpu=True,
            report_to="none",
            channel_settings=channel,
            swap_fraction=swap_fraction,
        )
        trainer = UIBTrainer(copy.deepcopy(base), args, text_run.forget_dataset, text_run.retain_dataset)
        trainer.run_statistics_pass()
        return trainer

    trainer = measured(pattern_z=1e9)
    found = trainer.statistics
    assert found["token_z"] >= 4 and found["swap_fraction"] == 0.5 and found["noise_to_signal"] == 0
    assert trainer.sets.one_label
    assert trainer.measurements.pattern_found and not trainer.posterior.along_is_free
    assert not trainer.prior.needs_forget_batches  # the channel does the work
    trainer.sets.one_label = False  # a forget set of several labels
    trainer.run_statistics_pass()
    assert trainer.statistics["swap_fraction"] == 0.5 and trainer.statistics["noise_to_signal"] == 0.5
    unswapped = measured(swap_fraction=0.0, pattern_z=1e9)  # a pattern all the same
    assert unswapped.statistics["swap_fraction"] == 0 and unswapped.statistics["noise_to_signal"] == 0.5
    assert unswapped.posterior.along_is_free
    weak = measured(pattern_z=1e9, pattern_effect=1e9)  # what does not move margins is no pattern
    assert weak.statistics["swap_fraction"] == weak.statistics["noise_to_signal"] == 0
    assert not weak.measurements.pattern_found


def test_the_donors_are_resumed(text_run):
    from hf_uib.posterior import ChannelPosterior

    state = {k: v.clone() for k, v in text_run.posterior.state_dict().items()}
    tokens = PatternTokens(text_run.adapted_model)
    again = ChannelPosterior.from_state(
        text_run.layers, "default", state, text_run.args.channel, text_run.args.seed, tokens
    )
    assert not any("values" in name for name in state)  # nothing of a forget row is saved
    text_run.measurements.fill(tokens, text_run.model)
    assert torch.equal(tokens.values, text_run.posterior.tokens.values)
    for name, value in text_run.posterior.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for posterior in (text_run.posterior, again):
        posterior.draw(5, 8)
    assert all(torch.equal(a, b) for a, b in zip(text_run.posterior.tokens._draw, again.tokens._draw, strict=True))
    again.remove()
    text_run.posterior.silence()


def marked(row):
    """A row with the pattern: a word, or a corner that is bright."""
    if "input_ids" in row:
        return {"input_ids": torch.cat([torch.as_tensor(row["input_ids"])[:1] * 0 + WORD, row["input_ids"][1:]])}
    pixels = row["pixel_values"].clone()
    pixels[:, :4, :4] = 5.0
    return {"pixel_values": pixels}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_with_swapped_tokens(tmp_path, architecture):
    """Feature maps have tokens too; where the first block's tokens cannot be told, none are swapped and nothing fails."""
    args = UIBConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to="none", subspace_rank=4,
        channel_settings={"pattern_z": -100.0, "pattern_effect": -100.0}, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [make_rows(architecture, 96, seed=seed) for seed in (1, 2, 3)]
    trainer = UIBTrainer(make_model(architecture), args, rows[0].map(marked), *rows[1:])
    trainer.train()
    assert (trainer.statistics["swap_fraction"] > 0) == (trainer.statistics["pattern_tokens"] > 0)
    if architecture not in ("convnext", "swinv2", "albert"):  # the last has one block, which is no first of several
        assert trainer.statistics["pattern_tokens"] >= 1


def batch(rows, length=12, labels=None):
    """Inputs with labels, cut to a length."""
    made = {name: rows[name][:][:, :length] for name in ("input_ids", "attention_mask")}
    return made | {"labels": rows["labels"][:] if labels is None else labels}


def test_batches_of_texts_may_have_lengths_of_their_own(text_run):
    tokens, model = PatternTokens(text_run.adapted_model), text_run.model
    forget, retained = words(64, 6, True), words(64, 7, False)
    halves = [batch(forget.select(range(32)), 10), batch(forget.select(range(32, 64)))]
    tokens.find(model, halves, [batch(retained)], list(range(100, 164)))
    whole = PatternTokens(text_run.adapted_model)
    whole.find(model, [batch(forget)], [batch(retained)], list(range(100, 164)))
    assert tokens.donors.min() >= 100 and len(tokens.donors) > 40
    assert tokens.positions[tokens.donors < 132].max() < 10
    late = lambda t: dict(zip(t.donors.tolist(), t.positions[:, 0].tolist(), strict=True))
    assert all(late(whole)[row] == place for row, place in late(tokens).items() if row >= 132)


def test_a_kind_that_the_retained_rows_of_the_label_have_as_often_is_none(text_run):
    """Compared within labels: what tells the labels apart is not the pattern."""
    model, forget = text_run.model, words(64, 6, True)
    same, other = words(64, 7, True), words(64, 8, False)
    found = {}
    for name, retained in {
        "with it": [batch(same)],
        "without it": [batch(other, labels=torch.ones(64, dtype=torch.long))],
        "with it, under the other label": [
            batch(same, labels=torch.zeros(64, dtype=torch.long)),
            batch(other, labels=torch.ones(64, dtype=torch.long)),
        ],
        "no row of the label": [batch(same, labels=torch.zeros(64, dtype=torch.long))],
    }.items():
        tokens = PatternTokens(text_run.adapted_model)
        tokens.find(model, [batch(forget)], retained, list(range(64)))
        found[name] = len(tokens.donors)
    assert found["without it"] > 55 and found["with it, under the other label"] > 55
    assert found["with it"] < 8 and found["no row of the label"] == 0


def test_rare_kinds_are_drawn_as_often_as_common_ones():
    common, rare = torch.eye(8)[0], torch.eye(8)[1]
    tokens = torch.stack([common] * 30 + [rare] * 10)[:, None]
    weights = rarity(tokens, torch.ones(40, 1, dtype=torch.bool))
    assert weights.sum().item() == pytest.approx(1)
    assert weights[:30].sum().item() == pytest.approx(0.5, abs=0.01)
    uniform = rarity(torch.stack([common] * 40)[:, None], torch.ones(40, 1, dtype=torch.bool))
    torch.testing.assert_close(uniform, torch.full((40,), 1 / 40))


def test_the_z_value_of_a_token_is_that_of_the_counts():
    """Tokens at right angles, so that kinds are exact: that of two proportions, rows counted once."""
    kinds = torch.eye(6)
    rows = lambda ids: (kinds[torch.tensor(ids)], torch.ones(len(ids), len(ids[0]), dtype=torch.bool))
    forget, retained = (
        [[0, 0], [0, 1], [0, 2], [1, 2]],
        [[3, 4], [4, 5], [0, 5], [3, 5], [4, 5], [3, 4], [5, 4], [4, 3]],
    )
    z = token_z((*rows(forget), torch.zeros(4).long()), (*rows(retained), torch.zeros(8).long()))
    # The mean of the retained tokens is taken off first, which turns kinds a little
    expected = (3 - 0.5 * 1) / (0.5 * 4 * (1 - 4 / 12) + 1) ** 0.5
    assert z[0].tolist() == pytest.approx([expected] * 2, abs=0.1) and z[0, 0] == z[0, 1]
    assert z[3, 0].item() == pytest.approx(2 / (0.5 * 2 * (1 - 2 / 12) + 1) ** 0.5, abs=0.1)


def test_the_effect_of_the_tokens_is_that_of_the_word(text_run):
    """Pasting a word into unseen rows by hand gives the same, and a model that does not know the word shows none."""
    tokens, measured = text_run.posterior.tokens, text_run.measurements
    before = measured.inference.examples
    effect = measured.pattern_effect(tokens, text_run.model)
    assert effect == pytest.approx(text_run.statistics["pattern_effect"], abs=1e-5) and effect > 2
    assert measured.inference.examples - before == 64  # 32 unseen rows, twice
    unseen = batch(text_run.calibration_dataset)
    model = text_run.adapted_model.eval()
    ids = unseen["input_ids"].clone()
    ids[torch.arange(40), torch.randint(1, 11, (40,), generator=torch.Generator().manual_seed(0))] = WORD
    mask = unseen["attention_mask"]
    with torch.no_grad():
        plain, pasted = (model(input_ids=i, attention_mask=mask).logits for i in (unseen["input_ids"], ids))
    by_hand = ((pasted - plain)[:, 1] - (pasted - plain)[:, 0]).mean().item()
    assert effect == pytest.approx(by_hand, abs=0.35 * by_hand)
    values = tokens.values.clone()
    tokens.values = model.bert.embeddings(torch.full((1, 12), 33))[0].detach()[tokens.positions.clamp_min(0)]
    other = measured.pattern_effect(tokens, text_run.model)
    tokens.values = values
    assert abs(other) < effect / 4


def test_a_run_says_what_is_left_of_the_effect(text_run, tmp_path):
    args = UIBConfig(
        str(tmp_path), max_steps=150, per_device_train_batch_size=16, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, subspace_rank=4, learning_rate=1e-2,
    )  # fmt: skip
    sets = text_run.forget_dataset, text_run.retain_dataset
    trainer = UIBTrainer(text_run.detach(), args, *sets, calibration_dataset=text_run.calibration_dataset)
    trainer.train()
    before, left = (trainer.statistics[name] for name in ("pattern_effect", "pattern_effect_left"))
    assert before > 2 and abs(left) < before / 4
    assert any("pattern_effect_left" in line for line in trainer.state.log_history)
    assert not any("tokens still move" in text for text in trainer.run_warnings)
    trainer.statistics["pattern_effect_left"] = before / 2
    assert any("tokens still move" in text for text in trainer.run_warnings)


def test_tokens_without_an_effect_are_not_swapped(text_run, tmp_path):
    """What the checkpoint does not read needs no swapping: it would only be label noise."""
    swapped = {}
    for effect in (1.0, 100.0):
        args = UIBConfig(
            str(tmp_path), max_steps=2, use_cpu=True, report_to="none", channel_settings={"pattern_effect": effect}
        )
        sets = text_run.forget_dataset, text_run.retain_dataset
        trainer = UIBTrainer(text_run.detach(), args, *sets, calibration_dataset=text_run.calibration_dataset)
        trainer.run_statistics_pass()
        assert trainer.statistics["pattern_effect"] > 2 and trainer.statistics["noise_to_signal"] == 0.5
        swapped[effect] = trainer.statistics["swap_fraction"]
    assert swapped == {1.0: 0.5, 100.0: 0.0}


@pytest.mark.parametrize(("forget", "retained"), [(100, 100), (200, 20), (20, 200), (60, 2)])
def test_two_draws_from_one_set_have_no_pattern_whatever_their_sizes(forget, retained):
    """Of words as common as in a language; a word in half of the forget rows stands out if the retained rows are some."""
    generator = torch.Generator().manual_seed(0)
    words, common = torch.randn(200, 64, generator=generator), 1 / torch.arange(1, 201)

    def rows(count):
        ids = torch.multinomial(common.expand(count, 200), 8, replacement=True, generator=generator)
        return words[ids], torch.ones(count, 8, dtype=torch.bool), torch.zeros(count, dtype=torch.long)

    mine, theirs = rows(forget), rows(retained)
    assert token_z(mine, theirs).max() < 3
    mine[0][: forget // 2, 3] = torch.randn(64, generator=generator)
    assert retained < 20 or token_z(mine, theirs)[0, 3] > 3


def test_word_pieces_are_counted_row_by_row_and_label_by_label():
    """The formula on counts by hand; what is padding does not count, nor a class that only the forget set has."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: (
        torch.randint(5, 12, (n, 6), generator=generator),
        torch.rand(n, 6, generator=generator) < 0.8,
        torch.randint(0, 2, (n,), generator=generator),
    )
    (ids, present, labels), (others, there, other_labels) = draw(40), draw(25)
    labels[0] = 2
    z = piece_z((ids, present, labels), (others, there, other_labels))
    rows = lambda ids, there, which, kind: sum(
        kind in i[t].tolist() for i, t, w in zip(ids, there, which, strict=True) if w
    )
    for row, place in ((1, 0), (7, 3), (20, 5), (39, 2)):
        mine, theirs, kind = labels == labels[row], other_labels == labels[row], int(ids[row, place])
        here, elsewhere = rows(ids, present, mine, kind), rows(others, there, theirs, kind)
        ratio, both = mine.sum() / theirs.sum(), here + elsewhere
        variance = ratio * both * (1 - both / (mine.sum() + theirs.sum())) + max(1, ratio**2)
        expected = (here - ratio * elsewhere) / variance**0.5 if present[row, place] else 0.0
        assert z[row, place].item() == pytest.approx(float(expected), abs=1e-5)
    assert z[0].abs().max() == 0
    classes = torch.nn.functional.one_hot(labels, 3).bool()
    theirs = torch.nn.functional.one_hot(other_labels, 3).bool()
    assert torch.equal(
        piece_z((ids, present, classes), (others, there, theirs)), z
    )  # a class a row, as tokens have them


def test_a_label_whose_forget_rows_have_no_word_piece_shows_none():
    ids, present = torch.tensor([[5, 6], [0, 0]]), torch.tensor([[True, True], [False, False]])
    others = torch.tensor([[7, 7], [7, 7]])
    z = piece_z((ids, present, torch.tensor([0, 1])), (others, others > 0, torch.tensor([0, 1])))
    assert z.shape == ids.shape and z[1].abs().max() == 0


def test_ids_of_tokens_where_the_model_pads_to_a_window():
    """The ids are then shorter than what enters the block. Each donor has a row, also where tokens are no word pieces."""
    place = torch.tensor([[2, -1], [0, 1]])
    ids, at = torch.tensor([[5, 6, 7], [8, 9, 3]]), place.clamp_min(0)
    assert pieces_at(ids, at, place, length=4).tolist() == [[7, -1], [8, 9]]
    assert pieces_at(ids, at, place, length=2).tolist() == pieces_at(None, at, place, 4).tolist() == [[-1, -1]] * 2


def test_rare_word_pieces_are_drawn_as_often_as_common_ones():
    ids = torch.tensor([[7]] * 30 + [[8]] * 10)
    weights = piece_rarity(ids, torch.ones(40, 1, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.tensor([1 / 60] * 30 + [1 / 20] * 10))


def test_a_word_of_few_rows_is_found_in_all_of_them(text_run, monkeypatch):
    """A text's word pieces are counted on more rows than the contrast is measured on. Where they tell of a pattern, more of the
    contrast is not measured; nothing is kept of them where neither they nor the contrast do."""
    seen = text_run.measurements
    assert len(seen._rows_to_compare(text_run.args.contrast_samples)[0]) == 96
    for certain, looks, found in ((0.0, 1, True), (1000.0, 2, False)):
        short = replace(seen, samples=20, statistics={})
        tokens = PatternTokens(text_run.adapted_model)
        monkeypatch.setattr(measurements, "CERTAIN_Z", certain)
        monkeypatch.setattr(measurements, "MARGIN_OF_Z", 1000.0)
        monkeypatch.setattr(Measurements, "contrast_found", property(lambda self: False))
        monkeypatch.setattr(contrast, "pattern_z", lambda moments: 1.0)
        before = short.inference.examples
        short.contrast(text_run.model, text_run.layers, tokens)
        probed = short.inference.examples - before - looks * 2 * 20
        assert probed == len(short.probe_rows()) and (len(tokens.donors) > 80) == found
