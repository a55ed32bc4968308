"""Started by test_token_labels.py under one or two processes: a model of several labels a row or token, trained and audited."""

import gc
import json
import sys

import torch
from accelerate import PartialState
from test_multi_label import multi_rows, multi_trainer
from test_token_labels import encoded_rows, trainer_of
from test_trainer import losses


def main(path: str, batch: int, kind: str) -> None:
    """Batches of rows with different numbers of labels, and shares of several lengths; ``kind``: tokens or rows."""
    settings = dict(per_device_train_batch_size=batch, max_steps=4, learning_rate=1e-3, max_grad_norm=0.0)
    if kind == "tokens":
        trainer, test = trainer_of(path, encoded_rows(27, 1), encoded_rows(32, 2), **settings), encoded_rows(61, 5)
    else:
        trainer, test = multi_trainer(path, missing=0.5, **settings), multi_rows(61, 5, missing=0.5)
    trainer.train()
    margins = trainer.measurements.forget_margins()
    report = trainer.audit(test, bias_column="source")
    if trainer.is_world_process_zero():
        found = {
            "world": trainer.args.world_size,
            "losses": losses(trainer),
            "margins": sorted(margins.tolist()),
            "z": trainer.statistics["pattern_z"],
            "auc": report.metrics["membership"]["model"]["auc"]["value"],
            "accuracy": report.metrics["test"]["model"]["accuracy"]["value"],
        }
        with open(f"{path}.json", "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    gc.collect()
    PartialState().destroy_process_group()
