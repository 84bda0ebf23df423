"""The doctor on recordings of healthy and broken machines, and on this one.

The recordings are made by hand after the output of the tools; they hold no figure of speed.
"""

import functools
import json
import re
import shlex
import time
from pathlib import Path

import pytest

import serve.__main__ as cli
from bench.server import free_port
from kernels.probe import Verdict
from serve import environment
from serve.allreduce_tier import FILE_NAME, Key, Known, Tier, demote, load, save
from serve.doctor import checks, facts, machine, report
from serve.doctor.checks import Area, Level
from serve.doctor.machine import Machine, RecordedMachine

FOLDER = Path(__file__).parent / "machines"
FLASH, TINY = "/models/dsv4-flash", "/models/dsv4-tiny"
PROBE = "python -m kernels.probe --out '{out}'"
QUERY = shlex.join(facts.QUERY)


planned = functools.cache(checks.profile_row)  # 0.3 s each


@pytest.fixture(autouse=True)
def _plans(monkeypatch):
    monkeypatch.setattr(checks, "profile_row", planned)


def diagnose(capsys, path, *flags, model=FLASH):
    """Exit status, and findings by check."""
    status = cli.main(["doctor", "--machine", str(path), "--model", model, "--json", *flags])
    said = json.loads(capsys.readouterr().out)
    assert said["exit_status"] == status
    return status, {f["check"]: f for f in said["findings"]}


def table(capsys, path, model=FLASH):
    """What is printed for people."""
    cli.main(["doctor", "--machine", str(path), "--model", model])
    return capsys.readouterr().out


def bad(findings):
    return {f["check"]: f["level"] for f in findings.values() if f["level"] != "ok"}


@pytest.fixture
def changed(tmp_path):
    """changed(name, change): a recording after `change` of its JSON."""

    def write(name, change):
        data = json.loads((FOLDER / f"{name}.json").read_text())
        change(data)
        path = tmp_path / "machine.json"
        path.write_text(json.dumps(data))
        return path

    return write


