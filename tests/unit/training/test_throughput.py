import pytest

from falcon_bridge.training.callbacks import StepReport
from falcon_bridge.training.throughput import duration, peak_flops, progress_note, throughput


def step(number, **fields):
    defaults = {"loss": 5 - number, "lr": 1e-3, "grad_norm": 0.25, "skipped": False}
    return StepReport(number, **{**defaults, **fields})


def test_peaks_by_the_names_that_drivers_give():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp8") == 1978.9e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756.5e12
    assert peak_flops("NVIDIA GH200 480GB", "bf16") == peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("CPU (some Xeon)", "bf16") is None


def test_speed_leaves_out_the_first_step_of_the_process():
    slow = step(1, seconds=100.0, tokens=1000, flops=4e12, first=True)
    steps = [slow] + [step(n, seconds=s, tokens=1000, flops=4e12) for n, s in ((2, 0.5), (3, 1.5), (4, 4.0))]
    speed = throughput(steps, ranks=2, peak=1e13)
    assert speed.tokens_per_second == pytest.approx(3000 / 6)
    assert speed.flops_per_second == pytest.approx(1e12)
    assert speed.mfu == pytest.approx(0.1) and speed.seconds_per_step == 1.5
    assert "500 tokens/s" in str(speed) and "MFU 10.0%" in str(speed)
    assert throughput([slow], 1, None).tokens_per_second == 10  # better than nothing
    assert "MFU" not in str(throughput(steps, 2, None))
    assert throughput([step(1)], 1, None) is None


def test_note_has_all_that_an_engineer_watches():
    steps = [step(n, seconds=2.0, tokens=4096, flops=1e14, memory=3 * 2**30) for n in (1, 2)]
    note = progress_note(steps, 1, 1e14, 1802)
    for part in (
        "loss 3.0000",
        "lr 1.00e-03",
        "grad norm 0.25",
        "2,048 tokens/s",
        "50 TFLOP/s",
        "MFU 50.0%",
        "3.0 GiB",
    ):
        assert part in note, part
    assert "ETA 1:00:00" in note
    # the speed is that of the last steps, so a pause long ago does not count
    before = [step(n, seconds=500.0, tokens=1) for n in range(1, 50)]
    assert "ETA 0:00:00" in progress_note(
        [*before, *(step(n, seconds=2.0, tokens=1) for n in range(50, 71))], 1, None, 70
    )
    assert "skipped" in progress_note([step(1, skipped=True, grad_norm=None)], 1, None, 10)


def test_durations():
    assert duration(59.6) == "0:01:00"
    assert duration(86400 * 3 + 3661) == "3 d 1:01:01"
