"""Step checkpoints: sharded, written beside the training, verified before they are used."""

from lrdint_tune.training.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager"]
