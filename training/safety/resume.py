"""Which run a command goes on with: the newest whole checkpoint of the same run, or a clear no."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from smolpretrain.core.status import DAMAGED

from .checkpoints import MANIFEST, by_step, finished, read_manifest, step_of, verify

SAME_ON_RESUME = (
    *("seed", "data_seed", "per_device_train_batch_size", "dataloader_drop_last", "bf16", "max_grad_norm", "optim"),
    *("optim_args", "z_loss", "gradient_compression", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
FREE_ON_RESUME = (
    *("max_steps", "num_train_epochs", "logging_steps", "save_steps", "save_total_limit", "keep_every_steps"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "max_eval_samples", "sample_steps"),
    *("dataloader_num_workers", "activation_checkpointing", "ddp_timeout", "max_bad_steps", "on_spike"),
)
NOT_ARCHITECTURE = {"transformers_version", "use_cache", "_name_or_path", "dtype", "architectures"}


class Damaged(ValueError):
    """There are finished checkpoints, and not one is whole."""

    status = DAMAGED


@dataclass
class Run:
    """What a command would train, in JSON values, as the manifest of each of its checkpoints keeps it.

    Attributes:
        same: Must be as the checkpoint has it: data, architecture, optimizer, seed, batch.
        schedule: The learning rate's: may change where the user names the key.
        free: May change, and is said: length, logging, saving, evaluation.
        ranks, accumulation, micro_batches: Processes, micro-batches a step on each, and micro-batches of an epoch over
            all of them.
        fixed_ranks: Their number cannot change: ZeRO splits the optimizer over them, a stream its documents.
        versions: {package: version}.
    """

    same: dict
    schedule: dict = field(default_factory=dict)
    free: dict = field(default_factory=dict)
    ranks: int = 1
    accumulation: int = 1
    micro_batches: int = 0
    fixed_ranks: bool = False
    versions: dict = field(default_factory=dict)

    def facts(self):
        """For the manifest: everything that `choose` will hold against the next command."""
        return json.loads(json.dumps({k: v for k, v in vars(self).items() if k != "ranks"}))


@dataclass
class Choice:
    """What `choose` found: a checkpoint's path or None, what to say, and what it asks of this start."""

    checkpoint: str | None = None
    said: list[str] = field(default_factory=list)
    accumulation: int = 1
    evaluate_first: bool = False


def describe_and_choose(config, args, *, rows, same, schedule, fixed_ranks, versions):
    """(Run of this command, Choice), the same on all ranks; what the choice asks of the accumulation is in both.

    Args:
        config: The architecture.
        args: PretrainArguments.
        rows: Of the training set.
        same, schedule: What must be the same besides, and the names of the learning rate's arguments; see Run.

    Raises:
        ValueError: There is no checkpoint to go on from as asked; see `choose`.
    """
    same = {f"config {k}": v for k, v in config.to_diff_dict().items() if k not in NOT_ARCHITECTURE} | same
    same["zero stage"] = args.deepspeed and args.hf_deepspeed_config.get_value("zero_optimization.stage")
    run = Run(
        same=same | args.on_resume(SAME_ON_RESUME),
        schedule=args.on_resume(schedule),
        free=args.on_resume(FREE_ON_RESUME),
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        micro_batches=rows // args.per_device_train_batch_size,
        fixed_ranks=bool(args.deepspeed) or fixed_ranks,
        versions=versions,
    )
    asked = (args.output_dir, args.resume, args.trust_checkpoint, run, args.allow_changes or ())
    choice = choose_together(args.process_index, args.world_size, *asked)
    run.accumulation = choice.accumulation
    return run, choice


def choose_together(rank, world_size, *asked):
    """`choose` on the first rank; all ranks get its choice, or raise its error."""
    answer = [None]
    if rank == 0:
        try:
            answer = [choose(*asked)]
        except (ValueError, OSError) as error:
            answer = [error]
    if world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def choose(output_dir, resume, trust, run, allowed=()):
    """The checkpoint to go on from.

    Args:
        resume: auto (the newest whole one), never, or a checkpoint's path.
        trust: Load a path that no manifest vouches for.
        allowed: Keys of the run's schedule that may differ.

    Raises:
        Damaged: No whole one is left, or the path is damaged.
        ValueError: The path is none, the checkpoint is another run's, or never was said and there is one.
    """
    if resume == "never":
        if there := finished(output_dir):
            raise ValueError(
                f"resume = never, but output_dir = {output_dir} holds {there[0]}: name another output_dir."
            )
        return Choice(accumulation=run.accumulation)
    found, said = find_resumable(output_dir) if resume == "auto" else _named(output_dir, resume, trust)
    choice = Choice(found and str(found), said, run.accumulation)
    manifest = read_manifest(found) if found else None
    if manifest:
        check_same_run(choice, manifest, run, allowed)
        choice.evaluate_first = bool(manifest.get("evaluation_owed"))
    return choice


