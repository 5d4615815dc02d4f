"""Put adapters into a model, take them out again, and handle them together."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from autolora.adapters.gates import FixedGate, Gate, LearnedGate
from autolora.adapters.layer import Init, LoRALinear
from autolora.adapters.linear_like import site_of
from autolora.adapters.quantized import count_weights
from autolora.adapters.select import ALL_LINEAR, Targets, match_modules, match_ranks, select, under
from autolora.adapters.shared import share_inputs
from autolora.errors import PlanError, TargetError
from autolora.plan import RankPlan, Site
from autolora.roles import outermost_heads


@dataclass(frozen=True)
class AdapterSettings:
    """Everything about adapters that is the same for every strategy.

    Args:
        targets: which modules.
        scale: s, one number for all modules and ranks.
        init, init_std: how A starts (:func:`autolora.adapters.layer.init_a`).
        dropout: on the adapter's input.
        learn_scale: make s a parameter of each module.
        fan_in_fan_out: layout of square weights of custom modules, which cannot be told from their shape; ``(out, in)``
            by default.
        rank_pattern: maximum rank by module name or pattern, in place of the general one; the first that matches.
        modules_to_save: modules trained in full; the classification head by default.
        bias: which biases are trained: none, all, or those of adapted modules.
        rank_multiple: the ranks that a budget buys are multiples of this.
        prices, unit: what the ranks 0, 1, 2, ... of every module cost, by its name, and in what, where the budget does
            not count parameters (:mod:`autolora.adapters.prices`).
        seed: of the adapters' own random stream.
    """

    targets: Targets = field(default_factory=Targets)
    scale: float = 2.0
    init: Init = "kaiming"
    init_std: float = 0.02
    dropout: float = 0.0
    learn_scale: bool = False
    fan_in_fan_out: bool | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_multiple: int = 1
    prices: Mapping[str, tuple[int, ...]] | None = None
    unit: str = "parameters"
    seed: int = 0


def stream(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for ``name``: what one module draws does not depend on which others are adapted."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Adapters:
    """Handle on the adapters of one model: a name for each, and operations on all of them.

    Made by :func:`attach`. ``layers`` maps module names to :class:`LoRALinear`; ``sites`` maps every module that was
    selected, rank 0 included, to its shape.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        layers: dict[str, LoRALinear],
        fully_trained: Sequence[str],
        also_trained: Sequence[nn.Parameter],
    ) -> None:
        self.model = model
        self.sites = dict(sites)
        self.layers = layers
        self.fully_trained = list(fully_trained)
        self.also_trained = list(also_trained)
        self._requires_grad = [(p, p.requires_grad) for p in model.parameters()]
        self._truncations: dict[tuple[int, int, torch.device], FixedGate] = {}
        self._freeze()
        self._pristine = self._copy_of_what_training_changes()
        for layer in layers.values():
            layer.train(layer.base_layer.training)
        replace_modules(model, {layer.base_layer: layer for layer in layers.values()})
        assert all(model.get_submodule(name) is layer for name, layer in layers.items())
        share_inputs(layers)

    # What is trained -------------------------------------------------------------------------------------------------

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A and B (and s where it is learned) of every module, and what is trained besides: biases, most often."""
        own = [p for layer in self.layers.values() for p in layer.parameters(recurse=False)]
        return own + self.also_trained

    def kept(self) -> list[Tensor]:
        """What is written of an adapter besides the head: its parameters, less what a method throws away."""
        return [p.detach() for p in self.adapter_parameters()]

    def gate_parameters(self) -> list[nn.Parameter]:
        """The selector logits of every module."""
        return [p for layer in self.layers.values() for p in layer.gate.parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the fully trained modules."""
        modules = [self.model.get_submodule(name) for name in self.fully_trained]
        return [p for module in modules for p in module.parameters()]

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies of everything that training can change, by name.

        These are the trainable parameters, gates (masks, and whether they learn), and buffers of fully trained modules.
        """
        state = self.model.state_dict(keep_vars=True)
        return {name: state[name].detach().clone() for name in self._trainable_names(state)}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`trainable_state` gave, also if adapters have been compacted since they were attached.

        A module that the state knows with fewer components, or not at all, is cut down to that: A and B are new
        parameters then, so an optimizer is made afterwards.

        Raises:
            ValueError: if the state is of another model or of larger ranks.
        """
        self._cut_down_to(state)
        here = self.model.state_dict(keep_vars=True)
        missing = [name for name in self._trainable_names(here) if name not in state]
        unexpected = [name for name in state if name not in here]
        other = [name for name in state if name in here and here[name].shape != state[name].shape]
        faults = {"lacks": missing, "has, but the model lacks,": unexpected, "has in another shape": other}
        if any(faults.values()):
            text = "; it ".join(f"{what} {', '.join(names[:5])}" for what, names in faults.items() if names)
            raise ValueError(f"the state does not fit the model (same targets, ranks and gates expected): it {text}")
        self.model.load_state_dict(dict(state), strict=False)

    def _cut_down_to(self, state: Mapping[str, Tensor]) -> None:
        """Fewer components where the state has fewer; a state that knows other modules is left to be refused."""
        known = {key.removesuffix(".lora_A"): len(tensor) for key, tensor in state.items() if key.endswith(".lora_A")}
        gone = dict.fromkeys(name for name in self.layers if name not in known)
        names = {f"{name}.gate.mask" for name in self.layers}
        for key in self.model.state_dict():
            owner, inner, own = key.partition(".base_layer.")
            names.add(f"{owner}.{own}" if inner and owner in gone else key)
        if not set(state) <= names:
            return
        self.remove(*gone)
        for name, layer in self.layers.items():
            rank = min(known[name], layer.rank)
            if f"{name}.gate.mask" in state and (rank < layer.rank or isinstance(layer.gate, LearnedGate)):
                layer.lora_A = nn.Parameter(layer.lora_A.detach()[:rank].clone())
                layer.lora_B = nn.Parameter(layer.lora_B.detach()[:, :rank].clone())
                layer.gate = FixedGate(rank).to(layer.lora_A.device)

    def _trainable_names(self, state: Mapping[str, Tensor]) -> list[str]:
        owners = [*(f"{name}.gate" for name in self.layers), *self.fully_trained]
        return [name for name, value in state.items() if value.requires_grad or under(name, owners)]

    def count(self) -> dict[str, int]:
        """Parameters: ``adapter`` (A and B), ``added`` (scales that are learned), ``own`` (what is trained of the model
        itself besides the head, biases most often), ``gate``, ``head``, all ``trainable`` ones, and ``total`` (with
        adapters).
        """
        scales = [layer.scale for layer in self.layers.values() if isinstance(layer.scale, nn.Parameter)]
        return {
            "adapter": sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in self.layers.values()),
            "added": _numel(scales),
            "own": _numel(self.also_trained),
            "gate": _numel(self.gate_parameters()),
            "head": _numel(self.head_parameters()),
            "trainable": _numel(p for p in self.model.parameters() if p.requires_grad),
            "total": count_weights(self.model),
        }

    def summary(self) -> str:
        """One line: ``trainable parameters: a of b (c %)``."""
        count = self.count()
        share = 100 * count["trainable"] / max(1, count["total"])
        return f"trainable parameters: {count['trainable']:,} of {count['total']:,} ({share:.2f} %)"

    # Ranks -----------------------------------------------------------------------------------------------------------

    def attached_plan(self) -> RankPlan:
        """The rank that each module physically has."""
        return RankPlan(self.sites, {name: layer.rank for name, layer in self.layers.items()})

    def active_plan(self) -> RankPlan:
        """The rank that each module has at evaluation: components whose gate is not zero."""
        gates = [layer.gate.evaluation_gate() != 0 for layer in self.layers.values()]
        counts = torch.stack([gate.sum() for gate in gates]).tolist() if gates else []
        return RankPlan(self.sites, dict(zip(self.layers, counts, strict=True)))

    @torch.no_grad()
    def mean_gate(self) -> float | None:
        """The mean :meth:`LearnedGate.level` of all components whose gate learns; ``None`` where none does."""
        gates = [layer.gate for layer in self.layers.values()]
        levels = [gate.level() for gate in gates if isinstance(gate, LearnedGate) and gate.learning]
        return float(torch.cat(levels).mean()) if levels else None

    def fix_gates(self, masks: Mapping[str, Tensor]) -> None:
        """End selection: gate every module with a 0/1 mask; one that is left out is switched off.

        Learned gate values go into B (:meth:`LoRALinear.fix_gate`).

        Raises:
            ValueError: if a mask is of a module without an adapter, or of another rank.
        """
        unknown = [name for name in masks if name not in self.layers]
        if unknown:
            raise ValueError(f"masks: expected modules that have an adapter, got {', '.join(unknown[:5])}")
        for name, layer in self.layers.items():
            layer.fix_gate(masks.get(name, torch.zeros(layer.rank)))

    def keep_first(self, plan: RankPlan) -> None:
        """Fix the gates so that each module uses only its first components, as many as the plan says.

        Raises:
            PlanError: if the plan gives a module more components than it has.
        """
        self._check(plan)
        self.fix_gates({name: _first(layer, plan[name]) for name, layer in self.layers.items()})

    @contextmanager
    def masked(self, plan: RankPlan) -> Iterator[None]:
        """Inside this context each module uses only its first components, as many as the plan says.

        A search measures plans this way. The components count with weight 1, whatever a selector thinks of them.

        Raises:
            PlanError: if the plan gives a module more components than it has.
        """
        self._check(plan)
        gates = {name: layer.gate for name, layer in self.layers.items()}
        with self._unmerged():
            try:
                for name, layer in self.layers.items():
                    layer.gate = self._first_components(layer, plan[name])
                yield
            finally:
                for name, layer in self.layers.items():
                    layer.gate = gates[name]

    def _first_components(self, layer: LoRALinear, rank: int) -> FixedGate:
        """A gate that is open for the first components, made once for all modules of this size."""
        key = layer.rank, rank, layer.lora_A.device
        if key not in self._truncations:
            self._truncations[key] = FixedGate(layer.rank, _first(layer, rank)).to(layer.lora_A.device)
        return self._truncations[key]

    def _check(self, plan: RankPlan) -> None:
        lacking = [name for name, rank in plan.items() if rank > (self.layers[name].rank if name in self.layers else 0)]
        if lacking:
            raise PlanError(f"the plan has more components than are attached at {', '.join(lacking[:5])}")

    # The whole model -------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Add every update to its base weight."""
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        """Put every base weight back, bit for bit."""
        for layer in self.layers.values():
            layer.unmerge()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside this context a forward pass is that of the bare model: updates are part of the weights.

        Only of weights of at least the precision of A and B, in which nothing but a rounding of the sum is lost.
        """
        merged = [layer for layer in self.layers.values() if not layer.merged and layer.merges_precisely]
        for layer in merged:
            layer.merge()
        try:
            yield
        finally:
            for layer in merged:
                layer.unmerge()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside this context the adapters contribute nothing, merged ones included."""
        before = {layer: layer.enabled for layer in self.layers.values()}
        with self._unmerged():
            try:
                for layer in before:
                    layer.enabled = False
                yield
            finally:
                for layer, enabled in before.items():
                    layer.enabled = enabled

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        merged = [layer for layer in self.layers.values() if layer.merged]
        for layer in merged:
            layer.unmerge()
        try:
            yield
        finally:
            for layer in merged:
                layer.merge()

    def remove(self, *names: str) -> None:
        """Put the original modules back in place of these adapters; the modules then have rank 0."""
        layers = [self.layers.pop(name) for name in names]
        for layer in layers:
            layer.unmerge()
        replace_modules(self.model, {layer: layer.base_layer for layer in layers})
        share_inputs(self.layers)

    def detach(self) -> nn.Module:
        """Remove every adapter and restore what was trained: the model as it was, bit for bit."""
        self.remove(*self.layers)
        with torch.no_grad():
            for key, tensor in self._pristine.items():
                module, _, attribute = key.rpartition(".")
                getattr(self.model.get_submodule(module), attribute).copy_(tensor)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        return self.model

    def settle(self) -> None:
        """Throw away the copies that :meth:`detach` restores from; what was trained then stays when it is called."""
        self._pristine, self._requires_grad = {}, []

    def _freeze(self) -> None:
        """Leave trainable only the fully trained modules and what is trained besides."""
        self.model.requires_grad_(False)
        for name in self.fully_trained:
            self.model.get_submodule(name).requires_grad_(True)
        for parameter in self.also_trained:
            parameter.requires_grad_(True)

    def _copy_of_what_training_changes(self) -> dict[str, Tensor]:
        """Trainable parameters of the model itself, and all buffers, which a forward pass may update.

        By name, because moving a model to another device makes new buffers.
        """
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: t.detach().clone() for name, t in (trained | dict(self.model.named_buffers())).items()}


