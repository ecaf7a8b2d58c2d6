"""Find the final answer of a worked solution and decide whether it equals the gold answer.

Monte-Carlo labelling, best-of-N and voting all need to know whether a whole solution ended in the right
place:

    extract_answer(text)   the last \\boxed{...}, or else what follows "####", "A:", "answer is", "answer:"
    answer_key(answer)     a hashable canonical form; equal keys mean equal answers
    verify(text, gold)     extract, then compare keys

Why an exact parser and Fractions: a checker that hands out reward is attacked by whatever it rewards. A
float tolerance pays for 0.333 where 1/3 was asked; eval() or a computer algebra system runs text that a
model wrote, and 10^10^10 stops the run. Here an answer becomes an exact sum {monomial: Fraction}, in which
1/sqrt(2) and sqrt(2)/2 are the same dictionary. "Same" means equal keys, so it is transitive and votes can
be counted in a dict. Whatever does not parse, or would cost too much, is compared as normalised text.

Decisions worth knowing, and what is left out:
  * "%" and words after a number are units and are dropped: 50% = 50, and 18 cm = 18 = 18 m. A few words
    that change the meaning (a.m., more, million) are kept.
  * A bare "1,234" is one number; within brackets a plain comma separates, so (1,234) is a pair.
  * Bare lists and sets are unordered and the same: "2 or 1" = "1, 2" = {1,2}. Tuples and intervals are
    ordered and keep their brackets; nothing tells the point (1,2) from the open interval (1,2).
  * "x = 5" is 5, unless several names appear: "x=1, y=2" keeps them.
  * Products are expanded, (x-1)(x+1) = x^2-1: this cannot tell whether a polynomial was factored as asked.
  * No cancelling of polynomials, no rules for functions, nested roots or inequalities, no matrix
    arithmetic, no numeric tolerance (2\\pi is not 6.28): right answers in an unusual form may be rejected.
"""

import math
import re
from collections import Counter
from fractions import Fraction

# Each bound keeps one kind of hostile input cheap; an honest answer reaches none of them.
MAX_CHARS = 500  # longer answers are compared as text
MAX_BITS = 1000  # of a numerator or denominator: stops 2^{9999999}
MAX_DEPTH = 24  # of nested brackets: stays far away from Python's recursion limit
MAX_WORK = 1000  # products of two terms per expression: stops (a+b+c)^{12}(a+b+c)^{12}

# One alternation walks boxes, escapes and braces together; matching every box by itself would be quadratic.
_BOX = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([-+]?[\d.][\d.,/]*|[A-Za-z]\b)?)|\\[\\{}]|[{}]"
)
_ENDING = re.compile(r"####|^[ \t]*A:|\b[Aa]nswer(?:\s+is\b|\s*:)[\s:*]*", re.M)


def extract_answer(text):
    """The final answer of a solution, or None. The last balanced box wins over every textual ending."""
    if not isinstance(text, str):
        return None
    boxed, boxed_at, open_braces = "", -1, []
    first = text.find("box")  # braces before the first box cannot matter
    for m in _BOX.finditer(text, max(first - 2, 0)) if first >= 0 else ():
        if m[1] or m[0] == "{":
            open_braces.append(m.end() if m[1] else -1)
        elif m[2]:  # \boxed 5
            boxed, boxed_at = m[2], m.start()
        elif m[0] == "}" and open_braces:
            start = open_braces.pop()
            if start > boxed_at and text[start : m.start()].strip():
                boxed, boxed_at = text[start : m.start()], start
    if boxed:
        return boxed.strip()
    ending = None
    for ending in _ENDING.finditer(text):
        pass
    if ending is None:
        return None
    line = text[ending.end() :].lstrip().partition("\n")[0]
    return (
        re.split(r"\.\s", line, maxsplit=1)[0].strip(" \t\r*") or None
    )  # "18. So she ..." -> "18"


def verify(response, answer):
    """Does the response's own final answer equal `answer`, a bare answer or itself a worked solution?

    A response without a recognisable ending is wrong: taking its last number instead would reward solutions
    that never committed to an answer.
    """
    found, gold = extract_answer(response), _as_text(answer)
    if found is None or not gold:
        return False
    return same_answer(found, extract_answer(gold) or gold)


