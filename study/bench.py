"""Speed, measured side by side. `python tests/bench.py` lists the parts; `... PART` runs one.

Two sides run in turn, A B A B ..., because a machine drifts by ten percent within minutes; the ratio is taken
within each pair: median (smallest to largest). A ratio far from what counting tokens predicts wants an
explanation. Close other programs first: a thread that has to wait for its core holds up all the others.

tdrm: trajectories a second in the loop of tdrm_minimal.main, fp32 on the CPU, random weights, against
  - the published algorithm: each transition (s_t, s_t+1) is a row of its own and all rows are shuffled. A row
    takes a forward with gradient over s_t and one without over s_t+1 (a last state is spared that), in padded
    micro-batches of 16, as many rows to an optimizer step as our batch has states;
  - TRL's PRMTrainer, if a trl that has it (up to 1.13) is installed: same tokens, batch size and AdamW, no
    checkpointing, saving, logging or evaluation; timed between two optimizer steps, so without its setup. It
    takes rows in random order, we batch rows of like length: "in random order" leaves out what that wins.
Workloads: toy, the built-in policy and task; long, 60 + 16 x 24 tokens, hidden size 256, four layers.
search: problems a second of tree_search against published call structure (a `generate` per kept prefix, a
reward-model forward over the whole prefix per candidate), same settings; responses a second of sample() against
`generate`, also on responses of very different lengths, where padding is what dropping rows saves: of a policy that
answers short and long questions, and random texts, of which no two agree for long: in the built-in policy, where the
calls of many small operations take the time, and in one where arithmetic does.
"of peak": the work a step cannot do without over what the same threads reach in a large matrix product. For T
tokens that is 6 x (weights in linear layers) x T + 6 x layers x hidden x T^2 (half of the attention matrix).
"""

import argparse
import contextlib
import copy
import importlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
import timeit
import warnings
from dataclasses import replace
from statistics import median

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
warnings.simplefilter("ignore", FutureWarning)  # of options that TRL and transformers will rename
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn.functional as F

import data
import rl_minimal as rl
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
import transformers  # after ours, which quieten it

ENV = sft.Env()  # one process, on the CPU
MICRO = 16  # rows in one forward of the published algorithm


def compare(title, expected, ours, other, pairs):
    """Call two functions that return a speed in turn and print what came out -> the median of ours."""
    speeds = [(ours(), other()) for _ in range(pairs)]
    (a, b), ratios = map(median, zip(*speeds)), [x / y for x, y in speeds]
    predicted = f"predicted {expected:5.2f}x, " if expected else ""
    print(
        f"  {title:<28} {predicted}measured {median(ratios):5.2f}x ({min(ratios):.2f} to "
        f"{max(ratios):.2f}, {pairs} pairs): {a:.4g} against {b:.4g} a second",
        flush=True,
    )
    return a


class Work:
    """Examples, and folders with a policy and a reward model of random weights that all sides start from."""

    def __init__(self, folder, policy, examples, sizes):
        self.folder, self.policy, self.reward = folder, folder + "/policy", folder + "/reward"
        self.tokenizer, self.examples = data.builtin_tokenizer(), examples
        self.batch_size, self.steps, self.published_steps = sizes  # steps in one measurement
        self.cfg = tdrm.Config(n_step=1, batch_size=self.batch_size)
        self.lengths = np.array([len(e["input_ids"]) for e in examples])
        policy.save_pretrained(self.policy)
        tdrm.load_reward_model(self.policy).save_pretrained(self.reward)

    def model(self, head="Token", compiled=False):
        load = getattr(transformers, f"AutoModelFor{head}Classification").from_pretrained
        return sft.prepare(
            load(self.reward, num_labels=1), replace(self.cfg, compile=compiled), ENV
        )[0]


def toy(folder, quick):
    tokenizer = data.builtin_tokenizer()
    rows = data.make_trajectories(data.make_problems(50 if quick else 1600), 4, label_rollouts=4)
    examples, _ = data.encode_rows(rows, tokenizer, 2048)
    return Work(
        folder, sft.new_policy(tokenizer, seed=0), examples, (8, 2, 1) if quick else (64, 20, 2)
    )


