"""Ranks on a slow network, measured beside what plan.py scaling=true predicts of them.

    python benchmarks/scaling.py [--ranks 4] [--megabits 1000 200 50] [--steps 6]

Each rank of run_pretrain.py has a network namespace of its own whose sending is bounded (wire.py), which needs root or
the right to make namespaces. What a step computes is taken from the same ranks without a bound; bytes and the seconds
of sending are planning/machines.py's, which knows the arguments and the bound alone. DeepSpeed on CPUs computes, then
sends; DDP sends while the backward runs, so that its step lies between all hidden and nothing hidden, and is held
against the nearer end.
"""

import argparse
import json

import wire

from smolpretrain import plan
from smolpretrain.core.architectures import load_config
from smolpretrain.planning import assemble, counting, hardware, machines

ROWS = ["block_size=256", "per_device_train_batch_size=2", "optim=adamw_torch", "learning_rate=1e-3", "warmup_steps=2"]
ONE_TO_OWNER = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "use_multi_rank_bucket_allreduce": False},
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping", "train_batch_size"), "auto"),
    "train_micro_batch_size_per_gpu": "auto",
}
KINDS = {
    "DDP": ["deepspeed=null"],
    "ZeRO-1, accumulation 2": ["deepspeed=ds_configs/zero1.json", "gradient_accumulation_steps=2"],
    "ZeRO-2": ["deepspeed=ds_configs/zero2.json"],
    "ZeRO-2, accumulation 2": ["deepspeed=ds_configs/zero2.json", "gradient_accumulation_steps=2"],
    "ZeRO-2, reduced to the owner": [f"deepspeed={json.dumps(ONE_TO_OWNER)}"],
    "ZeRO-3": ["deepspeed=ds_configs/zero3.json"],
}


def predict(words, ranks, rate, computing):
    """(bytes a rank sends, seconds of a step where sending hides, seconds where it does not) of machines.scale.

    Args:
        rate: Bits a second and rank; computing: seconds of a step without sending.
    """
    values, _ = plan.parse([*wire.WORDS, *words])
    config = load_config(values["model_name"], values["config_overrides"]).to_dict()
    content, _ = plan.deepspeed_config(values, ranks)
    setup = assemble.set_up(config, values, content, ranks, cuda=False)
    tokens = setup.micro_batch * setup.accumulation * setup.block_size
    peak = tokens * counting.flops(config, setup.block_size).model / computing
    device = hardware.Device("cpu", peak, 0.0, None, None, None, "measured without a bound")
    rows = machines.scale(setup, device, (1.0, 1.0, 1.0, "measured"), 1, rate / 8 if rate else None)
    row = next(row for row in rows if row["ranks"] == ranks)
    most, least = (row["tokens_a_step"] / each for each in row["tokens_per_second"])
    return row["sent_bytes"], least, most


def lines(name, words, ranks, found):
    """A row of the table for each bound, with how far bytes and seconds are off; the first is without a bound."""
    computing = found[0]["seconds"]
    for one in found:
        sent, least, most = predict(words, ranks, one["rate"], computing)
        bytes_off, off = one["bytes"] / sent - 1, 0.0
        cells = [name, f"{one['rate'] / 1e6:,.0f}" if one["rate"] else "none"]
        cells += [f"{one['bytes'] / 1e6:.2f} / {sent / 1e6:.2f}", f"{bytes_off:+.1%}", f"{one['seconds']:.3f}"]
        if one["rate"]:
            off = min((one["seconds"] / end - 1 for end in (least, most)), key=abs)
            off = 0.0 if least <= one["seconds"] <= most else off
            cells += [f"{least:.3f} to {most:.3f}" if most > least else f"{most:.3f}", f"{off:+.0%}"]
        else:
            cells += ["(taken)", ""]
        yield f"| {' | '.join(cells)} |", bytes_off, off


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, choices=[n for n in machines.NODES if n > 1])
    parser.add_argument("--megabits", type=float, nargs="+", default=[1000, 200, 50])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    flags = parser.parse_args()
    print(f"{flags.ranks} ranks on {wire.machine('scaling.py')}\n")
    print("| | Mbit/s | MB a rank a step / plan | off | s a step | plan, least to most | off |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    rates, worst = [None, *(each * 1e6 for each in flags.megabits)], [0.0, 0.0]
    for name in flags.only:
        words = [*ROWS, *KINDS[name]]
        for line, *off in lines(name, words, flags.ranks, wire.measure(words, flags.ranks, rates, flags.steps)):
            print(line, flush=True)
            worst = [max(before, abs(now)) for before, now in zip(worst, off, strict=True)]
    print(f"\nfurthest off: bytes {worst[0]:.1%}, seconds {worst[1]:.0%}")


if __name__ == "__main__":
    main()
