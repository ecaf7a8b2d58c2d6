"""The training loop under everything that happens to it: many processes, signals, kills, poisoned gradients.

Several ranks are gloo processes forked from a server that has torch imported already (a plain `fork` of the test process could
inherit busy threads, a `spawn` would import for seconds). Runs are compared through the files they leave.
"""
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data
import sft_minimal as sft
import tdrm_minimal as tdrm
from conftest import ROOT
from data import BadInput
from plumbing import Env, last_checkpoint

SCRIPTS = {"sft": sft, "tdrm": tdrm}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch.distributed.optim", "transformers.models.qwen2.modeling_qwen2", "tqdm", "safetensors.torch"])


def child(rank, world, meeting, target, args):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    target(Env(rank, world), *args)
    if world > 1:
        dist.destroy_process_group()


def ranks(world, folder, target, *args):
    """Run target(env, *args) on `world` ranks -> their exit codes, negative for a signal."""
    meeting = os.path.join(folder, f"meeting{time.monotonic_ns()}")
    started = [processes.Process(target=child, args=(rank, world, meeting, target, args)) for rank in range(world)]
    for process in started:
        process.start()
    deadline = time.monotonic() + 120
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            pytest.fail(f"a rank still runs after two minutes: {target.__name__}{args}")
    return [process.exitcode for process in started]


# ---------------------------------------------------------------------------------------------------------------------
# A run, and what can happen in it: `fault` is (function, arguments), called in each rank before the run.

def train(env, script, options, fault=None):
    if fault:
        fault[0](env, *fault[1:])
    try:
        SCRIPTS[script].main(SCRIPTS[script].Config(**options), env)
    except BadInput as error:
        if env.rank == 0:
            with open(options["out"] + ".error", "w") as f:
                f.write(str(error))
        sys.exit(1)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(env, at, number):
    """The last rank gets a signal during a step: to stop is for all to agree on. Killed are all of them."""
    rate = sft.learning_rate

    def patched(step, *rest):
        if step == at and (env.rank == env.world - 1 or number == signal.SIGKILL):
            os.kill(os.getpid(), number)
        return rate(step, *rest)
    sft.learning_rate = patched


def in_save(env, at, where):
    """Killed while the checkpoint of step `at` is written. Only one rank dies: the others end with an error when it is gone."""
    save = sft.save_checkpoint

    def patched(cfg, env, step, model, tokenizer, optimizer, **others):
        def half(thing, path, *rest, **more):
            with open(path, "wb") as f:
                f.write(b"half")
            die()

        def after(function):
            return lambda *args, **options: (function(*args, **options), die())
        if step == at:
            if where == "state" and env.rank == env.world - 1:
                torch.save = half
            if where == "weights":
                model.save_pretrained = after(model.save_pretrained)
            if where == "tokenizer":
                tokenizer.save_pretrained = lambda folder: die()
            if where == "renamed":  # the older checkpoint is still there
                os.rename = after(os.rename)
        save(cfg, env, step, model, tokenizer, optimizer, **others)
    sft.save_checkpoint = patched


def poisoned(env, at, world_rank):
    """One rank's loss is not finite in one step."""
    rate, loss, now = sft.learning_rate, sft.sft_loss, [0]
    sft.learning_rate = lambda step, *rest: (now.__setitem__(0, step + 1), rate(step, *rest))[1]
    sft.sft_loss = lambda *args: loss(*args) * (math.nan if now[0] == at and env.rank == world_rank else 1)


def poisoned_and_kept(env, at, world_rank, folder):
    """Every rank leaves its own weights behind when the run has ended."""
    poisoned(env, at, world_rank)
    evaluate = sft.pass_at_1
    sft.pass_at_1 = lambda model, *rest: (torch.save(model.state_dict(), os.path.join(folder, f"weights{env.rank}.pt")), evaluate(model, *rest))[1]


