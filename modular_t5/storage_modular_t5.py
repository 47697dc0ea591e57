"""A bank's files: saving so that a failure leaves what was there before, cutting shards, reading tensors, uploading."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files

from .layout_modular_t5 import shard_of


# What `from_pretrained` takes to find files on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Weights of a model, by transformers' names and by ours; the variant, if any, is the first group or the second.
_WEIGHTS = re.compile(
    r"model(?:\.([\w-]+?))?(?:-(?:common|own|(?:encoder|decoder)-(?:original|modules-\d+)))?(?:-\d{5}-of-\d{5})?\.safetensors"
)
_INDEX = re.compile(r"model\.safetensors\.index(?:\.([\w-]+))?\.json")
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")
_DTYPES = {"F64", "F32", "F16", "BF16"}
_ALIGNMENT = 64  # bytes; torch's own


# -- saving ----------------------------------------------------------------------------------------------------------------


@contextmanager
def staged_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `directory` when the block ends without an error.

    Files of `directory` that the block does not write stay, but for the weights of an earlier save, which new ones replace. After an
    error `directory` is as it was. A process that is killed leaves the old folder or the new one, whole, and a `.saving-*` folder
    beside it or in it. Only where folders cannot be exchanged (other systems than Linux, a folder that has folders in it, is a mount
    point, belongs to another user or is what the process works in) do files move one by one, and a kill in that moment leaves a mixture.

    Raises:
        NotADirectoryError: `directory` is a file.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; give a folder to save into")
    created = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    staging = _staging_beside(directory)
    beside = staging is not None
    if staging is None:
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    new, old = staging / "new", staging / "old"
    new.mkdir()
    old.mkdir()
    done = False
    try:
        yield new
        if not (beside and _exchanged(directory, new)):
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


def _is_replaced(name: str, written: Iterable[str]) -> bool:
    """Whether a file makes way for files that were written: one of that name, or weights of the same variant."""
    variants = {match[1] for other in written if (match := _WEIGHTS.fullmatch(other))}
    match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return name in written or (match is not None and match[1] in variants)


def _staging_beside(directory: Path) -> Path | None:
    """A fresh folder from which files can be moved into `directory`, beside it; None where there can be none."""
    try:
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory.parent))
    except OSError:  # read-only
        return None
    probe = staging / staging.name
    try:
        probe.touch()
        os.replace(probe, directory / probe.name)  # fails if one of them is mounted from elsewhere
        (directory / probe.name).unlink()
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        return None
    return staging


def _exchanged(directory: Path, new: Path) -> bool:
    """Put `new`, with what stays of `directory`, in its place in one step, if that can be done."""
    written, present, status = {path.name for path in new.iterdir()}, list(directory.iterdir()), directory.stat()
    same_owner = (status.st_uid, status.st_gid) == (new.stat().st_uid, new.stat().st_gid)
    if any(path.is_dir() for path in present) or directory == Path(os.path.realpath(os.curdir)) or not same_owner:
        return False
    shutil.copymode(directory, new)
    kept = {path.name: path.lstat().st_ino for path in present if not _is_replaced(path.name, written)}
    for name in kept:
        try:
            os.link(directory / name, new / name, follow_symlinks=False)
        except OSError:  # no such thing on this disk
            shutil.copy2(directory / name, new / name, follow_symlinks=False)
    if present:
        for name in written:  # on the disk before what they replace is gone
            with (new / name).open("rb") as file:
                os.fsync(file.fileno())
    if not _exchange(directory, new):
        for name in kept:
            (new / name).unlink()
        return False
    replaced = {path.name for path in present} - kept.keys()
    for path in new.iterdir():  # the old folder by now
        if path.name not in replaced and path.lstat().st_ino != kept.get(path.name):  # saved there by somebody else meanwhile
            os.replace(path, directory / path.name)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system than Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _swap(directory: Path, new: Path, old: Path) -> None:
    """Move the files of `new` into `directory` and those they replace into `old`, or, after an error, nothing."""
    written = sorted(path.name for path in new.iterdir())
    replaced = [path.name for path in directory.iterdir() if _is_replaced(path.name, written)]
    moved: list[tuple[Path, Path]] = []
    try:
        for name, source, target in [*((name, directory, old) for name in replaced), *((name, new, directory) for name in written)]:
            os.replace(source / name, target / name)
            moved.append((source / name, target / name))
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise


def write_shards(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, max_shard_size: int | str = "50GB", variant: str | None = None
) -> None:
    """Write tensors of a bank as an ordinary sharded checkpoint, cut where plans differ in what they use (`shard_of`).

    Args:
        max_shard_size: of a file, in bytes or as `"5GB"`; what is larger is cut further.
        variant: part of the files' names, as in `PreTrainedModel.save_pretrained`.
    """
    by_shard: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        by_shard.setdefault(shard_of(name), {})[name] = tensor
    weight_map, size = {}, 0
    for shard in sorted(by_shard):
        pattern = f"model{f'.{variant}' if variant else ''}-{shard}{{suffix}}.safetensors"
        cut = split_torch_state_dict_into_shards(by_shard[shard], filename_pattern=pattern, max_shard_size=max_shard_size)
        weight_map |= cut.tensor_to_filename
        size += cut.metadata["total_size"]
        for file, names in cut.filename_to_tensors.items():
            part = {name: by_shard[shard][name].contiguous() for name in names}
            save_file(part, directory / file, metadata={"format": "pt", "padding": " " * _padding(part)})
    metadata = {"total_parameters": sum(tensor.numel() for tensor in tensors.values()), "total_size": size}
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
    (directory / _index_name(variant)).write_text(index + "\n", encoding="utf-8")
    for file in set(weight_map.values()):  # safetensors makes files that are their owner's alone
        shutil.copymode(directory / _index_name(variant), directory / file)


def _padding(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many bytes of padding in the header make the tensors start at a multiple of 64 bytes of a safetensors file.

    So that read by mapping the file they lie as torch's own do, and CPU kernels round alike on both. Were the guess wrong, readers
    would copy.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "padding": ""}}
    offset = 0
    for name in sorted(tensors):
        end = offset + tensors[name].nbytes
        dtype = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16"}.get(tensors[name].dtype, "BF16")
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    length = 8 + len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return -length % _ALIGNMENT


def _index_name(variant: str | None) -> str:
    return f"{SAFE_WEIGHTS_INDEX_NAME.removesuffix('.json')}.{variant}.json" if variant else SAFE_WEIGHTS_INDEX_NAME


# -- reading ---------------------------------------------------------------------------------------------------------------


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors checkpoint by name, sharded or not, of a folder or of the Hub.

    A shard is fetched when a tensor of it is asked for, and of a shard only those tensors are read. They are on the CPU, aligned as
    torch aligns its own. Files are mapped, as transformers maps them: what a tensor is changed to stays in memory, but a file that
    somebody overwrites in place (not by replacing it, as saving does) changes under those who have read it.

    Args:
        source: a folder or a Hub id.
        variant: part of the files' names, as in `PreTrainedModel.from_pretrained`.
        folder: inode of the folder, where other files of it were read before.
        hub_arguments: some of `HUB_ARGUMENTS`.

    Raises:
        ValueError: there are no safetensors, or two sets of them; or an index, a shard or a tensor is not as it must be.
        OSError: a shard is missing, or cannot be fetched, or the folder was saved anew while it was read.
    """

    def __init__(self, source: str | os.PathLike, *, variant: str | None = None, folder: int | None = None, **hub_arguments: Any):
        self.source, self._hub_arguments = source, hub_arguments
        self._folder = os.stat(source).st_ino if folder is None and os.path.isdir(source) else folder
        self._shards: dict[str, Any] = {}
        whole = SAFE_WEIGHTS_NAME.replace(".safetensors", f".{variant}.safetensors") if variant else SAFE_WEIGHTS_NAME
        path, index = (self._paths([name], required=False) for name in (whole, _index_name(variant)))
        if path and index:
            raise ValueError(f"{source} holds both {whole} and {_index_name(variant)}, saved at different times; delete the older one")
        if not path and not index:
            raise ValueError(f"{source} holds neither {whole} nor {_index_name(variant)}; only safetensors are read")
        if index:
            self.shard_names = self._checked_index(index[0])
        else:
            self._shards[whole] = self._opened(whole, path[0])
            self.shard_names = dict.fromkeys(self._shards[whole].keys(), whole)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard_names)

    def __len__(self) -> int:
        return len(self.shard_names)

    def __contains__(self, name: object) -> bool:
        return name in self.shard_names

    def __getitem__(self, name: str) -> torch.Tensor:
        self.fetch([name])
        tensor = self._shards[self.shard_names[name]].get_tensor(name)
        return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor

    def fetch(self, names: Iterable[str]) -> None:
        """Download and open the shards of these tensors, all at once."""
        shards = sorted({self.shard_names[name] for name in names} - self._shards.keys())
        if not shards:
            return
        for shard, path in zip(shards, self._paths(shards), strict=True):
            opened = self._opened(shard, path)
            listed = {name for name, of in self.shard_names.items() if of == shard}
            if differing := listed ^ set(opened.keys()):
                raise ValueError(
                    f"{shard} of {self.source} and the index disagree on {len(differing)} tensors, the first of them {min(differing)}: "
                    "download or save it again"
                )
            self._shards[shard] = opened
        if self._folder is not None and os.stat(self.source).st_ino != self._folder:
            raise OSError(f"{self.source} was saved anew while it was read; load it again")

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Fetch these tensors' shards and compare their shapes; nothing of the tensors is read."""
        self.fetch(shapes)
        dtypes = {}
        for name, shape in shapes.items():
            header = self._shards[self.shard_names[name]].get_slice(name)
            if tuple(header.get_shape()) != tuple(shape):
                raise ValueError(
                    f"{name} in {self.source} has shape {tuple(header.get_shape())}; by the configuration it is {tuple(shape)}"
                )
            dtypes.setdefault(header.get_dtype(), name)
        # A T5 in float16 keeps some of its weights in float32.
        if not dtypes.keys() <= _DTYPES or len(dtypes.keys() - ({"F32"} if "F16" in dtypes else set())) > 1:
            found = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(dtypes.items()))
            raise ValueError(f"the tensors of {self.source} are to be floating-point numbers of one type; there are {found}")

    def _paths(self, files: list[str], *, required: bool = True) -> list[str] | None:
        try:
            return cached_files(self.source, files, _raise_exceptions_for_missing_entries=required, **self._hub_arguments)
        except OSError:
            raise
        except Exception as error:  # whatever the network ends in
            raise OSError(f"cannot fetch {', '.join(files)} of {self.source} ({error}); try again, what has arrived is kept") from error

    def _opened(self, shard: str, path: str) -> Any:
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{shard} of {self.source} is torn, or no safetensors file ({error}); download or save it again") from error

    def _checked_index(self, path: str) -> dict[str, str]:
        try:
            weight_map = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            entries = list(weight_map.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the index of {self.source} is torn, or none ({error!r}); download or save it again") from error
        for name, shard in entries:
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise ValueError(f"the index of {self.source} says that {name} is in {shard!r}, which is no safetensors file beside it")
        return weight_map


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


# -- uploading -------------------------------------------------------------------------------------------------------------


def card_of(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> ModelCard | None:
    """The card that a repository has at a revision, if it has one."""
    try:
        return ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revision, token=token))
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload the files of a folder to a repository, making the branch if need be. Weights of earlier uploads make way.

    The arguments are those of `PreTrainedModel.push_to_hub`.
    """
    api = HfApi(token=token)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    written = os.listdir(folder)
    there = api.list_repo_files(repo_id, revision=None if create_pr else revision)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[".*", "checkpoint-*", "runs/*"],
        delete_patterns=[name for name in there if _is_replaced(name, written) and name not in written] or None,
    )
