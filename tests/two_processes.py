"""Started by test_processes.py under one or two processes: trains a small model, once for each run asked for, and writes what was
computed."""

import gc
import glob
import json
import sys

import datasets
import torch
from accelerate import PartialState
from conftest import make_model, make_rows
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_uib import UIBConfig, UIBTrainer


class Losses(TrainerCallback):
    """The logged parts of the bound."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "fit_nats" in logs and "train_loss" not in logs:
            self.rows.append([logs[k] for k in ("loss", "fit_nats", "kl_nats", "retain_margin")])


def main(
    path: str, batch: int, accumulation: int = 1, seed: int = 0, prior: str = "calibrated", streams: bool = False
) -> None:
    """Train where two processes get uneven shares of forget and calibration rows; these come as streams, or not.

    The retained rows are a multiple of the batch: otherwise accelerate fills up the last batch of an epoch with rows of its start.
    """
    args = UIBConfig(
        path + ".run", max_steps=6, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, seed=seed,
        subspace_rank=4, learning_rate=0.01, use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
        prior_update_steps=2, noise_to_signal=0.5, report_to="none", prior=prior, prior_fraction=0.7,
        adam_epsilon=1e-4,  # else a gradient that is rounding alone moves a weight as far as any
    )  # fmt: skip
    losses = Losses()
    datasets.config.HF_DATASETS_CACHE = path + ".cache"
    forget, retain, calibration, test = (make_rows(n=n, seed=i) for i, n in enumerate((27, 32, 13, 21), 1))
    if streams:
        forget, retain, calibration, test = (
            rows.to_iterable_dataset() for rows in (forget, retain, calibration, test)
        )
    trainer = UIBTrainer(
        make_model(), args, forget, retain, calibration_dataset=calibration, eval_dataset=test, callbacks=[losses],
        compute_metrics=lambda seen: {"accuracy": (seen.predictions.argmax(-1) == seen.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    _, labels = trainer.inference.forward(trainer.calibration_dataset, list(range(13)))
    assert labels.tolist() == trainer.calibration_dataset[:13]["labels"].tolist()  # in order, whoever had them
    written = glob.glob(path + ".cache/hf_uib_*")
    assert len(written) == streams  # by one process, for both
    if trainer.is_world_process_zero():
        adapter = {
            n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters() if "lora" in n
        }
        base = [p for n, p in trainer.model.named_parameters() if ".lora_" not in n]
        held = [p.to_local() if isinstance(p, DTensor) else p for p in base]
        torch.save(
            {
                "world": args.world_size,
                "share": sum(p.numel() for p in held) / sum(p.numel() for p in base),
                "subspaces": dict(trainer.posterior.subspaces.items()),
                "output_scale": dict(trainer.posterior.output_scales.items()),
                "pattern_z": torch.tensor(trainer.statistics["pattern_z"]),
                "level": getattr(trainer.prior, "level", None),
                "masks": dict(trainer.prior.masks),
                "evaluation": torch.tensor(metrics["eval_accuracy"]),
                "losses": torch.tensor(losses.rows, dtype=torch.float64),
                "adapter": adapter,
            },
            path,
        )


if __name__ == "__main__":
    for run in json.loads(sys.argv[1]):
        main(**run)
        gc.collect()  # the trainer goes before its process group
    PartialState().destroy_process_group()
