"""Every command and example of the README and the docs runs, and what they link to, quote and name is there."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
CARDS = [
    ROOT / "CHANGELOG.md",
    *(p for d in ("pretrainedmodels", "memorybank", ".img") for p in (ROOT / d).rglob("*.md")),
]
SCRIPTS = ("VIT_DynamicAccumulatedAttentionMap_oneSample.py", "DINO_DAAM_Visualization_oneSample.py")


# ----------------------------------------------------------------------------------------------------------------------
# Blocks of code, and what runs them
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    page: str
    name: str
    language: str
    code: str


BLOCKS = [
    Block(page, *match.groups(default=""))
    for page, text in PAGES.items()
    for match in re.finditer(
        r"(?:^<!-- command: (.+?) -->\n)?^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE
    )
]
CODE = {block.name: block.code for block in BLOCKS}

EXPLAINS = ("options", "your own image", "self-supervised", "bank")
"""Blocks whose lines succeed."""
FETCHES = ("libraries",)
"""Blocks whose lines get as far as the weights, which no test fetches."""
EVALUATES = ("evaluation", "held-out photos")
EXAMPLES = {
    "python": "class token, 12 blocks (2, 2, 12, 16, 16)",
    "bank in python": "cup",
    "log-odds in python": "1% 45%",
    "relevance in python": "log_odds True (1, 12)",
    "by hand": "",
    "family": "class token, 4 blocks (2, 4, 8, 6)",
}
"""Python blocks, and what they print."""
ONLY_OPTIONS = ("benchmark", "benchmark of the bank", "benchmark of the start", "support table")
"""Blocks that take minutes: their options are those of the program. test_benchmarks.py and test_families.py run it."""
RUN_BY_CI = ("first picture", "tests", "contributing")
RUN_BY_TEST_INSTALL = ("api",)


def lines_of(*names):
    return [line for name in names for line in CODE[name].splitlines() if not line.startswith("pip install")]


def test_every_block_has_a_runner():
    runnable = [block for block in BLOCKS if block.language not in ("text", "bibtex")]
    names = [*EXPLAINS, *FETCHES, *EVALUATES, *EXAMPLES, *ONLY_OPTIONS, *RUN_BY_CI, *RUN_BY_TEST_INSTALL]
    assert sorted(block.name for block in runnable) == sorted(names)
    assert {block.language for block in runnable} == {"bash", "python"}
    for page, text in PAGES.items():
        assert text.count("```") == 2 * sum(block.page == page for block in BLOCKS)
        assert not re.search(r"^ {4,}(\S*python3?|pip|bash) ", text, re.MULTILINE), f"{page}: a command without a fence"


# ----------------------------------------------------------------------------------------------------------------------
# One process runs them all, in their order, in a folder with what they name
# ----------------------------------------------------------------------------------------------------------------------

DRIVER = """
import contextlib, io, json, os, runpy, sys, traceback

