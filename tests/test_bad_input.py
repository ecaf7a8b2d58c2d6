"""What a user can get wrong, through the real scripts: one line that names the file, line or
option, and a non-zero exit status.

Most scripts run in this process by `runpy`, as `python SCRIPT.py` would run them less the imports;
a few are started for real.
"""

import dataclasses
import gzip
import importlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time

import pytest

import data
import sft_minimal as sft
from conftest import ROOT
from parts.runs import argument

S, T, D = "sft_minimal.py", "tdrm_minimal.py", "data.py"
SCRIPTS = (S, T, "search_minimal.py", "rl_minimal.py", "prime_minimal.py", "qrm_minimal.py")

# --------------------------------------------------------------------------------------------------
# Files and models, good and bad.

GOOD = {"prompt": "1+2", "completions": ["1+2=3", "\\boxed{3}"], "labels": [1, 1], "answer": "3"}
FINE = GOOD | {"prompt": "2+2"}  # a second question, so that one can be held out
RATED = {"text": "3", "rating": 1}
RATED = {"completions": [RATED], "human_completion": None, "chosen_completion": 0}
GAVE_UP = {"finish_reason": "give_up", "steps": [RATED]}
OPEN = [{"question": {"problem": q}, "label": GAVE_UP} for q in ("1+2?", "2+2?")]
NO_STEP = {"question": {"problem": "1+2?"}, "label": {"finish_reason": "bad_problem", "steps": []}}
NAN = b'{"prompt": "a", "completions": ["b"], "labels": [NaN]}\n'


def lines(*rows):
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def second(**fields):
    """A good row, and one that is good but for these fields."""
    return lines(GOOD, GOOD | fields)


FILES = {
    "good.jsonl": lines(GOOD, FINE),
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n",
    "problems.jsonl": lines({"question": "1+2", "answer": "3"}),
    "pairs.jsonl": lines({"prompt": "1+2", "chosen": "3", "rejected": "4"}),
    "no_prompt.jsonl": lines(GOOD, without(GOOD, "prompt")),
    "no_steps.jsonl": lines(GOOD, without(GOOD, "completions")),
    "unknown.jsonl": lines({"text": "1+2=3"}),
    "prompt_number.jsonl": second(prompt=12),
    "steps_text.jsonl": second(completions="1+2=3"),
    "step_number.jsonl": second(completions=["a", 3]),
    "step_blank.jsonl": second(completions=["a", " "]),
    "steps_empty.jsonl": second(completions=[]),
    "labels_short.jsonl": second(labels=[1]),
    "label_text.jsonl": second(labels=["+", "-"]),
    "label_2.jsonl": second(labels=[1, 2]),
    "label_nan.jsonl": lines(GOOD, NAN),
    "correct_text.jsonl": second(correct="yes"),
    "nothing.jsonl": lines(GOOD, without(GOOD, "labels", "answer")),
    "truncated.jsonl": lines(GOOD, FINE)[:-20],
    "array.jsonl": json.dumps([GOOD, GOOD | {"labels": [1]}]).encode(),
    "array_open.jsonl": b"[" + lines(GOOD),
    "list.jsonl": lines(GOOD, b'"text"\n'),
    "latin1.jsonl": lines(GOOD) + '{"prompt": "où"}'.encode("latin-1"),
    "nul.jsonl": lines(GOOD) + b"\0" * 9,
    "mixed.jsonl": lines(GOOD, {"question": "1", "answer": "1"}),
    "damaged.jsonl.gz": gzip.compress(lines(GOOD) * 50)[:40],
    "not_gzip.jsonl.gz": lines(GOOD),
    "one_question.jsonl": lines(GOOD, GOOD, GOOD),
    "wrong.jsonl": lines(GOOD | {"correct": False}, FINE | {"correct": False}),
    "no_labels.jsonl": lines(without(GOOD, "labels"), without(FINE, "labels")),
    "open.jsonl": lines(*OPEN),
    "no_step.jsonl": lines(NO_STEP, NO_STEP),
    "out_file": b"not a folder",
}