def poisoned_then_killed(env, at, world_rank, killed_at):
    poisoned(env, at, world_rank)
    at_step(env, killed_at, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------------
# Fixtures: a tiny policy, data, and uninterrupted runs to compare with.

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("training")
    tokenizer = data.builtin_tokenizer()
    sft.new_policy(tokenizer, 0).save_pretrained(home / "policy")
    tokenizer.save_pretrained(home / "policy")
    rows = data.make_trajectories(data.make_problems(24), 2, label_rollouts=4)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def settings(script, home, out, **more):
    options = {"model": str(home / "policy"), "data": (str(home / "rows.jsonl"),), "out": str(out), "steps": 6, "batch_size": 8,
               "max_length": 128, "lr": 1e-3, "save_every": 2, "eval_every": 3, **more}
    return {"max_new_tokens": 8, "eval_problems": 4, **options} if script == "sft" else options


@pytest.fixture(scope="module")
def reference(home):
    """reference(script, world, **options) -> folder of an uninterrupted run."""
    done = {}

    def run(script, world, **more):
        key = (script, world, *sorted(more.items()))
        if key not in done:
            out = home / f"reference{len(done)}"
            assert ranks(world, home, train, script, settings(script, home, out, **more)) == [0] * world
            done[key] = out
        return done[key]
    return run


def metrics(out):
    def no_json(name):
        raise ValueError(f"{name} is no JSON")  # Python alone would read it
    return [json.loads(line, parse_constant=no_json) for line in open(os.path.join(out, "metrics.jsonl"))]


def assert_same_run(out, expected):
    for name in ("metrics.jsonl", "summary.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    states = sorted(os.listdir(out / "state"))  # the last and the one before: no remains of older ones, or of half a one
    assert len(states) == 2 and states[1] == "step_00000006" and states[0].startswith("step_")


# ---------------------------------------------------------------------------------------------------------------------
# The maths of a step.

@pytest.mark.parametrize("steps, warmup", [(1, 0.03), (1, 1), (2, 0), (10, 0.3), (10, 1), (1000, 0.03), (7, 0.5)])
def test_learning_rate(steps, warmup):
    rates = [sft.learning_rate(step, steps, 2.0, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[rise - 1] == 2.0  # the peak, and before it a straight line
    assert rates[:rise] == pytest.approx([2 * (i + 1) / rise for i in range(rise)])
    assert all(a >= b for a, b in zip(rates[rise - 1:], rates[rise:]))
    if steps > rise:
        middle, end = rise + (steps - rise) / 2, steps
        assert [sft.learning_rate(step, steps, 2.0, warmup) for step in (middle, end)] == pytest.approx([1, 0], abs=1e-12)


@pytest.mark.parametrize("at_once", [2**25, 4 * 35, 1])
def test_token_logprobs(at_once):
    torch.manual_seed(0)
    model, ids = sft.new_policy(data.builtin_tokenizer(), 0), torch.randint(5, 15, (3, 6))
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    logprobs, entropy = sft.token_logprobs(model, ids, mask, 0.7, at_once)
    logits = model(input_ids=ids).logits.double() / 0.7
    for b in range(3):
        for t in range(5):
            p = torch.tensor([x - logits[b, t].logsumexp(0).item() for x in logits[b, t].tolist()])
            wanted = (p[ids[b, t + 1]].item(), -(p.exp() * p).sum().item()) if mask[b, t] else (0, 0)
            assert (logprobs[b, t].item(), entropy[b, t].item()) == pytest.approx(wanted, abs=1e-5)
    assert logprobs.dtype == torch.float32
    weight = torch.rand(3, 5)
    (logprobs * weight).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * weight * mask).sum().backward()
    for mine, p in zip(got, model.parameters()):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def policy(home):
    tokenizer = data.builtin_tokenizer()
    model = sft.new_policy(tokenizer, 0)
    rows = list(data.read_trajectories(home / "rows.jsonl"))[:7]
    return model, data.encode_rows(rows, tokenizer, 128, eos=True)[0], tokenizer.pad_token_id


def gradients(policy, micro_batch_size, padding=0, filler=0):
    model, examples, pad_id = policy
    tokens = sum(len(e["input_ids"]) - e["prompt_length"] for e in examples)

    def loss_fn(micro):
        tensors = data.collate(micro, pad_id)
        tensors = {"input_ids": torch.nn.functional.pad(tensors["input_ids"], (0, padding), value=filler),
                   "response_mask": torch.nn.functional.pad(tensors["response_mask"], (0, padding))}
        return sft.sft_loss(sft.Policy(model), tensors, tokens)
    model.zero_grad()
    loss = sft.accumulate_gradients(model, examples, micro_batch_size, loss_fn, Env())
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro, padding, filler", [(1, 0, 0), (2, 0, 0), (3, 0, 0), (7, 0, 0), (100, 0, 0), (0, 9, 0), (2, 5, 1), (3, 4, 7)])
def test_gradients_do_not_depend_on_micro_batches_or_padding(policy, micro, padding, filler):
    loss, gradient = gradients(policy, 0)
    got_loss, got = gradients(policy, micro, padding, filler)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


def test_policy_loss_is_the_mean_over_all_response_tokens(policy):
    model, examples, _ = policy
    logprobs = []
    for e in examples:  # row by row, token by token, as defined
        rows = model(input_ids=torch.tensor([e["input_ids"]])).logits[0].double().log_softmax(-1)
        logprobs += [rows[t - 1, e["input_ids"][t]].item() for t in range(e["prompt_length"], len(e["input_ids"]))]
        assert e["input_ids"][-1] == data.builtin_tokenizer().eos_token_id  # the policy learns to stop
    assert gradients(policy, 3)[0] == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-5)


def test_rows_are_dealt_by_length():
    batch = [{"input_ids": [0] * n} for n in (5, 3, 4)]
    shares = [sft.local_rows(batch, Env(rank, 2)) for rank in range(2)]
    assert [[len(e["input_ids"]) for e in share] for share in shares] == [[3, 5], [4]]
    assert [len(sft.local_rows(batch, Env(rank, 4))) for rank in range(4)] == [1, 1, 1, 0]


def test_optimizer_step_clips_and_skips():
    model = torch.nn.Linear(3, 1)
    optimizer = sft.MasterAdamW(model.parameters(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (math.nan, math.inf, -math.inf):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.weight.grad[0, 1] = bad
        assert not math.isfinite(sft.optimizer_step(model, optimizer, 0.1, 1.0))
        assert all(torch.equal(p, old) and p.grad is None for p, old in zip(model.parameters(), before))
        assert not optimizer.adamw.state  # no moment has seen it
    for clip, first_moment in ((0, 0.1 * 2), (1.0, 0.1 * 0.5), (100.0, 0.1 * 2)):  # a gradient of four 2s has norm 4
        optimizer = sft.MasterAdamW(model.parameters(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.0)
        for p in model.parameters():
            p.grad = torch.full_like(p, 2.0)
        assert sft.optimizer_step(model, optimizer, 0.1, clip) == pytest.approx(4)
        assert optimizer.adamw.state[model.weight]["exp_avg"].tolist() == [pytest.approx([first_moment] * 3)]


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer.

CFG = sft.Config(lr=1e-2, weight_decay=0.1)


def small_model(dtype):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.LayerNorm(33), torch.nn.Linear(33, 5)).to(dtype)


def steps(model, optimizer, begin, end):
    """Steps with gradients that depend on the step alone, as every rank has after DDP's sum."""
    for step in range(begin, end):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(p.dtype)
        sft.optimizer_step(model, optimizer, 1e-2 / (1 + step), 0)
    return [p.detach().clone() for p in model.parameters()]


def test_master_adamw_is_adamw_in_fp32():
    model, other = small_model(torch.float32), small_model(torch.float32)
    ours = steps(model, sft.make_optimizer(model, CFG, Env()), 0, 6)
    groups = [{"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in other.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    theirs = steps(other, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), fused=False, foreach=False), 0, 6)
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
    assert run(sft.MasterAdamW).tolist() == pytest.approx([1 - 3000e-6] * 8, abs=2e-3)  # a bf16 next to 1: 0.9961


class Saved:
    """What save_checkpoint calls a model or a tokenizer: the weights go beside the checkpoint."""
    def __init__(self, model=None):
        self.model, self.parameters = model, model and model.parameters

    def save_pretrained(self, folder):
        os.makedirs(folder, exist_ok=True)
        if self.model:
            torch.save(self.model.state_dict(), os.path.join(folder, "weights.bin"))


def half_way(env, out, dtype, resume):
    """Steps 1 to 4 and a checkpoint, or steps 5 to 8 from that checkpoint, with two models in the run."""
    models = [small_model(dtype), small_model(dtype)]
    optimizers = [sft.make_optimizer(model, CFG, env) for model in models]
    cfg = replace(CFG, out=out)
    if not resume:
        weights = [steps(model, optimizer, 0, 4) for model, optimizer in zip(models, optimizers)]
        sft.save_checkpoint(cfg, env, 4, Saved(models[0]), Saved(), optimizers[0], prm=(Saved(models[1]), Saved(), optimizers[1]))
    else:
        folder = os.path.join(out, "state", "step_00000004")
        for model, name in zip(models, ("", "prm")):
            model.load_state_dict(torch.load(os.path.join(folder, name, "weights.bin"), weights_only=True))
        assert sft.load_checkpoint(folder, env, models[0], optimizers[0], prm=(models[1], optimizers[1])) == 4
        weights = [steps(model, optimizer, 4, 8) for model, optimizer in zip(models, optimizers)]
        torch.save(weights, os.path.join(out, f"weights{env.rank}.pt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 1), (1, 2), (2, 3)])
def test_checkpoint_on_any_number_of_processes_continues_bitwise(dtype, before, after, tmp_path):
    out = str(tmp_path / "run")
    os.makedirs(out)
    assert ranks(before, tmp_path, half_way, out, dtype, False) == [0] * before
    assert ranks(after, tmp_path, half_way, out, dtype, True) == [0] * after
    model = small_model(dtype)
    expected = steps(model, sft.make_optimizer(model, CFG, Env()), 0, 8)
    for rank in range(after):
        for weights in torch.load(tmp_path / "run" / f"weights{rank}.pt", weights_only=True):
            assert all(torch.equal(a, b) for a, b in zip(weights, expected))


def sharded(env, folder):
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(dtype)
        optimizer = sft.make_optimizer(model, CFG, env)
        weights = steps(model, optimizer, 0, 6)
        held = sum(s["exp_avg"].numel() for s in optimizer.optim.adamw.state.values())
        torch.save((weights, held), os.path.join(folder, f"{dtype}{env.rank}.pt"))


def test_sharded_optimizer_is_the_unsharded_one(tmp_path):
    assert ranks(2, tmp_path, sharded, str(tmp_path)) == [0, 0]
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(dtype)
        expected = steps(model, sft.make_optimizer(model, CFG, Env()), 0, 6)
        parts = [torch.load(tmp_path / f"{dtype}{rank}.pt") for rank in range(2)]
        assert all(torch.equal(a, b) for weights, _ in parts for a, b in zip(weights, expected))
        held = [part for _, part in parts]
        assert min(held) > 0 and sum(held) == sum(p.numel() for p in model.parameters())  # each state is held once


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs: the number of processes changes nothing but rounding.

@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("options", [{}, {"batch_size": 7}, {"batch_size": 3}, {"micro_batch_size": 1}], ids=str)
def test_number_of_processes_does_not_matter(script, options, reference, home, tmp_path):
    one = reference(script, 1, **{k: v for k, v in options.items() if k == "batch_size"})
    assert [row["step"] for row in metrics(one)] == list(range(1, 7)) and metrics(one)[0]["loss"] > 0
    for world in (2, 4):
        out = tmp_path / str(world)
        codes = ranks(world, tmp_path, train, script, settings(script, home, out, **options))
        if options.get("batch_size", 8) < world:  # a rank without rows
            assert codes == [1] * world
            message = (tmp_path / f"{world}.error").read_text()
            assert "--batch_size 3" in message and "4 processes" in message
            continue
        assert codes == [0] * world
        for name, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
            assert [row[name] for row in metrics(out)] == pytest.approx([row[name] for row in metrics(one)], rel=rel), (world, name)
        a, b = (load_file(folder / "model" / "model.safetensors") for folder in (out, one))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4, msg=f"{name} on {world} ranks")


# ---------------------------------------------------------------------------------------------------------------------
# Exact resume.

FAULTS = {
    "SIGTERM in step 1": (at_step, 0, signal.SIGTERM),
    "SIGINT in step 4, saved then": (at_step, 3, signal.SIGINT),
    "SIGTERM in the last step": (at_step, 5, signal.SIGTERM),
    "SIGKILL in step 1, nothing saved": (at_step, 0, signal.SIGKILL),
    "SIGKILL in step 6": (at_step, 5, signal.SIGKILL),
    "SIGKILL in the first save": (in_save, 2, "state"),
    "SIGKILL in a save, states": (in_save, 4, "state"),
    "SIGKILL in a save, weights": (in_save, 4, "weights"),
    "SIGKILL in a save, before the tokenizer": (in_save, 4, "tokenizer"),
    "SIGKILL in a save, renamed": (in_save, 4, "renamed"),
    "SIGKILL in the last save": (in_save, 6, "weights"),
}
EVERYWHERE = ["SIGINT in step 4, saved then", "SIGKILL in step 6", "SIGKILL in a save, states", "SIGKILL in a save, renamed"]
RESUMES = [(script, world, name) for script, world in (("sft", 1), ("tdrm", 2)) for name in FAULTS]
RESUMES += [(script, world, name) for script, world in (("sft", 2), ("tdrm", 1)) for name in EVERYWHERE]
RESUMES += [("tdrm bfloat16", 2, "SIGKILL in step 6"), ("sft bfloat16", 1, "SIGINT in step 4, saved then")]


@pytest.mark.parametrize("script, world, fault", RESUMES)
def test_resumed_run_is_bitwise_the_uninterrupted_one(script, world, fault, reference, home, tmp_path):
    script, *dtype = script.split()
    more = {"dtype": dtype[0]} if dtype else {}
    expected, out = reference(script, world, **more), tmp_path / "run"
    options = settings(script, home, out, **more)
    codes = ranks(world, tmp_path, train, script, options, FAULTS[fault])
    killed = "SIGKILL" in fault
    assert (-signal.SIGKILL in codes and 0 not in codes) if killed else codes == [0] * world
    assert not (out / "model").exists()
    if not killed:  # it saved what it had
        last = f"step_{FAULTS[fault][1] + 1:08d}"
        assert max(os.listdir(out / "state")) == last
    assert ranks(world, tmp_path, train, script, {**options, "resume": True}) == [0] * world
    assert_same_run(out, expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_of_a_finished_run_repeats_its_end(script, reference, home, tmp_path):
    out, module = tmp_path / "run", SCRIPTS[script]
    module.main(module.Config(**settings(script, home, out)), Env())
    os.remove(out / "summary.json")
    shutil.rmtree(out / "model")  # stopped in the final evaluation
    module.main(module.Config(**settings(script, home, out, resume=True)), Env())
    assert_same_run(out, reference(script, 1))


def test_half_a_row_of_metrics_is_dropped(reference, home, tmp_path):
    """The machine went down while a row was written."""
    out = tmp_path / "run"
    assert ranks(1, tmp_path, train, "sft", settings("sft", home, out), (at_step, 4, signal.SIGKILL)) == [-signal.SIGKILL]
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    sft.main(sft.Config(**settings("sft", home, out, resume=True)), Env())
    assert_same_run(out, reference("sft", 1))


@pytest.mark.parametrize("script, changed, message", [
    ("sft", {"lr": 2e-3}, "--lr 0.001, not 0.002"), ("sft", {"steps": 7}, "--steps 6, not 7"), ("sft", {"batch_size": 4}, "--batch_size 8, not 4"),
    ("tdrm", {"gamma": 0.5}, "--gamma 0.8, not 0.5"), ("tdrm", {"correct": (1.0, 0.5)}, "--correct [0.5, 0.2], not [1.0, 0.5]"),
    ("tdrm", {"method": "scalar_orm"}, "--method tdrm, not scalar_orm")])
def test_resume_with_another_config_is_an_error(script, changed, message, reference, home):
    out = reference(script, 1)
    before = {name: (out / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    with pytest.raises(BadInput) as error:
        SCRIPTS[script].main(SCRIPTS[script].Config(**settings(script, home, out, resume=True, **changed)), Env())
    assert message in str(error.value) and str(out) in str(error.value)
    assert before == {name: (out / name).read_bytes() for name in before}


def test_options_without_effect_on_the_result_may_change(reference, home, tmp_path):
    """Also where the run lies: it can be moved and continued."""
    shutil.copytree(reference("tdrm", 1), tmp_path / "moved")
    tdrm.main(tdrm.Config(**settings("tdrm", home, tmp_path / "moved", resume=True, save_every=1, micro_batch_size=2)), Env())
    assert_same_run(tmp_path / "moved", reference("tdrm", 1))


@pytest.mark.parametrize("before, now", [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(before, now, reference, home, tmp_path):
    """The same weights and moments: what is left is the order in which sums are rounded."""
    out = tmp_path / "run"
    fault = (at_step, 3, signal.SIGTERM)
    assert ranks(before, tmp_path, train, "tdrm", settings("tdrm", home, out), fault) == [0] * before
    assert metrics(out)[-1]["step"] == 4
    assert ranks(now, tmp_path, train, "tdrm", settings("tdrm", home, out, resume=True)) == [0] * now
    for a, b in zip(metrics(out), metrics(reference("tdrm", 1)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["rank1.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_damaged_checkpoint(damage, name, reference, home, tmp_path, capsys):
    """The one before it is taken, and the run ends where it would have."""
    if (damage, name) == ("gone", "model.safetensors"):
        pytest.skip("a folder without weights is met when they are loaded")
    out = tmp_path / "run"
    shutil.copytree(reference("tdrm", 2), out)
    path = out / "state" / "step_00000006" / name
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"x" * 5000)
    before = last_checkpoint(tdrm.Config(**settings("tdrm", home, out, resume=True)))
    message = capsys.readouterr().err
    assert before == str(out / "state" / "step_00000004")
    assert str(path.parent) in message and "damaged" in message and "before it" in message
    assert ranks(2, tmp_path, train, "tdrm", settings("tdrm", home, out, resume=True)) == [0, 0]
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (reference("tdrm", 2) / name).read_bytes()


def small_disk(env, at):
    """From the checkpoint of step `at` on, no file may become larger than a kilobyte."""
    save = sft.save_checkpoint

    def patched(cfg, env, step, *models, **others):
        if step >= at:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save(cfg, env, step, *models, **others)
    sft.save_checkpoint = patched


@pytest.mark.parametrize("world", [1, 2])
def test_full_disk(world, reference, home, tmp_path):
    out = tmp_path / "run"
    assert 1 in ranks(world, tmp_path, train, "tdrm", settings("tdrm", home, out), (small_disk, 4))
    message = open(f"{out}.error").read() if os.path.exists(f"{out}.error") else "checkpoint of step 4 could not be written"
    assert "checkpoint of step 4 could not be written" in message and "\n" not in message
    assert "step_00000002" in os.listdir(out / "state") and "step_00000004" not in os.listdir(out / "state")
    assert ranks(world, tmp_path, train, "tdrm", settings("tdrm", home, out, resume=True)) == [0] * world
    assert_same_run(out, reference("tdrm", world))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite.

def test_a_poisoned_step_is_skipped_on_all_ranks_and_counted(reference, home, tmp_path):
    out = tmp_path / "run"
    options = settings("sft", home, out, save_every=3)
    assert ranks(2, tmp_path, train, "sft", options, (poisoned_and_kept, 2, 1, str(tmp_path))) == [0, 0]
    rows = metrics(out)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1] and json.load(open(out / "summary.json"))["skipped"] == 1
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, False, False, False]
    weights = [torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2)]
    assert all(w.isfinite().all() and torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    clean = metrics(reference("sft", 2))
    assert [r["loss"] for r in rows[:2]] == [r["loss"] for r in clean[:2]] and rows[3]["loss"] != clean[3]["loss"]

    # The count outlives an interruption.
    again = settings("sft", home, tmp_path / "again", save_every=3)
    ranks(2, tmp_path, train, "sft", again, (poisoned_then_killed, 2, 1, 4))
    assert ranks(2, tmp_path, train, "sft", {**again, "resume": True}) == [0, 0]
    assert_same_run(tmp_path / "again", out)


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder.

@pytest.mark.parametrize("slash", ["", "/"])
def test_an_earlier_run_is_moved_aside_whole(slash, home, tmp_path):
    def files(folder):
        return {os.path.relpath(os.path.join(at, name), folder): open(os.path.join(at, name), "rb").read()
                for at, _, names in os.walk(folder) for name in names}
    runs = []
    for seed in range(3):
        options = settings("sft", home, str(tmp_path / "run") + slash, seed=seed, steps=2)  # a shell completes a folder with a slash
        sft.main(sft.Config(**options), Env())
        assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
        assert {"config.json", "metrics.jsonl", "summary.json", "model/model.safetensors"} <= files(tmp_path / "run").keys()
        runs.append(files(tmp_path / "run"))
    assert sorted(os.listdir(tmp_path)) == ["run", "run.old1", "run.old2"]
    assert [files(tmp_path / name) for name in ("run.old1", "run.old2", "run")] == runs


def test_a_checkpoint_is_continued_only_when_asked(home, tmp_path):
    """A folder with a checkpoint but no config.json is no reason to start in the middle."""
    options = settings("sft", home, tmp_path / "run", steps=2)
    sft.main(sft.Config(**options), Env())
    expected = metrics(tmp_path / "run")
    os.remove(tmp_path / "run" / "config.json")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    sft.main(sft.Config(**options), Env())
    assert metrics(tmp_path / "run") == expected


def test_equal_runs_write_equal_files(reference, home, tmp_path):
    for script in SCRIPTS:
        SCRIPTS[script].main(SCRIPTS[script].Config(**settings(script, home, tmp_path / script)), Env())
        rows = metrics(tmp_path / script)
        assert rows == metrics(reference(script, 1))
        keys = {"step", "loss", "lr", "grad_norm", "skipped"}
        assert all(keys <= row.keys() for row in rows) and rows[2].keys() > keys  # the third is an evaluation


# ---------------------------------------------------------------------------------------------------------------------
# The scripts as they are started, under torchrun.

def torchrun(script, options, **more):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(ROOT, f"{script}_minimal.py")]
    for name, value in options.items():
        words += [f"--{name}"] + ([] if value is True else list(value) if isinstance(value, tuple) else [str(value)])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def test_torchrun_of_tdrm(reference, home, tmp_path):
    process = torchrun("tdrm", settings("tdrm", home, tmp_path / "run"))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "2 processes on cpu" in output and output.count("the reward model is in") == output.count("mean |V_t+1 - V_t|") == 1
    assert_same_run(tmp_path / "run", reference("tdrm", 2))


def test_torchrun_stopped_by_a_signal_and_resumed(home, tmp_path):
    """SIGTERM goes to torchrun, as a scheduler sends it; every rank ends its step, and the run continues bitwise."""
    more = {"steps": 150, "batch_size": 16, "save_every": 0, "eval_every": 0}
    assert ranks(2, tmp_path, train, "sft", settings("sft", home, tmp_path / "expected", **more)) == [0, 0]
    out = tmp_path / "run"
    process = torchrun("sft", settings("sft", home, out, **more))
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or len(open(out / "metrics.jsonl").readlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "--resume continues" in output, output
    stopped_at = metrics(out)[-1]["step"]
    assert 5 <= stopped_at < 150 and os.listdir(out / "state") == [f"step_{stopped_at:08d}"]
    process = torchrun("sft", settings("sft", home, out, resume=True, **more))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert [row["step"] for row in metrics(out)] == list(range(1, 151))
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
