"""PRIME: process rewards for free, from a reward model that learns from outcomes while the policy does (arXiv 2502.01456).

Train a language model pi_phi (the implicit PRM) to tell right responses from wrong ones by the sum of its log-ratios to
a reference; then the log-ratio of each token is a reward for that token, though no step was ever labelled:

    q_t = log pi_phi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)                  r_t = beta q_t        implicit_rewards
    loss of the PRM = mean over responses of BCE(sigmoid(sum_t r_t), outcome)                          train_implicit_prm

Both streams, process and outcome, become advantages, by leave-one-out baselines over the K responses to a question
(rbar_j: mean token reward of response j; o: outcome), whitened over all response tokens of the global batch:

    A_i,t = sum_{s >= t} [ r_i,s - mean_{j != i} rbar_j ]  +  o_i - mean_{j != i} o_j                  prime_advantages

Before that, r is divided by the largest |sum_{s >= t} r_s| of the batch, so beta matters in the PRM's loss only; below
`floor` there is no signal but rounding, which dividing would blow up, and r is set to 0. One step of the loop: sample,
verify, keep questions with 20 to 80% right answers, score and update the PRM, update the policy (rl_minimal.py's loss).

`--update after` (single forward) uses the rewards of the forward that is also trained on; `before` scores again with the
updated PRM; `none` keeps it frozen. `--reference policy` takes the sampler's own log-probs for pi_ref: no third model, and
a reward that shrinks as the policy comes to agree with the PRM, so that it is harder to game (README, Results).
The published code differs from the paper's equation by a factor K/(K-1) on deviations inside a response
(`--estimator rloo_code`), and loses the process reward of the last token in one of its versions; we keep it.
Left out: the dedicated EurusPRM's training recipe (start from any folder with --prm), code execution as a verifier.

    python prime_minimal.py                                              # built-in policy, outcomes only
    python prime_minimal.py --estimator grpo --update before
    python prime_minimal.py --process_weight 0                           # outcomes only at equal compute
    python search_minimal.py --prm runs/prime/prm                        # the implicit PRM as a reward model
    torchrun --nproc_per_node=8 prime_minimal.py --model PRIME-RL/Eurus-2-7B-SFT --data math.jsonl --lr 5e-7 --prm_lr 1e-6 \\
        --prompts_per_step 256 --group_size 4 --batch_size 256 --max_length 4096 --max_new_tokens 3072 \\
        --micro_batch_size 2 --grad_checkpoint

Files in --out: as in rl_minimal.py; prm/ is the implicit PRM, a causal LM with its reference in prm/reference.
"""
import dataclasses
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
import rl_minimal as rl
import sft_minimal as sft
import tdrm_minimal as tdrm
from data import BadInput
from plumbing import merge
from sft_minimal import opt

ESTIMATORS = ("rloo", "rloo_code", "reinforce", "grpo", "ppo", "value")


@dataclass(frozen=True)
class Config(rl.RLConfig):
    steps: int = opt(300, "steps: one round of sampling, scoring and updating each", low=1)
    prm: str = opt("", "what the implicit PRM starts from; empty: the initial policy; none: outcomes only, no PRM at all")
    reference: str = opt("sft", "pi_ref: the initial policy (or what --prm has in reference/), or the current one",
                         choices=("sft", "policy"))
    update: str = opt("after", "the PRM's step comes after its rewards are read, before, or never",
                      choices=("after", "before", "none"))
    granularity: str = opt("token", "a reward for every token, or their sum on the last", choices=("token", "whole"))
    estimator: str = opt("rloo", "of the advantages; value: the PRM as value model", choices=ESTIMATORS)
    beta: float = opt(0.5, "scale of the log-ratio in the PRM's loss (the paper: 0.05, for responses 50 times as long)", low=0)
    norm: str = opt("batch", "process rewards: divided by the batch's largest return, or as they are",
                    choices=("batch", "none"))
    process_weight: float = opt(1.0, "weight of the process rewards' stream; 0: trained, not used", low=0)
    outcome_weight: float = opt(1.0, "weight of the outcomes' stream", low=0)
    gamma: float = opt(1.0, "discount of both streams", low=0, high=1)
    accuracy: tuple = opt((0.2, 0.8), "share of right answers a question is kept with", low=0.0, high=1.0)
    oversample: int = opt(1, "questions sampled for each one wanted; the first that pass --accuracy are kept", low=1)
    shuffle_process: bool = opt(False, "control: permute the process rewards within each response")
    prm_lr: float = opt(1e-3, "learning rate of the PRM (for a 7B model: 1e-6)", low=0)
    prm_grad_clip: float = opt(10.0, "largest gradient norm of the PRM; 0: no clipping", low=0)
    critic_lr: float = opt(3e-4, "learning rate of the critic, with --estimator ppo", low=0)


