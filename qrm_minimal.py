"""Q-RM: token-level Q values from preference pairs (arXiv 2505.23363), its two baselines, and RL with all three.

A scalar head on every token, trained only on which of two responses is right, turns out to be a Q function: no step
labels, no reference model, no language-model head. z_t is the number at response token t itself, N_w and N_l the lengths:

    s(y)  = mean_t z_t                                                                          response_scores
    loss  = - log sigmoid( beta (s(y_w) - s(y_l)) - margin ),  the mean over the pairs          pair_loss

Preference as a Bradley-Terry model of the MEAN reward, with a maximum-entropy policy exp(z) / sum exp(z) behind it, gives
beta z_t = Q(s_t, y_t) + c(s_t); what depends on the pair alone is put into one constant, the margin. Only differences of z
are learned: its level is arbitrary. The loss presses on until s(y_w) - s(y_l) > margin / beta, so the scale of z grows; the
paper's beta 0.2 asks for a gap of 10, too far for a small new head in a minute: the default is 2.
    --method orm      s(y) = z of the last token, beta 1, margin 0: an outcome reward model
    --method dpo_rm   z_t = beta (log pi - log pi_ref)(y_t), s(y) = sum_t z_t, margin 0: DPO's policy as a reward model. The
                      log-prob of token t is read at position t - 1 (the released code reads it one token too late)

Pairs: a file of pairs; right x wrong responses to a question out of trajectories with an outcome (--pairs_from); or the
policy answers questions and is verified (the default). No question is in both training and held-out pairs.

RL with the frozen reward model, which reads the policy's own tokens: r_t is z_t, standardised over the batch's tokens
(--centre: (z - mean) / sd, the paper's Algorithm 1; --no-centre: z / sd, the released code's default, whose sign hangs on
the arbitrary level). ORM: z of the last token, at all tokens.                                  token_rewards
From that comes --kl_coef (log pi - log pi_0)(y_t), pi_0 the initial policy: a frozen reward model can only rate what it has
seen, and without a tight leash the policy leaves that ground (here: copies easier sums than the question has). In these
units, of 0.1, 0.3 and 1, only 1 held a policy with a DPO-RM on the built-in task; the released PPO takes 0.01 of the
absolute value, at a lr of 5e-6.
    --rl reinforce    A_t = r_t: a Q value is a return already; the last token's is the response's mean
    --rl ppo          Q-RM: A_t = r_t - value_coef V(s_t), V trained towards r_t; ORM (r on the last token only) and
                      DPO-RM: generalised advantage estimation. V(s_t) is read before y_t is known
Both go through rl_minimal.py's clipped loss; with one optimizer step for a batch (the default) no ratio is clipped.
Left out: LoRA; the focal, pointwise and step-level losses of the released code; value-guided sampling.

    python qrm_minimal.py                                            # pairs, Q-RM, its accuracy and a coloured view
    python qrm_minimal.py --method dpo_rm --pairs_from runs/search/samples.jsonl
    python qrm_minimal.py --rl reinforce                             # the policy, by runs/qrm/model
    python qrm_minimal.py --rl ppo --rm runs/orm/model --data builtin-hard
    python search_minimal.py --prm runs/qrm/model runs/orm/model     # Best-of-N and beam search
    torchrun --nproc_per_node=8 qrm_minimal.py --model meta-llama/Llama-3.1-8B-Instruct --data pairs.jsonl --lr 1e-5 \\
        --batch_size 64 --micro_batch_size 2 --grad_checkpoint       # rows: {"prompt", "chosen", "rejected"}

Files in --out: as in sft_minimal.py; model/reward.json says of which kind the reward model is (scorers.py).
"""
import dataclasses
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
import prime_minimal as prime
import rl_minimal as rl
import sft_minimal as sft
import tdrm_minimal as tdrm
from data import BadInput
from pairs import load_data
from plumbing import merge
from sft_minimal import opt

