"""Credit for single tokens: formulas against numbers worked out by hand and against loops, the
critic, REINFORCE and PPO with each kind of reward model.

A random policy is never right, so where responses are sampled the verifier looks at the parity of
their length: nonsense, but a function of the text alone.
"""

import os
import shutil
import signal

import numpy as np
import pytest
import torch

import data
import rl_minimal as rl
from helpers import assert_same_run, at_step, numbers, ranks, save_policy, write_rows
from parts import credit, verifier
from parts.credit import Critic
from parts.formats import BadInput
from parts.models import load_policy
from parts.rewards import RewardModel, load_reward_model, new_reward_model
from parts.runs import Processes
from test_rl import moved, response_logprobs, rollout, updates_seen

KINDS = ("qrm", "orm", "implicit")
TOKENIZER = data.builtin_tokenizer()
ALONE = Processes()


def tensors(rows, starts=None, filler=0.0):
    """Ragged rows, each beginning at its column -> (N, T), mask; `filler` outside."""
    starts = starts or [0] * len(rows)
    width = max(start + len(row) for start, row in zip(starts, rows))
    numbers = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (start, row) in enumerate(zip(starts, rows)):
        place = slice(start, start + len(row))
        numbers[i, place], mask[i, place] = torch.tensor(row), True
    return numbers, mask


