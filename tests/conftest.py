"""Tests run from a checkout: put its root on the path, keep every test away from model hubs."""

import os
import signal
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts that tests start
# As in the ranks that tests start: runs are compared bitwise (and the models are tiny).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run in this process takes over Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
