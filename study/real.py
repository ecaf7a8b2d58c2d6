"""Reward models on real text, from outcomes alone: `python study/real.py`.

GSM8K was published with solutions by four models to its 1319 test questions, marked right or wrong
(example_model_solutions.jsonl in github.com/openai/grade-school-math, in the folder that GSM8K_DIR
names). Four reward models learn from those to questions 1 to 1000, each by one run of the project's
own scripts from SmolLM2-135M-Instruct (in the folder that SMOLLM2_DIR names); lines are steps:

    TDRM        tdrm_minimal.py from outcomes: every line's value is pulled to the outcome
    ScalarORM   tdrm_minimal.py: the last line's value only
    Q-RM        qrm_minimal.py, from pairs of a right and a wrong solution to the same question
    DPO-RM      qrm_minimal.py: the log-ratio to the initial model, from the same pairs

All take as many steps of 16 solutions (or 8 pairs) at one learning rate: 96 steps, about 340,000
tokens, less than half of what there is. Then each values every line of the 1276 solutions to the
other 319 questions:

    - AUROC of the outcome at the middle, second-last and last line; calibration of what is trained
      to be a probability; how far values jump from line to line. Beside them, what is known from
      the author's name alone: how often that model was right on the training questions. So there
      is also the AUROC among one author's solutions, a mean over the four;
    - best of four: the solution with the highest value at its last line, against each of the four
      models, a vote, one at random, and any right one.

Intervals are over questions (bootstrap): with one seed they say nothing about other runs. It takes
a good hour on two cores. Runs and values are kept in runs/real and not made again: a stopped study
goes on where it was; runs/real/TDRM-0.log shows how far a run is. Results go to study/results.json,
and from there into study/README.md and study/figures, as study.py's do.
`--quick` does a little of everything in runs/quick-real, and changes neither file.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import shutil
import time
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

import figures
import tables
from study import Study, at, measured, save  # makes what follows importable

import data
from parts.answers import answer_key, extract_answer
from parts.formats import read_trajectories
from parts.rewards import load_reward_model
from parts.runs import join_processes
from tdrm_minimal import auroc, calibration_error

AUTHORS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
SOLUTIONS = "tdrm_minimal.py --batch_size 16 --micro_batch_size 4"
PAIRS = "qrm_minimal.py --batch_size 8 --micro_batch_size 2"
METHODS = {  # the longest run first: two at a time, they then end at about the same time
    "DPO-RM": PAIRS,
    "Q-RM": PAIRS,
    "TDRM": SOLUTIONS,
    "ScalarORM": SOLUTIONS,
}
PROBABILITIES = ("TDRM", "ScalarORM")  # the level of what is learned from pairs is arbitrary
# A model of 135M parameters takes a larger learning rate than one of 7B (1e-6). Few solutions have
# more than 512 tokens; those would cost most of the memory.
COMMON = "--lr 5e-5 --max_length 512 --step_end line --eval_every 0 --save_every 32"
PART = 40  # questions whose solutions are valued, and kept, at a time
RESAMPLES = 1000

# --------------------------------------------------------------------------------------------------
# Data, runs, values.


def load_questions(quick):
    """-> training and held-out rows as published: "question", and for each author "solution" and
    "is_correct"."""
    with open(os.path.join(os.environ["GSM8K_DIR"], "example_model_solutions.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    if quick:
        rows = sorted(rows, key=lambda row: len(str(row)))
        return rows[:40], rows[40:60]
    return rows[:1000], rows[1000:]


def write_solutions(path, questions):
    """A file of trajectories: of each question its four solutions."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".tmp", "w") as f:
        for row in questions:
            for author in AUTHORS:
                facts = {"response": row[author]["solution"], "correct": row[author]["is_correct"]}
                f.write(json.dumps({"prompt": row["question"]} | facts) + "\n")
    os.replace(path + ".tmp", path)


def train(study, args):
    """Every method under every seed -> {(method, seed): folder of the run}."""
    base = f"--model {os.path.abspath(os.environ['SMOLLM2_DIR'])} --data {study.place}/train.jsonl"
    base += f" {COMMON} --dtype {args.dtype} --steps {args.steps}"
    if study.quick:
        base += " --batch_size 2 --max_length 2048"
    outs, commands = {}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        for method, script in METHODS.items():
            out = outs[method, seed] = f"{study.place}/{method}-{seed}"
            commands[out] = f"{script} {base} --method {method} --seed {seed}"
    study.run(commands)
    for out in commands:  # 2 GB each; a run that has ended needs no checkpoint
        shutil.rmtree(at(out, "state"), ignore_errors=True)
    return outs


