"""Power, temperature and memory of this machine's GPUs, by NVML where there is one."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class Gpu(BaseModel):
    """None: the driver does not tell."""

    index: int
    name: str | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None
    utilization: float | None  # share of the last interval in which a kernel ran
    memory_used_bytes: int | None
    memory_total_bytes: int | None


def load_nvml() -> Any | None:
    """NVIDIA's binding as vLLM carries it, without importing vLLM; None without a driver."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "third_party" / "pynvml.py"
    found = importlib.util.spec_from_file_location("serve_pynvml", path)
    if found is None or found.loader is None or not path.exists():
        return None
    nvml = importlib.util.module_from_spec(found)
    sys.modules[found.name] = nvml  # it looks itself up there
    found.loader.exec_module(nvml)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def driver_version(nvml: Any | None) -> str | None:
    """The driver's version."""
    return text(nvml.nvmlSystemGetDriverVersion()) if nvml else None


def read_gpus(nvml: Any | None) -> list[Gpu] | None:
    """Each GPU; None where there is no driver. Blocks while the driver does."""
    if nvml is None:
        return None
    return [read_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]


def read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(name: str, *arguments: Any) -> Any:
        with contextlib.suppress(nvml.NVMLError):
            return getattr(nvml, name)(handle, *arguments)
        return None

    power, limit = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetEnforcedPowerLimit")
    rates, memory = ask("nvmlDeviceGetUtilizationRates"), ask("nvmlDeviceGetMemoryInfo")
    name = ask("nvmlDeviceGetName")
    return Gpu(
        index=index,
        name=None if name is None else text(name),
        power_w=None if power is None else power / 1000,
        power_limit_w=None if limit is None else limit / 1000,
        temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        utilization=None if rates is None else rates.gpu / 100,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
    )


def text(value: str | bytes) -> str:
    """NVML gives bytes or text, by version."""
    return value.decode() if isinstance(value, bytes) else value
