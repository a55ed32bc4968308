"""What test_hub.py plays against its Hub: ``hub_client.py FOLDER STRANGER`` writes FOLDER/seen.json, one entry per scenario.

A process of its own, since ``HF_ENDPOINT`` counts when huggingface_hub is imported. STRANGER is another user's token.
"""

import json
import os
import sys
import traceback
from functools import cache, partial
from pathlib import Path

import torch
from conftest import make_model, make_rows
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, ModelCard, get_session, get_token, hf_hub_download, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
)

from hf_uib import UIBConfig, UIBTrainer, undo
from hf_uib.models import load_classifier

FOLDER, STRANGER = Path(sys.argv[1]), sys.argv[2]
BASE = "tester/vit-biased"
FORGET, RETAIN, CALIBRATION, TEST = (make_rows(n=n, seed=seed) for seed, n in enumerate((24, 16, 12, 20), start=1))
API = HfApi()
SECRET = b"a secret that must stay here"
LITTER = (
    "train.csv", "request.yaml", ".env", "runs/events.out.1", "deletion_report.html", "analysis.ipynb", "report.json", "audit.png",
    "model.safetensors", "config.json", "vocab.txt", "checkpoint-old/optimizer.pt", "merged/train.csv", "merged/bias.png",
    "last.pt", "training_args.bin", "_private.txt",
)  # fmt: skip
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


def trainer_for(name: str, model=BASE, **settings) -> UIBTrainer:
    """A trainer that pushes to tester/``name``."""
    litter(FOLDER / name)
    defaults = dict(
        max_steps=4, per_device_train_batch_size=4, subspace_rank=4, learning_rate=0.02, use_cpu=True, save_strategy="no",
        disable_tqdm=True, prior_update_steps=2, noise_to_signal=0.5, report_to="none", hub_model_id=f"tester/{name}",
    )  # fmt: skip
    return UIBTrainer(
        model,
        UIBConfig(str(FOLDER / name), **(defaults | settings)),
        FORGET,
        RETAIN,
        calibration_dataset=CALIBRATION,
        eval_dataset=TEST,
        processing_class=AutoImageProcessor.from_pretrained(BASE, backend="pil"),
    )


def litter(folder: Path) -> None:
    """What people also have in an output folder; each file holds `SECRET`."""
    for name in LITTER:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(SECRET)


def trained(name: str, **settings) -> UIBTrainer:
    trainer = trainer_for(name, **settings)
    trainer.train()
    return trainer


@cache
def shared() -> UIBTrainer:
    """Trained once, for every scenario that only pushes."""
    return trained("vit-uib")


class OddProcessor(ViTImageProcessorPil):
    """Saves files of names that nobody can guess."""

    def save_pretrained(self, folder, **kwargs):
        super().save_pretrained(folder, **kwargs)
        (Path(folder) / "odd").mkdir(exist_ok=True)
        for name in ("words.model", "odd/more.dat"):
            (Path(folder) / name).write_bytes(b"of the processor")


def on_the_way_to(name: str, hub_artifact: str = "adapter") -> UIBTrainer:
    """The shared trainer, as one that has not pushed yet."""
    trainer = shared()
    trainer.args.hub_model_id, trainer.args.hub_artifact = f"tester/{name}", hub_artifact
    trainer.hub_model_id, trainer.card_settings = None, {}
    return trainer


def apart(model, other) -> float:
    """Largest difference between two models' logits."""
    with torch.no_grad():
        logits = [m.eval()(pixel_values=TEST[:]["pixel_values"]).logits for m in (model, other)]
    return (logits[0] - logits[1]).abs().max().item()


def base():
    return AutoModelForImageClassification.from_pretrained(BASE)


def adapted(name: str, **kwargs):
    return PeftModel.from_pretrained(base(), f"tester/{name}", **kwargs)


def merged_model(name: str):
    return AutoModelForImageClassification.from_pretrained(f"tester/{name}")


def error_of(action) -> dict | None:
    """What an action raises, in the words that a user reads."""
    try:
        action()
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error)}
    return None


def next_goes_wrong(fault: str) -> None:
    get_session().post(f"{API.endpoint}/faults/{fault}").raise_for_status()


def card_of(name: str) -> dict:
    card = ModelCard.load(f"tester/{name}", ignore_metadata_errors=False)
    card.validate()
    return {"data": card.data.to_dict(), "text": card.text}


# ---- What is pushed -------------------------------------------------------------------------------------------------


