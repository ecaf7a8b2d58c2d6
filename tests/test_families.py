"""Families of policies that do something behind their head or have dropout: what is sampled is what
is trained, in every chapter that trains log-probs.

Gemma 2 caps its logits, Granite divides them, Cohere multiplies them. The models here are tiny and
random, with weights so large that it matters.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers

import data
import prime_minimal as prime
import qrm_minimal as qrm
import rl_minimal as rl
import sft_minimal as sft
from helpers import metrics, write_rows
from parts.decoding import pad
from parts.formats import BadInput
from parts.models import load_policy, load_tokenizer, save_model
from parts.rewards import load_reward_model
from parts.runs import Processes
from parts.training import token_logprobs

TOKENIZER = data.builtin_tokenizer()
SIZE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": TOKENIZER.pad_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "bos_token_id": None,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 256}
GEMMA |= {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
GRANITE = {"logits_scaling": 6.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
GRANITE |= {"attention_multiplier": 0.5}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPT2 |= {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5}
LIBRARY = transformers
SCALED = {  # family: its classes, what its config says
    "gemma2": (LIBRARY.Gemma2Config, LIBRARY.Gemma2ForCausalLM, GEMMA),
    "granite": (LIBRARY.GraniteConfig, LIBRARY.GraniteForCausalLM, GRANITE),
    "cohere": (LIBRARY.CohereConfig, LIBRARY.CohereForCausalLM, {"logit_scale": 0.2}),
}
DROPPING = {
    "qwen2": (LIBRARY.Qwen2Config, LIBRARY.Qwen2ForCausalLM, {"attention_dropout": 0.5}),
    "gpt2": (LIBRARY.GPT2Config, LIBRARY.GPT2LMHeadModel, GPT2),
}
FAMILIES = SCALED | DROPPING


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Model folders of all families; problems, solutions to imitate, pairs."""
    home = tmp_path_factory.mktemp("families")
    for name, (config, kind, more) in FAMILIES.items():
        torch.manual_seed(1)
        model = kind(config(**SIZE, **more))
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p *= 8
            model.get_output_embeddings().weight *= 4
        save_model(str(home / name), model, TOKENIZER)
    problems = data.make_problems(12)
    rows = data.make_trajectories(problems, 4)
    write_rows(home / "problems.jsonl", problems)
    write_rows(home / "rows.jsonl", rows)
    return home


def settings(home, name, out, **more):
    """Of a run of a step or two in fp32, nothing learned: what a forward pass says is looked at."""
    files = {"model": str(home / name), "out": str(out), "max_length": 200}
    return files | {"steps": 1, "eval_every": 0, "lr": 0.0, "dtype": "float32"} | more


def on_policy(home, name, out):
    files = {"data": (str(home / "problems.jsonl"),), "eval": (str(home / "problems.jsonl"),)}
    sizes = {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 24, "eval_problems": 1}
    return settings(home, name, out, **files, **sizes, kl_coef=0.1)


