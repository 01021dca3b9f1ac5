"""Every knob, its default, and every check that needs neither data nor device.

core/words.py fills these from `args.json key=value ...`; a ValueError here begins with the key's name.
"""

import typing
from dataclasses import dataclass, field

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from smolpretrain import ds_configs, limits
from smolpretrain.core import precision
from smolpretrain.data.arguments import CorpusArguments, one_of, read_entries
from smolpretrain.limits import COMPRESSIONS, SCHEDULE

STREAM_DOCUMENTS = 20_000  # at 2 kB each 40 MB of text: seconds to prepare, 100 held out at the default fraction
ATTENTION = (
    *("auto", "varlen", "flash_attention_4", "flash_attention_3", "flash_attention_2"),
    *("flex_attention", "sdpa", "eager"),
)


ONLY_PREPARING = (
    *("dataset_name", "data_files", "mixture", "streaming", "max_documents", "max_tokens", "min_characters"),
    *("max_characters", "deduplicate", "decontaminate", "filters", "ids_column", "validation_files"),
    "validation_split",
)


@dataclass
class ModelArguments:
    """What is trained: an architecture, from random weights unless `init_from` names others, and its tokenizer."""

    model_name: str = field(
        default="smollm2-135m",
        metadata={
            "help": "A built-in (smollm2-1m, -135m, -360m, -1.7b, -1m-moe, -135m-moe), a Hub id, or a directory with "
            "config.json. Only the architecture is used: weights are random, seeded by `seed`, unless init_from."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint or model directory whose .safetensors weights a new run starts from, with a new "
            "optimizer, schedule and data order. Default: random weights."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub id, a directory, or 'train' for a byte-level BPE of the model's vocabulary size trained on "
            "the data. Default: the model's own."
        },
    )
    config_overrides: dict[str, typing.Any] | None = field(
        default=None, metadata={"help": 'Fields of the model\'s config to change, e.g. {"num_hidden_layers": 12}.'}
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": f"One of {', '.join(ATTENTION)}. The default takes the fastest that is there. On CUDA that is "
            "flash-attn 4 or 3 where installed, else varlen, torch's own flash kernel; elsewhere sdpa. The run says "
            "which."
        },
    )

    def __post_init__(self):
        one_of("attn_implementation", self.attn_implementation, ATTENTION)


