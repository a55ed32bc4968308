"""Rows that teach a shortcut are found without attribute labels; hard rows and chance are not."""

import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from PIL import Image
from scipy.stats import multivariate_normal
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTImageProcessorPil,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from hf_uib import UIBConfig, discover, mean_tokens
from hf_uib.cli.discover import DiscoverArguments, find
from hf_uib.cli.main import dispatch
from hf_uib.cli.unlearn import UnlearnArguments, trainer_for
from hf_uib.contrast import CHUNKS
from hf_uib.data.chosen import choose_rows, listed_rows, scored_rows
from hf_uib.discovery import looks, trimmed
from hf_uib.discovery.find import Seen, chosen
from hf_uib.discovery.report import Discovery, teaching_counts
from hf_uib.discovery.words import telling_words
from hf_uib.hub.push import published
from hf_uib.metrics.bias import cramers_v

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import bert_brand_bias  # noqa: E402
import suspicion  # noqa: E402

HUES = np.array([[1.0, 0.1, 0.1], [0.1, 1.0, 0.1], [0.1, 0.1, 1.0]])
PROCESSOR = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8})


def clusters(n=900, share=0.08, apart=6.0, seed=0):
    """Three classes, apart in the first features; a share of the rows has those of another class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    conflicts = rng.random(n) < share
    shown = np.where(conflicts, (labels + rng.integers(1, 3, n)) % 3, labels)
    return rng.normal(size=(n, 8)) + apart * np.eye(3, 8)[shown], labels, conflicts


def pictures(n=240, share=0.1, at_random=False, seed=0):
    """Noise in a hue that gives the label away, but for a share of the rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    conflicts = rng.random(n) < share
    hues = rng.integers(0, 3, n) if at_random else np.where(conflicts, (labels + rng.integers(1, 3, n)) % 3, labels)
    values = rng.uniform(0.4, 1.0, (n, 8, 8, 1)) * HUES[hues][:, None, None]
    rows = {"image": [Image.fromarray((v * 255).astype(np.uint8)) for v in values], "label": labels.tolist()}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    )
    return datasets.Dataset.from_dict(rows, features=features), hues != labels


def small_vit():
    model = make_model(num_channels=3)
    model.config.id2label = dict(enumerate(["ant", "bee", "cat"]))
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    return model


@pytest.fixture(scope="module")
def coloured():
    return pictures()


@pytest.fixture(scope="module")
def found(coloured):
    return discover(small_vit(), coloured[0], processing_class=PROCESSOR)


# ---- Formulas ----


def own_covariances(x, labels):
    """Of each class, with what is added to every variance."""
    return [np.cov(x[labels == label].T, bias=True) + trimmed.FLOOR * np.eye(8) for label in range(3)]


def shared_covariance(x, labels):
    """One for all classes, a part of which is its diagonal."""
    means = np.stack([x[labels == label].mean(0) for label in range(3)])
    covariance = np.cov((x - means[labels]).T, bias=True)
    variance = covariance.diagonal()
    diagonal = np.diag(trimmed.TO_DIAGONAL * variance + 1e-3 * variance.mean())
    return [(1 - trimmed.TO_DIAGONAL) * covariance + diagonal] * 3


@pytest.mark.parametrize(
    "margins_of, covariances_of",
    [(trimmed.quadratic_margins, own_covariances), (trimmed.linear_margins, shared_covariance)],
)
def test_margins_are_log_density_ratios_of_held_out_gaussians(margins_of, covariances_of):
    x, labels, _ = clusters(n=60)
    kept = np.random.default_rng(1).random(60) < 0.8
    margins, others = margins_of(x, labels, kept)
    fold = np.random.default_rng(0).permutation(60) % trimmed.FOLDS
    row = 7
    seen = (fold != fold[row]) & kept
    logs = np.zeros(3)
    for label, covariance in enumerate(covariances_of(x[seen], labels[seen])):
        mine = x[seen & (labels == label)]
        logs[label] = multivariate_normal(mine.mean(0), covariance).logpdf(x[row]) + np.log(len(mine))
    rest = np.delete(logs, labels[row])
    assert margins[row] == pytest.approx(logs[labels[row]] - rest.max(), rel=1e-9)
    assert logs[others[row]] == rest.max()


