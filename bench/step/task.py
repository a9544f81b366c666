"""A trial and its result: what is trained under which cap, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bench.step.peft_settings import Setting
from bench.step.sentences import Data

RANK = 16
TARGETS = ("q_proj", "v_proj")
SMOOTHING = 0.1


@dataclass(frozen=True)
class Trial:
    """shape: layers of each side, width, feed-forward width, heads, words. memory: bytes of the cap.

    setting, micro_tokens: of PEFT, whose micro-batches have at most that many padded tokens; None are ours, which plan
    with the approximations in ``allow``. taken: bytes of the card that other processes hold.
    """

    shape: tuple[int, int, int, int, int]
    checkpoint: str
    memory: int
    device: str
    data: Data
    rounds: int
    setting: Setting | None = None
    micro_tokens: int = 0
    allow: tuple[str, ...] = ()
    taken: int = 0


@dataclass
class Result:
    """seconds: of each round, which is all updates once. least, most: the bytes needed lie between them.

    failure: why there are no seconds, in one line; out_of_memory and late tell two reasons from the others.
    """

    failure: str = ""
    out_of_memory: bool = False
    late: bool = False
    seconds: list[float] = field(default_factory=list)
    least: int = 0
    most: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    loss: float = math.nan
    setting: str = ""
    plan: dict | None = None
