"""Files to a repository of the Hugging Face Hub: private unless it is said otherwise, in one commit, the token in no message."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from guardtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_TOKEN = "HF_TOKEN"
UNAUTHORISED, FORBIDDEN = 401, 403
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
Answer = TypeVar("Answer")
Contents = Path | bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """What goes where.

    files: from the name in the repository to a file on disk, or to what stands in it. outdated: patterns of files that are
    deleted there where this push has none of that name. message: of the commit. endpoint: the Hub's address.
    """

    kind: Literal["dataset", "model"]
    repository: str
    is_public: bool
    files: Mapping[str, Contents]
    outdated: tuple[str, ...]
    message: str
    endpoint: str

    @property
    def address(self) -> str:
        """Where people will find it."""
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"

    @property
    def visibility(self) -> str:
        """In a word."""
        return "public" if self.is_public else "private"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in self.files.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        named = {"repository": self.repository, "visibility": self.visibility, "endpoint": self.endpoint}
        return {**named, "files": self.sizes}

    def said(self) -> str:
        """For people."""
        lines = [f"{self.address} ({self.visibility})"]
        return "\n".join([*lines, *(f"  {name}  {size:,} bytes" for name, size in self.sizes.items())])


def hub_endpoint() -> str:
    """The Hub's address, $HF_ENDPOINT where it is set."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def check_repository(repository: str) -> None:
    """Raise ConfigError unless it is written as OWNER/NAME."""
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError("not a repository", expected="OWNER/NAME", found=repository)


def read_token(variable: str) -> str:
    """The token in an environment variable, or that of `hf auth login` where the usual one is not set. Raises ConfigError."""
    from huggingface_hub import get_token

    token = os.environ.get(variable) or (get_token() if variable == DEFAULT_TOKEN else None)
    if not token:
        raise ConfigError("no token", where=f"--token-env {variable}", expected="a token of the Hub that may write, in it")
    return token


def push(planned: Push, token: str) -> str:
    """Upload in one commit, and return its address. The token stands in no message.

    Raises ConfigError where the repository's visibility is not the one that was asked for, DataError where the Hub says no.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=planned.endpoint, token=token)
    _ready(api, planned, token)
    commit = _asked(lambda: _commit(api, planned), planned, token)
    return str(commit.commit_url)


def card_header(card: str, where: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; empty where there is none. Raises ConfigError."""
    if not card.startswith("---\n"):
        return {}
    try:
        header = yaml.safe_load(card[4:].partition("\n---")[0])
    except yaml.YAMLError as error:
        raise ConfigError("a broken header", where=where, expected="YAML", found=" ".join(str(error).split())) from error
    return header if isinstance(header, dict) else {}


def _commit(api: HfApi, planned: Push) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(planned.repository, repo_type=planned.kind)
    gone = [
        name
        for name in there
        if name not in planned.files and any(fnmatch.fnmatchcase(name, pattern) for pattern in planned.outdated)
    ]
    return api.create_commit(
        planned.repository,
        [
            *(CommitOperationDelete(path_in_repo=name) for name in gone),
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=each) for name, each in planned.files.items()),
        ],
        repo_type=planned.kind,
        commit_message=planned.message,
    )


def _ready(api: HfApi, planned: Push, token: str) -> None:
    """Make the repository where there is none; in either case nothing is uploaded before its visibility is known."""
    is_private = _is_private(api, planned, token)
    if is_private is None:
        _asked(lambda: api.create_repo(planned.repository, repo_type=planned.kind, private=not planned.is_public), planned, token)
        is_private = _is_private(api, planned, token)
    if is_private is not True and not planned.is_public:
        hint = "--public where everyone may read it, else another name"
        raise ConfigError("the repository is public", where=planned.repository, expected="a private one", hint=hint)
    if is_private and planned.is_public:
        hint = "change it in its settings on the Hub, or leave out --public"
        raise ConfigError("the repository is private", where=planned.repository, expected="a public one", hint=hint)


def _is_private(api: HfApi, planned: Push, token: str) -> bool | None:
    """None where there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    def ask() -> bool | None:
        try:
            return api.repo_info(planned.repository, repo_type=planned.kind).private
        except RepositoryNotFoundError as error:
            if error.response.status_code == UNAUTHORISED:  # of a token that is valid the Hub says 404
                raise
            return None

    return _asked(ask, planned, token)


def _asked(question: Callable[[], Answer], planned: Push, token: str) -> Answer:
    """The Hub's answer; DataError in one line for whatever went wrong."""
    try:
        return question()
    except Exception as error:  # the client raises many kinds, those of its HTTP and upload libraries too
        status = getattr(getattr(error, "response", None), "status_code", None)
        what = "the token was refused" if status in (UNAUTHORISED, FORBIDDEN) else "not pushed"
        found = " ".join(f"{type(error).__name__}: {error}".replace(token, "***").split())[:300]
        raise DataError(what, where=f"{planned.endpoint}, {planned.repository}", found=found) from error