# --------------------------------------------------------------------------------------------------
# The maths. (N, T) = responses by response tokens; the K responses of a group stand together.

def implicit_rewards(logprobs, ref_logprobs, mask, beta):
    """Process rewards beta * (log pi_phi - log pi_ref) of every token, the last included: (N, T), 0 outside the mask."""
    return torch.where(mask.bool(), beta * (logprobs - ref_logprobs), 0.0)


def returns(rewards, mask, gamma=1.0):
    """Discounted sums of rewards from each token to the response's end: (N, T)."""
    total, sums = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] * mask[:, t] + gamma * total
        sums[:, t] = total
    return sums * mask


def normalise(process, mask, floor=1e-3):
    """Process rewards over their largest absolute return in the batch; 0 where that is below `floor`, mere rounding."""
    largest = returns(process, mask).abs().max()
    return process / (largest + 1e-6) if largest > floor else torch.zeros_like(process)


def last_token(mask):
    """(N, T), 1 on each row's last token."""
    return mask * (mask.flip(1).cumsum(1).flip(1) == 1)


def whiten(advantages, mask):
    """Mean 0 and (unbiased) variance 1 over the masked tokens."""
    values = advantages[mask.bool()]
    variance = values.var() if len(values) > 1 else torch.zeros(())
    return (advantages - values.mean()) * (variance + 1e-8).rsqrt() * mask


def prime_advantages(process, outcomes, mask, group_size, estimator="rloo", process_weight=1.0, outcome_weight=1.0, gamma=1.0,
                     norm="batch", floor=1e-3):
    """Advantages (N, T) from process rewards (N, T) and outcomes (N,) of the GLOBAL batch; mask (N, T).

    rloo       the paper's Eq. 5 (its baseline is the mean TOKEN reward of the others), whitened
    rloo_code  the released code: deviations inside a response K/(K-1) times as large, whitened
    grpo       both streams (x - group mean) / group std;  reinforce: no baseline
    value      the PRM as value model: A_t = o - (sum of process rewards before t), whitened; never normalised
    ValueError where the rows are not whole groups of two or more.
    """
    N, K = len(outcomes), group_size
    if N % K or (K == 1 and estimator != "reinforce"):
        raise ValueError(f"{N} responses in groups of {K}: wanted whole groups, of 2 or more")
    mask, process = mask.float(), process * mask
    if norm == "batch" and estimator != "value":
        process = normalise(process, mask, floor)
    outcome = outcomes.float()
    mean_reward = process.sum(1) / mask.sum(1).clamp(min=1)  # rbar (N,)
    total = lambda x: x.reshape(-1, K).sum(1).repeat_interleave(K)  # noqa: E731  (N,), over each row's group
    others = lambda x: (total(x) - x) / (K - 1)  # noqa: E731
    std = lambda x: x.reshape(-1, K).std(1).repeat_interleave(K) + 1e-6  # noqa: E731
    if estimator == "rloo":
        process, outcome = process - others(mean_reward)[:, None], outcome - others(outcome)
    elif estimator == "rloo_code":
        process = (K * process - total(mean_reward)[:, None]) / (K - 1)
        outcome = (K * outcome - total(outcome)) / (K - 1)
    elif estimator == "grpo":
        process = (process - (total(mean_reward) / K)[:, None]) / std(mean_reward)[:, None]
        outcome = (outcome - total(outcome) / K) / std(outcome)
    elif estimator == "value":
        process = process - process.cumsum(1)  # minus the sum of those before; process itself comes off again below
    elif estimator != "reinforce":
        raise ValueError(f"estimator {estimator!r}: wanted one of rloo, rloo_code, grpo, reinforce, value")
    streams = (process * mask if estimator == "value" else returns(process, mask, gamma),
               returns(outcome[:, None] * last_token(mask), mask, gamma))
    advantages = process_weight * streams[0] + outcome_weight * streams[1]
    return advantages if estimator in ("grpo", "reinforce") else whiten(advantages, mask)


