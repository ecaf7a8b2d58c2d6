"""Search: what does spending N samples buy, with and without a reward model?

One set of samples, many ways to answer from it (all at every power of two up to --n):
    pass@1          mean accuracy of a sample          oracle    pass@n = 1 - C(N-c, n) / C(N, n)
    majority        the most frequent answer, equal values being one answer
    best-of-n       the sample with the best score     weighted  the answer with the most score
A response's score is made of its step values V_1..V_T by --aggregate: last, min, mean or prod.

Or the tree is grown step by step: from each kept prefix sample `expand` next steps, value them,
keep the best `beam`:
    greedy search   --beam 1 --expand b                beam search   --beam k --expand b
    dvts            k independent greedy searches, the best result at the end
Finished responses stay candidates with their value. The search ends when all that is kept is
finished.

The time goes where the cache is (parts/decoding.py): samples of a prompt share one row of it until
they choose different tokens; rows that end leave the batch; a kept prefix keeps its rows in the
policy's AND the reward model's cache, so no prefix token passes through either model twice.
Duplicate candidates are scored once. The reward models may be of any kind (parts/rewards.py).

    python search_minimal.py                                 # built-in models: a table in a minute
    python search_minimal.py --prm runs/TDRM/model runs/ScalarPRM/model --show
    torchrun --nproc_per_node=8 -- search_minimal.py --model Qwen/Qwen2.5-Math-7B-Instruct \\
        --data math500.jsonl --n 64 --prm PRM    # without the --, torchrun would take --n itself
    python search_minimal.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k.jsonl \\
        --prm none --step_end line --prompt "{question} Put the answer in \\\\boxed{}."
    python search_minimal.py --label_rollouts 8 --data solutions.jsonl    # step labels by rollouts

Files in --out: samples.jsonl (trajectories, with values: training data for tdrm_minimal.py),
summary.json (the table).
Left out: lookahead search and MCTS; batching across depths (all problems of a chunk advance by one
step together).
"""

import json
import math
import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

import data
import sft_minimal as sft
import tdrm_minimal as tdrm
from parts.answers import answer_key, extract_answer
from parts.decoding import StepEnd, decode, feed, longest_context, pad, prompt_cache
from parts.decoding import sample, uniforms
from parts.formats import BadInput, named, read_problems, read_trajectories, split_steps
from parts.models import STEP_ENDS, Layout, encode_prompt, end_ids, layout_of, load_policy
from parts.models import load_tokenizer, question_of, torch_dtype
from parts.rewards import load_reward_model
from parts.runs import Processes, last_checkpoint, launch, open_folder, opt, write_json
from parts.training import DTYPES
from parts.verifier import check

MAX_DEPTH = 1000  # of a tree: a bound for models that never end a response


@dataclass(frozen=True)
class Config:
    model: str | None = opt(None, "policy: name or folder; without it: the built-in one")
    prm: tuple[str, ...] = opt((), "reward models; without it: the built-in TDRM; none: no model")
    data: tuple[str, ...] = opt(("builtin",), "builtin[-hard|-choice], or files of problems")
    out: str | None = opt(None, "folder of the run; without it: runs/search")
    problems: int | None = opt(None, "how many; without it: all, or 200 built-in ones", low=1)
    n: int = opt(16, "samples of each problem", low=1)
    beam: int = opt(4, "kept prefixes in beam search, subtrees in dvts", low=1)
    expand: tuple[int, ...] = opt((2, 4, 8), "next steps sampled from each kept prefix", low=1)
    aggregate: str = opt("last", "of step values", choices=("last", "min", "mean", "prod"))
    temperature: float = opt(1.0, "of sampling; 0: the likeliest token", low=0)
    max_new_tokens: int = opt(128, "longest response", low=1)
    max_step_tokens: int = opt(64, "longest step in tree search", low=1)
    rows_at_once: int = opt(2048, "rows in one decoding batch (memory only, same result)", low=1)
    label_rollouts: int | None = opt(None, "label the steps of --data by so many rollouts", low=1)
    label_kind: str = opt("soft", "share of right rollouts, or any", choices=("soft", "hard"))
    dtype: str = opt("auto", "weights", choices=DTYPES)
    prompt: str = opt("{question}", "what the policy is asked, with {question} in it")
    system: str | None = opt(None, "a system turn before the question")
    step_end: str = opt("blank", "what ends a step: a blank line, or a line", choices=STEP_ENDS)
    verifier: str | None = opt(None, "FILE:FUNCTION(response, row) in place of the answer check")
    seed: int = opt(0, "of the sampling", low=0, high=2**32 - 1)
    resume: bool = opt(False, "keep the problems that --out has already done, do the others")
    show: bool = opt(False, "print one beam search step by step")


