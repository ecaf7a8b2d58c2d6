"""Sampling and search against naive twins: no cache, one row at a time, plain Python loops, and the same noise.

The policies are random, with biases on the last layer that make blank lines and ends frequent enough to matter; the script
itself runs on a policy that was trained for seconds on questions of two operations.
"""
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import data
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from cache import RowCache, cache_bytes, feed, pad, prompt_cache
from conftest import ROOT
from data import BadInput
from plumbing import Env

CPU = torch.device("cpu")
TOKENIZERS = {"builtin": data.builtin_tokenizer(), "byte": data.byte_tokenizer()}
PROMPTS = ["1+2", "7+8*3-5", "5*5+5*5+5*5+5", "9-9"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share out
    yield
    torch.set_num_threads(threads)


def llama(tokenizer, extra_tokens=0):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer) + extra_tokens, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))


@functools.cache
def policy(shape="qwen2", spelling="builtin", extra_tokens=0):
    """A random policy that writes lines of text, now and then a blank one, and ends after some twenty tokens."""
    tokenizer = TOKENIZERS[spelling]
    model = sft.new_policy(tokenizer, 0) if shape == "qwen2" else llama(tokenizer, extra_tokens)
    bias = torch.full((model.config.vocab_size,), -30.0)
    text = "0123456789+-*=" if spelling == "builtin" else "abcdefghij"
    bias[tokenizer.convert_tokens_to_ids(list(text))] = 0.0
    bias[len(tokenizer):] = 0.0
    bias[tokenizer.convert_tokens_to_ids("\n\n" if spelling == "builtin" else "Ċ")] = 1.5
    bias[tokenizer.eos_token_id] = -0.3
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Reward models with random heads, from saved folders: {"qwen2", "llama", "flat"}, the last without an opinion."""
    place, found = tmp_path_factory.mktemp("prms"), {}
    for shape in ("qwen2", "llama"):
        model = sft.new_policy(TOKENIZERS["builtin"], 3) if shape == "qwen2" else llama(TOKENIZERS["builtin"])
        model.save_pretrained(place / shape)
        found[shape] = tdrm.load_reward_model(str(place / shape), seed=4).eval()
    found["flat"] = tdrm.load_reward_model(str(place / "qwen2")).eval()
    torch.nn.init.zeros_(found["flat"].score.weight)
    return found


@pytest.fixture
def noise_table(monkeypatch):
    """Noise looked up as u(problem, row, position in the response): the same for sampling at once and step by step."""
    table = np.random.default_rng(5).random((8, 24, 256), dtype=np.float32)
    monkeypatch.setattr(search, "uniforms", lambda seed, key, depth, starts, length:
                        np.stack([table[key, row, start:start + length] for row, start in enumerate(starts)]))
    return table


@torch.no_grad()
def full_logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0].double()


def naive_response(model, tokenizer, prompt_ids, noise, temperature=1.0, one_step=False):
    """Token ids, one full forward for each. `one_step`: up to a blank line after some text."""
    new = []
    for u in noise:
        p = torch.softmax(full_logits(model, prompt_ids + new)[-1] / (temperature or 1.0), -1).numpy()
        new.append(int(np.searchsorted(p.cumsum(), u * p.sum(), side="right") if temperature else p.argmax()))
        if new[-1] == tokenizer.eos_token_id or (one_step and "\n\n" in tokenizer.decode(new).lstrip()):
            break
    return new


# ---------------------------------------------------------------------------------------------------------------------
# The cache.

@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape, garbage", [("qwen2", False), ("llama", False), ("llama", True)])
def test_any_walk_through_the_cache_gives_the_logits_of_full_forwards(shape, garbage, seed, monkeypatch):
    """`garbage`: new memory may hold anything, NaN too, and no slot that was never written may count."""
    if garbage:
        empty = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: empty(self, *size).fill_(math.nan))
    model, rng = policy(shape), random.Random(seed)
    some = lambda low, high: [rng.randrange(len(TOKENIZERS["builtin"])) for _ in range(rng.randint(low, high))]  # noqa: E731
    texts = [some(1, 9) for _ in range(5)]
    cache, ids, mask = prompt_cache(texts, CPU, 8, 1)
    with torch.no_grad():
        logits = feed(model, cache, ids, mask, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits.double(), torch.stack([full_logits(model, t)[-1] for t in texts]), rtol=0, atol=1e-4)
    rows = [[(ids.shape[1] - len(t) + i, token) for i, token in enumerate(t)] for t in texts]  # (slot, token) of every row
    room, moves = 1, Counter()
    for step in range(40):
        move = rng.choice(("feed", "feed", "feed", "branch", "branch", "select")) if step else "branch"
        batch = range(cache.start, cache.stop)
        moves[move] += 1
        if move == "feed" and room >= 1:
            new = [some(1, min(room, 3)) for _ in batch]
            ids, mask = pad(new, rng.choice(("left", "right")), CPU)
            begin, room = cache.used, room - ids.shape[1]
            with torch.no_grad():
                logits = feed(model, cache, ids, mask).logits
            for i, (row, tokens) in enumerate(zip(batch, new)):
                rows[row] = rows[row] + list(zip((begin + mask[i].nonzero()[:, 0]).tolist(), tokens))
                expected = full_logits(model, [token for _, token in rows[row]])[-len(tokens):]
                torch.testing.assert_close(logits[i, mask[i]].double(), expected, rtol=0, atol=1e-4)
        elif move == "branch":
            free = len(cache.mask) - cache.stop
            parents = rng.sample(batch, rng.randint(1, len(batch)))
            parents = sorted(parents + rng.choices(parents, k=rng.randint(0, free)))
            children, moved = cache.branch(torch.tensor(parents))
            after = [None] * cache.stop
            for old, row in enumerate(rows):
                after[moved[old]] = row
            for parent, child in zip(parents, children.tolist()):
                assert after[child] in (None, rows[parent]), "a fork takes free rows only"
                after[child] = rows[parent]
            rows = after
            assert sorted(children.tolist()) == list(range(cache.start, cache.stop))
        elif move == "select":
            picked = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 7))]  # ended rows, too
            slots = [rng.randint(rows[i][0][0] + 1, cache.used) for i in picked]  # how much of each
            room, capacity = rng.randint(0, 12), rng.randint(0, 12)
            texts = [[token for slot, token in rows[i] if slot < limit] for i, limit in zip(picked, slots)]
            cache = cache.select(torch.tensor(picked), room, torch.tensor(slots), capacity)
            longest = max(map(len, texts))
            rows = [list(enumerate(text, longest - len(text))) for text in texts]
            assert cache.position[:len(rows)].tolist() == list(map(len, texts)) == cache.mask.sum(1)[:len(rows)].tolist()
            assert cache.mask.shape == (max(capacity, len(texts)), longest + room), "no more slots than the longest row needs"
    assert len(moves) == 3


@pytest.mark.parametrize("shape", ["qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_cache_are_known_before_and_given_back_after(shape, dtype):
    gc.collect()
    before, model = RowCache.now, policy(shape)
    with torch.no_grad():
        model.to(dtype)
        try:
            cache, ids, mask = prompt_cache([[5, 6, 7], [8]], CPU, 4, 2)
            feed(model, cache, ids, mask)
            more = cache.select(torch.tensor([0, 0, 1]), 5)
        finally:
            model.to(torch.float32)
    for c, rows, slots in ((cache, 4, 5), (more, 3, 8)):
        assert c.bytes == sum(t.nbytes for t in c.keys + c.values) == cache_bytes(model.config, rows, slots, dtype)
    assert RowCache.now == before + cache.bytes + more.bytes <= RowCache.peak
    del c, cache
    assert RowCache.now == before + more.bytes
    del more
    assert RowCache.now == before


# ---------------------------------------------------------------------------------------------------------------------
# Sampling.

CASES = [("qwen2", "builtin", 1.0, "eos"), ("qwen2", "builtin", 0.7, "eos"), ("llama", "builtin", 0.0, "eos"),
         ("llama", "builtin", 1.0, "step"), ("qwen2", "byte", 1.0, "step"), ("llama", "byte", 0.7, "step")]


@pytest.mark.parametrize("shape, spelling, temperature, stop", CASES)
def test_sample_equals_a_decoder_without_cache(shape, spelling, temperature, stop):
    model, tokenizer, n, longest = policy(shape, spelling), TOKENIZERS[spelling], 3, 30
    drawn = functools.partial(search.sample, model, tokenizer, PROMPTS, n, temperature, longest, seed=2, stop=stop)
    samples = drawn()
    for key, (prompt, mine) in enumerate(zip(PROMPTS, samples)):
        noise = search.uniforms(2, key, 0, [0] * n, longest)
        prompt_ids = data.encode_prompt(tokenizer, prompt)
        for row, s in enumerate(mine):
            assert s.prompt_ids == prompt_ids
            assert s.token_ids == naive_response(model, tokenizer, prompt_ids, noise[row], temperature, stop == "step")
            assert s.text == tokenizer.decode(s.token_ids, skip_special_tokens=True)
            assert s.finished == (s.token_ids[-1] == tokenizer.eos_token_id)
            logp = torch.log_softmax(full_logits(model, prompt_ids + s.token_ids)[len(prompt_ids) - 1:-1] / (temperature or 1.0), -1)
            expected = logp.gather(1, torch.tensor(s.token_ids)[:, None])[:, 0].tolist()
            assert s.logprobs == pytest.approx(expected, abs=1e-4)
            if stop == "step" and "\n\n" in s.text.strip("\n"):
                pytest.fail(f"went on after a blank line: {s.text!r}")
    for rows_at_once in (1, 4, 7):
        again = drawn(rows_at_once=rows_at_once)
        assert [[s.token_ids for s in mine] for mine in again] == [[s.token_ids for s in mine] for mine in samples]
    everything = [s for mine in samples for s in mine]
    if temperature:  # the cases have to hold what they are about
        assert any(s.finished for s in everything) or stop == "step"
        assert any(s.text.endswith("\n\n") for s in everything) or stop == "eos"
        assert len({len(s.token_ids) for s in everything}) > 3, "rows that end at different times"


@pytest.mark.parametrize("stop", ["eos", "step"])
@pytest.mark.parametrize("shape, temperature, least, most", [("qwen2", 0.06, 0, 0.6), ("llama", 0.06, 0, 0.6), ("qwen2", 5.0, 0.8, 1)])
def test_samples_that_share_rows_are_what_they_are_alone(shape, temperature, least, most, stop):
    """With much to share and little: the tokens of a decoder that gives every sample a row of its own, and a cache to go on
    from, of samples that ended in a row that others went on in, too."""
    model, tokenizer, n, longest = policy(shape), TOKENIZERS["builtin"], 12, 25
    prompts = [data.encode_prompt(tokenizer, p) for p in PROMPTS]
    noise = torch.from_numpy(np.random.default_rng(3).random((len(prompts) * n, longest), dtype=np.float32))
    owner = torch.arange(len(prompts)).repeat_interleave(n)
    step_end = search.StepEnd(tokenizer, CPU) if stop == "step" else None
    results, read = [], []
    for texts, place in ((prompts, owner), ([prompts[i] for i in owner], torch.arange(len(owner)))):
        cache, ids, mask = prompt_cache(texts, CPU, len(owner), longest)
        with tokens_read(model) as counter:
            results.append(search.decode(model, cache, ids, mask, place, noise, temperature, tokenizer.eos_token_id, step_end))
        read.append(counter["read"] - sum(map(len, texts)))
        tokens, logprobs, place, slots = results[-1]
        rows = torch.tensor(random.Random(0).sample(range(len(owner)), len(owner)))
        cache = cache.select(place[rows], 1, slots[rows])
        assert cache.mask.shape == (len(owner), max(len(prompts[owner[i]] + tokens[i]) for i in rows))
        last = torch.tensor([tokens[i][-1:] for i in rows])
        with torch.no_grad():
            logits = feed(model, cache, last, torch.ones_like(last, dtype=torch.bool)).logits[:, -1]
        expected = torch.stack([full_logits(model, prompts[owner[i]] + tokens[i])[-1] for i in rows])
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
    (tokens, logprobs, place, slots), (alone, their_logprobs, their_place, _) = results
    assert tokens == alone and sorted(their_place.tolist()) == list(range(len(owner)))
    for mine, theirs in zip(logprobs, their_logprobs):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert least <= read[0] / read[1] <= most
    if most < 1 and stop == "step":  # the case has to hold what it is about
        ends = {}
        for row, slot in zip(place.tolist(), slots.tolist()):
            ends.setdefault(row, set()).add(slot)
        assert any(len(found) > 1 for found in ends.values()), "samples of different lengths in one row"


def test_samples_are_a_function_of_seed_and_key():
    model, tokenizer = policy(), TOKENIZERS["builtin"]
    tokens = lambda prompts=PROMPTS, n=4, **options: [  # noqa: E731
        [s.token_ids for s in mine] for mine in search.sample(model, tokenizer, prompts, n, max_new_tokens=20, **options)]
    base = tokens(seed=1)
    assert tokens(seed=1) == base != tokens(seed=2)
    assert tokens(seed=1, n=2) == [mine[:2] for mine in base], "more samples are the same ones and others"
    assert tokens(PROMPTS[::-1], seed=1, keys=[3, 2, 1, 0]) == base[::-1], "not the batch's order but the key names a problem"
    assert tokens([PROMPTS[2]], seed=1, keys=[2]) == [base[2]]
    assert len(set(map(tuple, tokens(["1+2"], n=8)[0]))) > 4
    chat = [{"role": "user", "content": "1+2"}]
    assert tokens([chat, "1+2", data.encode_prompt(tokenizer, "1+2")], keys=[5, 5, 5]) == [tokens(["1+2"], keys=[5])[0]] * 3


def test_the_end_of_a_response():
    model, tokenizer = policy(), TOKENIZERS["builtin"]
    for s in search.sample(model, tokenizer, ["1+2"], 40, max_new_tokens=12)[0]:
        if s.finished:
            assert s.token_ids.index(tokenizer.eos_token_id) == len(s.token_ids) - 1 and "<eos>" not in s.text
        else:
            assert len(s.token_ids) == 12 and tokenizer.eos_token_id not in s.token_ids
        assert len(s.logprobs) == len(s.token_ids)
    limit = model.config.max_position_embeddings
    length = len(data.encode_prompt(tokenizer, ""))
    search.sample(model, tokenizer, ["1" * (limit - length - 1)], 1, max_new_tokens=1)
    with pytest.raises(BadInput, match=f"{limit} tokens and --max_new_tokens {length + 1} "):
        search.sample(model, tokenizer, ["1+2", "1" * (limit - length)], 1, max_new_tokens=length + 1)
    assert search.sample(model, tokenizer, [], 3) == []


@pytest.mark.parametrize("stop", ["eos", "step"])
def test_a_policy_with_more_tokens_than_its_tokenizer(stop):
    """Models are often rounded up to a multiple of 64 tokens; the ids that stand for nothing may be sampled all the same."""
    model, tokenizer = policy("llama", "builtin", 20), TOKENIZERS["builtin"]
    mine = search.sample(model, tokenizer, ["1+2"], 8, max_new_tokens=20, stop=stop)[0]
    assert any(i >= len(tokenizer) for s in mine for i in s.token_ids)


def test_attention_of_every_kind_is_full_or_refused():
    """The plain implementation adds its mask instead of selecting by it; a sliding window is no more than a limit."""
    tokenizer = TOKENIZERS["builtin"]
    model = llama(tokenizer).eval()
    tokens = lambda: [[s.token_ids for s in mine] for mine in search.sample(model, tokenizer, PROMPTS, 2, max_new_tokens=20)]  # noqa: E731
    fused = tokens()
    model.set_attn_implementation("eager")
    assert tokens() == fused
    model.config.sliding_window = 30
    with pytest.raises(BadInput, match="30"):
        tokens()


def test_pick_follows_the_distribution():
    rng = np.random.default_rng(0)
    for size in (2, 10, 60):
        p = rng.random(size)**3 * (rng.random(size) < 0.7)
        p[[0, -1]] = 0.0
        p[1] = 0.5 if size > 2 else 0.0
        p = p if p.sum() else np.array([0.0, 1.0])
        logp = torch.tensor(p / p.sum()).float().log()
        counts = np.bincount(search.pick(logp.expand(20_000, size), torch.from_numpy(rng.random(20_000, dtype=np.float32))),
                             minlength=size)
        expected = 20_000 * p / p.sum()
        assert not counts[expected == 0].any()
        chi2 = ((counts - expected)**2 / np.maximum(expected, 1e-9))[expected > 0].sum()
        assert chi2 < size + 5 * math.sqrt(2 * size)
        edges = torch.tensor([0.0, 1e-45, np.nextafter(np.float32(1), np.float32(0))])
        assert (p[search.pick(logp.expand(3, size), edges)] > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Tree search.

def test_one_sample_and_a_tree_of_one_branch_are_plain_sampling(noise_table, models):
    """With the same noise: best-of-1, keep 1 x expand 1, and sample(), in tokens; cut at max_new_tokens, too."""
    model, tokenizer = policy(), TOKENIZERS["builtin"]
    prompts = PROMPTS + PROMPTS[::-1]
    for longest, max_step in itertools.product((9, 17, 60), (5, 64)):
        samples = search.sample(model, tokenizer, prompts, 1, max_new_tokens=longest)
        best, count = search.tree_search(model, tokenizer, models["qwen2"], tokenizer, prompts, 1, 1, max_new_tokens=longest,
                                         max_step_tokens=max_step, max_steps=100)
        for (s,), beam in zip(samples, best):
            naive = naive_response(model, tokenizer, s.prompt_ids, noise_table[samples.index([s])][0][:longest])
            assert beam.token_ids == s.token_ids == naive and beam.finished == s.finished
            assert max_step < 60 or not s.finished or beam.steps == data.split_steps(s.text)
        assert count["generated"] == sum(len(s.token_ids) for (s,) in samples)


def test_one_branch_has_the_distribution_of_samples(models):
    model, tokenizer, keys = policy(), TOKENIZERS["builtin"], 500
    kinds = lambda responses: Counter((min(t.count(21), 3), len(t) // 10) for t in responses)  # noqa: E731  (21: a blank line)
    assert tokenizer.convert_tokens_to_ids("\n\n") == 21
    best, _ = search.tree_search(model, tokenizer, models["qwen2"], tokenizer, ["1+2"] * keys, 1, 1, max_new_tokens=40)
    tree = kinds([beam.token_ids for beam in best])
    plain = kinds([s.token_ids for s in search.sample(model, tokenizer, ["1+2"], 2 * keys, max_new_tokens=40, seed=7)[0]])
    assert len(plain) > 6
    for kind in plain | tree:
        p = (plain[kind] + tree[kind]) / (3 * keys)
        assert abs(plain[kind] / (2 * keys) - tree[kind] / keys) < 4 * math.sqrt(p * (1 - p) * 1.5 / keys) + 0.002, kind


def naive_tree(model, prm, tokenizer, prompt, noise, keep, expand, subtrees, temperature, max_step, longest):
    """One problem, full forwards -> (best, candidates of each depth). A beam: [token ids, steps, reward model's ids, value, finished].

    A group's candidates are distinct in tokens; the best `keep` of them and of the finished go on, the first of equals first.
    A step without text, such as an end right after a blank line, adds no step and so keeps the value."""
    prompt_ids, trace = data.encode_prompt(tokenizer, prompt), []
    live = [[[[], [], list(prompt_ids), 0.0, False]] for _ in range(subtrees)]
    ended = [[] for _ in range(subtrees)]
    for depth in itertools.count():
        row = 0
        for g in range(subtrees):
            new = {}
            for ids, steps, read, value, _ in live[g]:
                for _ in range(expand if depth else keep * expand):
                    u, row = noise[row][len(ids):min(len(ids) + max_step, longest)], row + 1
                    tokens = naive_response(model, tokenizer, prompt_ids + ids, u, temperature, one_step=True)
                    text, end = tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens[-1] == tokenizer.eos_token_id
                    step = tokenizer(text + ("" if end else "\n\n"), add_special_tokens=False)["input_ids"] if text else []
                    v = full_logits(prm, read + step)[-1, 0].sigmoid().item() if text else value
                    new.setdefault(tuple(ids + tokens), [ids + tokens, steps + [text] * bool(text), read + step, v, end])
            trace += [(depth, g, [c[0] for c in new.values()])] if new else []
            kept = sorted(ended[g] + list(new.values()), key=lambda b: -b[3])[:keep]
            ended[g] = [b for b in kept if b[4] or len(b[0]) >= longest]
            live[g] = [b for b in kept if not (b[4] or len(b[0]) >= longest)]
        if not any(live):
            return max((b for e in ended for b in e), key=lambda b: b[3]), trace


TREES = {"greedy": (1, 3, 1), "beam": (3, 2, 1), "dvts": (1, 3, 2)}


@pytest.mark.parametrize("shape, temperature", [("qwen2", 1.0), ("llama", 0.7), ("flat", 1.0), ("qwen2", 0.0)])
@pytest.mark.parametrize("method", TREES)
def test_tree_search_equals_a_naive_one(method, shape, temperature, models, noise_table):
    """All problems at once against each by itself without caches, candidate by candidate. "flat": all values are equal."""
    tokenizer, prm = TOKENIZERS["builtin"], models[shape]
    model, trace = policy("llama" if shape == "llama" else "qwen2"), []
    keep, expand, subtrees = TREES[method]
    best, _ = search.tree_search(model, tokenizer, prm, tokenizer, PROMPTS, keep, expand, subtrees, temperature,
                                 max_step_tokens=14, max_new_tokens=36, max_steps=60, trace=trace)
    for i, (prompt, beam) in enumerate(zip(PROMPTS, best)):
        expected, steps = naive_tree(model, prm, tokenizer, prompt, noise_table[i], keep, expand, subtrees, temperature, 14, 36)
        mine = [(depth, group - i * subtrees, [b.token_ids for b in new]) for depth, group, new, _ in trace if group // subtrees == i]
        assert mine == steps
        assert (beam.token_ids, beam.steps, beam.finished) == (expected[0], expected[1], expected[4])
        assert beam.value == pytest.approx(expected[3], abs=1e-4)


@pytest.mark.parametrize("method", TREES)
def test_a_tree_does_not_depend_on_the_others_in_its_batch(method, models):
    """Else two processes would not give the table of one. Responses near max_new_tokens are the hard part."""
    model, tokenizer = policy(), TOKENIZERS["builtin"]
    grow = lambda keys, **more: search.tree_search(  # noqa: E731
        model, tokenizer, models["qwen2"], tokenizer, [PROMPTS[i] for i in keys], *TREES[method], keys=keys, max_step_tokens=16,
        max_new_tokens=24, **more)[0]
    together = grow([0, 1, 2, 3])
    assert [b.token_ids for b in together] == [grow([i])[0].token_ids for i in range(4)]
    assert all(len(b.token_ids) <= 24 for b in together)
    assert [b.token_ids for b in grow([0, 1, 2, 3], seed=1)] != [b.token_ids for b in together]


@contextlib.contextmanager
def tokens_read(model):
    """Counts the tokens that come to a model; 0 is padding and in no text here."""
    counter = Counter()
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counter.update(read=int((args[0] != 0).sum())))
    yield counter
    hook.remove()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("method", TREES)
def test_no_prefix_token_is_read_twice(method, temperature, models):
    model, tokenizer, prm, trace = policy(), TOKENIZERS["builtin"], models["qwen2"], []
    keep, expand, subtrees = TREES[method]
    assert tokenizer.pad_token_id == 0
    with tokens_read(model) as by_policy, tokens_read(prm) as by_prm:
        _, count = search.tree_search(model, tokenizer, prm, tokenizer, PROMPTS, keep, expand, subtrees, temperature,
                                      max_new_tokens=40, max_steps=100, trace=trace)
    prompts = sum(len(data.encode_prompt(tokenizer, p)) for p in PROMPTS)
    kept = {(depth, group): [b.token_ids for b in best if not b.finished and len(b.token_ids) < 40] for depth, group, _, best in trace}
    last = sum(map(len, kept.values()))  # a candidate's last token is read if it is kept
    sampled = len(PROMPTS) * subtrees * keep * expand + last * expand
    assert by_policy["read"] <= prompts + count["generated"] - sampled + last
    distinct = set()  # texts within a step; at the root, subtrees share what they have in common
    for depth, group, new, _ in trace:
        for ids in (b.token_ids for b in new):
            begin = next(len(p) for p in kept[depth - 1, group] if ids[:len(p)] == p) if depth else 0
            distinct |= {(group if depth else group // subtrees, tuple(ids[:n])) for n in range(begin + 1, len(ids))}
    assert by_policy["read"] == prompts + len(distinct) + last
    steps = {(group, tuple(b.token_ids)): tokenizer(b.steps[-1] + ("" if b.finished else "\n\n"))["input_ids"]
             for _, group, new, _ in trace for b in new if b.token_ids != [1] and tokenizer.decode(b.token_ids[-2:]) != "\n\n<eos>"}
    assert by_prm["read"] == count["scored"] == prompts + sum(map(len, steps.values()))
    if not temperature:  # every candidate is a duplicate of the first
        assert all(len(new) <= keep for _, _, new, _ in trace)


def test_a_reward_model_with_dropout_is_not_noisy(models, tmp_path):
    """After scoring whole responses (which ends in training mode) the tree's values are still the same."""
    tokenizer = TOKENIZERS["builtin"]
    model = sft.new_policy(tokenizer, 3)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    prm = tdrm.load_reward_model(str(tmp_path)).eval()
    grow = lambda: [b.value for b in search.tree_search(policy(), tokenizer, prm, tokenizer, PROMPTS, 1, 2, max_new_tokens=20)[0]]  # noqa: E731
    before = grow()
    search.score_texts(prm, tokenizer, ["1+2"], [["1+2=3", ""]], Env())
    assert grow() == before


def test_responses_to_many_prompts_are_scored_together(models):
    """Each as by itself; what is equal, or has no step, costs nothing."""
    tokenizer, prm = TOKENIZERS["builtin"], models["qwen2"]
    responses = [["1=1\n\n2", "3", "1=1\n\n2"], [" "], ["3", "", "4\n\n5\n\n6"], []]
    values, tokens = search.score_texts(prm, tokenizer, PROMPTS, responses, Env())
    for prompt, texts, mine, count in zip(PROMPTS, responses, values, tokens):
        rows = {text: data.encode_trajectory(tokenizer, prompt, data.split_steps(text)) for text in texts if text.strip()}
        assert count == sum(len(ids) for ids, _, _ in rows.values()) and len(mine) == len(texts)
        for text, found in zip(texts, mine):
            ids, _, ends = rows.get(text, ([0], None, []))
            assert found == pytest.approx(full_logits(prm.eval(), ids)[ends, 0].sigmoid().tolist(), abs=1e-4)
    assert search.score_texts(prm, tokenizer, ["1+2"], [["", " "]], Env()) == ([[[], []]], [0])


# ---------------------------------------------------------------------------------------------------------------------
# Answers from one set of samples.

@pytest.mark.parametrize("how, expected", [("last", 0.5), ("min", 0.2), ("mean", 0.4), ("prod", 0.05)])
def test_aggregate(how, expected):
    assert search.aggregate([0.5, 0.2, 0.5], how) == pytest.approx(expected)
    assert search.aggregate([0.3], how) == pytest.approx(0.3) and search.aggregate([], how) == 0.0


def test_pass_at_n_is_the_mean_over_all_choices():
    for total in range(1, 8):
        for right, n in itertools.product(range(total + 1), range(1, total + 1)):
            choices = list(itertools.combinations([1] * right + [0] * (total - right), n))
            assert search.pass_at_n(right, total, n) == pytest.approx(np.mean([max(c) for c in choices]))


@pytest.mark.parametrize("answers, weights, winner", [
    ("abb", [1, 1, 1], "b"), ("ab", [1, 1], "a"), ("ba", [1, 1], "b"), ("abb", [0.9, 0.2, 0.3], "a"), ([None, None, "a"], [1, 1, 1], "a"),
    ([None, None], [1, 1], None), ([], [], None), ("ab", [0.0, 0.0], "a"), ("cabba", [0, 1, 1, 1, 1], "a")])
def test_vote(answers, weights, winner):
    assert search.vote(list(answers), weights) == winner


def test_answers_from_samples_against_the_definitions():
    """Groups of n one after another; oracle from all N."""
    keys, right = list("abbacbca"), [k == "a" for k in "abbacbca"]
    values = [[0.1, 0.9], [0.8], [0.2, 0.3], [0.9, 0.1], [], [0.5], [0.4], [0.6, 0.7]]
    record = {"keys": keys, "right": right, "values": {"x": values}}
    expected = {  # by hand, last value: .9 .8 .3 .1 | 0 .5 .4 .7
        1: {"majority": 3 / 8, "best-of-n, x": 3 / 8, "weighted, x": 3 / 8, "oracle": 3 / 8},
        2: {"majority": 1 / 4, "best-of-n, x": 2 / 4, "weighted, x": 2 / 4, "oracle": search.pass_at_n(3, 8, 2)},
        4: {"majority": 1 / 2, "best-of-n, x": 2 / 2, "weighted, x": 1 / 2, "oracle": search.pass_at_n(3, 8, 4)},
        8: {"majority": 1.0, "best-of-n, x": 1.0, "weighted, x": 1.0, "oracle": 1.0}}
    for n, hits in expected.items():
        assert search.answers_from_samples(record, n, "last") == pytest.approx(hits), n


# ---------------------------------------------------------------------------------------------------------------------
# The script.

def two_operations(seed, count):
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        a, b, c = rng.randint(0, 9), rng.randint(2, 9), rng.randint(2, 9)
        x, y = (a + b) % 10, (a + b) * c % 10
        rows[f"{a}+{b}*{c}"] = {"prompt": f"{a}+{b}*{c}", "completions": [f"{a}+{b}={x}", f"{x}*{c}={y}", f"\\boxed{{{y}}}"], "answer": str(y)}
    return list(rows.values())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """policy/ (right every other time), reward models tokens/ and sequences/, two_labels/, problems.jsonl, long.jsonl."""
    from transformers import AutoModelForSequenceClassification
    place, tokenizer = tmp_path_factory.mktemp("search"), TOKENIZERS["builtin"]
    rows = two_operations(0, 80)
    sft.save_model(str(place / "new"), sft.new_policy(tokenizer, 0), tokenizer)
    sft.main(sft.Config(model=str(place / "new"), data=(write_rows(place / "solutions.jsonl", rows),), out=str(place / "sft"), steps=40,
                        batch_size=32, save_every=0, eval_every=0, eval_problems=2, max_new_tokens=30), Env())
    shutil.copytree(place / "sft" / "model", place / "policy")
    sft.save_model(str(place / "tokens"), tdrm.load_reward_model(str(place / "policy"), seed=1), tokenizer)
    for name, labels in (("sequences", 1), ("two_labels", 2)):
        torch.manual_seed(2)
        sft.save_model(str(place / name), AutoModelForSequenceClassification.from_pretrained(place / "policy", num_labels=labels), tokenizer)
    problems = [{"question": row["prompt"], "answer": row["answer"]} for row in rows[:5] + two_operations(1, 4)]
    write_rows(place / "problems.jsonl", problems)
    write_rows(place / "long.jsonl", problems[:2] + [{"question": "1+" * 2000 + "1", "answer": "1"}] + problems[2:])
    write_rows(place / "only_long.jsonl", [{"question": "1+" * 2000 + "1", "answer": "1"}])
    write_rows(place / "no_answers.jsonl", [{"prompt": "1+2", "completions": ["1", "2"], "labels": [1, 0]}])
    (place / "empty.jsonl").write_text("")
    return place


def options(place, tmp_path, **more):
    return {"model": str(place / "policy"), "prm": (str(place / "tokens"),), "data": (str(place / "problems.jsonl"),), "out": str(tmp_path / "run"),
            "n": 4, "beam": 2, "expand": (2,), "max_new_tokens": 24} | more


def run(*args, **more):
    chosen = options(*args, **more)
    rows = search.main(search.Config(**chosen), Env())
    with open(os.path.join(chosen["out"], "summary.json")) as f:
        summary = json.load(f)
    assert summary["rows"] == rows
    return summary


def without_clock(summary):
    return [{k: pytest.approx(v, abs=1e-9) if isinstance(v, float) else v for k, v in row.items() if k != "seconds"} for row in summary["rows"]]


def test_a_table_with_several_reward_models(place, tmp_path, capsys):
    """The samples in the trajectory format, the table on screen and in summary.json, cache sizes, one search to look at."""
    summary = run(place, tmp_path, prm=(str(place / "tokens"), str(place / "sequences")), n=8, max_new_tokens=40, temperature=1.5, show=True)
    screen = capsys.readouterr().out
    assert summary["problems"] == 9 and summary["left_out"] == 0
    names = ["tokens", "sequences"]
    expected = {("pass@1", 1), ("greedy decoding", 1), *((m, n) for n in (2, 4, 8) for m in (
        "oracle", "majority", *(f"{how}, {name}" for how in ("best-of-n", "weighted") for name in names)))}
    expected |= {(f"{tree} 2, {name}", 1) for tree in ("greedy search", "beam search 2 x", "dvts 2 x") for name in names}
    rows = {(row["method"], row["n"]): row for row in summary["rows"]}
    assert set(rows) == expected and len(rows) == len(summary["rows"])
    for (method, n), row in rows.items():
        assert re.search(rf"^{re.escape(method)} +{n} +{row['accuracy']:.3f} ± {row['stderr']:.3f}", screen, re.M), method
        assert (row["scored"] > 0) == ("," in method) and row["generated"] > 0 and row["seconds"] > 0
    assert 0 < rows["pass@1", 1]["accuracy"] < 1
    samples = list(data.read_trajectories(str(tmp_path / "run" / "samples.jsonl")))
    raw = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    assert len(samples) == 9 * 8 - summary["empty_responses"]
    assert np.mean([s["correct"] for s in samples]) * len(samples) / 72 == pytest.approx(rows["pass@1", 1]["accuracy"])
    for sample, row in zip(samples, raw):
        assert sample["correct"] == data.verify("\n\n".join(sample["completions"]), sample["answer"])
        assert set(row["values"]) == set(names) and {len(v) for v in row["values"].values()} == {len(row["completions"])}
    for name in names:  # the values are those of the reward model, by plain scoring
        prm, tokenizer = tdrm.load_reward_model(str(place / name)).eval(), data.load_tokenizer(str(place / name))
        for row in raw[::10]:
            ids, _, ends = data.encode_trajectory(tokenizer, row["prompt"], row["completions"])
            assert row["values"][name] == pytest.approx(full_logits(prm, ids)[ends, 0].sigmoid().tolist(), abs=1e-4)
    measured, estimated = map(float, re.search(r"a row for each sample: ([\d.]+) MiB, from the config ([\d.]+) MiB", screen).groups())
    assert measured > 1 and abs(measured - estimated) <= 0.1 * measured
    shown = screen[screen.index("beam search 2 x 2 with tokens"):].splitlines()
    assert shown[0].endswith(raw[0]["prompt"]) and shown[1].startswith("  depth 1: ")
    first = list(itertools.takewhile(lambda line: "depth" not in line, shown[2:]))
    numbers = [float(re.search(r"\d\.\d\d", line)[0]) for line in first]
    assert numbers == sorted(numbers, reverse=True) and len(first) in (3, 4), "more candidates than are kept"
    assert ["keep" in line for line in first] == [True] * 2 + [False] * (len(first) - 2)


@pytest.mark.parametrize("more, methods", [({"prm": ("none",)}, 6), ({"data": ("builtin",), "problems": 3, "beam": 1, "temperature": 0.0}, 11),
                                           ({"n": 1, "prm": ("none",)}, 2), ({"n": 6, "expand": (1, 3), "aggregate": "prod"}, 16)])
def test_other_tables(place, tmp_path, more, methods):
    assert len(run(place, tmp_path, **more)["rows"]) == methods


def test_resume_after_a_cut_and_another_way_to_cut_batches(place, tmp_path):
    whole = run(place, tmp_path, rows_at_once=8)
    state = tmp_path / "run" / "state" / "rank0.jsonl"
    lines = state.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    state.write_bytes(b"".join(lines[:4]) + lines[4][:-20])
    again = run(place, tmp_path, rows_at_once=12, resume=True)
    assert without_clock(again) == without_clock(whole)
    after = state.read_bytes().splitlines(keepends=True)
    assert after[:4] == lines[:4] and len(after) == 9, "what was done is kept, clock times and all"
    run(place, tmp_path)
    assert (tmp_path / "run.old1").is_dir(), "without --resume the run is moved aside"


def test_two_ranks_give_the_table_of_one(place, tmp_path):
    one = run(place, tmp_path, out=str(tmp_path / "one"), max_new_tokens=14)
    argv = []
    for name, value in options(place, tmp_path, out=str(tmp_path / "two"), max_new_tokens=14).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                           os.path.join(ROOT, "search_minimal.py"), *argv], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pass@1") == 1, "one table"
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert without_clock(two) == without_clock(one)
    assert (tmp_path / "two" / "samples.jsonl").read_text().count("\n") == (tmp_path / "one" / "samples.jsonl").read_text().count("\n")
    assert sorted(os.listdir(tmp_path / "two" / "state")) == ["rank0.jsonl", "rank1.jsonl"]


