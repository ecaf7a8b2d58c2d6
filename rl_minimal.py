"""RLVR with a process reward model blended in (TDRM's Algorithm 1): GRPO on verifiable rewards.

A verifier says whether the final answer is right, nothing about the way there. The reward model adds what it thinks of
the state just before the answer; for G responses tau_1..tau_G to one question

    R_i = alpha * verifiable_i + (1 - alpha) * V(s_T-1 of tau_i)            blended_rewards
    A_i = (R_i - mean_j R_j) / std_j R_j                                    group_advantages (grpo; or rloo, ...)
    loss = - sum_{i,t} min(rho A_i, clip(rho, 1 - e, 1 + e) A_i) / (response tokens of the global batch)   policy_loss
    rho = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)

T is the step that holds the answer: V(s_T) would only repeat what the verifier knows. pi_old are the log-probs the
sampler itself reported (fp32, same temperature, no top-k or top-p), so `max_ratio_deviation`, logged from the first pass,
is a check that the sampled policy is the trained one. `--alpha 1` is rule-only and loads no reward model, `--alpha 0` is
the reward model alone.

`--prm_lr` above 0 keeps the reward model on-policy: after scoring, the same rollouts train it on their outcomes
(tdrm_minimal.py's targets without step labels), so that it does not go stale as the policy moves. This is ours, not the
paper's. Its AUROC of the outcome is logged on the fresh rollouts, before and after.

Every process learns all rollouts of a step, so filters, baselines and counts are computed on the global batch, by every
process alike, and rows are then dealt out by length. A group is never split.
Left out: asynchronous sampling (a vLLM beside the trainer), entropy bonus, partial rollouts.

    python rl_minimal.py                                         # built-in policy and TDRM: pass@1 0.45 -> 0.95+ in a minute
    python rl_minimal.py --alpha 1                               # rule-only
    python rl_minimal.py --prm_lr 3e-4 --data builtin-hard       # the reward model learns with it
    torchrun --nproc_per_node=8 rl_minimal.py --model Qwen/Qwen2.5-Math-7B --prm PRM --data math_level3.jsonl --alpha 0.8 \\
        --prompts_per_step 128 --group_size 7 --lr 1e-6 --max_new_tokens 2048 --max_length 2560 \\
        --micro_batch_size 2 --grad_checkpoint

Files in --out: as in sft_minimal.py; rows of metrics.jsonl also hold clock times (seconds_*). prm/ with --prm_lr.
"""
import dataclasses
import itertools
import math
import os
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from data import BadInput
from plumbing import merge, peak_mib
from scorers import load_scorer
from sft_minimal import opt


@dataclass(frozen=True)
class RLConfig(sft.TrainConfig):
    """What every chapter that trains a policy on its own samples has in common."""
    data: tuple = opt(("builtin",), "builtin, builtin-hard, or files of problems")
    eval: tuple = opt((), "files of problems to evaluate on; empty: questions held out of --data")
    problems: int = opt(0, "training questions to use; 0: all of the files', 2000 of the built-in task", low=0)
    steps: int = opt(200, "steps: one round of sampling, scoring and updating each", low=1)
    prompts_per_step: int = opt(32, "questions in a step, over all processes", low=1)
    group_size: int = opt(8, "responses to each question", low=1)
    batch_size: int = opt(0, "responses in one optimizer step, over all processes; 0: all of a step's", low=0)
    inner_epochs: int = opt(1, "passes over a step's responses", low=1)
    estimator: str = opt("grpo", "of the advantages", choices=("grpo", "dr_grpo", "rloo", "reinforce"))
    clip_eps: tuple = opt((0.2, 0.2), "how far the ratio may fall below 1 and rise above it before it is clipped", low=0.0)
    kl_coef: float = opt(0.0, "weight of the KL divergence from the initial policy; 0: it is not loaded", low=0)
    mask_truncated: bool = opt(False, "leave responses cut at --max_new_tokens out of the loss")
    temperature: float = opt(1.0, "of the policy, sampled and scored", low=0.01)
    max_new_tokens: int = opt(128, "longest response", low=1)
    rows_at_once: int = opt(2048, "rows in one decoding batch of one process (memory only, same result)", low=1)
    lr: float = opt(4e-4, "peak learning rate (for a 7B model: 1e-6)", low=0)
    decay: bool = opt(True, "the learning rate falls to 0 by a cosine; --no-decay: constant, so that a curve over the "
                            "questions seen does not hang on how many were to come")
    save_every: int = opt(50, "steps between checkpoints; 0: none before the end", low=0)
    eval_every: int = opt(50, "steps between evaluations; 0: only at the start and the end", low=0)
    eval_problems: int = opt(500, "held-out questions in the evaluation", low=1)
    show_every: int = opt(50, "steps between samples on the screen; 0: none", low=0)


