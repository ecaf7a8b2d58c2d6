r"""Does a response end in the right answer? The exact check behind every reward and every vote.

    extract_answer(text)      the answer that a response gives at its end, or None
    answer_step(steps)        the index of the step, of a response cut at blank lines, that holds it
    answer_key(answer)        a hashable canonical form: equal keys mean equal answers
    verify(response, answer)  has the response's answer the same key as the gold one?

A policy finds every hole in what rewards it, so one rule stands before all others: what is not
understood is compared as text, never dropped. Nothing is evaluated as code, nothing is rounded.

Which answer. Only what follows the last </think> counts, and a thought still open has no answer.
There, in this order: what <answer> encloses, searched by the next two rules or else as a whole;
the last \boxed{...}, or all that one sentence lists ("\boxed{1} or \boxed{2}"); what follows the
last "####", "A:", "answer is", "answer:" or a heading that says Answer, to the end of its line or
sentence, or to ", so", ", which", "because" or "since" if nothing after it takes the answer back.
Otherwise there is no answer: to take a last number would pay who committed to none.

What is the same. Units come from a closed list, stand last and are dropped: 18 cm = 18 = 18 m,
50% = 50; a letter is one only as text or set apart (5\text{ m}, 5 m), and 5\mathrm{i} a product. A
comma separates within brackets; a bare 1,234 is one number. 7 x 9 is a size and not 63, unless an
equation or a power of ten shows that it multiplies. f(0) is a call, n(n+1) a product. Lists, sets
and unions are unordered and the same; tuples and intervals keep order and brackets, and (1,2) is
point and interval. An inequality in a name is its interval. A name before "=" is dropped where a
value follows: x = 5 is 5, but B = C is not C. x=5, y=3 and (x,y)=(5,3) are (5,3), by the alphabet.
A chain, 2+3=5, is 5 if all its members are. The option "(A) 13" is A.

Left out, so that right answers may be refused: equivalence of equations, cancelling of polynomials,
rules for functions, powers and nested roots, factorials, matrix arithmetic, decimals for \pi and
1/3, sets with a condition. As products are expanded, nothing tells whether one was factored.
"""

import re
from collections import Counter
from fractions import Fraction
from itertools import accumulate, pairwise, product
from unicodedata import normalize

# Each bound keeps one kind of hostile input cheap; an honest answer reaches none of them.
MAX_CHARS, MAX_TOKENS = 500, 200  # longer answers are compared as text; bounds the recursion too
MAX_BITS = 4000  # of a power: stops 2^{9999999}
MAX_TERMS = 150  # multiplied at once: stops (a+b+c)^{12}(a+b+c)^{12}

# ---- Which answer a response gives, and where it stands ----------------------------------------

_REGION = re.compile(r"(?s)(?:.*</think>)?(.*<answer>)?(.*?)(?:</answer>|\Z)")
# Braces within a box are matched to a depth and a length, so that no input makes it slow.
_BALANCED = "(?!)"  # nothing
for _ in range(6):
    _BALANCED = rf"(?:\\(?!boxed|fbox).|[^\\{{}}]|\{{{_BALANCED}{{0,500}}\}})"
_BOX = rf"(?s)\\(?:boxed|fbox)\s*(?:\{{(?!\s*\}})({_BALANCED}{{1,500}})\}}|([-+]?\d[\d.,/]*))"
_AND = r"(?:(?:[,;]|\\text\s*\{\s*(?:and|or)\s*\}|and\b|or\b)[\s$]*)+"
_BETWEEN_BOXES = re.compile(rf"\.?[\s$]*{_AND}(?:[A-Za-z]\s*=[\s$]*)?")
_ENDING = re.compile(
    r"(?im)^[^\w\n]*(?:the )?(?:final )?answer[ \t\r*_:]*\n|####|^[ \t>]*(?-i:A:)"
    r"|(?<![a-z])answer[*_]*(?:\s+is\b|\s*[:=])[*_:]*|答案[是为]?[:：]?"
)
_BODY = re.compile(r"(?:\s|(?<=\n)>)*(\*+|__?|\$\$|\\\[|)[ \t]*\n?([^\n]*)")
_TAKEN_BACK = r".{0,300}(?:\bnot?\b|n't|wrong|false|incorrect|\bbut\b|\bif\b|unless|instead|wait)"
_REASON = re.compile(rf"(?:,\s(?:so|which|hence|thus)|,?\s(?:because|since))\b(?!{_TAKEN_BACK})")


