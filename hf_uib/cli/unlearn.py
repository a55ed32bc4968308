"""`hf-uib unlearn`: the user's own job."""

import datetime
import os
import re
import shutil
import time
import warnings

import numpy as np
from transformers.utils import logging

from ..audit import report
from ..audit.figures import draw_bias, draw_layers
from ..checkpointing import atomic_directory
from ..config import UIBConfig
from ..data.reading import (
    image_column,
    label_column,
    load_processor,
    load_splits,
    split_forget,
    split_of,
    with_class_ids,
)
from ..hub.card import FIGURES, hub_id
from ..hub.evidence import write_evidence
from ..hub.push import MERGED
from ..models import load_classifier
from ..provenance import next_base
from ..trainer import UIBTrainer


def unlearn(args: UIBConfig, script) -> dict[str, dict]:
    """Unlearn the rows of ``--forget_where`` from the user's checkpoint; returns the table's rows."""
    quiet()
    for name in ("model_name_or_path", "dataset_name", "forget_where"):
        if not getattr(script, name):
            raise ValueError(
                f"--{name} is missing; give --model_name_or_path, --dataset_name and --forget_where together."
            )
    if script.request:
        _check_request(script)
    model = next_base(script.model_name_or_path)
    splits = load_splits(script.dataset_name, script.dataset_config_name)
    train = with_class_ids(split_of(splits, script.train_split), model.config)
    if script.bias_column and script.bias_column not in train.column_names:
        raise ValueError(f"bias_column '{script.bias_column}' is not among {', '.join(train.column_names)}.")
    forget, retain = split_forget(train, script.forget_where, script.train_split)
    calibration = (
        with_class_ids(split_of(splits, script.calibration_split), model.config) if script.calibration_split else None
    )
    test_name = script.test_split or ("test" if "test" in splits else None)
    test = with_class_ids(split_of(splits, test_name), model.config) if test_name else None
    processor = load_processor(script.model_name_or_path, picture=image_column(train) is not None)
    if script.max_length is not None:
        processor.model_max_length = script.max_length  # what a tokenizer truncates to
    trainer = UIBTrainer(
        model,
        args=args,
        forget_dataset=forget,
        retain_dataset=retain if len(retain) else None,
        calibration_dataset=calibration,
        eval_dataset=test,
        processing_class=processor,
    )
    trainer.request = script.what or f"{len(forget)} rows, chosen by {_columns_of(script.forget_where)}"
    trainer.dataset_name = hub_id(script.dataset_name)
    shown = {"forget": trainer.forget_dataset, "retain": trainer.retain_dataset, "test": trainer.eval_dataset}
    before = _rows(trainer, trainer.model, shown, script.bias_column)
    seconds = timed(lambda: trainer.train(resume_from_checkpoint=_last_or_named(args.resume_from_checkpoint)))
    results = {
        "original": before,
        "UIB": _rows(trainer, trainer.model, shown, script.bias_column) | {"seconds": seconds},
    }
    oracle = load_classifier(script.retrained_model) if script.retrained_model else None
    if oracle is not None:
        results["retrained"] = _rows(trainer, oracle, shown, script.bias_column)
    audit = None
    if trainer.eval_dataset is not None:
        bias_column = script.bias_column if script.bias_column in test.column_names else None
        audit = trainer.audit(trainer.eval_dataset, bias_column, retrained_model=oracle)
    if trainer.is_world_process_zero():
        source = {
            "model": os.path.basename(script.model_name_or_path.rstrip("/")),
            "forget_columns": _columns_of(script.forget_where),  # a value may be somebody's name
        }
        finish(trainer, results, source, merge=script.save_merged or script.request is not None, audit=audit)
        if script.request:
            print(f"AuditContext for the auditor: {write_evidence(trainer, script, args.output_dir)}")
    if args.push_to_hub:
        trainer.push_to_hub()
    return results