# --------------------------------------------------------------------------------------------------
# Tree search: greedy, beam and dvts are one algorithm with other numbers.


@dataclass
class Beam:
    """A response under construction. `group` is what it competes in: its problem, or its
    subtree."""

    group: int
    token_ids: list
    steps: list
    value: float = 0.0
    total: float = 0.0  # sum of the reward model's numbers over `count` tokens of the response
    count: int = 0
    finished: bool = False
    row: int = 0  # in the policy's cache; of a candidate not yet kept: its number among the samples
    prm_row: int = 0  # in the reward model's cache, of which the first `prm_slots` slots go on
    prm_slots: int = 2**31
    too_long: bool = False  # for the reward model, which has not read it: its value is 0


@torch.no_grad()
def tree_search(
    model,
    tokenizer,
    prm,
    prompts,
    keep,
    expand,
    subtrees=1,
    temperature=1.0,
    max_step_tokens=64,
    max_new_tokens=256,
    seed=0,
    keys=None,
    layout=Layout(),
    step_end=None,
    trace=None,
):
    """Grow each prompt's response step by step -> (best Beam of each prompt, Counter of tokens
    "generated", "scored" and candidates "too_long").

    Greedy search: keep 1; beam search: keep k; dvts: keep 1 in each of k `subtrees`. At the root
    keep * expand steps are sampled. All prompts advance together, one depth at a time. A list
    `trace` receives (depth, group, candidates, kept).
    """
    model.eval()
    device, ends = next(model.parameters()).device, end_ids(tokenizer, model.generation_config)
    step_end = step_end or StepEnd(tokenizer, device, model.config.vocab_size, layout.step_end)
    groups = [i for i in range(len(prompts)) for _ in range(subtrees)]  # group -> prompt
    room, count = min(max_step_tokens, 16), Counter()  # for a step; the cache grows if need be

    # The root: a row for each prompt, however many samples begin there. decode() reads the
    # policy's.
    encoded = [encode_prompt(tokenizer, layout.ask(prompt)) for prompt in prompts]
    cache, ids, mask = prompt_cache(encoded, device, len(groups) * keep * expand, room)
    limit = longest_context(prm.config)
    encoded = [prm.encode(prompt, [])[0][:limit] for prompt in prompts]
    prm_cache, prm_ids, prm_mask = prompt_cache(encoded, device)
    feed(prm, prm_cache, prm_ids, prm_mask)
    count["scored"] += int(prm_mask.sum())
    live = [Beam(group, [], [], row=i, prm_row=i) for group, i in enumerate(groups)]
    finished = defaultdict(list)

    for depth in range(MAX_DEPTH):
        # 1) Sample next steps from every live prefix.
        parents = [beam for beam in live for _ in range(expand if depth else keep * expand)]
        limits = [min(max_step_tokens, max_new_tokens - len(beam.token_ids)) for beam in parents]
        noise = step_noise(parents, groups, keys, seed, depth, max_step_tokens)[:, : max(limits)]
        noise, limits = torch.from_numpy(noise).to(device), torch.tensor(limits, device=device)
        place = torch.tensor([beam.row for beam in parents], device=device)
        tokens, _, place, slots = decode(
            model, cache, ids, mask, place, noise, temperature, ends, step_end, limits
        )
        count["generated"] += sum(map(len, tokens))

        # 2) Distinct candidates; each is scored once, its new tokens only.
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        candidates = distinct_candidates(parents, tokens, texts, ends)
        prm_cache, scored = score_candidates(prm, prm_cache, parents, candidates, device)
        count["scored"] += scored
        count["too_long"] += sum(beam.too_long for beam in candidates)

        # 3) Keep the best of each group; finished responses stay candidates.
        by_group, live = defaultdict(list), []
        for beam in candidates:
            by_group[beam.group].append(beam)
        for group, new in by_group.items():
            kept = sorted(finished[group] + new, key=lambda beam: -beam.value)[:keep]
            over = [b.finished or len(b.token_ids) >= max_new_tokens for b in kept]
            finished[group] = [beam for beam, is_over in zip(kept, over) if is_over]
            live += [beam for beam, is_over in zip(kept, over) if not is_over]
            if trace is not None:
                trace.append((depth, group, new, kept))
        if not live:
            break

        # 4) The kept prefixes keep what is in the cache. Their last token, sampled but not yet
        #    read, is read next.
        rows = torch.tensor([beam.row for beam in live], device=device)
        cache = cache.select(place[rows], room, slots[rows], len(live) * expand)
        ids = torch.tensor([beam.token_ids[-1:] for beam in live], device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        for row, beam in enumerate(live):
            beam.row = row

    best = []
    for i in range(len(prompts)):  # where nothing ended, the best prefix is all there is
        pool = [beam for group, p in enumerate(groups) if p == i for beam in finished[group]]
        pool = pool or [beam for beam in live if groups[beam.group] == i]
        best.append(max(pool, key=lambda beam: beam.value, default=Beam(i, [], [])))
    return best, count


def distinct_candidates(parents, tokens, texts, ends):
    """A Beam for every different continuation. Its `row` is the number of its sample."""
    candidates = {}
    for i, (parent, new, text) in enumerate(zip(parents, tokens, texts)):
        name = (parent.group, tuple(parent.token_ids), tuple(new))
        if name in candidates:
            continue
        # A step without text (an end right after a blank line) leaves the value as it was.
        steps = parent.steps + ([text.strip()] if text.strip() else [])
        more = {"token_ids": parent.token_ids + new, "steps": steps, "finished": new[-1] in ends}
        candidates[name] = replace(parent, row=i, **more)
    return list(candidates.values())


def score_candidates(prm, cache, parents, candidates, device):
    """Read each candidate's new step behind its parent's row and set its value -> the reward
    model's new cache, a row a candidate; tokens scored."""
    rows, slots, new = [], [], []
    for row, beam in enumerate(candidates):
        parent = parents[beam.row]
        rows.append(parent.prm_row)
        slots.append(parent.prm_slots)
        beam.prm_row = row
        is_new = len(beam.steps) > len(parent.steps)
        new.append(prm.next_ids(beam.steps, beam.finished) if is_new else ([], 0))
    rows, slots = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
    cache = cache.select(rows, max(len(ids) for ids, _ in new), slots)
    limit = longest_context(prm.config)
    for row, (beam, length) in enumerate(zip(candidates, cache.position.tolist())):
        beam.too_long |= length + len(new[row][0]) > limit
        if beam.too_long:
            new[row], beam.value = ([], 0), 0.0
    ids, mask = pad([ids for ids, _ in new], "right", device)
    start, new_tokens = cache.used, mask.sum(1)
    scores = feed(prm, cache, ids, mask).logits[..., 0]  # (candidates, tokens)
    last = scores.gather(1, (new_tokens[:, None] - 1).clamp(min=0))[:, 0].tolist()
    totals = (scores * mask).sum(1).tolist()
    for beam, number, total, (ids, stay) in zip(candidates, last, totals, new):
        beam.prm_slots = start + stay
        if ids:
            beam.total, beam.count = beam.total + total, beam.count + len(ids)
            logit = prm.values(number, beam.total, beam.count)
            beam.value = 0.5 + 0.5 * math.tanh(0.5 * logit)  # the sigmoid, without overflow
    return cache, int(mask.sum())


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
    if how == "mean":
        return sum(values) / len(values)
    return {"last": lambda v: v[-1], "min": min, "prod": math.prod}[how](values)


def pass_at_n(correct, total, n):
    """Unbiased estimate of P(any of n samples is correct) from `correct` of `total`."""
    return 1 - math.comb(total - correct, n) / math.comb(total, n)


def vote(answers, weights):
    """The answer (a key; None: no answer) with the most weight; ties go to the one that came
    first."""
    votes = Counter()
    for answer, weight in zip(answers, weights):
        if answer is not None:
            votes[answer] += weight
    return max(votes, key=votes.get) if votes else None


def answers_from_samples(record, n, how):
    """Accuracies {method: 0..1} of one problem at n samples, from its record with N: the mean over
    the N // n groups of n."""
    keys, correct, hits = record["keys"], record["correct"], defaultdict(list)
    correct_keys = {key for key, is_correct in zip(keys, correct) if is_correct}
    for start in range(0, len(keys) - n + 1, n):
        part = slice(start, start + n)
        hits["majority"].append(vote(keys[part], [1] * n) in correct_keys)
        for name, values in record["values"].items():
            scores = [aggregate(v, how) for v in values[part]]
            hits[f"best-of-n, {name}"].append(correct[part][int(np.argmax(scores))])
            hits[f"weighted, {name}"].append(vote(keys[part], scores) in correct_keys)
    accuracies = {"oracle": pass_at_n(sum(correct), len(correct), n)}
    return accuracies | {method: float(np.mean(each)) for method, each in hits.items()}


# --------------------------------------------------------------------------------------------------
# The run: every method on every problem.


def main(cfg, procs):
    """Search, or label -> the table's rows, or the labels' summary (also in summary.json)."""
    out = os.path.join("runs", "labels" if cfg.label_rollouts else "search")
    cfg = replace(cfg, out=cfg.out or out)
    level = data.builtin_level(cfg.data)
    last_checkpoint(cfg)  # for --resume: are the options those of the run to continue?
    if cfg.label_rollouts:
        return label(cfg, procs, level)
    # 1) Policy, reward models, problems.
    dtype, start = torch_dtype(cfg, procs.device), time.time()
    policy, prms = load_models(cfg, procs, level, dtype)
    problems, left_out = load_problems(cfg, level, *policy, prms.values(), procs)

    # 2) All methods on a chunk of problems -> one record each.
    def work(chunk):
        return search_problems(cfg, [problems[i] for i in chunk], chunk, policy, prms, procs)

    most = max(cfg.n, max(cfg.expand) * cfg.beam if prms else 1)  # rows a problem
    records = in_chunks(cfg, procs, len(problems), max(1, cfg.rows_at_once // most), work)

    # 3) The table, the samples, and one search to look at.
    rows = table(cfg, records)
    if procs.rank == 0:
        print_table(rows, len(records))
        print(f"{left_out} problems left out; {time.time() - start:.0f} s")
        summary = {"problems": len(records), "left_out": left_out}
        summary["too_long"] = count_too_long(records)
        for method, number in summary["too_long"].items():
            print(f"{method}: {number} texts were too long for the reward model, and have no value")
        summary["empty_responses"] = write_samples(cfg, problems, records)
        write_json(os.path.join(cfg.out, "summary.json"), summary | {"rows": rows})
        if cfg.show and prms:
            name, prm = next(iter(prms.items()))
            show_search(cfg, problems[0]["question"], name, policy, prm)
    procs.barrier()
    return rows


def trees(cfg):
    """[(title, keep, expand, subtrees)] of all tree searches."""
    found = [(f"greedy search {b}", 1, b, 1) for b in cfg.expand]
    for b in cfg.expand if cfg.beam > 1 else ():
        found.append((f"beam search {cfg.beam} x {b}", cfg.beam, b, 1))
        found.append((f"dvts {cfg.beam} x {b}", 1, b, cfg.beam))
    return found


def search_problems(cfg, problems, keys, policy, prms, procs):
    """Every method on some problems, together -> one record each."""
    model, tokenizer = policy
    questions, layout = [p["question"] for p in problems], layout_of(cfg)
    asked = [layout.ask(question) for question in questions]
    sampling = {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, "keys": keys}
    parts = ("values", "generated", "scored", "too_long", "seconds", "tree")
    records = [{"index": i} | {part: {} for part in parts} for i in keys]

    def timed(name, function, *args, **kwargs):
        start = time.time()
        result = function(*args, **kwargs)
        for record in records:
            record["seconds"][name] = (time.time() - start) / len(records)
        return result

    # Samples, and the likeliest response.
    rows = {"rows_at_once": cfg.rows_at_once} | sampling
    samples = timed("samples", sample, model, tokenizer, asked, cfg.n, cfg.temperature, **rows)
    greedy = timed("greedy", sample, model, tokenizer, asked, 1, 0.0, **rows)
    for record, mine, (one,), problem in zip(records, samples, greedy, problems):
        seen, record["keys"] = {}, []
        for answer in [extract_answer(s.text) for s in mine]:
            key = None if answer is None else seen.setdefault(answer_key(answer), len(seen))
            record["keys"].append(key)
        record["texts"] = [s.text for s in mine]
        record["correct"] = [is_correct(cfg, s.text, problem) for s in mine]
        record["greedy"] = is_correct(cfg, one.text, problem)
        record["generated"]["samples"] = sum(len(s.token_ids) for s in mine)
        record["generated"]["greedy"] = len(one.token_ids)

    # Each reward model on the samples, and in the trees.
    for name, prm in prms.items():
        responses = [[(s.text, s.finished) for s in mine] for mine in samples]
        values, tokens = timed(
            name, score_responses, prm, questions, responses, layout, procs.device
        )
        for record, v, t in zip(records, values, tokens):
            record["values"][name], record["scored"][name] = v, t
        for record, mine in zip(records, samples):
            read = [not s.text.strip() or bool(v) for s, v in zip(mine, record["values"][name])]
            record["too_long"][name] = read.count(False)
        for title, *numbers in trees(cfg):
            method = f"{title}, {name}"
            options = sampling | {"temperature": cfg.temperature}
            options |= {"max_step_tokens": cfg.max_step_tokens, "layout": layout}
            search = (tree_search, model, tokenizer, prm, questions, *numbers)
            best, count = timed(method, *search, **options)
            for record, beam, problem in zip(records, best, problems):
                text = tokenizer.decode(beam.token_ids, skip_special_tokens=True)
                correct = is_correct(cfg, text, problem)
                record["tree"][method] = {"correct": correct, "value": beam.value}
                for kind in ("generated", "scored", "too_long"):
                    record[kind][method] = count[kind] / len(records)
    return records


def is_correct(cfg, response, row):
    return check(cfg.verifier, response, row)[0] > 0.5


def score_responses(prm, prompts, responses, layout, device):
    """Step values of each prompt's responses, (text, finished) each -> a list for each prompt of a
    list for each response; tokens scored for each prompt. Equal responses are scored once."""
    examples, tokens = {}, [0] * len(prompts)
    for i, (prompt, mine) in enumerate(zip(prompts, responses)):
        for text, finished in mine:
            steps = split_steps(text, layout.step_end)
            if steps and (i, text) not in examples:
                example = data.Example(prompt, steps, *prm.encode(prompt, steps, finished))
                examples[i, text] = example
                tokens[i] += prm.tokens_read(example)
    alone = Processes(device=device)  # each process has its own problems
    values = dict(zip(examples, prm.score_steps(list(examples.values()), alone)))
    found = [[values.get((i, t), []) for t, _ in mine] for i, mine in enumerate(responses)]
    return found, tokens


def in_chunks(cfg, procs, count, at_once, work):
    """Apply `work([index...]) -> [record...]` to problems 0..count-1, split over the processes ->
    all records by index. Each chunk's results are written at once, so that a stopped run loses one
    chunk at most; with --resume, records already in --out are kept."""
    open_folder(cfg, procs)
    folder = os.path.join(cfg.out, "state")

    def read():
        records = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(".jsonl"):
                with open(os.path.join(folder, name)) as f:
                    for record in map(json.loads, (line for line in f if line.endswith("\n"))):
                        records[record["index"]] = record
        return records

    done = read()
    todo = procs.mine([i for i in range(count) if i not in done])
    procs.barrier()  # nobody writes while another still reads
    path = os.path.join(folder, f"rank{procs.rank}.jsonl")
    if os.path.exists(path):  # a line that was cut short must not swallow the next one
        with open(path, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)
    name, quiet = os.path.basename(os.path.normpath(cfg.out)), procs.rank > 0
    with open(path, "a") as f, tqdm(total=len(todo), desc=name, disable=quiet) as bar:
        for start in range(0, len(todo), at_once):
            chunk = todo[start : start + at_once]
            f.write("".join(json.dumps(record) + "\n" for record in work(chunk)))
            f.flush()
            bar.update(len(chunk))
    procs.barrier()
    return [record for _, record in sorted(read().items())]


def load_models(cfg, procs, level, dtype):
    """-> (policy, tokenizer), reward models {name: model}; built-in ones are trained first."""
    name = cfg.model or sft.builtin_policy(level, procs)
    policy = load_policy(name, dtype).to(procs.device), load_tokenizer(name)
    names = [] if cfg.prm == ("none",) else list(cfg.prm)
    if not cfg.prm:
        names = [tdrm.builtin_reward_model(level, procs)]
    prms = {}
    for path in names:  # runs/TDRM/model is called TDRM, where that tells them apart
        short = [os.path.basename(os.path.normpath(p).removesuffix("/model")) for p in names]
        mine = short[names.index(path)]
        prm = load_reward_model(path, dtype, procs.device, "--prm")
        prms[mine if short.count(mine) == 1 else path] = prm
    return policy, prms


def load_problems(cfg, level, model, tokenizer, prms, procs):
    """-> problems, number left out: a blank one, or one that leaves no room for a response."""
    if level:
        problems = data.make_problems(cfg.problems or 200, "test", 0, level)
    else:
        problems = list(read_problems(cfg.data))[: cfg.problems]
    limit, kept = longest_context(model.config) - cfg.max_new_tokens, []
    for i, problem in enumerate(problems):
        question = problem["question"]
        source = problem.get("source", i)
        blank = not question_of(question).strip()
        if not blank and len(prompt_ids(tokenizer, question, cfg, source, prms)) <= limit:
            kept.append(problem)
        else:
            procs.print(f"left out, blank or too long for the model: {source}")
    if not kept:
        raise BadInput("--data: there is no problem that leaves room for a response")
    return kept, len(problems) - len(kept)


def prompt_ids(tokenizer, question, cfg, source, prms=()):
    """Token ids of a question as the policy is asked it. An error, here or in how the reward models
    are asked it, names its place."""
    with named(source):
        for prm in prms:
            prm.encode(question, [])
        return encode_prompt(tokenizer, layout_of(cfg).ask(question))


# --------------------------------------------------------------------------------------------------
# What is shown and written.


def table(cfg, records):
    """Records -> [{method, n, accuracy, stderr, generated, scored, seconds}], per problem."""
    rows, nothing = [], [0] * len(records)

    def part(kind, name, share=1.0):
        return [record[kind].get(name, 0) * share for record in records]

    def add(method, n, hits, generated, scored, seconds):
        stderr = np.std(hits, ddof=1) / len(hits) ** 0.5 if len(hits) > 1 else 0.0
        means = {"accuracy": np.mean(hits), "stderr": stderr, "generated": np.mean(generated)}
        means |= {"scored": np.mean(scored), "seconds": np.mean(seconds)}
        rows.append({"method": method, "n": n} | {key: float(x) for key, x in means.items()})

    one = [part(kind, "samples", 1 / cfg.n) for kind in ("generated", "seconds")]
    add("pass@1", 1, [np.mean(r["correct"]) for r in records], one[0], nothing, one[1])
    one = [part(kind, "greedy") for kind in ("generated", "seconds")]
    add("greedy decoding", 1, [r["greedy"] for r in records], one[0], nothing, one[1])
    counts = [2**k for k in range(1, int(math.log2(cfg.n)) + 1)]
    per_n = {n: [answers_from_samples(r, n, cfg.aggregate) for r in records] for n in counts}
    for method in per_n[counts[0]][0] if counts else ():
        name = method.partition(", ")[2]
        for n, share in [(n, n / cfg.n) for n in counts]:
            seconds = np.add(part("seconds", "samples", share), part("seconds", name, share))
            tokens = part("generated", "samples", share), part("scored", name, share)
            add(method, n, [hits[method] for hits in per_n[n]], *tokens, seconds)
    for method in records[0]["tree"]:
        costs = [part(kind, method) for kind in ("generated", "scored", "seconds")]
        add(method, 1, [r["tree"][method]["correct"] for r in records], *costs)
    return rows


def count_too_long(records):
    """{method: number of texts that its reward model could not read}, where there are any."""
    total = Counter()
    for record in records:
        total.update(record["too_long"])
    return {method: round(number) for method, number in total.items() if round(number)}


def print_table(rows, count):
    print(f"\n{count} problems; tokens and seconds are per problem")
    numbers = f"{'generated':>11}{'scored':>9}{'seconds':>9}"
    print(f"{'method':<34}{'n':>4}  {'accuracy':>14}{numbers}")
    for r in rows:
        accuracy = f"{r['accuracy']:.3f} ± {r['stderr']:.3f}"
        numbers = f"{r['generated']:>11.1f}{r['scored']:>9.1f}{r['seconds']:>9.4f}"
        print(f"{r['method']:<34}{r['n']:>4}  {accuracy:>14}{numbers}")


def write_samples(cfg, problems, records):
    """samples.jsonl: every response as a trajectory row -> number of responses without a step,
    which are left out."""
    path, empty = os.path.join(cfg.out, "samples.jsonl"), 0
    with open(path + ".tmp", "w") as f:
        for record in records:
            problem = problems[record["index"]]
            for j, (text, correct) in enumerate(zip(record["texts"], record["correct"])):
                steps = split_steps(text, layout_of(cfg).step_end)
                if not steps:
                    empty += 1
                    continue
                row = {"prompt": problem["question"], "completions": steps}
                row |= {"answer": problem["answer"], "correct": correct}
                row["values"] = {}
                for name, values in record["values"].items():  # NaN is no JSON
                    row["values"][name] = [v if math.isfinite(v) else None for v in values[j]]
                f.write(json.dumps(row) + "\n")
    os.replace(path + ".tmp", path)
    return empty


def show_search(cfg, question, name, policy, prm):
    """Print one beam search: the candidates of each depth with their values, the kept ones
    marked."""
    trace, b = [], max(cfg.expand)
    options = {"temperature": cfg.temperature, "max_step_tokens": cfg.max_step_tokens}
    options |= {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, "trace": trace}
    options["layout"] = layout_of(cfg)
    tree_search(*policy, prm, [question], cfg.beam, b, **options)
    print(f"\nbeam search {cfg.beam} x {b} with {name}: {question_of(question)}")
    for depth, _, candidates, kept in trace:
        finished = sum(beam.finished for beam in kept)
        ended = f"{finished} of the {len(kept)} kept are finished"
        print(f"  depth {depth + 1}: {len(candidates)} distinct candidates; {ended}")
        for beam in sorted(candidates, key=lambda beam: -beam.value):
            mark = "keep" if any(beam is other for other in kept) else ""
            text = " | ".join(" ".join(step.split()) for step in beam.steps)[-80:]
            print(f"    {mark:<5}{'█' * round(10 * beam.value):<11}{beam.value:.2f}  {text}")


# --------------------------------------------------------------------------------------------------
# Step labels by rollouts.


def label(cfg, procs, level):
    """`--label_rollouts K`: the label of step t is estimated from K rollouts of the policy from the
    prefix that ends with step t; the last step's is the outcome itself. Writes labelled.jsonl."""
    if level:
        raise BadInput("--label_rollouts: --data must be trajectory files")
    cfg = replace(cfg, prm=("none",))
    (model, tokenizer), _ = load_models(cfg, procs, level, torch_dtype(cfg, procs.device))
    layout = layout_of(cfg)
    rows = list(read_trajectories(cfg.data, layout.step_end))[: cfg.problems]
    limit = longest_context(model.config) - cfg.max_new_tokens
    for row in rows:
        if row["answer"] is None:
            needs = "--label_rollouts needs 'answer', to tell whether a rollout reaches it"
            raise BadInput(f"{row['source']}: {needs}")

    def work(chunk):
        prefixes, owners = [], []
        for i in chunk:
            steps = rows[i]["completions"]
            prompt = rows[i]["prompt"]
            with named(rows[i]["source"]):
                ids, _, step_ends = data.encode_trajectory(tokenizer, prompt, steps, layout=layout)
            for t, end in enumerate(step_ends[:-1]):
                if end + 1 <= limit:
                    prefixes.append(ids[: end + 1])
                    owners.append((i, t))
        keys = [i * 10_000 + t for i, t in owners]
        limits = cfg.temperature, cfg.max_new_tokens
        options = {"seed": cfg.seed, "keys": keys, "rows_at_once": cfg.rows_at_once}
        samples = sample(model, tokenizer, prefixes, cfg.label_rollouts, *limits, **options)
        labels = {i: [None] * len(rows[i]["completions"]) for i in chunk}
        tokens = Counter()
        for (i, t), rollouts in zip(owners, samples):
            before = layout.step_end.join([*rows[i]["completions"][: t + 1], ""])
            correct = [is_correct(cfg, before + s.text, rows[i]) for s in rollouts]
            soft = cfg.label_kind == "soft"
            labels[i][t] = sum(correct) / len(correct) if soft else float(any(correct))
            tokens[i] += sum(len(s.token_ids) for s in rollouts)
        for i in chunk:
            labels[i][-1] = float(rows[i]["correct"])
        return [{"index": i, "labels": labels[i], "tokens": tokens[i]} for i in chunk]

    at_once = max(1, cfg.rows_at_once // (8 * cfg.label_rollouts))
    records = in_chunks(cfg, procs, len(rows), at_once, work)
    summary = {"tokens": sum(record["tokens"] for record in records)}
    whole = [record for record in records if None not in record["labels"]]
    summary |= {"trajectories": len(whole), "left_out": len(records) - len(whole)}
    summary["mean_label"] = float(np.mean([x for r in whole for x in r["labels"]] or [0]))
    if procs.rank == 0:
        path = os.path.join(cfg.out, "labelled.jsonl")
        with open(path + ".tmp", "w") as f:
            for record in whole:
                row = rows[record["index"]]
                kept = {key: row[key] for key in ("prompt", "completions", "answer", "correct")}
                f.write(json.dumps(kept | {"labels": record["labels"]}) + "\n")
        os.replace(path + ".tmp", path)
        write_json(os.path.join(cfg.out, "summary.json"), summary)
        found = f"{len(whole)} trajectories labelled ({summary['left_out']} too long)"
        print(f"{found}, {summary['tokens']} tokens of rollouts; in {path}")
    procs.barrier()
    return summary


if __name__ == "__main__":
    launch(main, Config, __doc__)