REDUCTIONS = {"qrm": "mean", "orm": "last", "dpo_rm": "sum"}  # of token scores to a response's
BETAS = {"qrm": 2.0, "orm": 1.0, "dpo_rm": 0.1}
KINDS = {"qrm": "qrm", "orm": "orm", "dpo_rm": "implicit"}  # what reward.json calls them


@dataclass(frozen=True)
class Config(rl.RLConfig):
    method: str = opt("qrm", "of the reward model", choices=tuple(REDUCTIONS))
    beta: float = opt(0.0, "scale in the loss; 0: 2 for qrm (the paper: 0.2), 0.1 for dpo_rm; orm has none", low=0)
    margin: float = opt(2.0, "what beta times the gap should exceed (qrm)")
    data: tuple = opt(("builtin",), "builtin, builtin-hard, or files of pairs or problems (with --rl: of problems)")
    pairs_from: tuple = opt((), "trajectory files with outcomes to make pairs from; empty: sample where --data has no pairs")
    pairs_per_question: int = opt(4, "most pairs made for one question", low=1)
    samples: int = opt(8, "responses sampled for each question to make pairs of", low=2)
    eval: tuple = opt((), "files of pairs or trajectories (with --rl: of problems); empty: questions held out of --data")
    rl: str = opt("none", "train a policy with the reward model in --rm", choices=("none", "reinforce", "ppo"))
    rm: str = opt("", "with --rl: folder of the reward model; empty: the built-in one of --method")
    centre: bool = opt(True, "with --rl: subtract the mean of the batch's token scores, not only divide by their deviation")
    value_coef: float = opt(1.0, "with --rl ppo, qrm: weight of the critic's value (the released code: 0.01)", low=0)
    kl_coef: float = opt(1.0, "with --rl: weight of log pi - log pi_0 in the token rewards; 0: pi_0 is not loaded", low=0)
    gamma: float = opt(0.9, "with --rl ppo, orm and dpo_rm: discount", low=0, high=1)
    lam: float = opt(0.8, "with --rl ppo, orm and dpo_rm: lambda of the advantage estimation", low=0, high=1)
    critic_lr: float = opt(1e-3, "with --rl ppo: learning rate of the critic", low=0)
    problems: int = opt(0, "training questions; 0: all of the files', of the built-in task 12000 (with --rl 2000)", low=0)
    steps: int = opt(0, "optimizer steps; 0: one pass over the pairs (with --rl: 200 rounds)", low=0)
    batch_size: int = opt(0, "pairs in a global batch; 0: 64 (with --rl: responses; 0: all of a step's)", low=0)
    lr: float = opt(0.0, "learning rate; 0: 2e-3, with --rl 3e-4 (for an 8B model: 1e-5, 1e-6)", low=0)
    prompts_per_step: int = opt(128, "with --rl: questions in a step, over all processes", low=1)
    group_size: int = opt(1, "with --rl: responses to each question", low=1)
    estimator: str = opt("reinforce", "the group is no baseline here", choices=("reinforce",))
    color: bool = opt(False, "colour the token scores even where the output is no terminal")


# --------------------------------------------------------------------------------------------------
# The maths. (N, T) = responses by tokens; a mask is True on response tokens, the end-of-response token included.

def response_scores(q, mask, reduce="mean"):
    """Token scores (N, T) -> (N,): their mean, their sum, or that of the last token; 0 for an empty mask."""
    mask = mask.bool()
    q = torch.where(mask, q, 0.0)
    if reduce == "last":
        return (q * prime.last_token(mask)).sum(1)
    return q.sum(1) / (mask.sum(1).clamp(min=1) if reduce == "mean" else 1)


def pair_loss(q_chosen, q_rejected, mask_chosen, mask_rejected, beta=0.2, margin=2.0, reduce="mean", count=None):
    """Sum over the pairs of -log sigmoid(beta (s_chosen - s_rejected) - margin) / `count` (default: their number).

    The chosen side's q and mask are (N, T), the rejected side's (N, T'). A pair with an empty mask on either side is left
    out; where none is left the loss is 0. With micro-batches or processes, `count` is the global batch's."""
    valid = mask_chosen.any(1) & mask_rejected.any(1)
    gap = response_scores(q_chosen, mask_chosen, reduce) - response_scores(q_rejected, mask_rejected, reduce)
    losses = torch.where(valid, -F.logsigmoid(beta * gap - margin), 0.0)
    return losses.sum() / (valid.sum().clamp(min=1) if count is None else count)


