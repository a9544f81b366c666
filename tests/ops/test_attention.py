from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from petl_kernels import ops, parity
from petl_kernels.errors import InputError
from petl_kernels.ops import attention_reference, philox

from . import contract

FP32, FP64 = torch.float32, torch.float64
BF16 = torch.bfloat16


def arguments_of(dtype, seed=0, **options) -> dict:
    return parity.attention_arguments(contract.source(dtype, seed), **options)


def public(given: dict, **change) -> Tensor:
    given = {name: value for name, value in (given | change).items() if name != "do"}
    return ops.attention(**given)


def plain(given: dict) -> Tensor:
    """The formula on whole, concatenated tensors, differentiated by autograd."""
    q, k, v, mask, bias = (given[name] for name in ("q", "k", "v", "mask", "bias"))
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    s = given["scale"] * q @ k.mT
    if bias is not None:
        s = s + bias
    hidden = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        s = s + mask
    if given["causal"]:
        hidden = hidden | (distances_of(given) > 0)
    if given["distance_bias"] is not None:
        reach = given["distance_bias"].shape[1] // 2
        s = s + given["distance_bias"][:, distances_of(given).clamp(-reach, reach) + reach]
    if given["cu_seqlens_q"] is not None:
        of_query, of_key = (sentence_of(given[f"cu_seqlens_{name}"]) for name in "qk")
        hidden = hidden | (of_query[:, None] != of_key)
    s = s.masked_fill(hidden, -torch.inf)
    if given["prefix_k"] is not None:
        prefix_k, prefix_v = (given[n].transpose(0, 1).expand(batch, -1, -1, -1) for n in ("prefix_k", "prefix_v"))
        s = torch.cat([given["scale"] * q @ prefix_k.mT, s], -1)
        v = torch.cat([prefix_v, v], 2)
    p = s.masked_fill((s == -torch.inf).all(-1, keepdim=True), 0).softmax(-1).masked_fill(s == -torch.inf, 0)
    if given["dropout"]:
        prefix = 0 if given["prefix_k"] is None else given["prefix_k"].shape[0]
        p = p * kept(given["seed"], (batch, heads, queries), prefix, keys, given["dropout"])
    return p @ v


