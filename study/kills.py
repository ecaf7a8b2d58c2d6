"""Random SIGKILLs over short runs, resumed each time: `python tests/kills.py [--kills 100] [--scripts sft tdrm ...]`.

Every script runs under torchrun on two processes, as a user starts it; at a random moment all its processes are killed
and the same command with --resume goes on, until the script's share of kills is spent; then it may end. Its final
weights must be bitwise those of a run that nobody disturbed, and at no time may a checkpoint be lost: what a resumed
run starts from is at least as far as the last one that was complete before.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from safetensors import safe_open

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

RL = ["--steps", "6", "--prompts_per_step", "2", "--group_size", "2", "--max_new_tokens", "6", "--eval_problems", "2", "--show_every", "0"]
SCRIPTS = {"sft": ["--data", "rows.jsonl", "--steps", "12", "--batch_size", "4", "--max_new_tokens", "4", "--eval_problems", "2"],
           "tdrm": ["--data", "rows.jsonl", "--steps", "12", "--batch_size", "4"],
           "rl": ["--data", "problems.jsonl", "--prm", "prm", "--prm_lr", "1e-3", *RL],
           "prime": ["--data", "problems.jsonl", "--accuracy", "0", "1", *RL],
           "qrm": ["--data", "pairs.jsonl", "--steps", "12", "--batch_size", "4"]}


def prepare(folder):
    """A tiny policy and reward model, rows, problems and pairs."""
    import data
    import sft_minimal as sft
    import tdrm_minimal as tdrm
    tokenizer = data.builtin_tokenizer()
    sft.save_model(folder + "/policy", sft.new_policy(tokenizer, 0), tokenizer)
    sft.save_model(folder + "/prm", tdrm.load_reward_model(folder + "/policy"), tokenizer)
    problems = data.make_problems(12)
    rows = data.make_trajectories(problems, 2, label_rollouts=2)
    pairs = [{"prompt": a["prompt"], "chosen": "\n\n".join(a["completions"]), "rejected": "1+1=2"} for a in rows]
    for name, what in (("rows", rows), ("problems", problems), ("pairs", pairs)):
        with open(f"{folder}/{name}.jsonl", "w") as f:
            keep = ("question", "answer", "prompt", "completions", "labels", "correct", "chosen", "rejected")
            f.writelines(json.dumps({k: v for k, v in row.items() if k in keep}) + "\n" for row in what)


def command(script, out):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0"]
    return [*torchrun, os.path.join(ROOT, f"{script}_minimal.py"), "--model", "policy", "--save_every", "1", "--eval_every", "0",
            *SCRIPTS[script], "--out", out]


def start(script, out, folder, resume):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(f"{folder}/{out}.log", "ab") as log:
        return subprocess.Popen([*command(script, out), *(["--resume"] if resume else [])], cwd=folder, env=environment, stdout=log,
                                stderr=log, start_new_session=True)


def kill(process):
    """torchrun and all it started, at once: nobody has time to clean up."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [process.pid, *map(int, children)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def steps_done(place):
    states = [name for name in os.listdir(place + "/state") if name.startswith("step_")] if os.path.isdir(place + "/state") else []
    return max((int(name.removeprefix("step_")) for name in states), default=0)


def weights(place):
    """All tensors of a finished run's model folders, as bytes."""
    found = {}
    for folder, _, files in os.walk(place):
        if "/state" not in folder and "model.safetensors" in files:
            with safe_open(folder + "/model.safetensors", "pt") as f:
                found |= {(os.path.relpath(folder, place), key): f.get_tensor(key).numpy().tobytes() for key in f.keys()}
    return found


def campaign(script, kills, folder, rng):
    """-> kills that hit a running script. Raises AssertionError where a run did not come out the same."""
    begin = time.time()
    assert start(script, f"{script}-whole", folder, False).wait() == 0, open(f"{folder}/{script}-whole.log").read()[-2000:]
    seconds, done, hits, rounds = time.time() - begin, 0, 0, 0
    while hits < kills:
        out = f"{script}-killed{rounds}"
        rounds, done, finished = rounds + 1, 0, False
        while not finished:
            process = start(script, out, folder, True)
            if hits < kills:
                try:
                    process.wait(rng.uniform(0.4, 1.1) * seconds)  # start-up takes most of it: also there
                except subprocess.TimeoutExpired:
                    kill(process)
                    hits += 1
            finished = process.wait() == 0
            now = steps_done(f"{folder}/{out}")
            assert now >= done, f"{script}: a checkpoint was lost, step {done} -> {now}"
            assert finished or process.returncode == -signal.SIGKILL, open(f"{folder}/{out}.log").read()[-2000:]
            done = now
        assert weights(f"{folder}/{out}") == weights(f"{folder}/{script}-whole"), f"{script}: other weights after kills"
        assert weights(f"{folder}/{out}"), f"{script}: no weights"
    return hits, rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of all scripts together")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        for i, script in enumerate(args.scripts):
            share = (i + 1) * args.kills // len(args.scripts) - i * args.kills // len(args.scripts)
            if share:
                hits, rounds = campaign(script, share, folder, rng)
                print(f"{script}: {hits} kills in {rounds} runs; final weights bitwise those of the undisturbed run", flush=True)


if __name__ == "__main__":
    main()
