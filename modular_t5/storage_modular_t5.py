"""A bank's files: saving so that a failure leaves what was there before, reading tensors, recognising a teacher by its weights."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def staged_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A fresh folder to write into, whose files move into `directory` when the block ends without an error.

    After an error, in the block or while files move, `directory` is as it was. Files of `directory` that the block does not write
    stay, but for the weights of an earlier save, which new ones replace. A process that is killed leaves a `.saving-*` folder, and
    may leave a mixture if it was moving files.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; give a folder to save into")
    created = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the folder, for what is beside it may be read-only or on another disk, where moving is not renaming.
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    new, old = staging / "new", staging / "old"
    new.mkdir()
    old.mkdir()
    done = False
    try:
        yield new
        _swap(directory, new, old)
        done = True
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not done:
            for folder in created:
                try:
                    folder.rmdir()
                except OSError:  # not empty: somebody else saved there meanwhile
                    break


def _swap(directory: Path, new: Path, old: Path) -> None:
    """Move the files of `new` into `directory` and those they replace into `old`, or, after an error, nothing."""
    written = sorted(path.name for path in new.iterdir())
    has_weights = any(_WEIGHTS.fullmatch(name) for name in written)
    replaced = [path.name for path in directory.iterdir() if path.name in written or (has_weights and _WEIGHTS.fullmatch(path.name))]
    moved: list[tuple[Path, Path]] = []
    try:
        for name, source, target in [*((name, directory, old) for name in replaced), *((name, new, directory) for name in written)]:
            os.replace(source / name, target / name)
            moved.append((source / name, target / name))
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise


def read_tensors(directory_or_repo: str | os.PathLike, **hub_arguments: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors checkpoint, sharded or not, of a folder or of the Hub, on the CPU.

    Raises:
        ValueError: a file is torn.
        OSError: a file is missing.
    """
    index = cached_file(directory_or_repo, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    names = [SAFE_WEIGHTS_NAME] if index is None else sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(cached_file(directory_or_repo, name, **hub_arguments))
        except SafetensorError as error:
            raise ValueError(f"{name} in {directory_or_repo} is torn ({error}); download or save it again") from error
    return tensors


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()
