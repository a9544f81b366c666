"""Starts every launch of ``triton_aot.py`` twice, by hand and as Triton would; prints how many there were.

The kernels are the package's own, so this runs where Triton's interpreter was not chosen. None is compiled but one.
"""

from __future__ import annotations

import triton_aot
from rehearsal.driver import played, without_compiler

from petl_kernels.backends.triton import launch as module


def main() -> int:
    launches = []
    for function, *arguments in triton_aot.EVERYWHERE + triton_aot.ONLY["sm90"]:
        launches += triton_aot.record("sm90", lambda f=function, a=arguments: f(*a))
    with played() as driver, without_compiler():
        for kernel, args, constexprs, options in launches:
            for _ in range(2):
                start(kernel, args, constexprs, options)
            before = len(module._prepared)
            driver.starts.clear()
            kernel[(3, 2)](*args, **constexprs, **options)
            start(kernel, args, constexprs, options)
            (source, by_triton), (again, direct) = driver.starts
            assert len(module._prepared) == before, f"{kernel.__name__} is not found again"
            assert source is again and by_triton[:6] == direct[:6], kernel.__name__
            assert direct[6:9] == (None,) * 3, kernel.__name__
            assert all(a is b or a == b for a, b in zip(by_triton[9:], direct[9:], strict=True)), kernel.__name__
    return len(launches)


def start(kernel, args: tuple, constexprs: dict, options: dict) -> None:
    module.launch(kernel, (3, 2), *args, warps=options["num_warps"], stages=options["num_stages"], **constexprs)


if __name__ == "__main__":
    print(main())
