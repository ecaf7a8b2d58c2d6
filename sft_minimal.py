"""Supervised fine-tuning: the training loop of every chapter, explained once.

A policy pi(y|x) learns to write the worked solutions it is shown: with response tokens y_1..y_n after the prompt x,

    loss = - sum_{rows, t} log pi(y_t | x, y_<t) / (response tokens of the whole global batch)

What this file is really about is the loop around that line, which later chapters import piece by piece:
  - one process per device, started by torchrun (nccl on GPUs, gloo on CPUs); `python sft_minimal.py` is one process;
  - every loss is divided ONCE by the count over the whole global batch, so `--micro_batch_size` and the number of
    processes change memory and speed, never the result;
  - plain DDP; bf16 weights and gradients, with fp32 master weights and AdamW moments sharded over the processes;
  - a step whose gradient is not finite is skipped on all processes alike, and counted;
  - checkpoints are written to a temporary folder and renamed; a resumed run continues bitwise, its batches being a pure
    function of (seed, step). Clock times are on screen, not in metrics.jsonl, so two equal runs write equal files.

With no options it trains the built-in policy (134k parameters) that the other chapters start from.
Left out: packing, LoRA, FSDP.

    python sft_minimal.py                                                    # the built-in policy
    python sft_minimal.py --data builtin-hard                                # the one for long chains
    torchrun --nproc_per_node=8 sft_minimal.py --model Qwen/Qwen2.5-Math-7B --data solutions.jsonl \\
        --lr 1e-5 --batch_size 128 --micro_batch_size 2 --grad_checkpoint    # rows: {"prompt", "completions", "answer"}

Files in --out: config.json, metrics.jsonl, summary.json, model/ (a Hugging Face folder), state/ (for --resume).
"""
import contextlib
import dataclasses
import math
import os
import shutil
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute

import data
from data import BadInput
from plumbing import Env, parse, setup  # noqa: F401  (for the other chapters)
from plumbing import Log, all_sum, barrier, catch_signals, last_checkpoint, launch, open_run, opt, write_json


# --------------------------------------------------------------------------------------------------
# Config: the options of every training script. The same words mean the same thing everywhere.

@dataclass(frozen=True)
class TrainConfig:
    model: str = opt("", "Hugging Face name or folder to start from; empty: the built-in one")
    data: tuple = opt(("builtin",), "builtin, builtin-hard, or trajectory files")
    out: str = opt("", "folder of the run; empty: runs/NAME")
    steps: int = opt(0, "optimizer steps; 0: one pass over the data", low=0)
    batch_size: int = opt(64, "rows in a global batch, over all processes", low=1)
    micro_batch_size: int = opt(0, "rows of a process in one forward; 0: all of them (memory only, same result)", low=0)
    max_length: int = opt(2048, "longest prompt + response in tokens; longer rows are dropped and counted", low=2)
    lr: float = opt(1e-3, "peak learning rate", low=0)
    warmup: float = opt(0.03, "share of the steps in which the learning rate rises", low=0, high=1)
    weight_decay: float = opt(1e-3, "AdamW weight decay (not on biases and norms)", low=0)
    grad_clip: float = opt(1.0, "largest gradient norm; 0: no clipping", low=0)
    dtype: str = opt("auto", "weights, gradients; auto: bfloat16 on GPUs only", choices=("auto", "float32", "bfloat16"))
    grad_checkpoint: bool = opt(False, "recompute activations in the backward pass: less memory, a third more time")
    compile: bool = opt(False, "torch.compile the layers: slow to start, then 5 to 20% faster")
    seed: int = opt(0, "of the data and its order", low=0, high=2**32 - 1)
    save_every: int = opt(200, "steps between checkpoints; 0: none before the end", low=0)
    eval_every: int = opt(200, "steps between evaluations; 0: only at the end", low=0)
    resume: bool = opt(False, "continue from the last checkpoint in --out; start from scratch if there is none")
    estimate: bool = opt(False, "only say how much memory this run would take, from the model's config")
    world: int = opt(0, "--estimate: for so many processes; 0: as many as torchrun starts", low=0)
    card_gib: float = opt(80.0, "--estimate: memory of a card in GiB", low=0.1)


