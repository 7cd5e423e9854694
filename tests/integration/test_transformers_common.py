"""The tests that transformers runs on each of its own models, on swapped ones.

They stand in its source distribution only, which is fetched when the tests run. It has the tests common to all models,
without those of `generate`, of export and of single models.
"""

import importlib.util
import subprocess
import sys
import tarfile
import types
import unittest

import pytest
import torch
import transformers
from tiny_models import tokens

import hf_attnswap

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning"),  # marks of transformers' own
]

_SOFTMAX = "it asks for eager or sdpa attention, which are softmax: a swapped model refuses to run them"
_LACKING = "it loads a folder that lacks weights of the model: a conversion refuses to be completed at random"
# What cannot hold for a swapped model, by the start of the test's name.
EXCLUDED = {
    "test_attention_outputs": _SOFTMAX,
    "test_can_set_attention_dynamically": _SOFTMAX,
    "test_eager_matches_sdpa_inference": _SOFTMAX,
    "test_flash_attn": "it asks for flash attention, which is softmax: a swapped model refuses to run it",
    "test_flex_attention": "it asks for flex attention, which is softmax: a swapped model refuses to run it",
    "test_retain_grad_hidden_states_attentions": _SOFTMAX,
    "test_sdpa_can_": _SOFTMAX,
    "test_can_init_all_missing_weights": _LACKING,
    "test_model_weights_reload_no_missing_tied_weights": _LACKING,
}


class Model:
    """What the tests ask for: classes, a config, inputs, and a few sizes of these."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_encoder_decoder = False

    def __init__(self, attention: str):
        self.attention = attention

    def plain_config(self) -> transformers.PreTrainedConfig:
        raise NotImplementedError

    def get_config(self):
        """What `swap` makes of a config: a model built from it has the variants from the start."""
        return hf_attnswap.swap(self.classes[0](self.plain_config()), self.attention).config

    def prepare_config_and_inputs_for_common(self):
        ids = tokens(self.seq_length, self.batch_size)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


_SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0
)  # fmt: skip


class Llama(Model):
    classes = (
        transformers.LlamaForCausalLM,
        transformers.LlamaModel,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForQuestionAnswering,
        transformers.LlamaForTokenClassification,
    )

    def plain_config(self):
        return transformers.LlamaConfig(**_SIZES, num_key_value_heads=2)


class Bert(Model):
    classes = (
        transformers.BertModel,
        transformers.BertForMaskedLM,
        transformers.BertForMultipleChoice,
        transformers.BertForNextSentencePrediction,
        transformers.BertForQuestionAnswering,
        transformers.BertForSequenceClassification,
        transformers.BertForTokenClassification,
    )
    num_choices = 4

    def plain_config(self):
        return transformers.BertConfig(**_SIZES, attention_probs_dropout_prob=0.0)


class T5(Model):
    classes = (transformers.T5ForConditionalGeneration, transformers.T5Model)
    is_encoder_decoder = True

    def plain_config(self):
        return transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
            decoder_start_token_id=0,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        ids = tokens(self.seq_length, self.batch_size, seed=1)
        return config, inputs | {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


class T5Encoder(T5):
    classes = (transformers.T5EncoderModel, transformers.T5ForTokenClassification)
    is_encoder_decoder = False
    is_training = False  # its tests of training want a loss from every class

    def get_config(self):
        config = super().get_config()
        config.is_encoder_decoder = False
        return config

    prepare_config_and_inputs_for_common = Model.prepare_config_and_inputs_for_common


def download(folder, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"{what[0]} cannot be fetched: {(done.stderr.strip() or 'pip failed').splitlines()[-1]}")


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """tests/test_modeling_common.py of the transformers that is installed, as a module."""
    folder = tmp_path_factory.mktemp("transformers_tests")
    version = transformers.__version__
    download(folder, f"transformers=={version}", "--no-binary", "transformers", "--no-build-isolation")
    file = folder / "test_modeling_common.py"
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        file.write_bytes(archive.extractfile(f"transformers-{version}/tests/{file.name}").read())
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("parameterized") is None:  # its tests need it, nothing else does
            download(folder, "parameterized", "--only-binary", ":all:")
            patch.syspath_prepend(next(folder.glob("parameterized-*.whl")))
        package = "transformers_tests"
        # What it imports from files that are not in the distribution.
        for name, missing in {
            "": (),
            ".exporters": (),
            ".exporters.test_export": ("ExportTesterMixin",),
            ".generation": (),
            ".generation.test_utils": ("GenerationTesterMixin",),
        }.items():
            stub = types.ModuleType(package + name)
            stub.__path__ = []
            vars(stub).update({cls: type(cls, (), {}) for cls in missing})
            patch.setitem(sys.modules, stub.__name__, stub)
        spec = importlib.util.spec_from_file_location(f"{package}.{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        *((Llama, name) for name in ("elu", "relu_norm", "hedgehog+window")),
        *((Bert, name) for name in ("elu", "relu_norm")),
        *((T5, "relu_norm"), (T5Encoder, "relu_norm")),
    ],
)
def test_common(common, model, attention):
    class ModelTest(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = model.classes
        all_generative_model_classes = ()  # no tests of `generate` here
        is_encoder_decoder = model.is_encoder_decoder
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self):
            for start, reason in EXCLUDED.items():
                if self._testMethodName.startswith(start):
                    self.skipTest(reason)
            torch.manual_seed(0)
            self.model_tester = model(attention)

    names = unittest.defaultTestLoader.getTestCaseNames(ModelTest)
    assert all(any(name.startswith(start) for name in names) for start in EXCLUDED)
    result = unittest.TestResult()
    unittest.TestSuite(map(ModelTest, names)).run(result)
    failed = [f"{test.id()}\n{trace}" for test, trace in result.errors + result.failures]
    assert not failed, "\n".join(failed)
    # Most of the others need a GPU, a package that is not here, or another kind of model.
    skipped = {test._testMethodName for test, _ in result.skipped if isinstance(test, ModelTest)}
    assert result.testsRun - len(skipped) > 60