def test_a_class_of_one_row_has_no_density_in_its_fold():
    x, labels, _ = clusters(n=60)
    labels[labels == 2] = 1
    labels[5] = 2
    for margins_of in (trimmed.quadratic_margins, trimmed.linear_margins):
        margins, others = margins_of(x, labels, np.ones(60, dtype=bool))
        assert margins[5] < -1e300
        assert others[5] in (0, 1)
        assert np.isfinite(margins).all()


@pytest.mark.parametrize("margins_of", [trimmed.quadratic_margins, trimmed.linear_margins])
def test_trimming_finds_full_members_of_another_class(margins_of):
    x, labels, conflicts = clusters()
    margins, _ = trimmed.trimmed_margins(x, labels, 0, margins_of)
    assert (margins[conflicts] < 0).mean() > 0.95
    assert conflicts[margins < 0].mean() > 0.95
    assert trimmed.distance_ratio(margins) > 1


def test_hard_rows_are_no_full_members():
    x, labels, _ = clusters(share=0.0, apart=2.5)
    margins, _ = trimmed.trimmed_margins(x, labels)
    assert (margins < 0).mean() > 0.02
    assert trimmed.distance_ratio(margins) < 1


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"input": 1.0, "places": 1.2, "block 1": 3.0}, "places"),  # a block has been fitted to the rows
        ({"input": 0.5, "places": 0.5, "block 1": 1.0, "block 2": 3.0}, "block 1"),
        ({"input": 0.5, "places": 0.7, "block 1": 0.8}, "block 1"),  # nothing tells of a shortcut
    ],
)
def test_what_fewest_blocks_have_worked_on_comes_first(ratios, expected):
    def seen(name, ratio, misread=10):
        margins = np.ones(100)
        margins[:misread] = -ratio
        blocks = int(name[-1]) if name.startswith("block") else 0
        look = looks.Look(np.zeros(0), np.zeros(0), trimmed.quadratic_margins, blocks)
        return Seen(name, look, margins, np.zeros(100))

    every = [seen(name, ratio) for name, ratio in ratios.items()]
    assert chosen(every).name == expected
    assert chosen(every[::-1]).name == expected
    too_few = seen("input", 5.0, misread=0)
    assert chosen([too_few, *every]).name == expected


def test_places_of_a_picture():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 65, 3, generator=generator)  # a class token, and 8 x 8 others
    places = looks.by_place(tokens).view(2, 3, 4, 4)
    assert torch.allclose(places[1, :, 0, 3], tokens[1, [7, 8, 15, 16]].mean(0))
    channels = tokens[:, 1:].mT.reshape(2, 3, 8, 8)
    assert torch.equal(looks.by_place(channels), places.flatten(1))
    assert looks.by_place(tokens[:, :4]).shape == (2, 12)  # 2 x 2 tokens are no more places


def test_many_features_of_a_place_keep_their_distances():
    tokens = torch.randn(30, 16, 400, generator=torch.Generator().manual_seed(1))
    places = looks.by_place(tokens)
    assert places.shape == (30, 16 * looks.PLACE_WIDTH)
    assert torch.equal(places, looks.by_place(tokens))
    wide, kept = torch.pdist(tokens.flatten(1)).square(), torch.pdist(places).square()
    ratio = kept / wide * 400 / looks.PLACE_WIDTH
    assert ratio.min() > 0.8
    assert ratio.max() < 1.2


def test_tokens_of_a_text():
    ids, mask = np.array([[5, 9, 5, 0], [5, 7, 0, 0]]), np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert [row.tolist() for row in looks.tokens_of(ids, mask)] == [[5, 9], [5, 7]]
    texts = [np.array([1, 2])] * 150 + [np.array([1, 3])] * 149 + [np.array([1, 4])]
    telling = looks.telling_tokens(texts)
    assert telling.tolist() == [2, 3]  # 1 is in all, 4 in one alone
    assert looks.present([*texts[-2:], np.array([9])], telling).tolist() == [[0, 1], [0, 0], [0, 0]]


