"""The priors that host other methods, against closed forms; the special cases of the method's section 3."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_rows
from test_trainer import adapter_weights, config, make_trainer, same
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import functional_call, jacrev

from hf_uib import UIBTrainer, objective
from hf_uib.data.checks import removed_classes
from hf_uib.data.labels import labels_of
from hf_uib.data.pairing import UnlearningBatch
from hf_uib.priors import PRIORS, AscentPrior, InfluencePrior, PriorContext, RandomLabelPrior, influence
from hf_uib.settings import InfluenceSettings


class Linear(nn.Module):
    """y = x w with Gaussian noise."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return SimpleNamespace(logits=(x @ self.weight)[:, None])


class GaussianInfluence(InfluencePrior):
    """The influence prior with the Gaussian's loss and curvature."""

    variance = 0.09

    def loss(self, outputs, labels):
        return ((labels - outputs[:, 0]) ** 2).sum() / 2 / self.variance

    curvature = staticmethod(lambda outputs, tangent: tangent / GaussianInfluence.variance)


@pytest.mark.parametrize("exact", [True, False])
def test_influence_gives_the_retrain_posterior_of_a_linear_gaussian_model(exact):
    settings = InfluenceSettings() if exact else InfluenceSettings(exact=1, tolerance=1e-28)
    g, precision, gone, kept, d = torch.Generator().manual_seed(0), 0.5, 30, 80, 6
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x = draw(gone + kept, d) @ draw(d, d)
    y = x @ draw(d) + 0.3 * draw(gone + kept) + 2.0 * (torch.arange(gone + kept) < gone)

    def posterior_mean(rows):
        matrix = precision * torch.eye(d, dtype=x.dtype) + x[rows].T @ x[rows] / GaussianInfluence.variance
        return torch.linalg.solve(matrix, x[rows].T @ y[rows] / GaussianInfluence.variance)

    trained, retrained = posterior_mean(slice(None)), posterior_mean(slice(gone, None))
    model, prior = Linear(trained.clone()), GaussianInfluence(settings, precision=precision)
    prior.strength = 1.0
    give = lambda start, end: lambda: [{"x": x[start:end], "labels": y[start:end]}]
    prior.prepare(PriorContext(model, give(0, gone), give(gone, gone + kept), (gone, kept), lambda tensors: None))
    assert (trained - retrained).abs().max() > 0.1  # what there was to undo
    assert (model.weight - retrained).abs().max() < 1e-8
    half, prior.strength = Linear(trained.clone()), 0.5  # the control: half of the deletion is not it
    prior.prepare(PriorContext(half, give(0, gone), give(gone, gone + kept), (gone, kept), lambda tensors: None))
    assert (half.weight - retrained).abs().max() > 0.05


@pytest.mark.parametrize("architecture", ["vit", "bert"])
def test_gauss_newton_product_is_that_of_the_dense_matrix(architecture):
    model, rows = make_model(architecture).double().eval(), make_rows(architecture, 4)
    weights = {name: p for name, p in model.named_parameters() if name.startswith("classifier") or ".1." in name}
    names = list(weights)[:2] + list(weights)[-2:]
    assert len(set(names)) == 4
    main = model.main_input_name
    inputs = {k: v.double() if k == "pixel_values" else v for k, v in rows[:].items() if k in (main, "attention_mask")}

    def outputs(values):
        return functional_call(model, values, (), inputs).logits

    chosen = [weights[name] for name in names]
    with influence.sdpa_kernel(influence.SDPBackend.MATH):
        values = {n: weights[n].detach() for n in names}
        jacobian = torch.cat([j.flatten(2) for j in jacrev(outputs)(values).values()], 2)
        logits = model(**inputs).logits
        vector = torch.randn(jacobian.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        product = influence.gauss_newton_product(logits, chosen, vector, influence.softmax_curvature)
    p = logits.detach().softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian)
    torch.testing.assert_close(product, dense @ vector, rtol=1e-10, atol=1e-12)


