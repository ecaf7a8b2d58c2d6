"""Q-RM: losses against numbers worked out by hand, the tokens that are read, pairs, whole runs on
one and two ranks.

A random policy is never right, so where responses are sampled the verifier looks at the parity of
their length.
"""

import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import qrm_minimal as qrm
import rl_minimal as rl
import sft_minimal as sft
import tdrm_minimal as tdrm
from helpers import assert_same_run, at_step, metrics, ranks, save_policy, train, write_rows
from parts import verifier
from parts.credit import stack
from parts.formats import BadInput
from parts.models import encode_prompt, load_policy
from parts.rewards import RewardModel, load_reward_model, new_reward_model
from parts.runs import Processes
from test_rl import gradient_of, response_logprobs
from test_rl_tokens import parity

METHODS = tuple(qrm.METHODS)
ALONE, TOKENIZER = Processes(), data.builtin_tokenizer()


def softplus(x):
    return math.log1p(math.exp(x))


def mask(*lengths, width=None):
    return torch.arange(width or max(lengths))[None] < torch.tensor(lengths)[:, None]


# --------------------------------------------------------------------------------------------------
# The maths.

CHOSEN = torch.tensor([[4.0, 8.0, 9.0], [1.0, -1.0, 3.0]])
REJECTED = torch.tensor([[2.0, 100.0], [5.0, -2.0]])
MASKS = mask(2, 3), mask(1, 2)
SCORES = {
    "mean": ([6, 1], [2, 1.5]),
    "sum": ([12, 3], [2, 3]),
    "last": ([8, 3], [2, -2]),
}


@pytest.mark.parametrize("reduce", SCORES)
def test_response_scores(reduce):
    for q, m, wanted in zip((CHOSEN, REJECTED), MASKS, SCORES[reduce]):
        assert qrm.response_scores(q, m, reduce).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("reduce", SCORES)
@pytest.mark.parametrize("beta, margin", [(0.2, 2.0), (1.0, 0.0), (0.1, -1.0)])
def test_pair_loss_by_hand(reduce, beta, margin):
    chosen, rejected = SCORES[reduce]
    total = sum(softplus(margin - beta * (w - l)) for w, l in zip(chosen, rejected))
    options = {"beta": beta, "margin": margin, "reduce": reduce}
    loss = qrm.pair_loss(CHOSEN, REJECTED, *MASKS, **options)
    assert loss.item() == pytest.approx(total / 2)
    loss = qrm.pair_loss(CHOSEN, REJECTED, *MASKS, **options, count=8)
    assert loss.item() == pytest.approx(total / 8)
    prompts = [F.pad(m, (3, 0)) for m in MASKS]  # a prompt in front, of any scores
    scores = [F.pad(q, (3, 0), value=7.0) for q in (CHOSEN, REJECTED)]
    loss = qrm.pair_loss(*scores, *prompts, **options)
    assert loss.item() == pytest.approx(total / 2)


def test_defaults():
    loss = qrm.pair_loss(torch.ones(3, 4), torch.ones(3, 2), mask(4, 1, 2), mask(2, 1, 1))
    assert loss.item() == pytest.approx(2.126928)  # ln(1 + e^2)


@pytest.mark.parametrize("margin", [0.0, 2.0, -3.0, 50.0])
def test_the_first_loss(margin):
    q = torch.full((1, 3), 5.0, requires_grad=True)
    loss = qrm.pair_loss(q, torch.full((1, 2), 5.0), mask(3), mask(2), 0.2, margin)
    loss.backward()
    assert loss.item() == pytest.approx(softplus(margin) if margin < 40 else margin)
    slope = -0.2 / (1 + math.exp(-margin)) / 3
    assert q.grad[0].tolist() == pytest.approx([slope] * 3)


def test_equal_responses():
    q = torch.randn(2, 5, requires_grad=True)
    loss = qrm.pair_loss(q, q, mask(5, 3), mask(5, 3))
    loss.backward()
    assert loss.item() == pytest.approx(softplus(2)) and q.grad.abs().max() < 1e-8