def ragged(seed, n, longest=6):
    """Random rows of 1 to `longest` numbers, and random beginnings."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        length = rng.integers(1, longest + 1)
        rows.append(rng.normal(size=length).round(3).tolist())
    return rows, rng.integers(0, 3, n).tolist()


# --------------------------------------------------------------------------------------------------
# The maths.


def test_arrays_to_a_tensor_and_back():
    rows, _ = ragged(0, 5)
    arrays = [np.array(row, dtype=np.float32) for row in rows]
    numbers, mask = credit.stack(arrays)
    wanted, wanted_mask = tensors(rows)
    assert torch.equal(numbers, wanted) and torch.equal(mask, wanted_mask)
    for array, again in zip(arrays, credit.unstack(numbers, mask), strict=True):
        assert (array == again).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_last_token(dtype):
    mask = [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    wanted = [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert credit.last_token(torch.tensor(mask).to(dtype)).int().tolist() == wanted


def naive_returns(row, gamma):
    n = len(row)
    return [sum(gamma ** (s - t) * row[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns(gamma):
    rows, starts = ragged(1, 8)
    rewards, mask = tensors(rows, starts, filler=7.0)
    wanted, _ = tensors([naive_returns(row, gamma) for row in rows], starts)
    torch.testing.assert_close(credit.returns(rewards, mask, gamma), wanted)


def test_whiten():
    rows, starts = ragged(2, 6)
    numbers, mask = tensors(rows, starts, filler=7.0)
    everything = np.concatenate(rows)
    white = credit.whiten(numbers, mask.float())
    wanted = (everything - everything.mean()) / everything.std(ddof=1)
    assert white[mask].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    assert (white[~mask] == 0).all()
    for same in (torch.full((4, 3), 5.0), torch.full((1, 1), 5.0)):
        assert (credit.whiten(same, torch.ones_like(same)) == 0).all()


def naive_gae(row, values, gamma, lam):
    values = [*values, 0.0]
    delta = [row[t] + gamma * values[t + 1] - values[t] for t in range(len(row))]
    return naive_returns(delta, gamma * lam)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_that_of_naive_loops(gamma, lam):
    rows, starts = ragged(3, 6)
    rng = np.random.default_rng(3)
    values = [rng.normal(size=len(row)).tolist() for row in rows]
    r, mask = tensors(rows, starts, filler=3.0)
    v, _ = tensors(values, starts, filler=-5.0)
    advantages, goals = credit.gae(r, v, mask.float(), gamma, lam)
    wanted = [naive_gae(row, value, gamma, lam) for row, value in zip(rows, values)]
    for row, value, a in zip(rows, values, wanted):
        if gamma == lam == 1:
            known = np.subtract(naive_returns(row, 1.0), value)
            assert a == pytest.approx(known.tolist())
        if gamma == 0:  # rewards that are returns
            assert a == pytest.approx(np.subtract(row, value).tolist())
    torch.testing.assert_close(advantages, tensors(wanted, starts)[0], rtol=1e-4, atol=1e-5)
    wanted = [np.add(a, value).tolist() for a, value in zip(wanted, values)]
    torch.testing.assert_close(goals, tensors(wanted, starts)[0], rtol=1e-4, atol=1e-5)


SCORES, MASK = tensors([[1.0, 3.0], [5.0, 7.0, 12.0]])


def standardised(numbers):
    numbers = np.array(numbers)
    return pytest.approx(((numbers - numbers.mean()) / numbers.std(ddof=1)).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_token_rewards(kind):
    paid = [3, 3, 12, 12, 12.0] if kind == "orm" else [1, 3, 5, 7, 12.0]
    rewards = credit.token_rewards(SCORES, MASK, kind)
    assert rewards[MASK].tolist() == standardised(paid) and (rewards[~MASK] == 0).all()
    assert (credit.token_rewards(torch.full((2, 3), 4.0), MASK, kind) == 0).all()


def test_reinforce_advantages():
    assert credit.reinforce_advantages(SCORES, MASK).tolist() == [[1, 2, 0], [5, 7, 8]]
    one = credit.token_rewards(SCORES, MASK, "orm")  # one number for all tokens
    torch.testing.assert_close(credit.reinforce_advantages(one, MASK), one)


def test_gae_of_token_rewards_by_hand():
    v = torch.tensor([[0.5, 1.0, 9.0], [2.0, 0.0, 4.0]])
    a, goals = credit.gae(SCORES, v, MASK.float(), 0.0)  # Q-RM: scores are returns
    assert a.tolist() == [[0.5, 2, 0], [3, 7, 8]] and torch.equal(goals, SCORES)
    at_the_end = SCORES * credit.last_token(MASK)
    a, goals = credit.gae(at_the_end, v, MASK.float(), 0.5, 0.5)  # ORM
    assert a[0].tolist() == pytest.approx([0.5 * 1 - 0.5 + 0.25 * 2, 3 - 1, 0])
    assert goals[0].tolist() == pytest.approx([1.0, 3, 0])
    a, _ = credit.gae(SCORES, v, MASK.float(), 0.5, 0.5)  # DPO-RM: scores are rewards
    assert a[0].tolist() == pytest.approx([1 + 0.5 * 1 - 0.5 + 0.25 * 2, 3 - 1, 0])


# --------------------------------------------------------------------------------------------------
# The critic.


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy, another one, questions, and a reward model of each kind."""
    home = tmp_path_factory.mktemp("tokens")
    for seed, name in enumerate(("policy", "other")):
        save_policy(home / name, seed)
    write_rows(home / "problems.jsonl", data.make_problems(12))
    name = str(home / "policy")
    for kind, scale in (("qrm", 0.2), ("orm", 1.0)):
        reward = new_reward_model(name, TOKENIZER, torch.float32, 5, kind, scale=scale)
        reward.save(str(home / kind))
    policy, other = (load_policy(str(home / name), torch.float32) for name in ("policy", "other"))
    RewardModel(other, TOKENIZER, "implicit", policy, beta=0.1).save(str(home / "implicit"))
    return home


def settings(home, out, **more):
    options = {
        "model": str(home / "policy"),
        "prm": str(home / "qrm"),
        "data": (str(home / "problems.jsonl"),),
        "out": str(out),
        "credit": "token",
        "estimator": "reinforce",
        "alpha": 0.0,
        "kl_reward": 0.05,
        "steps": 2,
        "prompts_per_step": 6,
        "group_size": 2,
        "max_new_tokens": 12,
        "max_length": 128,
        "lr": 1e-3,
    }
    return options | more


def made_up_rollouts():
    """Twelve responses of 1 to 7 tokens, with log-probs under two policies."""
    rng, rollouts = np.random.default_rng(0), []
    for _ in range(12):
        prompt = [3, *rng.integers(5, 15, rng.integers(2, 6)).tolist(), 4]
        response = rng.integers(5, 20, rng.integers(1, 8)).tolist()
        r = rollout(prompt, response)
        r.correct = float(rng.integers(2))
        logprobs = rng.normal(-2, 1, (2, len(response))).astype(np.float32)
        r.old_logprobs, r.initial_logprobs = logprobs
        rollouts.append(r)
    return rollouts


