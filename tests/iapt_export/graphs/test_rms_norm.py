"""PyTorch's normalisation in the operators of opset 20."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from iapt_export.graphs.ops.rms_norm import translation_table
from tests.graphs import run_onnx
from tests.thorough import default_for


class Normalised(nn.Module):
    """Over the last axes of ``x [2, 4, 6]``."""

    def __init__(self, axes: int, weight: Tensor | None, eps: float | None) -> None:
        super().__init__()
        self.axes, self.weight, self.eps = axes, weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-self.axes :], self.weight, self.eps)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    default_for(lambda case: case[0] == torch.float16, [(torch.float32, 1e-6), (torch.float16, 1e-3)]),
)
@pytest.mark.parametrize(
    ("axes", "weighted", "eps"),
    default_for(lambda case: case[0] == 2, [(1, True, 1e-2), (1, False, 1e-6), (2, True, None)]),
    ids=["one", "plain", "two"],
)
def test_it_computes_what_pytorch_does(
    dtype: torch.dtype, limit: float, axes: int, weighted: bool, eps: float | None
) -> None:
    x = torch.randn(2, 4, 6)
    x[1] *= 300 if dtype == torch.float16 else 1e-4  # whose squares fp16 cannot hold; what is added to them counts
    x = x.to(dtype)
    weight = torch.randn(x.shape[-axes:]).to(dtype) if weighted else None
    module = Normalised(axes, weight, eps)
    program = torch.export.export(module, (x,), strict=False)
    assert [node.target for node in program.graph.nodes if node.target in translation_table(20)]
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=20,
        optimize=False,
        verbose=False,
        custom_translation_table=translation_table(20),
    )
    assert made is not None
    assert made.model.graph.outputs[0].dtype == ir.DataType.from_numpy(x.numpy().dtype)
    (output,) = run_onnx(made.model_proto.SerializeToString(), {"x": x.numpy()}).values()
    assert torch.allclose(torch.from_numpy(output), module(x), rtol=limit, atol=limit)
    assert "RMSNormalization" not in {node.op_type for node in made.model.graph}


def test_opset_23_has_the_operator() -> None:
    assert translation_table(23) == {}
