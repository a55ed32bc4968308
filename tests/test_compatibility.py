"""What else a TrainingArguments can ask for: the same result, or a refusal in one line. The table is in docs/scale.md."""

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from conftest import make_model, make_rows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.config import refuse_unsupported
from hf_uib.inference import SharedInference
from hf_uib.priors import InfluencePrior, PriorContext
from hf_uib.sharding import BEFORE


def train(path, callbacks=None, eval_dataset=None, **settings):
    given = dict(
        max_steps=8, per_device_train_batch_size=4, subspace_rank=4, learning_rate=0.01, use_cpu=True, disable_tqdm=True,
        logging_steps=1, prior_update_steps=3, noise_to_signal=0.5, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = UIBTrainer(
        make_model(), UIBConfig(str(path), **(given | settings)), make_rows(n=27, seed=1), make_rows(n=32, seed=2),
        make_rows(n=13, seed=3), eval_dataset=eval_dataset, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer


def parts(trainer, *names):
    logs = [row for row in trainer.state.log_history if "fit_nats" in row and "train_loss" not in row]
    return torch.tensor([[row[name] for name in names] for row in logs])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return parts(train(tmp_path_factory.mktemp("plain")), "loss", "fit_nats", "kl_nats")


SAME = {
    "gradient checkpointing, reentrant": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "gradient checkpointing, not reentrant": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "workers": dict(dataloader_num_workers=2),
    "compiled": dict(torch_compile=True, torch_compile_backend="eager"),
    "evaluated": dict(eval_strategy="steps", eval_steps=3),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_trajectory(tmp_path, plain, name):
    sets = {"first": make_rows(n=12, seed=9), "second": make_rows(n=5, seed=8)} if name == "evaluated" else None
    trainer = train(tmp_path, eval_dataset=sets, **SAME[name])
    torch.testing.assert_close(parts(trainer, "loss", "fit_nats", "kl_nats"), plain, rtol=2e-3, atol=2e-3)
    if name == "evaluated":
        assert {"eval_first_loss", "eval_second_loss"} <= {key for row in trainer.state.log_history for key in row}


def test_another_noise_is_another_trajectory(tmp_path, plain):
    other = parts(train(tmp_path, noise_to_signal=0.1), "loss", "fit_nats", "kl_nats")
    assert (other - plain).abs().max() > 0.05  # what the comparisons above would see


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(tmp_path, plain, precision):
    trainer = train(tmp_path, **{precision: True})
    fit = parts(trainer, "fit_nats")[:, 0]
    assert torch.isfinite(fit).all() and (fit[0] - plain[0, 1]).abs() < 0.1  # the same first step, but for rounding
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)


def test_the_best_checkpoint_comes_back(tmp_path):
    """Written in a folder of another name: what points to it has the final one, and `save_total_limit` spares it."""
    trainer = train(
        tmp_path, callbacks=[EarlyStoppingCallback(2)], eval_dataset=make_rows(n=12, seed=9), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert best == os.path.join(str(tmp_path), f"checkpoint-{min(losses, key=losses.get)}")
    assert trainer.state.global_step < 8 and not os.path.exists(tmp_path / "_unfinished")
    saved = load_file(os.path.join(best, "adapter_model.safetensors"))
    now = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if ".lora_" in n}
    assert all(torch.equal(saved[name], now[name]) for name in saved)
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(auto_find_batch_size=True), "does not run with auto_find_batch_size"),
        (dict(label_smoothing_factor=0.1), "no label_smoothing_factor"),
        (dict(accelerator_config={"split_batches": True}), "does not run with split_batches"),
        (dict(train_sampling_strategy="group_by_length"), "does not run with train_sampling_strategy"),
        (dict(dataloader_drop_last=True, per_device_train_batch_size=64), "make no whole batch of 64"),
    ],
)
def test_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_strategies_that_cannot_hold_are_refused(tmp_path, monkeypatch):
    args = UIBConfig(str(tmp_path), use_cpu=True, report_to="none")
    refuse_unsupported(args)  # the control
    args.hf_deepspeed_config = SimpleNamespace(is_zero3=lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3.*Use FSDP2.*or ZeRO-2"):
        refuse_unsupported(args)
    args.hf_deepspeed_config = None
    for name in (
        "FSDP_VERSION",
        "FSDP_CPU_RAM_EFFICIENT_LOADING",
        "FSDP_OFFLOAD_PARAMS",
        "FSDP_ACTIVATION_CHECKPOINTING",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="not FSDP1; set fsdp_version: 2"):
        refuse_unsupported(args)
    monkeypatch.setenv("FSDP_VERSION", "2")
    refuse_unsupported(args)  # the control
    for setting, message in (
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "set fsdp_cpu_ram_efficient_loading: false"),
        ("FSDP_OFFLOAD_PARAMS", "leave fsdp_offload_params out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set gradient_checkpointing, not"),
    ):
        with monkeypatch.context() as once:
            once.setenv(setting, "true")
            with pytest.raises(ValueError, match=message) as caught:
                refuse_unsupported(args)
        assert "\n" not in str(caught.value)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel; start it with `accelerate launch`"):
        refuse_unsupported(args)


