"""Test the benchmarks: the numbers of the flow, their table in docs/benchmarks.md, the parts of the first picture."""

import copy
import json
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import flow, flow_report
from benchmarks.flow_methods import METHODS, Method

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "flow.py"
CASE = "vit_tiny_patch16_224:32:2"
MEASURED = [
    "forward", "forward + backward", "ours (fast)", "ours (relevance)", "ours (relevance, low)", "ours, one by one",
    "published", "rollout",
]  # fmt: skip
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*options, folder):
    command = [sys.executable, FILE, *map(str, options)]
    return subprocess.run(command, cwd=folder, env=ONE_THREAD, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The output of a small run, and its JSON."""
    folder = tmp_path_factory.mktemp("benchmark")
    result = run("--cases", CASE, "--methods", *MEASURED, "--rounds", 3, "--device", "cpu", "--out", ".", folder=folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "flow.png").read_bytes().startswith(b"\x89PNG")
    return result.stdout, json.loads((folder / "flow.json").read_text(encoding="utf-8"))


def test_json_has_every_round_of_every_method(measured):
    _, report = measured
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] and report["dtype"] == "float32"
    (case,) = report["cases"]
    assert {key: case[key] for key in ("model", "pixels", "batch", "tokens", "rounds")} == {
        "model": "vit_tiny_patch16_224", "pixels": 32, "batch": 2, "tokens": 5, "rounds": 3,
    }  # fmt: skip
    assert list(case["results"]) == MEASURED
    for result in case["results"].values():
        assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0
        assert 0 <= result["peak_bytes"] < 1e9
    least = {method: min(result["seconds"]) for method, result in case["results"].items()}
    assert least["forward"] < least["forward + backward"] < least["ours, one by one"]
    weights = 4 * 5_717_416  # bytes of this model, each of which gets a gradient
    peaks = {method: result["peak_bytes"] for method, result in case["results"].items()}
    assert peaks["published"] > weights > peaks["ours (fast)"]


def test_tables_come_from_the_json(measured):
    printed, report = measured
    report = copy.deepcopy(report)
    assert flow_report.page_table(report) in printed and flow_report.case_table(report["cases"][0]) in printed
    report["cases"][0]["results"] = {
        "forward": {"seconds": [1.0, 2.0, 6.0], "peak_bytes": 11_000_000},
        "forward + backward": {"seconds": [4.0, 4.0, 8.0], "peak_bytes": 222_000_000},
        "ours (fast)": {"seconds": [5.0, 4.4, 8.0], "peak_bytes": 210_000_000},
        "ours (relevance)": {"seconds": [6.0, 4.8, 8.0], "peak_bytes": 231_000_000},
        "ours, one by one": {"seconds": [10.0, 8.8, 12.0], "peak_bytes": 105_000_000},
        "LeGrad": {"skipped": "it went on holiday"},
    }
    table = flow_report.page_table(report)
    # medians of 1/4, 2/4, 6/8; of 5/4, 4.4/4, 8/8; and of 6/4, 4.8/4, 8/8
    numbers = "0.50 x<br>11 MB | 4 s<br>222 MB | 1.10 x<br>210 MB | 1.20 x<br>231 MB"
    assert f"| vit_tiny_patch16_224, 32 px, batch 2 | {numbers} |\n" in table
    assert "- ours (relevance): `attention_flow(..., variant='relevance', memory='fast')`" in table
    assert "rollout: " not in table  # its name says what it is
    assert "0.2 images/s one by one, 0.4 as a batch, 2.00 x" in table
    assert "- LeGrad: it went on holiday (everywhere)" in table
    row = "| forward | 2.000 (1.000 to 6.000) | 0.50 (0.25 to 0.75) | 1.0 | 11 MB |"
    assert row in flow_report.case_table(report["cases"][0])


def test_methods_that_are_skipped(monkeypatch):
    device, case = torch.device("cpu"), flow.Case.parse("vit_tiny_patch16_224:32:1")
    installed = flow.version
    missing = {method.package for method in METHODS.values()} - {None}
    monkeypatch.setattr(flow, "version", lambda package: None if package in missing else installed(package))
    assert missing == {"daam-timm-vit", "grad-cam", "torchcam"}
    for method in ("daam-timm-vit", "Grad-CAM", "LeGrad"):
        measured = flow.measure(case, [method], device, torch.float32, 1, 0)
        package = METHODS[method].package
        why = f'{package} is not installed: pip install -e ".[bench]"'
        assert measured["results"] == {method: {"skipped": why}}
        assert f"| {method} | - | - | - | - |" in flow_report.case_table(measured)
        assert f"- {method}: {why} (everywhere)" in flow_report.case_table(measured)

    monkeypatch.setattr(flow, "available_memory", lambda device: 1e9)
    large = flow.Case.parse("vit_small_patch8_224:1024:1")  # 12 blocks, 6 heads, 16,385 tokens
    assert flow.reason_to_skip("published", large, device) == (
        "its attention matrices alone take 77 GB, and 1 GB are free"
    )
    assert flow.reason_to_skip("ours (fast)", large, device) is None
    assert large.build("meta").num_classes == 1000  # timm builds this model without a classifier by default


def test_processes_that_fail():
    context = multiprocessing.get_context("spawn")

    class Dead(flow.Worker):
        def __init__(self, how):
            self.seconds, self.skipped = [], None
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=exec, args=(how,))
            self.process.start()
            theirs.close()

    worker = Dead("import os; os.kill(os.getpid(), 9)")
    assert worker.answer("first call") is None
    assert worker.result() == {"skipped": "it was killed, probably because memory ran out"}
    worker = Dead("import os; os._exit(3)")
    assert worker.answer("first call") is None and worker.result() == {"skipped": "it ended with code 3"}


def test_maps_of_the_relevance_flow_are_others(monkeypatch):
    flow.check("ours (relevance)", flow.small_model())
    monkeypatch.setitem(METHODS, "relevance", replace(METHODS["ours (relevance)"], same_maps=True))
    with pytest.raises(ValueError, match="its maps differ from ours by"):
        flow.check("relevance", flow.small_model())


def test_maps_are_compared_before_anything_is_timed(monkeypatch):
    method = METHODS["published"]
    flow.check("published", flow.small_model())

    def almost(model):
        explain = method.make(model)
        return lambda images: explain(images) * 1.001

    monkeypatch.setitem(METHODS, "published", Method(almost, "", same_maps=True))
    with pytest.raises(ValueError, match=r"its maps differ from ours by 0\.001 of the largest value"):
        flow.check("published", flow.small_model())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--cases", "deit_small_patch16_224"], "cases: expected MODEL:PIXELS:BATCH, got 'deit_small_patch16_224'"),
        (["--cases", "deit_smal:224:1"], "cases: 'deit_smal' is not a model of timm"),
        (["--cases", "resnet18:224:1"], "cases: resnet18 "),
        (["--cases", "vit_small_patch8_224:100:1"], "cases: 100 pixels are not a multiple of the patch size"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
        (["--rounds", "0"], "expected 1 to 1,000, got 0"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--read", "nowhere.json"], "No such file"),
    ],
)
def test_bad_options_are_one_line(options, text, capsys):
    with pytest.raises(SystemExit) as stop:
        flow.parse_options(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and text in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: [r], "it should be an object"),
        (lambda r: r.pop("cases") and r, "has no 'cases'"),
        (lambda r: r | {"cases": []}, "cases is empty; measure again"),
        (lambda r: r | {"device": None}, "device should be a text, got null"),
        (lambda r: r | {"cases": [{"model": "a"}]}, "cases[0] is not complete; measure again"),
        (lambda r: r["cases"][1]["results"]["forward"].update(seconds=[]) or r, "cases[1] is not complete"),
        (lambda r: r["cases"][1]["results"]["forward"].update(seconds=[0]) or r, "cases[1] is not complete"),
        (lambda r: r["cases"][1]["results"]["forward"].pop("peak_bytes") and r, "cases[1] is not complete"),
        (lambda r: r["cases"][0]["results"].update(forward=[]) or r, "cases[0].results.forward should be an object"),
    ],
)
def test_a_report_that_cannot_be_read(change, text, tmp_path, capsys):
    file = tmp_path / "flow.json"
    file.write_text(json.dumps(change(json.loads(flow.JSON.read_text(encoding="utf-8")))))
    with pytest.raises(SystemExit) as stop:
        flow.main(["--read", str(file), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"read: {file}" in error and text in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert flow.main(["--read", str(flow.JSON), "--out", str(tmp_path / "file" / "below")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out: ") and error.endswith("pass another --out\n") and error.count("\n") == 1


def test_page_shows_what_was_measured():
    report = json.loads(flow.JSON.read_text(encoding="utf-8"))
    page = flow_report.PAGE.read_text(encoding="utf-8")
    start, end = map(re.escape, flow_report.MARKERS)
    assert re.findall(f"{start}\n(.*?)\n{end}", page, re.DOTALL) == [flow_report.page_table(report)]
    assert f"](../{flow.PLOT.relative_to(ROOT)})" in page and flow.PLOT.is_file()
    cases = [f"{case['model']}:{case['pixels']}:{case['batch']}" for case in report["cases"]]
    assert cases and set(cases) <= set(flow.ALL)


def test_startup_counts_every_second_once(tmp_path):
    file = tmp_path / "parts.json"
    command = [sys.executable, ROOT / "benchmarks" / "startup.py", "--parts", file]
    result = subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    parts = json.loads(file.read_text())
    assert set(parts) == {
        "import torch", "import timm", "import the rest", "load the model", "read the photo", "flow",
        "read every block", "describe the evolution", "describe the run", "draw and write", "options and the like",
    }  # fmt: skip
    assert all(seconds > 0 for seconds in parts.values())
