"""PRIME: the maths against naive loops, the implicit PRM against plain autograd, whole runs on one and on two ranks.

A random policy is never right, so in the runs `data.verify` is the parity of a response's length: nonsense, but a
function of the text alone, as a verifier is.
"""
import dataclasses
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import prime_minimal as prime
import rl_minimal as rl
import sft_minimal as sft
import tdrm_minimal as tdrm
from plumbing import Env
from test_training import ranks

Q = [[.2, -.1, .3], [-.2, .1, -.3, -.1], [.05, -.15], [.1, 0, .1]]  # the example worked out in prime.md 2.4: K = 4
RIGHT = torch.tensor([1.0, 0, 0, 1])
WHITENED = ("rloo", "rloo_code", "value")
ESTIMATORS = (*WHITENED, "grpo", "reinforce")


def tensors(rows, starts=None, filler=0.0):
    """Ragged rows, each beginning at its column -> (N, T), mask; `filler` outside."""
    starts = starts or [0] * len(rows)
    width = max(start + len(row) for start, row in zip(starts, rows))
    numbers, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (start, row) in enumerate(zip(starts, rows)):
        numbers[i, start:start + len(row)], mask[i, start:start + len(row)] = torch.tensor(row), True
    return numbers, mask


def ragged(seed, n, longest=6):
    """Random rows of 1 to `longest` numbers, with random beginnings."""
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=rng.integers(1, longest + 1)).round(3).tolist() for _ in range(n)]
    return rows, rng.integers(0, 3, n).tolist(), torch.tensor(rng.integers(0, 2, n)).float()


# ---------------------------------------------------------------------------------------------------------------------
# Advantages.

VECTOR = {"rloo": ([1.0167, .5444, .6722, -1.4, -.9, -1.0, -.3, -.3, -.35, .4833, .2556, .2278], None),
          "rloo_code": ([1.0167, .5, .7833, -1.4, -.85, -1.1, -.2833, -.3, -.4167, .4833, .2333, .25],
                        [1.2577, .8913, 1.0922, -1.4015, -1.0115, -1.1888, -.6096, -.6215, -.7042, .8795, .7022, .714])}


@pytest.mark.parametrize("estimator", VECTOR)
def test_worked_example(estimator, monkeypatch):
    process, mask = tensors(Q)
    get = lambda **more: prime.prime_advantages(process, RIGHT, mask, 4, estimator, **more)[mask]  # noqa: E731
    returns, whitened = VECTOR[estimator]
    a = get()
    if whitened:
        assert a.tolist() == pytest.approx(whitened, abs=1e-4)
    torch.testing.assert_close(prime.normalise(process, mask), process / 0.5, rtol=1e-5, atol=0)
    monkeypatch.setattr(prime, "whiten", lambda advantages, mask: advantages)
    assert get(outcome_weight=0.0).tolist() == pytest.approx(returns, abs=1e-4)
    outcome = get(process_weight=0.0)
    assert outcome.tolist() == pytest.approx([2 / 3] * 3 + [-2 / 3] * 6 + [2 / 3] * 3, abs=1e-6)
    both = torch.tensor(returns) + outcome
    torch.testing.assert_close((both - both.mean()) / both.std(), a, rtol=0, atol=2e-4)


def naive(rows, o, K, estimator, wp, wo, gamma, norm):
    """prime.md 2.1 to 2.5 as sums over single numbers -> a list for each row."""
    rows, o = [[float(x) for x in row] for row in rows], [float(x) for x in o]
    if norm == "batch" and estimator != "value":
        largest = max(abs(sum(row[t:])) for row in rows for t in range(len(row)))
        rows = [[x / (largest + 1e-6) for x in row] for row in rows]
    std = lambda x: np.std(x, ddof=1) + 1e-6  # noqa: E731
    result = []
    for i, row in enumerate(rows):
        group = range(i // K * K, i // K * K + K)
        rbar, other = {j: sum(rows[j]) / len(rows[j]) for j in group}, [j for j in group if j != i]
        x, y = row, o[i]
        if estimator == "rloo":
            x = [r - sum(rbar[j] for j in other) / (K - 1) for r in row]
            y = o[i] - sum(o[j] for j in other) / (K - 1)
        if estimator == "rloo_code":
            x = [K / (K - 1) * r - sum(rbar.values()) / (K - 1) for r in row]
            y = K / (K - 1) * o[i] - sum(o[j] for j in group) / (K - 1)
        if estimator == "grpo":
            x = [(r - np.mean(list(rbar.values()))) / std(list(rbar.values())) for r in row]
            y = (o[i] - np.mean([o[j] for j in group])) / std([o[j] for j in group])
        n = len(row)
        stream = [sum(gamma**(s - t) * x[s] for s in range(t, n)) for t in range(n)]
        if estimator == "value":
            stream = [-sum(row[:t]) for t in range(n)]
        result.append([wp * stream[t] + wo * gamma**(n - 1 - t) * y for t in range(n)])
    if estimator in WHITENED:
        tokens = [a for row in result for a in row]
        mean, deviation = np.mean(tokens), math.sqrt(np.var(tokens, ddof=1) + 1e-8)
        result = [[(a - mean) / deviation for a in row] for row in result]
    return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("K, gamma, norm", [(4, 0.9, "batch"), (3, 1.0, "none"), (2, 0.5, "none"), (2, 1.0, "batch")])
def test_advantages_are_those_of_naive_loops(estimator, K, gamma, norm):
    for seed in range(3):
        rows, starts, outcomes = ragged(seed, 12)
        process, mask = tensors(rows, starts, filler=7.0)
        got = prime.prime_advantages(process, outcomes, mask, K, estimator, 0.7, 1.3, gamma, norm)
        wanted, _ = tensors(naive(rows, outcomes, K, estimator, 0.7, 1.3, gamma, norm), starts)
        torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-3, atol=2e-4)
        assert (got[~mask] == 0).all() and (process[~mask] == 7).all()  # and the input stays as it was


