"""What tests of training runs share: several ranks, what can happen to a run, and what it leaves.

Ranks are gloo processes forked from a server that has torch imported already (a plain `fork` of the
test process could inherit busy threads, a `spawn` would import for seconds). Whatever is patched in
one stays in it. Runs are compared through the files they leave.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

import data
import sft_minimal as sft
from parts import runs
from parts.formats import BadInput
from parts.runs import Processes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch.distributed.optim",
        "transformers.models.qwen2.modeling_qwen2",
        "tqdm",
        "safetensors.torch",
    ]
)


def child(rank, world, meeting, target, args):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    if world > 1:
        meeting = f"file://{meeting}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    target(Processes(rank, world), *args)
    if world > 1:
        dist.destroy_process_group()


def ranks(world, folder, target, *args):
    """Run target(procs, *args) on `world` ranks -> their exit codes, negative for a signal."""
    meeting, started = os.path.join(folder, f"meeting{time.monotonic_ns()}"), []
    for rank in range(world):
        started.append(SERVER.Process(target=child, args=(rank, world, meeting, target, args)))
        started[-1].start()
    deadline = time.monotonic() + 120
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            pytest.fail(f"a rank still runs after two minutes: {target.__name__}{args}")
    return [process.exitcode for process in started]


# --------------------------------------------------------------------------------------------------
# A run, and what can happen in it: `fault` is (function, arguments), called in each rank before it.


def train(procs, script, options, fault=None):
    """`script`: "sft", "tdrm", "rl", "prime" or "qrm". A BadInput is left in OUT.error."""
    if fault:
        fault[0](procs, *fault[1:])
    module = importlib.import_module(f"{script}_minimal")
    try:
        module.main(module.Config(**options), procs)
    except BadInput as error:
        if procs.rank == 0:
            with open(options["out"] + ".error", "w") as f:
                f.write(str(error))
        sys.exit(1)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def last(procs):
    return procs.rank == procs.world - 1


def at_step(procs, at, number):
    """The last rank gets a signal in a step (counted from 0): to stop is for all to agree on.
    Killed are all of them."""
    steps = runs.Run.steps

    def patched(run):
        for step in steps(run):
            if step == at and (last(procs) or number == signal.SIGKILL):
                os.kill(os.getpid(), number)
            yield step

    runs.Run.steps = patched


def in_save(procs, at, where):
    """Killed while the checkpoint of step `at` is written: in the last rank's "state", behind the
    weights of a learner ("model", "prm", "critic"), at the "tokenizer", or when the checkpoint is
    in place and the older one not yet gone ("renamed"). Only one rank dies: the others end with an
    error when it is gone."""
    save = runs.save_checkpoint

    def half(thing, path, *rest, **more):
        with open(path, "wb") as f:
            f.write(b"half")
        die()

    def then_die(function):
        return lambda *args, **options: (function(*args, **options), die())

    def patched(cfg, procs, step, learners):
        if step == at and where == "state" and last(procs):
            torch.save = half
        elif step == at and where == "renamed":
            os.rename = then_die(os.rename)
        elif step == at and where == "tokenizer":
            learners["model"].module.tokenizer.save_pretrained = die
        elif step == at and where in learners:
            model = learners[where].module.model
            model.save_pretrained = then_die(model.save_pretrained)
        save(cfg, procs, step, learners)

    runs.save_checkpoint = patched


# --------------------------------------------------------------------------------------------------
# Files.


def write_rows(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def save_policy(folder, seed=0):
    """The built-in policy, untrained, as a model folder."""
    tokenizer = data.builtin_tokenizer()
    sft.new_policy(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def metrics(out):
    """The rows of metrics.jsonl."""

    def no_json(name):
        raise ValueError(f"{name} is no JSON")  # Python alone would read it

    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line, parse_constant=no_json) for line in f]


def numbers(out):
    """The same, without what the clock and the machine put there."""
    clock = ("seconds_", "peak_mib")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in metrics(out)]


def assert_same_run(out, expected, folders=("model",)):
    """Bitwise, with the models in `folders`."""
    assert numbers(out) == numbers(expected)
    for name in ("summary.json", *(f"{folder}/model.safetensors" for folder in folders)):
        ours, theirs = (os.path.join(folder, name) for folder in (out, expected))
        with open(ours, "rb") as a, open(theirs, "rb") as b:
            assert a.read() == b.read(), name
