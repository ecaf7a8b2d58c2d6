"""Which of the three papers' claims hold in miniature? `python study/study.py [PART ...]`.

    tdrm         ScalarORM, ScalarPRM, TDRM on held-out solutions: smoothness, calibration, AUROC
    search       greedy search and best-of-n on 1000 held-out problems with those reward models
    targets      what n, lambda, gamma do, with step labels and from outcomes alone
    choice       several right steps, labelled right or wrong: are TD targets worth it there?
    choice-sweep what should make the difference larger, or vanish
    budget       search accuracy against the tokens spent on data, by what is bought and learned
    rl           rule-only, blended and PRM-only rewards on the hard level
    prime        PRIME against outcomes only, its design choices, and controls, on the hard level
    qrm          Q-RM, ORM and DPO-RM, TDRM beside them, from the same solutions
    qrm-rl       RL with a Q-RM, an ORM or a DPO-RM and no verifier, on the hard level
    readme       only write tables and figures again

Every run is a run of the project's own scripts with its own --seed, kept in runs/study and not
repeated while its .cost file is there: a stopped study goes on where it was. All figures go to
study/results.json, with the commit and the seconds of a core that they took, and from there into
study/README.md and study/figures (tables.py, figures.py). The study of real text is real.py.
`--quick` runs a few rows of everything, tiny, in runs/quick, and changes neither file.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field, replace

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
from tables import MEASURES, METHODS  # noqa: E402

HARD, CHOICE = "builtin-hard", "builtin-choice"
TDRM = "tdrm_minimal.py --eval_every 0"
SEARCH = "search_minimal.py --beam 1"
GREEDY = "--problems 500 --expand 8 --n 1"  # greedy search alone

# --------------------------------------------------------------------------------------------------
# Runs.


def execute(out, command, commit):
    """One run, in a process whose imports are done already; what it prints goes to `out`.log, what
    it cost to `out`.cost."""
    os.chdir(ROOT)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    data.LEVELS |= LEVELS
    sys.argv = [*command.split(), "--out", out, "--resume"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit:
        pass
    if not os.path.exists(os.path.join(out, "summary.json")):
        raise RuntimeError(f"{' '.join(sys.argv)} failed or was stopped, see {out}.log")
    with open(out + ".cost", "w") as f:
        json.dump({"core_seconds": time.process_time(), "commit": commit}, f)


@dataclass
class Study:
    """Where the runs are, and how large."""

    place: str
    seeds: int
    jobs: int
    quick: bool
    outs: set = field(default_factory=set)  # of all runs that were asked for

    def run(self, commands):
        """{out: command}: run what has not been run yet, `jobs` at a time."""
        self.outs |= set(commands)
        todo = {out: c for out, c in commands.items() if not os.path.exists(at(out + ".cost"))}
        if not todo:
            return
        command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        context = multiprocessing.get_context("forkserver")  # start-up is half of a short run
        modules = ["transformers.models.qwen2.modeling_qwen2", "prime_minimal", "qrm_minimal"]
        context.set_forkserver_preload(modules)
        executor = concurrent.futures.ProcessPoolExecutor
        bar = tqdm(total=len(todo), desc="runs")
        with executor(self.jobs, context, max_tasks_per_child=1) as pool, bar:
            runs = [pool.submit(execute, *item, commit) for item in todo.items()]
            try:
                for done in concurrent.futures.as_completed(runs):
                    done.result()
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def choose(self, settings):
        """The settings {row: options} to run: all, in a quick study the first and the last."""
        names = [*settings][:: max(1, len(settings) - 1)] if self.quick else settings
        return {name: settings[name] for name in names}

    def size(self, full, tiny):
        return tiny if self.quick else full

    def policy(self, level="builtin"):
        """The built-in policy of a level, trained first."""
        (folder,) = self.policies([(level, 0)]).values()
        return folder

    def policies(self, wanted):
        """[(level, seed)] -> {(level, seed): folder}, trained first: each from other solutions; of
        a level of the sweep from the policy of CHOICE on, which knows all but its facts."""
        outs, commands, size = {}, {}, self.size("", "--steps 30 --eval_problems 20")
        known = [(CHOICE, s) for level, s in wanted if level in LEVELS]
        known = self.policies(known) if known else {}
        for level, s in wanted:
            data_level = self.size(level, "builtin")
            name = data_level.removeprefix("builtin") + (f"-{s}" if s else "")
            out = outs[level, s] = f"{self.place}/sft{name}"
            options = f"{size} --lr 6e-3" if level.startswith(CHOICE) else size
            if level in LEVELS:
                options += f" --model {known[CHOICE, s]} --steps 300"
            commands[out] = f"sft_minimal.py --data {data_level} {options} --seed {s}"
        self.run(commands)
        return {key: out + "/model" for key, out in outs.items()}

    def learner(self, level="builtin"):
        """The command of a reward model from 32,000 labelled solutions, half the default."""
        source = f"--data {self.size(level, 'builtin')} --problems {self.size(8000, 50)}"
        return f"{TDRM} --model {self.policy(level)} {source}"

    def reward_models(self, settings):
        """{name: options} -> for each seed {name: its run}, trained first. Equal options share
        their runs."""
        base, outs, commands = self.learner(), [{} for _ in range(self.seeds)], {}
        for (name, options), s in itertools.product(settings.items(), range(self.seeds)):
            out = outs[s][name] = f"{self.place}/prm-{slug(options)}-{s}"
            commands[out] = f"{base} --seed {s} {options}"
        self.run(commands)
        return outs

    def rows_file(self, name, make):
        """`make`() -> rows, as a file of trajectories, once."""
        path = f"{self.place}/{name}.jsonl"
        keep = ("prompt", "completions", "labels", "answer", "correct")
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

    def search(self, name, trained, options):
        """For each seed {key: run of a reward model} -> for each seed {(method, key, samples):
        accuracy}, with the policy of the default level."""
        size = self.size(options, "--problems 4 --n 16 --expand 8")
        base, wanted = f"{SEARCH} --model {self.policy()} {size}", {}
        which = zlib.crc32(repr(sorted(trained[0])).encode())  # other reward models: another run
        for s, mine in enumerate(trained):
            wanted[f"{self.place}/{name}-{which:08x}-{s}"] = (f"{base} --seed {s}", mine)
        return self.searches(wanted)

    def searches(self, wanted):
        """{out: (command, {key: run of a reward model})} -> for each {(method, key, samples):
        accuracy}."""
        commands = {}
        for out, (command, trained) in wanted.items():
            prms = dict.fromkeys(f"{run}/model" for run in trained.values())
            commands[out] = f"{command} --prm {' '.join(prms)}"
        self.run(commands)
        return [accuracies(out, trained) for out, (_, trained) in wanted.items()]


def at(*names):
    return os.path.join(ROOT, *names)


def summary(out):
    with open(at(out, "summary.json")) as f:
        return json.load(f)


def accuracies(out, trained):
    """{(method, key, samples): accuracy} of a search run with reward models {key: run}."""
    names = {key: os.path.basename(run) for key, run in trained.items()}
    found = {}
    for row in summary(out)["rows"]:
        method, _, prm = row["method"].partition(", ")
        for key in [key for key, name in names.items() if name == prm] or [prm]:
            found[method, key, row["n"]] = row["accuracy"]
    return found


def measured(outs):
    """By which commit runs were made, and the seconds of a core that they took."""
    costs = []
    for out in outs:
        with open(at(out + ".cost")) as f:
            costs.append(json.load(f))
    commits = sorted({cost["commit"] for cost in costs})
    seconds = round(sum(cost["core_seconds"] for cost in costs))
    return {"commit": " ".join(commits), "core_seconds": seconds}


def save(results):
    """Into results.json: all of it or nothing."""
    path = at("study", "results.json")
    with open(path + ".tmp", "w") as f:
        json.dump(results, f, separators=(",", ":"))
    os.replace(path + ".tmp", path)


def metrics(out):
    with open(at(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def slug(name):
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


# --------------------------------------------------------------------------------------------------
# Reward models, and search with them.

THREE = {m: f"--method {m}" for m in METHODS}


def tdrm(study):
    trained, results = study.reward_models(THREE), {}
    for m in METHODS:
        found = [summary(mine[m]) for mine in trained]
        results[m] = {key: [one[key] for one in found] for key in MEASURES}
    problems, traces = data.make_problems(study.size(500, 60), "test"), {}
    rows = data.make_trajectories(problems, 2, 4, seed=1)
    for m in ("ScalarPRM", "TDRM"):
        examples, traces[m], _ = step_values(trained[0][m], rows)
    results["traces"] = []
    for title, i in tdrm_chapter.choose_three(examples):
        values = {m: [round(x, 3) for x in traces[m][i]] for m in traces}
        trace = {"title": title, "first_error": examples[i].first_error, "values": values}
        results["traces"].append(trace)
    return results


def step_values(run, rows):
    """-> the rows as Examples, a reward model's values of all their steps, its kind."""
    reward = load_reward_model(at(run, "model"), torch.float32)
    examples, _ = data.encode_rows(rows, reward.encode, 2048)
    return examples, reward.score_steps(examples, Processes()), reward.kind


