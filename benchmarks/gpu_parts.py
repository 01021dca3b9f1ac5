"""What benchmarks/gpu.py runs beside the product, each in a process of its own: bare loops, kernels alone, resume."""

import fcntl
import json
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = [
    *("eval_strategy=no", "max_eval_documents=1", "activation_checkpointing=false", "logging_steps=2"),
    *("save_strategy=no", "sample_steps=0", "disable_tqdm=true", "warmup_steps=2", "resume=never"),
]
PLAIN = ["deepspeed=null", "optim=adamw_torch_fused"]
WAIT, LOCK = 4, "lock"  # steps before the lock: by then everything is compiled


def tell(out, **row):
    """Add a row to OUT/gpu.jsonl."""
    with open(out / "gpu.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def turn(out):
    """Wait for the GPU; the file's end gives it back."""
    file = open(out / LOCK, "w")  # noqa: SIM115 (held until the run has ended)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def admit(out, name):
    """Wait until the parent finds room in the GPU's memory for this job."""
    (out / f"want {name}").touch()
    while not (out / f"go {name}").exists():
        time.sleep(0.05)


# Bare loops


def bare(out, name, model_name, rows, words, steps, prepared_dir):
    """The same model and rows in a loop and nothing else: autocast, compiled, fused AdamW, clipped."""
    import torch

    from smolpretrain.core.architectures import load_config
    from smolpretrain.data.collator import PackedCollator
    from smolpretrain.data.prepared import load_blocks
    from smolpretrain.training import compiling
    from smolpretrain.training.model import random_model

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    collator = PackedCollator(0, cu_seq_lens=True)
    blocks = load_blocks(prepared_dir, "train")
    config = load_config(model_name, {"vocab_size": 49152})
    model = random_model(config, 42, words[0] if cuda else "sdpa").train()
    admit(out, name)
    model.to(device)
    model.config.use_cache = False
    compiling.half_stream(model)
    if cuda:
        compiling.compile_layers(model) if "layers" in words else model.model.compile()

    def own(hidden, weight, targets):
        logits = torch.nn.functional.linear(hidden, weight).float()
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)

    criterion = torch.compile(own) if cuda else own
    batches = []
    for start in range(4):
        batch = collator([blocks[(start * rows + row) % len(blocks)] for row in range(rows)])
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        labels = batch.pop("labels")
        targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        compiling.mark_lengths(batch)
        batches.append((batch, targets))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(number):
        batch, targets = batches[number % 4]
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(**batch, use_cache=False).last_hidden_state
            loss = criterion(hidden.flatten(0, 1), model.lm_head.weight, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for number in range(WAIT):
        step(number)
    held, each = turn(out), []
    if cuda:
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps - WAIT)]
        for number, event in enumerate(events):
            loss = step(number)
            event.record()
        torch.cuda.synchronize()
        each = [a.elapsed_time(b) for a, b in pairwise(events)]
    else:
        for number in range(2):
            began = time.time()
            loss = step(number)
            each.append((time.time() - began) * 1e3)
    held.close()
    length, count = len(blocks[0]["input_ids"]), sum(p.numel() for p in model.parameters())
    flops = 6 * count + 12 * config.num_hidden_layers * config.hidden_size * length
    rate = rows * length / statistics.median(each) * 1e3
    tell(out, name=name, tokens_per_second=rate, milliseconds=each, mfu=rate * flops / 989e12, losses=[loss.item()],
         peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else None)  # fmt: skip


# Kernels alone


