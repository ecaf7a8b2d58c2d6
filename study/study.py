"""Which of the three papers' claims hold in miniature? `python tests/study.py [PART ...] [--seeds N] [--jobs J] [--quick]`.

    tdrm         ScalarORM, ScalarPRM and TDRM on held-out solutions: smoothness, AUROC, calibration, first error
    search       greedy search and best-of-n on 1000 held-out problems with those reward models
    sweep        what a TDRM and a ScalarPRM depend on: targets, label noise, whose solutions, their length
    budget       search accuracy against the tokens spent on training data, for every kind of reward model
    rl           rule-only, blended and PRM-only rewards on the hard level
    prime        PRIME against outcomes only, its design choices, and controls, on the hard level
    prime-again  the row of it that won, under five other seeds (+)
    prime-short  four of its rows on the default level
    qrm          Q-RM, ORM and DPO-RM, TDRM beside them: pairs, first wrong steps, greedy search and best-of-n
    qrm-rl       RL with a Q-RM, an ORM or a DPO-RM and no verifier, on the hard level

Every run is a run of the project's own scripts with its own --seed, kept in runs/study and not repeated while its
summary.json is there: a stopped study goes on where it was. All figures go to results.json, and from there into the
README, between <!-- study:NAME --> and <!-- end -->, and into figures/. Cells are mean ± half a 95% interval (Student's
t) over the seeds. Rows with a + (MORE) want --more: without them the study takes under two hours on two cores. `--quick`
runs everything small, in runs/quick, and changes neither file.
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
import sys
import zlib

import numpy as np
import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}  # of the runs
sys.path.insert(0, ROOT)
import data  # noqa: E402
import figures  # noqa: E402
import qrm_minimal  # noqa: E402
import tdrm_minimal  # noqa: E402
from plumbing import Env  # noqa: E402
from scorers import load_scorer  # noqa: E402

MORE = {
    "TDRM, lambda 0.9", "TDRM, gamma 0.6", "outcomes only, TDRM n = 3", "2 rollouts", "15% of the labels flipped",
    "TDRM, n = 2", "TDRM, gamma 1", "8 rollouts", "8 to 14 operations",
    "ScalarPRM blend", "TDRM blend, on-policy", "PRM-only, on-policy",
    "rule-only, lr 3e-4", "TDRM blend, lr 3e-4", "TDRM blend, dr_grpo, lr 3e-4",
    "double forward", "offline-trained PRM, online", "no filter", "REINFORCE, outcomes", "REINFORCE, PRIME",
    "GRPO, outcomes", "GRPO, PRIME", "PPO, outcomes", "PPO, PRIME", "PRIME as value model", "offline PRM",
    "control: shuffled over tokens", "control: process weight 0",
    "PPO, Q-RM", "PPO, ORM", "PPO, DPO-RM", "Q-RM, beta 0.2", "prime-again"}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t at 97.5%, by number of seeds


# --------------------------------------------------------------------------------------------------
# Runs.

def execute(out, command):
    """One run, in a process of its own whose imports are done already; what it prints goes to `out`.log."""
    os.chdir(ROOT)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [*map(str, command), "--out", out, "--resume"]
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)} failed, see {out}.log") from None


def run(args, commands):
    """Run scripts, `jobs` at a time with one thread each, those without a summary.json yet: [(out, [script, option...])...]."""
    todo = [c for c in commands if not os.path.exists(os.path.join(ROOT, c[0], "summary.json"))]
    if not todo:
        return
    context = multiprocessing.get_context("forkserver")  # start-up is half of a short run
    context.set_forkserver_preload(["transformers.models.qwen2.modeling_qwen2", "prime_minimal", "qrm_minimal"])
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context, max_tasks_per_child=1) as pool, \
            tqdm(total=len(todo), desc="runs") as bar:
        runs = [pool.submit(execute, *c) for c in todo]
        try:
            for done in concurrent.futures.as_completed(runs):
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summary(out):
    with open(os.path.join(ROOT, out, "summary.json")) as f:
        return json.load(f)


def metrics(out):
    with open(os.path.join(ROOT, out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def chosen(args, settings):
    """Of the settings {row: options} those to run now."""
    return {name: options for name, options in settings.items()
            if (name in args.settings if args.settings else args.more or name not in MORE)}


def slug(name):
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


def spread(numbers):
    """-> mean, half a 95% interval over seeds."""
    numbers = [x for x in numbers if x is not None and math.isfinite(x)]
    if len(numbers) < 2:
        return (numbers or [math.nan])[0], 0.0
    return float(np.mean(numbers)), T95.get(len(numbers), 1.96) * float(np.std(numbers, ddof=1)) / len(numbers)**0.5


def cell(numbers, digits=3):
    mean, half = spread(numbers)
    return "-" if math.isnan(mean) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(head, rows):
    line = lambda row: "| " + " | ".join(map(str, row)) + " |"  # noqa: E731
    rows = [[f"{row[0]} +" if row[0] in MORE else row[0], *row[1:]] for row in rows]
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


# --------------------------------------------------------------------------------------------------
# Reward models, and search with them.

METHODS = ("scalar_orm", "scalar_prm", "tdrm")
MEASURES = {"abs_delta_v": "mean abs dV", "lipschitz": "largest abs dV", "td_error_mean": "TD error",
            "auroc_second_last": "AUROC, second-last", "auroc_middle": "AUROC, middle",
            "calibration_error": "calibration error", "first_error_f1": "first-error F1"}


def policy(args, level="builtin"):
    out = args.place + "/sft" + level.removeprefix("builtin")
    run(args, [(out, ["sft_minimal.py", "--data", level, *(["--steps", "30", "--eval_problems", "50"] if args.quick else [])])])
    return out + "/model"


def reward_models(args):
    """Train every reward model under every seed -> {(method, seed): folder}."""
    model = policy(args)
    small = ["--problems", "300"] if args.quick else []
    folders = {(m, s): f"{args.place}/{m}-{s}" for m in METHODS for s in range(args.seeds)}
    run(args, [(out, ["tdrm_minimal.py", "--model", model, "--method", m, "--seed", str(s), "--eval_every", "0", *small])
               for (m, s), out in folders.items()])
    return folders


def step_values(folder, rows):
    """-> the rows as examples, and a reward model's values of all their steps."""
    tokenizer = data.load_tokenizer(os.path.join(ROOT, folder))
    model = load_scorer(os.path.join(ROOT, folder), torch.float32, tdrm_minimal.load_reward_model)
    examples = data.encode_rows(rows, tokenizer, 2048)[0]
    return examples, tdrm_minimal.score_rows(model, examples, tokenizer.pad_token_id, Env())


