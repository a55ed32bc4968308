"""The contract of every prior, and the calibrated level."""

import pytest
import torch
from conftest import make_model, make_rows
from test_trainer import config, make_trainer
from transformers import HfArgumentParser

from hf_uib import UIBConfig, UIBTrainer, objective
from hf_uib.priors import PRIORS, CalibratedPrior, Prior, PriorContext, register_prior
from hf_uib.priors.calibrated import interpolate, label_noise_z, quantiles
from hf_uib.settings import ChannelSettings


def attached(prior, **context):
    """A prior at the start of a run without a model."""
    context = PriorContext(None, None, list, (1, 1), lambda tensors: None, **context)
    prior.attach(context)
    prior.prepare(context)
    return prior


@pytest.mark.parametrize("name", PRIORS)
def test_contract(name):
    prior = PRIORS[name]()
    assert isinstance(prior, Prior)
    g = torch.Generator().manual_seed(0)
    prior.refresh(lambda: 5 + torch.randn(50, generator=g), lambda: torch.randn(50, generator=g))
    logits = torch.randn(8, 3, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 3, (8,), generator=g)
    value = prior.forget_loss(logits, labels)
    assert (
        value.shape == () and torch.isfinite(value) and (value >= 0 or name == "ascent")
    )  # log p itself: never positive
    again = PRIORS[name]()
    again.load_state_dict({k: v.clone() for k, v in prior.state_dict().items()} or {})
    assert torch.equal(again.forget_loss(logits, labels), value)
    if prior.needs_forget_batches:
        halves = [prior.forget_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(8)]
        torch.testing.assert_close(torch.stack(halves).mean(), value)  # independent of the batch


def logits_with(margins):
    return torch.stack([margins, torch.zeros_like(margins)], 1), torch.zeros(len(margins), dtype=torch.long)


def test_zero_gradient_at_the_level_and_pull_above_it():
    seen = torch.linspace(4, 8, 101, dtype=torch.float64)
    unseen = torch.linspace(-2, 3, 101, dtype=torch.float64)
    prior = CalibratedPrior()
    prior.refresh(lambda: seen, lambda: unseen)
    above = seen.clone().requires_grad_()
    logits, labels = logits_with(above)
    value = prior.forget_loss(logits, labels)
    torch.testing.assert_close(value, (seen - unseen).mean(), rtol=0.02, atol=0)  # W1 of two ordered distributions
    (gradient,) = torch.autograd.grad(value, above)
    assert (gradient > 0).all()
    # once forgotten, the ranks are those of the forgotten margins: nothing pulls any more
    prior.refresh(lambda: unseen, lambda: unseen)
    at = (unseen - 1e-6).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.forget_loss(*logits_with(at)), at)
    assert not gradient.any()


def test_level_never_falls():
    g = torch.Generator().manual_seed(0)
    prior = CalibratedPrior()
    last = None
    for shift in (0.0, -2.0, 1.0, -5.0, 0.5):
        prior.refresh(lambda: torch.randn(40, generator=g) + 5, lambda s=shift: torch.randn(200, generator=g) + s)
        if last is not None:
            assert (prior.level >= last).all()
        last = prior.level.clone()
    assert last.median() > 0.5


def test_fitted_calibration_is_followed_down_once():
    prior = attached(CalibratedPrior(), calibration_seen_in_training=True)
    levels = []
    for value in (6.0, 4.0, 2.0, 3.0, 1.0):
        prior.refresh(lambda: torch.full((5,), 7.0), lambda v=value: torch.full((5,), v))
        levels.append(prior.level.mean().item())
    assert levels == pytest.approx([6, 4, 2, 3, 3])


def test_fixed_target_needs_no_measurement():
    def fail():
        raise AssertionError("measured")

    prior = CalibratedPrior(target=1.5)
    prior.refresh(fail, fail)
    logits, labels = logits_with(torch.tensor([1.0, 2.0, 3.0]))
    assert prior.forget_loss(logits, labels).item() == pytest.approx((0.5 + 1.5) / 3)


def test_quantiles_and_interpolation():
    values = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    curve = quantiles(values, 5)
    torch.testing.assert_close(curve, torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0], dtype=torch.float64))
    torch.testing.assert_close(
        interpolate(curve, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)),
        torch.tensor([1.0, 1.6, 3.0], dtype=torch.float64),
    )


def test_margin_gradient_survives_saturation():
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(objective.margin(logits, torch.tensor([0])).sum(), logits)
    assert gradient.abs().max() > 0.9


def test_under_a_pattern_the_level_keeps_the_labels():
    seen, unseen = torch.linspace(4, 8, 101), torch.linspace(-2, 3, 101)
    prior = CalibratedPrior()
    prior.refresh(lambda: seen, lambda: unseen)
    chance = prior.level_of(seen)
    prior.pattern_detected = True
    pattern = prior.level_of(seen)
    assert chance.min() < 0 and pattern.min() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(pattern[51:], chance[51:])


