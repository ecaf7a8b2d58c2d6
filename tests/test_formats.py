"""Every format read exactly, and every kind of bad input answered with one line that says where and what."""

import gzip
import json
import os

import pytest

import formats
from formats import BadInput, read_pairs, read_problems, read_trajectories, recognise


def write(path, *rows):
    """Writes rows (dicts as JSON, texts and bytes as they are) as the lines of a file."""
    lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
             for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def trajectory(path, number=1, **values):
    base = {"prompt": "Q?", "answer": None, "first_error": None, "source": f"{path}:{number}"}
    return {**base, **values}


STEPWISE = {"prompt": "Q?", "completions": ["a", "b"], "labels": [True, 0.25]}
SHEPHERD = {"input": "What is 2 + 1? Step 1: 2 + 1 = 3. ки\nStep 2: 3 - 0 = 3. The answer is: 3 ки",
            "label": "What is 2 + 1? Step 1: 2 + 1 = 3. +\nStep 2: 3 - 0 = 3. The answer is: 3 -",
            "task": "GSM8K"}
TURNS = [{"role": "user", "content": "Q? Step 1: one."}, {"role": "assistant", "content": "+"},
         {"role": "user", "content": "Step 2: two. "}, {"role": "assistant", "content": "-"}]
RLHFLOW = {"conversations": TURNS}
BENCH = {"id": "x", "problem": "Q?", "steps": ["a", "b", "c"], "label": 1, "final_answer_correct": True}
PAIR = {"prompt": "Q?", "chosen": "yes", "rejected": "no"}
PROBLEM = {"question": "Q?", "answer": "18"}
MATH = {"problem": "Q?", "solution": r"Not \boxed{1} but $\boxed{42}$.", "level": "Level 5"}


def prm800k(*steps, finish="solution", **question):
    return {"labeler": "x", "question": {"problem": "Q?", **question},
            "label": {"steps": list(steps), "total_time": 1, "finish_reason": finish}}


def candidates(*ratings, chosen=None, human=None):
    completions = [{"text": f"c{k}", "rating": rating, "flagged": None} for k, rating in enumerate(ratings)]
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


# ---- Every format, exactly.


def test_stepwise(tmp_path):
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "Q?"}]
    path = write(tmp_path / "t.json", STEPWISE, "", "  ",
                 {"prompt": chat, "completions": [" a\n"], "labels": [0], "values": [0.1]},
                 {"prompt": "Q?", "completions": ["a"], "labels": None, "correct": 1},
                 {"prompt": "Q?", "completions": ["a"], "labels": [1], "correct": False, "answer": 7})
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, completions=["a", "b"], labels=[1.0, 0.25], correct=False),
        trajectory(path, 4, prompt=chat, completions=[" a\n"], labels=[0.0], correct=False),
        trajectory(path, 5, completions=["a"], labels=None, correct=True),
        trajectory(path, 6, completions=["a"], labels=[1.0], correct=False, answer="7")]
    first = next(read_trajectories(path))
    assert [type(label) for label in first["labels"]] == [float, float]
    assert recognise(path) == ("trajectories", "stepwise supervision")


def test_answer_is_checked_where_the_outcome_is_not_given(tmp_path, monkeypatch):
    asked = []
    answers = pytest.importorskip("answers")
    monkeypatch.setattr(answers, "verify", lambda response, answer: asked.append((response, answer)) or True)
    path = write(tmp_path / "t", {**STEPWISE, "completions": ["a", "so 7"], "answer": "7", "labels": [1, 0]})
    assert list(read_trajectories(path)) == [
        trajectory(path, completions=["a", "so 7"], labels=[1.0, 0.0], answer="7", correct=True)]
    assert asked == [("a\n\nso 7", "7")]


def test_math_shepherd(tmp_path):
    stray = {"input": "Mr. X ки has 2. Step 1: two ки", "label": "Mr. X + has 2. Step 1: two -"}
    unnumbered = {"input": "How many? It is 2. ки\nSo 2. ки\n", "label": "How many? It is 2. -\nSo 2. +\n"}
    path = write(tmp_path / "t", SHEPHERD, stray, unnumbered)
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, prompt="What is 2 + 1?", correct=False, labels=[1.0, 0.0],
                   completions=["Step 1: 2 + 1 = 3.", "Step 2: 3 - 0 = 3. The answer is: 3"]),
        trajectory(path, 2, prompt="Mr. X  has 2.", completions=["Step 1: two"], labels=[0.0], correct=False),
        trajectory(path, 3, prompt="How many?", correct=True, labels=[0.0, 1.0],
                   completions=["It is 2.", "So 2."])]
    assert recognise(path) == ("trajectories", "Math-Shepherd")


