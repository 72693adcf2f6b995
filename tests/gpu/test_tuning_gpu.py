"""The shipped tuning tables against the installed mamba-ssm, and the SSM branch under them."""

import logging

import pytest
import torch

from falcon_bridge.ops.tuning import shipped
from falcon_bridge.ops.tuning.table import TuningTable
from tests.gpu.test_ssm_gpu import mixer, provider, randomize, run


pytestmark = pytest.mark.gpu


@pytest.fixture
def kernels(monkeypatch):
    """mamba-ssm's kernels as they are after import, under no table and with nothing tuned yet."""
    found = shipped.mamba_ssm_kernels()
    for kernel in found.values():
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setattr(kernel, "run", type(kernel).run.__get__(kernel))
    return found


@pytest.fixture
def timed(monkeypatch):
    """Names of the kernels that the autotuner times, one for each configuration."""
    from triton.runtime import Autotuner

    names, bench = [], Autotuner._bench

    def noted(kernel, *args, **kwargs):
        names.append(kernel.base_fn.__name__)
        return bench(kernel, *args, **kwargs)

    monkeypatch.setattr(Autotuner, "_bench", noted)
    return names


def tables():
    return sorted(shipped.shipped_table((9, 0)).parent.glob("*.json"))


@pytest.mark.parametrize("path", tables(), ids=lambda path: path.stem)
def test_every_choice_is_one_of_the_kernels_own_configurations(path, kernels):
    table = TuningTable.read(path)
    assert set(table.kernels) <= set(kernels)
    for name, entry in table.kernels.items():
        own = [config for config, _ in shipped.own_configs(kernels[name])]
        if len(own) == 1:
            pytest.skip("MAMBA_DETERMINISTIC=1 leaves each kernel one configuration")
        assert entry.key == tuple(kernels[name].keys), name
        assert [config for config in entry.choices.values() if config not in own] == [], name


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == shipped.__name__]


def use_shipped_table(kernels) -> None:
    path = shipped.shipped_table(torch.cuda.get_device_capability())
    if not path.exists():
        pytest.skip(f"no table is shipped for {path.stem}")
    if all(len(kernel.configs) == 1 for kernel in kernels.values()):
        pytest.skip("MAMBA_DETERMINISTIC=1 leaves each kernel one configuration")
    shipped.use_table(TuningTable.read(path), kernels)


@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_a_released_size_is_neither_timed_nor_borrows(rows, kernels, timed, caplog):
    from benchmarks.tune_ssm import Job, Shape, run_once

    caplog.set_level(logging.DEBUG, logger=shipped.__name__)
    use_shipped_table(kernels)
    run_once(Job(Shape(chunk_size=128, head_dim=64, state=128, heads=24), "bf16", rows))
    assert timed == []
    assert said(caplog) == []
    assert sum(bool(kernel.cache) for kernel in kernels.values()) >= 12  # the branch ran, under the table


def test_a_size_without_a_table_agrees_with_torch_and_is_not_timed(kernels, timed, caplog, report):
    caplog.set_level(logging.INFO, logger=shipped.__name__)
    use_shipped_table(kernels)
    config = provider(torch.bfloat16, 2, True, "mamba_ssm")
    config.chunk_size, config.mamba_head_dim, config.mamba_state_dim = 64, 32, 32
    module = mixer(config)
    randomize(module)
    x = torch.randn(333, 2, 192, device="cuda", dtype=torch.bfloat16)
    fused, plain = (run(module, backend, x) for backend in ("mamba_ssm", "torch"))
    errors = {name: ((fused[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain}
    worst = max(errors, key=errors.get)
    report(test="ssm with borrowed tuning", **{worst: errors[worst]})
    assert errors[worst] < 3e-2, errors
    assert timed == []
    assert "is not tuned for" in said(caplog)[0]
