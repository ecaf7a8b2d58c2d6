"""Supervised fine-tuning: a policy learns to write the worked solutions it is shown.

With response tokens y_1..y_n after the prompt x,

    loss = - sum_{rows, t} log pi(y_t | x, y_<t) / (response tokens of the global batch)    sft_loss

The lines of the loop are the same in every chapter; parts/training.py has them, with what makes
them right on any number of processes. With no options this trains the built-in policy (134k
parameters) that the other chapters start from. Left out: packing, LoRA, FSDP.

    python sft_minimal.py                           # the built-in policy
    python sft_minimal.py --data builtin-hard       # the one for long chains
    torchrun --nproc_per_node=8 sft_minimal.py --model Qwen/Qwen2.5-Math-7B \\
        --data solutions.jsonl --lr 1e-5 --batch_size 128 --micro_batch_size 2 --grad_checkpoint

Files in --out: config.json, metrics.jsonl, summary.json, model/ (a Hugging Face folder), state/
(for --resume).
"""

import os
from dataclasses import dataclass, replace

import torch

import data
from parts.answers import verify
from parts.formats import BadInput, read_trajectories
from parts.models import Layout, check_ids, end_ids, layout_of, load_policy
from parts.models import load_tokenizer, torch_dtype
from parts.runs import Processes, Run, last_checkpoint, launch, opt
from parts.training import Policy, TrainConfig, accumulate_gradients, learning_rate
from parts.training import optimizer_step, over_rows, prepare


@dataclass(frozen=True)
class Config(TrainConfig):
    lr: float = opt(4e-3, "peak learning rate (for a 7B model: 1e-5)", low=0)
    max_new_tokens: int = opt(256, "longest response sampled in the evaluation", low=1)
    eval_problems: int = opt(500, "held-out questions in the evaluation", low=1)


def sft_loss(policy, input_ids, response_mask, tokens):
    """Negative log-likelihood of the response tokens, divided by `tokens`, their number in the
    whole global batch."""
    logprobs, _ = policy(input_ids, response_mask)  # (B, T-1)
    return -logprobs.sum() / tokens


