"""Any strategy in the Trainer of transformers, by a callback.

Like this::

    callback = AutoLoRACallback("autolora", budget=4)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()                  # ranks are learned; the model ends with the compact adapter
    trainer.save_model("my-adapter") # as stock PEFT reads it; callback.plan has the ranks

The Trainer's own arguments say the rest: learning rate and schedule, weight decay, clipping, accumulation, seeds.

What a callback is told does not suffice for the loop of :mod:`autolora.strategies.base`, so methods of the trainer at
hand (never of its class) are wrapped once it has been made:

=========================  ============================================================================================
``create_optimizer``       callbacks hear of the optimizer when parameter groups and rates are settled, and before that
                           a strategy has to see training data
``compute_loss``           a callback never sees the loss; a penalty, and a strategy that trains several plans at once,
                           have to be in what is differentiated
``training_step``          the batch, for held-out steps; the moment when gradients are complete and not yet clipped,
                           which is before ``on_pre_optimizer_step``; and to report the loss without the penalty
``log``                    reporting callbacks are asked before others
``_save``                  ``save_pretrained`` of a model with adapters inside would write something that nobody reads
``_load_from_checkpoint``  as would its counterpart; ranks may have changed since training began
=========================  ============================================================================================

Callbacks are not told who calls them either: :func:`_calling_trainer` finds out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Subset

from autolora.adapters import Adapters, AdapterSettings, compact
from autolora.adapters.attach import stream
from autolora.adapters.whole import WholeModel
from autolora.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from autolora.integrations.hf_files import load_state, save_adapter, save_state
from autolora.parts import say
from autolora.plan import Budget, RankPlan
from autolora.run import check_budget, check_plan
from autolora.strategies import make_strategy
from autolora.strategies.base import Batch, GroupRates, Rates, Strategy
from autolora.strategies.outside import ByPeft
from autolora.validate import require_strategy

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("the Trainer of transformers needs accelerate: pip install 'autolora[trainer]'") from error

WRAPPED = ("create_optimizer", "compute_loss", "training_step", "log", "_save", "_load_from_checkpoint")


class AutoLoRACallback(TrainerCallback):
    """Runs a strategy inside ``Trainer.train()``: nothing of it has to be called.

    The model is frozen and gets its adapters when the Trainer is made. Heads of classifiers are trained in full, heads
    that predict tokens stay as they are. When training ends, the strategy settles its plan within the budget, and what
    it does not use is removed: evaluation from then on is of the compact model. The Trainer's checkpoints can be
    resumed from. One process and one device; one call of ``train()``.

    Args:
        strategy: name of a strategy (``conf/strategy``), but PEFT's own: ``prompt``, ``prefix``, ``ia3``.
        options: the strategy's own, as in its YAML file.
        budget: a number means as many adapter parameters as uniform ranks of that size; ``None`` is no budget. Methods
            outside LoRA have none.
        max_rank: the largest rank of any module.
        heldout: rows for what is not learned from training rows (selectors of bilevel methods, growth, the comparison
            of plans by loss): a data set, or the share that is taken out of ``train_dataset``. Not the rows that the
            result will be reported on.
        settings: what is the same for every strategy; the Trainer's seed is its default seed.
        rates: learning rates; by default ``learning_rate`` and ``weight_decay`` of the Trainer's arguments for adapters
            and head, and the strategy's own for its selectors.

    Attributes:
        strategy: from the making of the Trainer on, with ``strategy.adapters``.
        plan: the ranks, when training has ended; ``None`` before.

    Raises:
        ImportError: where accelerate is missing, which the Trainer needs.
        ConfigError: for a strategy or an option that does not exist; and, when the Trainer is made, for arguments of it
            that do not go together with ranks that change.
    """

    strategy: Strategy[Any]
    heldout: Any
    plan: RankPlan | None = None

    def __init__(
        self,
        strategy: str = "autolora",
        *,
        options: Mapping[str, Any] | None = None,
        budget: float | Budget | None = 4.0,
        max_rank: int = 16,
        heldout: Any = 0.1,
        settings: AdapterSettings | None = None,
        rates: Rates | None = None,
    ) -> None:
        config = require_strategy({"name": strategy, **(options or {})})
        self.name, self.settings, self.rates = strategy, settings, rates
        self.about = config.model_dump(mode="json")
        self.strategy = make_strategy(strategy, config.options, budget=_budget(budget), max_rank=max_rank)
        if isinstance(self.strategy, ByPeft):
            raise ConfigError(
                f"strategy={strategy} is PEFT's own: give the Trainer what peft.get_peft_model makes of it"
            )
        if getattr(config.options, "objective", "loss") != "loss":
            raise ConfigError("objective: the Trainer has a loss for every model, a metric not: expected loss")
        if isinstance(heldout, int | float) and not 0 < heldout <= 0.5:
            raise ConfigError(f"heldout: expected a data set, or a share above 0 and up to 0.5, got {heldout}")
        self._heldout_wanted = heldout
        self.trainer: Any = None
        self._original: dict[str, Callable[..., Any]] = {}
        self._resumed: dict[str, Any] | None = None
        self._begun = self._stepping = False
        self._penalty: Tensor | float = 0.0
        self._taken = 0  # held-out batches
        self._scored: list[Batch] = []

    @property
    def adapters(self) -> Adapters:
        """The adapters, once the Trainer is made."""
        return self.strategy.adapters

    def save(self, directory: str | Path) -> None:
        """Write the adapter as it is evaluated now, as stock PEFT reads it, beside whatever the folder holds."""
        save_adapter(self.adapters, Path(directory), {"strategy": self.name, "budget": self.strategy.allowance})

    # What the Trainer calls ------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer is made: put the adapters in, set rows aside, and wrap what callbacks do not reach."""
        if self.trainer is not None:
            raise ConfigError("AutoLoRACallback: expected a new one for each Trainer")
        trainer: Any = _calling_trainer(self)
        _require_plain(trainer, self.strategy)
        self.heldout = self._heldout_wanted
        if isinstance(self.heldout, int | float):
            seed = args.seed if args.data_seed is None else args.data_seed
            trainer.train_dataset, self.heldout = _set_aside(trainer.train_dataset, self.heldout, seed)
        self.strategy.attach(trainer.model, self.settings or AdapterSettings(seed=args.seed))
        check_budget(self.strategy)
        own = GroupRates(args.learning_rate, args.weight_decay)
        self.rates = self.rates or Rates(adapter=own, gate=GroupRates(None), head=own)
        self.trainer = trainer
        for name in WRAPPED:
            self._original[name] = getattr(trainer, name)
            setattr(trainer, name, getattr(self, "_" + name.lstrip("_")))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to be there in vain."""
        if self.trainer is None:
            raise ConfigError(
                "AutoLoRACallback: expected in Trainer(..., callbacks=[callback]), which puts the adapters in; "
                "add_callback is too late"
            )

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first batch of a step is to come; rates that a strategy wants constant are, under any schedule."""
        self._first = True
        for group in self.trainer.optimizer.param_groups:
            if group.get("constant"):
                group["lr"] = group["initial_lr"]

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has made its step, which the Trainer has not counted yet."""
        step, optimizer = self.trainer.state.global_step + 1, self.trainer.optimizer
        self.strategy.after_step(step, getattr(optimizer, "optimizer", optimizer))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Settle the plan, and remove what it does not use."""
        plan = self.strategy.finalize(self._score)
        check_plan(self.strategy, plan)
        self.strategy.compare(self._score)
        compact(self.adapters)
        self.plan = plan
        for note in self.strategy.notes:
            say(f"note: {note}")

    # What is wrapped -------------------------------------------------------------------------------------------------

    def _create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The user's kind of optimizer, over the strategy's parameter groups."""
        if self._begun:
            raise ConfigError("AutoLoRACallback: expected one call of train(); make model, Trainer and callback anew")
        self._begun = True
        trainer, steps = self.trainer, self.trainer.state.max_steps
        self._heldout = self._endless()
        if self._resumed is None:
            trainer.model.train()
            self.strategy.prepare(self._batches(trainer.train_dataset), self._loss)
        optimizer: Optimizer = self._original["create_optimizer"](model)
        self._group(optimizer, steps)
        self.strategy.begin(steps, optimizer)
        if self._resumed is not None:
            self._restore(self._resumed, steps)
            self._group(optimizer, steps)
        return optimizer

    def _group(self, optimizer: Optimizer, steps: int) -> None:
        optimizer.param_groups.clear()
        for group in self.strategy.param_groups(self.rates, steps):  # type: ignore[arg-type]
            optimizer.add_param_group(group | ({"initial_lr": group["lr"]} if group.get("constant") else {}))

    def _training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """A batch: the held-out step before the first of a step, what the strategy does with gradients after the last.

        Returns:
            The task's loss as the Trainer reports it.
        """
        if self.strategy.wants_heldout and self._first:
            self._taken += 1
            heldout = self.trainer._prepare_inputs(next(self._heldout))
            model.train()
            self.strategy.heldout_step(self.trainer._prepare_inputs(inputs), heldout, self._loss)
        self._first, self._penalty = False, 0.0
        self._stepping = True
        try:
            loss = self._original["training_step"](model, inputs, num_items_in_batch)
        finally:
            self._stepping = False
        if self.trainer.accelerator.sync_gradients:
            self.strategy.after_backward()
        return loss - self._penalty

    def _compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss; in a training step the strategy's, with its penalty.

        Where the Trainer divides a sum by the items of all batches of a step, those losses add up to a mean, and what
        is added to each has to be its share; otherwise it divides everything by their number itself.
        """
        original, trainer = self._original["compute_loss"], self.trainer
        if not self._stepping:
            return original(model, inputs, return_outputs, num_items_in_batch)

        def of_batch(model: nn.Module, batch: Batch) -> Tensor:
            return original(model, dict(batch), num_items_in_batch=num_items_in_batch)

        loss = self.strategy.training_loss(model, inputs, of_batch)
        if not torch.isfinite(loss):
            step = trainer.state.global_step + 1
            raise NonFiniteLossError(f"the training loss became {float(loss)} at step {step}: lower learning_rate")
        batches = trainer.current_gradient_accumulation_steps
        shares = batches if self._summed(num_items_in_batch) else 1
        penalty = self.strategy.penalty(loss * shares)
        if penalty is None:
            return loss
        self._penalty = penalty.detach() / batches
        return loss + penalty / shares

    def _summed(self, num_items_in_batch: Any) -> bool:
        """Whether the losses of the batches of a step add up to its loss (``Trainer.training_step``)."""
        said = getattr(self.trainer, "loss_is_scaled_for_ga", None)
        by_model = self.trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(said) if said is not None else by_model or self.trainer.compute_loss_func is not None

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With every training loss: the parameters that evaluation would use, and the strategy's own numbers."""
        if "loss" in logs:
            logs = logs | {"adapter_parameters": self.adapters.active_plan().params, **self.strategy.progress()}
        self._original["log"](logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter in place of the model, and, while it trains, what a resumed training needs."""
        folder, model = Path(output_dir or self.trainer.args.output_dir), self.trainer.model
        writes_adapter = isinstance(model, PreTrainedModel) and not isinstance(self.adapters, WholeModel)
        if writes_adapter:
            model.save_pretrained = lambda directory, **_: self.save(directory)
        try:
            self._original["_save"](output_dir, state_dict)
        finally:
            if writes_adapter:
                del model.save_pretrained
        if self.trainer.is_in_train and self.plan is None:
            save_state(
                folder,
                {
                    "about": self.about,
                    "steps": self.trainer.state.max_steps,
                    "trainable": self.adapters.trainable_state(),
                    "strategy": self.strategy.state_dict(),
                    "taken": self._taken,
                },
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read what :meth:`_save` wrote; it is put in place when the strategy has begun."""
        self._resumed = load_state(Path(resume_from_checkpoint), self.about)

    def _restore(self, state: Mapping[str, Any], steps: int) -> None:
        if state["steps"] != steps:
            raise CheckpointError(
                f"the checkpoint is of a training of {state['steps']} steps, and this one has {steps}: the phases of a "
                "strategy are laid out over them; give the arguments of then"
            )
        try:
            self.adapters.load_trainable_state(state["trainable"])
        except ValueError as error:
            raise CheckpointError(f"{error}; give the model and the settings of then") from None
        self.strategy.load_state_dict(state["strategy"])
        self._taken = state["taken"]
        for _ in range(self._taken):
            next(self._heldout)

    # Rows ------------------------------------------------------------------------------------------------------------

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of one batch."""
        return self._original["compute_loss"](model, dict(self.trainer._prepare_inputs(batch)))

    def _batches(self, rows: Any) -> Iterable[Batch]:
        """Batches of these rows as the Trainer makes them of training rows."""
        trainer = self.trainer
        usual, trainer.train_dataset = trainer.train_dataset, rows
        try:
            return trainer.get_train_dataloader()
        finally:
            trainer.train_dataset = usual

    def _endless(self) -> Iterator[Batch]:
        """Held-out batches, shuffled anew every time all were seen."""
        loader = self._batches(self.heldout)
        while True:
            empty = True
            for batch in loader:
                empty = False
                yield batch
            if empty:
                raise DataError("heldout: the rows do not fill one batch: hold out more, or lower the batch size")

    @torch.no_grad()
    def _score(self, plan: RankPlan) -> float:
        """The negative mean loss over the held-out rows under a plan, each row with equal weight."""
        model, was_training, total, seen = self.trainer.model, self.trainer.model.training, 0.0, 0
        model.eval()
        with self.adapters.masked(plan), self.adapters.merged():
            for batch in self._scored_batches():
                rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
                total += rows * float(self._loss(model, batch))
                seen += rows
        model.train(was_training)
        return -total / seen

    def _scored_batches(self) -> list[Batch]:
        """The held-out rows, or as many as the strategy wants to be measured on, read once."""
        if not self._scored:
            from autolora.training.problem import spread

            rows = _pick(self.heldout, spread(len(self.heldout), self.strategy.scored_rows))
            self._scored = [dict(batch) for batch in self.trainer.get_eval_dataloader(rows)]
        return self._scored


def _budget(budget: float | Budget | None) -> Budget:
    return budget if isinstance(budget, Budget) else Budget(rank=budget)


def _calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer whose ``__init__`` is telling the callback that it is done.

    It passes its model and not itself, so it is looked for among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise ConfigError("AutoLoRACallback: expected to be called by a Trainer of transformers that it was given to")


def _require_plain(trainer: Any, strategy: Strategy[Any]) -> None:
    """Refuse what would go wrong later, or silently.

    Raises:
        ConfigError: with every fault, a line each.
    """
    args = trainer.args
    faults = {
        "several processes or devices: expected one (CUDA_VISIBLE_DEVICES=0, no launcher)": args.world_size > 1
        or args.n_gpu > 1
        or trainer.is_fsdp_enabled
        or trainer.is_deepspeed_enabled,
        "fp16: strategies read gradients, which its loss scaling changes: expected bf16 or float32": args.fp16,
        "order=second beside bf16: its differences are below the resolution of bf16: expected float32": args.bf16
        and getattr(strategy.options, "order", None) == "second",
        "load_best_model_at_end: ranks of an earlier checkpoint need not be settled: expected false": (
            args.load_best_model_at_end
        ),
        "auto_find_batch_size: it trains again on what has been trained: expected false": args.auto_find_batch_size,
        "model_init: adapters go into the model that the Trainer is made with: expected model": trainer.model_init,
        "optimizers: parameter groups are the strategy's: expected the kind of optimizer in optim": trainer.optimizer
        is not None,
        "the model has PEFT adapters: expected it without": getattr(trainer.model, "peft_config", None) is not None,
        "train_dataset: expected one": trainer.train_dataset is None,
    }
    found = [f"AutoLoRACallback: {fault}" for fault, there in faults.items() if there]
    if found:
        raise ConfigError("\n".join(found))


def _set_aside(rows: Any, share: float, seed: int) -> tuple[Any, Any]:
    """The rows without a random share of them, and that share; both in their order.

    Raises:
        DataError: if the rows cannot be counted, or the share is less than one of them.
    """
    if not isinstance(rows, Sized):
        raise DataError("heldout: a share of rows that cannot be counted: expected a data set of its own")
    count = round(share * len(rows))
    if count < 1:
        raise DataError(f"heldout={share:g} of {len(rows)} rows is none: expected a larger share, or a data set")
    order = torch.randperm(len(rows), generator=stream(seed, "held-out rows")).tolist()
    return _pick(rows, sorted(order[count:])), _pick(rows, sorted(order[:count]))


def _pick(rows: Any, positions: list[int]) -> Any:
    """These rows, as a data set of the same library."""
    pick = rows.select if hasattr(rows, "select") else partial(Subset, rows)
    return pick(positions)
