"""Reward models of every kind: the values of the cached tree search are those of a forward over the whole text."""
import json
import math

import pytest
import torch

import data
import scorers
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from plumbing import Env


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, and a reward model of each kind with random weights."""
    home, tokenizer = tmp_path_factory.mktemp("scorers"), data.builtin_tokenizer()
    names = {"policy": 0, "implicit": 1, "implicit/reference": 2, "qrm": 3, "tdrm": 3}
    for name, seed in names.items():
        sft.new_policy(tokenizer, seed).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    for name in "qrm", "tdrm":
        tdrm.load_reward_model(str(home / name)).save_pretrained(home / name)
    (home / "implicit" / "reward.json").write_text(json.dumps({"kind": "implicit", "beta": 0.3, "temperature": 0.7}))
    (home / "qrm" / "reward.json").write_text(json.dumps({"kind": "qrm", "scale": 0.2}))
    return home


def load(folders, name):
    return scorers.load_scorer(str(folders / name), torch.float32, tdrm.load_reward_model).eval()


def naive_value(folders, name, tokenizer, prompt, steps, finished, reduce):
    """From the definition: numbers of the response's tokens one by one, each model on its own."""
    ids, prompt_length, ends = data.encode_trajectory(tokenizer, prompt, steps, eos=finished and name != "tdrm")
    text = ids if finished else ids + data.token_ids(tokenizer, data.STEP_END)  # an unfinished step is closed by its blank line
    x = torch.tensor([text])
    if name == "implicit":
        from transformers import AutoModelForCausalLM
        logp = [AutoModelForCausalLM.from_pretrained(f).double()(input_ids=x).logits[0].div(0.7).log_softmax(-1)
                for f in (folders / "implicit", folders / "implicit" / "reference")]
        z = [0.3 * (logp[0][t - 1, i] - logp[1][t - 1, i]).item() for t, i in enumerate(text)][prompt_length:]
    else:
        z = tdrm.load_reward_model(str(folders / name)).double()(input_ids=x).logits[0, prompt_length:, 0].tolist()
    number = {"last": z[-1], "sum": sum(z), "mean": sum(z) / len(z)}[reduce]
    return 1 / (1 + math.exp(-number * (0.2 if name == "qrm" else 1)))


@pytest.mark.parametrize("name, reduce", [("implicit", "sum"), ("qrm", "mean"), ("tdrm", "last"), ("qrm", "last"), ("implicit", "mean")])
@pytest.mark.parametrize("keep, expand", [(1, 3), (2, 2)])
@torch.no_grad()
def test_values_in_tree_search(folders, name, reduce, keep, expand):
    from transformers import AutoModelForCausalLM
    policy, tokenizer, prm = AutoModelForCausalLM.from_pretrained(folders / "policy"), data.load_tokenizer(str(folders / "policy")), load(folders, name)
    prm.reduce = reduce
    prompts, trace = ["1+2*3", "7-5+2*4-1"], []
    best, _ = search.tree_search(policy, tokenizer, prm, tokenizer, prompts, keep, expand, max_step_tokens=12, max_steps=4,
                                 max_new_tokens=60, seed=3, trace=trace)
    checked = 0
    for depth, group, candidates, kept in trace:
        for beam in candidates:
            text = tokenizer.decode(beam.token_ids, skip_special_tokens=True)
            # The cut at 12 tokens may fall within a step; an end right after one is no step of its own.
            if beam.steps and data.split_steps(text) == beam.steps and not (beam.finished and depth):
                wanted = naive_value(folders, name, tokenizer, prompts[group], beam.steps, beam.finished, reduce)
                assert beam.value == pytest.approx(wanted, abs=1e-4)
                checked += 1
    assert checked > 4


@pytest.mark.parametrize("name, reduce", [("implicit", "sum"), ("qrm", "mean"), ("tdrm", "last")])
def test_values_of_whole_responses(folders, name, reduce):
    tokenizer, prm = data.load_tokenizer(str(folders / name)), load(folders, name)
    assert prm.reduce == reduce
    texts = ["1+2=3\n\n3*3=9\n\n\\boxed{9}", "5", "", "1+2=3\n\n\\boxed{3}"]
    (values,), (tokens,) = search.score_texts(prm, tokenizer, ["1+2*3"], [texts], Env())
    assert [len(v) for v in values] == [3, 1, 0, 2]
    for text, v in zip(texts, values):
        steps = data.split_steps(text)
        if steps:
            assert v[-1] == pytest.approx(naive_value(folders, name, tokenizer, "1+2*3", steps, True, reduce), abs=1e-4)