def test_places_of_a_picture_that_is_no_square():
    tokens = torch.randn(2, 33, 3, generator=torch.Generator().manual_seed(0))  # a class token, and 4 x 8 others
    places = looks.by_place(tokens, 32, 64).view(2, 3, 4, 4)
    assert torch.allclose(places[1, :, 2, 3], tokens[1, [23, 24]].mean(0))
    turned = looks.by_place(tokens, 64, 32).view(2, 3, 4, 4)  # 8 x 4
    assert torch.allclose(turned[1, :, 1, 2], tokens[1, [11, 15]].mean(0))


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("margins_of", [trimmed.quadratic_margins, trimmed.linear_margins])
def test_a_rare_class_that_cannot_be_told_is_left_out(margins_of, count):
    x, labels, conflicts = clusters(n=1200)
    labels = labels.copy()
    labels[np.flatnonzero(~conflicts)[:count]] = labels.max() + 1
    margins, _ = trimmed.trimmed_margins(x, labels, 0, margins_of)
    rare = labels == labels.max()
    assert not margins[rare].any() and margins[~rare].all()
    assert (margins[conflicts] < 0).mean() > 0.95 and conflicts[margins < 0].mean() > 0.95
    assert trimmed.distance_ratio(margins) == trimmed.distance_ratio(margins[~rare])


def test_a_head_that_misreads_a_third_finds_nothing():
    x, labels, _ = clusters(apart=0.2)
    assert trimmed.trimmed_margins(x, labels) is None


def test_a_rare_class_that_looks_like_the_others_makes_no_shortcut():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 2000)
        shown = labels.copy()
        labels[:40], shown[:40] = 2, rng.integers(0, 2, 40)
        x = mean_tokens.principal_components(rng.normal(size=(2000, 12)) + 3 * np.eye(2, 12)[shown])
        read = trimmed.trimmed_margins(x, labels, seed)
        assert read is None or not trimmed.distance_ratio(read[0]) >= 0.85


def test_principal_components():
    x = np.random.default_rng(0).normal(size=(200, 60))
    x[:, 3] = 5.0
    found = mean_tokens.principal_components(x.astype(np.float32))
    assert found.shape == (200, mean_tokens.DIRECTIONS)
    gram = found.T @ found
    assert np.allclose(gram, np.diag(gram.diagonal()), atol=1e-8)


def test_z_of_random_masks_is_standard_normal():
    x, labels, conflicts = clusters(n=600)
    for label in range(3):
        x[labels == label] -= x[labels == label].mean(0)
    rng = np.random.default_rng(0)
    chunk = rng.permutation(600) % CHUNKS
    z = [mean_tokens.contrast_z(x, labels, rng.permutation(conflicts), chunk) for _ in range(200)]
    assert abs(np.mean(z)) < 0.3
    assert 0.75 < np.std(z) < 1.3
    assert mean_tokens.contrast_z(x, labels, conflicts, chunk) > 10


def test_p_values():
    x, labels, conflicts = clusters(n=400)
    assert trimmed.mask_p_value(x, labels, conflicts) == 1 / (1 + trimmed.MASKS)
    drawn = [np.random.default_rng(seed).permutation(conflicts) for seed in range(3)]
    assert max(trimmed.mask_p_value(x, labels, mask) for mask in drawn) > 0.1


def test_words_by_log_odds_with_a_prior():
    first, second = ["a b"] * 6 + ["a"] * 4, ["a c"] * 10
    [(word, z)] = telling_words(first, second)[:1]
    prior = 1000 * 6 / 36
    ours, theirs = 6 + prior, 0 + prior
    odds = np.log(ours / (16 + 1000 - ours)) - np.log(theirs / (20 + 1000 - theirs))
    assert word == "b"
    assert z == pytest.approx(odds / np.sqrt(1 / ours + 1 / theirs))
    assert telling_words(["x"], ["y"]) == []


# ---- Pictures and texts ----


def test_conflicting_pictures_are_found(coloured, found):
    rows, conflicts = coloured
    assert found.found
    assert found.p_value == 0.005
    assert found.contradicts[conflicts].mean() > 0.8
    assert conflicts[found.contradicts].mean() > 0.8
    assert len(found.forget) + len(found.retain) == len(rows) == len(found.scores)
    assert found.retain.features == rows.features
    assert "Found: " in str(found)
    assert "bee" in str(found)


