"""Started by test_checkpoints.py under two processes: SigLIP, whose pooling layers no gradient reaches."""

import gc
import json
import sys

import torch
from accelerate import PartialState
from conftest import make_rows
from test_checkpoints import siglip
from test_trainer import config

from hf_uib import UIBTrainer


def main(path: str, beta: float) -> None:
    """Train, resume from the middle, and write which weights were trained."""

    def trained(folder, resume=None):
        args = config(folder, beta=beta, save_strategy="steps", save_steps=3)
        trainer = UIBTrainer(
            siglip(),
            args,
            make_rows(n=27, seed=1),
            make_rows(n=32, seed=2),
            calibration_dataset=make_rows(n=13, seed=3),
        )
        trainer.train(resume_from_checkpoint=resume)
        model = trainer.accelerator.unwrap_model(trainer.model)
        return trainer, {n: p for n, p in model.named_parameters() if "lora_B" in n}

    trainer, whole = trained(path)
    _, half = trained(f"{path}-again", f"{path}/checkpoint-3")
    if trainer.is_world_process_zero():
        found = {
            "world": trainer.args.world_size,
            "untrained": [n for n, p in whole.items() if not p.requires_grad],
            "after resuming": [n for n, p in half.items() if not p.requires_grad],
            "moved": max(p.abs().max().item() for p in whole.values()),
            "difference": max((whole[n] - half[n]).abs().max().item() for n in whole),
        }
        with open(f"{path}.json", "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], float(sys.argv[2]))
    gc.collect()
    PartialState().destroy_process_group()
