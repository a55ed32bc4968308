"""Started by test_processes.py under two processes with FSDP2: trains, saves, resumes, detaches and merges."""

import gc
import sys

import torch
from accelerate import PartialState
from conftest import make_model, make_rows
from test_trainer import config

from hf_uib import UIBTrainer
from hf_uib.sharding import is_sharded


def main(path: str) -> None:
    """Three runs: to the end, from the middle, and in bf16."""

    def trainer_in(folder, forget=27, **settings):
        args = config(folder, per_device_train_batch_size=4, save_strategy="steps", save_steps=3, **settings)
        sets = (make_rows(n=forget, seed=1), make_rows(n=32, seed=2))
        return UIBTrainer(make_model(), args, *sets, calibration_dataset=make_rows(n=13, seed=3))

    def adapter(trainer):
        return torch.cat([p.detach().flatten() for n, p in trainer.model.named_parameters() if ".lora_B" in n])

    def losses(trainer):
        return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])

    trainer = trainer_in(path)
    trainer.train()
    trainer.save_model()
    trainer.save_merged(f"{path}/merged")
    merged, detached = trainer.merge_and_unload(), trainer.detach()
    with torch.no_grad():
        rows = make_rows(n=21, seed=4)[:]["pixel_values"]
        logits = trainer.model.eval()(pixel_values=rows).logits
        of_merged = merged.eval()(pixel_values=rows).logits
    trainer.accelerator.wait_for_everyone()
    again = trainer_in(f"{path}-again")
    again.train(resume_from_checkpoint=f"{path}/checkpoint-3")
    half = trainer_in(f"{path}-bf16", bf16=True)
    half.train()
    refused = ""
    try:
        trainer_in(f"{path}-few", forget=7).train()  # six chunks of the sample, one row in most
    except ValueError as error:
        refused = str(error)
    if trainer.is_world_process_zero():
        found = {
            "world": trainer.args.world_size,
            "sharded": is_sharded(trainer.model),
            "moved": adapter(trainer).abs().max().item(),
            "resumed": (adapter(trainer) - adapter(again)).abs().max().item(),
            "bf16": (losses(trainer) - losses(half)).abs().max().item(),
            "bf16 adapter": str(adapter(half).dtype),
            "merged": (logits - of_merged).abs().max().item(),
            "logits": logits,
            "detached": detached.state_dict(),
            "refused": refused,
        }
        torch.save(found, f"{path}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
    gc.collect()
    PartialState().destroy_process_group()
