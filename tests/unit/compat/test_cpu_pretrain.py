import pytest
import torch
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from falcon_bridge.compat import cpu_runtime

from .conftest import clean_process_state
from .tiny_gpt import pretrain_config


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the loop on CUDA needs no cpu_runtime")


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_step_end(self, context):
        self.values.append(float(context.loss_dict["lm loss"]))


def train(iterations, save=None):
    losses = Losses()
    with clean_process_state(), cpu_runtime():
        pretrain(pretrain_config(iterations, save, hidden_dropout=0.1), forward_step, [losses])
    return losses.values


def test_pretrain_learns_saves_and_resumes_exactly(tmp_path):
    """Dropout is on, so the resumed run gives the same losses only if every RNG stream was saved and restored."""
    save = str(tmp_path / "checkpoint")
    first = train(4, save)
    resumed = train(6, save)
    whole = train(6)
    assert (tmp_path / "checkpoint" / "iter_0000004" / "run_config.yaml").exists()
    assert len(first) == 4
    assert len(resumed) == 2
    assert whole[-1] < whole[0] - 0.3
    assert first + resumed == whole