def fully_trained_modules(model: nn.Module, settings: AdapterSettings) -> list[str]:
    """Names of the modules trained in full: ``modules_to_save``, or every classification head.

    Raises:
        TargetError: if a name of ``modules_to_save`` matches nothing.
    """
    if settings.modules_to_save is not None:
        return match_modules(model, settings.modules_to_save, "modules_to_save")
    frozen = token_heads(model)
    return [name for name in outermost_heads(name for name, _ in model.named_modules()) if name not in frozen]


def token_heads(model: nn.Module) -> list[str]:
    """Names of the heads that predict tokens; empty for a classifier.

    They are pretrained, as large as the embeddings and often tied to them: frozen, and no module of "all-linear".
    """
    of_tokens = getattr(model, "get_output_embeddings", lambda: None)()  # as models of transformers have it
    names = [name for name, module in model.named_modules() if module is of_tokens]
    heads = outermost_heads(name for name, _ in model.named_modules())
    return [next((head for head in heads if under(name, [head])), name) for name in names]


def require_bare(model: nn.Module) -> None:
    """Refuse a model with adapters of ours.

    Raises:
        TargetError: if it carries any.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise TargetError("the model already carries adapters; detach them first")


def find_sites(model: nn.Module, settings: AdapterSettings) -> dict[str, Site]:
    """Every module that the settings select for an adapter, with its shape and what its ranks cost, in model order.

    Raises:
        TargetError: if nothing is selected, a pattern matches nothing, or the model carries adapters already.
    """
    require_bare(model)
    left_alone = fully_trained_modules(model, settings)
    if settings.targets.targets == ALL_LINEAR:
        left_alone += token_heads(model)
    names = select(model, settings.targets, left_alone)
    sites = {name: site for name in names if (site := site_of(model.get_submodule(name))) is not None}
    prices = settings.prices or {}
    return {
        name: replace(site, multiple=settings.rank_multiple, prices=prices.get(name), unit=settings.unit)
        for name, site in sites.items()
    }


def largest_plan(sites: Mapping[str, Site], settings: AdapterSettings, max_rank: int) -> RankPlan:
    """``max_rank`` (or the rank of ``rank_pattern``) for every site, clipped to min(in, out) with a warning.

    Where ranks come in multiples, it is the multiple below.

    Raises:
        TargetError: if a pattern of ``rank_pattern`` matches none of the sites.
        PlanError: if a rank is negative.
    """
    ranks = match_ranks(list(sites), settings.rank_pattern, max_rank)
    clipped = [name for name, rank in ranks.items() if rank > sites[name].full_rank]
    if clipped:
        first = clipped[0]
        warnings.warn(
            f"the rank of {len(clipped)} of {len(sites)} modules is clipped to min(in, out): "
            f"{first} from {ranks[first]} to {sites[first].full_rank}{', ...' if len(clipped) > 1 else ''}",
            stacklevel=2,
        )
    highest = {name: min(rank, sites[name].full_rank) for name, rank in ranks.items()}
    return RankPlan(sites, {name: rank - rank % sites[name].multiple for name, rank in highest.items()})


def attach(
    model: nn.Module,
    settings: AdapterSettings,
    plan: RankPlan,
    make_gate: Callable[[str, int], Gate] | None = None,
) -> Adapters:
    """Freeze a model and put an adapter on every module that has a rank in the plan.

    The model is changed in place; what it computes is not, since B starts at 0. Modules of rank 0 are left as they are,
    and a module that the model holds under two names is adapted once, for both.

    Args:
        model: any model with linear-like modules.
        settings: what is the same for every strategy.
        plan: ranks over the sites of :func:`find_sites`.
        make_gate: gate of a module from its name and rank; all ones by default.

    Raises:
        TargetError: if a name of ``modules_to_save`` matches nothing.
        ValueError: if a module of the plan is not linear-like, or has an adapter already.
    """
    layers = {}
    for name, rank in plan.items():
        if rank:
            layers[name] = LoRALinear(
                model.get_submodule(name),
                rank,
                scale=settings.scale,
                gate=make_gate(name, rank) if make_gate else None,
                init=settings.init,
                init_std=settings.init_std,
                dropout=settings.dropout,
                learn_scale=settings.learn_scale,
                fan_in_fan_out=settings.fan_in_fan_out,
                generator=stream(settings.seed, name),
            )
    heads = fully_trained_modules(model, settings)
    return Adapters(model, plan.sites, layers, heads, _trained_biases(model, settings.bias, layers, heads))


def _trained_biases(
    model: nn.Module, bias: str, adapted: Mapping[str, LoRALinear], fully_trained: Sequence[str]
) -> list[nn.Parameter]:
    if bias == "none":
        return []
    named = [(*name.rpartition("."), p) for name, p in model.named_parameters()]
    biases = [(owner, p) for owner, _, own, p in named if own == "bias" or own.endswith("_bias")]
    return [p for owner, p in biases if not under(owner, fully_trained) and (bias == "all" or owner in adapted)]


def _first(layer: LoRALinear, rank: int) -> Tensor:
    """A 0/1 mask of the first components."""
    return (torch.arange(layer.rank) < rank).float()


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def replace_modules(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> None:
    """Put the successor of a module wherever the model holds it, except inside the successor; one walk for all."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in successors and successors[child] is not parent:
                setattr(parent, name, successors[child])
