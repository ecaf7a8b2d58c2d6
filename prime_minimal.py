"""PRIME: process rewards for free, from a reward model that learns from outcomes while the policy
does (arXiv 2502.01456).

Train a language model pi_phi (the implicit PRM) to tell right responses from wrong ones by the sum
of its log-ratios to a reference; then the log-ratio of each token is a reward for that token,
though no step was ever labelled:

    q_t = log pi_phi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t),  r_t = beta q_t  implicit_rewards
    loss = mean over responses of BCE(sigmoid(sum_t r_t), outcome)              train_implicit_prm

Both streams, process and outcome, become advantages, by leave-one-out baselines over the K
responses to a question (rbar_j: mean token reward of response j; o: outcome), whitened over all
tokens:

    A_i,t = sum_{s >= t} [ r_i,s - mean_{j != i} rbar_j ] + o_i - mean_{j != i} o_j
                                                                                prime_advantages

Before that, r is divided by the largest |sum_{s >= t} r_s| of the batch, so beta matters in the
PRM's loss only; below `floor` there is no signal but rounding, which dividing would blow up, and r
is set to 0. One step of the loop: sample, verify, keep questions with 20 to 80% right answers,
score and update the PRM, update the policy (rl_minimal.py's loss).

`--update after` (single forward) uses the rewards of the forward that is also trained on; `before`
scores again with the updated PRM; `none` keeps it frozen. `--reference policy` takes the sampler's
own log-probs for pi_ref: no third model, and a reward that shrinks as the policy comes to agree
with the PRM, so that it is harder to game. The published code differs from the paper's equation by
a factor K/(K-1) on deviations inside a response (`--estimator rloo_code`), and loses the process
reward of the last token in one of its versions; we keep it. Left out: the dedicated EurusPRM's
training recipe (start from any folder with --prm), code execution.

    python prime_minimal.py                                     # built-in policy, outcomes only
    python prime_minimal.py --estimator grpo --update before
    python prime_minimal.py --process_weight 0                  # outcomes only at equal compute
    python search_minimal.py --prm runs/prime/prm               # the implicit PRM in search
    torchrun --nproc_per_node=8 prime_minimal.py --model PRIME-RL/Eurus-2-7B-SFT --lr 5e-7 \\
        --data math.jsonl --prm_lr 1e-6 --prompts_per_step 256 --group_size 4 --batch_size 256 \\
        --max_length 4096 --max_new_tokens 3072 --micro_batch_size 2 --grad_checkpoint

Files in --out: as in rl_minimal.py; prm/ is the implicit PRM, a causal LM with its reference in
prm/reference.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
import rl_minimal as rl
from parts.credit import Critic, last_token, on_tokens, returns, stack, unstack, whiten
from parts.formats import BadInput
from parts.models import load_policy, torch_dtype
from parts.rewards import RewardModel
from parts.runs import Run, last_checkpoint, launch, opt
from parts.training import Policy, accumulate_gradients, optimizer_step, prepare

ESTIMATORS = ("rloo", "rloo_code", "reinforce", "grpo", "ppo", "value")
REFERENCES = ("sft", "policy")
UPDATES = ("after", "before", "none")
PRM_GRAD_CLIP = 10.0  # largest gradient norm of the PRM


@dataclass(frozen=True)
class Config(rl.RLConfig):
    steps: int = opt(300, "rounds of sampling, scoring and updating", low=1)
    prm: str | None = opt(None, "the PRM's start; without it: the initial policy; none: no PRM")
    reference: str = opt("sft", "pi_ref: the initial policy or the current", choices=REFERENCES)
    update: str = opt("after", "when the PRM learns; before: then scores again", choices=UPDATES)
    estimator: str = opt("rloo", "of the advantages; value: PRM as critic", choices=ESTIMATORS)
    beta: float = opt(0.5, "scale of the log-ratio in the PRM's loss (paper: 0.05)", low=0)
    process_weight: float = opt(1.0, "of the process rewards; 0: trained, not used", low=0)
    accuracy: tuple[float, float] = opt((0.2, 0.8), "share of right answers to keep", 0.0, 1.0)
    oversample: int = opt(1, "questions sampled for each one wanted", low=1)
    shuffle_process: bool = opt(False, "control: permute process rewards within each response")
    prm_lr: float = opt(1e-3, "learning rate of the PRM (for a 7B model: 1e-6)", low=0)


# --------------------------------------------------------------------------------------------------
# The maths. (N, T) = responses by response tokens; the K responses of a group stand together.


def implicit_rewards(logprobs, ref_logprobs, mask, beta):
    """Process rewards beta * (log pi_phi - log pi_ref) of every token, the last included: (N, T), 0
    outside the mask."""
    return torch.where(mask.bool(), beta * (logprobs - ref_logprobs), 0.0)


def normalise(process, mask, floor=1e-3):
    """Process rewards over their largest absolute return in the batch; 0 where that is below
    `floor`, mere rounding."""
    largest = returns(process, mask).abs().max()
    return process / (largest + 1e-6) if largest > floor else torch.zeros_like(process)


def prime_advantages(
    process, outcomes, mask, group_size, estimator="rloo", process_weight=1.0, floor=1e-3
):
    """Advantages (N, T) from process rewards (N, T) and outcomes (N,) of the GLOBAL batch; mask (N,
    T). Comes along: normalise; returns, whiten and last_token of parts/credit.py.

    rloo       the paper's Eq. 5 (its baseline is the mean TOKEN reward of the others), whitened
    rloo_code  the released code: deviations inside a response K/(K-1) times as large, whitened grpo
    both streams (x - group mean) / group std;  reinforce: no baseline value      the PRM as value
    model: A_t = o - (sum of process rewards before t), whitened; not normalised ValueError where
    the rows are not whole groups of two or more.
    """
    N, K = len(outcomes), group_size
    if N % K or (K == 1 and estimator != "reinforce"):
        raise ValueError(f"{N} responses in groups of {K}: wanted whole groups, of 2 or more")
    mask, outcome = mask.float(), outcomes.float()
    process = process * mask
    if estimator != "value":
        process = normalise(process, mask, floor)
    mean_reward = process.sum(1) / mask.sum(1).clamp(min=1)  # rbar (N,)

    def total(x):  # over each row's group: (N,) -> (N,)
        return x.reshape(-1, K).sum(1).repeat_interleave(K)

    def others(x):  # mean of the other rows of the group
        return (total(x) - x) / (K - 1)

    def std(x):
        return x.reshape(-1, K).std(1).repeat_interleave(K) + 1e-6

    if estimator == "rloo":
        process, outcome = process - others(mean_reward)[:, None], outcome - others(outcome)
    elif estimator == "rloo_code":
        process = (K * process - total(mean_reward)[:, None]) / (K - 1)
        outcome = (K * outcome - total(outcome)) / (K - 1)
    elif estimator == "grpo":
        process = (process - (total(mean_reward) / K)[:, None]) / std(mean_reward)[:, None]
        outcome = (outcome - total(outcome) / K) / std(outcome)
    elif estimator == "value":
        process = process - process.cumsum(1)  # minus the sum of those before
    elif estimator != "reinforce":
        wanted = "rloo, rloo_code, grpo, reinforce or value"
        raise ValueError(f"estimator {estimator!r}: wanted {wanted}")
    process = process * mask if estimator == "value" else returns(process, mask)
    outcome = returns(outcome[:, None] * last_token(mask), mask)
    advantages = process_weight * process + outcome
    return advantages if estimator in ("grpo", "reinforce") else whiten(advantages, mask)


def pair_accuracy(scores, outcomes, group_size):
    """Share of (right, wrong) pairs inside groups whose right response scores higher; NaN where
    there is no pair."""
    scores, right = scores.reshape(-1, group_size), outcomes.reshape(-1, group_size) > 0.5
    pairs = right[:, :, None] & ~right[:, None, :]
    return (scores[:, :, None] > scores[:, None, :])[pairs].float().mean().item()


def accuracy_filter(rollouts, group_size, accuracy, most):
    """The groups of the first `most` questions whose share of right answers lies within `accuracy`,
    ends included."""
    kept = []
    for i in range(0, len(rollouts), group_size):
        group = rollouts[i : i + group_size]
        share = sum(r.correct for r in group) / group_size
        if accuracy[0] - 1e-9 <= share <= accuracy[1] + 1e-9:
            kept += group
    return kept[: most * group_size]


# --------------------------------------------------------------------------------------------------
# The loop.


def main(cfg, procs):
    """Train a policy and its implicit PRM -> summary (also in summary.json)."""
    # 1) The policy; the PRM and its reference, both from the initial policy; a critic for PPO.
    level = data.builtin_level(cfg.data)
    cfg = rl.check_options(cfg, "prime", level, procs)
    if cfg.accuracy[0] > cfg.accuracy[1]:
        low, high = cfg.accuracy
        raise BadInput(f"--accuracy {low} {high}: wanted the lower share first")
    checkpoint, dtype = last_checkpoint(cfg), torch_dtype(cfg, procs.device)
    policy, initial = rl.load_policies(cfg, dtype, procs, checkpoint, cfg.kl_coef)
    problems, held_out = rl.load_problems(cfg, level, policy.module, procs)
    learners, tokenizer, critic = {"model": policy}, policy.module.tokenizer, None
    prm, reference = load_prm(cfg, dtype, procs, checkpoint, tokenizer)
    if prm:
        learners["prm"] = prm
    if cfg.estimator == "ppo":
        critic = Critic(checkpoint, dtype, tokenizer, cfg, procs)
        learners["critic"] = critic.learner

    run = Run(cfg, procs, checkpoint, cfg.steps, learners)
    if not run.start:
        run.log(**rl.evaluate(policy.module, held_out, cfg, procs))
        run.write(0)
    sampled = cfg.prompts_per_step * cfg.oversample
    order = data.batches([0] * len(problems), sampled, cfg.seed, run.start)
    for step in run.steps():
        # 2) K responses to each question, verified; too easy or too hard questions are left out.
        asked = [problems[i] for i in next(order)]
        rollouts = rl.roll_out(policy.module, asked, step * sampled, cfg, procs)
        correct = torch.tensor([r.correct for r in rollouts])
        kept = accuracy_filter(rollouts, cfg.group_size, cfg.accuracy, cfg.prompts_per_step)
        run.log(**rl.rollout_metrics(rollouts, correct, cfg.group_size))
        run.log(kept=len(kept) / len(rollouts))
        run.lap("sampling")

        # 3) Process rewards, with the PRM's step; advantages over the global batch. Without a group
        # left: no    update.
        if kept:
            outcomes = torch.tensor([r.correct for r in kept])
            process, mask = stack([np.zeros_like(r.old_logprobs) for r in kept])  # without a PRM
            if prm:
                process, metrics = process_rewards(kept, prm, reference, cfg, procs)
                run.log(**metrics)
            if cfg.shuffle_process:
                process = shuffled(process, mask, cfg.seed, step)
            if critic:
                rewards = cfg.process_weight * normalise(process, mask.float())
                rewards = rewards + outcomes[:, None] * last_token(mask.float())
                advantages, loss = critic.advantages(rewards, mask, kept, 1.0, 1.0)
                advantages = whiten(advantages, mask.float())
                run.log(critic_loss=loss)
            else:
                how = cfg.group_size, cfg.estimator, cfg.process_weight
                advantages = prime_advantages(process, outcomes, mask, *how)
            for r, advantage in zip(kept, unstack(advantages, mask)):
                r.advantages = advantage
            if initial:
                for r, logprobs in zip(kept, rl.score_logprobs(initial, kept, cfg, procs)):
                    r.initial_logprobs = logprobs
        run.lap("scoring")

        # 4) The policy's update.
        if kept:
            run.log(**rl.update_policy(policy, kept, step, cfg, procs))
        run.lap("update")

        # 5) Evaluate, with a response to look at.
        if run.evaluates:
            run.log(**rl.evaluate(policy.module, held_out, cfg, procs))
            if kept and prm:
                show_rewards(procs, tokenizer, kept[0], process[0])
    if run.stopped:
        return None
    summary = rl.finish(run, policy.module, held_out, cfg, procs)
    if prm and procs.rank == 0:  # the reward model is the pair
        reference = policy.module.model if reference is None else reference
        about = {"beta": cfg.beta, "temperature": cfg.temperature, "layout": policy.module.layout}
        pair = RewardModel(prm.module.model, tokenizer, "implicit", reference, **about)
        pair.save(os.path.join(cfg.out, "prm"))
    procs.barrier()
    return summary


def load_prm(cfg, dtype, procs, checkpoint, tokenizer):
    """-> the PRM's Learner, its reference (None: the current policy); None, None without a PRM."""
    if cfg.prm == "none":
        return None, None
    name = os.path.join(checkpoint, "prm") if checkpoint else cfg.prm or cfg.model
    learner = prepare(Policy(load_policy(name, dtype, "--prm"), tokenizer), cfg, procs)
    if cfg.reference == "policy":
        return learner, None
    own = os.path.join(cfg.prm or "", "reference")  # a finished implicit PRM brings its own
    name = own if cfg.prm and os.path.isdir(own) else cfg.model
    return learner, load_policy(name, dtype).to(procs.device).requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# The implicit PRM. Rollouts are rl_minimal's, known to all processes.