def test_groups_of_one_and_other_mistakes():
    process, mask = tensors(Q)
    alone = prime.prime_advantages(process, RIGHT, mask, 1, "reinforce", norm="none")
    torch.testing.assert_close(alone, (prime.returns(process, mask) + RIGHT[:, None]) * mask)
    alone = [(estimator, 1) for estimator in ESTIMATORS if estimator != "reinforce"]
    for estimator, K in [*alone, ("rloo", 3), ("reinforce", 3), ("ppo", 4), ("x", 4)]:
        with pytest.raises(ValueError):
            prime.prime_advantages(process, RIGHT, mask, K, estimator)


@pytest.mark.parametrize("estimator", WHITENED)
def test_whitened_over_all_tokens(estimator):
    rows, starts, outcomes = ragged(5, 12)
    process, mask = tensors(rows, starts)
    process[:4] *= 100  # groups of unlike scale are not whitened apart
    a = prime.prime_advantages(process, outcomes, mask, 4, estimator, norm="none")
    assert (a[mask].mean().item(), a[mask].var().item()) == pytest.approx((0, 1), abs=1e-4)
    assert abs(a[:4][mask[:4]].var().item() - 1) > 0.1
    ones = torch.ones(4, 3)
    assert (prime.whiten(ones * 5, ones) == 0).all() and (prime.whiten(ones[:1, :1] * 5, ones[:1, :1]) == 0).all()


def test_beta_cancels_under_the_norm():
    process, mask = tensors(Q)
    for estimator in set(ESTIMATORS):
        for norm in ("batch", "none"):
            a, b = (prime.prime_advantages(beta * process, RIGHT, mask, 4, estimator, norm=norm) for beta in (0.05, 3))
            cancels = estimator == "grpo" or norm == "batch" and estimator != "value"  # a std takes it, too
            assert torch.allclose(a, b, atol=2e-3 if estimator == "grpo" else 2e-4) == cancels, (estimator, norm)


def test_normaliser_and_its_floor():
    process, mask = tensors([[3.0, -1, -1], [-2, -2]], [0, 1])
    torch.testing.assert_close(prime.normalise(process, mask), process / 4)  # |-2 - 2|, not |3|
    for scale, zero in ((2e-4, True), (2.4e-4, True), (2.6e-4, False)):
        assert (prime.normalise(process * scale, mask) == 0).all() == zero
    assert (prime.normalise(process * 2e-4, mask, floor=1e-4) != 0).any()
    tiny = process * 1e-6  # rounding: as if there were no process reward
    for estimator in ("rloo", "rloo_code", "reinforce", "grpo"):
        a, b = (prime.prime_advantages(p, torch.tensor([1.0, 0]), mask, 2, estimator) for p in (tiny, tiny * 0))
        assert torch.equal(a, b)


def test_the_last_token_keeps_its_process_reward():
    for starts in ([0, 0], [2, 1]):
        logprobs, mask = tensors([[-1.0, -2, -3], [-1, -4]], starts)
        process = prime.implicit_rewards(logprobs, torch.zeros(logprobs.shape), mask, 0.5)
        assert process[mask].tolist() == [-.5, -1, -1.5, -.5, -2]
        assert prime.returns(process, mask)[mask].tolist() == [-3, -2.5, -1.5, -2.5, -2]
        for estimator in ("rloo", "rloo_code", "reinforce"):
            other = process.clone()
            other[prime.last_token(mask)] += 1
            a, b = (prime.prime_advantages(p, RIGHT[:2], mask, 2, estimator, norm="none") for p in (process, other))
            assert ((a - b).abs() > 1e-3)[prime.last_token(mask)].all(), estimator


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_last_token(dtype):
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).to(dtype)
    assert prime.last_token(mask).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0] * 4]


def test_implicit_rewards_ignore_what_is_outside():
    logprobs = torch.tensor([[math.nan, -1.0, -2, math.inf]], requires_grad=True)
    ref, mask = torch.tensor([[-math.inf, -3.0, -1, math.nan]]), torch.tensor([[0, 1, 1, 0]])
    rewards = prime.implicit_rewards(logprobs, ref, mask, 0.5)
    assert rewards.tolist() == [[0, 1, -.5, 0]]
    rewards.sum().backward()
    assert logprobs.grad.tolist() == [[0, .5, .5, 0]]


def test_gae_is_that_of_naive_loops():
    for seed, gamma, lam in ((0, 1.0, 1.0), (1, 0.9, 1.0), (2, 0.9, 0.7), (3, 1.0, 0.0), (4, 0.0, 0.5)):
        rows, starts, _ = ragged(seed, 6)
        values = [np.random.default_rng(seed).normal(size=len(row)).tolist() for row in rows]
        (r, mask), (v, _) = tensors(rows, starts, filler=3.0), tensors(values, starts, filler=-5.0)
        a, targets = prime.gae(r, v, mask.float(), gamma, lam)
        wanted = []
        for row, value in zip(rows, values):
            n, value = len(row), value + [0.0]
            delta = [row[t] + gamma * value[t + 1] - value[t] for t in range(n)]
            wanted.append([sum((gamma * lam)**(s - t) * delta[s] for s in range(t, n)) for t in range(n)])
            if gamma == lam == 1:
                assert wanted[-1] == pytest.approx([sum(row[t:]) - value[t] for t in range(n)])
        torch.testing.assert_close(a, tensors(wanted, starts)[0], rtol=1e-4, atol=1e-5)
        wanted = [np.add(row, value).tolist() for row, value in zip(wanted, values)]
        torch.testing.assert_close(targets, tensors(wanted, starts)[0], rtol=1e-4, atol=1e-5)


def test_pair_accuracy():
    table = [([3, 1, 2], [1, 0, 0], 2, 2), ([1, 1, 0], [1, 0, 1], 0, 2), ([1, 2, 3], [1, 1, 1], 0, 0),  # ranked, pairs
             ([0, 5, 5], [0, 1, 0], 1, 2), ([3, 2, 1], [0, 0, 0], 0, 0)]
    for chosen in ([0], [1], [3], [0, 1, 2], [0, 1, 2, 3, 4]):
        scores, outcomes = (torch.tensor([x for i in chosen for x in table[i][part]]).float() for part in (0, 1))
        ranked, pairs = (sum(table[i][part] for i in chosen) for part in (2, 3))
        assert prime.pair_accuracy(scores, outcomes, 3) == pytest.approx(ranked / pairs)
    assert math.isnan(prime.pair_accuracy(torch.arange(3.0), torch.ones(3), 3))
    assert prime.pair_accuracy(torch.tensor([2.0, 9, 1, 3]), torch.tensor([1.0, 0, 0, 1]), 2) == 0.5  # inside groups


@pytest.mark.parametrize("K, kept", [(4, [1, 2, 3]), (5, [1, 2, 3, 4]), (10, list(range(2, 9)))])
def test_accuracy_filter(K, kept):
    rows = [{"right": k, "i": i, "verifiable": float(i < k)} for k in range(K + 1) for i in range(K)]
    for most, wanted in ((99, kept), (2, kept[:2])):  # the first that pass
        assert prime.accuracy_filter(rows, K, (0.2, 0.8), most) == [row for row in rows if row["right"] in wanted]
    assert prime.accuracy_filter(rows, K, (0.0, 1.0), 99) == rows
    assert prime.accuracy_filter(rows, K, (0.51, 0.52), 99) == []
    if K == 10:  # 0.1 + 0.2 > 0.3
        assert {row["right"] for row in prime.accuracy_filter(rows, K, (0.1 + 0.2, 0.3), 99)} == {3}


def test_shuffled_rewards_keep_their_sum():
    rows, starts, _ = ragged(3, 8)
    process, mask = tensors(rows, starts)
    before, seen = process.clone(), set()
    for step in range(4):
        now = prime.shuffled(process, mask, 0, step)
        assert torch.equal(process, before) and torch.equal(now, prime.shuffled(process, mask, 0, step))
        assert (now[~mask] == 0).all()
        for x, old, m in zip(now, process, mask):
            assert sorted(x[m].tolist()) == sorted(old[m].tolist())
        seen.add(tuple(now[mask].tolist()))
    assert len(seen) == 4 and not torch.equal(now, prime.shuffled(process, mask, 1, step))


# ---------------------------------------------------------------------------------------------------------------------
# Two tokens, of which the first decides: where does the implicit PRM put the credit?

