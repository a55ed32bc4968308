"""A model and a suspicion: which rows teach a shortcut is found without attribute labels, and unlearned.

    python examples/suspicion.py

scikit-learn's handwritten digits; in most of them the hue gives the digit away. Nothing says which rows these are: the column of
the hue is taken away first. The audit goes by what `discover` says that the test rows look like; the hue comes back for the table.
"""

import numpy as np

from hf_uib import UIBConfig, UIBTrainer, discover
from hf_uib.cli import digits
from hf_uib.discovery.report import Discovery
from hf_uib.inference import predict
from hf_uib.metrics import bias_row, text_table

LOOKS = "looks_like"  # column that stands for the attribute


def main(
    steps: int = 200, train_steps: int = 400, output_dir: str = "out/suspicion"
) -> tuple[Discovery, dict[str, dict]]:
    """Find the rows, look at them, unlearn them and audit; prints each step.

    Args:
        steps: of unlearning.
        train_steps: of the original on unbiased digits, and then on biased ones.
        output_dir: for ``found.png``, ``rows.parquet`` and the trainer.

    Returns:
        What was found, and rows of the results table.
    """
    task = digits.digits_colour()
    task.train_settings |= {"pretrain_steps": train_steps, "steps": train_steps}
    model = digits.prepare_models(task, 0, output_dir)["original"]
    train = digits.merged(task.sets["forget"], task.sets["retain"]).remove_columns("colour")

    test = task.sets["test"]
    found = discover(model, train, unseen=test.remove_columns("colour"), processing_class=task.processing_class)
    print(found)
    found.save(output_dir)
    print(f"\nLook at {output_dir}/found.png before you go on.\n")

    forget = with_looks(found.forget, found.looks[~found.retained])
    before, labels = predict(model, test)
    trainer = UIBTrainer(
        model,
        UIBConfig(output_dir, max_steps=steps, per_device_train_batch_size=64, save_strategy="no", logging_steps=50),
        forget_dataset=forget,
        retain_dataset=found.retain,
        calibration_dataset=task.sets["calibration"],
    )
    trainer.train()
    hues = np.asarray(test.with_format(None)["colour"])
    rows = {"original": bias_row(before, labels, hues), "UIB": bias_row(predict(trainer.model, test)[0], labels, hues)}
    told = f"{(found.unseen_looks == hues).mean():.0%} of the test rows look like the class of their hue."
    audit = trainer.audit(with_looks(test, found.unseen_looks), LOOKS, example_column="example")
    print(f"\n{text_table(rows)}\n\n{told}\nAudit: {audit.verdict}")
    return found, rows


def with_looks(rows, looks: np.ndarray):
    """The rows with a column of the class that each looks like."""
    return rows.add_column(LOOKS, looks.tolist())


if __name__ == "__main__":
    main()
