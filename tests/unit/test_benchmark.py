"""The benchmark runs, reports what it promises, and its listing is the function that it is compared with."""

import json

import pytest
import torch

from benchmarks import step
from benchmarks.inputs import SCOPES, SIZES, VARIANTS, Case, build_model, build_models
from benchmarks.measure import count_flops, peak_bytes, predicted_listing_bytes

TINY = SIZES["tiny"]


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_listing_is_dint_with_the_integral_as_printed():
    """Module, model and gradients, float64, λ not 0. RoPE rounds q and k to float32 in neither."""
    models = build_models(TINY, 48, dtype=torch.float64, integral="sequence", allow_future_leak=True)
    for scope in SCOPES:
        fused, listing = (Case(models[variant], scope, 48) for variant in ("dint", "listing"))
        if scope != "step":
            close(fused.module(fused.x), listing.module(listing.x), 1e-13)
        expected, actual = listing.gradients(), fused.gradients()
        assert actual.keys() == expected.keys()
        assert all(g.abs().max() > 0 for g in expected.values())
        for name in expected:
            close(actual[name], expected[name], 1e-12)


def test_listing_is_not_the_causal_form():
    models = build_models(TINY, 48, dtype=torch.float64)
    x = Case(models["dint"], "attention", 48).x
    causal, listing = (models[variant].attention(0)(x) for variant in ("dint", "listing"))
    assert (causal - listing).abs().max() > 1e-4
    close(causal[:, -1], listing[:, -1], 1e-13)  # the last row's prefix is the sequence


@pytest.mark.parametrize("scope", SCOPES)
def test_flops_equal_the_formula(scope):
    n, d, h, k, hd, r = 64, TINY.embed_dim, TINY.num_heads, TINY.num_kv_heads, 8, 8
    map_flops = 2 * 2 * n * n * h * hd
    weights = {"none": d * hd * (2 * h + 2 * k)}
    weights["dint"] = weights["none"] + (d * r + r * hd) * (h + k)
    for variant, maps in (("none", 1), ("dint", 2)):
        trained = 3 * (2 * n * weights[variant])  # forward, gradient of the input, gradient of the weight
        full, causal = trained + 3 * maps * map_flops, trained + 3 * maps * map_flops // 2
        if scope != "attention":
            frozen = 2 * (2 * n * 3 * d * TINY.intermediate_dim)
            full, causal = full + frozen, causal + frozen
        flops = count_flops(TINY, variant, scope, n)
        if scope == "step":
            # Twice the layer, the head forward and backward, less the first layer's gradient of the frozen embeddings.
            head = 2 * (2 * n * d * TINY.vocab_size)
            unneeded = 2 * n * (weights[variant] - h * hd * d - (r * hd * (h + k) if variant == "dint" else 0))
            full, causal = 2 * full + head - unneeded, 2 * causal + head - unneeded
        assert (flops.full, flops.causal) == (full, causal)


def test_peak_memory():
    """The listing's is predicted to the byte; that of `dint` grows with N, the listing's with its square."""
    peaks = {
        (variant, n): peak_bytes(Case(build_model(TINY, variant, n), "attention", n))
        for variant in VARIANTS
        for n in (384, 768)
    }
    for n in (384, 768):
        assert peaks["listing", n] == predicted_listing_bytes(TINY, "attention", n, torch.float32)
    assert peaks["listing", 768] > 3.8 * peaks["listing", 384]
    assert peaks["dint", 384] < 0.1 * peaks["listing", 384]


def test_smoke(tmp_path, capsys):
    out = tmp_path / "step.json"
    arguments = ["--sizes", "tiny", "--lengths", "32", "64", "--repeats", "2", "--threads", "1", "--device", "cpu"]
    step.main([*arguments, "--out", str(out)])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["threads"] == 1 and report["torch"] == torch.__version__ and report["date"]
    assert "--repeats 2" in report["command"]
    rows = report["rows"]
    assert [(r["length"], r["scope"], r["variant"]) for r in rows] == [
        (n, scope, variant) for n in (32, 64) for scope in SCOPES for variant in VARIANTS
    ]
    assert len(printed.splitlines()) == 1 + len(rows) + len(report["memory_growth"])
    for row in rows:
        assert len(row["seconds"]) == 2 and row["peak_bytes"] > 0 and row["note"] is None
        assert row["allowed_ratio"] == min(row["flop_ratio_full"], row["flop_ratio_causal"])
        assert row["time_over_allowed"] == pytest.approx(row["time_ratio"] / row["allowed_ratio"])
        if row["variant"] == "none":
            assert row["time_ratio"] == row["allowed_ratio"] == 1
        if row["variant"] == "listing":
            assert row["speed_vs_listing"] == 1
    assert {(g["variant"], g["from"], g["to"]) for g in report["memory_growth"]} == {(v, 32, 64) for v in VARIANTS}


def test_listing_that_does_not_fit_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(step, "available_bytes", lambda device: 1000)
    step.main(["--sizes", "tiny", "--lengths", "32", "--repeats", "1", "--threads", "1", "--device", "cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " listing " in line]
    assert len(lines) == 3 and all("does not fit" in line for line in lines)
