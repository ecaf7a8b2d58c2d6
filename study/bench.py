"""Speed, measured side by side. `python study/bench.py` lists the parts; `... PART` runs one on the
built-in model and task; with --real on SmolLM2-135M-Instruct (the folder that SMOLLM2_DIR names)
and GSM8K (GSM8K_DIR); in fp32 or with --dtype bfloat16.

Two sides run in turn, A B A B ..., because a machine drifts by ten percent within minutes; the
ratio is taken within each pair: median (smallest to largest). A ratio far from what counting
tokens predicts wants an explanation. Close other programs first: a thread that has to wait for its
core holds up all the others.

tdrm: trajectories a second in the loop of tdrm_minimal.main against
  - the published algorithm: each transition (s_t, s_t+1) is a row of its own and all rows are
    shuffled. A row takes a forward with gradient over s_t and one without over s_t+1 (a last
    state is spared that), in padded micro-batches of 16, as many rows to an optimizer step as our
    batch has states;
  - TRL's PRMTrainer, if a trl that has it (up to 1.13) is installed: same tokens, batch size and
    AdamW, no checkpointing, saving, logging or evaluation; timed between two optimizer steps, so
    without its setup. It takes rows in random order, we batch rows of like length: "in random
    order" leaves out what that wins.
  Workloads: toy, the built-in policy and task; long, 60 + 16 x 24 tokens, 4 layers of 256, random
  weights. Real: the solutions that four models wrote to GSM8K's questions, a line a step.
search: problems a second of tree_search against published call structure (a `generate` per kept
  prefix, a reward-model forward over the whole prefix per candidate), same settings.
sample: responses a second of sample() against `generate`; built-in, also on responses of very
  different lengths, where padding is what dropping rows saves: of a policy that answers short and
  long questions, and random texts, of which no two agree for long: in the built-in policy, where
  the calls of many small operations take the time, and in one where arithmetic does.
rl: a GRPO step on verifiable rewards, sampling and update, against TRL's GRPOTrainer if installed;
  scoring by a reward model as large as the policy, ours alone.
gpu: TDRM and RL steps of a random 7B shape, also against parts/estimate.py.
loading: rows a second, and memory a row, from a Math-Shepherd file to Examples.

"of peak": the work a step cannot do without over what the same threads reach in a large matrix
product of the same type. To train on T tokens takes 6 x (weights in linear layers) x T + 6 x layers
x hidden x T^2 (half of the attention matrix; left out in sample, search and rl), a third of it
without gradients. A prompt counts once for all its samples, and only what is written passes the
vocabulary.
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import itertools
import json
import os
import random
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
from parts.decoding import StepEnd, sample  # noqa: E402
from parts.formats import read_problems, split_steps  # noqa: E402
from parts.models import Layout, encode_prompt, end_ids, load_policy  # noqa: E402
from parts.models import load_tokenizer, save_model  # noqa: E402
from parts.rewards import RewardModel, load_reward_model, new_reward_model  # noqa: E402
from parts.runs import Processes, join_processes  # noqa: E402
from parts.training import DTYPES, Policy, accumulate_gradients  # noqa: E402
from parts.training import optimizer_step, prepare  # noqa: E402
import transformers  # noqa: E402  (after ours, which quieten it)

ALONE = Processes()  # one process, on the CPU


def compare(title, expected, ours, other, pairs, at_peak=None):
    """Call two functions that return a speed in turn and print what came out -> our median.
    `at_peak`: seconds that one of what they count would take at the speed of a matrix product."""
    speeds = [(ours(), other()) for _ in range(pairs)]
    a, b = map(median, zip(*speeds))
    ratios = [x / y for x, y in speeds]
    predicted = f"predicted {expected:5.2f}x, " if expected else ""
    spread = f"({min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs)"
    measured = f"measured {median(ratios):5.2f}x {spread}: {a:.4g} against {b:.4g} a second"
    share = f"; {a * at_peak:.0%} and {b * at_peak:.0%} of peak" if at_peak else ""
    print(f"  {title:<28} {predicted}{measured}{share}", flush=True)
    return a


def matrix_peak(n, device="cpu", dtype=torch.float32):
    """FLOP/s of a product of two n x n matrices, the best of ten."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds_of(lambda: a @ a) for _ in range(10))


