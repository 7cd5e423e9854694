"""Push a conversion to the Hub: weights, config, tokenizer, report and card, in one commit that can be repeated."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from transformers import PreTrainedModel

from ..config import NAME
from ..errors import UsageError
from ..integration.swapping import swapped_modules
from ..report import read as read_report
from ..sources.conversions import find, model_folder
from ..sources.models import require_weights
from . import benchmarks, card
from .contents import files_of, left_out, require_finite
from .origin import find_origin, read_config, require_repo_id

log = logging.getLogger(__name__)


def prepare(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    tags: list[str] | None = None,
    token: str | None = None,
) -> list[CommitOperationAdd]:
    """Return what a push of `folder` would upload: the files of the conversion, and a card where no README.md is there.

    Nothing else that lies in the folder goes; `not_sent` says what.

    Args:
        folder: what `save_pretrained` or a training recipe left. The card is written from a report.json beside the
            weights, if there is one.
        repo_id: where the conversion will stand.
        base_model: Hub id of the model that was converted, where config.json does not say it; "none" leaves it out.
        licence: where the card of `base_model` on the Hub does not say it.
        tags: more tags of a new card. token: of the Hub.

    Raises:
        UsageError: a folder that does not hold a whole conversion with finite weights, a link in place of a file, code
            that a push does not send, or a card that cannot be written.
    """
    require_repo_id(repo_id)
    folder = find(folder).folder
    config = read_config(folder)
    card.swapped_groups(config)  # says that nothing is
    files = files_of(folder)
    for path in files:
        if path.suffix == ".safetensors":
            require_finite(path)
    require_weights(folder)
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    if not (folder / "README.md").is_file():
        report = read_report(folder / "report.json") if (folder / "report.json").is_file() else None
        try:
            base_model, licence = find_origin(config, base_model, licence, token)
        except UsageError as error:
            also = "" if token or get_token() else "; a Hub token is missing too: run `hf auth login`, or set HF_TOKEN"
            raise UsageError(f"{error}{also}") from None
        text = card.render(config, repo_id, report=report, base_model=base_model, licence=licence, tags=tags or ())
        operations.append(CommitOperationAdd("README.md", text.encode()))
        if report is not None:
            measured = benchmarks.files(report, card.measured_arm(report, card.swapped_groups(config)))
            sent = {operation.path_in_repo for operation in operations}
            operations += [CommitOperationAdd(path, data) for path, data in measured.items() if path not in sent]
    return operations


def not_sent(folder: str | Path, operations: list[CommitOperationAdd]) -> list[str]:
    """Return the names of what lies in the folder of a conversion and is not among what `prepare` returned."""
    return left_out(model_folder(folder), [operation.path_in_repo for operation in operations])


def push(
    operations: list[CommitOperationAdd],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload files in one commit, to a repository that is made where there is none; return the commit's address.

    With `create_pr` the address is that of the pull request. After an interruption the same call continues: files that
    the Hub has by then are not sent again.

    Args:
        operations: what `prepare` returned.
        private: whether a new repository is. revision: a branch, made where there is none.
        commit_message, commit_description: of the commit.
        token: of the Hub; by default the one that is saved on this machine or set in the environment.

    Raises:
        UsageError: no token, no right to write, or a repository that holds something else.
        ConnectionError: the Hub cannot be reached.
    """
    if (token or get_token()) is None:
        raise UsageError("there is no Hub token: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with _one_line(repo_id):
        try:
            api.create_repo(repo_id, private=private)
        except HfHubHTTPError as error:
            if error.response.status_code != 409 and not create_pr:
                raise
            _require_conversion(api, repo_id)
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload conversion by hf_attnswap",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return done.pr_url or done.commit_url


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """Turn an error of the Hub or the network inside the context into one line that says what to do."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, HTTPError, RuntimeError) as error:
        reason: BaseException = error
        while isinstance(reason, RuntimeError) and reason.__cause__:  # "Error while uploading ..."
            reason = reason.__cause__
        raise _explained(reason, repo_id) from error


def _explained(error: BaseException, repo_id: str) -> Exception:
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    if not isinstance(error, HfHubHTTPError):
        return ConnectionError(
            f"the Hub at {constants.ENDPOINT} cannot be reached ({first_line}): run the same command again to continue"
        )
    status, said = error.response.status_code, error.server_message or first_line
    if status == 401:
        return UsageError(f"the Hub does not know this token ({said}): run `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return UsageError(f"this token may not write to {repo_id} ({said}): use one that may, or --create_pr")
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(f"{repo_id} does not exist, or this token may not see it")
    return ConnectionError(f"the Hub refused {repo_id}: {status}: {said}")


def _require_conversion(api: HfApi, repo_id: str) -> None:
    """Raise UsageError where a repository that exists holds another kind of model."""
    try:
        path = api.hf_hub_download(repo_id, "config.json", force_download=True)
    except EntryNotFoundError:
        files = [name for name in api.list_repo_files(repo_id) if name not in (".gitattributes", "README.md")]
        taken = bool(files)
    else:
        taken = NAME not in json.loads(Path(path).read_text(encoding="utf-8"))
    if taken:
        raise UsageError(f"{repo_id} is taken: it exists and is no conversion by hf_attnswap; choose another name")


def with_card(original):
    """Wrap `PreTrainedModel.push_to_hub`: a swapped model goes through `push_model`, with this package's card."""

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "50GB", **kwargs: Any) -> str:
        if not swapped_modules(self):
            return original(self, repo_id, max_shard_size=max_shard_size, **kwargs)
        return push_model(self, repo_id, max_shard_size=max_shard_size, **kwargs)

    push_to_hub.__doc__ = f"{original.__doc__}\n\nOf a swapped model: see `hf_attnswap.publish.push.push_model`."
    return push_to_hub


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    tokenizer: Any = None,
    report: str | Path | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    tags: list[str] | None = None,
    token: str | None = None,
    **to: Any,
) -> str:
    """Save a swapped model, and its tokenizer and report.json where they are given, and push all; return the address.

    Args:
        max_shard_size: as in `save_pretrained`. tokenizer: to save beside the model.
        report: path of a report.json that measured the model.
        base_model, licence, tags, token: as in `prepare`.
        to: `private`, `revision`, `create_pr`, `commit_message`, `commit_description`, as in `push`.

    Raises:
        UsageError, ConnectionError: as `prepare` and `push`.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if report is not None:
            shutil.copyfile(report, Path(folder, "report.json"))
        operations = prepare(folder, repo_id, base_model=base_model, licence=licence, tags=tags, token=token)
        if left := not_sent(folder, operations):
            log.warning("left out of %s, as no part of a conversion: %s", repo_id, ", ".join(left))
        return push(operations, repo_id, token=token, **to)