def standardise(q, mask, centre=True):
    """Token scores (N, T) over their standard deviation in the batch; `centre`: less their mean first. 0 where all agree."""
    if centre:
        return prime.whiten(q, mask)
    spread = q[mask.bool()].std()
    return q / spread * mask if spread > 1e-6 else torch.zeros_like(q)


def token_rewards(q, mask, method="qrm", centre=True):
    """What a token is paid (N, T): its standardised score; of an ORM, the last token's at all tokens."""
    q = response_scores(q, mask, "last")[:, None] * mask if method == "orm" else q
    return standardise(q, mask.float(), centre)


def reinforce_advantages(rewards, mask):
    """A_t = r_t, but the last token's is the response's mean: whether to end is a matter of the whole response."""
    return torch.where(prime.last_token(mask).bool(), response_scores(rewards, mask)[:, None], rewards)


def ppo_advantages(rewards, values, mask, method="qrm", value_coef=1.0, gamma=0.9, lam=0.8):
    """-> advantages, what the critic is trained towards, both (N, T). values (N, T): of the states before each token."""
    mask = mask.float()
    if method == "qrm":
        return (rewards - value_coef * values) * mask, rewards * mask
    return prime.gae(rewards * prime.last_token(mask) if method == "orm" else rewards, values, mask, gamma, lam)


def localisation_auroc(scores, first_errors):
    """AUROC of "here is the first error" from how far the score falls: does it fall where the error is made?

    scores: for each solution a list, one number for each unit (step or token), read when the unit is there: a value, a Q,
    or a sum of rewards so far. first_errors: index of the first wrong unit, -1: none. The fall at unit t is s_t-1 - s_t;
    at the first, from the mean first score of all solutions. Units behind the first wrong one are left out: whether what
    builds on an error is right is not defined. NaN if there is no error, or nothing else.
    """
    start, falls, wrong = np.mean([s[0] for s in scores if len(s)] or [0.0]), [], []
    for s, error in zip(scores, first_errors):
        fall = -np.diff(np.concatenate([[start], s]))[:error + 1 if error >= 0 else None]
        falls += fall.tolist()
        wrong += [t == error for t in range(len(fall))]
    return tdrm.auroc(falls, wrong)


# --------------------------------------------------------------------------------------------------
# The model: one number for every response token.

class TokenReward(torch.nn.Module):
    """Tokens (N, T) -> scores (N, T-1), where column t belongs to token t + 1 as in response_mask, 0 outside the mask."""

    def __init__(self, model, method, beta=1.0, reference=None):
        super().__init__()
        self.model, self.method, self.beta, self.reference = model, method, beta, reference

    def forward(self, input_ids, mask):
        if self.method == "dpo_rm":  # the distribution of token t + 1 is read at token t
            with torch.no_grad():
                ref_logprobs, _ = sft.token_logprobs(self.reference, input_ids, mask)
            return prime.implicit_rewards(sft.token_logprobs(self.model, input_ids, mask)[0], ref_logprobs, mask, self.beta)
        scores = self.model(input_ids=input_ids, use_cache=False).logits[..., 0].float()  # z is read at the token itself
        return torch.where(mask, scores[:, 1:], 0.0)


@torch.no_grad()
def token_scores(reward, rows, cfg, env, pad_id):
    """Scores of every response token: an array per row. Split over the processes, known to all."""
    different, mine, size = rl.distinct(rows), {}, cfg.micro_batch_size or 64
    order = sorted(range(len(different)), key=lambda i: len(different[i]["input_ids"]))[env.rank::env.world]
    for part in (order[i:i + size] for i in range(0, len(order), size)):
        b = data.collate([different[i] for i in part], pad_id)
        q = reward(b["input_ids"].to(env.device), b["response_mask"].to(env.device)).cpu()
        mine.update({i: row[m].numpy() for i, row, m in zip(part, q, b["response_mask"])})
    scored = merge(mine, env)
    return rl.for_each(rows, different, [scored[i] for i in range(len(different))])