@dataclass(frozen=True)
class Config(TrainConfig):
    lr: float = opt(4e-3, "peak learning rate (for a 7B model: 1e-5)", low=0)
    max_new_tokens: int = opt(256, "longest response sampled in the evaluation", low=1)
    eval_problems: int = opt(500, "held-out questions in the evaluation", low=1)


# --------------------------------------------------------------------------------------------------
# The maths of a step: loss, schedule, gradients, optimizer.

def token_logprobs(model, input_ids, mask, temperature=1.0, at_once=2**25):
    """log pi(input_ids[:, t+1] | input_ids[:, :t+1]) in fp32, and the entropy of that distribution (no gradient), where
    `mask` (B, T-1) is True, 0 elsewhere: input_ids (B, T) -> two (B, T-1).

    Only the tokens asked for go through the vocabulary projection, `at_once` logits at a time, and the backward pass
    makes them again: the array (tokens x vocabulary) is never there whole.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1][mask]  # (n, hidden)
    targets, head = input_ids[:, 1:][mask], model.get_output_embeddings()

    def project(hidden, targets):
        logp = F.log_softmax(head(hidden).float() / temperature, dim=-1)  # (tokens of a chunk, V)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(1, targets[:, None])[:, 0], entropy

    size = max(1, at_once // head.weight.shape[0])
    if len(hidden) <= size:
        parts = [project(hidden, targets)]
    else:
        parts = [recompute(project, h, t, use_reentrant=False) for h, t in zip(hidden.split(size), targets.split(size))]
    blank = hidden.new_zeros(mask.shape, dtype=torch.float32)
    return tuple(blank.masked_scatter(mask, torch.cat(column)) for column in zip(*parts))


class Policy(torch.nn.Module):
    """A causal LM as the map from tokens to their log-probs. DDP needs the forward to be one module's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, mask, temperature=1.0):
        return token_logprobs(self.model, input_ids, mask, temperature)


def learning_rate(step, steps, peak, warmup):
    """Linear warmup over the first `warmup` share of the steps, then a cosine down to 0. `step` counts from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def local_rows(batch, env):
    """This process's rows of a global batch. Dealt in order of length, so that all processes have about equal work."""
    return sorted(batch, key=lambda example: len(example["input_ids"]))[env.rank::env.world]


def accumulate_gradients(model, examples, micro_batch_size, loss_fn, env):
    """Add this process's gradients of `loss_fn(micro-batch)`; DDP sums them over the processes, once, at the end.

    `loss_fn` returns a micro-batch's share of the global loss, already divided by the GLOBAL count: sums are all that
    is left to do. Returns this process's share of the loss, a float.
    """
    total, size = 0.0, micro_batch_size or len(examples)
    for start in range(0, len(examples), size):
        last = start + size >= len(examples)
        with contextlib.nullcontext() if last or env.world == 1 else model.no_sync():
            loss = loss_fn(examples[start:start + size])
            (loss * env.world).backward()  # DDP divides by the number of processes; we want the sum
        total += loss.item()
    return total


