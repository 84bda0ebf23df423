"""Only what the probe has proven is used, and nothing that failed is used again."""

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernels.allreduce import Expired, Mismatch
from kernels.allreduce import Tier as KernelTier
from kernels.bounded_worker import chosen_tier
from serve import allreduce_tier
from serve.allreduce_tier import (
    FUSION_OFF,
    AllReduce,
    Key,
    Known,
    ProbeVerdict,
    Tier,
    TierError,
    choose,
    demote,
    fault_of,
    load,
    run_probe,
    save,
    this_key,
)

KEY = Key("boot", "580.126.09", ("0000:01:00.0", "0000:21:00.0"))
EXPIRED = str(Expired(0, 1, 1, 4, 4, (2, 2), 0, 0, 8192, 2.0))
INTERPRETER = sys.executable
WRONG = str(Mismatch(1024, (0, 1), (1, 2)))


def result(push="healthy", pull="healthy", pinned="healthy", key=KEY):
    """What the probe writes, but for its figures."""
    verdicts = {"host-pinned": pinned, "peer-push": push, "peer-pull": pull}
    return {
        "schema_version": 1,
        "key": {"boot_id": key.boot_id, "driver": key.driver, "bus_ids": list(key.bus_ids)},
        "arms": [
            {"arm": arm, "verdict": verdict, "reason": "" if verdict == "healthy" else f"{arm} why"}
            for arm, verdict in verdicts.items()
        ],
    }


def verdict(**arms):
    return ProbeVerdict.from_result(result(**arms))


@pytest.mark.parametrize(
    ("arms", "demoted", "tier"),
    [
        ({}, [], Tier.PEER_PUSH),
        ({"pull": "slow"}, [], Tier.PEER_PUSH),
        ({"push": "slow"}, [], Tier.HOST_PINNED),  # what both other peer tiers need is not there
        ({"push": "wrong data", "pull": "wrong data"}, [], Tier.HOST_PINNED),
        ({"push": "hang", "pull": "hang", "pinned": "slow"}, [], Tier.HOST_PINNED),
        ({"push": "hang", "pull": "hang", "pinned": "impossible"}, [], Tier.NCCL_SHM),
        ({}, [Tier.PEER_PUSH], Tier.VLLM_CUSTOM),
        ({}, [Tier.PEER_PUSH, Tier.VLLM_CUSTOM], Tier.NCCL_P2P),
        ({}, [Tier.PEER_PUSH, Tier.VLLM_CUSTOM, Tier.NCCL_P2P], Tier.HOST_PINNED),
        ({"pull": "hang"}, [Tier.PEER_PUSH], Tier.HOST_PINNED),
    ],
)
def test_the_first_tier_that_is_proven_and_not_demoted_is_chosen(arms, demoted, tier):
    assert choose(verdict(**arms), "auto", demoted).tier is tier


def test_without_a_verdict_nothing_but_shared_memory_is_chosen():
    chosen = choose(None)
    assert chosen.tier is Tier.NCCL_SHM
    assert chosen.reason == "not peer-push, vllm-custom, nccl-p2p, host-pinned: not probed"


@pytest.mark.parametrize("bad", ["wrong data", "hang"])
def test_where_host_memory_fails_too_there_is_no_tier(bad):
    with pytest.raises(TierError, match=f"no tier is proven.* host-pinned {bad} .host-pinned why"):
        choose(verdict(push="hang", pull="hang", pinned=bad))


def test_the_reason_names_what_was_passed_over_and_why():
    reason = choose(verdict(push="wrong data", pull="hang")).reason
    assert reason == "not peer-push, vllm-custom, nccl-p2p: peer-push wrong data"
    reason = choose(verdict(pull="slow"), "auto", [Tier.PEER_PUSH]).reason
    why = "not peer-push: had a fault since this boot; not vllm-custom, nccl-p2p: peer-pull slow"
    assert reason == why
    assert choose(verdict()).reason == "proven by the probe"


@pytest.mark.parametrize("tier", list(Tier))
def test_a_proven_tier_that_is_asked_for_is_used(tier):
    assert choose(verdict(), tier.value).tier is tier
    assert choose(verdict(), tier.value).reason == "asked for"


