"""V_l against a dense SVD of gradients that autograd computes."""

import weakref

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows
from torch.utils.checkpoint import checkpoint

from hf_uib import UIBConfig, UIBTrainer, contrast, objective
from hf_uib.data.checks import comparable
from hf_uib.lora import is_linear
from hf_uib.measurements import MARGIN_OF_Z


def dense_contrast(model, sets):
    """C_l from autograd on the plain model's weights."""
    model.eval()
    for p in model.parameters():
        p.requires_grad_(True)
    total = 0.0
    for rows, sign in sets:
        logits = model(pixel_values=torch.stack(list(rows["pixel_values"]))).logits
        total = total + sign * objective.margin(logits, torch.as_tensor(rows["labels"])).mean()
    model.zero_grad()
    total.backward()
    return {n: m.weight.grad.flatten(1).double() for n, m in model.named_modules() if is_linear(m)}


@pytest.fixture
def trainer(tmp_path, model, forget, retain):
    return UIBTrainer(
        model,
        UIBConfig(str(tmp_path), subspace_rank=4, use_cpu=True),
        forget,
        retain,
        calibration_dataset=make_rows(seed=3),
    )


@pytest.mark.parametrize("rank", [4, 1])
def test_subspace_is_that_of_the_dense_gradient(trainer, forget, retain, rank):
    # Layers with d_out > 4 k + 16 are sketched; rank 1 makes all of these wide enough. What a sketch keeps is nearly the best.
    trainer.args.subspace_rank = rank
    measured = trainer.measurements.contrast(trainer.model, trainer.layers)
    subspaces = measured.subspaces
    dense = dense_contrast(make_model(), [(forget[:], 1.0), (retain[:], -1.0)])
    means = mean_inputs(make_model(), [forget[:], retain[:]])
    assert set(subspaces) == set(dense)
    for name in dense:
        readers = (
            [f"{name[:-6]}{part}_proj" for part in "qkv"] if name.endswith(("q_proj", "k_proj", "v_proj")) else [name]
        )
        c = torch.cat([dense[reader] for reader in readers])  # of layers that read one input
        assert all(torch.equal(subspaces[reader], subspaces[name]) for reader in readers)
        v = subspaces[name].double()
        live = v.norm(dim=1) > 0
        torch.testing.assert_close(
            v[live] @ v[live].T, torch.eye(int(live.sum()), dtype=torch.float64), rtol=0, atol=1e-5
        )
        kept = (c @ v.T).norm()
        values = torch.linalg.svdvals(c)  # the mean input is left out, so a little less than the best can be kept
        assert kept <= values[:rank].norm() + 1e-6
        assert (v @ means[name]).abs().max() < 1e-5
        best = torch.linalg.svdvals(c - torch.outer(c @ means[name], means[name]))[:rank].norm()
        assert kept >= best * (0.98 if rank == 4 else 0.9)


def mean_inputs(model, sets):
    """The mean input of each linear layer, ``[d_in]`` of length 1."""
    seen = {}
    for name, module in model.named_modules():
        if is_linear(module):
            module.register_forward_hook(
                lambda m, x, _, n=name: seen.setdefault(n, []).append(contrast.input_rows(m, x[0]))
            )
    with torch.no_grad():
        for rows in sets:
            model.eval()(pixel_values=torch.stack(list(rows["pixel_values"])))
    means = {name: torch.cat(rows).double().mean(0) for name, rows in seen.items()}
    return {name: mean / mean.norm() for name, mean in means.items()}


def test_top_singular_vectors_of_small_and_large_matrices():
    g = torch.Generator().manual_seed(0)
    for shape in ((20, 30), (300, 400), (400, 300)):
        m = torch.randn(shape[0], 5, generator=g, dtype=torch.float64) @ torch.randn(
            5, shape[1], generator=g, dtype=torch.float64
        )
        v = contrast.top_right_singular_vectors(m, 5)
        reference = torch.linalg.svd(m, full_matrices=False).Vh[:5]
        torch.testing.assert_close(v.T @ v, reference.T @ reference, rtol=0, atol=1e-8)
    assert contrast.top_right_singular_vectors(torch.ones(2, 6, dtype=torch.float64), 4).shape == (4, 6)


def statistics(layer, rank=2):
    return contrast.new_statistics({"layer": layer}, rank)


class Classifier(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return type("Output", (), {"logits": self.layer(x)})()


def run(layer, stats, x, y, sign=1.0):
    moments = contrast.accumulate(Classifier(layer), {"layer": layer}, stats, [({"x": x, "labels": y}, sign / len(x))])
    for s in stats.values():
        s.take_chunk()
    return moments


def test_matches_dense_svd_off_the_mean_and_sketch_agrees():
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 60)
    x, y = torch.randn(40, 3) @ torch.randn(3, 12) + 1.0, torch.randint(0, 60, (40,))
    dense = statistics(layer, 11)  # 4 k + 16 rows are no sketch
    assert dense["layer"].sketch is None
    run(layer, dense, x, y)
    layer.zero_grad()
    objective.margin(layer(x), y).mean().backward()
    c = layer.weight.grad.double()
    torch.testing.assert_close(dense["layer"].contrast.double(), c, rtol=1e-4, atol=1e-6)
    mean = x.mean(0).double()
    mean = mean / mean.norm()
    projected = c - torch.outer(c @ mean, mean)
    reference = torch.linalg.svd(projected, full_matrices=False).Vh[:2]
    v = contrast.subspace([dense["layer"]], 2).double()
    torch.testing.assert_close(v.T @ v, reference.T @ reference, rtol=0, atol=1e-4)
    assert (v @ mean).abs().max() < 1e-5
    signal = (x @ layer.weight.T).square().mean().sqrt()
    torch.testing.assert_close(dense["layer"].signal().float(), signal.detach(), rtol=1e-5, atol=0)

    sketched = statistics(layer)
    assert sketched["layer"].sketch is not None
    run(layer, sketched, x, y)
    w = contrast.subspace([sketched["layer"]], 2).double()
    kept = lambda rows: (projected @ rows.T).square().sum() / (projected @ reference.T).square().sum()
    chance = torch.linalg.qr(torch.randn(12, 2, dtype=torch.float64)).Q.T
    assert kept(w) > 0.95 > 0.9 > kept(chance)


def z_of(forget, retain, chunks=6):
    layer = torch.nn.Linear(12, 3)
    stats, moments = statistics(layer), []
    for chunk in range(chunks):
        batches = [
            ({"x": x[chunk::chunks], "labels": y[chunk::chunks]}, sign / len(x))
            for (x, y), sign in ((forget, 1.0), (retain, -1.0))
        ]
        moments.append(contrast.accumulate(Classifier(layer), {"layer": layer}, stats, batches))
        stats["layer"].take_chunk()
    return contrast.pattern_z(torch.stack(moments[1:]))


def rows(n, strength):
    y = torch.randint(0, 3, (n,))
    x = torch.randn(n, 12)
    x[torch.arange(n), y] += strength
    return x, y


def measured(strength, looks, undecided):
    """`measure_contrast` of samples of 60 and 60 rows a look; and how many rows it looked at."""
    sets, seen = [rows(60 * looks, s) for s in (strength, 0.0)], []

    def batches(chunk):
        look, within = divmod(chunk, contrast.CHUNKS)
        part = slice(60 * look + within, 60 * (look + 1), contrast.CHUNKS)
        for (x, y), sign in zip(sets, (1.0, -1.0), strict=True):
            seen.append((x[part], y[part], sign))
            yield {"x": x[part], "labels": y[part]}, sign / 60

    layer = torch.nn.Linear(12, 3)
    model = Classifier(layer)
    found = contrast.measure_contrast(
        model,
        {"layer": layer},
        batches,
        lambda: model(seen[0][0]),
        rank=2,
        compared=True,
        looks=looks,
        undecided=undecided,
    )
    return found, layer, seen


def test_further_looks_add_to_the_contrast():
    torch.manual_seed(0)
    for looks in (1, 3):
        found, layer, seen = measured(1.0, looks, lambda z: True)
        assert len(seen) == looks * 2 * contrast.CHUNKS and found.pattern_z > 2
        mean = {}
        for sign in (1.0, -1.0):
            x, y = (torch.cat([part[i] for part in seen if part[2] == sign]) for i in (0, 1))
            assert len(x) == 60 * looks
            layer.zero_grad()
            (objective.margin(layer(x), y).mean()).backward()
            mean[sign] = layer.weight.grad.clone()
        assert found.norms["layer"] == pytest.approx((mean[1.0] - mean[-1.0]).norm().item(), rel=1e-5)