def peak_of(args):
    peak = matrix_peak(256 if args.quick else 2048, dtype=args.dtype)
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{args.part}: {args.dtype}, matrix products reach {peak / 1e9:.0f} GFLOP/s; {threads}")
    return peak


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


def forward_flops(model, tokens, written=None):
    """Of a language model that reads `tokens`, `written` of them through the vocabulary; of a
    reward model."""
    head = model.get_output_embeddings()
    flops = 2 * linear_weights(model) * tokens
    return flops if head is None else flops - 2 * head.weight.numel() * (tokens - written)


class Stopwatch:
    """A function that adds up the seconds it takes."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **options):
        start = time.perf_counter()
        result = self.function(*args, **options)
        self.seconds += time.perf_counter() - start
        return result


def setting(args):
    """-> folder of a policy, problems, how it is asked."""
    if not args.real:
        return sft.builtin_policy("builtin", ALONE), data.make_problems(320, "test"), Layout()
    problems = list(read_problems([os.path.join(os.environ["GSM8K_DIR"], "test.jsonl")]))
    layout = Layout("{question} Put the answer in \\boxed{}.", steps="line")
    return os.environ["SMOLLM2_DIR"], problems, layout


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
    """Examples; folders of a policy and of a reward model that all sides start from."""

    def __init__(self, folder, policy, examples, sizes, dtype):
        self.policy, self.reward, self.folder = policy, folder + "/reward", folder
        self.tokenizer, self.examples, self.dtype = load_tokenizer(policy), examples, dtype
        self.batch_size, self.steps, self.published_steps = sizes  # steps in one measurement
        self.micro = min(16, 2 * self.batch_size)  # rows in one forward of the published algorithm
        self.cfg = tdrm.Config(n_step=1, batch_size=self.batch_size)
        self.lengths = np.array([len(e) for e in examples])
        new_reward_model(policy, self.tokenizer, dtype).save(self.reward)

    def learner(self, head="Token", compiled=False):
        load = getattr(transformers, f"AutoModelFor{head}Classification").from_pretrained
        model = load(self.reward, num_labels=1, dtype=self.dtype)
        return prepare(
            RewardModel(model, self.tokenizer), replace(self.cfg, compile=compiled), ALONE
        )


def toy(folder, args):
    tokenizer = data.builtin_tokenizer()
    problems = data.make_problems(50 if args.quick else 1600)
    rows = data.make_trajectories(problems, 4, label_rollouts=4)

    def encode(prompt, steps):
        return data.encode_trajectory(tokenizer, prompt, steps)

    examples, _ = data.encode_rows(rows, encode, 2048)
    save_model(folder + "/policy", sft.new_policy(tokenizer, 0), tokenizer)
    sizes = (8, 2, 1) if args.quick else (64, 20, 2)
    return Work(folder, folder + "/policy", examples, sizes, args.dtype)


def long(folder, args):
    hidden, steps, count = (64, 4, 8) if args.quick else (256, 16, 128)
    ids = torch.randint(5, 512, (count, 60 + 24 * steps)).tolist()
    labels, examples = torch.randint(2, (count, steps)).tolist(), []
    ends = list(range(60 + 23, 60 + 24 * steps, 24))
    for row, mine in zip(ids, labels):
        examples.append(data.Example("", [], row, 60, ends, mine, correct=bool(mine[-1])))
    save_model(folder + "/policy", wide_policy(512, hidden), data.builtin_tokenizer())
    sizes = (2, 1, 1) if args.quick else (8, 4, 1)
    return Work(folder, folder + "/policy", examples, sizes, args.dtype)


def real(folder, args):
    """Solutions of at most 256 tokens that four models wrote to GSM8K's questions, in random order.
    They have no step labels; here all steps are as right as the answer."""
    policy, _, layout = setting(args)
    with open(os.path.join(os.environ["GSM8K_DIR"], "example_model_solutions.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    tokenizer, examples = load_tokenizer(policy), []
    solved = [(r["question"], s) for r in rows for s in r.values() if isinstance(s, dict)]
    random.Random(0).shuffle(solved)
    for question, found in solved[: 16 if args.quick else 1000]:
        steps, right = split_steps(found["solution"], layout.step_end), found["is_correct"]
        spelled = data.encode_trajectory(tokenizer, question, steps, layout=layout)
        labels = [float(right)] * len(steps)
        if steps and len(spelled[0]) <= 256:
            examples.append(data.Example(question, steps, *spelled, labels, right))
    return Work(folder, policy, examples, (2, 1, 1) if args.quick else (8, 2, 1), args.dtype)


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
        logits = learner.module.model(**batch, use_cache=False).logits  # (rows, 1)
        return logits.float().squeeze(-1)

    now, following, rewards, targets = (list(column) for column in zip(*rows))
    targets, going_on = torch.tensor(targets), torch.tensor([ids is not None for ids in following])
    if going_on.any():
        with torch.no_grad():
            values = logits_of([ids for ids in following if ids is not None]).sigmoid()
        backed_up = torch.tensor(rewards)[going_on] + work.cfg.gamma * values
        targets[going_on] = backed_up.clamp(0, 1)
    return tdrm.value_loss(logits_of(now), targets, 1.0, states)


def published(work, rows):
    per_trajectory = len(rows) / len(work.examples)
    accumulate = max(1, round(work.batch_size * per_trajectory / work.micro))
    learner, order = work.learner("Sequence"), shuffled(len(rows), work.micro)

    def run():
        start = time.perf_counter()
        for _ in range(work.published_steps):
            for micro in itertools.islice(order, accumulate):
                batch = [rows[i] for i in micro]
                published_loss(work, learner, batch, accumulate * work.micro).backward()
            optimizer_step(learner, 1e-5, 1.0)
        trajectories = work.published_steps * accumulate * work.micro / per_trajectory
        return trajectories / (time.perf_counter() - start)

    return run


def trl_side(work, trl, warmup=2):
    from datasets import Dataset  # comes with trl

    labels = [np.full(len(e), -100) for e in work.examples]
    for row, e in zip(labels, work.examples):
        row[e.step_ends] = e.labels
    rows = {"input_ids": [e.input_ids for e in work.examples], "labels": labels}
    rows, load = Dataset.from_dict(rows), transformers.AutoModelForTokenClassification
    model = load.from_pretrained(work.policy, num_labels=2, dtype=work.dtype)
    size = {"per_device_train_batch_size": work.batch_size, "max_steps": warmup + work.steps}
    adamw = {"learning_rate": 1e-5, "weight_decay": 1e-3, "adam_beta2": 0.98}
    args = trl.PRMConfig(work.folder, max_length=None, **size, **adamw, **TRL)

    def run():
        clock = Clock()
        given = (model, args, None, rows, None, work.tokenizer)
        trainer = trl.PRMTrainer(*given, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        assert not model.is_gradient_checkpointing and model.dtype == work.dtype
        (begin, _), (end, _) = clock.times[warmup], clock.times[args.max_steps]
        return work.steps * work.batch_size / (end - begin)

    return run


def part_tdrm(args):
    """Training steps against the published algorithm and TRL."""
    trl, version = None, "trl (<= 1.13) with PRMTrainer not installed: skipped"
    for place in "trl", "trl.experimental.prm":  # where it was, where it is
        with contextlib.suppress(ImportError):
            if hasattr(module := importlib.import_module(place), "PRMTrainer"):
                trl, version = module, f"trl {sys.modules['trl'].__version__}"
    peak = peak_of(args)
    print(f"  {'our layers compiled; ' if args.compile else ''}{version}")
    for make in (real,) if args.real else (toy, long):
        with tempfile.TemporaryDirectory() as folder:
            measure_tdrm(make(folder, args), make.__name__, trl, peak, args)


def measure_tdrm(work, name, trl, peak, args):
    lengths, size, rows = work.lengths, work.batch_size, transitions(work, work.examples)
    steps = len(rows) / len(lengths)
    model = new_reward_model(work.policy, work.tokenizer, work.dtype).model
    print(
        f"{name}: {model.num_parameters():,} parameters, batch {size}, {steps:.1f} steps, "
        f"{lengths.mean():.1f} tokens each; our gradient is the published one to "
        f"{largest_difference(work):.0e}"
    )
    sorted_tokens = padded(lengths, data.batches(lengths, size))
    random_tokens = padded(lengths, shuffled(len(lengths), size))
    first, second = ([0 if row[i] is None else len(row[i]) for row in rows] for i in (0, 1))
    first, second = (padded(column, shuffled(len(rows), work.micro)) for column in (first, second))
    theirs = 3 * first * steps + second * (steps - 1)  # a forward is 1, a backward 2
    attention = model.config.num_hidden_layers * model.config.hidden_size * lengths
    at_peak = (6 * (linear_weights(model) + attention) * lengths).mean() / peak
    run = ours(work, data.batches(lengths, size), args.compile)
    other, expected = published(work, rows), theirs / (3 * sorted_tokens)
    compare("ours / published", expected, run, other, args.repeats, at_peak)
    if not trl:
        return
    other, expected = trl_side(work, trl), random_tokens / sorted_tokens
    compare("ours / TRL", expected, run, other, args.repeats, at_peak)
    if len(set(lengths)) > 1 and not args.real:
        unsorted = ours(work, shuffled(len(lengths), size), args.compile)
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


def naive_beam_search(model, prm, tokenizer, layout, problem, sizes, max_depth=12):
    """Beam search as published code calls it: one `generate` per kept prefix, one reward-model
    forward over the whole prefix per candidate, one problem at a time."""
    eos, pad = end_ids(tokenizer, model.generation_config), tokenizer.pad_token_id
    texts = StepEnd(tokenizer, "cpu", model.config.vocab_size, layout.step_end)
    closing = eos + texts.blank.nonzero()[:, 0].tolist()
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": closing}
    options |= {"max_new_tokens": sizes["max_step_tokens"], "pad_token_id": pad}
    prompt = encode_prompt(tokenizer, layout.ask(problem["question"]))
    frontier, finished, keep = [prompt], [], sizes["keep"]
    longest = len(prompt) + sizes["max_new_tokens"]
    for depth in range(max_depth):
        candidates, count = [], sizes["expand"] if depth else keep * sizes["expand"]
        for prefix in frontier:
            ids = model.generate(torch.tensor([prefix]), num_return_sequences=count, **options)
            for row in ids.tolist():
                new = row[len(prefix) :]
                ends = [i + 1 for i, token in enumerate(new) if token in closing]
                row = prefix + new[: ends[0] if ends else None]  # the rest is padding
                if row not in candidates:
                    candidates.append(row)
        scored = list(finished)
        for row in candidates:
            prefix = row[:-1] if row[-1] in eos else row
            scored.append((prm(torch.tensor([prefix])).logits[0, -1, 0].item(), row))
        kept = sorted(scored, key=lambda pair: -pair[0])[:keep]
        over = [row[-1] in eos or len(row) >= longest for _, row in kept]
        finished = [pair for pair, is_over in zip(kept, over) if is_over]
        frontier = [row for (_, row), is_over in zip(kept, over) if not is_over]
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
    """Beam search against the published call structure, sampling and scoring."""
    peak, (folder, problems, layout) = peak_of(args), setting(args)
    tokenizer, model = load_tokenizer(folder), load_policy(folder, args.dtype)
    sizes = {"keep": 4, "expand": 4, "max_step_tokens": 64, "max_new_tokens": 256}
    count = 4 if args.quick else 32
    if args.real:
        prm = new_reward_model(folder, tokenizer, args.dtype, layout=layout).eval()
        sizes |= {"expand": 2, "max_step_tokens": 24, "max_new_tokens": 8 if args.quick else 72}
        count = 1 if args.quick else 2
    else:
        prm = load_reward_model(tdrm.builtin_reward_model(None, ALONE), args.dtype)
    problems, right, seconds, flops = problems[:count], {}, {"ours": [], "published": []}, []
    questions, more = [p["question"] for p in problems], {"layout": layout} | sizes

    def timed(side, sampling, answer):
        sampling.seconds, start = 0.0, time.perf_counter()
        texts = answer()
        total = time.perf_counter() - start
        seconds[side].append((sampling.seconds, total - sampling.seconds))
        right[side] = sum(data.verify(t, p["answer"]) for t, p in zip(texts, problems))
        return count / total

    def ours():
        best, read = search.tree_search(model, tokenizer, prm, questions, seed=len(flops), **more)
        written = read["generated"]
        parts = forward_flops(model, written, written), forward_flops(prm.model, read["scored"])
        flops.append(parts)
        return [tokenizer.decode(beam.token_ids, skip_special_tokens=True) for beam in best]

    @torch.no_grad()
    def published():
        return [naive_beam_search(model, prm, tokenizer, layout, p, sizes) for p in problems]

    print(f"  problems a second, beam {sizes['keep']} x expand {sizes['expand']}, {count} at once")
    search.decode, model.generate = Stopwatch(search.decode), Stopwatch(model.generate)
    sides = (lambda: timed("ours", search.decode, ours),)
    sides += (lambda: timed("published", model.generate, published),)
    compare("published calls, one by one", None, *sides, args.repeats)
    print(f"  right answers: ours {right['ours']}, published {right['published']} of {count}")
    for side, parts in seconds.items():
        print_split(side, ("sampling", "scoring"), parts, np.mean(flops, axis=0), peak)


def print_split(side, names, seconds, flops, peak):
    """Of each phase the median seconds and the share of peak that the work needed makes of them."""
    parts = []
    for name, taken, needed in zip(names, np.median(seconds, axis=0), flops):
        parts.append(f"{name} {taken:.3f} s ({needed / taken / peak:.0%} of peak)")
    print(f"  {side:<9} {', '.join(parts)}")


def part_sample(args):
    """sample() against transformers' `generate`."""
    peak, (folder, problems, layout) = peak_of(args), setting(args)
    tokenizer, model = load_tokenizer(folder), load_policy(folder, args.dtype)
    asked = [layout.ask(p["question"]) for p in problems]
    print("  responses a second; predicted: tokens through the model")
    if args.real:
        for sizes in ((2, 2, 4),) if args.quick else ((4, 4, 48), (4, 16, 48)):
            title = "SmolLM2, {} x {} x {}".format(*sizes)
            measure_sampling(title, model, tokenizer, asked, sizes, peak, args)
        return
    asked, policies = asked[:16], [("random texts", copy.deepcopy(model))]
    measure_sampling("built-in policy", model, tokenizer, asked, (16, 8, 64), peak, args)
    if not args.quick:  # short and long responses of a policy that means them
        both = load_policy(both_levels(folder), args.dtype)
        wide = widened(both, 8192)
        for counts in (8, 8), (12, 4):
            mixed = []
            for n, level in zip(counts, data.LEVELS):
                mixed += [p["question"] for p in data.make_problems(n, "test", level=level)]
            title, sizes = f"{counts[0]} short, {counts[1]} long", (16, 8, 128)
            measure_sampling(title, both, tokenizer, mixed, sizes, peak, args)
            title += ", 3M parameters"
            measure_sampling(title, wide, tokenizer, mixed, sizes, peak, args)
    wide = wide_policy(len(tokenizer), 64 if args.quick else 256).to(args.dtype)
    for title, policy in *policies, ("random texts, 4M", wide):
        with torch.no_grad():  # every token as likely as the end: lengths from 1 to over 100
            policy.eval().lm_head.weight.zero_()
        for longest in (32, 64, 160):
            name, sizes = f"{title}, {longest} at most", (16, 8, longest)
            measure_sampling(name, policy, tokenizer, asked, sizes, peak, args)


