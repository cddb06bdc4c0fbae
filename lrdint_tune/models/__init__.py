"""torchtune Llama models whose attention carries one differential method."""

from lrdint_tune.models.builders import (
    llama2_7b,
    llama2_13b,
    llama2_70b,
    llama3_1_8b,
    llama3_1_70b,
    llama3_2_1b,
    llama3_2_3b,
    llama3_3_70b,
    llama3_8b,
    llama3_70b,
    llama_7b,
    llama_13b,
    smollm2_135m,
)
from lrdint_tune.models.component import llama3_2
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.models.spec import ModelSpec

__all__ = [
    "LlamaDecoder",
    "ModelSpec",
    "llama2_7b",
    "llama2_13b",
    "llama2_70b",
    "llama3_1_8b",
    "llama3_1_70b",
    "llama3_2",
    "llama3_2_1b",
    "llama3_2_3b",
    "llama3_3_70b",
    "llama3_8b",
    "llama3_70b",
    "llama_7b",
    "llama_13b",
    "smollm2_135m",
]
