"""Pre-train a causal language model from random weights.

    deepspeed run_pretrain.py args.json [key=value ...]

Text becomes tokens, tokens become packed rows, rows train the model, and what was held out judges it. This file is
the order of that story; each call below is a room of its own. `--help` lists every key.
"""

import gc
import os
import runpy
import signal
import sys
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # a signal during the seconds of imports: nothing has begun
    gc.disable()  # until main(): 0.6 of 3.3 s of imports went into looking for garbage
    for _number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(_number, lambda *_: sys.exit(os.EX_TEMPFAIL))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"  # DeepSpeed's ninja

if "smolpretrain" not in sys.modules:  # run from a clone: the clone is the package
    runpy.run_path(str(Path(__file__).resolve().parent / "in_place.py"))

from smolpretrain.core import threads

if __name__ == "__main__":  # whether the cores are free is seen while datasets is imported, before torch is
    _look = threads.Look()

import datasets

if __name__ == "__main__":
    _threads_said = _look.settle()

import deepspeed
import torch
import torch.distributed as dist
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import IntervalStrategy

from smolpretrain import ds_configs
from smolpretrain.arguments import (
    FREE_ON_RESUME,
    SAME_ON_RESUME,
    SCHEDULE,
    DataArguments,
    ModelArguments,
    PretrainArguments,
)
from smolpretrain.core import files, status, upstream
from smolpretrain.core.architectures import load_config
from smolpretrain.core.text import one_line
from smolpretrain.core.words import collect, parse_args, place, resolve, switches_of, take_switch
from smolpretrain.data import preparation, stream
from smolpretrain.data.blend import Blend
from smolpretrain.data.collator import PackedCollator
from smolpretrain.data.pack.manifest import Manifest
from smolpretrain.data.prepared import PreparedSet
from smolpretrain.data.read import corpus
from smolpretrain.data.tokens import tokenization
from smolpretrain.eval import report as run_report
from smolpretrain.eval.parts import generation, judge, provenance
from smolpretrain.hub import uploads
from smolpretrain.planning import start
from smolpretrain.training import attention, compiling, held_out, model, record, trainer
from smolpretrain.training.safety import disk, guards, lock, ranks, resume, spot

ARGUMENTS = (ModelArguments, DataArguments, PretrainArguments)
NOT_ARCHITECTURE = {"transformers_version", "use_cache", "_name_or_path", "dtype", "architectures"}
RANK = int(os.environ.get("RANK", 0))
ABOVE = guards.launchers()
TOKENIZER_DOCUMENTS = 100_000  # a BPE's merges settle long before; the built-in text has 600

transformers.utils.logging.disable_progress_bar()  # "Writing model shards" would break our own bar
datasets.disable_progress_bars()


def say(sentence):
    """One line from the first rank."""
    if RANK == 0:
        print(sentence, flush=True)