def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438) over response tokens -> advantages, returns, both (N, T).

    delta_t = r_t + gamma V_t+1 - V_t, V = 0 after the end;  A_t = delta_t + gamma lam A_t+1;  return_t = A_t + V_t.
    """
    values, following = values * mask, F.pad(values * mask, (0, 1))[:, 1:]
    advantages = returns(rewards + gamma * following - values, mask, gamma * lam)
    return advantages, (advantages + values) * mask


def pair_accuracy(scores, outcomes, group_size):
    """Share of (right, wrong) pairs inside groups whose right response scores higher; NaN where there is no pair."""
    scores, right = scores.reshape(-1, group_size), outcomes.reshape(-1, group_size) > 0.5
    pairs = right[:, :, None] & ~right[:, None, :]
    return (scores[:, :, None] > scores[:, None, :])[pairs].float().mean().item()


def accuracy_filter(rows, group_size, accuracy, most):
    """The groups of the first `most` questions whose share of right answers lies within `accuracy`, ends included."""
    groups = [rows[i:i + group_size] for i in range(0, len(rows), group_size)]
    share = lambda group: sum(row["verifiable"] for row in group) / group_size  # noqa: E731
    kept = [group for group in groups if accuracy[0] - 1e-9 <= share(group) <= accuracy[1] + 1e-9]
    return [row for group in kept[:most] for row in group]


# --------------------------------------------------------------------------------------------------
# The implicit PRM and the critic. Rows are rl_minimal's rollouts, known to all processes.

def stack(arrays):
    """Arrays of one number per response token -> (N, T), mask (N, T)."""
    mask = torch.arange(max(map(len, arrays)))[None] < torch.tensor([len(a) for a in arrays])[:, None]
    numbers = torch.from_numpy(np.concatenate(arrays)).float()
    return torch.zeros(mask.shape).masked_scatter(mask, numbers), mask


def train_implicit_prm(wrapped, prm, optimizer, rows, cfg, env, pad_id):
    """One pass of the PRM over rows with "ref_logprobs" -> its log-probs, an array per row, from the forward that was trained
    on; mean loss; gradient norm. With several batches a later one is read after the earlier ones' steps."""
    seen, total, grad_norm, size = {}, 0.0, 0.0, cfg.batch_size or len(rows)
    for begin in range(0, len(rows), size):
        batch = rows[begin:begin + size]

        def loss_fn(micro):
            b = rl.to_tensors(micro, pad_id, env.device)
            mask = b["response_mask"]
            logprobs, _ = wrapped(b["input_ids"], mask, cfg.temperature)
            seen.update({(begin, *r["input_ids"]): lp[m].cpu().numpy() for r, lp, m in zip(micro, logprobs.detach(), mask)})
            scores = implicit_rewards(logprobs, b["ref_logprobs"], mask, cfg.beta).sum(1)
            copies = torch.tensor([float(row["copies"]) for row in micro], device=env.device)
            return (F.binary_cross_entropy_with_logits(scores, b["outcomes"], reduction="none") * copies).sum() / len(batch)

        mine = sft.local_rows(rl.distinct(batch), env) or [batch[0] | {"copies": 0}]
        loss = sft.accumulate_gradients(wrapped, mine, cfg.micro_batch_size, loss_fn, env)
        total += sft.all_sum(loss, env=env)[0] * len(batch) / len(rows)
        grad_norm = sft.optimizer_step(prm, optimizer, cfg.prm_lr, cfg.prm_grad_clip)
    seen = merge(seen, env)
    return [seen[(i // size * size, *row["input_ids"])] for i, row in enumerate(rows)], total, grad_norm


def process_rewards(rows, wrapped, prm, optimizer, ref, cfg, env, pad_id):
    """Implicit process rewards of every response token, by --update, --reference and --granularity; the PRM's step is taken
    on the way -> (N, T), mask (N, T), metrics."""
    score = lambda model: rl.score_logprobs(model, rows, cfg, env, pad_id)  # noqa: E731
    for row, logprobs in zip(rows, score(ref) if ref else [row["old_logprobs"] for row in rows]):
        row["ref_logprobs"] = logprobs
    ref_logprobs, mask = stack([row["ref_logprobs"] for row in rows])
    outcomes, metrics = torch.tensor([row["verifiable"] for row in rows]), {}
    accuracy = lambda logprobs: pair_accuracy(  # noqa: E731
        implicit_rewards(stack(logprobs)[0], ref_logprobs, mask, cfg.beta).sum(1), outcomes, cfg.group_size)
    if cfg.update == "none":
        logprobs = score(prm)
        metrics["pair_accuracy"] = accuracy(logprobs)
    else:
        logprobs, metrics["prm_loss"], metrics["prm_grad_norm"] = train_implicit_prm(wrapped, prm, optimizer, rows, cfg, env, pad_id)
        after = score(prm)
        metrics |= {"pair_accuracy": accuracy(logprobs), "pair_accuracy_after": accuracy(after)}
        logprobs = after if cfg.update == "before" else logprobs
    process = implicit_rewards(stack(logprobs)[0], ref_logprobs, mask, cfg.beta)
    metrics["prm"] = process.sum(1).mean().item()
    if cfg.granularity == "whole":
        process = process.sum(1, keepdim=True) * last_token(mask)
    return process, mask, metrics


def load_critic(checkpoint, cfg, env):
    """A critic from the run's checkpoint, or the initial policy with a new head -> model, the same in DDP, optimizer."""
    name = os.path.join(checkpoint, "critic") if checkpoint else cfg.model
    critic, wrapped = sft.prepare(tdrm.load_reward_model(name, sft.torch_dtype(cfg, env), cfg.seed), cfg, env)
    return critic, wrapped, sft.make_optimizer(critic, cfg, env)


def token_values(critic, rows, pad_id):
    """V(x, y_<t) of every response token: read one token earlier, before y_t is known. (n, T-1) in to_tensors' layout."""
    b = rl.to_tensors(rows, pad_id, next(critic.parameters()).device)
    logits = critic(input_ids=b["input_ids"], use_cache=False).logits[..., 0].float()  # (n, T)
    return logits[:, :-1], b


def critic_values(critic, rows, env, pad_id, rows_at_once=64):
    """The critic's values of every response token: an array per row. Split over the processes, known to all."""
    different, mine = rl.distinct(rows), {}
    order = list(range(len(different)))[env.rank::env.world]
    with torch.no_grad():
        for part in (order[i:i + rows_at_once] for i in range(0, len(order), rows_at_once)):
            values, b = token_values(critic, [different[i] for i in part], pad_id)
            mine.update({i: v[m].cpu().numpy() for i, v, m in zip(part, values, b["response_mask"])})
    values = merge(mine, env)
    return rl.for_each(rows, different, [values[i] for i in range(len(different))])


def train_critic(wrapped, critic, optimizer, rows, cfg, env, pad_id):
    """One step of squared error towards each row's "returns", over the tokens of the global batch -> loss."""
    tokens = sum(len(row["returns"]) for row in rows)

    def loss_fn(micro):
        values, b = token_values(wrapped, micro, pad_id)
        targets, mask = torch.from_numpy(np.concatenate([row["returns"] for row in micro])).float(), b["response_mask"]
        copies = torch.tensor([[float(row["copies"])] for row in micro], device=env.device)
        targets = torch.zeros(mask.shape).masked_scatter(mask.cpu(), targets).to(env.device)
        return ((values - targets).square() * mask * copies).sum() / tokens

    mine = sft.local_rows(rl.distinct(rows), env) or [rows[0] | {"copies": 0}]
    loss = sft.accumulate_gradients(wrapped, mine, cfg.micro_batch_size, loss_fn, env)
    sft.optimizer_step(critic, optimizer, cfg.critic_lr, cfg.grad_clip)
    return sft.all_sum(loss, env=env)[0]


def ppo_advantages(process, outcomes, mask, rows, critic, wrapped, optimizer, cfg, env, pad_id):
    """PPO: token rewards are the process rewards, the last one plus the outcome; GAE with a critic, which then takes its
    step -> whitened advantages (N, T), critic's loss."""
    mask = mask.float()
    process = normalise(process, mask) if cfg.norm == "batch" else process
    rewards = cfg.process_weight * process + cfg.outcome_weight * outcomes[:, None] * last_token(mask)
    values, _ = stack(critic_values(critic, rows, env, pad_id))
    advantages, targets = gae(rewards, values, mask, cfg.gamma, 1.0)
    for row, target, m in zip(rows, targets, mask.bool()):
        row["returns"] = target[m].numpy()
    return whiten(advantages, mask), train_critic(wrapped, critic, optimizer, rows, cfg, env, pad_id)


# --------------------------------------------------------------------------------------------------
# The loop.

def main(cfg, env):
    """Train a policy and its implicit PRM -> summary (also in summary.json)."""
    # 1) The policy; the PRM and its reference, both from the initial policy; a critic for PPO.
    start_time, level = time.time(), data.builtin_level(cfg.data)
    out = cfg.out or os.path.join("runs", "prime" + (level or "").removeprefix("builtin"))
    cfg = rl.check(dataclasses.replace(cfg, out=out), level, env)
    if cfg.accuracy[0] > cfg.accuracy[1]:
        raise BadInput(f"--accuracy {cfg.accuracy[0]} {cfg.accuracy[1]}: wanted the lower share first")
    checkpoint = sft.last_checkpoint(cfg)
    model, tokenizer, policy, ref_kl = rl.load_policy(cfg, env, checkpoint)
    problems, held_out = rl.load_problems(cfg, level, model, tokenizer, env)
    optimizer, pad_id, others = sft.make_optimizer(model, cfg, env), tokenizer.pad_token_id, {}
    prm = wrapped_prm = ref = critic = None
    if cfg.prm != "none":
        prm = rl.load_causal_lm(checkpoint and os.path.join(checkpoint, "prm") or cfg.prm or cfg.model, cfg, env)
        prm, wrapped_prm = sft.prepare(prm, cfg, env, sft.Policy)
        others["prm"] = (prm, tokenizer, sft.make_optimizer(prm, cfg, env))
        if cfg.reference == "sft":  # a finished implicit PRM brings its own
            own = os.path.join(cfg.prm, "reference")
            ref = rl.load_causal_lm(own if cfg.prm and os.path.isdir(own) else cfg.model, cfg, env).to(env.device).eval()
    if cfg.estimator == "ppo":
        critic, wrapped_critic, critic_optimizer = load_critic(checkpoint, cfg, env)
        others["critic"] = (critic, tokenizer, critic_optimizer)
    start = rl.load_state(checkpoint, env, model, optimizer, others)

    sft.open_run(cfg, env)
    log, stopping = sft.Log(cfg, env, start, cfg.steps), sft.catch_signals()
    skipped = log.last.get("skipped", 0)
    if not start:
        log.row(0, **rl.evaluate(model, tokenizer, held_out, cfg, env))
    sampled = cfg.prompts_per_step * cfg.oversample
    order = data.batches([0] * len(problems), sampled, cfg.seed, start)
    for step in range(start, cfg.steps):
        # 2) K responses to each question, verified; questions that are too easy or too hard are left out.
        clock = [time.time()]
        asked, keys = [problems[i] for i in next(order)], range(step * sampled, (step + 1) * sampled)
        rows = rl.rollout(model, tokenizer, asked, keys, cfg, env)
        verifiable = torch.tensor([row["verifiable"] for row in rows])
        metrics = rl.rollout_metrics(rows, verifiable, cfg.group_size)  # before the filter
        kept = accuracy_filter(rows, cfg.group_size, cfg.accuracy, cfg.prompts_per_step)
        metrics["kept"] = len(kept) / len(rows)
        clock.append(time.time())

        # 3) Process rewards, with the PRM's step; advantages over the global batch. Without a group left: no update.
        if kept:
            outcomes = torch.tensor([row["verifiable"] for row in kept])
            old_logprobs, mask = stack([row["old_logprobs"] for row in kept])
            process = torch.zeros_like(old_logprobs)  # without a PRM
            if prm:
                process, mask, more = process_rewards(kept, wrapped_prm, prm, others["prm"][2], ref, cfg, env, pad_id)
                metrics |= more
            if cfg.shuffle_process:
                process = shuffled(process, mask, cfg.seed, step)
            if critic:
                advantages, metrics["critic_loss"] = ppo_advantages(process, outcomes, mask, kept, critic, wrapped_critic,
                                                                    others["critic"][2], cfg, env, pad_id)
            else:
                advantages = prime_advantages(process, outcomes, mask, cfg.group_size, cfg.estimator, cfg.process_weight,
                                              cfg.outcome_weight, cfg.gamma, cfg.norm)
            for row, advantage, m in zip(kept, advantages, mask):
                row["advantages"] = advantage[m].numpy()
        clock.append(time.time())

        # 4) The policy's update.
        metrics |= rl.policy_step(policy, model, optimizer, kept, ref_kl, step, cfg, env, pad_id)
        clock.append(time.time())

        # 5) Log, evaluate, save.
        skipped += metrics.pop("skipped", 0)
        metrics |= {"skipped": skipped, "questions": (step + 1) * sampled}
        if rl.end_of_step(cfg, env, log, step, metrics, clock, model, tokenizer, held_out, optimizer, others, stopping):
            return None
        if cfg.show_every and (step + 1) % cfg.show_every == 0 and kept and prm:
            show_rewards(env, tokenizer, kept[0], process[0])
    log.close()
    summary = rl.finish(cfg, env, model, tokenizer, held_out, start_time, skipped, **others)
    if env.rank == 0 and prm:  # the reward model is the pair
        sft.save_model(os.path.join(cfg.out, "prm", "reference"), ref or model, tokenizer)
        sft.write_json(os.path.join(cfg.out, "prm", "reward.json"),
                       {"kind": "implicit", "beta": cfg.beta, "temperature": cfg.temperature})
    sft.barrier(env)
    return summary


def shuffled(process, mask, seed, step):
    """The rewards of each response in random order (a control: what does knowing WHERE add?). The same on every process."""
    rng, process = np.random.default_rng([seed, step]), process.clone()
    for row, m in zip(process, mask.bool()):
        row[m] = row[m][torch.from_numpy(rng.permutation(int(m.sum())))]
    return process


def show_rewards(env, tokenizer, row, process):
    """Print a response with the process reward of each token, as it enters the advantages."""
    ids = row["input_ids"][row["prompt_length"]:]
    largest = process.abs().max().item() + 1e-9
    parts = [f"{tokenizer.decode([i])!r} {reward / largest:+.2f}" for i, reward in zip(ids, process.tolist())]
    env.print(f"{row['prompt']}: {'right' if row['correct'] else 'wrong'}; process rewards (largest 1): "
              + ", ".join(parts))


if __name__ == "__main__":
    sft.launch(main, Config)
