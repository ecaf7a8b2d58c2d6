"""Reward models: numbers per token, and how the value of a prefix is made of them. Everything that
values text is one.

    kind       a token's number                                      value of a prefix (a logit)
    value      V of the state after it: TDRM, ScalarPRM, ScalarORM   the last token's
    orm        the same, trained with the end-of-response token      the last token's
    qrm        Q of the token: Q-RM                                  scale x mean over the response
    implicit   beta (log pi - log pi_ref): PRIME, DPO                sum over the response

The kind stands in reward.json in the model's folder, with its numbers; without that file the folder
is an ordinary token or sequence classifier with one label, read as a value. An implicit one has its
reference in reference/.
"""

import dataclasses
import json
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

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
        if reference is not None:
            reference.eval().requires_grad_(False)
            for i, layer in enumerate(reference.base_model.layers):
                layer.self_attn.layer_idx = self.layers + 1 + i  # in the cache, which both share

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
        """Values (probabilities) of all steps of data.Examples: a list of S floats each. Split over
        the processes, known to all."""

        def score(part):
            ids, mask, prompts, ends = pad_rows(part, self.tokenizer.pad_token_id, procs.device)
            logits = self.prefix_values(self(ids, mask).logits[..., 0], ends, prompts)
            values = logits.sigmoid().tolist()
            return [row[: len(e.step_ends)] for row, e in zip(values, part)]

        return self.quietly(over_rows, examples, score, procs, rows_at_once)

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
        numbers = {"qrm": ["scale"], "implicit": ["beta", "temperature"]}.get(self.kind, [])
        about = {"kind": self.kind} | {name: getattr(self, name) for name in numbers}
        if self.layout != Layout():
            about["layout"] = dataclasses.asdict(self.layout)
        if about != {"kind": "value"}:
            write_json(os.path.join(folder, "reward.json"), about)


def pad_rows(rows, pad_id, device):
    """-> input_ids (B, T) padded on the right; mask (B, T-1), True where the next token is the
    response's or padding; prompt lengths (B,); step ends (B, S)."""

    def pad(lists, value):
        longest = max(map(len, lists))
        return torch.tensor([list(x) + [value] * (longest - len(x)) for x in lists], device=device)

    ids = pad([row.input_ids for row in rows], pad_id)
    prompts = torch.tensor([row.prompt_length for row in rows], device=device)
    mask = torch.arange(1, ids.shape[1], device=device) >= prompts[:, None]
    return ids, mask, prompts, pad([row.step_ends for row in rows], 0).long()


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
    path, about = os.path.join(name, "reward.json"), {}
    try:
        if os.path.exists(path):
            with open(path) as f:
                about = json.load(f)
        kind, layout = about.pop("kind", "value"), Layout(**about.pop("layout", {}))
        numbers = {key: float(value) for key, value in about.items()}
        if kind not in REDUCE or not numbers.keys() <= {"scale", "beta", "temperature"}:
            raise ValueError
        if kind == "implicit" and "beta" not in numbers:
            raise ValueError
        layout.step_end
    except (ValueError, TypeError, AttributeError, KeyError):
        wanted = "'kind': value, orm, qrm with 'scale', or implicit with 'beta' and 'temperature'"
        raise BadInput(f"{option}: {path} is damaged; wanted {wanted}") from None
    tokenizer, reference = load_tokenizer(name, option), None
    if kind == "implicit":
        model = load_policy(name, dtype, option)
        reference = load_policy(os.path.join(name, "reference"), dtype, option)
    else:
        model = load_classifier(name, dtype, option=option)
    reward = RewardModel(model, tokenizer, kind, reference, layout=layout, **numbers)
    return reward.to(device).eval().requires_grad_(False)
