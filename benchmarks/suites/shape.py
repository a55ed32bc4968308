"""Peak memory of a classifier of a thousand million weights, by its shape: on paper, and measured on one and two of its layers."""

import json
import os
import sys

import datasets
import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForSequenceClassification, LlamaConfig

from hf_uib import UIBConfig, UIBTrainer, contrast, measurements
from hf_uib.lora import is_linear, weight_matrix
from hf_uib.models import blocks_of

from .. import results
from ..markdown import table
from . import runs
from .launch import json_of
from .memory import status

SHAPE = results.FOLDER / "shape.jsonl"
# That of Llama 3.2 1B
CONFIG = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256, pad_token_id=0
)  # fmt: skip
LAYERS = 16
CUTS = (1, 2)  # layers that are measured
WORDS = 1024  # of the vocabulary that is measured; the rest of the embeddings is added
ROWS, LENGTH, RANK = 4, 64, 16  # of a forward pass, and of a row; LoRA's r and the subspace's k
USUAL = (64, 512)  # rows and length of a run's forward pass, on paper alone
MB = 2**20


def run_shape(options) -> None:
    """Anew, each line in a process of its own. Linux: memory is read off /proc."""
    # Large tensors go back to the system as soon as they are freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    lines = []
    for layers in CUTS:
        for checkpointing in ("on", "off"):
            command = [sys.executable, "-m", __name__, str(layers), checkpointing, os.path.abspath(options.cache)]
            lines.append(json_of(command, environment))
    results.replace(SHAPE, lines)


def config_of(layers: int) -> LlamaConfig:
    """The shape with so many layers."""
    return LlamaConfig(**CONFIG, num_hidden_layers=layers, num_labels=2)


# ---- On paper ---------------------------------------------------------------------------------------------------


def predicted(layers: int, rows: int, length: int, checkpointing: bool, rank: int = RANK) -> dict[str, float]:
    """Peak memory in MB of the statistics pass and of a training step: a base in bf16, an adapter in float32 on every linear layer.

    What is held, in bytes: the weights (2 each); A and B and their gradients (4 each); then

    - in the statistics pass of each layer a contrast, a chunk and a direction ``[2 k + 8, d_in]`` and a sketch ``[2 k + 8, d_out]``
      (of layers with few outputs ``[d_out, d_in]`` and no sketch), in float32;
    - in a step Adam's two moments, the prior's A and B twice, A and B of the step in stacks, V_l twice ``[k, d_in]``, W V' twice,
      its moved and prior values, what the divergence keeps of both (4 matrices) ``[d_out, k]``, all in float32.

    Activations of a token: what enters each block (2 d); what autograd keeps inside a block (`kept_inside`), of one block under
    gradient checkpointing and of all without; and what one layer at work holds (its output in float32 three times, its input once).

    Args:
        rows, length: of a forward pass.
    """
    with init_empty_weights():
        model = AutoModelForSequenceClassification.from_config(config_of(layers))
    shapes = [tuple(weight_matrix(module).shape) for module in model.modules() if is_linear(module)]
    block = next(iter(blocks_of(model).values()), model.model.layers[0])
    inner = [tuple(weight_matrix(module).shape) for module in block.modules() if is_linear(module)]
    into, out = sum(d_in for _, d_in in shapes), sum(d_out for d_out, _ in shapes)
    weights = 2 * sum(weight.numel() for weight in model.parameters())
    adapter = 4 * rank * (into + out)
    sketched = sum(
        (2 * rank + 8) * (3 * d_in + d_out) if d_out > 4 * rank + 16 else 3 * d_out * d_in for d_out, d_in in shapes
    )
    tokens, config = rows * length, model.config
    at_work = max(4 * (3 * d_out + d_in) for d_out, d_in in inner)
    held = 1 if checkpointing else layers
    activations = tokens * (layers * 2 * config.hidden_size + held * kept_inside(config, inner, rank) + at_work)
    posterior = 4 * rank * (5 * into + 11 * out)  # A: prior twice, stacked; V_l twice. B: as A, and eight of W V'
    return {
        "weights": weights / MB,
        "statistics": (weights + 2 * adapter + 4 * sketched + activations) / MB,
        "step": (weights + 4 * adapter + posterior + activations) / MB,
    }


