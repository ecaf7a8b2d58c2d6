"""Preference pairs for qrm_minimal.py: {"prompt", "chosen", "rejected"}, from files, out of trajectories, or sampled.

Right x wrong responses to a question make its pairs (make_pairs); where nobody has answered the questions yet, the policy
does and is verified (sample_pairs). No question is both trained on and held out (load_data).
"""
import dataclasses
import zlib

import numpy as np

import data
import rl_minimal as rl
from data import BadInput


def make_pairs(rows, most, seed=0):
    """Right x wrong responses to the same question, at most `most` for each, out of trajectory rows with "correct". Equal
    responses count once. Which pairs are taken depends on the seed and the question alone."""
    questions, pairs = {}, []
    for row in rows:
        if row["correct"] is None:
            raise BadInput(f"{row['source']}: whether it is right is not known; wanted 'correct', 'answer' or 'labels'")
        sides = questions.setdefault(str(row["prompt"]), ({}, {}))
        sides[row["correct"]].setdefault(tuple(row["completions"]), row)
    for question, (wrong, right) in questions.items():
        rng = np.random.default_rng([seed, zlib.crc32(question.encode())])
        wrong, right = list(wrong.values()), list(right.values())
        for i in rng.permutation(len(right) * len(wrong))[:most].tolist():
            w, l = right[i // len(wrong)], wrong[i % len(wrong)]  # noqa: E741
            pairs.append({"prompt": w["prompt"], "chosen": w["completions"], "rejected": l["completions"]})
    return pairs


def sample_pairs(problems, first_key, cfg, env, tokenizer):
    """Pairs of verified samples of the policy. A response cut at --max_new_tokens has no end to score, and is left out."""
    if not problems:
        return []
    model = rl.load_causal_lm(cfg.model, cfg, env).to(env.device)
    keys = range(first_key, first_key + len(problems))
    rows = rl.rollout(model, tokenizer, problems, keys, dataclasses.replace(cfg, group_size=cfg.samples), env)
    return make_pairs([row for row in rows if row["finished"]], cfg.pairs_per_question, cfg.seed)


def read_files(paths, cfg, env, tokenizer):
    """Files of pairs, of trajectories or of problems -> pairs, and the trajectories that know their first wrong step."""
    rows = {"pairs": [], "trajectories": [], "problems": []}
    for path in paths:
        kind = data.recognise(path)[0]
        read = {"pairs": data.read_pairs, "trajectories": data.read_trajectories, "problems": data.read_problems}[kind]
        rows[kind] += read(path)
    pairs = [row | {side: data.split_steps(row[side]) for side in ("chosen", "rejected")} for row in rows["pairs"]]
    pairs += make_pairs(rows["trajectories"], cfg.pairs_per_question, cfg.seed)
    pairs += sample_pairs(rows["problems"][:cfg.problems or None], 0, cfg, env, tokenizer)
    if not pairs:
        raise BadInput(f"{' '.join(paths)}: no question there has both a right and a wrong response")
    return pairs, [row for row in rows["trajectories"] if row["first_error"] is not None]


def encode_pairs(pairs, tokenizer, max_length):
    """-> pairs of examples that fit, number dropped: of two equal responses (nothing to learn), or too long."""
    encode = lambda prompt, steps: dict(zip(  # noqa: E731
        ("input_ids", "prompt_length", "step_ends"), data.encode_trajectory(tokenizer, prompt, steps, eos=True)))
    kept, longest = [], 0
    for pair in pairs:
        chosen, rejected = ({"prompt": pair["prompt"], "completions": steps} | encode(pair["prompt"], steps)
                            for steps in (pair["chosen"], pair["rejected"]))
        length = max(len(chosen["input_ids"]), len(rejected["input_ids"]))
        longest = max(longest, length)
        if length <= max_length and chosen["input_ids"] != rejected["input_ids"]:
            both = chosen["input_ids"] + rejected["input_ids"]  # what a pair costs, for the order
            kept.append({"prompt": pair["prompt"], "chosen": chosen, "rejected": rejected, "input_ids": both})
    if not kept:
        raise BadInput(f"--max_length {max_length}: none of the {len(pairs)} pairs fits (the longest: {longest} tokens) "
                       "and is of two different responses")
    return kept, len(pairs) - len(kept)


def load_data(cfg, level, tokenizer, env):
    """-> training pairs, held-out pairs, held-out trajectories that know their first wrong step, number of pairs dropped."""
    trajectories, held_out = [], None
    if level:
        trajectories = data.make_trajectories(data.make_problems(cfg.eval_problems, "test", 0, level), 2, seed=1, level=level)
    if level and not cfg.pairs_from:
        pairs = sample_pairs(data.make_problems(cfg.problems or 12_000, "train", cfg.seed, level), 0, cfg, env, tokenizer)
        held_out = sample_pairs(data.make_problems(cfg.eval_problems, "test", 0, level), 10**6, cfg, env, tokenizer)
        if not pairs or not held_out:
            raise BadInput(f"--problems {cfg.problems or 12_000} --eval_problems {cfg.eval_problems}: the policy got none of the "
                           "questions both right and wrong; no pairs")
    else:
        pairs, _ = read_files([*(() if level else cfg.data), *cfg.pairs_from], cfg, env, tokenizer)
    if cfg.eval:
        held_out, trajectories = read_files(cfg.eval, cfg, env, tokenizer)
    elif held_out is None:
        pairs, held_out = data.hold_out(pairs)
    tested = {str(pair["prompt"]) for pair in held_out}
    pairs = [pair for pair in pairs if str(pair["prompt"]) not in tested]
    trained = {str(pair["prompt"]) for pair in pairs}
    trajectories = [row for row in trajectories if str(row["prompt"]) not in trained]
    if not pairs:
        raise BadInput("--eval: it has all questions of --data; none is left to train on")
    pairs, dropped = encode_pairs(pairs, tokenizer, cfg.max_length)
    held_out, dropped_too = encode_pairs(held_out, tokenizer, cfg.max_length)
    trajectories = data.encode_rows(trajectories, tokenizer, cfg.max_length, eos=True)[0] if trajectories else []
    return pairs, held_out, trajectories, dropped + dropped_too
