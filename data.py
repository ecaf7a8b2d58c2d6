"""What a problem, a step, a trajectory and a verified answer are, and how they become tensors.

A *problem* is a question with a gold answer. A *trajectory* is one response to it, cut into *steps* at blank lines. A
process reward model values the *states* s_t = question + steps 1..t, so this file's job is to know exactly at which
token each step ends:

    prompt (chat template) | step 1 \\n\\n | step 2 \\n\\n | ... | step T
                                    ^ V(s_1)       ^ V(s_2)           ^ V(s_T)

Steps are tokenised one by one and concatenated, so the ends come from lengths and never from searching for a separator
in the ids; masks come from lengths too, never from token values (pad may equal eos).

The built-in task is one-digit arithmetic in a chain, the last digit kept: "7+8*3-5" is solved as "7+8=5", "5*3=5",
"5-5=0", "\\boxed{0}". Its solutions come from a *student with habits*, who gets 30% of the 240 facts wrong 60% of the
time, always with the same wrong digit. So errors are systematic: majority voting repeats them, and a verifier has
something to win. Two levels: `builtin` (3 to 6 operations) and `builtin-hard` (8 to 14, 37.5% of the facts), for
studies in which the first is solved too soon.

Left out on purpose: packing several trajectories into one row (simple, and faster only with a varlen attention kernel).

    python data.py                                   # samples of the built-in task
    python data.py FILE... [--model NAME_OR_FOLDER]  # what a file holds, and one example as the model will see it
    python data.py --write 4000 > problems.jsonl     # built-in training problems in a file
"""
import argparse
import collections
import functools
import itertools
import json
import os
import random
import re
import socket
import sys
import zlib

import numpy as np
import torch

from answers import answer_key, extract_answer, verify  # noqa: F401  (data.verify is the project's one answer check)
from formats import BadInput, read_pairs, read_problems, read_trajectories, recognise  # noqa: F401
from plumbing import in_turn

STEP_END = "\n\n"  # what closes a step in a response; the last step is closed by the end of the response


# --------------------------------------------------------------------------------------------------
# The built-in task. Everything is a pure function of its seed.

LEVELS = {"builtin": (3, 6, 0.3), "builtin-hard": (8, 14, 0.375)}  # fewest and most operations, share of shaky facts
HABIT_RATE = 0.6  # how often the student follows a wrong habit
FACTS = [(a, op, b) for a in range(10) for op in "+-*" for b in range(2, 10)]


