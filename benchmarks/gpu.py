"""One GPU: the product beside the best bare loop, in one run of at most four minutes.

    python benchmarks/gpu.py [--prepared_dir DIR] [--out DIR] [--limit 230]

Runs of run_pretrain.py (SmolLM2, rows of 2,048, document mask, no activation checkpointing) and bare loops start and
compile side by side and take their timed steps one at a time. Beside them: isolation between documents with the real
kernels, attention alone, and SIGKILL and resume compared bit by bit. OUT/gpu.json is written as it goes.
`--tiny` tries the script where there is no GPU.
"""

import argparse
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if "smolpretrain" not in sys.modules:
    runpy.run_path(str(ROOT / "in_place.py"))

from gpu_parts import PLAIN, SHARED, WAIT, admit, bare, kernels, resume, tell, turn  # noqa: E402

VARLEN_FLEX = "attn_implementation=varlen", "attn_implementation=flex_attention"


def jobs(tiny):
    """(name, GiB it may take, kind, model, rows, words, steps) by importance."""
    small = ("smollm2-1m", 1.0) if tiny else None

    def one(name, gib, kind, model, rows, words=(), steps=24):
        return (
            name,
            *((small[1], kind, small[0], 2, list(words), 6) if tiny else (gib, kind, model, rows, list(words), steps)),
        )

    varlen, flex = ("attn_implementation=sdpa",) * 2 if tiny else VARLEN_FLEX
    return [
        one("kernels", 6, "kernels", "smollm2-135m", 16),
        one("135M plain, varlen", 24, "product", "smollm2-135m", 16, [*PLAIN, varlen]),
        one("135M bare, varlen, layers compiled", 24, "bare", "smollm2-135m", 16, ["varlen", "layers"]),
        one("1.7B plain, varlen", 59, "product", "smollm2-1.7b", 8, [*PLAIN, varlen], 12),
        one("135M ZeRO-2 + 8-bit, varlen", 26, "deepspeed", "smollm2-135m", 16, [varlen]),
        one("1.7B bare, varlen, layers compiled", 59, "bare", "smollm2-1.7b", 8, ["varlen", "layers"], 12),
        one("1.7B ZeRO-2 + 8-bit, varlen", 56, "deepspeed", "smollm2-1.7b", 8, [varlen], 12),
        one("360M plain, varlen", 40, "product", "smollm2-360m", 16, [*PLAIN, varlen], 12),
        one("135M plain, flex_attention", 26, "product", "smollm2-135m", 16, [*PLAIN, flex]),
        one("135M plain, 32 rows, varlen", 46, "product", "smollm2-135m", 32, [*PLAIN, varlen]),
        one("135M bare, varlen, whole model compiled", 26, "bare", "smollm2-135m", 16, ["varlen", "whole"]),
    ]


# The product


def product(out, name, words, profiled):
    """run_pretrain.py in this process, with a callback that waits for its turn at step WAIT."""
    began = float(os.environ["BENCHMARK_BEGAN"])
    import torch
    from transformers import TrainerCallback

    import run_pretrain
    from smolpretrain.training import trainer

    seconds = {"imports": time.time() - began}

    class Gate(TrainerCallback):
        marks = ()

        def on_train_begin(self, args, state, control, **kwargs):
            seconds["train begins"] = time.time() - began

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                torch.cuda.is_available() and torch.cuda.synchronize()
                seconds["step 1"] = time.time() - began
            if state.global_step == WAIT:
                self.held = turn(out)
                seconds["turn"] = time.time() - began
            if state.global_step >= WAIT:
                self.marks = [*self.marks, self.mark()]
            if profiled and state.global_step == state.max_steps - 3:
                self.profile = torch.profiler.profile()
                self.profile.start()

        def mark(self):
            if not torch.cuda.is_available():
                return time.time()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        def on_train_end(self, args, state, control, **kwargs):
            measured = self.marks[1 : -3 if profiled else None]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                each = [a.elapsed_time(b) for a, b in pairwise(measured)]
            else:
                each = [1e3 * (b - a) for a, b in pairwise(measured)]
            if profiled:
                self.profile.stop()
                write_profile(out, name, self.profile, 3)
            self.held.close()
            rows = [json.loads(line) for line in Path(args.output_dir, "metrics.jsonl").read_text().splitlines()]
            rows = [row for row in rows if "loss" in row]
            plan = (json.loads(Path(args.output_dir, "run.json").read_text()).get("plan") or {}).get("time", {})
            tokens = args.per_device_train_batch_size * args.gradient_accumulation_steps * 2048
            tell(out, name=name, tokens_per_second=tokens / statistics.median(each) * 1e3, milliseconds=each,
                 logged=rows[-1].get("tokens_per_second"), mfu=rows[-1].get("mfu"), losses=[r["loss"] for r in rows],
                 peak_memory_gib=rows[-1].get("peak_memory_gib"), seconds=seconds, planned=plan,
                 wait=rows[-1].get("data_wait_share"))  # fmt: skip
            (out / f"done {name}").touch()
            os._exit(0)  # no export

    made = trainer.PretrainTrainer.__init__

    def init(self, *args, **kwargs):
        seconds["model built"] = time.time() - began
        admit(out, name)
        seconds["admitted"] = time.time() - began
        made(self, *args, **kwargs)
        self.add_callback(Gate())

    trainer.PretrainTrainer.__init__ = init
    run_pretrain.main(words)


