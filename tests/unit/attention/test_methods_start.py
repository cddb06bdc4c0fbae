"""At step 0 every default is the model it was put into, its new tensors are alive within two optimizer steps, and what
makes no sense is refused by name."""

from typing import Any

import pytest
import torch

from lrdint_tune.attention import LAMBDA_FORMS, METHODS, method_options
from lrdint_tune.errors import ConfigError
from lrdint_tune.models.decoder import LlamaDecoder
from tests.common.cases import (
    BASE,
    CASES,
    KV_HEADS,
    LAMBDAS,
    MAIN_LAYOUTS,
    NO_CACHE,
    NOT_THE_IDENTITY,
    REFUSED,
    MethodCase,
    case_and_heads,
    exception,
)
from tests.common.layouts import BATCH, LENGTH, layout_case
from tests.common.models import TINY, base_state, set_backend, tiny_model


def fresh_pair(case: MethodCase, heads: str) -> tuple[LlamaDecoder, LlamaDecoder]:
    """The unmodified model, and the model with a method on the same base weights, as it starts."""
    sizes = {"num_kv_heads": KV_HEADS[heads]}
    plain, model = tiny_model(**sizes), tiny_model(**case.options, **sizes)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".method." in name for name in missing)
    return plain, model


@pytest.mark.parametrize(("case", "heads"), case_and_heads())
def test_step_zero_is_the_identity(case: MethodCase, heads: str, covered: Any) -> None:
    """Or, for the exceptions, visibly not."""
    plain, model = fresh_pair(case, heads)
    reason = exception(NOT_THE_IDENTITY, case)
    assert all((not method.differs_at_start()) == (reason is None) for method in model.methods())
    tolerance = 1e-5 if case.options.get("inside_softmax") else 1e-6  # sdpa with a bias is another kernel
    tokens = torch.randint(TINY["vocab_size"], (BATCH, LENGTH))
    for name in MAIN_LAYOUTS:
        layout = layout_case(name)
        real = layout.rows.valid
        for backend in ("eager", "sdpa"):
            with torch.no_grad():
                want, got = (
                    set_backend(m, backend)(tokens, mask=layout.mask, input_pos=layout.input_pos)[real]
                    for m in (plain, model)
                )
            if reason is None:
                torch.testing.assert_close(
                    got, want, rtol=0, atol=tolerance, msg=lambda m, n=(name, backend): f"{n}: {m}"
                )
            else:
                assert (got - want).abs().max() > 1e-3, (name, backend, reason)
            covered("identity" if reason is None else "not the identity", case, heads, [name], [backend])


@pytest.mark.parametrize(("case", "heads"), case_and_heads([case for case in CASES if case.method != "none"]))
def test_every_new_tensor_is_alive_within_two_steps(case: MethodCase, heads: str, covered: Any) -> None:
    for name, backend in (("causal", "sdpa"), ("packed", "eager"), ("left_padded", "sdpa"), ("right_padded", "eager")):
        layout = layout_case(name)
        model = set_backend(tiny_model(**case.options, num_kv_heads=KV_HEADS[heads]), backend)
        tokens = torch.randint(TINY["vocab_size"], (BATCH, LENGTH))
        labels = tokens.roll(-1, dims=1).masked_fill(~layout.rows.valid, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        largest: dict[str, list[float]] = {parameter: [] for parameter in model.adapter_parameters()}
        for step in (1, 2):
            model.advance_schedule(step)
            optimizer.zero_grad()
            model(tokens, labels=labels, mask=layout.mask, input_pos=layout.input_pos).backward()
            for parameter, tensor in model.adapter_parameters().items():
                assert tensor.grad is not None and torch.isfinite(tensor.grad).all(), (name, parameter)
                largest[parameter].append(tensor.grad.abs().max().item())
            optimizer.step()
        assert all(max(values) > 1e-7 for values in largest.values()), (name, backend, largest)
        if case.method == "lmam" and not case.options.get("softmax_map"):
            # The other factor starts at zero: no gradient passes it before the first step.
            assert all(values[0] == 0 for parameter, values in largest.items() if parameter.endswith(".a"))
        covered("alive", case, heads, [name], [backend])


@pytest.mark.parametrize("method", ["diff", "dint", "daa", "difflora"])
def test_lambda_frozen_at_zero_is_a_control(method: str) -> None:
    """`fixed` with `lam_init: 0` computes the pretrained function, and the second map never moves."""
    case = MethodCase(method, {"method": method, "lam": "fixed", "lam_init": 0})
    plain, model = fresh_pair(case, "gqa")
    tokens = torch.randint(TINY["vocab_size"], (2, LENGTH))
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=1e-6)
    model(tokens, labels=tokens.roll(-1, dims=1)).backward()
    second = [p for name, p in model.adapter_parameters().items() if ".q1." not in name and ".k1." not in name]
    assert second and all(p.grad.abs().max() == 0 for p in second)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_model(**options)
    text = str(caught.value)
    assert "\n" not in text
    assert any(name in text for name in options if name != "method"), text


