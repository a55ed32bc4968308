"""A classifier as an ONNX file: written and compared with PyTorch's, and read for the audit. Needs the extra `onnx`."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import CONFIG_NAME

from . import __version__
from .checkpointing import STAGING, write_json
from .data.labels import several_labels
from .inference import predict
from .models import Name, first_line, forward_columns, input_kind, labels_tokens, name_of, num_labels_of

MODEL, INT8, EXPORT = "model.onnx", "model_int8.onnx", "export.json"  # files of an export's folder
TOLERANCE = 1e-3  # of a logit
BATCHES = ((1, 2), (2, 9), (3, 17), (5, 32))  # rows and tokens of the synthetic batches that are compared
TOO_LARGE = 1_500_000_000  # bytes of weights; an ONNX file itself holds less than 2 GB
LEAST_SECONDS = 1.0  # of a synthetic sound


def is_onnx(name: Any) -> bool:
    """Whether a name is that of an ONNX file."""
    given = name_of(name)
    return isinstance(given, str) and given.endswith(".onnx")


def folder_of(name: Name) -> str:
    """Where config and processor of a model lie: the folder of an ONNX file, else the name itself."""
    given: str = name_of(name)
    return os.path.dirname(given) or "." if is_onnx(given) else given


def _runtime() -> Any:
    """onnxruntime.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'{error.name} is not installed; pip install "onnx>=1.23" "onnxruntime>=1.32" "onnxscript>=0.7".'
        ) from None
    return onnxruntime


class ExportedClassifier(nn.Module):
    """An ONNX file as a classifier that has logits alone: no weights, no features. Runs on the CPU.

    Args:
        path: of the file; ``config.json`` lies beside it.

    Attributes:
        config: of the checkpoint that was exported.
        columns: what the file takes, in its order; main_input_name: the first of them.

    Raises:
        ValueError: there is no such file or no config beside it, or the file is no classifier that onnxruntime can read.
    """

    def __init__(self, path: Name):
        super().__init__()
        runtime, self.path = _runtime(), str(name_of(path))
        if not os.path.isfile(self.path):
            raise ValueError(f"There is no file {self.path}; `hf-uib export FOLDER --onnx OUT` writes OUT/{MODEL}.")
        folder = folder_of(self.path)
        if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            raise ValueError(f"{folder} has no {CONFIG_NAME} beside the ONNX file; copy that of the checkpoint there.")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # whatever onnxruntime says of a file
            raise ValueError(f"{self.path} cannot be read by onnxruntime ({first_line(error)}).") from error
        if [output.name for output in self.session.get_outputs()] != ["logits"]:
            raise ValueError(f"{self.path} does not give logits alone; export it with `hf-uib export`.")
        self.config = AutoConfig.from_pretrained(folder)
        self.columns = tuple(given.name for given in self.session.get_inputs())
        self.main_input_name = self.columns[0]

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """``logits`` in float32: ``[n, classes]``. Masks and types of tokens that are not given are those that models take then.

        Raises:
            ValueError: an input of the file is missing.
        """
        if "input_ids" in inputs:
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        if missing := [name for name in self.columns if name not in inputs]:
            raise ValueError(f"{self.path} takes {', '.join(self.columns)}; {missing[0]} is missing.")
        given = {name: inputs[name].detach().cpu().numpy() for name in self.columns}
        (logits,) = self.session.run(["logits"], given)
        return SequenceClassifierOutput(logits=torch.from_numpy(logits).float())


# ---- Rows to trace with, and to compare on ----


