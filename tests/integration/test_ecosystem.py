"""Programs that know nothing of this package load a conversion as any other model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import randomise, tiny, tiny_encoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline
from transformers.utils.import_utils import is_serve_available

import hf_attnswap
from hf_attnswap import cli

WORDS = "the cat sat on a mat and it was hat of one man".split()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "<s>": 1, "[UNK]": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary), 64)}  # one for everything that a tiny model may say
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="<s>", model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ecosystem") / "converted"
    randomise(hf_attnswap.swap(tiny(), "hedgehog+window", window=8, sinks=2)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_pipeline(converted):
    pipe = pipeline("text-generation", str(converted))
    assert [entry.swapped for entry in hf_attnswap.inspect(pipe.model)] == ["hedgehog+window"] * 3
    assert len(pipe(["the cat", "it was one man"], max_new_tokens=4, batch_size=2)) == 2


def test_generate_hands_the_tokenizer_down(converted):
    """As for stop strings, and as `transformers serve` always does; it reaches the attention."""
    model, words = AutoModelForCausalLM.from_pretrained(converted), tokenizer()
    ids = words("the cat sat on", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, tokenizer=words), written)


def test_lm_eval_scores_as_the_model_does(converted):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    evaluated = huggingface.HFLM(pretrained=str(converted), device="cpu", dtype="float32", batch_size=2)
    pairs = [("the cat sat on", " a mat"), ("it was", " one man of the hat"), ("the", " cat")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    model, words = AutoModelForCausalLM.from_pretrained(converted), tokenizer()
    for (context, rest), (found, _) in zip(pairs, evaluated.loglikelihood(requests, disable_tqdm=True), strict=True):
        ids = words(context + rest, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        each = logs.gather(1, ids[0, 1:, None])[len(context.split()) - 1 :]
        assert found == pytest.approx(each.sum().item(), abs=1e-4)


TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
NEW_TOKENS = 6


@pytest.fixture
def server(converted, tmp_path):
    """The conversion behind `transformers serve`: its address, the folder that it was told, and an environment."""
    if not is_serve_available():
        pytest.skip(
            "transformers serve needs fastapi, uvicorn, pydantic and openai (pip install transformers[serving])"
        )
    words = AutoTokenizer.from_pretrained(converted)
    words.chat_template = TEMPLATE
    words.save_pretrained(converted)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(Path(hf_attnswap.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_attnswap", "run", "transformers", "serve", str(converted)]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=log, stderr=log
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        yield address, str(converted), environment
    finally:
        process.terminate()
        process.wait(60)
        log.close()


@pytest.mark.long
def test_transformers_serve_and_chat_answer_as_generate_does(server):
    address, folder, environment = server
    prompt = " ".join([*WORDS, *WORDS[::-1]])  # longer than the window
    chat = [{"role": "user", "content": prompt}]
    words = AutoTokenizer.from_pretrained(folder)
    inputs = words.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs.input_ids.shape[1] :]
    expected = words.decode(written, skip_special_tokens=True)
    softmax = hf_attnswap.restore(model).generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert softmax[0, inputs.input_ids.shape[1] :].tolist() != written.tolist()

    body = {"model": folder, "messages": chat, "max_tokens": NEW_TOKENS, "temperature": 0.0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=300))
    assert answer["choices"][0]["message"]["content"].split() == expected.split()

    command = [sys.executable, "-m", "hf_attnswap", "run", "transformers", "chat", folder, address]
    talk = subprocess.run(
        [*command, f"max_new_tokens={NEW_TOKENS}", "do_sample=False"],
        env=environment | {"HF_HUB_OFFLINE": "0"},  # its client refuses any address otherwise
        input=f"{prompt}\nn\n!exit\n", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert talk.returncode == 0, talk.stderr
    assert expected in " ".join(talk.stdout.split())


def test_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    encoder = randomise(hf_attnswap.swap(tiny_encoder(), "sigmoid"))
    encoder.save_pretrained(tmp_path / "encoder")
    words = tokenizer()
    words.save_pretrained(tmp_path / "encoder")
    loaded = library.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    texts = ["the cat sat on a mat", "it was one man"]
    batch = words(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = encoder.eval()(**{k: v for k, v in batch.items() if k != "token_type_ids"}).last_hidden_state
    mask = batch.attention_mask[..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(loaded.encode(texts, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-4)
    loaded.save(str(tmp_path / "sentences"))
    again = library.SentenceTransformer(str(tmp_path / "sentences"), device="cpu")
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-4)


def test_attnswap_run_becomes_the_other_program(monkeypatch, capsys):
    """Which then has the package imported; here a command of transformers."""
    monkeypatch.setattr(sys, "argv", ["attnswap", "run", "transformers", "version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and capsys.readouterr().out.strip() == transformers.__version__
    monkeypatch.setattr(sys, "argv", ["attnswap", "run", "no-such-program", "--its", "option"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "no installed package has a program 'no-such-program'" in capsys.readouterr().err
