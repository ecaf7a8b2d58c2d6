r"""Reads the published data formats of process supervision: JSON Lines in, rows of one shape out.

Every data set writes a step-labelled solution in its own way. This file is the only place that knows those
ways; the rest of the project sees three kinds of rows, all plain dicts:

trajectory  a solution cut into steps
            prompt       text, or a list of {"role", "content"} messages
            completions  the steps, each a text, without separators between them
            labels       for each step a float in [0, 1] (1 = right), or None where only the outcome is known
            answer       the gold answer as text, or None
            correct      whether the solution as a whole is right: True, False, or None (unknown)
            first_error  ProcessBench only: the index of the first wrong step, -1 = no error; else None
problem     question, answer (gold, as text), solution (a worked text, or None)
pair        prompt, chosen, rejected, answer (gold, or None)

and each with `source`, the "FILE:LINE" it came from. A file's format is told by the keys of its first row:

trajectories  stepwise supervision  {"prompt": "1+1+1?", "completions": ["1+1=2", "2+1=4"], "labels": [1, 0]}
                                    optional: "answer", "correct" (either will do in place of "labels")
              Math-Shepherd         {"input": "1+1? Step 1: It is 2. ки", "label": "1+1? Step 1: It is 2. +"}
              RLHFlow               {"conversations": [{"role": "user", "content": "1+1? Step 1: It is 2."},
                                                       {"role": "assistant", "content": "+"}]}
              PRM800K               {"question": {"problem": "1+1?", "ground_truth_answer": "2"},
                                     "label": {"steps": [{"completions": [{"text": "2.", "rating": 1}],
                                                          "human_completion": null, "chosen_completion": 0}],
                                               "finish_reason": "solution"}}
              ProcessBench          {"problem": "1+1?", "steps": ["1+1=3", "So 3."], "label": 0}
problems      question and answer   {"question": "1+1?", "answer": "2"}, or GSM8K's "answer": "1+1=2\n#### 2"
              MATH                  {"problem": "1+1?", "solution": "It is $\\boxed{2}$."}
pairs         preference pairs      {"prompt": "1+1?", "chosen": "2", "rejected": "3"}, optional: "answer"
"""

import gzip
import json
import os
import re
import zlib


class BadInput(ValueError):
    """An error the user can mend: one line that names the file, line or option and what would be accepted."""

    def __init__(self, message):
        # Messages quote the user's data, line breaks and all: here is the place to keep them to one line.
        super().__init__(" ".join(str(message).splitlines()))


def read_trajectories(paths):
    """Yields the trajectories of one file or of a list of files, reading one line at a time.

    Nothing is opened before the first row is asked for. PRM800K rows without a rated step are left out.
    """
    return _read(paths, "trajectories")


def read_problems(paths):
    """Yields the problems (question and gold answer) of one file or of a list of files. A question may be blank: one that
    cannot be asked is for the scripts to leave out and count."""
    return _read(paths, "problems")


def read_pairs(paths):
    """Yields the preference pairs of one file or of a list of files; chosen and rejected may be equal."""
    return _read(paths, "pairs")


def recognise(path):
    """Returns what a file's first row is as (kind, format), e.g. ("trajectories", "Math-Shepherd")."""
    (kind, name, _, _), _ = next(_rows(path))
    return kind, name


# ---- Trajectories: one function a format, each from the row as published to the row described above.


def _trajectory(row, prompt, steps, labels):
    """The end all trajectory formats share: checks the parts and fills in the outcome."""
    answer, correct = row.get("answer"), row.get("correct")
    if labels is None and answer is None and correct is None:
        raise BadInput("nothing to learn from: a row needs 'labels', or else 'correct' or 'answer'")
    prompt = _prompt(prompt, "prompt")
    for number, step in enumerate(steps, 1):
        _text(step, f"step {number}")
    if labels is not None:
        if len(_list(labels, "labels", least=0)) != len(steps):
            raise BadInput(f"'labels' has {len(labels)} entries for {len(steps)} completions")
        for number, label in enumerate(labels, 1):
            if not isinstance(label, (int, float)) or not 0 <= label <= 1:
                raise BadInput(f"label {number} should be true, false or from 0 to 1, is {label!r:.40}")
        labels = [float(label) for label in labels]
    answer = None if answer is None else _answer(answer, "answer")
    # The outcome, from the best evidence there is: said outright, else checked, else the last step's label.
    if correct is not None:
        if correct not in (True, False):  # 0 and 1 are equal to these, hence accepted too
            raise BadInput(f"'correct' or 'final_answer_correct' should be true or false, is {correct!r:.30}")
        correct = bool(correct)
    elif answer is not None:
        from parts.answers import verify  # only here: reading step labels needs no answer checker

        correct = verify("\n\n".join(steps), answer)
    elif labels is not None:
        correct = labels[-1] >= 0.5
    return {"prompt": prompt, "completions": steps, "labels": labels, "answer": answer, "correct": correct,
            "first_error": None}