class Table(torch.nn.Module):
    """A language model of two words, 0 and 1, that sees one token back. 2 is the prompt."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, mask, temperature):
        logprobs = (self.logits / temperature).log_softmax(-1)[input_ids[:, :-1]]
        return logprobs.gather(2, input_ids[:, 1:, None].clamp(max=1))[..., 0], None


def test_credit_goes_to_the_token_that_decides():
    torch.manual_seed(0)
    start = [[0.5, 0.0], [0.0, -0.7], [0.3, 0.0]]  # the word after 0, after 1, after the prompt
    reference, prm, policy = Table(start), Table(start), Table(start)
    p = reference.logits.softmax(-1)
    first = torch.multinomial(p[2].expand(256, 2), 1)
    ids = torch.cat([torch.full((256, 1), 2), first, torch.multinomial(p[first[:, 0]], 1)], 1)
    rows = [{"input_ids": i, "prompt_length": 1, "step_ends": [], "correct": i[1] == 1} for i in ids.tolist()]
    rows = prime.accuracy_filter([row | {"verifiable": float(row["correct"])} for row in rows], 4, (0.2, 0.8), 99)
    ids, mask = torch.tensor([row["input_ids"] for row in rows]), torch.ones(len(rows), 2, dtype=torch.bool)
    ref = reference(ids, mask, 1.0)[0].detach()
    for row, logprobs in zip(rows, ref.numpy()):
        row["ref_logprobs"] = logprobs
    cfg = prime.Config(batch_size=len(rows), prm_lr=1.0, beta=0.5)
    optimizer = torch.optim.SGD(prm.parameters())
    for step in range(40):
        seen, loss, _ = prime.train_implicit_prm(prm, prm, optimizer, rows, cfg, Env(), 0)
        assert step or loss == pytest.approx(math.log(2), abs=1e-6)
    process = prime.implicit_rewards(torch.tensor(np.stack(seen)), ref, mask, cfg.beta)
    right = ids[:, 1] == 1
    apart = process[right].mean(0) - process[~right].mean(0)
    assert process[right, 0].min() > 0.1 and process[~right, 0].max() < -0.1 and apart[1].abs() < 0.15 * apart[0]
    assert prime.pair_accuracy(process.sum(1), right.float(), 4) == 1 and loss < 0.6
    a = prime.prime_advantages(process, right.float(), mask, 4)
    assert a[right, 0].min() > 0 > a[~right, 0].max()
    logprobs = policy(ids, mask, 1.0)[0]
    rl.policy_loss(logprobs, logprobs.detach(), a, mask).backward()
    wrong_to_right = -policy.logits.grad.diff(dim=1)[:, 0]  # the way the step will go
    assert wrong_to_right[2] > 0.1 and wrong_to_right[:2].abs().max() < 0.2 * wrong_to_right[2]


# ---------------------------------------------------------------------------------------------------------------------
# The implicit PRM's step, on a tiny policy.

def right(text, answer):
    return len(text) % 2 == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("prime")
    tokenizer = data.builtin_tokenizer()
    for seed, name in enumerate(("policy", "other")):
        sft.new_policy(tokenizer, seed).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    (home / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data.make_problems(12)))
    return home


def load(home, name="policy"):
    return rl.load_causal_lm(str(home / name), prime.Config(), Env())


CFG = prime.Config(batch_size=16, group_size=4, beta=0.3, temperature=0.8, prm_lr=1e-2)


def responses(home, groups=4, copies=True):
    """Groups of four responses of 1 to 7 tokens, some of them equal, right where the first token is even."""
    rng, rows = np.random.default_rng(0), []
    for g in range(groups):
        prompt = [3, *rng.integers(5, 15, rng.integers(2, 6)).tolist(), 4]
        for k in range(4):
            response = [5 + 2 * g + k % 2, *rng.integers(5, 20, rng.integers(0, 7)).tolist()]
            rows.append({"input_ids": prompt + response, "prompt_length": len(prompt), "step_ends": [],
                         "correct": k % 2 == g % 2, "verifiable": float(k % 2 == g % 2)})
        if copies and g % 2 == 0:
            rows[-1] = dict(rows[-3])
    scored = [rl.score_logprobs(load(home, name), rows, CFG, Env(), 0) for name in ("policy", "other")]
    return [row | {"ref_logprobs": a, "old_logprobs": b} for row, a, b in zip(rows, *scored)]


def prm_gradient(env, home, rows, name="other", **options):
    """What a step of the PRM would do -> log-probs, loss, gradient."""
    cfg = dataclasses.replace(CFG, **options)
    prm, wrapped = sft.prepare(load(home, name), cfg, env, sft.Policy)
    found, step = [], sft.optimizer_step
    gradient = lambda model: torch.cat([p.grad.flatten().clone() for p in model.parameters()])  # noqa: E731
    sft.optimizer_step = lambda model, *_: found.append(gradient(model)) or 1.0
    try:
        logprobs, loss, _ = prime.train_implicit_prm(wrapped, prm, None, rows, cfg, env, 0)
    finally:
        sft.optimizer_step = step
    assert len(found) == 1
    return logprobs, loss, found[0]


def naive_gradient(home, rows):
    model, losses = load(home, "other"), []
    for row in rows:
        ids, n = torch.tensor(row["input_ids"]), row["prompt_length"]
        p = (model(input_ids=ids[None]).logits[0].double() / CFG.temperature).softmax(-1)
        logprobs = torch.stack([p[t - 1, ids[t]].log() for t in range(n, len(ids))])
        q = torch.sigmoid(CFG.beta * (logprobs - torch.from_numpy(row["ref_logprobs"])).sum())
        losses.append(-q.log() if row["correct"] else -(1 - q).log())
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def many_gradients(env, home, path):
    rows = responses(home)
    cases = [prm_gradient(env, home, part, micro_batch_size=micro) for part in (rows, rows[:1] * 4) for micro in (0, 2)]
    torch.save([(np.concatenate(logprobs), loss, g) for logprobs, loss, g in cases], f"{path}{env.rank}.pt")


def test_prm_gradient_is_that_of_the_naive_loss(home, tmp_path, monkeypatch):
    rows = responses(home)
    assert len(rl.distinct(rows)) == 14 and {len(row["ref_logprobs"]) for row in rows} >= {1, 6}
    loss, gradient = naive_gradient(home, rows)
    one = [prm_gradient(Env(), home, rows, micro_batch_size=micro) for micro in (0, 1, 3, 5, 16)]
    with monkeypatch.context() as m:  # equal responses one by one
        m.setattr(rl, "distinct", lambda rows: [row | {"copies": 1} for row in rows])
        one.append(prm_gradient(Env(), home, rows))
    same, alone = rows[:1] * 4, naive_gradient(home, rows[:1])
    one.append(prm_gradient(Env(), home, list(reversed(rows))))
    for _, got_loss, got in one:
        assert got_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    assert ranks(2, tmp_path, many_gradients, home, str(tmp_path / "rank")) == [0, 0]  # one has none of 4 equal rows
    expected = [(rows, loss, gradient)] * 2 + [(same, *alone)] * 2
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for (logprobs, got_loss, got), (part, loss, gradient) in zip(found, expected, strict=True):
            assert got_loss == pytest.approx(loss, rel=1e-5)
            torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
            scored = np.concatenate(rl.score_logprobs(load(home, "other"), part, CFG, Env(), 0))
            assert logprobs.tolist() == pytest.approx(scored.tolist(), abs=1e-5)


def prm_run(home, rows, name="other", **options):
    """process_rewards with a real step -> process, mask, metrics, the PRM afterwards."""
    cfg = dataclasses.replace(CFG, **options)
    prm, wrapped = sft.prepare(load(home, name), cfg, Env(), sft.Policy)
    ref = load(home) if cfg.reference == "sft" else None
    rows, optimizer = [dict(row) for row in rows], sft.make_optimizer(prm, cfg, Env())
    return *prime.process_rewards(rows, wrapped, prm, optimizer, ref, cfg, Env(), 0), prm


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("reference", ["sft", "policy"])
def test_rewards_before_or_after_the_step(home, reference):
    rows = responses(home)
    ref = [row["ref_logprobs" if reference == "sft" else "old_logprobs"] for row in rows]
    if reference == "policy":
        ref = [r + 0.25 for r in ref]  # of the sampler, whatever it says
        rows = [row | {"old_logprobs": r} for row, r in zip(rows, ref)]
    outcomes, found = torch.tensor([row["verifiable"] for row in rows]), {}
    for update in ("after", "before", "none"):
        process, mask, metrics, prm = found[update] = prm_run(home, rows, update=update, reference=reference)
        scored = rl.score_logprobs(prm if update == "before" else load(home, "other"), rows, CFG, Env(), 0)
        for i, (s, r) in enumerate(zip(scored, ref)):  # in the rows' order, nothing behind a response's end
            assert process[i, :len(s)].tolist() == pytest.approx((CFG.beta * (s - r)).tolist(), abs=1e-5)
            assert mask[i].sum() == len(s) and (process[i, len(s):] == 0).all()
        accuracy = prime.pair_accuracy(process.sum(1), outcomes, 4)
        assert metrics["pair_accuracy_after" if update == "before" else "pair_accuracy"] == accuracy
        assert metrics["prm"] == pytest.approx(process.sum(1).mean().item())
        unchanged = torch.equal(weights(prm), weights(load(home, "other")))
        assert unchanged == (update == "none") == ("prm_loss" not in metrics)
    assert torch.equal(weights(found["after"][3]), weights(found["before"][3]))
    assert found["after"][2].keys() == found["before"][2].keys() > found["none"][2].keys() - {"pair_accuracy"}
    assert found["after"][2] == found["before"][2] | {"prm": found["after"][2]["prm"]}
    assert (found["after"][0] - found["before"][0]).abs().max() > 1e-2
    torch.testing.assert_close(found["after"][0], found["none"][0], rtol=0, atol=1e-5)
    whole = prm_run(home, rows, reference=reference, granularity="whole")[0]
    torch.testing.assert_close(whole.sum(1), found["after"][0].sum(1))
    assert torch.equal(whole != 0, prime.last_token(mask))


def test_several_batches_are_read_one_after_the_other(home):
    """Single forward: the second batch's rewards are those of a PRM that has seen the first."""
    rows = responses(home, copies=False)
    rewards, mask, metrics, prm = prm_run(home, rows, batch_size=8)
    first, _, first_metrics, half_way = prm_run(home, rows[:8])
    second = rl.score_logprobs(half_way, rows[8:], CFG, Env(), 0)
    torch.testing.assert_close(rewards[:8, :first.shape[1]], first, rtol=0, atol=1e-5)
    for reward, row, logprobs in zip(rewards[8:], rows[8:], second):
        wanted = CFG.beta * (logprobs - row["ref_logprobs"])
        assert reward[:len(logprobs)].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    assert metrics["prm_loss"] != pytest.approx(first_metrics["prm_loss"], rel=1e-3)


