"""Claims about eval/perplexity.py: exact on models small enough to check by brute force, and as a command."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smolpretrain.eval import perplexity
from smolpretrain.eval.perplexity import cut_windows, merge, score_documents, summarize, unigram_nll

SCRIPT = Path(__file__).resolve().parents[1] / "eval" / "perplexity.py"
DOCUMENTS = [
    "Water boils at 100 degrees.",
    "",
    "a",
    " \n\t",
    "Caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f600.",
    "one two three " * 30,
    "<|endoftext|> is text here, <|endoftext|>",
    "The cell makes ATP. " * 9,
    " leading space",
]
ONE_DOCUMENT = "First paragraph.\n\nSecond.\n"
CLOSE = {"rel": 1e-6, "abs": 0}


def close(figures):
    """Compare equal to a dict whose floats are within 1e-6, everything else being the same."""
    return {key: pytest.approx(value, **CLOSE) if isinstance(value, float) else value for key, value in figures.items()}


def byte_tokenizer(**special):
    """A byte-level tokenizer of 258 tokens that by itself puts <|endoftext|> before a text and trims its offsets."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "on"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [("o", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    prepend = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), prepend])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def make_model(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            **sizes,
            **overrides,
        )
    ).eval()


@pytest.fixture(scope="module")
def model():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny forward passes: threads would only wait for each other
    yield make_model()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score(model, tokenizer, documents=DOCUMENTS, **options):
    return score_documents(model, tokenizer, documents, progress=False, **options)


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def brute_force(model, tokenizer, window, stride, prefix):
    """One target at a time, each in a forward pass of its own that ends at its input; (nll, tokens)."""
    nll, tokens = 0.0, 0
    for text in DOCUMENTS:
        ids = ([0] if prefix else []) + ids_of(text, tokenizer)
        if not text.strip():
            continue
        for target in range(1, len(ids)):
            # Windows start at k * stride; the first of them that reaches this target scores it.
            start = max(0, math.ceil((target - window) / stride)) * stride
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:target]]), use_cache=False).logits[0, -1]
            nll -= torch.log_softmax(logits.double(), -1)[ids[target]].item()
            tokens += 1
    return nll, tokens


@pytest.mark.parametrize("prefix", ["bos", "none"])
@pytest.mark.parametrize(("window", "stride"), [(64, 32), (16, 5), (16, 15), (16, 1), (2, 1), (16, 16), (2, 2)])
def test_agrees_with_one_forward_pass_for_each_token(model, tokenizer, window, stride, prefix):
    sums = score(model, tokenizer, window=window, stride=stride, prefix=prefix)
    nll, tokens = brute_force(model, tokenizer, window, stride, prefix == "bos")
    assert sums["tokens"] == tokens
    assert sums["nll"] == pytest.approx(nll, **CLOSE)


def test_uniform_logits_give_exactly_the_vocabulary_size(tokenizer):
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = summarize(score(model, tokenizer))
    assert result["token_perplexity"] == pytest.approx(300, **CLOSE)
    size = sum(len(text.encode()) for text in DOCUMENTS if text.strip())
    assert result["bits_per_byte"] == pytest.approx(result["tokens"] * math.log2(300) / size, **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 1000])
def test_batch_size_and_document_order_change_nothing(model, tokenizer, batch_size):
    whole, shuffled = score(model, tokenizer), DOCUMENTS.copy()
    random.Random(batch_size).shuffle(shuffled)
    assert score(model, tokenizer, shuffled, batch_size=batch_size) == close(whole)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_stride_scores_each_target_once_within_the_window(length, window, data):
    stride = data.draw(st.integers(1, window))
    cuts = list(cut_windows(length, window, stride))
    assert [t for _, first, end in cuts for t in range(first, end)] == list(range(length))
    for start, first, end in cuts:
        assert end - start <= window and first < end
        assert first - start == (window - stride if start else 0)


def test_counts_are_those_of_the_text(model, tokenizer):
    sums, kept = score(model, tokenizer), [text for text in DOCUMENTS if text.strip()]
    assert (sums["documents"], sums["skipped"]) == (7, 2)
    assert sums["bytes"] == sum(len(text.encode()) for text in kept)
    assert sums["words"] == sum(len(text.split()) for text in kept)
    assert sums["tokens"] == sum(len(ids_of(text, tokenizer)) for text in kept)
    assert (sums["window"], sums["stride"], sums["prefix"]) == (64, 32, "bos")


def test_without_a_prefix_the_first_token_is_context_and_its_bytes_are_not_counted(model, tokenizer):
    sums = score(model, tokenizer, ["once more", "a", "  x"], prefix="none")
    assert sums["documents"] == 2, "nothing is left to score of a document of one token"
    assert sums["bytes"] == len("ce more") + len(" x"), "the first token of 'once' is 'on'"
    assert (sums["tokens"], sums["words"]) == (7 + 2, 2 + 1)


