"""What a step of two ranks pays for the guards: sharing the losses, judging them, agreeing whether to stop.

    python benchmarks/guards.py [--ranks 2] [--steps 40] [key=value ...]

One run of run_pretrain.py under `deepspeed` with its defaults (ZeRO-2, 8-bit AdamW). Before each guard the ranks meet,
so that none pays for a slower one; a step's time leaves those meetings out. Medians over all steps but the first eight.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM = 8
WORDS = ["model_name=smollm2-1m", "tokenizer_name=train", "block_size=512", "per_device_train_batch_size=4",
         "gradient_accumulation_steps=2", "warmup_steps=2", "validation_fraction=0", "save_strategy=no",
         "sample_steps=0", "disable_tqdm=true"]  # fmt: skip
seconds = {"losses shared and judged": [], "stop agreed": []}
meeting = 0.0


def timed(method, name, first=False):
    """The method with its time noted under name; a step's later parts are added to its first."""

    def measured(*args, **kwargs):
        global meeting
        before = time.perf_counter()
        dist.barrier()
        began = time.perf_counter()
        meeting += began - before
        result = method(*args, **kwargs)
        taken = time.perf_counter() - began
        if first:
            seconds[name].append(taken)
        else:
            seconds[name][-1] += taken
        return result

    return measured


def inside(words):
    """One rank; the first prints the medians."""
    ends, train = [], run_pretrain.train
    Divergence, Stop = divergence.Divergence, run_pretrain.guards.StopTogether
    watch, losses, stop = Divergence.watch, "losses shared and judged", "stop agreed"
    shared = timed(watch, losses, first=True)
    Divergence.watch = lambda self, loss, last: (shared if last else watch)(self, loss, last)
    Divergence.on_step_end = timed(Divergence.on_step_end, losses)
    agree = timed(Stop.on_step_end, stop, first=True)

    def on_step_end(*args, **kwargs):
        agree(*args, **kwargs)
        ends.append(time.perf_counter() - meeting)

    def then(*args):
        train(*args)
        steps = [after - before for before, after in itertools.pairwise(ends)][WARM:]
        if run_pretrain.RANK == 0:
            found = {name: statistics.median(values[WARM:]) for name, values in seconds.items()}
            print("measured", json.dumps({"step": statistics.median(steps)} | found), flush=True)

    Stop.on_step_end, run_pretrain.train = on_step_end, then
    run_pretrain.main(words)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as output_dir:
        words = [*WORDS, f"max_steps={args.steps}", f"output_dir={output_dir}", *args.words]
        command = [Path(sys.executable).parent / "deepspeed", "--num_gpus", str(args.ranks), __file__, *words]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("measured "))
    found = json.loads(line.removeprefix("measured "))
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), "an unknown CPU")
    print(f"{os.cpu_count()} cores of {cpu}; {args.ranks} ranks; {' '.join([*WORDS[:5], *args.words])}\n")
    print("| | ms | share of a step |\n|---|---:|---:|")
    for name, value in found.items():
        print(f"| {name} | {1000 * value:,.2f} | {value / found['step']:.2%} |")


if __name__ == "__main__":
    if "RANK" in os.environ:
        import torch.distributed as dist

        sys.path.insert(0, str(ROOT))
        from smolpretrain import run_pretrain
        from smolpretrain.training.safety import divergence

        inside([word for word in sys.argv[1:] if not word.startswith("--local_rank")])
    else:
        main()
