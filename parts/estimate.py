"""Will it fit? The memory of a training run, from the model's config alone: no weights, no processes,
a few seconds. A script's name, its own options, and on what it is to run:

    python -m parts.estimate tdrm_minimal.py --model Qwen/Qwen2.5-Math-7B --batch_size 256 \\
        --micro_batch_size 4 --grad_checkpoint --max_length 4096 --world 8 --card_gib 80

P parameters on N processes; a weight takes e bytes, 2 in bf16 and 4 in fp32. For every process:

    weights                   e P    of every model, trained or not: each process has them all
    masters and moments     12 P/N   bf16: an fp32 copy and AdamW's moments; fp32: 8 P/N
    gradients                 e P    of each trained model; with N > 1 they stay between steps
  and, one after the other, so that only the largest counts:
    training                         one micro-batch's activations
    optimizer step           4 P/N   bf16: the gradients in fp32; fp32: none
    sampling                         keys and values of all rows, arrays of rows x vocabulary
    scoring                          a forward of the rows that are valued at once

So more GPUs make room for the optimizer, not for the weights. A tensor is never split: where the
embeddings are most of a model, one process holds more, 13 to 14 bytes a parameter.

Activations are what autograd keeps for the backward pass. A token leaves in a layer, with hidden size
h, q and kv numbers in all its query and key heads, MLP size m:

    a norm         (4 + e) h   its input in fp32, and the normalised one (for the gain's gradient)
    its output     e h         read by q, k, v; by the MLP. GLM-4's two norms behind those keep none
    attention      e (2q + 2kv) + 4 heads   queries, keys, values, output; no tokens x tokens
    MLP            4 e m       gate, its silu, up, their product

Under --grad_checkpoint a layer leaves its input, e h, and one layer at a time is computed again. The
backward pass adds 2 e (m + h) a token; the vocabulary projection three fp32 arrays of at most
`at_once` logits, and its gradient: three times where there are several chunks of logits, for autograd
adds them up in a new tensor. `python study/memory.py` measures all this on small shapes on the CPU:
the peak is 0.96 to 1.01 of the estimate in thirteen settings. Nothing was measured on a GPU yet.

GiB of a card at micro-batch 1, and the largest micro-batch, on 8 cards of 80 GiB in bf16 with
--grad_checkpoint:

    model             sft         tdrm        rl          qrm
    Qwen2.5-Math-7B   48    16    44    18    60    17    40    8 (a whole step)
    Llama-3.1-8B      56    15    45    16    73    14    42    8
    GLM-4-9B-0414     55    10    52    11    71     6    49    8
    sft    --batch_size 128 --max_length 4096      qrm    --batch_size 64 --max_length 1024
    tdrm   --batch_size 256 --max_length 4096      rl     a reward model of the policy's size,
           --prompts_per_step 128 --group_size 7 --max_new_tokens 2048 --max_length 2560 --rows_at_once 56

Not in it: what CUDA, NCCL and the allocator's gaps take, for which RESERVE of the card stays free (a
guess); --compile; mixtures of experts.
"""