def _stepwise(row):
    return _trajectory(row, row["prompt"], _list(row["completions"], "completions"), row.get("labels"))


def _math_shepherd(row):
    """Each step ends in the tag "ки"; "label" is the same text with + or - in the place of each tag."""
    text, marked = _text(row["input"], "input").rstrip(), _text(row["label"], "label").rstrip()
    *pieces, rest = text.split("ки")
    if rest:
        raise BadInput("'input' should end each step, the last one too, in the tag 'ки'")
    at, marks = -1, []
    for piece in pieces:  # position by position, as steps hold plus and minus signs of their own
        at += len(piece) + 1
        marks.append(marked[at : at + 1])
    if at + 1 != len(marked) or not set(marks) <= {"+", "-"}:
        raise BadInput(f"'label' should be the text of 'input' with + or - for its {len(pieces)} tags")
    # A few published questions hold a stray tag. It labels no step: all before "Step 1:" counts as question.
    first = next((k for k, piece in enumerate(pieces) if _STEP_1.search(piece)), 0)
    question, step = _split_question("".join(pieces[: first + 1]), "?")
    steps = [step] + [piece.strip() for piece in pieces[first + 1 :]]
    return _trajectory(row, question, steps, [mark == "+" for mark in marks[first:]])


def _rlhflow(row):
    """A chat in which the user says the steps and the assistant answers each with + or -."""
    turns = _messages(row["conversations"], "conversations")
    steps, marks = ([turn["content"].strip() for turn in turns[k::2]] for k in (0, 1))
    by_turns = [turn["role"] for turn in turns] == ["user", "assistant"] * len(steps)
    if not by_turns or not set(marks) <= {"+", "-"}:
        raise BadInput("'conversations' should alternate user turns (a step) and assistant turns (+ or -)")
    question, steps[0] = _split_question(steps[0], "\n\n")
    return _trajectory(row, question, steps, [mark == "+" for mark in marks])


_STEP_1 = re.compile("[Ss]tep 1:")


def _split_question(text, otherwise):
    """Cuts a text before its "Step 1:"; where it has none, after the last `otherwise`."""
    found = _STEP_1.search(text)
    at = found.start() if found else text.rfind(otherwise) + 1
    if not text[:at].strip():
        raise BadInput(f"no question, or neither 'Step 1:' nor {otherwise!r} to tell it from the first step")
    return text[:at].strip(), text[at:].strip()


def _prm800k(row):
    """One path through a tree: at each step annotators rated several candidates and went on from one."""
    question, label, path = row["question"], row["label"], []
    for step in _list(label["steps"], "label.steps", least=0):
        if not isinstance(step, dict):
            raise BadInput(f"'label.steps' should hold objects, holds {_type(step)}")
        options = [_rated(option) for option in _list(step.get("completions") or [], "completions", least=0)]
        chosen = step.get("chosen_completion")
        if chosen is not None:
            if type(chosen) is not int or not 0 <= chosen < len(options):
                raise BadInput(f"'chosen_completion' is {chosen!r:.40} with {len(options)} 'completions'")
            path.append(options[chosen])
        elif step.get("human_completion"):
            path.append(_rated(step["human_completion"]))
        else:  # the annotator stopped: the worst candidate shows where the solution went wrong, if it did
            if options:
                path.append(min(options, key=lambda option: option[1]))
            break
    if not path:
        return None
    # A rating of 0 is "neither wrong nor helpful". The data's authors count it as right when they evaluate.
    labels = [rating >= 0 for _, rating in path]
    wrong = label.get("finish_reason") == "found_error" or not labels[-1]
    right = label.get("finish_reason") == "solution" and all(labels)
    gold = question.get("ground_truth_answer")
    # Annotators judged the outcome, or left it open: no answer check or last label is to overrule them.
    return {**_trajectory({}, question["problem"], [text for text, _ in path], labels),
            "answer": None if gold is None else _answer(gold, "ground_truth_answer"),
            "correct": False if wrong else True if right else None}