def optimizer_step(model, optimizer, lr, grad_clip):
    """Clip, step, clear -> gradient norm before clipping. Where it is not finite nothing is changed, on every process
    alike, since DDP has already summed the gradients."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    model.zero_grad(set_to_none=not dist.is_initialized())  # in DDP they live in its buckets
    return grad_norm


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on fp32 copies of the weights. A bf16 weight near 1 cannot move by less than 0.004; at a learning rate of
    1e-6 it would never move at all. fp32 weights are their own masters."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.masters = {p: p if p.dtype == torch.float32 else p.detach().float()
                        for group in self.param_groups for p in group["params"]}
        groups = [{**group, "params": [self.masters[p] for p in group["params"]]} for group in self.param_groups]
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

    def states(self):
        """{parameter: its moments, and its master where that is a copy}: nothing depends on how these are sharded."""
        return {p: self.adamw.state[master] | ({} if p is master else {"master": master})
                for p, master in self.masters.items()}

    @torch.no_grad()
    def load_state(self, p, state):
        master, state = self.masters[p], {name: tensor.to(p.device, copy=True) for name, tensor in state.items()}
        if p is not master:
            master.copy_(state.pop("master"))
        self.adamw.state[master] = state


def make_optimizer(model, cfg, env):
    """AdamW for `model`, its states and masters sharded over the processes: 12 / world bytes a parameter beside the 4
    of bf16 weights and gradients."""
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    options = {"lr": cfg.lr, "betas": (0.9, 0.98), "weight_decay": 0.0}
    if env.world == 1:
        return MasterAdamW(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(groups, MasterAdamW, parameters_as_bucket_view=True, **options)


# --------------------------------------------------------------------------------------------------
# Models: loading, wrapping, saving.

def torch_dtype(cfg, env):
    name = {"auto": "bfloat16" if env.device.type == "cuda" else "float32"}.get(cfg.dtype, cfg.dtype)
    return getattr(torch, name)


def prepare(model, cfg, env, view=None):
    """Move the model to its device, check what it can take, switch checkpointing on, wrap `view(model)`, or the model
    itself, in DDP -> model, wrapped."""
    if cfg.batch_size < env.world:
        raise BadInput(f"--batch_size {cfg.batch_size}: fewer rows than the {env.world} processes")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and cfg.max_length > limit:
        raise BadInput(f"--max_length {cfg.max_length}: the model takes at most {limit} tokens")
    model.to(env.device).train()
    if cfg.compile:
        for layer in [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]:
            layer.compile(dynamic=True)  # layer by layer: one compilation serves all of them
    if cfg.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = view(model) if view else model
    if env.world == 1:
        return model, module
    wrapped = DDP(module, device_ids=[env.device] if env.device.type == "cuda" else None, gradient_as_bucket_view=True,
                  forward_sync_buffers=False)
    # A backward pass of nothing puts the gradients into DDP's buckets, where zero_grad leaves them. Else those of several
    # micro-batches would be summed outside first: as many bytes again as the weights. (After the first, DDP rearranges
    # its buckets; so it takes two.)
    ids = torch.zeros(1, 2, dtype=torch.long, device=env.device)
    for keep in (False, True):
        output = wrapped(ids, ids[:, 1:] == 0)[0] if view else wrapped(input_ids=ids, use_cache=False).logits
        (output.sum() * 0).backward()
        model.zero_grad(set_to_none=not keep)
    return model, wrapped


def new_policy(tokenizer, seed):
    """The built-in policy, untrained: a small Qwen2. The wide init (0.1, not 0.02) lets one so small learn early."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))


def save_model(folder, model, tokenizer):
    """Write a Hugging Face folder so that it is there whole or not at all."""
    shutil.rmtree(folder + ".tmp", ignore_errors=True)
    model.save_pretrained(folder + ".tmp")
    tokenizer.save_pretrained(folder + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(folder + ".tmp", folder)


# --------------------------------------------------------------------------------------------------
# Checkpoints.

def save_checkpoint(cfg, env, step, model, tokenizer, optimizer, **others):
    """All of a run's state after `step` steps, as state/step_N. It appears by one rename when every process has written
    its part, so a run killed at any moment finds either this checkpoint or the one before. Further models of the run
    come as name=(model, tokenizer, optimizer) and are saved in a folder of that name."""
    folder = os.path.join(cfg.out, "state", f"step_{step:08d}")
    if os.path.exists(folder):
        return
    tmp = os.path.join(cfg.out, "state", "tmp")
    if env.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)  # what a run killed while saving left behind
        os.makedirs(tmp)
    barrier(env)
    models = {"": (model, tokenizer, optimizer)} | others
    state = {"step": step, "world": env.world, "rng": torch.get_rng_state(),
             "cuda_rng": torch.cuda.get_rng_state() if env.device.type == "cuda" else None,
             "optimizers": {name: optimizer_states(m, opt) for name, (m, _, opt) in models.items()}}
    try:
        torch.save(state, os.path.join(tmp, f"rank{env.rank}.pt"))
        for name, (m, tok, _) in models.items() if env.rank == 0 else ():
            m.save_pretrained(os.path.join(tmp, name))
            tok.save_pretrained(os.path.join(tmp, name))
    except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, by who meets it
        raise BadInput(f"--out {cfg.out}: the checkpoint of step {step} could not be written "
                       f"({str(error).splitlines()[0]}); the one before it is whole, --resume continues from there") from None
    barrier(env)
    if env.rank == 0:
        os.rename(tmp, folder)
        states = os.path.join(cfg.out, "state")
        for name in sorted(os.listdir(states))[:-2]:  # the one before stays, should this one's files be damaged
            shutil.rmtree(os.path.join(states, name))


