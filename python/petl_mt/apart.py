"""One piece of work in a process of its own, which gives back all that it took when it ends."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from petl_kernels.errors import InputError


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, run in a new process; what it raises is raised here.

    ``function`` stands at the top of a module; arguments and result can be pickled. Where the system can fork, the
    process is a copy of one that has only imported that module, which takes seconds once. It computes with as many
    threads as this process. Raises InputError when the process is killed, by the system's lack of memory for example.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__, function.__module__])
    try:
        with ProcessPoolExecutor(
            1, context, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        ) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise InputError(
            f"the process of {function.__name__.strip('_')} was killed; the host's memory may have run out"
        ) from None
