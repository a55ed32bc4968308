"""Identities and contracts of the trainer."""

import copy
import json
import os

import pytest
import torch
from conftest import make_model, make_rows
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.lora import is_linear, lora_layers
from hf_uib.objective import rank_z
from hf_uib.priors import Prior


def config(path, **settings):
    defaults = dict(
        max_steps=6, per_device_train_batch_size=4, subspace_rank=4, learning_rate=0.01, use_cpu=True, save_strategy="no",
        disable_tqdm=True, prior_update_steps=2, noise_to_signal=0.5, logging_steps=1, report_to="none",
    )  # fmt: skip
    return UIBConfig(str(path), **(defaults | settings))


def make_trainer(path, model=None, retain_n=16, **settings):
    return UIBTrainer(
        make_model() if model is None else model,
        config(path, **settings),
        make_rows(n=24, seed=1),
        make_rows(n=retain_n, seed=2),
        calibration_dataset=make_rows(n=12, seed=3),
    )


def adapter_weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# ---- special cases ----


@pytest.mark.parametrize(
    ("architecture", "factors", "rows", "accumulation"),
    [
        ("vit", "B", 16, 1),
        ("vit", "both", 16, 1),
        ("bert", "B", 16, 1),
        ("bert", "both", 16, 1),
        ("vit", "both", 13, 2),  # batches of different sizes; not BERT, whose own loss is not divided by their number
    ],
)
def test_no_prior_no_bound_no_noise_is_fine_tuning_to_the_bit(tmp_path, architecture, factors, rows, accumulation):
    settings = dict(
        max_steps=9, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, learning_rate=0.01, seed=3,
        weight_decay=0.0,
    )  # fmt: skip
    args = UIBConfig(
        str(tmp_path / "a"), prior="none", beta=0.0, posterior="map", trainable_factors=factors, subspace_rank=4, use_cpu=True,
        save_strategy="no", disable_tqdm=True, report_to="none", **settings,
    )  # fmt: skip
    retain = make_rows(architecture, rows, seed=2)
    trainer = UIBTrainer(make_model(architecture), args, make_rows(architecture, 24, seed=1), retain)
    trainer.run_statistics_pass()
    twin = copy.deepcopy(trainer.model)
    trainer.train()
    stock = TrainingArguments(
        str(tmp_path / "b"), use_cpu=True, save_strategy="no", disable_tqdm=True, label_names=["labels"], **settings
    )
    Trainer(twin, stock, train_dataset=retain.remove_columns("source")).train()
    mine, theirs = trainer.model.state_dict(), twin.state_dict()
    moved = [name for name in mine if "lora_B" in name and mine[name].any()]
    assert moved and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_each_part_of_the_objective_changes_the_result(tmp_path):
    """Negative control of the test above."""
    plain = make_trainer(tmp_path, prior="none", beta=0.0, posterior="map")
    plain.train()
    for settings in (dict(beta=1.0), dict(posterior="gaussian"), dict(prior="calibrated")):
        other = make_trainer(tmp_path, **(dict(prior="none", beta=0.0, posterior="map") | settings))
        other.train()
        assert not same(adapter_weights(plain), adapter_weights(other)), settings


def test_same_seed_same_run_other_seed_other_run(tmp_path):
    runs = []
    for seed in (0, 0, 1):
        trainer = make_trainer(tmp_path, seed=seed)
        trainer.train()
        runs.append(adapter_weights(trainer))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


# ---- invariances ----


def test_accumulation_gives_one_trajectory_with_noise(tmp_path):
    runs = {}
    for batch, accumulation in ((8, 1), (4, 2)):
        trainer = make_trainer(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, learning_rate=1e-3
        )
        trainer.train()
        runs[batch] = adapter_weights(trainer), losses(trainer)
    torch.testing.assert_close(runs[8][1], runs[4][1], rtol=1e-4, atol=1e-5)
    for name, value in runs[8][0].items():
        torch.testing.assert_close(value, runs[4][0][name], rtol=1e-3, atol=1e-4)
    other = make_trainer(tmp_path, per_device_train_batch_size=8, noise_to_signal=0.0, learning_rate=1e-3)
    other.train()
    assert max(abs(a - b) for a, b in zip(losses(other), runs[8][1], strict=True)) > 1e-2  # the comparison can fail


