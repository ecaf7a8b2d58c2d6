"""Figures of the study as small SVG files that follow the reader's light or dark page: lines, traces, boxes."""
import math
import os

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#76b7b2", "#edc948")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 820, 340, 48, 52, 340, 40


class Panel:
    """One pair of axes, y from 0 to `top`, within left..right of a drawing; x by its value or its logarithm."""

    def __init__(self, xs, x_label, left=LEFT, right=WIDTH - RIGHT, log_x=False, margin=0.0, top=1.0):
        self.at = (lambda x: math.log2(x)) if log_x else float
        low, high = self.at(xs[0]) - margin, self.at(xs[-1]) + margin
        self.x = lambda x: round(left + (self.at(x) - low) / (high - low or 1) * (right - left), 1)
        self.y = lambda y: round(HEIGHT - BOTTOM - min(1, max(0, y / top)) * (HEIGHT - TOP - BOTTOM), 1)
        self.parts = []
        for tick in (0, top / 4, top / 2, 3 * top / 4, top):
            self.parts.append(f'<line class="g" x1="{left}" x2="{right}" y1="{self.y(tick)}" y2="{self.y(tick)}"/>')
            if left == LEFT:
                self.parts.append(text(left - 6, self.y(tick) + 4, f"{tick:.3g}", "end"))
        for x in xs if len(xs) < 9 else xs[::len(xs) // 6]:
            self.parts.append(text(self.x(x), HEIGHT - BOTTOM + 16, f"{x // 1000:,}k" if x >= 10_000 else f"{x:g}", "middle"))
        self.parts.append(text((left + right) / 2, HEIGHT - 6, x_label, "middle"))

    def line(self, points, colour, dashed=False):
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{" ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)}" fill="none" stroke="{colour}" '
                          f'stroke-width="2"{dash}/>')

    def band(self, points, colour):
        """points (x, mean, half an interval)."""
        edge = [f"{self.x(x)},{self.y(m + h)}" for x, m, h in points] + [f"{self.x(x)},{self.y(m - h)}" for x, m, h in reversed(points)]
        self.parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.15"/>')

    def box(self, x, offset, five, colour, width=9):
        """Whiskers from the first to the last of five quantiles, a box between the second and the fourth, a bar at the third."""
        low, q1, middle, q3, high = map(self.y, five)
        centre = self.x(x) + offset
        self.parts.append(f'<line x1="{centre}" x2="{centre}" y1="{low}" y2="{high}" stroke="{colour}"/>'
                          f'<rect x="{centre - width / 2}" y="{q3}" width="{width}" height="{max(1, round(q1 - q3, 1))}" fill="{colour}" opacity="0.6"/>'
                          f'<line x1="{centre - width / 2}" x2="{centre + width / 2}" y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="2"/>')


def text(x, y, what, anchor="start", size=11):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{what}</text>'


def legend(names, colours):
    return [f'<rect x="{WIDTH - RIGHT + 10}" y="{TOP + 6 + 18 * i}" width="10" height="10" fill="{colour}"/>'
            + text(WIDTH - RIGHT + 25, TOP + 15 + 18 * i, name) for i, (name, colour) in enumerate(zip(names, colours))]


def write(path, title, y_label, parts):
    """`title`: what the figure says, a newline, and what it shows."""
    finding, _, shown = title.partition("\n")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
            "<style>text{fill:#333}.g{stroke:#888;stroke-opacity:.3}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>",
            text(LEFT, 16, finding, size=14), text(LEFT, 34, shown),
            f'<text x="12" y="{middle}" transform="rotate(-90 12 {middle})" text-anchor="middle">{y_label}</text>']
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write("\n".join(head + parts + ["</svg>"]) + "\n")


def lines(path, title, series, x_label, y_label, log_x=False, level=None):
    """{name: [(x, mean, half an interval)]} as lines with bands, named from the highest end down; a dashed line at a
    `level` (name, y)."""
    xs = sorted({x for points in series.values() for x, _, _ in points})
    top = 0.5 if max(m + h for points in series.values() for _, m, h in points) <= 0.5 else 1
    panel, colours = Panel(xs, x_label, log_x=log_x, top=top), dict(zip(series, COLOURS * 3))
    for name, points in series.items():
        panel.band(points, colours[name])
        panel.line([p[:2] for p in points], colours[name])
    names = sorted(series, key=lambda name: -series[name][-1][1])
    if level:
        panel.line([(xs[0], level[1]), (xs[-1], level[1])], "#888", dashed=True)
    write(path, title, y_label, panel.parts + legend([*names, *(level or ())[:1]], [*[colours[n] for n in names], "#888"]))


def traces(path, title, solutions, x_label, y_label):
    """Side by side, one panel a solution: {"title", "first_error", "values": {name: [y...]}}; a dashed line at the error."""
    parts, names, width = [], list(solutions[0]["values"]), (WIDTH - LEFT - RIGHT) / len(solutions)
    for i, solution in enumerate(solutions):
        steps = list(range(1, len(next(iter(solution["values"].values()))) + 1))
        panel = Panel(steps, x_label, LEFT + i * width, LEFT + (i + 1) * width - 14)
        for name, colour in zip(names, COLOURS):
            panel.line(list(zip(steps, solution["values"][name])), colour)
        if solution["first_error"] >= 0:
            panel.line([(solution["first_error"] + 1, 0), (solution["first_error"] + 1, 1)], "#888", dashed=True)
        parts += panel.parts + [text(LEFT + i * width + 2, TOP - 4, solution["title"], size=10)]
    write(path, title, y_label, parts + legend([*names, "first wrong step"], [*COLOURS[:len(names)], "#888"]))


def boxes(path, title, groups, x_label, y_label):
    """{name: [five quantiles at x = 1, 2, ...]} as boxes side by side."""
    panel = Panel(list(range(1, max(map(len, groups.values())) + 1)), x_label, margin=0.5)
    for i, (name, rows) in enumerate(groups.items()):
        for x, five in enumerate(rows, 1):
            panel.box(x, 12 * (i - (len(groups) - 1) / 2), five, COLOURS[i])
    write(path, title, y_label, panel.parts + legend(groups, COLOURS))
