"""The unlearning card: what was to be forgotten, how, what was measured, and what is left. Data in, Markdown out."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..metrics.table import METRICS, title_of
from ..serialization import is_marked
from .tables import WORST, fairness_table, groups_table, has_oracle, plain, results_table

if TYPE_CHECKING:
    from ..audit.report import AuditReport

FIGURES = ("bias.png", "layers.png", "audit.png", "deep.png")
PACKAGES = ("transformers", "peft", "torch", "datasets", "accelerate")
# Shown even where they are the defaults
ALWAYS = ("learning_rate", "max_steps", "per_device_train_batch_size", "seed")
# Settings that say nothing of the result: where things go, how they are shown
HIDDEN_SETTINGS = re.compile(
    r"hub_|push_to_hub|output_dir|report_to|run_name|project|trackio|logging|log_|save_|eval_|disable_tqdm|dataloader_(num|pin|pers|pref)|"
    r"do_|resume_|restore_|load_best|metric_for|greater_is|include_|debug|local_rank|ddp_|use_cpu|deepspeed|accelerator_config|"
    r"fsdp|parallelism|remove_unused|label_names|skip_memory|prediction_loss|overwrite|past_index|length_column"
)
ATTACKS = {"membership_remains": "membership inference from margins", "head_refit": "a head fitted anew"}
DEEP_ATTACKS = ("probes of every block", "relearning", "quantisation and pruning")


@dataclass(frozen=True)
class DataSummary:
    """All that is published of a set: never a row."""

    name: str
    rows: int
    fingerprint: str


@dataclass(kw_only=True)
class UnlearningCardData:
    """What a card or a deletion report can say of a run; `HubMixin.card_data` fills it.

    Attributes:
        title: of the card.
        request: what was to be forgotten, in words.
        requests: every request of the model, as records; this run's is the last.
        base: Hub id of the model before unlearning, with its revision, if it has one; and the hash of its weights.
        quantisation: how the weights below the adapter were quantised, in words; merged_into: what its adapter was merged into.
        repository: Hub id that the card is for.
        merged: the card is the merged model's, not the adapter's.
        adapter_folder: where PEFT keeps an adapter of another name than ``default``.
        kind: of what is classified: image, video, audio, text or token.
        data_sets: forget, retain, calibration and eval set, as far as there are any.
        dataset_name: Hub id of the data.
        retained: retained rows were given.
        calibrated: the level to forget to was measured on a calibration set.
        channels: what the model was not let read of the pattern, in words: noise, swapped tokens, or neither.
        prior: class of the prior.
        steps: of training.
        settings: those that bear on the result; measured: strengths that were in force.
        pattern_z: z value of the pattern in the forget set, if forget and retained rows were compared; token_z: that of the
            kind of token that stands out most; mean_token_z: that of the rows' mean tokens, if these were compared;
            mean_token_effect_z: that the checkpoint goes by what differs in them, if that was asked.
        results: rows of the results table, by model; audit: the report.
        evaluated: what `evaluate` returned, by set and metric.
        warnings: why the run cannot have unlearned, one sentence each.
        emissions: what codecarbon measured.
        own_tags, paper: of the method.
        language, license, tags, dataset_tags, dataset: as in `transformers.Trainer.create_model_card`.
    """

    title: str
    request: str
    requests: list[dict]
    base: str | None
    base_revision: str | None
    base_fingerprint: str
    repository: str | None
    merged: bool
    adapter_folder: str | None
    kind: str
    data_sets: list[DataSummary]
    dataset_name: str | None
    retained: bool
    calibrated: bool
    channels: list[str]
    prior: str
    steps: int
    settings: dict[str, Any]
    measured: dict[str, float]
    pattern_z: float | None
    token_z: float | None
    mean_token_z: float | None
    mean_token_effect_z: float | None
    results: dict[str, dict]
    audit: "AuditReport | None"
    emissions: dict | None
    own_tags: list[str]
    paper: dict[str, str]
    language: str | None = None
    license: str | None = None
    tags: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset: str | list[str] | None = None
    evaluated: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    quantisation: str | None = None
    merged_into: str | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())


def hub_id(name: str | None) -> str | None:
    """``name`` if it can be a Hub id; a path on this machine is nobody else's business."""
    if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not os.path.exists(name):
        return name
    return None


