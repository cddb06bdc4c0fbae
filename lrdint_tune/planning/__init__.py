"""What a run will need, from its config alone: no weights, no data, no GPU. Everything here is an estimate."""

from lrdint_tune.planning.plan import Plan, Planner, Target, plan

__all__ = ["Plan", "Planner", "Target", "plan"]
