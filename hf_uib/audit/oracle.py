"""The retrained model: the same architecture trained without the forget set, made once for the same data and settings."""

import copy
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import IntervalStrategy, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from ..data.columns import Columns
from ..data.fingerprints import fingerprint
from ..data.labels import model_names, name_classes, several_labels
from ..data.reading import check_inputs
from ..data.streams import StreamFolder
from ..inference import collator_of, reader_of
from ..models import Name, load_classifier, name_of
from ..processes import processes
from ..provenance import merged_copy
from ..quantised import dequantised
from ..unlearning_task import MultiLabel

# Beginnings of the settings that leave the weights as they are
_WITHOUT_EFFECT = (
    "output_dir", "run_name", "project", "trackio", "report_to", "log", "disable_tqdm", "do_", "eval", "per_device_eval",
    "batch_eval", "save", "enable_jit_checkpoint", "restore_callback_states", "hub", "push_to_hub", "load_best", "metric_for_best",
    "greater_is_better", "prediction_loss", "include", "dataloader_num_workers", "dataloader_pin", "dataloader_persistent",
    "dataloader_prefetch", "remove_unused", "ddp", "local_rank", "skip_memory",
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
        args: as the original was trained with. What they say of evaluating, saving and pushing is left out.
        processing_class: image processor or tokenizer.
        cache_dir: keeps the result under the fingerprint of data, weights, processor and settings; the next call returns it.
        from_scratch: draw all weights anew with ``args.seed`` first.
        columns: names of columns that are not the usual ones.

    Returns:
        The trained model, in eval mode. If nobody named its classes it has the names that the data give them.
    """
    model = name_of(model)
    trained: Any = load_classifier(model) if isinstance(model, str) else copy.deepcopy(model)
    trained = merged_copy(trained) if isinstance(trained, PeftModel) else dequantised(trained)
    if from_scratch:
        set_seed(args.seed)
        trained = type(trained)(trained.config)
    read = reader_of(trained, processing_class, columns)
    streams = StreamFolder()  # on disk until the model is trained
    stored = streams.stored(retain_dataset, "retain_dataset")
    name_classes(trained.config, stored, columns)
    rows = read(stored, "retain_dataset")
    check_inputs("retain_dataset", rows, read)
    folder = None
    if cache_dir is not None:
        folder = os.path.join(cache_dir, f"retrained-{_key(trained, rows, args, processing_class, columns)}")
        if os.path.isfile(os.path.join(folder, "config.json")):
            return load_classifier(folder).eval()
    args = copy.copy(args)
    args.remove_unused_columns, args.push_to_hub, args.load_best_model_at_end = False, False, False
    args.save_strategy, args.eval_strategy, args.eval_on_start = SaveStrategy.NO, IntervalStrategy.NO, False
    collator = collator_of(trained, processing_class)
    kind = _SeveralLabelsTrainer if several_labels(trained.config) else Trainer
    kind(model=trained, args=args, train_dataset=rows, data_collator=collator).train()
    if folder is not None:
        if processes().is_main_process:
            temporary = f"{folder}.{os.getpid()}"
            trained.save_pretrained(temporary)
            os.replace(temporary, folder)
        processes().wait_for_everyone()
    return trained.eval()


class _SeveralLabelsTrainer(Trainer):
    """Fits the labels that are given: a model's own loss would take -1 for one."""

    def __init__(self, **given):
        super().__init__(**given)
        self.model_accepts_loss_kwargs = False  # a step is the mean of its batches' means

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = MultiLabel().fit_loss(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def _key(model: Any, rows: Any, args: TrainingArguments, processing_class: Any, columns: Columns) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(fingerprint(rows).encode())
    settings = {name: str(v) for name, v in args.to_dict().items() if not name.startswith(_WITHOUT_EFFECT)}
    settings |= {"processes": str(args.world_size * args.n_gpu), "columns": repr(columns)}
    digest.update(json.dumps([settings, model_names(model.config)], sort_keys=True).encode())
    if hasattr(processing_class, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            processing_class.save_pretrained(folder)
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
