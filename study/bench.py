"""Speed, measured side by side. `python study/bench.py` lists the parts; `... PART` runs one.

Two sides run in turn, A B A B ..., because a machine drifts by ten percent within minutes; the
ratio is taken within each pair: median (smallest to largest). A ratio far from what counting
tokens predicts wants an explanation. Close other programs first: a thread that has to wait for its
core holds up all the others.

tdrm: trajectories a second in the loop of tdrm_minimal.main, fp32 on the CPU, random weights,
  against
  - the published algorithm: each transition (s_t, s_t+1) is a row of its own and all rows are
    shuffled. A row takes a forward with gradient over s_t and one without over s_t+1 (a last
    state is spared that), in padded micro-batches of 16, as many rows to an optimizer step as our
    batch has states;
  - TRL's PRMTrainer, if a trl that has it (up to 1.13) is installed: same tokens, batch size and
    AdamW, no checkpointing, saving, logging or evaluation; timed between two optimizer steps, so
    without its setup. It takes rows in random order, we batch rows of like length: "in random
    order" leaves out what that wins.
  Workloads: toy, the built-in policy and task; long, 60 + 16 x 24 tokens, 4 layers of 256.
search: problems a second of tree_search against published call structure (a `generate` per kept
  prefix, a reward-model forward over the whole prefix per candidate), same settings; responses a
  second of sample() against `generate`, also on responses of very different lengths, where
  padding is what dropping rows saves: of a policy that answers short and long questions, and
  random texts, of which no two agree for long: in the built-in policy, where the calls of many
  small operations take the time, and in one where arithmetic does.
rl: a GRPO step on verifiable rewards, sampling and update, against TRL's GRPOTrainer if installed.
gpu: TDRM and RL steps of a random 7B shape, also against parts/estimate.py.
loading: rows a second, and memory a row, from a Math-Shepherd file to Examples.

"of peak": the work a step cannot do without over what the same threads reach in a large matrix
product. For T tokens that is 6 x (weights in linear layers) x T + 6 x layers x hidden x T^2 (half
of the attention matrix).
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from statistics import median

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
warnings.simplefilter("ignore", FutureWarning)  # of options that TRL and transformers will rename
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import rl_minimal as rl  # noqa: E402
import search_minimal as search  # noqa: E402
import sft_minimal as sft  # noqa: E402
import tdrm_minimal as tdrm  # noqa: E402
from parts import estimate  # noqa: E402
from parts.decoding import sample  # noqa: E402
from parts.models import (
    STEP_ENDS,
    encode_prompt,
    load_policy,
    load_tokenizer,
    save_model,
)  # noqa: E402
from parts.rewards import RewardModel, load_reward_model, new_reward_model  # noqa: E402
from parts.runs import Processes, join_processes  # noqa: E402
from parts.training import Policy, accumulate_gradients, optimizer_step, prepare  # noqa: E402
import transformers  # noqa: E402  (after ours, which quieten it)

ALONE = Processes()  # one process, on the CPU
MICRO = 16  # rows in one forward of the published algorithm


def compare(title, expected, ours, other, pairs):
    """Call two functions that return a speed in turn, print what came out -> the median of ours."""
    speeds = [(ours(), other()) for _ in range(pairs)]
    a, b = map(median, zip(*speeds))
    ratios = [x / y for x, y in speeds]
    predicted = f"predicted {expected:5.2f}x, " if expected else ""
    spread = f"({min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs)"
    measured = f"measured {median(ratios):5.2f}x {spread}: {a:.4g} against {b:.4g} a second"
    print(f"  {title:<28} {predicted}{measured}", flush=True)
    return a


def matrix_peak(n, device="cpu", dtype=torch.float32):
    """FLOP/s of a product of two n x n matrices, the best of ten."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds_of(lambda: a @ a) for _ in range(10))


