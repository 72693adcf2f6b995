"""Data for training: from text and conversations to the files that Megatron Core and Megatron Bridge read."""
