"""The report of a run: curves, samples by checkpoint, comparison and benchmark, each figure out of a file of the run.

    python eval/report.py RUN_DIR

Reads what a run leaves: run.json, metrics.jsonl, samples.jsonl, and in RUN_DIR/report, where they are there,
comparison.csv with its files (eval/compare.py --output_dir RUN_DIR/report) and benchmark.json (eval/benchmark.py): a
list of {"task", "metric", "value", "stderr", "chance", "n", "model", "settings", "file", "commit"}.

Writes into RUN_DIR/report: report.md; report.html, which needs no network; report.csv, one row a figure (figure, value,
low, high, n, file, settings, commit; file relative to RUN_DIR, settings JSON); loss.png and the other curves.
run_pretrain.py calls it at the end of a run.
"""

import csv
import json
import math
import runpy
import statistics
import sys
from itertools import zip_longest
from pathlib import Path

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "in_place.py"))

from smolpretrain.core.files import read_json, read_rows
from smolpretrain.core.options import Parser
from smolpretrain.core.text import one_line
from smolpretrain.eval.parts import comparison, page, plots

COLUMNS = ("figure", "value", "low", "high", "n", "file", "settings", "commit")
ARGUMENTS = (
    *("model_name", "tokenizer_name", "config_overrides", "block_size", "packing", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "decay_fraction", "optim", "weight_decay", "bf16", "deepspeed", "seed"),
)
STEPS_SHOWN = 4  # of the samples: as many columns as a page takes


def figures(run, trained, held_out):
    """Rows of report.csv that run.json and metrics.jsonl give."""
    result, commit, rows = run.get("result", {}), run.get("git_commit"), []

    def add(figure, value, file, **more):
        if value is not None:
            rows.append({"figure": figure, "value": value, "file": file, "commit": commit} | more)

    for of, judged in {
        "": result,
        **{f" ({name})": one for name, one in result.get("held_out_sets", {}).items()},
    }.items():
        scored = judged.get("held_out", {})
        more = {"n": scored.get("documents")}
        more["settings"] = {name: scored[name] for name in ("window", "stride", "prefix") if name in scored}
        ends = {end: scored.get(f"bits_per_byte_{end}") for end in ("low", "high")}
        add(f"held-out bits per byte{of}", judged.get("bits_per_byte"), "run.json", **more, **ends)
        for name, key in (("random weights", "random_bits_per_byte"), ("unigram model", "unigram_bits_per_byte")):
            add(f"held-out bits per byte{of}, {name}", judged.get(key), "run.json", **more)
        add(f"held-out token perplexity{of}", scored.get("token_perplexity"), "run.json", **more)
    for one in result.get("blend", []):
        more = {key: one[key] for key in ("weight", "epochs")}
        add(f"share of the rows ({one['name']})", one["realised"], "run.json", n=one["rows"], settings=more)
    add("parameters", run.get("parameters"), "run.json")
    add("tokens seen", result.get("tokens_seen"), "run.json")
    add("tokens a second, whole run", result.get("tokens_per_second"), "run.json")
    add("skipped steps", trained[-1].get("skipped_steps"), "metrics.jsonl")
    add("loss at the last logged step", trained[-1]["loss"], "metrics.jsonl", settings={"step": trained[-1]["step"]})
    if held_out:
        last = held_out[-1]
        step = {"step": last["step"], "tokens": last["eval_tokens"], "rows": "packed, as in training"}
        add("held-out loss during training, last", last["eval_loss"], "metrics.jsonl", settings=step)
        for name in ["", *held_out_sets(held_out)]:
            value, of = last.get(f"eval_{name}_bits_per_byte".replace("__", "_")), f" ({name})" if name else ""
            add(f"held-out bits per byte{of} during training, last", value, "metrics.jsonl", settings=step)
    utilization = {key: run[key] for key in ("flops_per_token", "peak_flops", "device") if run.get(key) is not None}
    for name, key, of in (
        ("tokens a second, median of logged steps", "tokens_per_second", statistics.median),
        ("model FLOPs utilization (MFU), median", "mfu", statistics.median),
        ("share of time waiting for data, median", "data_wait_share", statistics.median),
        ("peak memory of the fullest rank (GiB)", "peak_memory_gib", max),
        ("gradient norm before clipping, median", "grad_norm", statistics.median),
    ):
        values = [row[key] for row in trained[1:] or trained if row.get(key) is not None]  # the first step warms up
        if values:
            settings = utilization if key == "mfu" else {}
            add(name, of(values), "metrics.jsonl", n=len(values), settings=settings)
    return rows


