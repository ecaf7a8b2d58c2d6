"""A few of the kills of tests/kills.py, and the study in its quick mode: both run, as a user would run them."""
import os
import subprocess
import sys

from conftest import ROOT


def test_a_few_kills():
    result = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "kills.py"), "--kills", "2", "--scripts", "rl"],
                            capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kills" in result.stdout and "bitwise" in result.stdout


def test_quick_study(tmp_path):
    """One part, in a copy: results.json and the README stay as they are."""
    for name in os.listdir(ROOT):
        if name.endswith(".py") or name == "README.md":
            os.symlink(os.path.join(ROOT, name), tmp_path / name)
    os.mkdir(tmp_path / "tests")
    text = open(os.path.join(ROOT, "tests", "study.py")).read()
    (tmp_path / "tests" / "study.py").write_text(text)
    result = subprocess.run([sys.executable, str(tmp_path / "tests" / "study.py"), "rl", "--quick"], capture_output=True, text=True,
                            timeout=400)
    assert result.returncode == 0, result.stderr
    assert "| rule-only |" in result.stdout and not os.path.exists(tmp_path / "results.json")