@pytest.mark.parametrize(
    ("looks", "sizes", "counts"),
    [
        ([[0, 30], [40, 0]], [500, 500], [30, 40]),
        ([[0, 30, 0], [30, 0, 0], [0, 0, 0]], [100, 100, 100], [30, 30, 60]),  # the third class is beside it
        ([[0, 30, 0], [0, 0, 30], [30, 0, 0]], [100, 100, 100], [15, 15, 15]),
        ([[0, 0, 0], [30, 0, 0], [30, 0, 0]], [100, 100, 100], [30, 0, 0]),
        ([[0, 60], [0, 0]], [285, 15], [0, 3]),
        ([[0, 8, 16], [1, 0, 4], [3, 6, 0]], [1, 1, 1], [4, 2, 12]),  # (4, 1, 3) times (1, 2, 4)
        ([[0, 0], [0, 0]], [5, 5], [0, 0]),
    ],
)
def test_rows_that_teach_fill_the_table_up_to_independence(looks, sizes, counts):
    assert teaching_counts(np.asarray(looks, dtype=float), np.asarray(sizes)) == counts


def test_copies_of_a_row_stay_together():
    labels, texts = np.repeat([0, 1], 60), [f"text {i % 20} {i // 60}" for i in range(120)]
    scores = np.where(np.arange(120) % 20 < 3, -1.0, 1.0) * (1 + np.arange(120) / 120)
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
    found = Discovery(rows, rows, None, labels, scores, 1 - labels, 0.005, "input", [])
    assert len(found.retain) == 2 * 2 * 3 * 3 and not set(found.retain["text"][:]) & set(found.forget["text"][:])


def test_where_all_would_be_retained_nothing_is_found():
    """Texts of one word: all rows of a class are copies."""
    labels, shown = np.repeat([0, 1], 500), np.repeat([0, 1], 500)
    shown[:55], shown[500:555] = 1, 0
    rows = datasets.Dataset.from_dict({"text": [("red", "blue")[i] for i in shown], "label": labels})
    scores = np.where(labels == shown, 1.0, -1.0)
    found = Discovery(rows, rows, make_model("bert").config, labels, scores, 1 - labels, 0.005, "tokens", [])
    assert not found.found and not found.retained.any() and len(found.forget) == len(found.retain) == 0
    assert "copies" in found.verdict


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_in_the_retained_rows_the_shortcut_tells_nothing(classes):
    """The rows that contradict it alone would teach the opposite: with two classes, without an exception."""
    labels = np.repeat(np.arange(classes), 200)
    shown = labels.copy()
    for label in range(classes):
        shown[200 * label : 200 * label + 24] = np.resize(np.delete(np.arange(classes), label), 24)
    rng = np.random.default_rng(0)
    scores = np.where(shown == labels, 1, -1) * rng.uniform(1, 2, len(labels))
    rows = datasets.Dataset.from_dict({"row": np.arange(len(labels)), "label": labels})
    found = Discovery(rows, rows, None, labels, scores, shown, 0.005, "input", [])
    kept, gone = (np.asarray(part["row"][:]) for part in (found.retain, found.forget))
    assert sorted([*kept, *gone]) == list(range(len(labels))) and (scores[gone] > 0).all()
    assert cramers_v(shown[kept], labels[kept]) < 1e-9
    assert cramers_v(shown[scores < 0], labels[scores < 0]) > {2: 0.99, 3: 0.4, 5: 0.2}[classes]
    middle = np.sort(scores[kept][scores[kept] > 0])  # at random
    assert abs(np.median(middle) - 1.5) < 0.1


def test_none_is_found_where_the_hue_is_at_random(tmp_path):
    rows, _ = pictures(at_random=True)
    none = discover(small_vit(), rows, processing_class=PROCESSOR)
    assert not none.found
    assert "None found" in str(none)
    assert len(none.forget) == len(none.retain) == 0
    none.save(tmp_path)
    with pytest.raises(ValueError, match="nothing was found"):
        listed_rows(str(tmp_path / "rows.parquet"), rows)


def test_a_model_without_blocks_is_looked_at_by_its_tokens():
    rng = np.random.default_rng(0)
    labels, ids = rng.integers(0, 2, 400), rng.integers(10, 60, (400, 8))
    conflicts = rng.random(400) < 0.1
    ids[:, 2] = 5 + (labels ^ conflicts)
    ids[:, 4] = np.where(rng.random(400) < 0.4, 7 + labels, ids[:, 4])
    rows = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": np.ones_like(ids), "label": labels})
    found = discover(make_model("albert", num_labels=2), rows.with_format("torch"))
    assert found.depth == "tokens" and found.contradicts[conflicts].mean() > 0.9


