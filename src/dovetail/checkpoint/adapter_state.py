"""What a model's adapter is at the moment: its live tensors by the keys of a saved one, and putting a model back."""

from __future__ import annotations

from torch import Tensor, nn

from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.linear import chain_layers
from dovetail.models.targets import new_heads


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's file holds under link/ and head/: the live tensors by their keys."""
    found: dict[str, Tensor] = {}
    for name, layer in chain_layers(model).items():
        for place, state in enumerate(layer.states):
            found |= {f"link/{name}/{place}/{key}": p for key, p in state.named_parameters(recurse=False)}
    return found | {f"head/{name}": parameter for name, parameter in beside(model).items()}


def beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside the chain that belong to its adapter: those that are trained, and a classifier's head
    and pooler, which the base's fingerprint leaves out."""
    inside = {id(p) for layer in chain_layers(model).values() for p in layer.parameters()}
    paths = tuple(f"{path}." for path in new_heads(model))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and (parameter.requires_grad or name.startswith(paths))
    }


class Before:
    """A model as it is now: its modules, which tensors its parameters hold, and of a chain that it carries what the
    adapter's tensors are. Holds weights that a chain lets go."""

    def __init__(self, model: nn.Module) -> None:
        layers = chain_layers(model)
        self._modules = [(parent, dict(parent._modules)) for parent in model.modules()]
        self._parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
        self._states = [(layer, layer.states, [state.rank for state in layer.states]) for layer in layers.values()]
        self._values = [(t, t.detach().clone()) for t in parameters_of(model).values()] if layers else []
        self._record = applied(model) if layers else None
        self._seed = self._record.seed if self._record is not None else 0

    def put_back(self) -> None:
        """Undoes whatever chains were put on the model since, and adapters on the chain that it carries."""
        for parent, children in self._modules:
            parent._modules.update(children)
        for parameter, data, requires_grad in self._parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for layer, states, ranks in self._states:
            if layer.states is not states:
                layer.set_links(states, layer.path)
            for state, rank in zip(states, ranks, strict=True):
                if rank is not None:
                    state.use_rank(rank)
        for tensor, value in self._values:
            tensor.data.copy_(value)
        if self._record is not None:
            self._record.seed = self._seed