def test_a_problem_that_is_too_long_is_left_out_and_the_others_go_on(place, tmp_path, capsys):
    summary = run(place, tmp_path, data=(str(place / "long.jsonl"),), prm=("none",))
    assert (summary["problems"], summary["left_out"]) == (9, 1)
    assert re.search(r"too long.*long\.jsonl.*3", capsys.readouterr().out)
    assert without_clock(summary)[0] == without_clock(run(place, tmp_path, prm=("none",), out=str(tmp_path / "short")))[0]


def test_a_blank_problem_is_left_out_and_the_others_go_on(place, tmp_path, capsys):
    write_rows(tmp_path / "blank.jsonl", [{"question": "1+2", "answer": "3"}, {"question": " \n", "answer": "1"}])
    summary = run(place, tmp_path, data=(str(tmp_path / "blank.jsonl"),), prm=("none",))
    assert (summary["problems"], summary["left_out"]) == (1, 1)
    assert re.search(r"left out, blank.*blank\.jsonl.*2", capsys.readouterr().out)


def test_equal_answers_are_one_whatever_their_spelling(place, tmp_path, monkeypatch):
    """Four responses: wrong, right, another wrong, right in another spelling. Only who groups by value finds the majority."""
    pairs = [("0.5", "\\frac{1}{2}"), ("\\sqrt{8}", "2\\sqrt{2}"), ("x+1", "1+x")]
    pairs += [(f"{a}, {b}", f"{b}, {a}") for a, b in itertools.combinations(["1", "2", "3", "9", "17", "33", "x", "\\frac{1}{2}"], 2)]
    write_rows(tmp_path / "pairs.jsonl", [{"question": str(i), "answer": a} for i, (a, _) in enumerate(pairs)])

    def spelled(model, tokenizer, prompts, n, *_, keys=None, **__):
        boxed = [["701", pairs[k][0], "702", pairs[k][1]] for k in keys]
        return [[search.Sample([5], [1], [0.0], f"\\boxed{{{text}}}", True) for text in texts[:n]] for texts in boxed]
    monkeypatch.setattr(search, "sample", spelled)
    rows = run(place, tmp_path, data=(str(tmp_path / "pairs.jsonl"),), prm=("none",))["rows"]
    accuracy = {(row["method"], row["n"]): row["accuracy"] for row in rows}
    assert accuracy["pass@1", 1] == 0.5 and accuracy["oracle", 4] == 1.0
    assert accuracy["majority", 4] == 1.0


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_labels_are_shares_of_right_rollouts(place, tmp_path, monkeypatch, kind):
    """Rollouts of which the text is a function of the prefix alone, so that they can be counted again."""
    tokenizer, asked = data.load_tokenizer(str(place / "policy")), []
    rows = two_operations(5, 3)
    rows += [rows[0] | {"completions": ["5+5=0", "\\boxed{77}"]}, {"prompt": "1+1", "completions": ["\\boxed{2}"], "answer": "2"}]
    rows += [{"prompt": "1" * 2040, "completions": ["1", "2"], "answer": "2"}]  # no room for a rollout

    def rollouts(prefix, answer):
        rng = random.Random(str(prefix))
        return [f"1+1=2\n\n\\boxed{{{answer if rng.random() < 0.4 else 5000}}}" for _ in range(4)]

    def fake(model, tokenizer, prompts, n, temperature, max_new_tokens, seed, keys, **_):
        assert n == 4 and len(set(keys)) == len(keys) == len(prompts)
        asked.extend(keys)
        answers = {tuple(ids[:len(data.encode_prompt(tokenizer, row["prompt"]))]): row["answer"] for ids in prompts for row in rows
                   if ids[:len(data.encode_prompt(tokenizer, row["prompt"]))] == data.encode_prompt(tokenizer, row["prompt"])}
        gold = lambda ids: next(a for head, a in answers.items() if tuple(ids[:len(head)]) == head)  # noqa: E731
        return [[search.Sample(ids, [5, 6, 1], [0.0] * 3, text, True) for text in rollouts(ids, gold(ids))] for ids in prompts]
    monkeypatch.setattr(search, "sample", fake)
    write_rows(tmp_path / "in.jsonl", rows)
    search.main(search.Config(model=str(place / "policy"), data=(str(tmp_path / "in.jsonl"),), out=str(tmp_path / "run"), label_rollouts=4,
                              label_kind=kind, max_new_tokens=10, rows_at_once=32), Env())
    labelled = list(data.read_trajectories(str(tmp_path / "run" / "labelled.jsonl")))
    assert [row["completions"] for row in labelled] == [row["completions"] for row in rows[:-1]]
    seen = set()
    for row, before in zip(labelled, rows):
        ids, _, ends = data.encode_trajectory(tokenizer, row["prompt"], row["completions"])
        right = [sum(data.verify(text, row["answer"]) for text in rollouts(ids[:end + 1], row["answer"])) for end in ends[:-1]]
        assert row["correct"] == data.verify("\n\n".join(row["completions"]), before["answer"])
        assert row["labels"] == [r / 4 if kind == "soft" else float(r > 0) for r in right] + [float(row["correct"])]
        seen.update(right)
    assert len(seen) > 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["trajectories"], summary["left_out"], summary["tokens"]) == (5, 1, 3 * 4 * len(asked))
    assert summary["mean_label"] == pytest.approx(np.mean([x for row in labelled for x in row["labels"]]))


