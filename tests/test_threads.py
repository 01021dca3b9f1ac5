"""Claims about core/threads.py: whether others are at work is seen, and torch's OpenMP hears what was chosen."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

BURN = "while True: pass"
LOOK = """
import os, runpy, sys, time
runpy.run_path("in_place.py")
sys.argv[0] = "trains.py"  # no launcher above names it; "-c" many a shell does
from smolpretrain.core.threads import Look
look = Look()
time.sleep(1)
print(look.settle())
print(os.environ.get("GOMP_SPINCOUNT"))
if "torch" in sys.argv:
    import torch
"""


@pytest.fixture
def busy():
    """A process of somebody else's that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", BURN], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def look(*words, **chosen):
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)}
    command = [sys.executable, "-c", LOOK, *words]
    return subprocess.run(command, cwd=ROOT, env=inherited | chosen, capture_output=True, text=True, check=True)


def test_threads_spin_less_beside_a_busy_process_and_torch_s_openmp_is_told(busy):
    done = look("torch", OMP_DISPLAY_ENV="verbose")
    assert done.stdout.startswith("threads: other processes keep ")
    assert "GOMP_SPINCOUNT=1000; set it, or OMP_NUM_THREADS, to choose yourself" in done.stdout
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


@pytest.mark.parametrize(
    "chosen", [{"GOMP_SPINCOUNT": "7"}, {"OMP_NUM_THREADS": "2"}, {"OMP_WAIT_POLICY": "active"}], ids=str
)
def test_what_the_user_chose_about_threads_stays(busy, chosen):
    assert look(**chosen).stdout.splitlines() == ["None", chosen.get("GOMP_SPINCOUNT", "None")]


def test_a_quiet_machine_is_left_as_it_is_and_a_run_s_own_processes_are_no_others(busy, monkeypatch):
    from smolpretrain.core import threads

    own = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        others = threads.seconds_of_others("pytest")
    finally:
        own.kill()
        own.wait()
    assert own.pid not in others and os.getpid() not in others
    environment = {}
    monkeypatch.setattr(threads, "seconds_of_others", lambda script: {1: 0.0})
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert threads.Look(environment).settle() is None and environment == {}
