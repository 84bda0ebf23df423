"""What runs inside the sandbox: limits first, then the program, then its checks, then one line.

Read from its file and handed to Python as text: nothing of this repository is there inside.
"""

import json
import os
import resource
import sys

job = json.load(sys.stdin)
limits = job["limits"]
report = os.dup(1)
null = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
if job["user"] is not None:
    os.setgroups([])
    os.setresgid(job["user"], job["user"], job["user"])
    os.setresuid(job["user"], job["user"], job["user"])  # takes all capabilities


def tell(outcome, detail):
    """Write the verdict and leave at once: what the program registered for exit does not run."""
    line = json.dumps({"nonce": job["nonce"], "outcome": outcome, "detail": detail[:300]})
    os.write(report, line.encode() + b"\n")
    os._exit(0)


for name, value in (
    (resource.RLIMIT_AS, limits["memory_bytes"]),
    (resource.RLIMIT_CPU, limits["cpu_s"]),
    (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
    (resource.RLIMIT_NPROC, limits["processes"]),
    (resource.RLIMIT_NOFILE, limits["open_files"]),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(name, (value, value))

space = {"__name__": "candidate"}
try:
    exec(compile(job["source"], "answer.py", "exec"), space)
    if job["check"]:
        exec(compile(job["check"], "check.py", "exec"), space)
        space["check"](space[job["entry_point"]])
except MemoryError:
    tell("memory", "MemoryError")
except BaseException as error:  # noqa: BLE001 - SystemExit is no way to pass
    tell("failed", f"{type(error).__name__}: {error}".replace("\n", " "))
tell("passed", "")
