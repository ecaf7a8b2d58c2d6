"""Training a policy by its rewards: formulas against tables and loops, gradients, known optima, whole runs.

A run's verifier is satisfied here by the answer's digit anywhere in a response: an untrained policy is never right.
"""
import json
import math
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import rl_minimal as rl
import sft_minimal as sft
import tdrm_minimal as tdrm
from data import BadInput
from plumbing import Env
from test_training import die, metrics, ranks

ESTIMATORS = ["grpo", "dr_grpo", "rloo", "reinforce"]
PAD = 0


def easy(text, answer):
    return answer in text


@pytest.fixture(autouse=True)
def easily_satisfied(monkeypatch):
    monkeypatch.setattr(data, "verify", easy)


# ---------------------------------------------------------------------------------------------------------------------
# The maths, by hand.

def test_blended_rewards():
    verifiable, prm = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.9, 0.4, 0, -2])
    for alpha, wanted in ((0.8, [0.98, 0.08, 0.8, -0.4]), (1.0, [1, 0, 1, 0]), (0.0, [0.9, 0.4, 0, -2])):
        assert rl.blended_rewards(verifiable, prm, alpha).tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("estimator, wanted", [
    ("grpo", [0.75**0.5, -(0.75**0.5)] * 2 + [0] * 4 + [-0.5, 1.5, -0.5, -0.5]),  # std 1/sqrt(3), 0, 2
    ("dr_grpo", [0.5, -0.5] * 2 + [0] * 4 + [-1, 3, -1, -1]),
    ("rloo", [2 / 3, -2 / 3] * 2 + [0] * 4 + [-4 / 3, 4, -4 / 3, -4 / 3]),
    ("reinforce", [1, 0] * 2 + [0.5] * 4 + [-1, 3, -1, -1])])
def test_group_advantages(estimator, wanted):
    rewards = torch.tensor([1.0, 0, 1, 0, 0.5, 0.5, 0.5, 0.5, -1, 3, -1, -1])
    assert rl.group_advantages(rewards, 4, estimator).tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.98, -13.815511, 13.8155])  # the last two: logits
def test_a_group_without_spread_teaches_nothing(estimator, reward):
    for size in (2, 3, 7, 8, 13):
        assert rl.group_advantages(torch.full((2 * size,), reward), size, estimator).abs().max() < 1e-4, size


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_group_advantages_wants_whole_groups(estimator):
    for count, size in ((5, 2), (3, 4)):
        with pytest.raises(ValueError):
            rl.group_advantages(torch.rand(count), size, estimator)
    if estimator == "reinforce":
        assert rl.group_advantages(torch.tensor([1.0, 2, 3]), 1, estimator).tolist() == [1, 2, 3]
    else:
        with pytest.raises(ValueError):
            rl.group_advantages(torch.rand(3), 1, estimator)


RATIOS = [1, 1.1, 1.25, 1.4, 0.9, 0.7]  # clipped below 0.8 and above 1.3
TABLE = {2.0: ([2, 2.2, 2.5, 2.6, 1.8, 1.4], [2, 2.2, 2.5, 0, 1.8, 1.4]),  # surrogate; its derivative by log pi
         -1.0: ([-1, -1.1, -1.25, -1.4, -0.9, -0.8], [-1, -1.1, -1.25, -1.4, -0.9, 0]),
         0.0: ([0] * 6, [0] * 6)}


@pytest.mark.parametrize("advantage", TABLE)
def test_policy_loss(advantage):
    surrogate, derivative = TABLE[advantage]
    old = torch.linspace(-3, -0.1, 6)[None]
    logprobs, mask = (old + torch.tensor([RATIOS]).log()).requires_grad_(), torch.ones(1, 6)
    loss = rl.policy_loss(logprobs, old, torch.tensor([advantage]), mask, (0.2, 0.3), count=1)
    assert loss.item() == pytest.approx(-sum(surrogate), abs=1e-5)
    loss.backward()
    assert (-logprobs.grad[0]).tolist() == pytest.approx(derivative, abs=1e-5)
    for t in range(6):  # token by token: sums hide nothing
        one = F.one_hot(torch.tensor([t]), 6)
        for advantages in (torch.tensor([advantage]), torch.full((1, 6), advantage)):
            loss = rl.policy_loss(logprobs, old, advantages, one, (0.2, 0.3))
            assert loss.item() == pytest.approx(-surrogate[t], abs=1e-5)


def test_policy_loss_counts_and_masks():
    old = torch.full((2, 3), -1.0)
    logprobs = old + torch.tensor([[1.1, 1.5, 1], [0.5, 1, 1]]).log()
    mask, advantages = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([1.0, -2.0])
    total = -(1.1 + 1.2) + 2 * 0.8  # one number for both sides of the clip
    assert rl.policy_loss(logprobs, old, advantages, mask, 0.2).item() == pytest.approx(total / 3)  # tokens
    assert rl.policy_loss(logprobs, old, advantages, mask, (0.2, 0.2), count=10).item() == pytest.approx(total / 10)
    each = torch.tensor([[1.0, 3, 7], [-2, 5, 5]])  # a token's own advantage
    assert rl.policy_loss(logprobs, old, each, mask, 0.2).item() == pytest.approx((-1.1 - 3 * 1.2 + 1.6) / 3)
    assert rl.policy_loss(logprobs, old, advantages, mask & False).item() == 0


