"""Every public name is described, every link of the documentation leads somewhere, and the site builds without warnings."""

import importlib
import inspect
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = (
    "hf_uib",
    "hf_uib.priors",
    "hf_uib.unlearning_task",
    "hf_uib.metrics",
    "hf_uib.objective",
    "hf_uib.divergence",
    "hf_uib.schedule",
    "hf_uib.cli.digits",
)
SITE = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
PAGES = [ROOT / "README.md", *SITE]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
LINKED = [*PROSE, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "research.md"]
# Words of our own and sentences that are hard to read
FORBIDDEN = (
    *("shall", "but for", "told from", "go on with", "goes on with", "gone on with", "whole or not at all"),
    *(
        "disputed",
        "follow rate",
        "evidence loss",
        "evidence.html",
        "living with it",
        "years later",
        "believe it",
        "not run",
    ),
)


def public(module) -> dict[str, object]:
    """What a module's `__all__` names, or else the functions and classes that it defines, by full name."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, o in vars(module).items() if n[0] != "_" and getattr(o, "__module__", "") == module.__name__]
    return {f"{module.__name__}.{name}": getattr(module, name) for name in names}


def methods(cls: type) -> dict[str, object]:
    """Public methods and properties whose code stands in the class."""

    def code(o) -> object:
        return o.fget if isinstance(o, property) else getattr(o, "__func__", o)

    here = {n: o for n, o in vars(cls).items() if n[0] != "_" and inspect.isfunction(code(o))}
    return {n: o for n, o in here.items() if code(o).__qualname__.startswith(f"{cls.__qualname__}.")}


def described(o) -> bool:
    """Whether an object has a docstring; a dataclass's signature is none."""
    return bool(o.__doc__) and not o.__doc__.startswith(f"{o.__name__}(")


def undocumented(names: dict[str, object]) -> list[str]:
    """Functions, classes and their methods without a docstring; a method may have its parent's."""
    missing = [name for name, o in names.items() if callable(o) and not described(o)]
    for name, cls in names.items():
        if inspect.isclass(cls):
            missing += [f"{name}.{method}" for method in methods(cls) if not inspect.getdoc(getattr(cls, method))]
    return missing


def broken(text: str, folder: Path) -> list[str]:
    """Relative links of a Markdown text to what is not there."""
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^()\s]+)\)", text) if "://" not in link]
    return [target for target in targets if target and not (folder / target).exists()]


NAMES = {name: o for module in MODULES for name, o in public(importlib.import_module(module)).items()}


def aliases() -> list[set[str]]:
    """Names of the same function or class together: one of them is on the API page."""
    groups: dict[int, set[str]] = {}
    for name, o in NAMES.items():
        if callable(o):
            groups.setdefault(id(o), set()).add(name)
    return list(groups.values())


def test_every_public_name_has_a_docstring():
    assert len(NAMES) > 40
    assert undocumented(NAMES) == []


def test_a_missing_docstring_is_found():
    class Bare:
        """Has a docstring, its method has not."""

        def method(self):
            pass

    assert undocumented({"Bare": Bare, "f": lambda: None}) == ["f", "Bare.method"]


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    modules = set(re.findall(r"automodule:: (\S+)\n +:members:", page))
    named = set(re.findall(r"(?:autoclass|autofunction):: (\S+)", page))
    named |= {f"hf_uib.priors.{name}" for name in re.findall(r"py:data:: (\S+)", page)}
    named |= {name for name in NAMES if name.rpartition(".")[0] in modules}
    assert [group for group in aliases() if not group & named] == []


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert broken(page.read_text(), page.parent) == []


