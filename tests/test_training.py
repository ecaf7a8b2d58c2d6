"""The training loop under everything that happens to it: many processes, signals, kills, poisoned
gradients."""

import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import sft_minimal as sft
import tdrm_minimal as tdrm
from conftest import ROOT
from helpers import assert_same_run, at_step, in_save, metrics, ranks, save_policy, train
from helpers import write_rows
from parts import runs, training
from parts.formats import BadInput, read_trajectories
from parts.runs import Processes, last_checkpoint, load_checkpoint, save_checkpoint
from parts.training import Learner, MasterAdamW, Policy, accumulate_gradients, learning_rate
from parts.training import make_optimizer, optimizer_step, token_logprobs

SCRIPTS = {"sft": sft, "tdrm": tdrm}

# --------------------------------------------------------------------------------------------------
# Faults beside those of helpers.py.


def poisoned(procs, at, rank):
    """One rank's loss is not finite in one step."""
    steps = runs.Run.steps
    loss = sft.sft_loss
    now = []

    def counted(run):
        for step in steps(run):
            now.append(step)
            yield step

    def patched(*args):
        return loss(*args) * (math.nan if now[-1] == at and procs.rank == rank else 1)

    runs.Run.steps, sft.sft_loss = counted, patched


def poisoned_and_kept(procs, at, rank, folder):
    """Every rank leaves its own weights behind when the run has ended."""
    poisoned(procs, at, rank)
    finish = runs.Run.finish

    def patched(run, *args):
        weights = run.learners["model"].module.model.state_dict()
        torch.save(weights, os.path.join(folder, f"weights{procs.rank}.pt"))
        return finish(run, *args)

    runs.Run.finish = patched


def poisoned_then_killed(procs, at, rank, killed_at):
    poisoned(procs, at, rank)
    at_step(procs, killed_at, signal.SIGKILL)


def small_disk(procs, at):
    """From the checkpoint of step `at` on, no file may become larger than a kilobyte."""
    save = runs.save_checkpoint

    def patched(cfg, procs, step, learners):
        if step >= at:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        save(cfg, procs, step, learners)

    runs.save_checkpoint = patched


# --------------------------------------------------------------------------------------------------
# Fixtures: a tiny policy, data, and uninterrupted runs to compare with.


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("training")
    save_policy(home / "policy")
    rows = data.make_trajectories(data.make_problems(24), 2, label_rollouts=4)
    write_rows(home / "rows.jsonl", rows)
    return home


def settings(script, home, out, **more):
    options = {
        "model": str(home / "policy"),
        "data": (str(home / "rows.jsonl"),),
        "out": str(out),
        "steps": 6,
        "batch_size": 8,
        "max_length": 128,
        "lr": 1e-3,
        "save_every": 2,
        "eval_every": 3,
    }
    if script == "sft":
        options |= {"max_new_tokens": 8, "eval_problems": 4}
    return options | more


def run_here(script, home, out, **more):
    module = SCRIPTS[script]
    return module.main(module.Config(**settings(script, home, out, **more)), Processes())


@pytest.fixture(scope="module")
def reference(home):
    """reference(script, world, **options) -> folder of an uninterrupted run."""
    done = {}

    def run(script, world, **more):
        key = (script, world, *sorted(more.items()))
        if key not in done:
            out = home / f"reference{len(done)}"
            options = settings(script, home, out, **more)
            assert ranks(world, home, train, script, options) == [0] * world
            done[key] = out
        return done[key]

    return run


