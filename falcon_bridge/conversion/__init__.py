"""Falcon-H1 and Falcon-Edge checkpoints between Hugging Face and Megatron: checked, exact, nothing half-written."""