def value_all(study, args, outs, count):
    """Values of all lines of the held-out solutions to `count` questions, by each reward model ->
    {(method, seed): array (count, 4, S), NaN behind a solution's end}, {(method, seed): seconds}.
    """
    jobs, files = [], {}
    for key, out in outs.items():
        files[key] = [at(out + ".values", f"{first}.json") for first in range(0, count, PART)]
        for i, file in enumerate(files[key]):
            if not os.path.exists(file):
                jobs.append((at(out, "model"), at(study.place, "held-out.jsonl"), i, file))
    context = multiprocessing.get_context("forkserver")
    bar = tqdm(total=len(jobs), desc="values")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool, bar:
        work = [pool.submit(value_part, *job, args.dtype) for job in jobs]
        try:
            for done in concurrent.futures.as_completed(work):
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = {key: load_values(names) for key, names in files.items()}
    return tuple({key: pair[i] for key, pair in found.items()} for i in (0, 1))


def value_part(model, solutions, i, file, dtype):
    """The i-th PART of the questions: the values of their solutions' lines go to a file, with the
    seconds that they took."""
    begin, procs = time.process_time(), join_processes()
    reward = load_reward_model(model, getattr(torch, dtype), procs.device)
    rows = list(read_trajectories(solutions, "\n"))[4 * PART * i : 4 * PART * (i + 1)]
    examples, _ = data.encode_rows(rows, reward.encode, math.inf)
    values = reward.score_steps(examples, procs, rows_at_once=8)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file + ".tmp", "w") as f:
        json.dump({"values": values, "core_seconds": time.process_time() - begin}, f)
    os.replace(file + ".tmp", file)


def load_values(files):
    """Lists of values, four solutions a question -> array (questions, 4, S), padded with NaN; the
    seconds they took."""
    values, seconds = [], 0.0
    for name in files:
        with open(name) as f:
            part = json.load(f)
        values, seconds = values + part["values"], seconds + part["core_seconds"]
    S = max(map(len, values))
    padded = [v + [math.nan] * (S - len(v)) for v in values]
    return np.array(padded).reshape(-1, 4, S), seconds


# --------------------------------------------------------------------------------------------------
# Measures. Q = questions, with four solutions each; `right` (Q, 4) says which are.


