"""The table of docs/recipes.md: what each recipe trains, on what, how long and for how much, as plan.py says it.

    python benchmarks/recipes_table.py            # prints the table
    python benchmarks/recipes_table.py --write    # and puts it into docs/recipes.md

A CPU's rate is measured by the plan, so that its time would change with the machine: it is left to the text.
"""

import argparse
import re
import shlex
from pathlib import Path

from smolpretrain import plan
from smolpretrain.planning.report import GIB, duration, size

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
H100S = "gpu=H100-SXM network_gbit_per_second=3200 price_per_gpu_hour=2.50"  # 8 a machine, EFA of AWS's P5
RUNS = {  # recipe: for what devices, in plan.py's words
    "cpu-10min": "gpu=cpu bf16=true",  # as CPUs with bfloat16 instructions run it: one table on every machine
    "smollm2-135m-1x24gb": "gpu=RTX-4090 price_per_gpu_hour=0.40",
    "smollm2-1.7b-4xl4": "gpus=4 gpu=L4 price_per_gpu_hour=0.80",
    "smollm2-1.7b-cosmopedia-4xl4": "gpus=4 gpu=L4 price_per_gpu_hour=0.80",
    "smollm2-135m": f"gpus=64 nodes=8 {H100S}",
    "smollm2-135m-decay": f"gpus=64 nodes=8 {H100S}",
    "smollm2-360m": f"gpus=128 nodes=16 {H100S}",
    "smollm2-1.7b": f"gpus=256 nodes=32 {H100S}",
}
HEAD = (
    "| recipe | parameters | tokens (a step) | on | time | memory of a device | cost | command |\n"
    "|---|---:|---:|---|---:|---:|---:|---|"
)


def command(name, values, plan_args):
    """How the recipe is launched on these devices."""
    recipe = f"run_pretrain.py configs/{name}.json"
    if values["deepspeed"] is None:
        return f"python {recipe}"
    return f"deepspeed {'--hostfile hostfile ' if plan_args.nodes > 1 else ''}{recipe}"


def row(name, words):
    """One line of the table."""
    values, plan_args = plan.parse([str(CONFIGS / f"{name}.json"), *shlex.split(words)])
    made, device, _ = plan.plan_of(values, plan_args)
    data, time, memory = made["data"], made["time"], made["memory"]
    cpu = device.name == "cpu"
    room = "" if cpu else f" of {memory['device_bytes'] / GIB:.1f}"
    cells = (
        f"[{name}](../configs/{name}.json)",
        size(made["model"]["total"]),
        f"{size(data['tokens'])} ({size(data['tokens_a_step'])})",
        "2 CPU cores" if cpu else f"{plan_args.gpus} x {device.name}",
        "see below" if cpu else duration(time["hours"]),
        f"{memory['total_bytes'] / GIB:.1f}{room} GiB",
        f"{time['money']:,.0f}" if time["money"] is not None else "",
        f"`{command(name, values, plan_args)}`",
    )
    return f"| {' | '.join(cells)} |"


def table():
    return "\n".join([HEAD, *(row(name, words) for name, words in RUNS.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table of docs/recipes.md")
    made = table()
    if parser.parse_args().write:
        path = CONFIGS.parent / "docs" / "recipes.md"
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"\| recipe \|.*?\n(?=\n)", lambda _: made + "\n", text, flags=re.S), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