def same_answer(a, b):
    """Are two bare answers the same? An equivalence relation, because it compares keys."""
    return answer_key(a) == answer_key(b)


def answer_key(answer):
    """Hashable canonical form of a bare answer; group votes by it."""
    text = _as_text(answer)
    if len(text) > MAX_CHARS:
        return "text", " ".join(text.split())
    tokens = _tokens(re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text, flags=re.I))
    while tokens and tokens[-1] in (".", ",", ";"):
        tokens.pop()
    return _key(tokens, 0)


def _as_text(answer):
    try:
        return (
            answer
            if isinstance(answer, str)
            else str(answer) if isinstance(answer, (int, float)) else ""
        )
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return ""


# ----------------------------------------------------------------------------------------------------------
# Tokens: one spelling for what LaTeX can spell in many ways. Words carry a leading quote ('cm), so that a
# unit or "yes" is never mistaken for a product of variables.

_SKIP = {
    "\\ ",
    "\\\n",
    "\u00a0",
    "\u2009",
    "\u202f",
    *(
        r"$ % ~ £ € \left \right \, \! \; \: \quad \qquad \$ \% \( \) \[ \] \displaystyle \big \Big "
        r"\rm \bf \text \mathrm \mathbf"
    ).split(),
}
_SAME = dict(
    pair.split("=")
    for pair in (
        r"\dfrac=\frac \tfrac=\frac \cfrac=\frac \times=* \cdot=* ×=* ·=* \div=/ ÷=/ −=- –=- \leq=\le ≤=\le "
        r"\geq=\ge ≥=\ge \neq=\ne \lt=< \gt=> \lbrace=\{ \rbrace=\} ∪=\cup ∈=\in π=\pi √=\sqrt ∞=\infty "
        r"±=\pm \mp=\pm °='degrees \varnothing=\emptyset ∅=\emptyset"
    ).split()
)
_BARE = {
    "pi": ["\\pi"],
    "sqrt": ["\\sqrt"],
    "inf": ["\\infty"],
    "infinity": ["\\infty"],
    "and": [","],
    "or": [","],
    "thousand": ["*", "1000"],
    "million": ["*", "1000000"],
    "billion": ["*", "1000000000"],
}
_SHORT = set(
    "cm mm km kg mg ml ft yd oz lb lbs hr hrs mph kph sq am pm no of is to th st nd rd".split()
)


def _token_pattern(thousands):
    return re.compile(
        r"""
        \\(?:text[a-z]*|mbox|mathrm|mathbf|mathit|operatorname)\s*\{(?P<text>[^{}]*)\}
      | (?P<degrees>\^\s*(?:\\circ|\{\s*\\circ\s*\})(?:\s*[CF]\b)?)
      | (?P<env>\\(?:begin|end))\s*\{[pbB]?matrix\}
      | (?P<number>(?:"""
        + thousands
        + r"""|\d+)(?:\.\d+)?(?:[eE][-+]?\d+(?![A-Za-z\d]))?|\.\d+)
      | (?P<letters>[A-Za-z]+)
      | \s+ | \\[A-Za-z]+ | \\. | .""",
        re.X | re.S | re.A,
    )


# "(5,120)" must stay a pair, so a plain comma groups thousands only outside of brackets.
_OUTSIDE = _token_pattern(r"(?<![\d,])[1-9]\d{0,2}(?:(?:,(?:\\!)?|\{,\}|\\,)\d{3})+(?!,?\d)")
_INSIDE = _token_pattern(r"[1-9]\d{0,2}(?:(?:\{,\}|\\,)\d{3})+(?!\d)")


def _tokens(text, in_text=False):
    out, pos, depth = [], 0, 0
    while pos < len(text):
        m = (_INSIDE if depth else _OUTSIDE).match(text, pos)
        glued, pos, token = text[max(pos - 1, 0) : pos] in tuple("0123456789^_"), m.end(), m[0]
        if m["text"] is not None:
            new = _tokens(m["text"], in_text=True)
        elif m["letters"]:
            # A guess: loose letters with a vowel are a word (cups), glued or vowel-free ones a product.
            word = token.lower()
            if word in _BARE:
                new = _BARE[word]
            elif (
                in_text
                or word in _SHORT
                or len(word) > (4 if glued else 2)
                and re.search("[aeiou]", word)
            ):
                new = ["'" + (word if len(word) > 1 else token)]
            else:
                new = list(token)
        elif token.isspace() or token in _SKIP:
            continue
        elif m["number"]:
            new = [re.sub(r"[^\d.eE+-]", "", token)]
        else:
            new = ["'degrees" if m["degrees"] else m["env"] or _SAME.get(token, token)]
            depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if new == [","] == out[-1:] or new == ["."] and out and out[-1][0] == "'":  # ", and"; "ft."
            continue
        out += new
    return out