def versions() -> dict[str, str]:
    """Of this package and of those it stands on."""
    return {"hf_uib": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def settings_of(args) -> dict[str, Any]:
    """Settings of a `TrainingArguments` that bear on the result and are not the defaults, and those that are always shown."""
    shown = {}
    for setting in dataclasses.fields(args):
        value, default = getattr(args, setting.name), setting.default
        if setting.default_factory is not dataclasses.MISSING:
            default = setting.default_factory()
        simple = value is None or isinstance(value, (bool, int, float, str, dict))
        unset = value is None or default is None and not value
        changed = simple and str(value) != str(default) and not unset
        if changed and not HIDDEN_SETTINGS.match(setting.name) or setting.name in ALWAYS:
            shown[setting.name] = getattr(value, "value", value)
    return shown


def emissions_of(callbacks: list) -> dict | None:
    """What codecarbon measured, if it ran (``report_to="codecarbon"``): grams of CO2 equivalent and kWh."""
    trackers = [getattr(callback, "tracker", None) for callback in callbacks]
    measured = (getattr(tracker, "final_emissions_data", None) for tracker in trackers)
    data = next((found for found in measured if found), None)
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


def results_of(audit: "AuditReport") -> dict[str, dict]:
    """Rows of the results table from an audit's figures."""
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


def attacks_of(audit: "AuditReport") -> list[str]:
    """The attacks whose checks were judged."""
    judged = {check.name for check in audit.checks if check.fired is not None}
    return [words for name, words in ATTACKS.items() if name in judged] + (list(DEEP_ATTACKS) if audit.deep else [])


def evaluations(data: UnlearningCardData) -> list[EvalResult]:
    """The model-index: the unlearned model's figures on the forget, the retained and the test set."""
    figures = {(METRICS[key].part, key): value for key, value in data.results.get("UIB", {}).items() if key in METRICS}
    if data.audit is not None:
        seen = data.audit.metrics
        for part in ("forget", "retain"):
            if "model" in seen.get(part, {}):
                figures[part, f"{part}_accuracy"] = seen[part]["model"]["accuracy"]["value"]
        figures["forget", "attack_auc"] = seen["membership"]["model"]["auc"]["value"]
    for part, metrics in data.evaluated.items():
        figures |= {(part, key): value for key, value in metrics.items()}
    source = data.dataset_name or "unpublished"
    return [
        EvalResult(
            task_type=pipeline_of(data),
            dataset_type=source,
            dataset_name=f"{source}, {part} set",
            dataset_split=part,
            metric_type="accuracy" if key in ("accuracy", "forget_accuracy", "retain_accuracy") else key,
            metric_name=title_of(key),
            metric_value=round(float(value), 4),
        )
        for (part, key), value in figures.items()
        if key != "seconds" and value is not None and math.isfinite(value)
    ]


def pipeline_of(data: UnlearningCardData) -> str:
    """The Hub's name of the task."""
    return f"{data.kind}-classification"


def header_of(data: UnlearningCardData) -> ModelCardData:
    """The card's YAML block."""
    audit, evaluated = data.audit, evaluations(data)
    block = {
        "method": "uib",
        "prior": data.prior,
        "base_revision": data.base_revision,
        "data": [dataclasses.asdict(summary) for summary in data.data_sets],
        "requests": data.requests,
        "audit": None if audit is None else {"passed": audit.passed, "flags": audit.flags},
    }
    extra: dict[str, Any] = {
        "base_model_relation": ("finetune" if data.merged else "adapter") if data.base else None,
        "co2_eq_emissions": data.emissions,
        "unlearning": block | ({"warnings": data.warnings} if data.warnings else {}),
    }
    given = [data.tags] if isinstance(data.tags, str) else data.tags or []
    return ModelCardData(
        base_model=data.base,
        datasets=data.dataset_tags or data.dataset_name,
        language=data.language,
        license=data.license,
        library_name="transformers" if data.merged else "peft",
        model_name=data.title if evaluated else None,
        eval_results=evaluated or None,
        pipeline_tag=pipeline_of(data),
        tags=list(dict.fromkeys([*data.own_tags, *([] if data.merged else ["peft", "lora"]), *given])),
        **{key: value for key, value in extra.items() if value is not None},
    )


def write_card(data: UnlearningCardData, folder: str) -> None:
    """Write ``README.md`` to ``folder``; figures in it are shown.

    Data sets are named by id or fingerprint, and size; no example of any set is shown.
    """
    audit = data.audit
    groups, group_count = groups_table(audit.metrics.get("groups", {})) if audit else ("", 0)
    fairness, fairness_count = fairness_table(audit.public_metrics["fairness"]) if audit else ("", 0)
    card = ModelCard.from_template(
        header_of(data),
        template_str=resources.files(__package__).joinpath("templates/card.md").read_text(encoding="utf-8"),
        run=data,
        repository=data.repository or "THIS_REPOSITORY",
        request=plain(data.request) or "the examples of the forget set",
        dataset=data.dataset or data.dataset_tags or data.dataset_name,
        earlier=[one | {"request": plain(one["request"])} for one in data.requests[:-1]],
        table=results_table(data.results),
        has_oracle=has_oracle(data.results),
        evaluated=[
            (plain(part), plain(title_of(key)), f"{value:.4g}")
            for part, metrics in data.evaluated.items()
            for key, value in metrics.items()
        ],
        groups=groups,
        group_count=group_count,
        fairness=fairness,
        fairness_count=fairness_count,
        positive=plain(audit.positive_label) if audit and audit.positive_label else "",
        worst=WORST,
        figures=[name for name in FIGURES if is_marked(os.path.join(folder, name))],
        tried=attacks_of(audit) if audit else [],
        auto_class=f"AutoModelFor{'Sequence' if data.kind == 'text' else data.kind.title()}Classification",
    )
    card.save(os.path.join(folder, "README.md"))