def wide_policy(vocabulary, hidden):
    """Random weights, four layers: wide enough that arithmetic takes the time, not the calls of small operations."""
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def long(folder, quick):
    hidden, steps, count = (64, 4, 8) if quick else (256, 16, 128)
    policy = wide_policy(512, hidden)
    ids, labels = torch.randint(5, 512, (count, 60 + 24 * steps)), torch.randint(2, (count, steps))
    ends = list(range(60 + 23, 60 + 24 * steps, 24))
    examples = [
        {"input_ids": i, "prompt_length": 60, "step_ends": ends, "labels": row, "correct": row[-1]}
        for i, row in zip(ids.tolist(), labels.tolist())
    ]
    return Work(folder, policy, examples, (2, 1, 1) if quick else (8, 4, 1))


def shuffled(count, size):
    """Index lists in random order, without end: data.batches without the sorting by length."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(count)
        yield from (order[i : i + size].tolist() for i in range(0, count - count % size, size))


def padded(lengths, order, count=200):
    """Tokens a row with padding, on average over the first `count` batches of an order."""
    batches = [[lengths[i] for i in batch] for batch in itertools.islice(order, count)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(map(len, batches))


# Three sides. Each returns a function that trains for a while -> trajectories a second.


def our_loss(work, model, examples, states):
    batch = data.collate(examples, work.tokenizer.pad_token_id)
    logits = tdrm.step_values(model, batch["input_ids"], None, batch["step_ends"])
    targets, weights = tdrm.targets_and_weights(work.cfg, logits, batch, labelled=True)
    return (
        F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights
    ).sum() / states


def ours(work, order, compiled=False):
    model = work.model(compiled=compiled)
    optimizer = sft.make_optimizer(model, work.cfg, ENV)

    def run(steps=work.steps):
        start = time.perf_counter()
        for _ in range(steps):
            batch = [work.examples[i] for i in next(order)]
            states = sum(len(e["step_ends"]) for e in batch)
            sft.accumulate_gradients(
                model,
                sft.local_rows(batch, ENV),
                0,
                lambda micro: our_loss(work, model, micro, states),
                ENV,
            )
            sft.optimizer_step(model, optimizer, 1e-5, 1.0)
        return steps * work.batch_size / (time.perf_counter() - start)

    run(6 if compiled else 2)  # the first steps allocate and compile
    return run


def transitions(work, examples):
    """Rows (ids of s_t, ids of s_t+1, reward, outcome); no s_t+1, None, where s_t is a last state."""
    rows = []
    for e in examples:
        labels = torch.tensor([e["labels"]])
        rewards = tdrm.shaped_rewards(labels, labels >= 0, work.cfg.correct, work.cfg.wrong)[0]
        states = [e["input_ids"][: end + 1] for end in e["step_ends"]] + [None]
        rows += zip(states, states[1:], rewards.tolist(), [float(e["correct"])] * len(rewards))
    return rows


def published_loss(work, model, rows, states):
    def logits_of(prefixes):
        batch = work.tokenizer.pad(
            {"input_ids": prefixes}, padding_side="right", return_tensors="pt"
        )
        return model(**batch, use_cache=False).logits.squeeze(-1)  # (rows,)

    now, following, rewards, targets = (list(column) for column in zip(*rows))
    targets, going_on = torch.tensor(targets), torch.tensor([ids is not None for ids in following])
    if going_on.any():
        with torch.no_grad():
            values = logits_of([ids for ids in following if ids]).sigmoid()
        targets[going_on] = (torch.tensor(rewards)[going_on] + work.cfg.gamma * values).clamp(0, 1)
    return F.binary_cross_entropy_with_logits(logits_of(now), targets, reduction="sum") / states


def published(work, rows):
    per_trajectory = len(rows) / len(work.examples)
    accumulate = max(1, round(work.batch_size * per_trajectory / MICRO))
    model, order = work.model("Sequence"), shuffled(len(rows), MICRO)
    optimizer = sft.make_optimizer(model, work.cfg, ENV)

    def run():
        start = time.perf_counter()
        for _ in range(work.published_steps):
            for micro in itertools.islice(order, accumulate):
                published_loss(work, model, [rows[i] for i in micro], accumulate * MICRO).backward()
            sft.optimizer_step(model, optimizer, 1e-5, 1.0)
        return (
            work.published_steps
            * accumulate
            * MICRO
            / per_trajectory
            / (time.perf_counter() - start)
        )

    return run


def trl_side(work, trl, warmup=2):
    from datasets import Dataset  # comes with trl

    class Clock(transformers.TrainerCallback):
        times = {}

        def on_step_end(self, args, state, control, **_):
            self.times[state.global_step] = time.perf_counter()

    labels = [np.full(len(e["input_ids"]), -100) for e in work.examples]
    for row, e in zip(labels, work.examples):
        row[e["step_ends"]] = e["labels"]
    rows = Dataset.from_dict(
        {"input_ids": [e["input_ids"] for e in work.examples], "labels": labels}
    )
    model = transformers.AutoModelForTokenClassification.from_pretrained(work.policy, num_labels=2)
    args = trl.PRMConfig(
        work.folder,
        per_device_train_batch_size=work.batch_size,
        max_steps=warmup + work.steps,
        max_length=None,
        learning_rate=1e-5,
        weight_decay=1e-3,
        adam_beta2=0.98,
        max_grad_norm=1,
        bf16=False,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    def run():
        trainer = trl.PRMTrainer(model, args, None, rows, None, work.tokenizer, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        assert not model.is_gradient_checkpointing and model.dtype == torch.float32
        return work.steps * work.batch_size / (Clock.times[args.max_steps] - Clock.times[warmup])

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
    steps, order = len(rows) / len(lengths), shuffled(len(lengths), size)
    gradients, few = [], work.examples[:2]  # the two sides are to compute the same thing
    for head, loss, what in ("Token", our_loss, few), (
        "Sequence",
        published_loss,
        transitions(work, few),
    ):
        loss(work, model := work.model(head), what, 1).backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())]))
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    print(
        f"{name}: {model.num_parameters():,} parameters, batch {size}, {steps:.1f} steps, "
        f"{lengths.mean():.1f} tokens each; our gradient is the published one to {difference:.0e}"
    )
    sorted_tokens = padded(lengths, data.batches(lengths, size))
    first, second = (
        padded([len(r[i] or ()) for r in rows], shuffled(len(rows), MICRO)) for i in (0, 1)
    )
    expected = (3 * first * steps + second * (steps - 1)) / (
        3 * sorted_tokens
    )  # forward 1, backward 2
    run, n = ours(work, data.batches(lengths, size)), 256 if args.quick else 2048
    speed = compare("ours / published", expected, run, published(work, rows), args.repeats)
    peak = (
        2
        * n**3
        / min(
            timeit.repeat(
                "a @ a",
                "a = torch.randn(n, n)",
                repeat=8,
                number=1,
                globals={"torch": torch, "n": n},
            )
        )
    )
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = model.config.num_hidden_layers * model.config.hidden_size * lengths
    flops = (6 * (weights + attention) * lengths).mean()
    print(f"  ours is {speed * flops / peak:.0%} of peak, {peak / 1e9:.0f} GFLOP/s")
    if not args.quick:  # compiling takes a while
        fast = ours(work, data.batches(lengths, size), compiled=True)
        compare(
            "with --compile / published", 1.15 * expected, fast, published(work, rows), args.repeats
        )
    if trl:
        other = trl_side(work, trl)
        if not args.quick:
            compare(
                "with --compile / TRL",
                1.1 * padded(lengths, order) / sorted_tokens,
                fast,
                other,
                args.repeats,
            )
        compare("ours / TRL", padded(lengths, order) / sorted_tokens, run, other, args.repeats)
        if len(set(lengths)) > 1:
            compare("ours in random order / TRL", 1, ours(work, order), other, args.repeats)


# ----------------------------------------------------------------------------------------------------
# search


def naive_beam_search(model, prm, tokenizer, problem, keep, expand, max_steps=12):
    """Beam search as published code calls it: one `generate` per kept prefix, one reward-model forward over the whole
    prefix per candidate, one problem at a time. The built-in tokenizer closes a step with one token.
    """
    end_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(data.STEP_END)]
    prompt = data.encode_prompt(tokenizer, problem["question"])
    frontier, finished = [prompt], []
    for depth in range(max_steps):
        candidates = []
        for prefix in frontier:
            ids = model.generate(
                torch.tensor([prefix]),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                eos_token_id=end_ids,
                max_new_tokens=64,
                num_return_sequences=expand if depth else keep * expand,
                pad_token_id=tokenizer.pad_token_id,
            )
            for row in ids.tolist():
                while row[-1] == tokenizer.pad_token_id:
                    row.pop()
                if row not in candidates:
                    candidates.append(row)
        scored = list(finished)
        for row in candidates:
            prefix = row[:-1] if row[-1] == tokenizer.eos_token_id else row
            scored.append((prm(input_ids=torch.tensor([prefix])).logits[0, -1, 0].item(), row))
        kept = sorted(scored, key=lambda pair: -pair[0])[:keep]
        finished = [pair for pair in kept if pair[1][-1] == tokenizer.eos_token_id]
        frontier = [row for _, row in kept if row[-1] != tokenizer.eos_token_id]
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
    """Folder of a policy that answers questions of both built-in levels, in 20 to 90 tokens: the built-in one, trained on
    if it is not there yet."""
    out = os.path.join("runs", "bench-both-levels")
    if not os.path.isdir(os.path.join(out, "model")):
        os.makedirs(out, exist_ok=True)
        path = os.path.join(out, "solutions.jsonl")
        with open(path, "w") as f:
            for level in data.LEVELS:
                for row in data.make_trajectories(
                    data.make_problems(20_000, "train", 0, level), 1, level=level
                ):
                    f.write(
                        json.dumps({key: row[key] for key in ("prompt", "completions", "answer")})
                        + "\n"
                    )
        sft.main(
            sft.Config(model=policy, data=(path,), out=out, eval_problems=100, resume=True), ENV
        )
    return os.path.join(out, "model")


@torch.no_grad()
def part_search(args):
    """Beam search against the published call structure; sample() against `generate`."""
    from transformers import AutoModelForCausalLM

    folder, prm_folder = sft.builtin_policy("builtin", ENV), tdrm.builtin_reward_model(
        "builtin", ENV
    )
    tokenizer = data.load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prm = tdrm.load_reward_model(prm_folder).eval()
    count = 4 if args.quick else 32
    problems = data.make_problems(count, "test")
    questions = [p["question"] for p in problems]
    right = {}

    def ours():
        start = time.perf_counter()
        best, _ = search.tree_search(model, tokenizer, prm, tokenizer, questions, 4, 4)
        seconds = time.perf_counter() - start
        texts = [tokenizer.decode(b.token_ids, skip_special_tokens=True) for b in best]
        right["ours"] = sum(data.verify(t, p["answer"]) for t, p in zip(texts, problems))
        return count / seconds

    def published():
        start = time.perf_counter()
        texts = [naive_beam_search(model, prm, tokenizer, p, 4, 4) for p in problems]
        seconds = time.perf_counter() - start
        right["published"] = sum(data.verify(t, p["answer"]) for t, p in zip(texts, problems))
        return count / seconds

    print(f"search: problems a second, beam 4 x expand 4, {count} problems at once")
    compare("published calls, one by one", None, ours, published, args.repeats)
    print(f"  right answers: ours {right['ours']}, published {right['published']} of {count}")

    def sampling(
        title,
        policy,
        max_new_tokens=64,
        asked=[p["question"] for p in data.make_problems(16, "test")],
    ):
        prompts, tokens = [data.encode_prompt(tokenizer, q) for q in asked], []

        def library():
            padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
            start = time.perf_counter()
            policy.generate(
                **padded,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=8,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            return 128 / (time.perf_counter() - start)

        def mine():
            start = time.perf_counter()
            samples = search.sample(
                policy, tokenizer, prompts, 8, max_new_tokens=max_new_tokens, seed=len(tokens)
            )
            seconds = time.perf_counter() - start
            lengths = [len(s.token_ids) for row in samples for s in row]
            tokens.append(len(lengths) * max(lengths) / sum(lengths))
            return 128 / seconds

        mine(), library()
        compare(
            title, np.mean(tokens), mine, library, args.repeats
        )  # what dropping ended rows could save
        print(f"  padded / real tokens: {np.mean(tokens):.2f}")

    print(
        "sample(): responses a second, 16 prompts x 8, against transformers' generate; predicted: padded / real tokens"
    )
    sampling("built-in policy", model)
    if not args.quick:  # short and long responses of a policy that means them
        with torch.enable_grad():
            both = AutoModelForCausalLM.from_pretrained(both_levels(folder)).eval()
        for short, long in (8, 8), (12, 4):
            asked = [
                p["question"]
                for n, level in zip((short, long), data.LEVELS)
                for p in data.make_problems(n, "test", level=level)
            ]
            for title, policy in ("", both), (", 3M parameters", widened(both, 8192)):
                sampling(f"{short} short, {long} long{title}", policy, 128, asked)
    even, wide = copy.deepcopy(model), wide_policy(len(tokenizer), 64 if args.quick else 256)
    for title, policy in ("random texts", even), ("random texts, 4M parameters", wide):
        policy.eval().lm_head.weight.zero_()  # every token as likely as the end: lengths from 1 to over 100
        for longest in (32, 64, 160):
            sampling(f"{title}, {longest} at most", policy, max_new_tokens=longest)


# ----------------------------------------------------------------------------------------------------
# rl


def part_rl(args):
    """Seconds a GRPO step on verifiable rewards, split into sampling and update, against TRL's GRPOTrainer."""
    from transformers import AutoModelForCausalLM

    folder = sft.builtin_policy("builtin", ENV)
    tokenizer, prompts, group = data.load_tokenizer(folder), 2 if args.quick else 16, 8
    cfg = rl.Config(
        prompts_per_step=prompts,
        group_size=group,
        batch_size=prompts * group,
        max_new_tokens=64,
        lr=1e-9,
        weight_decay=0.0,
    )
    problems, seconds, tokens, steps = (
        data.make_problems(prompts * 20),
        {},
        [],
        1 if args.quick else 8,
    )
    model, policy = sft.prepare(AutoModelForCausalLM.from_pretrained(folder), cfg, ENV, sft.Policy)
    optimizer, count = sft.make_optimizer(model, cfg, ENV), itertools.count()

    def ours():
        begin, sampling = time.perf_counter(), 0.0
        for step in itertools.islice(count, steps):
            start = time.perf_counter()
            first = step * prompts % len(problems)
            rows = rl.rollout(
                model,
                tokenizer,
                problems[first : first + prompts],
                range(step * prompts, (step + 1) * prompts),
                cfg,
                ENV,
            )
            sampling += time.perf_counter() - start
            advantages = rl.group_advantages(
                torch.tensor([row["verifiable"] for row in rows]), group
            )
            for row, advantage in zip(rows, advantages.tolist()):
                row["advantages"] = np.full(len(row["old_logprobs"]), advantage, dtype=np.float32)
            rl.update_policy(policy, model, optimizer, rows, 1e-9, cfg, ENV, tokenizer.pad_token_id)
            tokens.append(
                (
                    sum(len(row["old_logprobs"]) for row in rows),
                    sum(len(row["input_ids"]) for row in rows),
                    sum(len(row["input_ids"]) for row in rl.distinct(rows)),
                )
            )
        total = time.perf_counter() - begin
        seconds.setdefault("ours", []).append((sampling / steps, (total - sampling) / steps))
        return steps / total

    ours()
    trl = importlib.import_module("trl") if importlib.util.find_spec("trl") else None
    version = f"trl {trl.__version__}" if trl else "trl not installed: ours alone"
    print(
        f"rl: steps a second, {prompts} prompts x {group} samples, up to 64 tokens, {torch.get_num_threads()} threads; {version}"
    )
    with tempfile.TemporaryDirectory() as place:
        other = (
            trl_grpo(trl, place, folder, tokenizer, problems, prompts, group, steps, seconds)
            if trl
            else None
        )
        if other:
            compare("ours / TRL GRPOTrainer", None, ours, other, args.repeats)
        else:
            print(f"  ours: {median(ours() for _ in range(args.repeats)):.3g} steps a second")
    n = 256 if args.quick else 2048
    peak = (
        2
        * n**3
        / min(
            timeit.repeat(
                "a @ a",
                "a = torch.randn(n, n)",
                repeat=8,
                number=1,
                globals={"torch": torch, "n": n},
            )
        )
    )
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    generated, whole, different = np.mean(tokens, axis=0)
    for side, parts in seconds.items():
        sampling, update = np.median(parts, axis=0)
        print(
            f"  {side:<5} sampling {sampling:.3f} s ({2 * weights * generated / sampling / peak:.0%} of peak), "
            f"update {update:.3f} s ({6 * weights * whole / update / peak:.0%})"
        )
    print(
        f"  {generated:.0f} tokens generated a step; of {whole:.0f} with prompts, {different:.0f} in different responses, which is all we "
        f"train on; peak {peak / 1e9:.0f} GFLOP/s"
    )