def noise_of(trainer, name):
    noise = trainer.posterior.noise
    return noise.noise[noise.drawn.index(noise.first[name])]


def test_noise_has_the_stated_covariance_and_is_reproducible(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run_statistics_pass()
    name = next(iter(trainer.layers))
    draws = []
    for step in range(300):
        trainer.posterior.noise.draw(0.5, 0, step)
        draws.append(noise_of(trainer, name))
    flat = torch.cat(draws).flatten(1)  # [300 x DRAWS, k k]
    k = trainer.args.subspace_rank
    width = 0.5 / k**0.5
    covariance = flat.T @ flat / len(flat)
    torch.testing.assert_close(covariance, width**2 * torch.eye(k * k), rtol=0, atol=0.12 * width**2)
    trainer.posterior.noise.draw(0.5, 0, 7)
    assert torch.equal(noise_of(trainer, name), draws[7])
    assert not torch.equal(draws[7], draws[8])


@pytest.mark.parametrize("factors", ["B", "both"])
def test_noise_mixes_what_the_layer_reads_of_the_pattern(tmp_path, factors):
    trainer = make_trainer(tmp_path, trainable_factors=factors)
    trainer.run_statistics_pass()
    assert trainer.posterior.a_spans_subspace == (factors == "B")
    for name in ("vit.layers.1.mlp.fc1", "vit.embeddings.patch_embeddings.projection"):
        layer, v = trainer.layers[name], trainer.posterior.subspaces[name]
        layer.lora_B["default"].weight.data.normal_(0, 0.1)
        base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
        read = (base.weight.flatten(1) + layer.scaling["default"] * b.flatten(1) @ a.flatten(1)) @ v.T
        x = torch.randn(3, 1, 8, 8) if base.weight.ndim == 4 else torch.randn(3, 5, base.in_features)
        trainer.posterior.noise.silence()
        layer.train()
        quiet = layer(x)
        trainer.posterior.noise.draw(0.5, 0, 3)
        trainer.posterior.noise.set_rows(torch.tensor([5, 6 + trainer.posterior.noise.DRAWS, 5]))
        noisy = layer(x)
        for row, draw in enumerate((5, 6, 5)):
            noise = (read @ noise_of(trainer, name)[draw].T @ v).view_as(base.weight)
            one = x[row : row + 1]
            moved = torch.nn.functional.conv2d(one, noise, stride=4) if base.weight.ndim == 4 else one @ noise.T
            torch.testing.assert_close(noisy[row : row + 1], quiet[row : row + 1] + moved, rtol=1e-4, atol=1e-4)
            assert moved.abs().max() > 0.01
        layer.eval()
        torch.testing.assert_close(layer(x), quiet, rtol=0, atol=0)


@pytest.mark.parametrize("again", [False, True])
def test_queries_keys_and_values_read_one_disturbed_input(tmp_path, again):
    trainer = make_trainer(tmp_path, gradient_checkpointing=again)
    trainer.run_statistics_pass()
    if again:
        trainer.model.gradient_checkpointing_enable()
    attention = [f"vit.layers.1.attention.{part}_proj" for part in "qkv"]
    noise, v = trainer.posterior.noise, trainer.posterior.subspaces
    assert {noise.first[name] for name in attention} == {attention[0]}
    other = "vit.layers.1.mlp.fc1"
    assert noise.first[other] == other and len(noise.drawn) == len(noise.subspaces) - 4  # two of each of two layers
    assert torch.equal(v[attention[0]], v[attention[2]]) and not torch.equal(v[attention[0]], v[other])
    given = {name: [] for name in [*attention, other]}
    for name, seen in given.items():
        layer = trainer.layers[name].get_base_layer()
        layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
    trainer.model.train()
    noise.draw(0.5, 0, 3)
    rows = torch.stack(list(make_rows(n=4)["pixel_values"]))
    trainer.model(pixel_values=rows).logits.sum().backward()
    for q, k, value in zip(*(given[name] for name in attention), strict=True):
        assert q is k is value
    assert len(given[other]) == 1 + again and not torch.equal(given[other][0], given[attention[0]][0])


def test_evaluation_and_saving_use_the_mean(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    rows = make_rows(n=8, seed=5)
    first, second = trainer.predict(rows).predictions, trainer.predict(rows).predictions
    assert (first == second).all()
    assert trainer.posterior.noise.noise is None


# ---- adapters, saving, resuming ----


def test_a_reloaded_adapter_does_not_come_back_with_a_trainable(tmp_path):
    trainer = make_trainer(tmp_path, trainable_factors="B")
    trainer.train()
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    again = make_trainer(tmp_path / "again", model=reloaded, trainable_factors="B")
    frozen = [layer.lora_A["default"].weight.requires_grad for layer in lora_layers(again.model).values()]
    assert not any(frozen) and same(adapter_weights(trainer), adapter_weights(again))
    before = {n: w for n, w in adapter_weights(again).items() if "lora_A" in n}
    again.train()
    after = adapter_weights(again)
    assert all(torch.equal(after[n], w) for n, w in before.items())
    assert not same(adapter_weights(trainer), after)


def test_the_three_input_models(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trained = get_peft_model(make_model(), lora)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    start = {n: p.detach().clone() for n, p in trained.named_parameters() if "lora_" in n}
    for model in (make_model(), get_peft_model(make_model(), lora), trained):
        trainer = make_trainer(tmp_path, model=model, trainable_factors="B")
        trainer.train()
        assert adapter_weights(trainer)
    assert all(torch.equal(start[n], p) for n, p in adapter_weights(trainer).items() if "lora_A" in n)
    with pytest.raises(ValueError, match="not trainable"):
        frozen = PeftModel.from_pretrained(make_model(), _saved(trained, tmp_path / "frozen"))
        make_trainer(tmp_path, model=frozen)
    with pytest.raises(ValueError, match="PeftModel already"):
        UIBTrainer(trained, config(tmp_path), make_rows(seed=1), make_rows(seed=2), peft_config=lora)


def _saved(model, path):
    model.save_pretrained(path)
    return path


def test_model_by_folder(tmp_path):
    make_model().save_pretrained(tmp_path / "ckpt")
    trainer = make_trainer(tmp_path / "out", model=str(tmp_path / "ckpt"))
    trainer.train()
    trainer.save_model()
    again = make_trainer(
        tmp_path / "again", model=str(tmp_path / "out")
    )  # an adapter folder finds its base, and is merged
    rows = make_rows(n=16, seed=2)["pixel_values"][:]
    with torch.no_grad():
        told = [one.model.eval()(pixel_values=rows).logits for one in (trainer, again)]
        assert torch.allclose(*told, atol=1e-4)
        assert not torch.allclose(told[0], make_model().eval()(pixel_values=rows).logits, atol=1e-2)
    assert not any(weight.any() for name, weight in adapter_weights(again).items() if "lora_B" in name)


@pytest.mark.parametrize("factors, at", [("B", 3), ("B", 4), ("both", 3)])
def test_resume_is_bit_equal(tmp_path, factors, at):
    settings = dict(save_strategy="steps", save_steps=at, max_steps=8, trainable_factors=factors, prior_fraction=0.8)
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert same(adapter_weights(whole), adapter_weights(resumed))
    assert whole.layer_report() == resumed.layer_report()
    assert losses(whole) == losses(resumed)


def test_resume_refuses_another_model_or_forget_set(tmp_path):
    make_trainer(tmp_path / "a", save_strategy="steps", save_steps=3).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    with pytest.raises(ValueError, match="another model"):
        make_trainer(tmp_path / "b", model=make_model(seed=5)).train(resume_from_checkpoint=checkpoint)
    other = UIBTrainer(
        make_model(), config(tmp_path / "c"), make_rows(n=24, seed=7), make_rows(n=16, seed=2), make_rows(n=12, seed=3)
    )
    with pytest.raises(ValueError, match="another forget set"):
        other.train(resume_from_checkpoint=checkpoint)
    for setting, named in ((dict(prior="none"), "prior CalibratedPrior, not NoPrior"), (dict(seed=7), "seed")):
        with pytest.raises(ValueError, match=named):
            make_trainer(tmp_path / "d", **setting).train(resume_from_checkpoint=checkpoint)


def test_saved_folder(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    written = set(os.listdir(tmp_path))
    assert {"adapter_model.safetensors", "adapter_config.json", "uib_state.safetensors", "README.md"} <= written
    assert "training_args.bin" not in written
    with safe_open(tmp_path / "uib_state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["uib"])["forget"] == trainer.forget_fingerprint
    card = (tmp_path / "README.md").read_text()
    assert "base weights still hold" in card and str(tmp_path) not in card
    assert "base_model: ''" not in card
    for word in ("certified", "guarantee", "reproduces"):
        assert word not in card.lower()


def test_gradient_checkpointing(tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        runs.append(adapter_weights(trainer))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-3, atol=1e-5)


# ---- logs ----


def test_the_parts_of_the_bound_are_logged(tmp_path):
    trainer = make_trainer(tmp_path, noise_to_signal=0.0)  # no pattern, so that forget batches come
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert {"fit_nats", "kl_nats", "retain_margin", "calibration_margin"} <= set(entry)
    assert "forget_margin" in logs[0] and "forget_margin" not in logs[-1]  # the prior acts on the first 40%
    json.dumps(trainer.layer_report())


# ---- no retained data, own prior, bad input ----


def test_forget_set_alone_works_with_one_warning(tmp_path):
    with pytest.warns(UserWarning) as caught:
        trainer = UIBTrainer(make_model(), config(tmp_path, max_steps=30, prior_fraction=1.0), make_rows(n=24, seed=1))
    assert sum("No retain_dataset" in str(w.message) for w in caught) == 1
    before = trainer.task.margin(*trainer.inference.forward(trainer.forget_dataset, list(range(24)))).mean()
    trainer.train()
    assert trainer.task.margin(*trainer.inference.forward(trainer.forget_dataset, list(range(24)))).mean() < before


def test_fold_of_the_retained_data_stands_in_for_calibration(tmp_path):
    with pytest.warns(UserWarning, match="No calibration_dataset"):
        trainer = UIBTrainer(
            make_model(), config(tmp_path, noise_to_signal=0.0), make_rows(n=24, seed=1), make_rows(n=20, seed=2)
        )
    assert len(trainer.held_out) == 4
    trainer.train()
    assert torch.isfinite(trainer.prior.level).all()


def test_a_prior_of_your_own(tmp_path):
    class Halve(Prior):
        def forget_loss(self, logits, labels):
            return logits.square().mean()

    trainer = UIBTrainer(
        make_model(), config(tmp_path), make_rows(n=24, seed=1), make_rows(n=16, seed=2), prior=Halve()
    )
    trainer.train()
    assert "forget_margin" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(forget=make_rows(n=0)), "no examples"),
        (dict(retain=make_rows(n=24, seed=1)), "are in retain_dataset too"),
        (dict(forget=make_rows(n=8, num_labels=9, seed=4)), "outside the model's 3 classes"),
        (dict(forget=make_rows(n=8).remove_columns("labels")), "No column 'label'"),
        (dict(forget=None), "needs a forget_dataset"),
        (dict(model=torch.nn.Module), "no linear layer"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, change, message):
    model = make_model()
    if "model" in change:
        model = _without_linear_layers(model)
    forget = change.get("forget", make_rows(n=24, seed=1))
    with pytest.raises(ValueError, match=message) as caught:
        UIBTrainer(model, config(tmp_path), forget, change.get("retain", make_rows(n=16, seed=2)))
    assert "\n" not in str(caught.value)


def _without_linear_layers(model):
    for name, module in list(model.named_modules()):
        if is_linear(module):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], torch.nn.Identity())
    return model


@pytest.mark.parametrize(
    "settings",
    [dict(beta=-1), dict(prior="wrong"), dict(subspace_rank=0), dict(prior_fraction=2), dict(noise_to_signal=-0.1)],
)
def test_settings_out_of_range(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        config(tmp_path, **settings)


def test_infinite_inputs_are_refused(tmp_path):
    rows = make_rows(n=24, seed=1).with_format(None)
    broken = rows.map(lambda row, i: {"pixel_values": [[[float("inf")] * 8] * 8]} if i == 3 else {}, with_indices=True)
    trainer = UIBTrainer(
        make_model(),
        config(tmp_path),
        broken.with_format("torch"),
        make_rows(n=16, seed=2),
        calibration_dataset=make_rows(n=12, seed=3),
    )
    with pytest.raises(ValueError, match="not finite"):
        trainer.train()


def test_batch_norm_buffers_stay(tmp_path):
    model = make_model()
    model.vit.layernorm = torch.nn.Sequential(model.vit.layernorm, _TokenNorm(16))
    trainer = make_trainer(tmp_path, model=model)
    before = trainer.model.get_base_model().vit.layernorm[1].norm.running_mean.clone()
    trainer.train()
    assert torch.equal(before, trainer.model.get_base_model().vit.layernorm[1].norm.running_mean)


class _TokenNorm(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("closed", [True, False])
def test_the_prior_is_flat_along_the_subspace_where_a_channel_is_closed(tmp_path, closed):
    posterior = "gaussian" if closed else "map"  # without noise
    trainer = make_trainer(tmp_path, max_steps=4, trainable_factors="both", posterior=posterior, noise_to_signal=0.4)
    trainer.train()
    posterior = trainer.posterior
    assert posterior.along_is_free == closed
    for value, (name, layer) in zip(posterior.kl_per_layer(), trainer.layers.items(), strict=True):
        (a, b), v = posterior.factors(name), posterior.subspaces[name]
        moved = layer.scaling["default"] * (b @ a - posterior.prior_means_b[name] @ posterior.prior_means_a[name])
        counted = moved - moved @ v.T @ v if closed else moved
        floor = posterior.floors[list(trainer.layers).index(name)]
        torch.testing.assert_close(value, counted.square().sum() / (2 * floor**2), rtol=1e-3, atol=1e-4)
        assert counted.square().sum() > 0


def test_an_adapter_on_other_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="word_embeddings, a Embedding; UIB adapts linear layers"):
        rows = make_rows("bert", 16, seed=2), make_rows("bert", 24, seed=1)
        lora = LoraConfig(r=4, target_modules=["word_embeddings", "query"])
        UIBTrainer(make_model("bert"), config(tmp_path), *rows, peft_config=lora)


def test_training_again_goes_on_from_the_adapter(tmp_path):
    trainer = make_trainer(tmp_path, trainable_factors="B")
    trainer.train()
    first = adapter_weights(trainer)
    trainer.train()
    second = adapter_weights(trainer)
    assert all(torch.equal(second[n], w) for n, w in first.items() if "lora_A" in n) and not same(first, second)
    assert all(torch.isfinite(torch.tensor(entry["nats"])) for entry in trainer.layer_report())


def test_a_second_training_starts_afresh(tmp_path):
    """Level, statistics and divergence are those of a trainer that is given the adapter as it stands."""
    trainer = make_trainer(tmp_path / "a", noise_to_signal=0.0)
    trainer.train()
    level, nats = trainer.prior.level.clone(), [row["nats"] for row in trainer.layer_report()]
    trainer.save_model()
    adapter = PeftModel.from_pretrained(make_model(), tmp_path / "a", is_trainable=True)
    trainer.args.max_steps = 1  # one refresh
    trainer.train()
    anew = make_trainer(tmp_path / "b", model=adapter, max_steps=1, noise_to_signal=0.0)
    anew.train()
    assert torch.equal(trainer.prior.level, anew.prior.level) and not torch.equal(trainer.prior.level, level)
    assert trainer.prior.refreshes == 1 and trainer.statistics["pattern_z"] == anew.statistics["pattern_z"]
    assert losses(trainer) == losses(anew) and not trainer.posterior.cumulative_kl.any() and any(nats)


def test_what_is_asked_before_training_says_what_to_do(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator(trainer.train_dataset.__getitems__([(0, 0, (1,)), (1, 2, (3,))]))
    for ask in (trainer.layer_report, lambda: trainer.compute_loss(trainer.model, batch), lambda: trainer.posterior):
        with pytest.raises(ValueError, match=r"call trainer\.train\(\) first") as caught:
            ask()
        assert "\n" not in str(caught.value)
    trainer.run_statistics_pass()
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch)) and len(trainer.layer_report()) == len(
        trainer.layers
    )


def test_evaluation_in_the_middle_of_training_changes_nothing(tmp_path):
    runs = []
    for strategy in ("no", "steps"):
        trainer = UIBTrainer(
            make_model(), config(tmp_path, eval_strategy=strategy, eval_steps=2), make_rows(n=24, seed=1), make_rows(n=16, seed=2),
            calibration_dataset=make_rows(n=12, seed=3), eval_dataset={"test": make_rows(n=8, seed=4)},
        )  # fmt: skip
        trainer.train()
        runs.append(adapter_weights(trainer))
    assert same(*runs)
    assert any("eval_test_loss" in entry for entry in trainer.state.log_history)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="not finite at step"):
        trainer.train()


def crude(path, **settings):
    """Random rows, no pattern, and a prior that knows no level."""
    args = config(
        path, max_steps=150, prior="ascent", forget_target=float("-inf"), prior_strength=0.1, prior_fraction=1.0,
        noise_to_signal=0.0, swap_fraction=0.0, beta=0.0, trainable_factors="B",
        subspace_rank=16, per_device_train_batch_size=30, **settings,
    )  # fmt: skip
    forget, retain, unseen = (make_rows(n=60, seed=seed) for seed in (1, 2, 3))
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):  # the checkpoint has fitted both sets
        for rows in (forget, retain):
            model(pixel_values=rows["pixel_values"][:], labels=rows["labels"][:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return UIBTrainer(model, args, forget, retain, calibration_dataset=unseen)


def test_over_unlearning_goes_back_on_its_way(tmp_path, recwarn):
    """The change is scaled, all layers alike, to where forget and unseen rows are not told apart."""

    def z_of(trainer):
        margins = trainer.task.margin(*trainer.inference.forward(trainer.forget_dataset, range(60)))
        return rank_z(margins, trainer.measurements.calibration_margins())

    trainer = crude(tmp_path / "a", channel_settings={"pattern_z": -100.0})  # a pattern may end anywhere: the control
    trainer.train()
    far = adapter_weights(trainer)
    assert z_of(trainer) < -2 and "kept_fraction" not in trainer.statistics
    trainer = crude(tmp_path / "b")
    trainer.train()
    kept = trainer.statistics["kept_fraction"]
    assert 0 < kept < 1 and 0 <= z_of(trainer) < 1
    assert any("Over-unlearning" in str(w.message) for w in recwarn)
    for name, weight in adapter_weights(trainer).items():
        assert torch.allclose(weight, far[name] * (kept if "lora_B" in name else 1.0), atol=1e-7)


def test_over_unlearning_is_warned_of(tmp_path):
    """Where the adapter did not start at zero there is no way back to scale."""
    with pytest.warns(UserWarning, match="Train again with a smaller prior_strength"):
        trainer = crude(tmp_path)
        trainer.adapter_before = {n: w.clone() for n, w in get_peft_model_state_dict(trainer.model).items()}
        trainer.train()


def test_settings_that_serve_two_trainers_stay_as_they_are(tmp_path):
    args = config(tmp_path, max_steps=-1)
    with pytest.warns(UserWarning, match="100 steps are taken"):
        short = UIBTrainer(make_model(), args, make_rows(n=8, seed=1), make_rows(n=8, seed=2))
    assert (short.args.max_steps, args.max_steps) == (100, -1)


def test_a_second_run_has_an_optimizer_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, trainable_factors="B", max_steps=2)
    trainer.train()
    first = trainer.optimizer
    trainer.args.trainable_factors = "both"
    before = adapter_weights(trainer)
    trainer.train()
    after = adapter_weights(trainer)
    assert trainer.optimizer is not first
    assert any("lora_A" in name and not torch.equal(before[name], after[name]) for name in after)
    own = torch.optim.SGD([p for n, p in make_trainer(tmp_path).model.named_parameters() if "lora_" in n], lr=0.1)
    trainer = make_trainer(tmp_path, max_steps=1)
    own.param_groups[0]["params"] = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    given = UIBTrainer(
        trainer.model,
        config(tmp_path, max_steps=1),
        make_rows(n=8, seed=1),
        make_rows(n=8, seed=2),
        optimizers=(own, None),
    )
    for _ in range(2):
        given.train()
    assert getattr(given.optimizer, "optimizer", given.optimizer) is own


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_evaluation_in_half_precision_would_change_the_model(tmp_path, half):
    with pytest.raises(ValueError, match=f"does not run with {half}_full_eval.*set {half}=True"):
        make_trainer(tmp_path, **{f"{half}_full_eval": True})
