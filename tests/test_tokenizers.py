"""How text becomes token ids, and where a response ends, with tokenizers and chat templates as
people bring them.

Real ones are looked for in the folder that TOKENIZERS_DIR names (Qwen3, Llama 3.1, Llama 2, Gemma
3, DeepSeek-V3), GSM8K's solutions in the one that GSM8K_DIR names; tests skip where those are not
set.
"""

import datetime
import functools
import json
import os

import pytest
import torch
import transformers
from transformers.utils import chat_template_utils

import data
import prime_minimal as prime
import qrm_minimal as qrm
import rl_minimal as rl
import search_minimal as search
import sft_minimal as sft
import tdrm_minimal as tdrm
from helpers import numbers, write_rows
from parts.decoding import sample
from parts.formats import BadInput, split_steps
from parts.models import Layout, closing_id, encode_prompt, end_ids, load_policy, load_tokenizer
from parts.models import save_model, token_ids
from parts.rewards import new_reward_model
from parts.runs import Processes
from parts.training import Policy

CPU = torch.device("cpu")
FOLDER = os.environ.get("TOKENIZERS_DIR", "")
GSM8K = os.path.join(os.environ.get("GSM8K_DIR", ""), "example_model_solutions.jsonl")
needs_tokenizers = pytest.mark.skipif(
    not os.path.isdir(FOLDER), reason="TOKENIZERS_DIR: no folder of real tokenizers"
)
needs_gsm8k = pytest.mark.skipif(
    not os.path.exists(GSM8K), reason="GSM8K_DIR: no example_model_solutions.jsonl"
)
REAL = ("qwen3", "llama3_1", "gemma3", "deepseek_v3", "llama2")
REAL_ONES = [pytest.param(name, marks=needs_tokenizers) for name in REAL]


@functools.cache
def real(name):
    return load_tokenizer(os.path.join(FOLDER, name))


@functools.cache
def gsm8k_solutions():
    with open(GSM8K) as f:
        rows = [json.loads(line) for line in f]
    answers = [answer for row in rows for answer in row.values() if isinstance(answer, dict)]
    return [answer["solution"] for answer in answers]