@pytest.mark.parametrize("tier", ["peer-push", "vllm-custom", "nccl-p2p"])
def test_an_unproven_tier_is_refused_whoever_asks(tier):
    with pytest.raises(TierError, match=f"{tier} is asked for and not proven: peer-push hang"):
        choose(verdict(push="hang"), tier)
    with pytest.raises(TierError, match="the link was not probed"):
        choose(None, tier)
    with pytest.raises(ValueError, match="nvlink"):
        choose(verdict(), "nvlink")


def test_a_demoted_tier_is_refused_if_asked_for_and_none_takes_its_place():
    with pytest.raises(TierError, match="vllm-custom is asked for and demoted: it had a fault"):
        choose(verdict(), "vllm-custom", [Tier.VLLM_CUSTOM])
    assert choose(verdict(), "host-pinned", [Tier.VLLM_CUSTOM]).tier is Tier.HOST_PINNED


def test_nccl_goes_over_peer_access_only_where_that_is_proven():
    on = {"NCCL_P2P_DISABLE": "0", "NCCL_P2P_LEVEL": "SYS"}
    off = {"NCCL_P2P_DISABLE": "1"}

    def nccl(chosen):
        return {k: v for k, v in chosen.environment.items() if k.startswith("NCCL_")}

    assert nccl(choose(verdict())) == on
    assert nccl(choose(verdict(), "host-pinned")) == on
    assert nccl(choose(verdict(), "nccl-shm")) == off
    assert nccl(choose(verdict(pull="hang"))) == off  # peer-push is proven, NCCL's pull is not
    assert nccl(choose(verdict(), "auto", [Tier.PEER_PUSH])) == off
    assert nccl(choose(None)) == off


def test_nccl_over_peers_goes_over_peers_where_those_before_it_failed():
    chosen = choose(verdict(), "auto", [Tier.PEER_PUSH, Tier.VLLM_CUSTOM])
    assert chosen.tier is Tier.NCCL_P2P
    assert chosen.environment["NCCL_P2P_DISABLE"] == "0"


@pytest.mark.engine
@pytest.mark.parametrize("tier", Tier)
def test_no_all_reduce_of_vllm_comes_before_the_tier(tier):
    """Its communicator asks FlashInfer and symmetric memory first, which nothing has proven."""
    from vllm import envs

    switches = [n for n in envs.environment_variables if n.startswith("VLLM_ALLREDUCE_USE_")]
    chosen = choose(verdict(), tier.value).environment
    assert len(switches) == 3
    assert [chosen.get(name) for name in switches] == ["0"] * 3


@pytest.mark.engine
def test_nothing_but_the_pass_that_is_off_fuses_an_all_reduce():
    """As the pinned vLLM is written: on the CPU it does not even import the pass."""
    [folder] = find_spec("vllm").submodule_search_locations
    source = Path(folder, "compilation", "passes", "pass_manager.py").read_text()
    [configure] = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "configure"
    ]
    [(name, off)] = FUSION_OFF["pass_config"].items()
    assert off is False
    switched = [
        node
        for node in ast.walk(configure)
        if isinstance(node, ast.If) and ast.unparse(node.test) == f"self.pass_config.{name}"
    ]
    everywhere, inside = names_of([configure]), names_of(switched[0].body)
    assert len(switched) == 1
    assert inside.count("AllReduceFusionPass") == 1
    assert [n for n in inside if "AllReduce" in n] == [n for n in everywhere if "AllReduce" in n]


def names_of(nodes):
    """Names that code uses."""
    found = [name for node in nodes for name in ast.walk(node)]
    return [name.id for name in found if isinstance(name, ast.Name)]


def test_the_engine_is_told_its_tier_under_the_name_that_it_reads(monkeypatch):
    ours = {tier.value for tier in KernelTier}
    for tier in Tier:
        name = choose(verdict(), tier.value).environment["DSV4_ALLREDUCE_TIER"]
        monkeypatch.setenv("DSV4_ALLREDUCE_TIER", name)
        assert chosen_tier() == (KernelTier(name) if tier.value in ours else None)
    assert ours < {tier.value for tier in Tier}


