r"""What each layer's rational activation learned, drawn beside what it started from.

    python -m benchmarks.activations examples/adapters/* --output docs/images/activations.png

A line for each layer, from dark (the first) to light; dashed, where all of them started. Below each, how far they are
from there. Thick lines are where a layer's inputs are when it reads the adapter's example prompts, all but the lowest
and the highest hundredth; thin ones are drawn over -3 to 3, for which the start was fitted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.pages import INK, MODEL, figure, table
from iapt_export.contract.errors import IaptError
from trainers.adapters.adapter import EXAMPLES_FILE, Adapter
from trainers.adapters.directory import load_adapter
from trainers.decoder.backbone import Backbone, load_backbone
from trainers.decoder.generate import prefill
from trainers.decoder.method import rows_of
from trainers.methods.rational import FIT_INTERVAL, initial_coefficients, rational
from trainers.training.data import fit_instruction
from trainers.training.records import Example

POINTS = 241
RARE = 0.01
"""Share of a layer's inputs that is left out at each end."""
LONGEST = 512
"""Tokens of a prompt that are read."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """One adapter's activations."""

    name: str
    inputs: Tensor
    """``[X]``."""
    start: Tensor
    """``[X]``, the same for all layers."""
    layers: Tensor
    """``[L, X]``."""
    seen: Tensor
    """``[L, 2]``: between which inputs nearly all of a layer's are."""

    @property
    def is_seen(self) -> Tensor:
        """``[L, X]``: which of the inputs are a layer's."""
        return (self.inputs >= self.seen[:, :1]) & (self.inputs <= self.seen[:, 1:])

    @property
    def moved(self) -> Tensor:
        """``[L]``: how far each layer's function is from its start, at most, where its inputs are."""
        return ((self.layers - self.start).abs() * self.is_seen).amax(1)


@torch.no_grad()
def inputs_of(adapter: Adapter, prompts: Sequence[str], backbone: Backbone) -> Tensor:
    """``[L, 2]``: between which of its inputs all but the rarest of a layer's activation are."""
    module, config = adapter.module(), adapter.config
    read: list[Tensor] = []

    def note(pooled: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
        read.append(pooled.flatten())
        return rational(pooled, numerator, denominator, form)

    module.rational = note
    for prompt in prompts:
        example = Example(({"role": "user", "content": prompt},), "")
        ids = torch.tensor([fit_instruction(backbone.tokenizer, example, config.prompt_format, LONGEST)[1]])
        prefill(backbone.model, rows_of(module), ids, torch.ones_like(ids))
    layers = [torch.cat(read[layer :: config.num_layers]) for layer in range(config.num_layers)]
    return torch.stack([values.quantile(torch.tensor([RARE, 1 - RARE])) for values in layers])


def learned(folder: Path, backbone: Backbone) -> Learned:
    """The activations of an IAPT adapter.

    Raises:
        IaptError: the adapter's method has no learned activation, or each layer started at random.
    """
    adapter = load_adapter(folder)
    config, tensors = adapter.config.method, adapter.tensors
    if "numerator" not in tensors or getattr(config, "init_function", "random") == "random":
        raise IaptError(f"{folder}: expected an IAPT adapter whose rational activation started as one function")
    inputs = torch.linspace(*FIT_INTERVAL, POINTS)
    degrees = (config.numerator_degree, config.denominator_degree)
    top, bottom = initial_coefficients(config.init_function, *degrees, config.rational_form)
    start = rational(inputs, torch.from_numpy(top), torch.from_numpy(bottom), config.rational_form)
    rows = zip(tensors["numerator"], tensors["denominator"], strict=True)
    layers = [rational(inputs, *row, config.rational_form) for row in rows]
    lines = (folder / EXAMPLES_FILE).read_text(encoding="utf-8").splitlines()
    seen = inputs_of(adapter, [json.loads(line)["prompt"] for line in lines], backbone)
    return Learned(folder.name, inputs, start, torch.stack(layers), seen)


def changes(all_of_them: Sequence[Learned]) -> str:
    """How far layers moved where their inputs are, as a table."""
    rows = []
    for each in all_of_them:
        low, high = each.seen.median(0).values
        most = int(each.moved.argmax())
        moved = [f"{each.moved.median():.3f}", f"{each.moved[most]:.3f} (layer {most})"]
        rows.append([each.name, f"{low:.2f} to {high:.2f}", *moved])
    return table(["adapter", "inputs of the median layer", "it moved, at most", "the layer that moved most"], rows)


def draw(all_of_them: Sequence[Learned], path: Path) -> None:
    """The plot: a column for each adapter."""
    from matplotlib import colormaps

    size = (3.4 * len(all_of_them), 4.6)
    with figure(path, size, 2, len(all_of_them), sharex=True, sharey="row") as panels:
        for above, below, each in zip(*panels, all_of_them, strict=True):
            for layer, values in enumerate(each.layers):
                colour = colormaps["viridis"](0.9 * layer / max(1, len(each.layers) - 1))
                for axes, drawn in ((above, values), (below, values - each.start)):
                    axes.plot(each.inputs, drawn, color=colour, linewidth=0.4)
                    own = each.is_seen[layer]
                    axes.plot(each.inputs[own], drawn[own], color=colour, linewidth=1.6)
            above.plot(each.inputs, each.start, color=INK, linestyle="--", linewidth=1.2)
            above.set_title(each.name)
            below.axhline(0, color=INK, linestyle="--", linewidth=1.2)
            below.set_xlabel("input")
        panels[0][0].set_ylabel("activation")
        panels[1][0].set_ylabel("less its start")


def main() -> None:
    """Draw, and print how far layers moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER")
    parser.add_argument("--model", default=str(MODEL), help="their backbone")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    asked = parser.parse_args()
    backbone = load_backbone(asked.model)
    found = [learned(folder, backbone) for folder in asked.adapters]
    draw(found, asked.output)
    print(changes(found))


if __name__ == "__main__":
    main()
