"""Reward models: numbers per token, and how the value of a prefix is made of them. Everything that
values text is one.

    kind       a token's number                                      value of a prefix (a logit)
    value      V of the state after it: TDRM, ScalarPRM, ScalarORM   the last token's
    orm        the same, trained with the end-of-response token      the last token's
    qrm        Q of the token: Q-RM                                  scale x mean over the response
    implicit   beta (log pi - log pi_ref): PRIME, DPO                sum over the response

The kind stands in reward.json in the model's folder, with its numbers; without that file the folder
is an ordinary token or sequence classifier with one label, read as a value. An implicit one has its
reference in reference/. Those that were trained elsewhere come last, and in parts/published.py.
"""

import dataclasses
import math
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from parts import published
from parts.decoding import pad
from parts.formats import BadInput
from parts.models import Layout, closing_id, encode_prompt, load_config, load_model, load_policy
from parts.models import load_tokenizer, save_model, token_ids, token_logits
from parts.runs import write_json
from parts.training import over_rows, token_logprobs

REDUCE = {"value": "last", "orm": "last", "qrm": "mean", "implicit": "sum"}


class RewardModel(torch.nn.Module):
    """A classifier with one number per token, or a causal LM and its reference, called like a token
    classifier.

    `model` learns, `reference` (implicit) does not. `scale` (qrm), `beta` and `temperature`
    (implicit) as above.
    """

    def __init__(
        self,
        model,
        tokenizer,
        kind="value",
        reference=None,
        scale=1.0,
        beta=1.0,
        temperature=1.0,
        layout=Layout(),
    ):
        super().__init__()
        self.model, self.tokenizer, self.kind, self.reference = model, tokenizer, kind, reference
        self.scale, self.beta, self.temperature, self.layout = scale, beta, temperature, layout
        self.config, self.layers = model.config, model.config.num_hidden_layers
        self.longest = getattr(model.config, "max_position_embeddings", None) or math.inf
        if reference is not None:
            reference.eval().requires_grad_(False)
            for module in reference.modules():
                if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
                    module.layer_idx += self.layers + 1  # in the cache, which both share

    @property
    def dtype(self):
        return self.model.dtype

    def forward(self, input_ids, mask=None, past_key_values=None, **options):
        """Numbers of all tokens in fp32: input_ids (B, T) -> .logits (B, T, 1). Implicit ones only
        where `mask` (B, T-1), which speaks of the *next* token, is True, 0 elsewhere; the first
        token of all has none."""
        if self.kind != "implicit":
            options = {"past_key_values": past_key_values, "use_cache": False} | options
            scores = self.model(input_ids=input_ids, **options).logits.float()
        elif past_key_values is not None:
            scores = self.cached_logratio(input_ids, past_key_values, **options)
        else:
            mask = torch.ones_like(input_ids[:, 1:], dtype=torch.bool) if mask is None else mask
            logprobs, _ = token_logprobs(self.model, input_ids, mask, self.temperature)
            with torch.no_grad():
                ref_logprobs, _ = token_logprobs(self.reference, input_ids, mask, self.temperature)
            scores = torch.where(mask, self.beta * (logprobs - ref_logprobs), 0.0)  # (B, T-1)
            scores = F.pad(scores, (1, 0))[..., None]
        return SimpleNamespace(logits=scores)

    def cached_logratio(self, input_ids, cache, **options):
        """beta times the log-ratio of new tokens behind a cache. A token's log-prob is read where
        the token before it was, so each model keeps its last hidden states in the cache like keys,
        as one more layer."""
        logprobs, start = [], cache.used
        options |= {"input_ids": input_ids, "past_key_values": cache}
        for lm, extra in (self.model, self.layers), (self.reference, 2 * self.layers + 1):
            hidden = lm.base_model(**options).last_hidden_state[:, None]  # (B, 1, new, hidden)
            kept, _ = cache.update(hidden, hidden[..., :0], extra)  # (B, 1, used + new, hidden)
            before = F.pad(kept[:, 0], (0, 0, 1, 0))[:, start:-1]  # a row's first token has nothing
            logits = token_logits(lm, before).float() / self.temperature
            logprobs.append(F.log_softmax(logits, dim=-1).gather(-1, input_ids[..., None]))
        return self.beta * logprobs[0] - self.beta * logprobs[1]  # (B, new, 1)

    def encode(self, prompt, steps, finished=True):
        """How a trajectory is spelled for this model -> input_ids, prompt_length, step_ends as
        data.encode_trajectory. All kinds but `value` have learned with the end-of-response token,
        at which a whole response is read; one that was cut off (not `finished`) has none."""
        input_ids, step_ends = encode_prompt(self.tokenizer, self.layout.ask(prompt)), []
        prompt_length = len(input_ids)
        for step in steps[:-1]:
            input_ids += self.step_ids(step)
            step_ends.append(len(input_ids) - 1)
        if steps:
            ids = self.step_ids(steps[-1], last=True)
            input_ids += ids if finished else token_ids(self.tokenizer, steps[-1])
            step_ends.append(len(input_ids) - 1)
        return input_ids, prompt_length, step_ends

    def step_ids(self, step, last=False):
        """Token ids of a step with what closes it: a blank line, or the end of the response."""
        if not last:
            return list(token_ids(self.tokenizer, step + self.layout.step_end))
        closing = [] if self.kind == "value" else [closing_id(self.tokenizer)]
        return list(token_ids(self.tokenizer, step)) + closing

    def next_ids(self, steps, finished):
        """What a search reads behind a prefix for the value of its newest step -> token ids; how
        many of them stay there, before what is read next."""
        ids = self.step_ids(steps[-1], finished)
        return ids, len(ids)

    def values(self, last, total, count):
        """Logits of prefixes from the last token's number, the sum over the response's tokens and
        their count."""
        reduce = REDUCE[self.kind]
        number = last if reduce == "last" else total if reduce == "sum" else total / count
        return self.scale * number

    def prefix_values(self, scores, step_ends, prompt_lengths):
        """Logits (B, S) of the prefixes that end at `step_ends` (B, S), from numbers (B, T);
        prompt_lengths (B,)."""
        response = torch.arange(scores.shape[1], device=scores.device) >= prompt_lengths[:, None]
        totals = (scores * response).cumsum(1).gather(1, step_ends)
        counts = (step_ends + 1 - prompt_lengths[:, None]).clamp(min=1)
        return self.values(scores.gather(1, step_ends), totals, counts)

    def score_steps(self, examples, procs, rows_at_once=64):
        """Values (probabilities) of all steps of data.Examples: a list of S floats each, an empty
        one where the model's context is too short. Split over the processes, known to all."""

        def score(part):
            ids, mask, prompts, ends = pad_rows(part, self.tokenizer.pad_token_id, procs.device)
            logits = self.prefix_values(self(ids, mask).logits[..., 0], ends, prompts)
            values = logits.sigmoid().tolist()
            return [row[: len(e.step_ends)] for row, e in zip(values, part)]

        fit = [e for e in examples if len(e) <= self.longest]
        values = iter(self.quietly(over_rows, fit, score, procs, rows_at_once))
        return [next(values) if len(e) <= self.longest else [] for e in examples]

    def tokens_read(self, example):
        """How many tokens go through the model for the values of an Example."""
        return len(example) if len(example) <= self.longest else 0

    def score_tokens(self, rows, procs, rows_at_once=64):
        """Numbers of the response's tokens, a float32 array for each row. Its `input_ids` are read
        as they are: tokens of a policy with the same tokenizer. Split over the processes, known to
        all."""

        def score(part):
            ids, mask, _, _ = pad_rows(part, self.tokenizer.pad_token_id, procs.device)
            scores = self(ids, mask).logits[..., 0].cpu().numpy()
            return [s[row.prompt_length : len(row)] for s, row in zip(scores, part)]

        return self.quietly(over_rows, rows, score, procs, rows_at_once)

    def quietly(self, function, *args):
        """Call a function with the model in eval mode, and leave it in the mode it was in."""
        training = self.training
        self.eval()
        result = function(*args)
        self.train(training)
        return result

    def save(self, folder):
        """A Hugging Face folder; what else there is to know goes to reward.json and reference/."""
        save_model(folder, self.model, self.tokenizer)
        if self.reference is not None:
            save_model(os.path.join(folder, "reference"), self.reference, self.tokenizer)
        self.describe(folder)

    def describe(self, folder):
        """Write reward.json, unless this is a value model that is asked and read as by default."""
        numbers = {"qrm": ["scale"], "implicit": ["beta", "temperature"]}.get(self.kind, [])
        about = {"kind": self.kind} | {name: getattr(self, name) for name in numbers}
        if self.layout != Layout():
            about["layout"] = dataclasses.asdict(self.layout)
        if about != {"kind": "value"}:
            write_json(os.path.join(folder, "reward.json"), about)