@pytest.mark.parametrize(("special", "expected"), [(("bos", "eos"), "bos"), (("eos",), "eos"), ((), "none")])
def test_prefix_auto_is_bos_else_eos_else_none(model, special, expected):
    tokenizer = byte_tokenizer(**{f"{kind}_token": "<|endoftext|>" for kind in special})
    assert score(model, tokenizer)["prefix"] == expected
    assert score(model, tokenizer)["nll"] == score(model, tokenizer, prefix=expected)["nll"]


def test_special_token_strings_in_a_text_are_text(model, tokenizer):
    text = "a<|endoftext|>b"
    assert len(tokenizer(text)["input_ids"]) == 4, "the tokenizer itself takes the string for its token"
    assert score(model, tokenizer, [text])["tokens"] == len(text)
    assert len(tokenizer(text)["input_ids"]) == 4, "and still does: the caller's tokenizer is left alone"


def test_a_model_that_caches_by_default_gives_the_same_figures(model, tokenizer):
    seen = []
    cached = make_model(use_cache=True)
    hook = cached.model.register_forward_hook(lambda module, args, output: seen.append(output.past_key_values))
    assert score(cached, tokenizer) == close(score(make_model(use_cache=False), tokenizer))
    hook.remove()
    assert seen and set(seen) == {None}


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_put_back_and_dropout_is_off_meanwhile(tokenizer, training):
    model = make_model(attention_dropout=0.5).train(training)
    assert score(model, tokenizer) == close(score(make_model(), tokenizer))
    assert model.training is training
    model.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(model, tokenizer)
    assert model.training is training, "not even an error changes it"


def test_logits_of_the_context_are_never_computed(model, tokenizer):
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2].numel()))
    sums = score(model, tokenizer, ["abcdefgh" * 21], window=64, stride=8, batch_size=1)
    hook.remove()
    assert sum(rows) == sums["tokens"] == 168


def test_sums_of_two_halves_add_up_to_the_whole(model, tokenizer):
    halves = [score(model, tokenizer, DOCUMENTS[rank::2]) for rank in range(2)]
    empty = score(model, tokenizer, [])
    assert merge([*halves, empty]) == close(score(model, tokenizer))
    with pytest.raises(ValueError, match="different settings"):
        merge([halves[0], score(model, tokenizer, window=8)])
    with pytest.raises(ValueError, match="no text"):
        summarize(empty)


def test_each_document_has_its_own_sums(model, tokenizer):
    each, used = score(model, tokenizer, each=True)
    assert each.shape == (len(DOCUMENTS), 4) and used["stride"] == 32
    for row, text in zip(each, DOCUMENTS, strict=True):
        alone = score(model, tokenizer, [text])
        assert row.tolist() == pytest.approx([alone[key] for key in ("nll", "tokens", "bytes", "words")], **CLOSE)


def test_unigram_equals_a_hand_computation(model, tokenizer):
    counts = np.zeros(300, np.int64)
    counts[ids_of("abba", tokenizer)] = 2
    sums = unigram_nll(counts, tokenizer, ["ab", "", "ca"])
    assert sums["nll"] == pytest.approx(-3 * math.log(3 / 304) - math.log(1 / 304), **CLOSE)
    assert unigram_nll(counts, tokenizer, ["ab"], prefix="none")["nll"] == pytest.approx(-math.log(3 / 304), **CLOSE)
    for prefix in ("bos", "none"):
        ours, unigram = score(model, tokenizer, prefix=prefix), unigram_nll(counts, tokenizer, DOCUMENTS, prefix)
        keys = ("tokens", "bytes", "words", "documents", "skipped", "prefix")
        assert [ours[key] for key in keys] == [unigram[key] for key in keys]


@pytest.mark.parametrize("given_as", ["path", "model"])
def test_loads_through_evaluate_by_path_and_agrees(saved, model, tokenizer, given_as):
    measurement = evaluate.load(str(SCRIPT), module_type="measurement")
    source = {"model": str(saved)} if given_as == "path" else {"model": model, "tokenizer": tokenizer}
    result = measurement.compute(data=DOCUMENTS, **source, window=32, stride=8, batch_size=2)
    assert result == close(summarize(score(model, tokenizer, window=32, stride=8)))