def extract_answer(text):
    """The final answer of a response, or None."""
    found = _find(text) if isinstance(text, str) else None
    return found[0] if found else None


def answer_step(steps):
    """The index of the step that holds the response's answer; the last where nothing marks one."""
    found = _find("\n\n".join(steps))
    ends = accumulate(len(step) + 2 for step in steps)
    return sum(end <= found[1] for end in ends) if found else len(steps) - 1


def _find(text):
    """(the answer, where it starts), or None."""
    if text.rfind("<think>") > text.rfind("</think>"):
        return None
    m = _REGION.match(text)
    whole = m[1] and m[2].strip()
    return _boxed(text, *m.span(2)) or _ending(text, *m.span(2)) or whole and (whole, m.start(2))


def _boxed(text, start, end):
    """The last box, of nested ones the innermost, and those that its sentence lists with it."""
    found, at, stop = "", 0, 0
    for m in re.compile(_BOX).finditer(text, start, end):
        listed = found and _BETWEEN_BOXES.fullmatch(text, stop, m.start())
        content = (m[1] or m[2]).strip()
        found = f"{found}, {content}" if listed else content
        at, stop = m.start(), m.end()
    return found and (found, at)


def _ending(text, start, end):
    """What follows the last textual ending."""
    endings = [m.end() for m in _ENDING.finditer(text, start, end)]
    if not endings:
        return None
    body = _BODY.match(text, endings[-1], end)
    line = re.split(r"\.\s|。", body[2], maxsplit=1)[0]
    line = line.replace(body[1], " ", 1)  # bold; a space, so that **2**0 does not become 20
    line = _REASON.split(line, maxsplit=1)[0].strip(" \t\r*_")
    return line and (line, body.start(2))


def verify(response, answer):
    """Does the response's answer equal `answer`, a bare answer or itself a worked solution?"""
    found = extract_answer(response)
    return found is not None and answer_key(found) == answer_key(extract_answer(answer) or answer)


def answer_key(answer):
    """Hashable canonical form of a bare answer; votes are grouped by it."""
    number = isinstance(answer, (int, float)) and abs(answer) < 1e99
    text = str(answer) if number or isinstance(answer, str) else ""
    spelled = _spell(text) if len(text) <= MAX_CHARS else ""
    short = 0 < len(spelled.split()) <= MAX_TOKENS
    return _key(spelled) if short else ("text", " ".join(text.split()))


# ---- Normalise: one spelling for what can be spelled in many ways ------------------------------

