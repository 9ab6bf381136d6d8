"""Routes that answer HEAD wherever they answer GET."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class Router(APIRouter):
    """A router whose GETs are HEADs, too, but for streams, which have no end to wait for.

    The server leaves the body of such an answer out.
    """

    def get(self, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
        """Add a route; see `APIRouter`."""
        add = super().get(path, **options)
        if options.get("response_class") is StreamingResponse:
            return add
        add_head = self.head(path, **options | {"include_in_schema": False})

        def add_both(endpoint: Endpoint) -> Endpoint:
            return add(add_head(endpoint))

        return add_both
