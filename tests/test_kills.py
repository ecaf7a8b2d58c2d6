"""A few of the kills of study/kills.py."""

import os
import subprocess
import sys

from conftest import ROOT


def test_a_few_kills():
    kills = os.path.join(ROOT, "study", "kills.py")
    command = [sys.executable, kills, "--kills", "2", "--scripts", "rl"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kills" in result.stdout and "bitwise" in result.stdout