@functools.cache
def sentencepiece():
    """A tokenizer that puts a space in front of whatever it is given, as SentencePiece does;
    trained on lines, as that is."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(space)
    decoded = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(decoded)
    texts = gsm8k_solutions() if os.path.exists(GSM8K) else ["She has 12 + 30 = 42 eggs."]
    lines = {line for text in texts[:400] for line in text.split("\n")}
    alphabet = sorted({"\n", *map(chr, range(32, 127))})
    options = {"initial_alphabet": alphabet, "special_tokens": ["<unk>", "</s>"]}
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, **options)
    tokenizer.train_from_iterator((word for x in lines for word in x.split()), trainer)
    fast = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


# --------------------------------------------------------------------------------------------------
# Steps, tokenised one by one, are the text.


def as_steps(tokenizer, lines):
    """Ids of lines as a response has them, and how many each line has."""
    closed = [line + "\n" for line in lines[:-1]] + lines[-1:]
    return [token_ids(tokenizer, line) for line in closed]


@needs_gsm8k
@pytest.mark.parametrize("name", ["sentencepiece", *REAL_ONES])
def test_steps_have_the_ids_of_the_whole_text(name):
    """All solutions; the naive reader tokenises question and solution in one piece."""
    tokenizer = sentencepiece() if name == "sentencepiece" else real(name)
    solutions = [split_steps(text, "\n") for text in gsm8k_solutions()]
    solutions = [lines for lines in solutions if lines]
    assert len(solutions) > 5270
    question = "How many?\n\n"
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "How many?"}]
        options = {"tokenize": False, "add_generation_prompt": True}
        question = tokenizer.apply_chat_template(chat, **options)
    texts = [question + "\n".join(lines) for lines in solutions]
    special = not tokenizer.chat_template
    whole = tokenizer(texts, add_special_tokens=special)["input_ids"]
    prompt = encode_prompt(tokenizer, "How many?")
    for lines, ids in zip(solutions, whole):
        steps = as_steps(tokenizer, lines)
        assert prompt + [i for step in steps for i in step] == ids, lines
    for lines in solutions[:300]:  # blank lines between steps
        closed = [line + "\n\n" for line in lines[:-1]] + lines[-1:]
        ids = tokenizer(question + "".join(closed), add_special_tokens=special)["input_ids"]
        assert prompt + [i for step in closed for i in token_ids(tokenizer, step)] == ids
    for lines, ids in zip(solutions[:50], whole):
        layout = Layout(steps="line")
        got, length, ends = data.encode_trajectory(tokenizer, "How many?", lines, layout=layout)
        assert (got, length) == (ids, len(prompt))
        assert ends[-1] == len(ids) - 1
        assert all(tokenizer.decode(ids[end]).endswith("\n") for end in ends[:-1])


@needs_gsm8k
def test_hardly_anything_is_stripped():
    texts = gsm8k_solutions()
    same = sum("\n".join(split_steps(text, "\n")) == text for text in texts)
    assert len(texts) == 5276 and same > 5000, same


# --------------------------------------------------------------------------------------------------
# The end of a response. A policy without layers' help: after each byte one other is certain.


def spelled_out(chain, ends=None):
    """A model of byte_tokenizer's vocabulary that goes from each token of a chain to the next, from
    the last one to itself; `ends`: what its generation config names."""
    tokenizer = data.byte_tokenizer()
    size, count = 288, len(tokenizer)
    config = transformers.Qwen2Config(
        vocab_size=count,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model, ids = transformers.Qwen2ForCausalLM(config), tokenizer.convert_tokens_to_ids(chain)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(count, size))
        model.lm_head.weight.zero_()
        for before, after in zip(ids, [*ids[1:], ids[-1]]):
            model.lm_head.weight[after, before] = 3.0  # a logit of 51 against 0
    model.generation_config.eos_token_id = ends
    return model.eval(), tokenizer


USER, EOS = 3, 1  # of data.SPECIAL
CHAIN = ["<assistant>", "A", ":", "7", "<user>", "8"]  # "A:7", its end, then "888..." for ever


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory):
    """Its turn ends in <user>, which only its generation config says, as GLM-4's does."""
    folder = str(tmp_path_factory.mktemp("two") / "ends")
    model, tokenizer = spelled_out(CHAIN, [EOS, USER])
    save_model(folder, model, tokenizer)
    return folder


def test_the_second_end_of_a_generation_config_ends_a_response(two_ends):
    model, tokenizer = load_policy(two_ends, torch.float32), load_tokenizer(two_ends)
    assert end_ids(tokenizer, model.generation_config) == [EOS, USER]
    for temperature in (0.0, 1.0):
        for each in sample(model, tokenizer, ["3+4", "7"], 2, temperature, 16):
            assert [(s.text, s.finished, s.token_ids[-1]) for s in each] == [
                ("A:7", True, USER)
            ] * 2
    model.generation_config.eos_token_id = EOS  # as it was: it writes on
    ((other,),) = sample(model, tokenizer, ["3+4"], 1, 1.0, 16)
    assert not other.finished and other.text.startswith("A:788")


def test_the_second_end_in_tree_search(two_ends):
    model, tokenizer = load_policy(two_ends, torch.float32), load_tokenizer(two_ends)
    prm = new_reward_model(two_ends, tokenizer, torch.float32).eval()
    best, _ = search.tree_search(model, tokenizer, prm, ["3+4", "7"], 2, 2, max_new_tokens=16)
    assert [(beam.steps, beam.finished) for beam in best] == [(["A:7"], True)] * 2


