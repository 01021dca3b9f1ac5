"""Claims about the model card: huggingface_hub takes it, its figures are the run's, and nothing recorded is markup."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SECRETS
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from smolpretrain.hub import card
from smolpretrain.hub.card_markup import code, number, plain
from smolpretrain.hub.run_record import clean, clean_text

SECTIONS = [
    *("Quick start", "Model at a glance", "Training data", "Hyper-parameters", "Curves", "Evaluation", "Samples"),
    *("Intended use and limits", "Provenance", "Energy", "Citation"),
]
HOME = "/home" + "/somebody"
VALIDATE = """
import sys
from huggingface_hub import ModelCard
try:
    ModelCard.load(sys.argv[1]).validate()
except ValueError as error:
    sys.exit(f"refused: {error}")
"""


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def headings(text):
    return re.findall(r"^## (.+)$", text, flags=re.MULTILINE)


@pytest.fixture
def run(compared_run, tmp_path):
    """A copy of the compared run that a test may change."""
    return Path(shutil.copytree(compared_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.arrow", "lm_eval")))


@pytest.fixture(scope="module")
def text(compared_run):
    return card.make_card(compared_run, "someone/tiny", "apache-2.0", language=["en"])


@pytest.mark.slow
def test_the_card_has_all_its_sections_and_says_that_weights_were_random(text):
    assert headings(text) == SECTIONS
    body = ModelCard(text).text
    assert "pre-trained from random initialisation (seed 42) on 3,072 tokens of `documents.jsonl`" in body
    assert "None" not in body and not re.search(r"\bnan\b|\binf\b", body)


@pytest.mark.slow
def test_the_hub_s_own_library_loads_validates_and_keeps_the_card(text, hub, tmp_path):
    path, other = tmp_path / "README.md", tmp_path / "OTHER.md"
    path.write_text(text, encoding="utf-8")
    other.write_text(text.replace("license: apache-2.0", "license: apple"), encoding="utf-8")
    assert str(ModelCard.load(path)) == text
    done = [
        subprocess.run([sys.executable, "-c", VALIDATE, file], env=os.environ | hub.environment(tmp_path / "home"),
                       capture_output=True, text=True)
        for file in (path, other)
    ]  # fmt: skip
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == 1 and 'refused: {"errors"' in done[1].stderr, "the Hub was truly asked"


@pytest.mark.slow
def test_the_metadata_is_what_the_hub_sorts_models_by(text, tmp_path):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    front = metadata_load(tmp_path / "README.md")
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert front["license"] == "apache-2.0" and front["language"] == ["en"]
    assert front["tags"] == ["pre-training", "from-scratch", "smolpretrain"]
    assert not {"base_model", "datasets"} & set(front), "files are no data set of the Hub's"
    assert yaml.safe_load(text.split("---\n")[1]) == front


@pytest.mark.slow
def test_scores_in_the_model_index_are_this_model_s_with_their_settings(text, compared_run):
    results = {(r.metric_name, r.dataset_name): r for r in ModelCard(text).data.eval_results}
    scored = json.loads((compared_run / "run.json").read_text())["result"]["held_out"]
    named = "(window 64, stride 32, prefix bos)"
    source = "held out of documents.jsonl"
    for name in ("bits per byte", "token perplexity", "word perplexity"):
        assert results.pop((f"{name} {named}", source)).metric_value == scored[name.replace(" ", "_")]
    benchmark = results.pop(("acc (0-shot)", "ours"))
    assert benchmark.metric_value == 0.41 and benchmark.metric_args == {"stderr": 0.02, "chance": 0.25, "n": 600}
    assert results == {}, "neither the random twin nor the same text twice"


@pytest.mark.slow
def test_every_figure_of_the_tables_comes_from_a_file_of_the_run(run):
    """Each file's numbers are moved by themselves; the card moves with them."""
    before = card.make_card(run, None, "mit")
    record = json.loads((run / "run.json").read_text())
    manifest = json.loads((run / "prepared" / "manifest.json").read_text())
    result = record["result"]
    moved = {
        "run.json": [record["parameters"], result["tokens_seen"], result["held_out"]["documents"],
                     *(result[f"{name}bits_per_byte"] for name in ("", "random_", "unigram_")),
                     *(record["data"]["splits"][s][k] for s in ("train", "validation") for k in ("tokens", "bytes"))],
        "prepared/manifest.json": [manifest["skipped_rows"]],
        "metrics.jsonl": [rows_of(run / "metrics.jsonl")[-1]["eval_loss"]],
        "config.json": [json.loads((run / "config.json").read_text())[k] for k in ("hidden_size", "vocab_size")],
    }  # fmt: skip
    for file, values in moved.items():
        whole = (run / file).read_text()
        for value in values:
            other = value * 3 + 7
            pattern = re.compile(rf"(?<=: ){re.escape(json.dumps(value))}(?=[,\n\r}}])")
            assert pattern.search(whole), (file, value)
            (run / file).write_text(pattern.sub(json.dumps(other), whole))
            after = card.make_card(run, None, "mit")
            changed = set(after.splitlines()) - set(before.splitlines())
            assert any(number(other) in line for line in changed), (file, value, changed)
            (run / file).write_text(whole)
    for name, row in (("comparison.csv", r"bits_per_byte,([\d.]+)"), ("benchmark.json", r'"value": ([\d.]+)')):
        whole = (run / "report" / name).read_text()
        for value in re.findall(row, whole):
            (run / "report" / name).write_text(whole.replace(value, "7.125"))
            assert "7.125" in card.make_card(run, None, "mit"), (name, value)
        (run / "report" / name).write_text(whole)


