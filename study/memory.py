"""What a training step really holds, beside what parts/estimate.py says: `python study/memory.py`.

Each setting is two optimizer steps of the project's own functions on CPU processes of their own, on
a Qwen2.5-0.5B shape with random weights, fewer layers and, mostly, fewer words. Bytes are counted
where they are allocated (the profiler's allocator events), so a tensor counts as long as it lives;
what Python, gloo and the matrix library take is not in it. Names of settings: only these.
"""

import multiprocessing
import os
import socket
import sys
from concurrent.futures import ProcessPoolExecutor
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


F32, B16 = "float32", "bfloat16"
SETTINGS = {
    "sft-fp32": Setting(
        "sft", F32, 1, False, 2, 1, 256, 2
    ),  # two chunks of logits; tied embeddings
    "sft-bf16-checkpoint": Setting("sft", B16, 1, True, 4, 2, 256, 4, 32000),
    "sft-fp32-2ranks-checkpoint": Setting("sft", F32, 2, True, 2, 1, 256, 2, 32000),
    "sft-bf16-2ranks": Setting("sft", B16, 2, False, 2, 1, 192, 2),
    "tdrm-fp32": Setting("tdrm", F32, 1, False, 2, 1, 1024, 4, 8000),
    "tdrm-fp32-checkpoint": Setting("tdrm", F32, 1, True, 4, 4, 512, 4, 8000),
    "tdrm-bf16": Setting("tdrm", B16, 1, False, 4, 4, 512, 3, 8000),
    "tdrm-bf16-2ranks": Setting("tdrm", B16, 2, False, 2, 1, 512, 3),
    "tdrm-bf16-2ranks-checkpoint": Setting("tdrm", B16, 2, True, 2, 2, 512, 4, 32000),
    "rl-fp32": Setting("rl", F32, 1, False, 8, 2, 96, 2, 32000),
    "rl-bf16-2ranks-checkpoint": Setting("rl", B16, 2, True, 8, 4, 96, 2, 32000),
    "glm4-bf16": Setting("tdrm", B16, 1, False, 2, 1, 1024, 3, 8000, "glm4", 1024, 3072),
    "llama-sft-bf16": Setting("sft", B16, 1, False, 2, 2, 512, 3, 32000, "llama", 1024, 3072),
}
PROMPT = 32  # in place of estimate.PROMPT


