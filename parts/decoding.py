"""Sampling with a key/value cache of our own: rows that fork, that end while others go on, that are
picked up again.

What is computed is ten lines, `decode_naively`: read the text so far, sample the next token, stop
at an end. The rest of the file does the same for many samples at once, so that no token passes
through the model twice:

    uniforms, pick   the noise of a sample is a function of seed and problem alone, not of the batch
    RowCache, feed   keys and values of R rows; `branch` forks rows where their samples disagree and
                     takes ended ones out of the batch without copying the others, `select` goes on
                     from kept prefixes of a tree search
    decode, sample   samples of a prompt share a row of the cache until they choose other tokens

A row is one text being written, a slot one token's keys and values in all layers.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from parts.formats import BadInput
from parts.models import encode_prompt, end_ids

# --------------------------------------------------------------------------------------------------
# What sampling is.


def uniforms(seed, key, depth, starts, length):
    """The noise of sampling: (len(starts), length) numbers in [0, 1), a function of the seed and
    the problem alone, so that neither the batch nor the number of processes changes a sample.
    `starts`: the response token a row begins at.
    """
    rng = np.random.default_rng([seed, key, depth])
    return rng.random((len(starts), length), dtype=np.float32)


def pick(logprobs, noise):
    """Sample by inverting the cumulative distribution: logprobs (rows, V), noise (rows,) -> token
    ids (rows,)."""
    total = logprobs.exp().cumsum(-1)
    chosen = torch.searchsorted(total, (noise * total[:, -1])[:, None], right=True)[:, 0]
    return chosen.clamp(max=logprobs.shape[1] - 1)


@torch.no_grad()
def decode_naively(model, prompt_ids, noise, temperature, stop):
    """One sample, the whole text through the model for every token: noise (length,) -> token ids,
    their log-probs. It ends where `stop(token ids)` says so, or with its noise."""
    tokens, logprobs = [], []
    for u in noise:
        ids = torch.tensor([prompt_ids + tokens], device=noise.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()  # (1, V)
        logp = F.log_softmax(logits / (temperature or 1.0), dim=-1)
        token = pick(logp, u[None]).item() if temperature else logp.argmax().item()
        tokens.append(token)
        logprobs.append(logp[0, token].item())
        if stop(tokens):
            break
    return tokens, logprobs


# --------------------------------------------------------------------------------------------------
# The cache.


class RowCache:
    """Keys and values of up to R rows with room for C slots each, written in place:

        [0, start)     rows that ended: out of the batch, but `select` may still pick them
        [start, stop)  the batch
        [stop, R)      free, for forks

    Slots that belong to no token (padding) are False in `mask`; `position` is each row's number of
    tokens. Rotary position is in the keys before they come here, so slots and rows may move about
    freely. Full attention only.
    """

    def __init__(self, batch, rows, slots, device):
        self.keys, self.values = [], []  # of each layer, (R, C, heads, head size)
        self.mask = torch.zeros(rows, slots, dtype=torch.bool, device=device)  # (R, C)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)  # (R,)
        self.start, self.stop, self.used = 0, batch, 0  # `used`: slots that are filled

    def update(self, keys, values, layer, *_, **__):
        """What a transformers attention layer calls: store the new keys and values, each
        (batch, heads, q, head size), and return all so far, (batch, heads, used + q, head size)."""
        batch, end, both = slice(self.start, self.stop), self.used + keys.shape[2], []
        for tensors, new in ((self.keys, keys), (self.values, values)):
            new = new.transpose(1, 2)  # (batch, q, heads, head size)
            if layer == len(tensors):
                tensors.append(new.new_empty(*self.mask.shape, *new.shape[2:]))
            tensors[layer][batch, self.used : end] = new
            both.append(tensors[layer][batch, :end].transpose(1, 2))
        return both

    def reserve(self, slots):
        """Make room for `slots` slots a row, half as many again as there are where that is more."""
        rows, have = self.mask.shape
        if slots <= have:
            return
        slots = max(slots, have * 3 // 2)
        self.mask = F.pad(self.mask, (0, slots - have))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty(rows, slots, *old.shape[2:])
                tensors[layer][: self.stop, : self.used] = old[: self.stop, : self.used]

    def branch(self, parents):
        """Go on with one row for each of `parents`: ascending numbers of rows in the batch,
        repeated where a row forks, left out where it ends -> the row of each; where every old row
        is now."""
        device, batch = parents.device, self.stop - self.start
        moved = torch.arange(len(self.mask), device=device)  # (R,)
        ended = torch.ones(batch, dtype=torch.bool, device=device)
        ended[parents - self.start] = False
        if count := int(ended.sum()):  # swap them to the front of the batch, then out of it
            live = self.start + (~ended[:count]).nonzero()[:, 0]
            over = self.start + count + ended[count:].nonzero()[:, 0]  # as many
            self._copy(torch.cat([live, over]), torch.cat([over, live]))
            moved[live], moved[over] = over, live
            self.start += count
        rows = moved[parents]
        forks = len(parents) - (batch - count)
        if forks:  # a row's first child goes on in its place
            again = F.pad(parents.diff(), (1, 0), value=1) == 0
            new = torch.arange(self.stop, self.stop + forks, device=device)
            self._copy(new, rows[again])
            rows[again] = new
            self.stop += forks
        return rows, moved

    def _copy(self, to, source):
        if len(to):  # often there are none
            for tensor in (*self.keys, *self.values):
                tensor[to, : self.used] = tensor[source, : self.used]
            self.mask[to], self.position[to] = self.mask[source], self.position[source]

    def select(self, rows, room, slots=None, capacity=0):
        """A new cache whose batch is the rows `rows` (any may repeat or be left out) in this order,
        of each the first `slots` slots, as short as they allow; with `room` free slots and at least
        `capacity` rows."""
        mask, batch = self.mask[rows, : self.used], len(rows)
        if slots is not None:
            mask &= torch.arange(self.used, device=self.mask.device) < slots[:, None]
        position = mask.sum(1)
        length = int(position.max()) if batch else 0
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)
        order = order[:, self.used - length :]  # real slots last
        mask = mask.gather(1, order)  # (batch, length)
        # Padding has no weight, but must be finite: 0 * NaN would be NaN.
        order = order.where(mask, order[:, -1:])
        new = RowCache(batch, max(batch, capacity), length + room, self.mask.device)
        new.mask[:batch, :length], new.position[:batch], new.used = mask, position, length
        picked = (rows[:, None] * self.mask.shape[1] + order).flatten()  # of all slots of all rows
        for mine, theirs in ((self.keys, new.keys), (self.values, new.values)):
            for tensor in mine:
                theirs.append(tensor.new_empty(*new.mask.shape, *tensor.shape[2:]))
                kept = tensor.flatten(0, 1).index_select(0, picked)  # faster than [rows, order]
                theirs[-1][:batch, :length] = kept.unflatten(0, order.shape)
        return new


def feed(model, cache, input_ids, mask, **options):
    """Run new tokens (batch, q), `mask` True on the real ones, behind what the cache holds -> the
    model's output."""
    end, batch = cache.used + input_ids.shape[1], slice(cache.start, cache.stop)
    cache.reserve(end)
    cache.mask[batch, cache.used : end] = mask
    slots = torch.arange(end, device=input_ids.device)
    causal = slots <= slots[cache.used :, None]  # (q, end)
    itself = slots == slots[cache.used :, None]  # padding sees itself: no row is empty
    attention = cache.mask[batch, None, :end] & causal | itself  # (batch, q, end)
    options |= {
        "attention_mask": torch.where(attention, 0.0, -torch.inf).to(model.dtype)[:, None],
        "position_ids": (cache.position[batch, None] + mask.cumsum(1) - 1).clamp(min=0),
        "past_key_values": cache,
        "use_cache": True,
    }
    output = model(input_ids=input_ids, **options)
    cache.used = end
    cache.position[batch] += mask.sum(1)
    return output


