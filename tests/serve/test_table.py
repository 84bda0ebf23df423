import json

import serve.__main__ as cli
from serve import table
from serve.plan import GIB, plan_profile
from serve.profiles import load_profile, profile_names

NONE = table.Machine((), 64 * GIB)


def two_cards(gib):
    return table.Machine((gib * GIB,) * 2, 64 * GIB)


def test_a_card_must_hold_what_the_plan_needs():
    profile = load_profile("524k")
    plan, _ = plan_profile(profile, None)
    row = table.profile_row(profile, two_cards(96))
    assert row.fits
    taken = plan.weights_sharded_bytes + plan.weights_replicated_bytes
    taken += sum(plan.buffers.values()) + sum(plan.predicted.values())
    needed = taken + plan.needed_blocks * plan.kv_block_bytes
    assert abs(row.need_bytes - needed) <= plan.kv_block_bytes  # whole blocks
    small = table.profile_row(profile, two_cards(80))
    assert (small.fits, small.reason) == (False, "has 80.0 GiB")


def test_cards_that_are_missing_are_counted():
    row = table.profile_row(load_profile("524k"), table.Machine((96 * GIB,), 64 * GIB))
    assert (row.fits, row.reason) == (False, "1 of 2 GPUs")


def test_a_cpu_profile_needs_main_memory():
    profile = load_profile("cpu-tiny")
    assert table.profile_row(profile, NONE).fits
    assert table.profile_row(profile, table.Machine((), GIB)).reason == "has 1.0 GiB"


def test_all_profiles_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(table, "this_machine", lambda: NONE)
    assert cli.main(["profiles"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(profile_names())
    assert header.split()[0] == "profile"
    assert [line for line in lines if line.startswith("524k")][0].endswith("no: 0 of 2 GPUs")
    assert cli.main(["profiles", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["524k"]["max_num_seqs"] == 2


def test_this_machine_has_memory():
    assert table.this_machine().available_bytes > 0


def test_what_nvidia_smi_says_is_read(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 97887\necho 97887\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert table.this_machine().card_bytes == (97887 * 2**20,) * 2
