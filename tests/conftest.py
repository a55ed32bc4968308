"""Small real models and data, built from configs: no network, no shared folder."""

import copy
import os
from dataclasses import replace
from functools import lru_cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start too: one of their workers per core

import accelerate.utils.memory
import datasets
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig

from hf_uib.cli import demo, digits

torch.set_num_threads(1)
datasets.disable_progress_bars()

decode = datasets.Image.decode_example


@lru_cache(20_000)
def decoded(content: bytes, mode: str | None):
    return decode(datasets.Image(mode), {"bytes": content, "path": None})


def decoded_once(self, value, token_per_repo_id=None):
    """Small pictures are decoded once: a sixth of what tests that train on them take."""
    content = value.get("bytes") if isinstance(value, dict) and self.decode else None
    if content is None or len(content) > 2000:
        return decode(self, value, token_per_repo_id)
    return decoded(content, self.mode).copy()


datasets.Image.decode_example = decoded_once


empty_cache = accelerate.utils.memory.clear_device_cache
# Every training has garbage collected when it begins: among all that is imported here a tenth of the tests' time
accelerate.utils.memory.clear_device_cache = lambda garbage_collection=False: empty_cache()


IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 1}
ARCHITECTURES = {
    "vit": IMAGE | SMALL,
    "deit": IMAGE | SMALL,
    "dinov2": IMAGE | SMALL | {"mlp_ratio": 2},
    # Linear layers on [n, h, w, c], and on tables that all examples share
    "convnext": IMAGE | {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "swinv2": IMAGE | {"patch_size": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "deberta-v2": TEXT | SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "bert": TEXT | SMALL,
    "roberta": TEXT | SMALL,
    "electra": TEXT | SMALL | {"embedding_size": 12},
    "albert": TEXT | SMALL | {"embedding_size": 12},
    "distilbert": {
        "vocab_size": 60,
        "max_position_embeddings": 40,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
    },
}


def make_model(architecture: str = "vit", num_labels: int = 3, seed: int = 0, **settings):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture, **(ARCHITECTURES[architecture] | {"num_labels": num_labels} | settings)
    )
    kind = "Image" if "image_size" in ARCHITECTURES[architecture] else "Sequence"
    names = {
        "vit": "ViT",
        "deit": "DeiT",
        "convnext": "ConvNext",
        "deberta-v2": "DebertaV2",
        "distilbert": "DistilBert",
    }
    prefix = names.get(architecture, architecture.title())
    model = getattr(transformers, f"{prefix}For{kind}Classification")(config)
    for parameter in model.parameters():  # far from init, so that layers matter
        if parameter.ndim == 2:
            parameter.data.mul_(4.0)
    return model


def make_rows(architecture: str = "vit", n: int = 24, num_labels: int = 3, seed: int = 0) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    columns = {"labels": rng.integers(0, num_labels, n).tolist(), "source": rng.integers(0, 2, n).tolist()}
    if "image_size" in ARCHITECTURES[architecture]:
        columns["pixel_values"] = rng.normal(size=(n, 1, 8, 8)).astype("float32").tolist()
    else:
        columns["input_ids"] = rng.integers(2, 60, (n, 10)).tolist()
        columns["attention_mask"] = np.ones((n, 10), int).tolist()
    return datasets.Dataset.from_dict(columns).with_format("torch")


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def forget():
    return make_rows(n=24, seed=1)


@pytest.fixture
def retain():
    return make_rows(n=16, seed=2)


@pytest.fixture(scope="session")
def digits_models(tmp_path_factory):
    """The demo's task, and its two models, trained for half as long; tests that use them are of the group ``digits``."""
    task = digits.digits_colour()
    task.train_settings |= {"pretrain_steps": 250, "steps": 200, "retrain_steps": 200}
    return task, digits.prepare_models(task, 0, str(tmp_path_factory.mktemp("digits")))


@pytest.fixture
def prepared_digits(digits_models, monkeypatch):
    """Whoever asks for the demo's task and models gets those."""
    task, models = digits_models
    for module in (digits, demo):
        monkeypatch.setattr(
            module, "digits_colour", lambda *_, **__: replace(task, train_settings=dict(task.train_settings))
        )
        monkeypatch.setattr(module, "prepare_models", lambda *_: copy.deepcopy(models))
