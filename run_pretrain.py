"""Pre-train a causal language model from random weights.

    deepspeed run_pretrain.py args.json [key=value ...]

Text becomes tokens, tokens become packed rows, rows train the model, and what was held out judges it. This file is
the order of that story; each call below is a room of its own. `--help` lists every key.
"""

import dataclasses
import gc
import os
import sys
import time
from argparse import ArgumentParser
from itertools import islice
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"  # DeepSpeed's ninja

import datasets
import deepspeed
import torch
import torch.distributed as dist
import transformers
from torch.utils.cpp_extension import get_default_build_root
from transformers import AutoConfig, AutoModelForCausalLM, ProgressCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import IntervalStrategy

if __package__:
    from .arguments import DataArguments, ModelArguments, PretrainArguments
    from .command_line import parse_args
    from .data import corpus, packing, prepare, stream, tokenization
    from .eval import generation, judge
    from .eval import report as run_report
    from .planning import start
    from .training import checkpoints, divergence, guards, held_out, loss, model, record, trainer
else:
    from arguments import DataArguments, ModelArguments, PretrainArguments
    from command_line import parse_args
    from data import corpus, packing, prepare, stream, tokenization
    from eval import generation, judge
    from eval import report as run_report
    from planning import start
    from training import checkpoints, divergence, guards, held_out, loss, model, record, trainer

ARGUMENTS = (ModelArguments, DataArguments, PretrainArguments)
NOT_ARCHITECTURE = {"transformers_version", "use_cache", "_name_or_path", "dtype", "architectures"}
HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))
TOKENIZER_DOCUMENTS = 100_000  # a BPE's merges settle long before; the built-in text has 600


transformers.utils.logging.disable_progress_bar()  # "Writing model shards" would break our own bar
datasets.disable_progress_bars()


def say(sentence):
    """One line from the first rank."""
    if RANK == 0:
        print(sentence, flush=True)


def fail(error, status=2):
    """One line from the first rank, the exit status on all; the others wait, or a launcher would cut the line off."""
    if RANK != 0:
        time.sleep(20)
        sys.exit(status)
    ArgumentParser(prog="run_pretrain.py").exit(status, f"run_pretrain.py: error: {' '.join(str(error).split())}\n")


def choose_checkpoint(args, data_args, config, prepared_dir):
    """The checkpoint to go on from, or None, and what must stay the same; the first rank looks, the others hear."""
    same = {"world_size": args.world_size, "data": prepare.Manifest.load(prepared_dir).fingerprint}
    architecture = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_ARCHITECTURE}
    same |= {f"config {key}": value for key, value in architecture.items()} | args.kept_by_resume()
    same["intra_document_masking"] = data_args.intra_document_masking
    same["ranks of the stream"] = args.world_size if data_args.trains_from_stream else None
    answer = [None, 0, ""]
    if RANK == 0:
        try:
            answer[0], passed = checkpoints.choose(args.output_dir, args.resume, args.trust_checkpoint, same)
            for sentence in passed:
                say(sentence)
        except checkpoints.Damaged as error:
            answer[1:] = 4, str(error)
        except (ValueError, OSError) as error:
            answer[1:] = 2, str(error)
    if args.world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        fail(answer[2], answer[1])
    return answer[0], same


def write_start(parsed, prepared_dir, config):
    """run.json before the first step: what was asked, with what, on which data, and the plan, which is said too."""
    arguments = {}
    for part in parsed:
        values = part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
        names = {field.name for field in dataclasses.fields(part) if field.init and not field.name.endswith("_token")}
        arguments |= {name: value for name, value in values.items() if name in names}
    planned, plan = start.plan(config.to_dict(), arguments, parsed[-1].device, parsed[-1].world_size)
    say("\n".join(planned))
    manifest = prepare.Manifest.load(prepared_dir)
    sums = {key: sum(split[key] for split in manifest.splits.values()) for key in ("documents", "tokens", "blocks")}
    record.write_run(
        arguments["output_dir"],
        arguments=arguments,
        versions=record.versions(),
        git_commit=record.git_commit(HERE),
        plan=plan,
        data=sums | {"fingerprint": manifest.fingerprint, "source": manifest.source, "splits": manifest.splits},
    )


def wait_for_first_rank(args, done):
    """The others wait for the first rank without a collective: those give up after ddp_timeout, tokenizing may not."""
    if args.world_size > 1:
        store = dist.distributed_c10d._get_default_store()
        if done:
            store.set("prepared", "yes")
        try:
            while not store.check(["prepared"]):
                time.sleep(0.5)
        except dist.DistError:
            fail("the first rank has ended")  # and has said why