def config_of(s):
    from transformers import AutoConfig

    shape = {"hidden_size": s.hidden, "intermediate_size": s.mlp, "num_hidden_layers": s.layers}
    shape |= {"num_attention_heads": s.hidden // 64, "num_key_value_heads": 2, "head_dim": 64}
    shape |= {"vocab_size": s.vocab, "max_position_embeddings": 4096, "num_labels": 1}
    shape |= {"tie_word_embeddings": s.model == "qwen2", "classifier_dropout": 0.0}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return AutoConfig.for_model(s.model, token_classification_bias=False, **shape, **ids)


def options_of(s):
    from parts import estimate

    sizes = {"batch_size": s.rows * s.world, "micro_batch_size": s.micro, "max_length": s.length}
    sizes |= {"dtype": s.dtype, "grad_checkpoint": s.grad_checkpoint, "world": s.world}
    if s.kind == "rl":
        sizes |= {"prompts_per_step": s.rows * s.world // 4, "group_size": 4, "eval_problems": 1}
        sizes["max_new_tokens"] = s.length - PROMPT
    return estimate.options(s.kind)(**sizes)


def work(s, rank, port):
    """A process of a setting -> {"peak": bytes, "held": bytes between steps, "parameters"}."""
    os.environ |= {"WORLD_SIZE": str(s.world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from parts.runs import join_processes

    torch.set_num_threads(1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    procs, profile = join_processes(), torch.profiler.profile
    with profile(activities=activities, profile_memory=True) as profiler:
        learner = two_steps(s, options_of(s), procs)
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    parameters = sum(p.numel() for p in learner.module.model.parameters())
    return {"peak": peak, "held": now, "parameters": parameters}


def two_steps(s, cfg, procs):
    """Two optimizer steps -> the Learner."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    import data
    from parts.rewards import RewardModel
    from parts.training import Policy, accumulate_gradients, optimizer_step, prepare
    from sft_minimal import sft_loss
    from tdrm_minimal import step_values, value_loss

    def new(auto):
        return auto.from_config(config_of(s), dtype=getattr(torch, s.dtype))

    random = np.random.default_rng(procs.rank)

    def ids(n):
        return random.integers(2, s.vocab, n).tolist()

    tokenizer = data.builtin_tokenizer()
    if s.kind == "tdrm":
        module = RewardModel(new(AutoModelForTokenClassification), tokenizer)
    else:
        module = Policy(new(AutoModelForCausalLM), tokenizer)
    learner, ends = prepare(module, cfg, procs), list(range(7, s.length, 8))
    if s.kind == "rl":
        prm = RewardModel(new(AutoModelForTokenClassification).eval(), tokenizer)
        for _ in range(2):
            questions = [ids(PROMPT) for _ in range(s.rows // 4)]
            rl_step(learner, prm, questions, ends, cfg, procs)
        return learner

    batch = []
    for _ in range(s.rows * s.world):
        batch.append(data.Example("", [], ids(s.length), 1, ends, correct=True))

    def loss_fn(micro):
        b = data.collate(micro, 0)
        if s.kind == "sft":
            return sft_loss(learner.forward, b["input_ids"], b["response_mask"], s.rows * s.length)
        logits = step_values(learner.forward, b["input_ids"], None, b["step_ends"])
        return value_loss(logits, torch.zeros_like(logits), torch.ones_like(logits), logits.numel())

    for _ in range(2):
        accumulate_gradients(learner, batch, s.micro, loss_fn, procs)
        optimizer_step(learner, 1e-6, 1.0)
    return learner


def rl_step(learner, prm, questions, ends, cfg, procs):
    """Sample (hardly ever an end among so many words), score, update."""
    import numpy as np

    import rl_minimal as rl
    from parts.decoding import sample
    from parts.runs import Processes

    policy = learner.module
    limits = 1.0, cfg.max_new_tokens
    groups = sample(policy.model, policy.tokenizer, questions, cfg.group_size, *limits)
    policy.model.train()
    mine = []
    for x in (x for group in groups for x in group):
        row = rl.Rollout("", [], x.prompt_ids + x.token_ids, PROMPT, ends, correct=True)
        row.old_logprobs = np.array(x.logprobs, dtype=np.float32)
        row.advantages = np.ones_like(row.old_logprobs)
        mine.append(row)
    prm.score_steps(mine, Processes())
    parts = procs.merge({procs.rank: mine})
    rollouts = [row for rank in range(procs.world) for row in parts[rank]]
    rl.update_policy(learner, rollouts, 0, cfg, procs)


def measure(s):
    """The fullest of the setting's processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rl_minimal", "transformers.models.qwen2.modeling_qwen2"])
    with ProcessPoolExecutor(s.world, context, max_tasks_per_child=1) as pool:
        results = list(pool.map(work, [s] * s.world, range(s.world), [port] * s.world))
    return max(results, key=lambda result: result["peak"])


def estimated(s):
    """Bytes, without the evaluation, which is not part of a setting."""
    from parts import estimate

    config = config_of(s)
    models = [estimate.new_model(config, "value" if s.kind == "tdrm" else "policy")]
    if s.kind == "rl":
        models.append(estimate.new_model(config, "value", trained=False))
    before, estimate.PROMPT = estimate.PROMPT, PROMPT
    held, phases = estimate.memory(models, options_of(s))
    estimate.PROMPT = before
    if s.kind != "rl":
        phases = {name: phases[name] for name in ("training", "optimizer step")}
    return estimate.total(held, phases)


def main(names):
    columns = ("parameters", "measured MiB", "estimated MiB", "ratio", "held, bytes a parameter")
    print(f"| {'setting':<28} | " + " | ".join(columns) + f" |\n|{'---|' * 6}")
    for name in names or SETTINGS:
        s = SETTINGS[name]
        result, ours = measure(s), estimated(s)
        peak, parameters = result["peak"], result["parameters"]
        cells = [f"{parameters / 1e6:.1f}M", f"{peak / 2**20:.0f}", f"{ours / 2**20:.0f}"]
        cells += [f"{peak / ours:.3f}", f"{result['held'] / parameters:.2f}"]
        print(f"| {name:<28} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
