"""`capture` against a small server with the plugin's real recorder behind it."""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from kernels import capture as plugin
from kernels.folder_lock import CLIENT, FolderLock
from retrofit import capture
from retrofit.__main__ import main
from retrofit.calibration import Calibration, read_meta
from retrofit.control import CONTROL, Action, Order, read_answer, write
from tests.retrofit.folders import HEAD_LAYER, HIDDEN, NUM_EXPERTS, TOPK, calibration_rows

META = {
    "model_sha256": "0" * 64,
    "layers": [HEAD_LAYER],
    "hidden_size": HIDDEN,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOPK,
}
ROWS = 10  # of each prompt
ROW_BYTES = HIDDEN * 2 + TOPK * 8


class FakeServer:
    """Answers chat completions; each adds ROWS rows to the recorder, as a server's hook would."""

    def __init__(self, folder, meta=META) -> None:
        self.recorder = plugin.Recorder(folder, meta)
        self.bodies: list[dict] = []
        self.fail_at: int | None = None
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.watching = threading.Thread(target=self.watch)

    def answer(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            if self.fail_at is not None and len(self.bodies) >= self.fail_at:
                return 500, {"error": {"message": "engine died"}}
            self.bodies.append(body)
        self.recorder.append(*calibration_rows(ROWS, seed=len(self.bodies)))
        return 200, {"choices": [{"message": {"content": "x"}}]}

    def watch(self) -> None:
        while not self.stop.wait(0.005):
            self.recorder.obey()

    def end(self) -> None:
        """No order is obeyed from here on."""
        self.stop.set()
        self.watching.join()

    def asked(self) -> list[str]:
        return sorted(body["messages"][0]["content"] for body in self.bodies)


@pytest.fixture
def serve():
    """serve(server) -> URL."""
    running = []

    def start(server: FakeServer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send(200, {"data": [{"id": "fake"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send(*server.answer(body))

            def send(self, status: int, value: dict) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        answering = threading.Thread(target=http.serve_forever)
        for thread in (answering, server.watching):
            thread.start()
        running.append((http, answering, server))
        return f"http://127.0.0.1:{http.server_address[1]}"

    yield start
    for http, answering, server in running:
        server.end()
        http.shutdown()
        answering.join()
        http.server_close()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "calibration"
    path.mkdir()
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i:02}"}) + "\n" for i in range(40)))
    return path


def options(url, folder, prompts, *more) -> list[str]:
    return [
        "capture", "--url", url, "--out", str(folder), "--prompts", str(prompts),
        "--num-prompts", "40", "--max-tokens", "8", *more,
    ]  # fmt: skip


def test_every_prompt_is_asked_once_and_the_rows_are_there(serve, folder, prompts, capsys):
    server = FakeServer(folder)
    assert main(options(serve(server), folder, prompts)) == 0
    assert server.asked() == [f"text {i:02}" for i in range(40)]
    assert {body["max_tokens"] for body in server.bodies} == {8}
    calibration = Calibration(folder, HIDDEN, NUM_EXPERTS, TOPK)
    assert calibration.num_rows == 40 * ROWS
    counts = calibration.counts
    out = capsys.readouterr()
    assert "400 rows of 40 of 40 prompts in 3 files" in out.out
    assert f"min {min(counts)}, mean {400 * TOPK / NUM_EXPERTS:.0f}, max {max(counts)}" in out.out
    assert "40/40" in out.err
    assert not server.recorder.recording


def test_an_interrupted_capture_asks_only_what_is_not_committed(serve, folder, prompts, capsys):
    server = FakeServer(folder)
    url = serve(server)
    server.fail_at = 20  # within the second group of 16
    assert main(options(url, folder, prompts)) == 2
    assert "HTTP 500" in capsys.readouterr().err
    meta = read_meta(folder)
    assert (meta["num_rows"], len(meta["prompts_done"])) == (16 * ROWS, 16)
    server.fail_at = None
    server.bodies.clear()
    assert main(options(url, folder, prompts)) == 0
    assert server.asked() == [f"text {i:02}" for i in range(16, 40)]
    assert read_meta(folder)["num_rows"] == 40 * ROWS  # none lost, none twice
    server.bodies.clear()
    assert main(options(url, folder, prompts)) == 0
    assert server.bodies == []


def test_the_budget_stops_it(serve, folder, prompts, capsys):
    server = FakeServer(folder)
    gib = 200 * ROW_BYTES / capture.GIB  # a group of 16 prompts fits, two do not
    assert main(options(serve(server), folder, prompts, "--budget-gib", repr(gib))) == 0
    assert read_meta(folder)["num_rows"] == 16 * ROWS
    assert read_meta(folder)["full"]
    assert "is reached after" in capsys.readouterr().err
    assert len(server.bodies) == 32


def test_a_folder_of_other_prompts_is_refused(serve, folder, prompts, capsys):
    url = serve(FakeServer(folder))
    assert main(options(url, folder, prompts)) == 0
    assert main(options(url, folder, prompts, "--max-tokens", "9")) == 2
    assert "max_tokens = 8, not 9" in capsys.readouterr().err


def test_another_models_rows_are_refused(serve, folder, prompts, capsys):
    server = FakeServer(folder)
    server.fail_at = 20
    assert main(options(serve(server), folder, prompts)) == 2
    server.end()
    other = FakeServer(folder, {**META, "model_sha256": "1" * 64})
    assert main(options(serve(other), folder, prompts)) == 2
    assert "model_sha256" in capsys.readouterr().err
    assert other.bodies == []


def test_a_second_capture_into_the_folder_is_refused(serve, folder, prompts, capsys):
    server = FakeServer(folder)
    url = serve(server)
    lock = FolderLock(folder, "captures", CLIENT)
    assert main(options(url, folder, prompts)) == 2
    err = capsys.readouterr().err
    assert f"{folder}: is held by process {os.getpid()} on " in err
    assert "one `capture` fills a folder at a time" in err
    assert server.bodies == []
    lock.release()
    assert main(options(url, folder, prompts)) == 0


def test_a_server_that_does_not_record_is_named(
    serve, folder, prompts, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(capture, "ANSWER_TIMEOUT_S", 0.2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert main(options(serve(FakeServer(elsewhere)), folder, prompts)) == 2
    assert "nothing records into" in capsys.readouterr().err


def test_no_server_is_one_line(folder, prompts, capsys):
    assert main(options("http://127.0.0.1:1", folder, prompts)) == 2
    assert "Connection refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}'], "1 prompts; --num-prompts 2"),
        (["no", '{"text": "a"}'], "line 1: an object with text or messages"),
        (['{"id": 1}', '{"text": "a"}'], "line 1: an object with text or messages"),
        (['{"id": 1, "text": "a"}', '{"id": 1, "text": "b"}'], "id '1' occurs twice"),
    ],
)
def test_bad_prompts_are_refused(folder, prompts, capsys, lines, message):
    prompts.write_text("\n".join(lines))
    assert main(options("http://x", folder, prompts, "--num-prompts", "2")) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--num-prompts", "0"), ("--max-tokens", "0"), ("--budget-gib", "0"), ("--concurrency", "0"),
     ("--url", "host:8000")],
)  # fmt: skip
def test_bad_options_are_exit_status_2(folder, prompts, option, value):
    assert main(options("http://x", folder, prompts, option, value)) == 2


def test_messages_are_sent_as_they_are(serve, folder, prompts):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompts.write_text(json.dumps({"id": "a", "messages": messages}))
    server = FakeServer(folder)
    assert main(options(serve(server), folder, prompts, "--num-prompts", "1")) == 0
    assert server.bodies[0]["messages"] == messages


def test_the_bundled_prompts_are_256_and_not_the_held_out_ones():
    bundled = capture.read_prompts(capture.BUNDLED, 256)
    texts = [prompt.messages[0]["content"] for prompt in bundled]
    held_out = capture.BUNDLED.parents[1] / "tiny" / "heldout.jsonl"
    for line in held_out.read_text().splitlines():
        start = " ".join(json.loads(line)["text"].split())[:50]
        assert not any(start in text for text in texts)


class TestRecorder:
    def test_an_order_from_before_the_server_is_not_obeyed(self, folder):
        write(folder / CONTROL, Order("old", Action.BEGIN, 10**9))
        recorder = plugin.Recorder(folder, META)
        recorder.obey()
        assert not recorder.recording
        assert read_answer(folder) is None

    def test_rows_are_dropped_unless_it_records(self, folder):
        recorder = plugin.Recorder(folder, META)
        recorder.append(*calibration_rows(5))
        write(folder / CONTROL, Order("1", Action.BEGIN, 10**9))
        recorder.obey()
        write(folder / CONTROL, Order("2", Action.COMMIT, 10**9))
        recorder.obey()
        assert read_answer(folder).num_rows == 0

    def test_a_new_begin_drops_what_a_lost_client_left(self, folder):
        recorder = plugin.Recorder(folder, META)
        for number, action in enumerate((Action.BEGIN, Action.BEGIN, Action.COMMIT)):
            write(folder / CONTROL, Order(str(number), action, 10**9))
            recorder.obey()
            if number == 0:
                recorder.append(*calibration_rows(5))
        assert read_answer(folder).num_rows == 0

    def test_an_error_is_answered(self, folder):
        (folder / "rows-00000.safetensors").write_bytes(b"")
        recorder = plugin.Recorder(folder, META)
        write(folder / CONTROL, Order("1", Action.BEGIN, 10**9))
        recorder.obey()
        assert "holds rows and no meta.json" in read_answer(folder).error

    def test_a_disk_that_fails_ends_the_recording_and_is_answered(self, folder, monkeypatch):
        recorder = plugin.Recorder(folder, META)
        write(folder / CONTROL, Order("1", Action.BEGIN, 10**9))
        recorder.obey()

        def full(*_: object) -> bool:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(recorder._writer, "append", full)
        recorder.append(*calibration_rows(5))
        assert not recorder.recording
        write(folder / CONTROL, Order("2", Action.COMMIT, 10**9))
        recorder.obey()
        assert "No space left on device" in read_answer(folder).error


class TestPlugin:
    def test_no_variable_no_capture(self, monkeypatch):
        monkeypatch.delenv("DSV4_CAPTURE_DIR", raising=False)
        assert plugin.capture_folder() is None
        monkeypatch.setenv("DSV4_CAPTURE_DIR", "")  # as a shell or a compose file leaves it
        assert plugin.capture_folder() is None

    def test_a_folder_that_does_not_exist_stops_the_server(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DSV4_CAPTURE_DIR", str(tmp_path / "absent"))
        with pytest.raises(ValueError, match="must be a folder that exists"):
            plugin.capture_folder()

    @pytest.mark.parametrize(
        "wrong", ["num_speculative_tokens", "disable_padded_drafter_batch", "enforce_eager"]
    )
    def test_settings_that_give_wrong_rows_are_refused(self, wrong):
        values = {
            "num_speculative_tokens": 1,
            "disable_padded_drafter_batch": True,
            "enforce_eager": True,
        }
        config = _Namespace(
            speculative_config=_Namespace(**values), model_config=_Namespace(**values)
        )
        plugin.check_config(config)
        values[wrong] = 2 if wrong == "num_speculative_tokens" else False
        config = _Namespace(
            speculative_config=_Namespace(**values), model_config=_Namespace(**values)
        )
        with pytest.raises(ValueError, match=f"capture: {wrong} = "):
            plugin.check_config(config)

    def test_routes_are_chosen_with_the_bias_and_weighted_without(self):
        class Gate(torch.nn.Module):
            e_score_correction_bias = torch.tensor([0.0, 9.0, 0.0])

            def forward(self, hidden):
                return hidden, None

        config = _Namespace(
            num_experts_per_tok=2, norm_topk_prob=True, scoring_func="sqrtsoftplus",
            routed_scaling_factor=1.5,
        )  # fmt: skip
        ids, weights = plugin.routes(Gate(), torch.tensor([[3.0, -1.0, 0.0]]), config)
        assert ids.tolist() == [[1, 0]]
        scores = torch.nn.functional.softplus(torch.tensor([-1.0, 3.0])).sqrt()
        torch.testing.assert_close(weights[0], scores / scores.sum() * 1.5)


class TestAttach:
    """The plugin's start in the processes of servers; vLLM's part is stood in for."""

    @pytest.fixture
    def attach(self, original, folder, monkeypatch):
        """attach(rank): as the process of that tensor-parallel rank; each is a server's own."""

        def attach(rank: int) -> plugin.Recorder | None:
            monkeypatch.setitem(
                sys.modules,
                "vllm.distributed",
                _Namespace(get_tensor_model_parallel_rank=lambda: rank),
            )
            ffn = torch.nn.Module()
            ffn.gate = _Namespace(e_score_correction_bias=torch.zeros(1))
            layers = {str(HEAD_LAYER): _Namespace(mtp_block=_Namespace(ffn=ffn))}
            hf = {"hidden_size": HIDDEN, "n_routed_experts": NUM_EXPERTS}
            config = _Namespace(
                speculative_config=_Namespace(
                    num_speculative_tokens=1, disable_padded_drafter_batch=True
                ),
                model_config=_Namespace(
                    enforce_eager=True,
                    model=str(original),
                    hf_config=_Namespace(**hf, num_experts_per_tok=TOPK),
                ),
            )
            return plugin.attach(_Namespace(model=_Namespace(layers=layers)), config, folder)

        return attach

    def test_a_second_server_is_refused_until_the_first_has_ended(self, attach, original, folder):
        first = attach(0)
        with pytest.raises(ValueError, match="one server records into a folder at a time") as told:
            attach(0)
        assert str(told.value).startswith(f"capture: {folder}: is held by process {os.getpid()} on")
        assert f"(serves {original})" in str(told.value)
        first.hold.release()
        attach(0).hold.release()

    def test_the_other_ranks_of_a_server_neither_write_nor_take_the_folder(self, attach):
        first = attach(0)
        assert attach(1) is None
        first.hold.release()
        assert attach(1) is None
        attach(0).hold.release()

    def test_a_folder_that_cannot_be_locked_is_named(self, attach, folder):
        (folder / "server.lock").mkdir()
        with pytest.raises(ValueError, match=f"capture: {folder}: cannot be locked: Is a dir"):
            attach(0)


class _Namespace:
    def __init__(self, **values: object) -> None:
        self.__dict__ |= values
