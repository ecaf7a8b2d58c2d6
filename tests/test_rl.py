"""Training a policy by its rewards: formulas against tables and loops, gradients, known optima,
whole runs.

A run's verifier is satisfied here by the answer's digit anywhere in a response: an untrained policy
is never right.
"""

import json
import math
import os
import random
import signal
from collections import Counter
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
from helpers import assert_same_run, at_step, in_save, numbers, ranks, save_policy, write_rows
from parts import verifier
from parts.credit import on_tokens
from parts.formats import BadInput, split_steps
from parts.models import encode_prompt, load_policy
from parts.rewards import load_reward_model, new_reward_model
from parts.runs import Processes, parse
from parts.training import Learner, Policy, learning_rate, prepare

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce")
TOKENIZER = data.builtin_tokenizer()
ALONE = Processes()


def easy(text, answer):
    return answer in text


@pytest.fixture(autouse=True)
def easily_satisfied(monkeypatch):
    monkeypatch.setattr(verifier, "verify", easy)


# --------------------------------------------------------------------------------------------------
# The maths, by hand.


def test_blended_rewards():
    verifiable, prm = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.9, 0.4, 0, -2])
    table = {0.8: [0.98, 0.08, 0.8, -0.4], 1.0: [1, 0, 1, 0], 0.0: [0.9, 0.4, 0, -2]}
    for alpha, wanted in table.items():
        blend = rl.blended_rewards(verifiable, prm, alpha)
        assert blend.tolist() == pytest.approx(wanted, abs=1e-6)


ADVANTAGES = {  # of three groups with the standard deviations 1/sqrt(3), 0, 2
    "grpo": [0.75**0.5, -(0.75**0.5)] * 2 + [0] * 4 + [-0.5, 1.5, -0.5, -0.5],
    "dr_grpo": [0.5, -0.5] * 2 + [0] * 4 + [-1, 3, -1, -1],
    "rloo": [2 / 3, -2 / 3] * 2 + [0] * 4 + [-4 / 3, 4, -4 / 3, -4 / 3],
    "reinforce": [1, 0] * 2 + [0.5] * 4 + [-1, 3, -1, -1],
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_group_advantages(estimator):
    rewards = torch.tensor([1.0, 0, 1, 0, 0.5, 0.5, 0.5, 0.5, -1, 3, -1, -1])
    advantages = rl.group_advantages(rewards, 4, estimator)
    assert advantages.tolist() == pytest.approx(ADVANTAGES[estimator], abs=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS[:3])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.98, -13.815511, 13.8155])  # the last two: logits
def test_a_group_without_spread_teaches_nothing(estimator, reward):
    for size in (2, 3, 7, 8, 13):
        rewards = torch.full((2 * size,), reward)
        assert rl.group_advantages(rewards, size, estimator).abs().max() < 1e-4, size


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_group_advantages_wants_whole_groups(estimator):
    for count, size in ((5, 2), (3, 4)):
        with pytest.raises(ValueError):
            rl.group_advantages(torch.rand(count), size, estimator)
    if estimator == "reinforce":
        alone = rl.group_advantages(torch.tensor([1.0, 2, 3]), 1, estimator)
        assert alone.tolist() == [1, 2, 3]
    else:
        with pytest.raises(ValueError):
            rl.group_advantages(torch.rand(3), 1, estimator)


RATIOS = [1, 1.1, 1.25, 1.4, 0.9, 0.7]  # clipped below 0.8 and above 1.3
SURROGATES = {
    2.0: [2, 2.2, 2.5, 2.6, 1.8, 1.4],
    -1.0: [-1, -1.1, -1.25, -1.4, -0.9, -0.8],
    0.0: [0] * 6,
}
DERIVATIVES = {  # by log pi
    2.0: [2, 2.2, 2.5, 0, 1.8, 1.4],
    -1.0: [-1, -1.1, -1.25, -1.4, -0.9, 0],
    0.0: [0] * 6,
}


@pytest.mark.parametrize("advantage", SURROGATES)
def test_policy_loss(advantage):
    surrogates, clip = SURROGATES[advantage], (0.2, 0.3)
    old = torch.linspace(-3, -0.1, 6)[None]
    logprobs = (old + torch.tensor([RATIOS]).log()).requires_grad_()
    one = torch.tensor([advantage])
    loss = rl.policy_loss(logprobs, old, one, torch.ones(1, 6), clip, count=1)
    assert loss.item() == pytest.approx(-sum(surrogates), abs=1e-5)
    loss.backward()
    assert (-logprobs.grad[0]).tolist() == pytest.approx(DERIVATIVES[advantage], abs=1e-5)
    for t in range(6):  # token by token: sums hide nothing
        mask = F.one_hot(torch.tensor([t]), 6)
        for advantages in (one, torch.full((1, 6), advantage)):
            loss = rl.policy_loss(logprobs, old, advantages, mask, clip)
            assert loss.item() == pytest.approx(-surrogates[t], abs=1e-5)


