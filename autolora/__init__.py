"""AutoLoRA: rank selection for LoRA adapters, learned, searched, grown or computed, and compared fairly."""

__version__ = "0.1.0"