def trl_grpo(trl, place, folder, tokenizer, problems, prompts, group, steps, seconds, warmup=1):
    from datasets import Dataset  # comes with trl
    from transformers import AutoModelForCausalLM

    class Clock(transformers.TrainerCallback):
        times = {}

        def on_step_end(self, args, state, control, **_):
            self.times[state.global_step] = time.perf_counter(), sampling[0]

    def reward(completions, answer, **_):
        return [float(data.verify(c[0]["content"], a)) for c, a in zip(completions, answer)]

    sampling = [0.0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    generate = model.generate

    def timed(*args, **options):
        start = time.perf_counter()
        out = generate(*args, **options)
        sampling[0] += time.perf_counter() - start
        return out

    model.generate = timed
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": p["question"]}], "answer": p["answer"]}
            for p in problems
        ]
    )
    args = trl.GRPOConfig(
        place,
        per_device_train_batch_size=prompts * group,
        num_generations=group,
        max_completion_length=64,
        max_steps=warmup + steps,
        learning_rate=1e-9,
        beta=0.0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    def run():
        sampling[0] = 0.0
        trainer = trl.GRPOTrainer(
            model,
            reward_funcs=reward,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        (begin, before), (end, after) = Clock.times[warmup], Clock.times[warmup + steps]
        seconds.setdefault("TRL", []).append(
            ((after - before) / steps, (end - begin - after + before) / steps)
        )
        return steps / (end - begin)

    return run


# ----------------------------------------------------------------------------------------------------
# gpu


def part_gpu(args):
    """TDRM and RL steps of a random 7B shape: tokens a second, FLOPs against the peak, memory against the estimate."""
    import estimate
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    env, dtype, tokenizer = (
        sft.Env(device=device),
        torch.bfloat16 if cuda else torch.float32,
        data.builtin_tokenizer(),
    )
    card = torch.cuda.get_device_properties(0).total_memory if cuda else 4 * 2**30
    shape = estimate.load_config("Qwen2.5-Math-7B")
    if args.quick or not cuda:
        shape = transformers.Qwen2Config(
            vocab_size=2048,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    rows, steps, length, new = (8, 16, 1024, 256) if cuda and not args.quick else (4, 2, 64, 16)
    shape.eos_token_id, shape.pad_token_id, shape.bos_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        None,
    )
    n = 8192 if cuda else 256
    a = torch.randn(n, n, device=device, dtype=dtype)

    def timed(function):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    peak = 2 * n**3 / min(timed(lambda: a @ a) for _ in range(10))
    print(
        f"gpu: {torch.cuda.get_device_name() if cuda else 'no GPU, a small shape on the CPU'}; matrix products reach {peak / 1e12:.3g} TFLOP/s"
    )

    def fitting(kind, cfg, others=lambda config: ()):
        """The shape with as many layers as the card takes, all of them where it can."""
        for layers in range(shape.num_hidden_layers, 0, -1):
            config = transformers.AutoConfig.for_model(
                **{
                    **shape.to_dict(),
                    "num_hidden_layers": layers,
                    "layer_types": None,
                    "num_labels": 1,
                }
            )
            config.classifier_dropout = 0.0
            bytes_ = estimate.memory(config, kind, cfg, 1, dtype, others(config))["total"]
            if bytes_ < 0.94 * card:
                return config, bytes_
        raise SystemExit(f"gpu: not even one layer of this shape fits {card / 2**30:.0f} GiB")

    def report(name, config, seconds, tokens, flops, estimated):
        used = (
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if cuda
            else "peak not measured here"
        )
        print(
            f"  {name}, {config.num_hidden_layers} of {shape.num_hidden_layers} layers: {tokens / seconds:.4g} tokens a second, "
            f"{flops / seconds / peak:.0%} of peak; {used}, estimated {estimated / 2**30:.1f} GiB"
        )

    cfg = tdrm.Config(
        batch_size=rows, micro_batch_size=max(1, rows // 4), max_length=length, grad_checkpoint=True
    )
    config, estimated = fitting("tdrm", cfg)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForTokenClassification.from_config(config, dtype=dtype)
    model, wrapped = sft.prepare(model, cfg, env)
    optimizer, ends = sft.make_optimizer(model, cfg, env), list(
        range(length // steps - 1, length, length // steps)
    )
    examples = [
        {
            "input_ids": torch.randint(5, shape.vocab_size, (length,)).tolist(),
            "prompt_length": 1,
            "step_ends": ends,
            "labels": [1.0] * len(ends),
            "correct": True,
        }
        for _ in range(rows)
    ]

    def loss_fn(micro):
        batch = {k: v.to(device) for k, v in data.collate(micro, 0).items()}
        logits = tdrm.step_values(wrapped, batch["input_ids"], None, batch["step_ends"])
        targets, weights = tdrm.targets_and_weights(cfg, logits, batch, labelled=True)
        return (
            F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights
        ).sum() / (rows * len(ends))

    def step():
        sft.accumulate_gradients(wrapped, examples, cfg.micro_batch_size, loss_fn, env)
        sft.optimizer_step(model, optimizer, 1e-6, 1.0)

    step()
    seconds = median(timed(step) for _ in range(args.repeats))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    report(
        "a TDRM step",
        config,
        seconds,
        rows * length,
        rows * length * (6 * weights + 6 * config.num_hidden_layers * config.hidden_size * length),
        estimated,
    )
    del model, wrapped, optimizer

    group = 8
    cfg = rl.Config(
        prompts_per_step=max(1, rows // 4),
        group_size=group,
        batch_size=max(1, rows // 4) * group,
        micro_batch_size=2,
        max_new_tokens=new,
        max_length=64 + new,
        eval_problems=1,
        grad_checkpoint=True,
        alpha=1.0,
    )
    config, estimated = fitting("rl", cfg)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model, policy = sft.prepare(model, cfg, env, sft.Policy)
    optimizer, problems, phases, counted = (
        sft.make_optimizer(model, cfg, env),
        data.make_problems(cfg.prompts_per_step),
        [],
        [],
    )

    def rl_step():
        start = time.perf_counter()
        rows = rl.rollout(model, tokenizer, problems, range(len(problems)), cfg, env)
        middle = time.perf_counter()
        for i, row in enumerate(rows):
            row["advantages"] = np.full(
                len(row["old_logprobs"]), 1.0 - 2 * (i % 2), dtype=np.float32
            )
        metrics = rl.update_policy(policy, model, optimizer, rows, 1e-6, cfg, env, 0)
        phases.append((middle - start, time.perf_counter() - middle))
        counted.append(
            (
                sum(len(row["old_logprobs"]) for row in rows),
                sum(len(row["input_ids"]) for row in rows),
                metrics["max_ratio_deviation"],
            )
        )

    rl_step()
    seconds = median(timed(rl_step) for _ in range(args.repeats))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    new_tokens, tokens, deviation = np.mean(counted, axis=0)
    report(
        "an RL step",
        config,
        seconds,
        tokens,
        2 * weights * new_tokens + 6 * weights * tokens,
        estimated,
    )
    print(
        f"    sampling {np.median(phases, axis=0)[0]:.3g} s, update {np.median(phases, axis=0)[1]:.3g} s; largest |ratio - 1| {deviation:.2g}"
    )


def part_startup(args):
    """Seconds from the command to the first training step, of the scripts that learn from the built-in data at once."""
    import subprocess
    import sft_minimal as sft

    scripts, root = ("sft", "tdrm"), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = data.builtin_tokenizer()
        sft.save_model(folder + "/policy", sft.new_policy(tokenizer, 0), tokenizer)

        def first_step(script):
            begin, out = time.perf_counter(), tempfile.mkdtemp(dir=folder)
            small = ["--model", folder + "/policy"] if script == "tdrm" else []
            process = subprocess.Popen(
                [sys.executable, f"{root}/{script}_minimal.py", "--out", out, *small],
                stdout=-3,
                stderr=-3,
            )
            metrics = out + "/metrics.jsonl"
            while process.poll() is None and not (
                os.path.exists(metrics) and '"step": 1' in open(metrics).read()
            ):
                time.sleep(0.01)
            seconds = time.perf_counter() - begin
            process.kill()
            process.wait()
            return seconds

        def python(code):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
            return time.perf_counter() - begin

        rows = [
            {
                "import torch": python("import torch"),
                "and what a script loads of transformers": python(
                    "import torch, tdrm_minimal; from transformers import AutoModelForTokenClassification, Qwen2ForTokenClassification"
                ),
                **{f"{script}_minimal.py": first_step(script) for script in scripts},
            }
            for _ in range(args.repeats)
        ]
        for name in rows[0]:
            numbers = sorted(row[name] for row in rows)
            print(
                f"{name:<42} {median(numbers):5.1f} s to the first step ({numbers[0]:.1f}-{numbers[-1]:.1f})"
                if "minimal" in name
                else f"{name:<42} {median(numbers):5.1f} s ({numbers[0]:.1f}-{numbers[-1]:.1f})"
            )


PARTS = {
    "tdrm": (
        part_tdrm,
        "training steps of tdrm_minimal.py against the published algorithm and TRL",
    ),
    "search": (
        part_search,
        "beam search against one call per prefix and candidate; sample() against generate",
    ),
    "gpu": (
        part_gpu,
        "TDRM and RL steps of a 7B shape on one GPU (without one: a small shape on the CPU)",
    ),
    "startup": (part_startup, "seconds from the command to the first training step"),
    "rl": (part_rl, "a step of rl_minimal.py against TRL's GRPOTrainer, sampling and update"),
}


def main():
    parser = argparse.ArgumentParser(description="Speed, measured side by side.")
    parser.add_argument("part", nargs="?", choices=PARTS, help="none: list them")
    parser.add_argument(
        "--repeats", type=int, default=5, help="pairs to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that everything runs"
    )
    args = parser.parse_args()
    if args.part:
        return PARTS[args.part][0](args)
    print(
        *(f"python tests/bench.py {name:<6} {what}" for name, (_, what) in PARTS.items()), sep="\n"
    )


if __name__ == "__main__":
    main()