def test_rlhflow(tmp_path):
    blank_line = {"conversations": [{"role": "user", "content": "Q,\n\nreally?\n\nOne."},
                                    {"role": "assistant", "content": "+"}]}
    path = write(tmp_path / "t", RLHFLOW, blank_line)
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, completions=["Step 1: one.", "Step 2: two."], labels=[1.0, 0.0], correct=False),
        trajectory(path, 2, prompt="Q,\n\nreally?", completions=["One."], labels=[1.0], correct=True)]
    assert recognise(path) == ("trajectories", "RLHFlow")


def test_prm800k(tmp_path):
    by_hand = {"text": "h", "rating": None}
    path = write(
        tmp_path / "t",
        prm800k(candidates(-1, 1, chosen=1), candidates(0, chosen=0), ground_truth_answer="4"),
        prm800k(candidates(1, chosen=0), candidates(0, -1, -1), candidates(1), finish="found_error"),
        prm800k(candidates(-1, human=by_hand), candidates(1, None, chosen=1), finish="give_up"),
        prm800k(finish="bad_problem"),
        prm800k({"completions": None, "human_completion": None, "chosen_completion": None}, finish="give_up"),
        prm800k(candidates(-1, chosen=0), candidates(1, chosen=0), finish="solution"),
        prm800k(candidates(-1, chosen=0), finish="give_up"))
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, completions=["c1", "c0"], labels=[1.0, 1.0], answer="4", correct=True),
        trajectory(path, 2, completions=["c0", "c1"], labels=[1.0, 0.0], correct=False),
        trajectory(path, 3, completions=["h", "c1"], labels=[1.0, 1.0], correct=None),
        trajectory(path, 6, completions=["c0", "c0"], labels=[0.0, 1.0], correct=None),
        trajectory(path, 7, completions=["c0"], labels=[0.0], correct=False)]
    assert recognise(path) == ("trajectories", "PRM800K")


def test_process_bench(tmp_path):
    path = write(tmp_path / "t", BENCH, {"problem": "Q?", "steps": ["a"], "label": -1},
                 {"problem": "Q?", "steps": ["a", "b"], "label": 0})
    assert list(read_trajectories(path)) == [
        trajectory(path, 1, completions=["a", "b", "c"], labels=[1.0, 0.0, 0.0], correct=True, first_error=1),
        trajectory(path, 2, completions=["a"], labels=[1.0], correct=True, first_error=-1),
        trajectory(path, 3, completions=["a", "b"], labels=[0.0, 0.0], correct=False, first_error=0)]
    assert recognise(path) == ("trajectories", "ProcessBench")


@pytest.mark.parametrize("row, expected", [
    (PROBLEM, ("Q?", "18", None)),
    ({"problem": "Q?", "solution": "Because.", "answer": 18}, ("Q?", "18", "Because.")),
    ({"prompt": "Q?", "gold": 0.5}, ("Q?", "0.5", None)),
    ({"instruction": "Q?", "label": "x+1 "}, ("Q?", "x+1", None)),
    ({"question": "Q?", "answer": "2*9=<<2*9=18>>18\nSo 18.\n#### 1,018"},
     ("Q?", "1,018", "2*9=<<2*9=18>>18\nSo 18.")),
    ({"question": "Q?", "answer": "#### -3"}, ("Q?", "-3", None)),
    ({"question": "Q?", "ground_truth": "9 + 9 = 18\nA: 18", "6b": {}}, ("Q?", "18", "9 + 9 = 18")),
])
def test_question_and_answer(tmp_path, row, expected):
    path = write(tmp_path / "p", row)
    assert list(read_problems(path)) == [
        dict(zip(("question", "answer", "solution", "source"), (*expected, f"{path}:1")))]
    assert recognise(path) == ("problems", "question and answer")


def test_math(tmp_path):
    path = write(tmp_path / "p", MATH)
    assert list(read_problems(path)) == [
        {"question": "Q?", "answer": "42", "solution": MATH["solution"], "source": f"{path}:1"}]
    assert recognise(path) == ("problems", "MATH")


def test_pairs(tmp_path):
    chat = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": " yes"}]
    path = write(tmp_path / "p", {**PAIR, "chosen": "\n yes ", "rejected": ["no"], "answer": 3},
                 {"question": chat[:1], "chosen": chat, "rejected": chat[1:], "label": "yes"},
                 {"instruction": "Q?", "chosen": "a", "rejected": "a", "label": None})
    base = {"prompt": "Q?", "chosen": "yes ", "rejected": "no", "answer": "3", "source": f"{path}:1"}
    assert list(read_pairs(path)) == [
        base,
        {"prompt": chat[:1], "chosen": "yes", "rejected": "yes", "answer": "yes", "source": f"{path}:2"},
        {**base, "chosen": "a", "rejected": "a", "answer": None, "source": f"{path}:3"}]
    assert recognise(path) == ("pairs", "preference pairs")


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