def make_critic(home, seed=3, **more):
    cfg = rl.Config(**settings(home, "", seed=seed, **more))
    return Critic(None, torch.float32, TOKENIZER, cfg, ALONE)


def naive_values(critic, r):
    """Read before the token is known."""
    logits = critic.learner.module.model(input_ids=torch.tensor([r.input_ids])).logits
    return logits[0, r.prompt_length - 1 : -1, 0].tolist()


def test_values_are_read_before_the_token(home):
    """V(x, y_<t) cannot depend on y_t, nor on the batch."""
    critic, rollouts = make_critic(home), made_up_rollouts()
    values = critic.values(rollouts)
    for r, v in zip(rollouts, values, strict=True):
        assert v.tolist() == pytest.approx(naive_values(critic, r), abs=1e-5)
    for r in rollouts:
        r.input_ids[-1] = 21 - r.input_ids[-1]
    for v, again in zip(values, critic.values(rollouts)):
        assert v.tolist() == pytest.approx(again.tolist(), abs=1e-5)


@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.0, 0.8)])
def test_critic(gamma, lam, micro, home):
    """Advantages are what it did not expect; it learns the returns, over all tokens alike."""
    critic = make_critic(home, critic_lr=2e-4, micro_batch_size=micro)
    rollouts = made_up_rollouts()
    rewards, mask = credit.stack([r.old_logprobs / 4 for r in rollouts])
    values, wanted, goals = [], [], []
    for row, m, r in zip(rewards, mask, rollouts):
        values = naive_values(critic, r)
        wanted.append(naive_gae(row[m].tolist(), values, gamma, lam))
        goals.append(np.add(wanted[-1], values))
    advantages, loss = critic.advantages(rewards, mask, rollouts, gamma, lam)
    everything = np.concatenate(wanted)
    assert advantages[mask].tolist() == pytest.approx(everything.tolist(), abs=1e-4)
    assert loss == pytest.approx((everything**2).mean(), rel=1e-4)
    for r, goal in zip(rollouts, goals):
        assert r.returns.tolist() == pytest.approx(goal.tolist(), abs=1e-4)
    losses = [loss, *(critic.train(rollouts) for _ in range(6))]
    assert losses[0] > losses[1] > losses[-1]


# --------------------------------------------------------------------------------------------------
# What a token is worth.


def naive_rewards(prm, rollouts, kl_reward, ppo):
    """A list for each response: the standardised score, less what it cost to leave the initial
    policy. An ORM's score is paid at every token or, where a critic hands it on, at the last; the
    KL at every token."""
    scores, rewards = [], []
    for r in rollouts:
        ids, n = torch.tensor([r.input_ids]), r.prompt_length
        if prm.kind == "implicit":
            ours, theirs = (response_logprobs(m, r) for m in (prm.model, prm.reference))
            z = (prm.beta * (ours - theirs)).tolist()
        else:
            z = prm.model(input_ids=ids).logits[0, n:, 0].tolist()
        scores.append([z[-1]] * len(z) if prm.kind == "orm" else z)
    everything = np.concatenate(scores)
    for r, z in zip(rollouts, scores):
        paid = (np.array(z) - everything.mean()) / everything.std(ddof=1)
        if prm.kind == "orm" and ppo:
            paid[:-1] = 0
        rewards.append(paid - kl_reward * (r.old_logprobs - r.initial_logprobs))
    return rewards


