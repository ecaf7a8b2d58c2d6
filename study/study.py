"""Which of the three papers' claims hold in miniature? `python study/study.py [PART ...]`.

    tdrm         ScalarORM, ScalarPRM, TDRM on held-out solutions: smoothness, calibration, AUROC
    search       greedy search and best-of-n on 1000 held-out problems with those reward models
    sweep        what a TDRM and a ScalarPRM depend on: targets, label noise, whose solutions
    budget       search accuracy against the tokens spent on data, for every kind of reward model
    rl           rule-only, blended and PRM-only rewards on the hard level
    prime        PRIME against outcomes only, its design choices, and controls, on the hard level
    prime-again  the row of it that won, under five other seeds (+)
    prime-short  four of its rows on the default level
    qrm          Q-RM, ORM and DPO-RM, TDRM beside them: pairs, first wrong steps, search
    qrm-rl       RL with a Q-RM, an ORM or a DPO-RM and no verifier, on the hard level
    readme       only write tables and figures again

Every run is a run of the project's own scripts with its own --seed, kept in runs/study and not
repeated while its summary.json is there: a stopped study goes on where it was. All figures go to
study/results.json, and from there into study/README.md and study/figures (tables.py, figures.py).
Rows with a + (tables.MORE) want --more: without them the study takes under two hours on two cores.
`--quick` runs a few rows of everything, tiny, in runs/quick, and changes neither file.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}  # of the runs
sys.path.insert(0, ROOT)
import data  # noqa: E402
import figures  # noqa: E402
import qrm_minimal as qrm_chapter  # noqa: E402
import tables  # noqa: E402
import tdrm_minimal as tdrm_chapter  # noqa: E402
from parts.rewards import load_reward_model  # noqa: E402
from parts.runs import Processes  # noqa: E402
from tables import MEASURES, METHODS, MORE  # noqa: E402

HARD = "builtin-hard"
TDRM = "tdrm_minimal.py --eval_every 0"
SEARCH = "search_minimal.py --beam 1"

# --------------------------------------------------------------------------------------------------
# Runs.


def execute(out, command):
    """One run, in a process whose imports are done already; what it prints goes to `out`.log."""
    os.chdir(ROOT)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [*command.split(), "--out", out, "--resume"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)} failed, see {out}.log") from None


@dataclass
class Study:
    """Where the runs are, and how large."""

    place: str
    seeds: int
    jobs: int
    more: bool  # also the rows in MORE
    quick: bool
    rows: list | None  # only these

    def run(self, commands):
        """{out: command}: run what has no summary.json yet, `jobs` at a time."""
        todo = {
            out: c for out, c in commands.items() if not os.path.exists(at(out, "summary.json"))
        }
        if not todo:
            return
        context = multiprocessing.get_context("forkserver")  # start-up is half of a short run
        modules = ["transformers.models.qwen2.modeling_qwen2", "prime_minimal", "qrm_minimal"]
        context.set_forkserver_preload(modules)
        executor = concurrent.futures.ProcessPoolExecutor
        bar = tqdm(total=len(todo), desc="runs")
        with executor(self.jobs, context, max_tasks_per_child=1) as pool, bar:
            runs = [pool.submit(execute, *item) for item in todo.items()]
            try:
                for done in concurrent.futures.as_completed(runs):
                    done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def choose(self, settings):
        """Of the settings {row: options} those to run; in a quick study the first and the last."""
        names = list(settings)
        if self.quick:
            names = [names[0], names[-1]]
        elif self.rows:
            names = [name for name in names if name in self.rows]
        elif not self.more:
            names = [name for name in names if name not in MORE]
        return {name: settings[name] for name in names}

    def size(self, full, tiny):
        return tiny if self.quick else full

    def policy(self, level="builtin"):
        """The built-in policy of a level, trained first."""
        level = self.size(level, "builtin")
        out = self.place + "/sft" + level.removeprefix("builtin")
        size = self.size("", "--steps 30 --eval_problems 20 --max_new_tokens 16")
        self.run({out: f"sft_minimal.py --data {level} {size}"})
        return out + "/model"

    def reward_models(self):
        """Every reward model under every seed -> {(method, seed): folder}, trained first."""
        base = f"{TDRM} --model {self.policy()} {self.size('', '--problems 50')}"
        outs = {(m, s): f"{self.place}/{m}-{s}" for m in METHODS for s in range(self.seeds)}
        self.run({out: f"{base} --method {m} --seed {s}" for (m, s), out in outs.items()})
        return outs

    def rows_file(self, name, make):
        """`make`() -> rows, as a file of trajectories, once."""
        path, keep = f"{self.place}/{name}.jsonl", (
            "prompt",
            "completions",
            "labels",
            "answer",
            "correct",
        )
        if not os.path.exists(at(path)):
            os.makedirs(at(self.place), exist_ok=True)
            with open(at(path + ".tmp"), "w") as f:
                for row in make():
                    known = {key: row[key] for key in keep if row.get(key) is not None}
                    f.write(json.dumps(known) + "\n")
            os.replace(at(path + ".tmp"), at(path))
        return path

    def held_out(self):
        def make():
            problems = data.make_problems(self.size(1000, 20), "test")
            return data.make_trajectories(problems, 2, 4, seed=1)

        return self.rows_file("held-out", make)

    def search(self, name, folders, n, level="builtin"):
        """One search run a seed over its reward models {key: folder}: greedy search at b = 8, `n`
        samples -> for each seed {(method, key, samples): accuracy}."""
        size = self.size(f"--problems 500 --n {n}", "--problems 4 --n 4")
        base = f"{SEARCH} --model {self.policy(level)} --data {level} --expand 8 {size}"
        which = zlib.crc32(repr(sorted(folders[0])).encode())  # other reward models: another run
        outs, commands = [f"{self.place}/{name}-{which:08x}-{s}" for s in range(self.seeds)], {}
        for s, out in enumerate(outs):
            commands[out] = f"{base} --seed {s} --prm {' '.join(folders[s].values())}"
        self.run(commands)
        found = []
        for out, mine in zip(outs, folders):
            keys = {path.removesuffix("/model").split("/")[-1]: key for key, path in mine.items()}
            accuracies = {}
            for row in summary(out)["rows"]:
                method, _, prm = row["method"].partition(", ")
                accuracies[method, keys.get(prm, prm), row["n"]] = row["accuracy"]
            found.append(accuracies)
        return found


def at(*names):
    return os.path.join(ROOT, *names)


def summary(out):
    with open(at(out, "summary.json")) as f:
        return json.load(f)


def metrics(out):
    with open(at(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def slug(name):
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


# --------------------------------------------------------------------------------------------------
# Reward models, and search with them.


def tdrm(study):
    folders, results = study.reward_models(), {}
    for m in METHODS:
        found = [summary(folders[m, s]) for s in range(study.seeds)]
        results[m] = {key: [one[key] for one in found] for key in MEASURES}
    # Value traces and TD errors by step, all on the same held-out solutions.
    problems = data.make_problems(study.size(500, 60), "test")
    rows, errors, traces = data.make_trajectories(problems, 2, 4, seed=1), {}, {}
    for m, s in itertools.product(("ScalarPRM", "TDRM"), range(study.seeds)):
        examples, values, _ = step_values(folders[m, s] + "/model", rows)
        traces.setdefault(m, values)  # of the first seed
        by_step = errors.setdefault(m, {})
        for t, error in td_errors(examples, values):
            by_step.setdefault(t, []).append(error)
    results["td_error_by_step"] = {m: quantiles(by_step) for m, by_step in errors.items()}
    results["traces"] = []
    for title, i in tdrm_chapter.choose_three(examples):
        values = {m: [round(x, 3) for x in traces[m][i]] for m in traces}
        trace = {"title": title, "first_error": examples[i].first_error, "values": values}
        results["traces"].append(trace)
    return results


def step_values(folder, rows):
    """-> the rows as Examples, a reward model's values of all their steps, its kind."""
    reward = load_reward_model(at(folder), torch.float32)
    examples, _ = data.encode_rows(rows, reward.encode, 2048)
    return examples, reward.score_steps(examples, Processes()), reward.kind


