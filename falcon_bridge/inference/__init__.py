"""Text from Megatron models."""
