"""Uploads while a run trains: each checkpoint a branch, the finished model at the end, none of it in training's way.

Not Trainer's push: it sends training_args.bin with the token in it, puts a card of its own over README.md, and never
says what failed (transformers 5.23). Here a process, hub/publish.py, sends what waits in RUN_DIR/unsent, whose files
are hard links: a checkpoint may be removed before it is sent.
"""

import atexit
import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import TrainerCallback

from . import branches, folder, publish
from .connection import Repository, check_license, owner

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOM = 10  # models: a link outlives its checkpoint, and the next one has up to 16 bytes a parameter beside these 2
REMEDIES = publish.REMEDIES | {
    402: "the Hub asks for payment ({said}); free some private storage, choose a paid plan, or set "
    "hub_private_repo=false"
}


def claim(args, say):
    """Make sure, before anything expensive, that the run's model will be taken; returns the Uploads of it.

    Args:
        args: TrainingArguments: hub_model_id (without an owner it is the token's; None is output_dir's last part),
            hub_private_repo (only false makes it public), hub_strategy (every_save or end); and hub_license.

    Raises ValueError: one sentence with what to do.
    """
    asked = f"hub_model_id = {args.hub_model_id}" if args.hub_model_id else "push_to_hub = true"
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    if "/" not in name:
        name = f"{owner(asked)}/{name}"
    public, said = args.hub_private_repo is False, {"say_public": "hub_private_repo=false", "remedies": REMEDIES}
    repository = Repository(name, public=public, asked=asked, **said)
    check_license(f"hub_license = {args.hub_license}", args.hub_license)
    publish.claim(repository, tag=None)
    say(f"hub: the model goes to {repository.address}, {'public' if public else 'private'}.")
    return Uploads(args.output_dir, repository, args.hub_license, args.hub_strategy == "every_save", say)


def harmless(method):
    """What goes wrong with files and processes in a callback is said: it does not end training."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        try:
            method(self, *args, **kwargs)
        except OSError as error:
            self.say(f"NOT uploaded: {error}. The run goes on.")

    return call


class Uploads(TrainerCallback):
    """What the first rank sends, and what becomes of it. Nothing here ends a run, nor waits while it trains.

    Args:
        each_save: Checkpoints too, each as a branch; else the finished model only.
        say: Takes a sentence for the log.

    Attributes:
        step_0: Whether the weights before the first step are a branch too: they are drawn again from the seed.
    """

    step_0 = False

    def __init__(self, output_dir, repository, license, each_save, say):
        self.run_dir, self.repository, self.license = Path(output_dir), repository, license
        self.each_save, self.say = each_save, say
        self.unsent, self.process, self.said = self.run_dir / branches.UNSENT, None, None
        atexit.register(self.stop)

    def command(self, *more):
        """The words that publish this run by hand."""
        words = [str(self.run_dir), "--repo", self.repository.name, "--license", self.license]
        return [*words, *["--public"] * self.repository.public, *more]

    @harmless
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.each_save:
            return
        if state.global_step == 0:
            shutil.rmtree(self.unsent, ignore_errors=True)  # of a run that this one does not go on with
            if self.step_0:
                tokenizer = [path for path in folder.model_files(self.run_dir) if folder.of_tokenizer(path)]
                self._put(branches.name_of(0, 0), tokenizer, config=model.config)
        self._start()

    @harmless
    def on_save(self, args, state, control, **kwargs):
        checkpoint = self.run_dir / f"checkpoint-{state.global_step}"
        if not self.each_save or not (checkpoint / branches.MANIFEST).is_file():
            return
        files = [*folder.model_files(checkpoint), checkpoint / branches.MANIFEST]
        branch = branches.name_of(state.global_step, state.num_input_tokens_seen)
        room = ROOM * sum(map(os.path.getsize, files))
        if self._waiting() and shutil.disk_usage(self.run_dir).free < room:
            self.say(f"{branch} is not kept for the Hub: the disk is too full for the checkpoints to come.")
        else:
            self._put(branch, files)
        if not control.should_training_stop:
            self._start()

    @harmless
    def on_step_end(self, args, state, control, **kwargs):
        self._hear()

    def _put(self, branch, files, config=None):
        """Let a model wait for the Hub: there whole or not at all."""
        partial = self.unsent / f".{branch}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in files:
            try:
                os.link(path, partial / path.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, partial / path.name)
        if config is not None:
            config.save_pretrained(partial)
        shutil.rmtree(self.unsent / branch, ignore_errors=True)
        partial.rename(self.unsent / branch)

    def _waiting(self):
        return sorted(path.name for path in self.unsent.glob("*") if branches.BRANCH.fullmatch(path.name))

    def _start(self):
        """Send what waits, in a process of its own; one at a time."""
        if self.process is None and self._waiting():
            with open(self.unsent / "log", "wb") as log:
                self.process = self._popen("--unsent", stdout=log, stderr=log, OMP_NUM_THREADS="1")

    def _popen(self, *more, stdout, stderr, **environment):
        inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
        command = [sys.executable, publish.__file__, *self.command(*more)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                                env=inherited | environment)  # fmt: skip

    def _hear(self):
        """Say what became of the last sending: what arrived, or why not, once as long as it stays the same."""
        if self.process is None or self.process.poll() is None:
            return
        status, self.process = self.process.returncode, None
        lines = (self.unsent / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if line.startswith("sent: "):
                self.say(f"uploaded {line.removeprefix('sent: ')} to {self.repository.name}.")
        if status == 0:
            self.said = None
            self._start()  # what came while it was at work
        elif (why := reason(lines, status)) != self.said:
            self.said = why
            self.say(f"NOT uploaded: {why}. The run goes on, and it is tried again.")

    def stop(self):
        """Leave at once: what is not sent waits in UNSENT for the same command, or for publish.py."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            if waiting := self._waiting():  # else all of it is sent, and only the process's end was not seen yet
                self.say(f"not uploaded yet: {', '.join(waiting)}; the same command sends them.")
        self.process = None

    def finish(self):
        """Send the finished model and what waits; returns why that failed and the command that repeats it, or None."""
        more = ["--checkpoints"] * self.each_save
        while self.process is not None:
            self.process.wait()
            self._hear()
        process = self._popen(*more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = process.communicate()[0].decode(errors="replace").splitlines()
        if process.returncode == 0:
            shutil.rmtree(self.unsent, ignore_errors=True)
            self.say(f"published: {self.repository.address}")
            return None
        command = shlex.join(["python", "hub/publish.py", *self.command(*more)])
        sentence = f"saved, NOT uploaded: {reason(lines, process.returncode)}; then: {command}"
        self.say(sentence)
        return sentence


def reason(lines, status):
    """Why publish.py failed, from the last line that it wrote."""
    last = next((line for line in reversed(lines) if line.startswith("publish.py: error: ")), None)
    if last is None:
        return f"hub/publish.py ended with status {status}"
    return last.removeprefix("publish.py: error: ").split(" NOT uploaded: ")[-1].split("; then: ")[0].rstrip(".")
