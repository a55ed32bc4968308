"""Rows of people who withdrew go: random rows are unlearned, a membership attack looks for them, the merged model is kept.

    python examples/delete_rows.py

scikit-learn's handwritten digits. The attack's AUC is the chance that a deleted row looks more like training data than an unseen
one does; the target is that of the model retrained without the rows.
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
from hf_uib.metrics import attack
from hf_uib.models import load_classifier

NAMES = [str(digit) for digit in range(10)]
SIZES = {"forget": 150, "retain": 450, "unseen": 300, "test": 897}


def split_digits(processor: ViTImageProcessorPil) -> dict[str, Dataset]:
    """Encoded rows by part of `SIZES`, drawn at random."""
    pictures, labels = load_digits(return_X_y=True)
    pictures = np.repeat((pictures.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8), 3, axis=-1)
    order, parts, start = np.random.default_rng(0).permutation(len(labels)), {}, 0
    for part, size in SIZES.items():
        index = order[start : start + size]
        start += size
        rows = picture_dataset(pictures[index], labels[index], index, "row", NAMES)
        parts[part] = encode(rows, processor, "pixel_values")
    return parts


def attacked(model: nn.Module, sets: dict[str, Dataset]) -> dict[str, float]:
    """Accuracy on unseen rows, and the attack's AUC with its 95% interval."""
    seen = {part: predict(model, sets[part]) for part in ("forget", "test")}
    found = attack(seen)
    logits, labels = seen["test"]
    accuracy = float((logits.argmax(-1) == labels).mean())
    return {"accuracy": accuracy} | {k: found[k] for k in ("auc", "auc_low", "auc_high")}


def main(steps: int = 200, train_steps: int = 400, output_dir: str = "out/delete_rows") -> dict[str, dict]:
    """Delete the rows, attack the merged model as it lies in its folder; prints a table.

    Args:
        steps: of unlearning.
        train_steps: of the original, and of the retrained model.
        output_dir: ``merged`` in it is the artefact.
    """
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8})
    sets = split_digits(processor)
    set_seed(0)
    start = small_vit(8, 4, NAMES, hidden=48, layers=3)
    args = TrainingArguments(output_dir, max_steps=train_steps, per_device_train_batch_size=64, learning_rate=1e-3)
    original = retrain(start, merged(sets["forget"], sets["retain"]), args)
    retrained = retrain(start, sets["retain"], args)
    before = attacked(original, sets)
    trainer = UIBTrainer(
        original,
        UIBConfig(output_dir, max_steps=steps, per_device_train_batch_size=64, save_strategy="no", logging_steps=50),
        forget_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        calibration_dataset=sets["unseen"],
        processing_class=processor,
    )
    trainer.request = "rows of people who withdrew"
    trainer.train()
    artefact = f"{output_dir}/merged"
    trainer.save_merged(artefact)
    rows = {
        "original": before,
        "UIB, merged": attacked(load_classifier(artefact), sets),
        "retrained": attacked(retrained, sets),
    }
    print(f"\n{'':12} accuracy  membership attack, AUC (95%)")
    for name, row in rows.items():
        print(f"{name:12} {row['accuracy']:8.3f}  {row['auc']:.3f} ({row['auc_low']:.3f}, {row['auc_high']:.3f})")
    print(f"\nTo publish: {artefact}. The original and the adapter still hold the rows; withdraw both.")
    return rows


if __name__ == "__main__":
    main()