def test_labels_by_the_policy_itself(place, tmp_path):
    """Not a patched sample: a first step that is right leads on to the answer more often than one that is wrong."""
    rows = two_operations(0, 12)
    wrong = [row | {"completions": [row["prompt"][:4].replace("*", "=") + str((int(row["completions"][0][-1]) + 5) % 10)] + row["completions"][1:]}
             for row in rows]
    write_rows(tmp_path / "in.jsonl", rows + wrong)
    search.main(search.Config(model=str(place / "policy"), data=(str(tmp_path / "in.jsonl"),), out=str(tmp_path / "run"), label_rollouts=6,
                              max_new_tokens=24), Env())
    first = [row["labels"][0] for row in data.read_trajectories(str(tmp_path / "run" / "labelled.jsonl"))]
    assert len(first) == 24 and np.mean(first[:12]) > np.mean(first[12:]) + 0.1


BAD = [("--n 0", "--n 0"), ("--beam 0", "--beam 0"), ("--expand 2 0", "--expand 0"), ("--aggregate x", "x"), ("--max_steps 0", "--max_steps 0"),
       ("--temperature -1", "--temperature -1"), ("--temperature nan", "--temperature nan"), ("--nn 3", "--nn"), ("--prm PLACE/nothing", "nothing"),
       ("--prm PLACE/two_labels", "2 labels"), ("--prm PLACE/tokens PLACE/nothing", "nothing"), ("--model PLACE/nothing", "nothing"),
       ("--data PLACE/nothing.jsonl", "nothing.jsonl"), ("--data PLACE/empty.jsonl", "empty.jsonl"), ("--data PLACE/solutions.jsonl.gz", "solutions"),
       ("--data PLACE/only_long.jsonl --prm none", "room"), ("--label_rollouts 2 --data builtin", "--label_rollouts"),
       ("--label_rollouts 2 --data PLACE/no_answers.jsonl", "no_answers.jsonl"), ("--label_rollouts 2 --data PLACE/empty.jsonl", "empty.jsonl"),
       ("--label_rollouts 2 --data PLACE/problems.jsonl", "problems.jsonl"), ("--label_rollouts -1", "--label_rollouts -1")]


@pytest.mark.parametrize("line, named", BAD)
def test_mistakes_are_one_line(place, tmp_path, monkeypatch, capfd, line, named):
    monkeypatch.chdir(tmp_path)
    argv = line.replace("PLACE", str(place)).split()
    for name in ("model", "data", "prm"):
        if f"--{name}" not in argv:
            argv += [f"--{name}", str(place / {"model": "policy", "data": "problems.jsonl", "prm": "tokens"}[name])]
    monkeypatch.setattr(sys, "argv", ["search_minimal.py", "--out", "run", *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(os.path.join(ROOT, "search_minimal.py"), run_name="__main__")
    errors = [text for text in capfd.readouterr().err.splitlines() if text.startswith("search_minimal.py: error: ")]
    assert ended.value.code == 1 and len(errors) == 1 and named in errors[0]
    assert not (tmp_path / "run" / "summary.json").exists()
