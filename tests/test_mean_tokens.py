"""Mean tokens: whether two sets differ label by label, and whether the model goes by it."""

import copy

import datasets
import numpy as np
import pytest
import torch
from conftest import make_model

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.mean_tokens import DIFFERENT_Z, DIRECTIONS, MeanTokens, principal_components, projected
from hf_uib.measurements import Measurements

CLASSES, WIDTH = 3, 10


def rows(n: int, rng: np.random.Generator, aligned: float, common: float = 0.0, shares=(1 / 3, 1 / 3, 1 / 3)):
    """Means of rows of three labels. A share ``aligned`` has its label's shift, the others that of any; all have ``common``."""
    labels = rng.choice(CLASSES, n, p=shares)
    shown = np.where(rng.random(n) < aligned, labels, rng.integers(0, CLASSES, n))
    x = rng.normal(size=(n, WIDTH)) + 4 * np.eye(CLASSES, WIDTH)[shown] + common * np.eye(1, WIDTH, CLASSES)
    return torch.tensor(x), torch.tensor(labels), torch.tensor(shown)


def compared(seed: int, aligned: float, common: float = 0.0) -> MeanTokens:
    rng = np.random.default_rng(seed)
    return MeanTokens(rows(400, rng, aligned, common)[:2], rows(240, rng, 0.0)[:2])


def test_z_of_random_draws_is_standard_normal_and_grows_with_a_pattern():
    z = [compared(seed, 0.0).z(seed) for seed in range(60)]
    assert abs(np.mean(z)) < 0.4 and 0.75 < np.std(z) < 1.3 and max(z) < 3
    assert min(compared(seed, 0.7).z() for seed in range(10)) > 4


@pytest.mark.parametrize("shares", [(1 / 3, 1 / 3, 1 / 3), (0.96, 0.02, 0.02)])
def test_what_all_labels_have_in_common_is_no_pattern(shares):
    """Pictures of one clinic, say, that are brighter whatever they show; also where nearly all of them have one label."""
    z = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        means = MeanTokens(rows(300, rng, 0.0, common=4.0, shares=shares)[:2], rows(240, rng, 0.0)[:2])
        z.append(means.z(seed))
    assert abs(np.mean(z)) < 0.8 and max(z) < DIFFERENT_Z
    one = []  # of one label nothing else tells what is common
    for seed in range(3):
        rng = np.random.default_rng(seed)
        (x, labels, _), (y, others, _) = rows(300, rng, 0.0, 3.0), rows(120, rng, 0.0)
        one.append(MeanTokens((x[labels == 1], labels[labels == 1]), (y, others)).z())
    assert min(one) > 4


def test_margins_that_go_by_what_is_common_are_no_effect():
    rng = np.random.default_rng(0)
    (x, labels, _), (y, others, shown) = rows(400, rng, 0.7, common=3.0), rows(240, rng, 0.0)
    means, noise = MeanTokens((x, labels), (y, others)), torch.tensor(rng.normal(size=240))
    bright = 3 * y[:, CLASSES]
    assert means.z() > 4 and abs(means.effect_z(bright + noise)) < 2
    assert (
        means.effect_z(6.0 * (shown == others) - bright + noise) > 2
    )  # it reads the pattern, and finds dark rows easier


def test_equal_margins_tell_nothing_whatever_the_order():
    rng = np.random.default_rng(0)
    (x, labels, _), (y, others, shown) = rows(400, rng, 0.7), rows(240, rng, 0.0)
    order = (shown == others).int().argsort(stable=True)
    means = MeanTokens((x, labels), (y[order], others[order]))
    assert means.effect_z(torch.ones(240)) == 0
    assert means.effect_z((shown == others)[order].float()) > 4


def test_few_rows_of_a_label():
    """Two of each, in 60 labels: z is not wider for it."""
    z = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = torch.arange(120) % 60
        draw = lambda: torch.tensor(rng.normal(size=(120, WIDTH)))  # noqa: B023
        z.append(MeanTokens((draw(), labels), (draw(), labels)).effect_z(torch.tensor(rng.normal(size=120))))
    assert abs(np.mean(z)) < 0.3 and 0.75 < np.std(z) < 1.2