def search(study):
    trained, results = study.reward_models(THREE), {}
    for found in study.search("search", trained, "--problems 1000 --n 32 --expand 2 4 8 16"):
        for (method, m, n), accuracy in found.items():
            name = f"{method}, {m}" if m else method
            results.setdefault(f"{name} @ {n}", []).append(accuracy)
    return results


# --------------------------------------------------------------------------------------------------
# What the targets do.

TARGETS = {
    "ScalarPRM": "--method ScalarPRM",
    "TDRM, n = 1": "--n_step 1",
    "TDRM, n = 3": "--method TDRM",
    "TDRM, lambda 0.9": "--lam 0.9",
    "TDRM, gamma 0.6": "--gamma 0.6",
    "outcomes only, TDRM n = 3": "--label_rollouts 0 --n_step 3",
    "outcomes only, TDRM n = T": "--label_rollouts 0",
}


def targets(study):
    """Every setting under every seed: its measures, and greedy search (b = 8)."""
    settings = study.choose(TARGETS)
    trained, results = study.reward_models(settings), {name: {} for name in settings}
    for mine, found in zip(trained, study.search("targets-search", trained, GREEDY)):
        for name, row in results.items():
            numbers = {measure: summary(mine[name]).get(measure) for measure in MEASURES}
            numbers["greedy"] = found["greedy search 8", name, 1]
            for key, number in numbers.items():
                row.setdefault(key, []).append(number)
    return results


