"""Make a fine-tuned classifier unlearn rows of its training data, or a pattern in them.

The model says what it takes (pictures, videos, texts or sounds) and what it labels (rows, with one label or several, or tokens).

    hf-uib unlearn --model_name_or_path ID --dataset_name ID \\
        --forget_where source=clinic_a --bias_column source --output_dir out
    hf-uib unlearn --request request.yaml --output_dir answer
    accelerate launch -m hf_uib.cli unlearn ...

Without model, data and request: the demo (`hf-uib demo`).
"""

import dataclasses
import datetime
import os
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from ..config import UIBConfig
from ..data.chosen import choose_rows
from ..data.columns import Columns, label_column
from ..data.labels import labels_of, named_config
from ..data.reading import Reader
from ..data.sources import (
    condition_columns,
    load_processor,
    load_splits,
    near_misses,
    split_of,
    without_rows_of,
)
from ..hub.card import hub_id
from ..hub.deletion_report import DeletionRequest, write_deletion_report
from ..hub.push import MERGED
from ..inference import labelled_examples, predict, reader_of
from ..lora import SERVING
from ..metrics.bias import attribute_classes
from ..models import input_kind, load_classifier
from ..one_label import label_number, positive_class, rows_with_label, two_classes
from ..provenance import next_base
from ..trainer import UIBTrainer
from ..unlearning_task import MultiLabel, SingleLabel, TokenLabels
from .demo import demo
from .outputs import (
    bias_attributes,
    check_writable,
    nothing_lost,
    quiet,
    results_row,
    save_adapter,
    save_results,
    timed,
    training_defaults,
    upload_command,
)
from .parser import parse

MOST_ROWS = 2000  # of forget and retained set, that the table is measured on
AUDITED = (  # what an auditor's command says of a job, beside the names of its files
    "forget_where", "forget_top", "dataset_config_name", "train_split", "test_split", "bias_column", "text_column", "image_column",
    "audio_column", "label_column", "audit_label", "positive_label",
)  # fmt: skip

EXPECTED = 8  # retained rows of which an attribute would tell the label by chance: fewer say nothing


