"""Reward models trained elsewhere: the values that naive readers find, for tiny random models in
the published shapes, with real tokenizers. The readers are written from what is known of each
family alone: a forward pass over the whole text, in whose tokens the tag is looked for.
"""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers import MistralForCausalLM, MistralForTokenClassification, Qwen2ForCausalLM
from transformers import Qwen2ForTokenClassification, Qwen2Model

import data
import rl_minimal as rl
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from conftest import ROOT
from helpers import save_policy, write_rows
from parts.decoding import feed, prompt_cache
from parts.formats import BadInput
from parts.models import Layout, load_policy, load_tokenizer
from parts.published import describe, fill_in, prompt_ids, read_description, step_ids
from parts.rewards import load_reward_model
from parts.runs import Processes

PLACE = os.environ.get("TOKENIZERS_DIR")
real = pytest.mark.skipif(not PLACE, reason="TOKENIZERS_DIR is not set")
CPU = torch.device("cpu")

QUESTION = "Natalia sold 48 clips in April, and half as many in May. How many in all?"
OTHER = "Compute $\\frac{1}{2} + 3$."
STEPS = [
    "In May she sold 48/2 = 24 clips.",
    "Step 2: in all $48 + 24 = 72$",
    "(Check: 72 - 24 = 48!)\nIt is right, naïve as it is…",
    "So the answer is \\boxed{72}.",
]
ROWS = [(QUESTION, STEPS), (QUESTION, STEPS[:1]), (OTHER, ["Well, 0.5 + 3 = 3.5.", "# 3.5 -"])]


# --------------------------------------------------------------------------------------------------
# The families: a maker, which writes a folder as published, and the reader of what it made.


def shape(kind, tokenizer, **more):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(3)
    return kind(**sizes, initializer_range=0.4, max_position_embeddings=2048, **more)


def write(folder, config, tensors):
    """Tensors and a config as remote code would have left them."""
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hidden(backbone, ids):
    return backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]


def places(ids, token):
    return [i for i, x in enumerate(ids) if x == token]