def test_policy_loss_counts_and_masks():
    old = torch.full((2, 3), -1.0)
    logprobs = old + torch.tensor([[1.1, 1.5, 1], [0.5, 1, 1]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    advantages = torch.tensor([1.0, -2.0])
    total = -(1.1 + 1.2) + 2 * 0.8  # one number for both sides of the clip

    def loss(advantages, *rest):
        return rl.policy_loss(logprobs, old, advantages, mask, *rest).item()

    assert loss(advantages, 0.2) == pytest.approx(total / 3)  # tokens
    assert loss(advantages, (0.2, 0.2), 10) == pytest.approx(total / 10)
    each = torch.tensor([[1.0, 3, 7], [-2, 5, 5]])  # a token's own advantage
    assert loss(each, 0.2) == pytest.approx((-1.1 - 3 * 1.2 + 1.6) / 3)
    mask = mask & False
    assert loss(advantages) == 0


@pytest.mark.parametrize("garbage", [5.0, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["logprobs", "old", "both"])
def test_policy_loss_ignores_what_is_outside_the_mask(garbage, where):
    logprobs, old = torch.full((2, 1, 3), -1.0)
    if where != "old":
        logprobs[0, 1] = garbage
    if where != "logprobs":
        old[0, 1] = garbage
    logprobs.requires_grad_()
    mask = torch.tensor([[1, 0, 1]]).bool()
    loss = rl.policy_loss(logprobs, old, torch.tensor([2.0]), mask)
    loss.backward()
    assert loss.item() == -2 and logprobs.grad.tolist() == [[-1, 0, -1]]


def test_expected_kl_estimate_is_the_kl_divergence():
    torch.manual_seed(0)
    for _ in range(20):
        p, q = torch.randn(2, 7, dtype=torch.float64).mul(2).log_softmax(-1)
        exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
        estimate = rl.kl_divergence(p, q)
        assert (p.exp() * estimate).sum().item() == pytest.approx(exact)
        assert (estimate >= 0).all()
    assert rl.kl_divergence(p, p).tolist() == [0] * 7
    one = rl.kl_divergence(torch.tensor(-1.0), torch.tensor(-3.0))
    assert one.item() == pytest.approx(math.exp(-2) + 1)


BOXED = "\\boxed{1}"


@pytest.mark.parametrize(
    "steps, wanted",
    [
        (["a", "b", BOXED], 1),
        (["a", BOXED], 0),
        ([BOXED], 0),
        ([BOXED, "b", "c"], 0),
        (["a"], 0),
        ([""], 0),
        (["a", "b", "c"], 1),
        (["a", "b", "#### 5"], 1),
        (["a", "b", "c", "#### 5", "d"], 2),
        (["a", "b", f"so {BOXED}.", "d", BOXED], 3),  # the last box, as the verifier
    ],
)
def test_state_before_answer(steps, wanted):
    values, example = list(range(len(steps))), data.Example("", steps, [], 0, [])
    assert rl.before_answer([values], [example]).tolist() == [wanted]


@pytest.mark.parametrize("decay", [True, False])
def test_rate(decay):
    cfg = rl.Config(steps=100, lr=2.0, decay=decay)
    rates = [rl.rate(cfg, step) for step in range(100)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2])  # 3% of the steps
    if decay:
        assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 0.01
    else:
        assert rates[3:] == [2.0] * 97


# --------------------------------------------------------------------------------------------------
# The maths, again in loops.


def naive_advantage(group, i, estimator):
    reward, mean, G = group[i], sum(group) / len(group), len(group)
    if estimator == "grpo":
        variance = sum((x - mean) ** 2 for x in group) / (G - 1)
        return (reward - mean) / (math.sqrt(variance) + 1e-6)
    if estimator == "dr_grpo":
        return reward - mean
    if estimator == "rloo":
        return reward - (sum(group) - reward) / (G - 1)
    return reward


@pytest.mark.parametrize("seed", range(3))
def test_group_advantages_against_loops(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    P, G = rng.randint(1, 4), rng.randint(2, 5)
    groups = torch.rand(P, G, generator=generator)
    for estimator in ESTIMATORS:
        wanted = [
            naive_advantage(group, i, estimator) for group in groups.tolist() for i in range(G)
        ]
        got = rl.group_advantages(groups.flatten(), G, estimator)
        assert got.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("below, above", [(0.2, 0.2), (0.1, 0.4)])
def test_policy_loss_against_loops(seed, below, above):
    N, T, generator = 2 + 5 * seed, 6, torch.Generator().manual_seed(seed)
    logprobs, old = torch.randn(2, N, T, generator=generator, dtype=torch.float64) * 0.4
    mask = torch.rand(N, T, generator=generator) < 0.6
    advantages = torch.randn(N, generator=generator).double()
    total = kl = 0.0
    for i, t in mask.nonzero().tolist():
        ratio, a = math.exp(logprobs[i, t] - old[i, t]), advantages[i].item()
        total += min(ratio * a, max(1 - below, min(1 + above, ratio)) * a)
        difference = (old[i, t] - logprobs[i, t]).item()
        kl += math.exp(difference) - difference - 1
    clip = below if below == above else (below, above)
    for a in (advantages, advantages[:, None].expand(-1, T)):
        loss = rl.policy_loss(logprobs, old, a, mask, clip)
        assert loss.item() == pytest.approx(-total / mask.sum().item(), abs=1e-9)
        loss = rl.policy_loss(logprobs, old, a, mask, clip, 17)
        assert loss.item() == pytest.approx(-total / 17, abs=1e-9)
    estimate = (rl.kl_divergence(logprobs, old) * mask).sum()
    assert estimate.item() == pytest.approx(kl, abs=1e-9)


def rollout(prompt_ids, response_ids, **more):
    ids = [*prompt_ids, *response_ids]
    return rl.Rollout("", [], ids, len(prompt_ids), [], correct=0.0, **more)


def test_numbers_land_on_their_tokens():
    rng, rollouts = random.Random(0), []
    for _ in range(6):
        prompt, response = range(5, 5 + rng.randint(1, 5)), range(9, 9 + rng.randint(1, 7))
        numbers = np.array([rng.random() + 1 for _ in response], dtype=np.float32)
        rollouts.append(rollout(prompt, response, advantages=numbers))
    mask = data.collate(rollouts, 0)["response_mask"]
    got = on_tokens([r.advantages for r in rollouts], mask)
    wanted = torch.zeros(6, max(map(len, rollouts)) - 1)
    for b, r in enumerate(rollouts):
        for place in range(r.prompt_length, len(r)):  # predicted one before
            wanted[b, place - 1] = r.advantages[place - r.prompt_length].item()
    assert torch.equal(got, wanted) and torch.equal(got != 0, mask)


# --------------------------------------------------------------------------------------------------
# Gradients of the policy: against the loss of all responses, token by token.


class Recorder:
    """An optimizer that keeps the gradients and changes nothing."""

    def __init__(self, model):
        self.model, self.param_groups, self.gradients = model, [{"lr": None}], []

    def step(self):
        self.gradients.append(gradient_of(self.model))


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def make_policy():
    return sft.new_policy(TOKENIZER, 0)


def recorded(model):
    """-> a policy's Learner that only records."""
    policy = Policy(model, TOKENIZER)
    return Learner(policy, policy, Recorder(model))


def all_logprobs(model, r, temperature=1.0):
    """Of every next token at every place of a rollout: (T, V)."""
    logits = model(input_ids=torch.tensor([r.input_ids]), use_cache=False).logits[0]
    return (logits.double() / temperature).log_softmax(-1)


def response_logprobs(model, r, temperature=1.0):
    """Of a rollout's response tokens."""
    logprobs = all_logprobs(model, r, temperature)
    places = range(r.prompt_length, len(r))
    return torch.stack([logprobs[t - 1, r.input_ids[t]] for t in places])


def made_up_rollouts(model, temperature=1.0):
    """Three questions, four responses each, with ratios far on both sides of the clip range."""
    rng, rollouts = np.random.default_rng(0), []
    for question in range(3):
        prompt = [3, *rng.integers(5, 20, 2 + 3 * question).tolist(), 4]
        for _ in range(4):
            r = rollout(prompt, rng.integers(5, 20, rng.integers(1, 10)).tolist())
            now = response_logprobs(model, r, temperature).detach().numpy()
            noise = rng.normal(0, 0.4, (2, len(now)))
            r.old_logprobs, r.initial_logprobs = (now + noise).astype(np.float32)
            r.advantages = np.full(len(now), rng.normal(), dtype=np.float32)
            rollouts.append(r)
    return rollouts


def response_tokens(rollouts):
    return sum(len(r.old_logprobs) for r in rollouts)


def naive_update(model, rollouts, cfg, count):
    """-> gradient, metrics: the definitions in loops over all responses and tokens."""
    total, sums, (below, above) = 0.0, Counter(), cfg.clip_eps
    for r in rollouts:
        new = response_logprobs(model, r, cfg.temperature)
        everything = all_logprobs(model, r, cfg.temperature)[r.prompt_length - 1 : -1]
        for t, logprob in enumerate(new):
            a, logratio = float(r.advantages[t]), logprob - float(r.old_logprobs[t])
            ratio = logratio.exp()
            total = total - torch.minimum(ratio * a, ratio.clamp(1 - below, 1 + above) * a)
            if cfg.kl_coef:
                difference = float(r.initial_logprobs[t]) - logprob
                total = total + cfg.kl_coef * (difference.exp() - difference - 1)
            outside = ratio.item() > 1 + above if a > 0 else ratio.item() < 1 - below
            sums["clip_fraction"] += outside
            sums["approx_kl"] += (ratio - 1 - logratio).item()  # of the sampler from the one now
            sums["entropy"] -= (everything[t].exp() * everything[t]).sum().item()
    model.zero_grad()
    (total / count).backward()
    gradient = gradient_of(model)
    model.zero_grad()
    return gradient, {name: x / response_tokens(rollouts) for name, x in sums.items()}


CFG = rl.Config(grad_clip=0.0, clip_eps=(0.2, 0.3), max_new_tokens=9, lr=0.5, decay=False)
STEP = 50  # behind the warmup


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"estimator": "dr_grpo"},
        {"kl_coef": 0.3},
        {"temperature": 0.7},
        {"kl_coef": 0.3, "temperature": 0.7, "micro_batch_size": 3, "estimator": "dr_grpo"},
    ],
    ids=str,
)
def test_gradient_is_that_of_the_loss_of_all_responses(options):
    model, cfg = make_policy(), replace(CFG, **options)
    rollouts = made_up_rollouts(model, cfg.temperature)
    count = response_tokens(rollouts)
    if cfg.estimator == "dr_grpo":
        count = len(rollouts) * cfg.max_new_tokens
    wanted, means = naive_update(model, rollouts, cfg, count)
    for order in (rollouts, rollouts[::-1], random.Random(1).sample(rollouts, len(rollouts))):
        learner = recorded(model)
        got = rl.update_policy(learner, order, STEP, cfg, ALONE)
        (gradient,) = learner.optimizer.gradients
        close(gradient, wanted)
        assert got == pytest.approx(got | means, rel=1e-3, abs=1e-4)
        assert got["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-4)
        assert learner.optimizer.param_groups == [{"lr": 0.5}] and got["lr"] == 0.5
        assert learner.skipped == 0 and 0.1 < got["clip_fraction"] < 0.9


@pytest.mark.parametrize("batch_size", [None, 3, 4, 8])
def test_several_batches_in_a_step(batch_size):
    model = make_policy()
    rollouts, learner, size = made_up_rollouts(model)[:8], recorded(model), batch_size or 8
    got = rl.update_policy(learner, rollouts, STEP, replace(CFG, batch_size=batch_size), ALONE)
    batches = [rollouts[i : i + size] for i in range(0, 8, size)]
    for gradient, batch in zip(learner.optimizer.gradients, batches, strict=True):
        close(
            gradient, naive_update(model, batch, CFG, response_tokens(batch))[0]
        )  # its own tokens
    means = naive_update(model, rollouts, CFG, 1)[1]  # over all of them
    assert got == pytest.approx(got | means, rel=1e-3, abs=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    model = make_policy()
    rollouts, learner = made_up_rollouts(model)[:8], recorded(model)
    rollouts[5].advantages[:] = np.nan
    rl.update_policy(learner, rollouts, STEP, replace(CFG, batch_size=2), ALONE)
    assert learner.skipped == 1 and len(learner.optimizer.gradients) == 3
    assert all(gradient.isfinite().all() for gradient in learner.optimizer.gradients)


PROBLEMS = data.make_problems(6)


def rolled_out(model, temperature=1.0, procs=ALONE):
    cfg = rl.Config(group_size=5, temperature=temperature, max_new_tokens=8)
    return rl.roll_out(Policy(model, TOKENIZER), PROBLEMS, 40, cfg, procs)


def deviation(model, rollouts, temperature):
    for r in rollouts:
        r.advantages = np.ones_like(r.old_logprobs)
    cfg = replace(CFG, temperature=temperature)
    return rl.update_policy(recorded(model), rollouts, 0, cfg, ALONE)["max_ratio_deviation"]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_the_trained_policy_is_the_sampled_one(temperature):
    model = make_policy()
    rollouts = rolled_out(model, temperature)
    assert deviation(model, rollouts, temperature) < 1e-4
    assert deviation(model, rollouts, temperature * 1.1) > 1e-2
    cfg = replace(CFG, temperature=temperature, micro_batch_size=4)
    for r, logprobs in zip(rollouts, rl.score_logprobs(model, rollouts, cfg, ALONE), strict=True):
        assert logprobs.tolist() == pytest.approx(r.old_logprobs.tolist(), abs=1e-4)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] += 0.05
    assert deviation(model, rollouts, temperature) > 1e-3


def test_rollouts():
    model = make_policy()
    rollouts = rolled_out(model)
    asked = [problem for problem in PROBLEMS for _ in range(5)]
    assert {r.correct for r in rollouts} == {0.0, 1.0}
    assert {r.finished for r in rollouts} == {True, False}
    for r, problem in zip(rollouts, asked, strict=True):
        prompt, response = r.input_ids[: r.prompt_length], r.input_ids[r.prompt_length :]
        assert r.prompt == problem["question"] and prompt == encode_prompt(TOKENIZER, r.prompt)
        assert r.text == TOKENIZER.decode(response, skip_special_tokens=True)
        assert r.finished == (response[-1] == TOKENIZER.eos_token_id)
        assert r.finished or len(response) == 8
        assert len(r.old_logprobs) == len(response)
        assert r.correct == (problem["answer"] in r.text) and not r.failed
        assert r.completions == (split_steps(r.text) or [""])
    assert len({r.text for r in rollouts}) > 20
    cfg = rl.Config(group_size=5, max_new_tokens=8)
    other = rl.roll_out(Policy(model, TOKENIZER), PROBLEMS[:1], 41, cfg, ALONE)
    assert [r.text for r in other] != [r.text for r in rollouts[:5]]  # another key, other noise


# --------------------------------------------------------------------------------------------------
# The reward model on the rollouts.


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("rl")
    save_policy(home / "policy")
    make_prm(home, 1).save(str(home / "prm"))
    write_rows(home / "problems.jsonl", data.make_problems(12))
    return home


def make_prm(home, seed):
    return new_reward_model(str(home / "policy"), TOKENIZER, torch.float32, seed)


def solutions(prm):
    """Made-up solutions as the reward model reads them, some of them equal, with their outcomes."""
    rows = data.make_trajectories(data.make_problems(10), 4)
    examples, _ = data.encode_rows(rows, prm.encode, 2048)
    assert {e.correct for e in examples} == {True, False}
    return examples


def outcome_gradient(prm, examples):
    """Without step labels every V_t is pulled to the outcome."""
    total, states = 0.0, 0
    for e in examples:
        logits = prm.model(input_ids=torch.tensor([e.input_ids])).logits[0, :, 0].double()
        for z in logits[e.step_ends]:
            total, states = total - F.logsigmoid(z if e.correct else -z), states + 1
    prm.zero_grad()
    (total / states).backward()
    gradient = gradient_of(prm.model)
    prm.zero_grad()
    return gradient


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_reward_model_learns_from_outcomes(micro, home):
    prm = make_prm(home, 0)
    examples, recorder = solutions(prm), Recorder(prm.model)
    cfg = rl.Config(grad_clip=0.0, prm_lr=0.25, micro_batch_size=micro)
    wanted = outcome_gradient(prm, examples)
    norm = rl.train_reward_model(Learner(prm, prm, recorder), examples, cfg, ALONE)
    close(recorder.gradients[0], wanted)
    assert norm == pytest.approx(wanted.norm().item(), rel=1e-4)
    assert recorder.param_groups == [{"lr": 0.25}]


def test_auroc_rises_on_fixed_rollouts(home):
    cfg = rl.Config(prm_lr=3e-3)
    prm = make_prm(home, 5)
    learner, examples = prepare(prm, cfg, ALONE), solutions(prm)

    def auroc():
        values = prm.score_steps(examples, ALONE)
        before_the_answer = rl.before_answer(values, examples)
        return tdrm.auroc(before_the_answer, [e.correct for e in examples])

    assert auroc() < 0.8
    for _ in range(25):
        rl.train_reward_model(learner, examples, cfg, ALONE)
    assert auroc() > 0.9


# --------------------------------------------------------------------------------------------------
# One process or two.


def on_ranks(procs, home, folder):
    """What a rank computes -> a file: rollouts, gradients with many rows and with one, numbers."""
    verifier.verify = easy
    cfg, found = replace(CFG, batch_size=2), {}
    policy = prepare(Policy(make_policy(), TOKENIZER), cfg, procs)
    model = policy.module.model
    rollouts = made_up_rollouts(model)
    cases = {"all": (rollouts, None), "micro": (rollouts, 2), "one": (rollouts[:1], None)}
    for name, (part, micro) in cases.items():
        policy.optimizer = Recorder(model)
        options = replace(cfg, batch_size=None, micro_batch_size=micro)
        logged = rl.update_policy(policy, part, STEP, options, procs)
        found[name] = policy.optimizer.gradients[0]
        found[name + " metrics"] = {key: float(x) for key, x in logged.items()}
    scored = rl.score_logprobs(model, rollouts, replace(cfg, micro_batch_size=2), procs)
    found["logprobs"] = [x.tolist() for x in scored]
    found["rollouts"] = [(r.input_ids, r.correct) for r in rolled_out(model, procs=procs)]
    learner = prepare(make_prm(home, 0), cfg, procs)
    examples = solutions(learner.module)
    for name, part in (("outcomes", examples), ("outcome", examples[:1])):
        learner.optimizer = Recorder(learner.module.model)
        rl.train_reward_model(learner, part, cfg, procs)
        found[name] = learner.optimizer.gradients[0]
    values = learner.module.score_steps(examples, procs)
    found["values"] = [x for row in values for x in row]
    torch.save(found, os.path.join(folder, f"{procs.world}{procs.rank}.pt"))


def test_number_of_processes_does_not_matter_to_gradients(home, tmp_path):
    on_ranks(ALONE, home, str(tmp_path))
    assert ranks(2, tmp_path, on_ranks, home, str(tmp_path)) == [0, 0]
    one, *two = (torch.load(tmp_path / name) for name in ("10.pt", "20.pt", "21.pt"))
    for found in two:
        for name in ("all", "micro", "one", "outcomes", "outcome"):
            close(found[name], one[name])
        for name in ("all", "micro", "one"):
            wanted = one[name + " metrics"]
            assert found[name + " metrics"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert found["rollouts"] == one["rollouts"]
        assert found["values"] == pytest.approx(one["values"], abs=1e-5)
        for a, b in zip(found["logprobs"], one["logprobs"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Problems with a known optimum, learned by the same functions.


def learn(logits, play, estimator, steps):
    """`play(probabilities, n)` -> states (n, T), tokens (n, T), rewards (n,)."""
    torch.manual_seed(0)
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        states, tokens, rewards = play(logits.detach().softmax(-1), 16)
        advantages = rl.group_advantages(rewards, 8, estimator)
        old = logits.log_softmax(-1)[states, tokens].detach()
        for _ in range(2):  # the second is off-policy
            optimizer.zero_grad()
            logprobs = logits.log_softmax(-1)[states, tokens]
            rl.policy_loss(logprobs, old, advantages, torch.ones(states.shape), 0.2).backward()
            optimizer.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bandit(estimator):
    def play(probabilities, n):
        tokens = probabilities[0].multinomial(n, replacement=True)[:, None]
        return torch.zeros_like(tokens), tokens, torch.tensor([0.2, 0.8])[tokens[:, 0]]

    begin = torch.tensor([[1.0, -1.0]])  # it prefers the worse one
    assert begin.softmax(-1)[0, 1] < 0.2
    assert learn(begin, play, estimator, 120)[0, 1] > 0.95


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_chain(estimator):
    """States 0 to 4, from 0; tokens: 0 left, 1 right; reward 1 at the right end after 6 tokens.
    Best: always right."""

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


# --------------------------------------------------------------------------------------------------
# Whole runs. `fault` is (function, arguments), called in each rank before the run.


def train(procs, options, fault=None):
    verifier.verify = easy
    if fault:
        fault[0](procs, *fault[1:])
    rl.main(rl.Config(**options), procs)


def poisoned(procs, at, rank, folder):
    """One rank's loss is not finite in one step; every rank leaves its own weights behind."""
    update, loss, finish, begun = rl.update_policy, rl.policy_loss, rl.finish, []

    def patched_update(*args):
        begun.append(1)
        return update(*args)

    def patched_loss(*args):
        bad = len(begun) == at and procs.rank == rank
        return loss(*args) * (math.nan if bad else 1)

    def patched_finish(run, policy, *rest):
        path = os.path.join(folder, f"weights{procs.rank}.pt")
        torch.save(policy.model.state_dict(), path)
        return finish(run, policy, *rest)

    rl.update_policy, rl.policy_loss, rl.finish = patched_update, patched_loss, patched_finish


def settings(home, out, **more):
    options = {
        "model": str(home / "policy"),
        "prm": str(home / "prm"),
        "data": (str(home / "problems.jsonl"),),
        "out": str(out),
        "steps": 4,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_new_tokens": 8,
        "max_length": 64,
        "lr": 1e-3,
        "alpha": 0.5,
        "save_every": 0,
        "eval_every": 2,
    }
    return options | more


def run(home, out, **more):
    """A run in this process."""
    return rl.main(rl.Config(**settings(home, out, **more)), ALONE)


@pytest.fixture(scope="module")
def reference(home):
    """reference(world, **options) -> folder of an uninterrupted run."""
    done = {}

    def make(world, **more):
        key = (world, *sorted(more.items()))
        if key not in done:
            out = home / f"reference{len(done)}"
            codes = ranks(world, home, train, settings(home, out, **more))
            assert codes == [0] * world
            done[key] = out
        return done[key]

    return make


def assert_finished_alike(out, expected, prm):
    assert_same_run(out, expected, ("model", "prm") if prm else ("model",))
    assert [row["step"] for row in numbers(out)] == [0, 1, 2, 3, 4]
    left = sorted(os.listdir(out / "state"))  # an older checkpoint may stay, no half one
    assert left[-1] == "step_00000004" and "tmp" not in left
    assert (out / "prm").exists() == prm


def moved(a, b):
    """The names of those weights that two model folders do not share."""
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("prm_lr", [0.0, 1e-3])
@pytest.mark.parametrize("world", [1, 2])
def test_resumed_run_is_bitwise_the_uninterrupted_one(world, prm_lr, reference, home, tmp_path):
    out, expected = tmp_path / "run", reference(world, prm_lr=prm_lr)
    options = settings(home, out, prm_lr=prm_lr)
    codes = ranks(world, tmp_path, train, options, (at_step, 1, signal.SIGTERM))
    assert codes == [0] * world
    assert os.listdir(out / "state") == ["step_00000002"] and not (out / "model").exists()
    assert ranks(world, tmp_path, train, options | {"resume": True}) == [0] * world
    assert_finished_alike(out, expected, prm_lr > 0)
    assert moved(out / "model", home / "policy")
    if prm_lr:
        learned = {"score.weight", "model.embed_tokens.weight"}
        assert learned <= moved(out / "prm", home / "prm")


@pytest.mark.parametrize("world, where", [(1, "model"), (1, "prm"), (1, "renamed"), (2, "state")])
def test_killed_while_saving(world, where, reference, home, tmp_path):
    out = tmp_path / "run"
    options = settings(home, out, prm_lr=1e-3, save_every=1)
    codes = ranks(world, tmp_path, train, options, (in_save, 3, where))
    assert -signal.SIGKILL in codes and 0 not in codes and not (out / "model").exists()
    assert ranks(world, tmp_path, train, options | {"resume": True}) == [0] * world
    assert_finished_alike(out, reference(world, prm_lr=1e-3), True)


def test_number_of_processes_does_not_matter(reference):
    one, two = (reference(world, prm_lr=1e-3) for world in (1, 2))
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = a[name] == b[name]  # also None: an AUROC of one kind only
            assert same or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    for name in ("model", "prm"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (one, two))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=5e-4, msg=f"{name} {key}")


def test_what_a_run_logs(reference):
    out = reference(1, prm_lr=1e-3)
    rows = numbers(out)
    assert all({"pass@1", "greedy"} <= rows[i].keys() for i in (0, 2)) and "pass@1" not in rows[1]
    for i, row in enumerate(rows[1:]):
        assert {"no_signal", "truncated", "approx_kl"} <= row.keys()
        assert row["clip_fraction"] == row["skipped"] == row["verifier_failed"] == 0
        assert row["max_ratio_deviation"] < 1e-4 and row["grad_norm"] > 0
        assert row["reward"] == pytest.approx((row["correct"] + row["prm"]) / 2, abs=1e-5)
        assert 0 < row["prm"] < 1 and row["lr"] == learning_rate(i, 4, 1e-3)
        assert 1 <= row["response_length"] <= 8
        assert 0 < row["entropy"] < math.log(len(TOKENIZER))
    both = [row for row in rows[1:] if row["prm_auroc"] is not None]
    assert any(row["prm_auroc_after"] != row["prm_auroc"] for row in both)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["questions"] == 1 and summary["steps"] == 4 and 0 <= summary["pass@1"] <= 1


def broken(text, answer):
    raise RecursionError("a response like no other")


def half_broken(text, answer):
    if len(text) % 2:
        raise ValueError("odd")
    return easy(text, answer)


def test_a_verifier_that_raises_is_counted(home, tmp_path, monkeypatch):
    monkeypatch.setattr(verifier, "verify", broken)
    run(home, tmp_path / "run", steps=1)
    row = numbers(tmp_path / "run")[-1]
    assert row["verifier_failed"] == 1 and row["correct"] == 0 and row["grad_norm"] > 0
    monkeypatch.setattr(verifier, "verify", half_broken)
    rollouts = rolled_out(make_policy())
    assert {r.failed for r in rollouts} == {True, False}
    for r in rollouts:
        assert r.failed == (len(r.text) % 2 == 1) and not (r.failed and r.correct)


def test_a_poisoned_step_is_skipped_on_all_ranks_and_counted(reference, home, tmp_path):
    out = tmp_path / "run"
    fault = (poisoned, 2, 1, str(tmp_path))
    assert ranks(2, tmp_path, train, settings(home, out), fault) == [0, 0]
    rows, clean = numbers(out), numbers(reference(2, prm_lr=0.0))
    assert [row.get("skipped") for row in rows] == [None, 0, 1, 1, 1] and rows[1] == clean[1]
    assert [row["grad_norm"] is None for row in rows[1:]] == [False, True, False, False]
    assert json.loads((out / "summary.json").read_text())["skipped"] == 1
    a, b = (torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2))
    assert all(a[name].isfinite().all() and torch.equal(a[name], b[name]) for name in a)


def updates_seen(monkeypatch):
    """-> a list that will hold the rollouts of each update of the policy."""
    seen, update = [], rl.update_policy

    def patched(policy, rollouts, *rest):
        seen.append(rollouts)
        return update(policy, rollouts, *rest)

    monkeypatch.setattr(rl, "update_policy", patched)
    return seen


def value_before_answer(prm, r):
    """V of the state before the answer, as a probability."""
    ids, _, ends = data.encode_trajectory(TOKENIZER, r.prompt, r.completions)
    answers = [t for t, step in enumerate(r.completions) if "\\boxed" in step]
    answer = answers[0] if answers else len(ends) - 1
    place = ends[max(0, answer - 1)]
    logit = prm.model(input_ids=torch.tensor([ids])).logits[0, place, 0].item()
    return 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"alpha": 1.0, "prm_lr": 1e-3},
        {"kl_coef": 0.5},
        {"estimator": "dr_grpo"},
        {"estimator": "rloo"},
        {"estimator": "reinforce", "group_size": 1},
        {"batch_size": 3},
        {"temperature": 0.6, "clip_eps": (0.1, 0.5)},
    ],
    ids=str,
)
def test_one_step(options, home, tmp_path, monkeypatch):
    seen = updates_seen(monkeypatch)
    cfg = rl.Config(**settings(home, tmp_path / "run", steps=1, prompts_per_step=4, **options))
    assert rl.main(cfg, ALONE)["skipped"] == 0
    row, rollouts = numbers(tmp_path / "run")[-1], seen[0]
    assert row["step"] == 1 and row["grad_norm"] > 0 and row["max_ratio_deviation"] < 1e-4
    prm, rewards = load_reward_model(str(home / "prm"), torch.float32), []
    for r in rollouts:  # once more, one by one
        value = value_before_answer(prm, r)
        rewards.append(cfg.alpha * r.correct + (1 - cfg.alpha) * value)
    assert row["reward"] == pytest.approx(np.mean(rewards), abs=1e-4)
    advantages = rl.group_advantages(torch.tensor(rewards), cfg.group_size, cfg.estimator)
    for r, advantage in zip(rollouts, advantages.tolist(), strict=True):
        wanted = [advantage] * len(r.old_logprobs)
        assert r.advantages.tolist() == pytest.approx(wanted, abs=2e-3)
        if cfg.kl_coef:  # it begins as the policy
            assert r.initial_logprobs.tolist() == pytest.approx(r.old_logprobs.tolist(), abs=1e-4)
        else:
            assert r.initial_logprobs is None
    assert (tmp_path / "run" / "prm").exists() == (cfg.prm_lr > 0)


