"""timm's, torchvision's and transformers' models: what `syncbn.convert_sync_batchnorm(model)` makes of them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from frameworks.training import check_parity, made
from support.ranks import rank_errors, run_ranks
from torch import nn

import syncbn

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


def classes(model, images, classes):
    return F.cross_entropy(model(images), classes)


def segments(model, images, classes):
    return F.cross_entropy(model(images)["out"], classes[:, None, None].expand(-1, *images.shape[2:]))


def of_transformers(model, images, classes):
    return model(pixel_values=images, labels=classes).loss


def timm_resnet():
    import timm

    return timm.create_model("resnet18", num_classes=3)


def timm_efficientnet():
    import timm

    return timm.create_model("efficientnet_lite0", num_classes=3, drop_rate=0.0, drop_path_rate=0.0)


def torchvision_resnet():
    import torchvision

    return torchvision.models.resnet18(num_classes=3)


def torchvision_segmentation():
    import torchvision

    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)


def transformers_resnet():
    import transformers

    config = transformers.ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16, num_labels=3)
    return transformers.ResNetForImageClassification(config)


def transformers_mobilenet():
    import transformers

    config = transformers.MobileNetV2Config(num_labels=3, depth_multiplier=0.35, classifier_dropout_prob=0.0)
    return transformers.MobileNetV2ForImageClassification(config)


@pytest.mark.parametrize(
    ("library", "build", "loss"),
    [
        ("timm", timm_resnet, classes),
        ("timm", timm_efficientnet, classes),
        ("torchvision", torchvision_resnet, classes),
        ("torchvision", torchvision_segmentation, segments),
        ("transformers", transformers_resnet, of_transformers),
        ("transformers", transformers_mobilenet, of_transformers),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_two_ranks_equal_one_process(library, build, loss):
    pytest.importorskip(library)
    layers = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in made(build).modules())
    assert check_parity(build, loss) == layers > 0


def detector(frozen):
    import torchvision
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm = torchvision.ops.FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5)
    return FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64)


def _detect(rank, _):
    warnings.simplefilter("ignore")
    model = syncbn.convert_sync_batchnorm(made(lambda: detector(frozen=False))).train()
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(rank)) for _ in range(1 + rank)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in images]
    sum(parallel(images, targets).values()).backward()
    gradients = [p.grad is not None for p in model.parameters()]
    return dict(model.backbone.named_buffers()), all(gradients)


def test_detection_trains_with_one_and_two_images_a_rank():
    """Its proposals are drawn at random, so that there is no parity of steps: statistics of the backbone have it."""
    pytest.importorskip("torchvision")
    model = made(lambda: detector(frozen=False)).train()
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1, 1)]
    normalised, _ = model.transform(images)
    model.backbone(normalised.tensors)
    for buffers, has_gradients in run_ranks(_detect, 2, "gloo", timeout=300):
        assert has_gradients
        for name, value in model.backbone.named_buffers():
            # One pass in float32 of 20 layers.
            torch.testing.assert_close(buffers[name], value, rtol=1e-4, atol=1e-4)
        assert not torch.equal(buffers["body.bn1.running_mean"], torch.zeros(64))


def test_frozen_layers_of_torchvision_stay():
    torchvision = pytest.importorskip("torchvision")
    model = detector(frozen=True)
    before = [type(module) for module in model.modules()]
    assert torchvision.ops.FrozenBatchNorm2d in before
    assert [type(module) for module in syncbn.convert_sync_batchnorm(model).modules()] == before


def converter_of_torch(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def converter_of_timm(model):
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def through_torch(model):
    return syncbn.convert_sync_batchnorm(converter_of_torch(model))


def through_timm(model):
    return syncbn.convert_sync_batchnorm(converter_of_timm(model))


def _theirs(rank, _, converter):
    warnings.simplefilter("ignore")
    model = converter(syncbn.convert_sync_batchnorm(timm_resnet()))
    assert not any(isinstance(module, syncbn.SyncBatchNorm) for module in model.modules())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    model.train()(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("converter", [converter_of_torch, converter_of_timm])
def test_trap_23_their_converters_replace_our_layers_by_layers_that_refuse_cpus(converter):
    pytest.importorskip("timm")
    for error in rank_errors(_theirs, 2, "gloo", converter):
        assert isinstance(error, ValueError)
        assert "SyncBatchNorm expected input tensor to be on" in str(error)


@pytest.mark.parametrize(("convert", "build"), [(through_torch, timm_resnet), (through_timm, timm_efficientnet)])
def test_trap_23_what_their_converters_have_made_is_taken_over(convert, build):
    pytest.importorskip("timm")
    assert check_parity(build, classes, convert) > 0


def test_torchs_converter_drops_the_activation_of_timms_layers():
    """Which is so for the model as timm made it, too, and why timm has a converter."""
    pytest.importorskip("timm")
    x = torch.randn(2, 32, 4, 4)
    for model in (timm_efficientnet(), syncbn.convert_sync_batchnorm(timm_efficientnet())):
        assert type(model.bn1.act) is nn.ReLU6
        assert model.eval().bn1(x).min() >= 0
        converted = converter_of_torch(model).bn1
        assert type(converted) is nn.SyncBatchNorm
        assert converted(x).min() < 0
        assert syncbn.convert_sync_batchnorm(converted)(x).min() < 0
