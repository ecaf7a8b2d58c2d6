"""Which of the three papers' claims hold in miniature? `python tests/study.py [PART ...] [--seeds N] [--jobs J] [--quick]`.

    tdrm    ScalarORM, ScalarPRM and TDRM on held-out built-in solutions: smoothness, AUROC, calibration, first error
    search  greedy search and best-of-n on 1000 held-out built-in problems with those reward models
    rl      rule-only, blended and PRM-only rewards on the hard level
    prime   PRIME against outcomes only, its design choices, and controls, on the hard level
    qrm     Q-RM, ORM and DPO-RM: pairs, best-of-n, and RL on the hard level

Every run is a run of the project's own scripts with its own --seed, kept in runs/study and not repeated while its
summary.json is there: a stopped study goes on where it was. All figures go to results.json, and from there into the
README, between <!-- study:NAME --> and <!-- end -->, and into figures/. Cells are mean ± half a 95% interval (Student's t) over the seeds.
`--quick` runs everything small, in runs/quick, and changes neither file.
"""
import argparse
import concurrent.futures
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t at 97.5%, by number of seeds


# --------------------------------------------------------------------------------------------------
# Runs.

def run(args, commands):
    """Run scripts, one process each, `jobs` at a time: [(out folder, [script, option...])...]."""
    jobs = args.jobs
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    todo = [c for c in commands if not os.path.exists(os.path.join(ROOT, c[0], "summary.json"))]

    def one(out, command):
        result = subprocess.run([sys.executable, *command, "--out", out, "--resume"], cwd=ROOT, env=os.environ | threads,
                                capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), desc="runs", disable=not todo) as bar:
        for done in concurrent.futures.as_completed([pool.submit(one, *c) for c in todo]):
            done.result()
            bar.update()


def summary(out):
    with open(os.path.join(ROOT, out, "summary.json")) as f:
        return json.load(f)