@dataclass
class UnlearnArguments:
    """From what to unlearn, and what."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Fine-tuned classifier: Hub id or folder."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Training data: Hub id, folder (Parquet, CSV, picture folder, save_to_disk) or file."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split that holds forget and retained rows."})
    test_split: str | None = field(default=None, metadata={"help": "Split to report on; `test` if there is one."})
    calibration_split: str | None = field(
        default=None,
        metadata={"help": "Split that the checkpoint never saw, without the pattern; sets how far to forget."},
    )
    forget_where: list[str] = field(
        default_factory=list,
        metadata={"help": "COLUMN=VALUE of the rows to forget; all of several must hold. Class names are accepted."},
    )
    forget_rows: str | None = field(
        default=None,
        metadata={
            "help": "rows.parquet of `hf-uib discover`: the rows to forget and those to retain; the others stay out."
        },
    )
    forget_scores: str | None = field(
        default=None,
        metadata={
            "help": "CSV, JSON or Parquet file with a score for each row, as an attribution method gives them; with --forget_top."
        },
    )
    forget_top: int | None = field(default=None, metadata={"help": "Forget that many rows with the highest scores."})
    bias_column: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Column with the attribute to report the bias by; further ones after it, for fairness by each and by their "
            "crossing."
        },
    )
    positive_label: str | None = field(
        default=None,
        metadata={
            "help": "Class that false alarms and misses by group are about: name or number. Default: class 1 of two, none of more."
        },
    )
    audit_label: str | None = field(
        default=None,
        metadata={
            "help": "Of a model of several labels a row: the one that table and audit look at, by name or number. Default: the one "
            "that most forget rows have."
        },
    )
    text_column: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Column of the text (of the words, for a model that labels tokens), or the two columns of a pair of texts."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the picture."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of the sound."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label."})
    drop_incomplete_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows without a label or an input that can be read, and count them."},
    )
    retrained_model: str | None = field(
        default=None, metadata={"help": "A model retrained without the forget set, to compare with."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Truncation length of texts, in tokens."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with a checkpoint; only for one whose code you have read."},
    )
    peft_config: str | None = field(
        default=None,
        metadata={
            "help": f"`{SERVING}`: an adapter that vLLM loads, with LoRA on the linear layers of the blocks and the whole head. "
            "Default: LoRA on every linear layer."
        },
    )
    save_merged: bool = field(default=False, metadata={"help": f"Also write the merged model to output_dir/{MERGED}."})
    request: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with a deletion request: `what`, `why`, `due`, and any of the settings here. The answer is the "
            "merged model and deletion_report.html."
        },
    )
    what: str | None = field(
        default=None, metadata={"help": "What is to be forgotten, in words, for card and deletion report."}
    )
    why: str | None = field(default=None, metadata={"help": "Why, for the deletion report."})
    due: str | None = field(default=None, metadata={"help": "By when a request is due: YYYY-MM-DD."})
    reference: str | None = field(default=None, metadata={"help": "Your file number of a request; never a name."})


def main(arguments: list[str]) -> None:
    """`hf-uib unlearn ARGUMENTS`."""
    args, job = parse(
        "unlearn",
        __doc__,
        arguments,
        UIBConfig,
        UnlearnArguments,
        lists={"forget_where": "COLUMN=VALUE", "text_column": "COLUMN", "bias_column": "COLUMN"},
        **training_defaults(),
    )
    if job.model_name_or_path is None and job.dataset_name is None and job.request is None:
        demo(args)
    else:
        unlearn(args, job)


def unlearn(args: UIBConfig, job: UnlearnArguments) -> dict[str, dict]:
    """Unlearn the rows of ``job.forget_where`` from a user's checkpoint.

    Returns:
        Rows of the results table, by model.

    Raises:
        ValueError: in one line, what is wrong with the job; nothing is written then.
    """
    quiet()
    check_job(job)
    if args.load_best_model_at_end:
        raise ValueError(
            "--load_best_model_at_end would choose by the test rows, which the report is about; leave it out, or choose in Python "
            "by an eval_dataset of your own."
        )
    check_writable(str(args.output_dir))
    oracle = _retrained(job)  # before the model, whose training would else begin with other random numbers
    trainer = trainer_for(args, job)
    if oracle is not None and oracle.config.num_labels != trainer.model.config.num_labels:
        raise ValueError(
            f"{job.retrained_model} has {oracle.config.num_labels} classes, the model {trainer.model.config.num_labels}; give a "
            "model of the same task as --retrained_model."
        )
    if oracle is not None:
        named_config({"the model": trainer.model.config, str(job.retrained_model): oracle.config})
    shown = {"forget": trainer.forget_dataset, "retain": trainer.retain_dataset, "test": trainer.eval_dataset}
    positive_class(
        trainer.model, job.positive_label, isinstance(trainer.task, MultiLabel)
    )  # wrong ones are refused now
    number = None
    if isinstance(trainer.task, MultiLabel):
        number = label_number(trainer.model, job.audit_label, labels_of(trainer.forget_dataset))
    elif job.audit_label is not None:
        raise ValueError(f"--audit_label {job.audit_label} is for a model of several labels a row; leave it out.")
    if number is not None:
        given = lambda rows: rows if rows is None else rows.select(rows_with_label(labels_of(rows), number))
        shown = {part: given(rows) for part, rows in shown.items()}
    measured = lambda model: _measured(trainer, model, shown, next(iter(job.bias_column), None), number)
    results = {"original": measured(trainer.model)}
    last = {} if oracle is None else {"retrained": measured(oracle)}
    with nothing_lost(trainer, lambda: next_audit(args, job, trainer.eval_dataset)):
        seconds = timed(lambda: trainer.train(resume_from_checkpoint=_last_or_named(args.resume_from_checkpoint)))
        save_adapter(trainer)  # whatever goes wrong from here on, the run is not lost
        results |= {"UIB": measured(trainer.model) | {"seconds": seconds}} | last
        audit = None
        test: Any = trainer.eval_dataset
        if test is not None:
            bias_columns = [name for name in job.bias_column if name in test.column_names]
            audit = trainer.audit(
                test, bias_columns, retrained_model=oracle, label=number, positive_label=job.positive_label
            )
        source = {
            "model": _base_name(job.model_name_or_path),
            "forget_columns": chosen_by(job),  # a value may be somebody's name
        }
        save_results(trainer, results, source, audit, merge=job.save_merged or job.request is not None)
        if job.request and trainer.is_world_process_zero():
            folder, files = str(args.output_dir), trainer.published_files()
            path = write_deletion_report(_deletion_request(job), trainer.card_data(), folder, files)
            print(f"Deletion report for the auditor: {path}")
    if args.push_to_hub:
        with nothing_lost(trainer, lambda: upload_command(trainer)):
            trainer.push_to_hub()
    return results


def check_job(job: UnlearnArguments) -> None:
    """Refuse a job that lacks a part, and a request that lacks what an answer needs or says who asks."""
    listed = job.forget_rows is not None or job.forget_scores is not None
    for name in ("model_name_or_path", "dataset_name", "forget_where"):
        if not getattr(job, name) and not (name == "forget_where" and listed):
            raise ValueError(
                f"--{name} is missing; give --model_name_or_path, --dataset_name and --forget_where together."
            )
    if job.peft_config not in (None, SERVING):
        raise ValueError(f"--peft_config is '{job.peft_config}'; give {SERVING}, or leave it out.")
    if not job.request:
        return
    if listed:
        raise ValueError(f"{job.request} chooses rows by a file; a request names them by `forget_where`.")
    for name in ("what", "why", "due"):
        if not getattr(job, name):
            raise ValueError(
                f"{job.request} has no `{name}`; a request says what is to be forgotten, why, and by when it is due."
            )
    for name in ("what", "why", "reference", "forget_where"):
        if re.search(r"\S@\S", str(getattr(job, name) or "")):
            raise ValueError(
                f"`{name}` of {job.request} holds an e-mail address: who asks is not stored; leave it out."
            )
    try:
        if datetime.date.fromisoformat(job.due or "").isoformat() != job.due:
            raise ValueError
    except ValueError:
        raise ValueError(f"`due` of {job.request} is {job.due!r}; write a date as YYYY-MM-DD.") from None


def trainer_for(args: UIBConfig, job: UnlearnArguments) -> UIBTrainer:
    """The trainer of a job: model, sets and processor are read."""
    name = str(job.model_name_or_path)
    model: Any = next_base(name, **remote_code(job))
    splits = load_splits(str(job.dataset_name), job.dataset_config_name)
    train = split_of(splits, job.train_split)
    check_bias_columns(job.bias_column, train)
    columns = columns_of(job)
    kind = input_kind(model)
    for other in ("text", "image", "audio"):
        if getattr(job, f"{other}_column") and other != {"video": "image"}.get(kind, kind):
            raise ValueError(f"--{other}_column is given, but the model takes {model.main_input_name}.")
    processor = processor_for(job, model, name)
    read = reader_of(model, processor, columns)

    def rows_of(split: str) -> Dataset:
        rows = split_of(splits, split)
        return complete(rows, read, f"split '{split}'") if job.drop_incomplete_rows else rows

    forget, retain = chosen_rows(train, job)
    if job.drop_incomplete_rows:
        forget, retain = complete(forget, read, "the forget set"), complete(retain, read, "the retained set")
    for column, values in near_misses(retain, job.forget_where).items():
        print(
            f"Not forgotten: {values} retained rows whose {column} differs from the condition in case or space alone."
        )
    test_split = job.test_split or ("test" if "test" in splits else None)
    sets = {"forgotten": forget, "retained": retain}
    for kind, split in (("calibration", job.calibration_split), ("test", test_split)):
        if split:
            sets[kind] = rows_of(split)
    sets = without_shared_rows(sets)
    trainer = UIBTrainer(
        model,
        args=args,
        forget_dataset=sets["forgotten"],
        retain_dataset=sets["retained"] if len(sets["retained"]) else None,
        calibration_dataset=sets.get("calibration"),
        eval_dataset=sets.get("test"),
        processing_class=processor,
        peft_config=job.peft_config,  # type: ignore[arg-type]  # another word is refused
        columns=columns,
    )
    if isinstance(trainer.task, SingleLabel) and trainer.retain_dataset is not None:
        read_sets = {"forgotten": trainer.forget_dataset, "retained": trainer.retain_dataset}
        pairs = [(sets[name], labels_of(encoded)) for name, encoded in read_sets.items()]
        for column in dict.fromkeys(job.bias_column):
            if column != label_column(sets["retained"], columns) and (told := what_it_tells(column, *pairs)):
                print(
                    f"In the retained rows {column} tells {told}, which the model will learn: retain rows in which both go "
                    "together as well as rows in which they do not."
                )
    trainer.request = job.what or f"{len(forget)} rows, chosen by {chosen_by(job)}"
    trainer.dataset_name = hub_id(job.dataset_name)
    return trainer


def check_bias_columns(bias_columns: list[str], train: Dataset) -> None:
    """Refuse an attribute that the data lack, or that has no plain values."""
    for column in bias_columns:
        if column not in train.column_names:
            raise ValueError(f"bias_column '{column}' is not among {', '.join(train.column_names)}.")
        if not isinstance(train.features[column], (Value, ClassLabel)):
            raise ValueError(f"bias_column '{column}' holds lists or files; name a column of plain values.")


def processor_for(job: Any, model: Any, *sources: str) -> Any:
    """The processor that lies beside one of the checkpoints or the model's base, with the truncation length that a job gives."""
    base = getattr(model.config, "_name_or_path", None)  # an adapter may have come without
    processor = load_processor(*sources, base, kind=input_kind(model), **remote_code(job))
    if input_kind(model) == "text" and processor.pad_token is None:
        # A decoder's, which the model pads by the id in its config
        number = model.config.get_text_config().pad_token_id
        processor.pad_token = processor.eos_token if number is None else processor.convert_ids_to_tokens(number)
    if (longest := getattr(job, "max_length", None)) is not None:
        if longest < 3:
            raise ValueError(f"--max_length is {longest}; a text needs 3 tokens or more, its marks included.")
        processor.model_max_length = longest  # what a tokenizer truncates to
    return processor