def push() -> dict:
    """The base by id, train, push, and what a stranger does with the result."""
    trainer = on_the_way_to("vit-uib")
    trainer.request, trainer.dataset_name = "the pictures of clinic A", "tester/scans"
    trainer.results = {"original": {"accuracy": 0.5}, "UIB": {"accuracy": 0.625, "forget_accuracy": 0.25}}
    info = trainer.push_to_hub(license="apache-2.0", language="en", tags=["medical"])
    evaluated = ModelCard.load("tester/vit-uib").data.eval_results
    return card_of("vit-uib") | {
        "commit": info.oid,
        "results": [[r.dataset_split, r.metric_name, r.metric_value] for r in evaluated],
        "base_revision": API.model_info(BASE).sha,
        "changed": apart(trainer.model, base()),
        "peft": apart(trainer.model, adapted("vit-uib")),
        "auto": apart(trainer.model, AutoModelForImageClassification.from_pretrained("tester/vit-uib")),
        "processor": AutoImageProcessor.from_pretrained("tester/vit-uib", backend="pil").image_mean,
    }


def adapter_by_id() -> dict:
    """The library's own loader."""
    loaded = load_classifier("tester/vit-uib")
    trainable = any(parameter.requires_grad for parameter in loaded.parameters())
    return {"apart": apart(shared().model, loaded), "trainable": trainable}


def named_adapter() -> dict:
    """An adapter of another name, a processor of its own kind, and figures and reports of ours."""
    model = get_peft_model(
        base(), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"]), adapter_name="clinic"
    )
    trainer = trainer_for("vit-named", model=model)
    trainer.processing_class = OddProcessor(size={"height": 8, "width": 8})
    trainer.train()
    report = trainer.audit(TEST)
    report.to_json(str(FOLDER / "vit-named" / "audit.json"))
    report.plot(str(FOLDER / "vit-named"))
    trainer.args.hub_artifact = "both"
    trainer.push_to_hub()
    return {
        "apart": apart(trainer.model, PeftModel.from_pretrained(base(), "tester/vit-named", subfolder="clinic")),
        "left": sorted(str(path.relative_to(FOLDER / "vit-named")) for path in (FOLDER / "vit-named").rglob("*")),
    }


def push_twice() -> None:
    trainer = on_the_way_to("vit-twice")
    trainer.push_to_hub()
    trainer.push_to_hub()


def to_revision() -> dict:
    trainer = on_the_way_to("vit-revision")
    missing = error_of(lambda: trainer.push_to_hub(revision="v2"))
    API.create_branch("tester/vit-revision", branch="v2")
    trainer.push_to_hub(revision="v2")
    return {"missing": missing, "apart": apart(trainer.model, adapted("vit-revision", revision="v2"))}


def while_training(strategy: str) -> dict:
    trainer = trained(
        f"vit-{strategy}", push_to_hub=True, hub_strategy=strategy, save_strategy="steps", save_steps=2, hub_token=get_token(),
        eval_strategy="steps", eval_steps=2, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.save_model()
    return {"apart": apart(trainer.model, adapted(f"vit-{strategy}"))}


def resumed() -> dict:
    """A run goes on from a checkpoint that only the Hub has."""
    folder = snapshot_download("tester/vit-all_checkpoints", allow_patterns="checkpoint-2/*")
    checkpoint = os.path.join(folder, "checkpoint-2")
    trainer = trainer_for("vit-resumed")
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "apart": apart(trainer.model, adapted("vit-all_checkpoints")),
        "halfway": apart(trainer.model, PeftModel.from_pretrained(base(), checkpoint)),
    }


def order() -> dict:
    """The first checkpoint's upload is slow; the second one's must not be overtaken by it."""
    next_goes_wrong("slow_put")
    trained(
        "vit-order", push_to_hub=True, hub_strategy="checkpoint", save_strategy="steps", save_steps=2, hub_always_push=True
    )  # fmt: skip
    with open(hf_hub_download("tester/vit-order", "last-checkpoint/trainer_state.json")) as file:
        return {"step": json.load(file)["global_step"]}


def merged() -> dict:
    trainer = on_the_way_to("vit-merged", "merged")
    trainer.push_to_hub()
    loaded = merged_model("vit-merged")
    return card_of("vit-merged") | {
        "kind": type(loaded).__name__,
        "apart": apart(trainer.merge_and_unload(), loaded),
        "changed": apart(loaded, base()),
        "requests": loaded.config.unlearning,
        "processor": AutoImageProcessor.from_pretrained("tester/vit-merged", backend="pil").image_mean,
    }


def both() -> dict:
    trainer = on_the_way_to("vit-both", "both")
    trainer.push_to_hub(private=True)
    return card_of("vit-both-merged") | {
        "adapter": apart(trainer.model, adapted("vit-both")),
        "merged": apart(trainer.merge_and_unload(), merged_model("vit-both-merged")),
        "undone": apart(undo("tester/vit-both-merged", "tester/vit-both"), base()),
    }


def both_beside_private() -> None:
    """The adapter's repository was made private by hand; nothing is said when pushing."""
    API.create_repo("tester/vit-secret", private=True)
    on_the_way_to("vit-secret", "both").push_to_hub()


def both_to_revision() -> dict:
    trainer = on_the_way_to("vit-both-revision", "both")
    API.create_repo("tester/vit-both-revision")
    API.create_branch("tester/vit-both-revision", branch="v2")
    return {"error": error_of(lambda: trainer.push_to_hub(revision="v2"))}


