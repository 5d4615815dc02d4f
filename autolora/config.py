"""The configuration of a run as typed, frozen models. No torch.

``conf/`` holds the same keys and defaults as YAML, where Hydra composes them; a test keeps the two equal.
:mod:`autolora.compose` makes a :class:`RunConfig` from a command line and reports every fault at once.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    Strict,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
BackboneName = Literal[
    "minilm",
    "roberta_base",
    "bert_base",
    "deberta_v3_base",
    "distilbert",
    "electra_small",
    "digits_vit",
    "whisper_tiny",
    "custom",
    "none",
]
DEFAULT_SCALE = 2.0


def _text(value: Any) -> Any:
    """YAML reads a name such as 2024 as a number: it is text all the same."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _path(value: Any) -> Any:
    """No shell expands the ~ in ``data.dir=~/glue``."""
    return Path(value).expanduser() if isinstance(value, str | Path) and str(value) else value


Text = Annotated[str, BeforeValidator(_text)]
PathLike = Annotated[Path, Strict(False), BeforeValidator(_path)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Names = Annotated[tuple[Text, ...], Strict(False)]


class Conflict(NamedTuple):
    """Values that are fine one by one and wrong together: the dotted keys that take part, and what to do."""

    keys: tuple[str, ...]
    message: str


class Section(BaseModel):
    """Base of every part of the configuration: frozen, no unknown keys, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong between the values of this section."""
        yield from ()


class Judged(Section):
    """A section that cannot be made while something is wrong between its values."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        found = list(self.conflicts())
        if found:
            text = "; ".join(conflict.message for conflict in found)
            raise PydanticCustomError("conflicts", text, {"conflicts": found})
        return self


class GlueTaskConfig(Section):
    """One of the nine GLUE tasks."""

    name: GlueName


class PlantedConfig(Section):
    """The task whose true ranks are known; see ``autolora.tasks.planted``."""

    name: Literal["planted"] = "planted"
    dim: Count = 64
    widths: Annotated[tuple[Count, ...], Strict(False), Len(1)] = (32, 64, 128)
    ranks: Annotated[tuple[Whole, ...], Strict(False)] = (0, 1, 2, 4, 8, 3)
    singular_value: NonNegative = 1.5
    profile: Literal["equal", "decaying"] = "equal"
    noise: NonNegative = 0.0
    teacher_seed: Whole | None = None
    eval_size: Count = 8192

    def conflicts(self) -> Iterator[Conflict]:
        """Two ranks for each block, none above what its modules can have."""
        keys = ("task.ranks", "task.widths", "task.dim")
        if len(self.ranks) != 2 * len(self.widths):
            wanted = f"two for each of the {len(self.widths)} widths, {2 * len(self.widths)} in all"
            yield Conflict(keys, f"task.ranks: expected {wanted}, got {len(self.ranks)}")
            return
        for i, rank in enumerate(self.ranks):
            largest = min(self.dim, self.widths[i // 2])
            if rank > largest:
                module = f"{'UV'[i % 2]}{i // 2}"
                yield Conflict(keys, f"task.ranks: {module} can have rank 0 to {largest} (min(in, out)), got {rank}")


class PlantedEncoderConfig(Section):
    """The task whose true ranks are known, on a pretrained encoder; see ``autolora.training.planted_encoder``."""

    name: Literal["planted_encoder"] = "planted_encoder"
    text: GlueName = "mnli"
    highest_rank: Whole = 8
    ranks: Annotated[tuple[Whole, ...], Strict(False)] | None = None
    singular_value: NonNegative = 0.5
    profile: Literal["equal", "decaying"] = "equal"
    noise: NonNegative = 0.0
    teacher_seed: Whole | None = None


class MixtureConfig(Section):
    """Several GLUE tasks on one adapter; see ``autolora.training.mixture``."""

    name: Literal["mixture"] = "mixture"
    tasks: Annotated[tuple[GlueName, ...], Strict(False)] = ("mrpc", "rte", "cola")

    def conflicts(self) -> Iterator[Conflict]:
        """At least two tasks, and each once."""
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            message = f"task.tasks: expected at least two tasks, each once, got {', '.join(self.tasks) or 'none'}"
            yield Conflict(("task.tasks",), message)


class DigitsConfig(Section):
    """scikit-learn's digits; see ``autolora.tasks.digits``."""

    name: Literal["digits"] = "digits"

    def conflicts(self) -> Iterator[Conflict]:
        """scikit-learn has to be there, which has the rows."""
        if importlib.util.find_spec("sklearn") is None:
            message = "task=digits: scikit-learn is not installed: pip install 'autolora[digits]'"
            yield Conflict(("task.name",), message)


class SpeechConfig(Section):
    """Spoken words; see ``autolora.tasks.speech``. Without ``words``, all that there are."""

    name: Literal["speech_commands"] = "speech_commands"
    words: Annotated[tuple[Text, ...], Strict(False), Len(2)] | None = None
    seconds: Positive = 1.0


class DataConfig(Section):
    """Where rows come from and how they are batched."""

    source: Literal["auto", "local", "hub", "mini"] = "auto"
    dir: PathLike | None = None
    cache_dir: PathLike | None = None
    max_train: Count | None = None
    heldout: Annotated[float, Gt(0), Le(0.5)] = 0.1
    max_heldout: Count | None = 1000
    batch_size: Count = 32
    eval_batch_size: Count = 128
    max_length: Annotated[int, Ge(8)] = 128
    num_workers: Whole = 0

    def conflicts(self) -> Iterator[Conflict]:
        """A local source needs a folder, and a folder has to be there."""
        keys = ("data.source", "data.dir")
        if self.source == "local" and self.dir is None:
            yield Conflict(keys, "data.source=local: expected the folder too: add data.dir=DIR (GLUE TSV files)")
        if self.dir is not None and not self.dir.is_dir():
            yield Conflict(keys[1:], f"data.dir={self.dir}: there is no such folder (relative to {Path.cwd()})")


class SparsityConfig(Section):
    """Which of the frozen weights are made 0; see ``autolora.adapters.pruned``."""

    method: Literal["none", "unstructured", "2:4"] = "none"
    amount: Annotated[float, Gt(0), Lt(1)] = 0.5

    def conflicts(self) -> Iterator[Conflict]:
        """A share is for the method that has a choice."""
        if self.method != "unstructured" and self.amount != 0.5:
            message = f"backbone.sparsity.amount={self.amount:g}: only has a meaning beside method=unstructured"
            yield Conflict(("backbone.sparsity.amount", "backbone.sparsity.method"), message)


class BackboneConfig(Section):
    """What is adapted. An ``id`` beside one of the known names makes it ``custom``: the name would be a lie."""

    name: BackboneName = "minilm"
    id: Text | None = None
    path: PathLike | None = None
    quantization: Literal["none", "int8", "nf4"] = "none"
    sparsity: SparsityConfig = SparsityConfig()

    @model_validator(mode="before")
    @classmethod
    def _other_model(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("id") is not None and data.get("name", "minilm") != "none":
            return {**data, "name": "custom"}
        return data

    @property
    def weights(self) -> dict[str, Any]:
        """Where the weights are: arguments of :func:`autolora.backbones.locate` and of what loads them."""
        return self.model_dump(include={"name", "id", "path"})

    @property
    def label(self) -> str:
        """The name to file results under: of the folder or the hub id where one is given."""
        return self.path.resolve().name if self.path else (self.id or self.name)

    @property
    def compression(self) -> dict[str, Any]:
        """What is done to the frozen weights: arguments of :class:`autolora.adapters.compress.Compression`."""
        return {"quantization": self.quantization, "sparsity": self.sparsity.method, "amount": self.sparsity.amount}

    def conflicts(self) -> Iterator[Conflict]:
        """A custom model has an id or a path, and a path has to be there; so has what quantises."""
        yield from self.sparsity.conflicts()
        if self.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
            message = (
                f"backbone.quantization={self.quantization}: bitsandbytes is not installed: "
                "pip install 'autolora[quantization]'"
            )
            yield Conflict(("backbone.quantization",), message)
        if self.name == "custom" and self.id is None and self.path is None:
            message = "backbone=custom: expected the model too: add backbone.id=ORG/NAME or backbone.path=DIR"
            yield Conflict(("backbone.name", "backbone.id", "backbone.path"), message)
        if self.path is not None and not self.path.is_dir():
            message = f"backbone.path={self.path}: there is no such folder (relative to {Path.cwd()})"
            yield Conflict(("backbone.path",), message)


class AdapterConfig(Section):
    """What is the same for every adapter; see ``autolora.adapters``."""

    targets: Text | Names = "all-linear"
    exclude: Names = ()
    layers_to_transform: Annotated[tuple[Whole, ...], Strict(False)] | None = None
    layers_pattern: Text | None = None
    rank_pattern: dict[str, Whole] = Field(default_factory=dict)
    modules_to_save: Names | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool | None = None
    scale: Positive | None = None
    alpha: Positive | None = None
    reference_rank: Count | None = None
    rslora: bool = False
    learn_scale: bool = False
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    init_std: Positive = 0.02
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0

    def effective_scale(self) -> float:
        """The scale s: as given, or what ``alpha`` means at the reference rank, or the default.

        ``alpha / r`` (Hu et al., ICLR 2022, section 4.1), or ``alpha / sqrt(r)`` with rslora (Kalajdzievski, arXiv
        2312.03732). It stays what it is when ranks change.
        """
        if self.alpha is None:
            return DEFAULT_SCALE if self.scale is None else self.scale
        assert self.reference_rank is not None
        return self.alpha / (self.reference_rank**0.5 if self.rslora else self.reference_rank)

    def conflicts(self) -> Iterator[Conflict]:
        """One way to write the scale, written in full; patterns that compile."""
        keys = ("adapter.scale", "adapter.alpha", "adapter.reference_rank", "adapter.rslora")
        if self.alpha is not None and self.scale is not None:
            yield Conflict(keys[:2], "adapter.scale and adapter.alpha both set the scale: keep one")
        if self.alpha is not None and self.reference_rank is None:
            message = (
                "adapter.alpha: expected adapter.reference_rank=R too (the scale is alpha / R, whatever the ranks)"
            )
            yield Conflict(keys[1:3], message)
        for key in ("reference_rank", "rslora"):
            if getattr(self, key) and self.alpha is None:
                yield Conflict((keys[1], f"adapter.{key}"), f"adapter.{key}: only has a meaning beside adapter.alpha")
        yield from self._bad_patterns()

    def _bad_patterns(self) -> Iterator[Conflict]:
        patterns = {
            "targets": (self.targets,) if isinstance(self.targets, str) else self.targets,
            "exclude": self.exclude,
            "modules_to_save": self.modules_to_save or (),
            "rank_pattern": tuple(self.rank_pattern),
        }
        for key, pattern in ((key, pattern) for key, group in patterns.items() for pattern in group):
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"adapter.{key}: expected names or regular expressions, got {pattern!r} ({error})"
                yield Conflict((f"adapter.{key}",), message)


class StrategyConfig(BaseModel):
    """A strategy's name and its own options, which the strategy's module defines.

    Written out, it is flat, as in the YAML: ``{"name": ..., **options}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: InstanceOf[BaseModel]

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"name": self.name, **self.options.model_dump(mode="json")}


class BudgetConfig(Section):
    """How much the final plan may cost; see :class:`autolora.plan.Budget`.

    ``cost``: what is counted. Operations and time are those of the adapters in the forward pass of an evaluation over
    so many held-out ``rows`` (:mod:`autolora.adapters.prices`).
    """

    enabled: bool = True
    cost: Literal["parameters", "flops", "latency"] = "parameters"
    rows: Count = 32
    rank: NonNegative | None = None
    params: Whole | None = None
    fraction: Share | None = None

    def given(self) -> dict[str, float]:
        """The one that was chosen of rank, params and fraction, by name; empty for the task's default."""
        values = {"rank": self.rank, "params": self.params, "fraction": self.fraction}
        return {key: value for key, value in values.items() if value is not None}

    def conflicts(self) -> Iterator[Conflict]:
        """One way to write the budget, and none beside ``budget=none``."""
        given = {f"budget.{key}": value for key, value in self.given().items()}
        written = " and ".join(f"{key}={value:g}" for key, value in given.items())
        if len(given) > 1:
            yield Conflict(tuple(given), f"{written}: expected at most one of rank, params, fraction: keep one")
        if given and not self.enabled:
            yield Conflict(
                ("budget.enabled", *given),
                f"{written}: there is no budget here (budget=none, or a strategy that has none, as published): leave "
                f"{' and '.join(given)} out",
            )
        if self.params is not None and self.cost != "parameters":
            message = (
                f"budget.params={self.params}: a number of parameters is no bound on {self.cost}: use budget.rank or "
                "budget.fraction with budget.cost"
            )
            yield Conflict(("budget.params", "budget.cost"), message)
        if self.cost != "parameters" and not self.enabled:
            yield Conflict(("budget.enabled", "budget.cost"), f"budget.cost={self.cost}: there is no budget to count")


class GroupOptim(Section):
    """Learning rate and weight decay of adapters."""

    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0


class GateOptim(Section):
    """Learning rate and weight decay of the gates; a rate of ``None`` leaves it to the strategy."""

    lr: Positive | None = None
    weight_decay: NonNegative = 0.0


class HeadOptim(GroupOptim):
    """Learning rate and weight decay of the modules that are trained in full."""

    weight_decay: NonNegative = 0.01


class OptimConfig(Section):
    """AdamW by parameter group, and the schedule of the learning rates.

    The rate of B is ``loraplus_lr_ratio`` times that of A.
    """

    adapter: GroupOptim = GroupOptim()
    gate: GateOptim = GateOptim()
    head: HeadOptim = HeadOptim()
    loraplus_lr_ratio: Positive = 1.0
    betas: Annotated[tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]], Strict(False)] = (
        0.9,
        0.999,
    )
    eps: Positive = 1e-8
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.06


