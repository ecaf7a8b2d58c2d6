r"""Reads the data files of process supervision: anybody's JSON in, rows of one shape out.

Every data set writes a problem or a step-labelled solution in its own way. This file is the only
place that knows those ways; the rest of the project sees three kinds of rows, all plain dicts:

trajectory  prompt       text, or a list of {"role", "content"} messages
            completions  the steps, each a text, without separators between them
            labels       for each step a float in [0, 1] (1 = right), or None
            answer       the gold answer as text, or None
            correct      whether the solution as a whole is right: True, False, or None (unknown)
            first_error  ProcessBench only: index of the first wrong step, -1 = no error; else None
problem     question (as a prompt), answer (gold, as text), solution (a worked text, or None),
            row (the whole object as it stands in the file, for a check of your own)
pair        prompt, chosen, rejected, answer (gold, or None)

and each with `source`, the "FILE:LINE" it came from ("FILE:item N" where rows are not lines).
A row's format is told by its keys, whatever their case:

trajectories
  stepwise supervision  {"prompt": "1+1?", "completions": ["1=1", "So 2."], "labels": [1, 1]}
                        optional: "answer", "correct" (either will do in place of "labels")
  Math-Shepherd         {"input": "1+1? Step 1: It is 2. ки", "label": "1+1? Step 1: It is 2. +"}
  OpenR                 {"question": "1+1?", "process": "It is 2. \n\n\n\n\n", "label": ["+"]}
  RLHFlow               {"conversations": [{"role": "user", "content": "1+1? Step 1: It is 2."},
                                           {"role": "assistant", "content": "+"}]}
  PRM800K               {"question": {"problem": "1+1?", "ground_truth_answer": "2"}, "label": {
                         "finish_reason": "solution", "steps": [{"chosen_completion": 0,
                         "completions": [{"text": "2.", "rating": 1}], "human_completion": null}]}}
  ProcessBench          {"problem": "1+1?", "steps": ["1+1=3", "So 3."], "label": 0}
  several responses     {"prompt": "1+1?", "answers": ["It is 2.", "So 3."], "label": [1, 0]}
  prompt and response   {"prompt": "1+1?", "response": "So \\boxed{2}.", "answer": "2"}
problems
  verl                  {"prompt": "1+1?", "reward_model": {"ground_truth": "2"}}
  question and answer   {"question": "1+1?", "answer": "2"}, or GSM8K's "1+1=2\n#### 2"
  MATH                  {"problem": "1+1?", "solution": "It is $\\boxed{2}$."}
trajectories
  chat                  {"messages": [{"role": "user", "content": "1+1?"},
                                      {"role": "assistant", "content": "It is 2."}]}
  ShareGPT              {"conversations": [{"from": "human", "value": "1+1?"},
                                           {"from": "gpt", "value": "It is 2."}]}
pairs
  preference pairs      {"prompt": "1+1?", "chosen": "2", "rejected": "3"}

A file holds an object a line, an array, or objects one after another, plain or as .gz. Rows of no
use (a blank gold answer, "proof") are left out and told; a wrong one is a `BadInput`. What belongs
to a question is put to it ("system", "context", "input") or refused ("choices").
"""

import contextlib
import gzip
import json
import os
import re
import sys
import zlib

from parts.answers import extract_answer, verify


class BadInput(ValueError):
    """An error the user can mend: one line with the file, line or option, and what is wanted."""

    def __init__(self, message):
        # Messages quote the user's data, line breaks and all: they are kept to one line here.
        super().__init__(" ".join(str(message).splitlines()))


