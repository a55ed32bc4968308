"""Writing whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

STAGING = "_unfinished"  # no name in `_` is ever uploaded


@contextmanager
def atomic_directory(folder: str) -> Iterator[str]:
    """A folder to write to, whose entries take their places in ``folder`` when the block ends; after an error none of them does."""
    unfinished = os.path.join(folder, STAGING)
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        yield unfinished
        for name in os.listdir(unfinished):
            target = os.path.join(folder, name)
            if os.path.isdir(target):
                shutil.rmtree(target)
            os.replace(os.path.join(unfinished, name), target)
    except SafetensorError as error:
        raise OSError(
            f"{folder} could not be written ({error}); what was there before is whole. Free space and try again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(content: dict, path: str) -> None:
    """Write whole or not at all; NaN and infinities become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
    os.replace(temporary, path)


class AtomicCheckpoints(Trainer):
    """Trainer whose checkpoints are written whole or not at all."""

    _staging = False  # while a checkpoint is being written

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's, in a folder of its own that takes the checkpoint's name once all is written: whole or not at all."""
        run_folder, step = self._get_output_dir(trial), self.state.global_step
        unfinished, name = os.path.join(run_folder, STAGING), f"{PREFIX_CHECKPOINT_DIR}-{step}"
        written, final = os.path.join(unfinished, name), os.path.join(run_folder, name)
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            best = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == final or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(written, final)
            os.rmdir(unfinished)
            rotate_checkpoints(
                run_folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder
