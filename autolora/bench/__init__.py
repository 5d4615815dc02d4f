"""What a step and a run cost, beside PEFT and beside what no LoRA method can beat: ``python -m autolora.bench``."""
