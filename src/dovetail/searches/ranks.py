"""The search over elastic ranks, which a run makes after training (`dovetail.training.rank_search`)."""

from dovetail.training.hill_climb import Climb, Evaluation, hill_climb
from dovetail.training.rank_search import RankSearch, proxy_task, search_ranks

__all__ = ["Climb", "Evaluation", "RankSearch", "hill_climb", "proxy_task", "search_ranks"]