_STYLE = r"\\(?:text[a-z]*|mbox|math(?:rm|bf|it|sf)|operatorname|emph|bm|boldsymbol)\s*"
_LETTERS = r"(?<![\\A-Za-z'])([A-Za-z]{2,}|[mgshL]\b)"
_CLOSES = r"[^(\[{]*(?:[)\]]|\\\})"  # the next bracket: (1,234) is a pair
_REWRITES = (
    (r"[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}"),
    (r"[₀-₉]+", r"_{\g<0>}"),
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|[\u2009\u202f])(?=\d{3}(?!\d))", ""),  # 1{,}000
    (r"[¼-¾⅐-⅞]", r" \g<0>"),
    (r"(?s).+", lambda m: normalize("NFKC", m[0])),  # full width, and the digits above
    (r"^[\s$]*(?:=|\\approx(?![a-z])|\\Rightarrow|\\therefore)", ""),
    (r"\+\s*(?=\\infty|∞)", ""),
    (r"\\(?:(?:text)?color|[hv]space|tag|label)\*?\s*\{[^{}]*\}|(?<=\\\\)\[[\d.]+ ?[a-z]+\]", " "),
    (r"\\(begin|end)\s*\{(?:[pbB]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|]*\})?", r"\\\1matrix "),
    (rf"(?<![\d,.])[1-9]\d{{0,2}}(?:,\d{{3}})+(?!,?\d|{_CLOSES})", lambda m: m[0].replace(",", "")),
    (r"frac\s*(\w)\s*(\w)", r"frac{\1}{\2}"),
    (r"\\sqrt\s*\[([2-9])\]", r"\\root{\1}"),
    (r"_(\w)", r"_{\1}"),  # so that no two numbers meet, as in \log_2 3
    (r"(?:\{|^)([^{}]*)\\over(?![a-z])([^{}]*)(?:\}|$)", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"(?<![\d.^])(\d+)(?:\s|\\ |\\,)*\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\2/\3)"),
    (r"(?<![\d.^/])(\d+)\s+(\d+)[/⁄](\d+)(?!\s*[\d./])", r"(\1+\2/\3)"),  # 1 1/2
    (r"(?<=\d)(?: x |x(?=10\^))(?=\d)", r"\\times "),
    (r"(?:\^\s*\{?\s*\\circ\s*\}?|°|\\degree)(?:\s*\\text\{\s*[CF]\s*\}|\s*[CF]\b)?", " 'degree "),
    (r"(?:\\|(?<![A-Za-z\\]))(sin|cos|tan|cot|ln|log|pi|sqrt)(?=[xyzn]?(?![A-Za-z]))", r"\\\1 "),
    (r"(?i)(?<![a-z])([ap])\.\s?m\b\.?", r" \1m "),
    (_STYLE + r"\{([^{}]*)\}", lambda m: re.sub(_LETTERS, r" '\1 ", f" {m[1]} ")),
    (r"(?:(?<=[\d})])(?:\s|~|\\ )+|(?<=/))([mgshL])\b", r" '\1 "),  # 5 m, km/h
    (r"^\W*'?([A-J])\s*[.)][\s~\\}]+\$?(?:\\frac\{)?\d[\d.,/$\s{}]*$", r"\1"),  # (A) 13
    (r"^([\s$]*[A-Za-z]\s*)(?:\\in(?![a-z])|∈)", r"\1="),
)
# The spelling that is kept (~ stands between two tokens) follows the arrow.
_SAME = dict(pair.split("→") for pair in r"""
    \dfrac→\frac \tfrac→\frac \cfrac→\frac \sqrt→\root~{~2~} √→\root~{~2~} π→\pi ∞→\infty inf→\infty
    infinity→\infty \cdot→* ·→* ⋅→* ∙→* ×→\times \div→/ ÷→/ ⁄→/ −→- –→- ;→, \cup→, ∪→, \lor→,
    \vee→, \&→, and→, or→, \lt→< \gt→> \leq→\le \leqslant→\le ≤→\le \geq→\ge \geqslant→\ge ≥→\ge
    \neq→\ne ≠→\ne \lbrace→\{ \rbrace→\} \vert→| \lvert→| \rvert→| ±→\pm \mp→\pm \dots→\ldots
    \cdots→\ldots \emptyset→\{~\} \varnothing→\{~\} ∅→\{~\} percent→'percent %→'percent \%→'percent
    hundred→*~100 thousand→*~1000 million→*~1000000 billion→*~1000000000
    $→ \$→ ~→ £→ €→ ₹→ \euro→ \pounds→ usd→ eur→ gbp→ Rs→ \→ \left→ \right→ \,→ \!→ \;→ \:→ \quad→
    \qquad→ \(→ \)→ \[→ \]→ \big→ \Big→ \bigg→ \Bigg→ \bigl→ \bigr→ \Bigl→ \Bigr→ \large→ \Large→
    \LARGE→ \huge→ \displaystyle→ \rm→ \bf→ \bm→ \boldsymbol→ \text→ \mathrm→ \mathbf→ \textbf→
    \underline→ \boxed→ \fbox→""".split())
# Without a final s or es. What changes a value (dozen, half, more, decrease, loss) is no unit.
_UNIT = "|".join(r"""
    m g s h L mm cm dm km inch in ft foot feet yd yard mi mile (?:milli|centi|kilo)?(?:meter|gram)
    mg kg oz ounce lb pound ton ml liter gallon quart pint cup sec second min minute hrs hour day
    week month year old mph hz kw watt volt joule newton atm mol ev calorie degree celsius rad
    radian unit sq square cubic dollar cent penny euro rupee yen percent profit increase time way
    each total person people men women child children kid boy girl student teacher friend player
    worker animal bird fish dog cat cow egg leg apple orange fruit cookie cake slice piece toy
    marble ball coin card ticket book page letter word question problem point goal game step trip
    car house room chair table box bag bottle flower tree item number digit solution value group
    """.split())
