"""The built-in task, tokenizers, and the way from text to tensors: spans, masks, batches, the cut by question, `python data.py`."""
import collections
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
from data import BadInput

LEVELS = list(data.LEVELS)


def solutions(n=40, samples=2, rollouts=4, kind="hard", seed=0, level="builtin", split="train"):
    return data.make_trajectories(data.make_problems(n, split, seed, level), samples, rollouts, kind, seed, level)


def unicode_text(rng, n):
    """Any characters but halves of surrogate pairs, which no UTF-8 file can hold."""
    pick = lambda: rng.choice([rng.randrange(32, 127), rng.randrange(0x20), rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000)])  # noqa: E731
    return "".join(chr(pick()) for _ in range(n))


# ---------------------------------------------------------------------------------------------------------------------
# The built-in task.

def test_the_task_is_a_pure_function_of_its_seed():
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    for level in LEVELS:
        made = [solutions(seed=seed, level=level) for seed in (0, 0, 1)]
        assert made[0] == made[1] != made[2]
        assert data.make_problems(10, "train", 3, level) == data.make_problems(50, "train", 3, level)[:10]  # more is more of the same
    after = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]  # nobody else's random numbers are used


@pytest.mark.parametrize("level", LEVELS)
def test_train_and_test_never_overlap(level):
    train = {p["question"] for n, seed in ((1, 1), (300, 0), (3000, 0), (3000, 7)) for p in data.make_problems(n, "train", seed, level)}
    test = {p["question"] for n, seed in ((1, 2), (300, 0), (1000, 0), (1000, 7)) for p in data.make_problems(n, "test", seed, level)}
    assert not train & test and len(train) > 5000 and len(test) > 1000
    assert all(data.is_test(q) for q in test) and not any(data.is_test(q) for q in train)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_problems(level, split):
    problems = data.make_problems(500, split, 5, level)
    assert len({p["question"] for p in problems}) == 500
    lengths = collections.Counter()
    for p in problems:
        value, operations = data.parse_question(p["question"])
        assert p["question"] == str(value) + "".join(op + str(b) for op, b in operations)
        for op, b in operations:
            value = int(str(eval(f"{value}{op}{b}") % 10)[-1])
        assert p["answer"] == str(value)
        lengths[len(operations)] += 1
    low, high = data.LEVELS[level][:2]
    assert sorted(lengths) == list(range(low, high + 1)) and min(lengths.values()) > 0.5 * 500 / (high - low + 1)


def test_the_habits():
    assert len(data.FACTS) == len(set(data.FACTS)) == 240
    for level, (_, _, share) in data.LEVELS.items():
        habits = data.HABITS[level]
        assert len(habits) == round(share * 240) and set(habits) <= set(data.FACTS)
        assert all(0 <= wrong <= 9 and wrong != data.digit(*fact) for fact, wrong in habits.items())
    assert len(data.HABITS["builtin"]) == 72  # 30%


@pytest.mark.parametrize("level", LEVELS)
def test_the_student_errs_by_habit_alone(level):
    habits, followed = data.HABITS[level], collections.Counter()
    for row in solutions(1000, 2, 0, level=level):
        for step in row["completions"][:-1]:
            fact, result = (int(step[0]), step[1], int(step[2])), int(step[4:])
            if fact in habits and result == habits[fact]:
                followed[True] += 1
            else:
                followed[False] += fact in habits
                assert result == data.digit(*fact)
    n = followed.total()
    assert abs(followed[True] / n - data.HABIT_RATE) < 4 * math.sqrt(0.24 / n)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_solutions(level, kind):
    problems = data.make_problems(100, seed=1, level=level)
    rows = data.make_trajectories(problems, 3, 4, kind, 1, level)
    assert [row["prompt"] for row in rows] == [p["question"] for p in problems for _ in range(3)]
    for row in rows:
        start, operations = data.parse_question(row["prompt"])
        *steps, box = row["completions"]
        before, errors = start, []
        for t, (step, (op, b)) in enumerate(zip(steps, operations, strict=True)):
            left, result = step.split("=")
            assert left == f"{before}{op}{b}"  # it goes on from what it wrote, right or wrong
            before = int(result)
            errors += [t] * (before != data.digit(int(left[0]), op, b))
        assert box == f"\\boxed{{{before}}}"
        assert row["first_error"] == (errors[0] if errors else -1)
        assert row["correct"] is (str(before) == row["answer"]) is data.verify(data.STEP_END.join(row["completions"]), row["answer"])
        assert row["correct"] or errors  # an error can cancel out, a right chain cannot be wrong
        assert len(row["labels"]) == len(row["completions"]) and row["labels"][-2:] == [float(row["correct"])] * 2
        assert all(isinstance(label, float) and label in ((0, 1) if kind == "hard" else (0, .25, .5, .75, 1)) for label in row["labels"])
    assert any(row["correct"] and row["first_error"] >= 0 for row in rows)