def synthetic_inputs(model: Any, processing_class: Any, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random rows as the model takes them: tokens of which some are padding, or noise through the processor.

    Args:
        length: of texts, in tokens; of sounds, in quarters of a second beyond the first.

    Raises:
        ValueError: the processor does not take what was made for it.
    """
    random, kind = np.random.default_rng([seed, rows, length]), input_kind(model)
    if kind == "text":
        return _tokens(model, processing_class, rows, length, random)
    try:
        if kind == "audio":
            rate = processing_class.sampling_rate
            sounds = [random.normal(size=int(rate * (LEAST_SECONDS + length / 4))) for _ in range(rows)]
            made = processing_class(sounds, sampling_rate=rate, return_tensors="pt", padding=True)
            return {name: made[name] for name in made if name in forward_columns(model)}
        frames = getattr(model.config, "num_frames", 1)
        pictures = [[_noise(model, processing_class, random) for _ in range(frames)] for _ in range(rows)]
        given = pictures if kind == "video" else [many[0] for many in pictures]
        made = processing_class(given, return_tensors="pt")
        return {name: made[name] for name in made if name in forward_columns(model)}
    except Exception as error:  # whatever a processor says of noise
        raise ValueError(f"The processor does not take what was made for it ({first_line(error)}).") from error


def _tokens(model: Any, tokenizer: Any, rows: int, length: int, random: np.random.Generator) -> dict[str, Tensor]:
    longest = getattr(model.config, "max_position_embeddings", None) or length
    shape = (rows, max(2, min(length, longest - 4)))
    inputs = {"input_ids": random.integers(0, model.config.vocab_size, shape), "attention_mask": np.ones(shape, int)}
    for row in range(1, rows):  # the first is as long as the batch
        end = int(random.integers(1, shape[1]))
        inputs["input_ids"][row, end:] = model.config.pad_token_id or 0
        inputs["attention_mask"][row, end:] = 0
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = np.zeros(shape, int)
    taken = [name for name in tokenizer.model_input_names if name in inputs and name in forward_columns(model)]
    return {name: torch.from_numpy(inputs[name]) for name in taken}


def _noise(model: Any, processor: Any, random: np.random.Generator) -> Image.Image:
    """A picture of the size that the model takes."""
    config = getattr(model.config, "vision_config", model.config)  # CLIP's and SigLIP's
    size = getattr(config, "image_size", None) or max(dict(processor.size or {}).values(), default=224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = () if getattr(config, "num_channels", 3) == 1 else (3,)
    return Image.fromarray(random.integers(0, 256, (height, width, *channels), dtype=np.uint8))


# ---- Writing ----


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, columns: tuple[str, ...]):
        super().__init__()
        self.model, self.columns = model, columns

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.columns, tensors, strict=True))).logits


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantiser tell of packages that are not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_onnx(model: Any, inputs: dict[str, Tensor], path: str) -> None:
    """Trace the model with any number of rows and, of tokens and waveforms, any length.

    Raises:
        ValueError: torch's exporter cannot.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    columns = tuple(inputs)
    sizes = {0: torch.export.Dim("batch")}
    if all(tensor.ndim == 2 for tensor in inputs.values()):
        sizes[1] = torch.export.Dim("sequence")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                _Logits(model, columns).eval(),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(tuple(dict(sizes) for _ in columns),),
                input_names=list(columns),
                output_names=["logits"],
                verbose=False,
            )
            ClearMetadataAndDocStringPass()(program.model)  # where each step stands on this machine
            program.save(path, external_data=weights > TOO_LARGE)
    except Exception as error:  # whatever the exporter meets in a model
        raise ValueError(
            f"torch cannot export {type(model).__name__} to ONNX ({type(error).__name__}: {first_line(error)})."
        ) from error


def _write_int8(source: str, path: str) -> None:
    """Weights of matrix products and tables in 8 bits, one scale a channel, and activations in 8 bits as they come.

    Convolutions stay: ONNX Runtime has no kernel for them on the CPU. Weights use 7 of the 8 bits, as sums would overflow on CPUs
    without VNNI, and the file say something else there.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul", "Gemm", "Gather"], weight_type=QuantType.QInt8, per_channel=True,
            reduce_range=True, use_external_data_format=os.path.exists(f"{source}.data"),
        )  # fmt: skip


def _files_of_export(folder: str) -> set[str]:
    """Names of what an earlier export wrote to a folder; none where there was none."""
    try:
        with open(os.path.join(folder, EXPORT), encoding="utf-8") as file:
            return set(json.load(file)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _size(path: str) -> int:
    """Bytes of an ONNX file, and of the weights beside it."""
    return sum(os.path.getsize(name) for name in (path, f"{path}.data") if os.path.isfile(name))


def _differences(model: Any, first: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of two arrays of logits ``[n, classes]``: the largest, the largest logit, and how many rows are answered differently."""
    answers = [logits > 0 if several_labels(model.config) else logits.argmax(-1)[:, None] for logits in (first, other)]
    return {
        "rows": len(first),
        "largest_difference": float(np.abs(first - other).max()),
        "largest_logit": float(np.abs(first).max()),
        "predictions_that_differ": int((answers[0] != answers[1]).any(-1).sum()),
    }