# ---------------------------------------------------------------------------------- the file


def test_what_is_known_comes_back_for_the_same_key_only(tmp_path):
    path, said = tmp_path / "cache" / "link.json", []
    assert load(path, KEY, said.append) == Known(KEY)
    known = Known(KEY, result())
    demote(known, Tier.PEER_PUSH, EXPIRED)
    demote(known, Tier.PEER_PUSH, "again")
    save(path, known)
    assert load(path, KEY, said.append) == known
    assert known.demoted == [Tier.PEER_PUSH]
    assert said == []
    assert [entry.name for entry in path.parent.iterdir()] == ["link.json"]
    for other in (
        Key("another boot", KEY.driver, KEY.bus_ids),
        Key(KEY.boot_id, "581.1", KEY.bus_ids),
        Key(KEY.boot_id, KEY.driver, KEY.bus_ids[::-1]),
    ):
        assert load(path, other, said.append) == Known(other)
        assert "of another boot, driver or pair of cards" in said.pop()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-40],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"schema_version": 1, "key"', '"schema_version": 9, "key"', 1),
        lambda text: text.replace('"healthy"', '"splendid"', 1),
        lambda text: text.replace('"arm": "peer-pull"', '"arm": "peer-push"', 1),
        lambda text: text.replace('"demotions": []', '"demotions": [{"tier": "x"}]'),
        lambda text: text.replace('"boot_id": "boot"', '"boot_id": "else"', 1),
    ],
    ids=["cut", "empty", "list", "schema", "verdict", "arms", "demotion", "two keys"],
)
def test_a_file_that_is_corrupted_is_discarded_with_a_line(tmp_path, change):
    path, said = tmp_path / "link.json", []
    save(path, Known(KEY, result()))
    text = json.dumps(json.loads(path.read_text()))
    assert change(text) != text
    path.write_text(change(text))
    assert load(path, KEY, said.append) == Known(KEY)
    assert len(said) == 1
    assert f"all-reduce: {path} is discarded: " in said[0]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "link.json"
    save(path, Known(KEY, result()))
    before = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(allreduce_tier.os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        save(path, Known(KEY, result(push="hang")))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["link.json"]


# ----------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "said",
    [EXPIRED, WRONG, "all_reduce_oneshot: setup, open: rank 1: dsv4_ipc_open: CUDA error 205: x"],
)
def test_what_the_workers_say_of_a_failed_all_reduce_is_recognized(said):
    line = f"(Worker_TP0 pid=7) ERROR 11-24 10:00:00 [executor.py:1] RuntimeError: {said}"
    assert fault_of(line) == said
    assert fault_of("INFO all_reduce_oneshot: 2 ranks, host-pinned") is None
    assert fault_of("RuntimeError: CUDA out of memory") is None


def test_after_a_fault_the_next_life_is_one_tier_down_and_a_new_process_remembers(tmp_path):
    path, said = tmp_path / "link.json", []
    link = AllReduce(path, Known(KEY, result(pull="hang")), "auto", said.append)
    assert link.choice.tier is Tier.PEER_PUSH
    assert link.after_end(["Killed"]) is None
    failure = link.after_end(["a line", f"RuntimeError: {EXPIRED}"])
    assert failure.choice.tier is Tier.HOST_PINNED
    assert failure.said == f"peer-push is demoted to host-pinned: {EXPIRED}"
    assert link.counts == {(Tier.PEER_PUSH, Tier.HOST_PINNED): 1}
    assert [(d.tier, d.reason) for d in link.demotions] == [(Tier.PEER_PUSH, EXPIRED)]
    assert f"peer-push is demoted to host-pinned until the next boot; delete {path}" in said[-1]
    again = AllReduce(path, load(path, KEY, said.append), "auto", said.append)
    assert again.choice == link.choice
    assert link.after_end([WRONG]).choice.tier is Tier.NCCL_SHM