def test_hard_labels_say_whether_any_rollout_was_right():
    for level in LEVELS:
        soft, hard = (solutions(kind=kind, level=level) for kind in ("soft", "hard"))
        assert [row["completions"] for row in soft] == [row["completions"] for row in hard]  # the same rollouts, counted in two ways
        assert [[float(label > 0) for label in row["labels"]] for row in soft] == [row["labels"] for row in hard]
        assert all(row["labels"] is None for row in solutions(rollouts=0, level=level))


@pytest.mark.parametrize("level", LEVELS)
def test_soft_labels_approach_the_exact_probability(level):
    def right_from(value, operations, answer):
        chances = {value: 1.0}
        for op, b in operations:
            then = collections.Counter()
            for v, chance in chances.items():
                wrong, follow = data.HABITS[level].get((v, op, b)), data.HABIT_RATE
                then[data.digit(v, op, b)] += chance * (1 if wrong is None else 1 - follow)
                if wrong is not None:
                    then[wrong] += chance * follow
            chances = then
        return chances.get(answer, 0.0)
    errors = []
    for row in solutions(6, 1, 800, "soft", level=level):
        _, operations = data.parse_question(row["prompt"])
        for t, label in enumerate(row["labels"][:-1]):
            errors.append(label - right_from(int(row["completions"][t][4:]), operations[t + 1:], int(row["answer"])))
    assert max(map(abs, errors)) < 5 * math.sqrt(0.25 / 800) and abs(np.mean(errors)) < 0.02


def test_pass_rate():
    """About one solution in two is right on the default level: as much to learn from either kind."""
    rates = {level: np.mean([np.mean([row["correct"] for row in solutions(1000, 4, 0, seed=seed, level=level)]) for seed in range(3)]) for level in LEVELS}
    assert 0.44 < rates["builtin"] < 0.51 and 0.03 < rates["builtin-hard"] < 0.35


def test_built_in_rows_are_rows_of_the_trajectory_format(tmp_path):
    rows = solutions(20, kind="soft")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(data.read_trajectories(tmp_path / "rows.jsonl"))
    keys = ["prompt", "completions", "labels", "answer", "correct"]
    assert [[row[key] for key in keys] for row in read] == [[row[key] for key in keys] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers.

def bare_tokenizer(pad=True, bos=False):
    """A base model's: no chat template; without `pad` no pad token either; with `bos` it opens every text with <unk>."""
    tokenizer = data.byte_tokenizer()
    tokenizer.chat_template = None
    if not pad:
        tokenizer.pad_token = None
    if bos:
        from tokenizers.processors import TemplateProcessing
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<unk> $A", special_tokens=[("<unk>", tokenizer.unk_token_id)])
    return tokenizer


TOKENIZERS = {"builtin": data.builtin_tokenizer, "bytes": data.byte_tokenizer, "bare": bare_tokenizer, "bos": lambda: bare_tokenizer(bos=True)}


@pytest.mark.parametrize("make", [data.builtin_tokenizer, data.byte_tokenizer])
def test_special_tokens_and_chat_template(make):
    tokenizer = make()
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])]
    assert special == [0, 1, 2, 3, 4]
    chat = [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4"}]
    assert tokenizer.decode(data.encode_prompt(tokenizer, chat)) == "<user>1<user>2<assistant>3<eos><user>4<assistant>"
    assert tokenizer.decode(data.encode_prompt(tokenizer, "1+2")) == "<user>1+2<assistant>"
    # The last turn as the template ends it is the response as the trajectory ends it.
    ids = data.encode_trajectory(tokenizer, "1+2", ["1+2=3", "\\boxed{3}"], eos=True)[0]
    turns = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "1+2=3\n\n\\boxed{3}"}]
    assert tokenizer.apply_chat_template(turns)["input_ids"] == ids


