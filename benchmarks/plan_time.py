"""Training time on this CPU beside the plan's: its measured matrix product, and an MFU measured on another size.

    python benchmarks/plan_time.py [--steps 10]

Each size trains through run_pretrain.py (no DeepSpeed, fused AdamW, bf16 autocast); the first four steps are left out.
The utilization of the first size is what the plan is given for the others.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from smolpretrain.planning import counting, hardware

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


def train(size, steps, directory):
    """Median tokens a second after the warm steps."""
    out = Path(directory, size.replace(" ", ""))
    words = [
        "model_name=smollm2-1m", f"config_overrides={json.dumps(overrides(size))}",
        f"tokenizer_name={directory}/tokenizer",
        f"block_size={BLOCK}", f"per_device_train_batch_size={ROWS}", f"max_steps={steps + WARM}", "warmup_steps=2",
        "validation_fraction=0", "activation_checkpointing=false", "logging_steps=1", "save_strategy=no",
        "sample_steps=0", "deepspeed=null", "optim=adamw_torch_fused", f"output_dir={out}", "disable_tqdm=true",
        f"prepared_dir={directory}/{overrides(size)['vocab_size']}",
    ]  # fmt: skip
    command = [sys.executable, ROOT / "run_pretrain.py", *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["tokens_per_second"] for row in rows if "loss" in row][WARM:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    flags = parser.parse_args()
    from smolpretrain.data import corpus, tokenization

    peak = hardware.measure_cpu(2.0).peak_flops
    print(f"matrix product: {peak / 1e12:.2f} TFLOPS in bf16\n")
    print("| size | parameters | measured tokens/s | MFU | planned tokens/s | off |\n|---|---:|---:|---:|---:|---:|")
    mfu, worst = None, 0.0
    with tempfile.TemporaryDirectory() as directory:
        tokenization.train_tokenizer(corpus.read_documents(), 4096).save_pretrained(f"{directory}/tokenizer")
        for size in SIZES:
            config = counting.load_config("smollm2-1m", overrides(size))
            measured, flops = train(size, flags.steps, directory), counting.flops_per_token(config, BLOCK)
            reached = measured * flops / peak
            planned = f"{peak * mfu / flops:,.0f}" if mfu else "-"
            off = f"{peak * mfu / flops / measured - 1:+.0%}" if mfu else "(taken)"
            worst = max(worst, abs(peak * mfu / flops / measured - 1) if mfu else 0.0)
            total = counting.count(config).total
            print(f"| {size} | {total:,} | {measured:,.0f} | {reached:.1%} | {planned} | {off} |", flush=True)
            mfu = mfu or reached
    print(f"\nfurthest off: {worst:.0%}")


if __name__ == "__main__":
    main()
