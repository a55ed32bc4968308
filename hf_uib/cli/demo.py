"""`hf-uib demo`: digits whose hue gives the label away."""

import copy
import os
import time

import numpy as np
from peft import get_peft_model
from torch import nn

from .. import tasks
from ..audit import report
from ..config import UIBConfig
from ..lora import default_peft_config
from ..trainer import UIBTrainer
from .unlearn import finish, quiet, timed


def demo(args: UIBConfig) -> dict[str, dict]:
    """Unlearn a colour bias from a ViT trained here on scikit-learn's digits, and compare; returns the table's rows.

    Writes report.json, audit.json, the figures, the adapter, ``merged/`` and README.md to ``args.output_dir``.
    """
    quiet()
    started = time.perf_counter()
    task = tasks.digits_colour(args.seed)
    settings = task.train_settings
    if args.max_steps <= 0:
        args.max_steps = settings["unlearn_steps"]
    args.per_device_train_batch_size = settings["batch"]  # as that of the models it is compared with
    print("Real handwritten digits; on the forget set the hue gives the label away.", flush=True)
    models = tasks.prepare_models(task, args.seed, args.output_dir)
    trainer = UIBTrainer(
        copy.deepcopy(models["original"]),
        args=args,
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"],
        processing_class=task.processing_class,
    )
    trainer.request = "the hue as a hint to the digit"
    uib_seconds = timed(trainer.train)
    compared: dict[str, tuple[nn.Module, float | None]] = {}
    lora = get_peft_model(
        copy.deepcopy(models["original"]), default_peft_config(models["original"], args.subspace_rank)
    )
    for name, model, steps in (
        ("fine-tuned LoRA", lora, args.max_steps),
        ("fine-tuned, all weights", copy.deepcopy(models["original"]), args.max_steps),
        ("retrained", models["start"], settings["retrain_steps"]),
    ):
        seconds = tasks.fit(model, task.sets["retain"], task, steps, args.output_dir, args.seed, 1e-3)
        compared[name] = (model, seconds)
    ranking = {
        "original": (models["original"], None),
        "fine-tuned LoRA": compared["fine-tuned LoRA"],
        "fine-tuned, all weights": compared["fine-tuned, all weights"],
        "UIB": (trainer.model, uib_seconds),
        "retrained": compared["retrained"],
    }
    test = task.sets["test"]
    attributes = np.asarray(test.with_format(None)[task.bias_column])
    results, predictions = {}, {}
    for name, (model, needed) in ranking.items():
        logits, labels = report.predict(model, test, task.processing_class)
        predictions[name] = logits.argmax(-1)
        results[name] = report.bias_row(logits, labels, attributes) | ({} if needed is None else {"seconds": needed})
    oracle = compared["retrained"][0]
    audit = trainer.audit(test, task.bias_column, retrained_model=oracle, example_column="example")
    if trainer.is_world_process_zero():
        telling = np.flatnonzero((predictions["original"] == attributes) & (attributes != labels))[:8].tolist()
        pictures = [test.with_format(None)[i]["image"] for i in telling]
        finish(
            trainer,
            results,
            {"task": task.name, "seed": args.seed},
            pictures=(pictures, labels[telling], predictions["original"][telling], predictions["UIB"][telling]),
            merge=True,
            audit=audit,
        )
        for name, model in (
            ("original", models["original"]),
            ("retrained", oracle),
        ):  # the adapter's base, and the target
            model.save_pretrained(os.path.join(args.output_dir, name))
        print(f"{time.perf_counter() - started:.0f} seconds in all.")
    return results
