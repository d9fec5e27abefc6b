"""Refinement: Bayesian optimization of one weighted objective around the best trials (QR-Adaptor §3.2, eq. 5, 7, 8).

score(C) = alpha z(P(C)) - (1 - alpha) z(M(C))    z(v) = (v - mean) / standard deviation, over finished trials (eq. 5)

P is the first objective of the study and M the second; `z` counts each in its direction, so that a larger score is
better. Of more objectives, the others share 1 - alpha equally. A study with one objective is scored by that alone.
The paper states one preference alpha. With `alpha=None` each proposal draws its own from [0, 1], and together the
proposals refine the whole front (random scalarization, as in ParEGO; Knowles 2006).

kernel="matern"  Optuna's GPSampler on a shadow study in memory that holds the scores: Matern 5/2 with a length scale
                 for each parameter, and log expected improvement, optimized over the whole space. Running trials count
                 with their expected scores, and constraints with the probability that they hold
kernel="rbf"     the method of the paper: scikit-learn's GaussianProcessRegressor with one length scale (eq. 7), and the
                 candidate of largest expected improvement (eq. 8) among random ones around the best trial

    EI(x) = sigma(x) (Z Phi(Z) + phi(Z))    Z = (mu(x) - best) / sigma(x)

The paper does not state the hyperparameters of the kernel. Here the length scale and the noise are those of a grid that
have the largest marginal likelihood. Under constraints, EI is multiplied by the probability that each constraint holds,
from a Gaussian process of its own (Gardner et al. 2014); while no trial is feasible, that probability alone counts.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dovetail.searches.samplers.genes import Gene, Space
from dovetail.searches.samplers.proposal import (
    ProposalSampler,
    Repair,
    check_setting,
    finished,
    losses,
    planned,
    violations,
)

Array = NDArray[np.float64]
_ASKS = 3
_CANDIDATES = 1000
_LENGTHS, _NOISES = tuple(np.geomspace(0.1, 10, 13)), (1e-6, 1e-3, 1e-1)


class RefineSampler(ProposalSampler):
    """Bayesian optimization of a weighted sum of z-scored objectives, as an Optuna sampler.

    alpha        weight of the first objective, in [0, 1]; the others share the rest. None draws it for each proposal
    start_after  number of finished trials from which on proposals are refined; earlier ones come from a Latin hypercube
    kernel       "matern" (Optuna's GPSampler) or "rbf" (the method of the paper)
    start        configurations that are proposed first
    repair       returns the configuration to use in place of a proposal, such as one within a budget
    seed         of all random numbers; None draws one
    errors       SearchError for a setting out of range

    The sampler keeps no state besides the study: it works with any storage and any number of workers, and proposes no
    configuration twice as long as the space has another one.
    """

    def __init__(
        self,
        *,
        alpha: float | None = 0.5,
        start_after: int = 5,
        kernel: Literal["matern", "rbf"] = "matern",
        start: Sequence[Mapping[str, Any]] = (),
        repair: Repair | None = None,
        seed: int | None = None,
    ) -> None:
        where = type(self).__name__
        check_setting(where, "alpha", alpha, alpha is None or 0 <= alpha <= 1, "None or in [0, 1]")
        check_setting(where, "start_after", start_after, start_after >= 2, "at least 2")
        check_setting(where, "kernel", kernel, kernel in ("matern", "rbf"), '"matern" or "rbf"')
        super().__init__(start=start, strata=start_after, repair=repair, seed=seed)
        self._alpha, self._start_after = alpha, start_after
        self._refine = self._matern if kernel == "matern" else self._rbf

    def proposals(
        self, study: Study, trial: FrozenTrial, space: Space, others: Sequence[FrozenTrial], random: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        known = [each for each in finished(others, space) if np.isfinite(each.values).all()]
        if len(known) < self._start_after:
            yield self.design(trial, space)
            while True:
                yield space.random(random)
        alpha = random.random() if self._alpha is None else self._alpha
        score_n = weighted_score(losses(known, study.directions), alpha)
        best = int(np.lexsort((-score_n, violations(known)))[0])
        running = [each for each in others if each.state is TrialState.RUNNING and space.allows(planned(each))]
        yield from self._refine(space, known, score_n, best, running, random)
        while True:
            yield space.neighbour(known[best].params, random)

    def _matern(
        self,
        space: Space,
        known: Sequence[FrozenTrial],
        score_n: Array,
        best: int,
        running: Sequence[FrozenTrial],
        random: np.random.Generator,
    ) -> Iterator[dict[str, Any]]:
        # A category of sorted numbers is shown as the place of the choice: GPSampler sees no order in a category.
        distributions: dict[str, BaseDistribution] = {name: gene.distribution for name, gene in space.genes.items()}
        sorted_genes: dict[str, Gene] = {}
        for name, gene in space.genes.items():
            if gene.ordered and isinstance(gene.distribution, CategoricalDistribution):
                sorted_genes[name] = gene
                distributions[name] = IntDistribution(0, len(gene.distribution.choices) - 1)

        def shown(parameters: Mapping[str, Any]) -> dict[str, Any]:
            values = {name: parameters[name] for name in distributions}
            return {**values, **{name: gene.index(values[name]) for name, gene in sorted_genes.items()}}

        sampler = optuna.samplers.GPSampler(seed=int(random.integers(2**31)), n_startup_trials=0)
        shadow = _quiet_study(sampler)
        for trial, score, constraints in zip(known, score_n, _constraints(known), strict=True):
            shadow.add_trial(
                optuna.trial.create_trial(
                    value=float(score),
                    params=shown(trial.params),
                    distributions=distributions,
                    constraints=constraints,
                )
            )
        for trial in running:
            parameters = shown(planned(trial))
            shadow.add_trial(
                optuna.trial.create_trial(state=TrialState.RUNNING, params=parameters, distributions=distributions)
            )
        for _ in range(_ASKS):
            # An asked trial counts as running from then on, so that the next one differs from it.
            asked = shadow.ask(distributions).params
            yield {**asked, **{name: gene.at(asked[name]) for name, gene in sorted_genes.items()}}

    def _rbf(
        self,
        space: Space,
        known: Sequence[FrozenTrial],
        score_n: Array,
        best: int,
        running: Sequence[FrozenTrial],
        random: np.random.Generator,
    ) -> Iterator[dict[str, Any]]:
        from scipy.special import ndtr

        x_nf = np.stack([space.features(trial.params) for trial in known])
        candidates = _vicinity(space, known[best].params, random)
        x_cf = np.stack([space.features(candidate) for candidate in candidates])
        feasible_n = violations(known) <= 0
        acquisition_c = np.ones(len(candidates))
        if feasible_n.any():
            mean_c, deviation_c = _predict(x_nf, score_n, x_cf)
            acquisition_c = expected_improvement(mean_c, deviation_c, score_n[feasible_n].max())
        constraints = _constraints(known)
        for name in constraints[0]:
            mean_c, deviation_c = _predict(x_nf, np.array([each[name] for each in constraints]), x_cf)
            acquisition_c = acquisition_c * ndtr(-mean_c / deviation_c)
        for place in np.argsort(-acquisition_c, kind="stable"):
            yield candidates[place]


def weighted_score(losses_nm: Array, alpha: float) -> Array:
    """Return the weighted sum of the z-scored objectives, larger is better (QR-Adaptor, eq. 5).

    losses_nm  (n, m)  objectives, smaller is better; finite
    alpha              weight of the first objective; the others share 1 - alpha equally
    returns    (n,)    an objective that is the same everywhere adds 0

    >>> weighted_score(np.array([[-1.0, 4.0], [1.0, 2.0]]), alpha=0.75).tolist()
    [0.5, -0.5]
    """
    deviation_m = losses_nm.std(0)
    z_nm = (losses_nm - losses_nm.mean(0)) / np.where(deviation_m > 0, deviation_m, 1)
    count = losses_nm.shape[1]
    weights_m = np.array([1.0]) if count == 1 else np.array([alpha] + [(1 - alpha) / (count - 1)] * (count - 1))
    return -z_nm @ weights_m


def expected_improvement(mean_n: Array, deviation_n: Array, best: float) -> Array:
    """Return the expected improvement over the best score, which is to be maximized (QR-Adaptor, eq. 8)."""
    from scipy.special import ndtr

    z_n = (mean_n - best) / deviation_n
    return deviation_n * (z_n * ndtr(z_n) + np.exp(-(z_n**2) / 2) / np.sqrt(2 * np.pi))


def _predict(x_nf: Array, y_n: Array, x_cf: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of a Gaussian process at the candidates (QR-Adaptor, eq. 7), each (c,)."""
    from scipy.linalg import cholesky, solve_triangular
    from scipy.spatial.distance import pdist, squareform
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    deviation = y_n.std()
    z_n = (y_n - y_n.mean()) / (deviation if deviation > 0 else 1)
    distance_nn, identity_nn = squareform(pdist(x_nf, "sqeuclidean")), np.eye(len(x_nf))

    def log_likelihood(noise: float, length: float) -> float:
        # Up to a constant that of GaussianProcessRegressor, which takes ten times as long for tens of trials.
        factor_nn = cholesky(np.exp(-distance_nn / (2 * length**2)) + noise * identity_nn, lower=True)
        white_n = solve_triangular(factor_nn, z_n, lower=True)
        return float(-white_n @ white_n / 2 - np.log(np.diag(factor_nn)).sum())

    noise, length = max(itertools.product(_NOISES, _LENGTHS), key=lambda each: log_likelihood(*each))
    process = GaussianProcessRegressor(RBF(length), alpha=noise, normalize_y=True).set_params(optimizer=None)
    mean_c, deviation_c = process.fit(x_nf, y_n).predict(x_cf, return_std=True)
    return mean_c, np.maximum(deviation_c, 1e-12)


def _vicinity(space: Space, center: Mapping[str, Any], random: np.random.Generator) -> list[dict[str, Any]]:
    """Return random configurations around one: normal steps of 1 to 30 % of the range in some of the genes."""
    genes_d = space.encode(center)
    shape = (_CANDIDATES, len(genes_d))
    scale_c1 = np.exp(random.uniform(np.log(0.01), np.log(0.3), (_CANDIDATES, 1)))
    steps_cd = random.normal(size=shape) * scale_c1 * (space.upper - space.lower)
    steps_cd = np.where(random.random(shape) < random.random((_CANDIDATES, 1)), steps_cd, 0)
    moved_cd = np.clip(genes_d + steps_cd, space.lower, space.upper)
    # The choices of a category have no order: any of them, with the probability of the scale.
    drawn_cd = random.uniform(space.lower, space.upper, shape)
    changed_cd = ~space.ordered & (random.random(shape) < scale_c1)
    moved_cd = np.where(space.ordered, moved_cd, np.where(changed_cd, drawn_cd, genes_d))
    unique = {space.key(parameters): parameters for parameters in map(space.decode, moved_cd)}
    return list(unique.values())


def _constraints(trials: Sequence[FrozenTrial]) -> list[dict[str, float]]:
    """Return the constraints of each trial, all with the same names and finite.

    As in Optuna a trial without a constraint is feasible: a missing one is 0. Infinite values become the largest finite
    one of their constraint, or 1.
    """
    names = sorted({name for trial in trials for name in trial.constraints})
    table = np.array([[trial.constraints.get(name, 0.0) for name in names] for trial in trials]).reshape(
        len(trials), -1
    )
    finite = np.where(np.isfinite(table), np.abs(table), 0).max(0, initial=1.0)
    return [dict(zip(names, row, strict=True)) for row in np.clip(table, -finite, finite).tolist()]


def _quiet_study(sampler: optuna.samplers.BaseSampler) -> Study:
    """Return an empty study in memory that is to be maximized, without Optuna's message that it exists."""
    name = f"refine-{uuid.uuid4()}"
    logger = logging.getLogger("optuna.storages._in_memory")
    with _filtered(logger, name):
        return optuna.create_study(study_name=name, direction=StudyDirection.MAXIMIZE, sampler=sampler)


@contextmanager
def _filtered(logger: logging.Logger, text: str) -> Iterator[None]:
    """Leave out messages that contain a text."""

    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
