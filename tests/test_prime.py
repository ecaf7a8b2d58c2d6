"""PRIME: the maths against naive loops, the implicit PRM against plain autograd, whole runs on one
and on two ranks.

A random policy is never right, so in the runs the verifier looks at the parity of a response's
length: nonsense, but a function of the text alone.
"""

import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import prime_minimal as prime
import rl_minimal as rl
from helpers import assert_same_run, at_step, numbers, ranks, save_policy, write_rows
from parts import verifier
from parts.credit import last_token, returns, stack
from parts.models import load_policy, load_tokenizer
from parts.runs import Processes
from parts.training import Learner, Policy, prepare
from test_rl import Recorder, gradient_of, moved, response_logprobs, rollout
from test_rl_tokens import naive_returns, parity, ragged, tensors

# A worked example: K = 4.
Q = [[0.2, -0.1, 0.3], [-0.2, 0.1, -0.3, -0.1], [0.05, -0.15], [0.1, 0, 0.1]]
RIGHT = torch.tensor([1.0, 0, 0, 1])
WHITENED = ("rloo", "rloo_code", "value")
ESTIMATORS = (*WHITENED, "grpo", "reinforce")
ALONE, TOKENIZER = Processes(), data.builtin_tokenizer()


def responses_of(seed, n):
    """Random ragged rows, their beginnings, outcomes."""
    outcomes = np.random.default_rng(seed + 100).integers(0, 2, n)
    return *ragged(seed, n), torch.tensor(outcomes).float()


# --------------------------------------------------------------------------------------------------
# Advantages.

PROCESS_RETURNS = {
    "rloo": [
        *(1.0167, 0.5444, 0.6722),
        *(-1.4, -0.9, -1.0, -0.3),
        *(-0.3, -0.35),
        *(0.4833, 0.2556, 0.2278),
    ],
    "rloo_code": [
        *(1.0167, 0.5, 0.7833),
        *(-1.4, -0.85, -1.1, -0.2833),
        *(-0.3, -0.4167),
        *(0.4833, 0.2333, 0.25),
    ],
}
RLOO_CODE = [
    *(1.2577, 0.8913, 1.0922),
    *(-1.4015, -1.0115, -1.1888, -0.6096),
    *(-0.6215, -0.7042),
    *(0.8795, 0.7022, 0.714),
]


@pytest.mark.parametrize("estimator", PROCESS_RETURNS)
def test_worked_example(estimator, monkeypatch):
    process, mask = tensors(Q)
    wanted = PROCESS_RETURNS[estimator]

    def advantages(process, outcomes=RIGHT, weight=1.0):
        return prime.prime_advantages(process, outcomes, mask, 4, estimator, weight)[mask]

    whitened = advantages(process)
    if estimator == "rloo_code":
        assert whitened.tolist() == pytest.approx(RLOO_CODE, abs=1e-4)
    normal = prime.normalise(process, mask)
    torch.testing.assert_close(normal, process / 0.5, rtol=1e-5, atol=0)
    monkeypatch.setattr(prime, "whiten", lambda advantages, mask: advantages)
    assert advantages(process, RIGHT * 0).tolist() == pytest.approx(wanted, abs=1e-4)
    outcome = advantages(process, weight=0.0)
    signs = [2 / 3] * 3 + [-2 / 3] * 6 + [2 / 3] * 3
    assert outcome.tolist() == pytest.approx(signs, abs=1e-6)
    both = torch.tensor(wanted) + outcome
    both = (both - both.mean()) / both.std()
    torch.testing.assert_close(both, whitened, rtol=0, atol=2e-4)


def naive_streams(rows, o, i, K, estimator):
    """The two streams of response i, before they are summed up: rewards of its tokens, outcome."""
    group = range(i // K * K, i // K * K + K)
    rbar = [sum(rows[j]) / len(rows[j]) for j in group]
    outcomes, me = [o[j] for j in group], i - group[0]

    def without_me(x):
        return (sum(x) - x[me]) / (K - 1)

    def std(x):
        return np.std(x, ddof=1) + 1e-6

    if estimator == "rloo":
        return [r - without_me(rbar) for r in rows[i]], o[i] - without_me(outcomes)
    if estimator == "rloo_code":
        stretch = K / (K - 1)
        process = [stretch * r - sum(rbar) / (K - 1) for r in rows[i]]
        return process, stretch * o[i] - sum(outcomes) / (K - 1)
    if estimator == "grpo":
        process = [(r - np.mean(rbar)) / std(rbar) for r in rows[i]]
        return process, (o[i] - np.mean(outcomes)) / std(outcomes)
    return rows[i], o[i]


def naive_advantages(rows, o, K, estimator, weight):
    """The definitions as sums over single numbers -> a list for each row."""
    rows, o, result = [[float(x) for x in row] for row in rows], o.tolist(), []
    if estimator != "value":
        largest = max(abs(x) for row in rows for x in naive_returns(row, 1.0))
        rows = [[x / (largest + 1e-6) for x in row] for row in rows]
    for i, row in enumerate(rows):
        process, outcome = naive_streams(rows, o, i, K, estimator)
        stream = naive_returns(process, 1.0)
        if estimator == "value":
            stream = [-sum(row[:t]) for t in range(len(row))]
        result.append([weight * x + outcome for x in stream])
    if estimator in WHITENED:
        tokens = np.concatenate(result)
        deviation = math.sqrt(np.var(tokens, ddof=1) + 1e-8)
        result = [[(a - tokens.mean()) / deviation for a in row] for row in result]
    return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_are_those_of_naive_loops(estimator, K, seed):
    rows, starts, outcomes = responses_of(seed, 12)
    process, mask = tensors(rows, starts, filler=7.0)
    got = prime.prime_advantages(process, outcomes, mask, K, estimator, 0.7)
    wanted, _ = tensors(naive_advantages(rows, outcomes, K, estimator, 0.7), starts)
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-3, atol=2e-4)
    assert (got[~mask] == 0).all()
    assert (process[~mask] == 7).all()  # the input stays as it was


def test_groups_of_one():
    process, mask = tensors(Q)
    alone = prime.prime_advantages(process, RIGHT, mask, 1, "reinforce")
    wanted = returns(prime.normalise(process, mask), mask) + RIGHT[:, None]
    torch.testing.assert_close(alone, wanted * mask)


@pytest.mark.parametrize("estimator, K", [("rloo", 3), ("reinforce", 3), ("ppo", 4), ("x", 4)])
def test_no_such_groups_or_estimator(estimator, K):
    process, mask = tensors(Q)
    for group_size in (K, 1):
        if (estimator, group_size) != ("reinforce", 1):
            with pytest.raises(ValueError):
                prime.prime_advantages(process, RIGHT, mask, group_size, estimator)


@pytest.mark.parametrize("estimator", ["rloo_code", "grpo", "value"])
def test_other_estimators_want_two_in_a_group(estimator):
    process, mask = tensors(Q)
    with pytest.raises(ValueError):
        prime.prime_advantages(process, RIGHT, mask, 1, estimator)


@pytest.mark.parametrize("estimator", WHITENED)
def test_whitened_over_all_tokens(estimator):
    rows, starts, outcomes = responses_of(5, 12)
    process, mask = tensors(rows, starts)
    process[:4] *= 100  # groups of unlike scale are not whitened apart
    a = prime.prime_advantages(process, outcomes, mask, 4, estimator)
    moments = a[mask].mean().item(), a[mask].var().item()
    assert moments == pytest.approx((0, 1), abs=1e-4)
    assert abs(a[:4][mask[:4]].var().item() - 1) > 0.1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_beta_cancels_unless_the_prm_is_the_value_model(estimator):
    process, mask = tensors(Q)
    a, b = (prime.prime_advantages(beta * process, RIGHT, mask, 4, estimator) for beta in (0.05, 3))
    tolerance = 2e-3 if estimator == "grpo" else 2e-4
    assert torch.allclose(a, b, atol=tolerance) == (estimator != "value")


def test_normaliser_and_its_floor():
    process, mask = tensors([[3.0, -1, -1], [-2, -2]], [0, 1])
    torch.testing.assert_close(prime.normalise(process, mask), process / 4)  # |-2 - 2|, not |3|
    for scale, zero in ((2e-4, True), (2.4e-4, True), (2.6e-4, False)):
        assert (prime.normalise(process * scale, mask) == 0).all() == zero
    assert (prime.normalise(process * 2e-4, mask, floor=1e-4) != 0).any()
    tiny = process * 1e-6  # rounding: as if there were no process reward
    outcomes = torch.tensor([1.0, 0])
    for estimator in ("rloo", "rloo_code", "reinforce", "grpo"):
        a, b = (prime.prime_advantages(p, outcomes, mask, 2, estimator) for p in (tiny, tiny * 0))
        assert torch.equal(a, b)


@pytest.mark.parametrize("starts", [[0, 0], [2, 1]])
def test_the_last_token_keeps_its_process_reward(starts):
    logprobs, mask = tensors([[-1.0, -2, -3], [-1, -4]], starts)
    process = prime.implicit_rewards(logprobs, torch.zeros(logprobs.shape), mask, 0.5)
    assert process[mask].tolist() == [-0.5, -1, -1.5, -0.5, -2]
    assert returns(process, mask)[mask].tolist() == [-3, -2.5, -1.5, -2.5, -2]
    ends = last_token(mask)
    other = process + ends * torch.tensor([[1.0], [2.0]])
    for estimator in ("rloo", "rloo_code", "reinforce"):
        a, b = (prime.prime_advantages(p, RIGHT[:2], mask, 2, estimator) for p in (process, other))
        assert ((a - b).abs() > 1e-3)[ends].all(), estimator


def test_implicit_rewards_ignore_what_is_outside():
    logprobs = torch.tensor([[math.nan, -1.0, -2, math.inf]], requires_grad=True)
    ref = torch.tensor([[-math.inf, -3.0, -1, math.nan]])
    rewards = prime.implicit_rewards(logprobs, ref, torch.tensor([[0, 1, 1, 0]]), 0.5)
    assert rewards.tolist() == [[0, 1, -0.5, 0]]
    rewards.sum().backward()
    assert logprobs.grad.tolist() == [[0, 0.5, 0.5, 0]]


PAIRS = [  # scores, outcomes, pairs ranked as they should be, pairs
    ([3, 1, 2], [1, 0, 0], 2, 2),
    ([1, 1, 0], [1, 0, 1], 0, 2),
    ([1, 2, 3], [1, 1, 1], 0, 0),
    ([0, 5, 5], [0, 1, 0], 1, 2),
    ([3, 2, 1], [0, 0, 0], 0, 0),
]


@pytest.mark.parametrize("chosen", [[0], [1], [3], [0, 1, 2], [0, 1, 2, 3, 4]])
def test_pair_accuracy(chosen):
    groups = [PAIRS[i] for i in chosen]
    scores = torch.tensor([group[0] for group in groups]).flatten().float()
    outcomes = torch.tensor([group[1] for group in groups]).flatten().float()
    wanted = sum(group[2] for group in groups) / sum(group[3] for group in groups)
    assert prime.pair_accuracy(scores, outcomes, 3) == pytest.approx(wanted)


def test_pairs_are_inside_groups():
    scores, outcomes = torch.tensor([2.0, 9, 1, 3]), torch.tensor([1.0, 0, 0, 1])
    assert prime.pair_accuracy(scores, outcomes, 2) == 0.5
    assert math.isnan(prime.pair_accuracy(scores, outcomes * 0, 2))


@pytest.mark.parametrize(
    "K, wanted", [(4, [1, 2, 3]), (5, [1, 2, 3, 4]), (10, [2, 3, 4, 5, 6, 7, 8])]
)
def test_accuracy_filter(K, wanted):
    """Groups with 0 to K right answers."""
    rollouts = [
        SimpleNamespace(right=k, correct=float(i < k)) for k in range(K + 1) for i in range(K)
    ]

    def kept(low, high, most=99):
        found = prime.accuracy_filter(rollouts, K, (low, high), most)
        groups = sorted({r.right for r in found})
        assert found == [r for r in rollouts if r.right in groups]
        return groups

    assert kept(0.2, 0.8) == wanted
    assert kept(0.2, 0.8, most=2) == wanted[:2]  # the first that pass
    assert kept(0.0, 1.0) == list(range(K + 1)) and kept(0.51, 0.52) == []
    if K == 10:
        assert kept(0.1 + 0.2, 0.3) == [3]  # 0.1 + 0.2 > 0.3


def test_shuffled_rewards_keep_their_sum():
    rows, starts = ragged(3, 8)
    process, mask = tensors(rows, starts)
    before, seen = process.clone(), set()
    for step in range(4):
        now = prime.shuffled(process, mask, 0, step)
        assert torch.equal(process, before)
        assert torch.equal(now, prime.shuffled(process, mask, 0, step))
        assert (now[~mask] == 0).all()
        for x, old, m in zip(now, process, mask):
            assert sorted(x[m].tolist()) == sorted(old[m].tolist())
        seen.add(tuple(now[mask].tolist()))
    assert len(seen) == 4 and not torch.equal(now, prime.shuffled(process, mask, 1, step))


# --------------------------------------------------------------------------------------------------
# Two tokens, of which the first decides: where does the implicit PRM put the credit?


