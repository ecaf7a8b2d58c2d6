"""What a user can get wrong, through the real scripts: one line that names the file, line or option, and a non-zero exit status.

Most scripts run in this process by `runpy`, as `python SCRIPT.py` would run them less the imports; a few are started for real.
"""
import dataclasses
import gzip
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
import tdrm_minimal as tdrm
from conftest import ROOT

GOOD = {"prompt": "1+2", "completions": ["1+2=3", "\\boxed{3}"], "labels": [1, 1], "answer": "3"}
FINE = {**GOOD, "prompt": "2+2"}  # a second question, so that one can be held out
LABELS_ONLY = {key: value for key, value in GOOD.items() if key != "answer"}
PRM800K = {"question": {"problem": "1+2?"}, "label": {"finish_reason": "give_up", "steps": [
    {"completions": [{"text": "3", "rating": 1}], "human_completion": None, "chosen_completion": 0}]}}
NO_STEP = {"question": {"problem": "1+2?"}, "label": {"finish_reason": "bad_problem", "steps": []}}


def lines(*rows):
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def without(key, row=GOOD):
    return {name: value for name, value in row.items() if name != key}


FILES = {
    "good.jsonl": lines(GOOD, FINE), "empty.jsonl": b"", "blank.jsonl": b"\n \n", "problems.jsonl": lines({"question": "1+2", "answer": "3"}),
    "pairs.jsonl": lines({"prompt": "1+2", "chosen": "3", "rejected": "4"}),
    "no_prompt.jsonl": lines(GOOD, without("prompt")), "no_steps.jsonl": lines(GOOD, without("completions")),
    "unknown.jsonl": lines({"text": "1+2=3"}), "prompt_number.jsonl": lines(GOOD, {**GOOD, "prompt": 12}),
    "steps_text.jsonl": lines(GOOD, {**GOOD, "completions": "1+2=3"}), "step_number.jsonl": lines(GOOD, {**GOOD, "completions": ["a", 3]}),
    "step_blank.jsonl": lines(GOOD, {**GOOD, "completions": ["a", " "]}), "steps_empty.jsonl": lines(GOOD, {**GOOD, "completions": []}),
    "labels_short.jsonl": lines(GOOD, {**GOOD, "labels": [1]}), "label_text.jsonl": lines(GOOD, {**GOOD, "labels": ["+", "-"]}),
    "label_2.jsonl": lines(GOOD, {**GOOD, "labels": [1, 2]}), "label_nan.jsonl": lines(GOOD, b'{"prompt": "a", "completions": ["b"], "labels": [NaN]}\n'),
    "correct_text.jsonl": lines(GOOD, {**GOOD, "correct": "yes"}), "nothing.jsonl": lines(GOOD, without("labels", without("answer"))),
    "truncated.jsonl": lines(GOOD, FINE)[:-20], "array.jsonl": b"[" + lines(GOOD)[:-1] + b"]\n", "list.jsonl": lines(GOOD, b'"text"\n'),
    "latin1.jsonl": lines(GOOD) + '{"prompt": "où"}'.encode("latin-1"), "nul.jsonl": lines(GOOD) + b"\0" * 9, "mixed.jsonl": lines(GOOD, {"question": "1", "answer": "1"}),
    "damaged.jsonl.gz": gzip.compress(lines(GOOD) * 50)[:40], "not_gzip.jsonl.gz": lines(GOOD),
    "one_question.jsonl": lines(GOOD, GOOD, GOOD), "wrong.jsonl": lines({**GOOD, "correct": False}, {**FINE, "correct": False}),
    "no_labels.jsonl": lines(without("labels"), without("labels", FINE)), "labels_only.jsonl": lines(LABELS_ONLY, without("answer", FINE)),
    "open.jsonl": lines(PRM800K, {**PRM800K, "question": {"problem": "2+2?"}}), "no_step.jsonl": lines(NO_STEP, NO_STEP),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all the files, a good model ("policy") and its damaged copies."""
    place = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    tokenizer = data.builtin_tokenizer()
    model = sft.new_policy(tokenizer, 0)
    model.save_pretrained(place / "policy")
    tokenizer.save_pretrained(place / "policy")
    config = json.loads((place / "policy" / "config.json").read_text())
    weights = (place / "policy" / "model.safetensors").read_bytes()

    def damaged(name, file, content):
        shutil.copytree(place / "policy", place / name)
        (place / name / file).unlink()
        if content is not None:
            (place / name / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (place / "hollow").mkdir()
    damaged("no_config", "config.json", None)
    damaged("config_broken", "config.json", b'{"model_type": "qwen2", ')
    damaged("config_list", "config.json", [])
    damaged("config_typeless", "config.json", {key: value for key, value in config.items() if key not in ("model_type", "architectures")})
    damaged("config_alien", "config.json", {**config, "model_type": "alien"})
    damaged("config_wider", "config.json", {**config, "hidden_size": 128})
    damaged("no_weights", "model.safetensors", None)
    damaged("weights_empty", "model.safetensors", b"")
    damaged("weights_cut", "model.safetensors", weights[:len(weights) // 2])
    damaged("weights_html", "model.safetensors", b"<html>moved</html>" * 99)
    damaged("no_tokenizer", "tokenizer.json", None)
    damaged("tokenizer_broken", "tokenizer.json", b"{")
    shutil.copytree(place / "policy", place / "few_words")  # a tokenizer with more tokens than the model has embeddings
    model.resize_token_embeddings(9)
    model.save_pretrained(place / "few_words")
    shutil.copytree(place / "policy", place / "two_labels")
    from transformers import AutoModelForTokenClassification
    AutoModelForTokenClassification.from_pretrained(place / "policy", num_labels=2).save_pretrained(place / "two_labels")
    from safetensors.torch import load_file, save_file
    some = load_file(place / "policy" / "model.safetensors")
    shutil.copytree(place / "policy", place / "weights_lacking")
    save_file({name: value for name, value in some.items() if "layers.1" not in name}, place / "weights_lacking" / "model.safetensors",
              metadata={"format": "pt"})
    (place / "out_file").write_text("not a folder")
    return place


def error_of(capsys, monkeypatch, script, argv):
    """Run a script to its exit -> the one line it says on stderr."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    err = capsys.readouterr().err
    if isinstance(exit.value.code, str):  # the interpreter prints it and exits with 1
        err += exit.value.code + "\n"
    assert exit.value.code not in (0, None)
    assert err.count("\n") == 1 and err.startswith(script + ": error: ") and "Traceback" not in err, err
    return err


# ---------------------------------------------------------------------------------------------------------------------
# Options.

def bad_numbers():
    for script, module in (("sft_minimal.py", sft), ("tdrm_minimal.py", tdrm)):
        for f in dataclasses.fields(module.Config):
            inherited = module is tdrm and f.name in {g.name for g in dataclasses.fields(sft.TrainConfig)}
            if isinstance(f.default, bool) or not isinstance(f.default, (int, float)) or inherited:
                continue
            low, high = f.metadata["low"], f.metadata["high"]
            values = ["many", "", "1e", *(["1.5"] if isinstance(f.default, int) else ["nan", "inf", "-inf"])]
            values += [str(bound) for bound in (low is not None and low - 1, high is not None and high + 1) if bound is not False]
            yield from ((script, f.name, value) for value in values)


@pytest.mark.parametrize("script, name, value", list(bad_numbers()))
def test_every_number_out_of_range(script, name, value, capsys, monkeypatch):
    # The missing file is a second mistake: were the number taken, the message would be about the file.
    err = error_of(capsys, monkeypatch, script, [f"--{name}={value}", "--data", "/no/such/file"])
    assert f"--{name}" in err and (value in err or str(float(value or 0)) in err)


def test_every_number_has_a_bound():
    for module in (sft, tdrm):
        for f in dataclasses.fields(module.Config):
            if isinstance(f.default, (int, float)) and not isinstance(f.default, bool):
                assert f.metadata["low"] is not None, f.name


S, T, D = "sft_minimal.py", "tdrm_minimal.py", "data.py"
MINE = "--data {good.jsonl} --model {policy}"
OPTIONS = [  # script, arguments ({name}: a file of the place), what the message names
    (S, "--lr -1", "--lr -1.0"), (S, "--batch_size 0", "--batch_size 0"), (S, "--warmup 2", "--warmup 2.0"), (T, "--gamma 1.5", "--gamma 1.5"),
    (T, "--n_step -1", "--n_step -1"), (T, "--lam 2", "--lam 2.0"), (T, "--lr nan", "--lr nan"), (T, "--lr inf", "--lr inf"),
    (T, MINE + " --steps 1 --correct nan 0.2", "--correct"), (T, MINE + " --steps 1 --wrong inf 0", "--wrong"), (T, "--correct 0.5", "--correct"),
    (T, "--correct a b", "--correct"), (S, "--learning_rate 1", "--learning_rate"), (S, "--step 1", "--step"), (T, "stray.jsonl", "stray.jsonl"),
    (T, "--method td3", "--method"), (S, "--dtype float8", "--dtype"), (T, "--label_kind firm", "--label_kind"), (S, "--data", "--data"),
    (S, "--lr", "--lr"), (S, "--resume=maybe", "--resume"), (S, "--method tdrm", "--method"), (D, "--sideways", "--sideways"),
    (S, MINE + " --steps 1 --seed 99999999999999999999", "--seed"), (S, "--data {good.jsonl}", "--model"), (T, "--data {good.jsonl}", "--model"),
    (S, "--data builtin {good.jsonl} --steps 1 --eval_problems 1", "--data"), (T, "--data builtin {good.jsonl} --model {policy} --problems 9", "--data"),
    (S, "--data {good.jsonl} builtin --model {policy}", "builtin"), (T, MINE + " --max_length 4096", "--max_length 4096: the model takes at most 2048"),
    (S, MINE + " --max_length 4096", "--max_length 4096: the model takes at most 2048"), (T, MINE + " --max_length 5", "--max_length 5"),
    (S, MINE + " --max_length 5", "--max_length 5"), (T, MINE + " --out {out_file}", "{out_file}"), (S, MINE + " --out {out_file}", "{out_file}"),
    (T, MINE + " --out {out_file}/run", "{out_file}/run"), (S, MINE + " --out /dev/null/run", "/dev/null/run"), (T, MINE + " --out /proc/run", "/proc/run"),
]

DATA = [  # file, what the message names after the file's name; read by every script
    ("missing.jsonl", "No such file"), ("empty.jsonl", "no rows"), ("blank.jsonl", "no rows"), ("policy", "directory"), ("no_prompt.jsonl", ":2: lacks prompt"),
    ("no_steps.jsonl", ":2: lacks completions"), ("unknown.jsonl", ":1: is of no known format"), ("prompt_number.jsonl", ":2: 'prompt'"),
    ("steps_text.jsonl", ":2: 'completions'"), ("step_number.jsonl", ":2: 'step 2'"), ("step_blank.jsonl", ":2: 'step 2'"), ("steps_empty.jsonl", ":2: 'completions'"),
    ("labels_short.jsonl", ":2: 'labels' has 1 entries for 2"), ("label_text.jsonl", ":2: label 1"), ("label_2.jsonl", ":2: label 2"), ("label_nan.jsonl", ":2: is not a whole"),
    ("correct_text.jsonl", ":2: 'correct'"), ("nothing.jsonl", ":2: nothing to learn from"), ("truncated.jsonl", ":2: is not a whole JSON object"),
    ("array.jsonl", ":1: starts a JSON array"), ("list.jsonl", ":2: is text"), ("latin1.jsonl", ":2: is not UTF-8"), ("nul.jsonl", ":2: holds NUL"),
    ("mixed.jsonl", ":2: lacks prompt"), ("damaged.jsonl.gz", "cannot be read"), ("not_gzip.jsonl.gz", "cannot be read"),
]

USES = [  # files in order, but not for this
    (T, "--data {problems.jsonl} --model {policy}", "problems.jsonl:1: holds problems"), (S, "--data {pairs.jsonl} --model {policy}", "pairs.jsonl:1: holds pairs"),
    (T, MINE + " --eval {problems.jsonl}", "problems.jsonl:1: holds problems"), (T, MINE + " --eval {missing}", "missing: cannot be read"),
    (T, MINE + " --eval {labels_short.jsonl}", "labels_short.jsonl:2: "), (T, MINE + " --eval {no_step.jsonl}", "--eval"),
    (T, "--score {missing} --model {policy}", "missing: cannot be read"), (T, "--score {pairs.jsonl} --model {policy}", "pairs.jsonl:1: holds"),
    (T, "--score {good.jsonl} --model {nothing}", "nothing: no such folder"), (T, "--score {good.jsonl} --model {two_labels}", "2 labels"),
    (T, "--score {empty.jsonl} --model {policy}", "empty.jsonl: has no rows"),
    (T, "--data {one_question.jsonl} --model {policy}", "the same question"), (S, "--data {one_question.jsonl} --model {policy}", "the same question"),
    (T, "--data {no_labels.jsonl} --model {policy} --method scalar_prm", "no_labels.jsonl:"), (T, "--method scalar_prm --label_rollouts 0 --problems 9 --model {policy}", "--label_rollouts 0"),
    (T, "--data {open.jsonl} --model {policy}", "open.jsonl:"), (T, "--data {open.jsonl} --model {policy} --method scalar_orm", "open.jsonl:"),
    (T, "--data {no_step.jsonl} --model {policy}", "--data"), (T, "--data {no_step.jsonl} --eval {good.jsonl} --model {policy}", "--data"),
    (S, "--data {wrong.jsonl} --model {policy}", "--data"), (S, "--data {labels_only.jsonl} --model {policy}", "'answer'"),
    (D, "{good.jsonl} {missing}", "missing: cannot be read"), (D, "{good.jsonl} --model {nothing}", "nothing: no such folder"),
]

MODELS = [  # folder, what the message names after the folder's name
    ("missing", "no such folder"), ("good.jsonl", ""), ("hollow", ""), ("no_config", ""), ("config_broken", "JSON"), ("config_list", ""), ("config_typeless", ""), ("config_alien", "alien"),
    ("config_wider", ""), ("no_weights", ""), ("weights_empty", ""), ("weights_cut", ""), ("weights_html", ""), ("weights_lacking", ""), ("tokenizer_broken", ""), ("no_tokenizer", ""), ("few_words", ""),
]


def fill(arguments, place):
    return [word if "{" not in word else word.replace("{", f"{place}/").replace("}", "") for word in arguments.split()]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def no_network(*_):
        raise OSError("Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)  # where runs/ would be made


def check(script, argv, names, place, capsys, monkeypatch):
    if script != D and "--out" not in argv:
        argv = argv + ["--out", "run"]
    err = error_of(capsys, monkeypatch, script, argv)
    for name in names:
        assert (name.replace("{", f"{place}/").replace("}", "")) in err
    assert not os.path.exists("run/model")


@pytest.mark.parametrize("script, arguments, name", OPTIONS + USES)
def test_options_and_uses(script, arguments, name, place, capsys, monkeypatch):
    check(script, fill(arguments, place), [name], place, capsys, monkeypatch)


@pytest.mark.parametrize("script", [S, T, D])
@pytest.mark.parametrize("file, name", DATA)
def test_data_files(script, file, name, place, capsys, monkeypatch):
    argv = [str(place / file)] if script == D else ["--data", str(place / file), "--model", str(place / "policy")]
    check(script, argv, [file, name], place, capsys, monkeypatch)


@pytest.mark.parametrize("script", [S, T])
@pytest.mark.parametrize("folder, name", MODELS)
def test_model_folders(script, folder, name, place, capsys, monkeypatch):
    argv = ["--data", str(place / "good.jsonl"), "--model", str(place / folder), "--steps", "1", "--batch_size", "2"]
    check(script, argv, [f"--model {place / folder}", name], place, capsys, monkeypatch)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "./nothing", "/nothing", "no/such/model", "bad name/x", "x" * 300])