def kept_inside(config: LlamaConfig, inner: list[tuple[int, int]], rank: int) -> int:
    """Bytes of a token that autograd keeps of a block: the input of each layer in float32 and LoRA's code; of both norms the input
    in float32; q, k, v (k and v repeated) and the attention's output; the gate before and after, and what it is multiplied with."""
    lora = sum(4 * (d_in + rank) for _, d_in in inner)
    return lora + 2 * 4 * config.hidden_size + 4 * 2 * config.hidden_size + 3 * 2 * config.intermediate_size


# ---- Measured ---------------------------------------------------------------------------------------------------


def token_rows(count: int, seed: int) -> datasets.Dataset:
    """Random rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, WORDS, (count, LENGTH))
    columns = {"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()}
    return datasets.Dataset.from_dict(columns | {"labels": rng.integers(0, 2, count).tolist()}).with_format("torch")


def forget_peak() -> None:
    """Begin anew with the process's highest resident memory."""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")


def measure(layers: int, checkpointing: bool, folder: str) -> dict:
    """In a process of its own: the highest resident memory of the statistics pass and of two steps, less what was there."""
    sets = [token_rows(count, seed) for seed, count in enumerate((2 * ROWS, 2 * ROWS, ROWS))]
    before = status("VmRSS")
    config = config_of(layers)
    config.vocab_size = WORDS
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    args = UIBConfig(
        folder, max_steps=2, per_device_train_batch_size=ROWS // 2, per_device_eval_batch_size=1, subspace_rank=RANK,
        contrast_samples=2 * ROWS, gradient_checkpointing=checkpointing, prior_fraction=1.0, use_cpu=True, save_strategy="no",
        disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = UIBTrainer(model, args, *sets[:2], calibration_dataset=sets[2])
    line = {"layers": layers, "checkpointing": checkpointing, "held": status("VmRSS") - before}
    forget_peak()
    trainer.run_statistics_pass()
    line["statistics"] = status("VmHWM") - before
    trainer.run_statistics_pass = forget_peak  # a run begins with it
    trainer.train()
    return line | {"step": status("VmHWM") - before}


# ---- Tables -----------------------------------------------------------------------------------------------------


def shape_tables() -> list[str]:
    """For docs/scale.md."""
    lines = {(line["layers"], line["checkpointing"]): line for line in results.read(SHAPE)}
    if not lines:
        return []
    first, second = CUTS
    embeddings, found = 2 * (CONFIG["vocab_size"] - WORDS) * CONFIG["hidden_size"] / MB, []
    for what, title in (("statistics", "statistics pass"), ("step", "training step")):
        for on in (True, False):
            measured = [lines[layers, on][what] + embeddings for layers in CUTS]
            whole = measured[0] + (LAYERS - first) * (measured[1] - measured[0]) / (second - first)
            paper = [predicted(layers, ROWS, LENGTH, on)[what] for layers in (*CUTS, LAYERS)]
            pairs = [f"{seen:,.0f} ({said:,.0f})" for seen, said in zip((*measured, whole), paper, strict=True)]
            usual = predicted(LAYERS, *USUAL, on)[what]
            found.append([title, "on" if on else "off", *pairs, f"({usual:,.0f})"])
    weights = predicted(LAYERS, ROWS, LENGTH, True)["weights"]
    return [
        f"Of this version: memory by shape, "
        f"a Llama of {LAYERS} layers ({weights * MB / 2e9:.2f} thousand million weights, {weights:,.0f} MB in "
        f"bf16) with LoRA of rank {RANK} on every linear layer. MB, measured on a CPU with {' and '.join(map(str, CUTS))} of the "
        f"layers ({ROWS} rows of {LENGTH} tokens in a forward pass; the highest resident memory of a process of its own, less what "
        f"it had before the model, and {embeddings:,.0f} MB for the embeddings of the words left out), "
        f"extrapolated in a straight line to {LAYERS}; in brackets what `benchmarks/suites/shape.py` "
        "predicts on paper:\n",
        *table(
            [
                "",
                "gradient checkpointing",
                *(f"{n} layer{'s' * (n > 1)}" for n in CUTS),
                f"{LAYERS} layers, extrapolated",
                f"{LAYERS} layers, {USUAL[0]} rows of {USUAL[1]} tokens",
            ],
            found,
        ),
    ]


if __name__ == "__main__":
    runs.quiet()
    contrast.CHUNKS = measurements.CHUNKS = 2  # more of them take longer, and no more memory
    print(json.dumps(measure(int(sys.argv[1]), sys.argv[2] == "on", sys.argv[3])))
