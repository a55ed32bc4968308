"""The answer to a deletion request: one HTML file for an auditor, figures inside, that prints well. No row of any set is in it."""

import base64
import datetime
import hashlib
import os
from importlib import metadata, resources

import jinja2

from .. import __version__
from .card import FIGURES, PACKAGES, describe_data, hub_id, settings_of, table_of

ARTEFACTS = (".safetensors", "config.json", "report.json", "audit.json")


def write_evidence(trainer, script, folder: str) -> str:
    """Write ``evidence.html`` to ``folder``; returns the path.

    Args:
        trainer: the `UIBTrainer`, trained, saved and, where there is a test set, audited.
        script: the arguments of ``scripts/unlearn.py``; ``what``, ``why``, ``due`` and ``reference`` are the request.
        folder: the run's; the figures and artefacts in it are taken up.
    """
    done = datetime.date.today()
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
        late=done.isoformat() > script.due,
        model=hub_id(script.model_name_or_path) or os.path.basename(script.model_name_or_path.rstrip("/")),
        dataset=hub_id(script.dataset_name) or os.path.basename(script.dataset_name.rstrip("/")),
        base_fingerprint=trainer.base_fingerprint,
        data_sets=describe_data(trainer),
        earlier=trainer.provenance[:-1],
        header=header,
        rows=rows,
        has_oracle="retrained" in trainer.results,
        audit=trainer.audit_report,
        figures=figures,
        artefacts=_artefacts(folder),
        settings=settings_of(trainer.args),
        steps=trainer.state.global_step,
        versions={"hf_uib": __version__, **{name: metadata.version(name) for name in PACKAGES}},
    )
    path = os.path.join(folder, "evidence.html")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(f"{path}.tmp", path)
    return path


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
