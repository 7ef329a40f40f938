"""From a model key to a fingerprint: which files, what they hold, with which options.

How a weights file is identified, in this order:

1. A link into the Hugging Face cache carries the SHA-256 of its content in the blob's name;
   it is believed the first time the blob is seen.
2. A file whose stamp (device, inode, size, mtime, ctime) was seen before keeps the identity
   it had then. The memo of stamps is one small file shared by all processes.
3. Any other file is read to the end, and so is each file, every time, whose stamp would not have
   moved with a change (`persist_cache.system.mounts` knows where): then 1 and 2 prove nothing.
   Samples would be cheaper but miss a flipped byte, and the bytes have just been, or are about
   to be, read by the model itself: xxh3-128 keeps up with any disk, so the digest costs no more
   than one more read of warm pages, once per file.

So any change made through the file system is seen, also one of a single byte that restores
mtime: ctime cannot be set. What is not seen, unless `paranoid` reads every byte each time:
a clock turned back or a disk written beneath the file system so that all five numbers repeat,
a writer that keeps the file mapped, and a hub blob damaged before it was first seen. Nor is
an mlx-lm that was edited without a new version; use a `salt` while developing one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, TypeVar, Unpack

from persist_cache.fingerprint import loads
from persist_cache.fingerprint.contents import blake2b
from persist_cache.fingerprint.loads import LOAD_NUMBERS, Description, Files, Load, Unidentified
from persist_cache.fingerprint.model_files import ModelKey, Parts, split_model_key
from persist_cache.fingerprint.reading import CannotIdentify, printable
from persist_cache.fingerprint.value import Fingerprint, Scalar, canonical_fields
from persist_cache.fingerprint.versions import installed_version

T = TypeVar("T")


class IdentifyOptions(TypedDict, total=False):
    """The keywords of `Identifier`, for functions that pass them on."""

    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    max_kv_size: int | None
    salt: str
    paranoid: bool
    memo_path: Path | None


class Identifier:
    """Identifies models, each once, for one set of KV options.

    The weights in a process's memory do not change when their files do. So the identity of a
    model is that of its files while they were loaded, which `around_load` and
    `persist_cache.load` make sure of. A model that was loaded in another way is identified when
    it is first asked for, *lazily*: that is right if its files were not changed since it was
    loaded. Either answer for a model key stands, good or bad, until the next load or `forget`: a
    later look at the files could name bytes that the loaded model never had, and store its KV
    under them.

    Of `around_load`, `persist_cache.load` and `forget`, the latest decides about a model key.
    What `persist_cache.load` has loaded counts while the model lives, and not with `paranoid`.

    Thread safety: one lock is held while a model is identified, so that two threads never
    read the same weights at once; after that a call is a dictionary look-up. It is not held while
    a model is loaded: whoever asks meanwhile is told that it is being loaded.

    Args:
        kv_bits: Bits of the quantized KV cache, or None.
        kv_group_size: Its group size; in the key only with `kv_bits`.
        quantized_kv_start: Token at which quantization begins; in the key only with `kv_bits`.
        max_kv_size: Size of a rotating KV cache, or None.
        salt: Isolates users from each other. Only its digest is kept.
        paranoid: Believe neither the memo nor blob names; read all bytes with SHA-256. Plain
            files then get another identity than without, so switching is a clean miss.
        memo_path: Memo of file stamps. Default: `weights.json` in `$PERSIST_CACHE_HOME` or
            else in the user's cache folder.

    Raises:
        TypeError: an option is not of its type.
    """

    def __init__(
        self,
        *,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 5000,
        max_kv_size: int | None = None,
        salt: str = "",
        paranoid: bool = False,
        memo_path: Path | None = None,
    ) -> None:
        fields: dict[str, Scalar] = {"kv_bits": kv_bits, "max_kv_size": max_kv_size}
        if kv_bits is not None:
            fields |= {"kv_group_size": kv_group_size, "quantized_kv_start": quantized_kv_start}
        if salt:
            fields["salt"] = blake2b(salt.encode("utf-8", "surrogatepass"))
        self._option_fields = canonical_fields(fields)
        self._paranoid = paranoid
        self._memo_path = memo_path
        self._lock = threading.Lock()
        self._state = threading.RLock()
        """Guards what follows; never held while a file is read."""
        self._answers: dict[Parts, _Answer] = {}
        self._numbers: dict[Parts, int] = {}
        self._forgotten = 0
        self._loading: dict[Parts, int] = {}
        self._shared: dict[Parts, tuple[tuple[int, ...], int]] = {}

    def __call__(self, model_key: ModelKey | None) -> Fingerprint | None:
        """Return the model's fingerprint, or None when it cannot be identified.

        Never raises for anything found, or not found, on the disk.
        """
        result = self.look_up(model_key)
        return result if isinstance(result, Fingerprint) else None

    def reason(self, model_key: ModelKey | None) -> str:
        """Say why the model cannot be identified; "" when it can."""
        result = self.look_up(model_key)
        return result.reason if isinstance(result, Unidentified) else ""

    def look_up(self, model_key: ModelKey | None) -> Fingerprint | Unidentified:
        """Return the model's fingerprint, or the reason why it has none."""
        try:
            parts = split_model_key(model_key)
        except CannotIdentify as error:
            return Unidentified(str(error))
        answer = self._settled(parts)
        if answer is None:
            with self._lock:
                # Another thread may have been faster, or have begun to load it.
                answer = self._settled(parts)
                if answer is None:
                    number = self._number(parts)
                    answer = self._identify(parts)
                    self._settle(parts, number, answer)
        return answer

    def settled(self, model_key: ModelKey | None) -> Fingerprint | Unidentified | None:
        """Return what is known of a model without looking at a file; None if nothing is yet."""
        try:
            parts = split_model_key(model_key)
        except CannotIdentify as error:
            return Unidentified(str(error))
        with self._state:
            return None if parts in self._loading else self._settled(parts)

    def load_number(self, model_key: ModelKey | None) -> int:
        """Return a number that changes whenever the model may have become another one.

        It grows at `forget`, when a load begins, and when a load is settled. No number is used
        twice.
        """
        try:
            parts = split_model_key(model_key)
        except CannotIdentify:
            return self._forgotten
        with self._state:
            return self._number(parts)

    def forget(self, model_key: ModelKey | None = None) -> None:
        """Look at the files again when a model is asked for next.

        Args:
            model_key: The only one to be forgotten; all are when it is None.
        """
        try:
            parts = None if model_key is None else split_model_key(model_key)
        except CannotIdentify:
            return  # it never had an answer
        with self._state:
            if parts is None:
                self._answers.clear()
                self._numbers.clear()
                self._forgotten = next(LOAD_NUMBERS)
            else:
                self._answers.pop(parts, None)
                self._numbers[parts] = next(LOAD_NUMBERS)

    def identify_again(self, model_key: ModelKey | None) -> Fingerprint | Unidentified:
        """Look at the files of a model that has just been loaded, whatever was known of it.

        While a model lives that `persist_cache.load` loaded by more than these files (with a
        `model_config`, a `revision`, or an adapter that the key does not name), nobody can tell
        which of them is meant, and there is no identity.
        """
        try:
            model, adapter, draft = parts = split_model_key(model_key)
        except CannotIdentify as error:
            return Unidentified(str(error))
        found = [loads.latest_load(model, adapter)]
        found += [loads.latest_load(draft, None)] if draft else []
        reasons = [load.beyond_files for load in found if load and load.beyond_files]
        with self._state:
            self.forget(model_key)
            if reasons:
                self._settle(parts, self._number(parts), Unidentified(reasons[0]))
        return self.look_up(model_key)

    def around_load(self, model_key: ModelKey | None, load: Callable[[], T]) -> T:
        """Load a model, and settle its identity as that of the files it was loaded from.

        When files are changed meanwhile the model is loaded once more, and if that happens again
        it is not identified. When `load` raises, nothing is settled.

        Args:
            model_key: See `ModelKey`. What a hub id names has to be in the local cache already,
                or else is loaded twice.
            load: Loads the model from these files. All of its weights must have been read when
                this returns: MLX reads lazily, until `mx.eval`.

        Returns:
            What `load` returned last.
        """
        try:
            parts = split_model_key(model_key)
        except CannotIdentify:
            return load()
        with self._state:
            self._answers.pop(parts, None)
            self._numbers[parts] = next(LOAD_NUMBERS)
            self._loading[parts] = self._loading.get(parts, 0) + 1
        try:
            files = Files(parts, self._memo_path, self._paranoid)
            value, described = loads.around_load(files, load)
            answer = self._with_options(described)
            with self._state:
                number = self._numbers[parts] = next(LOAD_NUMBERS)
                self._answers[parts] = _Answer(number, answer)
            return value
        finally:
            with self._state:
                self._loading[parts] -= 1
                if not self._loading[parts]:
                    del self._loading[parts]

    def _settled(self, parts: Parts) -> Fingerprint | Unidentified | None:
        with self._state:
            if parts in self._loading:
                return Unidentified(f"{printable(parts[0])} is being loaded")
            number = self._number(parts)
            answer = self._answers.get(parts)
            if answer is not None and answer.number == number:
                return answer.result
            found = self._loaded_parts(parts)
            if found and all(found):
                # Both were loaded by `persist_cache.load`: no file has to be asked.
                result = self._with_options(_together([load.described for load in found if load]))
                self._answers[parts] = _Answer(number, result)
                return result
        return None

    def _settle(self, parts: Parts, number: int, answer: Fingerprint | Unidentified) -> None:
        with self._state:
            if parts not in self._loading and self._number(parts) == number:
                self._answers[parts] = _Answer(number, answer)

    def _number(self, parts: Parts) -> int:
        own = self._numbers.get(parts, self._forgotten)
        numbers = tuple(load.number if load else 0 for load in self._loaded_parts(parts))
        if any(numbers):
            kept = self._shared.get(parts)
            if kept is None or kept[0] != (own, *numbers):
                kept = self._shared[parts] = ((own, *numbers), next(LOAD_NUMBERS))
            return kept[1]
        if self._shared.pop(parts, None) is not None:
            # The loaded model has died. What takes its place is none of the earlier ones.
            own = self._numbers[parts] = next(LOAD_NUMBERS)
        return own

    def _loaded_parts(self, parts: Parts) -> list[Load | None]:
        """Loads by `persist_cache.load` of the model and the draft model, if they decide."""
        own = self._numbers.get(parts, self._forgotten)
        if self._paranoid:
            return [None]
        model, adapter, draft = parts
        found = [loads.latest_load(model, adapter)]
        if draft is not None:
            found.append(loads.latest_load(draft, None))
        return [load if load and load.number > own else None for load in found]

    def _identify(self, parts: Parts) -> Fingerprint | Unidentified:
        model, adapter, draft = parts
        found = self._loaded_parts(parts)
        if not any(found):
            return self._with_options(self._files(parts).describe())
        alone: list[Parts] = [(model, adapter, None), (draft or "", None, None)]
        return self._with_options(
            _together(
                [
                    self._files(one).describe() if load is None else load.described
                    for one, load in zip(alone, found, strict=False)
                ]
            )
        )

    def _files(self, parts: Parts) -> Files:
        return Files(parts, self._memo_path, self._paranoid)

    def _with_options(self, described: Description | Unidentified) -> Fingerprint | Unidentified:
        if isinstance(described, Unidentified):
            return described
        try:
            return Fingerprint.from_fields(
                {
                    **described.fields,
                    "mlx_lm": installed_version("mlx-lm"),
                    **self._option_fields,
                },
                {**described.info, "mlx": installed_version("mlx"), "device": _device()},
            )
        except ValueError as error:
            return Unidentified(str(error))