def test_random_label_is_the_expectation_of_the_draw():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 4, generator=g, dtype=torch.float64), torch.randint(4, (6,), generator=g)
    drawn = [F.cross_entropy(logits, (labels + offset) % 4) for offset in (1, 2, 3)]
    plain = RandomLabelPrior(target=-math.inf)
    value = plain.forget_loss(logits, labels)
    torch.testing.assert_close(value, torch.stack(drawn).mean() - math.log(3))
    done = torch.zeros(6, 4, dtype=torch.float64).scatter(1, labels[:, None], -60.0)
    assert plain.forget_loss(done, labels).abs() < 1e-10


@pytest.mark.parametrize("prior", [AscentPrior, RandomLabelPrior])
def test_a_hosted_method_lets_go_of_what_is_at_its_level(prior):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 3, generator=g, dtype=torch.float64), torch.randint(3, (40,), generator=g)
    margins = objective.margin(logits, labels)
    without, fixed, low = prior(target=-math.inf), prior(target=0.5), prior(target=float(margins.max()))
    push = without.forget_loss_per_example(logits, labels)
    torch.testing.assert_close(without.forget_loss(logits, labels), push.mean())
    above = margins > 0.5
    assert above.any() and not above.all()
    torch.testing.assert_close(fixed.forget_loss(logits, labels), torch.where(above, push, 0.0).mean())
    assert low.forget_loss(logits, labels) == 0
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fixed.forget_loss(leaf, labels), leaf)
    assert not gradient[~above].any() and gradient[above].any(1).all()


