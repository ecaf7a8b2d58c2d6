"""From rows to Examples: many rows at once, dealt out to the processes and kept as bytes, and still
what one row after another gives."""

import functools
import os
import random

import pytest

import data
import qrm_minimal as qrm
import tdrm_minimal as tdrm
from helpers import ranks, write_rows
from parts.formats import BadInput, read_trajectories
from parts.models import Layout, middle_ids
from parts.runs import Processes
from test_tokenizers import REAL_ONES, real, sentencepiece

ALONE = Processes()
STRANGE = [
    "",
    " x",
    "\n",
    "\nx",
    "x \n\n y",
    "a  b",
    "é <eos> ки",
    "<|im_end|>",
    "1" * 40,
    "字\t字",
]


def math_shepherd(n, questions, seed=0):
    """Rows as published, of some questions; steps hardly recur."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        steps = [f"Step 1: {rng.randint(0, 10**9)} hens lay eggs."]
        for k in range(2, rng.randint(3, 6)):
            steps.append(f"Step {k}: {rng.random()} + {k} = <<{k}>>{rng.randint(0, 10**9)} eggs.")
        question = f"How many eggs do {rng.randrange(questions)} hens lay? "
        tagged = "\n".join(f"{step} ки" for step in steps)
        marked = "\n".join(f"{step} {rng.choice('+-')}" for step in steps)
        rows.append({"input": question + tagged, "label": question + marked, "task": "GSM8K"})
    return rows


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("loading") / "rows.jsonl"
    write_rows(path, math_shepherd(700, 60))
    return str(path)


def one_by_one(tokenizer):
    """The encoder that encode_rows calls for each row."""
    return functools.partial(data.encode_trajectory, tokenizer)


# --------------------------------------------------------------------------------------------------
# Ids.


def naive_ids(tokenizer, text):
    """By the library's own call, a text at a time."""
    before = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    if ids[: len(before)] == before:
        return ids[len(before) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", *REAL_ONES])
def test_many_texts_have_the_ids_of_each(name, file):
    made = {"bytes": data.byte_tokenizer, "sentencepiece": sentencepiece}
    tokenizer = made[name]() if name in made else real(name)
    steps = [s for row in read_trajectories(file) for s in row["completions"]]
    texts = STRANGE + steps[:400] + STRANGE
    expected = [naive_ids(tokenizer, text) for text in texts]
    assert middle_ids(tokenizer, texts) == expected
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    padded = tokenizer(["1", "22"], padding=True, truncation=True, max_length=2)
    assert len(padded["input_ids"]) == 2  # leaves the tokenizer padding and cutting
    assert middle_ids(tokenizer, texts) == expected
    assert [middle_ids(tokenizer, [text])[0] for text in STRANGE] == expected[: len(STRANGE)]


def test_parallelism_is_left_as_it_was(monkeypatch):
    for value in ("false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        middle_ids(data.byte_tokenizer(), [str(i) for i in range(300)])
        assert os.environ["TOKENIZERS_PARALLELISM"] == value


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("steps", ["blank", "line"])
def test_many_rows_are_spelled_as_each(eos, steps, file):
    tokenizer, layout = data.byte_tokenizer(), Layout("Q: {question}", "Think.", steps)
    rows = [*read_trajectories(file)][:300] + [{"prompt": "none", "completions": []}]
    spelled = data.Spelling(tokenizer, eos, layout).many(rows)
    for row, (ids, prompt_length, ends) in zip(rows, spelled):
        expected = data.encode_trajectory(tokenizer, row["prompt"], [], layout=layout)[0]
        assert prompt_length == len(expected)
        found = []
        for t, step in enumerate(row["completions"]):
            last = t == len(row["completions"]) - 1
            expected += naive_ids(tokenizer, step + ("" if last else layout.step_end))
            found.append(len(expected) - 1)
        assert ids == expected + [tokenizer.eos_token_id] * eos and ends == found


# --------------------------------------------------------------------------------------------------
# Examples as bytes.


def test_examples_are_a_list():
    rows = data.make_trajectories(data.make_problems(40), 2, 2, "soft")
    examples, left_out = data.encode_rows(rows, one_by_one(data.builtin_tokenizer()), 999)
    made = [*examples]
    assert len(examples) == len(made) == 80 and left_out == 0
    assert [len(e) for e in made] == examples.lengths.tolist()
    assert examples[7] == made[7] and examples[-1] == made[-1] and [*examples[3:9]] == made[3:9]
    assert [*examples.take([5, 2])] == [made[5], made[2]]
    for e, known, row in zip(made, examples.known(), rows):
        assert type(e.input_ids) is list and e.completions == row["completions"]
        for name in ("prompt", "labels", "correct", "first_error", "answer", "step_ends"):
            assert getattr(known, name) == getattr(e, name)
    made[0].input_ids.append(1)  # what was handed out is the caller's
    assert len(examples[0]) == examples.lengths[0]


def test_bytes_of_a_row(file):
    """Little more than the text once, and four bytes a token."""
    rows = [*read_trajectories(file)]
    examples = data.encode_all(rows, data.Spelling(data.byte_tokenizer()), ALONE)
    for packed, length, row in zip(examples.packed, examples.lengths, rows):
        text = len("".join([row["prompt"], *row["completions"], row["source"]]))
        assert len(packed) < text + 4 * length + 30 * len(row["completions"]) + 100


def test_held_out_examples_are_those_of_held_out_rows(file):
    rows, encode = [*read_trajectories(file)], data.Spelling(data.byte_tokenizer())
    parts = data.hold_out(data.encode_all(iter(rows), encode, ALONE))
    for examples, expected in zip(parts, data.hold_out(rows)):
        assert [e.source for e in examples] == [row["source"] for row in expected]


def test_loaded_as_row_by_row(file):
    """Held out first and encoded then, one row after another: the same, with those left out."""
    tokenizer, lengths = data.byte_tokenizer(), []
    cfg = tdrm.Config(data=(file,), max_length=240)
    examples, held_out, labelled, left_out = tdrm.load_data(cfg, None, tokenizer, ALONE)
    expected, dropped = [], 0
    for part in data.hold_out([*read_trajectories(file)]):
        rows = [(row, one_by_one(tokenizer)(row["prompt"], row["completions"])) for row in part]
        lengths += [len(spelled[0]) for _, spelled in rows]
        fit = [(row["source"], *spelled) for row, spelled in rows if len(spelled[0]) <= 240]
        expected.append(fit)
        dropped += len(rows) - len(fit)
    for part, rows in zip((examples, held_out), expected):
        places = [(e.source, e.input_ids, e.prompt_length, e.step_ends) for e in part]
        assert places == rows
    assert labelled and left_out == dropped > 50 and min(lengths) < 200


def test_pairs():
    encode, pairs = data.Spelling(data.byte_tokenizer(), eos=True), []
    for i in range(300):
        chosen = [f"{i} eggs", "x" * (i % 7)][: 1 + i % 3]
        pairs.append({"prompt": f"{i % 30}?", "chosen": chosen, "rejected": [f"{i % 5} eggs"]})
    kept, left_out = qrm.encode_pairs(pairs, encode, 18)
    expected = []
    for pair in pairs:
        sides = [encode(pair["prompt"], pair[side])[0] for side in ("chosen", "rejected")]
        if max(map(len, sides)) <= 18 and sides[0] != sides[1]:
            expected.append(sides)
    assert [[p.chosen.input_ids, p.rejected.input_ids] for p in kept] == expected
    assert [len(p) for p in kept] == kept.lengths.tolist()
    assert len(kept) + left_out == 300 and 50 < left_out < 250


# --------------------------------------------------------------------------------------------------
# Several processes.


def load(procs, file, out):
    cfg = tdrm.Config(data=(file,), max_length=240)
    try:
        parts = tdrm.load_data(cfg, None, refusing(data.byte_tokenizer()), procs)
        text = repr([*map(list, parts[:2]), *parts[2:]])
    except BadInput as error:
        text = f"BadInput: {error}"
    with open(f"{out}.{procs.rank}", "w") as f:
        f.write(text)


def refusing(tokenizer):
    """A template that refuses questions with a word in them."""
    refuse = "{{ raise_exception('no ' + 'cocks') if 'cock' in m.content else '' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", f"{refuse}#")
    tokenizer.chat_template = tokenizer.chat_template.replace("#", "{{ m.content }}")
    return tokenizer


@pytest.mark.parametrize("bad", [[], [3], [700], [258, 699], [650, 655]])
def test_all_processes_load_the_same(bad, file, tmp_path):
    """... and say the same, of the same row, where one cannot be encoded."""
    with open(file) as f:
        lines = f.readlines()
    for number in bad:
        lines[number - 1] = lines[number - 1].replace("hens lay?", "cocks lay?")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(lines))
    load(ALONE, str(path), tmp_path / "alone")
    expected = (tmp_path / "alone.0").read_text()
    assert ranks(2, tmp_path, load, str(path), str(tmp_path / "two")) == [0, 0]
    for rank in range(2):
        assert (tmp_path / f"two.{rank}").read_text() == expected
    assert ("BadInput" in expected) == bool(bad)
    if bad:
        assert f"{path}:{bad[0]}: the chat template refuses" in expected


@pytest.mark.parametrize("count", [1, 2, 3, 513])
def test_fewer_rows_than_processes(count, tmp_path):
    rows = data.make_trajectories(data.make_problems(count))
    assert ranks(3, tmp_path, encode, count, str(tmp_path / "found")) == [0, 0, 0]
    expected = repr([*data.encode_all(rows, data.Spelling(data.builtin_tokenizer()), ALONE)])
    for rank in range(3):
        assert (tmp_path / f"found.{rank}").read_text() == expected


def encode(procs, count, out):
    rows = data.make_trajectories(data.make_problems(count))
    examples = data.encode_all(rows, data.Spelling(data.builtin_tokenizer()), procs)
    with open(f"{out}.{procs.rank}", "w") as f:
        f.write(repr([*examples]))