@pytest.mark.parametrize("bad", [math.nan, math.inf, 7.0])
def test_empty_masks(bad):
    """The second pair has no chosen, the third no rejected response."""
    chosen, rejected = torch.full((4, 3), 1.0), torch.full((4, 2), 0.5)
    chosen[1], rejected[2], chosen[3, 1:] = bad, bad, bad
    chosen.requires_grad_()
    rejected.requires_grad_()
    masks = mask(3, 0, 2, 1), mask(2, 1, 0, 2)
    loss = qrm.pair_loss(chosen, rejected, *masks)
    loss.backward()
    assert loss.item() == pytest.approx(softplus(2 - 0.1))
    for q in (chosen, rejected):
        assert (q.grad[1:3] == 0).all() and q.grad.isfinite().all()
    nothing = qrm.pair_loss(chosen, rejected, *(m & False for m in masks))
    nothing.backward()  # a graph, so that the others of a process group need not wait
    assert nothing.item() == 0


def test_localisation_by_hand():
    scores = [[2.0, 1.5, 0.0, 9.0], [1.0, 1.2], [0.0, 0.5, 0.4]]  # mean first score: 1

    def auroc(*errors, scores=scores):
        return qrm.localisation_auroc(scores, errors)

    # Falls: -1, .5, [1.5] (9 comes after the error); 0, -.2; [1] (an error in the first unit).
    assert auroc(2, -1, 0) == 1.0
    assert auroc(1, -1, 0) == 1.0  # .5 and 1 against -1, 0, -.2
    assert auroc(0, 1, -1) == pytest.approx((0 + 1) / 8)  # -1, -.2 against 0, 1, -.5, .1
    assert auroc(0, 1, scores=[[1.0, 1.0], [1.0, 1.0]]) == 0.5
    assert math.isnan(auroc(-1, -1, -1)) and math.isnan(auroc(0, scores=[[1.0]]))
    assert math.isnan(auroc(scores=[]))


# --------------------------------------------------------------------------------------------------
# Which token is read.


class Bigrams(torch.nn.Module):
    """A language model with a table of logits: rows are the token before, columns the next."""

    def __init__(self, table):
        super().__init__()
        self.head = torch.nn.Linear(len(table), len(table), bias=False)
        self.head.weight.data = table.T.clone()
        self.config = SimpleNamespace(num_hidden_layers=0)
        self.base_model = self.one_hot
        self.one_hot.__func__.layers = []

    def one_hot(self, input_ids, use_cache):
        hidden = F.one_hot(input_ids, len(self.head.weight)).float()
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        return self.head


def test_dpo_rm_reads_the_log_prob_of_the_token_itself():
    prompt, a, b, end, pad = 1, 2, 3, 4, 0
    table = torch.zeros(5, 5)
    table[a, b] = 3.0  # the two models differ in nothing but b after a
    ids = [[prompt, prompt, a, b, end, pad], [prompt, a, end, pad, pad, pad]]
    response = [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]  # column t is token t + 1

    def scores():
        models = Bigrams(table), Bigrams(torch.zeros(5, 5))
        reward = RewardModel(models[0], None, "implicit", models[1], beta=0.5)
        return reward(torch.tensor(ids), torch.tensor(response).bool()).logits[..., 0]

    log_z = math.log(4 + math.exp(3))
    at_b, at_end = 0.5 * (3 - log_z + math.log(5)), 0.5 * (-log_z + math.log(5))
    before = scores()
    assert before[0].tolist() == pytest.approx([0, 0, 0, at_b, 0, 0], abs=1e-6)
    assert before[1].tolist() == pytest.approx([0, 0, at_end, 0, 0, 0], abs=1e-6)
    table[end, pad] = 9.0  # what comes after the end has no part in it
    assert torch.equal(scores(), before)


class Tells(torch.nn.Module):
    """A classifier whose number tells the token."""

    config, dtype = SimpleNamespace(num_hidden_layers=0), torch.float32

    def forward(self, input_ids, past_key_values, use_cache):
        return SimpleNamespace(logits=input_ids[..., None] * 10.0)


def test_q_is_read_at_the_token_itself():
    rows = [data.Example("", [], [7, 8, 1, 2, 3], 2, []), data.Example("", [], [7, 4, 5], 1, [])]
    reward = RewardModel(Tells(), TOKENIZER, "qrm")
    scores = [z.tolist() for z in reward.score_tokens(rows, ALONE)]
    assert scores == [[10, 20, 30], [40, 50]]


# --------------------------------------------------------------------------------------------------
# Pairs.


def trajectory(question, steps, correct):
    return {"prompt": question, "completions": steps, "correct": correct, "source": "f:1"}


