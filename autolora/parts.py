"""The parts of a run, made from its configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autolora.config import DigitsConfig, GlueTaskConfig, MixtureConfig, PlantedConfig, RunConfig, SpeechConfig
from autolora.errors import DataError, PlanError
from autolora.plan import Budget

if TYPE_CHECKING:
    from autolora.adapters import AdapterSettings
    from autolora.adapters.compress import Compression
    from autolora.backbones import Modality
    from autolora.strategies.base import Strategy
    from autolora.tasks.glue import GlueTask
    from autolora.tasks.records import Arrays
    from autolora.training.arrays import Prepare
    from autolora.training.problem import Problem


def seed_for(seed: int, stream: str) -> int:
    """The seed of one random stream of a run: data order, head, adapters, training.

    Streams are separate, so that two strategies with one seed see the same batches and the same head, however much
    randomness each draws for itself.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:4], "big")


def make_problem(cfg: RunConfig) -> Problem:
    """Read the data of the configured task; the model is loaded later, by ``build``."""
    if isinstance(cfg.task, PlantedConfig):
        return _planted_problem(cfg, cfg.task)
    if isinstance(cfg.task, DigitsConfig):
        return _digits_problem(cfg)
    return _speech_problem(cfg, cfg.task) if isinstance(cfg.task, SpeechConfig) else _text_problem(cfg)


def _planted_problem(cfg: RunConfig, task: PlantedConfig) -> Problem:
    from autolora.tasks.planted import plant
    from autolora.training.planted import PlantedRegression

    settings = task.model_dump(exclude={"name", "teacher_seed", "eval_size"})
    teacher_seed = cfg.seed if task.teacher_seed is None else task.teacher_seed
    return PlantedRegression(
        plant(**settings, seed=teacher_seed),
        fingerprint=_digest(settings | {"teacher_seed": teacher_seed}),
        batch_size=cfg.data.batch_size,
        eval_size=task.eval_size,
        seed=seed_for(cfg.seed, "data"),
    )


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _digits_problem(cfg: RunConfig) -> Problem:
    """scikit-learn's digits for a vision transformer."""
    from autolora.tasks import digits

    splits = digits.adaptation()
    say("data: the digits 5 to 9 that scikit-learn carries")
    if cfg.backbone.name == "digits_vit" and cfg.backbone.path is None:
        say("model: a vision transformer pretrained on the digits 0 to 4, made now if it is not in the cache")

    def prepare(model: Any) -> Prepare:
        return lambda images: digits.pixel_values(images, model.config.image_size, model.config.num_channels)

    return _array_problem(cfg, digits.TASK, splits, "bundled", "image", prepare)


def _speech_problem(cfg: RunConfig, task: SpeechConfig) -> Problem:
    """Spoken words for an encoder of speech."""
    from autolora.backbones import locate
    from autolora.tasks import speech

    if cfg.data.dir is None:
        raise DataError("task=speech_commands: expected data.dir=DIR with a folder of WAV files for each word")
    say(f"data: the words in {cfg.data.dir}")
    told, splits = speech.load(cfg.data.dir, task.words, task.seconds)
    directory = locate(**cfg.backbone.weights).directory

    def prepare(model: Any) -> Prepare:
        return speech.features(directory, str(model.main_input_name))

    return _array_problem(cfg, told, splits, "local", "audio", prepare)


def _array_problem(
    cfg: RunConfig,
    task: GlueTask,
    splits: dict[str, Arrays],
    source: str,
    modality: Modality,
    prepare: Callable[[Any], Prepare],
) -> Problem:
    """A task whose rows are arrays."""
    from autolora.tasks.records import fingerprint
    from autolora.tasks.splits import hold_out, subsample
    from autolora.training.arrays import ArrayProblem

    data, seed, data_hash = cfg.data, seed_for(cfg.seed, "data"), fingerprint(splits)
    train = splits.pop("train")
    if data.max_train is not None:
        train = subsample(train, data.max_train, seed)
    fit_rows, heldout = hold_out(train, data.heldout, data.max_heldout, seed)

    return ArrayProblem(
        task,
        {"fit": fit_rows, "heldout": heldout, **splits},
        source=source,
        fingerprint=data_hash,
        modality=modality,
        prepare=prepare,
        **_of_backbone(cfg),
    )


