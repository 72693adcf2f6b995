"""Repairs of Megatron's optimizers, one by one; whole checkpoints: tests/parallel/test_sharded_checkpoints.py."""

from types import SimpleNamespace

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from falcon_bridge.compat import optimizer as repairs


def test_repairs_are_made_once():
    repairs.repair_optimizer_state()
    repaired = DistributedOptimizer.load_state_dict
    repairs.repair_optimizer_state()
    assert DistributedOptimizer.load_state_dict is repaired
    assert not hasattr(repaired.__wrapped__, "__wrapped__")


def test_parameters_of_a_resumed_run_count_their_own_steps():
    """Megatron hands torch's Adam one tensor for all of them, which it advances in place, once for each."""
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (3, 5, 2)]
    adam = torch.optim.AdamW(parameters, lr=0.1)

    def megatrons(self, state_dict):
        shared = torch.tensor(3.0)
        for parameter in parameters:
            self.optimizer.state[parameter] = {
                "step": shared,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    repairs._with_a_step_each(megatrons)(SimpleNamespace(optimizer=adam), {})
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    assert [adam.state[parameter]["step"].item() for parameter in parameters] == [4.0] * 3


def test_state_lies_where_a_padded_buffer_has_its_buckets():
    buckets = [SimpleNamespace(offset=0, numel_unpadded=3), SimpleNamespace(offset=8, numel_unpadded=2)]
    buffer = SimpleNamespace(numel=12, buckets=buckets)
    spread = repairs._spread({"exp_avg": torch.arange(1.0, 6.0), "numel_unpadded": 5}, buffer)
    assert spread["exp_avg"].tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 4, 5, 0, 0]
    assert spread["numel_unpadded"] == 5
