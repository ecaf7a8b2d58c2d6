"""Q-RM: losses and advantages against numbers worked out by hand, the tokens that are read, pairs, whole runs on one and two
ranks, RL with each kind of reward model.

A random policy is never right, so where responses are sampled `data.verify` is the parity of their length.
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
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import prime_minimal as prime
import qrm_minimal as qrm
import rl_minimal as rl
import sft_minimal as sft
import tdrm_minimal as tdrm
from data import BadInput
from pairs import encode_pairs, load_data, make_pairs
from plumbing import Env
from scorers import load_scorer
from test_training import ranks

METHODS = ("qrm", "orm", "dpo_rm")
softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731


def mask(*lengths, width=None):
    return torch.arange(width or max(lengths))[None] < torch.tensor(lengths)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# The maths.

CHOSEN, REJECTED = torch.tensor([[4.0, 8.0, 9.0], [1.0, -1.0, 3.0]]), torch.tensor([[2.0, 100.0], [5.0, -2.0]])
MASKS = mask(2, 3), mask(1, 2, width=2)


@pytest.mark.parametrize("reduce, scores", [("mean", ([6, 1], [2, 1.5])), ("sum", ([12, 3], [2, 3])), ("last", ([8, 3], [2, -2]))])
def test_pair_loss_by_hand(reduce, scores):
    assert qrm.response_scores(CHOSEN, MASKS[0], reduce).tolist() == pytest.approx(scores[0])
    assert qrm.response_scores(REJECTED, MASKS[1], reduce).tolist() == pytest.approx(scores[1])
    for beta, margin in (0.2, 2.0), (1.0, 0.0), (0.1, -1.0):
        losses = [softplus(margin - beta * (w - l)) for w, l in zip(*scores)]
        assert qrm.pair_loss(CHOSEN, REJECTED, *MASKS, beta, margin, reduce).item() == pytest.approx(sum(losses) / 2)
        assert qrm.pair_loss(CHOSEN, REJECTED, *MASKS, beta, margin, reduce, count=8).item() == pytest.approx(sum(losses) / 8)
    prompt = [F.pad(m, (3, 0)) for m in MASKS]  # a prompt in front, of any scores
    shifted = [F.pad(q, (3, 0), value=7.0) for q in (CHOSEN, REJECTED)]
    assert torch.equal(qrm.pair_loss(*shifted, *prompt, reduce=reduce), qrm.pair_loss(CHOSEN, REJECTED, *MASKS, reduce=reduce))


def test_defaults_and_the_first_loss():
    assert qrm.pair_loss(torch.ones(3, 4), torch.ones(3, 2), mask(4, 1, 2), mask(2, 1, 1)).item() == pytest.approx(2.126928)
    for margin in (0.0, 2.0, -3.0, 50.0):
        q = torch.full((1, 3), 5.0, requires_grad=True)
        loss = qrm.pair_loss(q, torch.full((1, 2), 5.0), mask(3), mask(2), 0.2, margin)
        loss.backward()
        assert loss.item() == pytest.approx(softplus(margin) if margin < 40 else margin)
        assert q.grad.tolist() == [pytest.approx([-0.2 / (1 + math.exp(-margin)) / 3] * 3)]


def test_equal_responses_and_empty_masks():
    q = torch.randn(2, 5, requires_grad=True)
    loss = qrm.pair_loss(q, q, mask(5, 3), mask(5, 3))
    loss.backward()
    assert loss.item() == pytest.approx(softplus(2)) and q.grad.abs().max() < 1e-8
    for bad in (math.nan, math.inf, 7.0):  # the second pair has no chosen, the third no rejected response
        w, l = torch.full((4, 3), 1.0), torch.full((4, 2), 0.5)  # noqa: E741
        w[1], l[2], w[3, 1:] = bad, bad, bad
        w.requires_grad_(), l.requires_grad_()
        masks = mask(3, 0, 2, 1, width=3), mask(2, 1, 0, 2, width=2)
        loss = qrm.pair_loss(w, l, *masks)
        loss.backward()
        assert loss.item() == pytest.approx(softplus(2 - 0.1))
        assert (w.grad[1:3] == 0).all() and (l.grad[1:3] == 0).all() and w.grad.isfinite().all() and l.grad.isfinite().all()
        nothing = qrm.pair_loss(w, l, torch.zeros(4, 3).bool(), torch.zeros(4, 2).bool())
        nothing.backward()  # a graph, so that the others of a process group need not wait
        assert nothing.item() == 0


def test_token_rewards_and_advantages():
    q, m = torch.tensor([[1.0, 3.0, 0.0], [5.0, 7.0, 12.0]]), mask(2, 3)
    values = np.array([1, 3, 5, 7, 12.0])
    centred, divided = (values - values.mean()) / values.std(ddof=1), values / values.std(ddof=1)
    assert qrm.token_rewards(q, m)[m].tolist() == pytest.approx(centred.tolist(), abs=1e-5)
    assert qrm.token_rewards(q, m, centre=False)[m].tolist() == pytest.approx(divided.tolist(), abs=1e-5)
    last = np.array([3, 3, 12, 12, 12.0])
    orm = qrm.token_rewards(q, m, "orm")
    assert orm[m].tolist() == pytest.approx(((last - last.mean()) / last.std(ddof=1)).tolist(), abs=1e-5)
    for centre in (True, False):
        same = qrm.token_rewards(torch.full((2, 3), 4.0), m, centre=centre)
        assert (same == 0).all() and (qrm.token_rewards(q, m, centre=centre)[~m] == 0).all()
    r = torch.tensor([[1.0, 3.0, 0.0], [5.0, 7.0, 12.0]])
    assert qrm.reinforce_advantages(r, m).tolist() == [[1, 2, 0], [5, 7, 8]]
    assert torch.allclose(qrm.reinforce_advantages(orm, m), orm)  # one number for all tokens
    v = torch.tensor([[0.5, 1.0, 9.0], [2.0, 0.0, 4.0]])
    a, target = qrm.ppo_advantages(r, v, m, "qrm", 0.5)
    assert a.tolist() == [[0.75, 2.5, 0], [4, 7, 10]] and torch.equal(target, r)
    a, target = qrm.ppo_advantages(r, v, m, "orm", gamma=0.5, lam=0.5)  # r on the last token only
    assert a[0].tolist() == pytest.approx([0.5 * 1 - 0.5 + 0.25 * 2, 3 - 1, 0]) and target[0].tolist() == pytest.approx([1.0, 3, 0])
    a, _ = qrm.ppo_advantages(r, v, m, "dpo_rm", gamma=0.5, lam=0.5)
    assert a[0].tolist() == pytest.approx([1 + 0.5 * 1 - 0.5 + 0.25 * 2, 3 - 1, 0])


def test_localisation_by_hand():
    scores = [[2.0, 1.5, 0.0, 9.0], [1.0, 1.2], [0.0, 0.5, 0.4]]  # mean first score 1
    # falls: -1, .5, [1.5] (9 comes after the error); 0, -.2; [1] (an error in the first unit)
    assert qrm.localisation_auroc(scores, [2, -1, 0]) == 1.0
    assert qrm.localisation_auroc(scores, [1, -1, 0]) == 1.0  # .5 and 1 against -1, 0, -.2
    assert qrm.localisation_auroc(scores, [0, 1, -1]) == pytest.approx((0 + 1) / 8)  # -1, -.2 against 0, 1, -.5, .1
    assert qrm.localisation_auroc([[1.0, 1.0], [1.0, 1.0]], [0, 1]) == 0.5
    assert math.isnan(qrm.localisation_auroc(scores, [-1, -1, -1])) and math.isnan(qrm.localisation_auroc([[1.0]], [0]))
    assert math.isnan(qrm.localisation_auroc([], []))


# ---------------------------------------------------------------------------------------------------------------------
# Which token is read.

class Bigrams(torch.nn.Module):
    """A language model with a table of logits: rows are the token before, columns the next."""
    def __init__(self, table):
        super().__init__()
        self.head = torch.nn.Linear(len(table), len(table), bias=False)
        self.head.weight.data = table.T.clone()
        self.base_model = lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=F.one_hot(input_ids, len(table)).float())

    def get_output_embeddings(self):
        return self.head


def test_dpo_rm_reads_the_log_prob_of_the_token_itself():
    prompt, a, b, end, pad = 1, 2, 3, 4, 0
    reference, table = torch.zeros(5, 5), torch.zeros(5, 5)
    table[a, b] = 3.0  # the two models differ in nothing but b after a
    reward = qrm.TokenReward(Bigrams(table), "dpo_rm", 0.5, Bigrams(reference))
    ids = torch.tensor([[prompt, prompt, a, b, end, pad], [prompt, a, end, pad, pad, pad]])
    m = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()  # column t is token t + 1
    log_z = math.log(4 + math.exp(3))
    assert reward(ids, m)[0].tolist() == pytest.approx([0, 0, 0.5 * (3 - log_z + math.log(5)), 0, 0], abs=1e-6)
    assert reward(ids, m)[1].tolist() == pytest.approx([0, 0.5 * (-log_z + math.log(5)), 0, 0, 0], abs=1e-6)
    table[end, pad] = 9.0  # what comes after the end has no part in it
    assert torch.equal(qrm.TokenReward(Bigrams(table), "dpo_rm", 0.5, Bigrams(reference))(ids, m), reward(ids, m))


def test_q_is_read_at_the_token_itself():
    def classifier(input_ids, use_cache):
        return SimpleNamespace(logits=input_ids[..., None] * 10.0)  # z_t tells the token
    ids = torch.tensor([[7, 8, 1, 2, 3, 0], [7, 4, 5, 0, 0, 0]])
    reward = qrm.TokenReward(torch.nn.Identity(), "qrm")
    reward.model = torch.nn.Module()
    reward.model.forward = classifier
    q = reward(ids, torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool())
    assert q.tolist() == [[0, 10, 20, 30, 0], [40, 50, 0, 0, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Pairs.

def trajectory(question, steps, correct, **more):
    return {"prompt": question, "completions": steps, "correct": correct, "source": "f:1", **more}


def test_pairs_of_each_question():
    rows = [trajectory(q, [f"{q}{i}"], i % 3 == 0) for q in ("a", "b") for i in range(12)]
    rows += [trajectory("a", ["a0"], True)] * 5 + [trajectory("only right", ["x"], True), trajectory("only wrong", ["y"], False)]
    for most in (1, 4, 31, 32, 1000):
        pairs = make_pairs(rows, most, seed=3)
        for q in ("a", "b"):
            mine = [(p["chosen"][0], p["rejected"][0]) for p in pairs if p["prompt"] == q]
            assert len(mine) == len(set(mine)) == min(most, 4 * 8)
            assert all(w[0] == l[0] == q and int(w[1:]) % 3 == 0 and int(l[1:]) % 3 for w, l in mine)
        assert {p["prompt"] for p in pairs} == {"a", "b"}
    some = make_pairs(rows, 4, seed=3)
    assert some != make_pairs(rows, 4, seed=4)
    others = [r for r in rows if r["prompt"] != "b"]
    assert make_pairs(others, 4, seed=3) == [p for p in some if p["prompt"] == "a"]  # whatever else there is
    with pytest.raises(BadInput, match="f:1: whether it is right"):
        make_pairs([trajectory("a", ["x"], None)], 4)
    chat = [{"role": "user", "content": "a"}]
    assert make_pairs([trajectory(chat, ["x"], True), trajectory(chat, ["y"], False)], 1)[0]["prompt"] == chat


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("qrm")
    tokenizer = data.builtin_tokenizer()
    sft.new_policy(tokenizer, 0).save_pretrained(home / "policy")
    tokenizer.save_pretrained(home / "policy")
    problems = data.make_problems(60)
    rows = data.make_trajectories(problems, 8, seed=2)
    write(home / "samples.jsonl", [{k: row[k] for k in ("prompt", "completions", "answer")} for row in rows])
    write(home / "problems.jsonl", problems[:12])
    join = data.STEP_END.join
    pairs = [{"prompt": p["prompt"], "chosen": " " + join(p["chosen"]), "rejected": join(p["rejected"])} for p in make_pairs(rows, 3)]
    write(home / "pairs.jsonl", pairs)
    return home


def config(home, out="", **more):
    return qrm.Config(**{"model": str(home / "policy"), "data": (str(home / "pairs.jsonl"),), "out": str(out), "batch_size": 16,
                         "max_length": 128, "steps": 3, "lr": 1e-3, **({} if more.get("method", "qrm") != "qrm" else {"beta": 0.2}), **more})


def load(home, **more):
    return load_data(config(home, **more), data.builtin_level(more.get("data", ("x",))), data.builtin_tokenizer(), Env())


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.setattr(data, "verify", lambda text, answer: len(text) % 2 == 0)


def test_no_question_is_in_both_halves(home, tmp_path, parity):
    questions = lambda pairs: {p["prompt"] for p in pairs}  # noqa: E731
    sources = [{}, {"data": ("builtin",), "pairs_from": (str(home / "samples.jsonl"),)}, {"pairs_from": (str(home / "samples.jsonl"),)},
               {"data": (str(home / "problems.jsonl"),), "max_new_tokens": 24, "samples": 12},
               {"data": ("builtin",), "problems": 12, "eval_problems": 6, "max_new_tokens": 24, "samples": 12}]
    for more in sources:
        pairs, held_out, trajectories, dropped = load(home, **more)
        assert pairs and held_out and not questions(pairs) & questions(held_out) and dropped == 0
        assert not questions(pairs) & questions(trajectories)
        if more.get("pairs_from") and more.get("data"):
            assert max(sum(p["prompt"] == q for p in pairs) for q in questions(pairs)) == 4
            assert not trajectories or all(e["first_error"] is not None for e in trajectories)
    half = [json.loads(line) for line in open(home / "pairs.jsonl")][:40]
    everything, held_out, _, _ = load(home, eval=(write(tmp_path / "eval.jsonl", half),))
    assert len(held_out) == 40 and not questions(everything) & questions(held_out)


def test_encoded_pairs(home):
    tokenizer = data.builtin_tokenizer()
    pairs, held_out, _, _ = load(home)
    for pair in pairs + held_out:
        for side in (pair["chosen"], pair["rejected"]):
            assert side["input_ids"][-1] == tokenizer.eos_token_id and side["input_ids"].count(tokenizer.eos_token_id) == 1
            assert side["input_ids"][:side["prompt_length"]] == data.encode_prompt(tokenizer, pair["prompt"])
            text = tokenizer.decode(side["input_ids"][side["prompt_length"]:-1])
            assert text == data.STEP_END.join(side["completions"]) and text[0] != " "  # the space at the file's start is gone
    same = {"prompt": "1+1", "chosen": ["1+1=2"], "rejected": ["1+1=2"]}
    kept, dropped = encode_pairs([same, same | {"rejected": ["1+1=3"]}, same | {"rejected": ["1+1=3"] * 40}], tokenizer, 50)
    assert (len(kept), dropped) == (1, 2)
    empty, _ = encode_pairs([same | {"rejected": []}], tokenizer, 50)  # nothing but the end
    assert len(empty[0]["rejected"]["input_ids"]) == empty[0]["rejected"]["prompt_length"] + 1


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.

def first_gradient(env, cfg, path=None):
    """The gradient of a run's first step -> loss, gradient."""
    found, step = [], sft.optimizer_step

    def stop(model, *_):
        found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad]))
        raise InterruptedError
    sft.optimizer_step = stop
    try:
        qrm.main(cfg, env)
    except InterruptedError:
        pass
    finally:
        sft.optimizer_step = step
    if path:
        torch.save(found[0], f"{path}{env.rank}.pt")
    return found[0]


