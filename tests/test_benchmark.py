"""Claims about eval/benchmark.py and the educational benchmark: real lm-eval, a real model that has read some items."""

import itertools
import json
import math
import random
import re
import shutil
import string
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smolpretrain.data.preparation import prepare
from smolpretrain.eval import benchmark, contamination
from smolpretrain.eval.educational import controls
from smolpretrain.eval.educational.items import ITEMS, bits_per_byte, process_results, read_items
from smolpretrain.eval.parts import scores

ALL = read_items()
READ = ALL[:16]  # what the model of these tests was trained on
YAML = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
metric_list:
"""


def text_of(item):
    return f"{item['question']} {item['options'][item['answer']]}"


# The items.


def test_there_are_enough_items_of_every_subject_and_level():
    assert len(ALL) >= 400
    counts = Counter((item["subject"], item["level"]) for item in ALL)
    assert len({subject for subject, _ in counts}) >= 8
    assert {level for _, level in counts} == {"primary", "middle", "secondary"}
    assert len(counts) == 3 * len({subject for subject, _ in counts}) and min(counts.values()) >= 10


def test_every_item_is_whole_and_none_is_there_twice():
    assert len({item["id"] for item in ALL}) == len(ALL)
    assert len({" ".join(contamination.split_words(text_of(item))) for item in ALL}) == len(ALL)
    assert len({item["question"].lower() for item in ALL}) == len(ALL)
    canary = (ITEMS.parent / "README.md").read_text(encoding="utf-8")
    for item in ALL:
        texts = [item["question"], *item["options"], item["source"]]
        assert set(item) - {"check"} == {*("id", "set", "subject", "level", "question", "options"), *TAIL}, item["id"]
        assert len(set(map(str.lower, item["options"]))) == 4, item["id"]
        assert all(text == text.strip() and text.isascii() and text for text in texts), item["id"]
        assert item["question"][-1] in string.ascii_letters + string.digits + ',"', item["id"]
        assert re.search(r"canary GUID [0-9a-f-]{36}$", item["canary"]) and item["canary"] in canary, item["id"]


TAIL = ("answer", "source", "canary")


def test_no_question_says_its_answer_and_no_option_stands_out_by_its_length():
    for item in ALL:
        option = re.escape(item["options"][item["answer"]])
        assert not re.search(rf"(?<!\w){option}(?!\w)", item["question"], re.IGNORECASE), item["id"]
        sizes = [len(option.encode()) for option in item["options"]]
        assert max(sizes) <= 2 * min(sizes), item["id"]


def test_each_option_of_a_set_is_right_once():
    for name in {item["set"] for item in ALL}:
        items = [item for item in ALL if item["set"] == name]
        assert sorted(item["answer"] for item in items) == [0, 1, 2, 3], name
        assert len({tuple(item["options"]) for item in items}) == len({item["subject"] for item in items}) == 1, name


@pytest.mark.parametrize("item", [item for item in ALL if "check" in item], ids=lambda item: item["id"])
def test_what_can_be_computed_gives_the_right_option_and_no_other(item):
    value = controls.recompute(item["check"])
    assert [option == value for option in item["options"]] == [place == item["answer"] for place in range(4)]


def test_a_good_part_of_the_items_is_computed():
    assert sum("check" in item for item in ALL) >= 60
    assert {item["subject"] for item in ALL if "check" in item} >= {"mathematics", "physics", "chemistry", "history"}


@pytest.mark.parametrize(
    "check",
    [
        "__import__('os').getcwd()",
        "open('x')",
        "().__class__",
        "math.__loader__",
        "[x for x in (1, 2)]",
        "(lambda: 1)()",
        "NAMES",
    ],
)
def test_a_check_is_arithmetic_and_nothing_else(check):
    with pytest.raises(ValueError, match="which a check may not"):
        controls.recompute(check)


# The controls.


@given(st.integers())
@settings(max_examples=50, deadline=None)
def test_whatever_sees_the_options_alone_is_right_on_exactly_a_quarter(seed):
    likes = {option: random.Random(f"{seed} {option}").random() for item in ALL for option in item["options"]}
    assert controls.accuracy(ALL, likes.get) == pytest.approx(0.25, abs=1e-12)


def test_the_longest_the_shortest_and_the_first_in_the_alphabet_are_right_on_a_quarter(capsys):
    figures = controls.measure(ALL)
    for name in ("the longest option", "the shortest option", "the first option in the alphabet"):
        assert figures[f"accuracy of {name}"] == pytest.approx(0.25, abs=1e-12)
    checked = sum("check" in item for item in ALL)
    assert figures["checks that give the right option"] == f"{checked} of {checked}"
    controls.main()
    assert "accuracy of the longest option: 0.250" in capsys.readouterr().out


def test_the_controls_see_items_that_give_themselves_away():
    spoiled = [item | {"options": [*item["options"]]} for item in ALL]
    for item in spoiled[:100]:
        item["options"][item["answer"]] += " and so on"
    assert controls.measure(spoiled)["accuracy of the longest option"] > 0.4


# A model that has read the first sixteen items, its twin at random weights, and lm-eval.


def byte_tokenizer():
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run's directory whose model has learnt READ by heart, with a checkpoint."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model: threads would only wait for each other
    directory, tokenizer = tmp_path_factory.mktemp("run"), byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=256, **sizes))
    ids = [torch.tensor(tokenizer(text_of(item))["input_ids"]) for item in READ]
    inputs, labels = (torch.nn.utils.rnn.pad_sequence(ids, True, value) for value in (0, -100))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        model(inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for path in (directory, directory / "checkpoint-7"):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    (directory / "run.json").write_text("{}")
    yield directory
    torch.set_num_threads(threads)


def rows_of(directory, **wanted):
    rows = json.loads((directory / "benchmark.json").read_text())
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def only(directory, **wanted):
    (row,) = rows_of(directory, **wanted)
    return row


@pytest.fixture(scope="module")
def scored(run_dir):
    """report/ of the run after the benchmark, its choices-only control and the random twin."""
    words = ["--tasks", "educational", "educational_choices_only", "--batch_size", "64"]
    benchmark.main([str(run_dir), *words, "--by", "subject", "level"])
    benchmark.main([f"random:{run_dir}", *words])
    return run_dir / "report"


def whole(directory, **wanted):
    return json.loads((directory / only(directory, **wanted)["file"]).read_text())


def test_a_model_that_has_read_items_knows_them_and_not_from_the_options(scored, run_dir):
    result = whole(scored, task="educational", metric="acc", model=str(run_dir))
    right = [sample["acc"] for sample in sorted(result["samples"]["educational"], key=lambda sample: sample["doc_id"])]
    assert len(right) == len(ALL) and np.mean(right[: len(READ)]) > 0.9
    assert abs(np.mean(right[len(READ) :]) - 0.25) < 3 * math.sqrt(0.25 * 0.75 / (len(ALL) - len(READ)))
    for metric in ("acc", "acc_norm"):
        row = only(scored, task="educational_choices_only", metric=metric, model=str(run_dir))
        assert row["value"] == pytest.approx(0.25, abs=0.005), "a rounding may settle a tie"


def test_random_weights_are_at_chance(scored, run_dir):
    for task in ("educational", "educational_choices_only"):
        for metric in ("acc", "acc_norm"):
            row = only(scored, task=task, metric=metric, model=f"random:{run_dir}")
            assert abs(row["value"] - row["chance"]) < 3 * math.sqrt(0.25 * 0.75 / row["n"])


def test_a_row_holds_its_value_its_error_its_chance_and_where_it_comes_from(scored, run_dir):
    row = only(scored, task="educational", metric="acc", model=str(run_dir))
    result = json.loads((scored / row["file"]).read_text())
    assert set(row) == {"task", "metric", "value", "stderr", "n", "chance", "model", "settings", "file", "commit"}
    assert (row["n"], row["chance"]) == (len(ALL), 0.25)
    assert row["value"] == result["results"]["educational"]["acc,none"]
    acc = {name: [] for name in {item["set"] for item in ALL}}
    for sample in result["samples"]["educational"]:
        acc[sample["doc"]["set"]].append(sample["acc"])
    # Of sets of four, each as good as one draw, the error of the mean is that of the mean of the sets' means.
    assert row["stderr"] == pytest.approx(np.std(list(map(np.mean, acc.values())), ddof=1) / math.sqrt(len(acc)))
    used = {"seed": 0, "window": 256, "dtype": "float32", "limit": None, "kind": "checkpoint", "num_fewshot": 0}
    used["stderr_clustered_by"] = "set"
    assert used.items() <= row["settings"].items()
    assert only(scored, task="educational", metric="gold_bits_per_byte", model=str(run_dir))["chance"] is None


def test_the_parts_of_a_task_add_up_to_it(scored, run_dir):
    for field in ("subject", "level"):
        parts = [row for row in rows_of(scored, metric="acc") if row["task"].startswith(f"educational/{field}=")]
        assert Counter(item[field] for item in ALL) == {row["task"].rpartition("=")[2]: row["n"] for row in parts}
        total = sum(row["value"] * row["n"] for row in parts) / len(ALL)
        assert total == pytest.approx(only(scored, task="educational", metric="acc", model=str(run_dir))["value"])


def test_likelihoods_and_bits_are_those_of_the_model_itself(scored, run_dir):
    model, tokenizer = LlamaForCausalLM.from_pretrained(run_dir), byte_tokenizer()
    result = whole(scored, task="educational", metric="acc", model=str(run_dir))
    nats, size = 0.0, 0
    for sample in result["samples"]["educational"]:
        item = sample["doc"]
        if item["id"] in {item["id"] for item in ALL[::40]}:
            for option, ((likelihood, _),) in zip(item["options"], sample["resps"], strict=True):
                start = len(tokenizer(item["question"])["input_ids"])
                ids = torch.tensor([tokenizer(f"{item['question']} {option}")["input_ids"]])
                with torch.no_grad():
                    log_probs = model(ids, use_cache=False).logits.double().log_softmax(-1)[0]
                expected = sum(log_probs[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))
                assert likelihood == pytest.approx(expected, rel=1e-4)
        nats -= sample["resps"][item["answer"]][0][0]
        size += len(f" {item['options'][item['answer']]}")
    row = only(scored, task="educational", metric="gold_bits_per_byte", model=str(run_dir))
    assert row["value"] == pytest.approx(nats / math.log(2) / size)
    sets = {}
    for sample in result["samples"]["educational"]:
        sets.setdefault(sample["doc"]["set"], []).append(sample["gold_bits_per_byte"])
    resampled = []
    for seed in range(1000):
        drawn = random.Random(seed).choices(list(sets.values()), k=len(sets))
        resampled.append(bits_per_byte(itertools.chain.from_iterable(drawn)))
    assert row["stderr"] == pytest.approx(np.std(resampled), rel=0.1)


def test_the_same_again_takes_the_place_of_its_rows_and_a_checkpoint_adds_its_own(scored, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    report, words = tmp_path / "run" / "report", ["--tasks", "educational", "--limit", "8"]
    before = len(rows_of(report))
    benchmark.main([str(tmp_path / "run"), *words])
    added = len(rows_of(report))
    benchmark.main([str(tmp_path / "run"), *words])
    assert len(rows_of(report)) == added == before + 3
    benchmark.main([str(tmp_path / "run" / "checkpoint-7"), *words])
    assert len(rows_of(report)) == added + 3
    mine, its = (
        only(report, task="educational", metric="gold_bits_per_byte", model=str(path))
        for path in (tmp_path / "run", tmp_path / "run" / "checkpoint-7")
    )
    assert mine["value"] == its["value"] and mine["n"] == its["n"] == 8
    assert mine["file"] != its["file"] and all((report / row["file"]).is_file() for row in rows_of(report))


def test_random_weights_depend_on_the_seed_and_nothing_else(run_dir, tmp_path):
    words = [f"random:{run_dir}", "--tasks", "educational", "--limit", "4"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        benchmark.main([*words, "--seed", seed, "--output_dir", str(tmp_path / name)])
    a, b, c = (only(tmp_path / name, metric="gold_bits_per_byte")["value"] for name in "abc")
    assert a == b != c


@pytest.fixture
def tasks(tmp_path):
    """A directory of tasks as users have them: two choices, three choices, a group of both, text, last words."""
    data = tmp_path / "data.jsonl"
    words = ["one two", "three four five", "six", "seven eight nine ten"]
    rows = [{"q": f"item {i}", "two": ["yes", "no"], "three": ["a", "b", "c"], "text": t} for i, t in enumerate(words)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric = "  - metric: {}\n    aggregation: {}\n    higher_is_better: true\n"
    for name in ("two", "three"):
        head = YAML.format(task=f"mine_{name}", data=data, kind="multiple_choice") + metric.format("acc", "mean")
        body = f"doc_to_text: q\ndoc_to_choice: {name}\ndoc_to_target: 0\n"
        (tmp_path / f"{name}.yaml").write_text(head + body)
    head = YAML.format(task="mine_text", data=data, kind="loglikelihood_rolling")
    head += "".join(map("  - metric: {}\n".format, ("word_perplexity", "byte_perplexity", "bits_per_byte")))
    (tmp_path / "text.yaml").write_text(head + 'doc_to_text: ""\ndoc_to_target: text\n')
    group = (
        "group: mine\ntask: [mine_two, mine_three]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    (tmp_path / "group.yaml").write_text(group)
    return tmp_path


def test_local_tasks_groups_and_perplexities_have_chance_n_and_error_too(run_dir, tasks, tmp_path):
    out = tmp_path / "out"
    words = ["--tasks", "mine", "mine_text", "--include_path", str(tasks), "--output_dir", str(out)]
    benchmark.main([str(run_dir), *words])
    found = {row["task"]: (row["n"], row["chance"]) for row in rows_of(out, metric="acc")}
    middle = pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found == {"mine": (8, middle), "mine_two": (4, 1 / 2), "mine_three": (4, pytest.approx(1 / 3))}
    result = whole(out, task="mine_text", metric="bits_per_byte")
    for row in rows_of(out, metric="acc"):  # theirs is known and no cluster asked for: it is kept
        assert row["stderr"] == result["results"][row["task"]]["acc_stderr,none"]
    values = [sample["acc"] for sample in result["samples"]["mine_three"]]
    assert scores.summarize("acc", values)[1] == pytest.approx(result["results"]["mine_three"]["acc_stderr,none"])
    samples = result["samples"]["mine_text"]
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        row = only(out, task="mine_text", metric=metric)
        value, stderr = scores.summarize(metric, [sample[metric] for sample in samples])
        assert row["value"] == pytest.approx(value) and row["stderr"] == stderr > 0
        assert (row["n"], row["chance"]) == (4, None)


def test_documents_that_hang_together_count_as_one_draw():
    values, names = [1, 1, 1, 1, 0, 0, 0, 0], [*"aaaabbbb"]
    assert scores.summarize("acc", values)[1] == pytest.approx(np.std(values, ddof=1) / math.sqrt(8))
    assert scores.summarize("acc", values, names)[1] == pytest.approx(np.std([1, 0], ddof=1) / math.sqrt(2))
    assert scores.summarize("acc", [1, 0] * 4, names)[1] == 0


def test_what_lies_within_two_standard_errors_of_chance_is_not_called_better(capsys):
    row = {"task": "t", "metric": "acc", "stderr": 0.02, "n": 500, "chance": 0.25}
    scores.show([row | {"value": 0.302}, row | {"value": 0.2899}, row | {"value": 0.2, "chance": None}])
    out = capsys.readouterr().out
    assert re.findall(r"no \(\S+ SE\)|\d\.\d SE", out) == ["2.6 SE", "no (2.0 SE)"]
    assert out.count("0.0200") == 3 and out.count("0.2500") == 2


def test_process_results_picks_by_sum_and_by_byte_and_keeps_the_right_option_s_bits():
    doc = {"options": ["aa", "bbbb", "c", "dddddddd"], "answer": 1}
    results = [(-3.0, False), (-4.0, False), (-2.0, True), (-9.0, False)]
    assert process_results(doc, results) == {"acc": 0.0, "acc_norm": 1.0, "gold_bits_per_byte": (-4.0, 5)}


WRONG = {
    "{run} --tasks educationl": "task educationl: lm-eval has none of that name. Did you mean educational?",
    "{run} --tasks small": "task arc_easy cannot be loaded",
    "{run} --tasks educational --include_path nowhere": "include_path nowhere: no such directory",
    "{run} --tasks educational --by topic": "by topic: no task's documents have it; they have answer, id, level,",
    "{run} --tasks educational --limit 0": "limit must be at least 1, got 0",
    "{run} --tasks educational --batch_size 0": "batch_size must be at least 1",
    "{run} --tasks educational --num_fewshot -1": "num_fewshot must be at least 0",
    "{run} --tasks educational --window 9999": "window must be from 2 to",
    "{run} --tasks educational --device abacus": "device abacus",
    "{run}/none --tasks educational": "no directory or Hub model",
    "random:{run}/none --tasks educational": "no directory or Hub model",
    "{run}": "--tasks",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_one_line_and_status_2_before_the_model_loads(words, run_dir, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.perplexity, "load_model", lambda *args: pytest.fail("the model was loaded"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(words.format(run=run_dir).split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and "benchmark.py: error: " in error and WRONG[words] in error


def test_a_context_that_is_cut_is_counted_and_said_and_an_answer_never_is(run_dir, tmp_path, capsys):
    words = [str(run_dir), "--tasks", "educational", "--limit", "8", "--output_dir", str(tmp_path)]
    counts = []
    for window in ("256", "40"):
        benchmark.main([*words, "--window", window])
        counts.append(rows_of(tmp_path)[-1]["settings"]["contexts_cut"])
        assert ("and lost their beginning" in capsys.readouterr().out) == (window == "40")
    assert counts[0] == 0 < counts[1] <= 32
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*words, "--window", "2"])
    assert "an answer that is longer than the window (2 tokens)" in capsys.readouterr().err


def test_without_lm_eval_the_command_says_how_to_get_it(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([str(run_dir), "--tasks", "educational"])
    assert "pip install -c constraints.txt -e '.[bench]'" in capsys.readouterr().err


def test_the_launched_command_prints_a_table_and_writes_nothing_unasked(run_dir, launch, tmp_path):
    shutil.copytree(run_dir / "checkpoint-7", tmp_path / "model")
    done = launch("python", "eval/benchmark.py", tmp_path / "model", "--tasks", "educational", "--limit", "4")
    assert "educational" in done.stdout and "over chance" in done.stdout and "not written" in done.stdout
    assert "Traceback" not in done.stderr and not (tmp_path / "model" / "report").exists()


def test_the_small_set_is_of_tasks_that_lm_eval_knows_and_has_in_cloze_form():
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager()
    assert set(benchmark.SETS["small"]) <= set(manager.all_tasks)
    for name in benchmark.SETS["small"]:
        path = manager.task_index[name].yaml_path
        assert "\nA. " not in str(load_yaml(path, resolve_func=False)), name


# Contamination.


def seen_in(*texts):
    return set(contamination.find_seen(ALL, texts))


def test_an_item_is_found_in_any_case_and_punctuation_and_not_with_a_wrong_answer():
    item = next(item for item in ALL if len(contamination.split_words(text_of(item))) < contamination.GRAM)
    question, options, answer = item["question"], item["options"], item["answer"]
    assert seen_in(f"Notes. {question.upper()}: {options[answer]}! More.", "other text") == {item["id"]}
    assert seen_in(f"{question} {options[answer - 1]}.") & {item["id"]} == set()
    assert seen_in(question, options[answer]) == set()


def test_thirteen_running_words_of_a_longer_item_are_enough_and_twelve_are_not():
    item = next(item for item in ALL if len(contamination.split_words(text_of(item))) > 14)
    words = contamination.split_words(text_of(item))
    assert seen_in(" ".join(["so", *words[1:14], "there"])) == {item["id"]}
    assert seen_in(" ".join(["so", *words[1:13], "there"])) == set()


def test_the_whole_benchmark_finds_itself_and_licence_text_holds_none():
    assert seen_in(*map(text_of, ALL)) == {item["id"] for item in ALL}
    assert seen_in((ITEMS.parents[2] / "LICENSE").read_text()) == set()


def test_the_canary_is_found_though_the_items_are_not():
    assert seen_in(f"see {ALL[0]['canary']}.") == {"canary"}


def test_files_and_prepared_sets_are_read_across_their_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contamination, "DECODED", 50)  # fewer than an item takes
    found = {ALL[3]["id"], ALL[100]["id"], ALL[300]["id"]}
    planted = [text_of(item) for item in ALL if item["id"] in found]
    texts = [f"Some text of document {i}. {planted[i % 7]}." if i % 7 < 3 else "Nothing here." for i in range(70)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(texts, byte_tokenizer(), 32, tmp_path / "set", {}, 0.0, progress=False, save_tokenizer=True)
    for source in ("some.jsonl", "set"):
        out = tmp_path / "seen.json"
        contamination.main([str(tmp_path / source), "--output", str(out)])
        assert set(json.loads(out.read_text())) == found
        assert f"3 of {len(ALL)} items" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [("none.jsonl", "no such file"), (".", "no train*.arrow"), ("c.jsonl --text_column b", "no column b")],
)
def test_text_that_cannot_be_read_is_one_line_and_status_2(word, message, tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(SystemExit, match="2"):
        contamination.main(f"{tmp_path}/{word}".split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("contamination.py: error: ") and message in error