def assert_whole_run(out, expected):
    assert_same_run(out, expected)
    assert (out / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    before, last = sorted(os.listdir(out / "state"))  # no remains of older ones, or of half a one
    assert before.startswith("step_")
    assert last == "step_00000006"


# --------------------------------------------------------------------------------------------------
# The maths of a step.


@pytest.mark.parametrize(
    "steps, warmup", [(1, 0.03), (1, 1), (2, 0), (10, 0.3), (10, 1), (1000, 0.03), (7, 0.5)]
)
def test_learning_rate(steps, warmup):
    rates = [learning_rate(step, steps, 2.0, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[rise - 1] == 2.0  # the peak, and before it a straight line
    assert rates[:rise] == pytest.approx([2 * (i + 1) / rise for i in range(rise)])
    assert all(a >= b for a, b in zip(rates[rise - 1 :], rates[rise:]))
    if steps > rise:
        middle = rise + (steps - rise) / 2
        assert learning_rate(middle, steps, 2.0, warmup) == pytest.approx(1)
        assert learning_rate(steps, steps, 2.0, warmup) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("at_once", [2**25, 4 * 35, 1])
def test_token_logprobs(at_once):
    torch.manual_seed(0)
    model = sft.new_policy(data.builtin_tokenizer(), 0)
    ids = torch.randint(5, 15, (3, 6))
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    logprobs, entropy = token_logprobs(model, ids, mask, 0.7, at_once)
    logits = model(input_ids=ids).logits.double() / 0.7
    for b in range(3):
        for t in range(5):
            total = logits[b, t].logsumexp(0).item()
            p = torch.tensor([x - total for x in logits[b, t].tolist()])
            wanted = p[ids[b, t + 1]].item(), -(p.exp() * p).sum().item()
            got = logprobs[b, t].item(), entropy[b, t].item()
            assert got == pytest.approx(wanted if mask[b, t] else (0, 0), abs=1e-5)
    assert logprobs.dtype == torch.float32

    weight = torch.rand(3, 5)
    (logprobs * weight).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    picked = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    (picked * weight * mask).sum().backward()
    for mine, p in zip(got, model.parameters()):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def learner():
    tokenizer = data.builtin_tokenizer()
    policy = Policy(sft.new_policy(tokenizer, 0), tokenizer)
    return Learner(policy, policy, None)


@pytest.fixture(scope="module")
def examples(home, learner):
    rows = list(read_trajectories(home / "rows.jsonl"))[:7]
    encode = partial(data.encode_trajectory, learner.module.tokenizer, eos=True)
    return data.encode_rows(rows, encode, 128)[0]


def gradients(learner, examples, micro_batch_size, padding=0, filler=0):
    tokens = sum(len(e) - e.prompt_length for e in examples)

    def loss_fn(rows):
        b = data.collate(rows, learner.module.tokenizer.pad_token_id)
        ids = F.pad(b["input_ids"], (0, padding), value=filler)
        mask = F.pad(b["response_mask"], (0, padding))
        return sft.sft_loss(learner.forward, ids, mask, tokens)

    learner.module.zero_grad()
    loss = accumulate_gradients(learner, examples, micro_batch_size, loss_fn, Processes())
    return loss, torch.cat([p.grad.flatten() for p in learner.module.parameters()])


@pytest.mark.parametrize("micro", [1, 2, 3, 7, 100])
def test_gradients_do_not_depend_on_micro_batches(learner, examples, micro):
    loss, gradient = gradients(learner, examples, None)
    got_loss, got = gradients(learner, examples, micro)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro, padding, filler", [(None, 9, 0), (2, 5, 1), (3, 4, 7)])
def test_gradients_do_not_depend_on_padding(learner, examples, micro, padding, filler):
    loss, gradient = gradients(learner, examples, None)
    got_loss, got = gradients(learner, examples, micro, padding, filler)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


def test_policy_loss_is_the_mean_over_all_response_tokens(learner, examples):
    """Row by row, token by token, as defined."""
    logprobs = []
    for e in examples:
        logits = learner.module.model(input_ids=torch.tensor([e.input_ids])).logits[0]
        logp = logits.double().log_softmax(-1)
        for t in range(e.prompt_length, len(e)):
            logprobs.append(logp[t - 1, e.input_ids[t]].item())
        assert e.input_ids[-1] == learner.module.tokenizer.eos_token_id  # it learns to stop
    mean = sum(logprobs) / len(logprobs)
    assert gradients(learner, examples, 3)[0] == pytest.approx(-mean, rel=1e-5)


@pytest.mark.parametrize("world, dealt", [(2, [[[3, 5]], [[4]]]), (4, [[[3]], [[4]], [[5]], []])])
def test_rows_are_dealt_by_length(world, dealt):
    """A process without rows goes through the motions: for the others, and without a gradient."""
    batch = [[0] * n for n in (5, 3, 4)]
    learner = SimpleNamespace(forward=SimpleNamespace(no_sync=contextlib.nullcontext))
    for rank, wanted in enumerate(dealt):
        seen = []
        weight = torch.ones((), requires_grad=True)

        def loss_fn(rows):
            seen.append([len(row) for row in rows])
            return weight * len(rows)

        loss = accumulate_gradients(learner, batch, None, loss_fn, Processes(rank, world))
        assert seen == (wanted or [[5]])
        assert loss == sum(map(len, wanted))
        assert weight.grad == world * loss  # DDP takes the mean


def linear_learner():
    model = torch.nn.Linear(3, 1)
    optimizer = MasterAdamW(model.parameters(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.0)
    return Learner(SimpleNamespace(model=model), None, optimizer)


def test_optimizer_step_skips_what_is_not_finite():
    learner = linear_learner()
    model = learner.module.model
    before = [p.detach().clone() for p in model.parameters()]
    for skipped, bad in enumerate((math.nan, math.inf, -math.inf), 1):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.weight.grad[0, 1] = bad
        assert not math.isfinite(optimizer_step(learner, 0.1, 1.0))
        assert learner.skipped == skipped
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        assert all(p.grad is None for p in model.parameters())
        assert not learner.optimizer.adamw.state  # no moment has seen it


@pytest.mark.parametrize("clip, clipped", [(0, 2), (1.0, 0.5), (100.0, 2)])
def test_optimizer_step_clips(clip, clipped):
    """A gradient of four 2s has norm 4."""
    learner = linear_learner()
    model = learner.module.model
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    assert optimizer_step(learner, 0.1, clip) == pytest.approx(4)
    moment = learner.optimizer.adamw.state[model.weight]["exp_avg"]
    assert moment.tolist() == [pytest.approx([0.1 * clipped] * 3)]


# --------------------------------------------------------------------------------------------------
# The optimizer.


class Small(torch.nn.Sequential):
    def __init__(self, dtype):
        torch.manual_seed(1)
        Linear = torch.nn.Linear
        LayerNorm = torch.nn.LayerNorm
        super().__init__(Linear(7, 33), LayerNorm(33), Linear(33, 5))
        self.to(dtype)

    def save_pretrained(self, folder):
        os.makedirs(folder, exist_ok=True)
        torch.save(self.state_dict(), os.path.join(folder, "weights.bin"))


def small_learner(dtype, procs):
    model = Small(dtype)
    tokenizer = SimpleNamespace(save_pretrained=os.listdir)  # the folder is there
    module = SimpleNamespace(model=model, tokenizer=tokenizer, describe=os.listdir)
    return Learner(module, None, make_optimizer(model, procs))


def take_steps(learner, begin, end):
    """Steps with gradients that depend on the step alone, as every rank has after DDP's sum."""
    parameters = list(learner.module.model.parameters())
    for step in range(begin, end):
        torch.manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer_step(learner, 1e-2 / (1 + step), 0)
    return [p.detach().clone() for p in parameters]


def test_master_adamw_is_adamw_in_fp32(monkeypatch):
    monkeypatch.setattr(training, "WEIGHT_DECAY", 0.1)
    ours = take_steps(small_learner(torch.float32, Processes()), 0, 6)
    other = Small(torch.float32)
    matrices = [p for p in other.parameters() if p.dim() > 1]
    rest = [p for p in other.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": rest, "weight_decay": 0.0},
    ]
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "fused": False, "foreach": False}
    optimizer = torch.optim.AdamW(groups, **options)
    theirs = take_steps(Learner(SimpleNamespace(model=other), None, optimizer), 0, 6)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bf16_weights_move_at_a_small_learning_rate():
    def run(make):
        weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = make([weight], lr=1e-6, betas=(0.9, 0.98), weight_decay=0.0)
        for _ in range(3000):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach().float()

    assert (run(torch.optim.AdamW) == 1).all()  # each step is rounded away
    moved = run(MasterAdamW).tolist()
    assert moved == pytest.approx([1 - 3000e-6] * 8, abs=2e-3)  # a bf16 next to 1: 0.9961


def half_way(procs, out, dtype, resume):
    """Steps 1 to 4 and a checkpoint, or steps 5 to 8 from it, with two models in the run."""
    learners = {name: small_learner(dtype, procs) for name in ("model", "prm")}
    folder = os.path.join(out, "state", "step_00000004")
    if not resume:
        for learner in learners.values():
            take_steps(learner, 0, 4)
        save_checkpoint(sft.Config(out=out), procs, 4, learners)
        return
    for name, learner in learners.items():
        path = os.path.join(folder, name, "weights.bin")
        learner.module.model.load_state_dict(torch.load(path, weights_only=True))
    assert load_checkpoint(folder, procs, learners) == 4
    weights = [take_steps(learner, 4, 8) for learner in learners.values()]
    torch.save(weights, os.path.join(out, f"weights{procs.rank}.pt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 1), (1, 2), (2, 3)])
def test_checkpoint_on_any_number_of_processes_continues_bitwise(dtype, before, after, tmp_path):
    out = str(tmp_path)
    assert ranks(before, tmp_path, half_way, out, dtype, False) == [0] * before
    assert ranks(after, tmp_path, half_way, out, dtype, True) == [0] * after
    expected = take_steps(small_learner(dtype, Processes()), 0, 8)
    for rank in range(after):
        for weights in torch.load(tmp_path / f"weights{rank}.pt", weights_only=True):
            assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def sharded(procs, folder):
    for dtype in (torch.float32, torch.bfloat16):
        learner = small_learner(dtype, procs)
        weights = take_steps(learner, 0, 6)
        states = learner.optimizer.optim.adamw.state.values()
        held = sum(state["exp_avg"].numel() for state in states)
        torch.save((weights, held), os.path.join(folder, f"{dtype}{procs.rank}.pt"))


def test_sharded_optimizer_is_the_unsharded_one(tmp_path):
    assert ranks(2, tmp_path, sharded, str(tmp_path)) == [0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        expected = take_steps(small_learner(dtype, Processes()), 0, 6)
        held = []
        for rank in range(2):
            weights, mine = torch.load(tmp_path / f"{dtype}{rank}.pt")
            assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
            held.append(mine)
        assert min(held) > 0
        assert sum(held) == sum(p.numel() for p in expected)  # each state is held once


# --------------------------------------------------------------------------------------------------
# Whole runs: the number of processes changes nothing but rounding.


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "world, batch_size, micro", [(2, 8, None), (4, 7, None), (2, 3, None), (2, 8, 1)]
)
def test_number_of_processes_does_not_matter(
    script, world, batch_size, micro, reference, home, tmp_path
):
    one = reference(script, 1, batch_size=batch_size)
    assert [row["step"] for row in metrics(one)] == [1, 2, 3, 4, 5, 6]
    assert metrics(one)[0]["loss"] > 0
    out = tmp_path / "run"
    more = {"batch_size": batch_size, "micro_batch_size": micro}
    options = settings(script, home, out, **more)
    assert ranks(world, tmp_path, train, script, options) == [0] * world
    for name, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
        got, wanted = ([row[name] for row in metrics(folder)] for folder in (out, one))
        assert got == pytest.approx(wanted, rel=rel), name
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (out, one))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4, msg=name)


def test_more_processes_than_rows_are_refused(home, tmp_path):
    options = settings("sft", home, tmp_path / "run", batch_size=2)
    assert ranks(3, tmp_path, train, "sft", options) == [1] * 3
    message = (tmp_path / "run.error").read_text()
    assert "--batch_size 2" in message
    assert "3 processes" in message


# --------------------------------------------------------------------------------------------------
# Exact resume.

FAULTS = {
    "SIGTERM in step 1": (at_step, 0, signal.SIGTERM),
    "SIGINT in step 4, saved then": (at_step, 3, signal.SIGINT),
    "SIGTERM in the last step": (at_step, 5, signal.SIGTERM),
    "SIGKILL in step 1, nothing saved": (at_step, 0, signal.SIGKILL),
    "SIGKILL in step 6": (at_step, 5, signal.SIGKILL),
    "SIGKILL in the first save": (in_save, 2, "state"),
    "SIGKILL in a save, states": (in_save, 4, "state"),
    "SIGKILL in a save, weights": (in_save, 4, "model"),
    "SIGKILL in a save, before the tokenizer": (in_save, 4, "tokenizer"),
    "SIGKILL in a save, renamed": (in_save, 4, "renamed"),
    "SIGKILL in the last save": (in_save, 6, "model"),
}
EVERYWHERE = [
    "SIGINT in step 4, saved then",
    "SIGKILL in step 6",
    "SIGKILL in a save, states",
    "SIGKILL in a save, renamed",
]
RESUMES = [("sft", "float32", 1, name) for name in FAULTS]
RESUMES += [("tdrm", "float32", 2, name) for name in FAULTS]
RESUMES += [("sft", "float32", 2, name) for name in EVERYWHERE]
RESUMES += [("tdrm", "float32", 1, name) for name in EVERYWHERE]
RESUMES += [("tdrm", "bfloat16", 2, "SIGKILL in step 6")]
RESUMES += [("sft", "bfloat16", 1, "SIGINT in step 4, saved then")]


@pytest.mark.parametrize("script, dtype, world, name", RESUMES)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    script, dtype, world, name, reference, home, tmp_path
):
    expected = reference(script, world, dtype=dtype)
    out = tmp_path / "run"
    fault = FAULTS[name]
    options = settings(script, home, out, dtype=dtype)
    codes = ranks(world, tmp_path, train, script, options, fault)
    if "SIGKILL" in name:
        assert -signal.SIGKILL in codes
        assert 0 not in codes
    else:  # it saved what it had
        assert codes == [0] * world
        assert max(os.listdir(out / "state")) == f"step_{fault[1] + 1:08d}"
    assert not (out / "model").exists()
    assert ranks(world, tmp_path, train, script, options | {"resume": True}) == [0] * world
    assert_whole_run(out, expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_of_a_finished_run_repeats_its_end(script, reference, home, tmp_path):
    out = tmp_path / "run"
    run_here(script, home, out)
    os.remove(out / "summary.json")
    shutil.rmtree(out / "model")  # stopped in the final evaluation
    run_here(script, home, out, resume=True)
    assert_whole_run(out, reference(script, 1))


def test_half_a_row_of_metrics_is_dropped(reference, home, tmp_path):
    """The machine went down while a row was written."""
    out = tmp_path / "run"
    fault = (at_step, 4, signal.SIGKILL)
    codes = ranks(1, tmp_path, train, "sft", settings("sft", home, out), fault)
    assert codes == [-signal.SIGKILL]
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    run_here("sft", home, out, resume=True)
    assert_whole_run(out, reference("sft", 1))


@pytest.mark.parametrize(
    "script, changed, message",
    [
        ("sft", {"lr": 2e-3}, "--lr 0.001, not 0.002"),
        ("sft", {"steps": 7}, "--steps 6, not 7"),
        ("sft", {"batch_size": 4}, "--batch_size 8, not 4"),
        ("tdrm", {"gamma": 0.5}, "--gamma 0.8, not 0.5"),
        ("tdrm", {"correct": (1.0, 0.5)}, "--correct [0.5, 0.2], not [1.0, 0.5]"),
        ("tdrm", {"method": "ScalarORM"}, "--method TDRM, not ScalarORM"),
    ],
)
def test_resume_with_another_config_is_an_error(script, changed, message, reference, home):
    def files():
        return [(out / name).read_bytes() for name in ("config.json", "metrics.jsonl")]

    out = reference(script, 1)
    before = files()
    with pytest.raises(BadInput) as error:
        run_here(script, home, out, resume=True, **changed)
    assert message in str(error.value)
    assert str(out) in str(error.value)
    assert files() == before


def test_options_without_effect_on_the_result_may_change(reference, home, tmp_path):
    """Also where the run lies: it can be moved and continued."""
    shutil.copytree(reference("tdrm", 1), tmp_path / "moved")
    run_here("tdrm", home, tmp_path / "moved", resume=True, save_every=1, micro_batch_size=2)
    assert_whole_run(tmp_path / "moved", reference("tdrm", 1))


@pytest.mark.parametrize("before, now", [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(before, now, reference, home, tmp_path):
    """The same weights and moments: what is left is the order in which sums are rounded."""
    out = tmp_path / "run"
    fault = (at_step, 3, signal.SIGTERM)
    options = settings("tdrm", home, out)
    assert ranks(before, tmp_path, train, "tdrm", options, fault) == [0] * before
    assert metrics(out)[-1]["step"] == 4
    assert ranks(now, tmp_path, train, "tdrm", options | {"resume": True}) == [0] * now
    for a, b in zip(metrics(out), metrics(reference("tdrm", 1)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "damage, name",
    [
        ("cut", "rank1.pt"),
        ("gone", "rank1.pt"),
        ("garbage", "rank1.pt"),
        ("cut", "model/model.safetensors"),
        ("garbage", "model/model.safetensors"),
    ],
)
def test_damaged_checkpoint(damage, name, reference, home, tmp_path, capsys):
    """The one before it is taken, and the run ends where it would have."""
    out = tmp_path / "run"
    expected = reference("tdrm", 2)
    shutil.copytree(expected, out)
    last, before = (out / "state" / f"step_0000000{step}" for step in (6, 4))
    path = last / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"x" * 5000)
    options = settings("tdrm", home, out, resume=True)
    assert last_checkpoint(tdrm.Config(**options)) == str(before)
    message = capsys.readouterr().err
    assert str(last) in message
    assert "damaged" in message
    assert "before it" in message
    assert ranks(2, tmp_path, train, "tdrm", options) == [0, 0]
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.parametrize("world", [1, 2])
def test_full_disk(world, reference, home, tmp_path):
    out = tmp_path / "run"
    options = settings("tdrm", home, out)
    wanted = "checkpoint of step 4 could not be written"
    assert 1 in ranks(world, tmp_path, train, "tdrm", options, (small_disk, 4))
    said = tmp_path / "run.error"  # not there where only the other rank has met it
    message = said.read_text() if said.exists() else wanted
    assert wanted in message
    assert "\n" not in message
    states = os.listdir(out / "state")
    assert "step_00000002" in states
    assert "step_00000004" not in states
    assert ranks(world, tmp_path, train, "tdrm", options | {"resume": True}) == [0] * world
    assert_whole_run(out, reference("tdrm", world))


# --------------------------------------------------------------------------------------------------
# Gradients that are not finite.


def test_a_poisoned_step_is_skipped_on_all_ranks_and_counted(reference, home, tmp_path):
    out = tmp_path / "run"
    options = settings("sft", home, out, save_every=3)
    fault = (poisoned_and_kept, 2, 1, str(tmp_path))
    assert ranks(2, tmp_path, train, "sft", options, fault) == [0, 0]
    rows = metrics(out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert json.loads((out / "summary.json").read_text())["skipped"] == 1
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [3]
    a, b = (torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2))
    assert all(
        weight.isfinite().all() and torch.equal(weight, b[name]) for name, weight in a.items()
    )
    clean = metrics(reference("sft", 2))
    assert [row["loss"] for row in rows[:2]] == [row["loss"] for row in clean[:2]]
    assert rows[3]["loss"] != clean[3]["loss"]

    # The count outlives an interruption.
    again = settings("sft", home, tmp_path / "again", save_every=3)
    ranks(2, tmp_path, train, "sft", again, (poisoned_then_killed, 2, 1, 4))
    assert ranks(2, tmp_path, train, "sft", again | {"resume": True}) == [0, 0]
    assert_whole_run(tmp_path / "again", out)


# --------------------------------------------------------------------------------------------------
# The run's folder.


def files(folder):
    """{path in the folder: what it holds}"""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_earlier_run_is_moved_aside_whole(slash, home, tmp_path):
    wanted = {"config.json", "metrics.jsonl", "summary.json", "model/model.safetensors"}
    held = []
    for seed in range(3):
        out = str(tmp_path / "run") + slash  # a shell completes a folder with a slash
        run_here("sft", home, out, seed=seed, steps=2)
        assert [row["step"] for row in metrics(out)] == [1, 2]
        held.append(files(tmp_path / "run"))
        assert wanted <= held[-1].keys()
    assert sorted(os.listdir(tmp_path)) == ["run", "run.old1", "run.old2"]
    assert [files(tmp_path / name) for name in ("run.old1", "run.old2", "run")] == held


def test_a_checkpoint_is_continued_only_when_asked(home, tmp_path):
    """A folder with a checkpoint but no config.json is no reason to start in the middle."""
    out = tmp_path / "run"
    run_here("sft", home, out, steps=2)
    expected = metrics(out)
    os.remove(out / "config.json")
    os.remove(out / "metrics.jsonl")
    run_here("sft", home, out, steps=2)
    assert metrics(out) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_runs_write_equal_files(script, reference, home, tmp_path):
    run_here(script, home, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert rows == metrics(reference(script, 1))
    keys = {"step", "loss", "lr", "grad_norm", "skipped"}
    assert all(keys <= row.keys() for row in rows)
    assert rows[2].keys() > keys  # the third is an evaluation


# --------------------------------------------------------------------------------------------------
# Under torchrun.


def test_torchrun_stopped_by_a_signal(home, tmp_path):
    """SIGTERM goes to torchrun, as a scheduler sends it; every rank ends its step, and the run
    continues bitwise."""
    more = {"steps": 60, "batch_size": 16, "save_every": 0, "eval_every": 0}
    expected = tmp_path / "expected"
    out = tmp_path / "run"
    assert ranks(2, tmp_path, train, "sft", settings("sft", home, expected, **more)) == [0, 0]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words.append(os.path.join(ROOT, "sft_minimal.py"))
    for name, value in settings("sft", home, out, **more).items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, env=env, **pipes)
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "--resume continues" in output, output
    stopped_at = metrics(out)[-1]["step"]
    assert 5 <= stopped_at < 60
    assert os.listdir(out / "state") == [f"step_{stopped_at:08d}"]
    options = settings("sft", home, out, resume=True, **more)
    assert ranks(2, tmp_path, train, "sft", options) == [0, 0]
    assert [row["step"] for row in metrics(out)] == list(range(1, 61))
    assert_same_run(out, expected)
