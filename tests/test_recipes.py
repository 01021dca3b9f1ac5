"""The recipes of configs/, run by the commands that they are for, against a small corpus under their own names."""

import io
import json
import math
import random
import runpy

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT

from smolpretrain import plan
from smolpretrain.data.pack.manifest import Manifest, verify
from smolpretrain.data.tokens.tokenization import load_tokenizer, tokenizer_hash, train_tokenizer

CORPUS, TOKENIZER = "HuggingFaceTB/smollm-corpus", "HuggingFaceTB/SmolLM2-135M"
WEB, DCLM, MATH = "HuggingFaceFW/fineweb-edu", "HuggingFaceTB/dclm-edu", "HuggingFaceTB/finemath"
MATH_NAMES = ("finemath-3plus", "finemath-4plus", "infiwebmath-3plus")
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "recipes_table.py"))
TRAINING = sorted(path.stem for path in (ROOT / "configs").glob("*.json") if not path.stem.startswith("data-"))
FILES, ROWS = 4, 300


def card(*names: str) -> bytes:
    """Return a dataset's card that gives each configuration the files of its own directory."""
    lines = [f"- config_name: {name}\n  data_files: [{{split: train, path: {name}/train-*}}]\n" for name in names]
    return f"---\nconfigs:\n{''.join(lines)}---\n".encode()


def texts(number: int) -> list[str]:
    """Return a file's documents; the first file holds more than is read at a time (readers.READ_BYTES)."""
    chosen = random.Random(number)
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    return [f"{number}-{row}: " + " ".join(chosen.choices(words, k=30 if number else 3000)) for row in range(ROWS)]


def parquet(rows: list[str]) -> bytes:
    table, made = pa.table({"prompt": rows, "text": rows, "token_length": list(range(len(rows)))}), io.BytesIO()
    pyarrow.parquet.write_table(table, made, row_group_size=100)
    return made.getvalue()


@pytest.fixture(scope="module")
def commit(hub, tmp_path_factory):
    """The corpus and the tokenizer under the names that the recipes give; returns the corpus's commit."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(1), 500).save_pretrained(directory)
    hub.add("model", TOKENIZER, {path.name: path.read_bytes() for path in directory.iterdir()})
    files = {f"cosmopedia-v2/train-{n:05d}-of-{FILES:05d}.parquet": parquet(texts(n)) for n in range(FILES)}
    files["fineweb-edu-dedup/train-00000-of-00001.parquet"] = parquet(texts(FILES))
    return hub.add("dataset", CORPUS, files | {"README.md": card("cosmopedia-v2", "fineweb-edu-dedup")})


def prepare(hub, launch, home, recipe, *words):
    """Run a recipe, shrunk by the words; returns its manifest, its set's tokenizer, and the files that were read."""
    given = json.loads((ROOT / "configs" / recipe).read_text(encoding="utf-8"))
    assert all(int(word.split("=")[1]) < given[word.split("=")[0]] for word in words)
    before = hub.downloads(CORPUS)
    command = ("python", ROOT / "data" / "prepare.py", ROOT / "configs" / recipe)
    launch(*command, *words, "block_size=64", "validation_fraction=0.05", cwd=home, **hub.environment(home / "hf"))
    directory = home / given["prepared_dir"]
    read = {path for path in hub.downloads(CORPUS) - before if path.endswith(".parquet")}
    return verify(directory, sha256=True), load_tokenizer(str(directory / "tokenizer")), read


@pytest.fixture
def home(tmp_path):
    return tmp_path


def documents(manifest: Manifest) -> int:
    return sum(split["documents"] for split in manifest.splits.values())


def tokens(manifest: Manifest) -> int:
    return sum(split["tokens"] for split in manifest.splits.values())


