"""Tuning tables under Triton's own autotuner, around kernels that only note how they are launched."""

import json
import logging
import math
import sys
import types

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

from falcon_bridge.errors import UserError
from falcon_bridge.ops.tuning import shipped
from falcon_bridge.ops.tuning.shipped import use_shipped_tuning, use_table
from falcon_bridge.ops.tuning.table import CallKey, KernelTable, TuningTable


KEY = ("chunk_size", "hdim", "IS_CAUSAL")
BF16, FP32 = ("bfloat16", "float32"), ("float32", "float32")
CONFIGS = [({"BLOCK": 16}, 2, 5), ({"BLOCK": 32}, 4, 3), ({"BLOCK": 32}, 8, 3), ({"BLOCK": 64}, 4, 4)]
FASTEST = 1


def config(block: int, warps: int, stages: int) -> dict:
    return {"BLOCK": block, "num_warps": warps, "num_ctas": 1, "num_stages": stages}


class Noted(KernelInterface):
    """In place of a compiled kernel: notes its launches, and refuses blocks that are too large."""

    arg_names = ("x", "y", "seq_idx", "chunk_size", "hdim", "IS_CAUSAL", "BLOCK")

    def __init__(self, limit: float = math.inf):
        def chunk_kernel():
            """Gives the kernel its name."""

        self.fn, self.limit, self.launches = chunk_kernel, limit, []

    def run(self, *args, grid, warmup, BLOCK, num_warps, num_ctas, num_stages, **kwargs):
        if self.limit < BLOCK:
            raise OutOfResources(BLOCK, self.limit, "shared memory")
        self.launches.append(config(BLOCK, num_warps, num_stages))


class Kernel:
    """An autotuned kernel, the launches it came to, and how many configurations were timed."""

    def __init__(self, configs=CONFIGS, limit: float = math.inf):
        self.noted, self.timed, self.zeroed = Noted(limit), 0, []
        self.tuner = triton.autotune(
            configs=[
                triton.Config(meta, num_warps=warps, num_stages=stages, pre_hook=self._zero)
                for meta, warps, stages in configs
            ],
            key=list(KEY),
            do_bench=self._bench,
        )(self.noted)

    def _zero(self, arguments: dict) -> None:
        self.zeroed.append(arguments["BLOCK"])

    def _bench(self, call, quantiles):
        call()
        self.timed += 1
        seconds = abs(self.timed - 1 - FASTEST) + 1.0
        return [seconds] * len(quantiles)

    def __call__(self, chunk_size=128, hdim=64, causal=True, dtypes=BF16, seq_idx=False) -> dict:
        """Launch once, and return the configuration of the launch."""
        x, y = (torch.empty(1, dtype=getattr(torch, dtype)) for dtype in dtypes)
        packed = torch.empty(1, dtype=torch.int32) if seq_idx else None
        self.tuner[(1,)](x, y, packed, chunk_size, hdim, IS_CAUSAL=causal)
        return self.noted.launches[-1]


def table(choices: dict, key=KEY) -> TuningTable:
    calls = {CallKey(values, dtypes): config(*chosen) for (values, dtypes), chosen in choices.items()}
    return TuningTable({"gpu": "some GPU"}, {"chunk_kernel": KernelTable(key, calls)})


@pytest.fixture
def tuned():
    """A function: a kernel under a table of these choices."""

    def make(choices: dict, **options) -> Kernel:
        kernel = Kernel(**options)
        use_table(table(choices), {"chunk_kernel": kernel.tuner})
        return kernel

    return make


def test_without_a_table_the_autotuner_times_every_configuration():
    kernel = Kernel()
    assert kernel() == config(32, 4, 3)
    assert kernel.timed == len(CONFIGS)


def test_a_call_in_the_table_is_not_timed_and_keeps_the_hook_of_its_configuration(tuned):
    kernel = tuned({((128, 64, True), BF16): (64, 4, 4), ((128, 64, True), FP32): (32, 8, 3)})
    assert kernel() == config(64, 4, 4)
    assert kernel(dtypes=FP32) == config(32, 8, 3)
    assert kernel() == config(64, 4, 4)
    assert kernel.timed == 0
    assert kernel.zeroed == [64, 32, 64]  # as often as launched: a lost hook is a wrong gradient
    assert all(choice in kernel.tuner.configs for choice in kernel.tuner.cache.values())


@pytest.mark.parametrize(
    ("call", "like"),
    [
        ({"hdim": 128}, (16, 2, 5)),  # one doubling from 64, two from 512
        ({"hdim": 300}, (64, 4, 4)),  # 0.8 from 512, 2.2 from 64
        ({"hdim": 512, "dtypes": FP32}, (32, 8, 3)),  # dtypes count before sizes
        ({"seq_idx": True}, (16, 2, 5)),
    ],
)
def test_an_unknown_call_runs_as_the_most_similar_one(tuned, call, like):
    kernel = tuned(
        {
            ((128, 64, True), BF16): (16, 2, 5),
            ((128, 512, True), BF16): (64, 4, 4),
            ((128, 64, True), FP32): (32, 8, 3),
        }
    )
    assert kernel(**call) == config(*like)
    assert kernel.timed == 0