def test_further_looks_find_a_weak_pattern_and_keep_the_error():
    """Of sets that are draws from one about 3 in 100 are told apart, with eight looks as with one; of a weak pattern far more."""
    torch.manual_seed(0)
    found = {}
    for strength in (0.0, 0.5):
        for looks in (1, 8):
            zs = [measured(strength, looks, lambda z: 0 < z < 2 + MARGIN_OF_Z)[0].pattern_z for _ in range(150)]
            found[strength, looks] = sum(z >= 2 for z in zs) / 150
    assert max(found[0.0, 1], found[0.0, 8]) <= 0.08
    assert found[0.5, 8] > found[0.5, 1] + 0.2, found


def test_z_tells_a_pattern_from_chance():
    torch.manual_seed(0)
    chance = [z_of(rows(120, 0.0), rows(60, 0.0)) for _ in range(200)]
    pattern = [z_of(rows(120, 2.0), rows(60, 0.0)) for _ in range(20)]
    assert abs(sum(chance) / 200) < 0.3 and sum(z > 2 for z in chance) <= 14  # about standard normal
    assert sum(z > 2 for z in pattern) >= 18


def test_z_needs_two_rows_of_each_set():
    assert contrast.pattern_z(torch.zeros(5, 2, 3)) == 0.0


def test_which_retained_rows_are_compared():
    """Rows of the forget set's labels where it has few of them; all where it has most, or none."""
    retain = np.array([0, 1, 2, 3, 0, 1])
    rows = lambda forget: comparable(np.array(forget), retain).tolist()
    assert rows([0, 0]) == [0, 4] and rows([0, 1]) == [0, 1, 4, 5]
    assert rows([0, 1, 2]) == rows([7]) == list(range(6))
    assert comparable(np.array([0]), None).tolist() == []


def contrast_of(architecture, path, dtype, again):
    rows = [make_rows(architecture, seed=seed) for seed in (1, 2, 3)]
    args = UIBConfig(str(path), subspace_rank=4, use_cpu=True, max_steps=20)
    trainer = UIBTrainer(make_model(architecture).to(dtype), args, *rows)
    args.gradient_checkpointing = again  # of models that have none of their own too
    found = trainer.measurements.contrast(trainer.model, trainer.layers)
    assert not any("forward" in vars(module) for module in trainer.model.modules())
    return found


@pytest.mark.parametrize(
    "architecture, dtype",
    [("bert", torch.bfloat16), ("vit", torch.float32), ("swinv2", torch.float32)],
)
def test_blocks_that_are_computed_again_give_the_same_to_the_bit(tmp_path, monkeypatch, architecture, dtype):
    calls = []
    monkeypatch.setattr(contrast, "checkpoint", lambda *args, **named: calls.append(0) or checkpoint(*args, **named))
    first, second = (contrast_of(architecture, tmp_path, dtype, again) for again in (False, True))
    assert calls
    assert first.pattern_z == second.pattern_z and first.norms == second.norms and any(first.norms.values())
    for name in first.norms:
        assert torch.equal(first.subspaces[name], second.subspaces[name])
        assert torch.equal(first.output_scales[name], second.output_scales[name])


@pytest.mark.parametrize("architecture", ["vit", "bert", "deberta-v2"])
def test_no_activation_of_the_pass_stays_in_memory(architecture, tmp_path):
    """What hangs on the way back of every linear layer goes with it, and no garbage collection is waited for."""
    sets = [make_rows(architecture, seed=seed) for seed in (1, 2, 3)]
    args = UIBConfig(str(tmp_path), subspace_rank=4, use_cpu=True)
    trainer = UIBTrainer(make_model(architecture), args, *sets)
    seen = []

    class Witness:
        """Can be referred to weakly."""

    def hang_on(module, inputs, output):
        if output.requires_grad:
            witness = Witness()
            seen.append(weakref.ref(witness))
            output.register_hook(lambda gradient, kept=witness: None)

    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hang_on)
    trainer.run_statistics_pass()
    assert len(seen) > 50
    assert not any(witness() for witness in seen)