def test_built_in_text_round_trip():
    tokenizer = data.builtin_tokenizer()
    for level in LEVELS:
        for row in solutions(50, level=level):
            text = row["prompt"] + data.STEP_END + data.STEP_END.join(row["completions"])
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert tokenizer("?")["input_ids"] == [tokenizer.unk_token_id]


def test_bytes_round_trip_of_any_text():
    tokenizer, rng = data.byte_tokenizer(), random.Random(0)
    texts = [unicode_text(rng, n) for n in range(1, 200)]
    texts += ["a <eos> b<pad>", "", " ", "\n\n", "a\r\nb", "it 's , fine .", "e\u0301\u00e9", "\ufeffx", "\0", "👩‍👩‍👧", "á" * 999, "  lead", "trail  "]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
        if "<" not in text:
            assert len(ids) == len(text.encode())
    assert tokenizer.decode(tokenizer("1<eos>")["input_ids"], skip_special_tokens=True) == "1"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_saved_tokenizers_are_the_same(name, model_type, tmp_path):
    """Also beside a model: for some families the library would rather have their usual tokenizer than the one in the folder."""
    tokenizer, rng = TOKENIZERS[name](), random.Random(1)
    if model_type:
        from transformers import AutoConfig
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for _ in range(2):  # a run saves again what it has loaded
        again = data.load_tokenizer(str(tmp_path))
        for token in ("pad_token_id", "eos_token_id", "unk_token_id", "chat_template"):
            assert getattr(again, token) == getattr(tokenizer, token)
        assert len(again) == len(tokenizer)
        for text in ["7+8*3-5", "7+8=5\n\n", "\\boxed{5}", "a , b . c 's", "e\u0301", *(unicode_text(rng, 50) for _ in range(20))]:
            ids = tokenizer(text)["input_ids"]
            assert again(text)["input_ids"] == ids and again.decode(ids) == tokenizer.decode(ids)
            assert data.encode_prompt(again, text) == data.encode_prompt(tokenizer, text)
        again.save_pretrained(tmp_path)


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    bare_tokenizer(pad=False).save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


# ---------------------------------------------------------------------------------------------------------------------
# Text to token ids.

SPLITS = [
    ("", []), (" \n\n\t\n", []), ("a", ["a"]), ("a\n\nb", ["a", "b"]), ("a\nb", ["a\nb"]), ("a\nb\n\nc\nd", ["a\nb", "c\nd"]), ("a\n\n\n\n\nb", ["a", "b"]),
    ("a\n\n\nb", ["a", "b"]), ("\n\na\n\n", ["a"]), ("a\n \t\nb", ["a", "b"]), ("a  \n\n  b", ["a", "b"]), ("a\r\n\r\nb\r\nc", ["a", "b\r\nc"]),
    ("Step 1: x\n\nStep 2: y", ["Step 1: x", "Step 2: y"]), ("a\\n\\nb", ["a\\n\\nb"]), ("\\[\na\n\\]\n\n$$b$$", ["\\[\na\n\\]", "$$b$$"]), ("à\n\u3000\né", ["à", "é"]),
]


@pytest.mark.parametrize("text, steps", SPLITS)
def test_split_steps(text, steps):
    assert data.split_steps(text) == steps
    assert data.split_steps(data.STEP_END.join(steps)) == steps  # joined and split again


def test_split_steps_is_fast_on_hostile_text():
    began = time.monotonic()
    for text in (" " * 10**6, "\n" + " " * 10**6, "\n " * 10**5, "\n" * 10**6, "a\n" * 10**5, ("\n" + " " * 999) * 999 + "x"):
        data.split_steps(text)
    assert time.monotonic() - began < 2


PROMPTS = ["1+2", "", [{"role": "user", "content": "1+2"}],
           [{"role": "system", "content": "3"}, {"role": "user", "content": "4"}, {"role": "assistant", "content": "5"}, {"role": "user", "content": "6"}]]
