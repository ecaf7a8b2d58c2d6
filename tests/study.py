"""Learning results over several seeds, as they come out: `python tests/study.py PART [--seeds N] [--jobs J]`.

    tdrm    ScalarORM, ScalarPRM and TDRM on held-out built-in solutions: smoothness, AUROC, calibration, first error
    search  greedy search and best-of-n on 1000 held-out built-in problems with those reward models

Every run is a run of the project's own scripts with its own --seed, kept in runs/study and not repeated while its summary.json is there.
A table prints mean ± standard deviation over seeds, in Markdown.
"""
import argparse
import concurrent.futures
import json
import os
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
METHODS = ("scalar_orm", "scalar_prm", "tdrm")
MEASURES = {"abs_delta_v": "mean abs dV", "lipschitz": "largest abs dV", "td_error_mean": "TD error", "auroc_second_last": "AUROC, second-last",
            "auroc_middle": "AUROC, middle", "calibration_error": "calibration error", "first_error_f1": "first-error F1"}


def run(jobs, commands):
    """Run scripts, one process each, `jobs` at a time: [(out folder, [script, option...])...]."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def one(out, command):
        if os.path.exists(os.path.join(ROOT, out, "summary.json")):
            return
        result = subprocess.run([sys.executable, *command, "--out", out], cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
        print(f"done: {' '.join(command)}", file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda c: one(*c), commands))


def summary(out):
    with open(os.path.join(ROOT, out, "summary.json")) as f:
        return json.load(f)


def cell(numbers):
    return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1) if len(numbers) > 1 else 0:.3f}"


def reward_models(args):
    """Train every reward model under every seed -> {(method, seed): folder}."""
    run(1, [("runs/sft", ["sft_minimal.py"])])
    folders = {(m, s): f"runs/study/{m}-{s}" for m in METHODS for s in range(args.seeds)}
    run(args.jobs, [(out, ["tdrm_minimal.py", "--method", m, "--seed", str(s), "--eval_every", "0"]) for (m, s), out in folders.items()])
    return folders


def tdrm(args):
    folders = reward_models(args)
    print("| method | " + " | ".join(MEASURES.values()) + " |\n|---|" + "---|" * len(MEASURES))
    for method in METHODS:
        results = [summary(folders[method, s]) for s in range(args.seeds)]
        print(f"| {method} | " + " | ".join(cell([r[key] for r in results]) for key in MEASURES) + " |")


def search(args):
    folders, outs = reward_models(args), [f"runs/study/search-{s}" for s in range(args.seeds)]
    run(args.jobs, [(out, ["search_minimal.py", "--problems", "1000", "--n", "64", "--beam", "1", "--expand", "2", "4", "8", "16",
                           "--seed", str(s), "--prm", *[f"{folders[m, s]}/model" for m in METHODS]]) for s, out in enumerate(outs)])
    rows = [{(r["method"], r["n"]): r["accuracy"] for r in summary(out)["rows"]} for out in outs]
    names = [f"{m}-{{}}" for m in METHODS]
    for title, keys in (("greedy search, b =", [("greedy search {}, ", b, 1) for b in (2, 4, 8, 16)]),
                        ("best-of-n, n =", [("best-of-n, ", n, n) for n in (4, 8, 16, 32, 64)])):
        print(f"\n| {title} | " + " | ".join(str(b) for _, b, _ in keys) + " |\n|---|" + "---|" * len(keys))
        for method, name in zip(METHODS, names):
            print(f"| {method} | " + " | ".join(cell([row[prefix.format(b) + name.format(s), n] for s, row in enumerate(rows)])
                                                for prefix, b, n in keys) + " |")
    for method in ("pass@1", "greedy decoding", "majority", "oracle"):
        print(method, {n: cell([row[method, n] for row in rows]) for m, n in rows[0] if m == method})


PARTS = {"tdrm": tdrm, "search": search}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    PARTS[arguments.part](arguments)
