"""Claims about the figures of eval/perplexity.py: equal to other tools, with intervals that cover, of any model."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_perplexity import CLOSE, DOCUMENTS, byte_tokenizer, close, make_model, score

from smolpretrain.eval import perplexity
from smolpretrain.eval.parts import provenance
from smolpretrain.eval.parts.intervals import bootstrap, measure
from smolpretrain.eval.perplexity import summarize

TEXTS = [text for text in DOCUMENTS if text.strip()] + ["\n two lines \n", "0123456789 " * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def run_command(tmp_path):
    """Run the command in this process; what it wrote."""

    def run(*words):
        perplexity.main([*map(str, words), "--output", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text())

    return run


def as_rows(texts, path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# lm-eval


TASK = """
task: here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.mark.parametrize("window", [16, 64])
def test_compatible_with_lm_eval_gives_lm_eval_s_own_figures(model, tokenizer, tmp_path, window):
    texts = [*TEXTS, " \n\t"]  # lm-eval scores blanks too
    file = as_rows(texts, tmp_path / "texts.jsonl")
    (tmp_path / "here.yaml").write_text(TASK.format(file=file))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=1)
    theirs = simple_evaluate(lm, tasks=["here"], task_manager=tasks, bootstrap_iters=0)["results"]["here"]
    ours = summarize(score(model, tokenizer, texts, window=window, compatible_with="lm_eval"))
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-6), metric
    own = summarize(score(model, tokenizer, texts, window=window, stride=window))
    assert abs(own["bits_per_byte"] - ours["bits_per_byte"]) > 1e-4, "the option changes what is measured"


# evaluate's stock metric: its script is not on PyPI, so its published definition is computed here with the tokenizer's
# own padding, the mask and a loss over whole batches, none of which eval/perplexity.py has.