@dataclass(frozen=True)
class Config(RLConfig):
    prm: str = opt("", "process reward model; empty: the built-in TDRM")
    alpha: float = opt(0.8, "share of the verifiable reward; the rest is the process reward model's", low=0, high=1)
    prm_score: str = opt("probability", "what of V enters the reward (the released code: logit)", choices=("probability", "logit"))
    prm_lr: float = opt(0.0, "learning rate of the reward model on the rollouts; 0: it stays as it is", low=0)


# --------------------------------------------------------------------------------------------------
# The maths. (N, T) = responses by tokens; the N = P * G responses of a group stand together.

def blended_rewards(verifiable, prm, alpha):
    """alpha * verifiable + (1 - alpha) * prm, both (N,)."""
    return alpha * verifiable + (1 - alpha) * prm


def group_advantages(rewards, group_size, estimator="grpo"):
    """Rewards (N,), groups of `group_size` standing together -> advantages (N,).

    grpo (R - mean) / std, 0 where a group has no spread; dr_grpo (arXiv 2503.20783) R - mean; rloo R - mean of the
    others; reinforce R. ValueError where rewards do not make whole groups, or a group of one is its own baseline.
    """
    if rewards.numel() % group_size or (group_size == 1 and estimator != "reinforce"):
        raise ValueError(f"{rewards.numel()} rewards in groups of {group_size}: {estimator} wants whole groups, of 2 or more")
    groups = rewards.reshape(-1, group_size).double()  # in single precision, equal rewards would get a spread by rounding
    centred = groups - groups.mean(1, keepdim=True)
    if estimator == "grpo":
        centred = centred / (groups.std(1, keepdim=True) + 1e-6)
    elif estimator == "rloo":
        centred = centred * group_size / (group_size - 1)
    elif estimator == "reinforce":
        centred = groups
    return centred.reshape(rewards.shape).float()


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, count=None):
    """PPO's clipped surrogate, negated: sum over the masked tokens / `count` (default: their number).

    logprobs, old_logprobs, mask (N, T); advantages (N, T), or (N,), one for all tokens of a response. `clip_eps`: one
    number, or (below, above). With micro-batches or processes, `count` is the global batch's.
    """
    below, above = clip_eps if isinstance(clip_eps, (tuple, list)) else (clip_eps, clip_eps)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - below, 1 + above) * advantages)
    return -torch.where(mask.bool(), surrogate * mask, 0.0).sum() / (mask.sum().clamp(min=1) if count is None else count)


def kl_divergence(logprobs, other_logprobs):
    """KL(pi || other) at tokens sampled from pi, estimator k3 of http://joschu.net/blog/kl-approx.html, never negative."""
    logratio = other_logprobs - logprobs
    return logratio.exp() - 1 - logratio


# --------------------------------------------------------------------------------------------------
# Rollouts: what the policy answers to questions, verified.

def rollout(model, tokenizer, problems, keys, cfg, env):
    """`group_size` responses to each problem -> rows, groups together, in the problems' order, known to all processes.

    A row has input_ids, prompt_length, old_logprobs (a response token each), text, completions (its steps), finished,
    verifiable (1.0 or 0.0) and failed (the verifier raised: counts as wrong). `keys` are the problems' noise.
    """
    mine = range(len(problems))[env.rank::env.world]
    samples = search.sample(model, tokenizer, [problems[i]["question"] for i in mine], cfg.group_size, cfg.temperature,
                            cfg.max_new_tokens, cfg.seed, [keys[i] for i in mine], rows_at_once=cfg.rows_at_once)
    model.train()  # sampling left it in eval mode, in which there is no gradient checkpointing
    groups = merge({i: [verified(problems[i], s) for s in group] for i, group in zip(mine, samples)}, env)
    return [row for i in range(len(problems)) for row in groups[i]]


