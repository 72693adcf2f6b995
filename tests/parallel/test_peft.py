"""Adapters under other layouts: trained under one, saved, loaded under the next, trained on, merged.

Each chain hands an adapter checkpoint from layout to layout. All must give the first one's logits from it, and the
first one's merged weights after a further training step: so forward, gradients (through the optimizer), checkpoints
and merging agree.
"""

import logging
import shutil
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model
from safetensors.torch import load_file, save_file

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.conversion.runtime import prepare_provider
from falcon_bridge.peft import DoRA, LoRA, merge_adapters
from falcon_bridge.ranks import run_ranks
from falcon_bridge.verification.batch import random_batch
from falcon_bridge.verification.checkpoints import random_config, write_random_checkpoint
from falcon_bridge.verification.megatron import MegatronUnderTest
from falcon_bridge.verification.reference import TrainSteps, transformers_outcome
from tests.parallel import states
from tests.parallel.variant import Variant


# name -> checkpoint, scheme, layouts: more tensor-parallel ranks than groups among them, and recomputed mixers
CHAINS = {
    "lora": (
        "gated_norm",
        LoRA(dim=4, alpha=10, lora_A_init_method="kaiming"),
        [
            Variant(),
            Variant(tp=2, sequence_parallel=True),
            Variant(tp=4, fields={"recompute_mixer": True}),
            Variant(pp=2, dp=2, distributed_optimizer=True),
        ],
    ),
    "dora": (
        "groups2_gated_norm",
        DoRA(dim=4, alpha=6),
        [
            Variant(tp=2),
            Variant(),
            Variant(tp=4, sequence_parallel=True),
            Variant(tp=2, pp=2, vp=2, sequence_parallel=True, fields={"recompute_mixer": True}),
        ],
    ),
}


ADAPTED = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")),
    "mamba.in_proj",
    "mamba.out_proj",
}


class AdaptedModel(MegatronUnderTest):
    """The converted model with adapters, frozen but for them."""

    def __init__(self, hf, layout, peft) -> None:
        self.peft, self.merged = peft, False
        super().__init__(hf, layout)

    def _convert(self, dtype):
        provider = prepare_provider(self.bridge, self.layout, dtype, load_weights=True)
        provider.calculate_per_token_loss = True
        provider.register_pre_wrap_hook(self.peft)
        return provider.provide_distributed_model(ddp_config=self._ddp_config(), data_parallel_random_init=False)

    def merge(self) -> None:
        merge_adapters(self.chunks)
        self.merged = True

    def export(self):
        # not with Megatron Bridge's own merging, which knows neither DoRA nor in_proj under tensor parallelism
        return super().export() if self.merged else iter(())

    def adapter_state(self) -> dict:
        return {
            f"model{number}": {
                key: value
                for key, value in chunk.sharded_state_dict(metadata=states._metadata(None)).items()
                if ".adapter." in key and "_extra_state" not in key
            }
            for number, chunk in enumerate(unwrap_model(self.chunks))
        }

    def save(self, directory) -> None:
        directory.mkdir(exist_ok=True)
        dist.barrier()
        fork = filesystem_async.get_write_results_queue
        # the queue's manager process would import pytest and all of this anew
        with mock.patch.object(filesystem_async, "get_write_results_queue", lambda mode="fork": fork("fork")):
            dist_checkpointing.save(self.adapter_state(), str(directory))

    def load(self, directory) -> None:
        loaded = dist_checkpointing.load(self.adapter_state(), str(directory))
        for number, chunk in enumerate(unwrap_model(self.chunks)):
            missing, unexpected = chunk.load_state_dict(loaded[f"model{number}"], strict=False)
            assert not unexpected and not any(".adapter." in key for key in missing)


def on_a_rank(hf, layout, peft, batch, source, target):
    """Logits, merged weights after further steps, and the gradients' norm on rank 0; saved to `target` before them."""
    logging.disable(logging.WARNING)
    with cpu_runtime():
        model = AdaptedModel(hf, layout, peft)
        trained = [name for chunk in model.chunks for name, p in chunk.named_parameters() if p.requires_grad]
        assert trained and all(".adapter." in name for name in trained)
        if source is None:
            model.train(batch, TrainSteps(steps=3, lr=3e-2))
        else:
            model.load(source)
        logits = model.logits(batch)
        if target is not None:
            model.save(target)
        model.train(batch, TrainSteps(steps=2, clip_grad=0.1))
        after = model.logits(batch)
        model.merge()
        merged = model.logits(batch)
        weights = {name: tensor.clone() for name, tensor in model.export()}
    return (logits, after, merged, weights) if dist.get_rank() == 0 else None


@pytest.mark.parametrize("chain", CHAINS)
def test_adapters_move_between_layouts(chain, tmp_path):
    name, peft, layouts = CHAINS[chain]
    hf = write_random_checkpoint(tmp_path / "hf", name, seed=5, num_hidden_layers=4)
    batch = random_batch(random_config(name), batch_size=4, seq_length=12, seed=6)
    base = transformers_outcome(hf, batch).logits
    expected, source = None, None
    for number, layout in enumerate(layouts):
        target = tmp_path / str(number)
        logits, after, merged, weights = run_ranks(
            on_a_rank, layout.world_size, hf, layout, peft, batch, source, target, device="cpu", timeout_seconds=120
        )[0]
        if expected is None:
            expected = logits, after, weights
            # the adapters do something, and so do the further steps
            assert (logits - base).abs().max() > 0.05 and (after - logits).abs().max() > 0.01
        assert (logits - expected[0]).abs().max() <= 2e-5, layout
        assert (after - expected[1]).abs().max() <= 1e-4, layout
        assert (merged - after).abs().max() <= 2e-5, layout
        assert weights.keys() == expected[2].keys()
        for tensor, value in weights.items():
            assert (value - expected[2][tensor]).abs().max() <= 1e-5, (layout, tensor)
        source = target
    moved = [tensor for tensor, value in read_tensors(hf).items() if not torch.equal(value, weights[tensor])]
    assert {tensor.split(".", 3)[3].removesuffix(".weight") for tensor in moved} == ADAPTED
    write_model(hf, tmp_path / "merged", weights)
    assert (transformers_outcome(tmp_path / "merged", batch).logits - merged).abs().max() <= 1e-4


def read_tensors(hf) -> dict[str, torch.Tensor]:
    return load_file(hf / "model.safetensors")


def write_model(hf, target, tensors) -> None:
    target.mkdir()
    shutil.copyfile(hf / "config.json", target / "config.json")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