def _rated(option):
    """(text, rating) of a PRM800K completion; one not rated (often one written by hand) counts as neutral."""
    if not isinstance(option, dict) or option.get("rating") not in (-1, 0, 1, None):
        raise BadInput(f"a completion should be {{'text': ..., 'rating': -1, 0 or 1}}, is {option!r:.60}")
    return _text(option.get("text"), "text"), option.get("rating") or 0


def _process_bench(row):
    steps, label = _list(row["steps"], "steps"), row["label"]
    if type(label) is not int or not -1 <= label < len(steps):
        raise BadInput(f"'label' should be from -1 (no error) to {len(steps) - 1} (last), is {label!r:.30}")
    # What follows an error is built on it, so it counts as wrong. The final answer may be right all the same.
    labels = [label == -1 or k < label for k in range(len(steps))]
    correct = label == -1 if row.get("final_answer_correct") is None else row["final_answer_correct"]
    return {**_trajectory({**row, "correct": correct}, row["problem"], steps, labels), "first_error": label}


# ---- Problems and pairs.

_QUESTION = "question|problem|prompt|instruction"
_ANSWER = "answer|final_answer|ground_truth_answer|ground_truth|gold_answer|gold|label"


def _question_answer(row):
    """The answer as such, or GSM8K's: worked lines that end in "#### 18" ("A: 18" in its model solutions)."""
    answer, solution = _answer(*_pick(row, _ANSWER)), row.get("solution")
    marked = re.fullmatch(r"(.*)(####|\nA:)(.*)", answer, re.DOTALL)
    if marked:
        answer = _text(marked[3], f"answer after {marked[2].strip()}").strip()
        solution = solution or marked[1].strip()
    return {"question": _text(*_pick(row, _QUESTION), may_be_blank=True), "answer": answer,
            "solution": _text(solution, "solution") if solution else None}


def _math(row):
    from parts.answers import extract_answer

    solution = _text(row["solution"], "solution")
    answer = extract_answer(solution) if "\\boxed" in solution else None
    if not answer:
        raise BadInput("no gold answer: 'solution' has no \\boxed{} and there is no 'answer'")
    return {"question": _text(*_pick(row, _QUESTION), may_be_blank=True), "answer": answer, "solution": solution}


def _pair(row):
    answer, name = _pick(row, "answer|label")
    return {"prompt": _prompt(*_pick(row, "prompt|instruction|question")),
            "chosen": _response(row["chosen"], "chosen"), "rejected": _response(row["rejected"], "rejected"),
            "answer": None if answer is None else _answer(answer, name)}


def _response(value, name):
    """A response is a text, a list of one text, or a chat whose last assistant message it is."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [turn["content"] for turn in _messages(value, name) if turn["role"] == "assistant"][-1:]
        name = f"{name}: the last assistant message"
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    return _text(value, name).lstrip()  # a space at the start belongs to the template, not to the response


# ---- Telling the formats apart: the first one whose keys a row has. So the order counts (a ProcessBench row
# would pass for a problem too). "a|b" stands for either key, "a.b" for the key b in the object a.

_FORMATS = [
    ("pairs", "preference pairs", "prompt|instruction|question chosen rejected", _pair),
    ("trajectories", "stepwise supervision", "prompt completions", _stepwise),
    ("trajectories", "Math-Shepherd", "input label", _math_shepherd),
    ("trajectories", "RLHFlow", "conversations", _rlhflow),
    ("trajectories", "PRM800K", "question.problem label.steps", _prm800k),
    ("trajectories", "ProcessBench", "problem steps label", _process_bench),
    ("problems", "question and answer", f"{_QUESTION} {_ANSWER}", _question_answer),
    ("problems", "MATH", f"{_QUESTION} solution", _math),
]


def _missing(row, keys):
    def has(key):
        outer, _, inner = key.partition(".")
        return outer in row and (not inner or isinstance(row[outer], dict) and inner in row[outer])

    return [either for either in keys.split() if not any(has(key) for key in either.split("|"))]


def _format(row, wanted, before):
    """A row's entry in _FORMATS: to be of the kind wanted, and the same as that of the rows before it."""
    found = next((entry for entry in _FORMATS if not _missing(row, entry[2])), None)
    if found and (found is before or not before and wanted in (None, found[0])):
        return found
    if before:
        missing = _missing(row, before[2])
        differs = f"lacks {', '.join(missing)}" if missing else f"is {found[1]}"
        raise BadInput(f"{differs}, the rows before are {before[1]} ({before[2]}); wanted one format a file")
    holds = f"holds {found[0]} ({found[1]})" if found else "is of no known format"
    has = ", ".join(row)[:200] or "none"
    known = "; ".join(f"{name}: {' + '.join(keys.split())}" for kind, name, keys, _ in _FORMATS
                      if wanted in (None, kind))
    raise BadInput(f"{holds}, its keys: {has}; wanted {wanted or 'rows'} with the keys of {known}")


