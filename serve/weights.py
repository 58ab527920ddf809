"""Other weights for a server that runs: read once into the object store, which every replica maps."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import ray

from thornback.contracts import InFlight, ModelError, TensorSpec, WeightView

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """Weights of a model directory or of the hub, under a version. `in_flight`: what becomes of requests that have
    begun; see `Engine.load_weights`. With "finish", what comes meanwhile waits."""

    model: str
    version: int
    in_flight: InFlight = "recompute"


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """An update in the object store. `buffer`: the reference, in a list, so that it travels as one."""

    update: WeightUpdate
    index: tuple[TensorSpec, ...]
    buffer: list[ray.ObjectRef]

    def fetch(self, timeout_s: float) -> WeightView:
        """Mapped where this machine has it. Raises `RayError` where it cannot be had."""
        return WeightView(ray.get(self.buffer[0], timeout=timeout_s), self.index)


class WeightKeeper:
    """A gateway's knowledge of the newest weights. Whoever reads them owns what is in the object store, and takes that
    along when it dies: then they are read again. Which are the newest, every replica knows that has them."""

    def __init__(self, served: str, dtype: str) -> None:
        """`served`: the model that the server started with."""
        self._served, self._dtype = served, dtype
        self._stored: StoredWeights | None = None
        self._reading = asyncio.Lock()
        self.newest: WeightUpdate | None = None

    @property
    def version(self) -> int:
        return self.newest.version if self.newest is not None else 0

    def learn(self, update: WeightUpdate | None) -> None:
        """A replica has these."""
        if update is not None and update.version > self.version:
            self.newest = update

    def take(self, stored: StoredWeights) -> None:
        """They are there."""
        self.learn(stored.update)
        if stored.update == self.newest:
            self._stored = stored

    async def stored(self) -> StoredWeights:
        """The newest, read if need be. See `read`."""
        async with self._reading:
            assert self.newest is not None
            if self._stored is None or self._stored.update != self.newest:
                self._stored = await self.read(self.newest)
            return self._stored

    def forget(self, stored: StoredWeights) -> None:
        """It cannot be had any more."""
        if self._stored is stored:
            self._stored = None

    async def read(self, update: WeightUpdate) -> StoredWeights:
        """Into the object store, by a process of its own. Raises `ModelError` where they are not the weights of a model
        like the one that is served."""
        index, buffer = _read.remote(update.model, self._served, self._dtype)
        try:
            found = await asyncio.wrap_future(index.future())
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        return StoredWeights(update, found, [buffer])


@ray.remote(num_cpus=0, num_returns=2)
def _read(model: str, served: str, dtype: str) -> tuple:
    """The index and the buffer of a model's parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from thornback.data import same_tokens
    from thornback.engine import bind_weights, copy_parameters, load_model

    view = copy_parameters(load_model(model, "cpu", dtype))
    with torch.device("meta"):
        like_served = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(served))
    try:
        bind_weights(like_served, view)
    except ModelError as error:
        raise ModelError(f"{model} is not a model like {served}, which is served: {error}") from error
    if not same_tokens(model, served):
        raise ModelError(f"{model} has another tokenizer than {served}, which is served; start a server of its own.")
    return view.index, view.buffer
