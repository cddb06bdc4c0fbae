"""Versions, import cost and the contents of the wheel."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lrdint_tune
from lrdint_tune._versions import REQUIRED, check_versions

ROOT = Path(lrdint_tune.__file__).parents[1]


def set_installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    def version(name: str) -> str:
        found = versions[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize("torchao", ["0.14.0", "0.14.1", "0.15.0", "0.15.0+cpu"])
def test_supported_versions_pass(monkeypatch, torchao):
    set_installed(monkeypatch, torchtune="0.6.1", torchao=torchao)
    check_versions()


@pytest.mark.parametrize(
    ("torchtune", "torchao", "found", "command"),
    [
        ("0.6.1", "0.16.0", "torchao 0.16.0 is installed", 'pip install "torchao>=0.14,<0.16"'),
        ("0.6.1", "0.16.0.dev20260101", "torchao 0.16.0.dev20260101 is installed", 'pip install "torchao>=0.14,<0.16"'),
        ("0.6.1", "0.13.0", "torchao 0.13.0 is installed", 'pip install "torchao>=0.14,<0.16"'),
        ("0.5.0", "0.15.0", "torchtune 0.5.0 is installed", 'pip install "torchtune==0.6.1"'),
        ("0.6.1", None, "torchao is not installed", 'pip install "torchao>=0.14,<0.16"'),
        (
            None,
            "0.18.0",
            "torchtune is not installed, torchao 0.18.0 is installed",
            'pip install "torchtune==0.6.1" "torchao>=0.14,<0.16"',
        ),
    ],
)
def test_other_versions_are_named_with_the_command(monkeypatch, torchtune, torchao, found, command):
    set_installed(monkeypatch, torchtune=torchtune, torchao=torchao)
    with pytest.raises(ImportError) as caught:
        check_versions()
    assert str(caught.value) == (
        f"lrdint_tune needs torchtune==0.6.1 and torchao>=0.14,<0.16, but {found}. Run: {command}"
    )


def test_message_comes_before_torchtune_is_imported(tmp_path):
    """With the metadata of torchao 0.17 first on the path, as an interpreter that has it would see."""
    info = tmp_path / "torchao-0.17.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.17.0\n")
    code = "import lrdint_tune.models"
    run = run_python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ImportError: lrdint_tune needs torchtune==0.6.1 and torchao>=0.14,<0.16, but torchao 0.17.0 is installed. "
        'Run: pip install "torchao>=0.14,<0.16"'
    )


def test_importing_the_package_alone_is_cheap():
    code = "import sys, lrdint_tune; print({'torch', 'torchtune', 'transformers', 'numpy'} & set(sys.modules))"
    run = run_python(code, PYTHONPATH=str(ROOT))
    assert run.stdout.strip() == "set()", run.stderr


def test_pyproject_asks_for_the_same_versions():
    declared = re.findall(r'^ *"(torch(?:tune|ao))([^"]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert dict(declared) == dict(REQUIRED)


def test_constraints_pin_what_the_package_requires():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert pins["torch"] == "2.13.0"
    assert pins["torchtune"] == "0.6.1"
    assert pins["torchao"].startswith("0.15.")


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*output*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    for name in ("recipes", "configs", "benchmarks"):  # whether or not the tree has them
        (source / name).mkdir(exist_ok=True)
        (source / name / "extra.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"lrdint_tune-{lrdint_tune.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lrdint_tune", info}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lrdint_tune").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert f"{info}/licenses/LICENSE" in names


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, cwd="/", capture_output=True, text=True
    )
