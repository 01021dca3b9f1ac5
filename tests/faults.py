"""run_pretrain.py with a fault in it, for tests: under any launcher, or many launches from one process.

    deepspeed --num_gpus 2 tests/faults.py fault='{"point": "substep", "at": 7, "rank": 1, "do": "raise", "fired": "f"}'
    python tests/faults.py serve FILE_DESCRIPTOR

A fault happens when its point is reached for the at-th time on its rank, and adds a line to the file `fired`, so that a
test sees that it did. `serve` imports everything once and forks ranks for each request (a launch then costs a quarter):
the ranks are run_pretrain.main with its own Trainer, DeepSpeed and process group, only the launcher is not there.
"""

import contextlib
import gc
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bitsandbytes  # noqa: F401, Trainer imports it where the optimizer is made, 0.8 s of a core in each rank
import torch
import transformers
from ports import free_port
from transformers import TrainerCallback

import in_place  # noqa: F401
from smolpretrain import run_pretrain
from smolpretrain.training import trainer
from smolpretrain.training.safety.guards import launchers

IN_CHECKPOINT = re.compile(r"checkpoint-\d+(/|$)")


class Fault(TrainerCallback):
    """Points: prepare, begin, substep, step, prediction, end (after training), and in checkpoints file (each written),
    choice (each manifest read) and rotation (each removed); stopped, before the first rank notes an agreed stop.

    Does: kill all, raise, sleep SECONDS, SIGTERM ... to this rank, group SIGTERM to all ranks and their children, await
    stop until this rank has heard why to stop, await end until then or its launcher's end, await signal until one more
    has come, count. `first`: in so many launches only.
    """

    stop = None

    def __init__(self, point, at, do, fired, rank=0, first=None):
        self.point, self.at, self.do, self.fired = point, at, do, Path(fired)
        earlier = len(self.fired.read_text().splitlines()) if first and self.fired.exists() else 0
        self.armed, self.count, self.rotating = rank == run_pretrain.RANK and earlier < (first or 1), 0, False

    def reach(self, point, where=""):
        if not self.armed or point != self.point:
            return
        self.count += 1
        if self.do == "count" or self.count == self.at:
            with open(self.fired, "a") as file:
                file.write(json.dumps({"point": point, "at": self.count, "do": self.do, "where": str(where)}) + "\n")
            self.happen()

    def happen(self):
        if self.do == "kill all":
            os.killpg(0, signal.SIGKILL)
        elif self.do == "raise":
            raise torch.OutOfMemoryError("out of memory, as injected")
        elif self.do.startswith("sleep"):
            time.sleep(float(self.do.split()[1]))
        elif self.do == "await signal":
            came, handler = [], signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *told: (came.append(told), handler(*told)))
            while not came:
                time.sleep(0.05)
        elif self.do.startswith("await"):
            until = time.monotonic() + 600
            while not self.stop.heard and time.monotonic() < until:
                if self.do == "await end" and launchers() != self.stop.above:
                    break
                time.sleep(0.05)
        elif self.do.startswith("group"):
            os.killpg(0, getattr(signal, self.do.split()[1]))
        elif self.do.startswith("SIG"):
            for name in self.do.split():
                os.kill(os.getpid(), getattr(signal, name))

    def install(self):
        """Reach the points that no callback has: files by Python's audit events and around the two foreign writers."""
        sys.addaudithook(self.audit)
        for owner, name in ((torch, "save"), (transformers.modeling_utils, "safe_save_file")):
            setattr(owner, name, self.around(getattr(owner, name)))
        score = run_pretrain.score_held_out
        run_pretrain.score_held_out = lambda *args: (self.reach("end"), score(*args))[1]
        note = run_pretrain.record.write_run
        run_pretrain.record.write_run = lambda *args, **entries: (
            entries.get("last_stop") and self.reach("stopped"),
            note(*args, **entries),
        )

    def around(self, write):
        def written(*args, **kwargs):
            write(*args, **kwargs)
            where = next((str(a) for a in (*args, *kwargs.values()) if isinstance(a, str | Path)), "")
            if IN_CHECKPOINT.search(where):
                self.reach("file", where)

        return written

    def audit(self, event, args):
        if event == "open" and str(args[0]).endswith(("identity.json", "tokenizer_config.json")):
            self.reach("prepare", args[0])
        elif event == "open" and isinstance(args[0], str) and IN_CHECKPOINT.search(args[0]):
            if (args[1] and args[1][0] in "wax") or (args[1] is None and args[2] & (os.O_WRONLY | os.O_RDWR)):
                self.reach("file", args[0])
            elif args[0].endswith("manifest.json"):
                self.reach("choice", args[0])
        elif event == "os.rename" and IN_CHECKPOINT.search(str(args[1])):
            self.reach("file", args[1])
        elif event == "shutil.rmtree" and IN_CHECKPOINT.search(str(args[0])):
            self.rotating = True
            self.reach("rotation", args[0])
        elif event == "os.remove" and (self.rotating or IN_CHECKPOINT.search(str(args[0]))):
            self.reach("rotation", args[0])

    def on_train_begin(self, *args, **kwargs):
        self.reach("begin")

    def on_substep_end(self, args, state, control, **kwargs):
        self.reach("substep", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.reach("step", state.global_step)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.reach("prediction", state.global_step)


def note_rows(directory):
    """Every row that a step trains on, by rank: step, hash of its tokens."""
    step = trainer.PretrainTrainer.training_step

    def noted(self, model, inputs, *args):
        with open(Path(directory, f"rows-{run_pretrain.RANK}.jsonl"), "a") as file:
            for row in inputs["input_ids"]:
                digest = hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16]
                file.write(json.dumps([self.state.global_step + 1, digest]) + "\n")
        return step(self, model, inputs, *args)

    trainer.PretrainTrainer.training_step = noted


