"""What ranks count of the collectives of a pass, beside what the formula says of it."""

import torch
from sharded_training import FORMS, batches, layouts, loss, make_model, sharded, whole

import pkm_triton as pkm
from pkm_triton.perf.measure.collectives import CollectiveBytes, Counted

KINDS = [(form, torch.float32) for form in FORMS]
KINDS += [(False, torch.bfloat16), ("factored", torch.float64)]


def run_traffic(rank, ranks, folder):
    """Every layout, form and dtype; tokens alike or not, weights narrow or not."""
    for layout, shape in layouts(ranks).items():
        for kind in KINDS if ranks == 2 else KINDS[:3]:
            for equal in (True, False):
                compare(rank, ranks, layout, shape, (*kind, equal))
    _no_tokens(rank, ranks)
    _grows_not(rank, ranks)


def compare(rank, ranks, layout, shape, kind):
    form, dtype, equal = kind
    options = {"equal_tokens": equal, "narrow_weights": not equal}
    model = sharded(form, dtype, layout, shape, rank, **options)
    parts = batches(ranks, 1, dtype, equal=equal)
    counts = [part.shape[0] for part in parts]
    expected = pkm.distributed.traffic(
        model, counts, shape if len(shape) == 2 else ranks, layout,
        rows_read=rows_read(model, parts) if layout == "replicate" else None, **options,
    )  # fmt: skip
    seen = {}
    with CollectiveBytes() as forward:
        out = loss(model, parts[rank])
    with CollectiveBytes() as backward:
        out.backward()
    seen = {"forward": forward.counted, "backward": backward.counted}
    for phase, counted in seen.items():
        told = [
            Counted(c.collective, c.sent[rank], c.received[rank])
            for c in expected.collectives
            if c.phase == phase
        ]
        assert told == counted, (layout, kind, phase, told, counted)
    assert expected.sent(rank, "forward") == forward.sent
    assert expected.received(rank) == forward.received + backward.received
    _within_bounds(expected, counts, layout, shape, (model[1], options))


def rows_read(model, parts):
    """How many rows of the shared table each rank's tokens read, by both layers."""
    alone = make_model(model[1].sparse_grad, model[1].values.dtype)
    alone.load_state_dict({name: whole(p) for name, p in model.state_dict().items()})
    found = []
    with torch.no_grad():
        for x in parts:
            hidden = alone[0](x)
            slots = [alone[1].lookup(hidden)[1].flatten()]
            slots.append(alone[3].lookup(alone[2](alone[1](hidden)))[1].flatten())
            found.append(torch.cat(slots).unique().numel())
    return found


def _within_bounds(expected, counts, layout, shape, made):
    """The bounds a layer has: by what its tokens, reads and widths are."""
    layer, options = made
    if layout == "replicate" or not options["equal_tokens"]:
        return
    ranks, tokens = len(counts), counts[0]
    reads, size = layer.heads * layer.top_k, layer.values.itemsize
    pairs = (ranks - 1) * tokens * reads * (12 if size == 8 else 8)
    columns = dict(zip(layout if isinstance(layout, tuple) else (layout,), shape, strict=True))
    width = -(-layer.values.shape[1] // columns.get("columns", 1))
    values = (ranks - 1) * tokens * width * size
    for rank in range(ranks):
        assert expected.sent(rank, "forward") <= 2 * (pairs + values)
        assert expected.sent(rank, "backward") <= 2 * (pairs + (ranks - 1) * tokens * 7 * size)


def _no_tokens(rank, ranks):
    """No rank has tokens: the numbers alone are sent."""
    model = sharded(True, torch.float32, "columns", (ranks,), rank)
    with CollectiveBytes() as forward:
        model(torch.empty(0, 8))
    expected = pkm.distributed.traffic(model, 0, ranks)
    assert forward.sent == expected.sent(rank, "forward") == 2 * 32 * (ranks - 1)


def _grows_not(rank, ranks):
    """Nothing that is sent grows with K, but the dense gradient of replicas."""
    for layout in ("columns", "rows", "replicate"):
        for form in FORMS:
            sent = []
            for num_subkeys in (10, 40):
                model = make_model(form, num_subkeys=num_subkeys)
                traffic = pkm.distributed.traffic(model, 4, ranks, layout)
                sent.append(traffic.sent(rank))
            grows = layout == "replicate" and not form
            assert (sent[0] < sent[1]) == grows, (layout, form, sent)