def pad(sequences, side, device, value=0):
    """Lists of ids -> (ids, mask) of shape (rows, longest), padded on one side."""
    longest, ids, real = max(1, *map(len, sequences)), [], []
    for s in sequences:
        fill = longest - len(s)
        if side == "left":
            ids.append([value] * fill + list(s))
            real.append([False] * fill + [True] * len(s))
        else:
            ids.append(list(s) + [value] * fill)
            real.append([True] * len(s) + [False] * fill)
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def prompt_cache(prompts, device, rows=0, room=0):
    """What `feed` needs to read prompts (lists of ids) -> an empty cache with a row for each,
    `rows` in all, and `room` slots more than the prompts take; ids; mask."""
    ids, mask = pad(prompts, "left", device)
    return RowCache(len(ids), max(len(ids), rows), ids.shape[1] + room, device), ids, mask


def longest_context(config):
    """The most tokens a row may have: beyond a sliding window, layers would forget what the cache
    still shows them."""
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min(limit or 10**9 for limit in limits)


# --------------------------------------------------------------------------------------------------
# Sampling with it.


class StepEnd:
    """Which tokens close a step, that is, complete a blank line (or, with step_end "\n", a line)
    after some text."""

    def __init__(self, tokenizer, device, size=0, step_end="\n\n"):
        count = max(len(tokenizer), size)
        texts = tokenizer.batch_decode([[i] for i in range(count)], skip_special_tokens=False)

        def flag(test):
            return torch.tensor([bool(test(text)) for text in texts], device=device)  # (V,)

        self.blank, self.text = flag(lambda s: step_end in s), flag(lambda s: s.strip())
        self.starts, self.ends = flag(lambda s: s.startswith("\n")), flag(
            lambda s: s.endswith("\n")
        )


