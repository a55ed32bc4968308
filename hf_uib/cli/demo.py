"""A bias in real digits, unlearned in about a minute.

    hf-uib demo

scikit-learn's handwritten digits are coloured so that the hue gives the label away in the forget set. A small ViT is trained with
that bias, unlearns it, and is compared with fine-tuning and with retraining.
"""

import copy
import os
import time

import numpy as np
from peft import get_peft_model
from torch import nn

from ..config import UIBConfig
from ..inference import predict
from ..lora import default_peft_config
from ..trainer import UIBTrainer
from .digits import Task, digits_colour, fit, prepare_models
from .outputs import bias_attributes, quiet, results_row, save_adapter, save_results, timed, training_defaults
from .parser import parse

SHOWN = 8  # test pictures in the figure
Models = dict[str, tuple[nn.Module, float | None]]  # and the seconds that each took, by name


def main(arguments: list[str]) -> None:
    """`hf-uib demo ARGUMENTS`."""
    (args,) = parse("demo", __doc__, arguments, UIBConfig, lists={}, **training_defaults())
    demo(args)


def demo(args: UIBConfig) -> dict[str, dict]:
    """Unlearn a colour bias from a ViT trained here on scikit-learn's digits, and compare.

    Writes report.json, audit.json, the figures, the adapter, ``merged/`` and README.md to ``args.output_dir``.

    Returns:
        Rows of the results table, by model.
    """
    quiet()
    started = time.perf_counter()
    task = digits_colour(args.seed)
    if args.max_steps <= 0:
        args.max_steps = task.train_settings["unlearn_steps"]
    args.per_device_train_batch_size = task.train_settings["batch"]  # as that of the models it is compared with
    print("Real handwritten digits; on the forget set the hue gives the label away.", flush=True)
    folder = str(args.output_dir)
    prepared = prepare_models(task, args.seed, folder)
    original, start = prepared["original"], prepared["start"]
    trainer, seconds = _unlearned(args, task, original)
    save_adapter(trainer)
    lora, full, oracle = _compared(args, task, start, original)
    models: Models = {
        "original": (original, None),
        "fine-tuned LoRA": lora,
        "fine-tuned, all weights": full,
        "UIB": (trainer.model, seconds),
        "retrained": oracle,
    }
    results, pictures = _measured(task, models)
    audit = trainer.audit(task.sets["test"], task.bias_column, retrained_model=oracle[0], example_column="example")
    source = {"task": task.name, "seed": args.seed}
    save_results(trainer, results, source, audit, merge=True, pictures=pictures)
    if trainer.is_world_process_zero():
        original.save_pretrained(os.path.join(folder, "original"))  # the adapter's base
        start.save_pretrained(os.path.join(folder, "retrained"))  # the target; it was trained in place
        print(f"{time.perf_counter() - started:.0f} seconds in all.")
    return results


def _unlearned(args: UIBConfig, task: Task, original: nn.Module) -> tuple[UIBTrainer, float]:
    """The trainer after training, and its seconds."""
    trainer = UIBTrainer(
        copy.deepcopy(original),
        args=args,
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"],
        processing_class=task.processing_class,
    )
    trainer.request = "the hue as a hint to the digit"
    return trainer, timed(trainer.train)


def _compared(args: UIBConfig, task: Task, start: nn.Module, original: nn.Module) -> list[tuple[nn.Module, float]]:
    """Fine-tuning of an adapter and of all weights, and retraining: each model with its seconds."""
    lora = get_peft_model(copy.deepcopy(original), default_peft_config(original, args.subspace_rank))
    trained = []
    for model, steps in (
        (lora, args.max_steps),
        (copy.deepcopy(original), args.max_steps),
        (start, task.train_settings["retrain_steps"]),
    ):
        seconds = fit(model, task.sets["retain"], task, steps, str(args.output_dir), args.seed, 1e-3)
        trained.append((model, seconds))
    return trained


def _measured(task: Task, models: Models) -> tuple[dict[str, dict], tuple]:
    """Rows of the table, and test pictures that the original names after their hue, with labels and predictions of both models."""
    test = task.sets["test"]
    attributes = bias_attributes(task.sets["forget"], test, str(task.bias_column))
    results, predictions, labels = {}, {}, np.empty(0)
    for name, (model, seconds) in models.items():
        logits, labels = predict(model, test, task.processing_class)
        predictions[name] = logits.argmax(-1)
        results[name] = results_row(logits, labels, attributes, seconds)
    fooled = (predictions["original"] == attributes[0]) & (attributes[0] != labels)
    rows = np.flatnonzero(fooled)[:SHOWN].tolist()
    images = [test.with_format(None)[i]["image"] for i in rows]
    return results, (images, labels[rows], predictions["original"][rows], predictions["UIB"][rows])