@pytest.mark.parametrize("garbage", [5.0, 1e30, math.inf, -math.inf, math.nan])
def test_policy_loss_ignores_what_is_outside_the_mask(garbage):
    old, advantages, mask = torch.full((1, 3), -1.0), torch.tensor([2.0]), torch.tensor([[1, 0, 1]]).bool()
    for where in ("logprobs", "old", "both"):
        new, before = old.clone(), old.clone()
        for tensor in (new, before) if where == "both" else (new,) if where == "logprobs" else (before,):
            tensor[0, 1] = garbage
        new.requires_grad_()
        loss = rl.policy_loss(new, before, advantages, mask)
        loss.backward()
        assert loss.item() == -2 and new.grad.tolist() == [[-1, 0, -1]]


def test_expected_kl_estimate_is_the_kl_divergence():
    torch.manual_seed(0)
    for _ in range(20):
        p, q = (torch.randn(7, dtype=torch.float64).mul(2).log_softmax(0) for _ in range(2))
        exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
        estimate = rl.kl_divergence(p, q)
        assert (p.exp() * estimate).sum().item() == pytest.approx(exact) and (estimate >= 0).all()
    assert rl.kl_divergence(p, p).tolist() == [0] * 7
    assert rl.kl_divergence(torch.tensor(-1.0), torch.tensor(-3.0)).item() == pytest.approx(math.exp(-2) + 1)


@pytest.mark.parametrize("steps, wanted", [
    (["a", "b", "\\boxed{1}"], 1), (["a", "\\boxed{1}"], 0), (["\\boxed{1}"], 0), (["\\boxed{1}", "b", "c"], 0),
    (["a"], 0), ([""], 0), (["a", "b", "c"], 1), (["a", "b", "#### 5"], 1), (["a", "b", "c", "#### 5", "d"], 2),
    (["a", "b", "so \\boxed{1}.", "d", "\\boxed{2}"], 1)])
def test_state_before_answer(steps, wanted):
    assert rl.state_before_answer(steps) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# The maths, again in loops.

@pytest.mark.parametrize("seed", range(3))
def test_maths_against_loops(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    P, G, T = rng.randint(1, 4), rng.randint(2, 5), 6
    rewards = torch.rand(P * G, generator=generator)
    for estimator in ESTIMATORS:
        wanted = []
        for i, reward in enumerate(rewards.tolist()):
            group = rewards[i // G * G:i // G * G + G].tolist()
            mean = sum(group) / G
            if estimator == "grpo":
                wanted.append((reward - mean) / (math.sqrt(sum((x - mean)**2 for x in group) / (G - 1)) + 1e-6))
            elif estimator == "dr_grpo":
                wanted.append(reward - mean)
            elif estimator == "rloo":
                wanted.append(reward - (sum(group) - reward) / (G - 1))
            else:
                wanted.append(reward)
        assert rl.group_advantages(rewards, G, estimator).tolist() == pytest.approx(wanted, abs=1e-5)

    logprobs, old = (torch.randn(P * G, T, generator=generator, dtype=torch.float64) * 0.4 for _ in range(2))
    mask, advantages = torch.rand(P * G, T, generator=generator) < 0.6, torch.randn(P * G, generator=generator).double()
    for clip in (0.2, (0.1, 0.4)):
        below, above = clip if isinstance(clip, tuple) else (clip, clip)
        total = kl = 0.0
        for i in range(P * G):
            for t in range(T):
                if mask[i, t]:
                    ratio, a = math.exp(logprobs[i, t] - old[i, t]), advantages[i].item()
                    total += min(ratio * a, max(1 - below, min(1 + above, ratio)) * a)
                    kl += math.exp(old[i, t] - logprobs[i, t]) - (old[i, t] - logprobs[i, t]).item() - 1
        for a in (advantages, advantages[:, None].expand(-1, T)):
            mean = -total / mask.sum().item()
            assert rl.policy_loss(logprobs, old, a, mask, clip).item() == pytest.approx(mean, abs=1e-9)
            assert rl.policy_loss(logprobs, old, a, mask, clip, 17).item() == pytest.approx(-total / 17, abs=1e-9)
        assert (rl.kl_divergence(logprobs, old) * mask).sum().item() == pytest.approx(kl, abs=1e-9)


def test_numbers_land_on_their_tokens():
    rng = random.Random(0)
    rows = []
    for i in range(6):
        prompt, response = rng.randint(1, 5), rng.randint(1, 7)
        numbers = {name: np.array([rng.random() + 1 for _ in range(response)], dtype=np.float32)
                   for name in ("old_logprobs", "ref_logprobs", "advantages")}
        ids = list(range(5, 5 + prompt + response))
        rows.append({"input_ids": ids, "prompt_length": prompt, "step_ends": [], **numbers})
    tensors = rl.to_tensors(rows, PAD, torch.device("cpu"))
    longest = max(len(row["input_ids"]) for row in rows)
    for name in ("old_logprobs", "ref_logprobs", "advantages"):
        wanted = [[0.0] * (longest - 1) for _ in rows]
        for b, row in enumerate(rows):
            for place in range(row["prompt_length"], len(row["input_ids"])):  # predicted one before
                wanted[b][place - 1] = row[name][place - row["prompt_length"]].item()
        assert tensors[name].tolist() == wanted and tensors[name].dtype == torch.float32
        assert torch.equal(tensors[name] != 0, tensors["response_mask"])
    assert "ref_logprobs" not in rl.to_tensors(without_reference(rows), PAD, "cpu")


def test_equal_responses_go_through_a_model_once():
    rows = [{"input_ids": ids} for ids in ([1, 2], [3], [1, 2], [1, 2, 3], [3], [1, 2])]
    different = rl.distinct(rows)
    assert {tuple(row["input_ids"]): row["copies"] for row in different} == {(1, 2): 3, (3,): 2, (1, 2, 3): 1}
    assert len(different) == 3 and "copies" not in rows[0]
    results = [sum(row["input_ids"]) for row in different]
    assert rl.for_each(rows, different, results) == [3, 3, 3, 6, 3, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the policy: against the loss of all rows, token by token.

class Recorder:
    """An optimizer that keeps the gradients and changes nothing."""
    def __init__(self, model):
        self.model, self.param_groups, self.gradients = model, [{"lr": None}], []

    def step(self):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))


def make_policy():
    return sft.new_policy(data.builtin_tokenizer(), 0)


def token_logits(model, row, temperature):
    return model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double() / temperature


def made_up_rows(model, temperature=1.0, seed=0):
    """Three questions, four responses each, some of them equal, with ratios far on both sides of the clip range."""
    rng, rows = random.Random(seed), []
    for question in range(3):
        prompt = [3] + [rng.randint(5, 20) for _ in range(2 + 3 * question)] + [4]
        for response in range(4):
            again = rows[-1] if response == 2 else None
            tokens = [rng.randint(5, 20) for _ in range(rng.randint(1, 9))]
            tokens = again["input_ids"][len(prompt):] if again else tokens
            rows.append({"input_ids": prompt + tokens, "prompt_length": len(prompt), "step_ends": []})
            if again:
                rows[-1] |= {name: again[name] for name in ("old_logprobs", "ref_logprobs", "advantages")}
                continue
            with torch.no_grad():
                logprobs = token_logits(model, rows[-1], temperature).log_softmax(-1)
            now = [logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(tokens)]
            for name in ("old_logprobs", "ref_logprobs"):
                rows[-1][name] = np.array([x + rng.gauss(0, 0.4) for x in now], dtype=np.float32)
            rows[-1]["advantages"] = np.full(len(tokens), rng.gauss(0, 1), dtype=np.float32)
    return rows


def naive(model, rows, cfg, count):
    """-> gradient, metrics: the definitions in loops over all rows and tokens."""
    sums = {"clip_fraction": 0, "approx_kl": 0.0, "entropy": 0.0}
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    below, above = cfg.clip_eps
    for row in rows:
        logprobs = token_logits(model, row, cfg.temperature).log_softmax(-1)
        for i, t in enumerate(range(row["prompt_length"], len(row["input_ids"]))):
            new, a = logprobs[t - 1, row["input_ids"][t]], float(row["advantages"][i])
            log_ratio = new - float(row["old_logprobs"][i])
            ratio = log_ratio.exp()
            total = total - torch.minimum(ratio * a, ratio.clamp(1 - below, 1 + above) * a)
            if "ref_logprobs" in row:
                d = float(row["ref_logprobs"][i]) - new
                total = total + cfg.kl_coef * (d.exp() - d - 1)
            sums["clip_fraction"] += (a > 0 and ratio.item() > 1 + above) or (a < 0 and ratio.item() < 1 - below)
            sums["approx_kl"] += (ratio - 1 - log_ratio).item()  # of the policy that sampled from the one now
            sums["entropy"] -= (logprobs[t - 1].exp() * logprobs[t - 1]).sum().item()
            tokens += 1
    model.zero_grad()
    (total / count).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return gradient, {name: x / tokens for name, x in sums.items()}


def without_reference(rows):
    return [{name: x for name, x in row.items() if name != "ref_logprobs"} for row in rows]


def response_tokens(rows):
    return sum(len(row["old_logprobs"]) for row in rows)


CFG = rl.Config(grad_clip=0.0, clip_eps=(0.2, 0.3), max_new_tokens=9)


def update(model, recorder, rows, cfg, pad=PAD):
    return rl.update_policy(sft.Policy(model), model, recorder, rows, 0.5, cfg, Env(), pad)


@pytest.mark.parametrize("options", [
    {}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"estimator": "dr_grpo"}, {"kl_coef": 0.3},
    {"temperature": 0.7},
    {"kl_coef": 0.3, "temperature": 0.7, "micro_batch_size": 3, "estimator": "dr_grpo"}], ids=str)
