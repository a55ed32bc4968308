"""Other kinds of input and label on real text and speech: how a task is made into figures. A file here is a task."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_uib import retrain
from hf_uib.data.columns import Columns


@dataclass(frozen=True)
class Kind:
    """Rows, a model and how it is judged.

    Attributes:
        start: the model before it learned the task.
        sets: raw rows: ``forget``, in which an attribute gives the label away; ``retain``, ``calibration`` and ``test``, in which
            it does not.
        row: accuracy, ``conflicting_accuracy`` and ``follow_rate`` of a model on the test rows.
        processing_class: tokenizer or feature extractor.
        bias_column: the attribute, for the audit; columns: as in `hf_uib.UIBTrainer`; audit: further arguments of the audit.
        batch_size: of every training; train_rate: learning rate of the original and the retrained model.
        train_steps, steps: of these two, and of unlearning and LoRA.
    """

    start: nn.Module
    sets: dict[str, Dataset]
    row: Callable[[nn.Module], dict[str, float]]
    processing_class: object
    bias_column: str
    batch_size: int = 16
    train_rate: float = 1e-4
    train_steps: int = 200
    steps: int = 120
    columns: Columns = Columns()
    audit: dict = field(default_factory=dict)


def compare(kind: Kind, beside_lora: ModuleType, seed: int, output_dir: str) -> tuple[dict[str, dict], str]:
    """A row of each model (original, UIB, LoRA, retrained), and the verdict of the audit of UIB's.

    Args:
        beside_lora: examples/beside_lora.py.
    """
    settings = dict(per_device_train_batch_size=kind.batch_size, seed=seed, save_strategy="no", logging_steps=50)
    training = TrainingArguments(output_dir, max_steps=kind.train_steps, learning_rate=kind.train_rate, **settings)
    given = {"processing_class": kind.processing_class, "columns": kind.columns}
    sets = kind.sets
    set_seed(seed)
    return beside_lora.compare(
        retrain(kind.start, concatenate_datasets([sets["forget"], sets["retain"]]), training, **given),
        retrained=retrain(kind.start, sets["retain"], training, **given),
        row=kind.row,
        settings=dict(output_dir=output_dir, max_steps=kind.steps, **settings),
        audit=dict(test_dataset=sets["test"], bias_column=kind.bias_column, columns=kind.columns, **kind.audit),
        forget_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        calibration_dataset=sets["calibration"],
        **given,
    )