def _columns_of(conditions: list[str]) -> str:
    return " and ".join(dict.fromkeys(condition.partition("=")[0] for condition in conditions))


def _check_request(script) -> None:
    """Refuse a request that lacks what an answer needs, or holds who asked."""
    for name in ("what", "why", "due"):
        if not getattr(script, name):
            raise ValueError(
                f"{script.request} has no `{name}`; a request says what is to be forgotten, why, and by when it is due."
            )
    for name in ("what", "why", "reference", "forget_where"):
        if re.search(r"\S@\S", str(getattr(script, name) or "")):
            raise ValueError(
                f"`{name}` of {script.request} holds an e-mail address: who asks is not stored; leave it out."
            )
    try:
        if datetime.date.fromisoformat(script.due).isoformat() != script.due:
            raise ValueError
    except ValueError:
        raise ValueError(f"`due` of {script.request} is {script.due!r}; write a date as YYYY-MM-DD.") from None


def _last_or_named(checkpoint: str | None) -> str | bool | None:
    """``--resume_from_checkpoint``: a folder, or ``True`` for the last one in the output folder."""
    return {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def quiet() -> None:
    """The table is what the user came for: no library chatter around it."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _rows(trainer: UIBTrainer, model, shown: dict, bias_column: str | None) -> dict:
    """One row of the table for a user's model."""
    row = {}
    for part, dataset in shown.items():
        if dataset is None:
            continue
        limit = dataset if part == "test" or len(dataset) <= 2000 else dataset.select(range(2000))
        logits, labels = report.predict(model, limit, trainer.processing_class, description=f"Evaluating {part}")
        if part != "test":
            row[f"{part}_accuracy"] = float((logits.argmax(-1) == labels).mean())
        elif bias_column and bias_column in dataset.column_names:
            forget = trainer.forget_dataset.with_format(None)
            raw, known = dataset.with_format(None)[bias_column], forget[bias_column]
            codes = {value: i for i, value in enumerate(sorted({*raw, *known}, key=str))}
            stands_for = report.attribute_classes(
                np.asarray([codes[v] for v in known]), np.asarray(forget[label_column(forget)])
            )
            attributes = np.asarray([codes[v] for v in raw])
            if stands_for is not None:
                attributes = np.asarray([stands_for.get(a, -1) for a in attributes])
            row |= report.bias_row(logits, labels, attributes, coded=stands_for is not None)
        else:
            row["accuracy"] = float((logits.argmax(-1) == labels).mean())
    return row


def finish(trainer: UIBTrainer, results: dict, source: dict, pictures=None, merge: bool = False, audit=None) -> None:
    """Figures, report, audit, adapter, card and, if asked for, the merged model; then the table."""
    folder = trainer.args.output_dir
    trainer.results = results
    layers = trainer.layer_report()
    content = source | {
        "results": results,
        "bound": {"layers": layers, **trainer.statistics},
        "log": trainer.state.log_history,
    }
    for earlier in (*FIGURES, "audit.json", "evidence.html", "report.json"):  # of another run in this folder
        if os.path.isfile(os.path.join(folder, earlier)):
            os.remove(os.path.join(folder, earlier))
    shutil.rmtree(os.path.join(folder, MERGED), ignore_errors=True)
    with atomic_directory(folder) as unfinished:
        draw_bias(results, unfinished, *(pictures or ()))
        draw_layers(layers, unfinished)
        report.write_json(content, os.path.join(unfinished, "report.json"))
        if audit is not None:
            audit.to_json(os.path.join(unfinished, "audit.json"))
            audit.plot(unfinished)
    trainer.save_model(_internal_call=True)
    if merge:
        trainer.save_merged(os.path.join(folder, MERGED))
    print("\n" + report.text_table(results))
    if audit is not None:
        print(f"\nAudit: {audit.verdict}")
    merged_folder = f"; merged model: {os.path.join(folder, MERGED)}" if merge else ""
    print(f"\nAdapter, card (README.md), report.json and figures: {folder}{merged_folder}")