@pytest.mark.slow
def test_the_batch_is_the_one_over_all_ranks_and_unique_tokens_are_no_more_than_there_are(text, run):
    assert "| global batch | 256 tokens: 4 rows of 64 (micro-batch 2 x accumulation 1 x ranks 2) |" in text
    assert "| steps | 12 |" in text and "`adamw_bnb_8bit`; betas 0.9, 0.95" in text
    assert "Tokens seen: 3,072. Unique: 3,072. Epochs: 0." in text
    record = json.loads((run / "run.json").read_text())
    record["result"]["tokens_seen"] = seen = 64 * record["data"]["splits"]["train"]["blocks"] * 2
    (run / "run.json").write_text(json.dumps(record))
    again = card.make_card(run, None, "mit")
    assert f"Tokens seen: {seen:,}. Unique: {seen // 2:,}. Epochs: 2." in again


@pytest.mark.slow
def test_provenance_names_commit_versions_machine_data_and_command(run):
    record = json.loads((run / "run.json").read_text())
    edit(run / "run.json", command=["--local_rank=0", *(w for w in record["command"] if "local_rank" not in w)])
    text = card.make_card(run, None, "mit")
    table = text.split("## Provenance")[1].split("## Energy")[0]
    for value in (record["git_commit"], record["versions"]["torch"], record["hardware"], record["data"]["fingerprint"]):
        assert str(value) in table
    assert "ranks: 2" in table and "max_steps=12" in table and "data_files=documents.jsonl" in table
    assert "--local_rank" not in table
    assert f"year = {{{record['finished'][:4]}}}" in text


@pytest.mark.slow
def test_all_prompts_of_the_last_step_are_there_and_sampled_ones_with_their_seed(text, compared_run):
    rows = [row for row in rows_of(compared_run / "samples.jsonl") if row["step"] == 12]
    section = text.split("## Samples")[1].split("## Intended")[0]
    assert len(rows) == 10 and "at step 12, for all 10 prompts; none picked" in section
    for row in rows:
        assert f"- {code(row['prompt'])} ... {code(row['text'])}" in section
    assert "Sampled, seed 3, temperature 0.8, top_p 0.95, the first of 2 for each prompt" in section
    assert "- `` Once <b>more</b> | `x` `` ... " in section and "taken out of" not in section


