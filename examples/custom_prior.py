"""A prior of your own as R^(l): the predictions on forget rows should say as little about their class as a coin.

    python examples/custom_prior.py

scikit-learn's handwritten digits, whose hue gives the label away on the forget set.
"""

import math

import torch
from torch import Tensor

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli import digits
from hf_uib.inference import predict
from hf_uib.metrics import bias_row, text_table
from hf_uib.priors import Prior, register_prior


@register_prior("entropy")
class EntropyPrior(Prior):
    """Divides out what the predictions on the forget set tell: ``log(classes) - H(p)``, in nats per example."""

    def forget_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Zero where every class is equally likely."""
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        return (math.log(logits.shape[-1]) - entropy).mean()

    def default_strength(self, noised: bool) -> float:
        """gamma with the channel closed by noise (a pattern), and without (a random draw)."""
        return 0.03 if noised else 0.1


def main(steps: int = 200) -> dict:
    """Unlearn the hue of the digits under the prior above; prints a table."""
    task = digits.digits_colour(seed=0)
    original = digits.prepare_models(task, 0, "out")["original"]
    test, rows = task.sets["test"], {}
    hues = test.with_format(None)[task.bias_column]
    rows["original"] = bias_row(*predict(original, test, task.processing_class), hues)
    trainer = UIBTrainer(
        original,
        UIBConfig(
            "out",
            prior="entropy",
            max_steps=steps,
            per_device_train_batch_size=64,
            save_strategy="no",
            logging_steps=50,
        ),
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"],
        processing_class=task.processing_class,
    )
    trainer.train()
    rows["UIB + entropy"] = bias_row(*predict(trainer.model, test, task.processing_class), hues)
    print(text_table(rows))
    return rows


if __name__ == "__main__":
    main()