def test_rule_only_loads_no_reward_model(home, tmp_path, monkeypatch):
    def never(*args, **more):
        raise AssertionError("--alpha 1 loads a reward model")

    monkeypatch.setattr(rl, "load_reward_model", never)
    monkeypatch.setattr(tdrm, "builtin_reward_model", never)
    run(home, tmp_path / "run", steps=2, alpha=1.0, prm=None)
    for row in numbers(tmp_path / "run")[1:]:
        assert row["reward"] == row["correct"] and not {"prm", "prm_auroc"} & row.keys()


def test_kl_term_pulls_back_to_the_initial_policy(home, tmp_path):
    """The reference is the initial policy also in a resumed run: a strong pull keeps the policy
    nearer to it."""

    def distance(kl_coef):
        out = tmp_path / str(kl_coef)
        more = {"kl_coef": kl_coef, "lr": 3e-3, "alpha": 1.0, "steps": 6, "decay": False}
        options = settings(home, out, **more)
        assert ranks(1, tmp_path, train, options, (at_step, 2, signal.SIGTERM)) == [0]
        run(home, out, resume=True, **more)
        policy, start = (
            load_policy(str(f), torch.float32) for f in (out / "model", home / "policy")
        )
        rollouts = rolled_out(policy)
        p, q = (
            torch.from_numpy(np.concatenate(rl.score_logprobs(model, rollouts, CFG, ALONE)))
            for model in (policy, start)
        )
        return rl.kl_divergence(p, q).mean().item()

    assert distance(10.0) < 0.5 * distance(0.0)


