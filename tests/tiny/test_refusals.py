"""What `tiny` does not write it does not remove, and no option is silently without effect."""

import resource
import shutil

import pytest

from tiny import export, train
from tiny.__main__ import CHECKPOINT, main
from tiny.folder import CONFIG, replacing

SHUFFLE, REPEAT = ["--shuffle-mtp-experts"], ["--repeat-index-heads", "2"]


def tree(folder):
    """Every path under a folder, with the bytes of the files."""
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.fixture
def models(tmp_path):
    """A folder of a former export; a test adds what is not ours."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / CONFIG).write_text("old")
    (folder / "tokenizer.json").write_text("old")
    return folder


def write_new(folder):
    with replacing(folder) as new:
        (new / CONFIG).write_text("new")


def refused(arguments, capsys):
    """Exit status and the one line of an error."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as end:  # argparse: its usage stands before the line
        return end.code, capsys.readouterr().err.splitlines()[-1]
    (line,) = capsys.readouterr().err.splitlines()
    return status, line


@pytest.mark.parametrize("mode", [[], SHUFFLE, REPEAT])
def test_export_leaves_a_folder_with_something_else_in_it_alone(mode, models, tmp_path, capsys):
    (models / "other_model.safetensors").write_text("mine")
    before = tree(tmp_path)
    status, line = refused(["export", "--out", models, *mode], capsys)
    assert status == 1
    assert f"{models} holds other_model.safetensors, which export does not write" in line
    assert "name another folder, or move that away" in line
    assert tree(tmp_path) == before


def make_sub_folder(models):
    (models / "sub").mkdir()


def make_folder_named_like_a_file(models):
    (models / "generation_config.json").mkdir()


def make_link(models):
    (models / export.INDEX).symlink_to(models / CONFIG)


def make_shard_of_another_split(models):
    (models / "model-00001-of-00003.safetensors").write_text("mine")


@pytest.mark.parametrize(
    "make",
    [make_sub_folder, make_folder_named_like_a_file, make_link, make_shard_of_another_split],
)
def test_only_files_of_the_names_that_export_writes_are_replaced(make, models, tmp_path):
    make(models)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="which export does not write"):
        write_new(models)
    assert tree(tmp_path) == before


def test_a_former_export_is_replaced_and_neighbours_stay(models, tmp_path):
    for name in ("models.tmp", "models.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    write_new(models)
    assert tree(tmp_path) == {
        "models": False,
        "models/config.json": b"new",
        "models.tmp": False,
        "models.tmp/mine": b"mine",
        "models.old": False,
        "models.old/mine": b"mine",
    }


def test_an_empty_or_a_missing_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "no" / "such"):
        write_new(folder)
        assert tree(folder) == {"config.json": b"new"}