# ----------------------------------------------------------------------------------------------------------
# Structure: lists, sets, tuples, intervals, unions, matrices. What remains is an expression.

_OPEN, _CLOSE = {"(", "[", "{", "\\{", "\\begin"}, {")", "]", "}", "\\}", "\\end"}
_NAME = re.compile(
    r"(?:'\S+ )*(?:\\?[A-Za-z]+|'\S+) (?:_ \S+ |_ \{ \S+ \} )?(?:\( [A-Za-z] \) )?(?:=|\\in) "
)
_UNITS = re.compile(
    r" (?:'(?!(?:am|pm|more|less|north|south|east|west|left|right|up|down|above|below) )"
    r"\S+ (?:\^ (?:[23]|\{ [23] \}) )?(?:/ )?)+$"
)


def _split(tokens, separator):
    """Split at the separators outside all brackets; None where brackets do not balance."""
    parts, depth = [[]], 0
    for token in tokens:
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth < 0:
            return None
        if depth == 0 and token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return None if depth else parts


def _unordered(keys):
    return "list", frozenset(Counter(keys).items())


def _key(tokens, depth):
    """Canonical form of a whole answer, or of what stands between two brackets."""
    parts = _split(tokens, ",") or [tokens]
    names = [_NAME.match(" ".join(part) + " ") for part in parts]
    several = len({m[0] for m in names if m}) > 1
    keys = []
    for part, m in zip(parts, names):
        name = m[0] if m else ""
        part = part[name.count(" ") :]
        for sign in "+-" if part.count("\\pm") == 1 else ["\\pm"]:  # 1 \pm \sqrt2 is a list of two
            key = _item([sign if token == "\\pm" else token for token in part], depth)
            keys.append((name, key) if several else key)
    return keys[0] if len(keys) == 1 else _unordered(keys)


def _item(tokens, depth):
    bare = _UNITS.sub("", " " + " ".join(tokens) + " ").strip(" ").split(" ")
    if any(_is_number(token) or token in ("\\pi", "\\infty") for token in bare):
        tokens = bare  # only a quantity has units: "n is even" and "n is odd" keep their words
    if tokens in (["\\emptyset"], ["\\{", "\\}"]):
        return _unordered([])
    parts = _split(tokens, "\\cup") or []
    if len(parts) > 1 and depth < MAX_DEPTH:
        return "union", frozenset(_key(part, depth + 1) for part in parts)
    opening, inner, closing = "".join(tokens[:1]), tokens[1:-1], "".join(tokens[-1:])
    parts = _split(inner, ",")  # None in (1)(2), whose outer brackets do not belong together
    if opening in _OPEN and closing in _CLOSE and parts and depth < MAX_DEPTH:
        if opening == "\\begin":
            rows = [_split(row, "&") for row in _split(inner, "\\\\") if row]
            return "matrix", tuple(tuple(_key(cell, depth + 1) for cell in row) for row in rows)
        if opening in ("(", "[") and len(parts) > 1:
            return "tuple", opening, closing, tuple(_key(part, depth + 1) for part in parts)
        if opening != "[":  # a set is a list in braces; (5), {5} and \{5\} are 5
            return _key(inner, depth + 1)
    try:
        return "value", _Expression(tokens).parse()
    except _Unparsed:
        return "text", " ".join(tokens)


# ----------------------------------------------------------------------------------------------------------
# Expressions: recursive descent straight into exact values {monomial: Fraction}.
#
# A monomial is a frozenset of (base, exponent) pairs. A base is a prime (its exponent then lies strictly
# between 0 and 1: whole powers move into the coefficient), a symbol, or a tuple for something opaque such as
# 101_2 or ("sum", key). sqrt(8)/3 + 2 pi is {{(2, 1/2)}: 2/3, {(\pi, 1)}: 2}.