import copy
import importlib
import json
import os
import sys
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
PHASES = ("training", "optimizer step", "sampling", "scoring")
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FIELDS += ("intermediate_size", "vocab_size", "tie_word_embeddings", "max_position_embeddings")
SHAPES = {  # known without a hub: the kind of model, and FIELDS
    "Qwen2.5-Math-7B": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 4096),
    "Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 2, 4864, 151936, True, 32768),
    "GLM-4-9B-0414": ("glm4", 4096, 40, 32, 2, 13696, 151552, False, 32768),
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 131072),
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
        """Numbers whose masters and moments the fullest process holds. As the sharded optimizer does:
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
    try:
        with torch.device("meta"):
            model = auto.from_config(config)
    except ValueError as error:
        raise BadInput(f"--model: {str(error).splitlines()[0][:100]}") from None
    names = [name for name, _ in model.base_model.layers[0].named_children()]
    sizes = [(p.numel(), p.dim() > 1) for p in model.parameters()]
    return Model(config, head, trained, sizes, sum(name.endswith("norm") for name in names))


def load_config(name):
    """A model's config: the built-in policy's (no name), one of SHAPES, a folder's, the hub's."""
    from transformers import AutoConfig

    if not name:
        tokenizer = importlib.import_module("data").builtin_tokenizer()
        with torch.device("meta"):
            return importlib.import_module("sft_minimal").new_policy(tokenizer, 0).config
    short = name.split("/")[-1].removesuffix("-Instruct")
    if short not in SHAPES or os.path.isdir(name):
        return from_pretrained(AutoConfig.from_pretrained, name)
    kind, *numbers = SHAPES[short]
    return AutoConfig.for_model(kind, **dict(zip(FIELDS, numbers)))


def models_of(kind, cfg):
    """The models that a script loads, the one it is about first."""
    config, prm = load_config(cfg.model), getattr(cfg, "prm", None)
    models = [(config, "value" if kind == "tdrm" else "policy", True)]
    frozen = (config, "policy", False)
    if kind == "qrm":
        models = [(config, "policy", True), frozen]
        if cfg.method != "DPO-RM":
            models = [(config, "value", True)]
    if kind in ("rl", "prime"):
        models += [frozen] * bool(cfg.kl_coef or getattr(cfg, "kl_reward", 0))
        models += [(config, "value", True)] * (cfg.estimator == "ppo")  # the critic
    # A reward model that is not named is taken to be of the policy's size.
    if kind == "rl" and (cfg.alpha < 1 or cfg.prm_lr):
        reward = load_config(prm) if prm else config
        one = [(reward, "value", bool(cfg.prm_lr))]
        models += [(reward, "policy", False)] * 2 if is_implicit(prm) else one
    if kind == "prime" and prm != "none":
        models.append((load_config(prm) if prm else config, "policy", True))
        models += [frozen] * (cfg.reference == "sft")
    return [new_model(*model) for model in models]


def is_implicit(folder):
    path = os.path.join(folder or "", "reward.json")
    if not os.path.exists(path):
        return False
    with open(path) as f:
        return json.load(f)["kind"] == "implicit"


# --------------------------------------------------------------------------------------------------
# Bytes of a cache, of a forward and of a backward pass.


def head_size(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config, rows, slots, e):
    """Keys and values of `rows` rows of `slots` tokens."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size(config) * rows * slots * e


def layer_bytes(model, e):
    """What a token leaves in one layer for the backward pass: the table above."""
    config, h = model.config, model.config.hidden_size
    q = head_size(config) * config.num_attention_heads
    kv = head_size(config) * config.num_key_value_heads
    norms = model.norms * (4 + e) * h + 2 * e * h
    attention = e * (2 * q + 2 * kv) + 4 * config.num_attention_heads
    return norms + attention + 4 * e * config.intermediate_size


