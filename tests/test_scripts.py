"""The scripts as they are started: --help of each, and each on two processes under torchrun, from a
tiny policy to a search and to RL with the reward models that were trained from it."""

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from dataclasses import fields

import pytest

import data
from conftest import ROOT
from helpers import assert_same_run, metrics, ranks, save_policy, train, write_rows

CHAPTERS = ("sft", "tdrm", "search", "rl", "prime", "qrm")

# --------------------------------------------------------------------------------------------------
# --help.


@pytest.fixture
def help_of(capsys, monkeypatch):
    """help_of(script, words): what it prints when run as the main program, in this process."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
        with pytest.raises(SystemExit) as end:
            if script.endswith(".py"):
                runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        printed = capsys.readouterr()
        assert not end.value.code and not printed.err
        assert "%%" not in printed.out
        return printed.out

    return run


def assert_lists_options(printed, module):
    options = printed[printed.index("\noptions:") :]
    for field in fields(module.Config):
        assert f"\n  --{field.name}" in options


@pytest.mark.parametrize("name", CHAPTERS)
def test_help_of_a_chapter(name, help_of):
    module = importlib.import_module(f"{name}_minimal")
    printed = help_of(f"{name}_minimal.py")
    assert f"usage: {name}_minimal.py" in printed
    assert module.__doc__.strip() in printed
    assert_lists_options(printed, module)


@pytest.mark.parametrize("name", [name for name in CHAPTERS if name != "search"])
def test_help_of_the_estimate_lists_the_options_of_a_chapter(name, help_of):
    printed = help_of("parts.estimate", f"{name}_minimal.py")
    assert_lists_options(printed, importlib.import_module(f"{name}_minimal"))
    assert "\n  --world INT" in printed


def test_help_of_the_other_scripts(help_of):
    assert "usage: data.py" in help_of("data.py")
    assert "python -m parts.estimate tdrm_minimal.py" in help_of("parts.estimate")


def test_help_in_a_process_of_its_own(tmp_path):
    words = [sys.executable, os.path.join(ROOT, "tdrm_minimal.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert "usage: tdrm_minimal.py" in done.stdout and "\n  --n_step INT" in done.stdout
    assert not os.listdir(tmp_path)


# --------------------------------------------------------------------------------------------------
# Under torchrun: one start for all scripts, one after the other, each meeting at a port of its own
# (in the store that torchrun offers, each would find what the one before it left).

SEVERAL = """
import json, os, runpy, sys
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, words in json.loads(sys.argv[1]):
    sys.argv, os.environ["MASTER_PORT"] = words, str(port)
    runpy.run_path(words[0], run_name="__main__")
"""
LEARN = {"steps": 2, "batch_size": 8, "max_length": 128}
TDRM = LEARN | {"model": "runs/sft/model", "data": ("rows.jsonl",)}
SAMPLE = {"model": "runs/sft/model", "data": "problems.jsonl", "max_new_tokens": 8}
SEARCH = SAMPLE | {"n": 2, "beam": 2, "expand": 2, "problems": 4}
RL = SAMPLE | {"steps": 2, "prompts_per_step": 4, "group_size": 2, "max_length": 128}
TOKENS = {"credit": "token", "estimator": "ppo", "gamma": 0, "kl_reward": 0.1, "alpha": 0}
RUNS = [
    ("sft", LEARN | {"model": "policy", "data": "rows.jsonl", "max_new_tokens": 8}),
    ("tdrm", TDRM),
    ("qrm", LEARN | {"model": "runs/sft/model", "data": "pairs.jsonl"}),
    ("search", SEARCH | {"prm": ("runs/TDRM/model", "runs/Q-RM/model")}),
    ("rl", RL | {"prm": "runs/TDRM/model"}),
    ("rl", RL | TOKENS | {"prm": "runs/Q-RM/model", "out": "runs/tokens"}),
    ("prime", RL | {"accuracy": (0, 1)}),
]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def command(script, options):
    words = [os.path.join(ROOT, f"{script}_minimal.py")]
    for name, value in options.items():
        words.append(f"--{name}")
        words += [str(part) for part in (value if isinstance(value, tuple) else (value,))]
    return words


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where torchrun has run all of RUNS -> folder, what they printed."""
    home = tmp_path_factory.mktemp("scripts")
    save_policy(home / "policy")
    problems = data.make_problems(24)
    rows = data.make_trajectories(problems, 8, label_rollouts=4)
    right = {row["prompt"]: row["completions"] for row in rows if row["correct"]}
    pairs = []
    for row in rows:
        if not row["correct"] and row["prompt"] in right:
            chosen, rejected = right[row["prompt"]], row["completions"]
            sides = {"chosen": "\n\n".join(chosen), "rejected": "\n\n".join(rejected)}
            pairs.append({"prompt": row["prompt"]} | sides)
    for name, kept in (("rows", rows), ("problems", problems), ("pairs", pairs)):
        write_rows(home / f"{name}.jsonl", kept)
    (home / "several.py").write_text(SEVERAL)
    commands = json.dumps([(free_port(), command(*run)) for run in RUNS])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ROOT}
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 180}
    done = subprocess.run([*words, "several.py", commands], cwd=home, env=env, **more)
    assert done.returncode == 0, done.stdout
    return home, done.stdout


TRAINED = {  # the runs' folders, and those of their models
    "sft": ["model"],
    "TDRM": ["model"],
    "Q-RM": ["model"],
    "rl": ["model"],
    "tokens": ["critic", "model"],
    "prime": ["model", "prm"],
}


@pytest.mark.parametrize("name, models", TRAINED.items())
def test_torchrun_of_a_script_that_trains(name, models, home):
    home, output = home
    out = home / "runs" / name
    names = ["config.json", "metrics.jsonl", "state", "summary.json", *models]
    assert sorted(os.listdir(out)) == sorted(names)
    assert os.listdir(out / "state") == ["step_00000002"]
    first, second = metrics(out)[-2:]
    assert (first["step"], second["step"]) == (1, 2)
    assert second["grad_norm"] > 0 and second["skipped"] == 0
    assert output.count(f"the result is in runs/{name}/model") == 1  # the first process alone talks


def test_torchrun_of_search(home):
    home, output = home
    summary = json.loads((home / "runs" / "search" / "summary.json").read_text())
    assert summary["problems"] == 4
    methods = [row["method"] for row in summary["rows"]]
    for prm in ("TDRM", "Q-RM"):
        assert {f"best-of-n, {prm}", f"beam search 2 x 2, {prm}"} <= set(methods)
    assert output.count("best-of-n, TDRM") == 1
    assert len((home / "runs" / "search" / "samples.jsonl").read_text().splitlines()) == 8


def test_torchrun_is_as_any_two_processes(home, tmp_path, monkeypatch):
    home, output = home
    assert "2 steps of 8, 2 processes on cpu" in output
    monkeypatch.chdir(home)
    options = TDRM | {"out": str(tmp_path / "run")}
    assert ranks(2, tmp_path, train, "tdrm", options) == [0, 0]
    assert_same_run(tmp_path / "run", home / "runs" / "TDRM")