def measure_sampling(title, policy, tokenizer, asked, sizes, peak, args):
    """`sizes`: prompts, samples of each, the most tokens."""
    (count, n, longest), lengths = sizes, []
    prompts = [encode_prompt(tokenizer, q) for q in asked[:count]]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
    options |= {"num_return_sequences": n, "max_new_tokens": longest}
    options["pad_token_id"] = tokenizer.pad_token_id

    def library():
        ids = {"input_ids": prompts}
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
        return count * n / seconds_of(lambda: policy.generate(**batch, **options))

    def mine():
        start, options = time.perf_counter(), {"max_new_tokens": longest, "seed": len(lengths)}
        samples = sample(policy, tokenizer, prompts, n, **options)
        seconds = time.perf_counter() - start
        lengths.append([len(s.token_ids) for row in samples for s in row])
        return count * n / seconds

    mine(), library()
    written, most = np.sum(lengths), sum(max(row) for row in lengths) * count * n
    read = sum(map(len, prompts)) * len(lengths)
    padding = max(map(len, prompts)) * count * n * len(lengths)
    expected = (padding + most) / (read + written)
    at_peak = forward_flops(policy, read + written, written) / peak / len(lengths) / count / n
    speed = compare(title, expected, mine, library, args.repeats, at_peak)
    print(f"  padded / real response tokens: {most / written:.2f}")
    if args.real:
        linear = longest * linear_seconds(policy, count * n)
        what = f"the linear layers alone, {longest} times on {count * n} rows"
        print(f"  ours {count * n / speed:.2f} s; {what}, {linear:.2f} s")