def td_errors(examples, values):
    """Yield (t, |r_t + gamma V_t+1 - V_t|) of every step but the last."""
    cfg = tdrm_chapter.Config()
    for e, v in zip(examples, values):
        labels, mask = torch.tensor([e.labels]), torch.ones(1, len(v))
        rewards = tdrm_chapter.shaped_rewards(labels, mask, cfg.correct, cfg.wrong)[0].tolist()
        for t in range(len(v) - 1):
            yield t, abs(rewards[t] + cfg.gamma * v[t + 1] - v[t])


def quantiles(by_step):
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    return [np.quantile(by_step[t], levels).round(3).tolist() for t in sorted(by_step)]


def search(study):
    folders, commands = study.reward_models(), {}
    full = "--problems 1000 --n 64 --expand 2 4 8 16"
    size = study.size(full, "--problems 8 --n 8 --expand 2")
    for s in range(study.seeds):
        prms = " ".join(f"{folders[m, s]}/model" for m in METHODS)
        command = f"{SEARCH} --model {study.policy()} {size} --seed {s} --prm {prms}"
        commands[f"{study.place}/search-{s}"] = command
    study.run(commands)
    results = {}
    for out in commands:
        for row in summary(out)["rows"]:
            method = re.sub(r"-\d+$", "", row["method"])  # TDRM-0 is TDRM under seed 0
            results.setdefault(f"{method} @ {row['n']}", []).append(row["accuracy"])
    return results


