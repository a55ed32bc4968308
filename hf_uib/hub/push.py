"""What goes up to the Hub: copies of folders, without paths of this machine."""

import json
import os
import shutil
import tempfile
from concurrent.futures import Future

from huggingface_hub import HfApi
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME

from ..models import BASE
from ..provenance import STATE_NAME
from .card import hub_id
from .deletion_report import REPORT_NAME

MERGED = "merged"  # folder of the merged model, in the output folder
# What an adapter's repository holds, and that is gone where a merged model is pushed
ADAPTER_PATTERNS = ["*adapter_*", STATE_NAME, f"{PREFIX_CHECKPOINT_DIR}-*", "last-checkpoint/*"]


def upload_copy(api: HfApi, folder: str, **settings) -> Future:
    """Upload a copy of ``folder`` in the background: what is written or deleted meanwhile changes nothing.

    Args:
        api: one for all uploads of a run; its background uploads go one after the other.
        settings: of `HfApi.upload_folder`.
    """
    copied = tempfile.mkdtemp()
    hidden = shutil.ignore_patterns("_*", f"{PREFIX_CHECKPOINT_DIR}-*", MERGED, BASE, TRAINING_ARGS_NAME, REPORT_NAME)
    shutil.copytree(folder, copied, ignore=hidden, dirs_exist_ok=True)
    _drop_paths(copied)
    job = api.upload_folder(folder_path=copied, run_as_future=True, **settings)
    job.add_done_callback(lambda _: shutil.rmtree(copied, ignore_errors=True))
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
                with open(path, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=2)
