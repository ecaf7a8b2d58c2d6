"""Q-RM: token-level Q values from preference pairs (arXiv 2505.23363), with its two baselines.

A scalar head on every token, trained only on which of two responses is right, turns out to be a Q
function: no step labels, no reference model, no language-model head. z_t is the number at response
token t itself, N_w and N_l the lengths:

    s(y)  = mean_t z_t                                                            response_scores
    loss  = mean over pairs of - log sigmoid( beta (s(y_w) - s(y_l)) - margin )         pair_loss

Preference as a Bradley-Terry model of the MEAN reward, with a maximum-entropy policy
exp(z) / sum exp(z) behind it, gives beta z_t = Q(s_t, y_t) + c(s_t); what depends on the pair alone
is put into one constant, the margin. Only differences of z are learned: its level is arbitrary. The
loss presses on until s(y_w) - s(y_l) > margin / beta, so the scale of z grows; the paper's beta 0.2
asks for a gap of 10, too far for a small new head in a minute: the default is 2.

    --method ORM      s(y) = z of the last token, beta 1, margin 0: an outcome reward model
    --method DPO-RM   z_t = beta (log pi - log pi_ref)(y_t), s(y) = sum_t z_t, margin 0: DPO's
                      policy as a reward model. The log-prob of token t is read at position t - 1
                      (the released code reads it one token too late)

Pairs: a file of pairs; right x wrong responses to a question out of trajectories with an outcome
(--pairs_from); or the policy answers questions and is verified (the default). No question is in
both training and held-out pairs. RL with these models is `rl_minimal.py --credit token`. Left out:
LoRA; the focal, pointwise and step-level losses of the released code; value-guided sampling.

    python qrm_minimal.py                                           # pairs, Q-RM, coloured tokens
    python qrm_minimal.py --method DPO-RM --pairs_from runs/search/samples.jsonl
    python search_minimal.py --prm runs/Q-RM/model runs/ORM/model   # best-of-n and beam search
    torchrun --nproc_per_node=8 qrm_minimal.py --model meta-llama/Llama-3.1-8B-Instruct \\
        --data pairs.jsonl --lr 1e-5 --micro_batch_size 2 --grad_checkpoint

Files in --out: as in tdrm_minimal.py; model/reward.json says of which kind the reward model is.
"""

import collections.abc
import math
import os
import sys
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

import data
import rl_minimal as rl
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from parts.credit import last_token, stack
from parts.formats import BadInput, read_pairs, read_problems, read_trajectories, recognise
from parts.formats import split_steps
from parts.models import check_ids, layout_of, load_policy, load_tokenizer, question_of
from parts.models import torch_dtype
from parts.rewards import RewardModel, new_reward_model
from parts.runs import Processes, Run, last_checkpoint, launch, opt
from parts.training import Policy, TrainConfig, accumulate_gradients, learning_rate
from parts.training import optimizer_step, prepare

# Method: the kind in reward.json, how token scores make a response's, beta.
METHODS = {
    "Q-RM": ("qrm", "mean", 2.0),
    "ORM": ("orm", "last", 1.0),
    "DPO-RM": ("implicit", "sum", 0.1),
}


@dataclass(frozen=True)
class Config(TrainConfig):
    method: str = opt("Q-RM", "of the reward model", choices=tuple(METHODS))
    beta: float | None = opt(None, "scale in the loss; without it: Q-RM 2, DPO-RM 0.1", low=0)
    margin: float = opt(2.0, "Q-RM: what beta times the gap should exceed")
    data: tuple[str, ...] = opt(("builtin",), "builtin[-hard|-choice], files of pairs or problems")
    pairs_from: tuple[str, ...] = opt((), "trajectory files with outcomes to make pairs from")
    pairs_per_question: int = opt(4, "most pairs made for one question", low=1)
    group_size: int = opt(8, "responses sampled for each question to make pairs of", low=2)
    eval: tuple[str, ...] = opt((), "pairs or trajectories; without it: held out of --data")
    eval_problems: int = opt(500, "built-in task: held-out questions", low=1)
    problems: int | None = opt(None, "questions; without it: all, or 12000 built-in ones", low=1)
    max_new_tokens: int = opt(128, "longest sampled response", low=1)
    verifier: str | None = opt(None, "FILE:FUNCTION(response, row) in place of the answer check")
    lr: float = opt(2e-3, "peak learning rate (for an 8B model: 1e-5)", low=0)

    temperature = 1.0  # of the samples
    rows_at_once = 2048


