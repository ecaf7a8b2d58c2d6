"""TDRM: a process reward model trained on temporal-difference targets (arXiv 2509.15110), with its two baselines.

A response is cut into steps; the state s_t is the question and steps 1..t; V(s_t) in [0, 1] should say how promising
it is. A ScalarPRM fits each step's own label, so its values jump; an n-step TD target lets each value look ahead:

    V_t = sigmoid(logit at the last token of step t)                                       step_values
    r_t = a cosine in t/T from a to b, (a, b) = `correct` where step t is labelled right,  shaped_rewards
          `wrong` where not; 0 without labels
    y_t = clamp( r_t + gamma r_t+1 + ... + gamma^(n-1) r_t+n-1 + gamma^n V_t+n,  0, 1 )    td_targets
    y_T = c, the outcome: is the final answer right?
    loss = mean over all states of the global batch of BCE(V_t, y_t), no gradient through y

Under causal attention the hidden state at the end of step t does not depend on what follows. So ONE forward over the
trajectory gives all values, targets and gradients, where the published code runs two over whole prefixes per
transition. Condition: nothing follows a prefix, so no end-of-turn token closes an unfinished response (data.py).

Without step labels r = 0 and gamma = 1, and n is the whole response unless --n_step says otherwise (y = c at every
state, Monte Carlo): V then estimates P(correct | state) from outcomes alone. `--method scalar_prm` (BCE on the step
labels) and `--method scalar_orm` (BCE on the outcome, last step only) are the baselines.
Left out: nothing of the method.

    python tdrm_minimal.py                          # built-in task: a table and three solutions, in about two minutes
    torchrun --nproc_per_node=8 tdrm_minimal.py --model Qwen/Qwen2.5-Math-7B --data math_shepherd.jsonl \\
        --eval processbench.jsonl --lr 1e-6 --batch_size 256 --micro_batch_size 4 --grad_checkpoint
    python tdrm_minimal.py --score solutions.jsonl --model runs/tdrm/model  # every step's value, one JSON line a row
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
import sft_minimal as sft
from data import BadInput
from plumbing import merge
from scorers import prefix_values
from sft_minimal import opt


@dataclass(frozen=True)
class Config(sft.TrainConfig):
    method: str = opt("tdrm", "what the values are trained on", choices=("tdrm", "scalar_prm", "scalar_orm"))
    gamma: float = opt(0.8, "discount of later rewards and values; taken as 1 without step labels", low=0, high=1)
    n_step: int = opt(0, "n: steps of reward before the target bootstraps from a value (the paper: 1, 2, 3); 0: 3, or "
                         "without step labels all", low=0)
    lam: float = opt(-1.0, "TD(lambda) in place of n steps, 0 to 1; negative: n steps", low=-1, high=1)
    correct: tuple = opt((0.5, 0.2), "shaped reward of a right step at the beginning and at the end of a response")
    wrong: tuple = opt((-0.5, -1.0), "shaped reward of a wrong step, likewise")
    terminal_weight: float = opt(1.0, "weight of the last state's loss", low=0)
    lr: float = opt(2e-3, "peak learning rate (for a 7B model: 1e-6)", low=0)
    eval: tuple = opt((), "trajectory files to evaluate on; empty: questions held out of --data")
    problems: int = opt(16_000, "built-in task: training questions, four solutions each", low=1)
    label_rollouts: int = opt(4, "built-in task: rollouts a step label is estimated from; 0: no step labels", low=0)
    label_kind: str = opt("hard", "built-in task: any rollout right (hard), or share (soft)", choices=("hard", "soft"))
    score: str = opt("", "trajectory file: print its step values under --model, train nothing")
    plot: bool = opt(False, "draw the loss and the three solutions' values to plot.png (needs matplotlib)")


# --------------------------------------------------------------------------------------------------
# The maths. (B, S) = trajectories by steps; mask is True on real steps, which come first in a row.

def shaped_rewards(labels, mask, correct=(0.5, 0.2), wrong=(-0.5, -1.0)):
    """Step labels (B, S) in [0, 1] -> rewards (B, S), 0 outside the mask.

    CosFn(t, T, a, b) = b + (a - b)/2 * (1 + cos(pi t / T)), t = 1..T (arXiv 2502.03373): from a at the beginning to b
    at the end. A soft label mixes the two cosines.
    """
    mask = mask.bool()
    T = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    t = torch.arange(1, mask.shape[1] + 1, device=mask.device)  # (S,)
    falling = 0.5 * (1 + torch.cos(math.pi * t / T))  # (B, S), from 1 to 0
    right, not_right = (b + (a - b) * falling for a, b in (correct, wrong))
    return torch.where(mask, labels * right + (1 - labels) * not_right, 0.0)


def td_targets(values, rewards, outcomes, mask, gamma=0.8, n_step=1, lam=None):
    """Targets (B, S) in [0, 1], detached, 0 outside the mask.

    values (B, S) are probabilities, rewards (B, S), outcomes (B,). The one-step backup replaces each value by
    r_t + gamma V_t+1 and the last by the outcome; n backups make the n-step target. So a window that would run past the
    end stops at T and bootstraps from the outcome, one that ends exactly at T from V_T.
    With `lam`: G_t = r_t + gamma ((1 - lam) V_t+1 + lam G_t+1), G_T = c.
    """
    values, mask = values.detach(), mask.bool()
    end = mask & ~F.pad(mask, (0, 1))[:, 1:]  # (B, S), True on each row's last step
    outcomes = outcomes.to(values.dtype)[:, None]
    next_of = lambda x: F.pad(x, (0, 1))[:, 1:]  # noqa: E731
    if lam is None:
        targets = values
        for _ in range(min(n_step, mask.shape[1])):
            targets = torch.where(end, outcomes, rewards + gamma * next_of(targets))
    else:
        targets, next_values = torch.zeros_like(values), next_of(values)
        following = torch.zeros_like(values[:, 0])
        for t in reversed(range(mask.shape[1])):
            following = rewards[:, t] + gamma * ((1 - lam) * next_values[:, t] + lam * following)
            following = torch.where(end[:, t], outcomes[:, 0], following)
            targets[:, t] = following
    return torch.where(mask, targets, 0.0).clamp(0, 1)


def smoothness(values, rewards, mask, gamma):
    """How smoothly values (B, S) move along trajectories, as a dict of floats:

    abs_delta_v: mean |V_t+1 - V_t|; td_error_mean, td_error_std: of |r_t + gamma V_t+1 - V_t|, t < T;
    lipschitz: mean over trajectories of the largest |V_t+1 - V_t|, the least L with |V_s - V_t| <= L |s - t|. (The
    paper divides by a distance between states that it does not define; ours is the number of steps.)
    """
    pairs = mask.bool()[:, 1:] & mask.bool()[:, :-1]  # (B, S-1)
    jump = (values[:, 1:] - values[:, :-1]).abs()
    error = (rewards[:, :-1] + gamma * values[:, 1:] - values[:, :-1]).abs()[pairs]
    largest = torch.where(pairs, jump, 0.0).amax(1)[pairs.any(1)] if pairs.shape[1] else jump.flatten()
    mean = lambda x: x.mean().item() if x.numel() else 0.0  # noqa: E731
    return {"abs_delta_v": mean(jump[pairs]), "td_error_mean": mean(error),
            "td_error_std": error.std(correction=0).item() if error.numel() else 0.0, "lipschitz": mean(largest)}


# --------------------------------------------------------------------------------------------------
# The model: a backbone with one number per token, read at the end of each step.

def load_reward_model(name, dtype=torch.float32, seed=0, new_head=True):
    """A policy, a TDRM, or a published sequence-classifier PRM (same `score.weight`) as a token classifier.

    A policy gets a new head, or is refused where `new_head` is False. Raises BadInput if there is no such model or its
    head is not a single number.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification
    config = data.from_pretrained(AutoConfig.from_pretrained, name)
    kind = (config.architectures or [""])[0]
    if "Reward" in kind or ("Classification" in kind and config.num_labels != 1):
        raise BadInput(f"--model {name}: a {kind} with {config.num_labels} labels; wanted: a token or sequence "
                       "classifier with one label, read as the logit of the value")
    config.num_labels, config.classifier_dropout = 1, 0.0  # the library's 0.1 would turn values and targets to noise
    if not kind.endswith("ForTokenClassification"):
        config.token_classification_bias = False  # a bare `score.weight`, so ours loads as a sequence classifier, too
    torch.manual_seed(seed)
    new = ("score.", "classifier.") if new_head else ()
    return data.load_model(AutoModelForTokenClassification, name, new, config=config, dtype=dtype)