# --------------------------------------------------------------------------------------------------
# When are TD targets worth it? A task in which right steps differ in promise, and labels that do
# not say so: 16,000 student solutions, each step labelled right or wrong.

SEARCHED = {f"greedy, b = {b}": (f"greedy search {b}", 1) for b in (2, 4, 8, 16)}
SEARCHED |= {f"best-of-{n}": ("best-of-n", n) for n in (4, 16)}
ONE_STEP, CONSTANT = "--n_step 1", "--correct 0.5 0.5 --wrong -0.5 -0.5"
CHOICE_SWEEP = {  # level, label kind, the TDRM's options; the ScalarPRM learns from the same labels
    "n = 1, as above": (CHOICE, "correct", ONE_STEP),
    "n = 3": (CHOICE, "correct", "--n_step 3"),
    "lambda 0.9": (CHOICE, "correct", "--lam 0.9"),
    "gamma 0.6": (CHOICE, "correct", ONE_STEP + " --gamma 0.6"),
    "rewards +-0.5 to the end": (CHOICE, "correct", f"{ONE_STEP} {CONSTANT}"),
    "label: share of 4 rollouts right": (CHOICE, "soft", ONE_STEP),
    "60% of the facts shaky": ("builtin-choice-more", "correct", ONE_STEP),
    "6 to 8 operations": ("builtin-choice-long", "correct", ONE_STEP),
    "in the order of the question": ("builtin-choice-order", "correct", ONE_STEP),
}
BASE = data.LEVELS[CHOICE]
LEVELS = {  # of the runs only
    "builtin-choice-more": replace(BASE, shaky=0.6),
    "builtin-choice-long": replace(BASE, operations=(6, 8)),
    "builtin-choice-order": replace(BASE, any_order=False),
}


def choice(study):
    """ScalarPRM and TDRM under twice the seeds, each with data and a policy of its own."""
    rows = {"n = 1": CHOICE_SWEEP["n = 1, as above"]}
    options = f"--problems {study.size(1000, 4)} --expand 2 4 8 16"
    found = contest(study, rows, range(2 * study.seeds), options, "choice")["n = 1"]
    results = {}
    for name, m in ("ScalarPRM", "ScalarPRM"), ("TDRM, n = 1", "TDRM"):
        results[name] = {title: [f[key] for f in found[m]] for title, key in SEARCHED.items()}
    return results


