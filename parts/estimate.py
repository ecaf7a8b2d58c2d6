"""Will it fit? The memory of a training run, from the model's config alone: no weights, no processes, a few seconds.

P parameters on N processes; a weight takes e bytes, 2 in bf16 and 4 in fp32. For every process:

    weights                   e P     of every model, trained or not; each process has them all (plain DDP)
    masters and moments      12 P/N   bf16: an fp32 copy and AdamW's moments; fp32: 8 P/N. Shared out as whole tensors
    gradients                 e P     of each trained model. With N > 1 they are DDP's buckets and stay between steps
  and, one after the other, so that only the largest counts:
    training                          one micro-batch's activations
    optimizer step            4 P/N   bf16: the gradients in fp32; fp32: none
    sampling                          keys and values of all rows, and `pick`'s arrays of rows x vocabulary
    scoring                           a forward of the rows that are valued at once

Activations are what autograd keeps for the backward pass. A token leaves in a layer, with hidden size h, q and kv
numbers in all its query and key heads, MLP size m:

    a norm                    (4 + e) h   its input in fp32, and the normalised one (for the gain's gradient)
    its output                 e h        read by q, k, v; by the MLP. GLM-4's two norms behind those keep none
    attention                  e (2q + 2kv) + 4 heads      queries, keys, values, output; no array of tokens x tokens
    MLP                        4 e m      gate, its silu, up, their product

Under --grad_checkpoint a layer leaves its input, e h, and one layer at a time is computed again. The backward pass adds
2 e (m + h) a token; the vocabulary projection three fp32 arrays of at most `at_once` logits, and its gradient: three
times where there are several chunks of logits, for autograd adds them up in a new tensor. Checked by tests/memory.py.

    python estimate.py --model Qwen/Qwen2.5-Math-7B --kind tdrm --world 8 --micro_batch_size 4 --grad_checkpoint
    python tdrm_minimal.py --estimate --world 8 ...      # the same: a script's own options mean what they mean there

Not in it: what CUDA, NCCL and the allocator's gaps take, for which RESERVE of the card stays free (a guess, not
measured on a GPU); --compile; mixtures of experts.
"""
import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys

import torch

import data
import plumbing
import sft_minimal as sft
from cache import cache_bytes
from data import BadInput
from plumbing import opt

GIB, RESERVE = 2**30, 0.06
PROMPT = 512  # tokens of a question, where responses are sampled
KINDS = ("sft", "tdrm", "rl", "prime", "qrm")  # of scripts: sft_minimal.py, ...
PHASES = ("training", "optimizer step", "sampling", "scoring")
FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
          "vocab_size", "tie_word_embeddings", "max_position_embeddings")
SHAPES = {  # known without a hub: the kind of model, and FIELDS
    "Qwen2.5-Math-7B": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 4096),
    "Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 2, 4864, 151936, True, 32768),
    "GLM-4-9B-0414": ("glm4", 4096, 40, 32, 2, 13696, 151552, False, 32768),
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 131072),
}


# --------------------------------------------------------------------------------------------------
# What a model is made of.

def load_config(name):
    """A model's config: the built-in policy's (no name), one of SHAPES, a folder's, the hub's. BadInput if unknown."""
    from transformers import AutoConfig
    if not name:
        with torch.device("meta"):
            return sft.new_policy(data.builtin_tokenizer(), 0).config
    short = name.split("/")[-1].removesuffix("-Instruct")
    if short not in SHAPES or os.path.isdir(name):
        return data.from_pretrained(AutoConfig.from_pretrained, name)
    kind, *numbers = SHAPES[short]
    return AutoConfig.for_model(kind, **dict(zip(FIELDS, numbers)))


def parameters(config, head="policy"):
    """[(numbers in it, is it a matrix?)] of a causal LM ("policy") or reward model ("value"); the norms of a layer."""
    return _parameters(type(config), config.to_json_string(), head)


@functools.lru_cache
def _parameters(kind, text, head):
    import transformers
    config = kind.from_dict(json.loads(text) | {"num_labels": 1})
    auto = transformers.AutoModelForCausalLM if head == "policy" else transformers.AutoModelForTokenClassification
    try:
        with torch.device("meta"):
            model = auto.from_config(config)
    except ValueError as error:
        raise BadInput(f"--model: {str(error).splitlines()[0][:100]}") from None
    if head == "value" and model.score.bias is not None:
        model.score.bias = None  # as in tdrm.load_reward_model
    norms = sum(name.endswith("norm") for name, _ in model.base_model.layers[0].named_children())
    return [(p.numel(), p.dim() > 1) for p in model.parameters()], norms


