"""The flags for opening a model that all commands share, whichever kind of model it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.api.which import Opening
from squall.checkpoints.hub import Hub
from squall.cli.options import (
    File,
    Folder,
    Isq,
    KvDtype,
    KvDtypeOption,
    Offline,
    Revision,
    Threads,
    TokenSource,
    TopologyFile,
    Weights,
    WeightsOption,
    progress,
)
from squall.cli.selectors import Selected
from squall.errors import InvalidRequest

if TYPE_CHECKING:
    from squall.model import Model


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, and what becomes of its weights."""

    file: File = None
    model: Folder = None
    isq: Isq = None
    topology: TopologyFile = None
    threads: Threads = None
    weights: WeightsOption = Weights.packed
    kv_dtype: KvDtypeOption = KvDtype.f16
    revision: Revision = "main"
    token_source: TokenSource = "cache"
    offline: Offline = False

    def open(self, selected: Selected, **options: Any) -> Model:
        """The model, with more options of `Model.open`; a terminal is told how far it is."""
        from squall.model import Model

        with progress("loading") as shown:
            path, given = self.opening(selected, shown)
            model = Model.open(
                path,
                threads=self.threads,
                weights=self.weights.value,
                kv_dtype=self.kv_dtype.value,
                progress=shown,
                **given,
                **options,
            )
        if given["isq"] is not None or given["topology"] is not None:
            sys.stderr.write(f"{_formats(model)}\n")
        return model

    def opening(
        self, selected: Selected, shown: Callable[[int, int], None]
    ) -> tuple[str | Path | None, dict[str, Any]]:
        """What to open, here if it had to be fetched, and options of `squall.model.prepare`."""
        from squall.locate import locate

        chosen = self._chosen(selected)
        hub = Hub(self.revision, self.token_source, self.offline)
        given = {"isq": self.isq, "topology": self.topology, "hub": hub, **chosen.options}
        if "from_uqff" in given:  # which names one file of several
            return chosen.path, given
        path = locate(chosen.path, hub, shown)
        if path.is_file() and (given["isq"] is not None or given["topology"] is not None):
            raise InvalidRequest(
                f"{path} has its number formats already; --isq and --topology are for folders "
                "of float weights (safetensors). Choose a GGUF file of the format you want"
            )
        return path, given

    def _chosen(self, selected: Selected) -> Opening:
        names = [name for name in (self.file, self.model, selected) if name is not None]
        if len(names) > 1:
            raise InvalidRequest("-f, -m and a kind each name a model; give one of them")
        if not names:
            return Opening(None)
        (name,) = names
        return Opening(name) if isinstance(name, str | Path) else name.opening()


def _formats(model: Model) -> str:
    """What the weights are in memory, in one line."""
    parts = [
        f"{total.matrices} {total.format} ({total.nbytes / 2**20:.1f} MiB)"
        for total in model.weight_formats
    ]
    return f"[weights: {', '.join(parts)}]"
