"""Bases whose linear weights are codes: bitsandbytes' 4 and 8 bits, torchao's 8 bits.

They are read by de-quantising one layer at a time; the adapter above them is as ever.
"""

import copy
from collections.abc import Collection, Iterator
from typing import Any

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn


def holds_codes(module: Any) -> bool:
    """Whether a layer's weight is of bitsandbytes (4 or 8 bits) or torchao: codes, with what they are multiplied with."""
    weight = getattr(module, "_parameters", {}).get("weight")
    return type(weight).__name__ in ("Params4bit", "Int8Params") or type(weight).__module__.startswith("torchao.")


def is_quantised(model: nn.Module) -> bool:
    """Whether a layer of the model holds codes."""
    return any(holds_codes(module) for module in model.modules())


def quantisation_of(model: Any) -> str | None:
    """How the model's weights were quantised, in words for a card: ``bitsandbytes, 4-bit nf4``. None where they were not."""
    layer = next((module for module in model.modules() if holds_codes(module)), None)
    if layer is None:
        return None
    kind = type(layer.weight).__name__
    if kind == "Int8Params":
        return "bitsandbytes, 8-bit"
    if kind != "Params4bit":
        return f"torchao, {kind}"
    double = ", its scales quantised too" if layer.weight.compress_statistics else ""
    return f"bitsandbytes, 4-bit {layer.weight.quant_type}{double}"


def dense_weight(module: Any) -> Tensor:
    """The weight of a layer as numbers, de-quantised where it holds codes (then a new tensor).

    Raises:
        ValueError: see `keep_codes`.
    """
    weight = module.weight
    if not holds_codes(module):
        return weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    refuse_repacked(module)
    return dequantize_bnb_weight(weight, state=getattr(module, "state", None))


def keep_codes(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place when they are evaluated on a CPU with AVX512-BF16.

    It rounds their scales to bfloat16 and does not put all of them back in order; and where a layer's outputs are no multiple of 32
    it fails.
    """
    for module in list[Any](model.modules()):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refuse_repacked(module: Any) -> None:
    """Refuse 4-bit weights that bitsandbytes has repacked, see `keep_codes`.

    Raises:
        ValueError: with what to do.
    """
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked the model's 4-bit weights when it was evaluated on this CPU, and they cannot be read back: "
            "load it anew, and call hf_uib.quantised.keep_codes(model) before you evaluate it."
        )


def prepare_codes(model: nn.Module, whole_modules: Collection[str] = ()) -> None:
    """`keep_codes` for a model that is to be trained.

    Args:
        whole_modules: names of modules that an adapter trains whole (``modules_to_save``).

    Raises:
        ValueError: the codes were repacked, or one of these modules holds codes.
    """
    for name, module in model.named_modules():
        if holds_codes(module):
            refuse_repacked(module)
        if name.rpartition(".")[2] in whole_modules and any(map(holds_codes, module.modules())):
            raise ValueError(
                f"modules_to_save names {name}, whose weights are quantised and cannot be trained: leave it out (LoRA goes on it "
                "too), or load the model with it unquantised (llm_int8_skip_modules, modules_to_not_convert)."
            )
    keep_codes(model)


def dequantised(model: Any) -> Any:
    """The model itself where no layer holds codes, else a copy with plain linear layers in the dtype of its other weights."""
    if not is_quantised(model):
        return model
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if holds_codes(layer):
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                plain.weight = nn.Parameter(dense_weight(layer).detach().to(model.dtype))
                if layer.bias is not None:
                    plain.bias = nn.Parameter(layer.bias.detach().to(model.dtype))
                setattr(parent, name, plain.train(layer.training))
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model


def plain_tensors(tensor: Any) -> Iterator[Any]:
    """What a tensor is made of: itself, or of a torchao tensor its codes, scales and so on."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor.detach()
