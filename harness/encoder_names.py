"""One line on each encoder of harness.encoders and on its prefixes, readable without importing torch."""

from __future__ import annotations

ABOUT = {
    "convnet_small": "small net of the quick check, for 28 to 32 px",
    "paper_cifar10": "Hoffer et al. 2016, CIFAR-10: RECONSTRUCTION after an independent replication",
    "paper_mnist": "Hoffer et al. 2016, MNIST: RECONSTRUCTION, details chosen here",
    "paper_stl10": "Hoffer et al. 2016, STL-10 (Network-in-Network style): RECONSTRUCTION, details chosen here",
    "resnet18_small": "ResNet-18 with a 3x3 stem and no first pooling, for small images",
    "resnet18": "torchvision's ResNet-18",
    "resnet50": "torchvision's ResNet-50",
    "vit_tiny": "small Vision Transformer, 128 wide, 6 blocks, 49 to 144 tokens at 28 to 96 px",
    "vit_small": "Vision Transformer, 384 wide, 12 blocks (Touvron et al. 2021, DeiT-S), for a GPU",
    "torchvision:NAME": "any classification net of torchvision that ends in a map",
    "timm:NAME": "any net of timm that ends in a map (needs the extra `timm`)",
}