def load_reference(name, cfg, env):
    return rl.load_causal_lm(name, cfg, env).to(env.device).eval().requires_grad_(False)


def load_reward(folder, cfg, env):
    """A reward model from its folder, frozen -> TokenReward; its kind is in reward.json, without one it is an ORM."""
    path, about = os.path.join(folder, "reward.json"), {}
    try:
        if os.path.exists(path):
            with open(path) as f:
                about = json.load(f)
        method = {kind: method for method, kind in KINDS.items()}[about.get("kind", "orm")]
        beta = float(about["beta"]) if method == "dpo_rm" else 1.0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"--rm: {path} is damaged; wanted 'kind': qrm, orm, or implicit with 'beta'") from None
    try:
        if method == "dpo_rm":
            models = [load_reference(name, cfg, env) for name in (folder, os.path.join(folder, "reference"))]
            reward = TokenReward(models[0], method, beta, models[1])
        else:
            reward = TokenReward(tdrm.load_reward_model(folder, sft.torch_dtype(cfg, env), new_head=False), method)
    except BadInput as error:
        raise BadInput(str(error).replace("--model", "--rm", 1)) from None
    return reward.to(env.device).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# Training the reward model.

def main(cfg, env):
    """Train a reward model, or with --rl a policy -> summary (also in summary.json)."""
    if cfg.rl != "none":
        return train_policy(cfg, env)
    # 1) The run's folder, pairs, the model.
    level = data.builtin_level(cfg.data)
    if not level and not cfg.model:
        raise BadInput("--data: your own pairs need --model, the policy to start from")
    if cfg.rm:
        raise BadInput("--rm: a reward model to use, which only --rl does; to start from another model: --model")
    start_time, out = time.time(), cfg.out or os.path.join("runs", cfg.method + (level or "").removeprefix("builtin"))
    cfg = dataclasses.replace(cfg, out=out, model=cfg.model or sft.builtin_policy(level, env), batch_size=cfg.batch_size or 64,
                              lr=cfg.lr or 2e-3, beta=cfg.beta or BETAS[cfg.method])
    checkpoint = sft.last_checkpoint(cfg)
    tokenizer = data.load_tokenizer(checkpoint or cfg.model)
    pad_id, reduce = tokenizer.pad_token_id, REDUCTIONS[cfg.method]
    scale, margin = (cfg.beta, cfg.margin) if cfg.method == "qrm" else (1.0, 0.0)  # of dpo_rm, beta is in the scores
    pairs, held_out, trajectories, dropped = load_data(cfg, level, tokenizer, env)
    steps = cfg.steps or max(1, len(pairs) // cfg.batch_size)
    env.print(f"{cfg.method}: {len(pairs)} pairs, {len(held_out)} held out ({dropped} too long or of equal responses), "
              f"{steps} steps of {cfg.batch_size}, {env.world} processes on {env.device.type}")
    if cfg.method == "dpo_rm":
        model, reference = rl.load_causal_lm(checkpoint or cfg.model, cfg, env), load_reference(cfg.model, cfg, env)
    else:
        model, reference = tdrm.load_reward_model(checkpoint or cfg.model, sft.torch_dtype(cfg, env), cfg.seed), None
    model, wrapped = sft.prepare(model, cfg, env, lambda m: TokenReward(m, cfg.method, cfg.beta, reference))
    reward = getattr(wrapped, "module", wrapped)  # without DDP
    data.check_ids(model, pairs, cfg.model)
    optimizer = sft.make_optimizer(model, cfg, env)
    start = sft.load_checkpoint(checkpoint, env, model, optimizer) if checkpoint else 0

    # 2) The loop. Both responses of a pair go through one forward.
    sft.open_run(cfg, env)
    log, stopping = sft.Log(cfg, env, start, steps), sft.catch_signals()
    skipped = log.last.get("skipped", 0)
    order = data.batches([len(p["input_ids"]) for p in pairs], cfg.batch_size, cfg.seed, start)
    for step in range(start, steps):
        batch = [pairs[i] for i in next(order)]

        def loss_fn(micro):
            b = data.collate([p["chosen"] for p in micro] + [p["rejected"] for p in micro], pad_id)
            mask = b["response_mask"].to(env.device)
            q = wrapped(b["input_ids"].to(env.device), mask)
            return pair_loss(*q.chunk(2), *mask.chunk(2), scale, margin, reduce, count=len(batch))

        loss = sft.accumulate_gradients(wrapped, sft.local_rows(batch, env), cfg.micro_batch_size, loss_fn, env)
        lr = sft.learning_rate(step, steps, cfg.lr, cfg.warmup)
        grad_norm = sft.optimizer_step(model, optimizer, lr, cfg.grad_clip)
        loss, stop = sft.all_sum(loss, bool(stopping), env=env)
        skipped += not math.isfinite(grad_norm)
        row, done = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "skipped": skipped}, step + 1
        if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
            row |= evaluate(reward, held_out, trajectories, level, cfg, env, pad_id)
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
    summary = evaluate(reward, held_out, trajectories, level, cfg, env, pad_id)
    summary |= {"pairs": len(pairs), "held_out_pairs": len(held_out), "steps": steps, "skipped": skipped}
    shown = choose_two(held_out, trajectories)
    scores = token_scores(reward, [e for _, e in shown], cfg, env, pad_id)
    if env.rank == 0:
        folder = os.path.join(cfg.out, "model")
        sft.save_model(folder, model, tokenizer)
        if reference:
            sft.save_model(os.path.join(folder, "reference"), reference, tokenizer)
        about = {"beta": cfg.beta} if reference else {"scale": scale}
        sft.write_json(os.path.join(folder, "reward.json"), {"kind": KINDS[cfg.method], **about})
        sft.write_json(os.path.join(cfg.out, "summary.json"), summary)
        print(f"\n{cfg.method} on {len(held_out)} held-out pairs and {len(trajectories)} solutions")
        for name, title in MEASURES.items():
            if summary.get(name) is not None:
                print(f"  {title:<46} {summary[name]:.3f}")
        for (title, example), q in zip(shown, scores):
            print_tokens(title, tokenizer, example, q, summary["middle"], cfg.color or sys.stdout.isatty())
        print(f"{time.time() - start_time:.0f} s; the reward model is in {folder}")
    sft.barrier(env)
    return summary


