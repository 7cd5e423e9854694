"""Texts and labels from files as they are."""

import json

import pytest
import torch
from tiny_models import randomise, tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_attnswap import UsageError, swap
from hf_attnswap.sources import texts
from hf_attnswap.sources.blocks import cut, start_tokens
from hf_attnswap.sources.texts import TextSource, token_blocks, token_stream
from hf_attnswap.training.batches import batches, model_inputs, next_tokens, require_separate
from hf_attnswap.training.distill import distillation_loss
from hf_attnswap.training.loop import next_token_loss
from hf_attnswap.training.teacher import frozen

TEXTS = ['he said "yes" .', '" unclosed', "null", "3", "a , b"]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_texts_and_labels_of_a_file(tmp_path, suffix):
    """Nothing is taken for a quotation, a missing value or a number."""
    path = tmp_path / f"texts.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": i}) + "\n" for i, text in enumerate(TEXTS)))
    elif suffix == "csv":
        rows = ['"' + text.replace('"', '""') + f'",{i}\n' for i, text in enumerate(TEXTS)]
        path.write_text("text,label\n" + "".join(rows))
    else:
        path.write_text("text\tlabel\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(TEXTS)))
    source = TextSource(str(path))
    assert list(source.labelled("label")) == [(text, str(i)) for i, text in enumerate(TEXTS)]
    assert list(source.rows()) == TEXTS
    with pytest.raises(UsageError, match="has no column 'class'; it has text, label"):
        list(source.labelled("class"))


@pytest.fixture
def words():
    """A tokenizer whose tokens are words: w3 is 3, w63 is 63; 2 ends a text."""
    vocabulary = {f"w{i}": i for i in range(64) if i != 2} | {"end": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="end")


DOCUMENTS = [[10, 11, 12], [20, 21], [], [30, 31, 32, 33, 34, 35, 36]]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n" for ids in DOCUMENTS))
    return TextSource(str(path))


@pytest.mark.parametrize("cache", [False, True])
def test_documents_and_where_they_begin(source, words, tmp_path, cache):
    blocks = token_blocks(source, words, 8, separate=True, cache_dir=tmp_path / "cache" if cache else None)
    assert blocks[..., 0].tolist() == [[10, 11, 12, 2, 20, 21, 2, 2], [30, 31, 32, 33, 34, 35, 36, 2]]
    assert blocks[..., 1].tolist() == [[1, 0, 0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]]
    inputs = model_inputs(batches(blocks, 2, seed=1).blocks.long())
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], list(range(8))]
    assert next_tokens(inputs)[0].tolist() == [-100, 11, 12, 2, -100, 21, 2, -100]
    cut = token_blocks(source, words, 5, separate=True)  # a document that goes on in the next block begins anew there
    assert model_inputs(cut)["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("attention", [None, "relu_norm", "hedgehog", "hedgehog+window"])
def test_a_document_reads_as_if_it_were_alone(source, words, attention):
    """Loss and logits, and those of the teacher."""
    model = tiny()
    if attention:
        model = randomise(swap(model, attention, **({"window": 2, "sinks": 1} if "window" in attention else {})))
    row = token_blocks(source, words, 8, separate=True)[:1]
    require_separate(model)
    with torch.no_grad():
        packed = model(**model_inputs(row)).logits[0]
        texts = [row[:, :4, 0], row[:, 4:7, 0]]
        alone = [model(input_ids=text, use_cache=False).logits[0] for text in texts]
        torch.testing.assert_close(packed[:7], torch.cat(alone), atol=1e-4, rtol=1e-4)
        losses = [next_token_loss(model, text).item() * (text.shape[1] - 1) for text in texts]
        assert next_token_loss(model, row).item() == pytest.approx(sum(losses) / 7, rel=1e-4)  # two count as 0
        teacher = frozen(tiny())
        together = [distillation_loss(model, teacher, text).item() * text.shape[1] for text in texts]
        together.append(distillation_loss(model, teacher, row[:, 7:, 0]).item())
        assert distillation_loss(model, teacher, row).item() == pytest.approx(sum(together) / 8, rel=1e-3, abs=1e-6)


def test_a_model_that_ignores_where_documents_begin_is_refused():
    model = tiny()
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(UsageError, match="does not keep documents of one row apart"):
        require_separate(model)


def test_tokens_are_read_once(source, words, tmp_path, monkeypatch):
    """From the cache they are the same; another text, length, tokenizer or form is another entry."""
    cache = tmp_path / "cache"
    fresh = token_blocks(source, words, 4)
    assert torch.equal(token_blocks(source, words, 4, cache_dir=cache).long(), fresh)
    with monkeypatch.context() as patch:
        patch.setattr(TextSource, "rows", lambda self: 1 / 0)
        again = token_blocks(source, words, 4, cache_dir=cache)
    assert torch.equal(again.long(), fresh) and again.dtype == torch.int32
    assert len(list(cache.iterdir())) == 1
    assert token_blocks(source, words, 4, 9, cache_dir=cache).numel() == 8
    token_blocks(source, words, 4, separate=True, cache_dir=cache)
    words.add_tokens(["more"])
    token_blocks(source, words, 4, cache_dir=cache)
    assert len(list(cache.iterdir())) == 4
    with open(source.name, "a") as file:
        file.write(json.dumps({"text": "w7"}) + "\n")
    assert len(token_blocks(source, words, 4, cache_dir=cache).reshape(-1)) > 0 and len(list(cache.iterdir())) == 5


def test_a_file_of_tokens_appears_whole(source, words, tmp_path, monkeypatch):
    def cut(self):
        yield "w5 w6"
        raise ConnectionError("lost")

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(TextSource, "rows", cut)
        token_blocks(source, words, 2, cache_dir=cache)
    assert not list(cache.iterdir())
    with pytest.raises(UsageError, match="less than one block of 99"):
        token_blocks(source, words, 99, cache_dir=cache)


@pytest.fixture
def begun(words):
    """The same tokenizer, which puts 1 before every text."""
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    return words


@pytest.mark.parametrize("cache", [False, True])
def test_blocks_begin_as_the_tokenizer_begins_a_text(source, begun, tmp_path, cache):
    """One token fewer of the text fits, and no token of the text is lost or read twice."""
    assert begun("w10 w11").input_ids == [1, 10, 11]
    cache_dir = tmp_path / "cache" if cache else None
    blocks = token_blocks(source, begun, 4, cache_dir=cache_dir)
    assert blocks.tolist() == [[1, 10, 11, 12], [1, 20, 21, 30], [1, 31, 32, 33], [1, 34, 35, 36]]
    assert torch.equal(blocks.long(), cut(token_stream(source, begun), 4, start_tokens(begun)))
    assert token_blocks(source, begun, 4, 9, cache_dir=cache_dir).tolist() == blocks[:2].tolist()
    assert token_blocks(source, begun, 13, cache_dir=cache_dir).tolist() == [[1, *[n for d in DOCUMENTS for n in d]]]
    with pytest.raises(UsageError, match="block size 1 leaves no room for text"):
        token_blocks(source, begun, 1, cache_dir=cache_dir)


@pytest.mark.parametrize("cache", [False, True])
def test_closed_blocks_end_as_the_tokenizer_ends_a_text(source, words, tmp_path, cache):
    special = [("w1", 1), ("w2", 2)]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A w2", special_tokens=special)
    cache_dir = tmp_path / "cache" if cache else None
    for _ in range(2):  # beside the blocks that are open, which have another file
        blocks = token_blocks(source, words, 5, closed=True, cache_dir=cache_dir)
        assert blocks.tolist() == [[1, 10, 11, 12, 2], [1, 20, 21, 30, 2], [1, 31, 32, 33, 2], [1, 34, 35, 36, 2]]
        assert token_blocks(source, words, 5, cache_dir=cache_dir).tolist()[0] == [1, 10, 11, 12, 20]
    with pytest.raises(UsageError, match="the 1 tokens that begin a block and the 1 that end it"):
        token_blocks(source, words, 2, closed=True, cache_dir=cache_dir)


def test_a_text_without_a_name():
    """As a script hands on an empty variable."""
    for name in ("", None):
        with pytest.raises(UsageError, match="the name of the text is empty"):
            TextSource(name)


def test_a_file_of_blocks_is_written_in_pieces(source, begun, tmp_path, monkeypatch):
    whole = token_blocks(source, begun, 3)
    monkeypatch.setattr(texts, "_AT_ONCE", 2)
    assert torch.equal(token_blocks(source, begun, 3, cache_dir=tmp_path).long(), whole)


def test_separate_documents_begin_so_too(source, begun):
    blocks = token_blocks(source, begun, 8, separate=True)
    assert blocks[..., 0].tolist() == [[1, 1, 10, 11, 12, 2, 1, 20], [1, 21, 2, 1, 2, 1, 30, 31]]
    assert blocks[..., 1].tolist() == [[1, 1, 0, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 1, 0, 0]]
    assert model_inputs(blocks)["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize(
    "template, first", [("$A", []), ("$A w2", []), ("w1 $A w2", [1]), ("w1 w3 $A", [1, 3]), ("w2 $A w2", [2])]
)
def test_what_a_tokenizer_puts_first(words, template, first):
    special = [("w1", 1), ("w2", 2), ("w3", 3)]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    assert start_tokens(words) == first