def stock_perplexities(model, tokenizer, texts, start=True, max_length=None):
    tokenizer.pad_token = tokenizer.eos_token
    length = max_length and max_length - start
    rows = tokenizer(texts, add_special_tokens=False, padding=True, truncation=bool(length), max_length=length,
                     return_tensors="pt")  # fmt: skip
    ids, mask = rows["input_ids"], rows["attention_mask"]
    if start:
        ids = torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], 1)
        mask = torch.cat([torch.ones(len(mask), 1, dtype=mask.dtype), mask], 1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return torch.exp((losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).tolist()


@pytest.mark.parametrize(("prefix", "window"), [("bos", 32), ("bos", 8), ("none", 12)])
def test_compatible_with_evaluate_is_the_mean_of_per_text_perplexities(model, tokenizer, prefix, window):
    texts = [text for text in TEXTS if len(text) > 1]
    theirs = stock_perplexities(model, byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>"), texts,
                                prefix == "bos", window)  # fmt: skip
    ours = score(model, tokenizer, texts, prefix=prefix, window=window, compatible_with="evaluate")
    assert summarize(ours)["mean_perplexity"] == pytest.approx(np.mean(theirs), **CLOSE)


def test_compatible_with_evaluate_takes_a_whole_text_in_one_pass_or_refuses_it(model, tokenizer):
    texts = ["short", "a text of some length"]
    theirs = stock_perplexities(model, byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>"), texts)
    assert score(model, tokenizer, texts, compatible_with="evaluate")["mean_perplexity"] == pytest.approx(
        np.mean(theirs), **CLOSE
    )
    with pytest.raises(ValueError, match="text 1 has 201 tokens, the model 64: set window, to truncate"):
        score(model, tokenizer, ["short", "x" * 200], compatible_with="evaluate")
    with pytest.raises(ValueError, match="text 0 has no token"):
        score(model, tokenizer, [""], compatible_with="evaluate")
    with pytest.raises(ValueError, match="fixes the windows: leave stride out"):
        score(model, tokenizer, ["short"], compatible_with="evaluate", stride=3)


def test_what_the_other_tools_need_of_a_tokenizer_is_asked_for(model):
    plain, eos = byte_tokenizer(), byte_tokenizer(eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match="prefix must be auto or one of bos, eos that"):
        score(model, plain, ["text"], compatible_with="lm_eval")
    with pytest.raises(ValueError, match="prefix must be auto or one of bos, none that"):
        score(model, eos, ["text"], compatible_with="evaluate")
    assert score(model, eos, ["text"], compatible_with="lm_eval")["prefix"] == "eos"


# Intervals


def test_a_95_percent_interval_covers_the_true_value_93_to_97_percent_of_2000_times():
    rng = np.random.default_rng(0)

    def documents(count):
        """Bytes spread by a factor of two, bits a byte that vary by a quarter and fall with the length."""
        spread = rng.normal(size=count)
        size = np.exp(7 + 0.7 * spread)
        return size * (1 + 0.25 * rng.normal(size=count) - 0.03 * spread), size

    nll, size = documents(5_000_000)
    truth, hits = nll.sum() / size.sum(), 0
    for seed in range(2000):
        low, high = bootstrap(*documents(100), resamples=399, seed=seed)
        hits += low <= truth <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_intervals_are_seeded_and_narrow_with_more_documents_and_absent_below_ten():
    rng = np.random.default_rng(1)
    nll, size = rng.gamma(2, 100, 400), rng.gamma(2, 100, 400)
    assert bootstrap(nll, size) == bootstrap(nll, size)
    widths = [np.diff(bootstrap(nll[:n], size[:n]))[0] for n in (25, 100, 400)]
    assert widths[0] > widths[1] > widths[2] > 0
    assert bootstrap(nll[:9], size[:9]) == (None, None)
    assert bootstrap(np.full(20, 3.0), np.full(20, 2.0)) == (1.5, 1.5)
    assert bootstrap(size * 0.7, size) == pytest.approx((0.7, 0.7))


def test_each_figure_lies_inside_its_interval(model, tokenizer):
    texts = [" ".join(TEXTS[i:] + TEXTS[:i])[: 100 + 20 * i] for i in range(len(TEXTS))] + TEXTS
    result = measure(*score(model, tokenizer, texts, each=True))
    for metric in ("bits_per_byte", "token_perplexity", "byte_perplexity", "word_perplexity"):
        assert result[f"{metric}_low"] < result[metric] < result[f"{metric}_high"], metric
    stock = measure(*score(model, tokenizer, texts, each=True, window=32, compatible_with="evaluate"))
    assert stock["mean_perplexity_low"] < stock["mean_perplexity"] < stock["mean_perplexity_high"]


# Any model


def save(model, tokenizer, directory):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_hub_id_with_a_revision_is_that_revision(model, tokenizer, tmp_path, monkeypatch, run_command):
    """As the Hub's client lays its cache out: two commits, a branch on each."""
    repo = tmp_path / "hub" / "models--us--tiny"
    for branch, commit, one in (("main", "a" * 40, make_model(hidden_act="gelu")), ("step1", "b" * 40, model)):
        save(one, tokenizer, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = as_rows(TEXTS, tmp_path / "texts.jsonl")
    found = run_command("--model", "us/tiny@step1", "--data_files", file)
    assert found["nll"] == pytest.approx(score(model, tokenizer, TEXTS)["nll"], **CLOSE)
    assert found["commit"] == "b" * 40
    main = run_command("--model", "us/tiny", "--data_files", file)
    assert main["commit"] == "a" * 40 and main["nll"] != found["nll"]
    assert run_command("--model", "us/tiny", "--revision", "step1", "--data_files", file)["nll"] == found["nll"]
    with pytest.raises(ValueError, match="name two revisions"):
        perplexity.locate("us/tiny@step1", "main")


def write_gguf(model, tokenizer, path):
    """The same weights and tokenizer as llama.cpp's converter writes them, in float32."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges(["o n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        for part, count in heads.items():
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_figures_of_the_model_it_was_made_from(
    model, tokenizer, tmp_path, run_command, monkeypatch
):
    file = write_gguf(model, tokenizer, tmp_path / "tiny.gguf")
    texts = [text for text in TEXTS if "<|" not in text]
    found = run_command("--model", file, "--data_files", as_rows(texts, tmp_path / "t.jsonl"), "--window", 32)
    expected = measure(*score(model, tokenizer, texts, window=32, each=True))
    assert found == found | close(expected)
    with pytest.raises(ValueError, match="no.gguf: no such file"):
        perplexity.locate(f"{tmp_path}/no.gguf")
    with monkeypatch.context() as without:
        without.setattr(perplexity, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="needs the package gguf: pip install gguf"):
            perplexity.locate(file)
    assert perplexity.locate("us/tiny/q4/m.gguf@v1") == ("us/tiny", {"revision": "v1", "gguf_file": "q4/m.gguf"})


# Any text


def test_several_corpora_have_a_row_each(model, tokenizer, tmp_path, run_command, capsys):
    save(model, tokenizer, tmp_path / "model")
    files = {"a": TEXTS[:3], "b": TEXTS[3:5], "c": TEXTS[5:]}
    for name, texts in files.items():
        as_rows(texts, tmp_path / f"{name}.jsonl")
    words = [f"first={tmp_path}/a.jsonl", f"first={tmp_path}/b.jsonl", f"{tmp_path}/c.jsonl"]
    rows = run_command("--model", tmp_path / "model", "--data_files", *words)
    assert [row["corpus"] for row in rows] == ["first", "c.jsonl"]
    for row, texts in zip(rows, (TEXTS[:5], TEXTS[5:]), strict=True):
        assert row["nll"] == pytest.approx(score(model, tokenizer, texts)["nll"], **CLOSE)
    assert "first" in capsys.readouterr().out


def test_a_document_of_many_windows_is_scored_in_windows_not_truncated(model, tokenizer):
    text = "The quick brown fox. " * 2000
    sums = score(model, tokenizer, [text])
    assert sums["tokens"] == sums["bytes"] == len(text)
    halves = score(model, tokenizer, [text], stride=64)
    assert sums["nll"] / sums["tokens"] == pytest.approx(halves["nll"] / halves["tokens"], rel=0.05)


def test_a_batch_too_large_for_the_device_is_halved_until_it_fits(tokenizer):
    model, sizes = make_model(), []

    def small_device(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")

    hook = model.register_forward_pre_hook(small_device, with_kwargs=True)
    assert score(model, tokenizer, TEXTS, batch_size=100) == close(score(make_model(), tokenizer, TEXTS))
    hook.remove()
    assert max(sizes) > 2
    model.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        score(model, tokenizer, TEXTS)


def test_the_commit_is_this_checkout_s_and_none_outside_of_one(monkeypatch, tmp_path):
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", provenance.code_commit())
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "eval" / "provenance.py"))
    (tmp_path / "eval").mkdir()
    assert provenance.code_commit() is None
