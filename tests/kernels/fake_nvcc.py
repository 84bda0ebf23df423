"""A stand-in for nvcc, run by the build's tests: it notes its calls and writes small text files.

A source that says FAIL does not compile; one that says EDIT is changed while it compiles.
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSION = "13.0.88"


def main(argv: list[str]) -> int:
    """Do as nvcc would, as far as the build can tell."""
    if "--version" in argv:
        print(f"Cuda compilation tools, release 13.0, V{os.environ.get('FAKE_VERSION', VERSION)}")
        return 0
    if "--dryrun" in argv:
        print(f"#$ _HERE_={HERE / 'bin'}", file=sys.stderr)
        return 0
    with Path(os.environ["FAKE_CALLS"]).open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(argv) + "\n")
    out = Path(argv[argv.index("-o") + 1])
    if "-c" not in argv:
        if os.environ.get("FAKE_LINK_FAILS"):
            print("/usr/bin/ld: a.o: undefined reference to `f'", file=sys.stderr)
            return 1
        out.write_text("".join(Path(a).read_text() for a in argv if a.endswith(".o")))
        return 0
    source = Path(argv[argv.index("-c") + 1])
    text = source.read_text()
    if "FAIL" in text:
        print(f"{source.name}(1): warning #1: odd\n\n{source.name}(2): error: bad", file=sys.stderr)
        print("1 error detected", file=sys.stderr)
        return 2
    if "EDIT" in text:
        source.write_text("edited")
    print(f"ptxas info of {source.name}", file=sys.stderr)
    out.write_text(f"object of {source.name}: {text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
