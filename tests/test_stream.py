"""Training straight from text: every document once an epoch over all ranks, and exact resume without a replay."""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import BIN, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port
from safetensors.torch import load_file
from test_mixing import entries, write_source
from test_prepare import TEXTS, TOKENIZER

from smolpretrain.arguments import DataArguments, PretrainArguments
from smolpretrain.data.read import documents as documents_module
from smolpretrain.data.read import readers
from smolpretrain.data.read.corpus import is_validation, read_documents
from smolpretrain.data.read.forms.json_lines import JsonLines
from smolpretrain.data.stream import STATE_FILE, open_stream

BLOCK = 8


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 300)
    monkeypatch.setattr(documents_module, "PART_BYTES", 900)


def opened(source, rank=0, world_size=1, micro_batch=2, length=10**6, validation_fraction=0, **more):
    options = {"packing": "concat", "seed": 7} | more
    return open_stream(
        read_documents(**source), TOKENIZER, BLOCK, length=length, micro_batch=micro_batch, rank=rank,
        world_size=world_size, validation_fraction=validation_fraction, **options,
    )  # fmt: skip


def take(stream, first, rows):
    """A rank's rows first to first + rows, asked for by the indices that Trainer's sampler gives the rank."""
    batch, world = stream._micro_batch, stream._world_size
    indices = [(row // batch * world + stream._rank) * batch + row % batch for row in range(first, first + rows)]
    return [stream[index]["input_ids"].tolist() for index in indices]


def files(directory, number=4, documents=40):
    texts = [write_source(directory / f"{n}.jsonl", f"{n}", documents) for n in range(number)]
    return {"data_files": str(directory / "*.jsonl")}, [text for each in texts for text in each]


def one_epoch(stream):
    """A rank's rows of the first epoch."""
    rows = []
    while not rows or stream._chunk.state["epoch"] == 0:
        rows += take(stream, len(rows), 1)
    return rows[:-1]


@pytest.mark.parametrize(("pieces", "world_size"), [("more than ranks", 2), ("fewer than ranks", 3)])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_ranks_rows_of_an_epoch_are_all_documents_once(tmp_path, monkeypatch, pieces, world_size, packing):
    if pieces == "fewer than ranks":
        monkeypatch.setattr(documents_module, "PART_BYTES", 10**6)
    source, texts = files(tmp_path)
    rows = []
    for rank in range(world_size):
        stream = opened(source, rank, world_size, packing=packing)
        assert stream._alone == (pieces == "more than ranks")
        rows.append(one_epoch(stream))
    found = [TOKENIZER.decode(row) for share in rows for row in share]
    letters = "".join(sorted("".join(found).replace("<|endoftext|>", "")))
    wanted = "".join(sorted("".join(texts)))
    lost = len(wanted) - len(letters)
    assert 0 <= lost < 60 * world_size if packing == "concat" else lost == 0  # a last unfilled row waits for epoch two
    assert min(map(len, rows)) > max(map(len, rows)) / 3


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 150), st.sampled_from(["concat", "best_fit"]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_from_any_row_it_goes_on_with_the_same_rows(tmp_path_factory, world, micro_batch, at, packing, mixed, cleaned):
    directory = tmp_path_factory.mktemp("stream")
    source, _ = files(directory, 3, 30)
    if mixed:
        source = {"mixture": entries(directory, **{"0": 2, "1": 1, "2": 1}), "mixture_seed": 3}
    words = {"packing": packing, "micro_batch": micro_batch, "validation_fraction": 0.2}
    words["cleaning"] = {"min_characters": 12} if cleaned else None
    for rank in range(world):
        whole = opened(source, rank, world, **words)
        rows = take(whole, 0, at + 40)
        begun = opened(source, rank, world, **words)
        take(begun, 0, at + micro_batch)  # Trainer fetches a micro-batch ahead
        begun.save_state(directory, at)
        resumed = opened(source, rank, world, **words)
        resumed.load_state(directory)
        assert take(resumed, at, 40) == rows[at:]


def test_going_on_reads_nothing_of_what_was_read(tmp_path, monkeypatch):
    source, _ = files(tmp_path, 1, 400)
    stream = opened(source)
    take(stream, 0, 300)
    stream.save_state(tmp_path, 300)
    state = json.loads((tmp_path / STATE_FILE.format(0)).read_text())
    positions, read = [], JsonLines.read

    def watched(self, position=None):
        for values, after in read(self, position):
            positions.append((id(self), position))
            yield values, after

    monkeypatch.setattr(JsonLines, "read", watched)
    resumed = opened(source)
    resumed.load_state(tmp_path)
    take(resumed, 300, 1)
    mine = {id(reader) for part in resumed._parts[0] for reader in part.readers}  # the first one's thread reads on
    first = next(position for reader, position in positions if reader in mine)
    assert first == state["source"]["position"][1] and first[0] > 900


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_dataset_s_own_stream_goes_on_too(tmp_path, kind):
    from datasets import Dataset

    (tmp_path / "data").mkdir()
    for number in range(3):
        rows = Dataset.from_dict({"text": [f"{text} {number}" for text in TEXTS]})
        path = str(tmp_path / "data" / f"{number}.{kind}")
        rows.to_json(path) if kind == "jsonl" else rows.to_parquet(path)
    source = {"dataset_name": str(tmp_path / "data"), "streaming": True}
    rows = take(opened(source), 0, 260)
    begun = opened(source)
    take(begun, 0, 200)
    begun.save_state(tmp_path, 200)
    resumed = opened(source)
    resumed.load_state(tmp_path)
    assert take(resumed, 200, 60) == rows[200:]


def test_held_out_documents_are_never_trained_on(tmp_path):
    source, texts = files(tmp_path)
    held = {text for text in texts if is_validation(text, 0.3)}
    rows = one_epoch(opened(source, validation_fraction=0.3, packing="best_fit"))
    letters = "".join(sorted("".join(map(TOKENIZER.decode, rows)).replace("<|endoftext|>", "")))
    assert letters == "".join(sorted("".join(text for text in texts if text not in held))) and len(held) > 20


def test_epochs_differ_in_the_order_of_the_pieces(tmp_path):
    source, _ = files(tmp_path)
    stream = opened(source, packing="best_fit")
    first, second = one_epoch(stream), []
    while stream._chunk.state["epoch"] < 2:
        second += take(stream, len(first) + len(second), 1)
    texts = ["".join(map(TOKENIZER.decode, rows)).replace("<|endoftext|>", "") for rows in (first, second[:-1])]
    assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1])