@pytest.mark.slow
def test_pictures_are_named_relative_to_the_card_and_described(text, compared_run):
    shown = re.findall(r"!\[([^\n]*)\]\((\S+)\)", text)
    assert {Path(path).name for _, path in shown} >= {"loss.png", "bits_per_byte.png", "comparison_bits_per_byte.png"}
    for alt, path in shown:
        assert len(alt) > 30 and (compared_run / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("from_hub", [True, False])
def test_the_quick_start_runs_as_it_stands(run, hub, tmp_path, from_hub):
    card.main([str(run), "--license", "mit", *(["--repo", "user/quick"] if from_hub else [])])
    (program,) = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), flags=re.DOTALL)
    environment, where = dict(os.environ), run
    if from_hub:
        names = (
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
        hub.add("model", "user/quick", {name: (run / name).read_bytes() for name in names})
        environment, where = environment | hub.environment(tmp_path / "home"), tmp_path
    done = subprocess.run([sys.executable, "-c", program], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    prompt = rows_of(run / "samples.jsonl")[0]["prompt"]
    assert done.stdout.startswith(prompt) and len(done.stdout) > len(prompt) + 3


@pytest.mark.slow
def test_what_is_missing_is_said(run):
    for name in ("report", "prepared", "samples.jsonl", "model.safetensors"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    record = json.loads((run / "run.json").read_text())
    del record["result"]["held_out"], record["result"]["bits_per_byte"], record["command"], record["hardware"]
    (run / "run.json").write_text(json.dumps(record))
    text = card.make_card(run, None, "mit")
    assert headings(text) == SECTIONS and "model-index" not in text
    for sentence in (
        "There is no exported model yet",
        "There is no report beside this record",
        "Nothing was held out and scored at the end of this run",
        "No benchmark was run",
        "What cleaning left out is not known here",
        "The run wrote none (sample_steps)",
        "| command | not recorded |",
    ):
        assert sentence in text


@pytest.mark.slow
def test_a_run_that_has_not_ended_or_went_on_after_its_end_says_so(run):
    record = json.loads((run / "run.json").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    later = json.loads(lines[-2]) | {"step": 13, "tokens_seen": 13 * 256, "loss": 5.5}
    (run / "metrics.jsonl").write_text("".join(lines) + json.dumps(later) + "\n" + '{"step": 14, "lo')
    gone_on = card.make_card(run, None, "mit")
    assert "its record reaches step 13 of 12" in gone_on and "model-index:\n- name: run" in gone_on
    assert "bits per byte (window 64" not in gone_on.split("## Evaluation")[1].split("Compared")[0]
    del record["result"]
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text("".join(lines[:6]))
    (run / "training_log.md").write_text("# Training log\n\nResumed at step 4.\n")
    stopped = card.make_card(run, None, "mit")
    assert "**The run has not ended**: its record reaches step 6 of 12." in stopped
    assert "on 1,536 tokens of" in stopped and "| interrupted and gone on | at step 4 |" in stopped


@pytest.mark.slow
def test_skipped_steps_are_said_at_the_top(run):
    rows = rows_of(run / "metrics.jsonl")
    for row in rows:
        row |= {"skipped_steps": 2} if "loss" in row else {}
    where = [{"rank": 0, "rows": [5]}]
    rows.append({"step": 7, "tokens_seen": 1, "bad_step": "loss is nan", "applied": False, "where": where})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    top = card.make_card(run, None, "mit").split("## Quick start")[0]
    assert "**Steps that were not applied: 2.** Found bad: `loss is nan`, at step 7." in top


@pytest.mark.slow
def test_a_stream_s_table_is_not_taken_for_the_text(run):
    record = json.loads((run / "run.json").read_text())
    record["arguments"]["streaming"] = True
    (run / "run.json").write_text(json.dumps(record))
    data = card.make_card(run, None, "mit").split("## Training data")[1].split("## Hyper")[0]
    assert "counts only its first documents" in data and "Unique tokens and epochs were not counted" in data
    assert "Epochs: " not in data


@pytest.mark.slow
def test_weights_of_another_model_are_named_and_only_then_a_base_model_may_be(run):
    with pytest.raises(ValueError, match="base_model someone/first: this run began from random weights"):
        card.make_card(run, None, "mit", base_model="someone/first")
    record = json.loads((run / "run.json").read_text())
    record["arguments"]["init_from"] = f"{HOME}/runs/first/checkpoint-500"
    (run / "run.json").write_text(json.dumps(record))
    text = card.make_card(run, None, "mit", base_model="someone/first")
    assert "What those weights had seen before is not counted." in text
    assert "pre-trained from the weights of `checkpoint-500` on" in text and "from-scratch" not in text
    assert ModelCard(text).data.base_model == "someone/first" and "somebody" not in text


@pytest.mark.slow
def test_hub_data_sets_are_named_with_their_revision_also_in_a_mixture(run):
    record, sha = json.loads((run / "run.json").read_text()), "0123456789abcdef" * 2
    hub = {"dataset_name": "some/corpus", "dataset_config_name": "en", "dataset_commit": sha}
    local = {"dataset_name": "folder", "files": [{"name": "a.jsonl", "bytes": 1234, "sha256": "ab" * 32}]}
    mixture = [{"source": source, "weight": 0.5, "max_epochs": 1} for source in (hub, local)]
    for source in (hub, {"mixture": mixture, "mixture_seed": 0}):
        record["data"]["source"] = source
        (run / "run.json").write_text(json.dumps(record))
        text = card.make_card(run, None, "mit")
        assert ModelCard(text).data.datasets == ["some/corpus"] and sha in text.split("## Training data")[1]
    assert "tokens of a mixture of `some/corpus/en`, `folder`" in text and "`a.jsonl`, 1,234 bytes" in text


HOSTILE = (
    "</script><script>alert(1)</script> <img src=x onerror=alert(2)> ``` \n\n# Heading\n\n---\n| a | [l](http://x) \x1b"
)


@pytest.mark.slow
def test_a_manifest_of_another_set_is_not_taken_for_this_run_s(run):
    assert "null or blank rows passed over: 0" in card.make_card(run, None, "mit")
    edit(run / "prepared" / "manifest.json", fingerprint="0123456789abcdef", skipped_rows=5)
    assert "What cleaning left out is not known here" in card.make_card(run, None, "mit")


@pytest.mark.slow
def test_nothing_recorded_is_markup(run):
    samples = rows_of(run / "samples.jsonl")
    for row in samples:
        row |= {"prompt": row["prompt"] + HOSTILE, "text": HOSTILE, "decoding": HOSTILE}
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    record = json.loads((run / "run.json").read_text())
    record["arguments"] |= dict.fromkeys(("model_name", "optim", "lr_scheduler_type", "tokenizer_name"), HOSTILE)
    record["data"]["source"] = {"dataset_name": HOSTILE, HOSTILE: HOSTILE}
    record["versions"][HOSTILE], record["command"] = HOSTILE, [HOSTILE]
    (run / "run.json").write_text(json.dumps(record))
    edit(run / "config.json", dtype=HOSTILE)
    scores = json.loads((run / "report" / "benchmark.json").read_text())
    scores[0] |= {"task": HOSTILE, "metric": HOSTILE}
    (run / "report" / "benchmark.json").write_text(json.dumps(scores))
    text = card.make_card(run, None, "mit")
    assert headings(text) == SECTIONS and metadata_load_text(text)["license"] == "mit"
    shown = MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)
    assert "&lt;script&gt;" in shown and "<script" not in shown and '<img src="x' not in shown
    assert set(re.findall(r"<(\w+)", shown)) <= {
        *("h1", "h2", "p", "pre", "code", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "strong", "img")
    }
    assert shown.count("<h1>") == 1 and "\x1b" not in text
    assert {tag for tag in re.findall(r"<img [^>]*>", shown) if 'src="report/' not in tag} == set()


def metadata_load_text(text):
    return ModelCard(text).data.to_dict()


@pytest.mark.slow
def test_no_number_without_end_no_path_and_no_token_reaches_the_card(run, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    record = json.loads((run / "run.json").read_text())
    record["arguments"] |= {"model_name": f"{HOME}/my models/big", "deepspeed": "C:\\Users\\somebody\\ds.json"}
    record["arguments"]["tokenizer_name"] = str(Path.home() / "tokenizers" / "mine")
    record["command"] = [f"data_files={run}/x.jsonl", SECRETS["HF_TOKEN"], SECRETS["WANDB_API_KEY"]]
    record["result"]["held_out"] |= {"bits_per_byte": float("nan"), "token_perplexity": float("inf")}
    (run / "run.json").write_text(json.dumps(record))
    samples = rows_of(run / "samples.jsonl")
    samples[-1]["text"] = f" see {HOME}/notes/a.txt and {SECRETS['AWS_SECRET_ACCESS_KEY']} \ud800"
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    card.main([str(run), "--license", "mit"])
    text = (run / "README.md").read_text(encoding="utf-8")
    for forbidden in ("somebody", str(run), str(run.parent), str(Path.home()) + "/", *SECRETS.values()):
        assert forbidden not in text, forbidden
    assert not re.search(r"\b(nan|inf)\b", text, flags=re.IGNORECASE)
    assert "`big`" in text and "`ds.json`" in text and "`mine`" in text and "data_files=x.jsonl" in text
    assert "taken out of these texts" in text
    assert [r.metric_type for r in ModelCard(text).data.eval_results] == ["word_perplexity", "acc"]


def test_clean_takes_out_paths_and_tokens_and_leaves_words_and_addresses():
    for whole in ("and/or", "https://example.org/a/b?c=/d", "a.b/c/d", "configs/x.json", "3 / 4", "</p> <br/>"):
        assert clean_text(whole) == whole
    assert clean_text("x=/srv/data/a.jsonl,file:///opt/b/c.txt '/tmp/d/'") == "x=a.jsonl,c.txt 'd'"
    assert clean_text(f"{HOME} and ~/w/x/y.txt") == "~ and y.txt"
    assert clean_text("hf_" + "a1" * 12) == "[removed]"
    assert clean({"a": [float("inf"), 1.5, "/x/y z/w"]}, whole=True) == {"a": [None, 1.5, "w"]}


def test_code_and_plain_show_any_text_as_it_is():
    show = MarkdownIt("commonmark").enable("table").render
    for text in ("a`b", "`", "``x``", " a ", "<b>", "*a* _b_ [c](d) &amp; \\", "a | b", "# x", "1. y"):
        code_shown = re.sub(r"\s+", " ", show("x " + code(text)))
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert f"<code>{escaped}</code>" in code_shown
        assert escaped.strip() in show("x " + plain(text))
    assert code("a\nb\r\nc") == "`a\\nb\\nc`" and code("  ") == '`"  "`'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--license", ""], "license: asked for, never guessed"),
        (["--license", "Apache 2.0"], "license 'Apache 2.0' is no name of the Hub's"),
        (["--license", "mit", "--repo", "a/b/c"], "repo a/b/c: "),
        (["--license", "mit", "--base_model", "a/b"], "base_model a/b: this run began from random weights"),
        ([], "the following arguments are required: --license"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(run, capsys, words, reason):
    with pytest.raises(SystemExit) as stopped:
        card.main([str(run), *words])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "README.md").exists()


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"arguments": {"seed": 1}, "data": {"splits": {"train": 3}}}']
)
def test_what_is_no_record_of_a_run_is_one_sentence(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        card.make_card(tmp_path, None, "mit")


def test_the_least_record_gives_a_card_that_loads(tmp_path):
    (tmp_path / "run.json").write_text('{"arguments": {"seed": 1}}')
    text = card.make_card(tmp_path, None, "mit")
    assert headings(text) == SECTIONS and ModelCard(text).data.license == "mit" and "None" not in text


@pytest.mark.slow
def test_the_command_runs_in_place(run):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        card.main([str(run), "--license", "odc-by"])
    done = subprocess.run([sys.executable, ROOT / "hub" / "card.py", run, "--license", "odc-by"], cwd=run.parent,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and done.stdout == said.getvalue() == f"wrote {run / 'README.md'}\n"