# --------------------------------------------------------------------------------------------------
# What the reward models depend on. All learn from 32,000 trajectories (half the default), unless it
# says otherwise.

TARGETS = {
    "ScalarPRM": "--method ScalarPRM",
    "TDRM, n = 1": "--n_step 1",
    "TDRM, n = 2": "--n_step 2",
    "TDRM, n = 3": "",
    "TDRM, lambda 0.9": "--lam 0.9",
    "TDRM, lambda 1": "--lam 1",
    "TDRM, gamma 0.6": "--gamma 0.6",
    "TDRM, gamma 1": "--gamma 1",
    "TDRM, rewards +-0.5 constant": "--correct 0.5 0.5 --wrong -0.5 -0.5",
    "TDRM, no step rewards": "--correct 0 0 --wrong 0 0 --gamma 1",
    "outcomes only, TDRM n = 3": "--label_rollouts 0 --n_step 3",
    "outcomes only, TDRM n = T": "--label_rollouts 0",
}
CONDITIONS = {  # options; or whose solutions, with which share of their labels flipped
    "1 rollout a label": "--label_rollouts 1",
    "2 rollouts": "--label_rollouts 2",
    "8 rollouts": "--label_rollouts 8",
    "15% of the labels flipped": ("builtin", 0.15),
    "30% flipped": ("builtin", 0.3),
    "another student's solutions": (HARD, 0),
    "8 to 14 operations": f"--data {HARD}",
}


def sweep(study):
    """Every setting under every seed: its measures, and greedy search (b = 8) and best-of-16."""
    settings = {(name, ""): options for name, options in study.choose(TARGETS).items()}
    for name, options in study.choose(CONDITIONS).items():
        settings |= {(name, method): options for method in ("ScalarPRM", "TDRM")}
    outs, commands = {}, {}
    for s, (key, options) in itertools.product(range(study.seeds), settings.items()):
        out = outs[key, s] = f"{study.place}/sweep-{slug(' '.join(key))}-{s}"
        if isinstance(options, tuple):
            path = solutions(study, *options, s)
            options = f"--data {path} --eval {study.held_out()}"
        method = f"--method {key[1]}" if key[1] else ""
        base = f"{TDRM} --model {study.policy(level_of(options))} --seed {s} {method}"
        commands[out] = f"{base} --problems {study.size(8000, 50)} {options}"
    study.run(commands)
    results = {}
    for level in data.LEVELS:
        keys = [key for key, options in settings.items() if level_of(options) == level]
        if not keys:
            continue
        folders = [{key: outs[key, s] + "/model" for key in keys} for s in range(study.seeds)]
        for s, found in enumerate(study.search("sweep-search", folders, 16, level)):
            for key in keys:
                row = results.setdefault("|".join(key), {})
                numbers = {measure: summary(outs[key, s]).get(measure) for measure in MEASURES}
                numbers["greedy"] = found["greedy search 8", key, 1]
                numbers["best-of-n"] = found["best-of-n", key, study.size(16, 4)]
                for name, number in numbers.items():
                    row.setdefault(name, []).append(number)
    return results


