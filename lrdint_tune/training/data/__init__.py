"""From text to batches: tokenised datasets, packing, and a loader that resumes exactly."""

from lrdint_tune.models.loss import IGNORE_INDEX
from lrdint_tune.training.data.datasets import TokenisedDataset, chat_dataset, sft_dataset, text_dataset
from lrdint_tune.training.data.loader import Batch, BatchLoader
from lrdint_tune.training.data.packing import PackPlan, pack_plan
from lrdint_tune.training.data.ranks import main_process_first
from lrdint_tune.training.data.watch import raise_everywhere, together

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "BatchLoader",
    "PackPlan",
    "TokenisedDataset",
    "chat_dataset",
    "main_process_first",
    "pack_plan",
    "raise_everywhere",
    "sft_dataset",
    "text_dataset",
    "together",
]