def process_rewards(rollouts, prm, reference, cfg, procs):
    """Implicit process rewards (N, T) of every response token, by --update and --reference, and
    metrics; the PRM's step is taken on the way."""

    def score(model):
        return rl.score_logprobs(model, rollouts, cfg, procs)

    ref_logprobs = score(reference) if reference else [r.old_logprobs for r in rollouts]
    for r, logprobs in zip(rollouts, ref_logprobs):
        r.prm_ref_logprobs = logprobs
    ref_logprobs, mask = stack(ref_logprobs)
    outcomes, metrics = torch.tensor([r.correct for r in rollouts]), {}

    def rewards(logprobs):
        return implicit_rewards(stack(logprobs)[0], ref_logprobs, mask, cfg.beta)

    def accuracy(process):
        return pair_accuracy(process.sum(1), outcomes, cfg.group_size)

    if cfg.update == "none":
        process = rewards(score(prm.module.model))
        metrics["pair_accuracy"] = accuracy(process)
    else:
        logprobs, *numbers = train_implicit_prm(prm, rollouts, cfg, procs)
        process, after = rewards(logprobs), rewards(score(prm.module.model))
        metrics = dict(zip(("prm_loss", "prm_grad_norm"), numbers))
        metrics |= {"pair_accuracy": accuracy(process), "pair_accuracy_after": accuracy(after)}
        process = after if cfg.update == "before" else process
    return process, metrics | {"prm": process.sum(1).mean().item()}


