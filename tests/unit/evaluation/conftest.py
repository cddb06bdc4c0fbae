"""A tiny random Llama in a Hugging Face folder, and a scorer of it."""

from pathlib import Path

import pytest
import torch

from lrdint_tune.evaluation.loading import Loaded, load_model
from lrdint_tune.evaluation.scoring import Scorer
from tests.common.tiny_run import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "model"
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> Loaded:
    return load_model(model_folder)


@pytest.fixture
def scorer(loaded: Loaded) -> Scorer:
    return Scorer(loaded.model, loaded.tokenizer, device=torch.device("cpu"))
