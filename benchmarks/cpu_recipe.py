"""The CPU recipe beside run_clm.py with its defaults: same text, model and seconds, held-out bits per byte.

    python benchmarks/cpu_recipe.py [max_steps=300 key=value of the recipe ...]

The recipe runs as its command, and all of its seconds count: preparing, training, scoring. run_clm.py is no part of
the installed transformers, so its defaults stand here as the Trainer call that it makes of them: rows cut from
documents laid end to end, plain causal; 8 rows a step, learning rate 5e-5, linear to 0 without warm-up, 32-bit AdamW,
fp32. Two things are better for it than by itself: it trains for the recipe's whole time on rows that are made
already, and its schedule ends there, where its 3 epochs would end long before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from smolpretrain.data.prepared import load_blocks
from smolpretrain.data.tokens.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "cpu-10min.json"
TIMED = 20  # steps, to know how many fit


def ours(output_dir, words):
    """(seconds, block size) of the recipe's own command."""
    began = time.monotonic()
    command = ["deepspeed", ROOT / "run_pretrain.py", RECIPE, *words, f"output_dir={output_dir}", "disable_tqdm=true"]
    subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)
    seconds = time.monotonic() - began
    return seconds, json.loads((output_dir / "run.json").read_text(encoding="utf-8"))["arguments"]["block_size"]


def causal(rows):
    ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]))
    return {"input_ids": ids, "labels": ids}


def trainer(run, rows, steps, output_dir):
    """run_clm.py's Trainer with its defaults, for so many steps, on the run's architecture from random weights."""
    set_seed(42)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run), dtype=torch.float32)
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(output_dir=str(output_dir), max_steps=steps, remove_unused_columns=False, **quiet)
    return Trainer(model=model, args=args, train_dataset=rows, data_collator=causal)


def theirs(run, seconds, output_dir):
    """Train as run_clm.py does for so many seconds, and leave a model; returns its steps."""
    rows = load_blocks(str(run / "prepared"), "train")
    timed = trainer(run, rows, TIMED, output_dir)
    timed.train()  # the first, slow steps with it
    began = time.monotonic()
    timed = trainer(run, rows, TIMED, output_dir)
    timed.train()
    steps = max(1, int(seconds / ((time.monotonic() - began) / TIMED)))
    made = trainer(run, rows, steps, output_dir)
    made.train()
    made.save_model(str(output_dir))
    load_tokenizer(str(run)).save_pretrained(output_dir)
    return steps


def score_held_out(model, run, window, output):
    """What eval/perplexity.py writes of a model directory on the run's held-out documents."""
    command = [sys.executable, ROOT / "eval" / "perplexity.py", "--model", model, "--prepared_dir", run / "prepared"]
    command += ["--window", window, "--output", output]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text(encoding="utf-8"))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("words", nargs="*", help="key=value for the recipe")
    words = parser.parse_args().words
    with tempfile.TemporaryDirectory() as scratch:
        run, peer = Path(scratch, "ours"), Path(scratch, "theirs")
        seconds, window = ours(run, words)
        steps = theirs(run, seconds, peer)
        print(f"| {seconds:.0f} s each | bits per byte | 95 % |\n|---|---:|---|")
        for name, model in (("configs/cpu-10min.json", run), (f"run_clm.py's defaults, {steps:,} steps", peer)):
            score = score_held_out(model, run, window, Path(scratch, "score.json"))
            low, high = score["bits_per_byte_low"], score["bits_per_byte_high"]
            print(f"| {name} | {score['bits_per_byte']:.4f} | {low:.4f} to {high:.4f} |", flush=True)


if __name__ == "__main__":
    main()
