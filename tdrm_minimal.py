"""TDRM: a process reward model trained on temporal-difference targets (arXiv 2509.15110), with its
two baselines.

A response is cut into steps; the state s_t is the question and steps 1..t; V(s_t) in [0, 1] should
say how promising it is. A ScalarPRM fits each step's own label, so its values jump; an n-step TD
target lets each value look ahead:

    V_t = sigmoid(logit at the last token of step t)                                step_values
    r_t = a cosine in t/T from a to b, (a, b) = `correct` where step t is labelled  shaped_rewards
          right, `wrong` where not; 0 without labels
    y_t = clamp( r_t + gamma r_t+1 + ... + gamma^(n-1) r_t+n-1 + gamma^n V_t+n,     td_targets
                 0, 1 )
    y_T = c, the outcome: is the final answer right?
    loss = mean over all states of the global batch of BCE(V_t, y_t), no gradient   value_loss
           through y

Under causal attention the hidden state at the end of step t does not depend on what follows. So ONE
forward over the trajectory gives all values, targets and gradients, where the published code runs
two over whole prefixes per transition. Condition: nothing follows a prefix, so no end-of-turn token
closes an unfinished response (data.py).

Without step labels r = 0 and gamma = 1, and n is the whole response unless --n_step says otherwise
(y = c at every state, Monte Carlo): V then estimates P(correct | state) from outcomes alone. The
baselines are `--method ScalarPRM` (BCE on the step labels) and `--method ScalarORM` (BCE on the
outcome, last step only). Left out: nothing of the method.

    python tdrm_minimal.py       # built-in task: a table and three solutions, in about two minutes
    torchrun --nproc_per_node=8 tdrm_minimal.py --model Qwen/Qwen2.5-Math-7B --lr 1e-6 \\
        --data math_shepherd.jsonl --eval processbench.jsonl \\
        --batch_size 256 --micro_batch_size 4 --grad_checkpoint
    python tdrm_minimal.py --score solutions.jsonl --model runs/TDRM/model   # every step's value

Files in --out: config.json, metrics.jsonl, summary.json, model/ (a Hugging Face folder), state/
(for --resume).
"""

import itertools
import json
import math
import os
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

import data
import sft_minimal as sft
from parts.formats import BadInput, read_trajectories
from parts.models import check_ids, layout_of, load_tokenizer, question_of, torch_dtype
from parts.rewards import load_reward_model, new_reward_model
from parts.runs import Run, last_checkpoint, launch, opt
from parts.training import TrainConfig, accumulate_gradients, learning_rate, optimizer_step, prepare

METHODS = ("TDRM", "ScalarPRM", "ScalarORM")
KINDS = ("hard", "soft", "correct")  # of labels, see data.make_trajectories


@dataclass(frozen=True)
class Config(TrainConfig):
    method: str = opt("TDRM", "what the values are trained on", choices=METHODS)
    gamma: float = opt(0.8, "discount; 1 where there are no step labels", low=0, high=1)
    n_step: int | None = opt(None, "n (paper: 1 to 3); without it: 3, without labels all", low=1)
    lam: float | None = opt(None, "TD(lambda) in place of n steps", low=0, high=1)
    correct: tuple[float, float] = opt((0.5, 0.2), "reward of a right step, at beginning and end")
    wrong: tuple[float, float] = opt((-0.5, -1.0), "reward of a wrong step, likewise")
    lr: float = opt(2e-3, "peak learning rate (for a 7B model: 1e-6)", low=0)
    eval: tuple[str, ...] = opt((), "trajectory files; without it: questions held out of --data")
    problems: int = opt(16_000, "built-in task: training questions, four solutions each", low=1)
    label_rollouts: int = opt(4, "built-in task: rollouts per step label; 0: no labels", low=0)
    label_kind: str = opt("hard", "a label: any rollout right, share, step right", choices=KINDS)
    score: str | None = opt(None, "trajectory file: print its step values, train nothing")


# --------------------------------------------------------------------------------------------------
# The maths. (B, S) = trajectories by steps; mask is True on real steps, which come first in a row.


def step_values(model, input_ids, attention_mask, step_ends):
    """Logits (B, S) of all values in one forward, read at `step_ends` (B, S), the index of each
    step's last token.

    Rows are padded on the right. There causal attention needs no mask, and without one the fused
    causal kernel runs; so `attention_mask` (B, T) is only looked at to refuse padding on the left
    (ValueError). None is fine.
    """
    if attention_mask is not None and not bool((attention_mask[:, 0] != 0).all()):
        raise ValueError("step_values wants rows padded on the right")
    logits = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1)  # (B, T)
    return logits.float().gather(1, step_ends)


