"""Bad input: a clear error on every rank together, nothing changed, nobody left waiting."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.ranks import rank_errors, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import syncbn
import syncbn.numpy
from syncbn.comm import LocalCommunicator
from syncbn.functional import sync_batch_norm

BAD_INPUTS = {
    "channels": (
        torch.randn(2, 5, 3),
        ValueError,
        r"expected an input with 4 channels on axis 1; got 5, shape \(2, 5, 3\)",
    ),
    "no_channels": (torch.randn(2, 0, 3), ValueError, "expected an input with 4 channels on axis 1; got 0"),
    "one_axis": (torch.randn(4), ValueError, r"expected an input of at least 2 axes, \(N, C, ...\); got 1"),
    "no_axes": (torch.tensor(1.0), ValueError, "expected an input of at least 2 axes"),
    "integer": (torch.ones(2, 4, 3, dtype=torch.int64), TypeError, "expected an input of dtype float16, .*; got int64"),
    "complex": (torch.ones(2, 4, dtype=torch.complex64), TypeError, "got complex64"),
    "bool": (torch.ones(2, 4, dtype=torch.bool), TypeError, "got bool"),
    "sparse": (
        torch.randn(2, 4).to_sparse(),
        TypeError,
        "expected input to be a dense torch.Tensor; got a torch.sparse_coo",
    ),
    "device": (torch.randn(2, 4, device="meta"), ValueError, "expected weight on the input's device, meta; got cpu"),
    "ndarray": (np.ones((2, 4), np.float32), TypeError, "expected input to be a dense torch.Tensor; got ndarray"),
}


def untouched(layer):
    tensors = {name: np.asarray(value) for name, value in layer.state_dict().items()}
    return (
        (tensors["running_mean"] == 0).all()
        and (tensors["running_var"] == 1).all()
        and tensors["num_batches_tracked"] == 0
    )


def _forward(rank, group, inputs, options):
    layer = syncbn.SyncBatchNorm(4, process_group=group, **options)
    try:
        layer(inputs[rank])
    finally:
        assert not layer.track_running_stats or untouched(layer), "the running statistics were touched"


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_on_every_rank_is_an_error_on_every_rank(name):
    bad, kind, message = BAD_INPUTS[name]
    for rank, error in enumerate(rank_errors(_forward, 2, "thread", [bad, bad], {})):
        assert type(error) is kind
        with pytest.raises(kind, match=message):
            raise error
        assert str(error).startswith(f"[rank {rank}/2] ")


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
def test_bad_input_on_one_rank_is_an_error_on_every_rank(name, options):
    bad, kind, _ = BAD_INPUTS[name]
    if name == "device" and len(options) == 2:
        return  # nothing in the layer then says which device is right
    _assert_refused_everywhere("thread", bad, kind, options)


@pytest.mark.parametrize("name", ["channels", "integer"])
def test_bad_input_on_one_rank_is_an_error_on_every_rank_over_gloo(name):
    bad, kind, _ = BAD_INPUTS[name]
    _assert_refused_everywhere("gloo", bad, kind, {})


def _assert_refused_everywhere(launcher, bad, kind, options):
    good = torch.randn(2, 4, 3)
    errors = rank_errors(_forward, 3, launcher, [good, bad, good], options)
    assert type(errors[1]) is kind
    for rank in (0, 2):
        assert type(errors[rank]) is RuntimeError
        assert f"[rank {rank}/3] expected statistics from every rank; another rank refused its input" in str(
            errors[rank]
        )


def test_good_input_raises_nothing():
    assert (
        rank_errors(lambda *a: syncbn.SyncBatchNorm(4, process_group=a[1])(torch.randn(2, 4)), 2, "thread")
        == [None] * 2
    )


def _bad_buffers(rank, group, name, value):
    layer = syncbn.SyncBatchNorm(4, process_group=group)
    setattr(layer, name, value)
    layer(torch.randn(2, 4, 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("running_mean", torch.zeros(3)),
        ("running_var", torch.ones(2, 2)),
        ("weight", nn.Parameter(torch.ones(5))),
        ("bias", nn.Parameter(torch.ones(1))),
    ],
    ids=["running_mean", "running_var", "weight", "bias"],
)
def test_vectors_of_the_wrong_length_are_refused_on_every_rank(name, value):
    for error in rank_errors(_bad_buffers, 2, "thread", name, value):
        assert isinstance(error, ValueError)
        assert "of one shape, (C,); got " in str(error)


def _broken(rank, group, name):
    options = {"affine": False, "track_running_stats": False} if name == "num_features" else {}
    layer = syncbn.SyncBatchNorm(4, process_group=group, **options)
    if rank == 1 and name == "num_features":
        layer.num_features = "4"
    elif rank == 1:
        delattr(layer, name)
    layer(torch.randn(2, 4, 3))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("weight", AttributeError, "no attribute 'weight'"),
        ("running_var", AttributeError, "no attribute 'running_var'"),
        ("num_features", ValueError, "expected an input with 4 channels on axis 1; got 4"),
    ],
)
def test_a_layer_that_is_broken_on_one_rank_is_an_error_on_every_rank(name, kind, message):
    errors = rank_errors(_broken, 3, "thread", name)
    assert type(errors[1]) is kind
    assert message in str(errors[1])
    for rank in (0, 2):
        assert "another rank refused its input" in str(errors[rank])


def test_one_running_statistic_alone_is_refused():
    with pytest.raises(ValueError, match="expected running_mean and running_var, or neither; got one"):
        sync_batch_norm(torch.randn(2, 4), torch.zeros(4), None, training=True)


def test_evaluation_without_running_statistics_is_refused():
    with pytest.raises(ValueError, match="expected running_mean and running_var when not training"):
        sync_batch_norm(torch.randn(2, 4), None, None)


def test_bad_input_is_refused_in_evaluation_too():
    layer = syncbn.SyncBatchNorm(4).eval()
    for name in ("channels", "one_axis", "integer"):
        bad, kind, message = BAD_INPUTS[name]
        with pytest.raises(kind, match=message):
            layer(bad)


@pytest.mark.parametrize("bad", [True, "nccl", [0, 1], object(), torch.zeros(2)], ids=lambda bad: type(bad).__name__)
def test_what_is_no_group_is_refused(bad):
    for call in (
        lambda: syncbn.SyncBatchNorm(4, process_group=bad),
        lambda: sync_batch_norm(torch.randn(2, 4), None, None, training=True, process_group=bad),
        lambda: syncbn.scale_loss(torch.tensor(1.0), 1, bad),
        lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm1d(2), bad),
    ):
        with pytest.raises(TypeError, match="expected process_group to be None, a ProcessGroup"):
            call()


def _meshes(rank, group):
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    x = torch.tensor([[1.0], [2.0]]) * (rank + 1)
    with pytest.raises(ValueError, match="expected a DeviceMesh of 1 dimension; got 2"):
        syncbn.SyncBatchNorm(1, process_group=square)
    return [syncbn.SyncBatchNorm(1, momentum=1.0, process_group=g) for g in (flat, square["b"])], x


def _mesh_means(rank, group):
    layers, x = _meshes(rank, group)
    for layer in layers:
        layer(x)
    return [layer.running_mean.item() for layer in layers]


def test_a_device_mesh_of_one_dimension_is_a_group():
    # Rank r holds (1, 2) * (r + 1), of mean 1.5 * (r + 1); the rows of the 2 x 2 mesh are ranks 0, 1 and 2, 3.
    means = run_ranks(_mesh_means, 4, "gloo")
    assert [flat for flat, _ in means] == [3.75] * 4
    assert [row for _, row in means] == [2.25, 2.25, 5.25, 5.25]


def _float64_on_rank_1(rank, group, empty):
    layer = syncbn.SyncBatchNorm(3, process_group=group)
    x = torch.randn(0 if empty and rank == 1 else 8, 3, dtype=torch.float64 if rank == 1 else torch.float32)
    try:
        layer(x)
    finally:
        assert untouched(layer)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("launcher", ["thread", "gloo"])
def test_float64_on_some_ranks_only_is_an_error_on_all(launcher, empty):
    """Theirs would be the only second message, and meet the others' next one."""
    errors = rank_errors(_float64_on_rank_1, 3, launcher, empty)
    assert all(isinstance(error, RuntimeError) for error in errors)
    # Where messages say what they are of, that tells sooner.
    said = {
        "thread": "expected float64 input on every rank or on none; got it on 1 of 3",
        "gloo": "7 float64, float64, eps 1e-05, momentum 0.1, weight and bias from rank 1",
    }
    assert all(said[launcher] in str(error) for error in errors)


