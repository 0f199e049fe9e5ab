"""The Hugging Face hub: models are fetched from it by name, and folders uploaded. Only safetensors are read."""

from pathlib import Path
from typing import Any

from huggingface_hub import constants  # all else where it is used: it takes 0.1 s, and trainings rarely need it

from naign.errors import InputError, Unavailable, one_line, require

WEIGHTS = "model.safetensors"
PREFIX = "hf://"  # of the names of models on the hub
LOGIN = "(`hf auth login`, or HF_TOKEN)"


def download(name: str, **options: Any) -> Path:
    """The weights of user/model on the hub or in its cache; `options` are hf_hub_download's. Raises InputError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    check_name(name)
    _has_token(options.get("token"))
    try:
        return Path(hf_hub_download(name, WEIGHTS, **options))
    except RepositoryNotFoundError:
        reason = f"there is none of this name, or it is shown only after a login {LOGIN}"
    except LocalEntryNotFoundError as error:
        reason = f"the hub does not answer, nor is a copy in the cache: {one_line(error.__cause__ or error)}"
    except EntryNotFoundError:
        reason = f"it has no {WEIGHTS}, which is all that is read: pickles (.bin, .pt) never are"
    except Exception as error:  # the HTTP library's, the file system's, or an answer in another form than expected
        reason = f"{type(error).__name__}: {one_line(error)}"
    raise InputError(f"no model at {PREFIX}{name} ({constants.ENDPOINT}): {reason}")


def check_name(name: str) -> None:
    """InputError unless `name` can name a repository of a user on the hub."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise InputError(f"'{name}' is no name on the hub: {one_line(error)}") from None
    require(("/" in name, f"'{name}' is no name on the hub: write user/{name}"))


def check_login(name: str) -> None:
    """InputError unless `name` can name a repository and there is a token: HF_TOKEN or that of a login."""
    check_name(name)
    require((_has_token(None), f"uploading {name} needs a login to the hub {LOGIN}"))


def _has_token(token: str | bool | None) -> bool:
    """Whether there is a token. InputError where a message of the HTTP library could show it, or a password."""
    from huggingface_hub import get_token

    secret = token if isinstance(token, str) else get_token() or ""
    plain = secret.isascii() and secret.isprintable()
    require(
        (plain, f"the token for the hub has characters that no token has: renew the login {LOGIN}"),
        ("@" not in constants.ENDPOINT, "HF_ENDPOINT holds a user or a password: give a token as HF_TOKEN instead"),
    )
    return bool(secret)


def without_places(value: Any) -> Any:
    """A model's header without places: of a path its last part is left, of a URL nothing; names of classes stay."""
    if isinstance(value, dict):
        return {key: part if key == "labels" else without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    if isinstance(value, str) and "/" in value:
        return "" if "://" in value else value.rstrip("/").rpartition("/")[2]
    return value


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload all files of a folder to a repository of the hub, which is made if there is none; returns its address.

    No file is sent to a public one that should be private. Raises InputError without a login or where the hub refuses,
    Unavailable where a retry may help. No message holds the token.
    """
    from huggingface_hub import HfApi

    check_login(name)
    try:
        api = HfApi()
        address = api.create_repo(name, private=private or None, exist_ok=True)
        hidden = not private or api.model_info(name).private
        require((hidden, f"{name} is there and is public: make it private on the hub first, or leave out --private"))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a NAIGN model")
    except InputError:
        raise
    except Exception as error:  # as of a download
        status = getattr(getattr(error, "response", None), "status_code", 0)
        text = f"{name} was not uploaded to the hub ({constants.ENDPOINT}): {type(error).__name__}: {one_line(error)}"
        remedy = f"; may the login {LOGIN} write there?" if status in (401, 403) else ""
        refused = 400 <= status < 500 or isinstance(error, ValueError)
        raise (InputError if refused else Unavailable)(text + remedy) from None
    return str(address)
