"""Power and throttling of this machine's GPUs while requests run; nothing without NVML.

Meaningful only where the server runs on this machine: otherwise it is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from bench import metrics
from bench.load import behind
from bench.load.trace import Trace

SAMPLE_S = 0.1
# Bits of NVML's clock event reasons, by the names of nvidia-smi. Idle and application clocks are
# not throttling.
THROTTLE_REASONS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}


class Watch:
    """Samples of one round, at times of `time.perf_counter`."""

    def __init__(self, num_gpus: int) -> None:
        self.samples: list[tuple[float, float]] = []  # (s, W of all GPUs)
        self.counted: list[tuple[float, float]] = []  # (s, J of all GPUs so far), where they count
        self.sm_clocks_mhz: list[int] = []  # every sample of every GPU
        self.reasons = 0
        self._num_gpus = num_gpus

    def energy_j(self, traces: Sequence[Trace], start_s: float) -> float | None:
        """Energy from the first request sent to the last token.

        Args:
            start_s: `time.perf_counter()` that is zero in the traces.
        """
        ends = [t.last_s for t in traces if t.last_s is not None]
        if not self._num_gpus or not ends:
            return None
        begin_s, end_s = start_s + min(t.sent_s for t in traces), start_s + max(ends)
        # NVML's power is a mean over the last second: of a short round it is that of before.
        if self.counted:
            return metrics.counted_energy_j(self.counted, begin_s, end_s)
        return metrics.energy_j(self.samples, begin_s, end_s)

    def sm_clock_mhz(self) -> dict[str, float] | None:
        """Lowest, median and highest clock of the multiprocessors; None without GPUs."""
        if not self.sm_clocks_mhz:
            return None
        clocks = self.sm_clocks_mhz
        return {"low": min(clocks), "median": metrics.median(clocks), "high": max(clocks)}

    def throttle_reasons(self) -> tuple[str, ...] | None:
        """Names of the reasons seen on any GPU; None without GPUs."""
        if not self._num_gpus:
            return None
        return tuple(name for bit, name in THROTTLE_REASONS.items() if self.reasons & bit)


class Telemetry:
    """The GPUs of this machine, through `pynvml` where it is installed and finds some."""

    def __init__(self, nvml: Any | None, handles: Sequence[Any] = ()) -> None:
        self._nvml = nvml
        self._handles = list(handles)
        self._counts = bool(self._handles) and self._has_counters()

    def _has_counters(self) -> bool:
        try:
            for handle in self._handles:
                self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except self._nvml.NVMLError:
            return False
        return True

    @classmethod
    def for_url(cls, url: str) -> Telemetry:
        """Telemetry where the server is on this machine, else none."""
        if not is_local(url):
            return cls(None)
        try:
            import pynvml
        except ImportError:
            return cls(None)
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            return cls(pynvml, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)])
        except pynvml.NVMLError:
            return cls(None)

    def devices(self) -> list[dict[str, Any]] | None:
        """Name, driver, power limit, link and highest clocks of each GPU; None without."""
        if not self._handles:
            return None
        nvml = self._nvml
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return [
            {
                "name": _text(nvml.nvmlDeviceGetName(h)),
                "driver": driver,
                "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
                "pcie_generation": nvml.nvmlDeviceGetCurrPcieLinkGeneration(h),
                "pcie_width": nvml.nvmlDeviceGetCurrPcieLinkWidth(h),
                "max_sm_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(h, nvml.NVML_CLOCK_SM),
                "max_memory_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(h, nvml.NVML_CLOCK_MEM),
            }
            for h in self._handles
        ]

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[Watch]:
        """Sample until the block ends."""
        watch = Watch(len(self._handles))
        if not self._handles:
            yield watch
            return
        self._sample(watch)
        task = asyncio.create_task(self._keep_sampling(watch))
        try:
            yield watch
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._sample(watch)

    async def _keep_sampling(self, watch: Watch) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._sample(watch)

    def _sample(self, watch: Watch) -> None:
        nvml = self._nvml
        watts = sum(nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1000
        watch.samples.append((time.perf_counter(), watts))
        if self._counts:
            joules = sum(nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles) / 1000
            watch.counted.append((time.perf_counter(), joules))
        for handle in self._handles:
            watch.sm_clocks_mhz.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
            watch.reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)


def is_local(url: str) -> bool:
    """Whether the server's address is of this machine's loopback, and no tunnel to another."""
    host = urlsplit(url).hostname or ""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return loopback and not behind.is_forwarded(url)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
