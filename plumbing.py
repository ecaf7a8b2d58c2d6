"""Plumbing: options, processes, the folder of a run. Nothing here is about learning; read it for how a script starts.

    Config    a frozen dataclass whose fields become the command line, one line an option: opt(default, help, range)
    launch    parse, join torchrun's processes, run main(cfg, env); what a user can mend is one line and exit status 1
    Env       this process among the others: rank, world, device; all_sum, merge, barrier
    open_run  the run's folder: config.json, metrics.jsonl (Log), summary.json (write_json), state/
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would compete with ours
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress bar, ours
import torch
import torch.distributed as dist
from tqdm import tqdm

from formats import BadInput


# --------------------------------------------------------------------------------------------------
# Options.

def opt(default, help, low=None, high=None, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def parse(Config, argv=None):
    """A Config from the command line; an option out of range is a BadInput that says what would be accepted."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise BadInput(message)
    parser = Parser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, "bool") else {"type": type(f.default)}
        if isinstance(f.default, tuple):
            numbers = f.default and not isinstance(f.default[0], str)
            pair = numbers and isinstance(f.default[0], float)
            kind = {"type": type(f.default[0]) if numbers else str, "nargs": 2 if pair else "+"}
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name, default=f.default, help=f.metadata["help"], **kind)
    values = vars(parser.parse_args(argv))
    for f in dataclasses.fields(Config):
        low, high = f.metadata["low"], f.metadata["high"]
        if isinstance(values[f.name], list):
            values[f.name] = tuple(values[f.name])
        for number in values[f.name] if isinstance(values[f.name], tuple) else [values[f.name]]:
            if isinstance(number, (int, float)) and not (
                    math.isfinite(number) and (low is None or number >= low) and (high is None or number <= high)):
                wanted = ("a finite number" if low is None else f"a number of at least {low}" if high is None
                          else f"a number from {low} to {high}")
                raise BadInput(f"--{f.name} {number}: wanted {wanted}")
    return Config(**values)


def launch(main, Config):
    """Parse the options, join the processes, run `main(cfg, env)`. What a user can mend: one line and exit status 1."""
    try:
        cfg = parse(Config)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun --max-restarts: go on, do not begin again
            cfg = dataclasses.replace(cfg, resume=True)
        if getattr(cfg, "estimate", False):  # no processes, no weights
            import estimate
            estimate.from_options(os.path.basename(sys.argv[0]), cfg)
        else:
            main(cfg, setup())
    except (BadInput, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Mostly all processes say the same, and torchrun stops all when one ends: wait for the first to say it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Processes: who am I among how many, on which device.

@dataclass(frozen=True)
class Env:
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def print(self, *args):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, args)))


def setup():
    """Join the process group that torchrun describes in the environment (none: a single process) -> Env."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30),
                                device_id=device if device.type == "cuda" else None)
    return Env(rank, world, device)


def all_sum(*numbers, env):
    """The sums of these numbers over all processes, as floats."""
    totals = torch.tensor(numbers, dtype=torch.float64, device=env.device)
    if env.world > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def merge(mine, env):
    """The union of all processes' dicts, on every one of them."""
    if env.world == 1:
        return mine
    parts = [None] * env.world
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


@contextlib.contextmanager
def in_turn():
    """The processes of a node go through one after the other: each loads its model into host memory on the way to its GPU,
    and eight times 7B at once would be 120 GB there."""
    turns, mine = 0, int(os.environ.get("LOCAL_RANK", 0))
    if dist.is_initialized():
        turns = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    try:
        for _ in range(mine if turns else 0):
            dist.barrier()
        yield
    finally:
        for _ in range(turns - mine):
            dist.barrier()


def peak_mib(env):
    """Most memory this process has had so far: the GPU's, without one its own."""
    if env.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def barrier(env):
    if env.world > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------
# The folder of a run.