def naive_logprobs(model, ids):
    """log-probs of ids[1:] by the library's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    logp = F.log_softmax(logits.float(), dim=-1)
    return logp.gather(1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.mark.parametrize("name", SCALED)
def test_what_is_behind_the_head_matters(name, home):
    """Else the other tests would show nothing."""
    model = load_policy(str(home / name), torch.float32)
    ids = torch.arange(len(TOKENIZER))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        bare = model.get_output_embeddings()(hidden)
    assert (logits.log_softmax(-1) - bare.log_softmax(-1)).abs().max() > 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_prompts(name, recompute, home):
    """Rows that begin alike: the log-probs and gradients of each row by itself, with the prompt
    read once. Layers with a sliding window and recomputed ones read every row whole."""
    model = load_policy(str(home / name), torch.float32).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prompts, read, logprobs, grads = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11]], [], [], []
    rows = [prompts[i % 2] + [5 + i % 7] * (1 + i % 3) for i in range(7)] + [[5]]
    starts = [len(prompts[i % 2]) for i in range(7)] + [1]  # the last one asks for nothing
    ids, real = pad(rows, "right", "cpu")
    mask = (torch.arange(1, ids.shape[1]) >= torch.tensor(starts)[:, None]) & real[:, 1:]
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    for part in ([i] for i in range(8)), [range(8)]:
        model.zero_grad()
        read.clear()
        for i in map(list, part):
            found, _ = token_logprobs(model, ids[i], mask[i], 0.7)
            (found * ids[i, 1:]).sum().backward()
            logprobs += [found.detach()[mask[i]]]
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    hook.remove()
    torch.testing.assert_close(torch.cat(logprobs[:8]), logprobs[8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4 * grads[0].abs().max())
    whole = recompute or name == "gemma2"
    assert read == ([ids.numel()] if whole else [3 * 6, 8 * 2])


@pytest.mark.parametrize("name", FAMILIES)
def test_rl_trains_the_policy_that_it_samples(name, home, tmp_path):
    rl.main(rl.Config(**on_policy(home, name, tmp_path), alpha=1.0), Processes())
    (row,) = metrics(tmp_path)[1:]
    assert row["max_ratio_deviation"] < 1e-4
    assert row["approx_kl"] < 1e-6 and row["entropy"] > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_prime_trains_the_policy_that_it_samples(name, home, tmp_path):
    options = on_policy(home, name, tmp_path) | {"accuracy": (0.0, 1.0), "prm_lr": 0.0}
    prime.main(prime.Config(**options), Processes())
    (row,) = metrics(tmp_path)[1:]
    assert row["max_ratio_deviation"] < 1e-4
    assert row["prm"] == pytest.approx(0, abs=1e-3)  # the PRM is its reference, twice the same


@pytest.mark.parametrize("name", FAMILIES)
def test_sft_learns_by_the_log_probs_of_the_library(name, home, tmp_path):
    options = {"data": (str(home / "rows.jsonl"),), "batch_size": 1, "seed": 3}
    cfg = sft.Config(**settings(home, name, tmp_path, **options, max_new_tokens=4))
    sft.main(cfg, Processes())
    (row,) = metrics(tmp_path)
    examples, *_ = sft.load_data(cfg, None, TOKENIZER)
    e = examples[next(data.batches([len(e) for e in examples], 1, seed=3))[0]]
    model = load_policy(str(home / name), torch.float32)
    logprobs = naive_logprobs(model, e.input_ids)[e.prompt_length - 1 :]
    assert row["loss"] == pytest.approx(-logprobs.mean().item(), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_dpo_scores_by_the_log_probs_of_the_library(name, home, tmp_path):
    options = {"data": (str(home / "rows.jsonl"),), "batch_size": 2, "method": "DPO-RM"}
    cfg = qrm.Config(**settings(home, name, tmp_path, **options) | {"lr": 1e-3})
    qrm.main(cfg, Processes())
    (row,) = metrics(tmp_path)
    assert row["loss"] == pytest.approx(0.6931, abs=1e-4)  # twice the same model: log 2
    folder = str(tmp_path / "model")
    reward = load_reward_model(folder, torch.float32)
    ids, begin, _ = reward.encode("1+2+3", ["1+2=3", "3+3=6", "\\boxed{6}"])
    e = data.Example("1+2+3", [], ids, begin, [])
    (scores,) = reward.score_tokens([e], Processes())
    models = [load_policy(path, torch.float32) for path in (folder, folder + "/reference")]
    ours, theirs = (naive_logprobs(model, ids)[begin - 1 :] for model in models)
    assert scores.tolist() == pytest.approx((0.1 * (ours - theirs)).tolist(), abs=1e-5)
    assert abs(scores).max() > 1e-4


class Twisted(transformers.Qwen2ForCausalLM):
    """A family that does something to its logits that is not known here."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits * 1.1 + output.logits.sin()
        return output


TRAINING = [
    (sft, {"data": ("rows.jsonl",)}),
    (qrm, {"data": ("rows.jsonl",), "method": "DPO-RM"}),
    (rl, {"data": ("problems.jsonl",), "alpha": 1.0}),
    (prime, {"data": ("problems.jsonl",)}),
]


def name_of(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("script, options", TRAINING, ids=name_of)
def test_an_unknown_family_is_refused_before_the_first_step(
    script, options, home, tmp_path, monkeypatch
):
    monkeypatch.chdir(home)
    auto = transformers.AutoModelForCausalLM
    monkeypatch.setattr(auto, "from_pretrained", functools.partial(Twisted.from_pretrained))
    cfg = script.Config(**settings(home, "qwen2", tmp_path / "run", **options))
    with pytest.raises(BadInput, match="qwen2: Twisted changes its logits behind the head"):
        script.main(cfg, Processes())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_off(name, home):
    model = load_policy(str(home / name), torch.float32).train()
    assert load_tokenizer(str(home / name)).get_vocab() == TOKENIZER.get_vocab()
    ids = torch.arange(8)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    kind = FAMILIES[name][1]
    with_it = kind.from_pretrained(str(home / name)).train()
    assert not torch.equal(with_it(input_ids=ids).logits, with_it(input_ids=ids).logits)
