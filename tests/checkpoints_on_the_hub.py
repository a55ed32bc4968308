"""Started by test_checkpoints.py: the checkpoints of its tables, by Hub id. ``FOLDER`` gets seen.json."""

import builtins
import json
import sys
import traceback
from pathlib import Path

import torch
from conftest import make_model, make_rows
from huggingface_hub import HfApi
from test_checkpoints import logits_of, own_code, saved_peft_classifier, trainer_on
from test_trainer import config

from hf_uib import UIBTrainer, audit_model
from hf_uib.models import load_classifier

FOLDER = Path(sys.argv[1])
API = HfApi()


def no_prompt(*words):
    raise AssertionError("a prompt")


def publish(folder, name: str) -> str:
    """A folder as a repository of the tester's."""
    API.create_repo(f"tester/{name}", exist_ok=True)
    API.upload_folder(repo_id=f"tester/{name}", folder_path=folder, ignore_patterns="README.md")
    return f"tester/{name}"


def message(name: str) -> str:
    """What a refusal says."""
    try:
        load_classifier(name)
    except ValueError as error:
        return str(error)
    return "loaded"


def main() -> dict:
    """Play everything."""
    builtins.input = no_prompt
    adapter, original, _ = saved_peft_classifier(FOLDER, "ViTModel")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = publish(FOLDER / "base-model", "vit-headless")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    original.get_base_model().config.save_pretrained(adapter)
    name = publish(adapter, "vit-classifier")
    model = load_classifier(name)
    seen = {
        "names": list(model.config.id2label.values()),
        "same": torch.equal(logits_of(model), logits_of(original)),
    }
    trainer = trainer_on(name, FOLDER / "out")
    trainer.train()
    trainer.save_model()
    seen["base beside"] = (FOLDER / "out" / "base").exists()
    seen["reloaded"] = torch.equal(logits_of(load_classifier(FOLDER / "out")), logits_of(trainer.model))
    report = audit_model(
        name, forget_dataset=make_rows(n=24, seed=1), test_dataset=make_rows(seed=4), reference_model=name
    )
    seen["audited"] = report.metrics["test"]["model"]["accuracy"]["value"]

    make_model().save_pretrained(FOLDER / "pickled")
    (FOLDER / "pickled" / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), FOLDER / "pickled" / "pytorch_model.bin")
    seen["pickled"] = message(publish(FOLDER / "pickled", "pickled"))
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    seen["pickled adapter"] = message(publish(adapter, "pickled-adapter"))
    own_code(FOLDER / "own")
    name = publish(FOLDER / "own", "own-code")
    seen["own code"] = message(name)
    seen["trusted"] = type(load_classifier(name, trust_remote_code=True)).__name__

    # A model without a name is pushed without its base, which still knows what was to be forgotten
    nameless = UIBTrainer(
        make_model(),
        config(FOLDER / "nameless", hub_model_id="tester/nameless"),
        make_rows(seed=1),
        make_rows(n=16, seed=2),
    )
    nameless.train()
    nameless.push_to_hub()
    seen["here"] = (FOLDER / "nameless" / "base" / "model.safetensors").exists()
    seen["there"] = [f for f in API.list_repo_files("tester/nameless") if f.startswith("base")]
    seen["nameless"] = message("tester/nameless")
    return seen


if __name__ == "__main__":
    try:
        found = main()
    except Exception:
        found = {"failed": traceback.format_exc()}
    (FOLDER / "seen.json").write_text(json.dumps(found))
