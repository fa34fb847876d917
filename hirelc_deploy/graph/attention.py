"""In: operations of an attention. Out: their rules, registered with the others: heads go, summed dims stay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hirelc_deploy.graph.labels import AttentionUse, Factor, Value, Walk, WeightUse, handles, only, unknown, where
from hirelc_deploy.graph.rules import factors_at, permuted, repeated, tie_bias
from hirelc_deploy.graph.sizes import TensorRef
from hirelc_deploy.graph.trace import BATCH, Op, refs


@handles("scaled_dot_product_attention")
def _attention(walk: Walk, op: Op) -> Value:
    q, k, v = (walk.value(op.arg(place, name)) for place, name in enumerate(("query", "key", "value")))
    mask = op.arg(3, "attn_mask")
    if op.arg(7, "enable_gqa", False) and q.shape[-3] != k.shape[-3]:
        # Every head of keys and values serves the same number of query heads, which must stay so.
        k, v = (repeated(t, -3, q.shape[-3] // t.shape[-3]) if t.shape[-3] > 1 else t for t in (k, v))
    scores = _product(walk, q, _swapped(k, -1, -2), op)
    if mask is not None:
        scores = walk.elementwise([scores, walk.value(mask)], f"meets a mask that cannot be cut in {where(op)}")
    _note_attention(walk, op, scores, q.shape[-1], products=2)
    return _product(walk, scores, v, op)


@handles("baddbmm")
def _baddbmm(walk: Walk, op: Op) -> Value:
    added, a_ref, b_ref = (op.arg(place, name) for place, name in enumerate(("input", "batch1", "batch2")))
    result = _product(walk, walk.value(a_ref), walk.value(b_ref), op)
    if op.kwargs.get("beta", 1) != 0:
        result = walk.elementwise([result, walk.value(added)], f"meets values that cannot be cut in {where(op)}")
    else:
        walk.freeze_all(walk.value(added), f"read by {where(op)}")
    if a_ref.name is None and b_ref.name is None:
        _note_attention(walk, op, result, a_ref.shape[-1], products=1)
    return result


@handles("matmul", "bmm")
def _matmul(walk: Walk, op: Op) -> Value:
    a_ref, b_ref = list(refs((op.args, op.kwargs)))
    if min(len(a_ref.shape), len(b_ref.shape)) < 2:
        return unknown(walk, op)[0]
    result = _product(walk, walk.value(a_ref), walk.value(b_ref), op)
    if a_ref.name is None and b_ref.name is None:
        _note_attention(walk, op, result, a_ref.shape[-1], products=1)
    return result


def _product(walk: Walk, a: Value, b: Value, op: Op) -> Value:
    """Return the value of a @ b: the summed dims stay whole, the leading dims meet element by element."""
    # Cutting query and key dims would be exact but for the scale, which is taken from their number.
    reason = f"summed over in {where(op)}"
    a = walk.freeze(a, len(a.shape) - 1, reason)
    b = walk.freeze(b, len(b.shape) - 2, reason)
    if len(a.shape) == len(b.shape) and any(b.shape[d] == 1 and a.factor_of(d) for d in range(len(b.shape) - 2)):
        # Heads that share their values: the heads go, what one head holds stays.
        b = walk.freeze(b, len(b.shape) - 1, f"shared by the heads of {where(op)}")
    left = Value((*a.shape[:-1], 1), a.factors)
    right = Value((*b.shape[:-2], 1, b.shape[-1]), b.factors)
    return walk.elementwise([left, right], f"meets values that cannot be cut in {where(op)}")


def _swapped(value: Value, first: int, second: int) -> Value:
    rank = len(value.shape)
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return permuted(value, order)


def _note_attention(walk: Walk, op: Op, scores: Value, inner: int, products: int) -> None:
    """Note the core of an attention; the two products of a hand-written one are noted as one core."""
    name = op.module or "attention"
    leading = range(1, len(scores.shape) - 2)
    dim = next((d for d in leading if scores.factor_of(d) is not None), 1)
    heads = math.prod(scores.shape[d] for d in leading) if scores.factor_of(dim) is None else scores.shape[dim]
    windows = math.prod(scores.shape[:-2]) // (BATCH * heads)
    factor, labels = scores.factor_of(dim), None
    merged = scores.factor_of(0) if len(scores.shape) == 3 else None
    if merged is not None and merged.dims == (0,):  # heads and images in one dim
        labels = np.unique(merged.labels)
        heads, windows = len(labels), scores.shape[0] // (BATCH * len(labels))
        walk.couplings.mark(labels, "attention heads")
    elif factor is not None:
        axis = factor.dims.index(dim)
        labels = factor.labels if len(factor.dims) == 1 else factor.labels[only(axis, factor.labels.ndim)].ravel()
        walk.couplings.mark(labels, "attention heads")
    before = next((u for u in walk.found.uses if isinstance(u, AttentionUse) and u.name == name), None)
    if before is not None and products == 1 and before.products == 1:
        before.products = 2
    else:
        source = next(iter(refs((op.args, op.kwargs))))
        walk.found.uses.append(
            AttentionUse(name, heads, inner, scores.shape[-2] * windows, scores.shape[-1], labels, products, source)
        )


@handles("einsum")
def _einsum(walk: Walk, op: Op) -> Value:
    """Dims of the same letter meet element by element; letters that the result lacks are summed over."""
    operands = list(refs(op.args[1:]))
    terms = _einsum_terms(op.args[0], [len(ref.shape) for ref in operands]) if isinstance(op.args[0], str) else None
    if terms is None:
        return unknown(walk, op)[0]
    *inputs, output = terms
    letters = list(dict.fromkeys("".join((*inputs, output))))
    values = []
    for ref, term in zip(operands, inputs, strict=True):
        value = walk.value(ref)
        for dim, letter in enumerate(term):
            if letter not in output:
                value = walk.freeze(value, dim, f"summed over in {where(op)}")
        shape = tuple(ref.shape[term.index(letter)] if letter in term else 1 for letter in letters)
        values.append(value.moved(shape, lambda dim, term=term: letters.index(term[dim])))  # type: ignore[misc]
    joined = walk.elementwise(values, f"meets values that cannot be cut in {where(op)}")
    summed = [letter for letter in letters if letter not in output]
    if len(summed) == 1 and len(operands) == 2 and all(ref.name is None for ref in operands):
        rows, columns = ([x for x in output if x in one and x not in other] for one, other in (inputs, inputs[::-1]))
        if len(rows) == len(columns) == 1:
            shared = [letter for letter in output if letter not in (*rows, *columns)]
            scores = _picked_letters(joined, letters, [*shared, *rows, *columns])
            _note_attention(walk, op, scores, joined.shape[letters.index(summed[0])], products=1)
    return _picked_letters(joined, letters, output)


def _picked_letters(value: Value, letters: Sequence[str], wanted: Sequence[str]) -> Value:
    """Return the value with the dims of these letters in this order; the others carry no labels."""
    shape = [value.shape[letters.index(letter)] for letter in wanted]
    return value.moved(shape, lambda dim: wanted.index(letters[dim]))


def _einsum_terms(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """Return one string of letters per operand and one for the result, or None where a letter repeats in a term."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    dots = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(inputs, ranks, strict=True) if "..." in t), default=0
    )
    digits = "0123456789"[:dots]
    for place, (term, rank) in enumerate(zip(inputs, ranks, strict=True)):
        mine = rank - len(term.replace("...", ""))
        inputs[place] = term.replace("...", digits[dots - mine :] if mine else "")
    if not arrow:
        every = "".join(inputs)
        right = digits + "".join(sorted(x for x in set(every) if every.count(x) == 1 and x.isalpha()))
    terms = [*inputs, right.replace("...", digits)]
    return None if any(len(set(term)) != len(term) for term in terms) else terms


