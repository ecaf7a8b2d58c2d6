"""Credit for single tokens: what is paid where, returns, and a critic with generalised advantages.

(N, T) = responses by response tokens, mask (N, T) True where real, of the GLOBAL batch; numbers per
token travel as one array a response (`stack` makes them a tensor, `unstack` arrays again).
"""

import os

import numpy as np
import torch
import torch.nn.functional as F

from parts.rewards import new_reward_model, pad_rows
from parts.training import accumulate_gradients, optimizer_step, over_rows, prepare


def stack(arrays):
    """Arrays of one number per response token -> (N, T), mask (N, T)."""
    lengths = torch.tensor([len(array) for array in arrays])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    numbers = torch.from_numpy(np.concatenate(arrays)).float()
    return torch.zeros(mask.shape).masked_scatter(mask, numbers), mask


def unstack(numbers, mask):
    """(N, T), mask (N, T) -> an array for each response."""
    return [row[m].numpy() for row, m in zip(numbers, mask.bool())]


def on_tokens(arrays, mask):
    """Arrays of one number per response token -> (B, T-1), each at its token, 0 outside the mask."""
    numbers = torch.from_numpy(np.concatenate(arrays)).float().to(mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, numbers)


def last_token(mask):
    """(N, T), 1 on each row's last token."""
    return mask * (mask.flip(1).cumsum(1).flip(1) == 1)


def returns(rewards, mask, gamma=1.0):
    """Discounted sums of rewards from each token to the response's end: (N, T)."""
    total, sums = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] * mask[:, t] + gamma * total
        sums[:, t] = total
    return sums * mask


def whiten(advantages, mask):
    """Mean 0 and (unbiased) variance 1 over the masked tokens."""
    values = advantages[mask.bool()]
    variance = values.var() if len(values) > 1 else torch.zeros(())
    return (advantages - values.mean()) * (variance + 1e-8).rsqrt() * mask


def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438) over response tokens -> advantages,
    returns, both (N, T). Comes along: returns.

    delta_t = r_t + gamma V_t+1 - V_t, V = 0 after the end;  A_t = delta_t + gamma lam A_t+1;
    return_t = A_t + V_t. With gamma = 0, for rewards that are returns already: A_t = r_t - V_t.
    """
    values = values * mask
    next_values = F.pad(values, (0, 1))[:, 1:]
    advantages = returns(rewards + gamma * next_values - values, mask, gamma * lam)
    return advantages, (advantages + values) * mask


def token_rewards(scores, mask, kind="qrm"):
    """What a token is paid (N, T): its score, standardised over the batch's tokens (the paper's
    Algorithm 1), for the level of scores is arbitrary. An ORM knows only the last token's: paid to
    all.
    """
    if kind in ("orm", "value"):
        scores = (scores * last_token(mask)).sum(1, keepdim=True) * mask
    return whiten(scores, mask.float())


def reinforce_advantages(rewards, mask):
    """A_t = r_t, for a Q value is a return already; the last token's is the response's mean:
    whether to end is a matter of the whole response."""
    mean = (rewards * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return torch.where(last_token(mask).bool(), mean, rewards)


class Critic:
    """V(x, y_<t) of every response token, read one token earlier, before y_t is known: the initial
    policy with a new head, trained by squared error towards returns."""

    def __init__(self, checkpoint, dtype, tokenizer, cfg, procs):
        name = os.path.join(checkpoint, "critic") if checkpoint else cfg.model
        module = new_reward_model(name, tokenizer, dtype, cfg.seed)
        self.learner, self.cfg, self.procs = prepare(module, cfg, procs), cfg, procs

    def token_values(self, forward, rows):
        """-> (B, T-1) values, (B, T-1) mask, in data.collate's layout."""
        pad_id = self.learner.module.tokenizer.pad_token_id
        ids, mask, *_ = pad_rows(rows, pad_id, self.procs.device)
        return forward(ids).logits[:, :-1, 0], mask

    def values(self, rows):
        """An array for each row, split over the processes, known to all."""

        def value(part):
            values, mask = self.token_values(self.learner.module, part)
            return unstack(values.cpu(), mask.cpu())

        return over_rows(rows, value, self.procs)

    def train(self, rows):
        """One step towards each row's `returns`, over the tokens of the global batch -> loss."""
        tokens = sum(len(row.returns) for row in rows)

        def loss_fn(part):
            values, mask = self.token_values(self.learner.forward, part)
            goals = on_tokens([row.returns for row in part], mask)
            return ((values - goals).square() * mask).sum() / tokens

        size = self.cfg.micro_batch_size
        loss = accumulate_gradients(self.learner, rows, size, loss_fn, self.procs)
        optimizer_step(self.learner, self.cfg.critic_lr, self.cfg.grad_clip)
        return self.procs.sum(loss)[0]

    def advantages(self, rewards, mask, rows, gamma, lam):
        """GAE of token rewards (N, T) by this critic, which then takes its step -> (N, T), loss."""
        values, _ = stack(self.values(rows))
        advantages, goals = gae(rewards, values, mask.float(), gamma, lam)
        for row, goal in zip(rows, unstack(goals, mask)):
            row.returns = goal
        return advantages, self.train(rows)