def test_gradient_is_that_of_the_loss_of_all_rows(options):
    model, cfg = make_policy(), replace(CFG, **options)
    rows = made_up_rows(model, cfg.temperature)
    rows = rows if cfg.kl_coef else without_reference(rows)
    count = len(rows) * cfg.max_new_tokens if cfg.estimator == "dr_grpo" else response_tokens(rows)
    wanted, numbers = naive(model, rows, cfg, count)
    for order, pad in ((rows, PAD), (rows[::-1], 7), (random.Random(1).sample(rows, len(rows)), 1)):
        recorder = Recorder(model)
        got = update(model, recorder, order, cfg, pad)
        torch.testing.assert_close(recorder.gradients[0], wanted, rtol=1e-3, atol=2e-6)
        assert got == pytest.approx({**got, **numbers}, rel=1e-3, abs=1e-4)
        assert got["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-4)
        assert recorder.param_groups == [{"lr": 0.5}] and len(recorder.gradients) == 1 and got["skipped"] == 0
        assert 0.1 < got["clip_fraction"] < 0.9


def test_equal_responses_in_two_groups_keep_their_own_advantages():
    """A question that comes twice in a step makes two groups, with two baselines."""
    model = make_policy()
    rows = without_reference(made_up_rows(model))[:4]
    rows += [{**row, "advantages": row["advantages"] - 1} for row in rows]
    recorder, wanted = Recorder(model), naive(model, rows, CFG, response_tokens(rows))[0]
    update(model, recorder, rows, CFG)
    torch.testing.assert_close(recorder.gradients[0], wanted, rtol=1e-3, atol=2e-6)


def test_minibatches_and_epochs():
    model = make_policy()
    rows = without_reference(made_up_rows(model))[:8]
    for batch_size, epochs in ((3, 1), (3, 2), (8, 2), (0, 3), (4, 1)):
        recorder, parts = Recorder(model), [rows[i:i + (batch_size or 8)] for i in range(0, 8, batch_size or 8)]
        got = update(model, recorder, rows, replace(CFG, batch_size=batch_size, inner_epochs=epochs))
        assert len(recorder.gradients) == len(parts) * epochs
        wanted = [naive(model, part, CFG, response_tokens(part))[0] for part in parts]  # divided by its own tokens
        for gradient, expected in zip(recorder.gradients, wanted * epochs):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6)
        means = naive(model, rows, CFG, 1)[1]  # over all of them
        assert got == pytest.approx({**got, **means}, rel=1e-3, abs=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    model = make_policy()
    rows, recorder = without_reference(made_up_rows(model))[:8], Recorder(model)
    rows[5] = {**rows[5], "advantages": np.full_like(rows[5]["advantages"], np.nan)}
    got = update(model, recorder, rows, replace(CFG, batch_size=2, inner_epochs=2))
    assert got["skipped"] == 2 and len(recorder.gradients) == 6
    assert all(gradient.isfinite().all() for gradient in recorder.gradients)


PROBLEMS = data.make_problems(6)


def rolled_out(model, temperature=1.0, env=Env(), **options):
    cfg = rl.Config(group_size=5, temperature=temperature, max_new_tokens=8, **options)
    return rl.rollout(model, data.builtin_tokenizer(), PROBLEMS, range(40, 46), cfg, env)


def deviation(model, rows, temperature):
    for row in rows:
        row["advantages"] = np.ones(len(row["old_logprobs"]), dtype=np.float32)
    return update(model, Recorder(model), rows, replace(CFG, temperature=temperature))["max_ratio_deviation"]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_the_trained_policy_is_the_sampled_one(temperature):
    model = make_policy()
    rows = rolled_out(model, temperature)
    assert deviation(model, rows, temperature) < 1e-4
    assert deviation(model, rows, temperature * 1.1) > 1e-2
    ref = rl.score_logprobs(model, rows, replace(CFG, temperature=temperature, micro_batch_size=4), Env(), PAD)
    for row, logprobs in zip(rows, ref, strict=True):
        assert logprobs.tolist() == pytest.approx(row["old_logprobs"].tolist(), abs=1e-4)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] += 0.05
    assert deviation(model, rows, temperature) > 1e-3