def test_what_needs_no_metric_of_evaluate_does_not_import_it():
    code = "import sys, smolpretrain.eval.parts.judge; print('evaluate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def launch(words):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, SCRIPT, *words.split()], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """DOCUMENTS in each format, but .txt, which holds one document."""
    folder = tmp_path_factory.mktemp("files")
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS, "size": list(map(len, DOCUMENTS))})
    rows.to_json(folder / "d.jsonl")
    rows.to_csv(folder / "d.csv")
    (folder / "d.txt").write_text(ONE_DOCUMENT)
    rows.to_parquet(folder / "d.parquet")
    for kind in ("jsonl", "parquet"):
        (folder / f"prepared_{kind}").mkdir()
        shutil.copy(folder / f"d.{kind}", folder / f"prepared_{kind}" / f"validation_documents.{kind}")
    return folder


@pytest.mark.parametrize("source", ["d.jsonl", "d.csv", "d.parquet", "d.txt", "prepared_jsonl", "prepared_parquet"])
def test_the_command_scores_what_the_functions_score(saved, files, model, tokenizer, tmp_path, source):
    flag, out = "--prepared_dir" if source.startswith("prepared") else "--data_files", tmp_path / "new" / "out.json"
    done = launch(f"--model {saved} {flag} {files}/{source} --window 32 --output {out} --device cpu")
    assert done.returncode == 0, done.stderr
    result, texts = json.loads(out.read_text()), [ONE_DOCUMENT] if source == "d.txt" else DOCUMENTS
    assert result == result | close(summarize(score(model, tokenizer, texts, window=32)))
    assert result["model"] == str(saved) and source in json.dumps(result["data"])
    assert "bits_per_byte" in done.stdout and "tok/s" in done.stderr


def test_text_columns_and_the_number_of_documents_can_be_chosen(saved, model, tokenizer, tmp_path):
    datasets.Dataset.from_dict({"body": DOCUMENTS}).to_parquet(tmp_path / "set" / "train.parquet")
    expected, out = score(model, tokenizer, DOCUMENTS[:3])["nll"], tmp_path / "out.json"
    for data in (f"--dataset_name {tmp_path}/set", f"--data_files {tmp_path}/set/*.parquet"):
        perplexity.main(f"--model {saved} {data} --text_column body --max_documents 3 --output {out}".split())
        assert json.loads(out.read_text())["nll"] == pytest.approx(expected, **CLOSE)


def test_an_overflowing_perplexity_is_infinite_and_null_in_the_json(files, tokenizer, tmp_path):
    model = make_model()
    torch.nn.init.normal_(model.lm_head.weight, std=1e5)
    assert summarize(score(model, tokenizer))["token_perplexity"] == math.inf
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    perplexity.main(f"--model {tmp_path} --data_files {files}/d.jsonl --output {tmp_path}/out.json".split())
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["token_perplexity"] is None and result["bits_per_byte"] > 1000


WRONG = {  # what the user typed beside --model: what the one line says
    "--data_files {files}/none.jsonl": "none.jsonl: no such file",
    "--data_files {bad}/notes.md": "notes.md: not one of .jsonl",
    "--data_files {files}/d.jsonl --text_column body": "no column body; the columns are text, size",
    "--data_files {files}/d.jsonl --text_column size": "column size holds no text",
    "--data_files {bad}/empty.jsonl": "empty.jsonl: it is empty",
    "--data_files {bad}/blank.txt": "holds no text",
    "--data_files {bad}/broken.jsonl": "broken.jsonl: JSON parse error",
    "--prepared_dir {bad}": "validation_documents*.*: no such file",
    "": "give one of data_files, dataset_name, prepared_dir",
    "--data_files {files}/d.txt --prepared_dir {files}/prepared_jsonl": "give one of",
    "--dataset_name {files}/prepared_parquet --dataset_split nope": "nope",
    "--data_files {files}/d.txt --window 1": "window must be from 2",
    "--data_files {files}/d.txt --window 65": "max_position_embeddings (64), got 65",
    "--data_files {files}/d.txt --stride 0": "stride must be from 1",
    "--data_files {files}/d.txt --window 8 --stride 9": "the window (8",
    "--data_files {files}/d.txt --max_documents 0": "max_documents must be at least 1, got 0",
    "--data_files {files}/d.txt --compatible_with lm_eval --stride 4": "fixes the windows: leave stride out",
    "--data_files {files}/d.txt --batch_size -1": "batch_size must be 0 or more",
    "--data_files {files}/d.txt --device cuda": "device cuda needs a device that torch sees",
    "--data_files {files}/d.txt --strid 4": "unrecognized arguments: --strid",
    "--data_files {files}/d.txt --prefix eos --tokenizer {bad}/plain": "prefix must be",
    "--data_files {files}/d.txt --tokenizer {bad}/large": "at most the model's 300 tokens, got 358",
    "--data_files {files}/d.txt --model {files}": "no directory or Hub model with a config.json",
    "--data_files {files}/d.txt --model {bad}/none": "no directory or Hub model",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_one_line_and_status_2_before_the_model_loads(words, saved, files, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "blank.txt").write_text(" \n ")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"')
    (plain := byte_tokenizer()).save_pretrained(tmp_path / "plain")
    plain.add_tokens([f"word{i}" for i in range(100)])
    plain.save_pretrained(tmp_path / "large")
    monkeypatch.setattr(perplexity, "load_model", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        perplexity.main(f"--model {saved} {words.format(saved=saved, files=files, bad=tmp_path)}".split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and ": error: " in error and WRONG[words] in error


def test_a_launched_command_says_one_line_too_and_names_the_model_it_cannot_reach(files):
    done = launch(f"--model nobody/nothing --data_files {files}/d.txt")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert done.stderr.startswith("perplexity.py: error: nobody/nothing: no directory or Hub model")


def test_a_model_without_all_its_weights_is_refused(saved, files, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="2"):
        perplexity.main(["--model", str(tmp_path / "part"), "--data_files", str(files / "d.txt")])
    assert "lacks weights, such as lm_head.weight" in capsys.readouterr().err
