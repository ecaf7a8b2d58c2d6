"""The benchmark runs: its figures are for a quiet machine, so none is tested."""
import os
import subprocess
import sys


def test_quick_run():
    bench = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py")
    result = subprocess.run([sys.executable, bench, "tdrm", "--quick", "--repeats", "1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ours / published") == 2