def choice_sweep(study):
    """What should make the difference larger or vanish: greedy search, b = 8."""
    rows, options = study.choose(CHOICE_SWEEP), f"--problems {study.size(1000, 4)} --expand 8 --n 1"
    found, results = contest(study, rows, range(study.seeds), options, "sweep"), {}
    for name, pair in found.items():
        results[name] = {m: [f["greedy search 8", 1] for f in mine] for m, mine in pair.items()}
    return results


def contest(study, rows, seeds, options, prefix):
    """{row: (level, label kind, TDRM's options)} -> {row: {"ScalarPRM", "TDRM": a list over the
    seeds of accuracies {(search, samples): share}}}."""
    trained, commands, wanted = {}, {}, {}
    rows = {row: (study.size(level, "builtin"), *rest) for row, (level, *rest) in rows.items()}
    levels = dict.fromkeys(level for level, *_ in rows.values())
    policies = study.policies([*itertools.product(levels, seeds)])
    size = study.size("--problems 4000 --steps 500", "--problems 50 --steps 4")
    methods = ("ScalarPRM", "TDRM")
    for (row, what), m, s in itertools.product(rows.items(), methods, seeds):
        level, kind, targets = what
        learner = f"--method {m} --label_kind {kind} {targets if m == 'TDRM' else ''}"
        out = f"{study.place}/{slug(level + learner)}-{s}"
        base = f"{TDRM} --model {policies[level, s]} --data {level} --seed {s} {size}"
        commands[out] = f"{base} {learner}"
        trained.setdefault((level, s), {})[row, m] = out
    study.run(commands)
    for (level, s), mine in trained.items():
        base = f"{SEARCH} --model {policies[level, s]} --data {level} --seed {s} {options}"
        wanted[f"{study.place}/{prefix}-{level}-{s}"] = (base, mine)
    results = {row: {m: [] for m in methods} for row in rows}
    for mine, found in zip(trained.values(), study.searches(wanted)):
        of_learner = {}
        for (search, learner, n), accuracy in found.items():
            of_learner.setdefault(learner, {})[search, n] = accuracy
        for row, m in mine:
            results[row][m].append(of_learner[row, m])
    return results


# --------------------------------------------------------------------------------------------------
# With a labelling budget, which reward model should I train?

