"""Random SIGKILLs over short runs, resumed each time: `python study/kills.py [--kills 100]`.

Every training script runs on two processes, started as torchrun starts them but with their imports
done, so that kills hit the run and not its start. At a random moment both are killed, and the same
command with --resume goes on, until the script's share of kills is spent; then it may end. Its
final weights must be bitwise those of a run that nobody disturbed, and at no time may a checkpoint
be lost: what a resumed run starts from is at least as far as the last one that was complete.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile
import time
from signal import SIGKILL

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SETTING = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
SETTING |= {"PYTHONPATH": ROOT, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}

RL = "--steps 6 --prompts_per_step 2 --group_size 2 --max_new_tokens 6 --eval_problems 2"
SFT = "--steps 12 --batch_size 4"
SCRIPTS = {
    "sft": f"--data rows.jsonl {SFT} --max_new_tokens 4 --eval_problems 2",
    "tdrm": f"--data rows.jsonl {SFT}",
    "rl": f"--data problems.jsonl --prm prm --prm_lr 1e-3 {RL}",
    "prime": f"--data problems.jsonl --accuracy 0 1 {RL}",
    "qrm": f"--data pairs.jsonl {SFT}",
}
COMMON = "--model policy --save_every 1 --eval_every 0"


def prepare(folder):
    """A tiny policy and reward model, rows, problems and pairs."""
    import torch

    import data
    from parts.models import save_model
    from parts.rewards import new_reward_model
    from sft_minimal import new_policy

    tokenizer = data.builtin_tokenizer()
    save_model(folder + "/policy", new_policy(tokenizer, 0), tokenizer)
    new_reward_model(folder + "/policy", tokenizer, torch.float32).save(folder + "/prm")
    problems = data.make_problems(12)
    rows, pairs = data.make_trajectories(problems, 2, label_rollouts=2), []
    for row in rows:
        chosen = "\n\n".join(row["completions"])
        pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": "1+1=2"})
        del row["first_error"]
    for name, content in (("rows", rows), ("problems", problems), ("pairs", pairs)):
        with open(f"{folder}/{name}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in content)


def work(script, arguments, folder, log, environment):
    """One process of a run."""
    os.environ |= environment
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def start(context, name, out, folder):
    """A run, or what is left to do of it -> its two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = os.path.join(ROOT, f"{name}_minimal.py")
    arguments = f"{COMMON} {SCRIPTS[name]} --out {out} --resume".split()
    processes = []
    for rank in range(2):
        mine = {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        args = (script, arguments, folder, f"{folder}/{out}.log", mine)
        processes.append(context.Process(target=work, args=args))
        processes[-1].start()
    return processes


def wait(processes, seconds=600.0):
    """Until both have ended, or for so long -> their exit codes, None of one that still runs."""
    end = time.time() + seconds
    for process in processes:
        process.join(max(0, end - time.time()))
    return [process.exitcode for process in processes]


def steps_done(place):
    states = os.path.join(place, "state")
    names = os.listdir(states) if os.path.isdir(states) else []
    steps = [int(name.removeprefix("step_")) for name in names if name.startswith("step_")]
    return max(steps, default=0)


def weights(place):
    """All tensors of a finished run's model folders, as bytes."""
    from safetensors import safe_open

    found = {}
    for folder, _, files in os.walk(place):
        if "/state" in folder or "model.safetensors" not in files:
            continue
        with safe_open(folder + "/model.safetensors", "pt") as f:
            for key in f.keys():
                name = os.path.relpath(folder, place), key
                found[name] = f.get_tensor(key).numpy().tobytes()
    return found


def campaign(context, name, kills, folder, rng):
    """-> kills that hit a running script, runs. AssertionError where one came out different."""

    def tail(out):
        with open(f"{folder}/{out}.log") as f:
            return f.read()[-2000:]

    whole, begin, hits, rounds = f"{name}-whole", time.time(), 0, 0
    assert wait(start(context, name, whole, folder)) == [0, 0], tail(whole)
    seconds = time.time() - begin
    while hits < kills:
        out, done, finished = f"{name}-killed{rounds}", 0, False
        rounds += 1
        while not finished:
            begin, moment = time.time(), rng.uniform(0.1, 1.0) * seconds if hits < kills else 600
            processes = start(context, name, out, folder)
            codes = wait(processes, moment)
            if None in codes:
                hits += 1
                for process in processes:
                    process.kill()
                codes = wait(processes)
            finished, now = codes == [0, 0], steps_done(f"{folder}/{out}")
            if finished:  # the machine may be faster now, and what is left to do shorter
                seconds = min(seconds, time.time() - begin)
            assert finished or -SIGKILL in codes, tail(out)
            assert now >= done, f"{name}: a checkpoint was lost, step {done} -> {now}"
            done = now
        found = weights(f"{folder}/{out}")
        assert found and found == weights(f"{folder}/{whole}"), f"{name}: other weights after kills"
    return hits, rounds


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--kills", type=int, default=100, help="of all scripts together")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ |= SETTING
    rng, context = random.Random(args.seed), multiprocessing.get_context("forkserver")
    modules = ["prime_minimal", "qrm_minimal", "torch.distributed.optim"]
    context.set_forkserver_preload([*modules, "transformers.models.qwen2.modeling_qwen2"])
    with tempfile.TemporaryDirectory() as folder:
        first = context.Process(target=prepare, args=(folder,))  # waits for the imports
        first.start()
        assert wait([first]) == [0]
        shares = [args.kills // len(args.scripts)] * len(args.scripts)
        for i in range(args.kills % len(args.scripts)):
            shares[i] += 1
        for name, share in zip(args.scripts, shares):
            if share:
                hits, rounds = campaign(context, name, share, folder, rng)
                same = "final weights bitwise those of the undisturbed run"
                print(f"{name}: {hits} kills in {rounds} runs; {same}", flush=True)


if __name__ == "__main__":
    main()
