"""Is the run still learning? Losses and gradients that are no number, losses far above their own past.

A step whose gradient is not finite is never applied: under ZeRO by DeepSpeed's own overflow check, by torch's fused
optimizers through the flag they read on the device (found_inf), elsewhere by dropping the gradients. Every rank sees
every micro-batch's loss, so that all decide alike without another word.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from smolpretrain.core import upstream

from . import checkpoints

# Window and six standard deviations as in OLMo-core's SkipStepOptimizer and levanter's skip_bad_steps. Theirs is the
# deviation from the mean, which early in a run is the descent itself: 2.7 to 8.7 nats at step 66 went unseen. Here it
# is the noise from one step to the next.
WINDOW, AT_LEAST, SIGMAS = 128, 32, 6.0
ROWS_NAMED = 16  # in a sentence; metrics.jsonl has them all


class Report(NamedTuple):
    """What a step said of itself, on its way to the host."""

    step: int
    losses: torch.Tensor  # [ranks, micro-batches], each a share of the step's
    numbers: torch.Tensor  # on the host once `arrived` is: the losses, their mean, far above the limit, not finite
    arrived: Any  # a CUDA event, or None where nothing is on its way
    limit: float
    skipped: bool  # by DeepSpeed

    @classmethod
    def send(cls, step, losses, mean, far, not_finite, limit, skipped):
        """Queue the copy; the host waits for nothing."""
        numbers = torch.stack([*losses.flatten(), mean, far.float(), not_finite.float()])
        if numbers.device.type != "cuda":
            return cls(step, losses, numbers, None, limit, skipped)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(step, losses, host, arrived, limit, skipped)

    def read(self):
        """Wait until it is there: (losses as lists, mean, far, applied)."""
        if self.arrived is not None:
            self.arrived.synchronize()
        *losses, mean, far, not_finite = self.numbers.tolist()
        each = self.losses.shape[1]
        losses = [losses[start : start + each] for start in range(0, len(losses), each)]
        return losses, mean, bool(far), not (self.skipped or not_finite)


class Divergence(TrainerCallback, ExportableState):
    """Says at once which step is bad and why, and ends the run after `max_bad_steps` in a row.

    Bad is a step with a loss or a gradient that is not finite, and, unless on_spike is report, one whose loss is more
    than SIGMAS times their noise above the mean of the last good ones. No checkpoint is written while the last step
    was bad, or of weights that are not finite; one that was due is written at the next good step.

    On CUDA a step is judged while the next one runs, so that the host never waits for the device between two steps; a
    step that is logged, saved, evaluated or the last is judged at once.

    Attributes:
        lag: Steps that may run before one is judged; None is 1 on CUDA, 0 elsewhere.
        ended: The sentence that ends the run, or None.
        bad, skipped: Bad steps, and steps that changed no weight, since the run's first step.
        tell: Called on the first rank with (state, sentence, row of metrics.jsonl).
    """

    def __init__(self, on_spike="stop", max_bad_steps=3, rank=0, world_size=1):
        self.on_spike, self.max_bad_steps, self.rank, self.world_size = on_spike, max_bad_steps, rank, world_size
        self.history, self.bad, self.skipped, self.streak, self.owed = [], 0, 0, 0, False
        self.ended, self.not_finite, self.collected = None, None, []
        self.lag, self.queued, self.known = None, [], None
        self.tell = lambda state, sentence, row: print(sentence, flush=True)

    def state(self):
        kept = ("history", "bad", "skipped", "streak", "owed")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in kept}}

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        upstream.see_overflow_at_once(getattr(optimizer, "optimizer", None))
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        for name, value in saved["attributes"].items():
            setattr(self, name, value)
        self._set_limit()

    def _set_limit(self):
        self.limit = math.inf
        if len(self.history) >= AT_LEAST:
            noise = np.sqrt(np.mean(np.diff(self.history) ** 2) / 2)
            self.limit = float(np.mean(self.history) + SIGMAS * noise)

    def watch(self, loss, last):
        """Note a micro-batch's loss before its backward; share the step's losses among ranks at the last one.

        Returns:
            The loss; where the step is a spike to be skipped, with a gradient of NaN, which no optimizer applies.
        """
        self.collected.append(loss.detach().float())
        if last:
            self.losses = loss.new_zeros(self.world_size, len(self.collected), dtype=torch.float32)
            self.losses[self.rank] = torch.stack(self.collected)
            if dist.is_initialized():
                dist.all_reduce(self.losses)  # each rank fills its own row, so a NaN stays in it
            self.collected = []
            self.mean = self.losses.sum() / self.world_size
            self.far = self.mean > self.limit
            if self.on_spike == "skip" and self.limit < math.inf:
                poison = torch.where(self.far, math.nan, 1.0)  # on the device: the host waits for nothing
                loss.register_hook(lambda gradient: gradient * poison)
        return loss

    def drop(self, model, gradient_norm, optimizer):
        """Without DeepSpeed: see to it that gradients that are not finite change nothing."""
        if torch.is_tensor(gradient_norm) and all(group.get("fused") for group in optimizer.param_groups):
            self.not_finite = ~gradient_norm.detach().isfinite()
            optimizer.found_inf = self.not_finite.float()  # torch's fused kernels then leave weights and state alone
        elif not math.isfinite(gradient_norm):
            model.zero_grad(set_to_none=True)
            self.not_finite = torch.tensor(True)

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, train_dataloader=None, **kwargs):
        if optimizer.step_was_skipped:
            lr_scheduler.step()  # Trainer did not: the learning rate stays a function of the step
        not_finite = torch.zeros_like(self.far) if self.not_finite is None else self.not_finite.to(self.far.device)
        told = (self.losses, self.mean, self.far, not_finite, self.limit, optimizer.step_was_skipped)
        self.queued.append(Report.send(state.global_step, *told))
        self.not_finite, self.known = None, (args, state, control, train_dataloader)
        due = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        self.judge(0 if due else int(self.far.is_cuda) if self.lag is None else self.lag)

    def judge(self, left=0):
        """Judge the queued steps but for the newest `left`; the steps after the one that ends the run are let be."""
        while len(self.queued) > left and not self.ended:
            self._judge(self.queued.pop(0), *self.known)

    def _judge(self, report, args, state, control, train_dataloader):
        losses, loss, far, applied = report.read()
        what, where = self._find(report, losses, loss, far, applied)
        counts = what is not None and (not far or self.on_spike != "report")
        self.bad, self.skipped = self.bad + counts, self.skipped + (not applied)
        self.streak = self.streak + 1 if counts else 0
        if not counts:
            self.history = [*self.history, loss][-WINDOW:]
            self._set_limit()
            control.should_save, self.owed = control.should_save or self.owed, False
        if self.streak >= self.max_bad_steps:
            control.should_training_stop, control.should_evaluate = True, False
        if what is not None and state.is_world_process_zero:
            self._say(args, state, report.step, what, where, applied, train_dataloader)
        if self.streak >= self.max_bad_steps:
            self.ended = (
                f"training diverged: {self.streak} bad steps in a row (max_bad_steps), the last with {what}; "
                + (f"{report.step - self.skipped} of {report.step} steps were applied. {_remedy(args)}")
            )

    def _find(self, report, losses, loss, far, applied):
        """What is wrong with this step, or None, and the micro-batches that it comes from: [(rank, micro-batch)]."""
        each = [(rank, number) for rank, part in enumerate(losses) for number in range(len(part))]
        wrong = [(rank, number) for rank, number in each if not math.isfinite(losses[rank][number])]
        if wrong:
            return f"a loss of {losses[wrong[0][0]][wrong[0][1]]}", wrong
        if far:
            most = max(losses[rank][number] for rank, number in each)
            share = len(losses[0])  # a micro-batch's loss is its share of the step's
            wrong = [(r, n) for r, n in each if losses[r][n] == most or losses[r][n] * share > report.limit]
            return f"a loss of {loss:.4f}, far above the {np.mean(self.history):.4f} of the last good steps", wrong
        return (None, []) if applied else ("a gradient that is not finite, though every loss is", each)

    def _say(self, args, state, at, what, where, applied, loader):
        accumulation = args.gradient_accumulation_steps
        epoch, step = divmod(at - 1, math.ceil(len(loader) / accumulation))
        first = step * accumulation
        places = [
            {"rank": rank, "micro_batch": number, "rows": upstream.rows_of(loader, epoch, first + number, rank)}
            for rank, number in where
        ]
        ranks = {place["rank"] for place in places}
        rows = [row for place in places for row in place["rows"]]
        more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        self.tell(
            state,
            f"Step {at}: {what}, on rank{'s'[: len(ranks) - 1]} {', '.join(map(str, sorted(ranks)))}, "
            f"rows {', '.join(map(str, rows[:ROWS_NAMED]))}{more} of the training set; "
            f"{'applied' if applied else 'not applied'}, {self.streak} bad in a row.",
            {"bad_step": what, "applied": applied, "where": places},
        )

    def may_save(self, network, args, control):
        """Whether a checkpoint may be written now. All ranks call and hear the same."""
        self.judge()
        if self.ended:
            return False
        if self.streak and not control.should_training_stop:
            self.owed = True
            return False
        return self.check_weights(network, args, control)

    def check_weights(self, network, args, control):
        """Whether every weight is a number; where one is not, the run ends."""
        shares = [upstream.share_of(p).detach() for p in network.parameters()]  # ZeRO-3 holds a share
        wrong = torch.stack([~p.isfinite().all() for p in shares]).any().int().to(args.device)
        if dist.is_initialized():
            dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
        if wrong.item():
            self.ended = f"training diverged: the model has weights that are not finite. {_remedy(args)}"
            control.should_training_stop = True
        return not wrong.item()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.judge()
        if not self.ended:
            self.check_weights(model, args, control)


def _remedy(args):
    """What is left, and what to do: going on as before would end the same way, bit for bit."""
    whole = checkpoints.finished(args.output_dir)
    if not whole:
        return "No checkpoint was written before. Lower learning_rate, lengthen warmup_steps, or look at those rows."
    return (
        f"The last good checkpoint is {whole[0]}. The same command would end the same way: lower learning_rate or mend "
        f"those rows, and start a new run from its weights with init_from={whole[0]} and another output_dir."
    )
