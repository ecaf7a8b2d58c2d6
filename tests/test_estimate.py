"""parts/estimate.py: counts against real models, bytes against measured ones (more of them: python
study/memory.py)."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "study"))
import data
import memory
import sft_minimal as sft
from memory import Setting
from parts import estimate
from parts.formats import BadInput
from parts.models import save_model
from parts.rewards import new_reward_model

TINY = {"vocab": 2000, "hidden": 128, "mlp": 512}
MEASURED = {
    "tdrm-bf16": Setting("tdrm", "bfloat16", 1, False, 4, 2, 128, 2, **TINY),
    "sft-bf16-2ranks": Setting("sft", "bfloat16", 2, True, 2, 1, 64, 2, **TINY),
    "sft-fp32": Setting("sft", "float32", 1, False, 4, 4, 128, 2, **TINY),
}
PUBLISHED = {
    "Qwen/Qwen2.5-Math-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "THUDM/GLM-4-9B-0414": 9_400_279_040,
}


@pytest.mark.parametrize("setting", MEASURED.values(), ids=MEASURED)
def test_measured(setting):
    # Rarely, gloo holds a copy of a bucket at the peak.
    runs = [memory.measure(setting) for _ in range(setting.world)]
    measured = min(runs, key=lambda result: result["peak"])
    assert measured["peak"] == pytest.approx(memory.estimated(setting), rel=0.1)
    if setting.world == 2:
        held = 2 + 2 + 12 / 2  # bf16 weights, DDP's buckets, half of the masters and moments
        assert measured["held"] / measured["parameters"] == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_their_published_size(name):
    model = estimate.new_model(estimate.load_config(name))
    assert model.parameters == PUBLISHED[name]


def test_counts_are_the_real_models(tmp_path):
    tokenizer, folder = data.builtin_tokenizer(), str(tmp_path / "policy")
    policy = sft.new_policy(tokenizer, 0)
    save_model(folder, policy, tokenizer)
    prm, config = new_reward_model(folder, tokenizer, torch.float32), estimate.load_config(folder)
    for module, head in ((policy, "policy"), (prm, "value")):
        numbers = sum(p.numel() for p in module.parameters())
        assert estimate.new_model(config, head).parameters == numbers


@pytest.mark.parametrize("world,share", [(1, 132), (2, 70), (3, 50)])
def test_shares_are_those_of_the_sharded_optimizer(world, share):
    sizes = [(50, True), (40, True), (30, True), (7, False), (5, False)]
    assert estimate.Model(None, "policy", True, sizes, 2).largest_share(world) == share


def test_a_cache_takes_what_its_tensors_take():
    config = estimate.load_config("Qwen2.5-Math-7B")
    keys = torch.empty(28, 3, 4, 10, 128, dtype=torch.bfloat16, device="meta")
    assert estimate.cache_bytes(config, 3, 10, 2) == 2 * keys.nbytes


@pytest.mark.parametrize("name", ["Qwen2.5-Math-7B", "GLM-4-9B-0414"])
@pytest.mark.parametrize("kind", ["sft", "tdrm", "rl"])
def test_large_models_on_eight_cards(kind, name, capsys):
    options = {"model": name, "micro_batch_size": 1, "grad_checkpoint": True, "world": 8}
    cfg = estimate.options(kind)(**options)
    estimate.report(estimate.models_of(cfg), cfg)
    out = capsys.readouterr().out
    assert "it fits; largest --micro_batch_size that does: " in out and "weights  " in out


def test_what_to_change(capsys):
    cfg = estimate.options("tdrm")(model="Qwen2.5-Math-7B", batch_size=64, world=8)
    models = estimate.models_of(cfg)

    def report(**changes):
        estimate.report(models, dataclasses.replace(cfg, **changes))
        return capsys.readouterr().out

    out = report()
    assert "IT DOES NOT FIT" in out and "too much for training: change --micro_batch_size" in out
    assert "8 processes with --grad_checkpoint: micro-batches of 8 fit" in out
    assert "3 processes with --grad_checkpoint" in report(world=1, micro_batch_size=1)
    assert "more GPUs do not help" in report(card_gib=24.0)


def test_the_largest_micro_batch_is_the_largest():
    cfg = estimate.options("tdrm")(model="Llama-3.1-8B", batch_size=512, world=8)
    models = estimate.models_of(cfg)
    size = estimate.largest_micro_batch(models, cfg)
    assert 1 < size < 64
    for micro, fits in ((size, True), (size + 1, False)):
        sized = dataclasses.replace(cfg, micro_batch_size=micro)
        assert (estimate.total(*estimate.memory(models, sized)) <= estimate.room(cfg)) == fits


T, F = True, False
LOADED = [  # script, options, (head, is it trained?) of what is loaded
    ("sft", {}, [("policy", T)]),
    ("tdrm", {}, [("value", T)]),
    ("qrm", {}, [("value", T)]),
    ("qrm", {"method": "DPO-RM"}, [("policy", T), ("policy", F)]),
    ("rl", {}, [("policy", T), ("value", F)]),
    ("rl", {"alpha": 1.0}, [("policy", T)]),
    ("rl", {"prm_lr": 1e-6, "kl_coef": 0.1}, [("policy", T), ("policy", F), ("value", T)]),
    (
        "rl",
        {"credit": "token", "alpha": 0.0, "kl_reward": 1.0, "estimator": "ppo"},
        [("policy", T), ("policy", F), ("value", T), ("value", F)],
    ),
    ("prime", {}, [("policy", T), ("policy", T), ("policy", F)]),
    ("prime", {"reference": "policy"}, [("policy", T), ("policy", T)]),
    ("prime", {"prm": "none", "estimator": "ppo"}, [("policy", T), ("value", T)]),
]


@pytest.mark.parametrize("kind,options,loaded", LOADED)
def test_what_a_script_loads(kind, options, loaded):
    models = estimate.models_of(estimate.options(kind)(model="Llama-3.1-8B", **options))
    assert [(m.head, m.trained) for m in models] == loaded


def test_an_implicit_reward_model_is_two(tmp_path):
    tokenizer, folder = data.builtin_tokenizer(), str(tmp_path)
    for name in (folder, folder + "/reference"):
        sft.new_policy(tokenizer, 0).save_pretrained(name)
    cfg = estimate.options("rl")(model=folder, prm=folder)
    heads = [(m.head, m.trained) for m in estimate.models_of(cfg)]
    assert heads == [("policy", T), ("policy", F), ("policy", F)]


@pytest.mark.parametrize(
    "options,message",
    [
        (["tdrm_minimal.py", "--model", "./no-such"], "--model ./no-such"),
        (["tdrm_minimal.py"], "--model: wanted"),
        (["dpo.py"], "dpo.py: wanted one of sft_minimal.py"),
        (["tdrm", "--world", "0"], "--world 0"),
        (
            ["tdrm", "--model", "x", "--batch_size", "2", "--world", "4"],
            "--batch_size 2: fewer rows",
        ),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(BadInput) as error:
        estimate.main(options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_script_and_its_options(capsys):
    options = "--model Llama-3.1-8B --world 4 --kl_coef 0.1 --rows_at_once 56 --card_gib 141"
    estimate.main(["rl_minimal.py", *options.split()])
    out = capsys.readouterr().out
    assert "rl: 8.03B parameters, 4 x 141 GiB" in out
    assert "frozen models" in out and "at the time of: sampling" in out


def test_alone():
    command = [sys.executable, "-m", "parts.estimate", "tdrm_minimal.py", "--model", "./no-such"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("estimate.py: error: --model ./no-such")
