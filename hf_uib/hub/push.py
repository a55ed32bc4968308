"""What goes up to the Hub: copies of the files that hf_uib wrote, without paths of this machine. Nothing else of a folder does."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future

from huggingface_hub import HfApi
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME

from ..checkpointing import write_json
from ..provenance import STATE_NAME
from ..serialization import is_marked
from .card import FIGURES, hub_id

MERGED = "merged"  # folder of the merged model, in the output folder
REPORTS = ("report.json", "audit.json")
# What an adapter's repository holds, and that is gone where a merged model is pushed
ADAPTER_PATTERNS = ["*adapter_*", STATE_NAME, f"{PREFIX_CHECKPOINT_DIR}-*", "last-checkpoint/*"]


def published(folder: str, written: Iterable[str]) -> list[str]:
    """Every file of a folder that goes up, as a path relative to it; the one place where that is decided.

    Args:
        written: what `_save` or `save_merged` wrote there: adapter or model, processor, state and card, whatever their names.
            Figures and reports, which others write too, are told by the mark that hf_uib leaves in them.
    """
    marked = (name for name in (*FIGURES, *REPORTS) if is_marked(os.path.join(folder, name)))
    return [name for name in dict.fromkeys((*written, *marked)) if os.path.isfile(os.path.join(folder, name))]


def upload_files(api: HfApi, folder: str, files: Iterable[str], **settings) -> Future:
    """Upload copies of some files of ``folder`` in the background: what is written or deleted meanwhile changes nothing.

    Args:
        api: one for all uploads of a run; its background uploads go one after the other.
        files: relative paths; `published` says which.
        settings: of `HfApi.upload_folder`.
    """
    copies = tempfile.TemporaryDirectory(prefix="hf_uib_")  # goes with the interpreter at the latest
    try:
        for name in files:
            target = os.path.join(copies.name, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copy(os.path.join(folder, name), target)
        _drop_paths(copies.name)
        job = api.upload_folder(folder_path=copies.name, run_as_future=True, **settings)
    except BaseException:
        copies.cleanup()
        raise
    job.add_done_callback(lambda _: copies.cleanup())
    return job


def _drop_paths(folder: str) -> None:
    """Take paths of this machine out of the JSON files of a copy."""
    for place, _, names in os.walk(folder):
        for name, key, public in (
            (ADAPTER_CONFIG_NAME, "base_model_name_or_path", hub_id),
            (TRAINER_STATE_NAME, "best_model_checkpoint", lambda path: path and os.path.basename(path)),
        ):
            if name in names:
                path = os.path.join(place, name)
                with open(path, encoding="utf-8") as file:
                    content = json.load(file)
                content[key] = public(content[key])
                write_json(content, path)
