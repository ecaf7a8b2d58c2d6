"""How a script starts and what it leaves: options, processes, the folder of a run. Nothing here is
about learning.

    opt, parse    a frozen dataclass becomes the command line: opt(default, help, range) a line
    launch        parse, join torchrun's processes, run main(cfg, procs); what a user can mend is
                  one line and exit status 1
    Processes     this process among the others: rank, world, device; sums, unions, shares
    Run           the books of a training run: resume, metrics.jsonl, progress bar, signals,
                  checkpoints, summary.json

A chapter's main() keeps the lines that learn, and its loop is `for step in run.steps():`. Between
two steps, Run writes what the step logged, saves where it is time to, and ends the loop where a
signal asked for it. A resumed run continues bitwise: batches are a pure function of (seed, step),
and everything else is in the checkpoint.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import typing
from dataclasses import dataclass
from datetime import timedelta

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with ours
cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, cores)))  # of the tokenizer, where it may
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress bar, ours
import torch
import torch.distributed as dist
from tqdm import tqdm

from parts.formats import BadInput

# --------------------------------------------------------------------------------------------------
# Options.


def opt(default, help, low=None, high=None, choices=None):
    about = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


def argument(field):
    """What argparse wants to know of a dataclass field: its type annotation says nearly all of
    it."""
    kinds = typing.get_args(field.type)
    kind = next((k for k in kinds if k is not type(None)), field.type)
    note = "" if field.default in (None, ()) else f" (default: {field.default})"
    about = {"help": (field.metadata["help"] + note).replace("%", "%%"), "default": field.default}
    if kind is bool:
        return about | {"action": argparse.BooleanOptionalAction}
    if field.metadata["choices"]:
        about["choices"] = field.metadata["choices"]
    if typing.get_origin(field.type) is tuple:  # (str, ...) takes one or more, (float, float) two
        about["nargs"] = "+" if kinds[-1] is Ellipsis else len(kinds)
    about["metavar"] = None if "choices" in about else kind.__name__.upper()
    return about | {"type": kind}


def parse(Config, argv=None, description=None):
    """A Config from the command line; an option out of range is a BadInput that says what is
    accepted."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise BadInput(message)

    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, allow_abbrev=False, formatter_class=plain)
    for field in dataclasses.fields(Config):
        parser.add_argument("--" + field.name, **argument(field))
    values = vars(parser.parse_args(argv))
    for field in dataclasses.fields(Config):
        value = values[field.name]
        if isinstance(value, list):
            value = values[field.name] = tuple(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)):
                check_range(field.name, number, field.metadata["low"], field.metadata["high"])
    return Config(**values)


def check_range(name, number, low, high):
    above, below = low is None or number >= low, high is None or number <= high
    if math.isfinite(number) and above and below:
        return
    wanted = "a finite number"
    if low is not None:
        wanted = f"a number of at least {low}" if high is None else f"a number from {low} to {high}"
    raise BadInput(f"--{name} {number}: wanted {wanted}")