def step_values(model, input_ids, attention_mask, step_ends):
    """Logits (B, S) of all values in one forward, read at `step_ends` (B, S), the index of each step's last token.

    Rows are padded on the right. There causal attention needs no mask, and without one the fused causal kernel runs; so
    `attention_mask` (B, T) is only looked at to refuse padding on the left (ValueError). None is fine.
    """
    if attention_mask is not None and not bool((attention_mask[:, 0] != 0).all()):
        raise ValueError("step_values wants rows padded on the right")
    logits = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1)  # (B, T)
    return logits.float().gather(1, step_ends)


def targets_and_weights(cfg, logits, batch, labelled):
    """What each state's value is pulled to, and how strongly: two (B, S) tensors, by method."""
    mask = batch["step_mask"]
    end = mask & ~F.pad(mask, (0, 1))[:, 1:]
    if cfg.method == "scalar_prm":
        return batch["labels"], mask.float()
    if cfg.method == "scalar_orm":
        return batch["outcomes"][:, None].expand_as(logits), end.float()
    rewards, gamma = rewards_and_gamma(cfg, batch, labelled)
    n_step, lam = cfg.n_step or (3 if labelled else mask.shape[1]), cfg.lam if cfg.lam >= 0 else None
    targets = td_targets(logits.sigmoid(), rewards, batch["outcomes"], mask, gamma, n_step, lam)
    return targets, mask.float() + (cfg.terminal_weight - 1) * end


