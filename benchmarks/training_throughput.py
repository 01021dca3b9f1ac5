"""Training tokens/s and peak memory of run_pretrain.py beside a bare PyTorch loop, in one run, as ratios.

    python benchmarks/training_throughput.py [--vocab_size 4096 49152] [--steps 16] [--rounds 2] [--words key=value ...]

The bare loop is the limit: the same model, rows, batch and precision (bf16 autocast over fp32 weights), the model's
own loss, torch's fused AdamW, clipping, and nothing else. Beside it run_pretrain.py launched plainly
(`python run_pretrain.py deepspeed=null`) and under `deepspeed` with ZeRO-2, both with 8-bit AdamW. Each runs in
processes of its own, turn about, `--rounds` times; a figure is the median over all steps but the first four of each.
`--words torch_compile=true` adds our two once more with these words.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK, BATCH, WARM = 512, 8, 4
SHAPE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}


def words(vocab_size, steps, output_dir, prepared_dir):
    overrides = SHAPE | {"vocab_size": vocab_size, "intermediate_size": 704}
    return [
        "model_name=smollm2-1m", "tokenizer_name=train", f"config_overrides={json.dumps(overrides)}",
        f"block_size={BLOCK}", f"per_device_train_batch_size={BATCH}", f"max_steps={steps}", "warmup_steps=2",
        "validation_fraction=0", "activation_checkpointing=false", "logging_steps=1", "save_strategy=no",
        "sample_steps=0", f"output_dir={output_dir}", f"prepared_dir={prepared_dir}", "disable_tqdm=true",
    ]  # fmt: skip


def bare(vocab_size, steps, prepared_dir):
    """The bare loop; prints tokens/s of each step and peak memory in GiB."""
    import torch

    from smolpretrain.core.architectures import load_config
    from smolpretrain.data.collator import PackedCollator
    from smolpretrain.data.prepared import load_blocks
    from smolpretrain.training.model import random_model

    overrides = SHAPE | {"vocab_size": vocab_size, "intermediate_size": 704}
    model = random_model(load_config("smollm2-1m", overrides), 42, "sdpa").train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loader = torch.utils.data.DataLoader(
        load_blocks(prepared_dir, "train"), BATCH, shuffle=True, collate_fn=PackedCollator(0), drop_last=True
    )
    rates, began = [], time.monotonic()
    for _, batch in zip(range(steps), loader, strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        rates.append(BATCH * BLOCK / (time.monotonic() - began))
        began = time.monotonic()
    print(json.dumps({"rates": rates, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def ours(launcher, vocab_size, steps, prepared_dir, more=()):
    """run_pretrain.py with a launcher; tokens/s of each step and peak memory, from its own record."""
    with tempfile.TemporaryDirectory() as output_dir:
        extra = ["deepspeed=null", "optim=adamw_torch_fused"] if launcher == ["python"] else []
        command = [*launcher, "run_pretrain.py", *words(vocab_size, steps, output_dir, prepared_dir), *extra, *more]
        subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]], cwd=ROOT, check=True, capture_output=True
        )
        rows = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return {"rates": [row["tokens_per_second"] for row in rows], "gib": rows[-1]["peak_memory_gib"]}


def measure(vocab_size, steps, rounds, more):
    with tempfile.TemporaryDirectory() as directory:
        prepared_dir = Path(directory) / "prepared"
        ours(["python"], vocab_size, WARM, prepared_dir)  # makes the prepared set
        ways = {
            "bare PyTorch loop": (None, ()),
            "run_pretrain.py, plain": (["python"], ()),
            "run_pretrain.py, deepspeed ZeRO-2": (["deepspeed", "--num_gpus", "1"], ()),
        }
        if more:
            ways |= {f"{name}, {' '.join(more)}": (how, more) for name, (how, _) in ways.items() if how}
        found = {name: {"rates": [], "gib": []} for name in ways}
        for _ in range(rounds):
            for name, (launcher, added) in ways.items():
                if launcher is None:
                    command = [sys.executable, __file__, "--bare", str(vocab_size), str(steps), str(prepared_dir)]
                    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                else:
                    out = ours(launcher, vocab_size, steps, prepared_dir, added)
                found[name]["rates"] += out["rates"][WARM:]
                found[name]["gib"].append(out["gib"])
    return {name: (statistics.median(f["rates"]), statistics.median(f["gib"])) for name, f in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[4096, 49152])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--words", nargs="+", default=(), metavar="key=value", help="of run_pretrain.py")
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        return bare(int(args.bare[0]), int(args.bare[1]), args.bare[2])
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), "an unknown CPU")
    print(f"{os.cpu_count()} cores of {cpu}; {BATCH} x {BLOCK} tokens a step, {SHAPE}, bf16.\n")
    print("| vocabulary | | tokens/s | ratio | peak memory (GiB) | ratio |\n|---:|---|---:|---:|---:|---:|")
    for vocab_size in args.vocab_size:
        found = measure(vocab_size, args.steps, args.rounds, args.words)
        limit, memory = found["bare PyTorch loop"]
        for name, (rate, gib) in found.items():
            print(
                f"| {vocab_size} | {name} | {rate:,.0f} | {rate / limit:.2f} | {gib:.2f} | {gib / memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
