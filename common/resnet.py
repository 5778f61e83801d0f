"""torchvision's ResNets without their classifier, with a stem for small images, and a tiny one."""

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

ARCHS = ["tiny", *torchvision.models.list_models(torchvision.models, include="*resne*")]


def build(arch, img_size, norm_layer, zero_init=False):
    """One of ARCHS, and its features' width. Up to 64 px: the CIFAR stem, 3 x 3 without max-pool.
    tiny: that stem, four blocks of 16 to 128 channels. zero_init: blocks' last BNs begin at 0."""
    if arch == "tiny":
        net, width = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer), 128
        net.inplanes, net.bn1 = 16, norm_layer(16)
        for i, stride in enumerate((1, 2, 2, 2)):
            setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, 16 * 2**i, 1, stride))
    else:
        net = torchvision.models.get_model(arch, weights=None, norm_layer=norm_layer)
        width = net.fc.in_features
    if arch == "tiny" or img_size <= 64:
        net.conv1 = nn.Conv2d(3, net.bn1.num_features, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if zero_init and isinstance(m, BasicBlock | Bottleneck):
            nn.init.zeros_((m.bn3 if isinstance(m, Bottleneck) else m.bn2).weight)
    return net, width