@pytest.mark.parametrize("kl_reward", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_reinforce_pays_each_token_its_own_score(kind, kl_reward, home):
    prm, rollouts = load_reward_model(str(home / kind), torch.float32), made_up_rollouts()
    cfg = rl.Config(**settings(home, "", kl_reward=kl_reward))
    whole, metrics = rl.set_token_advantages(rollouts, prm, None, cfg, ALONE)
    for r, rewards in zip(rollouts, naive_rewards(prm, rollouts, kl_reward, False), strict=True):
        wanted = [*rewards[:-1], rewards.mean()]  # whether to end: a matter of the whole response
        assert r.advantages.tolist() == pytest.approx(wanted, abs=2e-3)
    logratios = np.concatenate([r.old_logprobs - r.initial_logprobs for r in rollouts])
    assert metrics.get("kl", 0.0) == pytest.approx(logratios.mean() if kl_reward else 0.0)
    scores = [z.tolist() for z in prm.score_tokens(rollouts, ALONE)]
    reduce = {"qrm": lambda z: prm.scale * np.mean(z), "orm": lambda z: z[-1], "implicit": sum}
    assert whole.tolist() == pytest.approx([reduce[kind](z) for z in scores], abs=1e-4)
    assert metrics["score_mean"] == pytest.approx(np.concatenate(scores).mean(), abs=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("kl_reward", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_ppo_pays_what_the_critic_did_not_expect(kind, kl_reward, gamma, home):
    prm, rollouts = load_reward_model(str(home / kind), torch.float32), made_up_rollouts()
    more = {"estimator": "ppo", "kl_reward": kl_reward, "gamma": gamma}
    cfg, critic = rl.Config(**settings(home, "", **more)), make_critic(home, **more)
    values = [naive_values(critic, r) for r in rollouts]
    _, metrics = rl.set_token_advantages(rollouts, prm, critic, cfg, ALONE)
    rewards, errors = naive_rewards(prm, rollouts, kl_reward, True), []
    for r, row, v in zip(rollouts, rewards, values, strict=True):
        wanted = naive_gae(row, v, gamma, rl.LAMBDA)
        if gamma == 0:
            assert wanted == pytest.approx(np.subtract(row, v).tolist())
        assert r.advantages.tolist() == pytest.approx(wanted, abs=2e-3)
        assert r.returns.tolist() == pytest.approx(np.add(wanted, v).tolist(), abs=2e-3)
        errors += [a**2 for a in wanted]
    assert metrics["critic_loss"] == pytest.approx(np.mean(errors), rel=1e-3)


# --------------------------------------------------------------------------------------------------
# Whole runs.


def parity(text, answer):
    return len(text) % 2 == 0


@pytest.fixture(autouse=True)
def verify_parity(monkeypatch):
    monkeypatch.setattr(verifier, "verify", parity)


def train(procs, options, fault=None):
    verifier.verify = parity
    if fault:
        fault[0](procs, *fault[1:])
    rl.main(rl.Config(**options), procs)


def run(home, out, **more):
    return rl.main(rl.Config(**settings(home, out, **more)), ALONE)


@pytest.mark.parametrize("estimator", ["reinforce", "ppo"])
@pytest.mark.parametrize("kind", KINDS)
def test_run(home, tmp_path, monkeypatch, kind, estimator):
    """In the second step the policy has moved, the initial one has not."""
    seen, out = updates_seen(monkeypatch), tmp_path / "run"
    more = {"group_size": 1} if kind == "qrm" else {}
    prm = str(home / kind)
    summary = run(home, out, prm=prm, estimator=estimator, kl_reward=0.7, lr=3e-3, **more)
    rows = numbers(out)
    assert len(rows) == 3 and summary["steps"] == 2
    for row in rows[1:]:
        assert row["max_ratio_deviation"] < 1e-3 and row["grad_norm"] > 0
        assert row["score_std"] > 0 and ("critic_loss" in row) == (estimator == "ppo")
    assert moved(out / "model", home / "policy")
    assert (out / "critic").exists() == (estimator == "ppo")
    initial = load_policy(str(home / "policy"), torch.float32)
    for r in seen[1]:
        wanted = response_logprobs(initial, r).tolist()
        assert r.initial_logprobs.tolist() == pytest.approx(wanted, abs=1e-4)
        assert np.abs(r.old_logprobs - wanted).max() > 0.01
    if estimator == "reinforce":
        prm = load_reward_model(prm, torch.float32)
        rewards = naive_rewards(prm, seen[1], 0.7, False)
        for r, row in zip(seen[1], rewards, strict=True):
            wanted = [*row[:-1], row.mean()]
            assert r.advantages.tolist() == pytest.approx(wanted, abs=2e-3)


def test_without_a_kl_term_no_initial_policy_is_asked(home, tmp_path, monkeypatch):
    seen = updates_seen(monkeypatch)
    run(home, tmp_path / "run", kl_reward=0.0, steps=1)
    assert all(r.initial_logprobs is None for r in seen[0])
    assert "kl" not in numbers(tmp_path / "run")[1]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_also_pays_whole_responses(home, tmp_path, kind):
    more = {"credit": "response", "alpha": 0.5, "estimator": "grpo", "kl_reward": 0.0}
    run(home, tmp_path / "run", prm=str(home / kind), steps=1, **more)
    row = numbers(tmp_path / "run")[1]
    assert row["reward"] == pytest.approx((row["correct"] + row["prm"]) / 2, abs=1e-5)
    assert 0 < row["prm"] < 1


def test_two_processes_and_a_resumed_run(home, tmp_path):
    more = {"estimator": "ppo", "gamma": 0.0, "save_every": 1, "steps": 3}
    one, two, stopped = (tmp_path / name for name in ("one", "two", "stopped"))
    run(home, one, **more)
    assert ranks(2, tmp_path, train, settings(home, two, **more)) == [0, 0]
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            same = a[name] == b[name]
            assert same or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    fault = (at_step, 1, signal.SIGTERM)
    assert ranks(1, tmp_path, train, settings(home, stopped, **more), fault) == [0]
    assert max(os.listdir(stopped / "state")) == "step_00000002"
    run(home, stopped, resume=True, **more)
    assert_same_run(stopped, one, ("model", "critic"))


# --------------------------------------------------------------------------------------------------
# Bad input.


def error_of(home, tmp_path, **more):
    with pytest.raises(BadInput) as caught:
        run(home, tmp_path / "run", **more)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()  # a mistake leaves nothing behind
    return message


@pytest.mark.parametrize(
    "more, message",
    [
        ({"estimator": "grpo"}, "--credit token: wanted --estimator reinforce or ppo, not grpo"),
        ({"alpha": 0.8}, "--credit token: a frozen reward model pays"),
        ({"prm_lr": 1e-3}, "--credit token: a frozen reward model pays"),
        ({"credit": "response"}, "--estimator ppo and --kl_reward pay single tokens"),
        (
            {"credit": "response", "estimator": "ppo", "kl_reward": 0.0},
            "--estimator ppo and --kl_reward pay single tokens",
        ),
        ({"prm": "NOWHERE"}, "--prm "),
        ({"prm": "POLICY"}, "--prm "),
        ({"max_new_tokens": 2048}, "--max_new_tokens 2048: "),
    ],
    ids=str,
)
def test_bad_options(home, tmp_path, more, message):
    names = {"NOWHERE": str(tmp_path / "none"), "POLICY": str(home / "policy")}
    more = {key: names.get(value, value) for key, value in more.items()}
    assert error_of(home, tmp_path, **more).startswith(message)


def test_pairs_are_no_problems(home, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    write_rows(pairs, [{"prompt": "1+1", "chosen": "2", "rejected": "3"}])
    assert "pairs.jsonl:1: " in error_of(home, tmp_path, data=(str(pairs),))


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "other"}', '{"kind": "qrm", "reach": 2}'])
def test_damaged_reward_model(home, tmp_path, text):
    folder = tmp_path / "prm"
    shutil.copytree(home / "qrm", folder)
    (folder / "reward.json").write_text(text)
    message = error_of(home, tmp_path, prm=str(folder))
    assert message.startswith(f"--prm: {folder}/reward.json is damaged")


def test_reward_model_without_its_reference(home, tmp_path):
    folder = tmp_path / "prm"
    shutil.copytree(home / "implicit", folder)
    shutil.rmtree(folder / "reference")
    message = error_of(home, tmp_path, prm=str(folder))
    assert message.startswith(f"--prm {folder}/reference: no such folder")


def test_reward_model_of_other_tokens(home, tmp_path):
    shutil.copytree(home / "qrm", tmp_path / "prm")
    data.byte_tokenizer().save_pretrained(tmp_path / "prm")
    message = error_of(home, tmp_path, prm=str(tmp_path / "prm"))
    assert "its tokenizer is not the policy's" in message


def test_only_step_values_learn_on_the_rollouts(home, tmp_path):
    more = {"credit": "response", "estimator": "grpo", "kl_reward": 0.0, "prm_lr": 1e-3}
    assert "--prm_lr: " in error_of(home, tmp_path, **more)
