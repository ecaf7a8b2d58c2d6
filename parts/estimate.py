"""Will it fit? The memory of a training run, from the model's config alone: no weights, no
processes, a few seconds. Give a script, its own options, and what it is to run on:

    python -m parts.estimate tdrm_minimal.py --model Qwen/Qwen2.5-Math-7B --batch_size 256 \\
        --micro_batch_size 4 --grad_checkpoint --max_length 4096 --world 8 --card_gib 80

P parameters on N processes; a weight takes e bytes, 2 in bf16 and 4 in fp32. For every process:

    weights                 e P      of every model, trained or not: each process has them all
    masters and moments    12 P/N    bf16: an fp32 copy and AdamW's moments; fp32: 8 P/N
    gradients               e P      of each trained model; with N > 1 they stay between steps
  and, one after the other, so that only the largest counts:
    training                         one micro-batch's activations
    optimizer step          4 P/N    bf16: the gradients in fp32; fp32: none
    sampling                         keys and values of all rows, arrays of rows x vocabulary
    scoring                          a forward of the rows that are valued at once

So more GPUs make room for the optimizer, not for the weights. A tensor is never split: where the
embeddings are most of a model, one process holds more than 12/N bytes a parameter.

Activations are what autograd keeps for the backward pass. A token leaves in a layer, with hidden
size h, q and kv numbers in all its query and key heads, MLP size m:

    a norm        (4 + e) h   its input in fp32, and the normalised one (for the gain's gradient)
    its output    e h         read by q, k, v; by the MLP. GLM-4's norms behind those keep none
    attention     e (2q + 2kv) + 4 heads   queries, keys, values, output; no tokens x tokens
    MLP           4 e m       gate, its silu, up, their product

Under --grad_checkpoint a layer leaves its input, e h, and one layer at a time is computed again.
The backward pass adds 2 e (m + h) a token; the vocabulary projection three fp32 arrays of at most
`at_once` logits, and its gradient: three times where there are several chunks of logits, for
autograd adds them up in a new tensor. `python study/memory.py` measures it on small shapes: the
peak is 0.96 to 1.01 of the estimate in thirteen settings on the CPU. None was measured on a GPU.

GiB of a card at micro-batch 1, and the largest micro-batch, on 8 cards of 80 GiB in bf16 with
--grad_checkpoint (rl: with a reward model of the policy's size):

                      sft       tdrm      rl        qrm
    Qwen2.5-Math-7B   46   16   45   18   60   17   45   8, all of a step
    Llama-3.1-8B      50   15   45   16   73   14   45   8
    GLM-4-9B-0414     53   10   52   11   71    6   52   8
    sft   --batch_size 128 --max_length 4096        qrm   --batch_size 64 --max_length 1024
    tdrm  --batch_size 256 --max_length 4096        rl    --prompts_per_step 128 --group_size 7
          --max_new_tokens 2048 --max_length 2560 --rows_at_once 56

rl --credit token with --kl_reward also holds the initial policy: 75 GiB for Qwen, too much for the
others. prime trains two models, 8 bytes a parameter on every card before activations: 90 to 108
GiB with --reference policy, however many cards. search trains nothing: 2 bytes a parameter of
policy and reward model, and a cache of cache_bytes for each.

Not in it: what CUDA, NCCL and the allocator's gaps take, for which RESERVE of the card stays free
(a guess); --compile; mixtures of experts.
"""

import copy
import importlib
import os
import sys
from collections import Counter
from dataclasses import dataclass, make_dataclass, replace

import torch

from parts.formats import BadInput
from parts.models import from_pretrained
from parts.runs import opt, parse
from parts.training import token_logprobs