def many_solutions():
    """Two questions with 4 right and 8 wrong responses each, some twice; two with one kind."""
    rows = []
    for question in ("a", "b"):
        rows += [trajectory(question, [f"{question}{i}"], i % 3 == 0) for i in range(12)]
    rows += [trajectory("a", ["a0"], True)] * 5
    return rows + [trajectory("only right", ["x"], True), trajectory("only wrong", ["y"], False)]


@pytest.mark.parametrize("most", [1, 4, 31, 32, 1000])
def test_pairs_of_each_question(most):
    pairs = qrm.make_pairs(many_solutions(), most, seed=3)
    assert {p["prompt"] for p in pairs} == {"a", "b"}
    for question in ("a", "b"):
        mine = [(p["chosen"][0], p["rejected"][0]) for p in pairs if p["prompt"] == question]
        assert len(mine) == len(set(mine)) == min(most, 4 * 8)
        for right, wrong in mine:
            assert right[0] == wrong[0] == question
            assert int(right[1:]) % 3 == 0 and int(wrong[1:]) % 3


def test_pairs_depend_on_the_seed_and_the_question_alone():
    rows = many_solutions()
    some = qrm.make_pairs(rows, 4, seed=3)
    assert some != qrm.make_pairs(rows, 4, seed=4)
    others = [row for row in rows if row["prompt"] != "b"]
    assert qrm.make_pairs(others, 4, seed=3) == [p for p in some if p["prompt"] == "a"]


def test_pairs_of_chats_and_of_unknown_outcome():
    chat = [{"role": "user", "content": "a"}]
    rows = [trajectory(chat, ["x"], True), trajectory(chat, ["y"], False)]
    assert qrm.make_pairs(rows, 1)[0]["prompt"] == chat
    with pytest.raises(BadInput, match="f:1: whether it is right"):
        qrm.make_pairs([trajectory("a", ["x"], None)], 4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("qrm")
    save_policy(home / "policy")
    problems = data.make_problems(60)
    rows = data.make_trajectories(problems, 8, seed=2)
    known = ("prompt", "completions", "answer")
    write_rows(home / "samples.jsonl", [{key: row[key] for key in known} for row in rows])
    write_rows(home / "problems.jsonl", problems[:12])
    pairs = []
    for pair in qrm.make_pairs(rows, 3):
        texts = {side: "\n\n".join(pair[side]) for side in ("chosen", "rejected")}
        pairs.append({"prompt": pair["prompt"]} | texts | {"chosen": " " + texts["chosen"]})
    write_rows(home / "pairs.jsonl", pairs)
    return home


def settings(home, out="", **more):
    options = {
        "model": str(home / "policy"),
        "data": (str(home / "pairs.jsonl"),),
        "out": str(out),
        "batch_size": 16,
        "max_length": 128,
        "steps": 3,
        "lr": 1e-3,
    }
    if more.get("method", "Q-RM") == "Q-RM":
        options["beta"] = 0.2
    return options | more


def config(home, out="", **more):
    return qrm.Config(**settings(home, out, **more))


def load(home, **more):
    """-> training pairs, held-out pairs, held-out trajectories, number left out."""
    cfg = config(home, **more)
    return qrm.load_data(cfg, data.builtin_level(cfg.data), TOKENIZER, ALONE)


@pytest.fixture(autouse=True)
def verify_parity(monkeypatch):
    monkeypatch.setattr(verifier, "verify", parity)


def questions(rows):
    return {row.prompt for row in rows}


SAMPLED = {"max_new_tokens": 24, "group_size": 12}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"data": ("builtin",), "pairs_from": ("samples.jsonl",)},
        {"pairs_from": ("samples.jsonl",)},
        {"data": ("problems.jsonl",)} | SAMPLED,
        {"data": ("builtin",), "problems": 12, "eval_problems": 6} | SAMPLED,
    ],
    ids=str,
)
def test_no_question_is_in_both_halves(home, monkeypatch, more):
    monkeypatch.chdir(home)
    pairs, held_out, trajectories, left_out = load(home, **more)
    assert pairs and held_out and left_out == 0
    assert not questions(pairs) & questions(held_out)
    assert not questions(pairs) & questions(trajectories)
    assert all(e.first_error is not None for e in trajectories)
    if more.get("pairs_from") and more.get("data"):
        assert max(Counter(p.prompt for p in pairs).values()) == 4