STEPS = [["1+2=3", "\\boxed{3}"], ["1"], ["1", "2", "3", "4", "5"], ["1+2=3"] * 3]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("eos", [False, True])
def test_spans_of_a_trajectory(name, eos):
    tokenizer, rng = TOKENIZERS[name](), random.Random(2)
    wild = [] if name == "builtin" else [[unicode_text(rng, 9) for _ in range(4)], ["a b", " c\nd ", "<é>"], ["a\n\nb", "c"]]  # a blank line in a step is text
    for prompt in PROMPTS:
        for steps in STEPS + wild:
            ids, prompt_length, step_ends = data.encode_trajectory(tokenizer, prompt, steps, eos)
            assert ids[:prompt_length] == data.encode_prompt(tokenizer, prompt)
            assert len(step_ends) == len(steps) and step_ends[-1] == len(ids) - 1 - eos
            begins = [prompt_length] + [end + 1 for end in step_ends]
            spans = [ids[begin:end + 1] for begin, end in zip(begins, step_ends)]
            closed = [step + data.STEP_END for step in steps[:-1]] + steps[-1:]
            assert [tokenizer.decode(span) for span in spans] == closed
            assert spans == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in closed]
            assert ids == ids[:prompt_length] + sum(spans, []) + [tokenizer.eos_token_id] * eos  # nothing else is in it
            # What was written up to a step does not depend on what comes after: the condition for one forward.
            for t in range(1, len(steps)):
                assert data.encode_trajectory(tokenizer, prompt, steps[:t] + ["9"])[0][:step_ends[t - 1] + 1] == ids[:step_ends[t - 1] + 1]


def test_prompts_without_a_chat_template():
    tokenizer = bare_tokenizer(bos=True)
    for prompt, text in (("1+2", "1+2\n\n"), (PROMPTS[3], "3\n\n4\n\n5\n\n6\n\n")):
        ids = data.encode_prompt(tokenizer, prompt)
        assert ids.count(tokenizer.unk_token_id) == 1 and tokenizer.decode(ids) == "<unk>" + text  # the opening token once, before all
        assert data.encode_trajectory(tokenizer, prompt, ["a", "b"])[0].count(tokenizer.unk_token_id) == 1


def test_encoding_does_not_change_what_it_is_given():
    tokenizer = data.builtin_tokenizer()
    chat, steps = [{"role": "user", "content": "1+2"}], ["1+2=3", "\\boxed{3}"]
    first = data.encode_trajectory(tokenizer, chat, steps)
    first[0].append(99)  # the caller owns the list: no cache may hand it out again
    assert data.encode_trajectory(tokenizer, chat, steps)[0] == first[0][:-1]
    assert chat == [{"role": "user", "content": "1+2"}] and steps == ["1+2=3", "\\boxed{3}"]
    row = {"prompt": "1+2", "completions": steps, "labels": None}
    (example,), _ = data.encode_rows([row], tokenizer, 99)
    assert row.keys() < example.keys() and example["completions"] == steps and len(row) == 3


def test_two_tokenizers_side_by_side():
    """A policy and a reward model of another family may be in one process."""
    one, other = data.builtin_tokenizer(), data.byte_tokenizer()
    for _ in range(2):
        for tokenizer in (one, other):
            assert tokenizer.decode(data.encode_trajectory(tokenizer, "1", ["1+2=3", "3"])[0]) == "<user>1<assistant>1+2=3\n\n3"


def test_rows_too_long_are_dropped_and_counted():
    tokenizer = data.byte_tokenizer()
    rows = [{"prompt": "q" * n, "completions": ["a" * n, "b"]} for n in (1, 50, 2, 99, 3)]
    length = lambda n: 2 + n + n + 2 + 1  # noqa: E731  two template tokens, question, first step, blank line, last step
    for eos in (False, True):
        for n, kept in ((1, [1]), (3, [1, 2, 3]), (50, [1, 50, 2, 3]), (99, [1, 50, 2, 99, 3])):
            examples, dropped = data.encode_rows(iter(rows), tokenizer, length(n) + eos, eos)
            assert [len(e["prompt"]) for e in examples] == kept and dropped == 5 - len(kept)
            for e in examples:
                assert tokenizer.decode(e["input_ids"]) == f"<user>{e['prompt']}<assistant>{e['completions'][0]}\n\nb" + "<eos>" * eos
        with pytest.raises(BadInput) as error:
            data.encode_rows(rows, tokenizer, length(1) + eos - 1, eos)
        message = str(error.value)
        assert "\n" not in message and f"--max_length {length(1) + eos - 1}" in message and "5 traj" in message and str(length(99) + eos) in message


# ---------------------------------------------------------------------------------------------------------------------
# Examples to tensors.

