"""Pieces that can be copied: each runs in an empty module that has nothing but torch, math, numpy
and what its docstring says comes along, and computes there what it computes here."""

import inspect
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prime_minimal as prime
import qrm_minimal as qrm
import rl_minimal as rl
import tdrm_minimal as tdrm
from parts import decoding, training
from test_decoding import PROMPTS, TOKENIZERS, policy

BESIDE = {"torch": torch, "F": F, "math": math, "np": np}


def comes_along(piece):
    """The words of its docstring on what comes along."""
    said = re.search(r"Comes along: (.*?)\.( |$)", " ".join((piece.__doc__ or "").split()))
    return said[1] if said else ""


def paste(*pieces):
    """An empty module with the source of the pieces, of what comes along, and of what comes along
    with that."""
    module = types.ModuleType("pasted")
    space, done = vars(module), set()
    space.update(BESIDE)

    def add(piece, with_what_it_calls=False):
        if piece in done:
            return
        done.add(piece)
        source, said, plain = inspect.getsource(piece), comes_along(piece), inspect.unwrap(piece)
        calls = with_what_it_calls or "with what they call" in said
        for name in re.findall(r"\w+", said + (source if with_what_it_calls else "")):
            thing = plain.__globals__.get(name)
            if inspect.isroutine(thing) and is_ours(thing):
                add(thing, calls)
            elif thing is not None and name not in BESIDE:  # a constant, a class, an import
                space[name] = thing
        if "all above it" in said:  # less the imports of our own
            with open(plain.__code__.co_filename) as f:
                source = f.read().partition(source)[0] + source
            source = re.sub(r"^from parts.*\n", "", source, flags=re.M)
        exec(source, space)

    for piece in pieces:
        add(piece)
    return module


def is_ours(thing):
    return thing.__module__.startswith("parts.") or thing.__module__.endswith("_minimal")


def compare(module, piece, *args, **options):
    """A piece here and there -> the result."""
    here, there = piece(*args, **options), getattr(module, piece.__name__)(*args, **options)
    assert getattr(module, piece.__name__) is not piece
    torch.testing.assert_close(here, there, rtol=0, atol=0)
    return here


def masks(N, T):
    """Rows of 1 to T tokens."""
    lengths = torch.randint(1, T + 1, (N, 1))
    return torch.arange(T) < lengths


def test_td_targets():
    module = paste(tdrm.shaped_rewards, tdrm.td_targets, tdrm.value_loss)
    torch.manual_seed(0)
    labels, logits, mask = torch.rand(6, 5), torch.randn(6, 5), masks(6, 5)
    outcomes = torch.randint(0, 2, (6,))
    rewards = compare(module, tdrm.shaped_rewards, labels, mask)
    for how in ({"n_step": 3}, {"lam": 0.7}):
        found = logits.sigmoid(), rewards, outcomes, mask
        targets = compare(module, tdrm.td_targets, *found, **how)
        compare(module, tdrm.value_loss, logits, targets, mask.float(), 30)


def test_policy_gradient():
    """Log-probs in one chunk and in many, and their gradients."""
    pieces = rl.group_advantages, rl.policy_loss, training.token_logprobs
    module, model = paste(*pieces), policy("llama")
    torch.manual_seed(1)
    rewards, mask = torch.rand(6), masks(6, 9)
    input_ids = torch.randint(0, len(TOKENIZERS["builtin"]), (6, 10))
    for estimator in ("grpo", "dr_grpo", "rloo", "reinforce"):
        advantages = compare(module, rl.group_advantages, rewards, 3, estimator)
    grads = []
    for at_once in (2**25, 60):  # logits: all, those of two tokens
        options = {"temperature": 0.7, "at_once": at_once}
        logprobs, _ = compare(module, training.token_logprobs, model, input_ids, mask, **options)
        old_logprobs = logprobs.detach() + 0.1 * torch.randn(6, 9)
        compare(module, rl.policy_loss, logprobs, old_logprobs, advantages, mask, (0.1, 0.2))
        there, _ = module.token_logprobs(model, input_ids, mask, **options)
        for numbers in (logprobs, there):
            model.zero_grad()
            numbers.sum().backward()
            grads.append(model.lm_head.weight.grad.clone())
    model.zero_grad()
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("stop", ["eos", "step"])
def test_the_sampler(stop):
    module, model, tokenizer = paste(decoding.sample), policy(), TOKENIZERS["builtin"]
    samples = []
    for function in (decoding.sample, module.sample):
        found = function(model, tokenizer, PROMPTS, 3, 0.9, 20, stop=stop, rows_at_once=7)
        samples.append([vars(s) for mine in found for s in mine])
    assert samples[0] == samples[1] and len(samples[0]) == 3 * len(PROMPTS)
    with pytest.raises(ValueError, match="exceed"):
        module.sample(model, tokenizer, ["1+2"], 1, max_new_tokens=10**6)


def test_prime_advantages():
    module = paste(prime.prime_advantages)
    torch.manual_seed(2)
    mask, outcomes = masks(8, 7), torch.randint(0, 2, (8,)).float()
    for estimator in ("rloo", "rloo_code", "grpo", "reinforce", "value"):
        process = torch.randn(8, 7)
        compare(module, prime.prime_advantages, process, outcomes, mask, 4, estimator)


def test_pair_loss():
    module = paste(qrm.pair_loss)
    torch.manual_seed(3)
    sides = torch.randn(4, 6), torch.randn(4, 8), masks(4, 6), masks(4, 8)
    for reduce in ("mean", "sum", "last"):
        compare(module, qrm.pair_loss, *sides, beta=0.5, margin=1.0, reduce=reduce)