def test_the_last_tier_and_one_that_was_asked_for_are_not_demoted(tmp_path):
    path = tmp_path / "link.json"
    known = Known(KEY, result())
    asked = AllReduce(path, known, "peer-push", print)
    failure = asked.after_end([EXPIRED])
    assert failure.choice is None
    assert failure.said == f"peer-push was asked for and is not demoted: {EXPIRED}"
    last = AllReduce(path, Known(KEY), "auto", print)
    failure = last.after_end([EXPIRED])
    assert failure.choice is None
    assert failure.said == f"nccl-shm is the last tier and is not demoted: {EXPIRED}"
    for link in (asked, last):
        assert not link.counts
        assert link.demotions == ()
    assert not path.exists()  # the next start takes the same tier again


@pytest.mark.parametrize("starting", [False, True])
@pytest.mark.parametrize("tier", Tier)
def test_a_stall_counts_against_the_tiers_that_wait_for_ever(tmp_path, tier, starting):
    """Against our kernels only in a start, where their own deadline is longer."""
    stall, tiers = "the engine made no progress for 120 s", list(Tier)
    known = Known(KEY, result(pull="slow" if tier is Tier.PEER_PUSH else "healthy"))
    for other in tiers[: tiers.index(tier)]:
        demote(known, other, EXPIRED)
    link = AllReduce(tmp_path / "link.json", known, "auto", print)
    assert link.choice.tier is tier
    failure = link.after_end([], stall, starting)
    ours = tier in (Tier.PEER_PUSH, Tier.HOST_PINNED)
    if tier is Tier.NCCL_SHM or (ours and not starting):
        assert failure is None
    else:
        below = tiers[tiers.index(tier) + 1 :]
        taken = below[0] if tier is not Tier.PEER_PUSH else Tier.HOST_PINNED
        assert failure.choice.tier is taken
        assert failure.said == f"{tier.value} is demoted to {taken.value}: {stall}"


@pytest.mark.parametrize("starting", [False, True])
def test_a_stall_beside_our_kernel_is_that_of_nccl_s_large_messages_over_peers(tmp_path, starting):
    """First NCCL leaves peer access, and our kernel stays; what stalls then is not NCCL there."""
    path, stall = tmp_path / "link.json", "the engine made no progress for 120 s"
    link = AllReduce(path, Known(KEY, result()), "auto", print)
    assert link.choice.environment["NCCL_P2P_DISABLE"] == "0"
    failure = link.after_end([], stall, starting)
    assert failure.said == f"nccl-p2p is demoted to nccl-shm: {stall}"
    assert failure.choice.tier is Tier.PEER_PUSH
    assert failure.choice.environment["NCCL_P2P_DISABLE"] == "1"
    assert link.counts == {(Tier.NCCL_P2P, Tier.NCCL_SHM): 1}
    assert AllReduce(path, load(path, KEY, print), "auto", print).choice == link.choice
    failure = link.after_end([], stall, starting)
    if starting:
        assert failure.said == f"peer-push is demoted to vllm-custom: {stall}"
    else:
        assert failure is None
    asked = AllReduce(tmp_path / "other", Known(KEY, result()), "peer-push", print)
    failure = asked.after_end([], stall, starting)
    assert failure.said == f"peer-push was asked for and is not demoted: {stall}"


def test_a_link_that_gave_wrong_data_carries_no_tier_without_a_check(tmp_path):
    link = AllReduce(tmp_path / "link.json", Known(KEY, result()), "auto", print)
    failure = link.after_end([WRONG])
    assert failure.choice.tier is Tier.HOST_PINNED
    assert failure.choice.environment["NCCL_P2P_DISABLE"] == "1"
    assert failure.said == f"peer-push is demoted to host-pinned: {WRONG}"
    assert [d.tier for d in link.demotions] == list(allreduce_tier.PEER_TIERS)
    assert link.demotions[1].reason == f"over the same link as peer-push: {WRONG}"


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "link.json"
    link = AllReduce(path, Known(KEY, result()), "auto", said.append)
    assert link.after_end([EXPIRED]).choice.tier is Tier.VLLM_CUSTOM
    assert "cannot be written" in said[0]


# ------------------------------------------------------------------------------ this machine


