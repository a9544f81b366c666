"""Plans for training and for translation inside a budget of bytes, found before a weight is loaded.

Levers: micro-batches, a tier for each layer, the loss' chunk, the storage of frozen weights in layers and in tables
(token embeddings, output projection), layers streamed from host memory, the dtype of waiting gradients, 8-bit optimiser
state. All are exact but those that ``allow`` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from petl_kernels.device import resolve
from petl_kernels.errors import InputError, check_flag, check_whole, shown
from petl_kernels.machine import available_bytes
from petl_kernels.models.structure import check_model, describe
from petl_kernels.ops.quantized import parts_of
from petl_kernels.planning.beam_search import Search, SearchBytes, output_length
from petl_kernels.planning.budget import CUDA_CONTEXT, SLACK, smallest_budget, usable
from petl_kernels.planning.cards import Card
from petl_kernels.planning.chooser import Chooser
from petl_kernels.planning.cost import ASSUMED, measure_rates
from petl_kernels.planning.figures import Figures, product_dtype
from petl_kernels.planning.host import no_room_on_host, on_host
from petl_kernels.planning.levers import Request, streamed_layers
from petl_kernels.planning.plan import Plan, check_allow, host_peak
from petl_kernels.planning.resident import OPTIMIZER_BYTES, FrozenWeights
from petl_kernels.step.cap import check_memory
from petl_kernels.step.graphs import check_device
from petl_kernels.units import format_below, format_least, format_size, parse_size

AUTOCAST = (None, torch.bfloat16, torch.float16)


def plan(
    model: nn.Module,
    memory: str | int,
    batch_tokens: int = 4096,
    optimizer: str = "adamw",
    *,
    max_length: int = 256,
    allow: Sequence[str] = (),
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    tier: int | None = None,
    beam: int = 5,
    cuda_graphs: bool = False,
    packed: bool = False,
    host_memory: str | int | None = None,
    host_data: int = 0,
) -> Plan:
    """Returns the fastest plan to train ``model``, adapted and possibly on the meta device, inside ``memory`` bytes.

    batch_tokens: padded tokens of the longer side in one update. max_length: tokens of the longest sentence. allow: the
    approximations that may be used, of ``APPROXIMATIONS``; none by default. autocast: the dtype of products, where the
    training loop uses ``torch.autocast``. tier: of all layers; chosen when not given. beam: of the evaluation's search.
    cuda_graphs: leave out what a graph cannot hold, and count what graphs take (``graphs.graph_bytes``).
    packed: micro-batches are packed rows (``pack``) where the model reads them, of at most ``micro_tokens`` a side.
    host_memory: bytes of host memory beside a CUDA device, without Python's own; None is what is free where there is
    such a device, else no limit. On a CPU ``memory`` is host memory. host_data: bytes of host memory, on a CPU of
    ``memory``, that the caller's data take.
    Raises InputError: a memory that is no size, or that nothing fits into (with the least that can), a model of another
    family, an approximation that does not exist, a budget above what the device has.
    """
    check_model(model)
    budget, found = parse_size(memory), _planned_device(device)
    host = host_limit(found, budget, host_memory, host_data)
    allowed = check_allow(allow)
    training = batch_tokens, max_length, optimizer, allowed, found, autocast, tier, beam, cuda_graphs, packed
    request = Request(*training, host, host_data)
    _check_request(request, budget)
    if cuda_graphs:
        check_device(found)
        if tier == 5:
            raise InputError("tier 5: a CUDA graph holds no inputs in host memory; expected 1 to 4 with cuda_graphs")
    return _chooser(model, request).best(budget)


def card_planner(model: nn.Module, request: Request) -> Callable[[Card, bool], Plan]:
    """Returns a function of a card and of whether steps are captured as CUDA graphs that makes the plan for that card.

    model: as ``plan`` takes it. request: for a CUDA device, which need not be here. The plan is the fastest inside the
    card's memory by the card's rates; its bytes are counted once for all cards. The function raises InputError where
    nothing fits, with the least that can. Raises InputError for a model with experts.
    """
    _check_model(model)
    dtype = product_dtype(model, request.autocast)
    figures = Figures(model, request, ASSUMED)

    def plan_for(card: Card, graphs: bool) -> Plan:
        return Chooser(figures.on(card.rates(dtype), graphs)).within(card.memory)

    return plan_for


def host_limit(
    device: torch.device, memory: int, host_memory: str | int | None = None, host_data: int = 0
) -> int | None:
    """Returns the bytes of host memory that a plan for ``device`` may take beside it; None is no limit.

    host_data: bytes that are there already, and free no more. Raises InputError for a limit on a CPU that is below
    ``memory``, since both are the same memory there.
    """
    given = None if host_memory is None else parse_size(host_memory)
    if device.type == "cpu":
        if given is not None and given < memory:
            raise InputError(
                f"host_memory {format_size(given)}: below memory {format_size(memory)}, which is host memory on a CPU; "
                "expected memory alone"
            )
        return None
    if given is not None or not torch.cuda.is_available():
        return given
    free = available_bytes()
    return None if free is None else free + host_data


def tiers_in_place(
    model: nn.Module, memory: str | int | None, batch_tokens: int, max_length: int, autocast: torch.dtype | None
) -> tuple[tuple[int, ...], int]:
    """Returns (a tier for each layer, the loss' chunk in bytes) for ``pk.lean(model, "auto")``.

    memory: a budget, or None for what is free. Raises InputError as ``pk.lean`` does.
    """
    _check_model(model)
    device = next(model.parameters()).device
    if device.type not in SLACK:
        raise InputError(f"tier 'auto': the model is on {str(device)!r}; expected cpu or cuda, or pk.plan for a device")
    budget = _free_with(model, device) if memory is None else parse_size(memory)
    request = Request(batch_tokens, max_length, device=device, autocast=autocast)
    _check_request(request, budget)
    return _chooser(model, request).tiers_in_place(budget)


def _chooser(model: nn.Module, request: Request) -> Chooser:
    _check_model(model)  # before anything is measured
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"model {type(model).__name__}: trains nothing; expected one with an adapter (pk.adapt)")
    rates = measure_rates(request.device, product_dtype(model, request.autocast))
    return Chooser(Figures(model, request, rates))


def _check_model(model: nn.Module) -> None:
    """Raises InputError for what has no layers to plan for, and for networks of experts: what these hold depends on
    the tokens, and no simulation has any."""
    experts = next((layer.ffn.out for layer in describe(model).layers if not layer.ffn.inputs), "")
    if experts:
        name = type(model).__name__
        raise InputError(
            f"model {name}: {experts} is a network of experts, and no plan counts the rows that each of them reads; "
            "expected no budget"
        )


def _free_with(model: nn.Module, device: torch.device) -> int:
    """Returns the bytes that are free, and those that ``model`` has of them already; on CUDA the context's too."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(total, free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT)
    free = available_bytes()
    if free is None:
        raise InputError("tier 'auto': memory not given, and this system does not say; expected memory='8GiB'")
    return free + sum(tensor.nbytes for parameter in model.parameters() for tensor in parts_of(parameter))


def _planned_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device(resolve().type)  # a plan holds for whichever card runs it
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    is_bool = isinstance(device, bool)  # pyright: ignore[reportUnnecessaryIsInstance]  # a card's number to torch
    if found is None or is_bool or found.type not in SLACK:
        raise InputError(f"device {shown(device)}: expected {' or '.join(sorted(SLACK))}")
    return found


def _check_request(request: Request, budget: int) -> None:
    check_whole("plan: batch_tokens", request.batch_tokens)
    check_whole("plan: max_length", request.max_length)
    is_name = isinstance(request.optimizer, str)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not is_name or request.optimizer not in OPTIMIZER_BYTES:
        raise InputError(f"optimizer {shown(request.optimizer)}: expected {' or '.join(OPTIMIZER_BYTES)}")
    if not any(request.autocast is dtype for dtype in AUTOCAST):
        raise InputError(f"autocast {shown(request.autocast)}: expected {', '.join(map(str, AUTOCAST))}")
    if request.device.type == "cuda" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if (request.device.index or 0) >= count:
            raise InputError(f"device {str(request.device)!r}: there are {count} such; expected one of them")
        check_memory(budget, request.device)
    check_whole("plan: beam", request.beam)
    if request.tier is not None:
        check_whole("tier", request.tier, 0, 5)
    check_flag("cuda_graphs", request.graphs)
    check_flag("packed", request.packed)


# ---- translation


@dataclass(frozen=True)
class SearchPlan:
    """How a trained model translates inside a budget: what ``load_planned`` reads, and the bytes of batches."""

    storage: str
    tables: str
    streamed: int
    device: str
    search: SearchBytes
    host: dict[str, int] = dataclasses.field(default_factory=dict[str, int])  # as ``Plan.host``


def plan_search(
    model: nn.Module,
    memory: int,
    storages: tuple[str, str],
    beam: int,
    longest: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    refuse: bool = True,
    host_memory: int | None = None,
) -> SearchPlan:
    """Returns the plan with the fewest streamed layers with which beam search of ``model`` fits ``memory`` bytes.

    model: possibly on the meta device. storages: of the frozen weights, in layers and in tables. longest: tokens of the
    longest sentence and of the longest translation. Where one such sentence does not fit: raises InputError, with the
    least that works, or if not ``refuse`` returns the leanest plan, in which shorter sentences may fit. host_memory: of
    ``host_limit``; raises InputError where the host has less than the weights take, and for a model with experts.
    """
    _check_model(model)
    weights, kind = FrozenWeights(model, describe(model), device.type), device.type
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    search = Search(model, beam, 1, autocast).bytes(0, longest)
    one = search.always + search.of(longest, output_length(longest, longest))
    can_stream = weights.can_stream and (storages[0] == "dense" or kind == "cuda")
    needs: list[int] = []
    hosts: list[int] = []
    found = None
    for streamed in streamed_layers(len(weights.layers)) if can_stream else (0,):
        always = weights.resident(*storages, streamed) + trained
        room = usable(memory, kind) - always
        host = on_host(model, weights, *storages, streamed) if kind == "cuda" else {}
        hosts.append(host_peak(host))
        if host_memory is not None and hosts[-1] > host_memory:
            continue
        found = SearchPlan(*storages, streamed, kind, dataclasses.replace(search, memory=room), host)
        if room >= one:
            return found
        needs.append(smallest_budget(always + one, kind))
    if found is None:
        raise no_room_on_host(host_memory or 0, min(hosts))
    if not refuse:
        return found
    least = min(needs)
    raise InputError(
        f"memory {format_below(memory, least)}: to translate one sentence of {longest} tokens with {beam} beams needs "
        f"{format_least(least)}; expected at least that, or a smaller --beam or --max-length"
    )
