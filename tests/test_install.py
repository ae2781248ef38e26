"""The wheel carries the method and its machinery, nothing else, and works from any folder."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **options):
    """Run a command without a network, and show what it printed if it fails."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
    result = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools writes into the tree that it builds."""
    source, out = tmp_path_factory.mktemp("source") / "daam", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "pretrainedmodels", "results", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel, beside the dependencies that this one has."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    interpreter = next(environment / p for p in ("bin/python", "Scripts/python.exe") if (environment / p).exists())
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", wheel)
    packages = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # a path from a .pth file is not searched for .pth files itself: the editable install of this environment stays out
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(packages, "dependencies.pth").write_text("\n".join(dependencies))
    return interpreter


def test_wheel_carries_the_method_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    installed = {name for name in names if ".dist-info/" not in name}
    expected = {"daam_core.py", "daam_vit/py.typed"}
    expected |= {f"daam_vit/{path.name}" for path in (ROOT / "daam_vit").glob("*.py")}
    assert installed == expected
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_wheel_does_not_find_the_repository(python, tmp_path):
    code = (
        "import importlib.util, daam_core; print(daam_core.__file__)\n"
        "assert not any(map(importlib.util.find_spec, ['models', 'memorybank', 'command_line', 'evaluation']))"
    )
    assert not Path(run(python, "-c", code, cwd=tmp_path).strip()).is_relative_to(ROOT)


def test_api_example_of_the_readme_runs_from_any_folder(python, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"<!-- command: api -->\n```python\n(.*?)```", readme, re.DOTALL)[1]
    assert "pretrained=True" in example
    (tmp_path / ".img").mkdir()
    shutil.copy(ROOT / ".img" / "coffee.png", tmp_path / ".img")
    output = run(python, "-c", example.replace("pretrained=True", "pretrained=False"), cwd=tmp_path)  # no hub in tests
    assert output.count("torch.Size([1, 12, 14, 14])") == 2
    assert (tmp_path / "flow.gif").stat().st_size > 1000
