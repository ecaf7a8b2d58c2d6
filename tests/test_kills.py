"""A few of the kills of tests/kills.py, as a user would run them."""
import os
import subprocess
import sys

from conftest import ROOT


def test_a_few_kills():
    result = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "kills.py"), "--kills", "2", "--scripts", "rl"],
                            capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kills" in result.stdout and "bitwise" in result.stdout