def optimizer_states(model, optimizer):
    """{index of a parameter in model.parameters(): its state}, for those whose state this process holds."""
    states = getattr(optimizer, "optim", optimizer).states()  # `optim`: this process's share of a sharded one
    return {i: states[p] for i, p in enumerate(model.parameters()) if p in states}


def load_checkpoint(folder, env, model, optimizer, **others):
    """Optimizer and random state from a checkpoint (the weights are loaded as from any model folder) -> steps done.

    On another number of processes each takes the masters and moments it now holds from whichever wrote them."""
    files = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".pt")]
    states = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in files]
    for name, (model, optimizer) in ({"": (model, optimizer)} | others).items():
        local, saved = getattr(optimizer, "optim", optimizer), {}
        for state in states:
            saved |= state["optimizers"][name]
        for i, p in enumerate(model.parameters()):
            if p in local.masters:
                local.load_state(p, saved[i])
    if len(states) == env.world:
        mine = next(state for state, path in zip(states, files) if path.endswith(f"rank{env.rank}.pt"))
        torch.set_rng_state(mine["rng"].clone())
        if mine["cuda_rng"] is not None:
            torch.cuda.set_rng_state(mine["cuda_rng"].clone())
    return states[0]["step"]


# --------------------------------------------------------------------------------------------------
# This chapter's own part: solutions to learn from, and how good the policy is.

