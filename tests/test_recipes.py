"""The recipes of configs/, run by the commands that they are for, against a small corpus under their own names."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT

from smolpretrain.data.manifest import Manifest, verify
from smolpretrain.data.tokenization import load_tokenizer, tokenizer_hash, train_tokenizer

CORPUS, TOKENIZER = "HuggingFaceTB/smollm-corpus", "HuggingFaceTB/SmolLM2-135M"
FILES, ROWS = 4, 300
CARD = """---
configs:
- config_name: cosmopedia-v2
  data_files: [{split: train, path: cosmopedia-v2/train-*}]
- config_name: fineweb-edu-dedup
  data_files: [{split: train, path: fineweb-edu-dedup/train-*}]
---
"""


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
    return hub.add("dataset", CORPUS, files | {"README.md": CARD.encode()})


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
