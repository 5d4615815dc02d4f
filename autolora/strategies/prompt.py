"""Prompt tuning: vectors before the embedded row are trained (Lester, Al-Rfou & Constant, EMNLP 2021), through PEFT.

The virtual tokens come first, so a model that classifies by its first position reads the first of them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from autolora.plan import Site
from autolora.strategies.outside import TASK_TYPE, PeftOptions, Prompting

if TYPE_CHECKING:
    from peft import PromptTuningConfig
    from torch import nn


class Options(PeftOptions):
    """How many virtual tokens, and how they start: as tokens drawn from the vocabulary (section 3.2 of the paper finds
    that better than noise), or from a standard normal distribution.
    """

    tokens: int = Field(default=20, ge=1)
    init: Literal["vocabulary", "random"] = "vocabulary"


class Prompt(Prompting[Options]):
    """Trains the embeddings of virtual tokens, and the head: ``tokens * embedding width`` parameters."""

    Options = Options

    def peft_config(self, model: nn.Module, sites: Mapping[str, Site]) -> PromptTuningConfig:
        """The width is that of the embeddings, which not every model shares with its layers (ELECTRA)."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=TASK_TYPE,
            num_virtual_tokens=self.options.tokens,
            token_dim=model.get_input_embeddings().embedding_dim,  # type: ignore[operator]
            num_attention_heads=getattr(model.config, "num_attention_heads", None),
            prompt_tuning_init="SAMPLE_VOCAB" if self.options.init == "vocabulary" else "RANDOM",
        )