def merged_over_adapter() -> dict:
    """First the adapter, later the merged model to the same place."""
    on_the_way_to("vit-replaced").push_to_hub()
    trainer = on_the_way_to("vit-replaced", "merged")
    trainer.push_to_hub()
    loaded = merged_model("vit-replaced")
    return {
        "needs_base": hasattr(loaded, "peft_config"),
        "apart": apart(trainer.merge_and_unload(), loaded),
    }


def local_base() -> None:
    """A base that is a folder on this machine."""
    base().save_pretrained(FOLDER / "base-here")
    trained("vit-local", model=str(FOLDER / "base-here"), max_steps=1).push_to_hub()


def stock() -> None:
    """Negative control: Transformers' own Trainer pushes its pickled arguments."""
    args = TrainingArguments(
        str(FOLDER / "stock"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        hub_model_id="tester/stock", hub_token=get_token(), remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(base(), args, train_dataset=RETAIN.remove_columns("source"))
    trainer.train()
    trainer.push_to_hub()


def results_table() -> dict:
    rows = [{"model": "original", "accuracy": 0.5}, {"model": "UIB", "accuracy": 0.625}]
    Dataset.from_list(rows).push_to_hub("tester/results")
    return {"rows": rows, "loaded": load_dataset("tester/results", split="train").to_list()}


# ---- What is refused, and what goes wrong ---------------------------------------------------------------------------


def refused_licence() -> dict:
    trainer = on_the_way_to("vit-licence")
    refused = error_of(lambda: trainer.push_to_hub(license="no-such-licence"))
    return {"error": refused, "second": error_of(lambda: trainer.push_to_hub(license="mit"))}


def bad_token() -> dict:
    trainer = on_the_way_to("vit-refused")
    return {
        "after": error_of(lambda: trainer.push_to_hub(token="hf_wrong")),
        "before": error_of(lambda: trainer_for("vit-refused-early", push_to_hub=True, hub_token="hf_wrong")),
        "foreign": error_of(lambda: trainer.push_to_hub(token=STRANGER)),
        "local": apart(trainer.model, PeftModel.from_pretrained(base(), trainer.args.output_dir)),
    }


def private() -> dict:
    trainer = on_the_way_to("vit-private")
    trainer.push_to_hub(private=True)
    others = {"nobody": False, "stranger": STRANGER}
    return {"own": apart(trainer.model, adapted("vit-private"))} | {
        who: [
            error_of(partial(API.list_repo_files, "tester/vit-private", token=token)),
            error_of(partial(adapted, "vit-private", token=token, cache_dir=FOLDER / who)),
        ]
        for who, token in others.items()
    }


def race() -> dict:
    """Somebody else's commit comes in between."""
    trainer, told = on_the_way_to("vit-race"), {}
    for status in ("409", "412"):
        next_goes_wrong(status)
        told[status] = error_of(trainer.push_to_hub)
    told["meanwhile"] = API.list_repo_files("tester/vit-race")
    trainer.push_to_hub()
    return told | {"apart": apart(trainer.model, adapted("vit-race"))}


def race_while_training() -> dict:
    """In a push of the background; the last one has everything."""
    next_goes_wrong("412")
    trainer = trained("vit-race-training", push_to_hub=True, save_strategy="steps", save_steps=2)
    trainer.push_to_hub()
    return {"apart": apart(trainer.model, adapted("vit-race-training"))}


def stale_parent() -> dict:
    first, last = (commit.commit_id for commit in reversed(API.list_repo_commits(BASE)[:2]))
    upload = partial(API.upload_file, path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=BASE, revision="aside")
    API.create_branch(BASE, branch="aside")
    return {
        "stale": error_of(partial(upload, parent_commit=first)),
        "fresh": error_of(partial(upload, parent_commit=last)),
    }


def connection_lost() -> dict:
    trainer = on_the_way_to("vit-lost")
    next_goes_wrong("drop_put")
    trainer.push_to_hub()
    return {"apart": apart(trainer.model, adapted("vit-lost"))}


def answer_lost() -> dict:
    trainer = on_the_way_to("vit-answer")
    next_goes_wrong("lose_answer")
    return {"error": error_of(trainer.push_to_hub), "second": error_of(trainer.push_to_hub)}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        push, adapter_by_id, push_twice, to_revision, merged, both, both_beside_private, both_to_revision, merged_over_adapter,
        named_adapter, local_base, stock, results_table, refused_licence, bad_token, private, race, race_while_training,
        stale_parent, connection_lost, answer_lost, order,
    )
} | {strategy: partial(while_training, strategy) for strategy in STRATEGIES} | {"resumed": resumed}  # fmt: skip


def main() -> None:
    make_model("vit").push_to_hub(BASE)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).push_to_hub(BASE)
    seen = {}
    for name, scenario in SCENARIOS.items():
        try:
            seen[name] = scenario()
        except Exception:
            seen[name] = {"failed": traceback.format_exc()}
    (FOLDER / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
