"""Step checkpoints: sharded, written beside the training, verified before they are used."""

from lrdint_tune.training.checkpoint.manager import CheckpointManager, check_same_run

__all__ = ["CheckpointManager", "check_same_run"]
