"""The bookkeeping of launches, with Triton's compiler and C launcher replaced; tests/gpu has real ones."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, native_specialize_impl
from triton.tools.tensor_descriptor import TensorDescriptor

from falcon_bridge.ops import launch
from falcon_bridge.ops.launch import AlignedDescriptor, FastLaunch
from tests.unit.interpreter import not_interpreted


pytestmark = not_interpreted

HOPPER = GPUTarget("cuda", 90, 32)


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr, FLIP: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n) * factor, mask=offsets < n)


class Launches:
    """What went through Triton, and what through its C launcher."""

    def __init__(self, monkeypatch, scratch=0):
        self.by_triton, self.fast, self.stream, self.scratch = [], [], 7, scratch
        active = SimpleNamespace(get_current_target=lambda: HOPPER, get_current_stream=lambda device: self.stream)
        monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.device)
        monkeypatch.setattr(JITFunction, "run", self.run)
        self.device = 0

    def run(self, *args, grid, warmup, **kwargs):
        number = len(self.by_triton)
        self.by_triton.append((grid, args, kwargs))
        launcher = SimpleNamespace(
            launch=lambda *args: self.fast.append((number, args)),
            global_scratch_size=self.scratch,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=True,
        )
        return SimpleNamespace(run=launcher, function=100 + number, packed_metadata=(4, 1, 0))


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def scale(**meta):
    return FastLaunch(scale_kernel, **{"BLOCK": 64, "FLIP": False, "num_warps": 2, **meta})


def test_the_installed_triton_is_one_that_launches_fast():
    """Where this fails after an upgrade: see whether `launch` still calls the C launcher with what it takes."""
    assert launch._supported()
    assert nvidia._BASE_ARGS_FORMAT == "iiiKKppOOOOOO"
    names = [line.strip() for line in inspect.getsource(nvidia.CudaLauncher.__call__).splitlines()[-2:]]
    assert names == [
        "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl,",
        "global_scratch, profile_scratch, *args)",
    ]
    assert (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,"
        in inspect.getsource(JITFunction.run)
    )
    assert isinstance(CompiledKernel.run, property)


def test_the_first_launch_compiles_and_the_next_runs_what_it_compiled(launches):
    x, y, other = (torch.zeros(64) for _ in range(3))
    kernel = scale()
    kernel((3,), x, y, 48, 0.5)
    assert launches.by_triton == [((3,), (x, y, 48, 0.5), {"BLOCK": 64, "FLIP": False, "num_warps": 2})]
    assert not launches.fast
    kernel((2, 5), other, y, 32, 2.0)
    assert len(launches.by_triton) == 1
    ((number, args),) = launches.fast
    base, given = args[: len(nvidia._BASE_ARGS_FORMAT)], args[len(nvidia._BASE_ARGS_FORMAT) :]
    assert number == 0 and base == (2, 5, 1, 7, 100, False, True, None, None, (4, 1, 0), None, None, None)
    assert given[0] is other and given[1:] == (y, 32, 2.0, 64, False)
    assert len(given) == len(scale_kernel.arg_names)


def test_the_stream_is_the_current_one_of_each_launch(launches):
    x, kernel = torch.zeros(64), scale()
    for stream in (7, 7, 8, 9, 8):
        launches.stream = stream
        kernel((1,), x, x, 16, 1.0)
    assert [args[3] for _, args in launches.fast] == [7, 8, 9, 8]


VALUES = (0, 1, 2, 16, 17, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**35, 2**63, True, 1.0, 2.0, None)


def test_whatever_triton_compiles_anew_is_not_mixed_up(launches):
    base = torch.zeros(80)
    tensors = (base, base[1:], base[4:], base.bfloat16(), base.double(), base.int(), None, torch.nn.Parameter(base))
    descriptors = tuple(
        TensorDescriptor.from_tensor(torch.zeros(64, 64, dtype=dtype), [block, 32])
        for dtype, block in itertools.product((torch.int8, torch.bfloat16), (16, 32))
    )
    kernel = scale()
    compiled: dict[tuple, int] = {}
    calls = [(x, base, n, 1.0) for x in tensors + descriptors for n in (16, 17)]
    calls += [(base, base, n, factor) for n in VALUES for factor in VALUES[:4] + VALUES[-4:]]
    for arguments in calls * 2:
        backend = make_backend(HOPPER)
        special = tuple(native_specialize_impl(backend, one, False, True, True) for one in arguments)
        before = len(launches.by_triton)
        kernel((1,), *arguments)
        if special not in compiled:
            compiled[special] = before
            assert len(launches.by_triton) == before + 1, arguments
        else:
            assert len(launches.by_triton) == before and launches.fast[-1][0] == compiled[special], arguments
    assert len(compiled) > 30


def test_a_misaligned_pointer_has_a_kernel_of_its_own(launches):
    base, kernel = torch.zeros(80), scale()
    for x in (base, base[1:], base[4:], base[2:], base):
        kernel((1,), x, base, 16, 1.0)
    assert len(launches.by_triton) == 2
    assert [number for number, _ in launches.fast] == [0, 1, 0]


def test_each_device_has_its_kernels(launches):
    x, kernel = torch.zeros(64), scale()
    for launches.device in (0, 1, 0, 1):
        kernel((1,), x, x, 16, 1.0)
    assert len(launches.by_triton) == 2 and [number for number, _ in launches.fast] == [0, 1]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_hear_of_every_launch(launches, hook):
    x, kernel = torch.zeros(64), scale()
    kernel((1,), x, x, 16, 1.0)
    listener = print
    hooks = getattr(triton.knobs.runtime, hook)
    hooks.add(listener)
    try:
        kernel((1,), x, x, 16, 1.0)
    finally:
        hooks.remove(listener)
    kernel((1,), x, x, 16, 1.0)
    assert len(launches.by_triton) == 2 and len(launches.fast) == 1


def test_a_kernel_with_scratch_memory_is_left_to_triton(monkeypatch):
    launches = Launches(monkeypatch, scratch=128)
    x, kernel = torch.zeros(64), scale()
    for _ in range(3):
        kernel((1,), x, x, 16, 1.0)
    assert len(launches.by_triton) == 3 and not launches.fast


def test_an_unknown_triton_launches_in_its_own_way_and_says_so(monkeypatch, caplog):
    # Bridge's logging, once another test has set it up, drops the warnings of every logger that it finds
    monkeypatch.setattr(launch.logger, "filters", [])
    launches = Launches(monkeypatch)
    monkeypatch.setattr(triton, "__version__", "3.61.0")
    launch._supported.cache_clear()
    try:
        kernel = scale()
        x = torch.zeros(64)
        for _ in range(2):
            kernel((1,), x, x, 16, 1.0)
    finally:
        launch._supported.cache_clear()
    assert len(launches.by_triton) == 2 and not launches.fast
    assert "Triton 3.61.0" in caplog.text and "3.6" in caplog.text


def test_constexprs_are_given_by_name_and_declared_last():
    with pytest.raises(TypeError, match=r"scale_kernel: give all its constexpr parameters by name \(BLOCK, FLIP\)"):
        FastLaunch(scale_kernel, BLOCK=64)

    @triton.jit
    def misplaced_kernel(x_ptr, BLOCK: tl.constexpr, n):
        tl.store(x_ptr, n + BLOCK)

    with pytest.raises(TypeError, match="declare them last"):
        FastLaunch(misplaced_kernel, BLOCK=64)


def test_a_descriptor_without_checks_is_the_same_to_triton():
    codes = torch.zeros(48, 64, dtype=torch.int8)
    checked = TensorDescriptor.from_tensor(codes, [16, 32])
    unchecked = AlignedDescriptor(codes, codes.shape, [64, 1], [16, 32])
    backend = make_backend(HOPPER)
    of = [native_specialize_impl(backend, one, False, True, True) for one in (checked, unchecked)]
    assert of[0] == of[1] and list(unchecked.shape) == list(checked.shape) and unchecked.padding == checked.padding
    assert list(unchecked.strides) == list(checked.strides)