def kept(seed: Tensor, rows: tuple[int, ...], prefix: int, keys: int, dropout: float) -> Tensor:
    """Returns the factors of probabilities: prefix and keys each begin a group of 32, in which places are swapped."""
    places = [32 * (j // 32) + 8 * (j // 2 % 4) + 2 * (j // 8 % 4) + j % 2 for j in range(prefix)]
    first = -(-prefix // 32) * 32
    places += [first + 32 * (j // 32) + 8 * (j // 2 % 4) + 2 * (j // 8 % 4) + j % 2 for j in range(keys)]
    mask = philox.keep_mask(seed, (*rows, first + -(-keys // 32) * 32), dropout)
    return mask[..., places].double() * philox.keep_scale(dropout)


def sentence_of(cu: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff())


def distances_of(given: dict) -> Tensor:
    """How far behind its query each key is, by positions in their sentences: (queries, keys)."""
    queries, keys = given["q"].shape[2], given["k"].shape[2]
    i, j = torch.arange(queries), torch.arange(keys)
    if given["cu_seqlens_q"] is None:
        return j - (i + keys - queries)[:, None]
    cu_q, cu_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
    of_query, of_key = sentence_of(cu_q), sentence_of(cu_k)
    level = i - cu_q[of_query] + (cu_k.diff() - cu_q.diff())[of_query]
    return j - cu_k[of_key] - level[:, None]


SENTENCES = ((5, 7), (0, 3), (1, 1), (9, 5), (2, 0), (0, 0), (11, 13), (0, 0))
FORMS = {
    "plain": {},
    "padding": {"mask": "padding"},
    "queries that see nothing": {"mask": "rows"},
    "additive": {"mask": "additive"},
    "finfo.min": {"mask": "finfo"},
    "causal": {"causal": True},
    "causal, more keys": {"causal": True, "keys": 23},
    "causal, fewer keys": {"causal": True, "keys": 12},
    "causal, rows": {"causal": True, "mask": "rows"},
    "scale 1": {"scale": 1.0},
    "bias": {"bias": 1},
    "bias of a batch": {"bias": 2, "mask": "rows"},
    "bias, causal, dropout": {"bias": 1, "causal": True, "dropout": 0.2},
    "dropout": {"dropout": 0.3},
    "prefix": {"prefix": 3},
    "prefix, rows": {"prefix": 4, "mask": "rows"},
    "prefix, finfo.min": {"prefix": 4, "mask": "finfo"},
    "prefix, causal": {"prefix": 1, "causal": True, "keys": 30},
    "distance": {"reach": 4},
    "distance, rows, prefix": {"reach": 30, "mask": "rows", "prefix": 3},
    "distance of 0": {"reach": 0, "causal": True},
    "distance, bias, causal, more keys": {"reach": 3, "bias": 1, "causal": True, "keys": 23, "dropout": 0.2},
    "packed": {"sentences": SENTENCES},
    "packed, one sentence": {"sentences": ((7, 5),)},
    "packed, causal": {"sentences": SENTENCES, "causal": True},
    "packed, dropout": {"sentences": SENTENCES, "dropout": 0.3},
    "packed, prefix, dropout": {"sentences": SENTENCES, "prefix": 3, "dropout": 0.3},
    "packed, distance": {"sentences": SENTENCES, "reach": 3},
    "packed, everything": {"sentences": SENTENCES, "reach": 5, "causal": True, "prefix": 5, "dropout": 0.4},
    "everything": {"prefix": 5, "mask": "rows", "bias": 1, "causal": True, "dropout": 0.4, "keys": 20},
}


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(backend, dtype, form):
    contract.assert_parity("attention", backend, arguments_of(dtype, **FORMS[form]))


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 1), (1, 17), (129, 17), (17, 129)])
@pytest.mark.parametrize("d", [1, 13, 64])
def test_sizes(backend, dtype, queries, keys, d):
    given = arguments_of(dtype, heads=2, queries=queries, keys=keys, d=d, prefix=3, mask="padding")
    contract.assert_parity("attention", backend, given)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "prefix": 20}], ids=str)
def test_long(backend, dtype, options):
    given = arguments_of(dtype, batch=1, heads=1, queries=700, keys=650, d=64, **options)
    contract.assert_parity("attention", backend, given)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("options", [{}, {"bias": 2, "reach": 2}, {"dropout": 0.2, "prefix": 3}], ids=str)
def test_non_contiguous_and_expanded(backend, options):
    draw = contract.source(FP32)
    given = arguments_of(FP32, batch=2, heads=3, queries=6, keys=5, d=8, mask="rows", **options)
    given["q"] = draw(2, 3, 6, 16)[..., ::2]
    given["k"] = draw(2, 3, 8, 5).mT
    given["v"] = draw(3, 5, 8).expand(2, 3, 5, 8)
    given["do"] = draw(8).expand(2, 3, 6, 8)
    given["mask"] = given["mask"].expand(2, 3, 6, 5)
    contract.assert_parity("attention", backend, given)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": 1, "prefix": 2, "dropout": 0.1, "reach": 2}], ids=str)
def test_zero_rows(backend, sizes, options):
    batch, queries, keys = sizes
    given = arguments_of(FP32, batch=batch, queries=queries, keys=keys, d=8, **options)
    values = parity.run("attention", backend, given)
    assert values["o"].shape == values["dq"].shape == (batch, 3, queries, 8)
    assert values["dk"].shape == values["dv"].shape == (batch, 3, keys, 8)
    for name in ("dq", "dk", "dv", "dbias"):
        if name in values and not (keys == 0 and name == "dq"):
            assert not values[name].any(), name
    contract.assert_parity("attention", backend, given)


LEAVES = ("q", "k", "v", "bias", "prefix_k", "prefix_v", "distance_bias")


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_autograd_equals_the_formula(backend, form):
    given = arguments_of(FP64, **FORMS[form])
    leaves = {name: given[name] for name in LEAVES if given[name] is not None}
    with ops.use(backend):
        computed = contract.gradients(lambda **leaves: public(given, **leaves), leaves, given["do"])
    expected = contract.gradients(lambda **leaves: plain(given | leaves), leaves, given["do"])
    contract.assert_close_by_name(computed, expected, 1e-12)


# The gradients of every form are those of PyTorch's autograd through the formula: here some by differences, too.
DIFFERENCES = ("plain", "queries that see nothing", "bias of a batch", "packed, everything", "everything")


@pytest.mark.parametrize("backend", contract.HELD)
# finfo.min absorbs the scores it is added to: a step in them moves nothing, whatever the derivative.
@pytest.mark.parametrize(
    "form",
    [
        form if form in DIFFERENCES else pytest.param(form, marks=pytest.mark.repeat)
        for form in FORMS
        if form != "finfo.min"
    ],
)
def test_gradcheck(backend, form):
    options = FORMS[form] | {"batch": 2, "heads": 2, "queries": 4, "d": 3}
    if "sentences" in options:
        options["sentences"] = ((2, 3), (0, 1), (1, 0), (3, 2), (0, 0))
    options["keys"] = {30: 6, 23: 5, 20: 5, 12: 3}.get(options.get("keys"), 4)
    given = arguments_of(FP64, **options)
    leaves = {name: given[name].requires_grad_() for name in LEAVES if given[name] is not None}
    with ops.use(backend):
        assert torch.autograd.gradcheck(
            lambda *tensors: public(given, **dict(zip(leaves, tensors, strict=True))), tuple(leaves.values())
        )


def sentence(given: dict, index: int) -> dict:
    """One sentence of a packed row, as a batch of its own."""
    change = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    for names, cu in ((("q", "do"), given["cu_seqlens_q"]), (("k", "v"), given["cu_seqlens_k"])):
        change |= {name: given[name][:, :, cu[index] : cu[index + 1]] for name in names}
    return given | change


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("options", [{}, {"causal": True, "prefix": 3, "reach": 4}], ids=str)
def test_packed_rows_equal_their_sentences(backend, options):
    given = arguments_of(FP64, sentences=SENTENCES, **options)
    leaves = {name: given[name].requires_grad_() for name in LEAVES if given[name] is not None}
    with ops.use(backend):
        packed = public(given)
        apart = torch.cat([public(sentence(given, index)) for index in range(len(SENTENCES))], 2)
    torch.testing.assert_close(packed, apart, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(o, list(leaves.values()), given["do"]) for o in (packed, apart))
    contract.assert_close_by_name(*(dict(zip(leaves, grads, strict=True)) for grads in gradients), 1e-12)


@pytest.mark.parametrize("backend", contract.HELD)
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
def test_long_sentences_in_a_packed_row(backend, dtype):
    """Some take several blocks of queries, between one that takes none and one that takes one."""
    sentences = ((300, 520), (0, 0), (3, 1), (270, 300))
    given = arguments_of(dtype, heads=1, d=24, sentences=sentences, causal=True, reach=40, prefix=3)
    contract.assert_parity("attention", backend, given)


@pytest.mark.parametrize("options", [{}, {"causal": True, "prefix": 3, "reach": 4, "dropout": 0.3}], ids=str)
def test_the_reference_waits_for_no_boundaries(options, monkeypatch):
    """On other devices than a CPU it walks over all keys, which gives the same."""
    given = arguments_of(FP64, sentences=SENTENCES, **options)
    by_sentence = parity.run("attention", "reference", given)
    monkeypatch.setattr(attention_reference, "reads_without_waiting", lambda cu: False)
    contract.assert_close_by_name(parity.run("attention", "reference", given), by_sentence, 1e-12)
    with FakeTensorMode() as mode:  # whose tensors have no values to read
        parity.run(
            "attention", "reference", {n: mode.from_tensor(x) if isinstance(x, Tensor) else x for n, x in given.items()}
        )


def test_work_is_that_of_the_sentences():
    given = arguments_of(FP32, sentences=((40, 50),) * 20 + ((0, 0),) * 5)
    names = ("q", "k", "v", "mask", "bias", "prefix_k", "prefix_v", "causal", "scale", "dropout", "seed")
    inputs = attention_reference.Inputs(
        *(given[name] for name in (*names, "cu_seqlens_q", "cu_seqlens_k", "distance_bias"))
    )
    assert sum(inputs.scores(chunk).numel() for chunk in inputs.chunks()) == 3 * 20 * 40 * 50


@pytest.mark.parametrize("backend", contract.HELD)
def test_packed_halves_of_wider_rows(backend):
    """q, k and v side by side, as one product gives them, boundaries and a table with steps between their numbers."""
    given = arguments_of(FP32, d=8, sentences=tuple((n, n) for n in (5, 1, 0, 11)), reach=2)
    rows = contract.source(FP32)(1, 17, 3, 3, 8)
    given |= {name: rows[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}
    given |= {name: given[name].repeat_interleave(2)[::2] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    given["distance_bias"] = given["distance_bias"][:1].expand(3, 5)
    contract.assert_parity("attention", backend, given)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("buckets", "farthest", "length"), [(32, 128, 150), (8, 20, 47)])
def test_a_bias_by_distance_is_that_of_t5(decoder, buckets, farthest, length):
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        d_model=12, d_kv=4, num_heads=3, is_decoder=decoder,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=farthest,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    weight = theirs.relative_attention_bias.weight
    torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    given = arguments_of(FP64, batch=2, queries=length, keys=length, d=4, causal=decoder, scale=1.0)
    bucket = T5Attention._relative_position_bucket(
        torch.arange(-farthest, farthest + 1), not decoder, buckets, max_distance=farthest
    )
    results = []
    for change in ({"distance_bias": weight[bucket].T}, {"bias": theirs.compute_bias(length, length)}):
        o = public(given, **change)
        results.append({"o": o.detach(), "dweight": torch.autograd.grad(o, weight, given["do"])[0]})
    contract.assert_close_by_name(*results, 1e-12)
    assert results[0]["dweight"].any()


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_scaled_dot_product_attention(backend, causal):
    given = arguments_of(FP32, causal=causal)
    with ops.use(backend):
        ours = public(given)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(*(given[n] for n in "qkv"), is_causal=causal))


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_the_result_is_a_view_of_rows(backend):
    given = arguments_of(BF16)
    with ops.use(backend):
        for change in ({}, {"dropout": 0.2, "seed": torch.tensor([3])}):
            o = public(given, **change)
            assert o.transpose(1, 2).is_contiguous()
            assert o.transpose(1, 2).reshape(2, 17, 48).data_ptr() == o.data_ptr()


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_queries_that_see_nothing(backend, dropout):
    given = arguments_of(FP32, mask="rows", dropout=dropout)
    blind = ~given["mask"].any(-1).expand(2, 3, 17)
    values = parity.run("attention", backend, given)
    assert blind.any() and not values["o"][blind].any() and not values["dq"][blind].any()
    assert all(value.isfinite().all() for value in values.values())


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_chunks_leave_no_seam(backend, dtype, monkeypatch):
    """Several heads, one head, and part of a head at a time."""
    given = arguments_of(dtype, batch=3, bias=1, mask="rows", prefix=3, dropout=0.3)
    whole = parity.run("attention", "reference", given)
    for rows in (3 * 17 * 2, 2 * 17, 17, 5):
        monkeypatch.setattr(attention_reference, "CHUNK_BYTES", rows * 20 * 4)
        for name, value in parity.run("attention", "reference", given).items():
            torch.testing.assert_close(
                value, whole[name], rtol=0.02 if dtype == BF16 else 1e-5, atol=0.03 if dtype == BF16 else 1e-5
            )


def test_chunks_are_contiguous_runs():
    for batch, heads, queries, columns in itertools.product((1, 3), (1, 4), (1, 5), (1, 7, 2**20)):
        index = torch.arange(batch * heads * queries).view(batch, heads, queries)
        runs = [index[part].flatten() for part in attention_reference.transient_chunks(batch, heads, queries, columns)]
        assert torch.equal(torch.cat(runs), index.flatten())


ABSENT = ("mask", "bias", "prefix_k", "prefix_v", "dropout", "seed")


@pytest.mark.parametrize(
    "form",
    ["everything", pytest.param("bare", marks=pytest.mark.repeat), pytest.param("packed", marks=pytest.mark.slow)],
)
def test_opcheck(form):
    given = arguments_of(FP32, batch=2, heads=2, queries=5, keys=4, d=8, mask="rows", bias=1, prefix=2, dropout=0.2)
    if form == "packed":
        given = arguments_of(FP32, heads=2, d=8, prefix=2, dropout=0.2, reach=2, sentences=((3, 2), (0, 0), (2, 2)))
    names = ("q", "k", "v", "mask", "bias", "prefix_k", "prefix_v", "causal", "scale", "dropout", "seed")
    packed = ("cu_seqlens_q", "cu_seqlens_k", "distance_bias")
    inputs = [None if form == "bare" and name in ABSENT else given[name] for name in (*names, *packed)]
    inputs[9] = inputs[9] or 0.0
    o, lse = torch.ops.petl.attention(*inputs, "")
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    contract.opcheck(torch.ops.petl.attention.default, tuple(leaves))
    needs = [inputs[i] is not None for i in (4, 13)]
    backward = (given["do"], *inputs[:3], o, lse, *inputs[3:11], needs[0], *inputs[11:], needs[1])
    contract.opcheck(torch.ops.petl.attention_backward.default, backward)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"mask": "padding"},
        {"mask": "padding", "dropout": 0.1, "bias": 1, "prefix": 4, "reach": 20},
        {"sentences": SENTENCES, "dropout": 0.1, "reach": 3},
    ],
    ids=str,
)
def test_same_bits_in_two_runs(backend, options):
    given = arguments_of(BF16, queries=129, keys=129, **options)
    contract.assert_deterministic("attention", backend, given, threads=(1, 2))


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("form", [{"mask": "rows"}, {"sentences": SENTENCES, "reach": 5}], ids=str)
def test_saves_q_k_v_o_and_lse(backend, dropout, form):
    given = arguments_of(BF16, dropout=dropout, **form)
    for name in "qkv":
        given[name].requires_grad_()
    as_given = ("mask", "seed", "cu_seqlens_q", "cu_seqlens_k", "distance_bias")
    with ops.use(backend):
        saved = contract.bytes_saved(lambda: public(given), [given[n] for n in as_given if given[n] is not None])
    queries, keys = (given[name].shape[0] * given[name].shape[2] for name in "qk")
    assert saved == 2 * (queries + keys) * 3 * 16 * 2 + queries * 4 * 3


