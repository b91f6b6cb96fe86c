"""Interleaved timing and peak memory, for ratios that hold while the machine's speed drifts."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# glibc gives large blocks back to the system when they are freed, or not, from one run to the next; taking them back
# costs more than the arithmetic of a loss. Here it keeps them.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


def steady_allocator() -> None:
    """Start this script again with an allocator that keeps freed memory, unless that is done already."""
    if any(name not in os.environ for name in _ALLOCATOR):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ALLOCATOR})


def medians_ms(functions: Mapping[str, Callable[[], Any]], *, runs: int = 60, warmup: int = 8) -> dict[str, float]:
    """Median wall time of each function, in milliseconds; the functions take turns."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * sorted(values)[len(values) // 2] for name, values in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], Any]) -> int:
    """Largest amount of CPU memory that tensors made by the function held at one time."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = lowest = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        # What the function frees at its start was made by the run before: it lowers the level to count from.
        lowest = min(lowest, held)
        peak = max(peak, held - lowest)
    return peak


def extra_rss_bytes(function: Callable[[], Any]) -> int:
    """Largest growth of the process's memory while the function runs, its result included; sampled each millisecond."""
    page = os.sysconf("SC_PAGE_SIZE")
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and not be seen

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    done = threading.Event()
    peak = start = resident()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak - start


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a measurement, without names of machines or folders."""
    return {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows with the environment as JSON."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    sys.stdout.write(f"written to {target}\n")