@pytest.fixture
def python(monkeypatch, tmp_path):
    """python(code): what runs in place of this interpreter."""

    def write(code: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!{INTERPRETER}\nimport sys\n{code}\n")
        path.chmod(0o755)
        monkeypatch.setattr(allreduce_tier.sys, "executable", str(path))

    return write


def test_the_probe_runs_once_and_its_verdict_is_kept(python, tmp_path, monkeypatch):
    monkeypatch.setattr(allreduce_tier, "this_key", lambda: KEY)
    text = json.dumps(result(push="hang", pull="hang"))
    python(f"open(sys.argv[sys.argv.index('--out') + 1], 'w').write({text!r}); sys.exit(1)")
    path, said = tmp_path / "link.json", []
    assert AllReduce.of_this_machine(path, "auto", said.append).choice.tier is Tier.HOST_PINNED
    assert said == ["all-reduce: the link between 0000:01:00.0 and 0000:21:00.0 is probed"]
    python("sys.exit('not again')")
    assert AllReduce.of_this_machine(path, "auto", said.append).choice.tier is Tier.HOST_PINNED


def test_a_probe_that_cannot_run_or_does_not_end_proves_nothing(python, tmp_path, monkeypatch):
    monkeypatch.setattr(allreduce_tier, "this_key", lambda: KEY)
    said = []
    python("sys.exit('probe: no library; run `make kernels`')")
    link = AllReduce.of_this_machine(tmp_path / "a", "auto", said.append)
    assert link.choice.tier is Tier.NCCL_SHM
    assert "run `make kernels`; without a proof only nccl-shm is used" in said[-1]
    with pytest.raises(TierError, match="the link was not probed"):
        AllReduce.of_this_machine(tmp_path / "a", "peer-push", said.append)
    python("import time; time.sleep(60)")
    with pytest.raises(TierError, match="the probe did not end in 0.5 s"):
        run_probe(KEY, timeout_s=0.5)


@pytest.mark.parametrize("found", [result(key=Key("boot", None, KEY.bus_ids)), {"key": 1}])
def test_a_probe_of_other_cards_or_without_sense_proves_nothing(
    python, tmp_path, monkeypatch, found
):
    monkeypatch.setattr(allreduce_tier, "this_key", lambda: KEY)
    python(f"open(sys.argv[sys.argv.index('--out') + 1], 'w').write({json.dumps(found)!r})")
    said = []
    link = AllReduce.of_this_machine(tmp_path / "a", "auto", said.append)
    assert link.choice.tier is Tier.NCCL_SHM
    assert "only nccl-shm is used" in said[-1]
    assert not (tmp_path / "a").exists()


def test_a_process_that_does_not_die_in_the_driver_holds_up_nothing(python, monkeypatch):
    monkeypatch.setattr(allreduce_tier, "END_S", 0.1)
    processes = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: processes.append(process))
    python("import time; time.sleep(20)")
    with pytest.raises(TierError, match="the probe did not end in 0.2 s"):
        run_probe(KEY, timeout_s=0.2)
    monkeypatch.undo()
    [process] = processes
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_the_key_is_that_of_the_first_two_devices_of_this_process(python):
    python('print(\'["0000:01:00.0", "0000:21:00.0", "0000:41:00.0"]\')')
    assert this_key().bus_ids == ("0000:01:00.0", "0000:21:00.0")
    assert len(this_key().boot_id) == 36
    python("print('[]')")
    with pytest.raises(TierError, match="sees 0 CUDA devices; 2 are needed"):
        this_key()
    python("sys.exit('RuntimeError: kernels: run `make kernels`')")
    with pytest.raises(TierError, match="run `make kernels`"):
        this_key()


def test_the_devices_are_asked_for_with_what_the_kernels_offer(tmp_path):
    from kernels import allreduce_abi as abi

    code = allreduce_tier.ASK_DEVICES
    for name in ("load", "device_count", "bus_id"):
        assert f"{name}(" in code
        assert callable(getattr(abi, name, None) or getattr(abi.Library, name))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={"DSV4_KERNELS_DIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "make kernels" in done.stderr.splitlines()[-1]