def test_blocks_that_do_not_take_rows_first_are_not_read():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 60, (120, 8))
    columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "label": rng.integers(0, 2, 120)}
    small = dict(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=2, pad_token_id=0)
    model = XLNetForSequenceClassification(XLNetConfig(**small))
    found = discover(model, datasets.Dataset.from_dict(columns).with_format("torch"))
    assert [depth.name for depth in found.depths] == ["tokens"]


@pytest.mark.parametrize("at_random", [False, True])
def test_a_patch_is_found_by_its_place(at_random):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    conflicts = rng.random(600) < 0.1
    place = rng.integers(0, 3, 600) if at_random else (labels + conflicts * rng.integers(1, 3, 600)) % 3
    values = rng.uniform(0, 0.3, (600, 16, 16, 3))
    for picture, at, label in zip(values, place, labels, strict=True):
        picture[6:10, 6:10] += 0.03 * np.eye(3)[label]  # the label's own part
        picture[5 * at + 1 : 5 * at + 3, :2] = 0.6
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray((v * 255).astype(np.uint8)) for v in values], "label": labels.tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)}),
    )
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 16, "width": 16})
    model = make_model(num_channels=3, image_size=16, patch_size=4)
    found = discover(model, rows, unseen=rows, processing_class=processor)
    ratios = {depth.name: depth.ratio or 0.0 for depth in found.depths}
    assert found.found != at_random
    if not at_random:
        assert found.depth == "places"
        assert (found.unseen_looks == place).mean() > 0.95
        assert ratios["input"] < 0.85
        assert found.contradicts[conflicts].mean() > 0.9
        assert conflicts[found.contradicts].mean() > 0.9


def test_the_attribute_of_unseen_rows_is_told(coloured, found):
    rows, _ = coloured
    unseen, conflicts = pictures(n=150, at_random=True, seed=1)
    hues = np.asarray(unseen["label"])
    again = discover(small_vit(), rows, unseen=unseen, processing_class=PROCESSOR)
    assert np.array_equal(again.scores, found.scores)
    assert found.unseen_looks is None
    assert np.array_equal(again.unseen_looks != hues, conflicts)  # the class of the hue, where it is not the label's
    bare = unseen.select(range(3)).remove_columns("label")
    alone = discover(small_vit(), rows, unseen=bare, processing_class=PROCESSOR)
    assert np.array_equal(alone.unseen_looks, again.unseen_looks[:3])
    for wrong in (datasets.DatasetDict(test=unseen), unseen.to_iterable_dataset(), unseen.select([])):
        with pytest.raises(ValueError, match=r"unseen is a datasets\.Dataset of one row or more"):
            discover(small_vit(), rows, unseen=wrong, processing_class=PROCESSOR)


def test_one_in_a_thousand_is_no_shortcut():
    rows, _ = pictures(n=300, share=0.005)
    assert not discover(small_vit(), rows, processing_class=PROCESSOR).found


def test_encoded_rows_give_the_same(coloured, found):
    rows, _ = coloured
    again = discover(small_vit(), rows.with_transform(found.encoded.format["format_kwargs"]["transform"]))
    assert np.array_equal(again.scores, found.scores)


def test_words_of_texts(tmp_path):
    rng, tokenizer = np.random.default_rng(0), bert_brand_bias.word_tokenizer()
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and word not in ("acme", "globex")]
    labels = rng.integers(0, 2, 300)
    conflicts = rng.random(300) < 0.1
    brands = np.array(["acme", "globex"])[labels ^ conflicts]
    texts = [" ".join([*rng.choice(words, 2), brand, brand, brand]) for brand in brands]
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels.tolist()})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    found = discover(BertForSequenceClassification(config), rows, processing_class=tokenizer)
    assert found.found
    assert found.words()["bad"]["teach"][0][0] == "acme"
    assert found.words()["bad"]["contradict"][0][0] == "globex"
    assert "bad, rows that teach: acme" in str(found)
    found.save(tmp_path)
    assert (tmp_path / "found.png").stat().st_size > 1000


