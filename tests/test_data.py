"""The built-in task, tokenizers, and the way from text to tensors: spans, masks, batches, the cut
by question, `python data.py`."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
from conftest import ROOT
from helpers import write_rows
from parts.answers import verify
from parts.formats import BadInput, read_trajectories, split_steps
from parts.models import encode_prompt, load_tokenizer

LEVELS, STEP_END = list(data.LEVELS), "\n\n"


def solutions(n=40, samples=2, rollouts=4, kind="hard", seed=0, level="builtin"):
    problems = data.make_problems(n, "train", seed, level)
    return data.make_trajectories(problems, samples, rollouts, kind, seed, level)


def habits_of(level):
    """{fact: what the student takes it for}."""
    pairs = zip(data.FACTS, data.wrong_habits(data.LEVELS[level]), strict=True)
    return {fact: wrong for fact, wrong in pairs if wrong is not None}


def parsed(question):
    """'7+8*3' -> 7, [('+', 8), ('*', 3)]."""
    value, operations = data.parse_question(question)
    return value, [(operation[0], int(operation[1:])) for operation in operations]


def unicode_text(rng, n):
    """Any characters but halves of surrogate pairs, which no UTF-8 file can hold."""
    ranges = [(32, 127), (0, 0x20), (0x80, 0xD800), (0xE000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(n))


# --------------------------------------------------------------------------------------------------
# The built-in task.


def random_states():
    return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


def test_the_task_is_a_pure_function_of_its_seed():
    before = random_states()
    for level in LEVELS:
        made = [solutions(seed=seed, level=level) for seed in (0, 0, 1)]
        assert made[0] == made[1] != made[2]
        few, many = (data.make_problems(n, "train", 3, level) for n in (10, 50))
        assert few == many[:10]
    assert random_states() == before, "nobody else's random numbers are used"


@pytest.mark.parametrize("level", LEVELS)
def test_train_and_test_never_overlap(level):
    def questions(split, sizes):
        made = [data.make_problems(n, split, seed, level) for n, seed in sizes]
        return {p["question"] for problems in made for p in problems}

    train = questions("train", [(1, 1), (300, 0), (3000, 0), (3000, 7)])
    test = questions("test", [(1, 2), (300, 0), (1000, 0), (1000, 7)])
    assert not train & test and len(train) > 5000 and len(test) > 1000
    assert all(map(data.is_test, test)) and not any(map(data.is_test, train))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_problems(level, split):
    problems, lengths = data.make_problems(500, split, 5, level), collections.Counter()
    assert len({p["question"] for p in problems}) == 500
    for p in problems:
        value, operations = parsed(p["question"])
        assert p["question"] == str(value) + "".join(f"{op}{b}" for op, b in operations)
        for op, b in operations:
            value = eval(f"{value}{op}{b}") % 10
        assert p["answer"] == str(value)
        lengths[len(operations)] += 1
        if data.LEVELS[level].any_order:
            assert len(set(operations)) == len(operations)
    low, high = data.LEVELS[level].operations
    assert sorted(lengths) == list(range(low, high + 1))
    assert min(lengths.values()) > 0.5 * 500 / (high - low + 1)


def test_the_habits():
    assert len(data.FACTS) == len(set(data.FACTS)) == 240
    for level, what in data.LEVELS.items():
        habits = habits_of(level)
        assert len(habits) == round(what.shaky * 80 * len(what.signs))
        for fact, wrong in habits.items():
            assert 0 <= wrong <= 9 and wrong != data.digit(*fact) and fact[1] in what.signs
    assert len(habits_of("builtin")) == 72  # 30%


@pytest.mark.parametrize("level", LEVELS)
def test_the_student_errs_by_habit_alone(level):
    habits, followed = habits_of(level), collections.Counter()
    for row in solutions(1000, 2, 0, level=level):
        for step in row["completions"][:-1]:
            fact, result = (int(step[0]), step[1], int(step[2])), int(step[4:])
            if fact in habits and result == habits[fact]:
                followed[True] += 1
            else:
                followed[False] += fact in habits
                assert result == data.digit(*fact)
    n = followed.total()
    assert abs(followed[True] / n - data.LEVELS[level].rate) < 4 * math.sqrt(0.24 / n)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["hard", "soft", "correct"])
def test_solutions(level, kind):
    problems = data.make_problems(100, seed=1, level=level)
    rows = data.make_trajectories(problems, 3, 4, kind, 1, level)
    assert [row["prompt"] for row in rows] == [p["question"] for p in problems for _ in range(3)]
    orders = collections.Counter()
    for row in rows:
        before, operations = parsed(row["prompt"])
        *steps, box = row["completions"]
        errors, done = [], [(step[1], int(step[2])) for step in steps]
        if data.LEVELS[level].any_order:
            orders[done == operations] += 1
            done, operations = sorted(done), sorted(operations)
        assert done == operations
        for t, step in enumerate(steps):
            left, result = step.split("=")
            op, b = left[1], int(left[2:])
            assert left[0] == str(before)  # it goes on from what it wrote, right or wrong
            if int(result) != data.digit(before, op, b):
                errors.append(t)
            before = int(result)
        assert box == f"\\boxed{{{before}}}"
        assert row["first_error"] == (errors[0] if errors else -1)
        correct = str(before) == row["answer"]
        assert row["correct"] is correct is verify(STEP_END.join(row["completions"]), row["answer"])
        assert correct or errors  # an error can cancel out, a right chain cannot be wrong
        labels = row["labels"]
        assert len(labels) == len(row["completions"])
        if kind == "correct":
            right = errors[0] if errors else len(labels)
            assert labels == [1.0] * right + [0.0] * (len(labels) - right)
        else:
            assert labels[-2:] == [float(correct)] * 2
            assert set(labels) <= ({0, 1} if kind == "hard" else {0, 0.25, 0.5, 0.75, 1})
        assert all(isinstance(label, float) for label in labels)
    assert any(row["correct"] and row["first_error"] >= 0 for row in rows)
    if orders:  # of n operations n! orders, of 3 to 5: 6, 24, 120
        assert 0.01 < orders[True] / orders.total() < 0.15


@pytest.mark.parametrize("level", LEVELS)
def test_hard_labels_say_whether_any_rollout_was_right(level):
    """The same rollouts, counted in two ways."""
    for soft, hard in zip(solutions(kind="soft", level=level), solutions(level=level)):
        assert soft["completions"] == hard["completions"]
        assert [float(label > 0) for label in soft["labels"]] == hard["labels"]
    assert all(row["labels"] is None for row in solutions(rollouts=0, level=level))


def right_from(value, operations, answer, habits, level):
    """The exact probability that the student reaches `answer`: the mean over the orders in which
    it may go on."""
    if level.any_order:
        chain, orders = dataclasses.replace(level, any_order=False), itertools.permutations(
            operations
        )
        return np.mean([right_from(value, order, answer, habits, chain) for order in orders])
    chances = {value: 1.0}
    for op, b in operations:
        then = collections.Counter()
        for v, chance in chances.items():
            wrong = habits.get((v, op, b))
            follow = 0.0 if wrong is None else level.rate
            then[data.digit(v, op, b)] += chance * (1 - follow)
            if follow:
                then[wrong] += chance * follow
        chances = then
    return chances.get(answer, 0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_soft_labels_approach_the_exact_probability(level):
    errors, habits = [], habits_of(level)
    for row in solutions(6, 1, 800, "soft", level=level):
        operations = [(step[1], int(step[2])) for step in row["completions"][:-1]]
        for t, label in enumerate(row["labels"][:-1]):
            value, rest = int(row["completions"][t][4:]), operations[t + 1 :]
            exact = right_from(value, rest, int(row["answer"]), habits, data.LEVELS[level])
            errors.append(label - exact)
    assert max(map(abs, errors)) < 5 * math.sqrt(0.25 / 800) and abs(np.mean(errors)) < 0.02


@pytest.mark.parametrize(
    "level, low, high",
    [("builtin", 0.44, 0.51), ("builtin-hard", 0.03, 0.35), ("builtin-choice", 0.25, 0.35)],
)
def test_pass_rate(level, low, high):
    """About one solution in two is right on the default level: as much to learn from either."""
    right = []
    for seed in range(3):
        right += [row["correct"] for row in solutions(1000, 4, 0, seed=seed, level=level)]
    assert low < np.mean(right) < high


def test_built_in_rows_are_rows_of_the_trajectory_format(tmp_path):
    rows = solutions(20, kind="soft")
    write_rows(tmp_path / "rows.jsonl", rows)
    for row, read in zip(rows, read_trajectories(tmp_path / "rows.jsonl"), strict=True):
        for key in ("prompt", "completions", "labels", "answer", "correct"):
            assert read[key] == row[key]


# --------------------------------------------------------------------------------------------------
# Tokenizers.


def bare_tokenizer(pad=True, bos=False):
    """A base model's: no chat template; without `pad` no pad token either; with `bos` it opens
    every text with <unk>."""
    tokenizer = data.byte_tokenizer()
    tokenizer.chat_template = None
    if not pad:
        tokenizer.pad_token = None
    if bos:
        from tokenizers.processors import TemplateProcessing

        special = [("<unk>", tokenizer.unk_token_id)]
        opening = TemplateProcessing("<unk> $A", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = opening
    return tokenizer


TOKENIZERS = {
    "builtin": data.builtin_tokenizer,
    "bytes": data.byte_tokenizer,
    "bare": bare_tokenizer,
    "bos": functools.partial(bare_tokenizer, bos=True),
}


def turns(*texts, first="user"):
    """Chat messages, user and assistant by turns."""
    roles = [first, "user"] if first == "system" else ["user"]
    roles += ["assistant", "user"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


@pytest.mark.parametrize("make", [data.builtin_tokenizer, data.byte_tokenizer])
def test_special_tokens_and_chat_template(make):
    tokenizer = make()
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    ids = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert ids == (0, 1, 2)

    def shown(prompt):
        return tokenizer.decode(encode_prompt(tokenizer, prompt))

    chat = turns("1", "2", "3", "4", first="system")
    assert shown(chat) == "<user>1<user>2<assistant>3<eos><user>4<assistant>"
    assert shown("1+2") == "<user>1+2<assistant>"
    # The last turn as the template ends it is the response as the trajectory ends it.
    ids = data.encode_trajectory(tokenizer, "1+2", ["1+2=3", "\\boxed{3}"], eos=True)[0]
    chat = turns("1+2", "1+2=3\n\n\\boxed{3}")
    assert tokenizer.apply_chat_template(chat)["input_ids"] == ids


def test_built_in_text_round_trip():
    tokenizer = data.builtin_tokenizer()
    for row in solutions(50) + solutions(50, level="builtin-hard"):
        text = STEP_END.join([row["prompt"], *row["completions"]])
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert tokenizer("?")["input_ids"] == [tokenizer.unk_token_id]


def test_bytes_round_trip_of_any_text():
    tokenizer, rng = data.byte_tokenizer(), random.Random(0)
    texts = [unicode_text(rng, n) for n in range(1, 200)]
    texts += ["a <eos> b<pad>", "", " ", "\n\n", "a\r\nb", "it 's , fine .", "e\u0301\u00e9"]
    texts += ["\ufeffx", "\0", "👩‍👩‍👧", "á" * 999, "  lead", "trail  "]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
        if "<" not in text:
            assert len(ids) == len(text.encode())
    ids = tokenizer("1<eos>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "1"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("family", [None, "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_saved_tokenizers_are_the_same(name, family, tmp_path):
    """Also beside a model: for some families the library would rather have their usual tokenizer
    than the one in the folder."""
    tokenizer, rng = TOKENIZERS[name](), random.Random(1)
    if family:
        from transformers import AutoConfig

        AutoConfig.for_model(family).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["7+8*3-5", "7+8=5\n\n", "\\boxed{5}", "a , b . c 's", "e\u0301"]
    texts += [unicode_text(rng, 50) for _ in range(20)]
    for _ in range(2):  # a run saves again what it has loaded
        again = load_tokenizer(str(tmp_path))
        for known in ("pad_token_id", "eos_token_id", "unk_token_id", "chat_template"):
            assert getattr(again, known) == getattr(tokenizer, known)
        assert len(again) == len(tokenizer)
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert again(text)["input_ids"] == ids
            assert again.decode(ids) == tokenizer.decode(ids)
            assert encode_prompt(again, text) == encode_prompt(tokenizer, text)
        again.save_pretrained(tmp_path)


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    bare_tokenizer(pad=False).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


# --------------------------------------------------------------------------------------------------
# Text to token ids.

SPLITS = [
    ("", []),
    (" \n\n\t\n", []),
    ("a", ["a"]),
    ("a\n\nb", ["a", "b"]),
    ("a\nb", ["a\nb"]),
    ("a\nb\n\nc\nd", ["a\nb", "c\nd"]),
    ("a\n\n\n\n\nb", ["a", "b"]),
    ("a\n\n\nb", ["a", "b"]),
    ("\n\na\n\n", ["a"]),
    ("a\n \t\nb", ["a", "b"]),
    ("a  \n\n  b", ["a", "b"]),
    ("a\r\n\r\nb\r\nc", ["a", "b\r\nc"]),
    ("Step 1: x\n\nStep 2: y", ["Step 1: x", "Step 2: y"]),
    ("a\\n\\nb", ["a\\n\\nb"]),
    ("\\[\na\n\\]\n\n$$b$$", ["\\[\na\n\\]", "$$b$$"]),
    ("à\n\u3000\né", ["à", "é"]),
]


@pytest.mark.parametrize("text, steps", SPLITS)
def test_split_steps(text, steps):
    assert split_steps(text) == steps
    assert split_steps(STEP_END.join(steps)) == steps  # joined and split again


def test_split_steps_is_fast_on_hostile_text():
    hostile = [" " * 10**6, "\n" + " " * 10**6, "\n " * 10**5, "\n" * 10**6, "a\n" * 10**5]
    hostile.append(("\n" + " " * 999) * 999 + "x")
    began = time.monotonic()
    for text in hostile:
        split_steps(text)
    assert time.monotonic() - began < 2


PROMPTS = ["1+2", "", turns("1+2"), turns("3", "4", "5", "6", first="system")]
STEPS = [["1+2=3", "\\boxed{3}"], ["1"], ["1", "2", "3", "4", "5"], ["1+2=3"] * 3]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(4))
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("eos", [False, True])
def test_spans_of_a_trajectory(name, eos, prompt):
    tokenizer, rng, wild = TOKENIZERS[name](), random.Random(2), []
    if name != "builtin":
        wild = [[unicode_text(rng, 9) for _ in range(4)], ["a b", " c\nd ", "<é>"]]
        wild.append(["a\n\nb", "c"])  # a blank line in a step is text
    for steps in STEPS + wild:
        ids, prompt_length, ends = data.encode_trajectory(tokenizer, prompt, steps, eos)
        assert ids[:prompt_length] == encode_prompt(tokenizer, prompt)
        assert len(ends) == len(steps) and ends[-1] == len(ids) - 1 - eos
        begins = [prompt_length] + [end + 1 for end in ends]
        spans = [ids[begin : end + 1] for begin, end in zip(begins, ends)]
        closed = [step + STEP_END for step in steps[:-1]] + steps[-1:]
        assert [tokenizer.decode(span) for span in spans] == closed
        for span, text in zip(spans, closed):
            assert span == tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = sum(spans, ids[:prompt_length])
        assert ids == whole + [tokenizer.eos_token_id] * eos, "nothing else is in it"
        # What was written up to a step does not depend on what comes after: the condition for one
        # forward.
        for t in range(1, len(steps)):
            other = data.encode_trajectory(tokenizer, prompt, steps[:t] + ["9"])[0]
            assert other[: ends[t - 1] + 1] == ids[: ends[t - 1] + 1]


def test_prompts_without_a_chat_template():
    """The opening token comes once, before all."""
    tokenizer = bare_tokenizer(bos=True)
    for prompt, text in (("1+2", "1+2\n\n"), (PROMPTS[3], "3\n\n4\n\n5\n\n6\n\n")):
        assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "<unk>" + text
        for ids in (
            encode_prompt(tokenizer, prompt),
            data.encode_trajectory(tokenizer, prompt, ["a", "b"])[0],
        ):
            assert ids.count(tokenizer.unk_token_id) == 1


def test_encoding_does_not_change_what_it_is_given():
    tokenizer = data.builtin_tokenizer()
    encode = functools.partial(data.encode_trajectory, tokenizer)
    chat, steps = turns("1+2"), ["1+2=3", "\\boxed{3}"]
    first = encode(chat, steps)
    first[0].append(99)  # the caller owns the list: no cache may hand it out again
    assert encode(chat, steps)[0] == first[0][:-1]
    assert chat == turns("1+2") and steps == ["1+2=3", "\\boxed{3}"]
    row = {"prompt": "1+2", "completions": steps, "labels": None}
    (example,), _ = data.encode_rows([row], encode, 99)
    assert (example.prompt, example.completions) == ("1+2", steps) and len(row) == 3


def test_what_is_known_of_a_row_is_known_of_its_example():
    (row,) = solutions(1, 1)
    row |= {"source": "FILE:3", "solution": "of no use here"}
    encode = functools.partial(data.encode_trajectory, data.builtin_tokenizer())
    (example,), _ = data.encode_rows([row], encode, 99)
    for name in ("prompt", "completions", "labels", "correct", "first_error", "answer", "source"):
        assert getattr(example, name) == row[name]
    ids = encode(row["prompt"], row["completions"])
    assert (example.input_ids, example.prompt_length, example.step_ends) == ids
    assert len(example) == len(ids[0])


def test_two_tokenizers_side_by_side():
    """A policy and a reward model of another family may be in one process."""
    one, other = data.builtin_tokenizer(), data.byte_tokenizer()
    for tokenizer in (one, other, one, other):
        ids = data.encode_trajectory(tokenizer, "1", ["1+2=3", "3"])[0]
        assert tokenizer.decode(ids) == "<user>1<assistant>1+2=3\n\n3"


@pytest.mark.parametrize("eos", [False, True])
def test_rows_too_long_are_dropped_and_counted(eos):
    tokenizer = data.byte_tokenizer()
    encode = functools.partial(data.encode_trajectory, tokenizer, eos=eos)
    rows = [{"prompt": "q" * n, "completions": ["a" * n, "b"]} for n in (1, 50, 2, 99, 3)]

    def length(n):
        return 2 + n + n + 2 + 1 + eos  # template, question, first step, blank line, last step

    fits = [(1, [1]), (3, [1, 2, 3]), (50, [1, 50, 2, 3]), (99, [1, 50, 2, 99, 3])]
    for n, kept in fits:
        examples, dropped = data.encode_rows(iter(rows), encode, length(n))
        assert [len(e.prompt) for e in examples] == kept and dropped == 5 - len(kept)
        for e in examples:
            text = f"<user>{e.prompt}<assistant>{e.completions[0]}\n\nb" + "<eos>" * eos
            assert tokenizer.decode(e.input_ids) == text
    with pytest.raises(BadInput) as error:
        data.encode_rows(rows, encode, length(1) - 1)
    message = str(error.value)
    assert "\n" not in message
    for part in (f"--max_length {length(1) - 1}", "5 traj", str(length(99))):
        assert part in message


# --------------------------------------------------------------------------------------------------
# Examples to tensors.


def encoded(tokenizer, eos, n):
    rng, rows = random.Random(0), []
    for _ in range(n):
        steps = ["x" * rng.randint(1, 9) for _ in range(rng.randint(1, 5))]
        row = {"prompt": "q" * rng.randint(1, 9), "completions": steps}
        row["labels"] = rng.choice([None, [rng.random() for _ in steps]])
        row["correct"] = rng.choice([True, False, None])
        rows.append(row)
    encode = functools.partial(data.encode_trajectory, tokenizer, eos=eos)
    return data.encode_rows(rows, encode, 999)[0]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_collate_against_a_loop(pad, eos, n, tmp_path):
    bare_tokenizer(pad).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    pad_id = tokenizer.pad_token_id
    assert (pad_id == tokenizer.eos_token_id) is not pad
    examples = encoded(tokenizer, eos, n)
    got = data.collate(examples, pad_id)
    B, T, S = n, max(map(len, examples)), max(len(e.completions) for e in examples)
    assert {name: (tuple(x.shape), x.dtype) for name, x in got.items()} == {
        "input_ids": ((B, T), torch.int64),
        "attention_mask": ((B, T), torch.int64),
        "response_mask": ((B, T - 1), torch.bool),
        "step_ends": ((B, S), torch.int64),
        "step_mask": ((B, S), torch.bool),
        "labels": ((B, S), torch.float32),
        "outcomes": ((B,), torch.float32),
    }
    for b, e in enumerate(examples):
        row = {name: x[b].tolist() for name, x in got.items()}
        for t in range(T):
            real = t < len(e)
            assert row["input_ids"][t] == (e.input_ids[t] if real else pad_id)
            assert row["attention_mask"][t] == real
            if t < T - 1:  # is the next token part of the response?
                assert row["response_mask"][t] == (e.prompt_length <= t + 1 < len(e))
        for s in range(S):
            real = s < len(e.completions)
            assert row["step_mask"][s] == real
            assert row["step_ends"][s] == (e.step_ends[s] if real else 0)
            label = e.labels[s] if real and e.labels else 0
            assert row["labels"][s] == pytest.approx(label)
        assert row["outcomes"] == (e.correct is True)
        # The policy learns to stop also where pad is eos: the last token that counts is the end of
        # the response.
        targets = got["input_ids"][b, 1:][got["response_mask"][b]].tolist()
        assert targets == e.input_ids[e.prompt_length :]
        assert (targets[-1] == tokenizer.eos_token_id) is eos


LENGTHS = np.random.default_rng(0).lognormal(5, 0.7, 5000).astype(int) + 1
SIZES = [(100, 8), (100, 100), (101, 100), (7, 1), (1, 1), (5000, 16), (3, 8), (1, 64), (63, 64)]


def take(n, *args):
    order = data.batches(*args)
    return [next(order) for _ in range(n)]


@pytest.mark.parametrize("rows, size", SIZES)
def test_a_resumed_order_is_the_tail(rows, size):
    lengths, n = LENGTHS[:rows], 70
    whole = take(n, lengths, size, 3)
    assert whole == take(n, list(lengths), size, 3)  # deterministic
    assert rows == 1 or whole != take(n, lengths, size, 4)
    for start in (*range(32), 47, 69):
        assert take(n - start, lengths, size, 3, start) == whole[start:]
    assert all(len(batch) == size and 0 <= min(batch) <= max(batch) < rows for batch in whole)
    late = take(3, lengths, size, 3, 10**6 - 1)
    assert take(2, lengths, size, 3, 10**6) == late[1:]


@pytest.mark.parametrize("rows, size", [(100, 8), (100, 100), (5000, 16), (1000, 7), (7, 1)])
def test_every_row_at_most_once_an_epoch(rows, size):
    per_epoch = rows // size
    batches = take(3 * per_epoch, LENGTHS[:rows], size)
    epochs = [batches[k * per_epoch : (k + 1) * per_epoch] for k in range(3)]
    seen = [sorted(sum(epoch, [])) for epoch in epochs]
    for rows_seen in seen:
        assert len(set(rows_seen)) == len(rows_seen) == per_epoch * size
    assert epochs[0] != epochs[1] != epochs[2]
    if rows % size > 1:
        assert seen[0] != seen[1]  # what an epoch leaves out is not always the same


@pytest.mark.parametrize("rows, size", [(3, 8), (1, 64), (63, 64), (5, 12)])
def test_fewer_rows_than_a_batch(rows, size):
    for batch in take(5, LENGTHS[:rows], size):
        counts = collections.Counter(batch)
        assert len(batch) == size and set(counts) == set(range(rows))
        assert max(counts.values()) - min(counts.values()) <= 1  # as evenly as can be


def test_rows_of_a_batch_are_of_like_length():
    def padding(batches):
        return sum(len(b) * LENGTHS[b].max() - LENGTHS[b].sum() for b in map(np.array, batches))

    ours = take(5000 // 16, LENGTHS, 16)
    shuffled = np.split(np.random.default_rng(1).permutation(5000)[:4992], 312)
    assert padding(ours) < 0.2 * padding(shuffled)
    # Short and long batches come in any order, though: no epoch is a curriculum.
    means = [LENGTHS[b].mean() for b in ours]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2


def test_hold_out():
    prompts = [f"question {i % 200}" for i in range(1000)] + [PROMPTS[3], PROMPTS[3], "one more"]
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate(prompts)]

    def questions(rows):
        return {str(row["prompt"]) for row in rows}

    train, held_out = data.hold_out(rows)
    assert sorted(row["n"] for row in train + held_out) == list(range(len(rows)))
    assert [row["n"] for row in train] == sorted(row["n"] for row in train)  # in order
    assert not questions(train) & questions(held_out)
    assert len(questions(held_out)) == 10  # 5% of 202
    shuffled = random.Random(0).sample(rows, len(rows))
    assert questions(data.hold_out(shuffled)[1]) == questions(held_out)
    assert len(questions(data.hold_out(rows, 0.5)[1])) == 101
    assert [len(questions(part)) for part in data.hold_out(rows[:2])] == [1, 1]  # the least
    with pytest.raises(BadInput, match="same question"):
        data.hold_out([rows[0], rows[200]])


# --------------------------------------------------------------------------------------------------
# `python data.py`.

RIGHT = {"prompt": "1+2", "completions": ["1+2=3", "\\boxed{3}"], "labels": [1, 0.5]}
WRONG = {"prompt": "2+2", "completions": ["2+2=5"], "labels": None, "correct": False}
WILD = {"prompt": "Où?", "completions": ["Là «»…", "Ici"], "answer": "Ici"}
SHORT = {"prompt": "1+2", "completions": ["3"], "labels": [1]}
FILES = {
    "trajectories": [RIGHT | {"correct": True}, WRONG],
    "wild": [WILD],
    "problems": [{"question": "1+2", "answer": "#### 3"}] * 3,
    "pairs": [{"prompt": "1+2", "chosen": "3", "rejected": "4"}],
    "bad": [SHORT, SHORT | {"labels": [2]}],
}


@pytest.fixture
def shown(tmp_path, capsys, monkeypatch):
    """`python data.py` in this process, in a folder with the files -> what it prints."""
    for name, rows in FILES.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)

    def show(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *words])
        data.main()
        return capsys.readouterr().out

    return show


def test_samples_of_the_built_in_task(shown, tmp_path):
    files = os.listdir(tmp_path)
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, os.path.join(ROOT, "data.py")]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    out = done.stdout
    assert done.returncode == 0 and not done.stderr and os.listdir(tmp_path) == files
    for level in LEVELS:
        assert out.count(f"{level}: ") == 1
    assert out.count("outcome: True") == out.count("outcome: False") == len(LEVELS)
    assert "\\\\boxed{" in out and "label 0" in out
    assert shown() == out  # whatever Python's hash seed


def test_problems_are_written_in_their_format(shown):
    rows = [json.loads(line) for line in shown("--write", "20").splitlines()]
    assert rows == data.make_problems(20)


TRAJECTORY = """\
trajectories.jsonl: trajectories (stepwise supervision); 2 rows, 3 steps, 1 with step labels, \
1 right, 1 wrong
  21 tokens, 5 of them prompt; outcome: True
  <user>1+2<assistant>
    1+2=3\\n«\\n»    label 1
    \\\\boxed{3«}»    label 0.5