def test_autocast_follows_scaled_dot_product_attention():
    given = arguments_of(FP32, mask="additive", prefix=0)
    for name in "qkv":
        given[name].requires_grad_()
    for dtype in (BF16, torch.float16):
        with torch.autocast("cpu", dtype):
            ours = public(given)
            theirs = F.scaled_dot_product_attention(*(given[n] for n in "qkv"), attn_mask=given["mask"].to(dtype))
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
        grads = torch.autograd.grad(ours.float().sum(), [given[n] for n in "qkv"])
        assert {grad.dtype for grad in grads} == {FP32}


@pytest.mark.parametrize("backend", contract.BACKENDS)
def test_only_the_gradients_that_are_needed(backend):
    given = arguments_of(FP32, bias=1, prefix=2)
    with ops.use(backend):
        given["prefix_v"].requires_grad_()
        o = public(given)
        (alone,) = torch.autograd.grad(o, given["prefix_v"], given["do"])
        given["q"].requires_grad_()
        _, together = torch.autograd.grad(public(given), (given["q"], given["prefix_v"]), given["do"])
    torch.testing.assert_close(alone, together)


def test_gradients_come_in_the_dtypes_of_the_inputs():
    given = arguments_of(BF16, prefix=2, prefix_dtype=FP32, reach=3)
    given["bias"] = contract.source(FP32)(1, 3, 17, 17)
    leaves = [given[name].requires_grad_() for name in LEAVES]
    grads = torch.autograd.grad(public(given), leaves, given["do"])
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]