@torch.no_grad()
def decode(model, cache, ids, mask, place, noise, temperature, ends, step_end=None, limits=None):
    """Read `ids` behind the cache's rows, then write samples, each until one of `ends` (token ids),
    a step's end (with `step_end`), its limit or the end of its noise (samples, length). Sample i
    begins in row place[i] of the cache. Samples share a row as long as they agree, so every
    distinct text is computed once; where they choose different tokens, the row forks.

    -> tokens, logprobs: a list for each sample; place, slots: the first slots[i] of row place[i]
    are sample i's keys and values, of all but its last token, which has not been read. (Behind them
    may be those of samples that went on.)
    """
    samples, length = noise.shape
    tokens = torch.full((samples, length), -1, device=noise.device)
    logprobs = torch.zeros(samples, length, device=noise.device)
    live, begin = torch.arange(samples, device=noise.device), cache.used + ids.shape[1]
    ends = torch.tensor(ends, device=noise.device)
    newline = has_text = torch.zeros_like(
        live, dtype=torch.bool
    )  # does a live text end in a newline; has it any text
    for t in range(length):
        logits = feed(model, cache, ids, mask, logits_to_keep=1).logits[:, -1]  # (rows, V)
        logp = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
        logp = logp[place[live] - cache.start]  # (live, V)
        chosen = pick(logp, noise[live, t]) if temperature else logp.argmax(-1)
        tokens[live, t], logprobs[live, t] = chosen, logp.gather(1, chosen[:, None])[:, 0]
        done = torch.isin(chosen, ends)
        if limits is not None:
            done |= limits[live] <= t + 1
        if step_end:
            has_text = has_text | step_end.text[chosen]
            done |= (step_end.blank[chosen] | (newline & step_end.starts[chosen])) & has_text
            newline = step_end.ends[chosen]
        going = (~done).nonzero()[:, 0]
        live, chosen, newline, has_text = (
            live[going],
            chosen[going],
            newline[going],
            has_text[going],
        )
        if t + 1 == length or not len(live):
            break
        size = logp.shape[1]
        pairs, pair = torch.unique(
            place[live] * size + chosen, return_inverse=True
        )  # (row, token): the rows to come
        rows, moved = cache.branch(pairs // size)
        place = moved[place]
        place[live] = rows[pair]
        ids = (pairs % size)[rows.argsort(), None]  # (rows, 1)
        mask = torch.ones_like(ids, dtype=torch.bool)
    lengths = (tokens >= 0).sum(1)
    slots, lengths = begin + lengths - 1, lengths.tolist()
    tokens, logprobs = tokens.tolist(), logprobs.tolist()
    tokens = [row[:n] for row, n in zip(tokens, lengths)]
    return tokens, [row[:n] for row, n in zip(logprobs, lengths)], place, slots


@dataclass
class Sample:
    """One response: its tokens (the one that ends it included), their log-probs under the
    temperature, its text."""

    prompt_ids: list
    token_ids: list
    logprobs: list
    text: str
    finished: bool  # ended by itself, not at max_new_tokens


@torch.no_grad()
def sample(
    model,
    tokenizer,
    prompts,
    n,
    temperature=1.0,
    max_new_tokens=256,
    seed=0,
    keys=None,
    stop="eos",
    rows_at_once=2048,
):
    """`n` responses to each prompt (a question, chat messages, or a list of token ids) -> a list of
    `n` Samples for each.

    `stop="step"` also stops at the end of the first step. `keys` (ints) name the prompts for the
    noise (default: their index). Raises BadInput for a prompt that does not fit the model.
    Comes along: all above it in this file; encode_prompt and end_ids of parts/models.py with what
    they call; BadInput of parts/formats.py.
    """
    model.eval()
    device, ends = next(model.parameters()).device, end_ids(tokenizer, model.generation_config)
    encoded = []
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
        encoded.append(prompt if is_ids else encode_prompt(tokenizer, prompt))
    longest, limit = max(map(len, encoded), default=0), longest_context(model.config)
    if longest + max_new_tokens > limit:
        what = f"a prompt of {longest} tokens and --max_new_tokens {max_new_tokens}"
        raise BadInput(f"{what} exceed the model's {limit}")
    step_end = StepEnd(tokenizer, device, model.config.vocab_size) if stop == "step" else None
    results = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    at_once = max(1, rows_at_once // n)
    for begin in range(0, len(by_length), at_once):
        chunk = by_length[begin : begin + at_once]
        prompt_ids = [encoded[i] for i in chunk]
        cache, ids, mask = prompt_cache(prompt_ids, device, len(chunk) * n, max_new_tokens)
        place = torch.arange(len(chunk), device=device).repeat_interleave(n)
        noise = [uniforms(seed, keys[i] if keys else i, 0, [0] * n, max_new_tokens) for i in chunk]
        noise = torch.from_numpy(np.concatenate(noise)).to(device)  # (chunk * n, max_new_tokens)
        tokens, logprobs, *_ = decode(
            model, cache, ids, mask, place, noise, temperature, ends, step_end
        )
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, (ids, logp, text) in enumerate(zip(tokens, logprobs, texts)):
            i = chunk[row // n]
            results[i].append(Sample(encoded[i], ids, logp, text, finished=ids[-1] in ends))
    return results