def verified(problem, s):
    try:
        right, failed = data.verify(s.text, problem["answer"]), False
    except Exception:
        right, failed = False, True
    return {"prompt": problem["question"], "text": s.text, "completions": data.split_steps(s.text) or [""], "correct": right,
            "input_ids": s.prompt_ids + s.token_ids, "prompt_length": len(s.prompt_ids), "step_ends": [],
            "old_logprobs": np.array(s.logprobs, dtype=np.float32), "finished": s.finished, "verifiable": float(right),
            "failed": failed}


def state_before_answer(steps):
    """Index of s_T-1, the state before the step that holds the answer; a response that begins with it has only that one."""
    answer = next((t for t, step in enumerate(steps) if "\\boxed" in step or "####" in step), len(steps) - 1)
    return max(0, answer - 1)


def encode_for(tokenizer, rows):
    """Rollouts as the reward model reads them, in its own tokenizer's ids -> examples for tdrm.score_rows."""
    examples = []
    for row in rows:
        input_ids, prompt_length, step_ends = data.encode_trajectory(tokenizer, row["prompt"], row["completions"])
        examples.append({"input_ids": input_ids, "prompt_length": prompt_length, "step_ends": step_ends,
                         "correct": row["correct"]})
    return examples


def distinct(rows):
    """Rows with the same tokens and the same targets go through a model once -> the different ones, each with its number
    as "copies". (A question may come twice in a step; then equal responses stand in two groups, with two advantages.)"""
    what = lambda row: (tuple(row["input_ids"]), row.get("correct"),  # noqa: E731
                        *(row[name].tobytes() for name in ("advantages", "returns") if name in row))
    copies = Counter(map(what, rows))
    return [row | {"copies": copies[key]} for key, row in {what(row): row for row in rows}.items()]


def for_each(rows, different, results):
    """The `results` of the different rows, handed back to all rows."""
    known = {tuple(row["input_ids"]): result for row, result in zip(different, results)}
    return [known[tuple(row["input_ids"])] for row in rows]


def value_rollouts(prm, examples, pad_id, env):
    """Step values of each rollout."""
    different = distinct(examples)
    return for_each(examples, different, tdrm.score_rows(prm, different, pad_id, env))


def train_reward_model(wrapped, prm, optimizer, examples, pad_id, cfg, env):
    """One step on the rollouts' outcomes: tdrm_minimal.py's loss without step labels."""
    states, defaults = sum(len(e["step_ends"]) for e in examples), tdrm.Config()

    def loss_fn(micro):
        tensors = {k: v.to(env.device) for k, v in data.collate(micro, pad_id).items()}
        logits = tdrm.step_values(wrapped, tensors["input_ids"], None, tensors["step_ends"])
        targets, weights = tdrm.targets_and_weights(defaults, logits, tensors, labelled=False)
        weights = weights * torch.tensor([[e["copies"]] for e in micro], device=env.device)
        return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights).sum() / states

    mine = sft.local_rows(distinct(examples), env) or [examples[0] | {"copies": 0}]
    sft.accumulate_gradients(wrapped, mine, cfg.micro_batch_size, loss_fn, env)
    return sft.optimizer_step(prm, optimizer, cfg.prm_lr, cfg.grad_clip)


# --------------------------------------------------------------------------------------------------
# The update.

def to_tensors(rows, pad_id, device):
    """data.collate, with the rows' numbers per response token as tensors (N, T-1), 0 outside response_mask."""
    tensors = data.collate(rows, pad_id)
    mask = tensors["response_mask"]
    for name in ("old_logprobs", "ref_logprobs", "advantages"):
        if name in rows[0]:
            numbers = torch.from_numpy(np.concatenate([row[name] for row in rows])).float()
            tensors[name] = torch.zeros(mask.shape).masked_scatter(mask, numbers)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@torch.no_grad()