def test_rollouts():
    model, tokenizer = make_policy(), data.builtin_tokenizer()
    rows = rolled_out(model)
    assert len(rows) == 30 and [row["prompt"] for row in rows] == [p["question"] for p in PROBLEMS for _ in range(5)]
    assert {row["verifiable"] for row in rows} == {0.0, 1.0} and {row["finished"] for row in rows} == {True, False}
    for row, problem in zip(rows, [p for p in PROBLEMS for _ in range(5)]):
        response = row["input_ids"][row["prompt_length"]:]
        assert row["input_ids"][:row["prompt_length"]] == data.encode_prompt(tokenizer, problem["question"])
        assert row["text"] == tokenizer.decode(response, skip_special_tokens=True)
        assert row["finished"] == (response[-1] == tokenizer.eos_token_id) and (row["finished"] or len(response) == 8)
        assert len(row["old_logprobs"]) == len(response)
        assert row["verifiable"] == row["correct"] == (problem["answer"] in row["text"])
        assert row["completions"] == (data.split_steps(row["text"]) or [""]) and not row["failed"]
    assert len({row["text"] for row in rows}) > 20
    other = rl.rollout(model, tokenizer, PROBLEMS[:1], [41], rl.Config(group_size=5, max_new_tokens=8), Env())
    assert [row["text"] for row in other] != [row["text"] for row in rows[:5]]  # another key, other noise


# ---------------------------------------------------------------------------------------------------------------------
# The reward model on the rollouts.

def make_prm(folder, seed=0):
    make_policy().save_pretrained(folder)
    return tdrm.load_reward_model(str(folder), seed=seed)


def outcomes():
    """Encoded solutions, some of them equal, with their outcomes."""
    return rl.encode_for(data.builtin_tokenizer(), data.make_trajectories(data.make_problems(10), 4))


def outcome_gradient(prm, examples):
    """Without step labels every V_t is pulled to the outcome."""
    total, states = torch.zeros((), dtype=torch.float64), 0
    for e in examples:
        z = prm(input_ids=torch.tensor([e["input_ids"]])).logits[0, :, 0].double()[e["step_ends"]]
        y = float(e["correct"])
        total = total - (y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).sum()
        states += len(z)
    prm.zero_grad()
    (total / states).backward()
    gradient = torch.cat([p.grad.flatten() for p in prm.parameters()])
    prm.zero_grad()
    return gradient


@pytest.mark.parametrize("micro", [0, 1, 3])
def test_reward_model_learns_from_outcomes(micro, tmp_path):
    prm, examples, cfg = make_prm(tmp_path), outcomes(), rl.Config(grad_clip=0.0, prm_lr=0.25, micro_batch_size=micro)
    assert len(rl.distinct(examples)) < len(examples) and {e["correct"] for e in examples} == {True, False}
    wanted, recorder = outcome_gradient(prm, examples), Recorder(prm)
    norm = rl.train_reward_model(prm, prm, recorder, examples, PAD, cfg, Env())
    torch.testing.assert_close(recorder.gradients[0], wanted, rtol=1e-3, atol=2e-6)
    assert norm == pytest.approx(wanted.norm().item(), rel=1e-4) and recorder.param_groups == [{"lr": 0.25}]


