"""The plan of a run: one dictionary of plain values from a config, the arguments and the devices."""

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from . import contradictions, cost, counting, cpu, hardware, machines, memory


def make(config, values, device, *, ranks=1, nodes=1, extra=None, deepspeed=None, local=False):
    """Count, weigh, time and check a run.

    Args:
        config: The model's config as a dict.
        values: Arguments by name, as arguments.py has them.
        device: hardware.Device of each rank.
        ranks, nodes: Devices in all, and the machines they stand in.
        extra: {mfu, price_per_gpu_hour, hours, network_gbit_per_second, suggest, scaling}, any of them.
        deepspeed: The DeepSpeed JSON's content, or None.
        local: Whether the run is for this machine, whose free disk then counts.

    Returns:
        {model, data, devices, compute, memory, time, contradictions} of JSON values; scaling too where asked.
    """
    extra = extra or {}
    setup = set_up(config, values, deepspeed, ranks, cuda=device.name != "cpu", gpu_bytes=device.memory_bytes)
    counted, flops = counting.count(config), counting.flops(config, values["block_size"])
    plan = {
        "model": _model(config, values, counted),
        "data": _data(values, setup, counted.total),
        "devices": {"name": device.name, "ranks": ranks, "nodes": nodes, "peak_flops": device.peak_flops},
    }
    plan["devices"]["source"] = device.source
    plan["compute"] = _compute(plan, flops, setup)
    plan["memory"] = _memory(setup, device, extra.get("suggest"))
    utilization, gigabits = _utilization(setup, device, flops, extra.get("mfu")), extra.get("network_gbit_per_second")
    network = gigabits * 1e9 / 8 if gigabits else None
    plan["time"] = _time(plan, flops, setup, device, utilization, nodes, network, extra.get("price_per_gpu_hour"))
    if extra.get("scaling"):
        plan["scaling"] = machines.scale(setup, device, utilization, ranks // nodes, network)
    free = _free_disk(values["output_dir"]) if local else None
    plan["contradictions"] = [
        *contradictions.steps_and_data(plan, values),
        *contradictions.learning_rate(plan, values),
        *contradictions.disk(plan, values, free),
    ]
    if extra.get("hours") and plan["compute"]["flops"]:
        needed = {"of model FLOPs": plan["compute"]["flops"]}
        if setup.checkpointing:
            needed["with recomputed activations"] = plan["compute"]["flops_with_recompute"]
        plan["contradictions"] += contradictions.beyond_peak(needed, extra["hours"], device, ranks)
    return plan


def set_up(config, values, deepspeed, ranks, cuda, gpu_bytes=None):
    """memory.Setup of the arguments; numbers that the DeepSpeed JSON leaves to "auto" are Trainer's."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    hidden = config["hidden_size"]

    def number(key, automatic, default):
        value = zero.get(key, default)
        return automatic if value == "auto" else int(value)

    chunk = values.get("loss_chunk_tokens")
    stage = zero.get("stage") if deepspeed is not None else None
    plain = chunk == 0 or stage == 3
    attention = values["attn_implementation"]
    if attention == "auto":
        attention = "varlen" if cuda else "sdpa"  # as training/attention.py, where torch is recent
    return memory.Setup(
        config=config,
        block_size=values["block_size"],
        micro_batch=values["per_device_train_batch_size"],
        accumulation=values["gradient_accumulation_steps"],
        ranks=ranks,
        stage=stage,
        offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        bucket=number("reduce_bucket_size", hidden * hidden, 500_000_000),
        overlap=bool(zero.get("overlap_comm", False)),
        persistent=number("stage3_param_persistence_threshold", 10 * hidden, 100_000),
        optim=getattr(values["optim"], "value", values["optim"]),
        bf16=values["bf16"],
        checkpointing=checkpoints(values),
        attention=attention,
        packed=values["intra_document_masking"],
        loss="liger" if values.get("use_liger_kernel") else "plain" if plain else "chunked",
        chunk=chunk or (memory.gpu_chunk(config["vocab_size"], gpu_bytes) if cuda and gpu_bytes else None),
        cuda=cuda,
        gradient_bytes=gradient_bytes(values, deepspeed),
        all_reduce=zero.get("use_multi_rank_bucket_allreduce", True) or not zero.get("reduce_scatter", True),
        reuse=int(zero.get("stage3_max_reuse_distance", 10**9)),
    )


def gradient_bytes(values, deepspeed):
    """Of a gradient between ranks: float32 under DDP, under ZeRO the compute dtype, unless either says otherwise.

    PowerSGD counts as what it sends in its first tenth.
    """
    asked = values.get("gradient_compression", "none")
    computed = "bf16" if deepspeed is not None and values["bf16"] else "fp32"
    sent = (deepspeed or {}).get("communication_data_type") or (computed if asked == "none" else asked)
    return 2 if sent.lower() in ("bf16", "fp16") else 4


def checkpoints(values):
    """Whether activations are checkpointed: on unless either of its names says otherwise."""
    said = [values.get(name) for name in ("activation_checkpointing", "gradient_checkpointing")]
    return any(said) or said == [None, None]


def _model(config, values, counted):
    return {
        "name": values["model_name"],
        "type": config["model_type"],
        "total": counted.total,
        "non_embedding": counted.non_embedding,
        "active": counted.active,
        "parts": counted.parts,
        "positions": config.get("max_position_embeddings"),
    }


def _data(values, setup, parameters):
    """Tokens a step and in all, steps, epochs; None where neither max_steps nor a prepared set says how many."""
    rows_a_step = setup.micro_batch * setup.accumulation * setup.ranks
    rows = _prepared_rows(values)
    steps = values["max_steps"] if values["max_steps"] > 0 else None
    if steps is None and rows:
        steps = max(1, int(rows // rows_a_step * values["num_train_epochs"]))
    tokens_a_step = rows_a_step * values["block_size"]
    tokens = steps * tokens_a_step if steps else None
    return {
        "rows_a_step": rows_a_step,
        "tokens_a_step": tokens_a_step,
        "steps": steps,
        "tokens": tokens,
        "prepared_tokens": rows * values["block_size"] if rows else None,
        "epochs": steps * rows_a_step / rows if rows and steps else None,
        "tokens_per_parameter": tokens / parameters if tokens else None,
    }


def _prepared_rows(values):
    """Training rows of the prepared set, or None where there is none yet or it has rows of another length."""
    if values.get("rows"):  # a run knows
        return values["rows"]
    directory = values.get("prepared_dir") or Path(values["output_dir"], "prepared")
    try:
        manifest = json.loads(Path(directory, "manifest.json").read_text(encoding="utf-8"))
        return manifest["splits"]["train"]["blocks"] if manifest["block_size"] == values["block_size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _compute(plan, flops, setup):
    tokens = plan["data"]["tokens"]
    recompute = flops.recompute if setup.checkpointing else 0
    return {
        "flops_per_token": flops.model,
        "attention_share": flops.attention / flops.model,
        "checkpointing": setup.checkpointing,
        "recompute_per_token": recompute,
        "flops": tokens * flops.model if tokens else None,
        "flops_with_recompute": tokens * (flops.model + recompute) if tokens else None,
    }


def _memory(setup, device, suggest):
    """Parts, sum, whether it fits, the nearest change that does, the largest micro-batch."""
    parts = memory.peak(setup)
    moment = parts.pop("moment")
    total, room = sum(parts.values()), device.memory_bytes
    found = {
        "parts": parts,
        "fullest_moment": moment,
        "total_bytes": total,
        "device_bytes": room or None,
        "fits": total <= room if room else None,
        "nearest_change": None,
        "checkpoint_bytes": memory.checkpoint_bytes(setup),
    }
    if found["fits"] is False:
        found["nearest_change"] = nearest_change(setup, room)
    if suggest:
        found["suggestion"] = largest_micro_batch(setup, room)
    return found


def _total(setup):
    return sum(size for part, size in memory.peak(setup).items() if part != "moment")


def nearest_change(setup, room):
    """The fewest changes, the gentlest first, that make it fit; None where all together do not."""
    rows = setup.micro_batch * setup.accumulation
    changes = {}
    if setup.loss == "plain" and setup.stage != 3:
        changes["loss_chunk_tokens=null"] = {"loss": "chunked"}
    for smaller in (s for s in range(setup.micro_batch - 1, 0, -1) if rows % s == 0):
        changes[f"per_device_train_batch_size={smaller} gradient_accumulation_steps={rows // smaller}"] = {
            "micro_batch": smaller,
            "accumulation": rows // smaller,
        }
    if not setup.checkpointing:
        changes["activation_checkpointing=true"] = {"checkpointing": True}
    if setup.stage is not None and memory.OPTIMIZERS.get(setup.optim, (2, 8))[1] == 32:
        changes["optim=adamw_bnb_8bit"] = {"optim": "adamw_bnb_8bit"}
    if setup.stage in (1, 2) and setup.bucket > 50_000_000:
        changes['"reduce_bucket_size": 5e7 in the DeepSpeed JSON'] = {"bucket": 50_000_000}
    for stage in range((setup.stage if setup.stage is not None else -1) + 1, 4):
        if setup.ranks > 1 and stage:
            changes[f"deepspeed=ds_configs/zero{stage}.json"] = {"stage": stage} | (
                {"loss": "plain"} if stage == 3 else {}
            )
    if not setup.offload and setup.stage in (1, 2):
        changes["deepspeed=ds_configs/zero2_offload.json"] = {"offload": True, "stage": 2}
    for number in range(1, 5):
        for names in combinations(changes, number):
            fields = [set(changes[name]) for name in names]
            merged = {key: value for name in names for key, value in changes[name].items()}
            if sum(map(len, fields)) == len(merged) and _total(changed := replace(setup, **merged)) <= room:
                return {"change": " ".join(names), "total_bytes": _total(changed)}
    return None


def largest_micro_batch(setup, room):
    """The largest micro-batch that fits with the accumulation that keeps the rows a step, or None."""
    rows = setup.micro_batch * setup.accumulation
    for micro in (m for m in range(rows, 0, -1) if rows % m == 0):
        changed = replace(setup, micro_batch=micro, accumulation=rows // micro)
        if _total(changed) <= room:
            words = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
            return words | {"total_bytes": _total(changed)}
    return None


def _utilization(setup, device, flops, asked):
    """(lowest, taken, highest, source) of the model FLOPs utilization."""
    if asked:
        return asked, asked, asked, "as asked"
    if device.name == "cpu":
        return cpu.utilization(setup.config, setup)
    ours = None
    if setup.ranks == 1:
        weights, zero = counting.count(setup.config).total, setup.stage is not None
        ours = hardware.measured_mfu(device, weights, zero)
    return cost.known_mfu(device, flops, setup.checkpointing, ours)


def _time(plan, flops, setup, device, utilization, nodes, network, price):
    found = cost.estimate(
        flops,
        plan["data"]["tokens_a_step"],
        plan["data"]["steps"],
        device,
        setup.ranks,
        utilization,
        nodes=nodes,
        sent=cost.traffic(setup, plan["model"]["total"], setup.ranks),
        network=network,
    )
    return found | cost.money_and_energy(found["hours"], setup.ranks, device, price)


def _free_disk(directory):
    path = Path(directory).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
