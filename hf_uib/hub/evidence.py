"""The answer to a deletion request: one HTML file for an auditor, figures inside, that prints well. No row of any set is in it."""

import base64
import datetime
import hashlib
import os
import shlex
from importlib import resources

import jinja2

from .card import FIGURES, describe_data, has_oracle, hub_id, settings_of, table_of, used, versions

ARTEFACTS = (".safetensors", "config.json", "report.json", "audit.json")


def write_evidence(trainer, script, folder: str) -> str:
    """Write ``evidence.html`` to ``folder``; returns the path.

    Args:
        trainer: the `UIBTrainer`, trained, saved and, where there is a test set, audited.
        script: the arguments of ``scripts/unlearn.py``; ``what``, ``why``, ``due`` and ``reference`` are the request.
        folder: the run's; the figures and artefacts in it are taken up.
    """
    done = datetime.date.today()
    audit = trainer.audit_report
    judged = [check for check in audit.checks if check.fired is not None] if audit else []
    figures = []
    for name in FIGURES[:2]:  # the others show what the tables say
        if os.path.isfile(os.path.join(folder, name)):
            with open(os.path.join(folder, name), "rb") as file:
                figures.append((name, base64.b64encode(file.read()).decode()))
    header, rows = table_of(trainer.results)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files(__package__).joinpath("templates/evidence.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        request=script,
        done=done.isoformat(),
        late=done > datetime.date.fromisoformat(script.due),
        model=hub_id(script.model_name_or_path) or os.path.basename(script.model_name_or_path.rstrip("/")),
        dataset=hub_id(script.dataset_name) or os.path.basename(script.dataset_name.rstrip("/")),
        base_fingerprint=trainer.base_fingerprint,
        data_sets=describe_data(trainer),
        earlier=trainer.provenance[:-1],
        header=header,
        rows=rows,
        has_oracle=has_oracle(trainer.results),
        audit=audit,
        judged=len(judged),
        retained=trainer.retain_dataset is not None,
        prior=type(trainer.prior).__name__,
        command=_audit_command(script),
        figures=figures,
        artefacts=_artefacts(folder),
        settings=settings_of(trainer) | used(trainer),
        steps=trainer.state.global_step,
        versions=versions(),
    )
    path = os.path.join(folder, "evidence.html")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(f"{path}.tmp", path)
    return path


def _audit_command(script) -> str:
    """What an auditor pastes to check the merged model again."""
    words = [
        "python",
        "scripts/audit.py",
        "--model",
        "merged",
        "--reference",
        "MODEL_BEFORE",
        "--dataset_name",
        "DATA",
    ]
    words += ["--forget_where", *map(shlex.quote, script.forget_where)]
    for flag in ("dataset_config_name", "train_split", "test_split", "bias_column"):
        if value := getattr(script, flag):
            words += [f"--{flag}", shlex.quote(value)]
    return " ".join(words + (["--retrained", "RETRAINED"] if script.retrained_model else []))


def _artefacts(folder: str) -> list[dict]:
    """Name, bytes and SHA-256 of every file that the run wrote and that matters."""
    found = []
    for part in ("", "merged"):
        for name in sorted(os.listdir(os.path.join(folder, part))):
            path = os.path.join(folder, part, name)
            if os.path.isfile(path) and name.endswith(ARTEFACTS):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append({"name": os.path.join(part, name), "bytes": os.path.getsize(path), "sha256": digest})
    return found