@dataclass
class DataArguments(CorpusArguments):
    """Where text comes from and how it becomes rows. Nothing named: the built-in text."""

    intra_document_masking: bool = field(
        default=True,
        metadata={"help": "Attention stays inside a document and positions restart with it. false: plain causal rows."},
    )
    prepared_dir: str | list[dict[str, typing.Any]] | None = field(
        default=None,
        metadata={
            "help": "Where the packed set is, or is written. Default: output_dir/prepared. Or several sets by "
            'their share of the rows: [{"prepared_dir": "a", "weight": 0.7}, {"prepared_dir": "b", "weight": 0.3, '
            '"max_epochs": 4}]. Each may have a name, that of its held-out text; by default its directory\'s.'
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.blend:
            for name, value in (vars(self) | self.preparing["cleaning"]).items():
                if name in ONLY_PREPARING and value:
                    raise ValueError(
                        f"{name} = {value} belongs to preparing a set; prepared_dir names several that are prepared: "
                        f"leave {name} out."
                    )
        if self.trains_from_stream and self.ids_column is not None:
            raise ValueError(f"ids_column = {self.ids_column} needs a prepared set: leave streaming out, or bound it.")
        if self.trains_from_stream and self.prepared_dir is not None:
            raise ValueError(
                f"prepared_dir = {self.prepared_dir} would not be read: streaming = true trains straight from the "
                "text. Leave one of them out, or bound the stream with max_documents or max_tokens to prepare it."
            )

    @property
    def blend(self):
        """`blend.Entry` of each set, where several prepared sets are named; else none."""
        return read_entries(self.prepared_dir) if isinstance(self.prepared_dir, list) else []

    @property
    def as_prepared(self):
        """What is not asked of a set that is taken as it is: arguments of `preparation.prepare`."""
        return {} if self.fraction_given else {"validation_fraction": None}

    def check_text_for_tokenizer(self):
        """Raise ValueError where tokenizer_name = train has no text: ids and prepared sets have their tokenizer."""
        if self.ids_column is not None:
            raise ValueError(f"ids_column = {self.ids_column} holds ids of a tokenizer: set tokenizer_name to it.")
        if self.blend:
            raise ValueError(
                "tokenizer_name = train: prepared_dir names sets that have theirs; give DIR/tokenizer of one."
            )

    @property
    def trains_from_stream(self):
        """Whether no set is prepared; a stream with an end is prepared like any other text."""
        return self.streaming and self.max_documents is None and self.max_tokens is None

    @property
    def streamed(self):
        """How a stream becomes rows: arguments of `stream.open_stream`."""
        names = ("block_size", "packing", "validation_fraction", "cleaning", "validation", "reading_validation")
        return {name: value for name, value in (vars(self) | self.preparing).items() if name in names}

    @property
    def first_of_stream(self):
        """What bounds the set that stands in for a stream: its held-out documents and its unigram model."""
        return {"max_documents": STREAM_DOCUMENTS} if self.trains_from_stream else {}


@dataclass
class PretrainArguments(TrainingArguments):
    """TrainingArguments with the defaults of pre-training.

    Sources: betas 0.9 / 0.95, weight decay 0.1 and clip 1.0 are GPT-3's (Brown et al. 2020, appendix B), Llama's and
    the older project's; learning rate 1e-3 is DeepSeek LLM's law 0.3118 C^-0.125 (arXiv 2401.02954, section 3.2) at
    C = 1e20 FLOPs, about 135M parameters x 120B tokens; warm-up over 1 % of the steps lies between SmolLM2's 0.1 %
    (2,000 of 2.0M) and the older project's 3 % (1,000 of 30,000).
    """

    output_dir: str | None = field(default="runs/pretrain", metadata={"help": "Everything the run leaves goes here."})
    deepspeed: dict | str | None = field(
        default="ds_configs/zero2.json",
        metadata={"help": "DeepSpeed JSON, looked up here and then in the package; null trains without DeepSpeed."},
    )
    optim: OptimizerNames | typing.Literal["muon"] | str = field(
        default="adamw_bnb_8bit",
        metadata={
            "help": "The optimizer, as TrainingArguments names it, or muon: torch's Muon for hidden matrices, AdamW "
            "for embeddings, head and norms; deepspeed=null."
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "The schedule, as TrainingArguments names it."}
    )
    warmup_steps: float = field(
        default=0.01, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    decay_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the run, its last steps, in which lr_scheduler_type=warmup_stable_decay falls to 0: 0.1 "
            "and 0.2 in SmolLM2. Linearly, unless lr_scheduler_kwargs names another decay_type."
        },
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the prepared set, unless max_steps."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's decay; norms and biases are excluded."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16; false computes in float32. Default: true where the device has instructions "
            "for it, which CUDA devices from 8.0 on and CPUs with AVX-512 have; the run says where it has none."
        },
    )
    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": "Default: on CUDA each layer is compiled by itself, seconds before step 1, kept in "
            "TORCHINDUCTOR_CACHE_DIR for the next run. true compiles the whole model, on any device; false nothing."
        },
    )
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop an epoch's last, unfilled batch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The packed set has no unused columns."})
    eval_strategy: IntervalStrategy | str = field(
        default="steps", metadata={"help": "When held-out loss is measured: no, steps, epoch."}
    )
    eval_steps: float | None = field(default=500, metadata={"help": "Steps between held-out measurements."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log step 1: it is held against ln(vocabulary)."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "true would hide NaN losses in the log."})
    save_total_limit: int | None = field(default=3, metadata={"help": "Checkpoints kept; at least 2."})
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto goes on from the newest whole checkpoint in output_dir, or starts where there is none; never "
            "refuses a directory that has one; or a checkpoint's path."
        },
    )
    trust_checkpoint: bool = field(
        default=False, metadata={"help": "Load a checkpoint that no manifest of ours vouches for: it can run any code."}
    )
    allow_changes: list[str] | None = field(
        default=None,
        metadata={"help": f"Keys that may differ from the checkpoint a run goes on from: {', '.join(SCHEDULE)}."},
    )
    spot_notice_url: str | None = field(
        default=None,
        metadata={
            "help": "Polled every 5 s; an answer of 200 stops the run with a checkpoint, nothing else matters. aws "
            "is EC2's instance metadata. Default: not polled."
        },
    )
    keep_every_steps: int = field(
        default=0, metadata={"help": "Checkpoints of steps that are multiples of this stay for good; 0 keeps none."}
    )
    max_bad_steps: int = field(
        default=3,
        metadata={
            "help": "Bad steps in a row that end the run with status 3. One or two can be a bad document or a bit that "
            "flipped; shuffled rows do not give three."
        },
    )
    on_spike: str = field(
        default="stop",
        metadata={
            "help": "A spike is a loss above the mean of the last 128 good steps by 6 times their noise. Of one, stop "
            "counts it as a bad step, skip also does not apply it, and report only says it."
        },
    )
    max_eval_samples: int = field(default=1024, metadata={"help": "Held-out rows scored at each eval, evenly spaced."})
    max_eval_documents: int = field(
        default=10_000, metadata={"help": "Held-out documents scored at the end of the run, evenly spaced."}
    )
    sample_steps: int = field(default=500, metadata={"help": "Steps between sample continuations; 0 writes none."})
    sample_prompts: str | None = field(
        default=None, metadata={"help": "Text file of prompts, one a line, to be continued. Default: ten of our own."}
    )
    trackio_static_space_id: str | bool | None = field(
        default=False,
        metadata={"help": "A name has trackio publish its dashboard as a public Space at a push; false never does."},
    )
    hub_license: str | None = field(
        default=None,
        metadata={
            "help": "The model's licence as the Hub names it, such as apache-2.0. push_to_hub needs it; never guessed."
        },
    )
    gradient_compression: str = field(
        default="none",
        metadata={
            "help": f"What gradients become on the wire between ranks: {', '.join(COMPRESSIONS)}. Under ZeRO bf16 or "
            "fp16; powersgd is DDP's (deepspeed=null) and begins anew, uncompressed, when a run goes on."
        },
    )
    z_loss: float = field(
        default=0.0,
        metadata={
            "help": "Coefficient of the mean square of log Z, which keeps logits small; PaLM and OLMo have 1e-4. It "
            "is in the gradient and has a row of its own, `z_loss`; the logged loss stays the cross-entropy."
        },
    )
    loss_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens a chunk of the training loss, so that the full logits are never built. Default: as many "
            "as have 2^25 logits (128 MiB in fp32), on CUDA a fortieth of its memory. 0 uses the model's own loss, as "
            "ZeRO-3 and Liger do by themselves."
        },
    )

    def __post_init__(self):
        limits.check(self)
        self.checkpointing_unsaid = self.activation_checkpointing is None and self.gradient_checkpointing is None
        if self.checkpointing_unsaid:  # recomputes activations: slower, far less memory; a GPU's plan may leave it out
            self.activation_checkpointing = True
        if isinstance(self.deepspeed, str):
            self.deepspeed = None if self.deepspeed.lower() in ("", "none", "null") else ds_configs.find(self.deepspeed)
        if not torch.accelerator.is_available():
            self.use_cpu = True
        kind = "cpu" if self.use_cpu else torch.accelerator.current_accelerator().type
        self.bf16, self.precision_said = precision.choose(self.bf16, kind)
        if self.accelerator_config is None and not self.use_cpu:  # or a batch's copy waits for the step before it
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        if self.deepspeed:
            ds_configs.check(self)
            ds_configs.stand_alone()
        asked = self.optim
        self.optim = "adamw_torch_fused" if asked == limits.MUON else asked  # TrainingArguments knows no Muon
        limits.check_compression(self)
        super().__post_init__()
        if self.deepspeed and self.gradient_compression != "none":
            self.hf_deepspeed_config.config["communication_data_type"] = self.gradient_compression
        self.optim = asked if asked == limits.MUON else self.optim
        if self.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.n_gpu} GPUs: launch with `deepspeed run_pretrain.py ...`, which uses them "
                "all, or show it one with CUDA_VISIBLE_DEVICES."
            )

    def on_resume(self, names):
        """{name: JSON value} of arguments that a run is held against when it goes on."""
        return {name: getattr(value := getattr(self, name), "value", value) for name in names}

    @property
    def order_seed(self):
        """What draws the order of the rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def rows_a_step(self):
        """Rows of all ranks that one optimizer step takes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def blend_in_order(self, blend):
        """Have the rows of a `blend.Blend` taken in their order, which keeps the shares.

        Raises:
            ValueError: A set would be read more often than its max_epochs.
        """
        self.train_sampling_strategy = "sequential"
        if self.max_steps > 0:
            blend.check_length(self.max_steps, self.rows_a_step)
        elif self.num_train_epochs > 1:
            raise ValueError(
                f"num_train_epochs = {self.num_train_epochs} would go over a blend again: max_epochs of each set says "
                "how often it may be read; set num_train_epochs to 1."
            )

    def stream_share(self):
        """This rank's share of a stream: arguments of `stream.open_stream`. Rows are then taken in their order.

        Raises:
            ValueError: The stream would have no end, or several readers.
        """
        if self.max_steps < 1:
            raise ValueError(
                f"streaming = true has no end: set max_steps (now {self.max_steps}), or bound the text with "
                "max_documents or max_tokens."
            )
        if self.dataloader_num_workers:
            raise ValueError(
                f"dataloader_num_workers = {self.dataloader_num_workers} would read the stream as often: set it to 0, "
                "a stream is read ahead by itself."
            )
        self.train_sampling_strategy = "sequential"
        rows = self.max_steps * self.gradient_accumulation_steps * self.per_device_train_batch_size * self.world_size
        share = {"length": rows, "micro_batch": self.per_device_train_batch_size, "seed": self.seed}
        return share | {"rank": self.process_index, "world_size": self.world_size}


ARGUMENTS = (ModelArguments, DataArguments, PretrainArguments)  # of a run