@contextlib.contextmanager
def named(source):
    """Errors in what is done with a row get the row's place in front, where it has one."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{source}: {error}" if source else error) from None


class LeftOut(Exception):
    """Why a row is in order but of no use."""


def split_steps(text, step_end="\n\n"):
    """Cuts a response into its steps: the pieces between blank lines, or its lines where `step_end`
    is "\\n"; stripped, empty ones left out."""
    pieces = re.split(r"\n[^\S\n]*\n", text) if step_end == "\n\n" else text.split(step_end)
    return [piece.strip() for piece in pieces if piece.strip()]


def read_trajectories(paths, step_end="\n\n", outcome=True, left_out=None):
    """Yields the trajectories of one file or of a list of files, reading one line at a time.

    Responses in one piece are cut by `split_steps`. With outcome=False, for texts to imitate or to
    score, a row needs no labels, answer or outcome, and problems' worked solutions are read too.
    Rows left out are appended to the list `left_out` as "FILE:LINE: why"; where it is None they are
    told on stderr, in a line for each file. Nothing is opened before the first row is asked for.
    """
    kinds = ("trajectories",) if outcome else ("trajectories", "worked solutions")
    for row in _read(paths, kinds, left_out):
        if isinstance(row["completions"], str):
            row["completions"] = split_steps(row["completions"], step_end)
        yield row


def read_problems(paths, left_out=None):
    """Yields the problems of one file or of a list of files; those without a gold answer are left
    out. A question may be blank: the scripts leave out and count what cannot be asked."""
    return _read(paths, ("problems",), left_out)


def read_pairs(paths, left_out=None):
    """Yields the preference pairs of one file or of a list; chosen and rejected may be equal."""
    return _read(paths, ("pairs",), left_out)


def recognise(path):
    """What a file's first row is, as (kind, format): ("trajectories", "Math-Shepherd") for one."""
    source, row = next(_objects(path))
    try:
        return _format(row, ())[:2]
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None


# ---- Trajectories: one function a format, from the row as published to the row described above.


def _trajectory(row, prompt, steps, labels=None):
    """The end all trajectory formats share. `steps` may be a text that is still to be cut."""
    for number, step in enumerate([] if isinstance(steps, str) else steps, 1):
        _text(step, f"step {number}")
    if labels is not None:
        if len(_list(labels, "labels", least=0)) != len(steps):
            raise BadInput(f"'labels' has {len(labels)} entries for {len(steps)} completions")
        for number, label in enumerate(labels, 1):
            if not isinstance(label, (int, float)) or not 0 <= label <= 1:
                wanted = "should be true, false or from 0 to 1"
                raise BadInput(f"label {number} {wanted}, is {label!r:.40}")
        labels = [float(label) for label in labels]
    # The outcome, from the best evidence: said outright, else checked, else the last step's label.
    answer, correct = _gold(row), row.get("correct")
    if correct not in (True, False, None):  # 0 and 1 are equal to these, hence accepted too
        wanted = "'correct' or 'final_answer_correct' should be true or false"
        raise BadInput(f"{wanted}, is {correct!r:.30}")
    if correct is None and answer:
        correct = verify(steps if isinstance(steps, str) else "\n\n".join(steps), answer)
    elif correct is None and labels is not None:
        correct = labels[-1] >= 0.5
    return {
        "prompt": prompt,
        "completions": steps,
        "labels": labels,
        "answer": answer or None,
        "correct": None if correct is None else bool(correct),
        "first_error": None,
    }


def _stepwise(row):
    steps = _list(row["completions"], "completions")
    return _trajectory(row, _prompt(row, "prompt"), steps, row.get("labels"))


def _math_shepherd(row):
    """Each step ends in the tag "ки"; "label" is the same text with + or - in the tags' place."""
    text, marked = _text(row["input"], "input").rstrip(), _text(row["label"], "label").rstrip()
    *pieces, rest = text.split("ки")
    if rest:
        raise BadInput("'input' should end each step, the last one too, in the tag 'ки'")
    at, marks = -1, []
    for piece in pieces:  # position by position, as steps hold plus and minus signs of their own
        at += len(piece) + 1
        marks.append(marked[at : at + 1])
    if at + 1 != len(marked) or not set(marks) <= {"+", "-"}:
        wanted = f"with + or - for its {len(pieces)} tags"
        raise BadInput(f"'label' should be the text of 'input' {wanted}")
    # A few published questions hold a stray tag, the end of no step: the first step is "Step 1:".
    first = next((k for k, piece in enumerate(pieces) if STEP_1.search(piece)), 0)
    question, step = _split_question("".join(pieces[: first + 1]), "?")
    steps = [step] + [piece.strip() for piece in pieces[first + 1 :]]
    return _trajectory(row, question, steps, [mark == "+" for mark in marks[first:]])