MEASURES = {"pair_accuracy": "share of pairs whose right response scores higher", "gap": "mean gap between right and wrong",
            "localisation_steps": "AUROC of the first wrong step, by the fall",
            "localisation_tokens": "AUROC of the first wrong token, by the fall"}


def evaluate(reward, pairs, trajectories, level, cfg, env, pad_id):
    """Held-out measures -> dict. `middle`: the token score half way between right and wrong responses."""
    reward.eval()
    sides = [example for pair in pairs for example in (pair["chosen"], pair["rejected"])]
    q, mask = prime.stack(token_scores(reward, sides, cfg, env, pad_id))
    chosen, rejected = response_scores(q, mask, REDUCTIONS[cfg.method]).reshape(-1, 2).T
    means = response_scores(q, mask).reshape(-1, 2).mean(0)
    measures = {"pair_accuracy": (chosen > rejected).float().mean().item(), "gap": (chosen - rejected).mean().item(),
                "middle": means.mean().item()}
    if trajectories:
        scores, errors = token_scores(reward, trajectories, cfg, env, pad_id), [e["first_error"] for e in trajectories]
        steps = [step_scores(q, e, cfg.method) for q, e in zip(scores, trajectories)]
        measures["localisation_steps"] = localisation_auroc(steps, errors)
        if level and not cfg.eval:  # "7+8=5": the wrong token is known to be the step's result
            tokens = [np.cumsum(q) if cfg.method == "dpo_rm" else q for q in scores]
            wrong = [result_token(e, t) if t >= 0 else -1 for e, t in zip(trajectories, errors)]
            measures["localisation_tokens"] = localisation_auroc(tokens, wrong)
    reward.train()
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