def fail(error, code=status.BAD_INPUT):
    """One line for all ranks, and the exit status on each."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    ranks.refuse(RANK, world_size, ranks.Refusal(one_line(error), code))


def describe_run(model_args, data_args, args, config, manifest, rows):
    """What this command would train, for the manifests of its checkpoints and against the one it goes on from."""
    same = {"block_size": data_args.block_size, "intra_document_masking": data_args.intra_document_masking}
    same |= {f"config {k}": v for k, v in config.to_diff_dict().items() if k not in NOT_ARCHITECTURE}
    same |= args.on_resume(SAME_ON_RESUME) | {"init_from": model_args.init_from, "data": manifest.fingerprint}
    same["ranks of the stream"] = args.world_size if data_args.trains_from_stream else None
    same["zero stage"] = args.deepspeed and args.hf_deepspeed_config.get_value("zero_optimization.stage")
    return resume.Run(
        same=same,
        schedule=args.on_resume(SCHEDULE),
        free=args.on_resume(FREE_ON_RESUME),
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        micro_batches=rows // args.per_device_train_batch_size,
        fixed_ranks=bool(args.deepspeed) or data_args.trains_from_stream,
        versions=record.versions(),
    )


def choose_checkpoint(args, run):
    """The checkpoint to go on from, or None; what else it decides is set in args and run.

    Raises:
        ValueError: There is none to go on from as asked; see `resume.choose`.
    """
    choice = resume.choose_together(
        RANK, args.world_size, args.output_dir, args.resume, args.trust_checkpoint, run, args.allow_changes or ()
    )
    for sentence in choice.said:
        say(sentence)
    run.accumulation = args.gradient_accumulation_steps = choice.accumulation
    args.eval_on_start |= choice.evaluate_first
    return choice.checkpoint


def prepare_data(model_args, data_args, args, config):
    """Text to tokenizer and packed set, or sets. The first rank makes them, the others find them made."""
    prepared_dir = data_args.prepared_dir or os.path.join(args.output_dir, "prepared")
    data = Blend(data_args.blend, args.order_seed) if data_args.blend else PreparedSet(prepared_dir)
    if RANK != 0:
        ranks.wait_for_first(args.world_size, done=False)
        tokenizer = tokenization.load_tokenizer(args.output_dir)
        model.fit_config(config, tokenizer, data_args.block_size)
        return tokenizer, data
    wanted = model.tokenizer_source(model_args.model_name, model_args.tokenizer_name)
    if wanted == model.TRAIN:
        data_args.check_text_for_tokenizer()
        documents = islice(corpus.read_documents(**data_args.reading), TOKENIZER_DOCUMENTS)
        tokenizer = tokenization.train_tokenizer(documents, config.vocab_size)
    else:
        tokenizer = tokenization.load_tokenizer(wanted)
    model.fit_config(config, tokenizer, data_args.block_size)
    for directory in [entry.prepared_dir for entry in data_args.blend] or [prepared_dir]:
        as_it_is = data_args.prepared_dir and not data_args.named and Manifest.stands_in(directory)
        more = data_args.first_of_stream | (data_args.as_prepared if as_it_is else {})
        manifest = preparation.prepare(
            corpus.read_documents(**data_args.reading),
            tokenizer,
            data_args.block_size,
            directory,
            source=None if as_it_is or data_args.blend else corpus.describe_source(**data_args.source),
            progress=not args.disable_tqdm,
            **data_args.preparing | more,
        )
        found = "found in" if manifest.reused else "written to"
        say(f"data: {manifest.summary}, {found} {directory}.{manifest.notes}")
    tokenizer.save_pretrained(args.output_dir)
    ranks.wait_for_first(args.world_size, done=True)
    return tokenizer, data


def load_sets(data_args, args, tokenizer, data, share):
    """Training rows and the held-out rows that are scored during training.

    Raises:
        ValueError: Fewer rows than one step takes; of several sets, fewer than all steps do.
    """
    a_step = args.rows_a_step
    if share is not None:
        documents = corpus.read_documents(**data_args.reading)
        train = stream.open_stream(documents, tokenizer, **data_args.streamed, **share)
    else:
        train = data.train_rows()
    if len(train) < a_step:
        raise ValueError(
            f"one step takes {a_step} rows (per_device_train_batch_size {args.per_device_train_batch_size} x "
            f"gradient_accumulation_steps {args.gradient_accumulation_steps} x {args.world_size} ranks), the set has "
            f"{len(train)} of {data_args.block_size} tokens: lower one of them or block_size, or give more text."
        )
    if data_args.blend:  # in the order that keeps the shares
        args.blend_in_order(data)
    together = args.per_device_train_batch_size * args.world_size  # what ranks take at once
    if left_out := len(train) % together if args.dataloader_drop_last and not data_args.blend else 0:
        say(f"data: each epoch leaves out {left_out} of its {len(train):,} rows, others each time: they fill no batch.")
    held_out = {}
    for name in data.manifest.held_out:
        if rows := len(blocks := data.held_out_rows(name)):
            held_out[name] = blocks.select(range(0, rows, -(-rows // args.max_eval_samples)))
    if not held_out:
        args.eval_strategy = IntervalStrategy.NO
        say("no held-out row: held-out loss is not measured during training (see validation_fraction, block_size).")
    return train, held_out


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
    say(f"model: {get_model_param_count(network):,} parameters {origin}; {kernel}: {why}.")
    refused = "Liger brings its own" if args.use_liger_kernel else "ZeRO-3 shares the head out" if zero3 else None
    if data_args.intra_document_masking and not zero3:
        model.check_masking(network)
    say("\n".join(compiling.settle(network, args, data_args, zero3, refused)))
    return network, zero3


def make_trainer(network, zero3, model_args, data_args, args, tokenizer, sets, data):
    """Network, rows, collator and record in one Trainer."""
    bounds = attention.takes_bounds(upstream.attention_of(network.config))
    collator = PackedCollator(tokenizer.eos_token_id, data_args.intra_document_masking, cu_seq_lens=bounds)
    terms = start.utilization_terms(network.config.to_dict(), data_args.block_size, args.device)
    if RANK == 0:
        record.write_run(args.output_dir, **terms, hardware=provenance.hardware(args.device))
    log = record.Record(
        args.output_dir,
        tokenizer,
        args.device,
        zero3,
        generation.read_prompts(args.sample_prompts),
        terms["flops_per_token"],
        terms["peak_flops"],
        random_weights=not model_args.init_from,
    )
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
    texts = []
    for name in data.manifest.held_out if sets[1] else ():
        texts += islice(data.held_out_documents(name), 64)
    made.bytes_per_token = held_out.bytes_per_token(tokenizer, texts)
    made.remove_callback(ProgressCallback)
    made.remove_callback(PrinterCallback)
    return made, log


def score_held_out(args, tokenizer, data, window):
    """Score held-out documents with the exported model, with its random twin and with a unigram model.

    The window is a training row: positions past it were never trained.
    """
    unset_hf_deepspeed_config()  # or ZeRO-3 would split these models too
    spaced = {}
    for name, split in data.manifest.held_out.items():
        every = -(-data.manifest.splits[split]["documents"] // args.max_eval_documents)
        spaced[name] = list(islice(data.held_out_documents(name), 0, None, every))
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    config = AutoConfig.from_pretrained(args.output_dir)
    models = {
        "trained": lambda: AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=dtype).to(args.device),
        "random": lambda: model.random_model(config, args.seed, None).to(args.device, dtype),
    }
    return judge.judge(models, data.unigram_counts(), tokenizer, spaced, window, not args.disable_tqdm)


def train(made, args, checkpoint):
    """Train to the end, or to where a stop was agreed: then the exit status says so."""
    stop = guards.StopTogether(args.output_dir, ABOVE)
    guards.deafen_forks()
    made.add_callback(stop)
    made.add_callback(ranks.Begun())
    if args.spot_notice_url and RANK == 0:
        spot.watch(args.spot_notice_url, stop.hear)
    if checkpoint:
        say(f"going on from {checkpoint}.")
    at_step = lambda: f"at step {made.state.global_step + 1}"  # noqa: E731
    with ranks.one_error(RANK, args.world_size, at_step):
        made.train(resume_from_checkpoint=checkpoint)
    stopped = stop.stopped or stop.heard
    if made.divergence.ended or not stopped:
        guards.leave_on_signal()
    if made.divergence.ended:
        fail(made.divergence.ended, status.DIVERGED)
    step = made.state.global_step
    if stopped or stop.heard:
        why = f" ({stop.heard})" if stop.heard else ""
        if RANK == 0:  # still deaf: its launcher signals it as soon as another rank has ended
            record.write_run(args.output_dir, last_stop={"step": step, "by": stop.heard or "another rank"})
        say(f"stopped at step {step}{why}: checkpoint-{step} is whole, the same command goes on from it.")
        sys.exit(status.INTERRUPTED)


def main(argv=None):
    """Run the story; exit status 2 and one line for what the user can mend."""
    guards.leave_on_signal()
    sys.stdout, sys.stderr = guards.Unheard(sys.stdout), guards.Unheard(sys.stderr)
    with ranks.one_error(RANK, int(os.environ.get("WORLD_SIZE", 1)), lambda: "outside training"):
        story(list(sys.argv[1:] if argv is None else argv))


def story(argv):
    """Text to tokens to rows to a model to its score."""
    (debug, words), given = take_switch(argv, "debug"), {}
    try:
        arguments = parse_args(words, ARGUMENTS)
        given = collect(words, switches_of(ARGUMENTS))
        model_args, data_args, args = arguments
        disk.check_writable(args.output_dir)
        ranks.bound_waiting(args.ddp_timeout)
        ranks.forget_shared_buffer(RANK)
        if RANK == 0 and (sentence := lock.take(args.output_dir)):
            say(sentence)
        if args.precision_said:
            say(args.precision_said)
        upload = uploads.claim(args, say) if args.push_to_hub and RANK == 0 else None
        share = args.stream_share() if data_args.trains_from_stream else None
        config = load_config(model_args.model_name, model_args.config_overrides)
        kernel, _ = attention.choose(model_args.attn_implementation, args.device, config, args.bf16)
        model.check_optimizer(config, args.optim)
        generation.read_prompts(args.sample_prompts)
        if RANK == 0 and model_args.init_from:
            model.check_weights(model_args.init_from, config)
        tokenizer, data = prepare_data(model_args, data_args, args, config)
        sets = load_sets(data_args, args, tokenizer, data, share)
        checkpoint_bytes = disk.check_start(args, config, len(sets[0]), say)
        run = describe_run(model_args, data_args, args, config, data.manifest, len(sets[0]))
        checkpoint = choose_checkpoint(args, run)
        if checkpoint and data_args.trains_from_stream:
            sets[0].load_state(checkpoint)
        if sentence := start.settle_checkpointing(args, config.to_dict(), resolve(arguments), kernel):
            say(sentence)
        resolved = resolve(arguments)
        if RANK == 0:
            more = {"rows": len(sets[0])} if data_args.blend else {}
            planned, plan = start.plan(config.to_dict(), resolved | more, args.device, args.world_size, kernel)
            say("\n".join(planned))
            record.write_start(args.output_dir, resolved, data.manifest, git=provenance.code_commit(), plan=plan)
        network, zero3 = build_model(model_args, data_args, args, config)
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(place(str(error), given), getattr(error, "status", status.BAD_INPUT))
    except dist.DistNetworkError as error:
        fail(ranks.cannot_meet(error))
    if args.deepspeed and args.use_cpu and (sentence := ds_configs.say_if_unbuilt(remove_stale_lock=RANK == 0)):
        say(sentence)
    made, log = make_trainer(network, zero3, model_args, data_args, args, tokenizer, sets, data)
    made.checkpoint_bytes = checkpoint_bytes
    if upload:
        upload.step_0, upload.say = not (zero3 or model_args.init_from), log.say
        made.add_callback(upload)
    made.facts = run.facts() | {"data": data.manifest.fingerprint, "arguments_sha256": files.digest(resolved)}
    if RANK == 0:
        record.write_run(args.output_dir, parameters=get_model_param_count(made.model), command=argv)
    train(made, args, checkpoint)
    result = {"tokens_seen": made.state.num_input_tokens_seen, "skipped_steps": made.divergence.skipped}
    result |= {"blend": data.taken(made.state.global_step * args.rows_a_step)} if data_args.blend else {}
    made.export()
    del made
    gc.collect()
    results = None
    if data.manifest.held_out:
        results = score_held_out(args, tokenizer, data, data_args.block_size)
    if RANK == 0:
        sentences = record.write_result(args.output_dir, log, results, result)
        run_report.write_report(args.output_dir)
        say("\n".join(sentences))
    if dist.is_initialized():
        dist.destroy_process_group()
    if upload and (why := upload.finish()):
        fail(why, status.NOT_UPLOADED)


if __name__ == "__main__":
    gc.freeze()  # none is among what was imported
    gc.enable()
    if _threads_said:
        say(_threads_said)
    main()
