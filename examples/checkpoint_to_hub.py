"""A PEFT checkpoint in, an unlearned one out: loaded again by plain PEFT, and pushed to the Hub if asked to.

    python examples/checkpoint_to_hub.py
    HF_TOKEN=... python examples/checkpoint_to_hub.py --push my-name/vit-unlearned

The checkpoint is made here: a ViT, fine-tuned with LoRA on digits whose hue gives the label away. ``--push`` creates
my-name/vit-unlearned, and my-name/vit-unlearned-base for the model under the adapter.
"""

import argparse
import os

import numpy as np
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, set_seed

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli import digits
from hf_uib.inference import predict
from hf_uib.metrics import bias_row, text_table


def biased_checkpoint(task: digits.Task, base: str, folder: str, train_steps: int, push: bool) -> None:
    """Make what a user comes with: ``base`` (a Hub id if ``push``, else a folder), and an adapter that PEFT saves to ``folder``."""
    set_seed(0)
    model = task.new_model()
    digits.fit(model, task.sets["pretrain"], task, train_steps, folder, 0, 1e-3)
    if push:
        model.push_to_hub(base)
    else:
        model.save_pretrained(base)
    model = AutoModelForImageClassification.from_pretrained(base)  # the adapter notes where it came from
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=layers, modules_to_save=["classifier"])
    model = get_peft_model(model, lora)
    digits.fit(model, digits.merged(task.sets["forget"], task.sets["retain"]), task, train_steps, folder, 0, 3e-3)
    model.save_pretrained(folder)


def main(
    steps: int = 200, train_steps: int = 400, push: str | None = None, output_dir: str = "out/checkpoint_to_hub"
) -> dict[str, dict]:
    """Unlearn the hue from the adapter in ``output_dir/biased``; prints a table.

    Args:
        steps: of unlearning.
        train_steps: of the base, and of the biased adapter.
        push: Hub id for the unlearned adapter; None writes it to ``output_dir`` alone.
        output_dir: for both adapters, and for the base where it is not pushed.

    Returns:
        The rows of the table; that of the adapter as it was loaded again has the largest difference of a logit, too.
    """
    task = digits.digits_colour()
    test, hues = task.sets["test"], task.sets["test"]["colour"]
    base, biased = f"{push}-base" if push else f"{output_dir}/base", f"{output_dir}/biased"
    biased_checkpoint(task, base, biased, train_steps, push is not None)

    trainer = UIBTrainer(
        biased,  # a PEFT checkpoint, by folder or Hub id
        UIBConfig(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=64,
            save_strategy="no",
            logging_steps=50,
            hub_model_id=push,
        ),
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"],
        processing_class=task.processing_class,
    )
    trainer.request = "the hue as a hint to the digit"
    rows = {"original": bias_row(*predict(trainer.model, test), hues)}
    trainer.train()
    logits, labels = predict(trainer.model, test)
    rows["UIB"] = bias_row(logits, labels, hues)
    if push:
        trainer.push_to_hub()
    else:
        trainer.save_model()

    plain = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), push or output_dir)
    again, _ = predict(plain, test)
    rows["UIB, loaded by PEFT"] = bias_row(again, labels, hues)
    print(f"\n{text_table(rows)}\n\nadapter and card: {push or output_dir}; its base: {base}")
    print(f"largest difference of a logit after loading: {np.abs(again - logits).max():.1e}")
    rows["UIB, loaded by PEFT"]["difference"] = float(np.abs(again - logits).max())
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--push", help="Hub id to push to, as my-name/vit-unlearned")
    given = parser.parse_args()
    if given.push and "HF_TOKEN" not in os.environ:
        parser.error("--push needs a token with write access in the environment: HF_TOKEN=...")
    main(push=given.push)
