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

import torch.distributed as dist
from transformers.trainer_pt_utils import get_model_param_count

from smolpretrain import ds_configs
from smolpretrain.arguments import ARGUMENTS, SCHEDULE
from smolpretrain.core import files, status, upstream
from smolpretrain.core.architectures import load_config
from smolpretrain.core.words import collect, parse_args, place, resolve, switches_of, take_switch
from smolpretrain.data import run_data
from smolpretrain.data.collator import PackedCollator
from smolpretrain.eval import report as run_report
from smolpretrain.eval.parts import generation, judge, provenance
from smolpretrain.hub import uploads
from smolpretrain.planning import start
from smolpretrain.training import attention, model, record
from smolpretrain.training.build import begin, build_model, check, decide, judged_models, train, wrap
from smolpretrain.training.safety import disk, guards, ranks, resume
from smolpretrain.training.safety.ranks import fail, say

RANK = ranks.rank()
ABOVE = guards.launchers()

datasets.disable_progress_bars()


def prepare_data(model_args, data_args, args, config):
    """Text to tokenizer and packed set, or sets. The first rank makes them, the others find them made."""
    data, first = run_data.open_data(data_args, args), RANK == 0
    if first:
        source = model.tokenizer_source(model_args.model_name, model_args.tokenizer_name)
        tokenizer = run_data.get_tokenizer(data_args, source, vocab_size=config.vocab_size)
    else:
        ranks.wait_for_first(args.world_size, done=False)
        tokenizer = run_data.get_tokenizer(data_args, args.output_dir)
    model.fit_config(config, tokenizer, data_args.block_size)
    if first:
        run_data.make_sets(data_args, args, tokenizer, say)
        tokenizer.save_pretrained(args.output_dir)
        ranks.wait_for_first(args.world_size, done=True)
    return tokenizer, data


def choose_checkpoint(model_args, data_args, args, config, data, rows):
    """What this command would train, and the checkpoint it goes on from; ValueError where there is none as asked."""
    streamed, names = data_args.trains_from_stream, ("block_size", "intra_document_masking")
    same = {name: getattr(data_args, name) for name in names} | {"init_from": model_args.init_from}
    same |= {"data": data.manifest.fingerprint, "ranks of the stream": args.world_size if streamed else None}
    others = {"schedule": SCHEDULE, "fixed_ranks": streamed, "versions": record.versions()}
    run, choice = resume.describe_and_choose(config, args, rows=rows, same=same, **others)
    say("\n".join(choice.said))
    return run, choice


def make_trainer(network, zero3, model_args, data_args, args, tokenizer, sets, data):
    """Collator, record and Trainer."""
    bounds = attention.takes_bounds(upstream.attention_of(network.config))
    collator = PackedCollator(tokenizer.eos_token_id, data_args.intra_document_masking, cu_seq_lens=bounds)
    terms = start.utilization_terms(network.config.to_dict(), data_args.block_size, args.device)
    if RANK == 0:
        record.write_run(args.output_dir, **terms, hardware=provenance.hardware(args.device))
    log = record.Record(
        args.output_dir, tokenizer, args.device, zero3, generation.read_prompts(args.sample_prompts),
        terms["flops_per_token"], terms["peak_flops"], random_weights=not model_args.init_from,
    )  # fmt: skip
    texts = run_data.first_documents(data, 64) if sets.held_out else []
    return wrap(network, args, tokenizer, sets, collator, log, texts)


def score_held_out(args, tokenizer, data, window):
    """Score held-out documents with the model, its random twin and a unigram model, in windows of a training row."""
    documents = run_data.spaced_documents(data, args.max_eval_documents)
    models = judged_models(args.output_dir, args.seed, args.device)
    return judge.judge(models, data.unigram_counts(), tokenizer, documents, window, not args.disable_tqdm)


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
        (model_args, data_args, args), asked = arguments, resolve(arguments)
        given = collect(words, switches_of(ARGUMENTS))
        begin(args)
        upload = uploads.claim(args, say) if args.push_to_hub and RANK == 0 else None
        share = args.stream_share() if data_args.trains_from_stream else None
        config = load_config(model_args.model_name, model_args.config_overrides)
        kernel = check(model_args, args, config)
        generation.read_prompts(args.sample_prompts)
        tokenizer, data = prepare_data(model_args, data_args, args, config)
        sets = run_data.load_sets(data_args, args, tokenizer, data, share, say)
        checkpoint_bytes = disk.check_start(args, config, len(sets.train), say)
        run, choice = choose_checkpoint(model_args, data_args, args, config, data, len(sets.train))
        if (checkpoint := choice.checkpoint) and data_args.trains_from_stream:
            sets.train.load_state(checkpoint)
        say(start.settle_checkpointing(args, config.to_dict(), dict(asked), kernel))
        decided = decide(args, choice, sets, kernel)
        if RANK == 0:
            values = {**asked, **decided} | ({"rows": len(sets.train)} if data_args.blend else {})
            planned, plan = start.plan(config.to_dict(), values, args.device, args.world_size, kernel)
            say("\n".join(planned))
            record.write_start(args.output_dir, dict(asked), decided, data.manifest, provenance.code_commit(), plan)
        network, zero3 = build_model(model_args, data_args, args, config)
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(place(str(error), given), getattr(error, "status", status.BAD_INPUT))
    except dist.DistNetworkError as error:
        fail(ranks.cannot_meet(error))
    say(ds_configs.say_if_unbuilt(remove_stale_lock=RANK == 0) if args.deepspeed and args.use_cpu else None)
    made, log = make_trainer(network, zero3, model_args, data_args, args, tokenizer, sets, data)
    made.checkpoint_bytes = checkpoint_bytes
    if upload:
        upload.step_0, upload.say = not (zero3 or model_args.init_from), log.say
        made.add_callback(upload)
    made.facts = run.facts() | {"data": data.manifest.fingerprint, "arguments_sha256": files.digest(dict(asked))}
    if RANK == 0:
        record.write_run(args.output_dir, parameters=get_model_param_count(made.model), command=argv)
    train(made, args, checkpoint, ABOVE)
    result = made.export() | run_data.taken(data, made.state.global_step * args.rows_a_step)
    del made
    gc.collect()
    results = score_held_out(args, tokenizer, data, data_args.block_size) if data.manifest.held_out else None
    if RANK == 0:
        say("\n".join(record.write_result(args.output_dir, log, results, result)))
        run_report.write_report(args.output_dir)
    if dist.is_initialized():
        dist.destroy_process_group()
    if upload and (why := upload.finish()):
        fail(why, status.NOT_UPLOADED)


if __name__ == "__main__":
    gc.freeze()  # none is among what was imported
    gc.enable()
    say(_threads_said)
    main()