def _of_backbone(cfg: RunConfig) -> dict[str, Any]:
    """What problems on a pretrained model are told of it, and of their batches and seeds."""
    from autolora.backbones import locate, weights_fingerprint
    from autolora.paths import cache_root
    from autolora.training.text import TextSettings

    data, weights = cfg.data, cfg.backbone.weights
    return {
        "backbone": cfg.backbone.label,
        "backbone_fingerprint": weights_fingerprint(locate(**weights).directory),
        "weights": weights,
        "compression": compression(cfg),
        "settings": TextSettings(
            batch_size=data.batch_size,
            eval_batch_size=data.eval_batch_size,
            max_length=data.max_length,
            num_workers=data.num_workers,
            cache_dir=data.cache_dir or cache_root() / "tokens",
            data_seed=seed_for(cfg.seed, "data"),
            head_seed=seed_for(cfg.seed, "head"),
        ),
    }


def _text_problem(cfg: RunConfig) -> Problem:
    """A task on text: one of GLUE, several of them, or planted ranks with the sentences of one."""
    from autolora.tasks.glue import GLUE
    from autolora.training.text import TextProblem

    task = cfg.task
    assert not isinstance(task, PlantedConfig | DigitsConfig | SpeechConfig)
    if isinstance(task, MixtureConfig):
        from autolora.training.mixture import Mixture

        return Mixture([TextProblem(GLUE[name], **_text_arguments(cfg, GLUE[name])) for name in task.tasks])
    if isinstance(task, GlueTaskConfig):
        return TextProblem(GLUE[task.name], **_text_arguments(cfg, GLUE[task.name]))
    from autolora.training.planted_encoder import PlantedEncoder, Planting

    glue = GLUE[task.text]
    arguments = _text_arguments(cfg, glue)
    teacher_seed = cfg.seed if task.teacher_seed is None else task.teacher_seed
    planting = Planting(**task.model_dump(exclude={"name", "text", "teacher_seed"}), seed=teacher_seed)
    arguments["fingerprint"] = _digest(vars(planting) | {"data": arguments["fingerprint"]})
    return PlantedEncoder(glue, planting=planting, **arguments)


def _text_arguments(cfg: RunConfig, glue: GlueTask) -> dict[str, Any]:
    """The rows of a task, and everything else that a problem on text is made of."""
    from autolora.tasks.sources import fingerprint, load, resolve, size_notes
    from autolora.tasks.splits import hold_out, subsample

    data = cfg.data
    resolved = resolve(data.source, glue, data.dir)
    say(f"data: {resolved.detail}")
    splits = load(resolved, glue)
    notes = size_notes(resolved, glue, splits)
    for note in notes:
        say(f"note: {note}")
    data_hash = fingerprint(splits)
    train = splits.pop("train")
    seed = seed_for(cfg.seed, "data")
    if data.max_train is not None:
        train = subsample(train, data.max_train, seed)
    fit_rows, heldout = hold_out(train, data.heldout, data.max_heldout, seed)
    return {
        "splits": {"fit": fit_rows, "heldout": heldout, **splits},
        "source": resolved.kind,
        "fingerprint": data_hash,
        "data_notes": notes,
        **_of_backbone(cfg),
    }


def compression(cfg: RunConfig) -> Compression:
    """What becomes of the frozen weights; modules that are trained in full stay as they are."""
    from autolora.adapters.compress import Compression

    return Compression(**cfg.backbone.compression, trained=cfg.adapter.modules_to_save or ())


def make_strategy(cfg: RunConfig, problem: Problem) -> Strategy[Any]:
    """The configured strategy with its budget."""
    from autolora import strategies

    budget = make_budget(cfg, problem)
    return strategies.make_strategy(cfg.strategy.name, cfg.strategy.options, budget=budget, max_rank=cfg.max_rank)


