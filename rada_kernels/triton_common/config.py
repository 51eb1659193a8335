"""Launch configurations: one frozen dataclass per kind of kernel, tables of them, and the tuned file.

Each step's config.py has the tables of its kernels. A table gives a family of devices, 16 or 32 bits and a head width
up to 64 or above a configuration to start from. `Target.launch` halves it until it fits the device. What stands in
the file that RADA_TUNED names is preferred; `bench/autotune.py` writes that file, for the kernels as they are then.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from rada_kernels.triton_common.device import Device

if TYPE_CHECKING:
    from typing_extensions import Self

TUNED = "RADA_TUNED"  # names the file of tuned configurations
BLOCKS = (16, 32, 64, 128, 256)  # 16 is the least that tl.dot takes
LAUNCH_OPTIONS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": tuple(range(1, 9))}


class Config:
    """Block sizes, by the names of the kernels' dialect, and Triton's launch options. A dataclass for each kind."""

    num_warps: int
    num_stages: int

    def changed(self, **fields: int) -> Self:
        return type(self)(**vars(self) | fields)

    def halved(self, keep: tuple[str, ...] = ()) -> Self | None:
        """With half of the largest block, the first of equals; None where all are at the least. keep: fixed ones."""
        blocks = {name: size for name, size in self.blocks.items() if name not in keep}
        largest = max(blocks, key=blocks.__getitem__, default="")
        if not largest or blocks[largest] <= BLOCKS[0]:
            return None
        return self.changed(**{largest: blocks[largest] // 2})

    @property
    def blocks(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if name not in LAUNCH_OPTIONS}


ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True)
class GemmConfig(Config):
    """A product over rows of width D: BR rows, BC columns written, BD columns contracted at a time."""

    BR: int
    BC: int
    BD: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig(Config):
    """BM rows of scores by BN classes."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


Table = Mapping[str, Mapping[int, tuple]]
MANY_CLASSES = 512  # above, of a batch of 32, programs of 128 rows are several for every multiprocessor


def look_up(table: Table, device: Device, dtype: torch.dtype) -> tuple:
    """The entry of {family: {bits: entry}}; "mma" serves families that have none, such as the interpreter."""
    return table.get(device.family, table["mma"])[8 * dtype.itemsize]


def next_power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """triton.cdiv in a tenth of its time."""
    return -(-number // divisor)


@functools.lru_cache
def contracted_block(width: int, largest: int) -> int:
    """The largest block up to `largest` whose last one is not much empty: an eighth of the width at most, or 16."""
    return max(b for b in BLOCKS if b <= largest and (b == BLOCKS[0] or -width % b <= width // 8))


@dataclass(frozen=True)
class PairBlock:
    """BI images and BK classes, whose pairs are a tile's rows."""

    BI: int
    BK: int

    @staticmethod
    @functools.lru_cache
    def of(batch: int, classes: int, rows: int) -> PairBlock:
        """BI + BK rows of features are read for a tile: near a square, but for an eighth of empty rows.

        Of B it only matters whether it is 1, and of K what is below 8 BK: one compiled kernel serves a last batch.
        """
        side = 1 << (rows.bit_length() // 2)
        block = max(k for k in (1, 2, 4, 8, 16) if k <= side and -classes % k <= classes // 8)
        images = 1 if batch == 1 else rows // block
        return PairBlock(images, rows // images)

    def tiles(self, batch: int, classes: int) -> int:
        return cdiv(batch, self.BI) * cdiv(classes, self.BK)


def config_key(kernel: str, device: Device, dtype: torch.dtype, *sizes: int) -> str:
    """The name of a configuration in the tuned file, such as "mask_attention_bwd_keys sm_90 bfloat16 64"."""
    return " ".join([kernel, device.name, str(dtype).removeprefix("torch."), *map(str, sizes)])


def tuned_file() -> Mapping[str, Mapping[str, int]]:
    """What RADA_TUNED names: {config_key: {field: number}}; nothing where it is not set, or of other kernels.

    Raises ValueError naming the file, the entry, what it got and what it takes.
    """
    path = os.environ.get(TUNED)
    return read_tuned(path) if path else {}


@functools.lru_cache
def kernels_version() -> str:
    """What configurations are tuned for: a digest of the kernels' sources and of Triton's version."""
    from triton import __version__ as triton_version

    digest = hashlib.blake2b(triton_version.encode(), digest_size=6)
    package = Path(__file__).parents[1]
    for source in sorted([*package.glob("*/triton/*.py"), package / "triton_common" / "dialect.py"]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def write_tuned(path: Path, configs: Mapping[str, Mapping[str, int]]) -> None:
    """The file that RADA_TUNED may name."""
    path.write_text(json.dumps({"kernels": kernels_version(), "configs": configs}, indent=1) + "\n")
    read_tuned.cache_clear()


@functools.lru_cache
def read_tuned(path: str) -> dict[str, dict[str, int]]:
    """Its configurations. One warning and none of them where the file was tuned for other kernels."""
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise _wrong(f"{path}: {error}", "a file that bench/autotune.py wrote") from error
    if not isinstance(content, dict):
        raise _wrong(f"{path}: got {content!r}", "an object")
    if (version := content.get("kernels")) != kernels_version():
        got = "it tells of no version" if version is None else f"of version {version}"
        warnings.warn(
            f"{TUNED}: {path} is ignored: {got}, and the kernels are of version {kernels_version()}; "
            "bench/autotune.py writes a new one",
            stacklevel=2,
        )
        return {}
    configs = content.get("configs")
    if not isinstance(configs, dict):
        raise _wrong(f"{path}: configs: got {configs!r}", "an object")
    for key, entry in configs.items():
        if not isinstance(entry, dict):
            raise _wrong(f"{path}: {key}: got {entry!r}", "an object")
        for name, value in entry.items():
            takes = LAUNCH_OPTIONS.get(name, BLOCKS)
            if type(value) is not int or value not in takes:
                raise _wrong(f"{path}: {key}: {name}: got {value!r}", f"one of {takes}")
    return configs


def _wrong(got: str, takes: str) -> ValueError:
    return ValueError(f"{TUNED}: {got}; it takes {takes}")


def tuned(key: str, entries: Mapping[str, Mapping[str, int]], default: ConfigT) -> ConfigT:
    """The tuned configuration of a key, or the default."""
    if key not in entries:
        return default
    entry = entries[key]
    if entry.keys() != vars(default).keys():
        raise _wrong(f"{os.environ.get(TUNED)}: {key}: got {', '.join(entry)}", ", ".join(vars(default)))
    return default.changed(**entry)