def test_equal_responses_in_two_batches_have_each_their_forward(home):
    rows = responses(home, copies=False)
    rows[12:] = rows[:4]
    rewards = prm_run(home, rows, batch_size=8)[0]
    first = prm_run(home, rows[:8])[0]
    torch.testing.assert_close(rewards[:8, :first.shape[1]], first, rtol=0, atol=1e-5)
    assert (rewards[:4] - rewards[12:]).abs().max() > 1e-2


def test_prm_starts_at_ln_2_and_learns(home):
    rows = responses(home)
    outcomes = torch.tensor([row["verifiable"] for row in rows])
    process, mask, metrics, _ = prm_run(home, rows, name="policy")
    assert metrics["prm_loss"] == pytest.approx(math.log(2), abs=1e-6) and (prime.normalise(process, mask) == 0).all()
    cfg = dataclasses.replace(CFG, beta=0.05, prm_lr=3e-3)
    prm, wrapped = sft.prepare(load(home), cfg, Env(), sft.Policy)
    optimizer, ref, curve = sft.make_optimizer(prm, cfg, Env()), load(home), []
    for _ in range(15):
        curve.append(prime.process_rewards(rows, wrapped, prm, optimizer, ref, cfg, Env(), 0)[2])
    assert curve[-1]["pair_accuracy_after"] > 0.9 and curve[-1]["prm_loss"] < curve[0]["prm_loss"] - 0.05
    assert all(a["pair_accuracy_after"] == b["pair_accuracy"] for a, b in zip(curve, curve[1:]))
    assert outcomes.mean() == 0.5


def test_equal_responses_with_unequal_advantages(home):
    """--shuffle_process, or a question twice in a step: the copies' gradients add up, here to nothing."""
    model, cfg = load(home), dataclasses.replace(CFG, weight_decay=0.0)
    policy = sft.prepare(model, cfg, Env(), sft.Policy)[1]
    row = responses(home)[1]
    row["old_logprobs"] = row.pop("ref_logprobs")
    n = len(row["old_logprobs"])
    rows = [row | {"advantages": np.full(n, a, dtype=np.float32)} for a in (1, -1)]
    optimizer = sft.make_optimizer(model, cfg, Env())
    assert rl.update_policy(policy, model, optimizer, rows, 0.0, cfg, Env(), 0)["grad_norm"] < 1e-4


