"""Two classes were one in an older label scheme: a ViT that learned from old and new rows unlearns the old scheme.

    python examples/outdated_labels.py

scikit-learn's handwritten digits. In the old rows every 8 is labelled 3; the few new rows tell them apart.
"""

import numpy as np
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import nn
from transformers import TrainingArguments, ViTImageProcessorPil, set_seed

from hf_uib import UIBConfig, UIBTrainer, retrain
from hf_uib.cli.digits import merged, picture_dataset, small_vit
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.metrics import text_table

NEW, OLD = 8, 3  # eights were threes
NAMES = [str(digit) for digit in range(10)]
SIZES = {"old": 800, "new": 200, "unseen": 150, "test": 647}


def split_digits(processor: ViTImageProcessorPil) -> dict[str, Dataset]:
    """Encoded rows by part of `SIZES`; the labels of ``old`` are those of the old scheme."""
    pictures, labels = load_digits(return_X_y=True)
    pictures = np.repeat((pictures.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8), 3, axis=-1)
    order, parts, start = np.random.default_rng(0).permutation(len(labels)), {}, 0
    for part, size in SIZES.items():
        index = order[start : start + size]
        start += size
        true = labels[index]
        given = np.where(true == NEW, OLD, true) if part == "old" else true
        rows = picture_dataset(pictures[index], given, true, "digit", NAMES)
        parts[part] = encode(rows, processor, "pixel_values")
    return parts


def row(model: nn.Module, test: Dataset) -> dict[str, float]:
    """Accuracy, and the fraction of eights that are called 3."""
    logits, labels = predict(model, test)
    answers = logits.argmax(-1)
    return {
        "accuracy": float((answers == labels).mean()),
        "follow_rate": float((answers[labels == NEW] == OLD).mean()),
    }


def main(steps: int = 200, train_steps: int = 300, output_dir: str = "out/outdated_labels") -> dict[str, dict]:
    """Unlearn the old rows; prints how many eights follow the old scheme.

    Args:
        steps: of unlearning.
        train_steps: of the original, and of the model retrained on new rows alone.
        output_dir: for the trainers.
    """
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8})
    sets = split_digits(processor)
    set_seed(0)
    start = small_vit(8, 4, NAMES, hidden=48, layers=3)
    args = TrainingArguments(output_dir, max_steps=train_steps, per_device_train_batch_size=64, learning_rate=1e-3)
    original = retrain(start, merged(sets["old"], sets["new"]), args)
    retrained = retrain(start, sets["new"], args)
    before = row(original, sets["test"])
    trainer = UIBTrainer(
        original,
        UIBConfig(output_dir, max_steps=steps, per_device_train_batch_size=64, save_strategy="no", logging_steps=50),
        forget_dataset=sets["old"],
        retain_dataset=sets["new"],
        calibration_dataset=sets["unseen"],
        processing_class=processor,
    )
    trainer.train()
    rows = {"original": before, "UIB": row(trainer.model, sets["test"]), "retrained": row(retrained, sets["test"])}
    print(f"\nThe shortcut here is the old scheme: the fraction of eights that are called 3.\n\n{text_table(rows)}")
    return rows


if __name__ == "__main__":
    main()
