"""The reward model: targets and measures against loops written from their definitions, one forward
against many, model folders of every kind, gradients that depend on nothing but the batch, runs."""

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification

import data
import tdrm_minimal as tdrm
from conftest import ROOT
from helpers import metrics, write_rows
from parts.formats import BadInput, read_trajectories
from parts.models import load_tokenizer, save_model
from parts.rewards import load_reward_model, new_reward_model
from parts.runs import Processes
from parts.training import accumulate_gradients

LENGTHS = [1, 2, 3, 4, 7, 8, 1, 5]


def ragged(lengths, seed=0, soft=False):
    """-> values, rewards, outcomes, mask, labels for trajectories of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    S = max(lengths)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    labels = uniform(B, S) if soft else (uniform(B, S) < 0.6).float()
    values = uniform(B, S)
    rewards = (uniform(B, S) - 0.6) * mask
    outcomes = (uniform(B) < 0.5).float()
    return values, rewards, outcomes, mask, labels * mask


# --------------------------------------------------------------------------------------------------
# Rewards.


def cos_fn(t, T, a, b):
    return b + (a - b) / 2 * (1 + math.cos(math.pi * t / T))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "correct, wrong",
    [((0.5, 0.2), (-0.5, -1.0)), ((1.0, 1.0), (0.0, 0.0)), ((0.2, 0.9), (-1.0, -0.1))],
)
def test_shaped_rewards_against_the_scalar_formula(correct, wrong, soft):
    *_, mask, labels = ragged(LENGTHS, soft=soft)
    noise = labels + 9 * ~mask  # what stands outside the mask does not matter
    for as_mask in (mask, mask.float()):
        got = tdrm.shaped_rewards(noise, as_mask, correct, wrong)
        for b, T in enumerate(LENGTHS):
            expected = [0.0] * mask.shape[1]
            for t in range(1, T + 1):
                label = labels[b, t - 1].item()
                right = cos_fn(t, T, *correct)
                not_right = cos_fn(t, T, *wrong)
                expected[t - 1] = label * right + (1 - label) * not_right
            assert got[b].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("label, a, b", [(1.0, 0.5, 0.2), (0.0, -0.5, -1.0)])
def test_shaped_rewards_from_one_end_to_the_other(label, a, b):
    for T in (1, 2, 1000):
        rewards = tdrm.shaped_rewards(torch.full((1, T), label), torch.ones(1, T))[0]
        assert rewards[-1].item() == pytest.approx(b)
        assert (rewards.diff() <= 0).all()
    assert rewards[0].item() == pytest.approx(a, abs=1e-5)
    assert rewards[499].item() == pytest.approx((a + b) / 2)


# --------------------------------------------------------------------------------------------------
# Targets. Steps are counted from 1 to T here, as in the formulas.


def n_step_target(V, r, c, t, gamma, n):
    """n rewards from step t on, then the value of the step after (also of step T: that state has a
    value of its own); a window that would run past T ends there, in the outcome."""
    T = len(V)
    if t == T:
        return c
    if t + n <= T:
        rewards = sum(gamma**k * r[t + k - 1] for k in range(n))
        return rewards + gamma**n * V[t + n - 1]
    rewards = sum(gamma**k * r[t + k - 1] for k in range(T - t))
    return rewards + gamma ** (T - t) * c


def lambda_target(V, r, c, t, gamma, lam):
    """The forward view: n-step targets of all n, weighted (1 - lam) lam^(n-1), and what is left of
    the weight on the outcome."""
    left = len(V) - t
    target = lam**left * n_step_target(V, r, c, t, gamma, left + 1)
    for n in range(1, left + 1):
        target += (1 - lam) * lam ** (n - 1) * n_step_target(V, r, c, t, gamma, n)
    return target


def against_loop(definition, gamma, n_or_lam, **options):
    for seed in range(5):
        values, rewards, outcomes, mask, _ = ragged(LENGTHS, seed)
        got = tdrm.td_targets(values, rewards, outcomes, mask, gamma, **options)
        for b, T in enumerate(LENGTHS):
            V = values[b, :T].tolist()
            r = rewards[b, :T].tolist()
            c = outcomes[b].item()
            targets = [definition(V, r, c, t, gamma, n_or_lam) for t in range(1, T + 1)]
            expected = [min(1, max(0, y)) for y in targets] + [0] * (mask.shape[1] - T)
            assert got[b].tolist() == pytest.approx(expected, abs=1e-6)
            assert got[b, T - 1] == c


@pytest.mark.parametrize("gamma", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("n_step", range(1, 7))
def test_n_step_targets_against_the_definition(n_step, gamma):
    against_loop(n_step_target, gamma, n_step, n_step=n_step)


@pytest.mark.parametrize("gamma", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_lambda_targets_against_the_definition(lam, gamma):
    against_loop(lambda_target, gamma, lam, lam=lam)


@pytest.mark.parametrize("lam, n_step", [(0, 1), (1, max(LENGTHS))])
def test_the_ends_of_lambda_are_n_step_targets(lam, n_step):
    values, rewards, outcomes, mask, _ = ragged(LENGTHS)
    got = tdrm.td_targets(values, rewards, outcomes, mask, lam=lam)
    same = tdrm.td_targets(values, rewards, outcomes, mask, n_step=n_step)
    torch.testing.assert_close(got, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "n_step, expected", [(1, [0.8, 0.3, 1]), (2, [0.3, 1, 1]), (3, [1, 1, 1]), (99, [1, 1, 1])]
)
def test_a_window_that_ends_at_the_last_step_takes_its_value(n_step, expected):
    values = torch.tensor([[0.9, 0.8, 0.3]])
    ones = torch.ones(1, 3)
    got = tdrm.td_targets(values, 0 * ones, torch.ones(1), ones, 1.0, n_step)
    assert got[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"n_step": 2}, {"lam": 0.5}])
def test_targets_are_bounded_detached_and_blind_to_padding(options):
    values, rewards, outcomes, mask, _ = ragged(LENGTHS)
    values.requires_grad_()
    got = tdrm.td_targets(values, 9 * rewards, outcomes, mask, **options)
    assert not got.requires_grad
    assert 0 <= got.min()
    assert got.max() <= 1
    assert (got[~mask] == 0).all()
    assert {0.0, 1.0} <= set(got[mask].tolist())  # it was clamped, on both sides

    expected = tdrm.td_targets(values, rewards, outcomes, mask, **options)
    for filler in (1e9, math.inf, math.nan):
        outside = torch.where(mask, 0, filler)
        noisy = values + outside, rewards + outside
        assert torch.equal(tdrm.td_targets(*noisy, outcomes, mask.float(), **options), expected)
    for b, T in enumerate(LENGTHS):  # nor do other rows matter
        one = slice(b, b + 1), slice(0, T)
        row = values[one], rewards[one], outcomes[b : b + 1], mask[one]
        torch.testing.assert_close(tdrm.td_targets(*row, **options), expected[one])


TABULAR = pytest.mark.parametrize(
    "options", [{"n_step": 1}, {"n_step": 3}, {"lam": 0.5}, {"lam": 1.0}], ids=str
)


@TABULAR
def test_tabular_td_converges_to_the_outcomes(options):
    values, _, outcomes, mask, _ = ragged(LENGTHS, 3)
    rewards = torch.zeros_like(values)
    for _ in range(100):
        targets = tdrm.td_targets(values, rewards, outcomes, mask, 1.0, **options)
        values += 0.5 * (targets - values)
    expected = outcomes[:, None].expand_as(values)[mask]
    torch.testing.assert_close(values[mask], expected, rtol=0, atol=1e-4)


@TABULAR
def test_tabular_td_converges_to_the_share_of_right_solutions(options):
    """Two solutions, one right and one wrong, share their first three states."""
    table = torch.zeros(7)
    states = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]])
    outcomes = torch.tensor([1.0, 0.0])
    ones = torch.ones(2, 5)
    for _ in range(100):
        targets = tdrm.td_targets(table[states], 0 * ones, outcomes, ones, 1.0, **options)
        for s in range(7):
            table[s] += 0.5 * (targets[states == s].mean() - table[s])
    assert table.tolist() == pytest.approx([0.5, 0.5, 0.5, 1, 1, 0, 0], abs=1e-3)


# --------------------------------------------------------------------------------------------------
# Measures.

SMOOTHNESS = {"abs_delta_v", "td_error_mean", "td_error_std", "lipschitz"}
AUROC = {"auroc_last", "auroc_second_last", "auroc_middle"}
MEASURES = SMOOTHNESS | AUROC | {"calibration_error", "first_error_f1"}


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1], [1], [3], [2, 1]])
def test_smoothness_against_loops(lengths):
    values, rewards, _, mask, _ = ragged(lengths, 4)
    jumps, errors, steepest = [], [], []
    for b, T in enumerate(lengths):
        V = values[b].tolist()
        r = rewards[b].tolist()
        for t in range(T - 1):
            jumps.append(abs(V[t + 1] - V[t]))
            errors.append(abs(r[t] + 0.7 * V[t + 1] - V[t]))
        pairs = itertools.combinations(range(T), 2)  # over all pairs of states
        if T > 1:
            steepest.append(max(abs(V[s] - V[t]) / (s - t) for t, s in pairs))
    expected = {
        "abs_delta_v": np.mean(jumps or 0),
        "td_error_mean": np.mean(errors or 0),
        "td_error_std": np.std(errors or 0),
        "lipschitz": np.mean(steepest or 0),
    }
    for filler in (0.0, 1e9, math.nan):
        got = tdrm.smoothness(torch.where(mask, values, filler), rewards, mask, 0.7)
        assert all(type(x) is float for x in got.values())
        assert got == pytest.approx(expected, abs=1e-6)


def test_auroc_against_pairs_with_ties():
    rng = np.random.default_rng(0)
    for n, levels in itertools.product((2, 3, 10, 60), (1, 2, 5, 10**9)):
        scores = rng.integers(levels, size=n) / levels
        outcomes = rng.random(n) < 0.4
        pairs = itertools.product(scores[outcomes], scores[~outcomes])
        wins = [(right > wrong) + 0.5 * (right == wrong) for right, wrong in pairs]
        got = tdrm.auroc(scores.tolist(), outcomes.tolist())
        assert got == pytest.approx(np.mean(wins) if wins else math.nan, nan_ok=True)


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(1)
    for n in (1, 7, 500):
        values = np.concatenate([rng.random(n), [0, 1, 0.1, 0.3, 0.999999]]).tolist()
        outcomes = (rng.random(n + 5) < 0.5).tolist()
        expected = 0
        for k in range(10):
            held = [i for i, value in enumerate(values) if min(int(value * 10), 9) == k]
            mean = sum(values[i] for i in held) / max(1, len(held))
            share = sum(outcomes[i] for i in held) / max(1, len(held))
            expected += len(held) / len(values) * abs(mean - share)
        assert tdrm.calibration_error(values, outcomes) == pytest.approx(expected)
    assert tdrm.calibration_error([1.0, 0.0], [True, False]) == 0
    assert tdrm.calibration_error([1.0, 0.0], [False, True]) == 1


def first_error_f1_by_hand(values, truth):
    def hits(half, threshold):
        found = []
        for i in half:
            below = [t for t, value in enumerate(values[i]) if value < threshold]
            found.append(((below or [-1])[0] == truth[i], truth[i] >= 0))
        return found

    def f1(hits):  # [(hit, has an error)...]
        a, b = (np.mean([hit for hit, wrong in hits if wrong is kind]) for kind in (True, False))
        return 2 * a * b / max(a + b, 1e-9)

    halves = [range(0, len(truth), 2), range(1, len(truth), 2)]
    if any({truth[i] >= 0 for i in half} != {True, False} for half in halves):
        return math.nan
    all_hits = []
    for mine, other in (halves, halves[::-1]):
        best = max(np.linspace(0.01, 0.99, 99), key=lambda x: f1(hits(other, x)))
        all_hits += hits(mine, best)
    return f1(all_hits)


def test_first_error_f1_by_brute_force():
    rng, finite = random.Random(0), 0
    for n, informed in itertools.product((1, 2, 3, 4, 8, 15, 40), (0, 0.3, 0.9)):
        truth, values = [], []
        for _ in range(n):
            T = rng.randint(1, 7)
            error = rng.choice([-1, rng.randrange(T)])
            row = []
            for t in range(T):
                right = error == -1 or t < error
                value = informed * right + (1 - informed) * rng.random()
                row.append(round(value, 2))  # some equal a threshold
            truth.append(error)
            values.append(row)
        expected = first_error_f1_by_hand(values, truth)
        assert tdrm.first_error_f1(values, truth) == pytest.approx(expected, nan_ok=True)
        finite += math.isfinite(expected)
    assert finite > 8


def test_first_error_f1_at_its_ends():
    for truth in ([-1] * 6, [0] * 6, [0, -1, 0, -1], [0]):  # only one kind, in all or in a half
        assert math.isnan(tdrm.first_error_f1([[0.5]] * len(truth), truth))
    values = [[0.9, 0.1], [0.9, 0.1], [0.9, 0.9], [0.8, 0.9]]
    assert tdrm.first_error_f1(values, [1, 1, -1, -1]) == 1


VALUES = [[0.9, 0.8, 0.1], [0.3, 0.75], [0.9, 0.7], [0.9, 0.2, 0.8, 0.8]]


def solutions(*facts):
    """Examples of which nothing is known but (labels, correct, first_error)."""
    return [data.Example("", [], [], 0, [], *known) for known in facts]


def test_evaluate():
    labels = [[1, 1, 0], [0, 0], [1, 1], [1, 1, 1, 1]]
    examples = solutions(*zip(labels, [False, False, True, True], [2, 0, -1, -1]))
    got = tdrm.evaluate(tdrm.Config(), VALUES, examples)
    assert got["auroc_last"] == 0.75  # of .1 .75 .7 .8
    assert got["auroc_second_last"] == 0.875  # of .8 .3 .9 .8
    assert got["auroc_middle"] == 0.5  # of .8 .3 .9 .2
    outcomes = [0] * 5 + [1] * 6
    assert got["calibration_error"] == tdrm.calibration_error(sum(VALUES, []), outcomes)
    assert got["first_error_f1"] == first_error_f1_by_hand(VALUES, [2, 0, -1, -1])

    def padded(rows):
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    mask = padded([[1.0] * len(row) for row in VALUES])
    rewards = tdrm.shaped_rewards(padded(labels), mask)
    expected = tdrm.smoothness(padded(VALUES), rewards, mask, 0.8)
    assert expected.keys() == SMOOTHNESS
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_evaluate_where_little_is_known():
    """TD errors without labels are those of r = 0, gamma = 1; what cannot be known is absent."""
    got = tdrm.evaluate(tdrm.Config(), VALUES, solutions(*[(None, None, None)] * 4))
    assert got["td_error_mean"] == pytest.approx(got["abs_delta_v"])
    assert got.keys() == SMOOTHNESS
    got = tdrm.evaluate(tdrm.Config(), VALUES, solutions(*[(None, True, -1)] * 4))
    assert got["auroc_last"] is got["first_error_f1"] is None  # JSON has no NaN
    assert json.loads(json.dumps(got, allow_nan=False)) == got


# --------------------------------------------------------------------------------------------------
# Model folders. All weights are random: what holds for them holds for any.

SIZE = {
    "vocab_size": len(data.builtin_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SIZE),
    "llama": transformers.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZE, head_dim=16),
    "mistral": transformers.MistralConfig(**SIZE, sliding_window=6),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
CLOSE = {"rtol": 0, "atol": 1e-5}


def ragged_rows():
    rows = data.make_trajectories(data.make_problems(6), 1, 4, "soft")
    rows += data.make_trajectories(data.make_problems(1, level="builtin-hard"), 1, 4)
    short = {"prompt": "1+2", "completions": ["\\boxed{3}"], "labels": [1.0], "correct": True}
    return rows + [short]


def encoded(rows):
    tokenizer = data.builtin_tokenizer()

    def encode(prompt, steps):
        return data.encode_trajectory(tokenizer, prompt, steps)

    return data.encode_rows(rows, encode, 999)[0]


EXAMPLES = encoded(ragged_rows())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a policy of each family and files of trajectories."""
    home = tmp_path_factory.mktemp("tdrm")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name)
        data.builtin_tokenizer().save_pretrained(home / name)
    rows = data.make_trajectories(data.make_problems(60), 2, label_rollouts=4, label_kind="soft")
    for name, rows in (("rows", rows), ("ragged", ragged_rows())):
        write_rows(home / f"{name}.jsonl", rows)
        write_rows(home / f"{name}_outcomes.jsonl", [row | {"labels": None} for row in rows])
    bench = []
    for row in data.make_trajectories(data.make_problems(30, "test"), 2):
        facts = {"label": row["first_error"], "final_answer_correct": row["correct"]}
        bench.append({"problem": row["prompt"], "steps": row["completions"]} | facts)
    write_rows(home / "bench.jsonl", bench)
    return home