@handles("multi_head_attention_forward")
def _multi_head(walk: Walk, op: Op) -> Sequence[Value]:
    """torch's own attention in one call.

    Its heads times their size must be the width of the queries, so a head goes together with that many of the
    features it reads: those in its place.
    """
    query, key, value, embed_dim, heads, in_weight, in_bias = op.args[:7]
    extra = [op.arg(place, name) for place, name in ((7, "bias_k"), (8, "bias_v"), (21, "static_k"), (22, "static_v"))]
    if any(tensor is not None for tensor in extra) or not isinstance(in_weight, TensorRef) or len(query.shape) != 3:
        return unknown(walk, op)
    reason = f"meets features that cannot be cut at {where(op)}"
    by_head = walk.couplings.fresh(int(heads))
    walk.couplings.mark(by_head, "attention heads")
    in_rows = walk.one_dim(walk.value(in_weight), 0, reason)[1]
    in_columns = walk.one_dim(walk.value(in_weight), 1, reason)[1]
    out_weight = op.arg(11, "out_proj_weight")
    out_columns = walk.one_dim(walk.value(out_weight), 1, reason)[1]
    out_rows = walk.one_dim(walk.value(out_weight), 0, reason)[1]
    for ref in (query, key, value):
        features = walk.one_dim(walk.value(ref), 2, reason)[1]
        walk.tie_or_pin(features, in_columns, reason)
        if ref is query:
            walk.written_size(walk.value(ref), 2, embed_dim, op)
    for labels in (in_rows, in_columns, out_columns):
        if labels is not None:
            walk.couplings.tie(labels.reshape(-1, len(by_head), in_weight.shape[1] // len(by_head)), by_head[:, None])
    walk.written_size(Value((len(by_head),), (Factor((0,), by_head),)), 0, heads, op)
    tie_bias(walk, in_bias, in_rows)
    tie_bias(walk, op.arg(12, "out_proj_bias"), out_rows)
    result, *weights = refs(op.result)
    for weight, ref, out in ((in_weight, query, query), (out_weight, result, result)):
        name = (weight.name or "").removesuffix(".weight")
        use = WeightUse(name, "linear", weight.name or "", ref, out, weight.shape[1], weight.shape[0], None, None)
        use.in_labels, use.out_labels = (
            walk.one_dim(walk.value(weight), 1, "")[1],
            walk.one_dim(walk.value(weight), 0, "")[1],
        )
        use.called = False
        walk.found.uses.append(use)
    tokens, head_dim = (query.shape[0], key.shape[0]), query.shape[2] // len(by_head)
    core = AttentionUse(op.module or "attention", len(by_head), head_dim, *tokens, by_head, 2, query)
    walk.found.uses.append(core)
    return [Value(result.shape, factors_at(2, out_rows)), *(Value(ref.shape) for ref in weights)]
