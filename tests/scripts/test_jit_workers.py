"""Kernels compiled by processes beside vLLM; a file stands in for TileLang's cache on disk."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest

from scripts import jit_workers

KERNEL = """
import os, pathlib, time
CACHE = pathlib.Path(os.environ["FAKE_CACHE"])
class Kernel:
    SECONDS = 0.3
    def compile(self, key):
        path = CACHE / key
        if path.exists():
            return
        if key == "broken" and "MAIN" not in os.environ.get("FAKE_ROLE", ""):
            raise RuntimeError("no such kernel")
        time.sleep(self.SECONDS)
        with path.open("a") as file:
            file.write(str(os.getpid()))
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "fake_kernel.py").write_text(textwrap.dedent(KERNEL))
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(package))
    monkeypatch.setenv("FAKE_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setattr(jit_workers, "SLOW_S", 0.1)
    monkeypatch.delitem(__import__("sys").modules, "fake_kernel", raising=False)
    import fake_kernel

    return fake_kernel.Kernel()


def compiled_by(tmp_path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (tmp_path / "cache").iterdir()}


def test_after_a_slow_key_the_others_are_compiled_by_workers(kernel, tmp_path):
    keys = [f"key{i}" for i in range(7)]
    jit_workers.compile_many(kernel, keys, workers=3)
    made = compiled_by(tmp_path)
    assert made.keys() == set(keys)
    assert len(set(made.values())) == 4  # this process for the first, three for the others


def test_engines_started_together_compile_a_key_once(kernel, tmp_path, monkeypatch):
    """A key that two workers compiled holds both their numbers."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    keys = [f"key{i}" for i in range(6)]
    workers = [w for _ in range(2) for w in jit_workers.start(kernel, list(keys), workers=2)]
    assert [worker.wait() for worker in workers] == [0, 0, 0, 0]
    assert compiled_by(tmp_path).keys() == set(keys)
    assert set(compiled_by(tmp_path).values()) <= {str(worker.pid) for worker in workers}


def test_keys_in_the_cache_start_no_worker(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(jit_workers, "SLOW_S", 60)  # to look into it may take a while
    for i in range(5):
        (tmp_path / "cache" / f"key{i}").write_text("before")
    monkeypatch.setattr(jit_workers.subprocess, "Popen", None)
    jit_workers.compile_many(kernel, [f"key{i}" for i in range(5)], workers=3)


def test_what_a_worker_could_not_compile_is_left_to_this_process(kernel, tmp_path, monkeypatch):
    def start(*args, **kwargs):
        with monkeypatch.context() as here:
            here.delenv("FAKE_ROLE")
            return popen(*args, **kwargs)

    popen = jit_workers.subprocess.Popen
    monkeypatch.setenv("FAKE_ROLE", "MAIN")
    monkeypatch.setattr(jit_workers.subprocess, "Popen", start)
    jit_workers.compile_many(kernel, ["key0", "broken", "key1", "key2"], workers=1)
    assert compiled_by(tmp_path).keys() == {"key0", "broken", "key1", "key2"}


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["at the end", "in between"])
def test_a_worker_that_dies_at_once_costs_time_only(kernel, tmp_path, monkeypatch, size):
    """Its keys may fit into a buffer or not: the write fails when that is emptied, or before."""

    def start(_command, **kwargs):
        worker = popen([sys.executable, "-c", ""], **kwargs)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return worker

    popen = jit_workers.subprocess.Popen
    monkeypatch.setattr(jit_workers.subprocess, "Popen", start)
    monkeypatch.setattr(jit_workers.pickle, "dumps", lambda _: bytes(size))
    jit_workers.compile_many(kernel, ["key0", "key1", "key2"], workers=2)
    assert compiled_by(tmp_path).keys() == {"key0", "key1", "key2"}


def test_what_is_registered_is_compiled_ahead_once(kernel, tmp_path, monkeypatch):
    type(kernel).get_warmup_keys = lambda self, _config, *, size: [f"key{i}" for i in range(size)]
    ahead = jit_workers.Ahead(workers=2)
    for size in (3, 3, 4):
        ahead.register(kernel, "config", size=size)
    assert len(ahead.running[kernel]) == 3  # two, none, one
    monkeypatch.setattr(jit_workers, "compile_many", lambda *args: None)
    ahead.compile_many(kernel, [])
    assert compiled_by(tmp_path).keys() == {f"key{i}" for i in range(4)}


def test_keys_that_only_the_registry_can_name_are_left_to_the_warm_up(monkeypatch):
    class Kernel:
        def get_warmup_keys(self, vllm_config):
            return [vllm_config]

    monkeypatch.setattr(jit_workers.subprocess, "Popen", None)
    ahead = jit_workers.Ahead(3)
    kernel = Kernel()
    ahead.register(kernel)
    assert not ahead.running.get(kernel)


def test_vllm_s_warm_up_takes_them(monkeypatch):
    helper = pytest.importorskip("vllm.model_executor.warmup.jit_warmup_tilelang_helper")
    warmup = pytest.importorskip("vllm.model_executor.warmup.jit_warmup")
    seen, started = [], []
    base = helper.VllmTileLangJitKernel
    monkeypatch.setattr(base, "compile_many", None, raising=False)
    monkeypatch.setattr(base, "register_warmup", base.register_warmup, raising=False)
    monkeypatch.setattr(jit_workers, "compile_many", lambda *args: seen.append(args))
    monkeypatch.setattr(jit_workers, "start", lambda *args: started.append(args) or [])
    jit_workers.install(5)

    class Kernel(base):
        def get_warmup_keys(self, *, size):
            return list(range(size))

        def warmup_inputs(self, compile_key):
            return {}

    kernel = Kernel()
    registry = warmup.JitWarmupRegistry(None)
    with registry.activate():
        kernel.register_warmup(size=2)
    assert len(registry) == 1
    assert started == [(kernel, [0, 1], 5)]
    kernel.compile_many([0, 1])
    assert seen == [(kernel, [0, 1], 5)]