def test_the_first_unknown_call_is_stated_and_the_rest_are_details(tuned, caplog):
    caplog.set_level(logging.DEBUG, logger=shipped.__name__)
    kernel = tuned({((128, 64, True), BF16): (16, 2, 5)})
    for hdim in (64, 96, 96, 80, 96):
        kernel(hdim=hdim)
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("INFO", "DEBUG")
    assert (
        "chunk_kernel is not tuned for chunk_size=128, hdim=96, IS_CAUSAL=True and bfloat16/float32" in first.message
    )
    assert "as tuned for chunk_size=128, hdim=64" in first.message
    assert "FALCON_BRIDGE_TUNING=autotune" in first.message


def test_a_call_of_another_kind_is_timed(tuned):
    kernel = tuned({((128, 64, True), BF16): (64, 4, 4)})
    assert kernel(causal=False) == config(32, 4, 3)
    assert kernel.timed == len(CONFIGS)
    kernel(causal=False)
    assert kernel.timed == len(CONFIGS)


@pytest.mark.parametrize("hdim", [64, 128], ids=["in the table", "borrowed"])
def test_a_choice_that_does_not_fit_the_gpu_is_timed_after_all(tuned, hdim, caplog):
    caplog.set_level(logging.INFO, logger=shipped.__name__)
    kernel = tuned({((128, 64, True), BF16): (64, 4, 4)}, limit=32)
    assert kernel(hdim=hdim) == config(32, 4, 3)
    assert kernel(hdim=hdim) == config(32, 4, 3)
    assert kernel.timed == len(CONFIGS) - 1
    assert "chunk_kernel does not fit this GPU as tuned" in caplog.messages[-1]


def test_where_nothing_fits_the_error_is_tritons(tuned):
    kernel = tuned({((128, 64, True), BF16): (64, 4, 4)}, limit=8)
    for _ in range(2):
        with pytest.raises(OutOfResources, match="shared memory"):
            kernel()


def test_other_errors_are_not_a_reason_to_time(tuned):
    kernel = tuned({((128, 64, True), BF16): (64, 4, 4)})
    kernel.noted.run = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        kernel()
    assert kernel.timed == 0


def test_what_was_timed_before_stays(tuned):
    kernel = Kernel()
    kernel()
    use_table(table({((128, 64, True), BF16): (64, 4, 4)}), {"chunk_kernel": kernel.tuner})
    assert kernel() == config(32, 4, 3)


def test_a_second_table_changes_nothing():
    kernel = Kernel()
    for chosen in ((64, 4, 4), (16, 2, 5)):
        use_table(table({((128, 64, True), BF16): chosen}), {"chunk_kernel": kernel.tuner})
    assert kernel() == config(64, 4, 4)


def test_one_configuration_is_left_alone():
    kernel = Kernel(configs=CONFIGS[:1])  # as MAMBA_DETERMINISTIC=1 leaves
    use_table(table({((128, 64, True), BF16): (64, 4, 4)}), {"chunk_kernel": kernel.tuner})
    assert kernel() == config(16, 2, 5)


@pytest.mark.parametrize(
    "stale",
    [
        table({((128, 64, True), BF16): (128, 4, 4)}),  # no configuration of the kernel
        table({((64, 128, True), BF16): (64, 4, 4)}, key=("hdim", "chunk_size", "IS_CAUSAL")),
    ],
    ids=["configuration", "key"],
)
def test_choices_of_another_version_are_left_out_and_said(stale, caplog):
    caplog.set_level(logging.INFO, logger=shipped.__name__)
    kernel = Kernel()
    use_table(stale, {"chunk_kernel": kernel.tuner})
    assert kernel() == config(32, 4, 3)
    assert kernel.timed == len(CONFIGS)
    assert "left out for ['chunk_kernel']" in caplog.messages[0]
    assert "some GPU" in caplog.messages[0]


