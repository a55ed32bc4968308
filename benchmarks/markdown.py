"""Pages in Markdown."""

from collections.abc import Iterable
from pathlib import Path

MARKS = "<!-- results -->", "<!-- /results -->"


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table, and an empty one after it."""
    lines = [" | ".join(line) for line in [header, *rows]]
    return [f"| {lines[0]} |", "|---" * len(header) + "|", *(f"| {line} |" for line in lines[1:]), ""]


def between_marks(path: Path, lines: list[str]) -> None:
    """Put a text in its place in a page; without one (nothing was measured) the page stays as it is.

    Raises:
        ValueError: the page has no such place.
    """
    if not lines:
        return
    page = path.read_text(encoding="utf-8")
    begin, end = MARKS
    if begin not in page or end not in page.split(begin)[1]:
        raise ValueError(f"{path} has no place for the results; put {begin} and {end} around it.")
    text = "\n".join(lines).strip()
    head, tail = page.split(begin)[0], page.split(end)[1]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
