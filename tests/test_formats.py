"""Every format read exactly, every published shape of file read or refused in a helpful line, and
every kind of bad input answered with one line that says where and what."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from parts import formats
from parts.formats import BadInput, read_pairs, read_problems, read_trajectories, recognise

SHAPES = Path(__file__).parent.parent.parent / "shared" / "cases" / "shapes"


def write(path, *rows):
    """Writes rows (dicts as JSON, texts and bytes as they are) as the lines of a file."""
    texts = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    lines = [text if isinstance(text, bytes) else text.encode() for text in texts]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def trajectory(path, number=1, **values):
    base = {"prompt": "Q?", "answer": None, "first_error": None, "source": f"{path}:{number}"}
    return {**base, **values}


STEPWISE = {"prompt": "Q?", "completions": ["a", "b"], "labels": [True, 0.25]}
SHEPHERD = {
    "input": "What is 2 + 1? Step 1: 2 + 1 = 3. ки\nStep 2: 3 - 0 = 3. The answer is: 3 ки",
    "label": "What is 2 + 1? Step 1: 2 + 1 = 3. +\nStep 2: 3 - 0 = 3. The answer is: 3 -",
    "task": "GSM8K",
}


def chat(*turns):
    roles = ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, turns)]


TURNS = chat("Q? Step 1: one.", "+", "Step 2: two. ", "-")
RLHFLOW = {"conversations": TURNS}
BENCH = {"id": "x", "problem": "Q?", "steps": ["a", "b", "c"], "label": 1}
BENCH["final_answer_correct"] = True
PAIR = {"prompt": "Q?", "chosen": "yes", "rejected": "no"}
PROBLEM = {"question": "Q?", "answer": "18"}
MATH = {"problem": "Q?", "solution": r"Not \boxed{1} but $\boxed{42}$.", "level": "Level 5"}


def prm800k(*steps, finish="solution", **question):
    label = {"steps": list(steps), "total_time": 1, "finish_reason": finish}
    return {"labeler": "x", "question": {"problem": "Q?", **question}, "label": label}


def candidates(*ratings, chosen=None, human=None):
    rated = [
        {"text": f"c{k}", "rating": rating, "flagged": None} for k, rating in enumerate(ratings)
    ]
    return {"completions": rated, "human_completion": human, "chosen_completion": chosen}


# ---- Every format, exactly.


def test_stepwise(tmp_path):
    prompt = [{"role": "system", "content": ""}, {"role": "user", "content": "Q?"}]
    path = write(
        tmp_path / "t.json",
        STEPWISE,
        "",
        "  ",
        {"prompt": prompt, "completions": [" a\n"], "labels": [0], "values": [0.1]},
        {"prompt": "Q?", "completions": ["a"], "labels": None, "correct": 1},
        {"prompt": "Q?", "completions": ["a"], "labels": [1], "correct": False, "answer": 7},
    )
    third = {"prompt": prompt, "completions": [" a\n"], "labels": [0.0], "correct": False}
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, completions=["a", "b"], labels=[1.0, 0.25], correct=False),
        trajectory(path, 4, **third),
        trajectory(path, 5, completions=["a"], labels=None, correct=True),
        trajectory(path, 6, completions=["a"], labels=[1.0], correct=False, answer="7"),
    ]
    first = next(read_trajectories(path))
    assert [type(label) for label in first["labels"]] == [float, float]
    assert recognise(path) == ("trajectories", "stepwise supervision")


def test_answer_is_checked_where_the_outcome_is_not_given(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(formats, "verify", lambda *asking: asked.append(asking) or True)
    row = {**STEPWISE, "completions": ["a", "so 7"], "answer": "7", "labels": [1, 0]}
    path = write(tmp_path / "t", row)
    expected = {"completions": ["a", "so 7"], "labels": [1.0, 0.0], "answer": "7", "correct": True}
    assert list(read_trajectories(path)) == [trajectory(path, **expected)]
    assert asked == [("a\n\nso 7", "7")]


def test_math_shepherd(tmp_path):
    stray = {"input": "Mr. X ки has 2. Step 1: two ки", "label": "Mr. X + has 2. Step 1: two -"}
    text = "How many? It is 2. {}\nSo 2. {}\n"
    unnumbered = {"input": text.format("ки", "ки"), "label": text.format("-", "+")}
    path = write(tmp_path / "t", SHEPHERD, stray, unnumbered)
    steps = ["Step 1: 2 + 1 = 3.", "Step 2: 3 - 0 = 3. The answer is: 3"]
    first = {"prompt": "What is 2 + 1?", "completions": steps, "labels": [1.0, 0.0]}
    second = {"prompt": "Mr. X  has 2.", "completions": ["Step 1: two"], "labels": [0.0]}
    third = {"prompt": "How many?", "completions": ["It is 2.", "So 2."], "labels": [0.0, 1.0]}
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, correct=False, **first),
        trajectory(path, 2, correct=False, **second),
        trajectory(path, 3, correct=True, **third),
    ]
    assert recognise(path) == ("trajectories", "Math-Shepherd")


def test_rlhflow(tmp_path):
    path = write(tmp_path / "t", RLHFLOW, {"conversations": chat("Q,\n\nreally?\n\nOne.", "+")})
    steps = ["Step 1: one.", "Step 2: two."]
    second = {"prompt": "Q,\n\nreally?", "completions": ["One."], "labels": [1.0]}
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, completions=steps, labels=[1.0, 0.0], correct=False),
        trajectory(path, 2, correct=True, **second),
    ]
    assert recognise(path) == ("trajectories", "RLHFlow")


def test_prm800k(tmp_path):
    by_hand, none = {"text": "h", "rating": None}, {"completions": None, "chosen_completion": None}
    path = write(
        tmp_path / "t",
        prm800k(candidates(-1, 1, chosen=1), candidates(0, chosen=0), ground_truth_answer="4"),
        prm800k(
            candidates(1, chosen=0), candidates(0, -1, -1), candidates(1), finish="found_error"
        ),
        prm800k(candidates(-1, human=by_hand), candidates(1, None, chosen=1), finish="give_up"),
        prm800k(finish="bad_problem"),
        prm800k({**none, "human_completion": None}, finish="give_up"),
        prm800k(candidates(-1, chosen=0), candidates(1, chosen=0), finish="solution"),
        prm800k(candidates(-1, chosen=0), finish="give_up"),
    )
    left_out = []
    assert list(read_trajectories(path, left_out=left_out)) == [
        trajectory(path, 1, completions=["c1", "c0"], labels=[1.0, 1.0], answer="4", correct=True),
        trajectory(path, 2, completions=["c0", "c1"], labels=[1.0, 0.0], correct=False),
        trajectory(path, 3, completions=["h", "c1"], labels=[1.0, 1.0], correct=None),
        trajectory(path, 6, completions=["c0", "c0"], labels=[0.0, 1.0], correct=None),
        trajectory(path, 7, completions=["c0"], labels=[0.0], correct=False),
    ]
    assert left_out == [f"{path}:{number}: has no rated step" for number in (4, 5)]
    assert recognise(path) == ("trajectories", "PRM800K")


def test_process_bench(tmp_path):
    path = write(
        tmp_path / "t",
        BENCH,
        {"problem": "Q?", "steps": ["a"], "label": -1},
        {"problem": "Q?", "steps": ["a", "b"], "label": 0},
    )
    bench = {"completions": ["a", "b", "c"], "labels": [1.0, 0.0, 0.0], "first_error": 1}
    wrong = {"completions": ["a", "b"], "labels": [0.0, 0.0], "first_error": 0}
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, correct=True, **bench),
        trajectory(path, 2, completions=["a"], labels=[1.0], correct=True, first_error=-1),
        trajectory(path, 3, correct=False, **wrong),
    ]
    assert recognise(path) == ("trajectories", "ProcessBench")


WORKED = "2*9=<<2*9=18>>18\nSo 18."


@pytest.mark.parametrize(
    "row, expected",
    [
        (PROBLEM, ("Q?", "18", None)),
        ({"problem": "Q?", "solution": "Because.", "answer": 18}, ("Q?", "18", "Because.")),
        ({"prompt": "Q?", "gold": 0.5}, ("Q?", "0.5", None)),
        ({"instruction": "Q?", "label": "x+1 "}, ("Q?", "x+1", None)),
        ({"question": "Q?", "answer": f"{WORKED}\n#### 1,018"}, ("Q?", "1,018", WORKED)),
        ({"question": "Q?", "answer": "#### -3"}, ("Q?", "-3", None)),
        ({"question": "Q?", "ground_truth": "9 + 9 = 18\nA: 18"}, ("Q?", "18", "9 + 9 = 18")),
        ({"QUESTION": "Q?", "Answer": "18", "Level": 1}, ("Q?", "18", None)),
        ({"question": "Q?", "answer": None, "final_answer": ["1", 2]}, ("Q?", "1, 2", None)),
        (
            {"question": "Q?", "answer": "", "solution": "So \\boxed{3}."},
            ("Q?", "3", "So \\boxed{3}."),
        ),
        (
            {"question": "Where?", "context": "A map.", "answer": "18"},
            ("A map.\n\nWhere?", "18", None),
        ),
        ({**PROBLEM, "choices": None, "system": ""}, ("Q?", "18", None)),
        ({"question": chat("Q?"), "answer": "18"}, (chat("Q?"), "18", None)),
    ],
)
def test_question_and_answer(tmp_path, row, expected):
    path = write(tmp_path / "p", row)
    (read,) = read_problems(path)
    assert {key: value for key, value in read.pop("row").items() if key in row} == row
    keys = ("question", "answer", "solution", "source")
    assert read == dict(zip(keys, (*expected, f"{path}:1")))
    assert recognise(path) == ("problems", "question and answer")


def test_math(tmp_path):
    path = write(tmp_path / "p", MATH)
    expected = {"question": "Q?", "answer": "42", "solution": MATH["solution"], "row": MATH}
    assert list(read_problems(path)) == [{**expected, "source": f"{path}:1"}]
    assert recognise(path) == ("problems", "MATH")


@pytest.mark.parametrize("solution", ["34", "$x+1$", "\\frac{1}{2}", "5 cm", "(1, 2)"])
def test_a_solution_that_is_only_an_answer(tmp_path, solution):
    (row,) = read_problems(write(tmp_path / "p", {"prompt": "Q?", "solution": solution}))
    assert (row["answer"], row["solution"]) == (solution, None)


def test_pairs(tmp_path):
    turns = chat("Q?", " yes")
    path = write(
        tmp_path / "p",
        {**PAIR, "chosen": "\n yes ", "rejected": ["no"], "answer": 3},
        {"question": turns[:1], "chosen": turns, "rejected": turns[1:], "label": "yes"},
        {"instruction": "Q?", "chosen": "a", "rejected": "a", "label": None},
        {"chosen": chat("a", "b", "Q?", "yes"), "rejected": chat("a", "b", "Q?", "no")},
        {**PAIR, "system": "S", "chosen": turns[1]},
    )
    base = {"prompt": "Q?", "chosen": "yes ", "rejected": "no", "answer": "3"}
    system = {"role": "system", "content": "S"}
    expected = [
        base,
        {"prompt": turns[:1], "chosen": "yes", "rejected": "yes", "answer": "yes"},
        {**base, "chosen": "a", "rejected": "a", "answer": None},
        {**base, "prompt": chat("a", "b", "Q?"), "chosen": "yes", "answer": None},
        {**base, "prompt": [system, *turns[:1]], "chosen": "yes", "answer": None},
    ]
    sources = [f"{path}:{number}" for number in range(1, 6)]
    assert list(read_pairs(path)) == [
        {**row, "source": source} for row, source in zip(expected, sources)
    ]
    assert recognise(path) == ("pairs", "preference pairs")


# ---- Responses in one piece, and what is asked of a row.


def test_steps_are_lines_where_asked(tmp_path):
    row = {"prompt": "Q?", "response": "One.\nTwo.\n\n\\boxed{2}\n", "answer": "2"}
    path = write(tmp_path / "t", row)
    assert next(read_trajectories(path))["completions"] == ["One.\nTwo.", "\\boxed{2}"]
    lines = next(read_trajectories(path, step_end="\n"))
    assert lines["completions"] == ["One.", "Two.", "\\boxed{2}"] and lines["correct"] is True


def test_a_row_is_read_as_what_it_is_asked_for(tmp_path):
    def said(row):
        return row["prompt"], row["completions"], row["answer"], row["correct"]

    row = {"problem": "Q?", "answer": "2", "solution": "a\n\nSo 2."}
    path = write(tmp_path / "t", {**row, "messages": chat("P?", "\\boxed{3}")})
    (problem,), (trained,) = read_problems(path), read_trajectories(path)
    assert (problem["question"], problem["answer"]) == ("Q?", "2")
    assert said(trained) == (chat("P?"), ["\\boxed{3}"], "2", False)
    (worked,) = read_trajectories(write(tmp_path / "t", row), outcome=False)
    assert said(worked) == ("Q?", ["a", "So 2."], "2", True)
    with pytest.raises(BadInput, match="holds problems"):
        list(read_trajectories(path))


def test_what_is_left_out_is_told(tmp_path, capsys):
    rows = [PROBLEM, {**PROBLEM, "answer": "Proof"}, PROBLEM, {**PROBLEM, "answer": None}]
    paths = [write(tmp_path / name, *rows) for name in "ab"]
    why = [":2: no gold answer: 'answer' is 'Proof'", ":4: no gold answer: 'answer' is None"]
    told = [str(path) + text for path in paths for text in why]
    left_out = []
    assert len(list(read_problems(paths, left_out=left_out))) == 4
    assert left_out == told and not capsys.readouterr().err
    assert len(list(read_problems(paths))) == 4
    err = capsys.readouterr().err.splitlines()
    assert err == [f"left out 2 rows: {'; '.join(told[k : k + 2])}" for k in (0, 2)]


# ---- Files.


def test_streams_and_opens_late(tmp_path):
    path = write(tmp_path / "t", STEPWISE, "garbage")
    rows = read_trajectories(path)
    assert next(rows)["source"] == f"{path}:1"
    with pytest.raises(BadInput, match=":2: "):
        next(rows)
    assert recognise(path)[0] == "trajectories"
    for read in (read_trajectories, read_problems, read_pairs):
        read(tmp_path / "missing")  # no error before a row is asked for


def test_several_files_each_in_its_own_format(tmp_path):
    paths = [write(tmp_path / "a", STEPWISE), str(write(tmp_path / "b", SHEPHERD, SHEPHERD))]
    sources = [row["source"] for row in read_trajectories(paths)]
    assert sources == [f"{paths[0]}:1", f"{paths[1]}:1", f"{paths[1]}:2"]


@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_and_objects_one_after_another(tmp_path, indent):
    objects = [json.dumps({"answer": k, "question": "Q?"}, indent=indent) for k in range(3)]
    for text in ("[" + ",\n".join(objects) + "]\n", "\n".join(objects)):
        path = write(tmp_path / "p", "", text)
        rows = list(read_problems(path))
        assert [row["answer"] for row in rows] == ["0", "1", "2"]
        as_lines = text[0] == "{" and not indent
        assert rows[2]["source"] == (f"{path}:4" if as_lines else f"{path}:item 3")


def test_encodings_that_are_fine(tmp_path):
    text = json.dumps(STEPWISE).replace("Q?", "\u2028 ö \\ud83d\\ude00")
    path = write(tmp_path / "bom", b"\xef\xbb\xbf" + text.encode() + b"\r", b"\r", text)
    assert [(row["prompt"], row["source"]) for row in read_trajectories(path)] == [
        ("\u2028 ö \U0001f600", f"{path}:1"),
        ("\u2028 ö \U0001f600", f"{path}:3"),
    ]
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert len(list(read_trajectories(packed))) == 2


# ---- Bad input. A case: reader, line to be named, phrase of the message, lines of the file.

T, P, R = read_trajectories, read_problems, read_pairs


def with_(row, **values):
    return [{**row, **values}]


def steps(**values):
    return with_(STEPWISE, **values)


def bench(**values):
    return with_(BENCH, **values)


def one_step(text, marked):
    return [{"input": f"Q? Step 1: {text}", "label": f"Q? Step 1: {marked}"}]


CASES = [
    (T, 1, "keys: foo, bar; wanted trajectories with the keys of stepwise", [{"foo": 1, "bar": 2}]),
    (P, 1, "its keys: none", [{}]),
    (T, 2, "lacks completions", [STEPWISE, {"prompt": "Q?", "labels": [1]}]),
    (T, 2, "lacks steps", [BENCH, {"problem": "Q?", "label": 0}]),
    (T, 2, "lacks label.steps", [prm800k(candidates(1, chosen=0)), {**prm800k(), "label": 1}]),
    (T, 2, "rows before are Math-Shepherd", [SHEPHERD, STEPWISE]),
    (P, 2, "is ProcessBench", [PROBLEM, {**PROBLEM, **BENCH}]),
    (T, 1, "holds pairs (preference pairs)", [PAIR]),
    (T, 1, "holds problems (question and answer)", [PROBLEM]),
    (P, 1, "holds trajectories (ProcessBench)", [BENCH]),
    (R, 1, "wanted pairs with the keys of preference pairs: chosen + rejected", [MATH]),
    (T, 1, "nothing to learn from", [{"prompt": "Q?", "completions": ["a"]}]),
    (T, 1, "nothing to learn from", [{"prompt": "Q?", "response": "a", "answer": "proof"}]),
    (T, 1, "needs 'labels', or else 'correct' or 'answer'", steps(labels=None)),
    (T, 2, "3 entries for 2 completions", [STEPWISE, *steps(labels=[1, 1, 1])]),
    (T, 1, "0 entries for 2 completions", steps(labels=[])),
    (T, 1, "'labels' should be a list, is text", steps(labels="+-")),
    (T, 1, "label 2 should be true, false or from 0 to 1, is 1.5", steps(labels=[1, 1.5])),
    (T, 1, "label 1 should be", steps(labels=[-1, 1])),
    (T, 1, "is inf", ['{"prompt": "Q", "completions": ["a"], "labels": [1e999]}']),
    (T, 1, "label 2", steps(labels=[1, "x\ny"])),
    (T, 1, "is None", steps(labels=[1, None])),
    (T, 1, "NaN is no JSON", ['{"prompt": "Q", "completions": ["a"], "labels": [NaN]}']),
    (T, 1, "'completions' should be a list, is empty", steps(completions=[])),
    (T, 1, "'completions' should be a list, is text", steps(completions="a")),
    (T, 1, "'step 2' is blank", steps(completions=["a", " \n"])),
    (T, 1, "'step 2' should be text, is a number", steps(completions=["a", 2])),
    (T, 1, "'prompt' is blank", steps(prompt=" ")),
    (T, 1, "'prompt' should be text, is null", steps(prompt=None)),
    (T, 1, "'prompt' should be a list, is empty", steps(prompt=[])),
    (T, 1, "'prompt' is blank", steps(prompt=chat(""))),
    (T, 1, "'role' and 'content'", steps(prompt=[{"content": "Q"}])),
    (T, 1, "list of messages", steps(prompt=["Q"])),
    (T, 1, "list of messages", steps(prompt=[{"role": "user", "content": ["Q"]}])),
    (T, 1, "'final_answer_correct' should be true or false", steps(correct="y\r\nes")),
    (T, 1, "'answer' should be text, is true or false", steps(answer=True)),
    (T, 1, "in the tag 'ки'", one_step("a ки b", "a + b")),
    (T, 1, "in the tag 'ки'", one_step("a", "a")),
    (T, 1, "with + or - for its 2 tags", with_(SHEPHERD, label=SHEPHERD["label"][:-1])),
    (T, 1, "for its 2 tags", with_(SHEPHERD, label=SHEPHERD["label"] + "\nStep 3: -")),
    (T, 1, "with + or -", one_step("a ки", "a ?")),
    (T, 1, "'step 2' is blank", one_step("a кики", "a ++")),
    (T, 1, "no question", [{"input": "Step 1: a ки", "label": "Step 1: a +"}]),
    (T, 1, "'input' should be text, is null", [{"input": None, "label": ""}]),
    (T, 1, "should alternate", [{"conversations": TURNS[:3]}]),
    (T, 1, "should alternate", [{"conversations": TURNS[1:]}]),
    (T, 1, "should alternate", [{"conversations": TURNS[:3] + chat("", "ok")[1:]}]),
    (T, 1, "neither 'Step 1:'", [{"conversations": chat("Q", "+")}]),
    (T, 1, "should hold a + or -", [{"question": "Q?", "process": "a", "label": ["?"]}]),
    (T, 1, "2 entries for 1", [{"question": "Q?", "process": "a", "label": ["+", "-"]}]),
    (T, 1, "should be a list, is text", with_(prm800k(), label={"steps": "a"})),
    (T, 1, "should hold objects, holds a list", [prm800k(["a"])]),
    (T, 1, "'completions' should be a list", [prm800k({"completions": "a"})]),
    (T, 1, "'chosen_completion' is 1 with 1 'completions'", [prm800k(candidates(1, chosen=1))]),
    (T, 1, "'rating': -1, 0 or 1", [prm800k(candidates(2, chosen=0))]),
    (T, 1, "'text' should be text, is null", [prm800k({"completions": [{"rating": 1}]})]),
    (T, 1, "has no rated step", [prm800k()]),
    (T, 1, "from -1 (no error) to 2 (last), is 3", bench(label=3)),
    (T, 1, "is True", bench(label=True)),
    (T, 1, "'steps' should be a list, is empty", bench(steps=[])),
    (T, 1, "'final_answer_correct' should be", bench(final_answer_correct="no")),
    (T, 1, "2 entries for 1", [{"prompt": "Q?", "answers": ["a"], "label": [1, 0]}]),
    (T, 1, "should be one turn", with_(PROBLEM, response=chat("a", "b"))),
    (T, 1, "does not end in a message of the assistant", [{"messages": chat("a", "b", "c")}]),
    (P, 1, "'question' should be a list of messages", with_(PROBLEM, question=["Q"])),
    (P, 1, "no gold answer: 'answer' is ' '", with_(PROBLEM, answer=" ")),
    (P, 1, "no gold answer: 'answer' is 'notfound'", with_(PROBLEM, answer="notfound")),
    (P, 1, "'answer' should be text, is true or false", with_(PROBLEM, answer=False)),
    (P, 1, "'answer' should be text, is an object", with_(PROBLEM, answer={"a": 1})),
    (P, 1, "'label' should be text, is a list", [{"problem": "Q?", "label": [1, 0]}]),
    (P, 1, "no gold answer: 'answer' is '18\\n#### '", with_(PROBLEM, answer="18\n#### ")),
    (P, 1, "'solution' should be text, is an object", with_(PROBLEM, solution={"a": 1})),
    (P, 1, "'solution' has no \\boxed{}", with_(MATH, solution="It is 2.")),
    (P, 1, "'solution' has no \\boxed{}", with_(MATH, solution="Trivial.")),
    (P, 1, "has 'choices', which is not read", with_(PROBLEM, choices=["17", "18"])),
    (P, 1, "has 'reasoning_steps', which is not read", with_(PROBLEM, reasoning_steps=["a"])),
    (P, 1, "has 'context' beside a chat", with_(PROBLEM, question=chat("Q?"), context="A map.")),
    (R, 2, "'chosen' should be text, is null", [PAIR, {**PAIR, "chosen": None}]),
    (R, 1, "'rejected' is blank", with_(PAIR, rejected=" ")),
    (R, 1, "'rejected' should be text", with_(PAIR, rejected=["a", "b"])),
    (R, 1, "'chosen' does not end in a message of the", with_(PAIR, chosen=chat("a"))),
    (R, 1, "has no prompt", [{"chosen": "a", "rejected": "b"}]),
    (R, 1, "differ before", with_(PAIR, chosen=chat("a", "b"), rejected=chat("c", "d"))),
    (T, 2, "not a whole JSON object: Unterminated string starting", [STEPWISE, '{"prompt": "Q']),
    (T, 3, "not a whole JSON object: Expecting ',' delimiter: column 1;", ["{", '"a": "Q"', "b}"]),
    (T, 2, "the array does not end in ]", ["", "["]),
    (T, 1, "the array does not end in ]", ["[" + json.dumps(STEPWISE)]),
    (T, "item 1", "is of no known format", [[{"foo": 1}]]),
    (T, "item 2", "should be a list, is text", [[STEPWISE, *steps(labels="+-")]]),
    (P, "item 1", "is a number; wanted one JSON object a line, or an array", [[3]]),
    (T, 1, "is text; wanted one JSON object a line", ['"a"']),
    (R, 2, "is null", [PAIR, "null"]),
    (T, 1, "not a whole JSON object", ['{"a": ' + "[" * 100_000]),
    (P, 1, "not a whole JSON object", ['{"question": "Q", "answer": ' + "9" * 5000 + "}"]),
    (T, 2, "is not UTF-8: ", [STEPWISE, '{"prompt": "é"}'.encode("latin-1")]),
    (T, 1, "wanted text in UTF-8", [json.dumps(STEPWISE).encode("utf-16")]),
    (T, 2, "holds NUL bytes", [STEPWISE, b"\0\0\0"]),
    (T, 1, "surrogates not allowed", ['{"prompt": "\\ud83d"}']),
    (T, 1, "a b c", [{"a\nb\u2028c": 1}]),
    (T, None, "has no rows", ["", " "]),
    (T, None, "has no rows", ["[]"]),
]


def message_of(call):
    with pytest.raises(BadInput) as caught:
        call()
    assert type(caught.value) is BadInput
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("read, number, phrase, rows", CASES)
def test_bad_rows(tmp_path, read, number, phrase, rows):
    path = write(tmp_path / "some file.jsonl", *rows)
    message = message_of(lambda: list(read(path, left_out=[])))
    assert message.startswith(f"{path}:{number}: " if number else f"{path}: ")
    assert phrase in message
    assert len(message) < 800  # data are quoted in part only


@pytest.mark.parametrize("read", [T, P, R, lambda path: [recognise(path)]])
def test_bad_files(tmp_path, read):
    def message(path):
        return message_of(lambda: list(read(path)))

    gone = tmp_path / "gone"
    assert message(gone) == f"{gone}: cannot be read: No such file or directory"
    assert message(str(tmp_path)) == f"{tmp_path}: cannot be read: Is a directory"
    empty = write(tmp_path / "empty.jsonl", "")
    assert message(empty).startswith(f"{empty}: has no rows")
    whole = gzip.compress(json.dumps(PAIR).encode())
    broken = whole[:10] + b"\xff" * 20
    for name, data in (("cut.gz", whole[:-9]), ("plain.gz", b"{}"), ("broken.gz", broken)):
        (tmp_path / name).write_bytes(data)
        assert message(tmp_path / name).startswith(f"{tmp_path}/{name}: cannot be read: ")
    assert "\n" not in message(tmp_path / "line\nbreak")
    if os.geteuid() != 0:  # root may read everything
        locked = write(tmp_path / "locked.jsonl", STEPWISE)
        locked.chmod(0)
        assert "cannot be read: Permission denied" in message(locked)


def test_a_folder_of_save_to_disk_is_told_what_to_do(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    load = f"datasets.load_from_disk('{tmp_path}')"
    assert f"{load}.to_json('{tmp_path}.jsonl')" in message_of(lambda: recognise(tmp_path))
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert f"{load}['train'].to_json" in message_of(lambda: recognise(f"{tmp_path}/"))


def test_no_file_at_all():
    assert "no file given" in message_of(lambda: list(read_pairs([])))


def test_the_docstring_shows_rows_that_work(tmp_path):
    """The examples in the table are cut out of the docstring and read."""
    text = formats.__doc__[formats.__doc__.index("  stepwise supervision") :]
    names = [name for _, name, _, _ in formats.FORMATS[1:-1]] + ["preference pairs"]
    decoder, at = json.JSONDecoder(strict=False), 0
    for name in names:
        at = text.index("{", text.index(f"  {name}  ", at))
        row, at = decoder.raw_decode(text, at)
        assert recognise(write(tmp_path / "row", row))[1] == name


# ---- The published shapes. A case: file, kind, what is read of a row, or a phrase of the refusal.

ANSWER_IS_2 = """aime24_maxwell.jsonl aime25.jsonl bigmath.jsonl crlf_bom.jsonl dapo17k.jsonl
    dapo17k_processed.jsonl deepscaler.json eurus2_rl.jsonl gsm8k.jsonl hendrycks_1.json
    lighteval_math.jsonl math500.jsonl minerva.jsonl mixed_null.jsonl numina_1.5.jsonl
    numina_as_sft.jsonl numina_cot.jsonl openr1_math.jsonl problems.json problems.jsonl.gz
    sal_prompt_list.jsonl skywork_or1.jsonl tdrm_level3.json verl_gsm8k.jsonl"""
ONE, STEP_1, STEP_2 = "One and one.", "Step 1: One and one.", "Step 2: It is 3."
BOX, PRM800K, WRONG, RIGHT = "\\boxed{2}", [ONE, "# Answer\n\n2"], [1.0, 0.0], [1.0, 1.0]
BE_KIND = [{"role": "system", "content": "Be kind."}, *chat("Hi?")]
DATASETS = 'this makes JSON lines of it: python -c "import datasets; datasets.Dataset.from_'
NO_FORMAT = "is of no known format, its keys: {}; wanted rows with the keys"


def labels(*rows):
    return "trajectories", list(rows)


def sides(prompt, chosen="Hello.", rejected="No."):
    return "pairs", [(prompt, chosen, rejected)]


SHAPE_CASES = {
    **{name: ("problems", ["2"]) for name in ANSWER_IS_2.split()},
    "aime24_h4.jsonl": ("problems", ["002"]),
    "amc23.jsonl": ("problems", ["2.0"]),
    "ds_to_json.jsonl": ("problems", ["2", "2", "2"]),
    "olympiadbench.jsonl": ("problems", ["2", "1,-1"]),
    "trl_prompt_solution.jsonl": ("problems", ["$2$"]),
    "alpaca_sft.jsonl": labels((None, [BOX])),
    "math_shepherd.jsonl": labels((RIGHT, [STEP_1, "Step 2: It is 2. The answer is: 2"])),
    "messages_sft.jsonl": labels((None, [ONE, BOX])),
    "openr_qa_process.jsonl": labels((WRONG, [STEP_1, STEP_2])),
    "prm800k_phase1.jsonl": labels((RIGHT, PRM800K), (WRONG, ["By hand.", "So 3."])),
    "prm800k_phase2.jsonl": labels((RIGHT, PRM800K)),
    "prm800k_trl_dedup.jsonl": labels((WRONG, [ONE, "So 3."])),
    "processbench.jsonl": labels((WRONG, [ONE, "So 3."])),
    "processbench_gsm8k.json": labels(*[(WRONG, [ONE, "So 3."])] * 2),
    "prompt_completion_sft.jsonl": labels((None, [ONE, BOX])),
    "response_answer.jsonl": labels((None, [ONE, BOX])),
    "rlhflow_prm.jsonl": labels((WRONG, [STEP_1, STEP_2])),
    "rlhflow_test.jsonl": labels((None, ["One.", f"It is {BOX}."]), (None, ["It is \\boxed{3}."])),
    "sharegpt_sft.jsonl": labels((None, [BOX])),
    "trl_math_shepherd.jsonl": labels((WRONG, [STEP_1, STEP_2])),
    "trl_prm800k.jsonl": labels((RIGHT, [ONE, "Two."]), ([1.0], [ONE])),
    "ultrainteract_sft.jsonl": labels((None, ["Step 1: 2"])),
    "orca_dpo.jsonl": sides(BE_KIND),
    "step_dpo.jsonl": sides("What is 1+1?", "Step 1: one Step 2: 2", "Step 1: one Step 2: 3"),
    "ultrafeedback_h4.jsonl": sides("Hi?"),
    "ultrafeedback_trl.jsonl": sides(chat("Hi?")),
    "ultrainteract_pair.jsonl": sides(chat("What is 1+1?"), "Step 1: 2", "Step 1: 3"),
    "ds.csv": DATASETS + "csv(",
    "problems.csv": DATASETS + "csv(",
    "processbench.parquet": DATASETS + "parquet(",
    "train-00000-of-00001.parquet": DATASETS + "parquet(",
    "hh_rlhf.jsonl": "has no prompt; wanted 'prompt', or chats",
    "orz57k.json": "item 1: is a list; wanted one JSON object a line, or an array of objects",
    "tdrm_2step.jsonl": NO_FORMAT.format("conversations"),
    "tdrm_bon.jsonl": NO_FORMAT.format("user, assistant"),
}
LEFT_OUT = {
    "numina_1.5.jsonl": [":2: no gold answer: 'answer' is 'proof'"],
    "numina_cot.jsonl": [
        ":2: no gold answer: 'solution' has no \\boxed{} and there is no 'answer'"
    ],
    "prm800k_phase1.jsonl": [":2: has no rated step"],
}


def read_shape(path):
    kind, left_out = recognise(path)[0], []
    if kind == "trajectories":
        rows = list(read_trajectories(path, outcome=False, left_out=left_out))
        return kind, rows, [(row["labels"], row["completions"]) for row in rows], left_out
    if kind == "problems":
        rows = list(read_problems(path, left_out=left_out))
        return kind, rows, [row["answer"] for row in rows], left_out
    rows = list(read_pairs(path, left_out=left_out))
    return kind, rows, [(row["prompt"], row["chosen"], row["rejected"]) for row in rows], left_out


@pytest.mark.skipif(not SHAPES.exists(), reason=f"{SHAPES} is not there")
@pytest.mark.parametrize("name", sorted(SHAPE_CASES))
def test_published_shapes(name):
    path, expected = SHAPES / name, SHAPE_CASES[name]
    if isinstance(expected, str):
        message = message_of(lambda: read_shape(path))
        assert message.startswith(str(path)) and expected in message
    else:
        kind, rows, found, left_out = read_shape(path)
        assert (kind, found) == expected
        assert left_out == [f"{path}{text}" for text in LEFT_OUT.get(name, [])]
        question = str(rows[0].get("question", rows[0].get("prompt")))
        assert "1+1?" in question or "Hi?" in question


@pytest.mark.skipif(not SHAPES.exists(), reason=f"{SHAPES} is not there")
def test_no_shape_is_forgotten():
    assert sorted(SHAPE_CASES) == sorted(path.name for path in SHAPES.iterdir())


# ---- Whatever stands in a row, it is read or refused in order.

OPENR = {"question": "Q?", "process": "a \n\n\n\n\nb", "label": ["+", "-"]}
VERL = {"prompt": chat("Q?"), "reward_model": {"ground_truth": '["1"]'}}
SHAREGPT = {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "a"}]}
RATED = prm800k(candidates(1, -1, chosen=0), candidates(0, human={"text": "h"}))
SEEDS = [STEPWISE, SHEPHERD, OPENR, RLHFLOW, RATED, BENCH, PROBLEM, MATH, VERL, PAIR, SHAREGPT]
SEEDS += [{**PROBLEM, "response": "a", "system": "S"}, {"messages": TURNS, "answer": ["1"]}]
SEEDS += [{"chosen": TURNS, "rejected": TURNS}, {"prompt": "Q?", "answers": ["a"], "label": [1]}]
VALUES = [None, True, 0, -1, 1.5, "", " ", "x", "ки", "+", '["1"]', [], {}, [None], [[]], [{}]]
VALUES += [{"a": 1}, ["a", "b"], chat("Q?", "+"), [{"from": 1}], "\\boxed{2}", "a\n\nb\n#### 3"]


def changed(value, rng):
    """A copy of a JSON value with something in it changed, added or taken away."""
    if not value or not isinstance(value, (dict, list)) or rng.random() < 0.2:
        return rng.choice(VALUES)
    copy = value.copy()
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.2:
        del copy[key]
    else:
        copy[key] = changed(copy[key], rng)
    if isinstance(copy, dict) and rng.random() < 0.1:
        extra = rng.choice(["label", "answer", "correct", "context", "system", "solution", "input"])
        copy[extra] = rng.choice(VALUES)
    return copy


@pytest.mark.parametrize("seed", SEEDS)
def test_changed_rows(tmp_path, seed):
    rng, read_well = random.Random(0), 0
    readers = [T, P, R, lambda path, left_out: T(path, outcome=False, left_out=left_out)]
    for _ in range(300):
        row = changed(seed, rng)
        path = write(tmp_path / "row", seed if rng.random() < 0.3 else row, row)
        for read in readers:
            try:
                rows = list(read(path, left_out=[]))
            except BadInput as error:
                assert str(error).startswith(str(path))
                continue
            read_well += 1
            for made in rows:
                question = made.get("prompt", made.get("question"))
                assert isinstance(question, str) or isinstance(question[0]["content"], str)
                texts = made.get("completions") or [made.get("chosen") or made["answer"]]
                assert all(isinstance(text, str) and text.strip() for text in texts)
                assert made.get("labels") is None or len(made["labels"]) == len(texts)
                assert made.get("correct") in (True, False, None)
                assert made["answer"] is None or made["answer"].strip()
    assert read_well