def _modified_input(rank, group):
    x = torch.randn(4, 3, requires_grad=True)
    h = x * 1
    y = syncbn.SyncBatchNorm(3, process_group=group)(h)
    if rank == 1:
        h.add_(1)
    y.sum().backward()
    return x.grad


def test_an_error_in_backward_on_one_rank_leaves_nobody_waiting():
    errors = rank_errors(_modified_input, 2, "thread")
    assert "modified by an inplace operation" in str(errors[1])
    assert errors[0] is None  # and its gradients are NaN

    def gradients(rank, group):
        try:
            return _modified_input(rank, group)
        except RuntimeError:
            return None

    assert run_ranks(gradients, 2, "thread")[0].isnan().all()


NO_VECTORS = ("weight", "running_mean", "running_var")
BAD_ARGUMENTS = {
    "weight_length": ({"weight": torch.ones(5)}, ValueError, "of one shape"),
    "weight_list": ({"weight": [1.0]}, TypeError, "expected weight to be a dense torch.Tensor or None; got list"),
    "integer_mean": ({"running_mean": torch.zeros(3, dtype=torch.int64)}, TypeError, "expected running_mean of dtype"),
    "eps_zero": ({"eps": 0.0}, ValueError, "expected eps above 0; got 0.0"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "expected eps above 0; got nan"),
    "eps_text": ({"eps": "1e-5"}, ValueError, "expected eps above 0; got '1e-5'"),
    "momentum_of_two": ({"momentum": torch.ones(2)}, ValueError, "expected momentum to be a finite number"),
    "momentum_text": ({"momentum": "0.1"}, ValueError, "expected momentum to be a finite number"),
    "momentum_nan": ({"momentum": float("nan")}, ValueError, "expected momentum to be a finite number; got nan"),
    "integers": ({"input": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "got int32"),
    "no_vectors": (dict.fromkeys(NO_VECTORS) | {"input": torch.ones(4, 3).to_sparse()}, TypeError, "torch.sparse_coo"),
    "nested": ({"input": "nested"}, TypeError, "expected input to be a dense torch.Tensor"),
    "no_memory": ({"input": torch._efficientzerotensor((4, 3))}, TypeError, "without memory of its own"),
    "freed": ({"input": torch.UntypedStorage(0)}, TypeError, "without memory of its own"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_arguments_of_the_function_on_one_rank_are_an_error_on_every_rank(name):
    changed, kind, message = BAD_ARGUMENTS[name]
    if changed.get("input") == "nested":
        changed = {"input": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])}
    if name == "freed":
        changed = {"input": torch.ones(4, 3)}
        changed["input"].untyped_storage().resize_(0)

    def call(rank, group):
        running_mean, running_var = torch.zeros(3), torch.ones(3)
        arguments = {"input": torch.randn(4, 3), "weight": torch.ones(3), "training": True, "process_group": group}
        arguments |= {"running_mean": running_mean, "running_var": running_var} | (changed if rank else {})
        try:
            sync_batch_norm(**arguments)
        finally:
            assert (running_mean == 0).all()
            assert (running_var == 1).all()

    errors = rank_errors(call, 2, "thread")
    with pytest.raises(kind, match=message):
        raise errors[1]
    assert "another rank refused its input" in str(errors[0])


def test_an_inference_tensor_is_refused_before_anything_changes():
    layer = syncbn.SyncBatchNorm(3)
    with torch.inference_mode():
        x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="got an inference tensor"):
        layer(x)
    assert untouched(layer)
    with torch.inference_mode():
        assert layer(x).shape == (4, 3)


def test_a_class_in_place_of_a_communicator_is_refused():
    with pytest.raises(TypeError, match="expected process_group to be None"):
        syncbn.SyncBatchNorm(3, process_group=LocalCommunicator)


def _mesh_of_others(rank, group):
    mesh = DeviceMesh("cpu", [0, 1])
    dist.barrier()  # a rank that leaves while the others still connect would break their connections
    syncbn.SyncBatchNorm(3, process_group=mesh)


def test_a_mesh_without_this_rank_is_refused():
    errors = rank_errors(_mesh_of_others, 3, "gloo")
    assert errors[:2] == [None, None]
    assert "expected a process group that this process is in" in str(errors[2])


def test_gradients_of_zeros_without_memory_are_zeros():
    x = torch.randn(4, 3, requires_grad=True)
    syncbn.SyncBatchNorm(3)(x).sgn().sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))


def test_negative_views_are_what_they_show():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(syncbn.SyncBatchNorm(3)(torch._neg_view(x)), syncbn.SyncBatchNorm(3)(-x))
