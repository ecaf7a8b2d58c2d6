"""The study runs from the first part to the last, tiny, and touches neither results nor page; its
page has the tables that its results make."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "study"))
import data
import figures
import real
import sft_minimal as sft
import tables

GSM8K = os.environ.get("GSM8K_DIR", "")
STUDY = os.path.join(ROOT, "study")
NAMES = "tdrm greedy-search best-of-n targets choice choice-sweep budget rl prime"
NAMES += " prime-pairs prime-ten-seeds qrm qrm-rl"


def read(*names):
    with open(os.path.join(STUDY, *names)) as f:
        return f.read()


def test_quick_study():
    kept = {name: read(name) for name in ("results.json", "README.md")}
    command = [sys.executable, os.path.join(STUDY, "study.py"), "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.findall(r"^[a-z-]+$", result.stdout, flags=re.M) == NAMES.split()
    assert kept == {name: read(name) for name in kept}


@pytest.mark.skipif(
    not os.path.exists(os.path.join(GSM8K, "example_model_solutions.jsonl")),
    reason="GSM8K_DIR: no example_model_solutions.jsonl of GSM8K",
)
def test_quick_study_of_real_text(tmp_path):
    tokenizer = data.byte_tokenizer()
    sft.new_policy(tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, os.path.join(STUDY, "real.py"), "--quick", "--dtype", "float32"]
    options = {"env": os.environ | {"SMOLLM2_DIR": str(tmp_path)}, "timeout": 300}
    kept = {name: read(name) for name in ("results.json", "README.md")}
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.findall(r"^real.*$", result.stdout, flags=re.M) == ["real", "real-choices"]
    assert kept == {name: read(name) for name in kept}
    with open(os.path.join(ROOT, "runs", "quick-real", "TDRM-0.values", "0.json")) as f:
        values = json.load(f)["values"]
    assert len(values) == 80 and all(0 < v < 1 for row in values for v in row)


def test_which_of_four_solutions():
    """Equally good choices share; a solution's value is that at its own last line."""
    nan, right = np.nan, np.array([[False, False, True, False], [True, False, False, False]])
    values = np.array([[[0.9, 0.1], [0.3, nan], [0.8, nan], [0.0, 0.8]], [[0.5, nan]] * 4])
    assert real.best_of_four(values, right).tolist() == [0.5, 0.25]
    questions = []
    for answers in ("5 5 3 3", "5 3 3 4", "3 4 6 5"):
        solutions = [{"solution": f"So.\nA: {a}", "is_correct": a == "5"} for a in answers.split()]
        questions.append(dict(zip(real.AUTHORS, solutions)))
    assert real.majority(questions).tolist() == [0.5, 0.0, 0.25]
    accuracies = real.with_intervals(lambda questions: {"right": right[questions].mean()}, 2)
    assert accuracies == {"right": [0.25, 0.25, 0.25]}


def test_the_page_and_its_figures_are_those_of_the_results(tmp_path):
    results, page = json.loads(read("results.json")), tmp_path / "README.md"
    page.write_text(read("README.md"))
    tables.write_page(results, page)
    assert page.read_text() == read("README.md")
    made = [name for part in results for name, _ in tables.TABLES[part](results[part])]
    assert sorted(re.findall("<!-- study:(.*) -->", page.read_text())) == sorted(made)
    figures.draw(results, tmp_path)
    for name in re.findall(r"figures/(.*?\.svg)", read("README.md")):
        assert (tmp_path / name).read_text() == read("figures", name)


def test_spread_and_first_at():
    assert tables.cell([0.1, 0.2, 0.3, None]) == "0.200 ± 0.248"  # t of 2 degrees: 4.30
    assert tables.cell([0.5]) == "0.500 ± 0.000" and tables.cell([]) == "-"
    curve = [(0, 0.2, 0), (240, 0.1, 0), (480, 0.3, 0)]
    assert tables.first_at(curve, 0.2) == 360 and tables.first_at(curve, 0.4) is None