def test_model_names(name, place, capsys, monkeypatch):
    began = time.monotonic()
    check(T, ["--data", str(place / "good.jsonl"), "--model", name], [f"--model {name}"], place, capsys, monkeypatch)
    assert time.monotonic() - began < 10  # no retries


def test_a_classifier_of_two_labels(place, capsys, monkeypatch):
    check(T, ["--data", str(place / "good.jsonl"), "--model", str(place / "two_labels")], ["two_labels", "2 labels", "one label"], place, capsys, monkeypatch)


def test_a_damaged_config_of_a_resumed_run(place, capsys, monkeypatch):
    os.makedirs("run/state")
    with open("run/config.json", "w") as f:
        f.write('{"lr": ')
    argv = ["--data", str(place / "good.jsonl"), "--model", str(place / "policy"), "--out", "run", "--resume"]
    assert "run/config.json" in error_of(capsys, monkeypatch, T, argv)


def test_a_mistake_does_not_move_a_finished_run(place, capsys, monkeypatch):
    os.makedirs("run")
    for name in ("config.json", "metrics.jsonl"):
        with open(f"run/{name}", "w") as f:
            f.write("{}\n")
    for bad in (["--data", "nothing"], ["--model", "nothing"], ["--lr", "-1"]):
        error_of(capsys, monkeypatch, T, ["--data", str(place / "good.jsonl"), "--model", str(place / "policy"), *bad, "--out", "run"])
        assert os.listdir(".") == ["run"] and sorted(os.listdir("run")) == ["config.json", "metrics.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Started for real.

def start(*words):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 60 and done.returncode != 0
    return done


@pytest.mark.parametrize("script, argv, message", [
    (S, ["--lr", "-1"], "error: --lr -1.0: wanted a number of at least 0"), (D, ["missing.jsonl"], "error: missing.jsonl: cannot be read")])
def test_as_a_process(script, argv, message):
    done = start(os.path.join(ROOT, script), *argv)
    assert done.returncode == 1 and done.stderr.startswith(f"{script}: {message}") and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("script, argv, message", [
    (S, "--batch_size 0", "sft_minimal.py: error: --batch_size 0: "),  # before the ranks meet
    (T, "--data {labels_short.jsonl} --model {policy} --out run", "labels_short.jsonl:2: 'labels' has 1 entries")])  # and after
def test_on_two_ranks(script, argv, message, place):
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(ROOT, script), *fill(argv, place))
    ours, _, report = done.stderr.partition("torch.distributed.elastic")  # torchrun's report comes after it
    assert done.stderr.count(message) == 1 and "Traceback" not in ours.split(message)[0]
    assert done.stderr.count("exitcode") >= 1 and "SIGKILL" not in report  # the ranks ended by themselves


def test_what_only_one_rank_knows(tmp_path):
    """An error of the second process alone is told, too, and the first does not wait for ever."""
    (tmp_path / "one.py").write_text(f"import sys; sys.path.insert(0, {ROOT!r})\n"
                                     "import sft_minimal as sft\n"
                                     "def main(cfg, env):\n"
                                     "    if env.rank == 1:\n"
                                     "        raise sft.BadInput('only here')\n"
                                     "    sft.barrier(env)\n"
                                     "sft.launch(main, sft.Config)\n")
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "one.py"))
    assert done.returncode == 1 and done.stderr.count("one.py: error: only here") == 1


def test_no_import_that_is_not_needed():
    """A script's own imports are torch, numpy and tqdm; transformers comes with the first model, matplotlib with --plot."""
    scripts = "sft_minimal, tdrm_minimal, search_minimal, rl_minimal, prime_minimal, qrm_minimal, estimate"
    code = f"import sys, {scripts}; print([m for m in ('transformers', 'matplotlib', 'math_verify', 'torch._dynamo') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