def test_auroc_rises_on_fixed_rollouts(tmp_path):
    prm, examples, cfg = make_prm(tmp_path, 5), outcomes(), rl.Config(prm_lr=3e-3)
    optimizer, truth = sft.make_optimizer(prm, cfg, Env()), [e["correct"] for e in examples]

    def last():
        values = rl.value_rollouts(prm, examples, PAD, Env())
        assert [len(v) for v in values] == [len(e["step_ends"]) for e in examples]
        return tdrm.auroc([v[-2] for v in values], truth)
    before = last()
    for _ in range(25):
        rl.train_reward_model(prm, prm, optimizer, examples, PAD, cfg, Env())
    assert before < 0.8 and last() > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# One process or two.

def on_ranks(env, folder):
    """What a rank computes -> a file: rollouts, gradients with many rows and with one, numbers of rows."""
    data.verify = easy
    cfg = replace(CFG, batch_size=2)
    model, policy = sft.prepare(make_policy(), cfg, env, sft.Policy)
    rows, result = without_reference(made_up_rows(model)), {}
    for name, part, micro in (("all", rows, 0), ("micro", rows, 2), ("one", rows[:1], 0), ("copies", rows[1:3], 0)):
        recorder = Recorder(model)
        options = replace(cfg, batch_size=0, micro_batch_size=micro)
        logged = rl.update_policy(policy, model, recorder, part, 0.5, options, env, PAD)
        result[name] = recorder.gradients[0], {key: float(x) for key, x in logged.items()}
    result["ref"] = [x.tolist() for x in rl.score_logprobs(model, rows, replace(cfg, micro_batch_size=2), env, PAD)]
    result["rollouts"] = [(row["input_ids"], row["verifiable"]) for row in rolled_out(model, env=env)]
    prm, wrapped = sft.prepare(tdrm.load_reward_model(os.path.join(folder, "policy")), cfg, env)
    for name, part in (("outcomes", outcomes()), ("outcome", outcomes()[:1])):
        recorder = Recorder(prm)
        rl.train_reward_model(wrapped, prm, recorder, part, PAD, cfg, env)
        result[name] = recorder.gradients[0]
    result["values"] = [x for v in rl.value_rollouts(prm, outcomes(), PAD, env) for x in v]
    torch.save(result, os.path.join(folder, f"{env.world}{env.rank}.pt"))


def test_number_of_processes_does_not_matter_to_gradients(tmp_path):
    make_policy().save_pretrained(tmp_path / "policy")
    on_ranks(Env(), str(tmp_path))
    assert ranks(2, tmp_path, on_ranks, str(tmp_path)) == [0, 0]
    one, *two = (torch.load(tmp_path / name) for name in ("10.pt", "20.pt", "21.pt"))
    for result in two:
        for name in ("all", "micro", "one", "copies"):
            torch.testing.assert_close(result[name][0], one[name][0], rtol=1e-3, atol=2e-6)
            assert result[name][1] == pytest.approx(one[name][1], rel=1e-4, abs=1e-5), name
        for name in ("outcomes", "outcome"):
            torch.testing.assert_close(result[name], one[name], rtol=1e-3, atol=2e-6)
        assert result["rollouts"] == one["rollouts"] and result["values"] == pytest.approx(one["values"], abs=1e-5)
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(result["ref"], one["ref"], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Problems with a known optimum, learned by the same functions.

def learn(logits, play, estimator, steps, lr=0.1, questions=2, group_size=8, epochs=2):
    """`play(probabilities, n)` -> states (n, T), tokens (n, T), rewards (n,)."""
    torch.manual_seed(0)
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    for _ in range(steps):
        states, tokens, rewards = play(logits.detach().softmax(-1), questions * group_size)
        logprobs = lambda: logits.log_softmax(-1)[states, tokens]  # noqa: E731
        old, advantages = logprobs().detach(), rl.group_advantages(rewards, group_size, estimator)
        for _ in range(epochs):
            optimizer.zero_grad()
            rl.policy_loss(logprobs(), old, advantages, torch.ones(states.shape), 0.2).backward()
            optimizer.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bandit(estimator):
    def play(probabilities, n):
        tokens = probabilities[0].multinomial(n, replacement=True)[:, None]
        return torch.zeros_like(tokens), tokens, torch.tensor([0.2, 0.8])[tokens[:, 0]]
    begin = torch.tensor([[1.0, -1.0]])  # it prefers the worse one
    assert begin.softmax(-1)[0, 1] < 0.2 and learn(begin, play, estimator, 120)[0, 1] > 0.95


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chain(estimator):
    """States 0 to 4, from 0; tokens: 0 left, 1 right; reward 1 at the right end after 6 tokens. Best: always right."""
    def play(probabilities, n):
        state, states, tokens = torch.zeros(n, dtype=torch.long), [], []
        for _ in range(6):
            token = probabilities[state].multinomial(1)[:, 0]
            states.append(state)
            tokens.append(token)
            state = (state + 2 * token - 1).clamp(0, 4)
        return torch.stack(states, 1), torch.stack(tokens, 1), (state == 4).float()

    def expected(probabilities):
        at = torch.tensor([1.0, 0, 0, 0, 0])
        for _ in range(6):
            left, right = at * probabilities[:, 0], at * probabilities[:, 1]
            at = F.pad(left[1:], (0, 1)) + F.pad(right[:-1], (1, 0))
            at[0] += left[0]
            at[4] += right[4]
        return at[4].item()
    learned = learn(torch.zeros(5, 2), play, estimator, 150)
    assert expected(torch.full((5, 2), 0.5)) < 0.2 and expected(learned) > 0.9
    assert (learned[:, 1] > 0.5).all()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs. `fault` is (function, arguments), called in each rank before the run.

def train(env, options, fault=None):
    data.verify = easy
    if fault:
        fault[0](env, *fault[1:])
    rl.main(rl.Config(**options), env)


def in_update(act):
    """Calls act(step) at the beginning of each policy update, steps counted from 1."""
    update, step = rl.update_policy, [0]

    def patched(*args, **more):
        step[0] += 1
        act(step[0])
        return update(*args, **more)
    rl.update_policy = patched


def at_step(env, at, number):
    """The last rank gets a signal: to stop is for all to agree on."""
    in_update(lambda step: step == at and env.rank == env.world - 1 and os.kill(os.getpid(), number))


def poisoned(env, at, world_rank, folder):
    """One rank's loss is not finite in one step; every rank leaves its own weights behind."""
    loss, finish, now = rl.policy_loss, rl.finish, [0]
    in_update(lambda step: now.__setitem__(0, step))
    rl.policy_loss = lambda *args: loss(*args) * (math.nan if now[0] == at and env.rank == world_rank else 1)

    def leaving(cfg, env, model, *rest, **more):
        torch.save(model.state_dict(), os.path.join(folder, f"weights{env.rank}.pt"))
        return finish(cfg, env, model, *rest, **more)
    rl.finish = leaving


def in_save(env, at, where):
    """Killed while the checkpoint of step `at` is written; of several ranks the last one only."""
    save = sft.save_checkpoint

    def patched(cfg, env, step, model, tokenizer, optimizer, **others):
        def half(thing, path, *rest, **more):
            with open(path, "wb") as f:
                f.write(b"half")
            die()

        def after(function):
            return lambda *args, **options: (function(*args, **options), die())
        if step == at:
            if where == "state" and env.rank == env.world - 1:
                torch.save = half
            if where == "policy":
                model.save_pretrained = after(model.save_pretrained)
            if where == "prm":
                others["prm"][0].save_pretrained = after(others["prm"][0].save_pretrained)
            if where == "renamed":
                os.rename = after(os.rename)
        save(cfg, env, step, model, tokenizer, optimizer, **others)
    sft.save_checkpoint = patched


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home, tokenizer = tmp_path_factory.mktemp("rl"), data.builtin_tokenizer()
    make_policy().save_pretrained(home / "policy")
    tdrm.load_reward_model(str(home / "policy"), seed=1).save_pretrained(home / "prm")
    for name in ("policy", "prm"):
        tokenizer.save_pretrained(home / name)
    (home / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in data.make_problems(12)))
    return home


