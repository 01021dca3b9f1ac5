"""What happened: metrics.jsonl and samples.jsonl for programs, training_log.md for people, a bar for who waits."""

import json
import math
import resource
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback

from smolpretrain.core.files import read_json, read_rows, write_json, write_text

from . import attention, compiling

SAMPLE_TOKENS, PROMPTS_IN_LOG = 48, 3
_RECORDED = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "datasets", "tokenizers")
_LOGGED = ("skipped_steps", "bad_steps", "z_loss", "aux_loss", "expert_load_max", "expert_load_entropy")
_HEADER = (
    "| step | loss (nats/token) | learning rate | gradient norm | tokens seen | tokens/s | peak memory (GiB) |\n"
    "|---:|---:|---:|---:|---:|---:|---:|\n"
)


def write_run(output_dir, **entries):
    """Add entries to output_dir/run.json, whole or not at all."""
    path = Path(output_dir) / "run.json"
    write_json(path, (read_json(path) if path.is_file() else {}) | entries)


def write_start(output_dir, arguments, decided, manifest, git, plan):
    """run.json before the first step: what was asked, what the start decided, with what, on which data, the plan."""
    splits = manifest.splits
    data = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "blocks")}
    data |= {"validation_fraction": manifest.validation_fraction, "filtered": manifest.filtered}
    data |= {"fingerprint": manifest.fingerprint, "source": manifest.source, "splits": splits}
    run = {
        "arguments": arguments,
        "decided": decided,
        "versions": versions(),
        "git_commit": git,
        "plan": plan,
        "data": data,
    }
    write_run(output_dir, **run, last_stop=None)


def write_result(output_dir, log, results, result):
    """run.json after the last step, and the sentences that say it.

    Args:
        results: {set: {trained, random, unigram: scores of its held-out documents}}, of all sets together under "";
            None where nothing was held out.
        result: What the Trainer counted: tokens_seen, skipped_steps.
    """
    result, said = result | {"tokens_per_second": round(log.tokens_per_second, 1)}, []
    if results:
        judged = {name: _judged(one) for name, one in results.items()}
        result |= judged.pop("") | ({"held_out_sets": judged} if judged else {})
        said += [_scores(result, ""), *(_scores(one, f", {name}") for name, one in judged.items())]
    write_run(output_dir, result=result, finished=datetime.now(UTC).isoformat(timespec="seconds"))
    said.append(
        f"done: {result['tokens_seen']:,} tokens seen, {log.tokens_per_second:,.0f} tokens/s. The model is in "
        f"{output_dir}; training_log.md and report/ there say how it went."
    )
    return said


def _judged(scores):
    """A held-out set's entry in run.json."""
    bits = {f"{name}_bits_per_byte": scores[name]["bits_per_byte"] for name in ("random", "unigram")}
    return {"bits_per_byte": scores["trained"]["bits_per_byte"]} | bits | {"held_out": scores["trained"]}


def _scores(judged, name):
    trained = judged["held_out"]
    return (
        f"held-out bits per byte{name}: {judged['bits_per_byte']:.4f} (random weights "
        f"{judged['random_bits_per_byte']:.4f}, unigram model {judged['unigram_bits_per_byte']:.4f}), over "
        f"{trained['documents']} documents, window {trained['window']}, stride {trained['stride']}."
    )


def versions():
    """Python's and the stack's versions; None for what is not installed."""
    found = {"python": sys.version.split()[0]}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def peak_memory_gib(device):
    """Most memory this process has held: on a GPU its allocator's, on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _held_out(metrics, prefix, name):
    """A held-out set's loss for people."""
    bits = metrics.get(f"{prefix}_bits_per_byte")
    size = f", {bits:.4f} bits a byte," if bits else ""
    said = f"{metrics[f'{prefix}_loss']:.4f} nats a token{size} over {metrics[f'{prefix}_tokens']:,} tokens"
    return f"{name} {said}" if name else said