# ---- Reading lines, and the checks that all formats use.

_JSONL = "wanted one JSON object a line (JSON Lines)"


def _read(paths, kind):
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise BadInput(f"no file given to read {kind} from")
    for path in paths:
        yield from (row for _, row in _rows(path, kind) if row)


def _rows(path, kind=None):
    """Yields (entry of _FORMATS, row) for each line; here errors get the FILE:LINE in front."""
    entry = None
    for number, line in _lines(path):
        try:
            row = _object(line)
            entry = _format(row, kind, entry)
            row = entry[3](row)
        except BadInput as error:
            raise BadInput(f"{path}:{number}: {error}") from None
        yield entry, row and {**row, "source": f"{path}:{number}"}
    if entry is None:
        raise BadInput(f"{path}: has no rows; {_JSONL}")


def _lines(path):
    """Yields (number, bytes) of the lines not blank: as bytes, so that one that is not UTF-8 can be named."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _object(line):
    if b"\0" in line:
        raise BadInput("holds NUL bytes; wanted text in UTF-8")
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadInput(f"is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    if text.startswith("["):
        raise BadInput(f"starts a JSON array; {_JSONL}")
    try:
        row = json.loads(text, parse_constant=_not_json)
        # Half of a surrogate pair is valid JSON yet no character: a tokenizer would fail on it much later.
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")  # which would be read as the line of the file
        raise BadInput(f"is not a whole JSON object: {reason}; {_JSONL}") from None
    if not isinstance(row, dict):
        raise BadInput(f"is {_type(row)}; {_JSONL}")
    return row


def _not_json(name):
    raise ValueError(f"{name} is no JSON number")  # Python would read NaN and Infinity without complaint


def _type(value):
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _text(value, name, may_be_blank=False):
    if not isinstance(value, str):
        raise BadInput(f"'{name}' should be text, is {_type(value)}")
    if not value.strip() and not may_be_blank:
        raise BadInput(f"'{name}' is blank")
    return value


def _answer(value, name):
    """A gold answer as text; many files write it as a number."""
    return str(value) if type(value) in (int, float) else _text(value, name).strip()


def _list(value, name, least=1):
    if not isinstance(value, list) or len(value) < least:
        raise BadInput(f"'{name}' should be a list, is {'empty' if value == [] else _type(value)}")
    return value


def _messages(value, name):
    for turn in _list(value, name):
        texts = [isinstance(turn, dict) and isinstance(turn.get(key), str) for key in ("role", "content")]
        if not all(texts):
            raise BadInput(f"'{name}' should be a list of messages, each with the texts 'role' and 'content'")
    _text("".join(turn["content"] for turn in value), name)
    return value


def _prompt(value, name):
    return _messages(value, name) if isinstance(value, list) else _text(value, name)


def _pick(row, names):
    """(value, key) of the first of "a|b|c" that the row has."""
    return next(((row[key], key) for key in names.split("|") if key in row), (None, names))


def split_steps(text):
    """Cut a response into its steps: the pieces between blank lines, stripped, empty ones left out."""
    return [step.strip() for step in re.split(r"\n[^\S\n]*\n", text) if step.strip()]