def test_the_second_end_in_training(two_ends):
    model, tokenizer = load_policy(two_ends, torch.float32), load_tokenizer(two_ends)
    policy, procs = Policy(model, tokenizer), Processes()
    rows = [{"prompt": "3+4", "answer": "7"}, {"prompt": "2+5", "answer": "7"}]
    cfg = sft.Config(model=two_ends, max_new_tokens=16)
    worked = [row | {"completions": ["7"]} for row in rows]
    examples, _ = data.encode_rows(worked, sft.spelling(tokenizer), 64)
    assert sft.pass_at_1(policy, examples, cfg, procs) == 1
    problems = [{"question": row["prompt"], "answer": "7"} for row in rows]
    cfg = rl.Config(model=two_ends, max_new_tokens=16, group_size=2)
    assert rl.evaluate(policy, problems, cfg, procs) == {"pass@1": 1, "greedy": 1}
    rollouts = rl.roll_out(policy, problems, 0, cfg, procs)
    assert all(r.finished and r.correct == 1 and r.text == "A:7" for r in rollouts)
    assert [len(r.old_logprobs) for r in rollouts] == [4] * 4  # the end is the policy's own token


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    closing_id.cache_clear()
    return tokenizer


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
TURNS += "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
TURNS += "{% if add_generation_prompt %}[assistant]{% endif %}"


def test_a_base_model_closes_turns_as_its_template_does(tmp_path):
    """A base Qwen2.5-Math: its own end of text is not what its template puts behind a turn."""
    model, tokenizer = spelled_out(["<assistant>", "7", "<eos>", "8"], ends=None)
    tokenizer.eos_token = "<unk>"
    save_model(str(tmp_path / "base"), model, tokenizer)
    model = load_policy(str(tmp_path / "base"), torch.float32)
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    assert tokenizer.eos_token == "<unk>" and closing_id(tokenizer) == EOS
    assert end_ids(tokenizer, model.generation_config) == [EOS, tokenizer.eos_token_id]
    ids, *_ = sft.spelling(tokenizer)("3+4", ["7"])
    assert ids[-2:] == [tokenizer.convert_tokens_to_ids("7"), EOS]
    ((one,),) = sample(model, tokenizer, ["3+4"], 1, 1.0, 16)
    assert (one.text, one.finished) == ("7", True)


ENDS = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "llama2": "</s>",
}


@pytest.mark.parametrize("name", REAL_ONES)
def test_turns_of_real_tokenizers_end(name):
    tokenizer = real(name)
    assert tokenizer.convert_ids_to_tokens(closing_id(tokenizer)) == ENDS[name]
    named = transformers.GenerationConfig(eos_token_id=[7, 9])
    assert set(end_ids(tokenizer, named)) == {7, 9, closing_id(tokenizer), tokenizer.eos_token_id}
    ids = encode_prompt(tokenizer, "How many?")
    assert ids[-1] not in end_ids(tokenizer)  # the question is open
    assert tokenizer.decode(ids).count("How many?") == 1
    assert ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)


def test_a_bare_prompt_does_not_end():
    """Some tokenizers append their end of text to whatever they are given."""
    from tokenizers import processors

    tokenizer = data.byte_tokenizer()
    tokenizer.chat_template = None
    behind = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", EOS)])
    tokenizer.backend_tokenizer.post_processor = behind
    assert tokenizer("1+2")["input_ids"][-1] == EOS
    assert tokenizer.decode(encode_prompt(tokenizer, "1+2")) == "1+2\n\n"
    assert tokenizer.decode(token_ids(tokenizer, "3")) == "3"


@needs_tokenizers
def test_the_base_models_of_qwen_and_llama():
    for name, end_of_text in (("qwen3", "<|endoftext|>"), ("llama3_1", "<|end_of_text|>")):
        tokenizer = load_tokenizer(os.path.join(FOLDER, name))  # one of its own: it is changed
        tokenizer.eos_token = end_of_text
        ends = tokenizer.convert_ids_to_tokens(end_ids(tokenizer))
        assert sorted(ends) == sorted([ENDS[name], end_of_text])
        assert tokenizer.convert_ids_to_tokens(closing_id(tokenizer)) == ENDS[name]


