"""Several held-out sets in a run: each one's bits per byte while it trains, at its end, in its report and its card."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_run import TINY
from transformers import AutoModelForCausalLM

from smolpretrain.data.collator import PackedCollator
from smolpretrain.data.prepared import load_blocks, load_validation_documents
from smolpretrain.data.tokens.tokenization import load_tokenizer
from smolpretrain.eval import perplexity
from smolpretrain.eval.parts import corpora
from smolpretrain.hub import card, publish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(launch, corpus_file, tmp_path_factory):
    """Twelve steps on two ranks with two sets: prose that is like the training text, and code that is not."""
    where = tmp_path_factory.mktemp("held out")
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    code = [path.read_text() for path in sorted((ROOT / "data" / "pack").glob("*.py")) if path.stat().st_size]
    for name, rows in {"train": texts, "like": texts[:40], "code": code}.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    sets = {"like": str(where / "like.jsonl"), "code": [str(where / "code.jsonl")]}
    words = [word for word in TINY if not word.startswith(("eval_strategy", "validation_fraction"))]
    done = launch("deepspeed", "--num_gpus", "2", "run_pretrain.py", *words, f"data_files={where / 'train.jsonl'}",
                  f"validation_files={json.dumps(sets)}", f"output_dir={where / 'run'}", "max_steps=12", "eval_steps=6",
                  "per_device_train_batch_size=2", "save_strategy=no", OMP_NUM_THREADS="1")  # fmt: skip
    return where / "run", {"like": texts[:40], "code": code}, done


def read(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_each_set_is_measured_at_eval_steps_and_all_together_as_one_sum(run):
    directory, _, done = run
    rows = [row for row in read(directory, "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [6, 12]
    for row in rows:
        parts = [(row[f"eval_{name}_loss"], row[f"eval_{name}_tokens"]) for name in ("code", "like")]
        tokens = sum(count for _, count in parts)
        assert row["eval_tokens"] == tokens
        assert row["eval_loss"] == pytest.approx(sum(loss * count for loss, count in parts) / tokens)
        assert row["eval_code_bits_per_byte"] != row["eval_like_bits_per_byte"]
        said = f"code {row['eval_code_loss']:.4f} nats a token, {row['eval_code_bits_per_byte']:.4f} bits a byte"
        assert said in done.stdout + done.stderr and said in (directory / "training_log.md").read_text()
    assert " 40 documents stand in the held-out text too: they were left out of training." in done.stdout


def test_the_figure_of_a_set_is_that_of_its_rows_alone(run):
    """The last one of 12 steps, by the exported model, without the Trainer: the same rows, added up."""
    directory, _, _ = run
    tokenizer = load_tokenizer(str(directory))
    network, nats, tokens = load(directory), 0.0, 0
    rows = load_blocks(directory / "prepared", "validation_code")
    for row in rows:
        batch = PackedCollator(tokenizer.eos_token_id)([row])
        with torch.no_grad():
            logits = network(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        targets = batch["labels"][0, 1:]
        losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum")
        nats, tokens = nats + losses.item(), tokens + int((targets != -100).sum())
    last = [row for row in read(directory, "metrics.jsonl") if "eval_loss" in row][-1]
    assert last["eval_code_tokens"] == tokens
    assert last["eval_code_loss"] == pytest.approx(nats / tokens, rel=1e-3)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_the_end_judges_each_set_beside_its_yardsticks(run):
    directory, texts, done = run
    result = json.loads((directory / "run.json").read_text())["result"]
    assert set(result["held_out_sets"]) == {"code", "like"}
    tokenizer = load_tokenizer(str(directory))
    for name, judged in result["held_out_sets"].items():
        assert list(load_validation_documents(directory / "prepared", f"validation_{name}")) == texts[name]
        sums = perplexity.score_documents(load(directory), tokenizer, texts[name], window=64, progress=False)
        assert judged["bits_per_byte"] == pytest.approx(perplexity.summarize(sums)["bits_per_byte"], rel=1e-6)
        assert judged["held_out"]["documents"] == len(texts[name])
        assert all(math.isfinite(judged[f"{twin}_bits_per_byte"]) for twin in ("random", "unigram"))
        assert f"held-out bits per byte, {name}: {judged['bits_per_byte']:.4f} (random weights" in done.stdout
    documents = sum(len(rows) for rows in texts.values())
    assert result["held_out"]["documents"] == documents and "held_out_sets" not in result["held_out"]


def test_report_and_card_have_a_row_a_set_and_the_folder_reproduces_the_score(run):
    directory, _, _ = run
    result = json.loads((directory / "run.json").read_text())["result"]
    with open(directory / "report" / "report.csv", newline="") as file:
        rows = {row["figure"]: row for row in csv.DictReader(file)}
    page, text = (directory / "report" / "report.html").read_text(), card.make_card(directory, None, "mit")
    for name, judged in result["held_out_sets"].items():
        row = rows[f"held-out bits per byte ({name})"]
        assert float(row["value"]) == judged["bits_per_byte"] and row["low"] and row["n"]
        assert f"held-out bits per byte ({name}), random weights" in rows
        assert f"held-out bits per byte ({name}) during training, last" in rows
        assert f"held-out bits per byte ({name})" in page and f"bits per byte, `{name}`" in text
    assert "Held out: text of its own (`code`, `like`)" in text
    said = publish.reproduce(directory, directory, json.loads((directory / "run.json").read_text()))
    assert said.startswith("held-out bits per byte") and "over 5" in said


def test_a_prepared_set_s_own_sets_are_corpora_of_their_own_for_compare(run):
    directory, texts, _ = run
    words = dict.fromkeys(corpora.OPTIONS) | {"prepared_dir": str(directory / "prepared"), "text_column": "text"}
    assert corpora.read_corpora(SimpleNamespace(**words)) == texts
