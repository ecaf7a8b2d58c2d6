"""The study's tables, from its results: each goes between <!-- study:NAME --> and <!-- end --> in
study/README.md. Cells are mean ± half a 95% interval (Student's t) over the seeds."""

import math
import re

import numpy as np

METHODS = ("ScalarORM", "ScalarPRM", "TDRM")
MEASURES = {
    "abs_delta_v": "mean abs dV",
    "lipschitz": "largest abs dV",
    "td_error_mean": "TD error",
    "auroc_second_last": "AUROC, second-last",
    "auroc_middle": "AUROC, middle",
    "calibration_error": "calibration error",
    "first_error_f1": "first-error F1",
}
# Rows, and a part, that want --more: they get a + behind their name.
MORE = {"TDRM, lambda 0.9", "TDRM, gamma 0.6", "outcomes only, TDRM n = 3", "TDRM, n = 2"}
MORE |= {
    "TDRM, gamma 1",
    "2 rollouts",
    "15% of the labels flipped",
    "8 rollouts",
    "8 to 14 operations",
}
MORE |= {"ScalarPRM blend", "TDRM blend, on-policy", "PRM-only, on-policy", "rule-only, lr 3e-4"}
MORE |= {"TDRM blend, lr 3e-4", "TDRM blend, dr_grpo, lr 3e-4", "double forward", "no filter"}
MORE |= {"offline-trained PRM, online", "offline PRM", "REINFORCE, outcomes", "REINFORCE, PRIME"}
MORE |= {"GRPO, outcomes", "GRPO, PRIME", "PPO, outcomes", "PPO, PRIME", "PRIME as value model"}
MORE |= {"control: shuffled over tokens", "control: process weight 0", "prime-again"}
MORE |= {"PPO, Q-RM", "PPO, ORM", "PPO, DPO-RM", "Q-RM, beta 0.2"}
# Student's t at 97.5%, by number of seeds.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def spread(numbers):
    """-> mean, half a 95% interval over seeds."""
    numbers = [x for x in numbers if x is not None and math.isfinite(x)]
    if len(numbers) < 2:
        return (numbers or [math.nan])[0], 0.0
    error = float(np.std(numbers, ddof=1)) / len(numbers) ** 0.5
    return float(np.mean(numbers)), T95.get(len(numbers), 1.96) * error


def cell(numbers):
    mean, half = spread(numbers)
    return "-" if math.isnan(mean) else f"{mean:.3f} ± {half:.3f}"


def minus(a, b):
    """The difference of two rows, paired by seed."""
    return cell([x - y for x, y in zip(a, b)]) if a and b else ""


def table(head, rows):
    def line(row):
        return "| " + " | ".join(map(str, row)) + " |"

    lines = [line(head), "|---" * len(head) + "|"]
    for name, *cells in rows:
        lines.append(line([f"{name} +" if name in MORE else name, *cells]))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Reward models and search. Each function yields (name of a table, its lines).


def tdrm(results):
    rows = [[m, *[cell(results[m][key]) for key in MEASURES]] for m in METHODS]
    yield "tdrm", table(["method", *MEASURES.values()], rows)


def search(results):
    def rows(pattern, counts):
        return [
            [m, *[cell(results.get(pattern.format(m, n), [])) for n in counts]] for m in METHODS
        ]

    branches, samples = (2, 4, 8, 16), (4, 8, 16, 32, 64)
    greedy = rows("greedy search {1}, {0} @ 1", branches)
    yield "greedy-search", table(["greedy search, b =", *branches], greedy)
    best = rows("best-of-n, {0} @ {1}", samples)
    yield "best-of-n", table(["best-of-n, n =", *samples], best)


def sweep(results):
    some = ("abs_delta_v", "lipschitz", "auroc_second_last", "calibration_error")
    keys = {"greedy": "greedy search, b = 8", "best-of-n": "best-of-16"}
    keys |= {key: MEASURES[key] for key in some}
    base, targets, conditions = results.get("ScalarPRM|", {}).get("greedy"), [], {}
    for key, row in results.items():
        name, _, method = key.partition("|")
        if method:
            conditions.setdefault(name, {})[method] = row
        else:
            cells = [cell(row[key]) for key in keys]
            targets.append([name, *cells, minus(row["greedy"], base)])
    yield "targets", table(["targets", *keys.values(), "greedy minus ScalarPRM's"], targets)
    pairs = [(name, row["ScalarPRM"], row["TDRM"]) for name, row in conditions.items()]
    if "TDRM, n = 3|" in results:  # the targets' own condition
        pairs.insert(2, ("4 rollouts", results["ScalarPRM|"], results["TDRM, n = 3|"]))
    rows = []
    for name, a, b in pairs:
        greedy = [cell(a["greedy"]), cell(b["greedy"]), minus(b["greedy"], a["greedy"])]
        rows.append([name, *greedy, cell(a["abs_delta_v"]), cell(b["abs_delta_v"])])
    head = ["step labels", "ScalarPRM, greedy", "TDRM, greedy", "TDRM minus ScalarPRM"]
    yield "conditions", table([*head, "ScalarPRM, abs dV", "TDRM, abs dV"], rows)


