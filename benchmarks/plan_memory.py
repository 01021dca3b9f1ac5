"""Peak memory of real training on this CPU beside the plan's, over a grid of settings.

    python benchmarks/plan_memory.py [--only N ...]

Each setting trains two steps through run_pretrain.py in a process of its own. Measured is the most resident memory
above what the process held once everything was imported. glibc is told to hand freed memory back
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), or it would keep up to half of it for later and the figure would be
its habits', not the run's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SMALL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
SIZES = {"small": SMALL | {"intermediate_size": 704}, "large": LARGE | {"intermediate_size": 1408}}
# size, vocabulary, block_size, micro-batch, accumulation, checkpointing, loss, ZeRO stage, optimizer
GRID = (
    ("small", 4096, 512, 16, 1, False, "chunked", None, "adamw_torch_fused"),
    ("small", 49152, 512, 8, 1, False, "chunked", None, "adamw_bnb_8bit"),
    ("small", 49152, 512, 4, 1, False, "plain", None, "adamw_torch_fused"),
    ("small", 16384, 2048, 2, 1, False, "plain", 2, "adamw_bnb_8bit"),
    ("small", 49152, 1024, 8, 2, True, "chunked", 2, "adamw_bnb_8bit"),
    ("large", 4096, 512, 8, 1, False, "chunked", None, "adamw_torch_fused"),
    ("large", 4096, 1024, 4, 1, False, "chunked", 2, "adamw_bnb_8bit"),
    ("large", 4096, 1024, 8, 1, True, "chunked", 2, "adamw_bnb_8bit"),
    ("large", 49152, 512, 4, 1, True, "plain", 2, "adamw_bnb_8bit"),
    ("large", 49152, 512, 8, 1, False, "chunked", 2, "adamw_torch_fused"),
    ("large", 49152, 512, 8, 2, True, "chunked", None, "adamw_bnb_8bit"),
    ("large", 4096, 2048, 2, 1, False, "chunked", None, "adamw_torch_fused"),
    ("large", 16384, 512, 4, 1, False, "plain", 1, "adamw_torch_fused"),
    ("large", 4096, 256, 16, 1, False, "chunked", 2, "adamw_torch_fused"),
)


def status(key):
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def child(words):
    """Train here; print the most memory above the process's start."""
    from smolpretrain import run_pretrain

    start = status("VmRSS")
    run_pretrain.main(words)
    print("peak", json.dumps({"start": start, "peak": status("VmHWM") - start}))


def words_of(setting, directory):
    """run_pretrain.py's words for a setting."""
    size, vocabulary, block, micro, accumulation, checkpointing, loss, stage, optim = setting
    overrides = SIZES[size] | {"vocab_size": vocabulary, "max_position_embeddings": 2048}
    return [
        "model_name=smollm2-1m", f"config_overrides={json.dumps(overrides)}", f"tokenizer_name={directory}/tokenizer",
        f"block_size={block}", f"per_device_train_batch_size={micro}", f"gradient_accumulation_steps={accumulation}",
        f"activation_checkpointing={json.dumps(checkpointing)}", *(["loss_chunk_tokens=0"] if loss == "plain" else []),
        f"deepspeed={'null' if stage is None else f'ds_configs/zero{stage}.json'}", f"optim={optim}", "max_steps=2",
        "warmup_steps=1", "validation_fraction=0", "sample_steps=0", "save_strategy=no", "disable_tqdm=true",
        "resume=never", f"prepared_dir={directory}/{block}-{vocabulary}", f"output_dir={directory}/run",
    ]  # fmt: skip


def predict(words):
    """Bytes by part that the plan says for the same words."""
    from smolpretrain import plan as command
    from smolpretrain.planning import assemble, counting, memory

    values, _ = command.parse(words)
    config = counting.load_config(values["model_name"], values["config_overrides"])
    content, _ = command.deepspeed_config(values, 1)
    return memory.peak(assemble.set_up(config, values, content, 1, cuda=False))


def measure(setting, directory):
    words = words_of(setting, directory)
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | RETURN_MEMORY,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    if not found:
        raise RuntimeError(f"{setting}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    parts = predict(words)
    moment = parts.pop("moment")
    return json.loads(found[0][5:])["peak"], sum(parts.values()), moment, parts


def make_tokenizer(directory):
    """A tokenizer of 4096 tokens on the built-in text, which every vocabulary of the grid holds."""
    from smolpretrain.data import corpus, tokenization

    tokenization.train_tokenizer(corpus.read_documents(), 4096).save_pretrained(f"{directory}/tokenizer")


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="rows of the grid, from 0")
    parser.add_argument("--parts", action="store_true", help="the predicted parts of each")
    flags = parser.parse_args()
    chosen = [GRID[row] for row in flags.only] if flags.only else GRID
    print(
        "| size | vocabulary | block | micro x acc. | checkpointing | loss | ZeRO | optimizer | measured | plan | off |"
    )
    print("|---|---:|---:|---:|---|---|---|---|---:|---:|---:|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        make_tokenizer(directory)
        for setting in chosen:
            size, vocabulary, block, micro, accumulation, checkpointing, loss, stage, optim = setting
            measured, planned, moment, parts = measure(setting, directory)
            off = planned / measured - 1
            worst = max(worst, abs(off))
            print(
                f"| {size} | {vocabulary} | {block} | {micro} x {accumulation} | {'yes' if checkpointing else 'no'} "
                f"| {loss} | {'-' if stage is None else stage} | {optim} | {measured / 2**20:,.0f} MiB "
                f"| {planned / 2**20:,.0f} MiB | {off:+.0%} |",
                flush=True,
            )
            if flags.parts:
                print("   ", moment, {part: round(count / 2**20) for part, count in parts.items()}, flush=True)
    print(f"\nfurthest off: {worst:.0%} over {len(chosen)} settings")
    return None


if __name__ == "__main__":
    main()
