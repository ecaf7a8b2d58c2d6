"""The key/value cache of decoding, written out: rows that may be repeated, reordered, and dropped while others go on.

A row is one response being written; a slot is one token's keys and values in all layers. Decoding needs three moves
that a library's cache makes hard: repeat a prompt's row for its samples (`select`), take ended rows out of the batch
without copying the others (`drop`), and go on from kept prefixes of a tree search with all they have read (`select`).
"""
import torch


class RowCache:
    """Keys and values of R rows with room for C slots each, written in place. The first `rows` of them are still in the
    batch. Slots that belong to no token (padding) are False in `mask`; `position` is each row's number of tokens.

    Rotary position is in the keys before they come here, so slots and rows may move about freely. Full attention only.
    """
    now = peak = 0  # bytes in all caches of the process

    def __init__(self, rows, slots, device):
        self.keys, self.values, self.bytes = [], [], 0
        self.mask = torch.zeros(rows, slots, dtype=torch.bool, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.rows, self.used = rows, 0

    def reserve(self, slots):
        """Make room for `slots` slots a row, half as many again as there are where that is more."""
        have = self.mask.shape[1]
        if slots <= have:
            return
        self.mask = torch.nn.functional.pad(self.mask, (0, max(slots, have * 3 // 2) - have))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._allocate(old).zero_()
                tensors[layer][:, :, :self.used] = old[:, :, :self.used]
                self.bytes, RowCache.now = self.bytes - old.nbytes, RowCache.now - old.nbytes

    def _allocate(self, like):
        rows, slots = self.mask.shape
        tensor = like.new_empty(rows, like.shape[1], slots, like.shape[3])  # (R, heads, C, head size)
        self.bytes += tensor.nbytes
        RowCache.now += tensor.nbytes
        RowCache.peak = max(RowCache.peak, RowCache.now)
        return tensor

    def __del__(self):
        RowCache.now -= self.bytes

    def update(self, keys, values, layer, *_, **__):
        """What a transformers attention layer calls: store the new (rows, heads, q, head size), return all so far."""
        if layer == len(self.keys):
            self.keys.append(self._allocate(keys).zero_())  # attention gives padding no weight, but 0 * NaN would be NaN
            self.values.append(self._allocate(values).zero_())
        end = self.used + keys.shape[2]
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[:self.rows, :, self.used:end] = new
        return self.keys[layer][:self.rows, :, :end], self.values[layer][:self.rows, :, :end]

    def select(self, rows, room):
        """A new cache of the rows `rows` (any may repeat or be left out) in this order, as short as they allow, with
        `room` free slots."""
        rows = torch.as_tensor(rows, device=self.mask.device)
        mask = self.mask[rows, :self.used]
        length = int(mask.sum(1).max()) if len(rows) else 0
        start = self.used - length
        packed = not mask[:, :start].any()  # the last slots are all that is needed: no slot has to move within its row
        slots = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, start:]  # else: real slots last, in order
        new = RowCache(len(rows), length + room, self.mask.device)
        new.mask[:, :length] = mask[:, start:] if packed else mask.gather(1, slots)
        new.position, new.used = self.position[rows], length
        for mine, theirs in ((self.keys, new.keys), (self.values, new.values)):
            for tensor in mine:
                kept = tensor[:, :, start:self.used][rows] if packed else tensor[rows[:, None], :, slots].transpose(1, 2)
                theirs.append(new._allocate(tensor))
                theirs[-1][:, :, :length], theirs[-1][:, :, length:] = kept, 0
        return new

    def drop(self, done):
        """Swap the rows that are `done` (rows,) behind the others, out of the batch -> new order of old row numbers."""
        order = torch.arange(self.rows, device=done.device)
        self.rows = int((~done).sum())
        a = done[:self.rows].nonzero()[:, 0]  # ended, in front
        b = self.rows + (~done[self.rows:]).nonzero()[:, 0]  # still live, behind: as many
        ab, ba = torch.cat([a, b]), torch.cat([b, a])
        order[ab] = ba
        if len(a):
            for tensor in self.keys + self.values:
                tensor[ab, :, :self.used] = tensor[ba, :, :self.used]
            self.mask[ab], self.position[ab] = self.mask[ba], self.position[ba]
        return order


def longest_context(config):
    """The most tokens a row may have: beyond a sliding window, layers would forget what the cache still shows them."""
    return min(getattr(config, name, None) or 10**9 for name in ("max_position_embeddings", "sliding_window"))


def cache_bytes(config, rows, slots, dtype):
    """Bytes of keys and values for `rows` rows of `slots` tokens, from a model's config."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * rows * slots * dtype.itemsize


def feed(model, cache, input_ids, mask, **options):
    """Run new tokens (rows, q), `mask` True on the real ones, behind what the cache holds -> the model's output."""
    rows, q = input_ids.shape
    end = cache.used + q
    cache.reserve(end)
    cache.mask[:rows, cache.used:end] = mask
    slots = torch.arange(end, device=input_ids.device)
    causal = slots <= slots[cache.used:, None]  # (q, end)
    itself = slots == slots[cache.used:, None]  # padding sees itself: no row is empty
    attention = cache.mask[:rows, None, :end] & causal | itself
    bias = torch.zeros(attention.shape, dtype=model.dtype, device=input_ids.device).masked_fill(~attention, -torch.inf)
    positions = (cache.position[:rows, None] + mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=bias[:, None], position_ids=positions,
                   past_key_values=cache, use_cache=True, **options)
    cache.used = end
    cache.position[:rows] += mask.sum(1)
    return output


def pad(sequences, side, device, value=0):
    """Lists of ids -> (ids, mask) of shape (rows, longest), padded on one side."""
    longest = max(1, *map(len, sequences))
    fill = [[value] * (longest - len(s)) for s in sequences]
    ids = [f + list(s) if side == "left" else list(s) + f for s, f in zip(sequences, fill)]
    real = [[False] * len(f) + [True] * len(s) if side == "left" else [True] * len(s) + [False] * len(f)
            for s, f in zip(sequences, fill)]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def prefill(model, prompts, device):
    """One forward over all prompts (lists of ids) -> cache, logits (P, V) of the first response token."""
    ids, mask = pad(prompts, "left", device)
    cache = RowCache(len(prompts), ids.shape[1], device)
    return cache, feed(model, cache, ids, mask, logits_to_keep=1).logits[:, -1]
