"""RLVR with a process reward model blended in (TDRM's Algorithm 1): GRPO on verifiable rewards.

A verifier says whether the final answer is right, nothing about the way there. The reward model
adds what it thinks of the state just before the answer; for G responses tau_1..tau_G to one
question

    R_i = alpha * verifiable_i + (1 - alpha) * V(s_T-1 of tau_i)                  blended_rewards
    A_i = (R_i - mean_j R_j) / std_j R_j                                          group_advantages
    loss = - sum_{i,t} min(rho A_i, clip(rho, 1 - e, 1 + e) A_i) / (tokens)       policy_loss
    rho = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)

T is the step that holds the answer: V(s_T) would only repeat what the verifier knows. pi_old are
the log-probs the sampler itself reported (fp32, same temperature, no top-k or top-p), so
`max_ratio_deviation`, logged from the first pass, is a check that the sampled policy is the trained
one. `--alpha 1` is rule-only and loads no reward model, `--alpha 0` is the reward model alone.

`--prm_lr` above 0 keeps the reward model on-policy: after scoring, the same rollouts train it on
their outcomes (tdrm_minimal.py's targets without step labels), so that it does not go stale as the
policy moves. This is ours, not the paper's.

`--credit token` pays every token by a reward model with token scores (Q-RM, ORM, DPO-RM; see
qrm_minimal.py) instead, with `--estimator reinforce` or `ppo`: the last section.

Every process learns all rollouts of a step, so filters, baselines and counts are computed on the
global batch, by every process alike, and rows are then dealt out by length. A group is never split.
Left out: asynchronous sampling (a vLLM beside the trainer), entropy bonus, partial rollouts.

    python rl_minimal.py                                      # built-in policy and TDRM
    python rl_minimal.py --alpha 1                            # rule-only
    python rl_minimal.py --prm_lr 3e-4 --data builtin-hard    # the reward model learns with it
    python rl_minimal.py --credit token --alpha 0 --prm runs/Q-RM/model \\
        --estimator reinforce --kl_reward 1
    torchrun --nproc_per_node=8 rl_minimal.py --model Qwen/Qwen2.5-Math-7B --prm PRM --alpha 0.8 \\
        --data math_level3.jsonl --prompts_per_step 128 --group_size 7 --lr 1e-6 \\
        --system "Please reason step by step, and put your final answer within \\\\boxed{}." \\
        --max_new_tokens 2048 --max_length 2560 --micro_batch_size 2 --grad_checkpoint

Files in --out: as in tdrm_minimal.py; rows of metrics.jsonl also hold clock times (seconds_*). prm/
with --prm_lr.
"""

import os
from dataclasses import dataclass, replace

import numpy as np
import torch

import data
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from parts.answers import answer_step
from parts.credit import Critic, last_token, on_tokens, reinforce_advantages, stack
from parts.credit import token_rewards, unstack
from parts.decoding import longest_context, sample
from parts.formats import BadInput, read_problems, split_steps
from parts.models import check_ids, layout_of, load_policy, load_tokenizer, question_of
from parts.models import torch_dtype
from parts.rewards import load_reward_model
from parts.runs import Run, last_checkpoint, launch, opt
from parts.training import WARMUP, Policy, TrainConfig, accumulate_gradients, learning_rate
from parts.training import optimizer_step, over_rows, prepare, token_logprobs
from parts.verifier import check

