"""Writing whole or not at all."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .lora import adapter_name
from .models import BASE, adapter_weights, base_is_named
from .provenance import detached
from .serialization import dumps, plain
from .sharding import is_sharded
from .state import UIBState

if TYPE_CHECKING:
    from .config import UIBConfig

STAGING = "_unfinished"  # no name in `_` is ever uploaded


@contextmanager
def atomic_directory(folder: str, staging: str = STAGING) -> Iterator[str]:
    """A folder to write to, whose files take their places in ``folder`` when the block ends; after an error none of them does.

    What else lies in ``folder`` stays.
    """
    unfinished = os.path.join(folder, staging)
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        yield unfinished
        for name in files_in(unfinished):
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(os.path.join(unfinished, name), target)
    except SafetensorError as error:
        raise OSError(
            f"{folder} could not be written ({error}); what was there before is whole. Free space and try again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(content: dict, path: str, sort_keys: bool = False) -> None:
    """Write whole or not at all; NaN and infinities become null."""
    text = dumps(content, indent=2, sort_keys=sort_keys)
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
    os.replace(temporary, path)


def files_in(folder: str) -> list[str]:
    """Every file below a folder, as paths relative to it."""
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(os.path.relpath(path, folder) for path in found)


class AtomicCheckpoints(Trainer):
    """Trainer whose output folder and checkpoints are written whole or not at all.

    A folder holds the adapter, `UIBState` and the card; never the pickled arguments, which may hold a token.
    """

    args: "UIBConfig"
    model: PeftModel

    _staging = False  # while a checkpoint is being written
    _base_is_named: bool | None = None  # not known yet
    _base_folders: frozenset[str] = frozenset()  # that hold it
    base_name: str | None

    @cached_property
    def written(self) -> dict[str, list[str]]:
        """Relative paths of adapter, state, processor and card, by the folder that this trainer wrote them to."""
        return {}

    def create_model_card(self, *, folder: str | None = None, **settings) -> None:  # type: ignore[override]
        """Write the card to ``folder``."""
        raise NotImplementedError

    def state_to_save(self) -> UIBState | None:
        """What is written beside the adapter, if anything."""
        raise NotImplementedError

    def set_trainable(self) -> None:
        """Set which weights are trained; loading an adapter sets all of its free."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer. Every process calls it, and helps to gather a sharded base that has to be written."""
        if is_sharded(self.model):
            self._save_base(str(output_dir if output_dir is not None else self.args.output_dir))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        target = str(output_dir if output_dir is not None else self.args.output_dir)
        self._save_base(target)
        with atomic_directory(target) as folder:
            super()._save(folder, state_dict)
            for name in (TRAINING_ARGS_NAME, "README.md"):  # PEFT's card: ours needs the run's figures beside it
                if os.path.isfile(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
            if (state := self.state_to_save()) is not None:
                state.save(folder)
            names = files_in(folder)
        self.written[os.path.abspath(target)] = [*names, "README.md"]
        self.create_model_card(folder=target)

    def _save_base(self, target: str) -> None:
        """Write the model below the adapter of folder ``target`` to ``base`` in or beside it, once, where no name leads to it.

        The adapter's config then names no base, unless the named checkpoint is not here to be compared.
        """
        self.check_base_name()
        # Beside a checkpoint, which is written to run/_unfinished/checkpoint-N
        folder = os.path.dirname(os.path.dirname(target)) if self._staging else target
        if self._base_is_named or folder in self._base_folders:
            return
        base = detached(self.accelerator.unwrap_model(self.model))
        if self.args.should_save:
            with atomic_directory(folder, f"{STAGING}_{BASE}") as unfinished:
                base.save_pretrained(os.path.join(unfinished, BASE))
        self._base_folders |= {folder}

    def check_base_name(self) -> None:
        """Find out, once, whether the name of the model below the adapter leads to its weights, and take it off if it does not."""
        if self._base_is_named is not None:
            return
        model = self.accelerator.unwrap_model(self.model)
        adapter, base = model.peft_config[adapter_name(model)], cast(Any, model.get_base_model())
        same = base_is_named(model, adapter.base_model_name_or_path or getattr(base.config, "_name_or_path", None))
        if same is False:  # the name is that of what it was fine-tuned from
            adapter.base_model_name_or_path = self.base_name = None
            base.name_or_path = base.config._name_or_path = ""
        self._base_is_named = bool(same)

    def save_state(self) -> None:
        """As in Trainer; NaN becomes null."""
        if self.is_world_process_zero():
            self._write_state(str(self.args.output_dir))

    def _write_state(self, folder: str) -> None:
        write_json(dataclasses.asdict(self.state), os.path.join(folder, TRAINER_STATE_NAME), sort_keys=True)

    def save_metrics(self, split, metrics, combined=True) -> None:
        """As in Trainer; NaN becomes null."""
        super().save_metrics(split, plain(metrics), combined)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        name = adapter_name(self.accelerator.unwrap_model(self.model))
        adapter_weights(resume_from_checkpoint, **({} if name == "default" else {"subfolder": name}))
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.set_trainable()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.set_trainable()

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
            self._write_state(written)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(written, final)
            self.written[os.path.abspath(final)] = self.written.pop(os.path.abspath(written))
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