# --------------------------------------------------------------------------------------------------
# Templates that refuse, and templates that look at the calendar.

STRICT = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
STRICT += "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
STRICT += "{{ m.role }}: {{ m.content }}\n{% endfor %}"
RIGHT = {"completions": ["1+2=3", "A:3"], "correct": True}
WRONG = {"completions": ["1+2=4", "A:4"], "correct": False}
TWO_USERS = [{"role": "user", "content": "1+2"}, {"role": "user", "content": "3+4"}]


def save_random(folder, template, **more):
    tokenizer = with_template(data.byte_tokenizer(), template)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **more,
    )
    save_model(folder, transformers.Qwen2ForCausalLM(config), tokenizer)
    return folder


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A model folder with a template that refuses two users in a row and system turns, and files
    whose third line has those."""
    home = tmp_path_factory.mktemp("strict")
    save_random(str(home / "model"), STRICT)
    prompts = ["1+1", "2+2", TWO_USERS, "5+5"]
    problems = [{"question": p, "answer": "3"} for p in prompts]
    write_rows(home / "problems.jsonl", problems)
    steps = {"completions": ["1+2", "A:3"], "correct": True}
    write_rows(home / "rows.jsonl", [{"prompt": p, "answer": "3"} | steps for p in prompts])
    pairs = {"chosen": "A:3", "rejected": "A:4"}
    write_rows(home / "pairs.jsonl", [{"prompt": p} | pairs for p in prompts])
    both = [{"prompt": p} | side for side in (RIGHT, WRONG) for p in prompts]
    write_rows(home / "both.jsonl", both)
    return home


SHORT = {"max_length": 256}
REFUSING = [
    (search, "problems.jsonl", {"prm": ("none",), "max_new_tokens": 4}),
    (rl, "problems.jsonl", SHORT | {"alpha": 1.0, "max_new_tokens": 4}),
    (prime, "problems.jsonl", SHORT | {"max_new_tokens": 4}),
    (sft, "rows.jsonl", SHORT | {"max_new_tokens": 4}),
    (tdrm, "rows.jsonl", SHORT),
    (search, "rows.jsonl", {"label_rollouts": 2, "max_new_tokens": 4}),
    (qrm, "pairs.jsonl", SHORT),
    (qrm, "both.jsonl", SHORT | {"method": "DPO-RM"}),
    (qrm, "problems.jsonl", SHORT | {"max_new_tokens": 4}),
]


def name_of(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("script, file, more", REFUSING, ids=name_of)
def test_a_template_that_refuses_a_row_is_one_line(script, file, more, strict, tmp_path):
    path = str(strict / file)
    files = {"model": str(strict / "model"), "data": (path,), "out": str(tmp_path / "run")}
    with pytest.raises(BadInput) as error:
        script.main(script.Config(**files, **more), Processes())
    line = str(error.value)
    assert line.startswith((f"{path}:3: ", f"{path}:7: ")) and "\n" not in line
    assert "user, user" in line and "roles must alternate" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # sft holds this question out


@pytest.mark.parametrize("script", [search, rl], ids=name_of)
def test_a_reward_model_that_refuses_is_one_line_before_sampling(script, strict, tmp_path):
    """Where the policy's own template takes the question."""
    save_random(str(tmp_path / "policy"), TURNS)
    tokenizer = load_tokenizer(str(strict / "model"))
    prm = str(tmp_path / "prm")
    new_reward_model(str(strict / "model"), tokenizer, torch.float32).save(prm)
    path = str(strict / "problems.jsonl")
    options = {"model": str(tmp_path / "policy"), "data": (path,), "max_new_tokens": 4}
    options["out"] = str(tmp_path / "run")
    if script is search:
        options |= {"prm": (prm,), "n": 2}
    else:
        options |= SHORT | {"prm": prm, "eval": (path,), "steps": 1, "prompts_per_step": 4}
    with pytest.raises(BadInput, match=r"problems\.jsonl:3: the chat template refuses"):
        script.main(script.Config(**options), Processes())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_template_that_refuses_a_system_turn_is_one_line(strict, tmp_path):
    path = str(strict / "problems.jsonl")
    files = {"model": str(strict / "model"), "data": (path,), "out": str(tmp_path / "run")}
    cfg = search.Config(**files, prm=("none",), system="Be brief.")
    with pytest.raises(BadInput, match=r"problems\.jsonl:1: .*system, user.*must alternate"):
        search.main(cfg, Processes())