def prepare_data(model_args, data_args, args, config):
    """Text to tokenizer and packed set. The first rank makes them, the others find them made."""
    prepared_dir = data_args.prepared_dir or os.path.join(args.output_dir, "prepared")
    if RANK != 0:
        wait_for_first_rank(args, done=False)
        tokenizer = tokenization.load_tokenizer(args.output_dir)
        model.fit_config(config, tokenizer, data_args.block_size)
        return tokenizer, prepared_dir
    wanted = model.tokenizer_source(model_args.model_name, model_args.tokenizer_name)
    if wanted == model.TRAIN:
        documents = islice(corpus.read_documents(**data_args.reading), TOKENIZER_DOCUMENTS)
        tokenizer = tokenization.train_tokenizer(documents, config.vocab_size)
    else:
        tokenizer = tokenization.load_tokenizer(wanted)
    model.fit_config(config, tokenizer, data_args.block_size)
    as_it_is = data_args.prepared_dir and not data_args.named and prepare.Manifest.stands_in(prepared_dir)
    manifest = prepare.prepare(
        corpus.read_documents(**data_args.reading),
        tokenizer,
        data_args.block_size,
        prepared_dir,
        source=None if as_it_is else corpus.describe_source(**data_args.source),
        progress=not args.disable_tqdm,
        **data_args.preparing | data_args.first_of_stream,
    )
    tokenizer.save_pretrained(args.output_dir)
    say(f"data: {manifest.summary}{', found in' if manifest.reused else ', written to'} {prepared_dir}.")
    wait_for_first_rank(args, done=True)
    return tokenizer, prepared_dir


