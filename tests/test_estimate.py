"""estimate.py: counts against real models, bytes against measured ones (more of them: python tests/memory.py)."""
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import estimate
import memory
import qrm_minimal as qrm
import rl_minimal as rl
import sft_minimal as sft
import tdrm_minimal as tdrm
from data import BadInput
from memory import Setting

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = dict(vocab=2000, hidden=128, mlp=512)


@pytest.mark.parametrize("setting", [
    Setting("tdrm", "bfloat16", 1, False, 4, 2, 128, 2, **TINY),
    Setting("sft", "bfloat16", 2, True, 2, 1, 64, 2, **TINY),
    Setting("sft", "float32", 1, False, 4, 4, 128, 2, **TINY)], ids=["tdrm-bf16", "sft-bf16-2ranks", "sft-fp32"])
def test_measured(setting):
    runs = [memory.measure(setting) for _ in range(setting.world)]  # rarely, gloo holds a copy of a bucket at the peak
    measured = min(runs, key=lambda result: result["peak"])
    assert measured["peak"] == pytest.approx(memory.estimated(setting), rel=0.1)
    if setting.world == 2:  # between steps: bf16 weights, DDP's buckets, half of the masters and moments
        assert measured["held"] / measured["parameters"] == pytest.approx(2 + 2 + 12 / 2, rel=0.03)


@pytest.mark.parametrize("name,numbers", [
    ("Qwen/Qwen2.5-Math-7B-Instruct", 7_615_616_512), ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ("THUDM/GLM-4-9B-0414", 9_400_279_040), ("Qwen/Qwen2.5-0.5B", 494_032_768)])
def test_published_shapes_have_their_published_size(name, numbers):
    assert estimate.count(estimate.load_config(name)) == numbers


def test_counts_are_the_real_models(tmp_path):
    import data
    tokenizer = data.builtin_tokenizer()
    policy = sft.new_policy(tokenizer, 0)
    assert estimate.count(estimate.load_config("")) == sum(p.numel() for p in policy.parameters())
    sft.save_model(str(tmp_path / "policy"), policy, tokenizer)
    prm, config = tdrm.load_reward_model(str(tmp_path / "policy")), estimate.load_config(str(tmp_path / "policy"))
    assert estimate.count(config, "value") == sum(p.numel() for p in prm.parameters())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_those_of_the_sharded_optimizer(world):
    sizes = [(50, True), (40, True), (30, True), (7, False), (5, False)]
    assert estimate.largest_share(sizes, world) == {1: 132, 2: 70, 3: 50}[world]


@pytest.mark.parametrize("name", ["Qwen2.5-Math-7B", "GLM-4-9B-0414"])
@pytest.mark.parametrize("kind", ["sft", "tdrm", "rl"])
def test_large_models_on_eight_cards(kind, name, capsys, monkeypatch):
    Config = {"sft": sft.Config, "tdrm": tdrm.Config, "rl": rl.Config}[kind]
    cfg = Config(model=name, micro_batch_size=1, grad_checkpoint=True)
    config = estimate.load_config(name)
    run = (config, kind, cfg, 8, torch.bfloat16, 80, estimate.loaded_beside(kind, config, cfg))
    fits, out = estimate.report(*run), capsys.readouterr().out
    assert fits and "it fits; largest --micro_batch_size that does: " in out and "weights  " in out


def test_what_to_change(capsys):
    config, cfg = estimate.load_config("Qwen2.5-Math-7B"), tdrm.Config(batch_size=64)
    assert not estimate.report(config, "tdrm", cfg, 8, torch.bfloat16)
    out = capsys.readouterr().out
    assert "IT DOES NOT FIT" in out and "--micro_batch_size" in out and "--grad_checkpoint" in out
    smallest = dataclasses.replace(cfg, grad_checkpoint=True, micro_batch_size=1)
    estimate.report(config, "tdrm", smallest, 1, torch.bfloat16)
    assert "4 GPUs with --grad_checkpoint: masters and moments are shared" in capsys.readouterr().out
    estimate.report(config, "tdrm", cfg, 8, torch.bfloat16, card_gib=24)
    assert "more GPUs do not help" in capsys.readouterr().out


def test_options_of_a_script(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    estimate.from_options("rl_minimal.py", rl.Config(model="Qwen2.5-0.5B", kl_coef=0.1))
    out = capsys.readouterr().out
    assert "0.494B parameters, 4 x 80 GiB, bfloat16" in out and "frozen models" in out and "sampling" in out
    monkeypatch.setenv("RANK", "1")
    assert estimate.from_options("tdrm", tdrm.Config()) is None and not capsys.readouterr().out
    monkeypatch.delenv("RANK")
    with pytest.raises(BadInput, match="--batch_size 2: fewer rows"):
        estimate.from_options("tdrm", tdrm.Config(batch_size=2))


def test_what_qrm_loads(monkeypatch):
    """The reward model's training (Q-RM; DPO-RM beside its reference), and RL with it: policy, reward model, reference, critic."""
    seen = []
    monkeypatch.setattr(estimate, "report", lambda config, kind, cfg, world, dtype, card, others: seen.append(
        (kind, estimate.head_of(kind, cfg), cfg.batch_size, [(head, trained) for _, head, trained in others])))
    for options in {}, {"method": "dpo_rm"}, {"rl": "reinforce"}, {"rl": "ppo", "method": "dpo_rm", "kl_coef": 0.0}:
        estimate.from_options("qrm_minimal.py", qrm.Config(**options))
    value, policy, critic = ("value", False), ("policy", False), ("value", True)
    assert seen == [("qrm", "value", 64, []), ("qrm", "policy", 64, [policy]), ("rl", "policy", 0, [value, policy]),
                    ("rl", "policy", 0, [critic, policy, policy])]


@pytest.mark.parametrize("options,message", [
    (["--model", "./no-such"], "--model ./no-such"), (["--kind", "dpo"], "--kind dpo: wanted one of"),
    (["--world", "-1"], "--world -1")])
def test_mistakes_are_one_line(options, message):
    with pytest.raises(BadInput) as error:
        estimate.main(options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_alone():
    command = [sys.executable, "estimate.py", "--model", "./no-such"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("estimate.py: error: --model ./no-such")
