"""What `bench.load.telemetry` asks of NVML, without a GPU."""

import time
from collections.abc import Callable


class FakeNvml:
    """Two GPUs, 100 and 200 W, 1,000 and 2,000 MHz; the second is at its power cap."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVMLError = RuntimeError

    def __init__(
        self,
        counts: bool = True,
        slow_s: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counts, self.clock = counts, clock
        self.slow_s = slow_s  # of one call

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        """Of 1 and 2 kW: not what the power says, which lags."""
        if not self.counts:
            raise self.NVMLError
        return round(1_000_000 * handle * self.clock())

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:  # noqa: N802
        assert which == self.NVML_CLOCK_SM
        return 1000 * handle

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        time.sleep(self.slow_s)
        return 100_000 * handle

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return {1: 0x01, 2: 0x04}[handle]

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.1"

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA Fake"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:  # noqa: N802
        return 300_000

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:  # noqa: N802
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:  # noqa: N802
        return 16

    def nvmlDeviceGetMaxClockInfo(self, handle: int, which: int) -> int:  # noqa: N802
        return {self.NVML_CLOCK_SM: 2400, self.NVML_CLOCK_MEM: 14_000}[which]
