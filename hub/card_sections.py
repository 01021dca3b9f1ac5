"""The sections of a model card, each from the record of a run and from nothing else, as Markdown."""

import json
import re
import shlex

from .card_markup import code, listed, number, plain, section, table

NOT_MEASURED = "truth of what it writes, bias, toxicity, memorised text, other languages, code that runs"


def source_of(run):
    """What the text is called in a sentence."""
    source = (run.record.get("data") or {}).get("source") or {}
    if mixture := source.get("mixture"):
        return "a mixture of " + ", ".join(code(source_name(entry.get("source") or {})) for entry in mixture)
    return code(source_name(source))


def source_name(source):
    if "builtin" in source:
        return source["builtin"]
    if "data_files" in source:
        names = [file["name"] for file in source["data_files"]]
        return names[0] if len(names) == 1 else f"{len(names)} files"
    parts = [source.get("dataset_name"), source.get("dataset_config_name")]
    return "/".join(filter(None, parts)) or "a source that the record does not name"


def settings_text(settings):
    """What a perplexity moves with, for the metric's name."""
    names = ("window", "stride", "prefix")
    return ", ".join(f"{name} {plain(settings[name])}" for name in names if settings.get(name) is not None)


def summary(run):
    """Title, one line, and what did not go as planned."""
    arguments, parameters = run.arguments, run.record.get("parameters")
    start = f"from the weights of {code(arguments['init_from'])}" if arguments.get("init_from") else None
    start = start or f"from random initialisation (seed {plain(arguments.get('seed'))})"
    size = f"A causal language model of {number(parameters)} parameters" if parameters else "A causal language model"
    seen = f" on {number(run.tokens_seen)} tokens of {source_of(run)}" if run.tokens_seen else ""
    earlier = " What those weights had seen before is not counted." if arguments.get("init_from") else ""
    parts = [f"# {plain(run.name)}", f"{size}, pre-trained {start}{seen}.{earlier}"]
    if not run.result:
        planned = (run.plan.get("data") or {}).get("steps")
        planned = f" of {number(planned)}" if planned else ""
        reached = f"its record reaches step {number(run.steps)}{planned}"
        parts.append(f"**The run has not ended**: {reached}. What it measures at its end is missing here.")
    skipped = run.trained[-1].get("skipped_steps") if run.trained else None
    if run.bad or skipped:
        kinds = dict.fromkeys(code(row["bad_step"]) for row in run.bad)
        places = ", ".join(number(row["step"]) for row in run.bad[:10]) + (" and more" if len(run.bad) > 10 else "")
        found = f" Found bad: {'; '.join(list(kinds)[:5])}, at step {places}." if run.bad else ""
        parts.append(f"**Steps that were not applied: {number(skipped or 0)}.**{found}")
    return "\n\n".join(parts)


