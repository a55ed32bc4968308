"""Audit a classifier that is said to have unlearned something.

    hf-uib audit --model A --reference B --retrained C --dataset_name D --forget_where source=clinic_a \\
        --bias_column source --output_dir audited

Any two or three checkpoints of one task will do, not only those of hf_uib. Writes report.json and audit.png. The exit status is 0
whether the audit is passed or not: `passed` and `flags` are in the report.
"""

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..audit.report import AuditReport, audit_model, loaded
from ..data.sources import load_splits, split_of
from ..exported import folder_of
from ..inference import reader_of
from ..processes import processes
from .outputs import check_writable, quiet
from .parser import parse
from .unlearn import chosen_rows, columns_of, complete, processor_for, without_shared_rows


@dataclass
class AuditArguments:
    """What to audit, on what."""

    model: str = field(
        metadata={"help": "The model that unlearned: Hub id or folder, an adapter's included, or an ONNX file."}
    )
    dataset_name: str = field(
        metadata={"help": "Hub id, folder or file with the data the reference was trained on, and a test split."}
    )
    reference: str | None = field(
        default=None, metadata={"help": "The model before unlearning; by default the base of an adapter."}
    )
    retrained: list[str] = field(
        default_factory=list, metadata={"help": "One or more models trained without the forget set, to compare with."}
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
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split that holds forget and retained rows."})
    test_split: str = field(default="test", metadata={"help": "Split of unbiased rows that no model was trained on."})
    bias_column: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Column with the bias attribute; further ones after it, for fairness by each and by their crossing."
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
            "help": "Of a model of several labels a row: the one that is looked at, by name or number. Default: the one that most "
            "forget rows have."
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
    example_column: str | None = field(
        default=None, metadata={"help": "Test rows that share its value differ in the attribute alone."}
    )
    drop_incomplete_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows without a label or an input that can be read, and count them."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with a checkpoint; only for one whose code you have read."},
    )
    deep: bool = field(
        default=False, metadata={"help": "Also probes, relearning and compression; says first how long it takes."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every sample and resample."})
    output_dir: str = field(default="audit", metadata={"help": "Folder for report.json and the figures."})


def main(arguments: list[str]) -> None:
    """`hf-uib audit ARGUMENTS`."""
    lists = {"forget_where": "COLUMN=VALUE", "retrained": None, "text_column": "COLUMN", "bias_column": "COLUMN"}
    (job,) = parse("audit", __doc__, arguments, AuditArguments, lists=lists)
    audit(job)


def _check_output(folder: str) -> None:
    """Refuse a folder that cannot be written to, or holds the report of a run."""
    path = os.path.join(folder, "report.json")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            if '"checks"' not in file.read():
                raise ValueError(f"{folder} holds the report.json of something else; give another --output_dir.")
    check_writable(folder)


def audit(job: AuditArguments) -> AuditReport:
    """Audit checkpoints; writes and prints the report.

    Raises:
        ValueError: in one line, what is wrong with the job.
    """
    quiet()
    _check_output(job.output_dir)
    load = partial(loaded, trust_remote_code=job.trust_remote_code)
    model: Any = load(job.model)
    reference = load(job.reference) if job.reference else None
    retrained = [load(name) for name in job.retrained]
    processors = [folder_of(name) for name in (job.reference, job.model) if name]
    splits = load_splits(job.dataset_name, job.dataset_config_name)
    train = split_of(splits, job.train_split)
    test = split_of(splits, job.test_split)
    if not job.forget_where and job.forget_rows is None and job.forget_scores is None:
        raise ValueError("--forget_where is missing; say which rows were to be forgotten, as COLUMN=VALUE.")
    forget, retain = chosen_rows(train, job)
    processor = processor_for(job, model, *processors)
    columns = columns_of(job)
    if job.drop_incomplete_rows:
        read = reader_of(model, processor, columns)
        forget, retain = complete(forget, read, "the forget set"), complete(retain, read, "the retained set")
        test = complete(test, read, f"split '{job.test_split}'")
    sets = without_shared_rows({"forgotten": forget, "retained": retain, "test": test})
    forget, retain, test = sets.values()
    report = audit_model(
        model,
        reference_model=reference,
        forget_dataset=forget,
        retain_dataset=retain if len(retain) else None,
        test_dataset=test,
        bias_column=job.bias_column,
        retrained_model=retrained,
        processing_class=processor,
        example_column=job.example_column,
        deep=job.deep,
        seed=job.seed,
        columns=columns,
        label=job.audit_label,
        positive_label=job.positive_label,
    )
    if processes().is_main_process:
        os.makedirs(job.output_dir, exist_ok=True)
        report.to_json(os.path.join(job.output_dir, "report.json"))
        report.plot(job.output_dir)
        print(f"\n{report}\n\nreport.json and figures: {job.output_dir}")
    return report
