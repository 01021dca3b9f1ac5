"""Claims about what a run measures of itself and about its report, on one real run that two trackers listen to."""

import csv
import json
import math
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from browser import opened, widest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smolpretrain.data.prepared import load_validation_documents
from smolpretrain.eval import report
from smolpretrain.eval.parts import generation
from smolpretrain.eval.perplexity import load_config

pytestmark = pytest.mark.slow

BENCHMARK = [
    {"task": task, "metric": "acc", "value": value, "stderr": error, "chance": 0.25, "n": n, "model": "runs/x",
     "settings": {"limit": None}, "file": "ours.json", "commit": "abc"}
    for task, value, error, n in (("ours", 0.41, 0.02, 600), ("ours/level=3", 0.27, 0.03, 200))
]  # fmt: skip


@pytest.fixture(scope="module")
def run(reported):
    return reported


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logged(run):
    return [row for row in rows_of(run / "metrics.jsonl") if "loss" in row]


def test_every_logged_step_says_how_fast_how_full_and_how_long_it_waited(run):
    terms, rows = json.loads((run / "run.json").read_text()), logged(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        expected = row["tokens_per_second"] * terms["flops_per_token"] / (2 * terms["peak_flops"])
        assert row["mfu"] == pytest.approx(expected, abs=1e-5) and row["mfu"] > 0
        assert 0 <= row["data_wait_share"] < 1
        assert (
            len(row["peak_memory_gib_by_rank"]) == 2 and max(row["peak_memory_gib_by_rank"]) == row["peak_memory_gib"]
        )
        assert row["peak_memory_gib"] > 0.1 and row["grad_norm"] > 0 and row["skipped_steps"] == 0


def test_held_out_bits_per_byte_are_measured_at_eval_steps_in_the_bytes_of_the_tokens_scored(run):
    rows = [row for row in rows_of(run / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [6, 12]
    tokenizer = load_config(str(run))[1]
    manifest = json.loads((run / "prepared" / "manifest.json").read_text())
    split, texts = manifest["splits"]["validation"], load_validation_documents(run / "prepared")
    assert split["remainder_tokens"] < 64
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    packed = np.concatenate(ids)[: split["blocks"] * 64].reshape(-1, 64)
    firsts = np.cumsum([0, *map(len, ids[:-1])])
    scored = np.ones(packed.size, bool)
    scored[firsts[firsts < packed.size]] = False  # the first token of a document is never a target
    scored = scored.reshape(packed.shape)
    scored[:, 0] = False
    size = sum(
        len(tokenizer.backend_tokenizer.id_to_token(int(i))) for i in packed[scored] if i != tokenizer.eos_token_id
    )
    for row in rows:
        assert row["eval_tokens"] == scored.sum()
        expected = row["eval_loss"] * row["eval_tokens"] / math.log(2) / size
        assert row["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_all_prompts_are_continued_at_sample_steps(run):
    rows = rows_of(run / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (s, p) for s in (6, 12) for p in generation.read_prompts()
    ]
    assert all(row["tokens_seen"] == row["step"] * 4 * 64 and row["decoding"] == "greedy" for row in rows)


def test_tensorboard_hears_what_the_metrics_say_without_a_network(run):
    events = EventAccumulator(str(next(run.glob("runs/*/events*")).parent))
    events.Reload()
    rows = logged(run)
    for tag, key in (("train/loss", "loss"), ("train/mfu", "mfu"), ("train/tokens_per_second", "tokens_per_second"),
                     ("train/data_wait_share", "data_wait_share"), ("train/grad_norm", "grad_norm")):  # fmt: skip
        heard = {event.step: event.value for event in events.Scalars(tag)}
        assert heard == pytest.approx({row["step"]: row[key] for row in rows}, rel=1e-5), tag
    assert len(events.Scalars("eval/bits_per_byte")) == 2


def test_trackio_hears_it_too_and_makes_no_space(run):
    database = sqlite3.connect(run.parent / "trackio" / "smol.db")
    found = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    heard = [row["train/mfu"] for row in found if "train/mfu" in row]
    assert heard == pytest.approx([row["mfu"] for row in logged(run)])
    arguments = json.loads((run / "run.json").read_text())["arguments"]
    assert arguments["trackio_static_space_id"] is False and arguments["trackio_space_id"] is None


def test_the_run_wrote_its_report_and_every_figure_names_its_file_settings_and_commit(run):
    rows, record = table(run / "report" / "report.csv"), json.loads((run / "run.json").read_text())
    for row in rows:
        assert (run / row["file"]).is_file() and row["commit"] == record["git_commit"], row
        assert isinstance(json.loads(row["settings"]), dict)
    value = {row["figure"]: float(row["value"]) for row in rows}
    assert value["held-out bits per byte"] == record["result"]["bits_per_byte"]
    assert value["loss at the last logged step"] == logged(run)[-1]["loss"]
    ends = next(row for row in rows if row["figure"] == "held-out bits per byte")
    assert float(ends["low"]) < record["result"]["bits_per_byte"] < float(ends["high"])
    assert json.loads(ends["settings"]) == {"window": 64, "stride": 32, "prefix": "bos"}
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    for name in ("loss", "bits_per_byte", "grad_norm", "throughput", "memory"):
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"]({name}.png)" in text


@pytest.fixture(scope="module")
def copied(run, tmp_path_factory):
    """The run elsewhere, with a benchmark beside its report and another last loss."""
    copy = tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("prepared"))
    (copy / "report" / "benchmark.json").write_text(json.dumps(BENCHMARK))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    last = max(n for n, line in enumerate(lines) if '"loss"' in line)
    lines[last] = json.dumps(json.loads(lines[last]) | {"loss": 1.25})
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report.main([str(copy)])
    return copy


def test_figures_come_from_the_files_and_the_benchmark_stands_beside_chance(copied):
    value = {row["figure"]: row for row in table(copied / "report" / "report.csv")}
    assert value["loss at the last logged step"]["value"] == "1.25"
    score = value["benchmark: ours, acc"]
    assert (score["value"], score["n"], score["commit"], score["file"]) == (
        "0.41",
        "600",
        "abc",
        "report/benchmark.json",
    )
    text = (copied / "report" / "report.md").read_text(encoding="utf-8")
    assert "| ours | acc | runs/x | 0.41 | 0.02 | 0.25 | 600 | yes |" in text
    assert "| ours/level=3 | acc | runs/x | 0.27 | 0.03 | 0.25 | 200 | no |" in text


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_s_page_needs_no_network_and_fits_a_phone(copied, width):
    with opened(copied / "report" / "report.html", width) as shown:
        assert [url for url in shown.requests if not url.startswith(("file:", "data:"))] == []
        assert shown.errors == [] and widest(shown) <= 0
        assert shown.locator("img").count() == 5 and shown.locator(".sample").count() == 2 * 10
        for image in shown.locator("img").all():
            assert image.evaluate("i => i.naturalWidth") > 0 and len(image.get_attribute("alt")) > 30


def test_a_report_of_what_is_no_run_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 2 and "no run.json and metrics.jsonl of a run" in error
    assert not Path(tmp_path, "report").exists()
