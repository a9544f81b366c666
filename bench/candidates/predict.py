"""What each candidate should take, from operations, bytes and launches; `python bench/candidates/predict.py` prints it.

A launch takes the longer of its products at the matrix rate and its bytes at the copy rate, and LAUNCH beside.
"""

from __future__ import annotations

from dataclasses import dataclass

LAUNCH = 1.5e-6
# Of the library's rate: a Triton product without and with TMA (NOTES.md: 26 to 29 µs for the library's 22).
TRITON, TMA, LIBRARY = 0.8, 0.95, 1.0
# A 128 x 256 tile takes 16 cycles for each column of K, and its epilogue and seed, under which copies run on but
# nothing is multiplied, 1,200 (dx) to 2,000 (y): instructions of sm_90a, two warps a scheduler.
WGMMA_EPILOGUE = 1600 / 16
PROGRAMS = 264  # that a sum over tokens is split into: two for each multiprocessor, 64 columns in each


@dataclass(frozen=True)
class Rates:
    copy: float = 4.0e12  # bytes a second, read and written: an H200
    matmul: float = 790e12


@dataclass(frozen=True)
class Shape:
    tokens: int
    d: int
    rank: int
    groups: int

    @property
    def activation(self) -> int:
        return 2 * self.tokens * self.d

    @property
    def block(self) -> int:
        return max(16, 1 << (self.rank - 1).bit_length())

    @property
    def parts(self) -> int:
        """Bytes of one split's part of every dB (or every dA)."""
        return 4 * self.groups * self.rank * self.d


def predict(name: str, s: Shape, rates: Rates = Rates()) -> float:
    """Seconds of forward and backward, biases frozen; name: a candidate's, "shipped" or "frozen"."""

    def product(more: int = 0, factor: float = 1.0, efficiency: float = TRITON, launches: int = 1) -> float:
        """t x d times d x d for each linear, with `more` columns in the summed dimension."""
        operations = 2 * s.tokens * s.d * (s.d + more) * s.groups * factor
        size = s.activation * (1 + s.groups) + 2 * s.groups * s.d**2
        return max(operations / (rates.matmul * efficiency), size / rates.copy) + launches * LAUNCH

    def moved(size: float) -> float:
        return size / rates.copy + LAUNCH

    def splits(tiles: int) -> int:
        return min(-(-PROGRAMS * 64 // (tiles * s.d)), -(-s.tokens // 256))

    s_pass, ds_pass = moved(s.activation), moved(s.activation * s.groups)
    parts = 2 * splits(1 + s.groups) * s.parts  # of dA and dB
    adapters = moved(s.activation * (1 + s.groups) + parts) + moved(parts)
    if name == "frozen":
        return 2 * product(efficiency=LIBRARY, launches=s.groups)
    if name == "shipped":
        return s_pass + ds_pass + 2 * product(s.rank) + adapters
    if name == "library":
        added = moved(2 * s.activation)  # read and written again
        products = 2 * product(efficiency=LIBRARY, launches=s.groups)
        return s_pass + ds_pass + products + (s.groups + 1) * added + adapters
    if name == "in_loop":
        return 2 * product(s.rank, factor=1 + s.block / 128) + adapters
    if name == "one_read":
        blocks = -(-s.tokens // 128) * s.parts
        dy_pass = moved(s.activation * s.groups + blocks) + moved(blocks)
        x_parts = splits(1) * s.parts
        return s_pass + 2 * product(s.rank) + dy_pass + moved(s.activation + x_parts) + moved(x_parts)
    if name == "bordered":
        forward = product(s.groups * s.rank, efficiency=LIBRARY)  # zeros off the diagonal are multiplied too
        backward = product(s.rank, efficiency=LIBRARY)
        return s_pass + ds_pass + LAUNCH + forward + backward + adapters  # LAUNCH: a copy of ds
    if name in ("tma", "tma_flat", "tma_warps"):
        backward = product(s.rank, efficiency=TMA) if s.groups == 1 else product(s.rank)
        forward = product(s.rank, efficiency=TMA, launches=s.groups)
        return s_pass + ds_pass + forward + backward + adapters
    if name == "wgmma":
        casts = s.groups + (1 if s.groups == 1 else 2)  # of each B, and of A stacked
        rate = min(TMA, s.d / (s.d + WGMMA_EPILOGUE))
        products = product(s.rank, efficiency=rate, launches=s.groups) + product(s.rank, efficiency=rate)
        return s_pass + ds_pass + products + casts * LAUNCH + adapters
    if name == "two_streams":
        # One joint roofline for the product and the sums: the most that overlapping can bring.
        operations = 2 * s.tokens * s.d * (s.d + s.rank) * s.groups / (rates.matmul * TRITON)
        size = s.activation * (3 + 2 * s.groups) + 2 * s.groups * s.d**2 + 2 * parts
        return s_pass + ds_pass + product(s.rank) + max(operations, size / rates.copy) + 2 * LAUNCH
    raise KeyError(name)


NAMES = (
    "shipped", "library", "in_loop", "one_read", "bordered", "tma", "tma_flat", "tma_warps", "wgmma", "two_streams",
)  # fmt: skip


def main() -> None:
    names = [name for name in NAMES if not name.startswith("tma_")]
    print("| tokens, d, r, linears | frozen, µs | " + " | ".join(names) + " |")
    print("| --- " + "| ---: " * (1 + len(names)) + "|")
    for shape in [(8192, d, r, g) for d in (1024, 2048, 4096) for r, g in ((16, 1), (16, 3), (64, 1))] + [
        (512, 1024, 16, 1)
    ]:
        s = Shape(*shape)
        frozen = predict("frozen", s)
        ratios = " | ".join(f"{predict(name, s) / frozen:.2f}" for name in names)
        print(f"| {', '.join(map(str, shape))} | {frozen * 1e6:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
