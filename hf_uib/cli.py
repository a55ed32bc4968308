"""What ``scripts/unlearn.py`` runs: the demo, and the user's own job."""

import copy
import datetime
import os
import re
import shutil
import time
import warnings

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from peft import get_peft_model
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import logging

from . import tasks
from .adapters import default_peft_config, load_classifier
from .audit import report
from .audit.figures import draw_bias, draw_layers
from .audit.observe import processes
from .config import UIBConfig
from .data import image_column, label_column
from .files import whole
from .hub.card import FIGURES, hub_id
from .hub.evidence import write_evidence
from .hub.push import MERGED
from .lifecycle import next_base
from .trainer import UIBTrainer


def demo(args: UIBConfig) -> dict[str, dict]:
    """Unlearn a colour bias from a ViT trained here on scikit-learn's digits, and compare; returns the table's rows.

    Writes report.json, audit.json, the figures, the adapter, ``merged/`` and README.md to ``args.output_dir``.
    """
    _quiet()
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
    uib_seconds = _timed(trainer.train)
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
        _finish(
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


def unlearn(args: UIBConfig, script) -> dict[str, dict]:
    """Unlearn the rows of ``--forget_where`` from the user's checkpoint; returns the table's rows."""
    _quiet()
    for name in ("model_name_or_path", "dataset_name", "forget_where"):
        if not getattr(script, name):
            raise ValueError(
                f"--{name} is missing; give --model_name_or_path, --dataset_name and --forget_where together."
            )
    if script.request:
        _check_request(script)
    model = next_base(script.model_name_or_path)
    splits = load_splits(script.dataset_name, script.dataset_config_name)
    train = with_class_ids(_split(splits, script.train_split), model.config)
    if script.bias_column and script.bias_column not in train.column_names:
        raise ValueError(f"bias_column '{script.bias_column}' is not among {', '.join(train.column_names)}.")
    forget, retain = split_forget(train, script.forget_where, script.train_split)
    calibration = (
        with_class_ids(_split(splits, script.calibration_split), model.config) if script.calibration_split else None
    )
    test_name = script.test_split or ("test" if "test" in splits else None)
    test = with_class_ids(_split(splits, test_name), model.config) if test_name else None
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
    seconds = _timed(lambda: trainer.train(resume_from_checkpoint=_last_or_named(args.resume_from_checkpoint)))
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
        _finish(trainer, results, source, merge=script.save_merged or script.request is not None, audit=audit)
        if script.request:
            print(f"Evidence for the auditor: {write_evidence(trainer, script, args.output_dir)}")
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


def audit(script):
    """Audit the checkpoints of ``scripts/audit.py``; prints and returns the `AuditReport`."""
    from .audit.core import audit_model, loaded

    _quiet()
    model = loaded(script.model)
    reference = loaded(script.reference) if script.reference else None
    classes = (model if reference is None else reference).config
    splits = load_splits(script.dataset_name, script.dataset_config_name)
    train = with_class_ids(_split(splits, script.train_split), classes)
    test = with_class_ids(_split(splits, script.test_split), classes)
    if not script.forget_where:
        raise ValueError("--forget_where is missing; say which rows were to be forgotten, as COLUMN=VALUE.")
    forget, retain = split_forget(train, script.forget_where, script.train_split)
    report = audit_model(
        model,
        reference_model=reference,
        forget_dataset=forget,
        retain_dataset=retain if len(retain) else None,
        test_dataset=test,
        bias_column=script.bias_column,
        retrained_model=list(script.retrained),
        processing_class=load_processor(script.reference or script.model, picture=image_column(train) is not None),
        example_column=script.example_column,
        deep=script.deep,
        seed=script.seed,
    )
    if processes().is_main_process:
        os.makedirs(script.output_dir, exist_ok=True)
        report.to_json(os.path.join(script.output_dir, "report.json"))
        report.plot(script.output_dir)
        print(f"\n{report}\n\nreport.json and figures: {script.output_dir}")
    return report


def split_forget(train: Dataset, conditions: list[str], split: str) -> tuple[Dataset, Dataset]:
    """The rows that meet every condition, and the others.

    Raises:
        ValueError: no row does.
    """
    forget_rows = matching_rows(train, conditions)
    if not forget_rows.any():
        raise ValueError(f"No row of split '{split}' meets {' and '.join(conditions)}; nothing to forget.")
    return train.select(np.flatnonzero(forget_rows)), train.select(np.flatnonzero(~forget_rows))


def _last_or_named(checkpoint: str | None) -> str | bool | None:
    """``--resume_from_checkpoint``: a folder, or ``True`` for the last one in the output folder."""
    return {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _quiet() -> None:
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


def _finish(trainer: UIBTrainer, results: dict, source: dict, pictures=None, merge: bool = False, audit=None) -> None:
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
    with whole(folder) as unfinished:
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


def load_splits(name: str, config: str | None = None) -> DatasetDict:
    """A dataset by Hub id, folder or file, as a dictionary of splits."""
    if os.path.isfile(name):
        kind = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}.get(
            name.rpartition(".")[2]
        )
        if kind is None:
            raise ValueError(f"{name} is no CSV, JSON or Parquet file; give one, a folder, or a Hub id.")
        try:
            return datasets.load_dataset(
                kind, data_files={"train": name}, **({"sep": "\t"} if name.endswith(".tsv") else {})
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:  # pyarrow's errors are ValueErrors
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ValueError(f"{name} cannot be read as {kind} ({reason}); save or download it again.") from error
    if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
        loaded = datasets.load_from_disk(name)
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    try:
        return datasets.load_dataset(name, config)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"Dataset {name} was found neither here nor on the Hub; check the name. ({type(error).__name__})"
        ) from error


def _split(splits: DatasetDict, name: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"No split '{name}' in the dataset; it has {', '.join(splits)}.")
    return splits[name]


def load_processor(name: str, picture: bool):
    """Image processor (the PIL one: torchvision is not needed) or tokenizer of a checkpoint.

    Raises:
        ValueError: the checkpoint has no tokenizer (Transformers then makes an empty one up).
    """
    if picture:
        return AutoImageProcessor.from_pretrained(name, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{name} has no tokenizer; save the one it was trained with beside the model.")
    return tokenizer


def with_class_ids(dataset: Dataset, config) -> Dataset:
    """Labels as the model's class ids: by name where both sides have names, as they are otherwise.

    Raises:
        ValueError: there is no label column, or a class name that the model does not have.
    """
    column = label_column(dataset)
    feature = dataset.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    ids = {str(name): int(i) for name, i in (config.label2id or {}).items()}
    if names is None and feature.dtype in ("string", "large_string"):
        names = sorted(set(dataset[column]))
        unknown = [n for n in names if n not in ids]
        if unknown:
            raise ValueError(f"Label '{unknown[0]}' is no class of the model; it has {', '.join(ids)}.")
        return dataset.map(
            lambda row: {column: ids[row[column]]}, features=_integer(dataset, column), desc="Class ids"
        )
    if names and all(n in ids for n in names) and any(ids[n] != i for i, n in enumerate(names)):
        return dataset.map(
            lambda row: {column: ids[names[row[column]]]}, features=_integer(dataset, column), desc="Class ids"
        )
    return dataset


def _integer(dataset: Dataset, column: str) -> datasets.Features:
    return datasets.Features({**dataset.features, column: datasets.Value("int64")})


def matching_rows(dataset: Dataset, conditions: list[str]) -> np.ndarray:
    """Which rows meet every ``COLUMN=VALUE``, ``[n]`` booleans. Nothing is evaluated: values are compared.

    Raises:
        ValueError: no ``=``, a column that is not there, or a value its type cannot have.
    """
    keep = np.ones(len(dataset), dtype=bool)
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or not column:
            raise ValueError(f"{condition!r} is no condition; write COLUMN=VALUE.")
        if column not in dataset.column_names:
            raise ValueError(f"Column {column!r} is not in the dataset; it has {', '.join(dataset.column_names)}.")
        feature = dataset.features[column]
        if isinstance(feature, ClassLabel):
            if value in feature.names:
                wanted = feature.str2int(value)
            elif value.isdecimal() and int(value) < feature.num_classes:
                wanted = int(value)
            else:
                raise ValueError(f"{value!r} is no class of column {column!r}; it has {', '.join(feature.names)}.")
        elif not isinstance(feature, datasets.Value):
            raise ValueError(
                f"Column {column!r} holds {type(feature).__name__}, which cannot be compared; choose another."
            )
        else:
            wanted = _as_type(value, feature.dtype, column)
        keep &= np.asarray([entry == wanted for entry in dataset.with_format(None)[column]], dtype=bool)
    return keep


def _as_type(value: str, dtype: str, column: str):
    if dtype == "bool":
        if value.lower() in ("true", "1", "false", "0"):
            return value.lower() in ("true", "1")
        raise ValueError(f"Column {column!r} holds true or false, not {value!r}.")
    for prefix, kind in (("int", int), ("uint", int), ("float", float)):
        if dtype.startswith(prefix):
            try:
                return kind(value)
            except ValueError:
                raise ValueError(f"Column {column!r} holds numbers ({dtype}), not {value!r}.") from None
    return value