# name of the recording: exit status, findings that are not ok, the all-reduce, words of the advice
MACHINES = {
    "two-max-q": (0, {}, Tier.PEER_PUSH, ""),
    "iommu-translates": (
        13, {"IOMMU": "warning", "probe": "warning"}, Tier.HOST_PINNED,
        "add iommu=pt to the kernel's command line",
    ),
    "acs-redirects": (
        13, {"ACS": "warning", "probe": "warning"}, Tier.HOST_PINNED,
        "sudo setpci -s 0000:00:01.1 ECAP_ACS+6.w=0000; sudo setpci -s 0000:40:01.1",
    ),
    "one-card-x4-gen3": (
        12, {"link of GPU 1": "warning"}, Tier.PEER_PUSH, "Move the card to a slot",
    ),
    "container-shm-64-mb": (
        14, {"/dev/shm": "fault", "memlock": "warning", "ACS": "unknown"}, Tier.PEER_PUSH,
        "Start the container with --shm-size 16g",
    ),
    "old-driver": (
        11,
        {"driver": "fault", "persistence": "warning", "NCCL": "warning", "probe": "warning"},
        Tier.NCCL_SHM, "Install driver 580.65.06 or newer",
    ),
    "driver-does-not-answer": (11, {"gpu": "fault"}, None, "see `dmesg | grep -i nvrm`"),
    "one-gpu": (10, {"gpu": "fault"}, None, "serve the profile cpu-tiny"),
    "probe-wrong-data": (
        13, {"probe": "warning"}, Tier.HOST_PINNED, "Peer access alters data and stays unused",
    ),
    "probe-hangs": (13, {"probe": "fault"}, Tier.NCCL_SHM, "a card may be stuck in a kernel"),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_a_recorded_machine_has_these_faults_and_no_others(capsys, name):
    expected, findings_expected, tier, advice = MACHINES[name]
    status, findings = diagnose(capsys, FOLDER / f"{name}.json")
    assert (status, bad(findings)) == (expected, findings_expected)
    said = table(capsys, FOLDER / f"{name}.json")
    assert f"exit status {expected}" in said
    assert max(map(len, said.splitlines())) <= report.WIDTH
    if tier:
        assert findings["all-reduce"]["value"].startswith(f"{tier.value}: ")
    else:
        assert "all-reduce" not in findings
    for finding in findings.values():
        has = bool(finding["advice"])
        assert has == (finding["level"] != "ok"), finding
        assert re.fullmatch(r"([A-Z][^\n]*[.])?", finding["advice"])
    assert advice in " ".join(" ".join(f["advice"] for f in findings.values()).split())


def test_every_recording_is_tested():
    assert {path.stem for path in FOLDER.glob("*.json")} == {*MACHINES, "no-gpu"}


def test_without_a_gpu_the_cpu_profile_fits(capsys):
    status, findings = diagnose(capsys, FOLDER / "no-gpu.json", model=TINY)
    assert (status, bad(findings)) == (0, {})
    said = table(capsys, FOLDER / "no-gpu.json", TINY)
    assert "not needed: the profile cpu-tiny runs on the CPU" in said
    assert said.rstrip().endswith("the profile cpu-tiny fits this machine; exit status 0")
    assert set(findings) == {
        "gpu", "memory", "disk", "open files", "port", "engine", "checkpoint"
    }  # fmt: skip


def test_a_gpu_profile_that_is_asked_for_without_a_gpu_is_a_fault(capsys):
    status, findings = diagnose(capsys, FOLDER / "no-gpu.json", "--profile", "524k")
    assert status == report.EXIT[Area.GPU]
    assert findings["gpu"]["value"] == "none; the profile needs 2"


# ------------------------------------------------------------------------- single readings


def cards(data, *changes):
    """Change the comma-separated lines of nvidia-smi."""
    answer = data["commands"][QUERY]
    for old, new in changes:
        assert old in answer["out"]
        once = ", 5, 5, 16" in old  # of one card
        answer["out"] = answer["out"].replace(old, new, 1 if once else -1)


SINGLE = {
    "bar1": (
        lambda d: d["text"].update(
            {
                f"{facts.DEVICES}/0000:41:00.0/resource": "0x0 0x0 0x0\n0x00000000d0000000 "
                "0x00000000dfffffff 0x000000000014220c"
            }
        ),
        12, "BAR1 of GPU 1", "warning", "0.25 GiB, less than the card's 95.6",
    ),
    "generation": (
        lambda d: cards(d, ("580.126.09, 5, 5, 16", "580.126.09, 4, 5, 16")),
        12, "link of GPU 0", "warning", "x16 of x16, PCIe 4.0 of 5.0",
    ),
    "no link": (
        lambda d: cards(d, ("580.126.09, 5, 5, 16", "580.126.09, [N/A], 5, 16")),
        0, "link of GPU 0", "unknown", "nvidia-smi does not tell",
    ),
    "sockets": (
        lambda d: d["commands"]["nvidia-smi topo -m"].update(
            out=d["commands"]["nvidia-smi topo -m"]["out"].replace("NODE\t", "SYS\t")
        ),
        12, "topology", "warning", "SYS: two sockets",
    ),
    "hopper": (
        lambda d: cards(d, (", 12.0,", ", 9.0,")),
        10, "architecture", "warning", "sm_90, not sm_120",
    ),
    "turing": (lambda d: cards(d, (", 12.0,", ", 7.5,")), 10, "architecture", "fault", "sm_75"),
    "small": (
        lambda d: cards(d, ("97887, 97248", "49140, 48000")),
        10, "card memory", "fault", "of 48.0 GiB free, needs",
    ),
    "taken": (
        lambda d: cards(d, ("97887, 97248", "97887, 60000")),
        10, "card memory", "fault", "vLLM takes 93% of the card, GPU 0 has less free",
    ),
    "smi hangs": (
        lambda d: d["commands"][QUERY].update(status=None, out=""),
        11, "gpu", "fault", "nvidia-smi does not answer in 30 s",
    ),
    "protocol": (
        lambda d: d["facts"].update(environment={"NCCL_PROTO": "LL"}),
        15, "variables", "warning", "NCCL_PROTO=LL",
    ),
    "no nccl": (
        lambda d: d["facts"].update(nccl=None), 0, "NCCL", "unknown", "is not installed here",
    ),
    "iommu in a container": (
        lambda d: [d["text"].pop(k) for k in list(d["text"]) if k.endswith("iommu_group/type")],
        0, "IOMMU", "unknown", "the cards' groups cannot be read",
    ),
    "port": (
        lambda d: d["ports"].update({"127.0.0.1:8000": "Address already in use"}),
        14, "port", "fault", "127.0.0.1:8000: Address already in use",
    ),
    "disk": (
        lambda d: d["space"].update({"/caches/dsv4-maxq": [10**12, 2**30]}),
        14, "disk", "warning", "1.0 GiB free for /caches/dsv4-maxq; 8 are wanted",
    ),
    "open files": (
        lambda d: d["facts"].update(open_files=256), 14, "open files", "warning", "256",
    ),
    "patches": (
        lambda d: d["commands"].update(
            {
                k: {"status": 1, "out": "", "err": "patchq: vllm/config/kernel.py: modified\n"}
                for k in d["commands"] if "patchq" in k
            }
        ),
        15, "engine", "fault", "patchq: vllm/config/kernel.py: modified",
    ),
    "no engine": (
        lambda d: d["facts"].update(site_packages=None),
        15, "engine", "fault", "vLLM is not installed",
    ),
    "no checkpoint": (
        lambda d: d["text"].pop(f"{FLASH}/config.json"),
        16, "checkpoint", "fault", f"{FLASH}: no config.json",
    ),
    "shard": (
        lambda d: d["checkpoints"].update({FLASH: "checkpoint shard x: truncated"}),
        16, "checkpoint", "fault", "checkpoint shard x: truncated",
    ),
    "head": (
        lambda d: d["commands"][f"python -m retrofit verify {FLASH}"].update(
            status=1, out="fault: mtp.0.norm.weight: is missing\nfault: b\nfault: c\nx: 3 faults\n"
        ),
        16, "checkpoint", "fault", "mtp.0.norm.weight: is missing, and 2 more",
    ),
    "slow disk": (
        lambda d: d["commands"][f"python -m retrofit verify {FLASH}"].update(status=None),
        0, "checkpoint", "unknown", "no answer in 900 s",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SINGLE)
def test_one_reading_that_is_off_is_one_finding(capsys, changed, case):
    change, expected, check, level, value = SINGLE[case]
    status, findings = diagnose(capsys, changed("two-max-q", change))
    assert bad(findings) == {check: level}
    assert value in findings[check]["value"]
    assert status == expected


def test_a_fault_decides_the_status_before_a_warning_of_an_earlier_class(capsys, changed):
    def change(data):
        cards(data, ("580.126.09, 5, 5, 16", "580.126.09, 4, 5, 16"))
        data["ports"]["127.0.0.1:8000"] = "Address already in use"

    path = changed("two-max-q", change)
    status, findings = diagnose(capsys, path)
    assert bad(findings) == {"link of GPU 0": "warning", "port": "fault"}
    assert status == report.EXIT[Area.HOST]
    assert "1 fault and 1 warning" in table(capsys, path)


def test_what_may_break_peer_access_is_no_fault_where_the_probe_finds_it_healthy(capsys, changed):
    good = json.loads((FOLDER / "two-max-q.json").read_text())["commands"][PROBE]
    for name in ("iommu-translates", "acs-redirects"):
        path = changed(name, lambda data: data["commands"].update({PROBE: good}))
        status, findings = diagnose(capsys, path)
        assert (status, bad(findings)) == (0, {})
        check = "ACS" if name.startswith("acs") else "IOMMU"
        assert findings[check]["value"].endswith("; the probe finds no harm in it")


def test_host_memory_that_fails_the_probe_leaves_no_all_reduce(capsys, changed):
    def change(data):
        result = json.loads(data["commands"][PROBE]["file"])
        for arm in result["arms"]:
            arm.update(verdict="wrong data", reason="why")
        data["commands"][PROBE].update(status=2, file=json.dumps(result))

    status, findings = diagnose(capsys, changed("two-max-q", change))
    assert bad(findings) == {"probe": "fault", "all-reduce": "fault"}
    assert status == report.EXIT[Area.PEER]
    assert "host-pinned wrong data (why)" in findings["all-reduce"]["value"]


def test_an_all_reduce_that_is_asked_for_must_be_proven(capsys):
    path = FOLDER / "probe-wrong-data.json"
    status, findings = diagnose(capsys, path, "--allreduce", "peer-push")
    assert findings["all-reduce"]["level"] == "fault"
    assert (
        "peer-push is asked for and not proven: peer-push wrong data"
        in (findings["all-reduce"]["value"])
    )
    _, findings = diagnose(capsys, path, "--allreduce", "nccl-shm")
    assert findings["all-reduce"]["value"] == "nccl-shm: asked for"


def test_demotions_are_shown_with_the_file_to_delete(capsys, changed, tmp_path):
    def change(data):
        result = json.loads(data["commands"][PROBE]["file"])
        key = Key(result["key"]["boot_id"], result["key"]["driver"], (*result["key"]["bus_ids"],))
        known = Known(key, result)
        demote(known, Tier.PEER_PUSH, "a fault")
        save(tmp_path / "kept", known)
        data["text"][f"/caches/dsv4-maxq/{FILE_NAME}"] = (tmp_path / "kept").read_text()

    status, findings = diagnose(capsys, changed("two-max-q", change))
    assert status == report.EXIT[Area.PEER]
    assert findings["all-reduce"]["value"] == (
        "vllm-custom: not peer-push: had a fault since this boot"
    )
    assert f"/caches/dsv4-maxq/{FILE_NAME}" in findings["all-reduce"]["advice"]


def test_probe_and_verification_can_be_left_out(capsys):
    flags = ("--no-probe", "--no-verify")
    _, findings = diagnose(capsys, FOLDER / "probe-hangs.json", *flags)
    assert findings["probe"]["value"] == "left out, as asked for"
    assert findings["all-reduce"]["value"].startswith("nccl-shm: ")
    assert findings["checkpoint"]["value"] == f"{FLASH}: complete; values not looked at"


# ------------------------------------------------------------------------------ the bridges


def card(address):
    return facts.Card(0, "", address, "12.0", 1, 1, "1", 5, 5, 16, 16, "", None)


def test_bridges_between_cards_of_one_switch_are_its_own_ports_only():
    class Tree(Machine):
        def real(self, path):
            root = "/sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0"
            below = {"0000:03:00.0": "0000:02:00.0", "0000:04:00.0": "0000:02:01.0"}
            address = path.rpartition("/")[2]
            return f"{root}/{below[address]}/{address}"

    pair = (card("0000:03:00.0"), card("0000:04:00.0"))
    assert facts.bridges_between(Tree(), pair) == ["0000:02:00.0", "0000:02:01.0"]


def test_acs_is_found_in_the_list_of_capabilities():
    def space(*capabilities, control=0x1D):
        data = bytearray(0x400)
        for at, identity, following in capabilities:
            data[at : at + 4] = (identity | 1 << 16 | following << 20).to_bytes(4, "little")
            if identity == facts.ACS:
                data[at + 6 : at + 8] = control.to_bytes(2, "little")
        return bytes(data)

    assert facts.acs_control(space((0x100, 1, 0x150), (0x150, 0x0D, 0))) == 0x1D
    assert facts.acs_control(space((0x100, 0x0D, 0), control=0)) == 0
    assert facts.acs_control(space((0x100, 1, 0))) is None
    assert facts.acs_control(space((0x100, 1, 0x100))) is None  # in circles
    assert facts.acs_control(b"\xff" * 0x400) is None  # the device is gone
    assert facts.acs_control(b"") is None


# ----------------------------------------------------------------------------- this machine


def test_a_recording_of_this_machine_is_judged_as_the_machine_was(capsys, tmp_path):
    path = tmp_path / "here.json"
    flags = ["doctor", "--profile", "cpu-tiny", "--port", str(free_port()), "--json"]
    status = cli.main([*flags, "--record", str(path)])
    here = capsys.readouterr().out
    assert cli.main([*flags, "--machine", str(path)]) == status
    assert status in (0, report.EXIT[Area.HOST])  # memory and disk are shared with others
    assert capsys.readouterr().out == here
    data = json.loads(path.read_text())
    assert data["facts"]["site_packages"]
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_no_recording_is_refused(capsys, tmp_path):
    path = tmp_path / "x.json"
    for text in ("", "[]", '{"schema_version": 9}'):
        path.write_text(text)
        assert cli.main(["doctor", "--machine", str(path)]) == 2
        assert f"--machine {path}: " in capsys.readouterr().err
    assert cli.main(["doctor", "--machine", "a", "--record", "b"]) == 2
    assert cli.main(["doctor", "--record", str(tmp_path / "no" / "x"), "--no-verify"]) == 2


@pytest.mark.parametrize("last", ["wait", "exit"])
def test_a_command_that_does_not_end_is_killed_with_what_it_started(tmp_path, last):
    """Nor is one at its end while what it started holds its output."""
    script, pid_file = tmp_path / "tool", tmp_path / "child"
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {pid_file}; {last}\n")
    script.chmod(0o755)
    for timeout_s in (1.0, 30.0):  # the first is enough, but on a machine that is very slow
        start = time.monotonic()
        done = Machine().run([str(script)], timeout_s)
        assert done.status is None
        assert time.monotonic() - start < 300  # what holds its output would take 600
        if pid_file.exists() and pid_file.read_text():
            break
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_gives_its_output_its_status_and_the_file_it_wrote():
    code = "import sys; print('a'); open(sys.argv[1], 'w').write('b'); sys.exit('c')"
    done = Machine().run(["python", "-c", code, "{out}"], 120.0)
    assert (done.status, done.out, done.err, done.file) == (1, "a\n", "c\n", "b")
    assert done.last_line == "c"
    absent = Machine().run(["/no/such/tool"], 1.0)
    assert (absent.status, absent.last_line) == (127, "/no/such/tool: No such file or directory")


def test_reads_of_what_is_not_there_are_empty(tmp_path):
    here = Machine()
    assert here.text(str(tmp_path / "x")) is None
    assert here.data(str(tmp_path / "x")) is None
    assert here.real(str(tmp_path / "x")) is None
    assert here.names(str(tmp_path / "x")) == []
    assert here.space(str(tmp_path / "x" / "y")) == here.space(str(tmp_path))
    (tmp_path / "config").write_bytes(b"a" * 3 + bytes(200) + b"b" + bytes(300))
    assert here.data(str(tmp_path / "config")) == b"a" * 3 + bytes(200) + b"b"
    assert RecordedMachine(FOLDER / "no-gpu.json").run(["x"], 1.0).status == machine.NOT_FOUND


def test_the_probe_is_run_as_it_is_written_and_its_verdict_is_kept_for_the_server(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = environment.cache_path(FILE_NAME)
    result = json.loads(
        json.loads((FOLDER / "two-max-q.json").read_text())["commands"][PROBE]["file"]
    )
    key = Key(result["key"]["boot_id"], result["key"]["driver"], (*result["key"]["bus_ids"],))
    before = Known(key, None)
    demote(before, Tier.PEER_PUSH, "a fault")
    save(path, before)
    report.keep_verdict(Known(key, result))
    after = load(path, key, print)
    assert after.verdict is not None
    assert after.demoted == [Tier.PEER_PUSH]
    # Without the kernels' library, or a GPU, the command itself runs and says why it cannot.
    monkeypatch.setenv("DSV4_KERNELS_DIR", str(tmp_path))
    done = Machine().run(("python", "-m", "kernels.probe", "--out", "{out}"), 300.0)
    assert (done.status, done.file) == (3, None)
    assert "make kernels" in done.last_line


def test_the_page_for_owners_names_each_exit_status_verdict_and_tier():
    text = (machine.REPOSITORY / "docs" / "hardware.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    for name in [*map(str, report.EXIT.values()), *(verdict.value for verdict in Verdict)]:
        assert rows.count(name) == 1, name
    tiers = [row.strip("`") for row in rows if row.startswith("`")]
    assert tiers == [tier.value for tier in Tier]


def test_levels_and_areas_have_their_place():
    assert set(report.EXIT) == set(Area)
    assert sorted(report.EXIT.values()) == list(range(10, 17))
    assert [level.value for level in Level] == ["ok", "unknown", "warning", "fault"]
