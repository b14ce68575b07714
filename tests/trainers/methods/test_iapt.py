"""The generator: its size, its pooling, and that padding and other rows do not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iapt_export.contract.errors import IaptError
from trainers.decoder.backbone_sizes import Sizes
from trainers.methods.configs import IAPTConfig
from trainers.methods.iapt import IAPT, adaptive_bins, max_pool, normalised, token_shares
from trainers.methods.rational import random_coefficients

HIDDEN, LAYERS = 32, 3


def generator(seed: int = 0, **fields: object) -> IAPT:
    torch.manual_seed(seed)
    return IAPT(IAPTConfig(**{"bottleneck": 8, **fields}), Sizes(HIDDEN, LAYERS))  # type: ignore[arg-type]


def prompts(module: IAPT, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
    """The layer's prompts ``[B, P, D]``, by the module's own weights; what stood in the slots must not count."""
    slots = torch.full((len(hidden), module.num_slots, HIDDEN), float("nan"))
    return module.slots(module.weights(), layer, slots, hidden, mask)


def count(config: IAPTConfig, hidden: int, layers: int) -> int:
    return sum(torch.Size(shape).numel() for shape in IAPT.shapes(config, Sizes(hidden, layers)).values())


@pytest.mark.parametrize(
    ("rank", "number"), [(64, 537_024), (128, 1_069_568), (256, 2_134_656), (512, 4_264_832), (1024, 8_525_184)]
)
def test_shared_parameter_count(rank: int, number: int) -> None:
    """Shared: 2dr + r + d + L (r s + m + 1 + n), at the width and depth of LLaMA-2 7B."""
    assert count(IAPTConfig(bottleneck=rank, numerator_degree=6, denominator_degree=5), 4096, 32) == number


@pytest.mark.parametrize(("rank", "number"), [(64, 16_918_912), (256, 67_281_280)])
def test_unshared_parameter_count(rank: int, number: int) -> None:
    """Unshared: L (2dr + r + d + r s + m + 1 + n)."""
    config = IAPTConfig(bottleneck=rank, numerator_degree=6, denominator_degree=5, sharing="none")
    assert count(config, 4096, 32) == number


def test_an_identity_needs_powers_of_its_own() -> None:
    with pytest.raises(IaptError, match="init_function='identity' needs numerator_degree of at least 3"):
        IAPTConfig(init_function="identity", numerator_degree=2)


def test_parameters_are_what_the_shapes_say() -> None:
    for fields in (
        {},
        {"bias": False, "pooling": "mean"},
        {"activation": "gelu", "sharing": "groups", "num_groups": 2},
    ):
        module = generator(**fields)
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        assert shapes == IAPT.shapes(module.config, Sizes(HIDDEN, LAYERS))


def test_same_seed_same_weights() -> None:
    one, two, other = generator(0), generator(0), generator(1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.query, other.query)


def test_a_random_start_differs_by_layer_and_weighs_the_powers_alike() -> None:
    one, again = generator(init_function="random"), generator(init_function="random")
    assert torch.equal(one.numerator, again.numerator) and torch.equal(one.denominator, again.denominator)
    assert not torch.equal(one.numerator[0], one.numerator[1])
    torch.manual_seed(0)
    drawn = random_coefficients(4000, degree=5, lowest=1) * 3.0 ** torch.arange(1, 6)
    assert drawn.shape == (4000, 5) and ((drawn.std(dim=0) - 1).abs() < 0.05).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_definition_written_out(normalize: bool) -> None:
    """Down, attention pooling, rational, up, for one row, with loops in place of matrix products."""
    module = generator(prompt_length=2, normalize=normalize)
    hidden = torch.randn(1, 5, HIDDEN)
    read = [state / (state.square().sum() / HIDDEN + 1e-6).sqrt() if normalize else state for state in hidden[0]]
    u = torch.stack([state @ module.down_weight[0] + module.down_bias[0] for state in read])
    a, b = module.numerator[1], module.denominator[1]
    for row in range(2):
        weights = torch.exp(u @ module.query[1, :, row])
        pooled = sum(weights[t] / weights.sum() * u[t] for t in range(5))
        top = sum(a[j] * pooled**j for j in range(6))
        bottom = 1 + sum(b[k] * pooled ** (k + 1) for k in range(4)).abs()
        expected = (top / bottom) @ module.up_weight[0] + module.up_bias[0]
        assert torch.allclose(prompts(module, 1, hidden, torch.ones(1, 5))[0, row], expected, atol=1e-6)


def test_the_size_of_hidden_states_does_not_count() -> None:
    """Nor does a massive first token: 1,000 times as large, it is one token among others."""
    module, mask = generator(), torch.ones(1, 5)
    hidden = torch.randn(1, 5, HIDDEN)
    expected = prompts(module, 1, hidden, mask)
    sizes = torch.tensor([1e3, 1, 3, 0.1, 10])[:, None]
    assert torch.allclose(prompts(module, 1, hidden * sizes, mask), expected, atol=1e-6)
    plain = generator(normalize=False)
    assert not torch.allclose(prompts(plain, 1, hidden * sizes, mask), prompts(plain, 1, hidden, mask), atol=1e-3)


def test_normalised_states_stay_finite_in_half_precision() -> None:
    """Squares of hidden states beyond 256 are not numbers of fp16."""
    states = normalised(torch.tensor([[[2000.0, -2000.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]], dtype=torch.float16))
    assert states.dtype == torch.float16
    assert torch.allclose(states.float()[0, 0], torch.tensor([2.0, -2.0, 0.0, 0.0]).div(2**0.5), atol=2e-3)
    assert states[0, 1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("fields", [{}, {"scale": True}, {"bottleneck": 64}])
def test_scores_spread_by_one_at_the_start(fields: dict[str, object]) -> None:
    torch.manual_seed(0)
    module = IAPT(IAPTConfig(**{"bottleneck": 16, **fields}), Sizes(512, 8))  # type: ignore[arg-type]
    scores = normalised(torch.randn(1, 64, 512)) @ module.down_weight[0] @ module.query  # [L, T, P]
    divisor = module.config.bottleneck**0.5 if module.config.scale else 1.0
    assert 0.6 < float(scores.detach().std() / divisor) < 1.6


def test_scale_divides_the_scores() -> None:
    tokens, score = torch.randn(1, 5, 8), torch.randn(1, 8, 4)
    mask = torch.ones(1, 5)
    scaled = token_shares(tokens, mask, score, IAPTConfig(bottleneck=9, scale=True))
    assert torch.allclose(scaled, token_shares(tokens, mask, score / 3, IAPTConfig(bottleneck=9)), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_definition_of_fixed_pooling_written_out(pooling: str) -> None:
    """Projected first and pooled afterwards, as the equations have it."""
    module = generator(pooling=pooling, activation="relu", prompt_length=2)
    hidden = torch.randn(1, 6, HIDDEN)
    u = normalised(hidden)[0] @ module.down_weight[0] + module.down_bias[0]  # [T, R]
    reduce = torch.mean if pooling == "mean" else torch.amax
    pooled = torch.stack([reduce(part, dim=0) for part in u.chunk(2)])
    expected = pooled.relu() @ module.up_weight[0] + module.up_bias[0]
    assert torch.allclose(prompts(module, 0, hidden, torch.ones(1, 6))[0], expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
@pytest.mark.parametrize("activation", ["rational", "gelu", "relu", "silu", "tanh"])
def test_padding_and_other_rows_change_nothing(pooling: str, activation: str) -> None:
    module = generator(pooling=pooling, activation=activation)
    hidden = torch.randn(1, 6, HIDDEN)
    alone = prompts(module, 0, hidden, torch.ones(1, 6))
    assert alone.shape == (1, 4, HIDDEN)
    for before, after in ((0, 3), (3, 0), (2, 2)):
        noise = torch.randn(2, 6 + before + after, HIDDEN) * 100
        noise[0, before : before + 6] = hidden[0]
        mask = torch.zeros(2, noise.shape[1])
        mask[0, before : before + 6] = 1
        mask[1, :] = 1
        assert torch.allclose(prompts(module, 0, noise, mask)[:1], alone, atol=1e-5)


def bins_by_definition(length: int, parts: int) -> Tensor:
    rows = torch.zeros(parts, length, dtype=torch.bool)
    for i in range(parts):
        rows[i, i * length // parts : -(-(i + 1) * length // parts)] = True
    return rows


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 64])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_bins(length: int, parts: int) -> None:
    assert torch.equal(adaptive_bins(torch.ones(1, length), parts)[0], bins_by_definition(length, parts))
    padded = torch.cat([torch.zeros(1, 2), torch.ones(1, length), torch.zeros(1, 3)], dim=1)
    inside = adaptive_bins(padded, parts)[0]
    assert torch.equal(inside[:, 2 : 2 + length], bins_by_definition(length, parts))
    assert not inside[:, :2].any() and not inside[:, 2 + length :].any()


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_mean_and_max_are_adaptive_pooling(parts: int) -> None:
    u, mask = torch.randn(2, 10, 8), torch.ones(2, 10)
    config = IAPTConfig(pooling="mean", prompt_length=parts, bottleneck=8)
    for made, reference in (
        (token_shares(u, mask, None, config) @ u, torch.nn.functional.adaptive_avg_pool1d),
        (max_pool(u, mask, parts), torch.nn.functional.adaptive_max_pool1d),
    ):
        assert torch.allclose(made, reference(u.transpose(1, 2), parts).transpose(1, 2), atol=1e-6)


def test_sharing_groups_choose_their_projection() -> None:
    module = generator(sharing="groups", num_groups=3)
    hidden, mask = torch.randn(1, 5, HIDDEN), torch.ones(1, 5)
    before = [prompts(module, layer, hidden, mask) for layer in range(3)]
    with torch.no_grad():
        module.up_weight[1] += 1
    after = [prompts(module, layer, hidden, mask) for layer in range(3)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_close(dtype: torch.dtype) -> None:
    module = generator()
    hidden, mask = torch.randn(2, 6, HIDDEN), torch.ones(2, 6)
    expected = prompts(module, 0, hidden, mask)
    value = prompts(module.to(dtype), 0, hidden.to(dtype), mask)
    assert value.dtype == dtype
    assert (value.float() - expected).abs().max() < 0.02 * expected.abs().max() + 1e-3