def tdrm(args):
    folders, seeds = reward_models(args), range(args.seeds)
    results = {m: {key: [summary(folders[m, s])[key] for s in seeds] for key in MEASURES} for m in METHODS}
    # value traces and TD errors by step, on the same held-out solutions
    rows = data.make_trajectories(data.make_problems(60 if args.quick else 500, "test"), 2, 4, seed=1)
    cfg, errors, values = tdrm_minimal.Config(), {}, {}
    for m, s in itertools.product(("scalar_prm", "tdrm"), seeds):
        examples, found = step_values(folders[m, s] + "/model", rows)
        values.setdefault(m, found)  # of the first seed
        for e, v in zip(examples, found):
            labels, mask = torch.tensor([e["labels"]]), torch.ones(1, len(v))
            r = tdrm_minimal.shaped_rewards(labels, mask, cfg.correct, cfg.wrong)[0].tolist()
            for t in range(len(v) - 1):
                errors.setdefault(m, {}).setdefault(t, []).append(abs(r[t] + cfg.gamma * v[t + 1] - v[t]))
    results["td_error_by_step"] = {m: [np.quantile(e[t], (0.05, 0.25, 0.5, 0.75, 0.95)).round(3).tolist() for t in sorted(e)]
                                   for m, e in errors.items()}
    results["traces"] = [{"title": title, "first_error": rows[i]["first_error"],
                          "values": {m: [round(x, 3) for x in values[m][i]] for m in values}}
                         for title, i in tdrm_minimal.choose_three(examples)]
    return results


def tdrm_tables(results):
    yield "tdrm", table(["method", *MEASURES.values()], [[m, *[cell(results[m][key]) for key in MEASURES]] for m in METHODS])


def search(args):
    folders = reward_models(args)
    outs = [f"{args.place}/search-{s}" for s in range(args.seeds)]
    size = ["--problems", "20", "--n", "8", "--expand", "2", "4"] if args.quick else \
        ["--problems", "1000", "--n", "64", "--expand", "2", "4", "8", "16"]
    run(args, [(out, ["search_minimal.py", "--model", policy(args), "--beam", "1", "--seed", str(s), *size, "--prm",
                      *[f"{folders[m, s]}/model" for m in METHODS]]) for s, out in enumerate(outs)])
    rows = [{(re.sub(r"-\d+$", "", r["method"]), r["n"]): r["accuracy"] for r in summary(out)["rows"]} for out in outs]
    return {f"{m} @ {n}": [row[m, n] for row in rows] for m, n in rows[0]}


def search_tables(results):
    for name, title, keys in (("greedy-search", "greedy search, b =", [("greedy search {}, {} @ 1", b) for b in (2, 4, 8, 16)]),
                              ("best-of-n", "best-of-n, n =", [("best-of-n, {1} @ {0}", n) for n in (4, 8, 16, 32, 64)])):
        yield name, table([title, *[str(n) for _, n in keys]],
                          [[m, *[cell(results.get(key.format(n, m), [])) for key, n in keys]] for m in METHODS])


# --------------------------------------------------------------------------------------------------
# What the reward models depend on. All trained on 32,000 trajectories (half the default), unless it says otherwise.