_UNIT = f"(?:{_UNIT})(?:e?s)?"
_WORD = re.compile(rf"am|pm|no|is|of|to|ii+|{_UNIT}|(?=...)[a-z]*[aeiou][a-z]*")
_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4}(?![A-Za-z0-9]))?"
_TOKEN = re.compile(rf"'?[A-Za-z]+|{_NUMBER}|\\[A-Za-z]+|\\\S|\S")


def _spell(text):
    """Tokens between spaces. Words have a leading quote ('cm): none is taken for a product."""
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    out = []
    for token in _TOKEN.findall(text):
        word = token.lstrip("'").lower()
        if (kept := _SAME.get(token, _SAME.get(word))) is not None:
            new = kept.split("~") if kept else []
        elif len(word) > 1 and word.isalpha() and (token[0] == "'" or _WORD.fullmatch(word)):
            new = ["'" + word]
        else:
            new = list(token) if token.isalpha() else [token]
        if new == [","] == out[-1:] or new == ["."] and out and out[-1][0] == "'":  # ", and"; "ft."
            continue
        out += new
    return " ".join(out[:-1] if out[-1:] in (["."], [","]) else out)


# ---- Split: lists, names and equations, inequalities, brackets. The rest is a value or a text --

_OPEN = {"(", "[", "{", "\\{", "\\beginmatrix"}
_CLOSE = {")", "]", "}", "\\}", "\\endmatrix"}
_BRACKETED = re.compile(r"(\(|\[|\\?\{|\\beginmatrix) (.+) (\)|\]|\\?\}|\\endmatrix)")
_CALL = r"\\(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp)\b"
_LETTER = r"(?:'?[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|omega))"
_UNKNOWN = rf"(?![ei]$){_LETTER}(?: {_LETTER})*(?: _ \{{ [^{{}}]*\}})?"
_NAME = re.compile(
    rf"(?:m )?(?:\\angle )?{_UNKNOWN}(?: ')*(?: \^ \{{ - 1 \}}(?= \())?(?: \( [^()+-]*\))?"
    r"|[A-Z] \^ \{ - 1 \}|\| [A-Z] [A-Z] \||\\frac \{ d [a-z] \} \{ d [a-z] \}"
    r"|\( (?:[A-Za-z] , )+[A-Za-z] \)|(?:m )?\\angle '[a-z]+|'(?:answer|area|volume|total|sum)"
)
_UNIT = rf"'{_UNIT}(?: \^(?: \{{)?(?: -)? [123](?: \}})?)?"
_UNITS = re.compile(rf" (?:\( )?{_UNIT}(?:(?: [/*]| 'per)? {_UNIT})*(?: \))?$")
_SIZE = re.compile(r"\d (?:\\times (?!10 \^))?\.?\d")  # 7 x 9 is not 63, nor is 2 3


def _split(text, separator):
    """Split at the separators outside all brackets; None where brackets do not balance."""
    tokens = text.split(" ")
    depths = [0, *accumulate((token in _OPEN) - (token in _CLOSE) for token in tokens)]
    if min(depths) < 0 or depths[-1]:
        return None
    cuts = [i for i, token in enumerate(tokens) if token == separator and not depths[i]]
    return [" ".join(tokens[a + 1 : b]) for a, b in pairwise([-1, *cuts, len(tokens)])]


def _key(text):
    """Canonical form of a whole answer, or of what stands between two brackets."""
    members = []  # (name, key)
    for part in _split(text, ",") or [text]:
        signs = "+-" if part.count("\\pm") == 1 else ["\\pm"]  # 1 \pm \sqrt2 is a list of two
        members += [_equation(part.replace("\\pm", sign)) for sign in signs]
    names, keys = zip(*members)
    if len(keys) == 1:
        return keys[0]
    several = set(names) - {""}
    if len(several) == len(keys):  # x=5, y=3
        return "tuple", "(", ")", tuple(key for _, key in sorted(members))
    return "list", frozenset(Counter(members if len(several) > 1 else keys).items())


