"""What a checkpoint holds beside the adapter, and whether a run may be resumed from it."""

import json
import os
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .serialization import dumps, plain

STATE_NAME = "uib_state.safetensors"
# Settings that a resumed run shares with the one it goes on with
SHARED_SETTINGS = (
    "seed", "data_seed", "subspace_rank", "prior_subspace", "trainable_factors", "posterior", "noise_to_signal",
    "swap_fraction", "beta", "prior_strength", "prior_fraction", "prior_update_steps", "forget_target", "forget_batch_size",
    "calibration_fraction", "contrast_samples", "channel_settings", "influence_settings",
)  # fmt: skip


@dataclass
class UIBState:
    """Prior and posterior of a run, as `STATE_NAME` holds them.

    Attributes:
        posterior: `ChannelPosterior.state_dict`.
        prior: `Prior.state_dict`.
        masks: of the prior, by weight.
        statistics: `UIBTrainer.statistics`.
        contrast_norms: ``|C_l|`` by layer.
        identity: what the run belongs to: fingerprints of the forget set and the base weights, settings, the request's record.
    """

    posterior: dict[str, Tensor]
    prior: dict[str, Tensor]
    masks: dict[str, Tensor]
    statistics: dict[str, float]
    contrast_norms: dict[str, float]
    identity: dict = field(default_factory=dict)

    def save(self, folder: str) -> None:
        """Write `STATE_NAME` to a folder."""
        numbers = {"statistics": self.statistics, "contrast_norms": self.contrast_norms}
        parts: dict[str, dict[str, Tensor]] = {"posterior": self.posterior, "prior": self.prior, "masks": self.masks}
        parts |= {
            part: {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
            for part, values in numbers.items()
        }
        tensors = {
            f"{part}.{name}": value.detach().cpu().contiguous().clone()
            for part, values in parts.items()
            for name, value in values.items()
        }
        # One entry: safetensors writes several in any order
        save_file(tensors, os.path.join(folder, STATE_NAME), metadata={"uib": dumps(_with_names(self.identity))})

    @classmethod
    def load(cls, folder: str, device: torch.device | str = "cpu") -> "UIBState":
        """Read `STATE_NAME` of a folder.

        Raises:
            ValueError: it is not there, or of an edition that cannot be resumed.
        """
        path = os.path.join(folder, STATE_NAME)
        if not os.path.isfile(path):
            raise ValueError(f"{folder} has no {STATE_NAME}; resume from a checkpoint that UIBTrainer wrote.")
        with safe_open(path, "pt") as file:
            identity = json.loads(file.metadata()["uib"])
        # Cloned: a mapped file's tensors lie where its header ends, and vector units round by where they lie.
        # What is wide is counted on the CPU, and some devices have no such numbers (MPS).
        tensors = {
            name: value.clone() if value.dtype == torch.float64 else value.clone().to(device)
            for name, value in load_file(path).items()
        }
        if "posterior.noise_to_signal" not in tensors:
            raise ValueError(f"{folder} was written by hf_uib 0.1, whose runs cannot be resumed; start the run again.")

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}

        def numbers(name: str) -> dict[str, float]:
            return {key: value.item() for key, value in part(name).items()}

        return cls(
            part("posterior"),
            part("prior"),
            {name: mask.bool() for name, mask in part("masks").items()},
            numbers("statistics"),
            numbers("contrast_norms"),
            identity,
        )

    def check(self, folder: str, identity: dict) -> None:
        """Whether a run of this ``identity`` may go on from the state.

        Raises:
            ValueError: forget set, model or a setting differ.
        """
        for key, what in (("forget", "forget set"), ("base", "model")):
            if self.identity[key] != identity[key]:
                raise ValueError(f"{folder} belongs to another {what}; resume with the one it was started with.")
        now = _with_names(identity["settings"])
        for name, was in _with_names(self.identity["settings"]).items():
            if now.get(name) != was:
                raise ValueError(
                    f"{folder} was made with {name} {was}, not {now.get(name)}; resume with the settings it was started with."
                )


def identity_of(folder: str) -> dict:
    """`UIBState.identity` of a folder; empty where `STATE_NAME` is not there."""
    path = os.path.join(folder, STATE_NAME)
    if not os.path.isfile(path):
        return {}
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("uib", "{}"))


def _with_names(value: dict) -> dict:
    """With words for infinities, which a setting may be and JSON has not."""
    return plain(value, not_finite=str)