def run(words, fault=None, rows=None):
    if rows:
        note_rows(rows)
    if fault:
        injected, make = Fault(**fault), run_pretrain.make_trainer
        injected.install()

        def make_trainer(*args):
            made, log = make(*args)
            made.add_callback(injected)
            return made, log

        class Stop(run_pretrain.guards.StopTogether):
            def __init__(self, *args):
                super().__init__(*args)
                injected.stop = self

        run_pretrain.guards.StopTogether = Stop

        run_pretrain.make_trainer = make_trainer
    run_pretrain.main(words)


def rank_process(rank, world, port, request, all_there):
    """One forked rank; never returns."""
    status = 1
    try:
        os.close(all_there[1])
        os.read(all_there[0], 1)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run_pretrain.RANK = rank
        run(request["words"], request.get("fault"), request.get("rows"))
        status = 0
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def serve(answers):
    """Answer each request line {words, world, log, fault, rows} with the ranks' pids, then with their statuses."""
    gc.freeze()  # or each rank's first look for garbage copies every page of what was imported
    port = free_port()  # for all, so that one finds what another has left
    for line in sys.stdin:
        request = json.loads(line)
        for told in Path(tempfile.gettempdir()).glob(f"smolpretrain-told-{os.getpid()}-*"):
            told.unlink()  # of the launch before: a real launcher is another process each time
        world = request.get("world", 2)
        pids, all_there = [], os.pipe()
        for rank in range(world):
            if (pid := os.fork()) == 0:
                os.setpgid(0, pids[0] if pids else 0)
                rank_process(rank, world, port, request, all_there)
            os.setpgid(pid, pids[0] if pids else pid)
            pids.append(pid)
        for end in all_there:  # none begins, nor kills its group, before all are in it
            os.close(end)
        print(json.dumps(pids), file=answers, flush=True)
        statuses, ending = {}, None
        while len(statuses) < world:  # as launchers do: the first that fails ends the others
            for pid in set(pids) - set(statuses):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            if any(statuses.values()):
                ending = ending or time.monotonic()
                for pid in set(pids) - set(statuses):
                    os.kill(
                        pid, signal.SIGTERM if time.monotonic() - ending < request.get("grace", 300) else signal.SIGKILL
                    )
            time.sleep(0.05)
        print(json.dumps([statuses[pid] for pid in pids]), file=answers, flush=True)
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink()  # of one killed before its first step


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(os.fdopen(int(sys.argv[2]), "w"))
    else:
        words = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "fault="))]
        (fault,) = (word.removeprefix("fault=") for word in sys.argv if word.startswith("fault="))
        run(words, json.loads(fault))