TARGETS = {"ScalarPRM": ["--method", "scalar_prm"],
           "TDRM, n = 1": ["--n_step", "1"], "TDRM, n = 2": ["--n_step", "2"], "TDRM, n = 3": [],
           "TDRM, lambda 0.9": ["--lam", "0.9"], "TDRM, lambda 1": ["--lam", "1"],
           "TDRM, gamma 0.6": ["--gamma", "0.6"], "TDRM, gamma 1": ["--gamma", "1"],
           "TDRM, rewards +-0.5 constant": ["--correct", "0.5", "0.5", "--wrong", "-0.5", "-0.5"],
           "TDRM, no step rewards": ["--correct", "0", "0", "--wrong", "0", "0", "--gamma", "1"],
           "outcomes only, TDRM n = 3": ["--label_rollouts", "0", "--n_step", "3"],
           "outcomes only, TDRM n = T": ["--label_rollouts", "0"]}
CONDITIONS = {"1 rollout a label": ["--label_rollouts", "1"], "2 rollouts": ["--label_rollouts", "2"], "4 rollouts": [],
              "8 rollouts": ["--label_rollouts", "8"], "15% of the labels flipped": "flip0.15", "30% flipped": "flip0.3",
              "another student's solutions": "other", "8 to 14 operations": "builtin-hard"}


def write_rows(args, name, make):
    """`make`() -> rows, as a file of trajectories, once."""
    path = f"{args.place}/{name}.jsonl"
    if not os.path.exists(os.path.join(ROOT, path)):
        os.makedirs(os.path.join(ROOT, args.place), exist_ok=True)
        with open(os.path.join(ROOT, path + ".tmp"), "w") as f:
            keep = ("prompt", "completions", "labels", "answer", "correct")
            f.writelines(json.dumps({key: row[key] for key in keep if row.get(key) is not None}) + "\n" for row in make())
        os.replace(os.path.join(ROOT, path + ".tmp"), os.path.join(ROOT, path))
    return path


def held_out(args):
    return write_rows(args, "held-out", lambda: data.make_trajectories(data.make_problems(1000, "test"), 2, 4, seed=1))


def solutions(args, kind, seed):
    """Options for training on solutions with flipped labels, or of a student whose habits the policy does not have."""
    def make():
        problems = data.make_problems(200 if args.quick else 8000, "train", seed)
        rows = data.make_trajectories(problems, 4, 4, seed=seed, level="builtin-hard" if kind == "other" else "builtin")
        rng = random.Random(seed)
        for row in rows if kind != "other" else []:
            row["labels"][:-1] = [1 - x if rng.random() < float(kind.removeprefix("flip")) else x for x in row["labels"][:-1]]
        return rows
    return ["--data", write_rows(args, f"{kind}-{seed}", make), "--eval", held_out(args)]


def search_with(args, name, folders, n, level="builtin"):
    """One search run a seed over its reward models {key: folder}; greedy search at b = 8 and n samples
    -> for each seed {(method, key, samples): accuracy}."""
    size = ["--problems", "10", "--n", "4"] if args.quick else ["--problems", "500", "--n", str(n)]
    which = zlib.crc32(repr(sorted(folders[0])).encode())  # a run over other reward models is another run
    outs = [f"{args.place}/{name}-{which:08x}-{s}" for s in range(args.seeds)]
    run(args, [(out, ["search_minimal.py", "--model", policy(args, level), "--data", level, "--beam", "1", "--expand", "8",
                      "--seed", str(s), *size, "--prm", *folders[s].values()]) for s, out in enumerate(outs)])
    found = []
    for s, out in enumerate(outs):
        keys = {re.sub("/model$", "", folder).split("/")[-1]: key for key, folder in folders[s].items()}
        rows = [(*row["method"].partition(", ")[::2], row["n"], row["accuracy"]) for row in summary(out)["rows"]]
        found.append({(method, keys.get(prm, prm), count): accuracy for method, prm, count, accuracy in rows})
    return found


def sweep(args):
    """Every setting under every seed: its measures, and greedy search (b = 8) and best-of-16 with it."""
    settings = {(name, ""): options for name, options in chosen(args, TARGETS).items()}
    settings |= {(name, method): options for name, options in chosen(args, CONDITIONS).items() if options
                 for method in ("scalar_prm", "tdrm")}
    settings = {key: settings[key] for key in list(settings)[::5]} if args.quick else settings
    level = lambda options: options if options == "builtin-hard" else "builtin"  # noqa: E731
    outs, commands = {}, []
    for s in range(args.seeds):
        for (name, method), options in settings.items():
            out = outs[name, method, s] = f"{args.place}/sweep-{slug(name + ' ' + method)}-{s}"
            model = policy(args, level(options))
            if isinstance(options, str):
                options = solutions(args, options, s) if level(options) == "builtin" else ["--data", options]
            commands.append((out, ["tdrm_minimal.py", "--model", model, "--seed", str(s), "--eval_every", "0",
                                   "--problems", "200" if args.quick else "8000",
                                   *(["--method", method] if method else []), *options]))
    run(args, commands)
    results = {}
    for wanted in data.LEVELS:
        keys = [key for key, options in settings.items() if level(options) == wanted]
        folders = [{key: outs[*key, s] + "/model" for key in keys} for s in range(args.seeds)]
        for s, found in enumerate(search_with(args, "sweep-search", folders, 16, wanted) if keys else ()):
            for key in keys:
                row = results.setdefault("|".join(key), {measure: [] for measure in ("greedy", "best-of-n", *MEASURES)})
                row["greedy"].append(found["greedy search 8", key, 1])
                row["best-of-n"].append(found["best-of-n", key, 4 if args.quick else 16])
                for measure in MEASURES:
                    row[measure].append(summary(outs[*key, s]).get(measure))
    return results


