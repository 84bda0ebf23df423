"""docker/entrypoint.sh without an engine: its folders lie where a test may write."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASK = """
import json, os
from serve.environment import cache_path, our_variables
print(json.dumps([str(cache_path("allreduce.json")), our_variables(), os.environ["HOME"]]))
"""


@pytest.fixture
def caches(tmp_path):
    return tmp_path / "caches"


@pytest.fixture
def execute(tmp_path, caches):
    """execute(keys) -> what the script did with ASK as its command and that file of keys."""

    def run(keys):
        text = (ROOT / "docker" / "entrypoint.sh").read_text(encoding="utf-8")
        moved = {"/caches": caches, "/opt/dsv4-maxq": ROOT, "/run/secrets/api_keys": keys}
        for inside, here in moved.items():
            assert inside in text
            text = re.sub(rf"(?<!\w){inside}\b", str(here), text)
        script = tmp_path / "entrypoint.sh"
        script.write_text(text, encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        command = [script, sys.executable, "-c", ASK]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip

    return run


def test_a_command_gets_the_folders_of_the_pin_and_the_file_of_keys(execute, caches, tmp_path):
    keys = tmp_path / "api_keys"
    keys.write_text("alice 0123456789abcdef\n")
    cache, variables, home = json.loads(execute(keys).stdout)
    [folder] = set(caches.iterdir()) - {caches / "reports"}
    assert re.fullmatch("[0-9a-f]{12}", folder.name)
    assert cache == f"{folder}/dsv4-maxq/allreduce.json"
    assert home == f"{folder}/home"
    assert variables == {"SERVE_API_KEY_FILE": str(keys)}


def test_no_file_of_keys_and_an_empty_one_are_no_keys(execute, tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    for keys in (empty, tmp_path / "absent"):
        assert json.loads(execute(keys).stdout)[1] == {}


# A folder's size depends on the file system; those of /proc have none.
@pytest.mark.parametrize("folder", ["/proc/sys", "/usr"])
def test_a_folder_in_the_place_of_the_keys_is_refused(execute, folder):
    """docker-compose 1.29 makes one where SERVE_API_KEY_FILE names nothing."""
    done = execute(folder)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"entrypoint: {folder} is no file; SERVE_API_KEY_FILE must name a file")


def test_each_command_for_a_running_container_goes_through_the_entrypoint():
    """`exec` runs no entrypoint by itself: caches and keys would be looked for elsewhere."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    commands = re.findall(r"compose exec (?:-\S+ )*(\S+ .*?)[`\n]", text)
    assert any("serve report" in command for command in commands)
    for command in commands:
        assert re.match(r"(gpu|cpu) docker/entrypoint\.sh ", command), command