def level_of(options):
    return HARD if options == CONDITIONS["8 to 14 operations"] else "builtin"


def solutions(study, level, flip, seed):
    """File of solutions to train on: of the student whose habits the policy has, with some labels
    flipped, or of the student of the other level."""

    def make():
        problems = data.make_problems(study.size(8000, 50), "train", seed)
        rows, rng = data.make_trajectories(problems, 4, 4, seed=seed, level=level), random.Random(
            seed
        )
        for row in rows if flip else []:
            *steps, last = row["labels"]
            row["labels"] = [1 - x if rng.random() < flip else x for x in steps] + [last]
        return rows

    return study.rows_file(f"flip{flip}-{seed}" if flip else f"other-{seed}", make)


# --------------------------------------------------------------------------------------------------
# With a labelling budget, which reward model should I train?

BUDGETS = (100_000, 400_000, 1_600_000)  # tokens sampled to make the data, labels included
LEARNERS = {  # what is bought, which script learns from it
    "ScalarPRM, step labels": ("steps", "tdrm", "ScalarPRM"),
    "TDRM, step labels": ("steps", "tdrm", "TDRM"),
    "TDRM, outcomes": ("outcomes", "tdrm", "TDRM"),
    "ScalarORM, outcomes": ("outcomes", "tdrm", "ScalarORM"),
    "DPO-RM, outcomes": ("outcomes", "qrm", "DPO-RM"),
    "Q-RM, outcomes": ("outcomes", "qrm", "Q-RM"),
}


def spend(budget, kind, seed):
    """Solutions bought with `budget` tokens -> rows. Of "outcomes" a row costs its own tokens; of
    "steps", also those of the 4 rollouts from each of its prefixes. Every token of a built-in step
    is one character, its blank line one more; \\boxed{ is one token."""
    samples, rollouts = (8, 0) if kind == "outcomes" else (4, 4)
    spent, rows = 0, []
    for problem in data.make_problems(40_000, "train", seed):
        noise = f"{seed} {problem['question']}"
        for row in data.make_trajectories([problem], samples, rollouts, seed=noise):
            lengths = [len(step) + 1 for step in reversed(row["completions"])]
            after = np.cumsum(lengths) - 6  # tokens behind each prefix, the last behind none
            spent += int(after[-1]) + rollouts * int(after[:-1].sum())
            rows.append(row)
        if spent >= budget:
            return rows


