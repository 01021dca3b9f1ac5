"""`python data/prepare.py` as a user runs it."""

import json
from dataclasses import fields

import pytest
from conftest import ROOT

from smolpretrain.data.prepare import PrepareArguments, main, slurm_share

COMMAND = ("python", ROOT / "data" / "prepare.py")


def test_the_command_prepares_a_set_with_its_tokenizer_and_finds_it_again(launch, corpus_file, tmp_path):
    (tmp_path / "prepare.json").write_text(json.dumps({"data_files": [str(corpus_file)], "block_size": 64}))
    words = (*COMMAND, "prepare.json", "prepared_dir=set", "vocab_size=400", "validation_fraction=0.1")
    first = launch(*words, cwd=tmp_path).stdout
    assert "train: " in first and "fill 1.0000" in first and "written to set" in first
    assert (tmp_path / "set" / "tokenizer" / "tokenizer.json").is_file()
    assert "found whole in set" in launch(*words, cwd=tmp_path).stdout
    done = launch(*words, "block_size=32", cwd=tmp_path, expect=2)
    assert done.stderr.count("\n") == 1 and "was prepared with block_size 64, but 32 is asked for" in done.stderr
    assert "every byte as its manifest says" in launch(*COMMAND, "--verify", "set", cwd=tmp_path).stdout
    shard = tmp_path / "set" / "train-00000-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert (
        "train-00000-00000.arrow is damaged: its sha256"
        in launch(*COMMAND, "--verify", "set", cwd=tmp_path, expect=2).stderr
    )


def test_machines_share_a_set_that_merge_joins(corpus_file, tmp_path, monkeypatch, capsys):
    from smolpretrain.data.read import documents

    monkeypatch.setattr(documents, "PART_BYTES", 50_000)
    monkeypatch.chdir(tmp_path)
    words = [f"data_files={corpus_file}", "vocab_size=400", "block_size=64", "validation_fraction=0.1"]
    main([*words, "prepared_dir=alone"])
    for index in ("5", "7"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", index)
        for name, value in (("MIN", "5"), ("STEP", "2"), ("COUNT", "2")):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        if index == "7":
            with pytest.raises(SystemExit) as end:
                main(["--merge", *words, "prepared_dir=many"])
            assert end.value.code == 2 and "are not finished (1, 3" in capsys.readouterr().err
        main([*words, "prepared_dir=many"])
    assert "share 1 of 2 is done" in capsys.readouterr().out and not (tmp_path / "many").exists()
    main(["--merge", *words, "prepared_dir=many"])
    found = [
        {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (tmp_path / "alone", tmp_path / "many")
    ]
    assert found[0] == found[1] and len(found[0]) > 10


def test_a_slurm_array_s_task_is_a_share():
    names = {"ID": "9", "MIN": "1", "STEP": "4", "COUNT": "3"}
    assert slurm_share({f"SLURM_ARRAY_TASK_{name}": value for name, value in names.items()}) == (2, 3)
    assert slurm_share({}) == (0, 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["blok_size=3"], "blok_size is not an argument. Did you mean block_size?"),
        (["data_files=none.jsonl"], "no file matches none.jsonl; check the path."),
        (["num_proc=0"], "num_proc must be at least 1, got 0."),
        (["shard_index=1"], "shard_index and num_shards go together"),
        (["shard_index=2", "num_shards=2"], "shard_index must be at least 0 and below num_shards = 2, got 2."),
        (["tokenizer_backend=fast"], "command line: tokenizer_backend = 'fast' is not one of auto, tokenizers, tokie."),
        (["--verify", "none"], "none is not a prepared set"),
        (["--verify", "set", "block_size=3"], "--verify takes one directory"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and sentence in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_key(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {item.name}=" in text for item in fields(PrepareArguments))


def test_the_command_says_what_a_mixture_realised_and_what_was_left_out(corpus_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mixture = [{"data_files": [str(corpus_file)], "weight": 1}, {"weight": 3}]
    (tmp_path / "prepare.json").write_text(json.dumps({"mixture": mixture, "vocab_size": 400, "block_size": 64}))
    main(["prepare.json", "max_tokens=60000", "min_characters=60", "validation_fraction=0.02"])
    out = capsys.readouterr().out
    assert "documents.jsonl: " in out and "built-in: " in out and str(tmp_path) not in out
    assert "of all for a weight of 0.7500" in out and "left out: min_characters " in out
    assert str(corpus_file.parent) not in (tmp_path / "prepared" / "manifest.json").read_text()


def test_help_waits_for_neither_torch_nor_the_hub(launch, tmp_path):
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub'}"
    script = f"import runpy, sys; sys.argv = [{str(COMMAND[1])!r}, '--help']"
    script += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "help.py").write_text(f"{script}; print(sorted({heavy} & {{*sys.modules}}))")
    assert launch("python", tmp_path / "help.py", cwd=tmp_path).stdout.endswith("[]\n")
