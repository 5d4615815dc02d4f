"""Spoken words: decoding against the standard library, and whole runs on a tiny Whisper and a tiny Wav2Vec2."""

from __future__ import annotations

import io
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from adapters.tiny_models import WHISPER, enlarged
from peft import PeftModel

from autolora.backbones import load_classifier
from autolora.compose import check_command_line, compose
from autolora.errors import BackboneError, ConfigError, DataError
from autolora.export import main as export
from autolora.parts import make_problem
from autolora.run import run_one
from autolora.tasks import speech

TONES = {"high": 1200, "low": 300}
WAV2VEC2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (40, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "mask_time_prob": 0.0,
}


def wav(samples: np.ndarray, rate: int = speech.RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def tone(hertz: float, seconds: float = 0.2, rate: int = speech.RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 tones of two words, and a folder of noise that is no word."""
    root = tmp_path_factory.mktemp("words")
    for word, hertz in {**TONES, "_background_noise_": 50}.items():
        (root / word).mkdir()
        for i in range(12):
            (root / word / f"{i}.wav").write_bytes(wav(tone(hertz * (1 + i / 50), 0.15 + i / 100)))
    return root


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random encoders with their feature extractors, as the hub has them."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    whisper = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER | {"max_source_positions": 50}))
    enlarged(whisper)  # so that its mean over time still hears a difference
    whisper.save_pretrained(root / "whisper")
    hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(root / "whisper")
    hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAV2VEC2)).save_pretrained(root / "wav2vec2")
    hf.Wav2Vec2FeatureExtractor().save_pretrained(root / "wav2vec2")
    return {name: root / name for name in ("whisper", "wav2vec2")}


def command(folder: Path, encoder: Path, tmp_path: Path) -> list[str]:
    return [
        "task=speech_commands", f"data.dir={folder}", f"data.cache_dir={tmp_path / 'cache'}", "task.seconds=0.2",
        f"backbone.path={encoder}", f"run_root={tmp_path / 'runs'}", "logger=csv", "trainer.accelerator=cpu",
        "trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.max_epochs=3", "data.batch_size=8",
        "max_rank=4", "budget.rank=1", "strategy=autolora",
    ]  # fmt: skip


def test_decoding() -> None:
    samples = tone(440)
    np.testing.assert_allclose(speech.decode(wav(samples)), samples, atol=1e-4)
    stereo = np.stack([samples, np.zeros_like(samples)], axis=1)
    np.testing.assert_allclose(speech.decode(wav(stereo, channels=2)), samples / 2, atol=1e-4)
    slower = speech.decode(wav(tone(440, rate=8000), rate=8000))
    assert len(slower) == len(samples)
    np.testing.assert_allclose(slower[400:-400], samples[400:-400], atol=5e-3)
    with pytest.raises(ValueError, match=r"."):
        speech.decode(b"no sound")


def test_rows_of_a_folder(folder: Path, tmp_path: Path) -> None:
    task, splits = speech.load(folder, None, 0.2)
    assert task.labels == ("high", "low")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 22, "dev": 2}
    assert set(splits["dev"].labels) == {0, 1}
    for rows in splits.values():
        assert rows.inputs.shape == (len(rows), 3200)
        for samples, label in zip(rows.inputs, rows.labels, strict=True):
            loudest = np.abs(np.fft.rfft(samples)).argmax() * speech.RATE / 3200
            assert (loudest > 700) == (task.labels[label] == "high")
    turned, _ = speech.load(folder, ["low", "high"], 0.2)
    assert turned.labels == ("low", "high")


def test_the_lists_of_the_archive_say_what_is_dev(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "words")
    (tmp_path / "words" / "validation_list.txt").write_text("low/3.wav\nhigh/11.wav\n")
    (tmp_path / "words" / "testing_list.txt").write_text("low/0.wav\nhigh/0.wav\nhigh/1.wav\n")
    _, splits = speech.load(tmp_path / "words", None, 0.2)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 19, "dev": 2}
    assert sorted(splits["dev"].labels) == [0, 1]
    (tmp_path / "words" / "validation_list.txt").write_text("low/33.wav")
    with pytest.raises(DataError, match="leaves none"):
        speech.load(tmp_path / "words", None, 0.2)


@pytest.mark.parametrize("name", ["whisper", "wav2vec2"])
def test_a_whole_run(name: str, folder: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    result = run_one(compose(command(folder, encoders[name], tmp_path)))
    assert (result.status, result.task, result.data_source) == ("complete", "speech_commands", "local")
    assert 0 < result.params.adapter <= result.params.budget
    (run,) = (tmp_path / "runs").iterdir()
    outputs = []
    for form in ("peft", "merged"):
        export([f"run={run}", f"out={tmp_path / form}", f"format={form}"])
    merged = hf.AutoModelForAudioClassification.from_pretrained(tmp_path / "merged")
    base, fresh = load_classifier("audio", name, path=encoders[name], labels=["high", "low"], head_seed=99)
    assert any(key.startswith("projector") for key in fresh)
    rows = speech.load(folder, None, 0.2)[1]["train"]
    inputs = {base.main_input_name: speech.features(encoders[name], base.main_input_name)(rows.inputs)}
    for model in (merged, PeftModel.from_pretrained(base, str(tmp_path / "peft"))):
        with torch.no_grad():
            outputs.append(model.eval()(**inputs).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    assert outputs[0].std(0).max() > 3e-4  # what is equal to 1e-5 is not the same for every row


def test_what_is_missing_is_said(folder: Path, encoders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are folders for high, low, wanted was middle"):
        speech.load(folder, ["low", "middle"], 0.2)
    with pytest.raises(DataError, match=r"expected data\.dir=DIR"):
        make_problem(compose(["task=speech_commands"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder of WAV files for each of at least two words"):
        speech.load(tmp_path / "empty", None, 1.0)
    for word in ("yes", "no"):
        (tmp_path / "empty" / word).mkdir()
    with pytest.raises(DataError, match=r"expected files \*\.wav for every word, there are none in no, yes"):
        speech.load(tmp_path / "empty", None, 1.0)
    broken = tmp_path / "broken"
    for word in TONES:
        (broken / word).mkdir(parents=True)
        (broken / word / "0.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(DataError, match="expected a WAV file"):
        speech.load(broken, None, 0.2)
    with pytest.raises(BackboneError, match="feature extractor"):
        speech.features(tmp_path / "empty", "input_values")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("task=speech_commands backbone=minilm", "has sound, not text"),
        ("task=speech_commands data.source=hub", "reads a folder"),
        ("backbone=whisper_tiny", "it hears, and task=mnli is silent"),
        ("task=speech_commands task.words=[yes]", "task.words"),
        ("task=speech_commands task.seconds=0", "task.seconds"),
    ],
)
def test_what_does_not_go_together_is_said(overrides: str, said: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        check_command_line(overrides.split())
