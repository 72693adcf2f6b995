"""Time that communication takes beyond what computation hides."""

from collections.abc import Iterable


Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same set of points as disjoint intervals, in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        elif end > start:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    """Measure of the union."""
    return sum(end - start for start, end in merged(intervals))


def exposed(communication: Iterable[Interval], computation: Iterable[Interval]) -> float:
    """Measure of what is in `communication` and not in `computation`."""
    communication, computation = list(communication), list(computation)
    return length([*communication, *computation]) - length(computation)


def shares_of_step(profile, steps: int, step_seconds: float) -> dict[str, float]:
    """From a `torch.profiler.profile` of `steps` steps: what a step's time, measured without it, goes into.

    A kernel of NCCL also waits for the other ranks, so what they differ in is part of it.

    Returns:
        Shares of a step: `communication`, during which a kernel of NCCL runs; `communication_exposed`, the part of it
        during which no other does; `idle`, during which none does, because the host has issued none.
    """
    from torch.autograd import DeviceType

    communication, computation = [], []
    for event in profile.events():
        # annotations span kernels and the gaps between them
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        interval = event.time_range.start, event.time_range.end
        (communication if "nccl" in event.name.lower() else computation).append(interval)
    microseconds = steps * step_seconds * 1e6
    return {
        "communication": length(communication) / microseconds,
        "communication_exposed": exposed(communication, computation) / microseconds,
        "idle": 1 - length([*communication, *computation]) / microseconds,
    }
