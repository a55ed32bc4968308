"""What `hf-uib unlearn` and `hf-uib demo` share: rows of the results table, and the files that a run leaves."""

import os
import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..audit.figures import draw_bias, draw_layers
from ..audit.report import AuditReport
from ..checkpointing import atomic_directory, write_json
from ..data.labels import labels_of
from ..hub.card import FIGURES
from ..hub.deletion_report import REPORT_NAME
from ..hub.push import MERGED
from ..metrics import attribute_classes, bias_row, text_table
from ..trainer import UIBTrainer

EARLIER = (*FIGURES, "audit.json", REPORT_NAME, "report.json")  # files of a run, which the next one replaces


def training_defaults() -> dict[str, Any]:
    """Settings that differ from those of `UIBConfig` on the command line."""
    return {
        "output_dir": "unlearned",
        "save_strategy": "no",
        "logging_steps": 50,
        # Without it, two processes on a machine that has no accelerator would be two runs
        "use_cpu": not torch.accelerator.is_available(),
    }


def quiet() -> None:
    """No chatter of the libraries around the results."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bias_attributes(forget, test, bias_column: str) -> tuple[np.ndarray, bool]:
    """The attribute of the test rows.

    Args:
        forget: rows in which the attribute may give the label away.
        test: unbiased rows; both have ``bias_column``.

    Returns:
        ``[n]`` integers. They are classes, and the flag is True, where each value stands for a class in the forget set (-1: for
        none); else they number the values.
    """
    labels = labels_of(forget)
    forget, raw = forget.with_format(None), test.with_format(None)[bias_column]
    known = forget[bias_column]
    codes = {value: i for i, value in enumerate(sorted({*raw, *known}, key=str))}
    attributes = np.asarray([codes[value] for value in raw])
    stands_for = attribute_classes(np.asarray([codes[value] for value in known]), labels)
    if stands_for is None:
        return attributes, False
    return np.asarray([stands_for.get(value, -1) for value in attributes]), True


def results_row(
    logits: np.ndarray, labels: np.ndarray, attributes: tuple[np.ndarray, bool] | None, seconds: float | None = None
) -> dict[str, float]:
    """One model's row of the results table.

    Args:
        logits: ``[n, classes]`` on the test set; labels: ``[n]``.
        attributes: what `bias_attributes` gives; None where there is no bias column.
        seconds: of its training.
    """
    if attributes is None:
        row = {"accuracy": float((logits.argmax(-1) == labels).mean())}
    else:
        row = bias_row(logits, labels, attributes[0], coded=attributes[1])
    return row if seconds is None else row | {"seconds": seconds}


def save_results(
    trainer: UIBTrainer,
    results: dict[str, dict],
    source: dict[str, Any],
    audit: AuditReport | None,
    merge: bool = False,
    pictures: tuple = (),
) -> None:
    """Write figures, report, audit, adapter, card and, if asked for, the merged model; then print the table.

    Args:
        results: rows of the table by model.
        source: what ``report.json`` says of model and data.
        pictures: further arguments of `draw_bias`.
    """
    folder = str(trainer.args.output_dir)
    trainer.results = results
    layers = trainer.layer_report()
    content = source | {
        "results": results,
        "bound": {"layers": layers, **trainer.statistics},
        "log": trainer.state.log_history,
    }
    for name in EARLIER:
        if os.path.isfile(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    shutil.rmtree(os.path.join(folder, MERGED), ignore_errors=True)
    with atomic_directory(folder) as unfinished:
        draw_bias(results, unfinished, *pictures)
        draw_layers(layers, unfinished)
        write_json(content, os.path.join(unfinished, "report.json"))
        if audit is not None:
            audit.to_json(os.path.join(unfinished, "audit.json"))
            audit.plot(unfinished)
    trainer.save_model(_internal_call=True)
    if merge:
        trainer.save_merged(os.path.join(folder, MERGED))
    print("\n" + text_table(results))
    if audit is not None:
        print(f"\nAudit: {audit.verdict}")
    merged_folder = f"; merged model: {os.path.join(folder, MERGED)}" if merge else ""
    print(f"\nAdapter, card (README.md), report.json and figures: {folder}{merged_folder}")