# What the message names after the file's name; for every script that reads trajectories.
DATA = [
    ("missing.jsonl", "No such file"),
    ("empty.jsonl", "no rows"),
    ("blank.jsonl", "no rows"),
    ("policy", "directory"),
    ("no_prompt.jsonl", ":2: lacks prompt"),
    ("no_steps.jsonl", ":2: lacks completions"),
    ("unknown.jsonl", ":1: is of no known format"),
    ("prompt_number.jsonl", ":2: 'prompt'"),
    ("steps_text.jsonl", ":2: 'completions'"),
    ("step_number.jsonl", ":2: 'step 2'"),
    ("step_blank.jsonl", ":2: 'step 2'"),
    ("steps_empty.jsonl", ":2: 'completions'"),
    ("labels_short.jsonl", ":2: 'labels' has 1 entries for 2"),
    ("label_text.jsonl", ":2: label 1"),
    ("label_2.jsonl", ":2: label 2"),
    ("label_nan.jsonl", ":2: is not a whole"),
    ("correct_text.jsonl", ":2: 'correct'"),
    ("truncated.jsonl", ":2: is not a whole JSON object"),
    ("array.jsonl", ":item 2: 'labels' has 1 entries for 2"),
    ("array_open.jsonl", ":1: is not a whole"),
    ("list.jsonl", ":2: is text"),
    ("latin1.jsonl", ":2: is not UTF-8"),
    ("nul.jsonl", ":2: holds NUL"),
    ("mixed.jsonl", ":2: lacks prompt"),
    ("damaged.jsonl.gz", "cannot be read"),
    ("not_gzip.jsonl.gz", "cannot be read"),
]

