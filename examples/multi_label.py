"""Several labels a row: handwritten digits are even, large or closed, and in most rows the hue gives all three away.

    python examples/multi_label.py

A ViT with three labels (`problem_type="multi_label_classification"`) learned from them. It unlearns the rows in which the hue goes
with the digit, beside LoRA fine-tuning on the same rows and a model retrained without the others.
"""

import numpy as np
from beside_lora import compare
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_uib import retrain
from hf_uib.cli.digits import digits_colour, merged, small_vit
from hf_uib.data.reading import encode
from hf_uib.inference import predict

LABELS = {"even": (0, 2, 4, 6, 8), "large": (5, 6, 7, 8, 9), "closed": (0, 6, 8, 9)}
OF_DIGIT = np.array([[float(digit in digits) for digits in LABELS.values()] for digit in range(10)])


def with_three_labels(rows: Dataset, processor) -> Dataset:
    """Pictures with a vector of labels in place of the digit; ``digit`` and ``colour`` stay for the comparison."""
    plain = rows.with_format(None).rename_column("label", "digit")
    return encode(plain.add_column("labels", OF_DIGIT[plain["digit"][:]].tolist()), processor, "pixel_values")


def row(model: nn.Module, test: Dataset) -> dict[str, float]:
    """Accuracy over all labels, and over those where the hue's digit has the other value (there it is followed by the rest)."""
    logits, labels = predict(model, test)
    right, hue = (logits > 0) == (labels > 0.5), OF_DIGIT[test.with_format(None)["colour"][:]]
    conflicting = hue != labels
    kept = float(right[conflicting].mean())
    return {"accuracy": float(right.mean()), "conflicting_accuracy": kept, "follow_rate": 1 - kept}


def main(
    steps: int = 200, train_steps: int = 400, seed: int = 0, output_dir: str = "out/multi_label"
) -> tuple[dict[str, dict], str]:
    """Unlearn the hue; prints and returns a row of each model, and the audit's verdict on the label ``closed``.

    Args:
        steps: of unlearning and of LoRA fine-tuning.
        train_steps: of the original, and of the model retrained on the retained rows.
        seed: of the split and of every training.
        output_dir: for the trainers.
    """
    task = digits_colour(seed)
    processor = task.processing_class
    sets = {part: with_three_labels(rows, processor) for part, rows in task.sets.items()}
    set_seed(seed)
    start = small_vit(8, 2, list(LABELS), hidden=48, layers=3)
    start.config.problem_type = "multi_label_classification"
    settings = dict(per_device_train_batch_size=64, seed=seed, save_strategy="no", logging_steps=50)
    training = TrainingArguments(output_dir, max_steps=train_steps, learning_rate=1e-3, **settings)
    start = retrain(start, sets["pretrain"], training)
    original = retrain(start, merged(sets["forget"], sets["retain"]), training)

    return compare(
        original,
        retrained=retrain(start, sets["retain"], training),
        row=lambda model: row(model, sets["test"]),
        settings=dict(output_dir=output_dir, max_steps=steps, **settings),
        audit=dict(test_dataset=sets["test"], label="closed"),
        forget_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        calibration_dataset=sets["calibration"],
        processing_class=processor,
    )


if __name__ == "__main__":
    main()
