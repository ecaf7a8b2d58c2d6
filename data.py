"""What a problem, a step, a trajectory and a verified answer are, and how they become tensors.

A *problem* is a question with a gold answer. A *trajectory* is one response to it, cut into *steps*
at blank lines. A process reward model values the *states* s_t = question + steps 1..t, so this
file's job is to know exactly at which token each step ends:

    prompt (chat template) | step 1 \\n\\n | step 2 \\n\\n | ... | step T
                                    ^ V(s_1)       ^ V(s_2)           ^ V(s_T)

Steps are tokenised one by one and concatenated, so the ends come from lengths and never from
searching for a separator in the ids; masks come from lengths too, never from token values (pad may
equal eos).

The built-in task is one-digit arithmetic in a chain, the last digit kept: "7+8*3-5" is solved as
"7+8=5", "5*3=5", "5-5=0", "\\boxed{0}". Its solutions come from a *student with habits*, who gets
30% of the 240 facts wrong 60% of the time, always with the same wrong digit. So errors are
systematic: majority voting repeats them, and a verifier has something to win. Three levels:
`builtin` (3 to 6 operations); `builtin-hard` (8 to 14, 37.5% of the facts), for studies in which
the first is solved too soon; and `builtin-choice`, whose 3 to 5 different additions and
subtractions may be done in any order ("0-4+4+6" as "0+4=4", "4-4=0", "0+6=6"). There several next
steps are right, and not all are as promising: an order can avoid the facts that the student gets
wrong (40% of them, 70% of the time).

Left out on purpose: packing several trajectories into one row (simple, and faster only with a
varlen attention kernel).

    python data.py                                   # samples of the built-in task
    python data.py FILE... [--model NAME_OR_FOLDER]  # what a file holds, and one example as seen
    python data.py --write 4000 > problems.jsonl     # built-in training problems in a file
"""

import argparse
import collections.abc
import functools
import gc
import itertools
import json
import pickle
import random
import sys
import zlib
from array import array
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from parts.answers import extract_answer, verify  # noqa: F401
from parts.formats import split_steps  # noqa: F401
from parts.formats import BadInput, named, read_pairs, read_problems, read_trajectories, recognise
from parts.models import Layout, closing_id, encode_prompt, load_tokenizer, middle_ids, token_ids
from parts.runs import Processes

# --------------------------------------------------------------------------------------------------
# The built-in task. Everything is a pure function of its seed.


@dataclass(frozen=True)
class Level:
    operations: tuple  # fewest and most in a question
    shaky: float  # share of the facts about which the student has a wrong habit
    rate: float = 0.6  # how often it follows one
    signs: str = "+-*"
    any_order: bool = False  # the operations are different ones, and may be done in any order
    batches: int = 600  # of 64 of its solutions, that a policy learns from: one pass is enough


LEVELS = {
    "builtin": Level((3, 6), 0.3),
    "builtin-hard": Level((8, 14), 0.375, batches=1200),
    "builtin-choice": Level((3, 5), 0.4, 0.7, "+-", any_order=True, batches=2200),
}
FACTS = [(a, op, b) for a in range(10) for op in "+-*" for b in range(2, 10)]
OPERATIONS = [f"{op}{b}" for _, op, b in FACTS[:24]]  # a fact's place: 24 * value + operation's