def test_without_retained_data_and_with_ascent_the_loss_is_the_evidence_upper_bound(tmp_path):
    """EUBO / n = E log p(forget) + KL(q || p) / n (arXiv 2010.12883), two classes; checked by its gradient."""
    model = make_model(num_labels=2)
    args = config(
        tmp_path, prior="ascent", prior_strength=1.0, beta=1.0, posterior="map", prior_fraction=1.0, forget_target=-math.inf,
        trainable_factors="B",
    )  # fmt: skip
    forget = make_rows(n=8, num_labels=2, seed=1)
    with pytest.warns(UserWarning, match="No retain_dataset"):
        trainer = UIBTrainer(model, args, forget)
    assert isinstance(trainer.prior, AscentPrior)
    trainer.train()
    posterior = trainer.posterior
    posterior.set_prior_mean()
    trainer.state.global_step = 1
    g = torch.Generator().manual_seed(0)
    weights = [layer.lora_B["default"].weight for layer in trainer.layers.values()]
    for weight in weights:
        weight.data += 0.01 * torch.randn(weight.shape, generator=g)
    batch = {k: v for k, v in forget[:].items() if k in ("pixel_values", "labels")}
    trainer.model.eval()
    loss = trainer.compute_loss(
        trainer.model, UnlearningBatch(features=dict(batch), retained=8, positions=torch.arange(8))
    )
    mine = torch.autograd.grad(loss, weights)

    nats = 0.0
    for name in trainer.layers:
        a, b = trainer.posterior.factors(name)
        a0, b0 = posterior.prior_means_a[name], posterior.prior_means_b[name]
        v, floor = trainer.posterior.subspaces[name], trainer.posterior.floors[list(trainer.layers).index(name)]
        variance = (floor**2).expand(len(v))
        for row, row0 in zip(b @ a @ v.T, b0 @ a0 @ v.T, strict=True):  # one output at a time, along the subspace
            normal = lambda m, s=variance: MultivariateNormal(m.double(), torch.diag(s.double()))
            nats = nats + kl_divergence(normal(row), normal(row0))
    log_p = -F.cross_entropy(
        trainer.model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="sum"
    )
    bound = (log_p.double() + nats) / 8
    for one, other in zip(mine, torch.autograd.grad(bound, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_zero_mean_fixed_prior_is_variational_lora(tmp_path):
    """Prior `none`, never refreshed: cross-entropy plus beta / n times the divergence from N(0, same channel)."""
    trainer = make_trainer(
        tmp_path, prior="none", prior_update_steps=1000, beta=0.5, max_steps=3, trainable_factors="B"
    )
    trainer.train()
    assert all(not b0.any() for _, b0 in trainer.posterior.prior_means_b.items())  # the mean of dW is zero, and stayed
    nats = trainer.posterior.kl_per_layer()
    for value, (name, layer) in zip(nats, trainer.layers.items(), strict=True):
        a, b = trainer.posterior.factors(name)
        moved = b @ a @ trainer.posterior.subspaces[name].T * layer.scaling["default"]
        floor = trainer.posterior.floors[list(trainer.layers).index(name)]
        torch.testing.assert_close(value, moved.square().sum() / (2 * floor**2), rtol=1e-4, atol=1e-5)


# ---- through the trainer ----


@pytest.mark.parametrize("prior", ["ascent", "random_label"])
def test_the_evidence_is_divided_out(tmp_path, prior):
    settings = dict(
        prior_strength=1.0,
        beta=0.0,
        posterior="map",
        max_steps=40,
        prior_fraction=1.0,
        learning_rate=0.06,
        trainable_factors="B",
        forget_target=-math.inf,
    )
    found = {}
    for name in (prior, "none"):
        trainer = make_trainer(tmp_path / name, prior=name, **settings)
        trainer.train()
        found[name] = (
            PRIORS[prior](target=-math.inf)
            .forget_loss(*trainer.inference.forward(trainer.forget_dataset, list(range(24))))
            .item()
        )
    assert found[prior] < found["none"] - 0.2


def test_saliency_holds_half_of_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, prior="saliency")
    trainer.train()
    moved = {name: p != 0 for name, p in trainer.model.named_parameters() if "lora_B" in name}
    masks = trainer.prior.masks
    assert set(masks) == set(moved)
    free, total = (sum(int(f(m)) for m in masks.values()) for f in (torch.sum, torch.numel))
    assert abs(free - total / 2) <= 1
    assert all(not moved[name][~mask].any() for name, mask in masks.items())
    assert sum(int(moved[name][mask].sum()) for name, mask in masks.items()) > 0.9 * free
    unmasked = make_trainer(tmp_path / "control", prior="random_label")
    unmasked.train()
    assert not any((dict(unmasked.model.named_parameters())[n][~m] == 0).all() for n, m in masks.items() if (~m).any())


@pytest.mark.parametrize("prior", ["saliency", "influence", "random_label", "ascent"])
def test_hosted_priors_resume_bit_equal(tmp_path, prior):
    settings = dict(prior=prior, save_strategy="steps", save_steps=3)
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(adapter_weights(whole), adapter_weights(resumed))


def test_influence_moves_the_adapter_and_its_strength_scales_that(tmp_path):
    shifts = {}
    for strength in (0.0, 0.1, 0.2):
        trainer = make_trainer(
            tmp_path / str(strength),
            prior="influence",
            prior_strength=strength,
            influence_settings={"max_increase": math.inf},
        )
        trainer.run_statistics_pass()
        shifts[strength] = torch.cat([b.flatten() for n, b in adapter_weights(trainer).items() if "lora_B" in n])
    assert not shifts[0.0].any() and shifts[0.1].norm() > 1e-4
    torch.testing.assert_close(shifts[0.2], 2 * shifts[0.1], rtol=1e-3, atol=1e-6)


def test_influence_goes_no_further_than_the_retained_data_allow(tmp_path):
    def begun(name, most):
        settings = {"max_increase": most}
        trainer = make_trainer(tmp_path / name, prior="influence", prior_strength=1.0, influence_settings=settings)
        trainer.run_statistics_pass()
        logits, labels = trainer.inference.forward(trainer.retain_dataset, list(range(len(trainer.retain_dataset))))
        moved = torch.cat([b.flatten() for n, b in adapter_weights(trainer).items() if "lora_B" in n])
        return F.cross_entropy(logits, labels).item(), moved

    (start, none), (near, some), (far, all_of_it) = (
        begun("none", -math.inf),
        begun("near", 0.05),
        begun("far", math.inf),
    )
    assert not none.any() and far > start + 0.05  # the whole way does harm
    assert near <= start + 0.0501
    share = (some @ all_of_it / (all_of_it @ all_of_it)).item()
    assert math.log2(share) == pytest.approx(round(math.log2(share)), abs=1e-3) and 0 < share < 1


def rows(n, seed, classes):
    """Of some classes alone, about ``n`` of each."""
    made = make_rows(n=3 * n, seed=seed)
    return made.select([i for i, y in enumerate(made["labels"]) if int(y) in classes])


def test_a_whole_class_is_forgotten_to_what_other_rows_get_of_it(tmp_path):
    gone = labels_of(rows(8, 1, {2}))
    assert removed_classes(gone, labels_of(rows(8, 2, {0, 1}))) == [2]
    assert removed_classes(gone, labels_of(rows(8, 2, {0, 2}))) == removed_classes(gone, None) == []
    args = config(tmp_path, max_steps=40, learning_rate=0.05, prior_fraction=1.0, prior_strength=1.0, beta=0.0)
    trainer = UIBTrainer(make_model(), args, rows(8, 1, {2}), rows(16, 2, {0, 1}), make_rows(n=30, seed=3))
    trainer.run_statistics_pass()
    reference = copy.deepcopy(trainer.model)
    margins = trainer.measurements.calibration_margins()
    others = rows(10, 3, {0, 1})
    with torch.no_grad():
        logits = reference.eval()(pixel_values=others[:]["pixel_values"]).logits
    expected = logits[:, 2] - torch.logsumexp(logits[:, :2], 1)
    torch.testing.assert_close(margins.sort().values, expected.sort().values, rtol=1e-4, atol=1e-4)
    trainer.train()
    assert not trainer.prior.pattern_detected
    forgotten = trainer.task.margin(
        *trainer.inference.forward(trainer.forget_dataset, list(range(len(trainer.forget_dataset))))
    )
    assert forgotten.median() < margins.median() + 0.5


def test_a_class_that_only_the_forget_set_has_beside_shared_ones_is_named(tmp_path):
    held = make_rows(n=20, seed=3)
    with pytest.warns(UserWarning, match="Forget rows have the label LABEL_2, and no retained row has"):
        UIBTrainer(make_model(), config(tmp_path), rows(8, 1, {1, 2}), rows(16, 2, {0, 1}), held)
    for forgotten, retained in (({1, 2}, {0, 1, 2}), ({2}, {0, 1})):  # the second is a class that is to go
        with warnings.catch_warnings(record=True) as seen:
            UIBTrainer(make_model(), config(tmp_path), rows(8, 1, forgotten), rows(16, 2, retained), held)
        assert not [w for w in seen if "no retained row has" in str(w.message)]


@pytest.mark.parametrize("prior", ["influence", "none"])
def test_what_forgets_through_the_retained_data_needs_some(tmp_path, prior):
    with pytest.raises(ValueError, match="give a retain_dataset"):
        UIBTrainer(make_model(), config(tmp_path, prior=prior), make_rows(n=8, seed=1))


def test_saliency_leaves_a_free_while_b_is_zero_and_measures_anew(tmp_path):
    trainer = make_trainer(tmp_path, prior="saliency", trainable_factors="both", max_steps=4, save_strategy="no")
    trainer.train()
    first = trainer.prior.masks
    assert first and all("lora_B" in name for name in first)
    trainer.train()
    second = trainer.prior.masks
    assert any("lora_A" in name for name in second)  # B has moved: A counts now
    assert any(not torch.equal(first[name], second[name]) for name in first if name in second)