def settings(home, out, **more):
    return {"model": str(home / "policy"), "prm": str(home / "prm"), "data": (str(home / "problems.jsonl"),),
            "out": str(out), "steps": 4, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "max_length": 64,
            "lr": 1e-3, "alpha": 0.5, "save_every": 0, "eval_every": 2, "show_every": 0, **more}


def run(world, folder, options, fault=None):
    """One process: in this one, with all patches taken back."""
    if world > 1:
        return ranks(world, folder, train, options, fault)
    before = {name: getattr(rl, name) for name in ("update_policy", "policy_loss", "finish")}
    try:
        train(Env(), options, fault)
    finally:
        for name, function in before.items():
            setattr(rl, name, function)
        data.verify = easy
    return [0]


@pytest.fixture(scope="module")
def reference(home):
    """reference(world, **options) -> folder of an uninterrupted run."""
    done = {}

    def make(world, **more):
        key = (world, *sorted(more.items()))
        if key not in done:
            out = home / f"reference{len(done)}"
            assert run(world, home, settings(home, out, **more)) == [0] * world
            done[key] = out
        return done[key]
    return make


def numbers(out):
    """metrics.jsonl without what the clock and the machine put there."""
    clock = ("seconds_", "peak_mib")
    return [{name: x for name, x in row.items() if not name.startswith(clock)} for row in metrics(out)]


def assert_same_run(out, expected, prm):
    assert numbers(out) == numbers(expected) and [row["step"] for row in numbers(out)] == [0, 1, 2, 3, 4]
    assert (out / "summary.json").read_bytes() == (expected / "summary.json").read_bytes()
    for name in ["model"] + ["prm"] * prm:
        assert (out / name / "model.safetensors").read_bytes() == (expected / name / "model.safetensors").read_bytes()
    left = sorted(os.listdir(out / "state"))  # an older checkpoint may stay, no half one
    assert (out / "prm").exists() == prm and left[-1] == "step_00000004" and "tmp" not in left


@pytest.mark.parametrize("prm_lr", [0.0, 1e-3])
@pytest.mark.parametrize("world", [1, 2])
def test_resumed_run_is_bitwise_the_uninterrupted_one(world, prm_lr, reference, home, tmp_path):
    out, expected = tmp_path / "run", reference(world, prm_lr=prm_lr)
    options = settings(home, out, prm_lr=prm_lr)
    assert run(world, tmp_path, options, (at_step, 2, signal.SIGTERM)) == [0] * world
    assert os.listdir(out / "state") == ["step_00000002"] and not (out / "model").exists()
    assert run(world, tmp_path, {**options, "resume": True}) == [0] * world
    assert_same_run(out, expected, prm_lr > 0)
    trained, start = (load_file(folder / "model.safetensors") for folder in (out / "model", home / "policy"))
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    if prm_lr:
        trained, start = (load_file(folder / "model.safetensors") for folder in (out / "prm", home / "prm"))
        for name in ("score.weight", "model.embed_tokens.weight"):
            assert not torch.equal(trained[name], start[name])


@pytest.mark.parametrize("world, where", [(1, "policy"), (1, "prm"), (1, "renamed"), (2, "state")])
def test_killed_while_saving(world, where, reference, home, tmp_path):
    out = tmp_path / "run"
    options = settings(home, out, prm_lr=1e-3, save_every=1)
    codes = ranks(world, tmp_path, train, options, (in_save, 3, where))
    assert -signal.SIGKILL in codes and 0 not in codes and not (out / "model").exists()
    assert run(world, tmp_path, {**options, "resume": True}) == [0] * world
    assert_same_run(out, reference(world, prm_lr=1e-3), True)