results = []
for program, *arguments in json.load(sys.stdin):
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv = [program, *arguments]
            if program == "-c":
                exec(arguments[0], {"__name__": "__main__"})
            elif program == "-m":
                sys.argv = sys.argv[1:]
                runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, os.path.dirname(program))
                runpy.run_path(program, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
    results.append([code, *(stream.buffer.getvalue().decode() for stream in (out, err))])
json.dump(results, sys.stdout)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


def arguments_of(line):
    """What follows `python` in a line of a block; an evaluation is cut short."""
    program, script, *options = shlex.split(line)
    assert program == "python" and (script in SCRIPTS or script == "-m")
    if line in lines_of("evaluation"):
        options += ["--limit", "1", "--steps", "2", "--sanity", "0", "--blocks", "0", "--baselines", "mean"]
    return [str(ROOT / script) if script in SCRIPTS else script, *options]


def program_and_options(line):
    """`python benchmarks/flow.py --write` -> "benchmarks/flow.py", ["--write"]."""
    python, *words = shlex.split(line)
    assert python == "python"
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return " ".join(words[:first]), [word for word in words if word.startswith("--")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the blocks name."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / ".img", folder / ".img")
    (folder / "memorybank").mkdir()
    shutil.copytree(ROOT / "memorybank" / "embedded", folder / "memorybank" / "embedded")
    for name in ("photo.jpg", "photos/a.jpg", "more/tulip.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.open(ROOT / ".img" / "flower.jpg").resize((160, 107)).save(folder / name)
    for top, images in (("photos", 20), ("others", 4)):  # for a bank, one sub-folder per class
        for n in range(images):
            file = folder / top / ("red", "green")[n % 2] / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (200 * (1 - n % 2), 200 * (n % 2), 8 * n)).save(file)
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", num_classes=5).state_dict()}, folder / "mine.pth")
    return folder


@pytest.fixture(scope="module")
def outcomes(place):
    """What every line and every example did, by its text."""
    lines = {line: arguments_of(line) for line in lines_of(*EXPLAINS, *FETCHES, *EVALUATES)}
    lines |= {CODE[name]: ["-c", CODE[name]] for name in EXAMPLES}
    for program in (SCRIPTS[1], *(program_and_options(line)[0] for line in lines_of(*ONLY_OPTIONS))):
        file, *command = program.split()
        lines[f"{program} --help"] = [str(ROOT / file), *command, "--help"]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_CACHE": str(place / "no"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "TORCH_HOME": str(place / "no"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    driver, tasks = [sys.executable, "-c", DRIVER], json.dumps([*lines.values()])
    result = subprocess.run(driver, cwd=place, env=env, input=tasks, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return {line: Outcome(*found) for line, found in zip(lines, json.loads(result.stdout), strict=True)}


@pytest.mark.parametrize("line", lines_of(*EXPLAINS))
def test_commands_succeed(line, outcomes, place):
    done = outcomes[line]
    assert done.code == 0, done.stderr
    if not line.endswith("--help") and " -m " not in line:
        gifs = re.findall(r" -> (.+flow\.gif)$", done.stdout, re.MULTILINE)
        assert gifs and done.stdout.endswith(f"{gifs[-1]}\n") and all((place / gif).is_file() for gif in gifs)


@pytest.mark.parametrize("line", lines_of(*FETCHES))
def test_commands_that_fetch_weights(line, outcomes):
    """Without a hub they get as far as the weights."""
    done = outcomes[line]
    assert done.code == 2
    assert re.fullmatch("error: model: the weights of .* are not cached and .* cannot be reached; .*\n", done.stderr)


def test_evaluation(outcomes, place):
    """Run it on one photo; the packages that it installs are those of the tests."""
    install, line = CODE["evaluation"].splitlines()
    done = outcomes[line]
    assert install == 'pip install -e ".[evaluation]"' and done.code == 0, done.stderr
    assert (place / "evaluated" / "sheet.png").is_file() and "| integrated-gradients |" in done.stdout


@pytest.mark.parametrize("line", lines_of("held-out photos"))
def test_evaluation_of_the_held_out_photos(line, outcomes):
    """Without them it gets as far as their folder."""
    done = outcomes[line]
    assert (done.code, done.stderr) == (2, "error: images: there is no folder 101_ObjectCategories; check the path\n")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, outcomes, place):
    done = outcomes[CODE[name]]
    assert done.code == 0, done.stderr
    if name == "by hand":
        assert float(re.match(r"tensor\((\S+?)[,)]", done.stdout)[1]) < 1e-4
    else:
        assert done.stdout == EXAMPLES[name] + "\n"
    if name == "python":
        assert (place / "cat" / "flow.gif").is_file()


@pytest.mark.parametrize("line", lines_of(*ONLY_OPTIONS))
def test_options_of_long_runs(line, outcomes):
    program, options = program_and_options(line)
    done = outcomes[f"{program} --help"]
    assert done.code == 0, done.stderr
    assert all(re.search(rf"{option}\b", done.stdout) for option in options)


def test_commands_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"$(command_after 'command: {name}')" in ci for name in ("first picture", "tests"))
    first, *others = CODE["contributing"].splitlines()
    assert first == CODE["tests"].strip() and set(others) <= set(ci.splitlines())


# ----------------------------------------------------------------------------------------------------------------------
# What the pages say
# ----------------------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def anchors_of(text):
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*(ROOT / page for page in PAGES), *CARDS], ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not path.startswith(("http://", "https://")):
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_names_of_files_exist():
    for page, text in PAGES.items():
        for file in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
            assert (ROOT / file).is_file(), f"{page}: {file}"


def test_the_map_of_the_readme_leads_to_the_code():
    table = PAGES["README.md"].split("## Where things are")[1].split("##")[0]
    places = re.findall(r"\[`([\w/]+\.py)`\]\(\1\)(?:: ([^|\n]+))?", table)
    assert [file for file, _ in places][:3] == ["daam_core.py", "daam_vit/families.py", "daam_vit/drawing.py"]
    for file, names in places:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def {name}\(|{name}\b.*=)", source, re.MULTILINE), f"{file}: {name}"


def test_usage_lists_every_option(outcomes):
    shown = "".join(outcomes[line].stdout for line in (f"python {SCRIPTS[0]} --help", f"{SCRIPTS[1]} --help"))
    wanted = set(re.findall(r"--[a-z][\w-]+", shown)) - {"--help"}
    tables = "".join(line for line in PAGES["docs/usage.md"].splitlines() if line.startswith("| `--"))
    assert set(re.findall(r"--[a-z][\w-]+", tables)) == wanted


@cache
def texts_of_the_code():
    """Every text in the code, with "\\0" for what is put in."""
    found = set()
    folders = ("daam_vit", "models", "memorybank", "command_line", "evaluation")
    for file in [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return sorted(found)


def test_troubleshooting_quotes_messages_that_exist():
    rows = re.findall(r"^\| (.+?) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 50
    for quote in quoted:
        pattern = ".*".join(map(re.escape, quote.split("...")))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts_of_the_code()), quote
