"""The reward model: targets and measures against loops written from their definitions, one forward against many, model folders of every
kind, gradients that depend on nothing but the batch, and whole runs."""
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

import data
import sft_minimal as sft
import tdrm_minimal as tdrm
from conftest import ROOT
from data import BadInput
from plumbing import Env


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to gain from threads, and threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ragged(lengths, seed=0, soft=False):
    """-> values, rewards, outcomes, mask, labels for trajectories of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), max(lengths)
    random_values = lambda: torch.rand(B, S, generator=generator)  # noqa: E731
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    labels = random_values() if soft else (random_values() < 0.6).float()
    return random_values(), (random_values() - 0.6) * mask, (torch.rand(B, generator=generator) < 0.5).float(), mask, labels * mask


LENGTHS = [1, 2, 3, 4, 7, 8, 1, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards.

@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("correct, wrong", [((0.5, 0.2), (-0.5, -1.0)), ((1.0, 1.0), (0.0, 0.0)), ((0.2, 0.9), (-1.0, -0.1))])
def test_shaped_rewards_against_the_scalar_formula(correct, wrong, soft):
    def cos_fn(t, T, a, b):
        return b + (a - b) / 2 * (1 + math.cos(math.pi * t / T))
    *_, mask, labels = ragged(LENGTHS, soft=soft)
    for as_mask in (mask, mask.float()):
        got = tdrm.shaped_rewards(labels + 9 * ~mask, as_mask, correct, wrong)  # what stands outside the mask does not matter
        for b, T in enumerate(LENGTHS):
            for s in range(mask.shape[1]):
                label = labels[b, s].item()
                expected = label * cos_fn(s + 1, T, *correct) + (1 - label) * cos_fn(s + 1, T, *wrong) if s < T else 0
                assert got[b, s].item() == pytest.approx(expected, abs=1e-6)


def test_shaped_rewards_from_one_end_to_the_other():
    for T in (1, 2, 1000):
        for label, (a, b) in ((1, (0.5, 0.2)), (0, (-0.5, -1.0))):
            rewards = tdrm.shaped_rewards(torch.full((1, T), float(label)), torch.ones(1, T))[0]
            assert rewards[-1].item() == pytest.approx(b) and (rewards.diff() <= 0).all()
            if T == 1000:
                assert rewards[0].item() == pytest.approx(a, abs=1e-5) and rewards[499].item() == pytest.approx((a + b) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Targets. Steps are counted from 1 to T here, as in the formulas.

def n_step_target(V, r, c, t, gamma, n):
    """n rewards from step t on, then the value of the step after; a window that would run past T ends there, in the outcome."""
    T = len(V)
    if t == T:
        return c
    if t + n <= T:  # also where it ends exactly at T: that state has a value of its own
        return sum(gamma ** k * r[t + k - 1] for k in range(n)) + gamma ** n * V[t + n - 1]
    return sum(gamma ** k * r[t + k - 1] for k in range(T - t)) + gamma ** (T - t) * c


def lambda_target(V, r, c, t, gamma, lam):
    """The forward view: n-step targets of all n, weighted (1 - lam) lam^(n-1), and what is left of the weight on the outcome."""
    left = len(V) - t
    return sum((1 - lam) * lam ** (n - 1) * n_step_target(V, r, c, t, gamma, n) for n in range(1, left + 1)) + lam ** left * n_step_target(V, r, c, t, gamma, left + 1)


def against_loop(got, target, values, rewards, outcomes):
    for b, T in enumerate(LENGTHS):
        V, r, c = values[b, :T].tolist(), rewards[b, :T].tolist(), outcomes[b].item()
        expected = [min(1, max(0, target(V, r, c, t))) for t in range(1, T + 1)]
        assert got[b].tolist() == pytest.approx(expected + [0] * (got.shape[1] - T), abs=1e-6)
        assert got[b, T - 1] == c


@pytest.mark.parametrize("gamma", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("n_step", range(1, 7))
def test_n_step_targets_against_the_definition(n_step, gamma):
    for seed in range(5):
        values, rewards, outcomes, mask, _ = ragged(LENGTHS, seed)
        got = tdrm.td_targets(values, rewards, outcomes, mask, gamma, n_step)
        against_loop(got, lambda V, r, c, t: n_step_target(V, r, c, t, gamma, n_step), values, rewards, outcomes)


@pytest.mark.parametrize("gamma", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_lambda_targets_against_the_definition(lam, gamma):
    for seed in range(5):
        values, rewards, outcomes, mask, _ = ragged(LENGTHS, seed)
        got = tdrm.td_targets(values, rewards, outcomes, mask, gamma, lam=lam)
        against_loop(got, lambda V, r, c, t: lambda_target(V, r, c, t, gamma, lam), values, rewards, outcomes)
        if lam in (0, 1):
            same = tdrm.td_targets(values, rewards, outcomes, mask, gamma, n_step=1 if lam == 0 else max(LENGTHS))
            torch.testing.assert_close(got, same, rtol=0, atol=1e-6)


def test_a_window_that_ends_at_the_last_step_takes_its_value():
    V, c, T = [0.9, 0.8, 0.3], 1.0, 3
    for n_step, expected in ((1, [0.8, 0.3, c]), (2, [0.3, c, c]), (3, [c, c, c]), (99, [c, c, c])):
        got = tdrm.td_targets(torch.tensor([V]), torch.zeros(1, T), torch.tensor([c]), torch.ones(1, T), 1.0, n_step)
        assert got[0].tolist() == pytest.approx(expected), n_step


@pytest.mark.parametrize("options", [{"n_step": 2}, {"lam": 0.5}])
def test_targets_are_bounded_detached_and_blind_to_padding(options):
    values, rewards, outcomes, mask, _ = ragged(LENGTHS)
    values.requires_grad_()
    got = tdrm.td_targets(values, 9 * rewards, outcomes, mask, **options)
    assert not got.requires_grad and 0 <= got.min() and got.max() <= 1 and (got[~mask] == 0).all()
    assert {0.0, 1.0} <= set(got[mask].tolist())  # it was clamped, on both sides
    expected = tdrm.td_targets(values, rewards, outcomes, mask, **options)
    for filler in (1e9, math.inf, math.nan):
        outside = torch.where(mask, 0, filler)
        assert torch.equal(tdrm.td_targets(values + outside, rewards + outside, outcomes, mask.float(), **options), expected)
    for b, T in enumerate(LENGTHS):  # nor do other rows matter
        one = slice(b, b + 1), slice(0, T)
        torch.testing.assert_close(tdrm.td_targets(values[one], rewards[one], outcomes[b:b + 1], mask[one], **options), expected[one])


@pytest.mark.parametrize("options", [{"n_step": 1}, {"n_step": 3}, {"lam": 0.5}, {"lam": 1.0}], ids=str)
def test_tabular_td_converges_to_the_outcomes(options):
    """gamma = 1, r = 0: values averaged towards their targets end at the share of right solutions that pass through a state."""
    values, _, outcomes, mask, _ = ragged(LENGTHS, 3)
    for _ in range(100):
        values += 0.5 * (tdrm.td_targets(values, torch.zeros_like(values), outcomes, mask, 1.0, **options) - values)
    torch.testing.assert_close(values[mask], (outcomes[:, None] * mask)[mask], rtol=0, atol=1e-4)
    # Two solutions, one right and one wrong, share their first three states.
    table = torch.zeros(7)
    states = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]])
    for _ in range(100):
        targets = tdrm.td_targets(table[states], torch.zeros(2, 5), torch.tensor([1.0, 0.0]), torch.ones(2, 5), 1.0, **options)
        for s in range(7):
            table[s] += 0.5 * (targets[states == s].mean() - table[s])
    assert table.tolist() == pytest.approx([0.5, 0.5, 0.5, 1, 1, 0, 0], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Measures.

@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1], [1], [3], [2, 1]])
def test_smoothness_against_loops(lengths):
    values, rewards, _, mask, _ = ragged(lengths, 4)
    jumps, errors, slopes = [], [], []
    for b, T in enumerate(lengths):
        V, r = values[b].tolist(), rewards[b].tolist()
        jumps += [abs(V[t + 1] - V[t]) for t in range(T - 1)]
        errors += [abs(r[t] + 0.7 * V[t + 1] - V[t]) for t in range(T - 1)]
        slopes += [max(abs(V[s] - V[t]) / (s - t) for s in range(T) for t in range(s))] if T > 1 else []  # over all pairs of states
    expected = {"abs_delta_v": jumps, "td_error_mean": errors, "td_error_std": errors, "lipschitz": slopes}
    expected = {name: float((np.std if name.endswith("std") else np.mean)(numbers)) if numbers else 0.0 for name, numbers in expected.items()}
    for filler in (0.0, 1e9, math.nan):
        got = tdrm.smoothness(torch.where(mask, values, filler), rewards, mask, 0.7)
        assert all(type(x) is float for x in got.values()) and got == pytest.approx(expected, abs=1e-6)


def test_auroc_against_pairs_with_ties():
    rng = np.random.default_rng(0)
    for n, levels in itertools.product((2, 3, 10, 60), (1, 2, 5, 10**9)):
        scores, outcomes = rng.integers(levels, size=n) / levels, rng.random(n) < 0.4
        right, wrong = scores[outcomes], scores[~outcomes]
        wins = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
        got = tdrm.auroc(scores.tolist(), outcomes.tolist())
        assert got == pytest.approx(np.mean(wins)) if wins else math.isnan(got)


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(1)
    for n in (1, 7, 500):
        values, outcomes = np.concatenate([rng.random(n), [0, 1, 0.1, 0.3, 0.999999]]).tolist(), (rng.random(n + 5) < 0.5).tolist()
        bins = [[(v, o) for v, o in zip(values, outcomes) if min(int(v * 10), 9) == k] for k in range(10)]
        expected = sum(len(b) / len(values) * abs(np.mean([v for v, _ in b]) - np.mean([o for _, o in b])) for b in bins if b)
        assert tdrm.calibration_error(values, outcomes) == pytest.approx(expected)
    assert tdrm.calibration_error([1.0, 0.0], [True, False]) == 0 and tdrm.calibration_error([1.0, 0.0], [False, True]) == 1


def first_error_f1_by_hand(values, truth):
    def call(row, threshold):
        return next((t for t, value in enumerate(row) if value < threshold), -1)

    def f1(hits):  # [(hit, has an error)...]
        wrong, right = ([hit for hit, kind in hits if kind is k] for k in (True, False))
        a, b = sum(wrong) / len(wrong), sum(right) / len(right)
        return 2 * a * b / max(a + b, 1e-9)
    halves = [range(0, len(truth), 2), range(1, len(truth), 2)]
    if any({truth[i] >= 0 for i in half} != {True, False} for half in halves):
        return math.nan
    hits = []
    for mine, other in (halves, halves[::-1]):
        best = max(np.linspace(0.01, 0.99, 99), key=lambda t: f1([(call(values[i], t) == truth[i], truth[i] >= 0) for i in other]))
        hits += [(call(values[i], best) == truth[i], truth[i] >= 0) for i in mine]
    return f1(hits)


def test_first_error_f1_by_brute_force():
    rng, finite = random.Random(0), 0
    for n in (1, 2, 3, 4, 8, 15, 40):
        for informed in (0, 0.3, 0.9):
            truth, values = [], []
            for _ in range(n):
                T = rng.randint(1, 7)
                error = rng.choice([-1, rng.randrange(T)])
                truth.append(error)
                values.append([round(informed * (error == -1 or t < error) + (1 - informed) * rng.random(), 2) for t in range(T)])  # rounded: some equal a threshold
            got, expected = tdrm.first_error_f1(values, truth), first_error_f1_by_hand(values, truth)
            assert got == pytest.approx(expected, nan_ok=True)
            finite += math.isfinite(expected)
    assert finite > 8
    for truth in ([-1] * 6, [0] * 6, [0, -1, 0, -1], [0]):  # only one kind, in all or in a half
        assert math.isnan(tdrm.first_error_f1([[0.5]] * len(truth), truth))
    assert tdrm.first_error_f1([[0.9, 0.1], [0.9, 0.1], [0.9, 0.9], [0.8, 0.9]], [1, 1, -1, -1]) == 1


def test_evaluate():
    rows = [{"labels": [1, 1, 0], "correct": False, "first_error": 2}, {"labels": [0, 0], "correct": False, "first_error": 0},
            {"labels": [1, 1], "correct": True, "first_error": -1}, {"labels": [1, 1, 1, 1], "correct": True, "first_error": -1}]
    cfg, values = tdrm.Config(), [[0.9, 0.8, 0.1], [0.3, 0.75], [0.9, 0.7], [0.9, 0.2, 0.8, 0.8]]
    got = tdrm.evaluate(cfg, values, rows)
    assert (got["auroc_last"], got["auroc_second_last"], got["auroc_middle"]) == (0.75, 0.875, 0.5)  # of .1 .75 .7 .8, .8 .3 .9 .8, .8 .3 .9 .2
    assert got["calibration_error"] == pytest.approx(tdrm.calibration_error(sum(values, []), [0] * 5 + [1] * 6))
    assert got["first_error_f1"] == pytest.approx(first_error_f1_by_hand(values, [2, 0, -1, -1]))
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(v)) for v in values], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["labels"]) for r in rows], batch_first=True)
    assert {k: got[k] for k in ("abs_delta_v", "td_error_mean", "td_error_std", "lipschitz")} == pytest.approx(
        tdrm.smoothness(padded, tdrm.shaped_rewards(labels, mask), mask, 0.8))
    # Without labels TD errors are those of r = 0, gamma = 1; what cannot be known is absent, and NaN is None: JSON has no NaN.
    got = tdrm.evaluate(cfg, values, [{"labels": None, "correct": None, "first_error": None}] * 4)
    assert got["td_error_mean"] == pytest.approx(got["abs_delta_v"]) and set(got) == {"abs_delta_v", "td_error_mean", "td_error_std", "lipschitz"}
    got = tdrm.evaluate(cfg, values, [{"labels": None, "correct": True, "first_error": -1}] * 4)
    assert got["auroc_last"] is got["first_error_f1"] is None
    assert json.loads(json.dumps(got, allow_nan=False)) == got


# ---------------------------------------------------------------------------------------------------------------------
# Model folders. All weights are random: what holds for them holds for any.

def families():
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
    size = {"vocab_size": len(data.builtin_tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return {"qwen2": Qwen2Config(**size), "llama": LlamaConfig(**size, tie_word_embeddings=True), "qwen3": Qwen3Config(**size, head_dim=16),
            "mistral": MistralConfig(**size, sliding_window=6)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a policy of each family and files of trajectories."""
    from transformers import AutoModelForCausalLM
    home = tmp_path_factory.mktemp("tdrm")
    for name, config in families().items():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name)
        data.builtin_tokenizer().save_pretrained(home / name)
    problems = data.make_problems(60)
    rows = data.make_trajectories(problems, 2, label_rollouts=4, label_kind="soft")
    write(home / "rows.jsonl", rows)
    write(home / "outcomes.jsonl", [{**row, "labels": None} for row in rows])
    write(home / "ragged.jsonl", RAGGED)
    write(home / "ragged_outcomes.jsonl", [{**row, "labels": None} for row in RAGGED])
    write(home / "bench.jsonl", [{"problem": row["prompt"], "steps": row["completions"], "label": row["first_error"], "final_answer_correct": row["correct"]}
                                 for row in data.make_trajectories(data.make_problems(30, "test"), 2)])
    return home


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