def kernels(out, prepared_dir):
    """Isolation with the real kernels, and how long attention alone takes at 135M and 1.7B, forward and backward."""
    import torch

    from smolpretrain.core.architectures import load_config
    from smolpretrain.data.collator import PackedCollator
    from smolpretrain.data.prepared import load_blocks
    from smolpretrain.training import attention
    from smolpretrain.training.model import random_model

    if not torch.cuda.is_available():
        return
    blocks, collator = load_blocks(prepared_dir, "train"), PackedCollator(0, cu_seq_lens=True)
    bounds = {
        "max_length_q": 2048,
        "cu_seq_lens_q": collator([blocks[row] for row in range(16)])["cu_seq_lens_q"].cuda(),
    }

    def causal(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def varlen(query, key, value):
        return attention.varlen(None, query, key, value, None, **bounds)[0]

    held = turn(out)
    for heads, kv in ((9, 3), (32, 32)):
        shapes = [(16, count, 2048, 64) for count in (heads, kv, kv)]
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        for kernel in (varlen, causal):
            times = []
            for _ in range(8):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                kernel(*inputs).sum().backward()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            tell(out, attention=f"{heads} heads, 16 rows, {kernel.__name__}", milliseconds=statistics.median(times[3:]))
    held.close()
    given = collator([blocks[0], blocks[1]])
    given.pop("labels")
    given = {key: value.cuda() if torch.is_tensor(value) else value for key, value in given.items()}
    first = given["position_ids"][0].diff().lt(0).nonzero()[0].item() + 1  # the first document's tokens
    changed = given["input_ids"].clone()
    changed[0, : first - 1] = changed[0, : first - 1] % 1000 + 1
    for kind in ("varlen", "sdpa", "flex_attention"):
        model = random_model(load_config("smollm2-135m", {"num_hidden_layers": 2}), 0, kind).cuda().eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits = [
                model(**given | {"input_ids": i}, use_cache=False).logits.float() for i in (given["input_ids"], changed)
            ]
        moved = (logits[0] - logits[1]).abs()
        others = max(moved[0, first:].max().item(), moved[1].max().item())
        tell(out, isolation=kind, others=others, own=moved[0, :first].max().item())


# SIGKILL and resume


def resume(out, prepared_dir, exact):
    """A run of 24 steps, and one killed after its checkpoint at 6 that goes on: are their weights the same bits?"""
    label, shape = "exact" if exact else "fast", {"vocab_size": 49152, "max_position_embeddings": 2048}
    command = [sys.executable, str(ROOT / "run_pretrain.py"), "model_name=smollm2-1m", "block_size=2048",
               f"config_overrides={json.dumps(shape)}", f"prepared_dir={prepared_dir}", *PLAIN, "max_steps=24",
               f"tokenizer_name={prepared_dir}/tokenizer", "per_device_train_batch_size=2",
               f"full_determinism={str(exact).lower()}",
               *(word for word in SHARED if word.split("=")[0] not in ("save_strategy", "resume"))]  # fmt: skip
    log = open(out / f"resume {label}.log", "w")  # noqa: SIM115
    straight, killed = out / f"straight {label}", out / f"killed {label}"
    first = subprocess.Popen([*command, "save_steps=6", f"output_dir={straight}"], stdout=log, stderr=log)
    second = subprocess.Popen([*command, "save_steps=6", f"output_dir={killed}"], stdout=log, stderr=log)
    while second.poll() is None and not (killed / "checkpoint-6" / "manifest.json").exists():
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    whole = sorted(path.parent.name for path in killed.glob("checkpoint-*/manifest.json"))
    status = [second.wait(), first.wait()]
    status.append(
        subprocess.run(
            [*command, "save_steps=6", f"output_dir={killed}"], stdout=log, stderr=log, check=False
        ).returncode
    )
    from safetensors.torch import load_file

    a, b = (load_file(path / "checkpoint-24" / "model.safetensors") for path in (straight, killed))
    differ = max((x.float() - b[name].float()).abs().max().item() for name, x in a.items())
    losses = [
        [json.loads(line).get("loss") for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (straight, killed)
    ]
    tell(
        out,
        resume=label,
        statuses=status,
        killed_with=whole,
        same_bits=differ == 0,
        largest_difference=differ,
        last_losses=[part[-2:] for part in losses],
    )
