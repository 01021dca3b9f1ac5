"""The plan in words: a few lines for the start of a run, tables for plan.py."""

from . import laws

GIB = 2**30
_PARTS = {
    "weights": "weights",
    "master": "fp32 master weights",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "gradients_fp32": "fp32 gradients",
    "buckets": "DeepSpeed's buckets",
    "activations": "activations",
    "loss": "logits and loss",
    "step": "the step's copies",
    "gathered": "weights gathered",
    "runtime": "libraries and data",
}


def size(count):
    """12,345,678 as 12.3M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:,.0f}"


def duration(hours):
    """Hours as seconds, minutes, hours or days, whichever reads best."""
    for unit, name in ((24, "d"), (1, "h"), (1 / 60, "min")):
        if hours >= 2 * unit:
            return f"{hours / unit:.1f} {name}"
    return f"{hours * 3600:.0f} s"


def lines(plan):
    """The plan in few lines, as a run prints it at its start."""
    model, data, memory, time = plan["model"], plan["data"], plan["memory"], plan["time"]
    tokens = f"plan: {size(model['total'])} parameters, {data['tokens_a_step']:,} tokens a step"
    if data["steps"]:
        tokens += f" x {data['steps']:,} steps = {size(data['tokens'])} tokens, {data['tokens_per_parameter']:.2g} a "
        tokens += f"parameter, {plan['compute']['flops']:.2e} FLOPs"
    if data["epochs"] is not None:
        tokens += f", {data['epochs']:.2g} epochs"
    fits = {True: "fits", False: "DOES NOT FIT", None: "unknown"}[memory["fits"]]
    room = f" of {memory['device_bytes'] / GIB:.1f}" if memory["device_bytes"] else ""
    bytes_ = f"plan: {memory['total_bytes'] / GIB:.2f}{room} GiB a device ({fits}), "
    bytes_ += f"{memory['checkpoint_bytes'] / 1e9:.2f} GB a checkpoint"
    if time["hours"] is not None:
        bytes_ += f"; {duration(time['hours'])} at {time['mfu']:.0%} of the peak of {plan['devices']['ranks']} x "
        bytes_ += plan["devices"]["name"]
    said = [f"{tokens}.", f"{bytes_}."]
    if memory["nearest_change"]:
        said.append(f"plan: fits with {memory['nearest_change']['change']}.")
    return said + [f"plan: {line}" for line in plan["contradictions"]]


def show(plan, console):
    """The whole plan on a rich console."""
    from rich.table import Table

    for title, rows in _tables(plan):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 2))
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(style="dim", overflow="fold")
        for row in rows:
            table.add_row(*row, *[""] * (3 - len(row)))
        console.print(table)
        console.print()
    if "scaling" in plan:
        console.print(_machines(plan["scaling"]))
        console.print()
    for line in plan["contradictions"]:
        console.print(f"! {line}", style="bold red", highlight=False, soft_wrap=True)
    if not plan["contradictions"]:
        console.print("Nothing contradicts itself.")


def _machines(rows):
    """Machines against traffic and rate, from sending after computing to sending behind it."""
    from rich.table import Table

    table = Table(title="Machines, each rank with the rows it has here", title_justify="left", box=None, padding=(0, 2))
    for name in ("machines", "ranks", "tokens a step", "sent a rank", "computing", "sending", "tokens/s", "efficiency"):
        table.add_column(name, justify="right")
    for row in rows:
        (low, high), (least, most) = row["tokens_per_second"], row["efficiency"]
        table.add_row(
            f"{row['nodes']}", f"{row['ranks']:,}", f"{row['tokens_a_step']:,}", f"{row['sent_bytes'] / 1e9:,.2f} GB",
            f"{row['computing_seconds']:.3g} s", f"{row['sending_seconds']:.3g} s", f"{size(low)} to {size(high)}",
            f"{least:.0%} to {most:.0%}",
        )  # fmt: skip
    return table


def _tables(plan):
    yield "Model", _model_rows(plan["model"])
    yield "Tokens", _token_rows(plan)
    yield f"Memory of one {plan['devices']['name']}", _memory_rows(plan["memory"])
    yield "Time", _time_rows(plan)


def _model_rows(model):
    yield "parameters", f"{model['total']:,}", f"{model['name']} ({model['type']})"
    yield "without embeddings", f"{model['non_embedding']:,}"
    if model["active"] != model["total"]:
        yield "active for a token", f"{model['active']:,}"
    for part, count in model["parts"].items():
        yield f"  {part}", f"{count:,}", f"{count / model['total']:.1%}"


def _token_rows(plan):
    data, compute = plan["data"], plan["compute"]
    yield "tokens a step", f"{data['tokens_a_step']:,}", f"{data['rows_a_step']:,} rows"
    if data["steps"] is None:
        yield "steps", "unknown", "set max_steps, or prepare the text first (data/prepare.py)"
    else:
        yield "steps", f"{data['steps']:,}", "optimizer updates"
        yield "tokens", f"{data['tokens']:,}"
        twenty = f"compute-optimal is about {laws.TOKENS_PER_PARAMETER} (Hoffmann et al. 2022, table 3)"
        yield "tokens a parameter", f"{data['tokens_per_parameter']:.3g}", twenty
    if data["epochs"] is not None:
        yield "epochs", f"{data['epochs']:.3g}", f"over {data['prepared_tokens']:,} prepared tokens"
    share = f"6 a parameter that multiplies, and attention, {compute['attention_share']:.0%}"
    yield "FLOPs a token", f"{compute['flops_per_token']:.3e}", share
    if compute["recompute_per_token"]:
        yield "  recomputed", f"{compute['recompute_per_token']:.3e}", "checkpointing's second forward, outside MFU"
    if compute["flops"]:
        yield "FLOPs", f"{compute['flops']:.3e}"


def _memory_rows(memory):
    for part, count in memory["parts"].items():
        yield f"  {_PARTS[part]}", f"{count / GIB:.2f} GiB"
    room = memory["device_bytes"]
    verdict = "" if not room else f"of {room / GIB:.1f} GiB: {'fits' if memory['fits'] else 'DOES NOT FIT'}"
    yield "at the fullest moment", f"{memory['total_bytes'] / GIB:.2f} GiB", f"{memory['fullest_moment']}; {verdict}"
    if memory["fits"] is False:
        change = memory["nearest_change"]
        if change:
            yield "nearest that fits", f"{change['total_bytes'] / GIB:.2f} GiB", change["change"]
        else:
            yield "nearest that fits", "none", "a smaller model or block_size, or more memory"
    if suggestion := memory.get("suggestion"):
        words = " ".join(f"{key}={suggestion[key]}" for key in suggestion if key != "total_bytes")
        yield "largest micro-batch", f"{suggestion['total_bytes'] / GIB:.2f} GiB", words
    yield "checkpoint on disk", f"{memory['checkpoint_bytes'] / 1e9:.2f} GB", "all ranks"


def _time_rows(plan):
    time, devices = plan["time"], plan["devices"]
    yield "devices", f"{devices['ranks']} x {devices['name']}", devices["source"]
    yield "MFU", f"{time['mfu']:.1%}", time["mfu_source"]
    if time["tokens_per_second"] is None:
        yield "time", "unknown", "the device's peak is unknown"
        return
    yield "tokens a second", f"{time['tokens_per_second']:,.0f}"
    yield "seconds a step", f"{time['seconds_a_step']:.3g}", f"{time['network_seconds_a_step']:.2g} s to send gradients"
    if time["hours"] is None:
        billion = 1e9 / time["tokens_per_second"] / 3600
        yield "time", "unknown", f"without the number of steps; a billion tokens take {duration(billion)}"
        return
    low, high = time["hours_range"]
    spread = f"{duration(low)} to {duration(high)} over the range of MFU" if high > low else ""
    yield "time", duration(time["hours"]), f"{spread}{' (limited by the network)' * (time['limited_by'] == 'network')}"
    yield "device hours", f"{time['gpu_hours']:,.1f}"
    if time["money"] is not None:
        yield "money", f"{time['money']:,.2f}", "in the currency of price_per_gpu_hour"
    if time["kilowatt_hours"] is not None:
        yield "energy", f"{time['kilowatt_hours']:,.1f} kWh", "at full board power, without the host"
