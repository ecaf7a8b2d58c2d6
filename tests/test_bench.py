"""The benchmark runs: its figures are for a quiet machine, so none is tested."""
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("part, wanted", [("tdrm", "ours / published"), ("gpu", "tokens a second")])
def test_quick_run(part, wanted):
    bench = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py")
    result = subprocess.run([sys.executable, bench, part, "--quick", "--repeats", "1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(wanted) == 2