GIB, RESERVE = 2**30, 0.06
PROMPT = 512  # tokens of a question, where responses are sampled
AT_ONCE = token_logprobs.__defaults__[-1]  # logits
KINDS = ("sft", "tdrm", "rl", "prime", "qrm")  # of scripts: sft_minimal.py, ...
SHAPES = {  # known without a hub: the kind of model; FIELDS
    "Qwen2.5-Math-7B": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 4096),
    "GLM-4-9B-0414": ("glm4", 4096, 40, 32, 2, 13696, 151552, False, 32768),
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 131072),
}
FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
    "intermediate_size vocab_size tie_word_embeddings max_position_embeddings"
)
HELP = {  # phase: what makes it smaller
    "training": "--micro_batch_size (the same result), --grad_checkpoint, --max_length",
    "optimizer step": "more processes",
    "sampling": "--rows_at_once (the same result), --max_new_tokens",
    "scoring": "--max_length",
}


# --------------------------------------------------------------------------------------------------
# What a model is made of.


@dataclass
class Model:
    """A model of a run. `head`: "policy" for a causal LM, "value" for a reward model."""

    config: object
    head: str
    trained: bool
    sizes: list  # (numbers in it, is it a matrix?) of each parameter
    norms: int  # in a layer

    @property
    def parameters(self):
        return sum(n for n, _ in self.sizes)

    def largest_share(self, world):
        """Numbers whose masters and moments the fullest process holds. As in the sharded optimizer
        tensors go, largest first, to the process that has least; matrices, then the rest."""
        shares = [0] * world
        for n, _ in sorted(self.sizes, key=lambda size: (not size[1], -size[0])):
            shares[shares.index(min(shares))] += n
        return max(shares)


def new_model(config, head="policy", trained=True):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    auto = AutoModelForCausalLM if head == "policy" else AutoModelForTokenClassification
    config = copy.deepcopy(config)
    config.num_labels, config.token_classification_bias = 1, False
    with torch.device("meta"):
        model = auto.from_config(config)
    norms = [n for n, _ in model.base_model.layers[0].named_children() if n.endswith("norm")]
    sizes = [(p.numel(), p.dim() > 1) for p in model.parameters()]
    return Model(config, head, trained, sizes, len(norms))


def load_config(name):
    """A model's config: one of SHAPES, a folder's, the hub's."""
    from transformers import AutoConfig

    if not name:
        raise BadInput(
            "--model: wanted, a Hugging Face name or folder; the built-in policy always fits"
        )
    short = name.split("/")[-1].removesuffix("-Instruct")
    if short not in SHAPES or os.path.isdir(name):
        return from_pretrained(AutoConfig.from_pretrained, name)
    kind, *numbers = SHAPES[short]
    return AutoConfig.for_model(kind, **dict(zip(FIELDS.split(), numbers)))


def models_of(cfg):
    """The models that a script loads, the one it is about first. A reward model that is not named
    is taken to be of the policy's size."""
    config, prm, kind = load_config(cfg.model), getattr(cfg, "prm", None), cfg.kind
    reward = load_config(prm) if prm not in (None, "none") else config
    policy, frozen = new_model(config), new_model(config, "policy", False)
    if kind == "sft":
        return [policy]
    if kind == "qrm" and cfg.method == "DPO-RM":
        return [policy, frozen]
    if kind in ("tdrm", "qrm"):
        return [new_model(config, "value")]
    models = [policy]
    if cfg.kl_coef or getattr(cfg, "kl_reward", 0):
        models.append(frozen)
    if cfg.estimator == "ppo":
        models.append(new_model(config, "value"))  # the critic
    if kind == "prime" and prm != "none":
        models += [new_model(reward)] + [frozen] * (cfg.reference == "sft")
    if kind == "rl" and (cfg.alpha < 1 or cfg.prm_lr):
        if os.path.isdir(os.path.join(prm or "", "reference")):  # an implicit one
            models += [new_model(reward, "policy", False)] * 2
        else:
            models.append(new_model(reward, "value", bool(cfg.prm_lr)))
    return models


# --------------------------------------------------------------------------------------------------
# Bytes of a cache, of a forward and of a backward pass.


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config, rows, slots, e):
    """Keys and values of `rows` rows of `slots` tokens."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config)
    return numbers * rows * slots * e


def layer_bytes(model, e):
    """What a token leaves in one layer for the backward pass: the table above."""
    config, h = model.config, model.config.hidden_size
    q = head_size(config) * config.num_attention_heads
    kv = head_size(config) * config.num_key_value_heads
    norms = model.norms * (4 + e) * h + 2 * e * h
    attention = e * (2 * q + 2 * kv) + 4 * config.num_attention_heads
    return norms + attention + 4 * e * config.intermediate_size


def activations(model, tokens, e, grad_checkpoint):
    """Bytes at the backward pass's two summits: where it begins, all layers full; where it ends, at
    the embeddings; and of these."""
    config, layer = model.config, layer_bytes(model, e)
    h, words = config.hidden_size, config.vocab_size
    again = 2 * e * (config.intermediate_size + h)  # a token's gradients within a layer
    each = e * h if grad_checkpoint else layer
    kept = tokens * (config.num_hidden_layers * each + (4 + 2 * e) * h)  # the last norm, too
    embedding, logits, waiting = e * h * words, 0, 0
    if model.head == "policy":
        size = max(1, AT_ONCE // words)
        chunk = 4 * words * min(tokens, size)
        logits = max(3 * chunk, chunk + (3 if tokens > size else 1) * embedding)
        waiting = embedding * config.tie_word_embeddings  # for the embeddings' own gradient
    inside = waiting + tokens * (again + layer * grad_checkpoint)
    begin = kept + max(logits, inside)
    end = max(waiting + tokens * (again + layer), embedding + 2 * waiting + tokens * e * h)
    return begin, end, embedding


def forward_bytes(config, tokens, e):
    """A forward without gradients: the MLP's three arrays, the residual and a norm's output."""
    return tokens * e * 3 * (config.intermediate_size + config.hidden_size)


# --------------------------------------------------------------------------------------------------
# A run.


def options(kind):
    """The Config of a kind of script, with what it is to run on."""
    more = [
        ("world", int, opt(1, "processes", low=1)),
        ("card_gib", float, opt(80.0, "memory of a card in GiB", low=0.1)),
    ]
    Config = importlib.import_module(f"{kind}_minimal").Config
    return make_dataclass("Options", more, bases=(Config,), frozen=True, namespace={"kind": kind})


def rows_of(cfg):
    """Rows of one process in an optimizer step (of qrm_minimal.py: pairs)."""
    return -(-(cfg.batch_size or cfg.prompts_per_step * cfg.group_size) // cfg.world)


def memory(models, cfg):
    """-> {what the fullest process holds throughout: bytes}, {phase: what comes on top}."""
    e, alone = 4 if cfg.dtype == "float32" else 2, cfg.world == 1
    online = cfg.kind in ("rl", "prime")
    length = min(cfg.max_length, PROMPT + cfg.max_new_tokens) if online else cfg.max_length
    rows, held, phases = rows_of(cfg), Counter(), Counter()
    micro = min(rows, cfg.micro_batch_size or rows)
    tokens = micro * length * (2 if cfg.kind == "qrm" else 1)
    at_once = min(64 * length, 2**16)  # tokens in training.over_rows

    def most(phase, size):
        phases[phase] = max(phases[phase], size)

    for model in models:
        weights, share = e * model.parameters, model.largest_share(cfg.world)
        if model.head == "value":
            most("scoring", forward_bytes(model.config, at_once, e))
        if not model.trained:
            held["frozen models"] += weights
            continue
        held["weights"] += weights
        held["masters and moments"] += (12 if e == 2 else 8) * share
        held["gradients (DDP's buckets)"] += 0 if alone else weights
        # Alone, a later micro-batch finds the gradients of those before it.
        begin, end, embedding = activations(model, tokens, e, cfg.grad_checkpoint)
        before = weights if alone and rows > micro else 0
        after = before or alone * (weights - embedding)  # that one's own is in `end`
        most("training", max(before + begin, after + end))
        most("optimizer step", alone * weights + (4 * share if e == 2 else 0))
    if online or cfg.kind == "sft":
        most("sampling", sampling_bytes(models[0].config, cfg, e))
    return held, phases


def sampling_bytes(config, cfg, e):
    """Rollouts, or an evaluation on held-out questions where that is more."""
    group, new = getattr(cfg, "group_size", 1), cfg.max_new_tokens
    asked = getattr(cfg, "prompts_per_step", 0) * getattr(cfg, "oversample", 1)
    rows = -(-max(asked * group, cfg.eval_problems) // cfg.world)
    rows = min(rows, getattr(cfg, "rows_at_once", 256))
    prompt = min(PROMPT, max(1, cfg.max_length - new))
    reading = forward_bytes(config, -(-rows // group) * prompt, e)
    picking = rows * config.vocab_size * (12 + e)
    return cache_bytes(config, rows, prompt + new, e) + max(reading, picking)


def total(held, phases):
    return sum(held.values()) + max(phases.values())


# --------------------------------------------------------------------------------------------------
# What to say about it.


def largest_micro_batch(models, cfg, **changes):
    """The largest --micro_batch_size that fits the card; 0 if none does."""
    cfg = replace(cfg, **changes)
    for size in range(rows_of(cfg), 0, -1):
        if total(*memory(models, replace(cfg, micro_batch_size=size))) <= room(cfg):
            return size
    return 0


def room(cfg):
    return cfg.card_gib * GIB * (1 - RESERVE)


def report(models, cfg):
    """Print the table, the largest micro-batch, and what would help where it does not fit."""
    held, phases = memory(models, cfg)
    whole, size = total(held, phases), largest_micro_batch(models, cfg)
    billions, fits = models[0].parameters / 1e9, whole <= room(cfg)
    print(f"{cfg.kind}: {billions:.3g}B parameters, {cfg.world} x {cfg.card_gib:g} GiB\n")
    parts = {"GiB of a process": None} | held
    parts |= {"at the time of: " + name: size for name, size in phases.items()}
    parts |= {"total (the largest phase counts)": whole}
    parts |= {"of (the rest is for CUDA, NCCL and gaps)": room(cfg)}
    for name, bytes_ in parts.items():
        print(f"  {name:<40}" + ("" if bytes_ is None else f"{bytes_ / GIB:8.2f}"))
    verdict = "it fits" if fits else "IT DOES NOT FIT"
    print(f"\n  {verdict}; largest --micro_batch_size that does: {size or 'none'}")
    if not fits:
        advise(models, cfg, room(cfg) - sum(held.values()), phases)


def advise(models, cfg, left, phases):
    for name, change in HELP.items():
        if 0 < left < phases[name]:
            print(f"  - too much for {name}: change {change}")
    for world in range(cfg.world, min(128, cfg.batch_size or 128) + 1):
        if size := largest_micro_batch(models, cfg, grad_checkpoint=True, world=world):
            print(f"  - {world} processes with --grad_checkpoint: micro-batches of {size} fit")
            return
    print("  - more GPUs do not help: each holds weights and gradients whole")


def main(argv):
    """Does the run that a script would start with these options fit?"""
    name = os.path.basename(argv[0])
    kind = name.removesuffix(".py").removesuffix("_minimal")
    if kind not in KINDS:
        wanted = ", ".join(f"{kind}_minimal.py" for kind in KINDS)
        raise BadInput(f"{name}: wanted one of {wanted}, and its options")
    cfg = parse(options(kind), argv[1:], __doc__)
    if cfg.batch_size and cfg.batch_size < cfg.world:
        raise BadInput(f"--batch_size {cfg.batch_size}: fewer rows than the {cfg.world} processes")
    report(models_of(cfg), cfg)


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:  # BadInput, or a model the library does not know
        sys.exit(f"estimate.py: error: {str(error).splitlines()[0]}")