def seconds_of(function):
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def linear_weights(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


class Clock(transformers.TrainerCallback):
    """When each optimizer step of a TRL trainer ended, and what `read` said then."""

    def __init__(self, read=lambda: None):
        self.read, self.times = read, {}

    def on_step_end(self, args, state, control, **_):
        self.times[state.global_step] = time.perf_counter(), self.read()


TRL = {
    "max_grad_norm": 1,
    "bf16": False,
    "use_cpu": True,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "eval_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


# --------------------------------------------------------------------------------------------------
# tdrm


class Work:
    """Examples; folders with a policy and a reward model of random weights that all start from."""

    def __init__(self, folder, policy, examples, sizes):
        self.policy, self.reward, self.folder = folder + "/policy", folder + "/reward", folder
        self.tokenizer, self.examples = data.builtin_tokenizer(), examples
        self.batch_size, self.steps, self.published_steps = sizes  # steps in one measurement
        self.cfg = tdrm.Config(n_step=1, batch_size=self.batch_size)
        self.lengths = np.array([len(e) for e in examples])
        save_model(self.policy, policy, self.tokenizer)
        new_reward_model(self.policy, self.tokenizer, torch.float32).save(self.reward)

    def learner(self, head="Token", compiled=False):
        load = getattr(transformers, f"AutoModelFor{head}Classification").from_pretrained
        reward = RewardModel(load(self.reward, num_labels=1), self.tokenizer)
        return prepare(reward, replace(self.cfg, compile=compiled), ALONE)


def toy(folder, quick):
    tokenizer = data.builtin_tokenizer()
    problems = data.make_problems(50 if quick else 1600)
    rows = data.make_trajectories(problems, 4, label_rollouts=4)

    def encode(prompt, steps):
        return data.encode_trajectory(tokenizer, prompt, steps)

    examples, _ = data.encode_rows(rows, encode, 2048)
    return Work(folder, sft.new_policy(tokenizer, 0), examples, (8, 2, 1) if quick else (64, 20, 2))


def long(folder, quick):
    hidden, steps, count = (64, 4, 8) if quick else (256, 16, 128)
    policy, examples = wide_policy(512, hidden), []
    ids = torch.randint(5, 512, (count, 60 + 24 * steps)).tolist()
    labels = torch.randint(2, (count, steps)).tolist()
    ends = list(range(60 + 23, 60 + 24 * steps, 24))
    for row, mine in zip(ids, labels):
        examples.append(data.Example("", [], row, 60, ends, mine, correct=bool(mine[-1])))
    return Work(folder, policy, examples, (2, 1, 1) if quick else (8, 4, 1))


def wide_policy(vocabulary, hidden):
    """Random weights, four layers: wide enough that arithmetic takes the time, not the calls."""
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, **ids))


