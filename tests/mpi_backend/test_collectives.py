"""Every collective against its definition, for every dtype that it takes, on tensors of many strides."""

import itertools

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

REAL = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
INTEGER = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]
ALL = [*REAL, *INTEGER, *COMPLEX, torch.bool, torch.complex32]
SHAPES = [(2, 3), (), (0, 2), (4, 1, 5)]

# Their names from torch 2.13 on, and before.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SUM, AVG, PRODUCT, MIN, MAX = (getattr(dist.ReduceOp, n) for n in ("SUM", "AVG", "PRODUCT", "MIN", "MAX"))
BAND, BOR, BXOR = dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR


def rank():
    return dist.get_rank()


def size():
    return dist.get_world_size()


def of(r, dtype, shape=(2, 3), salt=0):
    """The tensor of rank r: whole numbers from 0 to 3, so that results are exact; complex ones with both parts."""
    generator = torch.Generator().manual_seed(100 * salt + r)
    whole = torch.randint(0, 4, shape, generator=generator)
    if dtype.is_complex:
        return torch.complex(whole.double(), whole.double().flip(-1) if shape else whole.double() + 1).to(dtype)
    return whole.to(torch.float32).to(dtype)


def blank(dtype, shape=(2, 3)):
    return torch.full(shape, 1, dtype=torch.float32).to(dtype)


def strided(tensor):
    """The same elements in memory that is not contiguous, in more than one way."""
    yield tensor.clone()
    if tensor.dim() > 1:
        yield tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.transpose(0, 2).contiguous().transpose(0, 2)
    if tensor.numel():
        wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
        wide[..., 0] = tensor
        yield wide[..., 0]


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.dtype in (torch.complex32, torch.float8_e4m3fn, torch.uint16, torch.uint32, torch.uint64):
        wide = torch.complex64 if found.dtype.is_complex else torch.float64
        found, expected = found.to(wide), expected.to(wide)
    assert torch.equal(found, expected), f"{found} is not {expected}"


def reduced(parts, op):
    """The definition: in numbers that hold every result exactly, then rounded once."""
    dtype = parts[0].dtype
    if op in (BAND, BOR, BXOR):
        function = {BAND: torch.bitwise_and, BOR: torch.bitwise_or, BXOR: torch.bitwise_xor}[op]
        return list(itertools.accumulate((p.to(torch.int64) for p in parts), function))[-1].to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    if op == AVG:  # a division rounds, so it has to be the one that the backend does
        if dtype.is_complex:
            narrow = torch.complex128 if dtype == torch.complex128 else torch.complex64
            both = torch.view_as_real(torch.stack([p.to(narrow) for p in parts]).sum(0)) / len(parts)
            return torch.view_as_complex(both).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (torch.stack([p.to(wide) for p in parts]).sum(0) / len(parts)).to(dtype)
    stack = torch.stack([p.to(wide) for p in parts])
    function = {SUM: torch.sum, PRODUCT: torch.prod, MIN: torch.amin, MAX: torch.amax}[op]
    return function(stack, 0).to(dtype)


def operations(dtype, all_reduce=False):
    if dtype.is_complex:
        return [SUM, AVG, PRODUCT] if all_reduce else [SUM, AVG]
    if dtype.is_floating_point:
        return [SUM, AVG, PRODUCT, MIN, MAX]
    return [SUM, PRODUCT, MIN, MAX, BAND, BOR, BXOR]


def test_all_reduce():
    different = 0
    for dtype in ALL:
        for op in operations(dtype, all_reduce=True):
            parts = [of(r, dtype) for r in range(size())]
            expected = reduced(parts, op)
            different += not torch.equal(parts[rank()].to(torch.complex64), expected.to(torch.complex64))
            for tensor in strided(parts[rank()]):
                if op != PRODUCT or not dtype.is_complex:  # which torch.distributed refuses by itself
                    again = tensor.clone()
                    dist.all_reduce(again, op)
                    same(again, expected)
                chosen = dist.AllreduceOptions()
                chosen.reduceOp = op
                dist.group.WORLD.allreduce([tensor], chosen).wait()  # as C++ calls, of complex numbers as such
                same(tensor, expected)
    assert different > 20, "the definition would not tell a reduction from doing nothing"


def test_conjugates_that_are_lazy_are_read_and_written():
    for dtype in COMPLEX:
        expected = reduced([of(r, dtype) for r in range(size())], SUM)
        tensor = of(rank(), dtype).conj()
        assert tensor.is_conj()
        dist.group.WORLD.allreduce([tensor]).wait()
        same(tensor.resolve_conj(), expected.conj().resolve_conj())
        dist.group.WORLD.broadcast([tensor]).wait()
        same(tensor.resolve_conj(), expected.conj().resolve_conj())
        imaginary = of(rank(), dtype).conj().imag
        assert imaginary.is_neg()
        dist.all_reduce(imaginary)
        same(imaginary.resolve_neg(), -expected.imag)