def _openr(row):
    """Each step ends in five line breaks; "label" holds a + or - for each."""
    marks = _list(row["label"], "label")
    if not all(mark in ("+", "-") for mark in marks):
        raise BadInput("'label' should hold a + or - for each step of 'process'")
    steps = split_steps(_text(row["process"], "process"), "\n\n\n\n\n")
    return _trajectory(row, _prompt(row, "question"), steps, [mark == "+" for mark in marks])


def _rlhflow(row):
    """A chat in which the user says the steps and the assistant answers each with + or -."""
    turns = _messages(row["conversations"], "conversations")
    said = [turn["content"].strip() for turn in turns]
    steps, marks = said[::2], said[1::2]
    if not {"+", "-"} & set(said):  # no step labels: a chat as any other
        return _chat(row)
    by_turns = [turn["role"] for turn in turns] == ["user", "assistant"] * len(steps)
    if not by_turns or not set(marks) <= {"+", "-"}:
        wanted = "user turns (a step) and assistant turns (+ or -)"
        raise BadInput(f"'conversations' should alternate {wanted}")
    question, steps[0] = _split_question(steps[0], "\n\n")
    prompt = _prompt({**row, "prompt": question}, "prompt")
    return _trajectory(row, prompt, steps, [mark == "+" for mark in marks])


STEP_1 = re.compile("[Ss]tep 1:")


def _split_question(text, otherwise):
    """Cuts a text before its "Step 1:"; where it has none, after the last `otherwise`."""
    found = STEP_1.search(text)
    at = found.start() if found else text.rfind(otherwise) + 1
    if not text[:at].strip():
        raise BadInput(f"no question, or neither 'Step 1:' nor {otherwise!r} between it and step 1")
    return text[:at].strip(), text[at:].strip()


def _prm800k(row):
    """One path through a tree: at each step several candidates were rated and one was continued."""
    question, label, path = row["question"], row["label"], []
    for step in _list(label["steps"], "label.steps", least=0):
        if not isinstance(step, dict):
            raise BadInput(f"'label.steps' should hold objects, holds {_type(step)}")
        options = _list(step.get("completions") or [], "completions", least=0)
        options = [_rated(option) for option in options]
        chosen = step.get("chosen_completion")
        if chosen is not None:
            if type(chosen) is not int or not 0 <= chosen < len(options):
                count = f"{len(options)} 'completions'"
                raise BadInput(f"'chosen_completion' is {chosen!r:.40} with {count}")
            path.append(options[chosen])
        elif step.get("human_completion"):
            path.append(_rated(step["human_completion"]))
        else:  # the annotator stopped: the worst candidate shows where it went wrong, if it did
            if options:
                path.append(min(options, key=lambda option: option[1]))
            break
    if not path:
        raise LeftOut("has no rated step")
    # A rating of 0 is "neither wrong nor helpful". The data's authors count it as right.
    labels = [rating >= 0 for _, rating in path]
    wrong = label.get("finish_reason") == "found_error" or not labels[-1]
    right = label.get("finish_reason") == "solution" and all(labels)
    made = _trajectory({}, _prompt(question, "problem"), [text for text, _ in path], labels)
    # Annotators judged the outcome, or left it open: no answer check or last label overrules them.
    outcome = False if wrong else True if right else None
    return {**made, "answer": _gold(question) or None, "correct": outcome}


def _rated(option):
    """(text, rating) of a PRM800K completion; one not rated (often written by hand) is neutral."""
    if not isinstance(option, dict) or option.get("rating") not in (-1, 0, 1, None):
        wanted = "{'text': ..., 'rating': -1, 0 or 1}"
        raise BadInput(f"a completion should be {wanted}, is {option!r:.60}")
    return _text(option.get("text"), "text"), option.get("rating") or 0


def _process_bench(row):
    steps, label = _list(row["steps"], "steps"), row["label"]
    if type(label) is not int or not -1 <= label < len(steps):
        wanted = f"from -1 (no error) to {len(steps) - 1} (last)"
        raise BadInput(f"'label' should be {wanted}, is {label!r:.30}")
    # What follows an error is built on it, so it counts as wrong. The final answer may be right.
    labels = [label == -1 or k < label for k in range(len(steps))]
    correct = row.get("final_answer_correct")
    row = {**row, "correct": label == -1 if correct is None else correct}
    return {**_trajectory(row, _prompt(row, "problem"), steps, labels), "first_error": label}


