"""--verifier FILE:FUNCTION: what says whether a response is right, in every script that asks."""

import json

import pytest

import data
import qrm_minimal as qrm
import rl_minimal as rl
import search_minimal as search
from helpers import metrics, save_policy
from parts.formats import BadInput
from parts.runs import Processes
from parts.verifier import check, load_verifier

OWN = """
def even(response, row):
    return len(response) % 2 == 0

def half(response, row):
    return 0.5

def of_the_row(response, row):
    return row["extra"]["right"]  # the whole row of the file

def raises(response, row):
    raise RuntimeError

def too_much(response, row):
    return 2

def text(response, row):
    return "yes"

def not_a_number(response, row):
    return float("nan")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("verifier")
    save_policy(home / "policy")
    (home / "own.py").write_text(OWN)
    problems = data.make_problems(40)
    rows = [p | {"extra": {"right": i % 2}} for i, p in enumerate(problems)]
    (home / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("even", (1.0, False)),
        ("half", (0.5, False)),
        ("of_the_row", (1.0, False)),
        ("raises", (0.0, True)),
        ("too_much", (0.0, True)),
        ("text", (0.0, True)),
        ("not_a_number", (0.0, True)),
    ],
)
def test_check(home, name, wanted):
    row = {"question": "q", "answer": "1", "row": {"extra": {"right": True}}}
    assert check(f"{home}/own.py:{name}", "ab", row) == wanted


def test_without_one_the_answer_is_checked():
    row = {"question": "1+1?", "answer": "2"}
    assert check(None, "\\boxed{2}", row) == (1.0, False)
    assert check(None, "\\boxed{3}", row) == (0.0, False)
    assert check(None, "\\boxed{2}", {}) == (0.0, True)  # a row without an answer


@pytest.mark.parametrize("spec", ["own.py", "nothing.py:even", "own.py:nothing", "bad.py:even"])
def test_bad_specifications(home, spec):
    (home / "bad.py").write_text("def even(:")
    with pytest.raises(BadInput, match="--verifier"):
        load_verifier(f"{home}/{spec}")


def options(home, tmp_path, **more):
    files = {"model": str(home / "policy"), "data": (str(home / "problems.jsonl"),)}
    return files | {"out": str(tmp_path / "out"), "max_new_tokens": 4} | more


def test_rl_pays_what_it_says(home, tmp_path):
    more = {"steps": 1, "alpha": 1.0, "eval_problems": 2, "prompts_per_step": 4, "group_size": 2}
    for name, paid, failed in (("half", 0.5, 0), ("raises", 0.0, 1)):
        more["verifier"] = f"{home}/own.py:{name}"
        rl.main(rl.Config(**options(home, tmp_path, **more)), Processes())
        row = metrics(tmp_path / "out")[-1]
        assert (row["correct"], row["verifier_failed"]) == (paid, failed)


def test_search_and_labels(home, tmp_path):
    more = {"prm": ("none",), "n": 2, "verifier": f"{home}/own.py:of_the_row"}
    rows = search.main(search.Config(**options(home, tmp_path, **more)), Processes())
    assert rows[0]["accuracy"] == 0.5
    solutions = data.make_trajectories(data.make_problems(4))
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in solutions))
    more = {"label_rollouts": 2, "verifier": f"{home}/own.py:even", "data": (str(path),)}
    more |= {"out": str(tmp_path / "labels")}
    summary = search.main(search.Config(**options(home, tmp_path, **more)), Processes())
    assert 0 <= summary["mean_label"] <= 1


def test_pairs(home, tmp_path):
    more = {"verifier": f"{home}/own.py:even", "steps": 1, "group_size": 4, "max_new_tokens": 30}
    found = options(home, tmp_path) | more
    summary = qrm.main(qrm.Config(**found), Processes())
    assert summary["pairs"] > 0  # an untrained policy is never right, but its texts have lengths