def qwen(folder, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    config = shape(Qwen2Config, tokenizer, tie_word_embeddings=False)
    config.architectures = ["Qwen2ForProcessRewardModel"]
    config.auto_map = {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}
    backbone = Qwen2Model(config).eval()
    head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    tensors = {f"model.{k}": v for k, v in backbone.state_dict().items()}
    tensors |= {f"score.{k}": v for k, v in head.state_dict().items()}
    tensors["lm_head.weight"] = torch.zeros(9, 16)
    write(folder, config, tensors)
    system = "Please reason step by step, and put your final answer within \\boxed{}."

    def read(question, steps):
        response = "".join(step + "<extra_0>" for step in steps)
        turns = [("system", system), ("user", question), ("assistant", response)]
        turns = [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
        at = places(ids, tokenizer.convert_tokens_to_ids("<extra_0>"))
        return head(hidden(backbone, ids))[at].softmax(-1)[:, 1]

    return read


def shepherd(folder, tokenizer):
    model = MistralForCausalLM(shape(MistralConfig, tokenizer, tie_word_embeddings=False)).eval()
    model.save_pretrained(folder)
    good, bad = tokenizer("+")["input_ids"][-1], tokenizer("-")["input_ids"][-1]

    def read(question, steps):
        text = question + " " + "\n".join(f"{step} ки" for step in steps)
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        at = places(ids, tokenizer(" ки")["input_ids"][-1])
        return model(torch.tensor([ids])).logits[0, at][:, [good, bad]].softmax(-1)[:, 0]

    return read


def rlhflow(folder, tokenizer):
    model = LlamaForCausalLM(shape(LlamaConfig, tokenizer, tie_word_embeddings=True)).eval()
    model.save_pretrained(folder)
    good, bad = tokenizer("+")["input_ids"][-1], tokenizer("-")["input_ids"][-1]

    def read(question, steps):
        turns, values = [], []
        for t, step in enumerate(steps):
            content = question + " " + step if t == 0 else step
            turns += [{"role": "user", "content": content}, {"role": "assistant", "content": "+"}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            before = places(ids, good)[-1] - 1
            logits = model(torch.tensor([ids])).logits[0, before]
            values.append(logits[[good, bad]].softmax(-1)[0])
        return torch.stack(values)

    return read


def skywork(folder, tokenizer):
    tokenizer.bos_token = "<|endoftext|>"
    config = shape(Qwen2Config, tokenizer, tie_word_embeddings=True)
    config.architectures = ["Qwen2ForPrmModel"]
    model, head = Qwen2ForCausalLM(config).eval(), torch.nn.Linear(16, 1)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    tensors |= {f"v_head.summary.{k}": v for k, v in head.state_dict().items()}
    write(folder, config, tensors)

    def read(question, steps):
        ids, ends = tokenizer("<|endoftext|>" + question + "\n")["input_ids"], []
        for step in steps:
            for line in step.split("\n"):
                ids += tokenizer(line)["input_ids"] + tokenizer("\n")["input_ids"]
            ends.append(len(ids) - 1)
        return head(hidden(model.model, ids))[ends, 0].sigmoid()

    return read


def trl(folder, tokenizer):
    kind, classifier = Qwen2Config, Qwen2ForTokenClassification
    if tokenizer.bos_token:
        kind, classifier = MistralConfig, MistralForTokenClassification
    model = classifier(shape(kind, tokenizer, num_labels=2)).eval()
    torch.nn.init.normal_(model.score.bias)
    model.save_pretrained(folder)

    def read(question, steps):
        ids, ends = tokenizer(question, add_special_tokens=False)["input_ids"], []
        ids = ([tokenizer.bos_token_id] if tokenizer.bos_token else []) + ids
        for step in steps:
            for text in (step, "\n"):
                ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            ends.append(len(ids) - 1)
        return model(torch.tensor([ids])).logits[0, ends].softmax(-1)[:, 1]

    return read


def thudm(folder, tokenizer):
    config = shape(LlamaConfig, tokenizer, num_labels=1, pad_token_id=0)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)

    def read(question, steps):
        values = []
        for t in range(1, len(steps) + 1):
            turns = [{"role": "user", "content": question}]
            turns.append({"role": "assistant", "content": "\n\n".join(steps[:t])})
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids = [tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids[1] == tokenizer.bos_token_id
            ids = ids[: places(ids, tokenizer.eos_token_id)[-1] + 1]
            values.append(model.score(hidden(model.model, ids)[-1])[0].sigmoid())
        return torch.stack(values)

    return read


FAMILIES = {  # the reader's maker, the published name, tokenizers
    "qwen": (qwen, "Qwen2.5-Math-PRM-7B", "qwen3"),
    "shepherd": (shepherd, "math-shepherd-mistral-7b-prm", "llama2"),
    "shepherd, byte-level": (shepherd, "math-shepherd-mistral-7b-prm", "llama3_1"),
    "rlhflow": (rlhflow, "Llama3.1-8B-PRM-Deepseek-Data", "llama3_1"),
    "skywork": (skywork, "Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "qwen3"),
    "trl": (trl, "Qwen2.5-0.5B-Math-Shepherd-PRM-0.2", "qwen3"),
    "trl, SentencePiece": (trl, "TRL-PRMTrainer", "llama2"),
    "thudm": (thudm, "DeepSeek-TD2-PRM", "llama3_1"),
    "thudm, DeepSeek's own": (thudm, "DeepSeek-ScalarORM", "deepseek_v3"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """-> the reward model, loaded from a folder with the published name; its naive reader."""
    if not PLACE:
        pytest.skip("TOKENIZERS_DIR is not set")
    make, name, tokenizer = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("published") / name
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(PLACE, tokenizer))
    read = torch.no_grad()(make(folder, tokenizer))
    tokenizer.save_pretrained(folder)
    return load_reward_model(str(folder), torch.float32), read


def close(found, wanted):
    return found == pytest.approx([float(v) for v in wanted], abs=1e-5)


def examples_of(prm, rows):
    return [data.Example(prompt, steps, *prm.encode(prompt, steps)) for prompt, steps in rows]


# --------------------------------------------------------------------------------------------------


def test_flat(family):
    """Rows of several lengths in one batch; a policy's system turn is not read."""
    prm, read = family
    found = prm.score_steps(examples_of(prm, ROWS), Processes())
    for (question, steps), values in zip(ROWS, found):
        assert close(values, read(question, steps))
    assert max(found[0]) - min(found[0]) > 1e-3
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    (again,) = prm.score_steps(examples_of(prm, [(turns, STEPS)]), Processes())
    assert close(again, found[0])


@torch.no_grad()
def test_candidates_of_a_tree(family):
    """Real steps behind the cache: forks, a candidate without a step, ends of any length."""
    prm, read = family
    ids, mask = [prm.encode(question, [])[0] for question in (QUESTION, OTHER)], None
    cache, ids, mask = prompt_cache(ids, CPU)
    feed(prm, cache, ids, mask)
    live = [search.Beam(i, [], [], row=i, prm_row=i) for i in range(2)]
    for depth in range(4):
        parents, candidates = [], []
        for beam in live:
            for step in (STEPS[depth], STEPS[-depth] + " Hm.", None)[: 3 - depth // 2]:
                steps = beam.steps + ([step] if step else [])
                more = {"steps": steps, "finished": depth == 3, "row": len(parents)}
                candidates.append(dataclasses.replace(beam, **more))
                parents.append(beam)
        cache, scored = search.score_candidates(prm, cache, parents, candidates, CPU)
        assert scored
        for beam in candidates:
            if beam.steps:
                wanted = read((QUESTION, OTHER)[beam.group], beam.steps)[-1]
                assert close([beam.value], [wanted])
        live = candidates[::-2][:5]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder)
    return load_policy(str(folder), torch.float32), load_tokenizer(str(folder))


def test_tree_search_and_best_of_n(family, policy):
    prm, read = family
    prompts, trace, checked = ["1+2*3", "7-5+2*4-1"], [], 0
    options = {"max_step_tokens": 9, "max_new_tokens": 60, "seed": 3, "trace": trace}
    search.tree_search(*policy, prm, prompts, 2, 2, **options)
    for _, group, candidates, _ in trace:
        for beam in candidates:
            if beam.steps:
                assert close([beam.value], read(prompts[group], beam.steps)[-1:])
                checked += 1
    assert checked > 12
    responses = [[("1+2=3\n\n3*3=9", True), ("", True), ("5", False)], []]
    found, tokens = search.score_responses(prm, prompts, responses, Layout(), CPU)
    assert close(found[0][0], read(prompts[0], ["1+2=3", "3*3=9"]))
    assert close(found[0][2], read(prompts[0], ["5"]))
    assert found[0][1] == [] and found[1] == [] and tokens[0] > 0 == tokens[1]


def openr(question, steps):
    return question + " " + "".join(f"{step} \n\n\n\n\n" for step in steps)


def versa(question, steps):
    return f"{question} \n\n" + "".join(f"{step} \n\n\n\n" for step in steps)


@real
@pytest.mark.parametrize("name, text", [("Math-psa", openr), ("VersaPRM", versa)])
@pytest.mark.parametrize("folder", ["qwen3", "llama3_1"])
def test_texts_with_other_tags(name, text, folder):
    tokenizer = load_tokenizer(os.path.join(PLACE, folder))
    description = fill_in(describe(read_description(name)), tokenizer)
    for question, steps in ROWS:
        ids = prompt_ids(description, tokenizer, [{"role": "user", "content": question}])
        for t, step in enumerate(steps):
            ids += step_ids(description, tokenizer, step, t == 0, t == len(steps) - 1)
        assert ids == tokenizer(text(question, steps))["input_ids"]


@real
def test_every_published_description_can_be_read():
    tokenizer = load_tokenizer(os.path.join(PLACE, "qwen3"))
    with open(os.path.join(ROOT, "parts", "published.json")) as f:
        names = json.load(f)
    for name in names:
        about = read_description("somebody/" + name)
        if about["kind"] == "implicit":
            assert about["beta"] == 0.001 and about["reference"]
            continue
        description = fill_in(describe(about), tokenizer)
        assert description.tag or description.closing.endswith("<|im_end|>")


# --------------------------------------------------------------------------------------------------
# Descriptions of one's own. No real tokenizer is needed from here on.


@pytest.fixture(scope="module")
def orm(tmp_path_factory):
    """A sequence classifier with one label, as an outcome reward model is published, with a context
    of 48 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("orm"), data.builtin_tokenizer()
    config = shape(LlamaConfig, tokenizer, num_labels=1, pad_token_id=0)
    config.max_position_embeddings = 48
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def described(source, folder, about):
    shutil.copytree(source, folder)
    (folder / "reward.json").write_text(json.dumps(about))
    return str(folder)


@torch.no_grad()
def test_a_description_in_the_folder(orm, tmp_path, capsys):
    name = described(orm, tmp_path / "mine", {"like": "outcome-reward-model", "closing": "7{end}"})
    prm = load_reward_model(name, torch.float32)
    (found,) = prm.score_steps(examples_of(prm, [("1+2", ["1+2=3", "3"])]), Processes())
    model = LlamaForSequenceClassification.from_pretrained(orm)
    for value, text in zip(found, ("1+2=3", "1+2=3\n\n3")):
        ids = prm.tokenizer("<user>1+2<assistant>" + text + "7<eos>")["input_ids"]
        assert close([value], model(torch.tensor([ids])).logits[0].sigmoid())
    assert "no reward.json" not in capsys.readouterr().err


def test_a_foreign_classifier_is_said_to_be_read_as_ours(orm, capsys):
    prm = load_reward_model(str(orm), torch.float32)
    assert prm.kind == "value"
    err = capsys.readouterr().err
    assert err.count("no reward.json") == 1 and str(orm) in err


def test_a_pair_of_language_models_names_its_reference(tmp_path):
    for seed, name in enumerate(("policy", "other")):
        save_policy(tmp_path / name, seed)
    about = {"like": "EurusPRM-Stage2", "reference": str(tmp_path / "other")}
    name = described(tmp_path / "policy", tmp_path / "mine", about)
    prm = load_reward_model(name, torch.float32)
    assert (prm.kind, prm.beta, prm.temperature) == ("implicit", 0.001, 1.0)
    other = load_policy(str(tmp_path / "other"), torch.float32)
    mine = prm.reference.state_dict()
    assert all(torch.equal(mine[key], weight) for key, weight in other.state_dict().items())


DAMAGED = [
    {"kind": "tag"},
    {"kind": "tag", "tag": 3},
    {"kind": "tag", "tag": "x", "tga": ""},
    {"kind": "tag", "tag": "x", "good": "+"},
    {"kind": "closing", "prompt": "Q"},
    {"like": "nobody"},
    {"like": ["x"]},
]


@pytest.mark.parametrize("about", DAMAGED)
def test_a_damaged_description(about, orm, tmp_path):
    name = described(orm, tmp_path / "mine", about)
    with pytest.raises(BadInput, match="--prm: .*reward.json is damaged; wanted"):
        load_reward_model(name, torch.float32, option="--prm")


def test_weights_that_a_description_misses(orm, tmp_path):
    about = {"kind": "closing", "chat": True, "weights": "v_head.summary", "hidden": True}
    with pytest.raises(BadInput, match="not in its files, score"):
        load_reward_model(described(orm, tmp_path / "mine", about), torch.float32)


def test_a_context_that_is_too_short(orm, policy, tmp_path):
    name = described(orm, tmp_path / "mine", {"like": "outcome-reward-model"})
    long = ["1+2=3"] * 12
    for prm in (load_reward_model(name, torch.float32), load_reward_model(str(orm), torch.float32)):
        rows = examples_of(prm, [("1+2", long), ("1+2", long[:2])])
        values = prm.score_steps(rows, Processes())
        assert values[0] == [] and len(values[1]) == 2
        trace = []
        options = {"max_step_tokens": 20, "max_new_tokens": 120, "seed": 1, "trace": trace}
        _, count = search.tree_search(*policy, prm, ["1+2", "1+" * 30 + "2"], 2, 2, **options)
        beams = [beam for _, _, candidates, _ in trace for beam in candidates]
        assert count["too_long"] == sum(beam.too_long for beam in beams) > 0
        assert all(beam.too_long for beam in beams if beam.group == 1)
        assert all(beam.value == 0 for beam in beams if beam.too_long)
        assert any(beam.value for beam in beams)


def test_search_counts_what_was_too_long(orm, tmp_path, capsys):
    save_policy(tmp_path / "policy")
    numbers = {"problems": 3, "n": 4, "beam": 2, "expand": (2,), "max_new_tokens": 60}
    names = {"model": str(tmp_path / "policy"), "prm": (str(orm),), "out": str(tmp_path / "out")}
    search.main(search.Config(**numbers, **names), Processes())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["too_long"][orm.name] > 0
    assert "too long for the reward model" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(tmp_path / "out" / "samples.jsonl")]
    assert any(row["values"][orm.name] == [] for row in rows)
    assert any(row["values"][orm.name] for row in rows)


def test_rl_refuses_what_would_be_too_long_or_has_no_numbers_of_tokens(orm, tmp_path):
    name, procs = described(orm, tmp_path / "mine", {"like": "outcome-reward-model"}), Processes()
    cfg = rl.Config(prm=name, max_length=49)
    with pytest.raises(BadInput, match="--max_length 49: the reward model .* at most 48 tokens"):
        rl.load_prm(cfg, None, torch.float32, procs, None, data.builtin_tokenizer())
    cfg = rl.Config(prm=name, max_length=48, credit="token", estimator="reinforce", alpha=0.0)
    with pytest.raises(BadInput, match="values of steps"):
        rl.load_prm(cfg, None, torch.float32, procs, None, data.builtin_tokenizer())
    cfg = rl.Config(prm=name, max_length=48, prm_lr=0.1)
    with pytest.raises(BadInput, match="--prm_lr"):
        rl.load_prm(cfg, None, torch.float32, procs, None, data.builtin_tokenizer())


def test_score_evaluates_any_reward_model(orm, tmp_path, capsys):
    """One JSON line a row on standard output, the measures beside it."""
    problems = data.make_problems(40, "test")
    rows = data.make_trajectories(problems, 1, 4, "hard", 1)
    rows.append(rows[0] | {"completions": ["1+2=3"] * 20, "labels": [1.0] * 20})
    write_rows(tmp_path / "rows.jsonl", rows)
    name = described(orm, tmp_path / "mine", {"like": "outcome-reward-model"})
    cfg = tdrm.Config(score=str(tmp_path / "rows.jsonl"), model=name)
    tdrm.main(cfg, Processes())
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    too_long = [line["values"] is None for line in lines]
    assert len(lines) == 41 and too_long[-1] and sum(too_long) < 30
    assert f"on {41 - sum(too_long)} solutions ({sum(too_long)} too long)" in err
    for measure in ("AUROC of the outcome, last", "calibration", "mean |V_t+1 - V_t|"):
        assert measure in err
