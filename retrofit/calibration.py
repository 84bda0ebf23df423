"""Calibration rows of the MTP head's experts: the folder that `capture` writes and `mtp` reads.

    meta.json               schema_version, model_sha256, layers, hidden_size, num_experts,
                            num_experts_per_tok, num_rows, num_files, prompts, ...
    rows-00000.safetensors  hidden        bf16  [rows, hidden]  input of the FFN, after ffn_norm
                            topk_ids      int32 [rows, topk]    experts of each row
                            topk_weights  f32   [rows, topk]    their route weights
    rows-00001.safetensors  ...

A file appears under its name only when it is whole, and meta.json is replaced after it: a writer
that was killed leaves a folder that can be read and continued.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrofit.errors import BadInput
from retrofit.reading import Entry, read_header, read_json, read_tensor
from retrofit.writing import write_json, write_tensors

SCHEMA_VERSION = 1
META = "meta.json"
ROWS_PER_FILE = 8192
DTYPES = {"hidden": "BF16", "topk_ids": "I32", "topk_weights": "F32"}


def rows_file(number: int) -> str:
    return f"rows-{number:05d}.safetensors"


class CalibrationWriter:
    """Appends dumps to a folder, continues one that exists, and stops at a budget.

    Args:
        folder: made if absent. Rows that are already in it count towards the budget.
        budget_bytes: of all rows files together; a file that would pass it is not written.
        rows_per_file: rows are buffered until so many are there.
        meta: written into meta.json; `update` changes it later.
    Raises:
        BadInput: the folder holds something else, or another model's rows (a value of `meta`
            differs for model_sha256 or layers).
    """

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        *,
        rows_per_file: int = ROWS_PER_FILE,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if budget_bytes < 1 or rows_per_file < 1:
            raise BadInput(
                f"calibration: budget_bytes = {budget_bytes}, rows_per_file = {rows_per_file}; "
                "both must be positive"
            )
        self.folder = Path(folder)
        self.budget_bytes = budget_bytes
        self.rows_per_file = rows_per_file
        self.meta: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **(meta or {})}
        self.num_rows = self.num_files = self.num_bytes = 0
        self.full = False
        self._pending: list[dict[str, torch.Tensor]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / META).exists():
            self._continue(meta or {})
        elif any(self.folder.glob("rows-*")):
            raise BadInput(f"{self.folder}: holds rows and no {META}")

    def _continue(self, meta: dict[str, Any]) -> None:
        old = read_meta(self.folder)
        for key in ("model_sha256", "layers", "hidden_size", "num_experts"):
            if key in meta and key in old and meta[key] != old[key]:
                raise BadInput(
                    f"{self.folder}: {key} = {old[key]!r}, not {meta[key]!r}; continue with the "
                    "same model or choose an empty folder"
                )
        self.meta = {**old, **meta}
        # A file that came after the last meta.json is written again: its prompts are not in it.
        for number in range(old["num_files"]):
            path = self.folder / rows_file(number)
            self.num_rows += row_entries(path)["hidden"].shape[0]
            self.num_bytes += path.stat().st_size
        self.num_files = old["num_files"]
        self.full = bool(old.get("full")) and self.budget_bytes <= old.get("budget_bytes", 0)

    def append(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> bool:
        """Add the rows of one forward pass.

        Args:
            hidden: floating (rows, hidden); kept as bfloat16.
            topk_ids: integer (rows, topk).
            topk_weights: floating (rows, topk); kept as float32.
        Returns:
            False when the budget is reached; these rows are then dropped.
        Raises:
            BadInput: shapes do not fit each other.
        """
        rows = hidden.shape[0]
        if hidden.dim() != 2 or topk_ids.shape != topk_weights.shape or len(topk_ids) != rows:
            raise BadInput(
                f"calibration: hidden {list(hidden.shape)}, topk_ids {list(topk_ids.shape)}, "
                f"topk_weights {list(topk_weights.shape)}; [rows, hidden] and [rows, topk] twice"
            )
        if self.full:
            return False
        self._pending.append(
            {
                "hidden": hidden.detach().to("cpu", torch.bfloat16, copy=True),
                "topk_ids": topk_ids.detach().to("cpu", torch.int32, copy=True),
                "topk_weights": topk_weights.detach().to("cpu", torch.float32, copy=True),
            }
        )
        while not self.full and self.pending_rows >= self.rows_per_file:
            self._write(self.rows_per_file)
        return not self.full

    @property
    def pending_rows(self) -> int:
        """Rows that are not on disk yet."""
        return sum(len(part["hidden"]) for part in self._pending)

    def flush(self, **meta: Any) -> None:
        """Write what is pending, then meta.json with these values: a point to resume from."""
        if self.pending_rows and not self.full:
            self._write(self.pending_rows)
        self.update(**meta)

    def update(self, **meta: Any) -> None:
        """Write meta.json: given values, and the counts of the files that are there."""
        self.meta |= meta
        self.meta |= {
            "num_rows": self.num_rows,
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "budget_bytes": self.budget_bytes,
            "full": self.full,
        }
        write_json(self.folder / META, self.meta)

    def _write(self, rows: int) -> None:
        joined = {key: torch.cat([part[key] for part in self._pending]) for key in DTYPES}
        head = {key: value[:rows] for key, value in joined.items()}
        self._pending = [{key: value[rows:] for key, value in joined.items()}]
        size = sum(value.numel() * value.element_size() for value in head.values())
        if self.num_bytes + size > self.budget_bytes:
            self.full = True
            self._pending = []
            return
        path = self.folder / rows_file(self.num_files)
        write_tensors(path, head)
        self.num_files += 1
        self.num_rows += rows
        self.num_bytes += path.stat().st_size


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json.

    Raises:
        BadInput: absent, another schema, or without counts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"calibration {folder}: no such folder")
    meta = read_json(folder / META)
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise BadInput(
            f"{folder / META}: schema_version = {meta.get('schema_version')!r}; "
            f"{SCHEMA_VERSION} is read here"
        )
    for key in ("num_rows", "num_files"):
        if not isinstance(meta.get(key), int) or meta[key] < 0:
            raise BadInput(f"{folder / META}: {key} = {meta.get(key)!r}; a count is needed")
    return meta


def row_entries(path: Path) -> dict[str, Entry]:
    """Headers of one rows file.

    Raises:
        BadInput: a tensor is absent, left over, of another dtype, or of another number of rows.
    """
    entries = read_header(path)
    if entries.keys() != DTYPES.keys():
        raise BadInput(f"{path}: holds {sorted(entries)}; {sorted(DTYPES)} are needed")
    for key, dtype in DTYPES.items():
        entry = entries[key]
        if entry.dtype != dtype or len(entry.shape) != 2:
            raise BadInput(
                f"{path}: {key} is {entry.dtype} {list(entry.shape)}; a {dtype} matrix is needed"
            )
    shapes = {key: entry.shape for key, entry in entries.items()}
    rows, topk = shapes["topk_ids"]
    if shapes["topk_weights"] != (rows, topk) or shapes["hidden"][0] != rows:
        raise BadInput(f"{path}: shapes {shapes} do not fit each other")
    return entries


class Calibration:
    """Rows of a folder, by expert. Only ids and weights are kept in memory.

    Args:
        folder: see the module.
        hidden_size, num_experts, topk: of the model; the rows must fit.
    Raises:
        BadInput: the folder or a file in it is not as the module says, an expert id is out of
            range or twice in a row, a route weight is negative or not finite.
    """

    def __init__(self, folder: Path, hidden_size: int, num_experts: int, topk: int) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.num_experts = num_experts
        self._hidden: list[np.ndarray] = []
        ids, weights = [], []
        for number in range(self.meta["num_files"]):
            path = self.folder / rows_file(number)
            entries = row_entries(path)
            if entries["hidden"].shape[1] != hidden_size or entries["topk_ids"].shape[1] != topk:
                raise BadInput(
                    f"{path}: hidden {list(entries['hidden'].shape)}, topk_ids "
                    f"{list(entries['topk_ids'].shape)}; the model has hidden_size = "
                    f"{hidden_size}, num_experts_per_tok = {topk}"
                )
            self._hidden.append(_row_bytes(entries["hidden"]))
            ids.append(read_tensor(entries["topk_ids"]))
            weights.append(read_tensor(entries["topk_weights"]))
            _check_routes(path, ids[-1], weights[-1], num_experts)
        self.num_rows = sum(len(part) for part in ids)
        if self.num_rows != self.meta["num_rows"] or not self.num_rows:
            raise BadInput(
                f"{self.folder}: {self.num_rows} rows in {len(ids)} files; {META} says "
                f"{self.meta['num_rows']}, and at least one is needed"
            )
        self._starts = np.cumsum([0] + [len(part) for part in ids])
        flat = torch.cat(ids).flatten()
        self._weights = torch.cat(weights).flatten()
        self._order = flat.argsort(stable=True)  # positions row * topk + slot, by expert
        self._topk = topk
        self.counts: list[int] = torch.bincount(flat, minlength=num_experts).tolist()
        self._bounds = np.cumsum([0, *self.counts])

    def files(self) -> list[Path]:
        """Those that hold the rows."""
        return [self.folder / rows_file(number) for number in range(self.meta["num_files"])]

    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs bf16 (n, hidden) and route weights f32 (n) of one expert, in order of capture."""
        positions = self._order[self._bounds[expert] : self._bounds[expert + 1]]
        return self._gather(positions // self._topk), self._weights[positions]

    def check_finite(self) -> None:
        """Read every row once.

        Raises:
            BadInput: a value is not finite.
        """
        for number, part in enumerate(self._hidden):
            for start in range(0, len(part), ROWS_PER_FILE):
                rows = torch.from_numpy(np.array(part[start : start + ROWS_PER_FILE]))
                if not rows.view(torch.bfloat16).isfinite().all():
                    raise BadInput(
                        f"{self.folder / rows_file(number)}: hidden holds NaN or infinity"
                    )

    def sample(self, most: int) -> torch.Tensor:
        """At most so many rows, evenly spaced over all: bf16 (n, hidden)."""
        count = min(most, self.num_rows)
        return self._gather(torch.arange(count) * self.num_rows // count)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        numbers = rows.numpy()
        width = self._hidden[0].shape[1]
        result = torch.empty(len(numbers), width // 2, dtype=torch.bfloat16)
        out = result.view(torch.uint8).numpy() if len(numbers) else np.empty((0, width), np.uint8)
        for part, start in zip(self._hidden, self._starts[:-1], strict=True):
            inside = (numbers >= start) & (numbers < start + len(part))
            out[inside] = part[numbers[inside] - start]
        return result


def _row_bytes(entry: Entry) -> np.ndarray:
    """A view of the file: uint8 (rows, bytes of a row)."""
    if not entry.num_bytes:
        return np.empty((0, entry.shape[1] * 2), np.uint8)
    shape = (entry.shape[0], entry.num_bytes // entry.shape[0])
    return np.memmap(entry.path, np.uint8, "r", entry.start, shape)


def _check_routes(path: Path, ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> None:
    if not len(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_experts:
        raise BadInput(f"{path}: topk_ids in [{low}, {high}]; the model has {num_experts} experts")
    if (ids.sort(dim=-1).values.diff(dim=-1) == 0).any():
        raise BadInput(f"{path}: topk_ids names an expert twice in a row")
    if not (weights.isfinite() & (weights >= 0)).all():
        raise BadInput(f"{path}: topk_weights are negative, NaN or infinite")