# ---- Responses in one piece.


def _response(row):
    text, name = _pick(row, RESPONSE)
    before, text = _last_turn(text, name)
    if before:
        raise BadInput(f"'{name}' should be one turn; wanted those before it in the prompt")
    row = {"correct": row.get("label"), **row}  # TRL's unpaired preferences
    return _trajectory(row, _prompt(row, QUESTION), text)


def _responses(row):
    """Several responses to one question: a row for each; "label" says which are right."""
    texts, outcomes = _list(row["answers"], "answers"), _list(row["label"], "label")
    if len(texts) != len(outcomes):
        raise BadInput(f"'label' has {len(outcomes)} entries for {len(texts)} 'answers'")
    made, prompt = [], _prompt(row, "prompt")
    for text, correct in zip(texts, outcomes):
        made.append(_trajectory({"correct": correct}, prompt, _text(text, "answers")))
    return made


def _chat(row):
    """The last turn is the response, all turns before it are the prompt."""
    turns, name = _pick(row, "messages|conversations")
    before, text = _last_turn(turns, name)
    return _trajectory(row, _prompt({**row, name: before}, name), text)


def _worked(row):
    """A problem's own solution, as one to imitate: right where it is known what is right."""
    text = _first(row.get("solution")) or _pick(row, GOLD)[0]
    if not isinstance(text, str) or _is_bare(text):
        raise LeftOut("no worked solution in 'solution' or 'answer'")
    answer, _ = _answer_and_solution(row)
    made = _trajectory({}, _prompt(row, QUESTION), text)
    return {**made, "answer": answer, "correct": True if answer else None}


# ---- Problems and pairs.

QUESTION = "question|problem|prompt|instruction|query"
RESPONSE = "response|completion|output"
GOLD = "answer|final_answer|ground_truth_answer|ground_truth|gold_answer|gold|expected_answer"
PROBLEM_GOLD = f"{GOLD}|reward_model|label"
NO_ANSWER = {"proof", "notfound", "not found", "none", "null", "nan", "n/a"}


def _problem(row):
    answer, solution = _answer_and_solution(row)
    if not answer:
        value, name = _pick(row, PROBLEM_GOLD)
        if solution and _is_blank(value):
            raise LeftOut("no gold answer: 'solution' has no \\boxed{} and there is no 'answer'")
        raise LeftOut(f"no gold answer: {name!r} is {value!r:.40}")
    question = _prompt(row, QUESTION, may_be_blank=True)
    return {"question": question, "answer": answer, "solution": solution}


def _answer_and_solution(row):
    """The answer as such, or GSM8K's: worked lines that end in "#### 18" ("A: 18" in its model
    solutions), or the solution's, or a solution that is nothing but the answer. None: no answer."""
    answer, solution = _gold(row, PROBLEM_GOLD), _first(row.get("solution"))
    solution = None if _is_blank(solution) else _text(solution, "solution")
    marked = re.fullmatch(r"(.*)(####|\nA:)(.*)", answer or "", re.DOTALL)
    if marked:
        answer, solution = marked[3].strip(), solution or marked[1].strip() or None
    elif answer is None and solution:
        is_worked = "\\boxed" in solution or "####" in solution
        answer = extract_answer(solution) if is_worked else None
        if not is_worked and _is_bare(solution):
            answer, solution = solution.strip(), None
    return answer or None, solution


def _is_bare(text):
    """Is a text an answer without words around it? At most one word of letters, and no sentence."""
    words = re.findall(r"(?<!\\)\b[^\W\d_]{2,}", text)
    return len(text) <= 60 and len(words) < 2 and not text.endswith(".")


def _gold(row, names=GOLD):
    """The gold answer as text: None where there is none, "" where it is a word like "proof"."""
    value, name = _pick(row, names)
    if isinstance(value, dict) and "ground_truth" in value:  # verl
        value = value["ground_truth"]
    if isinstance(value, str) and re.fullmatch(r'\["[^"\\]*"\]', value):  # Skywork-OR1
        value = json.loads(value)
    if _is_blank(value):
        return None
    several = isinstance(value, list) and name != "label"  # all of them together are the answer
    parts = value if several else [value]
    parts = [str(x) if type(x) in (int, float) else _text(x, name, True) for x in parts]
    answer = ", ".join(parts).strip()
    return "" if answer.lower() in NO_ANSWER else answer