def held_out_sets(rows):
    """Names of the held-out sets in rows of metrics.jsonl; none where there is one without a name."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "eval_loss" and key.endswith("_loss"))
    return [key.removeprefix("eval_").removesuffix("_loss") for key in keys if key.startswith("eval_")]


def curves(directory, trained, held_out):
    """Draw what there is; figure blocks."""
    found = []

    def add(name, alt):
        found.append(("figure", str(directory / f"{name}.png"), alt))

    plots.plot_loss(directory / "loss.png", trained, held_out)
    said = f"from {trained[0]['loss']:.3f} to {trained[-1]['loss']:.3f} nats a token"
    said += f"; held out {held_out[-1]['eval_loss']:.3f} at the end" if held_out else ""
    add("loss", f"Training loss against tokens seen {said}; the learning rate below it.")
    bits = [row for row in held_out if row.get("eval_bits_per_byte") is not None]
    if bits:
        tokens, values = plots.series(bits, "eval_bits_per_byte")
        sets = {name: plots.series(bits, f"eval_{name}_bits_per_byte") for name in held_out_sets(bits)}
        lines = {"all" if sets else "": (tokens, values)} | sets
        plots.plot_lines(directory / "bits_per_byte.png", [("held-out bits per byte", lines)])
        ends = "".join(f"; {name} {each[0]:.3f} to {each[-1]:.3f}" for name, (_, each) in sets.items() if each)
        add("bits_per_byte", f"Held-out bits per byte against tokens seen, {values[0]:.3f} to {values[-1]:.3f}{ends}.")
    tokens, norms = plots.series(trained, "grad_norm")
    if norms:
        plots.plot_lines(
            directory / "grad_norm.png", [("gradient norm\nbefore clipping", {"": (tokens, norms)})], log=True
        )
        add("grad_norm", f"Gradient norm before clipping against tokens seen, log scale, last {norms[-1]:.3g}.")
    ranked = [row for row in trained if row.get("peak_memory_gib_by_rank")]
    if ranked:
        tokens = [row["tokens_seen"] for row in ranked]
        # A run can go on with other ranks: one that is not there leaves a gap.
        by_rank = zip_longest(*(row["peak_memory_gib_by_rank"] for row in ranked), fillvalue=math.nan)
        lines = {f"rank {rank}": (tokens, values) for rank, values in enumerate(by_rank)}
        plots.plot_lines(directory / "memory.png", [("peak memory (GiB)", lines)])
        most = max(row["peak_memory_gib"] for row in ranked)
        add("memory", f"Peak memory of each of {len(lines)} ranks against tokens seen, at most {most:.2f} GiB.")
    keys = {"tokens/s": "tokens_per_second", "MFU": "mfu", "share of time\nwaiting for data": "data_wait_share"}
    panels = [(label, {"": plots.series(trained[1:], key)}) for label, key in keys.items()]
    panels = [(label, lines) for label, lines in panels if lines[""][1]]
    if panels:
        plots.plot_lines(directory / "throughput.png", panels)
        median = statistics.median(panels[0][1][""][1])
        add("throughput", f"Against tokens seen: {', '.join(p[0] for p in panels)}. Median {median:,.0f} tokens/s."
            .replace("\n", " "))  # fmt: skip
    return found


def samples_by_step(samples):
    """Sample blocks: each prompt with what the model wrote at a few steps, evenly spaced, the last among them."""
    steps = sorted({row["step"] for row in samples})
    count = min(STEPS_SHOWN, len(steps))
    shown = [steps[round((place + 1) * len(steps) / count) - 1] for place in range(count)]
    found = [("heading", "Samples by checkpoint"), ("text", "Greedy continuations, from `samples.jsonl`.")]
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        rows = {row["step"]: row for row in samples if row["prompt"] == prompt}
        texts = [
            (f"step {step:,}, {rows[step]['tokens_seen']:,} tokens", rows[step]["text"].strip())
            for step in shown
            if step in rows
        ]
        found.append(("samples", prompt, texts))
    return found


def benchmark_blocks(rows):
    """The benchmark's table beside chance; a score within two standard errors of chance says nothing."""
    body = []
    for row in rows:
        error, chance = row.get("stderr"), row.get("chance")
        far = "" if None in (error, chance) else "yes" if abs(row["value"] - chance) > 2 * error else "no"
        numbers = [comparison.figure(value) for value in (row["value"], error, chance)]
        body.append([row["task"], row["metric"], str(row.get("model", "")), *numbers, f"{row['n']:,}", far])
    header = ["task", "metric", "model", "value", "standard error", "chance", "n", "away from chance"]
    said = "From `report/benchmark.json`. Away from chance: by more than two standard errors."
    return [("heading", "Benchmark"), ("text", said), ("table", "Scores beside chance", header, body)]


