"""What the launches of a layer depend on besides its inputs.

It is read at each call of each layer, in a time that the GPU may wait for. So modules are looked for only once some
have others in them, and attributes are read by few calls into C, each for all modules.
"""

import weakref
from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter, itemgetter, methodcaller
from typing import NamedTuple, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .exchange import Exchange

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_READ = itemgetter("_modules", "_parameters", "_buffers", *_HOOKS)


class NotRecordableError(Exception):
    """A call that is checkpointed as usual."""


class State(NamedTuple):
    """What the modules of a layer are, whether they train, where their tensors lie and what their adapters do. While
    that is equal, a recording does what the layer does."""

    kinds: list[type]
    training: list[bool]
    parameters: list[tuple[int, torch.dtype, bool]]
    buffers: list[tuple[int, torch.dtype]]
    adapters: list[tuple]

    @property
    def is_trained(self) -> bool:
        return any(requires_grad for _, _, requires_grad in self.parameters)


class LayerState:
    """Reads the state of a layer, which it does not keep alive."""

    def __init__(self, layer: nn.Module):
        self._layer = weakref.ref(layer)
        self._find_modules()

    def read(self) -> State:
        """The state as it is now.

        Raises:
            NotRecordableError: a module has hooks.
        """
        children, parameters, buffers, *hooks = zip(*map(_READ, self._attributes))
        if _values(children) != self._children:
            self._find_modules()
            return self.read()
        modules = [self._layer(), *self._within]
        if any(map(any, hooks)) or any("_hf_hook" in attributes for attributes in self._attributes):
            raise NotRecordableError(f"its {_name_of_hooked(modules)} has hooks, which a graph would not call")
        # Each attribute of a parameter in 4 bit would take a call of Python.
        with torch._C.DisableTorchFunctionSubclass():
            return State(
                [*map(type, modules)],
                [*map(attrgetter("training"), modules)],
                [(x.data_ptr(), x.dtype, x.requires_grad) for x in _values(parameters) if x is not None],
                [(x.data_ptr(), x.dtype) for x in _values(buffers) if x is not None],
                [*map(_adapters, self._adapters)],
            )

    @property
    def exchange(self) -> Optional[Exchange]:
        """What stands in front of the layer's experts, if ranks share them out."""
        forwards = (attributes.get("forward") for attributes in self._attributes)
        return next((forward for forward in forwards if isinstance(forward, Exchange)), None)

    def _find_modules(self) -> None:
        modules = [*self._layer().modules()]
        self._within = modules[1:]
        self._attributes = [*map(vars, modules)]
        # While these are all that those modules hold, there are no others.
        self._children = _values(module._modules for module in modules)
        self._adapters = [module for module in self._within if isinstance(module, BaseTunerLayer)]


def _name_of_hooked(modules: list[nn.Module]) -> str:
    hooks = attrgetter(*_HOOKS)
    return next(type(module).__name__ for module in modules if any(hooks(module)) or "_hf_hook" in vars(module))


def _values(mappings: Iterable[Mapping]) -> list:
    return [*chain.from_iterable(map(methodcaller("values"), filter(None, mappings)))]


def _adapters(module: BaseTunerLayer) -> tuple:
    # As tuples: PEFT changes its lists in place, and what is kept must not change with them.
    scaling = tuple(getattr(module, "scaling", {}).items())
    return tuple(module.active_adapters), tuple(module.merged_adapters), module.disable_adapters, scaling