class _Answer(NamedTuple):
    """What was settled for a model key, and with which load number."""

    number: int
    result: Fingerprint | Unidentified


def _together(described: Sequence[Description | Unidentified]) -> Description | Unidentified:
    """Put a model and, if there is one, its draft model together."""
    fields: dict[str, str] = {}
    info: dict[str, str] = {}
    for prefix, one in zip(("", "draft."), described, strict=False):
        if isinstance(one, Unidentified):
            return one
        fields |= {prefix + name: value for name, value in one.fields.items()}
        info |= {prefix + name: value for name, value in one.info.items()}
    return Description(fields, info)


def identify_or_reason(
    model_key: ModelKey | None, **options: Unpack[IdentifyOptions]
) -> Fingerprint | Unidentified:
    """Identify a model by its files, or say why that cannot be done.

    Args:
        model_key: See `ModelKey`. A hub id is resolved through the local cache only.
        **options: The keywords of `Identifier`.
    """
    return Identifier(**options).look_up(model_key)


def identify(model_key: ModelKey | None, **options: Unpack[IdentifyOptions]) -> Fingerprint | None:
    """Identify a model by its files; None when it cannot be identified.

    Args:
        model_key: See `ModelKey`. A hub id is resolved through the local cache only.
        **options: The keywords of `Identifier`.
    """
    return Identifier(**options)(model_key)


def _device() -> str:
    system = os.uname()
    return f"{system.sysname} {system.machine}"
