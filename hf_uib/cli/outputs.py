"""What `hf-uib unlearn` and `hf-uib demo` share: rows of the results table, and the files that a run leaves."""

import json
import os
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.utils import CONFIG_NAME, logging

from .. import __version__
from ..audit.figures import draw_bias, draw_layers
from ..audit.report import AuditReport
from ..checkpointing import atomic_directory, write_json
from ..data.labels import labels_of
from ..hub.card import FIGURES
from ..hub.deletion_report import REPORT_NAME
from ..hub.push import MERGED, published
from ..metrics import attribute_classes, bias_row, text_table
from ..serialization import MARK, is_marked
from ..trainer import UIBTrainer
from .parser import in_one_line

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


def bias_attributes(
    forget,
    test,
    bias_column: str,
    labels: np.ndarray | None = None,
    rows: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, bool]:
    """The attribute of the test rows.

    Args:
        forget: rows in which the attribute may give the label away.
        test: unbiased rows; both have ``bias_column``.
        labels: of the forget rows, ``[n]`` class ids, where they are not those of the set.
        rows: where tokens are labelled: the row of each token of the forget and of the test rows; ``labels`` are the tokens' then.

    Returns:
        ``[n]`` integers. They are classes, and the flag is True, where each value stands for a class in the forget set (-1: for
        none); else they number the values.
    """
    labels = labels_of(forget) if labels is None else labels
    raw, known = ([_hashable(value) for value in rows.with_format(None)[bias_column]] for rows in (test, forget))
    if rows is not None:
        known, raw = ([values[i] for i in of] for values, of in zip((known, raw), rows, strict=True))
    codes = {value: i for i, value in enumerate(sorted({*raw, *known}, key=str))}
    attributes = np.asarray([codes[value] for value in raw])
    stands_for = attribute_classes(np.asarray([codes[value] for value in known]), labels)
    if stands_for is None:
        return attributes, False
    return np.asarray([stands_for.get(value, -1) for value in attributes]), True


def _hashable(value: Any) -> Any:
    """A value of the attribute; NaN as None."""
    return None if value is None or value != value else value


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


def check_writable(folder: str) -> None:
    """Refuse an output folder that cannot be written to, before the first step. One process of a machine looks: two would take a
    new folder from each other.

    Raises:
        ValueError: it cannot.
    """
    if os.environ.get("LOCAL_RANK", "0") not in ("0", "-1"):
        return
    made = not os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to ({error.strerror}); choose another.") from error
    finally:
        if made and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)


def save_adapter(trainer: UIBTrainer) -> None:
    """Right after training: adapter, state and card take the place of those of an earlier run, whose results go."""
    folder = str(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        for name in EARLIER:
            path = os.path.join(folder, name)
            if is_marked(path):
                os.remove(path)
        _remove_merged(os.path.join(folder, MERGED))
    trainer.save_model(_internal_call=True)


def _remove_merged(folder: str) -> None:
    """Config, weights, card and figures of a merged model of ours, whose config names its requests; other files of the folder
    stay."""
    try:
        with open(os.path.join(folder, CONFIG_NAME), encoding="utf-8") as file:
            ours = "unlearning" in json.load(file)
    except (OSError, ValueError):
        return
    for name in os.listdir(folder) if ours else ():
        if name in (CONFIG_NAME, "README.md") or name.endswith(".png") or ".safetensors" in name:
            os.remove(os.path.join(folder, name))


@contextmanager
def nothing_lost(trainer: UIBTrainer, next_command: Callable[[], str]) -> Iterator[None]:
    """An error, or Ctrl-C, says in its line what of the run is saved where, and what to run next.

    Args:
        next_command: once the adapter is saved.

    Raises:
        ValueError: instead of the error, which is its cause; as it is where nothing of this run was saved.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not (saved := what_is_saved(trainer, next_command)):
            raise
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else in_one_line(error).rstrip(".")
        raise ValueError(f"{what}. {saved}") from error


def what_is_saved(trainer: UIBTrainer, next_command: Callable[[], str]) -> str | None:
    """One sentence: the adapter, or else the last checkpoint of this run, and what to run next."""
    folder = str(trainer.args.output_dir)
    if os.path.abspath(folder) in trainer.written:
        return f"Adapter and state are saved in {folder}; go on with: {next_command()}"
    checkpoints = [path for path in trainer.written if os.path.isdir(path) and path != os.path.abspath(folder)]
    if checkpoints:
        where = os.path.join(folder, os.path.basename(checkpoints[-1]))
        return f"The last checkpoint is {where}; run again with --resume_from_checkpoint {shlex.quote(where)}"
    return None


def upload_command(trainer: UIBTrainer) -> str:
    """Uploads what a push that failed should have uploaded."""
    args, repository = trainer.args, str(trainer.hub_model_id)
    merged = os.path.join(str(args.output_dir), MERGED)
    parts = {} if args.hub_artifact == "merged" else {repository: str(args.output_dir)}
    if args.hub_artifact != "adapter" and os.path.abspath(merged) in trainer.written:
        parts[repository if args.hub_artifact == "merged" else f"{repository}-merged"] = merged
    commands = []
    for target, folder in parts.items():
        words = ["hf", "upload", target, folder, "."]
        for name in published(folder, trainer.written[os.path.abspath(folder)]):
            words += ["--include", name]
        commands.append(shlex.join([*words, *(["--revision", args.hub_revision] if args.hub_revision else [])]))
    return " && ".join(commands)


def save_results(
    trainer: UIBTrainer,
    results: dict[str, dict],
    source: dict[str, Any],
    audit: AuditReport | None,
    merge: bool = False,
    pictures: tuple = (),
) -> None:
    """Write figures, report, audit, card and, if asked for, the merged model; then print the table. `save_adapter` comes before.
    Every process calls it, as all may hold a part of what is merged; the first one writes.

    Args:
        results: rows of the table by model.
        source: what ``report.json`` says of model and data.
        pictures: further arguments of `draw_bias`.
    """
    folder = str(trainer.args.output_dir)
    trainer.results = results
    first = trainer.is_world_process_zero()
    if first:
        _write_report(trainer, folder, source, audit, pictures)
    trainer.create_model_card()
    if merge:
        trainer.save_merged(os.path.join(folder, MERGED))
    if not first:
        return
    print("\n" + text_table(results))
    if audit is not None:
        print(f"\nAudit: {audit.verdict}")
    for text in trainer.run_warnings:
        print(f"\nWarning: {text}")
    merged_folder = f"; merged model: {os.path.join(folder, MERGED)}" if merge else ""
    print(f"\nAdapter, card (README.md), report.json and figures: {folder}{merged_folder}")


def _write_report(
    trainer: UIBTrainer, folder: str, source: dict[str, Any], audit: AuditReport | None, pictures: tuple
) -> None:
    layers = trainer.layer_report()
    content = (
        {MARK: __version__}
        | source
        | {
            "results": trainer.results,
            "warnings": trainer.run_warnings,
            "bound": {"layers": layers, **trainer.statistics},
            "log": trainer.state.log_history,
        }
    )
    with atomic_directory(folder) as unfinished:
        draw_bias(trainer.results, unfinished, *pictures)
        draw_layers(layers, unfinished)
        write_json(content, os.path.join(unfinished, "report.json"))
        if audit is not None:
            audit.to_json(os.path.join(unfinished, "audit.json"))
            audit.plot(unfinished)