def test_a_stream_is_read_from_front_to_back(tmp_path):
    source, _ = files(tmp_path)
    stream = opened(source)
    take(stream, 0, 200)
    with pytest.raises(ValueError, match="is read from front to back: row 0 was passed"):
        take(stream, 0, 1)


def test_what_fails_while_reading_ahead_comes_through(tmp_path):
    source, _ = files(tmp_path, 1, 400)
    with open(tmp_path / "0.jsonl", "a") as file:
        file.write('{"text": 12}\n')
    stream = opened(source)
    with pytest.raises(ValueError, match=r"0\.jsonl: row 401 is int '12', not text"):
        take(stream, 0, 10_000)


def test_what_a_stream_cannot_do_is_refused(tmp_path):
    source, _ = files(tmp_path, 1)
    with pytest.raises(ValueError, match="deduplicate = true needs a prepared set"):
        opened(source, cleaning={"deduplicate": True})
    with pytest.raises(ValueError, match="gave rank 0 no document: give more text"):
        take(opened(source, cleaning={"min_characters": 1000}), 0, 1)
    with pytest.raises(ValueError, match=r"stream_dp_rank_0_state\.json is missing"):
        opened(source).load_state(tmp_path)
    with pytest.raises(ValueError, match="prepared_dir = set would not be read: streaming = true trains straight"):
        DataArguments(streaming=True, prepared_dir="set")
    with pytest.raises(ValueError, match=r"streaming = true has no end: set max_steps \(now -1\)"):
        PretrainArguments(deepspeed=None).stream_share()
    with pytest.raises(ValueError, match="dataloader_num_workers = 2 would read the stream as often"):
        PretrainArguments(deepspeed=None, max_steps=9, dataloader_num_workers=2).stream_share()
    bounded = DataArguments(streaming=True, prepared_dir="set", max_tokens=9)
    assert not bounded.trains_from_stream and bounded.first_of_stream == {}


WORDS = [
    "model_name=smollm2-1m", "tokenizer_name=train", "block_size=64", "validation_fraction=0.1", "eval_steps=100",
    'config_overrides={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}',
    "sample_steps=0", "logging_steps=1", "per_device_train_batch_size=2", "gradient_accumulation_steps=2",
    "max_steps=24", "save_steps=4", "warmup_steps=3", "disable_tqdm=true", "streaming=true",
]  # fmt: skip


def losses(output_dir):
    path = output_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return {row["step"]: (row["loss"], row["learning_rate"], row["grad_norm"]) for row in rows if "loss" in row}


@pytest.mark.slow
def test_killed_and_started_again_a_run_from_a_stream_ends_bit_identical(corpus_file, tmp_path):
    def start(output_dir, *script):
        words = [*WORDS, f"data_files={corpus_file}", f"output_dir={output_dir}"]
        with open(f"{output_dir}.log", "a") as log:
            return subprocess.Popen(
                [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", free_port(), *script, *words],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    kill = {"point": "step", "at": 10, "do": "kill all", "fired": str(tmp_path / "fired")}
    assert start(tmp_path / "alone", "run_pretrain.py").wait(900) == 0, (tmp_path / "alone.log").read_text()[-3000:]
    assert start(tmp_path / "killed", "tests/faults.py", f"fault={json.dumps(kill)}").wait(900) == -signal.SIGKILL
    assert max(losses(tmp_path / "killed")) < 24 and (tmp_path / "fired").exists()
    again = start(tmp_path / "killed", "run_pretrain.py").wait(900)
    assert again == 0, (tmp_path / "killed.log").read_text()[-3000:]
    assert "going on from" in (tmp_path / "killed.log").read_text()
    assert losses(tmp_path / "alone") == losses(tmp_path / "killed") and len(losses(tmp_path / "alone")) == 24
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert np.isfinite(losses(tmp_path / "alone")[24][0])
