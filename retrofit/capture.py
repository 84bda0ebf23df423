"""`capture`: calibration rows of the MTP head from a running server, over HTTP.

read prompts -> begin -> for each group: ask, commit rows and prompts together -> stop -> counts.

The server records (`serve run --capture DIR`, see `kernels/capture.py`); this command sends prompts
and says when. A group of prompts and its rows are committed in one file replacement: an interrupted
capture that is started again asks only what is not in meta.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.folder_lock import CLIENT, FolderHeld, FolderLock
from retrofit.calibration import META, read_meta, row_entries, rows_file
from retrofit.control import CONTROL, STATUS, Action, Answer, Order, read_answer, write
from retrofit.errors import BadInput
from retrofit.progress import Progress
from retrofit.reading import read_tensor

# Jane Austen and the King James Bible, in the public domain; no prompt of tiny/heldout.jsonl.
BUNDLED = Path(__file__).parent / "prompts.jsonl"
GROUP_PROMPTS = 16  # asked between two commits: what an interruption costs at most
ANSWER_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 3600.0
POLL_S = 0.05
GIB = 1 << 30


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


@dataclass(frozen=True)
class CaptureConfig:
    """Options of `capture`. concurrency: requests at once."""

    url: str
    out: Path
    prompts: Path = BUNDLED
    num_prompts: int = 256
    max_tokens: int = 256
    budget_gib: float = 8.0
    concurrency: int = 4

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_tokens", "budget_gib", "concurrency"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} = {getattr(self, name)}; must be positive and finite")
        if not _is_url(self.url):
            raise BadInput(f"url = {self.url!r}; must be http://HOST:PORT or https://HOST:PORT")
        object.__setattr__(self, "url", self.url.rstrip("/").removesuffix("/v1"))

    @property
    def budget_bytes(self) -> int:
        return int(self.budget_gib * GIB)


@dataclass(frozen=True)
class Prompt:
    """What is sent, in the form of OpenAI's messages."""

    id: str
    messages: tuple[dict[str, Any], ...]


def run(config: CaptureConfig) -> int:
    """See the module."""
    prompts = read_prompts(config.prompts, config.num_prompts)
    if not config.out.is_dir():
        raise BadInput(f"{config.out}: no such folder; `serve run --capture` makes it")
    source = {"prompts_sha256": prompts_sha256(prompts), "max_tokens": config.max_tokens}
    with only_client(config.out):
        done = read_done(config.out, source)
        left = [prompt for prompt in prompts if prompt.id not in done]
        if left:
            ask_all(config, source, done, left, len(prompts))
    print(summary(config.out, len(prompts)))
    return 0


