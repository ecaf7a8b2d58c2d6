"""Every chapter on a real chat model and real text: SmolLM2-135M-Instruct in the folder that
SMOLLM2_DIR names, GSM8K's files in the one that GSM8K_DIR names; without them these tests skip.

A few rows and steps each, chapter after chapter, on one process, and sft, tdrm and rl on two.
`pytest -s tests/test_real.py` prints figures and seconds.
"""

import json
import os
import shutil
import time

import pytest
import torch

import data
import prime_minimal as prime
import qrm_minimal as qrm
import rl_minimal as rl
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from helpers import metrics, ranks, train, write_rows
from parts import runs
from parts.decoding import sample
from parts.formats import read_trajectories
from parts.models import Layout, load_policy, load_tokenizer
from parts.rewards import load_reward_model
from parts.runs import Processes

MODEL, GSM8K = os.environ.get("SMOLLM2_DIR", ""), os.environ.get("GSM8K_DIR", "")
pytestmark = [
    pytest.mark.skipif(
        not os.path.exists(os.path.join(MODEL, "model.safetensors")),
        reason="SMOLLM2_DIR: no folder of SmolLM2-135M-Instruct",
    ),
    pytest.mark.skipif(
        not os.path.exists(os.path.join(GSM8K, "test.jsonl")),
        reason="GSM8K_DIR: no test.jsonl of GSM8K",
    ),
]
END = "<|im_end|>"
ASK = {"prompt": "{question} Put the answer in \\boxed{}.", "system": "Think step by step."}
LINES = ASK | {"step_end": "line"}
SETTINGS = LINES | {"model": MODEL, "max_length": 256}
FEW = SETTINGS | {"steps": 2, "batch_size": 2, "eval_every": 0}
LEARN = FEW | {"dtype": "bfloat16", "data": ("rows.jsonl",)}
SAMPLE = {"data": ("problems.jsonl",), "max_new_tokens": 16}
ROLL = FEW | SAMPLE | {"eval": ("eval_problems.jsonl",), "dtype": "float32"}
ROLL |= {"prompts_per_step": 1, "group_size": 2}


def load(name):
    with open(os.path.join(GSM8K, name)) as f:
        return [json.loads(line) for line in f]


def solutions(row):
    """The four models' solutions to a question -> rows of trajectories, right and wrong ones."""
    made = []
    for answer in row.values():
        if isinstance(answer, dict) and answer["solution"].strip():
            facts = {"response": answer["solution"], "correct": answer["is_correct"]}
            made.append({"prompt": row["question"]} | facts)
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The working folder: a few short questions of GSM8K with solutions of both kinds."""
    home = tmp_path_factory.mktemp("real")
    both, answered = [], load("example_model_solutions.jsonl")
    for row in sorted(answered, key=lambda row: len(str(row))):
        rows = solutions(row)
        if {each["correct"] for each in rows} == {True, False}:
            both.append(rows)
    train_rows = [each for rows in both[:6] for each in rows]
    eval_rows = [each for rows in both[6:8] for each in rows]
    write_rows(home / "rows.jsonl", train_rows)
    write_rows(home / "eval_rows.jsonl", eval_rows)
    problems = sorted(load("test.jsonl"), key=lambda row: len(row["question"]))
    write_rows(home / "problems.jsonl", problems[:4])
    write_rows(home / "eval_problems.jsonl", problems[4:5])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home
    shutil.rmtree(home)  # 4 GB of models


def without_checkpoints(*_):
    """A checkpoint of this model is 2 GB; other tests write them."""
    runs.save_checkpoint = quiet


def quiet(*_):
    pass


@pytest.fixture(autouse=True)
def no_checkpoints(monkeypatch):
    monkeypatch.setattr(runs, "save_checkpoint", quiet)


def run(script, options, world=1, place=None):
    """Run a chapter -> the rows of metrics.jsonl, seconds printed."""
    begin = time.time()
    if world == 1:
        script.main(script.Config(**options), Processes())
    else:
        name = script.__name__.removesuffix("_minimal")
        fault = (without_checkpoints,)
        assert ranks(world, place, train, name, options, fault) == [0] * world
    print(f"\n{options.get('out')}, {world} processes: {time.time() - begin:.1f} s")
    path = os.path.join(options.get("out", ""), "metrics.jsonl")
    if not os.path.exists(path):
        return []
    rows = metrics(options["out"])
    print(json.dumps(rows[-1]))
    assert all(row.get("skipped", 0) == 0 for row in rows)
    return rows


def test_steps_and_ends(home):
    """Lines are steps; a solution to imitate ends with the chat's turn, and so does a response."""
    tokenizer, layout = load_tokenizer(MODEL), Layout(ASK["prompt"], ASK["system"], "line")
    for row in read_trajectories("rows.jsonl", "\n"):
        ids, begin, ends = sft.spelling(tokenizer, layout)(row["prompt"], row["completions"])
        assert tokenizer.convert_ids_to_tokens(ids[-1]) == END
        starts = [begin, *(end + 1 for end in ends)]
        closed = [line + "\n" for line in row["completions"][:-1]] + row["completions"][-1:]
        got = [tokenizer.decode(ids[a : b + 1]) for a, b in zip(starts, ends)]
        assert got == closed and len(got) > 1
        asked = tokenizer.decode(ids[:begin])
        assert asked.startswith(f"<|im_start|>system\n{ASK['system']}{END}\n<|im_start|>user\n")
        question = ASK["prompt"].replace("{question}", row["prompt"])
        assert asked.endswith(f"{question}{END}\n<|im_start|>assistant\n")
    model = load_policy(MODEL, torch.float32)
    question = "What is the capital of France? Answer in one short sentence."
    ((one,),) = sample(model, tokenizer, [question], 1, 0.0, 24)
    assert one.finished and tokenizer.convert_ids_to_tokens(one.token_ids[-1]) == END
    assert "Paris" in one.text and END not in one.text