@needs_tokenizers
def test_gemma_refuses_two_users():
    with pytest.raises(BadInput, match="the chat template refuses the turns user, user: Conv"):
        encode_prompt(real("gemma3"), TWO_USERS)


DATED = "Today: {{ strftime_now('%d %b %Y') }}. " + TURNS


def on(monkeypatch, year):
    """The library's own clock, which templates see, says another day."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 2, 3, 4, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_a_template_with_a_date_says_the_same_every_day(monkeypatch):
    tokenizer, found, theirs = with_template(data.byte_tokenizer(), DATED), [], []
    for year in (2025, 2031):
        on(monkeypatch, year)
        found.append(encode_prompt(tokenizer, "1+2"))
        theirs.append(tokenizer.apply_chat_template([{"role": "user", "content": "1+2"}]))
    assert found[0] == found[1] and theirs[0] != theirs[1]
    assert tokenizer.decode(found[0]) == "Today: 26 Jul 2024. [user]1+2[assistant]"


def test_equal_runs_on_different_days_write_equal_files(tmp_path, monkeypatch):
    save_random(str(tmp_path / "model"), DATED)
    rows = [{"prompt": f"{i}+2"} | side for i in range(8) for side in (RIGHT, WRONG)]
    write_rows(tmp_path / "rows.jsonl", rows)
    problems = [{"question": f"{i}+2", "answer": "3"} for i in range(6)]
    write_rows(tmp_path / "problems.jsonl", problems)
    for year in (2025, 2031):
        on(monkeypatch, year)
        home = tmp_path / str(year)
        home.mkdir()
        monkeypatch.chdir(home)
        files = {"model": "../model", "data": ("../rows.jsonl",), "out": "tdrm"}
        tdrm.main(tdrm.Config(**files, **SHORT, steps=2, batch_size=4), Processes())
        files = {"model": "../model", "data": ("../problems.jsonl",), "max_new_tokens": 4}
        trees = {"n": 2, "expand": (2,), "beam": 2, "out": "search"}
        search.main(search.Config(**files, **trees, prm=("tdrm/model",)), Processes())
        sizes = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "out": "rl"}
        rl.main(rl.Config(**files, **SHORT, **sizes, prm="tdrm/model"), Processes())
    assert_equal_files(tmp_path / "2025", tmp_path / "2031")


def without_clock(path):
    """What a file holds, but for the seconds that things took."""
    if path.name == "metrics.jsonl":
        return numbers(path.parent)
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines()
        return [line for line in lines if '"seconds"' not in line]
    return path.read_bytes()


def assert_equal_files(home, other):
    paths = sorted(path.relative_to(home) for path in home.rglob("*") if path.is_file())
    assert paths == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert len(paths) > 20
    for path in paths:
        assert without_clock(home / path) == without_clock(other / path), path


# --------------------------------------------------------------------------------------------------
# --prompt, --system, --step_end: what a model is really given.

ASK = {"prompt": "Solve {question} now.", "system": "Be brief."}
ASKED = "[system]Be brief.[user]Solve 1+2 now.[assistant]"
PLAIN = "[user]1+2[assistant]"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A policy of bytes that writes what comes; one question in files of every kind."""
    home = tmp_path_factory.mktemp("files")
    save_random(str(home / "model"), TURNS)
    write_rows(home / "problems.jsonl", [{"question": "1+2", "answer": "3"}] * 4)
    questions = ("1+2", "4+5")  # the hold-out cuts by question
    rows = [{"prompt": q, "answer": "3"} | side for q in questions for side in (RIGHT, WRONG)]
    write_rows(home / "rows.jsonl", rows)
    return home