def make_control(cfg: RunConfig, problem: Problem, found: Mapping[str, int]) -> Strategy[Any]:
    """The strategy that trains again at what was found, or at a control of equal cost, as ``retrain`` says."""
    from autolora.strategies.controls import AtPlan

    assert cfg.retrain != "none"
    seed = seed_for(cfg.seed, "permutation")
    return AtPlan(found, cfg.retrain, seed, budget=make_budget(cfg, problem), max_rank=cfg.max_rank)


def make_budget(cfg: RunConfig, problem: Problem) -> Budget:
    """What the configuration says, or the problem's own default."""
    given = cfg.budget.given()
    budget = Budget(**given) if given else problem.default_budget  # type: ignore[arg-type]
    if budget.params is not None and cfg.budget.cost != "parameters":
        raise PlanError(
            f"budget.cost={cfg.budget.cost}: task={problem.name} has a number of parameters as its default budget: "
            "say how much with budget.rank or budget.fraction"
        )
    return budget if cfg.budget.enabled else Budget()


def adapter_settings(cfg: RunConfig, prices: Mapping[str, Sequence[int]] | None = None) -> AdapterSettings:
    """What is the same for every strategy; ``prices`` are those of :func:`make_prices`."""
    from autolora.adapters import AdapterSettings, Targets

    adapter, prices = cfg.adapter, prices or {}
    return AdapterSettings(
        targets=Targets(adapter.targets, adapter.exclude, adapter.layers_to_transform, adapter.layers_pattern),
        scale=adapter.effective_scale(),
        init=adapter.init,
        init_std=adapter.init_std,
        dropout=adapter.dropout,
        learn_scale=adapter.learn_scale,
        fan_in_fan_out=adapter.fan_in_fan_out,
        rank_pattern=adapter.rank_pattern,
        modules_to_save=adapter.modules_to_save,
        bias=adapter.bias,
        rank_multiple=cfg.rank_multiple,
        prices={name: tuple(table) for name, table in prices.items()},
        unit={"flops": "FLOPs", "latency": "ns"}.get(cfg.budget.cost, "parameters") if prices else "parameters",
        seed=seed_for(cfg.seed, "adapters"),
    )


def make_prices(cfg: RunConfig, problem: Problem) -> dict[str, tuple[int, ...]]:
    """What the ranks of every module cost, in operations or measured time; empty where parameters are counted.

    Raises:
        TargetError: if a module is not called in a forward pass.
    """
    import torch

    from autolora.adapters import find_sites, largest_plan
    from autolora.adapters.prices import calls_of, flops, latency
    from autolora.paths import cache_root
    from autolora.training.problem import evaluate, read

    if cfg.budget.cost == "parameters":
        return {}
    settings, model = adapter_settings(cfg), problem.model
    largest = largest_plan(find_sites(model, settings), settings, cfg.max_rank)
    rows = list(read(problem, model, "heldout", cfg.budget.rows))
    calls = calls_of(model, largest, lambda: evaluate(problem, model, "heldout", rows))
    if cfg.budget.cost == "flops":
        return flops(largest, calls)
    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    say(f"latency of adapters on {device.type}, {len(calls)} modules, {cfg.budget.rows} held-out rows")
    return latency(model, largest, calls, device, cache_root() / "latency")


def optimization(cfg: RunConfig) -> dict[str, Any]:
    """Keyword arguments of the training module: rates, AdamW and its schedule."""
    from autolora.strategies.base import GroupRates, Rates

    optim = cfg.optim
    return {
        "rates": Rates(
            adapter=GroupRates(optim.adapter.lr, optim.adapter.weight_decay),
            gate=GroupRates(optim.gate.lr, optim.gate.weight_decay),
            head=GroupRates(optim.head.lr, optim.head.weight_decay),
            loraplus_lr_ratio=optim.loraplus_lr_ratio,
        ),
        "betas": optim.betas,
        "eps": optim.eps,
        "schedule": optim.schedule,
        "warmup": optim.warmup,
    }


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes; Lightning sets ``LOCAL_RANK`` in those that it starts."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def say(line: str) -> None:
    """Tell the user, once."""
    if is_main_process():
        print(line, flush=True)