def test_number_of_processes_does_not_matter(reference):
    one, two = (reference(world, prm_lr=1e-3) for world in (1, 2))
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = a[name] == b[name]  # also None: an AUROC of one kind only
            assert same or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), (a["step"], name)
    for name in ("model", "prm"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (one, two))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=5e-4, msg=f"{name} {key}")


def test_what_a_run_logs(reference, home):
    rows = numbers(reference(1, prm_lr=1e-3))
    assert all({"pass@1", "greedy"} <= rows[i].keys() for i in (0, 2)) and "pass@1" not in rows[1]
    for i, row in enumerate(rows[1:], 1):
        assert {"no_signal", "truncated", "approx_kl"} <= row.keys() and row["max_ratio_deviation"] < 1e-4
        assert row["clip_fraction"] == row["skipped"] == row["verifier_failed"] == 0
        assert row["reward"] == pytest.approx((row["verifiable"] + row["prm"]) / 2, abs=1e-5) and 0 < row["prm"] < 1
        assert row["grad_norm"] > 0 and row["questions"] == 2 * i and row["lr"] == sft.learning_rate(i - 1, 4, 1e-3, 0.03)
        assert 1 <= row["response_length"] <= 8 and 0 < row["entropy"] < math.log(len(data.builtin_tokenizer()))
    assert any(row["prm_auroc"] is not None and row["prm_auroc_after"] != row["prm_auroc"] for row in rows[1:])
    summary = json.load(open(reference(1, prm_lr=1e-3) / "summary.json"))
    assert summary["questions"] == 1 and summary["steps"] == 4 and 0 <= summary["pass@1"] <= 1


def broken(env):
    def verify(text, answer):
        raise RecursionError("a response like no other")
    data.verify = verify


def half_broken(text, answer):
    if len(text) % 2:
        raise ValueError("odd")
    return easy(text, answer)


def test_a_verifier_that_raises_is_counted(home, tmp_path, monkeypatch):
    run(1, tmp_path, settings(home, tmp_path / "run", steps=1), (broken,))
    row = numbers(tmp_path / "run")[-1]
    assert row["verifier_failed"] == 1 and row["verifiable"] == 0 and row["grad_norm"] > 0
    monkeypatch.setattr(data, "verify", half_broken)
    rows = rolled_out(make_policy())
    assert {row["failed"] for row in rows} == {True, False}
    for row in rows:
        assert row["failed"] == (len(row["text"]) % 2 == 1) and not (row["failed"] and row["verifiable"])


def test_a_poisoned_step_is_skipped_on_all_ranks_and_counted(reference, home, tmp_path):
    out = tmp_path / "run"
    assert run(2, tmp_path, settings(home, out), (poisoned, 2, 1, str(tmp_path))) == [0, 0]
    rows, clean = numbers(out), numbers(reference(2, prm_lr=0.0))
    assert [row.get("skipped") for row in rows] == [None, 0, 1, 1, 1]
    assert json.load(open(out / "summary.json"))["skipped"] == 1
    assert [row["grad_norm"] is None for row in rows[1:]] == [False, True, False, False] and rows[1] == clean[1]
    a, b = (torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2))
    assert all(a[name].isfinite().all() and torch.equal(a[name], b[name]) for name in a)


def seen_by_update(monkeypatch):
    seen, update = [], rl.update_policy

    def patched(policy, model, optimizer, rows, *rest):
        seen.append(rows)
        return update(policy, model, optimizer, rows, *rest)
    monkeypatch.setattr(rl, "update_policy", patched)
    return seen