def test_the_whole_recipe_reads_every_file_of_its_configuration(hub, launch, commit, home):
    manifest, tokenizer, read = prepare(hub, launch, home, "data-whole.json")
    assert documents(manifest) == FILES * ROWS and len(read) == FILES
    assert all(path.startswith("cosmopedia-v2/") for path in read)
    ids = tokenizer([text for number in range(FILES) for text in texts(number)])["input_ids"]
    assert tokens(manifest) == sum(len(document) + 1 for document in ids)
    assert manifest.tokenizer_hash == tokenizer_hash(tokenizer)
    assert manifest.source["dataset_commit"] == commit and manifest.source["dataset_name"] == CORPUS


def test_the_subset_recipe_takes_the_first_documents(hub, launch, commit, home):
    manifest, tokenizer, _ = prepare(hub, launch, home, "data-subset.json", "max_documents=400")
    first = [*texts(0), *texts(1)[:100]]
    assert documents(manifest) == 400 and manifest.options["max_documents"] == 400
    assert tokens(manifest) == sum(len(document) + 1 for document in tokenizer(first)["input_ids"])
    assert manifest.source["dataset_commit"] == commit


def test_the_streaming_recipe_downloads_no_more_than_it_takes(hub, launch, commit, home):
    manifest, _, read = prepare(hub, launch, home, "data-streaming-subset.json", "max_tokens=300000")
    assert tokens(manifest) == manifest.options["max_tokens"] == 300_000
    assert read == {f"cosmopedia-v2/train-00000-of-{FILES:05d}.parquet"}
    assert not list((home / "hf").rglob("*.parquet")) and not list((home / "hf").rglob("*.arrow"))
    assert manifest.source["dataset_commit"] == commit


# Training


@pytest.fixture(scope="module")
def trained(hub, launch, commit, tmp_path_factory):
    """Every recipe trained at a reduced size, on two ranks in one launch; returns the directory they ran in.

    What is reduced is the model, the rows, the steps and the text; optimizer, rates, schedule, mixture, streaming and
    DeepSpeed are the recipe's. `longer` goes on from a stable checkpoint of smollm2-135m, with twice its steps.
    """
    home = tmp_path_factory.mktemp("trained")
    for number, name in enumerate((WEB, DCLM), start=FILES + 1):
        hub.add("dataset", name, {"data/train-00000-of-00001.parquet": parquet(texts(number))})
    files = {f"{name}/train-00000-of-00001.parquet": parquet(texts(9 + n)) for n, name in enumerate(MATH_NAMES)}
    hub.add("dataset", MATH, files | {"README.md": card(*MATH_NAMES)})
    order = sorted(TRAINING, key=lambda name: "decay" in name)  # it starts from another's checkpoint
    cases = [[str(ROOT / "configs" / f"{name}.json"), *reduced(name)] for name in order]
    longer = ["resume=runs/smollm2-135m/checkpoint-8", "output_dir=runs/longer", "max_steps=20"]
    cases.append([str(ROOT / "configs" / "smollm2-135m.json"), *reduced("smollm2-135m"), *longer])
    (home / "cases.json").write_text(json.dumps(cases))
    words = ("--num_gpus", "2", ROOT / "tests" / "walked_run.py", home / "cases.json")
    launch("deepspeed", *words, cwd=home, OMP_NUM_THREADS="1", **hub.environment(home / "hf"))
    return home


def recipe_of(name):
    return json.loads((ROOT / "configs" / f"{name}.json").read_text(encoding="utf-8"))