def encoded(tokenizer, eos, seed=0, n=9):
    rng, rows = random.Random(seed), []
    for _ in range(n):
        steps = ["x" * rng.randint(1, 9) for _ in range(rng.randint(1, 5))]
        labels = rng.choice([None, [rng.random() for _ in steps]])
        rows.append({"prompt": "q" * rng.randint(1, 9), "completions": steps, "labels": labels, "correct": rng.choice([True, False, None])})
    return data.encode_rows(rows, tokenizer, 999, eos)[0]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_collate_against_a_loop(pad, eos, n, tmp_path):
    bare_tokenizer(pad).save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer(str(tmp_path))
    pad_id = tokenizer.pad_token_id
    assert (pad_id == tokenizer.eos_token_id) is not pad
    examples = encoded(tokenizer, eos, n=n)
    got = data.collate(examples, pad_id)
    B, T, S = n, max(len(e["input_ids"]) for e in examples), max(len(e["completions"]) for e in examples)
    assert {name: (tuple(x.shape), x.dtype) for name, x in got.items()} == {
        "input_ids": ((B, T), torch.int64), "attention_mask": ((B, T), torch.int64), "response_mask": ((B, T - 1), torch.bool),
        "step_ends": ((B, S), torch.int64), "step_mask": ((B, S), torch.bool), "labels": ((B, S), torch.float32), "outcomes": ((B,), torch.float32)}
    for b, e in enumerate(examples):
        real = len(e["input_ids"])
        for t in range(T):
            assert got["input_ids"][b, t] == (e["input_ids"][t] if t < real else pad_id)
            assert got["attention_mask"][b, t] == (t < real)
            if t < T - 1:  # is the next token part of the response?
                assert got["response_mask"][b, t] == (e["prompt_length"] <= t + 1 < real)
        for s in range(S):
            here = s < len(e["completions"])
            assert got["step_mask"][b, s] == here
            assert got["step_ends"][b, s] == (e["step_ends"][s] if here else 0)
            assert got["labels"][b, s].item() == pytest.approx(e["labels"][s] if here and e["labels"] else 0)
        assert got["outcomes"][b] == (e["correct"] is True)
        # The policy learns to stop also where pad is eos: the last token that counts is the end of the response.
        targets = got["input_ids"][b, 1:][got["response_mask"][b]].tolist()
        assert targets == e["input_ids"][e["prompt_length"]:] and (targets[-1] == tokenizer.eos_token_id) is eos


LENGTHS = np.random.default_rng(0).lognormal(5, 0.7, 5000).astype(int) + 1


def take(n, *args):
    order = data.batches(*args)
    return [next(order) for _ in range(n)]


@pytest.mark.parametrize("rows, size", [(100, 8), (100, 100), (101, 100), (7, 1), (1, 1), (5000, 16), (3, 8), (1, 64), (63, 64)])
def test_a_resumed_order_is_the_tail(rows, size):
    lengths, n = LENGTHS[:rows], 70
    expected = take(n, lengths, size, 3)
    assert expected == take(n, list(lengths), size, 3)  # deterministic
    assert rows == 1 or expected != take(n, lengths, size, 4)
    for start in sorted({*range(0, 30), 31, 47, 69}):
        assert take(n - start, lengths, size, 3, start) == expected[start:]
    assert all(len(batch) == size and all(0 <= i < rows for i in batch) for batch in expected)
    assert take(2, lengths, size, 3, 10**6) == take(3, lengths, size, 3, 10**6 - 1)[1:]