def write_profile(out, name, profile, steps):
    """The kernels that take longest, a step, and what the host did."""
    events = profile.key_averages()
    device = [
        (e.self_device_time_total / steps / 1e3, e.count / steps, e.key[:90])
        for e in events
        if "CUDA" in str(e.device_type)
    ]
    host = [
        (e.self_cpu_time_total / steps / 1e3, e.count / steps, e.key[:60])
        for e in events
        if "CPU" in str(e.device_type)
    ]
    for kind, found in (("device", device), ("host", host)):
        top = sorted(found, reverse=True)[:14]
        tell(
            out,
            profile=name,
            kind=kind,
            total=sum(row[0] for row in found),
            top=[[round(a, 2), round(b, 1), c] for a, b, c in top],
        )


# All of it


def start(out, job, prepared_dir, port):
    """One job in a process of its own, its output in a file."""
    command = ["deepspeed", "--master_port", str(port)] if job[2] == "deepspeed" else [sys.executable]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    told = {"BENCHMARK_BEGAN": str(time.time()), "BENCHMARK_JOB": json.dumps(job), "PYTHONPATH": path}
    command += [__file__, "--prepared_dir", str(prepared_dir), "--out", str(out)]
    with open(out / f"{job[0]}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | told, start_new_session=True)


def child(out, job, prepared_dir):
    name, _, kind, model, rows, words, steps = job
    if kind == "kernels":
        return kernels(out, prepared_dir)
    if kind == "resume":
        return resume(out, prepared_dir, words[0])
    if kind == "bare":
        return bare(out, name, model, rows, words, steps, prepared_dir)
    run = [f"model_name={model}", f"prepared_dir={prepared_dir}", "block_size=2048", f"max_steps={steps + 3}",
           f"tokenizer_name={prepared_dir}/tokenizer", f"per_device_train_batch_size={rows}",
           f"output_dir={out}/{name}"]  # fmt: skip
    if model == "smollm2-1m":
        run.append('config_overrides={"vocab_size": 49152, "max_position_embeddings": 2048}')
    return product(
        out,
        name,
        [*run, *SHARED, *words],
        profiled=name.startswith(("135M ZeRO", "135M plain, varlen")),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prepared_dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--limit", type=float, default=230)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", help="names that begin so")
    known, _ = parser.parse_known_args()
    out = known.out.resolve()
    if "BENCHMARK_JOB" in os.environ:
        return child(out, json.loads(os.environ["BENCHMARK_JOB"]), known.prepared_dir)
    out.mkdir(parents=True, exist_ok=True)
    began, running, port = time.time(), {}, 29600
    waiting = [job for job in jobs(known.tiny) if not known.only or any(job[0].startswith(word) for word in known.only)]
    if not known.only:
        checks = [(f"resume {kind}", 3, "resume", "smollm2-1m", 2, [kind == "exact"], 24) for kind in ("exact", "fast")]
        waiting[1:1] = checks
    room, most, inside = 76, 2 if known.tiny else 7, {}
    while (waiting or running) and time.time() - began < known.limit:
        while waiting and len(running) < most:
            job, port = waiting.pop(0), port + 1
            running[job[0]] = (job, start(out, job, known.prepared_dir, port))
            if job[2] in ("kernels", "resume"):
                inside[job[0]] = job[1]
        for name, (_, process) in list(running.items()):
            if process.poll() is not None or (out / f"done {name}").exists():
                if process.poll() is None:
                    time.sleep(1)
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                running.pop(name), inside.pop(name, None)
                print(f"[{time.time() - began:4.0f}s] ended ({process.wait()}): {name}", flush=True)
                show(out)
        for name, (job, _) in running.items():
            if name not in inside and (out / f"want {name}").exists():
                if sum(inside.values()) + job[1] > room:
                    break  # or the large ones would wait for ever
                inside[name] = job[1]
                (out / f"go {name}").touch()
        time.sleep(0.1)
    for name, (_, process) in running.items():
        os.killpg(process.pid, signal.SIGKILL)
        print(f"cut off: {name}", flush=True)
    for job in waiting:
        print(f"not run: {job[0]}", flush=True)
    rows = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    (out / "gpu.json").write_text(json.dumps(rows, indent=1))


SHOWN = [0]


def show(out):
    """Print what has come since the last time."""
    path = out / "gpu.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    for line in rows[SHOWN[0] :]:
        row = json.loads(line)
        if "tokens_per_second" in row:
            first = {key: round(value) for key, value in row.get("seconds", {}).items()}
            print(
                f"  {row['name']}: {row['tokens_per_second']:,.0f} tokens/s, "
                f"{statistics.median(row['milliseconds']):.1f} ms, mfu {row['mfu']}, peak {row['peak_memory_gib']} GiB"
                f", logged {row.get('logged')}, wait {row.get('wait')}, losses {row['losses'][:1]} -> "
                f"{row['losses'][-1:]}, seconds {first}, planned {row.get('planned')}"
            )
        elif "profile" in row:
            print(f"  profile {row['profile']}, {row['kind']}: {row['total']:.1f} ms a step")
            for item in row["top"]:
                print(f"    {item[0]:8.2f} ms {item[1]:7.1f} x {item[2]}")
        else:
            print(f"  {json.dumps(row)[:400]}")
    sys.stdout.flush()
    SHOWN[0] = len(rows)


if __name__ == "__main__":
    main()