def _equation(text):
    """(name or "", key) of a name before a value, a chain of equal values, or an equation."""
    sides = _split(text, "=") or [text]
    if len(sides) == 1:
        return "", _item(_interval(text))
    names = [side for side in sides if _NAME.fullmatch(side)]
    values = [side.replace("\\times", "*") for side in sides if side not in names]
    keys = set(map(_item, values))
    if len(keys) == 1:
        return "".join(names[:1]), keys.pop()
    return "", ("=", frozenset(map(_item, sides)))


def _interval(text):
    """0 < x \\le 2 becomes (0, 2], and x > 3 becomes (3, \\infty)."""
    sides = re.split(r" (<|>|\\le|\\ge) ", text)
    if not re.fullmatch(r"(?:<|\\le){1,2}|(?:>|\\ge){1,2}", "".join(sides[1::2])):
        return text
    if sides[1] in (">", "\\ge"):
        sides.reverse()
    named = [bool(re.fullmatch(_UNKNOWN, side)) for side in sides[::2]]
    if named not in ([True, False], [False, True], [False, True, False]):
        return text
    sides = ["- \\infty", "<"] * named[0] + sides + ["<", "\\infty"] * named[-1]
    low, left, _, right, high = sides
    return f"{'[' if 'e' in left else '('} {low} , {high} {']' if 'e' in right else ')'}"


def _item(text):
    bare = _UNITS.sub("", text)
    if bare != text and not re.search(_CALL, text):  # \sin 30^\circ is not \sin 30
        key = _item(bare)
        return key if key[0] != "text" else ("text", text)
    m = _BRACKETED.fullmatch(text)
    parts = m and _split(m[2], ",")  # None in (1)(2), whose outer brackets do not belong together
    if parts:
        opening, inner, closing = m.groups()
        if opening == "\\beginmatrix":
            rows = [_split(row, "&") for row in _split(inner, "\\\\") if row]
            return "matrix", tuple(tuple(map(_key, row)) for row in rows)
        if opening in ("(", "[") and len(parts) > 1:
            return "tuple", opening, closing, tuple(map(_key, parts))
        if opening != "[" or inner.startswith("\\beginmatrix"):  # (5), {5} and \{5\} are 5
            return _key(inner)
    try:
        rest = ["", *reversed(text.split(" "))]
        value = _sum(rest)
        if rest == [""] and not _SIZE.search(text):
            return "value", frozenset(value.items())
    except ValueError:  # not understood, or too expensive
        pass
    return "text", text


# ---- Compare: recursive descent straight into exact values {monomial: Fraction} ----------------
# A monomial is a frozenset of (base, exponent) pairs. A base is a prime or -1 (its exponent then
# lies strictly between 0 and 1: whole powers move into the coefficient), a symbol, or a tuple for
# something opaque such as 101_2 or \ln 2. sqrt(8)/3 + 2 pi is {{(2, 1/2)}: 2/3, {(\pi, 1)}: 2}.

_ONE = frozenset()
_SYMBOL = rf"(?:{_LETTER}|\\pi)$"
_FACTOR = re.compile(rf"(\*|/|\\times)$|\.?[0-9]|\($|\\(?:frac|root)$|{_CALL}|{_SYMBOL}")


def _sum(rest):
    """A sum of products. The parser's functions take tokens from the end of the reversed list."""
    total = Counter()
    while True:
        term = _factor(rest)
        while m := _FACTOR.match(rest[-1]):
            operator = m[1] and rest.pop()
            term = _times(term, _power(_factor(rest), -1 if operator == "/" else 1))
        total.update(term)
        if rest[-1] not in ("+", "-"):
            return {m: c for m, c in total.items() if c}


def _factor(rest):
    """A signed power: a - b is the sum of a and the factor -b."""
    if rest[-1] in ("+", "-"):
        return _times({_ONE: Fraction(rest.pop() + "1")}, _factor(rest))
    value = _atom(rest)
    exponent = _factor(rest) if rest[-1] == "^" and rest.pop() else {_ONE: 1}
    if exponent.keys() - {_ONE}:
        return _opaque("^", value, exponent)
    return _power(value, exponent.get(_ONE, 0))