def test_a_response_that_was_cut_has_no_end_to_score(home, monkeypatch):
    sampled, roll_out = [], rl.roll_out

    def patched(*args):
        sampled.extend(roll_out(*args))
        return sampled

    monkeypatch.setattr(rl, "roll_out", patched)
    cfg, problems = config(home, **SAMPLED), data.make_problems(12)
    pairs = qrm.sample_pairs(problems, 0, cfg, TOKENIZER, ALONE)
    whole = [r.completions for r in sampled if r.finished]
    assert pairs and len(whole) < len(sampled)
    for pair in pairs:
        assert pair["chosen"] in whole and pair["rejected"] in whole


def test_what_is_evaluated_is_not_trained_on(home, tmp_path):
    lines = (home / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(lines[:40]))
    pairs, held_out, _, _ = load(home, eval=(str(tmp_path / "eval.jsonl"),))
    assert len(held_out) == 40 and pairs and not questions(pairs) & questions(held_out)


def test_encoded_pairs(home):
    pairs, held_out, _, _ = load(home)
    for pair in [*pairs, *held_out]:
        assert len(pair) == len(pair.chosen) + len(pair.rejected)
        for side in (pair.chosen, pair.rejected):
            prompt, response = np.split(side.input_ids, [side.prompt_length])
            assert prompt.tolist() == encode_prompt(TOKENIZER, pair.prompt)
            assert np.flatnonzero(response == TOKENIZER.eos_token_id) == [len(response) - 1]
            text = TOKENIZER.decode(response[:-1])
            assert text == "\n\n".join(side.completions)
            assert text[0] != " "  # the space at the file's start is gone


def test_pairs_that_are_left_out():
    def encode(prompt, steps):
        return data.encode_trajectory(TOKENIZER, prompt, steps, eos=True)

    right, wrong = ["1+1=2"], ["1+1=3"]
    pairs = []
    for rejected in (right, wrong, wrong * 40, []):
        pairs.append({"prompt": "1+1", "chosen": right, "rejected": rejected})
    kept, left_out = qrm.encode_pairs(pairs, encode, 50)
    assert [p.rejected.completions for p in kept] == [wrong, []] and left_out == 2
    assert len(kept[1].rejected) == kept[1].rejected.prompt_length + 1  # nothing but the end


# --------------------------------------------------------------------------------------------------
# Gradients.


class Found(Exception):
    pass


def first_gradient(procs, cfg, path=None):
    """The gradient of a run's first step, before it is clipped."""

    def stop(learner, *_):
        raise Found(gradient_of(learner.module.model))

    step, qrm.optimizer_step = qrm.optimizer_step, stop
    try:
        qrm.main(cfg, procs)
    except Found as found:
        (gradient,) = found.args
    finally:
        qrm.optimizer_step = step
    if path:
        torch.save(gradient, f"{path}{procs.rank}.pt")
    return gradient


def naive_score(cfg, model, reference, example):
    """A response's score, as defined."""
    if cfg.method == "DPO-RM":
        ours, theirs = (response_logprobs(m, example) for m in (model, reference))
        return cfg.beta * (ours - theirs.detach()).sum()
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    z = logits[example.prompt_length :, 0]
    return z.mean() if cfg.method == "Q-RM" else z[-1]


def naive_gradient(home, cfg):
    """Response by response."""
    pairs = load(home)[0]
    batch = next(data.batches([len(p) for p in pairs], cfg.batch_size, cfg.seed))
    model = reference = load_policy(cfg.model, torch.float32)
    if cfg.method != "DPO-RM":
        model = new_reward_model(cfg.model, TOKENIZER, torch.float32, cfg.seed).model
    losses = []
    for pair in (pairs[i] for i in batch):
        sides = pair.chosen, pair.rejected
        chosen, rejected = (naive_score(cfg, model, reference, side) for side in sides)
        gap = chosen - rejected
        losses.append(F.softplus(2.0 - 0.2 * gap if cfg.method == "Q-RM" else -gap))
    (sum(losses) / len(losses)).backward()
    return gradient_of(model)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_naive_ones(home, tmp_path, method):
    """At any micro-batch size, on one process and on two."""
    beta = {"Q-RM": 0.2, "ORM": 1.0, "DPO-RM": 0.1}[method]
    cfg = config(home, tmp_path / "run", method=method, beta=beta, batch_size=9)
    wanted = naive_gradient(home, cfg)

    def close(gradient):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6)

    for micro in (None, 1, 4):
        close(first_gradient(ALONE, replace(cfg, micro_batch_size=micro)))
    micro = replace(cfg, micro_batch_size=2)
    assert ranks(2, tmp_path, first_gradient, micro, str(tmp_path / "rank")) == [0, 0]
    for rank in range(2):
        close(torch.load(tmp_path / f"rank{rank}.pt"))