def measure(values, right):
    """How well values (Q, 4, S) tell right solutions from wrong ones, and how they move."""
    states, jumps = np.isfinite(values), np.abs(np.diff(values, axis=-1))
    lines = states.sum(-1)  # (Q, 4)
    last = at_line(values, lines - 1)
    outcomes = np.broadcast_to(right[..., None], values.shape)
    return {
        "auroc_middle": auroc_at(values, (lines - 1) // 2, right),
        "auroc_second_last": auroc_at(values, np.maximum(lines - 2, 0), right),
        "auroc_last": auroc(last.ravel(), right.ravel()),
        "auroc_one_author": np.mean([auroc(*pair) for pair in zip(last.T, right.T)]),
        "calibration_error": calibration_error(values[states], outcomes[states]),
        "abs_delta_v": np.nanmean(jumps),
        "lipschitz": np.nan_to_num(jumps).max(-1).mean(),
    }


def at_line(values, line):
    """values (Q, 4, S) at line (Q, 4), an index -> (Q, 4)."""
    return np.take_along_axis(values, line[..., None], -1)[..., 0]


def auroc_at(values, line, right):
    return auroc(at_line(values, line).ravel(), right.ravel())


def best_of_four(values, right):
    """(Q,): is the solution with the highest value at its last line right? Equal ones share."""
    last = at_line(values, np.isfinite(values).sum(-1) - 1)
    best = last == last.max(1, keepdims=True)
    return (right * best).sum(1) / best.sum(1)


def majority(questions):
    """(Q,): is the most frequent answer of the four right? Equally frequent ones share."""
    shares = []
    for row in questions:
        right_answers, votes = set(), Counter()
        for author in AUTHORS:
            answer = extract_answer(row[author]["solution"])
            if answer is not None:
                votes[answer_key(answer)] += 1
                right_answers |= {answer_key(answer)} if row[author]["is_correct"] else set()
        winners = [key for key in votes if votes[key] == max(votes.values())]
        shares.append(np.mean([key in right_answers for key in winners]) if winners else 0.0)
    return np.array(shares)


def with_intervals(function, count):
    """function(question indices) -> {name: number}; here of all questions: {name: [number, low,
    high]}, the 95% interval by bootstrap over the questions."""
    rng, draws = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        draws.append(function(rng.integers(count, size=count)))
    found = {}
    for name, number in function(np.arange(count)).items():
        low, high = np.quantile([draw[name] for draw in draws], (0.025, 0.975))
        found[name] = [round(float(x), 4) for x in (number, low, high)]
    return found


def compare(values, train_questions, questions):
    """Everything that is told: {"values": {who: measures}, "choices": {who: accuracy, and its
    difference to the best author's}}."""
    right = outcomes(questions)
    known = outcomes(train_questions).mean(0)  # (4,), how often each author is right
    methods, results = sorted({method for method, _ in values}), {"values": {}, "choices": {}}
    of = {m: [v for (method, _), v in values.items() if method == m] for m in methods}
    lines = np.isfinite(of[methods[0]][0])  # (Q, 4, S)
    of["the author's accuracy"] = [np.where(lines, known[:, None], math.nan)]
    for who, seeds in tqdm(of.items(), desc="intervals"):

        def mean_over_seeds(questions):
            found = [measure(v[questions], right[questions]) for v in seeds]
            return {name: np.mean([one[name] for one in found]) for name in found[0]}

        results["values"][who] = with_intervals(mean_over_seeds, len(right))
        if who in methods and who not in PROBABILITIES:
            del results["values"][who]["calibration_error"]
    best = int(known.argmax())
    picks = {author: right[:, i] for i, author in enumerate(AUTHORS)}
    picks |= {"one at random": right.mean(1), "majority of the four": majority(questions)}
    for m in methods:
        picks[f"best of four, {m}"] = np.mean([best_of_four(v, right) for v in of[m]], axis=0)
    picks["any of the four"] = right.any(1)
    for who, hits in picks.items():

        def accuracy(questions):
            mean, of_best = hits[questions].mean(), right[questions, best].mean()
            return {"accuracy": mean, "gain": mean - of_best}

        results["choices"][who] = with_intervals(accuracy, len(right))
    return results


def outcomes(questions):
    return np.array([[row[author]["is_correct"] for author in AUTHORS] for row in questions])


# --------------------------------------------------------------------------------------------------
# All together.


def options():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    args = parser.parse_args()
    for name, file in (
        ("GSM8K_DIR", "example_model_solutions.jsonl"),
        ("SMOLLM2_DIR", "config.json"),
    ):
        if not os.path.exists(os.path.join(os.environ.get(name, ""), file)):
            parser.error(f"{name}: wanted a folder with {file}, see above")
    return args


def main():
    args = options()
    study = Study(
        "runs/quick-real" if args.quick else "runs/real", args.seeds, args.jobs, args.quick
    )
    if args.quick:
        args.steps = 2
        shutil.rmtree(at(study.place), ignore_errors=True)
    train_questions, questions = load_questions(args.quick)
    write_solutions(at(study.place, "train.jsonl"), train_questions)
    write_solutions(at(study.place, "held-out.jsonl"), questions)
    outs = train(study, args)
    values, value_seconds = value_all(study, args, outs, len(questions))
    results = {"steps": args.steps, "seed": args.seed, "core_seconds": {}}
    for (method, seed), out in outs.items():
        with open(at(out + ".cost")) as f:
            seconds = [json.load(f)["core_seconds"], value_seconds[method, seed]]
        spent = {"training": round(seconds[0]), "values": round(seconds[1])}
        results["core_seconds"].setdefault(method, []).append(spent)
    results |= compare(values, train_questions, questions)
    for name, lines in tables.TABLES["real"](results):
        print(f"\n{name}\n{lines}", flush=True)
    cost = measured(study.outs)
    cost["core_seconds"] += round(sum(value_seconds.values()))
    keep(results, cost, args.quick, at(study.place, "figures"))


def keep(results, cost, quick, place):
    """Into results.json, beside what is there; from there into page and figures."""
    path, everything = at("study", "results.json"), {}
    if not quick:
        with open(path) as f:
            everything = json.load(f)
    everything["real"] = results
    everything.setdefault("measured", {})["real"] = cost
    if not quick:
        save(everything)
        tables.write_page(everything, at("study", "README.md"))
        place = at("study", "figures")
    figures.draw(everything, place)


if __name__ == "__main__":
    main()