def chosen_rows(train: Dataset, job: Any) -> tuple[Dataset, Dataset]:
    """The rows of the training split that a job forgets, and those that it retains."""
    return choose_rows(train, job.train_split, job.forget_where, job.forget_rows, job.forget_scores, job.forget_top)


def columns_of(job: Any) -> Columns:
    """The columns that a job's flags name; attributes and those of its conditions are never the input."""
    text = tuple(job.text_column) or None
    bias, *further = job.bias_column or [None]
    other = (*condition_columns(job.forget_where), *further)
    return Columns(text, job.image_column, job.label_column, bias, other, job.audio_column)


def what_it_tells(
    attribute: str, forgotten: tuple[Dataset, np.ndarray], retained: tuple[Dataset, np.ndarray]
) -> str | None:
    """What an attribute still tells of the labels of the retained rows: ``the label`` or ``the opposite of the label``, or None.

    Its values stand for the classes that they have in the forget set. In retained rows of these values it tells nothing if it
    stands for the label as often as chance would have it. A quarter of that or less is the opposite, a quarter of its complement
    the label, where enough rows are expected to tell.

    Args:
        forgotten, retained: raw rows and labels ``[n]``.
    """
    before, after = (
        [str(value) for value in rows.with_format(None)[attribute][:]] for rows, _ in (forgotten, retained)
    )
    stands_for = attribute_classes(np.asarray(before), forgotten[1]) or {}
    given = np.asarray([stands_for.get(value, -1) for value in after])
    given, there = given[given >= 0], retained[1][given >= 0]
    same = (given == there).mean() if len(given) else 0.0
    expected = sum((given == label).mean() * (there == label).mean() for label in np.unique(there))
    for what, share, chance in (("the opposite of the label", same, expected), ("the label", 1 - same, 1 - expected)):
        if len(given) * chance >= EXPECTED and share < chance / 4:
            return what
    return None


