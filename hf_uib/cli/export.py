"""Write the merged model as ONNX, and compare what it says with PyTorch's.

    hf-uib export out --onnx out-onnx
    hf-uib export out --onnx out-onnx --int8 --dataset_name my-org/scans \\
        --forget_where source=clinic_a --bias_column source

FOLDER is a merged checkpoint, a run's folder with merged/ in it, or an adapter (folder or Hub id), which is merged in memory.
Nothing is written where the logits differ by more than --tolerance. `hf-uib audit --model out-onnx/model.onnx` audits the file.
Needs the extra `onnx`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers.utils import CONFIG_NAME

from ..audit.context import AuditContext
from ..audit.gather import gather
from ..checkpointing import write_json
from ..data.labels import has_labels, with_label_vectors
from ..data.sources import load_splits, split_of
from ..exported import EXPORT, INT8, MODEL, TOLERANCE, ExportedClassifier, export_onnx
from ..hub.push import MERGED
from ..inference import reader_of
from ..lora import require_base_below
from ..metrics import text_table
from ..models import Name, name_of
from ..provenance import merged_copy, next_base
from ..quantised import dequantised
from .outputs import quiet
from .parser import parse
from .unlearn import check_bias_columns, chosen_rows, columns_of, processor_for, remote_code

MOST_ROWS = 2000  # of the test split, that logits are compared on


@dataclass
class ExportArguments:
    """What to export, and what to compare it on."""

    model: str = field(
        metadata={"help": "Merged checkpoint, run's folder or adapter; may stand first, without the flag."}
    )
    onnx: str = field(metadata={"help": "Folder to write to: new, empty, or an earlier export, which is replaced."})
    int8: bool = field(
        default=False, metadata={"help": f"Also write {INT8}, by ONNX Runtime's dynamic quantiser, and compare it."}
    )
    tolerance: float = field(
        default=TOLERANCE, metadata={"help": f"Largest difference of a logit of {MODEL}; above it nothing is written."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Also compare on the rows of a data set: Hub id, folder or file."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split: str = field(default="train", metadata={"help": "Split that holds the rows to forget."})
    test_split: str = field(default="test", metadata={"help": "Split to compare on."})
    forget_where: list[str] = field(
        default_factory=list,
        metadata={"help": "COLUMN=VALUE of the rows to forget, with --bias_column: they say what the bias is."},
    )
    forget_rows: str | None = field(
        default=None, metadata={"help": "rows.parquet of `hf-uib discover`, in place of --forget_where."}
    )
    forget_scores: str | None = field(
        default=None,
        metadata={"help": "File with a score for each row, in place of --forget_where; with --forget_top."},
    )
    forget_top: int | None = field(default=None, metadata={"help": "That many rows with the highest scores."})
    bias_column: list[str] = field(
        default_factory=list,
        metadata={"help": "Column with the bias attribute: the audit's bias figures of every file."},
    )
    text_column: list[str] = field(
        default_factory=list, metadata={"help": "Column of the text, or the two columns of a pair of texts."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the picture."})
    audio_column: str | None = field(default=None, metadata={"help": "Column of the sound."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with a checkpoint; only for one whose code you have read."},
    )


def main(arguments: list[str]) -> None:
    """`hf-uib export ARGUMENTS`."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model", *arguments]
    (job,) = parse(
        "export",
        __doc__,
        arguments,
        ExportArguments,
        lists={"forget_where": "COLUMN=VALUE", "text_column": "COLUMN", "bias_column": "COLUMN"},
        launched=False,
    )
    export(job)