def pad_rows(rows, pad_id, device):
    """-> input_ids (B, T) padded on the right; mask (B, T-1), True where the next token is the
    response's; prompt lengths (B,); step ends (B, S)."""
    ids, real = pad([row.input_ids for row in rows], "right", device, pad_id)
    ends, _ = pad([row.step_ends for row in rows], "right", device)
    prompts = torch.tensor([row.prompt_length for row in rows], device=device)
    mask = torch.arange(1, ids.shape[1], device=device) >= prompts[:, None]
    return ids, mask & real[:, 1:], prompts, ends


# --------------------------------------------------------------------------------------------------
# Constructors.


def new_reward_model(name, tokenizer, dtype, seed=0, kind="value", **about):
    """A reward model to train: a policy gets a new head, a token or sequence classifier with one
    label keeps its own.

    A published sequence classifier has the same `score.weight`. Raises BadInput where the head is
    no single number.
    """
    model = load_classifier(name, dtype, seed, ("score.", "classifier."))
    return RewardModel(model, tokenizer, kind, **about)


def load_classifier(name, dtype, seed=0, new=(), option="--model"):
    from transformers import AutoModelForTokenClassification

    config = load_config(name, option)
    kind = (config.architectures or [""])[0]
    if "Reward" in kind or ("Classification" in kind and config.num_labels != 1):
        wanted = "a token or sequence classifier with one label, read as the logit of the value"
        wanted += ", or, not to be trained, one with a description as in parts/published.json"
        what = f"a {kind} with {config.num_labels} labels"
        raise BadInput(f"{option} {name}: {what}; wanted: {wanted}")
    config.num_labels, config.classifier_dropout = 1, 0.0
    if not kind.endswith("ForTokenClassification"):  # a bare `score.weight`, as sequence
        config.token_classification_bias = False  # classifiers have: ours loads as one, too
    torch.manual_seed(seed)
    return load_model(AutoModelForTokenClassification, name, dtype, config, new, option)