def test_negatives_that_are_lazy_are_written():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch._neg_view(torch.full((3,), -1.0, dtype=dtype))
        dist.all_reduce(tensor)
        assert tensor.tolist() == [size()] * 3


def test_all_reduce_of_every_shape():
    for shape in SHAPES:
        for tensor in strided(of(rank(), torch.bfloat16, shape)):
            dist.all_reduce(tensor)
            same(tensor, reduced([of(r, torch.bfloat16, shape) for r in range(size())], SUM))


def test_all_reduce_adds_narrow_numbers_in_float32_and_rounds_once():
    for dtype, small in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        tensor = torch.tensor([1.0 if rank() == 0 else small / max(size() - 1, 1) * 2], dtype=dtype)
        dist.all_reduce(tensor)
        assert tensor.item() == 1 + 2 * small
        one_by_one = torch.tensor(1.0, dtype=dtype)
        for _ in range(size() - 1):
            one_by_one = one_by_one + torch.tensor(small / (size() - 1) * 2, dtype=dtype)
        assert size() == 2 or one_by_one.item() == 1, "adding in the narrow dtype would have passed as well"


def test_all_reduce_gives_the_same_bits_everywhere():
    for n in (3, 1000, 300_000):
        tensor = torch.randn(n, dtype=torch.float64)
        dist.all_reduce(tensor)
        others = [torch.empty_like(tensor) for _ in range(size())]
        dist.all_gather(others, tensor)
        assert all(torch.equal(o.view(torch.int64), tensor.view(torch.int64)) for o in others)


def test_all_reduce_writes_tensors_that_require_gradients_or_were_made_in_inference_mode():
    with torch.inference_mode():
        made = torch.ones(3, dtype=torch.bfloat16)
    for tensor in (made, torch.ones(3, dtype=torch.bfloat16, requires_grad=True), torch.ones(3, requires_grad=True)):
        dist.all_reduce(tensor, AVG)
        same(tensor.detach(), torch.ones(3, dtype=tensor.dtype))


def test_all_reduce_coalesced():
    tensors = [of(rank(), torch.float32, (n,), n) for n in (1, 5, 0)]
    with pytest.warns(FutureWarning):
        dist.all_reduce_coalesced(tensors, MAX)
    for n, tensor in zip((1, 5, 0), tensors, strict=True):
        same(tensor, reduced([of(r, torch.float32, (n,), n) for r in range(size())], MAX))
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor, SUM)
    same(tensors[1], size() * reduced([of(r, torch.float32, (5,), 5) for r in range(size())], MAX))


def test_broadcast():
    for dtype, shape, root in itertools.product(ALL, SHAPES, range(size())):
        for tensor in strided(of(rank(), dtype, shape)):
            dist.broadcast(tensor, root)
            same(tensor, of(root, dtype, shape))


def test_reduce():
    for dtype, root in itertools.product(ALL, range(size())):
        for op in operations(dtype):
            for tensor in strided(of(rank(), dtype)):
                dist.reduce(tensor, root, op)
                parts = [of(r, dtype) for r in range(size())]
                same(tensor, reduced(parts, op) if rank() == root else parts[rank()])


def test_all_gather():
    for dtype, shape in itertools.product(ALL, SHAPES):
        for tensor in strided(of(rank(), dtype, shape)):
            outputs = [blank(dtype, shape) for _ in range(size())]
            if len(shape) == 2:
                outputs = [o.t().contiguous().t() for o in outputs]
            dist.all_gather(outputs, tensor)
            for r, output in enumerate(outputs):
                same(output, of(r, dtype, shape))


def test_all_gather_of_different_sizes():
    outputs = [blank(torch.int64, (r,)) for r in range(size())]
    dist.all_gather(outputs, of(rank(), torch.int64, (rank(),)))
    for r, output in enumerate(outputs):
        same(output, of(r, torch.int64, (r,)))


def test_all_gather_single():
    for dtype in ALL:
        output = blank(dtype, (2 * size(), 3))
        all_gather_single(output, of(rank(), dtype))
        same(output, torch.cat([of(r, dtype) for r in range(size())]))
        stacked = blank(dtype, (3, 2, size())).permute(2, 1, 0)
        all_gather_single(stacked, of(rank(), dtype))
        same(stacked.contiguous(), torch.stack([of(r, dtype) for r in range(size())]))


def test_all_gather_single_into_the_tensor_that_holds_the_input():
    whole = torch.zeros(size(), 4)
    whole[rank()] = rank() + 1.0
    all_gather_single(whole, whole[rank()])
    same(whole, torch.arange(1.0, size() + 1)[:, None].expand(-1, 4))


