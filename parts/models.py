"""Tokenizers and models as they come, by Hugging Face name or folder; token ids of prompts and
steps.

What is not as it should be is one line that says so (BadInput), never an approximation: weights
that are not in the files, a head whose logits the model changes in a way not known here, a
tokenizer without tokens.
"""

import contextlib
import datetime
import functools
import os
import shutil
import socket
from array import array
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parts.formats import BadInput

STEP_ENDS = {
    "blank": "\n\n",
    "line": "\n",
}  # what closes a step; the response's end closes the last

# --------------------------------------------------------------------------------------------------
# Text to token ids.


@dataclass(frozen=True)
class Layout:
    """How questions are put to a model, and how it writes steps. Saved with what is trained."""

    prompt: str = "{question}"  # a text around the question
    system: str | None = None  # a system turn before it
    steps: str = "blank"  # what stands between steps: a blank line, or a line's end

    @property
    def step_end(self):
        return STEP_ENDS[self.steps]

    def ask(self, prompt):
        """A question, or chat messages of which it is the last, as this model is asked it."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.prompt.replace("{question}", turns[-1]["content"])
        turns = [*turns[:-1], turns[-1] | {"content": text}]
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        return text if len(turns) == 1 else turns


def layout_of(cfg):
    """The Layout that the options --prompt, --system and --step_end describe."""
    if "{question}" not in cfg.prompt:
        raise BadInput(f"--prompt {cfg.prompt}: wanted a text with {{question}} in it")
    return Layout(cfg.prompt, cfg.system, cfg.step_end)


def question_of(prompt):
    """The text of a prompt: itself, or of chat messages the last one's."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt (a question, or a list of chat messages) up to where the response
    begins: by the model's own chat template; a base model without one gets the bare text and a
    blank line. Raises BadInput where the template refuses the messages."""
    turns = (
        [("user", prompt)]
        if isinstance(prompt, str)
        else [(m["role"], m["content"]) for m in prompt]
    )
    return list(prompt_ids(tokenizer, tuple(turns)))


@functools.lru_cache(20_000)
def prompt_ids(tokenizer, turns):
    """As encode_prompt, of ((role, content), ...). Cached: a question has several responses."""
    if tokenizer.chat_template:
        text = render(tokenizer, [{"role": role, "content": content} for role, content in turns])
        return array("i", plain_ids(tokenizer, [text])[0])
    text = "\n\n".join(content for _, content in turns) + "\n\n"
    ids = tokenizer(text)["input_ids"]
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers append it
    return array("i", ids)


class FixedClock(datetime.datetime):
    """What a chat template that prints today's date is told: the same text every day."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


def render(tokenizer, messages, add_generation_prompt=True):
    """The text that a chat template makes of messages. Raises BadInput where it refuses them."""
    from transformers.utils import chat_template_utils as library  # asks its datetime for today

    clock, library.datetime = library.datetime, FixedClock
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # of jinja, which is not imported here
        roles = ", ".join(message["role"] for message in messages)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the chat template refuses the turns {roles}: {reason}") from None
    finally:
        library.datetime = clock


@functools.lru_cache(100_000)
def token_ids(tokenizer, text):
    """Ids of a step's text, as the middle of a response. Cached: steps recur in sampled data."""
    return middle_ids(tokenizer, [text])[0]


def middle_ids(tokenizer, texts):
    """Ids of texts, each as the middle of a response -> a list for each."""
    distinct = list(dict.fromkeys(texts))
    before, *found = plain_ids(tokenizer, ["\n", *("\n" + text for text in distinct)])
    known, alone = {}, []
    for text, ids in zip(distinct, found):
        if ids[: len(before)] == before:  # by itself, SentencePiece would put a space in front
            del ids[: len(before)]
            known[text] = ids
        else:
            alone.append(text)
    known.update(zip(alone, plain_ids(tokenizer, alone)))
    return [known[text] for text in texts]


def plain_ids(tokenizer, texts):
    """Ids of texts, each by itself, without special tokens -> a list for each. Several are shared
    out to the cores that this process has."""
    if not texts or not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    # The library's own call, without what it does besides, which takes longer for a line.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a call before may have asked for it
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    switch = os.environ.get("TOKENIZERS_PARALLELISM", "true")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if len(texts) > 100 else "false"
    found = backend.encode_batch_fast(texts, add_special_tokens=False)
    os.environ["TOKENIZERS_PARALLELISM"] = switch
    return [encoding.ids for encoding in found]