def _pair(row):
    names = f"prompt|{QUESTION}|trajectory"
    given, _ = _pick(row, names)
    before, chosen = _last_turn(row["chosen"], "chosen")
    also, rejected = _last_turn(row["rejected"], "rejected")
    if before and also and before != also:
        raise LeftOut("'chosen' and 'rejected' differ before their last turns")
    before = before or also
    if len(before) > (len(given) if isinstance(given, list) else given is not None):
        row = {**row, "prompt": before}  # the chats hold more of the conversation than "prompt"
    elif given is None:
        wanted = "'prompt', or chats in 'chosen' and 'rejected' with the same turns before the last"
        raise BadInput(f"has no prompt; wanted {wanted}")
    start = row.get("initial_reason_steps") or ""  # Step-DPO: what both responses go on from
    if start:
        _text(start, "initial_reason_steps")
    return {
        "prompt": _prompt(row, names),
        "chosen": (start + chosen).lstrip(),  # a space at the start belongs to the template
        "rejected": (start + rejected).lstrip(),
        "answer": _gold(row, PROBLEM_GOLD) or None,
    }


# ---- Telling the formats apart: the first one whose keys a row has. "a|b" stands for either key,
# "a.b" for the key b in the object a, or in an object of the list a. A row with the keys of several
# formats from OPEN on (a problem and a response to imitate) is what it is asked for as.

FORMATS = [
    ("pairs", "preference pairs", "chosen rejected", _pair),
    ("trajectories", "stepwise supervision", "prompt completions", _stepwise),
    ("trajectories", "Math-Shepherd", "input label", _math_shepherd),
    ("trajectories", "OpenR", "question process label", _openr),
    ("trajectories", "RLHFlow", "conversations.role", _rlhflow),
    ("trajectories", "PRM800K", "question.problem label.steps", _prm800k),
    ("trajectories", "ProcessBench", "problem steps label", _process_bench),
    ("trajectories", "several responses", "prompt answers label", _responses),
    ("trajectories", "prompt and response", f"{QUESTION} {RESPONSE}", _response),
    ("problems", "verl", "prompt reward_model.ground_truth", _problem),
    ("problems", "question and answer", f"{QUESTION} {PROBLEM_GOLD}", _problem),
    ("problems", "MATH", f"{QUESTION} solution", _problem),
    ("trajectories", "chat", "messages", _chat),
    ("trajectories", "ShareGPT", "conversations.from", _chat),
    ("worked solutions", "worked solution", f"{QUESTION} solution|{GOLD}", _worked),
]
OPEN = FORMATS[8:]


def _missing(row, keys):
    has = set(row)
    for key, value in row.items():
        parts = value if isinstance(value, list) else [value]
        has |= {f"{key}.{inner}" for part in parts if isinstance(part, dict) for inner in part}
    return [either for either in keys.split() if not has & set(either.split("|"))]


def _format(row, kinds, before=None):
    """A row's format: of a kind that is wanted, and the same as that of the rows before it."""
    fits = [entry for entry in FORMATS if not _missing(row, entry[2])]
    found = fits[0] if fits else None
    if found in OPEN:
        wanted = [entry for entry in fits if entry is before or not before and entry[0] in kinds]
        found = wanted[0] if wanted else found
    if found and (found is before or not before and (not kinds or found[0] in kinds)):
        return found
    if before:
        missing = _missing(row, before[2])
        differs = f"lacks {', '.join(missing)}" if missing else f"is {found[1]}"
        same = f"the rows before are {before[1]} ({before[2]}); wanted one format a file"
        raise BadInput(f"{differs}, {same}")
    holds = f"holds {found[0]} ({found[1]})" if found else "is of no known format"
    known = [entry for entry in FORMATS[:-1] if not kinds or entry[0] in kinds]
    known = "; ".join(f"{entry[1]}: {' + '.join(entry[2].split())}" for entry in known)
    wanted = f"{kinds[0] if kinds else 'rows'} with the keys of {known}"
    raise BadInput(f"{holds}, its keys: {', '.join(row)[:200] or 'none'}; wanted {wanted}")


