"""``suite=steps``: a training step, a forward pass, memory, attaching and selecting, beside PEFT and the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from autolora.bench import evaluation, overhead
from autolora.bench.contenders import ADALORA_OF, CONTENDERS, PEFT_OF
from autolora.bench.measure import Interval, against, median_interval, take_turns
from autolora.bench.memory import peak_bytes
from autolora.bench.model import Precision, Subject
from autolora.bench.report import Part, Row
from autolora.bench.settings import StepsSettings
from autolora.errors import ConfigError
from autolora.strategies.base import Batch

_ROUNDS_OF_ONCE = 10  # every round of these copies a model for each contender
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def steps_suite(settings: StepsSettings) -> Iterator[Row]:
    """Measure what the settings ask for; rows come as they are measured.

    Raises:
        BackboneError: if the model cannot be loaded.
    """
    subject = Subject.load(settings.backbone, device_of(settings))
    longest = getattr(subject.backbone.model.config, "max_position_embeddings", None)
    too_long = [shape for shape in settings.shapes if longest is not None and int(shape.partition("x")[2]) > longest]
    if too_long:
        raise ConfigError(f"shapes={','.join(too_long)}: the backbone takes at most {longest} tokens")
    for precision in settings.precision or worthwhile_precisions(subject.device):
        for shape in settings.shapes:
            case = Case(subject, settings, shape, precision)
            if "train" in settings.parts:
                yield from training_rows(case)
            if "evaluate" in settings.parts:
                yield from evaluation_rows(case)
            if "memory" in settings.parts:
                yield from memory_rows(case)
            if "overhead" in settings.parts and precision == "float32":  # evaluation is in float32
                yield from overhead_rows(case)
    if "once" in settings.parts:
        yield from once_rows(subject, settings)


def device_of(settings: StepsSettings) -> torch.device:
    """CUDA where there is one and the settings leave the choice.

    Raises:
        ConfigError: if there is none and the settings ask for it.
    """
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and automatic == "cpu":
        raise ConfigError("device=cuda: torch finds no CUDA device here: leave it out, or device=cpu")
    return torch.device(automatic if settings.device == "auto" else settings.device)


def worthwhile_precisions(device: torch.device) -> tuple[Precision, ...]:
    """float32, and bf16 where the hardware multiplies it: where it does not, it is emulated ten times slower."""
    from autolora.training.fit import resolve_precision

    native = resolve_precision("auto", device.type) == "bf16-mixed"
    return ("float32", "bf16") if native else ("float32",)


class Case:
    """One shape in one precision: its batches, and how its contenders are timed."""

    def __init__(self, subject: Subject, settings: StepsSettings, shape: str, precision: Precision) -> None:
        self.subject, self.settings, self.shape, self.precision = subject, settings, shape, precision
        self._generator = torch.Generator().manual_seed(settings.seed)
        self.draw()

    def draw(self) -> None:
        """A new batch."""
        rows, tokens = map(int, self.shape.split("x"))
        self.batch = self.subject.batch((rows, tokens), self._generator)

    def time(self, steps: Mapping[str, Callable[[Batch], object]]) -> dict[str, list[float]]:
        """Seconds of every contender in every round; all of a round get the same batch."""
        turns = {name: (lambda step=step: step(self.batch)) for name, step in steps.items()}
        return take_turns(
            turns,
            self.settings.rounds,
            warmup=self.settings.warmup,
            seed=self.settings.seed,
            before_round=self.draw,
            synchronize=_synchronize(self.subject),
            clock=CLOCKS[self.settings.clock],
            max_seconds=self.settings.max_seconds,
        )

    def row(
        self,
        part: Part,
        name: str,
        measured: Mapping[str, list[float]],
        references: Mapping[str, str | None],
        value: Interval,
    ) -> Row:
        """What was measured of one contender, beside its references in the same rounds."""
        return Row(
            part=part,
            name=name,
            shape=self.shape,
            precision=self.precision,
            rounds=len(measured[name]),
            value=value,
            ratios=against(measured, name, references),
        )


def training_rows(case: Case) -> Iterator[Row]:
    """Training steps of all contenders, in turns."""
    chosen = case.settings.chosen(CONTENDERS)
    contenders = {name: CONTENDERS[name](case.subject, case.precision) for name in chosen}
    times = case.time({name: contender.step for name, contender in contenders.items()})
    for name in chosen:
        references = {"peft": PEFT_OF.get(name), "adalora": ADALORA_OF.get(name), "limit": "limit"}
        yield case.row("train", name, times, references, milliseconds(times[name]))


def evaluation_rows(case: Case) -> Iterator[Row]:
    """Forward passes of all models, in turns."""
    chosen = case.settings.chosen(evaluation.MODELS)
    times = case.time({name: evaluation.predictor(case.subject, case.precision, name) for name in chosen})
    for name in chosen:
        references = {"peft": evaluation.PEFT_OF.get(name), "bare": "bare"}
        yield case.row("evaluate", name, times, references, milliseconds(times[name]))


def memory_rows(case: Case) -> Iterator[Row]:
    """The peak of a training step of each contender; one measurement, since it repeats exactly."""
    peaks: dict[str, list[float]] = {}
    for name in case.settings.chosen(CONTENDERS):
        peak = peak_bytes(lambda name=name: CONTENDERS[name](case.subject, case.precision), case.batch)  # type: ignore[misc]
        peaks[name] = [float(peak)]
    for name in peaks:
        references = {"peft": PEFT_OF.get(name), "adalora": ADALORA_OF.get(name), "limit": "limit"}
        yield case.row("memory", name, peaks, references, median_interval(peaks[name]))


def overhead_rows(case: Case) -> Iterator[Row]:
    """What the adapters of some plans add to a forward pass, beside what prices in time say that they do."""
    predicted = overhead.priced(case.subject, case.batch)
    times = case.time(overhead.predictors(case.subject))
    for name, value, ratios in overhead.compared(times, predicted):
        rounds = len(times[name])
        yield Row(
            part="overhead", name=name, shape=case.shape, precision="float32", rounds=rounds, value=value, ratios=ratios
        )


def once_rows(subject: Subject, settings: StepsSettings) -> Iterator[Row]:
    """Attaching adapters, and selecting (choosing the plan, and compaction), each on a fresh model every time."""
    chosen = settings.chosen(evaluation.ONCE)
    ready: dict[str, Callable[[], object]] = {}

    def prepare() -> None:
        ready.update({name: evaluation.ONCE[name](subject) for name in chosen})

    turns = {name: (lambda name=name: ready.pop(name)()) for name in chosen}
    times = take_turns(
        turns,
        min(settings.rounds, _ROUNDS_OF_ONCE),
        warmup=1,
        seed=settings.seed,
        before_round=prepare,
        synchronize=_synchronize(subject),
        clock=CLOCKS[settings.clock],
    )
    for name in chosen:
        ratios = against(times, name, {"peft": evaluation.ONCE_PEFT_OF.get(name)})
        value = milliseconds(times[name])
        yield Row(part="once", name=name, rounds=len(times[name]), value=value, ratios=ratios)


def milliseconds(seconds: Sequence[float]) -> Interval:
    """The median of times in seconds, in milliseconds."""
    return median_interval([1e3 * value for value in seconds])


def _synchronize(subject: Subject) -> Callable[[], object] | None:
    return torch.cuda.synchronize if subject.device.type == "cuda" else None
