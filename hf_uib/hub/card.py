"""The unlearning model card: written after `save_pretrained`, so that nothing overwrites it."""

import dataclasses
import math
import os
import re
from importlib import metadata, resources

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..data.fingerprints import fingerprint
from ..metrics.table import METRICS, measured

FIGURES = ("bias.png", "layers.png", "audit.png", "deep.png")
PACKAGES = ("transformers", "peft", "torch", "datasets", "accelerate")
WORST = 30  # groups that the card shows; audit.json has all
ALWAYS = (
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "seed",
)  # shown even where they are the defaults
# Settings that say nothing of the result: where things go, how they are shown
HIDDEN_SETTINGS = re.compile(
    r"hub_|push_to_hub|output_dir|report_to|run_name|project|trackio|logging|log_|save_|eval_|disable_tqdm|dataloader_(num|pin|pers|pref)|"
    r"do_|resume_|restore_|load_best|metric_for|greater_is|include_|debug|local_rank|ddp_|use_cpu|deepspeed|accelerator_config|"
    r"parallelism|remove_unused|label_names|skip_memory|prediction_loss|overwrite|past_index|length_column"
)


def hub_id(name: str | None) -> str | None:
    """``name`` if it can be a Hub id; a path on this machine is nobody else's business."""
    if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name):
        return name
    return None