def new(folder, seed=0):
    """A reward model to train, in eval mode."""
    tokenizer = load_tokenizer(str(folder))
    return new_reward_model(str(folder), tokenizer, torch.float32, seed).eval()


def finished(folder):
    return load_reward_model(str(folder), torch.float32)


def prefix_logits(model, example):
    """The slow way: a forward of its own for every state, nothing after it."""
    logits = []
    for end in example.step_ends:
        ids = torch.tensor([example.input_ids[: end + 1]])
        logits.append(model(input_ids=ids).logits.reshape(-1)[-1])
    return logits


@torch.no_grad()
def slow(model, examples=EXAMPLES):
    return torch.stack([logit for e in examples for logit in prefix_logits(model, e)])


@torch.no_grad()
def fast(model, examples=EXAMPLES):
    """All logits of step_values, in order."""
    b = data.collate(examples, 0)
    logits = tdrm.step_values(model, b["input_ids"], b["attention_mask"], b["step_ends"])
    return logits[b["step_mask"]]


@torch.no_grad()
@FAMILIES
def test_one_forward_is_as_good_as_one_for_each_prefix(family, home):
    model = new(home / family)
    logits = fast(model)
    assert logits.dtype == torch.float32
    assert logits.shape == (sum(len(e.step_ends) for e in EXAMPLES),)
    assert logits.std() > 0.05
    torch.testing.assert_close(logits, slow(model), **CLOSE)
    # What follows a state does not reach back to it.
    longer = [dataclasses.replace(e, input_ids=e.input_ids + [9, 8, 7]) for e in EXAMPLES]
    torch.testing.assert_close(fast(model, longer), logits, **CLOSE)


