"""What every test starts from: a fixed seed, its own caches, and a quiet transformers."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

with contextlib.suppress(ImportError):  # tests that compare with it import it themselves; those marked gpu do without
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
os.environ.pop("COLUMNS", None)  # pytest-xdist gives its workers a width, by which we would wrap lines
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would pass on to ignore it
torch.set_num_threads(1)  # tiny products: on a busy machine waiting for a second thread takes longer than the work


@pytest.fixture(autouse=True, scope="session")
def own_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled once for all tests, and not taken from the developer's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg_cache")))
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """HF_HOME of this test alone, so that no test reads what another one, or the developer, left there."""
    home = tmp_path_factory.mktemp("hf_home")
    monkeypatch.setenv("HF_HOME", str(home))
    yield home


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors hold NaN and lie between canaries: an output left out, or written beyond its end, is seen."""
    from neox_lite.kernels.cpu.pool import shared_pool

    empty, made, edge = torch.empty, [], 64

    def guarded(*shape: Any, **options: Any) -> torch.Tensor:
        wanted = empty(*shape, **options)
        memory = torch.full((wanted.nbytes + 2 * edge,), 0xA5, dtype=torch.uint8, device=wanted.device)
        made.append(memory)
        memory[edge : edge + wanted.nbytes] = 0xFF  # NaN in every float, -1 in integers
        return memory[edge : edge + wanted.nbytes].view(wanted.dtype).view(wanted.shape)

    monkeypatch.setattr(torch, "empty", guarded)
    for scratch in shared_pool()._scratch:
        scratch.fill(0xFF)
    yield
    for memory in made:
        assert bool((memory[:edge] == 0xA5).all()) and bool((memory[-edge:] == 0xA5).all()), "written beyond the end"


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """neox-lite in this process: exit code, stdout, stderr."""
    from neox_lite_app.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="session")
def demo_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in int4; copy it before you change it."""
    from neox_lite_app.paths import DEMO
    from neox_lite_quant import convert

    folder = tmp_path_factory.mktemp("demo") / "int4"
    convert(DEMO, folder)
    return folder


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that the bundled model was not trained on."""
    from neox_lite_app.paths import DEMO

    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Texts and tokenizers that lie beside the repository; tests that need them skip, saying so, where they are not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