def test_a_broken_link_is_found():
    text = "[a](docs/method.md) [b](nowhere.md#there) [c](https://arxiv.org) ![d](none.png) [e](#here)"
    assert broken(text, ROOT) == ["nowhere.md", "none.png"]


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package)
    from sphinx.util.inventory import InventoryFile

    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "trees",
        "docs",
        tmp_path / "site",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "site" / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", posixpath.join)
    there = {name for kind in inventory if kind.startswith("py:") for name in inventory[kind]}
    for group in aliases():
        found = group & there
        assert found, f"{group} is not in the site"
        cls = NAMES[min(found)]
        if inspect.isclass(cls):
            assert any({f"{name}.{method}" for method in methods(cls)} <= there for name in found), group


def figures(text: str) -> set[str]:
    """Numbers with three decimals."""
    return set(re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", text))


def test_figures_in_prose_stand_in_a_table_that_a_command_wrote():
    def written(page: Path) -> str:
        text = page.read_text()
        return (
            text
            if page.parent.name == "benchmark"
            else " ".join(re.findall(r"(?s)<!-- results -->(.*?)<!-- /results -->", text))
        )

    tables = figures(" ".join(written(page) for page in [*PAGES, ROOT / "benchmarks" / "research.md"]))
    assert len(tables) > 300
    stale = {page.name: sorted(figures(page.read_text()) - tables - {"0.001"}) for page in PAGES}
    assert not {name: found for name, found in stale.items() if found}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def forbidden(text: str) -> list[str]:
    """Forbidden words of a page; code is left out."""
    prose = re.sub(r"(?s)```.*?```|`[^`]*`|\]\([^)]*\)", " ", text).lower()
    return [word for word in FORBIDDEN if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", " ".join(prose.split()))]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_use_the_words_of_the_field(page):
    assert forbidden(page.read_text()) == []


def test_a_forbidden_word_is_found():
    assert forbidden("It shall not be told\nfrom the `follow rate` of others; marshall it.") == ["shall", "told from"]


def commands(text: str) -> list[tuple[str, set[str]]]:
    """Command lines of hf_uib in the code of a page: the command, and its flags."""
    fences = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    pieces = fences.findall(text) + re.findall(r"`([^`\n]+)`", fences.sub("", text))
    lines = [line for piece in pieces for line in re.sub(r"\\\n", " ", piece).splitlines()]
    found = [
        re.search(
            r"(?:hf-uib|-m hf_uib\.cli|scripts/(?=\w+\.py))\s*(unlearn|discover|audit|export|demo|app)\b(.*)", line
        )
        for line in lines
    ]
    return [(match[1], set(re.findall(r"(--\w+)", match[2]))) for match in found if match]


@pytest.mark.nightly
@pytest.mark.slow
def test_command_lines_take_their_flags():
    asked = {
        (command, flag)
        for page in [*PROSE, ROOT / "CHANGELOG.md"]
        for command, flags in commands(page.read_text())
        for flag in flags
    }
    assert len(asked) > 10
    assert {command for command, _ in asked} == {"unlearn", "discover", "audit", "export"}
    unknown = []
    for command in sorted({command for command, _ in asked}):
        helped = subprocess.run(
            [sys.executable, "-m", "hf_uib.cli", command, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert helped.returncode == 0, helped.stderr
        unknown += [
            f"{command} {flag}"
            for name, flag in sorted(asked)
            if name == command and not re.search(rf"{flag}\b", helped.stdout)
        ]
    assert unknown == []


def test_command_lines_are_found():
    text = "```bash\nhf-uib unlearn \\\n  --a x --b\n```\nand `accelerate launch -m hf_uib.cli audit --c`, `--d`"
    assert commands(text) == [("unlearn", {"--a", "--b"}), ("audit", {"--c"})]


@pytest.mark.nightly
@pytest.mark.slow
def test_the_block_of_the_readme_runs_as_it_stands(tmp_path):
    block = re.search(r"(?s)```python\n(.*?)```", (ROOT / "README.md").read_text())[1]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "passed" in done.stdout.lower()
    for name in ("adapter_model.safetensors", "README.md", "merged/model.safetensors"):
        assert (tmp_path / "unlearned" / name).is_file(), name