GROUPED = ("grpo", "dr_grpo", "rloo")  # estimators that compare responses to one question
LAMBDA = 0.8  # of the generalised advantage estimation


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """What every chapter that trains a policy on its own samples has in common."""

    data: tuple[str, ...] = opt(("builtin",), "builtin[-hard|-choice], or files of problems")
    verifier: str | None = opt(None, "FILE:FUNCTION(response, row) in place of the answer check")
    eval: tuple[str, ...] = opt((), "files of problems; without it: questions held out of --data")
    problems: int | None = opt(None, "training questions; without it: all, or 2000 built-in", low=1)
    steps: int = opt(200, "rounds of sampling, scoring and updating", low=1)
    prompts_per_step: int = opt(32, "questions in a step, over all processes", low=1)
    group_size: int = opt(8, "responses to each question", low=1)
    batch_size: int | None = opt(None, "responses in an optimizer step; without it: all", low=1)
    clip_eps: tuple[float, float] = opt((0.2, 0.2), "clips the ratio below and above 1", low=0.0)
    kl_coef: float = opt(0.0, "weight of the KL to the initial policy in the loss", low=0)
    temperature: float = opt(1.0, "of the policy, sampled and scored", low=0.01)
    max_new_tokens: int = opt(128, "longest response", low=1)
    rows_at_once: int = opt(2048, "rows in one decoding batch (memory only, same result)", low=1)
    lr: float = opt(4e-4, "peak learning rate (for a 7B model: 1e-6)", low=0)
    decay: bool = opt(True, "the learning rate falls to 0; --no-decay: constant after the warmup")
    critic_lr: float = opt(3e-4, "learning rate of the critic, with --estimator ppo", low=0)
    save_every: int = opt(50, "steps between checkpoints; 0: none before the end", low=0)
    eval_every: int = opt(50, "steps between evaluations; 0: only at start and end", low=0)
    eval_problems: int = opt(500, "held-out questions in the evaluation", low=1)


@dataclass(frozen=True)
class Config(RLConfig):
    prm: str | None = opt(None, "reward model; without it: the built-in TDRM")
    alpha: float = opt(0.8, "share of the verifiable reward in the blend", low=0, high=1)
    estimator: str = opt("grpo", "of the advantages", choices=(*GROUPED, "reinforce", "ppo"))
    prm_lr: float = opt(0.0, "learning rate of the reward model on the rollouts; 0: frozen", low=0)
    credit: str = opt("response", "what is paid", choices=("response", "token"))
    kl_reward: float = opt(0.0, "token credit: weight of log pi - log pi_0 in the rewards", low=0)
    gamma: float = opt(0.9, "ppo: discount; 0 for a Q-RM, whose rewards are returns", low=0, high=1)


# --------------------------------------------------------------------------------------------------
# The maths. (N, T) = responses by tokens; the N = P * G responses of a group stand together.


def blended_rewards(verifiable, prm, alpha):
    """alpha * verifiable + (1 - alpha) * prm, both (N,)."""
    return alpha * verifiable + (1 - alpha) * prm


def group_advantages(rewards, group_size, estimator="grpo"):
    """Rewards (N,), groups of `group_size` standing together -> advantages (N,).

    grpo (R - mean) / std, 0 where a group has no spread; dr_grpo (arXiv 2503.20783) R - mean; rloo
    R - mean of the others; reinforce R. ValueError where rewards do not make whole groups, or a
    group of one is its own baseline.
    """
    if rewards.numel() % group_size or (group_size == 1 and estimator != "reinforce"):
        wanted = f"{estimator} wants whole groups, of 2 or more"
        raise ValueError(f"{rewards.numel()} rewards in groups of {group_size}: {wanted}")
    groups = rewards.reshape(-1, group_size).double()  # fp32 would round equal rewards apart
    advantages = groups - groups.mean(1, keepdim=True)  # (P, G)
    if estimator == "grpo":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    elif estimator == "rloo":
        advantages = advantages * group_size / (group_size - 1)
    elif estimator == "reinforce":
        advantages = groups
    return advantages.reshape(rewards.shape).float()


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, count=None):
    """PPO's clipped surrogate, negated: sum over the masked tokens / `count` (default: their
    number).

    logprobs, old_logprobs, mask (N, T); advantages (N, T), or (N,), one for all tokens of a
    response. `clip_eps`: one number, or (below, above). With micro-batches or processes, `count` is
    the global batch's.
    """
    below, above = clip_eps if isinstance(clip_eps, (tuple, list)) else (clip_eps, clip_eps)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1 - below, 1 + above)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # (N, T)
    count = mask.sum().clamp(min=1) if count is None else count
    return -torch.where(mask.bool(), surrogate * mask, 0.0).sum() / count