@pytest.fixture
def critic(home):
    return tdrm.load_reward_model(str(home / "policy"), torch.float32, 3).eval()


def test_values_are_read_before_the_token(home, critic):
    """V(x, y_<t) cannot depend on y_t, nor on the batch."""
    rows = responses(home)
    values = prime.critic_values(critic, rows, Env(), 0, rows_at_once=5)
    for row, v in zip(rows, values):
        logits = critic(input_ids=torch.tensor([row["input_ids"]])).logits[0, :, 0]
        assert v.tolist() == pytest.approx(logits[row["prompt_length"] - 1:-1].tolist(), abs=1e-5)
    other = [row | {"input_ids": row["input_ids"][:-1] + [21 - row["input_ids"][-1]]} for row in rows]
    for v, w in zip(values, prime.critic_values(critic, other, Env(), 0)):
        assert v.tolist() == pytest.approx(w.tolist(), abs=1e-5)


@pytest.mark.parametrize("norm, gamma", [("batch", 1.0), ("none", 0.9)])
def test_ppo(norm, gamma, home, critic):
    """Process rewards and, on the last token, the outcome, less what the critic expected; the critic learns the sum."""
    rows, weights = responses(home), {"process_weight": 0.7, "outcome_weight": 1.3}
    cfg = dataclasses.replace(CFG, norm=norm, gamma=gamma, micro_batch_size=3, critic_lr=2e-4, **weights)
    process, mask = prime.stack([0.1 * row["ref_logprobs"] + 0.2 for row in rows])
    outcomes = torch.tensor([row["verifiable"] for row in rows])
    values = prime.critic_values(critic, rows, Env(), 0)
    divisor = max(abs(sum(row[t:].tolist())) for row in process for t in range(len(row))) if norm == "batch" else 1
    targets = []
    for p, m, o in zip(process.double() / divisor, mask, outcomes.tolist()):
        r = [0.7 * x for x in p[m].tolist()]
        r[-1] += 1.3 * o
        targets.append([sum(gamma**(s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))])
    targets = np.concatenate(targets)
    left, optimizer = targets - np.concatenate(values), sft.make_optimizer(critic, cfg, Env())
    update = (critic, critic, optimizer, cfg, Env(), 0)
    step = lambda: prime.ppo_advantages(process, outcomes, mask, rows, *update)  # noqa: E731
    a, loss = step()
    assert a[mask].tolist() == pytest.approx(((left - left.mean()) / left.std(ddof=1)).tolist(), abs=1e-3)
    assert np.concatenate([row["returns"] for row in rows]).tolist() == pytest.approx(targets.tolist(), abs=1e-4)
    assert loss == pytest.approx((left**2).mean(), rel=1e-4)  # equal responses each count
    assert loss > step()[1] > [step()[1] for _ in range(5)][-1]


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.

def settings(home, out, **more):
    return {"model": str(home / "policy"), "data": (str(home / "problems.jsonl"),), "out": str(out), "steps": 4,
            "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "accuracy": (0.0, 1.0), "save_every": 2,
            "eval_every": 3, "eval_problems": 2, "show_every": 0, "lr": 1e-3, **more}


def train(env, options, fault=None):
    data.verify = right
    if fault:
        fault[0](env, *fault[1:])
    prime.main(prime.Config(**options), env)


def at_step(env, at, number):
    """The last rank gets a signal during a step, once: to stop is for all to agree on. Killed are all of them."""
    rate, sent = sft.learning_rate, []

    def patched(step, *rest):
        if step == at and not sent and (env.rank == env.world - 1 or number == signal.SIGKILL):
            sent.append(os.kill(os.getpid(), number))
        return rate(step, *rest)
    sft.learning_rate = patched


def kept_advantages(env, path):
    """Every rank leaves the advantages of each step behind."""
    update, seen = rl.update_policy, []

    def patched(policy, model, optimizer, rows, *rest):
        seen.append(np.concatenate([row["advantages"] for row in rows]))
        torch.save(seen, f"{path}{env.rank}.pt")
        return update(policy, model, optimizer, rows, *rest)
    rl.update_policy = patched


@pytest.fixture(scope="module")
def reference(home):
    """reference(world, **options) -> folder of an uninterrupted run."""
    done = {}

    def run(world, **more):
        key = (world, *sorted(more.items()))
        if key not in done:
            out = home / f"reference{len(done)}"
            codes = ranks(world, home, train, settings(home, out, **more), (kept_advantages, f"{out}.advantages"))
            assert codes == [0] * world
            done[key] = out
        return done[key]
    return run


def metrics(out):
    rows = [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]
    return [{k: v for k, v in row.items() if not k.startswith("seconds_") and k != "peak_mib"} for row in rows]