@torch.no_grad()
def compare(model: Any, exported: ExportedClassifier, processing_class: Any, rows: Any = None) -> dict[str, dict]:
    """How far the logits of an exported file are from the model's: on synthetic batches of several sizes and lengths, and on rows.

    Args:
        rows: encoded ones; None: synthetic ones alone.
    """
    pairs = []
    for size in BATCHES:
        inputs = synthetic_inputs(model, processing_class, *size, seed=1)
        pairs.append([m(**inputs).logits.float().numpy() for m in (model, exported)])
    first, other = (np.concatenate(part) for part in zip(*pairs, strict=True))
    found = {"synthetic rows": _differences(model, first, other)}
    if rows is not None:
        first, other = (predict(m, rows, processing_class, quiet=True)[0] for m in (model, exported))
        found["rows"] = _differences(model, first, other)
    return found


def export_onnx(
    model: Any,
    processing_class: Any,
    folder: Name,
    *,
    rows: Any = None,
    int8: bool = False,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Write a plain classifier (no adapter on it) as ONNX, with config and processor beside it, completely or not at all.

    ``model.onnx`` takes any number of rows and, of tokens and waveforms, any length. An earlier export in ``folder`` is replaced.

    Args:
        model: in float32 on the CPU.
        processing_class: image processor, feature extractor or tokenizer.
        folder: new, empty, or an earlier export.
        rows: encoded rows to compare logits on, besides synthetic ones.
        int8: also write ``model_int8.onnx``, by ONNX Runtime's dynamic quantiser. Its logits are compared, not held to
            ``tolerance``.
        tolerance: the largest difference of a logit of ``model.onnx``.

    Returns:
        What ``export.json`` holds: versions, ``tolerance`` and, by file, ``bytes`` and the ``differences`` of `compare`.

    Raises:
        ValueError: a package is missing, the folder holds something else, torch cannot export the model, or its logits differ by
            more than ``tolerance``.
    """
    runtime, target = _runtime(), os.path.abspath(name_of(folder))
    if os.path.exists(target) and not os.path.isdir(target):
        raise ValueError(f"{target} is a file; give a folder.")
    if labels_tokens(model):
        raise ValueError(f"{type(model).__name__} labels tokens; an export takes models that label whole rows.")
    if os.path.isdir(target) and set(os.listdir(target)) - _files_of_export(target):
        raise ValueError(f"{target} holds something else than an export; give another folder.")
    unfinished = f"{target}{STAGING}"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
        model.eval().config.save_pretrained(unfinished)
        processing_class.save_pretrained(unfinished)
        _write_onnx(model, synthetic_inputs(model, processing_class, 3, 7), path := os.path.join(unfinished, MODEL))
        found = {MODEL: compare(model, ExportedClassifier(path), processing_class, rows)}
        worst = np.max([seen["largest_difference"] for seen in found[MODEL].values()])  # NaN if one is
        if not worst <= tolerance:
            raise ValueError(
                f"The logits of the ONNX file differ by up to {worst:.2g} from PyTorch's, more than the tolerance {tolerance:g}; "
                "nothing was written."
            )
        if int8:
            _write_int8(path, quantised := os.path.join(unfinished, INT8))
            found[INT8] = compare(model, ExportedClassifier(quantised), processing_class, rows)
        report = {"hf_uib": __version__, "torch": torch.__version__, "onnxruntime": runtime.__version__}
        report |= {"classes": num_labels_of(model), "tolerance": tolerance, "differences": found}
        report |= {"bytes": {name: _size(os.path.join(unfinished, name)) for name in found}}
        report |= {"files": sorted([*os.listdir(unfinished), EXPORT])}
        write_json(report, os.path.join(unfinished, EXPORT))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report
