"""What a run will cost and whether it can work, before it starts.

    python plan.py args.json [gpus=4 gpu=L4 price_per_gpu_hour=0.80 key=value ...] [json=true]
    python plan.py args.json gpus=4 gpu=L4 claims=claims.json
    python plan.py budget_flops=1e20 | budget_gpu_hours=100 gpu=L4 | tokens=10e9 [write=args.json]

Needs no GPU, no text, and nothing of the Hub but a config. Without gpu=..., the plan is for this machine's CPU,
whose rate is measured.
"""

import json
import runpy
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from types import SimpleNamespace

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parent / "in_place.py"))

from smolpretrain import ds_configs
from smolpretrain.core import precision, status
from smolpretrain.core.architectures import plain_config
from smolpretrain.core.files import write_json
from smolpretrain.core.text import one_line
from smolpretrain.core.words import parse_args, read_json
from smolpretrain.planning import assemble, contradictions, counting, hardware, laws, report, scaling

BUDGETS = ("budget_flops", "budget_gpu_hours", "tokens")


@dataclass
class PlanArguments:
    """For what devices, and at what price."""

    gpu: str | None = field(default=None, metadata={"help": f"{', '.join(hardware.NAMES)}, or cpu: measured here."})
    gpus: int = field(default=1, metadata={"help": "Devices in all."})
    nodes: int = field(default=1, metadata={"help": "Machines they stand in."})
    network_gbit_per_second: float = field(default=100.0, metadata={"help": "Of a machine to others, each way."})
    mfu: float | None = field(
        default=None, metadata={"help": "Share of the dense bf16 peak; default: published runs'."}
    )
    price_per_gpu_hour: float | None = field(default=None, metadata={"help": "In any currency."})
    hours: float | None = field(default=None, metadata={"help": "Hours the run may take: held against the peak."})
    suggest: bool = field(default=False, metadata={"help": "The largest micro-batch, and the accumulation with it."})
    scaling: bool = field(default=False, metadata={"help": "Traffic and tokens a second on 1 to 64 such machines."})
    json: bool = field(default=False, metadata={"help": "Print the plan as JSON."})
    claims: str | None = field(default=None, metadata={"help": "A JSON file: hold a report's claims to arithmetic."})
    budget_flops: float | None = field(default=None, metadata={"help": "Advise on a run of so many FLOPs, or"})
    budget_gpu_hours: float | None = field(default=None, metadata={"help": "of so many hours of gpu, or"})
    tokens: float | None = field(default=None, metadata={"help": "whose optimum sees so many tokens."})
    write: str | None = field(default=None, metadata={"help": "With a budget: write its optimum's arguments there."})

    def __post_init__(self):
        for name in ("gpus", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.gpus % self.nodes:
            raise ValueError(f"gpus = {self.gpus} cannot be shared out over nodes = {self.nodes} evenly.")
        for name in ("mfu", "price_per_gpu_hour", "hours", "network_gbit_per_second"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"mfu = {self.mfu} is a share of the peak: at most 1, e.g. mfu=0.4.")
        if self.gpu is not None and self.gpu != "cpu":
            hardware.find(self.gpu)
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are two budgets: keep one.")
        if self.write and not given:
            raise ValueError(f"write = {self.write} goes with a budget: give one of {', '.join(BUDGETS)}.")


def run_arguments():
    """The classes of arguments.py; of the training's only the fields, since making one sets up devices and DeepSpeed.

    Imported here because transformers, and with it torch, comes along (1 s).
    """
    from typing import get_type_hints

    from smolpretrain import arguments, limits

    hints = get_type_hints(arguments.PretrainArguments)
    training = []
    for each in fields(arguments.PretrainArguments):
        if each.init:
            default = {"default": each.default} if each.default is not MISSING else {}
            default |= {"default_factory": each.default_factory} if each.default_factory is not MISSING else {}
            training.append((each.name, hints[each.name], field(**default, metadata=each.metadata)))
    checks = {"__post_init__": limits.check_values}
    fields_alone = make_dataclass("TrainingFields", training, namespace=checks)
    return arguments.ModelArguments, arguments.DataArguments, fields_alone


def parse(argv):
    """(values by name, PlanArguments) of the words of a command line.

    Raises:
        ValueError: As parse_args.
    """
    *parsed, plan_args = parse_args(argv, (*run_arguments(), PlanArguments))
    values = {each.name: getattr(part, each.name) for part in parsed for each in fields(part)}
    if values["bf16"] is None:
        values["bf16"] = plan_args.gpu not in (None, "cpu") or precision.computes_bf16("cpu")
    return values, plan_args


def deepspeed_config(values, ranks):
    """(the DeepSpeed JSON's content or None, lines that say where it contradicts the arguments)."""
    asked = values["deepspeed"]
    if asked is None or (isinstance(asked, str) and asked.lower() in ("", "none", "null")):
        return None, []
    path = ds_configs.find(asked) if isinstance(asked, str) else asked
    lines = []
    try:
        ds_configs.check(SimpleNamespace(**values | {"deepspeed": path, "use_cpu": False}), ranks)
    except ValueError as error:
        lines = [str(error)]
    return read_json(path) if isinstance(path, str) else path, lines


def device_of(plan_args):
    """The hardware.Device of one rank."""
    if plan_args.gpu in (None, "cpu"):
        return hardware.shared(hardware.measure_cpu(), plan_args.gpus // plan_args.nodes)
    return hardware.find(plan_args.gpu)


def plan_of(values, plan_args):
    """(plan, device, config) of parsed arguments."""
    device = device_of(plan_args)
    config = plain_config(values["model_name"], values["config_overrides"])
    content, lines = deepspeed_config(values, plan_args.gpus)
    plan = assemble.make(
        config, values, device, ranks=plan_args.gpus, nodes=plan_args.nodes, extra=asdict(plan_args), deepspeed=content,
        local=plan_args.gpu is None,
    )  # fmt: skip
    plan["contradictions"] = lines + plan["contradictions"]
    return plan, device, config


def budget_flops(plan_args):
    """FLOPs of the budget that was given, in one of its three forms."""
    if plan_args.budget_flops is not None:
        return plan_args.budget_flops
    if plan_args.tokens is not None:
        return laws.flops_for_tokens(plan_args.tokens)
    device = device_of(plan_args)
    mfu = plan_args.mfu or hardware.default_mfu(device)[1]
    return plan_args.budget_gpu_hours * 3600 * device.peak_flops * mfu


def advise(plan_args):
    """Print or write what a budget buys."""
    flops = budget_flops(plan_args)
    if not 1e12 <= flops <= 1e27:
        raise ValueError(f"{flops:.3g} FLOPs are outside what the laws were fitted for (1e12 to 1e27 are answered).")
    advice = scaling.advise(flops)
    print(json.dumps(advice, indent=2) if plan_args.json else "\n".join(scaling.lines(advice)))
    if plan_args.write:
        if Path(plan_args.write).exists():
            raise ValueError(f"write = {plan_args.write}: the file exists. Name another, or remove it.")
        write_json(plan_args.write, advice["arguments"])
        print(f"written: {plan_args.write}. python plan.py {plan_args.write} says what it costs.", file=sys.stderr)


def print_help():
    """The docstring, and the keys beside those of run_pretrain.py."""
    print(__doc__)
    print("keys beside those of run_pretrain.py, each as key=value, --key value or --key=value:")
    for each in fields(PlanArguments):
        print(f"  {each.name}={json.dumps(each.default)}\n      {each.metadata['help']}")


def main(argv=None):
    """Print the plan, the audit or the advice; exit status 2 and one line for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        return print_help()
    try:
        if any(word.removeprefix("--").partition("=")[0] in BUDGETS for word in argv):
            return advise(*parse_args(argv, (PlanArguments,)))
        values, plan_args = parse(argv)
        plan, device, config = plan_of(values, plan_args)
        if plan_args.claims:
            compute = counting.flops(config, values["block_size"])
            claimed = read_json(plan_args.claims)
            plan["claims"] = contradictions.claims(claimed, plan, compute, device, plan_args.gpus)
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(status.BAD_INPUT)
    if plan_args.json:
        print(json.dumps(plan, indent=2))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 120)
        report.show(plan, console)
        for line in plan.get("claims", ()):
            console.print(f"claim: {line}", style="bold red", highlight=False, soft_wrap=True)
        if plan.get("claims") == []:
            console.print("The claims agree with arithmetic.")
    return None


if __name__ == "__main__":
    main()