FAMILIES = ["qwen2", "llama", "qwen3", "mistral"]
RAGGED = data.make_trajectories(data.make_problems(6), 1, 4, "soft") + data.make_trajectories(data.make_problems(1, level="builtin-hard"), 1, 4)
RAGGED += [{"prompt": "1+2", "completions": ["\\boxed{3}"], "labels": [1.0], "correct": True}]
EXAMPLES = data.encode_rows(RAGGED, data.builtin_tokenizer(), 999)[0]


def prefix_logits(model, example):
    """The slow way: a forward of its own for every state, nothing after it."""
    return [model(input_ids=torch.tensor([example["input_ids"][:end + 1]])).logits.reshape(-1)[-1] for end in example["step_ends"]]


def flat(model, examples=EXAMPLES):
    """All logits of step_values, in order."""
    batch = data.collate(examples, 0)
    return tdrm.step_values(model, batch["input_ids"], batch["attention_mask"], batch["step_ends"])[batch["step_mask"]]


@torch.no_grad()
def slow(model, examples=EXAMPLES):
    return torch.stack([logit for e in examples for logit in prefix_logits(model, e)])


close = {"rtol": 0, "atol": 1e-5}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_is_as_good_as_one_for_each_prefix(family, home):
    model = tdrm.load_reward_model(str(home / family)).eval()
    logits = flat(model)
    assert logits.dtype == torch.float32 and logits.shape == (sum(len(e["step_ends"]) for e in EXAMPLES),) and logits.std() > 0.05
    torch.testing.assert_close(logits, slow(model), **close)
    batch = data.collate(EXAMPLES, 0)
    shape = batch["step_ends"].shape
    for padding, filler in ((0, 0), (5, 0), (17, 7)):  # more padding on the right, whatever is in it
        ids = F.pad(batch["input_ids"], (0, padding), value=filler)
        ids[:, :batch["input_ids"].shape[1]][batch["attention_mask"] == 0] = filler
        for mask in (None, F.pad(batch["attention_mask"], (0, padding)), F.pad(batch["attention_mask"], (0, padding)).bool()):
            got = tdrm.step_values(model, ids, mask, batch["step_ends"])
            assert got.shape == shape
            torch.testing.assert_close(got[batch["step_mask"]], logits, **close)
    # What follows a state does not reach back to it.
    longer = [dict(e, input_ids=e["input_ids"] + [9, 8, 7]) for e in EXAMPLES]
    torch.testing.assert_close(flat(model, longer), logits, **close)


