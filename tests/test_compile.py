"""torch_compile=true with packed rows, checkpointing and the loss in chunks: the same losses, compiled once."""

import pytest
import torch
from test_optimizers import trainer
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from smolpretrain.training import loss

STEPS = 6


class Graphs(TrainerCallback):
    """Graphs compiled so far, at the end of each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, *args, **kwargs):
        self.seen.append(counters["stats"]["unique_graphs"])


def losses(where, graphs, **words):
    """What each step logged; `graphs` watches."""
    torch._dynamo.reset()
    counters.clear()
    made = trainer(where, "adamw_torch", eval_strategy="no", max_steps=STEPS, activation_checkpointing=True, **words)
    assert loss.install_chunked_loss(made.model, 100) is None
    made.add_callback(graphs)
    made.train()
    return [row["loss"] for row in made.state.log_history if "loss" in row]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one_and_compiles_no_packing_anew(tmp_path):
    """Documents end elsewhere in every row, so that positions and masks differ at each step."""
    eager, compiled = Graphs(), Graphs()
    expected = losses(tmp_path / "eager", eager)
    assert losses(tmp_path / "compiled", compiled, torch_compile=True) == pytest.approx(expected, abs=1e-4)
    assert len(expected) == STEPS and set(eager.seen) == {0}
    assert set(compiled.seen) == {compiled.seen[0]} and compiled.seen[0] > 0, compiled.seen
    print(f"{compiled.seen[0]} graphs, {sum(counters['graph_break'].values())} breaks: {dict(counters['graph_break'])}")