def shaped_rewards(labels, mask, correct=(0.5, 0.2), wrong=(-0.5, -1.0)):
    """Step labels (B, S) in [0, 1] -> rewards (B, S), 0 outside the mask.

    CosFn(t, T, a, b) = b + (a - b)/2 * (1 + cos(pi t / T)), t = 1..T (arXiv 2502.03373): from a at
    the beginning to b at the end. A soft label mixes the two cosines.
    """
    mask = mask.bool()
    T = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    t = torch.arange(1, mask.shape[1] + 1, device=mask.device)  # (S,)
    falling = 0.5 * (1 + torch.cos(math.pi * t / T))  # (B, S), from 1 to 0
    right, not_right = (b + (a - b) * falling for a, b in (correct, wrong))
    return torch.where(mask, labels * right + (1 - labels) * not_right, 0.0)


def td_targets(values, rewards, outcomes, mask, gamma=0.8, n_step=1, lam=None):
    """Targets (B, S) in [0, 1], detached, 0 outside the mask.

    values (B, S) are probabilities, rewards (B, S), outcomes (B,). The one-step backup replaces
    each value by r_t + gamma V_t+1 and the last by the outcome; n backups make the n-step target.
    So a window that would run past the end stops at T and bootstraps from the outcome, one that
    ends exactly at T from V_T.
    With `lam`: G_t = r_t + gamma ((1 - lam) V_t+1 + lam G_t+1), G_T = c.
    """
    values, mask = values.detach(), mask.bool()
    end = mask & ~F.pad(mask, (0, 1))[:, 1:]  # (B, S), True on each row's last step
    outcomes = outcomes.to(values.dtype)[:, None]  # (B, 1)
    if lam is None:
        targets = values
        for _ in range(min(n_step, mask.shape[1])):
            next_targets = F.pad(targets, (0, 1))[:, 1:]
            targets = torch.where(end, outcomes, rewards + gamma * next_targets)
    else:
        targets, next_values = torch.zeros_like(values), F.pad(values, (0, 1))[:, 1:]
        following = torch.zeros_like(values[:, 0])
        for t in reversed(range(mask.shape[1])):
            following = rewards[:, t] + gamma * ((1 - lam) * next_values[:, t] + lam * following)
            following = torch.where(end[:, t], outcomes[:, 0], following)
            targets[:, t] = following
    return torch.where(mask, targets, 0.0).clamp(0, 1)


def value_loss(logits, targets, weights, count):
    """Binary cross-entropy between sigmoid(logits) and targets (B, S), weighted, divided by
    `count`, that of the whole global batch."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # (B, S)
    return (losses * weights).sum() / count


def rewards_and_gamma(cfg, labels, mask, labelled):
    """Step rewards (B, S) and discount; without step labels nothing but the outcome is known."""
    if not labelled:
        return torch.zeros_like(labels), 1.0
    return shaped_rewards(labels, mask, cfg.correct, cfg.wrong), cfg.gamma


def targets_and_weights(cfg, logits, batch, labelled):
    """What each state's value is pulled to, and how strongly: two (B, S) tensors, by method."""
    mask = batch["step_mask"]
    if cfg.method == "ScalarPRM":
        return batch["labels"], mask.float()
    if cfg.method == "ScalarORM":
        end = mask & ~F.pad(mask, (0, 1))[:, 1:]  # True on each row's last step
        return batch["outcomes"][:, None].expand_as(logits), end.float()
    rewards, gamma = rewards_and_gamma(cfg, batch["labels"], mask, labelled)
    n_step = cfg.n_step or (3 if labelled else mask.shape[1])
    values, outcomes = logits.sigmoid(), batch["outcomes"]
    return td_targets(values, rewards, outcomes, mask, gamma, n_step, cfg.lam), mask.float()


# --------------------------------------------------------------------------------------------------
# Training.


