"""The Trainer, with what pre-training needs and nothing else."""

import shutil
import time
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from smolpretrain.core import upstream

from . import compiling, compression, held_out, optimizers, schedule
from .experts import Experts
from .safety import checkpoints, disk, ranks
from .safety.divergence import Divergence
from .terms import Terms


class PretrainTrainer(Trainer):
    """Trainer that counts tokens, commits its checkpoints, keeps embeddings and norms in 32-bit optimizer state and
    weighs held-out loss by tokens.

    Attributes:
        facts: What a run that goes on from a checkpoint of this one is held against, JSON values for the manifest.
        evaluation_owed: A stop came during an evaluation: whoever goes on makes it up first.
        bytes_per_token: See held_out.py; None measures held-out loss in nats alone.
        measure: Takes the seconds spent waiting for data, returns what each log line adds; all ranks call it.
        checkpoint_bytes: What a checkpoint takes, as reckoned from the architecture.
    """

    facts: ClassVar[dict] = {}
    evaluation_owed = False
    bytes_per_token = measure = None
    data_wait_seconds = 0.0
    checkpoint_bytes = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        known = self.args
        self.divergence = Divergence(known.on_spike, known.max_bad_steps, known.process_index, known.world_size)
        self.add_callback(self.divergence)
        self.compiles = known.torch_compile or upstream.is_compiled(self.model)
        self.terms, self.experts = getattr(self.model, "terms", None) or Terms(), Experts.of(self.model)

    def _build_accelerator_args(self, **kwargs):
        found = super()._build_accelerator_args(**kwargs)
        if not self.args.deepspeed:  # ZeRO's JSON says it there
            compression.hook(upstream.ddp_handler(found), self.args.gradient_compression, self.args.max_steps)
        return found

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's, seen by the guard against divergence before the backward."""
        if self.compiles:
            compiling.mark_lengths(inputs)
        given = inputs | {"output_router_logits": True} if self.experts else inputs
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        if self.experts:  # the loss is a share of the step's, times the ranks whose gradients are averaged
            share = self.experts.coefficient * outputs["aux_loss"] / self.current_gradient_accumulation_steps
            loss = loss + (share - share.detach())  # in the gradient; the logged loss stays a cross-entropy
            self.terms.add("aux_loss", share / self.args.world_size)
            self.experts.count(outputs["router_logits"])
        last = self.accelerator.gradient_state.sync_gradients
        self.terms.steps += last
        return self.divergence.watch(loss, last=last)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:  # DeepSpeed has stepped already, or has not for the same reason
            self.divergence.drop(model, grad_norm, self.optimizer.optimizer)
        return grad_norm

    def log(self, logs, start_time=None):
        """Trainer's, with the steps that changed nothing and the bad ones counted since the first."""
        if "loss" in logs:
            upstream.forget_logged_loss(self)
            logs |= {"skipped_steps": self.divergence.skipped, "bad_steps": self.divergence.bad}
            logs |= self.terms.take() | (self.experts.take() if self.experts else {})
            logs |= self.measure(self.data_wait_seconds) if self.measure else {}
        super().log(logs, start_time)

    def get_batch_samples(self, *args, **kwargs):
        """Trainer's, timed: how long a step waits for its batches, and for the ranks to count their tokens."""
        began = time.monotonic()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self.data_wait_seconds += time.monotonic() - began

    def create_optimizer(self, model=None):
        """Trainer's; Muon, and 8-bit state that leaves embeddings and norms in 32 bits, are made in optimizers.py."""
        muon = self.args.optim == "muon"
        cls, kwargs = (None, {}) if muon else self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if self.optimizer is not None or not (muon or kwargs.get("optim_bits") == 8):
            return super().create_optimizer(model)
        model = self.model if model is None else model
        groups = optimizers.grouped(model, set(self.get_decay_parameter_names(model)))
        if muon:
            self.optimizer = optimizers.muon(groups, self.args)
        else:
            self.optimizer = optimizers.eight_bit(cls, kwargs, groups, self.args.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Trainer's, with shares of the run in steps."""
        self.args.lr_scheduler_kwargs = schedule.resolve(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def _track_num_input_tokens(self, inputs):
        """Count tokens seen over all ranks; rows are full on every rank, so nothing is gathered."""
        self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out loss as one sum over tokens: Trainer's own is a mean of batch means (8.353 for 8.231, measured).

        Every rank takes every world_size-th row and the same number of forwards; rows past the end weigh nothing.

        Args:
            eval_dataset: Rows, or {name: rows} of several sets.

        Returns:
            {eval_loss: nats a token, eval_bits_per_byte (EOS costs bits and has no bytes), eval_tokens: tokens scored,
            eval_runtime: seconds, epoch}, over all sets together, and eval_NAME_loss and so on of each; empty where a
            stop was asked for between two batches.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sets, started, sums = dataset if isinstance(dataset, dict) else {"": dataset}, time.monotonic(), []
        self.model_wrapped.eval()
        self._average_weights()
        self.control.should_evaluate = True
        with torch.no_grad(), compiling.eager():
            for rows in sets.values():
                sums.append(held_out.score(self, rows))
                if self.evaluation_owed:
                    break
        self.model_wrapped.train()
        if self.evaluation_owed:
            return {}
        sums = torch.stack(sums)
        if dist.is_initialized():
            dist.all_reduce(sums)
        metrics = held_out.figures(sums.sum(0), metric_key_prefix)
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - started, 3)
        for name, one in zip(sets, sums, strict=True):
            metrics |= held_out.figures(one, f"{metric_key_prefix}_{name}") if name else {}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train(self, *args, **kwargs):
        """Trainer's; a full disk, whoever meets it first, is a NoSpace."""
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            full = disk.explain(error, self.args.output_dir, self.checkpoint_bytes)
            if full is None or full is error:
                raise
            raise full from error

    def _run_epoch(self, **kwargs):
        """Train no step more where the checkpoint already stood at the last one, or a stop cut short what it owed."""
        at = self.state.global_step
        if at >= self.state.max_steps or (at and self.control.should_training_stop):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model, trial):
        """Trainer's save, then the manifest that makes it count, then the removal of what is older.

        Raises:
            NoSpace: The disk is full; the partial checkpoint is removed, the ones before it are whole.
        """
        args = self.args
        if not self.divergence.may_save(model, args, self.control):
            return
        disk.check_save(args.output_dir, self.checkpoint_bytes, args.device)
        directory = Path(args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            self._write_checkpoint(directory, model, trial)
        except Exception as error:
            full = disk.explain(error, args.output_dir, self.checkpoint_bytes)
            ranks.fails_first(args.process_index, args.world_size, full or error)  # the others still write there
            if not (directory / checkpoints.MANIFEST).exists():
                shutil.rmtree(directory, ignore_errors=True)  # a part of a checkpoint is of no use, and takes room
            raise
        if args.process_index == 0:
            for sentence in checkpoints.rotate(args.output_dir, args.save_total_limit, args.keep_every_steps):
                print(sentence, flush=True)

    def _write_checkpoint(self, directory, model, trial):
        args, limit = self.args, self.args.save_total_limit
        if args.process_index == 0:
            shutil.rmtree(directory, ignore_errors=True)  # what a killed run left of this step
        self.accelerator.wait_for_everyone()
        args.save_total_limit = None  # Trainer would remove the old before the new counts, and by mtime
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        if hasattr(self.train_dataset, "save_state"):  # a stream: where this rank has come to
            a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
            self.train_dataset.save_state(directory, self.state.global_step * a_step)
        checkpoints.commit(
            directory,
            args.process_index,
            args.world_size,
            step=self.state.global_step,
            tokens_seen=self.state.num_input_tokens_seen,
            evaluation_owed=self.evaluation_owed,
            **self.facts,
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Trainer's, then the arguments' schedule: the state just loaded holds the checkpoint's, which would win."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.lr_scheduler, LambdaLR):
            upstream.set_peak_rate(self.lr_scheduler, self.args.learning_rate)

    def create_model_card(self, *args, **kwargs):
        """Nothing: Trainer's card calls every run a fine-tune."""

    def init_hf_repo(self, *args, **kwargs):
        """Nothing: hub/ made the repository before anything was spent."""

    def push_to_hub(self, *args, **kwargs):
        """Nothing: Trainer's push sends training_args.bin, and is silent where it fails; hub/uploads.py sends."""

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing, as push_to_hub."""

    def _average_weights(self):
        """Schedule-free optimizers train at one point and are read at another; the next training_step goes back."""
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()

    def export(self):
        """Write the trained model into output_dir, see `export`. All ranks call; training is over after it.

        Returns:
            What was counted: {tokens_seen, skipped_steps}.
        """
        self._average_weights()
        state = None
        if self.is_deepspeed_enabled and self.accelerator.deepspeed_config["zero_optimization"]["stage"] == 3:
            state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            network = self.accelerator.unwrap_model(self.model_wrapped)
            export(network, self.processing_class, self.args.output_dir, self.args.bf16, state)
        self.accelerator.wait_for_everyone()
        return {"tokens_seen": self.state.num_input_tokens_seen, "skipped_steps": self.divergence.skipped}


def export(network, tokenizer, output_dir, bf16, state=None):
    """Write a model as from_pretrained wants it: one copy of tied weights, use_cache on, readable by all.

    Args:
        bf16: Write bfloat16, as bf16 runs do; else float32.
        state: Weights gathered from ranks, where network holds only this rank's share.
    """
    if bf16 and state is None:
        network.to(torch.bfloat16)
    if network.config.pad_token_id == network.config.eos_token_id:
        network.config.pad_token_id = None  # Trainer takes the tokenizer's; EOS must not become the padding row
    network.config.use_cache = network.generation_config.use_cache = True
    network.save_pretrained(output_dir, state_dict=state)
    tokenizer.save_pretrained(output_dir)
    for path in Path(output_dir).glob("*.safetensors"):
        path.chmod(0o644)  # save_pretrained writes 0600