def count(config, head="policy"):
    return sum(n for n, _ in parameters(config, head)[0])


def largest_share(sizes, world):
    """Numbers on the fullest process. Tensors go, largest first, to the one that has least: matrices, then the rest."""
    shares = [0] * world
    for n, _ in sorted(sizes, key=lambda size: (not size[1], -size[0])):
        shares[shares.index(min(shares))] += n
    return max(shares)


# --------------------------------------------------------------------------------------------------
# Bytes of a forward and of a backward pass.

def layer_bytes(config, norms, e):
    """What a token leaves in one layer for the backward pass: the table above."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = head_size * config.num_attention_heads, head_size * config.num_key_value_heads
    h, m = config.hidden_size, config.intermediate_size
    return norms * (4 + e) * h + 2 * e * h + e * (2 * q + 2 * kv) + 4 * config.num_attention_heads + 4 * e * m


def activations(config, head, tokens, e, grad_checkpoint):
    """Bytes at the backward pass's two summits: where it begins, all layers full; where it ends, at the embeddings."""
    sizes, norms = parameters(config, head)
    h, layers, layer = config.hidden_size, config.num_hidden_layers, layer_bytes(config, norms, e)
    again = (2 * config.intermediate_size + 2 * h) * e  # a token's gradients within a layer
    kept = tokens * (layers * (e * h if grad_checkpoint else layer) + (4 + 2 * e) * h)  # layers, the last norm
    embedding, tied = e * h * config.vocab_size, config.tie_word_embeddings and head == "policy"
    logits = top = 0
    if head == "policy":
        at_once = inspect.signature(sft.token_logprobs).parameters["at_once"].default
        size = max(1, at_once // config.vocab_size)
        chunk = 4 * config.vocab_size * min(tokens, size)
        logits = max(3 * chunk, chunk + (3 if tokens > size else 1) * embedding)  # forward and backward of a chunk
        top = embedding if tied else 0  # waits for the embeddings' own gradient
    inside = tokens * (layer + again if grad_checkpoint else again)
    begin, first_layer = kept + max(logits, top + inside), top + tokens * (layer + again)
    return begin, max(first_layer, embedding * (3 if tied else 1) + tokens * e * h)


def forward_bytes(config, tokens, e):
    """A forward pass without gradients: the MLP's three arrays, the residual and a norm's output."""
    return tokens * e * (3 * config.intermediate_size + 3 * config.hidden_size)


# --------------------------------------------------------------------------------------------------
# A run.

def head_of(kind, cfg):
    return "value" if kind == "tdrm" or (kind == "qrm" and cfg.method != "dpo_rm") else "policy"


def rows_of(cfg, world):
    """Rows of one process in an optimizer step (of Q-RM: pairs)."""
    return -(-(cfg.batch_size or cfg.prompts_per_step * cfg.group_size) // world)


def memory(config, kind, cfg, world, dtype, others=()):
    """{what: bytes} on the fullest process; `total` is what it holds throughout and the largest of the phases.

    `kind` is one of KINDS, `cfg` its script's Config; `config` is the model it trains, `others` what else it loads:
    (config, "policy" or "value", is it trained?) each."""
    e, ddp = dtype.itemsize, world > 1
    models, online = [(config, head_of(kind, cfg), True), *others], kind in ("rl", "prime")
    trained = [(c, h) for c, h, is_trained in models if is_trained]
    sizes = [parameters(c, h)[0] for c, h in trained]
    shares = [largest_share(s, world) for s in sizes]
    gradients = [e * sum(n for n, _ in s) for s in sizes]
    resident = {"weights": sum(e * count(c, h) for c, h in trained),
                "masters and moments" if e == 2 else "moments": (12 if e == 2 else 8) * sum(shares),
                "frozen models": sum(e * count(c, h) for c, h, is_trained in models if not is_trained),
                "gradients (DDP's buckets)": sum(gradients) if ddp else 0}

    # Training: the largest of the models. One process without a second micro-batch has activations before gradients.
    rows = rows_of(cfg, world)
    micro, pair = min(rows, cfg.micro_batch_size or rows), 2 if kind == "qrm" else 1
    several = rows > micro  # then a micro-batch finds the gradients of those before it
    length = min(cfg.max_length, PROMPT + cfg.max_new_tokens) if online else cfg.max_length
    phases = {"training": 0, "optimizer step": 0}
    for (c, h), share, grads in zip(trained, shares, gradients):
        begin, end = activations(c, h, pair * micro * length, e, cfg.grad_checkpoint)
        before = grads * (several and not ddp)
        after = before or (0 if ddp else grads - e * c.hidden_size * c.vocab_size)  # the embeddings' is in `end`
        phases["training"] = max(phases["training"], before + begin, after + end)
        phases["optimizer step"] = max(phases["optimizer step"], grads * (not ddp) + 4 * share * (e == 2))

    # What else a script does: sample (rl's rollouts, sft's evaluation), value solutions.
    if online or kind == "sft":
        new, most = cfg.max_new_tokens, cfg.rows_at_once if online else 256
        questions = getattr(cfg, "prompts_per_step", 0) * getattr(cfg, "oversample", 1)
        samples = max(-(-questions // world) * getattr(cfg, "group_size", 1), -(-cfg.eval_problems // world))
        samples, prompt = min(samples, most), min(PROMPT, max(1, cfg.max_length - new))
        prompts = -(-samples // getattr(cfg, "group_size", 1)) if online else samples
        phases["sampling"] = cache_bytes(config, samples, prompt + new, dtype) + max(
            samples * config.vocab_size * (12 + e), forward_bytes(config, prompts * prompt, e))
    valued = [c for c, h, _ in models if h == "value"] if kind != "qrm" else []
    if valued:
        phases["scoring"] = max(forward_bytes(c, min(64 * length, 2**16), e) for c in valued)  # as tdrm.score_rows does
    return resident | phases | {"total": total(resident | phases)}


def total(parts, phases=PHASES):
    throughout = sum(size for name, size in parts.items() if name not in (*PHASES, "total"))
    return throughout + max((parts.get(name, 0) for name in phases), default=0)


def largest_micro_batch(config, kind, cfg, world, dtype, card, others=()):
    """The largest --micro_batch_size whose total fits `card` bytes; 0 if none does."""
    def fits(size):
        sized = dataclasses.replace(cfg, micro_batch_size=size)
        return memory(config, kind, sized, world, dtype, others)["total"] <= card
    rows = rows_of(cfg, world)
    if fits(rows):  # a single micro-batch may take less than two
        return rows
    low, high = 0, rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def report(config, kind, cfg, world, dtype, card_gib=80.0, others=()):
    """Print the table, the largest micro-batch and, where the run does not fit, what to change -> does it fit?"""
    parts = memory(config, kind, cfg, world, dtype, others)
    card = card_gib * GIB * (1 - RESERVE)
    rows = rows_of(cfg, world)
    micro = min(cfg.micro_batch_size or rows, rows)
    print(f"{kind}: {count(config, head_of(kind, cfg)) / 1e9:.3g}B parameters, {world} x {card_gib:g} GiB, "
          f"{str(dtype)[6:]}, micro-batches of {micro} x {cfg.max_length} tokens, "
          f"grad_checkpoint {'on' if cfg.grad_checkpoint else 'off'}\n\n  GiB of a process")
    for name, size in parts.items():
        if size and name != "total":
            what = "  at the time of: " if name in PHASES else "  "
            print(f"{what + name:<42}{size / GIB:8.2f}")
    print(f"{'  total (the largest phase counts)':<42}{parts['total'] / GIB:8.2f}   of {card / GIB:.1f}: "
          f"{RESERVE:.0%} of the card is left to CUDA, NCCL and gaps\n")
    options = functools.partial(largest_micro_batch, config, kind, world=world, dtype=dtype, card=card, others=others)
    largest, fits = options(cfg=cfg), parts["total"] <= card
    print(f"  {'it fits' if fits else 'IT DOES NOT FIT'}; largest --micro_batch_size that does: {largest or 'none'}"
          + (" (a whole step of this process)" if largest == rows else ""))
    for hint in [] if fits else advice(parts, cfg, world, rows, largest, options, card):
        print(f"  - {hint}")
    return fits


def advice(parts, cfg, world, rows, largest, options, card):
    """What to change so that it fits, the cheapest first."""
    held = total(parts, phases=())
    too_much = [name for name in PHASES if held <= card < held + parts.get(name, 0)]
    if "training" in too_much:
        if largest:
            yield f"--micro_batch_size {largest}: the same result"
        if not cfg.grad_checkpoint and (size := options(cfg=dataclasses.replace(cfg, grad_checkpoint=True))):
            yield f"--grad_checkpoint: then micro-batches of {size} fit, for a third more time"
        length = cfg.max_length
        while not largest and length > 256:
            length //= 2
            if options(cfg=dataclasses.replace(cfg, max_length=length)):
                yield f"--max_length {length}: longer rows are dropped"
                break
    if "sampling" in too_much:
        yield "sampling: smaller --rows_at_once (the same result) or --max_new_tokens"
    if "scoring" in too_much:
        yield "scoring: shorter --max_length"
    small = dataclasses.replace(cfg, micro_batch_size=1, grad_checkpoint=True)
    worlds = [n for n in (world * 2**i for i in range(1, 8)) if n <= (cfg.batch_size or n)]
    enough = next((n for n in worlds if options(cfg=small, world=n)), None)
    if not options(cfg=small):
        yield (f"{enough} GPUs with --grad_checkpoint: masters and moments are shared among more" if enough else
               "more GPUs do not help: weights and gradients are whole on each of them; a smaller model would")


# --------------------------------------------------------------------------------------------------
# From a script's options.

def from_options(kind, cfg):
    """What `--estimate` does in a script: `kind` is one of KINDS, or the script's file name. Process 0 prints."""
    kind = kind.split("_")[0]
    if os.environ.get("RANK", "0") != "0":
        return None
    world = getattr(cfg, "world", 0) or int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size and cfg.batch_size < world:
        raise BadInput(f"--batch_size {cfg.batch_size}: fewer rows than the {world} processes")
    config, dtype = load_config(cfg.model), torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    others = loaded_beside(kind, config, cfg)
    if kind == "qrm" and cfg.rl != "none":
        kind = "rl"
    elif kind == "qrm":
        cfg = dataclasses.replace(cfg, batch_size=cfg.batch_size or 64)
    return report(config, kind, cfg, world, dtype, getattr(cfg, "card_gib", 80.0), others)


def loaded_beside(kind, config, cfg):
    """The models a script loads beside the one it trains -> `others` of memory()."""
    others, name = [], getattr(cfg, "prm", "")
    if kind in ("rl", "prime") and cfg.kl_coef:
        others.append((config, "policy", False))
    if kind == "rl" and (cfg.alpha < 1 or cfg.prm_lr):
        others.append((load_config(name) if name else config, "value", bool(cfg.prm_lr)))
    if kind == "prime" and name != "none":
        others.append((load_config(name) if name else config, "policy", True))
        others += [(config, "policy", False)] * (cfg.reference == "sft")
    if (kind == "prime" and cfg.estimator == "ppo") or (kind == "qrm" and cfg.rl == "ppo"):
        others.append((config, "value", True))
    if kind == "qrm" and cfg.rl != "none":  # the policy's own size stands for a reward model that is not named
        reward = load_config(cfg.rm) if cfg.rm else config
        others += [(reward, "policy", False)] * 2 if cfg.method == "dpo_rm" else [(reward, "value", False)]
        others += [(config, "policy", False)] * (cfg.kl_coef > 0)
    elif kind == "qrm" and cfg.method == "dpo_rm":
        others.append((config, "policy", False))
    return others


def main(argv):
    """`--kind` says whose options the others are."""
    kind = argv[argv.index("--kind") + 1] if "--kind" in argv[:-1] else "tdrm"
    if kind not in KINDS:
        raise BadInput(f"--kind {kind}: wanted one of {', '.join(KINDS)}")
    Config = importlib.import_module(kind + "_minimal").Config
    more = [("kind", str, opt("tdrm", "whose options the others are", choices=KINDS)),
            ("world", int, opt(0, "processes; 0: torchrun's", low=0)),
            ("card_gib", float, opt(80.0, "memory of a card in GiB", low=0.1))]
    from_options(kind, plumbing.parse(dataclasses.make_dataclass("Options", more, bases=(Config,), frozen=True), argv))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BadInput, OSError) as error:
        sys.exit(f"estimate.py: error: {error}")