def open_run(cfg, env):
    """Make --out ready; an earlier run is moved aside. Called when all else is loaded: a mistake moves nothing."""
    config_file = os.path.join(cfg.out, "config.json")
    barrier(env)
    if env.rank == 0:
        if not cfg.resume and any(os.path.exists(os.path.join(cfg.out, name)) for name in ("config.json", "state")):
            out = os.path.normpath(cfg.out)  # without a slash at the end
            aside = next(f"{out}.old{i}" for i in range(1, 10**6) if not os.path.exists(f"{out}.old{i}"))
            os.rename(cfg.out, aside)
            env.print(f"{cfg.out} held a run; it is now in {aside} (--resume would have continued it)")
        os.makedirs(os.path.join(cfg.out, "state"), exist_ok=True)
        write_json(config_file, dataclasses.asdict(cfg))
    barrier(env)


def last_checkpoint(cfg):
    """The checkpoint folder --resume continues from, or None. BadInput if the run was started with other options."""
    config_file, state = os.path.join(cfg.out, "config.json"), os.path.join(cfg.out, "state")
    if not cfg.resume or not os.path.exists(config_file):
        return None
    try:
        with open(config_file) as f:
            before = dict(json.load(f))
    except ValueError as error:
        raise BadInput(f"--resume: {config_file} is damaged: {error}") from None
    # Options without effect on the result.
    free = {"resume", "out", "save_every", "micro_batch_size", "grad_checkpoint", "compile", "rows_at_once", "show", "plot",
            "estimate", "world", "card_gib", "show_every", "color"}
    for name, value in json.loads(json.dumps(dataclasses.asdict(cfg))).items():
        if name not in free and before.get(name, value) != value:
            raise BadInput(f"--resume: {cfg.out} was started with --{name} {before[name]}, not {value}")
    found = [name for name in os.listdir(state) if name.startswith("step_")] if os.path.isdir(state) else []
    for folder in (os.path.join(state, name) for name in sorted(found, reverse=True)):
        if reason := damage(folder):
            if os.environ.get("RANK", "0") == "0":
                print(f"--resume: {folder} is damaged ({reason}); looking for the checkpoint before it", file=sys.stderr)
        else:
            return folder
    return None


def damage(folder):
    """What is wrong with a checkpoint's files, or None. Looks at their outlines only: no weights are read."""
    from safetensors import safe_open
    ranks = []
    for place, _, files in os.walk(folder):
        for path in (os.path.join(place, name) for name in files):
            try:
                if path.endswith(".pt"):
                    ranks.append(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["world"])
                elif path.endswith(".safetensors"):
                    safe_open(path, "pt")
            except Exception as error:  # a damaged file raises almost anything
                return f"{os.path.relpath(path, folder)}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None if ranks and len(ranks) == ranks[0] else f"{len(ranks)} rank files of {(ranks or ['?'])[0]}"


def write_json(path, value):
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
    os.replace(path + ".tmp", path)


class Log:
    """metrics.jsonl and the progress bar, on process 0. Resuming first drops the rows the checkpoint does not know."""

    def __init__(self, cfg, env, start, steps):
        self.path, self.on = os.path.join(cfg.out, "metrics.jsonl"), env.rank == 0
        self.last = {}  # the last row of the run that is continued
        if not self.on:
            return
        kept = []
        if start and os.path.exists(self.path):
            with open(self.path) as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= start]
        self.last = json.loads(kept[-1]) if kept else self.last
        with open(self.path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(self.path + ".tmp", self.path)
        self.file = open(self.path, "a")
        name = os.path.basename(os.path.normpath(cfg.out))
        self.bar = tqdm(total=steps, initial=start, desc=name, dynamic_ncols=True, mininterval=0.5)

    def row(self, step, **numbers):
        if self.on:
            finite = {k: v if math.isfinite(v) else None for k, v in numbers.items() if v is not None}  # no NaN in JSON
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()

    def advance(self, **numbers):
        if self.on:
            self.bar.set_postfix({name: f"{number:.4g}" for name, number in numbers.items()}, refresh=False)
            self.bar.update()

    def close(self):
        if self.on:
            self.file.close()
            self.bar.close()


def catch_signals():
    """SIGTERM or Ctrl-C fills this list: the loop finishes its step, saves and ends. A second one ends it at once."""
    caught = []

    def handler(*_):
        if caught:
            raise KeyboardInterrupt
        caught.append(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return caught
