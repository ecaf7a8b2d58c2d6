"""Tree search against a naive twin, answers from samples against their definitions, and the run.

The script itself runs on a policy that was trained for seconds on questions of two operations.
"""

import itertools
import json
import math
import os
import random
import re
import runpy
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import data
import search_minimal as search
import sft_minimal as sft
from conftest import ROOT
from helpers import ranks, save_policy, write_rows
from parts import decoding
from parts.answers import verify
from parts.decoding import Sample, sample
from parts.formats import read_trajectories, split_steps
from parts.models import Layout, encode_prompt, load_tokenizer
from parts.rewards import load_reward_model, new_reward_model
from parts.runs import Processes
from test_decoding import EOS, PROMPTS, TOKENIZERS, full_logits, llama, naive, policy, tokens_read

CPU, TOKENIZER = torch.device("cpu"), TOKENIZERS["builtin"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Reward models with random heads: {"qwen2", "llama", "flat"}, the last without an opinion."""
    place, found = tmp_path_factory.mktemp("prms"), {}
    for shape in ("qwen2", "llama"):
        model = sft.new_policy(TOKENIZER, 3) if shape == "qwen2" else llama(TOKENIZER)
        model.save_pretrained(place / shape)
    for shape, folder in (("qwen2", "qwen2"), ("llama", "llama"), ("flat", "qwen2")):
        prm = new_reward_model(str(place / folder), TOKENIZER, torch.float32, seed=4)
        found[shape] = prm.eval().requires_grad_(False)
    torch.nn.init.zeros_(found["flat"].model.score.weight)
    return found


@pytest.fixture
def noise_table(monkeypatch):
    """Noise looked up as u(problem, row, position in the response): the same for sampling at once
    and step by step."""
    table = np.random.default_rng(5).random((8, 24, 256), dtype=np.float32)

    def look_up(seed, key, depth, starts, length):
        return np.stack([table[key, row, s : s + length] for row, s in enumerate(starts)])

    for module in (search, decoding):
        monkeypatch.setattr(module, "uniforms", look_up)
    return table


def grow(prm, prompts, *numbers, model=None, **options):
    return search.tree_search(model or policy(), TOKENIZER, prm, prompts, *numbers, **options)


# --------------------------------------------------------------------------------------------------
# Tree search. Numbers: kept prefixes, next steps, subtrees.

TREES = {"greedy": (1, 3, 1), "beam": (3, 2, 1), "dvts": (1, 3, 2)}


@pytest.mark.parametrize("longest", [9, 17, 60])
def test_one_sample_and_a_tree_of_one_branch_are_plain_sampling(longest, noise_table, models):
    """With the same noise: best-of-1, keep 1 x expand 1, and sample(), in tokens; cut at
    max_new_tokens, too."""
    prompts = PROMPTS + PROMPTS[::-1]
    samples = sample(policy(), TOKENIZER, prompts, 1, max_new_tokens=longest)
    for i, (s,) in enumerate(samples):
        noise = noise_table[i, 0, :longest]
        assert s.token_ids == naive(policy(), TOKENIZER, s.prompt_ids, noise)
    for max_step in (5, 64):
        limits = {"max_new_tokens": longest, "max_step_tokens": max_step}
        best, count = grow(models["qwen2"], prompts, 1, 1, **limits)
        for (s,), beam in zip(samples, best):
            assert beam.token_ids == s.token_ids and beam.finished == s.finished
            assert max_step < 60 or not s.finished or beam.steps == split_steps(s.text)
        assert count["generated"] == sum(len(s.token_ids) for (s,) in samples)


def test_one_branch_has_the_distribution_of_samples(models):
    keys, blank = 500, TOKENIZER.convert_tokens_to_ids("\n\n")

    def kinds(responses):
        return Counter((min(ids.count(blank), 3), len(ids) // 10) for ids in responses)

    best, _ = grow(models["qwen2"], ["1+2"] * keys, 1, 1, max_new_tokens=40)
    tree = kinds([beam.token_ids for beam in best])
    (samples,) = sample(policy(), TOKENIZER, ["1+2"], 2 * keys, max_new_tokens=40, seed=7)
    plain = kinds([s.token_ids for s in samples])
    assert len(plain) > 6
    for kind in plain | tree:
        p = (plain[kind] + tree[kind]) / (3 * keys)
        difference = abs(plain[kind] / (2 * keys) - tree[kind] / keys)
        assert difference < 4 * math.sqrt(p * (1 - p) * 1.5 / keys) + 0.002, kind


def naive_tree(model, prm, prompt, noise, numbers, temperature, max_step, longest):
    """One problem, full forwards -> the best beam, candidates of each depth.

    A beam: [token ids, steps, the reward model's ids, value, finished]. A group's candidates are
    distinct in tokens; the best `keep` of them and of the finished go on, the first of equals
    first. A step without text, such as an end right after a blank line, adds no step and so keeps
    the value."""
    keep, expand, subtrees = numbers
    prompt_ids, trace = encode_prompt(TOKENIZER, prompt), []
    live = [[[[], [], prompt_ids, 0.0, False]] for _ in range(subtrees)]
    ended = [[] for _ in range(subtrees)]

    def child(beam, u):
        ids, steps, read, value, _ = beam
        u = u[len(ids) : min(len(ids) + max_step, longest)]
        tokens = naive(model, TOKENIZER, prompt_ids + ids, u, temperature, one_step=True)
        text = TOKENIZER.decode(tokens, skip_special_tokens=True).strip()
        end = tokens[-1] == EOS
        if text:
            closed = text + ("" if end else "\n\n")
            steps, read = steps + [text], read + TOKENIZER(closed)["input_ids"]
            value = full_logits(prm.model, read)[-1, 0].sigmoid().item()
        return [ids + tokens, steps, read, value, end]

    for depth in itertools.count():
        rows = iter(noise)
        for g in range(subtrees):
            new = {}
            for beam in live[g]:
                for _ in range(expand if depth else keep * expand):
                    candidate = child(beam, next(rows))
                    new.setdefault(tuple(candidate[0]), candidate)
            if new:
                trace.append((depth, g, [c[0] for c in new.values()]))
            kept = sorted(ended[g] + list(new.values()), key=lambda beam: -beam[3])[:keep]
            over = [beam[4] or len(beam[0]) >= longest for beam in kept]
            ended[g] = [beam for beam, is_over in zip(kept, over) if is_over]
            live[g] = [beam for beam, is_over in zip(kept, over) if not is_over]
        if not any(live):
            return max((b for each in ended for b in each), key=lambda beam: beam[3]), trace


SHAPES = [("qwen2", 1.0), ("llama", 0.7), ("flat", 1.0), ("qwen2", 0.0)]


@pytest.mark.parametrize("shape, temperature", SHAPES)
@pytest.mark.parametrize("method", TREES)
def test_tree_search_equals_a_naive_one(method, shape, temperature, models, noise_table):
    """All problems at once against each by itself without caches, candidate by candidate."""
    model, prm, trace = policy(shape.replace("flat", "qwen2")), models[shape], []
    numbers = TREES[method]
    limits = {"max_step_tokens": 14, "max_new_tokens": 36}
    options = {"model": model, "temperature": temperature, "trace": trace} | limits
    best, _ = grow(prm, PROMPTS, *numbers, **options)
    found = {}
    for depth, group, new, _ in trace:
        problem, subtree = divmod(group, numbers[2])
        mine = (depth, subtree, [beam.token_ids for beam in new])
        found.setdefault(problem, []).append(mine)
    for i, (prompt, beam) in enumerate(zip(PROMPTS, best)):
        rest = noise_table[i], numbers, temperature, *limits.values()
        (ids, steps, _, value, finished), candidates = naive_tree(model, prm, prompt, *rest)
        assert found[i] == candidates
        assert (beam.token_ids, beam.steps, beam.finished) == (ids, steps, finished)
        assert beam.value == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("method", TREES)
def test_a_tree_does_not_depend_on_the_others_in_its_batch(method, models):
    """Else two processes would not give the table of one. Responses near max_new_tokens are the
    hard part."""

    def tokens(keys, **more):
        options = {"keys": keys, "max_step_tokens": 16, "max_new_tokens": 24} | more
        best, _ = grow(models["qwen2"], [PROMPTS[i] for i in keys], *TREES[method], **options)
        return [beam.token_ids for beam in best]

    together = tokens([0, 1, 2, 3])
    assert together == [tokens([i])[0] for i in range(4)]
    assert all(len(ids) <= 24 for ids in together)
    assert together != tokens([0, 1, 2, 3], seed=1)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("method", TREES)
def test_no_prefix_token_is_read_twice(method, temperature, models):
    model, prm, trace, longest = policy(), models["qwen2"], [], 40
    keep, expand, subtrees = TREES[method]
    options = {"temperature": temperature, "max_new_tokens": longest, "trace": trace}
    with tokens_read(model) as by_policy, tokens_read(prm.model) as by_prm:
        _, count = grow(prm, PROMPTS, keep, expand, subtrees, **options)
    prompts, live = sum(len(encode_prompt(TOKENIZER, p)) for p in PROMPTS), {}
    for depth, group, _, kept in trace:
        going = [b.token_ids for b in kept if not b.finished and len(b.token_ids) < longest]
        live[depth, group] = going
    last = sum(map(len, live.values()))  # a candidate's last token is read if it is kept
    sampled = len(PROMPTS) * subtrees * keep * expand + last * expand
    assert by_policy["read"] <= prompts + count["generated"] - sampled + last
    distinct, steps = set(), {}  # texts within a step; at the root, subtrees share them
    for depth, group, new, _ in trace:
        for beam in new:
            ids, begin = beam.token_ids, 0
            if depth:
                begin = next(len(p) for p in live[depth - 1, group] if ids[: len(p)] == p)
            owner = group if depth else group // subtrees
            distinct |= {(owner, tuple(ids[:n])) for n in range(begin + 1, len(ids))}
            if ids != [EOS] and TOKENIZER.decode(ids[-2:]) != "\n\n<eos>":
                closed = beam.steps[-1] + ("" if beam.finished else "\n\n")
                steps[group, tuple(ids)] = TOKENIZER(closed)["input_ids"]
    assert by_policy["read"] == prompts + len(distinct) + last
    read_by_prm = prompts + sum(map(len, steps.values()))
    assert by_prm["read"] == count["scored"] == read_by_prm
    if not temperature:  # every candidate is a duplicate of the first
        assert all(len(new) <= keep for _, _, new, _ in trace)


def test_responses_to_many_prompts_are_scored_together(models):
    """Each as by itself; what is equal, or has no step, costs nothing."""
    prm = models["qwen2"]
    texts = [["1=1\n\n2", "3", "1=1\n\n2"], [" "], ["3", "", "4\n\n5\n\n6"], []]
    responses = [[(text, True) for text in mine] for mine in texts]
    values, tokens = search.score_responses(prm, PROMPTS, responses, Layout(), CPU)
    for prompt, mine, found, count in zip(PROMPTS, texts, values, tokens):
        rows = {}
        for text in filter(str.strip, mine):
            ids, _, ends = data.encode_trajectory(TOKENIZER, prompt, split_steps(text))
            rows[text] = full_logits(prm.model, ids)[ends, 0].sigmoid().tolist(), len(ids)
        assert count == sum(length for _, length in rows.values()) and len(found) == len(mine)
        for text, v in zip(mine, found):
            assert v == pytest.approx(rows.get(text, ([],))[0], abs=1e-4)
    nothing = [[("", True), (" ", False)]]
    found = search.score_responses(prm, ["1+2"], nothing, Layout(), CPU)
    assert found == ([[[], []]], [0])


# --------------------------------------------------------------------------------------------------
# Answers from one set of samples.


@pytest.mark.parametrize(
    "how, wanted", [("last", 0.5), ("min", 0.2), ("mean", 0.4), ("prod", 0.05)]
)
def test_aggregate(how, wanted):
    assert search.aggregate([0.5, 0.2, 0.5], how) == pytest.approx(wanted)
    assert search.aggregate([0.3], how) == pytest.approx(0.3)
    assert search.aggregate([], how) == 0.0


def test_pass_at_n_is_the_mean_over_all_choices():
    for total in range(1, 8):
        for right, n in itertools.product(range(total + 1), range(1, total + 1)):
            samples = [1] * right + [0] * (total - right)
            hits = [max(chosen) for chosen in itertools.combinations(samples, n)]
            assert search.pass_at_n(right, total, n) == pytest.approx(np.mean(hits))


VOTES = [
    ("abb", [1, 1, 1], "b"),
    ("ab", [1, 1], "a"),
    ("ba", [1, 1], "b"),
    ("abb", [0.9, 0.2, 0.3], "a"),
    ([None, None, "a"], [1, 1, 1], "a"),
    ([None, None], [1, 1], None),
    ([], [], None),
    ("ab", [0.0, 0.0], "a"),
    ("cabba", [0, 1, 1, 1, 1], "a"),
]


@pytest.mark.parametrize("answers, weights, winner", VOTES)
def test_vote(answers, weights, winner):
    assert search.vote(list(answers), weights) == winner


def test_answers_from_samples_against_the_definitions():
    """Groups of n one after another; oracle from all N."""
    keys = list("abbacbca")
    values = [[0.1, 0.9], [0.8], [0.2, 0.3], [0.9, 0.1], [], [0.5], [0.4], [0.6, 0.7]]
    record = {"keys": keys, "correct": [key == "a" for key in keys], "values": {"x": values}}
    by_hand = {  # majority, best, weighted; last values: .9 .8 .3 .1 | 0 .5 .4 .7
        1: (3 / 8, 3 / 8, 3 / 8),
        2: (1 / 4, 2 / 4, 2 / 4),
        4: (1 / 2, 2 / 2, 1 / 2),
        8: (1.0, 1.0, 1.0),
    }
    for n, hits in by_hand.items():
        wanted = dict(zip(("majority", "best-of-n, x", "weighted, x"), hits))
        wanted["oracle"] = search.pass_at_n(3, 8, n)
        assert search.answers_from_samples(record, n, "last") == pytest.approx(wanted), n


# --------------------------------------------------------------------------------------------------
# The run.


def two_operations(seed, count):
    """Solved questions of two operations."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        a, b, c = rng.randint(0, 9), rng.randint(2, 9), rng.randint(2, 9)
        x, y = (a + b) % 10, (a + b) * c % 10
        steps = [f"{a}+{b}={x}", f"{x}*{c}={y}", f"\\boxed{{{y}}}"]
        question = f"{a}+{b}*{c}"
        rows[question] = {"prompt": question, "completions": steps, "answer": str(y)}
    return list(rows.values())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """policy/ (right now and then), reward models tokens/ and sequences/, two_labels/, files."""
    from transformers import AutoModelForSequenceClassification

    place, rows = tmp_path_factory.mktemp("search"), two_operations(0, 80)
    save_policy(place / "new")
    write_rows(place / "solutions.jsonl", rows)
    options = {"model": str(place / "new"), "data": (str(place / "solutions.jsonl"),)}
    options |= {"steps": 40, "batch_size": 32, "save_every": 0, "eval_every": 0}
    options |= {"eval_problems": 2, "max_new_tokens": 30, "out": str(place / "sft")}
    sft.main(sft.Config(**options), Processes())
    os.rename(place / "sft" / "model", place / "policy")
    name = str(place / "policy")
    new_reward_model(name, TOKENIZER, torch.float32, seed=1).save(str(place / "tokens"))
    for folder, labels in (("sequences", 1), ("two_labels", 2)):
        torch.manual_seed(2)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=labels)
        model.save_pretrained(place / folder)
        TOKENIZER.save_pretrained(place / folder)
    rows = rows[:5] + two_operations(1, 4)
    problems = [{"question": row["prompt"], "answer": row["answer"]} for row in rows]
    too_long = [{"question": "1+" * 2000 + "1", "answer": "1"}]
    write_rows(place / "problems.jsonl", problems)
    write_rows(place / "long.jsonl", problems[:2] + too_long + problems[2:])
    write_rows(place / "only_long.jsonl", too_long)
    no_answer = {"prompt": "1+2", "completions": ["1", "2"], "labels": [1, 0]}
    write_rows(place / "no_answers.jsonl", [no_answer])
    write_rows(place / "empty.jsonl", [])
    return place


def options(place, out, **more):
    return {
        "model": str(place / "policy"),
        "prm": (str(place / "tokens"),),
        "data": (str(place / "problems.jsonl"),),
        "out": str(out),
        "n": 4,
        "beam": 2,
        "expand": (2,),
        "max_new_tokens": 24,
    } | more


def run(place, tmp_path, out="run", **more):
    rows = search.main(search.Config(**options(place, tmp_path / out, **more)), Processes())
    summary = json.loads((tmp_path / out / "summary.json").read_text())
    assert summary["rows"] == rows
    return summary


def assert_same_table(one, other):
    """But for the clock."""
    for row, wanted in zip(one["rows"], other["rows"], strict=True):
        assert row == pytest.approx(wanted | {"seconds": row["seconds"]}, abs=1e-9)


NAMES = ("tokens", "sequences")


def test_a_table_with_several_reward_models(place, tmp_path, capsys):
    """On screen and in summary.json, with one search to look at."""
    more = {"n": 8, "max_new_tokens": 40, "temperature": 1.5, "show": True}
    summary = run(place, tmp_path, prm=tuple(str(place / name) for name in NAMES), **more)
    screen = capsys.readouterr().out
    assert summary["problems"] == 9 and summary["left_out"] == 0
    methods = [f"{how}, {name}" for how in ("best-of-n", "weighted") for name in NAMES]
    wanted = {(m, n) for n in (2, 4, 8) for m in ("oracle", "majority", *methods)}
    wanted |= {("pass@1", 1), ("greedy decoding", 1)}
    trees = ("greedy search 2", "beam search 2 x 2", "dvts 2 x 2")
    wanted |= {(f"{tree}, {name}", 1) for tree in trees for name in NAMES}
    rows = {(row["method"], row["n"]): row for row in summary["rows"]}
    assert set(rows) == wanted and len(rows) == len(summary["rows"])
    for (method, n), row in rows.items():
        line = rf"^{re.escape(method)} +{n} +{row['accuracy']:.3f} ± {row['stderr']:.3f}"
        assert re.search(line, screen, re.M), method
        assert (row["scored"] > 0) == ("," in method)
        assert row["generated"] > 0 and row["seconds"] > 0
    accuracy = rows["pass@1", 1]["accuracy"]
    assert 0 < accuracy < 1
    samples = list(read_trajectories(str(tmp_path / "run" / "samples.jsonl")))
    assert len(samples) == 9 * 8 - summary["empty_responses"]
    assert sum(s["correct"] for s in samples) / 72 == pytest.approx(accuracy)
    for s in samples:
        assert s["correct"] == verify("\n\n".join(s["completions"]), s["answer"])
    shown = screen[screen.index("beam search 2 x 2 with tokens") :].splitlines()
    assert shown[0].endswith(samples[0]["prompt"]) and shown[1].startswith("  depth 1: ")
    first = list(itertools.takewhile(lambda line: "depth" not in line, shown[2:]))
    values = [float(re.search(r"\d\.\d\d", line)[0]) for line in first]
    assert values == sorted(values, reverse=True)
    assert len(first) in (3, 4), "more candidates than are kept"
    assert ["keep" in line for line in first] == [True] * 2 + [False] * (len(first) - 2)


def test_the_values_in_samples_are_those_of_plain_scoring(place, tmp_path):
    run(place, tmp_path, prm=tuple(str(place / name) for name in NAMES))
    with open(tmp_path / "run" / "samples.jsonl") as f:
        rows = [json.loads(line) for line in f]
    assert all(set(row["values"]) == set(NAMES) for row in rows)
    for name in NAMES:
        prm = load_reward_model(str(place / name), torch.float32)
        for row in rows[::5]:
            ids, _, ends = data.encode_trajectory(TOKENIZER, row["prompt"], row["completions"])
            wanted = full_logits(prm.model, ids)[ends, 0].sigmoid().tolist()
            assert row["values"][name] == pytest.approx(wanted, abs=1e-4)


TABLES = [
    ({"prm": ("none",)}, 6),
    ({"data": ("builtin",), "problems": 3, "beam": 1, "temperature": 0.0}, 11),
    ({"n": 1, "prm": ("none",)}, 2),
    ({"n": 6, "expand": (1, 3), "aggregate": "prod"}, 16),
]


@pytest.mark.parametrize("more, methods", TABLES)
def test_other_tables(place, tmp_path, more, methods):
    assert len(run(place, tmp_path, **more)["rows"]) == methods


def test_resume_after_a_cut_and_another_way_to_cut_batches(place, tmp_path):
    whole = run(place, tmp_path, rows_at_once=8)
    state = tmp_path / "run" / "state" / "rank0.jsonl"
    lines = state.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    state.write_bytes(b"".join(lines[:4]) + lines[4][:-20])
    again = run(place, tmp_path, rows_at_once=12, resume=True)
    assert_same_table(again, whole)
    after = state.read_bytes().splitlines(keepends=True)
    assert after[:4] == lines[:4], "what was done is kept, clock times and all"
    assert len(after) == 9
    run(place, tmp_path)
    assert (tmp_path / "run.old1").is_dir(), "without --resume the run is moved aside"


def search_on(procs, chosen):
    search.main(search.Config(**chosen), procs)


def test_two_ranks_give_the_table_of_one(place, tmp_path):
    one = run(place, tmp_path, out="one", max_new_tokens=14)
    chosen = options(place, tmp_path / "two", max_new_tokens=14)
    assert ranks(2, tmp_path, search_on, chosen) == [0, 0]
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert_same_table(two, one)
    counts = [(tmp_path / out / "samples.jsonl").read_text().count("\n") for out in ("one", "two")]
    assert counts[0] == counts[1]
    assert sorted(os.listdir(tmp_path / "two" / "state")) == ["rank0.jsonl", "rank1.jsonl"]


def test_a_problem_that_is_too_long_is_left_out_and_the_others_go_on(place, tmp_path, capsys):
    long = (str(place / "long.jsonl"),)
    summary = run(place, tmp_path, data=long, prm=("none",))
    assert (summary["problems"], summary["left_out"]) == (9, 1)
    assert re.search(r"too long.*long\.jsonl.*3", capsys.readouterr().out)
    short = run(place, tmp_path, out="short", prm=("none",))
    assert summary["rows"][0] == short["rows"][0] | {"seconds": summary["rows"][0]["seconds"]}


def test_a_blank_problem_is_left_out_and_the_others_go_on(place, tmp_path, capsys):
    path = str(tmp_path / "blank.jsonl")
    write_rows(path, [{"question": "1+2", "answer": "3"}, {"question": " \n", "answer": "1"}])
    summary = run(place, tmp_path, data=(path,), prm=("none",))
    assert (summary["problems"], summary["left_out"]) == (1, 1)
    assert re.search(r"left out, blank.*blank\.jsonl.*2", capsys.readouterr().out)


def test_equal_answers_are_one_whatever_their_spelling(place, tmp_path, monkeypatch):
    """Four responses: wrong, right, another wrong, right in another spelling. Only who groups by
    value finds the majority."""
    pairs = [("0.5", "\\frac{1}{2}"), ("\\sqrt{8}", "2\\sqrt{2}"), ("x+1", "1+x")]
    items = ["1", "2", "3", "9", "17", "33", "x", "\\frac{1}{2}"]
    pairs += [(f"{a}, {b}", f"{b}, {a}") for a, b in itertools.combinations(items, 2)]
    path = str(tmp_path / "pairs.jsonl")
    write_rows(path, [{"question": str(i), "answer": a} for i, (a, _) in enumerate(pairs)])

    def spelled(model, tokenizer, prompts, n, *_, keys, **__):
        found = []
        for k in keys:
            answers = ["701", pairs[k][0], "702", pairs[k][1]][:n]
            found.append([Sample([5], [1], [0.0], f"\\boxed{{{a}}}", True) for a in answers])
        return found

    monkeypatch.setattr(search, "sample", spelled)
    rows = run(place, tmp_path, data=(path,), prm=("none",))["rows"]
    accuracy = {(row["method"], row["n"]): row["accuracy"] for row in rows}
    assert accuracy["pass@1", 1] == 0.5 and accuracy["oracle", 4] == 1.0
    assert accuracy["majority", 4] == 1.0


# --------------------------------------------------------------------------------------------------
# Step labels by rollouts.


def label(place, tmp_path, rows, **more):
    """-> labelled rows, summary."""
    path, out = str(tmp_path / "in.jsonl"), tmp_path / "run"
    write_rows(path, rows)
    chosen = {"model": str(place / "policy"), "data": (path,), "out": str(out)} | more
    search.main(search.Config(**chosen), Processes())
    labelled = list(read_trajectories(str(out / "labelled.jsonl")))
    return labelled, json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_labels_are_shares_of_right_rollouts(place, tmp_path, monkeypatch, kind):
    """Rollouts of which the text is a function of the prefix alone, so that they can be counted
    again."""
    tokenizer, asked, n = load_tokenizer(str(place / "policy")), [], 4
    rows = two_operations(5, 3)
    rows.append(rows[0] | {"completions": ["5+5=0", "\\boxed{77}"]})
    rows.append({"prompt": "1+1", "completions": ["\\boxed{2}"], "answer": "2"})
    too_long = {"prompt": "1" * 2040, "completions": ["1", "2"], "answer": "2"}
    golds = {tuple(encode_prompt(tokenizer, row["prompt"])): row["answer"] for row in rows}

    def rollouts(prefix):
        (gold,) = {answer for head, answer in golds.items() if tuple(prefix[: len(head)]) == head}
        rng = random.Random(str(prefix))
        answers = [gold if rng.random() < 0.4 else 5000 for _ in range(n)]
        return [f"1+1=2\n\n\\boxed{{{answer}}}" for answer in answers]

    def fake(model, tokenizer, prompts, count, temperature, max_new_tokens, seed, keys, **_):
        assert count == n and len(set(keys)) == len(keys) == len(prompts)
        asked.extend(keys)
        texts = map(rollouts, prompts)
        return [[Sample([], [5, 6, 1], [0.0] * 3, text, True) for text in t] for t in texts]

    monkeypatch.setattr(search, "sample", fake)
    more = {"label_rollouts": n, "label_kind": kind, "max_new_tokens": 10, "rows_at_once": 32}
    labelled, summary = label(place, tmp_path, rows + [too_long], **more)
    assert [row["completions"] for row in labelled] == [row["completions"] for row in rows]
    seen = set()
    for row in labelled:
        ids, _, ends = data.encode_trajectory(tokenizer, row["prompt"], row["completions"])
        right = []
        for end in ends[:-1]:
            right.append(sum(verify(text, row["answer"]) for text in rollouts(ids[: end + 1])))
        labels = [r / n if kind == "soft" else float(r > 0) for r in right]
        assert row["correct"] == verify("\n\n".join(row["completions"]), row["answer"])
        assert row["labels"] == labels + [float(row["correct"])]
        seen.update(right)
    assert len(seen) > 2
    counts = summary["trajectories"], summary["left_out"], summary["tokens"]
    assert counts == (5, 1, 3 * n * len(asked))
    mean = np.mean([x for row in labelled for x in row["labels"]])
    assert summary["mean_label"] == pytest.approx(mean)


def test_labels_by_the_policy_itself(place, tmp_path):
    """A first step that is right leads on to the answer more often than one that is wrong."""
    rows, wrong = two_operations(0, 12), []
    for row in rows:
        first, *others = row["completions"]
        first = first[:-1] + str((int(first[-1]) + 5) % 10)
        wrong.append(row | {"completions": [first, *others]})
    labelled, _ = label(place, tmp_path, rows + wrong, label_rollouts=6, max_new_tokens=24)
    first = [row["labels"][0] for row in labelled]
    assert len(first) == 24 and np.mean(first[:12]) > np.mean(first[12:]) + 0.1


# --------------------------------------------------------------------------------------------------
# Mistakes.

LABEL = "--label_rollouts 2 --data "
MISTAKES = [
    ("--n 0", "--n 0"),
    ("--beam 0", "--beam 0"),
    ("--expand 2 0", "--expand 0"),
    ("--aggregate x", "x"),
    ("--problems 0", "--problems 0"),
    ("--temperature -1", "--temperature -1"),
    ("--temperature nan", "--temperature nan"),
    ("--nn 3", "--nn"),
    ("--prm PLACE/nothing", "nothing"),
    ("--prm PLACE/two_labels", "2 labels"),
    ("--prm PLACE/tokens PLACE/nothing", "nothing"),
    ("--model PLACE/nothing", "nothing"),
    ("--data PLACE/nothing.jsonl", "nothing.jsonl"),
    ("--data PLACE/empty.jsonl", "empty.jsonl"),
    ("--data PLACE/solutions.jsonl.gz", "solutions"),
    ("--data PLACE/only_long.jsonl --prm none", "room"),
    (LABEL + "builtin", "--label_rollouts"),
    (LABEL + "PLACE/no_answers.jsonl", "no_answers.jsonl"),
    (LABEL + "PLACE/empty.jsonl", "empty.jsonl"),
    (LABEL + "PLACE/problems.jsonl", "problems.jsonl"),
    ("--label_rollouts 0", "--label_rollouts 0"),
]


@pytest.mark.parametrize("line, named", MISTAKES)
def test_mistakes_are_one_line(place, tmp_path, monkeypatch, capfd, line, named):
    monkeypatch.chdir(tmp_path)
    argv = line.replace("PLACE", str(place)).split()
    for name, file in (("model", "policy"), ("data", "problems.jsonl"), ("prm", "tokens")):
        if f"--{name}" not in argv:
            argv += [f"--{name}", str(place / file)]
    monkeypatch.setattr(sys, "argv", ["search_minimal.py", "--out", "run", *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(os.path.join(ROOT, "search_minimal.py"), run_name="__main__")
    lines = capfd.readouterr().err.splitlines()
    errors = [text for text in lines if text.startswith("search_minimal.py: error: ")]
    assert ended.value.code == 1 and len(errors) == 1 and named in errors[0]
    assert not (tmp_path / "run" / "summary.json").exists()