def test_gather():
    for dtype, root in itertools.product(ALL, range(size())):
        for tensor in strided(of(rank(), dtype)):
            outputs = [blank(dtype) for _ in range(size())] if rank() == root else None
            dist.gather(tensor, outputs, root)
            for r, output in enumerate(outputs or []):
                same(output, of(r, dtype))


def test_scatter():
    for dtype, root in itertools.product(ALL, range(size())):
        for output in strided(blank(dtype)):
            inputs = [of(root, dtype, salt=r) for r in range(size())] if rank() == root else None
            dist.scatter(output, inputs, root)
            same(output, of(root, dtype, salt=rank()))


def test_reduce_scatter():
    for dtype in ALL:
        for op in operations(dtype):
            for output in strided(blank(dtype)):
                dist.reduce_scatter(output, [of(rank(), dtype, salt=r) for r in range(size())], op)
                same(output, reduced([of(r, dtype, salt=rank()) for r in range(size())], op))


def test_reduce_scatter_of_different_sizes():
    output = torch.empty(rank() + 1)
    dist.reduce_scatter(output, [of(rank(), torch.float32, (r + 1,), r) for r in range(size())])
    same(output, reduced([of(r, torch.float32, (rank() + 1,), rank()) for r in range(size())], SUM))


def test_reduce_scatter_single():
    for dtype in ALL:
        output = blank(dtype)
        reduce_scatter_single(output, torch.cat([of(rank(), dtype, salt=r) for r in range(size())]))
        same(output, reduced([of(r, dtype, salt=rank()) for r in range(size())], SUM))
    whole = torch.cat([of(rank(), torch.float32, salt=r) for r in range(size())])
    reduce_scatter_single(whole[2 * rank() : 2 * rank() + 2], whole)  # into the input itself
    same(whole[2 * rank() : 2 * rank() + 2], reduced([of(r, torch.float32, salt=rank()) for r in range(size())], SUM))


def test_all_to_all():
    for dtype in ALL:
        outputs = [blank(dtype, (r + rank(),)) for r in range(size())]
        dist.all_to_all(outputs, [of(rank(), dtype, (rank() + r,), r) for r in range(size())])
        for r, output in enumerate(outputs):
            same(output, of(r, dtype, (r + rank(),), rank()))


def test_all_to_all_single():
    for dtype in ALL:
        output = blank(dtype, (2 * size(), 3))
        dist.all_to_all_single(output, torch.cat([of(rank(), dtype, salt=r) for r in range(size())]))
        same(output, torch.cat([of(r, dtype, salt=rank()) for r in range(size())]))
        uneven = [of(rank(), dtype, (rank() + 2 * r, 3), r) for r in range(size())]
        received = [r + 2 * rank() for r in range(size())]
        for output in strided(blank(dtype, (sum(received), 3))):
            dist.all_to_all_single(output, torch.cat(uneven), received, [len(u) for u in uneven])
            same(output, torch.cat([of(r, dtype, (r + 2 * rank(), 3), rank()) for r in range(size())]))


def test_send_and_receive():
    after, before = (rank() + 1) % size(), (rank() - 1) % size()
    for dtype in ALL:
        for output in strided(blank(dtype)):
            sending = dist.isend(of(rank(), dtype).t().contiguous().t(), after, tag=7)
            assert dist.recv(output, before, tag=7) == before
            sending.wait()
            same(output, of(before, dtype))


def test_receive_from_any():
    if rank():
        dist.send(torch.tensor([rank(), 1]), 0, tag=3)
        return
    found = {}
    for _ in range(size() - 1):
        message = torch.zeros(2, dtype=torch.int64)
        source = dist.recv(message, tag=3)
        found[source] = message[0].item()
    assert found == {r: r for r in range(1, size())}


def test_batch_of_sends_and_receives():
    after, before = (rank() + 1) % size(), (rank() - 1) % size()
    output, sent = torch.zeros(1000), torch.full((1000,), float(rank()))
    operations = [dist.P2POp(dist.irecv, output, before), dist.P2POp(dist.isend, sent, after)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    same(output, torch.full((1000,), float(before)))


def test_objects():
    everything = [None] * size()
    dist.all_gather_object(everything, {"rank": rank(), "text": "x" * rank()})
    assert everything == [{"rank": r, "text": "x" * r} for r in range(size())]
    here = [rank(), "of 1"] if rank() == 1 else [None, None]
    dist.broadcast_object_list(here, 1)
    assert here == [1, "of 1"]
    gathered = [None] * size() if rank() == 0 else None
    dist.gather_object(rank() ** 2, gathered)
    assert gathered == ([r**2 for r in range(size())] if rank() == 0 else None)
    mine = [None]
    dist.scatter_object_list(mine, [{"for": r} for r in range(size())] if rank() == 0 else None)
    assert mine == [{"for": rank()}]