def export(job: ExportArguments) -> dict[str, Any]:
    """Write the folder, and print what was compared.

    Returns:
        What ``export.json`` holds.

    Raises:
        ValueError: in one line, what is wrong with the job; nothing is written then.
    """
    quiet()
    chosen = bool(job.forget_where or job.forget_rows or job.forget_scores)
    if bool(job.bias_column) != chosen or (job.bias_column and not job.dataset_name):
        raise ValueError(
            "--dataset_name, --bias_column and --forget_where (or --forget_rows, --forget_scores) go together; give all three."
        )
    model, source = plain_checkpoint(job.model, **remote_code(job))
    processor = processor_for(job, model, source)
    columns = columns_of(job)
    test = rows = None
    sets: dict[str, Dataset] = {}
    if job.dataset_name:
        splits = load_splits(job.dataset_name, job.dataset_config_name)
        test = split_of(splits, job.test_split)
        if job.bias_column:
            check_bias_columns(job.bias_column, test)
            forget, _ = chosen_rows(split_of(splits, job.train_split), job)
            sets = {"forget": forget, "test": test}
        if not has_labels(with_label_vectors(test, model.config, columns), columns):
            raise ValueError(f"Split '{job.test_split}' has no column of labels; name it: --label_column NAME.")
        read = reader_of(model, processor, columns)
        rows = read(test.select(range(min(len(test), MOST_ROWS))), job.test_split)
    report = export_onnx(model, processor, job.onnx, rows=rows, int8=job.int8, tolerance=job.tolerance)
    print(differences_text(report))
    if sets:
        report["bias"] = bias_figures(
            model, job.onnx, sets, job.bias_column, processing_class=processor, columns=columns
        )
        write_json(report, os.path.join(job.onnx, EXPORT))
        print(f"\n{text_table(report['bias'])}")
    print(f"\n{MODEL}, its config and processor, and {EXPORT}: {job.onnx}")
    return report


def plain_checkpoint(name: Name, **settings) -> tuple[Any, str]:
    """The merged model of a folder or Hub id in float32, and where its processor may lie.

    Args:
        settings: of `load_classifier`.

    Raises:
        ValueError: there is no such checkpoint, or the adapter cannot be merged.
    """
    source = str(name_of(name))
    if os.path.isfile(os.path.join(source, MERGED, CONFIG_NAME)):
        source = os.path.join(source, MERGED)
    model = next_base(source, **settings)
    if isinstance(model, PeftModel):
        require_base_below(model)
        model = merged_copy(model)
    return dequantised(model).cpu().float().eval(), source


def bias_figures(
    model: Any, folder: Name, sets: dict[str, Any], bias_column: str | Sequence[str] | None, **settings
) -> dict[str, dict]:
    """The audit's figures of the model and of the files of its export, by ``PyTorch``, ``ONNX`` and ``int8``.

    Args:
        sets: ``forget`` and ``test`` rows.
        settings: of `hf_uib.audit.gather.gather`.
    """
    names = {"reference": "PyTorch", "model": "ONNX", "int8": "int8"}
    folder = str(name_of(folder))
    models = {"reference": model, "model": ExportedClassifier(os.path.join(folder, MODEL))}
    if os.path.isfile(quantised := os.path.join(folder, INT8)):
        models["int8"] = ExportedClassifier(quantised)
    context = gather(models, [], sets, bias_column=bias_column, **settings)
    return {names[name]: _figures(context, name) for name in models}


def _figures(context: AuditContext, name: str) -> dict[str, float]:
    row = {"accuracy": context.accuracy(name, "test").value}
    row |= {
        figure: context.bias(name, figure).value for figure in context.bias_figures if figure != "aligned_advantage"
    }
    groups = context.groups(name)
    row |= {"worst_group_accuracy": groups["worst"]} if groups["every"] else {}
    return row | {"forget_accuracy": context.accuracy(name, "forget").value, "attack_auc": context.auc(name).value}


def differences_text(report: dict[str, Any]) -> str:
    """What was compared, a line a file and kind of row."""
    lines = [
        f"{file}, {seen['rows']} {'synthetic rows' if kind != 'rows' else 'rows of the data'}: logits differ by up to "
        f"{seen['largest_difference']:.2g} (largest logit {seen['largest_logit']:.3g}), {seen['predictions_that_differ']} "
        "predictions differ"
        for file, found in report["differences"].items()
        for kind, seen in found.items()
    ]
    return "\n".join([*lines, f"Tolerance of {MODEL}: {report['tolerance']:g}"])