def budget(study):
    """Each learner at each budget: greedy search (b = 8) and best-of-16."""
    budgets, learners = study.size(BUDGETS, [1000]), LEARNERS
    if study.quick:
        learners = study.choose(LEARNERS)
    outs, commands = {}, {}
    for s, b, (name, learner) in itertools.product(range(study.seeds), budgets, learners.items()):
        kind, script, method = learner
        path = study.rows_file(f"{kind}-{b}-{s}", lambda: spend(b, kind, s))
        with open(at(path)) as f:
            rows = sum(1 for _ in f)
        if script == "tdrm":  # at most four passes, and half as many steps as by default
            steps, source = min(500, 4 * rows // 64), f"--data {path} --eval {study.held_out()}"
        else:
            steps, source = min(250, 2 * rows // 64), f"--pairs_from {path} {study.size('', FEW)}"
        steps = study.size(max(50, steps), 4)
        out = outs[name, b, s] = f"{study.place}/budget-{slug(name)}-{b}-{s}"
        base = f"{script}_minimal.py --model {study.policy()} --eval_every 0 --seed {s}"
        commands[out] = f"{base} --steps {steps} {source} --method {method}"
    study.run(commands)
    folders = [
        {key[:2]: f"{outs[key]}/model" for key in outs if key[2] == s} for s in range(study.seeds)
    ]
    results, n = {}, study.size(16, 4)
    for found in study.search("budget-search", folders, 16):
        for name, b in itertools.product(learners, budgets):
            row = results.setdefault(name, {}).setdefault(str(b), {"greedy": [], "best-of-n": []})
            row["greedy"].append(found["greedy search 8", (name, b), 1])
            row["best-of-n"].append(found["best-of-n", (name, b), n])
    return results


# --------------------------------------------------------------------------------------------------
# Reinforcement learning.

COMMON = "--prompts_per_step 16 --eval_problems 300 --lr 2e-4 --no-decay --save_every 0"
LIMITS = f"--data {HARD} --problems 500 --steps 60 --eval_every 15 --max_new_tokens 100 {COMMON}"
TINY = "--problems 20 --prompts_per_step 2 --group_size 4 --steps 2 --save_every 0 --eval_every 0"
TINY += " --eval_problems 4 --max_new_tokens 12"

RL = {
    "rule-only": "--alpha 1",
    "rule-only, dr_grpo": "--alpha 1 --estimator dr_grpo",
    "ScalarPRM blend": "--prm {ScalarPRM}",
    "TDRM blend": "--prm {TDRM}",
    "TDRM blend, on-policy": "--prm {TDRM} --prm_lr 3e-4",
    "TDRM blend, dr_grpo": "--prm {TDRM} --estimator dr_grpo",
    "PRM-only": "--prm {TDRM} --alpha 0",
    "PRM-only, on-policy": "--prm {TDRM} --alpha 0 --prm_lr 3e-4",
    "rule-only, lr 3e-4": "--alpha 1 --lr 3e-4",
    "TDRM blend, lr 3e-4": "--prm {TDRM} --lr 3e-4",
    "TDRM blend, dr_grpo, lr 3e-4": "--prm {TDRM} --estimator dr_grpo --lr 3e-4",
}

SOME = "--accuracy 0.1 0.9"  # of 8 responses, one right is already something to learn from
PRIME = {  # {offline}: a PRM trained on the initial policy's samples
    "outcomes only": "--prm none",
    "PRIME": "",
    "double forward": "--update before",
    "offline PRM": "--update none --prm {offline}",
    "offline-trained PRM, online": "--prm {offline}",
    "policy reference": "--reference policy",
    "policy reference, offline-trained PRM, online": "--reference policy --prm {offline}",
    "no filter": "--accuracy 0 1",
    "REINFORCE, outcomes": "--estimator reinforce --prm none",
    "REINFORCE, PRIME": "--estimator reinforce",
    "GRPO, outcomes": "--estimator grpo --prm none",
    "GRPO, PRIME": "--estimator grpo",
    "PPO, outcomes": "--estimator ppo --prm none",
    "PPO, PRIME": "--estimator ppo",
    "PRIME as value model": "--estimator value",
    "control: shuffled over tokens": "--shuffle_process",
    "control: policy reference, offline-trained PRM, shuffled": (
        "--reference policy --prm {offline} --shuffle_process"
    ),
    "control: process weight 0": "--process_weight 0",
}
AGAIN = ("outcomes only", "policy reference, offline-trained PRM, online")
AGAIN += ("control: policy reference, offline-trained PRM, shuffled",)
SHORT = {  # {another}: the PRM that PRIME has trained under another seed
    "outcomes only": "--prm none",
    "PRIME": "",
    "policy reference": "--reference policy",
    "policy reference, another seed's PRM": "--reference policy --prm {another}",
}


def curves(study, script, settings, prefix, seeds=None):
    """Runs of an RL script on the hard level under every setting and seed -> {setting: {"curve": of
    each seed, and by_tens of what its metrics have}}."""
    base, outs, results = (
        f"{script} --model {study.policy(HARD)} {study.size(LIMITS, TINY)}",
        {},
        {},
    )
    for s in seeds or range(study.seeds):
        for name, options in study.choose(settings).items():
            out = f"{study.place}/{prefix}-{slug(name)}-{s}"
            outs.setdefault(name, {})[out] = f"{base} --seed {s} {options}"
    study.run({out: command for runs in outs.values() for out, command in runs.items()})
    for name, runs in outs.items():
        results[name] = {"curve": [curve(out) for out in runs]}
        steps = [metrics(out)[1:] for out in runs]  # the first row is the evaluation at the start
        for key in ("correct", "pair_accuracy", "prm_auroc", "truncated"):
            if key in steps[0][0]:
                results[name][key] = [by_tens(rows, key) for rows in steps]
    return results


def curve(out):
    """[[questions seen, pass@1, greedy]...] of a run."""
    with open(at(out, "config.json")) as f:
        a_step = json.load(f)["prompts_per_step"]
    rows = [row for row in metrics(out) if "pass@1" in row]
    rows.append(summary(out) | {"step": metrics(out)[-1]["step"]})
    return [[row["step"] * a_step, row["pass@1"], row["greedy"]] for row in rows]


def by_tens(steps, key):
    """Means of a metric over ten steps each; steps without it are left out."""
    means = []
    for i in range(0, len(steps), 10):
        ten = [row[key] for row in steps[i : i + 10] if row.get(key) is not None]
        means.append(round(float(np.mean(ten)), 4) if ten else math.nan)
    return means


def fill(settings, **paths):
    return {name: options.format(**paths) for name, options in settings.items()}


def rl(study):
    level, size = study.size(HARD, "builtin"), study.size("", "--problems 50")
    base = f"{TDRM} --model {study.policy(HARD)} --data {level} {size}"
    outs = {m: f"{study.place}/{m}-hard" for m in ("TDRM", "ScalarPRM")}
    study.run({out: f"{base} --method {m}" for m, out in outs.items()})
    settings = fill(RL, **{m: out + "/model" for m, out in outs.items()})
    return curves(study, "rl_minimal.py", settings, "rl")


def prime(study, settings=PRIME, seeds=None):
    offline = f"{study.place}/prime-offline"
    size = study.size(f"{LIMITS} --problems 5000 --prompts_per_step 32 --steps 150", TINY)
    base = f"prime_minimal.py --model {study.policy(HARD)} {size} {SOME} --eval_every 0"
    study.run({offline: f"{base} --seed 100 --lr 0"})  # the policy stays
    settings = fill(settings, offline=offline + "/prm")
    settings = {name: f"{SOME} {options}" for name, options in settings.items()}
    return curves(study, "prime_minimal.py", settings, "prime", seeds)


def prime_again(study):
    """The row that won, and what it is compared with, under seeds that nobody had seen when it was
    chosen; and under all."""
    rows, seeds = {name: PRIME[name] for name in AGAIN}, range(study.seeds, 2 * study.seeds)
    before, again = prime(study, rows), prime(study, rows, seeds)
    both = {name: {"curve": before[name]["curve"] + again[name]["curve"]} for name in again}
    return {"again": again, "all": both}


def short_runs(study):
    """PRIME on the default level, of half as many steps -> {(name, seed): folder}."""
    size = study.size(f"--steps 100 --eval_every 10 {COMMON}", TINY)
    base = f"prime_minimal.py --model {study.policy()} {size} {SOME}"
    outs, first, later = {}, {}, {}
    for s, (name, options) in itertools.product(range(study.seeds), SHORT.items()):
        out = outs[name, s] = f"{study.place}/short-{slug(name)}-{s}"
        another = f"{study.place}/short-prime-{(s + 1) % study.seeds}/prm"
        command = f"{base} --seed {s} {options.format(another=another)}"
        (later if "another" in options else first)[out] = command
    study.run(first)
    study.run(later)
    return outs


def prime_short(study):
    outs, results = short_runs(study), {}
    for (name, _), out in outs.items():
        results.setdefault(name, {"curve": []})["curve"].append(curve(out))
    return results


# --------------------------------------------------------------------------------------------------
# Reward models from pairs.

FEW = "--eval_problems 20"
KINDS = {
    "Q-RM": "--method Q-RM",
    "Q-RM, beta 0.2": "--method Q-RM --beta 0.2",
    "ORM": "--method ORM",
    "DPO-RM": "--method DPO-RM",
}


def qrm(study):
    """Reward models from pairs on the default level, and TDRM and PRIME's: pairs, best-of-n, first
    wrong step."""
    kinds, seeds, outs = study.choose(KINDS), range(study.seeds), {}
    size, commands = study.size("", f"--problems 40 --max_new_tokens 40 {FEW}"), {}
    base = f"qrm_minimal.py --model {study.policy()} --eval_every 0 {size}"
    for s, (name, options) in itertools.product(seeds, kinds.items()):
        out = outs[name, s] = f"{study.place}/{slug(name)}-{s}"
        commands[out] = f"{base} --seed {s} {options}"
    study.run(commands)
    tdrms, primes = study.reward_models(), short_runs(study)
    outs |= {("TDRM", s): tdrms["TDRM", s] for s in seeds}
    names, counts = [*kinds, "TDRM"], study.size((4, 8, 16, 32, 64), (4,))
    folders = [{name: outs[name, s] + "/model" for name in names} for s in seeds]
    rows = data.make_trajectories(data.make_problems(study.size(500, 60), "test"), 2, seed=1)
    columns = ("pair_accuracy", "first_wrong_step", "greedy", "best-of-n")
    results = {name: {column: [] for column in columns} for name in (*names, "PRIME")}
    for s, found in enumerate(study.search("qrm-search", folders, 64)):
        for name, folder in (folders[s] | {"PRIME": primes["PRIME", s] + "/prm"}).items():
            results[name]["first_wrong_step"].append(first_wrong_step(folder, rows))
        for name in names:
            best = [found["best-of-n", name, n] for n in counts]
            results[name]["greedy"].append(found["greedy search 8", name, 1])
            results[name]["best-of-n"].append(best)
        for name in kinds:
            results[name]["pair_accuracy"].append(summary(outs[name, s])["pair_accuracy"])
    return results


def first_wrong_step(folder, rows):
    """AUROC of "this is the first wrong step" from the fall of the reward model's value there."""
    examples, values, kind = step_values(folder, rows)
    if kind == "implicit":  # a sum of log-ratios is no probability
        values = [torch.logit(torch.tensor(v), eps=1e-7).tolist() for v in values]
    return qrm_chapter.localisation_auroc(values, [e.first_error for e in examples])


def qrm_rl(study):
    """REINFORCE and PPO with a reward model of each kind, trained on one set of pairs of the hard
    level's student solutions."""

    def solve():
        problems = data.make_problems(study.size(5000, 60), "train", 7, HARD)
        return data.make_trajectories(problems, 8, seed=7, level=HARD)

    path, names, settings = study.rows_file("samples-hard", solve), ("Q-RM", "ORM", "DPO-RM"), {}
    base = f"qrm_minimal.py --model {study.policy(HARD)} --pairs_from {path} --eval_every 0"
    outs = {name: f"{study.place}/{name}-hard" for name in names}
    study.run({out: f"{base} --method {m} {study.size('', FEW)}" for m, out in outs.items()})
    paid = "--credit token --alpha 0 --kl_reward 1 --group_size 1"
    for how, name in itertools.product(("REINFORCE", "PPO"), names):
        options = f"{paid} --estimator {how.lower()} --prm {outs[name]}/model"
        if how == "PPO":  # a Q is a return already
            options += f" --critic_lr 1e-3 --gamma {0 if name == 'Q-RM' else 0.9}"
        settings[f"{how}, {name}"] = options
    return curves(study, "rl_minimal.py", settings, "qrm-rl")


# --------------------------------------------------------------------------------------------------
# All together.

PARTS = {
    "tdrm": tdrm,
    "search": search,
    "sweep": sweep,
    "budget": budget,
    "rl": rl,
    "prime": prime,
    "prime-again": prime_again,
    "prime-short": prime_short,
    "qrm": qrm,
    "qrm-rl": qrm_rl,
}


def options():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}, readme; none: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--more", action="store_true", help="also rows that take it past two hours")
    parser.add_argument("--rows", nargs="+", help="only these rows of the tables")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS) - {"readme"}:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return args


def main():
    args = options()
    place, seeds = ("runs/quick", 1) if args.quick else ("runs/study", args.seeds)
    study = Study(place, seeds, args.jobs, args.more or args.quick, args.quick, args.rows)
    if args.quick:
        shutil.rmtree(at(place), ignore_errors=True)
    path, results = at("study", "results.json"), {}
    if not args.quick and os.path.exists(path):
        with open(path) as f:
            results = json.load(f)
    parts = args.parts or [part for part in PARTS if study.more or part not in MORE]
    for part in [part for part in parts if part != "readme"]:
        results[part] = results.get(part, {}) | PARTS[part](study)  # rows not run now stay
        for name, lines in tables.TABLES[part](results[part]):
            print(f"\n{name}\n{lines}", flush=True)
        if not args.quick:
            with open(path + ".tmp", "w") as f:
                json.dump(results, f, separators=(",", ":"))
            os.replace(path + ".tmp", path)
    if not args.quick:
        tables.write_page(results, at("study", "README.md"))
    figures.draw(results, at(place, "figures") if args.quick else at("study", "figures"))


if __name__ == "__main__":
    main()