def shuffled(count, size):
    """Index lists in random order, without end: data.batches without the sorting by length."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(count)
        for i in range(0, count - count % size, size):
            yield order[i : i + size].tolist()


def padded(lengths, order, count=200):
    """Tokens a row with padding, on average over the first `count` batches of an order."""
    batches = [[lengths[i] for i in batch] for batch in itertools.islice(order, count)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(map(len, batches))


# Three sides. Each returns a function that trains for a while -> trajectories a second.


def our_loss(work, learner, examples, states):
    b = data.collate(examples, work.tokenizer.pad_token_id)
    logits = tdrm.step_values(learner.forward, b["input_ids"], None, b["step_ends"])
    targets, weights = tdrm.targets_and_weights(work.cfg, logits, b, labelled=True)
    return tdrm.value_loss(logits, targets, weights, states)


def ours(work, order, compiled=False):
    learner = work.learner(compiled=compiled)

    def run(steps=work.steps):
        start = time.perf_counter()
        for _ in range(steps):
            batch = [work.examples[i] for i in next(order)]
            states = sum(len(e.step_ends) for e in batch)

            def loss_fn(rows):
                return our_loss(work, learner, rows, states)

            accumulate_gradients(learner, batch, None, loss_fn, ALONE)
            optimizer_step(learner, 1e-5, 1.0)
        return steps * work.batch_size / (time.perf_counter() - start)

    run(6 if compiled else 2)  # the first steps allocate and compile
    return run


def transitions(work, examples):
    """Rows (ids of s_t, ids of s_t+1, reward, outcome); None for s_t+1 where s_t is the last."""
    rows = []
    for e in examples:
        labels = torch.tensor([e.labels])
        rewards = tdrm.shaped_rewards(labels, labels >= 0, work.cfg.correct, work.cfg.wrong)[0]
        states = [e.input_ids[: end + 1] for end in e.step_ends] + [None]
        rows += zip(states, states[1:], rewards.tolist(), [float(e.correct)] * len(rewards))
    return rows


def published_loss(work, learner, rows, states):
    def logits_of(prefixes):
        ids = {"input_ids": prefixes}
        batch = work.tokenizer.pad(ids, padding_side="right", return_tensors="pt")
        return learner.module.model(**batch, use_cache=False).logits.squeeze(-1)  # (rows,)

    now, following, rewards, targets = (list(column) for column in zip(*rows))
    targets, going_on = torch.tensor(targets), torch.tensor([ids is not None for ids in following])
    if going_on.any():
        with torch.no_grad():
            values = logits_of([ids for ids in following if ids]).sigmoid()
        backed_up = torch.tensor(rewards)[going_on] + work.cfg.gamma * values
        targets[going_on] = backed_up.clamp(0, 1)
    return tdrm.value_loss(logits_of(now), targets, 1.0, states)


def published(work, rows):
    per_trajectory = len(rows) / len(work.examples)
    accumulate = max(1, round(work.batch_size * per_trajectory / MICRO))
    learner, order = work.learner("Sequence"), shuffled(len(rows), MICRO)

    def run():
        start = time.perf_counter()
        for _ in range(work.published_steps):
            for micro in itertools.islice(order, accumulate):
                batch = [rows[i] for i in micro]
                published_loss(work, learner, batch, accumulate * MICRO).backward()
            optimizer_step(learner, 1e-5, 1.0)
        trajectories = work.published_steps * accumulate * MICRO / per_trajectory
        return trajectories / (time.perf_counter() - start)

    return run


def trl_side(work, trl, warmup=2):
    from datasets import Dataset  # comes with trl

    labels = [np.full(len(e), -100) for e in work.examples]
    for row, e in zip(labels, work.examples):
        row[e.step_ends] = e.labels
    rows = {"input_ids": [e.input_ids for e in work.examples], "labels": labels}
    rows, load = (
        Dataset.from_dict(rows),
        transformers.AutoModelForTokenClassification.from_pretrained,
    )
    model = load(work.policy, num_labels=2)
    size = {"per_device_train_batch_size": work.batch_size, "max_steps": warmup + work.steps}
    adamw = {"learning_rate": 1e-5, "weight_decay": 1e-3, "adam_beta2": 0.98}
    args = trl.PRMConfig(work.folder, max_length=None, **size, **adamw, **TRL)

    def run():
        clock = Clock()
        given = (model, args, None, rows, None, work.tokenizer)
        trainer = trl.PRMTrainer(*given, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        assert not model.is_gradient_checkpointing and model.dtype == torch.float32
        (begin, _), (end, _) = clock.times[warmup], clock.times[args.max_steps]
        return work.steps * work.batch_size / (end - begin)

    return run


def part_tdrm(args):
    trl, version = None, "trl (<= 1.13) with PRMTrainer not installed: skipped"
    for place in "trl", "trl.experimental.prm":  # where it was, where it is
        with contextlib.suppress(ImportError):
            if hasattr(module := importlib.import_module(place), "PRMTrainer"):
                trl, version = module, f"trl {sys.modules['trl'].__version__}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {version}")
    for make in toy, long:
        with tempfile.TemporaryDirectory() as folder:
            measure_tdrm(make.__name__, make(folder, args.quick), trl, args)


def measure_tdrm(name, work, trl, args):
    lengths, size, rows = work.lengths, work.batch_size, transitions(work, work.examples)
    steps = len(rows) / len(lengths)
    model = work.learner().module.model
    print(
        f"{name}: {model.num_parameters():,} parameters, batch {size}, {steps:.1f} steps, "
        f"{lengths.mean():.1f} tokens each; our gradient is the published one to "
        f"{largest_difference(work):.0e}"
    )
    sorted_tokens = padded(lengths, data.batches(lengths, size))
    random_tokens = padded(lengths, shuffled(len(lengths), size))
    first, second = ([len(row[i] or ()) for row in rows] for i in (0, 1))
    first, second = (padded(column, shuffled(len(rows), MICRO)) for column in (first, second))
    theirs = 3 * first * steps + second * (steps - 1)  # a forward is 1, a backward 2
    expected, run = theirs / (3 * sorted_tokens), ours(work, data.batches(lengths, size))
    speed = compare("ours / published", expected, run, published(work, rows), args.repeats)
    peak = matrix_peak(256 if args.quick else 2048)
    attention = model.config.num_hidden_layers * model.config.hidden_size * lengths
    flops = (6 * (linear_weights(model) + attention) * lengths).mean()
    print(f"  ours is {speed * flops / peak:.0%} of peak, {peak / 1e9:.0f} GFLOP/s")
    fast = other = None
    if not args.quick:  # compiling takes a while
        fast = ours(work, data.batches(lengths, size), compiled=True)
        title, expected = "with --compile / published", 1.15 * expected
        compare(title, expected, fast, published(work, rows), args.repeats)
    if not trl:
        return
    other, expected = trl_side(work, trl), random_tokens / sorted_tokens
    if fast:
        compare("with --compile / TRL", 1.1 * expected, fast, other, args.repeats)
    compare("ours / TRL", expected, run, other, args.repeats)
    if len(set(lengths)) > 1:
        unsorted = ours(work, shuffled(len(lengths), size))
        compare("ours in random order / TRL", 1, unsorted, other, args.repeats)


def largest_difference(work):
    """Of the two sides' gradients, which are to be the same thing, over the largest entry."""
    few, gradients = work.examples[:2], []
    sides = ("Token", our_loss, few), ("Sequence", published_loss, transitions(work, few))
    for head, loss, rows in sides:
        learner = work.learner(head)
        loss(work, learner, rows, 1).backward()
        named = sorted(learner.module.model.named_parameters())
        gradients.append(torch.cat([p.grad.flatten() for _, p in named]))
    return (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()


# --------------------------------------------------------------------------------------------------
# search


def naive_beam_search(model, prm, tokenizer, problem, keep, expand, max_depth=12):
    """Beam search as published code calls it: one `generate` per kept prefix, one reward-model
    forward over the whole prefix per candidate, one problem at a time. The built-in tokenizer
    closes a step with one token."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 64}
    options |= {
        "eos_token_id": [eos, tokenizer.convert_tokens_to_ids(STEP_ENDS["blank"])],
        "pad_token_id": pad,
    }
    prompt = encode_prompt(tokenizer, problem["question"])
    frontier, finished = [prompt], []
    for depth in range(max_depth):
        candidates, count = [], expand if depth else keep * expand
        for prefix in frontier:
            ids = model.generate(torch.tensor([prefix]), num_return_sequences=count, **options)
            for row in ids.tolist():
                while row[-1] == pad:
                    row.pop()
                if row not in candidates:
                    candidates.append(row)
        scored = list(finished)
        for row in candidates:
            prefix = row[:-1] if row[-1] == eos else row
            scored.append((prm(torch.tensor([prefix])).logits[0, -1, 0].item(), row))
        kept = sorted(scored, key=lambda pair: -pair[0])[:keep]
        finished = [pair for pair in kept if pair[1][-1] == eos]
        frontier = [row for _, row in kept if row[-1] != eos]
        if not frontier:
            break
    return tokenizer.decode(kept[0][1][len(prompt) :], skip_special_tokens=True)


def widened(policy, size):
    """The same function with more arithmetic: MLPs of `size` units, the new ones zero."""
    config = copy.deepcopy(policy.config)
    config.intermediate_size = size
    wide, state = transformers.Qwen2ForCausalLM(config).eval(), policy.state_dict()
    with torch.no_grad():
        for name, weight in wide.state_dict().items():
            weight.zero_()[tuple(map(slice, state[name].shape))] = state[name]
    return wide


def both_levels(policy):
    """Folder of a policy that answers questions of both built-in levels, in 20 to 90 tokens: the
    built-in one, trained on if it is not there yet."""
    out = os.path.join("runs", "bench-both-levels")
    if not os.path.isdir(os.path.join(out, "model")):
        os.makedirs(out, exist_ok=True)
        path = os.path.join(out, "solutions.jsonl")
        with open(path, "w") as f:
            for level in data.LEVELS:
                problems = data.make_problems(20_000, "train", 0, level)
                for row in data.make_trajectories(problems, 1, level=level):
                    known = {key: row[key] for key in ("prompt", "completions", "answer")}
                    f.write(json.dumps(known) + "\n")
        cfg = sft.Config(model=policy, data=(path,), out=out, eval_problems=100, resume=True)
        sft.main(cfg, ALONE)
    return os.path.join(out, "model")


def part_search(args):
    """Beam search against the published call structure; sample() against `generate`."""
    folder, prm_folder = sft.builtin_policy("builtin", ALONE), tdrm.builtin_reward_model(
        None, ALONE
    )
    tokenizer, model = load_tokenizer(folder), load_policy(folder, torch.float32)
    prm, count = load_reward_model(prm_folder, torch.float32), 4 if args.quick else 32
    problems, right = data.make_problems(count, "test"), {}
    questions = [p["question"] for p in problems]

    def timed(side, answer):
        start = time.perf_counter()
        texts = answer()
        seconds = time.perf_counter() - start
        right[side] = sum(data.verify(t, p["answer"]) for t, p in zip(texts, problems))
        return count / seconds

    def ours():
        best, _ = search.tree_search(model, tokenizer, prm, questions, 4, 4)
        return [tokenizer.decode(beam.token_ids, skip_special_tokens=True) for beam in best]

    @torch.no_grad()
    def published():
        return [naive_beam_search(model, prm, tokenizer, p, 4, 4) for p in problems]

    print(f"search: problems a second, beam 4 x expand 4, {count} problems at once")
    sides = (lambda: timed("ours", ours)), (lambda: timed("published", published))
    compare("published calls, one by one", None, *sides, args.repeats)
    print(f"  right answers: ours {right['ours']}, published {right['published']} of {count}")

    print(
        "sample(): responses a second, 16 prompts x 8, against transformers' generate; predicted: "
    )
    print("padded / real tokens")
    asked = [p["question"] for p in data.make_problems(16, "test")]
    measure_sampling("built-in policy", model, tokenizer, asked, 64, args)
    if not args.quick:  # short and long responses of a policy that means them
        both = load_policy(both_levels(folder), torch.float32)
        wide = widened(both, 8192)
        for counts in (8, 8), (12, 4):
            mixed = []
            for n, level in zip(counts, data.LEVELS):
                mixed += [p["question"] for p in data.make_problems(n, "test", level=level)]
            title = f"{counts[0]} short, {counts[1]} long"
            measure_sampling(title, both, tokenizer, mixed, 128, args)
            measure_sampling(title + ", 3M parameters", wide, tokenizer, mixed, 128, args)
    wide = wide_policy(len(tokenizer), 64 if args.quick else 256)
    for title, policy in ("random texts", copy.deepcopy(model)), ("random texts, 4M", wide):
        with torch.no_grad():  # every token as likely as the end: lengths from 1 to over 100
            policy.eval().lm_head.weight.zero_()
        for longest in (32, 64, 160):
            name = f"{title}, {longest} at most"
            measure_sampling(name, policy, tokenizer, asked, longest, args)


def measure_sampling(title, policy, tokenizer, asked, longest, args):
    prompts, tokens = [encode_prompt(tokenizer, q) for q in asked], []
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
    options |= {"num_return_sequences": 8, "max_new_tokens": longest}
    options["pad_token_id"] = tokenizer.pad_token_id

    def library():
        ids = {"input_ids": prompts}
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
        start = time.perf_counter()
        policy.generate(**batch, **options)
        return 128 / (time.perf_counter() - start)

    def mine():
        start, options = time.perf_counter(), {"max_new_tokens": longest, "seed": len(tokens)}
        samples = sample(policy, tokenizer, prompts, 8, **options)
        seconds = time.perf_counter() - start
        lengths = [len(s.token_ids) for row in samples for s in row]
        tokens.append(len(lengths) * max(lengths) / sum(lengths))
        return 128 / seconds

    mine(), library()
    compare(title, np.mean(tokens), mine, library, args.repeats)  # what dropping rows could save
    print(f"  padded / real tokens: {np.mean(tokens):.2f}")


# --------------------------------------------------------------------------------------------------
# rl


class RLSide:
    """Our GRPO steps on verifiable rewards; how long sampling and update took, and on how much."""

    def __init__(self, folder, prompts, group, steps):
        sizes = {"prompts_per_step": prompts, "group_size": group, "max_new_tokens": 64}
        self.cfg = rl.Config(batch_size=prompts * group, lr=1e-9, **sizes)
        module = Policy(load_policy(folder, torch.float32), load_tokenizer(folder))
        self.learner, self.steps = prepare(module, self.cfg, ALONE), steps
        self.problems = data.make_problems(prompts * 20)
        self.seconds, self.tokens, self.count = [], [], itertools.count()

    def run(self):
        """-> steps a second."""
        begin, sampling, prompts = time.perf_counter(), 0.0, self.cfg.prompts_per_step
        for step in itertools.islice(self.count, self.steps):
            start, first = time.perf_counter(), step * prompts % len(self.problems)
            asked = self.problems[first : first + prompts]
            rollouts = rl.roll_out(self.learner.module, asked, step * prompts, self.cfg, ALONE)
            sampling += time.perf_counter() - start
            correct = torch.tensor([r.correct for r in rollouts])
            advantages = rl.group_advantages(correct, self.cfg.group_size).tolist()
            self.tokens.append(learn(self.learner, rollouts, advantages, self.cfg, ALONE)[:2])
        total = time.perf_counter() - begin
        self.seconds.append((sampling / self.steps, (total - sampling) / self.steps))
        return self.steps / total


def learn(learner, rollouts, advantages, cfg, procs):
    """An update -> tokens written, tokens in all, largest |ratio - 1|."""
    for r, advantage in zip(rollouts, advantages):
        r.advantages = np.full(len(r.old_logprobs), advantage, dtype=np.float32)
    found = rl.update_policy(learner, rollouts, 0, cfg, procs)
    written = sum(len(r.old_logprobs) for r in rollouts)
    return written, sum(map(len, rollouts)), found["max_ratio_deviation"]


def part_rl(args):
    """Seconds a GRPO step on verifiable rewards, split into sampling and update, against TRL's."""
    folder, group = sft.builtin_policy("builtin", ALONE), 8
    prompts, steps = (2, 1) if args.quick else (16, 8)
    mine = RLSide(folder, prompts, group, steps)
    mine.run()
    trl = importlib.import_module("trl") if importlib.util.find_spec("trl") else None
    version = f"trl {trl.__version__}" if trl else "trl not installed: ours alone"
    threads = f"up to 64 tokens, {torch.get_num_threads()} threads"
    print(f"rl: steps a second, {prompts} prompts x {group} samples, {threads}; {version}")
    sides = {"ours": mine.seconds}
    if trl:
        with tempfile.TemporaryDirectory() as place:
            other = TRLSide(trl, place, folder, mine)
            sides["TRL"] = other.seconds
            compare("ours / TRL GRPOTrainer", None, mine.run, other.run, args.repeats)
    else:
        speed = median(mine.run() for _ in range(args.repeats))
        print(f"  ours: {speed:.3g} steps a second")
    peak, weights = matrix_peak(256 if args.quick else 2048), linear_weights(mine.learner.module)
    written, whole = np.mean(mine.tokens, axis=0)
    for side, parts in sides.items():
        sampling, update = np.median(parts, axis=0)
        shares = 2 * weights * written / sampling / peak, 6 * weights * whole / update / peak
        print(
            f"  {side:<5} sampling {sampling:.3f} s ({shares[0]:.0%} of peak), update "
            f"{update:.3f} s ({shares[1]:.0%})"
        )
    print(
        f"  {written:.0f} tokens written a step, {whole:.0f} with prompts; {peak / 1e9:.0f} GFLOP/s"
    )


class TRLSide:
    """The same steps in TRL's GRPOTrainer."""

    def __init__(self, trl, place, folder, mine, warmup=1):
        from datasets import Dataset  # comes with trl

        self.trl, self.warmup, self.sampling, self.seconds = trl, warmup, 0.0, []
        self.model, self.tokenizer = load_policy(folder, torch.float32), load_tokenizer(folder)
        self.generate, self.model.generate = self.model.generate, self.timed
        rows, group = [], mine.cfg.group_size
        for p in mine.problems:
            message = {"role": "user", "content": p["question"]}
            rows.append({"prompt": [message], "answer": p["answer"]})
        self.rows, self.steps = Dataset.from_list(rows), mine.steps
        size = {"per_device_train_batch_size": mine.cfg.batch_size, "num_generations": group}
        size |= {"max_completion_length": 64, "max_steps": warmup + mine.steps}
        same = {"learning_rate": 1e-9, "beta": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self.args = trl.GRPOConfig(place, **size, **same, **TRL)

    def timed(self, *args, **options):
        start = time.perf_counter()
        out = self.generate(*args, **options)
        self.sampling += time.perf_counter() - start
        return out

    def reward(self, completions, answer, **_):
        return [float(data.verify(c[0]["content"], a)) for c, a in zip(completions, answer)]

    def run(self):
        self.sampling, clock = 0.0, Clock(lambda: self.sampling)
        what = {"reward_funcs": self.reward, "args": self.args, "train_dataset": self.rows}
        what |= {"processing_class": self.tokenizer, "callbacks": [clock]}
        trainer = self.trl.GRPOTrainer(self.model, **what)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        (begin, before), (end, after) = clock.times[self.warmup], clock.times[self.args.max_steps]
        sampling, total = after - before, end - begin
        self.seconds.append((sampling / self.steps, (total - sampling) / self.steps))
        return self.steps / total


# --------------------------------------------------------------------------------------------------
# gpu


class Shape:
    """A model's shape with as many layers as the device takes, and what was measured of a step."""

    def __init__(self, quick):
        cuda, tokenizer = torch.cuda.is_available(), data.builtin_tokenizer()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.procs, self.tokenizer = Processes(device=self.device), tokenizer
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.card = torch.cuda.get_device_properties(0).total_memory if cuda else 4 * 2**30
        self.config, self.large = estimate.load_config("Qwen2.5-Math-7B"), cuda and not quick
        if not self.large:
            small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
            small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048}
            self.config = transformers.Qwen2Config(**small, tie_word_embeddings=False)
        self.peak = matrix_peak(8192 if cuda else 256, self.device, self.dtype)
        name = torch.cuda.get_device_name() if cuda else "no GPU, a small shape on the CPU"
        print(f"gpu: {name}; matrix products reach {self.peak / 1e12:.3g} TFLOP/s")

    def build(self, auto, head, cfg):
        """-> a model that fits with these options, its estimated bytes."""
        most, ids = self.config.num_hidden_layers, {"bos_token_id": None}
        ids |= {"eos_token_id": self.tokenizer.eos_token_id, "num_labels": 1}
        ids |= {"pad_token_id": self.tokenizer.pad_token_id, "layer_types": None}
        for layers in range(most, 0, -1):
            shape = self.config.to_dict() | ids | {"num_hidden_layers": layers}
            config = transformers.AutoConfig.for_model(**shape)
            config.classifier_dropout = 0.0
            models = [estimate.new_model(config, head)]
            bytes_ = estimate.total(*estimate.memory(models, cfg))
            if bytes_ < 0.94 * self.card:
                torch.manual_seed(0)
                with torch.device(self.device):
                    return auto.from_config(config, dtype=self.dtype), bytes_
        raise SystemExit(f"gpu: not one layer of this shape fits {self.card / 2**30:.0f} GiB")

    def measure(self, name, layers, step, repeats, estimated, count):
        """Time `step`; `count()` -> tokens and FLOPs of one."""
        step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median(seconds_of(step) for _ in range(repeats))
        used = "peak not measured here"
        if self.device.type == "cuda":
            used = f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        tokens, flops = count()
        speed, share = tokens / seconds, flops / seconds / self.peak
        print(
            f"  {name}, {layers} of {self.config.num_hidden_layers} layers: {speed:.4g} tokens a "
            f"second, {share:.0%} of peak; {used}, estimated {estimated / 2**30:.1f} GiB"
        )


def part_gpu(args):
    """TDRM and RL steps of a random 7B shape: tokens a second, FLOPs, memory and its estimate."""
    shape = Shape(args.quick)
    gpu_tdrm(shape, args)
    gpu_rl(shape, args)


def gpu_options(shape, kind, **options):
    dtype = "bfloat16" if shape.dtype == torch.bfloat16 else "float32"
    return estimate.options(kind)(dtype=dtype, grad_checkpoint=True, **options)


def gpu_tdrm(shape, args):
    rows, steps, length = (8, 16, 1024) if shape.large else (4, 2, 64)
    sizes = {"batch_size": rows, "micro_batch_size": rows // 4, "max_length": length}
    cfg = gpu_options(shape, "tdrm", **sizes)
    model, estimated = shape.build(transformers.AutoModelForTokenClassification, "value", cfg)
    learner = prepare(RewardModel(model, shape.tokenizer), cfg, shape.procs)
    ends, examples = list(range(length // steps - 1, length, length // steps)), []
    for _ in range(rows):
        ids = torch.randint(5, shape.config.vocab_size, (length,)).tolist()
        examples.append(data.Example("", [], ids, 1, ends, [1.0] * steps, correct=True))

    def loss_fn(part):
        b = data.collate(part, 0, shape.device)
        logits = tdrm.step_values(learner.forward, b["input_ids"], None, b["step_ends"])
        targets, weights = tdrm.targets_and_weights(cfg, logits, b, labelled=True)
        return tdrm.value_loss(logits, targets, weights, rows * steps)

    def step():
        accumulate_gradients(learner, examples, cfg.micro_batch_size, loss_fn, shape.procs)
        optimizer_step(learner, 1e-6, 1.0)

    def count():
        attention = model.config.num_hidden_layers * model.config.hidden_size * length
        return rows * length, 6 * rows * length * (linear_weights(model) + attention)

    layers = model.config.num_hidden_layers
    shape.measure("a TDRM step", layers, step, args.repeats, estimated, count)


def gpu_rl(shape, args):
    prompts, group, new = (2, 8, 256) if shape.large else (1, 8, 16)
    sizes = {"prompts_per_step": prompts, "group_size": group, "batch_size": prompts * group}
    sizes |= {"micro_batch_size": 2, "max_new_tokens": new, "max_length": 64 + new}
    cfg = gpu_options(shape, "rl", eval_problems=1, alpha=1.0, **sizes)
    model, estimated = shape.build(transformers.AutoModelForCausalLM, "policy", cfg)
    learner = prepare(Policy(model, shape.tokenizer), cfg, shape.procs)
    problems, phases, counted = data.make_problems(prompts), [], []
    advantages = [1.0 - 2 * (i % 2) for i in range(prompts * group)]

    def step():
        start = time.perf_counter()
        rollouts = rl.roll_out(learner.module, problems, 0, cfg, shape.procs)
        middle = time.perf_counter()
        counted.append(learn(learner, rollouts, advantages, cfg, shape.procs))
        phases.append((middle - start, time.perf_counter() - middle))

    def count():
        written, tokens, _ = np.mean(counted, axis=0)
        return tokens, linear_weights(model) * (2 * written + 6 * tokens)

    layers = model.config.num_hidden_layers
    shape.measure("an RL step", layers, step, args.repeats, estimated, count)
    (sampling, update), deviation = np.median(phases, axis=0), max(row[2] for row in counted)
    print(
        f"    sampling {sampling:.3g} s, update {update:.3g} s; largest |ratio - 1| {deviation:.2g}"
    )


# --------------------------------------------------------------------------------------------------
# startup


def part_startup(args):
    """Seconds from the command to the first training step, of the scripts that learn at once."""
    imports = (
        "from transformers import AutoModelForTokenClassification, Qwen2ForTokenClassification"
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = data.builtin_tokenizer()
        save_model(folder + "/policy", sft.new_policy(tokenizer, 0), tokenizer)
        sides = {
            "import torch": lambda: seconds_of_python("import torch"),
            "and of transformers": lambda: seconds_of_python("import tdrm_minimal\n" + imports),
            "sft_minimal.py": lambda: seconds_to_step("sft", folder, []),
            "tdrm_minimal.py": lambda: seconds_to_step(
                "tdrm", folder, ["--model", folder + "/policy"]
            ),
        }
        rows = [{name: side() for name, side in sides.items()} for _ in range(args.repeats)]
    for name in sides:
        numbers = sorted(row[name] for row in rows)
        what = "s to the first step" if "minimal" in name else "s"
        print(f"{name:<20} {median(numbers):5.1f} {what} ({numbers[0]:.1f}-{numbers[-1]:.1f})")


def seconds_of_python(code):
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - begin


def seconds_to_step(script, folder, options):
    begin, out = time.perf_counter(), tempfile.mkdtemp(dir=folder)
    command = [sys.executable, f"{ROOT}/{script}_minimal.py", "--out", out, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, lines = out + "/metrics.jsonl", ""
    while process.poll() is None and '"step": 1' not in lines:
        time.sleep(0.01)
        if os.path.exists(path):
            with open(path) as f:
                lines = f.read()
    seconds = time.perf_counter() - begin
    process.kill()
    process.wait()
    return seconds


# --------------------------------------------------------------------------------------------------
# loading


def part_loading(args):
    """Rows of 1.3 KB as Math-Shepherd's, 30 a question; steps hardly recur. On one process and on
    two; with a tokenizer out of the folder that TOKENIZERS_DIR names, else with bytes."""
    folder, tokenizer = os.environ.get("TOKENIZERS_DIR", ""), ""
    if os.path.isdir(folder):
        names = sorted(os.listdir(folder))
        tokenizer = os.path.join(folder, "qwen3" if "qwen3" in names else names[0])
    print(f"tokenizer: {os.path.basename(tokenizer) or 'bytes'}")
    for count in (200, 400) if args.quick else (10_000, 40_000):
        with tempfile.TemporaryDirectory() as place:
            path = os.path.join(place, "rows.jsonl")
            write_shepherd(path, count)
            for world in (1, 2):
                found = measure_loading(path, tokenizer, world)
                seconds = max(one["seconds"] for one in found)
                cpu = sum(one["cpu"] for one in found)
                kib = max(one["kib"] for one in found) / count
                print(
                    f"  {count} rows, {world} processes: {count / seconds:.0f} rows a second, "
                    f"{count / cpu:.0f} a CPU second; {kib:.2f} KiB a row in each",
                    flush=True,
                )


def write_shepherd(path, count):
    words = "she buys sells of and then eggs apples for each day in the week so that makes".split()
    rng = np.random.default_rng(0)
    with open(path, "w") as f:
        for i in range(count):
            question, steps = f"{i % -(-count // 30)} " + "how many apples does she buy " * 5, []
            for k in range(1, 7):
                a, b = rng.integers(10, 1000, 2).tolist()
                text = " ".join(rng.choice(words, 8))
                steps.append(f"Step {k}: {text}, {a} * {b} = <<{a}*{b}={a * b}>>{a * b}")
            row = {}
            for key, mark in ("input", "ки"), ("label", "+"):
                row[key] = question + "? " + "\n".join(f"{step} {mark}" for step in steps)
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure_loading(path, tokenizer, world):
    """Load a file in processes of their own -> what `load_once` found in each."""
    code = f"import sys; sys.path[:0] = [{ROOT!r}, {os.path.dirname(__file__)!r}]\nimport bench\n"
    command = [sys.executable, "-c", f"{code}bench.load_once({path!r}, {tokenizer!r})"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    meeting |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        env = os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=env, **pipes))
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def load_once(path, name):
    """Print the seconds, CPU seconds and KiB that loading takes in this process."""
    procs = join_processes()
    tokenizer = load_tokenizer(name) if name else data.byte_tokenizer()
    cfg = tdrm.Config(data=(path,))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    procs.barrier()
    begin, cpu, kib = time.perf_counter(), time.process_time(), usage.ru_maxrss
    tdrm.load_data(cfg, None, tokenizer, procs)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kib
    print(json.dumps({"seconds": seconds, "cpu": cpu, "kib": kib}))
    if procs.world > 1:
        torch.distributed.destroy_process_group()


PARTS = {
    "tdrm": (part_tdrm, "steps of tdrm_minimal.py against the published algorithm and TRL"),
    "search": (part_search, "beam search against one call per prefix; sample() against generate"),
    "rl": (part_rl, "a step of rl_minimal.py against TRL's GRPOTrainer, sampling and update"),
    "gpu": (
        part_gpu,
        "TDRM and RL steps of a 7B shape on one GPU (without one: small, on the CPU)",
    ),
    "loading": (part_loading, "rows a second from a Math-Shepherd file to Examples, KiB a row"),
    "startup": (part_startup, "seconds from the command to the first training step"),
}


def main():
    parser = argparse.ArgumentParser(description="Speed, measured side by side.")
    parser.add_argument("part", nargs="?", choices=PARTS, help="none: list them")
    parser.add_argument("--repeats", type=int, default=5, help="pairs to measure (default: 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    args = parser.parse_args()
    if args.part:
        return PARTS[args.part][0](args)
    for name, (_, what) in PARTS.items():
        print(f"python study/bench.py {name:<7} {what}")


if __name__ == "__main__":
    main()