def main(cfg, procs):
    """Train a reward model -> summary (also in summary.json)."""
    if cfg.score:
        return score_file(cfg, procs)
    # 1) The data, every process all of it; a policy with a new head of one number per token.
    level = data.builtin_level(cfg.data)
    if not level and not cfg.model:
        raise BadInput("--data: your own trajectories need --model, the policy to start from")
    out = cfg.out or default_out(cfg.method, level)
    cfg = replace(cfg, out=out, model=cfg.model or sft.builtin_policy(level, procs))
    checkpoint = last_checkpoint(cfg)
    name = checkpoint and os.path.join(checkpoint, "model") or cfg.model
    tokenizer = load_tokenizer(name)
    dtype, layout = torch_dtype(cfg, procs.device), layout_of(cfg)
    reward = new_reward_model(name, tokenizer, dtype, cfg.seed, layout=layout)
    examples, held_out, labelled, left_out = load_data(cfg, level, tokenizer, procs)
    learner = prepare(reward, cfg, procs)
    check_ids(reward.model, tokenizer, (e.input_ids for e in examples), cfg.model)
    steps = cfg.steps or max(1, len(examples) // cfg.batch_size)
    procs.print(
        f"{cfg.method}: {len(examples)} trajectories ({left_out} too long), "
        f"step labels: {'yes' if labelled else 'no (r = 0, gamma = 1)'}, "
        f"{steps} steps of {cfg.batch_size}, {procs.world} processes on {procs.device.type}"
    )

    # 2) The loop.
    run = Run(cfg, procs, checkpoint, steps, {"model": learner})
    order = data.batches(examples.lengths, cfg.batch_size, cfg.seed, run.start)
    for step in run.steps():
        batch = [examples[i] for i in next(order)]
        states = sum(len(e.step_ends) for e in batch)  # of the global batch, on every process
        count = len(batch) if cfg.method == "ScalarORM" else states

        def loss_fn(rows):
            b = data.collate(rows, tokenizer.pad_token_id, procs.device)
            logits = step_values(learner.forward, b["input_ids"], None, b["step_ends"])  # (B, S)
            targets, weights = targets_and_weights(cfg, logits, b, labelled)
            return value_loss(logits, targets, weights, count)

        loss = accumulate_gradients(learner, batch, cfg.micro_batch_size, loss_fn, procs)
        lr = learning_rate(step, steps, cfg.lr)
        grad_norm = optimizer_step(learner, lr, cfg.grad_clip)
        run.log(loss=procs.sum(loss)[0], grad_norm=grad_norm, lr=lr)
        if run.evaluates:
            run.log(**evaluate(cfg, reward.score_steps(held_out, procs), held_out))
    if run.stopped:
        return None

    # 3) What came of it.
    values = reward.score_steps(held_out, procs)
    measures = evaluate(cfg, values, held_out)
    summary = run.finish(measures | {"trajectories": len(held_out)}, cfg.method)
    if procs.rank == 0:
        print_table(f"{cfg.method} on {len(held_out)} held-out solutions", measures)
        for title, i in choose_three(held_out):
            print_solution(title, held_out[i], values[i])
    return summary


def load_data(cfg, level, tokenizer, procs):
    """-> training and held-out Examples, whether they have step labels, how many were too long.
    BadInput if the method lacks what it learns from."""
    layout, held_out = layout_of(cfg), None
    if level:
        kind, K = cfg.label_kind, cfg.label_rollouts
        problems = data.make_problems(cfg.problems, "train", cfg.seed, level)
        rows = data.make_trajectories(problems, 4, K, kind, cfg.seed, level)
        problems = data.make_problems(1000, "test", 0, level)
        held_out = data.make_trajectories(problems, 2, 4, kind, 1, level)
    else:
        rows = read_trajectories(cfg.data, layout.step_end)
    if cfg.eval:
        held_out = read_trajectories(cfg.eval, layout.step_end)
    encode = data.Spelling(tokenizer, layout=layout)
    examples = data.encode_all(rows, encode, procs)
    if held_out is None:
        examples, held_out = data.hold_out(examples)
    else:
        held_out = data.encode_all(held_out, encode, procs)
    examples, left_out = data.that_fit(examples, cfg.max_length)
    held_out, left_out_too = data.that_fit(held_out, cfg.max_length)
    needed = "labels" if cfg.method == "ScalarPRM" else "correct"
    lacking, labelled = None, True
    for e in examples.known():
        labelled = labelled and e.labels is not None
        if lacking is None and getattr(e, needed) is None:
            lacking = e
    if lacking:
        what = "an outcome ('correct', 'answer' or 'labels')"
        what = "step labels ('labels')" if needed == "labels" else what
        source = lacking.source or "--label_rollouts 0"
        raise BadInput(f"{source}: --method {cfg.method} learns from {what}, and there is none")
    return examples, held_out, labelled, left_out + left_out_too


def score_file(cfg, procs):
    """`--score FILE`: every trajectory's step values, one JSON line a row in the file's order, to
    standard output; null for one that is longer than --max_length or the model's own context. Then
    the measures of those that have what it takes, beside it."""
    next(read_trajectories(cfg.score, outcome=False))  # a mistake shows before a model is loaded
    name = cfg.model or os.path.join(default_out(cfg.method), "model")
    reward = load_reward_model(name, torch_dtype(cfg, procs.device), procs.device)
    layout = layout_of(cfg) if cfg.step_end != "blank" else reward.layout
    rows = read_trajectories(cfg.score, layout.step_end, outcome=False)
    scored, count = [], 0  # (example, its values)
    while chunk := list(itertools.islice(rows, 64 * procs.world)):
        examples = list(data.encode_some(chunk, reward.encode))
        fit = [e for e in examples if len(e) <= cfg.max_length]
        values = dict(zip(map(id, fit), reward.score_steps(fit, procs)))
        for e in examples if procs.rank == 0 else ():
            found = values.get(id(e))
            rounded = [round(v, 6) for v in found] if found else None
            print(json.dumps({"source": e.source, "correct": e.correct, "values": rounded}))
            count += 1
            if found:
                scored.append((replace(e, input_ids=[]), found))
    if procs.rank == 0 and scored:
        examples, values = zip(*scored)
        title = f"{name} on {len(scored)} solutions ({count - len(scored)} too long)"
        print_table(title, evaluate(cfg, values, examples), file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Evaluation on trajectories that were not trained on.


def evaluate(cfg, values, examples):
    """values: one list of step values per example -> dict of the measures that the examples have
    what it takes for."""
    S, labelled = max(len(v) for v in values), all(e.labels is not None for e in examples)

    def padded(lists):
        return torch.tensor([list(x) + [0.0] * (S - len(x)) for x in lists])

    mask = padded([[1.0] * len(v) for v in values]).bool()
    labels = padded([e.labels or [] for e in examples])
    rewards, gamma = rewards_and_gamma(cfg, labels, mask, labelled)
    measures = smoothness(padded(values), rewards, mask, gamma)
    known = []
    for v, e in zip(values, examples):
        if e.correct is not None and len(v) > 1:
            known.append((v, e.correct))
    if known:
        correct = [c for _, c in known]
        measures["auroc_last"] = auroc([v[-1] for v, _ in known], correct)
        measures["auroc_second_last"] = auroc([v[-2] for v, _ in known], correct)
        measures["auroc_middle"] = auroc([v[(len(v) - 1) // 2] for v, _ in known], correct)
        states = [(value, c) for v, c in known for value in v]
        measures["calibration_error"] = calibration_error(*zip(*states))
    errors = [(v, e.first_error) for v, e in zip(values, examples) if e.first_error is not None]
    if errors:
        measures["first_error_f1"] = first_error_f1(*zip(*errors))
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


def smoothness(values, rewards, mask, gamma):
    """How smoothly values (B, S) move along trajectories, as a dict of floats:

    abs_delta_v: mean |V_t+1 - V_t|; td_error_mean, td_error_std: of |r_t + gamma V_t+1 - V_t|, t <
    T; lipschitz: mean over trajectories of the largest |V_t+1 - V_t|, the least L with |V_s - V_t|
    <= L |s - t|. (The paper divides by a distance between states that it does not define; ours is
    the number of steps.)
    """
    pairs = mask.bool()[:, 1:] & mask.bool()[:, :-1]  # (B, S-1)
    jump = (values[:, 1:] - values[:, :-1]).abs()
    error = (rewards[:, :-1] + gamma * values[:, 1:] - values[:, :-1]).abs()[pairs]
    largest = jump.flatten()
    if pairs.shape[1]:
        largest = torch.where(pairs, jump, 0.0).amax(1)[pairs.any(1)]

    def mean(x):
        return x.mean().item() if x.numel() else 0.0

    return {
        "abs_delta_v": mean(jump[pairs]),
        "td_error_mean": mean(error),
        "td_error_std": error.std(correction=0).item() if error.numel() else 0.0,
        "lipschitz": mean(largest),
    }


def auroc(scores, outcomes):
    """Probability that a right response scores above a wrong one, ties counting half; NaN if there
    is only one kind."""
    scores, outcomes = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=bool)
    right, wrong = outcomes.sum(), (~outcomes).sum()
    if not right or not wrong:
        return math.nan
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]  # tied scores share their mean rank
    return float((ranks[outcomes].sum() - right * (right + 1) / 2) / (right * wrong))


def calibration_error(values, outcomes, bins=10):
    """Expected calibration error: mean over states of |mean value - share right| within bins of
    equal width."""
    values, outcomes = np.asarray(values), np.asarray(outcomes, dtype=float)
    which, total = np.minimum((values * bins).astype(int), bins - 1), 0.0
    for b in range(bins):
        total += abs((values - outcomes)[which == b].sum())
    return float(total / len(values))


def first_error_f1(values, first_errors):
    """ProcessBench's measure: the first step valued below a threshold is the first error (-1:
    none); F1 is the harmonic mean of the accuracies on wrong and right solutions. Each half of the
    rows uses the other half's best threshold."""
    thresholds, truth = np.linspace(0.01, 0.99, 99), np.array(first_errors)
    found = np.full((len(truth), len(thresholds)), -1)  # [i, k]: row i's first step under k, or -1
    for i, v in enumerate(values):
        lowest = np.minimum.accumulate(v)
        first = np.searchsorted(-lowest, -thresholds, side="right")
        found[i] = np.where(first < len(v), first, -1)
    hit = found == truth[:, None]

    def f1(hit, truth):  # (rows,) or (rows, thresholds)
        wrong, right = hit[truth >= 0].mean(0), hit[truth < 0].mean(0)
        return 2 * wrong * right / np.maximum(wrong + right, 1e-9)

    half = np.arange(len(truth)) % 2 == 0
    for h in (half, ~half):
        if not (truth[h] >= 0).any() or not (truth[h] < 0).any():
            return math.nan  # needs right and wrong solutions in both halves
    best = f1(hit[~half], truth[~half]).argmax(), f1(hit[half], truth[half]).argmax()
    chosen = np.where(half, *best)
    return float(f1(hit[np.arange(len(truth)), chosen], truth))


MEASURES = {
    "abs_delta_v": "mean |V_t+1 - V_t|",
    "lipschitz": "largest |V_t+1 - V_t| of a solution",
    "td_error_mean": "TD error, mean",
    "td_error_std": "TD error, standard deviation",
    "auroc_last": "AUROC of the outcome, last state",
    "auroc_second_last": "AUROC of the outcome, second-last state",
    "auroc_middle": "AUROC of the outcome, middle state",
    "calibration_error": "calibration error of V as P(right)",
    "first_error_f1": "first-error F1 (ProcessBench)",
}


def print_table(title, measures, names=MEASURES, file=None):
    print(f"\n{title}", file=file)
    for key, name in names.items():
        if measures.get(key) is not None:
            print(f"  {name:<46} {measures[key]:.3f}", file=file)


def error_place(e):
    """Where in a solution its first wrong step is, in 0..1; None if it has none, or none is
    known."""
    t = e.first_error
    if t is None and e.labels is not None:
        t = next((t for t, label in enumerate(e.labels) if label < 0.5), None)
    return None if t is None or t < 0 else t / len(e.step_ends)


def choose_three(examples):
    """A right solution, one going wrong early and one going wrong late, where there are such ->
    [(title, index)]."""
    places, found = [error_place(e) for e in examples], {}
    steps_to_see = [min(6, len(e.step_ends)) for e in examples]
    for i in sorted(range(len(examples)), key=lambda i: -steps_to_see[i]):
        correct, place, title = examples[i].correct, places[i], None
        if correct and place is None:
            title = "right"
        elif correct is False and place is not None and (place < 0.34 or place >= 0.5):
            title = "goes wrong early" if place < 0.34 else "goes wrong late"
        elif correct is False and not any(p is not None for p in places):
            title = "wrong"
        if title:
            found.setdefault(title, i)
    titles = ("right", "goes wrong early", "goes wrong late", "wrong")
    return [(title, found[title]) for title in titles if title in found]


def print_solution(title, e, values):
    print(f"\n{title}: {' '.join(question_of(e.prompt).split())[:100]}")
    for t, (step, value) in enumerate(zip(e.completions, values)):
        wrong = "  <- first wrong step" if t == e.first_error else ""
        print(f"  {'█' * round(20 * value):<20} {value:.2f}  {' '.join(step.split())[:70]}{wrong}")


# --------------------------------------------------------------------------------------------------
# The built-in reward model.


def default_out(method, level=None):
    return os.path.join("runs", method + (level or "").removeprefix("builtin"))


def builtin_reward_model(level, procs, method="TDRM"):
    """The built-in reward model's folder, trained first where it is not there yet."""
    out = default_out(method, level)
    if not os.path.isdir(os.path.join(out, "model")):
        procs.print(f"there is no {out}/model yet: training the built-in reward model first")
        cfg = Config(method=method, data=(level or "builtin",), out=out, resume=True)
        if main(cfg, procs) is None:
            raise SystemExit(0)  # stopped by a signal
    return os.path.join(out, "model")


if __name__ == "__main__":
    launch(main, Config, __doc__)