def _named(output_dir, resume, trust):
    """The checkpoint at a path that the user gave, or what this output_dir has made of it since."""
    found = Path(resume).expanduser()
    if not found.is_dir():
        raise ValueError(f"resume = {resume} is not auto, never or a directory.")
    if not (found / "trainer_state.json").is_file() and not (found / MANIFEST).is_file():
        instead = (
            f"init_from={resume} starts a run from its weights" if (found / "config.json").is_file() else "look again"
        )
        raise ValueError(f"resume = {resume} is no checkpoint (it has no trainer_state.json): {instead}.")
    if not trust:
        try:
            verify(found)
        except ValueError as error:
            raise Damaged(f"resume = {resume}: {error}; trust_checkpoint=true loads it all the same.") from None
    own = found.resolve().parent == Path(output_dir).resolve()
    newer = [path for path in finished(output_dir) if step_of(path) > step_of(found)]
    if newer and own:
        raise ValueError(
            f"resume = {resume} is older than {newer[0]}, which would be taken after the next stop: move what is newer "
            "away, or name another output_dir."
        )
    return find_resumable(output_dir) if newer else (found, [])


def find_resumable(output_dir):
    """The newest whole checkpoint's path or None, and sentences on those passed over; Damaged as `choose`."""
    passed, damaged, steps = [], None, by_step(output_dir)
    for path in sorted({*Path(output_dir).glob("checkpoint-*")} - {path for _, path in steps}):
        reason = "its name has no step" if path.is_dir() else "it is not a directory"
        passed.append(f"{path} was passed over: {reason}.")
    for _, path in steps:
        if not (path / MANIFEST).is_file():
            passed.append(f"{path} was passed over: it was never finished (no {MANIFEST}).")
            continue
        try:
            verify(path)
        except ValueError as error:
            damaged = str(error)
            passed.append(f"{path} was passed over: {error}.")
            continue
        return path, passed
    if damaged:
        raise Damaged(f"no checkpoint in {output_dir} is whole: {damaged}. Restore it, or name another output_dir.")
    return None, passed


def check_same_run(choice, manifest, run, allowed):
    """Refuse to go on with another run than the checkpoint's; add what changed and may to the choice.

    Raises:
        ValueError: Names the first key that differs, both values and what to do.
    """
    now, changes = run.facts(), {}
    for part in ("same", "schedule", "free", "versions"):
        saved = manifest.get(part, {})
        changes[part] = [(key, saved[key], new) for key, new in now[part].items() if key in saved and saved[key] != new]
    for change in changes["same"]:
        _refuse(choice, *change)
    for key, was, new in changes["schedule"]:
        if key not in allowed:
            _refuse(choice, key, was, new, f"allow_changes={json.dumps([key])}")
    for name, was, new in changes["versions"]:
        if name == "transformers" and str(was).split(".")[0] != str(new).split(".")[0]:
            _refuse(choice, name, was, new)
    changes = _check_ranks(choice, manifest, run) + changes["schedule"] + changes["free"] + changes["versions"]
    if changes:
        told = ", ".join(f"{key} {json.dumps(was)} -> {json.dumps(now)}" for key, was, now in changes)
        choice.said.append(f"changed since {choice.checkpoint}: {told}.")


def _refuse(choice, key, was, now, instead=""):
    """Another run's checkpoint, in one sentence."""
    raise ValueError(
        f"{choice.checkpoint} was trained with {key} = {json.dumps(was)}, now it is {json.dumps(now)}: set it back to "
        f"go on with that run,{f' allow it with {instead},' if instead else ''} or start a new run from its weights: "
        f"init_from={choice.checkpoint} and another output_dir."
    )


def _check_ranks(choice, manifest, run):
    """Hold the step's micro-batches: the same ranks, or without ZeRO other ranks and an accumulation to match.

    Returns:
        What changed, [(key, was, now)].
    """
    then, now = manifest["world_size"], run.ranks
    accumulation = manifest.get("accumulation", run.accumulation)
    if then == now:
        if accumulation != run.accumulation:
            _refuse(choice, "gradient_accumulation_steps", accumulation, run.accumulation)
        return []
    if run.fixed_ranks:
        _refuse(choice, "world_size", then, now)
    step = then * accumulation
    if step % now or run.accumulation not in (accumulation, step // now):
        _refuse(choice, "micro-batches a step (ranks x gradient_accumulation_steps)", step, now * run.accumulation)
    if run.micro_batches // then * then != run.micro_batches // now * now:
        _refuse(choice, "micro-batches an epoch", run.micro_batches // then * then, run.micro_batches // now * now)
    choice.accumulation = step // now
    return [("ranks", then, now), ("gradient_accumulation_steps", accumulation, choice.accumulation)]
