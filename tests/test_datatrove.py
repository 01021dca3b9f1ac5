"""datatrove's pipelines end in a prepared set, task by task, and what its writer leaves is read as it is."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from smolpretrain.data.datatrove_step import MergePackedSet, PackedSetWriter
from smolpretrain.data.pack.manifest import Manifest, verify
from smolpretrain.data.prepared import load_unigram_counts, load_validation_documents
from smolpretrain.data.read import readers
from smolpretrain.data.read.corpus import is_validation, read_documents
from smolpretrain.data.tokens import encoding
from smolpretrain.data.tokens.tokenization import encode_documents, load_tokenizer, train_tokenizer

TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
WORDS = [word for word in (ROOT / "LICENSE").read_text(encoding="utf-8").split() if word.isalpha()]
TEXTS = [[f"Shard {shard}, document {row}: " + " ".join(WORDS[row : row + 60 * (row % 5 > 0)]) for row in range(200)]
         for shard in range(3)]  # fmt: skip
KEPT = [text for shard in (0, 2, 1) for text in TEXTS[shard] if len(text) > 50]  # Gopher's; task 0 reads 0 and 2
SMALL = """
import os, signal, sys
from smolpretrain.data.pack import shards
from smolpretrain.data.read import readers

readers.READ_BYTES, shards.SHARD_BYTES = 5000, 20000  # several shards a part: there is one to go on from


def die_once(data, rank, world_size):
    for number, document in enumerate(data):
        if rank == 1 and number == 150 and len(sys.argv) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield document


