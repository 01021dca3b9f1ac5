"""Pictures of a run and of a comparison, as PNG, in the colours of Okabe and Ito (2008), told apart by marks as well.

Five inches wide: on a phone's page, 360 pixels, letters of 10 points are still 10 pixels high.
"""

import textwrap
from contextlib import contextmanager

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, LogFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


@contextmanager
def drawing(path, panels=1, heights=(1,), height=3.2):
    """Axes, one above another with a shared x; the picture is written to path at the end."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with plt.rc_context(style | {"grid.alpha": 0.3, "axes.titlesize": 11, "axes.titlelocation": "left"}):
        figure, axes = plt.subplots(
            panels, 1, sharex=True, figsize=(5, height), height_ratios=heights, layout="constrained", squeeze=False
        )
        try:
            yield axes[:, 0]
            figure.savefig(path, dpi=200, metadata={"Software": None})  # the same bytes from the same numbers
        finally:
            plt.close(figure)


def _wrapped(label):
    """A label in lines of 18 letters, so that it leaves room for what it names."""
    return "\n".join(textwrap.wrap(label, 18))


def plot_intervals(path, title, unit, rows):
    """A dot a model with its interval; rows: (label, value, low or None, high or None), best on top."""
    with drawing(path, height=1.1 + 0.42 * len(rows)) as (axis,):
        for place, (_, value, low, high) in enumerate(reversed(rows)):
            colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
            axis.plot(value, place, mark, color=colour)
            if low is not None:
                axis.plot([low, high], [place, place], color=colour, lw=2, alpha=0.6)
            axis.annotate(f"{value:.3g}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)
        axis.set_yticks(range(len(rows)), [_wrapped(label) for label, *_ in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.2)
        axis.margins(x=0.12)
        axis.set_xlabel(unit)
        axis.set_title(title)


def plot_bars(path, title, unit, rows, log=True):
    """A bar a model and measure; rows: {measure: [(label, value), ...]}."""
    labels = [label for label, _ in next(iter(rows.values()))]
    with drawing(path, height=1.3 + 0.55 * len(labels)) as (axis,):
        for number, (name, values) in enumerate(rows.items()):
            places = np.arange(len(labels))[::-1] - 0.38 * number + 0.19
            bars = axis.barh(places, [value for _, value in values], 0.36, color=COLOURS[number], label=name)
            axis.bar_label(bars, fmt="{:,.0f}" if log else "{:.2f}", padding=3, fontsize=9)
        axis.set_yticks(np.arange(len(labels))[::-1], map(_wrapped, labels))
        if log:
            axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.set_xlabel(unit)
        axis.set_title(title)
        axis.figure.legend(loc="outside lower center", ncols=2, frameon=False)


def plot_loss(path, trained, held_out):
    """Loss against tokens, learning rate below; rows of metrics.jsonl that have `loss`, and those with `eval_loss`."""
    with drawing(path, 2, (3, 1), 4.2) as (top, bottom):
        top.plot(*series(trained, "loss"), color=COLOURS[0], lw=1, label="training")
        if held_out:
            top.plot(*series(held_out, "eval_loss"), "o-", ms=4, color=COLOURS[1], label="held out")
        bottom.plot(*series(trained, "learning_rate"), color=COLOURS[2])
        top.set_ylabel("loss (nats/token)")
        top.legend(frameon=False)
        bottom.set_ylabel("learning\nrate")
        _tokens_axis(bottom)


def plot_lines(path, panels, log=False):
    """Lines against tokens seen, panels one above another; panels: [(unit, {label: (tokens, values)}), ...]."""
    with drawing(path, len(panels), (1,) * len(panels), 1.6 + 1.4 * len(panels)) as axes:
        for axis, (unit, lines) in zip(axes, panels, strict=True):
            for number, (label, (tokens, values)) in enumerate(lines.items()):
                mark = MARKS[number % len(MARKS)] if len(tokens) < 30 else None
                colour = COLOURS[number % len(COLOURS)]
                axis.plot(tokens, values, marker=mark, ms=4, color=colour, lw=1.2, label=label)
            if len(lines) > 1:
                axis.legend(frameon=False, ncols=4)
            if log:
                axis.set_yscale("log")
                axis.yaxis.set_minor_formatter(LogFormatter())
                axis.yaxis.set_major_formatter(LogFormatter())
            axis.set_ylabel(unit)
        _tokens_axis(axes[-1])


def series(rows, key):
    """(tokens seen, values) of the rows that have the key."""
    rows = [row for row in rows if row.get(key) is not None]
    return [row["tokens_seen"] for row in rows], [row[key] for row in rows]


def _tokens_axis(axis):
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("tokens seen")
