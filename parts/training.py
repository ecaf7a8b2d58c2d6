"""The lines under every training loop: log-probs, gradients, optimizer, data parallelism.

  - one process a device, started by torchrun (nccl on GPUs, gloo on CPUs); plain `python` is one;
  - every loss is divided ONCE by the count over the whole global batch, so --micro_batch_size and
    the number of processes change memory and speed, never the result;
  - plain DDP; bf16 weights and gradients, with fp32 masters and AdamW moments sharded over the
    processes;
  - a step whose gradient is not finite is skipped on all processes alike, and counted.

A step of a chapter's loop, with a Learner, is

    loss = accumulate_gradients(learner, batch, cfg.micro_batch_size, loss_fn, procs)
    grad_norm = optimizer_step(learner, learning_rate(step, steps, cfg.lr), cfg.grad_clip)

Left out: LoRA, FSDP, packing.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute

from parts.formats import BadInput
from parts.models import STEP_ENDS, Layout, save_model, token_logits
from parts.runs import opt

WARMUP = 0.03  # share of the steps in which the learning rate rises
WEIGHT_DECAY = 1e-3  # of AdamW, not on biases and norms
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """The options of every training script. The same words mean the same thing everywhere."""

    model: str | None = opt(None, "Hugging Face name or folder; without it: the built-in policy")
    data: tuple[str, ...] = opt(("builtin",), "builtin[-hard|-choice], or trajectory files")
    out: str | None = opt(None, "folder of the run; without it: runs/ and the script's name")
    steps: int | None = opt(None, "optimizer steps; without it: one pass over the data", low=1)
    batch_size: int = opt(64, "rows in a global batch, over all processes", low=1)
    micro_batch_size: int | None = opt(None, "rows in one forward (memory, same result)", low=1)
    max_length: int = opt(2048, "longest prompt + response in tokens; others are left out", low=2)
    lr: float = opt(1e-3, "peak learning rate", low=0)
    grad_clip: float = opt(1.0, "largest gradient norm; 0: no clipping", low=0)
    dtype: str = opt("auto", "weights; auto: bfloat16 on GPUs only", choices=DTYPES)
    grad_checkpoint: bool = opt(False, "recompute activations: less memory, a third more time")
    compile: bool = opt(False, "torch.compile the layers: slow to start, then 5 to 20% faster")
    prompt: str = opt("{question}", "what the model is asked, with {question} in it")
    system: str | None = opt(None, "a system turn before the question")
    step_end: str = opt("blank", "what ends a step: a blank line, or a line", choices=STEP_ENDS)
    seed: int = opt(0, "of the data and its order", low=0, high=2**32 - 1)
    save_every: int = opt(200, "steps between checkpoints; 0: none before the end", low=0)
    eval_every: int = opt(200, "steps between evaluations; 0: only at the end", low=0)
    resume: bool = opt(False, "continue from the last checkpoint in --out, if there is one")


# --------------------------------------------------------------------------------------------------
# Log-probs of tokens.


def token_logprobs(model, input_ids, mask, temperature=1.0, at_once=2**25):
    """log pi(input_ids[:, t+1] | input_ids[:, :t+1]) in fp32, and the entropy of that distribution
    (no gradient), where `mask` (B, T-1) is True, 0 elsewhere: input_ids (B, T) -> two (B, T-1).

    Only the tokens asked for go through the vocabulary projection, `at_once` logits at a time, and
    the backward pass makes them again: the array (tokens x vocabulary) is never there whole.
    Comes along: hidden_states, takes_cache; token_logits of parts/models.py; `recompute`,
    torch.utils.checkpoint.checkpoint.
    """
    hidden, targets = hidden_states(model, input_ids, mask), input_ids[:, 1:][mask]  # (n, .), (n,)

    def project(hidden, targets):
        # No name for the logits: it would keep one array of (tokens of a chunk, V) more.
        logp = F.log_softmax(token_logits(model, hidden).float() / temperature, dim=-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(1, targets[:, None])[:, 0], entropy

    size = max(1, at_once // model.get_output_embeddings().weight.shape[0])
    if len(hidden) <= size:
        chunks = [project(hidden, targets)]
    else:
        pairs = zip(hidden.split(size), targets.split(size))
        chunks = [recompute(project, h, t, use_reentrant=False) for h, t in pairs]
    blank = hidden.new_zeros(mask.shape, dtype=torch.float32)
    logprobs, entropy = (torch.cat(parts) for parts in zip(*chunks))
    return blank.masked_scatter(mask, logprobs), blank.masked_scatter(mask, entropy)


def hidden_states(model, input_ids, mask):
    """Last hidden states of the tokens before those that `mask` asks for: input_ids (B, T), mask
    (B, T-1) -> (n, hidden), row by row.

    What stands before a row's first token asked for is its prompt. One that several rows share is
    read once, and their other tokens behind a cache of it, where that spares a fifth of the tokens.
    """
    (B, T), slots = input_ids.shape, torch.arange(input_ids.shape[1], device=input_ids.device)
    lengths = mask.int().argmax(1) + 1  # (B,) tokens of the prompts
    P, R = int(lengths.max()), int((mask * slots[1:] - lengths[:, None]).max()) + 1
    prompts = input_ids[:, :P].where(slots[:P] < lengths[:, None], -1)  # (B, P)
    prompts, rows = prompts.unique(dim=0, return_inverse=True)  # (U, P), the prompt of each row
    spares = R > 1 and prompts.numel() + B * (R - 1) < 0.8 * B * T
    if not spares or not takes_cache(model):
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden[:, :-1][mask]
    before = model.base_model(input_ids=prompts.clamp(min=0), use_cache=True)
    cache = before.past_key_values
    cache.batch_select_indices(rows)
    at = (lengths[:, None] - 1 + slots[:R]).clamp(max=T - 1)  # (B, R) places of the states wanted
    real = F.pad(slots[:P] < lengths[:, None], (0, R - 1), value=True)  # (B, P + R-1)
    options = {"attention_mask": real.long(), "position_ids": at[:, 1:], "past_key_values": cache}
    after = model.base_model(input_ids=input_ids.gather(1, at[:, 1:]), **options)
    last = before.last_hidden_state[rows, lengths - 1]  # (B, hidden)
    hidden = torch.cat([last[:, None], after.last_hidden_state], 1)  # (B, R, hidden)
    return hidden[F.pad(mask, (0, 1)).gather(1, at)]


def takes_cache(model):
    """Not where activations are recomputed, where layers see less than the whole text, or where
    they have their places in a cache shared with another model (a reference, parts/rewards.py)."""
    if next((m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")), 0):
        return False
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    whole = set(kinds) == {"full_attention"} and not getattr(model.config, "sliding_window", None)
    return whole and not getattr(model, "is_activation_checkpointing", True)


class Policy(torch.nn.Module):
    """A causal LM as the map from tokens to their log-probs. DDP needs the forward to be one
    module's."""

    def __init__(self, model, tokenizer, layout=Layout()):
        super().__init__()
        self.model, self.tokenizer, self.layout = model, tokenizer, layout

    def forward(self, input_ids, mask, temperature=1.0):
        return token_logprobs(self.model, input_ids, mask, temperature)

    def save(self, folder):
        save_model(folder, self.model, self.tokenizer)

    def describe(self, folder):
        """Nothing beside the Hugging Face folder: the run's config.json has --prompt and --system."""


