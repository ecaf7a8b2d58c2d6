"""Reward models of every kind: the same values from a cached tree search, from one forward over the
whole text, and from the definition, token by token, each model on its own."""

import functools
import json
import math

import numpy as np
import pytest
import torch

import data
import search_minimal as search
import sft_minimal as sft
from parts import rewards
from parts.formats import BadInput, split_steps
from parts.models import Layout, load_policy, load_tokenizer, token_ids
from parts.rewards import RewardModel, load_reward_model, new_reward_model
from parts.runs import Processes

CPU = torch.device("cpu")
KINDS = ("value", "orm", "qrm", "implicit")
BETA, TEMPERATURE, SCALE = 0.3, 0.7, 0.2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, and a reward model of each kind with random weights."""
    home, tokenizer = tmp_path_factory.mktemp("rewards"), data.builtin_tokenizer()
    for seed, name in enumerate(("policy", "lm", "reference")):
        sft.new_policy(tokenizer, seed).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    for seed, kind in enumerate(("value", "orm", "qrm")):
        options = {"kind": kind, "scale": SCALE if kind == "qrm" else 1.0}
        reward = new_reward_model(str(home / "lm"), tokenizer, torch.float32, seed, **options)
        reward.save(str(home / kind))
    model, reference = (load_policy(str(home / n), torch.float32) for n in ("lm", "reference"))
    numbers = {"beta": BETA, "temperature": TEMPERATURE}
    reward = RewardModel(model, tokenizer, "implicit", reference, **numbers)
    reward.save(str(home / "implicit"))
    return home


def load(folders, kind):
    return load_reward_model(str(folders / kind), torch.float32)


@functools.cache
def naive_model(folder):
    load = rewards.load_classifier if folder.name in KINDS else load_policy
    return load(str(folder), torch.float64).eval()


@torch.no_grad()
def naive_numbers(folders, kind, ids, prompt_length):
    """From the definition, in double precision: a number for each token of the response."""
    x = torch.tensor([ids])
    if kind == "implicit":
        z = 0.0
        for sign, name in ((1, "lm"), (-1, "reference")):
            logits = naive_model(folders / name)(input_ids=x).logits[0]
            logp = (logits / TEMPERATURE).log_softmax(-1)[:-1]
            z = z + sign * BETA * logp.gather(1, x[0, 1:, None])[:, 0]
        return z[prompt_length - 1 :].tolist()
    return naive_model(folders / kind)(input_ids=x).logits[0, prompt_length:, 0].tolist()


def naive_value(folders, kind, tokenizer, prompt, steps, closing):
    """`closing`: what stands behind the last step, "end" of response, "blank" line or "nothing"."""
    eos = closing == "end" and kind != "value"
    ids, prompt_length, _ = data.encode_trajectory(tokenizer, prompt, steps, eos)
    ids = ids + (token_ids(tokenizer, "\n\n") if closing == "blank" else [])
    z = naive_numbers(folders, kind, ids, prompt_length)
    if kind == "implicit":
        logit = sum(z)
    else:
        logit = SCALE * sum(z) / len(z) if kind == "qrm" else z[-1]
    return 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep, expand", [(1, 3), (2, 2)])
def test_values_in_tree_search(folders, kind, keep, expand):
    policy = load_policy(str(folders / "policy"), torch.float32)
    prm, prompts, trace, checked = load(folders, kind), ["1+2*3", "7-5+2*4-1"], [], 0
    tokenizer = prm.tokenizer
    options = {"max_step_tokens": 12, "max_new_tokens": 48, "seed": 3, "trace": trace}
    search.tree_search(policy, tokenizer, prm, prompts, keep, expand, **options)
    for depth, group, candidates, _ in trace:
        for beam in candidates:
            text = tokenizer.decode(beam.token_ids, skip_special_tokens=True)
            # The cut at 12 tokens may fall within a step; an end right after one is no step.
            if beam.steps and split_steps(text) == beam.steps and not (beam.finished and depth):
                closing = "end" if beam.finished else "blank"
                prompt = prompts[group]
                wanted = naive_value(folders, kind, tokenizer, prompt, beam.steps, closing)
                assert beam.value == pytest.approx(wanted, abs=1e-4)
                checked += 1
    assert checked > 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("finished", [True, False])
def test_values_of_whole_responses(folders, kind, finished):
    prm, question = load(folders, kind), "1+2*3"
    texts = ["1+2=3\n\n3*3=9\n\n\\boxed{9}", "5", "", "1+2=3\n\n\\boxed{3}"]
    responses = [[(text, finished) for text in texts]]
    (values,), _ = search.score_responses(prm, [question], responses, Layout(), CPU)
    assert [len(v) for v in values] == [3, 1, 0, 2]
    for text, found in zip(texts, values):
        steps = split_steps(text)
        for t, value in enumerate(found, 1):
            closing = ("end" if finished else "nothing") if t == len(steps) else "blank"
            wanted = naive_value(folders, kind, prm.tokenizer, question, steps[:t], closing)
            assert value == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_responses_tokens(folders, kind):
    """Rows of several lengths, in two batches; whatever stands behind the response is padding."""
    prm, rows = load(folders, kind), []
    for row in data.make_trajectories(data.make_problems(5), 1):
        ids = data.encode_trajectory(prm.tokenizer, row["prompt"], row["completions"], True)
        rows.append(data.Example(row["prompt"], row["completions"], *ids))
    for row, found in zip(rows, prm.score_tokens(rows, Processes(), rows_at_once=3)):
        wanted = naive_numbers(folders, kind, row.input_ids, row.prompt_length)
        assert found.dtype == np.float32 and found.tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_trajectory_is_spelled(folders, kind):
    prm, prompt, steps = load(folders, kind), "1+2*3", ["1+2=3", "3*3=9", "\\boxed{9}"]
    eos = kind != "value"
    for n in range(4):
        ids, prompt_length, ends = prm.encode(prompt, steps[:n])
        wanted = data.encode_trajectory(prm.tokenizer, prompt, steps[:n], eos and n > 0)
        assert (ids, prompt_length) == wanted[:2]
        assert ends == [*wanted[2][:-1], len(ids) - 1][:n]  # a response is read at its end
        unfinished = prm.encode(prompt, steps[:n], finished=False)
        assert unfinished == data.encode_trajectory(prm.tokenizer, prompt, steps[:n])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_reward_model_is_the_same(folders, kind, tmp_path):
    prm = load(folders, kind)
    assert not prm.training and not any(p.requires_grad for p in prm.parameters())
    prm.save(str(tmp_path / "again"))
    again = load_reward_model(str(tmp_path / "again"), torch.float32)
    for name in ("kind", "scale", "beta", "temperature"):
        assert getattr(again, name) == getattr(prm, name)
    ids = torch.randint(0, 22, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids).logits, prm(ids).logits)
    assert (tmp_path / "again" / "reward.json").exists() == (kind != "value")
    assert load_tokenizer(str(tmp_path / "again")).get_vocab() == prm.tokenizer.get_vocab()


DAMAGED = ["{", "[]", '{"kind": "x"}', '{"kind": 3}', '{"kind": "qrm", "scale": "a"}']


@pytest.mark.parametrize("about", [*DAMAGED, '{"kind": "qrm", "sacle": 1}'])
def test_a_damaged_description_is_named(folders, about, tmp_path):
    load(folders, "value").save(str(tmp_path))
    (tmp_path / "reward.json").write_text(about)
    with pytest.raises(BadInput, match="--prm: .*reward.json is damaged; wanted"):
        load_reward_model(str(tmp_path), torch.float32, option="--prm")


def test_without_a_reference_there_is_no_implicit_reward(folders, tmp_path):
    load(folders, "value").save(str(tmp_path))
    (tmp_path / "reward.json").write_text(json.dumps({"kind": "implicit", "beta": 1}))
    with pytest.raises(BadInput):
        load_reward_model(str(tmp_path), torch.float32)


def test_scoring_leaves_the_mode_as_it_was(folders):
    reward = new_reward_model(str(folders / "lm"), data.builtin_tokenizer(), torch.float32)
    example = data.Example("1+2", ["3"], *reward.encode("1+2", ["3"]))
    for mode in (True, False):
        reward.train(mode)
        reward.score_steps([example], Processes())
        assert reward.training is mode and reward.model.training is mode


def test_a_reward_model_with_dropout_is_not_noisy(folders, tmp_path):
    """Not even in training mode, in which it samples nothing."""
    tokenizer = data.builtin_tokenizer()
    model = sft.new_policy(tokenizer, 3)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    prm = new_reward_model(str(tmp_path), tokenizer, torch.float32).train()
    ids = torch.arange(20)[None]
    assert torch.equal(prm(ids).logits, prm(ids).logits)