def load_reward_model(name, dtype, device="cpu", option="--model"):
    """A finished reward model of any kind from its folder or name, frozen, in eval mode. Raises
    BadInput."""
    try:
        about = published.read_description(name)
        foreign, described = not about, about.get("kind") in ("tag", "closing")
        if described:
            description = published.describe(about)
        else:
            kind, layout, numbers, other = read_kind(name, about)
    except (ValueError, TypeError, AttributeError, KeyError):
        wanted = "'kind': value, orm, qrm with 'scale', implicit with 'beta' and 'temperature', or"
        wanted += " tag or closing as in parts/published.json"
        path = os.path.join(name, "reward.json")
        raise BadInput(f"{option}: {path} is damaged; wanted {wanted}") from None
    tokenizer, reference = load_tokenizer(name, option), None
    if described:
        model = published.load_published(name, description, tokenizer, dtype, option)
        reward = Described(model, tokenizer, description)
    else:
        if kind == "implicit":
            model = load_policy(name, dtype, option)
            reference = load_policy(other, dtype, option)
        else:
            model = load_classifier(name, dtype, option=option)
        if foreign:
            say_how_it_is_read(name, model.config)
        reward = RewardModel(model, tokenizer, kind, reference, layout=layout, **numbers)
    return reward.to(device).eval().requires_grad_(False)


