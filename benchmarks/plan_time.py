"""Training time on this CPU beside the plan's, with what was measured on another size.

    python benchmarks/plan_time.py [--steps 10] [--only N ...]

Each size trains through run_pretrain.py (no DeepSpeed, fused AdamW, bf16 autocast) in a process of its own; the first
four steps are left out. The plan measures the matrix product, and which share of it the parts of a step reach: layers,
what surrounds them, loss, optimizer, each at the model's shapes (planning/cpu.py). How much longer a step of the first
size took than its parts is what the plan is given for the others; the last column is what the utilization (MFU) of the
first size alone would have said. With OMP_NUM_THREADS=1 the seconds are the CPU's, which other programs on the machine
lengthen little.
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

ROOT = Path(__file__).resolve().parents[1]
WARM, BLOCK, ROWS = 4, 512, 4
SIZES = {  # hidden size, layers, heads, key-value heads, MLP, vocabulary
    "11M": (384, 6, 6, 2, 1024, 4096),
    "1M": (128, 4, 2, 1, 352, 4096),
    "19M": (512, 6, 8, 4, 1408, 4096),
    "27M": (512, 9, 8, 4, 1408, 4096),
    "27M, checkpointing": (512, 9, 8, 4, 1408, 4096),
    "32M, vocabulary 32768": (448, 8, 7, 7, 1216, 32768),
    "44M": (768, 6, 12, 12, 2048, 4096),
}


def overrides(size):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dict(zip((*names, "vocab_size"), SIZES[size], strict=True))


def words_of(size, steps, directory):
    return [
        "model_name=smollm2-1m", f"config_overrides={json.dumps(overrides(size))}",
        f"tokenizer_name={directory}/tokenizer",
        f"block_size={BLOCK}", f"per_device_train_batch_size={ROWS}", f"max_steps={steps + WARM}", "warmup_steps=2",
        "validation_fraction=0", f"activation_checkpointing={'checkpointing' in size}", "logging_steps=100",
        "save_strategy=no", "sample_steps=0", "deepspeed=null", "optim=adamw_torch_fused", "disable_tqdm=true",
        f"output_dir={directory}/{list(SIZES).index(size)}",
        f"prepared_dir={directory}/{overrides(size)['vocab_size']}",
    ]  # fmt: skip


def child(words):
    """Train here; print the seconds of a step, the rate of a matrix product and the share that its parts reach."""
    from transformers import TrainerCallback

    from smolpretrain import plan, run_pretrain
    from smolpretrain.core.architectures import load_config
    from smolpretrain.planning import assemble, cpu, hardware

    values, _ = plan.parse(words)
    config = load_config(values["model_name"], values["config_overrides"]).to_dict()
    setup = assemble.set_up(config, values, None, 1, cuda=False)
    now = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    parts, rate = cpu.of_parts(config, setup), hardware.product_rate(0.5, now)
    marks, make_trainer = [now()], run_pretrain.make_trainer

    class Mark(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append(now())

    def marked(*args, **kwargs):
        trainer, log = make_trainer(*args, **kwargs)
        trainer.add_callback(Mark())
        return trainer, log

    run_pretrain.make_trainer = marked
    run_pretrain.main(words)
    seconds = statistics.median(later - sooner for sooner, later in pairwise(marks[WARM:]))
    print("measured", json.dumps({"seconds": seconds, "rate": rate, "parts_mfu": parts}))


def train(size, steps, directory):
    """What child() printed for a size."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words_of(size, steps, directory)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("measured "))[9:])


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", type=int, nargs="*", help="sizes besides the first, from 1")
    flags = parser.parse_args()
    from smolpretrain.core.architectures import load_config
    from smolpretrain.data.read import corpus
    from smolpretrain.data.tokens import tokenization
    from smolpretrain.planning import counting

    print("| size | parameters | TFLOPS | its parts | MFU | tokens/s | planned tokens/s | off | by MFU alone |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    first, worst = None, 0.0
    with tempfile.TemporaryDirectory() as directory:
        tokenization.train_tokenizer(corpus.read_documents(), 4096).save_pretrained(f"{directory}/tokenizer")
        for number, size in enumerate(SIZES):
            if number and flags.only is not None and number not in flags.only:
                continue
            config = load_config("smollm2-1m", overrides(size)).to_dict()
            found = train(size, flags.steps, directory)
            per_token, tokens_per_second = counting.flops_per_token(config, BLOCK), ROWS * BLOCK / found["seconds"]
            mfu, parts = tokens_per_second * per_token / found["rate"], found["parts_mfu"]
            first = first or {"mfu": mfu, "longer": parts / mfu}
            planned = found["rate"] * parts / first["longer"] / per_token
            off, flat = planned / tokens_per_second - 1, first["mfu"] / mfu - 1
            worst = max(worst, abs(off))
            row = [size, f"{counting.count(config).total:,}", f"{found['rate'] / 1e12:.2f}"]
            row += [f"{parts:.1%} / {parts / mfu:.2f}", f"{mfu:.1%}", f"{tokens_per_second:,.0f}"]
            row += [f"{planned:,.0f}", f"{off:+.0%}", f"{flat:+.0%}"] if number else ["(taken)", "", ""]
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nfurthest off: {worst:.0%}, by its parts and what the first size took over them")
    return None


if __name__ == "__main__":
    main()
