"""The wheel: what is in it, what is not, and that its commands start in an empty folder. The sdist: everything."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_uib
from hf_uib.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
COPIED = ("hf_uib", "benchmarks", "docs", "examples", "requirements", "scripts", "tests")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths of a wheel and an sdist, built from a copy of the checkout."""
    if find_spec("build") is None or find_spec("setuptools") is None:
        pytest.skip("build or setuptools is not installed; nothing can be built without the network")
    source, out = tmp_path_factory.mktemp("source") / "hf-uib", tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT,
        source,
        ignore=lambda folder, names: [
            name
            for name in names
            if name.startswith(("__pycache__", "_build"))
            or (Path(folder) == ROOT and name not in COPIED and (ROOT / name).is_dir())
        ],
    )
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(built[0]).extractall(folder)
    return folder


def test_what_is_in_the_wheel(built, unpacked):
    names = zipfile.ZipFile(built[0]).namelist()
    wanted = {"hf_uib/py.typed"} | {
        str(path.relative_to(ROOT))
        for pattern in ("hf_uib/**/*.py", "hf_uib/hub/templates/*", "hf_uib/cli/accelerate_configs/*.yaml")
        for path in ROOT.glob(pattern)
    }
    assert {"hf_uib/cli/accelerate_configs/ddp.yaml", "hf_uib/hub/templates/deletion_report.html"} < wanted
    about = f"hf_uib-{hf_uib.__version__}.dist-info"
    assert {name for name in names if not name.startswith(about)} == wanted
    assert "hf-uib = hf_uib.cli.main:main" in (unpacked / about / "entry_points.txt").read_text()
    metadata = (unpacked / about / "METADATA").read_text()
    assert f"\nVersion: {hf_uib.__version__}\n" in metadata
    assert re.findall(r"\nProject-URL: (.*)", metadata) == ["Paper, https://arxiv.org/abs/2405.14020"]


def test_the_sdist_is_the_repository(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (
        "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile", "tests/test_wheel.py", "tests/conftest.py",
        "docs/conf.py", "scripts/unlearn.py", "benchmarks/__main__.py", "requirements/constraints-cpu.txt",
        "hf_uib/cli/accelerate_configs/ddp.yaml",
    ):  # fmt: skip
        assert path in names, path
    assert any(name.startswith("examples/") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("docs/_build")]


def run(unpacked, folder, *arguments):
    """``python -m hf_uib.cli ARGUMENTS`` in an empty folder, with the wheel's files alone."""
    environment = os.environ | {"PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_uib.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    ["", "unlearn", *(pytest.param(name, marks=pytest.mark.nightly) for name in COMMANDS if name != "unlearn")],
)
def test_help_from_the_wheel(command, unpacked, tmp_path):
    done = run(unpacked, tmp_path, *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: {f'hf-uib {command}'.strip()} " in done.stdout and not os.listdir(tmp_path)


def test_templates_and_configs_are_found_in_the_wheel(unpacked, tmp_path):
    code = (
        "import hf_uib, os; assert hf_uib.__file__.startswith(os.environ['PYTHONPATH']), hf_uib.__file__\n"
        "from hf_uib.cli.main import config_path\n"
        "from importlib import resources\n"
        "assert os.path.isfile(config_path('cpu_two_processes'))\n"
        "assert resources.files('hf_uib.hub').joinpath('templates/card.md').is_file()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.nightly
def test_errors_name_commands_that_the_wheel_has(unpacked, tmp_path):
    done = run(unpacked, tmp_path, "app")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "hf-uib demo" in done.stderr or "gradio is not installed" in done.stderr
    sources = [path for path in (unpacked / "hf_uib").rglob("*") if path.is_file()]
    assert not [path for path in sources if b"scripts/" in path.read_bytes() or b"pypi.org" in path.read_bytes()]