def activations(model, tokens, e, grad_checkpoint):
    """Bytes at the backward pass's two summits: where it begins, all layers full; where it ends, at the
    embeddings."""
    config, layer = model.config, layer_bytes(model, e)
    h, words = config.hidden_size, config.vocab_size
    again = (2 * config.intermediate_size + 2 * h) * e  # a token's gradients within a layer
    each = e * h if grad_checkpoint else layer
    kept = tokens * (config.num_hidden_layers * each + (4 + 2 * e) * h)  # the last norm, too
    embedding, tied = e * h * words, config.tie_word_embeddings and model.head == "policy"
    logits = top = 0
    if model.head == "policy":
        size = max(1, AT_ONCE // words)
        chunk = 4 * words * min(tokens, size)
        forward, backward = 3 * chunk, chunk + (3 if tokens > size else 1) * embedding
        logits = max(forward, backward)
        top = embedding if tied else 0  # waits for the embeddings' own gradient
    inside = tokens * (layer + again if grad_checkpoint else again)
    begin = kept + max(logits, top + inside)
    first_layer = top + tokens * (layer + again)
    return begin, max(first_layer, embedding * (3 if tied else 1) + tokens * e * h)


def forward_bytes(config, tokens, e):
    """A forward without gradients: the MLP's three arrays, the residual and a norm's output."""
    return tokens * e * (3 * config.intermediate_size + 3 * config.hidden_size)


# --------------------------------------------------------------------------------------------------
# A run.


def rows_of(cfg, world):
    """Rows of one process in an optimizer step (of qrm_minimal.py: pairs)."""
    return -(-(cfg.batch_size or cfg.prompts_per_step * cfg.group_size) // world)


def memory(models, kind, cfg, world, dtype):
    """{what: bytes} on the fullest process; `total` is what it holds throughout and the largest of the
    phases. `cfg` is the Config of the script of this kind."""
    e, online = dtype.itemsize, kind in ("rl", "prime")
    trained = [m for m in models if m.trained]
    shares = [m.largest_share(world) for m in trained]
    gradients = [e * m.parameters for m in trained]
    parts = {
        "weights": sum(gradients),
        "masters and moments" if e == 2 else "moments": (12 if e == 2 else 8) * sum(shares),
        "frozen models": sum(e * m.parameters for m in models if not m.trained),
        "gradients (DDP's buckets)": sum(gradients) if world > 1 else 0,
    }
    length = min(cfg.max_length, PROMPT + cfg.max_new_tokens) if online else cfg.max_length
    rows = rows_of(cfg, world)
    micro = min(rows, cfg.micro_batch_size or rows)
    tokens = micro * length * (2 if kind == "qrm" else 1)
    training = step = 0
    for model, share, grads in zip(trained, shares, gradients):
        begin, end = activations(model, tokens, e, cfg.grad_checkpoint)
        before = after = 0
        if world == 1:  # a later micro-batch finds the gradients of those before it
            before = grads if rows > micro else 0
            embedding = e * model.config.hidden_size * model.config.vocab_size  # its own is in `end`
            after = before or grads - embedding
        training = max(training, before + begin, after + end)
        step = max(step, (grads if world == 1 else 0) + (4 * share if e == 2 else 0))
    parts |= {"training": training, "optimizer step": step}
    if online or kind == "sft":
        parts["sampling"] = sampling_bytes(models[0].config, online, cfg, world, e)
    at_once = min(64 * length, 2**16)  # as training.over_rows
    valued = [m.config for m in models if m.head == "value"]
    parts["scoring"] = max((forward_bytes(c, at_once, e) for c in valued), default=0)
    return parts | {"total": total(parts)}


def sampling_bytes(config, online, cfg, world, e):
    """Rollouts, or an evaluation on held-out questions where that is more."""
    new, group = cfg.max_new_tokens, cfg.group_size if online else 1
    samples = -(-cfg.eval_problems // world)
    if online:
        questions = cfg.prompts_per_step * getattr(cfg, "oversample", 1)
        samples = max(samples, -(-questions // world) * group)
    samples = min(samples, cfg.rows_at_once if online else 256)
    prompt = min(PROMPT, max(1, cfg.max_length - new))
    reading = forward_bytes(config, -(-samples // group) * prompt, e)
    picking = samples * config.vocab_size * (12 + e)
    return cache_bytes(config, samples, prompt + new, e) + max(reading, picking)


def total(parts, phases=PHASES):
    held = sum(size for name, size in parts.items() if name not in (*PHASES, "total"))
    return held + max((parts.get(name, 0) for name in phases), default=0)


# --------------------------------------------------------------------------------------------------
# What to say about it.


def largest_micro_batch(models, kind, cfg, world, dtype, card):
    """The largest --micro_batch_size whose total fits `card` bytes; 0 if none does."""

    def fits(size):
        sized = replace(cfg, micro_batch_size=size)
        return memory(models, kind, sized, world, dtype)["total"] <= card

    rows = rows_of(cfg, world)
    if fits(rows):  # a single micro-batch may take less than two
        return rows
    low, high = 0, rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def report(models, kind, cfg, world, dtype, card_gib=80.0):
    """Print the table, the largest micro-batch and what else might help -> does it fit?"""
    parts, rows = memory(models, kind, cfg, world, dtype), rows_of(cfg, world)
    card, micro = card_gib * GIB * (1 - RESERVE), min(cfg.micro_batch_size or rows, rows)
    checkpoint = "on" if cfg.grad_checkpoint else "off"
    print(
        f"{kind}: {models[0].parameters / 1e9:.3g}B parameters, {world} x {card_gib:g} GiB, "
        f"{str(dtype)[6:]}, micro-batches of {micro} x {cfg.max_length} tokens, "
        f"grad_checkpoint {checkpoint}\n\n  GiB of a process"
    )
    for name, size in parts.items():
        if size and name != "total":
            what = "  at the time of: " if name in PHASES else "  "
            print(f"{what + name:<42}{size / GIB:8.2f}")
    left = f"{card / GIB:.1f}: {RESERVE:.0%} of the card is left to CUDA, NCCL and gaps"
    print(f"{'  total (the largest phase counts)':<42}{parts['total'] / GIB:8.2f}   of {left}\n")

    def largest(world=world, **changes):
        return largest_micro_batch(models, kind, replace(cfg, **changes), world, dtype, card)

    fits, size = parts["total"] <= card, largest()
    whole = " (a whole step of this process)" if size == rows else ""
    verdict = "it fits" if fits else "IT DOES NOT FIT"
    print(f"  {verdict}; largest --micro_batch_size that does: {size or 'none'}{whole}")
    for hint in [] if fits else advice(parts, cfg, world, card, size, largest):
        print(f"  - {hint}")
    return fits


def advice(parts, cfg, world, card, size, largest):
    """What to change so that it fits, the cheapest first."""
    room = card - total(parts, phases=())
    if room > 0 and parts["training"] > room:
        if size:
            yield f"--micro_batch_size {size}: the same result"
        if not cfg.grad_checkpoint and (more := largest(grad_checkpoint=True)):
            yield f"--grad_checkpoint: then micro-batches of {more} fit, for a third more time"
        shorter = [n for n in (cfg.max_length // 2, cfg.max_length // 4) if largest(max_length=n)]
        if not size and shorter:
            yield f"--max_length {shorter[0]}: longer rows are left out"
    if room > 0 and parts.get("sampling", 0) > room:
        yield "sampling: smaller --rows_at_once (the same result) or --max_new_tokens"
    if room > 0 and parts["scoring"] > room:
        yield "scoring: shorter --max_length"
    if not largest(grad_checkpoint=True):
        worlds = [world * 2**i for i in range(1, 8)]
        enough = next((n for n in worlds if largest(n, grad_checkpoint=True)), None)
        shared = "masters and moments are shared among more"
        yield f"{enough} GPUs with --grad_checkpoint: {shared}" if enough else (
            "more GPUs do not help: weights and gradients are whole on each; a smaller model would"
        )


def main(argv):
    """Does the run that these options start fit?"""
    name = os.path.basename(argv[0] if argv else "").removesuffix(".py")
    kind = name.removesuffix("_minimal")
    if kind not in KINDS:
        wanted = ", ".join(f"{kind}_minimal.py" for kind in KINDS)
        raise BadInput(f"{name or 'no script'}: wanted one of {wanted}, and its options")
    more = [
        ("world", int, opt(1, "processes", low=1)),
        ("card_gib", float, opt(80.0, "memory of a card in GiB", low=0.1)),
    ]
    Config = importlib.import_module(f"{kind}_minimal").Config
    cfg = parse(make_dataclass("Options", more, bases=(Config,), frozen=True), argv[1:], __doc__)
    if cfg.batch_size and cfg.batch_size < cfg.world:
        raise BadInput(f"--batch_size {cfg.batch_size}: fewer rows than the {cfg.world} processes")
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    report(models_of(kind, cfg), kind, cfg, cfg.world, dtype, cfg.card_gib)


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    try:
        main(sys.argv[1:])
    except (BadInput, OSError) as error:
        sys.exit(f"estimate.py: error: {error}")
