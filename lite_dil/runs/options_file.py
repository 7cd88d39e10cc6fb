"""A run's config.yaml: its options, with a digest that tells whether they are what the run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lite_dil.base import checked
from lite_dil.base.errors import UserError
from lite_dil.base.formats import KEY, RUN, check_format

OPTIONS_FILE = "config.yaml"


class Edited(UserError):
    """The file is readable, but not what the run wrote."""


def text_of(options: Mapping[str, Any]) -> str:
    """Return the content of a run's config.yaml."""
    import yaml

    saved = {KEY: RUN, checked.DIGEST: checked.digest_of(options), **options}
    return yaml.safe_dump(saved, sort_keys=False, allow_unicode=True)


def read_options(folder: Path) -> dict[str, Any]:
    """Read the options of the run in `folder` as they stand in its config.yaml, with its format.

    Raises UserError if it is missing or cannot be read, and Edited if somebody or something changed it.
    """
    import yaml

    from lite_dil.base.yaml_file import read_yaml_file

    path = folder / OPTIONS_FILE
    try:
        content = read_yaml_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError:
        raise UserError(f"{path} is not valid YAML") from None
    if not isinstance(content, dict) or not isinstance(content.get("loss"), str):
        raise UserError(f"{path} does not hold a run's options")
    check_format(content, RUN, folder)
    try:
        return {KEY: content.pop(KEY, 1), **checked.without_digest(content)}
    except (ValueError, TypeError):  # YAML knows dates, which JSON does not
        raise Edited(f"{path} is not what the run wrote") from None
