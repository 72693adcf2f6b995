"""Proof that a checkpoint means the same in Megatron, under any parallel layout, as in stock transformers."""
