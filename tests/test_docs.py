"""Every public name is described, every link of the documentation leads somewhere, and the site builds without warnings."""

import importlib
import inspect
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ("hf_uib", "hf_uib.priors", "hf_uib.metrics", "hf_uib.baselines", "hf_uib.bound", "hf_uib.tasks")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def public(module) -> dict[str, object]:
    """What a module's `__all__` names, or else the functions and classes that it defines, by full name."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, o in vars(module).items() if n[0] != "_" and getattr(o, "__module__", "") == module.__name__]
    return {f"{module.__name__}.{name}": getattr(module, name) for name in names}


def methods(cls: type) -> dict[str, object]:
    """Public functions and properties that a class defines itself."""
    kinds = (staticmethod, classmethod, property)
    return {n: o for n, o in vars(cls).items() if n[0] != "_" and (inspect.isfunction(o) or isinstance(o, kinds))}


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
    by_module = {name for name, o in NAMES.items() if callable(o) and name.rpartition(".")[0] in modules}
    assert set(NAMES) - named - by_module == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page.read_text(), page.parent) == []


def test_a_broken_link_is_found():
    text = "[a](docs/method.md) [b](nowhere.md#there) [c](https://arxiv.org) ![d](none.png) [e](#here)"
    assert broken(text, ROOT) == ["nowhere.md", "none.png"]


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
    wanted = {f"{name}.{method}" for name, o in NAMES.items() if inspect.isclass(o) for method in methods(o)} | set(
        NAMES
    )
    assert wanted - there == set()


def test_figures_in_prose_stand_in_a_table_that_a_command_wrote():
    def figures(text: str) -> set[str]:
        return set(re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", text))

    def written(name: str) -> str:
        page = (ROOT / "docs" / name).read_text()
        return page if name == "benchmark.md" else page.split("<!-- results -->")[1].split("<!-- /results -->")[0]

    tables = figures(" ".join(written(n) for n in ("benchmark.md", "research.md", "lifecycle.md", "scale.md")))
    assert len(tables) > 300
    stale = {page.name: sorted(figures(page.read_text()) - tables) for page in PAGES}
    assert not {name: found for name, found in stale.items() if found}
