"""What a training step really holds, beside what estimate.py says: `python tests/memory.py [NAME...]`.

Each setting is two optimizer steps of the scripts' own functions on CPU processes of their own, on a Qwen2.5-0.5B shape
with random weights, fewer layers and, mostly, fewer words. Bytes are counted where they are allocated (the profiler's
allocator events), so a tensor counts as long as it lives; what Python, gloo and the matrix library take is not in it.
"""
import json
import os
import socket
import subprocess
import sys
import types
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


@dataclass(frozen=True)
class Setting:
    kind: str
    dtype: str
    world: int
    grad_checkpoint: bool
    rows: int  # of a process
    micro: int
    length: int
    layers: int
    vocab: int = 151936
    model: str = "qwen2"
    hidden: int = 896
    mlp: int = 4864


SETTINGS = {
    "sft-fp32": Setting("sft", "float32", 1, False, 2, 1, 256, 2),  # two chunks of logits; tied embeddings
    "sft-bf16-checkpoint": Setting("sft", "bfloat16", 1, True, 4, 2, 256, 4, 32000),
    "sft-fp32-2ranks-checkpoint": Setting("sft", "float32", 2, True, 2, 1, 256, 2, 32000),
    "sft-bf16-2ranks": Setting("sft", "bfloat16", 2, False, 2, 1, 192, 2),
    "tdrm-fp32": Setting("tdrm", "float32", 1, False, 2, 1, 1024, 4, 8000),
    "tdrm-fp32-checkpoint": Setting("tdrm", "float32", 1, True, 4, 4, 512, 4, 8000),
    "tdrm-bf16": Setting("tdrm", "bfloat16", 1, False, 4, 4, 512, 3, 8000),
    "tdrm-bf16-2ranks": Setting("tdrm", "bfloat16", 2, False, 2, 1, 512, 3),
    "tdrm-bf16-2ranks-checkpoint": Setting("tdrm", "bfloat16", 2, True, 2, 2, 512, 4, 32000),
    "rl-fp32": Setting("rl", "float32", 1, False, 8, 2, 96, 2, 32000),
    "rl-bf16-2ranks-checkpoint": Setting("rl", "bfloat16", 2, True, 8, 4, 96, 2, 32000),
    "glm4-bf16": Setting("tdrm", "bfloat16", 1, False, 2, 1, 1024, 3, 8000, "glm4", 1024, 3072),
    "llama-sft-bf16": Setting("sft", "bfloat16", 1, False, 2, 2, 512, 3, 32000, "llama", 1024, 3072),
}
PROMPT = 32  # in place of estimate.PROMPT