class _Unparsed(Exception):
    """Not understood, or too expensive."""


_ONE = frozenset()
_SYMBOL = re.compile(
    r"'?[A-Za-z]$|\\(?:pi|infty|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|omega)$"
)


def _is_number(token):
    return re.match(r"\.?[0-9]", token) is not None


def _bounded(q):
    if max(q.numerator.bit_length(), q.denominator.bit_length()) > MAX_BITS:
        raise _Unparsed
    return q


def _whole_power(q, n):
    """q ** n, refusing to compute what would not fit."""
    if abs(n) * max(q.numerator.bit_length(), q.denominator.bit_length()) > MAX_BITS:
        raise _Unparsed
    return q ** int(n)


def _monomial(exponents):
    """Canonical (monomial, coefficient): whole powers of primes, and i*i, leave the monomial."""
    coefficient, left = Fraction(1), []
    for base, exponent in exponents.items():
        if isinstance(base, int):
            coefficient *= _whole_power(Fraction(base), math.floor(exponent))
            exponent -= math.floor(exponent)
        elif base == "i":
            coefficient *= -1 if exponent % 4 >= 2 else 1
            exponent %= 2
        if exponent:
            left.append((base, exponent))
    return frozenset(left), coefficient


def _add(out, value, sign=1):
    """Add in place, because sums grow term by term."""
    for monomial, coefficient in value.items():
        out[monomial] = _bounded(out.get(monomial, 0) + sign * coefficient)
        if not out[monomial]:
            del out[monomial]
    return out


def _freeze(value):
    return frozenset(value.items())


def _opaque(*base):
    return {frozenset([(base, Fraction(1))]): Fraction(1)}


