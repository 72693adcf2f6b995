"""Falcon-H1 checkpoints between Hugging Face and Megatron: checked before, bit-exact, nothing half-written."""
