"""Legality of a chain, checked before anything runs, and whether it can be merged without loss.

Rules (CLAM §3.1, A.7, A.10; DESIGN.md §1):
1. at most one quantizer;
2. a quantizer after a pruner has an exact zero;
3. remask needs a pruner before it, regrid a quantizer;
4. a link without an effective weight (bottleneck) is followed by nothing but its like;
5. dropout on a low rank's input can't be closed: W' doesn't know the input;
6. a stage that is followed by another merges into the base, so it must keep the base's zeros and grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.chains.link import Chain, Constraint, Link, OutputAdapter, Pruner, Quantizer, arguments
from dovetail.chains.registry import links
from dovetail.chains.stages import stages
from dovetail.errors import CannotMerge, ChainError


def check(chain: Chain) -> None:
    """Raises ChainError for a chain that can't run, naming the link by its place."""
    quantizer: Quantizer | None = None
    pruner: Pruner | None = None
    last: OutputAdapter | None = None
    for place, link in enumerate(chain):
        where = f"{link.name}, link {place + 1} of {chain}"
        if last is not None and not isinstance(link, OutputAdapter):
            raise ChainError(
                where,
                found=f"{link.name} after {last.name}",
                rule=f"{last.name} is a non-linear function of the layer's output and has no weight to go on with",
                fix=f"put {last.name} last",
            )
        match link:
            case Quantizer():
                if quantizer is not None:
                    raise ChainError(
                        where,
                        found=f"{link.name} after {quantizer.name}",
                        rule="a chain quantizes at most once",
                        fix=f"take one of {quantizer.name} and {link.name} out",
                    )
                if pruner is not None and not link.keeps_zeros:
                    raise ChainError(
                        where,
                        found=f"{link.name} has no exact zero, and {pruner.name} comes before it",
                        rule="a quantizer after a pruner must represent zero exactly",
                        fix=f"put {link.name} first",
                    )
                quantizer = link
            case Pruner():
                pruner = link
            case Constraint(restores="zeros"):
                if pruner is None:
                    raise ChainError(
                        where,
                        found="no pruner before it",
                        rule=f"{link.name} re-imposes a pruner's mask",
                        fix=f"put wanda(0.5) or magnitude(0.5) before it, or take {link.name} out",
                    )
            case Constraint(restores="grid"):
                if quantizer is None:
                    raise ChainError(
                        where,
                        found="no quantizer before it",
                        rule=f"{link.name} re-imposes a quantizer's grid",
                        fix=f"put nf4 or int(bits=4) before it, or take {link.name} out",
                    )
            case OutputAdapter():
                last = link
    _check_stages(chain)


def _check_stages(chain: Chain) -> None:
    parts = stages(chain)
    seen: list[Link] = []
    for number, stage in enumerate(parts):
        seen.extend(stage.applied)
        constraints = [link for link in stage.trained if isinstance(link, Constraint)]
        for link in stage.trained:
            if constraints and arguments(link).get("dropout"):
                raise ChainError(
                    f"{link.name} in stage {number + 1}: {stage}",
                    found=f"dropout={arguments(link)['dropout']}",
                    rule=f"{constraints[0].name} projects W', and W' cannot express dropout of the input",
                    fix=f"dropout=0 in {link.name}",
                )
        broken = lost(seen, stage.trained)
        if number + 1 < len(parts) and broken:
            ending = closing(broken)
            following = parts[number + 1].applied[0].name
            raise ChainError(
                f"stage {number + 1} of {len(parts)}: {stage}",
                found=f"{_breaker(stage.trained, broken[0])} doesn't keep the base's {broken[0]}",
                rule=f"a stage merges into the base before {following} is applied, without loss",
                fix=f"add {ending} at the end of the stage: {stage} >> {ending}",
            )


_MADE_BY: dict[str, tuple[type[Link], str]] = {"zeros": (Pruner, "keeps_zeros"), "grid": (Quantizer, "keeps_grid")}
"""What a base can have -> the kind of link that makes it, and the declaration of those that keep it."""


def lost(applied: Sequence[Link], trained: Sequence[Link]) -> list[str]:
    """What of a base made by `applied` is lost by merging `trained` into it: "zeros", "grid", both or neither."""
    found = []
    for what, (maker, keeps) in _MADE_BY.items():
        kept = True
        for link in trained:
            if isinstance(link, Constraint) and link.restores == what:
                kept = True
            elif not getattr(link, keeps):
                kept = False
        if not kept and any(isinstance(link, maker) for link in applied):
            found.append(what)
    return found


def closing(broken: Sequence[str]) -> str:
    """The constraints that restore what is lost, as notation: `remask >> regrid`."""
    names = [
        name for what in broken for name, cls in links().items() if issubclass(cls, Constraint) and cls.restores == what
    ]
    return " >> ".join(names)


def _breaker(trained: Sequence[Link], what: str) -> str:
    return next(link.name for link in trained if not getattr(link, _MADE_BY[what][1]))


def check_merge(chain: Chain) -> None:
    """Raises CannotMerge, naming the links to add, when the chain's last stage can't be merged without loss."""
    for link in chain:
        if not link.mergeable:
            raise CannotMerge(
                f"{link.name} in {chain}",
                found="a non-linear function of the layer's output",
                rule="only a chain that changes the weight alone can be merged",
                fix=f"keep the model unmerged and save its adapter, or take {link.name} out",
            )
    parts = stages(chain)
    applied = [link for stage in parts for link in stage.applied]
    broken = lost(applied, parts[-1].trained)
    if broken:
        ending = closing(broken)
        raise CannotMerge(
            str(chain),
            found=f"{_breaker(parts[-1].trained, broken[0])} doesn't keep the base's " + " and ".join(broken),
            rule="merging must not lose sparsity, nor leave the quantization grid",
            fix=f"train with {ending} at the end: {chain} >> {ending}; or merge(lossy=True), and the loss is measured",
        )
