from .hill_climb import Climb as Climb
from .hill_climb import Evaluation as Evaluation
from .hill_climb import hill_climb as hill_climb
from .ranks import RankSearch as RankSearch
from .ranks import proxy_task as proxy_task
from .ranks import search_ranks as search_ranks