def reduced(name):
    """Words that make a recipe small: 10 steps of two micro-batches at most."""
    given = recipe_of(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    smaller = {"config_overrides": sizes, "block_size": 64, "per_device_train_batch_size": 2, "max_steps": 10}
    smaller |= {"gradient_accumulation_steps": 2, "warmup_steps": 2, "save_steps": 4, "logging_steps": 1}
    smaller |= {"attn_implementation": "sdpa", "torch_compile": False, "sample_steps": 0, "disable_tqdm": True}
    smaller |= {"validation_fraction": 0.05, "eval_steps": 10, "max_eval_documents": 4, "keep_every_steps": 4}
    if "max_tokens" in given:
        smaller["max_tokens"] = 120_000
    if "init_from" in given:
        smaller["init_from"] = "runs/smollm2-135m/checkpoint-8"
    return [f"{key}={json.dumps(value)}" for key, value in smaller.items()]


def rate(recipe, done, warmup, total):
    """The learning rate of the step after so many, by the formula of the recipe's schedule."""
    share, left = min(1.0, done / warmup), (total - done) / (total - warmup)
    kind = recipe.get("lr_scheduler_type", "cosine")
    if done >= warmup:
        decay = round(total * recipe.get("decay_fraction", 0))
        falls = {"cosine": lambda: (1 - math.cos(math.pi * left)) / 2, "linear": lambda: left}
        share = min(1.0, (total - done) / decay) if kind == "warmup_stable_decay" else falls[kind]()
    return recipe["learning_rate"] * share


def learning_rates(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["learning_rate"] for row in rows if "loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_trains_on_two_ranks_at_its_own_learning_rates(trained, name):
    recipe = {"learning_rate": 1e-3} | recipe_of(name)
    directory = trained / recipe["output_dir"]
    expected = {step: pytest.approx(rate(recipe, step - 1, 2, 10), rel=1e-9) for step in range(1, 11)}
    assert learning_rates(directory) == expected
    assert (directory / "model.safetensors").is_file()
    noted = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    assert noted["arguments"]["optim"] == recipe.get("optim", "adamw_bnb_8bit")


@pytest.mark.slow
def test_a_stable_checkpoint_goes_on_to_a_later_end_and_the_decay_comes_later(trained):
    expected = {step: rate(recipe_of("smollm2-135m"), step - 1, 2, 20) for step in range(9, 21)}
    assert expected[10] == 3e-3 and expected[20] < 1e-3
    assert learning_rates(trained / "runs" / "longer") == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_the_decay_starts_from_the_stable_weights_on_another_mixture(trained):
    sets = [
        json.loads((trained / "runs" / name / "run.json").read_text())
        for name in ("smollm2-135m", "smollm2-135m-decay")
    ]
    assert sets[0]["data"] != sets[1]["data"]
    rows = [json.loads(line) for line in (trained / "runs/smollm2-135m-decay/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] < math.log(512) - 0.05  # 6.24 nats are random weights'


@pytest.mark.parametrize("name", TRAINING)
def test_a_recipe_holds_only_what_differs_from_the_defaults_and_plans_without_a_contradiction(name):
    recipe = recipe_of(name)
    defaults, _ = plan.parse([])
    values, plan_args = plan.parse([str(ROOT / "configs" / f"{name}.json"), *TABLE["RUNS"][name].split()])
    assert {key for key in recipe if values[key] == defaults[key]} <= {"model_name", "per_device_train_batch_size"}
    made, _, _ = plan.plan_of(values, plan_args)
    assert made["memory"]["fits"] and not made["contradictions"]
    assert made["data"]["tokens"] <= recipe.get("max_tokens", math.inf)  # no text twice


def test_the_table_of_recipes_is_the_plan_s():
    assert set(TABLE["RUNS"]) == set(TRAINING)
    assert TABLE["table"]() in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_recipes_of_smollm2_have_their_authors_batch_length_and_rate():
    """config_smollm2_*.yaml: dp x micro_batch_size rows of 2,048, train_steps, learning_rate, lr_decay_steps."""
    for size, rows, steps, peak, decay in (
        ("135m", 64 * 8, 2_000_000, 3e-3, 400_000),
        ("360m", 128 * 6, 2_600_000, 3e-3, 520_000),
        ("1.7b", 256 * 4, 5_240_000, 5e-4, 524_000),
    ):
        recipe, name = recipe_of(f"smollm2-{size}"), f"smollm2-{size}"
        made, _, _ = plan.plan_of(*plan.parse([str(ROOT / "configs" / f"{name}.json"), *TABLE["RUNS"][name].split()]))
        assert (made["data"]["rows_a_step"], made["data"]["steps"]) == (rows, steps)
        assert recipe["learning_rate"] == peak and round(recipe["decay_fraction"] * steps) == decay
        stable_end = steps - decay
        assert (
            not stable_end % recipe["keep_every_steps"] and not stable_end % recipe["save_steps"]
        )  # it stays for good
