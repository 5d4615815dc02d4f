"""Where a W&B run goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb

from autolora.training.loggers import wandb_mode


@pytest.fixture(autouse=True)
def _nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has never logged in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()


def test_online_without_an_account_is_said_and_kept_offline() -> None:
    with pytest.warns(UserWarning, match="not logged in to W&B, so this run is kept offline"):
        assert wandb_mode("online") == "offline"


def test_online_with_credentials_is_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode("online") == "online"


def test_auto_is_offline_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("offline") == "offline"
