"""Many adapters on one frozen backbone; whoever calls the model says which of them computes.

The choice belongs to the caller, not to the model: it is a :class:`contextvars.ContextVar`, so that threads and tasks
of asyncio do not disturb each other. Choosing sets that variable and touches no module or tensor.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autolora.adapters import Adapters, AdapterSettings, Gate, attach
from autolora.adapters.attach import fully_trained_modules, replace_modules, require_bare
from autolora.adapters.peft_format import load_peft, save_peft, tensors_in_full
from autolora.adapters.select import under
from autolora.errors import AdapterError
from autolora.multitask.slots import Blend, Choice, Member, One, PerRow, Slot, twin
from autolora.plan import RankPlan
from autolora.roles import outermost_heads

_CHOICES: ContextVar[Mapping[AdapterBank, Choice]] = ContextVar("the adapters that compute, by their bank")
_CHANGING = threading.Lock()
_NOBODY = One(Member())


class AdapterBank:
    """A model, frozen, with any number of adapters under names.

    Outside of :meth:`use`, and inside of ``use(None)``, the model computes what it did before, with its own head. Each
    adapter has a model of its own, ``bank[name].model``, whose frozen tensors are those of the one model; its LoRA
    factors and the modules that it trains in full are its own. The one model has them below it, so that ``train``,
    ``to`` and ``parameters`` reach every adapter, while an optimizer leaves those alone that have no gradient.

    Threads may compute at the same time in evaluation mode, and add and remove adapters meanwhile; a forward pass goes
    on with the adapter that it began with. A choice holds in the thread that made it: one that is started inside of
    ``use`` makes its own. Where a backward pass computes activations again (checkpointing), it has to be inside too.

    Args:
        model: without adapters. It is frozen and changed in place; what it computes is not changed.
        base_model: hub id or path of the backbone, to be written with adapters.
        task_type: PEFT's name for the task (``SEQ_CLS``), to be written with adapters.
        fresh: names of the modules and parameters that the pretrained weights lack (:class:`Backbone.fresh`).

    Raises:
        TargetError: if the model carries adapters already.
    """

    def __init__(
        self, model: nn.Module, *, base_model: str = "", task_type: str | None = None, fresh: Sequence[str] = ()
    ) -> None:
        require_bare(model)
        self.model = model.requires_grad_(False)
        self.base_model, self.task_type, self.fresh = base_model, task_type, list(fresh)
        self._originals = dict(model.named_modules(remove_duplicate=False))
        self._slots: dict[str, Slot] = {}
        self._adapters: dict[str, Adapters] = {}
        self._choices: dict[str, One] = {}
        self._holder = nn.Module()

    # Which adapters there are ----------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they came."""
        return list(self._adapters)

    def __getitem__(self, name: str) -> Adapters:
        """The handle on an adapter, as :func:`autolora.adapters.attach` and ``load_peft`` give it.

        Raises:
            AdapterError: if there is none of this name.
        """
        self._one(name)
        return self._adapters[name]

    def add(self, name: str, folder: Path | str) -> Adapters:
        """Read an adapter from a folder: ``adapter/`` of a run, or any PEFT LoRA adapter.

        Its head may have another number of labels than the model's.

        Raises:
            AdapterError: if the name is taken or none, or the adapter has trained biases, which adapters share here.
            DataError, TargetError, BackboneError: as :func:`autolora.adapters.peft_format.load_peft` has them.
        """
        self._check_new(name)
        model = self.bare()
        _make_room(model, tensors_in_full(Path(folder)))
        return self._enter(name, load_peft(model, folder))

    def add_new(
        self,
        name: str,
        plan: RankPlan,
        settings: AdapterSettings,
        *,
        like: nn.Module | None = None,
        make_gate: Callable[[str, int], Gate] | None = None,
    ) -> Adapters:
        """Make an adapter to be trained; until then it computes nothing, since B is 0.

        Args:
            name: of the adapter.
            plan: ranks over the sites of :func:`autolora.adapters.find_sites` of :meth:`bare`.
            settings: as for :func:`autolora.adapters.attach`.
            like: a model in whose state the modules trained in full begin, such as one with a head for other labels;
                by default the bank's own.
            make_gate: gate of a module from its name and rank; all ones by default.

        Raises:
            AdapterError: if the name is taken or none, or ``settings.bias`` asks for biases, which adapters share here.
            TargetError, ValueError: as :func:`autolora.adapters.attach` has them.
        """
        self._check_new(name)
        model = self.bare()
        source = model if like is None else like
        whole = fully_trained_modules(model, settings)
        replace_modules(
            model, {model.get_submodule(place): copy.deepcopy(source.get_submodule(place)) for place in whole}
        )
        return self._enter(name, attach(model, settings, plan, make_gate))

    def remove(self, name: str) -> None:
        """Forget an adapter; forward passes that use it go on to their end.

        Raises:
            AdapterError: if there is none of this name.
        """
        with _CHANGING:
            self._one(name)
            self._adapters = {key: value for key, value in self._adapters.items() if key != name}
            self._choices = {key: value for key, value in self._choices.items() if key != name}
            self._register()

    def save(self, name: str, folder: Path | str, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write an adapter as a stock PEFT adapter (:func:`autolora.adapters.peft_format.save_peft`).

        Raises:
            AdapterError: if there is none of this name.
        """
        save_peft(
            self[name],
            Path(folder),
            base_model=self.base_model,
            task_type=self.task_type,
            fresh=self.fresh,
            metadata=metadata,
        )

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """What is trained of an adapter: factors, gates, and modules trained in full.

        Raises:
            AdapterError: if there is none of this name.
        """
        adapters = self[name]
        return [*adapters.adapter_parameters(), *adapters.gate_parameters(), *adapters.head_parameters()]

    def bare(self) -> nn.Module:
        """The model as it was before it had a bank: modules of its own, with the same tensors."""
        return twin(self.model)

    # Who computes ----------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, names: str | Sequence[str | None] | None) -> Iterator[None]:
        """Inside this context the model computes with an adapter, or with one for each row of the batch.

        In a mixed batch, modules trained in full compute the rows of each adapter by themselves; where heads have
        different numbers of labels, the logits of the narrower ones are filled up with minus infinity.

        Args:
            names: one for all; ``None`` for the model without any; or a name (or ``None``) for every row.

        Raises:
            AdapterError: if there is none of a name; the message lists those that there are.
        """
        alone = names is None or isinstance(names, str)
        with self._computing(self._one(names) if alone else self._per_row(names)):  # type: ignore[arg-type]
            yield

    @contextmanager
    def blend(
        self, names: Sequence[str], weights: Tensor, heads: str | Sequence[str | None] | None = None
    ) -> Iterator[None]:
        """Inside this context the updates of several adapters are added up by weights, each row with its own.

        Args:
            names: the adapters.
            weights: ``(rows, names)``; they may have a gradient.
            heads: whose modules trained in full compute, for all rows or for each; by default the model's own.

        Raises:
            AdapterError: if there is none of a name; the message lists those that there are.
            ValueError: if the weights are not a column for each name.
        """
        if weights.dim() != 2 or weights.shape[1] != len(names):
            raise ValueError(f"weights: expected shape (rows, {len(names)}), got {tuple(weights.shape)}")
        alone = heads is None or isinstance(heads, str)
        whose = self._one(heads) if alone else self._per_row(heads)  # type: ignore[arg-type]
        with self._computing(Blend([self._one(name).member for name in names], weights, whose)):
            yield

    @contextmanager
    def _computing(self, choice: Choice) -> Iterator[None]:
        token = _CHOICES.set({**_CHOICES.get({}), self: choice})
        try:
            yield
        finally:
            _CHOICES.reset(token)

    def _chosen(self) -> Choice:
        return _CHOICES.get({}).get(self, _NOBODY)

    def _one(self, name: str | None) -> One:
        if name is None:
            return _NOBODY
        choice = self._choices.get(name)
        if choice is None:
            known = ", ".join(self._choices) or "no adapter yet"
            raise AdapterError(f"unknown adapter {name!r}: expected one of those in the bank, which has {known}")
        return choice

    def _per_row(self, names: Sequence[str | None]) -> PerRow:
        device = next(iter(self.model.parameters())).device
        rows: dict[str | None, list[int]] = {}
        for i, name in enumerate(names):
            rows.setdefault(name, []).append(i)
        groups = [(self._one(name).member, torch.tensor(where, device=device)) for name, where in rows.items()]
        return PerRow(groups, len(names), self._computing)

    # How an adapter comes in -----------------------------------------------------------------------------------------

    def _check_new(self, name: str) -> None:
        if not name or "." in name:
            raise AdapterError(f"name of an adapter: expected some text without a dot, got {name!r}")
        if name in self._adapters:
            raise AdapterError(f"there is an adapter {name!r} already: remove it first, or name this one otherwise")

    def _enter(self, name: str, adapters: Adapters) -> Adapters:
        if adapters.also_trained:
            raise AdapterError(
                f"adapter {name!r}: it has trained biases, and adapters in a bank share all that they do not have in "
                "full: train it with bias=none, or load it alone"
            )
        adapters.settle()
        with _CHANGING:
            self._check_new(name)
            for place in (*adapters.layers, *adapters.fully_trained):
                self._make_slot(place)
            for place, layer in adapters.layers.items():
                layer.casts = self._slots[place].casts
            self._adapters = {**self._adapters, name: adapters}
            self._choices = {**self._choices, name: One(Member(adapters))}
            self._register()
        return adapters

    def _make_slot(self, name: str) -> None:
        if name not in self._slots:
            original = self._originals[name]
            slot = Slot(name, original, self._chosen)
            if not self._slots:  # a child of the model itself could be taken for one of its layers
                slot.adapters = self._holder
            self._slots[name] = slot
            for parent in [*self._originals.values(), *self._slots.values()]:
                for attribute, child in parent._modules.items():
                    if child is original and parent is not slot:
                        parent._modules[attribute] = slot

    def _register(self) -> None:
        """New dictionaries in place of changed ones, so that whoever reads the old ones is not disturbed."""
        self._holder._modules = {name: adapters.model for name, adapters in self._adapters.items()}


def _make_room(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Give a twin tensors of its own in place of those that are stored in full.

    Linears of a head get as many outputs as the stored ones have. What is not in the model is left to be refused.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    heads = outermost_heads(modules)
    for key, tensor in stored.items():
        owner, _, own = key.rpartition(".")
        module = modules.get(owner, model)
        shown = module._parameters.get(own, module._buffers.get(own))
        if shown is None:
            continue
        shape = shown.shape
        if type(module) is nn.Linear and under(owner, heads) and tensor.shape[1:] == shape[1:]:
            shape, module.out_features = tensor.shape, len(tensor)
        if own in module._buffers:
            module._buffers[own] = shown.clone()
        else:
            module._parameters[own] = nn.Parameter(shown.new_empty(shape), requires_grad=False)