def score_logprobs(model, rows, cfg, env, pad_id, rows_at_once=64):
    """log pi of every response token under `model`: an array per row. Split over the processes, known to all."""
    different, mine, size = distinct(rows), {}, cfg.micro_batch_size or rows_at_once
    order = sorted(range(len(different)), key=lambda i: len(different[i]["input_ids"]))[env.rank::env.world]
    for part in (order[i:i + size] for i in range(0, len(order), size)):
        tensors = to_tensors([different[i] for i in part], pad_id, env.device)
        logprobs, _ = sft.token_logprobs(model, tensors["input_ids"], tensors["response_mask"], cfg.temperature)
        mine.update({i: row[m].cpu().numpy() for i, row, m in zip(part, logprobs, tensors["response_mask"])})
    scored = merge(mine, env)
    return for_each(rows, different, [scored[i] for i in range(len(different))])


def update_policy(policy, model, optimizer, rows, lr, cfg, env, pad_id):
    """The clipped policy gradient over a step's rollouts -> metrics. `rows` need "old_logprobs" and "advantages", an
    array each with one number per response token, and "ref_logprobs" where there is a KL term."""
    size, totals, deviation, norms = cfg.batch_size or len(rows), np.zeros(4), 0.0, []
    for epoch, begin in itertools.product(range(cfg.inner_epochs), range(0, len(rows), size)):
        batch = rows[begin:begin + size]
        tokens = sum(len(row["old_logprobs"]) for row in batch)  # of the global batch
        count = len(batch) * cfg.max_new_tokens if cfg.estimator == "dr_grpo" else tokens
        batch = distinct(batch)
        mine = sft.local_rows(batch, env) or [batch[0] | {"copies": 0}]  # without a row: the others would wait for it
        sums, largest = torch.zeros(3), [0.0]

        def loss_fn(micro):
            b = to_tensors(micro, pad_id, env.device)
            mask, old_logprobs = b["response_mask"], b["old_logprobs"]
            weight = mask * torch.tensor([[row["copies"]] for row in micro], device=env.device)
            logprobs, entropy = policy(b["input_ids"], mask, cfg.temperature)
            loss = policy_loss(logprobs, old_logprobs, b["advantages"], weight, cfg.clip_eps, count)
            if "ref_logprobs" in b:
                loss = loss + cfg.kl_coef * (kl_divergence(logprobs, b["ref_logprobs"]) * weight).sum() / count
            ratio = (logprobs.detach() - old_logprobs).exp()  # 1 outside the mask
            clipped = torch.where(b["advantages"] > 0, ratio > 1 + cfg.clip_eps[1], ratio < 1 - cfg.clip_eps[0])
            kl = kl_divergence(old_logprobs, logprobs.detach())
            sums.add_(torch.stack([(x * weight).sum() for x in (clipped, kl, entropy)]).cpu())
            largest.append((ratio - 1).abs().max().item())
            return loss

        sft.accumulate_gradients(policy, mine, cfg.micro_batch_size, loss_fn, env)
        norms.append(sft.optimizer_step(model, optimizer, lr, cfg.grad_clip))
        totals += [*sft.all_sum(*sums.tolist(), env=env), tokens]
        if epoch == begin == 0:  # the policy is still the one that sampled
            deviation = max(merge({env.rank: max(largest)}, env).values())
    clipped, kl, entropy, tokens = totals.tolist()
    return {"grad_norm": norms[-1], "skipped": sum(not math.isfinite(norm) for norm in norms), "entropy": entropy / tokens,
            "clip_fraction": clipped / tokens, "approx_kl": kl / tokens, "max_ratio_deviation": deviation}


def policy_step(policy, model, optimizer, rows, ref, step, cfg, env, pad_id):
    """update_policy on the rows that count, against the initial policy `ref` where there is a KL term -> metrics."""
    rows = [row for row in rows if row["finished"] or not cfg.mask_truncated]
    if not rows:
        return {}
    for row in rows:
        row.pop("ref_logprobs", None)  # PRIME's reward model has a reference, too
    if ref:
        for row, logprobs in zip(rows, score_logprobs(ref, rows, cfg, env, pad_id)):
            row["ref_logprobs"] = logprobs
    return update_policy(policy, model, optimizer, rows, rate(cfg, step), cfg, env, pad_id)


def rollout_metrics(rows, rewards, group_size):
    """Means over a step's rollouts, before any of them is left out. A group whose rewards are all equal teaches nothing."""
    groups = rewards.reshape(-1, group_size)
    mean = lambda numbers: float(np.mean(list(numbers)))  # noqa: E731
    return {"reward": rewards.mean().item(), "verifiable": mean(row["verifiable"] for row in rows),
            "no_signal": (groups.amax(1) - groups.amin(1) < 1e-6).float().mean().item(),
            "response_length": mean(len(row["old_logprobs"]) for row in rows),
            "truncated": mean(not row["finished"] for row in rows), "verifier_failed": mean(row["failed"] for row in rows)}


def rate(cfg, step):
    """The learning rate of a step, from 0: warmup, then a cosine or constant."""
    if cfg.decay:
        return sft.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
    return cfg.lr * min(1.0, (step + 1) / max(1, round(cfg.warmup * cfg.steps)))


# --------------------------------------------------------------------------------------------------
# Algorithm 1.

def main(cfg, env):
    """Train a policy -> summary (also in summary.json)."""
    # 1) The policy, its questions, the reward model.
    start_time, level = time.time(), data.builtin_level(cfg.data)
    out = cfg.out or os.path.join("runs", "rl" + (level or "").removeprefix("builtin"))
    cfg = check(dataclasses.replace(cfg, out=out), level, env)
    checkpoint = sft.last_checkpoint(cfg)
    model, tokenizer, policy, ref = load_policy(cfg, env, checkpoint)
    problems, held_out = load_problems(cfg, level, model, tokenizer, env)
    optimizer, pad_id, others, prm = sft.make_optimizer(model, cfg, env), tokenizer.pad_token_id, {}, None
    if cfg.alpha < 1 or cfg.prm_lr:
        prm_name = cfg.prm or tdrm.builtin_reward_model(level or "builtin", env)
        prm_tokenizer = data.load_tokenizer(prm_name)
        from_run = checkpoint and os.path.join(checkpoint, "prm")
        try:
            prm = load_scorer(from_run if from_run and cfg.prm_lr else prm_name, sft.torch_dtype(cfg, env),
                              tdrm.load_reward_model)
        except BadInput as error:
            raise BadInput(str(error).replace("--model", "--prm", 1)) from None
        if cfg.prm_lr and prm.reduce != "last":
            raise BadInput(f"--prm_lr: {prm_name} is no model of step values; wanted: a TDRM or another token classifier")
        prm.to(env.device).eval()
        if cfg.prm_lr:
            prm, wrapped_prm = sft.prepare(prm, cfg, env)
            others["prm"] = (prm, prm_tokenizer, sft.make_optimizer(prm, cfg, env))
    start = load_state(checkpoint, env, model, optimizer, others)

    sft.open_run(cfg, env)
    log, stopping = sft.Log(cfg, env, start, cfg.steps), sft.catch_signals()
    skipped = log.last.get("skipped", 0)
    if not start:
        log.row(0, **evaluate(model, tokenizer, held_out, cfg, env))
    order = data.batches([0] * len(problems), cfg.prompts_per_step, cfg.seed, start)
    for step in range(start, cfg.steps):
        # 2) G responses to each of P questions, verified.
        clock = [time.time()]
        batch = [problems[i] for i in next(order)]
        keys = range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)  # noise: a function of the step
        rows = rollout(model, tokenizer, batch, keys, cfg, env)
        clock.append(time.time())

        # 3) The state before the answer, valued; blended rewards; advantages.
        verifiable, metrics = torch.tensor([row["verifiable"] for row in rows]), {}
        rewards = verifiable
        if prm:
            examples = encode_for(prm_tokenizer, rows)
            values = value_rollouts(prm, examples, prm_tokenizer.pad_token_id, env)
            before_answer = [state_before_answer(row["completions"]) for row in rows]
            process = torch.tensor([v[t] for v, t in zip(values, before_answer)])
            scores = process if cfg.prm_score == "probability" else torch.logit(process, eps=1e-6)
            rewards = blended_rewards(verifiable, scores, cfg.alpha)
            metrics |= {"prm": scores.mean().item(), "prm_auroc": tdrm.auroc(process, verifiable)}
        advantages = group_advantages(rewards, cfg.group_size, cfg.estimator)
        for row, advantage in zip(rows, advantages.tolist()):
            row["advantages"] = np.full(len(row["old_logprobs"]), advantage, dtype=np.float32)
        metrics |= rollout_metrics(rows, rewards, cfg.group_size)
        clock.append(time.time())

        # 4) The policy's update; then the reward model's, on the same rollouts.
        metrics |= policy_step(policy, model, optimizer, rows, ref, step, cfg, env, pad_id)
        if cfg.prm_lr:
            norm = train_reward_model(wrapped_prm, prm, others["prm"][2], examples, prm_tokenizer.pad_token_id, cfg, env)
            metrics["skipped"] = metrics.get("skipped", 0) + (not math.isfinite(norm))
            after = value_rollouts(prm, examples, prm_tokenizer.pad_token_id, env)
            metrics["prm_auroc_after"] = tdrm.auroc([v[t] for v, t in zip(after, before_answer)], verifiable)
        clock.append(time.time())

        # 5) Log, evaluate, save.
        skipped += metrics.pop("skipped", 0)
        metrics |= {"skipped": skipped, "questions": (step + 1) * cfg.prompts_per_step}
        if end_of_step(cfg, env, log, step, metrics, clock, model, tokenizer, held_out, optimizer, others, stopping):
            return None
        if cfg.show_every and (step + 1) % cfg.show_every == 0:
            show(env, f"step {step + 1}, {'right' if rows[0]['correct'] else 'wrong'}, reward {rewards[0]:.2f}", rows[0],
                 values[0] if prm else None)
    log.close()
    return finish(cfg, env, model, tokenizer, held_out, start_time, skipped, **others)


def end_of_step(cfg, env, log, step, metrics, clock, model, tokenizer, held_out, optimizer, others, stopping):
    """Evaluate, log and save where it is time to -> whether to stop here."""
    done = step + 1
    metrics |= {"lr": rate(cfg, step), "peak_mib": peak_mib(env)}
    metrics |= {f"seconds_{what}": b - a for what, a, b in zip(("sampling", "scoring", "update"), clock, clock[1:])}
    if cfg.eval_every and done % cfg.eval_every == 0 and done < cfg.steps:
        metrics |= evaluate(model, tokenizer, held_out, cfg, env)
    log.row(done, **metrics)
    log.advance(verifiable=metrics["verifiable"], reward=metrics["reward"], length=metrics["response_length"])
    stop, = sft.all_sum(bool(stopping), env=env)
    if stop or done == cfg.steps or (cfg.save_every and done % cfg.save_every == 0):
        sft.save_checkpoint(cfg, env, done, model, tokenizer, optimizer, **others)
    if stop:
        log.close()
        env.print(f"stopped after step {done} of {cfg.steps}; --resume continues")
    return stop


def finish(cfg, env, model, tokenizer, held_out, start_time, skipped, **others):
    """The last evaluation; the policy in model/, what else was trained in folders of its own -> summary."""
    summary = evaluate(model, tokenizer, held_out, cfg, env)
    summary |= {"questions": len(held_out), "steps": cfg.steps, "skipped": skipped}
    if env.rank == 0:
        sft.save_model(os.path.join(cfg.out, "model"), model, tokenizer)
        for name, (other, other_tokenizer, _) in others.items():
            sft.save_model(os.path.join(cfg.out, name), other, other_tokenizer)
        sft.write_json(os.path.join(cfg.out, "summary.json"), summary)
    sft.barrier(env)
    env.print(f"pass@1 {summary['pass@1']:.3f}, greedy {summary['greedy']:.3f} on {len(held_out)} held-out questions; "
              f"{time.time() - start_time:.0f} s; the policy is in {os.path.join(cfg.out, 'model')}")
    return summary


# --------------------------------------------------------------------------------------------------
# What goes before and beside the loop.