def test_a_table_is_read_as_it_was_written_and_merged(tmp_path):
    path = tmp_path / "sm00.json"
    old = table({((128, 64, True), BF16): (64, 4, 4), ((128, 32, False), FP32): (16, 2, 5)})
    old.kernels["another_kernel"] = KernelTable(("dim",), {CallKey((8,), BF16): config(16, 2, 5)})
    old.write(path)
    assert TuningTable.read(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["sm00.json"]

    newer = table({((128, 64, True), BF16): (32, 8, 3), ((256, 64, True), BF16): (16, 2, 5)})
    newer.made_with = {"gpu": "another GPU", "triton": "9"}
    old.merge(newer)
    assert old.made_with == {"gpu": "another GPU", "triton": "9"}
    assert set(old.kernels) == {"another_kernel", "chunk_kernel"}
    choices = old.kernels["chunk_kernel"].choices
    assert len(choices) == 3
    assert choices[CallKey((128, 64, True), BF16)] == config(32, 8, 3)
    assert newer.kernels["chunk_kernel"].choices.keys() < choices.keys()


def test_a_merge_drops_choices_for_a_key_that_changed():
    old, newer = table({((128, 64, True), BF16): (64, 4, 4)}), table({((7,), BF16): (16, 2, 5)}, key=("dim",))
    old.merge(newer)
    assert old.kernels == newer.kernels


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"made_with": {}}',
        '{"made_with": {}, "kernels": {"k": {"key": ["dim"], "choices": [{"values": [1, 2], "dtypes": []}]}}}',
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bad.json is not a tuning table .*tune_ssm.py writes one"):
        TuningTable.read(path)


def test_shipped_tables_are_whole_and_in_the_order_that_the_script_writes(tmp_path):
    paths = list(shipped.shipped_table((9, 0)).parent.glob("*.json"))
    assert shipped.shipped_table((9, 0)) in paths
    for path in paths:
        read = TuningTable.read(path)
        assert set(read.made_with) >= {"gpu", "triton", "mamba_ssm"}
        assert all(kernel.choices for kernel in read.kernels.values())
        read.write(tmp_path / path.name)
        assert (tmp_path / path.name).read_text() == path.read_text()


@pytest.fixture
def on_gpu(monkeypatch):
    """A machine with an H100 and mamba-ssm whose only kernel is the one returned."""
    kernel = Kernel()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in shipped.KERNEL_MODULES:
        module = types.SimpleNamespace(triton=triton, chunk_kernel=kernel.tuner)
        monkeypatch.setitem(sys.modules, f"mamba_ssm.ops.triton.{name}", module)
    use_shipped_tuning.cache_clear()
    yield kernel
    use_shipped_tuning.cache_clear()


def write_table(path, chosen=(64, 4, 4)):
    table({((128, 64, True), BF16): chosen}).write(path)
    return path


@pytest.mark.parametrize("value", [None, "shipped"])
def test_the_table_of_the_architecture_is_used_by_default_and_once(on_gpu, monkeypatch, tmp_path, value):
    monkeypatch.delenv(shipped.SWITCH, raising=False)
    if value:
        monkeypatch.setenv(shipped.SWITCH, value)
    path = write_table(tmp_path / "sm90.json")
    monkeypatch.setattr(shipped, "shipped_table", {(9, 0): path}.__getitem__)
    use_shipped_tuning()
    path.unlink()
    use_shipped_tuning()
    assert on_gpu() == config(64, 4, 4)
    assert on_gpu.timed == 0


def test_a_table_of_the_users(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv(shipped.SWITCH, str(write_table(tmp_path / "mine.json", (16, 2, 5))))
    use_shipped_tuning()
    assert on_gpu() == config(16, 2, 5)
    assert on_gpu.timed == 0


def test_autotuning_can_be_asked_for(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv(shipped.SWITCH, "autotune")
    monkeypatch.setattr(shipped, "shipped_table", lambda _: write_table(tmp_path / "sm90.json"))
    use_shipped_tuning()
    assert on_gpu() == config(32, 4, 3)
    assert on_gpu.timed == len(CONFIGS)


def test_a_gpu_without_a_table_is_said_and_timed(on_gpu, monkeypatch, caplog):
    monkeypatch.delenv(shipped.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (0, 1))
    caplog.set_level(logging.INFO, logger=shipped.__name__)
    use_shipped_tuning()
    assert "no tuning table for sm01" in caplog.messages[0]
    on_gpu()
    assert on_gpu.timed == len(CONFIGS)


@pytest.mark.parametrize(
    ("value", "message"),
    [("fast", "use 'shipped', 'autotune', or the path"), ("/nowhere/table.json", "is not a tuning table")],
)
@pytest.mark.usefixtures("on_gpu")
def test_a_wrong_switch_is_one_line(monkeypatch, value, message):
    monkeypatch.setenv(shipped.SWITCH, value)
    with pytest.raises(UserError, match=message):
        use_shipped_tuning()


def test_without_a_gpu_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shipped, "mamba_ssm_kernels", None)
    use_shipped_tuning.cache_clear()
    use_shipped_tuning()
    use_shipped_tuning.cache_clear()


def test_the_shipped_table_holds_benchmarked_sizes():
    content = json.loads(shipped.shipped_table((9, 0)).read_text())
    fwd = content["kernels"]["_chunk_scan_fwd_kernel"]
    sizes = {tuple(choice["values"]) for choice in fwd["choices"] if "bfloat16" in choice["dtypes"]}
    assert fwd["key"] == ["chunk_size", "hdim", "dstate", "IS_CAUSAL"]
    assert {(128, 64, 128, True), (128, 64, 256, True), (256, 64, 256, True)} <= sizes