def config_of(s):
    from transformers import AutoConfig
    heads = {"num_attention_heads": s.hidden // 64, "num_key_value_heads": 2, "head_dim": 64}
    return AutoConfig.for_model(
        s.model, hidden_size=s.hidden, intermediate_size=s.mlp, num_hidden_layers=s.layers, vocab_size=s.vocab,
        tie_word_embeddings=s.model == "qwen2", max_position_embeddings=4096, classifier_dropout=0.0,
        token_classification_bias=False, pad_token_id=0, eos_token_id=1, bos_token_id=None, **heads)


def options_of(s):
    import rl_minimal as rl
    import sft_minimal as sft
    import tdrm_minimal as tdrm
    common = dict(batch_size=s.rows * s.world, micro_batch_size=s.micro, max_length=s.length, dtype=s.dtype,
                  grad_checkpoint=s.grad_checkpoint)
    if s.kind == "rl":
        return rl.Config(**common, prompts_per_step=s.rows * s.world // 4, group_size=4, eval_problems=1,
                         max_new_tokens=s.length - PROMPT)
    return {"sft": sft.Config, "tdrm": tdrm.Config}[s.kind](**common)


def work(s):
    """A process of a setting -> {"peak": bytes, "held": bytes between steps, "parameters"}."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
    import data
    import plumbing
    import rl_minimal as rl
    import search_minimal as search
    import sft_minimal as sft
    import tdrm_minimal as tdrm
    torch.set_num_threads(1)
    env, cfg, config = plumbing.setup(), options_of(s), config_of(s)
    config.num_labels = 1

    def new(head):
        auto = AutoModelForCausalLM if head == "policy" else AutoModelForTokenClassification
        return auto.from_config(config, dtype=getattr(torch, s.dtype))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        head, view = ("value", None) if s.kind == "tdrm" else ("policy", sft.Policy)
        model, wrapped = sft.prepare(new(head), cfg, env, view)
        optimizer = sft.make_optimizer(model, cfg, env)
        prm = new("value").eval() if s.kind == "rl" else None
        random = np.random.default_rng(env.rank)
        ids = lambda n: random.integers(2, s.vocab, n).tolist()  # noqa: E731
        ends = list(range(7, s.length, 8))
        rows = [{"input_ids": ids(s.length), "prompt_length": 1, "step_ends": ends, "correct": True} for _ in range(s.rows)]

        def loss_fn(micro):
            batch = data.collate(micro, 0)
            if s.kind == "sft":
                return sft.sft_loss(wrapped, batch, s.rows * s.length)
            logits = tdrm.step_values(wrapped, batch["input_ids"], None, batch["step_ends"])
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))

        for _ in range(2):
            if s.kind == "rl":
                never = types.SimpleNamespace(eos_token_id=-1, batch_decode=lambda tokens, **_: [""] * len(tokens))
                questions = [ids(PROMPT) for _ in range(s.rows // 4)]
                groups = search.sample(model, never, questions, 4, 1.0, cfg.max_new_tokens)
                model.train()
                rows = [{"input_ids": x.prompt_ids + x.token_ids, "prompt_length": PROMPT, "step_ends": ends,
                         "correct": True, "old_logprobs": np.array(x.logprobs, dtype=np.float32),
                         "advantages": np.ones(len(x.logprobs), dtype=np.float32)} for group in groups for x in group]
                tdrm.score_rows(prm, rows, 0, plumbing.Env())
                everyone = [row for part in plumbing.merge({env.rank: rows}, env).values() for row in part]
                rl.update_policy(wrapped, model, optimizer, everyone, 1e-6, cfg, env, 0)
            else:
                sft.accumulate_gradients(wrapped, rows, s.micro, loss_fn, env)
                sft.optimizer_step(model, optimizer, 1e-6, 1.0)
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return {"peak": peak, "held": now, "parameters": sum(p.numel() for p in model.parameters())}


def measure(s):
    """The fullest of the setting's processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(s.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        "OMP_NUM_THREADS": "1"}
    command = [sys.executable, os.path.abspath(__file__), "--work", json.dumps(s.__dict__)]
    started = [subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(s.world)]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(outputs[0][1][-2000:])
    return max((json.loads(out.splitlines()[-1]) for out, _ in outputs), key=lambda result: result["peak"])


def estimated(s):
    import torch
    import estimate
    before, cfg, config = estimate.PROMPT, options_of(s), config_of(s)
    estimate.PROMPT, others = PROMPT, [(config, "value", False)] if s.kind == "rl" else []
    parts = estimate.memory(config, s.kind, cfg, s.world, getattr(torch, s.dtype), others)
    estimate.PROMPT = before
    return estimate.total(parts, estimate.PHASES if s.kind == "rl" else ("training", "optimizer step"))  # no evaluation


def main(names):
    columns = ("parameters", "measured MiB", "estimated MiB", "ratio", "held between steps, bytes a parameter")
    print(f"| {'setting':<28} | " + " | ".join(columns) + f" |\n|{'---|' * 6}")
    for name in names or SETTINGS:
        s = SETTINGS[name]
        result, ours = measure(s), estimated(s)
        print(f"| {name:<28} | {result['parameters'] / 1e6:.1f}M | {result['peak'] / 2**20:.0f} | {ours / 2**20:.0f} | "
              f"{result['peak'] / ours:.3f} | {result['held'] / result['parameters']:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(Setting(**json.loads(sys.argv[2])))), flush=True)
    else:
        main(sys.argv[1:])
