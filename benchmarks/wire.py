"""What ranks of run_pretrain.py send and take, each in a network namespace of its own: what other commands here call.

A bridge joins the namespaces' veth pairs; tc's token bucket (tbf) bounds what each sends, and the bound may change
between steps. gloo and TCP see a machine a rank; DeepSpeed's shared memory, which one machine's ranks have, is off.
Needs Linux, iproute2, and root or the right to make namespaces (`refusal`); nothing is left of it on the machine.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNSHARE = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else [])]
PATIENCE_SECONDS = 1800  # for a run
WARM, SETTLE = 4, 2  # steps left out: of the run, and after another bound
WORDS = ["model_name=smollm2-1m", "tokenizer_name=train", "validation_fraction=0", "eval_strategy=no",
         "save_strategy=no", "sample_steps=0", "disable_tqdm=true", "logging_steps=1", "resume=never",
         "activation_checkpointing=false"]  # fmt: skip


def refusal():
    """Why no namespace with a bounded link can be made here, in a sentence; None where it can."""
    if missing := [name for name in ("unshare", "nsenter", "ip", "tc") if shutil.which(name) is None]:
        return f"Network namespaces need {', '.join(missing)} (Linux: util-linux, iproute2)."
    tried = "ip link add name a type veth peer name b && tc qdisc add dev a root tbf rate 1mbit burst 64k limit 1mb"
    tried += " && ip link add name c type bridge && unshare --net true"
    done = subprocess.run([*UNSHARE, "sh", "-c", tried], capture_output=True, text=True)
    why = " ".join(done.stderr.split())
    return f"Network namespaces need root (CAP_NET_ADMIN, CAP_SYS_ADMIN): {why}." if done.returncode else None


def machine(command):
    """Name this machine's cores for a table's head; leave with a sentence where it makes no namespaces."""
    if why := refusal():
        sys.exit(f"{command}: error: {why}")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in cpuinfo if line.startswith("model name")), "an unknown CPU")
    return f"{os.cpu_count()} cores of {cpu}"


def measure(words, ranks, rates=(None,), steps=8):
    """Train on so many ranks, `steps` measured steps at each bound.

    Args:
        words: key=value of run_pretrain.py beside WORDS; max_steps is set here.
        rates: Bits a second that a rank may send, None without a bound.

    Returns:
        [{rate, bytes, seconds, losses} for each rate]: bytes on the wire (headers and acknowledgements too) a step of
        the rank that sent most, the median seconds of a step, the losses of the steps.

    Raises:
        RuntimeError: A rank failed; its last words.
    """
    order = json.dumps({"ranks": ranks, "rates": rates, "steps": steps, "words": [*WORDS, *words]})
    done = subprocess.run([*UNSHARE, sys.executable, __file__, "hub", order], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} on {ranks} ranks: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def hub(order):
    """In a namespace of its own: the bridge, and every rank to its end; prints what `measure` returns."""
    run(["ip", "link", "add", "name", "bridge", "type", "bridge"], ["ip", "link", "set", "bridge", "up"])
    with tempfile.TemporaryDirectory() as home:
        started = []
        try:
            for rank in range(order["ranks"]):
                command = ["unshare", "--net", sys.executable, __file__, "rank", json.dumps(order | {"home": home})]
                with open(f"{home}/{rank}.log", "w") as log:
                    environment = os.environ | {
                        "RANK": str(rank), "WORLD_SIZE": str(order["ranks"]), "LOCAL_RANK": "0",
                        "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
                        "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
                    }  # fmt: skip
                    started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            end = time.monotonic() + PATIENCE_SECONDS
            while any(each.poll() is None for each in started) and not any(each.returncode for each in started):
                if time.monotonic() > end:
                    break
                time.sleep(0.2)
        finally:
            for each in started:
                each.kill()
        if failed := [rank for rank, each in enumerate(started) if each.wait()]:
            sys.exit("\n".join(f"rank {rank}: {Path(home, f'{rank}.log').read_text()[-2500:]}" for rank in failed))
        marks = [json.loads(Path(home, f"{number}.json").read_text()) for number in range(order["ranks"])]
        print(json.dumps(summary(order, marks)))


def summary(order, marks):
    """What `measure` returns, of every rank's [[time, bytes sent, loss] after each step]."""
    found, end = [], WARM
    for rate in order["rates"]:
        begin, end = end + SETTLE, end + SETTLE + order["steps"]
        times = [at for at, _, _ in marks[0][begin : end + 1]]
        found.append(
            {
                "rate": rate,
                "bytes": max((rank[end][1] - rank[begin][1]) / order["steps"] for rank in marks),
                "seconds": statistics.median(after - before for before, after in pairwise(times)),
                "losses": [loss for _, _, loss in marks[0][begin + 1 : end + 1]],
            }
        )
    return found


def run(*commands):
    for command in commands:
        subprocess.run(command, check=True)


def bound(rate):
    """Let this namespace send so many bits a second; None lifts it.

    The bucket holds several of TCP's 64 KiB segments: a smaller one cuts each of them, which cost DDP 0.1 s a step.
    """
    bucket = ["tbf", "rate", f"{rate}bit", "burst", "256kb", "limit", "4mb"] if rate else ["pfifo"]
    run(["tc", "qdisc", "replace", "dev", "eth0", "root", *bucket])


def rank(order):
    """One rank in a namespace of its own: its wire to the bridge, then the run with a look at the wire each step."""
    number, above = os.environ["RANK"], str(os.getppid())
    run(
        ["ip", "link", "set", "lo", "up"],
        ["ip", "link", "add", "name", "eth0", "type", "veth", "peer", "name", f"wire{number}", "netns", above],
        ["nsenter", "--net", "--target", above, "ip", "link", "set", f"wire{number}", "master", "bridge", "up"],
        ["ip", "address", "add", f"10.0.0.{int(number) + 1}/24", "dev", "eth0"],
        ["ip", "link", "set", "eth0", "up"],
    )
    bound(order["rates"][0])
    import deepspeed.comm.torch
    import psutil
    from transformers import TrainerCallback

    from smolpretrain import run_pretrain

    deepspeed.comm.torch.build_shm_op = lambda: None
    a_rate, make_trainer = SETTLE + order["steps"], run_pretrain.make_trainer
    changes = {WARM + place * a_rate: rate for place, rate in enumerate(order["rates"]) if place}
    marks = [[time.perf_counter(), 0, None]]

    class Wire(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in changes:
                bound(changes[state.global_step])
            sent = psutil.net_io_counters(pernic=True)["eth0"].bytes_sent
            marks.append([time.perf_counter(), sent, None])

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                marks[state.global_step][2] = logs["loss"]

        def on_train_end(self, args, state, control, **kwargs):
            Path(order["home"], f"{number}.json").write_text(json.dumps(marks))

    def watched(*args, **kwargs):
        trainer, log = make_trainer(*args, **kwargs)
        trainer.add_callback(Wire())
        return trainer, log

    run_pretrain.make_trainer = watched
    steps = WARM + a_rate * len(order["rates"])
    return run_pretrain.main([*order["words"], f"max_steps={steps}", f"output_dir={order['home']}/out"])


if __name__ == "__main__":
    sys.exit({"hub": hub, "rank": rank}[sys.argv[1]](json.loads(sys.argv[2])))