def test_label_noise_is_found():
    """Wrong labels: refused rows get the level of a refused label, and forget batches come to the end. Under a bias, not."""
    unseen = torch.linspace(-1, 4, 200)  # a fifth of them wrong
    biased, wrong = torch.linspace(-0.5, 6, 300), torch.linspace(-4, 4, 300)

    def run(later, **settings):
        prior = attached(CalibratedPrior(), pattern_detected=True, **settings)
        for margins in (torch.full((300,), 5.0), later, later):
            prior.refresh(lambda m=margins: m, lambda: unseen)
        return prior

    prior = run(wrong)
    assert prior.keep_forget_batches
    at = torch.tensor([-3.0, -0.1, 0.1, 3.9])
    torch.testing.assert_close(prior.level_of(at)[:2], torch.full((2,), -1.5), atol=0.02, rtol=0)
    assert (prior.level_of(at)[2:] >= 1.48).all()
    again = attached(CalibratedPrior(), pattern_detected=True)
    again.load_state_dict(prior.state_dict())
    assert again.keep_forget_batches and torch.equal(again.level_of(at), prior.level_of(at))

    assert prior.needs_forget_batches and not prior.watches

    under_a_bias = run(biased)
    assert not under_a_bias.keep_forget_batches and (under_a_bias.level_of(at) >= 1.48).all()
    assert not under_a_bias.needs_forget_batches and not under_a_bias.watches
    for silent in ("calibration_seen_in_training", "one_label"):  # neither says anything about errors
        prior = run(wrong, **{silent: True})
        assert not prior.needs_forget_batches and not prior.watches and not prior.keep_forget_batches


def test_label_noise_z_is_the_pooled_test_of_two_proportions():
    forget, unseen = torch.tensor([-1.0] * 30 + [1.0] * 70), torch.tensor([-1.0] * 10 + [1.0] * 40)
    pooled = 40 / 150
    expected = (0.3 - 0.2) / (pooled * (1 - pooled) * (1 / 100 + 1 / 50)) ** 0.5
    assert label_noise_z(forget, unseen) == pytest.approx(expected, abs=1e-12)
    assert label_noise_z(torch.ones(5), torch.ones(5)) == 0
    g = torch.Generator().manual_seed(0)
    draws = [label_noise_z(torch.rand(512, generator=g) - 0.2, torch.rand(300, generator=g) - 0.2) for _ in range(400)]
    assert torch.tensor(draws).std().item() == pytest.approx(1, abs=0.1)


# ---- priors of one's own ----


@pytest.fixture
def mine():
    @register_prior("mine")
    class Mine(Prior):
        """Asks for everything that a prior can ask for."""

        needs_calibration_margins = True

        def __init__(self):
            self.seen = []

        def prepare(self, context):
            self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in context.trainable().items()}

        def refresh(self, forget_margins, calibration_margins):
            self.seen.append((len(forget_margins()), calibration_margins()))

        def forget_loss(self, logits, labels):
            return self.task.margin(logits, labels).mean()

    yield Mine
    del PRIORS["mine"]


def test_a_registered_prior_is_taken_by_its_name(mine, tmp_path):
    with pytest.warns(UserWarning, match="No calibration_dataset: 3 retained examples"):
        trainer = UIBTrainer(
            make_model(),
            config(tmp_path, prior="mine", prior_fraction=1.0),
            make_rows(n=24, seed=1),
            make_rows(n=16, seed=2),
        )
    assert type(trainer.prior) is mine
    trainer.train()
    assert [(n, len(margins)) for n, margins in trainer.prior.seen] == [(24, 3)] * 3  # six steps, a refresh every two
    assert "forget_margin" in trainer.state.log_history[-2]
    (settings,) = HfArgumentParser(UIBConfig).parse_args_into_dataclasses(["--output_dir", "x", "--prior", "mine"])
    assert settings.prior == "mine"


def test_a_name_that_is_not_registered_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prior is 'mine'; choose one of calibrated, .*register_prior"):
        config(tmp_path, prior="mine")


def test_a_prior_that_needs_margins_is_told_where_there_are_none(mine, tmp_path):
    with pytest.warns(UserWarning, match="4 retained examples are too few"):
        trainer = UIBTrainer(
            make_model(), config(tmp_path, prior="mine"), make_rows(n=24, seed=1), make_rows(n=4, seed=2)
        )
    trainer.train()
    assert all(margins is None for _, margins in trainer.prior.seen)