# --------------------------------------------------------------------------------------------------
# Whole runs.


@pytest.mark.parametrize("world, method", [(1, "Q-RM"), (1, "DPO-RM"), (2, "Q-RM")])
def test_a_killed_run_continues_exactly(home, tmp_path, world, method):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = settings(home, whole, method=method, steps=6, save_every=2, eval_every=3)
    assert ranks(world, tmp_path, train, "qrm", options) == [0] * world
    options["out"] = str(killed)
    fault = (at_step, 3, signal.SIGKILL)
    codes = ranks(world, tmp_path, train, "qrm", options, fault)
    assert codes == [-signal.SIGKILL] * world
    options |= {"resume": True, "micro_batch_size": None}
    assert ranks(world, tmp_path, train, "qrm", options) == [0] * world
    assert_same_run(killed, whole)
    for name in ("metrics.jsonl", "model/reward.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture(scope="module")
def trained(home):
    """A trained reward model's folder for each method."""
    folders = {}
    for method in METHODS:
        out = home / f"trained-{method}"
        cfg = config(home, out, method=method, steps=12, eval_every=6, lr=3e-3)
        assert 0 <= qrm.main(cfg, ALONE)["pair_accuracy"] <= 1
        folders[method] = str(out / "model")
    return folders


ABOUT = {
    "Q-RM": {"kind": "qrm", "scale": 0.2},
    "ORM": {"kind": "orm"},
    "DPO-RM": {"kind": "implicit", "beta": 0.1, "temperature": 1.0},
}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves(home, trained, method):
    folder = trained[method]
    rows = metrics(os.path.dirname(folder))
    first = softplus(2) if method == "Q-RM" else math.log(2)
    assert rows[0]["loss"] == pytest.approx(first, abs=0.2 if method == "ORM" else 0.05)
    assert "pair_accuracy" in rows[5] and len(rows) == 12
    with open(os.path.join(folder, "reward.json")) as f:
        assert json.load(f) == ABOUT[method]
    if method == "DPO-RM":
        reference = load_file(f"{folder}/reference/model.safetensors")
        policy = load_file(home / "policy" / "model.safetensors")
        assert all(torch.equal(reference[name], policy[name]) for name in policy)


def held_out_sides(home, count):
    sides = [side for p in load(home)[1] for side in (p.chosen, p.rejected)]
    return sides[:count]


@pytest.mark.parametrize("method", METHODS)
def test_search_reads_the_same_scores(home, trained, method):
    """What training compares is what best-of-n ranks by, up to the sigmoid."""
    reward = load_reward_model(trained[method], torch.float32)
    kind, reduce, _ = qrm.METHODS[method]
    sides = held_out_sides(home, 6)
    scores = qrm.response_scores(*stack(reward.score_tokens(sides, ALONE)), reduce)
    wanted = scores * (0.2 if kind == "qrm" else 1)
    examples = []
    for side in sides:
        ids = reward.encode(side.prompt, side.completions)
        assert ids[0] == side.input_ids  # the end included
        examples.append(data.Example(side.prompt, side.completions, *ids))
    last = torch.tensor([values[-1] for values in reward.score_steps(examples, ALONE)])
    assert last.logit().tolist() == pytest.approx(wanted.tolist(), abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_token_scores_do_not_depend_on_the_batch(home, trained, method):
    sides = held_out_sides(home, 7)
    reward = load_reward_model(trained[method], torch.float32)
    assert not any(p.requires_grad for p in reward.parameters())
    assert reward.kind == qrm.METHODS[method][0]
    alone = [reward.score_tokens([side], ALONE)[0] for side in sides]
    for rows_at_once in (64, 3):
        together = reward.score_tokens(sides, ALONE, rows_at_once)
        for a, b, side in zip(alone, together, sides, strict=True):
            assert len(b) == len(side) - side.prompt_length
            assert a.tolist() == pytest.approx(b.tolist(), abs=1e-4)


def test_with_no_options_it_samples(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "builtin_policy", lambda level, procs: str(home / "policy"))
    few = {"problems": 30, "eval_problems": 8, "steps": 2, "batch_size": 8}
    summary = qrm.main(qrm.Config(**few, **SAMPLED), ALONE)
    assert qrm.MEASURES.keys() <= summary.keys()
    assert os.path.exists("runs/Q-RM/model/reward.json")
    shown = capsys.readouterr().out
    assert "\nright: " in shown and "\nwrong: " in shown and "\033[" not in shown
    assert shown.count("<- first wrong step") == 1
    folder = tdrm.builtin_reward_model("builtin", ALONE, "Q-RM")  # it is there, nothing is trained
    assert folder == os.path.join("runs", "Q-RM", "model")


# --------------------------------------------------------------------------------------------------
# Something to look at.


@pytest.fixture
def wrong_solution():
    steps = ["7+8=6", "\\boxed{6}"]
    places = data.encode_trajectory(TOKENIZER, "7+8", steps, eos=True)
    return data.Example("7+8", steps, *places, correct=False, first_error=0)


Z = np.array([1, 1, 1, 1, -4, -2, -1, -1, -1, -1.0])


def test_places_in_a_solution(wrong_solution):
    e = wrong_solution
    result = e.input_ids[e.prompt_length + qrm.result_token(e, 0)]
    assert result == TOKENIZER.convert_tokens_to_ids("6") and qrm.result_token(e, 1) == 8
    # The first step has six tokens, the second three.
    assert qrm.step_scores(Z, e, "qrm") == pytest.approx([-2 / 6, -1])
    assert qrm.step_scores(Z, e, "implicit") == pytest.approx([-2, -5])


def test_shown_tokens(wrong_solution, capsys, monkeypatch):
    qrm.print_tokens("wrong", TOKENIZER, wrong_solution, Z, 0.0)
    lines = capsys.readouterr().out.splitlines()
    assert "6 -1.00" in lines[2] and "7 +0.25" in lines[2]
    assert lines[2].endswith("<- first wrong step") and "first wrong" not in lines[3]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    qrm.print_tokens("wrong", TOKENIZER, wrong_solution, Z, 0.0)
    coloured = capsys.readouterr().out
    assert coloured.count("48;5;196m") == 1 and "48;5;196m6\033" in coloured  # the wrong token


# --------------------------------------------------------------------------------------------------
# Bad input: one line that names the option, or the file and line.

PRM800K = {  # the annotator gave up
    "question": {"problem": "1+1?", "ground_truth_answer": "2"},
    "label": {
        "steps": [
            {
                "completions": [{"text": "2.", "rating": 1}],
                "human_completion": None,
                "chosen_completion": 0,
            }
        ],
        "finish_reason": "give_up",
    },
}
PAIR = {"prompt": "1+1", "chosen": "2", "rejected": "3"}


@pytest.fixture(scope="module")
def bad_files(home):
    """Files of right solutions, of an open outcome, and of a broken pair."""
    with open(home / "samples.jsonl") as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        row["correct"] = True
        del row["answer"]
    write_rows(home / "right.jsonl", rows)
    write_rows(home / "open.jsonl", [PRM800K])
    write_rows(home / "broken.jsonl", [PAIR, {"prompt": "1+1", "chosen": "2"}])
    return home


@pytest.mark.parametrize(
    "more, message",
    [
        ({"pairs_from": ("right.jsonl",)}, "right.jsonl: no question there has both"),
        ({"pairs_from": ("open.jsonl",)}, "open.jsonl:1: whether it is right is not known"),
        ({"data": ("broken.jsonl",)}, "broken.jsonl:2: lacks rejected"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl: cannot be read"),
        ({"max_length": 10}, "--max_length 10: none of the"),
        ({"eval": ("pairs.jsonl",)}, "--eval: it has all questions"),
        ({"model": None}, "--data: your own pairs need --model"),
        ({"data": ("builtin", "x.jsonl")}, "--data builtin x.jsonl"),
    ],
    ids=str,
)
def test_bad_input(bad_files, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(bad_files)
    if "pairs_from" in more:
        more = more | {"data": ("builtin",)}
    with pytest.raises(BadInput) as caught:
        qrm.main(config(bad_files, tmp_path / "run", **more), ALONE)
    found = str(caught.value)
    assert found.startswith(message) and "\n" not in found
    assert not (tmp_path / "run").exists()  # a mistake leaves nothing behind