def test_padding_on_the_left_is_refused(home):
    model, batch = tdrm.load_reward_model(str(home / "qwen2")), data.collate(EXAMPLES, 0)
    for as_type in (torch.int64, torch.bool, torch.float32):
        with pytest.raises(ValueError, match="right"):
            tdrm.step_values(model, batch["input_ids"].flip(1), batch["attention_mask"].flip(1).to(as_type), batch["step_ends"])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_is_evaluation_mode(family, home):
    """The library's heads have a dropout of 0.1 where the config is silent: it would make noise of the targets."""
    assert "classifier_dropout" not in json.loads((home / family / "config.json").read_text())
    model = tdrm.load_reward_model(str(home / family))
    assert torch.equal(flat(model.train()), flat(model.eval()))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_gets_a_new_head_on_the_same_backbone(family, home, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    policy, model = AutoModelForCausalLM.from_pretrained(home / family), tdrm.load_reward_model(str(home / family), seed=3)
    backbone = model.model.state_dict()
    assert policy.model.state_dict().keys() == backbone.keys() and all(torch.equal(w, backbone[name]) for name, w in policy.model.state_dict().items())
    assert model.score.weight.shape == (1, 32) and model.score.bias is None and model.score.weight.abs().sum() > 0
    assert torch.equal(model.score.weight, tdrm.load_reward_model(str(home / family), seed=3).score.weight)
    assert not torch.equal(model.score.weight, tdrm.load_reward_model(str(home / family), seed=4).score.weight)
    assert tdrm.load_reward_model(str(home / family), torch.bfloat16).dtype == torch.bfloat16

    # Saved and loaded it is itself, as ours and as a sequence classifier, for any seed.
    model.save_pretrained(tmp_path)
    assert torch.equal(flat(tdrm.load_reward_model(str(tmp_path), seed=9).eval()), flat(model.eval()))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(classifier.score.weight, model.score.weight)
    torch.testing.assert_close(slow(classifier), flat(model), **close)
    batch = data.collate(EXAMPLES, 0)
    last = classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(last, torch.stack([slow(model, [e])[-1] for e in EXAMPLES]), **close)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_sequence_classifier(family, home, tmp_path):
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(5)
    classifier = AutoModelForSequenceClassification.from_pretrained(home / family, num_labels=1).eval()
    classifier.score.weight.normal_()
    classifier.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0].endswith("ForSequenceClassification")
    model = tdrm.load_reward_model(str(tmp_path)).eval()
    assert torch.equal(model.score.weight, classifier.score.weight) and model.score.bias is None
    torch.testing.assert_close(flat(model), slow(classifier), **close)