def table_of(results: dict[str, dict]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Heading and direction of each figure that was measured, and each model's name and cells."""
    names = measured(results)
    rows = [(model, [_number(row.get(n), n) for n in names]) for model, row in results.items()]
    return [(METRICS[n].title, METRICS[n].direction) for n in names], rows


def has_oracle(results: dict[str, dict]) -> bool:
    """Whether a model retrained without the forget set is among the rows of the table."""
    return any(name.startswith("retrained") for name in results)


def versions() -> dict[str, str]:
    """Of this package and of those it stands on."""
    return {"hf_uib": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def results_table(results: dict[str, dict]) -> str:
    """A Markdown table of models x metrics, with the direction of each."""
    header, rows = table_of(results)
    if not header:
        return ""
    titles = [f"{title} ({direction})" for title, direction in header]
    return _markdown(["", *titles], [[model, *cells] for model, cells in rows])


def _number(value, name: str) -> str:
    if value is None and name == "seconds":
        return ""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    return METRICS[name].text(value)


def groups_table(groups: dict[str, dict]) -> tuple[str, int]:
    """A Markdown table of groups x models with 95% intervals, worst first, at most `WORST` rows; and how many groups there are."""
    models = [model for model, row in groups.items() if row["every"]]
    if "model" not in models:
        return "", 0
    every = groups["model"]["every"]
    worst = sorted(every, key=lambda group: every[group]["value"])[:WORST]
    titles = {"model": "unlearned", "reference": "original"}
    rows = []
    for group in worst:
        cells = [groups[m]["every"].get(group) for m in models]
        shown = ["not measured" if c is None else f"{c['value']:.3f} ({c['low']:.3f}, {c['high']:.3f})" for c in cells]
        rows.append([plain(group), *shown])
    return _markdown(["group", *(titles.get(m, m) for m in models)], rows), len(every)


def settings_of(trainer) -> dict[str, object]:
    """The settings that are not the defaults and bear on the result, those that are always shown, and the adapter's."""
    shown = {}
    for setting in dataclasses.fields(type(trainer.args)):
        value, default = getattr(trainer.args, setting.name), setting.default
        if setting.default_factory is not dataclasses.MISSING:
            default = setting.default_factory()
        simple = value is None or isinstance(value, (bool, int, float, str))
        told = (
            simple
            and not HIDDEN_SETTINGS.match(setting.name)
            and str(value) != str(default)
            and not (value is None or default is None and not value)
        )
        if told or setting.name in ALWAYS:
            shown[setting.name] = getattr(value, "value", value)
    adapter = trainer.model.peft_config[trainer.adapter_name]
    return shown | {"LoRA": f"r {adapter.r}, alpha {adapter.lora_alpha}, on {len(trainer.layers)} layers"}


def used(trainer) -> dict[str, float]:
    """Strengths that were in force and, in words, where they came from."""
    found = {}
    for name in ("noise_to_signal", "prior_strength", "share_kept"):
        if (value := trainer.statistics.get(name)) is not None:
            own = getattr(trainer.args, name, None) is None and name != "prior_strength"
            found[f"{name}{', measured' if own else ' in force'}"] = round(value, 4)
    return found


def results_of(audit) -> dict[str, dict]:
    """Rows of the table from an audit's figures."""
    names = {"reference": "original", "model": "UIB"}
    rows = {}
    for model in sorted(audit.metrics["test"], key=lambda m: ("reference", "model").index(m) if m in names else 2):
        seen = {key: cell["value"] for key, cell in audit.metrics["test"][model].items() if key in METRICS}
        for part in ("forget", "retain"):
            if model in audit.metrics.get(part, {}):
                seen[f"{part}_accuracy"] = audit.metrics[part][model]["accuracy"]["value"]
        worst = audit.metrics.get("groups", {}).get(model, {})
        rows[names.get(model, model)] = seen | ({"worst_group_accuracy": worst["worst"]} if worst.get("every") else {})
    return rows


def plain(text: str) -> str:
    """Outside text on one line, with nothing in it that Markdown or HTML would read."""
    return (
        re.sub(r"([\\`*_\[\]#|<>])", r"\\\1", " ".join(str(text).split()))
        .replace("\\<", "&lt;")
        .replace("\\>", "&gt;")
    )


def tried(audit) -> list[str]:
    """The attacks whose checks were judged."""
    attacks = {"membership_remains": "membership inference from margins", "head_refit": "a head fitted anew"}
    judged = {check.name for check in audit.checks if check.fired is not None}
    deep = ["probes of every block", "relearning", "quantisation and pruning"] if audit.deep else []
    return [words for name, words in attacks.items() if name in judged] + deep


def evaluations(trainer) -> list[EvalResult]:
    """The model-index: the unlearned model's figures on the forget, the retained and the test set."""
    source = trainer.dataset_name or "unpublished"
    task = "image-classification" if _takes_pictures(trainer) else "text-classification"
    figures = {
        (METRICS[key].part, key): value for key, value in trainer.results.get("UIB", {}).items() if key in METRICS
    }
    if trainer.audit_report is not None:
        seen = trainer.audit_report.metrics
        for part in ("forget", "retain"):
            if "model" in seen.get(part, {}):
                figures[part, f"{part}_accuracy"] = seen[part]["model"]["accuracy"]["value"]
        figures["forget", "attack_auc"] = seen["membership"]["model"]["auc"]["value"]
    return [
        EvalResult(
            task_type=task,
            dataset_type=source,
            dataset_name=f"{source}, {part} set",
            dataset_split=part,
            metric_type="accuracy" if key in ("accuracy", "forget_accuracy", "retain_accuracy") else key,
            metric_name=METRICS[key].title,
            metric_value=round(float(value), 4),
        )
        for (part, key), value in figures.items()
        if key != "seconds" and value is not None and not math.isnan(value)
    ]


def emissions(trainer) -> dict | None:
    """What codecarbon measured, if it ran (``report_to="codecarbon"``): grams of CO2 equivalent and kWh."""
    trackers = [getattr(callback, "tracker", None) for callback in trainer.callback_handler.callbacks]
    data = next((t.final_emissions_data for t in trackers if getattr(t, "final_emissions_data", None)), None)
    if data is None:
        return None
    return {
        "emissions": round(data.emissions * 1000, 4),
        "energy_consumed": round(data.energy_consumed, 6),
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "on_cloud": False,
        "hardware_used": data.gpu_model or data.cpu_model,
    }


def _takes_pictures(trainer) -> bool:
    return getattr(trainer.accelerator.unwrap_model(trainer.model), "main_input_name", "") == "pixel_values"


def describe_data(trainer) -> list[dict]:
    """Name, size and fingerprint of every set, as it was given; never a row."""
    test = trainer.raw_eval_dataset
    if test is None or isinstance(test, dict) or not hasattr(test, "__len__"):
        test = None
    elif "eval_dataset" not in trainer.fingerprints:
        trainer.fingerprints["eval_dataset"] = fingerprint(test)
    sets = {
        "forget": trainer.forget_dataset,
        "retain": trainer.retain_dataset,
        "calibration": trainer.calibration_dataset,
        "eval": test,
    }
    return [
        {"name": name, "rows": len(rows), "fingerprint": trainer.fingerprints[f"{name}_dataset"]}
        for name, rows in sets.items()
        if rows is not None
    ]


def write_card(
    trainer,
    folder: str,
    merged: bool = False,
    *,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
) -> None:
    """Write ``README.md`` to ``folder``: what was asked to be forgotten, how, what was measured, and what is left.

    Data sets are named by id or fingerprint, and size; no example of any set is shown.

    Args:
        trainer: the `UIBTrainer`.
        merged: the card of the merged model instead of the adapter's.
        language, license, tags, model_name, finetuned_from, dataset_tags, dataset: as in `transformers.Trainer.create_model_card`.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = finetuned_from or trainer.base_name
    revision = getattr(model.config, "_commit_hash", None)
    repository = trainer.hub_model_id or trainer.args.hub_model_id
    title = model_name or (repository or os.path.basename(os.path.abspath(trainer.args.output_dir))).split("/")[-1]
    if repository and merged:  # which of an adapter's repository is not the merged model's
        repository = {"both": f"{repository}-merged", "merged": repository}.get(trainer.args.hub_artifact)
    data_sets = describe_data(trainer)
    chain = trainer.provenance
    energy = emissions(trainer)
    audit = trainer.audit_report
    groups, group_count = groups_table(audit.metrics.get("groups", {})) if audit else ("", 0)
    evaluated = evaluations(trainer)
    extra = {
        "base_model_relation": ("finetune" if merged else "adapter") if base else None,
        "co2_eq_emissions": energy,
        "unlearning": {
            "method": "uib",
            "prior": type(trainer.prior).__name__,
            "base_revision": revision,
            "data": data_sets,
            "requests": chain,
            "audit": None if audit is None else {"passed": audit.passed, "flags": audit.flags},
        },
    }
    own_tags = trainer._tag_names + ([] if merged else ["peft", "lora"])
    picture = _takes_pictures(trainer)
    card_data = ModelCardData(
        base_model=base,
        datasets=dataset_tags or trainer.dataset_name,
        language=language,
        license=license,
        library_name="transformers" if merged else "peft",
        model_name=title if evaluated else None,
        eval_results=evaluated or None,
        pipeline_tag="image-classification" if picture else "text-classification",
        tags=list(dict.fromkeys(own_tags + ([tags] if isinstance(tags, str) else tags or []))),
        **{key: value for key, value in extra.items() if value is not None},
    )
    card = ModelCard.from_template(
        card_data,
        template_str=resources.files(__package__).joinpath("templates/card.md").read_text(encoding="utf-8"),
        title=title,
        merged=merged,
        base=base,
        revision=revision,
        repository=repository or "THIS_REPOSITORY",
        request=plain(trainer.request) or "the examples of the forget set",
        data_sets=data_sets,
        dataset=dataset or dataset_tags or trainer.dataset_name,
        earlier=[one | {"request": plain(one["request"])} for one in chain[:-1]],
        prior=type(trainer.prior).__name__,
        calibrated=trainer.calibration_dataset is not None
        and getattr(trainer.prior, "level", None) is not None
        and getattr(trainer.prior, "target", None) is None,
        retained=trainer.retain_dataset is not None,
        subfolder=None if trainer.adapter_name == "default" else trainer.adapter_name,
        steps=trainer.state.global_step,
        settings=settings_of(trainer),
        used=used(trainer),
        pattern_z=trainer.statistics.get("pattern_z") if trainer.compared else None,
        table=results_table(trainer.results),
        has_oracle=has_oracle(trainer.results),
        groups=groups,
        group_count=group_count,
        worst=WORST,
        figures=[name for name in FIGURES if os.path.isfile(os.path.join(folder, name))],
        audit=audit,
        tried=tried(audit) if audit else [],
        energy=energy,
        license=license,
        auto_class="AutoModelForImageClassification" if picture else "AutoModelForSequenceClassification",
        paper=trainer._paper,
        versions=versions(),
    )
    card.save(os.path.join(folder, "README.md"))
