"""Figures of the study as small SVG files that follow the reader's light or dark page.

A method has one colour in all of them; a dashed or dotted line is the same method otherwise used.
No figure has more than four curves: the tables have every row.
"""

import math
import os

from tables import METHODS, spread

GREY = "#888"
COLOURS = {
    "TDRM": "#4e79a7",
    "ScalarPRM": "#f28e2b",
    "ScalarORM": "#59a14f",
    "Q-RM": "#e15759",
    "ORM": "#9c755f",
    "DPO-RM": "#b07aa1",
    "PRIME": "#3aa6a0",
    "outcomes": GREY,  # the verifier alone
}
DASHES = {"": "", "dashed": ' stroke-dasharray="7 4"', "dotted": ' stroke-dasharray="2 3"'}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 700, 360, 48, 76, 16, 40

# --------------------------------------------------------------------------------------------------
# What a drawing is made of.


def text(x, y, what, anchor="start", size=11):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{what}</text>'


def segment(x1, y1, x2, y2, colour, width=1.5):
    points = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {points} stroke="{colour}" stroke-width="{width}"/>'


class Panel:
    """One pair of axes, y from 0 to `top`, between two x of a drawing."""

    def __init__(self, xs, x_label, left=LEFT, right=WIDTH - RIGHT, log=False, margin=0.0, top=1.0):
        self.xs, self.log, self.margin = xs, log, margin
        self.left, self.right, self.top = left, right, top
        self.parts = []
        step = 0.25 if top > 0.5 else 0.1
        for i in range(round(top / step) + 1):
            y = self.y(i * step)
            self.parts.append(f'<line class="g" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
            if left == LEFT:
                self.parts.append(text(left - 6, y + 4, f"{i * step:.2g}", "end"))
        for x in xs:
            name = f"{x // 1000:,}k" if x >= 10_000 else f"{x:g}"
            self.parts.append(text(self.x(x), HEIGHT - BOTTOM + 16, name, "middle"))
        self.parts.append(text((left + right) / 2, HEIGHT - 6, x_label, "middle"))

    def x(self, x):
        scale = math.log2 if self.log else float
        low, high = scale(self.xs[0]) - self.margin, scale(self.xs[-1]) + self.margin
        share = (scale(x) - low) / (high - low or 1)
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, y):
        share = min(1, max(0, y / self.top))
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, points, colour, style="", shift=0):
        path = " ".join(f"{self.x(x) + shift},{self.y(y)}" for x, y in points)
        look = f'fill="none" stroke="{colour}" stroke-width="2"{DASHES[style]}'
        self.parts.append(f'<polyline points="{path}" {look}/>')

    def interval(self, x, mean, half, colour, shift=0):
        place, low, high = self.x(x) + shift, self.y(mean - half), self.y(mean + half)
        self.parts.append(segment(place, low, place, high, colour))
        for y in (low, high):
            self.parts.append(segment(place - 3, y, place + 3, y, colour))


def legend(entries):
    """One row above the axes: (name, colour, style) each."""
    parts, x = [], LEFT
    for name, colour, style in entries:
        look = f'stroke="{colour}" stroke-width="3"{DASHES[style]}'
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{TOP - 22}" y2="{TOP - 22}" {look}/>')
        parts.append(text(x + 29, TOP - 18, name))
        x += 46 + round(5.7 * len(name))
    return parts