"""
PROBLEM = """\
problems.jsonl: problems (question and answer); 3 rows
  question: '1+2'
  answer: '3'
"""


def test_files_are_shown(shown):
    out = shown("trajectories.jsonl", "problems.jsonl", "pairs.jsonl")
    assert TRAJECTORY in out and PROBLEM in out
    for part in ("pairs.jsonl: pairs (preference pairs); 1 rows\n", "chosen: '3'", "rejected: '4'"):
        assert part in out


def test_a_bad_file_is_an_error_when_its_turn_comes(shown, capsys):
    with pytest.raises(BadInput) as error:
        shown("trajectories.jsonl", "bad.jsonl")
    wanted = "label 1 should be true, false or from 0 to 1, is 2"
    assert str(error.value) == f"bad.jsonl:2: {wanted}"
    assert TRAJECTORY in capsys.readouterr().out


def test_text_is_spelled_in_bytes_or_by_the_model_asked_for(shown, tmp_path):
    bare_tokenizer().save_pretrained(tmp_path / "bare")
    model = ["--model", str(tmp_path / "bare")]
    for words, prompt in (([], "<user>Où?<assistant>"), (model, "Où?\\n\\n")):
        assert f"\n  {prompt}\n    Là «»…\\n«\\n»\n    Ic«i»\n" in shown("wild.jsonl", *words)
