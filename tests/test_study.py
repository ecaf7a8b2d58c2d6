"""The study runs from the first part to the last, tiny, and touches neither results nor page; its
page has the tables that its results make."""

import json
import os
import re
import subprocess
import sys

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "study"))
import figures
import tables

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


def test_the_page_and_its_figures_are_those_of_the_results(tmp_path):
    results, page = json.loads(read("results.json")), tmp_path / "README.md"
    page.write_text(read("README.md"))
    tables.write_page(results, page)
    assert page.read_text() == read("README.md")
    names = [*NAMES.split(), "measured"]
    assert sorted(re.findall("<!-- study:(.*) -->", page.read_text())) == sorted(names)
    figures.draw(results, tmp_path)
    for name in re.findall(r"figures/(.*?\.svg)", read("README.md")):
        assert (tmp_path / name).read_text() == read("figures", name)


def test_spread_and_first_at():
    assert tables.cell([0.1, 0.2, 0.3, None]) == "0.200 ± 0.248"  # t of 2 degrees: 4.30
    assert tables.cell([0.5]) == "0.500 ± 0.000" and tables.cell([]) == "-"
    curve = [(0, 0.2, 0), (240, 0.1, 0), (480, 0.3, 0)]
    assert tables.first_at(curve, 0.2) == 360 and tables.first_at(curve, 0.4) is None
