"""Reward models of other kinds than a step's value: what their numbers per token mean, and how those make a prefix's value.

    kind        a token's number z_t                                     value of a prefix (a logit)
    (none)      V of the state after it: TDRM, ScalarPRM, ScalarORM      z of the last token
    orm         the same, trained with the end-of-response token         z of the last token
    implicit    beta (log pi - log pi_ref): PRIME, DPO                   sum of z over the response's tokens
    qrm         Q of the token: Q-RM                                     scale x mean of z over the response's tokens

The kind stands in reward.json in the model's folder, with its numbers; without that file it is an ordinary classifier.
"""
import json
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data

REDUCTIONS = {"implicit": "sum", "qrm": "mean"}


class ImplicitReward(torch.nn.Module):
    """A causal LM and its reference as one model with one number per token, usable with cache.RowCache as any other.

    A token's log-prob is read where the token before it was; so the last hidden state of each token is kept in the cache
    like a key, as one more layer of each of the two models."""

    def __init__(self, model, reference, beta, temperature=1.0):
        super().__init__()
        self.model, self.reference, self.beta, self.temperature = model, reference, beta, temperature
        self.config, self.layers = model.config, model.config.num_hidden_layers
        for i, layer in enumerate(reference.base_model.layers):
            layer.self_attn.layer_idx = self.layers + 1 + i  # of the cache, which both models share

    @property
    def dtype(self):
        return self.model.dtype

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, past_key_values=None, use_cache=False, **options):
        scores, start = 0.0, past_key_values.used if use_cache else 0
        for lm, sign, extra in (self.model, 1.0, self.layers), (self.reference, -1.0, 2 * self.layers + 1):
            hidden = lm.base_model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache,
                                   **options).last_hidden_state
            before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]  # the first token of all has nothing before it; it is prompt
            if use_cache:
                kept, _ = past_key_values.update(hidden[:, None], hidden[:, None, :, :0], extra)
                before = F.pad(kept[:, 0], (0, 0, 1, 0))[:, start:-1]
            logp = F.log_softmax(lm.get_output_embeddings()(before).float() / self.temperature, dim=-1)
            scores = scores + sign * self.beta * logp.gather(-1, input_ids[..., None])
        return SimpleNamespace(logits=scores)  # (rows, tokens, 1)


def load_scorer(name, dtype, load_classifier):
    """A reward model of any kind from its folder or name: `reduce` and `scale` say how a prefix's value is made of its
    numbers, `reads_eos` whether it was trained with the end-of-response token."""
    path = os.path.join(name, "reward.json")
    about = {}
    if os.path.exists(path):
        with open(path) as f:
            about = json.load(f)
    kind = about.get("kind")
    if kind == "implicit":
        from transformers import AutoModelForCausalLM
        load = lambda folder: data.load_model(AutoModelForCausalLM, folder, dtype=dtype)  # noqa: E731
        model = ImplicitReward(load(name), load(os.path.join(name, "reference")), about["beta"], about.get("temperature", 1.0))
    else:
        model = load_classifier(name, dtype, new_head=False)
    model.reduce, model.scale, model.reads_eos = REDUCTIONS.get(kind, "last"), about.get("scale", 1.0), kind is not None
    return model


def prefix_values(model, input_ids, step_ends, prompt_lengths):
    """Logits (B, S) of the prefixes that end at `step_ends` (B, S), from one forward over right-padded input_ids (B, T);
    prompt_lengths (B,)."""
    scores = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1).float()  # (B, T)
    if model.reduce == "last":
        return model.scale * scores.gather(1, step_ends)
    response = torch.arange(input_ids.shape[1], device=input_ids.device) >= prompt_lengths[:, None]
    sums = (scores * response).cumsum(1).gather(1, step_ends)
    counts = (step_ends + 1 - prompt_lengths[:, None]).clamp(min=1)
    return model.scale * (sums / counts if model.reduce == "mean" else sums)