@pytest.fixture
def seen(monkeypatch):
    """The questions, as text, that any model has read since: what stands before the response in the
    rows that go through an embedding."""
    forward, found = torch.nn.Embedding.forward, set()
    tokenizer = data.byte_tokenizer()

    def reading(embedding, ids):
        for text in tokenizer.batch_decode(ids.tolist()):
            question, mark, _ = text.partition("[assistant]")
            if mark:
                found.add(question.replace("<pad>", "").replace("4+5", "1+2") + mark)
        return forward(embedding, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", reading)
    return found


SAMPLES = {"data": ("problems.jsonl",), "max_new_tokens": 3}
TRAINS = {"max_length": 256, "steps": 1}
TRAJECTORIES = TRAINS | {"data": ("rows.jsonl",), "batch_size": 2}
ON_POLICY = TRAINS | SAMPLES | {"eval": ("problems.jsonl",), "group_size": 2, "prompts_per_step": 2}
ASKING = [
    (sft, TRAJECTORIES | {"max_new_tokens": 3}),
    (tdrm, TRAJECTORIES),
    (search, SAMPLES | {"prm": ("none",), "n": 2}),
    (search, {"data": ("rows.jsonl",), "label_rollouts": 2, "max_new_tokens": 3}),
    (rl, ON_POLICY | {"alpha": 1.0, "kl_coef": 0.1}),
    (prime, ON_POLICY | {"accuracy": (0.0, 1.0)}),
    (qrm, TRAJECTORIES | {"max_new_tokens": 3}),
    (qrm, TRAJECTORIES | {"max_new_tokens": 3, "method": "DPO-RM"}),
]


@pytest.mark.parametrize("script, options", ASKING, ids=name_of)
def test_what_a_model_is_asked(script, options, files, seen, tmp_path, monkeypatch):
    """By every model of a chapter, in samples, training and evaluation; without the options, the
    bare question."""
    monkeypatch.chdir(files)
    options = {"model": "model"} | options
    script.main(script.Config(**options, **ASK, out=str(tmp_path / "asked")), Processes())
    assert seen == {ASKED}
    saved = json.loads((tmp_path / "asked" / "config.json").read_text())
    assert {name: saved[name] for name in ASK} == ASK
    seen.clear()
    script.main(script.Config(**options, out=str(tmp_path / "plain")), Processes())
    assert seen == {PLAIN}


def test_each_model_is_asked_in_its_own_way(files, seen, tmp_path, monkeypatch):
    """A reward model's question is the one it was trained on, whatever the policy's."""
    monkeypatch.chdir(files)
    prm = {"prompt": "Rate {question}:"}
    out = str(tmp_path / "prm")
    tdrm.main(tdrm.Config(model="model", **TRAJECTORIES, **prm, out=out), Processes())
    rated = "[user]Rate 1+2:[assistant]"
    assert seen == {rated}
    seen.clear()
    tdrm.main(tdrm.Config(model=out + "/model", score="rows.jsonl"), Processes())
    assert seen == {rated}
    both = {"model": "model", "out": str(tmp_path / "run")} | ASK
    seen.clear()
    trees = {"prm": (out + "/model",), "n": 2, "beam": 2, "expand": (2,), "max_step_tokens": 3}
    search.main(search.Config(**both, **SAMPLES, **trees), Processes())
    assert seen == {rated, ASKED}
    seen.clear()
    both["out"] = str(tmp_path / "rl")
    rl.main(rl.Config(**both, **ON_POLICY, prm=out + "/model"), Processes())
    assert seen == {rated, ASKED}


def test_the_pair_of_prime_knows_how_it_was_asked(files, seen, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    out = str(tmp_path / "run")
    options = ON_POLICY | ASK | {"accuracy": (0.0, 1.0), "step_end": "line"}
    prime.main(prime.Config(model="model", **options, out=out), Processes())
    seen.clear()
    tdrm.main(tdrm.Config(model=out + "/prm", score="rows.jsonl"), Processes())
    assert seen == {ASKED}


def test_a_prompt_without_a_question_is_refused(files, tmp_path):
    with pytest.raises(BadInput, match="--prompt Solve: wanted a text with {question} in it"):
        options = {"model": str(files / "model"), "data": (str(files / "problems.jsonl"),)}
        out = str(tmp_path / "run")
        search.main(search.Config(**options, prompt="Solve", prm=("none",), out=out), Processes())


# A policy that writes "1", a line's end, "A:3" and its end; a blank line never.
LINES = ["<assistant>", "1", "Ċ", "A", ":", "3", "<eos>"]


@pytest.mark.parametrize("steps, wanted", [("line", ["1", "A:3"]), ("blank", ["1\nA:3"])])
def test_steps_are_lines_or_blank_lines(steps, wanted, tmp_path, capsys):
    model, tokenizer = spelled_out(LINES, EOS)
    save_model(str(tmp_path / "policy"), model, tokenizer)
    rows = [{"prompt": f"{i}+2", "response": "1\nA:3", "correct": i % 2 == 0} for i in range(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "problems.jsonl", [{"question": "1+2", "answer": "3"}])
    files = {"model": str(tmp_path / "policy"), "step_end": steps}
    more = {"data": (str(tmp_path / "rows.jsonl"),), "out": str(tmp_path / "prm")}
    tdrm.main(tdrm.Config(**files, **more, **TRAINS), Processes())
    saved = str(tmp_path / "prm" / "model")
    if steps == "line":  # of a blank line there is nothing to say
        about = json.loads((tmp_path / "prm" / "model" / "reward.json").read_text())
        assert about["layout"]["steps"] == steps
    more = {"data": (str(tmp_path / "problems.jsonl"),), "out": str(tmp_path / "search")}
    trees = {"prm": (saved,), "n": 2, "beam": 2, "expand": (2,), "show": True}
    capsys.readouterr()
    search.main(search.Config(**files, **more, **trees, max_new_tokens=12), Processes())
    shown = capsys.readouterr().out
    assert ("depth 2" in shown) == (steps == "line")
    with open(tmp_path / "search" / "samples.jsonl") as f:
        found = [json.loads(line) for line in f]
    assert [row["completions"] for row in found] == [wanted] * 2
    assert [len(row["values"]["prm"]) for row in found] == [len(wanted)] * 2
    policy = Policy(model, tokenizer, Layout(steps=steps))
    cfg = rl.Config(model=str(tmp_path / "policy"), group_size=2, max_new_tokens=12)
    rollouts = rl.roll_out(policy, [{"question": "1+2", "answer": "3"}], 0, cfg, Processes())
    assert [r.completions for r in rollouts] == [wanted] * 2


def test_a_trained_folder_reads_lines_without_being_told(tmp_path, capsys):
    """--score by a model that was trained on lines."""
    save_random(str(tmp_path / "model"), TURNS)
    rows = [{"prompt": f"{i}", "response": "1\n2\nA:3", "correct": i % 2 == 0} for i in range(4)]
    path, out = tmp_path / "rows.jsonl", tmp_path / "prm"
    write_rows(path, rows)
    files = {"model": str(tmp_path / "model"), "data": (str(path),), "out": str(out)}
    tdrm.main(tdrm.Config(**files, **TRAINS, step_end="line"), Processes())
    capsys.readouterr()
    tdrm.main(tdrm.Config(model=str(out / "model"), score=str(path)), Processes())
    lines = capsys.readouterr().out.splitlines()
    values = [json.loads(line)["values"] for line in lines if line.startswith('{"source"')]
    assert [len(row) for row in values] == [3] * 4