def test_encodings_that_are_fine(tmp_path):
    text = json.dumps(STEPWISE).replace("Q?", "\u2028 ö \\ud83d\\ude00")
    path = write(tmp_path / "bom", b"\xef\xbb\xbf" + text.encode() + b"\r", b"\r", text)
    assert [(row["prompt"], row["source"]) for row in read_trajectories(path)] == [
        ("\u2028 ö \U0001f600", f"{path}:1"), ("\u2028 ö \U0001f600", f"{path}:3")]
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert len(list(read_trajectories(packed))) == 2


# ---- Bad input. A case: reader, lines of the file, the line to be named (0: none), a phrase of the message.

T, P, R = read_trajectories, read_problems, read_pairs
CASES = {
    "no known format": (T, [{"foo": 1, "bar": 2}],
                        1, "keys: foo, bar; wanted trajectories with the keys of stepwise"),
    "no keys": (P, [{}], 1, "its keys: none"),
    "key missing later": (T, [STEPWISE, {"prompt": "Q?", "labels": [1]}], 2, "lacks completions"),
    "steps missing later": (T, [BENCH, {"problem": "Q?", "label": 0}], 2, "lacks steps"),
    "mixed formats": (T, [SHEPHERD, STEPWISE], 2, "rows before are Math-Shepherd"),
    "mixed, nothing missing": (P, [PROBLEM, {**PROBLEM, **BENCH}], 2, "is ProcessBench"),
    "pairs for trajectories": (T, [PAIR], 1, "holds pairs (preference pairs)"),
    "problems for trajectories": (T, [PROBLEM], 1, "holds problems (question and answer)"),
    "trajectories for problems": (P, [BENCH], 1, "holds trajectories (ProcessBench)"),
    "problems for pairs": (R, [MATH], 1, "preference pairs: prompt|instruction|question + chosen + rejected"),
    "nothing to learn from": (T, [{"prompt": "Q?", "completions": ["a"]}], 1, "nothing to learn from"),
    "null labels": (T, [{**STEPWISE, "labels": None}], 1, "needs 'labels', or else 'correct' or 'answer'"),
    "more labels than steps": (T, [STEPWISE, {**STEPWISE, "labels": [1, 1, 1]}],
                               2, "3 entries for 2 completions"),
    "no labels": (T, [{**STEPWISE, "labels": []}], 1, "0 entries for 2 completions"),
    "labels not a list": (T, [{**STEPWISE, "labels": "+-"}], 1, "'labels' should be a list, is text"),
    "label above 1": (T, [{**STEPWISE, "labels": [1, 1.5]}],
                      1, "label 2 should be true, false or from 0 to 1, is 1.5"),
    "label below 0": (T, [{**STEPWISE, "labels": [-1, 1]}], 1, "label 1 should be"),
    "label infinite": (T, ['{"prompt": "Q", "completions": ["a"], "labels": [1e999]}'], 1, "is inf"),
    "label as text": (T, [{**STEPWISE, "labels": [1, "x\ny"]}], 1, "label 2"),
    "label null": (T, [{**STEPWISE, "labels": [1, None]}], 1, "is None"),
    "label NaN": (T, ['{"prompt": "Q", "completions": ["a"], "labels": [NaN]}'], 1, "NaN is no JSON number"),
    "no steps": (T, [{**STEPWISE, "completions": []}], 1, "'completions' should be a list, is empty"),
    "steps as text": (T, [{**STEPWISE, "completions": "a"}], 1, "'completions' should be a list, is text"),
    "step blank": (T, [{**STEPWISE, "completions": ["a", " \n"]}], 1, "'step 2' is blank"),
    "step a number": (T, [{**STEPWISE, "completions": ["a", 2]}], 1, "'step 2' should be text, is a number"),
    "prompt blank": (T, [{**STEPWISE, "prompt": " "}], 1, "'prompt' is blank"),
    "prompt null": (T, [{**STEPWISE, "prompt": None}], 1, "'prompt' should be text, is null"),
    "prompt an empty chat": (T, [{**STEPWISE, "prompt": []}], 1, "'prompt' should be a list, is empty"),
    "prompt a blank chat": (T, [{**STEPWISE, "prompt": [{"role": "user", "content": ""}]}],
                            1, "'prompt' is blank"),
    "message without role": (T, [{**STEPWISE, "prompt": [{"content": "Q"}]}], 1, "'role' and 'content'"),
    "message not an object": (T, [{**STEPWISE, "prompt": ["Q"]}], 1, "list of messages"),
    "content not text": (T, [{**STEPWISE, "prompt": [{"role": "user", "content": ["Q"]}]}],
                         1, "list of messages"),
    "correct as text": (T, [{**STEPWISE, "correct": "y\r\nes"}],
                        1, "'final_answer_correct' should be true or false"),
    "answer true": (T, [{**STEPWISE, "answer": True}], 1, "'answer' should be text, is true or false"),
    "tag missing at the end": (T, [{"input": "Q? Step 1: a ки b", "label": "Q? Step 1: a + b"}],
                               1, "in the tag 'ки'"),
    "no tag": (T, [{"input": "Q? Step 1: a", "label": "Q? Step 1: a"}], 1, "in the tag 'ки'"),
    "mark missing": (T, [{**SHEPHERD, "label": SHEPHERD["label"][:-1]}], 1, "with + or - for its 2 tags"),
    "mark too many": (T, [{**SHEPHERD, "label": SHEPHERD["label"] + "\nStep 3: -"}], 1, "for its 2 tags"),
    "mark unknown": (T, [{"input": "Q? Step 1: a ки", "label": "Q? Step 1: a ?"}], 1, "with + or -"),
    "Math-Shepherd blank step": (T, [{"input": "Q? Step 1: a кики", "label": "Q? Step 1: a ++"}],
                                 1, "'step 2' is blank"),
    "Math-Shepherd no question": (T, [{"input": "Step 1: a ки", "label": "Step 1: a +"}], 1, "no question"),
    "Math-Shepherd input null": (T, [{"input": None, "label": ""}], 1, "'input' should be text, is null"),
    "RLHFlow empty": (T, [{"conversations": []}], 1, "is empty"),
    "RLHFlow unanswered": (T, [{"conversations": TURNS[:3]}], 1, "should alternate"),
    "RLHFlow wrong order": (T, [{"conversations": TURNS[1:3]}], 1, "should alternate"),
    "RLHFlow mark": (T, [{"conversations": [*TURNS[:3], {**TURNS[3], "content": "ok"}]}],
                     1, "should alternate"),
    "RLHFlow no first step": (T, [{"conversations": [{"role": "user", "content": "Q"}, TURNS[1]]}],
                              1, "neither 'Step 1:'"),
    "PRM800K steps": (T, [prm800k() | {"label": {"steps": "a"}}],
                      1, "'label.steps' should be a list, is text"),
    "PRM800K step": (T, [prm800k(["a"])], 1, "should hold objects, holds a list"),
    "PRM800K completions": (T, [prm800k({"completions": "a"})], 1, "'completions' should be a list"),
    "PRM800K chosen": (T, [prm800k(candidates(1, chosen=1))],
                       1, "'chosen_completion' is 1 with 1 'completions'"),
    "PRM800K rating": (T, [prm800k(candidates(2, chosen=0))], 1, "'rating': -1, 0 or 1"),
    "PRM800K text": (T, [prm800k({"completions": [{"rating": 1}]})], 1, "'text' should be text, is null"),
    "ProcessBench label": (T, [{**BENCH, "label": 3}], 1, "from -1 (no error) to 2 (last), is 3"),
    "ProcessBench true": (T, [{**BENCH, "label": True}], 1, "is True"),
    "ProcessBench no steps": (T, [{**BENCH, "steps": []}], 1, "'steps' should be a list, is empty"),
    "ProcessBench outcome": (T, [{**BENCH, "final_answer_correct": "no"}],
                             1, "'final_answer_correct' should be"),
    "question a list": (P, [{**PROBLEM, "question": ["Q"]}], 1, "'question' should be text, is a list"),
    "gold answer blank": (P, [{**PROBLEM, "answer": " "}], 1, "'answer' is blank"),
    "gold answer false": (P, [{**PROBLEM, "answer": False}], 1, "'answer' should be text, is true or false"),
    "gold answer an object": (P, [{**PROBLEM, "answer": {}}], 1, "'answer' should be text, is an object"),
    "nothing after ####": (P, [{**PROBLEM, "answer": "18\n#### "}], 1, "'answer after ####' is blank"),
    "solution a list": (P, [{**PROBLEM, "solution": ["a"]}], 1, "'solution' should be text, is a list"),
    "no box": (P, [{**MATH, "solution": "It is 2."}], 1, "'solution' has no \\boxed{}"),
    "response null": (R, [PAIR, {**PAIR, "chosen": None}], 2, "'chosen' should be text, is null"),
    "response blank": (R, [{**PAIR, "rejected": " "}], 1, "'rejected' is blank"),
    "two responses": (R, [{**PAIR, "rejected": ["a", "b"]}], 1, "'rejected' should be text"),
    "no assistant": (R, [{**PAIR, "chosen": [{"role": "user", "content": "a"}]}],
                     1, "the last assistant message"),
    "no prompt": (R, [{"chosen": "a", "rejected": "b"}],
                  1, "preference pairs: prompt|instruction|question + chosen"),
    "truncated": (T, [STEPWISE, '{"prompt": "Q'],
                  2, "not a whole JSON object: Unterminated string starting at: column 12 "),
    "two objects": (T, ["{} {}"], 1, "not a whole JSON object"),
    "indented JSON": (T, ["{", '"prompt": "Q"', "}"], 1, "one JSON object a line"),
    "JSON array": (T, [[STEPWISE]], 1, "starts a JSON array; wanted one JSON object a line"),
    "open JSON array": (T, ["", "["], 2, "starts a JSON array"),
    "bare text": (T, ['"a"'], 1, "is text; wanted one JSON object a line"),
    "bare number": (P, ["3"], 1, "is a number"),
    "bare null": (R, ["null"], 1, "is null"),
    "deep nesting": (T, ['{"a": ' + "[" * 100_000], 1, "not a whole JSON object"),
    "number of many digits": (P, ['{"question": "Q", "answer": ' + "9" * 5000 + "}"],
                              1, "not a whole JSON object"),
    "not UTF-8": (T, [STEPWISE, '{"prompt": "é"}'.encode("latin-1")], 2, "is not UTF-8: "),
    "UTF-16": (T, [json.dumps(STEPWISE).encode("utf-16")], 1, "wanted text in UTF-8"),
    "NUL bytes": (T, [STEPWISE, b"\0\0\0"], 2, "holds NUL bytes"),
    "half a surrogate pair": (T, ['{"prompt": "\\ud83d"}'], 1, "surrogates not allowed"),
    "line breaks in keys": (T, [{"a\nb\u2028c": 1}], 1, "a b c"),
    "no rows": (T, ["", " "], 0, "has no rows"),
}


