"""Peak memory of real training on this CPU beside the plan's, over a grid of settings.

    python benchmarks/plan_memory.py [--only N ...] [--parts]

Each setting trains two steps through run_pretrain.py in a process of its own. Measured is the most resident memory
above what the process held once everything was imported. glibc is told to hand freed memory
back (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), or it would keep up to half of it for later and the figure would
be its habits', not the run's. On the first settings the plan's few constants for a CPU were fitted (planning/memory.py:
RUNTIME, COPIES); the others were chosen afterwards and fitted nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SIZES = {  # hidden size, layers, heads, key-value heads, MLP
    "small": (256, 6, 4, 2, 704),
    "large": (512, 8, 8, 4, 1408),
    "deep": (192, 16, 3, 3, 512),
    "medium": (384, 10, 6, 2, 1024),
    "wide": (768, 4, 12, 4, 2048),
}


class Setting(NamedTuple):
    """A run of the grid: ZeRO's stage, None without DeepSpeed; words are any others of run_pretrain.py."""

    size: str
    vocabulary: int
    block: int
    micro: int
    accumulation: int
    checkpointing: bool
    loss: str
    stage: int | None
    optim: str
    words: tuple = ()


FITTED = (
    Setting("small", 4096, 512, 16, 1, False, "chunked", None, "adamw_torch_fused"),
    Setting("small", 49152, 512, 8, 1, False, "chunked", None, "adamw_bnb_8bit"),
    Setting("small", 49152, 512, 4, 1, False, "plain", None, "adamw_torch_fused"),
    Setting("small", 16384, 2048, 2, 1, False, "plain", 2, "adamw_bnb_8bit"),
    Setting("small", 49152, 1024, 8, 2, True, "chunked", 2, "adamw_bnb_8bit"),
    Setting("large", 4096, 512, 8, 1, False, "chunked", None, "adamw_torch_fused"),
    Setting("large", 4096, 1024, 4, 1, False, "chunked", 2, "adamw_bnb_8bit"),
    Setting("large", 4096, 1024, 8, 1, True, "chunked", 2, "adamw_bnb_8bit"),
    Setting("large", 49152, 512, 4, 1, True, "plain", 2, "adamw_bnb_8bit"),
    Setting("large", 49152, 512, 8, 1, False, "chunked", 2, "adamw_torch_fused"),
    Setting("large", 49152, 512, 8, 2, True, "chunked", None, "adamw_bnb_8bit"),
    Setting("large", 4096, 2048, 2, 1, False, "chunked", None, "adamw_torch_fused"),
    Setting("large", 16384, 512, 4, 1, False, "plain", 1, "adamw_torch_fused"),
    Setting("large", 4096, 256, 16, 1, False, "chunked", 2, "adamw_torch_fused"),
)
HELD_OUT = (
    Setting("medium", 32768, 768, 6, 1, False, "chunked", 2, "adamw_bnb_8bit"),
    Setting("medium", 8192, 1536, 2, 2, False, "chunked", None, "adamw_torch_fused"),
    Setting("medium", 32768, 256, 8, 1, True, "plain", None, "adamw_torch_fused"),
    Setting("wide", 8192, 1024, 8, 1, True, "chunked", 2, "adamw_torch_fused"),
    Setting("wide", 32768, 128, 2, 1, True, "chunked", 2, "adamw_bnb_8bit"),
    Setting("wide", 32768, 128, 2, 1, True, "chunked", None, "adamw_bnb_8bit"),
    Setting("deep", 8192, 512, 6, 1, False, "plain", 3, "adamw_bnb_8bit"),
    Setting("deep", 16384, 1024, 4, 4, False, "chunked", 1, "adamw_torch_fused"),
    Setting("deep", 8192, 512, 4, 1, False, "chunked", 2, "adamw_torch", ("attn_implementation=eager",)),
    Setting("medium", 8192, 1024, 4, 1, False, "chunked", 2, "adamw_bnb_8bit", ("intra_document_masking=false",)),
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
    print("peak", status("VmHWM") - start)


def measure(words):
    """Bytes above the start at the fullest moment of a run."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | RETURN_MEMORY,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    if not found:
        raise RuntimeError(f"{words}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    return int(found[0][5:])


def words_of(setting, directory):
    """run_pretrain.py's words for a setting."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    overrides = dict(zip(names, SIZES[setting.size], strict=True))
    overrides |= {"vocab_size": setting.vocabulary, "max_position_embeddings": 2048}
    return [
        "model_name=smollm2-1m", f"config_overrides={json.dumps(overrides)}", f"tokenizer_name={directory}/tokenizer",
        f"block_size={setting.block}", f"per_device_train_batch_size={setting.micro}",
        f"gradient_accumulation_steps={setting.accumulation}",
        f"activation_checkpointing={json.dumps(setting.checkpointing)}",
        *(["loss_chunk_tokens=0"] if setting.loss == "plain" and setting.stage != 3 else []),
        f"deepspeed={'null' if setting.stage is None else f'ds_configs/zero{setting.stage}.json'}",
        f"optim={setting.optim}", "max_steps=2", "warmup_steps=1", "validation_fraction=0", "sample_steps=0",
        "save_strategy=no", "disable_tqdm=true", "resume=never", f"output_dir={directory}/run",
        f"prepared_dir={directory}/{setting.block}-{setting.vocabulary}", *setting.words,
    ]  # fmt: skip


def predict(words):
    """Bytes by part that the plan says for the same words."""
    from smolpretrain import plan as command
    from smolpretrain.core.architectures import load_config
    from smolpretrain.planning import assemble, memory

    values, _ = command.parse(words)
    config = load_config(values["model_name"], values["config_overrides"]).to_dict()
    content, _ = command.deepspeed_config(values, 1)
    return memory.peak(assemble.set_up(config, values, content, 1, cuda=False))


def make_tokenizer(directory):
    """A tokenizer of 4096 tokens on the built-in text, which every vocabulary of the grid holds."""
    from smolpretrain.data.read import corpus
    from smolpretrain.data.tokens import tokenization

    tokenization.train_tokenizer(corpus.read_documents(), 4096).save_pretrained(f"{directory}/tokenizer")


def row(setting, directory, with_parts):
    """Run a setting, print its row, return how far off the plan is."""
    words = words_of(setting, directory)
    measured, parts = measure(words), predict(words)
    moment = parts.pop("moment")
    planned = sum(parts.values())
    off = planned / measured - 1
    size, vocabulary, block, micro, accumulation, checkpointing, loss, stage, optim, more = setting
    print(
        f"| {size} | {vocabulary} | {block} | {micro} x {accumulation} | {'yes' if checkpointing else 'no'} | {loss} "
        f"| {'-' if stage is None else stage} | {' '.join((optim, *more))} | {measured / 2**20:,.0f} MiB "
        f"| {planned / 2**20:,.0f} MiB | {off:+.0%} |",
        flush=True,
    )
    if with_parts:
        print("   ", moment, {part: round(count / 2**20) for part, count in parts.items()}, flush=True)
    return off


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="rows of the grid, from 0")
    parser.add_argument("--parts", action="store_true", help="the predicted parts of each")
    flags = parser.parse_args()
    titles = "size | vocabulary | block | micro x acc. | checkpointing | loss | ZeRO | optimizer | measured | plan"
    os.chdir(ROOT)  # the plan finds ds_configs/ there too
    with tempfile.TemporaryDirectory() as directory:
        make_tokenizer(directory)
        number = 0
        for group, settings in (("the constants were fitted on", FITTED), ("held out", HELD_OUT)):
            print(f"\n{group}:\n\n| {titles} | off |\n|---|---:|---:|---:|---|---|---:|---|---:|---:|---:|")
            off = []
            for setting in settings:
                if flags.only is None or number in flags.only:
                    off.append(row(setting, directory, flags.parts))
                number += 1
            if off:
                print(f"\nfurthest off: {max(map(abs, off)):.0%} over {len(off)} settings", flush=True)
    return None


if __name__ == "__main__":
    main()
