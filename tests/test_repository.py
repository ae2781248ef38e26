"""What the package files say is true, tables are what was measured, and imports run downwards."""

import ast
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import daam_vit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# ----------------------------------------------------------------------------------------------------------------------
# Package files
# ----------------------------------------------------------------------------------------------------------------------


def test_conda_and_pip_install_the_same():
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (.+[<>=].+)$", environment, re.MULTILINE)
    assert listed[0] == f"python{PROJECT['requires-python']}"
    assert sorted(listed[1:]) == sorted(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])


def test_citations_agree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cited = dict(re.findall(r"(\w+) += \{(.+?)\}", readme.split("```bibtex")[1]))
    card = (ROOT / "CITATION.cff").read_text(encoding="utf-8").split("preferred-citation:")[1]
    for line in (f"title: {cited['title']}", f"journal: {cited['journal']}", f"volume: {cited['volume']}"):
        assert f"  {line}\n" in card
    assert f"start: {cited['pages']}\n" in card and f"year: {cited['year']}\n" in card
    assert re.findall("family-names: (.+)", card) == [name.split(",")[0] for name in cited["author"].split(" and ")]


def test_workflow_runs_ci_with_the_oldest_python():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    versions = re.findall(r'"(3\.\d+)"', workflow)
    assert "- run: .ci/run\n" in workflow and f">={versions[0]}" == PROJECT["requires-python"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# ----------------------------------------------------------------------------------------------------------------------
# Results that lie in the repository
# ----------------------------------------------------------------------------------------------------------------------


def test_the_page_of_the_evaluation_names_every_method():
    methods = []
    models = ("vit_small_patch14_caltech101", "vit_small_patch14_selfsupervised")
    names = [*models, *(f"{model}_relevance" for model in (*models, "vit_small_patch14_rope_caltech101"))]
    for name in names:
        with (ROOT / "evaluation" / "results" / name / "table.csv").open(encoding="utf-8") as file:
            methods.append({row["method"] for row in csv.DictReader(file)})
    section = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8").split("## The methods")[1]
    named = [
        name for cell in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall("`(.+?)`", cell)
    ]
    assert [*map(len, methods)] == [13, 13, 8, 8, 10] and sorted(named) == sorted(set.union(*methods))


def test_every_table_lies_in_one_place():
    """The tables that a program writes are between markers, or in a folder of results."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert sorted(re.findall("<!-- table: (.+) -->", text)) == ["benchmark", "support"]
    assert text.count("<!-- end of table -->") == 2 and "| gae " not in text


# ----------------------------------------------------------------------------------------------------------------------
# Imports
# ----------------------------------------------------------------------------------------------------------------------

LAYERS = ("daam_vit", "daam_core", "models", "memorybank", "command_line")
"""From the ground up; scripts, evaluation, benchmarks and `python -m` commands are above."""


def files_of(name):
    return sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]


def imported_by(file):
    """Dotted names of the modules that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_downwards_only(layer):
    above = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    above -= set(LAYERS[: LAYERS.index(layer) + 1])
    for file in files_of(layer):
        if file.name != "__main__.py":
            assert not above & {name.split(".")[0] for name in imported_by(file)}, file


def test_modules_of_daam_vit_import_only_modules_above_them():
    order = re.findall(r"^(\w+) {2,}\w", daam_vit.__doc__, re.MULTILINE)
    assert sorted(order) == sorted(file.stem for file in files_of("daam_vit") if file.stem != "__init__")
    for i, module in enumerate(order):
        names = {name.split(".")[1] for name in imported_by(ROOT / "daam_vit" / f"{module}.py") if "daam_vit." in name}
        assert names <= set(order[:i]), module


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
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout == "", result.stderr
