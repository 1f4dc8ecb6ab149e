"""Responses that can be asked for again, or gone on with, for as long as there is room."""

from __future__ import annotations

from collections import OrderedDict

from squall.server.errors import ApiError

Told = tuple[bytes, bytes]  # a response, and the messages it answers, as JSON


class Kept:
    """Responses by tenant and id; those that nobody has used for longest go first."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._told: OrderedDict[tuple[str, str], Told] = OrderedDict()

    def keep(self, tenant: str, id: str, told: Told) -> None:
        """Keep a new one, unless it alone is too large."""
        size = sum(map(len, told))
        if size <= self._most_bytes:
            self._told[tenant, id] = told
            self._bytes += size
        while len(self._told) > self._most or self._bytes > self._most_bytes:
            self._bytes -= sum(map(len, self._told.popitem(last=False)[1]))

    def find(self, tenant: str, id: str, param: str | None = None) -> Told:
        """Raises ApiError if the tenant has none such, or no longer."""
        if (tenant, id) not in self._told:
            why = f"there is no response {id!r:.100}, or it is no longer kept; give all as input"
            raise ApiError(404, why, "response_not_found", param=param)
        self._told.move_to_end((tenant, id))
        return self._told[tenant, id]

    def forget(self, tenant: str, id: str) -> None:
        self._bytes -= sum(map(len, self.find(tenant, id)))
        del self._told[tenant, id]