def rewards_and_gamma(cfg, batch, labelled):
    if not labelled:
        return torch.zeros_like(batch["labels"]), 1.0
    return shaped_rewards(batch["labels"], batch["step_mask"], cfg.correct, cfg.wrong), cfg.gamma


@torch.no_grad()
def score_rows(model, examples, pad_id, env, rows_at_once=64):
    """Step values of encoded trajectories: a list of S probabilities each. Split over the processes, known to all."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))[env.rank::env.world]
    values, rows = {}, []
    while order := order[len(rows):]:
        size = min(rows_at_once, max(1, 2**16 // len(examples[order[0]]["input_ids"])))  # 65,536 tokens at most
        rows = order[:size]
        batch = data.collate([examples[i] for i in rows], pad_id)
        ids, ends = batch["input_ids"].to(env.device), batch["step_ends"].to(env.device)
        if hasattr(model, "reduce"):  # another kind of reward model, or one to be read in another way (scorers.py)
            prompts = torch.tensor([examples[i]["prompt_length"] for i in rows], device=env.device)
            logits = prefix_values(model, ids, ends, prompts)
        else:
            logits = step_values(model, ids, None, ends)
        values.update(zip(rows, (row[mask].tolist() for row, mask in zip(logits.sigmoid().cpu(), batch["step_mask"]))))
    model.train()
    values = merge(values, env)
    return [values[i] for i in range(len(examples))]


# --------------------------------------------------------------------------------------------------
# Training.

def load_data(cfg, tokenizer):
    """-> training and held-out examples, whether they have step labels, how many were too long. BadInput if the method
    lacks what it learns from."""
    level = cfg.data[0]
    if level in data.LEVELS:
        problems = data.make_problems(cfg.problems, "train", cfg.seed, level)
        rows = data.make_trajectories(problems, 4, cfg.label_rollouts, cfg.label_kind, cfg.seed, level)
        held_out = data.make_trajectories(data.make_problems(1000, "test", 0, level), 2, 4, cfg.label_kind, 1, level)
    elif cfg.eval:
        rows, held_out = data.read_trajectories(cfg.data), []
    else:
        rows, held_out = data.hold_out(list(data.read_trajectories(cfg.data)))
    if cfg.eval:
        held_out = data.read_trajectories(cfg.eval)
    train, dropped = data.encode_rows(rows, tokenizer, cfg.max_length)
    held_out, dropped_too = data.encode_rows(held_out, tokenizer, cfg.max_length)
    needed = "labels" if cfg.method == "scalar_prm" else "correct"
    lacking = next((e for e in train if e[needed] is None), None)
    if lacking:
        what = "step labels ('labels')" if needed == "labels" else "an outcome ('correct', 'answer' or 'labels')"
        raise BadInput(f"{lacking.get('source', '--label_rollouts 0')}: --method {cfg.method} learns from {what}, "
                       "and there is none")
    return train, held_out, all(e["labels"] is not None for e in train), dropped + dropped_too


def main(cfg, env):
    """Train a reward model -> summary (also in summary.json)."""
    level = data.builtin_level(cfg.data)
    if cfg.score:
        return score_file(cfg, env)
    if not level and not cfg.model:
        raise BadInput("--data: your own trajectories need --model, the policy to start from")
    out = cfg.out or os.path.join("runs", cfg.method + (level or "").removeprefix("builtin"))
    cfg = dataclasses.replace(cfg, out=out, model=cfg.model or sft.builtin_policy(level, env))

    # 1) The run's folder, the data, the model.
    start_time, checkpoint = time.time(), sft.last_checkpoint(cfg)
    tokenizer = data.load_tokenizer(checkpoint or cfg.model)
    examples, held_out, labelled, dropped = load_data(cfg, tokenizer)
    steps = cfg.steps or max(1, len(examples) // cfg.batch_size)
    env.print(f"{cfg.method}: {len(examples)} trajectories ({dropped} too long), "
              f"step labels: {'yes' if labelled else 'no (r = 0, gamma = 1)'}, {steps} steps of {cfg.batch_size}, "
              f"{env.world} processes on {env.device.type}")
    model = load_reward_model(checkpoint or cfg.model, sft.torch_dtype(cfg, env), cfg.seed)
    model, wrapped = sft.prepare(model, cfg, env)
    data.check_ids(model, examples, cfg.model)
    optimizer = sft.make_optimizer(model, cfg, env)
    start = sft.load_checkpoint(checkpoint, env, model, optimizer) if checkpoint else 0

    # 2) The loop.
    sft.open_run(cfg, env)
    log, stopping = sft.Log(cfg, env, start, steps), sft.catch_signals()
    skipped = log.last.get("skipped", 0)
    order = data.batches([len(e["input_ids"]) for e in examples], cfg.batch_size, cfg.seed, start)
    for step in range(start, steps):
        batch = [examples[i] for i in next(order)]
        states = len(batch) if cfg.method == "scalar_orm" else sum(len(e["step_ends"]) for e in batch)  # global count

        def loss_fn(micro):
            tensors = {k: v.to(env.device) for k, v in data.collate(micro, tokenizer.pad_token_id).items()}
            logits = step_values(wrapped, tensors["input_ids"], None, tensors["step_ends"])
            targets, weights = targets_and_weights(cfg, logits, tensors, labelled)
            return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights).sum() / states

        loss = sft.accumulate_gradients(wrapped, sft.local_rows(batch, env), cfg.micro_batch_size, loss_fn, env)
        lr = sft.learning_rate(step, steps, cfg.lr, cfg.warmup)
        grad_norm = sft.optimizer_step(model, optimizer, lr, cfg.grad_clip)
        loss, stop = sft.all_sum(loss, bool(stopping), env=env)
        skipped += not math.isfinite(grad_norm)
        row, done = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "skipped": skipped}, step + 1
        if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
            row |= evaluate(cfg, score_rows(model, held_out, tokenizer.pad_token_id, env), held_out)
        log.row(done, **row)
        log.advance(loss=loss, grad_norm=grad_norm)
        if stop or done == steps or (cfg.save_every and done % cfg.save_every == 0):
            sft.save_checkpoint(cfg, env, done, model, tokenizer, optimizer)
        if stop:
            log.close()
            env.print(f"stopped after step {done} of {steps}; --resume continues")
            return None
    log.close()

    # 3) What came of it.
    values = score_rows(model, held_out, tokenizer.pad_token_id, env)
    summary = evaluate(cfg, values, held_out) | {"trajectories": len(held_out), "steps": steps, "skipped": skipped}
    if env.rank == 0:
        sft.save_model(os.path.join(cfg.out, "model"), model, tokenizer)
        sft.write_json(os.path.join(cfg.out, "summary.json"), summary)
        shown = choose_three(held_out)
        print_table(cfg, summary)
        for title, i in shown:
            print_solution(title, held_out[i], values[i])
        print(f"{time.time() - start_time:.0f} s; the reward model is in {os.path.join(cfg.out, 'model')}")
        if cfg.plot:
            plot(cfg, [(title, held_out[i], values[i]) for title, i in shown])
    sft.barrier(env)
    return summary


# --------------------------------------------------------------------------------------------------
# Evaluation on trajectories that were not trained on.

def auroc(scores, outcomes):
    """Probability that a right response scores above a wrong one, ties counting half; NaN if there is only one kind."""
    scores, outcomes = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=bool)
    right, wrong = outcomes.sum(), (~outcomes).sum()
    if not right or not wrong:
        return math.nan
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]  # tied scores share their mean rank
    return float((ranks[outcomes].sum() - right * (right + 1) / 2) / (right * wrong))


def calibration_error(values, outcomes, bins=10):
    """Expected calibration error: mean over states of |mean value - share right| within bins of equal width."""
    values, outcomes = np.asarray(values), np.asarray(outcomes, dtype=float)
    which = np.minimum((values * bins).astype(int), bins - 1)
    return float(sum(abs((values - outcomes)[which == b].sum()) for b in range(bins)) / len(values))


def first_error_f1(values, first_errors):
    """ProcessBench's measure: the first step valued below a threshold is the first error (-1: none); F1 is the harmonic
    mean of the accuracies on wrong and right solutions. Each half of the rows uses the other half's best threshold."""
    thresholds = np.linspace(0.01, 0.99, 99)
    truth = np.array(first_errors)
    lowest = [np.minimum.accumulate(v) for v in values]
    # below[i, k]: the first step of row i under threshold k, or -1
    below = np.array([[int(np.searchsorted(-low, -t, side="right")) for t in thresholds] for low in lowest])
    below[below == np.array([len(v) for v in values])[:, None]] = -1
    hit = below == truth[:, None]

    def f1(hit, truth):  # (rows,) or (rows, thresholds)
        wrong, right = (hit[truth >= 0].mean(0), hit[truth < 0].mean(0))
        return 2 * wrong * right / np.maximum(wrong + right, 1e-9)

    half = np.arange(len(truth)) % 2 == 0
    if any(not (truth[h] >= 0).any() or not (truth[h] < 0).any() for h in (half, ~half)):
        return math.nan  # needs right and wrong solutions in both halves
    chosen = np.where(half, f1(hit[~half], truth[~half]).argmax(), f1(hit[half], truth[half]).argmax())
    return float(f1(hit[np.arange(len(truth)), chosen], truth))


