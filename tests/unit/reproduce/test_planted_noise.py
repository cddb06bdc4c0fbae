"""The planted noise is what it is said to be, and what can remove it does."""

import math

import pytest
import torch

from lrdint_tune.attention import METHODS
from lrdint_tune.errors import ConfigError
from lrdint_tune.reproduce.planted_noise import (
    HEAD_DIM,
    IDEAL_STD,
    NUM_HEADS,
    Noise,
    build_layer,
    draw_weights,
    effective_map,
    errors,
    second_map_resembles,
)
from lrdint_tune.reproduce.planted_noise_runs import Cell, Schedule, run_cell

SHORT = Schedule(steps=120, batch=4, length=16)


def layers(noise, seed=0):
    weights = draw_weights(noise, torch.Generator().manual_seed(seed))
    clean, noisy = (build_layer(weights, noisy=value).double() for value in (False, True))
    return weights, clean, noisy


def logits(layer, x):
    q, k = (p(x).unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(0, 1) for p in (layer.q_proj, layer.k_proj))
    return q @ k.mT / math.sqrt(HEAD_DIM)  # [H, N, N]


@pytest.mark.parametrize("kind", ["bilinear", "even"])
@pytest.mark.parametrize(("rank", "strength"), [(1, 3.0), (16, 1.0)])
def test_noise_has_its_rank_and_strength_and_is_all_that_was_added(kind, rank, strength):
    _, clean, noisy = layers(Noise(kind, rank, strength))
    x = torch.randn(400, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ideal, noise = logits(clean, x), logits(noisy, x) - logits(clean, x)
    values = torch.linalg.svdvals(noise)
    assert (values[:, rank - 1] > 1e-3 * values[:, 0]).all() and (values[:, rank:] < 1e-5 * values[:, :1]).all()
    assert float(noise.std()) == pytest.approx(strength, rel=0.15)
    assert float(ideal.std()) == pytest.approx(IDEAL_STD, rel=0.15)
    # The part of ξ that is a bilinear form in x: all of it, or none beyond what 400 tokens happen to show.
    basis = torch.linalg.qr(x)[0]
    share = float((basis @ (basis.T @ noise @ basis) @ basis.T).norm() / noise.norm())
    assert share > 0.999 if kind == "bilinear" else share < 0.3


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dex", "diffv")])
def test_effective_map_times_the_values_is_the_output(method):
    weights = draw_weights(Noise("bilinear", 4, 3.0), torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layer = build_layer(weights, noisy=True, method=method).double()
    for parameter in layer.method.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.method.advance_schedule(500)
    x = torch.randn(2, 12, 64, dtype=torch.float64)
    v = layer.v_proj(x).unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2)
    out = layer.output_proj((effective_map(layer, x) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, layer(x))


def test_errors_are_one_for_the_untouched_layer_and_zero_for_the_clean_one():
    _, clean, noisy = layers(Noise("even", 4, 3.0))
    x = torch.randn(4, 16, 64, dtype=torch.float64)
    assert errors(noisy, clean, noisy, x) == {"output": 1, "map": 1}
    assert errors(clean, clean, noisy, x) == {"output": 0, "map": 0}


def test_what_a_second_map_resembles():
    weights, clean, noisy = layers(Noise("bilinear", 4, 3.0))
    x = torch.randn(4, 16, 64, dtype=torch.float64)
    assert second_map_resembles(noisy, clean, noisy, x) is None
    # DAA's second map starts as the first, S_ideal + ξ: shares of its variance by their standard deviations 2 and 3.
    daa = build_layer(weights, noisy=True, method="daa").double()
    found = second_map_resembles(daa, clean, noisy, x)
    assert found["noise"] == pytest.approx(3 / 13**0.5, abs=0.1)
    assert found["ideal"] == pytest.approx(2 / 13**0.5, abs=0.1)


def test_lora_removes_noise_of_the_weights_and_not_the_other():
    left = {
        kind: run_cell(Cell(lora_rank=8), Noise(kind, 1, 3.0), 0, SHORT)["left"]["map"] for kind in ("bilinear", "even")
    }
    assert left["bilinear"] < 0.1 and left["even"] > 0.7, left


def test_a_run_is_repeatable_and_counts_what_it_trains():
    cell, noise, schedule = Cell("dint"), Noise("bilinear", 4, 3.0), Schedule(steps=3, batch=2, length=8)
    first, second = (run_cell(cell, noise, 1, schedule) for _ in range(2))
    assert first == second and first["trained"] == 2 * (64 * 2 * 8 + 2 * 8 * 32) + 2
    assert run_cell(Cell(lora_rank=12), noise, 1, schedule)["trained"] == first["trained"] - 2


@pytest.mark.parametrize("noise", [("odd", 1, 1.0), ("even", 17, 1.0), ("even", 0, 1.0), ("even", 1, 0.0)])
def test_what_cannot_be_planted_is_refused(noise):
    with pytest.raises(ConfigError, match="=.*(must|choose)"):
        Noise(*noise)