def test_priors_share_nothing(mine, tmp_path):
    one, other = mine(), mine()
    with pytest.raises(TypeError):
        one.masks["weight"] = torch.ones(1)  # not before the start of a run
    trainer = make_trainer(tmp_path, prior="mine")
    trainer.train()
    assert trainer.prior.masks and not one.masks and not other.masks and not Prior.masks


def test_a_prior_without_its_method_says_so(tmp_path):
    class Empty(Prior):
        pass

    trainer = UIBTrainer(
        make_model(), config(tmp_path), make_rows(n=24, seed=1), make_rows(n=16, seed=2), prior=Empty()
    )
    with pytest.raises(NotImplementedError, match="Empty has no method forget_loss"):
        trainer.train()


def test_a_level_for_a_prior_object_is_refused(tmp_path):
    args = config(tmp_path, forget_target=0.5)
    with pytest.raises(ValueError, match="give it to your prior object"):
        UIBTrainer(make_model(), args, make_rows(n=24, seed=1), make_rows(n=16, seed=2), prior=CalibratedPrior())


def test_a_second_training_knows_nothing_of_the_first_one_s_prior(tmp_path):
    class Adding(Prior):
        def __init__(self):
            self.total = 0

        def refresh(self, forget_margins, calibration_margins):
            self.total += 1

        def forget_loss(self, logits, labels):
            return self.task.margin(logits, labels).mean()

    trainer = UIBTrainer(
        make_model(),
        config(tmp_path, prior_fraction=1.0),
        make_rows(n=24, seed=1),
        make_rows(n=16, seed=2),
        prior=Adding(),
    )
    first = trainer.prior
    for _ in range(2):
        trainer.train()
        assert trainer.prior.total == 3
    assert first.total == 3


def test_forget_batches_to_the_end_where_the_class_says_so(tmp_path):
    class Lasting(Prior):
        keep_forget_batches = True

        def forget_loss(self, logits, labels):
            return self.task.margin(logits, labels).mean()

    trainer = UIBTrainer(
        make_model(), config(tmp_path), make_rows(n=24, seed=1), make_rows(n=16, seed=2), prior=Lasting()
    )
    trainer.train()
    assert all("forget_margin" in entry for entry in trainer.state.log_history if "fit_nats" in entry)


def test_resume_knows_what_the_prior_was_made_with(tmp_path):
    class Weighted(Prior):
        def __init__(self, weight):
            self.weight = weight

        def forget_loss(self, logits, labels):
            return self.weight * self.task.margin(logits, labels).mean()

    def trainer(weight):
        args = config(tmp_path, save_strategy="steps", save_steps=3)
        return UIBTrainer(make_model(), args, make_rows(n=24, seed=1), make_rows(n=16, seed=2), prior=Weighted(weight))

    trainer(1.0).train()
    trainer(1.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"made with prior.weight 1.0, not 5.0"):
        trainer(5.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("wrong", ["mine", lambda logits, labels: 0, CalibratedPrior])
def test_what_is_no_prior_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"give an object of a subclass of hf_uib.Prior"):
        UIBTrainer(make_model(), config(tmp_path), make_rows(n=24, seed=1), make_rows(n=16, seed=2), prior=wrong)


def test_names_are_taken_once_and_by_priors_alone():
    with pytest.raises(ValueError, match="There is a prior 'ascent' already"):
        register_prior("ascent")(type("Other", (Prior,), {}))
    with pytest.raises(ValueError, match="takes a subclass of hf_uib.Prior"):
        register_prior("function")(lambda logits, labels: 0)
    assert "function" not in PRIORS and PRIORS["ascent"].__name__ == "AscentPrior"


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            dict(channel_settings={"floor": -1}),
            "channel_settings: floor is -1; it must be a number between 1e-09 and inf",
        ),
        (dict(channel_settings={"floor": "a"}), "floor is 'a'"),
        (dict(influence_settings={"exact": 1.5}), "exact is 1.5; it must be a whole number"),
        (dict(channel_settings={"min_relative_scale": 2}), "between 0 and 1"),
        (dict(channel_settings={"floors": 1}), "has no 'floors'; it has noise_to_signal, "),
        (dict(channel_settings="{floor"), "channel_settings is '{floor'; write it as JSON"),
        (dict(channel_settings=[1]), "channel_settings is .1.; give a dictionary"),
        (dict(influence_settings={"damping": -1.0}), "influence_settings: damping is -1.0"),
        (dict(beta=float("nan")), "beta is nan"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


def test_settings_as_object_dictionary_and_json_are_one(tmp_path):
    made = [
        config(tmp_path, channel_settings=s) for s in (ChannelSettings(floor=0.1), {"floor": 0.1}, '{"floor": 0.1}')
    ]
    assert all(args.channel == ChannelSettings(floor=0.1) for args in made)
    assert all(args.to_json_string() for args in made)