@pytest.mark.parametrize("case", [case for case in CASES if exception(NO_CACHE, case)], ids=str)
def test_cache_refused(case: MethodCase) -> None:
    model = tiny_model(**case.options)
    with pytest.raises(ConfigError, match="integral|alignment"):
        model.setup_caches(1, torch.float32, decoder_max_seq_len=LENGTH)


def test_new_tensors_start_as_linear_layers_do() -> None:
    """Wdown ~ U(+-1/sqrt(D)), Wup ~ U(+-1/sqrt(r)); lambda exactly 0."""
    rank = 4
    for method in ("dint", "difflora"):
        model = tiny_model(method=method, rank=rank, embed_dim=512, head_dim=64, num_layers=1)
        start = model.layers[0].attn.method
        for factors in (start.q2, start.k2):
            for tensor, bound in ((factors.down.weight, 512**-0.5), (factors.up, rank**-0.5)):
                assert 0.97 * bound < tensor.abs().max() <= bound
                torch.testing.assert_close(tensor.var().item(), bound**2 / 3, rtol=0.15, atol=0)
        if method == "dint":
            assert (start.lam.value == 0).all()
        else:
            assert all((factors.up == 0).all() for factors in (start.q1, start.k1))


def test_matrices_start_at_the_identity() -> None:
    for method, name in (("daa", "w_daa"), ("dex", "w_dex"), ("diffq", "w_d"), ("diffk", "w_d"), ("diffv", "w_d")):
        for layer in tiny_model(method=method).layers:
            matrix = getattr(layer.attn.method, name)
            assert (matrix == torch.eye(matrix.shape[-1])).all()


def test_lmam_starts_at_zero() -> None:
    """a ~ U(+-1/sqrt(r)); b, the seed's W_b + PE, is 0."""
    rank, n = 4, 200
    for position in ("pe", "none"):
        start = tiny_model(method="lmam", n=n, rank=rank, position=position, num_layers=1).layers[0].attn.method
        assert 0.97 * rank**-0.5 < start.a.abs().max() <= rank**-0.5
        assert (start.b == 0).all()


def test_small_updates_of_lmam_survive_bf16() -> None:
    """A factor that held -PE beside them would swallow updates of 1e-4."""
    method = tiny_model(method="lmam", n=64, num_layers=1).layers[0].attn.method
    with torch.no_grad():
        method.b.uniform_(-1e-4, 1e-4)
        exact, rounded = method.maps(), method.to(torch.bfloat16).maps().float()
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_names_and_dtypes() -> None:
    """The base's names stay; lambda is float32, and nothing is 0-dimensional, which FSDP2 refuses."""
    plain = set(tiny_model().state_dict())
    assert not tiny_model().adapter_parameters()
    for case in CASES:
        model = tiny_model(**case.options)
        assert set(base_state(model)) == plain, case
        for name, parameter in model.adapter_parameters().items():
            assert parameter.dim() >= 1, (case, name)
            assert parameter.dtype == torch.float32, (case, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reset_parameters_writes_every_tensor(case: MethodCase) -> None:
    """As after construction without memory: what always starts alike does so again, the rest is drawn as widely."""

    def tensors(method: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: t.detach().clone() for name, t in (*method.named_parameters(), *method.named_buffers())}

    first, second = (tensors(tiny_model(**case.options).layers[0].attn.method) for _ in range(2))
    method = tiny_model(**case.options).layers[0].attn.method
    with torch.no_grad():
        for tensor in (*method.parameters(), *method.buffers()):
            tensor.fill_(torch.nan)
    method.reset_parameters()
    for name, tensor in tensors(method).items():
        assert torch.isfinite(tensor).all(), name
        if torch.equal(first[name], second[name]):
            assert torch.equal(tensor, first[name]), name
        else:
            assert 0.4 < tensor.std() / first[name].std() < 2.5, name


def test_nothing_is_left_out() -> None:
    """Every registered method, lambda form and option has a case in which it is not at its default."""
    assert set(BASE) == set(METHODS) and set(LAMBDAS) == set(LAMBDA_FORMS)
    of_lambda = {"lam", "lam_init", "lam_sharing", "anneal_steps", "combine"}  # the same code for all methods
    touched = {method: {o for case in CASES if case.method == method for o in case.options} for method in METHODS}
    assert of_lambda <= set.union(*touched.values())
    for method in METHODS:
        assert not set(method_options(method)) - of_lambda - touched[method], method
