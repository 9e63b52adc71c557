"""Decode steps as graphs: captured once for each bucket of requests when an artifact is loaded, replayed from then on.

Contract:
    A graph computes a step of b requests with a token each. A batch of fewer is padded to it: padding requests read and
    write the reserved page, block and slot, and their logits are dropped. The fields of a batch reach the device in one
    copy, at places that depend on the bucket alone. A replay allocates nothing and launches no kernel by itself.

Terms:
    bucket    a number of requests that a graph is captured for.
    staging   pinned memory of the host, and memory of the device, that hold the fields of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from atomc.artifact.manifest import Serving
from atomc.ops import Batch

Shapes = Mapping[str, tuple[int, ...]]
ALIGN: Final = 4  # of a field's place, in int32
RESERVED: Final = 0  # page and block


def buckets_of(most: int) -> tuple[int, ...]:
    """Numbers of requests that graphs are captured for: close together where requests are few."""
    known = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 32)]
    return (*takewhile(lambda n: n < most, known), most)


class Staging:
    """Where the fields of a batch lie, on the host and on the device."""

    def __init__(self, serving: Serving, bounds: Mapping[str, int], device: torch.device) -> None:
        tables = serving.window_table_width, serving.block_table_width
        self.tables = tables
        most = self.shapes(bounds["T"], bounds["B"], bounds["N4"], bounds["NH"], bounds["L"])
        size = _size(most)
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self._array = self.host.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._decode: dict[int, tuple[list[Any], Any]] = {}  # by bucket

    def shapes(self, tokens: int, requests: int, csa: int, hca: int, rows: int) -> Shapes:
        """The shape of every field of a batch of these sizes."""
        return {
            "ids": (tokens,), "positions": (tokens,), "requests": (tokens,), "query_start": (requests + 1,),
            "slots": (requests,), "window_table": (requests, self.tables[0]), "block_table": (requests, self.tables[1]),
            "csa_ends": (csa,), "hca_ends": (hca,), "logit_rows": (rows,),
        }  # fmt: skip

    def decode_shapes(self, requests: int) -> Shapes:
        """The shapes of a step with a token of each request."""
        return self.shapes(*[requests] * 5)

    def views(self, shapes: Shapes) -> dict[str, Tensor]:
        """The fields on the device."""
        found, at = {}, 0
        for name, shape in shapes.items():
            found[name] = self.device[at : at + int(np.prod(shape))].view(shape)
            at += _room(shape)
        return found

    def arrays(self, shapes: Shapes) -> dict[str, Any]:
        """The fields on the host."""
        found, at = {}, 0
        for name, shape in shapes.items():
            found[name] = self._array[at : at + int(np.prod(shape))].reshape(shape)
            at += _room(shape)
        return found

    def wait(self) -> None:
        """The copy before has left the host's memory: it may be written."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, size: int) -> None:
        """Copy the first `size` numbers to the device, in one piece, on the current stream."""
        self.device[:size].copy_(self.host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def put(self, batch: Batch) -> dict[str, Tensor]:
        """A batch as it is, on the device."""
        shapes = {name: tuple(field.shape) for name, field in batch._asdict().items()}
        self.wait()
        for name, array in self.arrays(shapes).items():
            array[...] = getattr(batch, name).numpy()
        self.send(_size(shapes))
        return self.views(shapes)

    def put_decode(self, batch: Batch | None, bucket: int, slot: int) -> None:
        """A batch of one token a request, padded to a bucket; None: nothing but padding. `slot`: the reserved one."""
        if bucket not in self._decode:
            self._decode[bucket] = self._padding(bucket, slot)
        arrays, padding = self._decode[bucket]
        self.wait()
        self._array[: len(padding)] = padding  # always: windows that end are fewer than requests
        if batch is not None:
            for array, field in zip(arrays, batch, strict=True):
                array[: len(field)] = field.numpy()
        self.send(len(padding))

    def _padding(self, bucket: int, slot: int) -> tuple[list[Any], Any]:
        """The fields of a decode step in order, and what stands in them where no request is."""
        shapes = self.decode_shapes(bucket)
        known = {"slots": slot, "csa_ends": -1, "hca_ends": -1}
        padding, at = np.zeros(_size(shapes), dtype=np.int32), 0
        for name, shape in shapes.items():
            field = padding[at : at + int(np.prod(shape))]
            counts = name in ("requests", "query_start", "logit_rows")
            field[:] = np.arange(len(field), dtype=np.int32) if counts else known.get(name, RESERVED)
            at += _room(shape)
        arrays = self.arrays(shapes)
        return [arrays[name] for name in Batch._fields], padding


def _room(shape: tuple[int, ...]) -> int:
    return -(-int(np.prod(shape)) // ALIGN) * ALIGN


def _size(shapes: Shapes) -> int:
    return sum(_room(shape) for shape in shapes.values())


class DecodeGraphs:
    """The graphs of an executor, by bucket."""

    def __init__(
        self, staging: Staging, most: int, slot: int, run: Callable[[Mapping[str, Tensor], int], Tensor]
    ) -> None:
        """Capture. `run(fields, requests)` runs a decode step eagerly and returns its logits."""
        self.staging, self.slot = staging, slot
        self.buckets = buckets_of(most)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for bucket in self.buckets:
            fields = staging.views(staging.decode_shapes(bucket))
            with torch.cuda.stream(stream):
                staging.put_decode(None, bucket, slot)
                run(fields, bucket)  # what is set up at a first launch must not be captured
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                logits = run(fields, bucket)
            self._graphs[bucket] = (graph, logits)
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, requests: int) -> None:
        """Replay the graph of that many requests on the fields that are there: a step without its input, to time it."""
        self._graphs[next(b for b in self.buckets if requests <= b)][0].replay()

    def step(self, batch: Batch) -> Tensor | None:
        """Logits [L, V] of a step with one token of each request, valid until the next step; None for another step."""
        requests = batch.slots.shape[0]
        if batch.ids.shape[0] != requests or requests > self.buckets[-1]:
            return None
        bucket = next(b for b in self.buckets if requests <= b)
        graph, logits = self._graphs[bucket]
        self.staging.put_decode(batch, bucket, self.slot)
        graph.replay()
        return logits[: batch.logit_rows.shape[0]]