def test_z_is_that_of_any_labels_of_the_same_rows():
    """Ids, several labels a row, classes that a row's tokens have. A label that one set has alone is left out."""
    rng = np.random.default_rng(0)
    (x, labels, _), (y, others, _) = rows(200, rng, 0.7), rows(120, rng, 0.0)
    z = MeanTokens((x, labels), (y, others)).z()
    one_hot = torch.eye(CLASSES)
    assert MeanTokens((x, one_hot[labels]), (y, one_hot[others])).z() == pytest.approx(z, abs=1e-6)
    assert MeanTokens((x, one_hot[labels] > 0), (y, one_hot[others] > 0)).z() == pytest.approx(z, abs=1e-6)
    assert MeanTokens((x, labels), (y, others + CLASSES)).z() == 0.0
    assert MeanTokens((x, labels), (y, others + CLASSES)).effect_z(torch.zeros(120)) == 0.0


def test_effect_is_standard_normal_where_margins_do_not_go_by_it():
    rng = np.random.default_rng(0)
    (x, labels, _), (y, others, shown) = rows(200, rng, 0.7), rows(120, rng, 0.0)
    means = MeanTokens((x, labels), (y, others))
    chance = [means.effect_z(torch.tensor(rng.normal(size=120))) for _ in range(200)]
    assert abs(np.mean(chance)) < 0.25 and 0.8 < np.std(chance) < 1.2
    reads = 2.0 * (shown == others) + torch.tensor(rng.normal(size=120))
    assert means.effect_z(reads) > 3 and means.effect_z(-reads) < -3
    of_labels = 5.0 * others  # classes that are easier than others tell nothing
    assert abs(means.effect_z(of_labels + torch.tensor(rng.normal(size=120)))) < 3


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (300, 60), (60, 300)])
def test_principal_components_of_few_and_of_many_features(shape):
    """Those of a dense SVD, but for their signs."""
    x = np.random.default_rng(0).normal(size=shape) * np.linspace(1, 3, shape[1])
    standard = (x - x.mean(0)) / x.std(0)
    u, values, _ = np.linalg.svd(standard, full_matrices=False)
    expected = (u * values)[:, : min(DIRECTIONS, min(shape) - (shape[0] <= shape[1]))]  # centred: a rank less
    found = principal_components(x)
    assert found.shape == expected.shape
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-6)
    assert np.allclose(projected(x, x[:7], DIRECTIONS)[1], found[:7], atol=1e-8)


def pictures(n: int, seed: int, aligned: float) -> datasets.Dataset:
    """Noise, as bright as the label says in a share of the rows, else at random."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    shown = np.where(rng.random(n) < aligned, labels, rng.integers(0, CLASSES, n))
    pixels = rng.normal(size=(n, 1, 8, 8)) + (shown - 1.0)[:, None, None, None]
    columns = {"labels": labels.tolist(), "pixel_values": pixels.astype("float32").tolist()}
    return datasets.Dataset.from_dict(columns).with_format("torch")


@pytest.fixture(scope="module", params=[True, False], ids=["reads it", "does not"])
def checkpoint(request):
    """A small ViT that goes by the brightness, or that takes it for what speaks against the label."""
    torch.manual_seed(0)
    model, train = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), pictures(300, 1, 0.8)[:]
    train["labels"] = (train["labels"] + (not request.param)) % CLASSES
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**train).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, request.param


@pytest.mark.parametrize("aligned", [0.8, 0.0])
def test_a_pattern_that_gradients_do_not_show(tmp_path, monkeypatch, checkpoint, aligned):
    """There is one where mean tokens differ and the checkpoint goes by them. Random rows have none."""
    monkeypatch.setattr(Measurements, "contrast_found", False)
    monkeypatch.setattr(Measurements, "tokens_found", False)
    args = UIBConfig(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", per_device_train_batch_size=8, subspace_rank=4
    )
    model, reads = checkpoint
    trainer = UIBTrainer(copy.deepcopy(model), args, pictures(200, 2, aligned), pictures(150, 3, 0.0))
    trainer.run_statistics_pass()
    found, expected = trainer.statistics, reads and aligned > 0
    assert (found["mean_token_z"] >= DIFFERENT_Z) == (aligned > 0)
    assert (found.get("mean_token_effect_z", 0.0) >= 2) == expected
    assert trainer.measurements.pattern_found == expected
    assert found["noise_to_signal"] == (0.5 if expected else 0.0)
    assert trainer.prior.needs_forget_batches != expected  # the channel does the work, or the forget loss
    trained = {name.rsplit("lora_")[1][0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == ({"A", "B"} if expected else {"B"})
