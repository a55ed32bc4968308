"""What stands in workflows, hooks and the Makefile exists; what a checkout cannot run here is at least well formed."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(PROJECT["project"]["optional-dependencies"])


def problems(command: str) -> list[str]:
    """What a shell command names that is not there: make targets, files of the repository, extras."""
    found = [f"make {target}" for target in re.findall(r"\bmake ([\w-]+)", command) if target not in TARGETS]
    found += [path for path in re.findall(r"(?<=-c )\S+\.txt", command) if not (ROOT / path).is_file()]
    named = [extra for group in re.findall(r"\.\[([\w,]+)\]", command) for extra in group.split(",")]
    return found + [extra for extra in named if extra not in EXTRAS]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows(path):
    workflow = yaml.safe_load(path.read_text())
    assert {"name", "permissions", "jobs"} <= set(workflow)
    assert True in workflow  # YAML reads `on` as true
    for job in workflow["jobs"].values():
        assert "runs-on" in job
        for step in job["steps"]:
            assert len({"uses", "run"} & set(step)) == 1
            assert problems(step.get("run", "")) == []


def test_there_is_a_workflow_for_everything():
    names = {path.stem for path in WORKFLOWS}
    assert names == {"tests", "quality", "docs", "lowest", "transformers-main", "publish"}


def test_a_missing_target_is_found():
    missing = problems('make nothing && pip install -c requirements/none.txt -e ".[test,nowhere]"')
    assert missing == ["make nothing", "requirements/none.txt", "nowhere"]


def test_the_other_places_that_name_targets():
    for path in (".ci/run", "CONTRIBUTING.md", "README.md"):
        assert problems((ROOT / path).read_text()) == [], path


def test_hooks_are_local():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert {hook["entry"].split()[0] for hook in hooks[0]["hooks"]} == {"ruff", "mypy", "lint-imports"}


def test_lowest_versions_are_the_bounds():
    """Every bound that is tried is the one that is promised."""
    lines = (ROOT / "requirements" / "constraints-lowest.txt").read_text().splitlines()
    tried = dict(line.lower().replace("-", "_").split("==") for line in lines if line and line[0] != "#")
    promised = dict(line.lower().replace("-", "_").split(">=") for line in PROJECT["project"]["dependencies"])

    def numbers(version: str) -> list[int]:
        parts = [int(part) for part in version.split(".")]
        return parts + [0] * (3 - len(parts))

    assert set(tried) == set(promised)
    assert {name: numbers(version) for name, version in promised.items()} == {
        name: numbers(version) for name, version in tried.items()
    }


def test_no_type_error_is_switched_off():
    assert "disable_error_code" not in PROJECT["tool"]["mypy"]