# --------------------------------------------------------------------------------------------------
# The maths. (N, T) = responses by tokens; a mask is True on response tokens, the one that ends it
# included.


def response_scores(q, mask, reduce="mean"):
    """Token scores (N, T) -> (N,): their mean, their sum, or that of the last token; 0 for an empty
    mask."""
    mask = mask.bool()
    q = torch.where(mask, q, 0.0)
    if reduce == "last":
        return (q * last_token(mask)).sum(1)
    return q.sum(1) / (mask.sum(1).clamp(min=1) if reduce == "mean" else 1)


def pair_loss(
    q_chosen,
    q_rejected,
    mask_chosen,
    mask_rejected,
    beta=0.2,
    margin=2.0,
    reduce="mean",
    count=None,
):
    """Sum over the pairs of -log sigmoid(beta (s_chosen - s_rejected) - margin) / `count` (default:
    their number). Comes along: response_scores; last_token of parts/credit.py.

    The chosen side's q and mask are (N, T), the rejected side's (N, T'). A pair with an empty mask
    on either side is left out; where none is left the loss is 0. With micro-batches or processes,
    `count` is the global batch's."""
    valid = mask_chosen.any(1) & mask_rejected.any(1)
    chosen = response_scores(q_chosen, mask_chosen, reduce)
    rejected = response_scores(q_rejected, mask_rejected, reduce)
    losses = torch.where(valid, -F.logsigmoid(beta * (chosen - rejected) - margin), 0.0)
    return losses.sum() / (valid.sum().clamp(min=1) if count is None else count)


# --------------------------------------------------------------------------------------------------
# Training.