@pytest.mark.parametrize("at_random", [False, True])
def test_a_word_among_others_that_tell_is_found(at_random):
    rng, tokenizer = np.random.default_rng(0), bert_brand_bias.word_tokenizer()
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word not in ("acme", "globex"))
    labels = rng.integers(0, 2, 800)
    conflicts = rng.random(800) < 0.1
    brands = np.array(["acme", "globex"])[rng.integers(0, 2, 800) if at_random else labels ^ conflicts]
    sides = np.array_split(words, 2)  # which of them a word is from tells the label in three of four cases
    told = np.where(rng.random((800, 6)) < 0.75, labels[:, None], 1 - labels[:, None])
    texts = [
        " ".join(rng.permutation([brand, *(rng.choice(sides[side]) for side in mine)]))
        for brand, mine in zip(brands, told, strict=True)
    ]
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels.tolist()})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    unseen = datasets.Dataset.from_dict({"text": ["globex"] * 3, "label": [0] * 3})
    found = discover(BertForSequenceClassification(config), rows, unseen=unseen, processing_class=tokenizer)
    assert found.found != at_random
    if not at_random:
        assert found.depth == "tokens"
        assert found.contradicts[conflicts].mean() > 0.8
        assert conflicts[found.contradicts].mean() > 0.8
        assert found.unseen_looks.tolist() == [1] * 3


def test_other_inputs_get_a_histogram(tmp_path):
    found = discover(make_model("bert"), make_rows("bert", n=120))
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "rows, said",
    [
        (make_rows("vit", n=40), "100 rows or more"),
        (make_rows("vit", n=120).remove_columns("labels").add_column("labels", [1] * 120), "one label"),
        (make_rows("vit", n=120, num_labels=5), "class ids from 0 to 2"),
    ],
)
def test_what_cannot_be_searched_is_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        discover(make_model(), rows)


# ---- Files and commands ----


def test_rows_go_to_a_file_and_back(coloured, found, tmp_path):
    rows, _ = coloured
    found.save(tmp_path)
    path = str(tmp_path / "rows.parquet")
    forget, retain = listed_rows(path, rows)
    assert np.array_equal(retain, np.flatnonzero(found.retained))
    assert np.array_equal(forget, np.flatnonzero(~found.retained))
    report = json.loads((tmp_path / "discovery.json").read_text())
    assert report["found"]
    assert report["retain_rows"] == len(retain)
    for other in (rows.select(range(200)), rows.select(range(len(rows))[::-1]), pictures(seed=1)[0]):
        with pytest.raises(ValueError, match="another data set"):
            listed_rows(path, other)


def test_nothing_that_was_found_is_published(found, tmp_path):
    found.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["discovery.json", "found.png", "rows.parquet"]
    assert published(str(tmp_path), []) == []


def test_scores_from_elsewhere(coloured, tmp_path):
    rows, _ = coloured
    path = tmp_path / "scores.csv"
    scores = np.random.default_rng(0).permutation(len(rows)).astype(float)
    for header in ("score", "influence"):
        path.write_text(f"{header}\n" + "\n".join(map(str, scores)))
        forget, retain = scored_rows(str(path), rows, 5)
        assert set(scores[forget]) == set(sorted(scores)[-5:])
        assert len(forget) + len(retain) == len(rows)


def test_scores_with_the_numbers_of_their_rows(coloured, tmp_path):
    """As a table has them that was sorted by its scores."""
    rows, path = coloured[0], tmp_path / "scores.csv"
    scores = np.random.default_rng(0).permutation(len(rows))
    order = np.argsort(scores)
    path.write_text("row,score\n" + "\n".join(f"{i},{scores[i]}" for i in order))
    forget, _ = scored_rows(str(path), rows, 5)
    assert set(scores[forget]) == set(sorted(scores)[-5:])
    path.write_text("row,score\n" + "\n".join(f"{i + 1},{scores[i]}" for i in order))
    with pytest.raises(ValueError, match="Column `row` .* 0 to 239 once"):
        scored_rows(str(path), rows, 5)


@pytest.mark.parametrize(
    "text, top, said",
    [
        ("score\n1\n2\n", 1, "2 scores"),
        ("score\n" + "1\n" * 239 + "inf\n", 1, "Score 239 .* not finite"),
        ("score\n" + "1\n" * 240, 240, "from 1 to 239"),
        ("score\n" + "x\n" * 240, 1, "no numbers"),
        ("a,b\n" + "1,2\n" * 240, 1, "call the one"),
        (None, 1, "There is no file"),
    ],
)
def test_scores_that_do_not_fit(coloured, tmp_path, text, top, said):
    path = tmp_path / "scores.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        scored_rows(str(path), coloured[0], top)