@functools.lru_cache
def closing_id(tokenizer):
    """The id that closes a response: the first special one that the chat template puts behind an
    assistant's turn, else the tokenizer's end-of-text. (A base model's may not be its template's.)
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "23456"}]
        behind = render(tokenizer, turns, False).rpartition("23456")[2]
        for i in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder:
                return i
    return tokenizer.eos_token_id


def end_ids(tokenizer, generation_config=None):
    """Every id that ends a response: the tokenizer's, the chat template's, and those that a model's
    generation config names."""
    named = getattr(generation_config, "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, closing_id(tokenizer), *named} - {None})


# --------------------------------------------------------------------------------------------------
# Loading and saving.


def from_pretrained(load, name, option="--model", **options):
    """`load(name)` for a folder or a Hugging Face name, local files first. An unknown name is a
    BadInput within seconds, where the library alone would retry for half a minute on every
    process."""
    try:
        return load(name, local_files_only=True, **options)
    except Exception as error:  # damaged files raise almost anything
        folder = os.path.isdir(name)
        if folder or os.path.isabs(name) or name.startswith(".") or name.count("/") != 1:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            reason = reason if folder else "no such folder"
            wanted = "a Hugging Face model folder or name"
            raise BadInput(f"{option} {name}: {reason}; wanted: {wanted}") from None
    try:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0]
        socket.getaddrinfo(hub, 443)
        return load(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        what = "no such folder, not in the cache, and the hub does not give it"
        raise BadInput(f"{option} {name}: {what} ({reason})") from None


def load_tokenizer(name, option="--model"):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    # One saved as the generic class is loaded as such: for some families (Qwen2 is one)
    # AutoTokenizer would put the family's own splitting rules in its place, and blank lines would
    # vanish without a word.
    kind = from_pretrained(get_tokenizer_config, name, option).get("tokenizer_class")
    generic = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    kind = PreTrainedTokenizerFast if generic else AutoTokenizer
    tokenizer = from_pretrained(kind.from_pretrained, name, option)
    if not token_ids(tokenizer, "1"):  # what the library makes up without tokenizer.json
        wanted = "a folder with tokenizer.json or the like"
        raise BadInput(f"{option} {name}: its tokenizer has no tokens; wanted: {wanted}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks come from lengths, never from ids
    return tokenizer


def load_config(name, option="--model"):
    """A model's config with every dropout switched off: it would make values and log-probs
    noise."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig.from_pretrained, name, option)
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in key or key.endswith("_pdrop")):
            setattr(config, key, 0.0)
    return config


@contextlib.contextmanager
def in_turn():
    """The processes of a node go through one after the other: each loads its model into host memory
    on the way to its GPU, and eight times 7B at once would be 120 GB there."""
    turns, mine = 0, int(os.environ.get("LOCAL_RANK", 0))
    if dist.is_initialized():
        turns = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    try:
        for _ in range(mine if turns else 0):
            dist.barrier()
        yield
    finally:
        for _ in range(turns - mine):
            dist.barrier()


def load_model(kind, name, dtype, config=None, new=(), option="--model"):
    """A model all of whose weights are in its files. The library would make up missing ones at
    random; only those whose names begin as in `new` may be."""
    options = {"config": config or load_config(name, option), "dtype": dtype}
    with in_turn():
        model, report = from_pretrained(
            kind.from_pretrained, name, option, output_loading_info=True, **options
        )
        if torch.cuda.is_available():
            model.cuda()
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(tuple(new)))
    if missing:
        what = f"{len(missing)} weights are not in its files, {missing[0]} for one"
        raise BadInput(f"{option} {name}: {what}")
    return model


def load_policy(name, dtype, option="--model"):
    """A causal language model, in eval mode, whose logits are known to be what token_logits makes
    of hidden states."""
    from transformers import AutoModelForCausalLM

    model = load_model(AutoModelForCausalLM, name, dtype, option=option).eval()
    ids = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = token_logits(model, hidden)
    if not torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02):
        what = f"{type(model).__name__} changes its logits behind the head in a way not known here"
        raise BadInput(f"{option} {name}: {what}")
    return model


def token_logits(model, hidden):
    """Logits from last hidden states, with what a family does behind its head: Cohere and Granite
    scale, Gemma 2 caps."""
    logits, config = model.get_output_embeddings()(hidden), model.config
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def torch_dtype(cfg, device):
    """--dtype as torch's; auto: bfloat16 on GPUs only."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)


def save_model(folder, model, tokenizer):
    """Write a Hugging Face folder so that it is there whole or not at all."""
    shutil.rmtree(folder + ".tmp", ignore_errors=True)
    model.save_pretrained(folder + ".tmp")
    tokenizer.save_pretrained(folder + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(folder + ".tmp", folder)


def check_ids(model, tokenizer, ids, name):
    """BadInput where the tokenizer has ids the model has no embeddings for (on a GPU: an assertion
    in a kernel). `ids`: an iterable of lists of token ids."""
    known = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) < known:
        return
    largest = max(map(max, ids))  # not every id that a tokenizer has occurs
    if largest >= known:
        what = f"its tokenizer gives the id {largest}, its weights have {known} embeddings"
        raise BadInput(f"--model {name}: {what}")