def sweep_tables(results):
    some = ("abs_delta_v", "lipschitz", "auroc_second_last", "calibration_error")
    keys = {"greedy": "greedy search, b = 8", "best-of-n": "best-of-16"} | {key: MEASURES[key] for key in some}
    base = results.get("ScalarPRM|", {}).get("greedy")
    less = lambda a, b: cell([x - y for x, y in zip(a, b)]) if a and b else ""  # noqa: E731
    yield "targets", table(["targets", *keys.values(), "greedy minus ScalarPRM's"], [
        [name, *[cell(results[name + "|"][key]) for key in keys], less(results[name + "|"]["greedy"], base)]
        for name in TARGETS if name + "|" in results])
    pair = {name: [results.get(f"{name}|{m}") for m in ("scalar_prm", "tdrm")] for name in CONDITIONS}
    pair["4 rollouts"] = [results.get("ScalarPRM|"), results.get("TDRM, n = 3|")]
    yield "conditions", table(
        ["step labels", "ScalarPRM, greedy", "TDRM, greedy", "TDRM minus ScalarPRM", "ScalarPRM, abs dV", "TDRM, abs dV"],
        [[name, cell(a["greedy"]), cell(b["greedy"]), less(b["greedy"], a["greedy"]), cell(a["abs_delta_v"]),
          cell(b["abs_delta_v"])] for name, (a, b) in pair.items() if a and b])


# --------------------------------------------------------------------------------------------------
# With a labelling budget, which reward model should I train?

BUDGETS = (100_000, 400_000, 1_600_000)  # tokens sampled to make the training data, labels included
LEARNERS = {"ScalarPRM, step labels": ("steps", "tdrm", ["--method", "scalar_prm"]),
            "TDRM, step labels": ("steps", "tdrm", []),
            "TDRM, outcomes": ("outcomes", "tdrm", []),
            "ScalarORM, outcomes": ("outcomes", "tdrm", ["--method", "scalar_orm"]),
            "implicit PRM (DPO), outcomes": ("outcomes", "qrm", ["--method", "dpo_rm"]),
            "Q-RM, outcomes": ("outcomes", "qrm", ["--method", "qrm"])}


def spend(budget, kind, seed):
    """Solutions bought with `budget` tokens -> rows. Of "outcomes" a row costs its own tokens; of "steps", also those of
    the 4 rollouts from each of its prefixes. Every token of a built-in step is one character, its blank line one more."""
    questions, spent, rows = iter(data.make_problems(40_000, "train", seed)), 0, []
    length = lambda row: sum(len(step) + 1 for step in row["completions"]) - 6  # noqa: E731  \boxed{ is one token
    while spent < budget:
        problem = next(questions)
        for row in data.make_trajectories([problem], 8 if kind == "outcomes" else 4, 4 if kind == "steps" else 0,
                                          seed=f"{seed} {problem['question']}"):
            rest = np.cumsum([len(step) + 1 for step in reversed(row["completions"])])[:-1] - 6  # after each prefix
            spent += length(row) + (4 * int(rest.sum()) if kind == "steps" else 0)
            rows.append(row)
    return rows