def budget(results):
    budgets = list(next(iter(results.values())))
    for what, title in (("greedy", "greedy search, b = 8"), ("best-of-n", "best-of-16")):
        head = [title + "; tokens spent on data:", *[f"{int(b):,}" for b in budgets]]
        rows = [[name, *[cell(row[b][what]) for b in budgets]] for name, row in results.items()]
        yield f"budget-{what}", table(head, rows)


def qrm(results):
    counts, rows = (4, 8, 16, 32, 64), []
    for name, r in results.items():
        keys = ("pair_accuracy", "first_wrong_step", "greedy")
        best = [cell(column) for column in zip(*r["best-of-n"])]
        rows.append([name, *[cell(r[key]) if r[key] else "" for key in keys], *(best or [""] * 5)])
    head = [
        "reward model",
        "pair accuracy",
        "AUROC of the first wrong step",
        "greedy search, b = 8",
    ]
    yield "qrm", table([*head, *[f"best-of-{n}" for n in counts]], rows)


# --------------------------------------------------------------------------------------------------
# Reinforcement learning. A curve is a list of (questions seen, pass@1, greedy).

TENS = [f"steps {i}-{i + 9}" for i in (1, 21, 51)]


def first_at(curve, accuracy):
    """Questions until a curve first reaches an accuracy, interpolated; None: it never does."""
    for (q0, a0, *_), (q1, a1, *_) in zip(curve, curve[1:]):
        if a0 < accuracy <= a1:
            return q0 + (q1 - q0) * (accuracy - a0) / (a1 - a0)
    return None


def curve_table(results, baseline, rising=True):
    """Final accuracies; the gain over a baseline, paired by seed; questions until 0.9 of the
    table's best gain and, where the baseline is `rising`, until its own final accuracy."""
    finals = {name: [c[-1][1] for c in r["curve"]] for name, r in results.items()}
    best = max(np.mean(final) for final in finals.values())
    begin = np.mean([c[0][1] for r in results.values() for c in r["curve"]])
    rows = []
    for name, r in results.items():
        final, base = finals[name], finals.get(baseline, finals[name])
        goals = [[begin + 0.9 * (best - begin)] * len(final)] + [base] * rising
        reach = [reached(r["curve"], goal) for goal in goals]
        gain = "" if name == baseline else minus(final, base)
        rows.append([name, cell(final), cell([c[-1][2] for c in r["curve"]]), gain, *reach])
    head = ["rewards", "pass@1", "greedy", f"pass@1 minus {baseline}"]
    head += ["questions to 0.9 of the best gain"] + [f"questions to the end of {baseline}"] * rising
    return table(head, rows)


def reached(curves, goals):
    """Mean number of questions until a goal, over the seeds that get there."""
    hits = [x for x in map(first_at, curves, goals) if x is not None]
    count = f"({len(hits)}/{len(curves)})"
    return f"{np.mean(hits):.0f} {count}" if hits else f"never {count}"


def by_step(runs):
    """Means over ten steps, at the begin, in the middle and at the end, as cells."""
    return [cell([run[i] for run in runs]) for i in (0, 2, 5) if i < len(runs[0])]


def rl(results):
    yield "rl", curve_table(results, "rule-only")
    rows = []
    for name, r in results.items():
        if "prm_auroc" in r:
            rows.append([name, *by_step(r["prm_auroc"]), cell([run[-1] for run in r["truncated"]])])
    yield "rl-auroc", table(["rewards", *TENS, "truncated at the end"], rows)


def prime(results):
    yield "prime", curve_table(results, "outcomes only")
    names = ["PRIME", "double forward", "offline PRM", "offline-trained PRM, online"]
    names += ["policy reference", "policy reference, offline-trained PRM, online"]
    known = [name for name in names if "pair_accuracy" in results.get(name, ())]
    rows = [[name, *by_step(results[name]["pair_accuracy"])] for name in known]
    yield "prime-pairs", table(["PRM", *TENS], rows)


def prime_again(results):
    yield "prime-again", curve_table(results["again"], "outcomes only")
    yield "prime-all-seeds", curve_table(results["all"], "outcomes only")


def prime_short(results):
    yield "prime-short", curve_table(results, "outcomes only")


def qrm_rl(results):
    yield "qrm-rl", curve_table(results, "REINFORCE, ORM", rising=False)


TABLES = {
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


def write_page(results, path):
    """Every table between its markers in the page."""
    with open(path) as f:
        text = f.read()
    for part, make in TABLES.items():
        for name, lines in make(results[part]) if part in results else ():
            begin, end = f"<!-- study:{name} -->\n", "\n<!-- end -->"
            head, found, rest = text.partition(begin)
            if found:
                text = head + begin + lines + end + rest.partition(end)[2]
    with open(path, "w") as f:
        f.write(text)