@pytest.mark.parametrize(
    "strategy, uploads", [("end", 0), ("every_save", 2), ("checkpoint", 4), ("all_checkpoints", 4)]
)
def test_what_is_pushed_while_training(tmp_path, monkeypatch, strategy, uploads):
    """No pickled arguments, which hold the token, and no token in any file; the adapter each time."""
    from concurrent.futures import Future

    seen = []

    def upload_folder(self, *, folder_path, ignore_patterns=(), **kwargs):
        hidden = [pattern.rstrip("*") for pattern in ignore_patterns]
        names = [n for n in os.listdir(folder_path) if not any(n.startswith(h) for h in hidden)]
        seen.append((kwargs.get("path_in_repo"), {n: (Path(folder_path) / n).read_bytes() for n in names}))
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)

    def init_hf_repo(self, token=None, private=None):
        self.hub_model_id, self.push_in_progress = "me/it", None

    monkeypatch.setattr(UIBTrainer, "init_hf_repo", init_hf_repo)
    train(
        tmp_path, save_strategy="steps", save_steps=4, push_to_hub=True, hub_token="hf_secret", hub_strategy=strategy,
        hub_always_push=True,
    )  # fmt: skip
    assert len(seen) == uploads
    for _, files in seen:
        assert "training_args.bin" not in files and "_unfinished" not in files
        assert not any(b"hf_secret" in content for content in files.values())
        assert "adapter_model.safetensors" in files
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-4", "checkpoint-8"}}
    assert {path for path, _ in seen} - {None} == expected.get(strategy, set())


def test_epochs_where_the_last_batch_is_dropped(tmp_path):
    """Rows of 32 + 6: the sampler counts the epochs as the loader does, so the second epoch has an order of its own."""
    trainer = train(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=5, max_steps=1)
    sampler, orders = trainer.get_train_dataloader().batch_sampler.sampler, []
    for trainer.state.global_step in (0, 5, 6, 12):  # 32 rows in batches of 5: six steps
        orders.append([retain for _, retain, _ in sampler])
    assert orders[0] == orders[1] != orders[2] != orders[3]


def test_a_second_process_takes_no_part_in_a_push(tmp_path, monkeypatch):
    trainer = train(tmp_path)
    monkeypatch.setattr(UIBTrainer, "is_world_process_zero", lambda self: False)
    trainer._push_from_checkpoint(str(tmp_path))


def batches_of_processes(rows, processes, batch_size, sharded):
    """What each process gets of a sample."""
    model = torch.nn.Linear(1, 1)
    if sharded:
        model.__dict__[BEFORE] = None

    def of_process(i):
        accelerator = SimpleNamespace(process_index=i, num_processes=processes, is_main_process=True)
        same = lambda batch: batch
        shared = SharedInference(model, torch.tensor, same, accelerator, batch_size, 0, nullcontext, True)
        return [batch.tolist() for batch in shared.batches(range(100, 200), range(rows))]

    return [of_process(i) for i in range(processes)]


@pytest.mark.parametrize("rows, processes, batch_size", [(27, 2, 4), (9, 2, 4), (85, 8, 32), (13, 3, 4), (2, 2, 4)])
def test_processes_that_share_a_base_get_equally_many_batches(rows, processes, batch_size):
    found = batches_of_processes(rows, processes, batch_size, sharded=True)
    assert len({len(batches) for batches in found}) == 1
    assert max(len(batch) for batches in found for batch in batches) <= batch_size
    assert sorted(row for batches in found for batch in batches for row in batch) == list(range(100, 100 + rows))


def test_without_a_shared_base_they_do_not():
    assert [len(batches) for batches in batches_of_processes(9, 2, 4, sharded=False)] == [2, 1]
    with pytest.raises(ValueError, match="equally many batches") as caught:
        batches_of_processes(1, 2, 4, sharded=True)
    assert "\n" not in str(caught.value)


def test_second_derivatives_of_a_sharded_base_are_refused():
    model = torch.nn.Linear(1, 1)
    context = PriorContext(model, list, list, (1, 1), lambda tensors: None)
    InfluencePrior().attach(context)  # the control
    model.__dict__[BEFORE] = None
    with pytest.raises(ValueError, match="takes second derivatives"):
        InfluencePrior().attach(context)


# ---- device_map ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("bert").save_pretrained(folder)
    return folder


def on_devices(checkpoint, **settings):
    return AutoModelForSequenceClassification.from_pretrained(checkpoint, **settings)


def texts(path, model):
    args = UIBConfig(
        str(path), max_steps=2, subspace_rank=4, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"
    )
    return UIBTrainer(
        model, args, make_rows("bert", 12, seed=1), make_rows("bert", 8, seed=2), make_rows("bert", 9, seed=3)
    )


def test_a_device_map_of_one_device_changes_nothing(tmp_path, checkpoint):
    found = []
    for places in (None, "auto", {"": "cpu"}):
        model = on_devices(checkpoint, device_map=places)
        if isinstance(places, dict):  # with accelerate's hooks on every module, as on several devices
            model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
        trainer = texts(tmp_path, model)
        trainer.train()
        found.append(trainer.model.state_dict())
    assert trainer.adapted_model.get_base_model().hf_device_map == {"": "cpu"}
    assert any(found[0][name].any() for name in found[0] if "lora_B" in name)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("part", ["bert.embeddings", "bert.encoder.layer.1"])  # without linear layers, and with them
def test_a_model_with_parts_on_disk_is_refused(tmp_path, checkpoint, part):
    parts = ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "dropout", "classifier")
    places = {name: "disk" if name == part else "cpu" for name in parts}
    model = on_devices(checkpoint, device_map=places, offload_folder=str(tmp_path / "offloaded"))
    with pytest.raises(ValueError, match=rf"{part}\..* is offloaded \(disk\)") as caught:
        texts(tmp_path / "out", model)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_over_several_devices_is_refused(tmp_path):
    model = make_model("bert")
    model.hf_device_map = {"bert": 0, "classifier": 1}  # as accelerate leaves it: there is one device here
    with pytest.raises(ValueError, match=r"on several devices \(0, 1\)") as caught:
        texts(tmp_path / "out", model)
    assert "\n" not in str(caught.value)