@pytest.mark.parametrize("world", [1, 2])
def test_sft(world, home, tmp_path):
    more = {"max_new_tokens": 16, "eval_problems": 1, "lr": 1e-5, "out": f"sft{world}"}
    rows = run(sft, LEARN | more, world, tmp_path)
    assert 0.1 < rows[0]["loss"] < 3  # fluent text is what it knows
    assert [row["step"] for row in rows] == [1, 2]


@pytest.fixture(scope="module")
def prm(home):
    """A TDRM from outcomes, trained on two processes."""
    more = {"eval": ("eval_rows.jsonl",), "lr": 1e-5, "out": "tdrm2"}
    rows = run(tdrm, LEARN | more, 2, str(home))
    assert [row["step"] for row in rows] == [1, 2]
    return "tdrm2/model"


def test_tdrm(prm, home, tmp_path):
    """On one process it is what it is on two."""
    more = {"eval": ("eval_rows.jsonl",), "lr": 1e-5, "out": "tdrm1"}
    rows = run(tdrm, LEARN | more)
    both = zip(rows, metrics("tdrm2"))
    assert all(one["loss"] == pytest.approx(two["loss"], rel=0.02) for one, two in both)
    summary = json.loads((home / "tdrm1" / "summary.json").read_text())
    assert 0 <= summary["auroc_last"] <= 1 and 0 < summary["abs_delta_v"] < 1


def test_score(prm, home, capsys):
    begin = time.time()
    options = {"model": prm, "score": "eval_rows.jsonl", "dtype": "float32", "step_end": "line"}
    tdrm.main(tdrm.Config(**options), Processes())
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in printed if line.startswith('{"source"')]
    wanted = list(read_trajectories("eval_rows.jsonl", "\n"))
    assert [len(row["values"]) for row in rows] == [len(row["completions"]) for row in wanted]
    reward = load_reward_model(prm, torch.float32)  # the same by hand
    assert reward.layout == Layout(ASK["prompt"], ASK["system"], "line")
    ids, _, ends = reward.encode(wanted[0]["prompt"], wanted[0]["completions"])
    with torch.no_grad():
        values = reward.model(input_ids=torch.tensor([ids])).logits[0, ends, 0].sigmoid()
    assert rows[0]["values"] == pytest.approx(values.tolist(), abs=1e-4)
    with capsys.disabled():
        print(f"\n--score, {len(rows)} rows: {time.time() - begin:.1f} s")


SEARCH = LINES | SAMPLE | {"model": MODEL, "dtype": "float32", "problems": 1, "n": 2}


def test_search(home):
    """--prm none, then nothing but the prompt set."""
    run(search, SEARCH | {"prm": ("none",), "max_new_tokens": 24, "out": "search"})
    summary = json.loads((home / "search" / "summary.json").read_text())
    methods = [row["method"] for row in summary["rows"]]
    assert methods == ["pass@1", "greedy decoding", "oracle", "majority"]
    print(json.dumps(summary["rows"]))
    with open("search/samples.jsonl") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == 2
    assert not any("\n" in step for row in rows for step in row["completions"])


def test_search_with_a_reward_model(prm, home):
    trees = {"prm": (prm,), "beam": 2, "expand": (2,), "max_step_tokens": 12, "out": "trees"}
    run(search, SEARCH | trees)
    summary = json.loads((home / "trees" / "summary.json").read_text())
    print(json.dumps(summary["rows"]))
    methods = {row["method"] for row in summary["rows"]}
    assert {"best-of-n, tdrm2", "beam search 2 x 2, tdrm2", "dvts 2 x 2, tdrm2"} <= methods
    assert all(row["generated"] > 0 for row in summary["rows"])


@pytest.mark.parametrize("world", [1, 2])
def test_rl(world, prm, home, tmp_path):
    steps = {1: 2, 2: 1}[world]
    options = ROLL | {"prm": prm, "lr": 1e-6, "steps": steps, "out": f"rl{world}"}
    _, *rows = run(rl, options, world, tmp_path)
    assert all(row["max_ratio_deviation"] < 1e-3 and 0 < row["prm"] < 1 for row in rows)
    assert len(rows) == steps


def test_prime(home):
    options = ROLL | {"accuracy": (0.0, 1.0), "lr": 1e-6, "prm_lr": 1e-5, "update": "before"}
    _, row = run(prime, options | {"steps": 1, "out": "prime"})
    assert row["max_ratio_deviation"] < 1e-3 and row["grad_norm"] > 0
    assert row["prm_loss"] == pytest.approx(0.6931, abs=1e-3)  # it is its own reference


def test_qrm(home):
    options = LEARN | {"eval": ("eval_rows.jsonl",), "pairs_per_question": 1, "lr": 1e-5}
    rows = run(qrm, options | {"out": "qrm"})
    summary = json.loads((home / "qrm" / "summary.json").read_text())
    assert len(rows) == 2 and 0 <= summary["pair_accuracy"] <= 1
    assert load_reward_model("qrm/model", torch.bfloat16).layout.step_end == "\n"