def quick_start(run, repo_id):
    """Code that runs as it stands: by the repository's name, or from the model's own directory."""
    if not any((run.directory / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return section("Quick start", "There is no exported model yet: the run writes it at its end.")
    prompt = run.samples[0]["prompt"] if run.samples else "Once upon a time"
    before = "" if repo_id else "In the directory of this file:\n\n"
    return section("Quick start", f"""{before}```python
from transformers import pipeline

generate = pipeline("text-generation", model={repo_id or "."!r})
text = generate({prompt!r}, max_new_tokens=48, do_sample=False)
print(text[0]["generated_text"])
```""")  # fmt: skip


def model(run):
    """Architecture, size and tokenizer."""
    config, made = run.config, run.plan.get("model") or {}
    fields = {
        "architecture": code(", ".join(config.get("architectures") or [config.get("model_type", "")])),
        "built from": code(run.arguments.get("model_name")),
        "parameters": number(run.record.get("parameters")),
        "of them outside the embeddings": number(made.get("non_embedding")),
    }
    if made.get("active") != made.get("total"):
        fields["of them at work on a token"] = number(made.get("active"))
    for label, key in (
        ("layers", "num_hidden_layers"),
        ("hidden size", "hidden_size"),
        ("attention heads", "num_attention_heads"),
        ("key and value heads", "num_key_value_heads"),
        ("vocabulary", "vocab_size"),
        ("positions", "max_position_embeddings"),
    ):
        fields[label] = number(config.get(key))
    fields["head tied to the embeddings"] = {True: "yes", False: "no"}.get(config.get("tie_word_embeddings"), "")
    fields["weights stored as"] = plain(config.get("dtype") or "")
    trained = "trained on this text" if run.arguments.get("tokenizer_name") == "train" else "the architecture's own"
    asked = run.arguments.get("tokenizer_name")
    fields["tokenizer"] = code(asked) if asked not in (None, "train") else trained
    rows = [[label, value] for label, value in fields.items() if value not in ("", "``")]
    return section("Model at a glance", table(["what", "value"], rows))


def data(run):
    """Source and revision, counts, tokens seen and unique, epochs, packing, cleaning."""
    recorded, manifest, arguments = run.record.get("data") or {}, run.manifest, run.arguments
    parts = ["\n".join(listed(recorded.get("source") or {}) or ["The record names no source."])]
    names = ("documents", "tokens", "bytes", "blocks", "fill", "documents_cut")
    splits = recorded.get("splits") or {}
    rows = [[plain(split), *(number(entry.get(name)) for name in names)] for split, entry in splits.items()]
    parts.append(table(["split", *names[:3], "rows", "fill", "documents cut"], rows))
    if run.from_stream:
        said = "Trained straight from the stream of the text: the table counts only its first documents, which gave "
        parts.append(said + "the held-out ones and the unigram model. Unique tokens and epochs were not counted.")
    train, block, seen = splits.get("train") or {}, arguments.get("block_size"), run.tokens_seen
    if seen and train.get("blocks") and block and not run.from_stream:
        there = train["blocks"] * block
        padding = " (padding among them)" if train.get("padding_tokens") else ""
        parts.append(f"Tokens seen: {number(seen)}{padding}. Unique: {number(min(seen, there))}. "
                     f"Epochs: {number(seen / there)}.")  # fmt: skip
    if shares := run.result.get("blend"):
        keys = ("weight", "realised", "rows", "epochs")
        body = [[code(one["name"]), *(number(one[key]) for key in keys)] for one in shares]
        parts += ["Prepared sets blended by weight, as trained on:", table(["set", *keys], body)]
    masking = "attention stays inside a document" if arguments.get("intra_document_masking") else "plain causal rows"
    packing = {"concat": "documents end to end, cut into rows", "best_fit": "documents up to a row are never cut"}
    how = arguments.get("packing")
    parts.append(f"Packing: {code(how)} ({packing.get(how, 'see the arguments')}), {number(block)} tokens a row, EOS "
                 f"after each document; {masking}. {_held_out(run)}.")  # fmt: skip
    if not manifest:
        return section("Training data", *parts, "What cleaning left out is not known here: the prepared set's "
                       "manifest is not beside this record.")  # fmt: skip
    done = dict(manifest.get("options") or {}) | {f"left out by {k}": n for k, n in manifest["filtered"].items()}
    if run.from_stream:
        done.pop("max_documents", None)  # bounds the set that stands in for the stream
    done["null or blank rows passed over"] = manifest.get("skipped_rows") or 0
    done["bad rows passed over"] = (manifest.get("bad_rows") or {}).get("rows") or 0
    where = ", of these first documents" if run.from_stream else ""
    mixed = [f"Realised mixture{where}:", "\n".join(listed(manifest["mixture"]))] if manifest.get("mixture") else []
    return section("Training data", *parts, *mixed, "Cleaning:", "\n".join(listed(done)))


def _held_out(run):
    """How the held-out text was chosen."""
    sets = [split.removeprefix("validation_") for split in (run.record.get("data") or {}).get("splits") or {}]
    if isinstance(run.arguments.get("prepared_dir"), list):
        return (
            f"Held out: of each set its own ({', '.join(code(name) for name in sets if not name.startswith('train'))})"
        )
    given = {key: run.arguments.get(key) for key in ("validation_files", "validation_split")}
    if not any(given.values()):
        fraction = (run.record.get("data") or {}).get("validation_fraction", run.arguments.get("validation_fraction"))
        return f"Held out: {plain(fraction)} of the documents, by a hash of their text"
    names = [code(name) for name in sets if name not in ("train", "validation")]
    named = f" ({', '.join(names)})" if names else ""
    return f"Held out: text of its own{named}; training documents that stand there too were left out"


def hyper_parameters(run):
    """How it was trained; the batch is the real one, over all ranks, in tokens."""
    given = run.arguments
    per_step = (given.get("per_device_train_batch_size"), given.get("gradient_accumulation_steps"), run.ranks)
    rows = {}
    if None not in (*per_step, given.get("block_size")):
        batch = per_step[0] * per_step[1] * per_step[2]
        rows["global batch"] = (
            f"{number(batch * given['block_size'])} tokens: {batch} rows of {number(given['block_size'])} "
            f"(micro-batch {per_step[0]} x accumulation {per_step[1]} x ranks {per_step[2]})"
        )
    rows["steps"] = number(run.steps) if run.result else f"{number(run.steps)}, at the last logged one"
    betas = f"betas {plain(given.get('adam_beta1'))}, {plain(given.get('adam_beta2'))}"
    rows["optimizer"] = f"{code(given.get('optim'))}; {betas}; epsilon {plain(given.get('adam_epsilon'))}"
    rows["weight decay"] = f"{plain(given.get('weight_decay'))}, not of norms and biases"
    warmup = given.get("warmup_steps") or 0
    warmup = f"{warmup:.2%} of the steps" if 0 < warmup < 1 else f"{number(warmup)} steps"
    more = f", {code(json.dumps(given['lr_scheduler_kwargs']))}" if given.get("lr_scheduler_kwargs") else ""
    if given.get("decay_fraction"):
        more += f", decay over the last {given['decay_fraction']:.2%} of the steps"
    rows["peak learning rate"] = plain(given.get("learning_rate"))
    rows["schedule"] = f"{code(given.get('lr_scheduler_type'))}{more}, warm-up {warmup}"
    rows["gradient clipping"] = f"norm {plain(given.get('max_grad_norm'))}"
    rows["precision"] = "bfloat16" if given.get("bf16") else "float16" if given.get("fp16") else "float32"
    if given.get("deepspeed"):
        rows["DeepSpeed"] = code(given["deepspeed"] if isinstance(given["deepspeed"], str) else "own configuration")
    rows["seed"] = plain(given.get("seed"))
    if given.get("data_seed") is not None:
        rows["seed of the data's order"] = plain(given["data_seed"])
    return section(
        "Hyper-parameters", table(["what", "value"], [[name, value] for name, value in rows.items() if value])
    )


def curves(run):
    """The pictures of the run's report."""
    shown = [(path, alt) for path, alt in run.pictures if not path.startswith("report/comparison")]
    missing = "There is no report beside this record: `python eval/report.py RUN_DIR` draws it."
    return section("Curves", *([picture(*one) for one in shown] or [missing]))


def picture(path, alt):
    return f"![{plain(alt)}]({path})"


def samples(run):
    """What the model wrote at the last sampled step for all prompts, and a comparison's first sample of each."""
    if not run.samples:
        return section("Samples", "The run wrote none (sample_steps).")
    last = max(row["step"] for row in run.samples)
    rows = [row for row in run.samples if row["step"] == last]
    parts = [f"{_settings_of(rows[0])}, at step {number(last)}, for all {len(rows)} prompts; none picked, no draw. "
             "A line break is written as `\\n`."]  # fmt: skip
    parts.append("\n".join(f"- {code(row['prompt'])} ... {code(row['text'])}" for row in rows))
    drawn, mine = run.comparison.get("settings") or {}, own_label(run)
    sampled = [
        row for row in run.written if row["model"] == mine and (row["decoding"], row["sample"]) == ("sampled", 0)
    ]
    if sampled:
        names = ("seed", "temperature", "top_p")
        parts.append(f"Sampled, {', '.join(f'{name} {drawn.get(name)}' for name in names)}, the first of "
                     f"{drawn.get('samples')} for each prompt, none picked:")  # fmt: skip
        parts.append("\n".join(f"- {code(row['prompt'])} ... {code(row['text'])}" for row in sampled))
    if run.edited:
        parts.append("What looked like a path of a machine or an access token was taken out of these texts.")
    return section("Samples", *parts)


def _settings_of(row):
    new = f", {row['max_new_tokens']} new tokens at most" if row.get("max_new_tokens") else ""
    return f"{plain(row.get('decoding', '')).capitalize()} continuations{new}"


def own_label(run):
    """The label under which a comparison has this run's exported model."""
    entries = run.comparison.get("models") or []
    return next((e["model"] for e in entries if e["kind"] == "checkpoint" and e["model"] in run.names), None)


def intended_use(run):
    """What a base model is for, and what nobody looked at."""
    window = run.arguments.get("block_size")
    benchmarks = "" if run.scores else ", knowledge (no benchmark was run)"
    return section(
        "Intended use and limits",
        "A base model: it continues a text. It was not trained to follow instructions or to chat. For research, "
        "teaching, and as a start for training of your own; not for advice or decisions.",
        "- What it writes can be false, offensive or copied from its training data; nobody filtered it.\n"
        f"- Rows of {number(window)} tokens were trained: nothing is known of longer texts.\n"
        f"- Not measured: {NOT_MEASURED}{benchmarks}.",
    )


def provenance(run):
    """Commit, versions, machine, data fingerprint and command."""
    record, made = run.record, run.comparison
    words = [word for word in record.get("command") or () if not word.startswith("--local_rank")]  # the launcher's
    found = (record.get("versions") or {}).items()
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in found if version)
    hardware = record.get("hardware") or record.get("device")
    rows = {
        "code": f"smolpretrain, commit {code(record.get('git_commit') or 'unknown')}",
        "versions": versions,
        "trained on": f"{code(hardware)}, ranks: {number(run.ranks)}" if hardware and run.ranks else "not recorded",
        "throughput": f"{number(run.result.get('tokens_per_second'))} tokens/s" if run.result else "",
        "compared on": code(made["hardware"]) if made.get("hardware") else "",
        "interrupted and gone on": ", ".join(f"at step {number(step)}" for step in run.resumed),
        "data fingerprint": code((record.get("data") or {}).get("fingerprint")),
        "command": code(f"run_pretrain.py {shlex.join(words)}") if words else "not recorded",
    }
    rows = [[name, value] for name, value in rows.items() if value]
    said = "All from the run's own `run.json`, `metrics.jsonl`, `samples.jsonl` and `report/`; no figure is typed."
    return section("Provenance", table(["what", "value"], rows), said)


def energy(run):
    """Not measured; the plan's estimate where there is one, called so."""
    time = run.plan.get("time") or {}
    hours = time.get("kilowatt_hours")
    estimate = f" Estimated before the run, by its plan: {number(hours)} kWh." if hours else ""
    return section("Energy", f"Not measured.{estimate}")


def citation(run, repo_id):
    """BibTeX; the year is that of the run's end, where it is recorded."""
    name = re.sub(r"[^\w .-]", "", run.name)
    fields = {"title": name}
    if repo_id and "/" in repo_id:
        fields = {"author": repo_id.split("/")[0]} | fields | {"howpublished": f"https://huggingface.co/{repo_id}"}
    if run.record.get("finished"):
        fields["year"] = run.record["finished"][:4]
    fields["note"] = f"Pre-trained with smolpretrain, commit {plain(run.record.get('git_commit') or 'unknown')}"
    key = re.sub(r"\W", "_", name)
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return section("Citation", "\n".join(["```bibtex", f"@misc{{{key},", *lines, "}", "```"]))
