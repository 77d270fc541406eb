"""The examples as they stand, with a tiny model; and the buffers that `presto-rt describe` prints."""

from __future__ import annotations

import importlib.util
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from presto_rt.cli import main
from presto_rt.loading import load
from presto_rt.runtime import memory
from tests.support.models import write_tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny")


def test_examples_are_all_tested_here() -> None:
    """Here, or in test_tiny_model.py."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"threads", "server", "tiny_model"}


def test_threads_example_matches_the_pipeline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = example("threads").main(str(folder), 5)
    assert [audio.seed for audio in made] == list(range(5))
    assert [audio.samples.shape[1] for audio in made] == [44_100 * n for n in (1, 2, 3, 1, 2)]
    model = load(folder, backend="graph")
    alone = model.generate(made[1].prompt, seconds=2.0, steps=2, seed=1)
    assert np.array_equal(alone.samples, made[1].samples)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_server_example_serves_clips_and_explains_errors(folder: Path) -> None:
    import io
    import wave

    server = example("server").serve(0, str(folder))
    server.RequestHandlerClass.log_message = lambda *_: None  # quiet
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{base}/clip?prompt=calm+piano&seconds=0.5&seed=7&steps=2", timeout=120) as answer:
            sent = answer.read()
        with wave.open(io.BytesIO(sent)) as file:
            got = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, 2)
        model = load(folder, backend="graph")
        want = model.generate("calm piano", seconds=0.5, seed=7, steps=2)
        assert np.array_equal(got, want.to_int16())
        for path, code, words in (
            ("/clip?seconds=-1", 400, "seconds"),
            ("/clip?seed=soon", 400, "seed must be"),
            ("/clip?seconds=61", 400, "60"),
            ("/other", 404, "/clip"),
        ):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(base + path, timeout=60)
            assert caught.value.code == code
            assert words in caught.value.read().decode()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_describe_prints_buffers_and_detects_aliases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", "medium", "--seconds", "32", "--guidance", "2", "--layers", "75%"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    # by hand: 704 frames in the bucket, 2 network inputs, 1536 wide, 4 x 1536 in the perceptron, bf16
    assert lines["hidden"][2] == str(2 * 704 * 4 * 1536 * 2)
    assert lines["residual"][2:4] == [str(2 * 704 * 1536 * 4), "2x704x1536"]
    assert float(lines["up"][1]) == pytest.approx(2 * 2 * 704 * 1536 * 6144 / 1e9, rel=1e-4)
    assert float(lines["attention"][1]) == pytest.approx(4 * 2 * 704 * 704 * 1536 / 1e9, rel=1e-4)
    assert float(lines["up"][2]) == pytest.approx(2 * (2 * 704 * 1536 + 1536 * 6144 + 2 * 704 * 6144) / 1e6, rel=1e-4)
    monkeypatch.setattr(memory, "place", lambda buffers: dict.fromkeys((b.name for b in buffers), 0))
    assert main(["describe", "tiny", "--seconds", "2"]) == 1
    assert "ALIAS" in capsys.readouterr().err


def test_graph_backend_equals_the_eager_backend(folder: Path) -> None:
    """Same call, same sound, on either backend; presets with random weights have it in their names."""
    request = {"prompt": "piano, 90 bpm", "seconds": 1.0, "seed": 7}
    graph, plain = (load(folder, dtype="float32", backend=b) for b in ("graph", "eager"))
    assert (graph.backend.name, plain.backend.name) == ("graph", "eager")
    a, b = graph.generate(**request), plain.generate(**request)
    assert a.latents is not None
    assert b.latents is not None
    assert (a.latents - b.latents).abs().max() <= 1e-4 * b.latents.abs().max()
    assert a.samples.shape == b.samples.shape
    # sound is compared where phases cannot tip over: the loudness of both
    assert float(np.square(a.samples).mean()) == pytest.approx(float(np.square(b.samples).mean()), rel=0.05)
    assert set(a.timings) == {"text", "denoise", "decode", "total"}
    integers = graph.generate(**request, sample_format="int16")
    assert integers.samples.dtype == np.int16
    assert np.array_equal(integers.to_int16(), a.to_int16())
    seen: list[tuple[int, int]] = []
    clips = graph.generate(["piano", "drums"], seconds=0.5, steps=3, seed=1, callback=lambda *s: seen.append(s))
    assert len(clips) == 2
    batches = 2 if graph.backend.max_batch(graph.plan(0.5).frames) == 1 else 1
    assert seen == [(1, 3), (2, 3), (3, 3)] * batches
    random = load("tiny-random", backend="graph", dtype="float32")
    assert random.model.name == "tiny-random"
    sound = random.generate("piano", seconds=0.3, seed=1).samples
    assert np.isfinite(sound).all()
    assert np.abs(sound).max() > 0.01