def kl_divergence(logprobs, other_logprobs):
    """KL(pi || other) at tokens sampled from pi, never negative: the estimator k3 of
    http://joschu.net/blog/kl-approx.html."""
    logratio = other_logprobs - logprobs
    return logratio.exp() - 1 - logratio


# --------------------------------------------------------------------------------------------------
# Algorithm 1.


@dataclass
class Rollout(data.Example):
    """A response of the policy. `correct` is the verifier's word, a number from 0 to 1. Arrays hold
    one number per response token."""

    text: str = ""
    finished: bool = True  # ended by itself, not at max_new_tokens
    failed: bool = False  # the verifier raised: counts as wrong
    old_logprobs: np.ndarray | None = None  # under the policy that sampled it
    initial_logprobs: np.ndarray | None = None  # under the initial policy, for a KL term
    prm_ref_logprobs: np.ndarray | None = None  # under the reference of PRIME's reward model
    advantages: np.ndarray | None = None
    returns: np.ndarray | None = None  # what a critic learns


def main(cfg, procs):
    """Train a policy -> summary (also in summary.json)."""
    # 1) The policy, its questions, the reward model.
    level = data.builtin_level(cfg.data)
    check_credit(cfg)
    cfg = check_options(cfg, "rl", level, procs)
    checkpoint, dtype = last_checkpoint(cfg), torch_dtype(cfg, procs.device)
    policy, initial = load_policies(cfg, dtype, procs, checkpoint, cfg.kl_coef or cfg.kl_reward)
    learners, critic = {"model": policy}, None
    prm, prm_learner = load_prm(cfg, level, dtype, procs, checkpoint, policy.module.tokenizer)
    problems, held_out = load_problems(cfg, level, policy.module, procs, [prm] if prm else [])
    if prm_learner:
        learners["prm"] = prm_learner
    if cfg.estimator == "ppo":
        critic = Critic(checkpoint, dtype, policy.module.tokenizer, cfg, procs)
        learners["critic"] = critic.learner

    run = Run(cfg, procs, checkpoint, cfg.steps, learners)
    if not run.start:
        run.log(**evaluate(policy.module, held_out, cfg, procs))
        run.write(0)
    order = data.batches([0] * len(problems), cfg.prompts_per_step, cfg.seed, run.start)
    for step in run.steps():
        # 2) G responses to each of P questions, verified.
        asked = [problems[i] for i in next(order)]
        rollouts = roll_out(policy.module, asked, step * len(asked), cfg, procs)
        correct = torch.tensor([r.correct for r in rollouts])  # (N,)
        run.lap("sampling")

        # 3) The state before the answer, valued; blended rewards; advantages.
        if initial:
            for r, logprobs in zip(rollouts, score_logprobs(initial, rollouts, cfg, procs)):
                r.initial_logprobs = logprobs
        rewards, values, more = correct, None, {}
        if cfg.credit == "token":
            rewards, more = set_token_advantages(rollouts, prm, critic, cfg, procs)
        else:
            if prm:
                examples = encode_for(prm, rollouts)
                values = prm.score_steps(examples, procs)
                process = before_answer(values, examples)  # (N,)
                rewards = blended_rewards(correct, process, cfg.alpha)
                auroc = tdrm.auroc(process, correct > 0.5)
                more = {"prm": process.mean().item(), "prm_auroc": auroc}
                if not all(values):
                    more["prm_too_long"] = values.count([]) / len(values)
            advantages = group_advantages(rewards, cfg.group_size, cfg.estimator)
            for r, advantage in zip(rollouts, advantages.tolist()):
                r.advantages = np.full(len(r.old_logprobs), advantage, dtype=np.float32)
        run.log(**rollout_metrics(rollouts, rewards, cfg.group_size), **more)
        run.lap("scoring")

        # 4) The policy's update; then the reward model's, on the same rollouts.
        run.log(**update_policy(policy, rollouts, step, cfg, procs))
        if prm_learner:
            run.log(prm_grad_norm=train_reward_model(prm_learner, examples, cfg, procs))
            process = before_answer(prm.score_steps(examples, procs), examples)
            run.log(prm_auroc_after=tdrm.auroc(process, correct > 0.5))
        run.lap("update")

        # 5) Evaluate, with a response to look at.
        if run.evaluates:
            run.log(**evaluate(policy.module, held_out, cfg, procs))
            title = f"step {step + 1}, correct {rollouts[0].correct:g}, reward {rewards[0]:.2f}"
            show(procs, title, rollouts[0], values and values[0])
    if run.stopped:
        return None
    return finish(run, policy.module, held_out, cfg, procs)


