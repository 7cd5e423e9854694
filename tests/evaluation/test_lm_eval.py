"""Our numbers beside those of lm-eval on the same items, of softmax and of swapped models, in batches and alone."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.evaluation.choices import read_items
from hf_attnswap.evaluation.perplexity import count_units, perplexity, sliding_perplexity
from hf_attnswap.evaluation.tasks import TaskInputs, run_tasks
from hf_attnswap.sources.models import load

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install hf_attnswap[eval])")

SHARED = Path(__file__).parents[3] / "shared" / "data"
ITEMS = 24
FILES = {
    "hellaswag": "zero_shot/hellaswag_val.jsonl",
    "arc": "zero_shot/arc_easy.jsonl",
    "lambada": "zero_shot/lambada_openai.jsonl",
    "blimp": "blimp/anaphor_number_agreement.jsonl",
}
STORIES = [
    "Once upon a time there was a little girl named Lily. She loved to play in the park with her dog.",
    "  Tom had a red ball.\n\nHe was sad because the ball was lost. ",
]
YAML = {  # as lm-eval's own files for these tasks have them
    "hellaswag": ("multiple_choice", '"{{ctx}}"', '"{{label}}"', '"{{endings}}"', "acc acc_norm"),
    "arc": ("multiple_choice", '"{{query}}"', '"{{gold}}"', '"{{choices}}"', "acc acc_norm"),
    "blimp": ("multiple_choice", '""', "0", '"{{[sentence_good, sentence_bad]}}"', "acc acc_norm"),
    "lambada": ("loglikelihood", '"{{context}}"', "\"{{' '+continuation}}\"", None, "perplexity acc"),
    "stories": ("loglikelihood_rolling", '""', '"{{text}}"', None, "word_perplexity byte_perplexity bits_per_byte"),
    "cola": ("multiple_choice", '"{{ctx}}"', '"{{label % 2}}"', '["no", "yes"]', "acc mcc f1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stories260k):
    """The items, short enough for the model, and a task of lm-eval for each of their files."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not there")
    folder = tmp_path_factory.mktemp("tasks")
    for name, file in FILES.items():
        lines = (SHARED / file).read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join([line for line in lines if len(line) < 700][:ITEMS]))
    (folder / "stories.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in STORIES))
    for name, (kind, text, target, choices, metrics) in YAML.items():
        file = folder / f"{'hellaswag' if name == 'cola' else name}.jsonl"
        lines = [
            f"task: their_{name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {file}}}}}",
            "test_split: test", f"output_type: {kind}", f"doc_to_text: {text}", f"doc_to_target: {target}",
            f"metric_list: [{', '.join(f'{{metric: {metric}}}' for metric in metrics.split())}]",
        ]  # fmt: skip
        (folder / f"{name}.yaml").write_text("\n".join(lines + [f"doc_to_choice: {choices}"] * bool(choices)))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def swapped(folder, attention):
    model, tokenizer = load(folder)
    return (hf_attnswap.swap(model, attention) if attention else model), tokenizer


@pytest.mark.parametrize("attention", (None, "relu_norm", "hedgehog+window"))
def test_numbers_are_those_of_lm_eval(stories260k, folder, attention):
    model, tokenizer = swapped(stories260k, attention)
    names = [f"their_{name}" for name in YAML]
    found = {
        size: {(r.task, r.metric): r for r in run_tasks(
            model, tokenizer, [str(folder / f"{name}.jsonl") for name in FILES] + (names if size == 8 else []),
            TaskInputs(batch_size=size), include_path=str(folder),
        )}
        for size in (1, 8)
    }  # fmt: skip
    ours, theirs = found[1], found[8]
    compared = 0
    for (task, metric), result in ours.items():
        other = theirs[f"their_{task}", metric]
        assert theirs[task, metric].scores == pytest.approx(result.scores, abs=1e-3)  # batches, padded on the left
        assert other.scores == pytest.approx(result.scores, abs=1e-3)
        assert other.value == pytest.approx(result.value, rel=5e-4)
        assert len(result.scores) == ITEMS
        compared += 1
    assert compared == 8 and 0 < ours["hellaswag", "acc"].value < 1 and 0 < ours["blimp", "acc"].value < 1

    # Whole texts: as lm-eval, which puts the first token there, as the tokenizer does.
    streams = [torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids]) for text in STORIES]
    told = [sliding_perplexity(model, ids, len(ids), len(ids) - 1) for ids in streams]
    loss = sum(found.mean * found.tokens for found in told)
    words = sum(len(re.split(r"\s+", text)) for text in STORIES)
    size = sum(len(text.encode()) for text in STORIES)
    assert theirs["their_stories", "word_perplexity"].value == pytest.approx(math.exp(loss / words), rel=5e-4)
    assert theirs["their_stories", "byte_perplexity"].value == pytest.approx(math.exp(loss / size), rel=5e-4)
    assert theirs["their_stories", "bits_per_byte"].value == pytest.approx(loss / size / math.log(2), rel=5e-4)
    row = theirs["their_stories", "word_perplexity"].row(theirs["their_stories", "word_perplexity"])
    assert row["difference"]["value"] == 0 and row["verdict"] is None  # of two items

    # What is no mean of items: labels, said and true.
    from sklearn.metrics import f1_score, matthews_corrcoef

    pairs = theirs["their_cola", "mcc"].scores
    true, said = zip(*pairs, strict=True)
    assert len(set(true)) == 2 and theirs["their_cola", "mcc"].value == pytest.approx(matthews_corrcoef(true, said))
    assert theirs["their_cola", "f1"].value == pytest.approx(f1_score(true, said))


