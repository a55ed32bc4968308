"""One training, two processes: accelerate starts them, the result is printed once.

    accelerate launch --config_file hf_uib/cli/accelerate_configs/cpu_two_processes.yaml examples/two_processes.py

On a machine with two GPUs take ddp.yaml. scikit-learn's handwritten digits, whose hue gives the label away on the forget set.
"""

import argparse
import gc

import numpy as np
import torch

from hf_uib import UIBConfig, UIBTrainer
from hf_uib.cli import digits


def main(steps: int = 200, train_steps: int = 400, output_dir: str = "out/two_processes") -> dict[str, float]:
    """Train on every process, print on the first one.

    Args:
        steps: of unlearning.
        train_steps: of the biased original.
        output_dir: for the trainers.

    Returns:
        Accuracy on test rows whose hue is that of another digit, before and after.
    """
    task = digits.digits_colour()
    task.train_settings |= {"pretrain_steps": train_steps, "steps": train_steps}
    original = digits.prepare_models(task, 0, output_dir)["original"]
    args = UIBConfig(
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=32,  # of each process
        per_device_eval_batch_size=128,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_steps=50,
    )
    test = task.sets["test"]
    labels, hues = (np.asarray(test.with_format(None)[name]) for name in ("label", "colour"))
    trainer = UIBTrainer(
        original,
        args,
        forget_dataset=task.sets["forget"],
        retain_dataset=task.sets["retain"],
        calibration_dataset=task.sets["calibration"],
        eval_dataset=test.select(np.flatnonzero(labels != hues)),
        compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
    )
    before = trainer.evaluate()["eval_accuracy"]  # the adapter is still zero
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        print(f"\nworld size {args.world_size}; accuracy where label and hue disagree: {before:.3f} -> {after:.3f}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train_steps", type=int, default=400)
    main(**vars(parser.parse_args()))
    gc.collect()  # the trainer goes before its process group
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