def step_scores(q, example, method):
    """Token scores -> one for each step: their mean over its tokens; of log-ratios, their sum up to its end."""
    ends = [end + 1 - example["prompt_length"] for end in example["step_ends"]]
    if method == "dpo_rm":
        return [float(q[:end].sum()) for end in ends]
    return [float(np.mean(q[begin:end])) for begin, end in zip([0] + ends, ends)]


def result_token(example, t):
    """Which response token is the result of built-in step t: the step's last before its blank line."""
    return example["step_ends"][t] - example["prompt_length"] - (t < len(example["step_ends"]) - 1)


# --------------------------------------------------------------------------------------------------
# RL with a reward model that stays as it is.

def train_policy(cfg, env):
    """REINFORCE or PPO on token rewards -> summary (also in summary.json)."""
    # 1) The policy, its questions, the reward model, a critic for PPO.
    start_time, level = time.time(), data.builtin_level(cfg.data)
    if cfg.pairs_from:
        raise BadInput("--pairs_from: --rl learns from no pairs, but from the reward model in --rm")
    rm = cfg.rm or builtin_reward_model(level or "builtin", cfg.method, env)
    reward = load_reward(rm, cfg, env)
    method = reward.method
    out = cfg.out or os.path.join("runs", f"{cfg.rl}-{method}" + (level or "").removeprefix("builtin"))
    cfg = dataclasses.replace(cfg, out=out, rm=rm, method=method, steps=cfg.steps or 200, lr=cfg.lr or 3e-4)
    cfg = rl.check(cfg, level, env)
    checkpoint = sft.last_checkpoint(cfg)
    model, tokenizer, policy, ref = rl.load_policy(cfg, env, checkpoint)
    if data.load_tokenizer(rm).get_vocab() != tokenizer.get_vocab():
        raise BadInput(f"--rm {rm}: its tokenizer is not the policy's ({cfg.model}); it has to score the policy's own tokens")
    problems, held_out = rl.load_problems(cfg, level, model, tokenizer, env)
    optimizer, pad_id, others, critic = sft.make_optimizer(model, cfg, env), tokenizer.pad_token_id, {}, None
    if cfg.rl == "ppo":
        critic, wrapped_critic, critic_optimizer = prime.load_critic(checkpoint, cfg, env)
        others["critic"] = (critic, tokenizer, critic_optimizer)
    start = rl.load_state(checkpoint, env, model, optimizer, others)

    sft.open_run(cfg, env)
    log, stopping = sft.Log(cfg, env, start, cfg.steps), sft.catch_signals()
    skipped = log.last.get("skipped", 0)
    if not start:
        log.row(0, **rl.evaluate(model, tokenizer, held_out, cfg, env))
    order = data.batches([0] * len(problems), cfg.prompts_per_step, cfg.seed, start)
    for step in range(start, cfg.steps):
        # 2) Responses; verified for the log only.
        clock, keys = [time.time()], range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)
        rows = rl.rollout(model, tokenizer, [problems[i] for i in next(order)], keys, cfg, env)
        clock.append(time.time())

        # 3) Token scores, token rewards less the log-ratio, advantages over the global batch.
        scores = token_scores(reward, rows, cfg, env, pad_id)
        q, mask = prime.stack(scores)
        verifiable, whole = torch.tensor([row["verifiable"] for row in rows]), response_scores(q, mask, REDUCTIONS[method])
        metrics = rl.rollout_metrics(rows, whole, cfg.group_size) | {
            "rm_auroc": tdrm.auroc(whole, verifiable), "score_mean": q[mask].mean().item(), "score_std": q[mask].std().item()}
        rewards = token_rewards(q, mask, method, cfg.centre)
        if ref:
            initial = rl.score_logprobs(ref, rows, cfg, env, pad_id)
            logratio = prime.stack([row["old_logprobs"] - lp for row, lp in zip(rows, initial)])[0]
            rewards, metrics["kl"] = rewards - cfg.kl_coef * logratio, logratio[mask].mean().item()
        if critic:
            values, _ = prime.stack(prime.critic_values(critic, rows, env, pad_id))
            advantages, targets = ppo_advantages(rewards, values, mask, method, cfg.value_coef, cfg.gamma, cfg.lam)
            for row, target, m in zip(rows, targets, mask):
                row["returns"] = target[m].numpy()
            metrics["critic_loss"] = prime.train_critic(wrapped_critic, critic, others["critic"][2], rows, cfg, env, pad_id)
        else:
            advantages = reinforce_advantages(rewards, mask)
        for row, advantage, m in zip(rows, advantages, mask):
            row["advantages"] = advantage[m].numpy()
        clock.append(time.time())

        # 4) The policy's update.
        metrics |= rl.policy_step(policy, model, optimizer, rows, None, step, cfg, env, pad_id)
        clock.append(time.time())

        # 5) Log, evaluate, save.
        skipped += metrics.pop("skipped", 0)
        metrics |= {"skipped": skipped, "questions": (step + 1) * cfg.prompts_per_step}
        if rl.end_of_step(cfg, env, log, step, metrics, clock, model, tokenizer, held_out, optimizer, others, stopping):
            return None
        if cfg.show_every and (step + 1) % cfg.show_every == 0 and env.rank == 0:
            title = f"step {step + 1}, {'right' if rows[0]['correct'] else 'wrong'}"
            print_tokens(title, tokenizer, rows[0], scores[0], metrics["score_mean"], cfg.color or sys.stdout.isatty())
    log.close()
    return rl.finish(cfg, env, model, tokenizer, held_out, start_time, skipped, **others)


