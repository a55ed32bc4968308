"""The retrained model: the same architecture trained without the forget set, made once for the same data and settings."""

import copy
import hashlib
import json
import os
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from ..data.columns import Columns
from ..data.fingerprints import fingerprint
from ..data.reading import check_inputs
from ..data.streams import StreamFolder
from ..inference import collator_of, reader_of
from ..models import Name, load_classifier, name_of
from ..processes import processes
from ..provenance import merged_copy
from ..quantised import dequantised

_MATTERS = (
    "seed", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
    "weight_decay", "warmup_steps", "lr_scheduler_type", "optim", "label_smoothing_factor", "bf16", "fp16",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "data_seed",
)  # fmt: skip


def retrain(
    model: Name | nn.Module,
    retain_dataset: Any,
    args: TrainingArguments,
    processing_class: Any = None,
    cache_dir: str | None = None,
    from_scratch: bool = False,
    columns: Columns = Columns(),  # noqa: B008
) -> nn.Module:
    """Train a copy of ``model`` on the retained data (or on data balanced in the bias attribute) with the user's arguments.

    Args:
        model: where the original's training began: the pre-trained checkpoint, not the one to unlearn.
        retain_dataset: raw or encoded rows with labels, without any of the forget set.
        args: as the original was trained with.
        processing_class: image processor or tokenizer.
        cache_dir: keeps the result under the fingerprint of data, weights and settings; the next call returns it.
        from_scratch: draw all weights anew with ``args.seed`` first.
        columns: names of columns that are not the usual ones.

    Returns:
        The trained model, in eval mode.
    """
    model = name_of(model)
    trained: Any = load_classifier(model) if isinstance(model, str) else copy.deepcopy(model)
    trained = merged_copy(trained) if isinstance(trained, PeftModel) else dequantised(trained)
    if from_scratch:
        set_seed(args.seed)
        trained = type(trained)(trained.config)
    read = reader_of(trained, processing_class, columns)
    streams = StreamFolder()  # on disk until the model is trained
    rows = read(streams.stored(retain_dataset, "retain_dataset"), "retain_dataset")
    check_inputs("retain_dataset", rows, read)
    folder = None
    if cache_dir is not None:
        folder = os.path.join(cache_dir, f"retrained-{_key(trained, rows, args)}")
        if os.path.isfile(os.path.join(folder, "config.json")):
            return load_classifier(folder).eval()
    args = copy.copy(args)
    args.remove_unused_columns, args.save_strategy, args.push_to_hub = False, "no", False
    collator = collator_of(trained, processing_class)
    Trainer(model=trained, args=args, train_dataset=rows, data_collator=collator).train()
    if folder is not None:
        if processes().is_main_process:
            temporary = f"{folder}.{os.getpid()}"
            trained.save_pretrained(temporary)
            os.replace(temporary, folder)
        processes().wait_for_everyone()
    return trained.eval()


def _key(model: nn.Module, rows: Any, args: TrainingArguments) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(fingerprint(rows).encode())
    digest.update(json.dumps({name: str(getattr(args, name)) for name in _MATTERS}).encode())
    return digest.hexdigest()
