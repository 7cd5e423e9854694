"""Whatever is measured begins as the tokenizer begins every text, once."""

import json

import pytest
import torch
from tiny_models import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_attnswap.evaluation.__main__ import main
from hf_attnswap.evaluation.likelihood import encode_pair
from hf_attnswap.evaluation.perplexity import perplexity
from hf_attnswap.evaluation.tasks import TaskInputs
from hf_attnswap.evaluation.tasks.needle import needles
from hf_attnswap.evaluation.tasks.recall import recalls
from hf_attnswap.evaluation.tasks.writing import WritingTask
from hf_attnswap.sources.texts import TextSource, token_stream
from hf_attnswap.tradeoff import Settings, measure

BOS, END = 1, 2


@pytest.fixture(params=["$A", "<s> $A", "<s> $A </s>"])
def letters(request):
    """A tokenizer of letters, which puts nothing, a token before, or one before and one behind every text."""
    vocabulary = {"?": 0, "<s>": BOS, "</s>": END, **{chr(code): code - 25 for code in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=request.param, special_tokens=[("<s>", BOS), ("</s>", END)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", bos_token="<s>", eos_token="</s>")
    return made, [BOS] if "<s>" in request.param else []


def once_first(tokens, start):
    tokens = list(tokens)
    return tokens[: len(start)] == start and BOS not in tokens[len(start) :] and END not in tokens


def test_needles(letters):
    tokenizer, start = letters
    (item,) = needles(tokenizer, [600], [0.5])
    request = item.request
    assert once_first((*request.prompt, *request.target), start)
    assert len(request.prompt) + len(request.target) == 600


def test_pairs(letters):
    tokenizer, start = letters
    request = encode_pair(tokenizer, "The cat ", "sat")
    assert once_first((*request.prompt, *request.target), start)
    assert tokenizer.decode(request.target).replace("  ", "_").replace(" ", "").replace("_", " ") == " sat"
    empty = encode_pair(tokenizer, "", "sat")
    assert empty.prompt == (BOS,) and len(empty.target) == 3


def test_recall_and_starts_of_writing(letters):
    tokenizer, start = letters
    task = recalls(torch.arange(10, 40), 4, 2, texts=3, start=start)
    assert task.length == 2 * 6 + len(start)
    for text, asked in zip(task.tokens.tolist(), task.asked.tolist(), strict=True):
        assert once_first(text, start)
        keys = [i for i, here in enumerate(asked) if here]
        known = dict(zip(text[len(start) : -4 : 2], text[len(start) + 1 : -4 : 2], strict=True))
        assert len(keys) == 2 and all(known[text[i]] == text[i + 1] for i in keys)
    starts = WritingTask(prompts=2, new_tokens=4).starts(tokenizer, TaskInputs(tokens=torch.arange(10, 90).repeat(3)))
    assert starts.shape == (2, 64) and all(once_first(row, start) for row in starts.tolist())


def test_every_command_reads_the_same(tmp_path, attnswap):
    """The perplexity of `evaluate`, of the script for several processes, and of the report is one number."""
    vocabulary = {"?": 0, "<s>": BOS, "</s>": END, **{chr(code): code - 62 for code in range(65, 125)}, " ": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", bos_token="<s>")
    for part in (tiny(), tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The cat sat on the mat and went out into the rain " * 30)
    text = TextSource(str(tmp_path / "text.txt"))
    stream = token_stream(text, tokenizer, 512)
    expected = perplexity(tiny(), stream, 32, 512 // 32, start=[BOS])
    assert expected.tokens == 16 * 31 and expected.mean != pytest.approx(perplexity(tiny(), stream, 32).mean)

    line = ["evaluate", tmp_path / "model", "--validation_file", text.name, "--context_length", 32]
    (row,) = json.loads(attnswap(*line, "--max_eval_tokens", 512, "--json").out)["perplexity"]
    assert row["nll"] == pytest.approx(expected.mean) and row["tokens"] == expected.tokens

    told = ["--model_name_or_path", str(tmp_path / "model"), "--validation_file", text.name, "--context_length", "32"]
    main([*told, "--max_eval_tokens", "512", "--output_file", str(tmp_path / "found.json")])
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["nll"] == pytest.approx(expected.mean) and row["tokens"] == expected.tokens

    given = Settings(
        arms=("softmax",), context_lengths=(32,), max_eval_tokens=512, lengths=(8,), rounds=1, decode_tokens=1,
        align_tokens=0, block_size=32,
    )  # fmt: skip
    found = measure(tiny(), tokenizer, text, text, given, tmp_path / "out", model_name="tiny", command="test")
    (entry,) = found.arms[0].perplexity
    assert entry.nll == pytest.approx(expected.mean) and entry.tokens == expected.tokens