def roll_out(policy, problems, first_key, cfg, procs):
    """`group_size` responses to each problem -> Rollouts, groups together, in the problems' order,
    known to all processes. `first_key` + i names problem i for the noise."""
    mine, model = procs.mine(range(len(problems))), policy.model
    asked = [policy.layout.ask(problems[i]["question"]) for i in mine]
    keys, limits = [first_key + i for i in mine], (cfg.temperature, cfg.max_new_tokens)
    options = {"seed": cfg.seed, "keys": keys, "rows_at_once": cfg.rows_at_once}
    samples = sample(model, policy.tokenizer, asked, cfg.group_size, *limits, **options)
    model.train()  # sampling left it in eval mode, in which there is no gradient checkpointing
    groups = {}
    for i, group in zip(mine, samples):
        groups[i] = [as_rollout(problems[i], s, policy.layout, cfg.verifier) for s in group]
    groups = procs.merge(groups)
    return [rollout for i in range(len(problems)) for rollout in groups[i]]


def as_rollout(problem, s, layout, verifier):
    """A verified Sample. Its token ids are the policy's own, its steps are for reward models."""
    correct, failed = check(verifier, s.text, problem)
    return Rollout(
        prompt=problem["question"],
        completions=split_steps(s.text, layout.step_end) or [""],
        input_ids=s.prompt_ids + s.token_ids,
        prompt_length=len(s.prompt_ids),
        step_ends=[],
        correct=correct,
        text=s.text,
        finished=s.finished,
        failed=failed,
        old_logprobs=np.array(s.logprobs, dtype=np.float32),
    )


def encode_for(prm, rollouts):
    """Rollouts as the reward model reads them, in its own tokenizer's ids -> Examples."""
    examples = []
    for r in rollouts:
        ids = prm.encode(r.prompt, r.completions, r.finished)
        examples.append(data.Example(r.prompt, r.completions, *ids, correct=r.correct))
    return examples


def before_answer(values, examples):
    """V(s_T-1) of each rollout, (N,): of the state before the step that holds the answer; a
    response that begins with the answer has only that one. 0 where the reward model's context is
    too short."""
    picked = []
    for v, e in zip(values, examples):
        T = answer_step(e.completions)  # counted from 0
        picked.append(v[max(0, T - 1)] if v else 0.0)
    return torch.tensor(picked)


def update_policy(policy, rollouts, step, cfg, procs):
    """The clipped policy gradient over a step's rollouts with old_logprobs and advantages ->
    metrics."""
    size, pad_id = cfg.batch_size or len(rollouts), policy.module.tokenizer.pad_token_id
    lr, totals, deviation = rate(cfg, step), np.zeros(4), 0.0
    for begin in range(0, len(rollouts), size):
        batch = rollouts[begin : begin + size]
        tokens = sum(len(r.old_logprobs) for r in batch)  # of the global batch
        count = len(batch) * cfg.max_new_tokens if cfg.estimator == "dr_grpo" else tokens
        sums, largest = torch.zeros(3), [0.0]

        def loss_fn(rows):
            b = data.collate(rows, pad_id, procs.device)
            mask = b["response_mask"]  # (B, T-1)
            old_logprobs = on_tokens([r.old_logprobs for r in rows], mask)
            advantages = on_tokens([r.advantages for r in rows], mask)
            logprobs, entropy = policy.forward(b["input_ids"], mask, cfg.temperature)
            loss = policy_loss(logprobs, old_logprobs, advantages, mask, cfg.clip_eps, count)
            if cfg.kl_coef:
                initial_logprobs = on_tokens([r.initial_logprobs for r in rows], mask)
                kl = kl_divergence(logprobs, initial_logprobs)
                loss = loss + cfg.kl_coef * (kl * mask).sum() / count
            ratio = (logprobs.detach() - old_logprobs).exp()  # 1 outside the mask
            above, below = ratio > 1 + cfg.clip_eps[1], ratio < 1 - cfg.clip_eps[0]
            clipped = torch.where(advantages > 0, above, below)
            approx_kl = kl_divergence(old_logprobs, logprobs.detach())
            if procs.mine(batch):  # not where a process only goes through the motions
                for i, x in enumerate((clipped, approx_kl, entropy)):
                    sums[i] += (x * mask).sum().cpu()
                largest.append((ratio - 1).abs().max().item())
            return loss

        accumulate_gradients(policy, batch, cfg.micro_batch_size, loss_fn, procs)
        grad_norm = optimizer_step(policy, lr, cfg.grad_clip)
        totals += [*procs.sum(*sums.tolist()), tokens]
        if begin == 0:  # the policy is still the one that sampled
            largest = procs.merge({procs.rank: float(np.max(largest))})  # of NaN, NaN
            deviation = float(np.max(list(largest.values())))
    clipped, kl, entropy, tokens = totals.tolist()
    return {
        "grad_norm": grad_norm,
        "lr": lr,
        "entropy": entropy / tokens,
        "clip_fraction": clipped / tokens,
        "approx_kl": kl / tokens,
        "max_ratio_deviation": deviation,
    }


