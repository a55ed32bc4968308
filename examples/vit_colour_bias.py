"""A ViT unlearns a colour bias: a table before, after and retrained, a figure, and the audit's verdict.

    python examples/vit_colour_bias.py

scikit-learn's handwritten digits; on the forget set the hue gives the class away.
"""

import numpy as np
from transformers import TrainingArguments

from hf_uib import UIBConfig, UIBTrainer, retrain
from hf_uib.audit.figures import draw_bias
from hf_uib.cli import digits
from hf_uib.inference import predict
from hf_uib.metrics import bias_row, text_table


def main(
    steps: int = 200, retrain_steps: int = 400, output_dir: str = "out/vit_colour_bias"
) -> tuple[dict[str, dict], str]:
    """Unlearn the hue; prints the table, writes ``bias.png`` and ``audit.png``.

    Args:
        steps: of unlearning.
        retrain_steps: of the model retrained without the forget set.
        output_dir: for the figures.

    Returns:
        The rows of the table, and the audit's verdict.
    """
    task = digits.digits_colour()
    test = task.sets["test"]
    models = digits.prepare_models(task, 0, output_dir)
    args = TrainingArguments(output_dir, max_steps=retrain_steps, per_device_train_batch_size=64, learning_rate=1e-3)
    retrained = retrain(models["start"], task.sets["retain"], args)
    before, labels = predict(models["original"], test)

    trainer = UIBTrainer(
        models["original"],
        UIBConfig(output_dir, max_steps=steps, per_device_train_batch_size=64, save_strategy="no", logging_steps=50),
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"],
    )
    trainer.train()

    after, _ = predict(trainer.model, test)
    hues = np.asarray(test.with_format(None)[task.bias_column])
    rows = {
        "original": bias_row(before, labels, hues),
        "UIB": bias_row(after, labels, hues),
        "retrained": bias_row(predict(retrained, test)[0], labels, hues),
    }
    audit = trainer.audit(test, task.bias_column, retrained_model=retrained, example_column="example")

    fooled = np.flatnonzero((before.argmax(-1) == hues) & (hues != labels))[:8].tolist()
    draw_bias(
        rows,
        output_dir,
        images=[test.with_format(None)[i]["image"] for i in fooled],
        labels=labels[fooled],
        before=before[fooled].argmax(-1),
        after=after[fooled].argmax(-1),
        names=test.features["label"].names,
    )
    audit.plot(output_dir)
    print(f"\n{text_table(rows)}\n\nAudit: {audit.verdict}\n\nbias.png and audit.png: {output_dir}")
    return rows, audit.verdict


if __name__ == "__main__":
    main()
