"""Record what the MTP head's experts see in a running server: calibration rows for `retrofit mtp`.

On when DSV4_CAPTURE_DIR names a folder (`serve run --capture DIR` sets it). A hook before the FFN
of the MTP layer takes its input, which came through the real attention and the target's real
residual streams, and routes it once more as the layer does. `python -m retrofit capture` says when
to record, so warm-up and other traffic are not in the rows; passes without attention metadata
(profile and warm-up runs) never are.

With one speculative token the input does not depend on the head's own experts, so any whole head
will do, such as one rounded to nearest. The draft must get no rejected tokens
(`disable_padded_drafter_batch`), and hooks do not run inside CUDA graphs or compiled code: the same
hook serves the NVIDIA class when it runs with `--enforce-eager`. With tensor parallelism the FFN's
input is whole on every rank; the first rank writes, and holds the folder while it lives: a second
server, or the first rank of another data-parallel engine, does not start.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.cpu.routing import biased_topk_cpu
from kernels.folder_lock import FolderHeld, FolderLock
from retrofit.calibration import CalibrationWriter
from retrofit.control import CAPTURE_DIR, STATUS, Action, Answer, Order, read_order, write
from retrofit.errors import BadInput
from retrofit.reading import headers_sha256, scan

POLL_S = 0.05


def capture_folder() -> Path | None:
    """The folder to write to; None when nothing is captured.

    Raises:
        ValueError: the variable is set and names no folder.
    """
    value = os.environ.get(CAPTURE_DIR)
    if not value:
        return None
    folder = Path(value)
    if not folder.is_dir():
        raise ValueError(f"{CAPTURE_DIR} = {value!r}; must be a folder that exists")
    return folder


class Recorder:
    """Obeys the orders in a folder; `append` drops rows unless it records.

    Args:
        folder: of control.json, status.json and the calibration.
        meta: of the model; a folder with another model's rows is refused in the answer.
        hold: of the folder, kept for as long as the recorder.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], hold: FolderLock | None = None) -> None:
        self.folder = folder
        self.meta = meta
        self.hold = hold
        self.recording = False
        self._writer: CalibrationWriter | None = None
        self._failure: str | None = None
        self._lock = threading.Lock()
        # An order from before this server is not for it.
        old = read_order(folder)
        self._last_request = old.request if old else None

    def start(self) -> None:
        """Watch for orders until the process ends."""
        threading.Thread(target=self._watch, name="capture", daemon=True).start()

    def append(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep the rows of one pass; stops recording at the budget.

        A disk that fails ends the recording, not the server: the next order is answered with it.
        """
        with self._lock:
            if not self.recording or self._writer is None:
                return
            try:
                self.recording = self._writer.append(hidden, ids, weights)
            except OSError as error:
                self.recording, self._failure = False, f"capture: {self.folder}: {error.strerror}"

    def obey(self) -> None:
        """Look for a new order, do it, answer it."""
        order = read_order(self.folder)
        if order is None or order.request == self._last_request:
            return
        self._last_request = order.request
        error = None
        with self._lock:
            try:
                self._do(order)
            except (BadInput, OSError) as problem:
                self.recording, self._writer, error = False, None, str(problem)
            writer = self._writer
            rows, full = (writer.num_rows, writer.full) if writer else (0, False)
            if order.action is Action.STOP:
                self.recording, self._writer = False, None
        write(self.folder / STATUS, Answer(order.request, error, rows, full))

    def _do(self, order: Order) -> None:
        if order.action is Action.BEGIN:
            self._failure = None
            # What is pending from a client that went away is dropped with the old writer.
            self._writer = CalibrationWriter(self.folder, order.budget_bytes, meta=self.meta)
            self._writer.update(**order.meta)
            self.recording = not self._writer.full
        elif order.action is Action.COMMIT:
            if self._failure is not None:
                raise BadInput(self._failure)
            if self._writer is None:
                raise BadInput("capture: commit without begin; did the server restart?")
            self._writer.flush(**order.meta)

    def _watch(self) -> None:
        pause, said = threading.Event(), ""
        while not pause.wait(POLL_S):
            try:
                self.obey()
            except (ValueError, KeyError, TypeError, OSError) as error:
                message = f"capture: {self.folder}: {type(error).__name__}: {error}"
                if message != said:  # once, not at every look
                    print(message, flush=True)
                said = message


def hold(folder: Path, model: str) -> FolderLock:
    """Keep other servers out of the folder while this process lives.

    Raises:
        ValueError: another one records into it, or the folder cannot be locked.
    """
    try:
        return FolderLock(folder, f"serves {model}")
    except FolderHeld as error:
        raise ValueError(
            f"capture: {folder}: is held by {error}; one server records into a folder at a time"
        ) from None
    except OSError as error:
        raise ValueError(f"capture: {folder}: cannot be locked: {error.strerror}") from error


def check_config(vllm_config: Any) -> None:
    """Refuse settings under which the rows would be wrong or missing.

    Raises:
        ValueError: names the setting and the value that is needed.
    """
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    needed = (
        ("num_speculative_tokens", speculative.num_speculative_tokens, 1),
        ("disable_padded_drafter_batch", speculative.disable_padded_drafter_batch, True),
        ("enforce_eager", model.enforce_eager, True),
    )
    for name, value, wanted in needed:
        if value != wanted:
            raise ValueError(
                f"capture: {name} = {value}; must be {wanted}; `serve run --capture DIR` sets it"
            )


def model_meta(vllm_config: Any, layer_number: int) -> dict[str, Any]:
    """What meta.json says of the model."""
    config = vllm_config.model_config.hf_config
    return {
        "model_sha256": headers_sha256(scan(Path(vllm_config.model_config.model))),
        "layers": [layer_number],
        "hidden_size": config.hidden_size,
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
    }


def routes(gate: nn.Module, hidden: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Route rows as the layer does: ids int32 and weights float32, both (rows, topk).

    What config.json may leave out is what vLLM's class takes for it.
    """
    logits = gate(hidden)
    logits = logits[0] if isinstance(logits, tuple) else logits
    weights, ids = biased_topk_cpu(
        hidden,
        logits,
        gate.e_score_correction_bias,
        topk=config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
        scoring_func=getattr(config, "scoring_func", "sqrtsoftplus"),
        num_fused_shared_experts=0,
        routed_scaling_factor=getattr(config, "routed_scaling_factor", 1.0),
        apply_routed_scaling_factor_on_output=True,
    )
    return ids, weights


class Capturing:
    """Goes before a DeepSeekV4MTP class: the draft with the hook; same weights, same results."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        recorder = attach(self, vllm_config, capture_folder())
        if recorder is not None:
            recorder.start()


def attach(draft: nn.Module, vllm_config: Any, folder: Path) -> Recorder | None:
    """Hook the FFN of a draft model with one MTP layer.

    Args:
        draft: vLLM's DeepSeekV4MTP, on the CPU or NVIDIA: `model.layers` holds the layer.
        folder: see `capture_folder`.
    Returns:
        the recorder, not yet started; None on ranks that do not write.
    Raises:
        ValueError: see `check_config` and `hold`; more than one MTP layer, or one routed by a
            table.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    check_config(vllm_config)
    layers = dict(draft.model.layers.items())
    if len(layers) != 1:
        raise ValueError(f"capture: {len(layers)} MTP layers; one is supported")
    ((number, layer),) = layers.items()
    ffn = layer.mtp_block.ffn
    if ffn.gate.e_score_correction_bias is None:
        raise ValueError("capture: the MTP layer's router has no bias; noaux_tc is needed")
    if get_tensor_model_parallel_rank():
        return None
    # Before the recorder: it takes note of the order that it finds, which may be another server's.
    lock = hold(folder, vllm_config.model_config.model)
    recorder = Recorder(folder, model_meta(vllm_config, int(number)), lock)
    config = vllm_config.model_config.hf_config
    ffn.register_forward_pre_hook(_Hook(recorder, config))
    return recorder


class _Hook:
    """Before `ffn(hidden, ...)`: records the rows of real tokens."""

    def __init__(self, recorder: Recorder, config: Any) -> None:
        self.recorder, self.config = recorder, config

    def __call__(self, ffn: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.recorder.recording:
            return
        count = num_real_tokens()
        if count:
            hidden = args[0].reshape(-1, self.config.hidden_size)[:count]
            ids, weights = routes(ffn.gate, hidden, self.config)
            self.recorder.append(hidden, ids, weights)


def num_real_tokens() -> int:
    """Tokens of the current pass without padding; 0 in profile and warm-up runs."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):
        return 0
    # The MTP layer has a sliding window only, so this is vLLM's DeepseekSparseSWAMetadata.
    return max(
        (entry.num_decode_tokens + entry.num_prefill_tokens for entry in metadata.values()),
        default=0,
    )
