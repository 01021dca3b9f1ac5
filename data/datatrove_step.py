"""datatrove: a pipeline's documents as a prepared set, each task its own part, and the step that joins them.

    from smolpretrain.data.datatrove_step import MergePackedSet, PackedSetWriter

    writer = PackedSetWriter("prepared/web", "HuggingFaceTB/SmolLM2-135M", source="our crawl, Gopher's quality rules")
    pack = LocalPipelineExecutor([JsonlReader("web/"), GopherQualityFilter(), writer], tasks=8, logging_dir="logs/pack")
    LocalPipelineExecutor([MergePackedSet("prepared/web")], depends=pack, logging_dir="logs/merge").run()

SlurmPipelineExecutor and RayPipelineExecutor take the same steps where all tasks see one prepared_dir.
"""

import json
import os
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from . import preparation
from .pack.manifest import Manifest
from .pack.partial import in_use, open_partial, partial_of, prepared_already
from .pack.progress import Progress
from .pack.workers import Work
from .read.documents import Documents
from .read.readers import Rows
from .tokens.encoding import Disagreement, Encoder
from .tokens.tokenization import load_tokenizer


class PackedSetWriter(PipelineStep):
    """Writes what the steps before it let through; task `rank` of `world_size` writes part `rank` of as many.

    A task that was killed goes on from its last finished shard once it is run again: the documents before it are only
    counted, so the steps before must give the same ones in the same order (no shuffle_files).

    Args:
        prepared_dir: The set, once `MergePackedSet` has joined it; a local or shared file system.
        tokenizer_name: A Hub id or a directory.
        source: What text this is, in words: it stands in the manifest and is part of the set's identity, as is the
            number of tasks, which decides the order of the documents.
        block_size, packing, validation_fraction: See `prepare.py --help`.
        tokenizer_backend: See there. Where auto's faster one disagrees on the way the task fails, as its documents
            come only once: run the executor again with skip_completed=False.
    """

    name = "Packed set"
    type = "WRITER"

    def __init__(
        self,
        prepared_dir: str,
        tokenizer_name: str,
        source: str,
        block_size: int = 2048,
        packing: str = "concat",
        validation_fraction: float = 0.005,
        tokenizer_backend: str = "auto",
    ):
        super().__init__()
        self.prepared_dir, self.tokenizer_name, self.source = prepared_dir, tokenizer_name, source
        self.block_size, self.packing, self.validation_fraction = block_size, packing, validation_fraction
        self.tokenizer_backend = tokenizer_backend

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write a part. Raises ValueError: a set of another identity is there, or a document is no text."""
        tokenizer = load_tokenizer(self.tokenizer_name)
        source = {"pipeline": self.source, "tasks": world_size}
        manifest = preparation.plan(tokenizer, self.block_size, source, self.validation_fraction, self.packing, {})
        target = Path(os.path.realpath(self.prepared_dir))
        if prepared_already(target, manifest) is not None:
            logger.info(f"{self.prepared_dir} is whole already.")
            return
        texts = (document.text for document in data)
        documents = Documents([Rows(f"task {rank}", lambda: texts)])
        work = Work(open_partial(target, manifest), {rank: documents}, tokenizer, manifest, self.tokenizer_backend)
        progress = Progress(False, None, logger.info)
        with in_use(work.directory), self.track_time(unit="task"):
            if rank == 0:
                tokenizer.save_pretrained(work.directory / "set" / "tokenizer")
            try:
                work.write_part(rank, Encoder(tokenizer, self.tokenizer_backend, progress.say), progress)
            except Disagreement as error:
                raise ValueError(
                    f"task {rank}: the faster tokenizer cannot serve ({error}), and a pipeline's documents come once; "
                    "run it again with skip_completed=False: it then uses `tokenizers` itself."
                ) from error
        self.stat_update("documents", value=progress.documents, unit="task")
        self.stat_update("tokens", value=progress.tokens, unit="task")


class MergePackedSet(PipelineStep):
    """Joins the parts that the tasks of a `PackedSetWriter` wrote; its executor has one task and depends on theirs."""

    name = "Merge packed set"
    type = "WRITER"

    def __init__(self, prepared_dir: str):
        super().__init__()
        self.prepared_dir = prepared_dir

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Join. Raises ValueError: parts are missing (named), or the documents cannot be a set."""
        if rank:
            return
        target = Path(os.path.realpath(self.prepared_dir))
        work = partial_of(target)
        if not work.exists():
            manifest = Manifest.load(target)
        else:
            planned = Manifest(**json.loads((work / "identity.json").read_text(encoding="utf-8")))
            manifest = preparation.merge(work, target, planned.source["tasks"], planned)
        logger.info(f"{self.prepared_dir}: {manifest.splits['train']['tokens']} tokens, {manifest.fingerprint}")
