"""An attribution method says which training rows cause the mistakes that somebody noticed, and these rows are unlearned.

    pip install --no-deps kronfluence
    pip install einops einconv opt-einsum
    python examples/attribution.py

scikit-learn's handwritten digits in colour. One labeller named the hue and not the digit; which rows these are is not used but for
counting. kronfluence (EK-FAC influence, Grosse et al., arXiv 2308.03296) scores the training rows, and the scores go to a file as
`hf-uib unlearn --forget_scores out/attribution/scores.csv --forget_top 150` takes it.
"""

import copy
import os

import numpy as np
import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments, ViTImageProcessorPil, set_seed

from hf_uib import UIBConfig, UIBTrainer, retrain
from hf_uib.cli.digits import merged, paint, picture_dataset, small_vit
from hf_uib.data.chosen import scored_rows
from hf_uib.data.pairing import collator_for
from hf_uib.data.reading import encode
from hf_uib.inference import predict
from hf_uib.metrics import bias_row, text_table
from hf_uib.models import forward_columns

try:
    from kronfluence import Analyzer, Task, prepare_model
    from kronfluence.utils.dataset import DataLoaderKwargs
except ImportError as error:
    needed = "pip install --no-deps kronfluence, and pip install einops einconv opt-einsum"
    raise SystemExit(f"This example needs kronfluence ({error}): {needed}.") from None

NAMES = [str(digit) for digit in range(10)]
SIZES = {"planted": 150, "clean": 750, "noticed": 200, "calibration": 100, "test": 597}


def coloured_digits(processor: ViTImageProcessorPil) -> dict[str, Dataset]:
    """Encoded rows by part of `SIZES`. Those of ``planted`` have hues 5 to 9, and the hue as label; nine in ten of ``clean`` have
    the other hues. Elsewhere the hue is at random."""
    pictures, digits = load_digits(return_X_y=True)
    rng, parts, start = np.random.default_rng(0), {}, 0
    order = rng.permutation(len(digits))
    for part, size in SIZES.items():
        index = order[start : start + size]
        start += size
        hues = rng.integers(0, 10, size)
        if part in ("planted", "clean"):
            hues = hues % 5 + 5 * (rng.random(size) < {"planted": 1.0, "clean": 0.1}[part])
        labels = hues if part == "planted" else digits[index]
        painted = paint(pictures[index].reshape(-1, 8, 8) / 16, hues, saturation=1.0)
        parts[part] = encode(picture_dataset(painted, labels, hues, "colour", NAMES), processor, "pixel_values")
    return parts


class SummedLoss(Task):
    """Cross-entropy, of training rows and of mistakes."""

    def compute_train_loss(self, batch, model, sample=False):
        """Summed over the batch; with ``sample`` for labels that the model draws, as the Fisher information has it."""
        logits = model(pixel_values=batch["pixel_values"]).logits
        labels = torch.distributions.Categorical(logits=logits.detach()).sample() if sample else batch["labels"]
        return cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        """What the influence is on."""
        return self.compute_train_loss(batch, model)


def harm(model: nn.Module, train: Dataset, mistakes: Dataset, output_dir: str) -> np.ndarray:
    """``[n]``: how much each training row raises the summed loss on the mistakes."""
    task = SummedLoss()
    prepared = prepare_model(copy.deepcopy(model), task)
    analyzer = Analyzer("digits", prepared, task, output_dir=f"{output_dir}/kronfluence", disable_tqdm=True)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collator_for(forward_columns(model), None)))
    analyzer.fit_all_factors("ekfac", train, per_device_batch_size=100, overwrite_output_dir=True)
    analyzer.compute_pairwise_scores(
        "mistakes", "ekfac", mistakes, train, len(mistakes), per_device_train_batch_size=100, overwrite_output_dir=True
    )
    return -analyzer.load_pairwise_scores("mistakes")["all_modules"].sum(0).numpy()  # theirs: how much it lowers it


def main(
    steps: int = 200, train_steps: int = 600, top: int = 150, output_dir: str = "out/attribution"
) -> tuple[float, dict[str, dict]]:
    """Score the rows by the mistakes, forget the worst ones; prints how many of them are planted, and a table.

    Args:
        steps: of unlearning.
        train_steps: of the original.
        top: rows to forget.
        output_dir: for ``scores.csv``, kronfluence and the trainer.

    Returns:
        The fraction of the chosen rows that is planted, and rows of the results table.
    """
    processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8})
    sets = coloured_digits(processor)
    train, test, noticed = merged(sets["planted"], sets["clean"]), sets["test"], sets["noticed"]
    set_seed(0)
    args = TrainingArguments(output_dir, max_steps=train_steps, per_device_train_batch_size=64, learning_rate=1e-3)
    model = retrain(small_vit(8, 2, NAMES, hidden=48, layers=3), train, args)
    before, labels = predict(model, test)

    answers, right = predict(model, noticed)
    mistakes = noticed.select(np.flatnonzero(answers.argmax(-1) != right))
    os.makedirs(output_dir, exist_ok=True)
    scores = f"{output_dir}/scores.csv"
    np.savetxt(scores, harm(model, train, mistakes, output_dir), header="score", comments="")
    forget, retain = scored_rows(scores, train, top)
    planted = float((forget < SIZES["planted"]).mean())  # they come first

    trainer = UIBTrainer(
        model,
        UIBConfig(output_dir, max_steps=steps, per_device_train_batch_size=64, save_strategy="no", logging_steps=50),
        forget_dataset=train.select(forget),
        retain_dataset=train.select(retain),
        calibration_dataset=sets["calibration"],
        processing_class=processor,
    )
    trainer.train()
    hues = np.asarray(test.with_format(None)["colour"])
    rows = {"original": bias_row(before, labels, hues), "UIB": bias_row(predict(trainer.model, test)[0], labels, hues)}
    chance = SIZES["planted"] / len(train)
    print(
        f"\n{len(mistakes)} of {len(noticed)} rows are misread. Of the {top} training rows that do most for that, {planted:.0%}"
    )
    print(f"are planted; of all, {chance:.0%} are.\n\n{text_table(rows)}\n\nScores: {scores}")
    return planted, rows


if __name__ == "__main__":
    main()
