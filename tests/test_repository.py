"""What the README and the package files say is true."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("VIT_DynamicAccumulatedAttentionMap_oneSample.py", "DINO_DAAM_Visualization_oneSample.py")


def block(name):
    """The code block that follows a marker in the README."""
    return re.search(rf"<!-- command: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands of the README name."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "photos").mkdir()
    shutil.copytree(ROOT / ".img", folder / ".img")
    for name in ("photo.jpg", "photos/a.jpg"):
        shutil.copy(ROOT / ".img" / "flower.jpg", folder / name)
    for n in range(24):  # for a bank, one sub-folder a class
        place = folder / "photos" / ("red", "green")[n % 2] / f"{n}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (200 * (1 - n % 2), 200 * (n % 2), 8 * n)).save(place)
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=5).state_dict()}, folder / "mine.pth")
    return folder


def run(command, folder):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_CACHE": str(folder / "no"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "TORCH_HOME": str(folder / "no"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("line", "".join(map(block, ("options", "self-supervised", "bank"))).splitlines())
def test_commands_with_options(line, place):
    """In their order: the bank is built before it is asked."""
    program, script, *options = shlex.split(line)
    assert program == "python" and script in (*SCRIPTS, "-m")
    result = run([sys.executable, *([ROOT / script] if script in SCRIPTS else [script]), *options], place)
    assert result.returncode == 0, result.stderr
    if script in SCRIPTS and "--help" not in options:
        assert (place / result.stdout.splitlines()[-1].split(" -> ")[1]).is_file()


def test_evaluation_command(place):
    """The README's, of one photo."""
    install, line = block("evaluation").splitlines()
    assert install == 'pip install -e ".[evaluation]"'
    program, *options = shlex.split(line)
    result = run([sys.executable, *options, "--limit", "1", "--steps", "2", "--sanity", "0"], place)
    assert program == "python" and result.returncode == 0, result.stderr
    assert (place / "evaluated" / "sheet.png").is_file() and "| integrated-gradients |" in result.stdout


@pytest.mark.parametrize("line", block("held-out photos").splitlines())
def test_evaluation_of_the_held_out_photos(line, place):
    """Without them it gets as far as their folder."""
    program, *options = shlex.split(line)
    result = run([sys.executable, *options], place)
    assert program == "python" and result.returncode == 2
    assert result.stderr == "error: images: there is no folder 101_ObjectCategories\n"


@pytest.mark.parametrize("name", ["vit_small_patch14_caltech101", "vit_small_patch14_selfsupervised"])
def test_tables_of_the_evaluation_are_what_was_measured(name):
    """Those of the README, those of the folder of results, and their numbers."""
    folder = ROOT / "evaluation" / "results" / name
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert table in README
    measured = list(csv.DictReader((folder / "table.csv").open(encoding="utf-8")))
    assert len({row["method"] for row in measured}) == 13
    for row in measured:
        if row["metric"].startswith(("deletion", "insertion")):
            line = next(line for line in table.splitlines() if line.startswith(f"| {row['method']} "))
            assert f"{float(row['mean']):.3f}" in line.replace("*", "")


@pytest.mark.parametrize("line", block("libraries").splitlines())
def test_commands_that_fetch_weights(line, place):
    """Without a hub they get as far as the weights."""
    program, script, *options = shlex.split(line)
    result = run([sys.executable, ROOT / script, *options], place)
    assert program == "python" and result.returncode == 2
    assert re.fullmatch("error: model: the weights of .* are not cached and .* cannot be reached; .*\n", result.stderr)


def test_api_example(place):
    result = run([sys.executable, "-c", block("api")], place)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("torch.Size([1, 12, 16, 16])") == 2
    assert (place / "flow.gif").is_file()


def test_links_and_pictures_exist():
    for page in (
        ROOT / "README.md",
        *(p for d in ("pretrainedmodels", "memorybank", ".img") for p in (ROOT / d).rglob("*.md")),
    ):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )


def test_conda_and_pip_install_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (.+[<>=].+)$", environment, re.MULTILINE)
    assert listed[0] == f"python{project['requires-python']}"
    assert sorted(listed[1:]) == sorted(project["dependencies"] + project["optional-dependencies"]["test"])


def test_core_imports_no_other_file_of_the_repository():
    imported = re.findall(
        r"^\s*(?:from|import) (\w+)", (ROOT / "daam_core.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    own = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert "torch" in imported and not own & set(imported)


def test_python_files_do_nothing_when_imported(tmp_path):
    """No prints, no seeding, no threads: importing leaves the random state and stdout alone."""
    code = (
        "import random, sys, threading, numpy, torch\n"
        "state = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1]\n"
        "import daam_core, models, models.images, command_line.photos, memorybank, memorybank.build, evaluation\n"
        "import VIT_DynamicAccumulatedAttentionMap_oneSample, DINO_DAAM_Visualization_oneSample\n"
        "assert state[0] == random.getstate() and torch.equal(state[1], torch.get_rng_state())\n"
        "assert (state[2] == numpy.random.get_state()[1]).all() and threading.active_count() == 1\n"
    )
    result = run([sys.executable, "-c", code], tmp_path)
    assert result.returncode == 0 and result.stdout == "", result.stderr