def test_dropout_draws_a_seed():
    given = arguments_of(FP32, dropout=0.5)
    torch.manual_seed(1)
    first, second = public(given, seed=None), public(given, seed=None)
    torch.manual_seed(1)
    assert torch.equal(public(given, seed=None), first) and not torch.equal(first, second)


@pytest.mark.parametrize("backend", contract.BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{"mask": "padding"}, {"dropout": 0.2, "prefix": 2}, {"sentences": SENTENCES, "reach": 3}],
    ids=str,
)
def test_compiles_to_one_graph(backend, options):
    given = arguments_of(FP32, **options)

    def function(q, k, v):
        return public(given, q=q, k=k, v=v).relu()

    with ops.use(backend):
        contract.assert_compiles(function, *(given[name] for name in "qkv"), tolerance=1e-5)


CU = torch.tensor([0, 1, 4], dtype=torch.int32)
PACKED = {"q": torch.ones(1, 3, 4, 8)} | {name: torch.ones(1, 3, 5, 8) for name in "kv"}
PACKED |= {"cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 2, 5], dtype=torch.int32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 8)}, r"q has shape \(3, 8\): expected \(batch, heads, length, features\)"),
        ({"q": torch.ones(2, 3, 4, 8).int()}, "q has dtype torch.int32: expected a floating-point tensor"),
        ({"k": torch.ones(2, 3, 5, 8).half()}, "k has dtype torch.float16: expected that of q, torch.float32"),
        ({"k": torch.ones(2, 3, 5, 7)}, r"k has shape \(2, 3, 5, 7\): expected \(2, 3, 5, 8\)"),
        ({"v": torch.ones(2, 3, 6, 8)}, r"v has shape \(2, 3, 6, 8\): expected \(2, 3, 5, 8\)"),
        ({"v": torch.ones(2, 3, 5, 8, device="meta")}, "v is on meta: expected the device of x, cpu"),
        ({n: torch.ones(2, 3, 5, 0) for n in "qkv"}, r"q has shape \(2, 3, 5, 0\): expected one feature or more"),
        ({"mask": torch.ones(4, 5).bool()}, r"mask has shape \(4, 5\): expected \(2 or 1, 3 or 1, 4 or 1, 5\)"),
        ({"mask": torch.ones(2, 1, 1, 4).bool()}, r"mask has shape \(2, 1, 1, 4\)"),
        ({"mask": torch.ones(2, 1, 1, 5).long()}, "mask has dtype torch.int64: expected torch.bool or a floating"),
        ({"mask": torch.ones(2, 1, 1, 5, requires_grad=True)}, "mask requires grad"),
        ({"mask": torch.ones(2, 1, 1, 5, device="meta")}, "mask is on meta"),
        ({"bias": torch.ones(1, 1, 4, 5)}, r"bias has shape \(1, 1, 4, 5\): expected \(2 or 1, 3, 4, 5\)"),
        ({"bias": torch.ones(1, 3, 4, 5).int()}, "bias has dtype torch.int32"),
        ({"prefix_k": torch.ones(6, 3, 8)}, "prefix_v is None and the other half is not"),
        ({"prefix_v": torch.ones(6, 3, 8)}, "prefix_k is None and the other half is not"),
        ({n: torch.ones(6, 24) for n in ("prefix_k", "prefix_v")}, r"prefix_k has shape \(6, 24\): expected \(prefix,"),
        (
            {"prefix_k": torch.ones(6, 3, 8), "prefix_v": torch.ones(7, 3, 8)},
            r"prefix_v has shape \(7, 3, 8\): expected \(6, 3, 8\)",
        ),
        ({n: torch.ones(6, 3, 8).int() for n in ("prefix_k", "prefix_v")}, "prefix_k has dtype torch.int32"),
        ({"cu_seqlens_q": CU}, "cu_seqlens_k is None and the other one is not: expected both or none"),
        ({"cu_seqlens_k": CU}, "cu_seqlens_q is None and the other one is not: expected both or none"),
        (PACKED | {"cu_seqlens_q": CU.long()}, "cu_seqlens_q has dtype torch.int64: expected torch.int32"),
        (PACKED | {"cu_seqlens_k": CU[None]}, r"cu_seqlens_k has shape \(1, 3\): expected \(sentences \+ 1,\)"),
        (PACKED | {"cu_seqlens_q": CU[:1]}, r"cu_seqlens_q has shape \(1,\): expected \(sentences \+ 1,\) for one"),
        (PACKED | {"cu_seqlens_k": CU[:2]}, r"cu_seqlens_k has shape \(2,\): expected that of cu_seqlens_q, \(3,\)"),
        (PACKED | {"cu_seqlens_k": CU.to("meta")}, "cu_seqlens_k is on meta: expected the device of x, cpu"),
        (
            {"cu_seqlens_q": CU, "cu_seqlens_k": CU},
            r"q has shape \(2, 3, 4, 8\): expected a batch of 1 with cu_seqlens_q",
        ),
        (PACKED | {"mask": torch.ones(1, 1, 1, 5).bool()}, "mask is given with cu_seqlens_q: expected None"),
        (PACKED | {"bias": torch.ones(1, 3, 4, 5)}, "bias is given with cu_seqlens_q: expected None"),
        (PACKED | {"cu_seqlens_q": CU + 1}, "cu_seqlens_q goes from 1 to 5: expected 0 to 4, the tokens"),
        (PACKED | {"cu_seqlens_k": CU}, "cu_seqlens_k goes from 0 to 4: expected 0 to 5, the tokens"),
        (
            PACKED | {"cu_seqlens_q": torch.tensor([0, 5, 4], dtype=torch.int32)},
            "cu_seqlens_q has 5, 4 at 1: expected numbers that do not fall",
        ),
        (
            {"distance_bias": torch.ones(3, 4)},
            r"distance_bias has shape \(3, 4\): expected \(3, 2R \+ 1\), an odd number",
        ),
        ({"distance_bias": torch.ones(2, 5)}, r"distance_bias has shape \(2, 5\): expected \(3, 2R \+ 1\)"),
        ({"distance_bias": torch.ones(5)}, r"distance_bias has shape \(5,\)"),
        ({"distance_bias": torch.ones(3, 5).int()}, "distance_bias has dtype torch.int32: expected a floating-point"),
        ({"distance_bias": torch.ones(3, 5, device="meta")}, "distance_bias is on meta"),
        ({"dropout": 1.0}, r"dropout is 1.0: expected a number in \[0, 1\)"),
        ({"dropout": 1e-6}, "dropout is 1e-06: expected 0, or a number that is 1 to 65535 when rounded to 1 / 65536"),
        ({"dropout": 0.1, "seed": torch.ones(1)}, r"seed is torch.float32 of shape \(1,\)"),
        ({"dropout": 0.1, "seed": torch.ones(1, dtype=torch.int64, device="meta")}, "seed is on meta"),
        (
            {n: torch.ones(1, 1, 1, 8).expand(1024, 16, 512, 8) for n in "qkv"} | {"dropout": 0.1},
            "there are 4294967296 probabilities: expected fewer than 2\\^32 with dropout",
        ),
    ],
)
def test_refuses(change, message):
    given = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 5, 8), "v": torch.ones(2, 3, 5, 8)} | change
    with pytest.raises(InputError, match=message) as error:
        ops.attention(**given)
    assert "\n" not in str(error.value)