def naive_gradient(home, cfg):
    """Response by response, as defined."""
    pairs = load(home)[0]
    batch = [pairs[i] for i in next(data.batches([len(p["input_ids"]) for p in pairs], cfg.batch_size, cfg.seed))]
    if cfg.method == "dpo_rm":
        model = rl.load_causal_lm(cfg.model, cfg, Env())
        with torch.no_grad():  # so that the log-ratios are not all 0
            torch.manual_seed(1)
            reference = rl.load_causal_lm(cfg.model, cfg, Env())
    else:
        model = tdrm.load_reward_model(cfg.model, torch.float32, cfg.seed)
    losses = []
    for pair in batch:
        scores = []
        for side in (pair["chosen"], pair["rejected"]):
            ids, n = side["input_ids"], side["prompt_length"]
            out = model(input_ids=torch.tensor([ids])).logits[0].double()
            if cfg.method == "dpo_rm":
                ref = reference(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1).detach()
                scores.append(0.1 * sum(out.log_softmax(-1)[t - 1, ids[t]] - ref[t - 1, ids[t]] for t in range(n, len(ids))))
            else:
                z = out[n:, 0]
                scores.append(z.mean() if cfg.method == "qrm" else z[-1])
        gap = scores[0] - scores[1]
        losses.append(F.softplus(-(0.2 * gap - 2.0 if cfg.method == "qrm" else gap)))
    (sum(losses) / len(losses)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_naive_ones_at_any_micro_batch_and_world(home, tmp_path, method):
    cfg = config(home, tmp_path / "run", method=method, batch_size=9)
    wanted = naive_gradient(home, cfg)
    for micro in (0, 1, 4):
        got = first_gradient(Env(), dataclasses.replace(cfg, micro_batch_size=micro))
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert ranks(2, tmp_path, first_gradient, dataclasses.replace(cfg, micro_batch_size=2), str(tmp_path / "rank")) == [0, 0]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"rank{rank}.pt"), wanted, rtol=1e-3, atol=1e-6)