def copied_rows(directory):
    """Rows of report.csv that comparison.csv and benchmark.json give; and benchmark.json's rows."""
    rows, scores = [], []
    if (directory / "comparison.csv").is_file():
        for row in comparison.read(directory)[0]:
            more = {key: row[key] for key in ("value", "low", "high", "n", "commit", "settings")}
            name = f"comparison: {row['metric']}, {row['model']} ({row['kind']}), {row['data']}"
            rows.append({"figure": name, "file": "report/comparison.csv"} | more)
    if (directory / "benchmark.json").is_file():
        scores = read_json(directory / "benchmark.json")
        for row in scores:
            more = {key: row.get(key) for key in ("value", "n", "commit")}
            settings = dict(row.get("settings") or {}) | {key: row.get(key) for key in ("stderr", "chance", "model")}
            name = f"benchmark: {row['task']}, {row['metric']}"
            rows.append({"figure": name, "file": "report/benchmark.json", "settings": settings} | more)
    return rows, scores


def write_report(run_dir):
    """Write RUN_DIR/report; ValueError where RUN_DIR is not a run that has logged a step."""
    run_dir = Path(run_dir)
    run_file = run_dir / "run.json"
    metrics, samples = (read_rows(run_dir / name) for name in ("metrics.jsonl", "samples.jsonl"))
    trained, held_out = [r for r in metrics.rows if "loss" in r], [r for r in metrics.rows if "eval_loss" in r]
    if not run_file.is_file() or not trained:
        raise ValueError(f"{run_dir}: no run.json and metrics.jsonl of a run that has logged a step.")
    run, directory = read_json(run_file), run_dir / "report"
    directory.mkdir(exist_ok=True)
    copied, scores = copied_rows(directory)
    own = figures(run, trained, held_out)
    with open(directory / "report.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in [*own, *copied]:
            settings = row.get("settings") or {}
            table.writerow(row | {"settings": settings if isinstance(settings, str) else json.dumps(settings)})
    arguments = run.get("arguments", {}) | run.get("decided", {})
    chosen = [[name, str(arguments[name])] for name in ARGUMENTS if arguments.get(name) is not None]
    source = json.dumps(run.get("data", {}).get("source", {}), ensure_ascii=False)
    versions = ", ".join(f"{name} {found}" for name, found in run.get("versions", {}).items() if found)
    device = f" on {run['device']}" if run.get("device") else ""
    cut = [name for name, read in (("metrics.jsonl", metrics), ("samples.jsonl", samples)) if read.cut]
    gap = f" The last line of {' and of '.join(cut)} was cut short, as by a kill, and is left out." if cut else ""
    blocks = [
        ("text", f"Trained{device}, commit {run.get('git_commit') or 'unknown'}. Each figure is a row of `report.csv`, "
         f"which names the file of the run that it comes from and its settings.{gap}"),
        ("table", "Figures", ["figure", "value", "n", "from"], [_figure_row(row) for row in own]),
        ("heading", "Curves"), *curves(directory, trained, held_out),
        ("heading", "What was trained"), ("table", "Arguments, from `run.json`", ["argument", "value"],
         [*chosen, ["data", source], ["versions", versions]]),
    ]  # fmt: skip
    if samples.rows:
        blocks += samples_by_step(samples.rows)
    if (directory / "comparison.csv").is_file():
        blocks += [("heading", "Comparison"), *comparison.blocks(directory)]
    if scores:
        blocks += benchmark_blocks(scores)
    page.write(directory, "report", f"Pre-training report: {run_dir.resolve().name}", blocks)


def _figure_row(row):
    text = comparison.figure(row["value"]) if isinstance(row["value"], float) else f"{row['value']:,}"
    if row.get("low") is not None:
        text += f" ({comparison.figure(row['low'])} to {comparison.figure(row['high'])})"
    return [row["figure"], text, "" if row.get("n") is None else f"{row['n']:,}", row["file"]]


def main(argv=None):
    """The command; what a user can get wrong is one line and exit status 2."""
    parser = Parser("report.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of run_pretrain.py")
    args = parser.parse_args(argv)
    try:
        write_report(args.run_dir)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    print(f"wrote report.md, .csv and .html to {Path(args.run_dir, 'report')}")


if __name__ == "__main__":
    main()