def metrics(out):
    with open(os.path.join(ROOT, out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


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
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|"] + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


# --------------------------------------------------------------------------------------------------
# Reward models, and search with them.

METHODS = ("scalar_orm", "scalar_prm", "tdrm")
MEASURES = {"abs_delta_v": "mean abs dV", "lipschitz": "largest abs dV", "td_error_mean": "TD error", "auroc_second_last": "AUROC, second-last",
            "auroc_middle": "AUROC, middle", "calibration_error": "calibration error", "first_error_f1": "first-error F1"}


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


def tdrm(args):
    folders = reward_models(args)
    return {m: {key: [summary(folders[m, s])[key] for s in range(args.seeds)] for key in MEASURES} for m in METHODS}


def tdrm_tables(results):
    yield "tdrm", table(["method", *MEASURES.values()], [[m, *[cell(results[m][key]) for key in MEASURES]] for m in METHODS])


def search(args):
    folders = reward_models(args)
    seeds = range(min(args.seeds, 3))
    outs = [f"{args.place}/search-{s}" for s in seeds]
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
# Reinforcement learning.

LIMITS = ["--data", "builtin-hard", "--problems", "500", "--prompts_per_step", "16", "--steps", "60", "--eval_every", "15",
          "--max_new_tokens", "100", "--eval_problems", "300", "--lr", "3e-4", "--no-decay", "--show_every", "0", "--save_every", "0"]
SMALL = ["--data", "builtin-hard", "--problems", "40", "--prompts_per_step", "2", "--group_size", "4", "--steps", "2", "--eval_every", "0",
         "--eval_problems", "8", "--show_every", "0", "--save_every", "0"]

RL = {"rule-only": ["--alpha", "1"],
      "rule-only, dr_grpo": ["--alpha", "1", "--estimator", "dr_grpo"],
      "ScalarPRM blend": ["--prm", "scalar_prm"],
      "TDRM blend": ["--prm", "tdrm"],
      "TDRM blend, on-policy": ["--prm", "tdrm", "--prm_lr", "3e-4"],
      "TDRM blend, dr_grpo": ["--prm", "tdrm", "--estimator", "dr_grpo"],
      "PRM-only": ["--prm", "tdrm", "--alpha", "0"],
      "PRM-only, on-policy": ["--prm", "tdrm", "--alpha", "0", "--prm_lr", "3e-4"]}

OFF = ["--prm", "none"]
PRIME = {"outcomes only": OFF,
         "PRIME": [],
         "double forward": ["--update", "before"],
         "offline PRM": ["--update", "none", "--prm", "offline"],  # trained on the initial policy's samples
         "offline-trained PRM, online": ["--prm", "offline"],
         "policy reference": ["--reference", "policy"],
         "whole response": ["--granularity", "whole"],
         "no filter": ["--accuracy", "0", "1"],
         "REINFORCE, outcomes": ["--estimator", "reinforce", *OFF], "REINFORCE, PRIME": ["--estimator", "reinforce"],
         "GRPO, outcomes": ["--estimator", "grpo", *OFF], "GRPO, PRIME": ["--estimator", "grpo"],
         "PPO, outcomes": ["--estimator", "ppo", *OFF], "PPO, PRIME": ["--estimator", "ppo"],
         "PRIME as value model": ["--estimator", "value"],
         "control: shuffled over tokens": ["--shuffle_process"],
         "control: process weight 0": ["--process_weight", "0"]}


def curves(args, script, settings, prefix):
    """Runs of an RL script under every setting and seed -> {setting: {"curve": per seed [[questions, pass@1, greedy]], ...}}."""
    size, model = SMALL if args.quick else LIMITS, policy(args, "builtin-hard")
    settings = {name: options for name, options in settings.items() if name in (args.settings or settings)}
    settings = dict(list(settings.items())[:4]) if args.quick else settings
    outs = {(name, s): f"{args.place}/{prefix}-{re.sub('[^a-z0-9]+', '-', name.lower())}-{s}" for s in range(args.seeds) for name in settings}
    run(args, [(out, [script, "--model", model, *size, "--seed", str(s), *settings[name]])
               for (name, s), out in outs.items()])
    results = {}
    for name in settings:
        rows = [metrics(outs[name, s]) for s in range(args.seeds)]
        last = [summary(outs[name, s]) for s in range(args.seeds)]
        results[name] = {"curve": [[[r.get("questions", 0), r["pass@1"], r["greedy"]] for r in run if "pass@1" in r]
                                   + [[run[-1]["questions"], end["pass@1"], end["greedy"]]] for run, end in zip(rows, last)],
                         "train": [[round(float(np.mean([r["verifiable"] for r in run[1:][i:i + 10]])), 4)
                                    for i in range(0, len(run) - 1, 10)] for run in rows]}
        for key in ("pair_accuracy", "pair_accuracy_after", "prm_auroc", "prm_auroc_after", "truncated", "response_length"):
            if any(key in r for r in rows[0]):
                results[name][key] = [[round(float(np.nanmean([r[key] if r.get(key) is not None else np.nan for r in run[1:][i:i + 10]] or [np.nan])), 4)
                                       for i in range(0, len(run) - 1, 10)] for run in rows]
    return results


def reward_models_hard(args):
    model = policy(args, "builtin-hard")
    small = ["--problems", "300"] if args.quick else []
    run(args, [(f"{args.place}/{m}-hard", ["tdrm_minimal.py", "--model", model, "--data", "builtin-hard", "--method", m, "--eval_every", "0", *small])
               for m in ("tdrm", "scalar_prm")])


def rl(args):
    reward_models_hard(args)
    paths = {m: f"{args.place}/{m}-hard/model" for m in ("tdrm", "scalar_prm")}
    return curves(args, "rl_minimal.py", {name: [paths.get(o, o) for o in options] for name, options in RL.items()}, "rl")


def prime(args):
    offline = f"{args.place}/prime-offline"  # a PRM trained on the initial policy's samples alone: the policy's lr is 0
    run(args, [(offline, ["prime_minimal.py", "--model", policy(args, "builtin-hard"), *(SMALL if args.quick else LIMITS), "--seed", "100", "--lr", "0"])])
    return curves(args, "prime_minimal.py", {name: [offline + "/prm" if o == "offline" else o for o in options]
                                             for name, options in PRIME.items()}, "prime")


def first_at(curve, accuracy):
    """Questions after which a curve first reaches an accuracy, interpolated; None if it never does."""
    for (q0, a0, _), (q1, a1, _) in zip(curve, curve[1:]):
        if a0 < accuracy <= a1:
            return q0 + (q1 - q0) * (accuracy - a0) / (a1 - a0)
    return None


def curve_table(results, baseline):
    """Final accuracies; the gain over a baseline, paired by seed; questions until half and 0.9 of the table's best gain."""
    best = max(np.mean([c[-1][1] for c in r["curve"]]) for r in results.values())
    begin = np.mean([c[0][1] for r in results.values() for c in r["curve"]])
    rows = []
    for name, r in results.items():
        final = [c[-1][1] for c in r["curve"]]
        gain = [a - c[-1][1] for a, c in zip(final, results[baseline]["curve"])]
        reach = []
        for share in (0.5, 0.9):
            counts = [first_at(c, begin + share * (best - begin)) for c in r["curve"]]
            hit = [x for x in counts if x is not None]
            reach.append(f"{np.mean(hit):.0f} ({len(hit)}/{len(counts)})" if hit else f"never (0/{len(counts)})")
        rows.append([name, cell(final), cell([c[-1][2] for c in r["curve"]]), "" if name == baseline else cell(gain), *reach])
    return table(["rewards", "pass@1", "greedy", f"pass@1 minus {baseline}", "questions to half of the best gain", "to 0.9 of it"], rows)


def rl_tables(results):
    yield "rl", curve_table(results, "rule-only")
    yield "rl-auroc", table(["rewards", *[f"steps {i}-{i + 9}" for i in range(1, 60, 20)], "truncated at the end"], [
        [name, *[cell([run[i] for run in r["prm_auroc"]]) for i in range(0, len(r["prm_auroc"][0]), 2)],
         cell([run[-1] for run in r["truncated"]])] for name, r in results.items() if "prm_auroc" in r])


def prime_tables(results):
    yield "prime", curve_table(results, "outcomes only")
    yield "prime-pairs", table(["PRM", *[f"steps {i}-{i + 9}" for i in range(1, 60, 20)]], [
        [name, *[cell([run[i] for run in results[name]["pair_accuracy"]]) for i in range(0, len(results[name]["pair_accuracy"][0]), 2)]]
        for name in ("PRIME", "double forward", "offline PRM", "offline-trained PRM, online", "policy reference")
        if "pair_accuracy" in results.get(name, ())])


# --------------------------------------------------------------------------------------------------

# --------------------------------------------------------------------------------------------------
# Figures: small SVG files that follow the reader's light or dark page.

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#76b7b2")


def lines(path, title, series, x_label, y_label, log_x=False):
    """{name: [(x, mean, half an interval)]} as lines with bands, y from 0 to 1."""
    W, H, left, top, right, bottom = 640, 320, 48, 30, 190, 40
    xs = sorted({x for points in series.values() for x, _, _ in points})
    at = (lambda x: math.log2(x)) if log_x else float
    low, high = at(xs[0]), at(xs[-1])
    X = lambda x: round(left + (at(x) - low) / (high - low or 1) * (W - left - right), 1)  # noqa: E731
    Y = lambda y: round(H - bottom - min(1, max(0, y)) * (H - top - bottom), 1)  # noqa: E731
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="11">',
           "<style>text{fill:#333}.g{stroke:#8884}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>",
           f'<text x="{left}" y="16" font-size="13">{title}</text>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        out.append(f'<line class="g" x1="{left}" x2="{W - right}" y1="{Y(tick)}" y2="{Y(tick)}"/>'
                   f'<text x="{left - 6}" y="{Y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    for x in xs if len(xs) < 9 else xs[::len(xs) // 6]:
        out.append(f'<text x="{X(x)}" y="{H - bottom + 16}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{(left + W - right) / 2}" y="{H - 6}" text-anchor="middle">{x_label}</text>'
               f'<text x="12" y="{H / 2}" transform="rotate(-90 12 {H / 2})" text-anchor="middle">{y_label}</text>')
    ends = sorted((-points[-1][1], name) for name, points in series.items())
    for i, (_, name) in enumerate(ends):
        points, colour = series[name], COLOURS[list(series).index(name) % len(COLOURS)]
        band = [f"{X(x)},{Y(m + h)}" for x, m, h in points] + [f"{X(x)},{Y(m - h)}" for x, m, h in reversed(points)]
        line = " ".join(f"{X(x)},{Y(m)}" for x, m, _ in points)
        y = top + 14 + 18 * i
        out.append(f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.15"/>'
                   f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                   f'<rect x="{W - right + 10}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
                   f'<text x="{W - right + 25}" y="{y + 1}">{name}</text>')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write("\n".join(out + ["</svg>"]) + "\n")


def figures(results):
    """All figures that the results allow, to figures/."""
    place = os.path.join(ROOT, "figures")
    if "search" in results:
        lines(place + "/greedy-search.svg", "Greedy search: accuracy by branching (95% intervals)",
              {m: [(b, *spread(results["search"][f"greedy search {b}, {m} @ 1"])) for b in (2, 4, 8, 16)] for m in METHODS},
              "next steps sampled from each prefix", "accuracy", log_x=True)
        lines(place + "/best-of-n.svg", "Best-of-n: accuracy by samples (95% intervals)",
              {m: [(n, *spread(results["search"][f"best-of-n, {m} @ {n}"])) for n in (2, 4, 8, 16, 32, 64)] for m in METHODS},
              "samples", "accuracy", log_x=True)
    for part, names in (("rl", list(RL)), ("prime", ["outcomes only", "PRIME", "offline PRM", "control: shuffled over tokens",
                                                     "control: process weight 0"])):
        if part in results:
            curve = {name: results[part][name]["curve"] for name in names if name in results[part]}
            lines(f"{place}/{part}.svg", "Held-out pass@1, hard level (95% intervals)",
                  {name: [(points[0][0], *spread([p[1] for p in points])) for points in zip(*runs)] for name, runs in curve.items()},
                  "questions seen", "pass@1")


PARTS = {"tdrm": (tdrm, tdrm_tables), "search": (search, search_tables), "rl": (rl, rl_tables), "prime": (prime, prime_tables)}


def write_readme(results):
    """Every table between its markers in the README, from the results."""
    path = os.path.join(ROOT, "README.md")
    with open(path) as f:
        text = f.read()
    for part, (_, tables) in PARTS.items():
        for name, lines in tables(results[part]) if part in results else ():
            text = re.sub(rf"(<!-- study:{name} -->\n).*?(<!-- end -->)", lambda m: m[1] + lines + "\n" + m[2], text, flags=re.S)
    with open(path, "w") as f:
        f.write(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all, or `readme`: only write the tables again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--settings", nargs="+", help="of rl and prime: only these rows of the table")
    parser.add_argument("--quick", action="store_true", help="everything small: shows that it runs")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS) - {"readme"}:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    args.place, args.seeds = ("runs/quick", 2) if args.quick else ("runs/study", args.seeds)
    path, results = os.path.join(ROOT, "results.json"), {}
    if os.path.exists(path) and not args.quick:
        with open(path) as f:
            results = json.load(f)
    for part in args.parts or PARTS:
        if part in PARTS:
            new = PARTS[part][0](args)
            results[part] = results.get(part, {}) | new if args.settings else new
            for name, lines in PARTS[part][1](results[part]):
                print(f"\n{name}\n{lines}", flush=True)
            if not args.quick:
                with open(path + ".tmp", "w") as f:
                    json.dump(results, f, indent=None, separators=(",", ":"))
                os.replace(path + ".tmp", path)
    if not args.quick:
        write_readme(results)
        figures(results)


if __name__ == "__main__":
    main()