def _atom(rest):
    token = rest.pop()
    if re.match(r"\.?[0-9]", token):  # unlike TeX, 2^10 is 1024
        value = {_ONE: Fraction(token)} if Fraction(token) else {}
    elif token in ("(", "{"):
        value = _sum(rest)
        if rest.pop() != (")" if token == "(" else "}"):
            raise ValueError
    elif token == "\\frac":
        value = _times(_atom(rest), _power(_atom(rest), -1))
    elif token == "\\root":
        degree = _atom(rest).get(_ONE, 1)
        value = _power(_atom(rest), 1 / degree)
    elif re.match(_CALL, token):  # \sin 2x is the sine of 2x
        scripts = _script(rest, "_"), _script(rest, "^")
        braced = rest[-1] in ("(", "{")
        argument = _atom(rest) if braced else _factor(rest)
        while not braced and re.match(rf"[0-9.]|\\frac$|\\root$|{_SYMBOL}", rest[-1]):
            argument = _times(argument, _factor(rest))
        value = _opaque(token, *scripts, argument)
    elif re.match(_SYMBOL, token):
        base = (-1, Fraction(1, 2)) if token == "i" else (token.strip("'"), Fraction(1))
        value = {frozenset([base]): Fraction(1)}
        if rest[-1] == "(" and (token in "fghFGHP" or rest[-3:-2] == [")"]):  # f(x+1), y(0)
            value = _opaque(token, _atom(rest))
    else:
        raise ValueError
    index = _script(rest, "_")  # x_1 is a symbol of its own, and so is 101_2
    return _opaque("_", value, index) if index else value


def _script(rest, mark):
    return _atom(rest) if rest[-1] == mark and rest.pop() else {}


def _opaque(name, *values):
    base = (name, *(frozenset(value.items()) for value in values))
    return {frozenset([(base, Fraction(1))]): Fraction(1)}


def _times(a, b):
    if len(a) * len(b) > MAX_TERMS:
        raise ValueError
    out = Counter()
    for (m, p), (n, q) in product(a.items(), b.items()):
        exponents, coefficient = Counter(dict(m)), p * q
        exponents.update(dict(n))
        for base, exponent in exponents.items():
            if isinstance(base, int):  # whole powers of primes and of -1 leave the monomial
                whole = exponent // 1
                if abs(whole) * base.bit_length() > MAX_BITS:
                    raise ValueError
                coefficient *= Fraction(base) ** whole
                exponents[base] -= whole
        out[frozenset(item for item in exponents.items() if item[1])] += coefficient
    return {m: c for m, c in out.items() if c}


def _power(value, q):
    if not value and q <= 0:
        raise ValueError  # division by zero, 0^0
    if not value or q == 1:
        return value
    if q.denominator == 1 and 1 < q <= 12 and len(value) > 1:
        return _times(value, _power(value, q - 1))
    if q == -1 and len(value) == 2:  # 1/(a+b) = (a-b)/(a^2-b^2), of use where that is rational
        (m, a), (n, b) = value.items()
        conjugate = {m: a, n: -b}
        norm = _times(value, conjugate)
        if norm.keys() == {_ONE}:
            return _times(conjugate, {_ONE: 1 / norm[_ONE]})
    # Pull out a coefficient, as in 1/(2x+2) = 1/2 1/(x+1); what is left may be opaque.
    monomial = min(value, key=lambda m: sorted(map(str, m)))
    first = value[monomial]
    rest = {m: c / first for m, c in value.items()}
    exponents = Counter({-1: q.numerator if q.denominator % 2 else q} if first < 0 else ())
    for n, exponent in (abs(first.numerator), q), (first.denominator, -q):
        for d in range(2, min(n, 999) + 1):  # prime as far as small divisors tell
            while n % d == 0:
                exponents[d] += exponent
                n //= d
        exponents[n] += exponent
    if q.denominator == 1 and len(value) == 1:
        exponents.update({base: exponent * q for base, exponent in monomial})
    elif rest != {_ONE: 1}:
        exponents["sum", frozenset(rest.items())] = q
    del exponents[1]
    return _times({frozenset(exponents.items()): Fraction(1)}, {_ONE: Fraction(1)})
