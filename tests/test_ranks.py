"""Ranks that fail show one error, and none waits for ever: real processes over gloo, without a model."""

import contextlib
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from failing_ranks import BEFORE_THEY_MEET, SIGNALLED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """{case: (statuses of both ranks, what both wrote)}."""
    where = tmp_path_factory.mktemp("failed")
    command = [sys.executable, "tests/failing_ranks.py", where]
    environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}  # or torch prints its frames
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_raises_shows_its_error_and_the_other_none(failed, rank):
    statuses, text = failed[f"rank {rank} raises"]
    assert statuses == [1, 1] and text.count("Traceback") == 1
    assert f"rank {rank} failed at step 7:" in text and f"KeyError: 'boom of {rank}'" in text
    assert "does not answer" not in text


def test_a_rank_that_has_told_its_error_shows_it_whatever_its_launcher_signals_meanwhile(failed):
    statuses, text = failed[SIGNALLED]
    assert statuses == [1, 1] and text.count("Traceback") == 1 == text.count("KeyError: 'boom of 0'"), text


@pytest.mark.parametrize("case", ["both raise", *BEFORE_THEY_MEET])
def test_of_two_ranks_that_raise_at_once_one_shows_its_error(failed, case):
    statuses, text = failed[case]
    assert statuses == [1, 1] and text.count("Traceback") == 1 == text.count("KeyError: 'boom of")


@pytest.mark.parametrize("who", ["both meet", "rank 0 meets", "rank 1 meets"])
def test_an_error_with_a_status_is_one_line_and_the_status_of_both(failed, who):
    """Launchers pass on the status of whichever rank they find ended first."""
    statuses, text = failed[f"{who} a full disk"]
    assert statuses == [5, 5] and text.splitlines() == ["run_pretrain.py: error: the disk is full."]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_alone_is_refused_says_it_and_the_other_which_waits_for_it_says_nothing(failed, rank):
    statuses, text = failed[f"rank {rank} is refused"]
    assert statuses == [2, 2] and text.splitlines() == ["run_pretrain.py: error: rows: the connection was refused."]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_by_the_other(failed, rank):
    statuses, text = failed[f"rank {rank} is killed"]
    assert statuses == ([-9, 1] if rank == 0 else [1, -9])
    assert f"error: rank {1 - rank} at step 7: rank {rank} does not answer: killed" in text
    assert len(text.splitlines()) == 1


def test_a_rank_that_is_asked_to_stop_before_it_notices_that_another_was_killed_names_it_too(failed):
    """A launcher signals the others as soon as one has ended, and they may be in the middle of a long step."""
    statuses, text = failed["rank 0 is asked to stop, rank 1 is killed"]
    assert statuses == [1, -9] and "error: rank 0 at step 7: rank 1 does not answer: killed" in text


def test_once_training_begins_no_group_waits_longer_than_it_is_told_to(failed):
    statuses, text = failed["rank 1 hangs"]
    _, first, last = text.splitlines()
    assert "in a group of its own: " in first and "5000ms" in first
    assert "error: rank 0 at step 7: rank 1 does not answer" in last and "5000ms" in last
    assert statuses == [1, -9]


def test_shared_buffers_are_forgotten_once_all_ranks_had_time_to_open_them(failed):
    _, text = failed["rank 1 hangs"]
    assert text.splitlines()[0] == "there: True" and text.splitlines()[1].startswith("left: False;")


WAITING = """
import pathlib, signal, sys, time
rank = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (rank.write_text("told"), sys.exit(75)))
rank.write_text("waits")
time.sleep(600)
"""


def test_when_our_launcher_is_killed_the_kernel_tells_the_one_below_and_that_its_ranks(tmp_path):
    script, rank = tmp_path / "waiting.py", tmp_path / "rank"
    script.write_text(WAITING)
    words = ["torchrun", "--standalone", "--nproc_per_node", "1", script, rank]
    ours = subprocess.Popen([sys.executable, "launch.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    below = []
    try:
        wait_for(rank, "waits")
        below = psutil.Process(ours.pid).children(recursive=True)
        ours.kill()
        wait_for(rank, "told")
        assert psutil.wait_procs(below, timeout=600)[1] == []
    finally:
        ours.kill()
        for process in below:
            with contextlib.suppress(psutil.Error):
                process.kill()


def wait_for(file, word, seconds=600):
    end = time.monotonic() + seconds
    while not (file.exists() and file.read_text() == word) and time.monotonic() < end:
        time.sleep(0.05)
    assert file.read_text() == word
