"""Tables of the evaluation: Markdown and CSV."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
from tiny_records import METHODS, make_photos

from evaluation import metrics, tables
from evaluation.comparison import Row, statistics
from evaluation.records import photo_values
from evaluation.tables import markdown_table, method_tables, to_csv

NAN = math.nan
RESULTS = Path(__file__).parents[1] / "evaluation" / "results"
pytestmark = pytest.mark.filterwarnings("error")


def test_table():
    rows = [
        Row("daam", "deletion_mean", "lower", 9, 0.2, 0.1, 0.3),
        Row("rollout", "deletion_mean", "lower", 8, 0.1, 0.05, 0.2, -0.1, -0.2, -0.05, 0.01),
        Row("daam", "increase", "higher", 9, 0.25, 0.125, 0.5),
        Row("random", "increase", "higher", 9, 0.125, NAN, NAN, -0.125, NAN, NAN, NAN),
    ]
    lines = markdown_table(rows, ["deletion_mean", "increase", "iou"]).splitlines()
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == set("| -:")  # aligned as plain text, too
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[:1] + cells[2:] == [
        ["", "deletion, mean colour ↓", "increase, % ↑"],
        ["daam", "0.200 [0.100, 0.300]", "**25.0** [12.5, 50.0]"],
        ["rollout", "**0.100** [0.050, 0.200] ▲", ""],
        ["random", "", "12.5"],
        ["photos", "8 to 9", "9"],
    ]
    assert markdown_table(rows, ["iou"]) == ""


def read_csv(text):
    rows = []
    for line in csv.DictReader(io.StringIO(text)):
        numbers = {k: float(v) if v else NAN for k, v in line.items() if k not in ("method", "metric", "direction")}
        rows.append(Row(**line | numbers | {"n": int(line["n"])}))
    return rows


def test_csv_is_read_back_as_it_was():
    values = photo_values(make_photos(5), METHODS)
    rows = statistics(values, "daam") + [Row('a, "b"', "iou", "higher", 1, 1 / 3, NAN, NAN)]
    assert repr(read_csv(to_csv(rows))) == repr(rows)
    header = "method,metric,direction,n,mean,low,high,difference,difference_low,difference_high,p"
    assert to_csv([]) == header + "\n"


def test_a_method_with_marks_of_a_table():
    """In a row and a column of its own, as text."""
    name = "=a|b\n`*<i>"
    table = markdown_table(
        [Row("daam", "iou", "higher", 1, 0.5, NAN, NAN), Row(name, "iou", "higher", 1, 0.2, NAN, NAN)], ["iou"]
    )
    assert len(table.splitlines()) == 5 and len({len(line) for line in table.splitlines()}) == 1
    assert table.splitlines()[3].split(" | ")[0] == r"| =a\|b\\n\`\*\<i\>"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@sum"])
def test_a_spreadsheet_computes_nothing(name):
    (row,) = csv.DictReader(io.StringIO(to_csv([Row(name, "iou", "higher", 1, -0.5, NAN, NAN)])))
    assert row["method"] == f"'{name}" and row["mean"] == "-0.5"


def test_a_meaning_of_every_metric():
    for metric in metrics.HEADINGS:
        assert sum(metric.startswith(key) for key in tables.MEANINGS) == 1
        assert sum(metric in names for names in tables.TABLES.values()) == 1
    assert all(direction in ("lower", "higher") for _, direction in metrics.METRICS.values())


@pytest.mark.parametrize("name", [folder.name for folder in sorted(RESULTS.iterdir())])
def test_published_tables_are_those_of_their_csv(name):
    run = {"dtype": "float32"} | json.loads((RESULTS / name / "run.json").read_text(encoding="utf-8"))
    rows = read_csv((RESULTS / name / "table.csv").read_text(encoding="utf-8"))
    table = method_tables(rows, run, max(row.n for row in rows))
    assert (RESULTS / name / "table.md").read_text(encoding="utf-8") == table