class TrainerConfig(Section):
    """Arguments of ``lightning.pytorch.Trainer`` under their own names, and those of ours: see :meth:`arguments`."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: Annotated[int, Ge(-1)] | Literal["auto"] | Annotated[tuple[Whole, ...], Strict(False)] = 1
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["auto", "32-true", "64-true", "16-mixed", "bf16-mixed"] = "auto"
    max_epochs: Annotated[int, Ge(-1)] | None = 3
    min_epochs: Count | None = None
    max_steps: Annotated[int, Ge(-1)] = -1
    min_steps: Count | None = None
    max_time: Text | None = None
    limit_train_batches: Count | Share | None = None
    limit_val_batches: Whole | Share | None = None
    overfit_batches: Whole | Share = 0.0
    fast_dev_run: bool | Whole = False
    val_check_interval: Count | Share | None = None
    check_val_every_n_epoch: Count | None = 1
    num_sanity_val_steps: Annotated[int, Ge(-1)] = 0
    log_every_n_steps: Count = 10
    enable_progress_bar: bool = True
    accumulate_grad_batches: Count = 1
    gradient_clip_val: NonNegative | None = 1.0
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    detect_anomaly: bool = False
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    sync_batchnorm: bool = False
    checkpoint: Literal["last", "best"] = "last"
    early_stopping_patience: Count | None = None
    checkpoint_every_n_steps: Count | None = None
    checkpoint_every_minutes: Positive | None = 2.0
    keep_checkpoints: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for Lightning's Trainer; ``precision`` may still be ``"auto"``."""
        ours = (
            "checkpoint", "early_stopping_patience", "checkpoint_every_n_steps", "checkpoint_every_minutes",
            "keep_checkpoints",
        )  # fmt: skip
        arguments = {key: getattr(self, key) for key in type(self).model_fields if key not in ours}
        arguments["devices"] = list(self.devices) if isinstance(self.devices, tuple) else self.devices
        return arguments

    def conflicts(self) -> Iterator[Conflict]:
        """Training has a length: the phases of strategies and the learning rate are laid out over it."""
        if self.max_steps == -1 and self.max_epochs in (-1, None) and not self.fast_dev_run:
            keys = ("trainer.max_epochs", "trainer.max_steps", "trainer.fast_dev_run")
            yield Conflict(keys, "trainer.max_epochs, max_steps: nothing says how long training is: set one")
        if self.max_time is not None and not re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", self.max_time):
            message = f"trainer.max_time={self.max_time}: expected days, hours, minutes and seconds as 00:12:00:00"
            yield Conflict(("trainer.max_time",), message)
        if self.devices in (0, ()):
            yield Conflict(("trainer.devices",), f"trainer.devices={self.devices}: expected at least one, or auto")