@torch.no_grad()
def test_a_token_classifier_with_a_bias_keeps_it(home, tmp_path):
    """The library's own token classifiers have one; so has what was fine-tuned from them, here and elsewhere."""
    from transformers import AutoModelForTokenClassification
    classifier = AutoModelForTokenClassification.from_pretrained(home / "qwen2", num_labels=1).eval()
    classifier.score.bias.fill_(0.7)
    classifier.save_pretrained(tmp_path / "published")
    model = tdrm.load_reward_model(str(tmp_path / "published")).eval()
    torch.testing.assert_close(flat(model), slow(classifier), **close)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(flat(tdrm.load_reward_model(str(tmp_path / "ours")).eval()), flat(model))


@pytest.mark.parametrize("kind", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_of_several_numbers_is_refused(kind, labels, home, tmp_path):
    import transformers
    getattr(transformers, kind).from_pretrained(home / "qwen2", num_labels=labels).save_pretrained(tmp_path)
    with pytest.raises(BadInput) as error:
        tdrm.load_reward_model(str(tmp_path))
    message = str(error.value)
    assert "\n" not in message and f"--model {tmp_path}" in message and f"{labels} labels" in message and "one label" in message


# ---------------------------------------------------------------------------------------------------------------------
# Loss and gradients. The loss is the one of tdrm_minimal.main, caught where it is handed to sft.accumulate_gradients.

METHODS = {
    "td 1": {"n_step": 1}, "td 3": {"n_step": 3, "gamma": 0.9, "correct": (0.3, 0.1)}, "td lambda": {"lam": 0.5, "terminal_weight": 2.0},
    "td, outcomes only": {"data": "ragged_outcomes.jsonl", "n_step": 2}, "td, default n": {"data": "ragged_outcomes.jsonl"}, "scalar_prm": {"method": "scalar_prm"}, "scalar_orm": {"method": "scalar_orm"},
}


class Caught(Exception):
    pass


@pytest.fixture(scope="module")
def first_batch(home, tmp_path_factory):
    """first_batch(name) -> cfg, model, the first global batch and the loss function of a run with METHODS[name]."""
    done = {}

    def catch(name):
        if name not in done:
            options = {**METHODS[name], "data": (str(home / METHODS[name].get("data", "ragged.jsonl")),), "eval": (str(home / "rows.jsonl"),)}
            cfg = tdrm.Config(model=str(home / "qwen2"), out=str(tmp_path_factory.mktemp("run") / "run"), batch_size=8, max_length=128, seed=1, **options)

            def caught(model, examples, micro_batch_size, loss_fn, env):
                done[name] = cfg, model, examples, loss_fn
                raise Caught
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sft, "accumulate_gradients", caught)
                with pytest.raises(Caught):
                    tdrm.main(cfg, Env())
        return done[name]
    yield catch


