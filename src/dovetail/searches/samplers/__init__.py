"""Samplers for Optuna studies, one method a file. They keep no state besides the study and repeat no configuration."""

from dovetail.searches.samplers.prga import PRGASampler
from dovetail.searches.samplers.refine import RefineSampler
from dovetail.searches.samplers.three_stage import ThreeStageSampler

__all__ = ["PRGASampler", "RefineSampler", "ThreeStageSampler"]