def digit(a, op, b):
    """The last digit of `a op b`: the only arithmetic of the task."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


RIGHT = [digit(*fact) for fact in FACTS]


@functools.cache
def wrong_habits(level):
    """What the student takes each of FACTS for, None where it has no wrong habit. Habits belong to
    the task, not to a run: they are the same under every seed."""
    rng, habits = random.Random(0), [None] * len(FACTS)
    shaky = rng.sample(range(len(FACTS)), len(FACTS))
    wrong = {i: (RIGHT[i] + rng.randint(1, 9)) % 10 for i in shaky}
    asked = [i for i in shaky if FACTS[i][1] in level.signs]
    for i in asked[: round(level.shaky * len(asked))]:
        habits[i] = wrong[i]
    return habits


def student(value, operations, random, habits, rate):
    """Apply `operations` (places in OPERATIONS) to `value` as the student does -> the digit after
    each one. `random()` is asked only where there is a habit."""
    digits = []
    for operation in operations:
        fact = 24 * value + operation
        value = habits[fact]
        if value is None or random() >= rate:
            value = RIGHT[fact]
        digits.append(value)
    return digits


def parse_question(question):
    """'7+8*3' -> (7, ['+8', '*3'])."""
    return int(question[0]), [question[i : i + 2] for i in range(1, len(question), 2)]


def is_test(question):
    """One question in five is for testing, by its text alone: no seed or size can make train and
    test overlap."""
    return zlib.crc32(question.encode()) % 5 == 0


def make_problems(n, split="train", seed=0, level="builtin"):
    """`n` different built-in problems {"question", "answer"} of one split ("train" or "test")."""
    rng, answers = random.Random(f"{level} {split} {seed}"), {}
    level = LEVELS[level]
    known = [operation for operation in OPERATIONS if operation[0] in level.signs]
    while len(answers) < n:
        length, question = rng.randint(*level.operations), str(rng.randint(0, 9))
        if level.any_order:
            question += "".join(rng.sample(known, length))
        else:
            for _ in range(length):
                question += rng.choice(level.signs) + str(rng.randint(2, 9))
        if is_test(question) == (split == "test") and question not in answers:
            value, operations = parse_question(question)
            for operation in operations:
                value = RIGHT[24 * value + OPERATIONS.index(operation)]
            answers[question] = str(value)
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


def make_trajectories(
    problems, samples=1, label_rollouts=0, label_kind="hard", seed=0, level="builtin"
):
    """Student solutions of built-in problems, as rows of the trajectory format (`samples` for each
    problem, in order).

    With `label_rollouts` = K > 0, each step is labelled from K student solutions that continue from
    it: the fraction that reaches the answer (`label_kind="soft"`), or 1 if any does ("hard", as
    Math-Shepherd estimates). `label_kind="correct"` needs no rollouts: 1 until the first wrong step
    (as people label, PRM800K). With K = 0 labels are None and the outcome is all there is.
    """
    rng, rows, level = random.Random(f"solutions {seed}"), [], LEVELS[level]
    habits = wrong_habits(level)
    for problem in problems:
        start, operations = parse_question(problem["question"])
        places = [OPERATIONS.index(operation) for operation in operations]
        answer = int(problem["answer"])
        for _ in range(samples):
            order = rng.sample(places, len(places)) if level.any_order else places
            digits = student(start, order, rng.random, habits, level.rate)
            steps, first_error, before = [], -1, start
            for t, (place, after) in enumerate(zip(order, digits)):
                steps.append(f"{before}{OPERATIONS[place]}={after}")
                if first_error < 0 and after != RIGHT[24 * before + place]:
                    first_error = t
                before = after
            labels, correct = None, before == answer
            if label_rollouts and label_kind == "correct":
                labels = [float(first_error < 0 or t < first_error) for t in range(len(steps) + 1)]
            elif label_rollouts:
                shares = success_rates(digits, order, answer, label_rollouts, rng, level)
                labels = shares if label_kind == "soft" else [float(share > 0) for share in shares]
            rows.append(
                {
                    "prompt": problem["question"],
                    "completions": [*steps, f"\\boxed{{{before}}}"],
                    "labels": labels,
                    "answer": problem["answer"],
                    "correct": correct,
                    "first_error": first_error,
                }
            )
    return rows


def success_rates(digits, order, answer, rollouts, rng, level):
    """From each step of a student's solution, the share of `rollouts` student solutions of the rest
    that reach the answer."""
    shares, habits = [], wrong_habits(level)
    for t, value in enumerate(digits[:-1]):
        hits, rest = 0, order[t + 1 :]
        for _ in range(rollouts):
            if level.any_order:
                rest = rng.sample(rest, len(rest))
            hits += student(value, rest, rng.random, habits, level.rate)[-1] == answer
        shares.append(hits / rollouts)
    return shares + [float(digits[-1] == answer)] * 2  # after the last result nothing is open


def builtin_tokenizer():
    """The built-in task's tokenizer: an ordinary `PreTrainedTokenizerFast` with pad, eos and a chat
    template, made offline, so that the built-in policy and a 7B model take the same path through
    every script."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = SPECIAL + list("0123456789+-*=}") + ["\\boxed{", "\n\n"]
    numbered = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|\n\n|."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces between the tokens
    return as_fast_tokenizer(tokenizer)


def byte_tokenizer():
    """A tokenizer that spells any text in bytes: for looking at files without a model, and for
    tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return as_fast_tokenizer(tokenizer)


SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<assistant>' if m.role == 'assistant' else '<user>' }}"
    "{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def as_fast_tokenizer(tokenizer):
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    names["additional_special_tokens"] = ["<user>", "<assistant>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def builtin_level(paths):
    """The built-in level that --data names, or None where it names files."""
    if len(paths) > 1 and set(paths) & set(LEVELS):
        raise BadInput(f"--data {' '.join(paths)}: the built-in task and files do not mix")
    return paths[0] if paths[0] in LEVELS else None


# --------------------------------------------------------------------------------------------------
# Text to token ids: steps tokenised one by one, their ends remembered.


def encode_trajectory(tokenizer, prompt, steps, eos=False, layout=Layout()):
    """-> input_ids, prompt_length, step_ends: the ids of prompt + steps, and for each step the
    index of its last token.

    Every step but the last carries its closing blank line, as when the model writes it. `eos`
    appends the end-of-response token after the last step: for training a policy, not a PRM, where
    nothing may follow a prefix.
    """
    input_ids, step_ends = encode_prompt(tokenizer, layout.ask(prompt)), []
    prompt_length = len(input_ids)
    for t, step in enumerate(steps):
        closed = step + layout.step_end if t < len(steps) - 1 else step
        input_ids += token_ids(tokenizer, closed)
        step_ends.append(len(input_ids) - 1)
    if eos:
        input_ids.append(closing_id(tokenizer))
    return input_ids, prompt_length, step_ends


@dataclass
class Example:
    """A trajectory in token ids, with what is known of it. Its length is that of `input_ids`."""

    prompt: object  # text, or chat messages
    completions: list  # the steps' texts
    input_ids: list
    prompt_length: int
    step_ends: list  # index in input_ids of each step's last token
    labels: list | None = None  # a float in [0, 1] for each step, or None
    correct: bool | None = None  # is the final answer right? None: unknown
    first_error: int | None = None  # the first wrong step's index, -1: there is none, None: unknown
    answer: str | None = None
    source: str = ""  # FILE:LINE

    def __len__(self):
        return len(self.input_ids)


# --------------------------------------------------------------------------------------------------
# Examples to tensors, and the order in which batches come.


def collate(examples, pad_id, device="cpu"):
    """Right-padded tensors of B examples with up to T tokens and S steps.

    -> input_ids, attention_mask (B, T); response_mask (B, T-1), True where the *next* token belongs
    to the response;
       step_ends (B, S) indices into T; step_mask (B, S); labels (B, S), 0 where there are none;
       outcomes (B,).
    """
    B, T, S = len(examples), max(map(len, examples)), max(len(e.step_ends) for e in examples)
    input_ids, attention_mask = np.full((B, T), pad_id), np.zeros((B, T), dtype=np.int64)
    response_mask = np.zeros((B, T - 1), dtype=bool)
    step_ends, step_mask = np.zeros((B, S), dtype=np.int64), np.zeros((B, S), dtype=bool)
    labels, outcomes = np.zeros((B, S), dtype=np.float32), np.zeros(B, dtype=np.float32)
    for b, e in enumerate(examples):
        tokens, steps = len(e), len(e.step_ends)
        input_ids[b, :tokens], attention_mask[b, :tokens] = e.input_ids, 1
        response_mask[b, e.prompt_length - 1 : tokens - 1] = True
        step_ends[b, :steps], step_mask[b, :steps] = e.step_ends, True
        labels[b, :steps] = e.labels or 0
        outcomes[b] = float(e.correct or 0)
    arrays = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "response_mask": response_mask,
        "step_ends": step_ends,
        "step_mask": step_mask,
        "labels": labels,
        "outcomes": outcomes,
    }
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def batches(lengths, batch_size, seed=0, start=0):
    """Index lists of one global batch after another, without end, from the `start`-th on: all a
    resumed run must know.

    Each epoch is shuffled, cut into windows of 50 batches, and sorted by length within a window, so
    that a batch's rows are of like length and little is padded; then the batches are shuffled. What
    is left at an epoch's end is skipped.
    """
    lengths = np.asarray(lengths)
    per_epoch = max(1, len(lengths) // batch_size)
    for epoch in itertools.count(start // per_epoch):
        rng = np.random.default_rng([seed, epoch])
        repeats = -(-batch_size // len(lengths))  # fewer rows than a batch: some come twice
        order = np.concatenate([rng.permutation(len(lengths)) for _ in range(repeats)])
        order, window = order[: per_epoch * batch_size], 50 * batch_size
        windows = np.split(order, range(window, len(order), window))
        order = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in windows])
        first = start % per_epoch if epoch == start // per_epoch else 0
        for i in rng.permutation(per_epoch)[first:]:
            yield order[i * batch_size : (i + 1) * batch_size].tolist()


# --------------------------------------------------------------------------------------------------
# Many rows to Examples: the tokenizer takes the texts of many at once, the processes share the rows,
# and 445,000 of them (Math-Shepherd) fit in each.


@dataclass(frozen=True)
class Spelling:
    """encode_trajectory with all but its prompt and steps given, for one trajectory or for many:
    the tokenizer takes the texts of many at once, on all cores."""

    tokenizer: object
    eos: bool = False
    layout: Layout = Layout()

    def __call__(self, prompt, steps):
        return encode_trajectory(self.tokenizer, prompt, steps, self.eos, self.layout)

    def many(self, rows):
        """Trajectory rows -> what encode_trajectory returns, for each."""
        texts, prompts, spelled = [], [], []
        for row in rows:
            with named(row.get("source", "--data")):
                prompts.append(encode_prompt(self.tokenizer, self.layout.ask(row["prompt"])))
            texts += [step + self.layout.step_end for step in row["completions"][:-1]]
            texts += row["completions"][-1:]
        steps = iter(middle_ids(self.tokenizer, texts))
        for row, input_ids in zip(rows, prompts):
            prompt_length, step_ends = len(input_ids), []
            for _ in row["completions"]:
                input_ids += next(steps)
                step_ends.append(len(input_ids) - 1)
            if self.eos:
                input_ids.append(closing_id(self.tokenizer))
            spelled.append((input_ids, prompt_length, step_ends))
        return spelled


class Examples(collections.abc.Sequence):
    """A list of Examples that keeps them as bytes, a quarter of the memory: an Example is made when
    it is asked for. `lengths`: those of all."""

    def __init__(self, packed=(), lengths=()):
        self.packed, self.lengths = list(packed), array("i", lengths)

    def append(self, example):
        prompt, steps, ids, *rest = vars(example).values()
        self.lengths.append(len(ids))
        self.packed.append(pickle.dumps((prompt, steps, array("i", ids).tobytes(), *rest)))

    def extend(self, others):
        self.packed += others.packed
        self.lengths += others.lengths

    def take(self, indices):
        """Some of them, of which nothing is copied."""
        return Examples((self.packed[i] for i in indices), (self.lengths[i] for i in indices))

    def known(self):
        """What is known of each in turn: Examples whose ids stay bytes, which takes a third of the
        time."""
        return (Example(*pickle.loads(packed)) for packed in self.packed)

    def __len__(self):
        return len(self.packed)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(range(len(self))[i])
        example = Example(*pickle.loads(self.packed[i]))
        example.input_ids = array("i", example.input_ids).tolist()
        return example


def encode_rows(rows, encode, max_length, procs=Processes()):
    """Trajectory rows -> Examples, number left out. `encode(prompt, steps)` gives ids as
    encode_trajectory does; a reward model brings its own.

    A trajectory longer than `max_length` tokens is left out and counted: cut on the right it would
    lose its last step, the one its outcome belongs to; cut on the left it would lose the question.
    Raises BadInput if none is left.
    """
    return that_fit(encode_all(rows, encode, procs), max_length)


def that_fit(examples, max_length):
    """-> Examples of at most `max_length` tokens, number left out. BadInput if none is left."""
    kept = [i for i, length in enumerate(examples.lengths) if length <= max_length]
    if not examples:
        why = "no rated step, or only wrong solutions to imitate"
        raise BadInput(f"--data or --eval: no trajectory to learn from or to evaluate on ({why})")
    if not kept:
        longest = max(examples.lengths)
        what = f"none of the {len(examples)} trajectories fits; the longest has {longest} tokens"
        raise BadInput(f"--max_length {max_length}: {what}")
    return examples.take(kept), len(examples) - len(kept)


def encode_all(rows, encode, procs, at_once=256):
    """Trajectory rows -> Examples of any length. Each process encodes its share of the rows as they
    are read, and all get to know all; or all raise the same BadInput."""
    rows, examples, quiet = iter(rows), Examples(), procs.rank > 0
    show = {"desc": "reading", "unit": " rows", "leave": False, "dynamic_ncols": True}
    gc.freeze()  # else all that is there already is looked through for garbage, again and again
    with tqdm(**show, delay=1, mininterval=0.5, disable=quiet) as bar:
        while some := list(itertools.islice(rows, at_once * procs.world)):
            size = -(-len(some) // procs.world)
            mine = some[procs.rank * size :][:size]
            try:
                mine = encode_some(mine, encode)
            except BadInput as error:
                mine = error
            for part in procs.gather(mine):
                if isinstance(part, BadInput):
                    raise part
                examples.extend(part)
            bar.update(len(some))
    gc.unfreeze()
    return examples


def encode_some(rows, encode):
    """Trajectory rows -> Examples, in this process alone."""
    examples, spelled = Examples(), []
    known = ("labels", "correct", "first_error", "answer", "source")
    if isinstance(encode, Spelling):
        spelled = encode.many(rows)
    else:
        for row in rows:
            with named(row.get("source", "--data")):
                spelled.append(encode(row["prompt"], row["completions"]))
    for row, (input_ids, *places) in zip(rows, spelled):
        facts = {name: row[name] for name in known if name in row}
        examples.append(Example(row["prompt"], row["completions"], input_ids, *places, **facts))
    return examples


def hold_out(rows, fraction=0.05):
    """-> train rows (or Examples), held-out ones, cut by question: none is in both. The cut depends
    on the questions' texts alone."""
    packed, keys = isinstance(rows, Examples), []
    for row in rows.known() if packed else rows:
        prompt = row.prompt if packed else row.get("prompt") or row["question"]
        keys.append(zlib.crc32(str(prompt).encode()))
    questions = sorted(set(keys))
    if len(questions) < 2:
        what = "all trajectories have the same question; at least two are needed to hold one out"
        raise BadInput(f"--data: {what} (or give --eval)")
    held_out = set(questions[: max(1, int(len(questions) * fraction))])
    train, rest = [], []
    for i, key in enumerate(keys):
        (rest if key in held_out else train).append(i)
    if packed:
        return rows.take(train), rows.take(rest)
    return [rows[i] for i in train], [rows[i] for i in rest]


# --------------------------------------------------------------------------------------------------
# `python data.py`: look at data before training on it.


def show(row, tokenizer):
    """Print one trajectory as the model sees it: each scored token (a step's last) in «», with its
    step's label."""
    ids, prompt_length, ends = encode_trajectory(tokenizer, row["prompt"], row["completions"])
    labels = row["labels"] or [None] * len(ends)

    def text(begin, end):
        return repr(tokenizer.decode(ids[begin:end]))[1:-1]

    print(f"  {len(ids)} tokens, {prompt_length} of them prompt; outcome: {row['correct']}")
    print(f"  {text(0, prompt_length)}")
    begin = prompt_length
    for end, label in zip(ends, labels):
        note = "" if label is None else f"    label {label:g}"
        print(f"    {text(begin, end)}«{text(end, end + 1)}»{note}")
        begin = end + 1


def show_builtin(tokenizer):
    for name, level in LEVELS.items():
        low, high = level.operations
        rows = make_trajectories(make_problems(500, level=name), 4, label_rollouts=4, level=name)
        share = np.mean([row["correct"] for row in rows])
        print(f"{name}: {low}-{high} operations, the student is right in {share:.0%}")
        for correct in (True, False):
            show(next(row for row in rows if row["correct"] == correct), tokenizer)


def show_file(path, tokenizer):
    kind, name = recognise(path)
    first, counts, left_out = None, collections.Counter(), []
    if kind == "trajectories":
        rows = read_trajectories(path, outcome=False, left_out=left_out)
    else:
        rows = {"problems": read_problems, "pairs": read_pairs}[kind](path, left_out)
    for row in rows:  # one at a time: the file may be large
        first = first or row
        counts["rows"] += 1
        if kind == "trajectories":
            outcome = {True: "right", False: "wrong", None: "of unknown outcome"}[row["correct"]]
            counts["steps"] += len(row["completions"])
            counts["with step labels"] += row["labels"] is not None
            counts[outcome] += 1
    found = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    print(f"{path}: {kind} ({name}); {found}")
    for line in left_out[:20]:
        print(f"  left out: {line}")
    if len(left_out) > 20:
        print(f"  left out in all: {len(left_out)} rows")
    if kind == "trajectories":
        show(first, tokenizer)
    else:
        print("\n".join(f"  {key}: {value!r}" for key, value in first.items()))


def main():
    parser = argparse.ArgumentParser(
        description="Show what data files hold, or samples of the built-in task."
    )
    parser.add_argument(
        "files", nargs="*", help="files of trajectories, problems or preference pairs"
    )
    parser.add_argument(
        "--model", help="whose tokenizer to show with (default: the built-in one, or bytes)"
    )
    parser.add_argument(
        "--write", type=int, help="print so many built-in training problems, one JSON line each"
    )
    parser.error = lambda message: sys.exit(
        f"data.py: error: {message}"
    )  # one line, without the usage
    args = parser.parse_args()
    if args.write:
        print("\n".join(json.dumps(problem) for problem in make_problems(args.write)))
        return
    if not args.files:
        show_builtin(load_tokenizer(args.model) if args.model else builtin_tokenizer())
    for path in args.files:
        show_file(path, load_tokenizer(args.model) if args.model else byte_tokenizer())


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"data.py: error: {error}")
