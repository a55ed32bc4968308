"""Started by test_killed.py under one or two processes: trains, saves at every step, goes on from the last checkpoint there is."""

import gc
import json
import os
import sys

from accelerate import PartialState
from conftest import make_model, make_rows
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_uib import UIBConfig, UIBTrainer


def tell(line: str) -> None:
    """One write, so that the lines of two processes stay apart."""
    os.write(1, f"{line}\n".encode())


class Steps(TrainerCallback):
    """Tells the one who kills where the run is."""

    def on_step_end(self, args, state, control, **kwargs):
        tell(f"step {state.global_step}")


def main(folder: str) -> None:
    """Train to the end; everything that is random is on: dropout, noise, two sets in random order."""
    tell(f"process {os.getpid()}")
    args = UIBConfig(
        folder, max_steps=12, per_device_train_batch_size=4, subspace_rank=4, learning_rate=0.01, use_cpu=True,
        save_steps=1, save_total_limit=2, disable_tqdm=True, logging_steps=1, prior_update_steps=3, noise_to_signal=0.5,
        report_to="none", prior_fraction=0.7,
    )  # fmt: skip
    trainer = UIBTrainer(
        make_model(hidden_dropout_prob=0.1), args, make_rows(n=27, seed=1), make_rows(n=32, seed=2),
        calibration_dataset=make_rows(n=13, seed=3), callbacks=[Steps()],
    )  # fmt: skip
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    tell(f"from {last}")
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    if trainer.is_world_process_zero():
        times = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        logs = [{k: v for k, v in row.items() if k not in times} for row in trainer.state.log_history]
        logs = [row for row in logs if "train_loss" not in row]  # of the last stretch alone, in Trainer
        with open(os.path.join(folder, "logs.json"), "w") as file:
            json.dump({"world": args.world_size, "logs": logs}, file)


if __name__ == "__main__":
    main(sys.argv[1])
    gc.collect()  # the trainer goes before its process group
    PartialState().destroy_process_group()
