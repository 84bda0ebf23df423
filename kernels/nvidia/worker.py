"""vLLM's GPU worker with our bounded all-reduce: `--worker-cls kernels.nvidia.worker.Worker`."""

from vllm.v1.worker import gpu_worker

from kernels.bounded_worker import BoundedWorker


class Worker(BoundedWorker, gpu_worker.Worker):
    """One GPU of the tensor-parallel group."""
