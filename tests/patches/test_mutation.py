"""The mutation check on a tiny package: which guards it accepts, which it finds wanting."""

import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).resolve().parents[2] / "patches"
sys.path.insert(0, str(PATCHES))
import patchq  # noqa: E402

PACKAGE = {"vllm/__init__.py": "", "vllm/a.py": "".join(f"x{n} = {n}\n" for n in range(20))}
GUARDS = {
    "good": "from vllm import a\n\ndef test_one():\n    assert a.x3 == 33\n",
    "blind": "def test_nothing():\n    pass\n",
    "needed": "from vllm import a\n\ndef test_two():\n    assert a.x11 == 111\n",
    "broken": "def test_three():\n    raise RuntimeError('always')\n",
    "skipped": "import pytest\n\n@pytest.mark.skip\ndef test_four():\n    pass\n",
}
EDITS = {  # subject -> replacement, in order; `needed` builds on the text of `good`
    "good": ("x3 = 3\n", "x3 = 33\nx3b = x3\n"),
    "blind": ("x19 = 19\n", "x19 = 191\n"),
    "needed": ("x3b = x3\n", "x3b = x3 + 1\nx11 = 111\n"),
    "broken": ("x18 = 18\n", "x18 = 181\n"),
    "skipped": ("x17 = 17\n", "x17 = 171\n"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A repository with five patches and a root that has them all."""
    top = tmp_path_factory.mktemp("mutation")
    queue, tree, root = top / "repo/patches", top / "tree", top / "root"
    (top / "repo" / "tests").mkdir(parents=True)
    queue.mkdir()
    (queue / "series").write_text("")
    (queue / "vllm.lock").write_bytes(patchq.Lock("1", {}, (), {}).dump())
    for path, text in PACKAGE.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        text = text.replace("x11 = 11\n", "")
        (root / path).write_text(text)
    source = patchq.Source("1", "1", lambda p: patchq.read_below(root, p), tuple(PACKAGE))
    patchq.checkout(patchq.read_queue(queue), source, tree)
    for name, (old, new) in EDITS.items():
        file = tree / "vllm/a.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        patchq.git(tree, "commit", "-qam", f"{name}\n\nTest: tests/test_{name}.py")
        (top / f"repo/tests/test_{name}.py").write_text(GUARDS[name])
    patchq.export(queue, tree)
    patchq.apply_queue(patchq.read_queue(queue), root)
    return top


def mutate(place, *arguments):
    return subprocess.run(
        [sys.executable, PATCHES / "mutation.py", "--queue", place / "repo/patches",
         "--root", "root", *arguments],
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_guard_that_fails_without_its_patch_is_accepted(place):
    before = {p: p.read_bytes() for p in (place / "root").rglob("*.py")}
    done = mutate(place, "--only", "good.patch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("good.patch")
    assert "  killed  " in done.stdout
    assert "reverted together with needed.patch" in done.stdout
    assert "blind.patch" not in done.stdout
    assert {p: p.read_bytes() for p in (place / "root").rglob("*.py")} == before


def test_guards_that_survive_or_do_not_pass_with_all_patches_are_named(place):
    done = mutate(place)
    assert done.returncode == 1
    verdicts = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "  SURVIVED  " in verdicts["blind.patch"]
    assert "  killed  " in verdicts["needed.patch"]
    assert "reverted together" not in verdicts["needed.patch"]
    assert "  CONTROL FAILED  " in verdicts["broken.patch"]
    assert "RuntimeError: always" in verdicts["broken.patch"]
    assert "  CONTROL FAILED  " in verdicts["skipped.patch"]
    assert "all skipped" in verdicts["skipped.patch"]
    named = [line.split(": ")[1] for line in done.stderr.splitlines()]
    assert named == ["blind.patch", "broken.patch", "skipped.patch"]


def test_without_time_for_all_the_others_are_named_and_any_may_be_the_first(place):
    done = mutate(place, "--within", "0", "--begin", "7")
    assert done.returncode == 0, done.stderr
    verdict, left = done.stdout.splitlines()
    assert verdict.startswith("needed.patch")
    assert left.endswith(
        "0 s are over; left out: broken.patch, skipped.patch, good.patch, blind.patch"
    )


def test_a_root_without_the_patches_and_an_unknown_patch_are_refused(place, tmp_path):
    (tmp_path / "vllm").mkdir()
    done = mutate(place, "--root", tmp_path)
    assert done.returncode == 1
    assert "mutation: vllm/a.py: missing" in done.stderr
    assert mutate(place, "--only", "absent.patch").returncode == 2
