"""The study runs from the first part to the last, small, and touches neither the results nor the README."""
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_quick_study():
    kept = {name: open(os.path.join(ROOT, name)).read() for name in ("results.json", "README.md")}
    result = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "study.py"), "--quick"], capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-3000:]
    names = [line for line in result.stdout.splitlines() if line and line[0] not in "|-" and " " not in line]
    assert names == ["tdrm", "greedy-search", "best-of-n", "targets", "conditions", "budget-greedy", "budget-best-of-n", "rl", "rl-auroc", "prime",
                     "prime-pairs", "prime-again", "prime-all-seeds", "prime-short", "qrm", "qrm-rl"]
    assert kept == {name: open(os.path.join(ROOT, name)).read() for name in kept}