def budget(args):
    """Each learner at each budget: greedy search (b = 8) and best-of-16."""
    budgets = [b // 100 for b in BUDGETS[:2]] if args.quick else BUDGETS
    outs, commands = {}, []
    for s, b, kind in itertools.product(range(args.seeds), budgets, ("steps", "outcomes")):
        path = write_rows(args, f"{kind}-{b}-{s}", lambda: spend(b, kind, s))
        with open(os.path.join(ROOT, path)) as f:
            rows = sum(1 for _ in f)
        for name, (wanted, script, options) in LEARNERS.items():
            if wanted != kind:
                continue
            out = outs[name, b, s] = f"{args.place}/budget-{slug(name)}-{b}-{s}"
            if script == "tdrm":  # at most four passes, and half as many steps as by default
                options = ["--data", path, "--eval", held_out(args), *options]
                steps = min(500, 4 * rows // 64)
            else:
                options, steps = ["--pairs_from", path, *options], min(250, 2 * rows // 64)
            commands.append((out, [f"{script}_minimal.py", "--model", policy(args), "--eval_every", "0", "--seed", str(s),
                                   "--steps", "4" if args.quick else str(max(50, steps)), *options]))
    run(args, commands)
    results = {name: {str(b): {"greedy": [], "best-of-n": []} for b in budgets} for name in LEARNERS}
    folders = [{key[:2]: f"{out}/model" for key, out in outs.items() if key[2] == s} for s in range(args.seeds)]
    for found in search_with(args, "budget-search", folders, 16):
        for name, b in itertools.product(LEARNERS, budgets):
            results[name][str(b)]["greedy"].append(found["greedy search 8", (name, b), 1])
            results[name][str(b)]["best-of-n"].append(found["best-of-n", (name, b), 4 if args.quick else 16])
    return results


def budget_tables(results):
    budgets = list(next(iter(results.values())))
    for what, title in (("greedy", "greedy search, b = 8"), ("best-of-n", "best-of-16")):
        yield f"budget-{what}", table([title + "; tokens spent on data:", *[f"{int(b):,}" for b in budgets]],
                                      [[name, *[cell(results[name][b][what]) for b in budgets]] for name in results])


# --------------------------------------------------------------------------------------------------
# Reinforcement learning.

QUIET = ["--show_every", "0", "--save_every", "0"]
COMMON = ["--prompts_per_step", "16", "--eval_problems", "300", "--lr", "2e-4", "--no-decay", *QUIET]
LIMITS = ["--data", "builtin-hard", "--problems", "500", "--steps", "60", "--eval_every", "15", "--max_new_tokens", "100", *COMMON]
SMALL = ["--data", "builtin-hard", "--problems", "40", "--prompts_per_step", "2", "--group_size", "4", "--steps", "2",
         "--eval_every", "0", "--eval_problems", "8", *QUIET]

RL = {"rule-only": ["--alpha", "1"],
      "rule-only, dr_grpo": ["--alpha", "1", "--estimator", "dr_grpo"],
      "ScalarPRM blend": ["--prm", "scalar_prm"],
      "TDRM blend": ["--prm", "tdrm"],
      "TDRM blend, on-policy": ["--prm", "tdrm", "--prm_lr", "3e-4"],
      "TDRM blend, dr_grpo": ["--prm", "tdrm", "--estimator", "dr_grpo"],
      "PRM-only": ["--prm", "tdrm", "--alpha", "0"],
      "PRM-only, on-policy": ["--prm", "tdrm", "--alpha", "0", "--prm_lr", "3e-4"],
      "rule-only, lr 3e-4": ["--alpha", "1", "--lr", "3e-4"],
      "TDRM blend, lr 3e-4": ["--prm", "tdrm", "--lr", "3e-4"],
      "TDRM blend, dr_grpo, lr 3e-4": ["--prm", "tdrm", "--estimator", "dr_grpo", "--lr", "3e-4"]}

OFF = ["--prm", "none"]
SOME = ["--accuracy", "0.1", "0.9"]  # of 8 responses, one right is already something to learn from
PRIME = {"outcomes only": OFF,
         "PRIME": [],
         "double forward": ["--update", "before"],
         "offline PRM": ["--update", "none", "--prm", "offline"],  # trained on the initial policy's samples
         "offline-trained PRM, online": ["--prm", "offline"],
         "policy reference": ["--reference", "policy"],
         "policy reference, offline-trained PRM, online": ["--reference", "policy", "--prm", "offline"],
         "no filter": ["--accuracy", "0", "1"],
         "REINFORCE, outcomes": ["--estimator", "reinforce", *OFF], "REINFORCE, PRIME": ["--estimator", "reinforce"],
         "GRPO, outcomes": ["--estimator", "grpo", *OFF], "GRPO, PRIME": ["--estimator", "grpo"],
         "PPO, outcomes": ["--estimator", "ppo", *OFF], "PPO, PRIME": ["--estimator", "ppo"],
         "PRIME as value model": ["--estimator", "value"],
         "control: shuffled over tokens": ["--shuffle_process"],
         "control: policy reference, offline-trained PRM, shuffled":
             ["--reference", "policy", "--prm", "offline", "--shuffle_process"],
         "control: process weight 0": ["--process_weight", "0"]}


def curves(args, script, settings, prefix, first_seed=0, first=()):
    """Runs of an RL script on the hard level under every setting and seed -> {setting: {"curve": of each seed, and means
    over ten steps of what the run's metrics have: key: of each seed}}. `first`: runs whose folders some settings name."""
    size, model, settings = SMALL if args.quick else LIMITS, policy(args, "builtin-hard"), chosen(args, settings)
    settings = dict(list(settings.items())[:4]) if args.quick else settings
    seeds = range(first_seed, first_seed + args.seeds)
    outs = {(name, s): f"{args.place}/{prefix}-{slug(name)}-{s}" for s in seeds for name in settings}
    commands = [(out, [script, "--model", model, *size, "--seed", str(s), *settings[name]]) for (name, s), out in outs.items()]
    waits = lambda options: any(o.startswith(out) for o in options for out, _ in first)  # noqa: E731
    run(args, [*first, *(c for c in commands if not waits(c[1]))])
    run(args, commands)
    results = {}
    for name in settings:
        folders = [outs[name, s] for s in seeds]
        results[name] = {"curve": [curve(out) for out in folders]}
        steps = [metrics(out)[1:] for out in folders]  # the first row is the evaluation before training
        for key in ("verifiable", "pair_accuracy", "prm_auroc", "truncated"):
            if any(key in row for row in steps[0]):
                results[name][key] = [by_tens(rows, key) for rows in steps]
    return results


def curve(out):
    """[[questions seen, pass@1, greedy]...] of a run."""
    rows = metrics(out)
    rows = [row for row in rows if "pass@1" in row] + [summary(out) | {"questions": rows[-1]["questions"]}]
    return [[row.get("questions", 0), row["pass@1"], row["greedy"]] for row in rows]


def by_tens(steps, key):
    """Means of a metric over ten steps each; steps without it are left out."""
    tens = [[row[key] for row in steps[i:i + 10] if row.get(key) is not None] for i in range(0, len(steps), 10)]
    return [round(float(np.mean(ten)), 4) if ten else math.nan for ten in tens]


def rl(args):
    model, small = policy(args, "builtin-hard"), ["--problems", "300"] if args.quick else []
    paths = {m: f"{args.place}/{m}-hard/model" for m in ("tdrm", "scalar_prm")}
    run(args, [(f"{args.place}/{m}-hard", ["tdrm_minimal.py", "--model", model, "--data", "builtin-hard", "--method", m,
                                           "--eval_every", "0", *small]) for m in paths])
    return curves(args, "rl_minimal.py", {name: [paths.get(o, o) for o in options] for name, options in RL.items()}, "rl")


def prime(args, settings=PRIME, first_seed=0):
    offline = f"{args.place}/prime-offline"  # a PRM trained on the initial policy's samples alone: the policy's lr is 0
    size = SMALL if args.quick else [*LIMITS, "--problems", "5000", "--prompts_per_step", "32", "--steps", "150"]
    first = [(offline, ["prime_minimal.py", "--model", policy(args, "builtin-hard"), *size, *SOME, "--eval_every", "0",
                        "--seed", "100", "--lr", "0"])]
    settings = {name: [*SOME, *(offline + "/prm" if o == "offline" else o for o in options)]
                for name, options in settings.items()}
    return curves(args, "prime_minimal.py", settings, "prime", first_seed, first)


def prime_again(args):
    """The row that won, and what it is compared with, under seeds that nobody had seen when it was chosen; and under all."""
    rows = {name: PRIME[name] for name in ("outcomes only", "policy reference, offline-trained PRM, online",
                                           "control: policy reference, offline-trained PRM, shuffled")}
    before, again = (prime(args, rows, first_seed) for first_seed in (0, args.seeds))
    return {"again": again, "all": {name: {"curve": before[name]["curve"] + again[name]["curve"]} for name in rows}}


SHORT = {"outcomes only": OFF, "PRIME": [], "policy reference": ["--reference", "policy"],
         "policy reference, another seed's PRM": ["--reference", "policy", "--prm", "another"]}
SHORT_LIMITS = ["--steps", "100", "--eval_every", "10", *COMMON, *SOME]


def short_runs(args):
    """PRIME on the default level, where responses have half as many steps -> {(name, seed): folder}."""
    outs = {(name, s): f"{args.place}/short-{slug(name)}-{s}" for s in range(args.seeds) for name in SHORT}
    for later in (False, True):  # a PRM that is trained is one that PRIME has trained, under another seed
        trained = {s: outs["PRIME", (s + 1) % args.seeds] + "/prm" for s in range(args.seeds)}
        run(args, [(out, ["prime_minimal.py", "--model", policy(args), *(SMALL[2:] if args.quick else SHORT_LIMITS),
                          "--seed", str(s), *[trained[s] if o == "another" else o for o in SHORT[name]]])
                   for (name, s), out in outs.items() if ("another" in SHORT[name]) == later])
    return outs


def prime_short(args):
    outs = short_runs(args)
    return {name: {"curve": [curve(outs[name, s]) for s in range(args.seeds)]} for name in SHORT}


KINDS = {"Q-RM": ["--method", "qrm"], "Q-RM, beta 0.2": ["--method", "qrm", "--beta", "0.2"], "ORM": ["--method", "orm"],
         "DPO-RM": ["--method", "dpo_rm"]}


def qrm(args):
    """Reward models from pairs on the default level, and TDRM and PRIME's: pairs, best-of-n, first wrong step."""
    seeds, kinds = range(args.seeds), chosen(args, KINDS)
    small = ["--problems", "200", "--eval_problems", "60"] if args.quick else []
    outs = {(name, s): f"{args.place}/{slug(name)}-{s}" for s in seeds for name in kinds}
    run(args, [(out, ["qrm_minimal.py", "--model", policy(args), "--eval_every", "0", "--seed", str(s), *small, *kinds[name]])
               for (name, s), out in outs.items()])
    tdrms, primes = reward_models(args), short_runs(args)
    rows = data.make_trajectories(data.make_problems(60 if args.quick else 500, "test"), 2, seed=1)
    results = {name: {"pair_accuracy": [], "first_wrong_step": [], "greedy": [], "best-of-n": []}
               for name in (*kinds, "TDRM", "PRIME")}
    folders = [{name: outs[name, s] + "/model" for name in kinds} | {"TDRM": tdrms["tdrm", s] + "/model"} for s in seeds]
    for s, found in enumerate(search_with(args, "qrm-search", folders, 64)):
        for name, folder in (folders[s] | {"PRIME": primes["PRIME", s] + "/prm"}).items():
            row = results[name]
            row["first_wrong_step"].append(first_wrong_step(folder, name, rows))
            if name in folders[s]:
                row["greedy"].append(found["greedy search 8", name, 1])
                row["best-of-n"].append([found["best-of-n", name, n] for n in ((4,) if args.quick else (4, 8, 16, 32, 64))])
            if name in kinds:
                row["pair_accuracy"].append(summary(outs[name, s])["pair_accuracy"])
    return results


def first_wrong_step(folder, kind, rows):
    """AUROC of "this is the first wrong step" from the fall of the reward model's value there."""
    examples, values = step_values(folder, rows)
    if kind in ("PRIME", "DPO-RM"):  # a sum of log-ratios is no probability
        values = [torch.logit(torch.tensor(v), eps=1e-7).tolist() for v in values]
    return qrm_minimal.localisation_auroc(values, [e["first_error"] for e in examples])


def qrm_rl(args):
    """REINFORCE and PPO with a reward model of each kind, trained on one set of pairs of the hard level's student solutions."""
    model, names = policy(args, "builtin-hard"), {"Q-RM": "qrm", "ORM": "orm", "DPO-RM": "dpo_rm"}
    def solve():
        problems = data.make_problems(60 if args.quick else 5000, "train", 7, "builtin-hard")
        return data.make_trajectories(problems, 8, seed=7, level="builtin-hard")
    pairs = ["--pairs_from", write_rows(args, "samples-hard", solve)]
    run(args, [(f"{args.place}/{m}-hard", ["qrm_minimal.py", "--model", model, "--method", m, "--eval_every", "0", *pairs])
               for m in names.values()])
    return curves(args, "qrm_minimal.py", {f"{how}, {name}": ["--rl", how.lower(), "--rm", f"{args.place}/{m}-hard/model"]
                                           for how in ("REINFORCE", "PPO") for name, m in names.items()}, "qrm-rl")


def qrm_tables(results):
    yield "qrm", table(["reward model", "pair accuracy", "AUROC of the first wrong step", "greedy search, b = 8",
                        *[f"best-of-{n}" for n in (4, 8, 16, 32, 64)]],
                       [[name, *[cell(r[key]) if r[key] else "" for key in ("pair_accuracy", "first_wrong_step", "greedy")],
                         *([cell(column) for column in zip(*r["best-of-n"])] or [""] * 5)] for name, r in results.items()])


def first_at(curve, accuracy):
    """Questions after which a curve first reaches an accuracy, interpolated; None if it never does."""
    for (q0, a0, *_), (q1, a1, *_) in zip(curve, curve[1:]):
        if a0 < accuracy <= a1:
            return q0 + (q1 - q0) * (accuracy - a0) / (a1 - a0)
    return None


def curve_table(results, baseline, rising=True):
    """Final accuracies; the gain over a baseline, paired by seed; questions until 0.9 of the table's best gain, and, where the
    baseline is `rising`, until its own final accuracy; means over the seeds that get there."""
    best = max(np.mean([c[-1][1] for c in r["curve"]]) for r in results.values())
    begin = np.mean([c[0][1] for r in results.values() for c in r["curve"]])
    rows = []
    for name, r in results.items():
        finals = [c[-1][1] for c in r["curve"]]
        base = [c[-1][1] for c in results.get(baseline, r)["curve"]]
        reach = []
        for goals in [[begin + 0.9 * (best - begin)] * len(finals), base][:1 + rising]:
            hit = [x for x in map(first_at, r["curve"], goals) if x is not None]
            reach.append(f"{np.mean(hit):.0f} ({len(hit)}/{len(finals)})" if hit else f"never (0/{len(finals)})")
        rows.append([name, cell(finals), cell([c[-1][2] for c in r["curve"]]),
                     "" if name == baseline else cell([x - y for x, y in zip(finals, base)]), *reach])
    return table(["rewards", "pass@1", "greedy", f"pass@1 minus {baseline}", "questions to 0.9 of the best gain",
                  f"questions to the end of {baseline}"][:5 + rising], rows)


def by_step(runs):
    """Means over ten steps, at the begin, in the middle and at the end, as cells."""
    return [cell([run[i] for run in runs]) for i in (0, 2, 5) if i < len(runs[0])]


TENS = [f"steps {i}-{i + 9}" for i in (1, 21, 51)]


def rl_tables(results):
    yield "rl", curve_table(results, "rule-only")
    yield "rl-auroc", table(["rewards", *TENS, "truncated at the end"], [
        [name, *by_step(r["prm_auroc"]), cell([run[-1] for run in r["truncated"]])] for name, r in results.items() if "prm_auroc" in r])


def prime_tables(results):
    yield "prime", curve_table(results, "outcomes only")
    yield "prime-pairs", table(["PRM", *TENS], [
        [name, *by_step(results[name]["pair_accuracy"])]
        for name in ("PRIME", "double forward", "offline PRM", "offline-trained PRM, online", "policy reference",
                     "policy reference, offline-trained PRM, online")
        if "pair_accuracy" in results.get(name, ())])


# --------------------------------------------------------------------------------------------------
# All together.

def draw(results):
    """All figures that the results allow, to figures/. A title says what the committed results show."""
    at = lambda name: os.path.join(ROOT, "figures", name + ".svg")  # noqa: E731
    if found := results.get("tdrm"):
        figures.traces(at("traces"), "TDRM's values look ahead\nalong three held-out solutions", found["traces"], "step", "value")
        figures.boxes(at("td-error"), "TD errors hardly differ\nby step: quantiles 5, 25, 50, 75, 95%; cut at 1",
                      found["td_error_by_step"], "step", "TD error")
    if found := results.get("search"):
        across = lambda key, xs: {m: [(x, *spread(found[key.format(x, m)])) for x in xs] for m in METHODS}  # noqa: E731
        alone = ("one sample", spread(found["pass@1 @ 1"])[0])
        figures.lines(at("greedy-search"), "Search wants a value for every step\ngreedy search on 1000 held-out problems; "
                      "95% intervals", across("greedy search {}, {} @ 1", (2, 4, 8, 16)), "next steps sampled from each prefix",
                      "accuracy", log_x=True, level=alone)
        figures.lines(at("best-of-n"), "The best of many samples is the reward model's worst error\nbest-of-n on 1000 held-out "
                      "problems; 95% intervals", across("best-of-n, {1} @ {0}", (2, 4, 8, 16, 32, 64)), "samples", "accuracy",
                      log_x=True, level=alone)
    if found := results.get("budget"):
        figures.lines(at("budget"), "For the same tokens, outcomes teach more than step labels\ngreedy search, b = 8, on "
                      "500 held-out problems; 95% intervals",
                      {name: [(int(b), *spread(r["greedy"])) for b, r in rows.items()] for name, rows in found.items()},
                      "tokens sampled for data and labels", "accuracy", log_x=True)
    for part, finding, names in (
            ("rl", "A reward model alone is gamed; blended with the verifier, it does not help",
             [name for name in RL if "lr 3e-4" not in name]),
            ("prime", "PRIME gains with the policy as reference and a trained PRM",
             ["outcomes only", "PRIME", "offline PRM", "policy reference", "policy reference, offline-trained PRM, online",
              "control: policy reference, offline-trained PRM, shuffled"]),
            ("qrm-rl", "Of reward models from pairs, the log-ratio teaches", list(results.get("qrm-rl", ())))):
        if found := results.get(part):
            figures.lines(at(part), finding + "\npass@1 on held-out questions of 8 to 14 operations; 95% intervals",
                          {name: [(points[0][0], *spread([p[1] for p in points])) for points in zip(*found[name]["curve"])]
                           for name in names if name in found}, "questions seen", "pass@1")


# Part: what runs it, and the tables of its results as (marker in the README, lines).
PARTS = {"tdrm": (tdrm, tdrm_tables), "search": (search, search_tables), "sweep": (sweep, sweep_tables),
         "budget": (budget, budget_tables), "rl": (rl, rl_tables), "prime": (prime, prime_tables),
         "prime-again": (prime_again, lambda results: [(name, curve_table(results[key], "outcomes only")) for name, key
                                                       in (("prime-again", "again"), ("prime-all-seeds", "all"))]),
         "prime-short": (prime_short, lambda results: [("prime-short", curve_table(results, "outcomes only"))]),
         "qrm": (qrm, qrm_tables),
         "qrm-rl": (qrm_rl, lambda results: [("qrm-rl", curve_table(results, "REINFORCE, ORM", rising=False))])}


def write_readme(results):
    """Every table between its markers in the README, from the results."""
    path = os.path.join(ROOT, "README.md")
    with open(path) as f:
        text = f.read()
    for part, (_, tables) in PARTS.items():
        for name, lines in tables(results[part]) if part in results else ():
            text = re.sub(rf"(<!-- study:{name} -->\n).*?(<!-- end -->)", lambda m: m[1] + lines + "\n" + m[2],
                          text, flags=re.S)
    with open(path, "w") as f:
        f.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all, or `readme`: only write the tables again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--more", action="store_true", help="also the rows that take it past two hours")
    parser.add_argument("--settings", nargs="+", help="of sweep, rl, prime and qrm: only these rows of the tables")
    parser.add_argument("--quick", action="store_true", help="everything small: shows that it runs")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS) - {"readme"}:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    args.place, args.seeds, args.more = ("runs/quick", 2, True) if args.quick else ("runs/study", args.seeds, args.more)
    path, results = os.path.join(ROOT, "results.json"), {}
    if os.path.exists(path) and not args.quick:
        with open(path) as f:
            results = json.load(f)
    for part in args.parts or [part for part in PARTS if args.more or part not in MORE]:
        if part in PARTS:
            new = PARTS[part][0](args)
            results[part] = results.get(part, {}) | new  # rows that were not run now stay
            for name, lines in PARTS[part][1](results[part]):
                print(f"\n{name}\n{lines}", flush=True)
            if not args.quick:
                with open(path + ".tmp", "w") as f:
                    json.dump(results, f, indent=None, separators=(",", ":"))
                os.replace(path + ".tmp", path)
    if not args.quick:
        write_readme(results)
        draw(results)


if __name__ == "__main__":
    main()
