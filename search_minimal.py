"""Search: what does spending N samples buy, with and without a reward model? And how sampling works, for RL to import.

One set of samples, many ways to answer from it (all at every power of two up to --n):
    pass@1          mean accuracy of a sample                 oracle    pass@n = 1 - C(N-c, n) / C(N, n), c of N right
    majority        the most frequent answer, equal values being one answer (data.answer_key)
    best-of-n       the sample with the best score            weighted  the answer with the largest sum of scores
A response's score is made of its step values V_1..V_T by --aggregate: last, min, mean or prod.

Or the tree is grown step by step: from each kept prefix sample `expand` next steps, value them, keep the best `beam`:
    greedy search   --beam 1 --expand b                       beam search   --beam k --expand b
    dvts            k independent greedy searches, best result at the end (diverse verifier tree search)
Finished responses stay candidates with their value. The search ends when all that is kept is finished.

The time goes where the cache is (cache.py): samples of a prompt share one row of it until they choose different tokens;
rows that end leave the batch; a kept prefix keeps its rows in the policy's AND the reward model's cache, so no prefix
token passes through either model twice. Duplicate candidates are scored once.

    python search_minimal.py                                      # built-in policy and reward model: a table in a minute
    python search_minimal.py --prm runs/tdrm/model runs/scalar_prm/model runs/scalar_orm/model --show
    torchrun --nproc_per_node=8 -- search_minimal.py --model Qwen/Qwen2.5-Math-7B-Instruct --data math500.jsonl \\
        --n 64 --prm PRM          # without the --, torchrun would take --n for one of its own options
    python search_minimal.py --label_rollouts 8 --data solutions.jsonl --out runs/labels     # step labels by rollouts

Files in --out: samples.jsonl (trajectories, with values: training data for tdrm_minimal.py), summary.json (the table).
Left out: lookahead search and MCTS; batching across depths (all problems of a chunk advance by one step together).
"""
import dataclasses
import json
import math
import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import sft_minimal as sft
import tdrm_minimal as tdrm
from cache import RowCache, cache_bytes, feed, longest_context, pad, prompt_cache
from data import BadInput
from scorers import load_scorer
from sft_minimal import opt


@dataclass(frozen=True)
class Config:
    model: str = opt("", "policy: Hugging Face name or folder; empty: the built-in one")
    prm: tuple = opt((), "reward models to compare; empty: the built-in TDRM; none: only what needs none")
    data: tuple = opt(("builtin",), "builtin, builtin-hard, or files of problems (to label: of trajectories)")
    out: str = opt("", "folder of the run; empty: runs/search")
    problems: int = opt(0, "how many problems; 0: all of the files', 200 of the built-in task", low=0)
    n: int = opt(16, "samples of each problem", low=1)
    beam: int = opt(4, "kept prefixes in beam search, subtrees in dvts", low=1)
    expand: tuple = opt((2, 4, 8), "next steps sampled from each kept prefix", low=1)
    reduce: str = opt("auto", "how a prefix's value comes from its tokens' numbers (scorers.py); auto: by the model's kind",
                      choices=("auto", "last", "sum", "mean"))
    aggregate: str = opt("last", "what a response's score is made of", choices=("last", "min", "mean", "prod"))
    temperature: float = opt(1.0, "of sampling; 0: the likeliest token", low=0)
    max_new_tokens: int = opt(128, "longest response", low=1)
    max_step_tokens: int = opt(64, "longest step in tree search", low=1)
    max_steps: int = opt(40, "deepest tree", low=1)
    rows_at_once: int = opt(2048, "rows in one decoding batch of one process (memory only, same result)", low=1)
    label_rollouts: int = opt(0, "only label the steps of the trajectories in --data, by so many rollouts", low=0)
    label_kind: str = opt("soft", "a label is the share of right rollouts, or 1 if any is", choices=("soft", "hard"))
    dtype: str = opt("auto", "weights; auto: bfloat16 on GPUs only", choices=("auto", "float32", "bfloat16"))
    seed: int = opt(0, "of the sampling", low=0, high=2**32 - 1)
    resume: bool = opt(False, "keep the problems that --out has already done, do the others")
    show: bool = opt(False, "print one beam search step by step")


# --------------------------------------------------------------------------------------------------
# Sampling.

@dataclass
class Sample:
    """One response: its tokens (the end-of-response one included), their log-probs under the temperature, its text."""
    prompt_ids: list
    token_ids: list
    logprobs: list
    text: str
    finished: bool  # ended by itself, not at max_new_tokens