def builtin_reward_model(level, method, env):
    """The built-in reward model's folder, trained first where it is not there yet."""
    out = os.path.join("runs", method + level.removeprefix("builtin"))
    if not os.path.isdir(os.path.join(out, "model")):
        env.print(f"there is no {out}/model yet: training the built-in reward model first")
        if main(Config(method=method, data=(level,), out=out, resume=True), env) is None:
            raise SystemExit(0)  # stopped by a signal
    return os.path.join(out, "model")


# --------------------------------------------------------------------------------------------------
# To look at.

def choose_two(pairs, trajectories):
    """A right and a wrong response, if possible one that knows where it goes wrong -> [(title, example)]."""
    middle = lambda e: abs(e["first_error"] - len(e["step_ends"]) / 2)  # noqa: E731
    right = [e for e in trajectories if e["first_error"] < 0] or [pairs[0]["chosen"]]
    wrong = sorted((e for e in trajectories if e["first_error"] >= 0 and not e["correct"]), key=middle) or [pairs[0]["rejected"]]
    return [("right", right[0]), ("wrong", wrong[0])]


def print_tokens(title, tokenizer, example, scores, middle, color):
    """A response's tokens with their scores, a step to a line: red below `middle`, green above, or in plain numbers."""
    question = example["prompt"] if isinstance(example["prompt"], str) else example["prompt"][-1]["content"]
    shades, spread = (196, 203, 217, 255, 157, 83, 46), max(1e-9, float(np.abs(np.asarray(scores) - middle).max()))
    print(f"\n{title}: {' '.join(question.split())[:100]}   (middle {middle:+.2f}, reach {spread:.2f})")
    ids, parts, line = example["input_ids"][example["prompt_length"]:], [], 0
    for t, (i, score) in enumerate(zip(ids, scores)):
        text = tokenizer.decode([i])
        shown = text.replace("\n", "⏎") or " "
        place = (score - middle) / spread  # -1 to 1
        parts.append(f"\033[30;48;5;{shades[round(3 + 3 * place)]}m{shown}\033[0m" if color else f"{shown} {place:+.2f}")
        if "\n\n" in text or t == len(ids) - 1:
            mark = "   <- first wrong step" if line == example.get("first_error") else ""
            print("  " + ("" if color else "  ").join(parts) + mark)
            parts, line = [], line + 1


if __name__ == "__main__":
    sft.launch(main, Config)
