"""Every architecture that the documentation names trains, saves, reloads and detaches."""

import pytest
import torch
from conftest import ARCHITECTURES, make_model, make_rows
from peft import PeftModel

from hf_uib import UIBConfig, UIBTrainer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_saves_and_detaches(architecture, tmp_path):
    base = make_model(architecture)
    untouched = {name: value.clone() for name, value in base.state_dict().items()}
    rows = make_rows(architecture, n=4, seed=9)
    inputs = {k: torch.as_tensor(v) for k, v in rows[:].items() if k not in ("labels", "source")}
    base.eval()
    before = base(**inputs).logits
    args = UIBConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, subspace_rank=4, noise_to_signal=0.5,
        prior_update_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = UIBTrainer(
        base,
        args,
        make_rows(architecture, 24, seed=1),
        make_rows(architecture, 16, seed=2),
        make_rows(architecture, 12, seed=3),
    )
    trainer.train()
    model = trainer.model.eval()
    after = model(**inputs).logits
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, before)
    weights = {k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(weights[name], value) for name, value in untouched.items())
    trainer.save_model()
    fresh = make_model(architecture)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(reloaded(**inputs).logits, after)
    merged = trainer.merge_and_unload().eval()
    torch.testing.assert_close(merged(**inputs).logits, after, rtol=1e-4, atol=1e-4)
    assert type(merged) is type(fresh)
    assert all(entry["nats"] >= 0 for entry in trainer.layer_report())
    heads = [
        entry for entry in trainer.layer_report() if "classifier" in entry["layer"] or "out_proj" in entry["layer"]
    ]
    assert any(entry["nats"] > 0 for entry in heads)  # the head unlearns too


@pytest.mark.parametrize("factors", ["B", "both"])
def test_layers_that_are_never_called_or_say_nothing(tmp_path, factors):
    model = make_model()
    model.unused = torch.nn.Linear(5, 5)
    silent = next(m for n, m in model.named_modules() if n.endswith(("output.dense", "o_proj")))
    silent.weight.data.zero_()
    args = UIBConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, subspace_rank=4, noise_to_signal=0.5, prior_update_steps=2,
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, trainable_factors=factors,
    )  # fmt: skip
    trainer = UIBTrainer(model, args, make_rows(n=24, seed=1), make_rows(n=16, seed=2), make_rows(n=12, seed=3))
    trainer.train()
    nats = [row["kl_nats"] for row in trainer.state.log_history if "kl_nats" in row]
    assert len(nats) == 4 and 0 < max(nats) < 1e4
