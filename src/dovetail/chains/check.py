"""Legality of a chain, checked before anything runs, and whether it can be merged without loss.

Rules (CLAM §3.1, A.7, A.10; DESIGN.md §1):
1. at most one quantizer; `keep` stands for the one that the base has, and needs it;
2. a quantizer after a pruner keeps an exact zero, and one before a pruner has one to prune to;
3. remask needs a pruner before it, regrid a quantizer;
4. a link without an effective weight (bottleneck) is followed only by links of the same kind;
5. dropout on a low rank's input cannot be followed by a constraint: W' does not depend on the input;
6. an adapter that starts from a decomposition of the weight has the dense weight: only pruners, then at most one
   quantizer come before it, in its stage; over a pruner, remask follows;
7. a link that moves the grid is the only trained one of its stage, over a quantizer whose grid has numbers to train;
8. a stage that is followed by another merges into the base, so it must keep the base's zeros and grid.
"""

from __future__ import annotations

from dovetail.chains.link import Adapter, Chain, Constraint, Kind, Link, OutputAdapter, Quantizer, arguments
from dovetail.chains.notation import chain
from dovetail.chains.stages import MADE_BY, CheckedChain, Stage
from dovetail.errors import CannotMerge, ChainError

_EXAMPLES = {"pruner": "wanda(0.5) or magnitude(0.5)", "quantizer": "nf4 or int(bits=4)"}
_MOVABLE = {"scales": "int(bits=4) or nf4", "zeros": "hqq(bits=4)"}
_OTHER_GRID = f"use a quantizer whose grid has an exact zero, such as {_EXAMPLES['quantizer']}"


def check(text: str | Chain | Link, held: tuple[Link, ...] | None = None) -> CheckedChain:
    """Check that a chain can run, and return it with its stages; a checked chain is not checked again.

    held    the pruner and the quantizer of a merged base (`dovetail.chains.layer.held`); None: none, or those that a
            checked chain was checked with
    errors  ChainError that names the link by its place
    """
    if isinstance(text, CheckedChain) and held in (None, text.held):
        return text
    checked = CheckedChain(chain(text).links, held or ())
    _check_order(checked)
    _check_stages(checked)
    return checked


def _check_order(chain: CheckedChain) -> None:
    seen: dict[Kind, Link] = {link.kind: link for link in chain.kept}
    last: OutputAdapter | None = None
    for place, link in enumerate(chain):
        found, rule, fix = "", "", ""
        quantizer, pruner = seen.get("quantizer"), seen.get("pruner")
        if last is not None and not isinstance(link, OutputAdapter):
            found = f"{link.name} after {last.name}"
            rule = f"{last.name} is a function of the layer's output: links that change the weight must come before it"
            fix = f"put {last.name} last"
        elif isinstance(link, Quantizer) and link.continues and quantizer is None:
            found = "a model without a grid"
            rule = f"{link.name} keeps the grid of a quantized model"
            fix = 'load a quantized file with grid="keep", or use a quantizer such as int(bits=4)'
        elif link.kind == "quantizer" and quantizer in chain.kept and not _names_quantizer(chain.links[:place]):
            if link != quantizer and not (isinstance(link, Quantizer) and link.continues and link == type(link)()):
                found = f"a model that was merged on the grid of {quantizer}"
                rule = "a model is quantized at most once: a second grid would round rounded weights"
                fix = f"start from the base model, or remove {link.name} to continue on the grid of {quantizer}"
        elif link.kind == "quantizer" and quantizer is not None:
            found = f"{link.name} after {quantizer.name}"
            rule = "a chain has at most one quantizer"
            fix = f"remove {quantizer.name} or {link.name}"
        elif isinstance(link, Quantizer) and pruner is not None and not (link.keeps_zeros and link.has_zero):
            found = f"{link.name} has no exact zero, and {pruner.name} comes before it"
            rule = "a quantizer after a pruner must represent zero exactly"
            fix = f"put {link.name} first" if link.has_zero else _OTHER_GRID
        elif link.kind == "pruner" and isinstance(quantizer, Quantizer) and not quantizer.has_zero:
            found = f"{quantizer} before it, whose grid has no exact zero"
            rule = "a quantizer before a pruner must represent zero exactly"
            fix = _OTHER_GRID
        elif isinstance(link, Constraint) and MADE_BY[link.restores] not in seen:
            what, maker = ("mask", "pruner") if link.restores == "zeros" else ("grid", "quantizer")
            found = f"no {maker} before it"
            rule = f"{link.name} re-imposes the {what} of a {maker} before it"
            fix = f"put {_EXAMPLES[maker]} before it, or remove {link.name}"
        elif isinstance(link, Adapter) and link.moves is not None:
            example = _MOVABLE[link.moves]
            if not isinstance(quantizer, Quantizer):
                found, rule = "no quantizer before it", f"{link} trains the {link.moves} of a quantizer's grid"
                fix = f"put {example} before it"
            elif link.moves not in quantizer.movable:
                found = f"{quantizer} before it"
                rule = f"{link} trains {link.moves} that a grid stores as numbers, one for each block of a row"
                fix = f"use {example} in the place of {quantizer}"
        if found:
            raise ChainError(f"{link.name}, link {place + 1} of {chain}", found=found, rule=rule, fix=fix)
        if isinstance(link, OutputAdapter):
            last = link
        if link.kind != "quantizer" or quantizer is None:  # one that is kept is the base's own
            seen[link.kind] = link