def uniforms(seed, key, depth, starts, length):
    """The noise of sampling: (len(starts), length) numbers in [0, 1), a function of the seed and the problem alone, so
    that neither the batch nor the number of processes changes a sample. `starts`: the response token a row begins at."""
    return np.random.default_rng([seed, key, depth]).random((len(starts), length), dtype=np.float32)


def pick(logprobs, noise):
    """Sample by inverting the cumulative distribution: logprobs (rows, V), noise (rows,) -> token ids (rows,)."""
    total = logprobs.exp().cumsum(-1)
    return torch.searchsorted(total, (noise * total[:, -1])[:, None], right=True)[:, 0].clamp(max=logprobs.shape[1] - 1)


class StepEnd:
    """Which tokens close a step, that is, complete a blank line after some text."""

    def __init__(self, tokenizer, device, size=0):
        texts = tokenizer.batch_decode([[i] for i in range(max(len(tokenizer), size))], skip_special_tokens=False)
        flag = lambda test: torch.tensor([bool(test(text)) for text in texts], device=device)  # noqa: E731
        self.blank, self.starts = flag(lambda s: data.STEP_END in s), flag(lambda s: s.startswith("\n"))
        self.ends, self.text = flag(lambda s: s.endswith("\n")), flag(lambda s: s.strip())


