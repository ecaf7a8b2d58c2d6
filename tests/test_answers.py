"""Answer extraction and equality: a table of pairs, real GSM8K solutions, and hostile input."""
import json
import os
import random
import time
from fractions import Fraction

import pytest

from answers import answer_key, extract_answer, same_answer, verify

# Every row is one equivalence class of spellings; neighbours in a row are checked as pairs.
SAME = [
    # integers, signs, separators
    ["18", " 18 ", "18.", "+18", "18.0", "018", "$18$", "\\$18", "$18", "\\(18\\)", "{18}", "18.00"],
    ["-7", "−7", "- 7", "-7.0", "-(7)"],
    ["1234", "1,234", "1{,}234", "1\\,234", "1,\\!234", "\\$1,234.00", "$1,234$"],
    ["12345678", "12,345,678", "12{,}345{,}678"],
    ["0", "-0", "0.0", "\\frac{0}{5}", "3-3"],
    # fractions, decimals, percent
    ["0.5", ".5", "1/2", "\\frac12", "\\frac{1}{2}", "\\dfrac{1}{2}", "\\tfrac 1 2", "\\frac1{2}",
     "\\frac{1}2",
     "\\frac{2}{4}", "{1}/{2}", "0.50", "\\cfrac{1}{2}", "\\displaystyle\\frac{1}{2}"],
    ["50", "50%", "50\\%", "50 \\%", "$50\\%$"],
    ["-\\frac{1}{2}", "\\frac{-1}{2}", "\\frac{1}{-2}", "-0.5", "-1/2", "-\\left(\\frac12\\right)"],
    ["\\frac{4}{6}", "\\frac23", "2/3", "\\frac{\\frac{4}{3}}{2}"],
    ["3/2", "1 \\frac{1}{2}", "1\\frac{1}{2}", "1 1/2", "1.5", "1\\frac12", "1\\dfrac{1}{2}"],
    ["-1\\frac{1}{2}", "-3/2", "-1.5"],
    ["\\frac{72}{100}", "\\frac{18}{25}", "0.72"],
    ["\\frac1{72}", "1/72"],
    ["30000", "3 \\times 10^4", "3\\cdot10^{4}", "3e4", "3 × 10^4", "30,000"],
    ["1200", "1.2e3", "1.2 \\times 10^{3}"],
    ["0.003", "3\\times10^{-3}", "3e-3"],
    ["1024", "2^{10}", "2^10", "4^5"],
    # units and words
    ["19", "19 dollars", "19\\text{ cm}", "19 \\mathrm{cm}^2", "19\\text{ m}^{2}", "19 cm",
     "19\\mbox{ inches}",
     "19 square feet", "19\\ \\text{cm}", "19\\,\\text{km/h}", "19 apples.", "19 cm^3"],
    ["5", "5^\\circ", "5°", "5 degrees", "5^{\\circ}", "5^{\\circ}\\text{C}", "5^\\circ C"],
    ["12 hours", "12", "12\\textrm{ hours}", "12 hrs"],
    ["\\frac{3}{4}\\text{ mile}", "0.75", "3/4 cup"],
    ["5 million", "5,000,000", "5\\text{ million dollars}", "5 \\times 10^6"],
    ["9\\pi\\text{ cm}", "9\\pi"],
    # prefixes
    ["x = 6", "x=6", "6", "x \\in \\{6\\}", "f(x) = 6", "x_1 = 6", "\\theta = 6"],
    ["x \\in [1,2]", "[1,2]", "[1, 2]", "\\left[1,2\\right]"],
    ["y = 2x+3", "2x+3", "3+2x", "3 + 2 \\cdot x", "y=3+x*2"],
    # tuples, sets, intervals, lists
    ["(1,2)", "(1, 2)", "\\left(1,2\\right)", "(1.0, \\frac{4}{2})", "(1,~2)"],
    ["(1,234)", "(1, 234)"],
    ["\\{1,2\\}", "\\{2,1\\}", "{1,2}", "\\left\\{2, 1\\right\\}", "1, 2", "2,1", "1 and 2", "2 or 1",
     "2\\text{ and }1", "x=1, x=2", "x = 1 \\text{ or } x = 2", "1,\\ 2"],
    ["3,4,5", "5,4,3", "3, 4, and 5"],
    ["(1,2),(3,4)", "(3,4), (1,2)", "\\{(3,4),(1,2)\\}"],
    ["(-\\infty, 2]", "\\left(-\\infty,2\\right]", "(-∞,2]"],
    ["(0,1)\\cup(2,3)", "(2,3) \\cup (0,1)", "(0,1)∪(2,3)"],
    ["\\pm 2", "2,-2", "-2 \\text{ and } 2", "x=\\pm2"],
    ["1\\pm\\sqrt{2}", "1+\\sqrt2, 1-\\sqrt2"],
    ["\\emptyset", "\\varnothing", "\\{\\}"],
    ["x=1, y=2", "y=2, x=1"],
    # roots
    ["\\sqrt{8}", "2\\sqrt{2}", "2 \\sqrt 2", "2\\sqrt2", "\\sqrt8", "2*sqrt(2)", "2√2",
     "\\frac{4}{\\sqrt{2}}"],
    ["\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", "\\sqrt{\\frac12}", "\\sqrt{0.5}", "\\sqrt{2}/2"],
    ["\\sqrt{4}", "2", "\\sqrt[3]{8}", "\\sqrt[3]{-8}+4", "8^{1/3}"],
    ["1+\\sqrt{2}", "\\sqrt{2}+1", "\\frac{1}{\\sqrt2-1}", "\\frac{2+2\\sqrt2}{2}"],
    ["\\sqrt{6}", "\\sqrt2\\sqrt3", "\\sqrt{2}\\cdot\\sqrt{3}"],
    ["3\\sqrt[3]{2}", "\\sqrt[3]{54}"],
    ["\\sqrt{3+\\sqrt2}", "\\sqrt{\\sqrt{2}+3}"],
    # pi, complex, powers
    ["2\\pi", "2 \\pi", "\\pi*2", "\\pi\\cdot2", "2π", "2pi"],
    ["\\frac{\\pi}{2}", "\\pi/2", "\\frac{1}{2}\\pi", "0.5\\pi"],
    ["3+4i", "4i+3", "3 + 4 i"],
    ["\\sqrt{-4}", "2i"],
    ["i^2", "-1"],
    ["\\frac{1}{1+i}", "\\frac{1-i}{2}"],
    ["e^{2x}", "e^{x2}"],
    ["\\frac{1}{x}", "x^{-1}", "1/x"],
    ["\\frac{x+1}{2}", "\\frac{x}{2}+\\frac12", "\\frac12(x+1)"],
    ["x^2-1", "(x-1)(x+1)", "-1+x^2", "x^{2} - 1"],
    ["\\frac{1}{2x+2}", "\\frac{1}{2(x+1)}"],
    ["\\log_2 3", "\\log_2  3"],
    # text, choices, bases, matrices, relations
    ["\\text{Yes}", "yes", "Yes", "\\textbf{yes}", "YES.", "\\mathrm{Yes}"],
    ["(A)", "A", "\\text{(A)}", "\\text{A}", "\\textbf{(A)}", "(A)."],
    ["\\text{Monday}", "monday"],
    ["red, blue", "blue and red"],
    ["10\\text{ a.m.}", "10 am", "10 A.M."],
    ["101_2", "101_{2}", "$101_2$"],
    ["\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix}1&\\frac42\\\\3&4\\end{pmatrix}",
     "\\begin{bmatrix}1&2\\\\3&4\\\\\\end{bmatrix}"],
    ["x+y=5", "x + y = 5"],
    ["x \\le 5", "x \\leq 5", "x ≤ 5"],
    ["3:4", "3 : 4"],
]
DIFFERENT = [
    ("42", "42.0001"), ("42", "0.42"), ("1/3", "0.333"), ("12", "2"), ("1", "1/2"), ("(1,2)", "(2,1)"), ("2",
    "-2"),
    ("101_2", "101_3"), ("101_2", "101"), ("[1,2]", "(1,2)"), ("[1,2)", "[1,2]"), ("2\\pi", "6.28"),
    ("1,234", "1.234"),
    ("1,234", "(1,234)"), ("3,4", "34"), ("3,4", "(3,4)"), ("3,4", "3.4"), ("1 1/2", "11/2"), ("1\\frac12",
    "\\frac12"),
    ("1/2", "2"), ("\\frac12", "\\frac21"), ("\\sqrt{2}", "2"), ("\\sqrt{2}", "1.414"), ("\\sqrt{2}",
    "1.41421356237"),
    ("\\sqrt{8}", "2\\sqrt{3}"), ("\\sqrt[3]{2}", "\\sqrt{2}"), ("\\pi", "3.14159"), ("\\pi",
    "\\frac{22}{7}"),
    ("3+4i", "3-4i"), ("3+4i", "4+3i"), ("x", "y"), ("x^2", "2x"), ("x^2", "x^3"), ("x+1", "x-1"), ("yes",
    "no"),
    ("A", "B"), ("(A)", "(B)"), ("\\text{A}", "\\text{B}"), ("\\text{Monday}", "\\text{Tuesday}"), ("10 am",
    "10 pm"),
    ("10 am", "10"), ("5 million", "5"), ("5 more", "5 less"), ("2^{10}", "2^{11}"), ("2^{10}", "20"),
    ("2^{10}", "210"),
    ("3e4", "3e5"), ("1e3", "1"), ("50%", "0.5"), ("18 dollars", "19 dollars"), ("x=5", "x=6"), ("x=1,y=2",
    "x=2,y=1"),
    ("\\{1,2\\}", "\\{1,3\\}"), ("\\{1,2\\}", "\\{1,2,3\\}"), ("1,1,2", "1,2,2"), ("1 and 2", "12"),
    ("\\pm 2", "2"),
    ("\\pm 2", "-2"), ("(-\\infty,2)", "(-\\infty,2]"), ("(-\\infty,2)", "(\\infty,2)"), ("\\infty",
    "-\\infty"),
    ("(0,1)\\cup(2,3)", "(0,1)\\cup(2,4)"), ("(0,1)\\cup(2,3)", "(0,3)"), ("x<5", "x>5"), ("x<5", "x\\le5"),
    ("x \\ne 5", "x=5"), ("1-\\sqrt2", "\\sqrt2-1"), ("1+\\sqrt2", "\\sqrt3"), ("\\frac{\\pi}{2}",
    "\\frac{2}{\\pi}"),
    ("3:4", "4:3"), ("3:4", "3/4"), ("6:30", "630"), ("2 3", "6"), ("2 3", "23"), ("\\emptyset", "0"),
    ("\\emptyset", ""),
    ("\\sin 2x", "2\\sin x"), ("\\sin x", "\\cos x"), ("\\sin^{-1} x", "\\frac{1}{\\sin x}"), ("\\log_2 3",
    "\\log_3 2"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"), ("\\frac{1}{0}", "0"),
    ("\\frac{1}{0}", "1"), ("0.1", "0.10000001"), ("0.\\overline{3}", "0.3"), ("1000000", "1000001"),
    ("9" * 400, "9" * 399),
    ("9" * 600, "9" * 599 + "8"), ("10^{10}^{10}", "10"), ("-5", "5"), ("5-", "5"), ("5+", "5"), ("2x", "2"),
    ("6xyz", "6"),
    ("n is even", "n is odd"), ("5", "five"), ("1/2/3", "\\frac{1}{6}\\cdot2"), ("x_1", "x_2"), ("x_1", "x"),
    ("ab", "a"),
    ("(1,2,3)", "(1,2)"), ("((1,2),3)", "(1,(2,3))"), ("3\\frac{x}{2}", "3+\\frac{x}{2}"), ("2^{3^2}", "64"),
    ("\\sqrt{x^2}", "x"), ("2i", "2"), ("i", "1"), ("|x|", "x"), ("5!", "5"), ("\\frac{1}{x+1}",
    "\\frac{1}{x-1}"),
    ("\\$1", "\\$10"), ("12 hours", "12 hours 30 minutes"), ("北京", "京北"), ("²", "2"), ("1e9999", "9999e"),
]
PAIRS = [(a, b, True) for row in SAME for a, b in zip(row, row[1:])] + [(a, b, False) for a, b in DIFFERENT]


@pytest.mark.parametrize("a, b, same", PAIRS)
def test_pairs(a, b, same):
    assert same_answer(a, b) is same and same_answer(b, a) is same
    for response, gold in ((a, b), (b, a)):
        assert verify(f"So we get \\boxed{{{response}}}.", gold) is (same and bool(response and gold))


def test_there_are_enough_pairs_of_both_kinds():
    assert sum(same for *_, same in PAIRS) >= 100 and sum(not same for *_, same in PAIRS) >= 70


def test_every_class_is_transitive_and_distinct_from_unrelated_ones():
    for row in SAME:
        assert len({answer_key(a) for a in row}) == 1, row
    samples = [row[0] for row in SAME]
    clashes = [(a, b) for i, a in enumerate(samples) for b in samples[:i] if same_answer(a, b)]
    assert clashes == []


EXTRACTED = [
    ("Thus \\boxed{5}.", "5"), ("\\boxed{1} no, \\boxed{2}", "2"), ("\\fbox{7}", "7"), ("\\boxed 5", "5"),
    ("$\\boxed 5$.", "5"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("\\boxed{ 3 }", "3"), ("\\boxed {3}",
    "3"),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"), ("\\boxed{\\boxed{5}}", "5"),
    ("\\boxed{4} and \\boxed{\\frac{1}{2}", "4"),
    ("\\boxed{4\nA: 6", "6"), ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."), ("} \\boxed{1} }",
    "1"),
    ("{{{ \\boxed{1}", "1"), ("\\boxed{4} #### 5", "4"), ("\\boxed{}", None), ("\\boxed{} A", None),
    ("\\boxed", None),
    ("a boxed 5", None), ("\\boxedx{5}", None), ("work\n#### 18", "18"), ("#### 18\n#### 19\n", "19"),
    ("####18", "18"),
    ("9 * 2 = 18\nA: 18", "18"), ("A: 18\n", "18"), ("x A: 18", None), ("  A: 1,234", "1,234"), ("A:\n18",
    "18"),
    ("The answer is 5.", "5."), ("The final answer is $\\frac12$. I hope so.", "$\\frac12$"), ("answer: 7",
    "7"),
    ("Answer: 7", "7"), ("**Answer:** 7", "7"), ("**Final answer: 7**", "7"), ("The answer is: 3.5 kg",
    "3.5 kg"),
    ("The answer is 5. So the answer is 6.", "6."), ("#### 5\nthe answer is 6", "6"),
    ("the answer is 6\nA: 5", "5"),
    ("A: The answer is 9", "9"), ("The answer is", None), ("", None), ("18", None), ("so x is 18", None),
    (None, None),
    (18, None), (b"\\boxed{5}", None), ("the answers: 5", None), ("\\boxed{5}\u2028\x00", "5"),
]


@pytest.mark.parametrize("text, expected", EXTRACTED)
def test_extract(text, expected):
    assert extract_answer(text) == expected


def test_verify_gold_forms():
    for gold in ("18", 18, 18.0, "$18$", "so \\boxed{18}", "6*3=<<6*3=18>>18\n#### 18", "6*3=18\nA: 18"):
        assert verify("The answer is 18 dollars.", gold)
        assert not verify("The answer is 19 dollars.", gold)
        assert not verify("18", gold) and not verify("we get 18", gold)  # nothing committed to
    for nothing in (None, "", [], 10**5000, float("nan")):
        assert not verify("\\boxed{18}", nothing) and not verify("\\boxed{$}", nothing)
        assert not verify(nothing, "18")
        assert same_answer(nothing, nothing)


def test_gsm8k_labels():
    """The files' own labels of 5276 real model solutions, judged again from the text alone."""
    folder = os.environ.get("GSM8K_DIR")
    path = os.path.join(folder or "", "example_model_solutions.jsonl")
    if not folder or not os.path.exists(path):
        pytest.skip("set GSM8K_DIR to the folder of GSM8K's example_model_solutions.jsonl")
    judged, wrong = 0, []
    with open(path, encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            for model in (v for v in record.values() if isinstance(v, dict)):
                judged += 1
                if verify(model["solution"], record["ground_truth"]) != model["is_correct"]:
                    wrong.append(model["solution"][-80:])
    print(f"agreement {judged - len(wrong)}/{judged}")
    assert judged == 5276 and wrong == []


# --- hostile input ---

PIECES = (r"\frac \dfrac \sqrt \sqrt[3] \boxed{ \fbox{ \boxed \text{ \mathrm{cm} \left( \right) \left\{ "
          r"\right. \pi \infty "
          r"\pm \cup \in \{ \} { } ( ) [ ] ^ ^{ _ _{ ^\circ \begin{pmatrix} \end{pmatrix} \\ & , {,} \, \! "
          r". .. + - * / = "
          r"< > \le ! % \% $ \$ 1 2 3 9 0 10 1,234 .5 1e9 1e999999999 99999999999999999999 x y i e abc "
          r"dollars and or "
          r"million A: #### answer: \sin \log_2 \overline{3} 0.\overline{ ' \ ~ | :").split(" ")
ODD = ["\0", "\ud800", "\udfff", "²", "٣", "Ⅷ", "½", "ﬁ", "\u2028", "\x1c", "\x85", "\u00a0", "−", "π", "İ",
       "ß", "𝟙", " ", "\n"]
HOSTILE = ["9" * 10000, "^" * 1000, "{" * 100000, "\\boxed{" * 10000, "10^10^10", "10^{10^{10}}",
           "9^{9^{9^{9}}}", "2^{-9999999}",
           "\\frac" * 5000, "\\frac{1}{" * 60 + "2" + "}" * 60, "\\frac" * 99, "\\sqrt" * 90 + "2",
           "(" * 250 + "1" + ")" * 250,
           "(" * 499, "-" * 499 + "1", "1," * 249, "(1," * 160, "1+" * 249 + "1", "2^{999}*" * 60 + "1",
           "\\sqrt{9999999967}" * 29,
           "(a+b+c+d)^{12}" * 35, "(1/3^{200}+1/7^{200})^{12}" * 19, "1/" + "/".join(map(str, range(3, 130))),
           "+".join(f"1/{n}" for n in range(3, 90)), "1e999999999", "1e-999999999", "1E+999", "5!!!!!!!!",
           "20!^{20!}", "x_" * 249,
           "x^-" * 160, "2\\frac" * 80 + "12", "1 1/2" * 99, "' " * 249, "a " * 249, "dollars " * 62 + "1",
           "5" + " cm^{2}" * 70,
           "\\text{" * 83, "\\text{" + "a" * 490, "1,234" * 99, "1,111" + ",111" * 120 + ",1", "\\pm" * 160,
           "\\sin" * 120 + "x",
           "\\begin{pmatrix}" * 30, "\\begin{pmatrix}" + "&\\\\" * 150 + "\\end{pmatrix}", "x=" * 249,
           "\\cup" * 120, "{}" * 249,
           "\\{" * 249, "[" * 499, "\\sqrt[" * 80, "\\sqrt[99999]{2}", "\\overline{" * 40,
           ".1\\overline{" + "3" * 480 + "}"]
LONG = ["{" * 100000 + "\\boxed{5}", "\\boxed{5}" + "{" * 100000, "\\boxed{" * 15000,
        "\\boxed{" * 10000 + "}" * 10000,
        "\\boxed" * 20000, "\\boxed 5" * 12000, "#" * 100000, "#### " * 20000, "answer is" + " " * 100000,
        "answer: \n" * 11000,
        "A: \n" * 25000, "\\" * 100001, "\n" * 100000, " " * 100000 + "A:", "*" * 100000 + "A: 5",
        "A:" + " *" * 50000,
        "answer is " + "1. " * 33000, "\\boxed{" + "\\" * 100000 + "}", "\\boxed{" + "9" * 100000 + "}",
        "\ud800" * 100000,
        "answer" * 16000, ("answer" + " " * 9) * 6600, "\\boxed{5}" + "x" * 200000,
        "\\boxed{5}" + "\\{" * 50000, "#### " + "\x1c" * 99999]


def _timed(response, gold, tries=3):
    """Milliseconds of one verify; a slow one is tried again so that a busy machine does not count."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        assert verify(response, gold) in (True, False)
        best = min(best, 1000 * (time.perf_counter() - start))
        if best < 25:
            break
    return best


def _fuzzed(rng):
    pick = rng.random()
    if pick < 0.04:
        return rng.choice(PIECES + ODD) * rng.randrange(1, 400)
    if pick < 0.08:
        return "".join(rng.choices(rng.sample(PIECES, 3), k=rng.randrange(120)))
    if pick < 0.12:
        return "".join(chr(rng.randrange(rng.choice([128, 0x3000,
        0x110000]))) for _ in range(rng.randrange(40)))
    if pick < 0.30:
        return "".join(rng.choices(PIECES + ODD, k=rng.randrange(1, 30)))
    return "".join(rng.choices(PIECES, k=rng.randrange(1, 14)))


def test_fuzz_never_raises_and_is_fast():
    rng, slowest, recent = random.Random(0), (0, ""), "1"
    for n in range(100_000):
        answer = _fuzzed(rng)
        response = answer if n % 4 == 0 else "\\boxed{" + answer + "}"
        slowest = max(slowest, (_timed(response, recent), response))
        if n % 10 == 0:
            assert same_answer(answer, answer) and same_answer(answer, recent) == same_answer(recent, answer)
            assert (hash(answer_key(answer)) == hash(answer_key(recent))) >= same_answer(answer, recent)
        recent = answer
    print(f"slowest of 100,000: {slowest[0]:.1f} ms for {slowest[1][:80]!r}")
    assert slowest[0] < 50, slowest


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
def test_hostile_answers(text):
    for response in ("\\boxed{" + text + "}", "A: " + text, text):
        assert _timed(response, text) < 50
    assert same_answer(text, text) and not same_answer(text, "17")


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:16]))
def test_extraction_is_linear(text):
    assert _timed(text, "17") < 50
    assert verify(text + "\n\\boxed{17}", "17") or text.endswith("\\" * 101)


def test_rational_arithmetic_agrees_with_fractions():
    rng = random.Random(1)
    for _ in range(500):
        a, b, c, d = (rng.randrange(1, 30) for _ in range(4))
        value = Fraction(a, b) - Fraction(c, d) * a
        assert same_answer(f"\\frac{{{a}}}{{{b}}} - \\frac{{{c}}}{{{d}}} \\cdot {a}",
                           f"{value.numerator}/{value.denominator}")
        assert same_answer(f"\\sqrt{{{a}}} \\cdot \\sqrt{{{b}}} / {c}", f"\\frac{{\\sqrt{{{a * b}}}}}{{{c}}}")
        assert same_answer(f"({a}+{b}\\sqrt{{3}})({c}-{d}\\sqrt{{3}})",
                           f"{a * c - 3 * b * d} + {b * c - a * d}\\sqrt{{3}}")