if __name__"""


def documented_pipeline() -> str:
    """The pipeline of docs/data.md: two tasks, the set named on the command line, and a way to die."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "PackedSetWriter" in block)
    changes = {"if __name__": SMALL, '"prepared/web"': "sys.argv[1]", "Filter(), writer": "Filter(), die_once, writer"}
    changes |= {"tasks=8": "tasks=2, workers=2 if sys.argv[1] == 'packed' else 1"}
    changes |= {f'"logs/{name}"': f'"logs/{name}-" + sys.argv[1]' for name in ("pack", "merge")}
    changes |= {
        'Writer(sys.argv[1], "Hug': 'Writer(sys.argv[1], block_size=32, validation_fraction=0.1, tokenizer_name="Hug'
    }
    for old, new in changes.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Three files of text, a tokenizer, and the pipeline of docs/data.md."""
    top = tmp_path_factory.mktemp("datatrove")
    (top / "web").mkdir()
    for number, texts in enumerate(TEXTS):
        lines = [json.dumps({"text": text, "id": str(row)}) for row, text in enumerate(texts)]
        (top / "web" / f"{number:05d}.jsonl").write_text("\n".join(lines))
    train_tokenizer(KEPT, 320).save_pretrained(top / TOKENIZER)
    (top / "pipeline.py").write_text(documented_pipeline())
    return top


@pytest.fixture(scope="module")
def packed(here, launch):
    launch("python", "pipeline.py", "packed", cwd=here, PYTHONPATH=str(ROOT))
    return here / "packed"


def files(directory) -> dict:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run(here, steps, **options) -> None:
    """Run steps in this process, one task after another."""
    LocalPipelineExecutor(steps, workers=1, logging_dir=str(here), **options).run()


def test_two_tasks_write_one_set_of_what_the_filters_let_through(packed):
    manifest, tokenizer = verify(packed, sha256=True), load_tokenizer(str(packed / "tokenizer"))
    train = np.concatenate(encode_documents(tokenizer, [text for text in KEPT if not is_validation(text, 0.1)]))
    assert manifest.splits["train"]["tokens"] == len(train)
    assert load_unigram_counts(packed).tolist() == np.bincount(train, minlength=manifest.vocab_size).tolist()
    first = Dataset.from_file(str(packed / "train-00000-00000.arrow")).with_format("numpy")["input_ids"]
    first = np.concatenate(list(first))
    assert first.tolist() == train[: len(first)].tolist()
    assert list(load_validation_documents(packed)) == [text for text in KEPT if is_validation(text, 0.1)]
    assert manifest.source == {"pipeline": "our crawl, Gopher's quality rules", "tasks": 2}
    assert len({name[:11] for name in manifest.splits["train"]["files"] if "tail" not in name}) == 2  # both parts


def test_a_killed_task_goes_on_and_the_set_is_the_same_byte_for_byte(here, packed, launch):
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "pipeline.py", "again", "die"], cwd=here, env=environment, **silent)
    assert killed.wait(timeout=900) == -signal.SIGKILL
    os.killpg(killed.pid, signal.SIGKILL)  # datatrove's manager process outlives it
    partial = here / ".again.partial"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("shard-*.json")}
    assert len([name for name in before if name.startswith("shard-00001")]) >= 1
    assert os.listdir(here / "logs" / "pack-again" / "completions") == ["00000"]
    kept = {name: (partial / "set" / f"train-{name[6:17]}.arrow").stat().st_ino for name in before}
    done = launch("python", "pipeline.py", "again", cwd=here, PYTHONPATH=str(ROOT))
    assert "Skipping 1 already completed tasks" in done.stderr
    assert kept == {name: (here / "again" / f"train-{name[6:17]}.arrow").stat().st_ino for name in before}
    assert files(here / "again") == files(packed)


def test_more_tasks_than_files_leave_empty_parts(here, tmp_path):
    writer = PackedSetWriter(str(tmp_path / "set"), str(here / TOKENIZER), "cats", 32, "best_fit", 0)
    run(tmp_path / "logs", [JsonlReader(str(here / "web"), limit=5), writer], tasks=4)
    run(tmp_path / "merge", [MergePackedSet(str(tmp_path / "set"))])
    manifest = verify(tmp_path / "set")
    assert manifest.splits["train"]["documents"] == 15 and manifest.packing == "best_fit"
    run(tmp_path / "logs again", [JsonlReader(str(here / "web"), limit=5), writer], tasks=4)
    run(tmp_path / "merge again", [MergePackedSet(str(tmp_path / "set"))])  # found whole, twice


def test_what_cannot_be_is_refused(here, tmp_path, monkeypatch):
    reader = JsonlReader(str(here / "web"), limit=5)

    def writer(**options):
        return PackedSetWriter(
            str(tmp_path / "set"),
            str(here / TOKENIZER),
            "cats",
            validation_fraction=0,
            **options,
        )

    merge = MergePackedSet(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="set is not a prepared set"):
        merge.run()
    with pytest.raises(ValueError, match="block_size must be at least 2"):
        writer(block_size=1).run(reader.run(), 0, 2)
    writer(block_size=16).run(reader.run(), 0, 2)
    with pytest.raises(ValueError, match=r"1 of 2 parts of .*set are not finished \(1\)"):
        merge.run()
    with pytest.raises(ValueError, match="was prepared with source.tasks 2, but 3 is asked for"):
        writer(block_size=16).run(reader.run(), 1, 3)
    broken = [Document(text="a lone \ud800", id="0")]
    with pytest.raises(ValueError, match=r"task 1: row 1 holds the lone surrogate"):
        writer(block_size=16).run(iter(broken), 1, 2)


def test_documents_that_come_once_are_never_lost_where_the_faster_tokenizer_disagrees(here, tmp_path, monkeypatch):
    compared = []

    def disagree(self, texts, ids, partial):
        compared.append(texts)
        if len(compared) == 2:  # in the middle of the first task
            raise encoding.Disagreement("it gives other ids")

    writer = PackedSetWriter(str(tmp_path / "set"), str(here / TOKENIZER), "cats", 16, validation_fraction=0)
    reader, merge = JsonlReader(str(here / "web")), MergePackedSet(str(tmp_path / "set"))
    monkeypatch.setattr(encoding.Encoder, "compare", disagree)
    monkeypatch.setattr(readers, "READ_BYTES", 2000)
    with pytest.raises(ValueError, match=r"documents come once; run it again with skip_completed=False"):
        run(tmp_path / "logs", [reader, writer], tasks=2)
    run(tmp_path / "logs", [reader, writer], tasks=2, skip_completed=False)
    merge.run()
    made = Manifest.load(tmp_path / "set")
    assert made.splits["train"]["documents"] == 600 and made.audit["disagreements"] == 1
    assert {text for texts in compared[:2] for text in texts}.isdisjoint(compared[-1])  # of the other task


def test_what_datatrove_writes_is_read_as_it_is(here, tmp_path):
    keep = LambdaFilter(lambda document: len(document.text) > 50)
    run(tmp_path / "logs", [JsonlReader(str(here / "web")), keep, JsonlWriter(str(tmp_path / "clean"))], tasks=2)
    assert sorted(os.listdir(tmp_path / "clean")) == ["00000.jsonl.gz", "00001.jsonl.gz"]
    assert list(read_documents(data_files=str(tmp_path / "clean" / "*.jsonl.gz"))) == KEPT
