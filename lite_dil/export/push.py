"""Upload exports to the Hugging Face hub. The login is huggingface_hub's: never an option, never shown or saved here."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from lite_dil.base.errors import UserError, first_line

# The files of an export. Anything else in the folder (optimiser state, a .env, a key) must not be uploaded.
PUBLISHED = (
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "export.json", "Modelfile", "*.gguf"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_model.safetensors", "adapters.safetensors", "adapter_config.json"),
    *("config.json", "generation_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
_LOGIN = "`hf auth login`, or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"


def check(repo: str) -> None:
    """Raise UserError if `repo` is not OWNER/NAME or there is no login, before the work is done."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("its owner is missing")
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: expected OWNER/NAME ({first_line(error)})") from None
    if constants.is_offline_mode():
        raise UserError("--push-to-hub: HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise UserError(f"--push-to-hub {repo}: not logged in to the hub; {_LOGIN}")


def push(folder: Path, repo: str, private: bool, say: Callable[[str], None]) -> str:
    """Upload an exported folder to `repo`, OWNER/NAME, which is created if necessary; return its URL.

    Raises:
        UserError: the folder has a file that no export makes, the login is missing or wrong, or there is no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    check(repo)
    size = sum((folder / name).stat().st_size for name in _files(folder))
    say(f"uploading {folder} ({size / 1e6:,.1f} MB) to {repo}")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)  # None: the owner's default
        if private and not api.model_info(repo).private:
            raise UserError(
                f"--push-to-hub {repo}: it already exists and is public, so nothing was uploaded; leave --private out"
            )
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload by lite-dil", allow_patterns=list(PUBLISHED)
        )
    # huggingface_hub's errors are OSErrors; the last two come from hf_xet and from malformed HTTP responses.
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        _explain(error, folder, repo)
    return str(url)


def _files(folder: Path) -> list[str]:
    """Return the names of the folder's files, or raise UserError if one is not an export's."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    strange = [
        name
        for name, path in zip(names, paths, strict=True)
        if path.is_symlink()
        or not any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUBLISHED)
    ]
    if strange:
        raise UserError(
            f"--push-to-hub: {folder} has files that are not an export's, so nothing was uploaded: {', '.join(strange[:5])}; "
            "move them away"
        )
    if not names:
        raise UserError(f"--push-to-hub: {folder} holds no files")
    return names


def _explain(error: Exception, folder: Path, repo: str) -> NoReturn:
    """Raise UserError with what went wrong and the fix."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, "response"):  # the error of one file wraps the server's
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status == 401:
        what = f"the hub does not accept this login; {_LOGIN}"
    elif status in (403, 404):
        what = f"this login may not write there; give another OWNER, or {_LOGIN}"
    elif status is not None:
        what = f"the hub refused it ({getattr(cause, 'server_message', None) or first_line(error)})"
    else:
        what = f"the upload failed ({first_line(error)}); check the connection. Uploading again continues it"
    raise UserError(f"--push-to-hub {repo}: {what}. {folder} is kept; `hf upload {repo} {folder}` uploads it too") from None