def test_the_task_of_the_examples_is_one(stories260k, folder, monkeypatch):
    """Its file is named from the root of the repository."""
    monkeypatch.chdir(Path(__file__).parents[2])
    model, tokenizer = load(stories260k)
    ours = run_tasks(model, tokenizer, [str(SHARED / FILES["arc"])], TaskInputs(limit=4))
    theirs = run_tasks(model, tokenizer, ["arc_easy_local"], TaskInputs(limit=4), include_path="benchmarks/tasks")
    assert [(r.task, r.metric) for r in theirs] == [("arc_easy_local", "acc"), ("arc_easy_local", "acc_norm")]
    assert [r.scores for r in theirs] == [r.scores for r in ours]


@pytest.mark.parametrize("attention", (None, "hedgehog+window"))
def test_log_likelihoods_are_those_of_lm_eval(stories260k, folder, attention):
    """Item by item, not only where the best choice is the same."""
    from lm_eval.models.huggingface import HFLM

    from hf_attnswap.evaluation.likelihood import encode_pair, log_likelihoods

    model, tokenizer = swapped(stories260k, attention)
    pairs = [(item.prompt, f" {choice}") for name in ("arc", "blimp")
             for item in read_items(folder / f"{name}.jsonl", 6) for choice in item.choices]  # fmt: skip
    pairs += [("The cat ", "sat"), ("Two\n", " lines"), ("", "Once upon"), ("Once  ", "upon")]
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    theirs = wrapped.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
    ours = log_likelihoods(model, [encode_pair(tokenizer, *pair) for pair in pairs])
    assert [x.value for x in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [x.greedy for x in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("attention", (None, "relu_norm"))
def test_rolling_windows_are_ours_with_the_longest_stride(stories260k, attention):
    """A text of two full windows: the second stands on one token of the first."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = swapped(stories260k, attention)
    window = 64
    story = STORIES[0] + " She was very happy. They played all day, and then they went home to eat."
    text = next(t for n in range(len(story) * 4) if len(ids_of(tokenizer, t := (story * 4)[:n])) == 2 * window)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False, max_length=window)
    (theirs,) = wrapped.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    ids = torch.tensor([tokenizer.bos_token_id, *ids_of(tokenizer, text)])
    found = sliding_perplexity(model, ids, window + 1, window)
    assert found.tokens == 2 * window and -found.mean * found.tokens == pytest.approx(theirs, abs=1e-3)
    units = count_units(tokenizer, ids, window + 1, 2, window)
    assert units.words == len(text.split())
    assert units.bytes == len(text.encode()) + 1  # the space that this tokenizer writes before a text
    assert found.per(units.words) == pytest.approx(math.exp(-theirs / len(text.split())), rel=5e-4)
    assert found.per(units.bytes - 1) == pytest.approx(math.exp(-theirs / len(text.encode())), rel=5e-4)
    one = perplexity(model, ids[: window + 1], window + 1)
    assert one.nll[0] == pytest.approx(found.nll[0], rel=1e-5)


@pytest.mark.parametrize("attention", (None, "relu_norm", "hedgehog+window"))
def test_what_is_generated_is_the_same_alone_and_in_a_batch(stories260k, attention):
    """There lm-eval pads on the left."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = swapped(stories260k, attention)
    told = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
    starts = ["Once upon a time", "Lily and Tom went to the park to play with", "The dog", "She said that she was very"]
    requests = [SimpleNamespace(args=(start, dict(told))) for start in starts]
    alone, batched = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size).generate_until(requests, disable_tqdm=True)
        for size in (1, 4)
    )
    assert alone == batched and all(alone)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


ENDLESS = {
    "pick": ("multiple_choice", '"{{ctx}}"', '"{{label}}"', '["a cat", "no"]', "acc"),
    "pair": ("multiple_choice", '""', "0", '["a cat", "no"]', "acc"),
    "write": ("generate_until", '"{{ctx}}"', '"cat"', None, "exact_match"),
}


@pytest.mark.parametrize("attention", (None, "elu"))
def test_a_model_without_a_token_that_ends_a_text(tmp_path, attention):
    """Nor one that starts or pads a text: lm-eval would add one that the model does not know."""
    vocabulary = {chr(code): code - 32 for code in range(32, 96 + 32)} | {"\n": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model = hf_attnswap.swap(model, attention) if attention else model
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"ctx": "x" * n, "label": n % 2}) + "\n" for n in (3, 9)))
    for name, (kind, text, target, choices, metric) in ENDLESS.items():
        lines = [
            f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}",
            "test_split: test", f"output_type: {kind}", f"doc_to_text: {text}", f"doc_to_target: {target}",
            f"metric_list: [{{metric: {metric}}}]", *([f"doc_to_choice: {choices}"] if choices else []),
            *(["generation_kwargs: {max_gen_toks: 4, until: []}"] if kind == "generate_until" else []),
        ]  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines))
    found = run_tasks(model, tokenizer, list(ENDLESS), TaskInputs(), include_path=str(tmp_path))
    assert [(r.task, len(r.scores)) for r in found] == [(name, 2) for name in ENDLESS]
    assert tokenizer.pad_token is None and len(tokenizer) == 97  # it stays as it was


def test_an_unknown_task_is_refused(stories260k):
    with pytest.raises(
        UsageError,
        match="Unknown task 'no_such_task'. Available: .*needle, recall, writing, .* lm-eval has no task",
    ):
        run_tasks(*load(stories260k), ["no_such_task"], TaskInputs())
