"""Data sets and models on the Hugging Face hub, and what to do where it does not give them."""

import logging
import os
import re
import ssl
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from bdh_lib.errors import UserError, warn

NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?:@([\w./-]+))?(?:#(.+))?")
ALTERNATIVES = (
    "Ways on: --dataset FILE for a local file, --dataset sample for the embedded one, "
    "`hf auth login` for a private or gated data set"
)
TIMEOUT = 10  # seconds that the hub may take to answer at all; a hanging one would cost 400 s


class Unreached:
    """The first network error of this process, kept for later messages.

    HF_HUB_OFFLINE is set with it: from then on the library does not ask, and its own errors do not
    know the reason.
    """

    reason = ""


def parse_name(dataset: str) -> tuple[str, str | None, str | None, str | None]:
    """Return the name, config, revision and split of a name on the hub. Raises UserError."""
    if match := NAME.fullmatch(dataset):
        return match.groups()
    raise _no_name(dataset)


def _no_name(dataset: str) -> UserError:
    return UserError(
        f"DATASET {dataset!r} is neither a file nor a hub name, which looks like user/name, "
        f"user/name:config, user/name@revision or user/name#split. {ALTERNATIVES}"
    )


def commit(dataset: str) -> str | None:
    """Return the commit that a name on the hub means now, or None if the hub does not say."""
    name, _, revision, _ = parse_name(dataset)
    is_commit = re.fullmatch("[0-9a-f]{40}", revision or "")
    return revision if is_commit else _ask(name, revision)


@lru_cache  # a run reads one commit, and a hub that hangs is asked once
def _ask(name: str, revision: str | None) -> str | None:
    """Return the commit of a revision, None if the hub does not say.

    A hub that does not answer is not asked again by this process.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT).sha
    except (HfHubHTTPError, ValueError):  # it answers: `load_dataset` says what is wrong
        return None
    except Exception as error:  # several libraries have errors of their own
        constants.HF_HUB_OFFLINE |= not _is_local(error)
        Unreached.reason = " ".join(str(error).split())
        return None


def _is_local(error: Exception) -> bool:
    """Tell whether an error is of this machine's files, and not of the network."""
    network = (ConnectionError, TimeoutError, ssl.SSLError)
    return isinstance(error, OSError) and bool(error.strerror) and not isinstance(error, network)


def load(dataset: str) -> dict:
    """Return the splits of a data set by name: the one that its name asks for, else all.

    Raises UserError with the way on.
    """
    name, config, revision, split = parse_name(dataset)
    sha = _ask(name, revision) or revision
    import datasets
    from huggingface_hub import constants

    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    if constants.HF_HUB_OFFLINE and not os.environ.get("HF_HUB_OFFLINE"):
        warn("the hub is out of reach; looking in the cache of earlier downloads")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries are one error
    try:
        loaded = datasets.load_dataset(name, config, revision=sha, split=split)
    except Exception as error:  # several libraries have errors of their own
        raise _user_error(dataset, error) from None
    return {split: loaded} if split else dict(loaded)


def is_model(name: str) -> bool:
    """Tell whether a name means a model on the hub, hf:USER/NAME or hf:USER/NAME@REVISION."""
    return name.startswith("hf:")


def download_model(name: str) -> Path:
    """Return the folder with the weights of a model on the hub, from the cache if that has them.

    It takes safetensors alone: other files of weights can run code when they are opened. Raises
    UserError with the way on.
    """
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.removeprefix("hf:").partition("@")
    files = ["model.safetensors", "config.json"]
    reason = "has no model.safetensors"
    print(f"looking up {name}", file=sys.stderr)
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=files, etag_timeout=TIMEOUT
        )
        if Path(folder, "model.safetensors").is_file():
            return Path(folder)
    except errors.GatedRepoError:
        reason = "is gated: ask for access on its page, then `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision}"
    except errors.RepositoryNotFoundError:
        reason = "is not on the hub, or private there: `hf auth login`"
    except errors.HFValidationError:
        reason = "is not a name of a model, which looks like hf:user/name or hf:user/name@revision"
    except Exception as error:  # several libraries have errors of their own
        if _is_local(error):
            reason = _not_stored(error)
        else:
            text = " ".join(str(error).split())
            reason = f"is not in the cache, and the hub is out of reach ({_unreached(text)})"
    raise UserError(f"{name} {reason}")


def rows(dataset: str, split: Iterable[dict]) -> Iterator[dict]:
    """Yield the records of a split. Raises UserError if one cannot be decoded."""
    try:
        yield from split
    except Exception as error:
        raise _user_error(dataset, error) from None


def _user_error(dataset: str, error: Exception) -> Exception:
    """Return an error of one line, with the way on, for an error of the hub's libraries."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError

    name = parse_name(dataset)[0]
    reason = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, HFValidationError):  # the hub allows fewer names than NAME
        return _no_name(dataset)
    if isinstance(error, DatasetNotFoundError):
        unknown = "is not a file or folder here, and not on the hub, or private there"
        what = "is gated: ask for access on its page" if "gated" in reason else unknown
    elif isinstance(error, DataFilesNotFoundError):
        what = "on the hub holds no data file of a known kind"
    elif _is_local(error):
        return UserError(f"DATASET {name} {_not_stored(error)}")
    elif isinstance(error, OSError):
        what = f"is not a file or folder here, and the hub is out of reach ({_unreached(reason)})"
    else:
        what = _explain(name, reason)
    return UserError(f"DATASET {name} {what}. {ALTERNATIVES}")


def _not_stored(error: OSError) -> str:
    """Return why what the hub sends could not be written."""
    file = error.filename or "what the hub sends"
    return f"needs a folder to write in: {file} cannot be written: {error.strerror}; set HF_HOME"


def _unreached(reason: str) -> str:
    """Return why the hub is out of reach: the reason that the first request found."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    reason = (Unreached.reason if offline else reason).split(" An error happened")[0][:200]
    if "certificate" in reason.lower():
        reason += "; a network with a certificate of its own needs SSL_CERT_FILE"
    return reason + ("; it is not in the cache either" if offline else "")


def _explain(name: str, reason: str) -> str:
    """Return what the library refuses, with the way on where it is known."""
    if match := re.search(r"Config name is missing.*?available configs: \[(.*?)\]", reason):
        configs = re.findall(r"'([^']+)'", match[1])
        shown = ", ".join(configs[:10]) + (", ..." if configs[10:] else "")
        return f"has several configurations, {shown}: name one, as in {name}:{configs[0]}"
    if "scripts are no longer supported" in reason:
        return (
            "is a script, which is not run here; look for its Parquet files: "
            f"{name}@refs/convert/parquet"
        )
    return f"cannot be read: {reason[:300]}"