def complete(dataset: Dataset, read: Reader, name: str) -> Dataset:
    """The rows with a label and an input that can be read; the others are counted aloud."""
    rows = complete_rows(dataset, read, name)
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def complete_rows(dataset: Dataset, read: Reader, name: str) -> np.ndarray:
    """Numbers of the rows with a label and an input that can be read; the others are counted aloud."""
    faults = read.incomplete_rows(dataset)
    if not faults:
        return np.arange(len(dataset))
    row, what = next(iter(faults.items()))
    print(f"{len(faults)} of {len(dataset)} rows of {name} are left out; row {row} there, say, has {what}.")
    return np.delete(np.arange(len(dataset)), list(faults))


def without_shared_rows(sets: dict[str, Dataset]) -> dict[str, Dataset]:
    """Each set without the rows of those before it, which are more important; what is left out is counted aloud."""
    kept: dict[str, Dataset] = {}
    for name, dataset in sets.items():
        rest = without_rows_of(dataset, list(kept.values()))
        if len(rest) < len(dataset):
            if not len(rest):
                raise ValueError(f"Every {name} row is in the {' or '.join(kept)} set too; give other rows.")
            print(f"{len(dataset) - len(rest)} {name} rows are in a more important set too, and are left out here.")
        kept[name] = rest
    return kept


def audit_command(job: UnlearnArguments) -> str:
    """What an auditor pastes in the run's folder to check the merged model again, with paths of their own for words in capitals."""
    words = ["hf-uib", "audit", "--model", MERGED, "--reference", "MODEL_BEFORE", "--dataset_name", "DATA"]
    words += ["--forget_rows", "ROWS"] * (job.forget_rows is not None)
    words += ["--forget_scores", "SCORES"] * (job.forget_scores is not None)
    for flag in AUDITED:
        if value := getattr(job, flag):
            words += [f"--{flag}", *(shlex.quote(str(v)) for v in (value if isinstance(value, list) else [value]))]
    words += ["--drop_incomplete_rows"] * job.drop_incomplete_rows
    return " ".join(words + (["--retrained", "RETRAINED"] if job.retrained_model else []))