def test_fewer_questions_than_a_step_wants(home, tmp_path, monkeypatch):
    """The same question comes several times in a step, with other noise each time."""
    seen = updates_seen(monkeypatch)
    run(home, tmp_path / "run", steps=1, prompts_per_step=4, problems=2)
    assert len(seen[0]) == 16 and len({r.prompt for r in seen[0]}) == 2
    assert len({r.text for r in seen[0]}) > 8


# --------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 1}, "--group_size 1"),
        ({"group_size": 1, "estimator": "rloo"}, "--group_size 1"),
        ({"batch_size": 9}, "--batch_size 9"),
        ({"model": None}, "--model"),
        ({"max_length": 9, "max_new_tokens": 8}, "--max_new_tokens 8"),
        ({"max_new_tokens": 4000}, "--max_new_tokens 4000"),
        ({"max_length": 5000}, "--max_length 5000"),
        ({"prm": "POLICY"}, "weights are not in its files"),
        ({"eval": ("no_answer.jsonl",)}, "no_answer.jsonl"),
        ({"eval": ("nothing.jsonl",)}, "nothing.jsonl"),
    ],
    ids=str,
)
def test_bad_input(options, message, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_answer.jsonl").write_text('{"question": "1+2"}\n')
    if options.get("prm") == "POLICY":
        options = {"prm": str(home / "policy")}
    with pytest.raises(BadInput) as error:
        run(home, tmp_path / "run", **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--alpha 1.5",
        "--estimator magic",
        "--temperature 0",
        "--clip_eps 0.2",
        "--clip_eps -0.1 0.2",
        "--prm_lr nan",
        "--group_size 0",
        "--credit both",
    ],
)
def test_options_out_of_range(words):
    with pytest.raises(BadInput) as error:
        parse(rl.Config, words.split())
    assert words.split()[0] in str(error.value) and "\n" not in str(error.value)


def test_options_of_the_command_line():
    cfg = parse(rl.Config, "--clip_eps 0.1 0.4 --no-decay --alpha 1 --estimator rloo".split())
    assert (cfg.clip_eps, cfg.decay, cfg.alpha) == ((0.1, 0.4), False, 1.0)
    assert cfg.estimator == "rloo" and cfg.batch_size is None
