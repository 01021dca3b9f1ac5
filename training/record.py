"""What happened: metrics.jsonl for programs, training_log.md and a loss curve for people, a bar for the one waiting."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback

SAMPLE_PROMPTS = ("Once upon a time", "The most important thing about learning is", "Return a list of")
SAMPLE_TOKENS = 48
_RECORDED = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets", "tokenizers")
_HEADER = (
    "| step | loss (nats/token) | learning rate | gradient norm | tokens seen | tokens/s | peak memory (GiB) |\n"
    "|---:|---:|---:|---:|---:|---:|---:|\n"
)


def write_run(output_dir, **entries):
    """Add entries to output_dir/run.json, whole or not at all."""
    path = Path(output_dir) / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run | entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def versions():
    """Python's and the stack's versions; None for what is not installed."""
    found = {"python": sys.version.split()[0]}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_commit(directory):
    """The checkout's commit, with -dirty where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(directory), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def peak_memory_gib(device):
    """Most memory this process has held: on a GPU its allocator's, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Record(TrainerCallback):
    """Writes the record of a run into output_dir. The first rank writes; under ZeRO-3 all ranks sample together."""

    def __init__(self, output_dir, tokenizer, device, zero3=False):
        self.directory, self.tokenizer, self.device, self.zero3 = Path(output_dir), tokenizer, device, zero3
        self.training_seconds, self.tokens_trained = 0.0, 0  # without evaluation, sampling and saving
        self.bar, self.in_table, self.first_loss = None, False, None

    @property
    def tokens_per_second(self):
        """Tokens a second over all ranks since this process began training."""
        return self.tokens_trained / self.training_seconds if self.training_seconds else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens_before, self.at_last_log = state.num_input_tokens_seen, (0, 0.0)
        if state.is_world_process_zero:
            self._keep_metrics_until(state.global_step)
            fresh = state.global_step == 0
            self._log("# Training log\n" if fresh else f"\nResumed at step {state.global_step}.\n", fresh)
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=args.disable_tqdm)
        self.mark = time.monotonic()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.device.type == "cuda" and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize()  # queued work is training time, not the log's
        self.training_seconds += time.monotonic() - self.mark
        self.tokens_trained = state.num_input_tokens_seen - self.tokens_before
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(f"{self.tokens_per_second:,.0f} tokens/s", refresh=False)
        due = args.sample_steps and state.global_step % args.sample_steps == 0
        last = args.sample_steps and state.global_step >= state.max_steps
        if (due or last) and (state.is_world_process_zero or self.zero3):
            self._sample(model, state)
        self.mark = time.monotonic()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.is_world_process_zero:
            bits = metrics["eval_loss"] / math.log(2)
            self._metric(state, **metrics)
            self._prose(
                f"Step {state.global_step}: held-out loss {metrics['eval_loss']:.4f} nats ({bits:.4f} bits) a token "
                f"over {metrics['eval_tokens']:,} tokens."
            )
        self.mark = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.mark = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            tokens, seconds = self.at_last_log
            self.at_last_log = self.tokens_trained, self.training_seconds
            rate = (self.tokens_trained - tokens) / max(self.training_seconds - seconds, 1e-9)
            row = {
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens_per_second": round(rate, 1),
                "peak_memory_gib": round(peak_memory_gib(self.device), 3),
            } | {name: logs[name] for name in ("skipped_steps", "bad_steps") if name in logs}
            self._metric(state, **row)
            norm = "" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
            self._row(
                f"| {state.global_step} | {row['loss']:.4f} | {row['learning_rate']:.3e} | {norm} "
                f"| {state.num_input_tokens_seen:,} | {rate:,.0f} | {row['peak_memory_gib']:.2f} |"
            )
            if state.global_step == 1:
                self._hold_first_loss(logs["loss"], kwargs["model"].config.vocab_size)
        self.mark = time.monotonic()

    def tell_bad_step(self, state, sentence, row):
        """What the guard against divergence says of a step, for people and for programs."""
        self._metric(state, **row)
        self._say(sentence)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            plot_loss(self.directory)

    def _hold_first_loss(self, loss, vocab_size):
        """Random weights know nothing: their loss is near ln(vocabulary), plus half the variance of their logits."""
        expected = math.log(vocab_size)
        verdict = (
            "as random weights should give"
            if abs(loss - expected) < 1
            else ("more than 1 nat away: these are not fresh random weights, or their scale is off")
        )
        self._say(f"First loss {loss:.3f} nats, ln({vocab_size}) = {expected:.3f}: {verdict}.")

    def _sample(self, model, state):
        """Greedy continuations: no random number is drawn, so training goes on exactly as without them."""
        was_training, lines = model.training, [f"Step {state.global_step}, greedy continuations:\n"]
        model.eval()
        for prompt in SAMPLE_PROMPTS:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            with torch.no_grad():
                ids = model.generate(
                    **inputs,
                    max_new_tokens=SAMPLE_TOKENS,
                    do_sample=False,
                    use_cache=True,
                    synced_gpus=self.zero3,
                    pad_token_id=self.tokenizer.eos_token_id,
                )[0, inputs["input_ids"].shape[1] :]
            text = json.dumps(self.tokenizer.decode(ids), ensure_ascii=False)[1:-1].replace("`", "'")
            lines.append(f"- **{prompt}** `{text}`")
        model.train(was_training)
        if state.is_world_process_zero:
            self._prose("\n".join(lines))

    def _metric(self, state, **row):
        row = {"step": state.global_step, "epoch": state.epoch, "tokens_seen": state.num_input_tokens_seen} | row
        with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(row) + "\n")

    def _keep_metrics_until(self, step):
        """Drop rows after `step`: a resumed run writes them again."""
        path = self.directory / "metrics.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        path.write_text("".join(row for row in rows if json.loads(row)["step"] <= step and step), encoding="utf-8")

    def _say(self, sentence):
        self._prose(sentence)
        tqdm.write(sentence)

    def _prose(self, text):
        self.in_table = False
        self._log(f"\n{text}\n")

    def _row(self, row):
        self._log(("" if self.in_table else f"\n{_HEADER}") + row + "\n")
        self.in_table = True

    def _log(self, text, fresh=False):
        with open(self.directory / "training_log.md", "w" if fresh else "a", encoding="utf-8") as log:
            log.write(text)


def plot_loss(output_dir):
    """report/loss.png: training and held-out loss against tokens seen, learning rate below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = (Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    trained = [r for r in rows if "loss" in r]
    held_out = [r for r in rows if "eval_loss" in r]
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    top.plot([r["tokens_seen"] for r in trained], [r["loss"] for r in trained], color="#0072B2", lw=1, label="training")
    top.plot(
        [r["tokens_seen"] for r in held_out],
        [r["eval_loss"] for r in held_out],
        "o-",
        color="#D55E00",
        label="held out",
    )
    bottom.plot([r["tokens_seen"] for r in trained], [r["learning_rate"] for r in trained], color="#009E73")
    top.set_ylabel("loss (nats/token)")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens seen")
    top.legend()
    top.grid(alpha=0.3)
    bottom.grid(alpha=0.3)
    report = Path(output_dir) / "report"
    report.mkdir(exist_ok=True)
    figure.savefig(report / "loss.png", dpi=120)
    plt.close(figure)