class Table(torch.nn.Module):
    """A language model of two words, 0 and 1, that sees one token back. 2 is the prompt."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, mask, temperature):
        logprobs = (self.logits / temperature).log_softmax(-1)[input_ids[:, :-1]]
        return logprobs.gather(2, input_ids[:, 1:, None].clamp(max=1))[..., 0], None


def two_words(p, groups=64):
    """Responses of two words in groups of four, right where the first is a 1, neither all right nor
    all wrong."""
    first = torch.multinomial(p[2].expand(4 * groups, 2), 1)
    second = torch.multinomial(p[first[:, 0]], 1)
    rollouts = []
    for ids in torch.cat([first, second], 1).tolist():
        rollouts.append(rollout([2], ids))
        rollouts[-1].correct = float(ids[0] == 1)
    return prime.accuracy_filter(rollouts, 4, (0.2, 0.8), 99)


def test_credit_goes_to_the_token_that_decides():
    torch.manual_seed(0)
    start = [[0.5, 0.0], [0.0, -0.7], [0.3, 0.0]]  # the word after 0, after 1, after the prompt
    reference, prm, policy = Table(start), Table(start), Table(start)
    rollouts = two_words(reference.logits.softmax(-1))
    ids = torch.tensor([r.input_ids for r in rollouts])
    mask = torch.ones(len(rollouts), 2, dtype=torch.bool)
    ref = reference(ids, mask, 1.0)[0].detach()
    for r, logprobs in zip(rollouts, ref.numpy()):
        r.prm_ref_logprobs = logprobs
    cfg = prime.Config(prm_lr=1.0, beta=0.5)
    module = SimpleNamespace(model=prm, tokenizer=TOKENIZER)
    learner = Learner(module, prm, torch.optim.SGD(prm.parameters()))
    for step in range(40):
        seen, loss, _ = prime.train_implicit_prm(learner, rollouts, cfg, ALONE)
        assert step or loss == pytest.approx(math.log(2), abs=1e-6)
    process = prime.implicit_rewards(torch.tensor(np.stack(seen)), ref, mask, cfg.beta)
    right = ids[:, 1] == 1
    apart = process[right].mean(0) - process[~right].mean(0)
    assert process[right, 0].min() > 0.1 and process[~right, 0].max() < -0.1
    assert apart[1].abs() < 0.15 * apart[0]
    assert prime.pair_accuracy(process.sum(1), right.float(), 4) == 1 and loss < 0.6

    a = prime.prime_advantages(process, right.float(), mask, 4)
    assert a[right, 0].min() > 0 > a[~right, 0].max()
    logprobs = policy(ids, mask, 1.0)[0]
    rl.policy_loss(logprobs, logprobs.detach(), a, mask).backward()
    to_right = -policy.logits.grad.diff(dim=1)[:, 0]  # the way the step will go
    assert to_right[2] > 0.1 and to_right[:2].abs().max() < 0.2 * to_right[2]


# --------------------------------------------------------------------------------------------------
# The implicit PRM's step, on a tiny policy.

CFG = prime.Config(group_size=4, beta=0.3, temperature=0.8, prm_lr=1e-2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("prime")
    for seed, name in enumerate(("policy", "other")):
        save_policy(home / name, seed)
    write_rows(home / "problems.jsonl", data.make_problems(12))
    return home


def load(home, name="policy"):
    return load_policy(str(home / name), torch.float32)


def scores(model, rollouts):
    return rl.score_logprobs(model, rollouts, CFG, ALONE)


def responses(home):
    """Four groups of four responses of 1 to 7 tokens, right where the first token is even."""
    rng, rollouts = np.random.default_rng(0), []
    for g in range(4):
        prompt = [3, *rng.integers(5, 15, rng.integers(2, 6)).tolist(), 4]
        for k in range(4):
            r = rollout(
                prompt, [5 + 2 * g + k % 2, *rng.integers(5, 20, rng.integers(0, 7)).tolist()]
            )
            r.correct = float(k % 2 == g % 2)
            rollouts.append(r)
    assert {1, 6} <= {len(r) - r.prompt_length for r in rollouts}
    for name, model in (("prm_ref_logprobs", "policy"), ("old_logprobs", "other")):
        for r, logprobs in zip(rollouts, scores(load(home, model), rollouts)):
            setattr(r, name, logprobs)
    return rollouts


def learner_of(home, name="other", cfg=CFG, procs=ALONE):
    return prepare(Policy(load(home, name), TOKENIZER), cfg, procs)


def prm_gradient(procs, home, rollouts, micro=None):
    """What a step of the PRM would do -> log-probs, loss, gradient."""
    cfg = replace(CFG, micro_batch_size=micro)
    learner = learner_of(home, procs=procs)
    learner.optimizer = Recorder(learner.module.model)
    logprobs, loss, _ = prime.train_implicit_prm(learner, rollouts, cfg, procs)
    (gradient,) = learner.optimizer.gradients
    return np.concatenate(logprobs), loss, gradient


def naive_gradient(home, rollouts):
    model, losses = load(home, "other"), []
    for r in rollouts:
        q = response_logprobs(model, r, CFG.temperature) - torch.from_numpy(r.prm_ref_logprobs)
        p = torch.sigmoid(CFG.beta * q.sum())
        losses.append(-(p if r.correct else 1 - p).log())
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), gradient_of(model)


def many_gradients(procs, home, path):
    rollouts, found = responses(home), []
    for part in (rollouts, rollouts[:1]):  # one rank has none of one
        found += [prm_gradient(procs, home, part, micro) for micro in (None, 2)]
    torch.save(found, f"{path}{procs.rank}.pt")


def assert_gradient(found, loss, gradient):
    assert found[1] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found[2], gradient, rtol=1e-4, atol=1e-6)


def test_prm_gradient_is_that_of_the_naive_loss(home, tmp_path):
    rollouts = responses(home)
    wanted = naive_gradient(home, rollouts)
    assert wanted[1].norm() < prime.PRM_GRAD_CLIP
    for micro in (None, 1, 3, 5, 16):
        assert_gradient(prm_gradient(ALONE, home, rollouts, micro), *wanted)
    assert_gradient(prm_gradient(ALONE, home, rollouts[::-1]), *wanted)
    assert ranks(2, tmp_path, many_gradients, home, str(tmp_path / "rank")) == [0, 0]
    cases = [(rollouts, *wanted)] * 2
    cases += [(rollouts[:1], *naive_gradient(home, rollouts[:1]))] * 2
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for each, (part, *wanted) in zip(found, cases, strict=True):
            assert_gradient(each, *wanted)
            scored = np.concatenate(scores(load(home, "other"), part))
            assert each[0].tolist() == pytest.approx(scored.tolist(), abs=1e-5)


def prm_run(home, rollouts, name="other", **options):
    """process_rewards with a real step -> process, metrics, the PRM afterwards."""
    cfg = replace(CFG, **options)
    learner = learner_of(home, name, cfg)
    reference = load(home) if cfg.reference == "sft" else None
    found = prime.process_rewards(rollouts, learner, reference, cfg, ALONE)
    return *found, learner.module.model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_rewards(process, logprobs, ref_logprobs):
    """In the rollouts' order, nothing behind a response's end."""
    for row, ours, theirs in zip(process, logprobs, ref_logprobs, strict=True):
        wanted = CFG.beta * (ours - theirs)
        assert row[: len(wanted)].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
        assert (row[len(wanted) :] == 0).all()


@pytest.mark.parametrize("reference", ["sft", "policy"])
def test_rewards_before_or_after_the_step(home, reference):
    rollouts, start = responses(home), load(home, "other")
    if reference == "policy":
        for r in rollouts:
            r.old_logprobs = r.old_logprobs + 0.25  # of the sampler, whatever it says
    ref = [r.prm_ref_logprobs if reference == "sft" else r.old_logprobs for r in rollouts]
    outcomes, found = torch.tensor([r.correct for r in rollouts]), {}
    for update in ("after", "before", "none"):
        found[update] = prm_run(home, rollouts, update=update, reference=reference)
        process, metrics, prm = found[update]
        assert_rewards(process, scores(prm if update == "before" else start, rollouts), ref)
        read = "pair_accuracy_after" if update == "before" else "pair_accuracy"
        assert metrics[read] == prime.pair_accuracy(process.sum(1), outcomes, 4)
        assert metrics["prm"] == pytest.approx(process.sum(1).mean().item())
        unchanged = torch.equal(weights(prm), weights(start))
        assert unchanged == (update == "none") == ("prm_loss" not in metrics)

    (a, after, prm), (b, before, same_prm) = found["after"], found["before"]
    assert torch.equal(weights(prm), weights(same_prm))
    assert after == before | {"prm": after["prm"]} and after.keys() > found["none"][1].keys()
    assert (a - b).abs().max() > 1e-2
    torch.testing.assert_close(a, found["none"][0], rtol=0, atol=1e-5)


def test_several_batches_are_read_one_after_the_other(home):
    """Single forward: the second batch's rewards are those of a PRM that has seen the first."""
    rollouts = responses(home)
    process, metrics, _ = prm_run(home, rollouts, batch_size=8)
    first, first_metrics, half_way = prm_run(home, rollouts[:8])
    torch.testing.assert_close(process[:8, : first.shape[1]], first, rtol=0, atol=1e-5)
    second = rollouts[8:]
    ref = [r.prm_ref_logprobs for r in second]
    assert_rewards(process[8:], scores(half_way, second), ref)
    assert metrics["prm_loss"] != pytest.approx(first_metrics["prm_loss"], rel=1e-3)