# What the message names after the folder's name.
MODELS = [
    ("missing", "no such folder"),
    ("good.jsonl", ""),
    ("hollow", ""),
    ("no_config", ""),
    ("config_broken", "JSON"),
    ("config_list", ""),
    ("config_typeless", ""),
    ("config_alien", "alien"),
    ("config_wider", ""),
    ("no_weights", ""),
    ("weights_empty", ""),
    ("weights_cut", ""),
    ("weights_html", ""),
    ("weights_lacking", ""),
    ("tokenizer_broken", ""),
    ("no_tokenizer", ""),
    ("few_words", ""),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all the files, a good model ("policy") and its damaged copies."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForTokenClassification

    place, tokenizer = tmp_path_factory.mktemp("bad"), data.builtin_tokenizer()
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    model = sft.new_policy(tokenizer, 0)
    good = place / "policy"
    model.save_pretrained(good)
    tokenizer.save_pretrained(good)
    config = json.loads((good / "config.json").read_text())
    weights = (good / "model.safetensors").read_bytes()

    def damaged(name, file, content=None):
        """A copy with other bytes, or other JSON, or nothing in place of a file."""
        shutil.copytree(good, place / name)
        (place / name / file).unlink()
        if content is not None:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            (place / name / file).write_bytes(content)

    (place / "hollow").mkdir()
    damaged("no_config", "config.json")
    damaged("config_broken", "config.json", b'{"model_type": "qwen2", ')
    damaged("config_list", "config.json", [])
    damaged("config_typeless", "config.json", without(config, "model_type", "architectures"))
    damaged("config_alien", "config.json", config | {"model_type": "alien"})
    damaged("config_wider", "config.json", config | {"hidden_size": 128})
    damaged("no_weights", "model.safetensors")
    damaged("weights_empty", "model.safetensors", b"")
    damaged("weights_cut", "model.safetensors", weights[: len(weights) // 2])
    damaged("weights_html", "model.safetensors", b"<html>moved</html>" * 99)
    damaged("weights_lacking", "model.safetensors")
    some = load_file(good / "model.safetensors")
    some = {name: tensor for name, tensor in some.items() if "layers.1" not in name}
    save_file(some, place / "weights_lacking" / "model.safetensors", metadata={"format": "pt"})
    damaged("no_tokenizer", "tokenizer.json")
    damaged("tokenizer_broken", "tokenizer.json", b"{")
    damaged("few_words", "model.safetensors")  # more tokens than the model has embeddings
    model.resize_token_embeddings(9)
    model.save_pretrained(place / "few_words")
    damaged("two_labels", "model.safetensors")
    classifier = AutoModelForTokenClassification.from_pretrained(good, num_labels=2)
    classifier.save_pretrained(place / "two_labels")
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def no_network(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)  # where runs/ would be made


@pytest.fixture
def error_of(capsys, monkeypatch):
    """error_of(script, words): run it to its exit -> the one line it says on stderr."""

    def run(script, words):
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
        err, code = capsys.readouterr().err, exit.value.code
        if isinstance(code, str):  # the interpreter prints it and exits with 1
            err += code + "\n"
        assert code not in (0, None)
        assert err.count("\n") == 1 and err.startswith(script + ": error: "), err
        assert not os.path.exists("run/model")
        return err

    return run


def fill(text, place):
    """ "{name}" is a file or folder of the place."""
    return text.replace("{", f"{place}/").replace("}", "")


# --------------------------------------------------------------------------------------------------
# Options.


def numbers():
    """(script, option, its type, low, high) of every option that is one number, once."""
    seen = set()
    for script in SCRIPTS:
        for f in dataclasses.fields(importlib.import_module(script.removesuffix(".py")).Config):
            about, metadata = argument(f), dict(f.metadata)
            if about.get("type") in (int, float) and "nargs" not in about:
                bounds = metadata["low"], metadata["high"]
                if (f.name, bounds) not in seen:
                    seen.add((f.name, bounds))
                    yield script, f.name, about["type"], *bounds


@pytest.mark.parametrize("script, name, kind, low, high", list(numbers()))
def test_every_number_out_of_range(script, name, kind, low, high, error_of):
    values = ["many", "", "1e"] + (["1.5"] if kind is int else ["nan", "inf", "-inf"])
    values += [] if low is None else [str(low - 1)]
    values += [] if high is None else [str(high + 1)]
    for value in values:
        # The missing file is a second mistake: were the number taken, it would be told of that.
        err = error_of(script, [f"--{name}={value}", "--data", "/no/such/file"])
        shown = [value] if value in ("many", "", "1e") else [value, str(float(value))]
        assert f"--{name}" in err and any(v in err for v in shown)


def test_every_number_has_a_bound():
    unbounded = [name for _, name, _, low, _ in numbers() if low is None]
    assert unbounded == ["margin"]


MINE = "--data {good.jsonl} --model {policy} "
OPTIONS = [  # script, words, what the message names
    (S, "--lr -1", "--lr -1.0"),
    (S, "--batch_size 0", "--batch_size 0"),
    (S, "--save_every -1", "--save_every -1"),
    (T, "--gamma 1.5", "--gamma 1.5"),
    (T, "--n_step 0", "--n_step 0"),
    (T, "--lam 2", "--lam 2.0"),
    (T, "--lr nan", "--lr nan"),
    (T, "--lr inf", "--lr inf"),
    (T, MINE + "--steps 1 --correct nan 0.2", "--correct"),
    (T, MINE + "--steps 1 --wrong inf 0", "--wrong"),
    (T, "--correct 0.5", "--correct"),
    (T, "--correct a b", "--correct"),
    (S, "--learning_rate 1", "--learning_rate"),
    (S, "--step 1", "--step"),
    (T, "stray.jsonl", "stray.jsonl"),
    (T, "--method td3", "--method"),
    (S, "--dtype float8", "--dtype"),
    (T, "--label_kind firm", "--label_kind"),
    (S, "--data", "--data"),
    (S, "--lr", "--lr"),
    (S, "--resume=maybe", "--resume"),
    (S, "--method TDRM", "--method"),
    (D, "--sideways", "--sideways"),
    (S, MINE + "--steps 1 --seed 99999999999999999999", "--seed"),
    (S, "--data {good.jsonl}", "--model"),
    (T, "--data {good.jsonl}", "--model"),
    (S, "--data builtin {good.jsonl} --steps 1 --eval_problems 1", "--data"),
    (T, "--data builtin {good.jsonl} --model {policy} --problems 9", "--data"),
    (S, "--data {good.jsonl} builtin --model {policy}", "builtin"),
    (T, MINE + "--max_length 4096", "--max_length 4096: the model takes at most 2048"),
    (S, MINE + "--max_length 4096", "--max_length 4096: the model takes at most 2048"),
    (T, MINE + "--max_length 5", "--max_length 5"),
    (S, MINE + "--max_length 5", "--max_length 5"),
    (T, MINE + "--out {out_file}", "{out_file}"),
    (S, MINE + "--out {out_file}", "{out_file}"),
    (T, MINE + "--out {out_file}/run", "{out_file}/run"),
    (S, MINE + "--out /dev/null/run", "/dev/null/run"),
    (T, MINE + "--out /proc/run", "/proc/run"),
]

LABELS = "--label_rollouts 0 --problems 9 --model {policy} "
USES = [  # files in order, but not for this
    (T, "--data {problems.jsonl} --model {policy}", "problems.jsonl:1: holds problems"),
    (S, "--data {pairs.jsonl} --model {policy}", "pairs.jsonl:1: holds pairs"),
    (T, MINE + "--eval {problems.jsonl}", "problems.jsonl:1: holds problems"),
    (T, MINE + "--eval {missing}", "missing: cannot be read"),
    (T, MINE + "--eval {labels_short.jsonl}", "labels_short.jsonl:2: "),
    (T, MINE + "--eval {no_step.jsonl}", "no_step.jsonl:1: has no rated step"),
    (T, "--score {missing} --model {policy}", "missing: cannot be read"),
    (T, "--score {pairs.jsonl} --model {policy}", "pairs.jsonl:1: holds"),
    (T, "--score {good.jsonl} --model {nothing}", "nothing: no such folder"),
    (T, "--score {good.jsonl} --model {two_labels}", "2 labels"),
    (T, "--score {empty.jsonl} --model {policy}", "empty.jsonl: has no rows"),
    (T, "--data {one_question.jsonl} --model {policy}", "the same question"),
    (S, "--data {one_question.jsonl} --model {policy}", "the same question"),
    (T, "--data {no_labels.jsonl} --model {policy} --method ScalarPRM", "no_labels.jsonl:"),
    (T, LABELS + "--method ScalarPRM", "--label_rollouts 0"),
    (T, "--data {open.jsonl} --model {policy}", "open.jsonl:"),
    (T, "--data {open.jsonl} --model {policy} --method ScalarORM", "open.jsonl:"),
    (T, "--data {no_step.jsonl} --model {policy}", "no_step.jsonl:1: has no rated step"),
    (S, "--data {wrong.jsonl} --model {policy}", "--data"),
    (T, "--data {good.jsonl} --model {two_labels}", "two_labels: "),
    (T, "--data {good.jsonl} --model {two_labels}", "2 labels; wanted"),
    (T, "--data {nothing.jsonl} --model {policy}", "nothing.jsonl:2: nothing to learn from"),
    (D, "{good.jsonl} {missing}", "missing: cannot be read"),
    (D, "{good.jsonl} --model {nothing}", "nothing: no such folder"),
]


@pytest.mark.parametrize("script, words, named", OPTIONS + USES)
def test_options_and_uses(script, words, named, place, error_of):
    words = fill(words, place).split()
    if script != D and "--out" not in words:
        words += ["--out", "run"]
    assert fill(named, place) in error_of(script, words)


@pytest.mark.parametrize("script", [S, T, D])
@pytest.mark.parametrize("file, named", DATA)
def test_data_files(script, file, named, place, error_of):
    words = [str(place / file)]
    if script != D:
        words = ["--data", *words, "--model", str(place / "policy"), "--out", "run"]
    err = error_of(script, words)
    assert file in err and named in err


def with_model(name, place):
    words = ["--data", str(place / "good.jsonl"), "--model", str(name), "--out", "run"]
    return words + ["--steps", "1", "--batch_size", "2"]


@pytest.mark.parametrize("script", [S, T])
@pytest.mark.parametrize("folder, named", MODELS)
def test_model_folders(script, folder, named, place, error_of):
    err = error_of(script, with_model(place / folder, place))
    assert f"--model {place / folder}" in err and named in err


NAMES = ["nobody/nothing", "nothing", "./nothing", "/nothing", "no/such/model", "bad name/x"]


@pytest.mark.parametrize("name", [*NAMES, "x" * 300])
def test_model_names(name, place, error_of):
    began = time.monotonic()
    assert f"--model {name}" in error_of(T, with_model(name, place))
    assert time.monotonic() - began < 10  # no retries


def test_a_damaged_config_of_a_resumed_run(place, error_of):
    os.makedirs("run/state")
    with open("run/config.json", "w") as f:
        f.write('{"lr": ')
    words = with_model(place / "policy", place) + ["--resume"]
    assert "run/config.json" in error_of(T, words)


def test_a_mistake_does_not_move_a_finished_run(place, error_of):
    os.makedirs("run")
    files = ["config.json", "metrics.jsonl"]
    for name in files:
        with open(f"run/{name}", "w") as f:
            f.write("{}\n")
    for bad in (["--data", "nothing"], ["--model", "nothing"], ["--lr", "-1"]):
        error_of(T, with_model(place / "policy", place) + bad)
        assert os.listdir(".") == ["run"] and sorted(os.listdir("run")) == files


# --------------------------------------------------------------------------------------------------
# Started for real.


def start(*words):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command, began = [sys.executable, *words], time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 60 and done.returncode != 0
    return done


def on_two_ranks(script, *words):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return start(*torchrun, script, *words)


PROCESSES = [
    (S, ["--lr", "-1"], "error: --lr -1.0: wanted a number of at least 0"),
    (D, ["missing.jsonl"], "error: missing.jsonl: cannot be read"),
]


@pytest.mark.parametrize("script, words, message", PROCESSES)
def test_as_a_process(script, words, message):
    done = start(os.path.join(ROOT, script), *words)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"{script}: {message}") and done.stderr.count("\n") == 1


RANKS = [
    (S, "--batch_size 0", "sft_minimal.py: error: --batch_size 0: "),  # before the ranks meet
    (T, "--data {good.jsonl}", "tdrm_minimal.py: error: --data: your own trajectories need"),
]  # and after


@pytest.mark.parametrize("script, words, message", RANKS)
def test_on_two_ranks(script, words, message, place):
    done = on_two_ranks(os.path.join(ROOT, script), *fill(words, place).split())
    ours, _, report = done.stderr.partition(
        "torch.distributed.elastic"
    )  # torchrun's comes after it
    assert done.stderr.count(message) == 1 and "Traceback" not in ours.split(message)[0]
    assert "exitcode" in done.stderr and "SIGKILL" not in report  # they ended by themselves


ONE = """
import sys, time
sys.path.insert(0, {root!r})
import sft_minimal as sft
from parts.formats import BadInput
from parts.runs import launch
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.2))

def main(cfg, procs):
    if procs.rank == 1:
        raise BadInput("only here")
    procs.barrier()

launch(main, sft.Config)
"""


def test_what_only_one_rank_knows(tmp_path):
    """An error of the second process alone is told, too, and the first does not wait for ever."""
    (tmp_path / "one.py").write_text(ONE.format(root=ROOT))
    done = on_two_ranks(str(tmp_path / "one.py"))
    assert done.returncode == 1 and done.stderr.count("one.py: error: only here") == 1


def test_no_import_that_is_not_needed():
    """A script's own imports are torch, numpy and tqdm; transformers comes with the first model."""
    scripts = ", ".join(script.removesuffix(".py") for script in SCRIPTS)
    late = ("transformers", "matplotlib", "math_verify", "torch._dynamo")
    code = f"import sys, {scripts}, parts.estimate; print([m for m in {late} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
