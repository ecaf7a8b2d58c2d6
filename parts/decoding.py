"""The key/value cache of decoding, written out: rows that fork, that end while others go on, that are picked up again.

A row is one text being written, a slot one token's keys and values in all layers. Samples that agree share a row.
Decoding needs two moves that a library's cache makes hard: fork rows where their samples disagree and take ended rows
out of the batch, without copying the others (`branch`); go on from kept prefixes of a tree search (`select`).
"""
import torch


class RowCache:
    """Keys and values of up to R rows with room for C slots each, written in place:

        [0, start)     rows that ended: out of the batch, but `select` may still pick them
        [start, stop)  the batch
        [stop, R)      free, for forks

    Slots that belong to no token (padding) are False in `mask`; `position` is each row's number of tokens. Rotary
    position is in the keys before they come here, so slots and rows may move about freely. Full attention only.
    """
    now = peak = 0  # bytes in all caches of the process

    def __init__(self, batch, rows, slots, device):
        self.keys, self.values, self.bytes = [], [], 0
        self.mask = torch.zeros(rows, slots, dtype=torch.bool, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.start, self.stop, self.used = 0, batch, 0

    def reserve(self, slots):
        """Make room for `slots` slots a row, half as many again as there are where that is more."""
        have = self.mask.shape[1]
        if slots <= have:
            return
        self.mask = torch.nn.functional.pad(self.mask, (0, max(slots, have * 3 // 2) - have))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._allocate(old, *self.mask.shape)
                tensors[layer][:self.stop, :self.used] = old[:self.stop, :self.used]
                self.bytes, RowCache.now = self.bytes - old.nbytes, RowCache.now - old.nbytes

    def _allocate(self, like, rows, slots):
        tensor = like.new_empty(rows, slots, *like.shape[2:])  # (R, C, heads, head size)
        self.bytes += tensor.nbytes
        RowCache.now += tensor.nbytes
        RowCache.peak = max(RowCache.peak, RowCache.now)
        return tensor

    def __del__(self):
        RowCache.now -= self.bytes

    def update(self, keys, values, layer, *_, **__):
        """What a transformers attention layer calls: store the new (batch, heads, q, head size), return all so far."""
        end, both = self.used + keys.shape[2], []
        for tensors, new in ((self.keys, keys.transpose(1, 2)), (self.values, values.transpose(1, 2))):
            if layer == len(tensors):
                tensors.append(self._allocate(new, *self.mask.shape))
            tensors[layer][self.start:self.stop, self.used:end] = new
            both.append(tensors[layer][self.start:self.stop, :end].transpose(1, 2))
        return both

    def select(self, rows, room, slots=None, capacity=0):
        """A new cache whose batch is the rows `rows` (any may repeat or be left out) in this order, of each the first
        `slots` slots, as short as they allow; with `room` free slots and at least `capacity` rows."""
        mask = self.mask[rows, :self.used]
        if slots is not None:
            mask &= torch.arange(self.used, device=self.mask.device) < slots[:, None]
        position = mask.sum(1)
        length = int(position.max()) if len(rows) else 0
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, self.used - length:]  # real slots last
        mask = mask.gather(1, order)
        order = order.where(mask, order[:, -1:])  # padding has no weight, but must be finite: 0 * NaN would be NaN
        new = RowCache(len(rows), max(len(rows), capacity), length + room, self.mask.device)
        new.mask[:len(rows), :length], new.position[:len(rows)], new.used = mask, position, length
        picked = (rows[:, None] * self.mask.shape[1] + order).flatten()  # of all slots of all rows
        for mine, theirs in ((self.keys, new.keys), (self.values, new.values)):
            for tensor in mine:
                theirs.append(new._allocate(tensor, *new.mask.shape))
                kept = tensor.flatten(0, 1).index_select(0, picked)  # faster than tensor[rows[:, None], order]
                theirs[-1][:len(rows), :length] = kept.unflatten(0, order.shape)
        return new

    def branch(self, parents):
        """Go on with one row for each of `parents`: ascending numbers of rows in the batch, repeated where a row forks,
        left out where it ends -> the row of each; where every old row is now."""
        moved = torch.arange(len(self.mask), device=parents.device)
        ended = torch.ones(self.stop - self.start, dtype=torch.bool, device=parents.device)
        ended[parents - self.start] = False
        if count := int(ended.sum()):  # swap them to the front of the batch, then out of it
            live = self.start + (~ended[:count]).nonzero()[:, 0]
            over = self.start + count + ended[count:].nonzero()[:, 0]  # as many
            self._copy(torch.cat([live, over]), torch.cat([over, live]))
            moved[live], moved[over] = over, live
            self.start += count
        rows = moved[parents]
        if forks := len(parents) - (self.stop - self.start):  # a row's first child goes on in its place
            again = torch.nn.functional.pad(parents.diff(), (1, 0), value=1) == 0
            new = torch.arange(self.stop, self.stop + forks, device=parents.device)
            self._copy(new, rows[again])
            rows[again] = new
            self.stop += forks
        return rows, moved

    def _copy(self, to, source):
        if len(to):  # often there are none
            for tensor in (*self.keys, *self.values):
                tensor[to, :self.used] = tensor[source, :self.used]
            self.mask[to], self.position[to] = self.mask[source], self.position[source]


def longest_context(config):
    """The most tokens a row may have: beyond a sliding window, layers would forget what the cache still shows them."""
    return min(getattr(config, name, None) or 10**9 for name in ("max_position_embeddings", "sliding_window"))


def cache_bytes(config, rows, slots, dtype):
    """Bytes of keys and values for `rows` rows of `slots` tokens, from a model's config."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * rows * slots * dtype.itemsize


def feed(model, cache, input_ids, mask, **options):
    """Run new tokens (batch, q), `mask` True on the real ones, behind what the cache holds -> the model's output."""
    end, batch = cache.used + input_ids.shape[1], slice(cache.start, cache.stop)
    cache.reserve(end)
    cache.mask[batch, cache.used:end] = mask
    slots = torch.arange(end, device=input_ids.device)
    causal = slots <= slots[cache.used:, None]  # (q, end)
    itself = slots == slots[cache.used:, None]  # padding sees itself: no row is empty
    attention = cache.mask[batch, None, :end] & causal | itself
    bias = torch.where(attention, 0.0, -torch.inf).to(model.dtype)
    positions = (cache.position[batch, None] + mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=bias[:, None], position_ids=positions,
                   past_key_values=cache, use_cache=True, **options)
    cache.used = end
    cache.position[batch] += mask.sum(1)
    return output


def pad(sequences, side, device, value=0):
    """Lists of ids -> (ids, mask) of shape (rows, longest), padded on one side."""
    longest = max(1, *map(len, sequences))
    fill = [[value] * (longest - len(s)) for s in sequences]
    ids = [f + list(s) if side == "left" else list(s) + f for s, f in zip(sequences, fill)]
    real = [[False] * len(f) + [True] * len(s) if side == "left" else [True] * len(s) + [False] * len(f)
            for s, f in zip(sequences, fill)]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def prompt_cache(prompts, device, rows=0, room=0):
    """What `feed` needs to read prompts (lists of ids) -> an empty cache with a row for each, `rows` in all, and `room`
    slots more than the prompts take; ids; mask."""
    ids, mask = pad(prompts, "left", device)
    return RowCache(len(ids), max(len(ids), rows), ids.shape[1] + room, device), ids, mask