def test_truncated_responses_are_left_out(home, tmp_path, monkeypatch):
    seen, verified = seen_by_update(monkeypatch), rl.verified
    for masked in (True, False):
        options = settings(home, tmp_path / str(masked), steps=1, prompts_per_step=8, mask_truncated=masked)
        rl.main(rl.Config(**options), Env())
    assert 0 < len(seen[0]) < len(seen[1]) == 32
    wanted = [row for row in seen[1] if row["finished"]]
    assert [row["input_ids"] for row in seen[0]] == [row["input_ids"] for row in wanted]
    for a, b in zip(seen[0], wanted):  # the baselines know all of them
        assert a["advantages"].tolist() == b["advantages"].tolist()
    truncated = [numbers(tmp_path / str(masked))[-1]["truncated"] for masked in (True, False)]
    assert truncated == [1 - len(wanted) / 32] * 2

    monkeypatch.setattr(rl, "verified", lambda problem, sample: {**verified(problem, sample), "finished": False})
    out = tmp_path / "all"
    rl.main(rl.Config(**settings(home, out, steps=2, mask_truncated=True, prm_lr=1e-3, kl_coef=0.1)), Env())
    assert len(seen) == 2 and [row["truncated"] for row in numbers(out)[1:]] == [1, 1]
    start, end = (load_file(folder / "model.safetensors") for folder in (home / "policy", out / "model"))
    assert all(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("options", [
    {"alpha": 0.0}, {"alpha": 1.0, "prm_lr": 1e-3}, {"kl_coef": 0.5}, {"prm_score": "logit"}, {"estimator": "dr_grpo"},
    {"estimator": "rloo"}, {"estimator": "reinforce"}, {"estimator": "reinforce", "group_size": 1},
    {"batch_size": 3, "inner_epochs": 2}, {"temperature": 0.6, "clip_eps": (0.1, 0.5)}], ids=str)
def test_one_step(options, home, tmp_path, monkeypatch):
    seen = seen_by_update(monkeypatch)
    cfg = rl.Config(**settings(home, tmp_path / "run", steps=1, prompts_per_step=4, show_every=1, **options))
    summary = rl.main(cfg, Env())
    row, rows = numbers(tmp_path / "run")[-1], seen[0]
    assert row["step"] == 1 and row["grad_norm"] > 0 and row["max_ratio_deviation"] < 1e-4 and summary["skipped"] == 0
    prm, tokenizer = tdrm.load_reward_model(str(home / "prm")), data.builtin_tokenizer()
    rewards = []  # once more, row by row
    for r in rows:
        ids, _, ends = data.encode_trajectory(tokenizer, r["prompt"], r["completions"])
        place = ends[max(0, next((t for t, s in enumerate(r["completions"]) if "\\boxed" in s), len(ends) - 1) - 1)]
        logit = prm(input_ids=torch.tensor([ids])).logits[0, place, 0].item()
        score = logit if cfg.prm_score == "logit" else 1 / (1 + math.exp(-logit))
        rewards.append(cfg.alpha * r["verifiable"] + (1 - cfg.alpha) * score)
    assert row["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)
    advantages = rl.group_advantages(torch.tensor(rewards), cfg.group_size, cfg.estimator).tolist()
    for r, advantage in zip(rows, advantages, strict=True):
        assert r["advantages"].tolist() == pytest.approx([advantage] * len(r["old_logprobs"]), abs=2e-3)
        if cfg.kl_coef:  # it begins as the policy
            assert r["ref_logprobs"].tolist() == pytest.approx(r["old_logprobs"].tolist(), abs=1e-4)
    assert (tmp_path / "run" / "prm").exists() == (cfg.prm_lr > 0)


def test_rule_only_loads_no_reward_model(home, tmp_path, monkeypatch):
    def never(*args, **more):
        raise AssertionError("--alpha 1 loads a reward model")
    monkeypatch.setattr(tdrm, "load_reward_model", never)
    monkeypatch.setattr(tdrm, "builtin_reward_model", never)
    rl.main(rl.Config(**settings(home, tmp_path / "run", steps=2, alpha=1.0, prm="")), Env())
    for row in numbers(tmp_path / "run")[1:]:
        assert row["reward"] == row["verifiable"] and "prm" not in row and "prm_auroc" not in row


def test_kl_term_pulls_back_to_the_initial_policy(home, tmp_path):
    """The reference is the initial policy also in a resumed run: a strong pull keeps the policy nearer to it."""
    def distance(kl_coef):
        out = tmp_path / str(kl_coef)
        options = settings(home, out, kl_coef=kl_coef, lr=3e-3, alpha=1.0, steps=6, decay=False)
        run(1, tmp_path, options, (at_step, 3, signal.SIGTERM))
        run(1, tmp_path, {**options, "resume": True})
        folders = out / "model", home / "policy"
        policy, start = (rl.load_causal_lm(str(folder), rl.Config(dtype="float32"), Env()).eval() for folder in folders)
        rows = rolled_out(policy)
        p, q = (np.concatenate(rl.score_logprobs(m, rows, CFG, Env(), PAD)) for m in (policy, start))
        return rl.kl_divergence(torch.from_numpy(p), torch.from_numpy(q)).mean().item()
    assert distance(10.0) < 0.5 * distance(0.0)


def test_fewer_questions_than_a_step_wants(home, tmp_path, monkeypatch):
    """The same question comes several times in a step, with other noise each time."""
    seen = seen_by_update(monkeypatch)
    rl.main(rl.Config(**settings(home, tmp_path / "run", steps=1, prompts_per_step=4, problems=2)), Env())
    assert len(seen[0]) == 16 and len({row["prompt"] for row in seen[0]}) == 2
    assert len({row["text"] for row in seen[0]}) > 8


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.

@pytest.mark.parametrize("options, message", [
    ({"group_size": 1}, "--group_size 1"), ({"group_size": 1, "estimator": "rloo"}, "--group_size 1"),
    ({"batch_size": 9}, "--batch_size 9"), ({"model": ""}, "--model"),
    ({"max_length": 9, "max_new_tokens": 8}, "--max_new_tokens 8"),
    ({"max_new_tokens": 4000}, "--max_new_tokens 4000"), ({"max_length": 5000}, "--max_length 5000"),
    ({"prm": "POLICY"}, "weights are not in its files"), ({"eval": ("no_answer.jsonl",)}, "no_answer.jsonl"),
    ({"eval": ("nothing.jsonl",)}, "nothing.jsonl")], ids=str)
def test_bad_input(options, message, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_answer.jsonl").write_text('{"question": "1+2"}\n')
    options = {name: str(home / "policy") if value == "POLICY" else value for name, value in options.items()}
    with pytest.raises(BadInput) as error:
        rl.main(rl.Config(**settings(home, tmp_path / "run", **options)), Env())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [
    "--alpha 1.5", "--estimator ppo", "--temperature 0", "--clip_eps 0.2", "--clip_eps -0.1 0.2", "--prm_lr nan",
    "--group_size 0", "--prm_score both"])
def test_options_out_of_range(words):
    with pytest.raises(BadInput) as error:
        sft.parse(rl.Config, words.split())
    assert words.split()[0] in str(error.value) and "\n" not in str(error.value)


def test_options_of_the_command_line():
    cfg = sft.parse(rl.Config, "--clip_eps 0.1 0.4 --mask_truncated --alpha 1 --estimator rloo".split())
    assert (cfg.clip_eps, cfg.mask_truncated, cfg.alpha, cfg.estimator) == ((0.1, 0.4), True, 1.0, "rloo")