def test_other_users_can_read_an_export_as_any_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    export.shuffle_mtp_experts(CHECKPOINT, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    modes = {p.stat().st_mode for p in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode}


def test_of_a_link_what_it_leads_to_is_replaced(models, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(models)
    write_new(link)
    assert link.readlink() == models
    assert tree(models) == {"config.json": b"new"}


def test_after_an_error_everything_is_as_it_was(models, tmp_path):
    before = tree(tmp_path)

    def interrupted():
        with replacing(models) as new:
            (new / CONFIG).write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tree(tmp_path) == before


def test_an_interrupt_between_the_two_renames_loses_nothing(models, tmp_path, monkeypatch):
    before, rename = tree(tmp_path), type(models).rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(models), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_new(models)
    assert tree(tmp_path) == before


def test_what_another_run_has_not_finished_is_not_in_the_way(models, tmp_path):
    with replacing(models) as unfinished:  # as a killed run leaves it
        (unfinished / CONFIG).write_text("unfinished")
        write_new(models)
        assert tree(models) == {"config.json": b"new"}
        assert tree(unfinished) == {"config.json": b"unfinished"}
    assert tree(tmp_path) == {"models": False, "models/config.json": b"unfinished"}


def test_a_file_that_comes_while_export_writes_is_kept(models, tmp_path):
    with pytest.raises(ValueError, match="holds notes"), replacing(models):
        (models / "notes").write_text("mine")
    assert [p.name for p in tmp_path.iterdir()] == ["models"]
    assert tree(models) == {"config.json": b"old", "tokenizer.json": b"old", "notes": b"mine"}


def test_the_working_directory_and_a_file_are_no_place(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    status, line = refused(["export", "--out", "file", *SHUFFLE], capsys)
    assert (status, line) == (1, f"error: export: {tmp_path}/file is a file; name another folder")
    (tmp_path / "file").unlink()
    status, line = refused(["export", "--out", ".", *SHUFFLE], capsys)
    assert status == 1
    assert f"{tmp_path} is the working directory" in line
    assert tree(tmp_path) == {}


def test_training_looks_at_its_folder_first(models, tmp_path):
    (models / "mine").touch()
    config = train.TrainConfig(out=models, results=tmp_path / "r.json", cache=tmp_path / "none")
    with pytest.raises(ValueError, match="holds mine, which export does not write"):
        train.run(config)


def test_the_control_of_an_evaluation_is_written_where_nothing_is(tmp_path, monkeypatch):
    # Another text does as well, and is there at once.
    monkeypatch.setattr(train, "greedy", lambda _, ids, count, dtype: [[5] * count for _ in ids])
    folder, mine = tmp_path / "model", tmp_path / "model.shuffled"
    folder.symlink_to(CHECKPOINT)
    mine.mkdir()
    (mine / "mine").touch()
    (tmp_path / "prompts").write_text('{"text": "She"}\n')
    figures = train.evaluate(folder, tmp_path / "prompts", "cpu", 2)
    assert figures["acceptance_shuffled_experts"]["num_drafts"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {"model", "model.shuffled", "prompts"}
    assert list(mine.iterdir()) == [mine / "mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*SHUFFLE, "--experts", "w4a16"], "not allowed with"),
        ([*SHUFFLE, "--experts", "fp4"], "not allowed with"),
        ([*REPEAT, "--experts", "w4a16"], "not allowed with"),
        ([*REPEAT, *SHUFFLE], "not allowed with"),
        (["--seed", "0"], "--seed is for --shuffle-mtp-experts only"),
        ([*REPEAT, "--seed", "1"], "--seed is for --shuffle-mtp-experts only"),
        (["--repeat-index-heads", "0"], "'0'; must be a whole number of at least 1"),
    ],
)
def test_export_refuses_options_that_would_have_no_effect(options, message, tmp_path, capsys):
    status, line = refused(["export", "--out", tmp_path / "out", *options], capsys)
    assert status == 2
    assert message in line
    assert tree(tmp_path) == {}


def test_each_option_of_export_changes_the_output(tmp_path):
    written = []
    for options in ([], ["--experts", "w4a16"], SHUFFLE, [*SHUFFLE, "--seed", "1"], REPEAT):
        out = tmp_path / str(len(written))
        assert main(["export", "--out", str(out), *options]) == 0
        written.append(export.checkpoint_sha256(out))
        shutil.rmtree(out)
    assert len(set(written)) == 5


def test_index_heads_are_there_at_least_once(tmp_path):
    with pytest.raises(ValueError, match="times = 0; it must be at least 1"):
        export.repeat_index_heads(CHECKPOINT, tmp_path / "out", 0)


@pytest.mark.parametrize("name", ["num-prompts", "num-speculative-tokens", "max-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_eval_refuses_counts_below_one(name, value, tmp_path, capsys):
    status, line = refused(["eval", "--prompts", tmp_path / "none", f"--{name}={value}"], capsys)
    assert status == 2
    assert f"--{name}: '{value}'; must be a whole number of at least 1" in line


@pytest.mark.parametrize(("text", "max_tokens"), [("", 2), ('{"text": "She"}\n', 1)])
def test_eval_reports_no_figures_of_nothing(text, max_tokens, tmp_path, capsys):
    path = tmp_path / "prompts"
    path.write_text(text)
    status, line = refused(["eval", "--prompts", path, "--max-tokens", max_tokens], capsys)
    assert status == 1
    assert f"nothing was drafted for {len(text.splitlines())} prompts of {path}" in line


def test_what_the_system_refuses_is_one_line_with_the_path(tmp_path, capsys):
    (tmp_path / "file").touch()
    status, line = refused(["export", "--out", tmp_path / "file" / "out", *SHUFFLE], capsys)
    assert (status, line) == (2, f"error: {tmp_path}/file: File exists")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        status, line = refused(["export", "--out", tmp_path / "out", *SHUFFLE], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (status, line) == (2, f"error: {tmp_path}/out: File too large")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("mode", [SHUFFLE, REPEAT])
def test_a_damaged_shard_is_one_line(mode, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(CHECKPOINT, broken)
    shard = broken / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    arguments = ["export", "--checkpoint", broken, "--out", tmp_path / "out", *mode]
    status, line = refused(arguments, capsys)
    assert status == 1
    assert f"{shard} is damaged" in line
