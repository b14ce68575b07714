"""Where training starts: prompts that a pretrained decoder already knows how to ignore.

A pretrained decoder parks unneeded attention on its first token, whose hidden state it drives to one
dominant direction (the attention sink, arXiv 2309.17453). Prompts stand before that token and take the place away:
with randomly drawn prompts SmolLM2's loss starts at 17 instead of the plain backbone's 5. Prompts that begin in the
sink's direction serve as sink themselves, and the loss starts at 5.7. The method is unchanged: only initial values are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainers.iapt import IAPTGenerator

SINK_SCALE = 10.0
"""Root mean square of the initial up-projection bias. The backbone normalises prompts, so only its size relative
to the generated part (about 1) counts: large enough to act as sink, small enough to be outweighed soon."""


@torch.no_grad()
def start_at_sink(generator: IAPTGenerator, backbone: Any, first_token: int) -> None:
    """Point the prompts' bias along the backbone's attention sink, and make the generator blind to the sink itself.

    The down-projection loses its component along the sink: the sink's hidden state is a hundred times as long
    as any other token's and would saturate the pooling.

    Args:
        generator: changed in place.
        backbone: the frozen causal LM.
        first_token: the token that instructions begin with.
    """
    ids = torch.tensor([[first_token]], device=backbone.device)
    states = backbone(input_ids=ids, output_hidden_states=True).hidden_states
    before = torch.stack([state[0, 0].float() for state in states[: generator.num_layers]])  # [L, D]
    parameters = dict(generator.named_parameters())
    down = parameters["down_weight"]
    for group in range(max(generator.layer_groups) + 1):
        members = [layer for layer, mine in enumerate(generator.layer_groups) if mine == group]
        sink = _unit(before[members].mean(dim=0)).to(down.device)  # [D]
        down[group] -= torch.outer(sink, sink @ down[group])
        if generator.config.bias:
            parameters["up_bias"][group] = sink * SINK_SCALE * generator.hidden_size**0.5


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=1e-12)