@pytest.mark.parametrize("rows, size", [(100, 8), (100, 100), (5000, 16), (1000, 7), (7, 1)])
def test_every_row_at_most_once_an_epoch(rows, size):
    per_epoch = rows // size
    batches = take(3 * per_epoch, LENGTHS[:rows], size)
    epochs = [batches[k * per_epoch:(k + 1) * per_epoch] for k in range(3)]
    seen = [sorted(i for batch in epoch for i in batch) for epoch in epochs]
    assert all(len(set(rows_seen)) == per_epoch * size == len(rows_seen) for rows_seen in seen)
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
    padding = lambda batches: sum(len(b) * LENGTHS[b].max() - LENGTHS[b].sum() for b in map(np.array, batches))  # noqa: E731
    ours = take(5000 // 16, LENGTHS, 16)
    shuffled = np.split(np.random.default_rng(1).permutation(5000)[:4992], 312)
    assert padding(ours) < 0.2 * padding(shuffled)
    # Short and long batches come in any order, though: no epoch is a curriculum.
    means = [LENGTHS[b].mean() for b in ours]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2


def test_hold_out():
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate([f"question {i % 200}" for i in range(1000)] + [PROMPTS[3], PROMPTS[3], "one more"])]
    train, held_out = data.hold_out(rows)
    assert sorted(row["n"] for row in train + held_out) == list(range(len(rows)))
    assert [row["n"] for row in train] == sorted(row["n"] for row in train)  # in order
    questions = [{str(row["prompt"]) for row in part} for part in (train, held_out)]
    assert not questions[0] & questions[1] and len(questions[1]) == 10  # 5% of 202
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    assert {str(row["prompt"]) for row in data.hold_out(shuffled)[1]} == questions[1]
    assert len({str(row["prompt"]) for row in data.hold_out(rows, 0.5)[1]}) == 101
    assert [len({row["prompt"] for row in part}) for part in data.hold_out(rows[:2])] == [1, 1]  # two questions are the least
    with pytest.raises(BadInput, match="same question"):
        data.hold_out([rows[0], rows[200]])


# ---------------------------------------------------------------------------------------------------------------------
# `python data.py`.

FILES = {
    "trajectories": [{"prompt": "1+2", "completions": ["1+2=3", "\\boxed{3}"], "labels": [1, 0.5], "correct": True},
                     {"prompt": "2+2", "completions": ["2+2=5"], "labels": None, "correct": False}],
    "wild": [{"prompt": "Où?", "completions": ["Là «»…", "Ici"], "labels": None, "correct": None, "answer": "Ici"}],
    "problems": [{"question": "1+2", "answer": "#### 3"}] * 3,
    "pairs": [{"prompt": "1+2", "chosen": "3", "rejected": "4"}],
    "bad": [{"prompt": "1+2", "completions": ["3"], "labels": [1]}, {"prompt": "1+2", "completions": ["3"], "labels": [2]}],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def python_data(folder, *words):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, os.path.join(ROOT, "data.py"), *words], cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_samples_of_the_built_in_task(tmp_path, capsys, monkeypatch):
    code, out, err = python_data(tmp_path)
    assert code == 0 and not err and os.listdir(tmp_path) == []
    for level in LEVELS:
        assert out.count(f"{level}: ") == 1
    assert out.count("outcome: True") == out.count("outcome: False") == len(LEVELS) and "\\\\boxed{" in out and "label 0" in out
    monkeypatch.setattr(sys, "argv", ["data.py"])
    data.main()
    assert capsys.readouterr().out == out  # whatever Python's hash seed


def test_files_are_shown_and_a_bad_one_is_one_line_and_status_1(files):
    code, out, err = python_data(files, "trajectories.jsonl", "problems.jsonl", "pairs.jsonl", "bad.jsonl")
    assert "trajectories.jsonl: trajectories (stepwise supervision); 2 rows, 3 steps, 1 with step labels, 1 right, 1 wrong\n" in out
    assert "  14 tokens, 5 of them prompt; outcome: True\n  <user>1+2<assistant>\n    1+2=3«\\n\\n»    label 1\n    \\\\boxed{3«}»    label 0.5\n" in out
    assert "problems.jsonl: problems (question and answer); 3 rows\n  question: '1+2'\n  answer: '3'\n" in out
    assert "pairs.jsonl: pairs (preference pairs); 1 rows\n" in out and "chosen: '3'" in out and "rejected: '4'" in out
    assert code == 1 and err == "data.py: error: bad.jsonl:2: label 1 should be true, false or from 0 to 1, is 2\n"


def test_other_text_is_spelled_in_bytes_or_by_the_model_asked_for(files, tmp_path, capsys, monkeypatch):
    bare_tokenizer().save_pretrained(tmp_path)
    for options, prompt in (([], "<user>Où?<assistant>"), (["--model", str(tmp_path)], "Où?\\n\\n")):
        monkeypatch.setattr(sys, "argv", ["data.py", str(files / "wild.jsonl"), *options])
        data.main()
        out = capsys.readouterr().out
        assert f"\n  {prompt}\n    Là «»…\\n«\\n»\n    Ic«i»\n" in out