def test_prm_starts_at_ln_2_and_learns(home):
    rollouts = responses(home)
    process, metrics, _ = prm_run(home, rollouts, name="policy")
    _, mask = stack([r.old_logprobs for r in rollouts])
    assert metrics["prm_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (prime.normalise(process, mask) == 0).all()
    cfg, curve = replace(CFG, beta=0.05, prm_lr=3e-3), []
    learner, reference = learner_of(home, "policy", cfg), load(home)
    for _ in range(15):
        curve.append(prime.process_rewards(rollouts, learner, reference, cfg, ALONE)[1])
    assert curve[-1]["pair_accuracy_after"] > 0.9
    assert curve[-1]["prm_loss"] < curve[0]["prm_loss"] - 0.05
    for a, b in zip(curve, curve[1:]):
        assert a["pair_accuracy_after"] == b["pair_accuracy"]


# --------------------------------------------------------------------------------------------------
# Whole runs.


def settings(home, out, **more):
    options = {
        "model": str(home / "policy"),
        "data": (str(home / "problems.jsonl"),),
        "out": str(out),
        "steps": 4,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_new_tokens": 8,
        "accuracy": (0.0, 1.0),
        "save_every": 2,
        "eval_every": 3,
        "eval_problems": 2,
        "lr": 1e-3,
    }
    return options | more


def train(procs, options, *faults):
    verifier.verify = parity
    for function, *args in faults:
        function(procs, *args)
    prime.main(prime.Config(**options), procs)


def advantages_kept(procs, path):
    """Every rank leaves the advantages of each step behind."""
    update, seen = rl.update_policy, []

    def patched(policy, rollouts, *rest):
        seen.append(np.concatenate([r.advantages for r in rollouts]))
        torch.save(seen, f"{path}{procs.rank}.pt")
        return update(policy, rollouts, *rest)

    rl.update_policy = patched


@pytest.fixture(scope="module")
def reference(home):
    """reference(world, **options) -> folder of an uninterrupted run."""
    done = {}

    def run(world, **more):
        key = (world, *sorted(more.items()))
        if key not in done:
            out = home / f"reference{len(done)}"
            fault = (advantages_kept, f"{out}.advantages")
            codes = ranks(world, home, train, settings(home, out, **more), fault)
            assert codes == [0] * world
            done[key] = out
        return done[key]

    return run


PPO = {"estimator": "ppo", "update": "before"}


def folders(more):
    return ("model", "prm", "critic") if more.get("estimator") == "ppo" else ("model", "prm")


@pytest.mark.parametrize(
    "world, more, at, number",
    [
        (1, PPO, 3, signal.SIGKILL),
        (2, PPO, 3, signal.SIGKILL),
        (2, PPO, 0, signal.SIGTERM),
        (1, {}, 2, signal.SIGTERM),
    ],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    world, more, at, number, reference, home, tmp_path
):
    expected, out = reference(world, **more), tmp_path / "run"
    codes = ranks(world, tmp_path, train, settings(home, out, **more), (at_step, at, number))
    if number == signal.SIGKILL:
        assert -signal.SIGKILL in codes and 0 not in codes
    else:
        assert codes == [0] * world
    saved = 2 if at == 3 else at + 1
    assert max(os.listdir(out / "state")) == f"step_{saved:08d}" and not (out / "model").exists()
    options = settings(home, out, resume=True, **more)
    assert ranks(world, tmp_path, train, options) == [0] * world
    assert_same_run(out, expected, folders(more))
    assert max(os.listdir(out / "state")) == "step_00000004"


@pytest.mark.parametrize("more", [PPO, {}, {"batch_size": 3}], ids=str)
def test_number_of_processes_does_not_matter(more, reference):
    one, two = reference(1, **more), reference(2, **more)
    for a, b in zip(numbers(two), numbers(one), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = a[name] == b[name]
            assert same or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    files = f"{two}.advantages0.pt", f"{two}.advantages1.pt", f"{one}.advantages0.pt"
    for a, b, c in zip(*(torch.load(f, weights_only=False) for f in files), strict=True):
        assert (a == b).all() and a.tolist() == pytest.approx(c.tolist(), abs=2e-3)
        moments = a.mean(), a.var(ddof=1)  # whitened over all tokens of all ranks
        assert moments == pytest.approx((0, 1), abs=1e-4)
    for folder in folders(more):
        a, b = (load_file(out / folder / "model.safetensors") for out in (two, one))
        assert a.keys() == b.keys()
        for name in a:
            if not name.endswith("k_proj.bias"):  # without effect: its gradient is rounding alone
                where = f"{folder} {name}"
                torch.testing.assert_close(a[name], b[name], rtol=0, atol=5e-4, msg=where)


@pytest.mark.parametrize("world, more", [(1, {}), (2, {}), (1, PPO)], ids=str)
def test_first_steps_of_a_run(world, more, reference, home):
    """q = 0 at first: the loss is ln 2, and what rounding leaves is no reward. What a run leaves
    behind."""
    out = reference(world, **more)
    rows = numbers(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0].keys() == {"step", "pass@1", "greedy"}
    assert rows[1]["prm_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[2]["prm_loss"] != pytest.approx(math.log(2), abs=1e-4)
    for row in rows[1:]:
        assert 0 < row["correct"] < 1 and row["kept"] == 1 and row["skipped"] == 0
        assert row["max_ratio_deviation"] < 1e-3
    about = json.loads((out / "prm" / "reward.json").read_text())
    assert about == {"kind": "implicit", "beta": 0.5, "temperature": 1.0}
    assert moved(out / "model", home / "policy") and moved(out / "prm", home / "policy")
    assert not moved(out / "prm" / "reference", home / "policy")
    assert load(out, "prm/reference") and load_tokenizer(str(out / "prm" / "reference"))


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """run(**options) -> folder of a run of two steps in this process."""
    monkeypatch.setattr(verifier, "verify", parity)
    made = []

    def run(**more):
        made.append(tmp_path / f"run{len(made)}")
        few = {"steps": 2, "eval_every": 0, "save_every": 0}
        prime.main(prime.Config(**settings(home, made[-1], **few | more)), ALONE)
        return made[-1]

    return run


def weights_file(out, folder="model"):
    return (out / folder / "model.safetensors").read_bytes()


def test_a_finished_prm_brings_its_own_reference(run, home, monkeypatch):
    """Going on from another run's prm/ and policy: the reference stays the one that PRM was trained
    against."""
    first, used = run(lr=1e-2), []

    def patched(name, *rest):
        used.append(name)
        return load_policy(name, *rest)

    for module in (rl, prime):
        monkeypatch.setattr(module, "load_policy", patched)
    second = run(model=str(first / "model"), prm=str(first / "prm"))
    names = ("model", "prm", "prm/reference")
    assert used == [str(first / name) for name in names]
    assert not moved(second / "prm" / "reference", home / "policy")


def test_process_rewards_of_the_first_step_are_zero(run, monkeypatch):
    seen, normalise = [], prime.normalise

    def patched(*args):
        seen.append(normalise(*args))
        return seen[-1]

    monkeypatch.setattr(prime, "normalise", patched)
    run()
    run(update="before")
    assert [(process != 0).any().item() for process in seen] == [False, True, True, True]


def test_ppo(run, home, monkeypatch):
    """Process rewards and, on the last token, the outcome, less what the critic expected, whitened;
    the critic learns the sum."""
    seen, advantages = [], prime.Critic.advantages

    def patched(self, rewards, mask, rollouts, *rest):
        values = self.values(rollouts)
        found = advantages(self, rewards, mask, rollouts, *rest)
        seen.append((rollouts, values, found[1]))
        return found

    rewards, process = prime.process_rewards, []

    def patched_rewards(*args):
        found = rewards(*args)
        process.append(found[0])
        return found

    monkeypatch.setattr(prime.Critic, "advantages", patched)
    monkeypatch.setattr(prime, "process_rewards", patched_rewards)
    rows = numbers(run(estimator="ppo", update="before", process_weight=0.7))[1:]
    for (rollouts, values, loss), rewards, row in zip(seen, process, rows, strict=True):
        pairs = zip(rewards.double().tolist(), rollouts)
        rewards = [x[: len(r.old_logprobs)] for x, r in pairs]
        largest = max(abs(x) for row in rewards for x in naive_returns(row, 1.0))
        targets = []
        for x, r in zip(rewards, rollouts):
            x = [0.7 * number / largest for number in x]
            x[-1] += r.correct
            targets.append(naive_returns(x, 1.0))
            assert r.returns.tolist() == pytest.approx(targets[-1], abs=1e-4)
        left = np.concatenate(targets) - np.concatenate(values)
        wanted = (left - left.mean()) / left.std(ddof=1)
        got = np.concatenate([r.advantages for r in rollouts])
        assert got.tolist() == pytest.approx(wanted.tolist(), abs=1e-3)
        assert row["critic_loss"] == loss == pytest.approx((left**2).mean(), rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        "rloo after sft",
        "rloo before policy",
        "rloo_code none policy",
        "rloo_code before sft",
        "reinforce after policy",
        "reinforce none sft",
        "grpo before sft",
        "grpo after policy",
        "ppo after policy",
        "ppo none sft",
        "value after sft",
        "value before policy",
    ],
)
def test_every_option_runs(words, run, home):
    estimator, update, reference = words.split()
    options = {"estimator": estimator, "update": update, "reference": reference}
    more = {"kl_coef": 0.1} if update == "before" else {"oversample": 2}
    out = run(**options, **more)
    rows, kept, trained = numbers(out)[1:], 1 / more.get("oversample", 1), update != "none"
    assert len(rows) == 2
    for row in rows:
        assert {"pair_accuracy", "prm"} <= row.keys() and row["kept"] == kept
        assert ("critic_loss" in row) == (estimator == "ppo")
        for name in ("prm_loss", "prm_grad_norm", "pair_accuracy_after"):
            assert (name in row) == trained
        for name, value in row.items():
            assert name.startswith("pair_accuracy") or isinstance(value, (int, float))
    assert bool(moved(out / "prm", home / "policy")) == trained
    used = out / "model" if reference == "policy" else home / "policy"
    assert not moved(out / "prm" / "reference", used)
    assert (out / "critic").exists() == (estimator == "ppo")


def test_without_process_rewards(run):
    """--prm none is --process_weight 0 without the PRM's cost; process rewards matter, and so does
    their order."""
    zero, shuffle = {"process_weight": 0.0}, {"shuffle_process": True}
    cases = {
        "none": {"prm": "none"},
        "zero": zero,
        "shuffled zero": zero | shuffle,
        "token": {},
        "shuffled": shuffle,
    }
    outs = {name: run(update="before", **options) for name, options in cases.items()}
    policies = {name: weights_file(out) for name, out in outs.items()}
    assert policies["none"] == policies["zero"] == policies["shuffled zero"]
    assert len({policies[name] for name in ("none", "token", "shuffled")}) == 3
    assert not (outs["none"] / "prm").exists()
    assert "prm_loss" not in numbers(outs["none"])[1] and "prm_loss" in numbers(outs["zero"])[1]
    assert (outs["zero"] / "prm" / "reward.json").exists()


def test_a_prm_of_its_own(run, home):
    out = run(prm=str(home / "other"), update="none")
    assert weights_file(out, "prm") == weights_file(home, "other")
    assert numbers(out)[1]["prm"] != pytest.approx(0, abs=1e-2)


def nothing_passes(procs):
    verifier.verify = lambda text, answer: False


@pytest.mark.parametrize("world", [1, 2])
def test_no_group_passes_the_filter(world, home, tmp_path):
    """Every step is left out, the run goes on, also from a checkpoint in which no optimizer has a
    state."""
    out = tmp_path / "run"
    options = settings(home, out, accuracy=(0.2, 0.8), **PPO)
    faults = (nothing_passes,), (at_step, 2, signal.SIGTERM)
    assert ranks(world, tmp_path, train, options, *faults) == [0] * world
    assert max(os.listdir(out / "state")) == "step_00000003"
    options["resume"] = True
    assert ranks(world, tmp_path, train, options, (nothing_passes,)) == [0] * world
    rows = numbers(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert row["kept"] == row["skipped"] == 0 and not {"prm_loss", "grad_norm"} & row.keys()
    assert not moved(out / "model", home / "policy") and not moved(out / "prm", home / "policy")


def test_some_groups_pass_the_filter(run, monkeypatch):
    """Metrics are of all rollouts, advantages of those kept."""
    sampled, kept = [], []
    roll_out, update = rl.roll_out, rl.update_policy

    def patched_roll_out(*args):
        sampled.append(roll_out(*args))
        return sampled[-1]

    def patched_update(policy, rollouts, *rest):
        kept.append(rollouts)
        return update(policy, rollouts, *rest)

    monkeypatch.setattr(rl, "roll_out", patched_roll_out)
    monkeypatch.setattr(rl, "update_policy", patched_update)
    rows = numbers(run(accuracy=(0.2, 0.5), prompts_per_step=6))[1:]
    for row, everything, part in zip(rows, sampled, kept, strict=True):
        assert row["kept"] == len(part) / len(everything) < 1
        share = np.mean([r.correct for r in everything])
        assert row["correct"] == share and row["reward"] == pytest.approx(share)
        shares = np.array([r.correct for r in part]).reshape(-1, 4).mean(1)
        assert 0.2 <= shares.min() and shares.max() <= 0.5
        assert len({r.prompt for r in part}) == len(part) // 4
        assert all(r.initial_logprobs is None for r in part)  # no KL term


def test_shown_rewards_are_those_of_the_shown_response(run, monkeypatch):
    """The first of those kept, which may not be the first of those sampled."""
    scored, shown, rewards = [], [], prime.process_rewards

    def patched(rollouts, *rest):
        process, metrics = rewards(rollouts, *rest)
        scored.append({id(r): x for r, x in zip(rollouts, process)})
        return process, metrics

    monkeypatch.setattr(prime, "process_rewards", patched)
    monkeypatch.setattr(prime, "show_rewards", lambda procs, tokenizer, *rest: shown.append(rest))
    run(eval_every=1, accuracy=(0.2, 0.5), update="before", prompts_per_step=6, steps=3)
    assert len(shown) == 2
    for (r, process), known in zip(shown, scored):
        assert torch.equal(process, known[id(r)])


def test_show_rewards(capsys):
    r = rollout([7], [8, 9, 1])
    r.prompt, r.correct = "1+1", 1.0
    tokenizer = SimpleNamespace(decode=lambda ids: "abcdefghij"[ids[0]])
    prime.show_rewards(ALONE, tokenizer, r, torch.tensor([0.1, -0.2, 0.05, 0.0]))
    wanted = "1+1: correct 1; process rewards (largest 1): 'i' +0.50, 'j' -1.00, 'b' +0.25"
    assert capsys.readouterr().out.strip() == wanted
