"""One published property of each baseline, on small real models and data."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_rows
from sklearn.linear_model import LogisticRegression

from benchmarks.methods import Budget, dfr, finetuning, group_dro, influence, neggrad, random_label, scrub, ssd
from hf_uib.cli.digits import Task
from hf_uib.inference import head_of, observe


def task_of(forget, retain):
    return Task("made", {"forget": forget, "retain": retain}, make_model, None, "source")


@pytest.fixture
def task():
    return task_of(make_rows(n=40, seed=1), make_rows(n=60, seed=2))


def budget(**changes):
    return Budget(**(dict(steps=30, batch_size=16, learning_rate=3e-3) | changes))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_on(model, part):
    seen = observe(model, part)
    return float(F.cross_entropy(torch.tensor(seen.logits), torch.tensor(seen.labels)))


def test_same_seed_same_model_other_seed_other_model(task):
    made = [weights(finetuning.finetune(make_model(), task, budget(seed=seed))) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_fine_tuning_learns_the_retained_rows_alone(task):
    start = make_model()
    for function in (finetuning.finetune, finetuning.finetune_lora):
        model = function(copy.deepcopy(start), task, budget())
        assert loss_on(model, task.sets["retain"]) < loss_on(start, task.sets["retain"]) - 0.3


def test_neggrad_plus_raises_the_forget_loss_and_without_ascent_is_fine_tuning(task):
    plain = finetuning.finetune(make_model(), task, budget())
    ascended = neggrad.neggrad_plus(make_model(), task, budget(), alpha=0.7)
    assert loss_on(ascended, task.sets["forget"]) > loss_on(plain, task.sets["forget"]) + 0.5
    none = neggrad.neggrad_plus(make_model(), task, budget(), alpha=1.0)
    torch.testing.assert_close(weights(none), weights(plain), rtol=1e-3, atol=1e-4)


def test_random_labels_are_other_labels_and_raise_the_forget_loss(task):
    draw, labels = random_label.other_labels(3, 0), torch.arange(3).repeat(100)
    drawn = draw(labels)
    assert (drawn != labels).all() and set(drawn[labels == 0].tolist()) == {1, 2}
    model = random_label.random_label(make_model(), task, budget(), weight=1.0)
    assert loss_on(model, task.sets["forget"]) > loss_on(
        finetuning.finetune(make_model(), task, budget()), task.sets["forget"]
    )


def test_saluns_masked_weights_do_not_move(task):
    model = make_model()
    masks = [m for _, m in random_label.saliency_masks(model, task, budget())]
    before = [p.detach().clone() for p in model.parameters()]
    random_label.salun(model, task, budget())
    moved = [p != b for p, b in zip(model.parameters(), before, strict=True)]
    assert not any((m & ~free).any() for m, free in zip(moved, masks, strict=True))
    assert sum(int((m & free).sum()) for m, free in zip(moved, masks, strict=True)) > 0.45 * len(weights(model))


def test_scrub_alternates_and_then_only_repairs(task, monkeypatch):
    served = []

    def recording(name):
        batches = getattr(scrub, f"{name}_batches")

        def record(*given):
            for batch in batches(*given):
                served.append(name)
                yield batch

        return record

    for name in ("forget", "retain"):
        monkeypatch.setattr(scrub, f"{name}_batches", recording(name))
    scrub.scrub(make_model(), task, budget(steps=12), ascent=0.5)
    assert served == ["forget", "retain"] * 3 + ["retain"] * 6


def test_scrub_leaves_the_teacher_on_forget_rows(task):
    teacher, moved = make_model(), {}
    for ascent in (0.0, 1.0):
        student = scrub.scrub(copy.deepcopy(teacher), task, budget(), ascent=ascent)
        mine, theirs = (
            torch.tensor(observe(m, task.sets["forget"]).logits).log_softmax(-1) for m in (student, teacher)
        )
        moved[ascent] = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    assert moved[1.0] > 2 * moved[0.0]


def test_ssd_does_nothing_where_the_forget_set_is_a_random_draw_and_something_where_it_is_not(task):
    start = make_model()
    random_draw = ssd.ssd(copy.deepcopy(start), task, budget(), alpha=10.0)
    assert torch.equal(weights(random_draw), weights(start))

    def brighter(batch):
        return {"pixel_values": [8 * p for p in batch["pixel_values"]]}

    other = task_of(task.sets["forget"].map(brighter, batched=True).with_format("torch"), task.sets["retain"])
    dampened = ssd.ssd(copy.deepcopy(start), other, budget(), alpha=1.5)
    changed = weights(dampened) != weights(start)
    assert changed.any() and (weights(dampened)[changed].abs() < weights(start)[changed].abs()).all()


def test_l1_makes_the_weights_smaller(task):
    sizes = [
        weights(finetuning.l1_sparse(make_model(), task, budget(), gamma=g)).abs().mean().item() for g in (0.0, 1e-2)
    ]
    assert sizes[1] < 0.95 * sizes[0]
    torch.testing.assert_close(
        weights(finetuning.l1_sparse(make_model(), task, budget(), gamma=0.0)),
        weights(finetuning.finetune(make_model(), task, budget())),
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_dfr_is_a_logistic_regression_under_the_same_encoder(classes):
    task = task_of(None, make_rows(n=60, num_labels=classes, seed=2))
    model = make_model(num_labels=classes)
    features = observe(model, task.sets["retain"]).features["head"]
    refitted = dfr.dfr(copy.deepcopy(model), task, budget(), inverse=1.0)
    seen = observe(refitted, task.sets["retain"])
    np.testing.assert_array_equal(seen.features["head"], features)
    x = (features - features.mean(0)) / (features.std(0) + 1e-8)
    expected = LogisticRegression(C=1.0, max_iter=1000).fit(x, seen.labels).predict_proba(x)
    np.testing.assert_allclose(seen.probabilities, expected, atol=2e-3)
    same = [n for (n, p), q in zip(refitted.named_parameters(), model.parameters(), strict=True) if torch.equal(p, q)]
    assert len(same) == len(list(model.parameters())) - len(list(head_of(model).parameters()))


def test_group_dro_serves_small_groups_better_than_fine_tuning(task):
    retain = make_rows(n=120, seed=5)
    rare = [i for i in range(120) if int(retain[i]["source"]) == 1 and int(retain[i]["labels"]) == 0]
    task.sets["retain"] = retain.select([i for i in range(120) if i not in rare[4:]])
    group = task.sets["retain"].select(
        [i for i, r in enumerate(task.sets["retain"]) if int(r["source"]) == 1 and int(r["labels"]) == 0]
    )
    plain, robust = (f(make_model(), task, budget(steps=15)) for f in (finetuning.finetune, group_dro.group_dro))
    assert len(group) == 4 and loss_on(robust, group) < loss_on(plain, group)


def test_influence_moves_against_the_forget_rows(task):
    start = finetuning.finetune(make_model(), task_of(task.sets["forget"], task.sets["forget"]), budget(steps=20))
    model = influence.influence(copy.deepcopy(start), task, budget(), damping=10.0, scale=0.01)
    assert loss_on(model, task.sets["forget"]) > loss_on(start, task.sets["forget"])