def rate(cfg, step):
    """The learning rate of a step, from 0: warmup, then a cosine or constant."""
    if cfg.decay:
        return learning_rate(step, cfg.steps, cfg.lr)
    return cfg.lr * min(1.0, (step + 1) / max(1, round(WARMUP * cfg.steps)))


def train_reward_model(learner, examples, cfg, procs):
    """One step on the rollouts' outcomes: tdrm_minimal.py's loss without step labels -> grad
    norm."""
    states, defaults = sum(len(e.step_ends) for e in examples), tdrm.Config()

    def loss_fn(rows):
        b = data.collate(rows, learner.module.tokenizer.pad_token_id, procs.device)
        logits = tdrm.step_values(learner.forward, b["input_ids"], None, b["step_ends"])
        targets, weights = tdrm.targets_and_weights(defaults, logits, b, labelled=False)
        return tdrm.value_loss(logits, targets, weights, states)

    accumulate_gradients(learner, examples, cfg.micro_batch_size, loss_fn, procs)
    return optimizer_step(learner, cfg.prm_lr, cfg.grad_clip)


# --------------------------------------------------------------------------------------------------
# What goes before and beside the loop.


def check_options(cfg, name, level, procs):
    """Options that only make sense together -> cfg with what follows from others. Raises
    BadInput."""
    if not level and not cfg.model:
        raise BadInput("--data: your own problems need --model, the policy to start from")
    if cfg.group_size == 1 and cfg.estimator in GROUPED:
        why = f"--estimator {cfg.estimator} compares responses to one question"
        raise BadInput(f"--group_size 1: {why}; wanted: 2 or more")
    P, G = cfg.prompts_per_step, cfg.group_size
    if cfg.batch_size and cfg.batch_size > P * G:
        raise BadInput(f"--batch_size {cfg.batch_size}: a step has only {P} x {G} responses")
    if P * G < procs.world:
        raise BadInput(f"--prompts_per_step {P}: fewer responses than the {procs.world} processes")
    out = os.path.join("runs", name + (level or "").removeprefix("builtin"))
    model = cfg.model or sft.builtin_policy(level, procs)
    return replace(cfg, out=cfg.out or out, model=model)


def check_credit(cfg):
    """What each kind of credit can be paid by. Raises BadInput."""
    if cfg.credit == "response":
        if cfg.estimator == "ppo" or cfg.kl_reward:
            which = "--estimator ppo and --kl_reward"
            raise BadInput(f"{which} pay single tokens: wanted --credit token")
        return
    if cfg.estimator not in ("reinforce", "ppo"):
        wanted = f"--estimator reinforce or ppo, not {cfg.estimator}"
        raise BadInput(f"--credit token: wanted {wanted}")
    if cfg.alpha or cfg.prm_lr:
        wanted = "--alpha 0 --prm_lr 0"
        raise BadInput(f"--credit token: a frozen reward model pays; wanted {wanted}")