@torch.no_grad()
def linear_seconds(model, rows):
    """Of the linear layers alone on so many tokens: what no way to decode is spared."""
    layers, dtype = [m for m in model.modules() if isinstance(m, torch.nn.Linear)], model.dtype
    inputs = [torch.randn(rows, layer.in_features, dtype=dtype) for layer in layers]
    return min(seconds_of(lambda: [f(x) for f, x in zip(layers, inputs)]) for _ in range(10))


# --------------------------------------------------------------------------------------------------
# rl


class RLSide:
    """Our GRPO steps on verifiable rewards; how long sampling and update took, and on how much."""

    def __init__(self, args):
        folder, self.problems, layout = setting(args)
        prompts, group, longest, self.steps = (16, 8, 64, 8) if not args.real else (4, 4, 48, 1)
        if args.quick:
            prompts, group, longest, self.steps = 2, 2, 8, 1
        sizes = {"prompts_per_step": prompts, "group_size": group, "max_new_tokens": longest}
        self.cfg = rl.Config(lr=1e-9, compile=args.compile, **sizes)
        module = Policy(load_policy(folder, args.dtype), load_tokenizer(folder), layout)
        self.learner, self.model = prepare(module, self.cfg, ALONE), module.model
        self.seconds, self.flops, self.count = [], [], itertools.count()

    def run(self):
        """-> steps a second."""
        sampling, update, prompts = 0.0, 0.0, self.cfg.prompts_per_step
        for step in itertools.islice(self.count, self.steps):
            start, first = time.perf_counter(), step * prompts % (len(self.problems) - prompts)
            asked = self.problems[first : first + prompts]
            self.rollouts = rl.roll_out(self.learner.module, asked, first, self.cfg, ALONE)
            middle, correct = time.perf_counter(), [r.correct for r in self.rollouts]
            advantages = rl.group_advantages(torch.tensor(correct), self.cfg.group_size).tolist()
            learn(self.learner, self.rollouts, advantages, self.cfg, ALONE)
            sampling += middle - start
            update += time.perf_counter() - middle
            self.flops.append(self.needed())
        self.seconds.append((sampling / self.steps, update / self.steps))
        return self.steps / (sampling + update)

    def needed(self):
        """FLOPs of sampling and of the update: a prompt is one for all its samples."""
        written = sum(len(r.old_logprobs) for r in self.rollouts)
        read = sum(r.prompt_length for r in self.rollouts[:: self.cfg.group_size])
        forward = forward_flops(self.model, read + written, written)
        return forward, 3 * forward


