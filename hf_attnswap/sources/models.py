"""Models and tokenizers from a Hub id, a folder or a .gguf file."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UsageError


def load(
    model_name_or_path: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in eval mode, of the class that it was saved with, and its tokenizer.

    The tokenizer is None for a model that reads no text and has none. A GGUF file is dequantised and loses its mark of
    quantisation, so that it can be saved and trained as any model. Weights that are pickled rather than safetensors are
    read with `allow_pickle` alone.

    Raises:
        UsageError: no such model, a file that is not a GGUF, or a device that is not there.
    """
    device = find_device(device)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = find_dtype(dtype)
    source, where = _source(model_name_or_path)
    where |= {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with _one_line(f"cannot load the model {model_name_or_path!r}"):
        weights = {} if "gguf_file" in where else _weights(allow_pickle)
        cls = AutoModelForCausalLM
        if "gguf_file" not in where:
            cls = _class(AutoConfig.from_pretrained(source, **where))
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
        except Exception:
            if getattr(cls, "main_input_name", "input_ids") == "input_ids":
                raise
            tokenizer = None  # whoever wants text says what measures or trains such a model
        model = cls.from_pretrained(source, dtype=dtype, **weights, **where)
    if "gguf_file" in where:
        _forget_quantisation(model)
        model.config.name_or_path = gguf_source(model_name_or_path) or model.config.name_or_path
    return model.to(device).eval(), tokenizer


def gguf_source(path: str) -> str | None:
    """Return the Hub id of the model that a .gguf file was made from, where the metadata of the file say it.

    The `base_model` there is another one: what that model was trained from.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for key in ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url"):
        said = fields[key].contents() if key in fields else ""
        found = re.fullmatch(r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+?)(?:-GGUF)?/?", said)
        if found:
            return found[1]
    return None


def load_any(
    model_name_or_path: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Return a model of the class that it was saved with, and its tokenizer or processor (None without one).

    Raises:
        UsageError: as `load`.
    """
    source, where = _source(model_name_or_path)
    if where:  # GGUF holds language models alone
        return load(model_name_or_path, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    where = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if dtype != "auto":
        find_dtype(dtype)
    with _one_line(f"cannot load the model {model_name_or_path!r}"):
        config = AutoConfig.from_pretrained(source, **where)
        model = _class(config).from_pretrained(source, dtype=dtype, **_weights(allow_pickle), **where)
    return model.eval(), _processor(source, where)


def _class(config: PreTrainedConfig) -> Any:
    """Return the class that a model was saved with, or else the auto class for its config."""
    saved_as = getattr(transformers, (config.architectures or [""])[0], None)
    written_by_its_repository = getattr(config, "auto_map", None) or {}
    if saved_as is None and "AutoModelForCausalLM" in written_by_its_repository:
        return AutoModelForCausalLM
    # The causal model of an encoder-decoder is its decoder alone.
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    return saved_as or (AutoModelForCausalLM if causal else AutoModel)


def require_weights(folder: Path) -> None:
    """Raise UsageError where the weights in the folder of a saved model are not those of its config.json.

    That goes by names and shapes; no weight stays in memory. Quantised weights are left to what reads them, and of a
    class that transformers does not have only the weights of its auto class are known.
    """
    with _one_line(f"{folder}: its weights cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            return
        cls = _class(config)
        _, found = cls.from_pretrained(
            folder, config=config, device_map="meta", dtype="auto", use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    wrong = {
        key: f"has shape {tuple(shape)} in the weights, and {tuple(expected)} by config.json"
        for key, shape, expected in found["mismatched_keys"]
    }
    if cls.__name__ in (config.architectures or ()):
        wrong |= {key: "is not among the weights" for key in found["missing_keys"]}
        wrong |= {key: "is among the weights, and config.json knows nothing of it" for key in found["unexpected_keys"]}
    if wrong:
        key = min(wrong)
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UsageError(f"{folder}: config.json and weights do not belong together: {key} {wrong[key]}{others}")


def _processor(source: str, where: dict[str, Any]) -> Any:
    """The tokenizer or processor of a model; None where its folder has no file for one."""
    own = ("tokenizer*", "vocab*", "*processor_config.json", "spiece*", "*.model")
    if Path(source).is_dir() and not any(next(Path(source).glob(pattern), None) for pattern in own):
        return None  # transformers would make up an empty one
    try:
        return AutoProcessor.from_pretrained(source, **where)
    except (OSError, ValueError):
        return None


def load_classifier(
    model_name_or_path: str,
    labels: Sequence[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model with a head for these labels (new, where it has none) in eval mode, and its tokenizer.

    It has no dropout in its attention, swapped or not: no variant takes one.

    Raises:
        UsageError: no such model, one without a head for texts, or a head for another number of labels.
    """
    dtype = find_dtype(dtype) if isinstance(dtype, str) else dtype
    with _one_line(f"cannot load the model {model_name_or_path!r}"):
        source, where = _source(model_name_or_path)
        where |= {"trust_remote_code": False}  # else transformers asks on the terminal
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        names = dict(enumerate(labels))
        config = AutoConfig.from_pretrained(
            source, id2label=names, label2id={label: i for i, label in names.items()}, **where
        )
        for name in _ATTENTION_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        weights = {} if "gguf_file" in where else _weights(allow_pickle=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, dtype=dtype, **weights, **where
        )
    return model.to(find_device(device)).eval(), tokenizer


_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def _weights(allow_pickle: bool) -> dict[str, Any]:
    """What from_pretrained is told of the files that it may read."""
    return {} if allow_pickle else {"use_safetensors": True}


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever fails inside becomes a UsageError with the first line of its reason."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # transformers, huggingface_hub, safetensors and gguf raise many kinds
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        if "file named model.safetensors" in first_line:
            first_line += " Pickled weights are refused, unless you trust them and pass --allow_pickle"
        raise UsageError(f"{what}: {first_line}") from error


def find_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for, or else CUDA where there is one, or else the CPU.

    Raises:
        UsageError: the device asked for is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {str(device)!r} is not there: {str(error).splitlines()[0]}") from None
    return device


def find_dtype(name: str) -> torch.dtype:
    """Return the floating dtype of that name; UsageError where there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype is {name!r}; expected float32, bfloat16 or float16")
    return dtype


def _source(name: str) -> tuple[str, dict]:
    path = Path(name)
    if path.suffix != ".gguf":
        if path.is_file():
            raise UsageError(f"model {name!r} is a file; expected a Hub id, a folder or a .gguf file")
        if path.is_dir() and not (path / "config.json").is_file():
            raise UsageError(f"model folder {name!r} has no config.json")
        return name, {}
    if not path.is_file():
        raise UsageError(f"model file {name!r} does not exist")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(f"model file {name!r} is not a GGUF file: it starts with {magic!r}")
    return str(path.parent), {"gguf_file": path.name}


def _forget_quantisation(model: PreTrainedModel) -> None:
    """The weights are plain tensors by now; the mark would make save_pretrained refuse."""
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
    ):
        holder.__dict__.pop(name, None)


def architecture(model_name_or_path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model that `load_any` loads, without its weights (on the meta device): enough for `inspect`."""
    source, where = _source(model_name_or_path)
    with _one_line(f"cannot read the model {model_name_or_path!r}"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
        cls = _class(config)
        with torch.device("meta"):
            if issubclass(cls, PreTrainedModel):
                return cls._from_config(config)
            return cls.from_config(config, trust_remote_code=trust_remote_code)