# ---- From files to the functions above.

# Parts of a question that no rule can put to it (a and b: columns of choices).
UNREAD = ("choices", "options", "a", "b", "reasoning_steps", "history", "image", "images")


def _read(paths, kinds, left_out):
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise BadInput(f"no file given to read {kinds[0]} from")
    count, told = 0, []
    for path in paths:
        told.append([])
        for row in _rows(path, kinds, told[-1]):
            count += 1
            yield row
        if left_out is not None:
            left_out += told[-1]
    if not count:
        raise BadInput(f"{told[0][0]}; no row is left to use")
    for here in told if left_out is None else ():
        more = f"; and {len(here) - 10} more" if len(here) > 10 else ""
        if here:
            print(f"left out {len(here)} rows: {'; '.join(here[:10])}{more}", file=sys.stderr)


def _rows(path, kinds, left_out):
    """Yields the rows of one file; here errors get the FILE:LINE in front."""
    entry, seen = None, set()
    for source, row in _objects(path):
        try:
            keys = tuple(row)
            if keys not in seen or "." in entry[2]:  # else it is of the same format as another one
                entry = _format(row, kinds, entry)
                seen.add(keys)
            for key in UNREAD:
                if row.get(key):
                    raise BadInput(f"has {key!r}, which is not read; put it into the question")
            made = entry[3](row)
            made = made if isinstance(made, list) else [made]
            outcome = [made[0].get("labels"), made[0].get("correct")]
            if kinds == ("trajectories",) and outcome == [None, None]:
                why = "nothing to learn from: a row needs 'labels', or else 'correct' or 'answer'"
                raise LeftOut(why) if "answer" in row else BadInput(why)
        except BadInput as error:
            raise BadInput(f"{source}: {error}") from None
        except LeftOut as why:
            left_out.append(f"{source}: {why}")
            continue
        for one in made:
            one["source"] = source
            if entry[0] == "problems":
                one["row"] = row
            yield one


def _objects(path):
    """Yields (source, object) for each row of a file, one line at a time where rows are lines."""
    _refuse_other_files(str(path).rstrip("/"))
    lines, empty = _lines(path), True
    for number, line in lines:
        is_line = not empty or not GOES_ON.match(line)
        if not is_line:
            line += b"".join(rest for _, rest in lines)
        for item, value in enumerate(_values(path, number, line), 1):
            source = f"{path}:{number}" if is_line else f"{path}:item {item}"
            if not isinstance(value, dict):
                raise BadInput(f"{source}: is {_type(value)}; {WANTED}")
            # "Answer" counts as "answer", where the row does not have that as well.
            yield source, {**{key.lower(): part for key, part in value.items()}, **value}
            empty = False
    if empty:
        raise BadInput(f"{path}: has no rows; {WANTED}")


WANTED = "wanted one JSON object a line, or an array of objects"
# The first line of a file that is an array, or an object that ends on a later line.
GOES_ON = re.compile(rb"(\xef\xbb\xbf)?\s*(\[|\{(.*[{\[,])?\s*$)", re.DOTALL)


def _lines(path):
    """Yields (number, line), in bytes, so that a line that is not UTF-8 can be named."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: cannot be read: {reason}") from None


def _values(path, number, data):
    """Yields the values in some bytes of JSON, one after another, or the items of an array."""
    try:
        if b"\0" in data:
            raise BadInput("holds NUL bytes; wanted text in UTF-8")
        text = data.decode("utf-8-sig").strip()
        has_pairs = "\\ud" in text or "\\uD" in text  # of surrogates
        at, end = (1, len(text) - 1) if text.startswith("[") else (0, len(text))
        while (at := GAP.match(text, at).end()) < end:
            value, at = DECODER.raw_decode(text, at)
            if has_pairs:  # half of one is valid JSON, yet no character: a tokenizer would fail
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            yield value
        if at > end or text[end:] not in ("", "]"):
            raise ValueError("the array does not end in ]")
        return
    except BadInput as error:
        reason = error
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8: {error.reason} at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        number += error.lineno - 1
        reason = f"is not a whole JSON object: {error.msg}: column {error.colno}; {WANTED}"
    except (ValueError, RecursionError) as error:
        reason = f"is not a whole JSON object: {error}; {WANTED}"
    raise BadInput(f"{path}:{number}: {reason}")


def _not_json(name):
    raise ValueError(f"{name} is no JSON number")  # Python would read NaN and Infinity


DECODER = json.JSONDecoder(parse_constant=_not_json)
GAP = re.compile(r"[\s,]*")


def _refuse_other_files(path):
    """For files of other kinds: the one command that turns them into JSON lines."""
    stem, ending = os.path.splitext(path)
    call = {".parquet": "Dataset.from_parquet", ".csv": "Dataset.from_csv"}.get(ending)
    is_folder = os.path.exists(f"{path}/dataset_info.json")
    has_splits = os.path.exists(f"{path}/dataset_dict.json")
    if is_folder or has_splits:
        call = "load_from_disk"
    if call and os.path.exists(path):
        call = f"{call}('{path}')" + "['train']" * has_splits
        code = f"import datasets; datasets.{call}.to_json('{stem}.jsonl')"
        raise BadInput(f'{path}: is not JSON; this makes JSON lines of it: python -c "{code}"')


# ---- Checks and choices that all formats use.


TYPES = dict(dict="an object", list="a list", str="text", bool="true or false", NoneType="null")


def _type(value):
    return TYPES.get(type(value).__name__, "a number")


def _text(value, name, may_be_blank=False):
    if not isinstance(value, str):
        raise BadInput(f"'{name}' should be text, is {_type(value)}")
    if not value.strip() and not may_be_blank:
        raise BadInput(f"'{name}' is blank")
    return value


def _list(value, name, least=1):
    if not isinstance(value, list) or len(value) < least:
        raise BadInput(f"'{name}' should be a list, is {'empty' if value == [] else _type(value)}")
    return value


def _first(value):
    return value[0] if isinstance(value, list) and value else value


def _is_blank(value):
    return value is None or value == [] or isinstance(value, str) and not value.strip()


def _pick(row, names):
    """(value, key) of the first of "a|b|c" that holds something, else of the first the row has."""
    there = [(row[name], name) for name in names.split("|") if name in row]
    return next((pair for pair in there if not _is_blank(pair[0])), (there or [(None, names)])[0])


def _messages(value, name):
    """A chat of {"role", "content"} messages. ShareGPT has {"from", "value"} in their place."""
    roles, turns = {"human": "user", "gpt": "assistant"}, []
    for turn in _list(value, name):
        turn = turn if isinstance(turn, dict) else {}
        if "from" in turn and "role" not in turn:
            role = turn["from"]
            turn = {"role": roles.get(str(role), role), "content": turn.get("value")}
        if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            wanted = "a list of messages, each with the texts 'role' and 'content'"
            raise BadInput(f"'{name}' should be {wanted}")
        turns.append(turn)
    _text("".join(turn["content"] for turn in turns), name)
    return turns


def _last_turn(value, name):
    """(turns before, text) of a response: a text, a list of one text, or a chat that ends in it."""
    value, before = [value] if isinstance(value, dict) else value, []
    if isinstance(_first(value), dict):
        *before, last = _messages(value, name)
        if last["role"] != "assistant":
            raise LeftOut(f"'{name}' does not end in a message of the assistant")
        value = last["content"]
    elif isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and not value.strip():
        raise LeftOut(f"'{name}' is blank")
    return before, _text(value, name)


def _prompt(row, names, may_be_blank=False):
    """The question with all that belongs to it: system turn, passage before it, input behind."""
    value, name = _pick(row, names)
    is_chat = isinstance(value, list)
    value = _messages(value, name) if is_chat else _text(value, name, may_be_blank)
    for key in ("context", "body", "passage", "input"):
        if _is_blank(row.get(key)):
            continue
        if is_chat:
            raise BadInput(f"has {key!r} beside a chat; wanted it in the chat")
        part = _text(row[key], key)
        if value not in part:  # TDRM's "input" is the question once more, in its template
            value = f"{value}\n\n{part}" if key == "input" else f"{part}\n\n{value}"
    system, key = _pick(row, "system|system_prompt")
    if _is_blank(system):
        return value
    first = {"role": "system", "content": _text(system, key)}
    turns = value if is_chat else [{"role": "user", "content": value}]
    return turns if turns[0] == first else [first, *turns]
