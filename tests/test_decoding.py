"""Sampling against its naive twin: no cache, one row at a time, and the same noise.

The policies are random, with biases on the last layer that make blank lines and ends frequent
enough to matter.
"""

import contextlib
import copy
import functools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

import data
import sft_minimal as sft
from parts import decoding
from parts.decoding import StepEnd, decode, feed, pad, prompt_cache, sample, uniforms
from parts.estimate import cache_bytes
from parts.formats import BadInput
from parts.models import encode_prompt

CPU = torch.device("cpu")
TOKENIZERS = {"builtin": data.builtin_tokenizer(), "byte": data.byte_tokenizer()}
PROMPTS = ["1+2", "7+8*3-5", "5*5+5*5+5*5+5", "9-9"]
EOS = 1  # in both tokenizers; 0 is padding, and in no text here


def llama(tokenizer, extra_tokens=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + extra_tokens,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@functools.cache
def policy(shape="qwen2", spelling="builtin", extra_tokens=0):
    """A random policy that writes lines of text, now and then a blank one, and ends after some
    twenty tokens."""
    tokenizer = TOKENIZERS[spelling]
    model = llama(tokenizer, extra_tokens) if shape == "llama" else sft.new_policy(tokenizer, 0)
    bias = torch.full((model.config.vocab_size,), -30.0)
    text = "0123456789+-*=" if spelling == "builtin" else "abcdefghij"
    bias[tokenizer.convert_tokens_to_ids(list(text))] = 0.0
    bias[len(tokenizer) :] = 0.0
    bias[tokenizer.convert_tokens_to_ids("\n\n" if spelling == "builtin" else "Ċ")] = 1.5
    bias[EOS] = -0.3
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model.eval()


@torch.no_grad()
def full_logits(model, ids):
    """(tokens, V), without a cache."""
    return model(input_ids=torch.tensor([ids])).logits[0].double()


def naive(model, tokenizer, prompt_ids, noise, temperature=1.0, one_step=False):
    """decode_naively up to the response's end or, `one_step`, a blank line after some text."""

    def stop(tokens):
        step = one_step and "\n\n" in tokenizer.decode(tokens).lstrip()
        return tokens[-1] == EOS or step

    noise = torch.as_tensor(noise)
    return decoding.decode_naively(model, prompt_ids, noise, temperature, stop)[0]


@contextlib.contextmanager
def tokens_read(model):
    """Counts the tokens that come to a model, without padding."""
    counter = Counter()

    def count(_, args):
        counter["read"] += int((args[0] != 0).sum())

    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    yield counter
    hook.remove()


# --------------------------------------------------------------------------------------------------
# The cache.


class Walk:
    """A cache; beside it, the (slot, token) pairs that every row should hold."""

    def __init__(self, model, rng):
        self.model, self.rng = model, rng
        texts = [self.some(1, 9) for _ in range(5)]
        self.cache, ids, mask = prompt_cache(texts, CPU, 8, 1)
        logits = feed(model, self.cache, ids, mask, logits_to_keep=1).logits[:, -1]
        expected = torch.stack([full_logits(model, t)[-1] for t in texts])
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
        width, self.room = ids.shape[1], 1
        self.rows = [list(enumerate(text, width - len(text))) for text in texts]

    def some(self, low, high):
        length = self.rng.randint(low, high)
        return [self.rng.randrange(len(TOKENIZERS["builtin"])) for _ in range(length)]

    def feed(self):
        cache = self.cache
        batch = range(cache.start, cache.stop)
        new = [self.some(1, min(self.room, 3)) for _ in batch]
        ids, mask = pad(new, self.rng.choice(("left", "right")), CPU)
        begin, self.room = cache.used, self.room - ids.shape[1]
        logits = feed(self.model, cache, ids, mask).logits
        for i, (row, tokens) in enumerate(zip(batch, new)):
            slots = begin + mask[i].nonzero()[:, 0]
            self.rows[row] = self.rows[row] + list(zip(slots.tolist(), tokens))
            text = [token for _, token in self.rows[row]]
            expected = full_logits(self.model, text)[-len(tokens) :]
            torch.testing.assert_close(logits[i, mask[i]].double(), expected, rtol=0, atol=1e-4)

    def branch(self):
        cache, rng = self.cache, self.rng
        batch, free = range(cache.start, cache.stop), len(cache.mask) - cache.stop
        parents = rng.sample(batch, rng.randint(1, len(batch)))
        parents = sorted(parents + rng.choices(parents, k=rng.randint(0, free)))
        children, moved = cache.branch(torch.tensor(parents))
        after = [None] * cache.stop
        for old, row in enumerate(self.rows):
            after[moved[old]] = row
        for parent, child in zip(parents, children.tolist()):
            row = self.rows[parent]
            assert after[child] in (None, row), "a fork takes free rows only"
            after[child] = row
        self.rows = after
        assert sorted(children.tolist()) == list(range(cache.start, cache.stop))

    def select(self):
        cache, rng = self.cache, self.rng
        picked = [rng.randrange(len(self.rows)) for _ in range(rng.randint(1, 7))]  # ended, too
        slots = [rng.randint(self.rows[i][0][0] + 1, cache.used) for i in picked]
        room, capacity = rng.randint(0, 12), rng.randint(0, 12)
        texts = []
        for i, limit in zip(picked, slots):
            texts.append([token for slot, token in self.rows[i] if slot < limit])
        cache = cache.select(torch.tensor(picked), room, torch.tensor(slots), capacity)
        lengths, rows = list(map(len, texts)), len(texts)
        longest = max(lengths)
        self.rows = [list(enumerate(text, longest - len(text))) for text in texts]
        self.cache, self.room = cache, room
        assert cache.position[:rows].tolist() == cache.mask.sum(1)[:rows].tolist() == lengths
        assert cache.mask.shape == (max(capacity, rows), longest + room), "no slot too many"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape, garbage", [("qwen2", False), ("llama", False), ("llama", True)])
@torch.no_grad()
def test_any_walk_through_the_cache_gives_the_logits_of_full_forwards(
    shape, garbage, seed, monkeypatch
):
    """`garbage`: new memory holds anything, NaN too; no slot that was never written may count."""
    if garbage:
        empty = torch.Tensor.new_empty

        def not_a_number(self, *size):
            return empty(self, *size).fill_(math.nan)

        monkeypatch.setattr(torch.Tensor, "new_empty", not_a_number)
    rng, moves = random.Random(seed), Counter()
    walk = Walk(policy(shape), rng)
    for step in range(40):
        move = rng.choice(("feed", "feed", "feed", "branch", "branch", "select"))
        move = move if step else "branch"
        moves[move] += 1
        if move != "feed" or walk.room:
            getattr(walk, move)()
    assert len(moves) == 3


@pytest.mark.parametrize("shape", ["qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bytes_of_a_cache_are_known_before(shape, dtype):
    model = copy.deepcopy(policy(shape)).to(dtype)
    cache, ids, mask = prompt_cache([[5, 6, 7], [8]], CPU, 4, 2)
    feed(model, cache, ids, mask)
    more = cache.select(torch.tensor([0, 0, 1]), 5)
    for c, rows, slots in ((cache, 4, 5), (more, 3, 8)):
        found = sum(tensor.nbytes for tensor in c.keys + c.values)
        assert found == cache_bytes(model.config, rows, slots, dtype.itemsize)


# --------------------------------------------------------------------------------------------------
# Sampling.

CASES = [
    ("qwen2", "builtin", 1.0, "eos"),
    ("qwen2", "builtin", 0.7, "eos"),
    ("llama", "builtin", 0.0, "eos"),
    ("llama", "builtin", 1.0, "step"),
    ("qwen2", "byte", 1.0, "step"),
    ("llama", "byte", 0.7, "step"),
]


@pytest.mark.parametrize("shape, spelling, temperature, stop", CASES)
def test_sample_equals_a_decoder_without_cache(shape, spelling, temperature, stop):
    model, tokenizer, n, longest = policy(shape, spelling), TOKENIZERS[spelling], 3, 30

    def drawn(**options):
        limits = temperature, longest
        return sample(model, tokenizer, PROMPTS, n, *limits, seed=2, stop=stop, **options)

    samples = drawn()
    for key, (prompt, mine) in enumerate(zip(PROMPTS, samples)):
        noise, prompt_ids = uniforms(2, key, 0, [0] * n, longest), encode_prompt(tokenizer, prompt)
        for u, s in zip(noise, mine):
            expected = naive(model, tokenizer, prompt_ids, u, temperature, stop == "step")
            assert s.prompt_ids == prompt_ids and s.token_ids == expected
            assert s.text == tokenizer.decode(s.token_ids, skip_special_tokens=True)
            assert s.finished == (s.token_ids[-1] == EOS)
            logits = full_logits(model, prompt_ids + s.token_ids)[len(prompt_ids) - 1 : -1]
            logp = torch.log_softmax(logits / (temperature or 1.0), -1)
            logp = logp.gather(1, torch.tensor(s.token_ids)[:, None])[:, 0]
            assert s.logprobs == pytest.approx(logp.tolist(), abs=1e-4)
            if stop == "step":
                assert "\n\n" not in s.text.strip("\n"), "went on after a blank line"
    tokens = [[s.token_ids for s in mine] for mine in samples]
    for rows_at_once in (1, 4, 7):
        again = drawn(rows_at_once=rows_at_once)
        assert [[s.token_ids for s in mine] for mine in again] == tokens
    everything = [s for mine in samples for s in mine]
    if temperature:  # the cases have to hold what they are about
        assert any(s.finished for s in everything) or stop == "step"
        assert any(s.text.endswith("\n\n") for s in everything) or stop == "eos"
        lengths = {len(s.token_ids) for s in everything}
        assert len(lengths) > 3, "rows that end at different times"


def decode_and_go_on(model, texts, place, noise, temperature, step_end):
    """Tokens, log-probs, places and slots from decode(); how many tokens were read behind `texts`.
    Then, from the cache, the logits behind every sample, in any order."""
    cache, ids, mask = prompt_cache(texts, CPU, len(place), noise.shape[1])
    begins = [texts[i] for i in place]
    with tokens_read(model) as counter:
        found = decode(model, cache, ids, mask, place, noise, temperature, [EOS], step_end)
    read = counter["read"] - sum(map(len, texts))
    tokens, _, place, slots = found
    rows = torch.tensor(random.Random(0).sample(range(len(place)), len(place)))
    cache = cache.select(place[rows], 1, slots[rows])
    assert cache.mask.shape == (len(rows), max(len(begins[i] + tokens[i]) for i in rows))
    last = torch.tensor([tokens[i][-1:] for i in rows])
    logits = feed(model, cache, last, torch.ones_like(last, dtype=torch.bool)).logits[:, -1]
    expected = torch.stack([full_logits(model, begins[i] + tokens[i])[-1] for i in rows])
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
    return *found, read


SHARES = [("qwen2", 0.06, 0, 0.6), ("llama", 0.06, 0, 0.6), ("qwen2", 5.0, 0.8, 1)]


@pytest.mark.parametrize("stop", ["eos", "step"])
@pytest.mark.parametrize("shape, temperature, least, most", SHARES)
@torch.no_grad()
def test_samples_that_share_rows_are_what_they_are_alone(shape, temperature, least, most, stop):
    """With much to share and little: the tokens of a decoder that gives every sample a row of its
    own, and a cache to go on from, of samples that ended in a row that others went on in, too."""
    model, tokenizer, n, length = policy(shape), TOKENIZERS["builtin"], 12, 25
    prompts = [encode_prompt(tokenizer, p) for p in PROMPTS]
    count = len(prompts) * n
    noise = np.random.default_rng(3).random((count, length), dtype=np.float32)
    step_end = StepEnd(tokenizer, CPU) if stop == "step" else None
    rest = torch.from_numpy(noise), temperature, step_end
    owner = torch.arange(len(prompts)).repeat_interleave(n)
    own_rows = [prompts[i] for i in owner]
    shared = decode_and_go_on(model, prompts, owner, *rest)
    alone = decode_and_go_on(model, own_rows, torch.arange(count), *rest)
    tokens, logprobs, place, slots, read = shared
    their_tokens, their_logprobs, their_place, _, their_read = alone
    assert tokens == their_tokens and sorted(their_place.tolist()) == list(range(count))
    for mine, theirs in zip(logprobs, their_logprobs):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert least <= read / their_read <= most
    if most < 1 and stop == "step":  # the case has to hold what it is about
        ends = {}
        for row, slot in zip(place.tolist(), slots.tolist()):
            ends.setdefault(row, set()).add(slot)
        assert max(map(len, ends.values())) > 1, "samples of different lengths in one row"


def test_samples_are_a_function_of_seed_and_key():
    model, tokenizer = policy(), TOKENIZERS["builtin"]

    def tokens(prompts=PROMPTS, n=4, **options):
        samples = sample(model, tokenizer, prompts, n, max_new_tokens=20, **options)
        return [[s.token_ids for s in mine] for mine in samples]

    base = tokens(seed=1)
    assert tokens(seed=1) == base != tokens(seed=2)
    assert tokens(seed=1, n=2) == [mine[:2] for mine in base], "more samples: the same and others"
    assert tokens(PROMPTS[::-1], seed=1, keys=[3, 2, 1, 0]) == base[::-1], "a key names a problem"
    assert tokens([PROMPTS[2]], seed=1, keys=[2]) == [base[2]]
    assert len(set(map(tuple, tokens(["1+2"], n=8)[0]))) > 4
    chat = [{"role": "user", "content": "1+2"}]
    spellings = [chat, "1+2", encode_prompt(tokenizer, "1+2")]
    assert tokens(spellings, keys=[5, 5, 5]) == tokens(["1+2"], keys=[5]) * 3


def test_the_end_of_a_response():
    model, tokenizer = policy(), TOKENIZERS["builtin"]
    for s in sample(model, tokenizer, ["1+2"], 40, max_new_tokens=12)[0]:
        if s.finished:
            assert s.token_ids.index(EOS) == len(s.token_ids) - 1 and "<eos>" not in s.text
        else:
            assert len(s.token_ids) == 12 and EOS not in s.token_ids
        assert len(s.logprobs) == len(s.token_ids)
    limit, length = model.config.max_position_embeddings, len(encode_prompt(tokenizer, ""))
    sample(model, tokenizer, ["1" * (limit - length - 1)], 1, max_new_tokens=1)
    too_long = ["1+2", "1" * (limit - length)]
    with pytest.raises(BadInput, match=f"{limit} tokens and --max_new_tokens {length + 1} "):
        sample(model, tokenizer, too_long, 1, max_new_tokens=length + 1)
    assert sample(model, tokenizer, [], 3) == []


def test_every_id_that_ends_a_turn_ends_a_response(monkeypatch):
    """Those of the model's generation config, too."""
    model, tokenizer = policy(), TOKENIZERS["builtin"]
    five = tokenizer.convert_tokens_to_ids("5")
    monkeypatch.setattr(model.generation_config, "eos_token_id", [five])
    samples = sample(model, tokenizer, PROMPTS, 8, max_new_tokens=20)
    found = {s.token_ids[-1] for mine in samples for s in mine if s.finished}
    assert found == {EOS, five}
    assert not any({EOS, five} & set(s.token_ids[:-1]) for mine in samples for s in mine)


@pytest.mark.parametrize("stop", ["eos", "step"])
def test_a_policy_with_more_tokens_than_its_tokenizer(stop):
    """Models are often rounded up to a multiple of 64 tokens; the ids that stand for nothing may be
    sampled all the same."""
    model, tokenizer = policy("llama", "builtin", 20), TOKENIZERS["builtin"]
    (mine,) = sample(model, tokenizer, ["1+2"], 8, max_new_tokens=20, stop=stop)
    assert any(i >= len(tokenizer) for s in mine for i in s.token_ids)


def test_attention_of_every_kind_is_full_or_refused():
    """The plain implementation adds its mask instead of selecting by it; a sliding window is no
    more than a limit."""
    tokenizer = TOKENIZERS["builtin"]
    model = llama(tokenizer).eval()

    def tokens():
        samples = sample(model, tokenizer, PROMPTS, 2, max_new_tokens=20)
        return [[s.token_ids for s in mine] for mine in samples]

    fused = tokens()
    model.set_attn_implementation("eager")
    assert tokens() == fused
    model.config.sliding_window = 30
    with pytest.raises(BadInput, match="30"):
        tokens()


@pytest.mark.parametrize("size", [2, 10, 60])
def test_pick_follows_the_distribution(size):
    rng, draws = np.random.default_rng(size), 20_000
    p = rng.random(size) ** 3 * (rng.random(size) < 0.7)
    p[[0, -1]] = 0.0
    p[1] = 0.5 if size > 2 else 1.0
    p /= p.sum()
    logp = torch.tensor(p).float().log()
    noise = torch.from_numpy(rng.random(draws, dtype=np.float32))
    chosen = decoding.pick(logp.expand(draws, size), noise)
    counts, expected = np.bincount(chosen, minlength=size), draws * p
    assert not counts[expected == 0].any()
    chi2 = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi2 < size + 5 * math.sqrt(2 * size)
    edges = torch.tensor([0.0, 1e-45, np.nextafter(np.float32(1), np.float32(0))])
    assert (p[decoding.pick(logp.expand(3, size), edges)] > 0).all()
