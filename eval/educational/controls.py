"""What is known about the items without a model: balance, baselines that see only the options, facts recomputed.

    python eval/educational/controls.py

The options come in sets of four that serve four items, each option being right once. So whatever looks at the options
alone, a language model without the question included, is right on a quarter of them exactly: by construction, not by
tuning to one model. (Where it cannot decide between options it gets the share of a guess among them.)
"""

import ast
import datetime
import math
import runpy
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "in_place.py"))

import rich.table

from smolpretrain.eval.educational.items import read_items

NAMES = {"Fraction": Fraction, "datetime": datetime.datetime, "date": datetime.date, "math": math}
NAMES |= {"round": round, "format": format}
NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant, ast.Name, ast.Load),
    *(ast.Attribute, ast.Call, ast.Subscript, ast.Dict, ast.Tuple, ast.JoinedStr, ast.FormattedValue),
)


def recompute(check):
    """Return the value of an item's check as text.

    Args:
        check: A Python expression of arithmetic, dictionaries and f-strings over datetime, math and Fraction.

    Raises:
        ValueError: It holds anything else, such as a comprehension, an underscored name or a call of another kind.
    """
    tree = ast.parse(check, mode="eval")
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", "")
        if not isinstance(node, NODES) or name.startswith("_") or (isinstance(node, ast.Name) and name not in NAMES):
            raise ValueError(f"{check!r} holds {name or type(node).__name__}, which a check may not.")
    return str(eval(compile(tree, "check", "eval"), {"__builtins__": {}}, dict(NAMES)))


def accuracy(items, value, best=max):
    """Share of items whose right option has the best value(option), a tie counted as a guess among the tied."""
    total = 0.0
    for item in items:
        values = list(map(value, item["options"]))
        target = best(values)
        total += (values[item["answer"]] == target) / values.count(target)
    return total / len(items)


def measure(items):
    """Return {what: figure} of the controls; shares are of 1, chance is 0.25."""
    sizes = [[len(option.encode()) for option in item["options"]] for item in items]
    positions = Counter(item["answer"] for item in items)
    checked = [item for item in items if "check" in item]
    right = sum(recompute(item["check"]) == item["options"][item["answer"]] for item in checked)
    return {
        "items": len(items),
        "sets of options": len({item["set"] for item in items}),
        "right option first, second, third, fourth": " ".join(str(positions[place]) for place in range(4)),
        "accuracy of the longest option": accuracy(items, len),
        "accuracy of the shortest option": accuracy(items, len, min),
        "accuracy of the first option in the alphabet": accuracy(items, str.lower, min),
        "longest over shortest option, mean": sum(max(size) / min(size) for size in sizes) / len(sizes),
        "longest over shortest option, most": max(max(size) / min(size) for size in sizes),
        "checks that give the right option": f"{right} of {len(checked)}",
    }


def main():
    """Print the controls and how many items each subject has at each level."""
    items = read_items()
    levels = list(dict.fromkeys(item["level"] for item in items))
    table = rich.table.Table("subject", *levels, "items", title="Educational benchmark")
    counts = Counter((item["subject"], item["level"]) for item in items)
    for subject in dict.fromkeys(item["subject"] for item in items):
        row = [counts[subject, level] for level in levels]
        table.add_row(subject, *map(str, row), str(sum(row)))
    rich.print(table)
    for what, figure in measure(items).items():
        print(f"{what}: {figure:.3f}" if isinstance(figure, float) else f"{what}: {figure}")


if __name__ == "__main__":
    main()
