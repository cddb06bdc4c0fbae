"""Saving trained models: adapters and whole Hugging Face folders."""

from lrdint_tune.export.adapter import load_adapter, save_adapter
from lrdint_tune.export.hf_folder import save_hf_folder
from lrdint_tune.export.plan import plan_export

__all__ = ["load_adapter", "plan_export", "save_adapter", "save_hf_folder"]