def write(path, title, shown, y_label, parts):
    """`title`: what the figure says; `shown`: what it shows."""
    middle = (TOP + HEIGHT - BOTTOM) / 2
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11"'
    dark = "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    turned = f'transform="rotate(-90 12 {middle})" text-anchor="middle"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f"<style>text{{fill:#333}}.g{{stroke:#888;stroke-opacity:.3}}{dark}</style>",
        text(LEFT, 16, title, size=14),
        text(LEFT, 34, shown),
        f'<text x="12" y="{middle}" {turned}>{y_label}</text>',
    ]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write("\n".join(head + parts + ["</svg>"]) + "\n")


def lines(path, title, shown, series, x_label, y_label, log=False, level=None):
    """{(name, method, style): [(x, mean, half an interval)]} as lines with intervals beside each
    other; a dotted line at a `level` (name, y)."""
    xs = sorted({x for points in series.values() for x, _, _ in points})
    highest = max(m + h for points in series.values() for _, m, h in points)
    top = next(top for top in (0.5, 0.75, 1) if highest <= top or top == 1)
    panel = Panel(xs, x_label, log=log, margin=0.15 if log else xs[-1] / 40, top=top)
    entries = []
    for i, ((name, method, style), points) in enumerate(series.items()):
        colour, shift = COLOURS[method], 6 * (i - (len(series) - 1) / 2)
        panel.line([p[:2] for p in points], colour, style, shift)
        for point in points:
            panel.interval(*point, colour, shift)
        entries.append((name, colour, style))
    if level:
        panel.line([(xs[0], level[1]), (xs[-1], level[1])], GREY, "dotted")
        entries.append((level[0], GREY, "dotted"))
    write(path, title, shown, y_label, panel.parts + legend(entries))


def dots(path, title, shown, rows, ticks, x_label, left=200):
    """[(name, number, low, high, colour)] one below the other; a row of a name alone is a heading.
    The axis goes from the first tick to the last; what reaches beyond is cut."""
    right, tall = WIDTH - RIGHT, (HEIGHT - BOTTOM - TOP + 24) / len(rows)
    parts = [text((left + right) / 2, HEIGHT - 6, x_label, "middle")]

    def x(number):
        share = (number - ticks[0]) / (ticks[-1] - ticks[0])
        return round(left + min(1, max(0, share)) * (right - left), 1)

    for tick in ticks:
        ends = f'x1="{x(tick)}" x2="{x(tick)}" y1="{TOP - 24}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line class="g" {ends}/>')
        parts.append(text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
    for i, (name, *numbers) in enumerate(rows):
        y = round(TOP - 24 + (i + 0.5) * tall, 1)
        parts.append(text(left - 12, y + 4, name, "end", size=11 if numbers else 12))
        if numbers:
            number, low, high, colour = numbers
            parts.append(segment(x(low), y, x(high), y, colour, 2))
            parts.append(f'<circle cx="{x(number)}" cy="{y}" r="3.5" fill="{colour}"/>')
    write(path, title, shown, "", parts)


# --------------------------------------------------------------------------------------------------
# The figures. A title says what the committed results show.


def traces(path, solutions):
    parts, width, names = [], (WIDTH - LEFT - RIGHT) / len(solutions), list(solutions[0]["values"])
    for i, solution in enumerate(solutions):
        left, wrong = LEFT + i * width, solution["first_error"] + 1
        steps = list(range(1, len(solution["values"][names[0]]) + 1))
        panel = Panel(steps, "step", left, left + width - 14, margin=0.2)
        for name in names:
            panel.line(list(zip(steps, solution["values"][name])), COLOURS[name])
        if wrong:
            panel.line([(wrong, 0), (wrong, 1)], GREY, "dashed")
        parts += panel.parts + [text(left + 2, TOP - 4, solution["title"], size=10)]
    entries = [(name, COLOURS[name], "") for name in names]
    entries.append(("first wrong step", GREY, "dashed"))
    title, shown = "A TDRM is less sure, and better calibrated", "along three held-out solutions"
    write(path, title, shown, "value", parts + legend(entries))


def search_figures(results, at):
    level = ("one sample", spread(results["pass@1 @ 1"])[0])

    def across(pattern):
        found = {}
        for m in METHODS:
            counts = [n for n in (2, 4, 8, 16, 32) if pattern.format(n, m) in results]
            points = [(n, *spread(results[pattern.format(n, m)])) for n in counts]
            found[m, m, ""] = points
        return found

    shown = "{} on 1000 held-out problems; 95% intervals"
    title = "Search wants a value for every step"
    greedy, x_label = across("greedy search {}, {} @ 1"), "next steps sampled from each prefix"
    shape = {"log": True, "level": level}
    path = at("greedy-search")
    lines(path, title, shown.format("greedy search"), greedy, x_label, "accuracy", **shape)
    title = "The best of many samples is the reward model's worst error"
    best, path = across("best-of-n, {1} @ {0}"), at("best-of-n")
    lines(path, title, shown.format("best-of-n"), best, "samples", "accuracy", **shape)


def choice(path, methods, sweep):
    """TDRM minus ScalarPRM, paired: under all seeds by b, and at b = 8 for what the sweep changes."""
    a, b = methods["TDRM, n = 1"], methods["ScalarPRM"]
    pairs = {"ten seeds, n = 1": None} | {key: (a[key], b[key]) for key in a}
    pairs |= {"five seeds, greedy, b = 8": None} if sweep else {}
    pairs |= {name: (row["TDRM"], row["ScalarPRM"]) for name, row in sweep.items()}
    rows = []
    for name, pair in pairs.items():
        rows.append([name])
        if pair:
            mean, half = spread([x - y for x, y in zip(*pair)])
            colour = COLOURS["TDRM" if mean > 0 else "ScalarPRM"]
            rows[-1] += [mean, mean - half, mean + half, colour]
    title = "Several right steps, labelled right or wrong: TD targets draw level, no more"
    shown = "accuracy with a TDRM minus accuracy with a ScalarPRM, paired by seed; 95% intervals"
    ticks = (-0.1, -0.05, 0, 0.05, 0.1)
    x_label = "left: ScalarPRM better (at the edge: by more); right: TDRM better"
    dots(path, title, shown, rows, ticks, x_label, left=240)


def budget(path, results):
    """Four of the learners."""
    series = {}
    for name, style in (
        ("DPO-RM, outcomes", ""),
        ("TDRM, outcomes", ""),
        ("ScalarPRM, step labels", ""),
        ("TDRM, step labels", "dashed"),
    ):
        if name in results:
            points = [(int(b), *spread(r)) for b, r in results[name].items()]
            series[name, name.split(",")[0], style] = points
    title = "For the same tokens, outcomes teach more than step labels"
    shown = "greedy search, b = 8, on 500 held-out problems; 95% intervals"
    lines(path, title, shown, series, "tokens sampled for data and labels", "accuracy", log=True)


CURVES = {  # part: what its figure says, {row: (its name there, method, style)}
    "rl": (
        "A reward model alone is gamed; blended with the verifier, it does not help",
        {
            "rule-only": ("rule-only", "outcomes", ""),
            "TDRM blend": ("TDRM blend", "TDRM", ""),
            "ScalarPRM blend": ("ScalarPRM blend", "ScalarPRM", ""),
            "PRM-only": ("TDRM only", "TDRM", "dashed"),
        },
    ),
    "prime": (
        "PRIME gains with the policy as reference and a trained PRM",
        {
            "outcomes only": ("outcomes only", "outcomes", ""),
            "policy reference, offline-trained PRM, online": (
                "policy as reference, trained PRM",
                "PRIME",
                "",
            ),
            "control: policy reference, offline-trained PRM, shuffled": (
                "the same, shuffled",
                "PRIME",
                "dotted",
            ),
            "PRIME": ("PRIME", "PRIME", "dashed"),
        },
    ),
    "qrm-rl": (
        "Of reward models from pairs, the log-ratio teaches",
        {
            "DPO-RM": ("DPO-RM", "DPO-RM", ""),
            "Q-RM": ("Q-RM", "Q-RM", ""),
            "ORM": ("ORM", "ORM", ""),
        },
    ),
}


def curves(path, part, results):
    title, rows = CURVES[part]
    series = {}
    for row, what in rows.items():
        if row in results:
            by_point = zip(*results[row]["curve"])
            series[what] = [(p[0][0], *spread([x[1] for x in p])) for p in by_point]
    shown = "pass@1 on held-out questions of 8 to 14 operations; 95% intervals"
    lines(path, title, shown, series, "questions seen", "pass@1")


def real(path, results):
    """Whose solution to take: the reward models' choices in their colours, the rest in grey."""
    rows = []
    for who, found in results["choices"].items():
        colour = COLOURS.get(who.removeprefix("best of four, "), GREY)
        rows.append((who, *found["accuracy"], colour))
    title = "On real text a small reward model, briefly trained, chooses no better than a vote"
    shown = "319 held-out questions of GSM8K; 95% intervals over the questions"
    dots(path, title, shown, rows, (0, 0.2, 0.4, 0.6, 0.8), "share of questions answered right")


def draw(results, folder):
    """All figures that the results allow."""

    def at(name):
        return os.path.join(folder, name + ".svg")

    if "tdrm" in results:
        traces(at("traces"), results["tdrm"]["traces"])
    if "search" in results:
        search_figures(results["search"], at)
    if "choice" in results:
        choice(at("choice"), results["choice"], results.get("choice-sweep", {}))
    if "budget" in results:
        budget(at("budget"), results["budget"])
    if "real" in results:
        real(at("real"), results["real"])
    for part in CURVES:
        if part in results:
            curves(at(part), part, results[part])