@contextlib.contextmanager
def only_client(folder: Path) -> Iterator[None]:
    """Another `capture` would give its own orders, and name our rows' prompts wrongly.

    Raises:
        BadInput: there is another one.
    """
    try:
        lock = FolderLock(folder, "captures", CLIENT)
    except FolderHeld as error:
        raise BadInput(
            f"{folder}: is held by {error}; one `capture` fills a folder at a time"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_prompts(path: Path, count: int) -> list[Prompt]:
    """The first `count` prompts of a JSONL file of {"text"} or {"messages"}, and maybe "id".

    Raises:
        BadInput: no such file, fewer prompts, a line that is not as above, or an id twice.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise BadInput(f"{path}: does not exist") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8: {error}") from error
    if len(lines) < count:
        raise BadInput(f"{path}: {len(lines)} prompts; --num-prompts {count} asks for more")
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines[:count], 1)]
    ids = set()
    for prompt in prompts:
        if prompt.id in ids:
            raise BadInput(f"{path}: id {prompt.id!r} occurs twice")
        ids.add(prompt.id)
    return prompts


def _prompt(path: Path, number: int, line: str) -> Prompt:
    try:
        row = json.loads(line)
        messages = row.get("messages") or [{"role": "user", "content": row["text"]}]
        return Prompt(str(row.get("id", number)), tuple(dict(message) for message in messages))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path}: line {number}: an object with text or messages is needed"
        ) from error


def prompts_sha256(prompts: list[Prompt]) -> str:
    """Digest of ids and messages."""
    text = json.dumps([[prompt.id, prompt.messages] for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_done(folder: Path, source: dict[str, Any]) -> list[str]:
    """Ids of the prompts whose rows are in the folder.

    Raises:
        BadInput: the rows there came from other prompts, or from other lengths, or meta.json is
            none of `capture`.
    """
    if not (folder / META).exists():
        return []
    meta = read_meta(folder)
    for key, value in source.items():
        if key in meta and meta[key] != value:
            raise BadInput(
                f"{folder}: {key} = {meta[key]!r}, not {value!r}; continue with the same options "
                "or choose an empty folder"
            )
    done = meta.get("prompts_done", [])
    if not isinstance(done, list) or not all(isinstance(name, str) for name in done):
        raise BadInput(f"{folder / META}: prompts_done is no list of ids")
    return done


def ask_all(
    config: CaptureConfig, source: dict[str, Any], done: list[str], left: list[Prompt], total: int
) -> None:
    """Send the prompts in groups; commit after each.

    Raises:
        BadInput: a request failed, or the server does not record into the folder.
    """
    server = Server(config)
    progress = Progress("capture", total, len(done))
    with recording(server, {**source, "prompts_done": done}) as answer:
        for start in range(0, len(left), GROUP_PROMPTS):
            if answer.full:
                break
            group = left[start : start + GROUP_PROMPTS]
            with ThreadPoolExecutor(config.concurrency) as pool:
                for _ in pool.map(server.ask, group):
                    progress.step()
            done = done + [prompt.id for prompt in group]
            answer = server.order(Action.COMMIT, {**source, "prompts_done": done})
    if answer.full:
        print(
            f"capture: the budget of {config.budget_gib:g} GiB is reached after {len(done)} of "
            f"{total} prompts",
            file=sys.stderr,
        )


@contextlib.contextmanager
def recording(server: Server, meta: dict[str, Any]) -> Iterator[Answer]:
    """The server records inside the block; whatever is not committed there is dropped."""
    try:
        yield server.order(Action.BEGIN, meta)
    except BaseException:
        server.tell(Action.STOP)
        raise
    server.order(Action.STOP)


class Server:
    """The server's API, and the plugin behind the files of `retrofit.control`."""

    def __init__(self, config: CaptureConfig) -> None:
        self.config = config
        models = self._json("/v1/models")
        try:
            self.model = str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise BadInput(
                f"{config.url}/v1/models: lists no model; is it a server of ours?"
            ) from (error)

    def ask(self, prompt: Prompt) -> None:
        """One greedy answer; ends where the model ends it."""
        body = {
            "model": self.model,
            "messages": list(prompt.messages),
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
        }
        self._json("/v1/chat/completions", body)

    def tell(self, action: Action, meta: dict[str, Any] | None = None) -> str:
        """Give an order; returns its id."""
        request = uuid.uuid4().hex
        write(
            self.config.out / CONTROL,
            Order(request, action, self.config.budget_bytes, meta or {}),
        )
        return request

    def order(self, action: Action, meta: dict[str, Any] | None = None) -> Answer:
        """Give an order and wait for the answer.

        Raises:
            BadInput: there is none, or it is an error.
        """
        request = self.tell(action, meta)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            try:
                answer = read_answer(self.config.out)
            except (ValueError, TypeError) as error:
                raise BadInput(f"{self.config.out / STATUS}: no answer of ours: {error}") from error
            if answer is not None and answer.request == request:
                break
            if time.monotonic() > deadline:
                raise BadInput(
                    f"{self.config.url}: nothing records into {self.config.out}; start the server "
                    "with `serve run --capture` and this folder"
                )
            time.sleep(POLL_S)
        if answer.error:
            raise BadInput(answer.error)
        return answer

    def _json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        url = self.config.url + path
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace").strip()
            raise BadInput(f"{url}: HTTP {error.code}: {text[:300]}") from error
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
            ValueError,
        ) as error:
            raise BadInput(f"{url}: {getattr(error, 'reason', error)}") from error


def rows_per_expert(folder: Path) -> list[int]:
    """How many rows each expert has."""
    meta = read_meta(folder)
    counts = torch.zeros(meta["num_experts"], dtype=torch.int64)
    for number in range(meta["num_files"]):
        ids = read_tensor(row_entries(folder / rows_file(number))["topk_ids"])
        counts += torch.bincount(ids.flatten(), minlength=len(counts))
    return counts.tolist()


def summary(folder: Path, total: int) -> str:
    """Rows, and rows per expert."""
    meta, counts = read_meta(folder), rows_per_expert(folder)
    return (
        f"{folder}: {meta['num_rows']:,} rows of {len(meta.get('prompts_done', []))} of {total} "
        f"prompts in {meta['num_files']} files, {meta['num_bytes'] / GIB:.2f} GiB; rows per "
        f"expert: min {min(counts):,}, mean {sum(counts) / len(counts):,.0f}, max {max(counts):,}"
    )
