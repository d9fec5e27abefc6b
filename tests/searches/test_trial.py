"""Trials on one model give the bits of fresh runs, and leave nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import load_file

from dovetail.chains.notation import chain
from dovetail.checkpoint.adapter import parameters_of
from dovetail.errors import InUse, SearchError
from dovetail.files import only_writer
from dovetail.runs.flow import run
from dovetail.runs.recipe import Recipe
from dovetail.searches.trial import BASES, Workbench
from dovetail.tasks.find import load_task
from small_runs import save_labels, save_model, small_recipe

torch.set_num_threads(1)
DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
CHAINS = {
    "int": ("int(bits={}, group=16) >> lora(r={}) >> regrid", [(4, 4), (8, 2), (2, 8)]),
    "gptq": ("wanda(0.5) >> gptq(bits={}, group=16) >> dora(r={}) >> remask >> regrid", [(4, 4), (8, 2), (3, 8)]),
    "codes": ("int(bits={}, group=16) >> lora(r={}, dropout=0.1)", [(4, 4), (8, 2), (2, 8)]),
    "outlier": ("wanda(0.5, allocation=outlier) >> int(bits={}, group=8) >> lora(r={}) >> remask >> regrid",
                [(4, 4), (8, 2), (2, 8)]),
}  # fmt: skip


def recipe_of(folder, name: str, **changes) -> tuple[Recipe, dict[str, str], dict]:
    """A recipe, the layers of one candidate, and the applied links that the workbench needs."""
    text, arguments = CHAINS[name]
    common, *others = (text.format(*each) for each in arguments)
    calibration = {"samples": 16, "inputs": "original"}
    training = {"max_steps": 2, "batch_size": 8}
    given = small_recipe(folder, chain=common, merge="none", calibration=calibration, **{"train": training, **changes})
    recipe = Recipe.parse(given)
    applied = [chain(each).links[: next(i for i, link in enumerate(chain(each)) if link.differentiable)]
               for each in (common, *others)]  # fmt: skip
    return recipe, {DOWN: others[0], QUERY: others[1]}, applied


def bench_of(recipe: Recipe, applied, **settings) -> Workbench:
    task = load_task(recipe.data)
    task = task if "validation" in task.splits else type(task)(
        task.name, task.kind, task.metric, {**task.splits, "validation": task.split("test")}
    )  # fmt: skip
    empty = Workbench(recipe, task, **settings) if applied is None else None
    return empty or Workbench(recipe, task, applied=dict.fromkeys(LAYERS, applied), **settings)


LAYERS = [
    f"model.layers.{block}.{name}_proj"
    for block in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def watched(bench: Workbench) -> list[dict[str, torch.Tensor]]:
    """The trained parameters of each trial from now on."""
    seen, score = [], bench.score

    def and_look() -> float:
        seen.append({key: value.detach().clone() for key, value in parameters_of(bench.model).items()})
        return score()

    bench.score = and_look  # type: ignore[method-assign]
    return seen


def expect_equal(seen: dict[str, torch.Tensor], folder) -> None:
    stored = {k: v for k, v in load_file(folder / "adapter.safetensors").items() if k.startswith(("link/", "head/"))}
    assert seen.keys() == stored.keys()
    assert all(torch.equal(seen[key], stored[key]) for key in stored)


@pytest.mark.parametrize(("name", "changes"), [
    *[(name, {}) for name in CHAINS], ("int", {"train": {"max_steps": 2, "batch_size": 8, "bf16": True}}),
])  # fmt: skip
def test_a_trial_is_a_run_of_its_recipe(tmp_path, name, changes):
    recipe, layers, applied = recipe_of(tmp_path, name, **changes)
    bench = bench_of(recipe, applied)
    seen = watched(bench)
    trials = [bench.trial(each) for each in (layers, {}, layers)]
    assert (trials[0].score, trials[0].loss) == (trials[2].score, trials[2].loss)
    assert all(torch.equal(seen[0][key], seen[2][key]) for key in seen[0])
    report = run(recipe.model_copy(update={"layers": layers}), output=tmp_path / "run", progress=False)
    expect_equal(seen[0], tmp_path / "run" / "adapter")
    assert trials[0].loss == report.training[0].losses[-1][1]
    assert trials[0].footprint.nbytes == report.row("tuned").footprint.nbytes
    assert trials[0].score == report.row("tuned").metrics["sums"]["exact_match"]
    assert trials[0].footprint.trainable_parameters == report.footprint.trainable_parameters


def test_a_candidate_may_start_from_the_weights_where_the_recipe_starts_from_codes(tmp_path):
    recipe, layers, applied = recipe_of(tmp_path, "int")
    recipe = recipe.model_copy(update={"chain": recipe.chain.replace("regrid", "regrid(start=codes)")})
    bench = bench_of(recipe, applied, starts=True)
    seen = watched(bench)
    bench.trial(layers)
    run(recipe.model_copy(update={"layers": layers}), output=tmp_path / "run", progress=False)
    expect_equal(seen[0], tmp_path / "run" / "adapter")
    with pytest.raises(SearchError, match="starts=True"):
        bench_of(recipe, applied).trial(layers)


def test_a_head_is_put_back(tmp_path):
    recipe = Recipe.parse({
        "model": str(save_model(tmp_path / "base", labels=2)), "chain": "int(bits=4, group=16) >> lora(r=2)",
        "data": save_labels(tmp_path), "train": {"max_steps": 2, "batch_size": 8}, "merge": "none",
    })  # fmt: skip
    bench = Workbench(recipe, load_task(recipe.data))
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    seen = watched(bench)
    bench.trial({}), bench.trial({})
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    assert not torch.equal(seen[0]["head/classifier.weight"], before["classifier.weight"])
    after = bench.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    run(recipe, output=tmp_path / "run", progress=False)
    expect_equal(seen[0], tmp_path / "run" / "adapter")


def test_a_candidate_is_its_quantized_model_before_training(tmp_path):
    recipe, layers, applied = recipe_of(tmp_path, "int")
    bench = bench_of(recipe, applied)
    ids = bench.batches[0]["input_ids"]
    quantized = Recipe.parse({**recipe.model_dump(mode="json"), "chain": "int(bits=4, group=16)", "layers": {
        name: text.split(" >> ")[0] for name, text in layers.items()}})  # fmt: skip
    plain = bench_of(quantized.model_copy(update={"chain": "int(bits=4, group=16) >> lora(r=1)", "layers": {
        name: f"{text} >> lora(r=1)" for name, text in quantized.layers.items()}}), applied)  # fmt: skip
    with torch.no_grad(), bench.candidate(layers) as one, plain.candidate({}) as other:
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_trials_keep_no_memory(tmp_path):
    recipe, layers, applied = recipe_of(tmp_path, "int", train={"max_steps": 1, "batch_size": 8})
    bench = bench_of(recipe, applied, samples=2)

    def live() -> tuple[int, int]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        return len(tensors), sum(each.nbytes for each in tensors)

    bench.trial(layers)
    before = live()
    for number in range(4):
        bench.trial(layers if number % 2 else {})
    assert live() == before


def test_bases_beyond_the_budget_are_mapped_from_a_file(tmp_path):
    recipe, layers, applied = recipe_of(tmp_path, "gptq")
    whole = bench_of(recipe, applied, samples=4)
    mapped = bench_of(recipe, applied, samples=4, folder=tmp_path / "cache", cache_nbytes=20_000)
    assert (tmp_path / "cache" / BASES).stat().st_size > 20_000
    one, other = watched(whole), watched(mapped)
    assert whole.trial(layers).score == mapped.trial(layers).score
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])


def test_rungs_go_on_from_their_checkpoints(tmp_path):
    recipe, layers, applied = recipe_of(tmp_path, "int", train={"max_steps": 3, "batch_size": 8})
    bench = bench_of(recipe, applied, samples=4)
    seen = watched(bench)
    rungs = [bench.trial(layers, steps, folder=tmp_path / "kept") for steps in (1, 2, 3)]
    assert [trial.steps for trial in rungs] == [1, 2, 3]
    again = bench.trial(layers, 3, folder=tmp_path / "kept")  # finished already
    whole = bench.trial(layers)
    assert whole.loss == rungs[2].loss == again.loss
    assert all(torch.equal(seen[2][key], seen[4][key]) for key in seen[2])
    repeated = bench.trial(layers, 2, folder=tmp_path / "kept")  # from the start: later steps are no beginning
    assert (repeated.steps, repeated.loss) == (2, rungs[1].loss)
    assert bench.trial(layers, 2).loss == repeated.loss
    bench.trial(layers, 1, folder=tmp_path / "killed")  # killed before its result was known
    assert bench.trial(layers, 1, folder=tmp_path / "killed").loss == rungs[0].loss
    with only_writer(tmp_path / "killed-trial"), pytest.raises(InUse, match="one writer"):
        bench.trial(layers, 2, folder=tmp_path / "killed")


def test_scores_are_taken_on_the_dense_model_with_its_adapters(tmp_path):
    recipe, _, applied = recipe_of(tmp_path, "gptq")
    bench = bench_of(recipe, applied)
    weight = bench.base(DOWN, ()).dense.clone()
    with bench.tuned(3) as model:
        layer = model.get_submodule(DOWN)
        assert torch.equal(layer.base.dense, weight)
        assert [state.link.name for state in layer.states] == ["dora"]
    assert not bench.model.get_submodule(DOWN).states


def test_what_a_workbench_cannot_do_is_refused(tmp_path):
    recipe, layers, applied = recipe_of(tmp_path, "gptq")
    text = recipe.chain.replace("wanda(0.5)", "wanda(0.4)")
    with pytest.raises(SearchError, match="links before gptq must be the same for all candidates"):
        bench_of(recipe, [*applied, chain(text).links[:2]])
    bench = bench_of(recipe, applied[:1])
    with pytest.raises(SearchError, match="of its workbench only"):
        bench.trial(layers)
    assert not bench.model.get_submodule(DOWN).states
    stages = {**recipe.model_dump(mode="json"), "chain": "lora >> magnitude(0.5) >> lora >> remask"}
    with pytest.raises(SearchError, match="2 stages"):
        bench_of(Recipe.parse(stages), None)