class WandbConfig(Section):
    """Weights & Biases; ``auto`` is offline, because syncing is the user's choice.

    Without a ``group`` and a ``job_type`` a run has those of :func:`autolora.training.loggers.labels`; ``tags`` come
    besides those of it.
    """

    name: Literal["wandb"] = "wandb"
    project: Text = "autolora"
    entity: Text | None = None
    mode: Literal["auto", "offline", "online", "disabled"] = "auto"
    group: Text | None = None
    job_type: Text | None = None
    tags: Names = ()


class CsvConfig(Section):
    """No service: the run directory's own files."""

    name: Literal["csv"] = "csv"


class RunConfig(Judged):
    """Everything that decides a run."""

    seed: Seed = 0
    max_rank: Count = 16
    rank_multiple: Count = 1
    run_root: PathLike = Path("runs")
    force: bool = False
    retrain: Literal["none", "found", "permuted", "uniform"] = "none"
    retrain_on: Literal["fit", "all"] = "fit"
    task: GlueTaskConfig | PlantedConfig | PlantedEncoderConfig | MixtureConfig | DigitsConfig | SpeechConfig = Field(
        default=GlueTaskConfig(name="mnli"), discriminator="name"
    )
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    adapter: AdapterConfig = AdapterConfig()
    strategy: StrategyConfig
    budget: BudgetConfig = BudgetConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    logger: WandbConfig | CsvConfig = Field(default=WandbConfig(), discriminator="name")

    def conflicts(self) -> Iterator[Conflict]:
        """What is wrong inside the sections, and between them; what the strategy says of a key comes first."""
        judge = getattr(self.strategy.options, "conflicts_with", None)
        of_strategy = list(judge(self)) if judge else []
        yield from of_strategy
        judged = {key for conflict in of_strategy for key in conflict.keys}
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Section):
                yield from (conflict for conflict in section.conflicts() if judged.isdisjoint(conflict.keys))
        planted = isinstance(self.task, PlantedConfig)
        if planted and self.backbone.name != "none":
            message = f"backbone={self.backbone.name}: task=planted brings its own model: leave the backbone out"
            yield Conflict(("task.name", "backbone.name"), message)
        if self.rank_multiple > 1:
            yield from self._multiples()
        if not isinstance(self.task, GlueTaskConfig | MixtureConfig):
            yield from self._own_weights()
        if self.retrain_on == "all":
            yield from self._without_heldout()
        if self.run_root.exists() and not self.run_root.is_dir():
            yield Conflict(("run_root",), f"run_root={self.run_root}: expected a folder, got a file")
        if isinstance(self.logger, WandbConfig) and importlib.util.find_spec("wandb") is None:
            yield Conflict(("logger.name",), "logger=wandb: wandb is not installed: pip install wandb, or logger=csv")
        yield from self._other_modality()
        if not planted and self.backbone.name == "none":
            yield Conflict(("task.name", "backbone.name"), f"backbone=none: task={self.task.name} needs a model")

    def _multiples(self) -> Iterator[Conflict]:
        """Multiples are what a budget buys, so there has to be one, and room for them."""
        if self.max_rank % self.rank_multiple:
            message = f"rank_multiple={self.rank_multiple}: expected max_rank to be a multiple too, got {self.max_rank}"
            yield Conflict(("rank_multiple", "max_rank"), message)
        if not self.budget.enabled:
            message = f"rank_multiple={self.rank_multiple}: expected a budget, which is spent in multiples"
            yield Conflict(("rank_multiple", "budget.enabled"), message)

    def _other_modality(self) -> Iterator[Conflict]:
        """Models of images read images, and where they are from is no choice."""
        keys = ("task.name", "backbone.name")
        name, digits = self.backbone.name, isinstance(self.task, DigitsConfig)
        if name == "digits_vit" and not digits:
            yield Conflict(
                keys, f"backbone=digits_vit: it reads digits, and task={self.task.name} has none: name another"
            )
        if digits and name not in ("digits_vit", "custom", "none"):
            message = (
                f"backbone={name}: task=digits has images, not text: leave the backbone out, or name an image model "
                "with backbone=custom backbone.id=ORG/NAME"
            )
            yield Conflict(keys, message)
        speech = isinstance(self.task, SpeechConfig)
        if speech and name not in ("whisper_tiny", "custom") and self.backbone.path is None:
            message = (
                f"backbone={name}: task=speech_commands has sound, not text: leave the backbone out, or name a model "
                "of speech with backbone.id=ORG/NAME"
            )
            yield Conflict(keys, message)
        if speech and self.data.source not in ("auto", "local"):
            message = (
                f"data.source={self.data.source}: task=speech_commands reads a folder: leave it out, give data.dir=DIR"
            )
            yield Conflict(("task.name", "data.source"), message)
        if name == "whisper_tiny" and not speech:
            yield Conflict(keys, f"backbone=whisper_tiny: it hears, and task={self.task.name} is silent: name another")
        if digits and (self.data.source != "auto" or self.data.dir is not None):
            yield Conflict(
                ("task.name", "data.source", "data.dir"), "task=digits brings its rows: leave data.source, dir out"
            )

    def _own_weights(self) -> Iterator[Conflict]:
        """Planted ranks are written into weights in full precision, and only models of text are compressed."""
        backbone = self.backbone
        for key, value in (("quantization", backbone.quantization), ("sparsity.method", backbone.sparsity.method)):
            if value != "none":
                message = f"backbone.{key}={value}: task={self.task.name} needs its weights as they are: leave it out"
                yield Conflict(("task.name", f"backbone.{key}"), message)

    def _without_heldout(self) -> Iterator[Conflict]:
        """Who trains on the held-out rows has none left to choose by."""
        if self.retrain == "none":
            keys = ("retrain", "retrain_on")
            yield Conflict(keys, "retrain_on=all: only has a meaning beside retrain=found, permuted or uniform")
        for key, value in (
            ("checkpoint", self.trainer.checkpoint == "best"),
            ("early_stopping_patience", self.trainer.early_stopping_patience is not None),
        ):
            if value:
                message = f"retrain_on=all: nothing is held out to choose by: leave out trainer.{key}"
                yield Conflict(("retrain_on", f"trainer.{key}"), message)

    def to_yaml(self) -> str:
        """The configuration as YAML with every key, as in ``config.yaml`` of a run directory."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
