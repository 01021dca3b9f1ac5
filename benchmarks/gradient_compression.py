"""Bytes that a step sends between ranks, and the loss it leads to, for each gradient_compression that works here.

    python benchmarks/gradient_compression.py [--ranks 2 4] [key=value ...]

Every run is run_pretrain.py with the same rows, seed and rate on CPU ranks over gloo, each in a network namespace of
its own (wire.py); only the keys shown differ. Bytes are all that a rank's interface has sent; beside them is what
plan.py reckons with: gradients, and under ZeRO the new weights.
"""

import argparse
import statistics

import scaling
import wire

STEPS, LAST = 54, 10  # measured; whose loss is shown. wire.py leaves out the first six
WORDS = ["block_size=256", "per_device_train_batch_size=2", "warmup_steps=10", "learning_rate=3e-3",
         "optim=adamw_torch"]  # fmt: skip
DDP, ZERO, FLOAT = "deepspeed=null", "deepspeed=ds_configs/zero2.json", "bf16=false"
RUNS = [
    *([DDP, FLOAT, f"gradient_compression={kind}"] for kind in ("none", "fp16")),
    *([ZERO, FLOAT, f"gradient_compression={kind}"] for kind in ("none", "bf16", "fp16")),
    [ZERO, "bf16=true", "gradient_compression=none"],
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=[2, 4, 8])
    parser.add_argument("words", nargs="*", metavar="key=value")
    flags = parser.parse_intermixed_args()
    print(f"{wire.machine('gradient_compression.py')}; {' '.join([*WORDS, *flags.words])}\n")
    print(
        f"| ranks | | MB a rank a step | plan | loss, mean of the last {LAST} of 60 steps |\n|---:|---|---:|---:|---:|"
    )
    for ranks in flags.ranks:
        for run in RUNS:
            words = [*WORDS, *run, *flags.words]
            found, planned = wire.measure(words, ranks, steps=STEPS)[0], scaling.predict(words, ranks, None, 1.0)[0]
            loss = statistics.mean(found["losses"][-LAST:])
            name = " ".join(run).replace("ds_configs/", "")
            print(f"| {ranks} | `{name}` | {found['bytes'] / 1e6:.2f} | {planned / 1e6:.2f} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