def learn(learner, rollouts, advantages, cfg, procs):
    """An update -> tokens written, tokens in all, largest |ratio - 1|."""
    for r, advantage in zip(rollouts, advantages):
        r.advantages = np.full(len(r.old_logprobs), advantage, dtype=np.float32)
    found = rl.update_policy(learner, rollouts, 0, cfg, procs)
    written = sum(len(r.old_logprobs) for r in rollouts)
    return written, sum(map(len, rollouts)), found["max_ratio_deviation"]


def part_rl(args):
    """A GRPO step on verifiable rewards against TRL's; scoring by a reward model, ours alone."""
    peak, mine = peak_of(args), RLSide(args)
    mine.run()
    trl = importlib.import_module("trl") if importlib.util.find_spec("trl") else None
    version = f"trl {trl.__version__}" if trl else "trl not installed: ours alone"
    cfg, sides = mine.cfg, {"ours": mine.seconds}
    size = f"{cfg.prompts_per_step} prompts x {cfg.group_size} samples x {cfg.max_new_tokens}"
    print(f"  steps a second, {size} tokens at most; {version}")
    if trl:
        with tempfile.TemporaryDirectory() as place:
            other = TRLSide(trl, place, mine)
            sides["TRL"] = other.seconds
            compare("ours / TRL GRPOTrainer", None, mine.run, other.run, args.repeats)
    else:
        speed = median(mine.run() for _ in range(args.repeats))
        print(f"  ours: {speed:.3g} steps a second")
    for side, parts in sides.items():
        print_split(side, ("sampling", "update"), parts, np.mean(mine.flops, axis=0), peak)
    module = mine.learner.module
    prm = new_reward_model(module.model.name_or_path, module.tokenizer, args.dtype)
    examples = rl.encode_for(prm, mine.rollouts)
    seconds = [[seconds_of(lambda: prm.score_steps(examples, ALONE))] for _ in range(3)]
    flops = forward_flops(prm.model, sum(map(len, examples)))
    print_split("ours", ("scoring by a reward model as large",), seconds, [flops], peak)


