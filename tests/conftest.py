"""What every test starts from: a fixed seed, its own caches, and a quiet transformers."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Texts and tokenizers that lie beside the repository; tests that need them skip, saying so, where they are not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder
