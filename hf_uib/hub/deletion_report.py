"""The answer to a deletion request: one HTML file for an auditor, figures inside, that prints well. No row of any set is in it."""

import base64
import datetime
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import jinja2

from ..serialization import is_marked
from .card import FIGURES, UnlearningCardData
from .tables import has_oracle, table_of

REPORT_NAME = "deletion_report.html"
ARTEFACTS = (".safetensors", "config.json", "report.json", "audit.json")
SHOWN_FIGURES = FIGURES[:2]  # the others show what the tables say


@dataclass(frozen=True, kw_only=True)
class DeletionRequest:
    """What was asked; never who asked.

    Attributes:
        what, why: in words.
        due: YYYY-MM-DD.
        reference: file number.
        forget_where: conditions on the rows of a dataset's train_split.
        dataset, model: names that may be shown.
        audit_command: checks the merged model again, from the folder of the report.
    """

    what: str
    why: str
    due: str
    reference: str | None
    forget_where: list[str]
    train_split: str
    dataset: str
    model: str
    audit_command: str


def write_deletion_report(
    request: DeletionRequest, data: UnlearningCardData, folder: str, files: Iterable[str]
) -> str:
    """Write ``deletion_report.html`` to ``folder``.

    Args:
        request: what was asked.
        data: what is known of the run.
        folder: the run's; our figures in it are taken up.
        files: that the run wrote there; those that matter are named.

    Returns:
        The path.
    """
    done = datetime.date.today()
    audit = data.audit
    header, rows = table_of(data.results)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = resources.files(__package__).joinpath(f"templates/{REPORT_NAME}").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        request=request,
        run=data,
        done=done.isoformat(),
        late=done > datetime.date.fromisoformat(request.due),
        earlier=data.requests[:-1],
        header=header,
        rows=rows,
        has_oracle=has_oracle(data.results),
        audit=audit,
        judged=sum(check.fired is not None for check in audit.checks) if audit else 0,
        figures=_figures(folder),
        artefacts=_artefacts(folder, files),
        settings=data.settings | data.measured,
    )
    path = os.path.join(folder, REPORT_NAME)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(f"{path}.tmp", path)
    return path


def _figures(folder: str) -> list[tuple[str, str]]:
    """Name and content, in base64, of the run's figures."""
    found = []
    for name in SHOWN_FIGURES:
        if is_marked(os.path.join(folder, name)):
            with open(os.path.join(folder, name), "rb") as file:
                found.append((name, base64.b64encode(file.read()).decode()))
    return found


def _artefacts(folder: str, files: Iterable[str]) -> list[dict]:
    """Name, bytes and SHA-256 of the files that matter."""
    found = []
    for name in files:
        if name.endswith(ARTEFACTS):
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found.append({"name": name, "bytes": os.path.getsize(path), "sha256": digest})
    return found
