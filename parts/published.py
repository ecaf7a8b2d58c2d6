"""Reward models trained elsewhere, read as their authors read them, from a small description.

A softmax over two numbers is sigmoid(z_good - z_bad), so every head comes down to one number a
token. What is left is text: what stands around the question, what closes a step, where the number
is read.

    kind      text                                             value of step t
    tag       prompt | first step TAG | between step TAG ...   at the end of its tag, which stays
    closing   prompt | first step between step CLOSING         at the end of the closing text, which
                                                               is put behind each prefix by itself

published.json describes the published ones, found by the last part of a model's name. Your own is
described by the same words in reward.json in its folder, or by {"like": NAME} where it is of one of
those families. Left out: models that generate their verdict (ThinkPRM, GenPRM), and PathFinder-PRM,
whose second pass depends on its first.
"""

import functools
import json
import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from parts.formats import BadInput
from parts.models import closing_id, load_config, load_model, render, token_ids

MARK = "23456"  # a text whose place in a rendered chat is looked up


@dataclass(frozen=True)
class Description:
    kind: str
    # The text around the steps.
    chat: bool = False  # the response is an assistant's turn; else bare text behind BOS
    turns: bool = False  # each step is a user's turn, which the assistant answers by `good`
    system: str = ""  # system turn
    prompt: str = "{question}"
    first: str = ""  # before the first step
    tag: str = ""
    closing: str = "{end}"  # {end}: what ends an assistant's turn in the chat template
    between: str = ""  # tag: before all steps but the first; closing: behind all but the last
    # How it becomes tokens.
    alone: bool = False  # steps and tags are each tokenised by themselves
    lines: bool = False  # every line of a step is closed as a step is
    twice: bool = False  # a chat's text, tokenised as bare text is: BOS twice
    # The head: two rows of the language model's, or `labels` numbers a token from layers `weights`.
    good: str = ""  # the row is that of the text's last token
    bad: str = ""
    weights: str = "score"
    hidden: bool = False  # linear, ReLU, linear; else linear
    labels: int = 1  # two: of `bad` and `good`


def read_description(name):
    """What is written of a reward model: in its folder, or of its name in published.json -> dict,
    empty where there is nothing. Raises ValueError and its kin."""
    path, about = os.path.join(name, "reward.json"), {"like": os.path.basename(name.rstrip("/"))}
    with open(os.path.join(os.path.dirname(__file__), "published.json"), encoding="utf-8") as f:
        published = json.load(f)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            about = json.load(f)
    elif about["like"] not in published:
        return {}
    while "like" in about:
        about = published[about.pop("like")] | about
    return about


def describe(about):
    """A dict of `kind` tag or closing -> Description. Raises ValueError and its kin."""
    description = Description(**about)
    for key, value in vars(description).items():
        if type(value) is not type(getattr(Description, key, "")):
            raise ValueError(key)
    if "{question}" not in description.prompt or bool(description.good) != bool(description.bad):
        raise ValueError
    if description.kind == "tag" and not (description.tag or description.turns):
        raise ValueError
    return description


def fill_in(description, tokenizer):
    """The texts that the chat template knows: the end of a turn, what stands between two."""
    end = tokenizer.convert_ids_to_tokens(closing_id(tokenizer)) or ""
    closing = description.closing.replace("{end}", end)
    if not description.turns:
        return replace(description, closing=closing)
    roles = ("user", "assistant", "user")
    text = render(tokenizer, [{"role": role, "content": MARK} for role in roles], False)
    _, header, back, _ = text.split(MARK)  # the assistant's header, and back to the user's
    return replace(description, tag=header, between=description.good + back)


def prompt_ids(description, tokenizer, messages):
    """Token ids of everything before the first step."""
    text = "\n\n".join(message["content"] for message in messages)
    if description.turns:
        *before, last = messages
        messages = [*before, last | {"content": last["content"] + MARK}]
    elif description.chat:  # the template's own generation prompt may open a thought
        messages = [*messages, {"role": "assistant", "content": MARK}]
    if description.chat:
        text = render(tokenizer, messages, False).rpartition(MARK)[0]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    has_bos = tokenizer.bos_token_id is not None
    if has_bos and (description.twice or not description.chat):
        ids.insert(0, tokenizer.bos_token_id)
    return ids


def step_ids(description, tokenizer, step, is_first, is_last):
    """Token ids of a step with what surrounds it."""
    before = description.first if is_first else description.between
    if description.kind == "closing":
        behind = description.closing if is_last else description.between
        return list(token_ids(tokenizer, before * is_first + step + behind))
    ids = []
    for line in step.split("\n") if description.lines else [step]:
        if description.alone:
            for text in (before + line, description.tag):
                ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids += token_ids(tokenizer, before + line + description.tag)
        before = description.between
    return ids


def load_published(name, description, tokenizer, dtype, option):
    """A model whose .logits are (B, T, 1), or (B, T, 2) for bad and good."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    config = load_config(name, option)
    if description.chat and not tokenizer.chat_template:
        raise BadInput(f"{option} {name}: it reads chats, and its tokenizer has no chat template")
    if description.good:
        model = load_model(AutoModelForCausalLM, name, dtype, config, option=option)
        texts = description.bad, description.good
        keep = [tokenizer(x, add_special_tokens=False)["input_ids"][-1] for x in texts]
        head = model.get_output_embeddings()
        rows = torch.nn.Linear(head.in_features, 2, bias=head.bias is not None, device="meta")
        for key, weight in head.named_parameters():
            setattr(rows, key, torch.nn.Parameter(weight[keep].detach().clone()))
        model.set_output_embeddings(rows)
        return model

    size, labels = config.hidden_size, description.labels
    try:
        kind = AutoModelForTokenClassification._model_mapping[type(config)]
    except KeyError:
        what = f"transformers has no token classifier of type {config.model_type}"
        raise BadInput(f"{option} {name}: {what}") from None

    class Headed(kind):
        def __init__(self, config):
            super().__init__(config)
            if description.hidden:
                first, last = torch.nn.Linear(size, size), torch.nn.Linear(size, labels)
                self.score = torch.nn.Sequential(first, torch.nn.ReLU(), last)
                self.post_init()

    config.num_labels, config.classifier_dropout = labels, 0.0
    architecture = (config.architectures or [""])[0]
    config.token_classification_bias = not architecture.endswith("ForSequenceClassification")
    renamed = {f"^{description.weights}": "score"}
    load = functools.partial(Headed.from_pretrained, key_mapping=renamed)
    new = ("score.bias",)  # where there is none it is 0
    return load_model(SimpleNamespace(from_pretrained=load), name, dtype, config, new, option)
