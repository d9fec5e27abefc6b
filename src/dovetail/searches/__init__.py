"""Searches over what a chain leaves open. So far: the ranks of elastic adapters."""

from dovetail.searches.hill_climb import Climb, Evaluation, hill_climb
from dovetail.searches.ranks import RankSearch, proxy_task, search_ranks

__all__ = ["Climb", "Evaluation", "RankSearch", "hill_climb", "proxy_task", "search_ranks"]
