"""Planning: how one update is computed inside a budget of bytes, found before a weight is loaded.

From the call down to the facts, each module above those that it uses:

    planner       ``plan``, ``tiers_in_place`` and ``plan_search``: the calls, their arguments checked; ``card_planner``
    load          reads a checkpoint's weights into the storage and the place that a plan has for each
    chooser       the fastest candidate that fits, or the leanest one that there is
    figures       the bytes by purpose and the seconds of a candidate
    plan          ``Plan``: what was chosen, as a table and as a file; ``Plan.apply``
    step_bytes    bytes that forward and backward add, from simulations of one and two layers
    beam_search   bytes that beam search adds, from a simulation of its first and last steps
    simulate      runs a training step of a shallow model on fake tensors
    peak, scratch the bytes that live at once in a simulation, and those that an op takes inside itself
    cards         cards by name: memory, and rates that were published or measured
    cost          rates of the device, matrix work of the layers, seconds of an update
    resident      bytes that live as long as a run: weights by storage, gradients, moments of the optimiser
    levers        the training that is planned for, and the choices for it
    budget        bytes that a budget leaves for tensors

Terms that these modules use, and no others for the same things:

    budget        the bytes that the user gives (``memory``); ``usable`` of them remain for tensors
    pairs         sentence pairs of a micro-batch, all of the longest length. In plan files the key is ``rows``
    update        the optimiser's step, on all pairs of a batch; it is computed in ``micro_batches``
    levers        what holds for a whole plan: storages, optimiser, gradients, streamed layers, loss chunk
    tier          how much a layer recomputes in backward, of ``pk.lean``
    candidate     levers, a number of micro-batches and a tier for each layer
    tables        token embeddings and the output projection
    rounding      the levers whose values are rounded: storage, tables, gradients
    kept          bytes that layers hold from forward to backward
    working       bytes beside the kept ones at the worst moment of forward or backward
    by purpose    bytes of a step under the names that a plan shows. In plan files the key is ``parts``
    always        bytes by purpose that live as long as the run
    recomputed    made anew in backward instead of kept
"""