def main(cfg, procs):
    """Train a policy -> summary (also in summary.json)."""
    # 1) The data, every process all of it; the model, new or from the last checkpoint.
    level = data.builtin_level(cfg.data)
    cfg = replace(cfg, out=cfg.out or default_out(level))
    if not level and not cfg.model:
        raise BadInput("--data: your own solutions need --model, the policy to start from")
    checkpoint = last_checkpoint(cfg)
    name = checkpoint and os.path.join(checkpoint, "model") or cfg.model
    tokenizer = load_tokenizer(name) if name else data.builtin_tokenizer()
    examples, held_out, left_out = load_data(cfg, level, tokenizer, procs)
    dtype = torch_dtype(cfg, procs.device)
    model = load_policy(name, dtype) if name else new_policy(tokenizer, cfg.seed).to(dtype)
    learner = prepare(Policy(model, tokenizer, layout_of(cfg)), cfg, procs)
    check_ids(model, tokenizer, (e.input_ids for e in examples), cfg.model)
    steps = cfg.steps or max(1, len(examples) // cfg.batch_size)
    procs.print(
        f"{len(examples)} solutions ({left_out} too long), {steps} steps of {cfg.batch_size}, "
        f"{procs.world} processes on {procs.device.type}"
    )

    # 2) The loop.
    run = Run(cfg, procs, checkpoint, steps, {"model": learner})
    order = data.batches(examples.lengths, cfg.batch_size, cfg.seed, run.start)
    for step in run.steps():
        batch = [examples[i] for i in next(order)]
        tokens = sum(len(e) - e.prompt_length for e in batch)  # of the global batch

        def loss_fn(rows):
            b = data.collate(rows, tokenizer.pad_token_id, procs.device)
            return sft_loss(learner.forward, b["input_ids"], b["response_mask"], tokens)

        loss = accumulate_gradients(learner, batch, cfg.micro_batch_size, loss_fn, procs)
        lr = learning_rate(step, steps, cfg.lr)
        grad_norm = optimizer_step(learner, lr, cfg.grad_clip)
        run.log(loss=procs.sum(loss)[0], grad_norm=grad_norm, lr=lr)
        if run.evaluates:
            run.log(**evaluate(learner.module, held_out, cfg, procs))
    if run.stopped:
        return None

    # 3) What came of it.
    measures = evaluate(learner.module, held_out, cfg, procs)
    ((name, number),) = measures.items()
    headline = f"{name} {number:.3f} on {len(held_out)} held-out questions"
    counts = {"questions": len(held_out), "parameters": model.num_parameters()}
    return run.finish(measures | counts, headline)


# --------------------------------------------------------------------------------------------------
# Solutions to learn from, and how good the policy is.


def load_data(cfg, level, tokenizer, procs=Processes()):
    """-> training and held-out Examples (of these one a question), number too long."""
    encode = spelling(tokenizer, layout_of(cfg))
    if level:
        count = 64 * data.LEVELS[level].batches // 4
        problems = data.make_problems(count, "train", cfg.seed, level)
        rows = data.make_trajectories(problems, 4, seed=cfg.seed, level=level)
        examples = data.encode_all(rows, encode, procs)
        problems = data.make_problems(cfg.eval_problems, "test", 0, level)
        rows = data.make_trajectories(problems, seed=1, level=level)
        held_out = data.encode_all(rows, encode, procs)
    else:
        rows = read_trajectories(cfg.data, layout_of(cfg).step_end, outcome=False)
        examples, held_out = data.hold_out(data.encode_all(rows, encode, procs))
        known = enumerate(examples.known())
        examples = examples.take([i for i, e in known if e.correct is not False])
    examples, left_out = data.that_fit(examples, cfg.max_length)
    by_question = {str(e.prompt): i for i, e in enumerate(held_out.known())}
    held_out = held_out.take(list(by_question.values())[: cfg.eval_problems])
    held_out, left_out_too = data.that_fit(held_out, cfg.max_length)
    return examples, held_out, left_out + left_out_too


def spelling(tokenizer, layout=Layout()):
    """How a policy writes a trajectory: with the token that ends a response."""
    return data.Spelling(tokenizer, eos=True, layout=layout)


def evaluate(policy, held_out, cfg, procs):
    """{"pass@1"} on the questions with a gold answer; where none has one, {"held-out loss"}."""
    answered = [e for e in held_out if e.answer is not None]
    if answered:
        return {"pass@1": pass_at_1(policy, answered, cfg, procs)}
    tokens = sum(len(e) - e.prompt_length for e in held_out)

    def score(part):
        b = data.collate(part, policy.tokenizer.pad_token_id, procs.device)
        return [sft_loss(policy, b["input_ids"], b["response_mask"], 1).item()]

    return {"held-out loss": sum(over_rows(held_out, score, procs, 1)) / tokens}


@torch.no_grad()
def pass_at_1(policy, examples, cfg, procs, rows_at_once=256):
    """Share of questions answered right by one sample (temperature 1). The questions are split over
    the processes.

    Plain `generate` of the library; how sampling works is the subject of parts/decoding.py."""
    model, tokenizer, mine, right = policy.model, policy.tokenizer, procs.mine(examples), 0
    model.eval()
    with torch.random.fork_rng(devices=[procs.device] if procs.device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        for start in range(0, len(mine), rows_at_once):
            chunk = mine[start : start + rows_at_once]
            ids = {"input_ids": [e.input_ids[: e.prompt_length] for e in chunk]}
            padded = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
            ids = model.generate(
                **padded.to(procs.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                max_new_tokens=cfg.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=end_ids(tokenizer, model.generation_config),
            )
            ids = ids[:, padded["input_ids"].shape[1] :]  # responses only
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            right += sum(verify(text, e.answer) for text, e in zip(texts, chunk))
    model.train()
    right, total = procs.sum(right, len(mine))
    return right / max(1, total)


# --------------------------------------------------------------------------------------------------
# The built-in policy.


def new_policy(tokenizer, seed):
    """The built-in policy, untrained: a small Qwen2. The wide init (0.1, not 0.02) lets one so
    small learn early."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def default_out(level):
    return os.path.join("runs", "sft" + (level or "").removeprefix("builtin"))


def builtin_policy(level, procs):
    """The built-in policy's model folder, trained first (or its training continued) where it is not
    there yet."""
    folder = os.path.join(default_out(level), "model")
    if not os.path.isdir(folder):
        procs.print(f"there is no {folder} yet: training the built-in policy first")
        if main(Config(data=(level or "builtin",), resume=True), procs) is None:
            raise SystemExit(0)  # stopped by a signal
    return folder


if __name__ == "__main__":
    launch(main, Config, __doc__)