def launch(main, Config, description=None):
    """Parse the options, join the processes, run `main(cfg, procs)`."""
    try:
        cfg = parse(Config, description=description)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts: go on
            cfg = dataclasses.replace(cfg, resume=True)
        main(cfg, join_processes())
    except (BadInput, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Mostly all say the same, and torchrun stops all when one ends: wait for the first to
            # say it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        script = os.path.basename(sys.argv[0])
        print(f"{script}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Processes: who am I among how many, on which device.


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def print(self, *args):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, args)))

    def mine(self, items):
        """This process's share of a list: every world-th item."""
        return items[self.rank :: self.world]

    def sum(self, *numbers):
        """The sums of these numbers over all processes, as a list of floats."""
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, mine):
        """What each process has, in the order of their ranks, on every one of them."""
        if self.world == 1:
            return [mine]
        parts = [None] * self.world
        dist.all_gather_object(parts, mine)
        return parts

    def merge(self, mine):
        """The union of all processes' dicts, on every one of them."""
        union = {}
        for part in self.gather(mine):
            union |= part
        return union

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def join_processes():
    """Join the process group that torchrun describes in the environment; without one, be alone."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if cuda else "gloo"
        limit = timedelta(minutes=30)
        dist.init_process_group(backend, timeout=limit, device_id=device if cuda else None)
    return Processes(rank, world, device)


# --------------------------------------------------------------------------------------------------
# The folder of a run.

# Options without effect on the result: --resume may change them.
FREE = {"resume", "out", "save_every", "micro_batch_size", "grad_checkpoint", "compile"}
FREE |= {"rows_at_once", "show", "color"}


def open_folder(cfg, procs):
    """Make --out ready; an earlier run is moved aside. Called when all else is loaded: a mistake
    moves nothing."""
    procs.barrier()
    if procs.rank == 0:
        held = [os.path.join(cfg.out, name) for name in ("config.json", "state")]
        if not cfg.resume and any(map(os.path.exists, held)):
            out, number = os.path.normpath(cfg.out), 1  # without a slash at the end
            while os.path.exists(f"{out}.old{number}"):
                number += 1
            os.rename(cfg.out, f"{out}.old{number}")
            where = f"it is now in {out}.old{number} (--resume would have continued it)"
            procs.print(f"{cfg.out} held a run; {where}")
        os.makedirs(os.path.join(cfg.out, "state"), exist_ok=True)
        write_json(os.path.join(cfg.out, "config.json"), dataclasses.asdict(cfg))
    procs.barrier()


def last_checkpoint(cfg):
    """The checkpoint folder --resume continues from, or None. BadInput if the run was started with
    other options."""
    config_file, states = os.path.join(cfg.out, "config.json"), os.path.join(cfg.out, "state")
    if not cfg.resume or not os.path.exists(config_file):
        return None
    try:
        with open(config_file) as f:
            before = dict(json.load(f))
    except ValueError as error:
        raise BadInput(f"--resume: {config_file} is damaged: {error}") from None
    for name, value in json.loads(json.dumps(dataclasses.asdict(cfg))).items():
        if name not in FREE and before.get(name, value) != value:
            was = f"was started with --{name} {before[name]}, not {value}"
            raise BadInput(f"--resume: {cfg.out} {was}")
    names = sorted(os.listdir(states), reverse=True) if os.path.isdir(states) else []
    for folder in (os.path.join(states, name) for name in names if name.startswith("step_")):
        reason = damage(folder)
        if not reason:
            return folder
        if os.environ.get("RANK", "0") == "0":
            text = f"--resume: {folder} is damaged ({reason}); looking for the one before it"
            print(text, file=sys.stderr)
    return None


def damage(folder):
    """What is wrong with a checkpoint's files, or None. Looks at their outlines only: no weights
    are read."""
    from safetensors import safe_open

    worlds = []
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            try:
                if path.endswith(".pt"):
                    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                    worlds.append(state["world"])
                elif path.endswith(".safetensors"):
                    safe_open(path, "pt")
            except Exception as error:  # a damaged file raises almost anything
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                return f"{os.path.relpath(path, folder)}: {reason}"
    if not worlds or len(worlds) != worlds[0]:
        return f"{len(worlds)} rank files of {(worlds or ['?'])[0]}"
    return None


def write_json(path, value):
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
    os.replace(path + ".tmp", path)


# --------------------------------------------------------------------------------------------------
# Checkpoints.


def save_checkpoint(cfg, procs, step, learners):
    """All of a run's state after `step` steps, as state/step_N: each learner's weights in a folder
    of its name, and one file a process. It appears by one rename when every process has written its
    part, so a run killed at any moment finds either this checkpoint or the one before."""
    states = os.path.join(cfg.out, "state")
    folder, tmp = os.path.join(states, f"step_{step:08d}"), os.path.join(states, "tmp")
    if os.path.exists(folder):
        return
    if procs.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)  # what a run killed while saving left behind
        os.makedirs(tmp)
    procs.barrier()
    cuda = procs.device.type == "cuda"
    state = {
        "step": step,
        "world": procs.world,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if cuda else None,
        "optimizers": {name: optimizer_states(learner) for name, learner in learners.items()},
    }
    try:
        torch.save(state, os.path.join(tmp, f"rank{procs.rank}.pt"))
        for name, learner in learners.items() if procs.rank == 0 else ():
            learner.module.model.save_pretrained(os.path.join(tmp, name))
            learner.module.tokenizer.save_pretrained(os.path.join(tmp, name))
            learner.module.describe(os.path.join(tmp, name))
    except Exception as error:  # of a full disk: OSError, RuntimeError or SafetensorError
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"--out {cfg.out}: the checkpoint of step {step} could not be written ({reason}); "
            "the one before it is whole, --resume continues from there"
        ) from None
    procs.barrier()
    if procs.rank == 0:
        os.rename(tmp, folder)
        for name in sorted(os.listdir(states))[:-2]:  # the one before stays, should this be damaged
            shutil.rmtree(os.path.join(states, name))


def held_by(optimizer):
    """This process's share of a sharded optimizer; one that is not sharded holds all."""
    return getattr(optimizer, "optim", optimizer)


def optimizer_states(learner):
    """{index of a parameter in model.parameters(): its state}, for those whose state this process
    holds."""
    held, states = held_by(learner.optimizer), {}
    for i, p in enumerate(learner.module.model.parameters()):
        if p in held.masters:
            states[i] = held.state_of(p)
    return states


