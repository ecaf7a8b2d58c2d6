"""The study's tables, from its results: each goes between <!-- study:NAME --> and <!-- end --> in
study/README.md. Cells are mean ± half a 95% interval (Student's t) over the seeds."""

import math

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

    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


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

    branches, samples = (2, 4, 8, 16), (4, 8, 16, 32)
    greedy = rows("greedy search {1}, {0} @ 1", branches)
    yield "greedy-search", table(["greedy search, b =", *branches], greedy)
    best = rows("best-of-n, {0} @ {1}", samples)
    yield "best-of-n", table(["best-of-n, n =", *samples], best)


def targets(results):
    some = ("abs_delta_v", "lipschitz", "auroc_second_last", "calibration_error")
    keys = {"greedy": "greedy search, b = 8"} | {key: MEASURES[key] for key in some}
    base, rows = results["ScalarPRM"]["greedy"], []
    for name, row in results.items():
        gain = "" if name == "ScalarPRM" else minus(row["greedy"], base)
        rows.append([name, *[cell(row[key]) for key in keys], gain])
    yield "targets", table(["targets", *keys.values(), "greedy minus ScalarPRM's"], rows)


def choice(results):
    base, *others = results
    rows = [[name, *map(cell, row.values())] for name, row in results.items()]
    for name in others:
        gains = [minus(x, results[base][key]) for key, x in results[name].items()]
        rows.append([f"{name} minus {base}", *gains])
    yield "choice", table(["reward model", *results[base]], rows)


def choice_sweep(results):
    rows = []
    for name, row in results.items():
        a, b = row["ScalarPRM"], row["TDRM"]
        ahead = f"{sum(y > x for x, y in zip(a, b))} of {len(a)}"
        rows.append([name, cell(a), cell(b), minus(b, a), ahead])
    head = ["what differs", "ScalarPRM", "TDRM", "TDRM minus ScalarPRM", "seeds where it is ahead"]
    yield "choice-sweep", table(head, rows)


def budget(results):
    budgets = list(next(iter(results.values())))
    head = ["greedy search, b = 8; tokens spent on data:", *[f"{int(b):,}" for b in budgets]]
    yield "budget", table(head, [[name, *map(cell, row.values())] for name, row in results.items()])


def qrm(results):
    counts, rows = (4, 16), []
    for name, r in results.items():
        keys = ("pair_accuracy", "first_wrong_step", "greedy")
        best = [cell(column) for column in zip(*r["best-of-n"])]
        rows.append([name, *[cell(r[key]) if r[key] else "" for key in keys], *best])
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


def prime(results):
    settings, again = dict(results), results["again"]
    del settings["again"]
    yield "prime", curve_table(settings, "outcomes only")
    names = ["PRIME", "offline PRM", "offline-trained PRM, online", "policy reference"]
    names += ["policy reference, offline-trained PRM, online"]
    known = [name for name in names if "pair_accuracy" in settings.get(name, {})]
    rows = [[name, *by_step(settings[name]["pair_accuracy"])] for name in known]
    yield "prime-pairs", table(["PRM", *TENS], rows)
    known = [name for name in again if name in settings]
    both = {name: {"curve": settings[name]["curve"] + again[name]["curve"]} for name in known}
    yield "prime-ten-seeds", curve_table(both, "outcomes only")


def qrm_rl(results):
    yield "qrm-rl", curve_table(results, "ORM", rising=False)


def real(results):
    """Of a number with its interval (number, low, high), half the interval is shown."""

    def shown(found):
        return f"{found[0]:.3f} ± {(found[2] - found[1]) / 2:.3f}" if found else ""

    keys = ("auroc_middle", "auroc_second_last", "calibration_error", "abs_delta_v", "lipschitz")
    names = {key: MEASURES[key] for key in keys[:2]} | {"auroc_last": "AUROC, last"}
    names["auroc_one_author"] = "last, one author's"
    names |= {key: MEASURES[key] for key in keys[2:]}
    rows = [[who, *[shown(r.get(key)) for key in names]] for who, r in results["values"].items()]
    yield "real", table(["319 questions of GSM8K", *names.values()], rows)
    rows = [[who, shown(r["accuracy"]), shown(r["gain"])] for who, r in results["choices"].items()]
    yield "real-choices", table(["whose solution", "right", "minus 175b_verification"], rows)


def measured(results):
    rows = []
    for part, row in results.items():
        name = f"`{part}`" if part != "all" else "all but `real`, each run once"
        rows.append([name, row["commit"], round(row["core_seconds"] / 120)])
    yield "measured", table(["part", "commit", "minutes of two cores"], rows)


TABLES = {
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
    "real": real,
    "measured": measured,
}


def write_page(results, path):
    """Every table between its markers in the page."""
    with open(path) as f:
        text = f.read()
    for part, make in TABLES.items():
        for name, lines in make(results[part]) if part in results else ():
            begin, end = f"<!-- study:{name} -->\n", "<!-- end -->"
            head, found, rest = text.partition(begin)
            if found:
                text = f"{head}{begin}{lines}\n{end}{rest.partition(end)[2]}"
    with open(path, "w") as f:
        f.write(text)