@torch.no_grad()
@FAMILIES
@pytest.mark.parametrize("padding, filler", [(0, 0), (5, 0), (17, 7)])
def test_padding_on_the_right_does_not_matter(padding, filler, family, home):
    model = new(home / family)
    b = data.collate(EXAMPLES, 0)
    logits = fast(model)
    mask = F.pad(b["attention_mask"], (0, padding))
    ids = F.pad(b["input_ids"], (0, padding)).masked_fill(mask == 0, filler)
    for attention_mask in (None, mask, mask.bool()):
        got = tdrm.step_values(model, ids, attention_mask, b["step_ends"])
        assert got.shape == b["step_ends"].shape
        torch.testing.assert_close(got[b["step_mask"]], logits, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_on_the_left_is_refused(dtype, home):
    b = data.collate(EXAMPLES, 0)
    ids = b["input_ids"].flip(1)
    mask = b["attention_mask"].flip(1).to(dtype)
    with pytest.raises(ValueError, match="right"):
        tdrm.step_values(new(home / "qwen2"), ids, mask, b["step_ends"])


@FAMILIES
def test_training_mode_is_evaluation_mode(family, home):
    """The library's heads have a dropout of 0.1 where the config is silent: it would make noise of
    the targets."""
    assert "classifier_dropout" not in json.loads((home / family / "config.json").read_text())
    model = new(home / family)
    assert torch.equal(fast(model.train()), fast(model.eval()))


@FAMILIES
def test_a_policy_gets_a_new_head_on_the_same_backbone(family, home):
    policy = AutoModelForCausalLM.from_pretrained(home / family).model.state_dict()
    model = new(home / family, seed=3).model
    backbone = model.model.state_dict()
    head = model.score.weight
    assert policy.keys() == backbone.keys()
    assert all(torch.equal(weight, backbone[name]) for name, weight in policy.items())
    assert head.shape == (1, 32)
    assert model.score.bias is None
    assert head.abs().sum() > 0
    assert torch.equal(head, new(home / family, seed=3).model.score.weight)
    assert not torch.equal(head, new(home / family, seed=4).model.score.weight)
    half = new_reward_model(str(home / family), None, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with pytest.raises(BadInput, match="weights are not in its files"):
        finished(home / family)


@torch.no_grad()
@FAMILIES
def test_a_reward_model_is_a_sequence_classifier_too(family, home, tmp_path):
    """Saved and loaded it is itself, as ours to use, as ours to train on, and as the library's."""
    folder = tmp_path / "model"
    reward = new(home / family, seed=3)
    reward.save(str(folder))
    assert torch.equal(fast(finished(folder)), fast(reward))
    assert torch.equal(fast(new(folder, seed=9)), fast(reward))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(classifier.score.weight, reward.model.score.weight)
    torch.testing.assert_close(slow(classifier), fast(reward), **CLOSE)
    b = data.collate(EXAMPLES, 0)
    last = classifier(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[:, 0]
    expected = torch.stack([slow(reward, [e])[-1] for e in EXAMPLES])
    torch.testing.assert_close(last, expected, **CLOSE)


def save_classifier(kind, folder, home, family="qwen2", labels=1):
    """A classifier as the library makes it, with a tokenizer."""
    torch.manual_seed(5)
    model = kind.from_pretrained(home / family, num_labels=labels).eval()
    torch.nn.init.normal_(model.score.weight)
    if model.score.bias is not None:
        torch.nn.init.constant_(model.score.bias, 0.7)
    save_model(str(folder), model, data.builtin_tokenizer())
    return model


@FAMILIES
def test_a_published_sequence_classifier(family, home, tmp_path):
    folder = tmp_path / "model"
    classifier = save_classifier(AutoModelForSequenceClassification, folder, home, family)
    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    assert kind.endswith("ForSequenceClassification")
    for reward in (new(folder), finished(folder)):
        assert torch.equal(reward.model.score.weight, classifier.score.weight)
        assert reward.model.score.bias is None
        torch.testing.assert_close(fast(reward), slow(classifier), **CLOSE)


def test_a_token_classifier_with_a_bias_keeps_it(home, tmp_path):
    """The library's own token classifiers have one; so has what was fine-tuned from them, here and
    elsewhere."""
    folder = tmp_path / "published"
    classifier = save_classifier(AutoModelForTokenClassification, folder, home)
    assert classifier.score.bias.item() == pytest.approx(0.7)
    reward = new(folder)
    torch.testing.assert_close(fast(reward), slow(classifier), **CLOSE)
    reward.save(str(tmp_path / "ours"))
    assert torch.equal(fast(finished(tmp_path / "ours")), fast(reward))


@pytest.mark.parametrize(
    "kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_of_several_numbers_is_refused(kind, labels, home, tmp_path):
    folder = tmp_path / "model"
    save_classifier(kind, folder, home, labels=labels)
    for load in (new, finished):
        with pytest.raises(BadInput) as error:
            load(folder)
        message = str(error.value)
        assert "\n" not in message
        assert f"--model {folder}" in message
        assert f"{labels} labels" in message
        assert "one label" in message


@pytest.mark.parametrize("rows_at_once", [1, 3, 64])
def test_score_steps_keeps_the_order(rows_at_once, home):
    reward = new(home / "qwen2").train()
    training = []
    reward.model.register_forward_pre_hook(lambda module, _: training.append(module.training))
    for examples in (EXAMPLES, EXAMPLES[::-1], EXAMPLES[2:3], []):
        training.clear()
        got = reward.score_steps(examples, Processes(), rows_at_once)
        assert not any(training)
        assert reward.model.training  # it may have dropout of its own
        assert [len(values) for values in got] == [len(e.step_ends) for e in examples]
        for values, e in zip(got, examples):
            assert values == pytest.approx(slow(reward, [e]).sigmoid().tolist(), abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Loss and gradients. The loss is that of main(), caught where it is handed on.

METHODS = {
    "td 1": {"n_step": 1},
    "td 3": {"n_step": 3, "gamma": 0.9, "correct": (0.3, 0.1)},
    "td lambda": {"lam": 0.5},
    "td, outcomes only": {"data": "ragged_outcomes.jsonl", "n_step": 2},
    "td, default n": {"data": "ragged_outcomes.jsonl"},
    "ScalarPRM": {"method": "ScalarPRM"},
    "ScalarORM": {"method": "ScalarORM"},
}


class Caught(Exception):
    pass


@pytest.fixture(scope="module")
def first_batch(home, tmp_path_factory):
    """first_batch(name) -> cfg, learner, the first global batch and the loss function of a run with
    METHODS[name]."""
    done = {}
    folder = tmp_path_factory.mktemp("runs")

    def catch(name):
        if name in done:
            return done[name]
        options = {
            "model": str(home / "qwen2"),
            "out": str(folder / name),
            "batch_size": 8,
            "max_length": 128,
            "seed": 1,
            "eval": (str(home / "rows.jsonl"),),
        }
        options |= METHODS[name]
        options["data"] = (str(home / options.get("data", "ragged.jsonl")),)
        cfg = tdrm.Config(**options)

        def caught(learner, batch, micro_batch_size, loss_fn, procs):
            done[name] = cfg, learner, batch, loss_fn
            raise Caught

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tdrm, "accumulate_gradients", caught)
            with pytest.raises(Caught):
                tdrm.main(cfg, Processes())
        return done[name]

    return catch


def flat_gradient(learner):
    return torch.cat([p.grad.flatten() for p in learner.module.parameters()])


def gradients(learner, batch, micro_batch_size, loss_fn):
    learner.module.zero_grad()
    loss = accumulate_gradients(learner, batch, micro_batch_size, loss_fn, Processes())
    return loss, flat_gradient(learner)


def more_padding(collate):
    """Columns that hold nothing, whatever stands in them."""
    more = {"input_ids": (11, 7), "step_ends": (3, 0), "step_mask": (3, False), "labels": (3, 0)}

    def padded(*args):
        b = collate(*args)
        for key, (columns, value) in more.items():
            b[key] = F.pad(b[key], (0, columns), value=value)
        return b

    return padded


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_gradients_depend_on_the_batch_alone(name, first_batch, monkeypatch):
    _, learner, batch, loss_fn = first_batch(name)
    loss, expected = gradients(learner, batch, None, loss_fn)
    assert len(batch) == 8
    assert len({len(e.step_ends) for e in batch}) >= 4
    assert expected.abs().max() > 1e-3

    def same(micro_batch_size, order=batch):
        got_loss, got = gradients(learner, order, micro_batch_size, loss_fn)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    shuffled = random.Random(0).sample(batch, 8)
    same(1)
    same(2, shuffled)
    same(8, shuffled)
    learner.module.model.gradient_checkpointing_enable({"use_reentrant": False})
    same(4)
    learner.module.model.gradient_checkpointing_disable()
    monkeypatch.setattr(data, "collate", more_padding(data.collate))
    same(None)
    same(3, shuffled)
    same(4)


def target_by_hand(cfg, V, r, e, t, gamma):
    """y_t, or None for a state that is not learned from."""
    T, c = len(V), float(e.correct)
    if cfg.method == "ScalarPRM":
        return e.labels[t - 1]
    if cfg.method == "ScalarORM":
        return c if t == T else None
    if cfg.lam is not None:
        y = lambda_target(V, r, c, t, gamma, cfg.lam)
    else:
        y = n_step_target(V, r, c, t, gamma, cfg.n_step or T)
    return min(1, max(0, y))


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_those_of_the_slow_way(name, first_batch):
    """Two forwards for every transition, each over a whole prefix, and the targets by the
    definitions above."""
    cfg, learner, batch, loss_fn = first_batch(name)
    losses = []
    for e in batch:
        T = len(e.step_ends)
        V = slow(learner.module, [e]).sigmoid().tolist()
        r = [0.0] * T
        gamma = 1.0
        if e.labels is not None:
            labels = torch.tensor([e.labels])
            ones = torch.ones(1, T)
            r = tdrm.shaped_rewards(labels, ones, cfg.correct, cfg.wrong)[0].tolist()
            gamma = cfg.gamma
        for t, logit in enumerate(prefix_logits(learner.module, e), 1):
            y = target_by_hand(cfg, V, r, e, t, gamma)
            if y is not None:
                losses.append(-(y * F.logsigmoid(logit) + (1 - y) * F.logsigmoid(-logit)))
    slow_loss = sum(losses) / len(losses)
    learner.module.zero_grad()
    slow_loss.backward()
    expected = flat_gradient(learner)
    loss, got = gradients(learner, batch, 4, loss_fn)
    assert loss == pytest.approx(slow_loss.item(), rel=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def targets_of(labelled=True, **options):
    """-> targets, weights of a method, and what the targets are made of."""
    values, _, outcomes, mask, labels = ragged(LENGTHS, 6, soft=True)
    batch = {"step_mask": mask, "labels": labels, "outcomes": outcomes}
    logits = values.logit().requires_grad_()
    cfg = tdrm.Config(gamma=0.6, correct=(0.4, 0.3), wrong=(-0.1, -0.2), **options)
    targets, weights = tdrm.targets_and_weights(cfg, logits, batch, labelled)
    assert not targets.requires_grad
    assert targets.shape == weights.shape == mask.shape
    assert (weights[~mask] == 0).all()
    rewards = tdrm.shaped_rewards(labels, mask, cfg.correct, cfg.wrong)
    return targets, weights, values, rewards, outcomes, mask, labels


def test_targets_and_weights_of_the_baselines():
    targets, weights, *_, mask, labels = targets_of(method="ScalarPRM")
    assert torch.equal(targets, labels)
    assert torch.equal(weights, mask.float())
    targets, weights, *_, outcomes, mask, _ = targets_of(method="ScalarORM")
    last = F.one_hot(torch.tensor(LENGTHS) - 1)
    assert torch.equal(targets[last.bool()], outcomes)
    assert torch.equal(weights, last.float())


@pytest.mark.parametrize(
    "options, same",
    [
        ({"n_step": 2}, {"n_step": 2}),
        ({"lam": 0.3}, {"lam": 0.3}),
        ({"lam": 0.0, "n_step": 4}, {"lam": 0.0}),
        ({}, {"n_step": 3}),
    ],
)
def test_targets_and_weights_of_td(options, same):
    targets, weights, values, rewards, outcomes, mask, _ = targets_of(**options)
    expected = tdrm.td_targets(values, rewards, outcomes, mask, 0.6, **same)
    torch.testing.assert_close(targets, expected)
    assert torch.equal(weights, mask.float())
    targets, *_ = targets_of(False, **options)  # no labels: r = 0 and gamma = 1
    more = same if options else {"n_step": max(LENGTHS)}  # and n is the whole response
    expected = tdrm.td_targets(values, 0 * values, outcomes, mask, 1.0, **more)
    torch.testing.assert_close(targets, expected)


def test_targets_without_labels_are_the_outcomes():
    targets, *_, outcomes, mask, _ = targets_of(False)
    assert torch.equal(targets[mask], outcomes[:, None].expand_as(mask)[mask])


# --------------------------------------------------------------------------------------------------
# Whole runs.


def config(home, out, **more):
    options = {
        "model": str(home / "qwen2"),
        "out": str(out),
        "steps": 8,
        "batch_size": 16,
        "max_length": 128,
        "eval_every": 4,
        "lr": 1e-2,
    }
    return tdrm.Config(**options | more)


def read(*path):
    with open(os.path.join(*path)) as f:
        return json.load(f)


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """Folders of a short run of each method on the built-in task, with fewer held-out problems than
    by default."""
    make = data.make_problems
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "make_problems", lambda n, *rest: make(min(n, 60), *rest))
        for method in tdrm.METHODS:
            cfg = config(home, folder / method, method=method, problems=60)
            tdrm.main(cfg, Processes())
    return folder


def test_labels_of_the_level_with_a_choice():
    """`--label_kind correct`: right until the first wrong step, for training and evaluation."""
    cfg = tdrm.Config(data=("builtin-choice",), label_kind="correct", problems=50)
    loaded = tdrm.load_data(cfg, "builtin-choice", data.builtin_tokenizer(), Processes())
    examples, held_out, labelled, _ = loaded
    assert labelled and len(examples) == 200 and len(held_out) == 2000
    for e in [*examples, *held_out]:
        right = e.first_error if e.first_error >= 0 else len(e.step_ends)
        assert list(e.labels) == [1.0] * right + [0.0] * (len(e.step_ends) - right)


@pytest.mark.parametrize("method", tdrm.METHODS)
def test_a_run_leaves_what_was_agreed(method, runs, home):
    out = runs / method
    names = ["config.json", "metrics.jsonl", "model", "state", "summary.json"]
    assert sorted(os.listdir(out)) == names
    assert os.listdir(out / "state") == ["step_00000008"]
    cfg = read(out, "config.json")
    rows = metrics(out)
    summary = read(out, "summary.json")
    assert cfg["method"] == method
    assert cfg["steps"] == 8
    assert cfg["correct"] == [0.5, 0.2]
    assert cfg["data"] == ["builtin"]

    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    for row in rows:
        assert all(math.isfinite(row[key]) for key in ("loss", "lr", "grad_norm"))
        assert row["skipped"] == 0
        assert (MEASURES <= row.keys()) is (row["step"] == 4)  # the last evaluation is the summary
    assert MEASURES <= summary.keys()
    assert summary["trajectories"] == 120
    assert summary["steps"] == 8
    assert summary["skipped"] == 0
    shares = MEASURES - {"td_error_mean", "td_error_std"}
    assert all(0 <= summary[name] <= 1 for name in shares)

    about = read(out, "model", "config.json")
    assert about["architectures"] == ["Qwen2ForTokenClassification"]
    assert about["classifier_dropout"] == 0
    moved = fast(new(home / "qwen2")) - fast(finished(out / "model"))
    assert moved.abs().max() > 0.01  # it learned something, and has kept it
    tokenizer = load_tokenizer(str(out / "model"))
    text = "7+8*3-5\n\n"
    assert tokenizer(text)["input_ids"] == data.builtin_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("method, least", [("TDRM", 0.8), ("ScalarPRM", 0.8), ("ScalarORM", 0.2)])
def test_training_lowers_the_loss(method, least, home, tmp_path):
    """Eight rows learned by heart."""
    rows = list(read_trajectories(home / "rows.jsonl"))[:8]
    few = tmp_path / "few.jsonl"
    write_rows(few, rows)
    options = {"steps": 40, "batch_size": 8, "eval_every": 0, "n_step": 3}
    options |= {"data": (str(few),), "eval": (str(few),)}
    summary = tdrm.main(config(home, tmp_path / "run", method=method, **options), Processes())
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert np.mean(losses[-5:]) < least * np.mean(losses[:5])
    assert {row["correct"] for row in rows} == {True, False}
    assert summary["auroc_last"] == 1.0


CHAT = [{"role": "user", "content": "5-4+2*2"}]
SCORED = [
    {"prompt": "1+2", "completions": ["1+2=3", "\\boxed{3}"], "labels": [1, 1]},
    {"prompt": "3*3-4", "completions": ["3*3=9"], "correct": False},
    {"prompt": CHAT, "completions": ["5-4=1", "1+2=3", "3*2=6", "\\boxed{6}"], "answer": "6"},
    {"prompt": "1+2", "completions": ["1+2=3"] * 40, "correct": True},
    {"prompt": "9", "completions": ["\\boxed{9}"], "labels": [0.5]},
]


def check_scores(text, folder, path, too_long=()):
    lines = [json.loads(line) for line in text.splitlines()]
    reward = finished(folder)
    assert [line["source"] for line in lines] == [f"{path}:{i}" for i in range(1, 6)]
    assert [line["correct"] for line in lines] == [True, False, True, True, True]
    for i, (line, row) in enumerate(zip(lines, SCORED)):
        if i in too_long:
            assert line["values"] is None
            continue
        (example,) = encoded([{"prompt": row["prompt"], "completions": row["completions"]}])
        by_hand = slow(reward, [example]).sigmoid().tolist()
        assert len(line["values"]) == len(row["completions"])
        assert line["values"] == pytest.approx(by_hand, abs=1e-5)
        assert all(0 <= value <= 1 for value in line["values"])


def test_score_prints_a_line_a_row(runs, tmp_path):
    """As a process: standard output is JSON Lines and nothing else."""
    write_rows(tmp_path / "scored.jsonl", SCORED)
    words = [sys.executable, os.path.join(ROOT, "tdrm_minimal.py"), "--score", "scored.jsonl"]
    words += ["--model", str(runs / "TDRM" / "model")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    options = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(words, cwd=tmp_path, env=env, **options)
    assert done.returncode == 0
    assert "solutions (" in done.stderr
    check_scores(done.stdout, runs / "TDRM" / "model", "scored.jsonl")
    assert os.listdir(tmp_path) == ["scored.jsonl"]  # it trains nothing and writes nothing


def test_rows_too_long_to_score_have_no_values(runs, tmp_path, capsys):
    path = tmp_path / "scored.jsonl"
    model = runs / "ScalarORM" / "model"
    write_rows(path, SCORED)
    cfg = tdrm.Config(score=str(path), model=str(model), max_length=50)
    tdrm.main(cfg, Processes())
    check_scores(capsys.readouterr().out, model, path, too_long=[3])


def test_evaluation_on_processbench(home, tmp_path, capsys):
    files = {"data": (str(home / "rows.jsonl"),), "eval": (str(home / "bench.jsonl"),)}
    summary = tdrm.main(config(home, tmp_path / "run", **files), Processes())
    assert summary == read(tmp_path / "run", "summary.json")
    assert summary["trajectories"] == 60
    assert 0 <= summary["first_error_f1"] <= 1

    examples = encoded(list(read_trajectories(home / "bench.jsonl")))
    reward = finished(tmp_path / "run" / "model")
    values = [slow(reward, [e]).sigmoid().tolist() for e in examples]
    second_last = [row[-2] for row in values]
    f1 = first_error_f1_by_hand(values, [e.first_error for e in examples])
    auroc = tdrm.auroc(second_last, [e.correct for e in examples])
    assert summary["first_error_f1"] == pytest.approx(f1, abs=0.02)  # rounding may decide
    assert summary["auroc_second_last"] == pytest.approx(auroc, abs=0.02)
    out = capsys.readouterr().out
    for wanted in (
        "first-error F1 (ProcessBench)",
        "<- first wrong step",
        "right: ",
        "goes wrong ",
    ):
        assert wanted in out


@pytest.mark.parametrize(
    "file, said",
    [
        ("rows.jsonl", "step labels: yes"),
        ("rows_outcomes.jsonl", "step labels: no (r = 0, gamma = 1)"),
    ],
)
def test_questions_are_held_out_of_the_data(file, said, home, tmp_path, capsys):
    """3 of 60 questions, 2 solutions each; one pass over the others."""
    cfg = config(home, tmp_path / "run", steps=None, data=(str(home / file),))
    summary = tdrm.main(cfg, Processes())
    assert summary["trajectories"] == 6
    assert summary["steps"] == 114 // 16
    assert said in capsys.readouterr().out
    if file == "rows_outcomes.jsonl":
        assert summary["td_error_mean"] == pytest.approx(summary["abs_delta_v"], abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Real text: GSM8K's questions with solutions of four models, right and wrong.


def gsm8k_solutions(path):
    rows = []
    with open(path) as f:
        lines = [json.loads(line) for line in f]
    for line in lines:
        if len(line["question"]) >= 150:
            continue
        for solution in line.values():
            text = solution["solution"] if isinstance(solution, dict) else ""
            if text.strip() and "\n\n" not in text:
                facts = {"completions": text.split("\n"), "correct": solution["is_correct"]}
                rows.append({"prompt": line["question"]} | facts)
    return rows


def test_gsm8k_solutions_end_to_end(tmp_path, capsys):
    path = os.path.join(os.environ.get("GSM8K_DIR", ""), "example_model_solutions.jsonl")
    if not os.path.exists(path):
        pytest.skip(f"GSM8K_DIR: no {path} (github.com/openai/grade-school-math)")
    rows = gsm8k_solutions(path)
    tokenizer = data.byte_tokenizer()
    write_rows(tmp_path / "train.jsonl", rows[:200])
    write_rows(tmp_path / "eval.jsonl", rows[200:300])
    size = SIZE | {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    policy = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size))
    save_model(str(tmp_path / "qwen2"), policy, tokenizer)
    options = {"steps": 4, "batch_size": 8, "max_length": 400, "eval_every": 0}
    files = {"data": (str(tmp_path / "train.jsonl"),), "eval": (str(tmp_path / "eval.jsonl"),)}
    summary = tdrm.main(config(tmp_path, tmp_path / "run", **options, **files), Processes())
    assert all(0 <= summary[name] <= 1 for name in AUROC)
    assert summary["skipped"] == 0
    trained_on = int(capsys.readouterr().out.split(" trajectories (")[0].split()[-1])
    assert 0 < trained_on <= 200
    assert 0 < summary["trajectories"] <= 100
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert "first_error_f1" not in summary
