"""A topology: what is done with ranges of layers, written as YAML.

    0-8:            # layers 0 to 7
      isq: Q3K
    8-16:
      isq: Q4K
      device: cpu
    20:             # one layer
      isq: Q6K

Of ranges that share a layer, the one that ends later decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from squall.errors import InvalidRequest

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
_DEVICE = re.compile(r"cpu|(cuda|metal)\[\d+\]")
_KEYS = ("isq", "device")
_FORM = "write `N:` or `A-B:` (layers A to B - 1), and below it `isq: Q4K`, `device: cpu` or both"


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers `start` to `stop` - 1; None leaves to the rest what is not said here."""

    start: int
    stop: int
    isq: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranges of layers in the order of their ends; of two that share a layer, the later wins."""

    ranges: tuple[LayerRange, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> Topology:
        """Parse YAML; raises InvalidRequest with the entry that is wrong."""
        import yaml

        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidRequest(f"the topology is not YAML: {error}") from None
        if not isinstance(found, dict):
            raise InvalidRequest(f"the topology has no ranges of layers; {_FORM}")
        ranges = [_range(str(key), entry) for key, entry in found.items()]
        return cls(tuple(sorted(ranges, key=lambda r: r.stop)))

    @classmethod
    def from_file(cls, path: Path) -> Topology:
        """Read a YAML file."""
        try:
            return cls.from_text(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InvalidRequest(f"{path} is not UTF-8 text; a topology is YAML") from None

    @property
    def types(self) -> set[str]:
        """The quantizations it names."""
        return {found.isq for found in self.ranges if found.isq is not None}

    def isq_of(self, layer: int) -> str | None:
        """The quantization of a layer, if any."""
        found = self._of(layer)
        return None if found is None else found.isq

    def device_of(self, layer: int) -> str | None:
        """The device of a layer, if it is said."""
        found = self._of(layer)
        return None if found is None else found.device

    def _of(self, layer: int) -> LayerRange | None:
        covering = [found for found in self.ranges if found.start <= layer < found.stop]
        return covering[-1] if covering else None

    def check(self, layers: int) -> None:
        """Raise InvalidRequest for ranges outside of a model."""
        for found in self.ranges:
            if found.stop > layers:
                raise InvalidRequest(
                    f"the topology speaks of layer {found.stop - 1}; the model has layers 0 to "
                    f"{layers - 1}"
                )


EVERYWHERE = Topology()  # no layer is different


def _range(key: str, entry: object) -> LayerRange:
    match = _RANGE.fullmatch(key)
    if match is None:
        raise InvalidRequest(f"{key!r} is no range of layers; {_FORM}")
    start = int(match[1])
    stop = start + 1 if match[2] is None else int(match[2])
    if stop <= start:
        raise InvalidRequest(f"the range {key!r} is empty: its end is not part of it; {_FORM}")
    if not isinstance(entry, dict) or not entry.keys() <= set(_KEYS):
        raise InvalidRequest(f"the range {key!r} has {entry!r}; {_FORM}")
    isq, device = (None if entry.get(k) is None else str(entry[k]) for k in _KEYS)
    if device is not None and not _DEVICE.fullmatch(device):
        raise InvalidRequest(
            f"the range {key!r} has device {device!r}; devices are cpu, cuda[N] and metal[N]"
        )
    return LayerRange(start, stop, isq, device)