class Record(TrainerCallback):
    """Writes the record of a run into output_dir. The first rank writes; under ZeRO-3 all ranks sample together.

    Args:
        prompts: What the model continues every sample_steps: all into samples.jsonl, the first few into the log.
        flops_per_token: Model FLOPs of one training token, and
        peak_flops: FLOPs a second that a rank's device can do, for the MFU; None where either is not known.
        random_weights: How the run began: only then is ln(vocabulary) its first loss.
    """

    def __init__(
        self,
        output_dir,
        tokenizer,
        device,
        zero3=False,
        prompts=(),
        flops_per_token=None,
        peak_flops=None,
        random_weights=True,
    ):
        self.directory, self.tokenizer, self.device, self.zero3 = Path(output_dir), tokenizer, device, zero3
        self.prompts, self.flops_per_token, self.peak_flops = prompts, flops_per_token, peak_flops
        self.random_weights = random_weights
        self.training_seconds, self.tokens_trained = 0.0, 0  # without evaluation, sampling and saving
        self.at_last_log, self.measured = (0, 0.0, 0.0), {}
        self.bar, self.in_table, self.first_loss = None, False, None

    @property
    def tokens_per_second(self):
        """Tokens a second over all ranks since this process began training."""
        return self.tokens_trained / self.training_seconds if self.training_seconds else 0.0

    def measure(self, data_wait_seconds):
        """What a log line says of the machine since the last one; all ranks call.

        Returns:
            tokens_per_second over all ranks, mfu (absent where unknown; PaLM's, arXiv 2204.02311, appendix B),
            data_wait_share of this rank's training time, peak_memory_gib of the fullest rank since the start.
        """
        now = self.tokens_trained, self.training_seconds, data_wait_seconds
        tokens, seconds, waited = (after - before for after, before in zip(now, self.at_last_log, strict=True))
        self.at_last_log, seconds = now, max(seconds, 1e-9)
        memory = torch.tensor([peak_memory_gib(self.device)], device=self.device)
        memories = [memory]
        if dist.is_initialized():
            memories = [torch.zeros_like(memory) for _ in range(dist.get_world_size())]
            dist.all_gather(memories, memory)
        by_rank = [round(found.item(), 3) for found in memories]
        shown = {"tokens_per_second": round(tokens / seconds, 1)}
        if self.flops_per_token and self.peak_flops:
            shown["mfu"] = round(tokens / seconds * self.flops_per_token / (self.peak_flops * len(by_rank)), 5)
        shown |= {"data_wait_share": round(waited / seconds, 5), "peak_memory_gib": max(by_rank)}
        self.measured = {"mfu": None} | shown | {"peak_memory_gib_by_rank": by_rank}
        return shown

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens_before = state.num_input_tokens_seen
        if state.is_world_process_zero:
            self._keep_until(state.global_step, evaluated_again=args.eval_on_start)
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
            self._metric(state, **metrics)
            names = [name[5:-5] for name in metrics if name.startswith("eval_") and name.endswith("_loss")][1:]
            said = [_held_out(metrics, "eval", ""), *(_held_out(metrics, f"eval_{name}", name) for name in names)]
            (self.say if names else self._prose)(f"Step {state.global_step}: held-out loss {'; '.join(said)}.")
        self.mark = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.mark = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            row = {"loss": logs["loss"], "learning_rate": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
            row |= self.measured | {name: logs[name] for name in _LOGGED if name in logs}
            self._metric(state, **row)
            norm = "" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
            self._row(
                f"| {state.global_step} | {row['loss']:.4f} | {row['learning_rate']:.3e} | {norm} "
                f"| {state.num_input_tokens_seen:,} | {row['tokens_per_second']:,.0f} | {row['peak_memory_gib']:.2f} |"
            )
            if state.global_step == 1 and self.random_weights:
                self._hold_first_loss(logs["loss"], kwargs["model"].config.vocab_size)
        self.mark = time.monotonic()

    def tell_bad_step(self, state, sentence, row):
        """What the guard against divergence says of a step, for people and for programs."""
        self._metric(state, **row)
        self.say(sentence)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def _hold_first_loss(self, loss, vocab_size):
        """Random weights know nothing: their loss is near ln(vocabulary), plus half the variance of their logits."""
        expected = math.log(vocab_size)
        verdict = (
            "as random weights should give"
            if abs(loss - expected) < 1
            else ("more than 1 nat away: these are not fresh random weights, or their scale is off")
        )
        self.say(f"First loss {loss:.3f} nats, ln({vocab_size}) = {expected:.3f}: {verdict}.")

    def _sample(self, model, state):
        """Greedy continuations: no random number is drawn, so training goes on exactly as without them."""
        was_training, rows = model.training, []
        model.eval()
        for prompt in self.prompts:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
            with torch.no_grad(), attention.portable(model), compiling.eager():
                ids = model.generate(
                    **inputs,
                    max_new_tokens=SAMPLE_TOKENS,
                    do_sample=False,
                    use_cache=True,
                    synced_gpus=self.zero3,
                    pad_token_id=self.tokenizer.eos_token_id,
                )[0, inputs["input_ids"].shape[1] :]
            rows.append({"prompt": prompt, "text": self.tokenizer.decode(ids), "decoding": "greedy"})
        model.train(was_training)
        if state.is_world_process_zero:
            lines = [f"Step {state.global_step}, greedy continuations:\n"]
            for row in rows:
                self._metric(state, "samples.jsonl", max_new_tokens=SAMPLE_TOKENS, **row)
            for row in rows[:PROMPTS_IN_LOG]:
                text = json.dumps(row["text"], ensure_ascii=False)[1:-1].replace("`", "'")
                lines.append(f"- **{row['prompt']}** `{text}`")
            self._prose("\n".join(lines))

    def _metric(self, state, file="metrics.jsonl", /, **row):
        row = {"step": state.global_step, "epoch": state.epoch, "tokens_seen": state.num_input_tokens_seen} | row
        with open(self.directory / file, "a", encoding="utf-8") as rows:
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _keep_until(self, step, evaluated_again):
        """Drop what a resumed run writes again, and a row that a kill cut short."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.directory / name
            rows = [row for row in read_rows(path, strict=False).rows if row.get("step", math.inf) <= step and step]
            if evaluated_again:
                rows = [row for row in rows if row["step"] != step or "eval_loss" not in row]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def say(self, sentence):
        """One sentence for who waits and for the log."""
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