def evaluate(cfg, values, examples):
    """values: one list of step values per example -> dict of the measures that the examples have what it takes for."""
    S = max(len(v) for v in values)
    padded = torch.tensor([v + [0.0] * (S - len(v)) for v in values])
    labels = [(e["labels"] or [0.0] * len(v)) + [0.0] * (S - len(v)) for e, v in zip(examples, values)]
    batch = {"step_mask": torch.tensor([[True] * len(v) + [False] * (S - len(v)) for v in values]),
             "labels": torch.tensor(labels)}
    rewards, gamma = rewards_and_gamma(cfg, batch, all(e["labels"] is not None for e in examples))
    measures = smoothness(padded, rewards, batch["step_mask"], gamma)
    known = [(v, e["correct"]) for v, e in zip(values, examples) if e["correct"] is not None and len(v) > 1]
    if known:
        right = [correct for _, correct in known]
        measures["auroc_last"] = auroc([v[-1] for v, _ in known], right)
        measures["auroc_second_last"] = auroc([v[-2] for v, _ in known], right)
        measures["auroc_middle"] = auroc([v[(len(v) - 1) // 2] for v, _ in known], right)
        states = [(value, correct) for v, correct in known for value in v]
        measures["calibration_error"] = calibration_error(*zip(*states))
    errors = [(v, e["first_error"]) for v, e in zip(values, examples) if e.get("first_error") is not None]
    if errors:
        measures["first_error_f1"] = first_error_f1(*zip(*errors))
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


MEASURES = {"abs_delta_v": "mean |V_t+1 - V_t|", "lipschitz": "largest |V_t+1 - V_t| of a solution",
            "td_error_mean": "TD error, mean", "td_error_std": "TD error, standard deviation",
            "auroc_last": "AUROC of the outcome, last state",
            "auroc_second_last": "AUROC of the outcome, second-last state",
            "auroc_middle": "AUROC of the outcome, middle state",
            "calibration_error": "calibration error of V as P(right)",
            "first_error_f1": "first-error F1 (ProcessBench)"}


def print_table(cfg, summary):
    print(f"\n{cfg.method} on {summary['trajectories']} held-out solutions")
    for key, title in MEASURES.items():
        if summary.get(key) is not None:
            print(f"  {title:<42} {summary[key]:.3f}")


def choose_three(examples):
    """A right solution, one going wrong early and one going wrong late, where there are such -> [(title, index)]."""
    def error_at(e):  # in 0..1 of the solution
        t = e.get("first_error")
        if t is None and e["labels"] is not None:
            t = next((t for t, label in enumerate(e["labels"]) if label < 0.5), None)
        return None if t is None or t < 0 else t / len(e["step_ends"])
    tests = [("right", lambda e: e["correct"] and error_at(e) is None),
             ("goes wrong early", lambda e: e["correct"] is False and error_at(e) is not None and error_at(e) < 0.34),
             ("goes wrong late", lambda e: e["correct"] is False and error_at(e) is not None and error_at(e) >= 0.5)]
    if all(error_at(e) is None for e in examples):
        tests[1:] = [("wrong", lambda e: e["correct"] is False)]
    long = sorted(range(len(examples)), key=lambda i: -min(6, len(examples[i]["step_ends"])))  # a few steps to see
    found = [(title, next((i for i in long if test(examples[i])), None)) for title, test in tests]
    return [(title, i) for title, i in found if i is not None]


def print_solution(title, example, values):
    question = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
    print(f"\n{title}: {' '.join(question.split())[:100]}")
    for t, (step, value) in enumerate(zip(example["completions"], values)):
        wrong = "  <- first wrong step" if t == example.get("first_error") else ""
        print(f"  {'█' * round(20 * value):<20} {value:.2f}  {' '.join(step.split())[:70]}{wrong}")


def plot(cfg, solutions):
    """The loss curve and the values along `solutions` [(title, example, values)], to plot.png."""
    try:
        import matplotlib
    except ImportError:
        print("--plot: matplotlib is not installed; no plot.png", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(os.path.join(cfg.out, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    left.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.8)
    left.set(xlabel="step", ylabel="loss", title=cfg.method)
    for title, _, values in solutions:
        right.plot(range(1, len(values) + 1), values, marker="o", label=title)
    right.set(xlabel="step of the solution", ylabel="V", ylim=(0, 1), title="values along held-out solutions")
    right.legend()
    fig.tight_layout()
    fig.savefig(os.path.join(cfg.out, "plot.png"), dpi=120)


def score_file(cfg, env):
    """`--score FILE`: every trajectory's step values, one JSON line a row in the file's order, to standard output."""
    rows = data.read_trajectories(cfg.score)
    rows = itertools.chain([next(rows)], rows)  # a mistake in the file shows before the model is loaded
    model_name = cfg.model or os.path.join("runs", cfg.method, "model")
    tokenizer = data.load_tokenizer(model_name)
    model = load_reward_model(model_name, sft.torch_dtype(cfg, env), new_head=False).to(env.device)
    while chunk := list(itertools.islice(rows, 64 * env.world)):
        fit = []
        for row in chunk:
            with contextlib.suppress(BadInput):  # too long: a row of its own without values
                fit.append((row, data.encode_rows([row], tokenizer, cfg.max_length)[0][0]))
        values = iter(score_rows(model, [e for _, e in fit], tokenizer.pad_token_id, env))
        scored = {id(row): next(values) for row, _ in fit}
        for row in chunk if env.rank == 0 else []:
            print(json.dumps({"source": row["source"], "correct": row["correct"],
                              "values": [round(v, 6) for v in scored[id(row)]] if id(row) in scored else None}))


def builtin_reward_model(level, env, method="tdrm"):
    """The built-in reward model's folder, trained first where it is not there yet."""
    out = os.path.join("runs", method + level.removeprefix("builtin"))
    if not os.path.isdir(os.path.join(out, "model")):
        env.print(f"there is no {out}/model yet: training the built-in reward model first")
        if main(Config(method=method, data=(level,), out=out, resume=True), env) is None:
            raise SystemExit(0)  # stopped by a signal
    return os.path.join(out, "model")


if __name__ == "__main__":
    sft.launch(main, Config)