def read_kind(name, about):
    """What reward.json says of a kind of ours -> kind, layout, numbers, name of the reference.
    Raises ValueError and its kin."""
    kind, layout = about.pop("kind", "value"), Layout(**about.pop("layout", {}))
    reference = about.pop("reference", os.path.join(name, "reference"))
    numbers = {key: float(value) for key, value in about.items()}
    known = kind in REDUCE and numbers.keys() <= {"scale", "beta", "temperature"}
    known = known and isinstance(reference, str) and layout.step_end
    if not known or (kind == "implicit" and "beta" not in numbers):
        raise ValueError
    return kind, layout, numbers, reference


def say_how_it_is_read(name, config):
    """A line for a classifier that none of our scripts has written: nothing says how it was
    trained."""
    kind = (config.architectures or [""])[0]
    bias = getattr(config, "token_classification_bias", True)  # ours have none
    ours = kind.endswith("TokenClassification") and not bias
    if not ours and not (dist.is_initialized() and dist.get_rank()):
        how = "read at the last token of each step, as this project's own are"
        print(f"{name}: no reward.json describes this {kind}: {how}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Reward models trained elsewhere: another spelling, the same methods.


class Described(RewardModel):
    """A reward model that is read as a Description (parts/published.py) says: the number at the end
    of a step's tag, or of a closing text, is the logit of its value."""

    def __init__(self, model, tokenizer, description):
        layout = Layout(description.prompt, description.system or None)
        super().__init__(model, tokenizer, description.kind, layout=layout)
        self.description = published.fill_in(description, tokenizer)

    def forward(self, input_ids, mask=None, **options):
        """Two numbers a token are one: the logit of their softmax."""
        options = {"use_cache": False} | options
        scores = self.model(input_ids=input_ids, **options).logits.float()
        return SimpleNamespace(logits=scores.diff() if scores.shape[-1] == 2 else scores)

    def encode(self, prompt, steps, finished=True):
        """As RewardModel's. Of the kind `closing` the ids are those of the whole response; the
        prefixes before it are texts of their own."""
        if not isinstance(prompt, str):  # the policy's system turn is no text for this model
            prompt = [turn for turn in prompt if turn["role"] != "system"]
        asked = self.layout.ask(prompt)
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        input_ids = published.prompt_ids(self.description, self.tokenizer, messages)
        prompt_length, step_ends = len(input_ids), []
        for t, step in enumerate(steps):
            input_ids += self.step_ids(step, last=t == len(steps) - 1, first=t == 0)
            step_ends.append(len(input_ids) - 1)
        return input_ids, prompt_length, step_ends

    def step_ids(self, step, last=False, first=False):
        return published.step_ids(self.description, self.tokenizer, step, first, last)

    def next_ids(self, steps, finished):
        """Behind a closing text that was taken away the step before is read again, as it is spelled
        where another one follows: blank lines melt into the token before them."""
        ids, before = self.step_ids(steps[-1], True, len(steps) == 1), []
        if self.kind == "tag":
            return ids, len(ids)
        if len(steps) > 1:
            before = self.step_ids(steps[-2], False, len(steps) == 2)
        return before + ids, len(before)

    def values(self, last, total, count):
        return last

    def score_steps(self, examples, procs, rows_at_once=64):
        if self.kind == "tag":
            return super().score_steps(examples, procs, rows_at_once)
        rows = [row for e in examples for row in self.prefixes(e)]
        values, found = iter(super().score_steps(rows, procs, rows_at_once)), []
        for e in examples:
            mine = [next(values) for _ in e.step_ends]  # one value each, or none
            found.append([value[0] for value in mine] if all(mine) else [])
        return found

    def prefixes(self, example):
        """An Example for each prefix, closed."""
        rows, start = [], example.prompt_length
        for t, (step, end) in enumerate(zip(example.completions, example.step_ends)):
            ids = example.input_ids[:start] + self.step_ids(step, True, t == 0)
            rows.append(dataclasses.replace(example, input_ids=ids, step_ends=[len(ids) - 1]))
            start = end + 1
        return rows

    def tokens_read(self, example):
        rows = [example] if self.kind == "tag" else self.prefixes(example)
        return sum(super(Described, self).tokens_read(row) for row in rows)