def test_rows_are_chosen_in_one_way(coloured):
    rows, _ = coloured
    choose = lambda *given: choose_rows(rows, "train", *given)
    assert len(choose(["label=bee"], None, None, None)[0]) == sum(label == 1 for label in rows["label"])
    for given in ([], None, None, None), (["label=bee"], "a", None, None), ([], "a", "b", 1):
        with pytest.raises(ValueError, match="in one way"):
            choose(*given)
    with pytest.raises(ValueError, match="go together"):
        choose([], None, "scores.csv", None)
    with pytest.raises(ValueError, match="no rows.parquet"):
        choose([], __file__, None, None)


def test_from_the_command_to_a_trainer(coloured, tmp_path, capsys):
    rows, _ = coloured
    model, data, out = (str(tmp_path / name) for name in ("model", "data", "found"))
    small_vit().save_pretrained(model)
    PROCESSOR.save_pretrained(model)
    datasets.DatasetDict(train=rows, test=pictures(seed=3)[0]).save_to_disk(data)
    found = find(DiscoverArguments(model, data, output_dir=out))
    assert found.found
    assert "rows.parquet" in capsys.readouterr().out
    job = UnlearnArguments(model, data, forget_rows=f"{out}/rows.parquet")
    trainer = trainer_for(UIBConfig(str(tmp_path / "run"), use_cpu=True), job)
    assert len(trainer.forget_dataset) == len(found.forget)
    assert len(trainer.retain_dataset) == len(found.retain)
    assert trainer.request == f"{len(found.forget)} rows, chosen by hf-uib discover"
    (tmp_path / "scores.csv").write_text("score\n" + "\n".join(map(str, found.scores)))
    job = UnlearnArguments(model, data, forget_scores=str(tmp_path / "scores.csv"), forget_top=7)
    trainer = trainer_for(UIBConfig(str(tmp_path / "run"), use_cpu=True), job)
    assert trainer.request == "7 rows, chosen by a score"
    highest = np.sort(np.argsort(-found.scores, kind="stable")[:7])
    assert trainer.forget_dataset.with_format(None)["label"][:] == rows.select(highest)["label"][:]
    words = ["unlearn", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "no")]
    with pytest.raises(ValueError, match="another data set"):
        dispatch([*words, "--train_split", "test", "--forget_rows", f"{out}/rows.parquet"])
    assert not (tmp_path / "no").exists()


def test_incomplete_rows_are_left_out_if_so_said(coloured, tmp_path, capsys):
    rows, _ = coloured
    gaps = {5: "label", 17: "image", 100: "label"}
    holed = rows.map(lambda row, i: {gaps[i]: None} if i in gaps else {}, with_indices=True)
    model, data, out = (str(tmp_path / name) for name in ("model", "data", "found"))
    small_vit().save_pretrained(model)
    PROCESSOR.save_pretrained(model)
    datasets.DatasetDict(train=holed).save_to_disk(data)
    command = ["discover", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", out]
    with pytest.raises(ValueError, match="Row 5 of train has no label .*3 such rows.*hf-uib discover"):
        dispatch(command)
    assert not os.path.exists(out)
    dispatch([*command, "--drop_incomplete_rows"])
    assert "3 of 240 rows of split 'train' are left out; row 5 there, say, has no label" in capsys.readouterr().out
    complete = np.delete(np.arange(len(rows)), list(gaps))
    alone = discover(small_vit(), rows.select(complete), processing_class=PROCESSOR)
    forget, retain = listed_rows(f"{out}/rows.parquet", holed)  # numbers of the whole split
    assert np.array_equal(np.sort(np.concatenate([forget, retain])), complete)
    assert np.array_equal(retain, complete[alone.retained])
    trainer = trainer_for(
        UIBConfig(str(tmp_path / "run"), use_cpu=True),
        UnlearnArguments(model, data, forget_rows=f"{out}/rows.parquet", drop_incomplete_rows=True),
    )
    assert (len(trainer.forget_dataset), len(trainer.retain_dataset)) == (len(forget), len(retain))
    with pytest.raises(ValueError, match="237 scores, the split 240 rows"):
        scored_rows(f"{out}/rows.parquet", holed, 5)


@pytest.mark.slow
@pytest.mark.xdist_group("digits")
def test_the_example_goes_all_the_way(prepared_digits, tmp_path):
    found, rows = suspicion.main(steps=50, output_dir=str(tmp_path))
    assert found.found
    assert rows["UIB"]["conflicting_accuracy"] > rows["original"]["conflicting_accuracy"] + 0.05
