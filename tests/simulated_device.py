"""A GPU without one: streams, events and graphs as CUDA's, worked off on the CPU in any order that
they allow.

While a `SimulatedDevice` is entered, tensors on `GPU` (PyTorch's `meta` stands for it) are
`OnDevice`. An operation on them is queued on the calling thread's current stream and done later: at
random, or when somebody waits. Until then its result holds NaN. So what a program reads or
overwrites too early shows in its numbers, as on a GPU, but on every run. Refused at once:
operations on tensors of two devices, and waiting for the device while a graph is captured.

Host memory counts as page-locked: an asynchronous copy reads it when it is done.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten


class OnDevice(torch.Tensor):
    """A tensor on the device. `inner` is its memory, which queued work has yet to fill."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return SimulatedDevice.entered.call(function, args, kwargs or {})


class Stream:
    """As `torch.cuda.Stream`: its work is done in order."""

    def __init__(self, device=None, priority=0):
        self.work, self.num_given, self.num_done = deque(), 0, 0
        SimulatedDevice.entered.streams.append(self)

    def record_event(self):
        return Event(self, self.num_given)

    def wait_event(self, event):
        SimulatedDevice.entered.give(self, None, event)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Event:
    """As `torch.cuda.Event`: a point in a stream's work."""

    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def synchronize(self):
        device = SimulatedDevice.entered
        device.num_waits += device.is_main_thread()
        device.finish(self)


class Graph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.work = []

    def replay(self):
        device = SimulatedDevice.entered
        for work in self.work:
            device.give(device.current_stream(), work)


class SimulatedDevice(TorchDispatchMode):
    """Enter it in the thread that trains; `num_waits` counts how often that waited.

    `eagerness`: how likely some queued work is done each time something is queued; 0: only when
    waited for.
    """

    entered = None

    def __init__(self, eagerness):
        super().__init__()
        self.random, self.eagerness = random.Random(0), eagerness
        self.streams, self.num_waits = [], 0
        self.lock, self.local = threading.RLock(), threading.local()
        self.thread = threading.get_ident()
        self.graph = None  # being captured

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(mock.patch.object(SimulatedDevice, "entered", self))
        self.main = Stream()
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "current_stream": self.current_stream,
            "set_stream": lambda stream: setattr(self.local, "stream", stream),
            "stream": self.on_stream,
            "graph": self.capture,
            "synchronize": self.finish_all,
        }.items():
            self.stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # It knows the devices whose fused kernels there are.
        checked = "_device_dtype_check_for_fused"
        self.stack.enter_context(mock.patch(f"torch.optim.adam.{checked}", lambda *_, **__: None))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is None:
            self.finish_all()
        self.stack.close()

    @contextmanager
    def pushed(self):
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def current_stream(self):
        return getattr(self.local, "stream", self.main)

    @contextmanager
    def on_stream(self, stream):
        before, self.local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.local.stream = before

    @contextmanager
    def capture(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.finish_all()
        self.graph = graph
        try:
            with self.on_stream(stream):
                yield
        finally:
            self.graph = None

    def is_main_thread(self):
        return threading.get_ident() == self.thread

    def give(self, stream, work, event=None):
        """Queue work on a stream, to be done once `event` has passed."""
        if self.graph is not None and self.is_main_thread():
            self.graph.work.append(work)
            return
        with self.lock:
            stream.work.append((work, event))
            stream.num_given += 1
            while self.random.random() < self.eagerness:
                self.do_next(self.random.choice(self.streams))

    def do_next(self, stream):
        if not stream.work:
            return
        work, event = stream.work[0]
        if event is not None:
            self.finish(event)
        stream.work.popleft()
        if work is not None:
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
                work()
        stream.num_done += 1

    def finish(self, event):
        with self.lock:
            while event.stream.num_done < event.number:
                self.do_next(event.stream)

    def finish_all(self):
        with self.lock:
            for stream in self.streams:
                self.finish(stream.record_event())

    def wait(self):
        """The host waits for the calling thread's current stream."""
        if self.graph is not None and self.is_main_thread():
            raise RuntimeError("waits for the device while a graph is captured")
        self.num_waits += self.is_main_thread()
        self.finish(self.current_stream().record_event())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.call(function, args, kwargs or {})

    def call(self, function, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        makes = kwargs.get("device") == GPU
        if not makes and not any(isinstance(tensor, OnDevice) for tensor in tensors):
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            # Its decomposition does not know tensors of ours.
            whole = function is aten.native_batch_norm.default
            if whole or not function._can_decompose():
                return self.call_on_device(function, args, kwargs, tensors)
            with self.pushed():  # inference mode leaves operations in one piece
                return function.decompose(*args, **kwargs)

    def call_on_device(self, function, args, kwargs, tensors):
        if function is aten._local_scalar_dense.default:
            self.wait()
            return function(args[0].inner)
        if function is aten.copy_.default:
            return self.copy(args[0], args[1], len(args) > 2 and args[2])
        if function is aten._to_copy.default:
            target = poisoned(torch.empty_like(inner_of(args[0]), dtype=kwargs.get("dtype")))
            target = target if kwargs.get("device") == CPU else wrapped(target)
            return self.copy(target, args[0], kwargs.get("non_blocking", False))
        if any(tensor.dim() and not isinstance(tensor, OnDevice) for tensor in tensors):
            raise RuntimeError(f"{function}: tensors on two devices")
        memory = tree_map(inner_of, (args, kwargs))
        results = function._schema.returns
        written = [a for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
        if not written and any(result.alias_info for result in results):
            return tree_map(wrapped, function(*memory[0], **memory[1]))  # a view
        if written:
            self.give(self.current_stream(), lambda: function(*memory[0], **memory[1]))
            return kwargs.get(written[0].name, args[0]) if results else None
        shaped = tree_map(shape_of, (args, kwargs))
        made = tree_map(poisoned, function(*shaped[0], **shaped[1]))
        places = [place for place in tree_leaves(made) if isinstance(place, torch.Tensor)]

        def work():
            values = tree_leaves(function(*memory[0], **memory[1]))
            values = [value for value in values if isinstance(value, torch.Tensor)]
            for place, value in zip(places, values, strict=True):
                if value.numel() or not place.numel():  # a CPU leaves out what nobody needs
                    place.copy_(value)

        if not function.__name__.startswith("empty"):
            self.give(self.current_stream(), work)
        return tree_map(wrapped, made)

    def copy(self, target, source, is_asynchronous):
        to, of = inner_of(target), inner_of(source)
        self.give(self.current_stream(), lambda: to.copy_(of))
        crosses = isinstance(target, OnDevice) != isinstance(source, OnDevice)
        if crosses and not is_asynchronous:
            self.wait()
        return target


def inner_of(value):
    """What computes in a value's place."""
    if isinstance(value, OnDevice):
        return value.inner
    return CPU if isinstance(value, torch.device) else value


def shape_of(value):
    if isinstance(value, torch.Tensor):
        memory = inner_of(value)
        return torch.empty_strided(memory.size(), memory.stride(), dtype=value.dtype, device=GPU)
    return value


def poisoned(value):
    """Memory like `value`, of values that nobody may use."""
    if not isinstance(value, torch.Tensor):
        return value
    memory = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    if value.dtype is torch.bool:
        return memory.fill_(True)
    return memory.fill_(torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max)


def wrapped(value):
    return OnDevice(value) if isinstance(value, torch.Tensor) else value
