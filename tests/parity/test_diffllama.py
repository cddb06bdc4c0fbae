"""Full-rank `diff` against transformers' DiffLlamaAttention, an independent implementation of the same formula.

Theirs pairs head i with head i + H/2 and lets every pair read two halves of V, head-normalises, scales by
1 - lambda_init. Ours takes one pair of maps per output head. So: their norm becomes the identity, the factor is
divided out, and our heads are (half, pair): head h uses their maps of pair h mod H/2 and V half h div H/2.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import DiffLlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

from tests.common.hf import interleave
from tests.common.models import ROPE_BASE, attention_of, tiny_model
from tests.common.reference import rope_frequencies

EMBED, HEADS, HEAD_DIM, LENGTH = 32, 8, 8, 18
LAM = 0.625  # exact in float32


def their_attention(kv_heads: int, implementation: str) -> DiffLlamaAttention:
    config = DiffLlamaConfig(
        hidden_size=EMBED,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        attn_implementation=implementation,
    )
    theirs = DiffLlamaAttention(config, layer_idx=0).double().eval()
    theirs.groupnorm = nn.Identity()
    theirs.lambda_init = LAM
    with torch.no_grad():
        for parameter in (theirs.lambda_q1, theirs.lambda_k1, theirs.lambda_q2, theirs.lambda_k2):
            parameter.zero_()  # lambda = exp(0) - exp(0) + LAM
    return theirs


def run_theirs(theirs: DiffLlamaAttention, x: Tensor) -> Tensor:
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * rope_frequencies(HEAD_DIM, ROPE_BASE)
    angles = torch.cat([angles, angles], dim=-1)[None]
    causal = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out, _ = theirs(x, (angles.cos(), angles.sin()), attention_mask=causal)
    return out / (1 - LAM)


def copy_weights(theirs: DiffLlamaAttention, ours: nn.Module, kv_heads: int) -> None:
    def heads(linear: nn.Linear) -> Tensor:
        return interleave(linear.weight, HEAD_DIM).unflatten(0, (-1, HEAD_DIM))

    q, k = heads(theirs.q_proj), heads(theirs.k_proj)
    first_q, second_q = q.chunk(2)
    first_k, second_k = k.chunk(2)
    out = theirs.o_proj.weight.unflatten(1, (HEADS // 2, 2, HEAD_DIM)).transpose(1, 2)  # [D, half, pair, hd]
    for parameter, value in (
        (ours.q_proj.weight, first_q.repeat(2, 1, 1)),
        (ours.method.q2.weight, second_q.repeat(2, 1, 1)),
        (ours.k_proj.weight, first_k.repeat(2, 1, 1)),
        (ours.method.k2.weight, second_k.repeat(2, 1, 1)),
        (ours.v_proj.weight, theirs.v_proj.weight),
        (ours.output_proj.weight, out),
    ):
        parameter.copy_(value.reshape(parameter.shape))


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_full_rank_diff_equals_diffllama(backend: str, implementation: str, kv_heads: int) -> None:
    theirs = their_attention(kv_heads, implementation)
    model = tiny_model(
        num_layers=1,
        embed_dim=EMBED,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        attention_backend=backend,
        method="diff",
        rank=None,
        secondary_scale="standard",
        lam="fixed",
        lam_init=LAM,
    )
    ours = attention_of(model)
    x = torch.randn(2, LENGTH, EMBED, dtype=torch.float64)
    with torch.no_grad():
        copy_weights(theirs, ours, kv_heads)
        want, got = run_theirs(theirs, x), ours(x, x)
    # Their eager path takes its softmax in float32.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if implementation == "eager" else 1e-12)