def train_implicit_prm(prm, rollouts, cfg, procs):
    """One pass of the PRM over rollouts with `prm_ref_logprobs` -> its log-probs, an array for
    each, from the forward that was trained on; mean loss; gradient norm. With several batches a
    later one is read after the earlier ones' steps."""
    seen, total, size = {}, 0.0, cfg.batch_size or len(rollouts)
    place = {id(r): i for i, r in enumerate(rollouts)}
    for begin in range(0, len(rollouts), size):
        batch = rollouts[begin : begin + size]

        def loss_fn(rows):
            b = data.collate(rows, prm.module.tokenizer.pad_token_id, procs.device)
            mask = b["response_mask"]
            logprobs, _ = prm.forward(b["input_ids"], mask, cfg.temperature)
            arrays = unstack(logprobs.detach().cpu(), mask.cpu())
            seen.update(zip([place[id(r)] for r in rows], arrays))
            ref_logprobs = on_tokens([r.prm_ref_logprobs for r in rows], mask)
            scores = implicit_rewards(logprobs, ref_logprobs, mask, cfg.beta).sum(1)  # (B,)
            losses = F.binary_cross_entropy_with_logits(scores, b["outcomes"], reduction="none")
            return losses.sum() / len(batch)

        loss = accumulate_gradients(prm, batch, cfg.micro_batch_size, loss_fn, procs)
        total += procs.sum(loss)[0] * len(batch) / len(rollouts)
        grad_norm = optimizer_step(prm, cfg.prm_lr, PRM_GRAD_CLIP)
    seen = procs.merge(seen)
    return [seen[i] for i in range(len(rollouts))], total, grad_norm


def shuffled(process, mask, seed, step):
    """The rewards of each response in random order (a control: what does knowing WHERE add?). The
    same on every process."""
    rng, process = np.random.default_rng([seed, step]), process.clone()
    for row, m in zip(process, mask.bool()):
        row[m] = row[m][torch.from_numpy(rng.permutation(int(m.sum())))]
    return process


def show_rewards(procs, tokenizer, rollout, process):
    """Print a response with the process reward of each token, as it enters the advantages."""
    ids = rollout.input_ids[rollout.prompt_length :]
    largest, parts = process.abs().max().item() + 1e-9, []
    for i, reward in zip(ids, process.tolist()):
        parts.append(f"{tokenizer.decode([i])!r} {reward / largest:+.2f}")
    title = f"{rollout.prompt}: correct {rollout.correct:g}; process rewards (largest 1):"
    procs.print(title, ", ".join(parts))


if __name__ == "__main__":
    launch(main, Config, __doc__)
