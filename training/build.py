"""What a run trains and what trains it: network, Trainer, the training itself, and the models that are judged."""

import sys

import deepspeed
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import IntervalStrategy

from smolpretrain.core import status

from . import attention, compiling, held_out, model, record, trainer
from .safety import disk, guards, lock, ranks, spot

transformers.utils.logging.disable_progress_bar()  # "Writing model shards" would break our own bar


def begin(args):
    """Claim the run's directory and what its ranks share, before anything is spent."""
    disk.check_writable(args.output_dir)
    ranks.bound_waiting(args.ddp_timeout)
    ranks.forget_shared_buffer(ranks.rank())
    ranks.say(lock.take(args.output_dir) if ranks.rank() == 0 else None)
    ranks.say(args.precision_said)


def check(model_args, args, config):
    """Whether the architecture, its optimizer and the weights that it starts from can be had; returns its attention.

    Raises:
        ValueError: One of them cannot.
    """
    kernel, _ = attention.choose(model_args.attn_implementation, args.device, config, args.bf16)
    model.check_optimizer(config, args.optim)
    if ranks.rank() == 0 and model_args.init_from:
        model.check_weights(model_args.init_from, config)
    return kernel


def build_model(model_args, data_args, args, config):
    """The network from random weights or those of init_from, its loss, and whether ZeRO-3 splits it.

    Raises:
        ValueError: The architecture cannot do what is asked, or the weights are not its own.
    """
    kernel, why = attention.choose(model_args.attn_implementation, args.device, config, args.bf16)
    zero3 = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    if zero3:
        deepspeed.init_distributed()  # the model is split over DeepSpeed's own group as it is built
    if model_args.init_from:
        network, origin = model.model_from(model_args.init_from, config, kernel), f"from {model_args.init_from}"
    else:
        network, origin = model.random_model(config, args.seed, kernel), f"from random weights (seed {args.seed})"
    ranks.say(f"model: {get_model_param_count(network):,} parameters {origin}; {kernel}: {why}.")
    refused = "Liger brings its own" if args.use_liger_kernel else "ZeRO-3 shares the head out" if zero3 else None
    if data_args.intra_document_masking and not zero3:
        model.check_masking(network)
    ranks.say("\n".join(compiling.settle(network, args, data_args, zero3, refused)))
    return network, zero3


def decide(args, choice, sets, kernel):
    """Set what is known only once data and checkpoint are: {key: value}, for run.json beside what was asked."""
    args.gradient_accumulation_steps = choice.accumulation
    args.eval_on_start |= choice.evaluate_first
    if not sets.held_out:
        args.eval_strategy = IntervalStrategy.NO
    names = (
        *("gradient_accumulation_steps", "eval_on_start", "eval_strategy", "bf16", "use_cpu"),
        *("activation_checkpointing", "gradient_checkpointing"),
    )
    return args.on_resume(names) | {"attn_implementation": kernel}


def wrap(network, args, tokenizer, sets, collator, log, texts):
    """Network, rows, collator and record in one Trainer.

    Args:
        sets: (training rows, {held-out set: rows}).
        texts: Held-out documents, by which bytes a token are trusted.

    Returns:
        (trainer, log).
    """
    made = trainer.PretrainTrainer(
        model=network,
        args=args,
        train_dataset=sets[0],
        eval_dataset=sets[1].get("", sets[1]),
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=[log],
    )
    made.divergence.tell, made.measure = log.tell_bad_step, log.measure
    made.bytes_per_token = held_out.bytes_per_token(tokenizer, texts)
    made.remove_callback(ProgressCallback)
    made.remove_callback(PrinterCallback)
    return made, log


def train(made, args, checkpoint, above):
    """Train to the end, or to where a stop was agreed: then the exit status says so.

    Args:
        above: What `guards.launchers` said when the process began.
    """
    stop = guards.StopTogether(args.output_dir, above)
    guards.deafen_forks()
    made.add_callback(stop)
    made.add_callback(ranks.Begun())
    if args.spot_notice_url and ranks.rank() == 0:
        spot.watch(args.spot_notice_url, stop.hear)
    if checkpoint:
        ranks.say(f"going on from {checkpoint}.")
    at_step = lambda: f"at step {made.state.global_step + 1}"  # noqa: E731
    with ranks.one_error(ranks.rank(), args.world_size, at_step):
        made.train(resume_from_checkpoint=checkpoint)
    stopped = stop.stopped or stop.heard
    if made.divergence.ended or not stopped:
        guards.leave_on_signal()
    if made.divergence.ended:
        ranks.fail(made.divergence.ended, status.DIVERGED)
    step = made.state.global_step
    if stopped or stop.heard:
        why = f" ({stop.heard})" if stop.heard else ""
        if ranks.rank() == 0:  # still deaf: its launcher signals it as soon as another rank has ended
            record.write_run(args.output_dir, last_stop={"step": step, "by": stop.heard or "another rank"})
        ranks.say(f"stopped at step {step}{why}: checkpoint-{step} is whole, the same command goes on from it.")
        sys.exit(status.INTERRUPTED)


def judged_models(output_dir, seed, device):
    """{name: function that loads it}: the exported model, and its twin of random weights."""
    unset_hf_deepspeed_config()  # or ZeRO-3 would split these models too
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = AutoConfig.from_pretrained(output_dir)
    return {
        "trained": lambda: AutoModelForCausalLM.from_pretrained(output_dir, dtype=dtype).to(device),
        "random": lambda: model.random_model(config, seed, None).to(device, dtype),
    }