class _Expression:
    def __init__(self, tokens):
        self.tokens, self.at, self.depth, self.work = list(tokens), 0, 0, MAX_WORK

    def parse(self):
        value = self.sum()
        if self.peek():
            raise _Unparsed
        return _freeze(value)

    def peek(self, ahead=0):
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else ""

    def take(self, *expected):
        """Consume the next token if it is an expected one (any token when none is named)."""
        token = self.peek()
        if expected and token not in expected:
            return ""
        self.at += 1
        return token

    def spend(self, work):
        self.work -= work
        if self.work < 0:
            raise _Unparsed

    # -- grammar, loosest binding first --

    def signs(self):
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.take() == "-" else 1
        return sign

    def sum(self):
        sign = self.signs()
        value = _add({}, self.product(), sign)
        while self.peek() in ("+", "-"):
            sign = self.signs()
            value = _add(value, self.product(), sign)
        return value

    def product(self):
        value = self.factor()
        while True:
            before, operator = self.tokens[self.at - 1], self.take("*", "/")
            if operator:
                value = self.times(value, {_ONE: Fraction(self.signs())})
            elif _is_number(self.peek()) and _is_number(before):
                raise _Unparsed  # "2 3" is not 6
            elif not (
                _is_number(self.peek())
                or _SYMBOL.match(self.peek())
                or self.peek() in ("(", "{", "\\frac", "\\sqrt")
            ):
                return value
            value = self.times(value, self.power(self.factor(), -1 if operator == "/" else 1))

    def factor(self):
        value = self.primary()
        if self.take("^"):
            sign = self.signs()
            exponent = _add({}, self.argument(), sign)
            if not exponent.keys() <= {_ONE}:
                return _opaque("^", _freeze(value), _freeze(exponent))
            return self.power(value, exponent.get(_ONE, Fraction(0)))
        return value

    def primary(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unparsed
        token = self.peek()
        if _is_number(token):
            value = self.mixed()
        elif self.take("(", "{"):
            value = self.sum()
            if not self.take(")" if token == "(" else "}"):
                raise _Unparsed
        elif self.take("\\frac"):
            value = self.argument(one_digit=True)
            value = self.times(value, self.power(self.argument(one_digit=True), -1))
        elif self.take("\\sqrt"):
            degree = 2
            if self.take("["):
                degree = self.take(*"23456789")
                if not degree or not self.take("]"):
                    raise _Unparsed
            value = self.power(self.argument(), Fraction(1, int(degree)))
        elif _SYMBOL.match(token):
            symbol = self.take().strip("'")
            value = {frozenset([(symbol, Fraction(1))]): Fraction(1)}
        else:
            raise _Unparsed
        if self.take("_"):  # x_1 is a symbol of its own, and so is 101_2
            value = _opaque("_", _freeze(value), _freeze(self.argument()))
        self.depth -= 1
        return value

    def mixed(self):
        """A number, or a mixed number: 1\\frac12 and 1 1/2 add, but 2\\frac{\\pi}{3} multiplies."""
        token, value = self.peek(), self.argument()
        if token.isdigit() and self.peek() == "\\frac":
            fraction = self.primary()
            if fraction.keys() == {_ONE} and 0 < fraction[_ONE] < 1:
                return _add(value, fraction)
            return self.times(value, fraction)
        if (
            token.isdigit()
            and self.peek().isdigit()
            and self.peek(1) == "/"
            and self.peek(2).isdigit()
        ):
            top, _, bottom = self.argument(), self.take(), self.argument()
            return _add(value, self.times(top, self.power(bottom, -1)))
        return value

    def argument(self, one_digit=False):
        """What a command applies to. Unlike TeX, 2^10 is 1024; like TeX, \\frac12 is a half."""
        token = self.peek()
        if not _is_number(token):
            return self.primary()
        if one_digit and token.isdigit():
            self.tokens[self.at : self.at + 1] = list(token)
        token = self.take()
        if len(token.lower().partition("e")[2]) > 4:  # Fraction("1e999999999") would never return
            raise _Unparsed
        return _add({}, {_ONE: Fraction(token)})

    # -- arithmetic --

    def times(self, a, b):
        self.spend(len(a) * len(b))
        out = {}
        for m, p in a.items():
            for n, q in b.items():
                exponents = Counter(dict(m))
                for base, exponent in n:
                    exponents[base] += exponent
                monomial, coefficient = _monomial(exponents)
                _add(out, {monomial: coefficient * p * q})
        return out

    def power(self, value, q):
        if not value and q <= 0:
            raise _Unparsed  # division by zero, 0^0
        if not value or q == 1:
            return value
        if q.denominator == 1 and len(value) == 1:
            ((monomial, coefficient),) = value.items()
            monomial, extra = _monomial({base: exponent * q for base, exponent in monomial})
            return {monomial: _bounded(_whole_power(coefficient, q) * extra)}
        if q.denominator == 1 and 0 <= q <= 12:
            out = {_ONE: Fraction(1)}
            for _ in range(int(q)):
                out = self.times(out, value)
            return out
        if (
            q == -1 and len(value) == 2
        ):  # 1/(a+b) = (a-b)/(a^2-b^2), of use where a^2-b^2 is rational
            a, b = ({monomial: coefficient} for monomial, coefficient in value.items())
            norm = _add(self.times(a, a), self.times(b, b), -1)
            if norm.keys() == {_ONE}:
                return self.times(_add(a, b, -1), {_ONE: 1 / norm[_ONE]})
        # Pull out the rational content, as in \sqrt{8+4x} = 2\sqrt{2+x}; what is left is 1, -1 or opaque.
        content = Fraction(
            math.gcd(*(c.numerator for c in value.values())),
            math.lcm(*(c.denominator for c in value.values())),
        )
        rest = {monomial: coefficient / content for monomial, coefficient in value.items()}
        exponents, sign = Counter(), 1
        for n, exponent in ((content.numerator, q), (content.denominator, -q)):
            for prime in self.primes(n):
                exponents[prime] += exponent
        if rest == {_ONE: -1} and q.denominator == 2:
            exponents["i"] = q.numerator
        elif rest == {_ONE: -1} and q.denominator % 2:  # the real odd root
            sign = (-1) ** (q.numerator % 2)
        elif rest != {_ONE: 1}:
            exponents["sum", _freeze(rest)] = q
        monomial, coefficient = _monomial(exponents)
        return {monomial: sign * _bounded(coefficient)}

    def primes(self, n):
        """Factors of n, prime as far as small divisors tell: a cheap bound, and sqrt(8) needs no more."""
        self.spend(20)
        out = []
        for d in range(2, 1000):
            while n % d == 0:
                out.append(d)
                n //= d
            if d * d > n:
                break
        root = math.isqrt(n)
        return out + ([root, root] if root * root == n else [n]) if n > 1 else out