def load_policies(cfg, dtype, procs, checkpoint, wants_initial):
    """-> the policy's Learner, the initial policy (None where nothing wants it)."""
    name = os.path.join(checkpoint, "model") if checkpoint else cfg.model
    policy = Policy(load_policy(name, dtype), load_tokenizer(name), layout_of(cfg))
    learner, initial = prepare(policy, cfg, procs), None
    if wants_initial:
        initial = load_policy(cfg.model, dtype).to(procs.device)
    return learner, initial


def load_prm(cfg, level, dtype, procs, checkpoint, tokenizer):
    """-> the reward model, its Learner where it learns; None, None without one."""
    if cfg.alpha == 1 and not cfg.prm_lr:
        return None, None
    name = cfg.prm or tdrm.builtin_reward_model(level, procs)
    if checkpoint and cfg.prm_lr:
        name = os.path.join(checkpoint, "prm")
    prm = load_reward_model(name, dtype, procs.device, "--prm")
    if cfg.max_length > prm.longest:
        what = f"the reward model {name} takes at most {prm.longest} tokens"
        raise BadInput(f"--max_length {cfg.max_length}: {what}")
    if cfg.credit == "token" and prm.kind in ("tag", "closing"):
        raise BadInput(f"--credit token: {name} has values of steps, and no numbers of tokens")
    if cfg.credit == "token" and prm.tokenizer.get_vocab() != tokenizer.get_vocab():
        why = f"its tokenizer is not the policy's ({cfg.model})"
        raise BadInput(f"--prm {name}: {why}; it has to score the policy's own tokens")
    if not cfg.prm_lr:
        return prm, None
    if prm.kind != "value":
        wanted = "a TDRM or another token classifier"
        raise BadInput(f"--prm_lr: {name} is no model of step values; wanted: {wanted}")
    return prm, prepare(prm.requires_grad_(True), cfg, procs)


def load_problems(cfg, level, policy, procs, prms=()):
    """-> training and held-out problems. A question that leaves no room for a response is left out
    and counted."""
    if level:
        problems = data.make_problems(cfg.problems or 2000, "train", cfg.seed, level)
        held_out = data.make_problems(cfg.eval_problems, "test", 0, level)
    else:
        problems = list(read_problems(cfg.data))
        if cfg.eval:
            held_out = list(read_problems(cfg.eval))
        else:
            problems, held_out = data.hold_out(problems)
        problems, held_out = problems[: cfg.problems], held_out[: cfg.eval_problems]
    limit = min(cfg.max_length, longest_context(policy.model.config))
    kept, largest = [[], []], 0
    for part, rows in zip(kept, (problems, held_out)):
        for problem in rows:
            source = problem.get("source", "--data")
            ids = search.prompt_ids(policy.tokenizer, problem["question"], cfg, source, prms)
            largest = max([largest, *ids])
            blank = not question_of(problem["question"]).strip()
            if not blank and len(ids) + cfg.max_new_tokens <= limit:
                part.append(problem)
    if not kept[0] or not kept[1]:
        what = "no question leaves room for it within"
        limits = f"{limit} tokens (--max_length, or the model's own limit)"
        raise BadInput(f"--max_new_tokens {cfg.max_new_tokens}: {what} {limits}")
    check_ids(policy.model, policy.tokenizer, [[largest]], cfg.model)
    procs.print(
        f"{len(kept[0])} questions ({len(problems) - len(kept[0])} blank or too long), {cfg.steps} "
        f"steps of {cfg.prompts_per_step} x {cfg.group_size}, {procs.world} processes on "
        f"{procs.device.type}"
    )
    return kept


def score_logprobs(model, rollouts, cfg, procs):
    """log pi of every response token under `model`: an array for each rollout, known to all."""

    def score(part):
        b = data.collate(part, model.config.pad_token_id or 0, procs.device)
        mask = b["response_mask"]
        logprobs, _ = token_logprobs(model, b["input_ids"], mask, cfg.temperature)
        return unstack(logprobs.cpu(), mask.cpu())

    return over_rows(rollouts, score, procs, cfg.micro_batch_size or 64)