def digit(a, op, b):
    """The last digit of `a op b`: the only arithmetic of the task."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


# The student's habits belong to the task, not to a run: the same facts are shaky under every seed.
_rng = random.Random(0)
_SHAKY = _rng.sample(FACTS, len(FACTS))
_WRONG = {fact: (digit(*fact) + _rng.randint(1, 9)) % 10 for fact in _SHAKY}
HABITS = {level: {fact: _WRONG[fact] for fact in _SHAKY[:round(share * len(FACTS))]}
          for level, (_, _, share) in LEVELS.items()}


def student(value, operations, rng, habits):
    """Apply `operations` [(op, operand)...] to `value` as the student does; returns the digit after each one."""
    digits = []
    for op, operand in operations:
        wrong = habits.get((value, op, operand))
        value = wrong if wrong is not None and rng.random() < HABIT_RATE else digit(value, op, operand)
        digits.append(value)
    return digits


def parse_question(question):
    """'7+8*3' -> (7, [('+', 8), ('*', 3)])."""
    return int(question[0]), [(question[i], int(question[i + 1])) for i in range(1, len(question), 2)]


def is_test(question):
    """One question in five is for testing, by its text alone: no seed or size can make train and test overlap."""
    return zlib.crc32(question.encode()) % 5 == 0


def make_problems(n, split="train", seed=0, level="builtin"):
    """`n` different built-in problems {"question", "answer"} of one split ("train" or "test")."""
    low, high, _ = LEVELS[level]
    rng, seen = random.Random(f"{level} {split} {seed}"), {}
    while len(seen) < n:
        length = rng.randint(low, high)
        question = str(rng.randint(0, 9)) + "".join(rng.choice("+-*") + str(rng.randint(2, 9)) for _ in range(length))
        if is_test(question) == (split == "test") and question not in seen:
            value, operations = parse_question(question)
            for op, operand in operations:
                value = digit(value, op, operand)
            seen[question] = str(value)
    return [{"question": q, "answer": a} for q, a in seen.items()]


def make_trajectories(problems, samples=1, label_rollouts=0, label_kind="hard", seed=0, level="builtin"):
    """Student solutions of built-in problems, as rows of the trajectory format (`samples` for each problem, in order).

    With `label_rollouts` = K > 0, each step is labelled from K student solutions that continue from it: the fraction
    that reaches the answer (`label_kind="soft"`), or 1 if any does ("hard", as Math-Shepherd estimates). Without,
    labels are None and the outcome is all there is.
    """
    rng, rows, habits = random.Random(f"solutions {seed}"), [], HABITS[level]
    for problem in problems:
        start, operations = parse_question(problem["question"])
        answer = int(problem["answer"])
        for _ in range(samples):
            digits = student(start, operations, rng, habits)
            befores = [start] + digits[:-1]
            steps = [f"{a}{op}{b}={c}" for a, (op, b), c in zip(befores, operations, digits)]
            correct, labels = digits[-1] == answer, None
            if label_rollouts:
                labels = []
                for t, value in enumerate(digits[:-1]):
                    ends = [student(value, operations[t + 1:], rng, habits)[-1] for _ in range(label_rollouts)]
                    hits = ends.count(answer)
                    labels.append(hits / label_rollouts if label_kind == "soft" else float(hits > 0))
                labels += [float(correct)] * 2  # from the last result on nothing is left to chance
            first_error = next((t for t, (a, (op, b), c) in enumerate(zip(befores, operations, digits))
                                if digit(a, op, b) != c), -1)
            rows.append({"prompt": problem["question"], "completions": steps + [f"\\boxed{{{digits[-1]}}}"],
                         "labels": labels, "answer": problem["answer"], "correct": correct, "first_error": first_error})
    return rows


def builtin_tokenizer():
    """The built-in task's tokenizer: an ordinary `PreTrainedTokenizerFast` with pad, eos and a chat template, made
    offline, so that the built-in policy and a 7B model take the same path through every script."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocab = special + list("0123456789+-*=}") + ["\\boxed{", STEP_END]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|\n\n|."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces between the tokens
    return _fast_tokenizer(tokenizer, special)


def byte_tokenizer():
    """A tokenizer that spells any text in bytes: for looking at files without a model, and for tests."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocab = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast_tokenizer(tokenizer, special)


def _fast_tokenizer(tokenizer, special):
    from transformers import PreTrainedTokenizerFast
    pad, eos, unk, user, assistant = special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk,
                                   additional_special_tokens=[user, assistant], clean_up_tokenization_spaces=False)
    fast.chat_template = ("{% for m in messages %}{{ '<assistant>' if m.role == 'assistant' else '<user>' }}"
                          "{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
                          "{% if add_generation_prompt %}<assistant>{% endif %}")
    return fast


# --------------------------------------------------------------------------------------------------
# Text to token ids: steps tokenised one by one, their ends remembered.

def split_steps(text):
    """Cut a response into its steps: the pieces between blank lines, stripped, empty ones left out."""
    return [step.strip() for step in re.split(r"\n[^\S\n]*\n", text) if step.strip()]


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt (a question, or a list of chat messages) up to where the response begins.

    The model's own chat template where it has one; a base model without one gets the bare text and a blank line.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    text = prompt if isinstance(prompt, str) else STEP_END.join(message["content"] for message in prompt)
    return list(tokenizer(text + STEP_END)["input_ids"])


@functools.lru_cache(100_000)
def token_ids(tokenizer, text):
    """Ids of a step's text. Cached: steps recur in sampled data."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_trajectory(tokenizer, prompt, steps, eos=False):
    """-> input_ids, prompt_length, step_ends: the ids of prompt + steps, and for each step the index of its last token.

    Every step but the last carries its closing blank line, as when the model writes it. `eos` appends the
    end-of-response token after the last step: for training a policy, not a PRM, where nothing may follow a prefix.
    """
    input_ids, step_ends = encode_prompt(tokenizer, prompt), []
    prompt_length = len(input_ids)
    for t, step in enumerate(steps):
        input_ids += token_ids(tokenizer, step + STEP_END if t < len(steps) - 1 else step)
        step_ends.append(len(input_ids) - 1)
    return input_ids + [tokenizer.eos_token_id] * eos, prompt_length, step_ends


def encode_rows(rows, tokenizer, max_length, eos=False):
    """Trajectory rows -> examples, number dropped. An example is a row plus "input_ids", "prompt_length", "step_ends".

    A trajectory longer than `max_length` tokens is dropped and counted: cut on the right it would lose its last step,
    the one its outcome belongs to; cut on the left it would lose the question. Raises BadInput if none is left.
    """
    examples, longest, count = [], 0, 0
    for count, row in enumerate(rows, 1):
        input_ids, prompt_length, step_ends = encode_trajectory(tokenizer, row["prompt"], row["completions"], eos)
        longest = max(longest, len(input_ids))
        if len(input_ids) <= max_length:
            examples.append(row | {"input_ids": input_ids, "prompt_length": prompt_length, "step_ends": step_ends})
    if not count:
        raise BadInput("--data or --eval: no trajectory to learn from or to evaluate on "
                       "(no rated step, or only wrong solutions to imitate)")
    if not examples:
        raise BadInput(f"--max_length {max_length}: none of the {count} trajectories fits; "
                       f"the longest has {longest} tokens")
    return examples, count - len(examples)


def hold_out(rows, fraction=0.05):
    """-> train rows, held-out rows, cut by question: none is in both. The cut depends on the questions' texts alone."""
    key = lambda row: zlib.crc32(str(row.get("prompt") or row["question"]).encode())  # noqa: E731
    keys = sorted({key(row) for row in rows})
    if len(keys) < 2:
        raise BadInput("--data: all trajectories have the same question; at least two are needed to hold one out "
                       "(or give --eval)")
    held_out = set(keys[:max(1, int(len(keys) * fraction))])
    return [row for row in rows if key(row) not in held_out], [row for row in rows if key(row) in held_out]


# --------------------------------------------------------------------------------------------------
# Examples to tensors, and the order in which batches come.

def collate(examples, pad_id):
    """Right-padded tensors of B examples with up to T tokens and S steps.

    -> input_ids, attention_mask (B, T); response_mask (B, T-1), True where the *next* token belongs to the response;
       step_ends (B, S) indices into T; step_mask (B, S); labels (B, S), 0 where there are none; outcomes (B,).
    """
    B, T = len(examples), max(len(e["input_ids"]) for e in examples)
    S = max(len(e["step_ends"]) for e in examples)
    input_ids, attention_mask = np.full((B, T), pad_id), np.zeros((B, T), dtype=np.int64)
    response_mask = np.zeros((B, T - 1), dtype=bool)
    step_ends, step_mask = np.zeros((B, S), dtype=np.int64), np.zeros((B, S), dtype=bool)
    labels = np.zeros((B, S), dtype=np.float32)
    for b, e in enumerate(examples):
        tokens, steps = len(e["input_ids"]), len(e["step_ends"])
        input_ids[b, :tokens], attention_mask[b, :tokens] = e["input_ids"], 1
        response_mask[b, e["prompt_length"] - 1:tokens - 1] = True
        step_ends[b, :steps], step_mask[b, :steps] = e["step_ends"], True
        labels[b, :steps] = e["labels"] if e.get("labels") is not None else 0
    outcomes = np.array([float(e.get("correct") or 0) for e in examples], dtype=np.float32)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask,
              "step_ends": step_ends, "step_mask": step_mask, "labels": labels, "outcomes": outcomes}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def batches(lengths, batch_size, seed=0, start=0):
    """Index lists of one global batch after another, without end, from the `start`-th on: all a resumed run must know.

    Each epoch is shuffled, cut into windows of 50 batches, and sorted by length within a window, so that a batch's rows
    are of like length and little is padded; then the batches are shuffled. What is left at an epoch's end is skipped.
    """
    lengths = np.asarray(lengths)
    per_epoch = max(1, len(lengths) // batch_size)
    for epoch in itertools.count(start // per_epoch):
        rng = np.random.default_rng([seed, epoch])
        repeats = -(-batch_size // len(lengths))  # fewer rows than a batch: some come twice
        order = np.concatenate([rng.permutation(len(lengths)) for _ in range(repeats)])[:per_epoch * batch_size]
        window = 50 * batch_size
        windows = np.split(order, range(window, len(order), window))
        order = np.concatenate([w[np.argsort(lengths[w], kind="stable")] for w in windows])
        for i in rng.permutation(per_epoch)[start % per_epoch if epoch == start // per_epoch else 0:]:
            yield order[i * batch_size:(i + 1) * batch_size].tolist()


# --------------------------------------------------------------------------------------------------
# Tokenizers and models by name.

def from_pretrained(load, name, **options):
    """`load(name)` for a folder or a Hugging Face name, local files first. An unknown name is a BadInput within
    seconds, where the library alone would retry for half a minute on every process."""
    try:
        return load(name, local_files_only=True, **options)
    except Exception as error:  # damaged files raise almost anything: TypeError, RuntimeError, SafetensorError
        if os.path.isdir(name) or os.path.isabs(name) or name.startswith(".") or name.count("/") != 1:
            reason = (str(error).splitlines() or [type(error).__name__])[0] if os.path.isdir(name) else "no such folder"
            raise BadInput(f"--model {name}: {reason}; wanted: a Hugging Face model folder or name") from None
    try:
        socket.getaddrinfo(os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0], 443)
        return load(name, **options)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {name}: no such folder, not in the cache, and the hub does not give it "
                       f"({str(error).splitlines()[0]})") from None


def load_model(kind, name, new=(), **options):
    """A model all of whose weights are in its files. The library would make up missing ones at random; only those whose
    names begin as in `new` may be."""
    with in_turn():
        model, report = from_pretrained(kind.from_pretrained, name, output_loading_info=True, **options)
        if torch.cuda.is_available():
            model.cuda()
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(tuple(new)))
    if missing:
        raise BadInput(f"--model {name}: {len(missing)} weights are not in its files, {missing[0]} for one")
    return model


def builtin_level(paths):
    """The built-in level that --data names, or None where it names files."""
    if len(paths) > 1 and set(paths) & set(LEVELS):
        raise BadInput(f"--data {' '.join(paths)}: the built-in task and files do not mix")
    return paths[0] if paths[0] in LEVELS else None


def check_ids(model, examples, name):
    """BadInput where the tokenizer has ids the model has no embeddings for (on a GPU: an assertion in a kernel)."""
    largest, known = max(max(e["input_ids"]) for e in examples), model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise BadInput(f"--model {name}: its tokenizer gives the id {largest}, its weights have {known} embeddings")


def load_tokenizer(name):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    # One saved as the generic class is loaded as such: for some families (Qwen2 is one) AutoTokenizer would put the
    # family's own splitting rules in its place, and blank lines would vanish without a word.
    kind = from_pretrained(get_tokenizer_config, name).get("tokenizer_class")
    generic = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer = from_pretrained((PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained, name)
    if not tokenizer("1", add_special_tokens=False)["input_ids"]:  # what the library makes up without tokenizer.json
        raise BadInput(f"--model {name}: its tokenizer has no tokens; wanted: a folder with tokenizer.json or the like")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks come from lengths, never from ids
    return tokenizer


# --------------------------------------------------------------------------------------------------
# `python data.py`: look at data before training on it.

def show(row, tokenizer):
    """Print one trajectory as the model sees it: each scored token (a step's last) in «», with its step's label."""
    input_ids, prompt_length, step_ends = encode_trajectory(tokenizer, row["prompt"], row["completions"])
    labels = row["labels"] or [None] * len(step_ends)
    text = lambda begin, end: repr(tokenizer.decode(input_ids[begin:end]))[1:-1]  # noqa: E731
    print(f"  {len(input_ids)} tokens, {prompt_length} of them prompt; outcome: {row['correct']}\n"
          f"  {text(0, prompt_length)}")
    for begin, end, label in zip([prompt_length] + [end + 1 for end in step_ends], step_ends, labels):
        print(f"    {text(begin, end)}«{text(end, end + 1)}»" + ("" if label is None else f"    label {label:g}"))


def main():
    parser = argparse.ArgumentParser(description="Show what data files hold, or samples of the built-in task.")
    parser.add_argument("files", nargs="*", help="files of trajectories, problems or preference pairs")
    parser.add_argument("--model", help="whose tokenizer to show with (default: the built-in one, or bytes)")
    parser.add_argument("--write", type=int, help="print so many built-in training problems, one JSON line each")
    parser.error = lambda message: sys.exit(f"data.py: error: {message}")  # one line, without the usage
    args = parser.parse_args()
    if args.write:
        return print("\n".join(json.dumps(problem) for problem in make_problems(args.write)))
    tokenizer = load_tokenizer(args.model) if args.model else builtin_tokenizer()
    if not args.files:
        for level in LEVELS:
            rows = make_trajectories(make_problems(500, level=level), 4, label_rollouts=4, level=level)
            print(f"{level}: {LEVELS[level][0]}-{LEVELS[level][1]} operations, the student is right in "
                  f"{np.mean([row['correct'] for row in rows]):.0%}")
            for row in (next(r for r in rows if r["correct"]), next(r for r in rows if not r["correct"])):
                show(row, tokenizer)
    for path in args.files:
        kind, name = recognise(path)
        rows = {"trajectories": read_trajectories, "problems": read_problems, "pairs": read_pairs}[kind](path)
        first, counts = None, collections.Counter()
        for row in rows:  # one at a time: the file may be large
            first = first or row
            counts["rows"] += 1
            if kind == "trajectories":
                counts["steps"] += len(row["completions"])
                counts["with step labels"] += row["labels"] is not None
                counts[{True: "right", False: "wrong", None: "of unknown outcome"}[row["correct"]]] += 1
        print(f"{path}: {kind} ({name}); " + ", ".join(f"{number} {what}" for what, number in counts.items() if number))
        if kind == "trajectories":
            text = str(first["prompt"]) + "".join(first["completions"])
            spelled = args.model or tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
            show(first, tokenizer if spelled else byte_tokenizer())
        else:
            print("\n".join(f"  {key}: {value!r}" for key, value in first.items()))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"data.py: error: {error}")