def _names_quantizer(links: tuple[Link, ...]) -> bool:
    return any(link.kind == "quantizer" for link in links)


def _check_start(chain: CheckedChain, number: int, stage: Stage) -> None:
    """Raise ChainError where an adapter cannot choose its parameters together with the base."""
    link = stage.decomposing
    if link is None:
        return
    earlier = chain.quantizer if stage.quantizer is None else None
    others = [other for other in stage.adapters if other.starts != "identity"][1:]
    found = rule = fix = ""
    if others:
        found, rule = f"{others[0]} behind {link}", "one adapter of a stage decomposes the weight"
        fix = f"write {others[0].name} without its start"
    elif earlier is not None and chain.quantizer_at(number) is not None:
        found = f"a base on the grid of {earlier}, made before this stage"
        rule = "an adapter that starts from a decomposition needs the weight before it is quantized"
        fix = f"start {link.name} as the identity"
    elif stage.quantizer is None and link.starts == "quantizer":
        found, rule = "no quantizer before it in its stage", "its start makes up for the quantizer's error"
        fix = f"put {_EXAMPLES['quantizer']} before it, or use init=pissa"
    elif stage.quantizer is not None and stage.applied[-1] is not stage.quantizer:
        found = f"{stage.applied[-1].name} between {stage.quantizer.name} and it"
        rule = "an adapter that starts from a decomposition needs the pruned weight before it is quantized"
        fix = f"put {stage.applied[-1].name} before {stage.quantizer.name}"
    elif stage.pruned and all(constraint.restores != "zeros" for constraint in stage.constraints):
        found, rule = "a pruned base, and no remask", "the base keeps its zeros only where the low rank has them too"
        fix = f"add remask behind {link.name}"
    if found:
        raise ChainError(f"{link} in stage {number + 1}: {stage}", found=found, rule=rule, fix=fix)


def _check_alone(number: int, stage: Stage) -> None:
    """Raise ChainError where an adapter that moves the grid is not alone."""
    link = next((link for link in stage.adapters if link.moves is not None), None)
    if link is None:
        return
    if others := [other for other in stage.trained if other is not link]:
        raise ChainError(
            f"{link} in stage {number + 1}: {stage}",
            found=f"{others[0]} in the same stage",
            rule="a link that moves the grid must be the only trained one of its stage",
            fix=f"remove {others[0].name}, or {link.name}",
        )


def _check_stages(chain: CheckedChain) -> None:
    for number, stage in enumerate(chain.stages):
        _check_start(chain, number, stage)
        _check_alone(number, stage)
        for link in stage.trained:
            if stage.constraints and arguments(link).get("dropout"):
                raise ChainError(
                    f"{link.name} in stage {number + 1}: {stage}",
                    found=f"dropout={arguments(link)['dropout']}",
                    rule=f"{stage.constraints[0].name} projects W', and W' cannot express dropout of the input",
                    fix=f"set dropout=0 in {link.name}",
                )
        if number + 1 < len(chain.stages) and stage.missing:
            ending = " >> ".join(map(str, stage.missing))
            what = stage.missing[0].restores
            following = chain.stages[number + 1].applied[0].name
            raise ChainError(
                f"stage {number + 1} of {len(chain.stages)}: {stage}",
                found=f"{stage.breaker(what)} does not keep the base's {what}",
                rule=f"a stage must merge without loss into the base before {following} is applied",
                fix=f"add {ending} at the end of the stage: {stage} >> {ending}",
            )


def check_merge(text: str | Chain | Link) -> None:
    """Raise CannotMerge, naming the links to add, when the chain's last stage cannot be merged without loss."""
    chain = check(text)
    for link in chain:
        if not link.mergeable:
            raise CannotMerge(
                f"{link.name} in {chain}",
                found="a non-linear function of the layer's output",
                rule="only a chain that changes the weight alone can be merged",
                fix=f"keep the model unmerged and save its adapter, or remove {link.name}",
            )
    last = chain.stages[-1]
    if last.missing:
        ending = " >> ".join(map(str, last.missing))
        lost = " and ".join(link.restores for link in last.missing)
        raise CannotMerge(
            str(chain),
            found=f"{last.breaker(last.missing[0].restores)} does not keep the base's {lost}",
            rule="merging must keep the zeros and the quantization grid of the base",
            fix=f"train with {ending} at the end: {chain} >> {ending}; or call merge(lossy=True)",
        )
