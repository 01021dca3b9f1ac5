"""Training time on this CPU beside the plan's: its measured matrix product, and an MFU measured on another size.

    python benchmarks/plan_time.py [--steps 10] [--cpu_seconds]

Each size trains through run_pretrain.py (no DeepSpeed, fused AdamW, bf16 autocast) in a process of its own; the first
four steps are left out. The utilization of the first size is what the plan is given for the others. --cpu_seconds
counts the seconds of one thread's CPU instead of the clock's, for a machine that others use at the same time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from smolpretrain.planning import counting

ROOT = Path(__file__).resolve().parents[1]
WARM, BLOCK, ROWS = 4, 512, 4
SIZES = {  # hidden size, layers, heads, key-value heads, MLP, vocabulary
    "11M": (384, 6, 6, 2, 1024, 4096),
    "19M": (512, 6, 8, 4, 1408, 4096),
    "27M": (512, 9, 8, 4, 1408, 4096),
    "32M, vocabulary 32768": (448, 8, 7, 7, 1216, 32768),
}


def overrides(size):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip((*names, "vocab_size"), SIZES[size], strict=True))


def words_of(size, steps, directory):
    return [
        "model_name=smollm2-1m", f"config_overrides={json.dumps(overrides(size))}",
        f"tokenizer_name={directory}/tokenizer",
        f"block_size={BLOCK}", f"per_device_train_batch_size={ROWS}", f"max_steps={steps + WARM}", "warmup_steps=2",
        "validation_fraction=0", "activation_checkpointing=false", "logging_steps=100", "save_strategy=no",
        "sample_steps=0", "deepspeed=null", "optim=adamw_torch_fused", f"output_dir={directory}/{size.split(',')[0]}",
        "disable_tqdm=true", f"prepared_dir={directory}/{overrides(size)['vocab_size']}",
    ]  # fmt: skip


def child(clock, words):
    """Train here; print the seconds of each step and the rate of a matrix product before and after."""
    from transformers import TrainerCallback

    from smolpretrain import run_pretrain

    now, make_trainer = getattr(time, clock), run_pretrain.make_trainer
    marks, rates = [], [product_rate(now)]

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append(now())

    def marked(*args, **kwargs):
        trainer, log = make_trainer(*args, **kwargs)
        trainer.add_callback(Mark())
        return trainer, log

    run_pretrain.make_trainer = marked
    run_pretrain.main(words)
    rates.append(product_rate(now))
    seconds = [later - sooner for sooner, later in pairwise(marks)]
    print("measured", json.dumps({"seconds": seconds, "rates": rates}))


def product_rate(now):
    """FLOPs a second of the product that planning.hardware measures, best of 30."""
    import torch

    left, right = torch.randn(1024, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    best = float("inf")
    for _ in range(30):
        start = now()
        left @ right
        best = min(best, now() - start)
    return 2 * 1024 * 2048 * 2048 / best


def train(size, steps, directory, clock):
    """(median tokens a second after the warm steps, best rate of the matrix product)."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if clock == "process_time" else {})
    done = subprocess.run(
        [sys.executable, __file__, "--child", clock, *words_of(size, steps, directory)],
        cwd=ROOT, check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("measured "))[9:])
    return ROWS * BLOCK / statistics.median(found["seconds"][WARM - 1 :]), max(found["rates"])


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cpu_seconds", action="store_true")
    flags = parser.parse_args()
    from smolpretrain.data import corpus, tokenization

    clock = "process_time" if flags.cpu_seconds else "perf_counter"
    print("| size | parameters | product, TFLOPS | measured tokens/s | MFU | planned tokens/s | off |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    mfu, peak, worst = None, 0.0, 0.0
    with tempfile.TemporaryDirectory() as directory:
        tokenization.train_tokenizer(corpus.read_documents(), 4096).save_pretrained(f"{directory}/tokenizer")
        for size in SIZES:
            config = counting.load_config("smollm2-1m", overrides(size))
            flops = counting.flops_per_token(config, BLOCK)
            measured, rate = train(size, flags.steps, directory, clock)
            planned, off = "-", "(taken)"
            if mfu is None:
                mfu, peak = measured * flops / rate, rate
            else:
                error = peak * mfu / flops / measured - 1
                planned, off, worst = f"{peak * mfu / flops:,.0f}", f"{error:+.0%}", max(worst, abs(error))
            total, reached = counting.count(config).total, measured * flops / rate
            row = (size, f"{total:,}", f"{rate / 1e12:.2f}", f"{measured:,.0f}", f"{reached:.1%}", planned, off)
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nfurthest off: {worst:.0%}, by the product's rate and the MFU of the first size")
    return None


if __name__ == "__main__":
    main()