def main(cfg, procs):
    """Train a reward model from pairs -> summary (also in summary.json)."""
    # 1) Pairs, and the model: a policy with a new head of one number per token, or with itself as
    # reference.
    level = data.builtin_level(cfg.data)
    if not level and not cfg.model:
        raise BadInput("--data: your own pairs need --model, the policy to start from")
    kind, reduce, beta = METHODS[cfg.method]
    out = cfg.out or tdrm.default_out(cfg.method, level)
    model = cfg.model or sft.builtin_policy(level, procs)
    cfg = replace(cfg, out=out, model=model, beta=beta if cfg.beta is None else cfg.beta)
    scale, margin = 1.0, 0.0  # DPO-RM's beta is in its scores
    if kind == "qrm":
        scale, margin = cfg.beta, cfg.margin
    checkpoint, dtype = last_checkpoint(cfg), torch_dtype(cfg, procs.device)
    name = os.path.join(checkpoint, "model") if checkpoint else cfg.model
    tokenizer = load_tokenizer(name)
    pairs, held_out, trajectories, left_out = load_data(cfg, level, tokenizer, procs)
    if kind == "implicit":
        model, reference = load_policy(name, dtype), load_policy(cfg.model, dtype)
        about = {"beta": cfg.beta, "layout": layout_of(cfg)}
        reward = RewardModel(model, tokenizer, kind, reference, **about)
    else:
        about = {"scale": scale, "layout": layout_of(cfg)}
        reward = new_reward_model(name, tokenizer, dtype, cfg.seed, kind, **about)
    learner = prepare(reward, cfg, procs)
    check_ids(reward.model, tokenizer, (e.input_ids for e in pairs.sides), cfg.model)
    steps = cfg.steps or max(1, len(pairs) // cfg.batch_size)
    procs.print(
        f"{cfg.method}: {len(pairs)} pairs, {len(held_out)} held out ({left_out} too long or of "
        f"equal responses), {steps} steps of {cfg.batch_size}, {procs.world} processes on "
        f"{procs.device.type}"
    )

    # 2) The loop. Both responses of a pair go through one forward.
    run = Run(cfg, procs, checkpoint, steps, {"model": learner})
    order = data.batches(pairs.lengths, cfg.batch_size, cfg.seed, run.start)
    for step in run.steps():
        batch = [pairs[i] for i in next(order)]

        def loss_fn(rows):
            sides = [p.chosen for p in rows] + [p.rejected for p in rows]
            b = data.collate(sides, tokenizer.pad_token_id, procs.device)
            mask = b["response_mask"]  # (2 B, T-1)
            z = learner.forward(b["input_ids"], mask).logits[:, 1:, 0]  # read at the token itself
            count = len(batch)
            return pair_loss(*z.chunk(2), *mask.chunk(2), scale, margin, reduce, count)

        loss = accumulate_gradients(learner, batch, cfg.micro_batch_size, loss_fn, procs)
        lr = learning_rate(step, steps, cfg.lr)
        grad_norm = optimizer_step(learner, lr, cfg.grad_clip)
        run.log(loss=procs.sum(loss)[0], grad_norm=grad_norm, lr=lr)
        if run.evaluates:
            run.log(**evaluate(reward, held_out, trajectories, level, cfg, procs))
    if run.stopped:
        return None

    # 3) What came of it.
    measures = evaluate(reward, held_out, trajectories, level, cfg, procs)
    shown = choose_two(held_out, trajectories)
    scores = reward.score_tokens([e for _, e in shown], procs)
    counts = {"pairs": len(pairs), "held_out_pairs": len(held_out)}
    summary = run.finish(measures | counts, cfg.method)
    if procs.rank == 0:
        title = f"{cfg.method} on {len(held_out)} held-out pairs and {len(trajectories)} solutions"
        tdrm.print_table(title, measures, MEASURES)
        for (title, example), z in zip(shown, scores):
            print_tokens(title, tokenizer, example, z, measures["middle"])
    return summary


# --------------------------------------------------------------------------------------------------
# Pairs.


@dataclass
class Pair:
    """A right and a wrong response to one question; its length is what it costs."""

    prompt: object
    chosen: data.Example
    rejected: data.Example

    def __len__(self):
        return len(self.chosen) + len(self.rejected)


class Pairs(collections.abc.Sequence):
    """Pairs out of data.Examples, in which each chosen response is followed by the rejected one."""

    def __init__(self, sides):
        self.sides = sides
        self.lengths = np.add(sides.lengths[::2], sides.lengths[1::2])

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        chosen, rejected = self.sides[2 * i], self.sides[2 * i + 1]
        return Pair(chosen.prompt, chosen, rejected)


def load_data(cfg, level, tokenizer, procs):
    """-> training Pairs, held-out Pairs, held-out trajectories that know their first wrong step,
    number of pairs left out."""
    trajectories, held_out = [], None
    if level and not cfg.pairs_from:
        test = data.make_problems(cfg.eval_problems, "test", 0, level)
        trajectories = data.make_trajectories(test, 2, seed=1, level=level)
        problems = data.make_problems(cfg.problems or 12_000, "train", cfg.seed, level)
        pairs = sample_pairs(problems, 0, cfg, tokenizer, procs)
        held_out = sample_pairs(test, 10**6, cfg, tokenizer, procs)
        if not pairs or not held_out:
            which = f"--problems {cfg.problems or 12_000} --eval_problems {cfg.eval_problems}"
            what = "the policy got none of the questions both right and wrong; no pairs"
            raise BadInput(f"{which}: {what}")
    else:
        files = [*(() if level else cfg.data), *cfg.pairs_from]
        pairs, _ = read_files(files, cfg, tokenizer, procs)
    if cfg.eval:
        held_out, trajectories = read_files(cfg.eval, cfg, tokenizer, procs)
    elif held_out is None:
        pairs, held_out = data.hold_out(pairs)
    tested = {str(pair["prompt"]) for pair in held_out}
    pairs = [pair for pair in pairs if str(pair["prompt"]) not in tested]
    trained = {str(pair["prompt"]) for pair in pairs}
    trajectories = [row for row in trajectories if str(row["prompt"]) not in trained]
    if not pairs:
        raise BadInput("--eval: it has all questions of --data; none is left to train on")
    encode = sft.spelling(tokenizer, layout_of(cfg))
    pairs, left_out = encode_pairs(pairs, encode, cfg.max_length, procs)
    held_out, left_out_too = encode_pairs(held_out, encode, cfg.max_length, procs)
    if trajectories:
        trajectories, _ = data.encode_rows(trajectories, encode, cfg.max_length, procs)
    return pairs, held_out, trajectories, left_out + left_out_too


def make_pairs(rows, most, seed=0):
    """Right x wrong responses to the same question, at most `most` for each, out of trajectory rows
    with "correct". Equal responses count once. Which pairs are taken depends on the seed and the
    question alone."""
    questions, pairs = {}, []
    for row in rows:
        if row["correct"] is None:
            wanted = "wanted 'correct', 'answer' or 'labels'"
            raise BadInput(f"{row['source']}: whether it is right is not known; {wanted}")
        sides = questions.setdefault(str(row["prompt"]), ({}, {}))
        sides[row["correct"]].setdefault(tuple(row["completions"]), row)
    for question, sides in questions.items():
        wrong, right = (list(side.values()) for side in sides)
        rng = np.random.default_rng([seed, zlib.crc32(question.encode())])
        for i in rng.permutation(len(right) * len(wrong))[:most].tolist():
            chosen, rejected = right[i // len(wrong)], wrong[i % len(wrong)]
            pair = {"prompt": chosen["prompt"], "source": chosen.get("source", "--data")}
            pair |= {"chosen": chosen["completions"], "rejected": rejected["completions"]}
            pairs.append(pair)
    return pairs


def sample_pairs(problems, first_key, cfg, tokenizer, procs):
    """Pairs of verified samples of the policy. A response cut at --max_new_tokens has no end to
    score, and is left out."""
    if not problems:
        return []
    model = load_policy(cfg.model, torch_dtype(cfg, procs.device)).to(procs.device)
    policy, rows = Policy(model, tokenizer, layout_of(cfg)), []
    for problem in problems:  # one that cannot be asked shows before any is
        source = problem.get("source", "--data")
        search.prompt_ids(tokenizer, problem["question"], cfg, source)
    for r in rl.roll_out(policy, problems, first_key, cfg, procs):
        if r.finished:
            correct = r.correct > 0.5
            rows.append({"prompt": r.prompt, "completions": r.completions, "correct": correct})
    return make_pairs(rows, cfg.pairs_per_question, cfg.seed)


def read_files(paths, cfg, tokenizer, procs):
    """Files of pairs, of trajectories or of problems -> pairs, and the trajectories that know their
    first wrong step."""
    rows = {"pairs": [], "trajectories": [], "problems": []}
    step_end, pairs = layout_of(cfg).step_end, []
    for path in paths:
        kind = recognise(path)[0]
        if kind == "trajectories":
            rows[kind] += read_trajectories(path, step_end)
        else:
            rows[kind] += {"pairs": read_pairs, "problems": read_problems}[kind](path)
    for row in rows["pairs"]:
        steps = {side: split_steps(row[side], step_end) for side in ("chosen", "rejected")}
        pairs.append(row | steps)
    pairs += make_pairs(rows["trajectories"], cfg.pairs_per_question, cfg.seed)
    pairs += sample_pairs(rows["problems"][: cfg.problems], 0, cfg, tokenizer, procs)
    if not pairs:
        what = "no question there has both a right and a wrong response"
        raise BadInput(f"{' '.join(paths)}: {what}")
    return pairs, [row for row in rows["trajectories"] if row["first_error"] is not None]


def encode_pairs(pairs, encode, max_length, procs=Processes()):
    """-> Pairs that fit, number left out: of two equal responses (nothing to learn), or too
    long."""

    def rows():
        for pair in pairs:
            row = {"prompt": pair["prompt"], "source": pair.get("source", "--data")}
            for side in ("chosen", "rejected"):
                yield row | {"completions": pair[side]}

    sides, kept = data.encode_all(rows(), encode, procs), []
    known = sides.known()
    for i, (chosen, rejected) in enumerate(zip(known, known)):
        length = max(sides.lengths[2 * i : 2 * i + 2])
        if length <= max_length and chosen.input_ids != rejected.input_ids:
            kept += [2 * i, 2 * i + 1]
    if not kept:
        what = f"none of the {len(pairs)} pairs fits (the longest: {max(sides.lengths)} tokens)"
        raise BadInput(f"--max_length {max_length}: {what} and is of two different responses")
    return Pairs(sides.take(kept)), len(pairs) - len(kept) // 2


# --------------------------------------------------------------------------------------------------
# Evaluation, and something to look at.

MEASURES = {
    "pair_accuracy": "share of pairs whose right response scores higher",
    "gap": "mean gap between right and wrong",
    "localisation_steps": "AUROC of the first wrong step, by the fall",
    "localisation_tokens": "AUROC of the first wrong token, by the fall",
}


def evaluate(reward, pairs, trajectories, level, cfg, procs):
    """Held-out measures -> dict. `middle`: the token score half way between right and wrong
    responses."""
    sides = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    scores, mask = stack(reward.score_tokens(sides, procs))  # (2 pairs, T)
    chosen, rejected = response_scores(scores, mask, METHODS[cfg.method][1]).reshape(-1, 2).T
    means = response_scores(scores, mask).reshape(-1, 2).mean(0)
    measures = {"pair_accuracy": (chosen > rejected).float().mean().item()}
    measures |= {"gap": (chosen - rejected).mean().item(), "middle": means.mean().item()}
    if trajectories:
        scores = reward.score_tokens(trajectories, procs)
        errors = [e.first_error for e in trajectories]
        steps = [step_scores(z, e, reward.kind) for z, e in zip(scores, trajectories)]
        measures["localisation_steps"] = localisation_auroc(steps, errors)
        if level and not cfg.eval:  # "7+8=5": the wrong token is known to be the step's result
            tokens = [np.cumsum(z) if reward.kind == "implicit" else z for z in scores]
            wrong = [result_token(e, t) if t >= 0 else -1 for e, t in zip(trajectories, errors)]
            measures["localisation_tokens"] = localisation_auroc(tokens, wrong)
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


def localisation_auroc(scores, first_errors):
    """AUROC of "here is the first error" from how far the score falls: does it fall where the error
    is made?

    scores: for each solution a list, one number for each unit (step or token), read when the unit
    is there: a value, a Q, or a sum of rewards so far. first_errors: index of the first wrong unit,
    -1: none. The fall at unit t is s_t-1 - s_t; at the first, from the mean first score of all
    solutions. Units behind the first wrong one are left out: whether what builds on an error is
    right is not defined. NaN if there is no error, or nothing else.
    """
    start, falls, wrong = np.mean([s[0] for s in scores if len(s)] or [0.0]), [], []
    for s, error in zip(scores, first_errors):
        fall = -np.diff(np.concatenate([[start], s]))[: error + 1 if error >= 0 else None]
        falls += fall.tolist()
        wrong += [t == error for t in range(len(fall))]
    return tdrm.auroc(falls, wrong)


def step_scores(scores, e, kind):
    """Token scores -> one for each step: their mean over its tokens; of log-ratios, their sum up to
    its end."""
    found, begin = [], 0
    for end in e.step_ends:
        end += 1 - e.prompt_length
        number = scores[:end].sum() if kind == "implicit" else np.mean(scores[begin:end])
        found.append(float(number))
        begin = end
    return found


def result_token(e, t):
    """Which response token is the result of built-in step t: the step's last before its blank
    line."""
    return e.step_ends[t] - e.prompt_length - (t < len(e.step_ends) - 1)


def choose_two(pairs, trajectories):
    """A right and a wrong response, if possible one that knows where it goes wrong -> [(title,
    example)]."""
    right = [e for e in trajectories if e.first_error < 0] or [pairs[0].chosen]
    wrong = [e for e in trajectories if e.first_error >= 0 and not e.correct] or [pairs[0].rejected]
    if wrong[0].first_error is not None:
        wrong.sort(key=lambda e: abs(e.first_error - len(e.step_ends) / 2))
    return [("right", right[0]), ("wrong", wrong[0])]


def print_tokens(title, tokenizer, e, scores, middle):
    """A response's tokens with their scores, a step to a line: red below `middle`, green above, or
    in plain numbers where the output is no terminal."""
    color, shades = sys.stdout.isatty(), (196, 203, 217, 255, 157, 83, 46)
    spread = max(1e-9, float(np.abs(np.asarray(scores) - middle).max()))
    question = " ".join(question_of(e.prompt).split())[:100]
    print(f"\n{title}: {question}   (middle {middle:+.2f}, reach {spread:.2f})")
    ids, parts, line = e.input_ids[e.prompt_length :], [], 0
    for t, (i, score) in enumerate(zip(ids, scores)):
        text = tokenizer.decode([i])
        shown, place = text.replace("\n", "⏎") or " ", (score - middle) / spread  # place: -1 to 1
        shade = f"\033[30;48;5;{shades[round(3 + 3 * place)]}m{shown}\033[0m"
        parts.append(shade if color else f"{shown} {place:+.2f}")
        if "\n\n" in text or t == len(ids) - 1:
            mark = "   <- first wrong step" if line == e.first_error else ""
            print("  " + ("" if color else "  ").join(parts) + mark)
            parts, line = [], line + 1


if __name__ == "__main__":
    launch(main, Config, __doc__)
