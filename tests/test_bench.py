"""The benchmark runs: its figures are for a quiet machine, so none is tested."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

PARTS = [("tdrm", "ours / published"), ("gpu", "tokens a second"), ("loading", "200 rows, ")]


@pytest.mark.parametrize("part,wanted", PARTS)
def test_quick_run(part, wanted):
    bench = os.path.join(ROOT, "study", "bench.py")
    command = [sys.executable, bench, part, "--quick", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(wanted) == 2