def same_weights(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def policy_of(out, folder="model"):
    return (out / folder / "model.safetensors").read_bytes()


def assert_same_run(out, expected, folders):
    assert metrics(out) == metrics(expected)
    assert (out / "summary.json").read_bytes() == (expected / "summary.json").read_bytes()
    for folder in folders:
        assert policy_of(out, folder) == policy_of(expected, folder), folder
    assert max(os.listdir(out / "state")) == "step_00000004"


PPO = {"estimator": "ppo", "update": "before"}
FOLDERS = {"ppo": ["model", "prm", "critic"], "rloo": ["model", "prm"]}


@pytest.mark.parametrize("world, more, at, number", [
    (1, PPO, 3, signal.SIGKILL), (2, PPO, 3, signal.SIGKILL), (2, PPO, 0, signal.SIGTERM), (1, {}, 2, signal.SIGTERM)])
def test_resumed_run_is_bitwise_the_uninterrupted_one(world, more, at, number, reference, home, tmp_path):
    expected, out = reference(world, **more), tmp_path / "run"
    codes = ranks(world, tmp_path, train, settings(home, out, **more), (at_step, at, number))
    assert (-signal.SIGKILL in codes and 0 not in codes) if number == signal.SIGKILL else codes == [0] * world
    assert max(os.listdir(out / "state")) == f"step_{2 if at == 3 else at + 1:08d}" and not (out / "model").exists()
    assert ranks(world, tmp_path, train, settings(home, out, resume=True, **more)) == [0] * world
    assert_same_run(out, expected, FOLDERS[more.get("estimator", "rloo")])


@pytest.mark.parametrize("more", [PPO, {}, {"batch_size": 3}], ids=str)
def test_number_of_processes_does_not_matter(more, reference):
    one, two = reference(1, **more), reference(2, **more)
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = b[name] if b[name] is None else pytest.approx(b[name], rel=1e-3, abs=1e-4)
            assert a[name] == same, (a["step"], name)
    files = [f"{two}.advantages0.pt", f"{two}.advantages1.pt", f"{one}.advantages0.pt"]
    found = [torch.load(file, weights_only=False) for file in files]
    for a, b, c in zip(*found, strict=True):
        assert (a == b).all() and a.tolist() == pytest.approx(c.tolist(), abs=2e-3)
        assert (a.mean(), a.var(ddof=1)) == pytest.approx((0, 1), abs=1e-4)  # whitened over all tokens of all ranks
    for folder in FOLDERS[more.get("estimator", "rloo")]:
        a, b = (load_file(out / folder / "model.safetensors") for out in (two, one))
        for name in a.keys() | b.keys():
            if not name.endswith("k_proj.bias"):  # without effect, so its gradient is rounding alone
                torch.testing.assert_close(a[name], b[name], rtol=0, atol=5e-4, msg=f"{folder} {name}")


def test_first_steps_of_a_run(reference, home):
    """q = 0 at first: the loss is ln 2, and what rounding leaves is no reward. What a run leaves behind."""
    for out in (reference(1), reference(2), reference(1, **PPO)):
        rows = metrics(out)
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[0].keys() == {"step", "pass@1", "greedy"}
        assert rows[1]["prm_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[2]["prm_loss"] != pytest.approx(math.log(2), abs=1e-4)
        assert all(0 < row["verifiable"] < 1 and row["kept"] == 1 and row["skipped"] == 0 for row in rows[1:])
        assert all(row["max_ratio_deviation"] < 1e-3 and row["questions"] == 2 * row["step"] for row in rows[1:])
        assert json.loads((out / "prm" / "reward.json").read_text()) == {"kind": "implicit", "beta": 0.5, "temperature": 1.0}
        for name, moved in (("model", True), ("prm", True), ("prm/reference", False)):
            assert same_weights(out / name, home / "policy") != moved
        assert load(out, "prm/reference") and data.load_tokenizer(str(out / "prm" / "reference"))


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """run(**options) -> folder of a run of two steps in this process."""
    monkeypatch.setattr(data, "verify", right)
    made = []

    def run(**more):
        made.append(tmp_path / f"run{len(made)}")
        prime.main(prime.Config(**settings(home, made[-1], steps=2, eval_every=0, save_every=0) | more), Env())
        return made[-1]
    return run


def test_a_finished_prm_brings_its_own_reference(run, home, monkeypatch):
    """Going on from another run's prm/ and policy: the reference stays the one that PRM was trained against."""
    first, used, load_lm = run(lr=1e-2), [], rl.load_causal_lm
    monkeypatch.setattr(rl, "load_causal_lm", lambda name, *rest: (used.append(name), load_lm(name, *rest))[1])
    second = run(model=str(first / "model"), prm=str(first / "prm"))
    assert used == [str(first / "model"), str(first / "prm"), str(first / "prm" / "reference")]
    assert same_weights(second / "prm" / "reference", home / "policy")


def test_process_rewards_of_the_first_step_are_zero(run, monkeypatch):
    seen, normalise = [], prime.normalise
    monkeypatch.setattr(prime, "normalise", lambda *args: seen.append(normalise(*args)) or seen[-1])
    run()
    run(update="before")
    assert [(process != 0).any().item() for process in seen] == [False, True, True, True]


@pytest.mark.parametrize("words", [
    "rloo after sft token batch", "rloo before policy whole none", "rloo_code none policy token none",
    "rloo_code before sft whole batch", "reinforce after policy whole batch", "reinforce none sft token none",
    "grpo before sft token none", "grpo after policy token batch", "ppo after policy token none",
    "ppo none sft whole batch", "value after sft token batch", "value before policy token none"])
def test_every_option_runs(words, run, home):
    names = ("estimator", "update", "reference", "granularity", "norm")
    options = dict(zip(names, words.split()))
    more = {"kl_coef": 0.1 * (options["granularity"] == "whole"), "oversample": 1 + (options["norm"] == "none")}
    out = run(**options, **more)
    rows = metrics(out)[1:]
    trained, sampled = options["update"] != "none", 4 if options["norm"] == "none" else 2
    assert len(rows) == 2
    for row in rows:
        assert {"pair_accuracy", "prm"} <= row.keys() and ("critic_loss" in row) == (options["estimator"] == "ppo")
        assert all((name in row) == trained for name in ("prm_loss", "prm_grad_norm", "pair_accuracy_after"))
        assert all(isinstance(v, (int, float)) for k, v in row.items() if not k.startswith("pair_accuracy"))
        assert row["kept"] == 2 / sampled and row["questions"] == sampled * row["step"]
    assert same_weights(out / "prm", home / "policy") != trained
    assert same_weights(out / "prm/reference", out / "model" if options["reference"] == "policy" else home / "policy")
    assert (out / "critic").exists() == (options["estimator"] == "ppo")


def test_without_process_rewards(run):
    """--prm none is --process_weight 0 without the PRM's cost; process rewards matter, and so does their order."""
    zero, shuffle = {"process_weight": 0.0}, {"shuffle_process": True}
    outs = {name: run(**options, update="before") for name, options in {
        "none": {"prm": "none"}, "zero": zero, "shuffled zero": zero | shuffle, "token": {}, "shuffled": shuffle,
        "whole": {"granularity": "whole"}}.items()}
    policies = {name: policy_of(out) for name, out in outs.items()}
    assert policies["none"] == policies["zero"] == policies["shuffled zero"]
    assert len({policies[name] for name in ("none", "token", "shuffled", "whole")}) == 4
    assert not (outs["none"] / "prm").exists() and "prm_loss" not in metrics(outs["none"])[1]
    assert "prm_loss" in metrics(outs["zero"])[1] and (outs["zero"] / "prm" / "reward.json").exists()


def test_a_prm_of_its_own(run, home):
    out = run(prm=str(home / "other"), update="none")
    assert policy_of(out, "prm") == policy_of(home, "other") and metrics(out)[1]["prm"] != pytest.approx(0, abs=1e-2)


def nothing_passes(env):
    data.verify = lambda text, answer: False


def test_no_group_passes_the_filter(home, tmp_path):
    """Every step is left out, the run goes on, also from a checkpoint in which no optimizer has a state."""
    more = {"accuracy": (0.2, 0.8), **PPO}
    for world in (1, 2):
        out = tmp_path / str(world)
        assert ranks(world, tmp_path, train, settings(home, out, **more), (stopped_and_wrong, 2)) == [0] * world
        assert max(os.listdir(out / "state")) == "step_00000003"
        assert ranks(world, tmp_path, train, settings(home, out, resume=True, **more), (nothing_passes,)) == [0] * world
        rows = metrics(out)
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
        for row in rows[1:]:
            assert row["kept"] == row["skipped"] == 0 and not {"prm_loss", "grad_norm"} & row.keys()
        assert all(same_weights(out / name, home / "policy") for name in ("model", "prm"))


def stopped_and_wrong(env, at):
    nothing_passes(env)
    at_step(env, at, signal.SIGTERM)


def test_some_groups_pass_the_filter(run, monkeypatch):
    """Metrics are of all rollouts, advantages of those kept."""
    sampled, seen, rollout, update = [], [], rl.rollout, rl.update_policy
    monkeypatch.setattr(rl, "rollout", lambda *args: sampled.append(rollout(*args)) or sampled[-1])
    monkeypatch.setattr(rl, "update_policy", lambda policy, model, optimizer, rows, *rest:
                        seen.append(rows) or update(policy, model, optimizer, rows, *rest))
    rows = metrics(run(accuracy=(0.2, 0.5), prompts_per_step=6))[1:]
    assert [len(kept) / 24 for kept in seen] == [row["kept"] for row in rows] and all(row["kept"] < 1 for row in rows)
    shares = [np.mean([row["verifiable"] for row in all_rows]) for all_rows in sampled]
    assert all([row[name] for row in rows] == pytest.approx(shares) for name in ("reward", "verifiable"))
    for kept in seen:
        share = np.array([row["verifiable"] for row in kept]).reshape(-1, 4).mean(1)
        assert 0.2 <= share.min() and share.max() <= 0.5
        assert len({row["prompt"] for row in kept}) == len(kept) // 4 and "ref_logprobs" not in kept[0]  # no KL term


def test_shown_rewards_are_those_of_the_shown_response(run, monkeypatch):
    """With --mask_truncated the first response may have left the batch."""
    scored, shown, rewards = [], [], prime.process_rewards

    def spy(rows, *rest):
        result = rewards(rows, *rest)
        scored.append({id(row): process for row, process in zip(rows, result[0])})
        return result
    monkeypatch.setattr(prime, "process_rewards", spy)
    monkeypatch.setattr(prime, "show_rewards", lambda env, tokenizer, row, process: shown.append((row, process)))
    run(show_every=1, mask_truncated=True, update="before", prompts_per_step=6, steps=3)
    assert len(shown) >= 2
    for (row, process), known in zip(shown, scored):
        assert torch.equal(process, known[id(row)])


def test_show_rewards(capsys):
    row = {"input_ids": [7, 8, 9, 1], "prompt_length": 1, "prompt": "1+1", "correct": True}
    tokenizer = SimpleNamespace(decode=lambda ids: "abcdefghij"[ids[0]])
    prime.show_rewards(Env(), tokenizer, row, torch.tensor([0.1, -0.2, 0.05, 0.0]))
    assert capsys.readouterr().out.strip() == "1+1: right; process rewards (largest 1): 'i' +0.50, 'j' -1.00, 'b' +0.25"