def run(env, cfg, kill_at=None):
    rate = sft.learning_rate

    def patched(step, *rest):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(step, *rest)
    sft.learning_rate = patched
    try:
        qrm.main(cfg, env)
    finally:
        sft.learning_rate = rate


@pytest.mark.parametrize("world, method", [(1, "qrm"), (1, "dpo_rm"), (2, "qrm")])
def test_a_killed_run_continues_exactly(home, tmp_path, world, method):
    cfg = config(home, tmp_path / "whole", method=method, steps=6, save_every=2, eval_every=3)
    assert ranks(world, tmp_path, run, cfg) == [0] * world
    killed = dataclasses.replace(cfg, out=str(tmp_path / "killed"))
    assert ranks(world, tmp_path, run, killed, 3) == [-signal.SIGKILL] * world
    assert ranks(world, tmp_path, run, dataclasses.replace(killed, resume=True, micro_batch_size=0)) == [0] * world
    for name in ("metrics.jsonl", "summary.json", "model/model.safetensors", "model/reward.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.fixture(scope="module")
def trained(home):
    """A reward model's folder of each method."""
    folders = {}
    for method in METHODS:
        out = home / f"trained-{method}"
        summary = qrm.main(config(home, out, method=method, steps=12, eval_every=6, lr=3e-3), Env())
        assert 0 <= summary["pair_accuracy"] <= 1
        folders[method] = str(out / "model")
    return folders


def test_what_a_run_leaves(home, trained, capsys):
    for method, folder in trained.items():
        rows = [json.loads(line) for line in open(os.path.join(folder, "..", "metrics.jsonl"))]
        first = {"qrm": softplus(2), "orm": math.log(2), "dpo_rm": math.log(2)}[method]
        assert rows[0]["loss"] == pytest.approx(first, abs=0.2 if method == "orm" else 0.05)
        assert "pair_accuracy" in rows[5] and len(rows) == 12
        about = json.load(open(os.path.join(folder, "reward.json")))
        assert about == {"qrm": {"kind": "qrm", "scale": 0.2}, "orm": {"kind": "orm", "scale": 1.0},
                         "dpo_rm": {"kind": "implicit", "beta": 0.1}}[method]
        if method == "dpo_rm":
            ref, policy = (load_file(f"{f}/model.safetensors") for f in (folder + "/reference", home / "policy"))
            assert all(torch.equal(ref[name], policy[name]) for name in policy)


@pytest.mark.parametrize("method", METHODS)
def test_search_reads_the_same_scores(home, trained, method):
    """What training compares is what Best-of-N ranks by, up to the sigmoid."""
    folder, tokenizer = trained[method], data.builtin_tokenizer()
    held_out = load(home)[1][:3]
    sides = [side for p in held_out for side in (p["chosen"], p["rejected"])]
    q, m = prime.stack(qrm.token_scores(qrm.load_reward(folder, config(home), Env()), sides, config(home), Env(), 0))
    wanted = qrm.response_scores(q, m, qrm.REDUCTIONS[method]) * (0.2 if method == "qrm" else 1)
    scorer = load_scorer(folder, torch.float32, tdrm.load_reward_model).eval()
    assert scorer.reads_eos
    from search_minimal import score_texts
    texts = [data.STEP_END.join(side["completions"]) for side in sides]
    values, _ = score_texts(scorer, tokenizer, [side["prompt"] for side in sides], [[t] for t in texts], Env())
    assert torch.logit(torch.tensor([v[0][-1] for v in values])).tolist() == pytest.approx(wanted.tolist(), abs=1e-3)


def test_token_scores_do_not_depend_on_the_batch(home, trained):
    sides = [p[side] for p in load(home)[1] for side in ("chosen", "rejected")][:7]
    for method, folder in trained.items():
        reward = qrm.load_reward(folder, config(home), Env())
        assert not any(p.requires_grad for p in reward.parameters()) and reward.method == method
        alone = [qrm.token_scores(reward, [side], config(home), Env(), 0)[0] for side in sides]
        for micro in (0, 3):
            together = qrm.token_scores(reward, sides + sides[:2], config(home, micro_batch_size=micro), Env(), 0)
            for a, b, side in zip(alone + alone[:2], together, sides + sides[:2], strict=True):
                assert len(b) == len(side["input_ids"]) - side["prompt_length"]
                assert a.tolist() == pytest.approx(b.tolist(), abs=1e-4)


def rl_config(home, out, rm, loop, **more):
    return config(home, out, **{"rm": rm, "rl": loop, "data": (str(home / "problems.jsonl"),), "steps": 2, "batch_size": 0, "prompts_per_step": 6,
                                "group_size": 2, "eval_problems": 4, "max_new_tokens": 12, "show_every": 1, **more})


@pytest.mark.parametrize("loop", ["reinforce", "ppo"])
@pytest.mark.parametrize("method", METHODS)
def test_rl(home, trained, tmp_path, parity, method, loop, capsys):
    more = {"group_size": 1} if method == "qrm" else {"centre": False, "kl_coef": 0.0}
    summary = qrm.main(rl_config(home, tmp_path / "run", trained[method], loop, **more), Env())
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len(rows) == 3 and summary["steps"] == 2 and os.path.isdir(tmp_path / "run" / "model")
    assert all(row["max_ratio_deviation"] < 1e-3 and row["grad_norm"] > 0 and row["score_std"] > 0 for row in rows[1:])
    assert all(("critic_loss" in row) == (loop == "ppo") for row in rows[1:]) == True  # noqa: E712
    assert os.path.isdir(tmp_path / "run" / "critic") == (loop == "ppo")
    before, after = load_file(home / "policy" / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_reinforce_pays_each_token_its_own_score(home, trained, tmp_path, parity, monkeypatch):
    seen, update = [], rl.update_policy
    monkeypatch.setattr(rl, "update_policy", lambda policy, model, optimizer, rows, *rest: (
        seen.append([dict(row) for row in rows]), update(policy, model, optimizer, rows, *rest))[1])
    for method, folder in trained.items():
        seen.clear()
        cfg = rl_config(home, tmp_path / method, folder, "reinforce", steps=2, lr=3e-3, kl_coef=0.7)
        qrm.main(cfg, Env())
        rows = seen[1]  # the policy has moved
        initial = AutoModelForCausalLM.from_pretrained(home / "policy")
        q = qrm.token_scores(qrm.load_reward(folder, cfg, Env()), rows, cfg, Env(), 0)
        q = [np.full(len(x), x[-1]) for x in q] if method == "orm" else q
        everything = np.concatenate(q)
        for row, x in zip(rows, q):
            ids, n = torch.tensor([row["input_ids"]]), len(x)
            ref = initial(ids).logits[0, -n - 1:-1].log_softmax(-1).gather(-1, ids[0, -n:, None])[:, 0].detach().numpy()
            a = (x - everything.mean()) / everything.std(ddof=1) - 0.7 * (row["old_logprobs"] - ref)
            assert np.abs(row["old_logprobs"] - ref).max() > 0.01
            assert row["advantages"].tolist() == pytest.approx([*a[:-1], a.mean()], abs=2e-3)


def rl_run(env, cfg):
    data.verify = lambda text, answer: len(text) % 2 == 0
    qrm.main(cfg, env)


def test_rl_on_two_ranks_and_resumed(home, trained, tmp_path, parity):
    cfg = rl_config(home, tmp_path / "one", trained["qrm"], "ppo", save_every=1, steps=3)
    qrm.main(cfg, Env())
    assert ranks(2, tmp_path, rl_run, dataclasses.replace(cfg, out=str(tmp_path / "two"))) == [0, 0]
    keys = ("step", "reward", "verifiable", "grad_norm", "critic_loss", "score_mean", "pass@1")
    read = lambda out: [{k: row[k] for k in keys if k in row} for row in map(json.loads, open(out / "metrics.jsonl"))]  # noqa: E731
    for a, b in zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    stopped, end = dataclasses.replace(cfg, out=str(tmp_path / "stopped")), rl.end_of_step
    try:
        rl.end_of_step = lambda *args: end(*args) or args[3] == 1
        assert qrm.main(stopped, Env()) is None
    finally:
        rl.end_of_step = end
    qrm.main(dataclasses.replace(stopped, resume=True), Env())
    assert read(tmp_path / "stopped") == read(tmp_path / "one")
    for name in ("model", "critic"):
        assert (tmp_path / "stopped" / name / "model.safetensors").read_bytes() == (tmp_path / "one" / name / "model.safetensors").read_bytes()


def test_with_no_options_it_samples(home, tmp_path, parity, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "builtin_policy", lambda level, env: str(home / "policy"))
    cfg = qrm.Config(problems=30, eval_problems=8, max_new_tokens=24, samples=12, steps=2, batch_size=8)
    summary = qrm.main(cfg, Env())
    assert set(qrm.MEASURES) <= set(summary) and os.path.exists("runs/qrm/model/reward.json")
    shown = capsys.readouterr().out
    assert "\nright: " in shown and "\nwrong: " in shown and shown.count("<- first wrong step") == 1 and "\033[" not in shown
    rm = qrm.builtin_reward_model("builtin", "qrm", Env())  # it is there, nothing is trained
    assert rm == os.path.join("runs", "qrm", "model")


def test_view(capsys):
    tokenizer = data.builtin_tokenizer()
    row = trajectory("7+8", ["7+8=6", "\\boxed{6}"], False, first_error=0)
    ids, prompt_length, ends = data.encode_trajectory(tokenizer, row["prompt"], row["completions"], eos=True)
    e = row | {"input_ids": ids, "prompt_length": prompt_length, "step_ends": ends}
    scores = np.array([1, 1, 1, 1, -4, -2, -1, -1, -1, -1.0])
    qrm.print_tokens("wrong", tokenizer, e, scores, 0.0, color=False)
    lines = capsys.readouterr().out.splitlines()
    assert "6 -1.00" in lines[2] and "7 +0.25" in lines[2] and lines[2].endswith("<- first wrong step") and "first wrong" not in lines[3]
    assert ids[prompt_length + qrm.result_token(e, 0)] == tokenizer.convert_tokens_to_ids("6")
    assert qrm.result_token(e, 1) == 8
    qrm.print_tokens("wrong", tokenizer, e, scores, 0.0, color=True)
    coloured = capsys.readouterr().out
    assert coloured.count("48;5;196m") == 1 and "48;5;196m6\033" in coloured  # the wrong token stands out
    assert qrm.step_scores(scores, e, "qrm") == pytest.approx([-2 / 6, -1])  # the first step has six tokens, the second three
    assert qrm.step_scores(scores, e, "dpo_rm") == pytest.approx([-2, -5])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the option, or the file and line.

def test_bad_input(home, trained, tmp_path):
    def error(cfg):
        with pytest.raises(BadInput) as caught:
            qrm.main(cfg, Env())
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message
    rows = [json.loads(line) for line in open(home / "samples.jsonl")]
    right = write(tmp_path / "right.jsonl", [{"prompt": r["prompt"], "completions": r["completions"], "correct": True} for r in rows])
    open_end = write(tmp_path / "open.jsonl", [{"question": {"problem": "1+1?", "ground_truth_answer": "2"}, "label": {"steps": [
        {"completions": [{"text": "2.", "rating": 1}], "human_completion": None, "chosen_completion": 0}], "finish_reason": "give_up"}}])
    broken = write(tmp_path / "broken.jsonl", [{"prompt": "1+1", "chosen": "2", "rejected": "3"}, {"prompt": "1+1", "chosen": "2"}])
    assert "right.jsonl: no question there has both" in error(config(home, pairs_from=(right,), data=("builtin",)))
    assert "open.jsonl:1: whether it is right is not known" in error(config(home, pairs_from=(open_end,), data=("builtin",)))
    assert "broken.jsonl:2: lacks rejected" in error(config(home, data=(broken,)))
    assert "nowhere.jsonl: cannot be read" in error(config(home, data=("nowhere.jsonl",)))
    assert error(config(home, max_length=10)).startswith("--max_length 10: none of the")
    assert error(config(home, eval=(str(home / "pairs.jsonl"),))).startswith("--eval: it has all questions")
    assert error(config(home, model="")).startswith("--data: your own pairs need --model")
    assert error(config(home, rm=trained["qrm"])).startswith("--rm: ")
    assert error(config(home, data=("builtin", "x.jsonl"))).startswith("--data builtin x.jsonl")
    loop = lambda **more: error(rl_config(home, tmp_path / "x", **{"rm": trained["qrm"], "loop": "reinforce", **more}))  # noqa: E731
    assert loop(rm=str(tmp_path / "none")).startswith("--rm ") and loop(rm=str(home / "policy")).startswith("--rm ")
    assert loop(pairs_from=(right,)).startswith("--pairs_from: ")
    assert loop(data=(str(home / "pairs.jsonl"),)).count("pairs.jsonl:1: ") == 1
    assert loop(max_new_tokens=2048).startswith("--max_new_tokens 2048: ")
    import shutil
    for text in ("{", "[]", '{"kind": "other"}', '{"kind": "implicit"}'):
        shutil.copytree(trained["qrm"], tmp_path / "rm", dirs_exist_ok=True)
        (tmp_path / "rm" / "reward.json").write_text(text)
        assert loop(rm=str(tmp_path / "rm")).startswith(f"--rm: {tmp_path}/rm/reward.json is damaged")
    shutil.copytree(trained["qrm"], tmp_path / "rm", dirs_exist_ok=True)
    data.byte_tokenizer().save_pretrained(tmp_path / "rm")
    assert "its tokenizer is not the policy's" in loop(rm=str(tmp_path / "rm"))
    assert not os.path.exists(tmp_path / "x")  # a mistake leaves nothing behind
