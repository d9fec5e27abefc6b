from .ranks import Climb as Climb
from .ranks import Evaluation as Evaluation
from .ranks import RankSearch as RankSearch
from .ranks import hill_climb as hill_climb
from .ranks import proxy_task as proxy_task
from .ranks import search_ranks as search_ranks