# --------------------------------------------------------------------------------------------------
# Gradients.


def accumulate_gradients(learner, batch, micro_batch_size, loss_fn, procs):
    """Add this process's gradients of `loss_fn(micro-batch)` for its rows of a global batch; DDP
    sums them over the processes, once, at the end. Returns this process's share of the loss, a
    float.

    Rows are dealt in order of length, so that all processes have about equal work. `loss_fn`
    returns a micro-batch's share of the global loss, already divided by the GLOBAL count: sums are
    all that is left to do.
    """
    rows, weight, total = procs.mine(sorted(batch, key=len)), procs.world, 0.0
    if not rows:  # the others would wait for this process: it goes through the motions
        rows, weight = batch[:1], 0
    size = micro_batch_size or len(rows)
    for start in range(0, len(rows), size):
        last = start + size >= len(rows)
        alone = last or procs.world == 1
        with contextlib.nullcontext() if alone else learner.forward.no_sync():
            loss = loss_fn(rows[start : start + size])
            (loss * weight).backward()  # DDP divides by the number of processes; we want the sum
        total += loss.item() if weight else 0.0
    return total


def optimizer_step(learner, lr, grad_clip):
    """Clip, step, clear -> gradient norm before clipping. Where it is not finite nothing is changed
    but a count, on every process alike, since DDP has already summed the gradients."""
    model, optimizer = learner.module.model, learner.optimizer
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        learner.skipped += 1
    model.zero_grad(set_to_none=not dist.is_initialized())  # in DDP they live in its buckets
    return grad_norm


