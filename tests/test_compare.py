"""Claims about eval/compare.py: the figures are those of the functions, the pages stand alone in a real browser."""

import csv
import json
import math
import re
import statistics

import pytest
import torch
from browser import opened, until, widest
from sacrebleu import sentence_bleu
from test_perplexity import DOCUMENTS, byte_tokenizer, make_model
from transformers import set_seed

from smolpretrain.eval import compare, perplexity
from smolpretrain.eval.parts import generation, page

PROMPTS = ["The cell makes", "Water boils at", "Once <b>more</b>"]
TEXTS = [text for text in DOCUMENTS if text.strip()] + [f"document {n}, " * (n + 3) for n in range(8)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two models of a run's folder, one of them against its random twin, as the command compares them."""
    where = tmp_path_factory.mktemp("compare")
    tokenizer = byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    for name in ("run", "run/checkpoint-5"):
        make_model(hidden_act="silu" if name == "run" else "gelu").save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
    (where / "run" / "run.json").write_text("{}")
    (where / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (where / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    words = [f"random_init:{where}/run", f"{where}/run/checkpoint-5", f"released:{where}/run"]
    options = ["--data_files", f"texts={where}/texts.jsonl", "--prompts", f"{where}/prompts.txt", "--window", "32",
               "--judge", f"{where}/run", "--max_new_tokens=12", "--rounds=2", "--samples=3", "--seed=3"]  # fmt: skip
    compare.main([*words, *options, "--output_dir", str(where / "out")])
    with open(where / "out" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return where, rows, words, options


def value(rows, model, metric):
    found = [row for row in rows if row["model"] == model and row["metric"] == metric]
    assert len(found) == 1, (model, metric)
    return float(found[0]["value"])


def test_every_model_is_named_with_its_kind_and_every_figure_with_its_settings(compared):
    _, rows, *_ = compared
    kinds = {row["model"]: row["kind"] for row in rows}
    assert kinds == {"random run": "random_init", "run/checkpoint-5": "checkpoint", "run": "released"}
    for row in rows:
        assert row["value"] and row["n"] and row["data"] and json.loads(row["settings"])
    assert {row["commit"] for row in rows} != {""}, "this is a checkout, so each row has its commit"
    assert next(r["data"] for r in rows if r["metric"] == "bits_per_byte").startswith("texts (sha256 ")


def test_kinds_are_inferred_where_they_are_plain(compared):
    where = compared[0]
    (where / "plain").mkdir(exist_ok=True)
    words = {f"{where}/run": "checkpoint", f"{where}/run/checkpoint-5": "checkpoint", f"{where}/plain": "other"}
    words |= {"someone/model@v1": "released", f"other:{where}/run": "other", f"random_init:{where}/run": "random_init"}
    assert {word: compare.Candidate(word).kind for word in words} == words


def test_held_out_figures_are_those_of_perplexity_and_differences_are_paired(compared):
    where, rows, *_ = compared
    models = {
        "run": perplexity.load_model(where / "run"),
        "random run": compare.Candidate(compared[2][0]).load("auto", "cpu", seed=3),
    }
    tokenizer = perplexity.load_config(where / "run")[1]
    expected = {
        name: perplexity.summarize(perplexity.score_documents(model, tokenizer, TEXTS, window=32, progress=False))
        for name, model in models.items()
    }
    for name, result in expected.items():
        assert value(rows, name, "bits_per_byte") == pytest.approx(result["bits_per_byte"], rel=1e-6)
    difference = value(rows, "run", "bits_per_byte_difference")
    assert difference == pytest.approx(
        expected["run"]["bits_per_byte"] - expected["random run"]["bits_per_byte"], rel=1e-6
    )
    ends = next(r for r in rows if r["model"] == "run" and r["metric"] == "bits_per_byte_difference")
    assert float(ends["low"]) < difference < float(ends["high"])
    assert json.loads(ends["settings"])["minus"] == "random run"


def samples_of(where):
    return [json.loads(line) for line in (where / "out" / "comparison_samples.jsonl").read_text().splitlines()]


def test_continuations_are_the_models_own_and_sampled_ones_follow_the_seed(compared):
    where, *_ = compared
    model, (_, tokenizer) = perplexity.load_model(where / "run"), perplexity.load_config(where / "run")
    samples = [s for s in samples_of(where) if s["model"] == "run"]
    assert len(samples) == len(PROMPTS) * (1 + 3)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for step in range(12):  # noqa: B007 - greedy, one full forward pass a token
            best = model(ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, best.view(1, 1)], 1)
            if best == tokenizer.eos_token_id:
                break
        greedy = next(s for s in samples if s["prompt"] == prompt and s["decoding"] == "greedy")
        expected = ids[0, -(step + 1) :].tolist()
        assert greedy["ids"] == (expected[:-1] if greedy["ended"] else expected)
    drawing = {"samples": 3, "temperature": 0.8, "top_p": 0.95}
    again = generation.continue_prompts(model, tokenizer, PROMPTS, "sampled", 12, seed=3, **drawing)
    assert [s["ids"] for s in samples if s["decoding"] == "sampled"] == [s["ids"] for s in again]
    other = generation.continue_prompts(model, tokenizer, PROMPTS, "sampled", 12, seed=1, **drawing)
    assert [s["ids"] for s in other] != [s["ids"] for s in again]


def test_sampling_has_no_limit_but_the_stated_ones(compared):
    model, (_, tokenizer) = perplexity.load_model(compared[0] / "run"), perplexity.load_config(compared[0] / "run")
    drawn = generation.continue_prompts(model, tokenizer, PROMPTS[:1], "sampled", 1, samples=300, temperature=1e3)
    assert len({tuple(row["ids"]) for row in drawn}) > 100, "transformers' own top_k is 50"


def test_the_judge_s_perplexity_is_of_the_continuation_given_its_prompt(compared):
    where, rows, *_ = compared
    model, (_, tokenizer) = perplexity.load_model(where / "run"), perplexity.load_config(where / "run")
    nll = tokens = 0
    for sample in samples_of(where):
        if sample["model"] == "run" and sample["decoding"] == "greedy":
            prompt = tokenizer(sample["prompt"])["input_ids"]  # begins with <|endoftext|>, as the scorer's prefix
            text = tokenizer(sample["prompt"] + sample["text"], return_tensors="pt", split_special_tokens=True)
            with torch.no_grad():
                logits = model(text["input_ids"], use_cache=False).logits[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(logits, text["input_ids"][0, 1:], reduction="none")
            nll, tokens = nll + losses[len(prompt) - 1 :].sum().item(), tokens + len(losses) - len(prompt) + 1
    assert value(rows, "run", "sample_perplexity_greedy") == pytest.approx(math.exp(nll / tokens), rel=1e-4)


def test_speed_counts_each_id_and_reads_the_prompt_apart(compared):
    where, rows, *_ = compared
    model, (_, tokenizer) = perplexity.load_model(where / "run"), perplexity.load_config(where / "run")
    read = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    rates = generation.time_generation(model, tokenizer, PROMPTS, prompt_tokens=40, new_tokens=5, rounds=2)
    hook.remove()
    assert read == [40, 1, 1, 1, 1, 1] * 3, "one round of warm-up, two that count"
    assert set(map(len, rates.values())) == {2}
    row = next(r for r in rows if r["metric"] == "decode_tokens_per_second")
    assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    settings = json.loads(row["settings"])
    assert settings["hardware"] and settings["dtype"] == "torch.float32" and settings["warm_up"] == 1


def test_repetition_diversity_and_self_bleu_are_what_their_papers_say():
    assert generation.repetition([1, 2, 3, 4, 5, 6]) == 0 == generation.repetition([1, 2])
    assert generation.repetition([7] * 10) == pytest.approx(1 - 1 / 7)
    assert generation.repetition([1, 2, 3, 4] * 2) == pytest.approx(1 - 4 / 5)
    assert generation.distinct(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert generation.distinct(["a b a", "b a"], 2) == pytest.approx(2 / 3)
    texts = ["the cat sat on the mat today", "the cat sat on a mat", "a dog ran off with it very fast", "cat the"]
    theirs = [sentence_bleu(text, texts[:n] + texts[n + 1 :], smooth_method="floor", smooth_value=0.5, tokenize="none",
                            use_effective_order=False).score / 100 for n, text in enumerate(texts[:3])]  # fmt: skip
    assert generation.self_bleu(texts[:3]) == pytest.approx(
        statistics.mean(sentence_bleu(text, [t for t in texts[:3] if t != text], smooth_method="floor",
                                      smooth_value=0.5, tokenize="none").score / 100 for text in texts[:3])
    )  # fmt: skip
    ours = [generation.bleu(t.split(), [o.split() for o in texts if o != t]) for t in texts[:3]]
    assert ours == pytest.approx(theirs)
    assert generation.self_bleu(["same words in each of these"] * 3) == 1 and generation.bleu([], [["a"]]) == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_needs_no_network_has_no_error_and_fits_its_window(compared, width):
    with opened(compared[0] / "out" / "comparison.html", width) as shown:
        assert [url for url in shown.requests if not url.startswith(("file:", "data:"))] == []
        assert shown.errors == [] and widest(shown) <= 0
        images = shown.locator("img").all()
        assert len(images) == 3
        for image in images:
            assert image.evaluate("i => i.naturalWidth") > 0 and len(image.get_attribute("alt")) > 30
        assert "Once <b>more</b> ..." in shown.locator("h3").all_inner_texts(), "what a model wrote is text, not markup"
        assert shown.locator(".sample").count() == len(PROMPTS) * 3 * 2


def test_a_page_that_asks_for_something_is_refused_it_by_its_own_policy(tmp_path):
    file = tmp_path / "page.html"
    text = page.html("A page", [("text", "words")]).replace("words", '<img src="http://127.0.0.1:9/x.png">')
    file.write_text(text)
    with opened(file) as shown:
        until(lambda: shown.errors, shown)
        assert any("Content Security Policy" in error and "127.0.0.1:9" in error for error in shown.errors)


def test_markdown_has_the_same_figures_and_each_metric_s_meaning(compared):
    where, rows, *_ = compared
    text = (where / "out" / "comparison.md").read_text()
    for metric in {row["metric"] for row in rows}:
        assert f"| {metric.replace('_', ' ')} |" in text
    assert f"{value(rows, 'run', 'bits_per_byte'):.4g} (" in text
    for picture in re.findall(r"!\[[^\]]{30,}\]\((\S+\.png)\)", text):
        assert (where / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"!\[", text)) == 3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("{run} --samples 1", "samples must be at least 2, got 1"),
        ("{run} --temperature 0", "temperature must be above 0"),
        ("{run} --prompts none.txt", "prompts none.txt: "),
        ("{run} --window 65", "max_position_embeddings (64), got 65"),
        ("{run} random_init:nobody/none", "nobody/none: no directory or Hub model"),
        ("{run} --data_files none.jsonl", "none.jsonl: no such file"),
        ("{run} --device nowhere", "device nowhere needs a device that torch sees"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(compared, tmp_path, capsys, words, reason):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        compare.main([*words.format(run=compared[0] / "run").split(), "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and reason in error
    assert not (tmp_path / "out").exists()


def test_random_weights_are_those_of_the_seed(compared):
    twin = compare.Candidate(compared[2][0])
    one, same, other = (twin.load("auto", "cpu", seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    set_seed(0)


def test_our_prompts_are_ten_lines_without_an_end():
    prompts = generation.read_prompts()
    assert len(prompts) == len(set(prompts)) == 10
    assert not [p for p in prompts if p.endswith((".", "?", "!"))]


def test_a_difference_is_paired_only_where_the_same_bytes_were_scored():
    each = torch.tensor([[8.0, 4, 5, 1]] * 12).numpy()
    first, shorter = each.copy(), each.copy()
    first[:, 0] += 5 * math.log(2)
    shorter[0, 2] = 4
    rows = compare.difference_rows({"c": (first, "c", {})}, {"c": (each, "c", {})}, "first")
    assert [row["value"] for row in rows] == [pytest.approx(-1.0)] and rows[0]["n"] == 12
    assert compare.difference_rows({"c": (first, "c", {})}, {"c": (shorter, "c", {})}, "first") == []