def next_audit(args: UIBConfig, job: UnlearnArguments, test: Any) -> str:
    """Audits what a run has saved, where it ended before its own audit.

    Args:
        test: the test rows, if there are any.
    """
    from .audit import AuditArguments

    words = ["hf-uib", "audit", "--model", str(args.output_dir), "--dataset_name", str(job.dataset_name)]
    if job.retrained_model:
        words += ["--retrained", job.retrained_model]
    if test is None:
        words += ["--test_split", "TEST_SPLIT"]
    for setting in dataclasses.fields(AuditArguments):
        value = getattr(job, setting.name, None)
        if setting.name in ("dataset_name", "reference") or not value or value == setting.default:
            continue  # a request's `reference` is a file number
        if setting.name == "bias_column":
            value = [name for name in value if name in getattr(test, "column_names", ())]
            if not value:
                continue
        words.append(f"--{setting.name}")
        words += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
    return shlex.join(words)


def _retrained(job: UnlearnArguments) -> Any:
    """The retrained model that a job names, if it does."""
    if not job.retrained_model:
        return None
    return load_classifier(job.retrained_model, **remote_code(job))


def remote_code(job: Any) -> dict[str, Any]:
    """The setting that lets a checkpoint's own code run; without it such a checkpoint is refused, and nobody is asked."""
    return {"trust_remote_code": True} if job.trust_remote_code else {}


def _deletion_request(job: UnlearnArguments) -> DeletionRequest:
    return DeletionRequest(
        what=job.what or "",
        why=job.why or "",
        due=job.due or "",
        reference=job.reference,
        forget_where=job.forget_where,
        train_split=job.train_split,
        dataset=hub_id(job.dataset_name) or _base_name(job.dataset_name),
        model=hub_id(job.model_name_or_path) or _base_name(job.model_name_or_path),
        audit_command=audit_command(job),
    )


def _base_name(path: str | None) -> str:
    """The last part: where things lie on this machine is nobody else's business."""
    return os.path.basename((path or "").rstrip("/"))


def chosen_by(job: UnlearnArguments) -> str:
    """By what a job's forget rows are chosen; no value is said."""
    if job.forget_rows is not None:
        return "hf-uib discover"
    return "a score" if job.forget_scores is not None else " and ".join(condition_columns(job.forget_where))


def _last_or_named(checkpoint: str | None) -> str | bool | None:
    """``--resume_from_checkpoint``: a folder, or ``True`` for the last one in the output folder."""
    return {"true": True, "false": None}.get(str(checkpoint).lower(), checkpoint)


def _measured(
    trainer: UIBTrainer, model, shown: dict[str, Dataset | None], bias_column: str | None, number: int | None
) -> dict:
    """One row of the table for a user's model; ``number`` is that of the label which is looked at, where a row has several."""
    row: dict[str, float] = {}
    of_forget: Any = None  # labels and rows of its tokens
    for part, dataset in shown.items():
        if dataset is None:
            continue
        rows = dataset if part == "test" or len(dataset) <= MOST_ROWS else dataset.select(range(MOST_ROWS))
        seen = predict(model, rows, trainer.processing_class, description=f"Evaluating {part}")
        logits, labels, numbers = labelled_examples(*seen)
        if number is not None:
            logits, labels = two_classes(logits, labels, number)
        if part != "test":
            row[f"{part}_accuracy"] = float((logits.argmax(-1) == labels).mean())
            of_forget = (labels, numbers) if part == "forget" else of_forget
            continue
        row |= results_row(logits, labels, None)
        if bias_column is None or bias_column not in dataset.column_names:
            continue
        forget: Any = shown["forget"]
        if isinstance(trainer.task, TokenLabels):
            attributes, coded = bias_attributes(forget, dataset, bias_column, of_forget[0], (of_forget[1], numbers))
            told = np.isin(labels, of_forget[0])  # the bias is that of tokens whose class the forget set's have
            row = results_row(logits[told], labels[told], (attributes[told], coded)) | row
        else:
            own = None if number is None else labels_of(forget)[:, number].astype(int)
            row |= results_row(logits, labels, bias_attributes(forget, dataset, bias_column, own))
    return row
