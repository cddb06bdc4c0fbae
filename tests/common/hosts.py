"""Tiny random ``transformers`` models, one per supported class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lrdint_tune.attention.lambdas import Annealed
from lrdint_tune.hosts import method_parameters, methods

VOCABULARY, WIDTH, HEADS, LAYERS = 40, 32, 4, 2
PAD = 1
NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": PAD}
SUPPORTED = {  # class -> method -> options
    "gpt2": {
        "none": {},
        "daa": {},
        "dex": {},
        "diffq": {},
        "diffv": {},
        "lmam": {"n": 6, "scale": 1.0},
    },
    "llama": {"none": {}, "daa": {"position": "after"}, "dex": {}, "diffv": {}, "lmam": {"n": 6, "scale": 1.0}},
}
SUPPORTED["roberta"] = SUPPORTED["gpt2"]
SUPPORTED["bart"] = {name: {**options, "where": "both"} for name, options in SUPPORTED["gpt2"].items()}
CASES = [(host, method) for host, methods in SUPPORTED.items() for method in methods]
CAUSAL = [(host, method) for host, method in CASES if host in ("gpt2", "llama")]


def tiny(host: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model of ``host`` with wide weights and biases (its attention maps are not flat), without dropout."""
    torch.manual_seed(3)
    model = _BUILD[host](changes).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and "ln_" not in name:
                parameter.normal_(std=0.5 if parameter.dim() > 1 else 0.2)
    return model


def _gpt2(changes: dict[str, Any]) -> PreTrainedModel:
    options = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCABULARY}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**options, **rates, **NO_TOKENS, **changes}))


def _roberta(changes: dict[str, Any]) -> PreTrainedModel:
    options = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 66,
        "vocab_size": VOCABULARY,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 2,
    }
    return RobertaForSequenceClassification(RobertaConfig(**{**options, **NO_TOKENS, **changes}))


def _bart(changes: dict[str, Any]) -> PreTrainedModel:
    options = {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
        "dropout": 0.0,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    return BartForConditionalGeneration(BartConfig(**{**options, **NO_TOKENS, **changes}))


def _llama(changes: dict[str, Any]) -> PreTrainedModel:
    options = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 64,
        "vocab_size": VOCABULARY,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **NO_TOKENS, **changes}))


_BUILD = {"gpt2": _gpt2, "roberta": _roberta, "bart": _bart, "llama": _llama}


def wake(model: PreTrainedModel) -> None:
    """Move every new tensor away from its start, and λ away from 0."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in method_parameters(model).items():
            if ".lam." in name:
                parameter.copy_(torch.linspace(0.3, 0.9, parameter.numel()).view_as(parameter))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    for method in methods(model):
        for child in method.children():
            if isinstance(child, Annealed):
                child.advance(child.anneal_steps)  # λ is its parameter alone


def tokens(rows: int = 2, length: int = 11) -> Tensor:
    """Without padding."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def inputs(host: str, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """Arguments of the model's forward."""
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if host == "bart":
        given["decoder_input_ids"] = ids.flip(1)
    return given


def right_padded(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Row 0 cut to ``length`` tokens and padded; ids and mask."""
    mask = torch.ones_like(ids)
    mask[0, length:] = 0
    return ids.masked_fill(mask == 0, PAD), mask