def check(cfg, level, env):
    """Options that only make sense together -> cfg with the policy and the batch size filled in. Raises BadInput."""
    if not level and not cfg.model:
        raise BadInput("--data: your own problems need --model, the policy to start from")
    if cfg.group_size == 1 and cfg.estimator != "reinforce":
        raise BadInput(f"--group_size 1: --estimator {cfg.estimator} compares responses to one question; wanted: 2 or more")
    rows = cfg.prompts_per_step * cfg.group_size
    if cfg.batch_size > rows:
        raise BadInput(f"--batch_size {cfg.batch_size}: a step has only {cfg.prompts_per_step} x {cfg.group_size} responses")
    return dataclasses.replace(cfg, batch_size=cfg.batch_size or rows, model=cfg.model or sft.builtin_policy(level, env))


def load_policy(cfg, env, checkpoint):
    """-> model, tokenizer, the policy to train (in DDP), the initial policy (None without a KL term)."""
    tokenizer = data.load_tokenizer(checkpoint or cfg.model)
    model, policy = sft.prepare(load_causal_lm(checkpoint or cfg.model, cfg, env), cfg, env, sft.Policy)
    return model, tokenizer, policy, load_causal_lm(cfg.model, cfg, env).to(env.device).eval() if cfg.kl_coef else None


def load_causal_lm(name, cfg, env):
    from transformers import AutoModelForCausalLM
    return data.load_model(AutoModelForCausalLM, name, dtype=sft.torch_dtype(cfg, env))


def load_state(checkpoint, env, model, optimizer, others):
    """All optimizers' states from a checkpoint -> steps done; 0 without one."""
    if not checkpoint:
        return 0
    return sft.load_checkpoint(checkpoint, env, model, optimizer, **{k: (m, o) for k, (m, _, o) in others.items()})


def load_problems(cfg, level, model, tokenizer, env):
    """-> training and held-out problems. A question that leaves no room for a response is left out and counted."""
    if level:
        problems = data.make_problems(cfg.problems or 2000, "train", cfg.seed, level)
        held_out = data.make_problems(cfg.eval_problems, "test", 0, level)
    else:
        problems = list(data.read_problems(cfg.data))
        problems, held_out = (problems, list(data.read_problems(cfg.eval))) if cfg.eval else data.hold_out(problems)
        problems = problems[:cfg.problems or None]
    room = min(cfg.max_length, search.longest_context(model.config)) - cfg.max_new_tokens
    ids = [data.encode_prompt(tokenizer, p["question"]) for p in problems]
    kept = [p for p, i in zip(problems, ids) if p["question"].strip() and len(i) <= room]
    held_out = [p for p in held_out[:cfg.eval_problems] if len(data.encode_prompt(tokenizer, p["question"])) <= room]
    if not kept or not held_out:
        raise BadInput(f"--max_new_tokens {cfg.max_new_tokens}: no question leaves room for it within {room + cfg.max_new_tokens} "
                       "tokens (--max_length, or the model's own limit)")
    data.check_ids(model, [{"input_ids": i} for i in ids], cfg.model)
    env.print(f"{len(kept)} questions ({len(problems) - len(kept)} blank or too long), {cfg.steps} steps of {cfg.prompts_per_step} x "
              f"{cfg.group_size}, {env.world} processes on {env.device.type}")
    return kept, held_out


def evaluate(model, tokenizer, problems, cfg, env):
    """Share of held-out questions answered right: by one sample, and by greedy decoding. Split over the processes."""
    mine, right = range(len(problems))[env.rank::env.world], []
    for temperature in (cfg.temperature, 0.0):
        samples = search.sample(model, tokenizer, [problems[i]["question"] for i in mine], 1, temperature, cfg.max_new_tokens,
                                cfg.seed, keys=[10**9 + i for i in mine], rows_at_once=cfg.rows_at_once)
        right.append(sum(verified(problems[i], s)["correct"] for i, (s,) in zip(mine, samples)))
    model.train()
    sampled, greedy = sft.all_sum(*right, env=env)
    return {"pass@1": sampled / len(problems), "greedy": greedy / len(problems)}


def show(env, title, row, values):
    """Print a response, with its step values where there are any."""
    if env.rank == 0:
        tdrm.print_solution(title + ":", row, values or [0.0] * len(row["completions"]))


if __name__ == "__main__":
    sft.launch(main, Config)