def message_of(call):
    with pytest.raises(BadInput) as caught:
        call()
    assert type(caught.value) is BadInput
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_bad_rows(tmp_path, case):
    read, rows, number, phrase = CASES[case]
    path = write(tmp_path / "some file.jsonl", *rows)
    message = message_of(lambda: list(read(path)))
    assert message.startswith(f"{path}:{number}: " if number else f"{path}: ")
    assert phrase in message
    assert len(message) < 700  # data are quoted in part only


@pytest.mark.parametrize("read", [T, P, R, lambda path: [recognise(path)]])
def test_bad_files(tmp_path, read):
    def message(path):
        return message_of(lambda: list(read(path)))

    assert message(tmp_path / "gone") == f"{tmp_path}/gone: cannot be read: No such file or directory"
    assert message(str(tmp_path)) == f"{tmp_path}: cannot be read: Is a directory"
    assert message(write(tmp_path / "empty.jsonl", "")).startswith(f"{tmp_path}/empty.jsonl: has no rows")
    assert "one JSON object a line" in message(write(tmp_path / "array.json", "[", "{}", "]"))
    whole = gzip.compress(json.dumps(PAIR).encode())
    for name, data in (("cut.gz", whole[:-9]), ("plain.gz", b"{}"), ("broken.gz", whole[:10] + b"\xff" * 20)):
        (tmp_path / name).write_bytes(data)
        assert message(tmp_path / name).startswith(f"{tmp_path}/{name}: cannot be read: ")
    assert "\n" not in message(tmp_path / "line\nbreak")
    if os.geteuid() != 0:  # root may read everything
        locked = write(tmp_path / "locked.jsonl", STEPWISE)
        locked.chmod(0)
        assert "cannot be read: Permission denied" in message(locked)


def test_no_file_at_all():
    assert "no file given" in message_of(lambda: list(read_pairs([])))


def test_the_docstring_shows_rows_that_work(tmp_path):
    """The examples in the table are cut out of the docstring and read."""
    text = formats.__doc__[formats.__doc__.index("trajectories  stepwise"):]
    decoder, at, seen = json.JSONDecoder(), 0, []
    while (at := text.find("{", at)) >= 0:
        row, at = decoder.raw_decode(text, at)
        seen.append(recognise(write(tmp_path / "row", row))[1])
    assert seen == [name for _, name, _, _ in formats._FORMATS[1:]] + ["preference pairs"]