def gradients(model, examples, micro_batch_size, loss_fn):
    model.zero_grad()
    loss = sft.accumulate_gradients(model, examples, micro_batch_size, loss_fn, Env())
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_gradients_depend_on_the_batch_alone(name, first_batch, monkeypatch):
    _, model, examples, loss_fn = first_batch(name)
    loss, expected = gradients(model, examples, 0, loss_fn)
    assert len(examples) == 8 and len({len(e["step_ends"]) for e in examples}) >= 4 and expected.abs().max() > 1e-3
    collate = data.collate

    def padded(examples, pad_id):
        batch = collate(examples, pad_id)
        more = {"input_ids": (11, 7), "step_ends": (3, 0), "step_mask": (3, False), "labels": (3, 0)}  # columns and what they hold
        return batch | {key: F.pad(batch[key], (0, n), value=value) for key, (n, value) in more.items()}
    shuffled = random.Random(0).sample(examples, 8)
    for micro, order, pad in ((1, examples, False), (2, shuffled, False), (3, shuffled, True), (4, examples, True), (8, shuffled, False), (0, examples, True)):
        monkeypatch.setattr(data, "collate", padded if pad else collate)
        got_loss, got = gradients(model, order, micro, loss_fn)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, examples, 4, loss_fn)[1], expected, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_those_of_the_slow_way(name, first_batch):
    """Two forwards for every transition, each over a whole prefix, and the targets by the definition above."""
    cfg, model, examples, loss_fn = first_batch(name)
    terms = []
    for e in examples:
        T, c, labels = len(e["step_ends"]), float(e["correct"]), e["labels"]
        with torch.no_grad():
            V = [logit.sigmoid().item() for logit in prefix_logits(model, e)]
        r, gamma = [0.0] * T, 1.0
        if labels is not None:
            r, gamma = tdrm.shaped_rewards(torch.tensor([labels]), torch.ones(1, T), cfg.correct, cfg.wrong)[0].tolist(), cfg.gamma
        for t, logit in enumerate(prefix_logits(model, e), 1):
            weight = cfg.terminal_weight if t == T else 1
            if cfg.method == "scalar_prm":
                y = labels[t - 1]
            elif cfg.method == "scalar_orm":
                if t < T:
                    continue
                y = c
            else:
                y = lambda_target(V, r, c, t, gamma, cfg.lam) if cfg.lam >= 0 else n_step_target(V, r, c, t, gamma, cfg.n_step or (3 if labels is not None else T))
                y = min(1, max(0, y))
            terms.append(-weight * (y * F.logsigmoid(logit) + (1 - y) * F.logsigmoid(-logit)))
    slow_loss = sum(terms) / len(terms)  # a mean over states, whatever their weights
    model.zero_grad()
    slow_loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    loss, got = gradients(model, examples, 4, loss_fn)
    assert loss == pytest.approx(slow_loss.item(), rel=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_targets_and_weights_by_method():
    values, _, outcomes, mask, labels = ragged(LENGTHS, 6, soft=True)
    logits, batch = values.logit(), {"step_mask": mask, "labels": labels, "outcomes": outcomes}
    last = torch.zeros_like(mask)
    last[range(len(LENGTHS)), [T - 1 for T in LENGTHS]] = True

    def at(labelled=True, **options):
        targets, weights = tdrm.targets_and_weights(tdrm.Config(**options), logits.requires_grad_(), batch, labelled)
        assert not targets.requires_grad and targets.shape == weights.shape == mask.shape and (weights[~mask] == 0).all()
        return targets, weights
    targets, weights = at(method="scalar_prm")
    assert torch.equal(targets, labels) and torch.equal(weights, mask.float())
    targets, weights = at(method="scalar_orm", terminal_weight=5.0)
    assert torch.equal(targets[last], outcomes) and torch.equal(weights, last.float())
    rewards = tdrm.shaped_rewards(labels, mask, (0.4, 0.3), (-0.1, -0.2))
    for options, more in (({"n_step": 2}, {"n_step": 2}), ({"lam": 0.3}, {"lam": 0.3}), ({"lam": 0.0, "n_step": 4}, {"lam": 0.0}), ({"lam": -1.0, "n_step": 4}, {"n_step": 4})):
        targets, weights = at(gamma=0.6, correct=(0.4, 0.3), wrong=(-0.1, -0.2), terminal_weight=0.25, **options)
        torch.testing.assert_close(targets, tdrm.td_targets(values, rewards, outcomes, mask, 0.6, **more))
        assert torch.equal(weights, torch.where(last, 0.25, mask.float()))
        targets, _ = at(False, gamma=0.6, **options)  # no labels: r = 0 and gamma = 1
        torch.testing.assert_close(targets, tdrm.td_targets(values, torch.zeros_like(values), outcomes, mask, 1.0, **more))
    targets, _ = at(gamma=0.6, correct=(0.4, 0.3), wrong=(-0.1, -0.2))  # n: 3 with step labels, the whole response without
    torch.testing.assert_close(targets, tdrm.td_targets(values, rewards, outcomes, mask, 0.6, n_step=3))
    targets, _ = at(False)
    assert torch.equal(targets[mask], outcomes[:, None].expand_as(targets)[mask])


@pytest.mark.parametrize("rows_at_once", [1, 3, 64])
def test_score_rows_keeps_the_order(rows_at_once, home):
    model, training = tdrm.load_reward_model(str(home / "qwen2")), []
    model.register_forward_pre_hook(lambda module, _: training.append(module.training))
    for examples in (EXAMPLES, EXAMPLES[::-1], EXAMPLES[2:3], []):
        training.clear()
        got = tdrm.score_rows(model, examples, 0, Env(), rows_at_once)
        assert not any(training) and model.training  # a model may have dropout of its own
        assert [len(v) for v in got] == [len(e["step_ends"]) for e in examples]
        for v, e in zip(got, examples):
            assert v == pytest.approx(slow(model, [e]).sigmoid().tolist(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.

def options(home, out, **more):
    return {"model": str(home / "qwen2"), "out": str(out), "steps": 8, "batch_size": 16, "max_length": 128, "eval_every": 4, "lr": 1e-2, **more}


def read(out, name="summary.json"):
    with open(os.path.join(out, name)) as f:
        return [json.loads(line) for line in f] if name.endswith("jsonl") else json.load(f)


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """Folders of a short run of each method on the built-in task, with fewer held-out problems than by default."""
    make, folders = data.make_problems, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "make_problems", lambda n, *rest: make(min(n, 60), *rest))
        for method in ("tdrm", "scalar_prm", "scalar_orm"):
            folders[method] = tmp_path_factory.mktemp("runs") / method
            tdrm.main(tdrm.Config(**options(home, folders[method], method=method, problems=60)), Env())
    return folders


MEASURES = {"abs_delta_v", "td_error_mean", "td_error_std", "lipschitz", "auroc_last", "auroc_second_last", "auroc_middle", "calibration_error", "first_error_f1"}


@pytest.mark.parametrize("method", ["tdrm", "scalar_prm", "scalar_orm"])
def test_a_run_leaves_what_was_agreed(method, runs, home):
    out = runs[method]
    assert sorted(os.listdir(out)) == ["config.json", "metrics.jsonl", "model", "state", "summary.json"]
    assert os.listdir(out / "state") == ["step_00000008"]
    config, metrics, summary = read(out, "config.json"), read(out, "metrics.jsonl"), read(out)
    assert config["method"] == method and config["steps"] == 8 and config["correct"] == [0.5, 0.2] and config["data"] == ["builtin"]
    assert [row["step"] for row in metrics] == list(range(1, 9))
    assert all(math.isfinite(row[key]) for row in metrics for key in ("loss", "lr", "grad_norm")) and metrics[-1]["skipped"] == 0
    assert [MEASURES <= row.keys() for row in metrics] == [False] * 3 + [True] + [False] * 4  # the last evaluation is the summary
    assert MEASURES <= summary.keys() and summary["steps"] == 8 and summary["trajectories"] == 120 and summary["skipped"] == 0
    assert all(0 <= summary[name] <= 1 for name in MEASURES - {"td_error_mean", "td_error_std"})
    config = read(out / "model", "config.json")
    assert config["architectures"] == ["Qwen2ForTokenClassification"] and config["classifier_dropout"] == 0
    before, after = tdrm.load_reward_model(str(home / "qwen2")), tdrm.load_reward_model(str(out / "model"))
    assert (flat(before) - flat(after)).abs().max() > 0.01  # it learned something, and has kept it
    tokenizer = data.load_tokenizer(str(out / "model"))
    assert tokenizer("7+8*3-5\n\n")["input_ids"] == data.builtin_tokenizer()("7+8*3-5\n\n")["input_ids"]


def test_training_lowers_the_loss(home, tmp_path):
    """Eight rows learned by heart, by every method."""
    rows = list(data.read_trajectories(home / "rows.jsonl"))[:8]
    write(tmp_path / "few.jsonl", rows)
    for method, least in (("tdrm", 0.8), ("scalar_prm", 0.8), ("scalar_orm", 0.2)):
        out = tmp_path / method
        tdrm.main(tdrm.Config(**options(home, out, method=method, data=(str(tmp_path / "few.jsonl"),), eval=(str(tmp_path / "few.jsonl"),), steps=40,
                                        batch_size=8, eval_every=0, n_step=3)), Env())
        losses = [row["loss"] for row in read(out, "metrics.jsonl")]
        assert np.mean(losses[-5:]) < least * np.mean(losses[:5]), method
        if len({row["correct"] for row in rows}) == 2:
            assert read(out)["auroc_last"] == 1.0


SCORED = [{"prompt": "1+2", "completions": ["1+2=3", "\\boxed{3}"], "labels": [1, 1]}, {"prompt": "3*3-4", "completions": ["3*3=9"], "correct": False},
          {"prompt": [{"role": "user", "content": "5-4+2*2"}], "completions": ["5-4=1", "1+2=3", "3*2=6", "\\boxed{6}"], "answer": "6"},
          {"prompt": "1+2", "completions": ["1+2=3"] * 40, "correct": True}, {"prompt": "9", "completions": ["\\boxed{9}"], "labels": [0.5]}]


def check_scores(text, model_folder, path, too_long=()):
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["source"] for line in lines] == [f"{path}:{i}" for i in range(1, len(SCORED) + 1)]
    assert [line["correct"] for line in lines] == [True, False, True, True, True]
    tokenizer, model = data.load_tokenizer(model_folder), tdrm.load_reward_model(model_folder).eval()
    for i, (line, row) in enumerate(zip(lines, SCORED)):
        if i in too_long:
            assert line["values"] is None
            continue
        ids, _, ends = data.encode_trajectory(tokenizer, row["prompt"], row["completions"])
        by_hand = slow(model, [{"input_ids": ids, "step_ends": ends}]).sigmoid().tolist()
        assert len(line["values"]) == len(row["completions"]) and line["values"] == pytest.approx(by_hand, abs=1e-5)
        assert all(0 <= value <= 1 for value in line["values"])


def test_score_prints_a_line_a_row(runs, tmp_path):
    """As a process: standard output is JSON Lines and nothing else."""
    write(tmp_path / "scored.jsonl", SCORED)
    command = [sys.executable, os.path.join(ROOT, "tdrm_minimal.py"), "--score", "scored.jsonl", "--model", str(runs["tdrm"] / "model")]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    check_scores(done.stdout, str(runs["tdrm"] / "model"), "scored.jsonl")
    assert os.listdir(tmp_path) == ["scored.jsonl"]  # it trains nothing and writes nothing


def test_rows_too_long_to_score_have_no_values(runs, tmp_path, capsys):
    write(tmp_path / "scored.jsonl", SCORED)
    cfg = tdrm.Config(score=str(tmp_path / "scored.jsonl"), model=str(runs["scalar_orm"] / "model"), max_length=50)
    tdrm.main(cfg, Env())
    check_scores(capsys.readouterr().out, cfg.model, cfg.score, too_long=[3])


def test_evaluation_on_processbench(home, tmp_path, capsys):
    more = {"data": (str(home / "rows.jsonl"),), "eval": (str(home / "bench.jsonl"),)}
    summary = tdrm.main(tdrm.Config(**options(home, tmp_path / "run", **more)), Env())
    assert summary == read(tmp_path / "run") and summary["trajectories"] == 60 and 0 <= summary["first_error_f1"] <= 1
    model, tokenizer = tdrm.load_reward_model(str(tmp_path / "run" / "model")).eval(), data.builtin_tokenizer()
    rows = list(data.read_trajectories(home / "bench.jsonl"))
    values = [slow(model, [e]).sigmoid().tolist() for e in data.encode_rows(rows, tokenizer, 999)[0]]
    expected = {"first_error_f1": first_error_f1_by_hand(values, [row["first_error"] for row in rows]),
                "auroc_second_last": tdrm.auroc([v[-2] for v in values], [row["correct"] for row in rows])}
    assert {name: summary[name] for name in expected} == pytest.approx(expected, abs=0.02)  # near a threshold rounding may decide
    out = capsys.readouterr().out
    assert "first-error F1 (ProcessBench)" in out and "<- first wrong step" in out and "right: " in out and "goes wrong " in out


@pytest.mark.parametrize("kind", ["labels", "outcomes"])
def test_questions_are_held_out_of_the_data(kind, home, tmp_path, capsys):
    file = {"labels": "rows.jsonl", "outcomes": "outcomes.jsonl"}[kind]
    summary = tdrm.main(tdrm.Config(**options(home, tmp_path / "run", steps=0, data=(str(home / file),))), Env())
    assert summary["trajectories"] == 6 and summary["steps"] == 114 // 16  # 3 of 60 questions, 2 solutions each; one pass over the others
    out = capsys.readouterr().out
    assert ("step labels: yes" if kind == "labels" else "step labels: no (r = 0, gamma = 1)") in out
    if kind == "outcomes":
        assert summary["td_error_mean"] == pytest.approx(summary["abs_delta_v"], abs=1e-6)


@pytest.mark.parametrize("installed", [True, False])
def test_plot(installed, home, tmp_path, capsys, monkeypatch):
    if installed:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    tdrm.main(tdrm.Config(**options(home, tmp_path / "run", steps=3, data=(str(home / "rows.jsonl"),), plot=True)), Env())
    plot = tmp_path / "run" / "plot.png"
    assert plot.exists() is installed and ("matplotlib is not installed" in capsys.readouterr().err) is not installed
    assert not installed or plot.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Real text: GSM8K's questions with solutions of four models, right and wrong.

def test_gsm8k_solutions_end_to_end(tmp_path, capsys):
    folder = os.environ.get("GSM8K_DIR")
    if not folder or not os.path.exists(os.path.join(folder, "example_model_solutions.jsonl")):
        pytest.skip("GSM8K_DIR does not name a folder with example_model_solutions.jsonl (github.com/openai/grade-school-math)")
    rows = []
    with open(os.path.join(folder, "example_model_solutions.jsonl")) as f:
        for line in map(json.loads, f):
            if len(line["question"]) < 150:
                rows += [{"prompt": line["question"], "completions": solution["solution"].split("\n"), "correct": solution["is_correct"]}
                         for solution in line.values() if isinstance(solution, dict) and solution["solution"].strip() and "\n\n" not in solution["solution"]]
    rows = rows[:300]
    write(tmp_path / "train.jsonl", rows[:200])
    write(tmp_path / "eval.jsonl", rows[200:])
    tokenizer = data.byte_tokenizer()
    from transformers import Qwen2Config, Qwen2ForCausalLM
    policy = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                          num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    sft.save_model(str(tmp_path / "policy"), policy, tokenizer)
    summary = tdrm.main(tdrm.Config(**options(tmp_path, tmp_path / "run", model=str(tmp_path / "policy"), steps=4, batch_size=8, max_length=400, eval_every=0,
                                              data=(str(tmp_path / "train.jsonl"),), eval=(str(tmp_path / "eval.jsonl"),))), Env())
    assert all(0 <= summary[f"auroc_{state}"] <= 1 for state in ("last", "second_last", "middle")) and summary["skipped"] == 0
    assert summary["trajectories"] + int(capsys.readouterr().out.split(" trajectories (")[1].split()[0]) <= 300
    assert [row["step"] for row in read(tmp_path / "run", "metrics.jsonl")] == [1, 2, 3, 4]
    assert "first_error_f1" not in summary