class TRLSide:
    """The same steps in TRL's GRPOTrainer."""

    def __init__(self, trl, place, mine, warmup=1):
        from datasets import Dataset  # comes with trl

        folder, self.trl, self.warmup = mine.model.name_or_path, trl, warmup
        self.model, self.tokenizer = load_policy(folder, mine.model.dtype), load_tokenizer(folder)
        self.model.generate, self.seconds = Stopwatch(self.model.generate), []
        rows, cfg, layout = [], mine.cfg, mine.learner.module.layout
        for p in mine.problems:
            message = {"role": "user", "content": layout.ask(p["question"])}
            rows.append({"prompt": [message], "answer": p["answer"]})
        self.rows, self.steps, batch = Dataset.from_list(rows), mine.steps, len(mine.rollouts)
        size = {"per_device_train_batch_size": batch, "num_generations": cfg.group_size}
        size |= {"max_completion_length": cfg.max_new_tokens, "max_steps": warmup + mine.steps}
        same = {"learning_rate": 1e-9, "beta": 0.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        self.args = trl.GRPOConfig(place, **size, **same, **TRL)

    def reward(self, completions, answer, **_):
        return [float(data.verify(c[0]["content"], a)) for c, a in zip(completions, answer)]

    def run(self):
        clock = Clock(lambda: self.model.generate.seconds)
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
    for count in (200,) if args.quick else (10_000, 40_000):
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
    "search": (part_search, "beam search against one call per prefix"),
    "sample": (part_sample, "sample() against transformers' generate"),
    "rl": (part_rl, "a step of rl_minimal.py against TRL's GRPOTrainer, sampling and update"),
    "gpu": (part_gpu, "TDRM and RL steps of a 7B shape on one GPU (without one: a small one)"),
    "loading": (part_loading, "rows a second from a Math-Shepherd file to Examples, KiB a row"),
    "startup": (part_startup, "seconds from the command to the first training step"),
}


def main():
    parser = argparse.ArgumentParser(description="Speed, measured side by side.")
    parser.add_argument("part", nargs="?", choices=PARTS, help="none: list them")
    parser.add_argument("--repeats", type=int, default=5, help="pairs to measure (default: 5)")
    parser.add_argument("--real", action="store_true", help="SmolLM2 on GSM8K (tdrm to rl)")
    parser.add_argument("--dtype", choices=DTYPES[1:], default="float32", help="weights")
    parser.add_argument("--compile", action="store_true", help="our layers, in tdrm and rl")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    if args.real and not {"SMOLLM2_DIR", "GSM8K_DIR"} <= os.environ.keys():
        parser.error("--real: SMOLLM2_DIR and GSM8K_DIR name the folders of the model and of GSM8K")
    if args.part:
        return PARTS[args.part][0](args)
    for name, (_, what) in PARTS.items():
        print(f"python study/bench.py {name:<7} {what}")


if __name__ == "__main__":
    main()