def load_checkpoint(folder, procs, learners):
    """Optimizers and random state from a checkpoint (weights are loaded as from any model folder)
    -> steps done.

    On another number of processes each takes the masters and moments it now holds from whichever
    wrote them."""
    states, first = {}, None
    for name in os.listdir(folder):
        if name.endswith(".pt"):
            path = os.path.join(folder, name)
            first = states[name] = torch.load(path, "cpu", weights_only=True, mmap=True)
    for name, learner in learners.items():
        held, saved = held_by(learner.optimizer), {}
        for state in states.values():
            saved |= state["optimizers"][name]
        for i, p in enumerate(learner.module.model.parameters()):
            if p in held.masters:
                held.load_state(p, saved[i])
    if first["world"] == procs.world:
        mine = states[f"rank{procs.rank}.pt"]
        torch.set_rng_state(mine["rng"].clone())
        if mine["cuda_rng"] is not None:
            torch.cuda.set_rng_state(mine["cuda_rng"].clone())
    return first["step"]


# --------------------------------------------------------------------------------------------------
# The books of a training run.


class Run:
    """What a training run keeps beside learning. `learners` {name: training.Learner}; the first is
    the run's main one.

        run = Run(cfg, procs, checkpoint, steps, {"model": learner})
        for step in run.steps():
            ... run.log(loss=loss) ...
            if run.evaluates: run.log(**evaluate())
        if not run.stopped: run.finish(evaluate())
    """

    def __init__(self, cfg, procs, checkpoint, total, learners):
        self.cfg, self.procs, self.total, self.learners = cfg, procs, total, learners
        self.begin, self.stopped, self.row, self.signals = time.time(), False, {}, []
        self.start = load_checkpoint(checkpoint, procs, learners) if checkpoint else 0
        open_folder(cfg, procs)
        self.skipped_before = self.keep_rows()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, *_):
        """SIGTERM or Ctrl-C: the loop finishes its step, saves and ends. A second one ends it at
        once."""
        if self.signals:
            raise KeyboardInterrupt
        self.signals.append(1)

    def keep_rows(self):
        """Drop the rows of metrics.jsonl that the checkpoint does not know -> steps skipped so
        far."""
        self.path, kept = os.path.join(self.cfg.out, "metrics.jsonl"), []
        if self.procs.rank > 0:
            return 0
        if self.start and os.path.exists(self.path):
            with open(self.path) as f:
                whole = [line for line in f if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= self.start]
        with open(self.path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(self.path + ".tmp", self.path)
        return json.loads(kept[-1]).get("skipped", 0) if kept else 0

    @property
    def skipped(self):
        """Optimizer steps that were skipped because a gradient was not finite."""
        return self.skipped_before + sum(learner.skipped for learner in self.learners.values())

    @property
    def evaluates(self):
        """Is it time to evaluate in this step? At the end, the chapter does so anyway."""
        done, every = self.step + 1, self.cfg.eval_every
        return bool(every) and done % every == 0 and done < self.total

    def log(self, **numbers):
        """Numbers for this step's row of metrics.jsonl; the first three show beside the progress
        bar."""
        self.row |= numbers

    def lap(self, what):
        """Log the seconds since the last lap, or since the step began. Only where equal runs need
        not write equal files."""
        now = time.time()
        self.row["seconds_" + what], self.mark = now - self.mark, now
        self.row["peak_mib"] = peak_mib(self.procs.device)

    def write(self, step):
        if self.procs.rank == 0:
            row = {"step": step}
            for name, value in self.row.items():
                if value is not None:  # NaN shows, as null: it is no JSON
                    row[name] = value if math.isfinite(value) else None
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        self.row = {}

    def steps(self):
        """Yield the steps that are left to do, from 0, and keep the books between them."""
        name, quiet = os.path.basename(os.path.normpath(self.cfg.out)), self.procs.rank > 0
        show = {"desc": name, "dynamic_ncols": True, "mininterval": 0.5, "disable": quiet}
        with tqdm(total=self.total, initial=self.start, **show) as bar:
            for self.step in range(self.start, self.total):
                self.mark = time.time()
                yield self.step
                done = self.step + 1
                shown = list(self.row.items())[:3]
                bar.set_postfix({name: f"{value:.4g}" for name, value in shown}, refresh=False)
                self.log(skipped=self.skipped)
                self.write(done)
                bar.update()
                (stop,) = self.procs.sum(bool(self.signals))  # all must agree to stop
                due = self.cfg.save_every and done % self.cfg.save_every == 0
                if stop or done == self.total or due:
                    save_checkpoint(self.cfg, self.procs, done, self.learners)
                if stop:
                    self.stopped = True
                    break
        if self.stopped:
            self.procs.print(f"stopped after step {done} of {self.total}; --resume continues")

    def finish(self, summary, headline):
        """Save the models, the first in model/ and others in folders of their names; write and
        return the summary."""
        summary = summary | {"steps": self.total, "skipped": self.skipped}
        if self.procs.rank == 0:
            for name, learner in self.learners.items():
                learner.module.save(os.path.join(self.cfg.out, name))
            write_json(os.path.join(self.cfg.out, "summary.json"), summary)
        self.procs.barrier()
        folder = os.path.join(self.cfg.out, next(iter(self.learners)))
        self.procs.print(f"{headline}; {time.time() - self.begin:.0f} s; the result is in {folder}")
        return summary


def peak_mib(device):
    """Most memory this process has had so far: the GPU's, without one its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