def learning_rate(step, steps, peak, warmup=WARMUP):
    """Linear warmup over the first `warmup` share of the steps, then a cosine down to 0. `step`
    counts from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# --------------------------------------------------------------------------------------------------
# The optimizer.


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on fp32 copies of the weights. A bf16 weight near 1 cannot move by less than 0.004; at
    a learning rate of 1e-6 it would never move at all. fp32 weights are their own masters."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.masters, groups = {}, []
        for group in self.param_groups:
            for p in group["params"]:
                self.masters[p] = p if p.dtype == torch.float32 else p.detach().float()
            groups.append({**group, "params": [self.masters[p] for p in group["params"]]})
        self.adamw = torch.optim.AdamW(groups, fused=True)

    @torch.no_grad()
    def step(self):
        for group, mine in zip(self.adamw.param_groups, self.param_groups):
            group["lr"] = mine["lr"]
        copies = [(p, master) for p, master in self.masters.items() if p is not master]
        for p, master in copies:
            master.grad = p.grad.float()
        self.adamw.step()
        for p, master in copies:
            p.copy_(master)
            master.grad = None

    def state_of(self, p):
        """A parameter's moments, and its master where that is a copy: nothing depends on how these
        are sharded."""
        master = self.masters[p]
        return self.adamw.state[master] | ({} if p is master else {"master": master})

    @torch.no_grad()
    def load_state(self, p, state):
        master = self.masters[p]
        state = {name: tensor.to(p.device, copy=True) for name, tensor in state.items()}
        if p is not master:
            master.copy_(state.pop("master"))
        self.adamw.state[master] = state


def make_optimizer(model, procs):
    """AdamW for `model`, its states and masters sharded over the processes: 12 / world bytes a
    parameter beside the 4 of bf16 weights and gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY}
    rest = {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}
    options = {"lr": 0.0, "betas": (0.9, 0.98), "weight_decay": 0.0}
    if procs.world == 1:
        return MasterAdamW([matrices, rest], **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options["parameters_as_bucket_view"] = True
    return ZeroRedundancyOptimizer([matrices, rest], MasterAdamW, **options)


# --------------------------------------------------------------------------------------------------
# A model that learns.


@dataclass
class Learner:
    """A model in training. `module` is a Policy or a RewardModel around `module.model`, `forward`
    the same in DDP."""

    module: torch.nn.Module
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    skipped: int = 0  # steps whose gradient was not finite


def prepare(module, cfg, procs):
    """Check what the model can take, move it to its device, wrap it in DDP, give it an optimizer ->
    Learner."""
    model = module.model
    if cfg.batch_size and cfg.batch_size < procs.world:
        what = f"fewer rows than the {procs.world} processes"
        raise BadInput(f"--batch_size {cfg.batch_size}: {what}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and cfg.max_length > limit:
        raise BadInput(f"--max_length {cfg.max_length}: the model takes at most {limit} tokens")
    module.to(procs.device).train()
    if cfg.compile:
        for layer in model.modules():
            if type(layer).__name__.endswith("DecoderLayer"):
                layer.compile(dynamic=True)  # layer by layer: one compilation serves all of them
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = module
    if procs.world > 1:
        devices = [procs.device] if procs.device.type == "cuda" else None
        options = {"gradient_as_bucket_view": True, "forward_sync_buffers": False}
        forward = DDP(module, device_ids=devices, **options)
        fill_buckets(forward, model, procs.device)
    return Learner(module, forward, make_optimizer(model, procs))


def fill_buckets(forward, model, device):
    """A backward pass of nothing puts the gradients into DDP's buckets, where zero_grad leaves
    them. Else those of several micro-batches would be summed outside first: as many bytes again as
    the weights. (After the first, DDP rearranges its buckets; so it takes two.)"""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    for keep in (False, True):
        output = forward(ids, ids[:, 1:] == 0)
        output = output[0] if isinstance(output, tuple) else output.logits
        (output.sum() * 0).backward()
        model.zero_grad(set_to_none=not keep)


# --------------------------------------------------------------------------------------------------
# Forward passes without gradients over many rows.


@torch.no_grad()
def over_rows(rows, function, procs, rows_at_once=64):
    """`function(list of rows) -> list of results` for all rows, in order of length, split over the
    processes and known to all of them; `rows_at_once` rows and 65,536 tokens at most together -> a
    result for each row."""
    order = procs.mine(sorted(range(len(rows)), key=lambda i: -len(rows[i])))
    results = {}
    while order:
        size = min(rows_at_once, max(1, 2**16 // len(rows[order[0]])))
        part, order = order[:size], order[size:]
        results.update(zip(part, function([rows[i] for i in part])))
    results = procs.merge(results)
    return [results[i] for i in range(len(rows))]
