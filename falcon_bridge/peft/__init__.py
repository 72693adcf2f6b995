"""LoRA and DoRA on both branches of Falcon-H1, under any layout.

Megatron Bridge's own schemes nearly do: theirs leave the parts of `in_proj` (z, x, B, C, dt) unnamed in a checkpoint
where there are more tensor-parallel ranks than groups, refuse `in_proj` under DoRA, take DoRA's norms of row-parallel
layers over one rank's columns, and their FLOP count takes the SSM to be twice as wide as the model.
"""

from falcon_bridge.peft.dora import DoRA
from falcon_bridge.peft.lora import LoRA
from falcon_bridge.peft.merge import merge_adapters


__all__ = ["DoRA", "LoRA", "merge_adapters"]