def load_data(cfg, tokenizer):
    """-> training examples, held-out rows."""
    level = cfg.data[0]
    if level in data.LEVELS:
        n = {"builtin": 600, "builtin-hard": 1200}[level] * 64  # so that one pass is as long as the policy needs
        problems = data.make_problems(n // 4, "train", cfg.seed, level)
        rows = data.make_trajectories(problems, 4, seed=cfg.seed, level=level)
        held_out = data.make_trajectories(data.make_problems(cfg.eval_problems, "test", 0, level), seed=1, level=level)
    else:
        rows, held_out = data.hold_out(list(data.read_trajectories(cfg.data)))
        lacking = next((row for row in held_out if row["answer"] is None), None)
        if lacking:
            raise BadInput(f"{lacking['source']}: there is no 'answer' to check sampled responses against")
        rows = [row for row in rows if row["correct"] is not False]  # a wrong solution is nothing to imitate
    examples, dropped = data.encode_rows(rows, tokenizer, cfg.max_length, eos=True)
    held_out = list({str(row["prompt"]): row for row in held_out}.values())  # one a question: only its answer is used
    return examples, held_out[:cfg.eval_problems], dropped


def sft_loss(policy, batch, tokens):
    """Negative log-likelihood of the response tokens, divided by `tokens`, their number in the whole global batch."""
    return -policy(batch["input_ids"], batch["response_mask"])[0].sum() / tokens


@torch.no_grad()
def pass_at_1(model, tokenizer, rows, cfg, env, rows_at_once=256):
    """Share of questions answered right by one sample (temperature 1). The questions are split over the processes.

    Plain `generate` of the library; how sampling works is the subject of search_minimal.py."""
    mine, right = rows[env.rank::env.world], 0
    model.eval()
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        for start in range(0, len(mine), rows_at_once):
            chunk = mine[start:start + rows_at_once]
            prompts = [data.encode_prompt(tokenizer, row["prompt"]) for row in chunk]
            padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(env.device)
            ids = model.generate(**padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                                 max_new_tokens=cfg.max_new_tokens, pad_token_id=tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(ids[:, padded["input_ids"].shape[1]:], skip_special_tokens=True)
            right += sum(data.verify(text, row["answer"]) for text, row in zip(texts, chunk))
    model.train()
    right, total = all_sum(right, len(mine), env=env)
    return right / max(1, total)


def main(cfg, env):
    """Train a policy -> summary (also in summary.json). Other chapters call this to make the built-in policy."""
    # 1) The run's folder and its data. Every process reads all of the data and takes its share of each batch.
    level = data.builtin_level(cfg.data)
    cfg = dataclasses.replace(cfg, out=cfg.out or default_policy(level or "builtin"))
    if not level and not cfg.model:
        raise BadInput("--data: your own solutions need --model, the policy to start from")
    start_time, checkpoint = time.time(), last_checkpoint(cfg)
    tokenizer = data.load_tokenizer(checkpoint or cfg.model) if checkpoint or cfg.model else data.builtin_tokenizer()
    examples, held_out, dropped = load_data(cfg, tokenizer)
    steps = cfg.steps or max(1, len(examples) // cfg.batch_size)
    env.print(f"{len(examples)} solutions ({dropped} too long), {steps} steps of {cfg.batch_size}, "
              f"{env.world} processes on {env.device.type}")

    # 2) Model and optimizer, new or from the last checkpoint.
    if checkpoint or cfg.model:
        from transformers import AutoModelForCausalLM
        model = data.load_model(AutoModelForCausalLM, checkpoint or cfg.model, dtype=torch_dtype(cfg, env))
    else:
        model = new_policy(tokenizer, cfg.seed).to(torch_dtype(cfg, env))
    model, wrapped = prepare(model, cfg, env, Policy)
    data.check_ids(model, examples, cfg.model)
    optimizer = make_optimizer(model, cfg, env)
    start = load_checkpoint(checkpoint, env, model, optimizer) if checkpoint else 0

    # 3) The loop. Stopped by a signal, it saves what it has; all must agree to stop: the flag is summed with the loss.
    open_run(cfg, env)
    log, stopping = Log(cfg, env, start, steps), catch_signals()
    skipped = log.last.get("skipped", 0)
    order = data.batches([len(e["input_ids"]) for e in examples], cfg.batch_size, cfg.seed, start)
    for step in range(start, steps):
        batch = [examples[i] for i in next(order)]
        tokens = sum(len(e["input_ids"]) - e["prompt_length"] for e in batch)  # of the global batch, on every process

        def loss_fn(micro):
            tensors = {k: v.to(env.device) for k, v in data.collate(micro, tokenizer.pad_token_id).items()}
            return sft_loss(wrapped, tensors, tokens)

        loss = accumulate_gradients(wrapped, local_rows(batch, env), cfg.micro_batch_size, loss_fn, env)
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup)
        grad_norm = optimizer_step(model, optimizer, lr, cfg.grad_clip)
        loss, stop = all_sum(loss, bool(stopping), env=env)
        skipped += not math.isfinite(grad_norm)
        row = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "skipped": skipped}
        done = step + 1
        if cfg.eval_every and done % cfg.eval_every == 0 and done < steps:
            row["pass@1"] = pass_at_1(model, tokenizer, held_out, cfg, env)
        log.row(done, **row)
        log.advance(loss=loss, grad_norm=grad_norm)
        if stop or done == steps or (cfg.save_every and done % cfg.save_every == 0):
            save_checkpoint(cfg, env, done, model, tokenizer, optimizer)
        if stop:
            log.close()
            env.print(f"stopped after step {done} of {steps}; --resume continues")
            return None
    log.close()

    # 4) What came of it.
    summary = {"pass@1": pass_at_1(model, tokenizer, held_out, cfg, env), "questions": len(held_out), "steps": steps,
               "skipped": skipped, "parameters": sum(p.numel() for p in model.parameters())}
    if env.rank == 0:
        save_model(os.path.join(cfg.out, "model"), model, tokenizer)
        write_json(os.path.join(cfg.out, "summary.json"), summary)
    barrier(env)
    env.print(f"pass@1 {summary['pass@1']:.3f} on {len(held_out)} held-out questions; "
              f"{time.time() - start_time:.0f} s; the policy is in {os.path.join(cfg.out, 'model')}")
    return summary


def default_policy(level):
    """Folder of the run that makes the built-in policy of a level."""
    return os.path.join("runs", "sft" + level.removeprefix("builtin"))


def builtin_policy(level, env):
    """The built-in policy's model folder, trained first (or its training continued) where it is not there yet."""
    folder = os.path.join(default_policy(level), "model")
    if not os.path.isdir(folder):
        env.print(f"there is no {folder} yet: training the built-in policy first")
        if main(Config(data=(level,), resume=True), env) is None:
            raise SystemExit(0)  # stopped by a signal
    return folder


if __name__ == "__main__":
    launch(main, Config)