def load_sets(data_args, args, tokenizer, prepared_dir, share):
    """Training rows and the held-out rows that are scored during training.

    Raises:
        ValueError: Fewer rows than one step takes.
    """
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if share is not None:
        documents = corpus.read_documents(**data_args.reading)
        train = stream.open_stream(documents, tokenizer, **data_args.streamed, **share)
    else:
        train = prepare.load_blocks(prepared_dir, "train")
    if len(train) < a_step:
        raise ValueError(
            f"one step takes {a_step} rows (per_device_train_batch_size {args.per_device_train_batch_size} x "
            f"gradient_accumulation_steps {args.gradient_accumulation_steps} x {args.world_size} ranks), the set has "
            f"{len(train)} of {data_args.block_size} tokens: lower one of them or block_size, or give more text."
        )
    held_out = prepare.load_blocks(prepared_dir, "validation") if data_args.validation_fraction else []
    if not len(held_out):
        args.eval_strategy = IntervalStrategy.NO
        say("no held-out row: held-out loss is not measured during training (see validation_fraction, block_size).")
    elif len(held_out) > args.max_eval_samples:
        held_out = held_out.select(range(0, len(held_out), -(-len(held_out) // args.max_eval_samples)))
    return train, held_out


def build_model(model_args, data_args, args, config):
    """The network from random weights, its loss, and whether ZeRO-3 splits it.

    Raises:
        ValueError: The architecture cannot do what is asked.
    """
    attention, why = model.choose_attention(model_args.attn_implementation, args.device, config)
    zero3 = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    if zero3:
        deepspeed.init_distributed()  # the model is split over DeepSpeed's own group as it is built
    network = model.random_model(config, args.seed, attention)
    size = get_model_param_count(network)
    say(f"model: {size:,} parameters from random weights (seed {args.seed}); {attention}: {why}.")
    chunk = loss.default_chunk(config.vocab_size) if args.loss_chunk_tokens is None else args.loss_chunk_tokens
    refused = "as asked" if not chunk else "Liger brings its own" if args.use_liger_kernel else ""
    if data_args.intra_document_masking and not zero3:
        model.check_masking(network)
    refused = refused or ("ZeRO-3 shares the head out" if zero3 else loss.install_chunked_loss(network, chunk))
    say(f"loss: the model's own ({refused})." if refused else f"loss: in chunks of {chunk} tokens.")
    return network, zero3


def make_trainer(network, zero3, data_args, args, tokenizer, sets, prepared_dir):
    """Network, rows, collator and record in one Trainer."""
    flash = network.config._attn_implementation == "flash_attention_2"
    terms = start.utilization_terms(network.config.to_dict(), data_args.block_size, args.device)
    if RANK == 0:
        record.write_run(args.output_dir, **terms)
    log = record.Record(
        args.output_dir,
        tokenizer,
        args.device,
        zero3,
        generation.read_prompts(args.sample_prompts),
        terms["flops_per_token"],
        terms["peak_flops"],
    )
    made = trainer.PretrainTrainer(
        model=network,
        args=args,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        processing_class=tokenizer,
        data_collator=packing.PackedCollator(
            tokenizer.eos_token_id, data_args.intra_document_masking, cu_seq_lens=flash
        ),
        callbacks=[log],
    )
    made.divergence.tell, made.measure = log.tell_bad_step, log.measure
    if len(sets[1]):
        texts = islice(prepare.load_validation_documents(prepared_dir), 64)
        made.bytes_per_token = held_out.bytes_per_token(tokenizer, list(texts))
    made.remove_callback(ProgressCallback)
    made.remove_callback(PrinterCallback)
    return made, log


def score_held_out(args, tokenizer, prepared_dir, window):
    """Score held-out documents with the exported model, with its random twin and with a unigram model.

    The window is a training row: positions past it were never trained.
    """
    unset_hf_deepspeed_config()  # or ZeRO-3 would split these models too
    documents = prepare.Manifest.load(prepared_dir).splits["validation"]["documents"]
    spaced = islice(prepare.load_validation_documents(prepared_dir), 0, None, -(-documents // args.max_eval_documents))
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    config = AutoConfig.from_pretrained(args.output_dir)
    models = {
        "trained": lambda: AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=dtype).to(args.device),
        "random": lambda: model.random_model(config, args.seed, None).to(args.device, dtype),
    }
    counts = prepare.load_unigram_counts(prepared_dir)
    return judge.judge(models, counts, tokenizer, list(spaced), window, not args.disable_tqdm)


def report(args, log, results, tokens_seen, skipped_steps):
    """Print and record the end of the run."""
    result = {"tokens_seen": tokens_seen, "tokens_per_second": round(log.tokens_per_second, 1)}
    result |= {"skipped_steps": skipped_steps}
    rate = f"{tokens_seen:,} tokens seen, {log.tokens_per_second:,.0f} tokens/s"
    if results:
        result |= {
            "bits_per_byte": results["trained"]["bits_per_byte"],
            "random_bits_per_byte": results["random"]["bits_per_byte"],
            "unigram_bits_per_byte": results["unigram"]["bits_per_byte"],
            "held_out": results["trained"],
        }
        say(
            f"held-out bits per byte: {result['bits_per_byte']:.4f} (random weights "
            f"{result['random_bits_per_byte']:.4f}, unigram model {result['unigram_bits_per_byte']:.4f}), over "
            f"{results['trained']['documents']} documents, window {results['trained']['window']}, stride "
            f"{results['trained']['stride']}."
        )
    record.write_run(args.output_dir, result=result)
    run_report.write_report(args.output_dir)
    say(f"done: {rate}. The model is in {args.output_dir}; training_log.md and report/ there say how it went.")


def main(argv=None):
    """Run the story; exit status 2 and one line for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "debug=true" in argv
    try:
        arguments = parse_args([word for word in argv if word != "debug=true"], ARGUMENTS)
        model_args, data_args, args = arguments
        share = args.stream_share() if data_args.trains_from_stream else None
        config = model.load_config(model_args.model_name, model_args.config_overrides)
        model.choose_attention(model_args.attn_implementation, args.device, config)
        generation.read_prompts(args.sample_prompts)
        tokenizer, prepared_dir = prepare_data(model_args, data_args, args, config)
        sets = load_sets(data_args, args, tokenizer, prepared_dir, share)
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(error)
    checkpoint, same = choose_checkpoint(args, data_args, config, prepared_dir)
    if checkpoint and data_args.trains_from_stream:
        sets[0].load_state(checkpoint)
    if RANK == 0:
        write_start(arguments, prepared_dir, config)
    if args.deepspeed and args.use_cpu and not list(Path(get_default_build_root()).glob("*/deepspeed_shm_comm/*.so")):
        say("DeepSpeed builds its extension for CPUs now, once: about half a minute.")
    try:
        network, zero3 = build_model(model_args, data_args, args, config)
    except ValueError as error:
        if debug:
            raise
        fail(error)
    made, log = make_trainer(network, zero3, data_args, args, tokenizer, sets, prepared_dir)
    made.same = same
    if RANK == 0:
        record.write_run(args.output_dir, parameters=get_model_param_count(made.model))
    stop = guards.StopTogether(args.output_dir)
    made.add_callback(stop)
    if checkpoint:
        say(f"going on from {checkpoint}.")
    made.train(resume_from_checkpoint=checkpoint)
    stop.restore_signals()
    if made.divergence.ended:
        fail(made.divergence.ended, divergence.DIVERGED)
    step, tokens_seen = made.state.global_step, made.state.num_input_tokens_seen
    skipped_steps = made.divergence.skipped
    if stop.stopped:
        say(f"stopped at step {step}: checkpoint-{step} is whole, the same command goes on from it.")
        sys.exit(guards.INTERRUPTED)
    made.export()
    del made
    gc.collect()
    results = None
    if data_args.validation_fraction:
        results = score_held_out(args, tokenizer, prepared_dir, data_args.block_size)
    if RANK == 0:
        report(args, log, results, tokens_seen, skipped_steps)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