def rollout_metrics(rollouts, rewards, group_size):
    """Means over a step's rollouts, before any of them is left out. A group whose rewards are all
    equal teaches nothing."""
    groups = rewards.reshape(-1, group_size)

    def mean(numbers):
        return float(np.mean(list(numbers)))

    return {
        "correct": mean(r.correct for r in rollouts),
        "reward": rewards.mean().item(),
        "response_length": mean(len(r.old_logprobs) for r in rollouts),
        "no_signal": (groups.amax(1) - groups.amin(1) < 1e-6).float().mean().item(),
        "truncated": mean(not r.finished for r in rollouts),
        "verifier_failed": mean(r.failed for r in rollouts),
    }


def evaluate(policy, problems, cfg, procs):
    """Share of held-out questions answered right: by one sample, and by greedy decoding."""
    mine, right = procs.mine(range(len(problems))), []
    asked = [policy.layout.ask(problems[i]["question"]) for i in mine]
    keys = [10**9 + i for i in mine]
    options = {"seed": cfg.seed, "keys": keys, "rows_at_once": cfg.rows_at_once}
    for temperature in (cfg.temperature, 0.0):
        limits = temperature, cfg.max_new_tokens
        samples = sample(policy.model, policy.tokenizer, asked, 1, *limits, **options)
        marks = [check(cfg.verifier, s.text, problems[i])[0] for i, (s,) in zip(mine, samples)]
        right.append(sum(marks))
    policy.model.train()
    sampled, greedy = procs.sum(*right)
    return {"pass@1": sampled / len(problems), "greedy": greedy / len(problems)}


def finish(run, policy, held_out, cfg, procs):
    """The last evaluation; the policy in model/, what else was trained in folders of its own."""
    accuracy = evaluate(policy, held_out, cfg, procs)
    headline = f"pass@1 {accuracy['pass@1']:.3f}, greedy {accuracy['greedy']:.3f}"
    headline += f" on {len(held_out)} held-out questions"
    return run.finish(accuracy | {"questions": len(held_out)}, headline)


def show(procs, title, rollout, values):
    """Print a response, with its step values where there are any."""
    if procs.rank == 0:
        tdrm.print_solution(title, rollout, values or [0.0] * len(rollout.completions))


# --------------------------------------------------------------------------------------------------
# Token credit: REINFORCE or PPO on the scores of a frozen Q-RM, ORM or DPO-RM (arXiv 2505.23363).


def set_token_advantages(rollouts, prm, critic, cfg, procs):
    """Each rollout's `advantages`, from token scores and the KL to the initial policy -> the
    responses' scores (N,), metrics. A frozen reward model can only rate what it has seen: without
    --kl_reward the policy leaves that ground and games it."""
    scores, mask = stack(prm.score_tokens(rollouts, procs))  # (N, T)
    last, total = (scores * last_token(mask)).sum(1), scores.sum(1)
    whole, correct = prm.values(last, total, mask.sum(1)), [r.correct > 0.5 for r in rollouts]
    metrics = {"prm_auroc": tdrm.auroc(whole, correct)}
    metrics |= {"score_mean": scores[mask].mean().item(), "score_std": scores[mask].std().item()}
    rewards = token_rewards(scores, mask, prm.kind)
    if critic and prm.kind in ("orm", "value"):
        rewards = rewards * last_token(mask)
    if cfg.kl_reward:
        logratio, _ = stack([r.old_logprobs - r.initial_logprobs for r in rollouts])
        rewards, metrics["kl"] = rewards - cfg.kl_reward * logratio, logratio[mask].mean().item()
    if critic:
        found = critic.advantages(rewards, mask, rollouts, cfg.gamma, LAMBDA)
        advantages, metrics["critic_loss"] = found
    else:
        advantages = reinforce_advantages(rewards, mask)
    for rollout, advantage in zip(rollouts, unstack(advantages, mask)):
        rollout.advantages = advantage
    return whole, metrics


if __name__ == "__main__":
    launch(main, Config, __doc__)