BUDGETS = (100_000, 1_600_000)  # tokens sampled to make the data, labels included
LEARNERS = {  # what is bought, which script learns from it
    "ScalarPRM, step labels": ("steps", "tdrm", "ScalarPRM"),
    "TDRM, step labels": ("steps", "tdrm", "TDRM"),
    "TDRM, outcomes": ("outcomes", "tdrm", "TDRM"),
    "DPO-RM, outcomes": ("outcomes", "qrm", "DPO-RM"),
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


def learn(study, learners, budgets):
    """{name: learner} -> for each seed {(name, tokens): its run}, trained first."""
    outs, commands = [{} for _ in range(study.seeds)], {}
    for s, b, (name, learner) in itertools.product(range(study.seeds), budgets, learners.items()):
        kind, script, method = learner
        path = study.rows_file(f"{kind}-{b}-{s}", lambda: spend(b, kind, s))
        with open(at(path)) as f:
            rows = sum(1 for _ in f)
        if script == "tdrm":  # at most four passes, and half as many steps as by default
            steps, source = min(500, 4 * rows // 64), f"--data {path} --eval {study.held_out()}"
        else:
            steps, source = min(250, 2 * rows // 64), f"--pairs_from {path}"
        out = outs[s][name, b] = f"{study.place}/{slug(f'{kind} {method}')}-{b}-{s}"
        base = f"{script}_minimal.py --model {study.policy()} --eval_every 0 --seed {s}"
        steps = study.size(max(50, steps), 4)
        commands[out] = f"{base} --steps {steps} {source} --method {method}"
    study.run(commands)
    return outs


def budget(study):
    """Each learner at each budget: the accuracy of greedy search, b = 8."""
    learners, budgets = study.choose(LEARNERS), study.size(BUDGETS, [1000])
    results = {name: {} for name in learners}
    for found in study.search("budget-search", learn(study, learners, budgets), GREEDY):
        for name, b in itertools.product(learners, budgets):
            accuracy = found["greedy search 8", (name, b), 1]
            results[name].setdefault(str(b), []).append(accuracy)
    return results


# --------------------------------------------------------------------------------------------------
# Reinforcement learning.

COMMON = "--prompts_per_step 16 --eval_problems 300 --lr 2e-4 --no-decay --save_every 0"
LIMITS = f"--data {HARD} --problems 500 --steps 60 --eval_every 20 --max_new_tokens 100 {COMMON}"
TINY = "--problems 20 --prompts_per_step 2 --group_size 4 --steps 2 --save_every 0 --eval_every 0"
TINY += " --eval_problems 4 --max_new_tokens 12"

RL = {
    "rule-only": "--alpha 1",
    "ScalarPRM blend": "--prm {ScalarPRM}",
    "TDRM blend": "--prm {TDRM}",
    "PRM-only": "--prm {TDRM} --alpha 0",
}

SOME = "--accuracy 0.1 0.9"  # of 8 responses, one right is already something to learn from
PRIME = {
    "outcomes only": "--prm none",
    "PRIME": "",
    "GRPO": "--estimator grpo",
    "PRIME as value model": "--estimator value",
    "policy reference": "--reference policy",
}
TRAINED = {  # {offline}: a PRM trained on the initial policy's samples
    "offline PRM": "--update none --prm {offline}",
    "offline-trained PRM, online": "--prm {offline}",
    "policy reference, offline-trained PRM, online": "--reference policy --prm {offline}",
    "control: policy reference, offline-trained PRM, shuffled": (
        "--reference policy --prm {offline} --shuffle_process"
    ),
}
AGAIN = ("outcomes only", "policy reference, offline-trained PRM, online")
AGAIN += ("control: policy reference, offline-trained PRM, shuffled",)


def curves(study, script, settings, prefix, seeds, beside={}):
    """Runs of an RL script on the hard level under every setting and seed, other runs {out:
    command} beside them -> {setting: {"curve", and of PRIME the "pair_accuracy", of each seed}}."""
    base = f"{script} --model {study.policy(HARD)} {study.size(LIMITS, TINY)}"
    outs, results = {}, {}
    for s in seeds:
        for name, options in study.choose(settings).items():
            out = f"{study.place}/{prefix}-{slug(name)}-{s}"
            outs.setdefault(name, {})[out] = f"{base} --seed {s} {options}"
    study.run(beside | {out: command for runs in outs.values() for out, command in runs.items()})
    for name, runs in outs.items():
        results[name] = {"curve": [curve(out) for out in runs]}
        steps = [metrics(out)[1:] for out in runs]  # the first row is the evaluation at the start
        if any("pair_accuracy" in row for rows in steps for row in rows):
            results[name]["pair_accuracy"] = [by_tens(rows, "pair_accuracy") for rows in steps]
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
    outs = {m: f"{study.place}/{m}-hard" for m in ("TDRM", "ScalarPRM")}
    study.run({out: f"{study.learner(HARD)} --method {m}" for m, out in outs.items()})
    settings = fill(RL, **{m: out + "/model" for m, out in outs.items()})
    return curves(study, "rl_minimal.py", settings, "rl", range(study.seeds))


def prime(study):
    """All settings; those of AGAIN under as many other seeds too, which nobody had seen when the
    one that wins was chosen."""
    offline, script = f"{study.place}/prime-offline", f"prime_minimal.py {SOME}"
    size = study.size(f"{LIMITS} --problems 5000 --prompts_per_step 32 --steps 150", TINY)
    base = f"{script} --model {study.policy(HARD)} {size} --eval_every 0"
    first = {offline: f"{base} --seed 100 --lr 0"}  # the policy stays
    trained = fill(TRAINED, offline=offline + "/prm")
    results = curves(study, script, PRIME, "prime", range(study.seeds), first)
    results |= curves(study, script, trained, "prime", range(study.seeds))
    again = {name: (PRIME | trained)[name] for name in AGAIN}
    others = range(study.seeds, 2 * study.seeds)
    results["again"] = curves(study, script, again, "prime", others)
    return results


# --------------------------------------------------------------------------------------------------
# Reward models from pairs.

PAIRS = {m: ("outcomes", "qrm", m) for m in ("Q-RM", "ORM", "DPO-RM")}


def qrm(study):
    """Reward models from pairs of one set of solutions, and a TDRM from their outcomes: pairs, first
    wrong step, search."""
    learners = study.choose(PAIRS) | {"TDRM": LEARNERS["TDRM, outcomes"]}
    b, counts = study.size(BUDGETS[-1], 1000), (4, 16)
    trained, options = learn(study, learners, [b]), "--problems 500 --expand 8 --n 16"
    rows = data.make_trajectories(data.make_problems(study.size(500, 60), "test"), 2, seed=1)
    columns = ("pair_accuracy", "first_wrong_step", "greedy", "best-of-n")
    results = {name: {column: [] for column in columns} for name in learners}
    for mine, found in zip(trained, study.search("qrm-search", trained, options)):
        for name, row in results.items():
            best = [found["best-of-n", (name, b), n] for n in counts]
            row["greedy"].append(found["greedy search 8", (name, b), 1])
            row["best-of-n"].append(best)
            row["first_wrong_step"].append(first_wrong_step(mine[name, b], rows))
            if name in PAIRS:
                row["pair_accuracy"].append(summary(mine[name, b])["pair_accuracy"])
    return results


def first_wrong_step(run, rows):
    """AUROC of "this is the first wrong step" from the fall of the reward model's value there."""
    examples, values, kind = step_values(run, rows)
    if kind == "implicit":  # a sum of log-ratios is no probability
        values = [torch.logit(torch.tensor(v), eps=1e-7).tolist() for v in values]
    return qrm_chapter.localisation_auroc(values, [e.first_error for e in examples])


def qrm_rl(study):
    """REINFORCE with a reward model of each kind, trained on one set of pairs of the hard level's
    student solutions."""

    def solve():
        problems = data.make_problems(study.size(5000, 60), "train", 7, HARD)
        return data.make_trajectories(problems, 8, seed=7, level=HARD)

    path = study.rows_file("samples-hard", solve)
    base = f"qrm_minimal.py --model {study.policy(HARD)} --pairs_from {path} --eval_every 0"
    outs = {m: f"{study.place}/{m}-hard" for m in PAIRS}
    study.run({out: f"{base} --method {m} --steps {study.size(250, 4)}" for m, out in outs.items()})
    paid = "--credit token --alpha 0 --kl_reward 1 --group_size 1 --prm"
    settings = {name: f"{paid} {out}/model --estimator reinforce" for name, out in outs.items()}
    return curves(study, "rl_minimal.py", settings, "qrm-rl", range(study.seeds))


# --------------------------------------------------------------------------------------------------
# All together.

PARTS = {
    "tdrm": tdrm,
    "search": search,
    "targets": targets,
    "choice": choice,
    "choice-sweep": choice_sweep,
    "budget": budget,
    "rl": rl,
    "prime": prime,
    "qrm": qrm,
    "qrm-rl": qrm_rl,
}


def options():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}, readme; none: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time: one more than cores")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS) - {"readme"}:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return args


def main():
    args = options()
    place, seeds = ("runs/quick", 1) if args.quick else ("runs/study", args.seeds)
    if args.quick:
        shutil.rmtree(at(place), ignore_errors=True)
    path, results, outs = at("study", "results.json"), {}, set()
    if not args.quick and os.path.exists(path):
        with open(path) as f:
            results = json.load(f)
    if not args.parts:  # all policies at once: a core would idle beside the longest
        ours = [(HARD, 0), ("builtin", 0), *((CHOICE, s) for s in range(2 * seeds))]
        Study(place, seeds, args.jobs, args.quick).policies(ours)
    for part in [part for part in args.parts or PARTS if part != "readme"]:
        study = Study(place, seeds, args.jobs, args.quick)
        results[part] = PARTS[part](study)
        outs |= study.outs
        results.setdefault("measured", {})[part] = measured(study.outs)
        if not args.parts:  # parts share runs
            results["measured"]["all"] = measured(outs)
        for name, lines in tables.TABLES[part](results[part]):
            print(f"\n{name}\n{lines}", flush=True)
        if not args.quick:
            save(results)
    if not args.quick:
        tables.write_page(results, at("study", "README.md"))
    figures.draw(results, at(place, "figures") if args.quick else at("study", "figures"))


if __name__ == "__main__":
    main()
