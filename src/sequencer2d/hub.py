"""Files of the Hugging Face hub, from its cache where they are there; what to do where they are not."""

from pathlib import Path

from sequencer2d.errors import first_line

PREFIX = "hf-hub:"
"""Begins the name of a model on the hub, as in timm: `hf-hub:user/name`."""


class NotInRepository(FileNotFoundError):
    """The repository is there and has no such file."""


def download(repo_id: str, filename: str, *, instead: str) -> Path:
    """Path of a file of a hub repository in the local cache, downloaded if need be.

    The hub's environment variables hold: `HF_HOME` (cache), `HF_HUB_OFFLINE=1` (cache only), `HF_TOKEN`, `HF_ENDPOINT`.

    Args:
        repo_id: `user/name`.
        filename: In that repository.
        instead: What the caller can be given to do without the hub; the error says so.

    Raises:
        NotInRepository: The repository has no such file.
        FileNotFoundError: There is no such repository, or there is no network and the file is not in the cache.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import HFValidationError

    try:
        return Path(hf_hub_download(repo_id, filename))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id!r} is no name of a repository, such as user/name") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the hub has no repository {repo_id}, or it is private (set HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise FileNotFoundError(
            f"{repo_id}/{filename} is not in the cache and {why}; "
            f"download it where there is a network and give {instead}"
        ) from error
    except EntryNotFoundError as error:
        raise NotInRepository(f"{repo_id} has no {filename} on the hub") from error
    except Exception as error:  # of the hub's HTTP library, which is another in each of its versions
        raise FileNotFoundError(
            f"{repo_id}/{filename} could not be downloaded: {first_line(error)}; try again, or give {instead}"
        ) from error


def upload(folder: Path, repo_id: str, *, private: bool) -> str:
    """Puts the files of a folder into a hub repository, which is made if need be; returns its address.

    Raises:
        OSError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="sequencer2d push_to_hub")
    except Exception as error:  # as above
        raise OSError(
            f"{repo_id} could not be uploaded: {first_line(error)}; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    return str(address)
