"""What runs inside the sandbox: limits first, then the program, then its checks, then one line.

Read from its file and handed to Python as text: nothing of this repository is there inside. Job
and verdict are local to a function, so that no import of `__main__` gives them away; the program
shares this process, and one that looks for them in frames or memory finds them.
"""

import json
import os
import resource
import sys
import types

NAME = "candidate"


def main():
    """Read the job, run it, tell the verdict."""
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
    # The program may put others in their place.
    dumps, write, leave = json.dumps, os.write, os._exit

    def tell(outcome, detail):
        """Write the verdict and leave at once: what is registered for the exit does not run."""
        line = dumps({"nonce": job["nonce"], "outcome": outcome, "detail": detail[:300]})
        write(report, line.encode() + b"\n")
        leave(0)

    for name, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))

    module = types.ModuleType(NAME)
    sys.modules[NAME] = module  # dataclasses look their module up
    space = vars(module)
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


main()
