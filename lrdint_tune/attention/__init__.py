"""The mathematics: attention with a slot for one differential method. Imports torch only."""

from lrdint_tune.attention.core import Backend, RunningState, attend, document_mean, integral, running_mean
from lrdint_tune.attention.lambdas import LAMBDA_FORMS, build_lambda
from lrdint_tune.attention.layout import DocumentMask, Layout
from lrdint_tune.attention.methods import METHODS, AttentionMethod, build_method, method_options
from lrdint_tune.attention.self_attention import DifferentialSelfAttention
from lrdint_tune.attention.shape import AttentionShape

__all__ = [
    "LAMBDA_FORMS",
    "METHODS",
    "AttentionMethod",
    "AttentionShape",
    "Backend",
    "DifferentialSelfAttention",
    "DocumentMask",
    "Layout",
    "RunningState",
    "attend",
    "build_lambda",
    "build_method",
    "document_mean",
    "integral",
    "method_options",
    "running_mean",
]