@torch.no_grad()
def decode(model, cache, ids, mask, place, noise, temperature, eos_id, step_end=None, limits=None):
    """Read `ids` behind the cache's rows, then write samples, each until eos, a step's end (with `step_end`), its limit
    or the end of its noise (samples, length). Sample i begins in row place[i] of the cache. Samples share a row as long
    as they agree, so every distinct text is computed once; where they choose different tokens, the row forks.

    -> tokens, logprobs: a list for each sample; place, slots: the first slots[i] of row place[i] are sample i's keys and
    values, of all but its last token, which has not been read. (Behind them may be those of samples that went on.)
    """
    samples, length = noise.shape
    tokens = torch.full((samples, length), -1, device=noise.device)
    logprobs = torch.zeros(samples, length, device=noise.device)
    live, begin = torch.arange(samples, device=noise.device), cache.used + ids.shape[1]
    newline = has_text = torch.zeros_like(live, dtype=torch.bool)  # does a live text end in a newline; is there any
    for t in range(length):
        logits = feed(model, cache, ids, mask, logits_to_keep=1).logits[:, -1]  # (rows, V)
        logp = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)[place[live] - cache.start]  # (live, V)
        chosen = pick(logp, noise[live, t]) if temperature else logp.argmax(-1)
        tokens[live, t], logprobs[live, t] = chosen, logp.gather(1, chosen[:, None])[:, 0]
        done = chosen == eos_id
        if limits is not None:
            done |= limits[live] <= t + 1
        if step_end:
            has_text = has_text | step_end.text[chosen]
            done |= (step_end.blank[chosen] | (newline & step_end.starts[chosen])) & has_text
            newline = step_end.ends[chosen]
        going = (~done).nonzero()[:, 0]
        live, chosen, newline, has_text = live[going], chosen[going], newline[going], has_text[going]
        if t + 1 == length or not len(live):
            break
        size = logp.shape[1]
        pairs, pair = torch.unique(place[live] * size + chosen, return_inverse=True)  # (row, token): the rows to come
        rows, moved = cache.branch(pairs // size)
        place = moved[place]
        place[live] = rows[pair]
        ids = (pairs % size)[rows.argsort(), None]
        mask = torch.ones_like(ids, dtype=torch.bool)
    lengths = (tokens >= 0).sum(1)
    slots = begin + lengths - 1
    lengths, tokens, logprobs = lengths.tolist(), tokens.tolist(), logprobs.tolist()
    return [x[:n] for x, n in zip(tokens, lengths)], [x[:n] for x, n in zip(logprobs, lengths)], place, slots


@torch.no_grad()
def sample(model, tokenizer, prompts, n, temperature=1.0, max_new_tokens=256, seed=0, keys=None, stop="eos",
           rows_at_once=2048):
    """`n` responses to each prompt (a question, chat messages, or a list of token ids) -> a list of `n` Samples per prompt.

    `stop="step"` also stops at the end of the first step. `keys` (ints) name the prompts for the noise (default: their
    index). Raises BadInput for a prompt that does not fit the model.
    """
    model.eval()
    device, eos_id = next(model.parameters()).device, tokenizer.eos_token_id
    encoded = [p if isinstance(p, list) and p and isinstance(p[0], int) else data.encode_prompt(tokenizer, p) for p in prompts]
    limit = longest_context(model.config)
    for ids in encoded:
        if len(ids) + max_new_tokens > limit:
            raise BadInput(f"a prompt of {len(ids)} tokens and --max_new_tokens {max_new_tokens} exceed the model's {limit}")
    step_end = StepEnd(tokenizer, device, model.config.vocab_size) if stop == "step" else None
    results = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    at_once = max(1, rows_at_once // n)
    for chunk in (by_length[i:i + at_once] for i in range(0, len(by_length), at_once)):
        cache, ids, mask = prompt_cache([encoded[i] for i in chunk], device, len(chunk) * n, max_new_tokens)
        place = torch.arange(len(chunk), device=device).repeat_interleave(n)
        noise = np.concatenate([uniforms(seed, keys[i] if keys else i, 0, [0] * n, max_new_tokens) for i in chunk])
        noise = torch.from_numpy(noise).to(device)
        tokens, logprobs, *_ = decode(model, cache, ids, mask, place, noise, temperature, eos_id, step_end)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, (ids, logp, text) in enumerate(zip(tokens, logprobs, texts)):
            i = chunk[row // n]
            results[i].append(Sample(encoded[i], ids, logp, text, finished=ids[-1] == eos_id))
    return results


# --------------------------------------------------------------------------------------------------
# Tree search: greedy, beam and dvts are one algorithm with other numbers.

@dataclass
class Beam:
    """A response under construction. `group` is what it competes in: its problem, or its subtree in dvts."""
    group: int
    token_ids: list
    steps: list
    value: float = 0.0
    score: float = 0.0  # sum over `scored` tokens of the reward model's numbers
    scored: int = 0
    finished: bool = False
    row: int = 0  # in the policy's cache; of a candidate, not yet kept: its number among the samples
    prm_row: int = 0  # in the reward model's cache


@torch.no_grad()
def tree_search(model, tokenizer, prm, prm_tokenizer, prompts, keep, expand, subtrees=1, temperature=1.0,
                max_step_tokens=64, max_steps=40, max_new_tokens=256, seed=0, keys=None, step_end=None, trace=None):
    """Grow each prompt's response step by step -> (best Beam of each prompt, {"generated": tokens, "scored": tokens}).

    Greedy search: keep 1; beam search: keep k; dvts: keep 1 in each of k `subtrees`. At the root keep * expand steps are
    sampled. All prompts advance together, one depth at a time. A list `trace` receives (depth, group, candidates, kept).
    """
    model.eval()
    prm.eval()
    device, eos_id = next(model.parameters()).device, tokenizer.eos_token_id
    step_end = step_end or StepEnd(tokenizer, device, model.config.vocab_size)
    count = Counter()
    groups = [i for i in range(len(prompts)) for _ in range(subtrees)]  # group -> prompt
    room = min(max_step_tokens, 16)  # for a step; the cache grows if need be

    # The root: a row for each prompt, however many samples and subtrees begin there. The policy's are read in decode().
    cache, ids, mask = prompt_cache([data.encode_prompt(tokenizer, p) for p in prompts], device,
                                    len(groups) * keep * expand, room)
    prm_cache, prm_ids, prm_mask = prompt_cache([data.encode_prompt(prm_tokenizer, p) for p in prompts], device)
    feed(prm, prm_cache, prm_ids, prm_mask)
    count["scored"] += int(prm_mask.sum())
    live = [Beam(group, [], [], row=i, prm_row=i) for group, i in enumerate(groups)]
    finished = defaultdict(list)

    for depth in range(max_steps):
        # 1) Sample next steps from every live prefix.
        parents = [beam for beam in live for _ in range(expand if depth else keep * expand)]
        limits = torch.tensor([min(max_step_tokens, max_new_tokens - len(b.token_ids)) for b in parents], device=device)
        noise = step_noise(parents, groups, keys, seed, depth, max_step_tokens)[:, :int(limits.max())]
        noise, place = torch.from_numpy(noise).to(device), torch.tensor([b.row for b in parents], device=device)
        tokens, _, place, slots = decode(model, cache, ids, mask, place, noise, temperature, eos_id, step_end, limits)
        count["generated"] += sum(map(len, tokens))

        # 2) Distinct candidates; each is scored once, its new tokens only.
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        candidates, where = {}, []
        for i, (parent, new, text) in enumerate(zip(parents, tokens, texts)):
            name = (parent.group, tuple(parent.token_ids), tuple(new))
            if name not in candidates:  # a step without text (an end right after a blank line) leaves the value as it was
                step = [text.strip()] if text.strip() else []
                candidates[name] = replace(parent, token_ids=parent.token_ids + new, steps=parent.steps + step,
                                           finished=new[-1] == eos_id, row=i, prm_row=len(where))
                where.append(i)
        candidates = list(candidates.values())
        new_step = [len(b.steps) > len(parents[i].steps) for b, i in zip(candidates, where)]
        steps = [data.token_ids(prm_tokenizer, b.steps[-1] + ("" if b.finished else data.STEP_END)) if new else []
                 for b, new in zip(candidates, new_step)]
        if getattr(prm, "reads_eos", False):
            steps = [step + [prm_tokenizer.eos_token_id] * b.finished for step, b in zip(steps, candidates)]
        prm_ids, prm_mask = pad(steps, "right", device)
        prm_cache = prm_cache.select(torch.tensor([parents[i].prm_row for i in where], device=device), prm_ids.shape[1])
        scores = feed(prm, prm_cache, prm_ids, prm_mask).logits[..., 0].float()  # (candidates, tokens)
        count["scored"] += int(prm_mask.sum())
        new_tokens = prm_mask.sum(1)
        last, sums = scores.gather(1, (new_tokens[:, None] - 1).clamp(min=0))[:, 0], (scores * prm_mask).sum(1)
        for beam, number, total, tokens_more in zip(candidates, last.tolist(), sums.tolist(), new_tokens.tolist()):
            if tokens_more:
                beam.score, beam.scored = beam.score + total, beam.scored + tokens_more
                beam.value = value_of(prm, number, beam.score, beam.scored)

        # 3) Keep the best of each group; finished responses stay candidates.
        by_group = defaultdict(list)
        for beam in candidates:
            by_group[beam.group].append(beam)
        live = []
        for group, new in by_group.items():
            kept = sorted(finished[group] + new, key=lambda b: -b.value)[:keep]
            over = lambda b: b.finished or len(b.token_ids) >= max_new_tokens  # noqa: E731
            finished[group] = [b for b in kept if over(b)]
            live += [b for b in kept if not over(b)]
            if trace is not None:
                trace.append((depth, group, new, kept))
        if not live:
            break

        # 4) The kept prefixes keep what is in the cache. Their last token, sampled but not yet read, is read next.
        rows = torch.tensor([b.row for b in live], device=device)
        cache = cache.select(place[rows], room, slots[rows], len(live) * expand)
        ids = torch.tensor([b.token_ids[-1:] for b in live], device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        for row, beam in enumerate(live):
            beam.row = row

    best = []
    for i in range(len(prompts)):  # where nothing ended within max_steps, the best prefix is all there is
        pool = [b for g, p in enumerate(groups) if p == i for b in finished[g]] or [b for b in live if groups[b.group] == i]
        best.append(max(pool, key=lambda b: b.value, default=Beam(i, [], [])))
    return best, count


def value_of(prm, last, total, tokens):
    """The value of a prefix from its last token's number, or the sum or mean of all its tokens', by the model's kind."""
    number = {"last": last, "sum": total, "mean": total / tokens}[getattr(prm, "reduce", "last")]
    return 0.5 + 0.5 * math.tanh(0.5 * getattr(prm, "scale", 1.0) * number)  # the sigmoid, without overflow


def step_noise(parents, groups, keys, seed, depth, length):
    """(rows, length) noise for the rows of one depth, drawn for each problem by itself."""
    rows = defaultdict(list)
    for i, parent in enumerate(parents):
        rows[groups[parent.group]].append(i)
    noise = np.zeros((len(parents), length), dtype=np.float32)
    for prompt, mine in rows.items():
        starts = [len(parents[i].token_ids) for i in mine]
        noise[mine] = uniforms(seed, keys[prompt] if keys else prompt, depth, starts, length)
    return noise


# --------------------------------------------------------------------------------------------------
# Answering from one set of samples.

def aggregate(values, how):
    """Step values of a response -> its score. "last" is V of the whole response."""
    if not values:
        return 0.0
    return {"last": lambda v: v[-1], "min": min, "mean": lambda v: sum(v) / len(v), "prod": math.prod}[how](values)


def pass_at_n(right, total, n):
    """Unbiased estimate of P(any of n samples is right) from `right` of `total`."""
    return 1 - math.comb(total - right, n) / math.comb(total, n)


def vote(answers, weights):
    """The answer (a key; None: no answer) with the largest sum of weights; ties go to the one that came first."""
    votes = Counter()
    for answer, weight in zip(answers, weights):
        if answer is not None:
            votes[answer] += weight
    return max(votes, key=votes.get) if votes else None


def answers_from_samples(record, n, how):
    """Accuracies {method: 0..1} of one problem at n samples, from its record with N: the mean over the N // n groups of n."""
    keys, right, result = record["keys"], record["right"], defaultdict(list)
    right_keys = {k for k, r in zip(keys, right) if r}
    for start in range(0, len(keys) - n + 1, n):
        part = slice(start, start + n)
        result["majority"].append(vote(keys[part], [1] * n) in right_keys)
        for name, values in record["values"].items():
            scores = [aggregate(v, how) for v in values[part]]
            result[f"best-of-n, {name}"].append(right[part][int(np.argmax(scores))])
            result[f"weighted, {name}"].append(vote(keys[part], scores) in right_keys)
    return {"oracle": pass_at_n(sum(right), len(right), n), **{method: float(np.mean(hits)) for method, hits in result.items()}}


# --------------------------------------------------------------------------------------------------
# The run: problems in chunks, each chunk's results written at once, so that a stopped run loses one chunk at most.

def in_chunks(cfg, env, count, at_once, work):
    """Apply `work([index...]) -> [record...]` to problems 0..count-1, split over the processes -> all records by index.
    With --resume, records already in --out are kept."""
    sft.open_run(cfg, env)
    folder = os.path.join(cfg.out, "state")

    def read():
        records = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(".jsonl"):
                with open(os.path.join(folder, name)) as f:
                    records.update({r["index"]: r for r in map(json.loads, (line for line in f if line.endswith("\n")))})
        return records

    done = read()
    todo = [i for i in range(count) if i not in done][env.rank::env.world]
    sft.barrier(env)  # nobody writes while another still reads
    path = os.path.join(folder, f"rank{env.rank}.jsonl")
    if os.path.exists(path):  # a line that was cut short must not swallow the next one
        with open(path, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)
    bar = tqdm(total=len(todo), desc=os.path.basename(os.path.normpath(cfg.out)), disable=env.rank > 0, dynamic_ncols=True)
    with open(path, "a") as f, bar:
        for chunk in (todo[i:i + at_once] for i in range(0, len(todo), at_once)):
            f.write("".join(json.dumps(record) + "\n" for record in work(chunk)))
            f.flush()
            bar.update(len(chunk))
    sft.barrier(env)
    return [record for _, record in sorted(read().items())]


def score_texts(prm, tokenizer, prompts, responses, env):
    """Step values of each prompt's responses -> (a list for each prompt, of a list for each response; tokens scored for
    each prompt). All are scored together, equal responses to a prompt once."""
    rows = {(i, text): {"prompt": prompts[i], "completions": steps} for i, texts in enumerate(responses)
            for text in texts if (steps := data.split_steps(text))}
    reads_eos = getattr(prm, "reads_eos", False)
    examples = data.encode_rows(rows.values(), tokenizer, 10**9, eos=reads_eos)[0] if rows else []
    for example in examples if reads_eos else []:
        example["step_ends"][-1] += 1  # the whole response's value comes with its end
    alone = dataclasses.replace(env, rank=0, world=1)  # each process has its own problems
    values = dict(zip(rows, tdrm.score_rows(prm, examples, tokenizer.pad_token_id, alone)))
    tokens = [0] * len(prompts)
    for (i, _), example in zip(rows, examples):
        tokens[i] += len(example["input_ids"])
    return [[values.get((i, text), []) for text in texts] for i, texts in enumerate(responses)], tokens


def load_policy(cfg, env, level):
    """-> model, tokenizer; the built-in policy is trained first where it is not there yet."""
    from transformers import AutoModelForCausalLM
    name = cfg.model or sft.builtin_policy(level or "builtin", env)
    tokenizer = data.load_tokenizer(name)
    return data.load_model(AutoModelForCausalLM, name, dtype=sft.torch_dtype(cfg, env)).to(env.device).eval(), tokenizer


def search(cfg, env, level):
    """Every method on every problem -> the table's rows (also in summary.json)."""
    # 1) Policy, reward models, problems. A problem that leaves no room for a response is reported and counted.
    dtype = sft.torch_dtype(cfg, env)
    model, tokenizer = load_policy(cfg, env, level)
    prms = [] if cfg.prm == ("none",) else list(cfg.prm) or [tdrm.builtin_reward_model(level or "builtin", env)]
    models = {}
    for name in prms:
        try:
            prm = load_scorer(name, dtype, tdrm.load_reward_model).to(env.device).eval()
            prm.reduce = prm.reduce if cfg.reduce == "auto" else cfg.reduce
            models[prm_name(name, prms)] = prm, data.load_tokenizer(name)
        except BadInput as error:
            raise BadInput(str(error).replace("--model", "--prm", 1)) from None
    problems = data.make_problems(cfg.problems or 200, "test", 0, level) if level else list(data.read_problems(cfg.data))
    problems = problems[:cfg.problems or None]
    limit = longest_context(model.config) - cfg.max_new_tokens
    fits = [0 < len(p["question"].strip()) and len(data.encode_prompt(tokenizer, p["question"])) <= limit for p in problems]
    for i in [i for i, ok in enumerate(fits) if not ok]:
        env.print(f"left out, blank or too long for the model: {problems[i].get('source', i)}")
    problems = [p for p, ok in zip(problems, fits) if ok]
    if not problems:
        raise BadInput("--data: there is no problem that leaves room for a response")
    step_end = StepEnd(tokenizer, env.device, model.config.vocab_size)
    most = max(cfg.n, max(cfg.expand) * cfg.beam if models else 1)  # rows a problem
    sampling = {"temperature": cfg.temperature, "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed}
    trees = [("greedy search", 1, b, 1) for b in cfg.expand]
    trees += [(f"{what} {cfg.beam} x", *numbers) for b in cfg.expand if cfg.beam > 1
              for what, numbers in (("beam search", (cfg.beam, b, 1)), ("dvts", (1, b, cfg.beam)))]
    caches = Counter()

    # 2) All methods on a chunk of problems -> one record each.
    def work(chunk):
        questions, golds = [problems[i]["question"] for i in chunk], [problems[i]["answer"] for i in chunk]
        records = [{"index": i, "values": {}, "generated": {}, "scored": {}, "seconds": {}, "tree": {}} for i in chunk]

        def timed(name, function, *args, **kwargs):
            start = time.time()
            result = function(*args, **kwargs)
            seconds = (time.time() - start) / len(chunk)
            for record in records:
                record["seconds"][name] = seconds
            return result

        before = RowCache.peak = RowCache.now
        samples = timed("samples", sample, model, tokenizer, questions, cfg.n, keys=chunk, rows_at_once=cfg.rows_at_once,
                        **sampling)
        slots = max(len(s[0].prompt_ids) for s in samples) + cfg.max_new_tokens
        caches["measured"] = max(caches["measured"], RowCache.peak - before)
        caches["estimated"] = max(caches["estimated"], cache_bytes(model.config, len(chunk) * cfg.n, slots, dtype))
        greedy = timed("greedy", sample, model, tokenizer, questions, 1, keys=chunk, **sampling | {"temperature": 0.0})
        for record, mine, one, gold in zip(records, samples, greedy, golds):
            seen = {}
            found = [data.extract_answer(s.text) for s in mine]
            record |= {"texts": [s.text for s in mine], "right": [data.verify(s.text, gold) for s in mine],
                       "keys": [None if a is None else seen.setdefault(data.answer_key(a), len(seen)) for a in found],
                       "greedy": data.verify(one[0].text, gold)}
            record["generated"] |= {"samples": sum(len(s.token_ids) for s in mine), "greedy": len(one[0].token_ids)}
        for name, (prm, prm_tokenizer) in models.items():
            texts = [record["texts"] for record in records]
            scored = timed(name, score_texts, prm, prm_tokenizer, questions, texts, env)
            for record, values, tokens in zip(records, *scored):
                record["values"][name], record["scored"][name] = values, tokens
            for title, keep, expand, subtrees in trees:
                method = f"{title} {expand}, {name}"
                best, count = timed(method, tree_search, model, tokenizer, prm, prm_tokenizer, questions, keep, expand,
                                    subtrees, max_step_tokens=cfg.max_step_tokens, max_steps=cfg.max_steps, keys=chunk,
                                    step_end=step_end, **sampling)
                for record, beam, gold in zip(records, best, golds):
                    text = tokenizer.decode(beam.token_ids, skip_special_tokens=True)
                    record["tree"][method] = {"right": data.verify(text, gold), "value": beam.value}
                    for kind in ("generated", "scored"):
                        record[kind][method] = count[kind] / len(chunk)
        return records

    start = time.time()
    records = in_chunks(cfg, env, len(problems), max(1, cfg.rows_at_once // most), work)

    # 3) The table, the samples, and one search to look at.
    rows = table(cfg, records)
    if env.rank == 0:
        print_table(rows, len(records))
        left_out = len(fits) - len(problems)
        print(f"{left_out} problems left out; cache reserved for sampling, a row for each sample: "
              f"{caches['measured'] / 2**20:.1f} MiB, from the config {caches['estimated'] / 2**20:.1f} MiB; "
              f"{time.time() - start:.0f} s")
        summary = {"problems": len(records), "left_out": left_out,
                   "empty_responses": write_samples(cfg, problems, records), "rows": rows}
        sft.write_json(os.path.join(cfg.out, "summary.json"), summary)
        if cfg.show and models:
            name, (prm, prm_tokenizer) = next(iter(models.items()))
            show_search(cfg, problems[0]["question"], name, model, tokenizer, prm, prm_tokenizer, sampling)
    sft.barrier(env)
    return rows


def prm_name(path, all_paths):
    """runs/tdrm/model -> tdrm, where that tells them apart."""
    short = lambda p: os.path.basename(os.path.normpath(p.removesuffix("/").removesuffix("/model")))  # noqa: E731
    return short(path) if [short(p) for p in all_paths].count(short(path)) == 1 else path


def table(cfg, records):
    """Records -> [{method, n, accuracy, stderr, generated, scored, seconds}], per problem."""
    rows = []

    def add(method, n, hits, generated, scored, seconds):
        mean = lambda numbers: float(np.mean(numbers))  # noqa: E731
        stderr = float(np.std(hits, ddof=1) / len(hits)**0.5) if len(hits) > 1 else 0.0
        rows.append({"method": method, "n": n, "accuracy": mean(hits), "stderr": stderr, "generated": mean(generated),
                     "scored": mean(scored), "seconds": mean(seconds)})

    part = lambda key, name, share=1.0: [r[key].get(name, 0) * share for r in records]  # noqa: E731
    nothing = [0] * len(records)
    add("pass@1", 1, [np.mean(r["right"]) for r in records], part("generated", "samples", 1 / cfg.n), nothing,
        part("seconds", "samples", 1 / cfg.n))
    add("greedy decoding", 1, [r["greedy"] for r in records], part("generated", "greedy"), nothing,
        part("seconds", "greedy"))
    ns = [2**k for k in range(1, int(math.log2(cfg.n)) + 1)]
    per_n = {n: [answers_from_samples(r, n, cfg.aggregate) for r in records] for n in ns}
    for method in per_n[ns[0]][0] if ns else ():
        name = method.partition(", ")[2]
        for n in ns:
            share = n / cfg.n
            seconds = np.add(part("seconds", "samples", share), part("seconds", name, share))
            add(method, n, [hits[method] for hits in per_n[n]], part("generated", "samples", share),
                part("scored", name, share), seconds)
    for method in records[0]["tree"]:
        add(method, 1, [r["tree"][method]["right"] for r in records], part("generated", method), part("scored", method),
            part("seconds", method))
    return rows


def print_table(rows, count):
    print(f"\n{count} problems; tokens and seconds are per problem")
    print(f"{'method':<34}{'n':>4}  {'accuracy':>14}{'generated':>11}{'scored':>9}{'seconds':>9}")
    for r in rows:
        accuracy = f"{r['accuracy']:.3f} ± {r['stderr']:.3f}"
        print(f"{r['method']:<34}{r['n']:>4}  {accuracy:>14}{r['generated']:>11.1f}{r['scored']:>9.1f}{r['seconds']:>9.4f}")


def write_samples(cfg, problems, records):
    """samples.jsonl: every response as a trajectory row -> number of responses without a step, which are left out."""
    path, empty = os.path.join(cfg.out, "samples.jsonl"), 0
    with open(path + ".tmp", "w") as f:
        for record in records:
            problem = problems[record["index"]]
            for j, (text, right) in enumerate(zip(record["texts"], record["right"])):
                steps = data.split_steps(text)
                empty += not steps
                if steps:
                    row = {"prompt": problem["question"], "completions": steps, "answer": problem["answer"],
                           "correct": right, "values": {name: values[j] for name, values in record["values"].items()}}
                    f.write(json.dumps(row) + "\n")
    os.replace(path + ".tmp", path)
    return empty


def show_search(cfg, question, name, model, tokenizer, prm, prm_tokenizer, sampling):
    """Print one beam search: the candidates of each depth with their values, the kept ones marked."""
    trace = []
    tree_search(model, tokenizer, prm, prm_tokenizer, [question], cfg.beam, max(cfg.expand),
                max_step_tokens=cfg.max_step_tokens, max_steps=cfg.max_steps, trace=trace, **sampling)
    print(f"\nbeam search {cfg.beam} x {max(cfg.expand)} with {name}: {question}")
    for depth, _, candidates, kept in trace:
        print(f"  depth {depth + 1}: {len(candidates)} distinct candidates; {sum(b.finished for b in kept)} of the "
              f"{len(kept)} kept are finished")
        for beam in sorted(candidates, key=lambda b: -b.value):
            mark = "keep" if any(beam is b for b in kept) else ""
            text = " | ".join(" ".join(step.split()) for step in beam.steps)[-80:]
            print(f"    {mark:<5}{'█' * round(10 * beam.value):<11}{beam.value:.2f}  {text}")


def label(cfg, env, level):
    """`--label_rollouts K`: the label of step t is estimated from K rollouts of the policy from the prefix that ends with
    step t; the last step's is the outcome itself. Writes labelled.jsonl."""
    if level:
        raise BadInput("--label_rollouts: --data must be trajectory files")
    model, tokenizer = load_policy(cfg, env, level)
    rows = list(data.read_trajectories(cfg.data))[:cfg.problems or None]
    limit = longest_context(model.config) - cfg.max_new_tokens
    for row in rows:
        if row["answer"] is None:
            raise BadInput(f"{row['source']}: --label_rollouts needs 'answer', to tell whether a rollout reaches it")

    def work(chunk):
        prefixes, owners = [], []
        for i in chunk:
            ids, _, ends = data.encode_trajectory(tokenizer, rows[i]["prompt"], rows[i]["completions"])
            for t, end in enumerate(ends[:-1]):
                if end + 1 <= limit:
                    prefixes.append(ids[:end + 1])
                    owners.append((i, t))
        samples = sample(model, tokenizer, prefixes, cfg.label_rollouts, cfg.temperature, cfg.max_new_tokens, cfg.seed,
                         keys=[i * 10_000 + t for i, t in owners], rows_at_once=cfg.rows_at_once)
        labels, tokens = {i: [None] * len(rows[i]["completions"]) for i in chunk}, Counter()
        for (i, t), rollouts in zip(owners, samples):
            before = data.STEP_END.join(rows[i]["completions"][:t + 1]) + data.STEP_END
            right = [data.verify(before + s.text, rows[i]["answer"]) for s in rollouts]
            labels[i][t] = sum(right) / len(right) if cfg.label_kind == "soft" else float(any(right))
            tokens[i] += sum(len(s.token_ids) for s in rollouts)
        for i in chunk:
            labels[i][-1] = float(rows[i]["correct"])
        return [{"index": i, "labels": labels[i], "tokens": tokens[i]} for i in chunk]

    records = in_chunks(cfg, env, len(rows), max(1, cfg.rows_at_once // (8 * cfg.label_rollouts)), work)
    if env.rank == 0:
        path, failed = os.path.join(cfg.out, "labelled.jsonl"), 0
        with open(path + ".tmp", "w") as f:
            for record in records:
                row = rows[record["index"]]
                failed += None in record["labels"]
                if None not in record["labels"]:
                    kept = {key: row[key] for key in ("prompt", "completions", "answer", "correct")}
                    f.write(json.dumps(kept | {"labels": record["labels"]}) + "\n")
        os.replace(path + ".tmp", path)
        summary = {"trajectories": len(records) - failed, "left_out": failed, "tokens": sum(r["tokens"] for r in records),
                   "mean_label": float(np.mean([x for r in records if None not in r["labels"] for x in r["labels"]] or [0]))}
        sft.write_json(os.path.join(cfg.out, "summary.json"), summary)
        print(f"{summary['trajectories']} trajectories labelled ({failed} too long), {summary['tokens']} tokens of rollouts; "
              f"in {path}")
    sft.barrier(env)


def main(cfg, env):
    cfg = dataclasses.replace(cfg, out=cfg.out or os.path.join("runs", "labels" if cfg.label_rollouts else "search"))
    level = data.builtin_level(cfg.data)
    sft.last_checkpoint(cfg)  # for --resume: are the options those of the run to continue?
    return label(cfg, env, level) if cfg.label_rollouts else search(cfg, env, level)


if __name__ == "__main__":
    sft.launch(main, Config)
